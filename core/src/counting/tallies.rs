//! The counts of one VM of a proxy, and the sum over all VMs. Each VM counts for itself and publishes its totals; the
//! leading VM adds them up. Totals only grow, so a late sum neither loses nor doubles anything.

use crate::choice::plan::Chosen;
use crate::counts::{Counts, DURATION_BOUNDS};
use crate::guard::Veto;
use crate::outcome::Outcome;
use crate::protocol::report::{Event, Events, MAX_CLIENTS, ServiceReport, Tally, VersionReport};
use serde::{Deserialize, Serialize};

/// The number of duration buckets.
pub const DURATIONS: usize = DURATION_BOUNDS.len() + 1;
/// The maximum number of single requests of a service that a VM publishes at once.
pub const MAX_LOGGED: usize = 64;
/// The number of ticks whose sample shows whether there are only a few clients.
const ENOUGH_SAMPLES: u64 = 20;

/// The counts of all services.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tallies {
    /// The services with any counts.
    pub services: Vec<ServiceTally>,
}

/// The counts of one service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceTally {
    /// The service's name.
    pub name: String,
    /// Requests that found no version in service.
    pub unrouted: u64,
    /// The number of ticks between which requests were sampled.
    pub samples: u64,
    /// The clients of that sample with the smallest hashes, in ascending order; at most [`MAX_CLIENTS`].
    pub clients: Vec<u32>,
    /// The number of single requests that were logged.
    pub logged: u64,
    /// The last of those; at most [`MAX_LOGGED`]. Their versions are indexes into the list below.
    pub log: Vec<Event>,
    /// Its versions.
    pub versions: Vec<VersionTally>,
}

/// The counts of one version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionTally {
    /// The version's name.
    pub name: String,
    /// Requests in flight.
    pub in_flight: u64,
    /// Requests that ended at another version's cluster, or at none.
    pub misrouted: u64,
    /// The counts for each way of choosing a version that was used, as an index of [`Chosen::ALL`].
    pub chosen: Vec<(u8, ChoiceTally)>,
}

/// The counts of requests whose version was chosen in one way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceTally {
    /// Requests that began.
    pub started: u64,
    /// Requests that ended, by [`Outcome::ALL`].
    pub ended: [u64; Outcome::ALL.len()],
    /// Durations of requests that were not cancelled: see [`VersionReport::durations`].
    pub durations: Vec<u64>,
    /// How long clients waited that disconnected.
    pub waited: Vec<u64>,
}

fn each(sums: &mut Vec<u64>, more: &[u64], f: fn(u64, u64) -> u64) {
    sums.resize(sums.len().max(more.len()), 0);
    sums.iter_mut().zip(more).for_each(|(sum, more)| *sum = f(*sum, *more));
}

impl ChoiceTally {
    /// Counts a request that ended after this many milliseconds.
    pub fn count(&mut self, outcome: Outcome, duration: usize) {
        if let Some(ended) = self.ended.get_mut(outcome as usize) {
            *ended = ended.saturating_add(1);
        }
        let durations = if outcome == Outcome::Cancelled { &mut self.waited } else { &mut self.durations };
        if durations.len() <= duration {
            durations.resize(duration.saturating_add(1).min(DURATIONS), 0);
        }
        if let Some(count) = durations.get_mut(duration) {
            *count = count.saturating_add(1);
        }
    }

    /// The counts by outcome.
    pub fn counts(&self) -> Counts {
        let [ok, error, client_error, cancelled] = self.ended;
        Counts { ok, error, client_error, cancelled }
    }

    fn each(&mut self, other: &Self, f: fn(u64, u64) -> u64) {
        self.started = f(self.started, other.started);
        self.ended.iter_mut().zip(other.ended).for_each(|(sum, more)| *sum = f(*sum, more));
        each(&mut self.durations, &other.durations, f);
        each(&mut self.waited, &other.waited, f);
    }

    fn report(&self) -> Tally {
        let Self { started, durations, waited, .. } = self;
        Tally { started: *started, ended: self.counts(), durations: durations.clone(), waited: waited.clone() }
    }
}

