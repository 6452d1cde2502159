//! Rollouts from a document to the proxies: steps with holds, changes of the document half-way, documents that are wrong,
//! and a target that is taken back because it fails.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::Errors;
use tideshift_tests::controller::Controller;
use tideshift_tests::load::{Load, Tally};
use tideshift_tests::test_bed::{
    DEADLINE, FOR_EVER, SERVICE, Seen, TestBed, assert_counts_agree, assert_shares, next_answers, until, until_shares,
};
use tideshift_tests::wait::eventually;

const WORKERS: usize = 2;
const RATE: f64 = 400.0;
const WINDOW: u64 = 600;

fn steps(target: &str, steps: &[(u32, u64)]) -> Value {
    let steps: Vec<_> = steps.iter().map(|(weight, hold)| json!({ "weight": weight, "holdSeconds": hold })).collect();
    json!({ "target": target, "strategy": { "steps": steps } })
}

/// One look at a rollout under load. The tallies were taken before and after the status was asked for.
struct Look {
    seen: Seen,
    before: Tally,
    after: Tally,
}

/// Looks on until the rollout is in `phase`.
async fn watch(controller: &Controller, load: &Load, phase: &str) -> anyhow::Result<Vec<Look>> {
    let mut looks = Vec::new();
    eventually(&format!("the phase {phase}"), DEADLINE, async || {
        let before = load.tally();
        let seen = Seen::now(controller).await?;
        let (after, ended) = (load.tally(), seen.phase() == phase && seen.is_in_force());
        looks.push(Look { before, seen, after });
        ensure!(ended, "{}", looks.last().context("a look")?.seen.service());
        Ok(())
    })
    .await?;
    Ok(looks)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_goes_through_its_steps_and_gives_each_the_share_that_it_says() -> anyhow::Result<()> {
    const STEPS: [(u32, u64); 3] = [(10, 3), (50, 2), (75, 2)];
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let seen = until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    assert_eq!((seen.phase(), seen.step()), ("Initialized", None));

    rig.write(&rig.document(steps("v2", &STEPS)))?;
    let looks = watch(&controller, &load, "Succeeded").await?;
    for (number, (weight, hold)) in (1..).zip(STEPS) {
        let of_step: Vec<&Look> = looks.iter().filter(|look| look.seen.step() == Some(number)).collect();
        let step = &of_step.first().with_context(|| format!("step {number} was never seen"))?.seen.service()["step"];
        let said = (&step["of"], &step["weight"], &step["holdSeconds"]);
        assert_eq!(said, (&json!(4), &json!(weight), &json!(hold)), "the last step is always 100 %");
        let mut in_force = of_step.iter().filter(|look| look.seen.is_in_force());
        let first = in_force.next().with_context(|| format!("step {number} was never in force"))?;
        let last = in_force.next_back().with_context(|| format!("step {number} was in force for one look"))?;
        let share = f64::from(weight);
        assert_eq!(first.seen.weights(), [100.0 - share, share]);
        let tally = last.before.since(&first.after);
        assert!(tally.answered >= 200, "step {number} was in force for {} answers only", tally.answered);
        assert_shares(
            &format!("step {number}"),
            &tally,
            &[("v1", 100.0 - share), ("v2", share)],
            WORKERS * (1 + tally.answered as usize / 1_000),
        );
    }
    let mut numbers: Vec<u64> = looks.iter().filter_map(|look| look.seen.step()).collect();
    numbers.dedup();
    assert!(numbers == [1, 2, 3] || numbers == [1, 2, 3, 4], "each step once, in order: {numbers:?}");
    let ended = &looks.last().context("no look")?.seen;
    assert_eq!(ended.weights(), [0.0, 100.0]);
    assert_eq!((ended.service()["stable"].as_str(), ended.message()), (Some("v2"), "v2 serves everything"));
    assert_shares("at the end", &next_answers(&load, 200).await?, &[("v1", 0.0), ("v2", 100.0)], WORKERS);
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_document_supersedes_what_is_under_way() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1), ("v3", 1)]).await?;
    let hold = |target, weight| rig.document(steps(target, &[(weight, FOR_EVER)]));
    rig.write(&hold("v2", 40))?;
    // The documents, before the rig lends itself to the controller.
    let (other_target, other_step) = (hold("v3", 30), hold("v3", 20));
    let (back, nothing) = (hold("v1", 20), rig.document(json!({})));
    let promoted = rig.document(json!({ "stable": "v3" }));
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v2 at 40 %", &[60.0, 40.0, 0.0]).await?;

    rig.replace(&other_target)?;
    let seen = until_shares(&controller, "v3 instead of v2, by rename", &[70.0, 0.0, 30.0]).await?;
    assert_eq!((seen.phase(), seen.service()["target"].as_str()), ("Progressing", Some("v3")));
    let tally = next_answers(&load, WINDOW).await?;
    assert_shares("v3 supersedes", &tally, &[("v1", 70.0), ("v2", 0.0), ("v3", 30.0)], WORKERS);

    rig.write(&other_step)?;
    until_shares(&controller, "another share of the same step, in place", &[80.0, 0.0, 20.0]).await?;
    rig.write(&back)?;
    let seen = until_shares(&controller, "the stable version as the target", &[100.0, 0.0, 0.0]).await?;
    assert_eq!((seen.phase(), seen.service().get("target")), ("Initialized", None));
    rig.write(&other_step)?;
    until_shares(&controller, "the same target once more", &[80.0, 0.0, 20.0]).await?;
    rig.replace(&nothing)?;
    until_shares(&controller, "no target", &[100.0, 0.0, 0.0]).await?;
    rig.write(&promoted)?;
    let seen = until_shares(&controller, "v3 as the stable version", &[0.0, 0.0, 100.0]).await?;
    assert_eq!((seen.phase(), seen.service()["stable"].as_str()), ("Initialized", Some("v3")));

    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capacity_and_versions_may_change_while_a_rollout_is_under_way() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 2), ("v2", 1)]).await?;
    let mut document = rig.document(steps("v2", &[(80, FOR_EVER)]));
    rig.write(&document)?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v2 at what one endpoint of two carries", &[50.0, 50.0]).await?;
    document["spec"]["capacity"] = json!({ "endpointsForFullLoad": 1 });
    rig.write(&document)?;
    until_shares(&controller, "v2 at its step, since one endpoint carries all", &[20.0, 80.0]).await?;
    // A version more is nothing to the others.
    let versions = document["spec"]["versions"].as_array_mut().context("versions")?;
    versions.push(json!({ "name": "v3" }));
    rig.write(&document)?;
    let seen = until_shares(&controller, "a version more", &[20.0, 80.0, 0.0]).await?;
    assert_eq!(seen.version("v3")["endpoints"], json!({ "ready": 0, "listed": 0 }));
    // The present stable version is gone, and with it what would be gone back to.
    document["spec"]["versions"].as_array_mut().context("versions")?.remove(0);
    document["spec"]["stable"] = json!("v2");
    rig.write(&document)?;
    until_shares(&controller, "v2 alone", &[100.0, 0.0]).await?;
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}

