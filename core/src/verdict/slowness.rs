//! "The target is slower than the stable version": the relative test on requests that take longer than a quantile of
//! the stable version's durations, frozen when a step starts.

use super::{Batch, Latency, LatencyJudgement, Sample, Totals};
use crate::evidence::{Evidence, RATIOS, log_mean_exp};
use crate::report::DURATION_BOUNDS;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// So many requests of the stable version are enough to know its quantiles.
const ENOUGH: u64 = 100;
/// The most that evidence grows in a second, as a logarithm: pauses make many requests slow at once.
const GROWTH_PER_SECOND: f64 = 2.0;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Slowness {
    /// One for each quantile.
    quantiles: Vec<Slow>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Slow {
    /// Of [`DURATION_BOUNDS`], the one that slow requests are above; none: not known yet.
    bound: Option<usize>,
    /// Whether a step has begun since, and with that another bound.
    #[serde(default)]
    is_old: bool,
    evidence: Evidence,
    batch: Batch,
    /// What came above the bound since it was frozen.
    all: Batch,
}

impl Slowness {
    pub(super) fn new() -> Self {
        Self { quantiles: Vec::new() }
    }

    /// What is slow is to be measured anew.
    pub(super) fn thaw(&mut self) {
        self.quantiles.iter_mut().for_each(|slow| slow.is_old = true);
    }

    /// Takes in what ended of target and stable version. `recent`: what the latter did before; `share`: what was to be
    /// expected at the target.
    pub(super) fn add(&mut self, latency: &Latency, recent: &Sample, ended: [&Sample; 2], share: f64, millis: u64) {
        let unknown = || Slow {
            bound: None,
            is_old: false,
            evidence: Evidence::new(RATIOS.len()),
            batch: Batch::default(),
            all: Batch::default(),
        };
        self.quantiles.resize_with(latency.quantiles.len(), unknown);
        for (slow, quantile) in self.quantiles.iter_mut().zip(&latency.quantiles) {
            slow.freeze(|| recent.bound_above(*quantile, latency.min_difference));
            let Some(bound) = slow.bound else { continue };
            let [target, stable] = ended.map(|sample| sample.slower_than(bound));
            slow.add(&Batch { target, stable, millis }, share);
        }
    }

    pub(super) fn judgement(&self, latency: &Latency, bound: f64) -> LatencyJudgement {
        let logs: Vec<f64> = self.quantiles.iter().map(|slow| slow.evidence.log()).collect();
        let each = self.quantiles.iter().zip(&latency.quantiles);
        let worst = each.max_by(|(a, _), (b, _)| a.evidence.log().total_cmp(&b.evidence.log()));
        let slower_than = worst.and_then(|(slow, _)| DURATION_BOUNDS.get(slow.bound?));
        LatencyJudgement {
            service: None,
            quantile: worst.map_or(0.0, |(_, quantile)| *quantile),
            slower_than: slower_than.copied().map(Duration::from_millis),
            target: worst.map_or_else(Totals::default, |(slow, _)| slow.all.target),
            stable: worst.map_or_else(Totals::default, |(slow, _)| slow.all.stable),
            evidence: if logs.is_empty() { 0.0 } else { super::told(log_mean_exp(&logs)) },
            bound,
        }
    }
}

impl Slow {
    /// Sets the bound where there is none, or none of this step: what was counted above another is of no use with it.
    fn freeze(&mut self, bound: impl Fn() -> Option<usize>) {
        if self.is_old || self.bound.is_none() {
            let bound = bound();
            (self.bound, self.is_old, self.all) = (bound, false, Batch::default());
            self.batch = Batch::default();
        }
    }

    fn add(&mut self, ended: &Batch, share: f64) {
        self.all.add(ended);
        self.batch.add(ended);
        if !self.batch.is_full(share) {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let most = batch.seconds() * GROWTH_PER_SECOND;
        if batch.target.errors > 0 || batch.stable.errors > 0 {
            self.evidence.add(RATIOS.map(|ratio| batch.tempered(ratio).min(most)));
        }
    }
}

impl Sample {
    /// Those whose duration is known, and how many of them took longer than this one of the bounds.
    fn slower_than(&self, bound: usize) -> Totals {
        let sum = |counts: &[u64]| counts.iter().fold(0, |sum: u64, count| sum.saturating_add(*count));
        Totals { requests: sum(&self.durations), errors: self.durations.get(bound + 1..).map_or(0, sum) }
    }

    /// The first of the bounds that is so much above the one that this share of the requests stay within. None: too few
    /// requests, or none of the bounds is.
    fn bound_above(&self, quantile: f64, more: Duration) -> Option<usize> {
        let all = self.slower_than(0).requests;
        let is_within = |bound: &usize| (self.slower_than(*bound).errors as f64) <= (1.0 - quantile) * all as f64;
        let within = (0..DURATION_BOUNDS.len()).find(is_within).filter(|_| all >= ENOUGH)?;
        let least = u128::from(*DURATION_BOUNDS.get(within)?) + more.as_millis();
        DURATION_BOUNDS.iter().position(|bound| u128::from(*bound) >= least)
    }
}
