//! Filter and controller may be one minor version apart, either way: docs/upgrade.md.
//!
//! The golden files are what builds of each format write. They stay as they are: what a release has written, the next one
//! must read, and what it writes the one before must read. A new format gets files of its own beside these.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use serde_json::{Value, json};
use tideshift_core::counts::Counts;
use tideshift_core::protocol::delivery::{Before, Delivery, Refusal};
use tideshift_core::protocol::policy::Policy;
use tideshift_core::protocol::report::Report;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn golden(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn policy() -> Value {
    golden(include_str!("golden/skew/policy-v1.json"))
}

fn report_v2() -> Value {
    golden(include_str!("golden/skew/report-v2.json"))
}

fn report_v1() -> Value {
    golden(include_str!("golden/skew/report-v1.json"))
}

/// The places of all objects in a document, as JSON pointers.
fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.push(at.to_owned());
            fields.iter().for_each(|(name, field)| objects(field, &format!("{at}/{name}"), found));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| objects(item, &format!("{at}/{i}"), found))
        }
        _ => {}
    }
}

fn places(value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    objects(value, "", &mut found);
    found
}

/// The document with a field more at a place, which this build does not know.
fn with_unknown(document: &Value, place: &str) -> Value {
    let mut document = document.clone();
    document.pointer_mut(place).unwrap()["fromTheFuture"] = json!({"anything": [1]});
    document
}

fn report(value: &Value) -> Result<Report, String> {
    serde_json::from_value(value.clone()).map_err(|error| error.to_string())
}

// Reports: the filter writes, the controller reads.

#[test]
fn report_of_each_format_is_read_and_todays_is_written_as_it_is() {
    assert_eq!(serde_json::to_value(report(&report_v2()).unwrap()).unwrap(), report_v2());
    let old = report(&report_v1()).unwrap();
    assert_eq!((old.format, old.services[0].versions[0].ended.ok), (1, 90));
    assert_eq!(old.services[0].versions[0].by_choice(1)[0].ended.error, 1);
}

/// The filter is newer: it reports more than this controller knows.
#[test]
fn report_with_unknown_fields_is_taken_as_without() {
    for known in [report_v1(), report_v2()] {
        let expected = report(&known);
        for place in places(&known) {
            assert_eq!(report(&with_unknown(&known, &place)), expected, "{place}");
        }
    }
    let mut newer = report_v2();
    newer["format"] = json!(Report::FORMAT + 1);
    newer["services"][0]["versions"][0]["timedOut"] = json!(3);
    newer["services"][0]["events"]["last"] = json!([[11, 0, 1, 1, 2, 0, 99, "x"], [22, 0, 0, 200, 0, 0]]);
    let taken = report(&newer).unwrap();
    assert_eq!(taken.check(), Ok(()));
    let version = &taken.services[0].versions[0];
    assert_eq!((version.ended.ok, version.by_choice(taken.format)[0].started), (90, 60));
    let events = &taken.services[0].events.as_ref().unwrap().last;
    assert!(events[0].request(true).is_some(), "what is added to a request's numbers is ignored");
    assert!(events[1].request(true).is_none(), "an outcome that is not known speaks for nothing");
}

/// The filter is older, or no longer reports something: what is missing is 0 or empty.
#[test]
fn report_with_missing_fields_is_taken() {
    const NEEDED: [&str; 5] = ["/proxy", "/start", "/revision", "/services", "/name"];
    for known in [report_v1(), report_v2()] {
        for place in places(&known) {
            let fields: Vec<String> = known.pointer(&place).unwrap().as_object().unwrap().keys().cloned().collect();
            for field in fields {
                let mut less = known.clone();
                less.pointer_mut(&place).unwrap().as_object_mut().unwrap().remove(&field);
                let needed = NEEDED.contains(&format!("/{field}").as_str()) && place != "/refused";
                assert_eq!(report(&less).is_err(), needed, "{place}/{field}: {:?}", report(&less));
            }
        }
    }
    // As from a filter that knew fewer outcomes.
    let mut less = report_v2();
    let version = &mut less["services"][0]["versions"][0];
    version.as_object_mut().unwrap().remove("cancelled");
    let expected = Counts { ok: 90, error: 1, client_error: 4, cancelled: 0 };
    assert_eq!(report(&less).unwrap().services[0].versions[0].ended, expected);
}

// Policies: the controller writes, the filter reads.

fn deliver(document: &Value, before: &Policy) -> Result<Delivery, Refusal> {
    let before = Before { policy: before, revision: Some(before.revision), refused: &[] };
    Delivery::read(document.to_string().as_bytes(), before)
}

/// What runs on the proxy: the same services, with other weights.
fn before() -> Policy {
    let mut before = policy();
    before["revision"] = json!(6);
    before["services"][0]["versions"][1]["weight"] = json!(1);
    before["services"][1]["versions"][0]["weight"] = json!(2);
    Policy::read(&before).unwrap()
}

