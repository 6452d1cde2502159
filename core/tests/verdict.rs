//! The verdict against simulated rollouts: how often it fails a target that is no worse than the stable version, and
//! how fast one that is; whom it lets pass. Time is an argument, so hours pass in milliseconds.
//!
//! The tables of `docs/verdict.md`: `cargo test --release -p tideshift-core --test verdict -- --ignored --nocapture`,
//! half an hour; a table's name before `--ignored` prints only that.

#![cfg(not(target_arch = "wasm32"))] // Thousands of rollouts are slow there.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)] // Tests unwrap; tables are printed.

use std::time::Duration;
use tideshift_core::report::{DURATION_BOUNDS, duration_bucket};
use tideshift_core::verdict::{Analysis, Judgement, Latency, Outcome, Sample, Settings, Tick};

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to 1, not 0.
    fn unit(&mut self) -> f64 {
        ((self.roll() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Normally distributed.
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// How many events there are where so many are to be expected.
    fn events(&mut self, mean: f64) -> u64 {
        if mean > 40.0 {
            return (mean + self.normal() * mean.sqrt()).round().max(0.0) as u64;
        }
        let (mut events, mut product, least) = (0, self.unit(), (-mean).exp());
        while product > least {
            events += 1;
            product *= self.unit();
        }
        events
    }

    /// How many of so many happen, each with this probability.
    fn of(&mut self, all: u64, probability: f64) -> u64 {
        match probability {
            ..=0.0 => 0,
            1.0.. => all,
            _ if probability > 0.5 => all - self.of(all, 1.0 - probability),
            _ => {
                let (mut at, mut happen) = (0.0, 0);
                loop {
                    at += (self.unit().ln() / (1.0 - probability).ln()).floor() + 1.0;
                    if at > all as f64 {
                        return happen;
                    }
                    happen += 1;
                }
            }
        }
    }
}

/// Errors that come together, all of one version, besides its other requests: a client that tries again and again.
#[derive(Clone, Copy)]
struct Clumps {
    size: Size,
    /// Within so many seconds.
    seconds: f64,
    /// Besides the errors that there are; none: those all come in clumps.
    per_minute: Option<f64>,
}

#[derive(Clone, Copy)]
enum Size {
    Exactly(u64),
    /// On average: each time, another try follows with the same probability.
    Geometric(f64),
}

impl Size {
    fn mean(self) -> f64 {
        match self {
            Self::Exactly(size) => size as f64,
            Self::Geometric(mean) => mean,
        }
    }

    fn roll(self, dice: &mut Dice) -> u64 {
        match self {
            Self::Exactly(size) => size,
            Self::Geometric(mean) => (dice.unit().ln() / (1.0 - 1.0 / mean).ln()).floor() as u64 + 1,
        }
    }
}

/// Each version, at times of its own, as when memory is tidied up.
#[derive(Clone, Copy)]
struct Pauses {
    per_minute: f64,
    seconds: f64,
}

/// Who gets the next request.
#[derive(Clone, Copy, PartialEq)]
enum Dealing {
    /// By an even sequence, as weights are dealt.
    Even,
    /// By chance, as with sessions.
    Random,
}

/// When counts come in.
#[derive(Clone, Copy, PartialEq)]
enum Reports {
    /// Of one proxy: each second, and 0.25 s after the last report if the target failed since.
    OneProxy,
    /// Of many: ten times a second there is news of some.
    Many,
}

const TARGET: usize = 0;
const STABLE: usize = 1;

/// What clients and versions do. Functions are of the time in seconds since the rollout began.
#[derive(Clone, Copy)]
struct Traffic<'a> {
    /// Requests a second.
    rate: f64,
    /// The target's share; a step begins where it changes.
    share: &'a dyn Fn(f64) -> f64,
    /// The probability that a version's request fails.
    fails: &'a dyn Fn(usize, f64) -> f64,
    /// Milliseconds that a version's requests take, their median.
    takes: Option<&'a dyn Fn(usize, f64) -> f64>,
    /// All that a version is asked takes longer now and then.
    pauses: Option<Pauses>,
    clumps: Option<Clumps>,
    dealing: Dealing,
    reports: Reports,
    /// Requests of the stable version that are known from before.
    baseline: u64,
}

impl<'a> Traffic<'a> {
    fn new(rate: f64, share: &'a dyn Fn(f64) -> f64, fails: &'a dyn Fn(usize, f64) -> f64) -> Self {
        let (dealing, reports) = (Dealing::Even, Reports::OneProxy);
        Self { rate, share, fails, takes: None, pauses: None, clumps: None, dealing, reports, baseline: 10_000 }
    }
}

/// A rollout in such traffic.
struct Rollout<'a> {
    traffic: Traffic<'a>,
    settings: &'a Settings,
    analysis: Analysis,
    dice: Dice,
    /// Since the rollout began, and since the last report, in slots.
    slot: usize,
    waited: usize,
    /// What the even sequence owes the target.
    owed: f64,
    /// Errors of clumps by the slots to come.
    coming: [[u64; 2]; 128],
    /// When the versions' pauses are over.
    paused: [f64; 2],
    news: [Sample; 2],
    judgement: Judgement,
    /// Whether both versions were bad at some time.
    was_held: bool,
}

