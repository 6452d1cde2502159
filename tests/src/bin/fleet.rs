//! Measures one controller with thousands of proxies, each with a poll and a report every second, like Envoys: how long
//! a new policy takes to reach the last proxy, and the CPU time and memory. `make bench-fleet` runs it; `PROXIES=10000`
//! sets their number, `CHANGES=20` the number of policy changes.

use std::env;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Deserialize;
use serde_json::{Value, json};
use tideshift_tests::client::{Connection, Request, get};
use tideshift_tests::test_bed::{FOR_EVER, SERVICE, TestBed};
use tideshift_tests::usage::Usage;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

/// The interval of reports of a proxy.
const PERIOD: Duration = Duration::from_secs(1);
/// The period over which the fleet starts.
const ARRIVAL: Duration = Duration::from_secs(60);
/// The interval between changes of the policy.
const PAUSE: Duration = Duration::from_secs(2);
/// How long CPU time and memory are measured while the policy does not change.
const STEADY: Duration = Duration::from_secs(20);
/// The timeout of a change.
const PATIENCE: Duration = Duration::from_secs(30);
/// Open files other than connections of proxies.
const OTHER_FILES: u64 = 600;
/// The content type of bodies.
const TYPE: (&str, &str) = ("content-type", "application/json");
/// The requests of each proxy between two reports: to v1 and to v2.
const REQUESTS: (u64, u64) = (90, 10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let asked: usize = number("PROXIES")?.unwrap_or(10_000);
    let changes: usize = number("CHANGES")?.unwrap_or(20);
    let proxies = asked.min(most_proxies()?);
    if proxies < asked {
        println!(
            "Only {proxies} proxies instead of {asked}: this machine's limit of open files (two for each) is lower.\n"
        );
    }
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let strategy = json!({ "steps": [{ "weight": 10, "holdSeconds": FOR_EVER }, { "weight": 100 }] });
    rig.write(&rig.document(json!({ "target": "v2", "strategy": strategy })))?;
    let controller = rig.start_controller().await?;
    let usage = Usage { process: controller.id() };
    let alone = usage.resident("VmRSS")?;

    let fleet = Arc::new(Fleet::default());
    progress("the proxies come");
    for id in 0..proxies {
        // They start over some seconds, and therefore report at different times.
        let after = ARRIVAL.mul_f64(0.5 * id as f64 / proxies as f64);
        tokio::spawn(fleet.clone().polls(controller.address(), id, after));
        tokio::spawn(fleet.clone().reports(controller.address(), id, after));
    }
    let come = Instant::now();
    loop {
        let (reporting, failures) = (fleet.reporting.load(Relaxed), fleet.failures());
        ensure!(failures.is_empty() && come.elapsed() < ARRIVAL * 2, "{reporting} of {proxies} came; {failures:?}");
        if reporting == proxies as u64 {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }

    progress("nothing changes");
    sleep(PERIOD * 3).await;
    fleet.take_report_times();
    let (cpu, begun) = (usage.cpu()?, Instant::now());
    sleep(STEADY).await;
    let steady = (usage.cpu()? - cpu).div_duration_f64(begun.elapsed());
    let resident = usage.resident("VmRSS")?;
    let answered = fleet.take_report_times();

    let (mut reached, mut last) = (Vec::new(), Vec::new());
    for change in 1..=changes {
        progress(&format!("change {change} of {changes}"));
        let weight = 10 + change % 2;
        let begun = Instant::now();
        let body = json!({ "weight": weight }).to_string();
        let path = format!("/v1/rollouts/{SERVICE}/set-weight");
        let answer = Request::new(controller.address(), "POST", &path).header(TYPE.0, TYPE.1).body(body).send().await?;
        ensure!(answer.status == 200, "set-weight: {}: {}", answer.status, answer.text());
        let times = fleet.all_have(weight, proxies, begun).await?;
        last.push(times.last().copied().unwrap_or_default());
        reached.extend(times);
        sleep(PAUSE).await;
    }
    let peak = usage.resident("VmHWM")?;
    let counted = fleet.agree(controller.address()).await?;
    progress("");

    let (reached, last, answered) = (sorted(reached), sorted(last), sorted(answered));
    println!("{proxies} proxies, each with a poll and a report every second; one controller; all on this machine.\n");
    println!("| what | figure |");
    println!("|---|---|");
    println!(
        "| a new policy, from the command to a proxy: median, p99 | {}, {} |",
        at(&reached, 0.5),
        at(&reached, 0.99)
    );
    println!("| to the last proxy, of {changes} changes: median, at most | {}, {} |", at(&last, 0.5), at(&last, 1.0));
    println!(
        "| an answer to a report: median, p99, at most | {}, {}, {} |",
        at(&answered, 0.5),
        at(&answered, 0.99),
        at(&answered, 1.0)
    );
    println!("| reports each second | {:.0} |", answered.len() as f64 / STEADY.as_secs_f64());
    println!("| CPU time of the controller, of one core | {:.0} % |", steady * 100.0);
    println!("| its memory: alone, steady, at most | {alone:.0} MB, {resident:.0} MB, {peak:.0} MB |");
    println!("| polls and reports that failed | {} |", fleet.failed.load(Relaxed));
    println!("| requests reported, and counted by the controller | {counted}, the same |");
    let failures = fleet.failures();
    ensure!(failures.is_empty(), "some failed: {failures:?}");
    Ok(())
}

/// State shared by all proxies.
#[derive(Default)]
struct Fleet {
    /// Proxies that have reported at least once and continue.
    reporting: AtomicU64,
    /// Requests in reports that were answered.
    reported: AtomicU64,
    failed: AtomicU64,
    /// Whether reporting has ended.
    ended: AtomicBool,
    /// The first few.
    failures: Mutex<Vec<String>>,
    /// The weights of v2 that reached a proxy, and when.
    reached: Mutex<Vec<(u64, Instant)>>,
    /// The latency of reports.
    report_times: Mutex<Vec<Duration>>,
    /// The epoch and newest revision of the controller that proxies have seen.
    newest: Mutex<(String, u64)>,
}

/// The relevant part of a policy.
#[derive(Deserialize)]
struct Policy {
    revision: u64,
    services: Vec<Service>,
}

#[derive(Deserialize)]
struct Service {
    versions: Vec<Version>,
}

#[derive(Deserialize)]
struct Version {
    name: String,
    weight: u64,
}

impl Fleet {
    /// Polls for policies forever.
    async fn polls(self: Arc<Self>, controller: SocketAddr, id: usize, after: Duration) {
        sleep(after).await;
        let (mut epoch, mut revision) = (String::new(), 0);
        loop {
            let polled = async {
                let mut connection = Connection::open(controller).await?;
                loop {
                    let path = format!("/v1/policy?proxy=edge-{id}&epoch={epoch}&after={revision}");
                    let answer = connection.send(&get(controller, &path)).await?;
                    let now = Instant::now();
                    match answer.status {
                        204 => continue,
                        200 => {}
                        other => bail!("/v1/policy says {other}: {}", answer.text()),
                    }
                    let policy: Policy = serde_json::from_slice(&answer.body)?;
                    epoch = answer.header("x-tideshift-epoch").unwrap_or_default().to_owned();
                    revision = policy.revision;
                    let of_v2 = policy.services.iter().flat_map(|service| &service.versions).find(|v| v.name == "v2");
                    lock(&self.reached).push((of_v2.map_or(0, |version| version.weight), now));
                    let mut newest = lock(&self.newest);
                    if newest.1 < revision {
                        *newest = (epoch.clone(), revision);
                    }
                }
            };
            let outcome: anyhow::Result<()> = polled.await;
            self.failed_of(outcome, id);
            sleep(PERIOD).await;
        }
    }

    /// Reports every second until the end.
    async fn reports(self: Arc<Self>, controller: SocketAddr, id: usize, after: Duration) {
        sleep(after).await;
        let mut ticks = interval_at(Instant::now() + PERIOD, PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reports = 0;
        loop {
            let reported = async {
                let mut connection = Connection::open(controller).await?;
                while !self.ended.load(Relaxed) {
                    ticks.tick().await;
                    let request = Request::new(controller, "POST", "/v1/reports").header(TYPE.0, TYPE.1);
                    let request = request.body(self.report(id, reports + 1).to_string());
                    let begun = Instant::now();
                    let answer = connection.send(&request).await?;
                    ensure!(answer.status == 204, "/v1/reports says {}: {}", answer.status, answer.text());
                    lock(&self.report_times).push(begun.elapsed());
                    reports += 1;
                    self.reported.fetch_add(REQUESTS.0 + REQUESTS.1, Relaxed);
                    if reports == 1 {
                        self.reporting.fetch_add(1, Relaxed);
                    }
                }
                Ok(())
            };
            let outcome: anyhow::Result<()> = reported.await;
            if outcome.is_ok() {
                self.reporting.fetch_sub(1, Relaxed);
                return;
            }
            self.failed_of(outcome, id);
        }
    }

    /// The report of a proxy after this many seconds.
    fn report(&self, id: usize, reports: u64) -> Value {
        let (epoch, revision) = lock(&self.newest).clone();
        let version = |name: &str, requests: u64| {
            let n = reports * requests;
            // A few milliseconds each.
            json!({ "name": name, "ok": n, "error": 0, "clientError": 0, "cancelled": 0, "inFlight": n % 3,
                    "durations": [n / 10, n / 5, n - n / 10 - n / 5] })
        };
        let versions = [version("v1", REQUESTS.0), version("v2", REQUESTS.1)];
        let services = json!([{ "name": SERVICE, "unrouted": 0, "versions": versions }]);
        json!({ "proxy": format!("edge-{id}"), "start": format!("{id:x}-1"), "epoch": epoch, "revision": revision,
                "workers": 2, "services": services })
    }

    /// The time until each of this many proxies had the weight.
    async fn all_have(&self, weight: usize, proxies: usize, begun: Instant) -> anyhow::Result<Vec<Duration>> {
        loop {
            sleep(Duration::from_millis(20)).await;
            let reached = lock(&self.reached);
            let new = reached.iter().filter(|(of_v2, at)| *of_v2 == weight as u64 && *at >= begun);
            let times: Vec<Duration> = new.map(|(_, at)| *at - begun).collect();
            drop(reached);
            if times.len() >= proxies {
                lock(&self.reached).clear();
                return Ok(sorted(times));
            }
            ensure!(begun.elapsed() < PATIENCE, "{} of {proxies} have it; {:?}", times.len(), self.failures());
        }
    }

    /// Ends reporting. The controller must have counted all reports; returns how many requests.
    async fn agree(&self, controller: SocketAddr) -> anyhow::Result<u64> {
        self.ended.store(true, Relaxed);
        while self.reporting.load(Relaxed) > 0 {
            sleep(Duration::from_millis(100)).await;
        }
        let status = get(controller, "/v1/status").send().await?.json()?;
        let versions = status["services"][0]["versions"].as_array().context("no versions")?;
        let counted: u64 = versions.iter().filter_map(|version| version["requests"]["ok"].as_u64()).sum();
        let reported = self.reported.load(Relaxed);
        ensure!(counted == reported, "{reported} requests were reported, {counted} are counted");
        Ok(counted)
    }

    fn take_report_times(&self) -> Vec<Duration> {
        std::mem::take(&mut lock(&self.report_times))
    }

    fn failed_of(&self, outcome: anyhow::Result<()>, id: usize) {
        let Err(error) = outcome else { return };
        self.failed.fetch_add(1, Relaxed);
        let mut failures = lock(&self.failures);
        if failures.len() < 5 {
            failures.push(format!("edge-{id}: {error:#}"));
        }
    }

    fn failures(&self) -> Vec<String> {
        lock(&self.failures).clone()
    }
}

/// The number of proxies for which this process and the controller can open two connections each.
fn most_proxies() -> anyhow::Result<usize> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum.map_or(usize::MAX, |maximum| (maximum.saturating_sub(OTHER_FILES) / 2) as usize))
}

fn number(name: &str) -> anyhow::Result<Option<usize>> {
    env::var(name).ok().map(|value| value.parse().with_context(|| format!("{name}={value}: not a number"))).transpose()
}

fn progress(doing: &str) {
    eprint!("\r{doing:60}\r");
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sorted<T: Ord>(mut values: Vec<T>) -> Vec<T> {
    values.sort_unstable();
    values
}

/// The quantile of sorted values, in milliseconds.
fn at(sorted: &[Duration], part: f64) -> String {
    let index = (part * sorted.len() as f64).ceil() as usize;
    let value = sorted.get(index.saturating_sub(1)).copied().unwrap_or_default();
    format!("{:.0} ms", value.as_secs_f64() * 1000.0)
}
