//! Where requests really went, in a real Envoy: what did not reach its version is counted as misrouted and for no version;
//! what Envoy makes of a failure, or follows by itself, does not falsify the counts.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::outcome::Outcome;
use tideshift_core::protocol::report::VersionReport;
use tideshift_tests::backend::Mode;
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER, manager, route, strip_early};
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture, WANT, picked_service, served_by};
use tideshift_tests::metrics::Metrics;
use tideshift_tests::policy_server::PolicyServer;
use tideshift_tests::ports::Port;
use tideshift_tests::wait::eventually;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 2;

fn outcomes(metrics: &Metrics, version: &str) -> [u64; 4] {
    Outcome::ALL.map(|outcome| metrics.requests_total("shop", version, outcome.label()))
}

/// What the last report says of a version.
fn told(server: &PolicyServer, version: &str) -> anyhow::Result<VersionReport> {
    let report = server.last_report()?;
    let versions = report.services.into_iter().flat_map(|service| service.versions);
    versions.into_iter().find(|of| of.name == version).context("not told of")
}

/// v2, to which half of the requests are dealt, has a route for one path only: the rest takes the default route, to v1.
#[tokio::test]
async fn a_version_without_a_route_is_misrouted_and_not_counted() -> anyhow::Result<()> {
    const REQUESTS: u64 = 200;
    for is_named in [false, true] {
        let version = |name: &str| {
            let mut version = json!({ "name": name, "weight": 1 });
            if is_named {
                version["cluster"] = json!(name);
            }
            version
        };
        let server = PolicyServer::start().await?;
        let policy = json!({
            "controller": { "cluster": CONTROLLER_CLUSTER },
            "revision": 1,
            "services": [{ "name": "shop", "hostnames": [HOST], "versions": [version("v1"), version("v2")], "stable": "v1" }],
        });
        let build = |bootstrap: Bootstrap| bootstrap.controller(server.address());
        let patch = |bootstrap: &mut Value| route(bootstrap, "v2")["match"]["prefix"] = json!("/routed");
        let setup = EnvoyFixture::start_with(policy, &["v1", "v2"], WORKERS, build, patch).await?;
        let mut workers = EachWorker::open(&setup, setup.get(HOST, "/")).await?;
        for _ in 0..REQUESTS / WORKERS as u64 {
            let versions = workers.versions().await?;
            assert!(versions.iter().all(|version| version == "v1"), "{versions:?}");
        }
        let (v1, v2) = eventually("all requests to be told of", DEADLINE, async || {
            let (v1, v2) = (told(&server, "v1")?, told(&server, "v2")?);
            let all = v2.misrouted + v2.ended.total() + v1.ended.total();
            ensure!(all == REQUESTS, "{all}");
            Ok((v1, v2))
        })
        .await?;
        // Each worker's even sequence is within 3.
        let (misrouted, before) = (v2.misrouted, v2.ended.total());
        assert!(v1.ended.ok.abs_diff(REQUESTS / 2) <= 3 * WORKERS as u64, "{v1:?}");
        assert_eq!((v1.misrouted, v2.in_flight, v2.dealt.started), (0, 0, before), "they began for no version: {v2:?}");
        // A worker that has not yet seen where the stable version's requests go cannot know.
        assert!(before <= if is_named { 0 } else { 3 * WORKERS as u64 }, "named {is_named}: {v2:?}");
        let metrics = setup.settled("shop", REQUESTS - misrouted).await?;
        assert_eq!(outcomes(&metrics, "v1"), [v1.ended.ok, 0, 0, 0], "named {is_named}");
        assert_eq!(outcomes(&metrics, "v2"), [before, 0, 0, 0], "named {is_named}");
        assert_eq!(["v1", "v2"].map(|version| metrics.misrouted_total("shop", version)), [0, misrouted]);

        // Where it has a route it is counted, from the first request on.
        let routed = setup.get(HOST, "/routed");
        for _ in 0..REQUESTS / WORKERS as u64 {
            workers.send(&routed).await?;
        }
        let metrics = setup.settled("shop", 2 * REQUESTS - misrouted).await?;
        let arrived = setup.backend("v2").counts().requests;
        assert!(arrived.abs_diff(REQUESTS / 2) <= 3 * WORKERS as u64, "{arrived}");
        assert_eq!(outcomes(&metrics, "v2"), [before + arrived, 0, 0, 0], "named {is_named}");
        assert_eq!(metrics.misrouted_total("shop", "v2"), misrouted, "named {is_named}");
        setup.no_trap().await?;
    }
    Ok(())
}

