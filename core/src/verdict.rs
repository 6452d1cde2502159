//! The verdict on a rollout: what the counts of all proxies say of the target version, `pass`, `fail` or `undecided`.
//!
//! Sequential tests, valid however often one looks. What they ask, how rarely they are wrong, how fast they are and
//! what they cannot see: `docs/verdict.md`. What follows from a verdict is for the rollout engine to say.

use crate::decode::Decoder;
use crate::evidence::{Batch, Evidence, RATIOS, bits, log_mean_exp, tilt};
use crate::report::DURATION_BOUNDS;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::Write;
use std::time::Duration;

/// The `maxErrorRate` of documents that ask for an analysis and do not name one.
pub const DEFAULT_MAX_ERROR_RATE: f64 = 0.02;

/// An error counts in full where it stands in for an answer that is missing; what comes on top of the requests that
/// were to be expected, or beside as many answers as were, may be one client that tries again and again: it counts
/// as one error in so many milliseconds.
const CLUMP_MILLIS: u64 = 1_500;
/// No more errors than this count for each second: what is over in less than half a second does not fail a target.
const ERRORS_PER_SECOND: f64 = 12.0;
/// As many errors at most come together because of one cause. The second kind of evidence divides by this.
const CLUMP: f64 = 10.0;
/// The most that the second kind grows in a second, as a logarithm.
const GROWTH_PER_SECOND: f64 = 16.0;
/// The absolute test: how many times the allowed odds.
const ODDS: [f64; 4] = [1.5, 3.0, 10.0, 100.0];
/// A batch of the absolute test: so many requests of the stable version, to see whether it does well at the time, and
/// so many milliseconds.
const ABSOLUTE_BATCH: u64 = 20;
const ABSOLUTE_MILLIS: u64 = 1_000;
/// The most that one such batch adds, as a logarithm.
const ABSOLUTE_GROWTH: f64 = 4.0;
/// The stable version's recent past: from so many requests on up to twice as many.
const RECENT: u64 = 5_000;
/// So many of them are enough to know its quantiles.
const ENOUGH_FOR_QUANTILES: u64 = 100;
/// From so many requests of a step on, the target's measured share is believed.
const ENOUGH_FOR_SHARE: u64 = 100;
/// How much lower than `maxErrorRate` the odds are that the test for `pass` bets on.
const PASS_ODDS: [f64; 3] = [1.0 / 30.0, 1.0 / 8.0, 1.0 / 3.0];
/// The most that evidence for latency grows in a second, as a logarithm.
const SLOW_GROWTH_PER_SECOND: f64 = 2.0;
/// Evidence is told up to here: what comes after is no different, and JSON knows no infinity.
const MOST_EVIDENCE: f64 = 1e15;

/// How a rollout is judged: `analysis` of a document.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// α: how often at most a target that is no worse than the stable version is said to fail, for each rollout.
    /// 1e-9 to 0.1; default 0.001.
    pub false_rollback_rate: f64,
    /// The error rate that a target must be below to pass. 0.0001 to 0.5; `None`: nobody asks for a pass.
    pub max_error_rate: Option<f64>,
    /// How sure of that a pass is. 0.5 to 0.9999; default 0.95.
    pub pass_confidence: f64,
    /// Whether and how durations are judged too.
    pub latency: Option<Latency>,
    /// A fixed limit to the target's errors in a rollout, if there is one. Not part of the verdict: whoever runs the
    /// rollout compares.
    pub max_errors: Option<u64>,
}

/// How durations are judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Latency {
    /// The stable version's quantiles that a request of the target should not take longer than; each 0.5 to 0.999.
    /// Default 0.9 and 0.99.
    pub quantiles: Vec<f64>,
    /// What takes less than this longer than the quantile is not slow. Default 10 ms.
    pub min_difference: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            false_rollback_rate: 0.001,
            max_error_rate: None,
            pass_confidence: 0.95,
            latency: None,
            max_errors: None,
        }
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self { quantiles: vec![0.9, 0.99], min_difference: Duration::from_millis(10) }
    }
}

