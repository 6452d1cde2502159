//! The made-up world and its clock: ten times a second the controller looks at everything, proxies serve what comes and
//! report.

use super::proxy::{Condition, Proxy, TICK};
use super::random::{how_long, how_many};
use super::record::{Event, Judged, Run, Sample, ServiceTotals, Transition, VersionSample, VersionTotals};
use super::scenario::{Action, Behaviour, Planned, Scenario};
use crate::clock::Millis;
use crate::readiness::{EndpointState, Readiness};
use crate::reconciler::state::PersistedState;
use crate::reconciler::{CountState, Reconciler};
use crate::rollout::{Command, Phase, percent};
use crate::status::ServiceStatus;
use fastrand::Rng;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use tideshift_core::shift::{Endpoint, ShiftService, TrafficShift};

/// When the world begins, in milliseconds since 1970: any time will do, as long as it is always the same.
const BEGINNING: Millis = 1_700_000_000_000;
/// No more regular samples than about this.
const MOST_SAMPLES: u64 = 1_200;

/// Plays a scenario through. The same arguments give the same run. With `samples` it records how things stood all the
/// time; without, it ends as soon as nothing can change how the rollout ended.
pub fn run(shift: &TrafficShift, scenario: &Scenario, seed: u64, samples: bool) -> Run {
    let mut world = World::new(shift, scenario, seed, samples);
    for tick in 0..(scenario.duration / TICK) as usize {
        world.tick(tick);
        if !samples && world.is_over() {
            break;
        }
    }
    world.finish()
}

struct World<'s> {
    scenario: &'s Scenario,
    /// With as many endpoints as the scenario needs.
    shift: TrafficShift,
    seed: u64,
    random: Rng,
    at: Millis,
    reconciler: Reconciler,
    /// When it is back, if it is away.
    back_at: Option<Millis>,
    kept_counts: CountState,
    targeted: bool,
    /// Of each service, of each version in the shift's order.
    versions: Vec<Vec<Version<'s>>>,
    proxies: Vec<Proxy>,
    events: std::iter::Peekable<std::slice::Iter<'s, Planned>>,
    record: Record,
}

/// One version of one service.
struct Version<'s> {
    behaviour: &'s Behaviour,
    endpoints: Vec<Endpoint>,
    ready: u32,
    random: Rng,
    /// From when to when the present or next clump lasts.
    clump: (Millis, Millis),
}

#[derive(Default)]
struct Record {
    /// From one regular sample to the next; 0: none are wanted.
    every: Millis,
    samples: Vec<Sample>,
    transitions: Vec<Transition>,
    events: Vec<Event>,
    phase: Option<Phase>,
    started: Option<Millis>,
    ended: Option<Millis>,
    /// What had been counted when the last rollout began, and what until it was over.
    before: Judged,
    judged: Option<Judged>,
    /// Whether something has changed since the last sample.
    changed: bool,
    was_judged: bool,
}

fn seconds(at: Millis) -> f64 {
    at as f64 / 1e3
}

