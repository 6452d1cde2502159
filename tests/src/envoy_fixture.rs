//! An Envoy with the filter and one backend per version: the fixture of most filter tests.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::backend::{Backend, SERVED_BY};
use crate::bootstrap::Bootstrap;
use crate::client::{Connection, Request, Response};
use crate::envoy;
use crate::envoy::Envoy;
use crate::metrics::Metrics;
use crate::wait::eventually;

/// The timeout of anything that these tests wait for; a busy machine is slow.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The header with which clients select a version of [`picked_service`].
pub const WANT: &str = "x-want";

/// A service whose clients select the version, so that each ending can be provoked deterministically. Its guard is
/// disabled: versions that are made to fail continue to receive requests.
pub fn picked_service(name: &str, host: &str, versions: &[&str]) -> Value {
    let version = |name: &&str| json!({ "name": name, "weight": 1 });
    let rule = |name: &&str| {
        let matches = json!([{ "headers": [{ "name": WANT, "value": name }] }]);
        json!({ "matches": matches, "versions": [{ "name": name }] })
    };
    json!({
        "name": name,
        "hostnames": [host],
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "rules": versions.iter().map(rule).collect::<Vec<_>>(),
        "guard": { "enabled": false },
    })
}

/// Signs in Envoy's log of a trapped VM or a panic of the module.
const SIGNS_OF_A_TRAP: [&str; 4] = ["panicked", "Uncaught", "unreachable", "Function: "];

/// A running Envoy and its backends.
#[derive(Debug)]
pub struct EnvoyFixture {
    /// The Envoy.
    pub envoy: Envoy,
    backends: BTreeMap<String, Backend>,
    bootstrap: Bootstrap,
    options: envoy::Options,
    vms: u64,
}

impl EnvoyFixture {
    /// Starts a backend for each of `versions`, and an Envoy with this many workers and the filter with `policy`. The
    /// first version is the default route.
    pub async fn start(policy: Value, versions: &[&str], workers: usize) -> anyhow::Result<Self> {
        Self::start_with(policy, versions, workers, |bootstrap| bootstrap, |_| ()).await
    }

    /// The same; `build` adds to the bootstrap, and `patch` changes the result.
    pub async fn start_with(
        policy: Value,
        versions: &[&str],
        workers: usize,
        build: impl FnOnce(Bootstrap) -> Bootstrap,
        patch: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Self> {
        Self::start_as(None, policy, versions, workers, build, patch).await
    }

    /// The same, as the first process of a hot restart if there is an epoch.
    pub async fn start_as(
        restart_epoch: Option<u32>,
        policy: Value,
        versions: &[&str],
        workers: usize,
        build: impl FnOnce(Bootstrap) -> Bootstrap,
        patch: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Self> {
        let mut backends = BTreeMap::new();
        let mut bootstrap = Bootstrap::new(policy)?;
        for &name in versions {
            let backend = Backend::start(name).await?;
            bootstrap = bootstrap.version(name, &[backend.address()]);
            backends.insert(name.to_owned(), backend);
        }
        let bootstrap = build(bootstrap);
        let mut json = bootstrap.to_json()?;
        patch(&mut json);
        let admin = json["admin"]["address"]["socket_address"]["port_value"].as_u64().context("no admin port")?;
        let mut options = envoy::Options::new(json.to_string(), u16::try_from(admin)?).concurrency(workers);
        options.restart_epoch = restart_epoch;
        let (envoy, vms) = Self::started(options.clone()).await?;
        Ok(Self { envoy, backends, bootstrap, options, vms })
    }

    async fn started(options: envoy::Options) -> anyhow::Result<(Envoy, u64)> {
        let envoy = options.start().await?;
        let vms = envoy.stat(VMS_CREATED).await?;
        ensure!(vms > 0, "no {VMS_CREATED}: {}", envoy.stats().await?);
        Ok((envoy, vms))
    }

    /// Kills the Envoy and starts another one with the same bootstrap.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.envoy.kill()?;
        (self.envoy, self.vms) = Self::started(self.options.clone()).await?;
        Ok(())
    }

    /// Starts the next process of a hot restart, which takes over from this one. Returns this one, which ends by
    /// itself.
    pub async fn hot_restart(&mut self) -> anyhow::Result<Envoy> {
        let next = self.options.restart_epoch.map_or(0, |epoch| epoch + 1);
        self.options.restart_epoch = Some(next);
        let (envoy, vms) = Self::started(self.options.clone()).await?;
        self.vms = vms;
        Ok(std::mem::replace(&mut self.envoy, envoy))
    }

    /// The address for clients.
    pub fn address(&self) -> SocketAddr {
        self.bootstrap.address()
    }

    /// The backend of a version.
    pub fn backend(&self, version: &str) -> &Backend {
        &self.backends[version]
    }

    /// All backends.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.backends.values()
    }

