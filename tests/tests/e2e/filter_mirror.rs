//! Mirroring through Envoy's own `request_mirror_policies`: which requests are copied to which version, and that users notice
//! nothing of it.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::backend::{Behaviour, Errors, Mode};
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER, manager, strip_early};
use tideshift_tests::client::{Connection, Request};
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture, served_by};
use tideshift_tests::policy_server::PolicyServer;
use tideshift_tests::wait::eventually;

const WORKERS: usize = 3;
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];
const HOST: &str = "shop.example.com";
const MIRROR_HEADER: &str = "x-tideshift-mirror";

/// All users have v1; the cluster of a version is called like it.
fn service(name: &str, fields: Value) -> Value {
    let version = |name: &str, weight: u32| json!({ "name": name, "weight": weight, "cluster": name });
    let mut service = json!({
        "name": name,
        "hostnames": [format!("{name}.example.com")],
        "versions": [version("v1", 1), version("v2", 0), version("v3", 0)],
    });
    for (key, value) in fields.as_object().into_iter().flatten() {
        service[key] = value.clone();
    }
    service
}

fn policy(services: &[Value]) -> Value {
    json!({ "revision": 1, "services": services })
}

/// On every route, the default one too.
fn mirror_on_every_route(bootstrap: &mut Value) {
    let virtual_host = &mut manager(bootstrap)["route_config"]["virtual_hosts"][0];
    for route in virtual_host["routes"].as_array_mut().into_iter().flatten() {
        route["route"]["request_mirror_policies"] = json!([{ "cluster_header": MIRROR_HEADER }]);
    }
}

async fn start(services: &[Value]) -> anyhow::Result<EnvoyFixture> {
    EnvoyFixture::start_with(policy(services), &VERSIONS, WORKERS, |bootstrap| bootstrap, mirror_on_every_route).await
}

/// Sends so many equal requests on one connection; all are answered by v1, none of them noticeably late.
async fn send(setup: &EnvoyFixture, request: &Request, count: usize) -> anyhow::Result<()> {
    let mut connection = Connection::open(setup.address()).await?;
    for _ in 0..count {
        let begun = Instant::now();
        let response = connection.send(request).await?;
        ensure!((response.status, served_by(&response)?.as_str()) == (200, "v1"), "{response:?}");
        ensure!(begun.elapsed() < Duration::from_secs(2), "answered after {:?}", begun.elapsed());
    }
    Ok(())
}

