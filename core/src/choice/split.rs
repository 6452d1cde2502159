//! Chooses a version by weight: in turn for independent requests, always the same version for a user.
//!
//! By turn, shares are even: see [`crate::choice::sequence`]. Users are assigned by weighted rendezvous hashing: each
//! version draws a number for the user from a hash of both, exponentially distributed with the version's weight as its
//! rate, and the smallest number wins (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005). The
//! shares of users therefore follow the weights; a version whose weight increases only gains users, and one whose
//! weight decreases, or that goes out of service, only loses users; all others keep their version.

use crate::choice::sequence::{EvenSequence, SplitMix64};

/// Versions in service with their weights. Versions that are out of service or have no weight are left out, so that the
/// others share their traffic in proportion.
#[derive(Debug, Clone, Default)]
pub struct Split {
    entries: Vec<Entry>,
    total: u32,
    /// The index of its sequence among the plan's turns.
    slot: usize,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    version: usize,
    /// The cumulative sum of weights including this one.
    sum: u32,
    weight: u32,
    /// The hash of the version's name, with the session's key.
    hash: u64,
}

/// The positions of one worker in the even sequences of a plan, and its random numbers.
#[derive(Debug, Clone, Default)]
pub struct Turns {
    pub(crate) sequences: Vec<EvenSequence>,
    pub(crate) random: SplitMix64,
}

impl Turns {
    /// The next point of a split's sequence, from 0 to `total` - 1.
    fn next(&mut self, slot: usize, total: u32) -> Option<u32> {
        Some(self.sequences.get_mut(slot)?.next_below(total))
    }
}

impl Split {
    pub(crate) fn new(slot: usize) -> Self {
        Self { entries: Vec::new(), total: 0, slot }
    }

    pub(crate) fn push(&mut self, version: usize, weight: u32, hash: u64) {
        if weight > 0 {
            self.total = self.total.saturating_add(weight);
            self.entries.push(Entry { version, sum: self.total, weight, hash });
        }
    }

    pub(crate) fn slot(&self) -> usize {
        self.slot
    }

    /// Whether no version is in service.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether there is only one version.
    pub fn has_one(&self) -> bool {
        self.entries.len() == 1
    }

    /// Whether a version is in service and has weight.
    pub fn has(&self, version: usize) -> bool {
        self.entries.iter().any(|entry| entry.version == version)
    }

    /// The versions in service (by index) and their weights.
    pub fn weights(&self) -> impl Iterator<Item = (usize, u32)> {
        self.entries.iter().map(|entry| (entry.version, entry.weight))
    }

    /// The sum of the weights.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// The next version (by index), and the point of the sequence that selected it, below [`Self::total`]; `None` if no
    /// version is in service.
    pub fn next(&self, turns: &mut Turns) -> Option<(usize, u32)> {
        let point = match self.entries.as_slice() {
            [] => return None,
            [only] => return Some((only.version, 0)),
            _ => turns.next(self.slot, self.total)?,
        };
        let at = self.entries.partition_point(|entry| entry.sum <= point);
        self.entries.get(at).map(|entry| (entry.version, point))
    }

    /// The version (by index) of a user; `None` if no version is in service.
    pub fn of_user(&self, user: u64) -> Option<usize> {
        if let [only] = self.entries.as_slice() {
            return Some(only.version);
        }
        let draw = |entry: &Entry| -libm::log(fraction(mixed(user ^ entry.hash))) / f64::from(entry.weight);
        let drawn = self.entries.iter().map(|entry| (draw(entry), entry.version));
        drawn.min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, version)| version)
    }
}

/// A number between 0 and 1, both excluded, from 53 bits of a hash.
fn fraction(hash: u64) -> f64 {
    ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Spreads any difference over all bits (the finaliser of MurmurHash3).
fn mixed(mut hash: u64) -> u64 {
    for factor in [0xFF51_AFD7_ED55_8CCD, 0xC4CE_B9FE_1A85_EC53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(factor);
    }
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn split(weights: &[u32]) -> Split {
        let mut split = Split::new(0);
        for (version, weight) in weights.iter().enumerate() {
            split.push(version, *weight, mixed(version as u64 + 77));
        }
        split
    }

    fn users() -> impl Iterator<Item = u64> {
        (0..2_000u64).map(|user| mixed(user.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    #[test]
    fn users_are_shared_out_by_weight() {
        for weights in [vec![90, 10], vec![1, 99], vec![40, 30, 30], vec![1, 2, 3, 4], vec![1_000_000, 0, 250_000]] {
            let split = split(&weights);
            let total: u32 = weights.iter().sum();
            for (version, weight) in weights.iter().enumerate() {
                let share = f64::from(*weight) / f64::from(total);
                let count = users().filter(|user| split.of_user(*user) == Some(version)).count() as f64;
                let deviation = (2_000.0 * share * (1.0 - share)).sqrt();
                assert!((count - 2_000.0 * share).abs() <= 4.0 * deviation, "{weights:?}: {count} for {version}");
            }
        }
    }

    proptest! {
        /// In any steps, among any number of versions: each user moves at most once, and only to the one whose weight
        /// increases.
        #[test]
        fn raising_a_weight_moves_each_user_at_most_once_and_never_back(
            others in prop::collection::vec(0u32..1_000, 1..6),
            mut path in prop::collection::vec(0u32..=1_000, 1..8),
            at in any::<prop::sample::Index>(),
        ) {
            path.sort_unstable();
            let at = at.index(others.len() + 1);
            let splits: Vec<Split> = path.iter().map(|weight| {
                let mut weights = others.clone();
                weights.insert(at, *weight);
                split(&weights)
            }).collect();
            for user in users().take(100) {
                let way: Vec<Option<usize>> = splits.iter().map(|split| split.of_user(user)).collect();
                for step in way.windows(2) {
                    prop_assert!(step[0] == step[1] || step[0].is_none() || step[1] == Some(at), "{way:?}");
                }
            }
        }

        /// A rollout: the target takes the weight that the stable version gives up.
        #[test]
        fn of_two_versions_users_only_go_to_the_one_that_grows(mut path in prop::collection::vec(0u32..=100, 2..12)) {
            path.sort_unstable();
            let splits: Vec<Split> = path.iter().map(|weight| split(&[100 - weight, *weight])).collect();
            for user in users().take(100) {
                let way: Vec<Option<usize>> = splits.iter().map(|split| split.of_user(user)).collect();
                prop_assert!(way.is_sorted(), "{way:?}");
            }
        }

        /// With a third version that keeps its share, no user ever leaves the growing version.
        #[test]
        fn nobody_leaves_a_version_that_takes_from_another(mut path in prop::collection::vec(0u32..=90, 2..12)) {
            path.sort_unstable();
            let splits: Vec<Split> = path.iter().map(|weight| split(&[90 - weight, 10, *weight])).collect();
            for user in users().take(100) {
                let arrived = splits.iter().skip_while(|split| split.of_user(user) != Some(2));
                prop_assert!(arrived.into_iter().all(|split| split.of_user(user) == Some(2)));
            }
        }

        #[test]
        fn a_version_out_of_service_moves_its_own_users_only(
            weights in prop::collection::vec(1u32..1_000, 2..7),
            gone in any::<prop::sample::Index>(),
        ) {
            let gone = gone.index(weights.len());
            let mut fewer = weights.clone();
            fewer[gone] = 0;
            let (before, after) = (split(&weights), split(&fewer));
            for user in users().take(100) {
                let had = before.of_user(user);
                prop_assert!(had == Some(gone) || after.of_user(user) == had);
            }
        }
    }
}
