//! Each version's part in the traffic, by where the rollout stands and what can be carried.

use super::{LEVELS, Observed, Phase, Rollout, Warming};
use crate::shares::{Claim, shares, weights};
use tideshift_core::matching::Match;
use tideshift_core::policy::{Mirror, Rule, WeightedVersion};
use tideshift_core::shift::{ShiftService, Strategy, TrafficShift};

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
    /// Each version's part in a service of the shift, in the document's order.
    pub fn parts(&self, shift: &TrafficShift, service: &ShiftService, world: &impl Observed) -> Vec<Part> {
        let whole = f64::from(self.full_load(service));
        let wanted = self.wanted(shift, world);
        let available = |name: &str| world.available(&service.name, name);
        // Where nothing has been ready for long enough, what is ready at all must do.
        let none_available = service.versions.iter().all(|version| available(&version.name) == 0);
        let claims: Vec<Claim> = service
            .versions
            .iter()
            .map(|version| {
                let name = Some(&version.name);
                let is_target = name == self.target.as_ref();
                let ready =
                    if none_available { world.ready(&service.name, &version.name) } else { available(&version.name) };
                Claim {
                    wanted: match self.phase.is_under_way() {
                        true if is_target => wanted,
                        true if version.name == self.stable => 1.0 - wanted,
                        false if version.name == self.stable => 1.0,
                        _ => 0.0,
                    },
                    capacity: f64::from(ready) / whole,
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
        let versions = service.versions.iter().zip(shares.iter().zip(weights));
        versions
            .map(|(version, (share, weight))| Part {
                version: version.name.clone(),
                share: *share,
                weight,
                serving: weight > 0 || world.ready(&service.name, &version.name) > 0,
            })
            .collect()
    }

    /// The share of the target that all services have, 0 to 1: the smallest.
    pub(super) fn share(&self, target: &str, shift: &TrafficShift, world: &impl Observed) -> f64 {
        let of = |service: &ShiftService| {
            let parts = self.parts(shift, service, world);
            parts.into_iter().find(|part| part.version == target).map_or(0.0, |part| part.share)
        };
        shift.services.iter().map(of).fold(1.0, f64::min)
    }

    /// What a version can carry in every service, as a share of the load; above 1 if it has endpoints to spare.
    pub(super) fn capacity(&self, version: &str, shift: &TrafficShift, world: &impl Observed) -> f64 {
        let of = |service: &ShiftService| {
            f64::from(world.available(&service.name, version)) / f64::from(self.full_load(service))
        };
        shift.services.iter().map(of).fold(f64::INFINITY, f64::min)
    }

    /// The share that the target is to have in every service, 0 to 1.
    fn wanted(&self, shift: &TrafficShift, world: &impl Observed) -> f64 {
        let Some(target) = self.target.as_deref().filter(|_| self.phase.is_under_way()) else { return 0.0 };
        let steps = self.steps(shift);
        let before = self.step.checked_sub(1).and_then(|before| steps.get(before)).map_or(0, |step| step.weight);
        let step = steps.get(self.step).filter(|_| self.allowed).map_or(before, |step| step.weight);
        let weight = f64::from(self.weight_by_hand.unwrap_or(step)) / 100.0;
        let capacity = self.capacity(target, shift, world);
        let carried = match shift.strategy.whole_steps && capacity + 1e-9 < weight {
            true => f64::from(before) / 100.0,
            false => weight.min(capacity),
        };
        match (self.warming, self.goes_back(shift)) {
            (_, true) => carried,
            (Warming::Over, _) if shift.strategy.warm_up.seconds.is_zero() => carried,
            (Warming::Over, _) => carried.min(f64::from(self.level) / f64::from(LEVELS)),
            _ => 0.0,
        }
    }

    /// The rule that leads testers to the target, while there is one.
    pub fn testers(&self, shift: &TrafficShift) -> Option<Rule> {
        let target = self.target.clone().filter(|_| self.phase.is_under_way() && self.allowed)?;
        let matches: Vec<Match> = self.steps(shift).get(self.step)?.matches.clone();
        let versions = vec![WeightedVersion { name: target, weight: 1 }];
        let rule = Rule { name: Some("testers of the rollout".to_owned()), matches, versions, mirror: None };
        (!rule.matches.is_empty()).then_some(rule)
    }

    /// The copies that warm the target up, while they do.
    pub fn mirror(&self, shift: &TrafficShift) -> Option<Mirror> {
        let version = self.target.clone().filter(|_| self.phase == Phase::Progressing)?;
        let percent = shift.strategy.warm_up.mirror_percent?;
        matches!(self.warming, Warming::Since(_)).then(|| Mirror::of(version, percent))
    }
}

/// How many of the endpoints that the whole load needs may be missing, by Kubernetes' arithmetic: percentages are
/// rounded down, those of `maxSurge` up, and if both come to nothing, one may.
pub(super) fn max_unavailable(strategy: &Strategy, whole: u32) -> u32 {
    match (strategy.max_unavailable.of_rounded_down(whole), strategy.max_surge.of_rounded_up(whole)) {
        (0, 0) => 1,
        (unavailable, _) => unavailable,
    }
}
