//! The rollout engine: a pure state machine from what is wanted, what is ready, what was counted and the time to the
//! next state and each version's share. It does no I/O and has no clock, so it is tested over hours in milliseconds.

use crate::shares::{Claim, shares, weights};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tideshift_core::guard::Veto;
use tideshift_core::report::Counts;
use tideshift_core::shift::{Step, TrafficShift};

/// Milliseconds since 1970.
pub type Millis = u64;

/// Where a service's rollout stands. Kept across restarts of the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// The phase, in the words of Flagger's users.
    pub phase: Phase,
    /// The version that serves what the target does not; the target itself once it has succeeded.
    pub stable: String,
    /// The version to move to, or that was moved to, or that failed.
    pub target: Option<String>,
    /// The version that the traffic comes from; shares the load while the stable one cannot carry it all.
    pub leaving: Option<String>,
    /// Index of the present step.
    pub step: usize,
    /// Since when the target has had the step's share without a break.
    pub held_since: Option<Millis>,
    /// How many endpoints carry the whole load where the document does not say.
    pub endpoints_for_full_load: u32,
    /// The target's counts when the rollout started.
    pub counted_before: Counts,
    /// Why it is in this phase, for people.
    pub message: String,
    /// Since when.
    pub since: Millis,
    /// How often users were taken back from a target; what they were given before no longer holds.
    #[serde(default)]
    pub taken_back: u64,
    /// What the document said when it was last looked at, so that a change is noticed.
    said: Said,
    /// Whether the target failed so badly that it gets nothing while anybody else is ready.
    shunned: bool,
}

/// What of a document starts or ends rollouts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    stable: String,
    target: Option<String>,
}

/// The phases of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The stable version serves; nothing is being moved.
    Initialized,
    /// Traffic moves to the target, step by step.
    Progressing,
    /// The target serves everything.
    Succeeded,
    /// The target was taken back.
    Failed,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 4] = [Self::Initialized, Self::Progressing, Self::Succeeded, Self::Failed];

    /// The phase's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Initialized => "Initialized",
            Self::Progressing => "Progressing",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// What the engine may know of the world.
pub trait Observed {
    /// A version's endpoints that can take traffic now.
    fn ready(&self, version: &str) -> u32;
    /// What was counted for a version, over all proxies, since ever.
    fn counts(&self, version: &str) -> Counts;
    /// The vetoes of the proxies' guards on a version.
    fn vetoes(&self, version: &str) -> impl Iterator<Item = &Veto>;
    /// Whether the proxies have had the time to say what they counted while no controller was there.
    fn is_up_to_date(&self) -> bool;
}

/// A version's part in the traffic right now.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// The version's name.
    pub version: String,
    /// 0 to 1.
    pub share: f64,
    /// The share as a weight, relative to the others'.
    pub weight: u32,
    /// Whether it can take requests at all.
    pub serving: bool,
}

impl Rollout {
    /// A service that is seen for the first time: its stable version serves.
    pub fn new(shift: &TrafficShift, now: Millis) -> Self {
        Self {
            phase: Phase::Initialized,
            stable: shift.stable.clone(),
            target: None,
            leaving: None,
            step: 0,
            held_since: None,
            endpoints_for_full_load: listed(shift, &shift.stable),
            counted_before: Counts::default(),
            message: format!("{} serves", shift.stable),
            since: now,
            taken_back: 0,
            said: Said { stable: shift.stable.clone(), target: None },
            shunned: false,
        }
    }

    /// The state after what has happened. At most one step forward for each call.
    pub fn advance(mut self, shift: &TrafficShift, world: &impl Observed, now: Millis) -> Self {
        self.heed(shift, world, now);
        match self.phase {
            Phase::Progressing => self.progress(shift, world, now),
            Phase::Initialized | Phase::Succeeded => self.message = self.at_rest(shift, world),
            // What the target did stays to be read.
            Phase::Failed => {}
        }
        self
    }

