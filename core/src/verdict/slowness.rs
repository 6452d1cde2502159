//! "The target is slower than the stable version": the relative test on requests that take longer than a quantile of
//! the stable version's durations, frozen when a step starts.

use super::clients::Clients;
use super::{Batch, Latency, LatencyJudgement, Request, Sample, Totals};
use crate::counts::DURATION_BOUNDS;
use crate::evidence::{Evidence, RATIOS, log_mean_exp};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// So many requests of the stable version are enough to know its quantiles.
const ENOUGH: u64 = 100;
/// The most that evidence grows in a second, as a logarithm: pauses make many requests slow at once.
const GROWTH_PER_SECOND: f64 = 2.0;

/// What is new at a tick.
pub(super) struct News<'a> {
    /// What the stable version did before.
    pub(super) recent: &'a Sample,
    /// What ended of target and stable version.
    pub(super) ended: [&'a Sample; 2],
    /// Single requests.
    pub(super) requests: &'a [Request],
    /// Whether there are only a few clients.
    pub(super) few: bool,
    /// What was to be expected at the target.
    pub(super) share: f64,
    /// The largest share that what ends now may have been dealt at.
    pub(super) largest: f64,
    /// The time that has passed.
    pub(super) millis: u64,
    /// The most that one client adds.
    pub(super) cap: f64,
}

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
    /// The same from clients.
    #[serde(default)]
    clients: Clients,
    batch: Batch,
    /// What came above the bound since it was frozen.
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

    /// Takes in what ended.
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

    /// What durations say; of requests only if there are but a few clients.
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
    /// Sets the bound where there is none, or none of this step: what was counted above another is of no use with it.
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
    /// Those whose duration is known, and how many of them took longer than this one of the bounds. A request that its
    /// client gave up after that time was slow; one given up before says nothing.
    fn slower_than(&self, bound: usize) -> Totals {
        let sum = |counts: &[u64]| counts.iter().fold(0, |sum: u64, count| sum.saturating_add(*count));
        let above = |counts: &[u64]| counts.get(bound + 1..).map_or(0, sum);
        let given_up = above(&self.waited);
        Totals {
            requests: sum(&self.durations).saturating_add(given_up),
            errors: above(&self.durations).saturating_add(given_up),
        }
    }

    /// The first of the bounds that is so much above the one that this share of the requests stay within. None: too few
    /// requests, or none of the bounds is.
    fn bound_above(&self, quantile: f64, more: Duration) -> Option<usize> {
        let known = Self { durations: self.durations.clone(), ..Self::default() };
        let all = known.slower_than(0).requests;
        let is_within = |bound: &usize| (known.slower_than(*bound).errors as f64) <= (1.0 - quantile) * all as f64;
        let within = (0..DURATION_BOUNDS.len()).find(is_within).filter(|_| all >= ENOUGH)?;
        let least = u128::from(*DURATION_BOUNDS.get(within)?) + more.as_millis();
        DURATION_BOUNDS.iter().position(|bound| u128::from(*bound) >= least)
    }
}
