//! The relative test: "the target is worse than the stable version". It combines two kinds of evidence from counts; if
//! the target is no worse, each ever exceeds 1/α with probability at most α. It applies to requests whose version was
//! dealt by weight, from clients that do not know where their next request goes: however a client clusters its bad
//! requests, they are dealt like all others.

use super::{Batch, CLUMP};
use crate::evidence::{Evidence, RATIOS, log_mean_exp, tilt};
use serde::{Deserialize, Serialize};

/// The size of a batch: at least this many requests, and enough that one of each version was to be expected, …
const LEAST: f64 = 10.0;
/// … but no more than these.
const MOST: f64 = 1_000.0;
/// The maximum growth of evidence per second, as a logarithm: the reports within half a second of the first error are
/// not enough to fail a target.
const GROWTH_PER_SECOND: f64 = 16.0;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Relative {
    /// From bad requests: the target has too many.
    #[serde(alias = "sparing")]
    bad: Evidence,
    /// From good responses: the target has too few.
    answers: Evidence,
    batch: Batch,
}

impl Relative {
    pub(super) fn new() -> Self {
        let none = Evidence::new(RATIOS.len());
        Self { bad: none.clone(), answers: none, batch: Batch::default() }
    }

    /// Adds requests that ended. `shares`: the minimum and maximum fraction of all requests expected at the target.
    pub(super) fn add(&mut self, ended: &Batch, shares: (f64, f64)) {
        let (least, most) = shares;
        self.batch.add(ended);
        if !self.batch.is_full(most) {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let growth = batch.seconds() * GROWTH_PER_SECOND;
        let (bad, others) = (batch.target.errors as f64, batch.stable.errors as f64);
        if bad + others > 0.0 {
            // Reports arrive sooner when the target fails, which distorts its fraction of a batch.
            let chance = batch.chance().max(most);
            self.bad.add(RATIOS.map(|ratio| tilt(bad, bad + others, chance, ratio).min(growth)));
        }
        let share = 1.0 - batch.share().min(least);
        let (answers, others) = (batch.target.good() as f64, batch.stable.good() as f64);
        self.answers.add(RATIOS.map(|ratio| tilt(others, others + answers, share, ratio).min(growth)));
    }

    /// The logarithm of the evidence.
    pub(super) fn log(&self) -> f64 {
        log_mean_exp(&[self.bad.log(), self.answers.log()])
    }
}

impl Batch {
    /// Whether there are enough requests of both versions to compare them, regardless of how they ended. `share`: the
    /// expected fraction at the target.
    pub(super) fn is_full(&self, share: f64) -> bool {
        let all = self.all();
        all >= MOST || all >= LEAST && all * share.min(1.0 - share) >= 1.0
    }

    /// The log-evidence of "`ratio` times as bad", with each clump counted as one.
    pub(super) fn tempered(&self, ratio: f64) -> f64 {
        let (bad, others) = (self.target.errors as f64, self.stable.errors as f64);
        tilt(bad, bad + others, self.chance(), ratio) / CLUMP
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Totals;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn batch(target: (u64, u64), stable: (u64, u64), millis: u64) -> Batch {
        let totals = |(requests, errors)| Totals { requests, errors };
        Batch { target: totals(target), stable: totals(stable), millis, ..Batch::default() }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// A clump belongs to the target as often as a request does.
        #[test]
        fn clumps_gain_nothing_on_average(requests in 1u64..1_000, others in 1u64..1_000, size in 0u64..=10) {
            for ratio in RATIOS {
                let of = |bad, other| libm::exp(batch((requests, bad), (others, other), 1_000).tempered(ratio));
                let share = batch((requests, 0), (others, 0), 0).share();
                let mean = share * of(size, 0) + (1.0 - share) * of(0, size);
                prop_assert!(mean <= 1.0 + 1e-9, "{} for {}", mean, ratio);
            }
        }
    }

    fn after(ended: &[(u64, u64)]) -> f64 {
        let mut relative = Relative::new();
        ended.iter().for_each(|target| relative.add(&batch(*target, (23, 0), 250), (0.1, 0.1)));
        relative.log()
    }

    #[test]
    fn a_part_that_fails_is_evidence_soon_and_a_moment_is_not() {
        assert!(after(&[(3, 2), (2, 1), (3, 1), (2, 1), (3, 2), (2, 1)]) > 7.6, "half of them, in 1.5 s");
        assert!(after(&[(3, 3), (2, 2), (3, 3)]) > 7.6, "all of them, in 0.75 s");
        assert!(after(&[(20, 20), (2, 0), (3, 0), (2, 0)]) < 4.0, "many at once, as when a server dies");
    }
}
