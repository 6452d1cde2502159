//! A controller that is killed again and again, in the middle of anything: the rollout goes on where it was, traffic does
//! not notice, and nothing is counted or judged twice or not at all.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::client::Request;
use tideshift_tests::controller::Controller;
use tideshift_tests::envoy::Envoy;
use tideshift_tests::load::Load;
use tideshift_tests::test_bed::{
    CONNECTIONS, DEADLINE, FOR_EVER, SERVICE, Seen, TestBed, assert_counts_agree, next_answers, revisions, until,
    until_shares,
};

const WORKERS: usize = 2;
const RATE: f64 = 400.0;
/// Weights and holds in seconds; the verdict needs one or two more for each.
const STEPS: [(u32, u64); 6] = [(15, 1), (25, 1), (35, 2), (50, 1), (70, 1), (85, 1)];

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After so many answers to clients.
    Any(u64),
    /// While it writes its state.
    Write,
    /// Once it has persisted the beginning of the next step; most likely before it is published.
    NextStep,
    /// Once the proxy has taken a newer policy.
    Policy,
}

/// What has been seen, of which nothing goes back.
#[derive(Default)]
struct Looks {
    epoch: Option<Value>,
    /// The policy of each revision.
    policies: BTreeMap<u64, String>,
    step: u64,
}

impl Looks {
    /// Returns whether the rollout has ended.
    async fn add(&mut self, controller: &Controller, envoy: &Envoy) -> anyhow::Result<bool> {
        let seen = Seen::now(controller).await?;
        let epoch = self.epoch.get_or_insert_with(|| seen.0["epoch"].clone());
        ensure!(*epoch == seen.0["epoch"], "another state: {}", seen.0["epoch"]);
        let policy = controller.get("/v1/policy?proxy=probe&epoch=&after=0").await?;
        let revision = serde_json::from_str::<Value>(&policy)?["revision"].as_u64().context("no revision")?;
        let newest = self.policies.keys().copied().chain(revisions(envoy)).max().unwrap_or_default();
        ensure!(revision >= newest, "revision {revision} after {newest}");
        let known = self.policies.entry(revision).or_insert_with(|| policy.clone());
        ensure!(*known == policy, "revision {revision} is two policies: {known} and {policy}");
        let ended = seen.phase() == "Succeeded";
        ensure!(ended || seen.phase() == "Progressing", "{}: {}", seen.phase(), seen.message());
        let step = if ended { u64::MAX } else { seen.step().context("no step")? };
        ensure!(step >= self.step, "step {step} after {}", self.step);
        self.step = step;
        Ok(ended)
    }
}

/// What the controller would go on from.
fn kept(rig: &TestBed) -> anyhow::Result<Value> {
    let mut file: Value = serde_json::from_slice(&fs::read(rig.state_dir().join("rollouts.json"))?)?;
    Ok(file["content"].take())
}

/// How far the rollout is: whether it has ended, and the index of its step.
fn place(kept: &Value) -> (bool, Option<u64>) {
    let rollout = &kept["rollouts"][SERVICE];
    (rollout["phase"] == "Succeeded", rollout["step"].as_u64())
}

/// Looks all the time: what is waited for may be over within less than a millisecond.
fn watch(mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    tokio::task::block_in_place(|| {
        let begun = Instant::now();
        while !holds() {
            ensure!(begun.elapsed() < DEADLINE, "it does not come");
        }
        Ok(())
    })
}

