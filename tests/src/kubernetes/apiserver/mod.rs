//! A Kubernetes API server for tests: the part of a real one that controllers and kubectl rely on, in this process,
//! over plain HTTP on loopback, with faults that tests can inject.
//!
//! It supports: one resourceVersion for all objects, conflicts, generations, finalizers, preconditions; JSON merge,
//! JSON and strategic merge patches and server-side apply with field owners; the subresources `status`, `scale` and
//! pods' `binding`; paginated lists, watches with bookmarks, initial events and 410 Gone; selectors; metadata-only
//! requests; CRDs with their defaults and plain rules; tokens and 403; port-forwards. It does not support: CEL rules,
//! quotas, garbage collection, webhooks, tables, more than one version of a kind. What real servers leave to other
//! programs is in [`controllers`](super::controllers) and [`kubelet`](super::kubelet).

mod access;
mod admit;
mod apply;
mod discovery;
mod faults;
mod fields;
mod forward;
mod http;
mod kinds;
mod list;
mod objects;
mod patch;
mod refusal;
mod request;
mod scale;
mod schema;
pub(super) mod selector;
mod shape;
mod store;
mod view;
mod watch;
mod write;

use std::fs;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::sync::watch::Sender;
use tokio::task::JoinHandle;

use crate::ports::Port;

use self::access::Access;
pub use self::access::{Attempt, Identity};
use self::faults::Faults;
pub use self::faults::Whom;
pub use self::kinds::rollouts_crd;
pub use self::objects::Objects;
pub use self::refusal::Refusal;
use self::store::Store;

/// A request that the server received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The requested action.
    pub attempt: Attempt,
    /// The time of arrival.
    pub at: std::time::Instant,
}

/// A running (or stopped) server; dropping it stops it. The methods of [`Objects`] access its content.
#[derive(Debug)]
pub struct ApiServer {
    port: Port,
    objects: Objects,
    server: Mutex<Option<Running>>,
    directory: TempDir,
}

/// The listener, until the sender is dropped.
#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
pub(super) struct Shared {
    store: Mutex<Store>,
    /// The newest revision.
    head: Sender<u64>,
    /// Whether it listens.
    up: Sender<bool>,
    faults: Sender<Faults>,
    access: Mutex<Access>,
    seen: Mutex<Vec<Seen>>,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    /// Applies a change and wakes the watches.
    fn write<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store();
        let outcome = change(&mut store);
        let revision = store.revision();
        self.head.send_if_modified(|head| std::mem::replace(head, revision) != revision);
        outcome
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ApiServer {
    /// Starts an empty server.
    pub async fn start() -> anyhow::Result<Self> {
        let store = Store::new();
        let shared = Arc::new(Shared {
            head: Sender::new(store.revision()),
            store: Mutex::new(store),
            up: Sender::new(false),
            faults: Sender::new(Faults::default()),
            access: Mutex::default(),
            seen: Mutex::default(),
        });
        let server = Self {
            port: Port::reserve()?,
            objects: Objects::of(shared),
            server: Mutex::new(None),
            directory: tempfile::tempdir()?,
        };
        server.come_back().await?;
        Ok(server)
    }

    /// The listen address.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// The kubeconfig file of the user `admin`.
    pub fn kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.kubeconfig_of("admin")
    }