/// Operators let Envoy answer 200 in place of the failures it sees; the client then sees none, but the version has failed.
#[tokio::test]
async fn a_failure_that_looks_like_an_answer_is_an_error() -> anyhow::Result<()> {
    const TIMES: u64 = 60;
    let nobody = Port::reserve()?;
    let rewrite = |bootstrap: &mut Value| {
        let is_503 = json!({ "op": "EQ", "value": { "default_value": 503, "runtime_key": "tests" } });
        manager(bootstrap)["local_reply_config"] = json!({ "mappers": [{
            "filter": { "status_code_filter": { "comparison": is_503 } },
            "status_code": 200,
            "body": { "inline_string": "sorry, be back soon" },
        }] });
    };
    let policy = json!({ "revision": 1, "services": [picked_service("shop", HOST, &["v1", "v2"])] });
    let build = |bootstrap: Bootstrap| bootstrap.version("v2", &[nobody.address()]);
    let setup = EnvoyFixture::start_with(policy, &["v1"], WORKERS, build, rewrite).await?;
    let mut workers = EachWorker::open(&setup, setup.get(HOST, "/")).await?;
    for _ in 0..TIMES {
        for (version, body) in [("v1", "ok"), ("v2", "sorry, be back soon")] {
            for response in workers.send(&setup.get(HOST, "/").header(WANT, version)).await? {
                assert_eq!((response.status, response.text().as_str()), (200, body), "{version}");
            }
        }
    }
    let of_each = TIMES * WORKERS as u64;
    let metrics = setup.settled("shop", 2 * of_each).await?;
    assert_eq!(outcomes(&metrics, "v1"), [of_each, 0, 0, 0]);
    assert_eq!(outcomes(&metrics, "v2"), [0, of_each, 0, 0]);
    setup.no_trap().await
}

/// Envoy does not clean a request again that it redirects by itself: what the filter wrote for the first host would go
/// along to the second.
#[tokio::test]
async fn a_redirection_to_a_host_of_no_service_takes_no_headers_along() -> anyhow::Result<()> {
    const TIMES: u64 = 5;
    for (strips, mirrors) in [(true, false), (false, false), (true, true), (false, true)] {
        let version = |name: &str, weight: u32| json!({ "name": name, "weight": weight, "cluster": name });
        let mut shop = json!({
            "name": "shop",
            "hostnames": [HOST],
            "versions": [version("v1", 0), version("v2", 1), version("v3", 0)],
        });
        if mirrors {
            shop["mirror"] = json!({ "version": "v3", "percent": 100 });
        }
        let policy = json!({ "revision": 1, "stripClientHeaders": strips, "services": [shop] });
        let patch = |bootstrap: &mut Value| {
            route(bootstrap, "v2")["route"]["internal_redirect_policy"] = json!({ "max_internal_redirects": 3 });
            if !strips {
                strip_early(bootstrap);
            }
        };
        let setup =
            EnvoyFixture::start_with(policy, &["v1", "v2", "v3"], WORKERS, |bootstrap| bootstrap, patch).await?;
        setup.backend("v2").set(|behaviour| {
            behaviour.status = 302;
            behaviour.headers = vec![("location".to_owned(), "http://elsewhere.example.org/".to_owned())];
        });
        setup.backend("v1").set(|behaviour| behaviour.mode = Mode::Echo);
        for _ in 0..TIMES {
            let response = setup.get(HOST, "/").send().await?;
            assert_eq!((response.status, served_by(&response)?.as_str()), (200, "v1"), "the default route");
            let echo = response.json()?;
            let headers = echo["headers"].as_array().context("no headers")?.iter();
            let names: Vec<_> = headers.filter_map(|header| header["name"].as_str()).collect();
            let ours: Vec<_> = names.iter().filter(|name| name.starts_with("x-tideshift-")).collect();
            assert!(ours.is_empty() && names.contains(&"host"), "strips: {strips}, mirrors: {mirrors}: {names:?}");
        }
        assert_eq!(setup.backend("v2").counts().requests, TIMES, "each was redirected");
        // The first host's request went on, and the second's is for no service.
        let metrics = setup.settled("shop", 0).await?;
        assert_eq!(metrics.misrouted_total("shop", "v2"), 0);
        setup.no_trap().await?;
    }
    Ok(())
}
