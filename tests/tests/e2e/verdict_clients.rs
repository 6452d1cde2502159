//! What a verdict makes of clients: those that give up or are sent away by a broken target count against it, also where
//! the document has no `analysis`; one that fails its requests on purpose does not.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::{Behaviour, Errors, Mode};
use tideshift_tests::hostile::{BAD_INPUT, Hostile, Way};
use tideshift_tests::load::{Load, Plan};
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, HOST, Seen, TestBed, next_answers, until_shares};
use tideshift_tests::wait::eventually;

const WORKERS: usize = 2;
const RATE: f64 = 100.0;
/// The addresses that clients call from.
const CALLERS: usize = 50;
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(1);

fn callers(rig: &TestBed) -> Load {
    Plan::new(rig.address(), HOST).callers(CALLERS).patience(PATIENCE).rate(RATE).start()
}

/// A target at 10 % for this long, and then at 100 %.
fn rollout(hold: u64) -> Value {
    let steps = json!([{ "weight": 10, "holdSeconds": hold }, { "weight": 100 }]);
    json!({ "target": "v2", "strategy": { "steps": steps } })
}

/// A target that is broken from the start, though its probes succeed: it never gets more than the first step's share,
/// which only lasts 3 seconds, and is taken back.
async fn broken_target_goes_back(breaks: impl FnOnce(&mut Behaviour)) -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.version("v2")[0].set(breaks);
    rig.write(&rig.document(json!({})))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = callers(&rig);
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    next_answers(&load, 200).await?;

    rig.write(&rig.document(rollout(3)))?;
    let mut most = 0.0_f64;
    let seen = eventually("the target to be taken back", DEADLINE, async || {
        let seen = Seen::now(&controller).await?;
        most = most.max(*seen.weights().get(1).context("two versions")?);
        let decided = seen.phase() == "Failed" && seen.weights() == [100.0, 0.0] && seen.is_in_force();
        ensure!(most > 10.0 || decided, "{}", seen.service());
        Ok(seen)
    })
    .await?;
    assert!(most <= 10.0, "v2 got {most} % though it never gave a good answer: {}", seen.message());
    assert_eq!(seen.service()["stable"].as_str(), Some("v1"), "{}", seen.message());

    let of_v2 = rig.arrived("v2");
    assert!(of_v2 > 0, "v2 was never asked");
    next_answers(&load, 200).await?;
    assert_eq!(rig.arrived("v2"), of_v2, "v2 is still asked");
    let tally = load.stop().await?;
    println!("{of_v2} requests reached v2: {}", seen.message());
    assert_eq!(tally.of("v1"), tally.of_class("v1", 2), "only v2 fails: {tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn target_that_fails_from_its_first_request_is_taken_back() -> anyhow::Result<()> {
    broken_target_goes_back(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn target_that_hangs_is_taken_back() -> anyhow::Result<()> {
    broken_target_goes_back(|behaviour| behaviour.mode = Mode::Hang).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn target_that_answers_404_is_not_promoted() -> anyhow::Result<()> {
    broken_target_goes_back(|behaviour| behaviour.status = 404).await
}

/// A session's cookie keeps one client on v2, where it fails every request; v2 is well for all others. That it is watched
/// all the same shows when it breaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn target_survives_hostile_client_with_its_cookie() -> anyhow::Result<()> {
    /// Ten seconds of them.
    const FAILING: u64 = 500;
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.backends.values().flatten().for_each(|backend| backend.set(|behaviour| behaviour.bad_input = Some(BAD_INPUT)));
    let mut spec = rollout(FOR_EVER);
    spec["session"] = json!({ "type": "Cookie", "name": "tideshift_shop" });
    rig.write(&rig.document(spec))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v2 at its step", &[90.0, 10.0]).await?;
    let load = callers(&rig);
    next_answers(&load, 200).await?;

    let before = load.tally();
    let hostile = Hostile::start(rig.address(), HOST, Way::Cookie("v2"));
    let sent = eventually("the hostile client's requests", DEADLINE, async || {
        let (seen, sent) = (Seen::now(&controller).await?, hostile.sent());
        let failed = sent.get("v2").copied().unwrap_or_default();
        let went_elsewhere = sent.len() > 1;
        let decided = seen.phase() != "Progressing" || seen.weights() != [90.0, 10.0] || went_elsewhere;
        ensure!(decided || failed >= FAILING, "{failed} failed: {}", seen.service());
        Ok((!decided).then_some(sent).with_context(|| format!("after {failed}: {}", seen.message())))
    });
    // The outer error is that it took too long, the inner one that it took v2 back.
    let sent = sent.await?.context("one client took v2 back")?;
    hostile.stop().await?;
    println!("sent by the hostile client: {sent:?}");
    let tally = load.tally().since(&before);
    assert_eq!(tally.of_class("v2", 2), tally.of("v2"), "v2 is well for others: {tally:?}");
    assert!(tally.share("v2") > 0.05, "a guard keeps others from v2: {tally:?}");

    rig.version("v2")[0].set(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 });
    let seen = until_shares(&controller, "v2 to be taken back", &[100.0, 0.0]).await?;
    assert_eq!(seen.phase(), "Failed", "{}", seen.message());
    load.stop().await?;
    Ok(())
}
