//! Warm-up requests: no user reaches a new endpoint before it has answered them, one that does not answer them well is
//! kept out and the status says why, and what has been warmed up once is not bothered again.

use anyhow::ensure;
use serde_json::{Value, json};
use std::time::Duration;
use tideshift_tests::backend::Backend;
use tideshift_tests::test_bed::{
    DEADLINE, FOR_EVER, Seen, TestBed, assert_counts_agree, next_answers, until, until_shares,
};
use tideshift_tests::wait::eventually;

const WORKERS: usize = 2;
const RATE: f64 = 200.0;
const COUNT: u64 = 40;

/// Half of the users for v2, after these requests.
fn half_after(requests: Value) -> Value {
    json!({ "target": "v2", "strategy": {
        "steps": [{ "weight": 50, "holdSeconds": FOR_EVER }], "warmUp": { "requests": requests },
    }})
}

/// Why a version's endpoint is not ready; empty if it is.
fn reason(seen: &Seen, version: &str, backend: &Backend) -> String {
    let not_ready = seen.version(version)["endpoints"]["notReady"].as_array();
    let own = not_ready.into_iter().flatten().find(|state| state["endpoint"] == backend.address().to_string());
    own.and_then(|state| state["reason"].as_str()).unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_user_reaches_a_new_version_before_its_endpoints_have_been_warmed_up() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 2)]).await?;
    // The first is done long before the second, and could carry v2's share alone.
    for (backend, millis) in rig.version("v2").iter().zip([1, 100]) {
        backend.set(|behaviour| behaviour.latency = Duration::from_millis(millis));
    }
    rig.set_ready("v2", false);
    let requests = json!({ "count": COUNT, "concurrency": 4, "paths": ["/", "/cart?warm=1"] });
    rig.write(&rig.document(half_after(requests)))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v1 alone, v2 is not ready", &[100.0, 0.0]).await?;
    rig.set_ready("v2", true);
    let slow = &rig.version("v2")[1];
    until(&controller, "the status to say how far the warm-up is", |seen| {
        let reason = reason(seen, "v2", slow);
        ensure!(reason.starts_with("warming up: ") && reason.ends_with(" of 40 requests"), "{reason}");
        assert_eq!((seen.weights(), seen.ready("v2")), (vec![100.0, 0.0], 0));
        Ok(())
    })
    .await?;
    until_shares(&controller, "v2 at 50 %", &[50.0, 50.0]).await?;
    next_answers(&load, 200).await?;
    slow.set(|behaviour| behaviour.latency = Duration::ZERO);
    let tally = load.stop().await?;
    for backend in rig.version("v2") {
        assert_eq!(backend.asked_before_users(), Some(COUNT), "users came in the middle of the warm-up");
        assert_eq!(backend.asked_directly(), COUNT);
    }
    assert_eq!(rig.version("v1")[0].asked_directly(), 0, "who serves already is not asked");
    assert!(tally.of("v2") > 0 && tally.bad() == 0, "{tally:?}");
    // Warm-up requests are not counted.
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_its_warm_up_gets_no_users_and_the_status_says_why() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let v2 = &rig.version("v2")[0];
    v2.set(|behaviour| behaviour.status = 503);
    rig.write(&rig.document(half_after(json!({ "minPassPercent": 80 }))))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let v2 = &rig.version("v2")[0];
    // Three tries: it goes on being asked.
    let seen = until(&controller, "the third try to fail", |seen| {
        let reason = reason(seen, "v2", v2);
        ensure!(reason == "warm-up: 3 of 10 requests failed (HTTP status 503); next try in 4 s", "{reason}");
        Ok(())
    })
    .await?;
    assert_eq!((seen.weights(), v2.asked_directly()), (vec![100.0, 0.0], 9));
    next_answers(&load, 200).await?;
    assert_eq!(v2.asked_before_users(), None);
    v2.set(|behaviour| behaviour.status = 200);
    until_shares(&controller, "v2 at 50 %", &[50.0, 50.0]).await?;
    next_answers(&load, 100).await?;
    let tally = load.stop().await?;
    assert_eq!((v2.asked_before_users(), v2.asked_directly(), tally.bad()), (Some(9 + 10), 9 + 10, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_warmed_up_is_not_asked_again_unless_it_was_away() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 2)]).await?;
    rig.version("v2")[1].set_ready(false);
    rig.write(&rig.document(half_after(json!({ "count": COUNT }))))?;
    let mut controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v2 at 50 %", &[50.0, 50.0]).await?;
    let [old, new] = rig.version("v2") else { unreachable!("v2 has two endpoints") };
    controller.kill()?;
    next_answers(&load, 50).await?;
    // An endpoint that comes up between probes is as new as before.
    new.set_ready(true);
    controller.start_again().await?;
    let ready = |number: u64| {
        until(&controller, "v2's endpoints", move |seen| {
            ensure!(seen.ready("v2") == number, "{} are ready, not {number}", seen.ready("v2"));
            Ok(())
        })
    };
    let seen = ready(2).await?;
    assert_eq!(seen.weights(), [50.0, 50.0]);
    let v1 = &rig.version("v1")[0];
    assert_eq!((v1.asked_directly(), old.asked_directly(), new.asked_directly()), (0, COUNT, COUNT));

    old.set_ready(false);
    ready(1).await?;
    let probes = old.counts().health;
    eventually("some more probes", DEADLINE, async || {
        // Envoy's and the controller's, ten each second.
        ensure!(old.counts().health >= probes + 20);
        Ok(())
    })
    .await?;
    old.set_ready(true);
    ready(2).await?;
    assert_eq!((v1.asked_directly(), old.asked_directly(), new.asked_directly()), (0, 2 * COUNT, COUNT));
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}
