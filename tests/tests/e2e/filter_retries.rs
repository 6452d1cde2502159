//! However often and wherever a real Envoy tries, a client's request has one outcome: the one that the client got. The
//! same for what Envoy answers by itself, before, after or instead of the version.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::outcome::Outcome;
use tideshift_tests::backend::{Backend, Errors, Mode, SERVED_BY};
use tideshift_tests::bootstrap::{Bootstrap, cluster_of, manager, route, type_url};
use tideshift_tests::client::Response;
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture, WANT, picked_service};
use tideshift_tests::load::Plan;
use tideshift_tests::metrics::Metrics;
use tideshift_tests::ports::Port;
use tideshift_tests::wait::eventually;
use tokio::task::JoinSet;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 3;
/// Long enough for a try that hangs to be told from one that is slow on a busy machine, short enough to be waited for.
const TRY: &str = "0.3s";

fn policy(versions: &[&str]) -> Value {
    json!({ "revision": 1, "services": [picked_service("shop", HOST, versions)] })
}

async fn call(setup: &EnvoyFixture, version: &str) -> anyhow::Result<Response> {
    setup.get(HOST, "/").header(WANT, version).send().await
}

fn outcomes(metrics: &Metrics, version: &str) -> [u64; 4] {
    Outcome::ALL.map(|outcome| metrics.requests_total("shop", version, outcome.label()))
}

async fn arrived(backend: &Backend, requests: u64) -> anyhow::Result<()> {
    eventually(&format!("{requests} tries"), DEADLINE, async || {
        ensure!(backend.counts().requests == requests, "{}", backend.counts().requests);
        Ok(())
    })
    .await
}

/// Two endpoints, of which the first fails in some way and the second answers.
struct Pair {
    bad: Backend,
    good: Backend,
}

impl Pair {
    async fn start(bad: Mode) -> anyhow::Result<Self> {
        let pair = Self { bad: Backend::start("bad").await?, good: Backend::start("good").await? };
        pair.bad.set(|behaviour| behaviour.mode = bad);
        Ok(pair)
    }

    fn version(&self, bootstrap: Bootstrap, name: &str) -> Bootstrap {
        bootstrap.version(name, &[self.bad.address(), self.good.address()])
    }
}

#[tokio::test]
async fn a_request_that_is_tried_again_has_one_outcome() -> anyhow::Result<()> {
    const TIMES: u64 = 6;
    const VERSIONS: [&str; 4] = ["again", "other-host", "try-timeout", "in-vain"];
    let (other, late) = (Pair::start(Mode::Reset).await?, Pair::start(Mode::Hang).await?);
    let build = |b: Bootstrap| late.version(other.version(b, "other-host"), "try-timeout");
    let patch = |bootstrap: &mut Value| {
        let retry = |on: &str, retries: u32| json!({ "retry_on": on, "num_retries": retries });
        route(bootstrap, "again")["route"]["retry_policy"] = retry("5xx", 1);
        route(bootstrap, "in-vain")["route"]["retry_policy"] = retry("5xx", 2);
        let mut elsewhere = retry("5xx,reset", 3);
        elsewhere["retry_host_predicate"] = json!([{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": { "@type": type_url("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate") },
        }]);
        elsewhere["host_selection_retry_max_attempts"] = json!(20);
        route(bootstrap, "other-host")["route"]["retry_policy"] = elsewhere.clone();
        elsewhere["per_try_timeout"] = json!(TRY);
        route(bootstrap, "try-timeout")["route"]["retry_policy"] = elsewhere;
    };
    let setup = EnvoyFixture::start_with(policy(&VERSIONS), &["again", "in-vain"], WORKERS, build, patch).await?;
    setup.backend("again").set(|behaviour| behaviour.errors = Errors { bad: 1, of: 2 });
    setup.backend("in-vain").set(|behaviour| behaviour.status = 502);
    for version in VERSIONS {
        for _ in 0..TIMES {
            let response = call(&setup, version).await?;
            assert_eq!(response.status, if version == "in-vain" { 502 } else { 200 }, "{version}");
        }
    }
    let metrics = setup.settled("shop", TIMES * VERSIONS.len() as u64).await?;
    for version in ["again", "other-host", "try-timeout"] {
        assert_eq!(outcomes(&metrics, version), [TIMES, 0, 0, 0], "{version}");
    }
    assert_eq!(outcomes(&metrics, "in-vain"), [0, TIMES, 0, 0]);
    // There were more tries than requests: without, all this says nothing.
    assert_eq!(setup.backend("again").counts().requests, 2 * TIMES - 1);
    assert_eq!(setup.backend("in-vain").counts().requests, 3 * TIMES);
    for pair in [&other, &late] {
        assert_eq!(pair.good.counts().requests, TIMES);
        assert!(pair.bad.counts().requests > 0, "no try went to the endpoint that fails");
    }
    setup.no_trap().await
}