/// Seconds.
const SLOT: f64 = 0.05;

impl<'a> Rollout<'a> {
    fn new(traffic: Traffic<'a>, settings: &'a Settings, seed: u64) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        let owed = dice.unit();
        let waited = if traffic.reports == Reports::Many { 0 } else { dice.roll() as usize % 20 };
        let analysis = Analysis::new(&Sample::default());
        let judgement = analysis.judgement(settings);
        let mut rollout = Self {
            traffic,
            settings,
            analysis,
            dice,
            slot: 0,
            waited,
            owed,
            coming: [[0; 2]; 128],
            paused: [0.0; 2],
            news: Default::default(),
            judgement,
            was_held: false,
        };
        rollout.take(STABLE, traffic.baseline);
        let mut baseline = std::mem::take(&mut rollout.news[STABLE]);
        baseline.requests = traffic.baseline;
        baseline.errors = rollout.dice.of(traffic.baseline, (traffic.fails)(STABLE, 0.0));
        rollout.analysis = Analysis::new(&baseline);
        rollout.analysis.step_started();
        rollout
    }

    fn now(&self) -> f64 {
        self.slot as f64 * SLOT
    }

    /// So many requests of a version, now.
    fn serve(&mut self, version: usize, requests: u64) {
        let fails = (self.traffic.fails)(version, self.now());
        let in_clumps = self.traffic.clumps.filter(|clumps| clumps.per_minute.is_none());
        if let Some(clumps) = in_clumps {
            let clumped = self.dice.events(requests as f64 * fails / clumps.size.mean());
            (0..clumped).for_each(|_| self.clump(version, clumps));
        } else {
            self.news[version].errors += self.dice.of(requests, fails);
        }
        self.news[version].requests += requests;
        self.take(version, requests);
    }

    /// How long so many requests take.
    fn take(&mut self, version: usize, requests: u64) {
        if let Some(takes) = self.traffic.takes {
            let (median, now) = (takes(version, self.now()), self.now());
            let mut longer = 0.0;
            if let Some(pauses) = self.traffic.pauses {
                if self.dice.unit() < pauses.per_minute / 60.0 * SLOT {
                    self.paused[version] = now + pauses.seconds;
                }
                longer = if now < self.paused[version] { 1e3 * pauses.seconds } else { 0.0 };
            }
            let durations = &mut self.news[version].durations;
            durations.resize(DURATION_BOUNDS.len() + 1, 0);
            for _ in 0..requests {
                let took = longer + median * (0.7 * self.dice.normal()).exp();
                durations[duration_bucket(took.ceil() as u64)] += 1;
            }
        }
    }

    fn clump(&mut self, version: usize, clumps: Clumps) {
        for _ in 0..clumps.size.roll(&mut self.dice) {
            let later = (self.dice.unit() * clumps.seconds / SLOT) as usize;
            self.coming[(self.slot + later) % self.coming.len()][version] += 1;
        }
    }

    /// Time goes on until there is a report, which is judged.
    fn look(&mut self) {
        loop {
            let now = self.now();
            let share = (self.traffic.share)(now);
            if self.slot > 0 && share != (self.traffic.share)(now - SLOT) {
                self.analysis.step_started();
            }
            let all = self.dice.events(self.traffic.rate * SLOT);
            let target = match self.traffic.dealing {
                Dealing::Random => self.dice.of(all, share),
                Dealing::Even => {
                    self.owed += share * all as f64;
                    let whole = self.owed.floor();
                    self.owed -= whole;
                    whole as u64
                }
            };
            self.serve(TARGET, target);
            self.serve(STABLE, all - target);
            if let Some((clumps, per_minute)) =
                self.traffic.clumps.and_then(|clumps| Some((clumps, clumps.per_minute?)))
            {
                for _ in 0..self.dice.events(per_minute / 60.0 * SLOT) {
                    let version = if self.dice.unit() < share { TARGET } else { STABLE };
                    self.clump(version, clumps);
                }
            }
            let slot = self.slot % self.coming.len();
            for (sample, clumped) in self.news.iter_mut().zip(std::mem::take(&mut self.coming[slot])) {
                sample.requests += clumped;
                sample.errors += clumped;
            }
            self.slot += 1;
            self.waited += 1;
            let is_due = match self.traffic.reports {
                Reports::Many => self.waited >= 2,
                Reports::OneProxy => self.waited >= 20 || self.waited >= 5 && self.news[TARGET].errors > 0,
            };
            if is_due {
                self.report(share);
                return;
            }
        }
    }

    fn report(&mut self, share: f64) {
        let elapsed = Duration::from_secs_f64(std::mem::take(&mut self.waited) as f64 * SLOT);
        let [target, stable] = std::mem::take(&mut self.news);
        self.analysis.tick(self.settings, &Tick { elapsed, share, target, stable });
        self.judgement = self.analysis.judgement(self.settings);
        self.was_held |= self.judgement.both_bad;
    }

    /// Until the target fails, at most for so many seconds. When it failed.
    fn until_fail(&mut self, seconds: f64) -> Option<f64> {
        self.until(seconds, Outcome::Fail)
    }

    fn until(&mut self, seconds: f64, outcome: Outcome) -> Option<f64> {
        while self.now() < seconds {
            self.look();
            if self.judgement.outcome == outcome {
                return Some(self.now());
            }
        }
        None
    }
}

