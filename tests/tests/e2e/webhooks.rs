//! Webhooks: a gate before a step, and being told of what happens, with a server that answers well, badly or not at all.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use tideshift_tests::client::{Request, Response};
use tideshift_tests::controller::Controller;
use tideshift_tests::hook::{Answer, Got, Receiver};
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, SERVICE, Seen, TestBed, until};
use tideshift_tests::wait::eventually;
use tokio::time::Instant;

const YES: Answer = Answer::Status(200, "");

/// v2 is the target in two steps, with these webhooks.
async fn start(webhooks: Value) -> anyhow::Result<(TestBed, Controller)> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&document(&rig, webhooks))?;
    rig.start_reporter();
    let controller = rig.start_controller().await?;
    Ok((rig, controller))
}

fn document(rig: &TestBed, webhooks: Value) -> Value {
    let steps = json!([{ "weight": 10, "holdSeconds": FOR_EVER }, { "weight": 40, "holdSeconds": FOR_EVER }]);
    rig.document(json!({ "target": "v2", "strategy": { "steps": steps }, "webhooks": webhooks }))
}

fn gate(url: &str, further: Value) -> Value {
    with(json!({ "name": "approval", "type": "Gate", "url": url, "periodSeconds": 1, "timeoutSeconds": 1 }), further)
}

fn notification(name: &str, url: &str, further: Value) -> Value {
    with(json!({ "name": name, "type": "Notification", "url": url, "timeoutSeconds": 1 }), further)
}

fn with(mut object: Value, further: Value) -> Value {
    if let (Some(object), Value::Object(further)) = (object.as_object_mut(), further) {
        object.extend(further);
    }
    object
}

async fn tell(controller: &Controller, command: &str, body: Value) -> anyhow::Result<Response> {
    let request = Request::new(controller.address(), "POST", &format!("/v1/rollouts/{SERVICE}/{command}"));
    request.header("content-type", "application/json").body(body.to_string()).send().await
}

/// Waits until the rollout waits at its gate, which says these words.
async fn until_waiting(controller: &Controller, words: &str) -> anyhow::Result<Seen> {
    until(controller, "the gate's words", |seen| {
        let service = seen.service();
        ensure!(service["phase"] == "Waiting" && service["reason"] == "GateClosed");
        ensure!(seen.message().contains(words), "{}", seen.message());
        Ok(())
    })
    .await
}

async fn until_weights(controller: &Controller, weights: [f64; 2]) -> anyhow::Result<Seen> {
    until(controller, "the weights", |seen| {
        ensure!(seen.weights() == weights, "{:?}", seen.weights());
        Ok(())
    })
    .await
}

/// The signature that a request must have.
fn signature(secret: &str, got: &Got) -> anyhow::Result<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes())?;
    mac.update(format!("{}.", got.header("x-tideshift-timestamp")).as_bytes());
    mac.update(&got.body);
    let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256={hex}"))
}

