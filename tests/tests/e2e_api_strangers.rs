//! Clients without a good token that hold what they get: connections, heads that never end. The others notice nothing.

use std::{fs, net::Ipv4Addr, net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::json;
use tempfile::TempDir;
use tideshift_tests::{
    client::{Connection, Request, get},
    controller::Controller,
    ports::Port,
    rig::Rig,
    wait::eventually,
};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};

const PROXY: &str = "proxy-token-of-the-test";
/// Where the strangers call from.
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);
/// Longer than anyone may have to wait for an answer.
const SOON: Duration = Duration::from_secs(3);

struct Setting {
    controller: Controller,
    health: SocketAddr,
    _files: (Rig, TempDir, Port),
}

async fn setting() -> anyhow::Result<Setting> {
    let rig = Rig::new(&[("v1", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("proxy");
    fs::write(&file, PROXY)?;
    let port = Port::reserve()?;
    let health = port.address();
    let (file, address) = (file.display().to_string(), health.to_string());
    let arguments = ["--proxy-token-file", &file, "--health-listen", &address];
    let controller = Controller::start_with(&[&rig.file()], &arguments).await?;
    Ok(Setting { controller, health, _files: (rig, directory, port) })
}

fn poll(address: SocketAddr, after: u64) -> Request {
    get(address, &format!("/v1/policy?proxy=p&epoch=e&after={after}"))
        .header("authorization", format!("Bearer {PROXY}"))
}

/// Its memory in MiB.
fn resident(controller: &Controller) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", controller.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? / 1024)
}

/// A proxy that polls on one connection as long as it is not stopped, and is always answered.
struct Proxy(JoinHandle<anyhow::Result<()>>, oneshot::Sender<()>);

impl Proxy {
    async fn start(address: SocketAddr) -> anyhow::Result<Self> {
        let mut connection = Connection::open(address).await?;
        ensure!(connection.send(&poll(address, 0)).await?.status == 200);
        let (stop, mut stopped) = oneshot::channel();
        let polls = async move {
            while stopped.try_recv().is_err() {
                let answer = timeout(SOON, connection.send(&poll(address, 0))).await.context("no answer")?;
                ensure!(answer?.status == 200);
                sleep(Duration::from_millis(200)).await;
            }
            Ok(())
        };
        Ok(Self(tokio::spawn(polls), stop))
    }

    async fn stop(self) -> anyhow::Result<()> {
        let _ = self.1.send(());
        self.0.await?.context("a proxy's connection while strangers hold others")
    }
}

async fn all_are_served(setting: &Setting) -> anyhow::Result<()> {
    let address = setting.controller.address();
    for (name, request) in [
        ("health on its own listener", get(setting.health, "/healthz")),
        ("readiness there", get(setting.health, "/readyz")),
        ("health of another client", get(address, "/healthz")),
        ("a new connection of a proxy", poll(address, 0)),
    ] {
        let answer = timeout(SOON, request.send()).await.with_context(|| format!("{name}: no answer"))?;
        ensure!(answer.with_context(|| name)?.status == 200, "{name}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_held_without_a_token_keep_no_one_out() -> anyhow::Result<()> {
    let setting = setting().await?;
    let address = setting.controller.address();
    let proxy = Proxy::start(address).await?;
    // As many as the controller has for strangers altogether, asked for again and again as they are closed.
    let mut held = Vec::new();
    for _ in 0..5_000 {
        held.push(Connection::open_from(STRANGER, address).await?);
    }
    for stranger in &mut held {
        // Those that were closed fail.
        let _ = stranger.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await;
    }
    all_are_served(&setting).await?;
    for path in ["/v1/status", "/metrics"] {
        ensure!(get(setting.health, path).send().await?.status == 404, "only health is there");
    }
    // The same on the health listener: its own clients keep it for no one.
    for _ in 0..1_000 {
        held.push(Connection::open_from(STRANGER, setting.health).await?);
    }
    all_are_served(&setting).await?;
    proxy.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_thousand_heads_that_never_end_cost_little_memory() -> anyhow::Result<()> {
    let setting = setting().await?;
    let address = setting.controller.address();
    let proxy = Proxy::start(address).await?;
    let before = resident(&setting.controller)?;
    let mut head = b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: ".to_vec();
    head.resize(15 << 10, b'a');
    let (mut held, mut most) = (Vec::new(), before);
    for i in 0..4_000_u32 {
        // Of several addresses, so that no bound for each of them is all there is.
        let from = Ipv4Addr::from(u32::from(STRANGER) + i % 16);
        let mut stranger = Connection::open_from(from, address).await?;
        let _ = timeout(Duration::from_millis(200), stranger.write(&head)).await;
        held.push(stranger);
        if i % 100 == 0 {
            most = most.max(resident(&setting.controller)?);
        }
    }
    most = most.max(resident(&setting.controller)?);
    all_are_served(&setting).await?;
    println!("memory: {before} MiB before, {most} MiB at most");
    ensure!(most < before + 128, "{before} MiB before, {most} MiB at most");
    proxy.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_an_end_is_closed_soon_and_two_hosts_are_refused() -> anyhow::Result<()> {
    let setting = setting().await?;
    let address = setting.controller.address();
    let mut slow = Connection::open(address).await?;
    slow.write(b"GET /healthz HTTP/1.1\r\nx").await?;
    eventually("the slow head is closed", Duration::from_secs(10), async || {
        sleep(Duration::from_millis(50)).await;
        slow.write(b"a").await.is_err().then_some(()).context("it is still open")
    })
    .await?;
    let two = get(address, "/healthz").header("host", "other.example").send().await?;
    ensure!(two.status == 400 && two.text().contains("host"), "{}", two.text());
    Ok(())
}