impl Settings {
    /// Reads `analysis`. One with nothing but `maxErrors` asks for no pass.
    pub fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let rate = f.optional(d, "falseRollbackRate", |d, v| d.number(v, 1e-9, 0.1));
        let max_error_rate = f.optional(d, "maxErrorRate", |d, v| d.number(v, 0.0001, 0.5));
        let confidence = f.optional(d, "passConfidence", |d, v| d.number(v, 0.5, 0.9999));
        let latency = f.optional(d, "latency", Latency::read);
        let max_errors = f.optional(d, "maxErrors", |d, v| d.integer(v, 0, u64::MAX));
        let only_a_limit = f.has("maxErrors") && value.as_object().is_some_and(|fields| fields.len() == 1);
        f.finish(d);
        Some(Self {
            false_rollback_rate: rate.unwrap_or(default.false_rollback_rate),
            max_error_rate: max_error_rate.or((!only_a_limit).then_some(DEFAULT_MAX_ERROR_RATE)),
            pass_confidence: confidence.unwrap_or(default.pass_confidence),
            latency,
            max_errors,
        })
    }

    /// `fail` from this evidence on. Two tests share α if durations are judged too.
    fn bound(&self) -> f64 {
        let tests = if self.latency.is_some() { 2.0 } else { 1.0 };
        tests / self.false_rollback_rate
    }
}

impl Latency {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let quantiles = f.optional(d, "quantiles", |d, value| {
            let quantiles = d.list(value, |d, v| d.number(v, 0.5, 0.999))?;
            if value.as_array().is_some_and(|items| items.is_empty() || items.len() > 4) {
                d.invalid(value, "one to four quantiles, such as [0.9, 0.99]");
            }
            Some(quantiles.into_iter().map(|(_, quantile)| quantile).collect())
        });
        let difference = f.optional(d, "minDifferenceMillis", |d, v| d.integer(v, 0, 30_000));
        f.finish(d);
        Some(Self {
            quantiles: quantiles.unwrap_or(default.quantiles),
            min_difference: difference.map_or(default.min_difference, Duration::from_millis),
        })
    }
}

/// What ended of one version in some time, at all proxies: requests that were answered, not those that a client ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// Requests.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// How many took how long, as in [`crate::report::VersionReport::durations`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub durations: Vec<u64>,
}

impl Sample {
    fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.errors = self.errors.saturating_add(other.errors);
        if self.durations.len() < other.durations.len() {
            self.durations.resize(other.durations.len(), 0);
        }
        self.durations.iter_mut().zip(&other.durations).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
    }

    /// Forgets the older half as often as there is more than enough.
    fn keep_recent(&mut self) {
        while self.requests > 2 * RECENT {
            self.requests /= 2;
            self.errors /= 2;
            self.durations.iter_mut().for_each(|count| *count /= 2);
        }
    }

    fn timed(&self) -> u64 {
        self.durations.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Those that took longer than the bound with this index.
    fn slower_than(&self, bound: usize) -> u64 {
        self.durations.iter().skip(bound + 1).fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The index of the first bound of durations that is `more` milliseconds above the bound of a quantile.
    fn bound_above(&self, quantile: f64, more: u64) -> Option<usize> {
        let (all, mut below) = (self.timed(), 0u64);
        let at = self.durations.iter().position(|count| {
            below = below.saturating_add(*count);
            below as f64 >= quantile * all as f64
        });
        let least = DURATION_BOUNDS.get(at.filter(|_| all >= ENOUGH_FOR_QUANTILES)?)?.saturating_add(more);
        DURATION_BOUNDS.iter().position(|bound| *bound >= least)
    }
}

/// Requests and errors of one version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
}

impl Totals {
    fn add(&mut self, requests: u64, errors: u64) {
        self.requests = self.requests.saturating_add(requests);
        self.errors = self.errors.saturating_add(errors);
    }
}

