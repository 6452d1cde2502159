//! Golden vectors: decisions that must come out the same in every build, native and wasm, today and next year.
//!
//! After a change that is meant to change them: `UPDATE_GOLDEN=1 cargo test -p tideshift-core --test golden`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // Tests say what must hold by unwrapping it.

use serde_json::{Value, json};
use tideshift_core::choice::plan::{Plan, Turns};
use tideshift_core::outcome::Ending;
use tideshift_core::protocol::policy::Policy;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const CASES: &str = include_str!("golden/cases.json");
const DECISIONS: &str = include_str!("golden/decisions.json");

/// What `core` says of all cases.
fn decisions() -> Value {
    let cases: Value = serde_json::from_str(CASES).unwrap();
    let policy = Policy::read(&cases["policy"]).unwrap_or_else(|errors| unreachable!("{errors}"));
    let plan = Plan::new(&policy, |_, _| false);
    let requests: Vec<Value> = list(&cases["requests"]).iter().map(|request| decide(&plan, request)).collect();
    let sessions: Vec<Value> = list(&cases["sessions"]).iter().map(|request| session(&plan, request)).collect();
    let endings: Vec<Value> = list(&cases["endings"]).iter().map(|ending| outcome(&plan, ending)).collect();
    json!({"requests": requests, "sessions": sessions, "endings": endings})
}

/// What is done with a request, and with the next one that sends back the cookie that it got.
fn session(plan: &Plan, request: &Value) -> Value {
    let mut headers = headers(request);
    let mut turns = Turns::for_plan(plan, 7, None);
    let mut decide = |headers: &[(String, Vec<u8>)]| {
        let decision = plan.decide(headers, &mut turns, || 0x0123_4567_89ab_cdef);
        (plan.explain(decision.as_ref()), decision.and_then(|decision| decision.cookie))
    };
    let (first, cookie) = decide(&headers);
    let Some(cookie) = cookie else { return json!(first) };
    headers.push(("cookie".to_owned(), cookie.split(';').next().unwrap_or_default().as_bytes().to_vec()));
    let (second, again) = decide(&headers);
    json!({"first": first, "cookie": cookie, "second": second, "again": again})
}

fn headers(request: &Value) -> Vec<(String, Vec<u8>)> {
    list(request).iter().map(|pair| (text(&pair[0]), bytes(&pair[1]))).collect()
}

/// Where a request goes, and the versions of 60 such requests in a row, for each of two seeds.
fn decide(plan: &Plan, request: &Value) -> Value {
    let headers = headers(request);
    let Some(route) = plan.route(headers.as_slice()) else { return Value::Null };
    let service = &plan.services[route.service];
    let versions = [1, u64::MAX / 3].map(|seed| {
        let mut sequences = Turns::for_plan(plan, seed, None);
        let chosen = std::iter::repeat_with(|| route.split.next(&mut sequences).map(|(version, _)| version)).take(60);
        chosen.map(|version| version.map_or("-", |version| &service.versions[version])).collect::<Vec<_>>().join(" ")
    });
    json!({"service": service.name, "rule": route.rule, "versions": versions})
}

fn outcome(plan: &Plan, ending: &Value) -> Value {
    let number = |field: &str| ending[field].as_u64();
    let ending = Ending {
        status: number("status").map(|status| status as u16),
        grpc_status: number("grpc").map(|status| status as u32),
        flags: number("flags").unwrap_or_default(),
        is_grpc: false,
        is_closed: false,
    };
    json!(plan.services.iter().map(|service| service.errors.outcome(&ending).label()).collect::<Vec<_>>())
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A header's value: text, or a list of bytes where it is no UTF-8.
fn bytes(value: &Value) -> Vec<u8> {
    match value {
        Value::Array(bytes) => bytes.iter().filter_map(|byte| byte.as_u64().map(|byte| byte as u8)).collect(),
        _ => text(value).into_bytes(),
    }
}

#[test]
fn decisions_are_what_they_were() {
    let now = decisions();
    #[cfg(not(target_arch = "wasm32"))]
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/decisions.json");
        return std::fs::write(path, serde_json::to_string_pretty(&now).unwrap() + "\n").unwrap();
    }
    let golden: Value = serde_json::from_str(DECISIONS).unwrap();
    for part in ["requests", "sessions", "endings"] {
        assert_eq!(list(&now[part]).len(), list(&golden[part]).len(), "{part}");
        for (i, (now, golden)) in list(&now[part]).iter().zip(list(&golden[part])).enumerate() {
            assert_eq!(now, golden, "{part}[{i}]");
        }
    }
}
