//! Policies in parts, in a real Envoy of several workers: what changed travels alone, a bad service stops no other one,
//! and an endpoint that comes and goes does not send policies to everyone all the time.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tideshift_tests::bootstrap::CONTROLLER_CLUSTER;
use tideshift_tests::client::{Request, Response, get};
use tideshift_tests::controller::{Controller, cli};
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture};
use tideshift_tests::policy_server::{PolicyServer, held_after};
use tideshift_tests::test_bed::TestBed;
use tideshift_tests::wait::eventually;
use tokio::time::sleep_until;

const WORKERS: usize = 3;
const VERSIONS: [&str; 2] = ["v1", "v2"];
const SERVICES: usize = 1_000;

/// Everything to one version of a service that is as large as services usually are.
fn document(name: &str, stable: &str) -> Value {
    let version = |version: &str| json!({ "name": version, "endpoints": ["127.0.0.1:9"] });
    let matches = json!([{ "headers": [{ "name": "x-beta", "value": "always" }] }]);
    let rule = json!({ "name": "beta", "matches": matches, "versions": [{ "name": "v2" }] });
    json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": name },
        "spec": {
            "hostnames": [format!("{name}.example.com")], "versions": VERSIONS.map(version), "stable": stable,
            "rules": [rule],
        },
    })
}

async fn put(controller: &Controller, name: &str, stable: &str) -> anyhow::Result<()> {
    let request = Request::new(controller.address(), "PUT", &format!("/v1/shifts/{name}"));
    let request = request.header("content-type", "application/json").body(document(name, stable).to_string());
    let answer = request.send().await?;
    ensure!(answer.status < 300, "{}: {}", answer.status, answer.text());
    Ok(())
}

