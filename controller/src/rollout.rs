//! The rollout engine: a pure state machine from what is wanted, what is ready, what was counted, what people say and
//! the time to the next state and each version's share. It does no I/O and has no clock, so it is tested and simulated
//! over hours in milliseconds. One rollout may move several services; they go forward together and back together.

mod command;
mod parts;

pub use command::{Command, Refused};
pub use parts::Part;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::guard::Veto;
use tideshift_core::report::Counts;
use tideshift_core::shift::{ShiftService, ShiftVersion, Step, TrafficShift};

/// Milliseconds since 1970.
pub type Millis = u64;

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
    /// How often users were taken back from a target; what they were given before no longer holds.
    pub taken_back: u64,
    /// Somebody has said that the present step need be neither held nor judged any longer.
    waived: bool,
    /// When it last got further, and the most endpoints that the target has had ready.
    progressed: Millis,
    most_ready: u32,
    warming: Warming,
    /// What the target may have while it ramps up, in 1/100,000, and since when.
    level: u32,
    level_since: Millis,
    /// The target's counts when the rollout started, by service.
    counted_before: BTreeMap<String, Counts>,
    /// What the document said when it was last looked at, so that a change is noticed.
    said: Said,
    /// Whether the target failed so badly that it gets nothing while anybody else is ready.
    shunned: bool,
    /// What has happened and nobody has been told of yet.
    #[serde(skip)]
    news: Vec<Transition>,
}

/// A change of a rollout's state that people want to know of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// When.
    pub time: Millis,
    /// The number of the rollout.
    pub rollout: u64,
    /// What phase it is in since then.
    pub phase: Phase,
    /// Why, in a word.
    pub reason: Reason,
    /// Why, in words.
    pub message: String,
    /// The index of the present step, if it is under way.
    pub step: Option<usize>,
}

/// What of a document starts or ends rollouts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    stable: String,
    target: Option<String>,
}

/// Copies of requests that reach the target before users do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Warming {
    /// Not yet.
    Due,
    /// Since then.
    Since(Millis),
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
    Started,
    Superseded,
    GateClosed,
    WarmingUp,
    WaitingForCapacity,
    ProgressDeadlineExceeded,
    EndpointsLost,
    Ramping,
    Holding,
    CatchingUp,
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

/// What the engine may know of the world.
pub trait Observed {
    /// A version's endpoints that can take traffic now.
    fn ready(&self, service: &str, version: &str) -> u32;
    /// Those that have been ready for as long as the document asks for.
    fn available(&self, service: &str, version: &str) -> u32;
    /// What was counted for a version, over all proxies, since ever.
    fn counts(&self, service: &str, version: &str) -> Counts;
    /// The vetoes of the proxies' guards on a version.
    fn vetoes(&self, service: &str, version: &str) -> impl Iterator<Item = &Veto>;
    /// Whether the proxies have had the time to say what they counted while no controller was there.
    fn is_up_to_date(&self) -> bool;
    /// What the counts say of the target.
    fn verdict(&self) -> Opinion;
}

/// Why a target is taken back, and what it failed.
struct Failure {
    reason: Reason,
    why: String,
    errors: u64,
    requests: u64,
}