fn asking() -> Settings {
    Settings { max_error_rate: Some(0.02), ..Settings::default() }
}

/// How many of so many rollouts of so many seconds fail.
fn failed(traffic: Traffic<'_>, settings: &Settings, seconds: f64, rollouts: u64) -> u64 {
    (1..=rollouts).filter(|seed| Rollout::new(traffic, settings, *seed).until_fail(seconds).is_some()).count() as u64
}

/// The middle of the values, and what nine of ten do not exceed.
fn median_and_p90(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[values.len() * 9 / 10])
}

/// How the failing of targets ends.
struct Failing {
    seconds: Vec<f64>,
    errors: Vec<f64>,
}

/// Rollouts of a target that begins to fail so many of its requests after so many seconds, the stable version always
/// the other part of its.
fn failing(rate: f64, share: f64, fails: (f64, f64), after: f64, reports: Reports, rollouts: u64) -> Failing {
    let (mut seconds, mut errors) = (Vec::new(), Vec::new());
    let fails = |version: usize, now: f64| if version == TARGET && now >= after { fails.0 } else { fails.1 };
    let share = |_: f64| share;
    for seed in 1..=rollouts {
        let traffic = Traffic { reports, ..Traffic::new(rate, &share, &fails) };
        let settings = asking();
        let mut rollout = Rollout::new(traffic, &settings, seed);
        let failed = rollout.until_fail(after + NEVER);
        seconds.push(failed.map_or(f64::INFINITY, |at| at - after));
        errors.push(rollout.judgement.target.errors as f64);
    }
    Failing { seconds, errors }
}

