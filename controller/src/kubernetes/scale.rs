//! How many pods each version's workload should have: the target's as many as its step needs, a few at a time; the
//! stable version's never fewer than a rollback needs; those of a version that traffic has left none, once it has
//! drained. Pure. Who has named no workload is left alone, and so is every version that no rollout has moved traffic to
//! or from.

use super::picture::{Autoscaler, Picture, Place, View};
use super::resolve::{self, place};
use crate::rollout::{Millis, Phase, Rollout};
use std::collections::BTreeSet;
use tideshift_core::shift::{ShiftService, ShiftVersion, TrafficShift, WorkloadRef};

/// What should be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Where.
    pub place: Place,
    /// What.
    pub change: Change,
    /// Why, in words.
    pub why: String,
}

/// A change of one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// A workload is to have so many pods.
    Replicas {
        /// The workload.
        workload: WorkloadRef,
        /// How many.
        replicas: u32,
    },
    /// A HorizontalPodAutoscaler is to leave its workload at least so many pods.
    MinReplicas {
        /// Its name.
        autoscaler: String,
        /// How many.
        min: u32,
        /// What it said before a rollout raised it, to be written down; `None`: that is restored, nothing to remember.
        before: Option<u32>,
    },
}

/// What a rollout looks like to whoever scales.
pub struct Facts<'a> {
    /// The document, with its endpoints.
    pub shift: &'a TrafficShift,
    /// Where its rollout stands.
    pub rollout: &'a Rollout,
    /// What is known of the clusters.
    pub picture: &'a Picture,
    /// Since when a version is given nothing and when it had drained, if it has; by service and version.
    pub drained: &'a dyn Fn(&str, &str) -> Option<(Millis, Millis)>,
    /// The time.
    pub now: Millis,
}

