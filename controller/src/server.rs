//! `tideshift serve`: probe results, documents, proxy reports and the clock feed the reconcile loop. Its output is
//! persisted first, then published.

use crate::api::{Events, Published, ReconcileBarrier, Shared, TokenError, TokenFiles};
use crate::clock::now;
use crate::documents::{DocumentErrors, LastGood};
use crate::limits::Limits;
use crate::metrics::ControllerMetrics;
use crate::net::io_reason;
use crate::readiness::Prober;
use crate::reconciler::state::PersistedState;
use crate::reconciler::{CountState, Reconciler};
use crate::role::Role;
use crate::store::secret::SecretStoreError;
use crate::store::{Store, StoreError};
use crate::webhooks::{Allowed, Egress, Hooks};
use crate::{api, clock};
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

mod credentials;
mod driver;
mod file_source;
mod http;
mod replica;
mod secret_files;
mod tls;

use crate::store::writer::StateWriter;
use credentials::Secrets;
use driver::{ReconcileLoop, Source};
use file_source::Files;
use secret_files::SecretFiles;
pub use tls::{TlsError, TlsFiles};

/// How often files are polled; a changed file is read once two polls in a row find it the same.
const LOOK: Duration = Duration::from_millis(250);
/// The maximum number of connections to the health listener, which anyone can reach.
const HEALTH_CONNECTIONS: usize = 256;
/// How long requests may take to complete after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Options of the server.
#[derive(Debug, Clone)]
pub struct Options {
    /// The source of documents.
    pub documents: Documents,
    /// The listen address; must be loopback if there are no tokens.
    pub listen: SocketAddr,
    /// An additional address that serves `/healthz` and `/readyz` without authentication.
    pub health_listen: Option<SocketAddr>,
    /// The files of tokens that authenticate callers.
    pub tokens: TokenFiles,
    /// The TLS files, if TLS is enabled.
    pub tls: Option<TlsFiles>,
    /// The destinations that webhooks may reach; if empty, the default of [`Egress`].
    pub webhooks_allowed: Vec<Allowed>,
}

impl Options {
    /// Whether proxies may authenticate with client certificates.
    fn has_client_ca(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some())
    }
}

/// The source of documents, and where state is stored.
#[derive(Debug, Clone)]
pub enum Documents {
    /// From files.
    Files {
        /// `-` is standard input, which is read once.
        files: Vec<PathBuf>,
        /// The state directory; `None`: beside the first document.
        state_dir: Option<PathBuf>,
        /// The directory of the secrets that documents refer to, as `NAME/KEY`.
        secrets_dir: Option<PathBuf>,
    },
    /// From a Kubernetes cluster, which also stores the state.
    Kubernetes(Cluster),
}

/// Options for a Kubernetes cluster.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The kubeconfig; `None`: inferred from the environment.
    pub kubeconfig: Option<PathBuf>,
    /// The namespaces whose TrafficShifts are reconciled; if empty, all.
    pub namespaces: BTreeSet<String>,
    /// The identity of this replica.
    pub identity: String,
    /// The namespace of the Lease, of the state and of the Secrets with credentials for other clusters; `None`: from
    /// the environment.
    pub namespace: Option<String>,
    /// The address at which other replicas reach this one; `None`: the listen address.
    pub advertise: Option<String>,
    /// The name of the Lease, and the name prefix of the Secrets that hold the state.
    pub lease: String,
    /// Proxies may authenticate with tokens that a TokenReview accepts for this audience.
    pub proxy_token_audience: Option<String>,
}