/// What happened since the last tick. A tick is due when reports came in, at least 0.1 s and at most about 1 s after
/// the last one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tick {
    /// How long ago that is; more than a second counts as one.
    pub elapsed: Duration,
    /// The target's share of what weights give to target and stable version, 0 to 1.
    pub share: f64,
    /// What ended of the target.
    pub target: Sample,
    /// What ended of the stable version.
    pub stable: Sample,
}

/// Everything that is known of a rollout, and all that has to survive a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Analysis {
    target: Totals,
    stable: Totals,
    /// The same since the step began.
    step_target: Totals,
    step_stable: Totals,
    /// The stable version's recent past.
    recent: Sample,
    /// "Worse than the stable version", from errors that count sparingly.
    sparing: Evidence,
    /// The same, from all errors, divided by the size of clumps.
    tempered: Evidence,
    /// Until when no further error of a clump counts, in milliseconds from now.
    clump_millis: u64,
    /// "Worse than allowed".
    absolute: Evidence,
    /// Its running batch.
    batch_target: Totals,
    batch_stable: Totals,
    batch_millis: u64,
    /// How bad target and stable version were lately, by themselves.
    #[serde(with = "bits")]
    target_failing: Vec<f64>,
    #[serde(with = "bits")]
    stable_failing: Vec<f64>,
    /// For each quantile.
    slow: Vec<Slow>,
}

/// "Slower than a quantile of the stable version".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Slow {
    /// The index of the bound that slow requests are above; none: to be frozen at the next tick that can.
    bound: Option<usize>,
    evidence: Evidence,
    target: Totals,
    stable: Totals,
}

impl Analysis {
    /// Nothing seen yet. `baseline`: what ended of the stable version in its recent past, as far as that is known.
    pub fn new(settings: &Settings, baseline: &Sample) -> Self {
        let mut recent = baseline.clone();
        recent.keep_recent();
        let quantiles = settings.latency.as_ref().map_or(0, |latency| latency.quantiles.len());
        let slow = Slow {
            bound: None,
            evidence: Evidence::new(RATIOS.len()),
            target: Totals::default(),
            stable: Totals::default(),
        };
        Self {
            target: Totals::default(),
            stable: Totals::default(),
            step_target: Totals::default(),
            step_stable: Totals::default(),
            recent,
            sparing: Evidence::new(RATIOS.len()),
            tempered: Evidence::new(RATIOS.len()),
            clump_millis: 0,
            absolute: Evidence::new(ODDS.len()),
            batch_target: Totals::default(),
            batch_stable: Totals::default(),
            batch_millis: 0,
            target_failing: vec![0.0; ODDS.len()],
            stable_failing: vec![0.0; ODDS.len()],
            slow: vec![slow; quantiles],
        }
    }

    /// A step begins: a pass is to be earned anew, and what is slow is measured by the stable version of now.
    pub fn step_started(&mut self) {
        (self.step_target, self.step_stable) = Default::default();
        self.slow.iter_mut().for_each(|slow| slow.bound = None);
    }

    /// Takes in what ended since the last tick.
    pub fn tick(&mut self, settings: &Settings, tick: &Tick) {
        let millis = u64::try_from(tick.elapsed.as_millis()).unwrap_or(u64::MAX).clamp(1, 1_000);
        let (target, stable) = (&tick.target, &tick.stable);
        let batch = Batch {
            requests: target.requests,
            errors: target.errors.min(target.requests),
            others_requests: stable.requests,
            others_errors: stable.errors.min(stable.requests),
        };
        self.judge_slowness(settings, tick, millis);
        self.compare(&batch, tick.share, millis);
        self.judge_alone(settings, &batch, tick.share, millis);
        for (target, stable) in [(&mut self.target, &mut self.stable), (&mut self.step_target, &mut self.step_stable)] {
            target.add(batch.requests, batch.errors);
            stable.add(batch.others_requests, batch.others_errors);
        }
        self.recent.add(stable);
        self.recent.keep_recent();
    }

