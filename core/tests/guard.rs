//! The guard against simulated traffic: how often it vetoes a version that is no worse than the others, and how fast
//! one that fails. Requests come at random times and are dealt by the sequence that proxies deal by; time is an
//! argument, so hours pass in milliseconds.
//!
//! The tables of `docs/guard-proof.md`: `cargo test --release -p tideshift-core --test guard -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)] // Tests unwrap; tables are printed.

#[path = "simulated/dice.rs"]
mod dice;

use dice::Dice;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use tideshift_core::choice::sequence::EvenSequence;
use tideshift_core::counts::Counts;
use tideshift_core::guard::{Guard, GuardPolicy, Observed};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// Seconds between looks.
const LOOK: f64 = 0.1;
const HOUR: f64 = 3600.0;
const NAMES: [&str; 3] = ["v1", "v2", "v3"];

fn nanos(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

/// Errors that come together, all of one version, as when one client tries again and again.
#[derive(Clone, Copy)]
struct Clumps {
    per_minute: f64,
    errors: u64,
    seconds: f64,
}

/// What clients and versions do.
#[derive(Clone, Copy)]
struct Traffic<'a> {
    weights: &'a [u32],
    /// Requests a second.
    rate: f64,
    /// The probability that a request to this version at this time fails.
    fails: &'a dyn Fn(usize, f64) -> f64,
    /// Seconds that requests to a version take.
    takes: &'a [f64],
    clumps: Option<Clumps>,
    /// Whether vetoed versions get nothing; else vetoes are counted only.
    obeys: bool,
    /// Whether a version is in service by the policy at this time.
    serves: &'a dyn Fn(usize, f64) -> bool,
}

impl<'a> Traffic<'a> {
    fn new(weights: &'a [u32], rate: f64, fails: &'a dyn Fn(usize, f64) -> f64) -> Self {
        Self { weights, rate, fails, takes: &[0.0; 3], clumps: None, obeys: true, serves: &|_, _| true }
    }
}

/// A proxy and its guard in such traffic.
struct Proxy<'a> {
    traffic: Traffic<'a>,
    guard: Guard,
    dice: Dice,
    sequence: EvenSequence,
    /// Seconds.
    now: f64,
    next_request: f64,
    next_clump: f64,
    /// When requests end, whose they are, and whether they fail.
    under_way: BinaryHeap<Reverse<(u64, usize, bool)>>,
    counts: [Counts; 3],
    vetoes: u64,
    looks_with_errors: u64,
    unrouted: u64,
}

impl<'a> Proxy<'a> {
    fn new(traffic: Traffic<'a>, false_veto_rate: f64, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let clump = traffic.clumps.map_or(f64::INFINITY, |clumps| dice.wait(60.0 / clumps.per_minute));
        Self {
            guard: Guard::new(GuardPolicy { false_veto_rate, ..GuardPolicy::default() }),
            sequence: EvenSequence::new(dice.roll()),
            now: 0.0,
            next_request: dice.wait(1.0 / traffic.rate),
            next_clump: clump,
            under_way: BinaryHeap::new(),
            counts: [Counts::default(); 3],
            vetoes: 0,
            looks_with_errors: 0,
            unrouted: 0,
            dice,
            traffic,
        }
    }

    /// The version for the next request; `None` if no version is in service.
    fn deal(&mut self) -> Option<usize> {
        let is_vetoed = |v: usize| self.guard.vetoes().iter().any(|veto| veto.version == NAMES[v]);
        let any_vetoed = self.traffic.obeys && !self.guard.vetoes().is_empty();
        let is_out = |v: usize| !(self.traffic.serves)(v, self.now) || (any_vetoed && is_vetoed(v));
        let weight = |v: usize| if is_out(v) { 0 } else { self.traffic.weights[v] };
        let total = (0..self.traffic.weights.len()).map(weight).sum();
        if total == 0 {
            return None;
        }
        let mut point = self.sequence.next_below(total);
        (0..self.traffic.weights.len()).find(|v| {
            let here = point < weight(*v);
            point = point.saturating_sub(weight(*v));
            here
        })
    }

    fn end(&mut self, version: usize, failed: bool) {
        let counts = &mut self.counts[version];
        *(if failed { &mut counts.error } else { &mut counts.ok }) += 1;
    }