const NEVER: f64 = 600.0;

#[test]
fn what_fails_everything_at_a_tenth_of_100_requests_a_second_fails_within_a_second() {
    for reports in [Reports::OneProxy, Reports::Many] {
        let failing = failing(100.0, 0.1, (1.0, 0.001), 0.0, reports, 300);
        let (seconds, errors) = (median_and_p90(failing.seconds), median_and_p90(failing.errors));
        assert!(seconds.0 <= 0.8 && seconds.1 <= 1.0, "{seconds:?} s");
        assert!(errors.0 <= 8.0 && errors.1 <= 10.0, "{errors:?} errors");
    }
}

#[test]
fn what_fails_less_fails_later() {
    // At 100 requests a second: share, rates of errors, seconds that the median and nine of ten take at most.
    for (share, fails, most) in [
        (0.1, (0.5, 0.001), (6.0, 9.0)),
        (0.1, (0.05, 0.001), (30.0, 45.0)),
        (0.5, (0.2, 0.03), (25.0, 30.0)),
        (0.9, (1.0, 0.001), (1.0, 1.5)),
        (0.9, (0.1, 0.001), (20.0, 30.0)),
        (1.0, (0.3, 0.001), (4.0, 6.0)),
    ] {
        let seconds = median_and_p90(failing(100.0, share, fails, 0.0, Reports::OneProxy, 40).seconds);
        assert!(seconds.0 <= most.0 && seconds.1 <= most.1, "{share}, {fails:?}: {seconds:?} s");
    }
}

#[test]
fn what_was_fine_for_ten_minutes_fails_too() {
    for fails in [(1.0, 0.001), (1.0, 0.03)] {
        let failing = failing(20.0, 0.1, fails, 600.0, Reports::OneProxy, 12);
        let (median, _) = median_and_p90(failing.seconds);
        assert!(median <= 8.0, "{fails:?}: {median} s");
    }
}

/// At a rate at which false rollbacks could be counted.
#[test]
fn healthy_targets_are_rolled_back_no_more_often_than_promised() {
    const ROLLOUTS: u64 = 1_000;
    let settings = Settings { false_rollback_rate: 0.02, ..asking() };
    for (errors, weight, reports) in
        [(0.005, 0.1, Reports::OneProxy), (0.03, 0.1, Reports::Many), (0.03, 0.5, Reports::OneProxy)]
    {
        let (share, fails) = (|_: f64| weight, |_: usize, _: f64| errors);
        let traffic = Traffic { reports, ..Traffic::new(100.0, &share, &fails) };
        let failed = failed(traffic, &settings, 20.0, ROLLOUTS);
        assert!(failed as f64 <= 0.02 * ROLLOUTS as f64, "{failed} of {ROLLOUTS} at {errors}, {weight}");
    }
}

/// All errors come in clumps.
#[test]
fn clients_that_try_again_and_again_fail_no_target() {
    const ROLLOUTS: u64 = 300;
    for (size, seconds) in [(Size::Exactly(10), 1.0), (Size::Geometric(5.0), 0.3)] {
        for (errors, weight, dealing) in [(0.005, 0.1, Dealing::Even), (0.03, 0.5, Dealing::Random)] {
            let (share, fails) = (|_: f64| weight, |_: usize, _: f64| errors);
            let clumps = Some(Clumps { size, seconds, per_minute: None });
            let traffic = Traffic { clumps, dealing, ..Traffic::new(100.0, &share, &fails) };
            let failed = failed(traffic, &asking(), 40.0, ROLLOUTS);
            assert!(failed <= 2, "{failed} of {ROLLOUTS} at {errors}, {weight}");
        }
    }
}

