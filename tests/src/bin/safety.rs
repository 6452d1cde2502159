//! Measures how long a broken target keeps its share and how many requests that costs, and whether one client can cause
//! the rollback of a healthy version: on a real Envoy, with 100 requests a second. `make bench-safety` runs it;
//! `RUNS=20` sets the number of runs of each target, `SECONDS=60` the duration of the attack, `CASES=hangs` selects the
//! rows with that word.

use std::env;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::{Behaviour, Errors, Mode};
use tideshift_tests::hostile::{BAD_INPUT, Hostile, Sent, Way};
use tideshift_tests::load::{Load, Plan};
use tideshift_tests::test_bed::{CONNECTIONS, FOR_EVER, HOST, Seen, TestBed, next_answers, until_shares};
use tokio::time::{Instant, interval};

const WORKERS: usize = 2;
const RATE: f64 = 100.0;
/// The number of client addresses.
const CALLERS: usize = 50;
/// After this long without a request the share of a version counts as 0.
const QUIET: Duration = Duration::from_millis(1_500);
/// How long a run waits for that.
const AT_MOST: Duration = Duration::from_secs(40);
/// The timeout of clients if targets hang.
const PATIENCE: Duration = Duration::from_secs(1);
/// A malicious client that does not affect a version must at least have hit it with this fraction of its failing
/// requests.
const AIM: f64 = 0.8;
/// The polling interval of a run.
const LOOK: Duration = Duration::from_millis(50);

/// How the target breaks, and which clients call it.
struct Broken {
    name: &'static str,
    breaks: fn(&mut Behaviour),
    callers: Callers,
    guard: bool,
    controller: bool,
    /// The limit of the median.
    seconds: f64,
    failed: Option<u64>,
}

#[derive(Clone, Copy)]
enum Callers {
    Many,
    /// All from 127.0.0.1.
    One,
    /// Many that cancel.
    Impatient,
    /// Many that call by gRPC.
    Grpc,
}

const BROKEN: [Broken; 9] = [
    Broken { name: "500 to everything; guard and controller", failed: Some(12), ..ANSWERS_500 },
    Broken { name: "500 to everything; guard off", guard: false, ..ANSWERS_500 },
    Broken { name: "500 to everything; controller killed", controller: false, seconds: 1.2, ..ANSWERS_500 },
    Broken { name: "500 to everything; one single caller", callers: Callers::One, seconds: 2.0, ..ANSWERS_500 },
    Broken {
        name: "hangs on everything; clients give up after 1 s",
        breaks: |behaviour| behaviour.mode = Mode::Hang,
        callers: Callers::Impatient,
        seconds: 5.0,
        ..ANSWERS_500
    },
    Broken {
        name: "hangs on half of its requests; clients give up after 1 s",
        breaks: |behaviour| behaviour.hanging = Errors { bad: 1, of: 2 },
        callers: Callers::Impatient,
        seconds: 15.0,
        ..ANSWERS_500
    },
    Broken { name: "404 to everything", breaks: |behaviour| behaviour.status = 404, seconds: 5.0, ..ANSWERS_500 },
    Broken {
        name: "closes the connection in mid-body",
        breaks: |behaviour| behaviour.mode = Mode::CloseInBody,
        seconds: 5.0,
        ..ANSWERS_500
    },
    Broken {
        name: "gRPC without grpc-status",
        breaks: |behaviour| behaviour.mode = Mode::GrpcWithoutStatus,
        callers: Callers::Grpc,
        seconds: 5.0,
        ..ANSWERS_500
    },
];

const ANSWERS_500: Broken = Broken {
    name: "",
    breaks: |behaviour| behaviour.errors = Errors { bad: 1, of: 1 },
    callers: Callers::Many,
    guard: true,
    controller: true,
    seconds: 1.0,
    failed: None,
};

/// The result of one run.
struct Run {
    /// The time from the failure of the target to its last request; `None` if it still received some after [`AT_MOST`].
    lasted: Option<Duration>,
    failed: u64,
}

/// A client that fails its requests on purpose, while both versions are healthy.
struct Attack {
    name: &'static str,
    way: Way,
    /// The version that its failing requests target.
    aims_at: &'static str,
    /// The target's share in percent.
    weight: u32,
    /// Fields of the document's `spec`.
    spec: fn() -> Value,
}

