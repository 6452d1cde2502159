//! The guard in a real Envoy of several workers: a version that fails is out of service everywhere within about a
//! second, with or without a controller, and nobody is who does no worse than the others.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::guard::Veto;
use tideshift_tests::backend::Errors;
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER, manager, socket_address, type_url};
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture};
use tideshift_tests::load::{Load, NOBODY, Plan, Tally};
use tideshift_tests::policy_server::{PolicyServer, held_after};
use tideshift_tests::ports::Port;
use tideshift_tests::wait::eventually;
use tokio::time::Instant;

const WORKERS: usize = 3;
const HOST: &str = "shop.example.com";
const ALL: Errors = Errors { bad: 1, of: 1 };
const NONE: Errors = Errors { bad: 0, of: 1 };

/// Called by `NAME.example.com`; versions that were vetoed are tried again after 2 s.
fn service(name: &str, weights: &[(&str, u32)]) -> Value {
    let versions: Vec<Value> = weights.iter().map(|(name, weight)| json!({ "name": name, "weight": weight })).collect();
    json!({
        "name": name,
        "hostnames": [format!("{name}.example.com")],
        "versions": versions,
        "guard": { "coolDownSeconds": 2 },
    })
}

fn fails(setup: &EnvoyFixture, version: &str, errors: Errors) {
    setup.backend(version).set(|behaviour| behaviour.errors = errors);
}

/// About what one small service gets, on every worker.
fn hundred_a_second(setup: &EnvoyFixture) -> Load {
    Plan::new(setup.address(), HOST).connections(2 * WORKERS).rate(100.0).start()
}

/// Waits for a line of Envoy's log, and says when it was seen.
async fn logged(setup: &EnvoyFixture, line: &str) -> anyhow::Result<Instant> {
    eventually(&format!("{line:?} in the log"), DEADLINE, async || {
        let log = setup.envoy.log();
        let guards = || log.lines().filter(|line| line.contains("guard")).collect::<Vec<_>>();
        ensure!(log.contains(line), "{:?}", guards());
        Ok(Instant::now())
    })
    .await
}

/// Waits for so many more answers.
async fn next(load: &Load, answers: u64) -> anyhow::Result<Tally> {
    let before = load.tally();
    eventually(&format!("{answers} more answers"), DEADLINE, async || {
        let tally = load.tally().since(&before);
        ensure!(tally.answered >= answers, "{}", tally.answered);
        Ok(tally)
    })
    .await
}

/// About 10 requests fail before the guard has seen enough of a version that has a tenth of 100 requests a second; more
/// where a busy machine sends them in bursts, of which the guard counts each as little more than one.
const MOST_FAILED: u64 = 30;

