//! The rollout engine: a pure state machine. Its inputs are the document, ready endpoints, counts, commands and the
//! time; its outputs are the next state and each version's share. It does no I/O and has no clock, so tests and
//! simulations run through hours in milliseconds. One rollout may move several services; they advance and roll back
//! together.

mod command;
mod due;
mod gates;
mod history;
mod measured;
mod progress;

pub use allocation::{Allocation, percent};
pub use command::{Command, Refused};
pub use history::{Transition, remember};
pub use measured::Coverage;

use crate::clock::Millis;
use gates::Gates;
use spec_changes::{Listed, Planned, Said, desired, serves_alone};

use serde::{Deserialize, Serialize};
use shortfall::{Shortfall, ShortfallReason};
use std::collections::BTreeMap;
use tideshift_core::counts::Counts;
use tideshift_core::guard::Veto;
use tideshift_core::shift::{ShiftService, Step, TrafficShift};

/// The state of a rollout. Persisted across restarts of the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// The number of the rollout among those of its document, from 1; 0 before the first one.
    pub number: u64,
    /// The phase, in the terms of Flagger and Argo Rollouts.
    pub phase: Phase,
    /// Why it is in this phase, for programs.
    pub reason: Reason,
    /// Why it is in this phase, for people.
    pub message: String,
    /// When the phase began.
    pub since: Millis,
    /// How much of the time since then passed without a controller.
    #[serde(default)]
    unattended: i64,
    /// When the rollout began.
    pub started: Millis,
    /// The version that serves the traffic that the target does not; the target itself once it has succeeded.
    pub stable: String,
    /// The version that the rollout moves to or moved to, or that failed.
    pub target: Option<String>,
    /// The version that the traffic comes from; it shares the load while the stable version cannot carry it all.
    pub leaving: Option<String>,
    /// The index of the current step.
    pub step: usize,
    /// Whether the current step may begin; until then the target keeps the share that it had before.
    pub allowed: bool,
    /// Since when the target has had the step's share without interruption.
    pub held_since: Option<Millis>,
    /// Whether a user has paused it.
    pub paused: bool,
    /// The target's share in percent, if a user has set it.
    pub weight_by_hand: Option<u32>,
    /// Whether it goes back to a version that has served before: at once, and without analysis.
    pub is_return: bool,
    /// The last answer of the current step's gate, if the gate refused or did not answer.
    pub gate_says: Option<String>,
    /// By service: how many endpoints carry the whole load, where the document does not say.
    pub endpoints_for_full_load: BTreeMap<String, u32>,
    /// By service: the most endpoints of the stable version that have been ready since the rollout began.
    #[serde(default)]
    stable_had: BTreeMap<String, u32>,
    /// How often a target was rolled back. Session assignments from before the last rollback are invalid.
    #[serde(rename = "takenBack")]
    pub rollback_count: u64,
    /// How many steps have begun, over all rollouts of the document.
    #[serde(default)]
    steps_begun: u64,
    /// Whether a user has skipped the hold and the analysis of the current step.
    #[serde(rename = "waived")]
    skip_hold: bool,
    /// When it last made progress, moved forward by all later time in which it did not wait for endpoints.
    progressed: Millis,
    /// Since when it has not been waiting for endpoints; `None` while it waits.
    #[serde(default, rename = "content")]
    unblocked_since: Option<Millis>,
    /// Whether the current step has completed its hold once.
    #[serde(default)]
    held: bool,
    /// Since when the target is not measured; `None` while it is.
    #[serde(default)]
    unmeasured_since: Option<Millis>,
    /// The counts when the current step began.
    #[serde(default)]
    begun: measured::Stock,
    /// The most endpoints that the target has had in this step.
    most_ready: u32,
    warming: Warming,
    /// The limit of the target's share while it ramps up, in 1/100,000 like all persisted shares, and when it was set.
    level: u32,
    level_since: Millis,
    /// The share at which it was paused, which is the upper limit.
    #[serde(default)]
    frozen: Option<u32>,
    /// Whether it keeps that share because an edit of the steps would have increased it.
    #[serde(default)]
    edited: bool,
    /// The share that the target had when the current step began.
    #[serde(default)]
    before: Option<u32>,
    /// The largest share that the target was to have in this step.
    #[serde(default)]
    reached: u32,
    /// By service: the target's counts when the rollout started.
    counted_before: BTreeMap<String, Counts>,
    /// The document's fields when last observed, to detect changes.
    said: Said,
    /// The steps when last observed; empty before that.
    #[serde(default)]
    plan: Vec<Planned>,
    /// The gates of its steps.
    #[serde(default)]
    gates: Gates,
    /// The stable version before the current one.
    #[serde(default)]
    served_before: Option<String>,
    /// The stable version's endpoints that the document listed when nothing was being moved.
    #[serde(default)]
    listed: Option<Listed>,
    /// Whether the target gets traffic only if no other version is ready: most of its requests failed, or the stable
    /// version has been able to carry the whole load since the rollback.
    #[serde(rename = "shunned")]
    quarantined: bool,
    /// The result of the last rollout, for people.
    #[serde(default)]
    outcome: String,
    /// The current shortfall: which versions carry less than they should, and which carry more. `None` before any
    /// version has served.
    #[serde(default)]
    strains: Option<Vec<ShortfallReason>>,
    /// Transitions that have not been taken yet.
    #[serde(skip)]
    news: Vec<Transition>,
}

