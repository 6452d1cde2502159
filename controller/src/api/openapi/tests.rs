//! Tests that the OpenAPI document matches the code, and that every route responds as documented.

use super::{DOCUMENT, generate};
use crate::api::{Events, Leader, Published, ReconcileBarrier, Shared, Tokens, now, router};
use crate::metrics::ControllerMetrics;
use crate::readiness::Prober;
use crate::reconciler::state::PersistedState;
use crate::reconciler::{CountState, Reconciler};
use crate::role::Role;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response, header};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tideshift_core::shift::TrafficShift;
use tokio::sync::{Notify, watch};
use tower::ServiceExt;

#[test]
fn the_document_is_what_the_code_says() {
    let made = format!("{:#}\n", generate::document());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
        std::fs::write(path, &made).unwrap();
        return;
    }
    let differs = made.lines().zip(DOCUMENT.lines()).enumerate().find(|(_, (made, committed))| made != committed);
    assert!(made == DOCUMENT, "first difference: {differs:#?}; UPDATE_GOLDEN=1 writes it anew");
}

#[test]
fn what_it_refers_to_is_there() {
    fn look(value: &Value, whole: &Value) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(reference)) = map.get("$ref") {
                    assert!(whole.pointer(&reference[1..]).is_some(), "{reference}");
                }
                map.values().for_each(|value| look(value, whole));
            }
            Value::Array(items) => items.iter().for_each(|value| look(value, whole)),
            _ => {}
        }
    }
    let document = generate::document();
    look(&document, &document);
    let ids = operations(&document).into_iter().map(|(.., operation)| operation["operationId"].to_string());
    let ids: Vec<_> = ids.collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
}

/// The method, path and description of each operation.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    let of_path = |(path, methods): (&String, &Value)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(|(method, said)| (method.to_uppercase(), path.clone(), said.clone())).collect::<Vec<_>>()
    };
    paths.flat_map(of_path).collect()
}

fn shift(name: &str, weight: u32) -> Value {
    json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": name},
        "spec": {
            "hostnames": [format!("{name}.example.com")],
            "versions": [{"name": "v1", "endpoints": ["127.0.0.1:1"]}, {"name": "v2", "endpoints": ["127.0.0.1:2"]}],
            "stable": "v1", "target": "v2",
            "strategy": {"steps": [{"weight": weight, "holdSeconds": 3600}]},
        },
    })
}

/// The API of a controller whose endpoints are ready, without tokens.
async fn start() -> (Router, Arc<Shared>) {
    start_as(Role::Alone).await
}

/// The same for a replica with this role.
async fn start_as(role: Role) -> (Router, Arc<Shared>) {
    let role = watch::Sender::new(role);
    crate::net::install_crypto_provider();
    let document = shift("shop", 10);
    let read = TrafficShift::read(&document).unwrap();
    let prober = Prober::start(Default::default()).unwrap();
    let reconciler =
        Reconciler::new(vec![(read, document)], PersistedState::fresh("e".to_owned()).unwrap(), CountState::default());
    let ((publish, published), (_, tokens)) = (watch::channel(None), watch::channel(Tokens::default()));
    let (reconciler, (end, ending)) = (Mutex::new(reconciler), watch::channel(false));
    let (counted, turns, events) = (Notify::new(), ReconcileBarrier::default(), Events::default());
    let (reviewer, certificates, leader) = (None, false, Leader::new(role.subscribe(), None));
    let done = ControllerMetrics::default();
    let (filtered, complaints) = Default::default();
    let shared = Shared {
        reconciler,
        counted,
        turns,
        events,
        done,
        published,
        filtered,
        complaints,
        tokens,
        reviewer,
        certificates,
        leader,
        ending,
    };
    let shared = Arc::new(shared);
    let mind = shared.clone();
    tokio::spawn(async move {
        loop {
            let turn = {
                let mut reconciler = mind.reconciler();
                if let Some(shifts) = reconciler.changed_shifts() {
                    prober.set(shifts);
                }
                reconciler.set_readiness(prober.subscribe().borrow().clone());
                let outcome = reconciler.evaluate(now());
                mind.events.tell(&outcome.transitions);
                if let Some(policy) = outcome.policy {
                    let next = Published::next(publish.borrow().as_ref(), "e".to_owned(), &policy);
                    publish.send_replace(Some(next));
                }
                mind.turns.begin()
            };
            mind.turns.end(turn);
            mind.counted.notified().await;
            let _ = (&end, &role);
        }
    });
    shared.published.clone().wait_for(Option::is_some).await.unwrap();
    (router(shared.clone()), shared)
}

async fn send(api: &Router, method: &str, path: &str, body: Option<&Value>) -> Response<Body> {
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    api.clone().oneshot(request.body(body).unwrap()).await.unwrap()
}

/// Fails unless `value` matches the schema at that place of the document.
fn check(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    // References are relative to the whole document.
    let schema = json!({"allOf": [schema], "components": document["components"]});
    jsonschema::validate(&schema, value).map_err(|error| format!("{error} (at {})", error.instance_path()))
}

