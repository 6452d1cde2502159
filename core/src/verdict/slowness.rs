//! "The target is slower than the stable version": the relative test on requests that take longer than a quantile of
//! the stable version's durations, frozen when a step starts.

use super::clients::Clients;
use super::{Batch, Latency, LatencyJudgement, Request, Sample, Totals};
use crate::counts::DURATION_BOUNDS;
use crate::evidence::{Evidence, RATIOS, log_mean_exp};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The minimum number of requests of the stable version from which its quantiles are estimated.
const ENOUGH: u64 = 100;
/// The maximum growth of evidence per second, as a logarithm: a pause makes many requests slow at once.
const GROWTH_PER_SECOND: f64 = 2.0;

/// The input of one tick.
pub(super) struct News<'a> {
    /// The recent requests of the stable version.
    pub(super) recent: &'a Sample,
    /// The ended requests of the target and the stable version.
    pub(super) ended: [&'a Sample; 2],
    /// Single requests.
    pub(super) requests: &'a [Request],
    /// Whether there are only a few clients.
    pub(super) few: bool,
    /// The expected share of the target.
    pub(super) share: f64,
    /// The largest share at which requests that end now may have been dealt.
    pub(super) largest: f64,
    /// The elapsed time.
    pub(super) millis: u64,
    /// The maximum contribution of one client.
    pub(super) cap: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Slowness {
    /// One for each quantile.
    quantiles: Vec<Slow>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Slow {
    /// The index in [`DURATION_BOUNDS`] of the bound above which requests are slow; `None`: not known yet.
    bound: Option<usize>,
    /// Whether a new step, which needs a new bound, has begun since.
    #[serde(default)]
    is_old: bool,
    evidence: Evidence,
    /// The evidence from clients.
    #[serde(default)]
    clients: Clients,
    batch: Batch,
    /// The requests counted against the bound since it was frozen.
    all: Batch,
}

impl Slowness {
    pub(super) fn new() -> Self {
        Self { quantiles: Vec::new() }
    }

    /// Requests a new measurement of the bound of slow requests.
    pub(super) fn thaw(&mut self) {
        self.quantiles.iter_mut().for_each(|slow| slow.is_old = true);
    }

    /// Adds requests that ended.
    pub(super) fn add(&mut self, latency: &Latency, news: &News<'_>) {
        let unknown = || Slow {
            bound: None,
            is_old: false,
            evidence: Evidence::new(RATIOS.len()),
            clients: Clients::default(),
            batch: Batch::default(),
            all: Batch::default(),
        };
        self.quantiles.resize_with(latency.quantiles.len(), unknown);
        let [target, stable] = news.ended;
        let started = (target.started, stable.started);
        for (slow, quantile) in self.quantiles.iter_mut().zip(&latency.quantiles) {
            slow.clients.pass(news.millis);
            slow.freeze(|| news.recent.bound_above(*quantile, latency.min_difference));
            let Some(bound) = slow.bound else { continue };
            let [target, stable] = news.ended.map(|sample| sample.slower_than(bound));
            slow.add(&Batch { target, stable, started, millis: news.millis }, news.share, news.few);
            let is_slow = |request: &&Request| request.is_sampled && request.duration > bound;
            for request in news.requests.iter().filter(is_slow) {
                slow.clients.add(request, news.largest, news.few, news.cap);
            }
        }
    }

    /// The judgement of durations; based on requests only if there are only a few clients.
    pub(super) fn judgement(&self, latency: &Latency, few: bool, bound: f64) -> LatencyJudgement {
        let log = |slow: &Slow| match few {
            true => log_mean_exp(&[slow.evidence.log(), slow.clients.log()]),
            false => slow.clients.log(),
        };
        let logs: Vec<f64> = self.quantiles.iter().map(log).collect();
        let each = self.quantiles.iter().zip(&latency.quantiles);
        let worst = each.max_by(|(a, _), (b, _)| log(a).total_cmp(&log(b)));
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
    /// Freezes the bound if there is none for this step: counts against another bound are useless with it.
    fn freeze(&mut self, bound: impl Fn() -> Option<usize>) {
        if self.is_old || self.bound.is_none() {
            let bound = bound();
            (self.bound, self.is_old, self.all) = (bound, false, Batch::default());
            self.batch = Batch::default();
        }
    }

    fn add(&mut self, ended: &Batch, share: f64, few: bool) {
        self.all.add(ended);
        if !few {
            return;
        }
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
    /// The requests with a known duration, and how many of them took longer than this bound. A request that its client
    /// cancelled after that time was slow; one cancelled earlier says nothing.
    fn slower_than(&self, bound: usize) -> Totals {
        let sum = |counts: &[u64]| counts.iter().fold(0, |sum: u64, count| sum.saturating_add(*count));
        let above = |counts: &[u64]| counts.get(bound + 1..).map_or(0, sum);
        let given_up = above(&self.waited);
        Totals {
            requests: sum(&self.durations).saturating_add(given_up),
            errors: above(&self.durations).saturating_add(given_up),
        }
    }

    /// The first bound that exceeds the quantile by the required margin. `None`: too few requests, or no bound is large
    /// enough.
    fn bound_above(&self, quantile: f64, more: Duration) -> Option<usize> {
        let known = Self { durations: self.durations.clone(), ..Self::default() };
        let all = known.slower_than(0).requests;
        let is_within = |bound: &usize| (known.slower_than(*bound).errors as f64) <= (1.0 - quantile) * all as f64;
        let within = (0..DURATION_BOUNDS.len()).find(is_within).filter(|_| all >= ENOUGH)?;
        let least = u128::from(*DURATION_BOUNDS.get(within)?) + more.as_millis();
        DURATION_BOUNDS.iter().position(|bound| u128::from(*bound) >= least)
    }
}
