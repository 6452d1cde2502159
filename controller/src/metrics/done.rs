//! What the controller has done since it started, counted as it does it.

use crate::rollout::{Millis, Transition};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;

/// Counters that all parts of the controller share.
#[derive(Debug, Clone, Default)]
pub struct Done {
    answers: Family<Labels, Counter>,
    last_report: Gauge<f64, AtomicU64>,
    transitions: Family<Labels, Counter>,
    changes: Family<Labels, Counter>,
    policies: Counter,
    leads: Gauge<i64>,
    writes: Counter,
    write_errors: Counter,
}

type Labels = Vec<(&'static str, String)>;

impl Done {
    /// A request was answered. `path` is the route's, not the client's, who may make up any number of them.
    pub fn answered(&self, path: &str, status: u16) {
        self.answers.get_or_create(&vec![("path", path.to_owned()), ("code", status.to_string())]).inc();
    }

    /// Whether this replica decides.
    pub fn leads(&self, leads: bool) {
        self.leads.set(leads.into());
    }

    /// A proxy's report was taken.
    pub fn took_report(&self, now: Millis) {
        self.last_report.set(now as f64 / 1e3);
    }

    /// A rollout has changed its state.
    pub fn changed(&self, rollout: &str, transition: &Transition) {
        let (phase, reason) = (transition.phase.name().to_owned(), format!("{:?}", transition.reason));
        self.transitions
            .get_or_create(&vec![("rollout", rollout.to_owned()), ("phase", phase), ("reason", reason)])
            .inc();
        self.knows(rollout).inc();
    }

    /// There is such a rollout. It is counted from 0, since what appears at 1 has not increased for Prometheus.
    pub(super) fn knows(&self, rollout: &str) -> Counter {
        self.changes.get_or_create_owned(&vec![("rollout", rollout.to_owned())])
    }

    /// A policy was published.
    pub fn published(&self) {
        self.policies.inc();
    }

    /// State was written, or was not.
    pub fn wrote(&self, is_safe: bool) {
        self.writes.inc();
        self.write_errors.inc_by(u64::from(!is_safe));
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("http_requests", "Requests answered, by route and status", self.answers.clone());
        let help = "When a report was last taken; 0: not since the start";
        registry.register("last_report_timestamp_seconds", help, self.last_report.clone());
        let help = "Whether this replica decides; always 1 where there is only one";
        registry.register("leader", help, self.leads.clone());
        let help = "Changes of a rollout's phase or reason, by what it changed to; left out before the first";
        registry.register("rollout_transitions", help, self.transitions.clone());
        registry.register("rollout_changes", "Changes of a rollout's phase or reason", self.changes.clone());
        registry.register("policies_published", "Policies given to proxies", self.policies.clone());
        registry.register("state_writes", "Times that state was to be made safe", self.writes.clone());
        let help = "Times that it could not be: a restart would go on from what was kept before";
        registry.register("state_write_errors", help, self.write_errors.clone());
    }
}