impl<'s> World<'s> {
    fn new(shift: &TrafficShift, scenario: &'s Scenario, seed: u64, samples: bool) -> Self {
        static WELL: std::sync::LazyLock<Behaviour> = std::sync::LazyLock::new(Behaviour::default);
        let mut random = Rng::with_seed(seed);
        let mut shift = shift.clone();
        let mut versions = Vec::new();
        for service in &mut shift.services {
            let load = scenario.load_of(&service.name);
            let most_listed = service.versions.iter().map(|version| version.endpoints.len()).max().unwrap_or(0) as u32;
            let mut of_service = Vec::new();
            for version in &mut service.versions {
                let behaviour = load.versions.get(&version.name).unwrap_or(&WELL);
                if version.endpoints.is_empty() {
                    let most = behaviour.endpoints_ready.as_ref().and_then(|ready| ready.values().max().copied());
                    let endpoint = |n| Endpoint { host: format!("{}-{n}", version.name), port: 80 };
                    version.endpoints = (0..most.unwrap_or(most_listed.max(1))).map(endpoint).collect();
                }
                let mut version = Version {
                    behaviour,
                    endpoints: version.endpoints.clone(),
                    ready: u32::MAX,
                    random: Rng::with_seed(random.u64(..)),
                    clump: (0, 0),
                };
                version.plan_clump(0);
                of_service.push(version);
            }
            versions.push(of_service);
        }
        // Their reports do not all come at the same time.
        let proxy = |i: usize| {
            let first = (1_000 * (i as u64 + 1) / scenario.proxies as u64).next_multiple_of(TICK);
            Proxy::new(format!("proxy-{}", i + 1), random.u64(..), BEGINNING + first)
        };
        let proxies = (0..scenario.proxies).map(proxy).collect();
        let kept = PersistedState {
            epoch: "simulated".to_owned(),
            session_secret: "simulated".to_owned(),
            ..PersistedState::default()
        };
        let every = (scenario.duration / MOST_SAMPLES).max(1).next_multiple_of(1_000);
        Self {
            scenario,
            seed,
            random,
            at: 0,
            reconciler: Reconciler::new(Vec::new(), kept, CountState::default()),
            back_at: None,
            kept_counts: CountState::default(),
            targeted: false,
            versions,
            proxies,
            events: scenario.events.iter().peekable(),
            record: Record { every: if samples { every } else { 0 }, ..Record::default() },
            shift,
        }
    }

    fn now(&self) -> Millis {
        BEGINNING + self.at
    }

    fn tick(&mut self, tick: usize) {
        self.at = tick as Millis * TICK;
        self.look_at_readiness();
        self.look_at_target();
        self.return_of_the_controller();
        while let Some(event) = self.events.next_if(|event| event.at <= self.at) {
            self.happen(&event.action);
        }
        self.decide();
        self.sample();
        self.serve(tick);
        let now = self.now() + TICK;
        for i in 0..self.proxies.len() {
            for (service, veto) in self.proxies[i].end_tick(tick, now) {
                let of = if self.shift.services.len() > 1 { format!(" of {service}") } else { String::new() };
                self.tell(format!(
                    "the guard of proxy-{} takes {}{of} out of service: {} of its {} requests failed, of the others' {} of {}",
                    i + 1,
                    veto.version,
                    veto.errors,
                    veto.requests,
                    veto.others_errors,
                    veto.others_requests
                ));
                self.record.changed = true;
            }
            let report = self.proxies[i].report(&self.reconciler.kept().epoch, now);
            if let (Some(report), None) = (report, self.back_at) {
                self.reconciler.reported(&report, now);
            }
        }
    }

    /// What the probes see.
    fn look_at_readiness(&mut self) {
        let mut changed = false;
        for version in self.versions.iter_mut().flatten() {
            let all = version.endpoints.len() as u32;
            let ready = version.behaviour.endpoints_ready.as_ref().map_or(all, |ready| (*ready.at(self.at)).min(all));
            changed |= ready != version.ready;
            version.ready = ready;
        }
        if changed {
            self.reconciler.set_readiness(self.readiness());
            self.record.changed = true;
        }
    }