#[test]
fn an_outage_of_both_is_held_and_nobodys_fault() {
    for weight in [0.01, 0.1, 0.5, 0.9] {
        for failing in [0.3, 1.0] {
            let share = |_: f64| weight;
            let fails = |_: usize, now: f64| if (5.0..15.0).contains(&now) { failing } else { 0.001 };
            for seed in 1..=20 {
                let settings = asking();
                let mut rollout = Rollout::new(Traffic::new(100.0, &share, &fails), &settings, seed);
                assert_eq!(rollout.until_fail(60.0), None, "{weight}, {failing}, {seed}");
                assert!(!rollout.judgement.both_bad, "{weight}, {failing}, {seed}");
                // Where each has a tenth of the requests at least, it is also seen.
                let is_seen = failing == 1.0 && weight != 0.01;
                assert!(rollout.was_held || !is_seen, "{weight}, {failing}, {seed}");
            }
        }
    }
}

/// Most of the requests are the target's, so that hardly anything is left to compare it with.
#[test]
fn what_both_fail_a_little_more_for_minutes_is_nobodys_fault() {
    let share = |_: f64| 0.9;
    let fails = |_: usize, now: f64| if now >= 10.0 { 0.08 } else { 0.001 };
    assert_eq!(failed(Traffic::new(100.0, &share, &fails), &asking(), 300.0, 12), 0);
}

/// A fixed threshold would always take such a target back.
#[test]
fn where_both_fail_more_than_is_allowed_it_is_held() {
    let (share, fails) = (|_: f64| 0.5, |_: usize, _: f64| 0.06);
    for seed in 1..=20 {
        let settings = asking();
        let mut rollout = Rollout::new(Traffic::new(200.0, &share, &fails), &settings, seed);
        assert_eq!(rollout.until_fail(60.0), None);
        assert!(rollout.judgement.both_bad && rollout.judgement.outcome == Outcome::Undecided, "{seed}");
    }
}

/// The requests until a pass, at most so many.
fn passes(errors: f64, most: f64, rollouts: u64) -> Vec<Option<u64>> {
    let (share, fails) = (|_: f64| 0.5, |_: usize, _: f64| errors);
    let settings = asking();
    let pass = |seed| {
        let mut rollout =
            Rollout::new(Traffic { reports: Reports::Many, ..Traffic::new(1_000.0, &share, &fails) }, &settings, seed);
        let passed = rollout.until(most / 500.0, Outcome::Pass);
        passed.map(|_| rollout.judgement.target.requests)
    };
    (1..=rollouts).map(pass).collect()
}

#[test]
fn who_fails_less_than_allowed_passes_and_hardly_anybody_else() {
    let wrong = passes(0.02, 20_000.0, 400).iter().flatten().count();
    assert!((1..=20).contains(&wrong), "{wrong} of 400 at the limit");
    let most_requests = |errors: f64, requests: u64| {
        let mut passes = passes(errors, 4_000.0, 100);
        passes.sort_by_key(|passed| passed.unwrap_or(u64::MAX));
        assert!(passes[50].is_some_and(|passed| passed <= requests), "{:?} at {errors}", passes[50]);
    };
    most_requests(0.0, 250);
    most_requests(0.001, 300);
    most_requests(0.005, 700);
}

#[test]
fn too_little_traffic_is_undecided() {
    let (share, fails) = (|_: f64| 0.1, |_: usize, _: f64| 0.0);
    for seed in 1..=5 {
        let settings = asking();
        let mut rollout = Rollout::new(Traffic::new(0.2, &share, &fails), &settings, seed);
        while rollout.now() < 1_800.0 {
            rollout.look();
            assert_eq!(rollout.judgement.outcome, Outcome::Undecided);
        }
    }
}

fn with_latency() -> Settings {
    Settings { latency: Some(Latency::default()), ..asking() }
}

/// When targets fail that take so many times as long as the stable version, which takes so many milliseconds.
fn slow(rate: f64, weight: f64, (times, median): (f64, f64), most: f64, rollouts: u64) -> Vec<f64> {
    let (share, fails) = (|_: f64| weight, |_: usize, _: f64| 0.001);
    let takes = |version: usize, _: f64| if version == TARGET { times * median } else { median };
    let settings = with_latency();
    let failed = |seed| {
        let traffic = Traffic { takes: Some(&takes), ..Traffic::new(rate, &share, &fails) };
        Rollout::new(traffic, &settings, seed).until_fail(most).unwrap_or(f64::INFINITY)
    };
    (1..=rollouts).map(failed).collect()
}

