//! Watches: the changes since a resourceVersion, and then new changes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use futures_util::{Stream, stream};
use serde_json::{Value, json};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::faults::Faults;
use super::kinds::Kind;
use super::refusal::Refusal;
use super::request::Query;
use super::store::{Change, Store};
use super::view::{Selection, View};

/// The default duration of a watch.
const LONG: Duration = Duration::from_secs(1800);

/// The interval of bookmarks.
const BOOKMARKS: Duration = Duration::from_secs(60);

/// The watch of a client.
pub(super) struct Watch {
    shared: Arc<Shared>,
    kind: Arc<Kind>,
    selection: Selection,
    view: View,
    user: String,
    faults: Receiver<Faults>,
    head: Receiver<u64>,
    /// The count of cuts when the watch started, and of bookmarks sent to all.
    cuts: u64,
    bookmarks: u64,
    /// The revision up to which changes have been processed.
    cursor: u64,
    /// The pending events, and when each happened.
    queue: VecDeque<(Instant, Value)>,
    bookmark_at: Option<Instant>,
    end: Instant,
}

impl Watch {
    pub(super) fn start(
        shared: &Arc<Shared>,
        kind: &Arc<Kind>,
        selection: Selection,
        view: View,
        user: &str,
        query: &Query,
    ) -> Result<Self, Refusal> {
        let now = Instant::now();
        let (faults, head) = (shared.faults.subscribe(), shared.head.subscribe());
        let (cuts, bookmarks) = (faults.borrow().cuts, faults.borrow().bookmarks);
        let wants_bookmarks = query.is("allowWatchBookmarks");
        let mut watch = Self {
            shared: Arc::clone(shared),
            kind: Arc::clone(kind),
            selection,
            view,
            user: user.to_owned(),
            faults,
            head,
            cuts,
            bookmarks,
            cursor: 0,
            queue: VecDeque::new(),
            bookmark_at: wants_bookmarks.then(|| now + BOOKMARKS),
            end: now + query.number("timeoutSeconds")?.filter(|seconds| *seconds > 0).map_or(LONG, Duration::from_secs),
        };
        let since = query.number("resourceVersion")?.unwrap_or_default();
        let initial = query.is("sendInitialEvents");
        if initial && query.get("resourceVersionMatch") != "NotOlderThan" {
            return Err(Refusal::bad_request(
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        let store = shared.store();
        if since == 0 || initial {
            watch.send_all(&store, initial && wants_bookmarks);
            return Ok(watch);
        }
        watch.cursor = since;
        // As in real servers, the first event of the watch reports this, not the status of the response; and a revision
        // in the future is reported only once it is reached.
        if let Err(refusal) = store.check_kept(since) {
            watch.cursor = store.revision();
            watch.end = now;
            watch.queue.push_back((now, json!({ "type": "ERROR", "object": refusal.to_status() })));
            watch.bookmark_at = None;
        }
        Ok(watch)
    }

    /// Starts with the existing objects.
    fn send_all(&mut self, store: &Store, say_end: bool) {
        let now = Instant::now();
        self.cursor = store.revision();
        for (_, object) in store.each(&self.kind).filter(|(_, object)| self.selection.selects(object)) {
            self.queue.push_back((now, self.event("ADDED", object)));
        }
        if say_end {
            let mut bookmark = self.bookmark();
            bookmark["object"]["metadata"]["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
            self.queue.push_back((now, bookmark));
        }
    }

    fn event(&self, r#type: &str, object: &Value) -> Value {
        json!({ "type": r#type, "object": self.view.object(object) })
    }

    fn bookmark(&self) -> Value {
        let version = self.cursor.to_string();
        let (kind, api_version) = (&self.kind.kind, self.kind.api_version());
        let object = json!({ "kind": kind, "apiVersion": api_version, "metadata": { "resourceVersion": version } });
        self.event("BOOKMARK", &object)
    }

    /// The change as this watch sees it: an object that enters the selection is added, one that leaves it is deleted.
    fn seen(&self, change: &Change) -> Option<Value> {
        let selects = |object: &Arc<Value>| self.selection.selects(object);
        let before = change.before.as_ref().is_some_and(selects);
        let after = !change.deleted && selects(&change.after);
        match (before, after) {
            (false, false) => None,
            (false, true) => Some(self.event("ADDED", &change.after)),
            (true, true) => Some(self.event("MODIFIED", &change.after)),
            (true, false) => Some(self.event("DELETED", &change.after)),
        }
    }

    /// Queues the changes since the last call.
    fn look(&mut self) {
        let shared = Arc::clone(&self.shared);
        let store = shared.store();
        let now = Instant::now();
        if store.kind(&self.kind.resource()).is_none() {
            self.end = now;
        }
        let changes = store.changes_after(&self.kind, self.cursor);
        let seen: Vec<_> = changes.filter_map(|change| Some((change.at, self.seen(change)?))).collect();
        self.queue.extend(seen);
        self.cursor = store.revision();
    }

    /// The next line for the client; `None` at the end of the watch, an error if it is cut.
    async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            {
                let faults = self.faults.borrow_and_update();
                if faults.cuts != self.cuts {
                    bail!("cut by the test");
                }
                if faults.bookmarks != self.bookmarks && self.bookmark_at.is_some() {
                    self.bookmarks = faults.bookmarks;
                    self.bookmark_at = Some(Instant::now());
                }
            }
            if *self.head.borrow_and_update() > self.cursor {
                self.look();
            }
            let (held, delay) = {
                let faults = self.faults.borrow();
                (faults.holds(&self.user), faults.delay_of(&self.user))
            };
            let now = Instant::now();
            // While a user is held, only the next change of the faults matters.
            let due = self.queue.front().map(|(at, _)| *at + delay);
            if !held {
                if due.is_some_and(|due| due <= now) {
                    return Ok(self.queue.pop_front().map(|(_, event)| event));
                }
                let ends = self.end <= now;
                if self.queue.is_empty() && self.bookmark_at.is_some_and(|at| at <= now || ends) {
                    self.bookmark_at = (!ends).then(|| now + BOOKMARKS);
                    return Ok(Some(self.bookmark()));
                }
                if ends {
                    return Ok(None);
                }
            }
            let wake =
                [due, self.bookmark_at.filter(|_| self.queue.is_empty()), Some(self.end)].into_iter().flatten().min();
            tokio::select! {
                changed = self.faults.changed() => changed?,
                changed = self.head.changed() => changed?,
                () = sleep_until(wake.unwrap_or(self.end)), if !held => {}
            }
        }
    }

    /// The body of the response, one line per event.
    pub(super) fn lines(self) -> impl Stream<Item = anyhow::Result<Bytes>> {
        stream::try_unfold(self, async |mut watch| {
            let Some(event) = watch.next().await? else { return Ok(None) };
            let mut line = event.to_string();
            line.push('\n');
            Ok(Some((line.into(), watch)))
        })
    }
}
