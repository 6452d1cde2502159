//! What this VM has counted. Requests count into plain cells; at each tick, and at once with a first error, the totals are
//! published for the VM that leads ([`crate::totals`]), and Envoy's metrics ([`crate::metrics`]) catch up.

use crate::host::Host;
use crate::metrics::{ServiceMetrics, VersionMetrics};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use tideshift_core::choice::plan::{Chosen, Plan, ServicePlan};
use tideshift_core::counting::routes::Routes;
use tideshift_core::counting::tallies::{ChoiceTally, MAX_LOGGED, ServiceTally, Tallies, VersionTally};
use tideshift_core::counts::duration_bucket;
use tideshift_core::evidence::clients;
use tideshift_core::outcome::Outcome;
use tideshift_core::protocol::report::{Event, MAX_CLIENTS};

/// Requests that are looked at between two ticks as a sample of all, for each service.
const SAMPLE: u32 = 5;
/// Bad requests that are told one by one between two ticks, for each service.
const BAD: u32 = 32;
/// Clients of the sample are remembered for so long …
const CLIENT_NANOS: u64 = 300_000_000_000;
/// … and at most so many of them.
const MOST_CLIENTS: usize = 64;
/// What was counted of a version that is gone from the policy is kept for so long.
const GONE_AFTER: Duration = Duration::from_secs(120);
/// The most durations that wait for the next tick to become part of Envoy's histogram.
const MOST_TIMES: usize = 65_536;

/// Everything that this VM has counted for, for all plugin configurations and also what is gone from their policies: a
/// configuration that takes another's place counts on.
#[derive(Default)]
pub struct Counters {
    services: BTreeMap<String, Rc<ServiceCounters>>,
    changes: Rc<Changes>,
}

/// How often something was counted, and how often an error.
#[derive(Default)]
struct Changes {
    all: Cell<u64>,
    errors: Cell<u64>,
}

/// What of a VM's counts has been published.
#[derive(Default, Clone, Copy)]
pub struct Seen {
    changes: u64,
    errors: u64,
}

/// The counters of one service.
pub struct ServiceCounters {
    name: String,
    unrouted: Cell<u64>,
    /// All versions, and since when no policy in force, nor any request, knows of them; 0: one does.
    known: RefCell<Vec<(Rc<VersionCounters>, u64)>>,
    /// Whether requests of this service are gRPC requests, as far as was seen: then each is asked.
    speaks_grpc: Cell<bool>,
    /// Whether Envoy was seen to make failures look like answers (`local_reply_config`): then each answer is asked.
    rewrites: Cell<bool>,
    /// How many more requests may be looked at, and told, before the next tick.
    sample: Cell<u32>,
    bad: Cell<u32>,
    clients: RefCell<BTreeMap<u32, u64>>,
    /// Between how many ticks there were any, and whether there were since the last one: a crowd of requests within a moment
    /// tells nothing of how many clients there are.
    samples: Cell<u64>,
    sampled: Cell<bool>,
    logged: Cell<u64>,
    log: RefCell<Vec<Event>>,
    routes: RefCell<Routes>,
    metrics: ServiceMetrics,
    changes: Rc<Changes>,
}

/// The counters of one service of a plan, with its versions in the plan's order.
#[derive(Clone)]
pub struct PlanCounters {
    /// The service's.
    pub service: Rc<ServiceCounters>,
    /// One for each version.
    pub versions: Vec<Rc<VersionCounters>>,
}

/// The counters of one version.
pub struct VersionCounters {
    name: String,
    /// Its place among all versions of its service that this VM has counted for.
    index: usize,
    in_flight: Cell<u64>,
    misrouted: Cell<u64>,
    chosen: RefCell<[ChoiceTally; Chosen::ALL.len()]>,
    /// The milliseconds of requests that Envoy's histogram has not taken yet.
    times: RefCell<Vec<u32>>,
    metrics: VersionMetrics,
}

/// How one request of a version ended.
pub struct Ended {
    /// In which way its version was chosen.
    pub chosen: Chosen,
    /// Whether it says something about the version: see [`tideshift_core::choice::plan::Decision::is_compared`].
    pub is_compared: bool,
    /// Its user, if there is a session.
    pub user: Option<u32>,
    /// How.
    pub outcome: Outcome,
    /// How long after its start.
    pub nanoseconds: u64,
    /// Whether it is one of the sample of all requests.
    pub is_sampled: bool,
}

