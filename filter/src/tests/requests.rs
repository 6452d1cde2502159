//! Requests get their version and are counted for it.

use super::proxy::{CONTROLLER, Proxy, Response, take_log};
use serde_json::{Value, json};
use std::time::Duration;

fn shop(mut service: Value) -> Value {
    service["name"] = json!("shop");
    if service["versions"].is_null() {
        service["versions"] = json!([{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}]);
    }
    json!({"controller": {"cluster": CONTROLLER}, "revision": 1, "services": [service]})
}

const GET: [(&str, &str); 3] = [(":authority", "shop.example.com"), (":path", "/"), (":method", "GET")];

#[test]
fn requests_are_marked_by_weight_and_counted_by_outcome() {
    let mut proxy = Proxy::with(1, &shop(json!({})));
    let mut on_v2 = 0;
    for n in 0..100 {
        let exchange = proxy.request(1, &GET);
        let is_v2 = exchange.version().as_deref() == Some("v2");
        on_v2 += i64::from(is_v2);
        let status = if is_v2 && n % 2 == 0 { "404" } else { "200" };
        proxy.finish(&exchange, &Response::status(status));
    }
    assert!((9..=11).contains(&on_v2), "{on_v2}");
    let open = proxy.request(1, &GET);
    let version = open.version().unwrap();
    let report = proxy.report();
    let count = |version: &str, outcome: &str| {
        proxy.metric(&[&format!("version=.={version};"), &format!("outcome=.={outcome};")])
    };
    assert_eq!(count("v1", "ok"), 100 - on_v2);
    assert_eq!(count("v2", "ok") + count("v2", "client_error"), on_v2);
    assert_eq!(proxy.metric(&[&format!("version=.={version};"), "in_flight"]), 1);
    let versions = report["services"][0]["versions"].as_array().unwrap();
    let of = |name: &str| versions.iter().find(|of| of["name"] == name).unwrap();
    assert_eq!(
        (of("v1")["ok"].as_i64(), of("v2")["clientError"].as_i64()),
        (Some(100 - on_v2), Some(count("v2", "client_error")))
    );
    assert_eq!(of(&version)["inFlight"], 1);
    assert_eq!(proxy.tick_period(1), Some(Duration::from_millis(100)));
}

#[test]
fn headers_like_ours_do_not_come_from_clients() {
    for strips in [true, false] {
        let mut policy = shop(json!({"versions": [{"name": "v1"}]}));
        policy["stripClientHeaders"] = json!(strips);
        let mut proxy = Proxy::with(1, &policy);
        let forged = [(":authority", "shop.example.com"), ("x-tideshift-version", "v9"), ("x-tideshift-other", "1")];
        let exchange = proxy.request(1, &forged);
        assert_eq!(exchange.version().as_deref(), Some("v1"));
        assert_eq!(exchange.header("x-tideshift-other").is_some(), !strips, "Envoy removes it before the filter");
    }
}

#[test]
fn a_user_keeps_the_version_of_the_cookie() {
    let versions = json!([{"name": "v1"}, {"name": "v2"}]);
    let mut proxy = Proxy::with(2, &shop(json!({"versions": versions, "session": {"type": "Cookie", "name": "s"}})));
    for _ in 0..10 {
        let first = proxy.request(1, &GET);
        let response = proxy.finish(&first, &Response::status("200"));
        let (_, cookie) = response.iter().find(|(name, _)| name == b"set-cookie").expect("a cookie");
        let cookie = cookie.split(|byte| *byte == b';').next().unwrap();
        let mut list: Vec<(&[u8], &[u8])> =
            GET.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        list.push((b"cookie", cookie));
        let second = proxy.request(2, &list);
        assert_eq!(second.version(), first.version(), "also on another worker");
        let response = proxy.finish(&second, &Response::status("200"));
        assert!(!response.iter().any(|(name, _)| name == b"set-cookie"));
    }
}

#[test]
fn grpc_counts_by_the_status_in_its_trailers() {
    let mut proxy = Proxy::with(1, &shop(json!({"versions": [{"name": "v1"}]})));
    let grpc = [(":authority", "shop.example.com"), (":path", "/a.B/C"), ("content-type", "application/grpc")];
    for status in ["0", "5", "14"] {
        let exchange = proxy.request(1, &grpc);
        let response = Response { trailers: vec![("grpc-status", status)], ..Response::status("200") };
        proxy.finish(&exchange, &response);
    }
    proxy.pass(100);
    let count = |outcome: &str| proxy.metric(&[&format!("outcome=.={outcome};")]);
    assert_eq!([count("ok"), count("client_error"), count("error")], [1, 1, 1]);
}

#[test]
fn requests_that_end_at_another_cluster_say_nothing_of_the_version() {
    let mut proxy =
        Proxy::with(1, &shop(json!({"stable": "v1", "versions": [{"name": "v1", "weight": 0}, {"name": "v2"}]})));
    // No cluster answers the second one, as with a direct response.
    for cluster in [None, Some("")] {
        let exchange = proxy.request(1, &GET);
        proxy.finish(
            &exchange,
            &Response { cluster, ..Response::status(if cluster.is_some() { "500" } else { "200" }) },
        );
    }
    proxy.pass(100);
    assert_eq!(proxy.metric(&["tideshift_misrouted_requests_total"]), 1);
    assert_eq!(proxy.metric(&["version=.=v2;", "outcome=.=error;"]), 0);
}

#[test]
fn clients_that_know_the_token_learn_why() {
    let mut policy = shop(json!({"versions": [{"name": "v1"}]}));
    policy["explain"] = json!({"header": "x-why", "token": "secret"});
    let mut proxy = Proxy::with(1, &policy);
    for (token, knows) in [("secret", true), ("guess", false)] {
        let exchange = proxy.request(1, &[(":authority", "shop.example.com"), ("x-why", token)]);
        assert_eq!(exchange.header("x-why"), None, "upstreams do not see the token");
        let response = proxy.finish(&exchange, &Response::status("200"));
        let why = response.iter().find(|(name, _)| name == b"x-why");
        let why = why.map(|(_, why)| String::from_utf8_lossy(why).into_owned());
        assert_eq!(why.is_some_and(|why| why.contains("version=v1; reason=weight")), knows);
    }
    assert!(take_log().iter().all(|line| line.starts_with("INFO")));
}
