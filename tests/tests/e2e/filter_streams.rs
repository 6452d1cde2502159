//! Exchanges that last, in a real Envoy: WebSockets, server-sent events, clients that leave whenever they like. Each
//! is in flight until it ends and counted once then.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::outcome::Outcome;
use tideshift_tests::backend::{Errors, Mode};
use tideshift_tests::bootstrap::{Bootstrap, manager};
use tideshift_tests::client::Connection;
use tideshift_tests::envoy_fixture::{DEADLINE, EnvoyFixture, WANT, picked_service};
use tideshift_tests::wait::eventually;
use tideshift_tests::{grpc, websocket};
use tokio::task::JoinSet;
use tokio::time::sleep;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 3;
/// Between two server-sent events.
const PAUSE: Duration = Duration::from_millis(20);

/// An Envoy that lets WebSockets through and has no time-outs.
async fn start(versions: &[&str]) -> anyhow::Result<EnvoyFixture> {
    start_with(versions, |bootstrap| bootstrap, |_| ()).await
}

async fn start_with(
    versions: &[&str],
    build: impl FnOnce(Bootstrap) -> Bootstrap,
    patch: impl FnOnce(&mut Value),
) -> anyhow::Result<EnvoyFixture> {
    let build = |bootstrap: Bootstrap| build(bootstrap.timeout(Duration::ZERO));
    let patch = |bootstrap: &mut Value| {
        let manager = manager(bootstrap);
        manager["upgrade_configs"] = json!([{ "upgrade_type": "websocket" }]);
        patch(manager);
    };
    let policy = json!({ "revision": 1, "services": [picked_service("shop", HOST, versions)] });
    EnvoyFixture::start_with(policy, versions, WORKERS, build, patch).await
}

async fn socket(setup: &EnvoyFixture, version: &str) -> anyhow::Result<websocket::Client> {
    let mut socket = websocket::Client::connect(setup.address(), HOST, &[(WANT, version)]).await?;
    socket.echo("hello").await?;
    Ok(socket)
}

/// Waits until a version has so many exchanges in flight.
async fn in_flight(setup: &EnvoyFixture, version: &str, expected: f64) -> anyhow::Result<()> {
    eventually(&format!("{expected} of {version} in flight"), DEADLINE, async || {
        let labels = [("service", "shop"), ("version", version)];
        let seen = setup.envoy.prometheus().await?.sum("tideshift_requests_in_flight", &labels);
        ensure!(seen == Some(expected), "{seen:?}");
        Ok(())
    })
    .await
}

/// Waits until all exchanges of these versions are counted, each as often as is said and all with one outcome.
async fn counted(setup: &EnvoyFixture, expected: &[(&str, Outcome, u64)]) -> anyhow::Result<()> {
    let metrics = setup.settled("shop", expected.iter().map(|(_, _, times)| times).sum()).await?;
    let mut seen = metrics.requests_by_version("shop");
    seen.retain(|_, times| *times > 0);
    let expected =
        expected.iter().map(|(version, outcome, times)| ((String::from(*version), outcome.label().to_owned()), *times));
    assert_eq!(seen, expected.collect());
    Ok(())
}

#[tokio::test]
async fn a_websocket_is_in_flight_until_it_ends_and_fine_whoever_closes_it() -> anyhow::Result<()> {
    const VERSIONS: [&str; 3] = ["closed-by-client", "closed-by-server", "page-left"];
    const TIMES: u64 = 2 * WORKERS as u64;
    let setup = start(&VERSIONS).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::WebSocket));
    for version in VERSIONS {
        let mut sockets = Vec::new();
        for _ in 0..TIMES {
            sockets.push(socket(&setup, version).await?);
        }
        in_flight(&setup, version, TIMES as f64).await?;
        let counted: u64 = setup
            .envoy
            .prometheus()
            .await?
            .sum("tideshift_requests_total", &[("version", version)])
            .unwrap_or_default() as u64;
        assert_eq!(counted, 0, "{version} is counted before it ends");
        for mut socket in sockets {
            socket.echo("still there").await?;
            match version {
                "closed-by-client" => socket.close().await?,
                "closed-by-server" => socket.be_closed().await?,
                _ => socket.close_and_leave().await?,
            }
        }
        in_flight(&setup, version, 0.0).await?;
    }
    counted(&setup, &VERSIONS.map(|version| (version, Outcome::Ok, TIMES))).await?;
    setup.no_trap().await
}

#[tokio::test]
async fn a_websocket_that_the_upstream_drops_is_its_error_and_one_that_the_client_drops_is_not() -> anyhow::Result<()> {
    const VERSIONS: [&str; 3] = ["killed", "reset", "dropped-by-client"];
    let setup = start(&VERSIONS).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::WebSocket));
    for version in ["killed", "reset"] {
        let mut socket = socket(&setup, version).await?;
        match version {
            "killed" => setup.backend(version).stop().await,
            _ => setup.backend(version).reset().await,
        }
        assert!(socket.ended().await.is_err(), "{version}: closed in good order");
    }
    drop(socket(&setup, "dropped-by-client").await?);
    socket(&setup, "dropped-by-client").await?.reset()?;

    let metrics = setup.settled("shop", 4).await?;
    let of = |version: &str, outcome: Outcome| metrics.requests_total("shop", version, outcome.label());
    assert_eq!(of("dropped-by-client", Outcome::Error), 0, "blamed for its client");
    for version in ["killed", "reset"] {
        assert_eq!(of(version, Outcome::Error), 1, "{version}: {:?}", metrics.requests_by_version("shop"));
    }
    setup.no_trap().await
}