const ATTACKS: [Attack; 4] = [
    Attack {
        name: "keeps its v2 cookie and fails each request, 50/s",
        way: Way::Cookie("v2"),
        aims_at: "v2",
        weight: 10,
        spec: cookie_session,
    },
    Attack {
        name: "keeps its v1 cookie at a 50 % step and fails each request, 50/s",
        way: Way::Cookie("v1"),
        aims_at: "v1",
        weight: 50,
        spec: cookie_session,
    },
    Attack {
        name: "has the testers' header of a rule and fails each request, 50/s",
        way: Way::Header("x-beta", "1"),
        aims_at: "v2",
        weight: 10,
        spec: || {
            let matches = json!([{ "headers": [{ "name": "x-beta", "value": "1" }] }]);
            json!({ "rules": [{ "name": "testers", "matches": matches, "versions": [{ "name": "v2" }] }] })
        },
    },
    Attack {
        name: "knows the sequence and fails on v2's turns",
        way: Way::Predicts { version: "v2", low: 0.9, high: 1.0 },
        aims_at: "v2",
        weight: 10,
        spec: || json!({}),
    },
];

fn cookie_session() -> Value {
    json!({ "session": { "type": "Cookie", "name": "tideshift_shop" } })
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (runs, seconds) = (number("RUNS", 20)?, number("SECONDS", 60)?);
    let only = env::var("CASES").unwrap_or_default();
    let broken: Vec<_> = BROKEN.iter().filter(|case| case.name.contains(&only)).collect();
    let attacks: Vec<_> = ATTACKS.iter().filter(|case| case.name.contains(&only)).collect();
    ensure!(!broken.is_empty() || !attacks.is_empty(), "CASES={only:?} is in no row's name");
    if !broken.is_empty() {
        broken_targets(&broken, runs).await?;
    }
    if !attacks.is_empty() {
        hostile_clients(&attacks, Duration::from_secs(seconds)).await?;
    }
    Ok(())
}

fn number<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(name: &str, default: T) -> anyhow::Result<T> {
    let value = env::var(name).ok().map_or(Ok(default), |value| value.parse());
    value.with_context(|| format!("{name}: a number"))
}

async fn broken_targets(cases: &[&Broken], runs: usize) -> anyhow::Result<()> {
    println!("v2 has 10 % of {RATE} requests/s and breaks at a random moment; {runs} runs each.\n");
    println!(
        "| what v2 does, who watches | share is 0 after, median | p90 | at most | failed requests, median | at most | \
         wanted, medians |"
    );
    println!("|---|---|---|---|---|---|---|");
    for case in cases {
        let mut results = Vec::new();
        for run in 1..=runs {
            eprint!("\r{}: run {run} of {runs} ", case.name);
            results.push(case.run().await.with_context(|| format!("{}, run {run}", case.name))?);
        }
        eprint!("\r{:80}\r", "");
        let never = f64::INFINITY;
        let lasted = sorted(results.iter().map(|run| run.lasted.map_or(never, |lasted| lasted.as_secs_f64())));
        let failed = sorted(results.iter().map(|run| run.failed as f64));
        println!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            case.name,
            time(quantile(&lasted, 0.5)),
            time(quantile(&lasted, 0.9)),
            time(quantile(&lasted, 1.0)),
            quantile(&failed, 0.5),
            quantile(&failed, 1.0),
            case.wanted(),
        );
    }
    println!();
    Ok(())
}

fn time(seconds: f64) -> String {
    if seconds.is_finite() { format!("{seconds:.2} s") } else { format!("> {} s", AT_MOST.as_secs()) }
}

impl Broken {
    fn wanted(&self) -> String {
        let failed = self.failed.map(|failed| format!(", ≤ {failed} requests")).unwrap_or_default();
        format!("≤ {:.1} s{failed}", self.seconds)
    }

    async fn run(&self) -> anyhow::Result<Run> {
        let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
        if matches!(self.callers, Callers::Grpc) {
            rig.backends.values().flatten().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Grpc));
        }
        let strategy = json!({ "steps": [{ "weight": 10, "holdSeconds": FOR_EVER }] });
        let guard = json!({ "enabled": self.guard });
        let mut document = rig.document(json!({ "target": "v2", "strategy": strategy, "guard": guard }));
        if matches!(self.callers, Callers::Grpc) {
            // This also makes Envoy call the versions over HTTP/2.
            for version in document["spec"]["versions"].as_array_mut().into_iter().flatten() {
                version["readinessProbe"] = json!({ "grpc": {}, "periodMillis": 100, "failureThreshold": 2 });
            }
        }
        rig.write(&document)?;
        let mut controller = rig.start_controller().await?;
        let _envoy = rig.start_envoy(WORKERS).await?;
        until_shares(&controller, "v2 at its step", &[90.0, 10.0]).await?;
        let load = self.callers.load(&rig);
        warm_up(&load).await?;
        if !self.controller {
            controller.kill()?;
        }
        let [v2] = rig.version("v2") else { anyhow::bail!("v2 has one endpoint") };
        let (begun, asked) = (Instant::now(), v2.counts().requests);
        v2.set(self.breaks);
        let mut looks = interval(LOOK);
        let lasted = loop {
            looks.tick().await;
            let last = v2.asked_last().context("v2 was never asked")?;
            if v2.counts().requests > asked && last.elapsed() >= QUIET {
                break Some(last - begun);
            }
            if begun.elapsed() >= AT_MOST {
                if self.controller {
                    let seen = Seen::now(&controller).await?;
                    eprintln!("\n{}: {}", self.name, seen.service());
                }
                break None;
            }
        };
        let tally = load.stop().await?;
        let (failed, of_v2) = (tally.sent - tally.class(2), v2.counts().requests - asked);
        // A request in flight when v2 broke may fail as well.
        let only_v2 = tally.of("v1") == tally.of_class("v1", 2) && failed <= of_v2 + 1;
        ensure!(only_v2, "only v2 fails, which got {of_v2} requests: {tally:?}");
        Ok(Run { lasted, failed })
    }
}

