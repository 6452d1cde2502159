//! Collects the evidence for and against the targets from the counts as they arrive. [`tideshift_core::verdict`]
//! evaluates it, and the rollout engine acts on the result.

use crate::clock::Millis;
use crate::reconciler::ledger::{Ledger, Total};
use crate::reconciler::requests::Requests;
use crate::reconciler::{Baselines, CountState};
use crate::rollout::{Allocation, AnalysisResult, Rollout, ServiceOpinion};
use crate::status::{Judged, LatencyStatus, VerdictOutcome, VerdictStatus};
use serde::{Deserialize, Serialize};
use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tideshift_core::protocol::report::Tally;
use tideshift_core::shift::TrafficShift;
use tideshift_core::verdict::{Analysis, Judgement, Outcome, Sample, Tick, Totals};

/// The minimum interval between two ticks.
const TICK: Millis = 100;

/// By rollout. Persisted across restarts of the controller, together with the counts that it derives from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Analyses(BTreeMap<String, RolloutAnalysis>);

/// The analysis of one rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RolloutAnalysis {
    /// The number of the rollout.
    rollout: u64,
    step: usize,
    target: String,
    stable: String,
    ticked: Millis,
    /// By service.
    services: BTreeMap<String, OfService>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct OfService {
    analysis: Analysis,
    /// The counts of target and stable version that have been judged already.
    target: Cursor,
    stable: Cursor,
}

impl OfService {
    fn new(name: &str, [target, stable]: [&str; 2], ledger: &Ledger, recent: &Baselines) -> Self {
        let analysis = Analysis::new(recent.of(name, stable));
        Self { analysis, target: Cursor::now(ledger, name, target), stable: Cursor::now(ledger, name, stable) }
    }
}

/// The position up to which a version's counts have been judged.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Cursor(Total);

impl Cursor {
    pub(super) fn now(ledger: &Ledger, service: &str, version: &str) -> Self {
        Self(ledger.judged(service, version))
    }

    /// Whether a version has new counts.
    pub(super) fn is_behind(&self, ledger: &Ledger, service: &str, version: &str) -> bool {
        let session = self.0.session().map_or_else(Default::default, |session| session.ended);
        self.0.dealt.ended + session != ledger.judged_counts(service, version)
    }

    /// Takes a version's new counts and advances the cursor.
    pub(super) fn take(&mut self, ledger: &Ledger, service: &str, version: &str) -> Total {
        let now = ledger.judged(service, version);
        let new = now.since(&self.0);
        self.0 = now;
        new
    }
}

/// Converts counts to a sample for the verdict.
pub(super) fn sample(tally: Tally) -> Sample {
    let Tally { started, ended, durations, waited } = tally;
    Sample {
        requests: ended.answered(),
        errors: ended.error,
        client_errors: ended.client_error,
        cancelled: ended.cancelled,
        started,
        durations,
        waited,
    }
}

/// The result of processing a rollout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looked {
    /// Whether anything was new.
    pub(super) changed: bool,
    /// Whether everything new was taken; counts that arrive before the next tick are not.
    pub(super) all: bool,
}

impl Analyses {
    /// Removes rollouts that no longer exist.
    pub(super) fn retain(&mut self, is_known: impl Fn(&String) -> bool) {
        self.0.retain(|name, _| is_known(name));
    }

    /// Takes the new counts of a rollout, from those of its services that have any.
    pub(super) fn look(
        &mut self,
        shift: &TrafficShift,
        rollout: &Rollout,
        parts: impl FnOnce() -> Vec<Vec<Allocation>>,
        (counted, requests, new): (&CountState, &mut Requests, &BTreeSet<usize>),
        now: Millis,
    ) -> Looked {
        let Some(target) =
            rollout.target.as_ref().filter(|_| rollout.phase.is_under_way() && !rollout.goes_back(shift))
        else {
            return Looked { changed: false, all: true };
        };
        let (ledger, recent) = (&counted.ledger, &counted.recent);
        let known = self.0.get(&shift.name).is_some_and(|judge| {
            (judge.rollout, &judge.target, &judge.stable) == (rollout.number, target, &rollout.stable)
        });
        if !known {
            self.0.insert(shift.name.clone(), RolloutAnalysis::new(shift, rollout, target, ledger, recent, now));
            return Looked { changed: true, all: new.is_empty() };
        }
        let Some(judge) = self.0.get_mut(&shift.name) else { return Looked { changed: false, all: true } };
        judge.look(shift, rollout, parts, (ledger, recent, requests, new), now)
    }

    /// The evidence against a rollout's target and for it; `None` if it has not been judged.
    pub(super) fn evidence(&self, shift: &TrafficShift, rollout: &Rollout) -> Option<[f64; 2]> {
        let (_, judgement) = self.judgement(shift).filter(|(judge, _)| judge.rollout == rollout.number)?;
        Some([judgement.evidence, judgement.pass_evidence])
    }

