//! TrafficShift documents: what is taken, with which defaults, and what is refused in which words.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // Tests say what must hold by unwrapping it.

use serde_json::{Value, json};
use std::time::Duration;
use tideshift_core::session::SessionBy;
use tideshift_core::shift::{Check, PortRef, Quantity, Strategy, TrafficShift, WarmUp};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn document(spec: Value) -> Value {
    json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "checkout"}, "spec": spec})
}

fn spec() -> Value {
    json!({
        "hostnames": ["checkout.example.com"],
        "versions": [
            {"name": "v1", "endpoints": ["127.0.0.1:9001"], "readinessProbe": {"httpGet": {"path": "/health"}}},
            {"name": "v2", "endpoints": ["[::1]:9002", "payments.internal:80"]},
        ],
        "stable": "v1",
    })
}

fn errors(document: &Value) -> Vec<String> {
    let errors = TrafficShift::read(document).map_or_else(|errors| errors.0, |_| Vec::new());
    errors.iter().map(ToString::to_string).collect()
}

/// The errors of the usual document with one field changed; the field is a JSON pointer into `spec`.
fn errors_with(pointer: &str, value: Value) -> Vec<String> {
    let mut spec = spec();
    let (parent, field) = pointer.rsplit_once('/').unwrap_or_default();
    if let Some(parent) = spec.pointer_mut(parent) {
        parent[field] = value;
    }
    errors(&document(spec))
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
    let errors = errors_with("/strategy", json!({"warmUp": {"requests": {"counts": 1}}}));
    assert!(errors[0].starts_with("spec.strategy.warmUp.requests.counts: unknown field; did you mean `count`?"));
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
    let errors = errors_with("/mirror", json!({"version": "v9"}));
    assert!(
        errors[0].starts_with("spec.mirror.version: \"v9\" is not allowed; expected one of the versions"),
        "{errors:?}"
    );
    let errors = errors_with("/guard", json!({"coolDownSeconds": 30, "maxCoolDownSeconds": 20}));
    assert!(errors[0].starts_with("spec.guard.maxCoolDownSeconds: 20 is not allowed"), "{errors:?}");
}

