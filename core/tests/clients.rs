//! The verdict and the guards against whole rollouts with a population of clients: how often a healthy target is taken
//! back where requests are not independent, and how soon a broken one is, with one caller and with many.
//!
//! `make verdict-tables` prints the tables of `docs/verdict-proof.md`, and that of guards in `docs/guard-proof.md`; with
//! `DIVIDE_RUNS=10` from a tenth of the runs.

#![cfg(not(target_arch = "wasm32"))] // Thousands of rollouts are slow there.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)] // Tests unwrap; tables are printed.
#![allow(unreachable_pub, missing_docs)] // Nothing here is for others.

#[path = "simulated/dice.rs"]
mod dice;
#[path = "simulated/runs.rs"]
mod runs;
#[path = "clients/thresholds.rs"]
mod thresholds;
#[path = "clients/world.rs"]
mod world;

use runs::{For, divided, what_for};
use tideshift_core::outcome::Outcome as Ended;
use tideshift_core::verdict::{Latency, Settings};
use world::{Bad, End, Fault, STABLE, Scene, TARGET, Users, Way};

const ROLLOUT: [(f64, f64); 5] = [(0.01, 120.0), (0.1, 120.0), (0.25, 120.0), (0.5, 120.0), (0.9, 120.0)];

fn runs(table: u64, asserted: u64) -> u64 {
    match what_for() {
        For::Tables => divided(table),
        For::Assertions => asserted,
        For::Nothing => 2,
    }
}

fn many(runs: u64, scene: Scene<'_>) -> Vec<End> {
    runs::many(runs, |seed| scene.play(seed))
}

fn asking() -> Settings {
    Settings { max_error_rate: Some(0.02), ..Settings::default() }
}

fn with_latency() -> Settings {
    Settings { latency: Some(Latency::default()), ..asking() }
}

fn header() {
    println!("| healthy target | runs | taken back | vetoed somewhere | 1 % over 60 s | Flagger | Argo Rollouts |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
}

/// Plays a row of a table of healthy targets, of which so many of 1,000 may be taken back.
fn row(name: &str, (table, asserted): (u64, u64), most_of_1000: u64, scene: Scene<'_>) -> Vec<End> {
    let runs = runs(table, asserted);
    let started = std::time::Instant::now();
    let ends = many(runs, scene);
    let number = |is: fn(&End) -> bool| ends.iter().filter(|end| is(end)).count() as u64;
    let failed = number(|end| end.failed.is_some());
    println!(
        "| {name} | {runs} | {failed} | {} | {} | {} | {} |",
        number(|end| end.vetoes[TARGET] > 0),
        number(|end| end.thresholds.first_check.is_some()),
        number(|end| end.thresholds.flagger.is_some()),
        number(|end| end.thresholds.argo.is_some()),
    );
    eprintln!("    {name}: {:?}", started.elapsed());
    assert_eq!(number(|end| end.vetoes[STABLE] > 0), 0, "{name}: the stable version was vetoed");
    // One more than is to be expected at most, where that is less than one.
    let most = if most_of_1000 == 0 { 0 } else { (most_of_1000 * runs).div_ceil(1_000).max(1) };
    assert!(failed <= most, "{name}: {failed} of {runs}, at most {most}");
    ends
}

#[test]
fn table_a_independent_errors() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    header();
    for callers in [1, 10, 100, 1_000] {
        for (rate, table, asserted) in [(5.0, 1_000, 40), (100.0, 1_000, 20), (1_000.0, 1_000, 2)] {
            for base in [0.001, 0.01, 0.03] {
                let scene = Scene { rate, callers, base, ..Scene::new(&settings, &ROLLOUT) };
                let name = format!("{} % errors, {rate} requests/s, {callers} callers", base * 100.0);
                row(&name, (table, asserted), 1, scene);
            }
        }
    }
    println!();
}

