//! The allocation of traffic to versions, from the state of the rollout and the capacity of the versions.

use crate::compile;
use crate::rollout::shares::{Claim, shares, weights};
use crate::rollout::{Rollout, RolloutInputs, Warming};
use tideshift_core::matching::Match;
use tideshift_core::protocol::policy::{Mirror, Rule};
use tideshift_core::shift::{ShiftService, ShiftVersion, Strategy, TrafficShift};

/// A version's current part of the traffic.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// The version's name.
    pub version: String,
    /// 0 to 1.
    pub share: f64,
    /// The share as a weight, relative to those of the other versions.
    pub weight: u32,
    /// Whether it can take requests at all.
    pub serving: bool,
}

impl Rollout {
    /// The allocation of each version of a service, in the document's order.
    pub fn parts(&self, shift: &TrafficShift, service: &ShiftService, world: &impl RolloutInputs) -> Vec<Allocation> {
        self.parts_with(self.wanted(shift, world), shift, service, world)
    }

    /// The same for all services of the document, in its order.
    pub fn all_parts(&self, shift: &TrafficShift, world: &impl RolloutInputs) -> Vec<Vec<Allocation>> {
        // The same for all services.
        let wanted = self.wanted(shift, world);
        shift.services.iter().map(|service| self.parts_with(wanted, shift, service, world)).collect()
    }

    fn parts_with(
        &self,
        wanted: f64,
        shift: &TrafficShift,
        service: &ShiftService,
        world: &impl RolloutInputs,
    ) -> Vec<Allocation> {
        let whole = f64::from(self.full_load(service));
        let counted = |name: &str| self.counted_on(shift, service, name, world);
        // If no endpoint has been ready for long enough, all ready endpoints count.
        let none = service.versions.iter().all(|version| counted(&version.name) == 0);
        let claim = |version: &ShiftVersion| {
            let name = Some(&version.name);
            let (is_target, is_stable) = (name == self.target.as_ref(), version.name == self.stable);
            let ready = if none { world.ready(&service.name, &version.name) } else { counted(&version.name) };
            let (reserve, turn) = match () {
                () if self.quarantined && is_target => (2, 0),
                () if is_stable => (0, 0),
                () if name == self.leaving.as_ref() && !is_target => (0, 1),
                // A removed version carries what other versions cannot carry yet.
                () if version.leaving_until.is_some() && !is_target => (0, 1),
                () if is_target => (0, 2),
                () => (1, 0),
            };
            let wanted = match self.phase.is_under_way() {
                true if is_target => wanted,
                true if is_stable => 1.0 - wanted,
                false if is_stable => 1.0,
                _ => 0.0,
            };
            Claim { wanted, capacity: f64::from(ready) / whole, reserve, turn }
        };
        let claims: Vec<Claim> = service.versions.iter().map(claim).collect();
        let shares = shares(&claims);
        let weights = weights(&shares);
        let versions = service.versions.iter().zip(shares.iter().zip(weights));
        versions
            .map(|(version, (share, weight))| Allocation {
                version: version.name.clone(),
                share: *share,
                weight,
                serving: weight > 0 || world.ready(&service.name, &version.name) > 0,
            })
            .collect()
    }

    /// The number of a version's endpoints that count: the ready ones. On the way forward the target's must have been
    /// ready for `minReadySeconds`. A version that serves already is not reduced for young endpoints, and a rollback
    /// does not wait.
    pub(super) fn counted_on(
        &self,
        shift: &TrafficShift,
        service: &ShiftService,
        version: &str,
        world: &impl RolloutInputs,
    ) -> u32 {
        match self.must_have_been_ready(shift, version) {
            true => world.available(&service.name, version),
            false => world.ready(&service.name, version),
        }
    }

    /// Whether a version's endpoints count only after `minReadySeconds`.
    pub(super) fn must_have_been_ready(&self, shift: &TrafficShift, version: &str) -> bool {
        self.phase.is_under_way() && self.target.as_deref() == Some(version) && !self.goes_back(shift)
    }

    /// The target's smallest share over all services, 0 to 1.
    pub(super) fn share(&self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs) -> f64 {
        let of =
            |parts: &Vec<Allocation>| parts.iter().find(|part| part.version == target).map_or(0.0, |part| part.share);
        self.all_parts(shift, world).iter().map(of).fold(1.0, f64::min)
    }

    /// The load that a version can carry in every service, as a share of the whole; above 1 if it has spare endpoints.
    pub(super) fn capacity(&self, version: &str, shift: &TrafficShift, world: &impl RolloutInputs) -> f64 {
        self.capacity_but(version, |_| 0, shift, world)
    }

    /// The same with additional endpoints: `more` returns how many, from the number for the whole load.
    fn capacity_but(
        &self,
        version: &str,
        more: impl Fn(u32) -> u32,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
    ) -> f64 {
        let of = |service: &ShiftService| {
            let full = self.full_load(service);
            let counted = self.counted_on(shift, service, version, world);
            f64::from(counted.saturating_add(more(full))) / f64::from(full)
        };
        shift.services.iter().map(of).fold(f64::INFINITY, f64::min)
    }

