//! An error in one document does not block another.

use super::*;
use serde_json::json;

fn document(name: &str, hosts: &[&str], rest: &Value) -> Value {
    let mut spec = json!({"hostnames": hosts, "versions": [{"name": "v1"}, {"name": "v2"}], "stable": "v1"});
    spec.as_object_mut().unwrap().extend(rest.as_object().cloned().unwrap_or_default());
    let metadata = json!({"name": name, "namespace": "shop"});
    json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": metadata, "spec": spec})
}

fn held(document: &Value) -> Result<Arc<Held>, Errors> {
    let shift = TrafficShift::read(document)?;
    let size = check(&shift, document)?;
    Ok(Arc::new(Held { shift, document: document.clone(), size }))
}

/// A name and its hosts.
type Hosts = (String, Vec<String>);

/// What is in force, the hosts of it, and the errors.
fn agreed(before: &BTreeMap<String, Arc<Held>>, documents: &[Value]) -> (Admitted, Vec<Hosts>, Vec<String>) {
    let name = |document: &Value| document["metadata"]["name"].as_str().unwrap().to_owned();
    let admitted = agree(before, documents.iter().map(|document| (name(document), held(document))));
    let of = |(name, held): (&String, &Arc<Held>)| (name.clone(), held.shift.services[0].hostnames.clone());
    let (hosts, wrong) = (admitted.held.iter().map(of).collect(), admitted.refused.iter());
    let wrong = wrong.map(|(name, errors)| format!("{name}: {errors}")).collect();
    (admitted, hosts, wrong)
}

fn hosts(of: &[(&str, &[&str])]) -> Vec<Hosts> {
    of.iter().map(|(name, hosts)| ((*name).to_owned(), hosts.iter().map(ToString::to_string).collect())).collect()
}

#[test]
fn the_older_claim_keeps_its_host_wherever_the_newer_one_stands() {
    let none = json!({});
    let (before, ..) = agreed(&BTreeMap::new(), &[document("b", &["x"], &none), document("c", &["y"], &none)]);
    let all = [document("a", &["x"], &none), document("b", &["x", "z"], &none), document("c", &["y"], &none)];
    let (after, now, wrong) = agreed(&before.held, &all);
    assert_eq!(now, hosts(&[("b", &["x", "z"]), ("c", &["y"])]));
    assert_eq!(wrong, ["a: spec.hostnames[0]: \"x\" is already a hostname of the TrafficShift b in force"]);
    // It now claims a host of another document: it stays as it was.
    let all = [document("b", &["x"], &none), document("c", &["y", "x"], &none)];
    let (_, now, wrong) = agreed(&after.held, &all);
    assert_eq!((now, wrong.len()), (hosts(&[("b", &["x"]), ("c", &["y"])]), 1));
}

#[test]
fn hosts_move_from_one_to_the_other_at_once() {
    let none = json!({});
    let (before, ..) = agreed(&BTreeMap::new(), &[document("a", &["x"], &none), document("b", &["y"], &none)]);
    // Two exchange their hosts, beside one that stays invalid.
    let exchanged = [document("a", &["y"], &none), document("b", &["x"], &none)];
    let (_, now, wrong) = agreed(&before.held, &exchanged);
    assert_eq!((now, wrong), (hosts(&[("a", &["y"]), ("b", &["x"])]), Vec::new()));
    // Released by a document later in the list.
    let moved = [document("a", &["x", "y"], &none), document("b", &["z"], &none), document("c", &["z"], &none)];
    let (_, now, wrong) = agreed(&before.held, &moved);
    assert_eq!(now, hosts(&[("a", &["x", "y"]), ("b", &["z"])]));
    assert_eq!(wrong, ["c: spec.hostnames[0]: \"z\" is already a hostname of the TrafficShift b in force"]);
}

#[test]
fn what_is_wrong_with_one_document_keeps_what_it_had_and_stops_no_other() {
    let none = json!({});
    let (before, ..) = agreed(&BTreeMap::new(), &[document("a", &["x"], &none), document("b", &["y"], &none)]);
    let wrong = document("a", &["x2"], &json!({"stable": "v9"}));
    let (after, now, errors) = agreed(&before.held, &[wrong, document("b", &["y2"], &none)]);
    assert_eq!(now, hosts(&[("a", &["x"]), ("b", &["y2"])]));
    assert!(errors.len() == 1 && errors[0].starts_with("a: spec.stable: "), "{errors:?}");
    let (_, now, errors) = agreed(&after.held, &[document("b", &["y2"], &none)]);
    assert_eq!((now, errors), (hosts(&[("b", &["y2"])]), Vec::new()), "one that is gone is gone");
}

