//! `tideshift serve`: run the controller.

use super::Failure;
use crate::api::TokenFiles;
use crate::hooks::Allowed;
use crate::serve::{self, Cluster, Documents, Options, ServeError, TlsFiles};
use crate::store::StoreError;
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
  tideshift serve --kubernetes --watch-namespace shop
  tideshift serve -f shift.yaml --listen 0.0.0.0:7460 --tls-cert tls.crt --tls-key tls.key \
    --read-token-file read.tokens --operate-token-file operate.tokens --proxy-token-file proxy.tokens

Serves GET /v1/policy and POST /v1/reports for proxies, GET /v1/status for people and tools, /healthz, /readyz, /metrics;
a web page at /; the rest is in GET /v1/openapi.json.")]
pub(super) struct Arguments {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. May be given several times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required_unless_present = "kubernetes")]
    files: Vec<PathBuf>,

    /// Documents are TrafficShift resources of a Kubernetes cluster, and state is kept there; several replicas may run, of
    /// which one leads.
    #[arg(long, env = "TIDESHIFT_KUBERNETES", conflicts_with_all = ["files", "state_dir"])]
    kubernetes: bool,

    /// How the cluster is reached. Without it: KUBECONFIG, ~/.kube/config, or the pod's service account.
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    kubeconfig: Option<PathBuf>,

    /// A namespace whose TrafficShifts count. May be given several times. Without it: all namespaces.
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "TIDESHIFT_WATCH_NAMESPACE",
        value_delimiter = ',',
        requires = "kubernetes"
    )]
    watch_namespace: Vec<String>,

    /// Which replica this is. Without it: the host name, which is the pod's name.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pod_name: Option<String>,

    /// Where the Lease, the state and the Secrets of other clusters are. Without it: the service account's namespace.
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    pod_namespace: Option<String>,

    /// How other replicas reach this one, such as http://10.1.2.3:7460. Without it: the address of --listen.
    #[arg(long, value_name = "URL", env = "TIDESHIFT_ADVERTISE", requires = "kubernetes")]
    advertise: Option<String>,

    /// The Lease's name; the Secrets that hold the state are called NAME-state and NAME-counts.
    #[arg(long, value_name = "NAME", default_value = "tideshift", env = "TIDESHIFT_LEASE_NAME")]
    lease_name: String,

    /// Proxies may also have tokens that the cluster has given for this audience, as a TokenReview says.
    #[arg(long, value_name = "AUDIENCE", env = "TIDESHIFT_PROXY_TOKEN_AUDIENCE", requires = "kubernetes")]
    proxy_token_audience: Option<String>,

    /// Where to listen: a loopback address, unless there are tokens.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7460", env = "TIDESHIFT_LISTEN", value_parser = address)]
    listen: SocketAddr,

    /// Where /healthz and /readyz are served as well, to anyone and without TLS: for a kubelet, whose probes then need no
    /// connection among those of clients.
    #[arg(long, value_name = "ADDRESS", env = "TIDESHIFT_HEALTH_LISTEN", value_parser = address)]
    health_listen: Option<SocketAddr>,

    /// File of read-only bearer tokens, one per line, each with a name before it or not. Reloaded on change, like every file
    /// option.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_READ_TOKEN_FILE")]
    read_token_file: Option<PathBuf>,

    /// Bearer tokens that may do everything that users can do.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_OPERATE_TOKEN_FILE")]
    operate_token_file: Option<PathBuf>,

    /// Bearer tokens of proxies, for policies and reports alone; one per line: NAME TOKEN [SERVICES]. NAME is the proxy that
    /// it speaks for; a TOKEN alone speaks for any.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_PROXY_TOKEN_FILE")]
    proxy_token_file: Option<PathBuf>,

    /// The certificate to speak TLS with, in PEM, and those that lead from it to a trusted one.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Authorities whose certificates say which proxy a client is, in PEM: it polls and reports for the proxies of the
    /// certificate's names (common name, DNS names, URIs) and needs no token for that.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_CLIENT_CA", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,

    /// Where webhooks may go: an address, a network such as 10.0.0.0/8, a host, *.DOMAIN, or one of the words public, private
    /// and loopback. May be given several times. Held against the address that is connected to. Link-local and metadata
    /// addresses and the cluster's API server are reached only if they are named themselves. [default: public with
    /// --kubernetes, else public, private and loopback]
    #[arg(
        long,
        value_name = "DESTINATION",
        env = "TIDESHIFT_WEBHOOK_ALLOW",
        value_delimiter = ',',
        value_parser = str::parse::<Allowed>
    )]
    webhook_allow: Vec<Allowed>,

    /// Where to keep rollouts and counts across restarts. Without it: `.tideshift` beside the first document, in a
    /// folder of that document's name.
    #[arg(long, value_name = "DIR", env = "TIDESHIFT_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Where the secrets are that documents refer to by secretRef and urlSecretRef: the file DIR/NAME/KEY, as a mounted Secret
    /// has it. Reloaded on change.
    #[arg(long, value_name = "DIR", env = "TIDESHIFT_SECRETS_DIR", conflicts_with = "kubernetes")]
    secrets_dir: Option<PathBuf>,

    /// How log lines look; they go to standard error.
    #[arg(long, value_enum, default_value = "auto", env = "TIDESHIFT_LOG_FORMAT")]
    log_format: LogFormat,

    /// error, warn, info, debug, trace, or a filter of them such as `tideshift=debug,warn`.
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "TIDESHIFT_LOG")]
    log_level: String,
}