    /// One look further. Whether a version was vetoed.
    fn look(&mut self) -> bool {
        self.now += LOOK;
        let before = self.counts.map(|counts| counts.error);
        while self.next_request < self.now {
            let at = self.next_request;
            if let Some(version) = self.deal() {
                let failed = self.dice.unit() < (self.traffic.fails)(version, at);
                match self.traffic.takes[version] {
                    0.0 => self.end(version, failed),
                    takes => self.under_way.push(Reverse((nanos(at + takes), version, failed))),
                }
            } else {
                self.unrouted += 1;
            }
            self.next_request += self.dice.wait(1.0 / self.traffic.rate);
        }
        while let Some(clumps) = self.traffic.clumps.filter(|_| self.next_clump < self.now) {
            let version = self.deal().unwrap();
            for _ in 0..clumps.errors {
                let at = self.next_clump + self.dice.unit() * clumps.seconds;
                self.under_way.push(Reverse((nanos(at), version, true)));
            }
            self.next_clump += self.dice.wait(60.0 / clumps.per_minute);
        }
        while let Some(Reverse((_, version, failed))) = self.under_way.peek().filter(|next| next.0.0 <= nanos(self.now))
        {
            self.end(*version, *failed);
            self.under_way.pop();
        }
        self.looks_with_errors += u64::from(before != self.counts.map(|counts| counts.error));
        let observed = |v: usize| Observed {
            name: NAMES[v],
            weight: self.traffic.weights[v],
            serving: (self.traffic.serves)(v, self.now),
            ended: self.counts[v],
            ..Observed::default()
        };
        let observed: Vec<_> = (0..self.traffic.weights.len()).map(observed).collect();
        let vetoes = self.guard.vetoes().len();
        // Some day in 2027.
        let changed = self.guard.observe(nanos(1_800_000_000.0) + nanos(self.now), &observed);
        let vetoed = changed && self.guard.vetoes().len() > vetoes;
        self.vetoes += u64::from(vetoed);
        vetoed
    }

    /// Vetoes in so many seconds.
    fn run(&mut self, seconds: f64) -> u64 {
        let (before, end) = (self.vetoes, self.now + seconds);
        while self.now < end {
            self.look();
        }
        self.vetoes - before
    }
}

/// The middle of a sorted list, and what nine of ten do not exceed.
fn median_and_p90(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[values.len() * 9 / 10])
}

/// How v2's failing ends.
struct Taken {
    seconds: Vec<f64>,
    errors: Vec<f64>,
}

const NEVER: f64 = 600.0;

/// v2 begins to fail after so many good seconds; how long until its veto, and how many of its requests failed.
fn power(weights: &[u32], rate: f64, failing: f64, good: f64, runs: u64) -> Taken {
    let (mut seconds, mut errors) = (Vec::new(), Vec::new());
    for seed in 0..runs {
        // Not always at the same distance from a look.
        let begin = good + LOOK * seed as f64 / runs as f64;
        let fails = |v: usize, t: f64| if v == 1 && t >= begin { failing } else { 0.001 };
        let mut proxy = Proxy::new(Traffic::new(weights, rate, &fails), GuardPolicy::default().false_veto_rate, seed);
        let mut taken = f64::INFINITY;
        while taken.is_infinite() && proxy.now < begin + NEVER {
            if proxy.look() && proxy.guard.vetoes()[0].version == "v2" {
                taken = proxy.now - begin;
            }
        }
        seconds.push(taken);
        errors.push(proxy.counts[1].error as f64);
    }
    Taken { seconds, errors }
}

#[test]
fn what_fails_everything_at_a_tenth_of_100_requests_a_second_is_out_within_about_a_second() {
    let taken = power(&[90, 10], 100.0, 1.0, 5.0, 200);
    let (seconds, errors) = (median_and_p90(taken.seconds), median_and_p90(taken.errors));
    assert!(seconds.0 <= 1.1 && seconds.1 <= 1.4, "{seconds:?} s");
    assert!(errors.0 <= 10.0, "{errors:?} errors");
}

#[cfg_attr(target_arch = "wasm32", ignore = "slow there")]
#[test]
fn what_was_fine_for_an_hour_is_caught_as_fast_as_what_is_new() {
    for (weights, failing) in [(&[90, 10], 1.0), (&[50, 50], 0.5), (&[99, 1], 1.0)] {
        let [fresh, old] = [1.0, HOUR].map(|good| power(weights, 20.0, failing, good, 12).seconds);
        let mean = |seconds: &[f64]| seconds.iter().sum::<f64>() / seconds.len() as f64;
        assert!(mean(&old) <= 1.2 * mean(&fresh), "{old:?} after an hour, {fresh:?} fresh");
    }
}

/// At a rate at which vetoes can be counted: so many batches times that rate, for each version, is the most.
#[cfg_attr(target_arch = "wasm32", ignore = "slow there")]
#[test]
fn versions_that_are_alike_are_vetoed_no_more_often_than_promised() {
    const RATE: f64 = 0.01;
    let (mut vetoes, mut most) = (0, 0.0);
    for (seed, weights) in [&[90u32, 10][..], &[50, 50], &[40, 30, 30]].into_iter().enumerate() {
        for errors in [0.001, 0.005, 0.03, 0.3] {
            let fails = |_, _| errors;
            let mut proxy = Proxy::new(Traffic::new(weights, 100.0, &fails), RATE, seed as u64);
            let (these, may) = (proxy.run(HOUR / 4.0), proxy.looks_with_errors as f64 * RATE * weights.len() as f64);
            assert!(these as f64 <= may, "{these} vetoes of {weights:?} with {errors} errors, at most {may}");
            (vetoes, most) = (vetoes + these, most + may);
        }
    }
    // So that this test can fail: vetoes do happen, and the promise is not far off.
    assert!(vetoes > 0, "none of {most}");
}

