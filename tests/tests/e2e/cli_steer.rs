//! Steering a rollout from the command line: what each command does to real traffic, what it prints, how it ends.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::{Errors, SERVED_BY};
use tideshift_tests::client::get;
use tideshift_tests::controller::{Controller, Output, cli};
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, HOST, SERVICE, Seen, TestBed, next_answers, until, until_shares};
use tideshift_tests::wait::eventually;
use tokio::task::spawn_blocking;

const WORKERS: usize = 2;

/// Runs `tideshift` with these words against the controller.
async fn run(controller: &Controller, words: &[&str]) -> anyhow::Result<Output> {
    let server = format!("http://{}", controller.address());
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    spawn_blocking(move || cli(words.into_iter().chain(["--server".to_owned(), server]))).await?
}

/// The same, which must succeed; what it printed.
async fn done(controller: &Controller, words: &[&str]) -> anyhow::Result<String> {
    let output = run(controller, words).await?;
    ensure!(output.code == Some(0) && output.stderr.is_empty(), "{words:?}: {output:?}");
    Ok(output.stdout)
}

fn hold_at(weight: u32) -> Value {
    json!({ "strategy": { "steps": [{ "weight": weight, "holdSeconds": FOR_EVER }] } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_is_steered_by_hand_from_its_start_to_its_end_and_back() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1), ("v3", 1)]).await?;
    let steps = json!([{ "weight": 10, "holdSeconds": FOR_EVER }, { "pause": true }, { "weight": 40, "pause": true }]);
    rig.write(&rig.document(json!({ "strategy": { "steps": steps } })))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let load = rig.load(200.0);
    until_shares(&controller, "v1 alone", &[100.0, 0.0, 0.0]).await?;

    // What does not fit is refused, each with an exit code of its own.
    let refused = run(&controller, &["promote"]).await?;
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert_eq!(refused.stderr, "error: no rollout is under way (phase Initialized: v1 serves)\n");
    let unknown = run(&controller, &["set-target", "v9"]).await?;
    assert_eq!(unknown.code, Some(2), "{unknown:?}");
    assert!(unknown.stderr.contains("expected one of the versions v1, v2, v3"), "{unknown:?}");
    let nobody = run(&controller, &["pause", "till"]).await?;
    assert_eq!(nobody.code, Some(2), "{nobody:?}");
    assert!(nobody.stderr.contains("there is no rollout till; expected one of shop"), "{nobody:?}");

    let said = done(&controller, &["set-target", "v2"]).await?;
    assert!(said.starts_with("shop: Progressing - "), "{said}");
    until_shares(&controller, "the first step", &[90.0, 10.0, 0.0]).await?;
    done(&controller, &["pause", "--wait"]).await?;
    assert_eq!(Seen::now(&controller).await?.phase(), "Paused");
    done(&controller, &["resume", SERVICE]).await?;
    done(&controller, &["promote"]).await?;
    until(&controller, "the pause", |seen| {
        ensure!(seen.service()["reason"] == "PauseStep" && seen.step() == Some(2), "{}", seen.service());
        Ok(())
    })
    .await?;
    done(&controller, &["promote", SERVICE]).await?;
    until_shares(&controller, "the third step", &[60.0, 40.0, 0.0]).await?;
    done(&controller, &["set-weight", "25", "--wait"]).await?;
    let seen = until_shares(&controller, "by hand", &[75.0, 25.0, 0.0]).await?;
    assert_eq!(seen.service()["reason"], "WeightSet");
    let json: Value = serde_json::from_str(&done(&controller, &["promote", "--full", "--wait", "-o", "json"]).await?)?;
    assert_eq!((&json["services"][0]["phase"], &json["services"][0]["stable"]), (&json!("Succeeded"), &json!("v2")));
    assert!(next_answers(&load, 100).await?.of("v2") >= 90);

    // Any version at any time.
    done(&controller, &["rollback", SERVICE, "--to", "v1", "--wait", "--timeout", "20s"]).await?;
    until_shares(&controller, "rolled back", &[100.0, 0.0, 0.0]).await?;
    done(&controller, &["set-target", SERVICE, "v3"]).await?;
    until_shares(&controller, "v3", &[90.0, 0.0, 10.0]).await?;
    done(&controller, &["abort", "--wait"]).await?;
    let seen = until_shares(&controller, "aborted", &[100.0, 0.0, 0.0]).await?;
    assert_eq!((seen.phase(), seen.service()["reason"].as_str()), ("Failed", Some("Aborted")));

    let history = done(&controller, &["history"]).await?;
    for reason in ["Started", "PausedByUser", "Resumed", "Promoted", "WeightSet", "Completed", "RolledBack", "Aborted"]
    {
        assert!(history.contains(reason), "{reason} in\n{history}");
    }
    let history: Value = serde_json::from_str(&done(&controller, &["history", "-o", "json"]).await?)?;
    let last = history["transitions"].as_array().and_then(|all| all.last()).context("no transition")?;
    assert_eq!((&last["phase"], &last["reason"], &last["rollout"]), (&json!("Failed"), &json!("Aborted"), &json!(3)));
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_ends_as_the_rollout_does() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(hold_at(20)))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let _load = rig.load(200.0);
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    let late = run(&controller, &["set-target", "v2", "--wait", "--timeout", "1s"]).await?;
    assert_eq!(late.code, Some(3), "{late:?}");
    rig.version("v2")[0].set(|behaviour| behaviour.errors = Errors { bad: 1, of: 2 });
    until_shares(&controller, "taken back", &[100.0, 0.0]).await?;
    let failed = run(&controller, &["set-target", "v2", "--wait"]).await?;
    assert_eq!(failed.code, Some(6), "{failed:?}");
    assert!(failed.stdout.starts_with("shop: Failed - v2 is worse than v1: "), "{failed:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_a_version_does_not_end_well_with_another_one() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1), ("v3", 1)]).await?;
    rig.write(&rig.document(hold_at(20)))?;
    let controller = rig.start_controller().await?;
    let file = rig.file().to_string_lossy().into_owned();
    // What is wanted serves already.
    done(&controller, &["apply", "-f", &file, "--wait", "--timeout", "20s"]).await?;
    let mut serves_already = rig.document(hold_at(20));
    serves_already["spec"]["target"] = json!("v1");
    let other = rig.path("other.yaml");
    std::fs::write(&other, serves_already.to_string())?;
    done(&controller, &["apply", "-f", &other.to_string_lossy(), "--wait", "--timeout", "20s"]).await?;

    // Each of these supersedes the rollout that the command waits for.
    let another: [&[&[&str]]; 3] =
        [&[&["set-target", "v3"], &["promote", "--full"]], &[&["rollback", "--to", "v1"]], &[&["set-target", "v3"]]];
    for (number, (wanted, instead)) in [("v2", another[0]), ("v2", another[1]), ("v2", another[2])].iter().enumerate() {
        let begun = done(&controller, &["set-target", wanted]).await?;
        assert!(begun.starts_with("shop: Progressing"), "{begun}");
        let words = ["set-target", wanted, "--wait"];
        let waiting = run(&controller, &words);
        let taking_its_place = async {
            // The one that waits has said so, and changes nothing by that.
            tokio::time::sleep(Duration::from_secs(1)).await;
            for words in *instead {
                done(&controller, words).await?;
            }
            anyhow::Ok(())
        };
        let (waiting, taken) = tokio::join!(waiting, taking_its_place);
        taken?;
        let waiting = waiting?;
        assert_eq!(waiting.code, Some(6), "{number}: {waiting:?}");
        assert!(waiting.stderr.contains(&format!("to {wanted} was superseded by rollout ")), "{waiting:?}");
    }
    // What is withdrawn is no success, either.
    let words = ["set-target", "v3", "--wait"];
    let waiting = run(&controller, &words);
    let withdrawing = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let stable = Seen::now(&controller).await?.service()["stable"].as_str().unwrap_or_default().to_owned();
        done(&controller, &["set-target", &stable, "--wait"]).await
    };
    let (waiting, withdrawn) = tokio::join!(waiting, withdrawing);
    let (waiting, withdrawn) = (waiting?, withdrawn?);
    assert!(withdrawn.starts_with("shop: Initialized"), "{withdrawn}");
    assert_eq!(waiting.code, Some(6), "{waiting:?}");
    assert!(waiting.stderr.contains("the target was withdrawn"), "{waiting:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_by_hand_is_waited_for_downwards_too_and_what_is_missing_is_said() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let mut document = rig.document(hold_at(100));
    document["spec"]["target"] = json!("v2");
    rig.write(&document)?;
    let controller = rig.start_controller().await?;
    until(&controller, "v2 with everything", |seen| {
        ensure!(seen.weights() == [0.0, 100.0], "{:?}", seen.weights());
        Ok(())
    })
    .await?;
    rig.set_ready("v1", false);
    until(&controller, "v1 out", |seen| {
        ensure!(seen.ready("v1") == 0);
        Ok(())
    })
    .await?;
    let late = run(&controller, &["set-weight", "10", "--wait", "--timeout", "4s"]).await?;
    assert_eq!(late.code, Some(3), "{late:?}");
    let why = "v2 of shop to have 10 % instead of 100 % (v1 has 0 of 1 endpoints ready, v2 has 1 of 1 endpoints ready)";
    assert_eq!(late.stderr.matches(&format!("waiting for {why}\n")).count(), 1, "{late:?}");
    assert!(late.stderr.ends_with(&format!("timed out after 4s: {why}\n")), "{late:?}");
    rig.set_ready("v1", true);
    done(&controller, &["set-weight", "10", "--wait", "--timeout", "20s"]).await?;
    assert_eq!(Seen::now(&controller).await?.weights(), [90.0, 10.0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_proxy_that_is_gone() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(hold_at(20)))?;
    let controller = rig.start_controller().await?;
    let mut envoy = rig.start_envoy(WORKERS).await?;
    done(&controller, &["set-target", "v2"]).await?;
    until_shares(&controller, "the first step", &[80.0, 20.0]).await?;
    let id = Seen::now(&controller).await?.0["proxies"][0]["id"].as_str().context("no proxy")?.to_owned();
    envoy.kill()?;
    let begun = Instant::now();
    let back = run(&controller, &["rollback", "--to", "v1", "--wait", "--timeout", "25s"]).await?;
    println!("waited for {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(back.code, Some(0), "{back:?}");
    let lines: Vec<_> = back.stderr.lines().collect();
    let [waiting, left_out] = lines[..] else { anyhow::bail!("{back:?}") };
    assert!(waiting.starts_with(&format!("waiting for proxy {id} (runs ")), "{waiting}");
    assert!(
        left_out.starts_with("ignoring proxies that have not reported for ") && left_out.ends_with(&id),
        "{left_out}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_so_already_is_no_failure_of_a_pipeline() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(hold_at(20)))?;
    let controller = rig.start_controller().await?;
    for (words, phase, already) in [
        (&["set-target", "v1"][..], "Initialized", true),
        (&["set-target", "v1", "--wait"], "Initialized", true),
        (&["set-target", "v2"], "Progressing", false),
        (&["set-target", "v2"], "Progressing", true),
        (&["pause"], "Paused", false),
        (&["pause", "--wait"], "Paused", true),
        (&["promote", "--full", "--wait"], "Succeeded", false),
        (&["set-target", "v2", "--wait"], "Succeeded", true),
    ] {
        let said = done(&controller, words).await?;
        assert!(said.starts_with(&format!("shop: {phase} - ")), "{words:?}: {said}");
        assert_eq!(said.ends_with(" (already so)\n"), already, "{words:?}: {said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_kept_is_done_and_said() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(hold_at(20)))?;
    let controller = rig.start_controller().await?;
    done(&controller, &["set-target", "v2"]).await?;
    let (folder, aside) = (rig.state_dir(), rig.path("aside"));
    std::fs::rename(&folder, &aside)?;
    std::fs::write(&folder, "not a folder")?;
    let words = "applied, but the controller could not persist it: ";
    let paused = run(&controller, &["pause"]).await?;
    assert_eq!(paused.code, Some(7), "{paused:?}");
    assert!(paused.stdout.starts_with("shop: Paused - "), "{paused:?}");
    assert!(paused.stderr.starts_with(&format!("error: shop: {words}")), "{paused:?}");
    let again = run(&controller, &["pause", "--wait", "-o", "json"]).await?;
    assert_eq!(again.code, Some(7), "{again:?}");
    let said: Value = serde_json::from_str(&again.stdout)?;
    assert!(said["stateError"].is_string() && said["unchanged"] == true, "{said}");
    let file = rig.file().to_string_lossy().into_owned();
    assert_eq!(run(&controller, &["apply", "-f", &file]).await?.code, Some(7));

    std::fs::remove_file(&folder)?;
    std::fs::rename(&aside, &folder)?;
    let begun = Instant::now();
    until(&controller, "what was decided to be kept", |seen| {
        ensure!(seen.0.get("stateError").is_none());
        Ok(())
    })
    .await?;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    done(&controller, &["resume"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applied_documents_hold_over_restarts_until_the_file_changes() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    let mut applied = rig.document(hold_at(30));
    applied["spec"]["target"] = json!("v2");
    let by_file =
        rig.document(json!({ "target": "v2", "strategy": { "steps": [{ "weight": 20, "holdSeconds": FOR_EVER }] } }));
    let file = rig.path("other.yaml");
    let apply = |document: &Value| -> anyhow::Result<String> {
        std::fs::write(&file, document.to_string())?;
        Ok(file.to_string_lossy().into_owned())
    };
    let mut controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;

    done(&controller, &["apply", "-f", &apply(&applied)?]).await?;
    until_shares(&controller, "the applied document", &[70.0, 30.0]).await?;
    controller.kill()?;
    controller.start_again().await?;
    until_shares(&controller, "it is kept", &[70.0, 30.0]).await?;

    // What is wrong changes nothing, and commands of a stranger's are not run.
    let mut wrong = applied.clone();
    wrong["spec"]["stable"] = json!("v9");
    let refused = run(&controller, &["apply", "-f", &apply(&wrong)?]).await?;
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let mut commands = applied.clone();
    commands["spec"]["versions"][0]["readinessProbe"] = json!({ "exec": { "command": ["true"] } });
    let refused = run(&controller, &["apply", "-f", &apply(&commands)?]).await?;
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("readinessProbe.exec: not allowed here"), "{refused:?}");
    until_shares(&controller, "unchanged", &[70.0, 30.0]).await?;

    rig.write(&by_file)?;
    until_shares(&controller, "the file again", &[80.0, 20.0]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn testers_reach_the_target_before_users_do() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let matches = json!([{ "headers": [{ "name": "x-beta", "value": "1" }] }]);
    let steps = json!([{ "matches": matches, "pause": true }, { "weight": 100 }]);
    rig.write(&rig.document(json!({ "target": "v2", "strategy": { "steps": steps } })))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    let answers = async |tester: bool, version: &str| {
        let mut request = get(rig.address(), "/").host(HOST);
        if tester {
            request = request.header("x-beta", "1");
        }
        eventually(&format!("{version} for {tester}"), DEADLINE, async || {
            let answer = request.send().await?;
            ensure!(answer.header(SERVED_BY) == Some(version.to_owned()), "{answer:?}");
            Ok(())
        })
        .await
    };
    until_shares(&controller, "no user moves", &[100.0, 0.0]).await?;
    answers(true, "v2").await?;
    answers(false, "v1").await?;
    done(&controller, &["promote", "--wait"]).await?;
    answers(false, "v2").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watching_tells_each_transition() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(hold_at(30)))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    done(&controller, &["set-target", "v2"]).await?;
    until_shares(&controller, "v2 at its step", &[70.0, 30.0]).await?;
    let server = format!("http://{}", controller.address());
    let mut watch = Command::new(tideshift_tests::artifacts::tideshift()?)
        .args(["watch", "--server", &server, "--output", "json"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(watch.stdout.take().context("no output")?).lines();
    let mut next = || -> anyhow::Result<Value> { Ok(serde_json::from_str(&lines.next().context("it ended")??)?) };
    let first = next()?;
    assert_eq!((&first["name"], &first["reason"], &first["step"]), (&json!(SERVICE), &json!("Holding"), &json!(1)));
    done(&controller, &["abort"]).await?;
    let second = next()?;
    assert_eq!((&second["phase"], &second["reason"]), (&json!("Failed"), &json!("Aborted")));
    watch.kill()?;
    watch.wait()?;
    Ok(())
}
