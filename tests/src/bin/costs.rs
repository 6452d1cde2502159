//! Measures the cost of one controller with many documents, services and proxies: its CPU time and memory as the system
//! counts them, over real HTTP. `make bench-controller` runs it; `BASE=FILE` measures another `tideshift` binary beside
//! it, alternately; `ROUNDS=3` sets the number of rounds, `ONLY=report` selects figures, `STARTS=100000` sets the
//! number of proxy starts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::artifacts;
use tideshift_tests::client::{Connection, Request, get};
use tideshift_tests::controller::Controller;
use tideshift_tests::hook::{Answer, Receiver};
use tideshift_tests::ports::Port;
use tideshift_tests::usage::Usage;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// How long CPU time at rest is measured.
const REST: Duration = Duration::from_secs(10);
/// How long a component may be busy after its start.
const SETTLE: Duration = Duration::from_secs(4);
/// How long reports of each size are sent.
const REPORTS: Duration = Duration::from_secs(2);
/// The number of proxies that send them in turn: none exceeds the rate limit.
const PROXIES: u64 = 100;
/// The maximum number of reports of each size, for the same reason.
const MOST_REPORTS: u64 = 90 * PROXIES;
/// The interval between status requests.
const STATUSES: usize = 50;
/// Documents at rest.
const DOCUMENTS: usize = 1_000;
/// The numbers of services in reports.
const SIZES: [usize; 5] = [10, 50, 200, 500, 1_000];
/// The content type of bodies.
const TYPE: (&str, &str) = ("content-type", "application/json");

/// The figures: name, goal, and the value when it was recorded.
const FIGURES: [(&str, &str, &str); 13] = [
    ("report-10", "", ""),
    ("report-50", "", "337 µs of 50 documents"),
    ("report-200", "", "1,941 µs of 200 documents"),
    ("report-500", "1,000 µs", "8,075 µs of 500 documents"),
    ("report-1000", "", ""),
    ("report-flat", "2.0", "2.4 (10 to 500)"),
    ("idle-documents", "2 %", "34 %"),
    ("idle-gates", "2 %", "58 %"),
    ("idle-endpoints", "2 %", "37 % (pods)"),
    ("status", "20 ms", "560 ms"),
    ("status-lock", "2 ms", "560 ms"),
    ("starts-memory", "300 MB", ""),
    ("starts-cpu", "", ""),
];

fn words(figure: &str) -> String {
    match figure {
        "report-flat" => "the same for each service in it, of 1,000 services as against 10".to_owned(),
        "idle-documents" => format!("CPU at rest, of one core: {DOCUMENTS} documents, no proxy"),
        "idle-gates" => "CPU at rest: 128 services of one document at a closed gate".to_owned(),
        "idle-endpoints" => "CPU at rest: 10,000 endpoints".to_owned(),
        "status" => "the status of a document of 400 services".to_owned(),
        "status-lock" => "meanwhile, an answer that needs the lock takes so much longer (median)".to_owned(),
        "starts-memory" => "memory after starts of proxies with 50 services each".to_owned(),
        "starts-cpu" => "CPU of each of those".to_owned(),
        report => {
            let size = report.rsplit('-').next().unwrap_or_default();
            format!("CPU of a report of {size} services, {DOCUMENTS} documents at rest")
        }
    }
}

fn shown(figure: &str, value: f64) -> String {
    match figure {
        "report-flat" => format!("{value:.1}"),
        "starts-memory" => format!("{value:.0} MB"),
        "status" | "status-lock" => format!("{value:.1} ms"),
        idle if idle.starts_with("idle") => format!("{value:.1} %"),
        _ => format!("{value:.0} µs"),
    }
}

