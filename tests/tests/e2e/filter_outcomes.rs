//! How exchanges end in a real Envoy, and that each is counted once, for the right version: in Prometheus, and the
//! same in the reports to the controller.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tideshift_core::outcome::Outcome;
use tideshift_core::protocol::report::Report;
use tideshift_tests::backend::{Behaviour, Errors, Mode};
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER};
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture};
use tideshift_tests::policy_server::PolicyServer;
use tideshift_tests::ports::Port;
use tideshift_tests::wait::eventually;
use tokio::net::TcpStream;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 3;
/// Each ending so many times.
const TIMES: u64 = 4;
/// The time-out of the version that hangs; the others have Envoy's own, which a busy machine does not reach.
const TIMEOUT: Duration = Duration::from_millis(500);

/// Versions with a backend; each ends its exchanges in its own way.
const BACKENDS: [&str; 17] = [
    "ok",
    "not-found",
    "broken",
    "reset",
    "reset-in-body",
    "hangs",
    "left",
    "left-in-body",
    "grpc-ok",
    "grpc-unavailable",
    "grpc-trailers",
    "grpc-trailers-fine",
    "grpc-not-found",
    "retried",
    "retried-in-vain",
    "teapot",
    "redirect",
];
/// Versions that no backend stands behind.
const OTHERS: [&str; 4] = ["refuses", "no-cluster", "no-route", "unknown"];

/// A client picks the version by a header, so that each ending is provoked for sure.
fn policy() -> Value {
    let names = || BACKENDS.into_iter().chain(OTHERS);
    let rule = |name| json!({ "matches": [{ "headers": [{ "name": "x-want", "value": name }] }], "versions": [{ "name": name }] });
    json!({
        "controller": { "cluster": CONTROLLER_CLUSTER },
        "revision": 7,
        "services": [{
            "name": "shop",
            "hostnames": [HOST],
            "versions": names().map(|name| json!({ "name": name, "weight": 1 })).collect::<Vec<_>>(),
            "rules": names().map(rule).collect::<Vec<_>>(),
        }],
    })
}

/// Retries for the versions that are called so, a short time-out for the one that hangs and none for those that are
/// left, HTTP/2 to those with trailers, and routes that lead nowhere.
fn patch(bootstrap: &mut Value) {
    let resources = &mut bootstrap["static_resources"];
    for cluster in resources["clusters"].as_array_mut().into_iter().flatten() {
        if cluster["name"].as_str().is_some_and(|name| name.starts_with("grpc-trailers")) {
            cluster["typed_extension_protocol_options"] = json!({
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": { "http2_protocol_options": {} },
                },
            });
        }
    }
    let routes = &mut resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"];
    routes["validate_clusters"] = json!(false);
    for route in routes["virtual_hosts"][0]["routes"].as_array_mut().into_iter().flatten() {
        match route["route"]["cluster"].as_str() {
            Some("retried" | "retried-in-vain") => {
                route["route"]["retry_policy"] = json!({ "retry_on": "5xx,reset", "num_retries": 3 });
            }
            Some("hangs") => route["route"]["timeout"] = json!(format!("{}s", TIMEOUT.as_secs_f64())),
            Some("left" | "left-in-body") => route["route"]["timeout"] = json!("0s"),
            Some("no-cluster") => route["route"]["cluster"] = json!("there-is-no-such-cluster"),
            Some("no-route") => route["match"]["prefix"] = json!("/nobody/asks/for/this"),
            _ => {}
        }
    }
    // The default route would take in what has no route of its own.
    if let Some(routes) = routes["virtual_hosts"][0]["routes"].as_array_mut() {
        routes.pop();
    }
}

