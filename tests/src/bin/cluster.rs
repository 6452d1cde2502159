//! Measures the cost and speed of one controller in a cluster with many TrafficShifts and pods, on the tests' own API
//! server. `make bench-controller` runs it; `ONLY=pods` selects figures.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::client::{Connection, Request, get};
use tideshift_tests::controller::Controller;
use tideshift_tests::kubernetes::test_bed::{Cluster, slice};
use tideshift_tests::usage::Usage;
use tideshift_tests::wait::eventually;
use tokio::time::sleep;

/// How long CPU time at rest is measured, and how long changes are made.
const REST: Duration = Duration::from_secs(10);
const CHANGES: Duration = Duration::from_secs(20);
/// How long a component may be busy after its start.
const SETTLE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(120);
/// The number of measurements from a slice to the policy.
const TIMES: usize = 60;
const PODS: usize = 10_000;
const EVENTS: usize = 2_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let only = env::var("ONLY").unwrap_or_default();
    println!("One controller and the tests' own API server, all on this machine.\n");
    println!("| what | to reach | before | now |\n|---|---|---|---|");
    if "shifts".contains(&only) {
        shifts().await?;
    }
    if "changes".contains(&only) {
        changes().await?;
    }
    if "pods".contains(&only) {
        pods().await?;
    }
    Ok(())
}

fn row(what: &str, reach: &str, before: &str, now: &str) {
    println!("| {what} | {reach} | {before} | {now} |");
}

/// At rest, with traffic, and with changes all the time.
async fn shifts() -> anyhow::Result<()> {
    const NUMBER: usize = 1_003;
    let (cluster, controller, took) = start(NUMBER).await?;
    let took = took.as_secs_f64();
    let written = writes(&cluster) as f64;
    row(
        &format!("statuses written each second, {NUMBER} TrafficShifts are new"),
        "",
        "13 to 20",
        &format!("{:.0}", written / took),
    );
    sleep(SETTLE).await;
    let percent = at_rest(&controller, REST).await?;
    row(&format!("CPU at rest, of one core: {NUMBER} TrafficShifts, one in conflict"), "2 %", "53 %", &percent);

    let epoch = controller.status().await?["epoch"].as_str().context("no epoch")?.to_owned();
    for sequence in 1..=60 {
        report(&controller, &epoch, sequence).await?;
        sleep(Duration::from_secs(1)).await;
        // The first proxy changes every status, and so does the end of drains.
        if sequence == 40 {
            cluster.server().forget_requests();
        }
    }
    row("status writes at rest with traffic, in 20 s", "0", "each one each 10 s", &writes(&cluster).to_string());

    let transitions = |lease: Value| lease["spec"]["leaseTransitions"].clone();
    let before = transitions(cluster.get("Lease", "tideshift").await?);
    let (begun, mut n) = (Instant::now(), 0);
    while begun.elapsed() < CHANGES {
        let (name, ready) = (format!("s{}-v2", n % 500), u8::from(n / 500 % 2 == 1));
        cluster.server().apply(in_cluster(&cluster, slice(&name, 2, ready)))?;
        n += 1;
        sleep(Duration::from_millis(100)).await;
    }
    let lease = cluster.get("Lease", "tideshift").await?;
    ensure!(transitions(lease) == before, "the lease was lost");
    let lost = controller.log().matches("the lease could not be renewed").count();
    row(
        &format!("leases lost at {NUMBER} TrafficShifts and 10 changes a second"),
        "0",
        "again and again",
        &lost.to_string(),
    );
    Ok(())
}

