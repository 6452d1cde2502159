//! The table of all endpoints' readiness, and the tasks whose results it accepts.

use crate::readiness::probe::Subject;
use crate::readiness::{EndpointState, Readiness};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tideshift_core::shift::probe::Probe;
use tideshift_core::shift::{ShiftVersion, TrafficShift, WarmUpRequests};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// The conditions under which an endpoint is ready.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ReadinessSpec {
    /// `None`: the endpoint passes as soon as it is listed.
    pub(crate) probe: Option<Probe>,
    pub(crate) warm_up: Option<WarmUpRequests>,
    /// Whether it belongs to the stable version, so that its warm-up may be cut short.
    pub(crate) yields: bool,
}

impl ReadinessSpec {
    pub(crate) fn of(shift: &TrafficShift, version: &ShiftVersion) -> Self {
        let warm_up = shift.strategy.warm_up.requests.clone();
        Self {
            probe: version.readiness_probe.clone(),
            yields: warm_up.is_some() && version.name == shift.stable,
            warm_up,
        }
    }
}

/// A result of a task.
#[derive(Debug, Default)]
pub(crate) struct Finding {
    pub(crate) ready: bool,
    pub(crate) warming: bool,
    pub(crate) reason: Option<String>,
}

/// The readiness, and the tasks whose results it accepts.
#[derive(Debug)]
pub(crate) struct Table {
    pub(super) tasks: Mutex<Tasks>,
    pub(crate) readiness: watch::Sender<Arc<Readiness>>,
}

impl Table {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Tasks> {
        // No code that holds the lock panics halfway; if it did, the map would still be complete.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a result of the task `number`, unless the task has been replaced.
    pub(crate) fn take_in(&self, number: u64, subject: &Subject, finding: Finding) {
        let mut tasks = self.lock();
        let Some(Running { logged, .. }) = tasks.running.get_mut(subject).filter(|of| of.number == number) else {
            return;
        };
        self.readiness.send_if_modified(|readiness| {
            let Subject { service, version, endpoint } = subject;
            let Some(state) = readiness.find(service, version, endpoint) else { return false };
            let Finding { ready, warming, reason } = finding;
            let known = true;
            let found = EndpointState { endpoint: endpoint.clone(), ready, known, warming, reason };
            if *state == found {
                return false;
            }
            let first_failure = !ready && state.reason.is_none();
            if !state.known || state.ready != ready || first_failure {
                let reason = found.reason.as_deref();
                match logged.line(Instant::now()) {
                    Some(0) => tracing::info!(service, version, %endpoint, ready, reason, "readiness"),
                    Some(left_out) => tracing::info!(service, version, %endpoint, ready, reason, left_out, "readiness"),
                    None => {}
                }
            }
            if let Some(state) = Arc::make_mut(readiness).find_mut(service, version, endpoint) {
                *state = found;
            }
            true
        });
    }
}

#[derive(Debug, Default)]
pub(crate) struct Tasks {
    pub(super) running: BTreeMap<Subject, Running>,
    pub(super) started: u64,
}

/// The task of one endpoint.
#[derive(Debug)]
pub(crate) struct Running {
    /// A stopped task may still deliver a result; it is recognized by its number.
    pub(super) number: u64,
    pub(super) terms: ReadinessSpec,
    pub(super) stop: AbortHandle,
    pub(super) logged: Logged,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.abort();
    }
}

/// How many lines about one endpoint have been logged in the current time window, or left out.
#[derive(Debug)]
pub(crate) struct Logged {
    pub(super) since: Instant,
    pub(super) lines: u32,
}

impl Logged {
    /// Counts one more line. Returns how many were left out before it; `None` if it is left out as well.
    pub(crate) fn line(&mut self, now: Instant) -> Option<u32> {
        let (most, time) = MAX_LINES;
        let mut left_out = 0;
        if now.saturating_duration_since(self.since) >= time {
            left_out = self.lines.saturating_sub(most);
            *self = Self { since: now, lines: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        (self.lines <= most).then_some(left_out)
    }
}

/// The most lines that are logged for one endpoint in a time window, because an endpoint may come and go many times a
/// second.
pub(crate) const MAX_LINES: (u32, Duration) = (10, Duration::from_secs(10));
