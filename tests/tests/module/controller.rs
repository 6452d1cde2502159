//! The real module in the wasm host: the talk with the controller, with a clock and answers that the test decides.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use std::time::Duration;
use tideshift_tests::wasm_host::{Answer, Callout, Ending, Level, MAIN, Status, WasmHost};

const WORKERS: usize = 3;

fn policy(revision: u64, version: &str) -> Value {
    json!({"revision": revision, "services": [{"name": "checkout", "versions": [{"name": version}]}]})
}

/// A proxy with its own policy of revision 1, for v1, that has begun to talk.
fn host() -> anyhow::Result<WasmHost> {
    let mut host = WasmHost::new(WORKERS)?;
    host.set_property("xds.node.id", "envoy/1 é");
    let mut policy = policy(1, "v1");
    policy["controller"] = json!({"cluster": "tideshift_controller", "authority": "c", "token": "secret"});
    ensure!(host.configure(&policy.to_string())?, "refused: {:?}", host.log());
    pass(&mut host, 500)?;
    Ok(host)
}

fn pass(host: &mut WasmHost, millis: u64) -> anyhow::Result<()> {
    for _ in 0..millis.div_ceil(100) {
        host.advance(Duration::from_millis(100))?;
        host.wake()?;
    }
    Ok(())
}

/// The polls that were sent since the last look, and the last report; reports are answered at once.
fn look(host: &mut WasmHost) -> anyhow::Result<(Vec<Callout>, Option<Value>)> {
    let (mut polls, mut report) = (Vec::new(), None);
    for call in host.take_callouts() {
        if call.header(":path").as_deref() == Some("/v1/reports") {
            host.answer(&call, &Answer::new(204, ""))?;
            report = Some(serde_json::from_slice(&call.body)?);
        } else {
            polls.push(call);
        }
    }
    Ok((polls, report))
}

fn polls(host: &mut WasmHost) -> anyhow::Result<Vec<Callout>> {
    Ok(look(host)?.0)
}

/// The one poll that is under way.
fn poll(host: &mut WasmHost) -> anyhow::Result<Callout> {
    let polls = polls(host)?;
    ensure!(polls.len() <= 1, "{} polls at once", polls.len());
    polls.into_iter().next().with_context(|| format!("no poll; logged: {:?}", host.log()))
}

/// The next report; no poll may be due meanwhile.
fn report(host: &mut WasmHost) -> anyhow::Result<Value> {
    look(host)?;
    pass(host, 1_200)?;
    look(host)?.1.context("no report")
}

fn send(host: &mut WasmHost, poll: &Callout, epoch: &str, policy: &Value) -> anyhow::Result<()> {
    host.answer(poll, &Answer::new(200, policy.to_string()).header("x-tideshift-epoch", epoch))?;
    host.wake()?;
    Ok(())
}

/// The version that each worker gives out.
fn versions(host: &mut WasmHost) -> anyhow::Result<Vec<String>> {
    (1..=WORKERS).map(|w| host.request(w, &[(":path", "/")])?.version().context("unmarked")).collect()
}

#[test]
fn one_vm_polls_with_who_it_is_and_what_it_has() -> anyhow::Result<()> {
    let mut host = host()?;
    let poll = poll(&mut host)?;
    ensure!(poll.cluster == "tideshift_controller" && poll.header(":authority").as_deref() == Some("c"));
    ensure!(poll.header(":path").as_deref() == Some("/v1/policy?proxy=envoy%2F1%20%C3%A9&epoch=&after=1"));
    ensure!(poll.header("authorization").as_deref() == Some("Bearer secret"));
    pass(&mut host, 5_000)?;
    ensure!(polls(&mut host)?.is_empty(), "a poll is held, so no other one is sent");
    Ok(())
}

#[test]
fn a_newer_policy_reaches_every_worker_at_once_and_is_reported() -> anyhow::Result<()> {
    let mut host = host()?;
    let first = poll(&mut host)?;
    send(&mut host, &first, "e1", &policy(7, "v2"))?;
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    let next = poll(&mut host)?;
    ensure!(path(&next).ends_with("epoch=e1&after=7&delta=true"), "{}", path(&next));
    let report = report(&mut host)?;
    ensure!(report["revision"] == 7 && report["epoch"] == "e1" && report["workers"] == WORKERS + 1, "{report}");
    Ok(())
}

#[test]
fn an_older_policy_of_the_same_epoch_is_ignored_one_of_a_new_epoch_is_not() -> anyhow::Result<()> {
    let mut host = host()?;
    let first = poll(&mut host)?;
    send(&mut host, &first, "e1", &policy(7, "v2"))?;
    let second = poll(&mut host)?;
    send(&mut host, &second, "e1", &policy(6, "v3"))?;
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    ensure!(polls(&mut host)?.is_empty(), "a controller that sends old policies is not asked again at once");
    pass(&mut host, 6_000)?;
    let third = poll(&mut host)?;
    send(&mut host, &third, "e2", &policy(1, "v3"))?;
    ensure!(versions(&mut host)? == ["v3"; WORKERS]);
    Ok(())
}