impl Callers {
    fn load(self, rig: &TestBed) -> Load {
        let plan = Plan::new(rig.address(), HOST).rate(RATE);
        let plan = match self {
            Self::Many => plan.callers(CALLERS),
            Self::One => plan.connections(CONNECTIONS),
            Self::Impatient => plan.callers(CALLERS).patience(PATIENCE),
            Self::Grpc => plan.callers(CALLERS).grpc(),
        };
        plan.start()
    }
}

/// Good traffic, until any point of the proxy's and the controller's periods.
async fn warm_up(load: &Load) -> anyhow::Result<()> {
    let tally = next_answers(load, fastrand::u64(200..300)).await?;
    ensure!(tally.answered == tally.class(2), "both versions are well: {tally:?}");
    Ok(())
}

async fn hostile_clients(cases: &[&Attack], lasts: Duration) -> anyhow::Result<()> {
    println!(
        "One hostile client for {} s; {RATE} requests/s from {CALLERS} others, both versions healthy.\n",
        lasts.as_secs()
    );
    println!("| what it does | taken back or out of service | its failing requests to v1 | to v2 | wanted |");
    println!("|---|---|---|---|---|");
    for case in cases {
        eprint!("\r{} ", case.name);
        let (found, sent) = case.run(lasts).await.context(case.name)?;
        eprint!("\r{:80}\r", "");
        let to = |version: &str| sent.get(version).copied().unwrap_or_default();
        let found = found.unwrap_or_else(|| "never".to_owned());
        println!("| {} | {found} | {} | {} | never |", case.name, to("v1"), to("v2"));
    }
    println!();
    Ok(())
}

impl Attack {
    /// What happened to a version, and when; `None` if nothing happened.
    async fn run(&self, lasts: Duration) -> anyhow::Result<(Option<String>, Sent)> {
        let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
        for backend in rig.backends.values().flatten() {
            backend.set(|behaviour| behaviour.bad_input = Some(BAD_INPUT));
        }
        let mut spec = (self.spec)();
        spec["target"] = json!("v2");
        spec["strategy"] = json!({ "steps": [{ "weight": self.weight, "holdSeconds": FOR_EVER }] });
        rig.write(&rig.document(spec))?;
        let controller = rig.start_controller().await?;
        let _envoy = rig.start_envoy(WORKERS).await?;
        let share = f64::from(self.weight);
        until_shares(&controller, "v2 at its step", &[100.0 - share, share]).await?;
        let load = Callers::Many.load(&rig);
        warm_up(&load).await?;
        let hostile = Hostile::start(rig.address(), HOST, self.way);
        let begun = Instant::now();
        let mut looks = interval(LOOK);
        let found = loop {
            looks.tick().await;
            let after = format!("after {:.1} s", begun.elapsed().as_secs_f64());
            let seen = Seen::now(&controller).await?;
            if seen.phase() == "Failed" {
                break Some(format!("v2 taken back {after}: {}", seen.message()));
            }
            if let Some(version) = left_out(&load) {
                break Some(format!("{version} out of service {after}"));
            }
            if begun.elapsed() >= lasts {
                break None;
            }
        };
        let sent = hostile.stop().await?;
        let (hits, all) = (sent.get(self.aims_at).copied().unwrap_or_default(), sent.values().sum::<u64>());
        // Otherwise it has proved nothing; one that predicts needs the parameters of the sequence.
        let aims_well = hits as f64 > AIM * all as f64;
        ensure!(found.is_some() || aims_well, "{hits} of {all} failing requests were for {}", self.aims_at);
        let tally = load.stop().await?;
        ensure!(tally.sent == tally.class(2), "only the hostile client's requests fail: {tally:?}");
        Ok((found, sent))
    }
}

/// A version that other clients have not reached for a while, compared with another version's last request.
fn left_out(load: &Load) -> Option<String> {
    let times = load.tally().times;
    let latest = times.values().map(|times| times.last_sent).max()?;
    let mut versions = times.into_iter();
    versions.find(|(_, times)| latest - times.last_sent >= QUIET).map(|(version, _)| version)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// A quantile of sorted values.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let index = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
