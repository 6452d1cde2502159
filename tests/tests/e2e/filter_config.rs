//! The plugin configuration in a real Envoy: what is bad is refused with the field named, at the start and while it
//! runs; what is good takes effect under load with no request lost.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER};
use tideshift_tests::ecds_file::EcdsFile;
use tideshift_tests::envoy::Envoy;
use tideshift_tests::envoy_fixture::{DEADLINE, EnvoyFixture};
use tideshift_tests::load::Plan;
use tideshift_tests::policy_server::PolicyServer;
use tideshift_tests::wait::eventually;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 3;

fn policy(revision: u64, v1: u32, v2: u32) -> Value {
    let versions = json!([{ "name": "v1", "weight": v1 }, { "name": "v2", "weight": v2 }]);
    json!({ "revision": revision, "services": [{ "name": "shop", "hostnames": [HOST], "versions": versions }] })
}

fn with(mut policy: Value, pointer: &str, field: &str, value: Value) -> anyhow::Result<Value> {
    policy.pointer_mut(pointer).context("no such place")?[field] = value;
    Ok(policy)
}

#[tokio::test]
async fn a_bad_policy_does_not_start_and_every_wrong_field_is_named() -> anyhow::Result<()> {
    let bad = policy(1, 90, 10);
    let bad = with(bad, "/services/0/versions/0", "weight", json!("90"))?;
    let bad = with(bad, "/services/0", "hostnames", json!(["shop.example.com:80"]))?;
    let bad =
        with(bad, "/services/0", "rules", json!([{ "matches": [{ "heders": [] }], "versions": [{ "name": "v9" }] }]))?;
    let bad = with(bad, "", "controller", json!({ "cluster": "x", "token": "open sesame" }))?;
    let expected = [
        "plugin configuration: services[0].versions[0].weight: \"90\" is not allowed; expected",
        "plugin configuration: services[0].hostnames[0]: \"shop.example.com:80\" is not allowed; expected",
        "plugin configuration: services[0].rules[0].matches[0].heders: unknown field; did you mean `headers`?",
        "plugin configuration: services[0].rules[0].versions[0].name: \"v9\" is not allowed; expected",
        "plugin configuration: controller.token: ",
    ];
    let bootstrap = Bootstrap::new(bad)?.version("v1", &[]).version("v2", &[]);
    let start = bootstrap.envoy()?.start().await.map(drop).unwrap_err().to_string();
    let validate = Envoy::validate(&bootstrap.to_json()?.to_string()).unwrap_err().to_string();
    for said in [start, validate] {
        for field in expected {
            assert!(said.contains(field), "{field} is not named:\n{said}");
        }
        assert!(!said.contains("sesame"), "the token is shown:\n{said}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_not_even_a_policy_does_not_start() -> anyhow::Result<()> {
    for (bad, expected) in [
        (json!(""), "plugin configuration: \"\" is not allowed; expected an object"),
        (json!({}), "plugin configuration: revision: missing; expected"),
        (json!({ "revision": 1 }), "plugin configuration: services: missing; expected"),
        (json!({ "revision": -1, "services": [] }), "plugin configuration: revision: -1 is not allowed; expected"),
    ] {
        let bootstrap = Bootstrap::new(bad)?.version("v1", &[]);
        let start = bootstrap.envoy()?.start().await.map(drop).unwrap_err().to_string();
        assert!(start.contains(expected), "{expected} is not said:\n{start}");
    }
    Ok(())
}

#[tokio::test]
async fn validate_takes_a_good_policy() -> anyhow::Result<()> {
    let bootstrap = Bootstrap::new(policy(1, 90, 10))?.version("v1", &[]).version("v2", &[]);
    Envoy::validate(&bootstrap.to_json()?.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_under_load_loses_no_request_and_a_bad_one_changes_nothing() -> anyhow::Result<()> {
    const CHANGES: u64 = 10;
    let mut watched = EcdsFile::new()?;
    let patch = |bootstrap: &mut Value| watched.take_from(bootstrap);
    let setup = EnvoyFixture::start_with(policy(1, 1, 0), &["v1", "v2"], WORKERS, |bootstrap| bootstrap, patch).await?;
    let load = Plan::new(setup.address(), HOST).connections(2 * WORKERS).start();
    // Everything goes to one version now: nothing to the other, on any worker, for so many answers in a row.
    let all_to = async |version: &str| {
        let mut before = load.tally();
        eventually(&format!("all requests to go to {version}"), DEADLINE, async || {
            let now = load.tally();
            let since = now.since(&before);
            if since.of(version) < since.answered {
                before = now;
            }
            ensure!(since.answered >= 200 && since.of(version) == since.answered, "{:?}", since.by);
            Ok(())
        })
        .await
    };
    all_to("v1").await?;
    for revision in 2..2 + CHANGES {
        let to_v2 = u32::from(revision % 2 == 0);
        watched.set(&policy(revision, 1 - to_v2, to_v2))?;
        all_to(["v1", "v2"][to_v2 as usize]).await?;
    }

    let bad = with(policy(99, 0, 1), "/services/0/versions/1", "weight", json!(1_000_001))?;
    watched.set(&bad)?;
    eventually("Envoy to refuse the bad one", DEADLINE, async || {
        let field = "plugin configuration: services[0].versions[1].weight: 1000001 is not allowed; expected";
        ensure!(setup.envoy.log().contains(field), "{field} is not in the log");
        let rejected = setup.envoy.stat("extension_config_discovery.http_filter.tideshift.update_rejected").await?;
        ensure!(rejected == 1, "{rejected} configurations were rejected");
        Ok(())
    })
    .await?;
    all_to("v1").await?;
    // And a good one after it.
    watched.set(&policy(100, 0, 1))?;
    all_to("v2").await?;

    let tally = load.stop().await?;
    assert_eq!((tally.bad(), tally.answered), (0, tally.sent), "{tally:?}");
    // Not one count was lost with the configurations that are gone.
    let metrics = setup.settled("shop", tally.sent).await?;
    for version in ["v1", "v2"] {
        assert_eq!(metrics.requests_total("shop", version, "ok"), tally.of(version), "{version}");
    }
    println!("{} requests under {} plugin configurations", tally.sent, CHANGES + 3);
    setup.no_panic()
}

#[tokio::test]
async fn the_controllers_policy_outlives_a_change_of_the_plugin_configuration() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    server.publish(&policy(5, 0, 1));
    let mut watched = EcdsFile::new()?;
    let patch = |bootstrap: &mut Value| watched.take_from(bootstrap);
    let controlled = |policy: Value| with(policy, "", "controller", json!({ "cluster": CONTROLLER_CLUSTER }));
    let build = |bootstrap: Bootstrap| bootstrap.controller(server.address());
    let setup = EnvoyFixture::start_with(controlled(policy(1, 1, 0))?, &["v1", "v2"], WORKERS, build, patch).await?;
    let reported = async |what: &str, revision: u64| {
        eventually(what, DEADLINE + Duration::from_secs(10), async || {
            let report = server.last_report()?;
            let workers = report.workers as usize;
            ensure!(report.revision == revision && report.epoch == "e1" && workers == WORKERS + 1, "{report:?}");
            Ok(report)
        })
        .await
    };
    let before = reported("a report of the controller's policy", 5).await?;
    assert_eq!(setup.choices(HOST, 20).await?, vec!["v2"; 20]);

    // The file's own revision may be higher; what the controller said counts more.
    watched.set(&controlled(policy(9, 1, 0))?)?;
    let in_force = "policy revision 9 of the plugin configuration in force";
    eventually("the new configuration", DEADLINE, async || {
        let times = setup.envoy.log().matches(in_force).count();
        ensure!(times >= WORKERS, "{times} workers have it");
        Ok(())
    })
    .await?;
    for _ in 0..WORKERS {
        assert_eq!(setup.choices(HOST, 20).await?, vec!["v2"; 20]);
    }
    // The controller still reaches all of them, by the new configuration's talk; the old one's has ended.
    server.publish(&policy(6, 1, 0));
    let after = reported("a report of the next policy", 6).await?;
    assert_eq!(setup.choices(HOST, 20).await?, vec!["v1"; 20]);
    assert_eq!(after.start, before.start, "the same run of the proxy");
    setup.no_panic()
}
