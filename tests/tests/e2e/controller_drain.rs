//! Draining: a version is at rest when every proxy gives it nothing and nothing of it is in flight, whatever that takes;
//! `tideshift wait-drained` ends then, and says so by its exit code.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::Mode;
use tideshift_tests::client::get;
use tideshift_tests::controller::{Controller, Output, cli};
use tideshift_tests::test_bed::{DEADLINE, HOST, SERVICE, Seen, TestBed, until, until_shares};
use tideshift_tests::wait::eventually;
use tideshift_tests::websocket;
use tokio::task::{JoinHandle, spawn_blocking};

const WORKERS: usize = 2;

/// `tideshift wait-drained` in the background; what it gave, and when it ended.
fn wait_drained(
    controller: &Controller,
    version: &str,
    timeout: &str,
) -> JoinHandle<anyhow::Result<(Output, Instant)>> {
    let server = format!("http://{}", controller.address());
    let (version, timeout) = (version.to_owned(), timeout.to_owned());
    spawn_blocking(move || {
        let arguments = ["wait-drained", SERVICE, &version, "--timeout", &timeout, "--server", &server];
        Ok((cli(arguments)?, Instant::now()))
    })
}

async fn drain(controller: &Controller, version: &str) -> anyhow::Result<Value> {
    let path = format!("/v1/services/{SERVICE}/versions/{version}/drain");
    Ok(serde_json::from_str(&controller.get(&path).await?)?)
}