#[tokio::test]
async fn a_handshake_that_fails_counts_like_any_request() -> anyhow::Result<()> {
    const VERSIONS: [&str; 5] = ["forbids", "broken", "resets", "hangs", "plain"];
    let setup = start(&VERSIONS).await?;
    setup.backend("forbids").set(|behaviour| behaviour.status = 403);
    setup.backend("broken").set(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 });
    setup.backend("resets").set(|behaviour| behaviour.mode = Mode::Reset);
    setup.backend("hangs").set(|behaviour| behaviour.mode = Mode::Hang);
    for version in ["forbids", "broken", "resets", "plain"] {
        // `plain` answers 200, which is no error of the version, but no WebSocket either.
        let refused = websocket::Client::connect(setup.address(), HOST, &[(WANT, version)]).await;
        assert!(refused.is_err(), "{version}: {refused:?}");
    }
    let address = setup.address();
    let hanging =
        tokio::spawn(async move { websocket::Client::connect(address, HOST, &[(WANT, "hangs")]).await.map(drop) });
    eventually("the handshake to arrive", DEADLINE, async || {
        ensure!(setup.backend("hangs").counts().requests == 1);
        Ok(())
    })
    .await?;
    hanging.abort();
    let expected = [
        ("forbids", Outcome::ClientError, 1),
        ("broken", Outcome::Error, 1),
        ("resets", Outcome::Error, 1),
        ("plain", Outcome::Ok, 1),
        ("hangs", Outcome::Cancelled, 1),
    ];
    counted(&setup, &expected).await?;
    setup.no_trap().await
}

#[tokio::test]
async fn events_are_in_flight_while_they_come() -> anyhow::Result<()> {
    const VERSIONS: [&str; 3] = ["ends", "goes-on", "dies"];
    let setup = start(&VERSIONS).await?;
    setup.backend("ends").set(|behaviour| behaviour.mode = Mode::Events(PAUSE, 5));
    for version in ["goes-on", "dies"] {
        setup.backend(version).set(|behaviour| behaviour.mode = Mode::Events(PAUSE, u32::MAX));
    }
    let mut listening = Vec::new();
    for version in ["goes-on", "goes-on", "dies"] {
        let mut connection = setup.get(HOST, "/").header(WANT, version).begin().await?;
        // An event, not only the head: the answer's head can be there before the filter has seen anything of its body.
        connection.read_until(b"data: tick\n\n").await?;
        listening.push((version, connection));
    }
    let whole = setup.get(HOST, "/").header(WANT, "ends").send().await?;
    assert_eq!((whole.status, whole.text()), (200, "data: tick\n\n".repeat(5)));
    in_flight(&setup, "goes-on", 2.0).await?;
    in_flight(&setup, "dies", 1.0).await?;
    counted_so_far(&setup, 1).await?;
    setup.backend("dies").stop().await;
    in_flight(&setup, "dies", 0.0).await?;
    drop(listening);
    let expected = [("ends", Outcome::Ok, 1), ("goes-on", Outcome::Cancelled, 2), ("dies", Outcome::Error, 1)];
    counted(&setup, &expected).await?;
    setup.no_trap().await
}

async fn counted_so_far(setup: &EnvoyFixture, expected: u64) -> anyhow::Result<()> {
    eventually(&format!("{expected} counted"), DEADLINE, async || {
        let seen: u64 = setup.envoy.prometheus().await?.requests_by_version("shop").values().sum();
        ensure!(seen == expected, "{seen}");
        Ok(())
    })
    .await
}

/// Envoy ends idle streams: this counts against the version only if it has not answered.
#[tokio::test]
async fn silence_is_the_versions_fault_only_before_its_answer() -> anyhow::Result<()> {
    const VERSIONS: [&str; 2] = ["silent-socket", "hangs"];
    let idle = |manager: &mut Value| manager["stream_idle_timeout"] = json!("0.3s");
    let setup = start_with(&VERSIONS, |bootstrap| bootstrap, idle).await?;
    setup.backend("silent-socket").set(|behaviour| behaviour.mode = Mode::WebSocket);
    setup.backend("hangs").set(|behaviour| behaviour.mode = Mode::Hang);
    let mut socket = socket(&setup, "silent-socket").await?;
    let hanging = setup.get(HOST, "/").header(WANT, "hangs").send().await?;
    assert_eq!(hanging.status, 504);
    assert!(socket.ended().await.is_err(), "Envoy knows no closing frames");
    counted(&setup, &[("silent-socket", Outcome::Ok, 1), ("hangs", Outcome::Error, 1)]).await?;
    setup.no_trap().await
}

