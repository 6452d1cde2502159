//! `tideshift status`: how things stand.

use super::server::Server;
use super::{Failure, print_on};
use crate::status::Status;
use clap::ValueEnum;
use std::io::{IsTerminal, stdout};
use std::time::Duration;

/// Show weights, readiness, requests by version, rollouts and proxies
///
/// Asks a running controller. With --watch it goes on until Ctrl-C, redrawing on a terminal.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift status
  tideshift status --watch
  tideshift status --output json | jq '.services[].versions[] | {name, weight}'")]
pub(super) struct Arguments {
    /// As a table for people, or as the JSON of GET /v1/status (with --watch: one line each).
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    /// Show it again every second.
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
    loop {
        let mut status: Status = controller.get("/v1/status").await?;
        status.services.retain(|service| controller.is_meant(&service.rollout));
        let mut text = match (arguments.output, arguments.watch) {
            (Output::Table, _) => status.to_table(),
            (Output::Json, false) => {
                serde_json::to_string_pretty(&status).map_err(|e| Failure::Other(e.into()))? + "\n"
            }
            (Output::Json, true) => serde_json::to_string(&status).map_err(|e| Failure::Other(e.into()))? + "\n",
        };
        if arguments.watch && arguments.output == Output::Table && stdout().is_terminal() {
            // Home, and clear what is below: less flicker than clearing first.
            text = format!("\x1b[H\x1b[J{text}");
        }
        if !print_on(&text)? || !arguments.watch {
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}
