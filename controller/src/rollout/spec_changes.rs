//! Reacts to changes of the document: starts and ends rollouts, and finds the step from which one under way continues.

use crate::clock::Millis;
use crate::rollout::allocation::{level_of, percent, share_of};
use crate::rollout::{Phase, Reason, Rollout, RolloutInputs, Warming};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use tideshift_core::shift::{OnDelete, ShiftService, ShiftVersion, Step, TrafficShift};

/// The parts of a document that start or end rollouts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Said {
    pub stable: String,
    pub target: Option<String>,
    /// The edited stable version, if gates lie before it: it becomes the target.
    #[serde(default)]
    pub gated: Option<String>,
    /// The versions that were removed from it and continued to serve.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left: BTreeSet<String>,
    /// Whether its traffic goes to the default route on deletion.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drains: bool,
}

impl Said {
    pub(super) fn new(shift: &TrafficShift) -> Self {
        let drains = shift.on_delete == OnDelete::Drain;
        Self { stable: shift.stable.clone(), target: None, gated: None, left: BTreeSet::new(), drains }
    }
}

/// The parts of a step that make it a different step when they change. Changes of its hold and its testers apply
/// directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Planned {
    weight: u32,
    pause: bool,
    /// Whether its share moves as a whole or not at all.
    whole: bool,
}

impl Planned {
    pub(super) fn weight(&self) -> u32 {
        self.weight
    }
}

/// How many endpoints of a version the document lists for each service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    version: String,
    endpoints: BTreeMap<String, u32>,
}

impl Rollout {
    /// Starts and ends rollouts where the document has changed.
    pub(super) fn observe_spec(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        if self.phase == Phase::Failed && self.outcome.is_empty() {
            // State from an older build.
            self.outcome.clone_from(&self.message);
        }
        self.know_services(shift, world);
        self.said.drains = shift.on_delete == OnDelete::Drain;
        let is_gated = self.is_stable_gated(shift);
        let was_gated = self.said.gated.as_ref() == Some(&shift.stable);
        let serves_by_now = was_gated && self.stable == shift.stable;
        let left: BTreeSet<String> = shift.leaving().map(str::to_owned).collect();
        let leaves = left.contains(&self.stable);
        let is_news_of_stable = leaves && !self.said.left.contains(&self.stable);
        // A rollout moves traffic away from a removed version that serves, as from any other version.
        let is_stranded = leaves && !is_gated && !self.phase.is_under_way();
        let is_edited = self.said.stable != shift.stable && !is_stranded;
        if !is_gated && !serves_by_now && (is_edited || !shift.has(&self.stable)) {
            self.observe_stable(shift, now);
        }
        let is_gone = self.target.as_ref().is_some_and(|target| !shift.declares(target));
        let has_failed = self.phase == Phase::Failed && self.target == shift.target && !is_news_of_stable;
        let wanted = match shift.target.as_ref().filter(|_| !is_gated) {
            Some(target) if !(is_stranded && has_failed) => Some(target),
            None if !is_gated && !is_stranded => None,
            _ => Some(&shift.stable),
        };
        let target = wanted.cloned().filter(|target| *target != self.stable);
        let is_under_way = self.phase.is_under_way() && self.target == target;
        let is_news = if is_gated {
            (!was_gated || is_gone) && !is_under_way
        } else {
            self.said.target != shift.target || is_gone || is_stranded
        };
        // Counts from before the rollout begins do not belong to it, and proxies may still have to report them.
        let is_early = is_news && target.is_some() && !is_gone && !world.is_up_to_date();
        if !is_early {
            self.said.gated = is_gated.then(|| shift.stable.clone());
        }
        match target {
            _ if is_early || !is_news => {}
            Some(target) => self.start(target, shift, world, now),
            None => self.withdraw(shift, world, now),
        }
        if !is_gated {
            self.said.stable.clone_from(&shift.stable);
        }
        if !is_early {
            self.said.target.clone_from(&shift.target);
            self.observe_left(left, shift, now);
        }
        self.observe_steps(shift, world, now);
    }

    /// Records a transition for each version that was removed from the document and continues to serve.
    fn observe_left(&mut self, left: BTreeSet<String>, shift: &TrafficShift, now: Millis) {
        let before = std::mem::replace(&mut self.said.left, left.clone());
        for version in left.difference(&before) {
            self.record(Reason::VersionLeft, self.leaving_in_words(version, shift), now);
        }
    }

