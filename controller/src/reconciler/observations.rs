//! The inputs of the rollout engine for the services of one document.

use crate::clock::Millis;
use crate::readiness::{Readiness, RememberedReadiness};
use crate::reconciler::ledger::Ledger;
use crate::reconciler::proxies::Census;
use crate::rollout::{AnalysisResult, Coverage, RolloutInputs};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use tideshift_core::counts::Counts;
use tideshift_core::guard::Veto;
use tideshift_core::shift::{Endpoint, TrafficShift};

/// How many endpoints are ready, and how many have been for long enough, by service and version.
pub(super) type Ready<'a> = BTreeMap<(&'a str, &'a str), (u32, u32)>;

/// The inputs of the rollout engine.
#[derive(Debug)]
pub(super) struct Observations<'a> {
    ledger: &'a Ledger,
    ready: Ready<'a>,
    vetoes: Vec<(&'a str, &'a Veto)>,
    opinion: AnalysisResult,
    up_to_date: bool,
    counts_are_kept: bool,
    coverage: Coverage,
}

impl<'a> Observations<'a> {
    /// Assembles the inputs.
    pub(super) fn new(
        ledger: &'a Ledger,
        ready: Ready<'a>,
        vetoes: Vec<(&'a str, &'a Veto)>,
        opinion: AnalysisResult,
        up_to_date: bool,
    ) -> Self {
        Self { ledger, ready, vetoes, opinion, up_to_date, counts_are_kept: true, coverage: Coverage::default() }
    }

    /// Adds the state of the proxies that are to run a document's services as of a revision.
    pub(super) fn with_proxies(self, census: &Census, revision: u64, shift: &TrafficShift) -> Self {
        let services = shift.services.iter().map(|service| service.name.as_str());
        Self { coverage: census.coverage(revision, services), ..self }
    }

    /// Sets whether counts can be persisted.
    pub(super) fn with_counts_kept(self, counts_are_kept: bool) -> Self {
        Self { counts_are_kept, ..self }
    }

    fn endpoints(&self, service: &str, version: &str) -> (u32, u32) {
        self.ready.get(&(service, version)).copied().unwrap_or_default()
    }
}

impl RolloutInputs for Observations<'_> {
    fn ready(&self, service: &str, version: &str) -> u32 {
        self.endpoints(service, version).0
    }

    fn available(&self, service: &str, version: &str) -> u32 {
        self.endpoints(service, version).1
    }

    fn counts(&self, service: &str, version: &str) -> Counts {
        self.ledger.judged_counts(service, version)
    }

    fn coverage(&self) -> Coverage {
        self.coverage.clone()
    }

    fn misrouted(&self, service: &str, version: &str) -> u64 {
        self.ledger.misrouted(service, version)
    }

    fn vetoes(&self, service: &str, version: &str) -> impl Iterator<Item = &Veto> {
        let of = self.vetoes.iter().filter(move |(of, veto)| *of == service && veto.version == version);
        of.map(|(_, veto)| *veto)
    }

    fn is_up_to_date(&self) -> bool {
        self.up_to_date
    }

    fn counts_are_kept(&self) -> bool {
        self.counts_are_kept
    }

    fn verdict(&self) -> AnalysisResult {
        self.opinion.clone()
    }
}

/// The endpoints that became ready recently, and when. Persisted across restarts of the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Young(#[serde(with = "crate::reconciler::ledger::as_list")] BTreeMap<(String, String, String), Millis>);

/// Since when endpoints have been ready.
#[derive(Debug, Default)]
pub(super) struct Availability {
    /// By service, then by version and `host:port`.
    since: BTreeMap<String, BTreeMap<(String, String), Millis>>,
    /// The services that have been seen before. Endpoints that are ready when a service is first seen count as ready
    /// for long.
    seen: BTreeSet<String>,
}