pub(super) async fn run(arguments: Arguments) -> Result<(), Failure> {
    telemetry::start(arguments.log_format, &arguments.log_level).map_err(Failure::Usage)?;
    let documents = match arguments.kubernetes {
        true => Documents::Kubernetes(Cluster {
            kubeconfig: arguments.kubeconfig,
            namespaces: arguments.watch_namespace.into_iter().filter(|namespace| !namespace.is_empty()).collect(),
            identity: arguments.pod_name.map_or_else(host_name, Ok)?,
            namespace: arguments.pod_namespace,
            advertise: arguments.advertise,
            lease: arguments.lease_name,
            proxy_token_audience: arguments.proxy_token_audience,
        }),
        false => Documents::Files {
            files: arguments.files,
            state_dir: arguments.state_dir,
            secrets_dir: arguments.secrets_dir,
        },
    };
    let options = Options {
        documents,
        listen: arguments.listen,
        health_listen: arguments.health_listen,
        tokens: TokenFiles {
            read: arguments.read_token_file,
            operate: arguments.operate_token_file,
            proxy: arguments.proxy_token_file,
        },
        webhooks_allowed: arguments.webhook_allow,
        tls: arguments.tls_cert.zip(arguments.tls_key).map(|(cert, key)| {
            let client_ca = arguments.tls_client_ca;
            TlsFiles { cert, key, client_ca }
        }),
    };
    serve::serve(options).await.map_err(|error| match error {
        ServeError::Documents(errors) => Failure::Documents(errors),
        ServeError::NotLoopback(_)
        | ServeError::NoCluster(_)
        | ServeError::Tokens(_)
        | ServeError::Certificate(_)
        | ServeError::Store(StoreError::NoFolder { .. }) => Failure::Usage(error.to_string()),
        error => Failure::Other(error.into()),
    })
}

/// An address to listen on. `:7460` is all addresses, as in Go programs; a name is not looked up.
fn address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse()
        .map_err(|_| "expected ADDRESS:PORT, such as 127.0.0.1:7460, [::1]:7460, or :7460 for all addresses".to_owned())
}

/// What this machine calls itself; in a pod, the pod's name.
fn host_name() -> Result<String, Failure> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    match name.is_empty() {
        false => Ok(name),
        true => Err(Failure::Usage("--pod-name: missing, and this machine has no host name".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_leave_out_the_host() {
        assert_eq!(address(":7461").unwrap(), "[::]:7461".parse().unwrap());
        assert_eq!(address("0.0.0.0:80").unwrap(), "0.0.0.0:80".parse().unwrap());
        for wrong in ["7461", "localhost:7461", ":x", "", ":"] {
            assert!(address(wrong).unwrap_err().contains(":7460 for all addresses"), "{wrong}");
        }
    }
}
