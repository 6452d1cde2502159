//! Changes while a real Envoy works: a thousand policies by long poll, a hundred plugin configurations by renamed
//! files, and both at once, under load on several workers. Not one request fails, and clients, upstreams, Envoy's stats
//! and the reports say the same of each version, to the request.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::counts::Counts;
use tideshift_core::outcome::Outcome;
use tideshift_core::protocol::report::Report;
use tideshift_tests::backend::{Errors, Mode};
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER};
use tideshift_tests::client::Connection;
use tideshift_tests::ecds_file::EcdsFile;
use tideshift_tests::envoy_fixture::{DEADLINE, EnvoyFixture, WANT};
use tideshift_tests::load::{Load, Plan, Tally};
use tideshift_tests::metrics::Metrics;
use tideshift_tests::policy_server::{PolicyServer, held_after};
use tideshift_tests::wait::eventually;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 3;
/// Those that the load gets; `v2` fails now and then.
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];
const ERRORS: Errors = Errors { bad: 1, of: 10 };
/// A version with answers that do not end, for those who ask for it.
const ENDLESS: &str = "endless";
/// A version that only plugin configurations know, where there is a controller.
const LOCAL: &str = "local";

/// A policy unlike those before and after it: in its weights, in its rules, and in which versions there are.
fn policy(revision: u64) -> Value {
    let n = revision as u32;
    match revision % 4 {
        // A jump of everything.
        0 => of(revision, VERSIONS.map(|name| (name, u32::from(name == VERSIONS[n as usize / 4 % 3])))),
        1 => of(revision, [("v1", n % 7), ("v2", n % 11 + 1), ("v3", n % 5)]),
        // Two of the three.
        2 => of(revision, [(VERSIONS[n as usize % 3], n % 90 + 1), (VERSIONS[(n as usize + 1) % 3], 10)]),
        _ => {
            let mut policy = of(revision, [("v1", 1), ("v2", n % 3), ("v3", 3)]);
            let rule =
                json!({ "matches": [{ "path": { "value": "/" } }], "versions": [{ "name": "v3" }, { "name": "v1" }] });
            // One that takes everything, or one that nothing matches; not the only versions in any case.
            let rule = if n % 8 == 3 {
                rule
            } else {
                json!({ "matches": [{ "method": "PUT" }], "versions": [{ "name": "v1" }] })
            };
            policy["services"][0]["rules"] = json!([rule]);
            policy
        }
    }
}

fn of<'v>(revision: u64, weights: impl IntoIterator<Item = (&'v str, u32)>) -> Value {
    let versions = weights.into_iter().map(|(name, weight)| json!({ "name": name, "weight": weight }));
    let versions: Vec<_> = versions.collect();
    // The guard would take the one that fails out of service.
    let guard = json!({ "enabled": false });
    json!({
        "revision": revision,
        "services": [{ "name": "shop", "hostnames": [HOST], "versions": versions, "guard": guard }],
    })
}

fn all_to(version: &str, revision: u64) -> Value {
    of(revision, [(version, 1)])
}

/// With a rule to the answers that do not end.
fn with_endless(mut policy: Value) -> anyhow::Result<Value> {
    let service = policy["services"][0].as_object_mut().context("no service")?;
    service["versions"].as_array_mut().context("no versions")?.push(json!({ "name": ENDLESS, "weight": 0 }));
    let rule =
        json!({ "matches": [{ "headers": [{ "name": WANT, "value": ENDLESS }] }], "versions": [{ "name": ENDLESS }] });
    service.insert("rules".to_owned(), json!([rule]));
    Ok(policy)
}

