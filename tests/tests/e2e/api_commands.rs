//! What people do through the API: commands to rollouts, documents, and listening to what happens.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::client::{Connection, Request, Response, get};
use tideshift_tests::controller::Controller;
use tideshift_tests::events::Events;
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, SERVICE, Seen, TestBed, until};
use tideshift_tests::wait::eventually;
use tokio::time::{Instant, timeout};

/// Two ready versions, and the document that moves a share of it to v2 and stays there.
async fn start(weight: u32) -> anyhow::Result<(TestBed, Controller)> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(shifting(weight)))?;
    let controller = rig.start_controller().await?;
    until(&controller, "the first step", |seen| {
        ensure!(seen.weights() == [100.0 - f64::from(weight), f64::from(weight)]);
        ensure!(seen.service()["reason"] == "Holding", "{}", seen.message());
        Ok(())
    })
    .await?;
    Ok((rig, controller))
}

fn shifting(weight: u32) -> Value {
    let step = |weight: u32| json!({ "weight": weight, "holdSeconds": FOR_EVER });
    json!({ "target": "v2", "strategy": { "steps": [step(weight), step(60)] } })
}

async fn send(controller: &Controller, method: &str, path: &str, body: &Value) -> anyhow::Result<Response> {
    let request = Request::new(controller.address(), method, path).header("content-type", "application/json");
    request.body(body.to_string()).send().await
}

async fn tell(controller: &Controller, command: &str, body: Value) -> anyhow::Result<(u16, Value)> {
    let answer = send(controller, "POST", &format!("/v1/rollouts/{SERVICE}/{command}"), &body).await?;
    Ok((answer.status, answer.json()?))
}

