//! What the rollout engine may see of the services of one shift.

use super::proxies::Census;
use crate::ledger::Ledger;
use crate::readiness::{Readiness, RememberedReadiness};
use crate::rollout::{Coverage, Millis, Observed, Opinion};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use tideshift_core::guard::Veto;
use tideshift_core::report::Counts;
use tideshift_core::shift::TrafficShift;

/// What the engine may see.
#[derive(Debug)]
pub(super) struct World<'a> {
    ledger: &'a Ledger,
    /// Endpoints that are ready, and those that have been for long enough, by service and version.
    ready: BTreeMap<(String, String), (u32, u32)>,
    vetoes: Vec<(&'a str, &'a Veto)>,
    opinion: Opinion,
    up_to_date: bool,
    counts_are_kept: bool,
    coverage: Coverage,
}

impl<'a> World<'a> {
    /// Puts together what is known.
    pub(super) fn new(
        ledger: &'a Ledger,
        ready: BTreeMap<(String, String), (u32, u32)>,
        vetoes: Vec<(&'a str, &'a Veto)>,
        opinion: Opinion,
        up_to_date: bool,
    ) -> Self {
        Self { ledger, ready, vetoes, opinion, up_to_date, counts_are_kept: true, coverage: Coverage::default() }
    }

    /// With what is known of the proxies that are to run a shift's services as of a revision.
    pub(super) fn with_proxies(self, census: &Census, revision: u64, shift: &TrafficShift) -> Self {
        let services = shift.services.iter().map(|service| service.name.as_str());
        Self { coverage: census.coverage(revision, services), ..self }
    }

    /// Where counts can be kept, or cannot.
    pub(super) fn with_counts_kept(self, counts_are_kept: bool) -> Self {
        Self { counts_are_kept, ..self }
    }

    fn endpoints(&self, service: &str, version: &str) -> (u32, u32) {
        self.ready.get(&(service.to_owned(), version.to_owned())).copied().unwrap_or_default()
    }
}

impl Observed for World<'_> {
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

    fn verdict(&self) -> Opinion {
        self.opinion.clone()
    }
}

/// The endpoints that have become ready of late, and when. Kept across restarts of the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Young(#[serde(with = "crate::ledger::as_list")] BTreeMap<(String, String, String), Millis>);

/// Since when endpoints have been ready.
#[derive(Debug, Default)]
pub(super) struct Availability {
    /// By service, version and `host:port`.
    since: BTreeMap<(String, String, String), Millis>,
    /// The services that have been looked at before. What is ready when a service is first seen has been for long.
    seen: BTreeSet<String>,
}

impl Availability {
    /// What was ready under the controller before has been for long, but for what had not been.
    pub(super) fn new(remembered: &RememberedReadiness, young: &Young) -> Self {
        let seen = remembered.0.keys().cloned().collect();
        let mut since = BTreeMap::new();
        for (service, versions) in &remembered.0 {
            for (version, endpoints) in versions {
                let key = |endpoint: &String| (service.clone(), version.clone(), endpoint.clone());
                since.extend(endpoints.iter().map(|endpoint| (key(endpoint), 0)));
            }
        }
        since.extend(young.0.iter().map(|(key, time)| (key.clone(), *time)));
        Self { since, seen }
    }

    /// Time has passed in which no controller was there: what was young is no older for that.
    pub(super) fn was_unattended(&mut self, long: Millis) {
        let young = self.since.values_mut().filter(|time| **time > 0);
        young.for_each(|time| *time = time.saturating_add(long));
    }

    /// The endpoints that are ready, and have not been for as long as their shifts ask for.
    pub(super) fn young(&self, shifts: &[TrafficShift], now: Millis) -> Young {
        let mut young = BTreeMap::new();
        for shift in shifts.iter().filter(|shift| !shift.strategy.min_ready.is_zero()) {
            let long = shift.strategy.min_ready.as_millis() as u64;
            let of_shift = self.since.iter().filter(|((service, ..), _)| shift.service(service).is_some());
            let is_young = |(_, time): &(_, &Millis)| **time > 0 && now.saturating_sub(**time) < long;
            young.extend(of_shift.filter(is_young).map(|(key, time)| (key.clone(), *time)));
        }
        Young(young)
    }

    /// Takes note of what is ready now.
    pub(super) fn look(&mut self, readiness: &Readiness, now: Millis) {
        let mut since = BTreeMap::new();
        for (service, versions) in &readiness.services {
            if !readiness.is_known(service) {
                let of_service = self.since.iter().filter(|((of, ..), _)| of == service);
                since.extend(of_service.map(|(key, time)| (key.clone(), *time)));
                continue;
            }
            let begins = if self.seen.insert(service.clone()) { 0 } else { now };
            for (version, endpoints) in versions {
                for state in endpoints.iter().filter(|state| state.ready) {
                    let key = (service.clone(), version.clone(), state.endpoint.to_string());
                    let time = self.since.get(&key).copied().unwrap_or(begins);
                    since.insert(key, time);
                }
            }
        }
        self.since = since;
    }

    /// How many endpoints of each version are ready, and how many have been for as long as the shift asks for.
    pub(super) fn of(
        &self,
        shift: &TrafficShift,
        readiness: &Readiness,
        now: Millis,
    ) -> BTreeMap<(String, String), (u32, u32)> {
        let long = shift.strategy.min_ready.as_millis() as u64;
        let mut counts = BTreeMap::new();
        for service in &shift.services {
            for version in &service.versions {
                let endpoints = readiness.endpoints(&service.name, &version.name);
                let ready = endpoints.iter().filter(|state| state.ready);
                let is_available = |endpoint: String| {
                    let since = self.since.get(&(service.name.clone(), version.name.clone(), endpoint));
                    long == 0 || since.is_some_and(|since| now.saturating_sub(*since) >= long)
                };
                let (mut all, mut available) = (0, 0);
                for state in ready {
                    all += 1;
                    available += u32::from(is_available(state.endpoint.to_string()));
                }
                counts.insert((service.name.clone(), version.name.clone()), (all, available));
            }
        }
        counts
    }
}