    /// The analysis result that the rollout engine receives.
    pub(super) fn opinion(&self, shift: &TrafficShift) -> AnalysisResult {
        let nobody_asks = AnalysisResult { passes: true, ..AnalysisResult::default() };
        let Some((judge, judgement)) = self.judgement(shift) else { return nobody_asks };
        let worst = judgement.at.as_ref().map(|at| ServiceOpinion {
            service: at.service.clone(),
            requests: at.target.requests,
            errors: at.target.errors,
        });
        AnalysisResult {
            fails: judgement.outcome == Outcome::Fail,
            passes: judgement.outcome == Outcome::Pass || shift.analysis.max_error_rate.is_none(),
            both_fail: judgement.both_bad,
            requests: judgement.target.requests,
            errors: judgement.target.errors,
            worst,
            words: judgement.in_words(&judge.target, &judge.stable),
        }
    }

    /// The verdict in status form; `None` if this rollout has not been judged.
    pub(super) fn status(&self, shift: &TrafficShift, rollout: &Rollout) -> Option<VerdictStatus> {
        let (judge, judgement) = self.judgement(shift).filter(|(judge, _)| judge.rollout == rollout.number)?;
        let judged = |totals: Totals, version: &str| Judged {
            version: version.to_owned(),
            requests: totals.requests,
            errors: totals.errors,
        };
        Some(VerdictStatus {
            outcome: match judgement.outcome {
                Outcome::Pass => VerdictOutcome::Pass,
                Outcome::Fail => VerdictOutcome::Fail,
                Outcome::Undecided => VerdictOutcome::Undecided,
            },
            message: judgement.in_words(&judge.target, &judge.stable),
            target: judged(judgement.target, &judge.target),
            stable: judged(judgement.stable, &judge.stable),
            evidence: judgement.evidence,
            bound: judgement.bound,
            pass_evidence: judgement.pass_evidence,
            pass_bound: judgement.pass_bound,
            latency: judgement.latency.as_ref().map(|latency| LatencyStatus {
                message: latency.in_words(&judge.target, &judge.stable),
                evidence: latency.evidence,
                bound: latency.bound,
            }),
        })
    }

    fn judgement(&self, shift: &TrafficShift) -> Option<(&RolloutAnalysis, Judgement)> {
        let judge = self.0.get(&shift.name)?;
        let of_each = |(name, of): (&String, &OfService)| (name.clone(), of.analysis.judgement(&shift.analysis));
        let judgements: Vec<_> = judge.services.iter().map(of_each).collect();
        Some((judge, Judgement::of_all(&judgements)?))
    }
}

/// Whether no request ended. (Durations are present all the same, as zeros.)
fn is_nothing(sample: &Sample) -> bool {
    *sample == Sample { durations: sample.durations.clone(), waited: sample.waited.clone(), ..Sample::default() }
}

impl RolloutAnalysis {
    fn new(
        shift: &TrafficShift,
        rollout: &Rollout,
        target: &str,
        ledger: &Ledger,
        recent: &Baselines,
        now: Millis,
    ) -> Self {
        let of_service = |name: &String| OfService::new(name, [target, &rollout.stable], ledger, recent);
        Self {
            rollout: rollout.number,
            step: rollout.step,
            target: target.to_owned(),
            stable: rollout.stable.clone(),
            ticked: now,
            services: shift.services.iter().map(|of| (of.name.clone(), of_service(&of.name))).collect(),
        }
    }

    fn look(
        &mut self,
        shift: &TrafficShift,
        rollout: &Rollout,
        parts: impl FnOnce() -> Vec<Vec<Allocation>>,
        (ledger, recent, requests, new): (&Ledger, &Baselines, &mut Requests, &BTreeSet<usize>),
        now: Millis,
    ) -> Looked {
        let is_next_step = self.step != rollout.step;
        if is_next_step {
            self.step = rollout.step;
            self.services.values_mut().for_each(|service| service.analysis.step_started());
        }
        let elapsed = now.saturating_sub(self.ticked);
        if elapsed < TICK {
            return Looked { changed: is_next_step, all: new.is_empty() };
        }
        let mut ticked = false;
        let all_parts = LazyCell::new(parts);
        for (at, service) in new.iter().filter_map(|at| Some((*at, shift.services.get(*at)?))) {
            let new = || OfService::new(&service.name, [&self.target, &self.stable], ledger, recent);
            let of = self.services.entry(service.name.clone()).or_insert_with(new);
            let target = sample(of.target.take(ledger, &service.name, &self.target).dealt);
            let stable = sample(of.stable.take(ledger, &service.name, &self.stable).dealt);
            let requests = requests.take(&service.name, &self.target, &self.stable, now);
            if is_nothing(&target) && is_nothing(&stable) && requests.ended.is_empty() {
                continue;
            }
            let parts = || all_parts.get(at).into_iter().flatten();
            let share = |name: &str| parts().find(|part| part.version == name).map_or(0.0, |part| part.share);
            let (own, others) = (share(&self.target), share(&self.stable));
            let share = if own + others > 0.0 { own / (own + others) } else { 0.0 };
            let elapsed = Duration::from_millis(elapsed);
            let few_clients = requests.few_clients;
            let tick = Tick { elapsed, share, few_clients, target, stable, requests: requests.ended };
            of.analysis.tick(&shift.analysis, &tick);
            ticked = true;
        }
        if ticked {
            self.ticked = now;
        }
        Looked { changed: ticked || is_next_step, all: true }
    }
}
