//! A rollout under way: what rolls the target back, what blocks the next step, and what the passing of time does.

use super::{AnalysisResult, Phase, Reason, Rollout, RolloutInputs, Warming};
use crate::clock::Millis;
use crate::rollout::allocation;
use crate::rollout::allocation::{EPSILON, level_of, percent};
use crate::rollout::shortfall::{Shortfall, of_service, sentences};
use tideshift_core::counts::Counts;
use tideshift_core::shift::{ShiftService, TrafficShift};

/// Why a target is rolled back, and its failed requests.
struct Failure {
    reason: Reason,
    why: String,
    errors: u64,
    requests: u64,
}

impl Rollout {
    /// Begins a step; `share` is the target's share so far.
    pub(super) fn begin_step(&mut self, step: usize, share: f64, shift: &TrafficShift, now: Millis) {
        self.step = step;
        self.steps_begun += 1;
        self.allowed = !self.needs_gate(step, shift);
        self.gate_says = None;
        self.held_since = None;
        self.held = false;
        self.begun.clear();
        self.skip_hold = false;
        self.before = Some(level_of(share));
        self.reached = level_of(share);
        self.most_ready = 0;
        self.get_further(now);
    }

    /// Records progress: the progress deadline starts again.
    pub(super) fn get_further(&mut self, now: Millis) {
        self.progressed = now;
        self.unblocked_since = self.unblocked_since.map(|_| now);
    }

    pub(super) fn progress(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        let Some(target) = self.target.clone() else { return };
        let counted = shift.services.iter().map(|service| self.counted_on(shift, service, &target, world)).sum();
        if counted > self.most_ready {
            self.most_ready = counted;
            self.get_further(now);
        }
        if let Some(failure) = self.failure(&target, shift, world, now) {
            // More than half of its requests failed: any other version is better, even a stable version that is too
            // small.
            self.quarantined = failure.errors.saturating_mul(2) > failure.requests;
            return self.take_back(failure.reason, &failure.why, now);
        }
        if !self.allowed && !self.needs_gate(self.step, shift) {
            self.allowed = true;
        }
        self.take_stock(&target, shift, world, now);
        let unmeasured = self.unmeasured(&target, shift, world, now);
        self.count_measured(unmeasured.is_none(), now);
        self.warm_up(&target, shift, world, now);
        self.reached = self.reached.max(level_of(self.wanted(shift, world)));
        let shortfall = self.shortfall(shift, world);
        let steps = self.steps(shift);
        if let Some((phase, reason, why)) = self.obstacle(&target, &shortfall, unmeasured, shift, world, now) {
            let message = format!("step {}: {why}", self.step + 1);
            self.enter(phase, reason, message, shortfall, now);
        } else if let Some(next) = steps.get(self.step + 1) {
            self.begin_step(self.step + 1, self.wanted(shift, world), shift, now);
            let message = format!("step {}: {target} is to get {} %", self.step + 1, next.weight);
            self.announce(Phase::Progressing, Reason::StepStarted, message, now);
        } else {
            self.leaving = Some(std::mem::replace(&mut self.stable, target.clone()));
            self.served_before.clone_from(&self.leaving);
            self.begin_step(0, 0.0, shift, now);
            self.outcome = format!("{target} serves everything");
            self.announce(Phase::Succeeded, Reason::Completed, self.outcome.clone(), now);
        }
    }

