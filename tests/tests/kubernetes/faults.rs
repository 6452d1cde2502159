//! What goes wrong between the controller and a cluster: no traffic moves that should not, and somebody says what is
//! wrong. On the tests' own API server, which fails to order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tideshift_tests::client::{Connection, Request, get};
use tideshift_tests::controller::Controller;
use tideshift_tests::kubernetes::apiserver::{ApiServer, Whom};
use tideshift_tests::kubernetes::test_bed::{
    Cluster, Front, View, hold_at, policy, shift, slice, until_in_force, until_weights, weights_of,
};
use tideshift_tests::ports::Port;
use tideshift_tests::test_bed::{DEADLINE, next_answers, revisions};
use tideshift_tests::wait::eventually;
use tokio::task::JoinHandle;

const RATE: f64 = 100.0;

/// A TrafficShift `payment` with v2 at 30 %, and slices of both versions.
async fn payment(cluster: &Cluster) -> anyhow::Result<String> {
    cluster.slice("payment-v1", 2, 2).await?;
    cluster.slice("payment-v2", 2, 2).await?;
    cluster.apply(shift("payment", hold_at(30))).await?;
    Ok(cluster.full_name("payment"))
}

/// Looks at the policies of several replicas all the time: what a revision says never changes.
struct Witness {
    seen: Arc<Mutex<BTreeMap<u64, (usize, Value)>>>,
    task: JoinHandle<()>,
}

