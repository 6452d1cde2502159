//! `GET /v1/events`: the status whenever it changes, and every transition of a rollout, as server-sent events.
//!
//! The status is serialised once for all clients. Each client gets the newest status when the previous one has been
//! sent: a slow client misses statuses, but does not delay others and needs no buffer.

use super::{ApiError, Peer, Shared};
use crate::clock::now;
use crate::rollout::Transition;
use crate::status::{Status, TransitionStatus};
use axum::Extension;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderName, StatusCode};
use axum::response::IntoResponse;
use axum::response::sse::{Event, Sse};
use futures_util::stream::unfold;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// The minimum interval between statuses.
const AT_MOST: Duration = Duration::from_millis(250);
/// The maximum interval between statuses, so that clients can detect a dead connection.
const AT_LEAST: Duration = Duration::from_secs(1);
/// The maximum number of open streams.
const MAX_LISTENERS: usize = 100;
/// The maximum number of open streams per caller: a named credential, or else an address.
const MAX_PER_CALLER: usize = 25;
/// The number of buffered transitions; slower clients miss the oldest.
const MAX_BEHIND: usize = 256;

/// The broadcast channels of all listeners.
#[derive(Debug)]
pub struct Events {
    transitions: broadcast::Sender<Arc<str>>,
    statuses: watch::Sender<Arc<str>>,
    places: Arc<Semaphore>,
    by_caller: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A transition and whose it is.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct TransitionEvent<'a> {
    /// The rollout's name.
    name: &'a str,
    #[serde(flatten)]
    transition: TransitionStatus,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            transitions: broadcast::Sender::new(MAX_BEHIND),
            statuses: watch::Sender::new("".into()),
            places: Arc::new(Semaphore::new(MAX_LISTENERS)),
            by_caller: Arc::default(),
        }
    }
}

impl Events {
    /// Broadcasts transitions: the name of the rollout and its new state.
    pub fn tell(&self, transitions: &[(String, Transition)]) {
        for (name, transition) in transitions {
            // There are no clients.
            let _ = self.transitions.send(json(&TransitionEvent { name, transition: transition.into() }));
        }
    }
}

fn json(value: &impl Serialize) -> Arc<str> {
    serde_json::to_string(value).unwrap_or_default().into()
}

/// Sends the status to all clients in an endless loop.
pub async fn keep_telling(shared: Arc<Shared>) {
    let statuses = &shared.events.statuses;
    let mut ticks = interval(AT_MOST);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = Instant::now();
    loop {
        ticks.tick().await;
        if statuses.receiver_count() == 0 {
            continue;
        }
        let status = json(&shared.reconciler().status(now()));
        statuses.send_if_modified(|newest| {
            // Slightly early rather than one tick late.
            let is_due = told.elapsed() + AT_MOST / 2 >= AT_LEAST || *newest != status;
            if is_due {
                (told, *newest) = (Instant::now(), status);
            }
            is_due
        });
    }
}

/// One listener.
struct Listener {
    /// The initial status.
    first: Option<Arc<str>>,
    transitions: broadcast::Receiver<Arc<str>>,
    statuses: watch::Receiver<Arc<str>>,
    ending: watch::Receiver<bool>,
    _place: (OwnedSemaphorePermit, CallersPlace),
}

/// One stream slot of a caller, until it is dropped.
struct CallersPlace {
    caller: String,
    of: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl CallersPlace {
    fn take(caller: String, of: &Arc<Mutex<BTreeMap<String, usize>>>) -> Option<Self> {
        let mut places = of.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = places.entry(caller.clone()).or_default();
        if *taken >= MAX_PER_CALLER {
            return None;
        }
        *taken += 1;
        Some(Self { caller, of: of.clone() })
    }
}

impl Drop for CallersPlace {
    fn drop(&mut self) {
        let mut places = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = places.get_mut(&self.caller) {
            *taken -= 1;
            if *taken == 0 {
                places.remove(&self.caller);
            }
        }
    }
}

pub(super) async fn events(State(shared): State<Arc<Shared>>, peer: Peer) -> Result<impl IntoResponse, ApiError> {
    let caller = peer.map_or_else(String::new, |Extension(ConnectInfo(peer))| peer.ip().to_canonical().to_string());
    let own = CallersPlace::take(caller, &shared.events.by_caller).ok_or_else(|| {
        let why = format!("you listen {MAX_PER_CALLER} times already, the most for one caller; close one of them");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, why)
    })?;
    let place = shared.events.places.clone().try_acquire_owned();
    let place = place.map_err(|_| {
        let why = format!("{MAX_LISTENERS} listen already, the most there may be; ask for /v1/status instead");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why)
    })?;
    // Subscribe before building the first status, so that no transition in between is lost.
    let (transitions, statuses) = (shared.events.transitions.subscribe(), shared.events.statuses.subscribe());
    let status: Status = shared.reconciler().status(now());
    let first = Some(json(&status));
    let listener = Listener { first, transitions, statuses, ending: shared.ending.clone(), _place: (place, own) };
    let stream = unfold(listener, async |mut listener| {
        let event = listener.next().await?;
        Some((Ok::<_, Infallible>(event), listener))
    });
    // For proxies that would otherwise buffer the stream.
    Ok(([(HeaderName::from_static("x-accel-buffering"), "no")], Sse::new(stream)))
}

impl Listener {
    /// The next event; `None`: the controller shuts down.
    async fn next(&mut self) -> Option<Event> {
        let status = |status: &str| Event::default().event("status").data(status);
        if let Some(first) = self.first.take() {
            return Some(status(&first));
        }
        tokio::select! {
            biased;
            _ = self.ending.wait_for(|ending| *ending) => None,
            transition = self.transitions.recv() => match transition {
                Ok(transition) => Some(Event::default().event("transition").data(transition)),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    Some(Event::default().comment(format!("too slow: {missed} transitions missed, see the history")))
                }
                Err(broadcast::error::RecvError::Closed) => None,
            },
            changed = self.statuses.changed() => {
                changed.ok()?;
                let newest = self.statuses.borrow_and_update().clone();
                Some(status(&newest))
            }
        }
    }
}