/// v2, which has a tenth of the requests, begins to fail them all and is taken out; when that was.
async fn fails_and_is_taken_out(setup: &EnvoyFixture, load: &Load, what: &str) -> anyhow::Result<Instant> {
    let mut workers = EachWorker::open(setup, setup.get(HOST, "/")).await?;
    assert!(next(load, 100).await?.of("v2") >= 5, "{what}: v2 gets its share as long as it is well");

    fails(setup, "v2", ALL);
    let out = logged(setup, "guard: v2 of shop is out of service for 2 s").await?;
    // On all workers at once: at its share each would choose it 3 times in 30.
    for _ in 0..30 {
        assert!(workers.versions().await?.iter().all(|version| version == "v1"), "{what}: a worker still chooses v2");
    }
    assert!(out.elapsed() < Duration::from_secs(2), "{what}: the machine is too slow for this test");
    let tally = load.tally();
    let times = tally.times.get("v2").context("v2 was never asked")?;
    let lasted = times.last_sent - times.first_error.context("v2 never failed")?;
    println!("{what}: {} failed requests within {lasted:?}", tally.bad());
    assert!(tally.bad() <= MOST_FAILED, "{what}: {} requests failed", tally.bad());
    assert!(lasted < Duration::from_secs(3), "{what}: v2 was asked for {lasted:?}");
    assert_eq!(tally.bad(), tally.of_class("v2", 5), "{what}: only v2 failed");
    Ok(out)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_is_out_within_a_second_or_so_tried_again_and_stays_when_it_has_healed()
-> anyhow::Result<()> {
    let policy = json!({ "revision": 1, "services": [service("shop", &[("v1", 90), ("v2", 10)])] });
    let setup = EnvoyFixture::start(policy, &["v1", "v2"], WORKERS).await?;
    let load = hundred_a_second(&setup);
    let out = fails_and_is_taken_out(&setup, &load, "no controller").await?;

    let before = load.tally();
    logged(&setup, "guard: v2 of shop is back in service").await?;
    assert!(out.elapsed() >= Duration::from_millis(1_500), "back after {:?} of 2 s", out.elapsed());
    let out = logged(&setup, "guard: v2 of shop is out of service for 4 s").await?;
    let again = load.tally().since(&before).bad();
    println!("tried again: {again} failed requests");
    assert!((1..=MOST_FAILED).contains(&again), "{again} requests failed when it was tried again");

    fails(&setup, "v2", NONE);
    let before = load.tally();
    let back = eventually("v2 to be back", DEADLINE, async || {
        ensure!(load.tally().since(&before).of_class("v2", 2) > 2);
        Ok(Instant::now())
    });
    let lasted = back.await? - out;
    assert!(lasted >= Duration::from_millis(3_500), "back after {lasted:?} of 4 s");
    let tally = next(&load, 200).await?;
    assert!(tally.of("v2") >= 14 && tally.bad() == 0, "healed, it stays: {tally:?}");
    load.stop().await?;
    assert_eq!(setup.envoy.log().matches("guard: v2 of shop is out of service").count(), 2);
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guard_needs_no_controller_that_lives() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let setup = with_controller(&server).await?;
    server.publish(&json!({ "revision": 101, "services": [service("shop", &[("v1", 90), ("v2", 10)])] }));
    held_after(&server, 101).await?;
    server.stop();
    let load = hundred_a_second(&setup);
    fails_and_is_taken_out(&setup, &load, "a dead controller").await?;
    logged(&setup, "guard: v2 of shop is back in service").await?;
    load.stop().await?;
    setup.no_trap().await
}

/// All to v1 at revision 100.
async fn with_controller(server: &PolicyServer) -> anyhow::Result<EnvoyFixture> {
    let mut policy = json!({ "revision": 100, "services": [service("shop", &[("v1", 1), ("v2", 0)])] });
    policy["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
    let build = |bootstrap: Bootstrap| bootstrap.controller(server.address());
    EnvoyFixture::start_with(policy, &["v1", "v2"], WORKERS, build, |_| ()).await
}

/// The vetoes of the last report.
fn told(server: &PolicyServer) -> anyhow::Result<Vec<Veto>> {
    let report = server.last_report()?;
    Ok(report.services.into_iter().flat_map(|service| service.vetoes).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_veto_is_reported_outlives_new_policies_and_ends_rules_too() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let setup = with_controller(&server).await?;
    let policy = |revision: u64, weights: &[(&str, u32)], cool_down: u64| {
        let mut shop = service("shop", weights);
        let is_beta = json!([{ "headers": [{ "name": "x-beta", "type": "Present" }] }]);
        shop["rules"] = json!([{ "name": "beta", "matches": is_beta, "versions": [{ "name": "v2" }] }]);
        shop["guard"] = json!({ "coolDownSeconds": cool_down });
        json!({ "revision": revision, "services": [shop] })
    };
    server.publish(&policy(101, &[("v1", 90), ("v2", 10)], 60));
    held_after(&server, 101).await?;
    let tester = setup.get(HOST, "/").header("x-beta", "1");
    let mut testers = EachWorker::open(&setup, tester).await?;
    testers.all_to("v2").await?;
    assert_eq!(told(&server).unwrap_or_default(), []);

    let load = hundred_a_second(&setup);
    fails(&setup, "v2", ALL);
    let veto =
        eventually("the veto in a report", DEADLINE, async || told(&server)?.into_iter().next().context("no veto"));
    let veto = veto.await?;
    let begun = Duration::from_nanos(veto.until) - Duration::from_secs(60);
    let reported_within = SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(begun);
    println!("{veto:?} reported within {reported_within:?}");
    assert!(reported_within < Duration::from_millis(300), "not at once, but after {reported_within:?}");
    assert_eq!((veto.version.as_str(), veto.strikes, veto.others_errors), ("v2", 1, 0), "{veto:?}");
    assert!(veto.errors >= 3 && veto.requests >= veto.errors && veto.others_requests >= 20, "{veto:?}");
    // The rule has no version left in service.
    assert_eq!(testers.versions().await?, ["v1"; WORKERS]);

    // More weight for v2, and the controller's word that it serves, do not bring it back.
    fails(&setup, "v2", NONE);
    let mut more = policy(102, &[("v1", 50), ("v2", 50)], 60);
    more["services"][0]["rules"][0]["versions"] = json!([{ "name": "v2" }, { "name": "v1" }]);
    server.publish(&more);
    eventually("revision 102 on all workers", DEADLINE, async || {
        let report = server.last_report()?;
        ensure!(report.revision == 102, "{report:?}");
        Ok(())
    })
    .await?;
    let tally = next(&load, 100).await?;
    assert_eq!(tally.of("v2"), 0, "{tally:?}");
    assert_eq!(testers.versions().await?, ["v1"; WORKERS]);
    assert_eq!(told(&server)?.len(), 1);

    // Without its guard the service is as its policy says.
    let mut unguarded = policy(103, &[("v1", 50), ("v2", 50)], 60);
    unguarded["services"][0]["guard"] = json!({ "enabled": false });
    server.publish(&unguarded);
    testers.all_to("v2").await?;
    eventually("no veto in the report", DEADLINE, async || {
        ensure!(told(&server)?.is_empty());
        Ok(())
    })
    .await?;
    load.stop().await?;
    setup.no_trap().await
}

/// v1, which is what the guard measures v2 by, is stopped while v2 is vetoed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_get_a_vetoed_version_at_once_when_no_other_one_is_left() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let setup = with_controller(&server).await?;
    let mut policy = json!({ "revision": 101, "services": [service("shop", &[("v1", 90), ("v2", 10)])] });
    policy["services"][0]["guard"] = json!({ "coolDownSeconds": 60 });
    server.publish(&policy);
    held_after(&server, 101).await?;
    let load = hundred_a_second(&setup);
    fails(&setup, "v2", ALL);
    logged(&setup, "guard: v2 of shop is out of service for 60 s").await?;
    fails(&setup, "v2", NONE);
    let tally = next(&load, 100).await?;
    assert_eq!((tally.of("v2"), tally.bad()), (0, 0), "{tally:?}");

    policy["revision"] = json!(102);
    policy["services"][0]["versions"] = json!([{ "name": "v1", "weight": 0, "serving": false }, { "name": "v2" }]);
    server.publish(&policy);
    held_after(&server, 102).await?;
    // Where nothing is in service, Envoy's default route is v1's: none of these may go there.
    let tally = next(&load, 300).await?;
    println!("{} of {} for v2", tally.of("v2"), tally.answered);
    assert!(tally.of("v2") + 2 * WORKERS as u64 >= tally.answered && tally.bad() == 0, "{tally:?}");
    logged(&setup, "guard: v2 of shop is back in service").await?;
    eventually("no veto in the report", DEADLINE, async || {
        ensure!(told(&server)?.is_empty());
        Ok(())
    })
    .await?;

    // It is judged again as soon as there is another version.
    policy["revision"] = json!(103);
    policy["services"][0]["versions"] = json!([{ "name": "v1", "weight": 90 }, { "name": "v2", "weight": 10 }]);
    server.publish(&policy);
    held_after(&server, 103).await?;
    fails(&setup, "v2", ALL);
    logged(&setup, "guard: v2 of shop is out of service for 120 s").await?;
    load.stop().await?;
    setup.no_trap().await
}

/// Clients that match a rule choose their version: their results say nothing about those of other users.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_testers_see_takes_no_version_from_the_users() -> anyhow::Result<()> {
    const TESTS: u64 = 300;
    let mut shop = service("shop", &[("v1", 90), ("v2", 10)]);
    let is_beta = json!([{ "headers": [{ "name": "x-beta", "type": "Present" }] }]);
    shop["rules"] = json!([{ "name": "beta", "matches": is_beta, "versions": [{ "name": "v2" }] }]);
    let setup = EnvoyFixture::start(json!({ "revision": 1, "services": [shop] }), &["v1", "v2"], WORKERS).await?;
    setup.backend("v2").set(|behaviour| behaviour.bad_input = Some("/bad"));
    let users = hundred_a_second(&setup);
    let testers = Plan { path: "/bad".to_owned(), ..Plan::new(setup.address(), HOST).header("x-beta", "1") };
    let tally = testers.connections(2 * WORKERS).callers(5).rate(100.0).run(TESTS).await?;
    assert_eq!(tally.of_class("v2", 5), TESTS, "they are given v2, however it fails: {tally:?}");
    let tally = users.tally();
    assert!(tally.bad() == 0 && tally.of("v2") > 0, "{tally:?}");
    let log = setup.envoy.log();
    assert!(!log.contains("guard: "), "{:?}", log.lines().find(|line| line.contains("guard: ")));
    // It is awake.
    fails(&setup, "v2", ALL);
    logged(&setup, "guard: v2 of shop is out of service for 2 s").await?;
    users.stop().await?;
    setup.no_trap().await
}

/// Two listeners with a policy each and no controller: both plugin configurations live in one VM of each worker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_static_policies_are_both_guarded() -> anyhow::Result<()> {
    let policy = |name: &str| json!({ "revision": 1, "services": [service(name, &[("v1", 80), ("v2", 20)])] });
    let port = Port::reserve()?;
    let patch = |bootstrap: &mut Value| {
        let mut other = bootstrap["static_resources"]["listeners"][0].clone();
        (other["name"], other["address"]) = (json!("other"), socket_address(port.address()));
        let filter = &mut other["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0];
        filter["typed_config"]["config"]["configuration"]["value"] = json!(policy("pay").to_string());
        bootstrap["static_resources"]["listeners"].as_array_mut().into_iter().for_each(|l| l.push(other.clone()));
    };
    let setup = EnvoyFixture::start_with(policy("shop"), &["v1", "v2"], WORKERS, |bootstrap| bootstrap, patch).await?;
    let shop = hundred_a_second(&setup);
    let pay = Plan::new(port.address(), "pay.example.com").connections(2 * WORKERS).rate(100.0).start();
    next(&shop, 50).await?;
    next(&pay, 50).await?;
    fails(&setup, "v2", ALL);
    for (name, load) in [("shop", &shop), ("pay", &pay)] {
        logged(&setup, &format!("guard: v2 of {name} is out of service for 2 s")).await?;
        ensure!(load.tally().bad() <= 2 * MOST_FAILED, "{name}: {} failed requests", load.tally().bad());
    }
    fails(&setup, "v2", NONE);
    shop.stop().await?;
    pay.stop().await?;
    setup.no_trap().await
}

/// A usual way to have fewer stats leaves ours out, which Envoy does not tell the filter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guard_and_reports_see_without_envoys_stats() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let mut policy = json!({ "revision": 1, "services": [service("shop", &[("v1", 90), ("v2", 10)])] });
    policy["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
    let few = |bootstrap: &mut Value| {
        let prefixes = ["cluster.", "http.", "listener.", "wasm."].map(|prefix| json!({ "prefix": prefix }));
        bootstrap["stats_config"]["stats_matcher"] = json!({ "inclusion_list": { "patterns": prefixes } });
    };
    let build = |bootstrap: Bootstrap| bootstrap.controller(server.address());
    let setup = EnvoyFixture::start_with(policy, &["v1", "v2"], WORKERS, build, few).await?;
    let load = hundred_a_second(&setup);
    fails_and_is_taken_out(&setup, &load, "no stats").await.map(drop)?;
    let tally = load.stop().await?;
    let stats = setup.envoy.stats().await?;
    ensure!(!stats.contains("tideshift_requests"), "the stats are there");
    eventually("a report of all requests, and of the veto", DEADLINE, async || {
        let report = server.last_report()?;
        let of =
            |name: &str| report.services.iter().flat_map(|s| &s.versions).find(|v| v.name == name).map(|v| v.ended);
        let (v1, v2) = (of("v1").unwrap_or_default(), of("v2").unwrap_or_default());
        let seen = (v1.ok, v1.error, v2.ok, v2.error);
        // Also those that the last step sent.
        let sent = (tally.of_class("v1", 2) + 30 * WORKERS as u64, 0, tally.of_class("v2", 2), tally.of_class("v2", 5));
        ensure!(seen == sent, "{seen:?}, and clients {sent:?}");
        ensure!(told(&server)?.iter().any(|veto| veto.version == "v2"));
        Ok(())
    })
    .await?;
    setup.no_trap().await
}

/// Several services at once, each with versions of its own, so that one Envoy answers for all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_who_does_worse_than_others_that_can_do_without_it_is_taken_out() -> anyhow::Result<()> {
    const REQUESTS: u64 = 900;
    let mut unguarded = service("unguarded", &[("u1", 90), ("u2", 10)]);
    unguarded["guard"] = json!({ "enabled": false });
    let services = [
        service("outage", &[("o1", 90), ("o2", 10)]),
        service("most", &[("m1", 60), ("m2", 40)]),
        service("alone", &[("a1", 1), ("a2", 0)]),
        unguarded,
        service("control", &[("c1", 90), ("c2", 10)]),
    ];
    let policy = json!({ "revision": 1, "services": services });
    let versions = ["o1", "o2", "m1", "m2", "a1", "a2", "u1", "u2", "c1", "c2"];
    let setup = EnvoyFixture::start(policy, &versions, WORKERS).await?;
    for failing in ["o1", "o2", "m1", "a1", "u2", "c2"] {
        fails(&setup, failing, ALL);
    }
    let mut loads = Vec::new();
    for (service, failing, share) in [
        ("outage", "o2", 0.1),
        ("most", "m1", 0.6),
        ("alone", "a1", 1.0),
        ("unguarded", "u2", 0.1),
        ("control", "", 0.0),
    ] {
        let plan = Plan::new(setup.address(), &format!("{service}.example.com"));
        let plan = plan.connections(WORKERS).rate(300.0);
        loads.push((service, failing, share, tokio::spawn(plan.run(REQUESTS))));
    }
    for (service, failing, share, load) in loads {
        let tally = load.await??;
        let log = setup.envoy.log();
        let vetoes = log.lines().filter(|line| line.contains("guard: ") && line.contains(&format!(" of {service} ")));
        if service == "control" {
            assert!(vetoes.count() > 0, "the guard is awake");
            continue;
        }
        assert_eq!(vetoes.collect::<Vec<_>>(), Vec::<&str>::new());
        let (due, got) = (REQUESTS as f64 * share, tally.of(failing) as f64);
        // The bound of the even sequence, on each worker.
        assert!((got - due).abs() <= 3.0 * WORKERS as f64, "{service}: {failing} got {got} requests of {due}");
    }
    setup.no_trap().await
}

