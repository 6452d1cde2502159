//! gRPC through a real Envoy, with tonic at both ends: what a call's status says decides its outcome, not the HTTP
//! status, which is 200; a stream is in flight until either side ends it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::outcome::Outcome;
use tideshift_tests::backend::Mode;
use tideshift_tests::bootstrap::{Bootstrap, route};
use tideshift_tests::envoy_fixture::{DEADLINE, EnvoyFixture, WANT, picked_service};
use tideshift_tests::grpc::Client;
use tideshift_tests::grpc::Step::{End, Hang, Say};
use tideshift_tests::metrics::Metrics;
use tideshift_tests::ports::Port;
use tideshift_tests::wait::eventually;
use tonic::Code;

const HOST: &str = "shop.example.com";
/// The codes that are errors where a service does not say otherwise: those that speak of the server.
const ERRORS: [i32; 6] = [2, 4, 12, 13, 14, 15];
/// A service that has a view of its own on what is an error.
const OWN_HOST: &str = "own.example.com";
/// The codes of that view.
const OWN_ERRORS: [i32; 2] = [5, 16];
const WORKERS: usize = 3;
/// Shorter than anything that is waited for; only the version that is called so has it.
const TIMEOUT: Duration = Duration::from_millis(400);

fn policy(versions: &[&str]) -> Value {
    let mut own = picked_service("own", OWN_HOST, versions);
    own["errors"] = json!({ "grpcStatusCodes": OWN_ERRORS });
    json!({ "revision": 1, "services": [picked_service("shop", HOST, versions), own] })
}

/// An Envoy with gRPC upstreams.
async fn start(versions: &[&str]) -> anyhow::Result<EnvoyFixture> {
    start_with(versions, versions, |bootstrap| bootstrap, |_| ()).await
}

/// The same with versions that have no upstream of ours.
async fn start_with(
    versions: &[&str],
    upstreams: &[&str],
    build: impl FnOnce(Bootstrap) -> Bootstrap,
    patch: impl FnOnce(&mut Value),
) -> anyhow::Result<EnvoyFixture> {
    let build = |bootstrap: Bootstrap| build(bootstrap.http2(versions));
    let setup = EnvoyFixture::start_with(policy(versions), upstreams, WORKERS, build, patch).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Grpc));
    Ok(setup)
}

/// Waits until so many are counted and none is in flight, and compares every outcome of every version.
async fn counted(
    setup: &EnvoyFixture,
    service: &str,
    expected: &BTreeMap<(String, Outcome), u64>,
) -> anyhow::Result<()> {
    let metrics = setup.settled(service, expected.values().sum()).await?;
    let expected = expected.iter().filter(|(_, times)| **times > 0);
    let expected: BTreeMap<_, _> =
        expected.map(|((version, outcome), times)| ((version.clone(), outcome.label().to_owned()), *times)).collect();
    let mut seen = metrics.requests_by_version(service);
    seen.retain(|_, times| *times > 0);
    assert_eq!(seen, expected, "{service}");
    Ok(())
}

fn in_flight(metrics: &Metrics, version: &str) -> Option<f64> {
    metrics.sum("tideshift_requests_in_flight", &[("service", "shop"), ("version", version)])
}