    /// The message about a version that was removed from the document and continues to serve.
    pub fn leaving_in_words(&self, version: &str, shift: &TrafficShift) -> String {
        let target = self.target.as_ref().filter(|target| self.phase.is_under_way() && *target != version);
        let next = target.or(Some(&self.stable)).filter(|next| *next != version).unwrap_or(&shift.stable);
        // The deadline is known from the next reconcile on.
        let deadline = shift.leaving_until(version).filter(|until| *until > 0).map(crate::clock::timestamp);
        let until = match (self.holds_by_gate(version, shift), deadline) {
            (true, _) => "and as long as a gate is closed".to_owned(),
            (false, Some(deadline)) => format!("at the latest at {deadline:.0}"),
            (false, None) => format!("at the latest for {} s", shift.drain_timeout.as_secs()),
        };
        format!("{version} left the document; it keeps serving until {next} is ready, {until}")
    }

    /// Makes a version that already serves the stable version, until the document's version has replaced it.
    pub(super) fn goes_on_from(
        &mut self,
        serving: &str,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) {
        self.stable = serving.to_owned();
        self.endpoints_for_full_load = self.load(shift, world);
        self.message = format!("{serving} serves already");
        self.outcome.clone_from(&self.message);
        self.said.stable = serving.to_owned();
        match &shift.target {
            Some(target) if target == serving => {
                self.said = Said { target: Some(target.clone()), ..Said::new(shift) };
            }
            Some(target) if *target != shift.stable => self.said.stable.clone_from(&shift.stable),
            // Gates lie before a version that is not known to have served.
            _ if self.is_stable_gated(shift) => {}
            _ => {
                self.said = Said { target: shift.target.clone(), ..Said::new(shift) };
                self.start(shift.stable.clone(), shift, world, now);
            }
        }
    }

    /// Follows an edited `stable`, or the removal of the stable version.
    fn observe_stable(&mut self, shift: &TrafficShift, now: Millis) {
        let is_gone = !shift.has(&self.stable);
        if is_gone {
            // The document's target applies again, after a user had set another one.
            self.said.target = None;
        }
        let old = (self.stable != shift.stable).then(|| std::mem::replace(&mut self.stable, shift.stable.clone()));
        self.leaving = old.clone().or(self.leaving.take());
        self.served_before = old.clone().or(self.served_before.take());
        let stable = self.stable.clone();
        let why = if is_gone { "which is gone from the document" } else { "as the document says" };
        let ends = self.target.as_ref() == Some(&stable) || !self.phase.is_under_way();
        match old {
            Some(old) if ends => {
                self.rest(shift, Reason::StableChanged, format!("{stable} serves instead of {old}, {why}"), now)
            }
            Some(old) => {
                // Counts of the previous stable version do not apply to the new one.
                self.begun.clear();
                self.stable_had.clear();
                let message = format!("step {}: {stable} is the stable version instead of {old}, {why}", self.step + 1);
                self.announce(self.phase, Reason::StableChanged, message, now);
            }
            None if ends => self.rest(shift, Reason::Serving, format!("{stable} serves"), now),
            None => {}
        }
    }

    /// A new service of the document needs the endpoints that the stable version should have of it, and has no counts.
    fn know_services(&mut self, shift: &TrafficShift, world: &impl RolloutInputs) {
        for service in &shift.services {
            if self.endpoints_for_full_load.contains_key(&service.name) {
                continue;
            }
            self.endpoints_for_full_load.insert(service.name.clone(), desired_of(service, &self.stable));
            if let Some(target) = self.target.as_ref().filter(|_| self.phase.is_under_way()) {
                self.counted_before.insert(service.name.clone(), world.counts(&service.name, target));
            }
        }
    }

    pub(super) fn start(&mut self, target: String, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        let superseded = self.target.clone().filter(|old| self.phase.is_under_way() && *old != target);
        self.leaving = self.helper(Some(&target), shift, world);
        self.endpoints_for_full_load = self.load(shift, world);
        self.stable_had.clear();
        let counts = |service: &ShiftService| (service.name.clone(), world.counts(&service.name, &target));
        self.counted_before = shift.services.iter().map(counts).collect();
        self.number += 1;
        self.started = now;
        self.is_return = false;
        (self.level, self.level_since) = (0, now);
        self.quarantined = false;
        let (reason, instead) = match superseded {
            Some(old) => (Reason::Superseded, format!(" instead of {old}")),
            None => (Reason::Started, String::new()),
        };
        let message = format!("moving from {} to {target}{instead}", self.stable);
        self.target = Some(target);
        self.reset_gates(shift);
        let is_mirrored = shift.strategy.warm_up.mirror_percent.is_some() && !self.goes_back(shift);
        self.warming = if is_mirrored { Warming::Due } else { Warming::Over };
        self.unpause(now);
        self.begin_step(0, 0.0, shift, now);
        self.plan = self.planned(shift);
        (self.since, self.unattended) = (now, 0);
        self.announce(Phase::Progressing, reason, message, now);
    }

