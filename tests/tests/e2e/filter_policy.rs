//! Policies by long poll and reports, in a real Envoy of several workers, with a controller that says what the test
//! wants: what is newer is in force on every worker at once, what is not right changes nothing, and counts are exact.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::counts::Counts;
use tideshift_core::outcome::Outcome;
use tideshift_core::protocol::report::Report;
use tideshift_tests::backend::Errors;
use tideshift_tests::bootstrap::CONTROLLER_CLUSTER;
use tideshift_tests::effect;
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture};
use tideshift_tests::load::{Plan, Tally};
use tideshift_tests::policy_server::{PolicyServer, ReportAnswer, held_after};
use tideshift_tests::wait::eventually;

const HOST: &str = "shop.example.com";
const WORKERS: usize = 3;
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];

/// All requests to one version.
fn all_to(version: &str, revision: u64) -> Value {
    weights(revision, VERSIONS.map(|name| u32::from(name == version)))
}

fn weights(revision: u64, weights: [u32; 3]) -> Value {
    let versions = VERSIONS.iter().zip(weights).map(|(name, weight)| json!({ "name": name, "weight": weight }));
    let versions: Vec<_> = versions.collect();
    json!({ "revision": revision, "services": [{ "name": "shop", "hostnames": [HOST], "versions": versions }] })
}

/// An Envoy whose plugin configuration sends all to v1 at revision 100, and its controller, which has nothing yet.
async fn start() -> anyhow::Result<(EnvoyFixture, PolicyServer)> {
    start_with(|_| ()).await
}

async fn start_with(patch: impl FnOnce(&mut Value)) -> anyhow::Result<(EnvoyFixture, PolicyServer)> {
    let server = PolicyServer::start().await?;
    let mut policy = all_to("v1", 100);
    policy["controller"] = json!({ "cluster": CONTROLLER_CLUSTER, "token": "open-sesame" });
    let build = |bootstrap: tideshift_tests::bootstrap::Bootstrap| bootstrap.controller(server.address());
    let setup = EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, build, patch).await?;
    Ok((setup, server))
}

/// Waits for a report for which this holds.
async fn reported(server: &PolicyServer, what: &str, holds: impl Fn(&Report) -> bool) -> anyhow::Result<Report> {
    eventually(what, DEADLINE, async || {
        let report = server.last_report()?;
        ensure!(holds(&report), "{report:?}");
        Ok(report)
    })
    .await
}

/// What a report says of each version.
fn told(report: &Report) -> BTreeMap<String, Counts> {
    report.services.iter().flat_map(|s| &s.versions).map(|v| (v.name.clone(), v.ended)).collect()
}