    fn readiness(&self) -> Arc<Readiness> {
        let state = |version: &Version<'_>| {
            let states = version.endpoints.iter().enumerate().map(|(i, endpoint)| {
                let ready = (i as u32) < version.ready;
                EndpointState { endpoint: endpoint.clone(), ready, known: true, warming: false, reason: None }
            });
            states.collect::<Vec<_>>()
        };
        let of = |(service, versions): (&ShiftService, &Vec<Version<'_>>)| {
            let names = service.versions.iter().map(|version| version.name.clone());
            (service.name.clone(), names.zip(versions.iter().map(state)).collect::<BTreeMap<_, _>>())
        };
        let services = self.shift.services.iter().zip(&self.versions).map(of).collect();
        Arc::new(Readiness { services, ..Readiness::default() })
    }

    /// The document as it is now.
    fn documents(&self) -> Vec<(TrafficShift, Value)> {
        let target = self.shift.target.clone().filter(|_| self.targeted);
        vec![(TrafficShift { target, ..self.shift.clone() }, Value::Null)]
    }

    fn look_at_target(&mut self) {
        if self.at == 0 || (!self.targeted && self.at >= self.scenario.target_at) {
            self.targeted = self.at >= self.scenario.target_at;
            self.reconciler.set_documents(self.documents());
        }
    }

    fn return_of_the_controller(&mut self) {
        if self.back_at.take_if(|back| *back <= self.at).is_some() {
            self.reconciler =
                Reconciler::new(self.documents(), self.reconciler.kept().clone(), self.kept_counts.clone());
            self.reconciler.set_readiness(self.readiness());
            self.tell("the controller is back".to_owned());
            self.record.changed = true;
        }
    }

    fn happen(&mut self, action: &Action) {
        match (action, self.back_at) {
            (Action::ControllerDown(long), _) => {
                self.back_at = Some(self.at + long);
                if let Some(counts) = self.reconciler.changed_counts() {
                    self.kept_counts = counts;
                }
                self.tell(format!("the controller goes away for {} s", long / 1_000));
                self.record.changed = true;
            }
            (Action::Command(command), Some(_)) => {
                self.tell(format!("{}: refused: the controller is away", words(command)));
            }
            (Action::Command(command), None) => {
                // It knows nothing of a document that it has never looked at.
                self.decide();
                let done = self.reconciler.command(&self.shift.name, command, self.now());
                let refused = done.err().map(|why| format!(": refused: {why}")).unwrap_or_default();
                self.tell(format!("{}{refused}", words(command)));
            }
        }
    }

    fn tell(&mut self, message: String) {
        self.record.events.push(Event { at_seconds: seconds(self.at), message });
    }

    /// The controller looks at everything; proxies get what it decides.
    fn decide(&mut self) {
        if self.back_at.is_some() {
            return;
        }
        for (question, _) in self.reconciler.questions() {
            self.reconciler.gate_answered(&question, true, "");
        }
        let outcome = self.reconciler.evaluate(self.now());
        for (_, transition) in outcome.transitions {
            self.note(&transition);
        }
        if let Some(policy) = outcome.policy {
            let policy = Arc::new(policy);
            self.proxies.iter_mut().for_each(|proxy| proxy.take(policy.clone()));
            self.record.changed = true;
        }
        let over = match self.record.phase {
            Some(Phase::Succeeded) => true,
            Some(Phase::Failed) => self.in_flight_of_target() == 0,
            _ => false,
        };
        if over && self.record.judged.is_none() {
            self.record.judged = Some(self.since_the_start());
        }
    }

    fn note(&mut self, transition: &crate::rollout::Transition) {
        let at = transition.time.saturating_sub(BEGINNING);
        let was_under_way = self.record.phase.is_some_and(Phase::is_under_way);
        if transition.phase.is_under_way() {
            let is_another = self.record.transitions.last().is_none_or(|last| last.rollout != transition.rollout);
            if is_another {
                self.record.started = Some(at);
                self.record.before = self.counted();
            }
            (self.record.ended, self.record.judged) = (None, None);
        } else if was_under_way {
            self.record.ended = Some(at);
        }
        self.record.phase = Some(transition.phase);
        self.record.changed = true;
        self.record.was_judged |= was_under_way;
        let status = self.status();
        let step = transition.step.and_then(|step| status.as_ref()?.steps.get(step).map(|step| step.weight));
        self.record.transitions.push(Transition {
            at_seconds: seconds(at),
            rollout: transition.rollout,
            phase: transition.phase,
            reason: transition.reason,
            message: transition.message.clone(),
            step: transition.step.map(|step| step + 1),
            weight: step,
        });
    }

    fn status(&self) -> Option<ServiceStatus> {
        self.reconciler.rollout_status(&self.shift.name, self.now())?.into_iter().next()
    }

    fn serve(&mut self, tick: usize) {
        let (at, proxies) = (self.at, self.proxies.len() as f64);
        for (i, (service, versions)) in self.shift.services.iter().zip(&mut self.versions).enumerate() {
            let conditions: Vec<_> = versions.iter_mut().map(|version| version.condition(at)).collect();
            let rate = *self.scenario.load_of(&service.name).requests_per_second.at(at);
            for proxy in &mut self.proxies {
                let requests = how_many(&mut self.random, rate * seconds(TICK) / proxies);
                proxy.serve(tick, i, requests, &conditions);
            }
        }
    }

    /// Requests that ended, those that failed and those under way, of a version.
    fn totals(&self, service: usize, version: usize) -> (u64, u64, u64) {
        let counts = self.proxies.iter().map(|proxy| proxy.counts(service, version));
        counts.fold((0, 0, 0), |(requests, errors, in_flight), (ended, more)| {
            (requests + ended.total(), errors + ended.error, in_flight + more)
        })
    }

    fn target(&self) -> Option<String> {
        self.reconciler.kept().rollouts.get(&self.shift.name)?.target.clone()
    }

    /// The places of the target's versions: of services and of versions.
    fn places(&self) -> impl Iterator<Item = (usize, usize, bool)> {
        let target = self.target();
        let services = self.shift.services.iter().enumerate();
        services.flat_map(move |(i, service)| {
            let target = target.clone();
            let versions = service.versions.iter().enumerate();
            versions.map(move |(j, version)| (i, j, target.as_ref() == Some(&version.name)))
        })
    }

    /// Everything that was counted so far.
    fn counted(&self) -> Judged {
        self.places().fold(Judged::default(), |sum, (service, version, is_target)| {
            let (requests, errors, _) = self.totals(service, version);
            Judged {
                requests: sum.requests + requests,
                failed: sum.failed + errors,
                failed_of_target: sum.failed_of_target + if is_target { errors } else { 0 },
            }
        })
    }

    fn since_the_start(&self) -> Judged {
        let (now, before) = (self.counted(), self.record.before);
        Judged {
            requests: now.requests - before.requests,
            failed: now.failed - before.failed,
            // (A target of the past may have been another one.)
            failed_of_target: now.failed_of_target.saturating_sub(before.failed_of_target),
        }
    }

    fn in_flight_of_target(&self) -> u64 {
        let of_target = self.places().filter(|(_, _, is_target)| *is_target);
        of_target.map(|(service, version, _)| self.totals(service, version).2).sum()
    }

    /// Whether the rollout is over and nothing can start another.
    fn is_over(&mut self) -> bool {
        self.record.judged.is_some() && self.events.peek().is_none() && self.targeted
    }

    /// How the versions of a service stand.
    fn versions(&self, service: usize) -> Vec<VersionSample> {
        let mut shares = vec![0.0; self.versions[service].len()];
        for proxy in &self.proxies {
            let of_proxy = proxy.shares(service);
            shares.iter_mut().zip(of_proxy).for_each(|(sum, share)| *sum += share / self.proxies.len() as f64);
        }
        let versions = self.versions[service].iter().zip(shares).enumerate();
        let sample = |(version, (of, share)): (usize, (&Version<'_>, f64))| {
            let (requests, errors, _) = self.totals(service, version);
            VersionSample { weight: percent(share), endpoints_ready: of.ready, requests, errors }
        };
        versions.map(sample).collect()
    }

    fn sample(&mut self) {
        let regular = self.record.every > 0 && self.at.is_multiple_of(self.record.every);
        let changed = std::mem::take(&mut self.record.changed) && self.record.every > 0;
        if !regular && !changed {
            return;
        }
        let is_judged = self.record.phase.is_some_and(Phase::is_under_way);
        let shows = std::mem::take(&mut self.record.was_judged) || is_judged;
        let verdict = self.status().and_then(|status| status.verdict).filter(|_| shows && self.back_at.is_none());
        let services = (0..self.shift.services.len()).map(|service| self.versions(service));
        let sample = Sample {
            at_seconds: seconds(self.at),
            regular,
            controller: self.back_at.is_none(),
            services: services.collect(),
            evidence: verdict.as_ref().map(|verdict| verdict.evidence),
            bound: verdict.as_ref().map(|verdict| verdict.bound),
            pass_evidence: verdict.as_ref().map(|verdict| verdict.pass_evidence),
            pass_bound: verdict.as_ref().map(|verdict| verdict.pass_bound),
            // None while the bound of slow requests is unknown.
            latency_evidence: verdict
                .as_ref()
                .and_then(|verdict| Some(verdict.latency.as_ref()?.evidence))
                .filter(|e| *e > 0.0),
        };
        self.record.samples.push(sample);
    }

    fn finish(mut self) -> Run {
        self.at += TICK;
        self.return_of_the_controller();
        self.decide();
        if self.record.every > 0 {
            self.record.changed = true;
            self.sample();
        }
        let judged = self.record.judged.unwrap_or_else(|| self.since_the_start());
        let rollout = self.reconciler.kept().rollouts.get(&self.shift.name).cloned();
        let rollout = rollout.unwrap_or_else(|| crate::rollout::Rollout::new(&self.shift, self.now()));
        let services = self.shift.services.iter().enumerate().map(|(i, service)| {
            let versions = service.versions.iter().zip(&self.versions[i]).zip(self.versions(i));
            ServiceTotals {
                name: service.name.clone(),
                unrouted: self.proxies.iter().map(|proxy| proxy.unrouted(i)).sum(),
                versions: versions
                    .map(|((version, of), sample)| VersionTotals {
                        name: version.name.clone(),
                        requests: sample.requests,
                        errors: sample.errors,
                        endpoints_ready: of.ready,
                        endpoints: of.endpoints.len() as u32,
                        weight: sample.weight,
                    })
                    .collect(),
            }
        });
        Run {
            rollout: self.shift.name.clone(),
            seed: self.seed,
            duration_seconds: seconds(self.at),
            phase: rollout.phase,
            reason: rollout.reason,
            message: rollout.message,
            stable: rollout.stable,
            target: rollout.target,
            started_at_seconds: self.record.started.map(seconds),
            ended_at_seconds: self.record.ended.map(seconds),
            verdict: self.status().and_then(|status| status.verdict),
            judged,
            services: services.collect(),
            transitions: self.record.transitions,
            events: self.record.events,
            samples: self.record.samples,
            sample_seconds: seconds(self.record.every),
            load_changes: self
                .shift
                .services
                .iter()
                .any(|service| self.scenario.load_of(&service.name).requests_per_second.values().count() > 1),
        }
    }
}