    /// How many endpoints carry the load when a rollout begins: as many as the stable version should have, and at least
    /// as many as are ready.
    fn load(&self, shift: &TrafficShift, world: &impl RolloutInputs) -> BTreeMap<String, u32> {
        let of = |service: &ShiftService| {
            let listed = service.version(&self.stable).map_or(0, |version| version.endpoints.len() as u32);
            let ready = world.ready(&service.name, &self.stable).min(listed);
            (service.name.clone(), desired_of(service, &self.stable).max(ready))
        };
        shift.services.iter().map(of).collect()
    }

    /// The version that carries what the stable version cannot once the current target is replaced: the current target
    /// or the previous such version, whichever has more traffic.
    fn helper(&self, next: Option<&String>, shift: &TrafficShift, world: &impl RolloutInputs) -> Option<String> {
        let parts: Vec<_> = self.all_parts(shift, world).into_iter().flatten().collect();
        let share = |version: &String| -> f64 {
            parts.iter().filter(|part| part.version == *version).map(|part| part.share).sum()
        };
        let target = self.target.as_ref().filter(|_| !self.quarantined);
        let candidates = [self.leaving.as_ref(), target].into_iter().flatten();
        let fit = candidates.filter(|version| **version != self.stable && Some(*version) != next);
        fit.max_by(|a, b| share(a).total_cmp(&share(b))).cloned()
    }

    /// Ends a rollout that is no longer wanted.
    pub(super) fn withdraw(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        let stable = self.stable.clone();
        let Some(target) = self.target.clone().filter(|_| self.phase.is_under_way()) else {
            return self.rest(shift, Reason::Serving, format!("{stable} serves"), now);
        };
        self.rollback_count += 1;
        self.leaving = self.helper(None, shift, world);
        let why = if shift.has(&target) { "is no longer the target" } else { "is gone from the document" };
        self.rest(shift, Reason::TargetWithdrawn, format!("{target} {why}; {stable} serves"), now);
    }

    fn rest(&mut self, shift: &TrafficShift, reason: Reason, outcome: String, now: Millis) {
        self.target = None;
        self.quarantined = false;
        self.unpause(now);
        self.begin_step(0, 0.0, shift, now);
        self.endpoints_for_full_load = desired(shift, &self.stable);
        self.listed = None;
        self.outcome.clone_from(&outcome);
        match (self.phase, self.reason) == (Phase::Initialized, reason) && reason == Reason::Serving {
            true => self.message = outcome,
            false => self.announce(Phase::Initialized, reason, outcome, now),
        }
    }

    /// Follows edited steps in a rollout under way. It continues from the last step that does not increase its share,
    /// and applies that step's gates, hold and analysis. Edits that affect only steps after the current one leave the
    /// current step unchanged. If the edit alone would increase the share, or if it removes the current pause, the
    /// rollout keeps its share until it is promoted or resumed.
    fn observe_steps(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        let plan = self.planned(shift);
        if plan == self.plan && (!self.phase.is_under_way() || self.step < plan.len()) {
            return self.note_gates(shift);
        }
        let old = std::mem::replace(&mut self.plan, plan);
        self.keep_gates(&old.iter().map(Planned::weight).collect::<Vec<_>>(), shift);
        let is_known = !old.is_empty() || self.step >= self.plan.len();
        let Some(target) = self.target.clone().filter(|_| self.phase.is_under_way() && is_known) else { return };
        let (of, words) = (self.plan.len(), "the document's steps have changed");
        let until_now = old.get(..=self.step);
        if until_now.is_some() && until_now == self.plan.get(..=self.step) {
            let message = format!("step {}: {words}; {target} stays at step {0} of {of}", self.step + 1);
            return self.announce(self.phase, Reason::StepsChanged, message, now);
        }
        let had = old.get(self.step).map_or(0.0, |step| f64::from(step.weight) / 100.0);
        let goal = match self.weight_by_hand {
            Some(weight) => f64::from(weight) / 100.0,
            None if self.allowed => had,
            None => self.goal(shift),
        };
        let goal = goal.min(self.frozen.map_or(1.0, share_of));
        let share = self.wanted_of(goal, shift, world);
        // An edit does not give the target more than it has had.
        let has_had = |step: &Step| step.weight * 1_000 <= level_of(share);
        let steps = self.steps(shift);
        let step = steps.iter().rposition(has_had).unwrap_or(0);
        let was_pause = self.allowed && !self.skip_hold && old.get(self.step).is_some_and(|step| step.pause);
        let is_pause = steps.get(step).is_some_and(|step| step.pause);
        // A share that it was to get anyway, once it has endpoints or is warm, does not count as an increase.
        let was_whole = old.get(self.step).is_some_and(|step| step.whole);
        let promised = if was_whole { share } else { share.max(goal) };
        let is_ahead = goes_ahead(steps.get(step..).unwrap_or_default(), promised);
        let stays = self.weight_by_hand.is_none() && (self.edited || is_ahead || (was_pause && !is_pause));
        self.begin_step(step, share, shift, now);
        let has = percent(share);
        if stays {
            let level = self.frozen.map_or(level_of(share), |frozen| frozen.min(level_of(promised)));
            self.freeze_at(level, now);
            self.edited = true;
            let message =
                format!("step {}: {words}; {target} stays at {has} % until it is promoted or resumed", step + 1);
            return self.announce(Phase::Paused, Reason::StepsChanged, message, now);
        }
        let message = format!("step {}: {words}; {target}, which has {has} %, goes on at step {0} of {of}", step + 1);
        self.announce(self.phase, Reason::StepsChanged, message, now);
    }

