//! The stand-ins for kubelet and controller manager: a Deployment and a Service become ready endpoints, as in a cluster.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::envoy_fixture::DEADLINE;
use tideshift_tests::kubernetes::apiserver::ApiServer;
use tideshift_tests::kubernetes::client;
use tideshift_tests::kubernetes::controllers::Controllers;
use tideshift_tests::kubernetes::kubelet::{ADDRESSES, Kubelet, READY, TERM_DELAY};
use tideshift_tests::wait::eventually;

struct Cluster {
    server: ApiServer,
    _kubelet: Kubelet,
    _controllers: Controllers,
}

impl Cluster {
    async fn start() -> anyhow::Result<Self> {
        let server = ApiServer::start().await?;
        let kubelet = Kubelet::start(client(&server.kubeconfig_of("kubelet")?).await?).await?;
        let controllers = Controllers::start(&server);
        Ok(Self { server, _kubelet: kubelet, _controllers: controllers })
    }

    /// Every endpoint of the Service as `ADDRESS:PORT` and its conditions' letters.
    fn endpoints(&self) -> anyhow::Result<Vec<String>> {
        let mut all = Vec::new();
        for slice in self.server.list("endpointslices", "shop")? {
            ensure!(slice["metadata"]["labels"]["kubernetes.io/service-name"] == "payment", "{slice}");
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                let letter = |name: &'static str| if endpoint["conditions"][name] == true { &name[..1] } else { "" };
                let letters = ["ready", "serving", "terminating"].map(letter).concat();
                let address = endpoint["addresses"][0].as_str().context("no address")?;
                all.push(format!("{address}:{} {letters}", slice["ports"][0]["port"]));
            }
        }
        all.sort_unstable();
        Ok(all)
    }

    async fn until_endpoints(&self, expected: &[&str]) -> anyhow::Result<()> {
        eventually(&format!("the endpoints {expected:?}"), DEADLINE, async || {
            let seen = self.endpoints()?;
            ensure!(seen == expected, "{seen:?}");
            Ok(())
        })
        .await
    }
}

fn workload(kind: &str, replicas: usize, annotations: Value) -> Value {
    let labels = json!({ "app": "payment" });
    json!({
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": { "name": "payment", "namespace": "shop" },
        "spec": {
            "serviceName": "payment",
            "replicas": replicas,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels, "annotations": annotations },
                "spec": { "containers": [
                    { "name": "main", "image": "main:1", "ports": [{ "name": "http", "containerPort": 8080 }] },
                ] },
            },
        },
    })
}

fn service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "payment", "namespace": "shop" },
        "spec": { "selector": { "app": "payment" }, "ports": [{ "name": "http", "port": 80, "targetPort": "http" }] },
    })
}

#[tokio::test]
async fn a_deployment_and_a_service_become_ready_endpoints() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.server.apply(service())?;
    cluster.server.apply(workload("Deployment", 2, json!({})))?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs", "198.51.100.11:8080 rs"]).await?;
    let ready = |count: usize| {
        move |object: &Value| {
            let status = &object["status"];
            ensure!(status["replicas"] == count && status["readyReplicas"] == count, "{status}");
            ensure!(status["observedGeneration"] == object["metadata"]["generation"], "not seen yet");
            Ok(())
        }
    };
    cluster.server.until("2 ready replicas", "deployments", "shop", "payment", ready(2)).await?;

    cluster.server.patch("deployments", "shop", "payment", json!({ "spec": { "replicas": 3 } }))?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs", "198.51.100.11:8080 rs", "198.51.100.12:8080 rs"]).await?;
    cluster.server.patch("deployments", "shop", "payment", json!({ "spec": { "replicas": 0 } }))?;
    cluster.until_endpoints(&[]).await?;
    cluster.server.until("0 replicas", "deployments", "shop", "payment", ready(0)).await?;
    assert_eq!(cluster.server.list("pods", "")?, Vec::<Value>::new());
    assert_eq!(cluster.server.list("endpointslices", "")?.len(), 1, "an empty one stays");

    // What belongs to it goes with it.
    cluster.server.patch("deployments", "shop", "payment", json!({ "spec": { "replicas": 1 } }))?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs"]).await?;
    cluster.server.delete("deployments", "shop", "payment")?;
    cluster.until_endpoints(&[]).await?;
    assert_eq!(cluster.server.list("replicasets", "")?, Vec::<Value>::new());
    Ok(())
}

