//! The verdict on a rollout: what the counts of all proxies say of the target version, `pass`, `fail` or `undecided`.
//!
//! Sequential tests, valid however often one looks. What they ask, how rarely they are wrong, how fast they are and
//! what they cannot see: `docs/verdict.md`. What follows from a verdict is for the rollout engine to say, which counts
//! the target's errors against `maxErrors` too.

mod absolute;
mod judgement;
mod lately;
mod relative;
mod settings;
mod slowness;

pub use judgement::{At, Judgement, LatencyJudgement, Outcome, Totals};
pub use lately::Lately;
pub use settings::{DEFAULT_MAX_ERROR_RATE, Latency, Settings};

use crate::evidence::{log_mean_exp, tilt};
use absolute::Absolute;
use relative::Relative;
use serde::{Deserialize, Serialize};
use slowness::Slowness;
use std::time::Duration;

/// So many bad requests that come together because of one cause are as one.
const CLUMP: f64 = 10.0;
/// After so many requests of a step, the target's share of them is believed.
const ENOUGH_FOR_SHARE: u64 = 1_000;
/// How many times the odds of `maxErrorRate`: what the test for `pass` bets on.
const PASS_ODDS: [f64; 3] = [1.0 / 30.0, 1.0 / 8.0, 1.0 / 3.0];
/// What is more makes no difference, and JSON has no infinity.
const MOST_EVIDENCE: f64 = 1e15;

/// What ended of one version in some time, at all proxies: requests that were answered, and those that failed, but not
/// those that a client gave up.
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
    fn totals(&self) -> Totals {
        Totals { requests: self.requests, errors: self.errors.min(self.requests) }
    }

    /// Adds what ended later.
    fn add(&mut self, later: &Self) {
        self.requests = self.requests.saturating_add(later.requests);
        self.errors = self.errors.saturating_add(later.errors);
        self.durations.resize(self.durations.len().max(later.durations.len()), 0);
        self.durations.iter_mut().zip(&later.durations).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
    }
}

/// What happened since the last tick. One is due when reports came in, at least 0.1 s and at most about 1 s after the
/// one before.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tick {
    /// The time since then. More than 1 s is taken for 1 s.
    pub elapsed: Duration,
    /// The target's part, 0 to 1, of the weight that target and stable version have together now.
    pub share: f64,
    /// What ended of the target.
    pub target: Sample,
    /// What ended of the stable version.
    pub stable: Sample,
}

/// What ended of both versions in one stretch of time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Batch {
    target: Totals,
    stable: Totals,
    millis: u64,
}

impl Batch {
    fn add(&mut self, more: &Self) {
        self.target.add(more.target);
        self.stable.add(more.stable);
        self.millis = self.millis.saturating_add(more.millis);
    }

    fn all(&self) -> f64 {
        self.target.requests as f64 + self.stable.requests as f64
    }

    /// The target's part of the requests, 1 if there are none.
    fn share(&self) -> f64 {
        if self.all() > 0.0 { self.target.requests as f64 / self.all() } else { 1.0 }
    }

    fn seconds(&self) -> f64 {
        self.millis as f64 / 1e3
    }
}

/// All that is known of a rollout, and has to survive a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Analysis {
    /// Since the rollout began.
    all: Batch,
    /// Since the step began.
    step: Batch,
    /// The stable version lately.
    recent: Lately,
    relative: Relative,
    absolute: Absolute,
    slowness: Slowness,
}

impl Analysis {
    /// The beginning of a rollout. `baseline`: what the stable version did before, as far as that is known.
    pub fn new(baseline: Lately) -> Self {
        Self {
            all: Batch::default(),
            step: Batch::default(),
            recent: baseline,
            relative: Relative::new(),
            absolute: Absolute::new(),
            slowness: Slowness::new(),
        }
    }

    /// A step begins: a pass has to be earned anew, and what is slow is what is slower than the stable version is now.
    pub fn step_started(&mut self) {
        self.step = Batch::default();
        self.slowness.thaw();
    }