async fn until_in_flight(controller: &Controller, version: &str, number: u64) -> anyhow::Result<()> {
    eventually(&format!("{number} in flight of {version}"), DEADLINE, async || {
        let drain = drain(controller, version).await?;
        ensure!(drain["inFlight"] == number, "{drain}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_20_seconds_is_never_cut_and_the_wait_ends_within_a_second_after_it() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    // Envoy cuts answers after 15 s where the document does not say otherwise.
    rig.write(&rig.document(json!({ "timeoutSeconds": 0 })))?;
    let moved = rig.document(json!({ "target": "v2", "timeoutSeconds": 0 }));
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    assert_eq!(drain(&controller, "v1").await?["state"], "Serving");

    rig.version("v1")[0].set(|behaviour| behaviour.mode = Mode::SlowBody(Duration::from_secs(10)));
    let slow = get(rig.address(), "/report").host(HOST);
    let slow = tokio::spawn(async move { slow.send().await.map(|response| (response, Instant::now())) });
    until_in_flight(&controller, "v1", 1).await?;
    rig.write(&moved)?;
    until_shares(&controller, "v2 alone", &[0.0, 100.0]).await?;
    let waiting = wait_drained(&controller, "v1", "60s");
    let draining = drain(&controller, "v1").await?;
    assert_eq!((&draining["state"], &draining["message"]), (&json!("Draining"), &json!("1 in flight")));

    let (response, answered) = slow.await??;
    assert_eq!((response.status, response.text().as_str()), (200, "the first halfand the second"));
    let (output, ended) = waiting.await??;
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(output.stdout.starts_with(&format!("v1 of {SERVICE}: Drained - nothing is in flight")), "{output:?}");
    let after = ended.checked_duration_since(answered).context("it ended before the answer did")?;
    println!("the wait ended {after:?} after the answer");
    assert!(after <= Duration::from_secs(1), "{after:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_holds_a_version_until_it_is_closed_or_the_deadline_has_passed() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(json!({ "drain": { "timeoutSeconds": 3 } })))?;
    let to_v2 = rig.document(json!({ "target": "v2", "drain": { "timeoutSeconds": 3 } }));
    let back = rig.document(json!({ "target": "v1", "drain": { "timeoutSeconds": 300 } }));
    let mut controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    for version in ["v1", "v2"] {
        rig.version(version)[0].set(|behaviour| behaviour.mode = Mode::WebSocket);
    }
    let mut socket = websocket::Client::connect(rig.address(), HOST, &[]).await?;
    until_in_flight(&controller, "v1", 1).await?;
    rig.write(&to_v2)?;
    until_shares(&controller, "v2 alone", &[0.0, 100.0]).await?;
    socket.echo("still here").await?;

    // The document's deadline is the fallback.
    let (output, _) = wait_drained(&controller, "v1", "60s").await??;
    assert_eq!(output.code, Some(3), "{output:?}");
    assert!(output.stdout.contains("DeadlineExceeded - after 3."), "{output:?}");
    assert!(output.stdout.contains("still 1 in flight"), "{output:?}");
    socket.echo("it is still open").await?;
    socket.close().await?;

    // The other way round, the wait's own time-out, and a controller that is killed meanwhile.
    let socket = websocket::Client::connect(rig.address(), HOST, &[]).await?;
    until_in_flight(&controller, "v2", 1).await?;
    rig.write(&back)?;
    until_shares(&controller, "v1 again", &[100.0, 0.0]).await?;
    let (output, _) = wait_drained(&controller, "v2", "1s").await??;
    assert_eq!(output.code, Some(3), "{output:?}");
    assert!(output.stderr.contains("v2 of shop has not drained: 1 in flight"), "{output:?}");
    let waiting = wait_drained(&controller, "v2", "60s");
    controller.kill()?;
    controller.start_again().await?;
    // It does not take a proxy that it has not heard of yet for one that is gone.
    assert_ne!(drain(&controller, "v2").await?["state"], "Drained");
    until_in_flight(&controller, "v2", 1).await?;
    socket.close().await?;
    let (output, _) = waiting.await??;
    assert_eq!(output.code, Some(0), "{output:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_serves_or_is_unknown_has_not_drained() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    let (output, _) = wait_drained(&controller, "v1", "1s").await??;
    assert_eq!(output.code, Some(3), "{output:?}");
    assert!(output.stderr.contains("still serves"), "{output:?}");
    let (output, _) = wait_drained(&controller, "v9", "1s").await??;
    assert_eq!(output.code, Some(2), "{output:?}");
    let (output, _) = wait_drained(&controller, "v2", "10s").await??;
    assert_eq!(output.code, Some(0), "{output:?}");
    Ok(())
}

/// A controller that has lost its state, an Envoy that came while it was away, a version that is in the document no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_has_drained_of_whom_a_proxy_has_something_in_flight() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(json!({ "target": "v2" })))?;
    let mut controller = rig.start_controller().await?;
    until_shares_given(&controller, &[0.0, 100.0]).await?;
    let v1 = drain(&controller, "v1").await?;
    assert_eq!((&v1["state"], &v1["message"]), (&json!("Draining"), &json!("no proxy has reported")));
    let _envoy = rig.start_envoy(WORKERS).await?;
    until_state(&controller, "v1", "Drained").await?;

    // The state is lost, and traffic starts at v1 again.
    rig.version("v2")[0].set(|behaviour| behaviour.mode = Mode::WebSocket);
    let socket = websocket::Client::connect(rig.address(), HOST, &[]).await?;
    until_in_flight(&controller, "v2", 1).await?;
    controller.kill()?;
    std::fs::remove_dir_all(rig.state_dir())?;
    rig.write(&rig.document(json!({})))?;
    controller.start_again().await?;
    let waiting = wait_drained(&controller, "v2", "60s");
    until_in_flight(&controller, "v2", 1).await?;
    assert_eq!(drain(&controller, "v2").await?["state"], "Draining");

    // v2 is in no document any more, but stays known while it drains.
    let mut without = rig.document(json!({}));
    without["spec"]["versions"].as_array_mut().context("no versions")?.retain(|version| version["name"] == "v1");
    rig.write(&without)?;
    until_shares_given(&controller, &[100.0]).await?;
    assert_eq!(drain(&controller, "v2").await?["message"], "1 in flight");
    socket.close().await?;
    let (output, _) = waiting.await??;
    assert_eq!(output.code, Some(0), "{output:?}");
    Ok(())
}

async fn until_state(controller: &Controller, version: &str, state: &str) -> anyhow::Result<()> {
    eventually(&format!("{version} to be {state}"), DEADLINE, async || {
        let drain = drain(controller, version).await?;
        ensure!(drain["state"] == state, "{drain}");
        Ok(())
    })
    .await
}

/// Waits until the controller gives these shares, to any version.
async fn until_shares_given(controller: &Controller, shares: &[f64]) -> anyhow::Result<()> {
    let holds = |seen: &Seen| {
        ensure!(seen.weights() == shares, "{:?}", seen.weights());
        Ok(())
    };
    until(controller, "the shares", holds).await.map(drop)
}