impl VersionTally {
    /// The counts of requests whose version was chosen in one way.
    pub fn of(&self, chosen: Chosen) -> Option<&ChoiceTally> {
        self.chosen.iter().find(|(of, _)| usize::from(*of) == chosen as usize).map(|(_, tally)| tally)
    }

    /// The counts by outcome of requests whose version was chosen in one of these ways.
    pub fn ended(&self, chosen: &[Chosen]) -> Counts {
        chosen.iter().filter_map(|of| self.of(*of)).fold(Counts::default(), |sum, tally| sum + tally.counts())
    }

    fn each(&mut self, other: &Self, f: fn(u64, u64) -> u64) {
        self.misrouted = f(self.misrouted, other.misrouted);
        for (of, tally) in &other.chosen {
            match self.chosen.iter_mut().find(|(known, _)| known == of) {
                Some((_, known)) => known.each(tally, f),
                None => {
                    let mut new = ChoiceTally::default();
                    new.each(tally, f);
                    self.chosen.push((*of, new));
                }
            }
        }
    }

    fn report(&self) -> VersionReport {
        let report = |chosen| self.of(chosen).map(ChoiceTally::report).unwrap_or_default();
        let mut durations = Vec::new();
        self.chosen.iter().for_each(|(_, tally)| each(&mut durations, &tally.durations, u64::saturating_add));
        VersionReport {
            name: self.name.clone(),
            ended: self.ended(&Chosen::ALL),
            in_flight: self.in_flight,
            misrouted: self.misrouted,
            durations,
            dealt: report(Chosen::Dealt),
            session: report(Chosen::Session),
            rule: report(Chosen::Rule),
        }
    }
}

impl ServiceTally {
    /// The counts of a version, by name.
    pub fn version(&self, name: &str) -> Option<&VersionTally> {
        self.versions.iter().find(|version| version.name == name)
    }

    /// Whether the sample of all requests shows only a few clients: at most three.
    pub fn has_few_clients(&self) -> bool {
        self.samples >= ENOUGH_SAMPLES && self.clients.len() < MAX_CLIENTS
    }

    /// The service in a report.
    pub fn report(&self, vetoes: &[Veto], events: Option<Events>) -> ServiceReport {
        ServiceReport {
            name: self.name.clone(),
            unrouted: self.unrouted,
            versions: self.versions.iter().map(VersionTally::report).collect(),
            vetoes: vetoes.to_vec(),
            clients: if self.samples >= ENOUGH_SAMPLES { self.clients.clone() } else { Vec::new() },
            events,
        }
    }

    /// The single requests that were logged after the first `seen`, as far as they are still kept.
    pub fn logged_since(&self, seen: u64) -> &[Event] {
        let new = usize::try_from(self.logged.saturating_sub(seen)).unwrap_or(usize::MAX);
        self.log.get(self.log.len().saturating_sub(new)..).unwrap_or_default()
    }
}

impl Tallies {
    /// The counts of a service, by name.
    pub fn service(&self, name: &str) -> Option<&ServiceTally> {
        self.services.iter().find(|service| service.name == name)
    }

    /// Adds the counts of another VM, without single requests. `is_live`: whether it still counts, so that its requests
    /// in flight and its sample are current.
    pub fn add(&mut self, other: &Self, is_live: bool) {
        for service in &other.services {
            let at = self.services.iter().position(|known| known.name == service.name).unwrap_or_else(|| {
                self.services.push(ServiceTally { name: service.name.clone(), ..ServiceTally::default() });
                self.services.len().saturating_sub(1)
            });
            let Some(known) = self.services.get_mut(at) else { continue };
            known.unrouted = known.unrouted.saturating_add(service.unrouted);
            for version in &service.versions {
                let at = known.versions.iter().position(|of| of.name == version.name).unwrap_or_else(|| {
                    known.versions.push(VersionTally { name: version.name.clone(), ..VersionTally::default() });
                    known.versions.len().saturating_sub(1)
                });
                let Some(sum) = known.versions.get_mut(at) else { continue };
                sum.each(version, u64::saturating_add);
                if is_live {
                    sum.in_flight = sum.in_flight.saturating_add(version.in_flight);
                }
            }
            if is_live {
                known.samples = known.samples.saturating_add(service.samples);
                known.clients.extend(&service.clients);
                known.clients.sort_unstable();
                known.clients.dedup();
                known.clients.truncate(MAX_CLIENTS);
            }
        }
    }