#[tokio::test(start_paused = true)]
async fn every_route_answers_as_documented() {
    let (api, shared) = start().await;
    let report = json!({"proxy": "p", "start": "1", "epoch": "e", "revision": 1, "workers": 2,
        "refused": {"revision": null, "errors": ["no"]},
        "services": [{"name": "shop", "unrouted": 1, "versions": [
            {"name": "v2", "ok": 7, "error": 1, "clientError": 2, "cancelled": 3, "inFlight": 4, "durations": [1, 2]}],
            "vetoes": [{"version": "v2", "until": 1u64 << 60, "strikes": 1, "requests": 9, "errors": 9,
                "othersRequests": 1, "othersErrors": 0}]}]});
    let mut too_much = report.clone();
    too_much["services"][0]["versions"][0]["error"] = json!(u64::MAX);
    let nothing = json!({});
    let rollout = |command: &str| format!("/v1/rollouts/shop/{command}");
    let calls = [
        ("POST", "/v1/reports", "/v1/reports".to_owned(), Some(report), 204),
        ("POST", "/v1/reports", "/v1/reports".to_owned(), Some(too_much), 400),
        ("GET", "/v1/policy", "/v1/policy?proxy=p&epoch=&after=0".to_owned(), None, 200),
        ("GET", "/v1/policy", "/v1/policy?proxy=p&epoch=e&after=9".to_owned(), None, 204),
        ("GET", "/v1/policy", "/v1/policy?proxy=p&epoch=e&after=0&delta=true".to_owned(), None, 200),
        ("GET", "/v1/policy", "/v1/policy?after=x".to_owned(), None, 400),
        ("GET", "/v1/status", "/v1/status".to_owned(), None, 200),
        ("POST", "/v1/rollouts/{name}/pause", rollout("pause"), Some(nothing.clone()), 200),
        ("POST", "/v1/rollouts/{name}/pause", rollout("pause"), Some(nothing.clone()), 200),
        ("POST", "/v1/rollouts/{name}/pause", "/v1/rollouts/nobody/pause".to_owned(), Some(nothing.clone()), 404),
        ("POST", "/v1/rollouts/{name}/resume", rollout("resume"), Some(nothing.clone()), 200),
        ("POST", "/v1/rollouts/{name}/resume", rollout("resume"), Some(nothing.clone()), 409),
        ("POST", "/v1/rollouts/{name}/set-weight", rollout("set-weight"), Some(json!({"weight": 50})), 200),
        ("POST", "/v1/rollouts/{name}/abort", rollout("abort"), Some(nothing.clone()), 200),
        ("POST", "/v1/rollouts/{name}/set-target", rollout("set-target"), Some(json!({"target": "v2"})), 200),
        ("POST", "/v1/rollouts/{name}/rollback", rollout("rollback"), Some(json!({"to": "v1"})), 200),
        ("POST", "/v1/rollouts/{name}/set-target", rollout("set-target"), Some(json!({"target": "v2"})), 200),
        ("POST", "/v1/rollouts/{name}/promote", rollout("promote"), Some(json!({"full": true})), 200),
        ("GET", "/v1/rollouts/{name}/history", rollout("history"), None, 200),
        ("GET", "/v1/rollouts/{name}/history", "/v1/rollouts/%ff/history".to_owned(), None, 400),
        ("GET", "/v1/rollouts/{name}/series", rollout("series"), None, 200),
        ("GET", "/v1/shifts/{name}", "/v1/shifts/shop".to_owned(), None, 200),
        ("PUT", "/v1/shifts/{name}", "/v1/shifts/shop".to_owned(), Some(shift("shop", 20)), 200),
        ("PUT", "/v1/shifts/{name}", "/v1/shifts/till".to_owned(), Some(shift("till", 20)), 201),
        ("PUT", "/v1/shifts/{name}", "/v1/shifts/else".to_owned(), Some(shift("till", 20)), 400),
        ("DELETE", "/v1/shifts/{name}", "/v1/shifts/till".to_owned(), None, 200),
        ("DELETE", "/v1/shifts/{name}", "/v1/shifts/till".to_owned(), None, 409),
        ("DELETE", "/v1/shifts/{name}", "/v1/shifts/nobodys".to_owned(), None, 404),
        ("DELETE", "/v1/shifts/{name}", "/v1/shifts/shop".to_owned(), None, 200),
        ("DELETE", "/v1/shifts/{name}", "/v1/shifts/shop".to_owned(), None, 409),
        (
            "GET",
            "/v1/services/{service}/versions/{version}/drain",
            "/v1/services/shop/versions/v1/drain".to_owned(),
            None,
            200,
        ),
        ("GET", "/v1/events", "/v1/events".to_owned(), None, 200),
        ("GET", "/metrics", "/metrics".to_owned(), None, 200),
        ("GET", "/healthz", "/healthz".to_owned(), None, 200),
        ("GET", "/readyz", "/readyz".to_owned(), None, 200),
        ("GET", "/v1/openapi.json", "/v1/openapi.json".to_owned(), None, 200),
    ];
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let mut asked = BTreeSet::new();
    for (method, path, uri, body, status) in calls {
        let operation = &document["paths"][path][method.to_lowercase()];
        let what = format!("{method} {uri}");
        if let (Some(body), true) = (&body, status < 400) {
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            check(&document, schema, body).unwrap_or_else(|error| panic!("{what}: body: {error}"));
        }
        let answer = send(&api, method, &uri, body.as_ref()).await;
        let mut said = operation["responses"][status.to_string()].clone();
        assert!(said.is_object() && answer.status() == status, "{what}: {status} {said} {answer:?}");
        if let Some(reference) = said["$ref"].as_str() {
            said = document.pointer(&reference[1..]).unwrap().clone();
        }
        let kind = answer.headers().get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap().to_owned());
        let kind = kind.map(|kind| kind.split(';').next().unwrap_or_default().to_owned());
        let kinds = said["content"].as_object().map(|content| content.keys().cloned().collect::<Vec<_>>());
        assert!(
            kind.iter().all(|kind| kinds.iter().flatten().any(|known| known == kind)),
            "{what}: {kind:?} {kinds:?}"
        );
        assert_eq!(kind.is_some(), kinds.is_some(), "{what}: {kind:?} {kinds:?}");
        let schema = &said["content"]["application/json"]["schema"];
        if !schema.is_null() {
            let body = axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap();
            let value = serde_json::from_slice(&body).unwrap();
            check(&document, schema, &value).unwrap_or_else(|error| panic!("{what}: {error}: {value}"));
        }
        asked.insert((method.to_owned(), path.to_owned()));
        shared.counted.notify_one();
    }
    let all: BTreeSet<_> = operations(&document).into_iter().map(|(method, path, _)| (method, path)).collect();
    assert_eq!(all, asked, "every operation is asked for what it promises");
}

