//! `kubectl tideshift`: the same program, called by another name. It knows namespaces, and it reaches the controller
//! through the API server, with the rights of whoever calls.

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

/// What the file must be called for kubectl to find it.
const FILE: &str = "kubectl-tideshift";
/// The controller's port in its pods.
const PORT: u16 = 7460;
/// The controller's pods, as the chart labels them.
const PODS: &str = "app.kubernetes.io/name=tideshift";

pub(super) const AFTER_HELP: &str = "\
A rollout is named as its TrafficShift is; one of another namespace is NAME.NAMESPACE, or NAME with --namespace.
  kubectl tideshift status --all-namespaces
  kubectl tideshift set-target checkout v2 --wait --namespace shop
  kubectl tideshift promote | pause | resume | abort | rollback --to v1 | set-weight 25
  kubectl tideshift watch                          Each transition as it happens
  kubectl tideshift explain --host shop.example.com -H 'x-beta: 1'
                                                   Which version would this request get, and why?

The controller is reached by a port-forward to one of its pods, with the token in its Secret: you must be allowed to list pods,
to get and create pods/portforward, and to get that Secret, in the controller's namespace. Without the latter, --token-file says
what token to use; with --server or TIDESHIFT_SERVER, the API server is not asked at all.

Exit codes: 0 fine; 2 a document or the command line is wrong; 3 what was waited for has not come in time; 4 it does not fit
how things stand; 5 the controller wants another token; 6 the rollout that was waited for has failed, or something else took its
place; 7 done, but not safe from a restart of the controller, which cannot keep it; 1 anything else.";

/// Whether kubectl has called.
pub(super) fn has_called() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_stem().is_some_and(|stem| stem == FILE))
}

/// The command line as the plugin has it.
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

/// Where in which cluster; nothing unless kubectl has called.
#[derive(Debug)]
pub(super) struct Place(Option<Flags>);

#[derive(Debug, Args)]
#[command(next_help_heading = "The cluster")]
struct Flags {
    /// The namespace of rollouts that are named without one. Without it: that of the kubeconfig's context.
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,

    /// All namespaces; rollouts are then named NAME.NAMESPACE.
    #[arg(long, short = 'A', conflicts_with = "namespace")]
    all_namespaces: bool,

    /// The kubeconfig's context. Without it: the current one.
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

/// A way to the controller.
#[derive(Debug)]
pub(super) struct Way {
    /// Where it begins on this machine.
    pub(super) address: SocketAddr,
    /// The name in the controller's certificate, if it speaks TLS.
    pub(super) host: Option<String>,
    /// The token that the controller itself reads from its Secret, if that can be read.
    pub(super) token: Option<String>,
}

impl Place {
    /// The namespace of rollouts that are asked about without one; `None` unless kubectl has called.
    pub(super) async fn namespace(&self) -> Result<Option<String>, Failure> {
        let Some(flags) = &self.0 else { return Ok(None) };
        match &flags.namespace {
            _ if flags.all_namespaces => Ok(None),
            Some(namespace) => Ok(Some(namespace.clone())),
            None => Ok(Some(flags.config().await?.default_namespace)),
        }
    }

    /// Opens a way to the controller; `None` unless kubectl has called.
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

/// A pod of the controller that answers; all of them know, or know who knows.
async fn ready_pod(pods: &Api<Pod>) -> Result<Option<Pod>, kube::Error> {
    let is_ready = |pod: &Pod| {
        let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        pod.metadata.deletion_timestamp.is_none() && conditions.any(|one| one.type_ == "Ready" && one.status == "True")
    };
    Ok(pods.list(&ListParams::default().labels(PODS)).await?.items.into_iter().find(is_ready))
}

/// The first token to operate with, if whoever calls may read it.
async fn operate_token(secrets: &Api<Secret>, name: &str) -> Option<String> {
    let data = secrets.get(name).await.ok()?.data?;
    let tokens = String::from_utf8(data.get("operate")?.0.clone()).ok()?;
    tokens.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

/// Leads every connection to a pod that is ready by then: the one from before may be gone.
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
        // Who of the two ends it does not matter.
        let _ = copy_bidirectional(&mut stream, &mut there).await;
    }
    Ok(())
}
