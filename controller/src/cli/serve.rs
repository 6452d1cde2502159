//! `tideshift serve`: run the controller.

use super::Failure;
use crate::api::TokenFiles;
use crate::server::{Cluster, Documents, Options, ServeError, TlsFiles};
use crate::store::StoreError;
use crate::telemetry::LogFormat;
use crate::webhooks::Allowed;
use crate::{server, telemetry};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Run the controller: probe endpoints, move weights, send policies to proxies
///
/// Proxies poll the controller for their policy and report their counts. The controller probes each version's endpoints,
/// sends traffic only to ready endpoints, and moves it from the stable version to the target step by step. You can change
/// documents while it runs: it rejects an invalid document and keeps the previous one in force. SIGTERM ends it cleanly.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift serve -f shift.yaml
  tideshift serve -f checkout.yaml -f search.yaml --listen 127.0.0.1:7460
  curl http://127.0.0.1:7460/readyz
  tideshift serve --kubernetes --watch-namespace shop
  tideshift serve -f shift.yaml --listen 0.0.0.0:7460 --tls-cert tls.crt --tls-key tls.key \
    --read-token-file read.tokens --operate-token-file operate.tokens --proxy-token-file proxy.tokens

It serves GET /v1/policy and POST /v1/reports for proxies, GET /v1/status for people and tools, /healthz, /readyz, /metrics,
and a web page at /. GET /v1/openapi.json describes the whole API.")]
pub(super) struct Arguments {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required_unless_present = "kubernetes")]
    files: Vec<PathBuf>,

    /// Read documents from the TrafficShift resources of a Kubernetes cluster and keep state there. You can run several
    /// replicas; leader election chooses the active one.
    #[arg(long, env = "TIDESHIFT_KUBERNETES", conflicts_with_all = ["files", "state_dir"])]
    kubernetes: bool,

    /// The kubeconfig of the cluster. [default: KUBECONFIG, ~/.kube/config, or the pod's service account]
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    kubeconfig: Option<PathBuf>,

    /// A namespace whose TrafficShifts the controller handles. Repeatable. [default: all namespaces]
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "TIDESHIFT_WATCH_NAMESPACE",
        value_delimiter = ',',
        requires = "kubernetes"
    )]
    watch_namespace: Vec<String>,

    /// The name of this replica. [default: the host name, which is the pod's name]
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pod_name: Option<String>,

    /// The namespace of the Lease, the state and the Secrets of other clusters. [default: the service account's namespace]
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    pod_namespace: Option<String>,

    /// The URL at which other replicas reach this one, such as http://10.1.2.3:7460. [default: the address of --listen]
    #[arg(long, value_name = "URL", env = "TIDESHIFT_ADVERTISE", requires = "kubernetes")]
    advertise: Option<String>,

    /// The name of the Lease. The Secrets NAME-state and NAME-counts hold the state.
    #[arg(long, value_name = "NAME", default_value = "tideshift", env = "TIDESHIFT_LEASE_NAME")]
    lease_name: String,

    /// Also accept proxies with service account tokens for this audience, verified by TokenReview.
    #[arg(long, value_name = "AUDIENCE", env = "TIDESHIFT_PROXY_TOKEN_AUDIENCE", requires = "kubernetes")]
    proxy_token_audience: Option<String>,

    /// The address to listen on. Without tokens it must be a loopback address.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7460", env = "TIDESHIFT_LISTEN", value_parser = address)]
    listen: SocketAddr,

    /// A second address for /healthz and /readyz, without authentication and TLS: kubelet probes then do not compete with
    /// clients for connections.
    #[arg(long, value_name = "ADDRESS", env = "TIDESHIFT_HEALTH_LISTEN", value_parser = address)]
    health_listen: Option<SocketAddr>,

    /// File of read-only bearer tokens, one per line, with an optional name in front. Reloaded on change, like every file
    /// option.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_READ_TOKEN_FILE")]
    read_token_file: Option<PathBuf>,

    /// File of operate tokens: they permit every user action, reading included.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_OPERATE_TOKEN_FILE")]
    operate_token_file: Option<PathBuf>,

    /// File of proxy tokens, which permit only policies and reports. One per line: NAME TOKEN [SERVICES]. NAME is the proxy
    /// that may use it; any proxy may use a line with only a TOKEN.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_PROXY_TOKEN_FILE")]
    proxy_token_file: Option<PathBuf>,

    /// The TLS certificate chain of the server, in PEM.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of the certificate, in PEM.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// CA certificates in PEM for mutual TLS: a proxy with a client certificate from one of these CAs polls and reports
    /// under the certificate's names (common name, DNS names, URIs) and needs no token.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TLS_CLIENT_CA", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,

    /// A destination that webhooks may call: an address, a network such as 10.0.0.0/8, a host, *.DOMAIN, or one of public,
    /// private and loopback. Repeatable. The controller checks the address that it connects to. To allow link-local and
    /// metadata addresses or the cluster's API server, name them explicitly. [default: public with --kubernetes, else
    /// public, private and loopback]
    #[arg(
        long,
        value_name = "DESTINATION",
        env = "TIDESHIFT_WEBHOOK_ALLOW",
        value_delimiter = ',',
        value_parser = str::parse::<Allowed>
    )]
    webhook_allow: Vec<Allowed>,

    /// The directory that keeps rollouts and counts across restarts. [default: .tideshift/NAME next to the first document,
    /// where NAME is that document's name]
    #[arg(long, value_name = "DIR", env = "TIDESHIFT_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Where the secrets are that documents refer to by secretRef and urlSecretRef: the file DIR/NAME/KEY, as a mounted Secret
    /// has it. Reloaded on change.
    #[arg(long, value_name = "DIR", env = "TIDESHIFT_SECRETS_DIR", conflicts_with = "kubernetes")]
    secrets_dir: Option<PathBuf>,

    /// The format of log lines, which go to standard error.
    #[arg(long, value_enum, default_value = "auto", env = "TIDESHIFT_LOG_FORMAT")]
    log_format: LogFormat,

    /// The log level: error, warn, info, debug, trace, or a filter such as `tideshift=debug,warn`.
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
    server::serve(options).await.map_err(|error| match error {
        ServeError::Documents(errors) => Failure::Documents(errors),
        ServeError::NotLoopback(_)
        | ServeError::NoCluster(_)
        | ServeError::Tokens(_)
        | ServeError::Certificate(_)
        | ServeError::Store(StoreError::NoFolder { .. }) => Failure::Usage(error.to_string()),
        error => Failure::Other(error.into()),
    })
}

/// Parses an address to listen on. `:7460` means all addresses, as in Go programs; host names are not resolved.
fn address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse()
        .map_err(|_| "expected ADDRESS:PORT, such as 127.0.0.1:7460, [::1]:7460, or :7460 for all addresses".to_owned())
}

/// The host name; in a pod, the name of the pod.
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
    fn listen_address_without_host_means_all_addresses() {
        assert_eq!(address(":7461").unwrap(), "[::]:7461".parse().unwrap());
        assert_eq!(address("0.0.0.0:80").unwrap(), "0.0.0.0:80".parse().unwrap());
        for wrong in ["7461", "localhost:7461", ":x", "", ":"] {
            assert!(address(wrong).unwrap_err().contains(":7460 for all addresses"), "{wrong}");
        }
    }
}