async fn start() -> anyhow::Result<(EnvoyFixture, PolicyServer, Port)> {
    let server = PolicyServer::start().await?;
    let nobody = Port::reserve()?;
    let build = |bootstrap: Bootstrap| {
        let bootstrap = bootstrap.controller(server.address());
        bootstrap.version("refuses", &[nobody.address()]).version("no-cluster", &[]).version("no-route", &[])
    };
    let setup = EnvoyFixture::start_with(policy(), &BACKENDS, WORKERS, build, patch).await?;
    let set = |name: &str, change: &dyn Fn(&mut Behaviour)| setup.backend(name).set(change);
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let is_grpc = || pair("content-type", "application/grpc");
    let grpc = |status: &str| vec![is_grpc(), pair("grpc-status", status)];
    set("not-found", &|b| b.status = 404);
    set("teapot", &|b| b.status = 418);
    set("redirect", &|b| b.status = 302);
    set("broken", &|b| b.status = 500);
    set("reset", &|b| b.mode = Mode::Reset);
    set("reset-in-body", &|b| b.mode = Mode::ResetInBody);
    set("hangs", &|b| b.mode = Mode::Hang);
    set("left", &|b| b.mode = Mode::Hang);
    set("left-in-body", &|b| b.mode = Mode::SlowBody(Duration::from_millis(700)));
    set("grpc-ok", &|b| b.headers = grpc("0"));
    set("grpc-unavailable", &|b| b.headers = grpc("14"));
    set("grpc-not-found", &|b| b.headers = grpc("5"));
    set("grpc-trailers", &|b| (b.headers, b.trailers) = (vec![is_grpc()], vec![pair("grpc-status", "14")]));
    set("grpc-trailers-fine", &|b| (b.headers, b.trailers) = (vec![is_grpc()], vec![pair("grpc-status", "0")]));
    set("retried", &|b| b.errors = Errors { bad: 1, of: 2 });
    set("retried-in-vain", &|b| b.errors = Errors { bad: 1, of: 1 });
    Ok((setup, server, nobody))
}

/// The outcome of each version's exchanges (none for those that are misrouted), and what the client sees of them: a status, or none if the answer breaks
/// off.
const EXPECTED: [(&str, Option<Outcome>, Option<u16>); 19] = [
    ("ok", Some(Outcome::Ok), Some(200)),
    ("redirect", Some(Outcome::Ok), Some(302)),
    ("not-found", Some(Outcome::ClientError), Some(404)),
    ("teapot", Some(Outcome::ClientError), Some(418)),
    ("broken", Some(Outcome::Error), Some(500)),
    ("reset", Some(Outcome::Error), Some(503)),
    ("reset-in-body", Some(Outcome::Error), None),
    ("hangs", Some(Outcome::Error), Some(504)),
    ("grpc-ok", Some(Outcome::Ok), Some(200)),
    ("grpc-unavailable", Some(Outcome::Error), Some(200)),
    ("grpc-not-found", Some(Outcome::ClientError), Some(200)),
    ("grpc-trailers", Some(Outcome::Error), Some(200)),
    ("grpc-trailers-fine", Some(Outcome::Ok), Some(200)),
    ("retried", Some(Outcome::Ok), Some(200)),
    ("retried-in-vain", Some(Outcome::Error), Some(500)),
    ("refuses", Some(Outcome::Error), Some(503)),
    ("no-cluster", Some(Outcome::Error), Some(503)),
    ("no-route", None, Some(404)),
    ("unknown", None, Some(404)),
];

/// Those where the client goes away.
const LEFT: [&str; 2] = ["left", "left-in-body"];