/// Waits until exactly that many requests have arrived at v1, v2 and v3.
async fn arrived(setup: &EnvoyFixture, what: &str, expected: [u64; 3]) -> anyhow::Result<()> {
    eventually(&format!("{what}: {expected:?}"), DEADLINE, async || {
        let counts = VERSIONS.map(|version| setup.backend(version).counts().requests);
        ensure!(counts == expected, "{counts:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_tenth_is_copied() -> anyhow::Result<()> {
    let setup = start(&[service("shop", json!({ "mirror": { "version": "v2", "percent": 10 } }))]).await?;
    send(&setup, &setup.get(HOST, "/"), 1_000).await?;
    let copies = eventually("the copies", DEADLINE, async || {
        let copies = setup.backend("v2").counts().requests;
        // By chance: five standard deviations.
        ensure!((53..=147).contains(&copies), "{copies} of 1,000");
        let sent = setup.envoy.stat("cluster.v2.upstream_rq_total").await?;
        ensure!(copies == sent, "{copies} of {sent} have arrived");
        Ok(copies)
    });
    println!("{} copies of 1,000 requests", copies.await?);
    assert_eq!(setup.backend("v1").counts().requests, 1_000);
    // Copies are not user requests: neither the version's counts nor the guard include them.
    let metrics = setup.settled("shop", 1_000).await?;
    assert_eq!(metrics.requests_total("shop", "v1", "ok"), 1_000);
    setup.no_trap().await
}

#[tokio::test]
async fn only_what_should_be_is_copied() -> anyhow::Result<()> {
    let is_beta = json!([{ "headers": [{ "name": "x-beta", "type": "Present" }] }]);
    let rule = |fields: Value| {
        let mut rule = json!({ "name": "beta", "matches": is_beta, "versions": [{ "name": "v1" }] });
        for (key, value) in fields.as_object().into_iter().flatten() {
            rule[key] = value.clone();
        }
        json!([rule])
    };
    let to_v2 = json!({ "version": "v2" });
    let services = [
        service("safe", json!({ "mirror": to_v2 })),
        service("posts", json!({ "mirror": { "version": "v2", "methods": ["POST", "PURGE"] } })),
        service("nothing", json!({ "mirror": { "version": "v2", "percent": 0 } })),
        service("none", json!({})),
        // The rule's requests are the rule's: the service's mirror is for those that no rule takes.
        service("rule-without", json!({ "mirror": to_v2, "rules": rule(json!({})) })),
        service("rule-with", json!({ "mirror": to_v2, "rules": rule(json!({ "mirror": { "version": "v3" } })) })),
        service("only-rule", json!({ "rules": rule(json!({ "mirror": to_v2 })) })),
    ];
    let setup = start(&services).await?;
    let mut expected = [0, 0, 0];
    for (name, method, beta, copied_to) in [
        ("safe", "GET", false, Some(1)),
        ("safe", "HEAD", false, Some(1)),
        ("safe", "OPTIONS", false, Some(1)),
        ("safe", "POST", false, None),
        ("safe", "PUT", false, None),
        ("safe", "PATCH", false, None),
        ("safe", "DELETE", false, None),
        ("posts", "POST", false, Some(1)),
        ("posts", "PURGE", false, Some(1)),
        ("posts", "GET", false, None),
        ("nothing", "GET", false, None),
        ("none", "GET", false, None),
        ("rule-without", "GET", true, None),
        ("rule-without", "GET", false, Some(1)),
        ("rule-with", "GET", true, Some(2)),
        ("rule-with", "GET", false, Some(1)),
        ("only-rule", "GET", true, Some(1)),
        ("only-rule", "GET", false, None),
    ] {
        let mut request = setup.request(method, &format!("{name}.example.com"), "/");
        if beta {
            request = request.header("x-beta", "1");
        }
        if matches!(method, "POST" | "PUT") {
            request = request.body("an order");
        }
        send(&setup, &request, 2).await?;
        expected[0] += 2;
        copied_to.into_iter().for_each(|version: usize| expected[version] += 2);
        arrived(&setup, &format!("{method} of {name}, beta: {beta}"), expected).await?;
    }
    setup.no_trap().await
}

#[tokio::test]
async fn where_the_policy_names_no_cluster_it_is_service_and_version() -> anyhow::Result<()> {
    let versions = json!([{ "name": "v1" }, { "name": "v2", "weight": 0 }]);
    let mirror = json!({ "version": "v2", "methods": ["POST"] });
    let unnamed = service("shop", json!({ "versions": versions, "mirror": mirror }));
    let add_cluster = |bootstrap: &mut Value| {
        mirror_on_every_route(bootstrap);
        let clusters = &mut bootstrap["static_resources"]["clusters"];
        let mut v2 = clusters[1].clone();
        (v2["name"], v2["load_assignment"]["cluster_name"]) = (json!("shop_v2"), json!("shop_v2"));
        clusters.as_array_mut().into_iter().for_each(|clusters| clusters.push(v2.clone()));
    };
    let setup =
        EnvoyFixture::start_with(policy(&[unnamed]), &VERSIONS, WORKERS, |bootstrap| bootstrap, add_cluster).await?;
    let request = setup.request("POST", HOST, "/orders").body("an order");
    send(&setup, &request, 5).await?;
    arrived(&setup, "copies", [5, 5, 0]).await?;
    setup.no_trap().await
}

#[tokio::test]
async fn users_notice_nothing_of_a_target_that_fails_hangs_or_is_gone() -> anyhow::Result<()> {
    let setup = start(&[service("shop", json!({ "mirror": { "version": "v2" } }))]).await?;
    let behave = |change: &dyn Fn(&mut Behaviour)| {
        setup.backend("v2").set(|behaviour| *behaviour = Behaviour::default());
        setup.backend("v2").set(change);
    };
    let request = setup.get(HOST, "/");
    let mut sent = 0;
    for (what, change) in [
        ("answers", (&|_: &mut Behaviour| ()) as &dyn Fn(&mut Behaviour)),
        ("fails", &|behaviour| behaviour.errors = Errors { bad: 1, of: 1 }),
        ("resets", &|behaviour| behaviour.mode = Mode::Reset),
        ("resets in its answer", &|behaviour| behaviour.mode = Mode::ResetInBody),
        ("is slow", &|behaviour| behaviour.latency = Duration::from_secs(3)),
        ("hangs", &|behaviour| behaviour.mode = Mode::Hang),
    ] {
        behave(change);
        let begun = Instant::now();
        send(&setup, &request, 50).await.map_err(|error| error.context(format!("v2 {what}")))?;
        println!("v2 {what}: 50 answers of v1 in {:?}", begun.elapsed());
        sent += 50;
        arrived(&setup, what, [sent, sent, 0]).await?;
    }
    setup.backend("v2").stop().await;
    send(&setup, &request, 50).await?;
    let metrics = setup.settled("shop", sent + 50).await?;
    assert_eq!(metrics.requests_total("shop", "v1", "ok"), sent + 50);
    assert!(!setup.envoy.log().contains("guard: "), "failing copies veto no version");
    setup.no_trap().await
}

#[tokio::test]
async fn clients_cannot_mirror() -> anyhow::Result<()> {
    let services = [
        service("shop", json!({})),
        service("posts", json!({ "mirror": { "version": "v2", "methods": ["POST"] } })),
        service("gone", json!({ "versions": [{ "name": "v2", "serving": false }] })),
    ];
    forge(&start(&services).await?).await?;
    let mut policy = policy(&services);
    policy["stripClientHeaders"] = json!(false);
    let patch = |bootstrap: &mut Value| {
        mirror_on_every_route(bootstrap);
        strip_early(bootstrap);
    };
    forge(&EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, |bootstrap| bootstrap, patch).await?).await
}

async fn forge(setup: &EnvoyFixture) -> anyhow::Result<()> {
    let mut sent = 0;
    for host in [HOST, "posts.example.com", "gone.example.com", "elsewhere.example.com"] {
        for forged in
            [&["x-tideshift-mirror"][..], &["X-Tideshift-Mirror"], &["x-tideshift-mirror", "X-TIDESHIFT-MIRROR"]]
        {
            let request = forged.iter().fold(setup.get(host, "/"), |request, name| request.header(name, "v3"));
            send(setup, &request, WORKERS).await?;
            sent += WORKERS as u64;
        }
    }
    // A copy that is due goes where the policy says.
    let request = setup.request("POST", "posts.example.com", "/").header(MIRROR_HEADER, "v3").body("");
    send(setup, &request, WORKERS).await?;
    sent += WORKERS as u64;
    arrived(setup, "what was forged", [sent, WORKERS as u64, 0]).await?;
    assert_eq!(setup.envoy.stat("cluster.v3.upstream_rq_total").await?, 0);
    setup.no_trap().await
}

#[tokio::test]
async fn a_version_out_of_service_gets_no_copies_until_it_is_back() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let mirrored = |revision: u64, serving: bool, user: &str| {
        let mut service = service("shop", json!({ "mirror": { "version": "v2" } }));
        service["versions"][1]["serving"] = json!(serving);
        // Which policy is in force shows in who answers.
        service["versions"][0]["weight"] = json!(u32::from(user == "v1"));
        service["versions"][2]["weight"] = json!(u32::from(user == "v3"));
        json!({ "revision": revision, "services": [service] })
    };
    let mut own = mirrored(1, true, "v1");
    own["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
    let build = |bootstrap: Bootstrap| bootstrap.controller(server.address());
    let setup = EnvoyFixture::start_with(own, &VERSIONS, WORKERS, build, mirror_on_every_route).await?;
    let mut workers = EachWorker::open(&setup, setup.get(HOST, "/")).await?;
    let copied = async || setup.envoy.stat("cluster.v2.upstream_rq_total").await;
    workers.all_to("v1").await?;
    let before = copied().await?;
    assert!(before >= WORKERS as u64, "{before}");

    server.publish(&mirrored(2, false, "v3"));
    workers.all_to("v3").await?;
    let before = copied().await?;
    workers.versions().await?;
    assert_eq!(copied().await?, before, "a version out of service gets no copies");

    server.publish(&mirrored(3, true, "v1"));
    workers.all_to("v1").await?;
    let before = copied().await?;
    workers.versions().await?;
    assert_eq!(copied().await?, before + WORKERS as u64);
    setup.no_trap().await
}
