//! A complete Tideshift for a document, as users run it: backends, the controller, and an Envoy that runs exactly what
//! `tideshift render envoy` prints for the same file.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::backend::Backend;
use crate::client::get;
use crate::controller::{Controller, Output, cli};
use crate::envoy::Envoy;
use crate::load::{Load, Plan, Tally};
use crate::metrics::Metrics;
use crate::ports::Port;
use crate::reporter::Reporter;
use crate::wait::eventually;
use crate::{artifacts, envoy};

/// The timeout of anything that these tests wait for. A busy machine is slow, and a guard may veto twice (10 and 20 s)
/// before the verdict has enough evidence for a rollback.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The service of the test bed's document.
pub const SERVICE: &str = "shop";
/// Its hostname.
pub const HOST: &str = "shop.example.com";

/// A hold that no test waits for.
pub const FOR_EVER: u64 = 3600;

/// The outcomes by which requests are counted, as named in the status.
pub const OUTCOMES: [(&str, &str); 4] =
    [("ok", "ok"), ("error", "error"), ("clientError", "client_error"), ("cancelled", "cancelled")];

/// Backends, ports and a document; the test starts the controller and the Envoy.
#[derive(Debug)]
pub struct TestBed {
    /// The versions' endpoints.
    pub backends: BTreeMap<String, Vec<Backend>>,
    directory: TempDir,
    listen: Port,
    admin: Port,
    /// The port of the controller, for the Envoy; the controller itself uses the same number.
    controller: SocketAddr,
    reserved: Option<Port>,
    reporter: Option<Reporter>,
}

impl TestBed {
    /// Starts this many endpoints of each version, all ready. There is no document yet.
    pub async fn new(versions: &[(&str, usize)]) -> anyhow::Result<Self> {
        let mut backends = BTreeMap::new();
        for &(version, endpoints) in versions {
            let mut of_version = Vec::new();
            for _ in 0..endpoints {
                of_version.push(Backend::start(version).await?);
            }
            backends.insert(version.to_owned(), of_version);
        }
        let reserved = Port::reserve()?;
        Ok(Self {
            backends,
            directory: tempfile::tempdir()?,
            listen: Port::reserve()?,
            admin: Port::reserve()?,
            controller: reserved.address(),
            reserved: Some(reserved),
            reporter: None,
        })
    }

    /// A document for these versions: probed ten times a second, and two failures make an endpoint unready. `fields`
    /// override those of `spec`.
    pub fn document(&self, fields: Value) -> Value {
        let probe = json!({ "httpGet": { "path": "/health" }, "periodMillis": 100, "failureThreshold": 2 });
        let versions: Vec<Value> = self
            .backends
            .iter()
            .map(|(name, backends)| {
                let endpoints: Vec<String> = backends.iter().map(|backend| backend.address().to_string()).collect();
                json!({ "name": name, "endpoints": endpoints, "readinessProbe": probe })
            })
            .collect();
        let mut spec = json!({ "hostnames": [HOST], "versions": versions, "stable": "v1" });
        if let (Some(spec), Value::Object(fields)) = (spec.as_object_mut(), fields) {
            spec.extend(fields);
        }
        json!({
            "apiVersion": "tideshift.dev/v1alpha1",
            "kind": "TrafficShift",
            "metadata": { "name": SERVICE },
            "spec": spec,
        })
    }

    /// The path of the document.
    pub fn file(&self) -> PathBuf {
        self.path("shift.yaml")
    }

    /// A path in the directory of the document.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes the document in place (JSON is YAML).
    pub fn write(&self, document: &Value) -> anyhow::Result<()> {
        fs::write(self.file(), format!("{document:#}\n")).context("cannot write the document")
    }

    /// Replaces the document by a rename, like an atomic save or a ConfigMap update.
    pub fn replace(&self, document: &Value) -> anyhow::Result<()> {
        let new = self.path("shift.yaml.new");
        fs::write(&new, format!("{document:#}\n"))?;
        fs::rename(new, self.file()).context("cannot replace the document")
    }

    /// The state directory of the controller.
    pub fn state_dir(&self) -> PathBuf {
        self.path(".tideshift").join(self.file().file_name().unwrap_or_default())
    }

    /// Starts `tideshift serve -f` the document.
    pub async fn start_controller(&mut self) -> anyhow::Result<Controller> {
        self.start_controller_with(&[]).await
    }

    /// The same with additional arguments.
    pub async fn start_controller_with(&mut self, further: &[&str]) -> anyhow::Result<Controller> {
        let port = self.reserved.take().context("the controller was started before")?;
        Controller::start_on(port, &[&self.file()], further).await
    }

    /// Starts a proxy that reports and serves no traffic, for rollouts without traffic; before or after the controller.
    pub fn start_reporter(&mut self) {
        self.reporter = Some(Reporter::start(self.controller, "reporter"));
    }

