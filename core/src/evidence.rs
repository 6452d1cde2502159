//! Sequential evidence that one version of a service fails more often than the others. It is valid however often and
//! whenever it is evaluated. The guard and the verdict decide what follows from it.
//!
//! Requests end in batches. With x errors of the version, y of all others, and ρ the version's share of the requests
//! that ended in the batch, the log-evidence of "it fails r times as often" is
//!
//! ```text
//! Δ(r) = x·ln r − (x + y)·ln(rρ + 1 − ρ)
//! ```
//!
//! If the version is no worse, exp(Δ) is at most 1 on average: see `docs/guard-proof.md` for the proof and
//! `docs/verdict-proof.md` for its other uses; both cite the sources (Lindon and Malek, arXiv 2011.03567; Lindon,
//! Sanden and Shirikian, arXiv 2205.14762; Turner, Ly and Grünwald, arXiv 2106.02693; for evidence that discounts the
//! past, Shin, Ramdas and Rinaldo, arXiv 2203.03532). Logarithms are `libm`'s, so that native code and wasm agree to
//! the last bit.

pub mod clients;

use serde::{Deserialize, Serialize};
use std::ops::AddAssign;

/// The ratios of error rates that the verdict tests.
pub const RATIOS: [f64; 6] = [1.5, 2.0, 3.0, 5.0, 10.0, 30.0];
/// The same for the guard, which runs indefinitely and must eject versions that fail, not those that are slightly
/// worse: evidence for a ratio r grows only against a version that fails more than (r − 1)/ln r times as often, here
/// 1.8.
pub const RECENT_RATIOS: [f64; 5] = [3.0, 5.0, 10.0, 30.0, 100.0];

/// The requests that ended in one batch: requests and errors of one version and of all others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Batch {
    /// Requests of the version.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Requests of the others.
    pub others_requests: u64,
    /// Those that failed.
    pub others_errors: u64,
    /// Requests of the version that began in the same time, and …
    pub started: u64,
    /// … those of the others; both 0 if unknown.
    pub others_started: u64,
}

impl Batch {
    /// The probability that an error belongs to the version if that is no worse: the larger of its shares of the
    /// requests that ended and of those that began, since a new version has only had early ends. 1 if there were none:
    /// then nothing counts against it.
    fn share(&self) -> f64 {
        let of = |own: u64, others: u64| {
            let all = own as f64 + others as f64;
            (all > 0.0).then(|| own as f64 / all)
        };
        let ended = of(self.requests, self.others_requests).unwrap_or(1.0);
        of(self.started, self.others_started).map_or(ended, |began| ended.max(began))
    }

    /// The log-evidence Δ(r), capped at that of `most` errors of the version alone, because errors come in clumps. The
    /// cap only reduces evidence, so that every bound holds with it. Finite, whatever the counts.
    fn evidence(&self, ratio: f64, most: u64) -> f64 {
        // One function for both, so that a share of 1 leaves exactly zero.
        let (of_error, of_any) = (libm::log1p(ratio - 1.0), libm::log1p(self.share() * (ratio - 1.0)));
        let (errors, others) = (self.errors as f64, self.others_errors as f64);
        let evidence = errors * (of_error - of_any) - others * of_any;
        evidence.min(most as f64 * (of_error - of_any))
    }
}

impl AddAssign for Batch {
    fn add_assign(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.errors = self.errors.saturating_add(other.errors);
        self.others_requests = self.others_requests.saturating_add(other.others_requests);
        self.others_errors = self.others_errors.saturating_add(other.others_errors);
        self.started = self.started.saturating_add(other.started);
        self.others_started = self.others_started.saturating_add(other.others_started);
    }
}

/// The log-evidence that an event with the expected `probability` has `ratio` times those odds, if it happened to
/// `count` of `all`: count·ln r − all·ln(rp + 1 − p). Its exp is at most 1 on average if the event has at most this
/// `probability` (for a ratio above 1), or at least this (below 1).
pub fn tilt(count: f64, all: f64, probability: f64, ratio: f64) -> f64 {
    count * libm::log1p(ratio - 1.0) - all * libm::log1p(probability * (ratio - 1.0))
}

