//! How each version does, as Envoy stats. Envoy keeps one value for the whole process, so any VM can read the totals
//! of all of them, and a report needs no counting of its own.
//!
//! Names carry labels in the form that Istio and `tideshift render envoy` extract: `version=.=v1;.;`.

use crate::guards::Guards;
use crate::host::{Stat, StatKind};
use std::collections::BTreeMap;
use tideshift_core::outcome::Outcome;
use tideshift_core::plan::{Plan, ServicePlan};
use tideshift_core::report::{Counts, ServiceReport, VersionReport};

/// The stats of everything that this VM has counted for, also of what is gone from the policy.
#[derive(Default)]
pub struct Counters {
    services: Vec<ServiceCounters>,
    /// Where each service is in the list above.
    index: BTreeMap<String, usize>,
}

/// The stats of one service.
struct ServiceCounters {
    name: String,
    unrouted: Stat,
    versions: Vec<(String, VersionCounters)>,
}

/// The stats of one service of a plan, with its versions in the plan's order.
pub struct PlanCounters {
    unrouted: Stat,
    /// One for each version.
    pub versions: Vec<VersionCounters>,
}

/// The stats of one version.
#[derive(Clone, Copy)]
pub struct VersionCounters {
    outcomes: [Stat; Outcome::ALL.len()],
    in_flight: Stat,
    milliseconds: Stat,
}

impl Counters {
    /// The stats of a plan's services, in its order; defines those that are not defined yet.
    pub fn cover(&mut self, plan: &Plan) -> Vec<PlanCounters> {
        plan.services.iter().filter_map(|service| self.cover_service(service)).collect()
    }

    fn cover_service(&mut self, service: &ServicePlan) -> Option<PlanCounters> {
        let next = self.services.len();
        let at = *self.index.entry(service.name.clone()).or_insert(next);
        if at == next {
            let name = format!("service=.={};.;tideshift_unrouted_requests_total", service.name);
            let unrouted = Stat::define(StatKind::Counter, &name);
            self.services.push(ServiceCounters { name: service.name.clone(), unrouted, versions: Vec::new() });
        }
        let known = self.services.get_mut(at)?;
        let mut versions = Vec::with_capacity(service.versions.len());
        for version in &service.versions {
            let defined = known.versions.iter().find(|(name, _)| name == version).map(|(_, counters)| *counters);
            versions.push(defined.unwrap_or_else(|| {
                let counters = VersionCounters::define(&service.name, version);
                known.versions.push((version.clone(), counters));
                counters
            }));
        }
        Some(PlanCounters { unrouted: known.unrouted, versions })
    }

    /// The process's totals.
    pub fn read(&self, guards: &Guards) -> Vec<ServiceReport> {
        let service = |service: &ServiceCounters| ServiceReport {
            name: service.name.clone(),
            unrouted: service.unrouted.value(),
            versions: service.versions.iter().map(|(name, counters)| counters.read(name)).collect(),
            vetoes: guards.vetoes(&service.name).to_vec(),
        };
        self.services.iter().map(service).collect()
    }
}

impl PlanCounters {
    /// Counts a request that found nothing in service.
    pub fn count_unrouted(&self) {
        self.unrouted.add(1);
    }
}

impl VersionCounters {
    fn define(service: &str, version: &str) -> Self {
        let labels = format!("service=.={service};.;version=.={version};.;");
        let outcome = |outcome: Outcome| {
            let name = format!("{labels}outcome=.={};.;tideshift_requests_total", outcome.label());
            Stat::define(StatKind::Counter, &name)
        };
        Self {
            outcomes: Outcome::ALL.map(outcome),
            in_flight: Stat::define(StatKind::Gauge, &format!("{labels}tideshift_requests_in_flight")),
            milliseconds: Stat::define(
                StatKind::Histogram,
                &format!("{labels}tideshift_request_duration_milliseconds"),
            ),
        }
    }

    /// Counts a request that has been given to the version.
    pub fn started(&self) {
        self.in_flight.add(1);
    }

    /// Counts how it ended, `nanoseconds` after its start.
    pub fn ended(&self, outcome: Outcome, nanoseconds: u64) {
        self.in_flight.add(-1);
        self.outcomes.get(outcome as usize).copied().unwrap_or_default().add(1);
        if outcome != Outcome::Cancelled {
            self.milliseconds.record(nanoseconds / 1_000_000);
        }
    }

    /// The process's totals by outcome.
    pub fn ended_so_far(&self) -> Counts {
        let [ok, error, client_error, cancelled] = self.outcomes.map(Stat::value);
        Counts { ok, error, client_error, cancelled }
    }

    fn read(&self, name: &str) -> VersionReport {
        VersionReport { name: name.to_owned(), ended: self.ended_so_far(), in_flight: self.in_flight.value() }
    }
}
