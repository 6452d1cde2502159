//! What this VM has counted. Requests count into plain cells; at each tick, and at once with a first error, the totals are
//! published for the VM that leads ([`crate::totals`]), and Envoy's stats, which are for Prometheus only, catch up.
//!
//! Names of stats carry labels in the form that Istio and `tideshift render envoy` extract: `version=.=v1;.;`.

use crate::host::{self, Stat, StatKind};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use tideshift_core::clients;
use tideshift_core::outcome::Outcome;
use tideshift_core::plan::{Chosen, Plan, ServicePlan};
use tideshift_core::report::{DURATION_BOUNDS, Event, MAX_CLIENTS, duration_bucket};
use tideshift_core::routes::Routes;
use tideshift_core::tallies::{ChoiceTally, DURATIONS, MAX_LOGGED, ServiceTally, Tallies, VersionTally};

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
    unrouted_stat: FlushedStat,
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
    /// The milliseconds of requests that Envoy's histogram has yet to take.
    times: RefCell<Vec<u32>>,
    stats: VersionStats,
}

struct VersionStats {
    outcomes: [FlushedStat; Outcome::ALL.len()],
    misrouted: FlushedStat,
    in_flight: Cell<Stat>,
    milliseconds: Cell<Stat>,
    labels: String,
    durations: [FlushedStat; DURATIONS],
}

/// A counter of Envoy's, and what it has been told.
#[derive(Default)]
struct FlushedStat {
    /// `None`: not defined yet, or to be defined again.
    stat: Cell<Option<Stat>>,
    told: Cell<u64>,
}

impl FlushedStat {
    fn define(&self, name: &str) {
        self.stat.set(Some(Stat::define(StatKind::Counter, name)));
    }

    fn flush(&self, total: u64, name: impl FnOnce() -> String) {
        let more = total.saturating_sub(self.told.replace(total));
        if more > 0 {
            if self.stat.get().is_none() {
                self.define(&name());
            }
            self.stat.get().unwrap_or_default().add(i64::try_from(more).unwrap_or(i64::MAX));
        }
    }
}

/// How one request of a version ended.
pub struct Ended {
    /// In which way its version was chosen.
    pub chosen: Chosen,
    /// Whether it says something about the version: see [`tideshift_core::plan::Decision::is_compared`].
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
    /// Finds Envoy's stats again, should it not have told the truth about one.
    pub fn define_again(&self) {
        self.services.values().for_each(|service| service.define());
    }

    /// The counters of a plan's services, in its order.
    pub fn cover(&mut self, plan: &Plan) -> Vec<PlanCounters> {
        plan.services.iter().map(|service| self.cover_service(service)).collect()
    }

