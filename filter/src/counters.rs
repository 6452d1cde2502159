//! How each version does, as Envoy stats. Envoy keeps one value for the whole process, so any VM can read the totals
//! of all of them, and a report needs no counting of its own.
//!
//! Names carry labels in the form that Istio and `tideshift render envoy` extract: `version=.=v1;.;`.

use crate::host;
use proxy_wasm::types::MetricType;
use std::collections::BTreeMap;
use std::rc::Rc;
use tideshift_core::outcome::Outcome;
use tideshift_core::plan::Plan;
use tideshift_core::report::{Counts, ServiceReport, VersionReport};

/// The stats of everything that this VM has counted for, also of versions that are gone from the policy.
#[derive(Default)]
pub struct Counters(BTreeMap<String, Rc<ServiceCounters>>);

/// The stats of one service.
pub struct ServiceCounters {
    unrouted: Option<u32>,
    versions: BTreeMap<String, Rc<VersionCounters>>,
}

/// The stats of one version.
pub struct VersionCounters {
    outcomes: [Option<u32>; Outcome::ALL.len()],
    in_flight: Option<u32>,
    milliseconds: Option<u32>,
}

impl Counters {
    /// Defines the stats of a plan's services and versions, where they are not defined yet.
    pub fn cover(&mut self, plan: &Plan) {
        for service in &plan.services {
            let known = self.0.get(&service.name).map(|known| known.versions.clone());
            let mut versions = known.unwrap_or_default();
            for version in &service.versions {
                let counters = || Rc::new(VersionCounters::define(&service.name, version));
                versions.entry(version.clone()).or_insert_with(counters);
            }
            let unrouted = format!("service=.={};.;tideshift_unrouted_requests_total", service.name);
            let unrouted = host::stat(MetricType::Counter, &unrouted);
            self.0.insert(service.name.clone(), Rc::new(ServiceCounters { unrouted, versions }));
        }
    }

    /// The stats of one service that is covered.
    pub fn service(&self, name: &str) -> Option<Rc<ServiceCounters>> {
        self.0.get(name).cloned()
    }

    /// The process's totals.
    pub fn read(&self) -> Vec<ServiceReport> {
        let version = |(name, counters): (&String, &Rc<VersionCounters>)| counters.read(name);
        let service = |(name, counters): (&String, &Rc<ServiceCounters>)| ServiceReport {
            name: name.clone(),
            unrouted: host::stat_value(counters.unrouted),
            versions: counters.versions.iter().map(version).collect(),
        };
        self.0.iter().map(service).collect()
    }
}

impl ServiceCounters {
    /// Counts a request that found nothing in service.
    pub fn count_unrouted(&self) {
        host::stat_add(self.unrouted, 1);
    }

    /// The stats of one version that is covered.
    pub fn version(&self, name: &str) -> Option<Rc<VersionCounters>> {
        self.versions.get(name).cloned()
    }
}

impl VersionCounters {
    fn define(service: &str, version: &str) -> Self {
        let labels = format!("service=.={service};.;version=.={version};.;");
        let outcome = |outcome: Outcome| {
            let name = format!("{labels}outcome=.={};.;tideshift_requests_total", outcome.label());
            host::stat(MetricType::Counter, &name)
        };
        Self {
            outcomes: Outcome::ALL.map(outcome),
            in_flight: host::stat(MetricType::Gauge, &format!("{labels}tideshift_requests_in_flight")),
            milliseconds: host::stat(
                MetricType::Histogram,
                &format!("{labels}tideshift_request_duration_milliseconds"),
            ),
        }
    }

    /// Counts a request that has been given to the version.
    pub fn started(&self) {
        host::stat_add(self.in_flight, 1);
    }

    /// Counts how it ended, `nanoseconds` after its start.
    pub fn ended(&self, outcome: Outcome, nanoseconds: u64) {
        host::stat_add(self.in_flight, -1);
        host::stat_add(self.outcomes.get(outcome as usize).copied().flatten(), 1);
        if outcome != Outcome::Cancelled {
            host::stat_record(self.milliseconds, nanoseconds / 1_000_000);
        }
    }

    fn read(&self, name: &str) -> VersionReport {
        let [ok, error, client_error, cancelled] = self.outcomes.map(host::stat_value);
        VersionReport {
            name: name.to_owned(),
            ended: Counts { ok, error, client_error, cancelled },
            in_flight: host::stat_value(self.in_flight),
        }
    }
}