/// What the counts say of the target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opinion {
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
    /// The evidence in words.
    pub words: String,
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
            taken_back: 0,
            waived: false,
            progressed: now,
            most_ready: 0,
            warming: Warming::Due,
            level: 0,
            level_since: now,
            counted_before: BTreeMap::new(),
            said: Said { stable: shift.stable.clone(), target: None },
            shunned: false,
            news: Vec::new(),
        }
    }

    /// What has happened since this was last asked.
    pub fn take_news(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.news)
    }

    /// The state after time has passed and the world has changed. At most one step forward for each call.
    pub fn advance(mut self, shift: &TrafficShift, world: &impl Observed, now: Millis) -> Self {
        let number = self.number;
        self.heed(shift, world, now);
        if self.number != number {
            // What the counts say is not of this rollout yet.
            return self;
        }
        match self.phase {
            Phase::Waiting | Phase::Progressing | Phase::Paused => self.progress(shift, world, now),
            Phase::Initialized | Phase::Succeeded => {
                self.follow_workload(shift);
                self.message = self.at_rest(shift, world);
            }
            // What the target did stays to be read.
            Phase::Failed => {}
        }
        self
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
        }
    }

    /// The step that waits for a gate.
    pub fn asks_for_step(&self, shift: &TrafficShift) -> Option<usize> {
        (self.phase.is_under_way() && !self.allowed && self.needs_gate(shift)).then_some(self.step)
    }

    /// The step that the rollout is at; `None` if none is under way.
    pub fn current_step(&self, shift: &TrafficShift) -> Option<Step> {
        self.phase.is_under_way().then(|| self.steps(shift).get(self.step).cloned()).flatten()
    }

    /// The steps of this rollout. The last one is always everything.
    pub fn steps(&self, shift: &TrafficShift) -> Vec<Step> {
        match self.goes_back(shift) {
            true => vec![Step::all()],
            false => shift.strategy.steps.clone(),
        }
    }

    /// Whether it goes back to the version that the document calls stable, or that somebody asked for: at once, and
    /// nobody is asked.
    pub fn goes_back(&self, shift: &TrafficShift) -> bool {
        self.is_return || self.target.as_ref() == Some(&shift.stable)
    }

    /// When the rollout will be said to be stuck, if it gets no further; `None` while it waits for nothing.
    pub fn deadline(&self, shift: &TrafficShift) -> Option<Millis> {
        let waits = matches!(self.reason, Reason::WaitingForCapacity | Reason::ProgressDeadlineExceeded);
        waits.then(|| self.progressed + shift.strategy.progress_deadline.as_millis() as u64)
    }

    fn needs_gate(&self, shift: &TrafficShift) -> bool {
        !self.goes_back(shift) && shift.gates_of(self.step).next().is_some()
    }

    /// How it is while nothing is being moved: the stable version serves everything, as far as it can.
    fn at_rest(&self, shift: &TrafficShift, world: &impl Observed) -> String {
        let stable = &self.stable;
        let lacks = shift.services.iter().find_map(|service| {
            let (ready, needed) = (world.ready(&service.name, stable), self.full_load(service));
            let of = if shift.services.len() > 1 { format!(" of {}", service.name) } else { String::new() };
            (ready < needed)
                .then(|| format!("{stable}{of} has {ready} of {needed} endpoints ready that the load needs"))
        });
        lacks.unwrap_or_else(|| match self.phase {
            Phase::Succeeded => format!("{stable} serves everything"),
            _ => format!("{stable} serves"),
        })
    }

    /// What scales the stable version while nothing is being moved knows what the load needs.
    fn follow_workload(&mut self, shift: &TrafficShift) {
        for service in &shift.services {
            let replicas = service.version(&self.stable).and_then(|version| version.replicas).filter(|n| *n > 0);
            replicas.map(|replicas| self.endpoints_for_full_load.insert(service.name.clone(), replicas));
        }
    }

    /// How many endpoints carry the whole load of a service.
    pub fn full_load(&self, service: &ShiftService) -> u32 {
        let counted = self.endpoints_for_full_load.get(&service.name).copied();
        service.endpoints_for_full_load.or(counted).unwrap_or(1).max(1)
    }

    /// Starts and ends rollouts where the document has changed.
    fn heed(&mut self, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let said = Said { stable: shift.stable.clone(), target: shift.target.clone() };
        if self.said.stable != said.stable || !shift.has(&self.stable) {
            // The user says anew what is stable, or what was is gone.
            if self.stable != said.stable {
                self.leaving = Some(std::mem::replace(&mut self.stable, said.stable.clone()));
            }
            if self.target.as_ref() == Some(&self.stable) || !self.phase.is_under_way() {
                self.rest(shift, Reason::Serving, now);
            }
        }
        let is_gone = self.target.as_ref().is_some_and(|target| !shift.has(target));
        if self.said.target != said.target || is_gone {
            match said.target.as_ref().filter(|target| **target != self.stable) {
                // What ended before it begins is not its own, and proxies may still have to say that.
                Some(_) if !is_gone && !world.is_up_to_date() => return,
                Some(target) => self.start(target.clone(), shift, world, now),
                None => self.withdraw(shift, now),
            }
        }
        self.said = said;
    }

    fn start(&mut self, target: String, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let superseded = if self.phase.is_under_way() { self.target.take() } else { None };
        self.leaving = superseded.filter(|old| *old != target);
        self.endpoints_for_full_load = desired(shift, &self.stable);
        let counts = |service: &ShiftService| (service.name.clone(), world.counts(&service.name, &target));
        self.counted_before = shift.services.iter().map(counts).collect();
        self.number += 1;
        self.started = now;
        self.is_return = false;
        (self.level, self.level_since) = (0, now);
        self.shunned = false;
        let (reason, instead) = match &self.leaving {
            Some(old) => (Reason::Superseded, format!(" instead of {old}")),
            None => (Reason::Started, String::new()),
        };
        let message = format!("moving from {} to {target}{instead}", self.stable);
        self.target = Some(target);
        let is_mirrored = shift.strategy.warm_up.mirror_percent.is_some() && !self.goes_back(shift);
        self.warming = if is_mirrored { Warming::Due } else { Warming::Over };
        self.begin_step(0, shift, now);
        self.since = now;
        self.enter(Phase::Progressing, reason, message, now);
    }

    /// Ends a rollout that nobody wants any longer.
    fn withdraw(&mut self, shift: &TrafficShift, now: Millis) {
        let under_way = self.phase.is_under_way();
        if under_way {
            self.taken_back += 1;
            self.leaving = self.target.take();
        }
        self.rest(shift, if under_way { Reason::TargetWithdrawn } else { Reason::Serving }, now);
    }

    fn rest(&mut self, shift: &TrafficShift, reason: Reason, now: Millis) {
        self.target = None;
        self.shunned = false;
        self.begin_step(0, shift, now);
        self.endpoints_for_full_load = desired(shift, &self.stable);
        self.enter(Phase::Initialized, reason, format!("{} serves", self.stable), now);
    }

    fn begin_step(&mut self, step: usize, shift: &TrafficShift, now: Millis) {
        self.step = step;
        self.allowed = !self.needs_gate(shift);
        self.gate_says = None;
        self.held_since = None;
        self.waived = false;
        self.paused = false;
        self.weight_by_hand = None;
        self.progressed = now;
        self.most_ready = 0;
    }

    fn progress(&mut self, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let Some(target) = self.target.clone() else { return };
        let ready = shift.services.iter().map(|service| world.available(&service.name, &target)).sum();
        if ready > self.most_ready {
            (self.most_ready, self.progressed) = (ready, now);
        }
        if let Some(failure) = self.failure(&target, shift, world, now) {
            // More than half of its requests: anything is better, even a stable version that is too small.
            self.shunned = failure.errors.saturating_mul(2) > failure.requests;
            return self.take_back(failure.reason, &format!("{target}: {}", failure.why), now);
        }
        if !self.allowed && !self.needs_gate(shift) {
            self.allowed = true;
        }
        self.warm_up(&target, shift, world, now);
        let number = self.step + 1;
        let (phase, reason, message) = match self.obstacle(&target, shift, world, now) {
            Some((phase, reason, why)) => (phase, reason, format!("step {number}: {why}")),
            None if self.step + 1 >= self.steps(shift).len() => {
                self.leaving = Some(std::mem::replace(&mut self.stable, target.clone()));
                self.begin_step(0, shift, now);
                (Phase::Succeeded, Reason::Completed, format!("{target} serves everything"))
            }
            None => {
                self.begin_step(self.step + 1, shift, now);
                let weight = self.steps(shift).get(self.step).map_or(100, |step| step.weight);
                (Phase::Progressing, Reason::StepStarted, format!("step {}: {target} is to get {weight} %", number + 1))
            }
        };
        self.enter(phase, reason, message, now);
    }

    /// Why the target must be taken back, if it must.
    fn failure(&self, target: &str, shift: &TrafficShift, world: &impl Observed, now: Millis) -> Option<Failure> {
        if self.goes_back(shift) {
            return None;
        }
        for service in &shift.services {
            let began = |veto: &Veto| veto.until.saturating_sub(service.guard.cool_down_for(veto.strikes)) / 1_000_000;
            // One from before speaks of an earlier attempt.
            let veto = world.vetoes(&service.name, target).find(|veto| began(veto) >= self.started);
            if let Some(Veto { requests, errors, others_requests, others_errors, .. }) = veto {
                let why = format!(
                    "a proxy's guard stopped it: {errors} of {requests} requests failed there, of the others' \
                     {others_errors} of {others_requests}"
                );
                return Some(Failure { reason: Reason::GuardVeto, why, errors: *errors, requests: *requests });
            }
        }
        let verdict = world.verdict();
        if verdict.fails {
            let Opinion { words, errors, requests, .. } = verdict;
            return Some(Failure { reason: Reason::VerdictFail, why: words, errors, requests });
        }
        let (errors, requests) = self.counted(target, shift, world);
        if let Some(limit) = shift.analysis.max_errors.filter(|limit| errors > *limit) {
            let why = format!("{errors} of {requests} requests failed, more than the {limit} allowed");
            return Some(Failure { reason: Reason::TooManyErrors, why, errors, requests });
        }
        let waits = self.allowed && !self.paused && shift.strategy.abort_at_deadline && self.is_stuck(shift, now);
        let (_, why) = self.shortage(target, shift, world).filter(|(of_target, _)| waits && *of_target)?;
        let why = format!("{why}; no progress for {} s", shift.strategy.progress_deadline.as_secs());
        Some(Failure { reason: Reason::ProgressDeadlineExceeded, why, errors: 0, requests: 0 })
    }

    /// Whether it has got no further for longer than it may.
    fn is_stuck(&self, shift: &TrafficShift, now: Millis) -> bool {
        now.saturating_sub(self.progressed) >= shift.strategy.progress_deadline.as_millis() as u64
    }

    /// The target's errors and answers since the rollout began.
    fn counted(&self, target: &str, shift: &TrafficShift, world: &impl Observed) -> (u64, u64) {
        let of = |service: &ShiftService| {
            let before = self.counted_before.get(&service.name).copied().unwrap_or_default();
            world.counts(&service.name, target).since(&before)
        };
        let counts = shift.services.iter().map(of).fold(Counts::default(), |sum, counts| sum + counts);
        (counts.error, counts.answered())
    }

    /// Gives the stable version its traffic back.
    fn take_back(&mut self, reason: Reason, why: &str, now: Millis) {
        let back = match self.shunned {
            true => "all at once",
            false => "as far as it can carry the load",
        };
        self.taken_back += 1;
        self.enter(Phase::Failed, reason, format!("{why}; back to {} {back}", self.stable), now);
    }

    /// Lets copies of requests, then a growing share of them reach the target.
    fn warm_up(&mut self, target: &str, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let ramp = shift.strategy.warm_up.seconds.as_millis() as u64;
        let capacity = self.capacity(target, shift, world);
        self.warming = match self.warming {
            Warming::Due if self.allowed && capacity > 0.0 => Warming::Since(now),
            Warming::Since(since) if now.saturating_sub(since) >= ramp => Warming::Over,
            as_it_is => as_it_is,
        };
        let passed = now.saturating_sub(self.level_since);
        if ramp == 0 || self.goes_back(shift) || passed < 1_000 {
            return;
        }
        let share = (self.share(target, shift, world) * f64::from(LEVELS)) as u64;
        let more = u64::from(LEVELS) * passed / ramp;
        self.level = (share + more).min(u64::from(LEVELS)) as u32;
        self.level_since = now;
    }

    /// What stands in the way of the next step.
    fn obstacle(
        &mut self,
        target: &str,
        shift: &TrafficShift,
        world: &impl Observed,
        now: Millis,
    ) -> Option<(Phase, Reason, String)> {
        let progressing = |reason, why| Some((Phase::Progressing, reason, why));
        if !self.allowed {
            let says = self.gate_says.as_deref().unwrap_or("its gate has not answered yet");
            return Some((Phase::Waiting, Reason::GateClosed, says.to_owned()));
        }
        let step = self.current_step(shift)?;
        let (share, had_it) = (self.share(target, shift, world), self.held_since.is_some());
        let goal = self.weight_by_hand.unwrap_or(step.weight);
        let has_it = share + 1e-9 >= f64::from(goal) / 100.0;
        if !has_it {
            self.held_since = None;
        }
        if self.paused {
            let reason = if self.weight_by_hand.is_some() { Reason::WeightSet } else { Reason::PausedByUser };
            let why = match has_it {
                true => format!("paused by hand; {target} has {} %", percent(share)),
                false => format!("paused by hand; {target} has {} % of the {goal} % wanted", percent(share)),
            };
            return Some((Phase::Paused, reason, why));
        }
        if let Warming::Since(since) = self.warming {
            let left = shift.strategy.warm_up.seconds.as_secs().saturating_sub(now.saturating_sub(since) / 1_000);
            return progressing(Reason::WarmingUp, format!("{target} gets copies of requests for {left} s more"));
        }
        if let Some((_, why)) = self.shortage(target, shift, world) {
            // What it had, it has lost; what was never there is waited for.
            let lost = had_it || self.reason == Reason::EndpointsLost;
            if had_it {
                self.progressed = now;
            }
            self.held_since = None;
            return match (self.is_stuck(shift, now), lost) {
                (true, _) => {
                    let seconds = shift.strategy.progress_deadline.as_secs();
                    progressing(Reason::ProgressDeadlineExceeded, format!("{why}; no progress for {seconds} s"))
                }
                (false, true) => progressing(
                    Reason::EndpointsLost,
                    format!("{why}; {target} has {} %, {} takes over the rest", percent(share), self.stable),
                ),
                (false, false) => progressing(Reason::WaitingForCapacity, why),
            };
        }
        if !has_it {
            return progressing(Reason::Ramping, format!("{target} has {} % on its way to {goal} %", percent(share)));
        }
        let since = *self.held_since.get_or_insert(now);
        if self.waived {
            return None;
        }
        if now.saturating_sub(since) < step.hold.as_millis() as u64 {
            return match share > f64::from(goal) / 100.0 + 1e-6 {
                true => progressing(
                    Reason::EndpointsLost,
                    format!(
                        "{} cannot carry the rest; {target} has {} % instead of {goal} %",
                        self.stable,
                        percent(share)
                    ),
                ),
                false => progressing(Reason::Holding, format!("{target} has {} %", percent(share))),
            };
        }
        if !world.is_up_to_date() {
            return progressing(Reason::CatchingUp, format!("{target} has {} %", percent(share)));
        }
        let verdict = world.verdict();
        if verdict.both_fail && !self.goes_back(shift) {
            return progressing(Reason::BothFailing, verdict.words);
        }
        if step.pause {
            let why = format!("{target} has {} %; paused until it is promoted", percent(share));
            return Some((Phase::Paused, Reason::PauseStep, why));
        }
        if !verdict.passes && !self.goes_back(shift) {
            return progressing(Reason::Undecided, verdict.words);
        }
        None
    }

    /// What endpoints are missing for the target's share, and whether they are the target's.
    fn shortage(&self, target: &str, shift: &TrafficShift, world: &impl Observed) -> Option<(bool, String)> {
        let step = self.steps(shift).get(self.step).map_or(0, |step| step.weight);
        let goal = self.weight_by_hand.unwrap_or(step);
        let several = shift.services.len() > 1;
        for service in &shift.services {
            let full = self.full_load(service);
            let of = if several { format!(" of {}", service.name) } else { String::new() };
            let ready = world.available(&service.name, target);
            if f64::from(ready) + 1e-9 < f64::from(full) * f64::from(goal) / 100.0 {
                let needed = (f64::from(full) * f64::from(goal) / 100.0).ceil();
                let why =
                    format!("{target}{of} has {ready} of {needed} endpoints ready that {goal} % of the load need");
                return Some((true, why));
            }
            let missing = parts::max_unavailable(&shift.strategy, full);
            let together = ready + world.available(&service.name, &self.stable);
            if together < full.saturating_sub(missing) {
                let why = format!(
                    "{} and {target}{of} have {together} of {full} endpoints ready together, and no more than {missing} \
                     may be missing",
                    self.stable
                );
                return Some((false, why));
            }
        }
        None
    }

    fn enter(&mut self, phase: Phase, reason: Reason, message: String, now: Millis) {
        if self.phase != phase {
            self.since = now;
        }
        let is_news = self.phase != phase || self.reason != reason;
        (self.phase, self.reason, self.message) = (phase, reason, message);
        if is_news {
            self.news.push(Transition {
                time: now,
                rollout: self.number,
                phase,
                reason,
                message: self.message.clone(),
                step: phase.is_under_way().then_some(self.step),
            });
        }
    }
}

/// What [`Rollout::level`] is a part of.
const LEVELS: u32 = 100_000;

/// A share in percent, with as many digits as it needs, three at most.
pub fn percent(share: f64) -> f64 {
    (share * 100_000.0).round() / 1_000.0
}

/// How many endpoints each service is meant to have of a version.
fn desired(shift: &TrafficShift, version: &str) -> BTreeMap<String, u32> {
    let of = |service: &ShiftService| service.version(version).map_or(0, ShiftVersion::desired);
    shift.services.iter().map(|service| (service.name.clone(), of(service))).collect()
}

#[cfg(test)]
mod tests;