    fn cover_service(&mut self, service: &ServicePlan) -> PlanCounters {
        let changes = self.changes.clone();
        let known = self.services.entry(service.name.clone());
        let counters = known.or_insert_with(|| Rc::new(ServiceCounters::new(&service.name, changes))).clone();
        let mut versions = Vec::with_capacity(service.versions.len());
        for (i, name) in service.versions.iter().enumerate() {
            let mut known = counters.known.borrow_mut();
            let found = known.iter().find(|(version, _)| version.name == *name).map(|(version, _)| version.clone());
            let version = found.unwrap_or_else(|| {
                let index = known.iter().map(|(version, _)| version.index + 1).max().unwrap_or_default();
                let version = Rc::new(VersionCounters::new(&service.name, name, index));
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

    /// A tick: Envoy's stats take in what was counted, samples begin again, and what is long gone is forgotten.
    pub fn tick(&mut self, now: u64) {
        for service in self.services.values() {
            service.tick(now);
        }
        self.services.retain(|_, service| !service.known.borrow().is_empty());
    }

    /// Tells Envoy's gauges what all VMs together have in flight.
    pub fn show_in_flight(&self, totals: &Tallies) {
        for service in self.services.values() {
            for (version, _) in service.known.borrow().iter() {
                let of = totals.service(&service.name).and_then(|of| of.version(&version.name));
                version.stats.in_flight.get().record(of.map_or(0, |of| of.in_flight));
            }
        }
    }
}

impl ServiceCounters {
    fn new(name: &str, changes: Rc<Changes>) -> Self {
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
            unrouted_stat: FlushedStat::default(),
            changes,
        };
        new.define();
        new
    }

    fn define(&self) {
        self.unrouted_stat.define(&format!("service=.={};.;tideshift_unrouted_requests_total", self.name));
        self.known.borrow().iter().for_each(|(version, _)| version.stats.define());
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
    pub fn ended(&self, version: &VersionCounters, ended: &Ended) {
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
            self.look_at(version, ended, duration);
        }
    }

    /// Tells apart whose request it was.
    fn look_at(&self, version: &VersionCounters, ended: &Ended, duration: usize) {
        let client = host::property("source\0address").map_or(0, |address| clients::client(&address));
        // Whom rules take is no client of those that are compared.
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

    fn tick(&self, now: u64) {
        self.sample.set(SAMPLE);
        self.bad.set(BAD);
        if self.sampled.replace(false) {
            self.samples.set(self.samples.get().saturating_add(1));
        }
        self.unrouted_stat.flush(self.unrouted.get(), String::new);
        {
            let mut clients = self.clients.borrow_mut();
            clients.retain(|_, seen| *seen == 0 || now.saturating_sub(*seen) < CLIENT_NANOS);
            while clients.len() > MOST_CLIENTS {
                clients.pop_last();
            }
        }
        let mut known = self.known.borrow_mut();
        for (version, left) in known.iter_mut() {
            version.flush();
            match (Rc::strong_count(version), *left) {
                (1, 0) => {
                    *left = now;
                    self.routes.borrow_mut().forget(version.index);
                }
                (1, _) => {}
                _ => *left = 0,
            }
        }
        let gone_before = now.saturating_sub(GONE_AFTER.as_nanos() as u64);
        let mut gone = BTreeSet::new();
        known.retain(|(version, left)| {
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
    fn new(service: &str, name: &str, index: usize) -> Self {
        Self {
            name: name.to_owned(),
            index,
            in_flight: Cell::new(0),
            misrouted: Cell::new(0),
            chosen: RefCell::default(),
            times: RefCell::default(),
            stats: VersionStats::new(service, name),
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

    fn flush(&self) {
        let times = std::mem::take(&mut *self.times.borrow_mut());
        let misrouted = self.misrouted.get();
        let name = || format!("{}tideshift_misrouted_requests_total", self.stats.labels);
        self.stats.misrouted.flush(misrouted, name);
        if times.is_empty() && self.chosen.borrow().iter().all(|tally| tally.started == 0) {
            return;
        }
        let mut sum = ChoiceTally::default();
        for tally in self.chosen.borrow().iter() {
            sum.ended.iter_mut().zip(tally.ended).for_each(|(sum, more)| *sum = sum.saturating_add(more));
            sum.durations.resize(sum.durations.len().max(tally.durations.len()), 0);
            sum.durations.iter_mut().zip(&tally.durations).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
        }
        self.stats.flush(&sum);
        times.into_iter().for_each(|time| self.stats.milliseconds.get().record(u64::from(time)));
    }
}

impl VersionStats {
    fn new(service: &str, version: &str) -> Self {
        let new = Self {
            outcomes: Default::default(),
            misrouted: FlushedStat::default(),
            in_flight: Cell::default(),
            milliseconds: Cell::default(),
            labels: format!("service=.={service};.;version=.={version};.;"),
            durations: Default::default(),
        };
        new.define();
        new
    }

    /// Defines the stats, or finds them again; those that few versions need when they are needed.
    fn define(&self) {
        let labels = &self.labels;
        for (outcome, stat) in Outcome::ALL.iter().zip(&self.outcomes) {
            stat.define(&format!("{labels}outcome=.={};.;tideshift_requests_total", outcome.label()));
        }
        let define = |kind, name| Stat::define(kind, &format!("{labels}{name}"));
        self.in_flight.set(define(StatKind::Gauge, "tideshift_requests_in_flight"));
        self.milliseconds.set(define(StatKind::Histogram, "tideshift_request_duration_milliseconds"));
        std::iter::once(&self.misrouted).chain(&self.durations).for_each(|stat| stat.stat.set(None));
    }

    fn flush(&self, sum: &ChoiceTally) {
        let unnamed = String::new;
        self.outcomes.iter().zip(sum.ended).for_each(|(stat, total)| stat.flush(total, unnamed));
        for (bucket, (stat, total)) in self.durations.iter().zip(&sum.durations).enumerate() {
            stat.flush(*total, || {
                let bound = DURATION_BOUNDS.get(bucket).map_or("+Inf".to_owned(), u64::to_string);
                format!("{}upto=.={bound};.;tideshift_requests_by_duration_total", self.labels)
            });
        }
    }
}
