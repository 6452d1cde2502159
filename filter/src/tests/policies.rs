//! Policies come from the controller, on one VM, and reach all others; what is wrong with one is refused and reported.

use super::proxy::{CONTROLLER, Proxy, take_log};
use serde_json::{Value, json};

fn policy(revision: u64, version: &str) -> Value {
    json!({"revision": revision, "services": [{"name": "checkout", "versions": [{"name": version}]}]})
}

/// A proxy with a policy of its own, of revision 1, for v1.
fn proxy(workers: usize) -> Proxy {
    let mut policy = policy(1, "v1");
    policy["controller"] = json!({"cluster": CONTROLLER, "authority": "c", "token": "secret"});
    Proxy::with(workers, &policy)
}

#[test]
fn one_vm_polls_and_every_vm_gets_the_policy_at_once() {
    let mut proxy = proxy(3);
    let poll = proxy.poll();
    assert_eq!(poll.path, "/v1/policy?proxy=envoy%201&epoch=&after=1");
    assert!(poll.headers.contains(&("authorization".to_owned(), "Bearer secret".to_owned())));
    proxy.send(&poll, "e1", &policy(7, "v2"));
    // No time has passed: the queues woke the others.
    assert_eq!(proxy.versions(), ["v2"; 3]);
    assert!(proxy.poll().path.ends_with("epoch=e1&after=7&delta=true"));
    let report = proxy.report();
    assert_eq!((&report["revision"], &report["epoch"], &report["workers"]), (&json!(7), &json!("e1"), &json!(4)));
}

#[test]
fn changes_are_applied_to_the_policy_that_runs() {
    let mut proxy = proxy(2);
    let poll = proxy.poll();
    let services = json!([{"name": "checkout", "hostnames": ["a.test"], "versions": [{"name": "v2"}]},
        {"name": "search", "hostnames": ["b.test"], "versions": [{"name": "v2"}]}]);
    proxy.send(&poll, "e1", &json!({"revision": 2, "services": services}));
    let poll = proxy.poll();
    let changed = json!([{"name": "search", "hostnames": ["b.test"], "versions": [{"name": "v3"}]}]);
    proxy.send(&poll, "e1", &json!({"revision": 3, "base": 2, "services": changed}));
    for vm in [1, 2] {
        let version = |proxy: &mut Proxy, host| proxy.request(vm, &[(":authority", host)]).version();
        assert_eq!(version(&mut proxy, "a.test").as_deref(), Some("v2"));
        assert_eq!(version(&mut proxy, "b.test").as_deref(), Some("v3"));
    }
    // Changes since another revision: the whole is asked for.
    let poll = proxy.poll();
    proxy.send(&poll, "e1", &json!({"revision": 9, "base": 8, "services": []}));
    proxy.pass(1_000);
    assert!(proxy.poll().path.ends_with("epoch=e1&after=3"));
}

#[test]
fn a_refused_policy_changes_nothing_and_is_reported() {
    let mut proxy = proxy(2);
    let poll = proxy.poll();
    let mut bad = policy(8, "v2");
    bad["services"][0]["versions"][0]["weight"] = json!(-1);
    proxy.send(&poll, "e1", &bad);
    assert_eq!(proxy.versions(), ["v1"; 2]);
    assert!(proxy.take_polls().is_empty(), "it is not asked for again at once");
    let log = take_log();
    assert!(log.iter().any(|line| line.starts_with("ERROR refused a policy from the controller")), "{log:?}");
    let report = proxy.report();
    assert_eq!((&report["refused"]["revision"], &report["revision"]), (&json!(8), &json!(1)));
    let errors = report["refused"]["errors"].to_string();
    assert!(errors.contains("services[0].versions[0].weight: -1 is not allowed"), "{errors}");
    // Mended, it is taken.
    let poll = proxy.poll();
    proxy.send(&poll, "e1", &policy(9, "v3"));
    assert_eq!(proxy.versions(), ["v3"; 2]);
    assert!(proxy.report().get("refused").is_none());
}

#[test]
fn a_service_that_is_wrong_stays_as_it_was_and_the_others_are_taken() {
    let mut proxy = proxy(1);
    let poll = proxy.poll();
    let services = json!([{"name": "checkout", "hostnames": ["a.test"], "versions": [{"name": "v2"}]},
        {"name": "search", "hostnames": ["b.test"], "versions": [{"name": "v2"}]}]);
    proxy.send(&poll, "e1", &json!({"revision": 2, "services": services}));
    let poll = proxy.poll();
    let mut services = services;
    services[0]["versions"][0]["name"] = json!("v3");
    services[1]["versions"] = json!([]);
    proxy.send(&poll, "e1", &json!({"revision": 3, "services": services}));
    assert_eq!(proxy.request(1, &[(":authority", "a.test")]).version().as_deref(), Some("v3"));
    assert_eq!(proxy.request(1, &[(":authority", "b.test")]).version().as_deref(), Some("v2"));
    assert_eq!(proxy.report()["refused"]["services"], json!(["search"]));
}

#[test]
fn a_configuration_that_is_refused_leaves_the_last_one_in_force() {
    let mut proxy = proxy(1);
    assert!(!proxy.configure(&json!({"revision": 2, "services": [{"name": 1}]})));
    assert!(!proxy.configure(&json!("nonsense")));
    assert_eq!(proxy.versions(), ["v1"]);
}

#[test]
fn a_controller_that_is_gone_changes_nothing_and_is_asked_less_and_less_often() {
    let mut proxy = proxy(1);
    let mut polls = 0;
    for n in 0..60 {
        for poll in proxy.take_polls() {
            polls += 1;
            match n % 3 {
                0 => proxy.respond(&poll, &[], b""),
                1 => proxy.respond(&poll, &[(":status", "503")], b""),
                _ => proxy.respond(&poll, &[(":status", "200"), ("x-tideshift-epoch", "e")], b"{"),
            }
        }
        proxy.pass(1_000);
    }
    assert!((10..30).contains(&polls), "{polls}");
    assert_eq!(proxy.versions(), ["v1"]);
    assert_eq!(take_log().iter().filter(|line| line.contains("no policy from the controller")).count(), 1);
}