/// Evidence for several alternatives at once that keeps all batches and also restarts after each batch, so that it
/// detects a version that was fine for a long time and then fails. Half of its weight is present at the start and the
/// rest is added in ever smaller parts. Therefore, if each batch multiplies it by at most 1 on average, the probability
/// that it ever reaches 1/α is at most α (Ville).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    #[serde(with = "bits")]
    logs: Vec<f64>,
    batches: u64,
}

impl Evidence {
    /// Without any batches, for this many alternatives.
    pub fn new(alternatives: usize) -> Self {
        let mut new = Self { logs: vec![f64::MIN; alternatives], batches: 0 };
        new.begin_anew(1.0);
        new
    }

    /// Adds a batch: the log-evidence of each alternative.
    pub fn add(&mut self, batch: impl IntoIterator<Item = f64>) {
        for (log, batch) in self.logs.iter_mut().zip(batch) {
            *log += batch;
        }
        self.batches = self.batches.saturating_add(1);
        let batches = self.batches as f64;
        self.begin_anew(batches * (batches + 1.0));
    }

    /// Adds a half, divided by `by`, to the part shared by all alternatives. Over n ≥ 1, 1/(n(n + 1)) adds up to 1.
    fn begin_anew(&mut self, by: f64) {
        let part = -libm::log(2.0 * by * self.logs.len() as f64);
        for log in &mut self.logs {
            let (low, high) = if *log < part { (*log, part) } else { (part, *log) };
            *log = high + libm::log1p(libm::exp(low - high));
        }
    }

    /// The logarithm of the evidence.
    pub fn log(&self) -> f64 {
        log_mean_exp(&self.logs) + libm::log(self.logs.len() as f64)
    }
}

/// Stores numbers as their bits in hexadecimal: JSON or one of its readers would round decimal numbers, and a restart
/// must not change anything.
pub(crate) mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(numbers: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        numbers.iter().map(|number| format!("{:016x}", number.to_bits())).collect::<Vec<_>>().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        let number = |text: &String| u64::from_str_radix(text, 16).ok().map(f64::from_bits).filter(|n| n.is_finite());
        let numbers: Option<Vec<_>> = texts.iter().map(number).collect();
        let numbers = numbers.filter(|numbers| !numbers.is_empty());
        numbers.ok_or_else(|| de::Error::custom("expected the bits of finite numbers, in hexadecimal"))
    }
}

/// Evidence that discounts good periods (CUSUM): a version that was fine for a day and then fails is detected as
/// quickly as one that fails from the start. If the version is no worse than the others, the evidence reaches 1/α
/// within n batches with errors with probability at most n·α.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecentEvidence {
    sums: [f64; RECENT_RATIOS.len()],
}

impl Default for RecentEvidence {
    fn default() -> Self {
        Self { sums: [0.0; RECENT_RATIOS.len()] }
    }
}

impl RecentEvidence {
    /// Adds a batch, capped as if it had no more than `most` errors of the version.
    pub fn add(&mut self, batch: &Batch, most: u64) {
        for (sum, ratio) in self.sums.iter_mut().zip(RECENT_RATIOS) {
            *sum = sum.max(0.0) + batch.evidence(ratio, most);
        }
    }

    /// The logarithm of the evidence.
    pub fn log(&self) -> f64 {
        log_mean_exp(&self.sums)
    }

    /// Whether there is no evidence against the version.
    pub fn is_none(&self) -> bool {
        self.sums.iter().all(|sum| *sum <= 0.0)
    }
}