/// Checks that the client's tally, the stats and the reports say the same of each version.
async fn reconcile(setup: &EnvoyFixture, server: &PolicyServer, tally: &Tally) -> anyhow::Result<()> {
    assert_eq!((tally.sent, tally.failed), (tally.answered, 0), "{tally:?}");
    let metrics = setup.settled("shop", tally.sent).await?;
    let report = reported(server, "a report of all requests", |report| {
        told(report).values().map(Counts::total).sum::<u64>() == tally.sent
    })
    .await?;
    for version in VERSIONS {
        let ok = tally.of_class(version, 2);
        let error = tally.of_class(version, 5);
        let expected = Counts { ok, error, client_error: 0, cancelled: 0 };
        assert_eq!(told(&report)[version], expected, "{version} in the report");
        for outcome in Outcome::ALL {
            let counted = metrics.requests_total("shop", version, outcome.label());
            assert_eq!(counted, expected.of(outcome), "{version} in the stats: {}", outcome.label());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_policies_under_load_lose_no_request_and_no_count() -> anyhow::Result<()> {
    const CHANGES: u64 = 200;
    let (setup, server) = start().await?;
    let load = Plan::new(setup.address(), HOST).connections(2 * WORKERS).start();
    held_after(&server, 100).await?;
    let mut latencies = Vec::new();
    for revision in 1..=CHANGES {
        let first = VERSIONS[revision as usize % 3];
        // Every other change is a jump of everything, the others are splits.
        let policy = match revision % 2 {
            0 => all_to(first, revision),
            _ => weights(revision, [revision as u32 % 7, revision as u32 % 11 + 1, revision as u32 % 5]),
        };
        let before = Instant::now();
        server.publish(&policy);
        held_after(&server, revision).await?;
        latencies.push(before.elapsed());
    }
    reported(&server, "a report of the last revision", |report| report.revision == CHANGES).await?;
    let before = load.tally();
    eventually("a request after the last change", DEADLINE, async || {
        ensure!(load.tally().answered > before.answered + 100);
        Ok(())
    })
    .await?;
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), 0, "{tally:?}");
    assert!(VERSIONS.iter().all(|version| tally.of(version) > 0), "{tally:?}");
    reconcile(&setup, &server, &tally).await?;
    assert_eq!(server.polls().len() as u64, CHANGES + 1, "one poll for each policy, and the one that is held");
    assert_eq!(server.strange(), [""; 0]);
    println!("{} requests under {CHANGES} policies; from one to the next poll: {}", tally.sent, spread(latencies));
    setup.no_trap().await
}

/// Median, 99th percentile and maximum.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    format!("median {:?}, p99 {:?}, max {:?}", at(0.5), at(0.99), at(1.0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_policy_is_in_force_on_every_worker_at_once() -> anyhow::Result<()> {
    const CHANGES: u64 = 100;
    let (setup, server) = start().await?;
    held_after(&server, 100).await?;
    let mut workers = EachWorker::open(&setup, setup.get(HOST, "/")).await?;
    workers.all_to("v1").await?;
    let flips = |revision| (flip(revision), all_to(flip(revision), revision));
    let (effects, _) = effect::of_changes(&server, 100, workers.connections, &workers.request, CHANGES, flips).await?;
    let mut latencies: Vec<_> = effects.iter().map(|effect| effect.since_answered).collect();
    // Far above what it takes, and below what it would take without waking the workers: their next tick.
    latencies.sort_unstable();
    let median = latencies[latencies.len() / 2];
    println!("from the controller's answer to the last of {WORKERS} workers' effect: {}", spread(latencies));
    assert!(median < Duration::from_millis(100), "{median:?}");
    let of_all = |report: &Report| report.epoch == "e1" && report.workers as usize == WORKERS + 1;
    reported(&server, "a report of the last revision", |r| of_all(r) && r.revision == CHANGES).await?;
    setup.no_trap().await
}

fn flip(revision: u64) -> &'static str {
    VERSIONS[1 + revision as usize % 2]
}

