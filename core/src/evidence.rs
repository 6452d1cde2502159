//! Sequential evidence that one version of a service fails more often than the others, valid however often and
//! whenever one looks. What follows from it is for the guard and the verdict to say.
//!
//! Requests end in batches. With x errors of the version, y of all others, and ρ the version's share of the requests
//! that ended in the batch, the log-evidence of "it fails r times as often" is
//!
//! ```text
//! Δ(r) = x·ln r − (x + y)·ln(rρ + 1 − ρ)
//! ```
//!
//! If the version is no worse, exp(Δ) is 1 at most on average: see `docs/guard.md` for why, for what follows, and for
//! the sources (Turner, Ly and Grünwald, arXiv 2106.02693; Lindon and Malek, arXiv 2011.03567; for the evidence that
//! forgets, Shin, Ramdas and Rinaldo, arXiv 2203.03532). Logarithms are `libm`'s, so that native code and wasm agree
//! to the last bit.

/// How many times as often as the others: what the verdict asks of.
pub const RATIOS: [f64; 6] = [1.5, 2.0, 3.0, 5.0, 10.0, 30.0];
/// The same for the guard, which runs for ever and is to take out what fails, not what is a little worse: evidence for
/// a ratio r grows only against a version that fails more than (r − 1)/ln r times as often, here 1.8.
pub const RECENT_RATIOS: [f64; 4] = [3.0, 5.0, 10.0, 30.0];
/// The most log-evidence that one batch may contribute: errors come in clumps. A cap takes evidence away and never
/// adds any, so every bound holds with it.
pub const MOST_PER_BATCH: f64 = 3.4;

/// What one batch of ended requests says of one version.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Batch {
    /// Errors of the version.
    pub errors: u64,
    /// Errors of all others.
    pub others_errors: u64,
    /// The version's share of the requests that ended, 0 to 1.
    pub share: f64,
}

impl Batch {
    /// From counts of requests and errors: the version's, and those of all others.
    pub fn of(requests: u64, errors: u64, others_requests: u64, others_errors: u64) -> Self {
        let all = requests as f64 + others_requests as f64;
        // Nothing ended: a share of 1, with which nothing speaks against the version.
        let share = if all > 0.0 { requests as f64 / all } else { 1.0 };
        Self { errors, others_errors, share }
    }

    /// Whether nothing failed, which says nothing.
    pub fn is_silent(&self) -> bool {
        self.errors == 0 && self.others_errors == 0
    }

    /// The log-evidence Δ(r), capped; finite, whatever the counts and the share.
    fn evidence(&self, ratio: f64) -> f64 {
        // What is no number must not speak against anybody either.
        let share = if self.share.is_nan() { 1.0 } else { self.share.clamp(0.0, 1.0) };
        let (errors, others) = (self.errors as f64, self.others_errors as f64);
        let gain = errors * libm::log(ratio) - (errors + others) * libm::log1p(share * (ratio - 1.0));
        gain.min(MOST_PER_BATCH)
    }
}

/// Evidence that keeps everything it has seen. If the version is never worse than the others, it ever reaches 1/α with
/// probability α at most (Ville).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evidence {
    sums: [f64; RATIOS.len()],
}

impl Default for Evidence {
    fn default() -> Self {
        Self { sums: [0.0; RATIOS.len()] }
    }
}

impl Evidence {
    /// Takes a batch in.
    pub fn add(&mut self, batch: &Batch) {
        for (sum, ratio) in self.sums.iter_mut().zip(RATIOS) {
            *sum += batch.evidence(ratio);
        }
    }

    /// The logarithm of the evidence.
    pub fn log(&self) -> f64 {
        log_mean_exp(&self.sums)
    }
}

/// Evidence that forgets good times (CUSUM): what was fine for a day and then fails is found as soon as what fails
/// from the start. As long as the version is no worse than the others, it reaches 1/α within n batches that have
/// errors with probability n·α at most.
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
    /// Takes a batch in.
    pub fn add(&mut self, batch: &Batch) {
        if batch.is_silent() {
            return;
        }
        for (sum, ratio) in self.sums.iter_mut().zip(RECENT_RATIOS) {
            *sum = sum.max(0.0) + batch.evidence(ratio);
        }
    }

    /// The logarithm of the evidence.
    pub fn log(&self) -> f64 {
        log_mean_exp(&self.sums)
    }

    /// Whether nothing is held against the version.
    pub fn is_none(&self) -> bool {
        self.sums.iter().all(|sum| *sum <= 0.0)
    }
}