impl Version<'_> {
    fn plan_clump(&mut self, from: Millis) {
        let Some(clumps) = self.behaviour.clumps else {
            self.clump = (Millis::MAX, Millis::MAX);
            return;
        };
        let start = from + how_long(&mut self.random, clumps.every as f64) as Millis;
        self.clump = (start, start + clumps.long);
    }

    /// How it fares in the tick that begins now.
    fn condition(&mut self, at: Millis) -> Condition<'_> {
        if at >= self.clump.1 {
            self.plan_clump(at);
        }
        let usual = *self.behaviour.error_rate.at(at);
        let clump = self.behaviour.clumps.filter(|_| at >= self.clump.0);
        let error_rate = match (self.ready, clump) {
            // Envoy's response if no endpoint is healthy.
            (0, _) => 1.0,
            (_, Some(clumps)) => usual.max(clumps.error_rate),
            (_, None) => usual,
        };
        Condition { error_rate, latency: self.behaviour.latency.at(at) }
    }
}

/// A command, as the command line has it.
fn words(command: &Command) -> String {
    match command {
        Command::Promote { full: false, .. } => "promote".to_owned(),
        Command::Promote { full: true, .. } => "promote --full".to_owned(),
        Command::Pause => "pause".to_owned(),
        Command::Resume => "resume".to_owned(),
        Command::Abort => "abort".to_owned(),
        Command::Rollback { to, .. } => format!("rollback --to {to}"),
        Command::SetTarget { target } => format!("set-target {target}"),
        Command::SetWeight { weight, .. } => format!("set-weight {weight}"),
    }
}
