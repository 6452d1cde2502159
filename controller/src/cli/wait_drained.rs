//! `tideshift wait-drained`: waits until a version has no traffic.

use super::{Failure, Output, print};
use crate::cli::client::Server;
use crate::status::{DrainState, DrainStatus};
use std::time::{Duration, Instant};

/// Wait until a version has no request in flight
///
/// A version has drained when every live proxy has applied a policy that sends it no traffic and reports no request of it
/// in flight. Long responses, streams and WebSockets count until they end. Use it in a preStop hook in place of a guessed
/// sleep. If no proxy reports, it ends after the document's drain.timeoutSeconds, counted from when the version last
/// received traffic.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift wait-drained checkout v1 --timeout 300s && kill $PID_OF_V1
  tideshift wait-drained checkout v1 --unless-serving    In a preStop hook, where only one of many pods may be stopping

Exit codes: 0 drained (or serving, with --unless-serving); 1 the controller is unreachable; 2 no such version; 3 --timeout or
the document's drain.timeoutSeconds has passed. The wait continues while the controller restarts.")]
pub(super) struct Arguments {
    /// The service.
    service: String,

    /// Its version.
    version: String,

    /// The maximum time to wait, such as 90s, 10m or 1h.
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = super::duration)]
    timeout: Duration,

    /// Exit immediately if the version receives traffic: then only one of its endpoints is stopping, and proxies exclude
    /// that endpoint themselves.
    #[arg(long)]
    unless_serving: bool,

    /// Print a line of text, or the drain status as JSON.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    server: Server,
}

impl Arguments {
    pub(super) async fn run(self) -> Result<(), Failure> {
        const EVERY: Duration = Duration::from_millis(200);
        let controller = self.server.open().await?;
        let service = controller.whole_name(&self.service);
        let path = format!("/v1/services/{service}/versions/{}/drain", self.version);
        let begun = Instant::now();
        let mut last: Option<DrainStatus> = None;
        loop {
            let too_late = begun.elapsed() >= self.timeout;
            match controller.get::<DrainStatus>(&path).await {
                Ok(drain) => {
                    let ended = match drain.state {
                        DrainState::Drained | DrainState::DeadlineExceeded => true,
                        DrainState::Serving => self.unless_serving,
                        DrainState::Draining => false,
                    };
                    if ended || too_late {
                        return self.end(&drain);
                    }
                    last = Some(drain);
                }
                // The controller may be restarting. Unknown names arrive as usage errors, which end the wait.
                Err(error @ Failure::Other(_)) if too_late => {
                    return last.as_ref().map_or(Err(error), |drain| self.end(drain));
                }
                Err(Failure::Other(_)) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    fn end(&self, drain: &DrainStatus) -> Result<(), Failure> {
        let name = format!("{} of {}", self.version, self.service);
        match self.output {
            Output::Text => print(&format!("{name}: {:?} - {}\n", drain.state, drain.message))?,
            Output::Json => {
                let json = serde_json::to_string_pretty(drain).map_err(|error| Failure::Other(error.into()))?;
                print(&format!("{json}\n"))?;
            }
        }
        match drain.state {
            DrainState::Drained => Ok(()),
            DrainState::Serving if self.unless_serving => Ok(()),
            DrainState::Serving => Err(Failure::TooLate(format!("{name} still serves: {}", drain.message))),
            _ => Err(Failure::TooLate(format!("{name} has not drained: {}", drain.message))),
        }
    }
}