#[test]
fn who_is_slower_fails_and_who_is_not_does_not() {
    let (median, _) = median_and_p90(slow(100.0, 0.1, (4.0, 30.0), 120.0, 20));
    assert!(median <= 60.0, "{median} s");
    assert!(slow(100.0, 0.5, (1.0, 30.0), 30.0, 50).iter().all(|at| at.is_infinite()));
    // 2 ms instead of 1 ms is nothing to anybody.
    assert!(slow(100.0, 0.5, (2.0, 1.0), 30.0, 20).iter().all(|at| at.is_infinite()));
}

/// Tables 1 and 2: steps of half a minute each.
const STEPS: [f64; 4] = [0.01, 0.1, 0.5, 0.9];
const STEP: f64 = 30.0;

fn steps(now: f64) -> f64 {
    STEPS[((now / STEP) as usize).min(STEPS.len() - 1)]
}

/// A table's columns after the first ones.
fn header(first: &str, columns: &[String]) {
    println!("| {first} | {} |", columns.join(" | "));
    println!("|{}", " --- |".repeat(first.matches('|').count() + 1 + columns.len()));
}

fn percent(rates: &[f64], what: &str) -> Vec<String> {
    rates.iter().map(|rate| format!("{} %{what}", (rate * 1e4).round() / 1e2)).collect()
}

/// How many of so many rollouts fail: a quarter each with even and random dealing and with few and many proxies.
fn failed_of_all_kinds(traffic: Traffic<'_>, settings: &Settings, seconds: f64, rollouts: u64) -> u64 {
    let kinds = [Dealing::Even, Dealing::Random]
        .into_iter()
        .flat_map(|dealing| [Reports::OneProxy, Reports::Many].map(|reports| Traffic { dealing, reports, ..traffic }));
    kinds.map(|traffic| failed(traffic, settings, seconds, rollouts / 4)).sum()
}

#[test]
#[ignore = "prints a table"]
fn table_1_healthy_targets() {
    const ROLLOUTS: u64 = 4_000;
    const ERRORS: [f64; 3] = [0.001, 0.005, 0.03];
    println!("Rollbacks of {ROLLOUTS} rollouts:\n");
    header("errors come | requests/s", &percent(&ERRORS, " errors"));
    let clumps = |size, seconds| Some(Clumps { size, seconds, per_minute: None });
    for (name, clumps) in [
        ("one by one", None),
        ("10 within 1 s", clumps(Size::Exactly(10), 1.0)),
        ("5 on average within 1 s", clumps(Size::Geometric(5.0), 1.0)),
        ("3 on average within 0.2 s", clumps(Size::Geometric(3.0), 0.2)),
    ] {
        for rate in [5.0, 20.0, 100.0, 1_000.0] {
            let cells = ERRORS.map(|errors| {
                let fails = |_: usize, _: f64| errors;
                let traffic = Traffic { clumps, ..Traffic::new(rate, &steps, &fails) };
                failed_of_all_kinds(traffic, &asking(), STEP * STEPS.len() as f64, ROLLOUTS).to_string()
            });
            println!("| {name} | {rate} | {} |", cells.join(" | "));
        }
    }
    println!();
}

