//! Readiness becomes weights, in both directions, while requests go on: not one of them fails, and shares are what the
//! ready endpoints can carry, in the status and by the client's own tally.

use std::time::Duration;

use anyhow::ensure;
use serde_json::json;
use tideshift_tests::backend::Backend;
use tideshift_tests::client::Request;
use tideshift_tests::load::Load;
use tideshift_tests::test_bed::{
    DEADLINE, FOR_EVER, SERVICE, TestBed, assert_counts_agree, assert_shares, next_answers, until, until_shares,
};
use tideshift_tests::wait::eventually;

const WORKERS: usize = 2;
/// Requests per second.
const RATE: f64 = 500.0;
/// The window in which shares are looked at.
const WINDOW: u64 = 400;

fn hold_at(weight: u32) -> serde_json::Value {
    json!({ "target": "v2", "strategy": { "steps": [{ "weight": weight, "holdSeconds": FOR_EVER }] } })
}

/// Waits until requests go to all of `busy` and none to `idle` while so many are answered.
async fn until_spared(load: &Load, idle: &[&Backend], busy: &[&Backend]) -> anyhow::Result<()> {
    const ANSWERS: u64 = 100;
    let requests = |backends: &[&Backend]| backends.iter().map(|b| b.counts().requests).collect::<Vec<_>>();
    eventually("some endpoints to be spared", DEADLINE, async || {
        let (idle_before, busy_before) = (requests(idle), requests(busy));
        next_answers(load, ANSWERS).await?;
        let (idle_after, busy_after) = (requests(idle), requests(busy));
        ensure!(idle_after == idle_before, "{idle_before:?} became {idle_after:?}");
        ensure!(busy_before.iter().zip(&busy_after).all(|(before, after)| after > before), "some got nothing");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_not_ready_is_spared_and_its_version_carries_less() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 2), ("v2", 2)]).await?;
    rig.write(&rig.document(hold_at(20)))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let [one, two] = rig.version("v1") else { unreachable!() };
    let v2: Vec<&Backend> = rig.version("v2").iter().collect();

    until_shares(&controller, "v2 at its step's 20 %", &[80.0, 20.0]).await?;
    assert_shares("at first", &next_answers(&load, WINDOW).await?, &[("v1", 80.0), ("v2", 20.0)], WORKERS);

    // Half of v1 can carry half of the load; v2 has room for the rest, whatever its step says.
    one.set_ready(false);
    let seen = until_shares(&controller, "v1 at what one of its two endpoints carries", &[50.0, 50.0]).await?;
    let not_ready = &seen.version("v1")["endpoints"]["notReady"][0];
    assert_eq!(not_ready["endpoint"], one.address().to_string());
    assert_eq!(not_ready["reason"], "HTTP status 503");
    until_spared(&load, &[one], &[two, v2[0], v2[1]]).await?;
    assert_shares("half of v1", &next_answers(&load, WINDOW).await?, &[("v1", 50.0), ("v2", 50.0)], WORKERS);

    one.set_ready(true);
    until_shares(&controller, "v2 back at its step's 20 %", &[80.0, 20.0]).await?;
    until_spared(&load, &[], &[one, two, v2[0], v2[1]]).await?;
    assert_shares("all of v1", &next_answers(&load, WINDOW).await?, &[("v1", 80.0), ("v2", 20.0)], WORKERS);

    // The target never gets more than it can carry, which is half of the load.
    rig.write(&rig.document(hold_at(90)))?;
    // An edit alone moves no user ahead.
    until(&controller, "the edit to be taken", |seen| {
        ensure!(seen.message().contains("paused until it is promoted or resumed"), "{}", seen.message());
        Ok(())
    })
    .await?;
    let resume = Request::new(controller.address(), "POST", &format!("/v1/rollouts/{SERVICE}/resume"));
    let answer = resume.header("content-type", "application/json").body("{}").send().await?;
    ensure!(answer.status == 200, "{}", answer.text());
    until_shares(&controller, "v2 at 90 %", &[10.0, 90.0]).await?;
    v2[0].set_ready(false);
    let seen = until_shares(&controller, "v2 at what it carries", &[50.0, 50.0]).await?;
    let lost = "step 1: v2 has 1 of 2 endpoints ready that 90 % of the load need; v1 has 50 %, v2 50 %";
    assert_eq!(seen.message(), lost);
    assert_shares("half of v2", &next_answers(&load, WINDOW).await?, &[("v1", 50.0), ("v2", 50.0)], WORKERS);
    until_spared(&load, &[v2[0]], &[one, two, v2[1]]).await?;
    v2[0].set_ready(true);
    until_shares(&controller, "v2 back at 90 %", &[10.0, 90.0]).await?;

    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_without_ready_endpoints_get_nothing_and_others_take_over() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 2), ("v2", 2), ("v3", 1)]).await?;
    rig.write(&rig.document(hold_at(50)))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let backends = |names: &[&str]| names.iter().flat_map(|name| rig.version(name)).collect::<Vec<&Backend>>();

    until_shares(&controller, "half and half", &[50.0, 50.0, 0.0]).await?;
    until_spared(&load, &backends(&["v3"]), &backends(&["v1", "v2"])).await?;

    // What is lost, and the shares (v1, v2, v3) that follow. v3 is of weight 0 in every step.
    let both_ways: [(&[&str], [f64; 3]); 7] = [
        (&["v2"], [100.0, 0.0, 0.0]),
        (&[], [50.0, 50.0, 0.0]),
        (&["v1"], [0.0, 100.0, 0.0]),
        (&[], [50.0, 50.0, 0.0]),
        (&["v1", "v2"], [0.0, 0.0, 100.0]),
        (&["v1"], [0.0, 100.0, 0.0]),
        (&[], [50.0, 50.0, 0.0]),
    ];
    for (lost, shares) in both_ways {
        for version in ["v1", "v2"] {
            rig.set_ready(version, !lost.contains(&version));
        }
        let what = format!("{shares:?} while {lost:?} are lost");
        let seen = until_shares(&controller, &what, &shares).await?;
        let tally = next_answers(&load, WINDOW).await?;
        let due = ["v1", "v2", "v3"].into_iter().zip(shares).collect::<Vec<_>>();
        assert_shares(&what, &tally, &due, WORKERS);
        for (version, share) in &due {
            assert_eq!(seen.version(version)["serving"], !lost.contains(version), "{what}: {version}");
            if *share == 0.0 {
                until_spared(&load, &backends(&[version]), &[]).await?;
            }
        }
        let controller_says = controller.metrics().await?;
        for (version, share) in due {
            let labels = [("service", "shop"), ("version", version)];
            assert_eq!(controller_says.sum("tideshift_controller_version_share_ratio", &labels), Some(share / 100.0));
        }
    }
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_nothing_at_all_is_ready_requests_still_reach_the_stable_version() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(hold_at(50)))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "half and half", &[50.0, 50.0]).await?;
    rig.set_ready("v1", false);
    rig.set_ready("v2", false);
    until_shares(&controller, "nothing in service", &[0.0, 0.0]).await?;
    let tally = next_answers(&load, WINDOW).await?;
    assert_shares("nothing in service", &tally, &[("v1", 100.0), ("v2", 0.0)], WORKERS);
    rig.set_ready("v1", true);
    until_shares(&controller, "v1 back", &[100.0, 0.0]).await?;
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    // Every request is counted once: for its version, or as one that found none.
    let total = tally.answered;
    let seen = until(&controller, "all to be counted", |seen| {
        let unrouted = seen.service()["unrouted"].as_u64().unwrap_or_default();
        ensure!(seen.requests("v1") + seen.requests("v2") + unrouted == total, "not {total} yet");
        Ok(())
    })
    .await?;
    assert!(seen.service()["unrouted"].as_u64() >= Some(WINDOW / 2), "{}", seen.service());
    Ok(())
}

