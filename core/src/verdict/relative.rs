//! "The target is worse than the stable version": three kinds of evidence for it, each of which ever exceeds 1/α with
//! probability α at most if it is not.

use super::{Batch, CLUMP};
use crate::evidence::{Evidence, RATIOS, log_mean_exp, tilt};
use serde::{Deserialize, Serialize};

/// Requests that make a batch: at least so many, and so many that one of each version was to be expected, …
const LEAST: f64 = 10.0;
/// … but no more than these.
const MOST: f64 = 1_000.0;
/// What chance explains of missing answers: so many standard deviations of those that there are, …
const CHANCE: f64 = 3.0;
/// … and where there are none, the first so many thousandths of them.
const GAP: u64 = 2_000;
/// An error that stands in for no missing answer counts once in so many milliseconds.
const CLUMP_MILLIS: u64 = 1_500;
/// Errors that count in a second at most: what is over in less than half a second should fail no target.
const ERRORS_PER_SECOND: f64 = 12.0;
/// The most that evidence grows in a second where errors count otherwise, as a logarithm; for the same reason.
const GROWTH_PER_SECOND: f64 = 16.0;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Relative {
    /// From errors that count in full where an answer is missing, else one at a time.
    sparing: Evidence,
    /// From all errors, as if each clump of them were one.
    tempered: Evidence,
    /// From answers: the target gives too few of them.
    answers: Evidence,
    batch: Batch,
    /// As how many thousandths of an error the batch counts in the first.
    counted: u64,
    /// How many thousandths of a missing answer chance can still explain.
    gap: u64,
    /// For how long, in milliseconds, no further error of a clump counts there.
    clump_millis: u64,
}

impl Relative {
    pub(super) fn new() -> Self {
        let none = Evidence::new(RATIOS.len());
        Self {
            sparing: none.clone(),
            tempered: none.clone(),
            answers: none,
            batch: Batch::default(),
            counted: 0,
            gap: GAP,
            clump_millis: 0,
        }
    }

    /// Takes in what ended. `shares`: the least and the most of all requests that were to be expected at the target.
    pub(super) fn add(&mut self, ended: &Batch, shares: (f64, f64)) {
        let (least, most) = shares;
        self.counted = self.counted.saturating_add(self.count(ended, most));
        self.batch.add(ended);
        if !self.batch.is_full(most) {
            return;
        }
        let (batch, counted) = (std::mem::take(&mut self.batch), std::mem::take(&mut self.counted) as f64 / 1e3);
        let most = batch.seconds() * GROWTH_PER_SECOND;
        let others = batch.stable.errors as f64;
        if batch.target.errors > 0 || batch.stable.errors > 0 {
            self.sparing.add(RATIOS.map(|ratio| tilt(counted, counted + others, batch.chance(), ratio)));
            self.tempered.add(RATIOS.map(|ratio| batch.tempered(ratio).min(most)));
        }
        // A clump at the target makes its share of the requests larger, and with that the answers look too few.
        let share = 1.0 - batch.share().min(least);
        let (answers, others) = (batch.target.good() as f64, batch.stable.good() as f64);
        self.answers.add(RATIOS.map(|ratio| tilt(others, others + answers, share, ratio).min(most)));
    }

    /// As how many thousandths of an error those of the target count.
    fn count(&mut self, ended: &Batch, share: f64) -> u64 {
        let answers = ended.target.good() as f64;
        // By the stable version's: a clump at the target would make what is to be expected of it more.
        let others = (1.0 - share).max(1e-6);
        let expected = ended.stable.requests as f64 * share / others;
        let missing = thousandths(expected - answers - CHANCE * answers.sqrt() / others);
        self.gap = if missing == 0 { GAP } else { self.gap };
        let explained = self.gap.min(missing);
        self.gap -= explained;
        let missing = (missing - explained).min(thousandths(ended.seconds() * ERRORS_PER_SECOND));
        self.clump_millis = self.clump_millis.saturating_sub(ended.millis);
        let counts_alone = self.clump_millis == 0 && ended.target.errors > 0;
        if counts_alone {
            self.clump_millis = CLUMP_MILLIS;
        }
        let counted = if counts_alone { missing.max(1_000) } else { missing };
        counted.min(ended.target.errors.saturating_mul(1_000))
    }

    /// The logarithm of the evidence: of the three, the first counts twice.
    pub(super) fn log(&self) -> f64 {
        let sparing = self.sparing.log();
        log_mean_exp(&[sparing, sparing, self.tempered.log(), self.answers.log()])
    }
}

/// None for what is below 0.
fn thousandths(number: f64) -> u64 {
    (number * 1e3) as u64
}

impl Batch {
    /// Whether there is enough of both versions to compare them; not a question of how requests ended. `share`: what
    /// was to be expected at the target.
    pub(super) fn is_full(&self, share: f64) -> bool {
        let all = self.all();
        all >= MOST || all >= LEAST && all * share.min(1.0 - share) >= 1.0
    }

    /// The log-evidence of "`ratio` times as bad", as if each clump were one.
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

        /// A clump is the target's as often as a request is.
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

    /// As how many errors those of a quarter of a second each count, with a tenth of 100 requests a second.
    fn counted(ended: &[(u64, u64)]) -> f64 {
        let mut relative = Relative::new();
        let counts = ended.iter().map(|target| relative.count(&batch(*target, (23, 0), 250), 0.1));
        counts.sum::<u64>() as f64 / 1e3
    }

    #[test]
    fn errors_count_in_full_where_answers_are_missing() {
        let all = counted(&[(2, 2), (3, 3), (2, 2), (3, 3)]);
        assert!((8.0..=9.0).contains(&all), "{all}");
        // Somebody tries again and again, while others are answered.
        assert_eq!(counted(&[(5, 3), (4, 2), (5, 3), (4, 2)]), 1.0);
        // All at once, as when a server dies.
        assert_eq!(counted(&[(20, 20), (0, 0), (0, 0), (0, 0)]), 1.0);
        // Now and then.
        assert_eq!(counted(&[(3, 1), (2, 0), (3, 0), (2, 0), (3, 0), (3, 1), (2, 0)]), 1.0);
        assert_eq!(counted(&[(3, 1), (2, 0), (3, 0), (2, 0), (3, 0), (3, 0), (2, 1)]), 2.0);
    }
}
