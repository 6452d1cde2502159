//! Everything that runs during the demo, on free loopback ports and in one temporary directory. Dropping it ends
//! everything, in the order of the fields.

use std::mem;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, ensure};
use tempfile::TempDir;
use tideshift_tests::artifacts;
use tideshift_tests::backend::Backend;
use tideshift_tests::controller::{Controller, cli};
use tideshift_tests::envoy::{Envoy, Options};
use tideshift_tests::load::{Load, Plan, Tally};
use tideshift_tests::ports::Port;

use crate::document::{Document, HOST};
use crate::guard::Guard;
use crate::status::Status;

/// The version that serves initially.
pub(crate) const V1: &str = "v1";
/// The next version, which is healthy.
pub(crate) const V2: &str = "v2";
/// The version after that, which is broken.
pub(crate) const V3: &str = "v3";
/// All versions, in the document's order.
pub(crate) const VERSIONS: [&str; 3] = [V1, V2, V3];
/// Endpoints of each version.
pub(crate) const ENDPOINTS: usize = 4;

const CONNECTIONS: usize = 8;

/// All the parts.
pub(crate) struct Stage {
    load: Load,
    envoy: Envoy,
    controller: Controller,
    versions: Vec<(&'static str, Vec<Backend>)>,
    listener: Port,
    pub(crate) document: Document,
    _guard: Guard,
    _folder: TempDir,
}

impl Stage {
    /// Starts the endpoints of v1, the controller and Envoy; those of v2 and v3 exist in the document only.
    pub(crate) async fn set_up(module: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("tideshift-demo-").tempdir().context("no temporary folder")?;
        // The components' directories are created inside it, so that only one must be removed.
        let _ = tempfile::env::override_temp_dir(folder.path());
        let guard = Guard::new(folder.path(), [&artifacts::tideshift()?, &artifacts::envoy()?])?;

        let mut versions = Vec::new();
        for name in VERSIONS {
            let mut endpoints = Vec::new();
            for _ in 0..ENDPOINTS {
                endpoints.push(Backend::start(name).await?);
            }
            versions.push((name, endpoints));
        }
        for backend in versions.iter().skip(1).flat_map(|(_, endpoints)| endpoints) {
            backend.stop().await;
        }
        let addresses = |(name, endpoints): &(&'static str, Vec<Backend>)| {
            (*name, endpoints.iter().map(Backend::address).collect())
        };
        let document = Document::new(folder.path(), &versions.iter().map(addresses).collect::<Vec<_>>());
        document.write(V1, None)?;

        let (listener, admin, controller) = (Port::reserve()?, Port::reserve()?, Port::reserve()?);
        let bootstrap = bootstrap(document.path(), &listener, &admin, &controller, module)?;
        let controller = Controller::start_on(controller, &[document.path()], &[]).await?;
        let envoy = Options::new(bootstrap, admin.number()).concurrency(2).start().await?;
        let load = Plan::new(listener.address(), HOST).connections(0).start();
        Ok(Self { load, envoy, controller, versions, listener, document, _guard: guard, _folder: folder })
    }

    /// Sends this many requests per second.
    pub(crate) fn send(&mut self, rate: f64) {
        self.load = Plan::new(self.listener.address(), HOST).connections(CONNECTIONS).rate(rate).start();
    }

    /// Stops sending; returns the tally once every request has been answered or has failed.
    pub(crate) async fn send_no_more(&mut self) -> anyhow::Result<Tally> {
        let nothing = Plan::new(self.listener.address(), HOST).connections(0).start();
        mem::replace(&mut self.load, nothing).stop().await
    }

    /// The client's tally so far.
    pub(crate) fn tally(&self) -> Tally {
        self.load.tally()
    }

    /// The controller's status; fails with the log of a process that has exited.
    pub(crate) async fn status(&mut self) -> anyhow::Result<Status> {
        ensure!(self.envoy.is_running(), "Envoy has ended:\n{}", self.envoy.tail());
        let status = Status::of(&self.controller).await;
        status.with_context(|| format!("the controller does not answer:\n{}", self.controller.tail()))
    }

    /// The endpoints of a version.
    pub(crate) fn endpoints(&self, version: &str) -> &[Backend] {
        let found = self.versions.iter().find(|(name, _)| *name == version);
        found.map_or(&[], |(_, endpoints)| endpoints)
    }

    pub(crate) fn envoy(&self) -> &Envoy {
        &self.envoy
    }

    pub(crate) fn listener(&self) -> SocketAddr {
        self.listener.address()
    }

    pub(crate) fn controller(&self) -> SocketAddr {
        self.controller.address()
    }
}

/// The configuration for users: the output of `tideshift render envoy`.
fn bootstrap(
    document: &Path,
    listener: &Port,
    admin: &Port,
    controller: &Port,
    module: &Path,
) -> anyhow::Result<String> {
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not UTF-8");
    let rendered = cli([
        "render",
        "envoy",
        "-f",
        &text(document)?,
        "--listen",
        &listener.address().to_string(),
        "--admin",
        &admin.address().to_string(),
        "--controller",
        &controller.address().to_string(),
        "--module",
        &text(module)?,
    ])?;
    ensure!(rendered.code == Some(0), "tideshift render envoy: {}", rendered.stderr);
    Ok(rendered.stdout)
}