    /// The output of `tideshift render envoy -f` for the document.
    pub fn render(&self) -> anyhow::Result<String> {
        let output = render(&self.file(), self.listen.address(), self.admin.address(), self.controller)?;
        ensure!(output.code == Some(0) && output.stderr.is_empty(), "tideshift render envoy: {output:?}");
        Ok(output.stdout)
    }

    /// Starts an Envoy with this many workers from the output of `tideshift render envoy`.
    pub async fn start_envoy(&self, workers: usize) -> anyhow::Result<Envoy> {
        envoy::Options::new(self.render()?, self.admin.number()).concurrency(workers).start().await
    }

    /// The address of the controller, once it is started.
    pub fn controller_address(&self) -> SocketAddr {
        self.controller
    }

    /// The address for clients.
    pub fn address(&self) -> SocketAddr {
        self.listen.address()
    }

    /// The endpoints of a version.
    pub fn version(&self, name: &str) -> &[Backend] {
        self.backends.get(name).map_or(&[], Vec::as_slice)
    }

    /// Sets whether all endpoints of a version are ready.
    pub fn set_ready(&self, version: &str, ready: bool) {
        self.version(version).iter().for_each(|backend| backend.set_ready(ready));
    }

    /// The number of requests that reached a version's endpoints.
    pub fn arrived(&self, version: &str) -> u64 {
        self.version(version).iter().map(|backend| backend.counts().requests).sum()
    }

    /// Sends requests to the service at this rate.
    pub fn load(&self, per_second: f64) -> Load {
        Plan::new(self.address(), HOST).connections(CONNECTIONS).rate(per_second).start()
    }
}

/// The number of connections of a test bed's load.
pub const CONNECTIONS: usize = 8;

/// `tideshift render envoy` for a document.
pub fn render(file: &Path, listen: SocketAddr, admin: SocketAddr, controller: SocketAddr) -> anyhow::Result<Output> {
    let (listen, admin, controller) = (listen.to_string(), admin.to_string(), controller.to_string());
    let (file, module) = (file.to_string_lossy(), artifacts::wasm()?);
    let module = module.to_string_lossy();
    let arguments = ["render", "envoy", "-f", &file, "--listen", &listen, "--admin", &admin];
    cli(arguments.into_iter().chain(["--controller", &controller, "--module", &module]))
}

/// The status at one moment, parsed as a user's script would.
#[derive(Clone, Debug)]
pub struct Seen(pub Value);

impl Seen {
    /// The current status.
    pub async fn now(controller: &Controller) -> anyhow::Result<Self> {
        Ok(Self(controller.status().await?))
    }

    /// The service of the test bed.
    pub fn service(&self) -> &Value {
        let services = self.0["services"].as_array();
        services.and_then(|services| services.iter().find(|service| service["name"] == SERVICE)).unwrap_or(&Value::Null)
    }

    /// Its phase.
    pub fn phase(&self) -> &str {
        self.service()["phase"].as_str().unwrap_or_default()
    }

    /// The reason for the phase.
    pub fn message(&self) -> &str {
        self.service()["message"].as_str().unwrap_or_default()
    }

    /// The number of the current step.
    pub fn step(&self) -> Option<u64> {
        self.service()["step"]["number"].as_u64()
    }

    /// One of its versions.
    pub fn version(&self, name: &str) -> &Value {
        let versions = self.service()["versions"].as_array();
        versions.and_then(|versions| versions.iter().find(|version| version["name"] == name)).unwrap_or(&Value::Null)
    }

    /// The share of each version in percent, in the document's order.
    pub fn weights(&self) -> Vec<f64> {
        let versions = self.service()["versions"].as_array();
        versions.into_iter().flatten().map(|version| version["weight"].as_f64().unwrap_or(f64::NAN)).collect()
    }

    /// The number of ready endpoints of a version.
    pub fn ready(&self, version: &str) -> u64 {
        self.version(version)["endpoints"]["ready"].as_u64().unwrap_or_default()
    }

    /// The requests of a version with one outcome.
    pub fn count(&self, version: &str, outcome: &str) -> u64 {
        self.version(version)["requests"][outcome].as_u64().unwrap_or_default()
    }

    /// All requests of a version.
    pub fn requests(&self, version: &str) -> u64 {
        OUTCOMES.iter().map(|(outcome, _)| self.count(version, outcome)).sum()
    }

    /// The nonzero request counts by version and outcome, as named in the metrics.
    pub fn counts(&self) -> BTreeMap<(String, String), u64> {
        let versions = self.service()["versions"].as_array();
        let names = versions.into_iter().flatten().filter_map(|version| version["name"].as_str());
        let all = names.flat_map(|name| {
            OUTCOMES.map(|(outcome, label)| ((name.to_owned(), label.to_owned()), self.count(name, outcome)))
        });
        all.filter(|(_, count)| *count > 0).collect()
    }

    /// The revision of the published policy.
    pub fn revision(&self) -> u64 {
        self.0["revision"].as_u64().unwrap_or_default()
    }