#[test]
fn table_b_users_that_are_not_dealt_at_random() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    let usual = Scene::new(&settings, &ROLLOUT);
    header();
    for part in [0.001, 0.005, 0.01] {
        let (users, fault) = (Users::Header(5_000), Fault::BrokenClient(part));
        let name = format!("header session, one broken client with {} % of the requests", part * 100.0);
        row(&name, (1_000, 30), 10, Scene { users, fault, ..usual });
    }
    for callers in [1, 4, 100] {
        let (users, fault) = (Users::Header(5_000), Fault::BrokenUsers(50));
        let name = format!("header session, one of 50 users fails everything, {callers} addresses");
        row(&name, (1_000, 30), 10, Scene { users, fault, callers, ..usual });
    }
    for (without, fails) in [(0.1, 0.01), (0.2, 0.02)] {
        let users = Users::Cookie { without, fails };
        let name = format!("cookie session, {} % without, of which {} % fail", without * 100.0, fails * 100.0);
        row(&name, (1_000, 30), 10, Scene { users, ..usual });
    }
    let steps = [(0.01, 600.0)];
    let name = "a step with matches, testers fail 10 %";
    row(name, (1_000, 30), 10, Scene { fault: Fault::Testers(0.5, 0.1), ..Scene::new(&settings, &steps) });
    for calls in [27, 37, 111] {
        let alone = Scene { rate: 20.0, callers: 1, base: 1.0 / calls as f64, fault: Fault::Serial(calls), ..usual };
        row(&format!("a serial client of {calls} calls"), (1_000, 60), 10, alone);
    }
    println!();
}

#[test]
fn table_c_clumps_for_an_hour() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    let steps = [(0.1, 3_600.0)];
    header();
    for (proxies, table, asserted) in [(1, 1_000, 6), (10, 200, 1), (100, 20, 0)] {
        let scene = Scene {
            proxies,
            rate: 100.0 * proxies as f64,
            callers: 1_000,
            fault: Fault::Clumps,
            ..Scene::new(&settings, &steps)
        };
        if runs(table, asserted) > 0 {
            row(&format!("10 errors in 1 s each minute, {proxies} proxies"), (table, asserted), 10, scene);
        }
    }
    println!();
}

#[test]
fn table_d_streams() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    let steps = [(0.1, 300.0)];
    header();
    for (rate, lasts) in [(10.0, 1.0), (10.0, 10.0), (10.0, 60.0), (10.0, 600.0), (50.0, 60.0), (50.0, 600.0)] {
        for callers in [1, 100] {
            let scene = Scene { rate, callers, base: 0.01, lasts: Some(lasts), ..Scene::new(&settings, &steps) };
            let name = format!("{rate} streams/s of {callers} callers, 1 % fail at once, others last {lasts} s");
            row(&name, (1_000, 20), 1, scene);
        }
    }
    println!();
}

/// One client for ten minutes, and 100 others.
#[test]
fn table_e_hostile_clients() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    header();
    for (share, rate) in [(0.1, 100.0), (0.5, 100.0), (0.5, 20.0), (0.1, 20.0)] {
        let steps = [(share, 600.0)];
        let usual = Scene { rate, ..Scene::new(&settings, &steps) };
        for (name, way) in [
            ("keeps v2's cookie, fails", Way::Cookie(TARGET, Ended::Error)),
            ("keeps v2's cookie, 404", Way::Cookie(TARGET, Ended::ClientError)),
            ("keeps v2's cookie, gives up", Way::Cookie(TARGET, Ended::Cancelled)),
            ("makes up users for v2", Way::ManyUsers),
            ("knows what is dealt, fails at v2", Way::Predicts(TARGET)),
            ("knows what is dealt, fails at v1", Way::Predicts(STABLE)),
            ("keeps v1's cookie, fails", Way::Cookie(STABLE, Ended::Error)),
            ("the testers' header", Way::Rule),
        ] {
            let name = format!("{name}; others {rate}/s, {} %", share * 100.0);
            // The others' own errors may fail the target, with the probability that is promised.
            let ends = row(&name, (1_000, 8), 1, Scene { fault: Fault::Hostile(way), ..usual });
            let is_harmed = |end: &&End| end.vetoes[TARGET] > 0 || end.held > 0.0 || end.passes == 0;
            let harmed = ends.iter().filter(is_harmed).count();
            assert!(harmed <= 1 + ends.len() / 1_000, "{name}: {harmed} vetoed, held or not passed");
        }
    }
    println!();
}

