//! The verdict against simulated rollouts: how often it fails a target that is no worse than the stable version, and
//! how fast one that is; whom it lets pass. Time is an argument, so hours pass in milliseconds.
//!
//! With optimization it is thousands of rollouts each, without only a few. `make verdict-tables` prints the tables of
//! `docs/verdict-proof.md`, from even more.

#![cfg(not(target_arch = "wasm32"))] // Thousands of rollouts are slow there.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)] // Tests unwrap; tables are printed.

#[path = "simulated/dice.rs"]
mod dice;
#[path = "simulated/runs.rs"]
mod runs;

use dice::Dice;
use runs::{For, divided, many, what_for};
use std::time::Duration;
use tideshift_core::counts::{DURATION_BOUNDS, duration_bucket};
use tideshift_core::verdict::{Analysis, Judgement, Latency, Outcome, RollingBaseline, Sample, Settings, Tick};

/// Errors that come together, besides other requests: a client that tries again and again.
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
    share: &'a (dyn Fn(f64) -> f64 + Sync),
    /// The probability that a version's request fails.
    fails: &'a (dyn Fn(usize, f64) -> f64 + Sync),
    /// Milliseconds that a version's requests take, their median.
    takes: Option<&'a (dyn Fn(usize, f64) -> f64 + Sync)>,
    /// All that a version is asked takes longer now and then.
    pauses: Option<Pauses>,
    clumps: Option<Clumps>,
    dealing: Dealing,
    reports: Reports,
    /// Requests of the stable version that are known from before.
    baseline: u64,
}

