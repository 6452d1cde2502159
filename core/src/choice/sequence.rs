//! The even sequence behind weights: instead of a random draw for each request, points that fill the unit interval
//! evenly.
//!
//! A walk over 997 strata in steps of 454 visits each stratum once in 997 requests (a round), and consecutive requests
//! are far apart. [`SplitMix64`] draws the position inside the strata for each round, so that shares finer than 1/997
//! are right in the long run.
//!
//! 1,000 consecutive requests are a round and three more. Each end of a version's interval cuts one stratum, which
//! changes the count by less than 1; the three more change it by less than 2, for each step of [`STEPS`]. The first and
//! the last version have one such end and deviate by less than 3; a version between two others has two and deviates by
//! less than 4, and, with weights in whole percents, by no more than 3 as measured.
//!
//! The same holds for every k-th request, since 997 is prime: those also visit each stratum once in 997, unless k is a
//! multiple of 997. Three consecutive ones at other distances change the count by less than 3, so that the deviation is
//! less than 4 or 5, and no more than 4 with weights in whole percents, as measured for each k up to 1,000. Only a
//! client that repeats a pattern of 997 calls, or a multiple of that, always gets the same version for the same call.
//!
//! Sequences with the same step are correlated: the choice of one predicts the choice of the other. Therefore sequences
//! that are used side by side get different steps of [`STEPS`] as long as there are enough ([`Starts`]), and a decision
//! that must be independent of a sequence, such as mirroring of the versions' shares, must use [`SplitMix64`] instead
//! of another sequence.

/// The strata of a round; a prime.
const STRATA: u32 = 997;
/// The distance from one stratum to the next, chosen by measurement. With each of them, no share deviates by 3 in any
/// 100 consecutive requests. No two of them are correlated, nor are small multiples of them: pairs of points fill the
/// unit square evenly (the shortest vector of the dual lattice is at least 12 long, of at most 34), even over a few
/// dozen requests.
const STEPS: [u32; 6] = [454, 369, 393, 237, 413, 348];
/// The bits of the position inside a stratum: with 10 for the stratum they make 32, so that the product with a sum of
/// weights fits in 64.
const INSIDE_BITS: u32 = 22;

/// A position in the sequence; one for each split and worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvenSequence {
    step: u32,
    stratum: u32,
    /// The position inside the strata of this round.
    inside: u32,
    /// Draws the positions of the next rounds.
    places: SplitMix64,
}

impl EvenSequence {
    /// Starts at a position that depends on the seed, so that workers differ.
    pub fn new(seed: u64) -> Self {
        let [step, ..] = STEPS;
        Self::with_step(seed, step)
    }

    fn with_step(seed: u64, step: u32) -> Self {
        let mut places = SplitMix64::new(seed);
        let stratum = places.next_below(STRATA);
        let mut sequence = Self { step, stratum, inside: 0, places };
        sequence.enter_round();
        sequence
    }

    fn enter_round(&mut self) {
        self.inside = self.places.next_below(1 << INSIDE_BITS);
    }

    /// The next point, scaled to 0 .. `total` (excluded). 0 if `total` is 0.
    pub fn next_below(&mut self, total: u32) -> u32 {
        let point = (u64::from(self.stratum) << INSIDE_BITS) | u64::from(self.inside);
        self.stratum = (self.stratum + self.step) % STRATA;
        if self.stratum == 0 {
            self.enter_round();
        }
        (((point * u64::from(total)) >> INSIDE_BITS) / u64::from(STRATA)) as u32
    }
}

/// Starts sequences that are used side by side: each gets the least used step.
#[derive(Debug)]
pub struct Starts {
    seeds: SplitMix64,
    used: [usize; STEPS.len()],
}

impl Starts {
    /// Beside these, which continue.
    pub fn beside<'s>(others: impl IntoIterator<Item = &'s EvenSequence>, seed: u64) -> Self {
        let mut starts = Self { seeds: SplitMix64::new(seed), used: [0; STEPS.len()] };
        for other in others {
            starts.count(other.step);
        }
        starts
    }

    /// Starts another sequence.
    pub fn start(&mut self) -> EvenSequence {
        let steps = STEPS.into_iter().zip(self.used);
        let step = steps.min_by_key(|(_, used)| *used).map_or(1, |(step, _)| step);
        self.count(step);
        EvenSequence::with_step(self.seeds.next_u64(), step)
    }

    fn count(&mut self, step: u32) {
        for (_, used) in STEPS.into_iter().zip(&mut self.used).filter(|(known, _)| *known == step) {
            *used += 1;
        }
    }
}