const STORM: [&str; 6] = ["fine", "hangs", "events", "socket", "grpc", "dies"];

/// Many clients at once, each of which leaves at some moment, in some way; every version but the last does its part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_clients_that_leave_is_counted_exactly_and_blames_nobody() -> anyhow::Result<()> {
    const CLIENTS: u64 = 16;
    const EACH: u64 = 60;
    let setup = Arc::new(start_with(&STORM, |bootstrap| bootstrap.http2(&["grpc"]), |_| ()).await?);
    let modes = [
        Mode::Answer,
        Mode::Hang,
        Mode::Events(Duration::from_millis(2), 8),
        Mode::WebSocket,
        Mode::Grpc,
        Mode::ResetInBody,
    ];
    for (version, mode) in STORM.into_iter().zip(modes) {
        setup.backend(version).set(|behaviour| behaviour.mode = mode);
    }
    let mut clients = JoinSet::new();
    for seed in 0..CLIENTS {
        let setup = Arc::clone(&setup);
        clients.spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..EACH {
                let version = STORM[random.usize(..STORM.len())];
                leave(&setup, version, &mut random).await.with_context(|| version.to_owned())?;
            }
            anyhow::Ok(())
        });
    }
    // A gauge below 0 shows as a number near 2^64.
    let (mut looks, mut most) = (0, 0);
    let storm = async {
        while let Some(client) = clients.join_next().await {
            client??;
        }
        anyhow::Ok(())
    };
    let watch = async {
        loop {
            let metrics = setup.envoy.prometheus().await?;
            for (series, in_flight) in metrics.select("tideshift_requests_in_flight", &[]) {
                ensure!((0.0..=(CLIENTS * EACH) as f64).contains(&in_flight), "{in_flight} in {series}");
                most = most.max(in_flight as u64);
            }
            looks += 1;
        }
    };
    tokio::select! {
        ended = storm => ended?,
        watched = watch => watched.map(|never: std::convert::Infallible| match never {})?,
    }

    // What Envoy has seen of each client is counted once. A client that left before Envoy read its request sent none.
    let requests = eventually("nothing in flight", DEADLINE, async || {
        let metrics = setup.envoy.prometheus().await?;
        let in_flight = metrics.sum("tideshift_requests_in_flight", &[]);
        let counted: u64 = metrics.requests_by_version("shop").values().sum();
        let requests = setup.envoy.stat("http.tests.downstream_rq_total").await?;
        ensure!(in_flight == Some(0.0) && counted == requests, "{in_flight:?}, {counted} of {requests} counted");
        Ok(requests)
    })
    .await?;
    let metrics = setup.settled("shop", requests).await?;
    for version in STORM.into_iter().filter(|version| *version != "dies") {
        assert_eq!(metrics.requests_total("shop", version, "error"), 0, "{version} is blamed");
    }
    assert_eq!(metrics.requests_total("shop", "hangs", "ok"), 0);
    let sum =
        |outcome: Outcome| metrics.sum("tideshift_requests_total", &[("outcome", outcome.label())]).unwrap_or_default();
    assert!(sum(Outcome::Ok) > 0.0 && sum(Outcome::Cancelled) > 0.0 && sum(Outcome::Error) > 0.0);
    println!(
        "{requests} of {} requests arrived: {}; {looks} looks, at most {most} in flight in one version",
        CLIENTS * EACH,
        Outcome::ALL.map(|outcome| format!("{} {}", sum(outcome), outcome.label())).join(", "),
    );
    setup.no_trap().await
}

/// One exchange with a version that the client ends within 60 ms, if it has not ended by then.
async fn leave(setup: &EnvoyFixture, version: &str, random: &mut fastrand::Rng) -> anyhow::Result<()> {
    let moment = sleep(Duration::from_micros(random.u64(..60_000)));
    let with_reset = random.bool();
    match version {
        "socket" => {
            // Before the handshake's end or after it.
            let chat = async {
                let mut socket = socket(setup, version).await?;
                loop {
                    socket.echo("and").await?;
                }
            };
            tokio::select! {
                () = moment => Ok(()),
                ended = chat => ended,
            }
        }
        "grpc" => {
            let call = async {
                let client = grpc::Client::connect(setup.address(), HOST).await?.header(WANT, version)?;
                let mut call = client.stream(&[grpc::Step::Say(3)]).await?;
                loop {
                    call.next().await?.context("it has ended")?;
                    call.ask(&[grpc::Step::Say(1)]);
                }
            };
            tokio::select! {
                () = moment => Ok(()),
                ended = call => ended,
            }
        }
        _ => {
            let mut connection: Connection = setup.get(HOST, "/").header(WANT, version).begin().await?;
            tokio::select! {
                () = moment => {}
                // The version that dies breaks its answers off.
                answer = connection.read(true) => ensure!(answer.is_ok() || version == "dies", "{answer:?}"),
            }
            if with_reset { connection.reset() } else { Ok(()) }
        }
    }
}