    /// Why the target must be rolled back; `None` if it need not be.
    fn failure(&self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Option<Failure> {
        if self.goes_back(shift) {
            return None;
        }
        let verdict = world.verdict();
        if verdict.fails {
            let AnalysisResult { words, errors, requests, worst, .. } = verdict;
            // The failing service alone decides how bad the failure is: healthy services do not improve the result.
            let (errors, requests) = worst.map_or((errors, requests), |worst| (worst.errors, worst.requests));
            // If guards have counts of the failure itself, earlier successful requests do not improve the result
            // either.
            let (errors, requests) = self.fails_most(target, shift, world).unwrap_or((errors, requests));
            return Some(Failure { reason: Reason::VerdictFail, why: words, errors, requests });
        }
        let (errors, requests) = self.counted(target, shift, world);
        if let Some(limit) = shift.analysis.max_errors.filter(|limit| errors > *limit) {
            let why = format!("{target}: {errors} of {requests} requests failed, more than the {limit} allowed");
            return Some(Failure { reason: Reason::TooManyErrors, why, errors, requests });
        }
        let waits = self.allowed && !self.paused && shift.strategy.abort_at_deadline && self.is_stuck(shift, now);
        let missing = shift.services.iter().find_map(|service| self.missing_of_target(shift, service, world));
        let why =
            format!("{}; no progress for {} s", missing.filter(|_| waits)?, shift.strategy.progress_deadline.as_secs());
        Some(Failure { reason: Reason::ProgressDeadlineExceeded, why, errors: 0, requests: 0 })
    }

    /// Whether it has waited for endpoints for longer than the progress deadline.
    fn is_stuck(&self, shift: &TrafficShift, now: Millis) -> bool {
        let longest = shift.strategy.progress_deadline.as_millis() as u64;
        self.unblocked_since.is_none() && now.saturating_sub(self.progressed) >= longest
    }

    /// Excludes the time without waiting for endpoints from the progress deadline. The first completed hold is
    /// progress.
    fn count_waiting(&mut self, waits: bool, hold: Millis, now: Millis) {
        let is_held = self.held(now).is_some_and(|held| held >= hold);
        match (waits, self.unblocked_since) {
            (true, Some(since)) => {
                let is_progress = is_held && !self.held;
                self.held |= is_held;
                self.progressed = if is_progress { now } else { self.progressed + now.saturating_sub(since) };
                self.unblocked_since = None;
            }
            (false, None) => self.unblocked_since = Some(now),
            _ => {}
        }
    }

    /// The target's errors and answers since the rollout began.
    fn counted(&self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs) -> (u64, u64) {
        let of = |service: &ShiftService| {
            let before = self.counted_before.get(&service.name).copied().unwrap_or_default();
            world.counts(&service.name, target).since(&before)
        };
        let counts = shift.services.iter().map(of).fold(Counts::default(), |sum, counts| sum + counts);
        (counts.error, counts.answered())
    }

    /// Rolls back: gives the stable version its traffic back.
    pub(super) fn take_back(&mut self, reason: Reason, why: &str, now: Millis) {
        let back = match self.quarantined {
            true => "all at once",
            false => "as far as it can carry the load",
        };
        self.rollback_count += 1;
        self.outcome = format!("{why}; back to {} {back}", self.stable);
        self.announce(Phase::Failed, reason, self.outcome.clone(), now);
    }

    /// Warms the target up: first mirrored requests, then a growing share of the requests. A paused rollout does not
    /// continue its warm-up.
    fn warm_up(&mut self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        if self.frozen.is_some() || self.is_unmeasured_for_long(now) {
            return;
        }
        let ramp = shift.strategy.warm_up.seconds.as_millis() as u64;
        let capacity = self.capacity(target, shift, world);
        self.warming = match self.warming {
            Warming::Due if self.allowed && capacity > 0.0 => Warming::Since(now),
            Warming::Since(since) if now.saturating_sub(since) >= ramp => Warming::Over,
            as_it_is => as_it_is,
        };
        if ramp == 0 || self.goes_back(shift) {
            self.level = level_of(1.0);
            return;
        }
        let passed = now.saturating_sub(self.level_since);
        if passed < 1_000 {
            return;
        }
        // The share does not grow for time in which no controller ran.
        let passed = passed.min(2_000);
        self.level = level_of(self.share(target, shift, world) + passed as f64 / ramp as f64);
        self.level_since = now;
    }

    /// Keeps the current share.
    pub(super) fn freeze(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        self.freeze_at(level_of(self.wanted(shift, world)), now);
    }

    pub(super) fn freeze_at(&mut self, level: u32, now: Millis) {
        self.frozen = Some(level);
        self.paused = true;
        if let Warming::Since(since) = self.warming {
            self.warming = Warming::Stopped(now.saturating_sub(since));
        }
    }

    /// Continues where it was paused.
    pub(super) fn unpause(&mut self, now: Millis) {
        (self.paused, self.weight_by_hand, self.level_since) = (false, None, now);
        (self.frozen, self.edited) = (None, false);
        if let Warming::Stopped(passed) = self.warming {
            self.warming = Warming::Since(now.saturating_sub(passed));
        }
    }

    /// What blocks the next step.
    fn obstacle(
        &mut self,
        target: &str,
        shortfall: &Shortfall,
        unmeasured: Option<(Reason, String)>,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Option<(Phase, Reason, String)> {
        let progressing = |reason, why| Some((Phase::Progressing, reason, why));
        let for_long = unmeasured.clone().filter(|_| self.is_unmeasured_for_long(now));
        let step = self.present(shift);
        let hold = step.hold.as_millis() as u64;
        let (share, goal) = (self.share(target, shift, world), self.goal(shift));
        let has_it = share + EPSILON >= goal;
        let shortage = self.shortage(target, shift, world);
        let is_warm = !matches!(self.warming, Warming::Since(_) | Warming::Stopped(_));
        self.count_waiting(self.allowed && !self.paused && is_warm && shortage.is_some(), hold, now);
        if !has_it {
            self.held_since = None;
        }
        let has = || shortfall.words().unwrap_or_else(|| format!("{target} has {} %", percent(share)));
        if self.paused {
            let (reason, paused) = match (self.weight_by_hand, self.edited) {
                (Some(_), _) => (Reason::WeightSet, "paused by hand"),
                (None, true) => {
                    (Reason::StepsChanged, "the document's steps have changed; paused until it is promoted or resumed")
                }
                (None, false) => (Reason::PausedByUser, "paused by hand"),
            };
            let missing = sentences(&shortfall.missing);
            let why = match has_it || !shortfall.strains.is_empty() {
                true => format!("{paused}; {}", has()),
                false if missing.is_empty() => format!("{paused}; {} of the {} % wanted", has(), percent(goal)),
                false => format!("{paused}; {} of the {} % wanted: {missing}", has(), percent(goal)),
            };
            return Some((Phase::Paused, reason, why));
        }
        if !self.allowed {
            let says = self.gate_says.as_deref().unwrap_or("its gate has not answered yet");
            return Some((Phase::Waiting, Reason::GateClosed, shortfall.beside(says.to_owned())));
        }
        if let Warming::Since(since) = self.warming {
            if let Some((reason, why)) = for_long {
                return progressing(reason, shortfall.beside(why));
            }
            let left = shift.strategy.warm_up.seconds.as_secs().saturating_sub(now.saturating_sub(since) / 1_000);
            let why = format!("{target} gets copies of requests for {left} s more");
            return progressing(Reason::WarmingUp, shortfall.beside(why));
        }
        if let Some(why) = shortage {
            self.held_since = None;
            let of_stable = shortfall.missing.iter().filter(|missing| **missing != why);
            let all = [&why].into_iter().chain(of_stable);
            let is_stuck = self.is_stuck(shift, now);
            let stuck = format!("no progress for {} s", shift.strategy.progress_deadline.as_secs());
            let all = all.chain(is_stuck.then_some(&stuck));
            return match (is_stuck, shortfall.strains.is_empty()) {
                (true, true) => progressing(Reason::ProgressDeadlineExceeded, sentences(all)),
                (true, false) => {
                    progressing(Reason::ProgressDeadlineExceeded, sentences(all.chain([&shortfall.holders])))
                }
                (false, false) => {
                    // A version that has never served has not been lost.
                    let reason = if self.strains.is_some() || !shortfall.nobody_serves {
                        Reason::EndpointsLost
                    } else {
                        Reason::WaitingForCapacity
                    };
                    progressing(reason, sentences(all.chain([&shortfall.holders])))
                }
                (false, true) => progressing(Reason::WaitingForCapacity, sentences(all)),
            };
        }
        if !has_it {
            let why = format!("{target} has {} % on its way to {} %", percent(share), percent(goal));
            return match (shortfall.words(), for_long) {
                (Some(words), _) => progressing(Reason::EndpointsLost, words),
                (None, Some((reason, why))) => progressing(reason, why),
                (None, None) => progressing(Reason::Ramping, why),
            };
        }
        if let Some(why) = self.kept_out(target, shift, world) {
            self.held_since = None;
            return progressing(Reason::GuardVeto, shortfall.beside(why));
        }
        self.held_since.get_or_insert(now);
        if self.skip_hold {
            return None;
        }
        if self.held(now).unwrap_or_default() < hold {
            if let Some((reason, why)) = for_long {
                return progressing(reason, shortfall.beside(why));
            }
            let reason = if shortfall.strains.is_empty() { Reason::Holding } else { Reason::EndpointsLost };
            return progressing(reason, has());
        }
        if !world.is_up_to_date() {
            return progressing(Reason::CatchingUp, has());
        }
        let verdict = world.verdict();
        if verdict.both_fail && !self.goes_back(shift) {
            return progressing(Reason::BothFailing, shortfall.beside(verdict.words));
        }
        if step.pause {
            let besides = for_long.map(|(_, why)| format!("; {why}")).unwrap_or_default();
            let why = format!("{}; paused until it is promoted{besides}", has());
            return Some((Phase::Paused, Reason::PauseStep, why));
        }
        if let Some((reason, why)) = unmeasured {
            return match for_long {
                Some(_) => progressing(reason, shortfall.beside(why)),
                None => progressing(self.reason_in_between(), has()),
            };
        }
        if !verdict.passes && !self.goes_back(shift) {
            return progressing(Reason::Undecided, shortfall.beside(verdict.words));
        }
        if goal > 0.0
            && !self.goes_back(shift)
            && let Some(why) = self.no_good_answer(target, shift, world)
        {
            return progressing(Reason::NoGoodAnswer, shortfall.beside(why));
        }
        if !world.counts_are_kept() && !self.goes_back(shift) {
            let why = format!("{}; it goes on once counts can be kept, see countsError", has());
            return progressing(Reason::CatchingUp, why);
        }
        None
    }

    /// The reason while proxies apply a revision, which takes a moment: the previous reason stays.
    fn reason_in_between(&self) -> Reason {
        use Reason::{Promoted, Resumed, Started, StepStarted, StepsChanged, Superseded};
        match self.reason {
            as_it_is @ (Started | Superseded | StepStarted | StepsChanged | Promoted | Resumed)
                if self.phase == Phase::Progressing =>
            {
                as_it_is
            }
            _ => Reason::Holding,
        }
    }

    /// The endpoints that are missing for the next step: of the target, or of the target and the stable version
    /// together.
    fn shortage(&self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs) -> Option<String> {
        shift.services.iter().find_map(|service| {
            self.missing_of_target(shift, service, world).or_else(|| {
                let full = self.full_load(service);
                let missing = allocation::max_unavailable(&shift.strategy, full);
                let counted = |version: &str| self.counted_on(shift, service, version, world);
                let together = counted(target) + counted(&self.stable);
                (together < full.saturating_sub(missing)).then(|| {
                    format!(
                        "{} and {target}{} have {together} of {full} endpoints ready together, and no more than \
                         {missing} may be missing",
                        self.stable,
                        of_service(shift, service),
                    )
                })
            })
        })
    }
}