/// Random numbers, each a hash of a counter (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
/// OOPSLA 2014). Not for secrets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The next number, scaled to 0 .. `total` (excluded). 0 if `total` is 0.
    pub fn next_below(&mut self, total: u32) -> u32 {
        (((self.next_u64() >> 32) * u64::from(total)) >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const WINDOW: usize = 1_000;

    fn with_each_step(seed: u64) -> impl Iterator<Item = EvenSequence> {
        let mut starts = Starts::beside([], seed);
        std::iter::repeat_with(move || starts.start()).take(STEPS.len())
    }

    /// The maximum deviation of a version from its share in any 1,000 consecutive requests, for any two of these `ends`
    /// (in percent) of its interval. Points are in percent.
    fn worst(points: impl Iterator<Item = u32>, ends: &[u32]) -> i64 {
        let points: Vec<usize> = points.map(|point| ends.partition_point(|end| *end <= point)).collect();
        let mut counts = vec![0; ends.len() + 1];
        let mut worst = 0;
        for (i, point) in points.iter().enumerate() {
            counts[*point] += 1;
            let Some(begin) = (i + 1).checked_sub(WINDOW) else { continue };
            // The excess of points below each end; 0 at 0 % and 100 %.
            let (mut below, mut most, mut least) = (0, 0, 0);
            for (count, end) in counts.iter().zip(ends) {
                below += count;
                let more = below - i64::from(*end) * 10;
                (most, least) = (most.max(more), least.min(more));
            }
            worst = worst.max(most - least);
            counts[points[begin]] -= 1;
        }
        worst
    }

    #[test]
    fn any_thousand_requests_hold_each_share_to_within_three() {
        let percents: Vec<u32> = (1..100).collect();
        for mut sequence in with_each_step(7) {
            let step = sequence.step;
            let off = worst(std::iter::repeat_with(|| sequence.next_below(100)).take(20_000), &percents);
            assert!(off <= 3, "in steps of {step}: off by {off}");
        }
    }

    #[test]
    fn every_kth_request_holds_each_share_to_within_four() {
        const ENDS: [u32; 13] = [1, 5, 10, 20, 25, 33, 34, 50, 66, 75, 90, 95, 99];
        const TAKEN: usize = 2 * WINDOW;
        let mut sequence = EvenSequence::new(99);
        let points: Vec<u32> = std::iter::repeat_with(|| sequence.next_below(100)).take(TAKEN * 1_000).collect();
        for k in (1..=1_000).filter(|k| *k != STRATA as usize) {
            let off = worst(points.iter().copied().step_by(k).take(TAKEN), &ENDS);
            assert!(off <= 4, "every {k}th: off by {off}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// The bounds proved above.
        #[test]
        fn shares_of_any_size_hold(
            seed: u64, step in prop::sample::select(&STEPS[..]), total in 1u32..=4_000_000_000, a in 0.0..=1.0,
            b in 0.0..=1.0, k in prop_oneof![Just(1usize), 2usize..40],
        ) {
            let end = |part: f64| (f64::from(total) * part) as u32;
            let (low, high) = (end(f64::min(a, b)), end(f64::max(a, b)));
            let mut sequence = EvenSequence::with_step(seed, step);
            let points: Vec<u32> =
                std::iter::repeat_with(|| sequence.next_below(total)).step_by(k).take(4 * WINDOW).collect();
            let more = if k == 1 { 2.0 } else { 3.0 };
            for (range, ends) in [(0..high, 1.0), (low..high, 2.0), (low..total, 1.0)] {
                let due = WINDOW as f64 * f64::from(range.end - range.start) / f64::from(total);
                let mut hits = points[..WINDOW].iter().filter(|point| range.contains(point)).count();
                for (gone, new) in points.iter().zip(&points[WINDOW..]) {
                    prop_assert!((hits as f64 - due).abs() < ends + more, "{range:?} of {total}: {hits}, due {due}");
                    hits = hits + usize::from(range.contains(new)) - usize::from(range.contains(gone));
                }
            }
        }
    }

    /// Two services with 10 % each on v2, called in turn: the choices are independent.
    #[test]
    fn sequences_side_by_side_do_not_move_in_step() {
        for first in with_each_step(1) {
            for second in with_each_step(2).filter(|second| second.step != first.step) {
                let (mut first, mut second) = (first, second);
                let both = (0..20_000).filter(|_| (first.next_below(10) == 0) & (second.next_below(10) == 0)).count();
                assert!((140..=260).contains(&both), "{first:?} {second:?}: both in {both}, due 200");
            }
        }
    }

    #[test]
    fn a_sequence_that_starts_gets_a_step_that_others_do_not_have() {
        let steps =
            |sequences: &[EvenSequence]| sequences.iter().map(|sequence| sequence.step).collect::<BTreeSet<_>>();
        let all: Vec<EvenSequence> = with_each_step(3).collect();
        assert_eq!(steps(&all), BTreeSet::from(STEPS));
        let mut starts = Starts::beside(&all[2..], 4);
        assert_eq!(steps(&[starts.start(), starts.start()]), steps(&all[..2]));
        // All steps are in use; the starting positions still differ.
        let again = starts.start();
        assert!(all.iter().any(|sequence| sequence.step == again.step && sequence.stratum != again.stratum));
    }

    #[test]
    fn points_stay_below_the_total() {
        for seed in [0, 1, u64::MAX] {
            for total in [1, 2, STRATA, 1_000, u32::MAX] {
                let mut sequence = EvenSequence::new(seed);
                assert!((0..3_000).all(|_| sequence.next_below(total) < total));
            }
            assert_eq!(EvenSequence::new(seed).next_below(0), 0);
        }
    }

    #[test]
    fn random_numbers_are_those_of_splitmix64() {
        let mut random = SplitMix64::new(1_234_567);
        assert_eq!([random.next_u64(), random.next_u64()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
        assert!((0..1_000).all(|_| random.next_below(10) < 10));
        assert_eq!(random.next_below(0), 0);
    }
}
