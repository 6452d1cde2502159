//! What the controller has done since it started, counted as it does it.

use crate::clock::Millis;
use crate::rollout::Transition;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;

/// Counters that all parts of the controller share.
#[derive(Debug, Clone, Default)]
pub struct ControllerMetrics {
    answers: Family<Labels, Counter>,
    last_report: Gauge<f64, AtomicU64>,
    transitions: Family<Labels, Counter>,
    changes: Family<Labels, Counter>,
    policies: Counter,
    leads: Gauge<i64>,
    state_bytes: Family<Labels, Gauge>,
    state_limits: Family<Labels, Gauge>,
    writes: Counter,
    write_errors: Counter,
    evicted: Counter,
    documents_left: Counter,
    documents_returned: Counter,
    documents_kept: Gauge<i64>,
    claims: Family<Labels, Counter>,
    reviews: Family<Labels, Counter>,
    certificate: Gauge<f64, AtomicU64>,
}

/// What a report claims that its sender cannot know, or may not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// To be another proxy than its credential's.
    Proxy,
    /// To have sent more reports than there was time for.
    Sequence,
    /// To run a policy that was not published.
    Revision,
    /// A veto that the guard cannot have issued.
    Veto,
    /// Counts of a service that its credential may not see.
    Service,
}

impl Claim {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Proxy, Self::Sequence, Self::Revision, Self::Veto, Self::Service];

    fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Sequence => "sequence",
            Self::Revision => "revision",
            Self::Veto => "veto",
            Self::Service => "service",
        }
    }
}

type Labels = Vec<(&'static str, String)>;

impl ControllerMetrics {
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

    /// A part of the state takes so many bytes where it is kept.
    pub fn state_bytes(&self, part: &str, bytes: usize) {
        self.state_bytes.get_or_create(&vec![("part", part.to_owned())]).set(bytes.try_into().unwrap_or(i64::MAX));
    }

    /// It may take so many at most.
    pub fn state_limit(&self, part: &str, bytes: usize) {
        self.state_limits.get_or_create(&vec![("part", part.to_owned())]).set(bytes.try_into().unwrap_or(i64::MAX));
    }

    /// State was written, or was not.
    pub fn wrote(&self, is_safe: bool) {
        self.writes.inc();
        self.write_errors.inc_by(u64::from(!is_safe));
    }

    /// Counts connections that were closed, or refused, to have room for others.
    pub fn evicted(&self) -> Counter {
        self.evicted.clone()
    }

    /// So many documents are gone, and so many of those that were have come back in time; of so many that are gone the
    /// weights are in force.
    pub fn documents_left(&self, (left, returned): (u64, u64), kept: usize) {
        self.documents_left.inc_by(left);
        self.documents_returned.inc_by(returned);
        self.documents_kept.set(kept.try_into().unwrap_or(i64::MAX));
    }

    /// A report claimed what cannot be, or is not its sender's to say; that part of it was ignored.
    pub fn ignored_claim(&self, claim: Claim) {
        self.claims.get_or_create(&vec![("claim", claim.name().to_owned())]).inc();
    }

    /// A token was to be reviewed.
    pub fn reviewed(&self, answer: &str) {
        self.reviews.get_or_create(&vec![("answer", answer.to_owned())]).inc();
    }

    /// Until when the certificate is valid, in seconds since 1970.
    pub fn certificate_expires(&self, at: f64) {
        self.certificate.set(at);
    }

    /// What it says of the state, whose names do not start as the others do.
    pub(super) fn register_state(&self, registry: &mut Registry) {
        registry.register("state_bytes", "What a part of the state takes where it is kept", self.state_bytes.clone());
        let help = "What it may take at most; left out where no limit is known";
        registry.register("state_limit_bytes", help, self.state_limits.clone());
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
        let help = "Connections without a good token that were closed or refused, to have room for others";
        registry.register("connections_evicted", help, self.evicted.clone());
        let help = "Documents that were seen to be gone";
        registry.register("documents_left", help, self.documents_left.clone());
        let help = "Documents that were gone, came back within ten minutes and went on where they were";
        registry.register("documents_returned", help, self.documents_returned.clone());
        let help = "Documents that are gone and whose weights are in force";
        registry.register("documents_kept", help, self.documents_kept.clone());
        let help = "Claims in reports that were ignored, by what they were about; left out before the first";
        registry.register("report_claims_ignored", help, self.claims.clone());
        let help = "TokenReviews by their answer, and tokens that none was made for";
        registry.register("token_reviews", help, self.reviews.clone());
        if self.certificate.get() > 0.0 {
            let help = "Until when the certificate of --tls-cert is valid; left out without TLS";
            registry.register("tls_certificate_expiry_timestamp_seconds", help, self.certificate.clone());
        }
    }
}
