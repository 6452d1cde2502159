//! Clients without a good token that hold what they get: connections, heads that never end. The others notice nothing.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tideshift_tests::client::{Connection, Request, get};
use tideshift_tests::controller::Controller;
use tideshift_tests::ports::Port;
use tideshift_tests::test_bed::TestBed;
use tideshift_tests::wait::eventually;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const PROXY: &str = "proxy-token-of-the-test";
/// Where the strangers call from.
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);
/// Longer than anyone may have to wait for an answer.
const SOON: Duration = Duration::from_secs(3);

struct Setting {
    controller: Controller,
    health: SocketAddr,
    _files: (TestBed, TempDir, Port),
}

async fn setting() -> anyhow::Result<Setting> {
    let rig = TestBed::new(&[("v1", 1)]).await?;
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
    // A hangup, which ends other programs or has them read their files again, is no harm.
    ensure!(Command::new("kill").args(["-HUP", &setting.controller.id().to_string()]).status()?.success());
    eventually("the log to tell of the signal", Duration::from_secs(5), async || {
        setting.controller.log().contains("SIGHUP").then_some(()).context("nothing yet")
    })
    .await?;
    let two = get(address, "/healthz").header("host", "other.example").send().await?;
    ensure!(two.status == 400 && two.text().contains("host"), "{}", two.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_with_a_named_token_speaks_for_itself_and_sees_what_is_its_own() -> anyhow::Result<()> {
    let rig = TestBed::new(&[("v1", 1)]).await?;
    let mut document = rig.document(json!({ "session": { "type": "Cookie", "name": "c" } }));
    rig.write(&document)?;
    let directory = tempfile::tempdir()?;
    let (file, other) = (directory.path().join("proxy"), directory.path().join("bank.yaml"));
    document["metadata"]["name"] = json!("bank");
    document["spec"]["hostnames"] = json!(["bank.example"]);
    document["spec"]["session"] = json!({ "type": "Cookie", "name": "c", "secret": "the-secret-of-the-bank" });
    fs::write(&other, document.to_string())?;
    fs::write(&file, format!("one {PROXY}-1\ntwo {PROXY}-2 bank\n{PROXY}\n"))?;
    let read = directory.path().join("read");
    fs::write(&read, "a-token-for-reading")?;
    let (file, read) = (file.display().to_string(), read.display().to_string());
    let arguments = ["--proxy-token-file", &file, "--read-token-file", &read];
    let controller = Controller::start_with(&[&rig.file(), &other], &arguments).await?;
    let address = controller.address();
    let with = |request: Request, token: &str| request.header("authorization", format!("Bearer {PROXY}{token}"));
    let policy = async |proxy: &str, token: &str| {
        let path = format!("/v1/policy?proxy={proxy}&epoch=&after=0");
        with(get(address, &path), token).send().await
    };
    let whole = policy("one", "-1").await?.json()?;
    let answer = policy("two", "-2").await?;
    let (own, epoch) = (answer.json()?, answer.header("x-tideshift-epoch").context("no epoch")?);
    assert_eq!(
        (whole["services"].as_array().map(Vec::len), own["services"].as_array().map(Vec::len)),
        (Some(2), Some(1))
    );
    assert_eq!(own["services"][0]["name"], "bank");
    assert_eq!(policy("one", "-2").await?.status, 403);

    let report = async |proxy: &str, token: &str, sequence: u64, revision: u64, vetoes: Value| {
        let ended = json!({ "name": "v1", "ok": 9, "error": 1, "clientError": 0, "cancelled": 0 });
        let service = json!({ "name": "bank", "versions": [ended], "vetoes": vetoes });
        let report = json!({ "proxy": proxy, "start": "1", "sequence": sequence, "epoch": epoch,
            "revision": revision, "services": [service] });
        let request = Request::new(address, "POST", "/v1/reports").header("content-type", "application/json");
        with(request.body(report.to_string()), token).send().await
    };
    assert_eq!(report("two", "-2", 1, 1, json!([])).await?.status, 204);
    let refused = report("one", "-2", 1, 1, json!([])).await?;
    assert_eq!(refused.status, 403);
    ensure!(["one", "two"].iter().all(|name| refused.text().contains(name)), "{}", refused.text());
    // With a token that speaks for any proxy: numbers, revisions and vetoes that cannot be.
    let veto = json!([{ "version": "v1", "until": u64::MAX, "strikes": 1, "requests": 1_000, "errors": 1_000,
        "othersRequests": 1_000, "othersErrors": 0 }]);
    for i in 0..50 {
        assert_eq!(report("two", "", u64::MAX - i, 1, json!([])).await?.status, 204);
        assert_eq!(report("three", "", 1 + i, 1_000 + i, veto.clone()).await?.status, 204);
    }
    assert_eq!(report("two", "-2", 2, 1, json!([])).await?.status, 204);
    assert_eq!(policy("two", "-2").await?.json()?["revision"], own["revision"], "nothing was published for that");
    let metrics = get(address, "/metrics").header("authorization", "Bearer a-token-for-reading").send().await?.text();
    for claim in ["sequence", "revision", "veto", "proxy"] {
        let line =
            format!("report_claims_ignored_total{{claim=\"{claim}\"}} {}", if claim == "proxy" { 2 } else { 50 });
        ensure!(metrics.contains(&line), "no {line}");
    }
    let logged = controller.log().lines().filter(|line| line.contains("ignored: ")).count();
    ensure!(logged <= 8, "{logged} lines");
    Ok(())
}