impl Availability {
    /// Endpoints that were ready under the previous controller count as ready for long, except those in `young`.
    pub(super) fn new(remembered: &RememberedReadiness, young: &Young) -> Self {
        let seen = remembered.0.keys().cloned().collect();
        let mut since: BTreeMap<String, BTreeMap<_, _>> = BTreeMap::new();
        for (service, versions) in &remembered.0 {
            let of_service = since.entry(service.clone()).or_default();
            for (version, endpoints) in versions {
                of_service.extend(endpoints.iter().map(|endpoint| ((version.clone(), endpoint.clone()), 0)));
            }
        }
        for ((service, version, endpoint), time) in &young.0 {
            since.entry(service.clone()).or_default().insert((version.clone(), endpoint.clone()), *time);
        }
        Self { since, seen }
    }

    /// Accounts for time in which no controller ran: young endpoints do not age in it.
    pub(super) fn was_unattended(&mut self, long: Millis) {
        let young = self.since.values_mut().flat_map(BTreeMap::values_mut).filter(|time| **time > 0);
        young.for_each(|time| *time = time.saturating_add(long));
    }

    /// The endpoints that are ready and younger than their documents require, and when that next changes.
    pub(super) fn young(&self, shifts: &[TrafficShift], now: Millis) -> (Young, Option<Millis>) {
        let (mut young, mut until) = (BTreeMap::new(), None::<Millis>);
        for shift in shifts.iter().filter(|shift| !shift.strategy.min_ready.is_zero()) {
            let long = shift.strategy.min_ready.as_millis() as u64;
            for service in &shift.services {
                let of_service = self.since.get(&service.name).into_iter().flatten();
                for ((version, endpoint), time) in of_service.filter(|(_, time)| **time > 0) {
                    let due = time.saturating_add(long);
                    if due > now {
                        young.insert((service.name.clone(), version.clone(), endpoint.clone()), *time);
                        until = Some(until.map_or(due, |until| until.min(due)));
                    }
                }
            }
        }
        (Young(young), until)
    }

    /// When the next endpoint of a document will have been ready for long enough.
    pub(super) fn next(&self, shift: &TrafficShift, now: Millis) -> Option<Millis> {
        let long = shift.strategy.min_ready.as_millis() as u64;
        let services = shift.services.iter().filter(|_| long > 0);
        let times = services.filter_map(|service| self.since.get(&service.name)).flat_map(BTreeMap::values);
        times.map(|time| time.saturating_add(long)).filter(|due| *due > now).min()
    }

    /// Records which endpoints of these services are ready now.
    pub(super) fn look<'s>(
        &mut self,
        services: impl IntoIterator<Item = &'s String>,
        readiness: &Readiness,
        now: Millis,
    ) {
        for service in services {
            let Some(versions) = readiness.services.get(service) else {
                self.since.remove(service);
                continue;
            };
            if !readiness.is_known(service) {
                continue;
            }
            let begins = if self.seen.insert(service.clone()) { 0 } else { now };
            let before = self.since.remove(service).unwrap_or_default();
            let mut since = BTreeMap::new();
            for (version, endpoints) in versions {
                for state in endpoints.iter().filter(|state| state.ready) {
                    let key = (version.clone(), state.endpoint.to_string());
                    let time = before.get(&key).copied().unwrap_or(begins);
                    since.insert(key, time);
                }
            }
            self.since.insert(service.clone(), since);
        }
    }

    /// How many endpoints of each version are ready, and how many have been for as long as the document requires.
    pub(super) fn of<'a>(&self, shift: &'a TrafficShift, readiness: &Readiness, now: Millis) -> Ready<'a> {
        let long = shift.strategy.min_ready.as_millis() as u64;
        let mut counts = BTreeMap::new();
        for service in &shift.services {
            let since = self.since.get(&service.name);
            for version in &service.versions {
                let endpoints = readiness.endpoints(&service.name, &version.name);
                let is_available = |endpoint: &Endpoint| {
                    let since = || since?.get(&(version.name.clone(), endpoint.to_string()));
                    long == 0 || since().is_some_and(|since| now.saturating_sub(*since) >= long)
                };
                let (mut all, mut available) = (0, 0);
                for state in endpoints.iter().filter(|state| state.ready) {
                    all += 1;
                    available += u32::from(is_available(&state.endpoint));
                }
                counts.insert((service.name.as_str(), version.name.as_str()), (all, available));
            }
        }
        counts
    }
}
