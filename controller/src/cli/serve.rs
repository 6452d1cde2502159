//! `tideshift serve`: run the controller.

use super::Failure;
use crate::api::TokenFiles;
use crate::serve::{self, Options, ServeError, TlsFiles};
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
  tideshift serve -f shift.yaml --listen 0.0.0.0:7460 --tls-cert tls.crt --tls-key tls.key \
    --read-token-file read.tokens --operate-token-file operate.tokens --proxy-token-file proxy.tokens

Serves GET /v1/policy and POST /v1/reports for proxies, GET /v1/status for people and tools, /healthz, /readyz, /metrics;
a web page at /; the rest is in GET /v1/openapi.json.")]
pub(super) struct Arguments {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. May be given several times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// Where to listen: a loopback address, unless there are tokens.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7460", env = "TIDESHIFT_LISTEN")]
    listen: SocketAddr,

    /// Bearer tokens that may look: one on a line, any of which will do. Read again when it changes, as all files here.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_READ_TOKEN_FILE")]
    read_token_file: Option<PathBuf>,

    /// Bearer tokens that may do everything that users can do.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_OPERATE_TOKEN_FILE")]
    operate_token_file: Option<PathBuf>,

    /// Bearer tokens of proxies: for policies and reports, nothing else.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_PROXY_TOKEN_FILE")]
    proxy_token_file: Option<PathBuf>,

    /// The certificate to speak TLS with, in PEM, and those that lead from it to a trusted one.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

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
    let options = Options {
        files: arguments.files,
        listen: arguments.listen,
        tokens: TokenFiles {
            read: arguments.read_token_file,
            operate: arguments.operate_token_file,
            proxy: arguments.proxy_token_file,
        },
        tls: arguments.tls_cert.zip(arguments.tls_key).map(|(cert, key)| TlsFiles { cert, key }),
        state_dir: arguments.state_dir,
    };
    serve::serve(options).await.map_err(|error| match error {
        ServeError::Documents(errors) => Failure::Documents(errors),
        ServeError::NotLoopback(_) | ServeError::Tokens(_) | ServeError::Certificate(_) => {
            Failure::Usage(error.to_string())
        }
        error => Failure::Other(error.into()),
    })
}