/// The warm-up by mirrored requests, which reach the target before users do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Warming {
    /// Not started.
    Due,
    /// Running since this time.
    Since(Millis),
    /// Stopped after this long, because the rollout is paused.
    Stopped(Millis),
    /// Complete.
    Over,
}

/// The phases of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Phase {
    /// The stable version serves; nothing is being moved.
    Initialized,
    /// A gate has not said yet that the next step may begin.
    Waiting,
    /// Traffic moves to the target, step by step.
    Progressing,
    /// It stays as it is until somebody says otherwise.
    Paused,
    /// The target serves everything.
    Succeeded,
    /// The target was taken back.
    Failed,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 6] =
        [Self::Initialized, Self::Waiting, Self::Progressing, Self::Paused, Self::Succeeded, Self::Failed];

    /// The phase's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Initialized => "Initialized",
            Self::Waiting => "Waiting",
            Self::Progressing => "Progressing",
            Self::Paused => "Paused",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }

    /// Whether a rollout is under way.
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::Waiting | Self::Progressing | Self::Paused)
    }
}

/// Why a rollout is where it is, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[allow(missing_docs, reason = "each is said in a message whenever it occurs")]
pub enum Reason {
    Serving,
    TargetWithdrawn,
    StableChanged,
    VersionLeft,
    DocumentLeft,
    DocumentReturned,
    Started,
    Superseded,
    StepsChanged,
    GateClosed,
    WarmingUp,
    WaitingForCapacity,
    ProgressDeadlineExceeded,
    EndpointsLost,
    EndpointsBack,
    Ramping,
    Holding,
    CatchingUp,
    NoProxies,
    ProxiesBehind,
    NotRouted,
    NoGoodAnswer,
    Undecided,
    BothFailing,
    PauseStep,
    PausedByUser,
    Resumed,
    Promoted,
    WeightSet,
    StepStarted,
    Completed,
    VerdictFail,
    GuardVeto,
    TooManyErrors,
    Aborted,
    RolledBack,
}

impl Reason {
    /// Whether it follows from an edit of the document rather than from a command.
    pub fn is_of_document(self) -> bool {
        use Reason::{StableChanged, Started, StepsChanged, Superseded, TargetWithdrawn};
        matches!(self, Started | Superseded | StepsChanged | StableChanged | TargetWithdrawn)
    }

    /// Whether it only reports that endpoints or proxies have come or gone.
    fn is_to_and_fro(self) -> bool {
        use Reason::{EndpointsBack, EndpointsLost, Holding, NoProxies, ProxiesBehind, Ramping, WaitingForCapacity};
        let of_endpoints = matches!(self, EndpointsLost | EndpointsBack | Holding | Ramping | WaitingForCapacity);
        of_endpoints || matches!(self, NoProxies | ProxiesBehind)
    }
}

