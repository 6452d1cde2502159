//! TrafficShift documents: what is taken, with which defaults, and what is refused in which words.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // Tests say what must hold by unwrapping it.

mod documents;

use documents::{document, spec};
use serde_json::{Value, json};
use std::time::Duration;
use tideshift_core::session::SessionBy;
use tideshift_core::shift::probe::Check;
use tideshift_core::shift::{IntOrPercent, PortRef, Strategy, TrafficShift, WarmUp};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn errors(document: &Value) -> Vec<String> {
    let errors = TrafficShift::read(document).map_or_else(|errors| errors.0, |_| Vec::new());
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn what_is_left_out_has_kubernetes_defaults() {
    let shift = TrafficShift::read(&document(spec())).unwrap();
    let probe = shift.services[0].versions[0].readiness_probe.clone().unwrap();
    assert_eq!((probe.period, probe.timeout), (Duration::from_secs(10), Duration::from_secs(1)));
    assert_eq!((probe.initial_delay, probe.success_threshold, probe.failure_threshold), (Duration::ZERO, 1, 3));
    assert!(matches!(probe.check, Check::HttpGet(get) if get.path == "/health" && !get.https && get.port.is_none()));
    assert_eq!((shift.target, shift.strategy), (None, Strategy::default()));
    assert_eq!(shift.services[0].versions[1].endpoints[0].to_string(), "[::1]:9002");
}

#[test]
fn probes_are_read_whole() {
    let mut spec = spec();
    spec["versions"][0]["readinessProbe"] = json!({
        "exec": {"command": ["check", "--fast"]}, "initialDelaySeconds": 5, "periodMillis": 50, "timeoutSeconds": 2,
        "successThreshold": 2, "failureThreshold": 1,
    });
    let probe = TrafficShift::read(&document(spec)).unwrap().services[0].versions[0].readiness_probe.clone().unwrap();
    assert_eq!(probe.check, Check::Exec { command: vec!["check".to_owned(), "--fast".to_owned()] });
    assert_eq!((probe.initial_delay, probe.period), (Duration::from_secs(5), Duration::from_millis(50)));
    assert_eq!((probe.success_threshold, probe.failure_threshold), (2, 1));
    for (grpc, port, service) in
        [(json!({}), None, ""), (json!({"port": 50051, "service": "shop.Cart"}), Some(50051), "shop.Cart")]
    {
        let mut with_grpc = document(self::spec());
        with_grpc["spec"]["versions"][0]["readinessProbe"] = json!({"grpc": grpc});
        let probe = TrafficShift::read(&with_grpc).unwrap().services[0].versions[0].readiness_probe.clone().unwrap();
        assert_eq!(probe.check, Check::Grpc { port, service: service.to_owned() });
    }
}

#[test]
fn warm_up_is_part_of_the_strategy() {
    let mut spec = spec();
    assert_eq!(TrafficShift::read(&document(spec.clone())).unwrap().strategy.warm_up, WarmUp::default());
    spec["strategy"] = json!({"warmUp": {"seconds": 30, "mirrorPercent": 5, "requests": {"count": 50}}});
    let warm_up = TrafficShift::read(&document(spec)).unwrap().strategy.warm_up;
    assert_eq!((warm_up.seconds, warm_up.mirror_percent), (Duration::from_secs(30), Some(5)));
    assert_eq!(warm_up.requests.map(|requests| requests.count), Some(50));
}

#[test]
fn sessions_mirrors_and_the_guard_are_read_as_policies_have_them() {
    let mut spec = spec();
    spec["session"] = json!({"type": "Header", "name": "X-User-Id"});
    spec["mirror"] = json!({"version": "v2", "percent": 5});
    spec["guard"] = json!({"coolDownSeconds": 30});
    let shift = TrafficShift::read(&document(spec)).unwrap().services.remove(0);
    assert_eq!(shift.session.unwrap().by, SessionBy::Header { name: "x-user-id".to_owned() });
    assert_eq!(shift.mirror.map(|mirror| (mirror.version, mirror.percent)), Some(("v2".to_owned(), 5)));
    assert_eq!(shift.guard.cool_down, Duration::from_secs(30));
}

#[test]
fn what_is_right_is_taken() {
    for document in documents::taken() {
        assert_eq!(errors(&document), [""; 0], "{document}");
    }
}

#[test]
fn what_is_wrong_is_named_with_what_is_allowed() {
    for refused in documents::refused() {
        let errors = errors(&refused.document);
        let said = errors.iter().any(|error| error.contains(refused.error));
        assert!(said, "{}\nshould say\n{}\nand says\n{errors:#?}", refused.document, refused.error);
    }
}

#[test]
fn what_kubernetes_adds_is_left_alone() {
    let mut document = document(spec());
    let plain = TrafficShift::read(&document).unwrap();
    document["metadata"] = json!({
        "name": "checkout", "labels": {"app": "checkout"}, "annotations": {}, "creationTimestamp": "2026-11-22T15:13:54Z",
        "finalizers": ["a.example.com/b"], "generation": 3, "managedFields": [{"manager": "kubectl"}],
        "ownerReferences": [{"kind": "A"}], "resourceVersion": "496", "uid": "2b316f6a-c96c-460c-8cf0-0739f0ec64e9",
    });
    document["status"] = json!({"phase": "Progressing", "observedGeneration": 3});
    assert_eq!(TrafficShift::read(&document), Ok(plain));
    document["metadata"]["generations"] = json!(3);
    let errors = errors(&document);
    assert!(errors[0].starts_with("metadata.generations: unknown field; did you mean `generation`?"), "{errors:?}");
}

#[test]
fn errors_of_all_parts_are_told_at_once() {
    let document = json!({
        "apiVersion": "tideshift.dev/v1", "kind": "Shift", "metadata": {"name": "Checkout", "labels": {"a": 1}},
        "spec": {"versions": [{"name": "v1", "endpoints": ["x"]}], "target": "v2", "drain": 5}, "sepc": {},
    });
    let places: Vec<String> =
        errors(&document).iter().map(|e| e.split(": ").next().unwrap_or_default().to_owned()).collect();
    assert_eq!(
        places,
        [
            "apiVersion",
            "kind",
            "metadata.name",
            "metadata.labels",
            "spec.versions[0].endpoints[0]",
            "spec.stable",
            "spec.target",
            "spec.drain",
            "sepc",
        ]
    );
    assert_eq!(errors(&json!([])), ["[] is not allowed; expected an object"]);
}

fn strategy(strategy: Value) -> Strategy {
    let mut spec = spec();
    spec["strategy"] = strategy;
    TrafficShift::read(&document(spec)).unwrap().strategy
}

#[test]
fn steps_keep_what_they_do_not_say() {
    let steps = strategy(json!({"steps": [
        {"matches": [{"headers": [{"name": "x-beta", "value": "1"}]}]}, {"weight": 5, "holdSeconds": 30},
        {"pause": true}, {"matches": [], "weight": 50}, {"weight": 100, "pause": true},
    ]}))
    .steps;
    let said: Vec<_> =
        steps.iter().map(|step| (step.weight, step.hold.as_secs(), step.pause, step.matches.len())).collect();
    let all = (100, 0, false, 0);
    assert_eq!(said, [(0, 0, false, 1), (5, 30, false, 1), (5, 0, true, 1), (50, 0, false, 0), (100, 0, true, 0), all]);
}

#[test]
fn blue_green_is_a_preview_and_then_everything() {
    let said = |spec: Value| {
        let strategy = strategy(json!({"blueGreen": spec}));
        assert!(strategy.whole_steps);
        let steps = strategy.steps.into_iter();
        steps.map(|step| (step.weight, step.hold.as_secs(), step.pause, step.matches.len())).collect::<Vec<_>>()
    };
    assert_eq!(said(json!({})), [(100, 0, false, 0)]);
    assert_eq!(said(json!({"autoPromotionSeconds": 9})), [(0, 9, false, 0), (100, 0, false, 0)]);
    let preview = json!({"autoPromotionEnabled": false, "previewMatches": [{"cookies": [{"name": "a", "value": "b"}]}], "holdSeconds": 5});
    assert_eq!(said(preview), [(0, 0, true, 1), (100, 5, false, 0)]);
}

#[test]
fn quantities_are_rounded_as_in_kubernetes() {
    let strategy = strategy(json!({"maxSurge": "25%", "maxUnavailable": 2}));
    assert_eq!((strategy.max_surge, strategy.max_unavailable), (IntOrPercent::Percent(25), IntOrPercent::Count(2)));
    let of = |whole| (IntOrPercent::Percent(25).of_rounded_up(whole), IntOrPercent::Percent(25).of_rounded_down(whole));
    assert_eq!([of(0), of(1), of(4), of(5)], [(0, 0), (1, 0), (1, 1), (2, 1)]);
    assert_eq!(IntOrPercent::Percent(1_000).of_rounded_up(u32::MAX), u32::MAX);
    assert_eq!(IntOrPercent::Count(3).of_rounded_up(1), 3);
}

#[test]
fn a_service_says_how_long_its_requests_may_take() {
    let timeout = |fields: Value| {
        let mut spec = spec();
        spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        TrafficShift::read(&document(spec)).unwrap().services[0].timeout
    };
    assert_eq!(timeout(json!({})), None);
    assert_eq!(timeout(json!({"timeoutSeconds": 0})), Some(Duration::ZERO));
    assert_eq!(timeout(json!({"timeoutSeconds": 60})), Some(Duration::from_secs(60)));
}

#[test]
fn many_services_may_share_one_rollout() {
    let shift = TrafficShift::read(&document(documents::services())).unwrap();
    let names: Vec<_> = shift.services.iter().map(|service| service.name.as_str()).collect();
    assert_eq!((names, shift.versions().collect::<Vec<_>>()), (vec!["cart", "search"], vec!["old", "new"]));
    assert_eq!(shift.services[1].endpoints_for_full_load, Some(3));
}

#[test]
fn in_kubernetes_endpoints_are_found_by_service_and_labels() {
    let mut spec = spec();
    spec["versions"][0] = json!({
        "name": "v1", "service": "payment", "port": "http", "cluster": "west",
        "selector": {
            "matchLabels": {"app": "payment"},
            "matchExpressions": [
                {"key": "track", "operator": "In", "values": ["stable", "old"]},
                {"key": "canary", "operator": "DoesNotExist"},
            ],
        },
        "workloadRef": {"name": "payment-v1"},
    });
    let mut document = document(spec);
    document["metadata"]["namespace"] = json!("shop");
    let shift = TrafficShift::read(&document).unwrap();
    let version = &shift.services[0].versions[0];
    let workload = version.workload.as_ref().unwrap();
    assert_eq!((workload.api_version.as_str(), workload.kind.as_str()), ("apps/v1", "Deployment"));
    let discovery = version.discovery.as_ref().unwrap();
    assert_eq!((discovery.service.as_deref(), version.cluster.as_deref()), (Some("payment"), Some("west")));
    assert_eq!(discovery.port, Some(PortRef::Name("http".to_owned())));
    let selector = discovery.selector.as_ref().unwrap();
    let selects = |labels: &[(&str, &str)]| {
        selector.selects(&labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    };
    assert!(selects(&[("app", "payment"), ("track", "old")]));
    assert!(!selects(&[("app", "payment")]) && !selects(&[("track", "old")]));
    assert!(!selects(&[("app", "payment"), ("track", "old"), ("canary", "")]));
    let shift = shift.qualified();
    assert_eq!((shift.name.as_str(), shift.services[0].name.as_str()), ("checkout.shop", "checkout.shop"));
}
