//! Measures how soon a published policy is in force on every worker, under load.

use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::bootstrap::CONTROLLER_CLUSTER;
use tideshift_tests::client::Connection;
use tideshift_tests::effect;
use tideshift_tests::effect::Effect;
use tideshift_tests::envoy_fixture::EnvoyFixture;
use tideshift_tests::load::{Plan, Tally};
use tideshift_tests::policy_server::{PolicyServer, held_after};

use crate::client::HOST;
use crate::progress;
use crate::variants::WEIGHTS;

/// Workers that a policy must reach.
pub(crate) const WORKERS: usize = 4;
/// Requests per second in addition to those that wait for the effect.
pub(crate) const RATE: f64 = 500.0;

const FIRST: u64 = 1_000_000;

/// The result.
#[derive(Debug)]
pub(crate) struct Effects {
    pub(crate) effects: Vec<Effect>,
    pub(crate) requests: u64,
}

/// Publishes this many policies, each of which sends all requests to the other version.
pub(crate) async fn measure(changes: u64) -> anyhow::Result<Effects> {
    progress(&format!("policy to effect: {changes} changes"));
    let server = PolicyServer::start().await?;
    let mut policy = all_to(WEIGHTS[0].0, FIRST);
    policy["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
    let versions = WEIGHTS.map(|(name, _)| name);
    let setup = EnvoyFixture::start_with(
        policy,
        &versions,
        WORKERS,
        |bootstrap| bootstrap.controller(server.address()),
        |_| (),
    )
    .await?;
    // Each worker has one of these, as the listener balances connections exactly.
    let mut connections = Vec::new();
    for _ in 0..WORKERS {
        connections.push(Connection::open(setup.address()).await?);
    }
    held_after(&server, FIRST).await?;
    let load = Plan::new(setup.address(), HOST).connections(2 * WORKERS).rate(RATE).start();
    let flip = |revision: u64| {
        let version = versions[revision as usize % versions.len()];
        (version, all_to(version, revision))
    };
    let (effects, sent) = effect::of_changes(&server, FIRST, connections, &setup.get(HOST, "/"), changes, flip).await?;
    let tally: Tally = load.stop().await?;
    ensure!(tally.bad() == 0, "failed requests: {tally:?}");
    setup.no_trap().await?;
    Ok(Effects { effects, requests: sent + tally.answered })
}

/// A quantile of the durations: 0.5 is the median, 1 the maximum.
pub(crate) fn at(times: impl Iterator<Item = Duration>, part: f64) -> Duration {
    let mut times: Vec<Duration> = times.collect();
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part).round() as usize]
}

fn all_to(version: &str, revision: u64) -> Value {
    let versions = WEIGHTS.map(|(name, _)| json!({ "name": name, "weight": u32::from(name == version) }));
    json!({ "revision": revision, "services": [{ "name": "shop", "hostnames": [HOST], "versions": versions }] })
}