#[tokio::test]
async fn a_hedged_request_has_one_outcome_and_the_try_that_lost_none() -> anyhow::Result<()> {
    const TIMES: u64 = 4;
    const VERSIONS: [&str; 2] = ["hedged", "hedged-in-vain"];
    let one_hangs = Pair::start(Mode::Hang).await?;
    let patch = |bootstrap: &mut Value| {
        for version in VERSIONS {
            let action = &mut route(bootstrap, version)["route"];
            action["hedge_policy"] = json!({ "hedge_on_per_try_timeout": true });
            action["retry_policy"] = json!({ "retry_on": "5xx", "num_retries": 2, "per_try_timeout": TRY });
        }
        route(bootstrap, "hedged-in-vain")["route"]["timeout"] = json!("2s");
    };
    let build = |bootstrap| one_hangs.version(bootstrap, "hedged");
    let setup = EnvoyFixture::start_with(policy(&VERSIONS), &["hedged-in-vain"], WORKERS, build, patch).await?;
    setup.backend("hedged-in-vain").set(|behaviour| behaviour.mode = Mode::Hang);
    for _ in 0..TIMES {
        let response = call(&setup, "hedged").await?;
        assert_eq!((response.status, response.header(SERVED_BY).as_deref()), (200, Some("good")));
    }
    // The first tries stay open beside the later ones, and all of them end with the request.
    let hanging = setup.get(HOST, "/").header(WANT, "hedged-in-vain");
    let hanging = tokio::spawn(async move { hanging.send().await });
    eventually("two tries at once", DEADLINE, async || {
        let active = setup.envoy.stat("cluster.hedged-in-vain.upstream_rq_active").await?;
        ensure!(active >= 2, "{active}");
        Ok(())
    })
    .await?;
    assert_eq!(hanging.await??.status, 504);
    let metrics = setup.settled("shop", TIMES + 1).await?;
    assert_eq!(outcomes(&metrics, "hedged"), [TIMES, 0, 0, 0]);
    assert_eq!(outcomes(&metrics, "hedged-in-vain"), [0, 1, 0, 0]);
    assert!(one_hangs.bad.counts().requests > 0, "no try went to the endpoint that hangs");
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spent_retry_budget_and_a_full_version_are_one_error_each() -> anyhow::Result<()> {
    const REQUESTS: u64 = 200;
    const VERSIONS: [&str; 2] = ["budget", "full"];
    let patch = |bootstrap: &mut Value| {
        route(bootstrap, "budget")["route"]["retry_policy"] = json!({ "retry_on": "5xx", "num_retries": 3 });
        let budget = json!({ "budget_percent": { "value": 10 }, "min_retry_concurrency": 1 });
        cluster_of(bootstrap, "budget")["circuit_breakers"] = json!({ "thresholds": [{ "retry_budget": budget }] });
        cluster_of(bootstrap, "full")["circuit_breakers"] = json!({ "thresholds": [{ "max_requests": 1 }] });
    };
    let setup = EnvoyFixture::start_with(policy(&VERSIONS), &VERSIONS, WORKERS, |bootstrap| bootstrap, patch).await?;
    setup.backend("budget").set(|behaviour| {
        (behaviour.errors, behaviour.latency) = (Errors { bad: 1, of: 1 }, Duration::from_millis(5));
    });
    let plan = |version: &str| Plan::new(setup.address(), HOST).header(WANT, version).connections(16);
    let tally = plan("budget").run(REQUESTS).await?;
    assert_eq!((tally.class(5), tally.failed), (REQUESTS, 0), "{tally:?}");
    let overflows = setup.envoy.stat("cluster.budget.upstream_rq_retry_overflow").await?;
    let retries = setup.envoy.stat("cluster.budget.upstream_rq_retry").await?;
    assert!(overflows > 0 && retries > 0, "{overflows} retries over the budget, {retries} within it");
    assert_eq!(setup.backend("budget").counts().requests, REQUESTS + retries);

    // While its only place is taken.
    setup.backend("full").set(|behaviour| behaviour.mode = Mode::Hang);
    let holding = setup.get(HOST, "/").header(WANT, "full").begin().await?;
    arrived(setup.backend("full"), 1).await?;
    assert_eq!(call(&setup, "full").await?.status, 503);
    drop(holding);

    let metrics = setup.settled("shop", REQUESTS + 2).await?;
    assert_eq!(outcomes(&metrics, "budget"), [0, REQUESTS, 0, 0]);
    assert_eq!(outcomes(&metrics, "full"), [0, 1, 0, 1]);
    setup.no_trap().await
}

/// A filter of Envoy's own after ours.
fn after(bootstrap: &mut Value, name: &str, config: &Value) {
    let filters = manager(bootstrap)["http_filters"].as_array_mut().expect("a list");
    filters.insert(filters.len() - 1, json!({ "name": name, "typed_config": config }));
}

#[tokio::test]
async fn what_envoy_answers_by_itself_is_counted_by_what_the_client_got() -> anyhow::Result<()> {
    const VERSIONS: [&str; 9] = [
        "no-endpoint",
        "unhealthy",
        "no-cluster",
        "no-route",
        "direct-fine",
        "direct-sorry",
        "redirected",
        "behind-filters",
        "limited",
    ];
    let nobody = Port::reserve()?;
    let build = |bootstrap: Bootstrap| {
        let bootstrap = bootstrap.version("no-endpoint", &[]).version("unhealthy", &[nobody.address()]);
        ["no-cluster", "no-route", "direct-fine", "direct-sorry", "redirected"]
            .into_iter()
            .fold(bootstrap, |bootstrap, name| bootstrap.version(name, &[]))
    };
    let patch = |bootstrap: &mut Value| {
        cluster_of(bootstrap, "unhealthy")["health_checks"] = json!([{
            "timeout": "0.1s",
            "interval": "0.1s",
            "healthy_threshold": 1,
            "unhealthy_threshold": 1,
            "http_health_check": { "path": "/health" },
        }]);
        cluster_of(bootstrap, "unhealthy")["common_lb_config"] = json!({ "healthy_panic_threshold": { "value": 0 } });
        manager(bootstrap)["route_config"]["validate_clusters"] = json!(false);
        route(bootstrap, "no-cluster")["route"]["cluster"] = json!("there-is-no-such-cluster");
        route(bootstrap, "no-route")["match"]["prefix"] = json!("/nobody/asks/for/this");
        for (version, status) in [("direct-fine", 200), ("direct-sorry", 503)] {
            let route = route(bootstrap, version).as_object_mut().expect("a route");
            route.remove("route");
            route.insert("direct_response".to_owned(), json!({ "status": status }));
        }
        let redirected = route(bootstrap, "redirected").as_object_mut().expect("a route");
        redirected.remove("route");
        redirected.insert("redirect".to_owned(), json!({ "path_redirect": "/elsewhere" }));
        let fault = json!({
            "@type": type_url("extensions.filters.http.fault.v3.HTTPFault"),
            "abort": { "header_abort": {}, "percentage": { "numerator": 100 } },
        });
        after(bootstrap, "envoy.filters.http.fault", &fault);
        let buffer = json!({
            "@type": type_url("extensions.filters.http.buffer.v3.Buffer"),
            "max_request_bytes": 1000,
        });
        after(bootstrap, "envoy.filters.http.buffer", &buffer);
        let limit = json!({
            "@type": type_url("extensions.filters.http.local_ratelimit.v3.LocalRateLimit"),
            "stat_prefix": "tests",
        });
        after(bootstrap, "envoy.filters.http.local_ratelimit", &limit);
        let bucket = json!({ "max_tokens": 1, "tokens_per_fill": 1, "fill_interval": "3600s" });
        let all = json!({ "default_value": { "numerator": 100 } });
        route(bootstrap, "limited")["typed_per_filter_config"] = json!({
            "envoy.filters.http.local_ratelimit": {
                "@type": type_url("extensions.filters.http.local_ratelimit.v3.LocalRateLimit"),
                "stat_prefix": "tests",
                "token_bucket": bucket,
                "filter_enabled": all,
                "filter_enforced": all,
            },
        });
        // The default route would take in what has no route of its own.
        manager(bootstrap)["route_config"]["virtual_hosts"][0]["routes"].as_array_mut().expect("a list").pop();
    };
    let own = ["behind-filters", "limited"];
    let setup = EnvoyFixture::start_with(policy(&VERSIONS), &own, WORKERS, build, patch).await?;
    eventually("an unhealthy endpoint", DEADLINE, async || {
        ensure!(setup.envoy.stat("cluster.unhealthy.health_check.failure").await? > 0);
        Ok(())
    })
    .await?;
    let behind = setup.request("POST", HOST, "/").header(WANT, "behind-filters");
    // Each worker has to have seen that Envoy names clusters.
    EachWorker::open(&setup, behind.clone()).await?.send(&behind.clone().body("fine")).await?;
    for (version, status) in [
        ("no-endpoint", 503),
        ("unhealthy", 503),
        ("no-cluster", 503),
        ("no-route", 404),
        ("direct-fine", 200),
        ("direct-sorry", 503),
        ("redirected", 301),
        ("limited", 200),
        ("limited", 429),
    ] {
        assert_eq!(call(&setup, version).await?.status, status, "{version}");
    }
    for (status, request) in [
        (200, behind.clone().body("fine")),
        (413, behind.clone().body(vec![b'x'; 2_000])),
        (503, behind.clone().header("x-envoy-fault-abort-request", "503").body("")),
        (429, behind.clone().header("x-envoy-fault-abort-request", "429").body("")),
    ] {
        assert_eq!(request.send().await?.status, status);
    }
    assert_eq!(setup.backend("behind-filters").counts().requests, 1 + WORKERS as u64, "the others reached it too");

    // ok, error, client_error, cancelled
    let misrouted = ["no-route", "direct-fine", "direct-sorry", "redirected"];
    let metrics = setup.settled("shop", 5 + 4 + WORKERS as u64).await?;
    for (version, expected) in [
        ("no-endpoint", [0, 1, 0, 0]),
        ("unhealthy", [0, 1, 0, 0]),
        ("no-cluster", [0, 1, 0, 0]),
        ("limited", [1, 0, 1, 0]),
        ("behind-filters", [1 + WORKERS as u64, 1, 2, 0]),
    ] {
        assert_eq!((outcomes(&metrics, version), metrics.misrouted_total("shop", version)), (expected, 0), "{version}");
    }
    // What Envoy was told to answer, or has no route for, no version has answered.
    for version in misrouted {
        assert_eq!((outcomes(&metrics, version), metrics.misrouted_total("shop", version)), ([0; 4], 1), "{version}");
    }
    setup.no_trap().await
}

/// What is answered before the filter has seen it has no version.
#[tokio::test]
async fn what_never_reaches_the_filter_is_not_counted() -> anyhow::Result<()> {
    let patch = |bootstrap: &mut Value| {
        let fault = json!({
            "@type": type_url("extensions.filters.http.fault.v3.HTTPFault"),
            "abort": { "header_abort": {}, "percentage": { "numerator": 100 } },
        });
        let filters = manager(bootstrap)["http_filters"].as_array_mut().expect("a list");
        filters.insert(0, json!({ "name": "envoy.filters.http.fault", "typed_config": fault }));
    };
    let setup = EnvoyFixture::start_with(policy(&["v1"]), &["v1"], WORKERS, |bootstrap| bootstrap, patch).await?;
    let request = setup.get(HOST, "/");
    assert_eq!(request.clone().header("x-envoy-fault-abort-request", "503").send().await?.status, 503);
    assert_eq!(request.clone().header("x-long", vec![b'x'; 80_000]).send().await?.status, 431);
    assert_eq!(setup.request("GET", "shop .example.com", "/").send().await?.status, 400);
    assert_eq!(request.send().await?.status, 200);
    let metrics = setup.settled("shop", 1).await?;
    assert_eq!(outcomes(&metrics, "v1"), [1, 0, 0, 0]);
    setup.no_trap().await
}

/// A request passes the filter again for a redirect that Envoy follows itself, but counts once.
#[tokio::test]
async fn a_redirection_that_envoy_follows_has_the_outcome_of_its_last_answer() -> anyhow::Result<()> {
    const TIMES: u64 = 5;
    const VERSIONS: [&str; 2] = ["moved", "target"];
    let patch = |bootstrap: &mut Value| {
        let action = &mut route(bootstrap, "moved")["route"];
        action["internal_redirect_policy"] = json!({ "redirect_response_codes": [302] });
    };
    let mut policy = policy(&VERSIONS);
    let rules = policy["services"][0]["rules"].as_array_mut().context("no rules")?;
    rules.insert(0, json!({ "matches": [{ "path": { "value": "/target" } }], "versions": [{ "name": "target" }] }));
    let setup = EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, |bootstrap| bootstrap, patch).await?;
    setup.backend("moved").set(|behaviour| {
        behaviour.status = 302;
        behaviour.headers = vec![("location".to_owned(), format!("http://{HOST}/target"))];
    });
    for _ in 0..TIMES {
        let response = call(&setup, "moved").await?;
        assert_eq!((response.status, response.header(SERVED_BY).as_deref()), (200, Some("target")));
    }
    let metrics = setup.settled("shop", TIMES).await?;
    assert_eq!(outcomes(&metrics, "target"), [TIMES, 0, 0, 0]);
    setup.no_trap().await
}