#[test]
#[ignore = "prints a table"]
fn table_2_more_clumps() {
    const ROLLOUTS: u64 = 1_000;
    const SIZES: [u64; 4] = [5, 10, 20, 50];
    println!("Rollbacks of {ROLLOUTS} rollouts:\n");
    header("clumps | requests/s", &SIZES.map(|size| format!("{size} errors")));
    for (per_minute, seconds) in [(1.0, 0.1), (1.0, 1.0), (1.0, 3.0), (6.0, 0.1), (6.0, 1.0), (6.0, 3.0)] {
        for rate in [20.0, 100.0, 1_000.0] {
            let cells = SIZES.map(|size| {
                let fails = |_: usize, _: f64| 0.001;
                let clumps = Some(Clumps { size: Size::Exactly(size), seconds, per_minute: Some(per_minute) });
                let traffic = Traffic { clumps, ..Traffic::new(rate, &steps, &fails) };
                failed_of_all_kinds(traffic, &asking(), STEP * STEPS.len() as f64, ROLLOUTS).to_string()
            });
            println!("| {per_minute} a minute within {seconds} s | {rate} | {} |", cells.join(" | "));
        }
    }
    println!();
}

/// How many of so many rollouts fail in which each version fails everything, or so much, for a while from 20 s on, the
/// target so much later, the stable version so much of it.
fn outages(weight: f64, rate: f64, outage: f64, (failing, others): (f64, f64), later: f64, rollouts: u64) -> u64 {
    let share = |_: f64| weight;
    let fails = |version: usize, now: f64| {
        let (begin, failing) = if version == TARGET { (20.0 + later, failing) } else { (20.0, others) };
        if (begin..begin + outage).contains(&now) { failing } else { 0.001 }
    };
    failed_of_all_kinds(Traffic::new(rate, &share, &fails), &asking(), 20.0 + outage + later + 30.0, rollouts)
}

#[test]
#[ignore = "prints a table"]
fn table_3_outages_of_both() {
    const ROLLOUTS: u64 = 400;
    println!("Rollbacks of {ROLLOUTS} rollouts:\n");
    header("both fail | for | the target's errors come later by", &percent(&STEPS, ""));
    let at_once = [1.0, 0.3, 0.1, 0.05].map(|failing| [1.0, 10.0, 60.0, 300.0].map(|outage| (failing, outage, 0.0)));
    let later = [1.0, 0.3].map(|failing| [0.3, 0.5, 1.0, 2.0].map(|later| (failing, 10.0, later)));
    for (failing, outage, later) in at_once.into_iter().chain(later).flatten() {
        let cells = STEPS.map(|weight| outages(weight, 100.0, outage, (failing, failing), later, ROLLOUTS).to_string());
        println!("| {} % | {outage} s | {later} s | {} |", failing * 100.0, cells.join(" | "));
    }
    println!();
}

#[test]
#[ignore = "prints a table"]
fn table_4_outages_of_the_target() {
    const ROLLOUTS: u64 = 400;
    const SECONDS: [f64; 7] = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0];
    println!("Rollbacks of {ROLLOUTS} rollouts:\n");
    header("requests/s | share", &SECONDS.map(|seconds| format!("{seconds} s")));
    for rate in [20.0, 100.0, 1_000.0] {
        for weight in STEPS {
            let cells = SECONDS.map(|outage| outages(weight, rate, outage, (1.0, 0.001), 0.0, ROLLOUTS).to_string());
            println!("| {rate} | {} % | {} |", weight * 100.0, cells.join(" | "));
        }
    }
    println!();
}

fn seconds(value: f64) -> String {
    if value > NEVER { format!("> {NEVER}") } else { format!("{value:.1}") }
}

fn failing_row(rate: f64, share: f64, failing_rates: &[(f64, f64)], after: f64, rollouts: u64) -> String {
    let cells = failing_rates.iter().map(|fails| {
        let [one, many] =
            [Reports::OneProxy, Reports::Many].map(|r| failing(rate, share, *fails, after, r, rollouts / 2));
        let (median, p90) = median_and_p90([one.seconds, many.seconds].concat());
        let (errors, _) = median_and_p90([one.errors, many.errors].concat());
        format!("{} / {} s, {errors}", seconds(median), seconds(p90))
    });
    cells.collect::<Vec<_>>().join(" | ")
}