impl Counters {
    /// Defines Envoy's metrics again, in case that one of their ids was wrong.
    pub fn define_again(&self, host: &impl Host) {
        self.services.values().for_each(|service| service.define(host));
    }

    /// The counters of a plan's services, in its order.
    pub fn cover(&mut self, host: &impl Host, plan: &Plan) -> Vec<PlanCounters> {
        plan.services.iter().map(|service| self.cover_service(host, service)).collect()
    }

    fn cover_service(&mut self, host: &impl Host, service: &ServicePlan) -> PlanCounters {
        let changes = self.changes.clone();
        let known = self.services.entry(service.name.clone());
        let counters = known.or_insert_with(|| Rc::new(ServiceCounters::new(host, &service.name, changes))).clone();
        let mut versions = Vec::with_capacity(service.versions.len());
        for (i, name) in service.versions.iter().enumerate() {
            let mut known = counters.known.borrow_mut();
            let found = known.iter().find(|(version, _)| version.name == *name).map(|(version, _)| version.clone());
            let version = found.unwrap_or_else(|| {
                let index = known.iter().map(|(version, _)| version.index + 1).max().unwrap_or_default();
                let version = Rc::new(VersionCounters::new(host, &service.name, name, index));
                known.push((version.clone(), 0));
                version
            });
            let cluster = service.clusters.get(i).and_then(Option::as_deref);
            counters.routes.borrow_mut().set(version.index, service.stable == Some(i), cluster);
            versions.push(version);
        }
        PlanCounters { service: counters, versions }
    }

    /// Whether there was an error that the VM that leads should know of at once.
    pub fn is_urgent(&self, seen: Seen) -> bool {
        self.changes.errors.get() != seen.errors
    }

    /// What this VM has counted, if that is more than what was seen.
    pub fn news(&self, now: u64, seen: &mut Seen) -> Option<Tallies> {
        let before =
            std::mem::replace(seen, Seen { changes: self.changes.all.get(), errors: self.changes.errors.get() });
        if before.changes == seen.changes {
            return None;
        }
        let services: Vec<_> = self.services.values().map(|service| service.tally(now)).collect();
        Some(Tallies { services: services.into_iter().filter(|service| !service.versions.is_empty()).collect() })
    }

    /// A tick: Envoy's metrics catch up, samples begin again, and what left the policies long ago is forgotten.
    pub fn tick(&mut self, host: &impl Host, now: u64) {
        for service in self.services.values() {
            service.tick(host, now);
        }
        self.services.retain(|_, service| !service.known.borrow().is_empty());
    }

    /// Shows in Envoy's gauges what all VMs together have in flight.
    pub fn show_in_flight(&self, host: &impl Host, totals: &Tallies) {
        for service in self.services.values() {
            for (version, _) in service.known.borrow().iter() {
                let of = totals.service(&service.name).and_then(|of| of.version(&version.name));
                version.metrics.show_in_flight(host, of.map_or(0, |of| of.in_flight));
            }
        }
    }
}

impl ServiceCounters {
    fn new(host: &impl Host, name: &str, changes: Rc<Changes>) -> Self {
        let new = Self {
            name: name.to_owned(),
            unrouted: Cell::new(0),
            known: RefCell::default(),
            speaks_grpc: Cell::new(false),
            rewrites: Cell::new(false),
            sample: Cell::new(SAMPLE),
            bad: Cell::new(BAD),
            clients: RefCell::default(),
            samples: Cell::new(0),
            sampled: Cell::new(false),
            logged: Cell::new(0),
            log: RefCell::default(),
            routes: RefCell::default(),
            metrics: ServiceMetrics::default(),
            changes,
        };
        new.define(host);
        new
    }

    fn define(&self, host: &impl Host) {
        self.metrics.define(host, &self.name);
        self.known.borrow().iter().for_each(|(version, _)| version.metrics.define(host));
    }

    fn changed(&self) {
        self.changes.all.set(self.changes.all.get().wrapping_add(1));
    }

    /// Counts a request that found nothing in service.
    pub fn count_unrouted(&self) {
        self.unrouted.set(self.unrouted.get().saturating_add(1));
        self.changed();
    }

    /// Whether to ask what kind of request this is: where gRPC is spoken always, else now and then.
    pub fn asks_for_kind(&self) -> bool {
        self.speaks_grpc.get() || self.sample.get() > 0
    }

