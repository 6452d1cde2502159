//! Secrets that TrafficShifts refer to: they come from their own namespace, with a label that allows it, are followed as they
//! change, and are shown nowhere. What holds a secret itself is refused.

use anyhow::ensure;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use tideshift_tests::controller::Controller;
use tideshift_tests::hook::{Answer, Got, Receiver};
use tideshift_tests::kubernetes::test_bed::{Cluster, hold_at, policy, shift, until_weights};
use tideshift_tests::test_bed::DEADLINE;
use tideshift_tests::wait::eventually;

/// A Secret with one key, and this label if any.
async fn secret(cluster: &Cluster, name: &str, used_for: Option<&str>, text: &str) -> anyhow::Result<()> {
    let mut metadata = json!({ "name": name });
    if let Some(used_for) = used_for {
        metadata["labels"] = json!({ "tideshift.dev/use": used_for });
    }
    cluster.apply(json!({ "kind": "Secret", "metadata": metadata, "stringData": { "key": text } })).await
}

fn key_of(name: &str) -> Value {
    json!({ "name": name, "key": "key" })
}

/// A TrafficShift of its own host, with endpoints for both versions.
async fn apply(cluster: &Cluster, name: &str, fields: Value) -> anyhow::Result<()> {
    for version in ["v1", "v2"] {
        cluster.slice(&format!("{name}-{version}"), 1, 1).await?;
    }
    let mut document = shift(name, hold_at(50));
    document["spec"]["hostnames"] = json!([format!("{name}.example.com")]);
    if let (Some(spec), Value::Object(fields)) = (document["spec"].as_object_mut(), fields) {
        spec.extend(fields);
    }
    cluster.apply(document).await
}

/// Waits until a condition has this status and its message says these words.
async fn until_condition(cluster: &Cluster, name: &str, kind: &str, status: &str, words: &str) -> anyhow::Result<()> {
    let said = |object: &Value| {
        let conditions = object["status"]["conditions"].as_array();
        let condition = conditions.and_then(|all| all.iter().find(|one| one["type"] == kind)).cloned();
        let condition = condition.unwrap_or_default();
        ensure!(condition["status"] == status, "{condition}");
        ensure!(condition["message"].as_str().is_some_and(|message| message.contains(words)), "{condition}");
        Ok(())
    };
    cluster.until(&format!("{kind} of {name}: {words}"), "TrafficShift", name, said).await.map(drop)
}

async fn until_said(cluster: &Cluster, name: &str, words: &str) -> anyhow::Result<()> {
    let said = |object: &Value| {
        ensure!(object["status"]["message"].as_str().is_some_and(|message| message.contains(words)));
        Ok(())
    };
    cluster.until(&format!("{name} to say {words:?}"), "TrafficShift", name, said).await.map(drop)
}

fn is_signed_with(secret: &str, got: &Got) -> bool {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else { return false };
    mac.update(format!("{}.", got.header("x-tideshift-timestamp")).as_bytes());
    mac.update(&got.body);
    let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    got.header("x-tideshift-signature") == format!("sha256={hex}")
}

