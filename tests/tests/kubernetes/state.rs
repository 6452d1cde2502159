//! State in Secrets of the size that a real API server takes: it fits whatever the number of proxies that come and go, and
//! what does not fit holds up nothing else.

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::client::Request;
use tideshift_tests::controller::Controller;
use tideshift_tests::kubernetes::test_bed::{Cluster, View, hold_at, shift, until_weights};
use tideshift_tests::test_bed::DEADLINE;
use tideshift_tests::wait::eventually;

/// A report of a start of a proxy, with counts of both versions of each service, as every filter has them.
fn report(start: u64, services: &[String], sequence: u64) -> Value {
    let mut random = fastrand::Rng::with_seed(start);
    let mut version = |name: &str| {
        let ok = 1_000 * sequence + random.u64(..1_000);
        let durations: Vec<u64> = (0..12).map(|_| random.u64(..200) + 10 * sequence).collect();
        json!({ "name": name, "ok": ok, "error": 0, "clientError": 0, "cancelled": 0, "dealt": {
            "started": ok, "ok": ok, "error": 0, "clientError": 0, "cancelled": 0, "durations": durations } })
    };
    let mut service = |name: &String| json!({ "name": name, "versions": [version("v1"), version("v2")] });
    json!({
        "proxy": format!("edge-{start}"), "start": format!("{:x}", (1 << 60) + start), "sequence": sequence, "format": 2,
        "revision": 1, "workers": 1, "services": services.iter().map(&mut service).collect::<Vec<_>>(),
    })
}

async fn report_all(controller: &Controller, starts: u64, services: &[String], sequence: u64) -> anyhow::Result<()> {
    for start in 0..starts {
        let body = report(start, services, sequence).to_string();
        let request = Request::new(controller.address(), "POST", "/v1/reports");
        let answer = request.header("content-type", "application/json").body(body).send().await?;
        ensure!(answer.status == 204, "{}: {}", answer.status, answer.text());
    }
    Ok(())
}

async fn requests(controller: &Controller, service: &str) -> anyhow::Result<Vec<u64>> {
    let view = View::of(controller, service).await?;
    let versions = view.service["versions"].as_array().into_iter().flatten();
    Ok(versions.filter_map(|version| version["requests"]["ok"].as_u64()).collect())
}

/// Policies follow readiness while so many starts of proxies are counted, and counts are the same after a kill.
async fn holds_for(starts: u64, services: usize) -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let mut names = Vec::new();
    for n in 0..services {
        let name = format!("payment{n}");
        let mut fields = hold_at(30);
        fields["hostnames"] = json!([format!("{name}.example.com")]);
        for version in ["v1", "v2"] {
            cluster.slice(&format!("{name}-{version}"), 2, 2).await?;
        }
        cluster.apply(shift(&name, fields)).await?;
        names.push(cluster.full_name(&name));
    }
    let mut controller = cluster.replica("a", &[]).await?;
    until_weights(&controller, &names[0], &[70.0, 30.0]).await?;
    report_all(&controller, starts, &names, 1).await?;
    let bytes = async |part: &str| {
        let metrics = controller.metrics().await?;
        anyhow::Ok(metrics.sum("tideshift_state_bytes", &[("part", part)]).unwrap_or_default())
    };
    eventually("the counts to be written", DEADLINE, async || {
        let bytes = bytes("counts").await?;
        ensure!((10_000.0..=1_000_000.0).contains(&bytes), "{bytes}");
        Ok(())
    })
    .await?;
    cluster.slice("payment0-v2", 2, 0).await?;
    until_weights(&controller, &names[0], &[100.0, 0.0]).await?;
    cluster.slice("payment0-v2", 2, 2).await?;
    until_weights(&controller, &names[0], &[70.0, 30.0]).await?;
    let before = requests(&controller, &names[0]).await?;
    assert!(!controller.log().contains("Secret"), "{}", controller.tail());

    assert_eq!(controller.terminate().await?.code(), Some(0));
    controller.start_again().await?;
    until_weights(&controller, &names[0], &[70.0, 30.0]).await?;
    assert_eq!(requests(&controller, &names[0]).await?, before);
    // Each has counted on, and none from nothing.
    report_all(&controller, starts, &names, 2).await?;
    let after: Vec<u64> = before.iter().map(|before| before + 1_000 * starts).collect();
    assert_eq!(requests(&controller, &names[0]).await?, after);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_thousand_starts_of_proxies_with_one_service_fit() -> anyhow::Result<()> {
    holds_for(8_000, 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_and_sixty_starts_of_proxies_with_twenty_services_fit() -> anyhow::Result<()> {
    holds_for(360, 20).await
}