fn reasons(got: &[Got]) -> anyhow::Result<Vec<String>> {
    got.iter().map(|got| Ok(got.json()?["reason"].as_str().context("no reason")?.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_step_begins_before_its_gate_says_yes() -> anyhow::Result<()> {
    let receiver = Receiver::start(Answer::Status(503, "starting")).await?;
    let (_rig, mut controller) = start(json!([gate(&receiver.url(), json!({ "secret": "hush-hush" }))])).await?;
    let seen =
        until_waiting(&controller, "gate approval has not answered: status 503 Service Unavailable: starting").await?;
    assert_eq!(seen.weights(), [100.0, 0.0]);
    // Asked again and again, the same question each time, signed.
    let got = receiver.until(3).await?;
    let first = got[0].json()?;
    let expected = json!({
        "type": "gate", "id": "shop/1/1", "name": "shop", "services": ["shop"], "rollout": 1, "stable": "v1",
        "target": "v2", "phase": "Waiting", "step": { "number": 1, "of": 3, "weight": 10 },
        "verdict": first["verdict"],
    });
    assert_eq!(first, expected);
    for got in &got {
        assert_eq!((got.header("x-tideshift-id"), got.header("content-type")), ("shop/1/1", "application/json"));
        assert_eq!(got.header("x-tideshift-signature"), signature("hush-hush", got)?);
    }
    receiver.answer(Answer::Status(403, "change freeze until Monday"));
    until_waiting(&controller, "gate approval says no: status 403 Forbidden: change freeze until Monday").await?;
    // A restart changes nothing: neither the answer, nor the question.
    controller.kill()?;
    controller.start_again().await?;
    let seen = until_waiting(&controller, "change freeze").await?;
    assert_eq!(seen.weights(), [100.0, 0.0]);
    let before = receiver.got().len();
    let got = receiver.until(before + 2).await?;
    assert!(got[before..].iter().all(|got| got.header("x-tideshift-id") == "shop/1/1"));
    // No command goes past it.
    let promote = tell(&controller, "promote", json!({})).await?;
    assert_eq!(promote.status, 409, "{}", promote.text());

    receiver.answer(YES);
    let seen = until_weights(&controller, [90.0, 10.0]).await?;
    assert_eq!(seen.phase(), "Progressing");
    // The next step is another question.
    receiver.answer(Answer::Status(409, "one at a time"));
    let before = receiver.got().len();
    assert_eq!(tell(&controller, "promote", json!({})).await?.status, 200);
    until_waiting(&controller, "one at a time").await?;
    let got = receiver.got();
    assert!(got[before..].iter().all(|got| got.header("x-tideshift-id") == "shop/1/2"));
    assert_eq!(Seen::now(&controller).await?.weights(), [90.0, 10.0], "the share of the step before");
    assert_eq!(tell(&controller, "abort", json!({})).await?.status, 200);
    until_weights(&controller, [100.0, 0.0]).await?;
    let asked = receiver.got().len();
    assert_eq!(tell(&controller, "set-target", json!({ "target": "v2" })).await?.status, 200);
    let got = receiver.until(asked + 1).await?;
    assert_eq!(got[asked].header("x-tideshift-id"), "shop/2/1", "another rollout, another question");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_no_answer_keeps_a_gate_closed() -> anyhow::Result<()> {
    let (receiver, elsewhere) = (Receiver::start(Answer::Silence).await?, Receiver::start(YES).await?);
    let (rig, controller) = start(json!([gate(&receiver.url(), json!({}))])).await?;
    until_waiting(&controller, "gate approval has not answered: no answer in time").await?;
    receiver.answer(Answer::Redirect(elsewhere.url()));
    until_waiting(&controller, "status 302 Found, and redirections are not followed").await?;
    for status in [500, 429, 408, 304] {
        receiver.answer(Answer::Status(status, ""));
        until_waiting(&controller, &format!("has not answered: status {status}")).await?;
    }
    for status in [400, 401, 404, 410] {
        receiver.answer(Answer::Status(status, "no"));
        until_waiting(&controller, &format!("says no: status {status}")).await?;
    }
    assert!(elsewhere.got().is_empty(), "it followed a redirection");
    assert_eq!(receiver.got()[0].header("x-tideshift-signature"), "", "no secret, no signature");
    // No server, and a missing secret.
    rig.write(&document(&rig, json!([gate("http://127.0.0.1:1/", json!({}))])))?;
    until_waiting(&controller, "has not answered: connection refused").await?;
    let secret = rig.path("secret");
    let secret_file = secret.to_string_lossy();
    rig.write(&document(&rig, json!([gate(&elsewhere.url(), json!({ "secretFile": secret_file }))])))?;
    until_waiting(&controller, "cannot be read: no such file or directory").await?;
    assert!(elsewhere.got().is_empty(), "it was asked without a signature");
    assert_eq!(Seen::now(&controller).await?.weights(), [100.0, 0.0]);
    fs::write(&secret, "from a file\n")?;
    until_weights(&controller, [90.0, 10.0]).await?;
    let got = elsewhere.got();
    assert_eq!(got[0].header("x-tideshift-signature"), signature("from a file", &got[0])?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_gate_of_a_step_must_say_yes_and_other_steps_need_none() -> anyhow::Result<()> {
    let (first, second) = (Receiver::start(YES).await?, Receiver::start(Answer::Status(403, "not yet")).await?);
    let second_gate = with(gate(&second.url(), json!({ "steps": [2] })), json!({ "name": "second" }));
    let first_gate = gate(&first.url(), json!({ "steps": [2] }));
    let (_rig, controller) = start(json!([first_gate, second_gate])).await?;
    until_weights(&controller, [90.0, 10.0]).await?;
    assert!(first.got().is_empty(), "no gate is at the first step");
    assert_eq!(tell(&controller, "promote", json!({})).await?.status, 200);
    until_waiting(&controller, "gate second says no: status 403 Forbidden: not yet").await?;
    assert_eq!(first.got().len(), 1, "a yes is a yes");
    second.answer(YES);
    until_weights(&controller, [60.0, 40.0]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_is_told_in_order_and_again_until_it_is_heard() -> anyhow::Result<()> {
    let (json_hook, chat) = (Receiver::start(YES).await?, Receiver::start(YES).await?);
    json_hook.answer_next([Answer::Status(500, ""), Answer::Silence, Answer::Status(429, "")]);
    let rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let secret = rig.path("secret");
    fs::write(&secret, "one")?;
    let webhooks = json!([
        notification("all", &json_hook.url(), json!({ "secretFile": secret.to_string_lossy() })),
        notification("chat", &chat.url(), json!({ "format": "Slack", "phases": ["Failed"] })),
    ]);
    rig.write(&document(&rig, webhooks))?;
    let mut rig = rig;
    rig.start_reporter();
    let mut controller = rig.start_controller().await?;
    until_weights(&controller, [90.0, 10.0]).await?;
    for (command, body) in
        [("pause", json!({})), ("resume", json!({})), ("set-weight", json!({ "weight": 25 })), ("abort", json!({}))]
    {
        assert_eq!(tell(&controller, command, body).await?.status, 200, "{command}");
    }
    let history: Value = serde_json::from_str(&controller.get(&format!("/v1/rollouts/{SERVICE}/history")).await?)?;
    let transitions = history["transitions"].as_array().context("no transitions")?;
    // The first one came four times.
    let got = json_hook.until(transitions.len() + 3).await?;
    assert_eq!(got.len(), transitions.len() + 3);
    let ids: Vec<_> = got.iter().map(|got| got.header("x-tideshift-id")).collect();
    assert!(
        ids[..4].iter().all(|id| *id == ids[0]) && got[..4].iter().all(|again| again.body == got[0].body),
        "{ids:?}"
    );
    let mut unique = ids[3..].to_vec();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), transitions.len(), "{ids:?}");
    for (got, transition) in got[3..].iter().zip(transitions) {
        let said = got.json()?;
        for (field, value) in transition.as_object().context("no object")? {
            assert_eq!(&said[field], value, "{field} of {said}");
        }
        let expected = (json!("transition"), json!(SERVICE), json!([SERVICE]), json!(got.header("x-tideshift-id")));
        let got_fields = (&said["type"], &said["name"], &said["services"], &said["id"]);
        assert_eq!(got_fields, (&expected.0, &expected.1, &expected.2, &expected.3));
        assert_eq!(got.header("x-tideshift-signature"), signature("one", got)?);
    }
    assert_eq!(reasons(&got[got.len() - 1..])?, ["Aborted"]);
    // A receiver of final phases only, as text.
    let got_chat = chat.until(1).await?;
    assert_eq!(got_chat.len(), 1);
    let text = got_chat[0].json()?["text"].as_str().context("no text")?.to_owned();
    assert!(text.starts_with("shop (v1 → v2): Failed, Aborted: v2: aborted by hand"), "{text}");
    assert_eq!(got_chat[0].json()?.as_object().map(serde_json::Map::len), Some(1));

    // A secret is changed; what happens just before the end is told, too.
    fs::write(&secret, "two")?;
    let before = json_hook.got().len();
    assert_eq!(tell(&controller, "set-target", json!({ "target": "v2" })).await?.status, 200);
    assert_eq!(controller.terminate().await?.code(), Some(0));
    let got = json_hook.got();
    assert_eq!(reasons(&got[before..before + 1])?, ["Started"]);
    assert_eq!(got[before].header("x-tideshift-signature"), signature("two", &got[before])?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_succeeded_is_told_with_where_it_came_from() -> anyhow::Result<()> {
    let (json_hook, chat) = (Receiver::start(YES).await?, Receiver::start(YES).await?);
    let webhooks = json!([
        notification("all", &json_hook.url(), json!({ "phases": ["Succeeded"] })),
        notification("chat", &chat.url(), json!({ "format": "Slack", "phases": ["Succeeded"] })),
    ]);
    let (_rig, controller) = start(webhooks).await?;
    until_weights(&controller, [90.0, 10.0]).await?;
    assert_eq!(tell(&controller, "promote", json!({ "full": true })).await?.status, 200);
    until_weights(&controller, [0.0, 100.0]).await?;
    until(&controller, "the end", |seen| {
        ensure!(seen.phase() == "Succeeded", "{}", seen.message());
        Ok(())
    })
    .await?;
    assert_eq!(tell(&controller, "rollback", json!({ "to": "v1" })).await?.status, 200);
    let (got, got_chat) = (json_hook.until(2).await?, chat.until(2).await?);
    for (index, (from, to)) in [("v1", "v2"), ("v2", "v1")].into_iter().enumerate() {
        let (said, text) = (got[index].json()?, got_chat[index].json()?);
        assert_eq!((&said["from"], &said["target"], &said["stable"]), (&json!(from), &json!(to), &json!(to)), "{said}");
        let text = text["text"].as_str().context("no text")?;
        assert!(text.starts_with(&format!("shop ({from} → {to}): Succeeded, Completed")), "{text}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_listen_holds_up_nobody() -> anyhow::Result<()> {
    let (deaf, gone, well) = (
        Receiver::start(Answer::Silence).await?,
        Receiver::start(Answer::Status(410, "gone")).await?,
        Receiver::start(YES).await?,
    );
    let webhooks = json!([
        notification("deaf", &deaf.url(), json!({ "timeoutSeconds": 300 })),
        notification("absent", "http://127.0.0.1:1/", json!({ "retries": 1 })),
        notification("gone", &gone.url(), json!({})),
        notification("well", &well.url(), json!({})),
    ]);
    let (_rig, mut controller) = start(webhooks).await?;
    until_weights(&controller, [90.0, 10.0]).await?;
    let begun = Instant::now();
    for _ in 0..60 {
        assert_eq!(tell(&controller, "pause", json!({})).await?.status, 200);
        assert_eq!(tell(&controller, "resume", json!({})).await?.status, 200);
    }
    println!("120 commands took {:.2} s", begun.elapsed().as_secs_f64());
    let all = eventually("everything to be told", DEADLINE, async || {
        let got = well.got();
        let pauses = reasons(&got)?.iter().filter(|reason| *reason == "PausedByUser").count();
        ensure!(pauses == 60 && reasons(&got)?.last().is_some_and(|last| last == "Holding"), "{pauses} pauses");
        Ok(got.len())
    })
    .await?;
    assert_eq!(deaf.got().len(), 1, "one at a time");
    // What is refused for good is not tried again; what cannot be told is said in the log.
    let refused = gone.until(all).await?;
    let ids: std::collections::BTreeSet<_> =
        refused.iter().map(|got| got.header("x-tideshift-id").to_owned()).collect();
    assert_eq!(ids.len(), refused.len());
    let log = controller.log();
    for words in
        ["100 are waiting already", "not told: status 410 Gone: gone", "not told after 2 tries: connection refused"]
    {
        assert!(log.contains(words), "{words}\n{}", controller.tail());
    }
    let begun = Instant::now();
    assert_eq!(controller.terminate().await?.code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(15));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_of_the_api_name_no_files_of_the_controller() -> anyhow::Result<()> {
    let receiver = Receiver::start(YES).await?;
    let (rig, controller) = start(json!([])).await?;
    let put = async |webhook: Value| {
        let request = Request::new(controller.address(), "PUT", &format!("/v1/shifts/{SERVICE}"));
        let document = document(&rig, json!([webhook])).to_string();
        request.header("content-type", "application/json").body(document).send().await
    };
    let refused = put(gate(&receiver.url(), json!({ "secretFile": "/etc/passwd" }))).await?;
    assert!(
        refused.status == 400 && refused.text().contains("webhooks.secretFile: not allowed here"),
        "{}",
        refused.text()
    );
    assert_eq!(put(gate(&receiver.url(), json!({ "secret": "hush-hush" }))).await?.status, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_in_files_are_followed_without_a_restart() -> anyhow::Result<()> {
    let receiver = Receiver::start(Answer::Status(403, "not yet")).await?;
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let key = |key: &str| json!({ "name": "hooks", "key": key });
    let mut webhook =
        gate(&receiver.url(), json!({ "urlSecretRef": key("url"), "secretRef": key("sign"), "periodSeconds": 3600 }));
    webhook.as_object_mut().context("no object")?.remove("url");
    rig.write(&document(&rig, json!([webhook])))?;
    let folder = rig.path("secrets");
    fs::create_dir_all(folder.join("hooks"))?;
    fs::write(folder.join("hooks/sign"), "one\n")?;
    let secrets = folder.to_string_lossy();
    rig.start_reporter();
    let controller = rig.start_controller_with(&["--secrets-dir", &secrets]).await?;
    until_waiting(&controller, "gate approval has not answered: urlSecretRef: ").await?;
    let errors = controller.status().await?["documentErrors"].to_string();
    ensure!(errors.contains("shop: spec.webhooks[0].urlSecretRef: "), "{errors}");
    fs::write(folder.join("hooks/url"), receiver.url())?;
    until_waiting(&controller, "gate approval says no: status 403 Forbidden: not yet").await?;
    let got = receiver.got();
    assert_eq!(got[0].header("x-tideshift-signature"), signature("one", &got[0])?);
    receiver.answer(YES);
    fs::write(folder.join("hooks/sign"), "two\n")?;
    let got = receiver.until(got.len() + 1).await?;
    let last = got.last().context("nothing")?;
    assert_eq!(last.header("x-tideshift-signature"), signature("two", last)?);
    until_weights(&controller, [90.0, 10.0]).await?;
    let shown = format!("{}{}", controller.log(), controller.status().await?);
    ensure!(!shown.contains(receiver.url().trim_start_matches("http://")), "{shown}");
    Ok(())
}