/// The values of each round, by figure.
type Found = BTreeMap<&'static str, Vec<f64>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let rounds: usize = number("ROUNDS")?.unwrap_or(3);
    let starts: u64 = number("STARTS")?.unwrap_or(100_000);
    let only = env::var("ONLY").unwrap_or_default();
    let base = env::var_os("BASE").map(PathBuf::from);
    let mut programs = vec![("now", artifacts::tideshift()?)];
    if let Some(base) = base {
        programs.insert(0, ("base", base.canonicalize().with_context(|| format!("BASE={}", base.display()))?));
    }
    let mut found: BTreeMap<&str, Found> = BTreeMap::new();
    for round in 1..=rounds {
        for (name, program) in &programs {
            let bench = Bench { program, only: &only, found: found.entry(name).or_default() };
            bench.round(&format!("{name}, round {round} of {rounds}"), if round == 1 { starts } else { 0 }).await?;
        }
    }
    eprint!("\r{:60}\r", "");
    println!("One controller, all on this machine; of {rounds} rounds the median, and the least and the most.\n");
    let names: Vec<&str> = programs.iter().map(|(name, _)| *name).collect();
    println!("| what | to reach | before | {} |", names.join(" | "));
    println!("|---|---|---|{}", "---|".repeat(names.len()));
    for (figure, reach, before) in FIGURES {
        let of = |name: &&str| found.get(name)?.get(figure).map(|values| spread(figure, values));
        let cells: Vec<_> = names.iter().filter_map(of).collect();
        if !cells.is_empty() {
            println!("| {} | {reach} | {before} | {} |", words(figure), cells.join(" | "));
        }
    }
    Ok(())
}

fn spread(figure: &str, values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let (first, last) = (values[0], values[values.len() - 1]);
    let median = shown(figure, values[values.len() / 2]);
    if values.len() == 1 { median } else { format!("{median} ({} to {})", shown(figure, first), shown(figure, last)) }
}

/// One binary.
struct Bench<'a> {
    program: &'a Path,
    only: &'a str,
    found: &'a mut Found,
}