#[tokio::test]
async fn replicas_answer_as_documented() {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let nobody = Role::Follows(Some("http://127.0.0.1:1".to_owned()));
    for (role, status) in [(Role::Follows(None), 503), (nobody, 502)] {
        let (api, _) = start_as(role).await;
        for (method, path, operation) in operations(&document) {
            let by_all = ["/v1/policy", "/metrics", "/healthz", "/readyz", "/v1/openapi.json"].contains(&path.as_str());
            if by_all {
                continue;
            }
            let uri = path.replace("{name}", "shop").replace("{service}", "shop").replace("{version}", "v1");
            let answer = send(&api, &method, &uri, Some(&json!({}))).await;
            assert_eq!(answer.status(), status, "{method} {path}");
            assert!(operation["responses"][status.to_string()].is_object(), "{method} {path} does not say {status}");
        }
    }
    let (api, _) = start_as(Role::Leads).await;
    let answer = send(&api, "PUT", "/v1/shifts/shop", Some(&shift("shop", 20))).await;
    assert_eq!(answer.status(), 409);
    assert!(document["paths"]["/v1/shifts/{name}"]["put"]["responses"]["409"].is_object());
}

#[tokio::test(start_paused = true)]
async fn what_a_schema_forbids_is_refused() {
    let (api, _) = start().await;
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    for (path, body) in [
        ("/v1/rollouts/{name}/pause", json!({"for": "ever"})),
        ("/v1/rollouts/{name}/pause", json!([])),
        ("/v1/rollouts/{name}/set-weight", json!([33])),
        ("/v1/rollouts/{name}/promote", json!({"full": "yes"})),
        ("/v1/rollouts/{name}/rollback", json!({})),
        ("/v1/rollouts/{name}/set-target", json!({"target": 7})),
        ("/v1/rollouts/{name}/set-weight", json!({"weight": -1})),
        ("/v1/rollouts/{name}/set-weight", json!({"weight": 12.5})),
        ("/v1/rollouts/{name}/set-weight", json!({"weight": 101})),
        ("/v1/reports", json!({"proxy": "p"})),
    ] {
        let schema = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"];
        assert!(check(&document, schema, &body).is_err(), "{path} {body}");
        let answer = send(&api, "POST", &path.replace("{name}", "shop"), Some(&body)).await;
        assert_eq!(answer.status(), 400, "{path} {body}");
    }
}

#[tokio::test]
async fn events_are_as_documented() {
    let (api, shared) = start().await;
    tokio::spawn(crate::api::keep_telling(shared.clone()));
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let mut events = send(&api, "GET", "/v1/events", None).await.into_body().into_data_stream();
    let pause = send(&api, "POST", "/v1/rollouts/shop/pause", Some(&json!({}))).await;
    assert_eq!(pause.status(), 200);
    let mut heard = BTreeSet::new();
    while heard.len() < 2 {
        let event: Bytes = events.next().await.unwrap().unwrap();
        let event = std::str::from_utf8(&event).unwrap();
        let (kind, data) = event.trim_end().split_once('\n').unwrap();
        let schema = match kind {
            "event: status" => "Status",
            "event: transition" => "TransitionEvent",
            kind => panic!("{kind}"),
        };
        let value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        let schema_of = json!({"$ref": format!("#/components/schemas/{schema}")});
        check(&document, &schema_of, &value).unwrap_or_else(|error| panic!("{error}: {value}"));
        heard.insert(schema);
    }
}
