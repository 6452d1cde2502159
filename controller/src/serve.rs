//! `tideshift serve`: probes, documents, proxies and the clock feed the controller's mind; what it decides is first
//! made safe, then published.

use crate::api::{self, Events, Published, Shared, TokenError, TokenFiles, Turns, now};
use crate::control::{Control, Counted};
use crate::documents::{self, DocumentErrors};
use crate::hooks::{Answer, Hooks};
use crate::metrics::Done;
use crate::readiness::Prober;
use crate::rollout::Transition;
use crate::store::{Kept, Store, StoreError};
use bytes::Bytes;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

mod files;
mod http;
mod keeper;
mod secrets;
mod tls;

use files::Files;
use keeper::Keeper;
use secrets::Secrets;
pub use tls::{TlsError, TlsFiles};

/// How often the mind looks at the clock; everything else reaches it at once.
const TICK: Duration = Duration::from_millis(100);
/// From one look at what proxies report to the next at least.
const BREATH: Duration = Duration::from_millis(20);
/// How often the documents are looked at; one that changes is read once it has been the same twice.
const LOOK: Duration = Duration::from_millis(250);
/// How often counts are made safe; what is lost of them, proxies say again.
const KEEP_COUNTS: Duration = Duration::from_secs(2);
/// How long requests may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// What to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// The documents; `-` is standard input, which is read once.
    pub files: Vec<PathBuf>,
    /// Where to listen; must be a loopback address where there are no tokens.
    pub listen: SocketAddr,
    /// Who may ask.
    pub tokens: TokenFiles,
    /// How to speak TLS, if at all.
    pub tls: Option<TlsFiles>,
    /// Where state is kept; `None`: beside the first document.
    pub state_dir: Option<PathBuf>,
}

