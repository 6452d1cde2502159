//! `tideshift serve`: run the controller.

use super::Failure;
use crate::serve::{self, Options, ServeError};
use crate::telemetry::{self, LogFormat};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Run the controller: probe endpoints, move weights, tell proxies, take their reports
///
/// Proxies poll it for their policy and report what they count. It probes each version's endpoints, gives traffic only
/// to what is ready, and moves it from the stable version to the target step by step. Documents may be changed while
/// it runs; one that is wrong is refused and what it said before stays in force. Ends cleanly on SIGTERM.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift serve -f shift.yaml
  tideshift serve -f checkout.yaml -f search.yaml --listen 127.0.0.1:7460
  curl http://127.0.0.1:7460/readyz

Serves GET /v1/policy and POST /v1/reports for proxies, GET /v1/status for people and tools, /healthz, /readyz, /metrics.")]
pub(super) struct Arguments {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. May be given several times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// Where to listen: a loopback address.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7460", env = "TIDESHIFT_LISTEN")]
    listen: SocketAddr,

    /// Where to keep rollouts and counts across restarts. Without it: `.tideshift` beside the first document, in a
    /// folder of that document's name.
    #[arg(long, value_name = "DIR", env = "TIDESHIFT_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// How log lines look; they go to standard error.
    #[arg(long, value_enum, default_value = "auto", env = "TIDESHIFT_LOG_FORMAT")]
    log_format: LogFormat,

    /// error, warn, info, debug, trace, or a filter of them such as `tideshift=debug,warn`.
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "TIDESHIFT_LOG")]
    log_level: String,
}

pub(super) async fn run(arguments: Arguments) -> Result<(), Failure> {
    telemetry::start(arguments.log_format, &arguments.log_level).map_err(Failure::Usage)?;
    let options = Options { files: arguments.files, listen: arguments.listen, state_dir: arguments.state_dir };
    serve::serve(options).await.map_err(|error| match error {
        ServeError::Documents(errors) => Failure::Documents(errors),
        ServeError::NotLoopback(_) => Failure::Usage(error.to_string()),
        error => Failure::Other(error.into()),
    })
}
