//! Controllers and Envoys that are killed: traffic does not notice, rollouts go on where they were, and no request is
//! counted twice or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::test_bed::{
    DEADLINE, FOR_EVER, SERVICE, Seen, TestBed, assert_counts_agree, assert_shares, counts_of, counts_of_envoy,
    next_answers, revisions, until, until_shares,
};
use tideshift_tests::wait::eventually;
use tokio::time::Instant;

const WORKERS: usize = 2;
const RATE: f64 = 400.0;

fn steps(steps: &[(u32, u64)]) -> Value {
    let steps: Vec<_> = steps.iter().map(|(weight, hold)| json!({ "weight": weight, "holdSeconds": hold })).collect();
    json!({ "target": "v2", "strategy": { "steps": steps } })
}

/// The revision, and the step of the rollout counted from 0, that the controller would go on from.
fn kept(rig: &TestBed) -> anyhow::Result<(u64, u64)> {
    let file: Value = serde_json::from_slice(&fs::read(rig.state_dir().join("rollouts.json"))?)?;
    let kept = &file["content"];
    let step = kept["rollouts"][SERVICE]["step"].as_u64().context("no step")?;
    Ok((kept["revision"].as_u64().context("no revision")?, step))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_in_the_middle_of_a_step_changes_nothing_for_traffic() -> anyhow::Result<()> {
    const KILLS: usize = 4;
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(steps(&[(30, FOR_EVER)])))?;
    let mut controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let before = until_shares(&controller, "v2 at 30 %", &[70.0, 30.0]).await?;
    let start = load.tally();
    let mut away = Duration::ZERO;
    for _ in 0..KILLS {
        next_answers(&load, 150).await?;
        controller.kill()?;
        let killed = Instant::now();
        next_answers(&load, 250).await?;
        controller.start_again().await?;
        away += killed.elapsed();
        let seen = Seen::now(&controller).await?;
        assert_eq!((seen.0["epoch"].as_str(), seen.revision()), (before.0["epoch"].as_str(), before.revision()));
        assert_eq!((seen.phase(), seen.step(), seen.weights()), ("Progressing", Some(1), vec![70.0, 30.0]));
        assert_eq!(seen.service()["since"], before.service()["since"]);
    }
    // Not even a moment at other weights: they would show in the sum over all of it.
    let whole = load.tally().since(&start);
    let windows = 1 + whole.answered as usize / 1_000;
    assert_shares("from the first kill to the last", &whole, &[("v1", 70.0), ("v2", 30.0)], WORKERS * windows);
    assert_eq!(revisions(&envoy), [before.revision()], "the same revision is not taken twice");
    until_shares(&controller, "the proxy to report again", &[70.0, 30.0]).await?;
    let tally = load.stop().await?;
    println!(
        "{KILLS} kills, {:.1} s without a controller: {} of {} failed",
        away.as_secs_f64(),
        tally.bad(),
        tally.sent
    );
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_goes_on_through_kills_without_a_step_twice_or_left_out() -> anyhow::Result<()> {
    const STEPS: [(u32, u64); 3] = [(20, 2), (50, 2), (80, 2)];
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(steps(&STEPS)))?;
    let mut controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let mut places = vec![kept(&rig)?];
    let mut tallies = vec![load.tally()];
    let mut kills = 0;
    for step in 1..=STEPS.len() as u64 {
        // Twice in a row, in the middle of the step.
        for _ in 0..2 {
            next_answers(&load, 150).await?;
            controller.kill()?;
            kills += 1;
            places.push(kept(&rig)?);
            controller.start_again().await?;
            places.push(kept(&rig)?);
            tallies.push(load.tally());
        }
        let ended = until(&controller, "the end of the step", |seen| {
            ensure!(seen.phase() == "Succeeded" || seen.step() > Some(step), "step {:?}", seen.step());
            Ok(())
        })
        .await?;
        tallies.push(load.tally());
        if ended.phase() == "Succeeded" {
            break;
        }
    }
    let seen = until_shares(&controller, "v2 alone", &[0.0, 100.0]).await?;
    places.push((seen.revision(), 4));
    assert!(kills >= 3, "{kills} kills are not many");
    assert!(places.is_sorted(), "neither the revision nor the step goes back: {places:?}");
    let first = places[0].0;
    // One revision for each share, each of them once and in order.
    assert_eq!(revisions(&envoy), (first..first + 4).collect::<Vec<u64>>());
    // The target's share only rises.
    let shares: Vec<f64> = tallies.windows(2).map(|pair| pair[1].since(&pair[0]).share("v2")).collect();
    assert!(shares.windows(2).all(|pair| pair[1] > pair[0] - 0.1), "{shares:?}");
    next_answers(&load, 200).await?;
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_is_killed_takes_along_only_what_it_has_not_reported() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(steps(&[(30, FOR_EVER)])))?;
    let controller = rig.start_controller().await?;
    let mut envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v2 at 30 %", &[70.0, 30.0]).await?;
    next_answers(&load, 500).await?;
    let first = load.stop().await?;
    assert_eq!(first.bad(), 0, "{first:?}");
    assert_counts_agree(&controller, &envoy, &first).await?;

    // Killed under load: the responses since its last report, at most one second's, are lost.
    let load = rig.load(RATE);
    next_answers(&load, 600).await?;
    let of_first_run = counts_of_envoy(&envoy.prometheus().await?);
    let reported = Seen::now(&controller).await?;
    envoy.kill()?;
    let second = load.stop().await?;
    let kept = Seen::now(&controller).await?.counts();
    for (key, count) in &kept {
        let before = reported.counts().get(key).copied().unwrap_or_default();
        let answered = counts_of(&first).get(key).copied().unwrap_or_default()
            + counts_of(&second).get(key).copied().unwrap_or_default();
        assert!((before..=answered).contains(count), "{key:?}: {before}, {count}, {answered}");
    }
    let sum = |counts: &BTreeMap<_, u64>| counts.values().sum::<u64>();
    println!(
        "an Envoy killed at {RATE} requests/s: {} of the {} answers of its run were never reported",
        (first.answered + second.answered).saturating_sub(sum(&kept)),
        sum(&of_first_run)
    );

    let envoy = rig.start_envoy(WORKERS).await?;
    until(&controller, "the new run of the proxy", |seen| {
        let runs = seen.0["proxies"].as_array().map_or(0, Vec::len);
        ensure!(runs == 2 && seen.0["proxies"].as_array().is_some_and(|p| p.iter().all(|p| p["id"] == "tideshift")));
        Ok(())
    })
    .await?;
    let load = rig.load(RATE);
    next_answers(&load, 500).await?;
    let third = load.stop().await?;
    assert_eq!(third.bad(), 0, "{third:?}");
    // Exactly what had been reported of the first run, and all of the second.
    let mut expected = kept;
    for (key, count) in counts_of(&third) {
        *expected.entry(key).or_default() += count;
    }
    eventually("the sum over both runs", DEADLINE, async || {
        let counts = Seen::now(&controller).await?.counts();
        ensure!(counts == expected, "{counts:?}, not {expected:?}");
        ensure!(counts_of_envoy(&envoy.prometheus().await?) == counts_of(&third), "Envoy counts from nothing");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_starts_without_a_controller_serves_the_stable_version_until_there_is_one() -> anyhow::Result<()>
{
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let beta = json!({ "name": "beta", "matches": [{ "headers": [{ "name": "x-beta", "value": "1" }] }],
        "versions": [{ "name": "v2" }] });
    let mut document = rig.document(steps(&[(60, FOR_EVER)]));
    document["spec"]["rules"] = json!([beta]);
    rig.write(&document)?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let alone = next_answers(&load, 500).await?;
    assert_eq!((alone.of("v1"), alone.answered), (alone.answered, alone.answered), "{alone:?}");
    let get = tideshift_tests::client::get(rig.address(), "/").host(tideshift_tests::test_bed::HOST);
    let tester = get.header("x-beta", "1").send().await?;
    assert_eq!(tester.header("x-served-by").as_deref(), Some("v2"), "rules hold without a controller");

    let controller = rig.start_controller().await?;
    until_shares(&controller, "v2 at 60 %", &[40.0, 60.0]).await?;
    let tally = next_answers(&load, 600).await?;
    assert_shares("with the controller", &tally, &[("v1", 40.0), ("v2", 60.0)], WORKERS);
    let mut tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    // What was answered before there was a controller is counted as well, the tester's request too.
    tally.sent += 1;
    tally.answered += 1;
    *tally.by.entry(("v2".to_owned(), 200)).or_default() += 1;
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_takes_no_service_away_from_proxies_while_another_is_probed_for_the_first_time() -> anyhow::Result<()>
{
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let shop = rig.document(steps(&[(30, FOR_EVER)]));
    // Its second version is not ready, and after a restart it is unknown for how long.
    let late = json!({ "tcpSocket": {}, "initialDelaySeconds": FOR_EVER });
    let other = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": "other" },
        "spec": { "hostnames": ["other.example.com"], "stable": "v1", "versions": [
            { "name": "v1", "endpoints": [rig.version("v1")[0].address().to_string()] },
            { "name": "v2", "endpoints": [rig.version("v2")[0].address().to_string()], "readinessProbe": late },
        ]},
    });
    fs::write(rig.file(), format!("{shop}\n---\n{other}\n"))?;
    let mut controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let call = tideshift_tests::client::get(rig.address(), "/").host("other.example.com");
    let seen = until_shares(&controller, "v2 of the shop at 30 %", &[70.0, 30.0]).await?;
    assert_eq!(call.send().await?.header("x-served-by").as_deref(), Some("v1"));
    controller.kill()?;
    controller.start_again().await?;
    let after = until_shares(&controller, "the proxy to report again", &[70.0, 30.0]).await?;
    assert_eq!(after.revision(), seen.revision(), "the same policy keeps its revision");
    assert_eq!(call.send().await?.header("x-served-by").as_deref(), Some("v1"));
    eventually("the other service's requests to be counted", DEADLINE, async || {
        let counted = envoy.prometheus().await?.requests_total("other", "v1", "ok");
        ensure!(counted == 2, "{counted} of 2: the service is not in the policy");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_from_the_time_without_a_controller_count_before_the_next_step_does() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(steps(&[(30, 2), (60, FOR_EVER)])))?;
    rig.set_ready("v2", false);
    let mut controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v1 alone, v2 is not ready", &[100.0, 0.0]).await?;
    rig.set_ready("v2", true);
    let seen = until_shares(&controller, "the first step", &[70.0, 30.0]).await?;
    controller.kill()?;
    let step = kept(&rig)?;
    rig.version("v2")[0].set(|behaviour| behaviour.status = 500);
    // The step's two seconds are over when the controller is back.
    next_answers(&load, 1000).await?;
    controller.start_again().await?;
    let failed = until(&controller, "the target to be taken back", |seen| {
        ensure!(seen.phase() == "Failed" && seen.is_in_force(), "not yet");
        Ok(())
    })
    .await?;
    let tally = load.stop().await?;
    if step == (seen.revision(), 0) {
        // Of the killed controller's first step: the next revision takes v2 back, and none gave it more.
        assert_eq!((failed.revision(), failed.weights()), (seen.revision() + 1, vec![100.0, 0.0]));
    }
    assert!(tally.of_class("v2", 5) > 10, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}