#[tokio::test]
async fn each_status_counts_by_whose_fault_it_is_and_a_service_may_see_it_otherwise() -> anyhow::Result<()> {
    let names: Vec<String> = (0..=16).map(|code| format!("code-{code}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let setup = start(&names).await?;
    for (service, host, errors) in [("shop", HOST, &ERRORS[..]), ("own", OWN_HOST, &OWN_ERRORS[..])] {
        let outcome = |code: i32| match code {
            0 => Outcome::Ok,
            code if errors.contains(&code) => Outcome::Error,
            _ => Outcome::ClientError,
        };
        let client = Client::connect(setup.address(), host).await?;
        let mut expected = BTreeMap::new();
        for code in 0..=16 {
            let name = format!("code-{code}");
            let client = client.header(WANT, &name)?;
            let is_as_asked = |seen: Result<u32, tonic::Status>, messages: u32| {
                let good = match &seen {
                    Ok(seen) => code == 0 && *seen == messages,
                    Err(status) => code != 0 && status.code() == Code::from_i32(code) && status.message() == "as asked",
                };
                ensure!(good, "{name}: the client saw {seen:?}");
                Ok(())
            };
            // A trailers-only answer (but for 0), trailers and nothing else, and trailers after messages.
            is_as_asked(client.unary(&[End(code)]).await.map(|()| 0), 0)?;
            for messages in [0, 3] {
                let mut call = client.stream(&[Say(messages), End(code)]).await?;
                is_as_asked(call.ended().await, messages)?;
            }
            expected.insert((name, outcome(code)), 3);
        }
        counted(&setup, service, &expected).await?;
    }
    setup.no_trap().await
}

#[tokio::test]
async fn a_stream_is_in_flight_until_it_ends_and_is_counted_then() -> anyhow::Result<()> {
    const STREAMS: u32 = 6;
    let setup = start(&["v1"]).await?;
    let mut calls = Vec::new();
    for _ in 0..STREAMS {
        // A connection each, so that every worker has some.
        let client = Client::connect(setup.address(), HOST).await?.header(WANT, "v1")?;
        let mut call = client.stream(&[Say(1)]).await?;
        call.next().await?.context("the stream has ended")?;
        // Both directions go on.
        call.ask(&[Say(1)]);
        call.next().await?.context("the stream has ended")?;
        calls.push(call);
    }
    let holds = async |open: u32, counts: [u64; 2]| {
        eventually(&format!("{open} open streams"), DEADLINE, async || {
            let metrics = setup.envoy.prometheus().await?;
            let seen = ["ok", "error"].map(|outcome| metrics.requests_total("shop", "v1", outcome));
            ensure!(in_flight(&metrics, "v1") == Some(f64::from(open)) && seen == counts, "{seen:?}");
            Ok(())
        })
        .await
    };
    holds(STREAMS, [0, 0]).await?;
    // Ended well by the client and by the upstream, which does not wait for the client's end; and half-way by an error.
    assert_eq!(calls.remove(0).close().await?, 0);
    holds(STREAMS - 1, [1, 0]).await?;
    calls[0].ask(&[Say(2), End(0)]);
    assert_eq!(calls[0].ended().await?, 2);
    holds(STREAMS - 2, [2, 0]).await?;
    calls[1].ask(&[Say(2), End(13)]);
    assert_eq!(calls[1].ended().await.unwrap_err().code(), Code::Internal);
    holds(STREAMS - 3, [2, 1]).await?;
    for mut call in calls.drain(2..) {
        call.ask(&[End(0)]);
        call.ended().await?;
    }
    let expected = [(("v1".to_owned(), Outcome::Ok), u64::from(STREAMS) - 1), (("v1".to_owned(), Outcome::Error), 1)];
    counted(&setup, "shop", &expected.into()).await?;
    setup.no_trap().await
}

#[tokio::test]
async fn a_client_that_leaves_is_nobodys_fault() -> anyhow::Result<()> {
    const VERSIONS: [&str; 4] = ["unary", "stream", "many", "answered"];
    let setup = start(&VERSIONS).await?;
    let client = Client::connect(setup.address(), HOST).await?;
    let arrived = async |version: &str, calls: u64| {
        eventually(&format!("{calls} calls of {version}"), DEADLINE, async || {
            ensure!(setup.backend(version).counts().requests == calls);
            Ok(())
        })
        .await
    };

    let unary = client.header(WANT, "unary")?;
    let leaving = tokio::spawn(async move { unary.unary(&[Hang]).await });
    arrived("unary", 1).await?;
    leaving.abort();

    let mut call = client.header(WANT, "stream")?.stream(&[Say(2), Hang]).await?;
    call.next().await?.context("the stream has ended")?;
    drop(call);

    // All streams of a connection that goes away.
    let many = Client::connect(setup.address(), HOST).await?.header(WANT, "many")?;
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(many.stream(&[Say(1)]).await?);
    }
    drop((many, calls));

    // The connection of the first is still good, and a call that is answered whole is not cancelled by who leaves then.
    client.header(WANT, "answered")?.unary(&[]).await?;
    drop(client);

    let expected = [("unary", 1), ("stream", 1), ("many", 5)].map(|(v, n)| ((v.to_owned(), Outcome::Cancelled), n));
    let answered = (("answered".to_owned(), Outcome::Ok), 1);
    counted(&setup, "shop", &expected.into_iter().chain([answered]).collect()).await?;
    setup.no_trap().await
}

#[tokio::test]
async fn what_the_proxy_or_the_network_ends_is_the_versions_error() -> anyhow::Result<()> {
    const UPSTREAMS: [&str; 6] =
        ["late", "late-in-stream", "deadline", "killed", "killed-in-stream", "reset-in-stream"];
    const VERSIONS: [&str; 8] = [
        "late",
        "late-in-stream",
        "deadline",
        "killed",
        "killed-in-stream",
        "reset-in-stream",
        "refuses",
        "no-endpoint",
    ];
    let nobody = Port::reserve()?;
    let build = |b: Bootstrap| b.version("refuses", &[nobody.address()]).version("no-endpoint", &[]);
    let patch = |bootstrap: &mut Value| {
        for version in UPSTREAMS {
            let timeout = if version.starts_with("late") { TIMEOUT } else { Duration::ZERO };
            route(bootstrap, version)["route"]["timeout"] = json!(format!("{}s", timeout.as_secs_f64()));
        }
        // What the client's own deadline says, whatever it is.
        route(bootstrap, "deadline")["route"]["max_stream_duration"] = json!({ "grpc_timeout_header_max": "0s" });
    };
    let setup = start_with(&VERSIONS, &UPSTREAMS, build, patch).await?;
    let client = Client::connect(setup.address(), HOST).await?;
    let to = |version: &str| client.header(WANT, version);
    let error = |version: &str| ((version.to_owned(), Outcome::Error), 1);

    // Envoy answers in the upstream's stead: HTTP 200, and a status in the headers. Whatever codes a service calls an
    // error, Envoy's own are no answers of the version.
    let own = Client::connect(setup.address(), OWN_HOST).await?;
    for version in ["late", "refuses", "no-endpoint"] {
        for client in [&client, &own] {
            let status = client.header(WANT, version)?.unary(&[Hang]).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable, "{version}: {status:?}");
        }
    }
    counted(&setup, "own", &["late", "refuses", "no-endpoint"].map(error).into()).await?;
    let within = to("deadline")?.header("grpc-timeout", "200m")?;
    within.unary(&[Hang]).await.unwrap_err();
    // In the middle of a stream there is nothing left but to reset it. Envoy's time begins when the client has asked.
    let mut call = to("late-in-stream")?.stream(&[Say(2), Hang]).await?;
    call.next().await?.context("the stream has ended")?;
    call.close().await.unwrap_err();

    // The upstream dies: before its answer, and in the middle of one, by a close and by a reset.
    let killed = to("killed")?;
    let waiting = tokio::spawn(async move { killed.unary(&[Hang]).await });
    eventually("the call to arrive", DEADLINE, async || {
        ensure!(setup.backend("killed").counts().requests == 1);
        Ok(())
    })
    .await?;
    setup.backend("killed").stop().await;
    assert_eq!(waiting.await?.unwrap_err().code(), Code::Unavailable);
    for version in ["killed-in-stream", "reset-in-stream"] {
        let mut call = to(version)?.stream(&[Say(2), Hang]).await?;
        call.next().await?.context("the stream has ended")?;
        match version {
            "killed-in-stream" => setup.backend(version).stop().await,
            _ => setup.backend(version).reset().await,
        }
        call.ended().await.unwrap_err();
    }

    counted(&setup, "shop", &VERSIONS.map(error).into()).await?;
    setup.no_trap().await
}