    /// gRPC was seen.
    pub fn note_grpc(&self) {
        self.speaks_grpc.set(true);
    }

    /// Whether Envoy was seen to make failures look like answers.
    pub fn are_answers_rewritten(&self) -> bool {
        self.rewrites.get()
    }

    /// Envoy made a failure look like an answer.
    pub fn note_rewritten(&self) {
        self.rewrites.set(true);
    }

    /// Whether to look at a request that has just ended as one of the sample of all.
    pub fn samples(&self) -> bool {
        let left = self.sample.get();
        self.sample.set(left.saturating_sub(1));
        left > 0
    }

    /// Whether it has to be looked at where this request of a version went.
    pub fn asks_for_route(&self, version: &VersionCounters) -> bool {
        self.routes.borrow().asks_for(version.index)
    }

    /// Whether a request that went to this cluster reached its version.
    pub fn reached(&self, version: &VersionCounters, cluster: Option<&[u8]>) -> bool {
        self.routes.borrow_mut().reached(version.index, cluster)
    }

    /// A request of a version began.
    pub fn started(&self, version: &VersionCounters, chosen: Chosen) {
        version.in_flight.set(version.in_flight.get().saturating_add(1));
        if let Some(tally) = version.chosen.borrow_mut().get_mut(chosen as usize) {
            tally.started = tally.started.saturating_add(1);
        }
        self.changed();
    }

    /// Takes back that it began: Envoy goes on with the request by itself, and it will come again.
    pub fn redirected(&self, version: &VersionCounters, chosen: Chosen) {
        version.in_flight.set(version.in_flight.get().saturating_sub(1));
        if let Some(tally) = version.chosen.borrow_mut().get_mut(chosen as usize) {
            tally.started = tally.started.saturating_sub(1);
        }
        self.changed();
    }

    /// It ended at another version's cluster, or at none.
    pub fn misrouted(&self, version: &VersionCounters, chosen: Chosen) {
        self.redirected(version, chosen);
        version.misrouted.set(version.misrouted.get().saturating_add(1));
    }

    /// Counts how it ended.
    pub fn ended(&self, host: &impl Host, version: &VersionCounters, ended: &Ended) {
        let milliseconds = ended.nanoseconds / 1_000_000;
        let duration = duration_bucket(milliseconds);
        version.in_flight.set(version.in_flight.get().saturating_sub(1));
        if let Some(tally) = version.chosen.borrow_mut().get_mut(ended.chosen as usize) {
            tally.count(ended.outcome, duration);
        }
        if ended.outcome != Outcome::Cancelled {
            let mut times = version.times.borrow_mut();
            if times.len() < MOST_TIMES {
                times.push(u32::try_from(milliseconds).unwrap_or(u32::MAX));
            }
        }
        self.changed();
        if ended.outcome == Outcome::Error {
            self.changes.errors.set(self.changes.errors.get().wrapping_add(1));
        }
        if ended.is_sampled || (ended.outcome != Outcome::Ok && ended.is_compared && self.bad.get() > 0) {
            let client = host.property("source\0address").map_or(0, |address| clients::client(&address));
            self.look_at(client, version, ended, duration);
        }
    }

    /// Takes a request into the sample, and into the log of single requests.
    fn look_at(&self, client: u32, version: &VersionCounters, ended: &Ended, duration: usize) {
        // A client whose request a rule took is none of those that are compared.
        if ended.is_sampled && client != 0 && ended.chosen != Chosen::Rule {
            self.sampled.set(true);
            self.clients.borrow_mut().insert(client, 0);
        }
        if !ended.is_compared {
            return;
        }
        let is_session = ended.chosen == Chosen::Session;
        let flags = if is_session { Event::SESSION } else { 0 } | if ended.is_sampled { Event::SAMPLED } else { 0 };
        let (user, outcome) = (ended.user.unwrap_or_default(), ended.outcome as u8);
        let event = Event(client, user, version.index as u16, outcome, flags, duration as u8);
        let mut log = self.log.borrow_mut();
        if !ended.is_sampled {
            // One client that fails again and again must not push out all others.
            let of_tick = usize::try_from(BAD - self.bad.get().min(BAD)).unwrap_or_default();
            let is_same = |known: &Event| (known.0, known.1, known.2, known.3) == (event.0, event.1, event.2, event.3);
            if log.iter().rev().take(of_tick + SAMPLE as usize).any(is_same) {
                return;
            }
            self.bad.set(self.bad.get().saturating_sub(1));
        }
        log.push(event);
        if log.len() > MAX_LOGGED {
            log.remove(0);
        }
        self.logged.set(self.logged.get().saturating_add(1));
    }