impl Bench<'_> {
    async fn round(mut self, which: &str, starts: u64) -> anyhow::Result<()> {
        let all = [
            ("idle-documents report", "documents"),
            ("idle-gates", "gates"),
            ("idle-endpoints", "endpoints"),
            ("status", "status"),
            ("starts", "starts"),
        ];
        for (figures, what) in all {
            if !figures.split(' ').any(|figure| figure.contains(self.only)) || (what == "starts" && starts == 0) {
                continue;
            }
            eprint!("\r{:60}\r{which}: {what}", "");
            match what {
                "documents" => self.documents().await?,
                "gates" => self.gates().await?,
                "endpoints" => self.endpoints().await?,
                "status" => self.status().await?,
                _ => self.starts(starts).await?,
            }
        }
        Ok(())
    }

    fn note(&mut self, figure: &'static str, value: f64) {
        self.found.entry(figure).or_default().push(value);
    }

    async fn start(&self, documents: &[Value], further: &[&str]) -> anyhow::Result<Running> {
        let folder = tempfile::tempdir()?;
        let mut files = Vec::new();
        // A file must not exceed a few MiB.
        for (n, some) in documents.chunks(500).enumerate() {
            let file = folder.path().join(format!("{n}.yaml"));
            let texts: Vec<String> = some.iter().map(Value::to_string).collect();
            fs::write(&file, texts.join("\n---\n"))?;
            files.push(file);
        }
        let state = folder.path().join("state");
        let further = [&["--state-dir", state.to_str().context("a path that is not UTF-8")?], further].concat();
        let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        let controller = Controller::start_program(self.program.to_owned(), Port::reserve()?, &files, &further).await?;
        let usage = Usage { process: controller.id() };
        Ok(Running { controller, usage, _folder: folder })
    }

    /// Reports with more and more services of many documents.
    async fn documents(&mut self) -> anyhow::Result<()> {
        let documents: Vec<Value> = (0..DOCUMENTS).map(|n| document(n, json!({}), 1)).collect();
        let running = self.start(&documents, &[]).await?;
        sleep(SETTLE).await;
        let rest = running.at_rest().await?;
        self.note("idle-documents", 100.0 * rest);
        if !"report".contains(self.only) {
            return Ok(());
        }
        let mut reporter = Reporter::new(&running).await?;
        let mut of_each = Vec::new();
        for (size, (figure, ..)) in SIZES.into_iter().zip(FIGURES) {
            let (begun, cpu) = (Instant::now(), running.usage.cpu()?);
            let mut reports = 0;
            while begun.elapsed() < REPORTS && reports < MOST_REPORTS / SIZES.len() as u64 {
                reporter.report(size).await?;
                reports += 1;
            }
            let cpu = running.usage.cpu()?.saturating_sub(cpu).as_secs_f64() - rest * begun.elapsed().as_secs_f64();
            let of_report = cpu.max(0.0) / reports as f64 * 1e6;
            self.note(figure, of_report);
            of_each.push(of_report / size as f64);
        }
        self.note("report-flat", of_each[of_each.len() - 1] / of_each[0]);
        Ok(())
    }

    async fn gates(&mut self) -> anyhow::Result<()> {
        let receiver = Receiver::start(Answer::Status(403, "not today")).await?;
        let gate = json!({ "name": "approval", "type": "Gate", "url": receiver.url(), "periodSeconds": 60 });
        let strategy = json!({ "steps": [{ "weight": 10, "holdSeconds": 60 }, { "weight": 100 }] });
        let services: Vec<Value> = (0..128).map(|n| service(n, 1)).collect();
        let spec =
            json!({ "services": services, "stable": "v1", "target": "v2", "strategy": strategy, "webhooks": [gate] });
        let running = self.start(&[kind("many", &spec)], &[]).await?;
        sleep(SETTLE).await;
        let status = running.controller.status().await?;
        let services = status["services"].as_array().context("no services")?;
        ensure!(
            services.iter().all(|service| service["phase"] == "Waiting"),
            "not all wait at their gates: {}",
            services[0]
        );
        let rest = running.at_rest().await?;
        self.note("idle-gates", 100.0 * rest);
        Ok(())
    }

    async fn endpoints(&mut self) -> anyhow::Result<()> {
        let documents: Vec<Value> = (0..50).map(|n| document(n, json!({}), 100)).collect();
        let running = self.start(&documents, &[]).await?;
        sleep(SETTLE).await;
        let rest = running.at_rest().await?;
        self.note("idle-endpoints", 100.0 * rest);
        Ok(())
    }

    async fn status(&mut self) -> anyhow::Result<()> {
        let services: Vec<Value> = (0..400).map(|n| service(n, 1)).collect();
        let spec = json!({ "services": services, "stable": "v1" });
        let running = self.start(&[kind("many", &spec)], &[]).await?;
        sleep(SETTLE).await;
        let address = running.controller.address();
        let alone = wait_of(address, STATUSES).await?;
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let asking: JoinHandle<anyhow::Result<Vec<f64>>> = tokio::spawn(async move {
            let (mut connection, mut times) = (Connection::open(address).await?, Vec::new());
            while !*stopped.borrow() {
                let begun = Instant::now();
                let answer = connection.send(&get(address, "/v1/status")).await?;
                ensure!(answer.status == 200, "/v1/status says {}", answer.status);
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            Ok(times)
        });
        let beside = wait_of(address, STATUSES).await?;
        stop.send(true)?;
        let mut times = asking.await??;
        times.sort_unstable_by(f64::total_cmp);
        self.note("status", times[times.len() / 2]);
        self.note("status-lock", (beside - alone).max(0.0));
        Ok(())
    }

    /// Proxies that report once and never again.
    async fn starts(&mut self, starts: u64) -> anyhow::Result<()> {
        let documents: Vec<Value> = (0..50).map(|n| document(n, json!({}), 1)).collect();
        let running = self.start(&documents, &[]).await?;
        let mut reporter = Reporter::new(&running).await?;
        reporter.proxies = u64::MAX;
        let cpu = running.usage.cpu()?;
        for _ in 0..starts {
            reporter.report(50).await?;
        }
        let cpu = (running.usage.cpu()? - cpu).as_secs_f64();
        self.note("starts-cpu", cpu / starts as f64 * 1e6);
        self.note("starts-memory", running.usage.resident("VmHWM")?);
        Ok(())
    }
}

/// The median latency of a response that needs the reconciler, in milliseconds.
async fn wait_of(address: SocketAddr, times: usize) -> anyhow::Result<f64> {
    let (mut connection, mut waits) = (Connection::open(address).await?, Vec::new());
    for _ in 0..times {
        let begun = Instant::now();
        let answer = connection.send(&get(address, "/v1/rollouts/many/history")).await?;
        ensure!(answer.status == 200, "the history says {}", answer.status);
        waits.push(begun.elapsed().as_secs_f64() * 1e3);
        sleep(Duration::from_millis(7)).await;
    }
    waits.sort_unstable_by(f64::total_cmp);
    Ok(waits[waits.len() / 2])
}

