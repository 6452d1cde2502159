//! Readiness probes against real sockets and real commands, as the status tells what came of them.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tideshift_tests::backend::{Backend, Mode};
use tideshift_tests::controller::Controller;
use tideshift_tests::grpc;
use tideshift_tests::ports::Port;
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, HOST, Seen, TestBed, until, until_shares};
use tideshift_tests::wait::eventually;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A controller for the service `shop` with these versions, each a name, an endpoint and a probe.
async fn start(versions: &[(&str, &str, Value)]) -> anyhow::Result<(TempDir, Controller)> {
    let versions: Vec<Value> = versions
        .iter()
        .map(|(name, endpoint, probe)| json!({ "name": name, "endpoints": [endpoint], "readinessProbe": probe }))
        .collect();
    let document = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": "shop" },
        "spec": { "versions": versions, "stable": versions[0]["name"] },
    });
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("shift.yaml");
    fs::write(&file, document.to_string())?;
    let controller = Controller::start(&[&file]).await?;
    Ok((directory, controller))
}

/// Why the one endpoint of a version is not ready; `None` if it is.
fn reason(seen: &Seen, version: &str) -> Option<String> {
    let reason = &seen.version(version)["endpoints"]["notReady"][0]["reason"];
    reason.as_str().map(str::to_owned)
}

async fn until_ready(controller: &Controller, version: &str, ready: bool) -> anyhow::Result<Seen> {
    until(controller, &format!("{version} ready: {ready}"), |seen| {
        ensure!((seen.ready(version) == 1) == ready);
        Ok(())
    })
    .await
}

/// Answers each connection with what `answer` makes of the request, and keeps the requests.
async fn server(answer: impl Fn(&str, SocketAddr) -> String + Send + 'static) -> anyhow::Result<(String, Requests)> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let (address, requests) = (listener.local_addr()?, Requests::default());
    let kept = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => break,
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let _ = stream.write_all(answer(&request, address).as_bytes()).await;
            if let Ok(mut kept) = kept.lock() {
                kept.push(request);
            }
        }
    });
    Ok((address.to_string(), requests))
}

type Requests = Arc<Mutex<Vec<String>>>;

fn status(status: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
}