    /// The relative test.
    fn compare(&mut self, batch: &Batch, share: f64, millis: u64) {
        let counted = self.counted(batch, share, millis);
        let (errors, others, share) = (batch.errors as f64, batch.others_errors as f64, batch.share());
        if errors + others > 0.0 {
            self.sparing.add(RATIOS.map(|ratio| tilt(counted, counted + others, share, ratio)));
            let most = GROWTH_PER_SECOND * millis as f64 / 1e3;
            let tempered = |ratio| (tilt(errors, errors + others, share, ratio) / CLUMP).min(most);
            self.tempered.add(RATIOS.map(tempered));
        }
    }

    /// As how many errors those of the target count that may have come in a clump.
    fn counted(&mut self, batch: &Batch, share: f64, millis: u64) -> f64 {
        let seen = self.step_target.requests.saturating_add(self.step_stable.requests);
        let measured = self.step_target.requests as f64 / seen.max(ENOUGH_FOR_SHARE) as f64;
        let share = if share.is_finite() { share.clamp(0.0, 1.0).max(measured) } else { 1.0 };
        let answers = (batch.requests - batch.errors) as f64;
        let missing = share * (batch.requests as f64 + batch.others_requests as f64) - answers - answers.sqrt();
        let most = missing.clamp(0.0, ERRORS_PER_SECOND * millis as f64 / 1e3);
        self.clump_millis = self.clump_millis.saturating_sub(millis);
        let alone = if self.clump_millis == 0 && batch.errors > 0 {
            self.clump_millis = CLUMP_MILLIS;
            1.0
        } else {
            0.0
        };
        most.max(alone).min(batch.errors as f64)
    }

    /// What is allowed at all: a little more than what the stable version did lately, and what the document allows.
    fn allowed(&self, settings: &Settings) -> f64 {
        let (requests, errors) = (self.recent.requests as f64, self.recent.errors as f64);
        let most = (errors + 4.5 + 3.0 * (errors + 2.25).sqrt()) / requests.max(1.0);
        settings.max_error_rate.unwrap_or(DEFAULT_MAX_ERROR_RATE).max(most.min(0.5))
    }

    /// The absolute test, and whether both are bad.
    fn judge_alone(&mut self, settings: &Settings, batch: &Batch, share: f64, millis: u64) {
        let allowed = self.allowed(settings);
        let least = settings.max_error_rate.unwrap_or(allowed);
        let failing = |logs: &mut Vec<f64>, errors: u64, requests: u64| {
            for (log, odds) in logs.iter_mut().zip(ODDS) {
                *log = log.max(0.0) + tilt(errors as f64, requests as f64, least, odds) / CLUMP;
            }
        };
        failing(&mut self.target_failing, batch.errors, batch.requests);
        failing(&mut self.stable_failing, batch.others_errors, batch.others_requests);

        self.batch_target.add(batch.requests, batch.errors);
        self.batch_stable.add(batch.others_requests, batch.others_errors);
        self.batch_millis = self.batch_millis.saturating_add(millis);
        let can_compare = self.batch_stable.requests >= ABSOLUTE_BATCH || share >= 1.0;
        if self.batch_millis < ABSOLUTE_MILLIS || !can_compare {
            return;
        }
        let (target, stable) = (std::mem::take(&mut self.batch_target), std::mem::take(&mut self.batch_stable));
        self.batch_millis = 0;
        // While the stable version fails too, the target is not to blame.
        if stable.errors as f64 <= allowed * stable.requests as f64 {
            let evidence = |odds| tilt(target.errors as f64, target.requests as f64, allowed, odds) / CLUMP;
            self.absolute.add(ODDS.map(|odds| evidence(odds).min(ABSOLUTE_GROWTH)));
        }
    }