/// The inputs of the rollout engine.
pub trait RolloutInputs {
    /// How many endpoints of a version can take traffic now.
    fn ready(&self, service: &str, version: &str) -> u32;
    /// How many of them have been ready for as long as the document requires.
    fn available(&self, service: &str, version: &str) -> u32;
    /// A version's counts over all proxies since they began.
    fn counts(&self, service: &str, version: &str) -> Counts;
    /// The state of the proxies.
    fn coverage(&self) -> Coverage;
    /// A version's requests that did not reach its own cluster, over all proxies since they began. They are not in its
    /// counts.
    fn misrouted(&self, service: &str, version: &str) -> u64;
    /// The vetoes on a version by the guards of live proxies: one for each proxy.
    fn vetoes(&self, service: &str, version: &str) -> impl Iterator<Item = &Veto>;
    /// Whether proxies have had time to report the counts from the time without a controller.
    fn is_up_to_date(&self) -> bool;
    /// Whether counts can be persisted: a step that advances on evidence which a restart would lose is not safe.
    fn counts_are_kept(&self) -> bool {
        true
    }
    /// The analysis result for the target.
    fn verdict(&self) -> AnalysisResult;
}

/// The analysis result for the target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AnalysisResult {
    /// It is worse than allowed.
    pub fails: bool,
    /// It is good enough, or no analysis is configured.
    pub passes: bool,
    /// Both the target and the stable version fail too often: the rollout holds, and the target is not blamed.
    pub both_fail: bool,
    /// Requests of the target.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Where the rollout moves several services, the one that the result refers to.
    pub worst: Option<ServiceOpinion>,
    /// The evidence, for people.
    pub words: String,
}

/// The target's counts at one of its services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceOpinion {
    /// The service.
    pub service: String,
    /// Requests of the target.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
}

impl Rollout {
    /// The state for a new document: its stable version serves.
    pub fn new(shift: &TrafficShift, now: Millis) -> Self {
        Self {
            number: 0,
            phase: Phase::Initialized,
            reason: Reason::Serving,
            message: format!("{} serves", shift.stable),
            since: now,
            unattended: 0,
            started: now,
            stable: shift.stable.clone(),
            target: None,
            leaving: None,
            step: 0,
            allowed: false,
            held_since: None,
            paused: false,
            weight_by_hand: None,
            is_return: false,
            gate_says: None,
            endpoints_for_full_load: desired(shift, &shift.stable),
            stable_had: BTreeMap::new(),
            rollback_count: 0,
            steps_begun: 0,
            skip_hold: false,
            progressed: now,
            unblocked_since: None,
            held: false,
            unmeasured_since: None,
            begun: BTreeMap::new(),
            most_ready: 0,
            warming: Warming::Due,
            level: 0,
            level_since: now,
            frozen: None,
            edited: false,
            before: None,
            reached: 0,
            counted_before: BTreeMap::new(),
            served_before: None,
            said: Said::new(shift),
            plan: Vec::new(),
            gates: Gates::default(),
            listed: None,
            quarantined: false,
            outcome: String::new(),
            strains: None,
            news: Vec::new(),
        }
    }

    /// The state for a new document of which a version may serve already. The rollout starts from that version, so that
    /// traffic is not moved back to the document's stable version only to be moved forward again.
    pub fn starting_from(serving: Option<&str>, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Self {
        let mut rollout = Self::new(shift, now);
        let serving = serving.filter(|version| shift.declares(version)).or_else(|| serves_alone(shift, world));
        if let Some(serving) = serving.filter(|version| *version != shift.stable) {
            rollout.goes_on_from(serving, shift, world, now);
        }
        rollout
    }

    /// Takes the transitions since the last call.
    pub fn take_news(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.news)
    }