/// What is lost when an endpoint's process is killed under load, its connections and all, and comes back.
async fn kill_endpoints(latency: Duration) -> anyhow::Result<(u64, tideshift_tests::load::Tally)> {
    const KILLS: usize = 4;
    let mut rig = TestBed::new(&[("v1", 3), ("v2", 3)]).await?;
    rig.write(&rig.document(hold_at(50)))?;
    for backend in rig.backends.values().flatten() {
        backend.set(|behaviour| behaviour.latency = latency);
    }
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "half and half", &[50.0, 50.0]).await?;
    next_answers(&load, 100).await?;
    for version in ["v1", "v2"].iter().cycle().take(KILLS) {
        let endpoints = rig.version(version);
        endpoints[0].stop().await;
        until(&controller, "the loss to be seen", |seen| {
            ensure!(seen.ready(version) == 2);
            Ok(())
        })
        .await?;
        next_answers(&load, 200).await?;
        endpoints[0].start_again().await?;
        until(&controller, "the return to be seen", |seen| {
            ensure!(seen.ready(version) == 3);
            Ok(())
        })
        .await?;
        until_spared(&load, &[], &endpoints.iter().collect::<Vec<_>>()).await?;
    }
    let tally = load.stop().await?;
    assert_counts_agree(&controller, &envoy, &tally).await?;
    Ok((KILLS as u64, tally))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_killed_costs_no_request() -> anyhow::Result<()> {
    let (kills, tally) = kill_endpoints(Duration::from_millis(1)).await?;
    println!("{kills} kills, answers after 1 ms: {} of {} requests failed", tally.bad(), tally.sent);
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_under_way_on_an_endpoint_that_is_killed_are_answered_by_another() -> anyhow::Result<()> {
    let (kills, tally) = kill_endpoints(Duration::from_millis(15)).await?;
    println!("{kills} kills, answers after 15 ms: {} of {} requests failed", tally.bad(), tally.sent);
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_that_become_ready_together_share_the_load_from_its_beginning_on() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 2)]).await?;
    rig.set_ready("v2", false);
    rig.write(&rig.document(hold_at(50)))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v1 alone, v2 is not ready", &[100.0, 0.0]).await?;
    rig.set_ready("v2", true);
    until_shares(&controller, "v2 at 50 %", &[50.0, 50.0]).await?;
    next_answers(&load, 100).await?;
    let [one, two] = rig.version("v2") else { unreachable!() };
    let (one, two) = (one.counts().requests, two.counts().requests);
    assert!(one.min(two) * 2 > one.max(two), "{one} and {two}: Envoy's workers do not know both yet");
    assert_eq!(load.stop().await?.bad(), 0);
    Ok(())
}