/// A client that wants a bad target to look like the stable version: the target fails all the same, or does not pass.
#[test]
fn table_f_hidden_targets() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    let ways = [
        ("none", Fault::None),
        ("keeps v1's cookie, fails", Fault::Hostile(Way::Cookie(STABLE, Ended::Error))),
        ("knows what is dealt, fails at v1", Fault::Hostile(Way::Predicts(STABLE))),
    ];
    println!("| v2 fails | others, share | {} |", ways.map(|(name, _)| name).join(" | "));
    println!("| --- | --- | --- | --- | --- |");
    for fails in [1.0, 0.2, 0.05] {
        for (rate, share) in [(100.0, 0.1), (100.0, 0.5), (100.0, 0.9), (20.0, 0.1), (20.0, 0.5), (20.0, 0.9)] {
            let steps = [(share, 600.0)];
            let usual = Scene { rate, bad: Bad::Errors(fails), goes_on: false, ..Scene::new(&settings, &steps) };
            let cells = ways.map(|(name, fault)| {
                let ends = many(runs(100, 4), Scene { fault, ..usual });
                let passed = ends.iter().filter(|end| end.passes > 0).count();
                assert_eq!(passed, 0, "{name}: passed with {fails}, {rate}, {share}");
                cell(&ends, 0.0)
            });
            println!("| {} % | {rate}/s, {} % | {} |", fails * 100.0, share * 100.0, cells.join(" | "));
        }
    }
    println!();
}

/// Median and nine of ten of the seconds until the target failed, after it broke.
fn cell(ends: &[End], from: f64) -> String {
    let (median, p90) = times(ends);
    let told = |at: f64| if at.is_finite() { format!("{:.1}", at - from) } else { "> 600".to_owned() };
    format!("{} / {} s", told(median), told(p90))
}

fn times(ends: &[End]) -> (f64, f64) {
    median_and_p90(ends.iter().map(|end| end.failed))
}

fn median_and_p90(times: impl Iterator<Item = Option<f64>>) -> (f64, f64) {
    let mut seconds: Vec<f64> = times.map(|time| time.unwrap_or(f64::INFINITY)).collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[seconds.len() / 2], seconds[seconds.len() * 9 / 10])
}

const KINDS: [(&str, Bad); 7] = [
    ("500 to everything", Bad::Errors(1.0)),
    ("hangs on everything", Bad::Hangs(1.0)),
    ("hangs on half", Bad::Hangs(0.5)),
    ("404 to everything", Bad::NotFound(1.0)),
    ("fails 5 %", Bad::Errors(0.05)),
    ("fails 2 %", Bad::Errors(0.02)),
    ("3 times slower", Bad::Slow(3.0)),
];

/// A row of broken targets at 10, 50 and 90 % of 100 requests a second.
fn broken(name: &str, callers: &str, scene: Scene<'_>, number: u64) {
    let cells = [0.1, 0.5, 0.9].map(|share| {
        let steps = [(share, 600.0 + scene.from)];
        let ends = many(runs(number, 6), Scene { steps: &steps, goes_on: false, ..scene });
        let early = ends.iter().filter(|end| end.failed.is_some_and(|at| at < scene.from)).count();
        assert_eq!(early, 0, "{name}, {callers}: taken back before it broke");
        let is_plain = matches!(scene.bad, Bad::Errors(0.2..) | Bad::Hangs(_) | Bad::NotFound(_));
        let passed = ends.iter().filter(|end| end.passes > 0).count();
        assert!(!is_plain || passed == 0, "{name}, {callers}, {share}: {passed} passed");
        cell(&ends, scene.from)
    });
    println!("| {name} | {callers} | {} |", cells.join(" | "));
}

/// Seconds within which most rollouts fail, at 10 % of 100 requests a second.
#[test]
fn what_is_plainly_broken_fails_soon() {
    let settings = asking();
    for (callers, bad, most) in [
        (1, Bad::Errors(1.0), 1.3),
        (4, Bad::Errors(1.0), 6.0),
        (10, Bad::Errors(1.0), 1.8),
        (100, Bad::Errors(1.0), 1.2),
        (1, Bad::Hangs(1.0), 3.5),
        (5, Bad::Hangs(1.0), 5.5),
        (100, Bad::Hangs(1.0), 3.5),
        (1, Bad::Hangs(0.5), 15.0),
        (5, Bad::Hangs(0.5), 8.0),
        (100, Bad::Hangs(0.5), 5.0),
        (1, Bad::NotFound(1.0), 2.5),
        (5, Bad::NotFound(1.0), 4.0),
        (100, Bad::NotFound(1.0), 2.5),
        (100, Bad::Errors(0.05), 30.0),
    ] {
        let steps = [(0.1, 120.0)];
        let ends = many(runs(200, 60), Scene { callers, bad, goes_on: false, ..Scene::new(&settings, &steps) });
        let (_, p90) = times(&ends);
        assert!(p90 <= most || what_for() == For::Nothing, "{callers} callers: {p90} s, {most} at most");
    }
}