    /// The state after time has passed and inputs have changed. Advances by one step at most for each call.
    pub fn advance(mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Self {
        let number = self.number;
        self.observe_spec(shift, world, now);
        self.watch_stable(shift, world);
        if self.number != number {
            // The counts do not belong to this rollout yet.
            return self;
        }
        if self.phase.is_under_way() {
            self.progress(shift, world, now);
        }
        if !self.phase.is_under_way() {
            self.look_at_rest(shift, world, now);
        }
        self
    }

    /// Accounts for time in which no controller ran. Holds, waits and warm-ups did not run in it: their remaining time
    /// is unchanged. `restated` is the difference between the new and the old number of the same moment.
    pub fn was_unattended(&mut self, long: Millis, restated: i64) {
        let later = |time: &mut Millis| *time = time.saturating_add(long);
        self.held_since.iter_mut().for_each(later);
        self.unblocked_since.iter_mut().for_each(later);
        self.unmeasured_since.iter_mut().for_each(later);
        self.begun.values_mut().for_each(|begun| later(begun.last_time()));
        if let Warming::Since(since) = &mut self.warming {
            later(since);
        }
        later(&mut self.progressed);
        later(&mut self.level_since);
        self.since = self.since.saturating_add_signed(restated);
        self.started = self.started.saturating_add_signed(restated);
        self.unattended = self.unattended.saturating_add_unsigned(long).saturating_sub(restated);
    }

    /// The time at which its phase began, moved forward by the time without a controller.
    pub fn attended_since(&self) -> Millis {
        self.since.saturating_add_signed(self.unattended)
    }

    /// Whether another state differs in its message at most.
    pub fn is_but_in_words(&self, other: &Self) -> bool {
        *self == Self { message: self.message.clone(), ..other.clone() }
    }

    /// Records a gate's answer for a step. Answers to outdated questions change nothing.
    pub fn gate_answered(&mut self, step: usize, allowed: bool, words: &str) {
        if self.phase.is_under_way() && !self.allowed && self.step == step {
            self.allowed = allowed;
            self.gate_says = (!allowed).then(|| words.to_owned());
            if let Some(weight) = self.plan.get(step).map(Planned::weight).filter(|_| allowed) {
                self.gate_opened(weight);
            }
        }
    }

    /// The step that waits for a gate.
    pub fn asks_for_step(&self, shift: &TrafficShift) -> Option<usize> {
        (self.phase.is_under_way() && !self.allowed && self.needs_gate(self.step, shift)).then_some(self.step)
    }

    /// The current step; `None` if no rollout is under way.
    pub fn current_step(&self, shift: &TrafficShift) -> Option<Step> {
        self.phase.is_under_way().then(|| self.present(shift))
    }

    /// The current step. If the document has removed it, it does not count as done: until [`Self::advance`] has found
    /// the step to continue from, it is the last one.
    fn present(&self, shift: &TrafficShift) -> Step {
        let steps = self.steps(shift);
        steps.get(self.step).or(steps.last()).cloned().unwrap_or(Step::all())
    }

    /// The steps of this rollout. The last one is always 100 %.
    pub fn steps<'a>(&self, shift: &'a TrafficShift) -> &'a [Step] {
        static BACK: [Step; 1] = [Step::all()];
        match self.goes_back(shift) {
            true => &BACK,
            false => &shift.strategy.steps,
        }
    }

    /// Whether it goes back to the document's stable version, or to the version of a rollback command: at once and
    /// without gates.
    pub fn goes_back(&self, shift: &TrafficShift) -> bool {
        let is_stable = self.target.as_ref() == Some(&shift.stable);
        // An edited `stable` with gates before it is a target like any other until it serves.
        self.is_return || (is_stable && self.said.gated.as_ref() != Some(&shift.stable))
    }

    /// When the rollout exceeds its progress deadline unless it progresses; `None` while it does not wait for
    /// endpoints.
    pub fn deadline(&self, shift: &TrafficShift) -> Option<Millis> {
        use Reason::{EndpointsLost, ProgressDeadlineExceeded, WaitingForCapacity};
        let may_wait = matches!(self.reason, WaitingForCapacity | EndpointsLost | ProgressDeadlineExceeded);
        (may_wait && self.unblocked_since.is_none())
            .then(|| self.progressed + shift.strategy.progress_deadline.as_millis() as u64)
    }

    /// The number of the current step if its versions are compared, else 0. Proxies use it to distinguish users who
    /// were assigned their version since the step began.
    pub fn compared_step(&self, shift: &TrafficShift) -> u64 {
        if self.phase.is_under_way() && !self.goes_back(shift) { self.steps_begun } else { 0 }
    }

    /// The services that it moves, as far as it has observed them.
    pub fn services(&self) -> impl Iterator<Item = &String> {
        self.endpoints_for_full_load.keys()
    }

    /// Whether the document, when last observed, sends its traffic to the default route on deletion.
    pub fn drains_on_delete(&self) -> bool {
        self.said.drains
    }

    /// Whether a removed version must keep serving beyond its deadline: it carries traffic, and its replacement waits
    /// for a gate.
    pub fn holds_by_gate(&self, version: &str, shift: &TrafficShift) -> bool {
        let is_in_use = self.stable == version || self.leaving.as_deref() == Some(version);
        self.phase.is_under_way() && is_in_use && self.waits_for_gate(shift)
    }

    /// Whether a version is still in use: it is the stable version, or the target of a rollout under way.
    pub fn uses(&self, version: &str) -> bool {
        self.stable == version || (self.phase.is_under_way() && self.target.as_deref() == Some(version))
    }

    /// How many endpoints carry the whole load of a service: as many as when the rollout began, or as many as the
    /// stable version has grown to since then and should still have.
    pub fn full_load(&self, service: &ShiftService) -> u32 {
        let counted = self.endpoints_for_full_load.get(&service.name).copied();
        let had = self.stable_had.get(&service.name).zip(service.version(&self.stable));
        let grown = had.map(|(had, version)| version.desired().min(*had));
        service.endpoints_for_full_load.or(counted.max(grown)).unwrap_or(1).max(1)
    }

    /// Records how many endpoints the stable version has while a rollout may have to replace them.
    fn watch_stable(&mut self, shift: &TrafficShift, world: &impl RolloutInputs) {
        if !self.phase.is_under_way() && self.phase != Phase::Failed {
            return self.stable_had.clear();
        }
        self.stable_had.retain(|service, _| shift.service(service).is_some());
        for service in &shift.services {
            let ready = world.ready(&service.name, &self.stable);
            let had = self.stable_had.entry(service.name.clone()).or_default();
            *had = ready.max(*had);
        }
    }

    /// Updates a document with no rollout under way: the stable version serves everything that it can carry.
    fn look_at_rest(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        self.follow_document(shift);
        match self.phase {
            Phase::Failed => self.quarantined |= self.capacity(&self.stable, shift, world) + allocation::EPSILON >= 1.0,
            _ => self.follow_workload(shift),
        }
        let shortfall = self.shortfall(shift, world);
        let message = self.at_rest(&shortfall);
        self.enter(self.phase, self.reason, message, shortfall, now);
    }

    /// Sets phase, reason and message. Records a transition if the phase or the reason changes, or if the shortfall
    /// does.
    fn enter(&mut self, phase: Phase, reason: Reason, message: String, shortfall: Shortfall, now: Millis) {
        let is_other = (self.phase, self.reason) != (phase, reason);
        let is_strained = !shortfall.strains.is_empty();
        // A version that has never served has not been lost.
        let known = self.strains.is_some();
        let strains = (known || !shortfall.nobody_serves).then_some(shortfall.strains);
        let is_shifted = known && self.strains != strains;
        self.strains = strains;
        self.turn_to(phase, reason, message, now);
        let message = self.message.clone();
        match (is_shifted, is_strained) {
            (true, true) if !is_other => self.record(Reason::EndpointsLost, message, now),
            (true, false) => {
                let words = format!("{message}; each version can carry its share again");
                self.record(Reason::EndpointsBack, words, now);
                // A rollout that continues as before needs no transition of its own.
                if is_other && !matches!(reason, Reason::Holding | Reason::Ramping) {
                    self.record(reason, message, now);
                }
            }
            _ if is_other => self.record(reason, message, now),
            _ => {}
        }
    }

    /// Records a decision: always a transition, even if phase and reason are unchanged.
    fn announce(&mut self, phase: Phase, reason: Reason, message: String, now: Millis) {
        self.turn_to(phase, reason, message, now);
        self.record(reason, self.message.clone(), now);
    }

    /// Records an event that changes neither phase nor reason.
    pub fn note(&mut self, reason: Reason, message: String, now: Millis) {
        self.record(reason, message, now);
    }

    fn turn_to(&mut self, phase: Phase, reason: Reason, message: String, now: Millis) {
        if self.phase != phase {
            (self.since, self.unattended) = (now, 0);
        }
        (self.phase, self.reason, self.message) = (phase, reason, message);
    }

    fn record(&mut self, reason: Reason, message: String, now: Millis) {
        let (rollout, phase) = (self.number, self.phase);
        let step = phase.is_under_way().then_some(self.step);
        let from = match phase {
            // The target has become the stable version.
            Phase::Succeeded => self.leaving.clone(),
            _ => Some(self.stable.clone()),
        };
        let target = self.target.clone();
        self.news.push(Transition {
            time: now,
            rollout,
            phase,
            reason,
            message,
            step,
            from,
            target,
            by: None,
            left_out: 0,
        });
    }
}

mod allocation;
pub mod shares;
mod shortfall;
mod spec_changes;
#[cfg(test)]
mod tests;
