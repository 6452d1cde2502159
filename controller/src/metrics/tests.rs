use super::*;
use crate::rollout::{Reason, Transition};
use serde_json::{Value, json};

fn version(name: &str, weight: f64, drain: &str) -> Value {
    json!({
        "name": name, "weight": weight, "serving": weight > 0.0, "endpoints": {"ready": 1, "listed": 2},
        "requests": {"ok": 360, "error": 7, "clientError": 2, "cancelled": 1}, "inFlight": 3,
        "drain": {"state": drain, "inFlight": 3, "message": ""},
    })
}

fn service(name: &str, rollout: &str) -> Value {
    json!({
        "name": name, "rollout": rollout, "phase": "Initialized", "reason": "Serving", "stable": "v1",
        "message": "", "since": "2026-11-22T10:00:00Z", "unrouted": 4, "versions": [version("v1", 100.0, "Serving")],
    })
}

/// A rollout of two services under way, and one at rest.
fn status() -> Status {
    let half_way = |name| {
        let mut service = service(name, "checkout");
        service["phase"] = json!("Progressing");
        service["reason"] = json!("WaitingForCapacity");
        service["target"] = json!("v2");
        let step = |weight| json!({"weight": weight, "holdSeconds": 30, "pause": false, "matches": 0});
        service["steps"] = json!([step(1), step(25), step(100)]);
        service["step"] = json!({"number": 2, "of": 3, "weight": 25, "holdSeconds": 30, "heldSeconds": 12});
        service["deadline"] = json!("2026-11-22T10:10:00.5Z");
        service["verdict"] = json!({
            "outcome": "undecided", "message": "", "target": {"requests": 41, "errors": 7},
            "stable": {"requests": 366, "errors": 1}, "evidence": 230.5, "bound": 1000.0, "passEvidence": 3.1,
            "passBound": 20.0, "latency": {"message": "", "evidence": 0.4, "bound": 1000.0},
        });
        service["versions"] =
            json!([version("v1", 87.5, "Serving"), version("v2", 12.5, "Serving"), version("v0", 0.0, "Draining")]);
        service
    };
    let proxy = |id: &str, revision: u64, vetoes: Value| json!({"id": id, "revision": revision, "workers": 2, "lastSeen": "2026-11-22T10:00:00Z", "vetoes": vetoes});
    let veto = json!([{"service": "cart", "version": "v2", "until": "2026-11-22T10:00:30Z", "requests": 9, "errors": 9,
        "othersRequests": 100, "othersErrors": 0}]);
    let mut refusing = proxy("c", 5, json!([]));
    refusing["refused"] = json!({"revision": 6, "errors": ["services[0].name: is missing"]});
    let status = json!({
        "epoch": "e", "revision": 6, "documentErrors": ["one"],
        "services": [half_way("cart"), half_way("pay"), service("search", "search")],
        "proxies": [proxy("a", 6, veto.clone()), proxy("b", 6, veto), refusing],
    });
    serde_json::from_value(status).unwrap()
}

#[test]
fn a_status_becomes_metrics() {
    let mut registry = Registry::with_prefix("tideshift_controller");
    registry.register_collector(Box::new(status()));
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    insta::assert_snapshot!(text);
}

#[test]
fn what_was_done_is_counted() {
    let done = ControllerMetrics::default();
    let before = text(status(), &done);
    let has = |text: &str, line: &str| text.lines().any(|found| found == format!("tideshift_controller_{line}"));
    assert!(
        has(&before, "last_report_timestamp_seconds 0.0") && has(&before, "state_write_errors_total 0"),
        "{before}"
    );
    assert!(has(&before, "rollout_changes_total{rollout=\"checkout\"} 0"), "{before}");
    let transition = Transition {
        by: None,
        left_out: 0,
        time: 1,
        rollout: 1,
        phase: Phase::Failed,
        reason: Reason::GuardVeto,
        message: String::new(),
        step: None,
        from: None,
        target: None,
    };
    done.changed("checkout", &transition);
    done.answered("/v1/reports", 204);
    done.answered("/v1/reports", 204);
    done.took_report(1_700_000_000_500);
    done.published();
    done.leads(true);
    done.wrote(true);
    done.wrote(false);
    let after = text(status(), &done);
    for line in [
        "rollout_transitions_total{rollout=\"checkout\",phase=\"Failed\",reason=\"GuardVeto\"} 1",
        "rollout_changes_total{rollout=\"checkout\"} 1",
        "rollout_changes_total{rollout=\"search\"} 0",
        "http_requests_total{path=\"/v1/reports\",code=\"204\"} 2",
        "last_report_timestamp_seconds 1700000000.5",
        "policies_published_total 1",
        "leader 1",
        "state_writes_total 2",
        "state_write_errors_total 1",
    ] {
        assert!(has(&after, line), "{line} in {after}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_says_how_it_is() {
    let text = text(status(), &ControllerMetrics::default());
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name}")).parse::<f64>().unwrap()
    };
    let now = jiff::Timestamp::now().as_second() as f64;
    let age = now - value("process_start_time_seconds");
    assert!((-2.0..3600.0).contains(&age), "started {age} s ago");
    assert!(value("process_cpu_seconds_total") < 3600.0);
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
    assert!((3.0..=value("process_max_fds")).contains(&value("process_open_fds")));
    assert!(value("process_threads") >= 1.0);
}