#[tokio::test]
async fn pods_of_processes_on_loopback_with_ports_of_their_own() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.server.apply(service())?;
    let addresses = json!({ ADDRESSES: "127.0.0.1:9001,127.0.0.1:9002" });
    cluster.server.apply(workload("Deployment", 2, addresses))?;
    cluster.until_endpoints(&["127.0.0.1:9001 rs", "127.0.0.1:9002 rs"]).await?;
    Ok(())
}

#[tokio::test]
async fn annotations_make_pods_unready_and_slow_to_end() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.server.apply(service())?;
    cluster.server.apply(workload("StatefulSet", 2, json!({ TERM_DELAY: "3600" })))?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs", "198.51.100.11:8080 rs"]).await?;
    let annotate = |pod: &str, name: &str, value: &str| {
        cluster.server.patch("pods", "shop", pod, json!({ "metadata": { "annotations": { name: value } } }))
    };
    let ip = |pod: &str| anyhow::Ok(cluster.server.get("pods", "shop", pod)?["status"]["podIP"].clone());
    let (first, last) = (ip("payment-0")?, ip("payment-1")?);
    annotate("payment-0", READY, "false")?;
    let unready = |address: &str| if first == address { "" } else { "rs" };
    let (one, other) = (unready("198.51.100.10"), unready("198.51.100.11"));
    cluster.until_endpoints(&[&format!("198.51.100.10:8080 {one}"), &format!("198.51.100.11:8080 {other}")]).await?;
    annotate("payment-0", READY, "true")?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs", "198.51.100.11:8080 rs"]).await?;

    cluster.server.patch("statefulsets", "shop", "payment", json!({ "spec": { "replicas": 1 } }))?;
    let ending = |address: &str| if last == address { "st" } else { "rs" };
    let (one, other) = (ending("198.51.100.10"), ending("198.51.100.11"));
    cluster.until_endpoints(&[&format!("198.51.100.10:8080 {one}"), &format!("198.51.100.11:8080 {other}")]).await?;
    annotate("payment-1", TERM_DELAY, "0")?;
    cluster.until_endpoints(&[&format!("{}:8080 rs", first.as_str().context("no address")?)]).await?;
    Ok(())
}

#[tokio::test]
async fn a_disruption_budget_counts_the_healthy() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.server.apply(json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": { "name": "payment", "namespace": "shop" },
        "spec": { "minAvailable": 2, "selector": { "matchLabels": { "app": "payment" } } },
    }))?;
    cluster.server.apply(workload("Deployment", 3, json!({})))?;
    let allowed = |object: &Value| {
        let status = &object["status"];
        ensure!(status["currentHealthy"] == 3 && status["disruptionsAllowed"] == 1, "{status}");
        Ok(())
    };
    cluster.server.until("one disruption allowed", "poddisruptionbudgets", "shop", "payment", allowed).await?;
    Ok(())
}

#[tokio::test]
async fn they_wait_for_a_server_that_is_away() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.server.apply(service())?;
    cluster.server.apply(workload("Deployment", 1, json!({})))?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs"]).await?;
    cluster.server.go_away().await;
    cluster.server.patch("deployments", "shop", "payment", json!({ "spec": { "replicas": 2 } }))?;
    cluster.server.compact();
    assert_eq!(cluster.server.list("pods", "")?.len(), 1);
    cluster.server.come_back().await?;
    cluster.until_endpoints(&["198.51.100.10:8080 rs", "198.51.100.11:8080 rs"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_endpoints_are_in_slices_of_a_hundred() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    cluster.server.apply(service())?;
    cluster.server.apply(workload("Deployment", 1000, json!({})))?;
    eventually("a thousand ready endpoints", DEADLINE * 3, async || {
        let ready = cluster.endpoints()?.iter().filter(|endpoint| endpoint.ends_with(" rs")).count();
        ensure!(ready == 1000, "{ready}");
        Ok(())
    })
    .await?;
    assert_eq!(cluster.server.list("endpointslices", "shop")?.len(), 10);
    Ok(())
}