/// Why the controller cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The documents are invalid.
    #[error(transparent)]
    Documents(#[from] DocumentErrors),
    /// The state directory cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The state in Kubernetes cannot be used.
    #[error(transparent)]
    SecretStore(#[from] SecretStoreError),
    /// No cluster can be reached.
    #[error("--kubernetes: {0}")]
    NoCluster(String),
    /// Without tokens only loopback addresses are served.
    #[error(
        "--listen {0}: not a loopback address, such as 127.0.0.1:7460; without tokens only loopback is served (see \
         --read-token-file, --operate-token-file, --proxy-token-file)"
    )]
    NotLoopback(SocketAddr),
    /// A token file cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokenError),
    /// The certificate or its key cannot be used.
    #[error(transparent)]
    Certificate(#[from] TlsError),
    /// The listen address cannot be bound.
    #[error("{0} {1}: {2}")]
    Listen(&'static str, SocketAddr, io::Error),
    /// The TLS library for probes and webhooks cannot be set up.
    #[error("cannot set up TLS for probes and webhooks: {0}")]
    Tls(reqwest::Error),
    /// Any other I/O error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// If it cannot start: [`ServeError`].
pub async fn serve(options: Options) -> Result<(), ServeError> {
    match options.documents.clone() {
        Documents::Files { files, state_dir, secrets_dir } => {
            serve_files(options, files, state_dir, SecretFiles::new(secrets_dir)).await
        }
        Documents::Kubernetes(cluster) => replica::serve(options, cluster).await,
    }
}

async fn serve_files(
    options: Options,
    files: Vec<PathBuf>,
    state_dir: Option<PathBuf>,
    secret_files: SecretFiles,
) -> Result<(), ServeError> {
    let secrets = Secrets::load(&options)?;
    // Stat the files before reading them, so that a change in between is read again.
    let watched = Files::new(&files, Instant::now());
    let good = LastGood::open(&files)?;
    let documents = good.documents();
    let (store, kept, counted) = open_store(&files, state_dir.as_deref())?;
    clock::not_before(kept.time.max(counted.time));
    let is_known = |name: &String| documents.iter().any(|(shift, _)| shift.name == *name);
    for name in kept.rollouts.keys().filter(|name| !is_known(name) && !kept.applied.contains_key(*name)) {
        tracing::warn!(
            "the state is of a rollout {name}, which no document names any longer; what is known of it goes"
        );
    }
    let listeners = listen(&options).await?;
    let address = listeners.api.local_addr()?;

    let limits = Limits::of_machine();
    let prober = Prober::start_within(limits.clone(), kept.ready.clone()).map_err(ServeError::Tls)?;
    let mut reconciler = Reconciler::new(documents, kept, counted);
    good.origins().iter().for_each(|(name, file)| reconciler.edited_by(name, file));
    prober.set(reconciler.shifts());
    let role = watch::Sender::new(Role::Alone);
    let service = Service::start(
        &options,
        listeners,
        secrets,
        reconciler,
        role.subscribe(),
        (None, ControllerMetrics::default()),
    );
    tracing::info!(%address, tls = options.tls.is_some(), ?files, "serving");

    let writer = StateWriter::new(store.clone(), store, service.shared.done.clone());
    let hooks = Hooks::start(Egress::of_machine(options.webhooks_allowed.clone()), limits.webhooks);
    let (hooks, source) = (hooks.map_err(ServeError::Tls)?, Source::Files(watched, good, secret_files));
    let mut reconcile_loop =
        ReconcileLoop::new(service.shared.clone(), service.publish.clone(), writer, prober, source, hooks);
    reconcile_loop.run(signals()?).await;
    tracing::info!("ending");
    let _ = tokio::join!(service.end(), reconcile_loop.end());
    Ok(())
}

/// The listening sockets.
struct Listeners {
    api: TcpListener,
    health: Option<TcpListener>,
}

async fn listen(options: &Options) -> Result<Listeners, ServeError> {
    let bind = async |flag, address| {
        TcpListener::bind(address).await.map_err(|error| ServeError::Listen(flag, address, error))
    };
    let health = match options.health_listen {
        Some(address) => Some(bind("--health-listen", address).await?),
        None => None,
    };
    Ok(Listeners { api: bind("--listen", options.listen).await?, health })
}

/// Completes on SIGTERM or SIGINT.
fn signals() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // Without a handler SIGHUP would end the process; some users send it to reload files.
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!("SIGHUP: nothing to do, every file is read again as soon as it changes");
        }
    });
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// The HTTP server.
struct Service {
    shared: Arc<Shared>,
    publish: watch::Sender<Option<Published>>,
    end: watch::Sender<bool>,
    server: JoinHandle<()>,
}