impl Witness {
    fn of(replicas: &[&Controller]) -> Self {
        let seen: Arc<Mutex<BTreeMap<u64, (usize, Value)>>> = Arc::default();
        let (addresses, notes) =
            (replicas.iter().map(|replica| replica.address()).collect::<Vec<_>>(), Arc::clone(&seen));
        let look = async move |address| {
            let policy = get(address, "/v1/policy?proxy=witness&epoch=&after=0").send().await.ok()?;
            policy.json().ok()
        };
        let task = tokio::spawn(async move {
            loop {
                for (n, &address) in addresses.iter().enumerate() {
                    // One that is stopped answers when it goes on.
                    let policy = tokio::time::timeout(Duration::from_millis(200), look(address)).await;
                    let Ok(Some(policy)) = policy else { continue };
                    let Some(revision) = policy["revision"].as_u64() else { continue };
                    let mut notes = notes.lock().expect("no other thread panics with it");
                    let (of, before) = notes.entry(revision).or_insert_with(|| (n, policy.clone()));
                    if *before != policy {
                        panic!("revision {revision} is {before} at {of} and {policy} at {n}");
                    }
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Self { seen, task }
    }

    /// Waits until it has seen so many revisions, and no two policies of one.
    async fn until(&self, revisions: usize) -> anyhow::Result<()> {
        eventually(&format!("{revisions} revisions"), DEADLINE, async || {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).len();
            ensure!(seen >= revisions, "{seen}");
            Ok(())
        })
        .await?;
        ensure!(!self.task.is_finished(), "two policies of one revision were seen");
        Ok(())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn until_leads(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let holds = |lease: &Value| {
        ensure!(lease["spec"]["holderIdentity"] == name, "{}", lease["spec"]);
        Ok(())
    };
    cluster.until(&format!("{name} to lead"), "Lease", "tideshift", holds).await.map(drop)
}

/// Waits until the status of a TrafficShift, as kubectl shows it, says these words in its message.
async fn until_said(cluster: &Cluster, name: &str, words: &str) -> anyhow::Result<Value> {
    cluster
        .until(&format!("the status to say {words:?}"), "TrafficShift", name, |object| {
            let status = object["status"].to_string();
            ensure!(status.contains(words), "{status}");
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_is_away_for_a_while_changes_nothing_and_all_goes_on_when_it_is_back() -> anyhow::Result<()>
{
    const AWAY: Duration = Duration::from_secs(8);
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let a = cluster.replica("a", &[]).await?;
    let b = cluster.replica("b", &[]).await?;
    let front = Front::start(&service, &[&a, &b]).await?;
    let load = front.load(RATE);
    let before = until_in_force(&a, &service, &[70.0, 30.0]).await?;
    let given = policy(&a).await?;

    let went = Instant::now();
    cluster.server().go_away().await;
    // The controller cannot observe this, and must not guess.
    cluster.server().apply(slice_in(&cluster, "payment-v2", 2, 0))?;
    cluster.server().compact();
    eventually("a replica to report that there is no leader", DEADLINE, async || {
        let answer = get(a.address(), "/v1/status").send().await?;
        ensure!(answer.status == 503 && answer.text().contains("no replica leads"), "{}", answer.text());
        Ok(())
    })
    .await?;
    while went.elapsed() < AWAY {
        for replica in [&a, &b] {
            assert_eq!(policy(replica).await?, given);
        }
        let tally = next_answers(&load, 100).await?;
        assert!((tally.share("v2") - 0.3).abs() < 0.15 && tally.bad() == 0, "{:?}", tally.by);
    }
    for replica in [&a, &b] {
        assert!(replica.log().contains("cannot be seen"), "{}", replica.tail());
    }

    cluster.server().come_back().await?;
    let after = until_in_force(&a, &service, &[100.0, 0.0]).await.with_context(|| b.tail())?;
    assert!(after.revision() > before.revision());
    cluster.slice("payment-v2", 2, 2).await?;
    until_in_force(&b, &service, &[70.0, 30.0]).await?;
    let tally = load.stop().await?;
    front.assert_counts_agree(&a, &tally).await?;
    let revisions = revisions(&front.envoy);
    assert!(revisions.is_sorted_by(|a, b| a < b), "{revisions:?}");
    Ok(())
}

/// For changes that bypass the unreachable server.
fn slice_in(cluster: &Cluster, service: &str, listed: u8, ready: u8) -> Value {
    let mut slice = slice(service, listed, ready);
    slice["apiVersion"] = json!("discovery.k8s.io/v1");
    slice["metadata"]["namespace"] = json!(cluster.namespace);
    slice
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_publishes_nothing_more_and_follows_when_it_is_back() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let a = cluster.replica("a", &[]).await?;
    until_leads(&cluster, "a").await?;
    let b = cluster.replica("b", &[]).await?;
    let before = until_weights(&b, &service, &[70.0, 30.0]).await?;
    let given = policy(&a).await?;
    let witness = Witness::of(&[&a, &b]);

    cluster.server().hold(Whom::user("a"));
    until_leads(&cluster, "b").await?;
    cluster.apply(shift("payment", hold_at(20))).await?;
    eventually("b to decide", DEADLINE, async || {
        ensure!(View::of(&b, &service).await?.weights() == [80.0, 20.0]);
        Ok(())
    })
    .await?;
    assert!(View::of(&b, &service).await?.revision() > before.revision());
    assert_eq!(policy(&a).await?, given, "all that it knows");
    assert!(a.log().contains("the lease could not be renewed"), "{}", a.tail());
    // It may still wait for what it wrote last.
    eventually("it to say that it does not know who leads", DEADLINE, async || {
        let answer = get(a.address(), "/v1/status").send().await?;
        ensure!(answer.status == 503, "{}", answer.text());
        Ok(())
    })
    .await?;

    cluster.server().release(&Whom::user("a"));
    eventually("a to give what b has decided", DEADLINE, async || {
        let (a, b) = (policy(&a).await?, policy(&b).await?);
        ensure!(a == b && weights_of(&a, &service) == weights_of(&b, &service), "{a} {b}");
        ensure!(a["revision"].as_u64() > given["revision"].as_u64());
        Ok(())
    })
    .await?;
    until_weights(&a, &service, &[80.0, 20.0]).await?;
    until_leads(&cluster, "b").await?;
    witness.until(2).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_held_up_and_still_believes_to_lead_cannot_publish() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let a = cluster.replica("a", &[]).await?;
    until_leads(&cluster, "a").await?;
    let b = cluster.replica("b", &[]).await?;
    until_weights(&b, &service, &[70.0, 30.0]).await?;
    let witness = Witness::of(&[&a, &b]);
    let signal = |signal| -> anyhow::Result<()> {
        let id = i32::try_from(a.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        Ok(kill_process(id, signal)?)
    };

    // People's commands that it has let in as the leader, and whose last byte it finds when it goes on.
    let path = format!("/v1/rollouts/{service}/set-weight");
    let command = Request::new(a.address(), "POST", &path).header("content-type", "application/json");
    let command = command.body(r#"{"weight": 10}"#).bytes();
    let mut commands = Vec::new();
    for _ in 0..8 {
        let mut connection = Connection::open(a.address()).await?;
        connection.write(&command[..command.len() - 1]).await?;
        commands.push(connection);
    }
    // It has read them once it has answered what came later.
    View::of(&a, &service).await?;
    // Its clock stands still: when it goes on, it thinks that it has just renewed the Lease.
    signal(Signal::STOP)?;
    until_leads(&cluster, "b").await?;
    cluster.apply(shift("payment", hold_at(20))).await?;
    until_weights(&b, &service, &[80.0, 20.0]).await?;
    witness.until(2).await?;
    cluster.apply(shift("payment", hold_at(10))).await?;
    until_weights(&b, &service, &[90.0, 10.0]).await?;
    for waiting in &mut commands {
        waiting.write(b"}").await?;
    }
    signal(Signal::CONT)?;
    eventually("a to follow", DEADLINE, async || {
        let (a, b) = (policy(&a).await?, policy(&b).await?);
        ensure!(a == b, "{a} {b}");
        Ok(())
    })
    .await
    .with_context(|| a.tail())?;
    until_weights(&a, &service, &[90.0, 10.0]).await?;
    until_leads(&cluster, "b").await?;
    witness.until(3).await?;
    Ok(())
}

/// Waits until a replica says this of the documents.
async fn until_complained(address: SocketAddr, words: &str) -> anyhow::Result<()> {
    eventually(&format!("it to say {words:?}"), DEADLINE, async || {
        let status = get(address, "/v1/status").send().await?.json()?;
        ensure!(status["documentErrors"].to_string().contains(words), "{status}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_crd_it_waits_for_it_and_says_so() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in_without_crd().await?;
    let port = Port::reserve()?;
    let address = port.address();
    let installed = async {
        until_complained(address, "cannot be seen").await?;
        // A policy without services would take away what proxies have begun with.
        assert_eq!(get(address, "/readyz").send().await?.status, 503);
        cluster.install().await?;
        payment(&cluster).await
    };
    let (controller, service) = tokio::join!(cluster.replica_on(port, "a", &[]), installed);
    let (controller, service) = (controller?, service?);
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    assert!(controller.log().contains("TrafficShifts in namespace"), "{}", controller.tail());
    assert_eq!(controller.status().await?.get("documentErrors"), None);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crd_that_goes_takes_no_service_with_it() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let mut audit = shift("audit", json!({ "onDelete": "Drain", "drain": { "timeoutSeconds": 0 } }));
    audit["spec"]["hostnames"] = json!(["audit.example.com"]);
    cluster.apply(audit).await?;
    cluster.slice("audit-v1", 1, 1).await?;
    let controller = cluster.replica("a", &[]).await?;
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    eventually("both services", DEADLINE, async || {
        let policy = policy(&controller).await?;
        ensure!(weights_of(&policy, &cluster.full_name("audit")).len() == 2, "{policy}");
        Ok(())
    })
    .await?;
    // A deliberate deletion takes effect.
    cluster.delete("TrafficShift", "audit").await?;
    eventually("a policy without it", DEADLINE, async || {
        let policy = policy(&controller).await?;
        ensure!(weights_of(&policy, &cluster.full_name("audit")).is_empty(), "{policy}");
        Ok(())
    })
    .await?;
    eventually("its finalizer to be removed", DEADLINE, async || {
        let left = cluster.list("TrafficShift").await?;
        ensure!(left.len() == 1, "{left:?}");
        Ok(())
    })
    .await?;
    let before = policy(&controller).await?;

    cluster.server().delete("customresourcedefinitions", "", "trafficshifts.tideshift.dev")?;
    assert!(cluster.server().list("trafficshifts", "").unwrap_or_default().is_empty(), "they all go with it");
    until_complained(controller.address(), "cannot be seen").await.with_context(|| controller.tail())?;
    assert_eq!(policy(&controller).await?, before);
    assert_eq!(View::of(&controller, &service).await?.weights(), [70.0, 30.0]);
    cluster.slice("payment-v2", 2, 0).await?;
    until_weights(&controller, &service, &[100.0, 0.0]).await?;
    cluster.slice("payment-v2", 2, 2).await?;
    cluster.install().await?;
    cluster.apply(shift("payment", hold_at(20))).await?;
    until_weights(&controller, &service, &[80.0, 20.0]).await?;
    Ok(())
}

/// Deleting a TrafficShift moves nothing; one that is to drain waits for that, and no longer than its deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_traffic_shift_that_is_deleted_keeps_its_weights_or_drains_by_its_deadline() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let name = payment(&cluster).await?;
    let controller = cluster.replica("a", &[]).await?;
    until_weights(&controller, &name, &[70.0, 30.0]).await?;
    let finalizers = async || {
        Ok::<_, anyhow::Error>(cluster.get("TrafficShift", "payment").await?["metadata"]["finalizers"].clone())
    };
    assert_eq!(finalizers().await?, Value::Null, "nothing waits for what is kept");
    cluster.delete("TrafficShift", "payment").await?;
    let is_gone = async || {
        eventually("the TrafficShift to be gone", DEADLINE, async || {
            let left = cluster.list("TrafficShift").await?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .await
    };
    is_gone().await?;
    let of_deleted = |view: &Value| view["services"][0]["reason"] == "DocumentLeft";
    eventually("it to be seen", DEADLINE, async || {
        let status = controller.status().await?;
        ensure!(of_deleted(&status), "{status}");
        Ok(())
    })
    .await?;
    until_weights(&controller, &name, &[70.0, 30.0]).await?;

    // It is back, goes on, and is to drain from now on.
    let mut fields = hold_at(30);
    fields["onDelete"] = json!("Drain");
    fields["drain"] = json!({ "timeoutSeconds": 2 });
    cluster.apply(shift("payment", fields)).await?;
    cluster
        .until("the finalizer", "TrafficShift", "payment", |object| {
            ensure!(object["metadata"]["finalizers"] == json!(["tideshift.dev/drain"]), "{}", object["metadata"]);
            Ok(())
        })
        .await?;
    until_weights(&controller, &name, &[70.0, 30.0]).await?;
    cluster.delete("TrafficShift", "payment").await?;
    is_gone().await?;
    eventually("its traffic to go to the default route", DEADLINE, async || {
        let policy = policy(&controller).await?;
        ensure!(policy["services"] == json!([]), "{policy}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_without_permission_stays_as_it_is_and_the_others_go_on() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let mut other = shift("audit", hold_at(50));
    other["metadata"]["namespace"] = json!("other");
    other["spec"]["hostnames"] = json!(["audit.example.com"]);
    for version in ["audit-v1", "audit-v2"] {
        let mut slice = slice(version, 1, 1);
        slice["metadata"]["namespace"] = json!("other");
        cluster.apply(slice).await?;
    }
    cluster.apply(other.clone()).await?;
    let forbid = |resource: &'static str, namespace: String| {
        cluster.server().forbid(move |attempt| {
            attempt.user == "a" && attempt.resource == resource && attempt.namespace == namespace
        });
        cluster.server().cut_watches();
    };
    let mut controller = cluster.replica("a", &["--watch-namespace", "other"]).await?;
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    until_weights(&controller, "audit.other", &[50.0, 50.0]).await?;

    forbid("trafficshifts", "other".to_owned());
    until_complained(controller.address(), "TrafficShifts in namespace other cannot be seen").await?;
    other["spec"]["strategy"]["steps"] = json!([{ "weight": 10, "holdSeconds": 3600 }]);
    cluster.apply(other).await?;
    cluster.apply(shift("payment", hold_at(20))).await?;
    until_weights(&controller, &service, &[80.0, 20.0]).await?;
    assert_eq!(View::of(&controller, "audit.other").await?.weights(), [50.0, 50.0]);

    // Also for one that has never seen it.
    controller.terminate().await?;
    controller.start_again().await?;
    until_weights(&controller, &service, &[80.0, 20.0]).await?;
    assert_eq!(weights_of(&policy(&controller).await?, "audit.other"), [50, 50]);
    cluster.server().allow_all();
    until_weights(&controller, "audit.other", &[90.0, 10.0]).await?;

    forbid("endpointslices", cluster.namespace.clone());
    until_said(&cluster, "payment", "EndpointSlices in namespace").await?;
    cluster.slice("payment-v2", 2, 0).await?;
    let mut slice = slice("audit-v2", 1, 0);
    slice["metadata"]["namespace"] = json!("other");
    cluster.apply(slice).await?;
    until_weights(&controller, "audit.other", &[100.0, 0.0]).await?;
    assert_eq!(weights_of(&policy(&controller).await?, &service), [80, 20]);
    cluster.server().allow_all();
    until_weights(&controller, &service, &[100.0, 0.0]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_out_of_sight_freezes_its_weights_and_no_others() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let west = ApiServer::start().await?;
    let lead_to = async |kubeconfig: &str| {
        let labels = json!({ "tideshift.dev/cluster": "west" });
        // Also the default, since the Secret is in this namespace.
        let annotations = json!({ "tideshift.dev/namespaces": cluster.namespace });
        let metadata = json!({ "name": "west", "labels": labels, "annotations": annotations });
        let secret = json!({ "kind": "Secret", "metadata": metadata, "stringData": { "kubeconfig": kubeconfig } });
        cluster.apply(secret).await
    };
    let service = payment(&cluster).await?;
    let mut moved = shift("audit", hold_at(50));
    moved["spec"]["hostnames"] = json!(["audit.example.com"]);
    moved["spec"]["versions"][1]["cluster"] = json!("west");
    cluster.slice("audit-v1", 2, 2).await?;
    west.apply(slice_in(&cluster, "audit-v2", 2, 2))?;
    cluster.apply(moved).await?;
    let controller = cluster.replica("a", &[]).await?;
    let audit = cluster.full_name("audit");
    until_said(&cluster, "audit", "has the label tideshift.dev/cluster: west").await?;
    lead_to(&west.kubeconfig_text("tideshift")).await?;
    until_weights(&controller, &audit, &[50.0, 50.0]).await?;

    west.go_away().await;
    west.apply(slice_in(&cluster, "audit-v2", 2, 0))?;
    let seen = until_said(&cluster, "audit", "weights stay as they are: ").await?;
    let conditions = seen["status"]["conditions"].to_string();
    assert!(conditions.contains("cluster west") && conditions.contains("OutOfSight"), "{conditions}");
    cluster.apply(shift("payment", hold_at(20))).await?;
    until_weights(&controller, &service, &[80.0, 20.0]).await?;
    assert_eq!(weights_of(&policy(&controller).await?, &audit), [50, 50]);
    west.come_back().await?;
    until_weights(&controller, &audit, &[100.0, 0.0]).await?;
    west.apply(slice_in(&cluster, "audit-v2", 2, 2))?;
    eventually("what was decided to be published", DEADLINE, async || {
        ensure!(weights_of(&policy(&controller).await?, &audit) == [50, 50]);
        Ok(())
    })
    .await?;

    lead_to("clusters: nonsense").await?;
    until_said(&cluster, "audit", "its kubeconfig").await?;
    lead_to(&west.kubeconfig_text("tideshift").replace("\"token\":\"tideshift\"", "\"exec\":{\"command\":\"true\"}"))
        .await?;
    until_said(&cluster, "audit", "runs a program or names a file").await?;
    assert_eq!(weights_of(&policy(&controller).await?, &audit), [50, 50]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_refused_and_what_it_said_before_stays() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let controller = cluster.replica("a", &[]).await?;
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    let refused = async |name: &str, words: &str| {
        let object = cluster
            .until("the condition", "TrafficShift", name, |object| {
                let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
                let accepted = conditions.find(|one| one["type"] == "Accepted").context("none")?;
                ensure!(accepted["status"] == "False" && accepted["reason"] == "Invalid", "{accepted}");
                ensure!(accepted["message"].as_str().unwrap_or_default().contains(words), "{accepted}");
                Ok(())
            })
            .await?;
        eventually("an Event", DEADLINE, async || {
            let events = cluster.events(name).await?;
            ensure!(events.iter().any(|reason| reason == "Invalid"), "{events:?}");
            Ok(())
        })
        .await?;
        anyhow::Ok(object)
    };
    cluster.patch("TrafficShift", "payment", json!({ "spec": { "target": "v9" } })).await?;
    let object = refused("payment", "v9").await?;
    assert_ne!(object["status"]["observedGeneration"], object["metadata"]["generation"], "that is not in force");
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    cluster.patch("TrafficShift", "payment", json!({ "spec": { "target": "v2" } })).await?;
    cluster
        .until("it to be accepted", "TrafficShift", "payment", |object| {
            ensure!(object["status"]["observedGeneration"] == object["metadata"]["generation"]);
            Ok(())
        })
        .await?;

    cluster.slice("rival-v1", 1, 1).await?;
    cluster.slice("rival-v2", 1, 1).await?;
    cluster.apply(shift("rival", hold_at(90))).await?;
    refused("rival", "payment.example.com").await?;
    assert_eq!(weights_of(&policy(&controller).await?, &cluster.full_name("rival")), [0; 0]);
    assert_eq!(View::of(&controller, &service).await?.weights(), [70.0, 30.0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_nobody_can_read_is_left_as_it_is() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    payment(&cluster).await?;
    let state = json!({ "state.json.gz": "bm9uc2Vuc2U=" });
    cluster.apply(json!({ "kind": "Secret", "metadata": { "name": "tideshift-state" }, "data": state })).await?;
    let error = cluster.replica("a", &[]).await.map(drop).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("Secret tideshift-state: state.json.gz: ") && error.contains("left as it is"), "{error}");
    assert_eq!(cluster.get("Secret", "tideshift-state").await?["data"], state);
    let lease = cluster.get("Lease", "tideshift").await?;
    assert_eq!(lease["spec"].get("holderIdentity"), None, "others may lead, who can read it");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_that_are_cut_and_writes_that_conflict_lose_nothing() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let service = payment(&cluster).await?;
    let a = cluster.replica("a", &[]).await?;
    until_weights(&a, &service, &[70.0, 30.0]).await?;
    let mut last = 0;
    for weight in [25, 20, 15, 10, 5] {
        for resource in ["leases.coordination.k8s.io", "secrets", "trafficshifts.tideshift.dev"] {
            cluster.server().refuse_writes(resource, 2);
        }
        cluster.server().cut_watches();
        // Not by a request, which would be refused as well.
        let mut document = shift("payment", hold_at(weight));
        document["apiVersion"] = json!("tideshift.dev/v1alpha1");
        document["metadata"]["namespace"] = json!(cluster.namespace);
        cluster.server().apply(document)?;
        let view = until_weights(&a, &service, &[100.0 - f64::from(weight), f64::from(weight)]).await?;
        eventually("the policy to be published", DEADLINE, async || {
            let policy = policy(&a).await?;
            ensure!(weights_of(&policy, &service).get(1) == Some(&u64::from(weight)), "{policy}");
            Ok(())
        })
        .await?;
        assert!(view.revision() > last, "{} after {last}", view.revision());
        last = view.revision();
        until_said(&cluster, "payment", &format!("v2 {weight} %")).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_services_at_rest_are_watched_and_not_asked_for() -> anyhow::Result<()> {
    const SHIFTS: usize = 50;
    const REST: Duration = Duration::from_secs(10);
    let cluster = Cluster::stand_in().await?;
    for n in 0..SHIFTS {
        let name = format!("s{n}");
        let version = |version: &str| json!({ "name": version, "service": format!("{name}-{version}") });
        let versions = ["v1", "v2", "v3"].map(version);
        for version in ["v1", "v2", "v3"] {
            cluster.server().apply(slice_in(&cluster, &format!("{name}-{version}"), 20, 20))?;
        }
        let fields = json!({ "versions": versions, "hostnames": [format!("{name}.example.com")] });
        cluster.apply(shift(&name, fields)).await?;
    }
    let controller = cluster.replica("a", &[]).await?;
    for n in 0..SHIFTS {
        until_weights(&controller, &cluster.full_name(&format!("s{n}")), &[100.0, 0.0, 0.0]).await?;
        until_said(&cluster, &format!("s{n}"), "v1 100 %").await?;
    }
    for resource in ["trafficshifts", "endpointslices"] {
        let of_controller = cluster.server().requests().into_iter().filter(|seen| {
            seen.attempt.user == "a" && seen.attempt.resource == resource && seen.attempt.verb == "watch"
        });
        assert_eq!(of_controller.count(), 1, "one watch of {resource} for the namespace");
    }
    for resource in ["pods", "deployments", "horizontalpodautoscalers", "poddisruptionbudgets"] {
        let asked = cluster.server().requests();
        let asked = asked.iter().filter(|seen| seen.attempt.user == "a" && seen.attempt.resource == resource);
        assert_eq!(asked.count(), 0, "no document needs {resource}");
    }
    // Statuses may still be on their way, one a second at most for each.
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.server().forget_requests();
    tokio::time::sleep(REST).await;
    let mut asked: BTreeMap<(String, String), usize> = BTreeMap::new();
    for seen in cluster.server().requests().into_iter().filter(|seen| seen.attempt.user == "a") {
        *asked.entry((seen.attempt.verb, seen.attempt.resource)).or_default() += 1;
    }
    println!("REQUESTS of one replica with {SHIFTS} services at rest, in {REST:?}: {asked:?}");
    let total: usize = asked.values().sum();
    assert!(total <= 50, "{total} requests in {REST:?}: {asked:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_refused_is_asked_for_ever_more_slowly() -> anyhow::Result<()> {
    let server = ApiServer::start().await?;
    server.forbid(|attempt| attempt.resource == "trafficshifts");
    let cluster_folder = tempfile::tempdir()?;
    let mut command = std::process::Command::new(tideshift_tests::artifacts::tideshift()?);
    command.args([
        "serve",
        "--kubernetes",
        "--pod-namespace",
        "tideshift-system",
        "--pod-name",
        "a",
        "--listen",
        "127.0.0.1:0",
    ]);
    command.env("KUBECONFIG", server.kubeconfig()?);
    let log = cluster_folder.path().join("log");
    let _controller = tideshift_tests::process::Process::start("the controller", command, &log)?;
    let times = eventually("six attempts", DEADLINE, async || {
        let seen = server.requests().into_iter().filter(|seen| seen.attempt.resource == "trafficshifts");
        let times: Vec<Instant> = seen.map(|seen| seen.at).collect();
        ensure!(times.len() >= 6, "{} attempts", times.len());
        Ok(times)
    })
    .await?;
    let pause = times[5] - times[4];
    ensure!(pause >= Duration::from_secs(1), "the sixth came {pause:?} after the fifth");
    Ok(())
}