    /// The kubeconfig of a user with this name, whose token is the name.
    pub fn kubeconfig_of(&self, user: &str) -> anyhow::Result<PathBuf> {
        let path = self.directory.path().join(format!("{user}.kubeconfig"));
        fs::write(&path, self.kubeconfig_text(user)).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The content of that file.
    pub fn kubeconfig_text(&self, user: &str) -> String {
        self.token(user, user, &[]);
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "tests", "cluster": { "server": format!("http://{}", self.address()) } }],
            "users": [{ "name": user, "user": { "token": user } }],
            "contexts": [{ "name": "tests", "context": { "cluster": "tests", "user": user } }],
            "current-context": "tests",
        })
        .to_string()
    }

    /// Adds a token: for its requests, and for TokenReviews with one of these audiences.
    pub fn token(&self, token: &str, username: &str, audiences: &[&str]) {
        let audiences = audiences.iter().map(|&audience| audience.to_owned()).collect();
        lock(&self.objects.shared.access).add_token(token, Identity { username: username.to_owned(), audiences });
    }

    /// Removes a token.
    pub fn forget_token(&self, token: &str) {
        lock(&self.objects.shared.access).remove_token(token);
    }

    /// Answers 403 to every request that the rule matches.
    pub fn forbid(&self, rule: impl Fn(&Attempt) -> bool + Send + Sync + 'static) {
        lock(&self.objects.shared.access).forbid(Arc::new(rule));
    }

    /// Removes all such rules.
    pub fn allow_all(&self) {
        lock(&self.objects.shared.access).allow_all();
    }

    /// Accepts objects only in namespaces that exist.
    pub fn want_namespaces(&self) {
        self.objects.shared.store().strict_namespaces = true;
    }
}

/// Faults.
impl ApiServer {
    /// Closes the listener and every connection; the objects stay.
    pub async fn go_away(&self) {
        self.objects.shared.up.send_replace(false);
        let running = lock(&self.server).take();
        if let Some(Running { stop, task }) = running {
            drop(stop);
            // Its result is irrelevant.
            let _ = task.await;
        }
    }

    /// Listens again, on the same port.
    pub async fn come_back(&self) -> anyhow::Result<()> {
        self.go_away().await;
        let listener = TcpListener::bind(self.address()).await.context("cannot listen")?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(http::serve(listener, Arc::clone(&self.objects.shared), stopped));
        *lock(&self.server) = Some(Running { stop, task });
        self.objects.shared.up.send_replace(true);
        Ok(())
    }

    /// Breaks off every watch.
    pub fn cut_watches(&self) {
        self.objects.shared.faults.send_modify(|faults| faults.cuts += 1);
    }

    /// Sends a bookmark to every watch that allows it.
    pub fn send_bookmarks(&self) {
        self.objects.shared.faults.send_modify(|faults| faults.bookmarks += 1);
    }

    /// Drops the history: a client that resumes a watch from an earlier revision gets 410 Gone. Open watches continue.
    pub fn compact(&self) {
        self.objects.shared.write(Store::compact);
    }

    /// Answers the next `writes` writes to a kind (`PLURAL.GROUP`) with 409 Conflict.
    pub fn refuse_writes(&self, resource: &str, writes: usize) {
        self.objects.shared.faults.send_modify(|faults| faults.conflict(resource.to_owned(), writes));
    }

    /// Delays watch events.
    pub fn delay_watches(&self, whom: Whom, delay: Duration) {
        self.objects.shared.faults.send_modify(|faults| faults.delay(whom, delay));
    }

    /// Answers no request and sends no event until [`release`](Self::release): a partition. Requests that are still
    /// waiting then are executed late.
    pub fn hold(&self, whom: Whom) {
        self.objects.shared.faults.send_modify(|faults| faults.hold(whom));
    }

    /// Ends a [`hold`](Self::hold).
    pub fn release(&self, whom: &Whom) {
        self.objects.shared.faults.send_modify(|faults| faults.release(whom));
    }

    /// Every request so far, without those of this value's own methods.
    pub fn requests(&self) -> Vec<Seen> {
        lock(&self.objects.shared.seen).clone()
    }

    /// The number of requests with a verb for a resource (`pods`, `deployments/scale`) of any group.
    pub fn count(&self, verb: &str, resource: &str) -> usize {
        let seen = lock(&self.objects.shared.seen);
        seen.iter().filter(|seen| seen.attempt.verb == verb && seen.attempt.resource == resource).count()
    }

    /// Clears the recorded requests.
    pub fn forget_requests(&self) {
        lock(&self.objects.shared.seen).clear();
    }
}

impl Deref for ApiServer {
    type Target = Objects;

    fn deref(&self) -> &Objects {
        &self.objects
    }
}
