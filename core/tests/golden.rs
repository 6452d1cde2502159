//! Golden vectors: decisions that must come out the same in every build, native and wasm, today and next year.
//!
//! After a change that is meant to change them: `UPDATE_GOLDEN=1 cargo test -p tideshift-core --test golden`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // Tests say what must hold by unwrapping it.

use serde_json::{Value, json};
use tideshift_core::outcome::Ending;
use tideshift_core::plan::{Plan, Turns};
use tideshift_core::policy::Policy;
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
    json!({"requests": requests, "endings": list(&cases["endings"]).iter().map(|e| outcome(&plan, e)).collect::<Vec<_>>()})
}

/// Where a request goes, and the versions of 60 such requests in a row, for each of two seeds.
fn decide(plan: &Plan, request: &Value) -> Value {
    let headers: Vec<(String, Vec<u8>)> = list(request).iter().map(|pair| (text(&pair[0]), bytes(&pair[1]))).collect();
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
    for part in ["requests", "endings"] {
        assert_eq!(list(&now[part]).len(), list(&golden[part]).len(), "{part}");
        for (i, (now, golden)) in list(&now[part]).iter().zip(list(&golden[part])).enumerate() {
            assert_eq!(now, golden, "{part}[{i}]");
        }
    }
}
