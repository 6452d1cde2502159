//! The controller in a cluster, as users see it: on the tests' own API server, and on any real cluster by
//! `make test-kubernetes`.

use std::env;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::client::{Request, get};
use tideshift_tests::controller::Controller;
use tideshift_tests::kubernetes::client;
use tideshift_tests::kubernetes::kubelet::READY;
use tideshift_tests::kubernetes::test_bed::{
    Cluster, Front, HOST, KUBECONFIG, hold_at, policy, shift, until, until_in_force, until_weights,
};
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, next_answers, revisions};
use tideshift_tests::wait::eventually;
use tokio::time::timeout;

const RATE: f64 = 200.0;

/// A version that is a Deployment's pods.
fn deployed(version: &str) -> Value {
    json!({
        "name": version,
        "selector": { "matchLabels": { "app": "payment-service", "version": version } },
        "workloadRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": format!("payment-service-{version}") },
    })
}

async fn replicas(cluster: &Cluster, deployment: &str) -> anyhow::Result<u64> {
    cluster.get("Deployment", deployment).await?["spec"]["replicas"].as_u64().context("no replicas")
}

async fn command(controller: &Controller, rollout: &str, command: &str, body: Value) -> anyhow::Result<()> {
    let path = format!("/v1/rollouts/{rollout}/{command}");
    let request = Request::new(controller.address(), "POST", &path).header("content-type", "application/json");
    let answer = request.body(body.to_string()).send().await?;
    ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.text());
    Ok(())
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.find(|one| one["type"] == kind).unwrap_or(&Value::Null)
}

async fn until_leads(cluster: &Cluster, name: &str) -> anyhow::Result<Value> {
    cluster
        .until(&format!("{name} to lead"), "Lease", "tideshift", |lease| {
            ensure!(lease["spec"]["holderIdentity"] == name, "{}", lease["spec"]);
            Ok(())
        })
        .await
}

