//! The VM that leads takes a failing version out of service, on every VM.

use super::proxy::{CONTROLLER, Proxy, Response, take_log};
use serde_json::json;

/// Thirty requests to each worker, of which v2 fails its own; how many those were, by worker.
fn serve(proxy: &mut Proxy, status_of_v2: &'static str) -> Vec<usize> {
    let mut on_v2 = vec![0; proxy.threads.len() - 1];
    for request in 0..30 * on_v2.len() {
        let vm = 1 + request % on_v2.len();
        let exchange = proxy.request(vm, &[(":authority", "a.test")]);
        let is_v2 = exchange.version().as_deref() == Some("v2");
        on_v2[vm - 1] += usize::from(is_v2);
        proxy.finish(&exchange, &Response::status(if is_v2 { status_of_v2 } else { "200" }));
    }
    on_v2
}

#[test]
fn a_veto_reaches_every_vm_and_ends_on_every_vm() {
    let services = json!([{
        "name": "checkout",
        "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}],
        "guard": {"coolDownSeconds": 2},
    }]);
    let mut proxy =
        Proxy::with(3, &json!({"controller": {"cluster": CONTROLLER}, "revision": 1, "services": services}));
    let mut looks = 0;
    while !take_log().iter().any(|line| line.contains("guard: v2 of checkout is out of service")) {
        looks += 1;
        assert!(looks < 30, "no veto");
        serve(&mut proxy, "500");
        proxy.pass(100);
    }
    assert_eq!(serve(&mut proxy, "500"), [0; 3], "no tick later than the veto");
    let report = proxy.report();
    assert_eq!(report["services"][0]["vetoes"][0]["version"], "v2");
    let vetoes = String::from_utf8(proxy.shared("/vetoes").unwrap()).unwrap();
    assert!(vetoes.starts_with("vetoes\ncheckout v2 1 "), "{vetoes}");
    proxy.pass(1_500);
    let on_v2 = serve(&mut proxy, "200");
    assert!(on_v2.iter().all(|requests| *requests > 0), "{on_v2:?}");
    assert!(take_log().iter().any(|line| line.contains("guard: v2 of checkout is back in service")));
}

/// The VM that led stands still while a veto is in force: the next one ends it.
#[test]
fn a_veto_does_not_outlive_the_vm_that_led() {
    let services = json!([{
        "name": "checkout",
        "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}],
        "guard": {"coolDownSeconds": 1},
    }]);
    let mut proxy =
        Proxy::with(2, &json!({"controller": {"cluster": CONTROLLER}, "revision": 1, "services": services}));
    let leader = proxy.poll().vm;
    for _ in 0..30 {
        serve(&mut proxy, "500");
        proxy.pass(100);
        if take_log().iter().any(|line| line.contains("out of service")) {
            break;
        }
    }
    proxy.dead.push(leader);
    proxy.pass(3_000);
    assert!(
        take_log().iter().any(|line| line.contains("back in service"))
            || serve(&mut proxy, "200").iter().all(|n| *n > 0)
    );
    let on_v2 = serve(&mut proxy, "200");
    assert!(on_v2.iter().all(|requests| *requests > 0), "{on_v2:?}");
}