    /// The first step that does not reduce this share of the target; if the share moves as a whole or not at all, the
    /// last step whose share it already has.
    pub(super) fn step_from(&self, share: f64, shift: &TrafficShift) -> usize {
        let steps = self.steps(shift);
        let has = |weight: u32| level_of(share) >= weight * 1_000;
        match shift.strategy.whole_steps {
            true => steps.iter().rposition(|step| has(step.weight)).unwrap_or(0),
            false => {
                let no_step_back = |weight: u32| weight * 1_000 >= level_of(share);
                steps.iter().position(|step| no_step_back(step.weight)).unwrap_or(steps.len().saturating_sub(1))
            }
        }
    }

    pub(super) fn planned(&self, shift: &TrafficShift) -> Vec<Planned> {
        let whole = shift.strategy.whole_steps && !self.goes_back(shift);
        self.steps(shift).iter().map(|step| Planned { weight: step.weight, pause: step.pause, whole }).collect()
    }

    /// While nothing is being moved, the stable version's replica count defines how many endpoints carry the load.
    pub(super) fn follow_workload(&mut self, shift: &TrafficShift) {
        for service in &shift.services {
            let replicas = service.version(&self.stable).and_then(|version| version.replicas).filter(|n| *n > 0);
            replicas.map(|replicas| self.endpoints_for_full_load.insert(service.name.clone(), replicas));
        }
    }

    /// The same for listed endpoints: if their number changes while nothing is being moved, it defines how many
    /// endpoints carry the load. Endpoints that are discovered in a cluster do not count as listed: they come and go.
    pub(super) fn follow_document(&mut self, shift: &TrafficShift) {
        let of = |service: &ShiftService| {
            let is_listed = |version: &&ShiftVersion| version.discovery.is_none() && version.workload.is_none();
            let version = service.version(&self.stable).filter(is_listed)?;
            Some((service.name.clone(), version.endpoints.len() as u32))
        };
        let endpoints: BTreeMap<String, u32> = shift.services.iter().filter_map(of).collect();
        let listed = Listed { version: self.stable.clone(), endpoints };
        if self.listed.as_ref() == Some(&listed) {
            return;
        }
        let before = self.listed.take().filter(|before| before.version == listed.version);
        for (service, endpoints) in &listed.endpoints {
            if before.as_ref().and_then(|before| before.endpoints.get(service)).is_some_and(|n| n != endpoints) {
                self.endpoints_for_full_load.insert(service.clone(), *endpoints);
            }
        }
        self.listed = Some(listed);
    }
}

/// Whether these steps exceed a share before a hold or a pause.
fn goes_ahead(steps: &[Step], share: f64) -> bool {
    for step in steps {
        if step.weight * 1_000 > level_of(share) {
            return true;
        }
        if step.pause || !step.hold.is_zero() {
            return false;
        }
    }
    false
}

/// By service: how many endpoints a version should have.
pub(super) fn desired(shift: &TrafficShift, version: &str) -> BTreeMap<String, u32> {
    shift.services.iter().map(|service| (service.name.clone(), desired_of(service, version))).collect()
}

/// The only version that serves, according to the cluster: the stable version should have no pods, and this version,
/// the target or the only other one, has ready endpoints in every service.
pub(super) fn serves_alone<'s>(shift: &'s TrafficShift, world: &impl RolloutInputs) -> Option<&'s str> {
    let is_empty = |service: &ShiftService| {
        let stable = service.version(&shift.stable);
        stable.is_some_and(|stable| stable.replicas == Some(0)) && world.ready(&service.name, &shift.stable) == 0
    };
    let is_ready = |version: &&str| shift.services.iter().all(|service| world.ready(&service.name, version) > 0);
    if !shift.services.iter().all(is_empty) {
        return None;
    }
    let ready: Vec<&str> = shift.versions().filter(is_ready).collect();
    match (shift.target.as_deref().filter(|target| ready.contains(target)), ready.as_slice()) {
        (Some(target), _) => Some(target),
        (None, [only]) => Some(only),
        _ => None,
    }
}

fn desired_of(service: &ShiftService, version: &str) -> u32 {
    service.version(version).map_or(0, ShiftVersion::desired)
}
