//! One VM leads; another takes over when it stands still. What VMs change together is right in whichever order they do.

use super::proxy::{CONTROLLER, Proxy, Response};
use serde_json::{Value, json};
use std::cell::Cell;
use std::rc::Rc;

fn configuration() -> Value {
    let services = json!([{"name": "checkout", "versions": [{"name": "v1"}]}]);
    json!({"controller": {"cluster": CONTROLLER}, "revision": 1, "services": services})
}

/// Serves so many requests on a worker.
fn serve(proxy: &mut Proxy, vm: usize, requests: usize) {
    for _ in 0..requests {
        let exchange = proxy.request(vm, &[(":authority", "a.test")]);
        proxy.finish(&exchange, &Response::status("200"));
    }
}

fn ok(report: &Value) -> &Value {
    &report["services"][0]["versions"][0]["ok"]
}

#[test]
fn another_vm_leads_when_the_first_stands_still() {
    let mut proxy = Proxy::with(1, &configuration());
    serve(&mut proxy, 1, 3);
    let leader = proxy.poll().vm;
    assert_eq!(*ok(&proxy.report()), 3);
    let other = 1 - leader;
    proxy.dead.push(leader);
    proxy.pass(1_500);
    assert!(proxy.take_calls().is_empty(), "the lease is not over yet");
    proxy.pass(1_000);
    let calls = proxy.take_calls();
    assert!(!calls.is_empty() && calls.iter().all(|call| call.vm == other), "{calls:?}");
    let poll = calls.iter().find(|call| call.path.starts_with("/v1/policy")).expect("it polls, too");
    proxy.send(poll, "e1", &json!({"revision": 2, "services": [{"name": "checkout", "versions": [{"name": "v2"}]}]}));
    assert_eq!(proxy.request(other, &[(":authority", "a.test")]).version().as_deref(), Some("v2"));
    // The first one comes back: it takes the policy, and the lease stays where it is.
    proxy.dead.clear();
    proxy.pass(2_000);
    assert_eq!(proxy.request(leader, &[(":authority", "a.test")]).version().as_deref(), Some("v2"));
    assert!(proxy.take_calls().iter().all(|call| call.vm == other));
}

/// Two VMs find that the lease is over at the same moment.
#[test]
fn of_two_that_want_the_lease_one_gets_it() {
    let mut proxy = Proxy::with(2, &configuration());
    let leader = proxy.poll().vm;
    let others: Vec<usize> = (0..3).filter(|vm| *vm != leader).collect();
    proxy.dead = vec![0, 1, 2];
    proxy.pass(3_000);
    proxy.take_calls();
    proxy.dead = vec![leader];
    let second = proxy.threads[others[1]].clone();
    proxy.before_write("/lease", move || second.tick());
    proxy.threads[others[0]].tick();
    assert!(proxy.has_raced());
    let leaders: Vec<usize> = proxy.take_calls().iter().map(|call| call.vm).collect();
    assert!(!leaders.is_empty() && leaders.iter().all(|vm| *vm == others[1]), "{leaders:?}");
}

#[test]
fn all_join_and_are_numbered_in_spite_of_conflicts() {
    for key in ["/next-worker", "/workers"] {
        let mut proxy = Proxy::new(2);
        assert!(proxy.configure(&configuration()));
        let other = proxy.threads[2].clone();
        proxy.before_write(key, move || other.tick());
        proxy.pass(500);
        assert!(proxy.has_raced());
        serve(&mut proxy, 1, 2);
        serve(&mut proxy, 2, 3);
        let report = proxy.report();
        assert_eq!((&report["workers"], ok(&report)), (&json!(3), &json!(5)), "{key}");
    }
}

/// A greater number never goes with smaller counts, so a VM that finds its number taken does not report.
#[test]
fn a_report_whose_number_is_taken_is_not_sent() {
    let mut proxy = Proxy::with(1, &configuration());
    proxy.report();
    let (other, taken) = (proxy.threads[0].clone(), Rc::new(Cell::new(0)));
    let number = taken.clone();
    proxy.before_write("/reports", move || number.set(other.take_report_number()));
    let next = proxy.report();
    assert!(proxy.has_raced());
    assert!(next["sequence"].as_u64() > Some(taken.get()));
    assert!(proxy.reports.iter().all(|report| report["sequence"] != taken.get()), "{:?}", proxy.reports);
}

/// Two VMs leave at once; what they counted is taken over, each once.
#[test]
fn counts_of_vms_that_leave_at_once_are_kept() {
    let mut proxy = Proxy::with(2, &configuration());
    serve(&mut proxy, 1, 4);
    serve(&mut proxy, 2, 5);
    proxy.pass(200);
    let second = proxy.threads[2].clone();
    proxy.before_write("/retired", move || second.done());
    proxy.threads[1].done();
    assert!(proxy.has_raced());
    proxy.dead = vec![1, 2];
    proxy.pass(3_000);
    let report = proxy.report();
    assert_eq!((&report["workers"], ok(&report)), (&json!(1), &json!(9)));
}

/// A VM that stands still for long is taken for gone; when it goes on nothing is counted twice.
#[test]
fn counts_of_a_vm_that_was_taken_for_gone_are_counted_once() {
    let mut proxy = Proxy::with(2, &configuration());
    serve(&mut proxy, 1, 4);
    serve(&mut proxy, 2, 5);
    assert_eq!(*ok(&proxy.report()), 9);
    proxy.dead = vec![2];
    proxy.pass(12_000);
    assert_eq!(*ok(&proxy.report()), 9);
    proxy.dead.clear();
    proxy.pass(500);
    serve(&mut proxy, 2, 1);
    assert_eq!(*ok(&proxy.report()), 10);
}

/// A configuration that takes another's place in the same VMs counts on.
#[test]
fn counts_go_on_with_a_new_configuration() {
    let mut proxy = Proxy::with(1, &configuration());
    serve(&mut proxy, 1, 4);
    assert_eq!(*ok(&proxy.report()), 4);
    let mut next = configuration();
    next["revision"] = json!(2);
    assert!(proxy.configure(&next));
    proxy.pass(500);
    serve(&mut proxy, 1, 2);
    let report = proxy.report();
    assert_eq!((&report["workers"], ok(&report), &report["revision"]), (&json!(2), &json!(6), &json!(2)));
}