fn has_asked(requests: &Requests, line: &str) -> bool {
    requests.lock().is_ok_and(|requests| requests.iter().any(|request| request.contains(line)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_probes_ask_what_they_are_told_to_and_count_by_the_status() -> anyhow::Result<()> {
    let (fine, asked) = server(|_, _| status("204 No Content")).await?;
    let fine_port: u16 = fine.rsplit(':').next().context("no port")?.parse()?;
    let (bad, _) = server(|_, _| status("500 No")).await?;
    let (moved, moves) = server(|request, own| match request.starts_with("GET /real ") {
        true => status("200 OK"),
        false => status(&format!("302 Found\r\nlocation: http://{own}/real")),
    })
    .await?;
    let (elsewhere, _) = server(|_, _| status("301 Moved\r\nlocation: http://nowhere.invalid/")).await?;
    let (round, _) = server(|_, own| status(&format!("302 Found\r\nlocation: http://{own}/again"))).await?;
    let (garbage, _) = server(|_, _| "SMTP ready\r\n".to_owned()).await?;
    let closed = Port::reserve()?;
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let slow = Backend::start("slow").await?;
    slow.set(|behaviour| behaviour.mode = Mode::Hang);

    let path = json!({ "path": "/deep/health?all=1", "port": fine_port,
        "httpHeaders": [{ "name": "Host", "value": "shop.example.com" }, { "name": "X-Probe", "value": "yes" }] });
    let every = |get: Value| json!({ "httpGet": get, "periodMillis": 50 });
    let (_directory, controller) = start(&[
        // Nothing listens on port 1: the probe has a port of its own.
        ("told", "127.0.0.1:1", every(path)),
        ("bad", &bad, every(json!({}))),
        ("moved", &moved, every(json!({ "path": "/old" }))),
        ("elsewhere", &elsewhere, every(json!({}))),
        ("round", &round, every(json!({}))),
        ("garbage", &garbage, every(json!({}))),
        ("closed", &closed.address().to_string(), every(json!({}))),
        ("silent", &silent.local_addr()?.to_string(), every(json!({}))),
        ("slow", &slow.address().to_string(), every(json!({ "path": "/slow" }))),
    ])
    .await?;
    let seen = Seen::now(&controller).await?;
    let expected = [
        ("told", None),
        ("bad", Some("HTTP status 500")),
        ("moved", None),
        ("elsewhere", None),
        ("round", Some("more than 10 redirects")),
        ("closed", Some("connection refused")),
        ("silent", Some("no result within 1 s")),
        ("slow", Some("no result within 1 s")),
    ];
    for (version, expected) in expected {
        assert_eq!(reason(&seen, version).as_deref(), expected, "{version}");
        assert_eq!(seen.ready(version), u64::from(expected.is_none()), "{version}");
    }
    assert!(reason(&seen, "garbage").is_some(), "{:?}", seen.version("garbage"));
    for line in ["GET /deep/health?all=1 HTTP/1.1\r\n", "\r\nhost: shop.example.com\r\n", "\r\nx-probe: yes\r\n"] {
        assert!(has_asked(&asked, line), "{line:?} in {asked:?}");
    }
    assert!(has_asked(&moves, "GET /old ") && has_asked(&moves, "GET /real "));
    // An answer that takes its time is fine as long as it is in time.
    slow.set(|behaviour| (behaviour.mode, behaviour.latency) = (Mode::Answer, Duration::from_millis(200)));
    until_ready(&controller, "slow", true).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_probes_follow_the_port() -> anyhow::Result<()> {
    let (own, other) = (Port::reserve()?, Port::reserve()?);
    let probe = json!({ "tcpSocket": {}, "periodMillis": 20 });
    let ported = json!({ "tcpSocket": { "port": other.number() }, "periodMillis": 20 });
    let endpoint = own.address().to_string();
    let (_directory, controller) = start(&[("own", &endpoint, probe), ("other", &endpoint, ported)]).await?;
    let seen = Seen::now(&controller).await?;
    assert_eq!(reason(&seen, "own").as_deref(), Some("connection refused"));
    for _ in 0..2 {
        let listener = TcpListener::bind(own.address())?;
        let seen = until_ready(&controller, "own", true).await?;
        assert_eq!((seen.ready("other"), seen.weights()), (0, vec![100.0, 0.0]));
        drop(listener);
        until_ready(&controller, "own", false).await?;
        let listener = TcpListener::bind(other.address())?;
        let seen = until_ready(&controller, "other", true).await?;
        assert_eq!((seen.ready("own"), seen.weights()), (0, vec![0.0, 100.0]));
        drop(listener);
        until_ready(&controller, "other", false).await?;
    }
    Ok(())
}

/// Controller and Envoy ask the same question, on the endpoint's own port or on another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_probes_ask_for_the_health_of_a_service() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1), ("v3", 1), ("v4", 1)]).await?;
    rig.backends.values().flatten().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Grpc));
    let health = Backend::start("health").await?;
    health.set(|behaviour| (behaviour.mode, behaviour.ready) = (Mode::Grpc, false));
    let mut document =
        rig.document(json!({ "target": "v2", "strategy": { "steps": [{ "weight": 50, "holdSeconds": FOR_EVER }] } }));
    let asked = [json!({}), json!({}), json!({ "service": "shop.Cart" }), json!({ "port": health.port() })];
    for (version, grpc) in asked.into_iter().enumerate() {
        let probe = json!({ "grpc": grpc, "periodMillis": 100, "failureThreshold": 2 });
        document["spec"]["versions"][version]["readinessProbe"] = probe;
    }
    rig.write(&document)?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(1).await?;
    let seen = until_shares(&controller, "v2 at 50 %", &[50.0, 50.0, 0.0, 0.0]).await?;
    assert_eq!((reason(&seen, "v1"), reason(&seen, "v2")), (None, None));
    assert_eq!(reason(&seen, "v3").as_deref(), Some("gRPC status 5 (NotFound)"));
    assert_eq!(reason(&seen, "v4").as_deref(), Some("gRPC health NOT_SERVING"));

    let calls = grpc::Client::connect(rig.address(), HOST).await?;
    for _ in 0..20 {
        calls.unary(&[]).await?;
    }
    let (of_v1, of_v2) = (rig.arrived("v1"), rig.arrived("v2"));
    assert!(of_v1 + of_v2 == 20 && of_v1.abs_diff(of_v2) <= 6, "{of_v1} and {of_v2}");

    rig.set_ready("v2", false);
    health.set_ready(true);
    until_ready(&controller, "v4", true).await?;
    let seen = until_ready(&controller, "v2", false).await?;
    assert_eq!(reason(&seen, "v2").as_deref(), Some("gRPC health NOT_SERVING"));
    for (version, is_healthy) in [("v1", true), ("v2", false), ("v3", false), ("v4", true)] {
        let cluster = format!("shop_{version}::{}::health_flags::", rig.version(version)[0].address());
        eventually(&format!("Envoy to find {version} healthy: {is_healthy}"), DEADLINE, async || {
            let clusters = envoy.admin("/clusters").await?;
            let flags = clusters.lines().find_map(|line| line.strip_prefix(&cluster)).context("no such endpoint")?;
            ensure!((flags == "healthy") == is_healthy, "{flags}");
            Ok(())
        })
        .await?;
    }
    for _ in 0..20 {
        calls.unary(&[]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_probes_count_by_exit_code_and_know_whom_they_probe() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let flag = folder.path().join("ready");
    let every = |command: &[&str]| json!({ "exec": { "command": command }, "periodMillis": 50 });
    let environment =
        "test \"$TIDESHIFT_SERVICE/$TIDESHIFT_VERSION/$TIDESHIFT_ENDPOINT\" = shop/environment/127.0.0.1:2";
    let (_directory, controller) = start(&[
        ("flag", "127.0.0.1:1", every(&["test", "-e", &flag.to_string_lossy()])),
        ("environment", "127.0.0.1:2", every(&["sh", "-c", environment])),
        ("seven", "127.0.0.1:3", every(&["sh", "-c", "exit 7"])),
        ("killed", "127.0.0.1:4", every(&["sh", "-c", "kill -9 $$"])),
        ("absent", "127.0.0.1:5", every(&["/nowhere/to/be/found"])),
        ("endless", "127.0.0.1:6", every(&["sleep", "600"])),
    ])
    .await?;
    let seen = Seen::now(&controller).await?;
    for (version, expected) in [
        ("flag", Some("test ended with exit status: 1")),
        ("environment", None),
        ("seven", Some("sh ended with exit status: 7")),
        ("killed", Some("sh ended with signal: 9 (SIGKILL)")),
        ("absent", Some("/nowhere/to/be/found cannot be run: no such file or directory")),
        ("endless", Some("no result within 1 s")),
    ] {
        assert_eq!(reason(&seen, version).as_deref(), expected, "{version}");
    }
    fs::write(&flag, "")?;
    until_ready(&controller, "flag", true).await?;
    fs::remove_file(&flag)?;
    until_ready(&controller, "flag", false).await?;
    Ok(())
}

/// Each run of the command takes the next line of a file: the results of the probes, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thresholds_want_so_many_results_in_a_row() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let script = |results: &str| -> anyhow::Result<(String, std::path::PathBuf)> {
        let runs = folder.path().join(results);
        let numbered = format!(
            "n=$(wc -c < {0}); printf . >> {0}; case $(printf %s {results} | cut -c$((n + 1))) in y) exit 0;; esac; exit 1",
            runs.display()
        );
        fs::write(&runs, "")?;
        Ok((numbered, runs))
    };
    let ((up, up_runs), (down, down_runs)) = (script("ynynyyynnnnnnnnn")?, script("ynnynnnynnnnnnnn")?);
    let probe = |script: &str, success: u32, failure: u32| {
        json!({ "exec": { "command": ["sh", "-c", script] }, "periodMillis": 150, "timeoutSeconds": 10,
            "successThreshold": success, "failureThreshold": failure })
    };
    let (_directory, controller) =
        start(&[("up", "127.0.0.1:1", probe(&up, 3, 2)), ("down", "127.0.0.1:2", probe(&down, 1, 3))]).await?;
    eventually("sixteen probes of both", DEADLINE, async || {
        let runs = |file| fs::metadata(file).map_or(0, |file| file.len());
        ensure!(runs(&up_runs) > 16 && runs(&down_runs) > 16);
        Ok(())
    })
    .await?;
    // What the log says of each: the first result, and the changes.
    let changes = |version: &str| {
        let log = controller.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of_version = lines.filter(|line| line["message"] == "readiness" && line["version"] == version);
        let mut ready: Vec<_> = of_version.filter_map(|line| line["ready"].as_bool()).collect();
        ready.dedup();
        ready
    };
    assert_eq!(changes("up"), [false, true, false], "ready by three in a row, lost by two");
    assert_eq!(changes("down"), [true, false, true, false], "two failures in a row are borne, three are not");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_initial_delay_is_waited_for_and_no_probe_means_ready() -> anyhow::Result<()> {
    let backend = Backend::start("v1").await?;
    let endpoint = backend.address().to_string();
    let delayed = json!({ "httpGet": { "path": "/health" }, "initialDelaySeconds": 2, "periodMillis": 50 });
    let begun = Instant::now();
    let (_directory, controller) =
        start(&[("unprobed", "127.0.0.1:1", Value::Null), ("delayed", &endpoint, delayed)]).await?;
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(2), "known after {took:?}, before the first probe can have been");
    let seen = Seen::now(&controller).await?;
    assert_eq!((seen.ready("unprobed"), seen.ready("delayed")), (1, 1));
    assert_eq!(seen.weights(), [100.0, 0.0], "without a probe an endpoint is ready when it is listed");
    Ok(())
}
