//! Valid services are applied whatever the others are, and a delta has the same result as the complete policy.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn service(name: &str, host: &str, weight: i64) -> Value {
    json!({"name": name, "hostnames": [host], "versions": [{"name": "v1", "weight": weight}]})
}

fn policy(revision: u64, services: &[Value]) -> Policy {
    Policy::read(&json!({"revision": revision, "services": services})).unwrap()
}

fn before(policy: &Policy) -> Before<'_> {
    Before { policy, revision: Some(policy.revision), refused: &[] }
}

fn read(document: &Value, of: Before<'_>) -> Result<Delivery, Refusal> {
    Delivery::read(document.to_string().as_bytes(), of)
}

/// The name, host and weight of each service.
fn services(policy: &Policy) -> Vec<String> {
    let of =
        |service: &Service| format!("{} {} {}", service.name, service.hostnames.join(","), service.versions[0].weight);
    policy.services.iter().map(of).collect()
}

#[test]
fn a_bad_service_stays_what_it_was_and_the_others_are_taken() {
    let old = policy(1, &[service("a", "a.x", 1), service("b", "b.x", 1)]);
    let new =
        json!({"revision": 2, "services": [service("a", "a.x", -1), service("b", "b.x", 2), service("c", "c.x", -1)]});
    let delivery = read(&new, before(&old)).unwrap();
    assert_eq!(
        (delivery.policy.revision, services(&delivery.policy)),
        (2, vec!["a a.x 1".to_owned(), "b b.x 2".to_owned()])
    );
    let report = report(2, &delivery.refused).unwrap();
    assert_eq!((report.revision, report.services), (Some(2), vec!["a".to_owned(), "c".to_owned()]));
    assert!(report.errors[0].starts_with("services[0].versions[0].weight: -1 is not allowed"), "{:?}", report.errors);
}

#[test]
fn of_two_that_claim_a_host_the_first_gets_it() {
    let old = policy(1, &[service("b", "b.x", 1)]);
    let new =
        json!({"revision": 2, "services": [service("a", "a.x", 2), service("b", "A.x", 2), service("a", "c.x", 2)]});
    let delivery = read(&new, before(&old)).unwrap();
    assert_eq!(services(&delivery.policy), ["a a.x 2", "b b.x 1"]);
    let errors: Vec<_> = delivery.refused.iter().flat_map(|refused| &refused.errors).collect();
    assert!(errors[0].starts_with("services[1].hostnames[0]: \"a.x\" is not allowed"), "{errors:?}");
    assert!(errors[1].starts_with("services[2].name: \"a\" is not allowed"), "{errors:?}");
    // The previous configuration of an invalid service does not conflict with a valid one.
    let new = json!({"revision": 2, "services": [service("b", "b.x", -1), service("a", "b.x", 2)]});
    assert_eq!(services(&read(&new, before(&old)).unwrap().policy), ["a b.x 2"]);
}

#[test]
fn what_cannot_be_read_as_a_whole_is_refused_as_a_whole() {
    let old = policy(1, &[service("a", "a.x", 1)]);
    let wrong = |document: &Value| match read(document, before(&old)) {
        Err(Refusal::Wrong { revision, errors }) => (revision, errors.to_string()),
        other => panic!("{other:?}"),
    };
    let (revision, errors) = wrong(&json!({"revision": 2, "services": [service("a", "a.x", 2)], "removed": 1}));
    assert!(revision == Some(2) && errors.starts_with("removed: 1 is not allowed"), "{errors}");
    let (revision, errors) = wrong(&json!({"services": [service("a", "a.x", 2)]}));
    assert!(revision.is_none() && errors.starts_with("revision: missing"), "{errors}");
    let (revision, errors) = wrong(&json!({"revision": "2", "services": [service("a", "a.x", -2)]}));
    assert!(
        revision == Some(2) && errors.starts_with("services[0].versions[0].weight"),
        "nothing of it is right: {errors}"
    );
    assert!(matches!(Delivery::read(b"{", before(&old)), Err(Refusal::Wrong { revision: None, .. })));
    assert_eq!(services(&read(&json!({"revision": 2, "services": []}), before(&old)).unwrap().policy), [""; 0]);
}

#[test]
fn changes_are_since_the_policy_that_runs() {
    let old = policy(5, &[service("a", "a.x", 1), service("b", "b.x", 1)]);
    let changes = json!({"revision": 7, "base": 5, "removed": ["a"], "services": [service("b", "b.x", 2), service("c", "a.x", 3)]});
    let delivery = read(&changes, before(&old)).unwrap();
    assert_eq!(
        (delivery.policy.revision, services(&delivery.policy)),
        (7, vec!["b b.x 2".to_owned(), "c a.x 3".to_owned()])
    );
    let other = Before { revision: Some(6), ..before(&old) };
    assert_eq!(read(&changes, other), Err(Refusal::OtherBase(5)));
    let other = Before { revision: None, ..before(&old) };
    assert_eq!(read(&changes, other), Err(Refusal::OtherBase(5)));
    assert!(Policy::read(&changes).is_err(), "a configuration is whole");
}

#[test]
fn what_was_refused_stays_so_until_it_changes() {
    let old = policy(1, &[service("a", "a.x", 1), service("b", "b.x", 1)]);
    let whole = json!({"revision": 2, "services": [service("a", "a.x", -1), service("b", "b.x", 2)]});
    let first = read(&whole, before(&old)).unwrap();
    let next = |changes: &Value| {
        read(changes, Before { policy: &first.policy, revision: Some(2), refused: &first.refused }).unwrap()
    };
    let other = next(&json!({"revision": 3, "base": 2, "services": [service("b", "b.x", 3)]}));
    assert_eq!(
        (other.refused, services(&other.policy)),
        (first.refused.clone(), vec!["a a.x 1".to_owned(), "b b.x 3".to_owned()])
    );
    assert_eq!(next(&json!({"revision": 3, "base": 2, "services": [service("a", "a.x", 3)]})).refused, []);
    assert_eq!(next(&json!({"revision": 3, "base": 2, "removed": ["a"], "services": []})).refused, []);
}

proptest! {
    #[test]
    fn changes_lead_to_what_the_whole_would_have(
        old in prop::collection::btree_map(0u8..8, 0u32..3, 0..8),
        new in prop::collection::btree_map(0u8..8, 0u32..3, 0..8),
    ) {
        let of = |(name, weight): (&u8, &u32)| service(&format!("s{name}"), &format!("{name}.x"), i64::from(*weight));
        let before_ = policy(1, &old.iter().map(of).collect::<Vec<_>>());
        let whole = policy(2, &new.iter().map(of).collect::<Vec<_>>());
        let changed: Vec<_> = new.iter().filter(|(name, weight)| old.get(name) != Some(weight)).map(of).collect();
        let removed: Vec<_> = old.keys().filter(|name| !new.contains_key(name)).map(|name| format!("s{name}")).collect();
        let changes = json!({"revision": 2, "base": 1, "removed": removed, "services": changed});
        let mut delivery = read(&changes, before(&before_)).unwrap();
        prop_assert_eq!(&delivery.refused, &[]);
        delivery.policy.services.sort_by(|a, b| a.name.cmp(&b.name));
        prop_assert_eq!(delivery.policy, whole);
    }
}