    fn tally(&self, now: u64) -> ServiceTally {
        let known = self.known.borrow();
        let (logged, log) = (self.logged.get(), self.log.borrow().clone());
        let place = |index: u16| known.iter().position(|(version, _)| version.index == usize::from(index));
        let log: Option<Vec<Event>> = log
            .into_iter()
            .map(|Event(client, user, index, outcome, flags, duration)| {
                Some(Event(client, user, u16::try_from(place(index)?).ok()?, outcome, flags, duration))
            })
            .collect();
        let mut clients = self.clients.borrow_mut();
        clients.values_mut().filter(|seen| **seen == 0).for_each(|seen| *seen = now);
        ServiceTally {
            name: self.name.clone(),
            unrouted: self.unrouted.get(),
            samples: self.samples.get(),
            clients: clients.keys().take(MAX_CLIENTS).copied().collect(),
            logged,
            log: log.unwrap_or_default(),
            versions: known.iter().map(|(version, _)| version.tally()).collect(),
        }
    }

    fn tick(&self, host: &impl Host, now: u64) {
        self.sample.set(SAMPLE);
        self.bad.set(BAD);
        if self.sampled.replace(false) {
            self.samples.set(self.samples.get().saturating_add(1));
        }
        self.metrics.flush(host, self.unrouted.get());
        self.forget_clients(now);
        for (version, left) in self.known.borrow_mut().iter_mut() {
            version.flush(host);
            match (Rc::strong_count(version), *left) {
                (1, 0) => {
                    *left = now;
                    self.routes.borrow_mut().forget(version.index);
                }
                (1, _) => {}
                _ => *left = 0,
            }
        }
        self.forget_versions(now);
    }

    /// Forgets the clients of long ago.
    fn forget_clients(&self, now: u64) {
        let mut clients = self.clients.borrow_mut();
        clients.retain(|_, seen| *seen == 0 || now.saturating_sub(*seen) < CLIENT_NANOS);
        while clients.len() > MOST_CLIENTS {
            clients.pop_last();
        }
    }

    /// Forgets the versions that left the policies long ago and have nothing in flight.
    fn forget_versions(&self, now: u64) {
        let gone_before = now.saturating_sub(GONE_AFTER.as_nanos() as u64);
        let mut gone = BTreeSet::new();
        self.known.borrow_mut().retain(|(version, left)| {
            let is_gone = *left > 0 && *left < gone_before && version.in_flight.get() == 0;
            if is_gone {
                gone.insert(version.index);
            }
            !is_gone
        });
        if !gone.is_empty() {
            self.log.borrow_mut().retain(|event| !gone.contains(&usize::from(event.2)));
            self.changed();
        }
    }
}

impl VersionCounters {
    fn new(host: &impl Host, service: &str, name: &str, index: usize) -> Self {
        Self {
            name: name.to_owned(),
            index,
            in_flight: Cell::new(0),
            misrouted: Cell::new(0),
            chosen: RefCell::default(),
            times: RefCell::default(),
            metrics: VersionMetrics::new(host, service, name),
        }
    }

    fn tally(&self) -> VersionTally {
        let chosen = self.chosen.borrow();
        let used = chosen.iter().enumerate().filter(|(_, tally)| **tally != ChoiceTally::default());
        VersionTally {
            name: self.name.clone(),
            in_flight: self.in_flight.get(),
            misrouted: self.misrouted.get(),
            chosen: used.map(|(i, tally)| (i as u8, tally.clone())).collect(),
        }
    }

    fn flush(&self, host: &impl Host) {
        let times = std::mem::take(&mut *self.times.borrow_mut());
        self.metrics.flush_misrouted(host, self.misrouted.get());
        if times.is_empty() && self.chosen.borrow().iter().all(|tally| tally.started == 0) {
            return;
        }
        let mut sum = ChoiceTally::default();
        for tally in self.chosen.borrow().iter() {
            sum.ended.iter_mut().zip(tally.ended).for_each(|(sum, more)| *sum = sum.saturating_add(more));
            sum.durations.resize(sum.durations.len().max(tally.durations.len()), 0);
            sum.durations.iter_mut().zip(&tally.durations).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
        }
        self.metrics.flush(host, &sum, times);
    }
}