fn weights(services: &Value) -> Vec<f64> {
    let versions = services["services"][0]["versions"].as_array();
    versions.into_iter().flatten().filter_map(|version| version["weight"].as_f64()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_answered_with_what_has_become_of_it() -> anyhow::Result<()> {
    let (_rig, controller) = start(10).await?;
    let mut revision = Seen::now(&controller).await?.revision();
    for (command, body, phase, reason, expected) in [
        ("set-weight", json!({ "weight": 35 }), "Paused", "WeightSet", [65.0, 35.0]),
        ("resume", json!({}), "Progressing", "Resumed", [40.0, 60.0]),
        ("rollback", json!({ "to": "v1" }), "Failed", "RolledBack", [100.0, 0.0]),
        ("set-target", json!({ "target": "v2" }), "Progressing", "Holding", [90.0, 10.0]),
        ("pause", json!({}), "Paused", "PausedByUser", [90.0, 10.0]),
        ("abort", json!({}), "Failed", "Aborted", [100.0, 0.0]),
    ] {
        let (status, said) = tell(&controller, command, body).await?;
        let service = &said["services"][0];
        ensure!(status == 200 && service["rollout"] == SERVICE, "{command}: {status} {said}");
        ensure!(service["phase"] == phase, "{command}: {said}");
        ensure!(weights(&said) == expected, "{command} ({reason}): {said}");
        // What it says is what proxies are given by then.
        let seen = Seen::now(&controller).await?;
        ensure!(seen.weights() == expected, "{command}: {:?}", seen.weights());
        ensure!(command == "pause" || seen.revision() > revision, "{command}: {}", seen.revision());
        revision = seen.revision();
    }
    let history: Value = serde_json::from_str(&controller.get(&format!("/v1/rollouts/{SERVICE}/history")).await?)?;
    let transitions = history["transitions"].as_array().context("no transitions")?;
    let reasons: Vec<_> = transitions.iter().filter_map(|transition| transition["reason"].as_str()).collect();
    for reason in ["Started", "WeightSet", "Resumed", "RolledBack", "PausedByUser", "Aborted"] {
        assert!(reasons.contains(&reason), "{reason} is not in {reasons:?}");
    }
    let log = controller.log();
    assert!(log.contains("asked for through the API") && log.contains("SetWeight { weight: 35, "), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_or_does_not_fit_is_said() -> anyhow::Result<()> {
    let (_rig, controller) = start(10).await?;
    for (command, body, status, why) in [
        ("resume", json!({}), 409, "it is not paused"),
        ("set-target", json!({ "target": "v9" }), 400, "expected one of the versions v1, v2"),
        ("set-target", json!({}), 400, "missing field `target`"),
        ("rollback", json!({ "to": 7 }), 400, "invalid type"),
        ("set-weight", json!({ "weight": 101 }), 400, "expected 0 to 100"),
        ("set-weight", json!({ "weight": -1 }), 400, "invalid value"),
        ("set-weight", json!({ "weight": 12.5 }), 400, "invalid type: floating point"),
        ("promote", json!({ "ful": true }), 400, "unknown field `ful`, expected `full`"),
        ("pause", json!({ "for": "ever" }), 400, "unknown field `for`"),
        ("promote", json!("full"), 400, "not what this command needs: expected a JSON object"),
        ("set-weight", json!([33]), 400, "not what this command needs: expected a JSON object"),
        ("pause", json!([]), 400, "not what this command needs: expected a JSON object"),
        ("launch", json!({}), 404, "no such path"),
    ] {
        let (got, said) = tell(&controller, command, body).await?;
        let error = said["error"].as_str().unwrap_or_default();
        ensure!(got == status && error.contains(why), "{command}: {got} {said}");
    }
    let nobody = send(&controller, "POST", "/v1/rollouts/nobody/pause", &json!({})).await?;
    assert_eq!(
        (nobody.status, nobody.json()?["error"].clone()),
        (404, json!("there is no rollout nobody; expected one of shop"))
    );
    for path in ["/v1/rollouts/nobody/history", "/v1/shifts/nobody", "/v1/services/shop/versions/v9/drain"] {
        let answer = get(controller.address(), path).send().await?;
        ensure!(answer.status == 404 && answer.json()?["error"].is_string(), "{path}: {}", answer.text());
    }
    let path = format!("/v1/rollouts/{SERVICE}/pause");
    let too_much = send(&controller, "POST", &path, &json!({ "a": "b".repeat(70_000) })).await?;
    assert_eq!((too_much.status, too_much.json()?["error"].is_string()), (413, true));
    // No body is as good as an empty one.
    let pause = Request::new(controller.address(), "POST", &path).header("content-type", "application/json");
    assert_eq!(pause.send().await?.status, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_so_already_may_be_said_again() -> anyhow::Result<()> {
    let (_rig, controller) = start(10).await?;
    let revision = Seen::now(&controller).await?.revision();
    for (command, body, already, phase) in [
        ("set-target", json!({ "target": "v2" }), true, "Progressing"),
        ("pause", json!({}), false, "Paused"),
        ("pause", json!({}), true, "Paused"),
        ("set-target", json!({ "target": "v2" }), true, "Paused"),
    ] {
        let (status, said) = tell(&controller, command, body).await?;
        ensure!(status == 200 && said["services"][0]["phase"] == phase, "{command}: {status} {said}");
        ensure!(said["unchanged"] == if already { json!(true) } else { Value::Null }, "{command}: {said}");
        ensure!(said["services"][0]["number"] == 1, "{command}: {said}");
    }
    assert_eq!(Seen::now(&controller).await?.revision(), revision);
    // What has failed is tried again; the version that serves is not.
    assert_eq!(tell(&controller, "abort", json!({})).await?.0, 200);
    let (_, serves) = tell(&controller, "set-target", json!({ "target": "v1" })).await?;
    assert_eq!((&serves["unchanged"], &serves["services"][0]["phase"]), (&json!(true), &json!("Failed")));
    let (_, again) = tell(&controller, "set-target", json!({ "target": "v2" })).await?;
    assert_eq!((&again["unchanged"], &again["services"][0]["number"]), (&Value::Null, &json!(2)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_is_kept() -> anyhow::Result<()> {
    let (rig, mut controller) = start(10).await?;
    let shift = format!("/v1/shifts/{SERVICE}");
    let document = rig.document(shifting(25));
    assert_eq!(send(&controller, "PUT", &shift, &document).await?.status, 200);
    for weight in [40, 45, 50] {
        assert_eq!(tell(&controller, "set-weight", json!({ "weight": weight })).await?.0, 200);
        controller.kill()?;
        controller.start_again().await?;
        let weight = f64::from(weight);
        assert_eq!(Seen::now(&controller).await?.weights(), [100.0 - weight, weight]);
    }
    let kept: Value = serde_json::from_str(&controller.get(&shift).await?)?;
    assert_eq!(kept, document);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_come_and_go_through_the_api() -> anyhow::Result<()> {
    let (rig, controller) = start(10).await?;
    let shift = format!("/v1/shifts/{SERVICE}");
    let in_force: Value = serde_json::from_str(&controller.get(&shift).await?)?;
    assert_eq!(in_force, rig.document(shifting(10)));

    let answer = send(&controller, "PUT", &shift, &rig.document(shifting(5))).await?;
    assert_eq!((answer.status, weights(&answer.json()?)), (200, vec![95.0, 5.0]));
    let in_force: Value = serde_json::from_str(&controller.get(&shift).await?)?;
    assert_eq!(in_force, rig.document(shifting(5)));

    let mut other = rig.document(json!({ "hostnames": ["other.example.com"] }));
    other["metadata"]["name"] = json!("other");
    let answer = send(&controller, "PUT", "/v1/shifts/other", &other).await?;
    assert_eq!((answer.status, &answer.json()?["services"][0]["rollout"]), (201, &json!("other")));

    let mut wrong = rig.document(json!({ "stable": "v9", "target": 7 }));
    let answer = send(&controller, "PUT", &shift, &wrong).await?;
    let error = answer.json()?["error"].as_str().unwrap_or_default().to_owned();
    assert_eq!((answer.status, error.lines().count()), (400, 2), "{error}");
    assert!(error.starts_with("spec.stable: \"v9\" is not allowed; expected one of the versions v1, v2"), "{error}");
    wrong["spec"] = json!({ "x": "y".repeat(4 << 20) });
    assert_eq!(send(&controller, "PUT", &shift, &wrong).await?.status, 413);
    let in_force: Value = serde_json::from_str(&controller.get(&shift).await?)?;
    assert_eq!(in_force, rig.document(shifting(5)), "what was in force stays");

    let drain: Value =
        serde_json::from_str(&controller.get(&format!("/v1/services/{SERVICE}/versions/v1/drain")).await?)?;
    assert_eq!(drain["state"], "Serving", "{drain}");

    // What another claims is refused with that one's name, and so is what there is no room for.
    let mut taking = rig.document(json!({ "hostnames": ["other.example.com"] }));
    taking["metadata"]["name"] = json!("taking");
    let answer = send(&controller, "PUT", "/v1/shifts/taking", &taking).await?;
    let error = answer.json()?["error"].as_str().unwrap_or_default().to_owned();
    let why = "spec.hostnames[0]: \"other.example.com\" is already a hostname of the TrafficShift other in force";
    assert_eq!((answer.status, error.as_str()), (400, why));
    let rule = json!({ "matches": [{ "path": { "value": format!("/{}", "x".repeat(300_000)) } }], "versions": [{ "name": "v1" }] });
    taking["spec"]["hostnames"] = json!(["taking.example.com"]);
    taking["spec"]["rules"] = json!([rule]);
    let answer = send(&controller, "PUT", "/v1/shifts/taking", &taking).await?;
    let error = answer.json()?["error"].as_str().unwrap_or_default().to_owned();
    assert_eq!(answer.status, 400);
    assert!(error.contains(" bytes, as proxies get it or as JSON; at most 262144 are allowed"), "{error}");

    let delete = async |name: &str| send(&controller, "DELETE", &format!("/v1/shifts/{name}"), &json!({})).await;
    let gone = delete("other").await?;
    let reason = gone.json()?["services"][0]["reason"].clone();
    assert_eq!((gone.status, reason), (200, json!("DocumentLeft")), "its weights stay in force");
    assert_eq!(delete("other").await?.status, 409);
    assert_eq!(delete("other?onDelete=Drain").await?.status, 200);
    assert_eq!(delete("nobodys").await?.status, 404);
    let back = delete(SERVICE).await?;
    assert_eq!((back.status, back.json()?["services"][0]["rollout"].clone()), (200, json!(SERVICE)));
    let in_force: Value = serde_json::from_str(&controller.get(&shift).await?)?;
    assert_eq!(in_force, rig.document(shifting(10)), "the file's document is in force again");
    let of_file = delete(SERVICE).await?;
    assert_eq!((of_file.status, of_file.text().contains("comes from a file")), (409, true), "{}", of_file.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_listens_hears_of_everything_at_once() -> anyhow::Result<()> {
    let (_rig, mut controller) = start(10).await?;
    let begun = Instant::now();
    let mut events = Events::open(controller.address(), "").await?;
    let first = events.next().await?.context("no event")?;
    assert_eq!((first.kind.as_str(), &first.data["services"][0]["name"]), ("status", &json!(SERVICE)));
    assert!(begun.elapsed() < Duration::from_secs(5), "at once");

    tell(&controller, "set-weight", json!({ "weight": 35 })).await?;
    // The start's own may have come just before.
    let mut transition = events.next_of("transition").await?;
    while transition["reason"] == "Holding" {
        transition = events.next_of("transition").await?;
    }
    assert_eq!((&transition["name"], &transition["reason"]), (&json!(SERVICE), &json!("WeightSet")));
    assert_eq!((&transition["phase"], &transition["step"]), (&json!("Paused"), &json!(1)));
    let status = events.next_of("status").await?;
    assert_eq!(weights(&status), [65.0, 35.0]);
    let asked = controller.status().await?;
    assert_eq!((&status["epoch"], &status["revision"]), (&asked["epoch"], &asked["revision"]));

    // Nothing happens now: one each second.
    events.next_of("status").await?;
    let begun = Instant::now();
    for _ in 0..3 {
        events.next_of("status").await?;
    }
    let idle = begun.elapsed().as_secs_f64();
    // A report each 20 ms: at most four each second.
    let (begun, mut came) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_secs(3) {
        let report = json!({ "proxy": "p", "start": "1", "revision": 0, "workers": came + 1, "services": [] });
        ensure!(send(&controller, "POST", "/v1/reports", &report).await?.status == 204);
        if let Ok(event) = timeout(Duration::from_millis(20), events.next()).await {
            ensure!(event?.is_some_and(|event| event.kind == "status"), "a transition");
            came += 1;
        }
    }
    let busy = begun.elapsed().as_secs_f64();
    println!("3 statuses in {idle:.2} s while nothing happens, {came} in {busy:.2} s with reports all the time");
    assert!((2.0..8.0).contains(&idle) && came > 4 && f64::from(came) <= 4.0 * busy + 2.0);

    assert_eq!(controller.terminate().await?.code(), Some(0));
    while let Some(event) = events.next().await? {
        assert_eq!(event.kind, "status");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_that_are_many_or_slow_hold_up_nobody() -> anyhow::Result<()> {
    let (_rig, mut controller) = start(10).await?;
    let address = controller.address();
    // Many proxies with long names make for a large status, so that what is not read soon fills every buffer.
    let mut connection = Connection::open(address).await?;
    for i in 0..1000 {
        let report =
            json!({ "proxy": format!("{i}-{}", "p".repeat(400)), "start": "1", "revision": 0, "services": [] });
        let request = Request::new(address, "POST", "/v1/reports").header("content-type", "application/json");
        ensure!(connection.send(&request.body(report.to_string())).await?.status == 204);
    }
    let mut silent = Vec::new();
    let events = get(address, "/v1/events");
    for i in 0..99 {
        // No address has more than a quarter of the places.
        let source = Ipv4Addr::new(127, 0, 0, 2 + i / 25);
        let mut connection = Connection::open_from(source, address).await?;
        connection.write(&events.bytes()).await?;
        connection.read_some().await?;
        silent.push(connection);
    }
    let refused = Connection::open_from(Ipv4Addr::new(127, 0, 0, 2), address).await?.send(&events).await?;
    assert_eq!(refused.status, 429, "{}", refused.text());
    let mut heard = Events::open(address, "").await?;
    let one_more = get(address, "/v1/events").send().await?;
    assert_eq!(one_more.status, 503, "{}", one_more.text());
    for weight in [20, 30, 40] {
        tell(&controller, "set-weight", json!({ "weight": weight })).await?;
        let begun = Instant::now();
        eventually("the status", DEADLINE, async || {
            let status = heard.next_of("status").await?;
            ensure!(weights(&status)[1] == f64::from(weight), "{:?}", weights(&status));
            Ok(())
        })
        .await?;
        println!("heard of {weight} % after {:.2} s", begun.elapsed().as_secs_f64());
    }
    let resident = resident_kib(controller.id())?;
    println!("{resident} KiB resident with 99 listeners that do not read");
    drop(silent);
    eventually("a place", DEADLINE, async || Events::open(address, "").await).await?;
    assert_eq!(controller.terminate().await?.code(), Some(0));
    Ok(())
}

/// The memory of a process.
fn resident_kib(id: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