/// What is mirrored speaks for no version.
#[tokio::test]
async fn mirrored_requests_are_not_counted() -> anyhow::Result<()> {
    const REQUESTS: u64 = 50;
    let patch = |bootstrap: &mut Value| {
        route(bootstrap, "v1")["route"]["request_mirror_policies"] = json!([{ "cluster": "shadow" }]);
    };
    let shadow = Backend::start("shadow").await?;
    shadow.set(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 });
    let build = |bootstrap: Bootstrap| bootstrap.version("shadow", &[shadow.address()]);
    let setup = EnvoyFixture::start_with(policy(&["v1", "shadow"]), &["v1"], WORKERS, build, patch).await?;
    let setup = Arc::new(setup);
    let mut clients = JoinSet::new();
    for _ in 0..REQUESTS {
        let setup = Arc::clone(&setup);
        clients.spawn(async move { call(&setup, "v1").await });
    }
    while let Some(response) = clients.join_next().await {
        assert_eq!(response?.context("no answer")?.status, 200);
    }
    arrived(&shadow, REQUESTS).await?;
    let metrics = setup.settled("shop", REQUESTS).await?;
    assert_eq!((outcomes(&metrics, "v1"), outcomes(&metrics, "shadow")), ([REQUESTS, 0, 0, 0], [0; 4]));
    setup.no_trap().await
}
