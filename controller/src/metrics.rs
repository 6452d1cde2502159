//! The controller's own `/metrics`, made from the status: one truth for people and for Prometheus. Names start with
//! `tideshift_controller`, so that a sum over proxies and controller counts no request twice.

use crate::rollout::Phase;
use crate::status::{ServiceStatus, Status};
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info};
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;
use tideshift_core::outcome::Outcome;

type GaugeF64 = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ServiceLabels {
    service: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VersionLabels {
    service: String,
    version: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    service: String,
    version: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PhaseLabels {
    service: String,
    phase: &'static str,
}

/// The metrics of a status in the OpenMetrics text format.
pub fn text(status: &Status) -> String {
    let mut registry = Registry::with_prefix("tideshift_controller");
    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The running controller", build);
    let revision: Gauge = Gauge::default();
    revision.set(i64::try_from(status.revision).unwrap_or(i64::MAX));
    registry.register("policy_revision", "Revision of the policy that proxies are given", revision);
    let proxies: Gauge = Gauge::default();
    proxies.set(status.proxies.len() as i64);
    registry.register("proxies", "Proxies heard of within the last minute", proxies);
    let behind: Gauge = Gauge::default();
    behind.set(status.proxies.iter().filter(|proxy| proxy.revision != Some(status.revision)).count() as i64);
    registry.register("proxies_behind", "Proxies that do not run the newest policy on all workers", behind);
    let document_errors: Gauge = Gauge::default();
    document_errors.set(status.document_errors.len() as i64);
    registry.register("document_errors", "Errors in the documents; what they said before is in force", document_errors);
    let families = Families::default();
    status.services.iter().for_each(|service| families.add(service));
    families.register(&mut registry);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

#[derive(Default)]
struct Families {
    requests: Family<OutcomeLabels, Counter>,
    unrouted: Family<ServiceLabels, Counter>,
    in_flight: Family<VersionLabels, Gauge>,
    share: Family<VersionLabels, GaugeF64>,
    ready: Family<VersionLabels, Gauge>,
    endpoints: Family<VersionLabels, Gauge>,
    phase: Family<PhaseLabels, Gauge>,
}

impl Families {
    fn add(&self, status: &ServiceStatus) {
        let service = status.name.clone();
        self.unrouted.get_or_create(&ServiceLabels { service: service.clone() }).inc_by(status.unrouted);
        for phase in Phase::ALL {
            let labels = PhaseLabels { service: service.clone(), phase: phase.name() };
            self.phase.get_or_create(&labels).set(i64::from(phase == status.phase));
        }
        for version in &status.versions {
            let labels = VersionLabels { service: service.clone(), version: version.name.clone() };
            self.in_flight.get_or_create(&labels).set(i64::try_from(version.in_flight).unwrap_or(i64::MAX));
            self.share.get_or_create(&labels).set(version.weight / 100.0);
            self.ready.get_or_create(&labels).set(version.endpoints.ready as i64);
            self.endpoints.get_or_create(&labels).set(version.endpoints.listed as i64);
            for outcome in Outcome::ALL {
                let labels =
                    OutcomeLabels { service: service.clone(), version: version.name.clone(), outcome: outcome.label() };
                self.requests.get_or_create(&labels).inc_by(version.requests.of(outcome));
            }
        }
    }

    fn register(self, registry: &mut Registry) {
        registry.register("requests", "Requests that have ended, over all proxies", self.requests);
        registry.register("unrouted_requests", "Requests that found no version in service", self.unrouted);
        registry.register("requests_in_flight", "Requests under way, over all proxies", self.in_flight);
        registry.register("version_share_ratio", "Share of the traffic that no rule takes", self.share);
        registry.register("endpoints_ready", "Endpoints that can take traffic", self.ready);
        registry.register("endpoints", "Endpoints in the document", self.endpoints);
        registry.register("rollout_phase", "1 for the phase that the rollout is in", self.phase);
    }
}
