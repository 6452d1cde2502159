//! Chance, from a seed: how many requests come, and how long they take.

use fastrand::Rng;
use std::f64::consts::{PI, SQRT_2};
use std::sync::{Arc, LazyLock};
use tideshift_core::counts::duration_bucket;

/// How many requests come in a time in which `mean` come on average, if they come independently of each other (Poisson).
pub(super) fn how_many(random: &mut Rng, mean: f64) -> u64 {
    if mean > 50.0 {
        // Normal is close enough, and does not take as many numbers as there are requests.
        let standard = (-2.0 * libm::log(1.0 - random.f64())).sqrt() * libm::cos(2.0 * PI * random.f64());
        return (mean + mean.sqrt() * standard).round().max(0.0) as u64;
    }
    let (least, mut product, mut count) = (libm::exp(-mean), random.f64(), 0);
    while product > least {
        product *= random.f64();
        count += 1;
    }
    count
}

/// The time to something that happens every `mean` on average, independently of what was before (exponential).
pub(super) fn how_long(random: &mut Rng, mean: f64) -> f64 {
    -mean * libm::log(1.0 - random.f64())
}

/// How long requests take: log-normal, which is what waiting for others looks like.
#[derive(Clone, PartialEq)]
pub struct Latency {
    /// Milliseconds.
    median: f64,
    /// Milliseconds; 1 in 100 takes longer.
    p99: f64,
    /// So many equally probable times, the shortest first: milliseconds, and their place in reports.
    times: Arc<[(u32, u8)]>,
}

const TIMES: usize = 1_024;
/// How many standard deviations 1 in 100 is above.
const P99: f64 = 2.326_347_874_040_841;
/// Nothing takes longer.
const LONGEST_MILLIS: f64 = 60_000.0;

impl Latency {
    /// `median` above 0, `p99` at least as much, both in milliseconds.
    pub fn new(median: f64, p99: f64) -> Self {
        /// Quantiles of the standard normal distribution.
        static QUANTILES: LazyLock<Vec<f64>> =
            LazyLock::new(|| (0..TIMES).map(|i| quantile((i as f64 + 0.5) / TIMES as f64)).collect());
        let deviation = libm::log(p99 / median) / P99;
        let time = |quantile: &f64| {
            let millis = (median * libm::exp(deviation * quantile)).min(LONGEST_MILLIS).ceil();
            (millis as u32, duration_bucket(millis as u64) as u8)
        };
        Self { median, p99, times: QUANTILES.iter().map(time).collect() }
    }

    /// Milliseconds that a request takes, and its place in reports' durations.
    pub(super) fn one(&self, random: u32) -> (u32, u8) {
        self.times.get(random as usize % TIMES).copied().unwrap_or_default()
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self::new(20.0, 100.0)
    }
}

impl std::fmt::Debug for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Latency {{ median: {}, p99: {} }}", self.median, self.p99)
    }
}

/// The quantile of the standard normal distribution, by halving.
fn quantile(probability: f64) -> f64 {
    let (mut low, mut high) = (-9.0, 9.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match 0.5 * libm::erfc(-middle / SQRT_2) < probability {
            true => low = middle,
            false => high = middle,
        }
    }
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_requests_come_as_were_ordered() {
        let mut random = Rng::with_seed(1);
        for mean in [0.0, 0.3, 10.0, 1_000.0] {
            let counts: Vec<f64> = (0..20_000).map(|_| how_many(&mut random, mean) as f64).collect();
            let (sum, squares) = (counts.iter().sum::<f64>(), counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>());
            let (off, variance) = ((sum / 20_000.0 - mean).abs(), squares / 20_000.0);
            assert!(off <= 4.0 * (mean / 20_000.0).sqrt(), "{mean}: off by {off}");
            assert!((variance - mean).abs() <= 0.06 * mean, "{mean}: variance {variance}");
        }
    }

    #[test]
    fn latencies_have_the_median_and_the_p99_that_were_ordered() {
        let latency = Latency::new(20.0, 120.0);
        let mut random = Rng::with_seed(1);
        let mut times: Vec<u32> = (0..100_000).map(|_| latency.one(random.u32(..)).0).collect();
        times.sort_unstable();
        assert!((19..=21).contains(&times[50_000]) && (110..=130).contains(&times[99_000]), "{}", times[99_000]);
        assert_eq!(Latency::new(5.0, 5.0).one(7), (5, duration_bucket(5) as u8));
    }

    #[test]
    fn quantiles_are_those_of_the_books() {
        for (probability, expected) in [(0.5, 0.0), (0.99, P99), (0.025, -1.959_963_984_540_054)] {
            assert!((quantile(probability) - expected).abs() < 1e-9);
        }
    }
}