/// Why the controller cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The documents are wrong.
    #[error(transparent)]
    Documents(#[from] DocumentErrors),
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Only loopback is served as long as there are no tokens.
    #[error(
        "--listen {0}: not a loopback address, such as 127.0.0.1:7460; without tokens only loopback is served (see \
         --read-token-file, --operate-token-file, --proxy-token-file)"
    )]
    NotLoopback(SocketAddr),
    /// A file of tokens cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokenError),
    /// The certificate or its key cannot be used.
    #[error(transparent)]
    Certificate(#[from] TlsError),
    /// The address cannot be listened on.
    #[error("--listen {0}: {1}")]
    Listen(SocketAddr, io::Error),
    /// The TLS library for probes and webhooks cannot be set up.
    #[error("cannot set up TLS for probes and webhooks: {0}")]
    Tls(reqwest::Error),
    /// Anything that the system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// If it cannot start: [`ServeError`].
pub async fn serve(options: Options) -> Result<(), ServeError> {
    let secrets = Secrets::load(&options)?;
    // Looked at before they are read: what changes in between is read again.
    let files = Files::new(&options.files);
    let documents = documents::load_as_written(&options.files)?;
    let (store, kept, counted) = open_store(&options)?;
    let listener = TcpListener::bind(options.listen).await;
    let listener = listener.map_err(|error| ServeError::Listen(options.listen, error))?;
    let address = listener.local_addr()?;

    let prober = Prober::start(kept.ready.clone()).map_err(ServeError::Tls)?;
    let control = Control::new(documents, kept, counted);
    prober.set(control.shifts());
    let (publish, published) = watch::channel(None);
    let (end, ending) = watch::channel(false);
    let (control, done) = (Mutex::new(control), Done::default());
    let (tokens, tls) = (secrets.tokens.subscribe(), secrets.tls.as_ref().map(watch::Sender::subscribe));
    let (counted, turns, events) = (Notify::new(), Turns::default(), Events::default());
    let shared = Shared { control, counted, turns, events, done, published, tokens, ending: ending.clone() };
    let shared = Arc::new(shared);
    let server = tokio::spawn(http::serve(listener, http::max_connections(), tls, api::router(shared.clone()), ending));
    tracing::info!(%address, tls = options.tls.is_some(), files = ?options.files, "serving");
    tokio::spawn(secrets.keep_fresh(options));
    tokio::spawn(api::keep_telling(shared.clone()));

    let keeper = Keeper::new(store, shared.done.clone());
    let (hooks, answers) = Hooks::start().map_err(ServeError::Tls)?;
    let mut mind = Mind { shared, keeper, publish, prober, files, hooks, answers };
    mind.run().await?;
    tracing::info!("ending");
    let _ = end.send(true);
    let _ = tokio::join!(tokio::time::timeout(GRACE, server), tokio::time::timeout(GRACE, mind.hooks.end()));
    Ok(())
}

fn open_store(options: &Options) -> Result<(Option<Store>, Kept, Counted), StoreError> {
    let beside = || {
        let first = options.files.iter().find(|file| file.as_os_str() != "-")?;
        // One for each first document, so that controllers of other documents in the same folder have their own.
        Some(first.parent()?.join(".tideshift").join(first.file_name()?))
    };
    let fresh = Kept::fresh(format!("{:x}-{:x}", now(), std::process::id()))
        .map_err(|error| StoreError::Io { path: "a random number".into(), error })?;
    let nowhere = |why: String, fresh: Kept| {
        tracing::warn!("state is not kept, a restart begins at the stable version: {why}");
        (None, fresh, Counted::default())
    };
    let (dir, chosen) = match (&options.state_dir, beside()) {
        (Some(dir), _) => (dir.clone(), true),
        (None, Some(dir)) => (dir, false),
        (None, None) => {
            return Ok(nowhere("the document came from standard input; give --state-dir".to_owned(), fresh));
        }
    };
    match Store::open(&dir) {
        Ok((store, kept, counted)) => Ok((Some(store), kept.unwrap_or(fresh), counted.unwrap_or_default())),
        // Beside the document may be a place that cannot be written to, such as a mounted ConfigMap.
        Err(StoreError::Io { error, .. }) if !chosen && !Store::is_in(&dir) => {
            Ok(nowhere(format!("{}: {error}; give --state-dir", dir.display()), fresh))
        }
        Err(error) => Err(error),
    }
}

/// Feeds the mind and carries out what it decides.
struct Mind {
    shared: Arc<Shared>,
    keeper: Keeper<Store>,
    publish: watch::Sender<Option<Published>>,
    prober: Prober,
    files: Files,
    hooks: Hooks,
    /// What gates say.
    answers: mpsc::Receiver<Answer>,
}

impl Mind {
    async fn run(&mut self) -> io::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        let (mut tick, mut look, mut keep_counts) = (every(TICK), every(LOOK), every(KEEP_COUNTS));
        let mut readiness = self.prober.subscribe();
        readiness.mark_changed();
        let mut looked = Instant::now();
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                // Reports of thousands of proxies are looked at together.
                _ = self.shared.counted.notified() => sleep_until(looked + BREATH).await,
                Ok(()) = readiness.changed() => {
                    let now_ready = readiness.borrow_and_update().clone();
                    self.shared.control().set_readiness(now_ready);
                }
                Some(answer) = self.answers.recv() => {
                    self.shared.control().gate_answered(&answer.question, answer.allowed, &answer.words);
                }
                _ = look.tick() => self.look_at_documents(),
                _ = keep_counts.tick() => self.keep_counts(),
                _ = tick.tick() => {}
            }
            self.evaluate();
            looked = Instant::now();
        }
        // What somebody has just asked for is safe before he is told so.
        self.evaluate();
        self.keep_counts();
        Ok(())
    }

    fn evaluate(&mut self) {
        let (turn, outcome) = {
            let mut control = self.shared.control();
            if let Some(shifts) = control.changed_shifts() {
                self.prober.set(shifts);
                self.hooks.set(shifts);
                // With the readiness of the endpoints that they have now, not of those that they had.
                let readiness = self.prober.subscribe().borrow().clone();
                control.set_readiness(readiness);
            }
            let outcome = control.evaluate(now());
            self.keeper.take(&mut control, &outcome);
            (self.shared.turns.begin(), outcome)
        };
        for (rollout, message) in &outcome.messages {
            tracing::debug!(rollout, "{message}");
        }
        for (rollout, transition) in &outcome.transitions {
            let Transition { phase, reason, message, .. } = transition;
            tracing::info!(rollout, ?phase, ?reason, "{message}");
            self.shared.done.changed(rollout, transition);
        }
        // First safe, then published: a revision that proxies have seen is never given to another policy. Where nothing
        // can be kept (a full disk), traffic goes on being moved all the same.
        if outcome.keep {
            self.keeper.write();
        }
        if let Some(policy) = outcome.policy {
            let epoch = self.shared.control().kept().epoch.clone();
            let json = Bytes::from(serde_json::to_vec(&policy).unwrap_or_default());
            tracing::info!(revision = policy.revision, "policy published");
            self.shared.done.published();
            self.publish.send_replace(Some(Published { epoch, revision: policy.revision, json }));
        }
        let control = self.shared.control();
        let status = |rollout: &str| control.rollout_status(rollout, now());
        self.hooks.ask(control.questions(), status);
        self.hooks.tell(&outcome.transitions, status);
        drop(control);
        self.shared.events.tell(&outcome.transitions);
        self.shared.turns.end(turn);
    }

    fn look_at_documents(&mut self) {
        if !self.files.have_changed() {
            return;
        }
        match documents::load_as_written(self.files.paths()) {
            Ok(documents) => {
                tracing::info!("documents have changed");
                self.shared.control().set_documents(documents);
            }
            Err(errors) => {
                let errors: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
                for error in &errors {
                    tracing::error!("{error}; what it said before stays in force");
                }
                self.shared.control().set_document_errors(errors);
            }
        }
    }

    fn keep_counts(&mut self) {
        self.keeper.take_counts(&mut self.shared.control());
        self.keeper.write();
    }
}