    /// Whether at least one proxy has reported, and every proxy runs the newest revision on all workers.
    pub fn is_in_force(&self) -> bool {
        let proxies = self.0["proxies"].as_array();
        proxies.is_some_and(|all| !all.is_empty() && all.iter().all(|p| p["revision"] == self.0["revision"]))
    }
}

/// Waits until the status is as wanted; `holds` returns what is missing.
pub async fn until(
    controller: &Controller,
    what: &str,
    holds: impl Fn(&Seen) -> anyhow::Result<()>,
) -> anyhow::Result<Seen> {
    let outcome = eventually(what, DEADLINE, async || {
        let seen = Seen::now(controller).await?;
        holds(&seen).with_context(|| seen.service().to_string())?;
        Ok(seen)
    });
    outcome.await.with_context(|| controller.tail())
}

/// Waits until the versions have these shares in percent, and every worker of every proxy applies them.
pub async fn until_shares(controller: &Controller, what: &str, shares: &[f64]) -> anyhow::Result<Seen> {
    until(controller, what, |seen| {
        ensure!(seen.weights() == shares, "the shares are {:?}, not {shares:?}", seen.weights());
        ensure!(seen.is_in_force(), "not in force yet: {}", seen.0["proxies"]);
        Ok(())
    })
    .await
}

/// The responses to the next `requests` requests of `load`; the weights must not change meanwhile.
pub async fn next_answers(load: &Load, requests: u64) -> anyhow::Result<Tally> {
    let before = load.tally();
    eventually("more answers", DEADLINE, async || {
        let tally = load.tally().since(&before);
        ensure!(
            tally.answered >= requests,
            "{} answers, {} failed: {:?}",
            tally.answered,
            tally.failed,
            tally.failures
        );
        Ok(tally)
    })
    .await
}

/// The maximum deviation of a window's tally: the even sequence's 3 requests on each worker, and at either end the
/// requests in flight on the connections.
pub fn bound(workers: usize) -> f64 {
    (3 * workers + 2 * CONNECTIONS) as f64
}

/// Fails unless each version's responses in the tally match its share in percent, to within [`bound`].
pub fn assert_shares(what: &str, tally: &Tally, shares: &[(&str, f64)], workers: usize) {
    for &(version, percent) in shares {
        let (due, got) = (tally.answered as f64 * percent / 100.0, tally.of(version) as f64);
        let allowed = if percent == 0.0 { 2.0 * CONNECTIONS as f64 } else { bound(workers) };
        assert!((got - due).abs() <= allowed, "{what}: {version} got {got} of {}, not {due}", tally.answered);
    }
}

/// Waits until the controller's totals, Envoy's own counts and the client's tally are equal, for each version and
/// outcome, and nothing is in flight. Every request must have been answered by a version.
pub async fn assert_counts_agree(controller: &Controller, envoy: &Envoy, tally: &Tally) -> anyhow::Result<()> {
    let expected = counts_of(tally);
    assert_eq!((tally.failed, tally.sent), (0, tally.answered), "{:?}", tally.failures);
    let outcome = eventually("controller, Envoy and client to agree", DEADLINE, async || {
        let status = Seen::now(controller).await?.counts();
        let proxy = counts_of_envoy(&envoy.prometheus().await?);
        ensure!(status == expected, "the controller has {status:?}, the client {expected:?}");
        ensure!(proxy == expected, "Envoy has {proxy:?}, the client {expected:?}");
        Ok(())
    });
    outcome.await
}

/// Envoy's nonzero counts of the test bed's service.
pub fn counts_of_envoy(metrics: &Metrics) -> BTreeMap<(String, String), u64> {
    metrics.requests_by_version(SERVICE).into_iter().filter(|(_, count)| *count > 0).collect()
}

/// The responses in a tally by version and by the outcome of their status.
pub fn counts_of(tally: &Tally) -> BTreeMap<(String, String), u64> {
    let mut counts = BTreeMap::new();
    for ((version, status), count) in &tally.by {
        let outcome = match status {
            500.. => "error",
            400.. => "client_error",
            _ => "ok",
        };
        *counts.entry((version.clone(), outcome.to_owned())).or_default() += count;
    }
    counts
}

/// The revisions that the proxy has applied from the controller, in order, according to its log.
pub fn revisions(envoy: &Envoy) -> Vec<u64> {
    let log = envoy.log();
    let taken =
        log.lines().filter_map(|line| line.split_once("policy revision ")?.1.strip_suffix(" from the controller"));
    taken.filter_map(|number| number.parse().ok()).collect()
}

/// Whether a controller answers polls within about a second, whatever else happens to it.
pub async fn answers_polls(address: SocketAddr) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let policy = get(address, "/v1/policy?proxy=probe&epoch=&after=0").send().await?;
    ensure!(policy.status == 200, "{}: {}", policy.status, policy.text());
    ensure!(policy.json()?["services"].is_array(), "{}", policy.text());
    Ok(begun.elapsed())
}