/// Lets it come to that moment, and kills it. Returns whether it was in the middle of a write.
async fn kill(
    controller: &mut Controller,
    rig: &TestBed,
    envoy: &Envoy,
    load: &Load,
    moment: Moment,
) -> anyhow::Result<bool> {
    let place_before = place(&kept(rig)?);
    match moment {
        Moment::Any(answers) => drop(next_answers(load, answers).await?),
        Moment::NextStep => watch(|| kept(rig).is_ok_and(|kept| place(&kept) > place_before))?,
        Moment::Policy => {
            let before = revisions(envoy).len();
            let has_ended = || kept(rig).is_ok_and(|kept| place(&kept).0);
            watch(|| revisions(envoy).len() > before || has_ended())?;
        }
        Moment::Write => {
            // The file that an earlier kill left behind stays until the next write.
            let new = ["rollouts.new", "counts.new"].map(|name| rig.state_dir().join(name));
            let mut there = [true; 2];
            let mut begun = None;
            watch(|| {
                let now = [new[0].exists(), new[1].exists()];
                begun = (0..2).find(|i| now[*i] && !there[*i]);
                there = now;
                begun.is_some()
            })?;
            controller.kill()?;
            return Ok(begun.is_some_and(|i| new[i].exists()));
        }
    }
    controller.kill()?;
    Ok(false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_rollout_goes_on_where_it_was_however_often_the_controller_is_killed() -> anyhow::Result<()> {
    let seed = env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut random = fastrand::Rng::with_seed(seed);

    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let steps: Vec<_> = STEPS.iter().map(|(weight, hold)| json!({ "weight": weight, "holdSeconds": hold })).collect();
    let analysis = json!({ "maxErrorRate": 0.05 });
    let wanted = json!({ "target": "v2", "strategy": { "steps": steps }, "analysis": analysis });
    let (before, wanted) = (rig.document(json!({})), rig.document(wanted));
    rig.write(&before)?;
    let mut controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(RATE);
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    rig.write(&wanted)?;

    watch(|| kept(&rig).is_ok_and(|kept| kept["rollouts"][SERVICE]["number"] == 1))?;

    let mut looks = Looks::default();
    ensure!(!looks.add(&controller, &envoy).await?, "it has ended before it is killed");
    let (mut kills, mut in_a_write, mut away) = (0, 0, Duration::ZERO);
    // What v2 had answered at the last two kills, and its share between them.
    let (mut answered, mut shares) = ([0; 2], Vec::new());
    let mut ended = false;
    while !ended {
        let any = [10..100, 100..400].map(|answers| Moment::Any(random.u64(answers)));
        let step = if random.bool() { Moment::NextStep } else { Moment::Policy };
        let mut moments = [any[0], any[1], Moment::Write, step];
        random.shuffle(&mut moments);
        let before = load.tally();
        for moment in moments {
            in_a_write += usize::from(kill(&mut controller, &rig, &envoy, &load, moment).await?);
            kills += 1;
            let killed = Instant::now();
            answered = [answered[1], load.tally().of("v2")];
            if random.bool() {
                next_answers(&load, random.u64(10..300)).await?;
            }
            controller.start_again().await?;
            away += killed.elapsed();
            let looked = looks.add(&controller, &envoy).await;
            ended = looked.with_context(|| format!("kill {kills}, {moment:?}: {}", controller.tail()))?;
            if ended {
                break;
            }
        }
        shares.push(load.tally().since(&before).share("v2"));
    }
    let seen = until_shares(&controller, "v2 alone", &[0.0, 100.0]).await?;
    let tally = load.stop().await?;
    println!(
        "{kills} kills (SEED={seed}), {in_a_write} in the middle of a write, {:.1} s without a controller: {} of {} \
         requests failed",
        away.as_secs_f64(),
        tally.bad(),
        tally.sent
    );
    ensure!(kills >= 20 && in_a_write > 0, "{kills} kills, {in_a_write} in the middle of a write");
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await?;
    assert!(shares.windows(2).all(|pair| pair[1] > pair[0] - 0.1), "the target's share only rises: {shares:?}");

    // What the proxy took, each of it once and in order.
    let taken = revisions(&envoy);
    assert!(taken.is_sorted_by(|before, after| before < after), "{taken:?}");
    assert_eq!(taken.last(), Some(&seen.revision()));
    // What happened, by the state that all lives of the controller have written.
    let kept = kept(&rig)?;
    let history = kept["history"][SERVICE].as_array().context("no history")?;
    let times: Vec<_> = history.iter().map(|transition| transition["time"].as_u64()).collect();
    assert!(times.is_sorted(), "{history:?}");
    let of = |reasons: &[&str]| {
        let of = history.iter().filter(|transition| reasons.iter().any(|reason| transition["reason"] == *reason));
        of.map(|transition| (transition["rollout"].as_u64(), transition["step"].as_u64())).collect::<Vec<_>>()
    };
    let steps = (0..=STEPS.len() as u64).map(|step| (Some(1), Some(step)));
    assert_eq!(of(&["Started", "StepStarted"]), steps.collect::<Vec<_>>(), "{history:#?}");
    assert_eq!(of(&["Completed"]), [(Some(1), None)]);
    // All of the target's requests were judged, those from the time without a controller too, and none of them twice.
    let judged = &seen.service()["verdict"]["target"];
    let requests = judged["requests"].as_u64().context("no verdict")?;
    assert!((answered[0]..=answered[1] + CONNECTIONS as u64).contains(&requests), "{requests} judged, {answered:?}");
    assert_eq!(judged["errors"], 0);
    Ok(())
}

/// The filter gives up a report that is not answered and sends the next one, so that a controller that has stood still
/// reads several at once, in any order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_counted_twice_when_the_controller_stands_still_for_a_while() -> anyhow::Result<()> {
    // Three reports are given up in each; which one is read first is a matter of luck.
    const STOPS: [u64; 2] = [12, 22];
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let steps = json!([{ "weight": 20, "holdSeconds": FOR_EVER }]);
    rig.write(&rig.document(json!({ "target": "v2", "strategy": { "steps": steps } })))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(100.0);
    until_shares(&controller, "the first step", &[80.0, 20.0]).await?;
    for stop in STOPS {
        next_answers(&load, 100).await?;
        controller.stand_still()?;
        // A few more answers than there may be until then, as a clock.
        let stood = next_answers(&load, 100 * stop).await;
        controller.go_on()?;
        let before = load.tally();
        ensure!(stood?.bad() == 0, "users noticed");
        let most = |seen: &Seen| seen.counts().values().sum::<u64>() <= load.tally().sent;
        while load.tally().since(&before).answered < 200 {
            ensure!(most(&Seen::now(&controller).await?), "more is counted than was asked");
        }
    }
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert_counts_agree(&controller, &envoy, &tally).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_was_told_is_done_survives_a_kill_right_after_the_answer() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let steps = json!([{ "weight": 20, "holdSeconds": FOR_EVER }, { "weight": 60, "holdSeconds": FOR_EVER }]);
    rig.write(&rig.document(json!({ "target": "v2", "strategy": { "steps": steps } })))?;
    let mut controller = rig.start_controller().await?;
    until(&controller, "the first step", |seen| {
        ensure!(seen.weights() == [80.0, 20.0], "{}", seen.message());
        Ok(())
    })
    .await?;
    let by_hand = json!({ "weight": 33 });
    for (command, body, phase, weights) in [
        ("pause", json!({}), "Paused", [80.0, 20.0]),
        ("resume", json!({}), "Progressing", [80.0, 20.0]),
        ("promote", json!({}), "Progressing", [40.0, 60.0]),
        ("set-weight", by_hand, "Paused", [67.0, 33.0]),
        ("abort", json!({}), "Failed", [100.0, 0.0]),
    ] {
        let path = format!("/v1/rollouts/{SERVICE}/{command}");
        let answer = Request::new(controller.address(), "POST", &path)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await?;
        controller.kill()?;
        ensure!(answer.status == 200, "{command}: {} {}", answer.status, answer.text());
        controller.start_again().await?;
        let seen = Seen::now(&controller).await?;
        assert_eq!((seen.phase(), seen.weights()), (phase, weights.to_vec()), "{command}: {}", seen.message());
        assert_eq!(answer.json()?["services"][0]["step"]["number"], seen.service()["step"]["number"], "{command}");
    }
    Ok(())
}