#[test]
fn what_is_wrong_is_named_with_what_is_allowed() {
    for (pointer, value, expected) in [
        ("/stable", json!("v9"), "spec.stable: \"v9\" is not allowed; expected one of the versions v1, v2"),
        ("/target", json!("v9"), "spec.target: \"v9\" is not allowed"),
        ("/versions/1/endpoints", json!({}), "spec.versions[1].endpoints: {} is not allowed; expected a list"),
        ("/versions/1/name", json!("v1"), "spec.versions[1].name: \"v1\" is not allowed"),
        ("/versions/1/name", json!(1), "spec.versions[1].name: 1 is not allowed; expected a version name"),
        ("/versions/0/endpoints", json!(["127.0.0.1"]), "spec.versions[0].endpoints[0]: \"127.0.0.1\" is not allowed"),
        ("/versions/0/endpoints", json!(["127.0.0.1:0"]), "spec.versions[0].endpoints[0]: "),
        ("/versions/0/endpoints", json!(["127.0.0.256:80"]), "spec.versions[0].endpoints[0]: "),
        ("/versions/0/endpoints", json!(["::1:80"]), "spec.versions[0].endpoints[0]: "),
        (
            "/versions/0/endpoints",
            json!(["a:1", "b:1", "A:1"]),
            "spec.versions[0].endpoints[2]: \"a:1\" is not allowed",
        ),
        (
            "/versions/0/readinessProbe",
            json!({}),
            "spec.versions[0].readinessProbe: {} is not allowed; expected exactly",
        ),
        ("/versions/0/readinessProbe", json!({"httpGet": {}, "tcpSocket": {}}), "spec.versions[0].readinessProbe: "),
        (
            "/versions/0/readinessProbe/periodSeconds",
            json!(0),
            "spec.versions[0].readinessProbe.periodSeconds: 0 is not",
        ),
        (
            "/versions/0/readinessProbe",
            json!({"grpc": {"port": 0, "service": "a"}}),
            "spec.versions[0].readinessProbe.grpc.port: 0 is not allowed; expected an integer from 1 to 65535",
        ),
        ("/versions/0/readinessProbe/httpGet/path", json!("health"), "spec.versions[0].readinessProbe.httpGet.path: "),
        (
            "/versions/0/readinessProbe/httpGet/scheme",
            json!("https"),
            "spec.versions[0].readinessProbe.httpGet.scheme: ",
        ),
        (
            "/versions/0/readinessProbe/faliureThreshold",
            json!(3),
            "spec.versions[0].readinessProbe.faliureThreshold: unknown field; did you mean `failureThreshold`?",
        ),
        (
            "/strategy",
            json!({"steps": [{"weight": 101}]}),
            "spec.strategy.steps[0].weight: 101 is not allowed; expected an integer from 0 to 100",
        ),
        ("/strategy", json!({"steps": [{"holdSeconds": 1}]}), "spec.strategy.steps[0].weight: missing"),
        ("/strategy", json!({"steps": []}), "spec.strategy.steps: [] is not allowed; expected at least one step"),
        ("/capacity", json!({"endpointsForFullLoad": 0}), "spec.capacity.endpointsForFullLoad: 0 is not allowed"),
        ("/analysis", json!({"maxErrors": -1}), "spec.analysis.maxErrors: -1 is not allowed"),
        ("/rules", json!([{"versions": [{"name": "v3"}]}]), "spec.rules[0].versions[0].name: \"v3\" is not allowed"),
        ("/hostnames", json!("a.example.com"), "spec.hostnames: \"a.example.com\" is not allowed; expected a list"),
        ("/stabel", json!("v1"), "spec.stabel: unknown field; did you mean `stable`?"),
    ] {
        let errors = errors_with(pointer, value.clone());
        assert_eq!(errors.len(), 1, "{pointer} = {value}: {errors:#?}");
        assert!(errors[0].starts_with(expected), "{}\nshould start with\n{expected}", errors[0]);
    }
}