impl Service {
    fn start(
        options: &Options,
        listeners: Listeners,
        secrets: Secrets,
        reconciler: Reconciler,
        role: watch::Receiver<Role>,
        (reviewer, done): (Option<Arc<crate::kubernetes::TokenReviewer>>, ControllerMetrics),
    ) -> Self {
        let (publish, published) = watch::channel(None);
        let (end, ending) = watch::channel(false);
        let reconciler = Mutex::new(reconciler);
        let (tokens, tls) = (secrets.tokens.subscribe(), secrets.tls.as_ref().map(watch::Sender::subscribe));
        let (counted, turns, events) = (Notify::new(), ReconcileBarrier::default(), Events::default());
        let twin = options.tls.as_ref().map(|tls| api::PinnedCertVerifier::new(tls.cert.clone(), tls.key.clone()));
        let (leader, certificates) = (api::Leader::new(role, twin), options.has_client_ca());
        let ending_too = ending.clone();
        let (filtered, complaints) = Default::default();
        let shared = Shared {
            reconciler,
            counted,
            turns,
            events,
            done,
            published,
            filtered,
            complaints,
            tokens,
            reviewer,
            certificates,
            leader,
            ending,
        };
        let shared = Arc::new(shared);
        let api = api::router(shared.clone());
        let admission = api::Admission::new(http::max_connections(), shared.done.evicted());
        let server = tokio::spawn(http::serve(listeners.api, admission, tls, api, ending_too));
        if let Some(listener) = listeners.health {
            let admission = api::Admission::new(HEALTH_CONNECTIONS, shared.done.evicted());
            let health = api::health_router(shared.clone());
            tokio::spawn(http::serve(listener, admission, None, health, shared.ending.clone()));
        }
        tokio::spawn(secrets.keep_fresh(options.clone(), shared.done.clone()));
        tokio::spawn(api::keep_telling(shared.clone()));
        Self { shared, publish, end, server }
    }

    async fn end(self) {
        let _ = self.end.send(true);
        let _ = tokio::time::timeout(GRACE, self.server).await;
    }
}

fn open_store(
    files: &[PathBuf],
    dir: Option<&Path>,
) -> Result<(Option<Store>, PersistedState, CountState), StoreError> {
    let beside = || {
        let first = files.iter().find(|file| file.as_os_str() != "-")?;
        // One for each first document, so that several controllers with documents in one folder do not share state.
        Some(first.parent()?.join(".tideshift").join(first.file_name()?))
    };
    let fresh = fresh().map_err(|error| StoreError::Io { path: "a random number".into(), error })?;
    let nowhere = |why: String, fresh: PersistedState| {
        tracing::warn!("state is not kept, a restart begins at the stable version: {why}");
        (None, fresh, CountState::beginning(now()))
    };
    let (dir, chosen) = match (dir, beside()) {
        (Some(dir), _) => (dir.to_owned(), true),
        (None, Some(dir)) => (dir, false),
        (None, None) => {
            return Ok(nowhere("the document came from standard input; give --state-dir".to_owned(), fresh));
        }
    };
    match Store::open(&dir) {
        Ok((store, kept, counted)) => {
            Ok((Some(store), kept.unwrap_or(fresh), counted.unwrap_or_else(|| CountState::beginning(now()))))
        }
        // The folder of the document may be read-only, such as a mounted ConfigMap.
        Err(StoreError::Io { error, .. }) if !chosen && !Store::is_in(&dir) => {
            Ok(nowhere(format!("{}: {error}; give --state-dir", dir.display()), fresh))
        }
        Err(StoreError::Io { path, error }) if chosen => {
            let is_file = dir.exists() && !dir.is_dir();
            let why = if is_file { "it is no folder".to_owned() } else { io_reason(&error) };
            Err(StoreError::NoFolder { path, why })
        }
        Err(error) => Err(error),
    }
}

/// A new, empty state.
fn fresh() -> io::Result<PersistedState> {
    PersistedState::fresh(format!("{:x}-{:x}", now(), std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_folder_for_the_state_is_refused_with_what_is_allowed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let beneath = file.path().join("state");
        for (path, why) in [(file.path(), "it is no folder"), (&beneath, "not a directory")] {
            let Err(error) = open_store(&[PathBuf::from("shift.yaml")], Some(path)) else {
                panic!("{}", path.display())
            };
            let (error, start) =
                (error.to_string(), format!("--state-dir {}: {why}; expected a folder", path.display()));
            assert!(error.starts_with(&start), "{error}");
        }
    }
}
