//! The rollout engine: a pure state machine from what is wanted, what is ready, what was counted, what people say and
//! the time to the next state and each version's share. It does no I/O and has no clock, so it is tested and simulated
//! over hours in milliseconds. One rollout may move several services; they go forward together and back together.

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

/// Where a rollout stands. Kept across restarts of the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Counts the rollouts of this document, the first is 1; 0 before it.
    pub number: u64,
    /// The phase, in the words of Flagger's and Argo Rollouts' users.
    pub phase: Phase,
    /// Why it is in this phase, for programs.
    pub reason: Reason,
    /// Why it is in this phase, for people.
    pub message: String,
    /// Since when it is in this phase.
    pub since: Millis,
    /// In so much of the time since then no controller was there.
    #[serde(default)]
    unattended: i64,
    /// When the rollout began.
    pub started: Millis,
    /// The version that serves what the target does not; the target itself once it has succeeded.
    pub stable: String,
    /// The version to move to, or that was moved to, or that failed.
    pub target: Option<String>,
    /// The version that the traffic comes from; shares the load while the stable one cannot carry it all.
    pub leaving: Option<String>,
    /// Index of the present step.
    pub step: usize,
    /// Whether the present step may begin; until then the target has the share of the step before.
    pub allowed: bool,
    /// Since when the target has had the step's share without a break.
    pub held_since: Option<Millis>,
    /// Whether somebody has paused it.
    pub paused: bool,
    /// The target's share in percent if somebody has set it.
    pub weight_by_hand: Option<u32>,
    /// Whether it goes back to a version that has served before: at once, and not judged.
    pub is_return: bool,
    /// What the present step's gate said last, if it said no or nothing.
    pub gate_says: Option<String>,
    /// How many endpoints carry the whole load of each service where the document does not say.
    pub endpoints_for_full_load: BTreeMap<String, u32>,
    /// The most endpoints of the stable version that have been ready since the rollout began, for each service.
    #[serde(default)]
    stable_had: BTreeMap<String, u32>,
    /// How often users were taken back from a target; what they were given before no longer holds.
    pub taken_back: u64,
    /// How many steps have begun, of all rollouts of the document.
    #[serde(default)]
    steps_begun: u64,
    /// Somebody has said that the present step need be neither held nor judged any longer.
    waived: bool,
    /// When it last got further, moved on by all the time since then in which it waited for no endpoint.
    progressed: Millis,
    /// Since when it has not waited for endpoints, if it does not.
    #[serde(default)]
    content: Option<Millis>,
    /// Whether the present step has been held once.
    #[serde(default)]
    held: bool,
    /// Since when nothing has been measured of the target, if nothing is.
    #[serde(default)]
    unmeasured_since: Option<Millis>,
    /// What had been counted when the present step began.
    #[serde(default)]
    begun: measured::Stock,
    /// The most endpoints that the target has had in this step.
    most_ready: u32,
    warming: Warming,
    /// What the target may have while it ramps up, in 1/100,000 as all shares that are kept, and since when.
    level: u32,
    level_since: Millis,
    /// The share that it was paused at, beyond which it does not grow.
    #[serde(default)]
    frozen: Option<u32>,
    /// Whether it stays at that share because an edit of the steps would have moved it ahead.
    #[serde(default)]
    edited: bool,
    /// The share that the target had when the present step began.
    #[serde(default)]
    before: Option<u32>,
    /// The most that it has had in this step, as far as that was meant.
    #[serde(default)]
    reached: u32,
    /// The target's counts when the rollout started, by service.
    counted_before: BTreeMap<String, Counts>,
    /// What the document said when it was last looked at, so that a change is noticed.
    said: Said,
    /// The steps when they were last looked at; none: not yet.
    #[serde(default)]
    plan: Vec<Planned>,
    /// The gates of its steps.
    #[serde(default)]
    gates: Gates,
    /// The stable version before the present one.
    #[serde(default)]
    served_before: Option<String>,
    /// What the document listed of the stable version when nothing was being moved.
    #[serde(default)]
    listed: Option<Listed>,
    /// Whether the target gets nothing while anybody else is ready: it failed most requests, or the stable version has
    /// been able to carry everything since it was taken back.
    shunned: bool,
    /// What came of the last rollout, in words.
    #[serde(default)]
    outcome: String,
    /// Who carries what because somebody cannot; `None` before anybody has carried anything.
    #[serde(default)]
    strains: Option<Vec<ShortfallReason>>,
    /// What has happened and nobody has been told of yet.
    #[serde(skip)]
    news: Vec<Transition>,
}