/// A call whose answer ends without a status, as one does that something in between cut off.
#[tokio::test]
async fn an_answer_without_a_status_is_an_error() -> anyhow::Result<()> {
    const VERSIONS: [&str; 3] = ["nothing", "a-body", "a-status"];
    const TIMES: u64 = 5;
    let build = |bootstrap: Bootstrap| bootstrap.http2(&VERSIONS);
    let setup = EnvoyFixture::start_with(policy(&VERSIONS), &VERSIONS, WORKERS, build, |_| ()).await?;
    let is_grpc = || ("content-type".to_owned(), "application/grpc".to_owned());
    setup.backends().for_each(|backend| backend.set(|b| b.headers = vec![is_grpc()]));
    setup.backend("nothing").set(|b| b.status = 204);
    setup.backend("a-status").set(|b| b.trailers = vec![("grpc-status".to_owned(), "0".to_owned())]);
    for version in VERSIONS {
        for _ in 0..TIMES {
            let request = setup.request("POST", HOST, "/shop.Cart/Add").header(WANT, version);
            request.header("content-type", "application/grpc").body("").send().await?;
        }
    }
    let expected = [("nothing", Outcome::Error), ("a-body", Outcome::Error), ("a-status", Outcome::Ok)];
    let expected = expected.map(|(version, outcome)| ((version.to_owned(), outcome), TIMES));
    counted(&setup, "shop", &expected.into()).await?;
    setup.no_trap().await
}

/// Ordinary HTTP whose answer happens to have a `grpc-status`, as gateways and debug middleware leave it there.
#[tokio::test]
async fn only_grpc_is_judged_by_a_grpc_status() -> anyhow::Result<()> {
    const VERSIONS: [&str; 4] = ["in-headers", "in-trailers", "broken", "grpc"];
    let build = |bootstrap: Bootstrap| bootstrap.http2(&["in-trailers", "grpc"]);
    let setup = EnvoyFixture::start_with(policy(&VERSIONS), &VERSIONS, WORKERS, build, |_| ()).await?;
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let unavailable = || vec![header("grpc-status", "14")];
    setup.backend("in-headers").set(|b| b.headers = unavailable());
    setup.backend("in-trailers").set(|b| b.trailers = unavailable());
    setup.backend("grpc").set(|b| b.trailers = unavailable());
    setup.backend("broken").set(|b| (b.status, b.headers) = (500, vec![header("grpc-status", "0")]));
    for version in VERSIONS {
        let kind = if version == "grpc" { "application/grpc+json" } else { "application/json" };
        setup.backend(version).set(|b| b.headers.push(header("content-type", kind)));
        let request = setup.request("POST", HOST, "/shop.Cart/Add").header(WANT, version);
        let response = request.header("content-type", kind).body("{}").send().await?;
        assert_eq!(response.status, if version == "broken" { 500 } else { 200 }, "{version}");
    }
    let expected = [
        ("in-headers", Outcome::Ok),
        ("in-trailers", Outcome::Ok),
        ("broken", Outcome::Error),
        ("grpc", Outcome::Error),
    ];
    counted(&setup, "shop", &expected.map(|(version, outcome)| ((version.to_owned(), outcome), 1)).into()).await?;
    setup.no_trap().await
}