/// v2 serves everything and is renamed v3 in place, which is not ready yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_renamed_in_place_under_load_costs_no_request() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1), ("v3", 1)]).await?;
    let mut renamed = rig.document(json!({ "target": "v3" }));
    renamed["spec"]["versions"].as_array_mut().context("versions")?.retain(|version| version["name"] != "v2");
    rig.set_ready("v3", false);
    rig.write(&rig.document(json!({ "target": "v2" })))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v2 alone", &[0.0, 100.0, 0.0]).await?;
    let load = rig.load(RATE);
    rig.set_ready("v1", false);
    rig.write(&renamed)?;
    until_shares(&controller, "v2, which has left", &[0.0, 0.0, 100.0]).await?;
    until(&controller, "the deadline of what has left", |seen| {
        let expected = "v2 left the document; it keeps serving until v3 is ready, at the latest at 2";
        ensure!(seen.message().contains(expected), "{}", seen.message());
        Ok(())
    })
    .await?;
    rig.set_ready("v3", true);
    until_shares(&controller, "v3 alone", &[0.0, 100.0]).await?;
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_is_wrong_changes_nothing_and_says_everything() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let good = rig.document(steps("v2", &[(30, FOR_EVER)]));
    let mut bad = good.clone();
    bad["spec"]["target"] = json!("v9");
    bad["spec"]["strategy"]["steps"][0]["weight"] = json!(101);
    bad["spec"]["versions"][1]["readinesProbe"] = json!({});
    bad["spec"]["drain"] = json!({ "timeoutSeconds": -1 });
    rig.write(&good)?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let before = until_shares(&controller, "v2 at 30 %", &[70.0, 30.0]).await?;

    rig.write(&bad)?;
    let file = rig.file().display().to_string();
    let expected: Vec<String> = [
        "spec.versions[1].readinesProbe: unknown field; did you mean `readinessProbe`?",
        "spec.target: \"v9\" is not allowed; expected one of the versions v1, v2",
        "spec.strategy.steps[0].weight: 101 is not allowed; expected an integer from 0 to 100",
        "spec.drain.timeoutSeconds: -1 is not allowed; expected an integer from 0 to 31536000",
    ]
    .map(|error| format!("{file}: {error}"))
    .to_vec();
    let seen = until(&controller, "the errors", |seen| {
        ensure!(seen.0["documentErrors"].as_array().is_some_and(|errors| errors.len() == expected.len()));
        Ok(())
    })
    .await?;
    for (error, expected) in seen.0["documentErrors"].as_array().context("a list")?.iter().zip(&expected) {
        assert!(error.as_str().is_some_and(|error| error.starts_with(expected)), "{error}, not {expected}");
    }
    assert_eq!(controller.metrics().await?.sum("tideshift_controller_document_errors", &[]), Some(4.0));
    let logged: Vec<Value> = controller.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    for expected in &expected {
        let is_it = |line: &&Value| line["message"].as_str().is_some_and(|message| message.starts_with(expected));
        let line = logged.iter().find(is_it).with_context(|| format!("not logged: {expected}"))?;
        assert_eq!(line["level"], "ERROR");
    }
    // As it was, in every respect.
    assert_eq!((seen.revision(), seen.step(), seen.weights()), (before.revision(), Some(1), vec![70.0, 30.0]));
    let tally = next_answers(&load, WINDOW).await?;
    assert_shares("under a wrong document", &tally, &[("v1", 70.0), ("v2", 30.0)], WORKERS);
    rig.set_ready("v2", false);
    until_shares(&controller, "readiness to be heeded as before", &[100.0, 0.0]).await?;
    rig.set_ready("v2", true);
    until_shares(&controller, "v2 back", &[70.0, 30.0]).await?;

    fs::write(rig.file(), "spec: [\n")?;
    until(&controller, "the error of what is not YAML", |seen| {
        let error = seen.0["documentErrors"][0].as_str().unwrap_or_default();
        ensure!(error.contains("not YAML") && error.contains("line"), "{error}");
        Ok(())
    })
    .await?;
    fs::remove_file(rig.file())?;
    until(&controller, "the error of a file that is gone", |seen| {
        let error = seen.0["documentErrors"][0].as_str().unwrap_or_default();
        ensure!(error == format!("{file}: cannot be read: no such file or directory"), "{error}");
        Ok(())
    })
    .await?;
    rig.write(&good)?;
    let seen = until(&controller, "no errors", |seen| {
        ensure!(seen.0.get("documentErrors").is_none());
        Ok(())
    })
    .await?;
    assert_eq!((seen.step(), seen.weights()), (Some(1), vec![70.0, 30.0]));
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}