/// The session of a service in the policy: its secret, and those of before.
async fn session_of(controller: &Controller, service: &str) -> anyhow::Result<Value> {
    // As a proxy of today asks.
    let path = "/v1/policy?proxy=probe&epoch=&after=0&delta=true";
    let policy: Value = serde_json::from_str(&controller.get(path).await?)?;
    let services = policy["services"].as_array();
    let service = services.and_then(|services| services.iter().find(|one| one["name"] == service)).cloned();
    let session = service.map(|service| service["session"].clone()).unwrap_or_default();
    Ok(json!([session["secret"], session["previousSecrets"]]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webhooks_and_sessions_follow_the_secrets_that_documents_refer_to() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let receiver = Receiver::start(Answer::Status(403, "change freeze")).await?;
    apply(&cluster, "payment", json!({})).await?;
    let gate = json!({
        "name": "gate", "type": "Gate", "urlSecretRef": key_of("where"), "secretRef": key_of("sign"), "periodSeconds": 3600,
    });
    let session = json!({ "type": "Cookie", "name": "c", "secretRef": key_of("users") });
    apply(&cluster, "shop", json!({ "session": session, "webhooks": [gate] })).await?;
    secret(&cluster, "users", Some("session"), "hush-one").await?;
    let controller = cluster.replica("a", &["--webhook-allow", "127.0.0.1"]).await?;
    let (shop, payment) = (cluster.full_name("shop"), cluster.full_name("payment"));

    // What is missing holds up its own gate, and nothing else.
    until_condition(&cluster, "shop", "ResolvedRefs", "False", "there is no Secret where with the label").await?;
    until_said(&cluster, "shop", "gate gate has not answered: urlSecretRef: there is no Secret where").await?;
    until_weights(&controller, &payment, &[50.0, 50.0]).await?;
    let agrees = async |expected: Value| {
        eventually("the session's secret", DEADLINE, async || {
            let session = session_of(&controller, &shop).await?;
            ensure!(session == expected, "{session}");
            Ok(())
        })
        .await
    };
    agrees(json!(["hush-one", null])).await?;
    assert!(receiver.got().is_empty());

    secret(&cluster, "where", Some("webhook"), &receiver.url()).await?;
    secret(&cluster, "sign", Some("webhook"), "hush-two\n").await?;
    until_condition(&cluster, "shop", "ResolvedRefs", "True", "").await?;
    until_said(&cluster, "shop", "gate gate says no: status 403 Forbidden: change freeze").await?;
    assert!(is_signed_with("hush-two", &receiver.got()[0]));
    // The period is an hour: the gate is asked again because the secret is another.
    receiver.answer(Answer::Status(200, ""));
    secret(&cluster, "sign", Some("webhook"), "hush-three").await?;
    until_weights(&controller, &shop, &[50.0, 50.0]).await?;
    let got = receiver.got();
    assert!(got.last().is_some_and(|got| is_signed_with("hush-three", got)));
    // Users stay where they are, and go on doing so if the Secret goes.
    secret(&cluster, "users", Some("session"), "hush-four").await?;
    agrees(json!(["hush-four", ["hush-one"]])).await?;
    cluster.delete("Secret", "users").await?;
    until_condition(&cluster, "shop", "ResolvedRefs", "False", "spec.session.secretRef: there is no Secret users")
        .await?;
    agrees(json!(["hush-four", ["hush-one"]])).await?;
    // A proxy of before is sent nothing that it would refuse.
    assert!(!policy(&controller).await?.to_string().contains("previousSecrets"));

    // Nobody who may see the TrafficShift, its Events, the status or the log reads any of it.
    let url = receiver.url();
    let address = url.split('/').nth(2).unwrap_or_default();
    let shown = [
        cluster.get("TrafficShift", "shop").await?.to_string(),
        json!(cluster.list("Event").await?).to_string(),
        controller.get("/v1/status").await?,
        controller.get(&format!("/v1/rollouts/{shop}/history")).await?,
        controller.get("/metrics").await?,
        controller.log(),
    ];
    for shown in shown {
        ensure!(!shown.contains("hush") && !shown.contains(address), "{shown}");
    }
    Ok(())
}

/// The confused deputy: authors of TrafficShifts who may not read Secrets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authors_get_at_no_secret_that_is_not_meant_for_it() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let receiver = Receiver::start(Answer::Status(403, "no")).await?;
    // Passwords and the controller's own state lie in the namespace; and a session's secret, which signs no webhook.
    secret(&cluster, "vault", None, "hush-vault").await?;
    secret(&cluster, "users", Some("session"), "hush-users").await?;
    secret(&cluster, "hooks", Some("webhook"), "hush-hooks").await?;
    for (name, key) in [("vault", "vault"), ("state", "tideshift-state"), ("users", "users")] {
        let gate = json!({ "name": "gate", "type": "Gate", "url": receiver.url(), "secretRef": key_of(key) });
        let session =
            json!({ "type": "Cookie", "name": "c", "secretRef": key_of(if key == "users" { "hooks" } else { key }) });
        apply(&cluster, name, json!({ "session": session, "webhooks": [gate] })).await?;
    }
    let elsewhere = json!({ "name": "gate", "type": "Gate", "urlSecretRef": key_of("hooks") });
    apply(&cluster, "elsewhere", json!({ "webhooks": [elsewhere] })).await?;
    // A literal is refused, with what to write instead.
    let gate = json!({ "name": "gate", "type": "Gate", "url": receiver.url(), "secret": "psst-psst" });
    apply(&cluster, "literal", json!({ "webhooks": [gate] })).await?;
    let controller = cluster.replica("a", &["--webhook-allow", "127.0.0.1"]).await?;

    for name in ["vault", "state", "users"] {
        until_condition(&cluster, name, "ResolvedRefs", "False", "spec.session.secretRef: there is no Secret").await?;
        until_condition(&cluster, name, "ResolvedRefs", "False", "spec.webhooks[0].secretRef: there is no Secret")
            .await?;
        until_said(&cluster, name, "gate gate has not answered: secretRef: there is no Secret").await?;
    }
    until_said(&cluster, "elsewhere", "not an http or https URL").await?;
    let refused = "spec.webhooks[0].secret: not allowed in a cluster";
    until_condition(&cluster, "literal", "Accepted", "False", refused).await?;
    until_condition(&cluster, "literal", "Accepted", "False", "expected secretRef: {name: SECRET, key: KEY}").await?;
    assert!(receiver.got().is_empty(), "nothing was sent that is signed with any of them");
    let policy = policy(&controller).await?.to_string();
    ensure!(!policy.contains("hush") && !policy.contains("psst") && !policy.contains("literal"), "{policy}");
    for name in ["vault", "state", "users", "elsewhere", "literal"] {
        let status = cluster.get("TrafficShift", name).await?["status"].to_string();
        ensure!(!status.contains("hush") && !status.contains("psst"), "{status}");
    }
    // It asked for single Secrets only, so the right to read all is not needed.
    let seen = cluster.server().requests().into_iter().map(|seen| seen.attempt);
    let mut names: Vec<_> =
        seen.filter(|seen| seen.resource == "secrets" && seen.verb == "watch").map(|seen| seen.name).collect();
    names.retain(|name| ["vault", "tideshift-state", "users", "hooks"].contains(&name.as_str()));
    assert!(names.iter().any(|name| name == "vault") && names.iter().any(|name| name == "users"), "{names:?}");
    Ok(())
}