/// ln of the mean of exp(x), without overflow.
fn log_mean_exp(logs: &[f64]) -> f64 {
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

    /// The mean of exp(Δ) when `requests` and `others` fail with the probabilities `p` and `q`, by summing over every
    /// outcome.
    fn mean(ratio: f64, (requests, p): (u64, f64), (others, q): (u64, f64)) -> f64 {
        let (of_version, of_others) = (binomial(requests, p), binomial(others, q));
        let mut mean = 0.0;
        for (errors, p) in of_version.iter().enumerate() {
            for (others_errors, q) in of_others.iter().enumerate() {
                let batch = Batch::of(requests, errors as u64, others, others_errors as u64);
                mean += p * q * libm::exp(batch.evidence(ratio));
            }
        }
        mean
    }

    fn binomial(n: u64, p: f64) -> Vec<f64> {
        let mut chances = vec![1.0];
        for _ in 0..n {
            let failed = chances.iter().map(|chance| chance * p);
            let mut next: Vec<f64> = std::iter::once(0.0).chain(failed).collect();
            next.iter_mut().zip(&chances).for_each(|(next, chance)| *next += chance * (1.0 - p));
            chances = next;
        }
        chances
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_version_that_is_no_worse_gains_nothing_on_average(
            requests in 0u64..12, others in 0u64..40, q in 0.0..=1.0, part in 0.0..=1.0,
        ) {
            for ratio in RATIOS {
                let mean = mean(ratio, (requests, q * part), (others, q));
                prop_assert!(mean <= 1.0 + 1e-9, "{}", mean);
            }
        }

        #[test]
        fn errors_that_were_dealt_at_random_gain_nothing_on_average(
            requests in 0u64..12, others in 0u64..40, failed in 0.0..=1.0,
        ) {
            let all = requests + others;
            let bad = (failed * all as f64) as u64;
            for ratio in RATIOS {
                // Hypergeometric, as the ratio of numbers of ways.
                let mean: f64 = (bad.saturating_sub(others)..=bad.min(requests)).map(|errors| {
                    let ways = ways(requests, errors) * ways(others, bad - errors) / ways(all, bad);
                    ways * libm::exp(Batch::of(requests, errors, others, bad - errors).evidence(ratio))
                }).sum();
                prop_assert!(mean <= 1.0 + 1e-9, "{}", mean);
            }
        }

        #[test]
        fn no_input_makes_it_anything_but_a_number(
            batches in prop::collection::vec((any::<u64>(), any::<u64>(), any::<f64>()), 0..50),
        ) {
            let (mut whole, mut recent) = (Evidence::default(), RecentEvidence::default());
            for (errors, others_errors, share) in batches {
                let batch = Batch { errors, others_errors, share };
                whole.add(&batch);
                recent.add(&batch);
                prop_assert!(whole.log().is_finite() && recent.log().is_finite(), "{:?}", batch);
            }
        }
    }

    fn ways(n: u64, k: u64) -> f64 {
        (0..k).map(|i| (n - i) as f64 / (i + 1) as f64).product()
    }

    #[test]
    fn extremes_are_numbers_too() {
        for errors in [0, 1, u64::MAX] {
            for others_errors in [0, 1, u64::MAX] {
                for share in [0.0, 1.0, -1.0, 2.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE] {
                    let batch = Batch { errors, others_errors, share };
                    let (mut whole, mut recent) = (Evidence::default(), RecentEvidence::default());
                    for _ in 0..100 {
                        whole.add(&batch);
                        recent.add(&batch);
                    }
                    assert!(whole.log().is_finite() && recent.log().is_finite(), "{batch:?}");
                }
            }
        }
        assert_eq!(Batch::of(0, 0, 0, 0).share, 1.0);
        assert_eq!(Batch::of(u64::MAX, 0, u64::MAX, 0).share, 0.5);
    }

    #[test]
    fn only_the_evidence_that_forgets_does() {
        let (good, bad) = (Batch::of(10, 0, 90, 10), Batch::of(10, 2, 90, 0));
        let (mut whole, mut recent) = (Evidence::default(), RecentEvidence::default());
        for _ in 0..1_000 {
            whole.add(&good);
            recent.add(&good);
        }
        assert!(recent.is_none() && recent.log() < 0.0);
        for _ in 0..5 {
            whole.add(&bad);
            recent.add(&bad);
        }
        let mut fresh = RecentEvidence::default();
        (0..5).for_each(|_| fresh.add(&bad));
        assert_eq!(recent, fresh);
        assert!(recent.log() > 10.0 && whole.log() < -10.0);
    }

    #[test]
    fn one_batch_counts_no_more_than_its_cap() {
        let mut recent = RecentEvidence::default();
        recent.add(&Batch::of(1_000, 1_000, 9_000, 0));
        assert_eq!(recent.log(), MOST_PER_BATCH);
    }

    /// The same bits in every build.
    #[test]
    fn evidence_is_what_it_was() {
        let (mut whole, mut recent) = (Evidence::default(), RecentEvidence::default());
        for batch in [Batch::of(2, 2, 18, 0), Batch::of(3, 1, 20, 1), Batch::of(0, 0, 25, 2), Batch::of(4, 1, 20, 0)] {
            whole.add(&batch);
            recent.add(&batch);
        }
        assert_eq!((whole.log().to_bits(), recent.log().to_bits()), (4616789952538899832, 4617220756206020096));
    }
}
