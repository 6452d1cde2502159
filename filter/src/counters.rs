//! How each version does, as Envoy stats. Envoy keeps one value for the whole process, so any VM can read the totals
//! of all of them, and a report needs no counting of its own.
//!
//! Names carry labels in the form that Istio and `tideshift render envoy` extract: `version=.=v1;.;`.

use crate::guards::Guards;
use crate::host::{Stat, StatKind};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tideshift_core::outcome::Outcome;
use tideshift_core::plan::{Plan, ServicePlan};
use tideshift_core::report::{Counts, DURATION_BOUNDS, ServiceReport, VersionReport, duration_bucket};

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
#[derive(Clone)]
pub struct VersionCounters {
    outcomes: [Stat; Outcome::ALL.len()],
    in_flight: Stat,
    milliseconds: Stat,
    /// The histogram's values again, by [`duration_bucket`], since a histogram cannot be read.
    durations: Rc<Durations>,
}

/// Counters that are defined when they are first needed: most versions need few of them.
struct Durations {
    labels: String,
    buckets: RefCell<Vec<Option<Stat>>>,
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
            let defined = known.versions.iter().find(|(name, _)| name == version).map(|(_, counters)| counters.clone());
            versions.push(defined.unwrap_or_else(|| {
                let counters = VersionCounters::define(&service.name, version);
                known.versions.push((version.clone(), counters.clone()));
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
            durations: Rc::new(Durations { labels, buckets: RefCell::default() }),
        }
    }

    /// Counts a request that has been given to the version.
    pub fn started(&self) {
        self.in_flight.add(1);
    }

    /// Takes back that it has started: Envoy goes on with the request by itself, and it will come again.
    pub fn redirected(&self) {
        self.in_flight.add(-1);
    }

    /// Counts how it ended, `nanoseconds` after its start.
    pub fn ended(&self, outcome: Outcome, nanoseconds: u64) {
        self.in_flight.add(-1);
        self.outcomes.get(outcome as usize).copied().unwrap_or_default().add(1);
        if outcome != Outcome::Cancelled {
            let milliseconds = nanoseconds / 1_000_000;
            self.milliseconds.record(milliseconds);
            self.durations.stat(duration_bucket(milliseconds)).add(1);
        }
    }

    /// The process's requests under way.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.value()
    }

    /// The process's failed requests.
    pub fn errors(&self) -> u64 {
        self.outcomes.get(Outcome::Error as usize).copied().unwrap_or_default().value()
    }

    /// The process's totals by outcome.
    pub fn ended_so_far(&self) -> Counts {
        let [ok, error, client_error, cancelled] = self.outcomes.map(Stat::value);
        Counts { ok, error, client_error, cancelled }
    }

    fn read(&self, name: &str) -> VersionReport {
        let mut durations: Vec<u64> =
            (0..=DURATION_BOUNDS.len()).map(|bucket| self.durations.stat(bucket).value()).collect();
        let used = durations.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        durations.truncate(used);
        let (ended, in_flight) = (self.ended_so_far(), self.in_flight.value());
        VersionReport { name: name.to_owned(), ended, in_flight, durations }
    }
}

impl Durations {
    fn stat(&self, bucket: usize) -> Stat {
        let mut buckets = self.buckets.borrow_mut();
        if buckets.is_empty() {
            buckets.resize(DURATION_BOUNDS.len() + 1, None);
        }
        let Some(stat) = buckets.get_mut(bucket) else { return Stat::default() };
        *stat.get_or_insert_with(|| {
            let bound = DURATION_BOUNDS.get(bucket).map_or("+Inf".to_owned(), u64::to_string);
            let name = format!("{}upto=.={bound};.;tideshift_requests_by_duration_total", self.labels);
            Stat::define(StatKind::Counter, &name)
        })
    }
}