#[test]
fn table_g_broken_targets() {
    if what_for() == For::Nothing {
        return;
    }
    println!("| target | callers | 10 % | 50 % | 90 % |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, bad) in KINDS {
        let settings = if matches!(bad, Bad::Slow(_)) { with_latency() } else { asking() };
        for callers in [1, 3, 4, 5, 10, 100] {
            let scene = Scene { callers, bad, ..Scene::new(&settings, &ROLLOUT) };
            broken(name, &callers.to_string(), scene, 200);
        }
    }
    println!();
}

#[test]
fn table_h_broken_targets_of_other_callers() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    println!("| target | callers | 10 % | 50 % | 90 % |");
    println!("| --- | --- | --- | --- | --- |");
    let usual = Scene::new(&settings, &ROLLOUT);
    let users = |number| Users::Header(number);
    let cookies = |without| Users::Cookie { without, fails: 0.001 };
    for (name, bad) in [KINDS[0], KINDS[2], KINDS[3], KINDS[4]] {
        for (callers, scene) in [
            ("one of 6 has 90 % of the requests", Scene { callers: 6, heavy: 0.9, ..usual }),
            ("one of 6 has 97 %", Scene { callers: 6, heavy: 0.97, ..usual }),
            ("one of 6 has 99 %", Scene { callers: 6, heavy: 0.99, ..usual }),
            ("5,000 users by header, 1 address", Scene { callers: 1, users: users(5_000), ..usual }),
            ("5,000 users by header, 4 addresses", Scene { callers: 4, users: users(5_000), ..usual }),
            ("5,000 users by header, 100 addresses", Scene { users: users(5_000), ..usual }),
            ("100 users by header, 100 addresses", Scene { users: users(100), ..usual }),
            ("20 users by header, 20 addresses", Scene { callers: 20, users: users(20), ..usual }),
            ("cookies, 10 % of requests without", Scene { users: cookies(0.1), ..usual }),
            ("cookies, all keep theirs", Scene { users: cookies(0.0), ..usual }),
            ("10; both fail 1 %; breaks after 10 minutes", Scene { callers: 10, base: 0.01, from: 600.0, ..usual }),
            ("10; both fail 3 %; breaks after 10 minutes", Scene { callers: 10, base: 0.03, from: 600.0, ..usual }),
            ("4; both fail 3 %; breaks after 10 minutes", Scene { callers: 4, base: 0.03, from: 600.0, ..usual }),
            ("100; both fail 1 %; breaks after 10 minutes", Scene { base: 0.01, from: 600.0, ..usual }),
        ] {
            broken(name, callers, Scene { bad, ..scene }, 100);
        }
    }
    println!();
}

/// One proxy's guard alone.
#[test]
fn table_i_guards() {
    if what_for() == For::Nothing {
        return;
    }
    let settings = asking();
    println!("| callers | 10 %: fails 100 % | 50 % | 20 % | 50 %: fails 100 % | 50 % | 20 % |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (callers, users) in
        [(1, 0), (3, 0), (4, 0), (5, 0), (10, 0), (100, 0), (1_000, 0), (1, 5_000), (4, 5_000), (100, 5_000)]
    {
        let mut cells = Vec::new();
        for share in [0.1, 0.5] {
            for fails in [1.0, 0.5, 0.2] {
                let steps = [(share, 60.0)];
                let users = if users > 0 { Users::Header(users) } else { Users::None };
                let bad = Bad::Errors(fails);
                let ends = many(runs(200, 20), Scene { callers, users, bad, ..Scene::new(&settings, &steps) });
                let (median, p90) = median_and_p90(ends.iter().map(|end| end.vetoed));
                cells.push(format!("{median:.1} / {p90:.1} s"));
                let most = if (4..=10).contains(&callers) { 4.5 } else { 1.5 };
                let is_asked = fails == 1.0 && share == 0.1 && what_for() != For::Nothing;
                assert!(!is_asked || median <= most, "{callers} callers: {median} s");
            }
        }
        let users =
            if users > 0 { format!("{users} users by header, {callers} addresses") } else { callers.to_string() };
        println!("| {users} | {} |", cells.join(" | "));
    }
    println!();
}