/// A document whose rules have this many bytes in total.
fn of_bytes(name: &str, bytes: usize) -> Value {
    // Incompressible, like random data.
    let word = |n: usize| {
        format!(
            "{:016x}",
            (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
        )
    };
    let value = |n: usize| (64 * n..64 * (n + 1)).map(word).collect::<String>();
    let rule = |n: usize| {
        let header = json!({"name": "x", "value": value(n)});
        json!({"matches": [{"headers": [header]}], "versions": [{"name": "v1"}]})
    };
    let rules: Vec<Value> = (0..bytes / 1_150).map(rule).collect();
    document(name, &[name], &json!({ "rules": rules }))
}

#[test]
fn a_document_and_a_namespace_have_so_many_bytes() {
    let large = of_bytes("large", MAX_DOCUMENT_BYTES + 10_000);
    let (_, now, wrong) = agreed(&BTreeMap::new(), &[large, document("b", &["y"], &json!({}))]);
    assert_eq!(now, hosts(&[("b", &["y"])]));
    assert!(
        wrong.len() == 1 && wrong[0].contains(" bytes, as proxies get it") && wrong[0].contains("262144"),
        "{wrong:?}"
    );
    let documents: Vec<Value> = ["a", "b", "c"].map(|name| of_bytes(name, 200_000)).to_vec();
    let (_, now, wrong) = agreed(&BTreeMap::new(), &documents);
    assert_eq!(now, hosts(&[("a", &["a"]), ("b", &["b"])]));
    assert!(wrong.len() == 1 && wrong[0].contains("namespace shop") && wrong[0].contains("524288"), "{wrong:?}");
}

#[test]
fn everything_that_is_taken_fits_into_the_state() {
    let mut documents = Vec::new();
    for namespace in 0..8 {
        for n in 0..2 {
            let mut document = of_bytes(&format!("d{namespace}-{n}"), 240_000);
            document["metadata"]["namespace"] = json!(format!("n{namespace}"));
            documents.push(document);
        }
    }
    let (admitted, _, wrong) = agreed(&BTreeMap::new(), &documents);
    let services = admitted.held.values().flat_map(|held| compile::at_rest(&held.shift)).collect::<Vec<_>>();
    let bytes = packed(&serde_json::to_vec(&services).unwrap());
    assert!(bytes <= MAX_PACKED_BYTES, "{bytes}");
    assert!(admitted.held.len() < 16 && wrong.iter().all(|wrong| wrong.contains("by gzip")), "{wrong:?}");
}

#[test]
fn what_proxies_would_refuse_is_found_before_they_do() {
    let document = document("a", &["x"], &json!({"rules": [{"name": "r", "versions": [{"name": "v1"}]}]}));
    let mut shift = TrafficShift::read(&document).unwrap();
    let twice = shift.services[0].rules[0].clone();
    shift.services[0].rules.push(twice);
    let errors = check(&shift, &document).unwrap_err().to_string();
    assert!(errors.starts_with("spec.rules[1].name: proxies would refuse what becomes of it: \"r\""), "{errors}");
}

#[test]
fn a_rule_of_any_name_gets_along_with_those_of_the_rollout() {
    let rules = json!([{"name": "testers of the rollout", "versions": [{"name": "v1"}]}]);
    let steps = json!([{"matches": [{"method": "GET"}], "weight": 1}, {"weight": 100}]);
    held(&document("a", &["x"], &json!({"rules": rules, "strategy": {"steps": steps}}))).unwrap();
}

/// Versions v1 and v2 with these fields.
fn versions(v1: &Value, v2: &Value) -> Value {
    let version = |name: &str, fields: &Value| {
        let mut version = json!({ "name": name });
        version.as_object_mut().unwrap().extend(fields.as_object().cloned().unwrap());
        version
    };
    json!({"versions": [version("v1", v1), version("v2", v2)]})
}

#[test]
fn two_versions_of_a_document_have_no_workload_and_no_pods_in_common() {
    let errors = |v1: Value, v2: Value| {
        held(&document("a", &["x"], &versions(&v1, &v2))).err().map(|errors| errors.to_string()).unwrap_or_default()
    };
    let workload = |name: &str| json!({"workloadRef": {"name": name}});
    let error = errors(workload("shop"), workload("shop"));
    let expected = "spec.versions[1].workloadRef: Deployment shop: not allowed for version v2: already version v1's in the \
                    same document; a workload, and a pod, belongs to one version of one TrafficShift";
    assert_eq!(error, expected);
    let other_version = json!({"workloadRef": {"apiVersion": "apps/v1beta1", "name": "shop"}});
    assert!(!errors(workload("shop"), other_version).is_empty());
    let track = |track: &str| json!({"matchLabels": {"app": "shop", "track": track}});
    let error = errors(json!({"selector": {"matchLabels": {"app": "shop"}}}), json!({"selector": track("new")}));
    let expected = "spec.versions[1].selector: the pods of app=shop, track=new: not allowed for version v2: overlaps with \
                    the pods of app=shop, already version v1's";
    assert!(error.starts_with(expected), "{error}");
    let within = |operator: &str| {
        let values: &[&str] = if operator == "In" { &["new"] } else { &[] };
        json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["shop"]},
            {"key": "track", "operator": operator, "values": values}]})
    };
    for (v1, v2) in [
        (json!({"service": "shop"}), json!({"service": "shop"})),
        (json!({"service": "shop", "port": "http"}), json!({"service": "shop", "port": "grpc"})),
        (json!({"service": "shop", "selector": track("new")}), json!({"service": "shop"})),
        (json!({"selector": track("new")}), json!({"selector": within("In")})),
    ] {
        assert!(!errors(v1.clone(), v2.clone()).is_empty(), "{v1} {v2}");
    }
    for (v1, v2) in [
        (workload("shop-v1"), workload("shop-v2")),
        (workload("shop"), json!({"workloadRef": {"kind": "StatefulSet", "name": "shop"}})),
        (workload("shop"), json!({"workloadRef": {"name": "shop"}, "cluster": "west"})),
        (json!({"service": "shop", "selector": track("old")}), json!({"service": "shop", "selector": track("new")})),
        (json!({"selector": within("Exists")}), json!({"selector": within("DoesNotExist")})),
        (json!({"service": "shop-v1"}), json!({"service": "shop-v2"})),
    ] {
        assert_eq!(errors(v1.clone(), v2.clone()), "", "{v1} {v2}");
    }
}

