//! A real Envoy.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::artifacts;
use crate::client::{Request, get};
use crate::metrics::Metrics;
use crate::process::Process;

/// The timeout of a start; on a busy machine compiling the module takes seconds.
const START: Duration = Duration::from_secs(60);

/// Options for starting Envoy.
#[derive(Clone, Debug)]
pub struct Options {
    /// The bootstrap, as YAML or JSON.
    pub bootstrap: String,
    /// The port of the admin interface that the bootstrap names.
    pub admin: u16,
    /// Worker threads.
    pub concurrency: usize,
    /// Envoy's `--component-log-level`, such as `wasm:debug`; its other logs are at `warning`.
    pub component_log_level: String,
    /// The epoch of a hot restart, from 0; `None`: no hot restarts.
    pub restart_epoch: Option<u32>,
}

impl Options {
    /// Two workers, and the logs of the module.
    pub fn new(bootstrap: impl Into<String>, admin: u16) -> Self {
        Self {
            bootstrap: bootstrap.into(),
            admin,
            concurrency: 2,
            component_log_level: "wasm:info".to_owned(),
            restart_epoch: None,
        }
    }

    /// Sets the number of workers.
    pub fn concurrency(mut self, workers: usize) -> Self {
        self.concurrency = workers;
        self
    }

    /// Makes it a process of a hot restart: each takes over from the previous one, which ends two seconds later.
    pub fn restart_epoch(mut self, epoch: u32) -> Self {
        self.restart_epoch = Some(epoch);
        self
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> anyhow::Result<Envoy> {
        Envoy::start(self).await
    }
}

/// A running Envoy; dropping it kills it.
#[derive(Debug)]
pub struct Envoy {
    process: Process,
    admin: SocketAddr,
    _directory: TempDir,
}

impl Envoy {
    /// Starts it and waits until it is ready.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let mut envoy = Self::spawn(options)?;
        let admin = envoy.admin;
        envoy
            .process
            .until_ready(START, async || {
                let ready = get(admin, "/ready").send().await?;
                ensure!(ready.status == 200, "/ready says {}: {}", ready.status, ready.text().trim());
                Ok(())
            })
            .await?;
        Ok(envoy)
    }

    /// Starts it without waiting.
    pub fn spawn(options: Options) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut command = command(&directory, &options.bootstrap)?;
        command
            .args(["--concurrency", &options.concurrency.to_string()])
            .args(["--log-level", "warning", "--component-log-level", &options.component_log_level])
            // Access logs and drains must not delay tests.
            .args(["--file-flush-interval-msec", "50", "--drain-time-s", "1"]);
        match options.restart_epoch {
            // Processes with the same base id take over from each other; the port is reserved for this test.
            Some(epoch) => command
                .args(["--base-id", &options.admin.to_string(), "--restart-epoch", &epoch.to_string()])
                .args(["--parent-shutdown-time-s", "4"]),
            None => command.arg("--disable-hot-restart"),
        };
        let process = Process::start("Envoy", command, &directory.path().join("envoy.log"))?;
        Ok(Self { process, admin: (Ipv4Addr::LOCALHOST, options.admin).into(), _directory: directory })
    }

    /// The result of `--mode validate` for a bootstrap: `Err` with Envoy's message if it is rejected.
    pub fn validate(bootstrap: &str) -> anyhow::Result<()> {
        let directory = tempfile::tempdir()?;
        let output = command(&directory, bootstrap)?.args(["--disable-hot-restart", "--mode", "validate"]).output()?;
        if !output.status.success() {
            bail!("Envoy refuses the bootstrap:\n{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Gets a path of the admin interface, which must answer 200.
    pub async fn admin(&self, path: &str) -> anyhow::Result<String> {
        let response = get(self.admin, path).send().await?;
        ensure!(response.status == 200, "{path} says {}: {}", response.status, response.text());
        Ok(response.text())
    }

    /// A `POST` to the admin interface, such as `/logging?wasm=debug`, which must answer 200.
    pub async fn admin_post(&self, path: &str) -> anyhow::Result<String> {
        let response = Request::new(self.admin, "POST", path).body("").send().await?;
        ensure!(response.status == 200, "{path} says {}: {}", response.status, response.text());
        Ok(response.text())
    }

    /// `/stats` as text, one `name: value` on each line.
    pub async fn stats(&self) -> anyhow::Result<String> {
        self.admin("/stats").await
    }

    /// A counter or gauge of `/stats`; 0 if it does not exist (yet).
    pub async fn stat(&self, name: &str) -> anyhow::Result<u64> {
        let stats = self.stats().await?;
        let value = stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.map_or(Ok(0), |value| value.parse().with_context(|| format!("{name} is {value:?}")))
    }

    /// The scrape as Prometheus sees it.
    pub async fn prometheus(&self) -> anyhow::Result<Metrics> {
        Metrics::parse(&self.admin("/stats/prometheus").await?)
    }

    /// The configuration in force, as `/config_dump` tells it.
    pub async fn config_dump(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.admin("/config_dump").await?)?)
    }

    /// Where the admin interface is.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// The whole log; the module's lines are in it.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The log's last lines.
    pub fn tail(&self) -> String {
        self.process.tail()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.ended(), Ok(None))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill().map(drop)
    }
}

fn command(directory: &TempDir, bootstrap: &str) -> anyhow::Result<Command> {
    // Envoy chooses the parser by the file's name, and YAML takes JSON as well.
    let file: PathBuf = directory.path().join("envoy.yaml");
    fs::write(&file, bootstrap).with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = Command::new(artifacts::envoy()?);
    command.arg("--config-path").arg(file);
    Ok(command)
}