    /// The relative test once more, on "takes longer than".
    fn judge_slowness(&mut self, settings: &Settings, tick: &Tick, millis: u64) {
        let Some(latency) = &settings.latency else { return };
        let more = u64::try_from(latency.min_difference.as_millis()).unwrap_or(u64::MAX);
        let most = SLOW_GROWTH_PER_SECOND * millis as f64 / 1e3;
        for (slow, quantile) in self.slow.iter_mut().zip(&latency.quantiles) {
            slow.bound = slow.bound.or_else(|| self.recent.bound_above(*quantile, more));
            let Some(bound) = slow.bound else { continue };
            let of = |sample: &Sample| (sample.timed(), sample.slower_than(bound));
            let ((requests, errors), (others_requests, others_errors)) = (of(&tick.target), of(&tick.stable));
            let batch = Batch { requests, errors, others_requests, others_errors };
            slow.target.add(requests, errors);
            slow.stable.add(others_requests, others_errors);
            let (errors, others, share) = (errors as f64, others_errors as f64, batch.share());
            if errors + others > 0.0 {
                let evidence = |ratio| (tilt(errors, errors + others, share, ratio) / CLUMP).min(most);
                slow.evidence.add(RATIOS.map(evidence));
            }
        }
    }

    /// What all that says.
    pub fn judgement(&self, settings: &Settings) -> Judgement {
        let relative = log_mean_exp(&[self.sparing.log(), self.tempered.log()]);
        let evidence = told(log_mean_exp(&[relative, self.absolute.log()]));
        let bound = settings.bound();
        let is_failing = |logs: &[f64]| log_mean_exp(logs) >= libm::log(bound);
        let both_bad = is_failing(&self.target_failing) && is_failing(&self.stable_failing) && told(relative) < bound;
        let pass_evidence = settings.max_error_rate.map_or(0.0, |most| {
            let (requests, errors) = (self.step_target.requests as f64, self.step_target.errors as f64);
            told(log_mean_exp(&PASS_ODDS.map(|odds| tilt(errors, requests, most, odds))))
        });
        let mut judgement = Judgement {
            outcome: Outcome::Undecided,
            both_bad,
            target: self.target,
            stable: self.stable,
            evidence,
            bound,
            max_error_rate: settings.max_error_rate,
            pass_evidence,
            pass_bound: 1.0 / (1.0 - settings.pass_confidence),
            latency: self.slowness(settings),
        };
        judgement.decide(settings.max_error_rate.is_some());
        judgement
    }

    fn slowness(&self, settings: &Settings) -> Option<LatencyJudgement> {
        let latency = settings.latency.as_ref()?;
        let logs: Vec<f64> = self.slow.iter().map(|slow| slow.evidence.log()).collect();
        let most = self
            .slow
            .iter()
            .zip(&latency.quantiles)
            .max_by(|(a, _), (b, _)| a.evidence.log().total_cmp(&b.evidence.log()));
        let (slow, quantile) = most?;
        let bound = slow.bound.and_then(|bound| DURATION_BOUNDS.get(bound)).copied();
        Some(LatencyJudgement {
            quantile: *quantile,
            slower_than: bound.map(Duration::from_millis),
            target: slow.target,
            stable: slow.stable,
            evidence: told(log_mean_exp(&logs)),
            bound: settings.bound(),
        })
    }
}

/// The evidence of which this is the logarithm.
fn told(log: f64) -> f64 {
    libm::exp(log).min(MOST_EVIDENCE)
}

/// What the counts say of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It fails less than it may.
    Pass,
    /// It is worse than the stable version, or than is allowed.
    Fail,
    /// Neither can be said yet.
    Undecided,
}

/// A verdict and what it rests on.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The verdict.
    pub outcome: Outcome,
    /// Both versions fail more than is allowed, and the target is not known to be the worse one: hold, and blame nobody.
    pub both_bad: bool,
    /// The target's requests since the rollout began.
    pub target: Totals,
    /// The stable version's.
    pub stable: Totals,
    /// How many times as likely the counts are if the target is worse; at most 1 on average if it is not. 0 to 1e15.
    pub evidence: f64,
    /// `fail` from this evidence on.
    pub bound: f64,
    /// What the target must stay below to pass; none: nobody asks for a pass.
    pub max_error_rate: Option<f64>,
    /// Evidence that it does, since the step began; 0 if nobody asks.
    pub pass_evidence: f64,
    /// `pass` from this on.
    pub pass_bound: f64,
    /// The same of durations, if they are judged.
    pub latency: Option<LatencyJudgement>,
}