    /// Subtracts earlier counts of the same VM.
    pub fn subtract(&mut self, before: &Self) {
        for service in &mut self.services {
            let Some(before) = before.service(&service.name) else { continue };
            service.unrouted = service.unrouted.saturating_sub(before.unrouted);
            for version in &mut service.versions {
                if let Some(before) = before.version(&version.name) {
                    version.each(before, u64::saturating_sub);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn vm(ok: u64, errors: u64, in_flight: u64, client: u32) -> Tallies {
        let mut dealt = ChoiceTally { started: ok + errors + in_flight, ..ChoiceTally::default() };
        (0..ok).for_each(|_| dealt.count(Outcome::Ok, 3));
        (0..errors).for_each(|_| dealt.count(Outcome::Error, 7));
        let mut rule = ChoiceTally { started: 1, ..ChoiceTally::default() };
        rule.count(Outcome::Cancelled, 9);
        let chosen = vec![(Chosen::Dealt as u8, dealt), (Chosen::Rule as u8, rule)];
        let version = VersionTally { name: "v1".to_owned(), in_flight, misrouted: 1, chosen };
        Tallies {
            services: vec![ServiceTally {
                name: "shop".to_owned(),
                unrouted: 2,
                samples: 15,
                clients: vec![client],
                versions: vec![version],
                ..ServiceTally::default()
            }],
        }
    }

    #[test]
    fn vms_add_up() {
        let mut all = Tallies::default();
        all.add(&vm(3, 1, 2, 70), true);
        all.add(&vm(4, 0, 5, 60), true);
        // A VM that is gone has no requests in flight.
        all.add(&vm(10, 0, 9, 50), false);
        let shop = all.service("shop").unwrap();
        assert_eq!((shop.unrouted, shop.samples, shop.clients.as_slice()), (6, 30, &[60, 70][..]));
        assert!(shop.has_few_clients());
        let report = shop.report(&[], None);
        let v1 = &report.versions[0];
        assert_eq!((v1.ended.ok, v1.ended.error, v1.ended.cancelled, v1.in_flight, v1.misrouted), (17, 1, 3, 7, 3));
        assert_eq!((v1.dealt.ended.ok, v1.dealt.started, v1.rule.started, v1.session.started), (17, 34, 3, 0));
        assert_eq!((v1.durations[3], v1.durations[7], v1.rule.waited[9]), (17, 1, 3));
    }

    #[test]
    fn what_was_taken_over_is_not_counted_again() {
        let (before, mut now) = (vm(3, 1, 2, 1), vm(5, 1, 1, 1));
        now.subtract(&before);
        let v1 = now.services[0].version("v1").unwrap();
        assert_eq!((v1.ended(&[Chosen::Dealt]).ok, v1.ended(&Chosen::ALL).total(), v1.in_flight), (2, 2, 1));
    }

    #[test]
    fn what_was_logged_since_is_found_as_far_as_it_is_there() {
        let log = (0..5).map(|client| Event(client, 0, 0, 0, 0, 0)).collect();
        let service = ServiceTally { logged: 12, log, ..ServiceTally::default() };
        let clients = |seen| service.logged_since(seen).iter().map(|event| event.0).collect::<Vec<_>>();
        assert_eq!(clients(12), [0u32; 0]);
        assert_eq!(clients(10), [3, 4]);
        assert_eq!(clients(0), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn four_clients_are_not_a_few_and_too_small_a_sample_tells_nothing() {
        let of = |samples, clients: &[u32]| ServiceTally { samples, clients: clients.to_vec(), ..Default::default() };
        assert!(of(20, &[1, 2, 3]).has_few_clients());
        assert!(!of(20, &[1, 2, 3, 4]).has_few_clients());
        assert!(!of(19, &[1]).has_few_clients());
    }
}