/// A filter behind ours that fails 2 % of all requests at random, whichever version they are for.
fn fail_two_percent(bootstrap: &mut Value) {
    let fault = json!({
        "name": "envoy.filters.http.fault",
        "typed_config": {
            "@type": type_url("extensions.filters.http.fault.v3.HTTPFault"),
            "abort": { "http_status": 500, "percentage": { "numerator": 2, "denominator": "HUNDRED" } },
        },
    });
    let filters = &mut manager(bootstrap)["http_filters"];
    filters.as_array_mut().into_iter().for_each(|filters| filters.insert(1, fault.clone()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_that_fail_alike_stay_in_service() -> anyhow::Result<()> {
    const REQUESTS: u64 = 12_000;
    let policy = json!({ "revision": 1, "services": [service("shop", &[("v1", 90), ("v2", 10)])] });
    let setup =
        EnvoyFixture::start_with(policy, &["v1", "v2"], WORKERS, |bootstrap| bootstrap, fail_two_percent).await?;
    let tally = Plan::new(setup.address(), HOST).connections(2 * WORKERS).run(REQUESTS).await?;
    let failed = tally.of_class(NOBODY, 5);
    println!("{failed} of {REQUESTS} failed, whichever version they were for");
    assert!((150..=350).contains(&failed), "{tally:?}");
    let log = setup.envoy.log();
    assert!(!log.contains("guard: "), "{:?}", log.lines().find(|line| line.contains("guard: ")));
    let on_v2 = setup.settled("shop", REQUESTS).await?.requests_by_version("shop");
    let on_v2: u64 = on_v2.iter().filter(|((version, _), _)| version == "v2").map(|(_, count)| count).sum();
    assert!(on_v2.abs_diff(REQUESTS / 10) <= 3 * WORKERS as u64, "{on_v2} of {REQUESTS} were for v2");
    // One that fails more is found among such errors too.
    fails(&setup, "v2", ALL);
    let load = hundred_a_second(&setup);
    logged(&setup, "guard: v2 of shop is out of service for 2 s").await?;
    println!("{} of v2's requests failed", load.stop().await?.of_class("v2", 5));
    setup.no_trap().await
}