/// ln of the mean of exp(x), without overflow.
pub(crate) fn log_mean_exp(logs: &[f64]) -> f64 {
    let most = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logs.iter().map(|log| libm::exp(log - most)).sum();
    most + libm::log(sum / logs.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const ALL: u64 = u64::MAX;

    fn batch(requests: u64, errors: u64, others_requests: u64, others_errors: u64) -> Batch {
        Batch { requests, errors, others_requests, others_errors, ..Batch::default() }
    }

    /// The probabilities of 0, 1, 2 … failures among requests with these failure probabilities.
    fn chances(of_each: &[f64]) -> Vec<f64> {
        of_each.iter().fold(vec![1.0], |chances, p| {
            let mut next: Vec<f64> = std::iter::once(0.0).chain(chances.iter().map(|chance| chance * p)).collect();
            next.iter_mut().zip(&chances).for_each(|(next, chance)| *next += chance * (1.0 - p));
            next
        })
    }

    /// Ways to choose `k` of `n`.
    fn ways(n: u64, k: u64) -> f64 {
        (0..k).map(|i| (n - i) as f64 / (i + 1) as f64).product()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Each request has a probability of its own; on average the version's is at most the others'.
        #[test]
        fn a_version_that_is_no_worse_gains_nothing_on_average(
            mut own in prop::collection::vec(0.0..=1.0, 1..12), others in prop::collection::vec(0.0..=1.0, 1..30),
        ) {
            let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
            let factor = (mean(&others) / mean(&own)).min(1.0);
            own.iter_mut().for_each(|p| *p *= factor);
            for ratio in RATIOS {
                let mut mean = 0.0;
                for (errors, p) in chances(&own).iter().enumerate() {
                    for (others_errors, q) in chances(&others).iter().enumerate() {
                        let batch = batch(own.len() as u64, errors as u64, others.len() as u64, others_errors as u64);
                        mean += p * q * libm::exp(batch.evidence(ratio, ALL));
                    }
                }
                prop_assert!(mean <= 1.0 + 1e-9, "{} for {}", mean, ratio);
            }
        }

        /// A fixed number of requests fails, independent of the version, and versions are assigned at random.
        #[test]
        fn errors_dealt_at_random_gain_nothing_on_average(requests in 0u64..12, others in 0u64..40, part in 0.0..=1.0) {
            let bad = (part * (requests + others) as f64) as u64;
            for ratio in RATIOS {
                let mean: f64 = (bad.saturating_sub(others)..=bad.min(requests)).map(|errors| {
                    let chance = ways(requests, errors) * ways(others, bad - errors) / ways(requests + others, bad);
                    chance * libm::exp(batch(requests, errors, others, bad - errors).evidence(ratio, ALL))
                }).sum();
                prop_assert!(mean <= 1.0 + 1e-9, "{} for {}", mean, ratio);
            }
        }

        /// The mean is 1 where it happens as often as expected, and less where less speaks for the ratio.
        #[test]
        fn a_tilt_gains_nothing_on_average(all in 0usize..40, probability in 0.01..0.99, part in 0.0..=1.0) {
            let mean = |rate: f64, ratio: f64| -> f64 {
                let chances = chances(&vec![rate; all]);
                let of = |(count, chance)| chance * libm::exp(tilt(count as f64, all as f64, probability, ratio));
                chances.into_iter().enumerate().map(of).sum()
            };
            for ratio in [0.01, 0.3, 1.5, 30.0, 100.0] {
                prop_assert!((mean(probability, ratio) - 1.0).abs() <= 1e-9);
                let rate = if ratio > 1.0 { part * probability } else { probability + part * (1.0 - probability) };
                prop_assert!(mean(rate, ratio) <= 1.0 + 1e-9);
            }
        }

        /// The guard's evidence asks which of the errors belong to the version.
        #[test]
        fn a_tilt_of_errors_is_the_evidence_of_the_batch(counts in prop::array::uniform4(0u64..1_000)) {
            let [requests, errors, others_requests, others_errors] = counts;
            let batch = batch(requests, errors, others_requests, others_errors);
            for ratio in RATIOS {
                let tilted = tilt(errors as f64, errors as f64 + others_errors as f64, batch.share(), ratio);
                prop_assert!((tilted - batch.evidence(ratio, ALL)).abs() < 1e-6);
            }
        }

        /// All errors fall on one side, as when one client tries again and again.
        #[test]
        fn a_clump_that_counts_as_one_error_gains_nothing_on_average(
            requests in 1u64..1_000, others in 1u64..1_000, clump in 1u64..1_000,
        ) {
            for ratio in RATIOS {
                let of = |errors, others_errors| libm::exp(batch(requests, errors, others, others_errors).evidence(ratio, 1));
                let share = batch(requests, 0, others, 0).share();
                let mean = share * of(clump, 0) + (1.0 - share) * of(0, clump);
                prop_assert!(mean <= 1.0 + 1e-9, "{} for {}", mean, ratio);
            }
        }

        #[test]
        fn evidence_is_a_number_whatever_the_counts(
            batches in prop::collection::vec(any::<[u64; 5]>(), 0..50),
        ) {
            let (mut whole, mut recent) = (Evidence::new(RATIOS.len()), RecentEvidence::default());
            for [requests, errors, others_requests, others_errors, most] in batches {
                let batch = batch(requests, errors, others_requests, others_errors);
                whole.add(RATIOS.map(|ratio| batch.evidence(ratio, most)));
                recent.add(&batch, most);
                prop_assert!(whole.log().is_finite() && recent.log().is_finite(), "{:?}", batch);
            }
        }
    }

    #[test]
    fn extremes_are_numbers_too() {
        let extremes = [0, 1, u64::MAX];
        let every = |f: &mut dyn FnMut(u64)| extremes.iter().for_each(|n| f(*n));
        every(&mut |requests| {
            every(&mut |errors| {
                every(&mut |others_requests| {
                    every(&mut |others_errors| {
                        every(&mut |most| {
                            let batch = batch(requests, errors, others_requests, others_errors);
                            let (mut whole, mut recent) = (Evidence::new(RATIOS.len()), RecentEvidence::default());
                            for _ in 0..100 {
                                whole.add(RATIOS.map(|ratio| batch.evidence(ratio, most)));
                                recent.add(&batch, most);
                            }
                            assert!(whole.log().is_finite() && recent.log().is_finite(), "{batch:?}");
                        });
                    });
                });
            });
        });
    }

    #[test]
    fn nothing_speaks_against_who_served_everything() {
        for all in [batch(u64::MAX, u64::MAX, 0, 0), batch(0, u64::MAX, 0, 0)] {
            assert_eq!(RATIOS.map(|ratio| all.evidence(ratio, ALL)), [0.0; 6]);
        }
    }

    #[test]
    fn evidence_forgets_good_times() {
        let (good, bad) = (batch(10, 0, 90, 10), batch(10, 2, 90, 0));
        let (mut whole, mut recent, mut fresh) =
            (Evidence::new(RATIOS.len()), RecentEvidence::default(), RecentEvidence::default());
        let add = |to: &mut Evidence, batch: Batch| to.add(RATIOS.map(|ratio| batch.evidence(ratio, ALL)));
        for _ in 0..1_000 {
            add(&mut whole, good);
            recent.add(&good, ALL);
        }
        assert!(recent.is_none() && recent.log() < 0.0 && whole.log() < -3.0);
        for _ in 0..5 {
            add(&mut whole, bad);
            recent.add(&bad, ALL);
            fresh.add(&bad, ALL);
        }
        assert_eq!(recent, fresh);
        assert!(recent.log() > 10.0 && whole.log() > 2.0, "{} {}", recent.log(), whole.log());
    }

    #[test]
    fn a_batch_counts_no_more_than_so_many_errors() {
        let (mut many, mut two) = (RecentEvidence::default(), RecentEvidence::default());
        many.add(&batch(100, 90, 900, 0), 2);
        two.add(&batch(100, 2, 900, 0), ALL);
        assert_eq!(many, two);
    }

    /// The same bits in every build.
    #[test]
    fn evidence_is_what_it_was() {
        let (mut whole, mut recent) = (Evidence::new(RATIOS.len()), RecentEvidence::default());
        for batch in [batch(2, 2, 18, 0), batch(3, 1, 20, 1), batch(0, 0, 25, 2), batch(4, 1, 20, 0)] {
            whole.add(RATIOS.map(|ratio| batch.evidence(ratio, 5)));
            recent.add(&batch, 5);
        }
        assert_eq!((whole.log().to_bits(), recent.log().to_bits()), (4616379075107974406, 4617641450980345547));
    }
}
