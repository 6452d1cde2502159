//! Weights in a real Envoy: each version's share of any 1,000 requests in a row on a worker is within 3 of its due.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::{Value, json};
use tideshift_tests::envoy_fixture::EnvoyFixture;
use tokio::task::JoinSet;

const VERSIONS: [&str; 5] = ["v1", "v2", "v3", "v4", "v5"];

/// The window and the bounds of `core/src/choice/sequence.rs`, for requests in a row and for every k-th.
const WINDOW: usize = 1_000;
const BOUND: f64 = 3.0;
const EVERY_KTH: f64 = 4.0;

/// Services of 2, 3 and 5 versions; weights that no small number of requests divides evenly too.
const SERVICES: [(&str, &[u32]); 3] = [("two", &[90, 10]), ("three", &[700, 299, 1]), ("five", &[17, 31, 0, 411, 97])];

fn policy() -> Value {
    let services = SERVICES.map(|(name, weights)| {
        let versions = VERSIONS.iter().zip(weights);
        let versions: Vec<_> = versions.map(|(name, weight)| json!({ "name": name, "weight": weight })).collect();
        json!({ "name": name, "hostnames": [format!("{name}.example.com")], "versions": versions })
    });
    json!({ "revision": 1, "services": services })
}

/// How far the share of any version is off its due, over all windows of 1,000 requests in a row.
fn worst(choices: &[&str], weights: &[u32]) -> f64 {
    assert!(choices.len() >= WINDOW, "{} choices", choices.len());
    let total: u32 = weights.iter().sum();
    let off = VERSIONS.iter().zip(weights).flat_map(|(version, weight)| {
        let due = WINDOW as f64 * f64::from(*weight) / f64::from(total);
        let hits = move |window: &[&str]| window.iter().filter(|choice| *choice == version).count() as f64;
        choices.windows(WINDOW).map(move |window| (hits(window) - due).abs())
    });
    off.fold(0.0, f64::max)
}

fn every_second<'a>(choices: &[&'a str], first: usize) -> Vec<&'a str> {
    choices.iter().skip(first).step_by(2).copied().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_three_and_five_versions_get_their_shares_of_any_1000_requests() -> anyhow::Result<()> {
    let setup = std::sync::Arc::new(EnvoyFixture::start(policy(), &VERSIONS, 1).await?);
    // At the same time on one worker: what one service is asked does not make another's shares uneven.
    let mut clients = JoinSet::new();
    for (name, weights) in SERVICES {
        let setup = std::sync::Arc::clone(&setup);
        clients.spawn(async move {
            let choices = setup.choices(&format!("{name}.example.com"), 3 * WINDOW).await?;
            anyhow::Ok((name, weights, choices))
        });
    }
    while let Some(client) = clients.join_next().await {
        let (name, weights, choices) = client??;
        let choices: Vec<&str> = choices.iter().map(String::as_str).collect();
        let off = worst(&choices, weights);
        assert!(off <= BOUND, "{name}: a window is off by {off}");
        // A client that alternates two calls: both see the shares.
        for first in [0, 1] {
            let off = worst(&every_second(&choices, first), weights);
            assert!(off <= EVERY_KTH, "{name}, every second request: a window is off by {off}");
        }
        let mut counted: BTreeMap<&str, u64> = BTreeMap::new();
        choices.iter().for_each(|choice| *counted.entry(choice).or_default() += 1);
        let metrics = setup.settled(name, 3 * WINDOW as u64).await?;
        for version in VERSIONS {
            let expected = counted.get(version).copied().unwrap_or_default();
            assert_eq!(metrics.requests_total(name, version, "ok"), expected, "{name} {version}");
        }
    }
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_several_workers_holds_the_shares() -> anyhow::Result<()> {
    const WORKERS: usize = 3;
    let setup = std::sync::Arc::new(EnvoyFixture::start(policy(), &VERSIONS, WORKERS).await?);
    let (name, weights) = SERVICES[2];
    // One connection for each worker, because the listener balances connections exactly.
    let mut clients = JoinSet::new();
    for _ in 0..WORKERS {
        let setup = std::sync::Arc::clone(&setup);
        clients.spawn(async move { setup.choices(&format!("{name}.example.com"), 2 * WINDOW).await });
    }
    let mut firsts = Vec::new();
    while let Some(choices) = clients.join_next().await {
        let choices = choices??;
        let choices: Vec<&str> = choices.iter().map(String::as_str).collect();
        let off = worst(&choices, weights);
        assert!(off <= BOUND, "a window on one worker is off by {off}");
        firsts.push(choices.into_iter().take(100).map(str::to_owned).collect::<Vec<_>>());
    }
    assert!(firsts[0] != firsts[1] || firsts[1] != firsts[2], "the workers choose in step");
    for worker in 0..WORKERS {
        let stats = setup.envoy.stats().await?;
        let marker = format!(".worker_{worker}.downstream_cx_total: ");
        let listener = format!("listener.127.0.0.1_{}", setup.address().port());
        let line = stats.lines().find(|line| line.starts_with(&listener) && line.contains(&marker));
        let connections = line.and_then(|line| line.rsplit(' ').next()).context("no such worker")?;
        assert_eq!(connections, "1", "worker {worker} got {connections} connections, so windows mix workers");
    }
    setup.no_trap().await
}
