//! A made-up proxy: chooses by the core's plan and sequence, has the core's guard, and reports as the filter does. What
//! becomes of a request is made up.

use super::random::Latency;
use crate::clock::Millis;
use fastrand::Rng;
use std::sync::Arc;
use tideshift_core::choice::plan::{Plan, Turns};
use tideshift_core::counts::{Counts, DURATION_BOUNDS};
use tideshift_core::guard::{Guard, Observed, Veto};
use tideshift_core::protocol::policy::{Policy, Service};
use tideshift_core::protocol::report::{Report, ServiceReport, Tally, VersionReport};

/// How often everything is looked at, as in the filter and in the controller.
pub(super) const TICK: Millis = 100;
/// From one report to the next, and if there is something that should not wait: as the filter has it.
const REPORT_PERIOD: Millis = 1_000;
const SHORTEST_REPORT_PERIOD: Millis = 200;
/// So many ticks later even the slowest request has ended.
const LONGEST: usize = 601;
const BUCKETS: usize = DURATION_BOUNDS.len() + 1;
/// A request that no rule is for, unless one is for all.
const REQUEST: [(&str, &str); 3] = [(":authority", "simulated"), (":method", "GET"), (":path", "/")];

/// One proxy.
pub(super) struct Proxy {
    id: String,
    random: Rng,
    policy: Arc<Policy>,
    services: Vec<Serving>,
    report_at: Millis,
    news_at: Millis,
    /// What was last reported of what should not wait.
    reported: Pulse,
    /// How many reports there were.
    reports: u64,
}

/// What the controller should hear of at once: the filter's `Pulse`, and the policy that it has.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
struct Pulse {
    errors: u64,
    draining: u64,
    revision: u64,
}

/// What one proxy does for one service.
struct Serving {
    name: String,
    /// Of this service alone, and for every host.
    plan: Plan,
    turns: Turns,
    guard: Guard,
    versions: Vec<Counter>,
    unrouted: u64,
}

/// One version's requests.
struct Counter {
    name: String,
    started: u64,
    ended: Counts,
    durations: [u64; BUCKETS],
    in_flight: u64,
    /// What ends in each of the next ticks, in a ring.
    ending: Vec<Ending>,
}

#[derive(Default, Clone, Copy)]
struct Ending {
    requests: u32,
    errors: u32,
    durations: [u32; BUCKETS],
}

/// How a version fares in one tick.
pub(super) struct Condition<'s> {
    /// The probability that a request fails.
    pub(super) error_rate: f64,
    /// How long requests take.
    pub(super) latency: &'s Latency,
}

impl Proxy {
    /// One that has no policy yet. Its first report is due at `report_at`.
    pub(super) fn new(id: String, seed: u64, report_at: Millis) -> Self {
        Self {
            id,
            random: Rng::with_seed(seed),
            policy: Arc::default(),
            services: Vec::new(),
            report_at,
            news_at: 0,
            reported: Pulse::default(),
            reports: 0,
        }
    }

    /// A newer policy arrives.
    pub(super) fn take(&mut self, policy: Arc<Policy>) {
        for service in &policy.services {
            if !self.services.iter().any(|serving| serving.name == service.name) {
                self.services.push(Serving::new(service));
            }
        }
        self.policy = policy;
        self.compile();
    }

    fn compile(&mut self) {
        for (serving, service) in self.services.iter_mut().zip(&self.policy.services) {
            let random = &mut self.random;
            serving.compile(service, || random.u64(..));
        }
    }