#[tokio::test]
async fn each_ending_is_counted_once_for_the_version_it_speaks_of() -> anyhow::Result<()> {
    let (setup, server, _nobody) = start().await?;
    let setup = Arc::new(setup);

    // Each worker sees at its first request that this service speaks gRPC; later it might be a moment late.
    let grpc = setup.get(HOST, "/").header("x-want", "grpc-ok").header("content-type", "application/grpc");
    EachWorker::open(&setup, grpc.clone()).await?.send(&grpc).await?;
    let times = |version: &str| if version == "grpc-ok" { TIMES + WORKERS as u64 } else { TIMES };

    let mut clients = tokio::task::JoinSet::new();
    for (version, _, status) in EXPECTED {
        // One after the other, for those that count; the time-outs at once, for those who wait.
        let (clients_of_it, times) = if version == "hangs" { (TIMES, 1) } else { (1, TIMES) };
        for _ in 0..clients_of_it {
            let setup = Arc::clone(&setup);
            clients.spawn(async move {
                for _ in 0..times {
                    let kind = if version.starts_with("grpc") { "application/grpc" } else { "text/plain" };
                    let request = setup.get(HOST, "/").header("x-want", version).header("content-type", kind);
                    let response = request.send().await;
                    let seen = response.as_ref().ok().map(|response| response.status);
                    ensure!(seen == status, "{version}: the client saw {response:?}");
                }
                Ok(())
            });
        }
    }
    for version in LEFT {
        for n in 1..=TIMES {
            let mut connection = setup.get(HOST, "/").header("x-want", version).begin().await?;
            eventually("the request to arrive", DEADLINE, async || {
                ensure!(setup.backend(version).counts().requests == n);
                Ok(())
            })
            .await?;
            if version == "left-in-body" {
                connection.read_some().await.context("the answer's head")?;
            }
            // Half of them leave with a reset, half with a close.
            if n % 2 == 0 {
                connection.reset()?;
            }
        }
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }

    let expected: BTreeMap<&str, Option<Outcome>> = EXPECTED
        .iter()
        .map(|(version, outcome, _)| (*version, *outcome))
        .chain(LEFT.map(|version| (version, Some(Outcome::Cancelled))))
        .collect();
    let of_outcome = |other: Outcome, version: &str| if expected[version] == Some(other) { times(version) } else { 0 };
    let misrouted = |version: &str| if expected[version].is_none() { TIMES } else { 0 };
    let total = TIMES * expected.values().flatten().count() as u64 + WORKERS as u64;
    let metrics = setup.settled("shop", total).await?;
    for version in expected.keys() {
        for outcome in Outcome::ALL {
            let counted = metrics.requests_total("shop", version, outcome.label());
            assert_eq!(counted, of_outcome(outcome, version), "{version}: {}", outcome.label());
        }
        assert_eq!(metrics.misrouted_total("shop", version), misrouted(version), "{version}");
    }
    assert_eq!(setup.backend("retried").counts().requests, 2 * TIMES - 1, "all but the first were retried");
    assert_eq!(setup.backend("retried-in-vain").counts().requests, 4 * TIMES);

    // As many durations as exchanges that the client did not end; Envoy merges the workers' histograms as it flushes.
    eventually("the histograms", DEADLINE, async || {
        let metrics = setup.envoy.prometheus().await?;
        for version in expected.keys() {
            let labels = [("service", "shop"), ("version", *version)];
            let observed = metrics.sum("tideshift_request_duration_milliseconds_count", &labels).unwrap_or_default();
            let wanted = if LEFT.contains(version) { 0 } else { times(version) - misrouted(version) };
            ensure!(observed as u64 == wanted, "{version}: {observed}");
        }
        let slow = metrics.sum("tideshift_request_duration_milliseconds_sum", &[("version", "hangs")]);
        let wanted = TIMEOUT.as_millis() as f64 * TIMES as f64;
        // Wide: this is about the unit. Envoy's histograms are exact to 5 %.
        ensure!(slow.is_some_and(|sum| sum >= 0.9 * wanted && sum < 100.0 * wanted), "milliseconds, not {slow:?}");
        Ok(())
    })
    .await?;

    // The controller is told the same.
    let report = eventually("a report of all that", DEADLINE, async || {
        let report = server.last_report()?;
        let total_told: u64 = report.services.iter().flat_map(|s| &s.versions).map(|v| v.ended.total()).sum();
        ensure!(total_told == total, "{report:?}");
        Ok(report)
    })
    .await?;
    let Report { revision, workers, services, .. } = &report;
    assert_eq!((*revision, *workers as usize, services.len()), (7, WORKERS + 1, 1));
    for version in &services[0].versions {
        let name = version.name.as_str();
        for outcome in Outcome::ALL {
            assert_eq!(version.ended.of(outcome), of_outcome(outcome, name), "{name}: {}", outcome.label());
        }
        assert_eq!((version.in_flight, version.misrouted), (0, misrouted(name)), "{name}");
    }
    assert_eq!(services[0].versions.len(), BACKENDS.len() + OTHERS.len());
    assert_eq!(server.strange(), [""; 0]);
    setup.no_trap().await
}