#[tokio::test]
async fn what_is_older_bad_or_broken_is_refused_and_changes_nothing() -> anyhow::Result<()> {
    let (setup, server) = start().await?;
    let mut workers = EachWorker::open(&setup, setup.get(HOST, "/")).await?;
    // Revision 10 replaces 100: that was the plugin configuration's own.
    server.publish(&all_to("v2", 10));
    workers.all_to("v2").await?;
    held_after(&server, 10).await?;

    // A bad one, refused by the field; it is not asked for again.
    let mut bad = all_to("v3", 11);
    bad["services"][0]["versions"][1]["weight"] = json!(-1);
    bad["services"][0]["versions"][2]["wieght"] = json!(1);
    let polls = server.polls().len();
    server.publish(&bad);
    held_after(&server, 11).await?;
    let report = reported(&server, "a report of what was refused", |report| report.refused.is_some()).await?;
    let refused = report.refused.context("nothing refused")?;
    assert_eq!((refused.revision, report.revision), (Some(11), 10));
    let [weight, wieght] = refused.errors.as_slice() else { panic!("{refused:?}") };
    assert!(weight.starts_with("services[0].versions[1].weight: -1 is not allowed; expected"), "{weight}");
    assert!(wieght.starts_with("services[0].versions[2].wieght: unknown field; did you mean `weight`?"), "{wieght}");
    let log = setup.envoy.log();
    let line = log.lines().find(|line| line.contains("refused a policy")).context("nothing in the log")?;
    assert!(line.contains("[error]") && line.contains(weight) && line.contains(wieght), "{line}");
    assert_eq!(workers.versions().await?, ["v2"; WORKERS]);
    assert_eq!(server.polls().len(), polls + 1, "a refused policy was asked for again");

    // A good one after it.
    server.publish(&all_to("v3", 12));
    workers.all_to("v3").await?;
    reported(&server, "a report without what was refused", |r| r.refused.is_none() && r.revision == 12).await?;

    // Older, the same again, and broken in all ways; each is followed by one that is good. Polls after a failure come
    // at growing intervals, not at once.
    let http = |status: &str, headers: &str, body: &[u8]| {
        let length = body.len();
        let head = format!("HTTP/1.1 {status} -\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n");
        [head.as_bytes(), body].concat()
    };
    let policy = |revision: u64| all_to("v1", revision).to_string().into_bytes();
    let e1 = "x-tideshift-epoch: e1\r\n";
    let whole = http("200", e1, &policy(10_000));
    let cut = whole[..whole.len() - 20].to_vec();
    let head = whole.windows(4).position(|end| end == b"\r\n\r\n").context("no head")? + 4;
    let broken: Vec<(&str, Vec<u8>)> = vec![
        ("older", http("200", e1, &policy(3))),
        ("cut in its body", cut),
        ("cut after its head", whole[..head].to_vec()),
        ("cut in its head", whole[..head - 10].to_vec()),
        ("nothing", Vec::new()),
        ("an empty body", http("200", e1, b"")),
        ("garbage", http("200", e1, b"\xff\x00\xfe{\"revision\":")),
        ("2 MB of garbage", http("200", e1, &vec![b'['; 2 << 20])),
        ("JSON, but no policy", http("200", e1, b"[1, 2]")),
        ("a policy without a revision", http("200", e1, b"{\"services\": []}")),
        (
            "an epoch that is not UTF-8",
            b"HTTP/1.1 200 -\r\ncontent-length: 0\r\nx-tideshift-epoch: \xff\r\n\r\n".to_vec(),
        ),
        ("500", http("500", e1, &policy(10_000))),
        ("302", http("302", "location: /v1/policy\r\n", &policy(10_000))),
        ("no HTTP", b"hello\r\n\r\n".to_vec()),
    ];
    let mut revision = 12;
    for (name, bytes) in broken {
        held_after(&server, revision).await?;
        let polls = server.polls().len();
        server.answer_raw_once(bytes);
        eventually(&format!("{name}: one more poll"), DEADLINE, async || {
            ensure!(server.polls().len() > polls);
            Ok(())
        })
        .await?;
        held_after(&server, revision).await.with_context(|| format!("after {name}"))?;
        assert_eq!(workers.versions().await?, [flip(revision + 1); WORKERS], "{name}");
        revision += 1;
        server.publish(&all_to(flip(revision + 1), revision));
        workers.all_to(flip(revision + 1)).await.with_context(|| format!("after {name}"))?;
    }
    held_after(&server, revision).await?;
    let log = setup.envoy.log();
    assert!(log.contains("revision 3, which is not newer than 12"), "the log does not say why it was not taken");
    for never in ["policy revision 3 from the controller", "policy revision 10000 from the controller"] {
        assert!(!log.contains(never), "{never}");
    }

    // The waits between polls: at least half of 250 ms, then of 500 ms and of 1 s.
    let before = server.polls().len();
    server.answer_raw("");
    let polls = eventually("four more polls", DEADLINE, async || {
        let polls = server.polls();
        ensure!(polls.len() >= before + 3);
        Ok(polls)
    })
    .await?;
    let gaps: Vec<_> = polls[before..].windows(2).map(|pair| pair[1].at.duration_since(pair[0].at)).collect();
    assert!(gaps[0] >= Duration::from_millis(100) && gaps[1] >= Duration::from_millis(225), "{gaps:?}");

    // 2 MB of a good one are taken.
    revision += 1;
    let padded = [policy(revision), vec![b' '; 2 << 20]].concat();
    server.publish_bytes(revision, padded);
    workers.all_to("v1").await?;
    setup.no_trap().await
}

