//! `kubectl tideshift`: the same program under another name. It handles namespaces, and connects to the controller
//! through the API server with the caller's permissions.

use super::Failure;
use crate::kubernetes;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{Api, ListParams};
use kube::config::KubeConfigOptions;
use kube::{Client, Config, ResourceExt};
use std::net::SocketAddr;
use std::path::Path;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// The file name by which kubectl finds the plugin.
const FILE: &str = "kubectl-tideshift";
/// The controller's port in its pods.
const PORT: u16 = 7460;
/// The controller's pods, as the chart labels them.
const PODS: &str = "app.kubernetes.io/name=tideshift";

pub(super) const AFTER_HELP: &str = "\
A rollout has the name of its TrafficShift. For another namespace use NAME.NAMESPACE, or NAME with --namespace.
  kubectl tideshift status --all-namespaces
  kubectl tideshift set-target checkout v2 --wait --namespace shop
  kubectl tideshift promote | pause | resume | abort | rollback --to v1 | set-weight 25
  kubectl tideshift watch                          Print each transition as it happens
  kubectl tideshift explain --host shop.example.com -H 'x-beta: 1'
                                                   Show which version this request would get, and why

The plugin opens a port-forward to one of the controller's pods and uses the token in the controller's Secret. In the
controller's namespace you need permission to list pods, to get and create pods/portforward, and to get that Secret. If you
cannot read the Secret, pass a token with --token-file. With --server or TIDESHIFT_SERVER the plugin bypasses the API server.

Exit codes: 0 success; 1 any other error; 2 invalid document or command line; 3 timed out waiting; 4 conflicts with the
rollout's current state; 5 authentication failed; 6 the rollout failed or was superseded; 7 applied, but the controller could not
persist it.";

/// Whether this process runs as the kubectl plugin.
pub(super) fn has_called() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_stem().is_some_and(|stem| stem == FILE))
}

/// The command line of the plugin.
pub(super) fn named(command: Command) -> Command {
    let command = command.name("kubectl-tideshift").bin_name("kubectl tideshift").after_help(AFTER_HELP);
    command.mut_subcommands(|sub| {
        let help =
            sub.get_after_help().map(|help| help.to_string().replace("\n  tideshift ", "\n  kubectl tideshift "));
        match help {
            Some(help) => sub.after_help(help),
            None => sub,
        }
    })
}

/// The cluster and namespace; `None` unless this runs as the kubectl plugin.
#[derive(Debug)]
pub(super) struct Place(Option<Flags>);

#[derive(Debug, Args)]
#[command(next_help_heading = "The cluster")]
struct Flags {
    /// The namespace of rollout names that have none. Default: the namespace of the kubeconfig's context.
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,

    /// Use all namespaces; rollout names are then NAME.NAMESPACE.
    #[arg(long, short = 'A', conflicts_with = "namespace")]
    all_namespaces: bool,

    /// The kubeconfig's context. Default: the current context.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,

    /// The controller's namespace.
    #[arg(long, value_name = "NAMESPACE", default_value = "tideshift-system")]
    controller_namespace: String,
}

impl FromArgMatches for Place {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        has_called().then(|| Flags::from_arg_matches(matches)).transpose().map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Place {
    fn augment_args(command: Command) -> Command {
        if has_called() { Flags::augment_args(command) } else { command }
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// A connection to the controller.
#[derive(Debug)]
pub(super) struct Way {
    /// The local address of the port-forward.
    pub(super) address: SocketAddr,
    /// The name in the controller's certificate, if it speaks TLS.
    pub(super) host: Option<String>,
    /// The operate token from the controller's Secret, if the caller can read it.
    pub(super) token: Option<String>,
}

impl Place {
    /// The namespace of rollout names that have none; `None` unless this runs as the kubectl plugin.
    pub(super) async fn namespace(&self) -> Result<Option<String>, Failure> {
        let Some(flags) = &self.0 else { return Ok(None) };
        match &flags.namespace {
            _ if flags.all_namespaces => Ok(None),
            Some(namespace) => Ok(Some(namespace.clone())),
            None => Ok(Some(flags.config().await?.default_namespace)),
        }
    }

    /// Opens a port-forward to the controller; `None` unless this runs as the kubectl plugin.
    pub(super) async fn way(&self) -> Result<Option<Way>, Failure> {
        let Some(flags) = &self.0 else { return Ok(None) };
        let namespace = &flags.controller_namespace;
        let unreachable =
            |why: String| Failure::Other(format!("the controller in namespace {namespace}: {why}").into());
        let refused = |error: kube::Error| unreachable(kubernetes::reason(&error));
        let client = Client::try_from(flags.config().await?).map_err(refused)?;
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let pod = ready_pod(&pods)
            .await
            .map_err(refused)?
            .ok_or_else(|| unreachable(format!("no pod labelled {PODS} is ready there; see --controller-namespace")))?;
        let spec = pod.spec.clone().unwrap_or_default();
        let is_tls =
            spec.containers.iter().flat_map(|one| one.args.iter().flatten()).any(|arg| arg.starts_with("--tls-cert"));
        let service = pod.labels().get("app.kubernetes.io/instance").cloned().unwrap_or_else(|| "tideshift".to_owned());
        let volumes = spec.volumes.unwrap_or_default();
        let secret =
            volumes.into_iter().find(|volume| volume.name == "tokens").and_then(|volume| volume.secret?.secret_name);
        let token = match secret {
            Some(secret) => operate_token(&Api::namespaced(client, namespace), &secret).await,
            None => None,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(forward(listener, pods));
        Ok(Some(Way { address, host: is_tls.then(|| format!("{service}.{namespace}.svc")), token }))
    }
}

impl Flags {
    async fn config(&self) -> Result<Config, Failure> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let config = Config::from_kubeconfig(&options).await;
        config.map_err(|error| Failure::Usage(format!("the kubeconfig: {error}")))
    }
}

/// A ready pod of the controller. Any replica works, because followers forward requests to the leader.
async fn ready_pod(pods: &Api<Pod>) -> Result<Option<Pod>, kube::Error> {
    let is_ready = |pod: &Pod| {
        let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        pod.metadata.deletion_timestamp.is_none() && conditions.any(|one| one.type_ == "Ready" && one.status == "True")
    };
    Ok(pods.list(&ListParams::default().labels(PODS)).await?.items.into_iter().find(is_ready))
}

/// The first operate token, if the caller can read the Secret.
async fn operate_token(secrets: &Api<Secret>, name: &str) -> Option<String> {
    let data = secrets.get(name).await.ok()?.data?;
    let tokens = String::from_utf8(data.get("operate")?.0.clone()).ok()?;
    tokens.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

/// Forwards each connection to a pod that is ready at that time, because the previous pod may be gone.
async fn forward(listener: TcpListener, pods: Api<Pod>) {
    while let Ok((stream, _)) = listener.accept().await {
        let pods = pods.clone();
        tokio::spawn(async move {
            if let Err(error) = forward_one(stream, &pods).await {
                eprintln!("port-forward: {}", kubernetes::reason(&error));
            }
        });
    }
}

async fn forward_one(mut stream: TcpStream, pods: &Api<Pod>) -> Result<(), kube::Error> {
    let Some(pod) = ready_pod(pods).await? else { return Ok(()) };
    let mut forwarder = pods.portforward(&pod.name_any(), &[PORT]).await?;
    if let Some(mut there) = forwarder.take_stream(PORT) {
        // Either side may close the connection.
        let _ = copy_bidirectional(&mut stream, &mut there).await;
    }
    Ok(())
}