    /// Requests arrive during a tick, for the service with this index.
    pub(super) fn serve(&mut self, tick: usize, service: usize, requests: u64, conditions: &[Condition<'_>]) {
        let Some(serving) = self.services.get_mut(service) else { return };
        let split = serving.plan.route(&REQUEST[..]).map(|route| route.split);
        for _ in 0..requests {
            let Some((version, _)) = split.and_then(|split| split.next(&mut serving.turns)) else {
                serving.unrouted += 1;
                continue;
            };
            let (Some(counter), Some(condition)) = (serving.versions.get_mut(version), conditions.get(version)) else {
                continue;
            };
            let fails = self.random.f64() < condition.error_rate;
            let random = self.random.u64(..);
            let (millis, bucket) = condition.latency.one(random as u32);
            // Somewhere in the tick it came, so much later it ends.
            let came = ((random >> 32) * TICK) >> 32;
            let end = (tick + ((came + u64::from(millis)) / TICK) as usize) % LONGEST;
            counter.started += 1;
            counter.in_flight += 1;
            let Some(ending) = counter.ending.get_mut(end) else { continue };
            ending.requests += 1;
            ending.errors += u32::from(fails);
            ending.durations[usize::from(bucket)] += 1;
        }
    }

    /// A tick ends: requests end with it, and the guards look at them. Returns the vetoes that are new, with their
    /// services; `now` is milliseconds since 1970.
    pub(super) fn end_tick(&mut self, tick: usize, now: Millis) -> Vec<(String, Veto)> {
        let mut news = Vec::new();
        let mut changed = false;
        for (serving, service) in self.services.iter_mut().zip(&self.policy.services) {
            serving.versions.iter_mut().for_each(|counter| counter.end_tick(tick));
            let before: Vec<String> = serving.guard.vetoes().iter().map(|veto| veto.version.clone()).collect();
            if serving.look(service, now) {
                changed = true;
                let vetoes = serving.guard.vetoes().iter().filter(|veto| !before.contains(&veto.version));
                news.extend(vetoes.map(|veto| (service.name.clone(), veto.clone())));
            }
        }
        if changed {
            self.report_at = 0;
            self.compile();
        }
        news
    }

    /// The report, if one is due.
    pub(super) fn report(&mut self, epoch: &str, now: Millis) -> Option<Report> {
        let pulse = self.pulse();
        if now < self.report_at && (pulse == self.reported || now < self.news_at) {
            return None;
        }
        self.report_at = now + REPORT_PERIOD;
        self.news_at = now + SHORTEST_REPORT_PERIOD;
        self.reported = pulse;
        self.reports += 1;
        Some(Report {
            proxy: self.id.clone(),
            start: "1".to_owned(),
            sequence: self.reports,
            epoch: epoch.to_owned(),
            revision: self.policy.revision,
            workers: 1,
            refused: None,
            format: Report::FORMAT,
            services: self.services.iter().map(Serving::report).collect(),
        })
    }

    fn pulse(&self) -> Pulse {
        let mut pulse = Pulse { revision: self.policy.revision, ..Pulse::default() };
        for (serving, service) in self.services.iter().zip(&self.policy.services) {
            let all: u64 = service.versions.iter().map(|version| u64::from(version.weight)).sum();
            for (counter, version) in serving.versions.iter().zip(&service.versions) {
                if version.weight == 0 {
                    pulse.draining += counter.in_flight;
                }
                if 2 * u64::from(version.weight) <= all {
                    pulse.errors += counter.ended.error;
                }
            }
        }
        pulse
    }

    /// Each version's share of a service's requests that no rule takes, 0 to 1.
    pub(super) fn shares(&self, service: usize) -> Vec<f64> {
        let Some(serving) = self.services.get(service) else { return Vec::new() };
        let mut shares = vec![0.0; serving.versions.len()];
        if let Some(route) = serving.plan.route(&REQUEST[..]) {
            for (version, weight) in route.split.weights() {
                shares[version] = f64::from(weight) / f64::from(route.split.total());
            }
        }
        shares
    }

    /// A version's requests that ended, and those under way.
    pub(super) fn counts(&self, service: usize, version: usize) -> (Counts, u64) {
        let counter = self.services.get(service).and_then(|serving| serving.versions.get(version));
        counter.map_or_else(Default::default, |counter| (counter.ended, counter.in_flight))
    }

    /// A service's requests that found nothing in service.
    pub(super) fn unrouted(&self, service: usize) -> u64 {
        self.services.get(service).map_or(0, |serving| serving.unrouted)
    }
}

impl Serving {
    fn new(service: &Service) -> Self {
        Self {
            name: service.name.clone(),
            plan: Plan::default(),
            turns: Turns::default(),
            guard: Guard::new(service.guard.clone()),
            versions: service.versions.iter().map(|version| Counter::new(version.name.clone())).collect(),
            unrouted: 0,
        }
    }

    fn compile(&mut self, service: &Service, seed: impl FnOnce() -> u64) {
        let everywhere = Service { hostnames: Vec::new(), ..service.clone() };
        let policy = Policy { services: vec![everywhere], ..Policy::default() };
        let is_vetoed = |_: &str, version: &str| self.guard.vetoes().iter().any(|veto| veto.version == version);
        let plan = Plan::new(&policy, is_vetoed);
        let before = (!self.plan.services.is_empty()).then_some((&self.plan, &self.turns));
        self.turns = Turns::for_plan(&plan, seed(), before);
        self.plan = plan;
    }

    /// Whether the guard's vetoes are others than before.
    fn look(&mut self, service: &Service, now: Millis) -> bool {
        let observed = service.versions.iter().zip(&self.versions).map(|(version, counter)| Observed {
            name: &version.name,
            weight: version.weight,
            serving: version.serving,
            stable: service.stable.as_ref() == Some(&version.name),
            ended: counter.ended,
            dealt: None,
            started: counter.started,
        });
        self.guard.observe(now * 1_000_000, &observed.collect::<Vec<_>>())
    }

    fn report(&self) -> ServiceReport {
        ServiceReport {
            name: self.name.clone(),
            unrouted: self.unrouted,
            versions: self.versions.iter().map(Counter::report).collect(),
            vetoes: self.guard.vetoes().to_vec(),
            // All requests are one caller's.
            clients: vec![1],
            events: None,
        }
    }
}

impl Counter {
    fn new(name: String) -> Self {
        let ending = vec![Ending::default(); LONGEST];
        Self { name, started: 0, ended: Counts::default(), durations: [0; BUCKETS], in_flight: 0, ending }
    }

    fn end_tick(&mut self, tick: usize) {
        let Some(slot) = self.ending.get_mut(tick % LONGEST) else { return };
        if slot.requests == 0 {
            return;
        }
        let Ending { requests, errors, durations } = std::mem::take(slot);
        self.in_flight -= u64::from(requests);
        self.ended += Counts { ok: u64::from(requests - errors), error: u64::from(errors), ..Counts::default() };
        self.durations.iter_mut().zip(durations).for_each(|(sum, more)| *sum += u64::from(more));
    }

    fn report(&self) -> VersionReport {
        let last = self.durations.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        let durations: Vec<u64> = self.durations.iter().take(last).copied().collect();
        let (started, ended) = (self.started, self.ended);
        VersionReport {
            name: self.name.clone(),
            ended,
            in_flight: self.in_flight,
            durations: durations.clone(),
            dealt: Tally { started, ended, durations, waited: Vec::new() },
            ..VersionReport::default()
        }
    }
}