#[test]
fn a_bad_policy_is_refused_and_reported_and_not_asked_for_again() -> anyhow::Result<()> {
    let mut host = host()?;
    let first = poll(&mut host)?;
    let mut bad = policy(8, "v2");
    bad["services"][0]["versions"][0]["weight"] = json!(-1);
    send(&mut host, &first, "e1", &bad)?;
    ensure!(versions(&mut host)? == ["v1"; WORKERS]);
    ensure!(polls(&mut host)?.is_empty(), "what came of the last answer is no reason to ask again at once");
    pass(&mut host, 1_000)?;
    let next = poll(&mut host)?;
    ensure!(next.header(":path").is_some_and(|path| path.ends_with("epoch=e1&after=8")));
    let report = report(&mut host)?;
    ensure!(report["refused"]["revision"] == 8 && report["revision"] == 1, "{report}");
    let errors = report["refused"]["errors"].to_string();
    ensure!(errors.contains("services[0].versions[0].weight: -1 is not allowed"), "{errors}");
    send(&mut host, &next, "e1", &policy(9, "v3"))?;
    ensure!(versions(&mut host)? == ["v3"; WORKERS]);
    ensure!(self::report(&mut host)?.get("refused").is_none());
    Ok(())
}

#[test]
fn a_controller_that_is_gone_changes_nothing_and_is_tried_again_ever_more_seldom() -> anyhow::Result<()> {
    let mut host = host()?;
    let mut tries = 0;
    for answer in
        [Answer::broken(), Answer::new(503, ""), Answer::new(200, "{"), Answer::new(200, "")].iter().cycle().take(40)
    {
        for poll in polls(&mut host)? {
            tries += 1;
            host.answer(&poll, answer)?;
        }
        pass(&mut host, 1_000)?;
    }
    ensure!((8..=20).contains(&tries), "{tries} tries in 40 s");
    ensure!(versions(&mut host)? == ["v1"; WORKERS]);
    pass(&mut host, 6_000)?;
    let poll = poll(&mut host)?;
    send(&mut host, &poll, "e1", &policy(2, "v2"))?;
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    Ok(())
}

#[test]
fn an_unknown_cluster_is_no_reason_to_fall_over() -> anyhow::Result<()> {
    let mut host = host()?;
    polls(&mut host)?;
    host.remove_cluster("tideshift_controller");
    pass(&mut host, 3_000)?;
    ensure!(versions(&mut host)? == ["v1"; WORKERS]);
    Ok(())
}

#[test]
fn reports_are_cumulative_and_come_each_second_from_one_vm() -> anyhow::Result<()> {
    let mut host = host()?;
    for n in 1..=3 {
        for worker in 1..=WORKERS {
            let exchange = host.request(worker, &[(":path", "/")])?;
            host.end(exchange, &Ending::status(200))?;
        }
        let report = report(&mut host)?;
        let v1 = &report["services"][0]["versions"][0];
        ensure!(v1["name"] == "v1" && v1["ok"] == n * WORKERS && v1["inFlight"] == 0, "{report}");
        ensure!(report["proxy"] == "envoy/1 é" && report["start"].as_str().is_some_and(|start| !start.is_empty()));
    }
    Ok(())
}

/// A plugin configuration for another controller comes and goes; what the first one is told goes on, and begins with
/// nothing that it was told before.
#[test]
fn a_configuration_that_comes_back_counts_nothing_twice() -> anyhow::Result<()> {
    let mut host = host()?;
    let requests = |host: &mut WasmHost| -> anyhow::Result<()> {
        for n in 0..10 * WORKERS {
            let exchange = host.request(1 + n % WORKERS, &[(":path", "/")])?;
            host.end(exchange, &Ending::status(200))?;
        }
        // All of them are counted by the time of the next report.
        pass(host, 300)
    };
    let configure = |host: &mut WasmHost, authority: &str, revision: u64| -> anyhow::Result<()> {
        let mut policy = policy(revision, "v1");
        policy["controller"] = json!({"cluster": "tideshift_controller", "authority": authority});
        ensure!(host.configure(&policy.to_string())?);
        for _ in 0..3 {
            pass(host, 1_000)?;
            look(host)?;
        }
        Ok(())
    };
    requests(&mut host)?;
    report(&mut host)?;
    for round in 0..2 {
        configure(&mut host, "other", 2 + 2 * round)?;
        requests(&mut host)?;
        report(&mut host)?;
        configure(&mut host, "c", 3 + 2 * round)?;
        requests(&mut host)?;
        let report = report(&mut host)?;
        let v1 = &report["services"][0]["versions"][0];
        let sent = (3 + 2 * round) * 10 * WORKERS as u64;
        ensure!(v1["ok"] == sent && v1["inFlight"] == 0, "{sent} were sent: {report}");
    }
    Ok(())
}