impl<'a> Traffic<'a> {
    fn new(rate: f64, share: &'a (dyn Fn(f64) -> f64 + Sync), fails: &'a (dyn Fn(usize, f64) -> f64 + Sync)) -> Self {
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
        let mut dice = Dice::new(seed);
        let owed = dice.unit();
        let waited = if traffic.reports == Reports::Many { 0 } else { dice.roll() as usize % 20 };
        let analysis = Analysis::new(RollingBaseline::default());
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
        let mut known = RollingBaseline::default();
        known.add(&baseline);
        rollout.analysis = Analysis::new(known);
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
            (0..clumped).for_each(|_| self.clump(clumps));
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

    /// Bad requests of one client, which are dealt like all others.
    fn clump(&mut self, clumps: Clumps) {
        let share = (self.traffic.share)(self.now());
        for _ in 0..clumps.size.roll(&mut self.dice) {
            let version = if self.dice.unit() < share { TARGET } else { STABLE };
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
                    self.clump(clumps);
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
        self.analysis
            .tick(self.settings, &Tick { elapsed, share, few_clients: true, target, stable, ..Tick::default() });
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

/// So many rollouts for a table, so many where its numbers are only asserted.
fn rollouts(table: u64, asserted: u64) -> u64 {
    match what_for() {
        For::Tables => divided(table).max(20),
        For::Assertions => asserted,
        For::Nothing => (asserted / 200).max(4),
    }
}

/// All of a table's parts, or those that are always run.
fn parts<T: Copy>(all: &[T], asserted: &[usize]) -> Vec<T> {
    match what_for() {
        For::Tables => all.to_vec(),
        _ => asserted.iter().map(|i| all[*i]).collect(),
    }
}

/// Medians and the like are nothing if there are only a few.
fn are_enough() -> bool {
    what_for() != For::Nothing
}

/// How many of so many rollouts of so many seconds fail.
fn failed(traffic: Traffic<'_>, settings: &Settings, seconds: f64, rollouts: u64) -> u64 {
    let fails = many(rollouts, |seed| Rollout::new(traffic, settings, seed).until_fail(seconds).is_some());
    fails.into_iter().filter(|fails| *fails).count() as u64
}

/// The same, a quarter each with even and random dealing and with few and many proxies.
fn failed_of_all_kinds(traffic: Traffic<'_>, settings: &Settings, seconds: f64, rollouts: u64) -> u64 {
    let kinds = [Dealing::Even, Dealing::Random]
        .into_iter()
        .flat_map(|dealing| [Reports::OneProxy, Reports::Many].map(|reports| Traffic { dealing, reports, ..traffic }));
    kinds.map(|traffic| failed(traffic, settings, seconds, rollouts / 4)).sum()
}

/// The middle of the values, and what nine of ten do not exceed.
fn median_and_p90(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[values.len() * 9 / 10])
}

/// A table's columns after the first ones.
fn header(first: &str, columns: &[String]) {
    println!("| {first} | {} |", columns.join(" | "));
    println!("|{}", " --- |".repeat(first.matches('|').count() + 1 + columns.len()));
}

fn percent(rates: &[f64], what: &str) -> Vec<String> {
    rates.iter().map(|rate| format!("{} %{what}", in_percent(*rate))).collect()
}

fn in_percent(rate: f64) -> f64 {
    (rate * 1e4).round() / 1e2
}

/// The shares that a rollout goes through, …
const SHARES: [f64; 5] = [0.01, 0.1, 0.5, 0.9, 0.99];
/// … and the seconds that each lasts.
const STEP: f64 = 24.0;
const ROLLOUT: f64 = STEP * SHARES.len() as f64;

fn steps(now: f64) -> f64 {
    SHARES[((now / STEP) as usize).min(SHARES.len() - 1)]
}

/// α, with which everything below runs unless it says otherwise.
const PROMISED: f64 = 0.001;

#[test]
fn table_1_healthy_targets() {
    const ERRORS: [f64; 3] = [0.001, 0.005, 0.03];
    let rollouts = rollouts(4_000, 2_000);
    println!("Rollbacks of {rollouts} rollouts:\n");
    header("errors come | requests/s", &percent(&ERRORS, " errors"));
    let clumps = |size, seconds| Some(Clumps { size, seconds, per_minute: None });
    let kinds = [
        ("one by one", None),
        ("10 within 1 s", clumps(Size::Exactly(10), 1.0)),
        ("5 on average within 1 s", clumps(Size::Geometric(5.0), 1.0)),
        ("3 on average within 0.2 s", clumps(Size::Geometric(3.0), 0.2)),
    ];
    for (name, clumps) in parts(&kinds, &[0, 1]) {
        let mut all = 0;
        let rates = parts(&[5.0, 20.0, 100.0, 1_000.0], &[0, 2, 3]);
        for rate in &rates {
            let cells = ERRORS.map(|errors| {
                let fails = |_: usize, _: f64| errors;
                let traffic = Traffic { clumps, ..Traffic::new(*rate, &steps, &fails) };
                let failed = failed_of_all_kinds(traffic, &asking(), ROLLOUT, rollouts);
                let most = (PROMISED * rollouts as f64).ceil() as u64 + 2;
                assert!(failed <= most, "{failed} of {rollouts}, {name}, {rate} requests/s, {errors}");
                all += failed;
                failed.to_string()
            });
            println!("| {name} | {rate} | {} |", cells.join(" | "));
        }
        let most = PROMISED * (rollouts * 3 * rates.len() as u64) as f64;
        assert!(all as f64 <= most, "{all} of all, {name}");
    }
    println!();
}

/// At rates that can be counted. The caps make it rarer than α by far; were α kept five times worse than now, this would
/// show it.
#[test]
fn what_is_promised_is_kept_where_it_can_be_counted() {
    let rollouts = rollouts(4_000, 4_000);
    for (promised, known) in [(0.5, 0.1), (0.25, 0.05)] {
        let settings = Settings { false_rollback_rate: promised, ..asking() };
        for (rate, errors, weight) in
            [(20.0, 0.005, 0.1), (100.0, 0.005, 0.1), (100.0, 0.03, 0.5), (1_000.0, 0.001, 0.01)]
        {
            let (share, fails) = (|_: f64| weight, |_: usize, _: f64| errors);
            let failed = failed_of_all_kinds(Traffic::new(rate, &share, &fails), &settings, 30.0, rollouts);
            let most = (known * rollouts as f64).max(3.0);
            assert!(failed as f64 <= most, "{failed} of {rollouts} at {rate} requests/s, {errors}, {weight}");
        }
    }
}

#[test]
fn table_2_more_clumps() {
    const SIZES: [u64; 4] = [5, 10, 20, 50];
    let rollouts = rollouts(1_000, 400);
    println!("Rollbacks of {rollouts} rollouts:\n");
    header("clumps | requests/s", &SIZES.map(|size| format!("{size} errors")));
    let kinds = [(1.0, 0.1), (1.0, 1.0), (1.0, 3.0), (6.0, 0.1), (6.0, 1.0), (6.0, 3.0)];
    for (per_minute, seconds) in parts(&kinds, &[1, 3]) {
        for rate in parts(&[20.0, 100.0, 1_000.0], &[1]) {
            let cells = parts(&SIZES, &[0, 1]).into_iter().map(|size| {
                let fails = |_: usize, _: f64| 0.001;
                let (size, per_minute) = (Size::Exactly(size), Some(per_minute));
                let clumps = Some(Clumps { size, seconds, per_minute });
                let traffic = Traffic { clumps, ..Traffic::new(rate, &steps, &fails) };
                let failed = failed_of_all_kinds(traffic, &asking(), ROLLOUT, rollouts);
                assert!(size.mean() > 10.0 || failed <= 3, "{failed} of {rollouts}, {}, {rate}", size.mean());
                failed.to_string()
            });
            let cells = cells.collect::<Vec<_>>().join(" | ");
            println!("| {per_minute} a minute within {seconds} s | {rate} | {cells} |");
        }
    }
    println!();
}

/// How many of so many rollouts fail in which each version fails everything, or so much, for a while from 20 s on, the
/// target so much later, the stable version so much of it.
fn outages(traffic: Traffic<'_>, outage: f64, (failing, others): (f64, f64), later: f64, rollouts: u64) -> u64 {
    let fails = |version: usize, now: f64| {
        let (begin, failing) = if version == TARGET { (20.0 + later, failing) } else { (20.0, others) };
        if (begin..begin + outage).contains(&now) { failing } else { 0.001 }
    };
    let traffic = Traffic { fails: &fails, ..traffic };
    failed_of_all_kinds(traffic, &asking(), 20.0 + outage + later + 30.0, rollouts)
}

#[test]
fn table_3_outages_of_both() {
    const SHARES: [f64; 7] = [0.01, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99];
    let nothing = |_: usize, _: f64| 0.0;
    println!("Rollbacks:\n");
    header("both fail | for | the target's errors come later by | rollouts", &percent(&SHARES, ""));
    let each = |failing: [f64; 4], others: [f64; 4]| failing.map(|fails| others.map(|other| (fails, other))).concat();
    let at_once = parts(&each([1.0, 0.3, 0.1, 0.05], [1.0, 10.0, 60.0, 300.0]), &[1, 5, 10, 11]).into_iter();
    let at_once = at_once.map(|(failing, outage)| (failing, outage, 0.0));
    let later = [1.0, 0.3].map(|fails| [0.3, 0.5, 1.0, 2.0].map(|later| (fails, 10.0, later))).concat();
    let later = parts(&later, &[0, 1, 7]);
    for (failing, outage, later) in at_once.chain(later) {
        let number = if outage > 100.0 { 400 } else { 1_000 };
        let rollouts = rollouts(number, number);
        let cells = SHARES.map(|weight| {
            let share = |_: f64| weight;
            let traffic = Traffic::new(100.0, &share, &nothing);
            let failed = outages(traffic, outage, (failing, failing), later, rollouts);
            // A target whose errors come a second later has failed alone for a second.
            assert!(later >= 1.0 || failed <= 2, "{failed} of {rollouts}: {failing}, {outage} s, {later} s, {weight}");
            failed.to_string()
        });
        let cells = cells.join(" | ");
        println!("| {} % | {outage} s | {later} s | {rollouts} | {cells} |", in_percent(failing));
    }
    println!();
}

/// Nothing is known of the stable version, and both fail more than is allowed.
#[test]
fn who_begins_with_nothing_known_is_not_failed_for_it() {
    let rollouts = rollouts(2_000, 2_000);
    for rate in [5.0, 100.0] {
        for weight in [0.01, 0.1, 0.5, 0.9, 0.99] {
            let (share, fails) = (|_: f64| weight, |_: usize, _: f64| 0.03);
            let traffic = Traffic { baseline: 0, ..Traffic::new(rate, &share, &fails) };
            let failed = failed_of_all_kinds(traffic, &asking(), 60.0, rollouts);
            assert!(failed <= 2, "{failed} of {rollouts} at {rate} requests/s, {weight}");
        }
    }
}

#[test]
fn table_4_outages_of_the_target() {
    const SECONDS: [f64; 7] = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0];
    let rollouts = rollouts(400, 200);
    let nothing = |_: usize, _: f64| 0.0;
    println!("Rollbacks of {rollouts} rollouts:\n");
    header("requests/s | share", &SECONDS.map(|seconds| format!("{seconds} s")));
    for rate in parts(&[20.0, 100.0, 1_000.0], &[1]) {
        for weight in SHARES {
            let share = |_: f64| weight;
            let cells = SECONDS.map(|outage| {
                let failed = outages(Traffic::new(rate, &share, &nothing), outage, (1.0, 0.001), 0.0, rollouts);
                // At 1,000 requests a second, ten errors in 0.1 s are enough to tell the versions apart.
                assert!(
                    rate > 100.0 || outage > 0.3 || failed <= rollouts / 50,
                    "{failed} of {rollouts}: {outage} s, {rate}, {weight}"
                );
                failed.to_string()
            });
            println!("| {rate} | {} % | {} |", in_percent(weight), cells.join(" | "));
        }
    }
    println!();
}

const NEVER: f64 = 600.0;

/// How the failing of targets ends.
struct Failing {
    seconds: (f64, f64),
    errors: (f64, f64),
}

/// A target that begins to fail so many of its requests after so many seconds, the stable version always the other part
/// of its; of that so many requests are known from before.
#[derive(Clone, Copy)]
struct Bad {
    rate: f64,
    share: f64,
    fails: (f64, f64),
    after: f64,
    baseline: u64,
}

impl Bad {
    fn new(rate: f64, share: f64, fails: (f64, f64)) -> Self {
        Self { rate, share, fails, after: 0.0, baseline: 10_000 }
    }

    /// Half of the rollouts each with one proxy and with many: median and nine of ten.
    fn play(self, rollouts: u64) -> Failing {
        let fails = |version: usize, now: f64| {
            if version == TARGET && now >= self.after { self.fails.0 } else { self.fails.1 }
        };
        let (share, settings) = (|_: f64| self.share, asking());
        let kinds = [Reports::OneProxy, Reports::Many].map(|reports| {
            let traffic = Traffic { reports, baseline: self.baseline, ..Traffic::new(self.rate, &share, &fails) };
            many(rollouts / 2, |seed| {
                let mut rollout = Rollout::new(traffic, &settings, seed);
                let failed = rollout.until_fail(self.after + NEVER);
                (failed.map_or(f64::INFINITY, |at| at - self.after), rollout.judgement.target.errors as f64)
            })
        });
        let (seconds, errors) = kinds.concat().into_iter().unzip();
        Failing { seconds: median_and_p90(seconds), errors: median_and_p90(errors) }
    }

    fn cell(self, rollouts: u64) -> String {
        let told = |seconds: f64| if seconds > NEVER { format!("> {NEVER}") } else { format!("{seconds:.1}") };
        let Failing { seconds, errors } = self.play(rollouts);
        format!("{} / {} s, {}", told(seconds.0), told(seconds.1), errors.0)
    }
}

/// Seconds that the median and nine of ten take at most; a fifth more than what was measured.
#[test]
fn what_fails_less_fails_later() {
    let known = |rate, share, fails| Bad::new(rate, share, fails);
    let unknown = |rate, share, fails| Bad { baseline: 0, ..Bad::new(rate, share, fails) };
    let later = |rate, share, fails| Bad { after: 600.0, ..Bad::new(rate, share, fails) };
    let mut late = Vec::new();
    for (bad, rollouts_, most) in [
        (known(100.0, 0.1, (1.0, 0.001)), 2_000, (1.0, 1.3)),
        (known(100.0, 0.1, (0.5, 0.001)), 2_000, (5.0, 8.0)),
        (known(100.0, 0.1, (0.05, 0.001)), 2_000, (26.0, 38.0)),
        (known(100.0, 0.1, (0.02, 0.001)), 1_000, (57.0, 86.0)),
        (known(100.0, 0.1, (0.005, 0.001)), 300, (440.0, f64::INFINITY)),
        (known(100.0, 0.5, (0.2, 0.001)), 2_000, (8.5, 11.0)),
        (known(100.0, 0.5, (0.2, 0.03)), 1_000, (18.0, 23.0)),
        (known(100.0, 0.9, (1.0, 0.001)), 2_000, (1.0, 1.2)),
        (known(100.0, 0.9, (0.2, 0.001)), 2_000, (7.0, 9.0)),
        (known(100.0, 0.9, (0.1, 0.001)), 1_000, (19.0, 24.0)),
        (known(100.0, 0.99, (1.0, 0.001)), 1_000, (5.5, 6.5)),
        (known(100.0, 0.99, (0.2, 0.001)), 1_000, (53.0, 58.0)),
        (known(100.0, 1.0, (0.3, 0.001)), 1_000, (4.0, 4.5)),
        (known(5.0, 0.1, (1.0, 0.001)), 2_000, (16.0, 20.0)),
        (known(5.0, 0.5, (0.2, 0.001)), 1_000, (63.0, 78.0)),
        (known(1_000.0, 0.1, (0.05, 0.001)), 400, (14.5, 18.5)),
        (known(1_000.0, 0.5, (0.02, 0.001)), 400, (24.0, 28.0)),
        (unknown(100.0, 0.9, (0.2, 0.001)), 1_000, (8.0, 11.0)),
        (unknown(100.0, 1.0, (0.4, 0.0)), 1_000, (4.0, 4.5)),
        (unknown(100.0, 1.0, (0.1, 0.0)), 1_000, (36.0, 45.0)),
        (Bad { baseline: 300, ..known(1.0, 1.0, (0.4, 0.001)) }, 1_000, (140.0, 190.0)),
        (later(20.0, 0.1, (1.0, 0.001)), 100, (9.0, 15.0)),
        (later(20.0, 0.1, (1.0, 0.03)), 100, (15.0, 20.0)),
    ] {
        let Failing { seconds, errors } = bad.play(rollouts(rollouts_, rollouts_));
        let name = format!("{} requests/s, {}, {:?}, {}", bad.rate, bad.share, bad.fails, bad.baseline);
        println!("{name}: {seconds:?} s of {most:?}, {errors:?} errors");
        if are_enough() && (seconds.0 > most.0 || seconds.1 > most.1) {
            late.push(format!("{name}: {seconds:?} s, {most:?} at most"));
        }
    }
    assert!(late.is_empty(), "{late:#?}");
    // Safety: what fails everything at a tenth of 100 requests a second.
    let errors = Bad::new(100.0, 0.1, (1.0, 0.001)).play(rollouts(1_000, 1_000)).errors;
    assert!(errors.0 <= 10.0 && errors.1 <= 12.0 || !are_enough(), "{errors:?} errors");
}

#[test]
fn table_5_failing_targets() {
    const FAILING: [f64; 6] = [1.0, 0.5, 0.2, 0.05, 0.02, 0.005];
    let rollouts = rollouts(400, 4);
    println!("Median and nine of ten of {rollouts} rollouts:\n");
    header("requests/s | share", &percent(&FAILING, ""));
    for rate in parts(&[5.0, 20.0, 100.0, 1_000.0], &[2]) {
        for share in SHARES {
            let cells = FAILING.map(|fails| Bad::new(rate, share, (fails, 0.001)).cell(rollouts));
            println!("| {rate} | {} % | {} |", in_percent(share), cells.join(" | "));
        }
    }
    println!();
}

#[test]
fn table_6_failing_targets_otherwise() {
    const FAILING: [f64; 4] = [1.0, 0.5, 0.2, 0.1];
    let rollouts = rollouts(400, 4);
    println!("Median and nine of ten of {rollouts} rollouts:\n");
    header("at 100 requests/s | share", &percent(&FAILING, ""));
    let usual = Bad::new(100.0, 0.0, (0.0, 0.001));
    let others = |others| Bad { fails: (0.0, others), ..usual };
    for (name, bad) in parts(
        &[
            ("the stable version fails 0.5 %", others(0.005)),
            ("the stable version fails 3 %", others(0.03)),
            ("1,000 requests are known", Bad { baseline: 1_000, ..usual }),
            ("none are known", Bad { baseline: 0, ..usual }),
            ("fine for the first 10 minutes", Bad { after: 600.0, ..usual }),
        ],
        &[1, 3],
    ) {
        for share in SHARES.into_iter().chain([1.0]) {
            let cells = FAILING.map(|fails| Bad { share, fails: (fails, bad.fails.1), ..bad }.cell(rollouts));
            println!("| {name} | {} % | {} |", in_percent(share), cells.join(" | "));
        }
    }
    println!();
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

/// The requests until a pass, at most so many; sorted, none last.
fn passes(errors: f64, most: f64, rollouts: u64) -> Vec<u64> {
    let (share, fails) = (|_: f64| 0.5, |_: usize, _: f64| errors);
    let settings = asking();
    let mut passes = many(rollouts, |seed| {
        let traffic = Traffic { reports: Reports::Many, ..Traffic::new(1_000.0, &share, &fails) };
        let mut rollout = Rollout::new(traffic, &settings, seed);
        let passed = rollout.until(most / 500.0, Outcome::Pass);
        passed.map_or(u64::MAX, |_| rollout.judgement.target.requests)
    });
    passes.sort_unstable();
    passes
}

#[test]
fn table_7_passes() {
    const REQUESTS: [u64; 5] = [200, 500, 1_000, 2_000, 10_000];
    /// Rates, and the requests within which half have passed, or the part that passes at most.
    const ERRORS: [(f64, Result<u64, f64>); 9] = [
        (0.0, Ok(250)),
        (0.001, Ok(300)),
        (0.005, Ok(600)),
        (0.01, Ok(1_500)),
        (0.015, Err(0.3)),
        (0.02, Err(0.05)),
        (0.025, Err(0.02)),
        (0.03, Err(0.01)),
        (0.05, Err(0.002)),
    ];
    let rollouts = rollouts(4_000, 4_000);
    println!("Rollouts of {rollouts} that passed at some time within so many requests:\n");
    header("fails", &REQUESTS.map(|requests| requests.to_string()));
    for (errors, expected) in ERRORS {
        let passes = passes(errors, 10_000.0, rollouts);
        let within = |most: u64| passes.iter().filter(|requests| **requests <= most).count() as f64 / rollouts as f64;
        let shares = REQUESTS.map(|most| format!("{:.1} %", 100.0 * within(most)));
        println!("| {} % | {} |", in_percent(errors), shares.join(" | "));
        match expected {
            _ if !are_enough() => (),
            Ok(most) => assert!(within(most) >= 0.5, "{errors}: {} within {most}", within(most)),
            Err(most) => assert!(within(u64::MAX - 1) <= most, "{errors}: {}", within(u64::MAX - 1)),
        }
    }
    println!();
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

/// When targets fail that take so many times as long as the stable version, which takes so many milliseconds: median
/// and nine of ten.
fn slow(rate: f64, weight: f64, (times, median): (f64, f64), most: f64, rollouts: u64) -> (f64, f64) {
    let (share, fails) = (|_: f64| weight, |_: usize, _: f64| 0.001);
    let takes = |version: usize, _: f64| if version == TARGET { times * median } else { median };
    let settings = with_latency();
    median_and_p90(many(rollouts, |seed| {
        let traffic = Traffic { takes: Some(&takes), ..Traffic::new(rate, &share, &fails) };
        Rollout::new(traffic, &settings, seed).until_fail(most).unwrap_or(f64::INFINITY)
    }))
}

#[test]
fn who_is_slower_fails_and_who_is_not_does_not() {
    let (median, p90) = slow(100.0, 0.1, (4.0, 30.0), 120.0, rollouts(300, 300));
    assert!(median <= 30.0 && p90 <= 40.0 || !are_enough(), "{median} s, {p90} s");
    // Equally slow; and 2 ms instead of 1 ms does not matter.
    for times in [(1.0, 30.0), (2.0, 1.0)] {
        let (share, fails) = (|_: f64| 0.5, |_: usize, _: f64| 0.001);
        let takes = |version: usize, _: f64| if version == TARGET { times.0 * times.1 } else { times.1 };
        let traffic = Traffic { takes: Some(&takes), ..Traffic::new(100.0, &share, &fails) };
        let rollouts = rollouts(1_000, 1_000);
        let failed = failed(traffic, &with_latency(), 30.0, rollouts);
        assert!(failed <= 1, "{failed} of {rollouts}, {times:?}");
    }
}

#[test]
fn table_8_slow_targets() {
    const TIMES: [f64; 5] = [1.2, 1.5, 2.0, 3.0, 10.0];
    let rollouts = rollouts(200, 4);
    println!("Median and nine of ten of {rollouts} rollouts:\n");
    header("requests/s | share", &TIMES.map(|times| format!("{times} times")));
    for rate in parts(&[20.0, 100.0, 500.0], &[0]) {
        for share in [0.1, 0.5] {
            let cells = TIMES.map(|times| {
                let (median, p90) = slow(rate, share, (times, 30.0), 300.0, rollouts);
                let told = |value: f64| if value > 300.0 { "> 300".to_owned() } else { format!("{value:.0}") };
                format!("{} / {} s", told(median), told(p90))
            });
            println!("| {rate} | {} % | {} |", in_percent(share), cells.join(" | "));
        }
    }
    println!();
}

#[test]
fn table_9_pauses() {
    const SECONDS: [f64; 4] = [0.1, 0.3, 1.0, 3.0];
    let rollouts = rollouts(400, 100);
    println!("Rollbacks of {rollouts} rollouts:\n");
    header("pauses of each version | requests/s", &SECONDS.map(|seconds| format!("{seconds} s")));
    for per_minute in parts(&[1.0, 6.0], &[0]) {
        for rate in parts(&[20.0, 100.0], &[0, 1]) {
            let cells = SECONDS.map(|seconds| {
                let pauses = Some(Pauses { per_minute, seconds });
                let (fails, takes) = (|_: usize, _: f64| 0.001, |_: usize, _: f64| 30.0);
                let traffic = Traffic { pauses, takes: Some(&takes), ..Traffic::new(rate, &steps, &fails) };
                let failed = failed_of_all_kinds(traffic, &with_latency(), ROLLOUT, rollouts);
                assert!(
                    seconds > 1.0 || per_minute > 1.0 || failed <= 2,
                    "{failed} of {rollouts}, {seconds} s, {rate}"
                );
                failed.to_string()
            });
            println!("| {per_minute} a minute | {rate} | {} |", cells.join(" | "));
        }
    }
    println!();
}
