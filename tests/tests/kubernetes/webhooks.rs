//! Where the webhooks of a cluster's documents go: nowhere that the operator has not allowed, by address or by name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::kubernetes::test_bed::{Cluster, hold_at, shift, until_weights};
use tideshift_tests::test_bed::DEADLINE;
use tideshift_tests::wait::eventually;
use tokio::net::TcpListener;

/// Counts connections to a port of loopback, until the test ends.
async fn listener() -> anyhow::Result<(u16, Arc<AtomicU64>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (port, connections) = (listener.local_addr()?.port(), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    Ok((port, connections))
}

/// A TrafficShift whose first step has a gate at this URL.
async fn gated(cluster: &Cluster, name: &str, url: &str) -> anyhow::Result<()> {
    cluster.slice(&format!("{name}-v1"), 1, 1).await?;
    cluster.slice(&format!("{name}-v2"), 1, 1).await?;
    let mut document = shift(name, hold_at(50));
    document["spec"]["hostnames"] = json!([format!("{name}.example.com")]);
    document["spec"]["webhooks"] = json!([{ "name": "gate", "type": "Gate", "url": url, "timeoutSeconds": 1 }]);
    cluster.apply(document).await
}

async fn until_said(cluster: &Cluster, name: &str, words: &str) -> anyhow::Result<()> {
    let said = |object: &Value| {
        ensure!(object["status"].to_string().contains(words), "{}", object["status"]);
        Ok(())
    };
    cluster.until(&format!("{name} to say {words:?}"), "TrafficShift", name, said).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webhooks_reach_neither_metadata_nor_loopback_nor_the_api_server() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let (port, connections) = listener().await?;
    cluster.slice("payment-v1", 2, 2).await?;
    cluster.slice("payment-v2", 2, 2).await?;
    cluster.apply(shift("payment", hold_at(30))).await?;
    gated(&cluster, "metadata", "http://169.254.169.254/latest/meta-data/").await?;
    gated(&cluster, "number", "http://2852039166/").await?;
    gated(&cluster, "address", &format!("http://127.0.0.1:{port}/")).await?;
    gated(&cluster, "resolved", &format!("http://localhost:{port}/")).await?;
    let controller = cluster.replica("a", &[]).await?;
    for name in ["metadata", "number"] {
        until_said(&cluster, name, "webhooks may not go to 169.254.169.254").await?;
    }
    until_said(&cluster, "address", "webhooks may not go to 127.0.0.1").await?;
    until_said(&cluster, "resolved", "webhooks may not go to localhost, which is ").await?;
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    // The others are unharmed.
    until_weights(&controller, &cluster.full_name("payment"), &[70.0, 30.0]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_the_operator_allows_is_reached() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let (port, connections) = listener().await?;
    gated(&cluster, "resolved", &format!("http://localhost:{port}/")).await?;
    let _controller = cluster.replica("a", &["--webhook-allow", "public,localhost"]).await?;
    eventually("the gate to be asked", DEADLINE, async || {
        ensure!(connections.load(Ordering::SeqCst) > 0, "not yet");
        Ok(())
    })
    .await
}
