//! `tideshift wait-drained`: end when a version's traffic has really stopped.

use super::server::Server;
use super::{Failure, Output, print};
use crate::status::{DrainState, DrainStatus};
use std::time::{Duration, Instant};

/// Wait until nothing of a version is in flight any more
///
/// A version has drained when every live proxy has applied a policy that gives it nothing and reports nothing of it in
/// flight: long answers, streams and WebSockets hold it until they end. Made for a preStop hook: it ends when traffic
/// has stopped, not after a guessed sleep. Where no proxy reports, it ends by the document's drain.timeoutSeconds, counted
/// from when the version was last given something.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift wait-drained checkout v1 --timeout 300s && kill $PID_OF_V1
  tideshift wait-drained checkout v1 --unless-serving    In a preStop hook, where one pod of many may be going, too

Exit codes: 0 drained (or serving, with --unless-serving); 3 the timeout or the document's drain.timeoutSeconds has passed; 2 there is no such version; 1 the
controller cannot be asked at all. While it is away for a moment, the wait goes on.")]
pub(super) struct Arguments {
    /// The service.
    service: String,

    /// Its version.
    version: String,

    /// How long to wait at most, such as 90s, 10m or 1h.
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = super::duration)]
    timeout: Duration,

    /// End at once if the version is given requests: then it is not the version that goes, but one of its endpoints,
    /// which proxies leave out themselves.
    #[arg(long)]
    unless_serving: bool,

    /// A line for people, or the drain as JSON.
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
                // It may be starting again; what it does not know, it says as a mistake of the user's.
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