#[tokio::test]
async fn http_2_clients_get_trailers_that_are_counted_and_may_leave() -> anyhow::Result<()> {
    let (setup, _server, _nobody) = start().await?;
    let stream = TcpStream::connect(setup.address()).await?;
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = |version: &str| {
        let request = hyper::Request::post(format!("http://{HOST}/shop.Cart/Add")).header("x-want", version);
        request
            .header("x-tideshift-version", "ok")
            .header("content-type", "application/grpc")
            .body(Empty::<Bytes>::new())
    };
    for (version, status) in [("grpc-trailers", "14"), ("grpc-trailers-fine", "0")] {
        client.ready().await?;
        let response = client.send_request(request(version)?).await?;
        assert_eq!(response.status(), 200);
        let trailers = response.into_body().collect().await?.trailers().cloned().unwrap_or_default();
        assert_eq!(trailers.get("grpc-status").map(|status| status.as_bytes()), Some(status.as_bytes()));
    }
    // A time-out and a reset, which Envoy tells gRPC clients by a status in the headers.
    for version in ["hangs", "reset", "refuses"] {
        client.ready().await?;
        let response = client.send_request(request(version)?).await?;
        assert_eq!(response.status(), 200, "{version}");
        assert!(response.headers().contains_key("grpc-status"), "{version}");
    }
    // A stream that is reset (hyper does so when the future is dropped) while its connection lives on.
    client.ready().await?;
    let leaving = tokio::spawn(client.send_request(request("left")?));
    eventually("the request to arrive", DEADLINE, async || {
        ensure!(setup.backend("left").counts().requests == 1);
        Ok(())
    })
    .await?;
    leaving.abort();

    let metrics = setup.settled("shop", 6).await?;
    let expected = [
        ("grpc-trailers", "error"),
        ("grpc-trailers-fine", "ok"),
        ("hangs", "error"),
        ("reset", "error"),
        ("refuses", "error"),
        ("left", "cancelled"),
    ];
    for (version, outcome) in expected {
        assert_eq!(metrics.requests_total("shop", version, outcome), 1, "{version}");
    }
    setup.no_trap().await
}

#[tokio::test]
async fn in_flight_rises_and_falls() -> anyhow::Result<()> {
    let (setup, _server, _nobody) = start().await?;
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(setup.get(HOST, "/").header("x-want", "left").begin().await?);
    }
    let in_flight = async |expected: f64| {
        eventually(&format!("{expected} requests in flight"), DEADLINE, async || {
            let labels = [("service", "shop"), ("version", "left")];
            let seen = setup.envoy.prometheus().await?.sum("tideshift_requests_in_flight", &labels);
            ensure!(seen == Some(expected), "{seen:?}");
            Ok(())
        })
        .await
    };
    in_flight(6.0).await?;
    held.truncate(2);
    in_flight(2.0).await?;
    held.clear();
    in_flight(0.0).await?;
    let metrics = setup.settled("shop", 6).await?;
    assert_eq!(metrics.requests_total("shop", "left", "cancelled"), 6);
    setup.no_trap().await
}

#[tokio::test]
async fn the_exposition_is_what_prometheus_expects() -> anyhow::Result<()> {
    let (setup, _server, _nobody) = start().await?;
    setup.get(HOST, "/").header("x-want", "ok").send().await?;
    setup.settled("shop", 1).await?;
    let text = eventually("the histogram", DEADLINE, async || {
        let text = setup.envoy.admin("/stats/prometheus").await?;
        ensure!(text.contains("tideshift_request_duration_milliseconds_bucket{"));
        Ok(text)
    })
    .await?;
    let kinds = [
        ("tideshift_requests_total", "counter"),
        ("tideshift_unrouted_requests_total", "counter"),
        ("tideshift_requests_in_flight", "gauge"),
        ("tideshift_request_duration_milliseconds", "histogram"),
    ];
    for (name, kind) in kinds {
        let lines = text.lines().filter(|line| *line == format!("# TYPE {name} {kind}")).count();
        assert_eq!(lines, 1, "TYPE lines of {name}");
    }
    let ours: Vec<&str> = text.lines().filter(|line| line.contains("tideshift_")).collect();
    let strangers: Vec<_> = ours
        .iter()
        .filter(|line| !line.starts_with("# TYPE tideshift_") && !line.starts_with("tideshift_"))
        // Envoy's own stats of the cluster and the wasm plugin.
        .filter(|line| !line.contains("envoy_cluster") && !line.contains("envoy_wasm"))
        .collect();
    assert!(strangers.is_empty(), "{strangers:#?}");
    for line in ours.iter().filter(|line| line.starts_with("tideshift_")) {
        assert!(line.contains(r#"service="shop""#), "{line}");
        assert!(!line.contains(".=.") && !line.contains(";.;"), "a label was not extracted: {line}");
    }
    let all = BACKENDS.len() + OTHERS.len();
    let counters = ours.iter().filter(|line| line.starts_with("tideshift_requests_total{")).count();
    assert_eq!(counters, all * Outcome::ALL.len(), "one series for each version and outcome");
    setup.no_trap().await
}