/// What the controller answers to a poll, and the bytes of that as they travel, head and all.
async fn polled(controller: &Controller, query: &str) -> anyhow::Result<(Value, usize)> {
    let answer: Response = get(controller.address(), &format!("/v1/policy?{query}")).send().await?;
    ensure!(answer.status == 200, "{query}: {}", answer.status);
    let head: usize = answer.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    Ok((answer.json()?, answer.body.len() + head + 19))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_one_service_of_a_thousand_travels_alone() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("shifts.yaml");
    let documents = (0..SERVICES).map(|n| document(&format!("s{n}"), "v1").to_string());
    std::fs::write(&file, documents.collect::<Vec<_>>().join("\n---\n"))?;
    let controller = Controller::start(&[&file]).await?;
    let policy = json!({ "controller": { "cluster": CONTROLLER_CLUSTER }, "revision": 1, "services": [] });
    let build = |bootstrap: tideshift_tests::bootstrap::Bootstrap| bootstrap.controller(controller.address());
    let setup = EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, build, |_| ()).await?;
    let mut workers = EachWorker::open(&setup, setup.get("s500.example.com", "/")).await?;
    workers.all_to("v1").await?;
    let status = controller.status().await?;
    let (epoch, revision) = (status["epoch"].as_str().context("no epoch")?, &status["revision"]);

    let received = format!("cluster.{CONTROLLER_CLUSTER}.upstream_cx_rx_bytes_total");
    let before = setup.envoy.stat(&received).await?;
    put(&controller, "s500", "v2").await?;
    workers.all_to("v2").await?;
    let envoy = setup.envoy.stat(&received).await? - before;

    let query = format!("proxy=test&epoch={epoch}&after={revision}");
    let (changes, sent) = polled(&controller, &format!("{query}&delta=true")).await?;
    let (whole, all) = polled(&controller, &query).await?;
    let services = whole["services"].as_array().context("no services")?;
    let own = services.iter().find(|service| service["name"] == "s500").context("not there")?;
    assert_eq!((services.len(), &changes["services"]), (SERVICES, &json!([own])));
    let own = own.to_string().len();
    println!(
        "{sent} bytes with the head for a change of one service of {own}; the whole has {all}; Envoy received {envoy}"
    );
    assert!(sent <= 2 * own, "{sent} of {own}");
    assert!(envoy < 10 * own as u64, "{envoy}, with the answers to its reports");
    // Taken back, the file's document is in force again.
    let server = format!("http://{}", controller.address());
    let delete = || cli(["delete", "s500", "--server", &server]);
    let deleted = delete()?;
    assert_eq!(
        (deleted.code, deleted.stdout.as_str()),
        (Some(0), "s500: deleted; the file's document is in force again\n")
    );
    workers.all_to("v1").await?;
    let of_file = delete()?;
    assert_eq!((of_file.code, of_file.stderr.contains("comes from a file")), (Some(4), true), "{}", of_file.stderr);
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_service_stays_as_it_was_and_the_others_move() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let service = |name: &str, version: &str| {
        let weight = |of: &&str| json!({ "name": of, "weight": u32::from(*of == version) });
        let versions: Vec<Value> = VERSIONS.iter().map(weight).collect();
        json!({ "name": name, "hostnames": [format!("{name}.example.com")], "versions": versions })
    };
    let policy =
        json!({ "controller": { "cluster": CONTROLLER_CLUSTER }, "revision": 1, "services": [service("a", "v1")] });
    let build = |bootstrap: tideshift_tests::bootstrap::Bootstrap| bootstrap.controller(server.address());
    let setup = EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, build, |_| ()).await?;
    let mut a = EachWorker::open(&setup, setup.get("a.example.com", "/")).await?;
    let mut b = EachWorker::open(&setup, setup.get("b.example.com", "/")).await?;
    let mut bad = service("a", "v2");
    bad["rules"] = json!([{ "versions": [{ "name": "v3" }] }]);
    server.publish(&json!({ "revision": 2, "services": [bad, service("b", "v2")] }));
    b.all_to("v2").await?;
    assert_eq!(a.versions().await?, ["v1"; WORKERS], "the plugin configuration's");
    held_after(&server, 2).await?;
    eventually("a report of the bad service", DEADLINE, async || {
        let report = server.last_report()?;
        let refused = report.refused.as_ref().context("nothing refused")?;
        ensure!((report.revision, refused.revision) == (2, Some(2)) && refused.services == ["a"], "{report:?}");
        Ok(())
    })
    .await?;
    // Changes alone, since a revision that runs; and one since another revision, which leads to the whole.
    server.publish(&json!({ "revision": 3, "base": 2, "services": [service("a", "v2")] }));
    a.all_to("v2").await?;
    assert_eq!(b.versions().await?, ["v2"; WORKERS]);
    held_after(&server, 3).await?;
    let polls = server.polls();
    assert!(polls.iter().filter(|poll| poll.epoch() == "e1").all(|poll| poll.query.contains_key("delta")), "{polls:?}");
    server.publish(&json!({ "revision": 9, "base": 7, "services": [service("a", "v1")] }));
    eventually("a poll for the whole", DEADLINE, async || {
        let polls = server.polls();
        let last = polls.last().context("no poll")?;
        ensure!(last.after() == 3 && !last.query.contains_key("delta"), "{last:?}");
        Ok(())
    })
    .await?;
    assert_eq!(a.versions().await?, ["v2"; WORKERS]);
    server.publish(&json!({ "revision": 9, "services": [service("a", "v1")] }));
    a.all_to("v1").await?;
    assert_eq!(b.send(&setup.get("b.example.com", "/")).await?.len(), WORKERS);
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_comes_and_goes_is_published_a_few_times_a_second_at_most() -> anyhow::Result<()> {
    const FLAPS: u32 = 33;
    const EACH: Duration = Duration::from_millis(150);
    let rig = TestBed::new(&[("v1", 2), ("v2", 2)]).await?;
    let mut document = rig.document(json!({}));
    for version in document["spec"]["versions"].as_array_mut().context("no versions")? {
        version["readinessProbe"]["failureThreshold"] = json!(1);
        version["readinessProbe"]["periodMillis"] = json!(20);
    }
    rig.write(&document)?;
    let controller = Controller::start(&[&rig.file()]).await?;
    let count = async || {
        let metrics = controller.metrics().await?;
        let sum = |name: &str| metrics.sum(name, &[]).with_context(|| format!("no {name}"));
        let published = sum("tideshift_controller_policies_published_total")?;
        anyhow::Ok((published, sum("tideshift_controller_state_writes_total")?, controller.log().lines().count()))
    };
    let before = count().await?;
    let begun = Instant::now();
    for flap in 0..2 * FLAPS {
        let ready = flap % 2 == 1;
        rig.set_ready("v2", ready);
        sleep_until((begun + EACH * (flap + 1)).into()).await;
    }
    let after = count().await?;
    let (published, written, lines) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
    let seconds = begun.elapsed().as_secs_f64();
    println!("{FLAPS} flaps in {seconds:.1} s: {published} publications, {written} writes, {lines} lines in the log");
    assert!(published <= 2.0 * seconds + 2.0, "{published}");
    assert!(written <= 3.0 * seconds + 2.0, "{written}");
    assert!(lines as f64 <= 4.0 * seconds, "{lines}");
    Ok(())
}