#[test]
fn errors_of_all_parts_are_told_at_once() {
    let document = json!({
        "apiVersion": "tideshift.dev/v1", "kind": "Shift", "metadata": {"name": "Checkout", "labels": {"a": 1}},
        "spec": {"versions": [{"name": "v1", "endpoints": ["x"]}], "target": "v2", "drain": 5}, "status": {},
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
            "status",
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
    assert_eq!((strategy.max_surge, strategy.max_unavailable), (Quantity::Percent(25), Quantity::Count(2)));
    let of = |whole| (Quantity::Percent(25).of_rounded_up(whole), Quantity::Percent(25).of_rounded_down(whole));
    assert_eq!([of(0), of(1), of(4), of(5)], [(0, 0), (1, 0), (1, 1), (2, 1)]);
    assert_eq!(Quantity::Percent(1_000).of_rounded_up(u32::MAX), u32::MAX);
    assert_eq!(Quantity::Count(3).of_rounded_up(1), 3);
}

#[test]
fn strategies_that_make_no_sense_are_refused() {
    for (value, expected) in [
        (
            json!({"maxSurge": 0, "maxUnavailable": "0%"}),
            "spec.strategy.maxUnavailable: 0 is not allowed; expected above 0",
        ),
        (json!({"maxSurge": "25"}), "spec.strategy.maxSurge: \"25\" is not allowed; expected a number such as 1"),
        (json!({"maxSurge": "+25%"}), "spec.strategy.maxSurge: \"+25%\" is not allowed"),
        (json!({"maxUnavailable": -1}), "spec.strategy.maxUnavailable: -1 is not allowed"),
        (
            json!({"minReadySeconds": 600}),
            "spec.strategy.progressDeadlineSeconds: 600 is not allowed; expected more than",
        ),
        (json!({"steps": [{"weight": 1}], "blueGreen": {}}), "spec.strategy: "),
        (json!({"steps": [{"pause": "yes"}]}), "spec.strategy.steps[0].pause: \"yes\" is not allowed"),
        (json!({"steps": [{"holdSeconds": 1}]}), "spec.strategy.steps[0].weight: missing"),
        (json!({"warmUp": {"mirrorPercent": 0}}), "spec.strategy.warmUp.mirrorPercent: 0 is not allowed"),
    ] {
        let errors = errors_with("/strategy", value.clone());
        assert!(errors.iter().any(|error| error.starts_with(expected)), "{value}: {errors:?}");
    }
}

#[test]
fn many_services_may_share_one_rollout() {
    let service = |name: &str| {
        json!({"name": name, "hostnames": [format!("{name}.example.com")], "capacity": {"endpointsForFullLoad": 3},
            "versions": [{"name": "old", "endpoints": ["127.0.0.1:1"]}, {"name": "new"}]})
    };
    let spec = json!({"services": [service("cart"), service("search")], "stable": "old", "target": "new"});
    let shift = TrafficShift::read(&document(spec.clone())).unwrap();
    let names: Vec<_> = shift.services.iter().map(|service| service.name.as_str()).collect();
    assert_eq!((names, shift.versions().collect::<Vec<_>>()), (vec!["cart", "search"], vec!["old", "new"]));
    assert_eq!(shift.services[1].endpoints_for_full_load, Some(3));
    for (pointer, value, expected) in [
        ("/services/1/name", json!("cart"), "spec.services[1].name: \"cart\" is not allowed"),
        (
            "/services/1/versions",
            json!([{"name": "old"}]),
            "spec.services[1].versions: [\"old\"] is not allowed; expected the versions",
        ),
        ("/services", json!([]), "spec.services: [] is not allowed; expected at least one service"),
        ("/versions", json!([]), "spec.versions: unknown field"),
        ("/target", json!("newer"), "spec.target: \"newer\" is not allowed; expected one of the versions old, new"),
    ] {
        let mut spec = spec.clone();
        let (parent, field) = pointer.rsplit_once('/').unwrap_or_default();
        spec.pointer_mut(parent).unwrap()[field] = value;
        let errors = errors(&document(spec));
        assert!(errors.iter().any(|error| error.starts_with(expected)), "{pointer}: {errors:?}");
    }
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

#[test]
fn a_place_in_kubernetes_that_makes_no_sense_is_refused() {
    let version = |further: Value| {
        let mut version = json!({"name": "v1"});
        version.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        errors_with("/versions", json!([version]))
    };
    for (further, expected) in [
        (json!({"service": "s", "endpoints": ["a:1"]}), "expected either endpoints or, in Kubernetes, service and"),
        (json!({"port": 80}), "expected service or selector beside port"),
        (json!({"selector": {}}), "versions[0].selector: {} is not allowed; expected at least one of matchLabels"),
        (json!({"selector": {"matchLabels": {"a": 1}}}), "selector.matchLabels.a: 1 is not allowed; expected a string"),
        (json!({"service": "s", "port": "a.b"}), "versions[0].port: \"a.b\" is not allowed; expected a port's name"),
        (json!({"service": "s", "port": 0}), "versions[0].port: 0 is not allowed"),
        (
            json!({"selector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}),
            "expected values with the operators In and NotIn, and none with Exists",
        ),
        (
            json!({"workloadRef": {"kind": "deployment", "name": "a"}}),
            "workloadRef.kind: \"deployment\" is not allowed",
        ),
        (json!({"workloadRef": {}}), "workloadRef.name: missing; expected a workload's name"),
    ] {
        let errors = version(further);
        assert!(errors.len() == 1 && errors[0].contains(expected), "{errors:?}");
    }
}