/// So that one that was held up on its way can be told from news, whichever VM has sent it.
#[test]
fn reports_are_numbered_over_all_vms_of_a_run() -> anyhow::Result<()> {
    let mut host = host()?;
    let mut last = 0;
    for round in 0..3 {
        for _ in 0..3 {
            let report = report(&mut host)?;
            let sequence = report["sequence"].as_u64().context("no number")?;
            ensure!(sequence > last, "{sequence} after {last}, round {round}");
            last = sequence;
        }
        // The leading VM dies, or all are reconfigured; the clock jumps back.
        match round {
            0 => (MAIN..=WORKERS).try_for_each(|thread| host.reload(thread).map(drop))?,
            _ => host.set_now(host.now() - Duration::from_secs(7_200)),
        }
        pass(&mut host, 6_000)?;
    }
    Ok(())
}

#[test]
fn when_the_vm_that_talks_dies_another_one_talks_on() -> anyhow::Result<()> {
    let mut host = host()?;
    let poll = poll(&mut host)?;
    // The new VM in its place has another number, so no VM holds the lease until it expires.
    ensure!(host.reload(poll.vm)?);
    pass(&mut host, 4_000)?;
    let poll = self::poll(&mut host)?;
    send(&mut host, &poll, "e1", &policy(3, "v2"))?;
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    Ok(())
}

#[test]
fn a_vm_that_comes_later_runs_what_the_controller_sent() -> anyhow::Result<()> {
    let mut host = host()?;
    let poll = poll(&mut host)?;
    send(&mut host, &poll, "e1", &policy(3, "v2"))?;
    ensure!(host.reload(2)?);
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    Ok(())
}

#[test]
fn a_clock_that_jumps_back_does_not_stop_the_talk() -> anyhow::Result<()> {
    let mut host = host()?;
    let poll = poll(&mut host)?;
    host.set_now(host.now() - Duration::from_secs(7_200));
    send(&mut host, &poll, "e1", &policy(3, "v2"))?;
    polls(&mut host)?;
    // Timers do not follow the wall clock.
    for thread in MAIN..=WORKERS {
        host.tick(thread)?;
    }
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    ensure!(look(&mut host)?.1.is_some(), "no report");
    ensure!(host.log_from(Level::Error).is_empty(), "{:?}", host.log());
    Ok(())
}

#[test]
fn lost_races_for_shared_data_are_tried_again() -> anyhow::Result<()> {
    let mut host = WasmHost::new(WORKERS)?;
    let mut policy = policy(1, "v1");
    policy["controller"] = json!({"cluster": "tideshift_controller"});
    ensure!(host.configure(&policy.to_string())?);
    host.fail_times("proxy_set_shared_data", Status::CasMismatch, 5);
    pass(&mut host, 5_000)?;
    let poll = poll(&mut host)?;
    send(&mut host, &poll, "e1", &self::policy(2, "v2"))?;
    ensure!(versions(&mut host)? == ["v2"; WORKERS]);
    Ok(())
}

/// A service that gives everything to this version.
fn service(name: &str, version: &str) -> Value {
    json!({"name": name, "hostnames": [format!("{name}.x")], "versions": [{"name": version}]})
}

/// The version that each worker gives out for a service.
fn versions_of(host: &mut WasmHost, service: &str) -> anyhow::Result<Vec<Option<String>>> {
    let authority = format!("{service}.x");
    (1..=WORKERS)
        .map(|w| Ok(host.request(w, &[(":authority", authority.as_str()), (":path", "/")])?.version()))
        .collect()
}

fn all(version: &str) -> Vec<Option<String>> {
    vec![Some(version.to_owned()); WORKERS]
}

fn path(poll: &Callout) -> String {
    poll.header(":path").unwrap_or_default()
}