    /// Takes in what ended since the last tick.
    pub fn tick(&mut self, settings: &Settings, tick: &Tick) {
        let millis = u64::try_from(tick.elapsed.as_millis()).unwrap_or(u64::MAX).clamp(1, 1_000);
        let ended = Batch { target: tick.target.totals(), stable: tick.stable.totals(), millis };
        let (shares, recent) = (self.shares(tick.share), self.recent.sample());
        self.relative.add(&ended, shares);
        self.absolute.add(settings, recent.totals(), &ended, tick.share, shares.1);
        if let Some(latency) = &settings.latency {
            self.slowness.add(latency, &recent, [&tick.target, &tick.stable], shares.1, millis);
        }
        self.all.add(&ended);
        self.step.add(&ended);
        self.recent.add(&tick.stable);
    }

    /// The least and the most of the requests that are to be expected at the target: by its weight, and by what the step
    /// was like so far. Rules and sessions may give it more or less than its weight.
    fn shares(&self, share: f64) -> (f64, f64) {
        let by_weight = if share.is_finite() { share.clamp(0.0, 1.0) } else { 1.0 };
        let measured = if self.step.all() >= ENOUGH_FOR_SHARE as f64 { self.step.share() } else { by_weight };
        (by_weight.min(measured), by_weight.max(measured))
    }

    /// What all that says.
    pub fn judgement(&self, settings: &Settings) -> Judgement {
        let (relative, bound) = (self.relative.log(), settings.bound());
        let pass_evidence = settings.max_error_rate.map_or(0.0, |most| {
            let (requests, errors) = (self.step.target.requests as f64, self.step.target.errors as f64);
            told(log_mean_exp(&PASS_ODDS.map(|odds| tilt(errors, requests, most, odds))))
        });
        let mut judgement = Judgement {
            outcome: Outcome::Undecided,
            both_bad: self.absolute.both_bad(bound) && told(relative) < bound,
            target: self.all.target,
            stable: self.all.stable,
            at: None,
            evidence: told(log_mean_exp(&[relative, self.absolute.log()])),
            bound,
            max_error_rate: settings.max_error_rate,
            pass_evidence,
            pass_bound: settings.pass_bound(),
            latency: settings.latency.as_ref().map(|latency| self.slowness.judgement(latency, bound)),
        };
        judgement.decide(pass_evidence >= judgement.pass_bound);
        judgement
    }
}