#[test]
fn a_version_of_several_services_is_one_version() {
    let of = |name: &str, v2: &str| {
        let workload = |of: &str| json!({"workloadRef": {"name": of}});
        let mut service = versions(&workload("one"), &workload(v2));
        service
            .as_object_mut()
            .unwrap()
            .extend([("name".to_owned(), json!(name)), ("hostnames".to_owned(), json!([name]))]);
        service
    };
    let all = |services: Value| {
        let mut document = document("a", &[], &json!({"services": services}));
        ["versions", "hostnames"]
            .iter()
            .for_each(|field| drop(document["spec"].as_object_mut().unwrap().remove(*field)));
        held(&document).err().map(|errors| errors.to_string()).unwrap_or_default()
    };
    assert_eq!(all(json!([of("cart", "two"), of("till", "two")])), "");
    let mixed = all(json!([of("cart", "two"), {"name": "till", "hostnames": ["till"], "versions": [
        {"name": "v2", "workloadRef": {"name": "one"}}, {"name": "v1", "workloadRef": {"name": "three"}}]}]));
    assert!(mixed.starts_with("spec.services[1].versions[0].workloadRef: Deployment one: not allowed"), "{mixed}");
}

#[test]
fn of_two_documents_over_the_same_workloads_the_older_one_has_them() {
    let workload = |name: &str| json!({"workloadRef": {"name": name}});
    let of = |name: &str, v1: &str, v2: &str| document(name, &[name], &versions(&workload(v1), &workload(v2)));
    let (before, ..) = agreed(&BTreeMap::new(), &[of("b", "one", "two")]);
    let (after, now, wrong) = agreed(&before.held, &[of("a", "two", "three"), of("b", "one", "two")]);
    assert_eq!(now, hosts(&[("b", &["b"])]));
    let expected = "a: spec.versions[0].workloadRef: Deployment two: not allowed for version v1: already version v2's of \
                    the TrafficShift b in force; a workload, and a pod, belongs to one version of one TrafficShift";
    assert_eq!(wrong, [expected]);
    // A released workload may be claimed, and two may exchange theirs.
    let (_, now, wrong) = agreed(&after.held, &[of("a", "two", "three"), of("b", "one", "four")]);
    assert_eq!((now, wrong), (hosts(&[("a", &["a"]), ("b", &["b"])]), Vec::new()));
    // Another namespace has workloads of its own.
    let mut elsewhere = of("c", "one", "two");
    elsewhere["metadata"]["namespace"] = json!("elsewhere");
    let (_, now, wrong) = agreed(&before.held, &[of("b", "one", "two"), elsewhere]);
    assert_eq!((now.len(), wrong), (2, Vec::new()));
    // The pods of a Service are claimed like a workload.
    let by_service =
        |name: &str| document(name, &[name], &versions(&json!({"service": "s"}), &json!({"service": name})));
    let (_, now, wrong) = agreed(&BTreeMap::new(), &[by_service("d"), by_service("e")]);
    assert_eq!((now, wrong.len()), (hosts(&[("d", &["d"])]), 1));
}