#[test]
fn good_services_are_taken_and_bad_ones_stay_what_they_were() -> anyhow::Result<()> {
    let mut host = host()?;
    let first = poll(&mut host)?;
    send(&mut host, &first, "e1", &json!({"revision": 2, "services": [service("a", "v1"), service("b", "v1")]}))?;
    let second = poll(&mut host)?;
    let mut bad = service("a", "v2");
    bad["versions"][0]["weight"] = json!(-1);
    send(&mut host, &second, "e1", &json!({"revision": 3, "services": [bad, service("b", "v2"), service("c", "v2")]}))?;
    ensure!(versions_of(&mut host, "a")? == all("v1"), "the last good one stays");
    ensure!(versions_of(&mut host, "b")? == all("v2") && versions_of(&mut host, "c")? == all("v2"));
    let third = poll(&mut host)?;
    let told = report(&mut host)?;
    ensure!(told["revision"] == 3 && told["refused"]["revision"] == 3, "{told}");
    ensure!(told["refused"]["services"] == json!(["a"]), "{told}");
    let error = told["refused"]["errors"][0].as_str().unwrap_or_default();
    ensure!(error.starts_with("services[0].versions[0].weight: -1 is not allowed"), "{told}");
    // Changes of others leave it refused; its own end that.
    send(&mut host, &third, "e1", &json!({"revision": 4, "base": 3, "services": [service("b", "v3")]}))?;
    let fourth = poll(&mut host)?;
    ensure!(versions_of(&mut host, "a")? == all("v1") && versions_of(&mut host, "b")? == all("v3"));
    ensure!(report(&mut host)?["refused"]["services"] == json!(["a"]));
    send(&mut host, &fourth, "e1", &json!({"revision": 5, "base": 4, "services": [service("a", "v3")]}))?;
    ensure!(versions_of(&mut host, "a")? == all("v3"));
    poll(&mut host)?;
    ensure!(report(&mut host)?["refused"].is_null());
    Ok(())
}

#[test]
fn changes_are_asked_for_and_reach_every_worker() -> anyhow::Result<()> {
    let mut host = host()?;
    let first = poll(&mut host)?;
    ensure!(!path(&first).contains("delta"), "what runs is not the controller's: {}", path(&first));
    send(&mut host, &first, "e1", &json!({"revision": 2, "services": [service("a", "v1"), service("b", "v1")]}))?;
    for revision in 3..6 {
        let poll = poll(&mut host)?;
        ensure!(path(&poll).ends_with(&format!("epoch=e1&after={}&delta=true", revision - 1)), "{}", path(&poll));
        let version = format!("v{revision}");
        let changes = json!({"revision": revision, "base": revision - 1, "services": [service("a", &version)]});
        send(&mut host, &poll, "e1", &changes)?;
        ensure!(versions_of(&mut host, "a")? == all(&version) && versions_of(&mut host, "b")? == all("v1"));
    }
    let last = poll(&mut host)?;
    ensure!(report(&mut host)?["revision"] == 5);
    send(
        &mut host,
        &last,
        "e1",
        &json!({"revision": 9, "base": 5, "removed": ["a"], "services": [service("c", "v1")]}),
    )?;
    ensure!(versions_of(&mut host, "a")? == vec![None; WORKERS] && versions_of(&mut host, "c")? == all("v1"));
    // What has been stored for VMs that come later is whole.
    pass(&mut host, 500)?;
    ensure!(report(&mut host)?["revision"] == 9);
    Ok(())
}

#[test]
fn changes_since_another_policy_are_not_taken_and_the_whole_is_asked_for() -> anyhow::Result<()> {
    let mut host = host()?;
    let first = poll(&mut host)?;
    send(&mut host, &first, "e1", &json!({"revision": 2, "services": [service("a", "v1")]}))?;
    let second = poll(&mut host)?;
    send(&mut host, &second, "e1", &json!({"revision": 9, "base": 7, "services": [service("a", "v2")]}))?;
    ensure!(versions_of(&mut host, "a")? == all("v1"));
    pass(&mut host, 1_000)?;
    let third = poll(&mut host)?;
    ensure!(path(&third).ends_with("epoch=e1&after=2"), "{}", path(&third));
    // Also where an epoch has the same revision.
    send(&mut host, &third, "e2", &json!({"revision": 9, "base": 2, "services": [service("a", "v2")]}))?;
    ensure!(versions_of(&mut host, "a")? == all("v1"));
    pass(&mut host, 2_000)?;
    let fourth = poll(&mut host)?;
    send(&mut host, &fourth, "e1", &json!({"revision": 9, "services": [service("a", "v3")]}))?;
    ensure!(versions_of(&mut host, "a")? == all("v3"));
    let fifth = poll(&mut host)?;
    ensure!(path(&fifth).ends_with("after=9&delta=true"), "{}", path(&fifth));
    // A change of which nothing is right is refused as a whole; then the whole is asked for.
    let mut bad = service("a", "v2");
    bad["versions"] = json!([]);
    send(&mut host, &fifth, "e1", &json!({"revision": 10, "base": 9, "services": [bad]}))?;
    pass(&mut host, 1_200)?;
    let sixth = poll(&mut host)?;
    ensure!(path(&sixth).ends_with("after=10"), "{}", path(&sixth));
    let told = report(&mut host)?;
    ensure!(told["revision"] == 9 && told["refused"]["revision"] == 10, "{told}");
    Ok(())
}