    /// How it is while nothing is being moved: the stable version serves everything, as far as it can.
    fn at_rest(&self, shift: &TrafficShift, world: &impl Observed) -> String {
        let (stable, needed) = (&self.stable, self.full_load(shift));
        match (world.ready(stable), self.phase) {
            (ready, _) if ready < needed => {
                format!("{stable} has {ready} of {needed} endpoints ready that the load needs")
            }
            (_, Phase::Succeeded) => format!("{stable} serves everything"),
            _ => format!("{stable} serves"),
        }
    }

    /// Each version's part, in the document's order.
    pub fn parts(&self, shift: &TrafficShift, world: &impl Observed) -> Vec<Part> {
        let whole = f64::from(self.full_load(shift));
        let wanted = self.target_share(shift);
        let claims: Vec<Claim> = shift
            .versions
            .iter()
            .map(|version| {
                let name = Some(&version.name);
                let is_target = name == self.target.as_ref();
                Claim {
                    wanted: match self.phase {
                        Phase::Progressing if is_target => wanted,
                        Phase::Progressing if version.name == self.stable => 1.0 - wanted,
                        _ if version.name == self.stable => 1.0,
                        _ => 0.0,
                    },
                    capacity: f64::from(world.ready(&version.name)) / whole,
                    reserve: match () {
                        () if self.shunned && is_target => 2,
                        () if version.name == self.stable || is_target || name == self.leaving.as_ref() => 0,
                        () => 1,
                    },
                }
            })
            .collect();
        let shares = shares(&claims);
        let weights = weights(&shares);
        let versions = shift.versions.iter().zip(&claims).zip(shares.iter().zip(weights));
        versions
            .map(|((version, claim), (share, weight))| Part {
                version: version.name.clone(),
                share: *share,
                weight,
                serving: claim.capacity > 0.0,
            })
            .collect()
    }

    /// The step that the rollout is at; `None` if none is under way.
    pub fn current_step(&self, shift: &TrafficShift) -> Option<Step> {
        (self.phase == Phase::Progressing).then(|| self.steps(shift).get(self.step).copied()).flatten()
    }

    /// The steps of this rollout. The last one is always everything.
    pub fn steps(&self, shift: &TrafficShift) -> Vec<Step> {
        let all = Step { weight: 100, hold: Duration::ZERO };
        // Back to the version that the document calls stable: no reason to wait.
        if self.target.as_ref() == Some(&shift.stable) {
            return vec![all];
        }
        let mut steps = shift.steps.clone();
        if steps.last().is_none_or(|last| last.weight != 100) {
            steps.push(all);
        }
        steps
    }

    /// How many endpoints carry the whole load.
    fn full_load(&self, shift: &TrafficShift) -> u32 {
        shift.endpoints_for_full_load.unwrap_or(self.endpoints_for_full_load).max(1)
    }

    fn target_share(&self, shift: &TrafficShift) -> f64 {
        self.current_step(shift).map_or(0.0, |step| f64::from(step.weight) / 100.0)
    }

    /// Starts and ends rollouts where the document has changed.
    fn heed(&mut self, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let exists = |name: &String| shift.version(name).is_some();
        let said = Said { stable: shift.stable.clone(), target: shift.target.clone() };
        if self.said.stable != said.stable || !exists(&self.stable) {
            // The user says anew what is stable, or what was is gone.
            if self.stable != said.stable {
                self.leaving = Some(std::mem::replace(&mut self.stable, said.stable.clone()));
            }
            if self.target.as_ref() == Some(&self.stable) || self.phase != Phase::Progressing {
                self.rest(shift, now);
            }
        }
        if self.said.target != said.target || !self.target.as_ref().is_none_or(exists) {
            match &said.target {
                Some(target) if *target != self.stable => self.start(target.clone(), shift, world, now),
                _ => {
                    if self.phase == Phase::Progressing {
                        self.taken_back += 1;
                        self.leaving = self.target.take();
                    }
                    self.rest(shift, now);
                }
            }
        }
        self.said = said;
    }

