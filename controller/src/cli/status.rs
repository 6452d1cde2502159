//! `tideshift status`: the current state.

use super::{Failure, print_on};
use crate::cli::client::Server;
use crate::status::Status;
use clap::ValueEnum;
use std::io::{IsTerminal, stdout};
use std::time::Duration;

/// Show weights, readiness, requests by version, rollouts and proxies
///
/// Reads the status of a running controller. With --watch it repeats until Ctrl-C, redraws on a terminal, and keeps retrying
/// while the controller is unreachable.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift status
  tideshift status --watch
  tideshift status --output json | jq '.services[].versions[] | {name, weight}'")]
pub(super) struct Arguments {
    /// Print a table, or the JSON of GET /v1/status (with --watch, one line each).
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    /// Repeat every second.
    #[arg(long, short)]
    watch: bool,

    #[command(flatten)]
    server: Server,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

pub(super) async fn run(arguments: Arguments) -> Result<(), Failure> {
    const EVERY: Duration = Duration::from_secs(1);
    let controller = arguments.server.open().await?;
    let redraws = arguments.watch && arguments.output == Output::Table && stdout().is_terminal();
    // Cursor home, then clear below: this flickers less than clearing first.
    let drawn = |text: String| if redraws { format!("\x1b[H\x1b[J{text}") } else { text };
    let (mut first, mut trouble) = (true, None);
    loop {
        let text = match controller.get::<Status>("/v1/status").await {
            Ok(mut status) => {
                status.services.retain(|service| controller.is_meant(&service.rollout));
                (first, trouble) = (false, None);
                drawn(arguments.text(&status)?)
            }
            // Fail if the first request fails; retry later ones, since the controller may be restarting.
            Err(error) if first => return Err(error),
            Err(error) if redraws => drawn(format!("{error}\n")),
            Err(error) => {
                let error = error.to_string();
                if trouble.as_ref() != Some(&error) {
                    eprintln!("{error}");
                }
                trouble = Some(error);
                String::new()
            }
        };
        if !print_on(&text)? || !arguments.watch {
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}

impl Arguments {
    fn text(&self, status: &Status) -> Result<String, Failure> {
        let json = match (self.output, self.watch) {
            (Output::Table, _) => return Ok(status.to_table()),
            (Output::Json, false) => serde_json::to_string_pretty(status),
            (Output::Json, true) => serde_json::to_string(status),
        };
        Ok(json.map_err(|error| Failure::Other(error.into()))? + "\n")
    }
}