#[test]
#[ignore = "prints a table"]
fn table_5_failing_targets() {
    const ROLLOUTS: u64 = 200;
    const FAILING: [f64; 6] = [1.0, 0.5, 0.2, 0.05, 0.02, 0.005];
    header("requests/s | share", &percent(&FAILING, ""));
    for rate in [5.0, 20.0, 100.0, 1_000.0] {
        for share in STEPS {
            let cells = failing_row(rate, share, &FAILING.map(|fails| (fails, 0.001)), 0.0, ROLLOUTS);
            println!("| {rate} | {} % | {cells} |", share * 100.0);
        }
    }
    println!();
}

#[test]
#[ignore = "prints a table"]
fn table_6_failing_targets_otherwise() {
    const ROLLOUTS: u64 = 100;
    const FAILING: [f64; 4] = [1.0, 0.5, 0.3, 0.1];
    header("at 100 requests/s | share", &percent(&FAILING, ""));
    for (name, others, after) in [
        ("the stable version fails 0.5 %", 0.005, 0.0),
        ("the stable version fails 3 %", 0.03, 0.0),
        ("fine for the first 10 minutes", 0.001, 600.0),
    ] {
        for share in STEPS {
            let cells = failing_row(100.0, share, &FAILING.map(|fails| (fails, others)), after, ROLLOUTS);
            println!("| {name} | {} % | {cells} |", share * 100.0);
        }
    }
    println!();
}

#[test]
#[ignore = "prints a table"]
fn table_7_passes() {
    const ROLLOUTS: u64 = 4_000;
    const REQUESTS: [u64; 5] = [200, 500, 1_000, 2_000, 10_000];
    println!("Rollouts of {ROLLOUTS} that passed at some time within so many requests:\n");
    header("fails", &REQUESTS.map(|requests| requests.to_string()));
    for errors in [0.0, 0.001, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05] {
        let passes = passes(errors, 10_000.0, ROLLOUTS);
        let within = REQUESTS.map(|most| passes.iter().flatten().filter(|requests| **requests <= most).count());
        let shares = within.map(|passed| format!("{:.1} %", 100.0 * passed as f64 / ROLLOUTS as f64));
        println!("| {} % | {} |", (errors * 1e3).round() / 10.0, shares.join(" | "));
    }
    println!();
}

#[test]
#[ignore = "prints a table"]
fn table_8_slow_targets() {
    const ROLLOUTS: u64 = 60;
    const TIMES: [f64; 5] = [1.2, 1.5, 2.0, 3.0, 10.0];
    header("requests/s | share", &TIMES.map(|times| format!("{times} times")));
    for rate in [20.0, 100.0, 500.0] {
        for share in [0.1, 0.5] {
            let cells = TIMES.map(|times| {
                let (median, p90) = median_and_p90(slow(rate, share, (times, 30.0), 300.0, ROLLOUTS));
                let told = |value: f64| if value > 300.0 { "> 300".to_owned() } else { format!("{value:.0}") };
                format!("{} / {} s", told(median), told(p90))
            });
            println!("| {rate} | {} % | {} |", share * 100.0, cells.join(" | "));
        }
    }
    println!();
}

#[test]
#[ignore = "prints a table"]
fn table_9_pauses() {
    const ROLLOUTS: u64 = 400;
    const SECONDS: [f64; 4] = [0.1, 0.3, 1.0, 3.0];
    println!("Rollbacks of {ROLLOUTS} rollouts:\n");
    header("pauses of each version | requests/s", &SECONDS.map(|seconds| format!("{seconds} s")));
    for per_minute in [1.0, 6.0] {
        for rate in [20.0, 100.0] {
            let cells = SECONDS.map(|seconds| {
                let pauses = Some(Pauses { per_minute, seconds });
                let (fails, takes) = (|_: usize, _: f64| 0.001, |_: usize, _: f64| 30.0);
                let traffic = Traffic { pauses, takes: Some(&takes), ..Traffic::new(rate, &steps, &fails) };
                failed_of_all_kinds(traffic, &with_latency(), STEP * STEPS.len() as f64, ROLLOUTS).to_string()
            });
            println!("| {per_minute} a minute | {rate} | {} |", cells.join(" | "));
        }
    }
    println!();
}