/// The evidence of which this is the logarithm.
fn told(log: f64) -> f64 {
    libm::exp(log).min(MOST_EVIDENCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn settings() -> Settings {
        Settings { max_error_rate: Some(0.02), latency: Some(Latency::default()), ..Settings::default() }
    }

    fn sample(requests: u64, errors: u64) -> Sample {
        Sample { requests, errors, durations: Vec::new() }
    }

    fn known(sample: Sample) -> Lately {
        let mut lately = Lately::default();
        lately.add(&sample);
        lately
    }

    fn tick(share: f64, target: (u64, u64), stable: (u64, u64)) -> Tick {
        let (target, stable) = (sample(target.0, target.1), sample(stable.0, stable.1));
        Tick { elapsed: Duration::from_millis(500), share, target, stable }
    }

    fn after(settings: &Settings, ticks: &[Tick]) -> Judgement {
        let mut analysis = Analysis::new(Lately::default());
        ticks.iter().for_each(|tick| analysis.tick(settings, tick));
        analysis.judgement(settings)
    }

    /// The chances of 0, 1, 2 … of so many.
    fn chances(of: u64, probability: f64) -> Vec<f64> {
        (0..of).fold(vec![1.0], |chances, _| {
            let mut next: Vec<f64> = chances.iter().map(|chance| chance * (1.0 - probability)).chain([0.0]).collect();
            next.iter_mut().skip(1).zip(&chances).for_each(|(next, chance)| *next += chance * probability);
            next
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

        /// All that can happen in two batches, with its chance: the target is never worse than the stable version,
        /// whatever is allowed.
        #[test]
        fn nothing_speaks_against_a_healthy_target_on_average(
            requests in prop::array::uniform2((1u64..5, 6u64..9)), share in prop::sample::select(vec![0.1, 0.4, 0.9, 1.0]),
            rates in prop::array::uniform2(0.0..0.5), better in 0.0..=1.0, most in prop::sample::select(vec![0.01, 0.5]),
        ) {
            let settings = Settings { max_error_rate: Some(most), ..settings() };
            let [first, second] = [0, 1].map(|i| {
                let ((target, stable), rate) = (requests[i], rates[i]);
                let mut all = Vec::new();
                for (errors, chance) in chances(target, rate * better).into_iter().enumerate() {
                    for (others, other) in chances(stable, rate).into_iter().enumerate() {
                        all.push((tick(share, (target, errors as u64), (stable, others as u64)), chance * other));
                    }
                }
                all
            });
            let mut mean = 0.0;
            for (first, chance) in first {
                let mut analysis = Analysis::new(Lately::default());
                analysis.tick(&settings, &first);
                for (second, other) in &second {
                    let mut analysis = analysis.clone();
                    analysis.tick(&settings, second);
                    mean += chance * other * analysis.judgement(&settings).evidence;
                }
            }
            prop_assert!(mean <= 1.0 + 1e-9 && mean > 0.1, "{}", mean);
        }

        #[test]
        fn nothing_speaks_for_a_bad_target_on_average(requests in 1u64..60, most in 0.001..0.5, worse in 0.0..=1.0) {
            let settings = Settings { max_error_rate: Some(most), ..settings() };
            let rate = most + worse * (1.0 - most);
            let mean: f64 = chances(requests, rate).into_iter().enumerate().map(|(errors, chance)| {
                chance * after(&settings, &[tick(0.5, (requests, errors as u64), (0, 0))]).pass_evidence
            }).sum();
            prop_assert!(mean <= 1.0 + 1e-9, "{}", mean);
        }

        #[test]
        fn a_restart_changes_nothing_and_numbers_are_numbers(
            ticks in prop::collection::vec(
                (any::<[u64; 5]>(), prop::collection::vec(any::<u64>(), 0..30), any::<f64>(), any::<bool>()), 1..30),
            small in any::<bool>(),
        ) {
            let settings = settings();
            let mut analysis = Analysis::new(known(Sample { requests: u64::MAX, errors: 7, durations: vec![u64::MAX; 40] }));
            let mut restarted = analysis.clone();
            let size = |n: u64| if small { n % 100 } else { n };
            for ([elapsed, requests, errors, others, others_errors], durations, share, step) in ticks {
                let durations: Vec<u64> = durations.into_iter().map(size).collect();
                let tick = Tick {
                    elapsed: Duration::from_millis(elapsed),
                    share,
                    target: Sample { requests: size(requests), errors: size(errors), durations: durations.clone() },
                    stable: Sample { requests: size(others), errors: size(others_errors), durations },
                };
                for analysis in [&mut analysis, &mut restarted] {
                    analysis.tick(&settings, &tick);
                    if step {
                        analysis.step_started();
                    }
                }
                let json = serde_json::to_string(&restarted).unwrap();
                restarted = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(&restarted, &analysis);
                let judgement = analysis.judgement(&settings);
                let latency = judgement.latency.unwrap();
                for number in [judgement.evidence, judgement.pass_evidence, latency.evidence] {
                    prop_assert!((0.0..=MOST_EVIDENCE).contains(&number), "{}", number);
                }
                prop_assert!(json.len() < 10_000, "{}", json.len());
            }
        }
    }

    #[test]
    fn the_counts_decide() {
        let settings = settings();
        let outcome = |ticks: &[Tick]| after(&settings, ticks).outcome;
        let bad = after(&settings, &[tick(0.1, (5, 5), (45, 0)), tick(0.1, (5, 5), (45, 0))]);
        assert_eq!((bad.outcome, bad.target.errors, bad.stable.requests), (Outcome::Fail, 10, 90));
        assert!(bad.in_words("v2", "v1").ends_with(": fail"), "{}", bad.in_words("v2", "v1"));
        assert_eq!(outcome(&vec![tick(0.1, (5, 0), (45, 0)); 40]), Outcome::Pass);
        assert_eq!(outcome(&vec![tick(0.1, (5, 0), (45, 0)); 20]), Outcome::Undecided);
        // Without anything to compare with, what is allowed decides.
        assert_eq!(outcome(&vec![tick(1.0, (50, 50), (0, 0)); 8]), Outcome::Fail);
        let unasked = Settings { max_error_rate: None, ..settings.clone() };
        let judgement = after(&unasked, &vec![tick(0.1, (5, 0), (45, 0)); 40]);
        assert_eq!((judgement.outcome, judgement.pass_evidence), (Outcome::Undecided, 0.0));
    }

    #[test]
    fn without_traffic_of_the_target_nothing_is_ever_decided() {
        let settings = settings();
        for ended in [tick(0.1, (0, 0), (0, 0)), tick(0.1, (0, 0), (100, 0)), tick(0.1, (0, 0), (100, 100))] {
            let mut analysis = Analysis::new(known(sample(1_000, 1)));
            for _ in 0..2_000 {
                analysis.tick(&settings, &ended);
                let judgement = analysis.judgement(&settings);
                assert_eq!((judgement.outcome, judgement.both_bad), (Outcome::Undecided, false), "{ended:?}");
            }
        }
    }

    #[test]
    fn where_both_are_bad_nobody_is_to_blame() {
        let settings = settings();
        let both = after(&settings, &vec![tick(0.1, (5, 5), (45, 45)); 20]);
        assert_eq!((both.outcome, both.both_bad), (Outcome::Undecided, true));
        // Nor does it pass, however well it did before.
        let mut ticks = vec![tick(0.1, (5, 0), (45, 0)); 100];
        ticks.extend(vec![tick(0.1, (1, 1), (45, 45)); 100]);
        let both = after(&Settings { max_error_rate: Some(0.3), ..settings.clone() }, &ticks);
        assert!(
            both.pass_evidence > both.pass_bound && both.both_bad && both.outcome == Outcome::Undecided,
            "{both:?}"
        );
        let worse = after(&settings, &vec![tick(0.1, (5, 5), (45, 5)); 20]);
        assert_eq!((worse.outcome, worse.both_bad), (Outcome::Fail, false));
    }

    #[test]
    fn a_pass_is_earned_at_each_step() {
        let settings = settings();
        let mut analysis = Analysis::new(Lately::default());
        let good = vec![tick(0.1, (5, 0), (45, 0)); 40];
        good.iter().for_each(|tick| analysis.tick(&settings, tick));
        assert_eq!(analysis.judgement(&settings).outcome, Outcome::Pass);
        analysis.step_started();
        let judgement = analysis.judgement(&settings);
        assert_eq!((judgement.outcome, judgement.target.requests), (Outcome::Undecided, 200));
        good.iter().for_each(|tick| analysis.tick(&settings, tick));
        assert_eq!(analysis.judgement(&settings).outcome, Outcome::Pass);
    }

    /// As durations are counted: so many up to 10 ms, so many up to 100 ms.
    fn timed(fast: u64, slow: u64) -> Sample {
        let mut durations = vec![0; 12];
        (durations[5], durations[11]) = (fast, slow);
        Sample { requests: fast + slow, errors: 0, durations }
    }

    #[test]
    fn what_is_slow_is_frozen_when_a_step_starts() {
        let settings = settings();
        let slower_than = |analysis: &Analysis| {
            analysis.judgement(&settings).latency.and_then(|latency| latency.slower_than).map(|bound| bound.as_millis())
        };
        let seconds = |analysis: &mut Analysis, times, target: Sample, stable: Sample| {
            let tick = Tick { elapsed: Duration::from_secs(1), share: 0.1, target, stable };
            (0..times).for_each(|_| analysis.tick(&settings, &tick));
        };
        // Nine of ten take up to 10 ms; slow is what takes 10 ms longer.
        let mut analysis = Analysis::new(known(timed(9_900, 100)));
        assert_eq!(slower_than(&analysis), None);
        seconds(&mut analysis, 1, timed(10, 0), timed(90, 0));
        assert_eq!(slower_than(&analysis), Some(20));
        // The stable version's own slowness later does not move it, until the next step.
        seconds(&mut analysis, 200, timed(0, 10), timed(0, 90));
        assert_eq!((slower_than(&analysis), analysis.judgement(&settings).outcome), (Some(20), Outcome::Pass));
        analysis.step_started();
        assert_eq!(slower_than(&analysis), Some(20));
        seconds(&mut analysis, 1, timed(10, 0), timed(90, 0));
        assert_eq!(slower_than(&analysis), Some(150));
        // What was slow by the bound before is not said of this one.
        let counted = analysis.judgement(&settings).latency.map(|latency| (latency.target, latency.stable.requests));
        assert_eq!(counted, Some((Totals { requests: 10, errors: 0 }, 90)));
        // Who alone is slow fails.
        let mut analysis = Analysis::new(known(timed(10_000, 0)));
        seconds(&mut analysis, 20, timed(0, 10), timed(90, 0));
        let judgement = analysis.judgement(&settings);
        assert_eq!(judgement.outcome, Outcome::Fail);
        let words = judgement.in_words("v2", "v1");
        assert!(
            words.contains("v2: 200 of 200 took more than 20 ms at this step, v1: 0 of 1,800; evidence"),
            "{words}"
        );
        // With too few requests nobody knows what is slow.
        let mut analysis = Analysis::new(known(timed(9, 0)));
        seconds(&mut analysis, 1, timed(0, 10), timed(90, 0));
        assert_eq!(slower_than(&analysis), None);
    }

    /// The stable version's past was one sample, and it had another just now; bounds of durations had no age.
    #[test]
    fn what_was_kept_by_an_older_controller_is_read() {
        let settings = settings();
        let mut analysis = Analysis::new(known(timed(900, 100)));
        analysis.tick(
            &settings,
            &Tick { elapsed: Duration::from_secs(1), share: 0.1, target: timed(1, 0), stable: timed(9, 0) },
        );
        let mut old = serde_json::to_value(&analysis).unwrap();
        old["recent"].as_object_mut().unwrap().remove("before");
        old["absolute"]["justNow"] = serde_json::json!({"requests": 9, "errors": 0});
        let quantiles = old["slowness"]["quantiles"].as_array_mut().unwrap();
        quantiles.iter_mut().for_each(|slow| assert!(slow.as_object_mut().unwrap().remove("is_old").is_some()));
        assert_eq!(serde_json::from_value::<Analysis>(old).unwrap(), analysis);
    }

    /// The same bits in every build.
    #[test]
    fn a_verdict_is_what_it_was() {
        let settings = settings();
        let mut analysis = Analysis::new(known(timed(9_000, 1_000)));
        for i in 0..40 {
            let timed = |n| Sample { errors: (n + i) % 3 / 2, ..timed(n, i % 5) };
            let elapsed = Duration::from_millis(250 + 10 * i);
            analysis.tick(&settings, &Tick { elapsed, share: 0.2, target: timed(4 + i % 3), stable: timed(25) });
        }
        let judgement = analysis.judgement(&settings);
        let latency = judgement.latency.map(|latency| latency.evidence.to_bits());
        assert_eq!(
            (judgement.evidence.to_bits(), judgement.pass_evidence.to_bits(), latency),
            (4607558583723422039, 4531339409682563360, Some(4602678819172646911))
        );
    }
}