/// Copies of requests that reach the target before users do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Warming {
    /// Not yet.
    Due,
    /// Since then.
    Since(Millis),
    /// For so long, and no longer while the rollout is paused.
    Stopped(Millis),
    /// It is warm.
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

    /// Whether a rollout is on its way.
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
    /// Whether it follows from an edit of the document, where nobody has given a command.
    pub fn is_of_document(self) -> bool {
        use Reason::{StableChanged, Started, StepsChanged, Superseded, TargetWithdrawn};
        matches!(self, Started | Superseded | StepsChanged | StableChanged | TargetWithdrawn)
    }

    /// Whether it says no more than that endpoints or proxies have come or gone.
    fn is_to_and_fro(self) -> bool {
        use Reason::{EndpointsBack, EndpointsLost, Holding, NoProxies, ProxiesBehind, Ramping, WaitingForCapacity};
        let of_endpoints = matches!(self, EndpointsLost | EndpointsBack | Holding | Ramping | WaitingForCapacity);
        of_endpoints || matches!(self, NoProxies | ProxiesBehind)
    }
}

/// What the engine may know of the world.
pub trait RolloutInputs {
    /// A version's endpoints that can take traffic now.
    fn ready(&self, service: &str, version: &str) -> u32;
    /// Those that have been ready for as long as the document asks for.
    fn available(&self, service: &str, version: &str) -> u32;
    /// What was counted for a version, over all proxies, since ever.
    fn counts(&self, service: &str, version: &str) -> Counts;
    /// What is known of the proxies.
    fn coverage(&self) -> Coverage;
    /// Requests of a version that did not reach its own cluster, over all proxies, since ever. None of them is in its
    /// counts.
    fn misrouted(&self, service: &str, version: &str) -> u64;
    /// The vetoes of the guards of proxies that report, on a version: one for each proxy.
    fn vetoes(&self, service: &str, version: &str) -> impl Iterator<Item = &Veto>;
    /// Whether the proxies have had the time to say what they counted while no controller was there.
    fn is_up_to_date(&self) -> bool;
    /// Whether counts can be kept: a step that goes forward by evidence which a restart would lose is not safe.
    fn counts_are_kept(&self) -> bool {
        true
    }
    /// What the counts say of the target.
    fn verdict(&self) -> AnalysisResult;
}

/// What the counts say of the target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AnalysisResult {
    /// It is worse than it may be.
    pub fails: bool,
    /// It is good enough, or nobody asks.
    pub passes: bool,
    /// Both the target and the stable version fail too often: no reason to blame the target, nor to go on.
    pub both_fail: bool,
    /// Requests of the target.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Where the rollout moves several services, the one that is meant.
    pub worst: Option<ServiceOpinion>,
    /// The evidence in words.
    pub words: String,
}