    fn start(&mut self, target: String, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let superseded = if self.phase == Phase::Progressing { self.target.take() } else { None };
        self.leaving = superseded.filter(|old| *old != target);
        self.endpoints_for_full_load = listed(shift, &self.stable);
        self.counted_before = world.counts(&target);
        self.step = 0;
        self.held_since = None;
        self.shunned = false;
        self.enter(Phase::Progressing, format!("moving from {} to {target}", self.stable), now);
        self.target = Some(target);
    }

    fn rest(&mut self, shift: &TrafficShift, now: Millis) {
        self.target = None;
        self.shunned = false;
        self.held_since = None;
        self.endpoints_for_full_load = listed(shift, &self.stable);
        self.enter(Phase::Initialized, format!("{} serves", self.stable), now);
    }

    fn progress(&mut self, shift: &TrafficShift, world: &impl Observed, now: Millis) {
        let Some(target) = self.target.clone() else { return };
        let counts = world.counts(&target).since(&self.counted_before);
        let began = |veto: &Veto| veto.until.saturating_sub(shift.guard.cool_down_for(veto.strikes)) / 1_000_000;
        // One from before speaks of an earlier attempt.
        let veto = world.vetoes(&target).find(|veto| began(veto) >= self.since);
        if counts.error > shift.max_errors || veto.is_some() {
            let (error, answered) = (counts.error, counts.answered());
            // More than half of its requests: anything is better, even a stable version that is too small.
            let (failed, of) = veto.map_or((error, answered), |veto| (veto.errors, veto.requests));
            self.shunned = failed.saturating_mul(2) > of;
            let back = match self.shunned {
                true => "all at once",
                false => "as far as it can carry the load",
            };
            let why = match veto {
                Some(Veto { requests, errors, others_requests, others_errors, .. }) => format!(
                    "a proxy's guard stopped it: {errors} of {requests} requests failed there, of the others' \
                     {others_errors} of {others_requests}"
                ),
                None => format!("{error} of {answered} requests failed, more than the {} allowed", shift.max_errors),
            };
            let message = format!("{target}: {why}; back to {} {back}", self.stable);
            self.taken_back += 1;
            return self.enter(Phase::Failed, message, now);
        }
        let Some(step) = self.current_step(shift) else { return };
        let part = self.parts(shift, world).into_iter().find(|part| part.version == target);
        let share = part.map_or(0.0, |part| part.share);
        if share + 1e-9 < self.target_share(shift) {
            self.held_since = None;
            let ready = world.ready(&target);
            self.message = format!(
                "step {}: {target} has {ready} of {} endpoints ready that {} % of the load need",
                self.step + 1,
                (f64::from(self.full_load(shift)) * f64::from(step.weight) / 100.0).ceil(),
                step.weight
            );
            return;
        }
        self.message = format!("step {}: {target} has {} %", self.step + 1, percent(share));
        let since = *self.held_since.get_or_insert(now);
        if now.saturating_sub(since) < step.hold.as_millis() as u64 || !world.is_up_to_date() {
            return;
        }
        self.held_since = None;
        self.step += 1;
        if self.step >= self.steps(shift).len() {
            self.leaving = Some(std::mem::replace(&mut self.stable, target.clone()));
            self.enter(Phase::Succeeded, format!("{target} serves everything"), now);
        }
    }

    fn enter(&mut self, phase: Phase, message: String, now: Millis) {
        self.phase = phase;
        self.message = message;
        self.since = now;
    }
}

/// A share in percent, with as many digits as it needs, three at most.
pub fn percent(share: f64) -> f64 {
    (share * 100_000.0).round() / 1_000.0
}

/// How many endpoints a version has.
fn listed(shift: &TrafficShift, version: &str) -> u32 {
    shift.version(version).map_or(0, |version| version.endpoints.len() as u32)
}

#[cfg(test)]
mod tests;