/// v2 fails for five seconds and is vetoed; then the others go out of service.
#[test]
fn whoever_is_left_alone_is_back_at_the_next_look() {
    let fails = |v: usize, t: f64| if v == 1 && (5.0..10.0).contains(&t) { 1.0 } else { 0.0 };
    let serves = |v: usize, t: f64| v == 1 || t < 10.0;
    for weights in [&[90, 10][..], &[50, 50], &[40, 30, 30]] {
        let traffic = Traffic { serves: &serves, ..Traffic::new(weights, 100.0, &fails) };
        let mut proxy = Proxy::new(traffic, GuardPolicy::default().false_veto_rate, 3);
        assert_eq!(proxy.run(9.95), 1, "{weights:?}");
        let before = proxy.counts[1].ok;
        proxy.run(60.0);
        let (answered, lost) = (proxy.counts[1].ok - before, proxy.unrouted);
        assert!(answered >= 5_000 && lost <= 30, "{weights:?}: {answered} answered, {lost} lost");
        assert_eq!(proxy.vetoes, 1);
    }
}

/// The bound counts batches and knows of no time, so that vetoes that end early leave it as it is.
#[cfg_attr(target_arch = "wasm32", ignore = "slow there")]
#[test]
fn nor_where_vetoes_end_early_because_versions_come_and_go() {
    const RATE: f64 = 0.01;
    let (mut vetoes, mut most) = (0, 0.0);
    for (seed, away) in [2.0, 5.0, 9.0].into_iter().enumerate() {
        let serves = |v: usize, t: f64| v != 0 || t % 10.0 >= away;
        for errors in [0.005, 0.03, 0.3] {
            let fails = |_, _| errors;
            let traffic = Traffic { serves: &serves, ..Traffic::new(&[60, 40], 200.0, &fails) };
            let mut proxy = Proxy::new(traffic, RATE, seed as u64);
            let (these, may) = (proxy.run(HOUR / 4.0), proxy.looks_with_errors as f64 * RATE * 2.0);
            assert!(these as f64 <= may, "{these} vetoes with {errors} errors, {away} s away, at most {may}");
            (vetoes, most) = (vetoes + these, most + may);
        }
    }
    assert!(vetoes > 0, "none of {most}");
}

#[test]
fn an_outage_of_all_vetoes_nobody() {
    for weights in [&[99u32, 1][..], &[90, 10], &[50, 50], &[40, 30, 30]] {
        for failing in [0.3, 1.0] {
            let fails = |_, t: f64| if t % 60.0 < 10.0 { failing } else { 0.001 };
            let mut proxy = Proxy::new(Traffic::new(weights, 100.0, &fails), GuardPolicy::default().false_veto_rate, 7);
            assert_eq!(proxy.run(HOUR / 6.0), 0, "{weights:?}, {failing}");
        }
    }
}

/// Once a minute 20 errors within 100 ms, all of one version.
#[cfg_attr(target_arch = "wasm32", ignore = "slow there")]
#[test]
fn clumps_of_errors_veto_nobody() {
    for (rate, weights) in [(20.0, [90, 10]), (100.0, [50, 50]), (100.0, [90, 10])] {
        let fails = |_, _| 0.001;
        let clumps = Some(Clumps { per_minute: 1.0, errors: 20, seconds: 0.1 });
        let traffic = Traffic { clumps, ..Traffic::new(&weights, rate, &fails) };
        let mut proxy = Proxy::new(traffic, GuardPolicy::default().false_veto_rate, 11);
        assert_eq!(proxy.run(HOUR), 0, "{rate}, {weights:?}");
    }
}

const SPLITS: [&[u32]; 4] = [&[99, 1], &[90, 10], &[50, 50], &[40, 30, 30]];

fn shares(weights: &[u32]) -> String {
    weights.iter().map(u32::to_string).collect::<Vec<_>>().join("/")
}

/// Vetoes of healthy versions in so many hours, and the batches with errors.
fn vetoes(traffic: Traffic<'_>, rate: f64, hours: u64) -> (u64, u64) {
    let mut sum = (0, 0);
    for seed in 0..hours {
        let mut proxy = Proxy::new(traffic, rate, 1_000_003 * seed + 17);
        sum.0 += proxy.run(HOUR);
        sum.1 += proxy.looks_with_errors;
    }
    sum
}