/// A target at `weight` percent that begins to answer 500 to a part of its requests; what that cost.
async fn roll_back(weight: u32, errors: Errors) -> anyhow::Result<Seen> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(steps("v2", &[(weight, FOR_EVER)])))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    let share = f64::from(weight);
    until_shares(&controller, "v2 at its step", &[100.0 - share, share]).await?;
    next_answers(&load, 200).await?;

    rig.version("v2")[0].set(|behaviour| behaviour.errors = errors);
    let seen = until_shares(&controller, "the target's weight to be 0", &[100.0, 0.0]).await?;
    next_answers(&load, 200).await?;
    let tally = load.stop().await?;
    let times = tally.times.get("v2").context("v2 was never called")?;
    let took = times.last_sent.saturating_duration_since(times.first_error.context("no error")?);
    println!(
        "v2 at {weight} % of {RATE} requests/s, {} of {} fail: {} failed requests, {:.2} s from the first error to the \
         last request of v2",
        errors.bad,
        errors.of,
        tally.of_class("v2", 5),
        took.as_secs_f64()
    );
    assert_eq!((seen.phase(), seen.service()["target"].as_str()), ("Failed", Some("v2")));
    assert_eq!((tally.failed, tally.of_class("v1", 2)), (0, tally.of("v1")), "only v2 fails: {tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await?;
    let seen = Seen::now(&controller).await?;
    assert_eq!(seen.count("v2", "error"), tally.of_class("v2", 5));
    let by_version = [("service", SERVICE), ("version", "v2"), ("outcome", "error")];
    let metrics = controller.metrics().await?;
    assert_eq!(metrics.sum("tideshift_controller_requests_total", &by_version), Some(tally.of_class("v2", 5) as f64));
    let failed = [("rollout", SERVICE), ("phase", "Failed")];
    assert_eq!(metrics.sum("tideshift_controller_rollout_phase", &failed), Some(1.0));
    Ok(seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_fails_every_request_is_taken_back_at_once() -> anyhow::Result<()> {
    let seen = roll_back(10, Errors { bad: 1, of: 1 }).await?;
    let counts: BTreeMap<_, _> = seen.counts();
    assert!(counts.contains_key(&("v2".to_owned(), "error".to_owned())), "{counts:?}");
    assert!(
        seen.message().starts_with("v2 is worse than v1: ") && seen.message().contains("; back to v1 "),
        "{}",
        seen.message()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_fails_a_part_of_its_requests_is_taken_back() -> anyhow::Result<()> {
    let seen = roll_back(50, Errors { bad: 1, of: 5 }).await?;
    assert!(seen.message().ends_with("back to v1 as far as it can carry the load"), "{}", seen.message());
    Ok(())
}