/// What `make test-kubernetes` asks first.
#[tokio::test]
#[ignore = "no test of the controller"]
async fn the_cluster_answers() -> anyhow::Result<()> {
    let path = env::var_os(KUBECONFIG).with_context(|| format!("{KUBECONFIG} is not set"))?;
    let client = client(Path::new(&path)).await?;
    timeout(Duration::from_secs(10), client.apiserver_version()).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_without_replicas_takes_over_and_the_old_one_is_scaled_to_zero_once_it_has_drained()
-> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.full_name("payment-service");
    cluster.expose("payment-service").await?;
    cluster.deploy("payment-service", "v1", 2).await?;
    cluster.deploy("payment-service", "v2", 0).await?;
    let mut document = json!({ "kind": "TrafficShift", "metadata": { "name": "payment-service" }, "spec": {
        "hostnames": [HOST],
        "versions": [deployed("v1"), deployed("v2")],
        "stable": "v1",
        "strategy": {
            "steps": [{ "weight": 10, "holdSeconds": 1 }, { "pause": true }, { "weight": 100 }],
            "scaleDownDelaySeconds": 1,
        },
    } });
    cluster.apply(document.clone()).await?;
    let controller = cluster.replica("a", &[]).await?;
    let front = Front::start(&service, &[&controller]).await?;
    until_in_force(&controller, &service, &[100.0, 0.0]).await?;
    let load = front.load(RATE);
    next_answers(&load, 50).await?;
    assert_eq!(replicas(&cluster, "payment-service-v2").await?, 0, "v2 has not been requested yet");

    document["spec"]["target"] = json!("v2");
    cluster.apply(document).await?;
    let seen = cluster.until("v2 to be scaled for its first step", "Deployment", "payment-service-v2", |v2| {
        ensure!(v2["spec"]["replicas"] == 1, "10 % of 2 is one");
        Ok(())
    });
    seen.await?;
    let paused = until(&controller, &service, "the pause after the first step", |view| {
        ensure!(view.service["reason"] == "PauseStep" && view.weights() == [90.0, 10.0]);
        ensure!(view.is_in_force(), "not in force");
        Ok(())
    });
    paused.await?;
    assert_eq!(replicas(&cluster, "payment-service-v1").await?, 2, "v1 serves");
    let tally = next_answers(&load, 300).await?;
    assert!(tally.of("v2") > 0 && tally.of("v1") > 200, "{:?}", tally.by);

    // A request that takes its time keeps v1 draining, though no new requests go there.
    const SLOW: Duration = Duration::from_secs(6);
    let v1 = front.version("v1");
    let slow = Arc::new(AtomicBool::new(true));
    let holds = Arc::clone(&slow);
    v1.set(|behaviour| behaviour.latency = SLOW);
    let request = get(front.address(), "/slow").host(HOST).header("x-slow", "1");
    let before = v1.counts().requests;
    let holding = tokio::spawn(async move {
        let mut answers = Vec::new();
        // One of them may go to v2.
        for answer in [request.send(), request.send()].map(Box::pin) {
            answers.push(answer);
        }
        let both = futures_util::future::join_all(answers).await;
        holds.store(false, Ordering::SeqCst);
        both.into_iter().map(|answer| Ok(answer?.status)).collect::<anyhow::Result<Vec<_>>>()
    });
    eventually("a slow request at v1", DEADLINE, async || {
        ensure!(v1.counts().requests > before, "none has come");
        Ok(())
    })
    .await?;
    v1.set(|behaviour| behaviour.latency = Duration::ZERO);
    command(&controller, &service, "promote", json!({})).await?;
    until_in_force(&controller, &service, &[0.0, 100.0]).await?;
    assert!(slow.load(Ordering::SeqCst), "the slow request has ended too soon to show anything");
    eventually("v1 to be scaled to 0", DEADLINE, async || {
        let (replicas, held) = (replicas(&cluster, "payment-service-v1").await?, slow.load(Ordering::SeqCst));
        // Looked at after the replicas: if it is still held now, it was when they were read.
        assert!(replicas == 2 || !held, "v1 was scaled to {replicas} while a request of it was under way");
        ensure!(replicas == 0, "{replicas} replicas");
        Ok(())
    })
    .await
    .with_context(|| controller.tail())?;
    assert_eq!(holding.await??, [200, 200]);
    assert_eq!(replicas(&cluster, "payment-service-v2").await?, 2, "all that v1 had");
    next_answers(&load, 100).await?;
    let tally = load.stop().await?;
    assert_eq!((tally.bad(), tally.failed), (0, 0), "{:?}", tally.failures);

    // What kubectl shows of it.
    let object = cluster
        .until("the status to say so", "TrafficShift", "payment-service", |object| {
            let status = &object["status"];
            ensure!(status["phase"] == "Succeeded" && status["weights"] == "v1 0 %, v2 100 %");
            ensure!(status["observedGeneration"] == object["metadata"]["generation"]);
            ensure!(status["stable"] == "v2", "what has succeeded is stable");
            for (kind, so) in
                [("Accepted", "True"), ("Available", "True"), ("Progressing", "False"), ("Completed", "True")]
            {
                let condition = condition(object, kind);
                ensure!(condition["status"] == so, "{condition}");
                ensure!(condition["observedGeneration"] == object["metadata"]["generation"], "{condition}");
            }
            Ok(())
        })
        .await?;
    assert_eq!(object["status"]["verdict"]["target"]["errors"], 0, "{}", object["status"]["verdict"]);
    eventually("Events of all that happened", DEADLINE, async || {
        let events = cluster.events("payment-service").await?;
        for reason in ["Started", "PauseStep", "Promoted", "Completed", "Scaled"] {
            ensure!(events.iter().any(|event| event == reason), "no {reason} in {events:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_replica_takes_over_from_one_that_is_killed_and_no_request_and_no_count_is_lost() -> anyhow::Result<()>
{
    let cluster = Cluster::start().await?;
    let service = cluster.full_name("payment");
    cluster.slice("payment-v1", 2, 2).await?;
    cluster.slice("payment-v2", 2, 2).await?;
    cluster.apply(shift("payment", hold_at(30))).await?;
    let mut a = cluster.replica("a", &[]).await?;
    let mut b = cluster.replica("b", &[]).await?;
    let front = Front::start(&service, &[&a, &b]).await?;
    let load = front.load(RATE);
    let before = until_in_force(&b, &service, &[70.0, 30.0]).await?;
    next_answers(&load, 200).await?;
    assert_eq!(policy(&a).await?, policy(&b).await?, "a follower gives the leader's policy");

    let killed = Instant::now();
    a.kill()?;
    let taken = until_leads(&cluster, "b").await;
    taken.with_context(|| b.tail())?;
    let after = until(&b, &service, "the new leader to know everything", |view| {
        ensure!(view.weights() == [70.0, 30.0] && view.is_in_force(), "{:?}", view.weights());
        Ok(())
    })
    .await?;
    let took = killed.elapsed();
    println!("TAKEOVER after SIGKILL of the leader: {:.1} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(10), "the takeover took {took:?}");
    // Nothing was decided meanwhile, so proxies have heard nothing new.
    assert_eq!((after.step(), after.revision()), (before.step(), before.revision()));
    let tally = next_answers(&load, 600).await?;
    assert!((tally.share("v2") - 0.3).abs() < 0.06, "{:?}", tally.by);
    assert_eq!(after.service["since"], before.service["since"], "the rollout goes on where it was");
    cluster.apply(shift("payment", hold_at(25))).await?;
    until_in_force(&b, &service, &[75.0, 25.0]).await?;

    // One that ends as it is asked to hands over at once.
    a.start_again().await?;
    until_weights(&a, &service, &[75.0, 25.0]).await?;
    let asked = Instant::now();
    let (status, led) = tokio::join!(b.terminate(), until_leads(&cluster, "a"));
    let (status, _) = (status?, led?);
    until(&a, &service, "the first leader again", |view| {
        ensure!(view.weights() == [75.0, 25.0] && view.is_in_force());
        Ok(())
    })
    .await?;
    println!("TAKEOVER after SIGTERM to the leader: {:.1} s", asked.elapsed().as_secs_f64());
    assert!(status.success(), "{status}");
    assert!(b.log().contains("gave the lease back"), "{}", b.tail());
    cluster.apply(shift("payment", hold_at(20))).await?;
    until_in_force(&a, &service, &[80.0, 20.0]).await?;
    next_answers(&load, 200).await?;
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    front.assert_counts_agree(&a, &tally).await?;
    let revisions = revisions(&front.envoy);
    assert!(revisions.is_sorted_by(|a, b| a < b), "no revision goes back, none comes twice: {revisions:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_a_slice_reaches_the_proxy_at_once() -> anyhow::Result<()> {
    const CHANGES: usize = 50;
    let cluster = Cluster::start().await?;
    let service = cluster.full_name("payment");
    cluster.slice("payment-v1", 2, 2).await?;
    cluster.slice("payment-v2", 2, 2).await?;
    let mut document = shift("payment", hold_at(80));
    document["spec"]["capacity"] = json!({ "endpointsForFullLoad": 2 });
    cluster.apply(document).await?;
    let controller = cluster.replica("a", &[]).await?;
    let front = Front::start(&service, &[&controller]).await?;
    until_in_force(&controller, &service, &[20.0, 80.0]).await?;
    let mut took = Vec::with_capacity(CHANGES);
    for n in 0..CHANGES {
        let before = revisions(&front.envoy).len();
        // The clock starts when the change is asked for: the API server's own time is in it.
        let asked = Instant::now();
        cluster.slice("payment-v2", 2, (n % 2 + 1) as u8).await?;
        eventually("a new policy at the proxy", DEADLINE, async || {
            ensure!(revisions(&front.envoy).len() > before, "{}", controller.tail());
            Ok(())
        })
        .await?;
        took.push(asked.elapsed());
        let shares = if n % 2 == 0 { [50.0, 50.0] } else { [20.0, 80.0] };
        until_weights(&controller, &service, &shares).await?;
    }
    took.sort_unstable();
    let [p50, p99] = [CHANGES / 2, CHANGES * 99 / 100].map(|n| took[n].as_secs_f64() * 1e3);
    println!(
        "LATENCY from the change of an EndpointSlice to the proxy, {CHANGES} changes: p50 {p50:.0} ms, p99 {p99:.0} ms"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_not_ready_takes_its_share_away_in_every_proxy() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    if !cluster.obeys_annotations() {
        println!("SKIPPED: pods of this cluster cannot be told not to be ready");
        return Ok(());
    }
    let service = cluster.full_name("payment");
    cluster.expose("payment").await?;
    cluster.deploy("payment", "v1", 2).await?;
    cluster.deploy("payment", "v2", 2).await?;
    let version = |name: &str, labels: Value| json!({ "name": name, "service": "payment", "selector": labels });
    let v1 = version("v1", json!({ "matchLabels": { "version": "v1" } }));
    let v2 =
        version("v2", json!({ "matchExpressions": [{ "key": "version", "operator": "NotIn", "values": ["v1"] }] }));
    let mut spec = hold_at(80);
    spec["versions"] = json!([v1, v2]);
    cluster.apply(shift("payment", spec)).await?;
    let controller = cluster.replica("a", &[]).await?;
    let first = Front::start(&service, &[&controller]).await?;
    let second = Front::start(&service, &[&controller]).await?;
    until_in_force(&controller, &service, &[20.0, 80.0]).await?;

    let pods = cluster.list("Pod").await?;
    let of = |version: &str| {
        let of_version = pods.iter().filter(|pod| pod["metadata"]["labels"]["version"] == version);
        of_version.filter_map(|pod| pod["metadata"]["name"].as_str().map(ToOwned::to_owned)).collect::<Vec<_>>()
    };
    let set_ready = async |pod: &str, ready: bool| {
        let annotations = json!({ READY: ready.to_string() });
        cluster.patch("Pod", pod, json!({ "metadata": { "annotations": annotations } })).await
    };
    let v2 = of("v2");
    assert_eq!(v2.len(), 2, "{pods:?}");
    set_ready(&v2[0], false).await?;
    let view = until_in_force(&controller, &service, &[50.0, 50.0]).await?;
    let endpoints = &view.service["versions"][1]["endpoints"];
    assert_eq!((&endpoints["ready"], &endpoints["listed"]), (&json!(1), &json!(2)), "{endpoints}");
    set_ready(&v2[1], false).await?;
    until_in_force(&controller, &service, &[100.0, 0.0]).await?;
    for front in [&first, &second] {
        let before = front.version("v2").counts().requests;
        let load = front.load(RATE);
        next_answers(&load, 100).await?;
        let tally = load.stop().await?;
        assert_eq!((tally.of("v1"), tally.bad()), (tally.sent, 0), "{:?}", tally.by);
        assert_eq!(front.version("v2").counts().requests, before);
    }
    set_ready(&v2[0], true).await?;
    set_ready(&v2[1], true).await?;
    until_in_force(&controller, &service, &[20.0, 80.0]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_autoscaler_is_told_the_least_and_a_disruption_budget_is_kept() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.full_name("payment-service");
    cluster.expose("payment-service").await?;
    cluster.deploy("payment-service", "v1", 3).await?;
    cluster.deploy("payment-service", "v2", 1).await?;
    let target = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": "payment-service-v2" });
    let autoscaler = json!({ "scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 9 });
    cluster
        .apply(json!({ "kind": "HorizontalPodAutoscaler", "metadata": { "name": "v2" }, "spec": autoscaler }))
        .await?;
    let budget = json!({ "minAvailable": 2, "selector": { "matchLabels": { "version": "v1" } } });
    cluster.apply(json!({ "kind": "PodDisruptionBudget", "metadata": { "name": "v1" }, "spec": budget })).await?;
    let mut document = json!({ "kind": "TrafficShift", "metadata": { "name": "payment-service" }, "spec": {
        "hostnames": [HOST],
        "versions": [deployed("v1"), deployed("v2")],
        "stable": "v1",
        "target": "v2",
        "strategy": {
            "maxSurge": "100%",
            "steps": [{ "weight": 60, "holdSeconds": FOR_EVER }],
            "scaleDownDelaySeconds": 0,
        },
    } });
    cluster.apply(document.clone()).await?;
    let controller = cluster.replica("a", &[]).await?;
    let front = Front::start(&service, &[&controller]).await?;
    let least = |min: u64, before: Value| {
        move |autoscaler: &Value| {
            let noted = &autoscaler["metadata"]["annotations"]["tideshift.dev/min-replicas-before"];
            ensure!(autoscaler["spec"]["minReplicas"] == min && *noted == before, "{autoscaler}");
            Ok(())
        }
    };
    cluster
        .until("60 % of 3", "HorizontalPodAutoscaler", "v2", least(2, json!("1")))
        .await
        .with_context(|| controller.log())?;
    assert_eq!(replicas(&cluster, "payment-service-v2").await?, 1, "its replicas are the autoscaler's");
    // Which is what an autoscaler does then.
    cluster.patch("Deployment", "payment-service-v2", json!({ "spec": { "replicas": 2 } })).await?;
    until_weights(&controller, &service, &[40.0, 60.0]).await?;

    // An edit alone moves no user ahead.
    document["spec"]["strategy"]["steps"] = json!([{ "weight": 100 }]);
    cluster.apply(document).await?;
    until(&controller, &service, "it to stay where it is", |view| {
        ensure!(view.service["reason"] == "StepsChanged" && view.weights() == [40.0, 60.0]);
        Ok(())
    })
    .await?;
    command(&controller, &service, "promote", json!({})).await?;
    cluster
        .until("all of 3", "HorizontalPodAutoscaler", "v2", least(3, json!("1")))
        .await
        .with_context(|| controller.log())?;
    cluster.patch("Deployment", "payment-service-v2", json!({ "spec": { "replicas": 3 } })).await?;
    let load = front.load(RATE);
    until_in_force(&controller, &service, &[0.0, 100.0]).await?;
    let promised = cluster.until("v1 to be as small as it may be", "Deployment", "payment-service-v1", |v1| {
        ensure!(v1["spec"]["replicas"] == 2);
        Ok(())
    });
    promised.await.with_context(|| controller.tail())?;
    cluster
        .until("the autoscaler to have back what it had", "HorizontalPodAutoscaler", "v2", least(1, Value::Null))
        .await?;
    assert_eq!(replicas(&cluster, "payment-service-v1").await?, 2);
    assert_eq!(load.stop().await?.bad(), 0);
    Ok(())
}

/// Waits until a TrafficShift is refused, with these words.
async fn until_refused(cluster: &Cluster, name: &str, words: &[&str]) -> anyhow::Result<()> {
    let refused = cluster.until("it to be refused", "TrafficShift", name, |object| {
        let accepted = condition(object, "Accepted");
        let message = accepted["message"].as_str().unwrap_or_default();
        ensure!(accepted["status"] == "False" && words.iter().all(|word| message.contains(word)), "{accepted}");
        Ok(())
    });
    refused.await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_serve_are_scaled_away_by_no_version_and_by_no_other_document() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.full_name("payment-service");
    cluster.expose("payment-service").await?;
    cluster.deploy("payment-service", "v1", 1).await?;
    cluster.deploy("payment-service", "v2", 1).await?;
    let document = |name: &str, host: &str, v1: Value, v2: Value| {
        json!({ "kind": "TrafficShift", "metadata": { "name": name }, "spec": {
            "hostnames": [host], "versions": [v1, v2], "stable": "v1", "target": "v2",
            "strategy": { "steps": [{ "weight": 100 }], "scaleDownDelaySeconds": 0 },
        } })
    };
    // What v1 names as its own runs v2, which names nothing.
    let mut v1 = deployed("v1");
    v1["workloadRef"]["name"] = json!("payment-service-v2");
    let v2 = json!({ "name": "v2", "selector": deployed("v2")["selector"] });
    cluster.apply(document("payment-service", HOST, v1.clone(), v2)).await?;
    let controller = cluster.replica("a", &[]).await?;
    let _front = Front::start(&service, &[&controller]).await?;
    until_in_force(&controller, &service, &[0.0, 100.0]).await?;
    eventually("what keeps the pods to be told", DEADLINE, async || {
        let events = cluster.events("payment-service").await?;
        ensure!(events.iter().any(|event| event == "NotScaled"), "{events:?}");
        Ok(())
    })
    .await
    .with_context(|| controller.tail())?;
    let why = "is a ready endpoint of version v2";
    assert!(controller.log().contains(why), "{}", controller.tail());
    assert_eq!(replicas(&cluster, "payment-service-v2").await?, 1, "its pods serve");

    // No other document, and no other version of the same one, controls a workload that is already scaled.
    let rivals = json!({ "name": "v2", "service": "rival-v2", "workloadRef": v1["workloadRef"] });
    let rival = document("rival", "rival.example.com", json!({ "name": "v1", "service": "rival-v1" }), rivals);
    cluster.apply(rival).await?;
    let names =
        ["Deployment payment-service-v2: not allowed for version v2", "version v1's of the TrafficShift", &service];
    until_refused(&cluster, "rival", &names).await?;
    let mut twice = deployed("v2");
    twice["workloadRef"] = v1["workloadRef"].clone();
    cluster.apply(document("payment-service", HOST, v1, twice)).await?;
    until_refused(&cluster, "payment-service", &["version v2: already version v1's in the same document"]).await?;
    assert_eq!(replicas(&cluster, "payment-service-v2").await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_are_known_by_the_tokens_that_the_cluster_gave_them() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.apply(json!({ "kind": "ServiceAccount", "metadata": { "name": "gateway" } })).await?;
    let right = cluster.token("gateway", "tideshift").await?;
    let wrong = cluster.token("gateway", "somebody-else").await?;
    let controller = cluster.replica("a", &["--proxy-token-audience", "tideshift"]).await?;
    let ask = async |path: &str, token: &str| {
        let request = get(controller.address(), path).header("authorization", format!("Bearer {token}"));
        anyhow::Ok(request.send().await?.status)
    };
    const POLICY: &str = "/v1/policy?proxy=p&epoch=&after=0";
    assert_eq!(ask(POLICY, &right).await?, 200, "{}", controller.tail());
    for token in [&wrong, "made up", ""] {
        assert_eq!(ask(POLICY, token).await?, 401, "{token:?}");
    }
    assert_ne!(ask("/v1/status", &right).await?, 200, "what proxies may do is all that it is good for");
    Ok(())
}