/// The time from a change of a slice to the policy that includes it.
async fn changes() -> anyhow::Result<()> {
    const NUMBER: usize = 500;
    let (cluster, controller, _) = start(NUMBER).await?;
    sleep(SETTLE).await;
    let mut connection = Connection::open(controller.address()).await?;
    let (mut revision, mut epoch) = (0, String::new());
    let mut times = Vec::new();
    for n in 0..=2 * TIMES {
        let name = format!("s{}-v1", 100 + n / 2 % 50);
        let begun = Instant::now();
        cluster.server().apply(in_cluster(&cluster, slice(&name, 2, u8::from(n % 2 == 1) * 2)))?;
        let path = format!("/v1/policy?proxy=probe&epoch={epoch}&after={revision}");
        let answer = connection.send(&get(controller.address(), &path)).await?;
        ensure!(answer.status == 200, "{path}: {}", answer.status);
        let policy = answer.json()?;
        // The first one is only the initial state; a change that takes traffic away is not delayed for others.
        if n > 0 && n % 2 == 0 {
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        revision = policy["revision"].as_u64().context("no revision")?;
        epoch = policy["epoch"].as_str().unwrap_or_default().to_owned();
        sleep(Duration::from_millis(1_200)).await;
    }
    times.sort_unstable_by(f64::total_cmp);
    let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    let now = format!("{p99:.0} ms (median {median:.0} ms)");
    row(&format!("from a slice to the policy, {NUMBER} TrafficShifts, one in conflict: p99"), "100 ms", "870 ms", &now);
    Ok(())
}

async fn pods() -> anyhow::Result<()> {
    let cluster = Cluster::stand_in().await?;
    let pod = |n: usize| {
        let labels =
            json!({ "app": format!("a{}", n % 100), "track": if n.is_multiple_of(2) { "old" } else { "new" } });
        let spec = json!({ "containers": [{ "name": "main", "image": "none" }], "nodeName": "elsewhere" });
        json!({ "apiVersion": "v1", "kind": "Pod", "spec": spec,
            "metadata": { "name": format!("pod-{n}"), "namespace": cluster.namespace, "labels": labels } })
    };
    for n in 0..PODS {
        cluster.server().create(pod(n))?;
    }
    for n in 0..100 {
        let version = |track: &str| json!({ "name": track, "selector": { "matchLabels": { "app": format!("a{n}"), "track": track } } });
        let spec = json!({ "hostnames": [format!("a{n}.example.com")], "versions": [version("old"), version("new")], "stable": "old" });
        cluster.server().apply(in_cluster(&cluster, shift(&format!("a{n}"), &spec)))?;
    }
    let controller = cluster.replica("a", &[]).await?;
    said(&cluster, 100).await?;
    sleep(SETTLE).await;
    let percent = at_rest(&controller, REST).await?;
    row(&format!("CPU at rest: {PODS} pods"), "2 %", "37 %", &percent);
    let (begun, before) = (Instant::now(), cpu(&controller)?);
    for n in 0..EVENTS {
        let annotations = json!({ "metadata": { "annotations": { "seen": n.to_string() } } });
        cluster.server().patch("pods", &cluster.namespace, &format!("pod-{n}"), annotations)?;
        sleep(Duration::from_millis(2)).await;
    }
    sleep(Duration::from_secs(1)).await;
    let rest: f64 = percent.trim_end_matches(" %").parse()?;
    let all = (cpu(&controller)? - before).as_secs_f64() - begun.elapsed().as_secs_f64() * rest / 100.0;
    let each = format!("{:.3} ms", all.max(0.0) * 1e3 / EVENTS as f64);
    row(&format!("CPU of a pod's event that changes nothing, {PODS} pods"), "0.2 ms", "11 ms", &each);
    Ok(())
}

/// Creates this many TrafficShifts with two versions each, another one that claims the hostname of the first, and a
/// controller that has written all statuses; returns also the time from its start until then.
async fn start(number: usize) -> anyhow::Result<(Cluster, Controller, Duration)> {
    let cluster = Cluster::stand_in().await?;
    for n in 0..number {
        let version = |version: &str| json!({ "name": version, "service": format!("s{n}-{version}") });
        for version in ["v1", "v2"] {
            cluster.server().apply(in_cluster(&cluster, slice(&format!("s{n}-{version}"), 2, 2)))?;
        }
        let hosts = [format!("s{n}.example.com")];
        let spec = json!({ "hostnames": hosts, "versions": [version("v1"), version("v2")], "stable": "v1" });
        cluster.server().apply(in_cluster(&cluster, shift(&format!("s{n}"), &spec)))?;
    }
    sleep(Duration::from_millis(1_100)).await;
    let spec =
        json!({ "hostnames": ["s0.example.com"], "versions": [{ "name": "v1", "service": "s0-v1" }], "stable": "v1" });
    cluster.server().apply(in_cluster(&cluster, shift("culprit", &spec)))?;
    let begun = Instant::now();
    let controller = cluster.replica("a", &[]).await?;
    said(&cluster, number + 1).await?;
    Ok((cluster, controller, begun.elapsed()))
}

fn shift(name: &str, spec: &Value) -> Value {
    json!({ "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": name }, "spec": spec })
}

fn in_cluster(cluster: &Cluster, mut object: Value) -> Value {
    if object["kind"] == "EndpointSlice" {
        object["apiVersion"] = json!("discovery.k8s.io/v1");
    }
    object["metadata"]["namespace"] = json!(cluster.namespace);
    object
}

/// Waits until every TrafficShift has a current status.
async fn said(cluster: &Cluster, number: usize) -> anyhow::Result<()> {
    eventually("all statuses", PATIENCE, async || {
        let all = cluster.server().list("trafficshifts.tideshift.dev", &cluster.namespace)?;
        let is_said = |shift: &&Value| {
            let conditions = shift["status"]["conditions"].as_array().into_iter().flatten();
            let is =
                |kind: &str, status: &str| conditions.clone().any(|one| one["type"] == kind && one["status"] == status);
            is("Accepted", "False") || is("Available", "Unknown") || is("Available", "True")
        };
        let said = all.iter().filter(is_said).count();
        ensure!(said == number, "{said} of {number}");
        Ok(())
    })
    .await
}

fn writes(cluster: &Cluster) -> usize {
    cluster.server().count("patch", "trafficshifts/status")
}

/// A proxy reports more requests of every tenth service.
async fn report(controller: &Controller, epoch: &str, sequence: u64) -> anyhow::Result<()> {
    let status = controller.status().await?;
    let services = status["services"].as_array().context("no services")?;
    let service = |service: &Value| {
        let ok = 100 * sequence;
        json!({ "name": service["name"], "versions": [{ "name": "v1", "ok": ok, "error": 0, "clientError": 0, "cancelled": 0 }] })
    };
    let services: Vec<Value> = services.iter().step_by(10).map(service).collect();
    let body = json!({ "proxy": "edge", "start": "18000000000000", "sequence": sequence, "epoch": epoch,
        "revision": status["revision"], "workers": 1, "format": 2, "services": services });
    let request = Request::new(controller.address(), "POST", "/v1/reports").header("content-type", "application/json");
    let answer = request.body(body.to_string()).send().await?;
    ensure!(answer.status == 204, "{}: {}", answer.status, answer.text());
    Ok(())
}

async fn at_rest(controller: &Controller, long: Duration) -> anyhow::Result<String> {
    let (begun, before) = (Instant::now(), cpu(controller)?);
    sleep(long).await;
    Ok(format!("{:.1} %", 100.0 * (cpu(controller)? - before).as_secs_f64() / begun.elapsed().as_secs_f64()))
}

fn cpu(controller: &Controller) -> anyhow::Result<Duration> {
    Usage { process: controller.id() }.cpu()
}
