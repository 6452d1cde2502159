//! What a tenant of a cluster may make the controller do, who may write TrafficShifts in one namespace and nothing else: each
//! way further is closed, and the other TrafficShifts are unharmed while it is tried.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::kubernetes::apiserver::ApiServer;
use tideshift_tests::kubernetes::test_bed::{Cluster, hold_at, policy, shift, slice, until_weights, weights_of};
use tideshift_tests::test_bed::DEADLINE;
use tideshift_tests::wait::eventually;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Something that no tenant may reach through the controller. Counts who connects.
struct Victim {
    address: SocketAddr,
    connections: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Victim {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, connections) = (listener.local_addr()?, Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Ok(Self { address, connections, task })
    }

    fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A TrafficShift `payment` with v2 at 30 %, which is not attacked.
async fn bystander(cluster: &Cluster) -> anyhow::Result<String> {
    cluster.slice("payment-v1", 2, 2).await?;
    cluster.slice("payment-v2", 2, 2).await?;
    cluster.apply(shift("payment", hold_at(30))).await?;
    Ok(cluster.full_name("payment"))
}

/// The attacker's TrafficShift, with these fields of v1.
fn attack(v1: Value) -> Value {
    let mut attack = shift("attack", json!({ "hostnames": ["attack.example.com"] }));
    if let Some(version) = attack["spec"]["versions"][0].as_object_mut() {
        version.extend(v1.as_object().cloned().unwrap_or_default());
        // Null is the same as nothing at all.
        version.retain(|_, value| !value.is_null());
    }
    attack
}

/// Waits until the status of a TrafficShift says these words anywhere.
async fn until_said(cluster: &Cluster, name: &str, words: &str) -> anyhow::Result<Value> {
    let what = format!("the status of {name} to say {words:?}");
    let said = |object: &Value| {
        let status = object["status"].to_string();
        ensure!(status.contains(words), "{status}");
        Ok(())
    };
    cluster.until(&what, "TrafficShift", name, said).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_that_name_addresses_commands_or_files_are_not_in_force() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let victim = Victim::start().await?;
    let service = bystander(&cluster).await?;
    let controller = cluster.replica("a", &[]).await?;
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    let (host, port) = ("127.0.0.1", victim.address.port());
    let probe = |probe: Value| json!({ "readinessProbe": probe });
    for (field, v1) in [
        (
            "endpoints",
            json!({ "service": null, "endpoints": [victim.address.to_string()], "readinessProbe": { "tcpSocket": {} } }),
        ),
        ("readinessProbe.httpGet.host", probe(json!({ "httpGet": { "host": host, "port": port } }))),
        ("readinessProbe.tcpSocket.host", probe(json!({ "tcpSocket": { "host": host, "port": port } }))),
        ("readinessProbe.exec", probe(json!({ "exec": { "command": ["true"] } }))),
        ("readinessProbe.periodMillis", probe(json!({ "httpGet": {}, "periodMillis": 1 }))),
    ] {
        // The API server refuses these by the CRD's rules, which the stand-in does not run: as if stored before there were any.
        cluster.slice("attack-v1", 1, 1).await?;
        cluster.apply(attack(v1)).await?;
        until_said(&cluster, "attack", &format!("spec.versions[0].{field}: not allowed in a cluster")).await?;
        cluster.delete("TrafficShift", "attack").await?;
    }
    assert_eq!(weights_of(&policy(&controller).await?, &service), [70, 30]);
    assert_eq!(victim.connections(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_addresses_of_the_namespaces_own_pods_are_probed_and_warmed_up() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let (without, foreign, own) = (Victim::start().await?, Victim::start().await?, Victim::start().await?);
    let service = bystander(&cluster).await?;
    let slice_to = async |service: &str, victim: &Victim, target: Value| {
        let mut slice = slice(service, 1, 1);
        slice["endpoints"][0]["addresses"] = json!([victim.address.ip().to_string()]);
        slice["endpoints"][0]["targetRef"] = target;
        slice["ports"][0]["port"] = json!(victim.address.port());
        cluster.apply(slice).await
    };
    let pod = |namespace: &str| json!({ "kind": "Pod", "name": "vault-0", "namespace": namespace });
    slice_to("without-v1", &without, Value::Null).await?;
    slice_to("foreign-v1", &foreign, pod("vault")).await?;
    slice_to("own-v1", &own, pod(&cluster.namespace)).await?;
    for name in ["without", "foreign", "own"] {
        cluster.slice(&format!("{name}-v2"), 1, 1).await?;
        let mut attack = shift(name, json!({ "hostnames": [format!("{name}.example.com")] }));
        attack["spec"]["versions"][0]["readinessProbe"] = json!({ "tcpSocket": {}, "periodSeconds": 1 });
        attack["spec"]["strategy"] = json!({ "warmUp": { "requests": { "count": 100_000, "concurrency": 100 } } });
        cluster.apply(attack).await?;
    }
    let controller = cluster.replica("a", &[]).await?;
    // What is a pod of the namespace is probed, so the others would have been as well by now.
    eventually("the namespace's own pod to be probed", DEADLINE, async || {
        ensure!(own.connections() >= 2, "{}", own.connections());
        Ok(())
    })
    .await?;
    for name in ["without", "foreign"] {
        until_said(&cluster, name, "names no pod of this namespace").await?;
    }
    assert_eq!((without.connections(), foreign.connections()), (0, 0));
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_serves_only_the_namespaces_that_its_secret_names() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let west = ApiServer::start().await?;
    let open_to = async |namespaces: &str| {
        let labels = json!({ "tideshift.dev/cluster": "west" });
        let annotations = json!({ "tideshift.dev/namespaces": namespaces });
        let metadata = json!({ "name": "west", "labels": labels, "annotations": annotations });
        let kubeconfig = west.kubeconfig_text("tideshift");
        cluster
            .apply(json!({ "kind": "Secret", "metadata": metadata, "stringData": { "kubeconfig": kubeconfig } }))
            .await
    };
    open_to("store").await?;
    let mut there = slice("audit-v2", 2, 2);
    there["metadata"]["namespace"] = json!(cluster.namespace);
    there["apiVersion"] = json!("discovery.k8s.io/v1");
    west.apply(there)?;
    let service = bystander(&cluster).await?;
    cluster.slice("audit-v1", 2, 2).await?;
    let mut moved = shift("audit", hold_at(50));
    moved["spec"]["hostnames"] = json!(["audit.example.com"]);
    moved["spec"]["versions"][1]["cluster"] = json!("west");
    cluster.apply(moved).await?;
    let controller = cluster.replica("a", &[]).await?;
    let said = format!("cluster west cannot be seen: not open to namespace {};", cluster.namespace);
    until_said(&cluster, "audit", &said).await?;
    // The others are unharmed, and nothing was asked of the cluster on behalf of this namespace.
    until_weights(&controller, &service, &[70.0, 30.0]).await?;
    let asked: Vec<_> = west.requests().into_iter().map(|seen| seen.attempt).collect();
    assert!(asked.iter().all(|attempt| attempt.user != "tideshift"), "{asked:?}");

    let audit = cluster.full_name("audit");
    open_to(&format!("store, {}", cluster.namespace)).await?;
    until_weights(&controller, &audit, &[50.0, 50.0]).await?;
    // Taken back at once; what it gave stays as it is, as with any cluster out of sight.
    open_to("store").await?;
    until_said(&cluster, "audit", "weights stay as they are: cluster west cannot be seen: not open").await?;
    assert_eq!(weights_of(&policy(&controller).await?, &audit), [50, 50]);
    Ok(())
}