    /// A `GET` with this host.
    pub fn get(&self, host: &str, path: &str) -> Request {
        self.request("GET", host, path)
    }

    /// A request with this host.
    pub fn request(&self, method: &str, host: &str, path: &str) -> Request {
        Request::new(self.address(), method, path).host(host)
    }

    /// The versions that answer `requests` equal requests, one after the other on one connection: what one worker
    /// chooses, in its order.
    pub async fn choices(&self, host: &str, requests: usize) -> anyhow::Result<Vec<String>> {
        let request = self.get(host, "/");
        let mut connection = Connection::open(self.address()).await?;
        let mut choices = Vec::with_capacity(requests);
        for _ in 0..requests {
            let response = connection.send(&request).await?;
            choices.push(served_by(&response)?);
        }
        Ok(choices)
    }

    /// Waits until the service has nothing in flight and `total` requests counted, whatever their version and
    /// outcome; no more, if no client sends more. Returns that scrape.
    pub async fn settled(&self, service: &str, total: u64) -> anyhow::Result<Metrics> {
        let of_service = [("service", service)];
        eventually(&format!("{total} requests of {service} counted, none in flight"), DEADLINE, async || {
            let metrics = self.envoy.prometheus().await?;
            let counted: u64 = metrics.requests_by_version(service).values().sum();
            let in_flight = metrics.sum("tideshift_requests_in_flight", &of_service);
            ensure!(
                counted == total && in_flight == Some(0.0),
                "{counted} counted, {in_flight:?} in flight: {:?}",
                metrics.requests_by_version(service)
            );
            Ok(metrics)
        })
        .await
    }

    /// Fails if a VM has trapped, been reloaded or logged a panic since the start. For tests that do not change the
    /// plugin configuration, because Envoy tries a new one in a VM of its own.
    pub async fn no_trap(&self) -> anyhow::Result<()> {
        self.no_panic()?;
        let vms = self.envoy.stat(VMS_CREATED).await?;
        ensure!(vms == self.vms, "{vms} VMs were created, {} of them at the start", self.vms);
        Ok(())
    }

    /// Fails if the log tells of a trap or a panic.
    pub fn no_panic(&self) -> anyhow::Result<()> {
        let log = self.envoy.log();
        let sign = log.lines().find(|line| SIGNS_OF_A_TRAP.iter().any(|sign| line.contains(sign)));
        ensure!(sign.is_none(), "a trap: {sign:?}");
        Ok(())
    }
}

/// The stat of the VMs that Envoy has made so far; one more than at the start is one that was reloaded.
pub const VMS_CREATED: &str = "wasm.envoy.wasm.runtime.v8.created";

/// A connection to each worker of an Envoy; the listener balances connections exactly.
#[derive(Debug)]
pub struct EachWorker {
    /// The request that is sent on them.
    pub request: Request,
    /// One to each worker.
    pub connections: Vec<Connection>,
}

impl EachWorker {
    /// Connects to each, for requests like this one; no other client should connect at the same time.
    pub async fn open(setup: &EnvoyFixture, request: Request) -> anyhow::Result<Self> {
        let mut connections = Vec::new();
        for _ in 0..setup.options.concurrency {
            connections.push(Connection::open(setup.address()).await?);
        }
        Ok(Self { request, connections })
    }

    /// Each worker's answer to another request.
    pub async fn send(&mut self, request: &Request) -> anyhow::Result<Vec<Response>> {
        let mut responses = Vec::new();
        for connection in &mut self.connections {
            responses.push(connection.send(request).await?);
        }
        Ok(responses)
    }

    /// The versions that answer one request to each worker.
    pub async fn versions(&mut self) -> anyhow::Result<Vec<String>> {
        let request = self.request.clone();
        self.send(&request).await?.iter().map(served_by).collect()
    }

    /// Waits until one version answers each worker's next request.
    pub async fn all_to(&mut self, version: &str) -> anyhow::Result<()> {
        eventually(&format!("every worker to choose {version}"), DEADLINE, async || {
            let versions = self.versions().await?;
            ensure!(versions.iter().all(|other| other == version), "{versions:?}");
            Ok(())
        })
        .await
    }
}

/// The version that gave an answer; an error if none did.
pub fn served_by(response: &Response) -> anyhow::Result<String> {
    response.header(SERVED_BY).with_context(|| format!("no version served: {response:?}"))
}