/// A field that is always written would be refused by filters that do not know it: it must be left out where the document
/// does not use it.
#[test]
fn policy_is_written_as_the_version_before_reads_it() {
    assert_eq!(serde_json::to_value(Policy::read(&policy()).unwrap()).unwrap(), policy());
    let delivery = deliver(&policy(), &before()).unwrap();
    assert_eq!(
        (delivery.policy, delivery.refused, delivery.ignored),
        (Policy::read(&policy()).unwrap(), vec![], vec![])
    );
}

/// The controller is newer. An unknown field is ignored where it does no harm; where it may decide which requests a version
/// gets, its service is refused and stays as it was, and the others are taken.
#[test]
fn policy_with_an_unknown_field_is_taken_as_far_as_it_is_safe() {
    let (whole, before) = (policy(), before());
    let known = Policy::read(&whole).unwrap();
    for place in places(&whole) {
        let document = with_unknown(&whole, &place);
        assert!(Policy::read(&document).is_err(), "{place}: in a plugin configuration it is an error");
        let delivery = deliver(&document, &before).unwrap_or_else(|refusal| panic!("{place}: {refusal:?}"));
        let is_harmless = place.is_empty() || place == "/services/0/guard";
        let refused =
            place.strip_prefix("/services/").filter(|_| !is_harmless).map(|rest| usize::from(!rest.starts_with('0')));
        let names: Vec<&str> = delivery.refused.iter().map(|service| service.name.as_str()).collect();
        assert_eq!(names, refused.map(|i| known.services[i].name.as_str()).into_iter().collect::<Vec<_>>(), "{place}");
        for (i, service) in delivery.policy.services.iter().enumerate() {
            let expected = if refused == Some(i) { &before.services[i] } else { &known.services[i] };
            assert_eq!(service, expected, "{place}: service {i}");
        }
        let ignored: Vec<&str> = delivery.ignored.iter().map(|field| field.path.as_str()).collect();
        let expected = if place.is_empty() { "fromTheFuture" } else { "services[0].guard.fromTheFuture" };
        assert_eq!(ignored, if is_harmless { vec![expected] } else { vec![] }, "{place}");
        if let [refused] = delivery.refused.as_slice() {
            assert!(refused.errors[0].contains("fromTheFuture: unknown field"), "{place}: {:?}", refused.errors);
        }
    }
}

/// A new kind of something that is known: a rule must never match more than its author said.
#[test]
fn policy_with_an_unknown_kind_is_refused_for_its_service() {
    for (place, kind) in [
        ("/services/0/rules/0/matches/0/headers/0/type", json!("Glob")),
        ("/services/0/rules/0/matches/0/cookies/0/type", json!("Glob")),
        ("/services/0/rules/0/matches/0/queryParams/0/type", json!("Glob")),
        ("/services/0/rules/0/matches/0/path/type", json!("Template")),
        ("/services/0/session/type", json!("ClientAddress")),
        ("/services/0/errors/statusCodes/0", json!("timeout")),
        ("/services/0/versions/0/serving", json!("draining")),
    ] {
        let (mut document, before) = (policy(), before());
        *document.pointer_mut(place).unwrap() = kind;
        let delivery = deliver(&document, &before).unwrap();
        assert_eq!(delivery.refused.len(), 1, "{place}");
        assert_eq!(delivery.policy.services[0], before.services[0], "{place}");
        assert_eq!(delivery.policy.services[1], Policy::read(&policy()).unwrap().services[1], "{place}");
    }
}

/// The controller is older: what it does not write has its default.
#[test]
fn policy_with_missing_fields_is_taken() {
    let whole = policy();
    let is_needed = |place: &str, field: &str| match field {
        "revision" | "services" | "versions" | "name" | "version" | "path" => true,
        "value" => true,
        "type" => place.ends_with("/session") || place.contains("/headers/1") || place.contains("queryParams"),
        _ => false,
    };
    for place in places(&whole) {
        let fields: Vec<String> = whole.pointer(&place).unwrap().as_object().unwrap().keys().cloned().collect();
        for field in fields.iter().filter(|field| !is_needed(&place, field)) {
            let mut less = whole.clone();
            less.pointer_mut(&place).unwrap().as_object_mut().unwrap().remove(field);
            let delivery = deliver(&less, &before()).unwrap_or_else(|refusal| panic!("{place}/{field}: {refusal:?}"));
            assert_eq!(delivery.refused, [], "{place}/{field}");
        }
    }
}

/// Changes are read as whole policies are.
#[test]
fn changes_with_unknown_fields_are_taken_as_far_as_it_is_safe() {
    let before = before();
    let services = policy()["services"].clone();
    let mut changes = json!({"revision": 7, "base": 6, "removed": [], "services": services, "fromTheFuture": 1});
    let delivery = deliver(&changes, &before).unwrap();
    assert_eq!(
        (delivery.policy.services, delivery.refused.len(), delivery.ignored.len()),
        (Policy::read(&policy()).unwrap().services, 0, 1)
    );
    changes["services"][0]["paths"] = json!([{"type": "Exact", "value": "/cart"}]);
    let delivery = deliver(&changes, &before).unwrap();
    assert_eq!((delivery.refused[0].name.as_str(), &delivery.policy.services[0]), ("checkout", &before.services[0]));
}