/// What was counted of the target at one of its services.
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
    /// A document that is seen for the first time: its stable version serves.
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
            taken_back: 0,
            steps_begun: 0,
            waived: false,
            progressed: now,
            content: None,
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
            shunned: false,
            outcome: String::new(),
            strains: None,
            news: Vec::new(),
        }
    }

    /// A document that is seen for the first time, where a version of it may serve already. That one is where it starts
    /// from: nothing is moved back to the document's stable version only to be moved forward again.
    pub fn starting_from(serving: Option<&str>, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Self {
        let mut rollout = Self::new(shift, now);
        let serving = serving.filter(|version| shift.declares(version)).or_else(|| serves_alone(shift, world));
        if let Some(serving) = serving.filter(|version| *version != shift.stable) {
            rollout.goes_on_from(serving, shift, world, now);
        }
        rollout
    }

    /// What has happened since this was last asked.
    pub fn take_news(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.news)
    }

    /// The state after time has passed and the world has changed. At most one step forward for each call.
    pub fn advance(mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Self {
        let number = self.number;
        self.heed(shift, world, now);
        self.watch_stable(shift, world);
        if self.number != number {
            // What the counts say is not of this rollout yet.
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

    /// Time has passed in which no controller was there. Nothing was held, waited for or warmed up in it: what remained of
    /// that remains. `restated` is by how much the same moment has another number than before.
    pub fn was_unattended(&mut self, long: Millis, restated: i64) {
        let later = |time: &mut Millis| *time = time.saturating_add(long);
        self.held_since.iter_mut().for_each(later);
        self.content.iter_mut().for_each(later);
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

    /// For so long it has been in its phase, as far as a controller was there.
    pub fn attended_since(&self) -> Millis {
        self.since.saturating_add_signed(self.unattended)
    }

    /// Whether another state is the same, whatever is said of it.
    pub fn is_but_in_words(&self, other: &Self) -> bool {
        *self == Self { message: self.message.clone(), ..other.clone() }
    }

    /// A gate has answered for a step. Answers to questions of the past change nothing.
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

    /// The step that the rollout is at; `None` if none is under way.
    pub fn current_step(&self, shift: &TrafficShift) -> Option<Step> {
        self.phase.is_under_way().then(|| self.present(shift))
    }

    /// The present step. One that the document no longer has is not done: until [`Self::advance`] has found the place
    /// to go on from, it is the last one.
    fn present(&self, shift: &TrafficShift) -> Step {
        let steps = self.steps(shift);
        steps.get(self.step).or(steps.last()).cloned().unwrap_or(Step::all())
    }

    /// The steps of this rollout. The last one is always everything.
    pub fn steps<'a>(&self, shift: &'a TrafficShift) -> &'a [Step] {
        static BACK: [Step; 1] = [Step::all()];
        match self.goes_back(shift) {
            true => &BACK,
            false => &shift.strategy.steps,
        }
    }

    /// Whether it goes back to the version that the document calls stable, or that somebody asked for: at once, and
    /// nobody is asked.
    pub fn goes_back(&self, shift: &TrafficShift) -> bool {
        let is_stable = self.target.as_ref() == Some(&shift.stable);
        // An edited `stable` that gates lie before is a target like any other until it serves.
        self.is_return || (is_stable && self.said.gated.as_ref() != Some(&shift.stable))
    }

    /// When the rollout will be said to be stuck, if it gets no further; `None` while it waits for nothing.
    pub fn deadline(&self, shift: &TrafficShift) -> Option<Millis> {
        use Reason::{EndpointsLost, ProgressDeadlineExceeded, WaitingForCapacity};
        let may_wait = matches!(self.reason, WaitingForCapacity | EndpointsLost | ProgressDeadlineExceeded);
        (may_wait && self.content.is_none())
            .then(|| self.progressed + shift.strategy.progress_deadline.as_millis() as u64)
    }

    /// The number of the present step if its versions are compared, by which proxies tell users who were given their
    /// version since it began; else 0.
    pub fn compared_step(&self, shift: &TrafficShift) -> u64 {
        if self.phase.is_under_way() && !self.goes_back(shift) { self.steps_begun } else { 0 }
    }

    /// The services that it moves, as far as it has seen them.
    pub fn services(&self) -> impl Iterator<Item = &String> {
        self.endpoints_for_full_load.keys()
    }

    /// Whether the document said last that its traffic goes to the default route when it is deleted.
    pub fn drains_on_delete(&self) -> bool {
        self.said.drains
    }

    /// Whether the version that left the document may not go yet, whatever its deadline is: it serves, or is on its way,
    /// and what is to take its place waits for a gate.
    pub fn holds_by_gate(&self, version: &str, shift: &TrafficShift) -> bool {
        let is_in_use = self.stable == version || self.leaving.as_deref() == Some(version);
        self.phase.is_under_way() && is_in_use && self.waits_for_gate(shift)
    }

    /// Whether a version may be needed again as things stand: the stable one, or the target of what is under way.
    pub fn uses(&self, version: &str) -> bool {
        self.stable == version || (self.phase.is_under_way() && self.target.as_deref() == Some(version))
    }

    /// How many endpoints carry the whole load of a service: as many as when the rollout began, or as the stable version
    /// has grown to since then and is still meant to have.
    pub fn full_load(&self, service: &ShiftService) -> u32 {
        let counted = self.endpoints_for_full_load.get(&service.name).copied();
        let had = self.stable_had.get(&service.name).zip(service.version(&self.stable));
        let grown = had.map(|(had, version)| version.desired().min(*had));
        service.endpoints_for_full_load.or(counted.max(grown)).unwrap_or(1).max(1)
    }

    /// Takes note of how many endpoints the stable version has while a rollout may need to be replaced by as many.
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

    /// Nothing is being moved: the stable version serves everything, as far as it can.
    fn look_at_rest(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        self.follow_document(shift);
        match self.phase {
            Phase::Failed => self.shunned |= self.capacity(&self.stable, shift, world) + allocation::EPSILON >= 1.0,
            _ => self.follow_workload(shift),
        }
        let shortfall = self.shortfall(shift, world);
        let message = self.at_rest(&shortfall);
        self.enter(self.phase, self.reason, message, shortfall, now);
    }

    /// Says how it is; a transition if that is another phase or reason than before, or if others than before carry
    /// what somebody cannot.
    fn enter(&mut self, phase: Phase, reason: Reason, message: String, shortfall: Shortfall, now: Millis) {
        let is_other = (self.phase, self.reason) != (phase, reason);
        let is_strained = !shortfall.strains.is_empty();
        // What has never served has not been lost.
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
                // What goes on as before need not be said besides.
                if is_other && !matches!(reason, Reason::Holding | Reason::Ramping) {
                    self.record(reason, message, now);
                }
            }
            _ if is_other => self.record(reason, message, now),
            _ => {}
        }
    }

    /// Something has been decided: a transition, whatever was said before.
    fn announce(&mut self, phase: Phase, reason: Reason, message: String, now: Millis) {
        self.turn_to(phase, reason, message, now);
        self.record(reason, self.message.clone(), now);
    }

    /// Something has happened that changes neither phase nor reason.
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
            // The target is the stable version by now.
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
