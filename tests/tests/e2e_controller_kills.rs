//! A controller that is killed again and again, in the middle of anything: the rollout goes on where it was, traffic does
//! not notice, and nothing is counted or judged twice or not at all.

use std::{
    collections::BTreeMap,
    env, fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::{
    controller::Controller,
    load::Load,
    rig::{
        CONNECTIONS, DEADLINE, Rig, SERVICE, Seen, assert_counts_agree, next_answers, revisions, until, until_shares,
    },
};

const WORKERS: usize = 2;
const RATE: f64 = 400.0;
/// Weights and holds in seconds; the verdict needs one or two more for each.
const STEPS: [(u32, u64); 6] = [(10, 1), (20, 2), (35, 1), (50, 2), (70, 1), (85, 1)];

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After so many answers to clients.
    Any(u64),
    /// While it writes its state.
    Write,
    /// Once it has said that the next step has begun.
    NextStep,
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
    async fn add(&mut self, controller: &Controller) -> anyhow::Result<bool> {
        let seen = Seen::now(controller).await?;
        let epoch = self.epoch.get_or_insert_with(|| seen.0["epoch"].clone());
        ensure!(*epoch == seen.0["epoch"], "another state: {}", seen.0["epoch"]);
        let policy = controller.get("/v1/policy?proxy=probe&epoch=&after=0").await?;
        let revision = serde_json::from_str::<Value>(&policy)?["revision"].as_u64().context("no revision")?;
        let newest = self.policies.last_key_value().map_or(0, |(newest, _)| *newest);
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

/// Lets it come to that moment, and kills it. Returns whether it was in the middle of a write.
async fn kill(controller: &mut Controller, rig: &Rig, load: &Load, step: u64, moment: Moment) -> anyhow::Result<bool> {
    match moment {
        Moment::Any(answers) => drop(next_answers(load, answers).await?),
        Moment::NextStep => {
            until(controller, "the next step", |seen| {
                ensure!(seen.phase() == "Succeeded" || seen.step() > Some(step), "{}", seen.message());
                Ok(())
            })
            .await?;
        }
        Moment::Write => {
            let new = ["rollouts.new", "counts.new"].map(|name| rig.state_dir().join(name));
            new.iter().for_each(|path| drop(fs::remove_file(path)));
            // A write takes less than a millisecond, so nothing but looking all the time sees it.
            tokio::task::block_in_place(|| {
                let begun = Instant::now();
                while !new.iter().any(|path| path.exists()) && begun.elapsed() < DEADLINE {}
            });
            controller.kill()?;
            return Ok(new.iter().any(|path| path.exists()));
        }
    }
    controller.kill()?;
    Ok(false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_rollout_goes_on_where_it_was_however_often_the_controller_is_killed() -> anyhow::Result<()> {
    let seed = env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed} makes the same choices");
    let mut random = fastrand::Rng::with_seed(seed);

    let mut rig = Rig::new(&[("v1", 1), ("v2", 1)]).await?;
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

    let began = until(&controller, "the first step", |seen| {
        ensure!(seen.step() == Some(1), "{}", seen.message());
        Ok(())
    });
    began.await?;

    let mut looks = Looks::default();
    ensure!(!looks.add(&controller).await?, "it has ended before it is killed");
    let (mut kills, mut in_a_write, mut away) = (0, 0, Duration::ZERO);
    // What v2 had answered at the last two kills, and its share between them.
    let (mut answered, mut shares) = ([0; 2], Vec::new());
    let mut ended = false;
    while !ended {
        let mut moments = [Moment::Any(random.u64(10..600)), Moment::Write, Moment::NextStep];
        random.shuffle(&mut moments);
        let before = load.tally();
        for moment in moments {
            in_a_write += usize::from(kill(&mut controller, &rig, &load, looks.step, moment).await?);
            kills += 1;
            let killed = Instant::now();
            answered = [answered[1], load.tally().of("v2")];
            if random.bool() {
                next_answers(&load, random.u64(10..800)).await?;
            }
            controller.start_again().await?;
            away += killed.elapsed();
            let looked = looks.add(&controller).await;
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
        "{kills} kills, {in_a_write} in the middle of a write, {:.1} s without a controller: {} of {} requests failed",
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
    let kept: Value = serde_json::from_slice(&fs::read(rig.state_dir().join("rollouts.json"))?)?;
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