impl Facts<'_> {
    /// What should be changed now; nothing while not everything can be seen.
    pub fn plan(&self) -> Vec<Want> {
        let mut wants = Vec::new();
        for service in &self.shift.services {
            for version in &service.versions {
                wants.extend(self.of(service, version));
            }
        }
        wants
    }

    fn of(&self, service: &ShiftService, version: &ShiftVersion) -> Option<Want> {
        let workload = version.workload.as_ref()?;
        let place = place(self.shift, version);
        let view = self.picture.view(&place)?;
        let table = view.workloads.get(&(workload.api_version.clone(), workload.kind.clone()))?;
        let now = table.objects.get(&workload.name)?.replicas;
        let want = |change, why: String| Some(Want { place: place.clone(), change, why });
        let replicas = |replicas| Change::Replicas { workload: workload.clone(), replicas };
        let autoscaler = view.autoscalers.objects.iter().find(|(_, autoscaler)| scales(autoscaler, workload));
        if let Some((needed, why)) = self.needed(service, version) {
            let raise = autoscaler.filter(|_| now > 0).map(|(name, autoscaler)| {
                let min = needed.min(autoscaler.max);
                let before = Some(autoscaler.min_before.unwrap_or(autoscaler.min));
                (autoscaler.min < min).then(|| Change::MinReplicas { autoscaler: name.clone(), min, before })
            });
            return match raise {
                // Its autoscaler does the rest; two that scale one workload would fight.
                Some(change) => want(change?, why),
                None if needed > now => want(replicas(needed), why),
                None => None,
            };
        }
        if self.is_left(service, version) && now > 0 {
            let (floor, why) = self.floor(service, version, view);
            if floor < now {
                return want(replicas(floor), why);
            }
        }
        // Nothing is needed any more: the autoscaler gets back what it had.
        let (name, autoscaler) = autoscaler.filter(|_| !self.rollout.phase.is_under_way())?;
        let min = autoscaler.min_before?;
        let change = Change::MinReplicas { autoscaler: name.clone(), min, before: None };
        want(change, format!("{} is over", if self.rollout.number > 0 { "the rollout" } else { "what raised it" }))
    }

    /// How many pods a version must have at least while the rollout is where it is, and why.
    fn needed(&self, service: &ShiftService, version: &ShiftVersion) -> Option<(u32, String)> {
        let rollout = self.rollout;
        let full = rollout.full_load(service);
        let is_target = rollout.target.as_ref() == Some(&version.name);
        let is_stable = rollout.stable == version.name;
        match rollout.phase.is_under_way() {
            true if is_target => {
                let step = rollout.current_step(self.shift)?;
                let weight = rollout.weight_by_hand.unwrap_or(step.weight);
                let needed = (u64::from(full) * u64::from(weight)).div_ceil(100).max(1) as u32;
                // Back to what served before: nobody should wait for batches.
                if rollout.goes_back(self.shift) {
                    return Some((needed, format!("{} is to serve again", version.name)));
                }
                let ready = version.endpoints.len() as u32;
                let batch = self.shift.strategy.max_surge.of_rounded_up(full).max(1);
                let number = rollout.step + 1;
                let why = format!("step {number} gives {} {weight} % of what {full} pods carry", version.name);
                Some((needed.min(ready.saturating_add(batch)), why))
            }
            true if is_stable => Some((full, format!("{} must be able to take everything back", version.name))),
            false if is_stable && rollout.phase == Phase::Failed => {
                Some((full, format!("{} has taken everything back", version.name)))
            }
            _ => None,
        }
    }

    /// Whether a rollout has moved traffic away from a version, and that has stopped for long enough.
    fn is_left(&self, service: &ShiftService, version: &ShiftVersion) -> bool {
        let rollout = self.rollout;
        let name = &version.name;
        let is_in_use =
            rollout.stable == *name || (rollout.phase.is_under_way() && rollout.target.as_ref() == Some(name));
        let Some((since, drained)) = (self.drained)(&service.name, name) else { return false };
        let named = rollout.target.as_ref() == Some(name) || rollout.leaving.as_ref() == Some(name);
        let was_used = rollout.number > 0 && (since >= rollout.started || named);
        let delay = self.shift.strategy.scale_down_delay.as_millis() as u64;
        // While a rollout is under way, what it comes from may be needed again.
        let may_be_needed = rollout.phase.is_under_way() && rollout.leaving.as_ref() == Some(name);
        !is_in_use && was_used && !may_be_needed && self.now.saturating_sub(drained.max(rollout.since)) >= delay
    }

    /// How many pods of a version that nobody needs must stay, because a PodDisruptionBudget has promised them.
    fn floor(&self, service: &ShiftService, version: &ShiftVersion, view: &View) -> (u32, String) {
        let pods = |version: &ShiftVersion, only_ready: bool| -> BTreeSet<String> {
            let discovery = version.discovery.as_ref();
            discovery.map(|discovery| resolve::pods(view, discovery, only_ready)).unwrap_or_default()
        };
        let own = pods(version, false);
        let place = place(self.shift, version);
        let others = service
            .versions
            .iter()
            .filter(|other| other.name != version.name && resolve::place(self.shift, other) == place);
        let others: BTreeSet<String> = others.flat_map(|other| pods(other, true)).collect();
        let promised = view.budgets.objects.iter().filter_map(|(name, budget)| {
            let covers =
                |pod: &String| view.pods.objects.get(pod).is_some_and(|labels| budget.selector.selects(labels));
            let is_covered = own.iter().any(covers);
            let elsewhere = others.difference(&own).filter(|pod| covers(pod)).count() as u32;
            is_covered.then(|| (budget.min_available.saturating_sub(elsewhere), name))
        });
        match promised.max() {
            Some((floor, name)) if floor > 0 => (
                floor,
                format!("{} has drained; PodDisruptionBudget {name} promises {floor} of its pods", version.name),
            ),
            _ => (0, format!("{} has drained", version.name)),
        }
    }
}

fn scales(autoscaler: &Autoscaler, workload: &WorkloadRef) -> bool {
    let group = |api_version: &str| api_version.split_once('/').map_or(String::new(), |(group, _)| group.to_owned());
    let WorkloadRef { api_version, kind, name } = &autoscaler.target;
    group(api_version) == group(&workload.api_version) && *kind == workload.kind && *name == workload.name
}