/// What durations say of the target.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyJudgement {
    /// The quantile with the most evidence.
    pub quantile: f64,
    /// Requests that take longer than this are slow; none as long as too little is known of the stable version.
    pub slower_than: Option<Duration>,
    /// The target's requests since the rollout began, and how many of them were slow.
    pub target: Totals,
    /// The stable version's.
    pub stable: Totals,
    /// Evidence that the target is slower.
    pub evidence: f64,
    /// `fail` from this evidence on.
    pub bound: f64,
}

impl LatencyJudgement {
    /// In words, without the outcome.
    pub fn in_words(&self, target: &str, stable: &str) -> String {
        let Some(slower_than) = self.slower_than else {
            return format!("latency: too few requests of {stable} to know what is slow");
        };
        format!(
            "{target}: {} of {} took more than {} ms, {stable}: {} of {}; evidence {}, bound {}",
            grouped(self.target.errors),
            grouped(self.target.requests),
            grouped(slower_than.as_millis() as u64),
            grouped(self.stable.errors),
            grouped(self.stable.requests),
            number(self.evidence),
            number(self.bound),
        )
    }
}

impl Judgement {
    fn decide(&mut self, passes: bool) {
        let is_slow = self.latency.as_ref().is_some_and(|latency| latency.evidence >= latency.bound);
        self.outcome = match () {
            () if self.evidence >= self.bound && !self.both_bad => Outcome::Fail,
            () if is_slow && !self.both_bad => Outcome::Fail,
            () if passes && self.pass_evidence >= self.pass_bound && !self.both_bad => Outcome::Pass,
            () => Outcome::Undecided,
        };
    }

    /// One verdict on a rollout of several services. None: no service.
    pub fn of_all(judgements: &[Self]) -> Option<Self> {
        let mut all = judgements.first()?.clone();
        all.evidence = judgements.iter().map(|one| one.evidence).sum::<f64>() / judgements.len() as f64;
        all.bound = judgements.iter().map(|one| one.bound).fold(0.0, f64::max);
        all.both_bad = judgements.iter().any(|one| one.both_bad);
        for one in judgements.iter().skip(1) {
            all.target.add(one.target.requests, one.target.errors);
            all.stable.add(one.stable.requests, one.stable.errors);
            all.pass_evidence = all.pass_evidence.min(one.pass_evidence);
        }
        let passes = judgements.iter().all(|one| one.outcome == Outcome::Pass);
        all.decide(passes);
        Some(all)
    }

    /// In words.
    pub fn in_words(&self, target: &str, stable: &str) -> String {
        let mut words = String::new();
        if self.both_bad {
            let _ = write!(words, "hold: both {stable} and {target} fail; ");
        }
        let _ = write!(
            words,
            "{target}: {} of {} failed, {stable}: {} of {}; evidence {}, bound {}",
            grouped(self.target.errors),
            grouped(self.target.requests),
            grouped(self.stable.errors),
            grouped(self.stable.requests),
            number(self.evidence),
            number(self.bound),
        );
        if let Some(latency) = &self.latency {
            let _ = write!(words, "; {}", latency.in_words(target, stable));
        }
        if let Some(most) = self.max_error_rate.filter(|_| self.outcome != Outcome::Fail) {
            let (evidence, bound) = (number(self.pass_evidence), number(self.pass_bound));
            let _ = write!(words, "; that fewer than {} % fail: {evidence}, bound {bound}", most * 100.0);
        }
        let outcome = match self.outcome {
            Outcome::Pass => "pass",
            Outcome::Fail => "fail",
            Outcome::Undecided => "undecided",
        };
        let _ = write!(words, ": {outcome}");
        words
    }
}

/// With thousands separated.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Whole from 10 on, else with one decimal.
fn number(number: f64) -> String {
    match number {
        10.0.. => grouped(number as u64),
        _ => format!("{number:.1}"),
    }
}