#[test]
#[ignore = "prints a table"]
fn table_1_healthy_versions() {
    const ERRORS: [f64; 4] = [0.001, 0.005, 0.03, 0.3];
    for (alpha, hours) in [(GuardPolicy::default().false_veto_rate, 100), (1e-3, 20)] {
        println!("Vetoes in {hours} h with a rate of {alpha:e}, and the most that were to be expected:\n");
        println!("| requests/s | weights | {} |", ERRORS.map(|p| format!("{} % errors", p * 100.0)).join(" | "));
        println!("| --- | --- | {} |", ERRORS.map(|_| "---").join(" | "));
        for rate in [5.0, 100.0, 1000.0] {
            for weights in SPLITS {
                let cells = ERRORS.map(|errors| {
                    let fails = |_, _| errors;
                    let (vetoes, batches) = vetoes(Traffic::new(weights, rate, &fails), alpha, hours);
                    format!("{vetoes} of {:.3}", batches as f64 * alpha * weights.len() as f64)
                });
                println!("| {rate} | {} | {} |", shares(weights), cells.join(" | "));
            }
        }
        println!();
    }
}

#[test]
#[ignore = "prints a table"]
fn table_2_clumps() {
    const HOURS: u64 = 50;
    const SIZES: [u64; 5] = [2, 3, 5, 10, 20];
    const WEIGHTS: [[u32; 2]; 3] = [[99, 1], [90, 10], [50, 50]];
    println!("Vetoes in {HOURS} h with {}:\n", WEIGHTS.map(|weights| shares(&weights)).join(", "));
    println!("| clumps | requests/s | {} |", SIZES.map(|k| format!("{k} errors")).join(" | "));
    println!("| --- | --- | {} |", SIZES.map(|_| "---").join(" | "));
    for (per_minute, seconds) in [(1.0, 0.1), (6.0, 0.1), (1.0, 0.3), (6.0, 0.3), (1.0, 1.0)] {
        for rate in [20.0, 100.0, 1000.0] {
            let cells = SIZES.map(|errors| {
                let fails = |_, _| 0.001;
                let of = |weights: [u32; 2]| {
                    let clumps = Some(Clumps { per_minute, errors, seconds });
                    let traffic = Traffic { clumps, ..Traffic::new(&weights, rate, &fails) };
                    vetoes(traffic, GuardPolicy::default().false_veto_rate, HOURS).0.to_string()
                };
                WEIGHTS.map(of).join(", ")
            });
            println!("| {per_minute} a minute, {} ms | {rate} | {} |", seconds * 1e3, cells.join(" | "));
        }
    }
}

#[test]
#[ignore = "prints a table"]
fn table_3_outages() {
    const OUTAGES: u64 = 500;
    println!("| v2's errors come later by | {} |", SPLITS.map(shares).join(" | "));
    println!("| --- | {} |", SPLITS.map(|_| "---").join(" | "));
    for later in [0.0, 0.1, 0.3, 0.5, 1.0, 2.0] {
        let counts = SPLITS.map(|weights| {
            // All fail for 10 s, once in 10 minutes.
            let fails = |_, t: f64| if t % 600.0 < 10.0 { 1.0 } else { 0.001 };
            let traffic = Traffic { takes: &[0.01, 0.01 + later, 0.01], ..Traffic::new(weights, 100.0, &fails) };
            let mut proxy = Proxy::new(traffic, GuardPolicy::default().false_veto_rate, 5);
            proxy.run(600.0 * OUTAGES as f64).to_string()
        });
        println!("| {later} s | {} |", counts.join(" | "));
    }
}

#[test]
#[ignore = "prints a table"]
fn table_4_failing_versions() {
    const RUNS: u64 = 400;
    const FAILING: [f64; 4] = [1.0, 0.5, 0.2, 0.05];
    println!("| requests/s | share | {} |", FAILING.map(|p| format!("fails {} %", p * 100.0)).join(" | "));
    println!("| --- | --- | {} |", FAILING.map(|_| "---").join(" | "));
    for rate in [5.0, 20.0, 100.0, 1000.0] {
        for share in [1, 10, 50] {
            let cells = FAILING.map(|failing| {
                let taken = power(&[100 - share, share], rate, failing, 5.0, RUNS);
                let ((median, p90), (errors, _)) = (median_and_p90(taken.seconds), median_and_p90(taken.errors));
                let shown = |seconds: f64| match seconds.is_finite() {
                    true => format!("{seconds:.1}"),
                    false => format!("> {NEVER}"),
                };
                format!("{} / {} s, {errors}", shown(median), shown(p90))
            });
            println!("| {rate} | {share} % | {} |", cells.join(" | "));
        }
    }
}