/// A controller with its documents.
struct Running {
    controller: Controller,
    usage: Usage,
    _folder: tempfile::TempDir,
}

impl Running {
    /// The fraction of a core that it uses while nothing happens.
    async fn at_rest(&self) -> anyhow::Result<f64> {
        let (begun, cpu) = (Instant::now(), self.usage.cpu()?);
        sleep(REST).await;
        Ok((self.usage.cpu()? - cpu).div_duration_f64(begun.elapsed()))
    }
}

/// Proxies that report one after the other.
struct Reporter {
    connection: Connection,
    address: SocketAddr,
    epoch: String,
    proxies: u64,
    sent: u64,
}

impl Reporter {
    async fn new(running: &Running) -> anyhow::Result<Self> {
        let address = running.controller.address();
        let status = running.controller.status().await?;
        let epoch = status["epoch"].as_str().context("no epoch")?.to_owned();
        Ok(Self { connection: Connection::open(address).await?, address, epoch, proxies: PROXIES, sent: 0 })
    }

    /// The next proxy reports this many services.
    async fn report(&mut self, services: usize) -> anyhow::Result<()> {
        let (proxy, sequence) = (self.sent % self.proxies, self.sent / self.proxies + 1);
        self.sent += 1;
        let ok = 90 * sequence;
        let body: Vec<String> = (0..services).map(|n| counts_of(n, ok)).collect();
        // Proxies that start one nanosecond apart.
        let start = 0x1800_0000_0000_0000_u64 + proxy;
        let body = format!(
            r#"{{"proxy":"edge-{proxy}","start":"{start:x}","sequence":{sequence},"epoch":"{}","revision":1,"workers":2,"format":2,"services":[{}]}}"#,
            self.epoch,
            body.join(",")
        );
        let request = Request::new(self.address, "POST", "/v1/reports").header(TYPE.0, TYPE.1).body(body);
        let answer = self.connection.send(&request).await?;
        ensure!(answer.status == 204, "/v1/reports says {}: {}", answer.status, answer.text());
        Ok(())
    }
}

/// The report of a service after this many responses.
fn counts_of(n: usize, ok: u64) -> String {
    let version = |name: &str, ok: u64| {
        let counts = format!(r#""ok":{ok},"error":0,"clientError":{},"cancelled":0"#, ok / 50);
        let durations = format!("[0,0,{},{},{}]", ok / 2, ok / 3, ok - ok / 2 - ok / 3);
        format!(
            r#"{{"name":"{name}",{counts},"inFlight":1,"durations":{durations},"dealt":{{"started":{},{counts},"durations":{durations}}}}}"#,
            ok + ok / 50 + 1
        )
    };
    format!(r#"{{"name":"service-{n}","unrouted":0,"versions":[{},{}]}}"#, version("v1", ok), version("v2", ok / 9))
}

fn document(n: usize, further: Value, endpoints: usize) -> Value {
    let mut spec = service(n, endpoints);
    let all = spec.as_object_mut().map(|spec| {
        spec.remove("name");
        spec.insert("stable".to_owned(), "v1".into());
        spec.extend(further.as_object().cloned().unwrap_or_default());
    });
    debug_assert!(all.is_some());
    kind(&format!("service-{n}"), &spec)
}

fn kind(name: &str, spec: &Value) -> Value {
    json!({ "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": name }, "spec": spec })
}

fn service(n: usize, endpoints: usize) -> Value {
    let version = |name: &str, net: usize| {
        let endpoints: Vec<String> = (0..endpoints).map(|e| format!("10.{net}.{}.{e}:8080", n % 250)).collect();
        json!({ "name": name, "endpoints": endpoints })
    };
    let hosts = [format!("service-{n}.example.com")];
    json!({ "name": format!("service-{n}"), "hostnames": hosts, "versions": [version("v1", 1), version("v2", 2)] })
}

fn number<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    name: &str,
) -> anyhow::Result<Option<T>> {
    env::var(name).ok().map(|value| value.parse().with_context(|| format!("{name}={value}: not a number"))).transpose()
}