#[tokio::test]
async fn an_epoch_that_it_does_not_know_is_followed() -> anyhow::Result<()> {
    let (setup, server) = start().await?;
    let mut workers = EachWorker::open(&setup, setup.get(HOST, "/")).await?;
    let first = eventually("a poll", DEADLINE, async || server.polls().into_iter().next().context("none")).await?;
    assert_eq!((first.epoch(), first.after()), ("", 100));
    server.publish(&all_to("v2", 5_000));
    workers.all_to("v2").await?;
    held_after(&server, 5_000).await?;
    // The controller has lost its state and starts from scratch.
    server.publish_in_epoch("e2", &all_to("v3", 1));
    workers.all_to("v3").await?;
    held_after(&server, 1).await?;
    assert_eq!(server.polls().last().map(|poll| poll.epoch().to_owned()).as_deref(), Some("e2"));
    reported(&server, "a report of the new epoch", |r| r.epoch == "e2" && r.revision == 1).await?;
    server.publish(&all_to("v1", 2));
    workers.all_to("v1").await?;
    setup.no_trap().await
}

#[tokio::test]
async fn polls_that_bring_nothing_do_not_spin() -> anyhow::Result<()> {
    let (setup, server) = start().await?;
    let polls_until = async |number: usize| {
        eventually(&format!("{number} polls"), DEADLINE, async || {
            let polls = server.polls();
            ensure!(polls.len() >= number, "{}", polls.len());
            Ok(polls)
        })
        .await
    };
    // Held for long enough, the next poll comes at once.
    polls_until(1).await?;
    server.hold(Duration::ZERO);
    // It does not know yet that polls are not held any more; this wakes the first one.
    server.publish(&all_to("v2", 1));
    let before = polls_until(2).await?.len();
    // A controller, or a gateway before it, that answers 204 at once is not asked again at once.
    let polls = polls_until(before + 3).await?;
    let took = polls[before + 2].at.duration_since(polls[before - 1].at);
    assert!(took >= Duration::from_millis(1_500), "3 polls that brought nothing within {took:?}");
    server.hold(DEADLINE);
    server.publish(&all_to("v3", 2));
    EachWorker::open(&setup, setup.get(HOST, "/")).await?.all_to("v3").await?;
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_dies_and_comes_back_is_not_felt_by_traffic() -> anyhow::Result<()> {
    let (setup, server) = start().await?;
    server.publish(&weights(1, [1, 1, 0]));
    held_after(&server, 1).await?;
    setup.backend("v2").set(|behaviour| behaviour.errors = Errors { bad: 1, of: 10 });
    reported(&server, "a report", |report| report.revision == 1).await?;
    let load = Plan::new(setup.address(), HOST).connections(2 * WORKERS).rate(500.0).start();

    server.stop();
    let failed = format!("cluster.{CONTROLLER_CLUSTER}.upstream_cx_connect_fail");
    eventually("calls to the dead controller", DEADLINE, async || {
        ensure!(setup.envoy.stat(&failed).await? >= 4);
        Ok(())
    })
    .await?;
    let polls = server.polls().len();
    server.start_again().await?;
    eventually("a poll of the controller that is back", DEADLINE, async || {
        ensure!(server.polls().len() > polls);
        Ok(())
    })
    .await?;
    assert_eq!(server.polls()[polls].after(), 1, "it still runs what it had");
    server.publish(&weights(2, [0, 1, 1]));
    reported(&server, "a report of the newer policy", |report| report.revision == 2).await?;

    // Reports whose answers fail or get lost count nothing twice and lose nothing.
    for answer in [ReportAnswer::Status(500), ReportAnswer::Lost, ReportAnswer::Status(200)] {
        server.answer_reports(answer);
        let reports = server.reports().len();
        eventually(&format!("a report answered by {answer:?}, and the next"), DEADLINE, async || {
            ensure!(server.reports().len() >= reports + 2);
            Ok(())
        })
        .await?;
    }
    let tally = load.stop().await?;
    assert_eq!(tally.bad(), tally.of_class("v2", 5), "{tally:?}");
    assert!(tally.of_class("v2", 5) > 0 && tally.of("v3") > 0, "{tally:?}");
    reconcile(&setup, &server, &tally).await?;
    let totals: Vec<u64> = server.reports().iter().map(|r| told(r).values().map(Counts::total).sum()).collect();
    assert!(totals.is_sorted(), "a report took something back: {totals:?}");
    setup.no_trap().await
}

#[tokio::test]
async fn reports_say_who_sends_them_and_since_when() -> anyhow::Result<()> {
    let node = |bootstrap: &mut Value| bootstrap["node"] = json!({ "id": "pod~1.shop/ü", "cluster": "tests" });
    let (mut setup, server) = start_with(node).await?;
    let of_all_workers = |report: &Report| report.workers as usize == WORKERS + 1;
    let first = reported(&server, "a report of all workers", of_all_workers).await?;
    assert_eq!((first.proxy.as_str(), first.revision, first.epoch.as_str()), ("pod~1.shop/ü", 100, ""));
    setup.get(HOST, "/").send().await?;
    let later = reported(&server, "a report of a request", |r| told(r).values().any(|c| c.ok == 1)).await?;
    let starts: Vec<_> = server.reports().into_iter().map(|report| report.start).collect();
    assert!(!first.start.is_empty() && starts.iter().all(|start| *start == first.start), "{starts:?}");
    assert_eq!(later.workers as usize, WORKERS + 1);

    for poll in server.polls() {
        assert_eq!(poll.query.get("proxy").map(String::as_str), Some("pod%7E1%2Eshop%2F%C3%BC"));
        assert_eq!(poll.authorization.as_deref(), Some("Bearer open-sesame"));
    }
    let authorized = |authorization: &Option<String>| authorization.as_deref() == Some("Bearer open-sesame");
    assert!(server.report_authorizations().iter().all(authorized));
    assert!(!setup.envoy.log().contains("open-sesame"), "the token is in the log");

    // A restarted Envoy starts from scratch, and reports that.
    let reports = server.reports().len();
    setup.restart().await?;
    let again = reported(&server, "a report of the new run", |r| r.start != first.start && of_all_workers(r)).await?;
    assert_eq!((again.proxy.as_str(), told(&again)), ("pod~1.shop/ü", BTreeMap::new()));
    assert!(
        server.reports()[reports..].iter().all(|report| report.start == again.start || report.start == first.start)
    );
    setup.no_trap().await
}

#[tokio::test]
async fn reports_come_about_once_a_second_from_one_vm() -> anyhow::Result<()> {
    let (setup, server) = start().await?;
    let begun = Instant::now();
    eventually("four reports", DEADLINE, async || {
        ensure!(server.reports().len() >= 4);
        Ok(())
    })
    .await?;
    // Never more often; a slow machine may make them rarer.
    assert!(begun.elapsed() >= Duration::from_millis(2_500), "4 reports in {:?}", begun.elapsed());
    assert_eq!(server.polls().len(), 1, "the one poll that is held");
    setup.no_trap().await
}