fn controlled(mut policy: Value) -> Value {
    policy["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
    policy
}

async fn start(
    policy: Value,
    server: Option<&PolicyServer>,
    patch: impl FnOnce(&mut Value),
) -> anyhow::Result<EnvoyFixture> {
    let names = [&VERSIONS[..], &[ENDLESS, LOCAL]].concat();
    let build = |bootstrap: Bootstrap| {
        let bootstrap = bootstrap.timeout(Duration::ZERO);
        server.map(PolicyServer::address).into_iter().fold(bootstrap, Bootstrap::controller)
    };
    let setup = EnvoyFixture::start_with(policy, &names, WORKERS, build, patch).await?;
    setup.backend("v2").set(|behaviour| behaviour.errors = ERRORS);
    setup.backend(ENDLESS).set(|behaviour| behaviour.mode = Mode::Events(Duration::from_millis(50), u32::MAX));
    Ok(setup)
}

fn load(setup: &EnvoyFixture) -> Load {
    Plan::new(setup.address(), HOST).connections(2 * WORKERS).start()
}

/// Answers that have begun and do not end.
async fn endless(setup: &EnvoyFixture, number: usize) -> anyhow::Result<Vec<Connection>> {
    let mut connections = Vec::new();
    for _ in 0..number {
        let mut connection = setup.get(HOST, "/").header(WANT, ENDLESS).begin().await?;
        connection.read_until(b"tick").await?;
        connections.push(connection);
    }
    Ok(connections)
}

/// Waits until this is in the log so often.
async fn logged(setup: &EnvoyFixture, line: &str, times: usize) -> anyhow::Result<()> {
    eventually(&format!("{times} times \"{line}\" in the log"), DEADLINE, async || {
        let seen = setup.envoy.log().matches(line).count();
        ensure!(seen >= times, "{seen} times");
        Ok(())
    })
    .await
}

/// Waits for some more answers, all of them from `version`.
async fn all_from(load: &Load, version: &str) -> anyhow::Result<()> {
    let mut before = load.tally();
    eventually(&format!("all requests to go to {version}"), DEADLINE, async || {
        let now = load.tally();
        let since = now.since(&before);
        if since.of(version) < since.answered {
            before = now;
        }
        ensure!(since.answered >= 100 && since.of(version) == since.answered, "{:?}", since.by);
        Ok(())
    })
    .await
}

/// Checks that clients, upstreams and stats say the same of each version, and that no request got anything but its
/// version's answer.
async fn reconcile(setup: &EnvoyFixture, tally: &Tally, left: u64) -> anyhow::Result<Metrics> {
    ensure!((tally.sent, tally.failed) == (tally.answered, 0), "not every request was answered: {tally:?}");
    let metrics = setup.settled("shop", tally.sent + left).await?;
    for version in VERSIONS {
        let (ok, error) = (tally.of_class(version, 2), tally.of_class(version, 5));
        assert!(ok > 0, "{version} was never chosen");
        assert_eq!(tally.of(version), ok + error, "{version}: {tally:?}");
        assert_eq!(error, setup.backend(version).counts().errors, "{version}: errors that are not its own");
        let seen = setup.backend(version).versions();
        assert_eq!(seen, [(version.to_owned(), ok + error)].into(), "what the upstream {version} was sent");
        let counted = Outcome::ALL.map(|outcome| metrics.requests_total("shop", version, outcome.label()));
        assert_eq!(counted, [ok, error, 0, 0], "{version} in the stats");
    }
    let counted = Outcome::ALL.map(|outcome| metrics.requests_total("shop", ENDLESS, outcome.label()));
    assert_eq!(counted, [0, 0, 0, left], "who left");
    assert_eq!(VERSIONS.iter().map(|version| tally.of(version)).sum::<u64>(), tally.sent, "{tally:?}");
    Ok(metrics)
}

/// Checks that the last report says the same as the stats.
async fn reported(server: &PolicyServer, metrics: &Metrics) -> anyhow::Result<()> {
    eventually("a report of all requests", DEADLINE, async || {
        let report = server.last_report()?;
        for version in report.services.iter().flat_map(|service| &service.versions) {
            let of = |outcome: Outcome| metrics.requests_total("shop", &version.name, outcome.label());
            let [ok, error, client_error, cancelled] = Outcome::ALL.map(of);
            let counted = Counts { ok, error, client_error, cancelled };
            ensure!((version.ended, version.in_flight) == (counted, 0), "{version:?}, and the stats {counted:?}");
        }
        let told = report.services.iter().flat_map(|service| &service.versions).count();
        ensure!(told >= VERSIONS.len(), "{told} versions");
        Ok(())
    })
    .await
}

/// Plugin configurations that Envoy has taken.
async fn taken(setup: &EnvoyFixture, number: u64) -> anyhow::Result<()> {
    const TAKEN: &str = "extension_config_discovery.http_filter.tideshift.config_reload";
    eventually(&format!("{number} plugin configurations taken"), DEADLINE, async || {
        let seen = setup.envoy.stat(TAKEN).await?;
        ensure!(seen >= number, "{seen}");
        Ok(())
    })
    .await
}

async fn active_vms(setup: &EnvoyFixture) -> anyhow::Result<u64> {
    setup.envoy.stat("wasm.envoy.wasm.runtime.v8.active").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_policies_by_long_poll_lose_nothing() -> anyhow::Result<()> {
    const CHANGES: u64 = 1_000;
    let server = PolicyServer::start().await?;
    let first = controlled(with_endless(all_to("v1", 5))?);
    let setup = start(first, Some(&server), |_| ()).await?;
    held_after(&server, 5).await?;
    // They are answered under a policy of which the later ones know nothing.
    let open = endless(&setup, WORKERS).await?;
    let (load, begun) = (load(&setup), Instant::now());
    for revision in 1..CHANGES {
        server.publish(&policy(revision));
        held_after(&server, revision).await?;
    }
    server.publish(&all_to("v3", CHANGES));
    held_after(&server, CHANGES).await?;
    let took = begun.elapsed();
    all_from(&load, "v3").await?;
    let tally = load.stop().await?;
    let left = open.len() as u64;
    drop(open);
    let metrics = reconcile(&setup, &tally, left).await?;
    reported(&server, &metrics).await?;
    assert_eq!(server.polls().len() as u64, CHANGES + 1, "one poll for each policy, and the one that is held");
    assert_eq!(server.strange(), [""; 0]);
    println!("{CHANGES} policies in {took:.1?} under {} requests, 0 failed: {:?}", tally.sent, tally.by);
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_plugin_configurations_by_renamed_files_lose_nothing() -> anyhow::Result<()> {
    const SWAPS: u64 = 120;
    let mut watched = EcdsFile::new()?;
    let setup = start(with_endless(all_to("v1", 1))?, None, |bootstrap| watched.take_from(bootstrap)).await?;
    let open = endless(&setup, WORKERS).await?;
    let (vms, load, begun) = (active_vms(&setup).await?, load(&setup), Instant::now());
    for swap in 1..SWAPS {
        watched.set(&policy(swap + 1))?;
        taken(&setup, swap + 1).await?;
    }
    watched.set(&all_to("v3", SWAPS + 1))?;
    let took = begun.elapsed();
    logged(&setup, &format!("policy revision {} of the plugin configuration in force", SWAPS + 1), WORKERS).await?;
    all_from(&load, "v3").await?;
    let tally = load.stop().await?;
    let left = open.len() as u64;
    drop(open);
    reconcile(&setup, &tally, left).await?;
    eventually("the VMs of the configurations that are gone to go", DEADLINE, async || {
        let now = active_vms(&setup).await?;
        ensure!(now <= vms, "{now} VMs, and {vms} at the start");
        Ok(())
    })
    .await?;
    println!("{SWAPS} plugin configurations in {took:.1?} under {} requests, 0 failed: {:?}", tally.sent, tally.by);
    setup.no_panic()
}

/// Over Envoy's hot restart the new process takes over the stats of the old one, but what it reports is its own: each
/// request is told once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_restart_tells_of_each_request_once() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let policy = controlled(of(5, [("v1", 1), ("v2", 1), ("v3", 1)]));
    let build = |bootstrap: Bootstrap| bootstrap.controller(server.address());
    let node = |bootstrap: &mut Value| bootstrap["node"] = json!({ "id": "restarted", "cluster": "tests" });
    let mut setup = EnvoyFixture::start_as(Some(0), policy, &VERSIONS, WORKERS, build, node).await?;
    let load = Plan::new(setup.address(), HOST).connections(2 * WORKERS).rate(200.0).start();
    let answered = async |requests: u64| {
        let before = load.tally().answered;
        eventually("more answers", DEADLINE, async || {
            ensure!(load.tally().answered >= before + requests);
            Ok(())
        })
        .await
    };
    answered(200).await?;
    let mut old = setup.hot_restart().await?;
    eventually("the old Envoy to end", DEADLINE, async || {
        ensure!(!old.is_running());
        Ok(())
    })
    .await?;
    answered(200).await?;
    let tally = load.stop().await?;
    ensure!((tally.sent, tally.failed) == (tally.answered, 0), "{tally:?}");
    eventually("the reports of both to have each request once", DEADLINE, async || {
        let mut last: BTreeMap<String, Report> = BTreeMap::new();
        for report in server.reports() {
            ensure!(report.proxy == "restarted", "{report:?}");
            last.insert(report.start.clone(), report);
        }
        let of = |report: &Report, name: &str| {
            let versions = report.services.iter().flat_map(|service| &service.versions);
            versions.filter(|version| version.name == name).map(|version| version.ended.total()).sum::<u64>()
        };
        ensure!(last.len() == 2 && last.values().all(|report| of(report, "v1") > 0), "{last:?}");
        for version in VERSIONS {
            let told: Vec<u64> = last.values().map(|report| of(report, version)).collect();
            ensure!(told.iter().sum::<u64>() == tally.of(version), "{version}: {told:?} of {}", tally.of(version));
        }
        Ok(())
    })
    .await?;
    setup.no_trap().await
}

/// Also: what the controller said counts, not what the plugin configurations say by the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_at_once_lose_nothing_and_the_controller_counts() -> anyhow::Result<()> {
    const SWAPS: u64 = 60;
    let server = PolicyServer::start().await?;
    let mut watched = EcdsFile::new()?;
    let local = |revision: u64| controlled(all_to(LOCAL, 10_000 + revision));
    server.publish(&policy(1));
    let setup = start(local(0), Some(&server), |bootstrap| watched.take_from(bootstrap)).await?;
    eventually("the controller's policy on every worker", DEADLINE, async || {
        let report = server.last_report()?;
        ensure!((report.revision, report.workers as usize) == (1, WORKERS + 1), "{report:?}");
        Ok(())
    })
    .await?;
    let (load, begun) = (load(&setup), Instant::now());
    let swaps = async {
        for swap in 1..=SWAPS {
            watched.set(&local(swap))?;
            taken(&setup, swap + 1).await?;
        }
        anyhow::Ok(())
    };
    tokio::pin!(swaps);
    let mut revision = 1;
    loop {
        revision += 1;
        server.publish(&policy(revision));
        tokio::select! {
            biased;
            swapped = &mut swaps => break swapped?,
            held = held_after(&server, revision) => held?,
        }
    }
    let took = begun.elapsed();
    revision += 1;
    server.publish(&all_to("v3", revision));
    all_from(&load, "v3").await?;
    let tally = load.stop().await?;
    assert_eq!(tally.of(LOCAL), 0, "a plugin configuration's own policy was in force: {tally:?}");
    let metrics = reconcile(&setup, &tally, 0).await?;
    reported(&server, &metrics).await?;
    println!(
        "{revision} policies and {SWAPS} plugin configurations in {took:.1?} under {} requests, 0 failed: {:?}",
        tally.sent, tally.by,
    );
    setup.no_panic()
}