    /// The target's share by the state of the rollout, 0 to 1, regardless of capacity.
    pub(super) fn goal(&self, shift: &TrafficShift) -> f64 {
        let steps = self.steps(shift);
        let weight =
            |index: usize| steps.get(index).or(steps.last()).map_or(0.0, |step| f64::from(step.weight) / 100.0);
        let goal = match self.weight_by_hand {
            Some(by_hand) => f64::from(by_hand) / 100.0,
            None if self.allowed => weight(self.step),
            None => self.had_before(shift),
        };
        goal.min(self.frozen.map_or(1.0, share_of))
    }

    /// The share that the target had when the current step began.
    fn had_before(&self, shift: &TrafficShift) -> f64 {
        // State from older builds does not contain it.
        let weight = || self.steps(shift).get(self.step.checked_sub(1)?).map(|step| f64::from(step.weight) / 100.0);
        self.before.map(share_of).or_else(weight).unwrap_or(0.0)
    }

    /// The target's share in every service, 0 to 1, limited by capacity.
    pub(super) fn wanted(&self, shift: &TrafficShift, world: &impl RolloutInputs) -> f64 {
        self.wanted_of(self.goal(shift), shift, world)
    }

    /// The same for another goal.
    pub(super) fn wanted_of(&self, goal: f64, shift: &TrafficShift, world: &impl RolloutInputs) -> f64 {
        let Some(target) = self.target.as_deref().filter(|_| self.phase.is_under_way()) else { return 0.0 };
        let is_whole = shift.strategy.whole_steps && !self.goes_back(shift);
        let carried = match is_whole && !self.keeps_whole(goal, target, shift, world) {
            true => self.had_before(shift).min(goal),
            false => goal.min(self.capacity(target, shift, world)),
        };
        match (self.warming, self.goes_back(shift)) {
            (_, true) => carried,
            (Warming::Over, _) if shift.strategy.warm_up.seconds.is_zero() => carried,
            (Warming::Over, _) => carried.min(share_of(self.level)),
            _ => 0.0,
        }
    }

    /// Whether the target has the endpoints for a share that moves as a whole or not at all. Once it has moved,
    /// `maxUnavailable` applies as for other rollouts.
    fn keeps_whole(&self, goal: f64, target: &str, shift: &TrafficShift, world: &impl RolloutInputs) -> bool {
        let has_it = share_of(self.reached) + EPSILON >= goal;
        let may_miss = |full| if has_it { max_unavailable(&shift.strategy, full) } else { 0 };
        self.capacity_but(target, may_miss, shift, world) + EPSILON >= goal
    }

    /// The share that the target would have if no endpoint had been lost: the share that it had in this step already,
    /// or its current one.
    pub(super) fn meant(&self, shift: &TrafficShift, world: &impl RolloutInputs) -> f64 {
        let Some(target) = self.target.as_deref().filter(|_| self.phase.is_under_way()) else { return 0.0 };
        let had = share_of(self.reached).min(self.goal(shift));
        match self.capacity(target, shift, world) + EPSILON < had {
            true => had,
            false => self.wanted(shift, world),
        }
    }

    /// The rule that routes testers to the target, if the step has one.
    pub fn testers(&self, shift: &TrafficShift) -> Option<Rule> {
        let target = self.target.clone().filter(|_| self.phase.is_under_way() && self.allowed)?;
        let matches: Vec<Match> = self.steps(shift).get(self.step)?.matches.clone();
        (!matches.is_empty()).then(|| compile::testers(&target, matches))
    }

    /// The mirror that warms up the target, while the warm-up runs.
    pub fn mirror(&self, shift: &TrafficShift) -> Option<Mirror> {
        let version = self.target.clone().filter(|_| self.phase.is_under_way())?;
        let percent = shift.strategy.warm_up.mirror_percent?;
        matches!(self.warming, Warming::Since(_)).then(|| Mirror::of(version, percent))
    }
}

/// The scale of [`Rollout::level`] and the other persisted shares.
const LEVELS: u32 = 100_000;
/// Shares that differ by less are equal.
pub(super) const EPSILON: f64 = 1e-9;

/// A share in its persisted form, rounded down.
pub(super) fn level_of(share: f64) -> u32 {
    ((share * f64::from(LEVELS) + 1e-6) as u32).min(LEVELS)
}

/// The share of a persisted value.
pub(super) fn share_of(level: u32) -> f64 {
    f64::from(level) / f64::from(LEVELS)
}

/// A share in percent, with up to three decimals.
pub fn percent(share: f64) -> f64 {
    (share * 100_000.0).round() / 1_000.0
}

/// How many of the endpoints for the whole load may be missing, by Kubernetes' rules: percentages of `maxUnavailable`
/// are rounded down, those of `maxSurge` up, and if both are 0, one endpoint may be missing.
pub(super) fn max_unavailable(strategy: &Strategy, whole: u32) -> u32 {
    match (strategy.max_unavailable.of_rounded_down(whole), strategy.max_surge.of_rounded_up(whole)) {
        (0, 0) => 1,
        (unavailable, _) => unavailable,
    }
}
