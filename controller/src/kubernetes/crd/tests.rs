//! Tests that the CRD and the reader of documents accept and reject the same documents. A stand-in applies the CRD as
//! the API server does: it fills in defaults, validates the schema and list types, and runs the CEL rules.

use super::*;
use crate::kubernetes::admission::admit;
use cel::{Context, Env, Program};
use jsonschema::Validator;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};
use tideshift_core::shift::TrafficShift;

#[path = "../../../../core/tests/documents/mod.rs"]
mod documents;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[test]
fn the_committed_file_is_what_the_types_say() {
    let (path, made) = (Path::new(FOLDER).join("envoy-configs/kubernetes/crd.yaml"), yaml().unwrap());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    let differs = made.lines().zip(committed.lines()).enumerate().find(|(_, (made, committed))| made != committed);
    assert!(made == committed, "first difference: {differs:#?}; UPDATE_GOLDEN=1 writes it anew");
    let read: Value = serde_saphyr::from_str(&made).unwrap();
    assert_eq!(read, definition(), "YAML means what was written");
}

#[test]
fn what_is_said_of_types_and_fields_is_said_of_some_that_there_are() {
    let types = Value::from(json_schema::traffic_shift())["$defs"].take();
    for (kind, field, _) in bounds() {
        assert!(types[kind]["properties"][field].is_object(), "{kind}.{field}");
    }
    for rule in RULES.iter().chain(CLUSTER_RULES) {
        let field = rule.about.trim_start_matches('.');
        assert!(types[rule.of].is_object(), "{}", rule.of);
        assert!(field.is_empty() || types[rule.of]["properties"][field].is_object(), "{}.{field}", rule.of);
    }
}

/// A stand-in for the API server.
struct Server {
    schema: Value,
    validator: Validator,
    env: Arc<Env>,
    programs: HashMap<String, Program>,
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let schema = object_schema();
    let mut env = Env::stdlib();
    env.add_extension(cel::extensions::strings).unwrap();
    let program = |rule: &Rule| (rule.holds.to_owned(), env.compile(rule.holds).unwrap());
    let programs = RULES.iter().chain(CLUSTER_RULES).map(program).collect();
    let mut strict = schema.clone();
    refuse_unknown(&mut strict);
    Server { validator: jsonschema::validator_for(&strict).unwrap(), schema, env: Arc::new(env), programs }
});

/// As with `fieldValidation=Strict`, the default of kubectl, expressed in plain JSON Schema.
fn refuse_unknown(schema: &mut Value) {
    if let Value::Object(fields) = schema {
        if fields.contains_key("properties") {
            fields.insert("additionalProperties".to_owned(), json!(false));
        }
        if fields.contains_key("x-kubernetes-int-or-string") {
            fields.insert("type".to_owned(), json!(["integer", "string"]));
        }
        fields.values_mut().for_each(refuse_unknown);
    }
}

/// The schema of a field, of the values of a map or of the items of a list.
fn below<'s>(schema: &'s Value, name: &str) -> &'s Value {
    let places = [&schema["properties"][name], &schema["additionalProperties"], &schema["items"]];
    places.into_iter().find(|place| place.is_object()).unwrap_or(&Value::Null)
}

/// Drops nulls and fills in defaults.
fn fill_in(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                if let (Some(default), false) = (field.get("default"), fields.contains_key(name)) {
                    fields.insert(name.clone(), default.clone());
                }
            }
            fields.iter_mut().for_each(|(name, value)| fill_in(below(schema, name), value));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| fill_in(&schema["items"], item)),
        _ => {}
    }
}

impl Server {
    /// The stored document, or the errors that it causes, in a cluster or outside.
    fn take(&self, document: &Value) -> Result<Value, Vec<String>> {
        let is_of_clusters = |error: &String| CLUSTER_RULES.iter().any(|rule| rule.holds == error);
        let (document, mut errors) = self.health_check(document);
        errors.retain(|error| !is_of_clusters(error));
        if errors.is_empty() { Ok(document) } else { Err(errors) }
    }

    /// The document with its defaults, and all errors in it.
    fn health_check(&self, document: &Value) -> (Value, Vec<String>) {
        let mut document = document.clone();
        fill_in(&self.schema, &mut document);
        let mut errors: Vec<_> = self.validator.iter_errors(&document).map(|error| error.to_string()).collect();
        if errors.is_empty() {
            self.run_rules(&self.schema, &document, &mut errors);
        }
        (document, errors)
    }

    /// Collects the violated rules and the duplicates in lists.
    fn run_rules(&self, schema: &Value, value: &Value, errors: &mut Vec<String>) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let rule = rule["rule"].as_str().unwrap();
            let mut context = Context::with_env(self.env.clone());
            context.add_variable_from_value("self", cel_value(value));
            let result = self.programs[rule].execute(&context);
            if result.clone().unwrap_or_else(|error| panic!("{rule}: {error}: {value}")) != cel::Value::Bool(true) {
                errors.push(rule.to_owned());
            }
        }
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(name, value)| self.run_rules(below(schema, name), value, errors));
            }
            Value::Array(items) => {
                let key = |item: &Value| match schema["x-kubernetes-list-type"].as_str() {
                    Some("set") => Some(item.to_string()),
                    Some("map") => Some(item["name"].to_string()),
                    _ => None,
                };
                let keys: Vec<_> = items.iter().filter_map(key).collect();
                if keys.iter().collect::<BTreeSet<_>>().len() < keys.len() {
                    errors.push(format!("twice: {keys:?}"));
                }
                items.iter().for_each(|item| self.run_rules(&schema["items"], item, errors));
            }
            _ => {}
        }
    }
}

/// Numbers as the API server represents them: integer or float, never unsigned.
fn cel_value(value: &Value) -> cel::Value {
    match value {
        Value::Null => cel::Value::Null,
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => number.as_i64().map_or_else(|| number.as_f64().unwrap().into(), cel::Value::from),
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(cel_value).collect::<Vec<_>>().into(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.as_str(), cel_value(value))).collect::<HashMap<_, _>>().into()
        }
    }
}

/// Whether a controller in a cluster accepts the document.
fn is_admitted(document: &Value) -> bool {
    TrafficShift::read(document).is_ok_and(|shift| admit(&shift).is_ok())
}

fn is_read(document: &Value) -> bool {
    TrafficShift::read(document).is_ok()
}

/// The TrafficShifts of a YAML text.
fn shifts_in(yaml: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap_or_default();
    documents.into_iter().filter(|document| document["kind"] == "TrafficShift").collect()
}

/// The published examples, and the valid documents of the reader's tests.
fn right_documents() -> Vec<Value> {
    let files = |folder: &str| std::fs::read_dir(Path::new(FOLDER).join(folder)).unwrap();
    let mut shown = Vec::new();
    for file in [".", "docs", "envoy-configs", "envoy-configs/kubernetes"].into_iter().flat_map(files) {
        let path = file.unwrap().path();
        let text = || std::fs::read_to_string(&path).unwrap();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("yaml") => shown.extend(shifts_in(&text())),
            Some("md") => {
                let blocks = text().split("```").skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
                shown.extend(blocks.iter().filter_map(|block| block.strip_prefix("yaml")).flat_map(shifts_in));
            }
            _ => {}
        }
    }
    assert!(shown.len() >= 2, "README.md and envoy-configs/checkout.yaml have one each: {shown:?}");
    shown.into_iter().chain(documents::taken()).collect()
}

#[test]
fn what_is_right_is_taken_and_its_defaults_change_nothing() {
    for document in right_documents() {
        let kept = SERVER.take(&document).unwrap_or_else(|errors| panic!("{document}: {errors:#?}"));
        let read = TrafficShift::read(&document);
        assert!(read.is_ok() && read == TrafficShift::read(&kept), "{document}\nis kept as\n{kept}");
    }
}

#[test]
fn what_is_wrong_is_refused_and_every_rule_is_needed() {
    let mut broken = BTreeSet::new();
    for refused in documents::refused() {
        match SERVER.take(&refused.document) {
            Ok(_) => assert!(refused.by_the_reader_alone, "{}: {}", refused.error, refused.document),
            Err(errors) => {
                assert!(!refused.by_the_reader_alone, "{}: {errors:?}", refused.document);
                broken.extend(errors);
            }
        }
    }
    for rule in RULES {
        assert!(
            broken.contains(rule.holds),
            "nothing in documents::refused() breaks the rule of {}: {}",
            rule.of,
            rule.holds
        );
    }
}

#[test]
fn what_reaches_out_of_the_namespace_is_refused_by_a_rule_of_its_own() {
    let v1 = |field: &str, value: Value| json!({"name": "v1", "service": "a", field: value});
    let probe = |probe: Value| ("/versions/0", v1("readinessProbe", probe));
    let spec = || json!({"versions": [{"name": "v1", "service": "a"}], "stable": "v1"});
    let hook = |field: &str, value: Value| {
        ("/webhooks", json!([{"name": "a", "type": "Gate", "url": "https://ci.example.com", field: value}]))
    };
    assert_eq!(SERVER.health_check(&documents::document(spec())).1, [""; 0]);
    let mut broken = BTreeSet::new();
    for (pointer, value) in [
        ("/versions/0", json!({"name": "v1", "endpoints": ["169.254.169.254:80"]})),
        probe(json!({"httpGet": {"host": "metadata.google.internal", "path": "/computeMetadata/v1/"}})),
        probe(json!({"tcpSocket": {"host": "10.0.0.1", "port": 22}})),
        probe(json!({"exec": {"command": ["id"]}})),
        probe(json!({"httpGet": {}, "periodMillis": 1})),
        hook("secretFile", json!("/var/run/secrets/kubernetes.io/serviceaccount/token")),
    ] {
        let document = documents::with(spec(), pointer, value);
        let (_, errors) = SERVER.health_check(&document);
        assert_eq!(errors.len(), 1, "{document}: {errors:?}");
        assert!(is_read(&document) && !is_admitted(&document), "{document}");
        broken.extend(errors);
    }
    for rule in CLUSTER_RULES {
        assert!(broken.contains(rule.holds), "nothing here breaks the rule of {}: {}", rule.of, rule.holds);
    }
    for document in [json!(["10.0.0.1:80"]), json!([])]
        .map(|endpoints| documents::with(spec(), "/versions/0", v1("endpoints", endpoints)))
    {
        assert!(!SERVER.health_check(&document).1.is_empty(), "{document}: never beside a service");
    }
}

/// A status with every field set.
const STATUS: &str = r#"{
    "observedGeneration": 3,
    "conditions": [{"type": "Ready", "status": "True", "observedGeneration": 3, "lastTransitionTime": "2026-11-22T15:13:54Z",
        "reason": "Holding", "message": "step 2 of 3"}],
    "phase": "Progressing", "reason": "Holding", "message": "step 2 of 3", "stable": "v1", "target": "v2",
    "step": {"number": 2, "of": 3, "weight": 25, "holdSeconds": 60, "heldSeconds": 7},
    "weights": "v1 75 %, v2 25 %",
    "verdict": {"outcome": "undecided", "message": "too early", "target": {"version": "v2", "requests": 9,
        "errors": 0}, "stable": {"version": "v1", "requests": 27, "errors": 1}, "evidence": 0.5, "bound": 1000.0, "passEvidence": 1.5, "passBound": 20.0,
        "latency": {"message": "too early", "evidence": 0.1, "bound": 2000.0}},
    "services": [{"name": "checkout.shop", "rollout": "checkout.shop", "number": 3, "phase": "Progressing", "reason": "Holding",
        "paused": false, "stable": "v1", "target": "v2", "steps": [{"weight": 25, "holdSeconds": 60, "pause": false,
            "matches": 0}], "step": {"number": 2, "of": 3, "weight": 25, "holdSeconds": 60}, "deadline": "2026-11-22T15:13:54Z",
        "message": "step 2 of 3", "since": "2026-11-22T15:13:54Z", "unrouted": 0, "versions": [{"name": "v2", "weight": 25.5,
            "serving": true, "endpoints": {"ready": 1, "listed": 2, "notReady": [{"endpoint": "10.0.0.1:80",
                "reason": "not ready"}]}, "requests": {"ok": 9, "error": 0, "clientError": 0, "cancelled": 0}, "inFlight": 1,
            "drain": {"state": "Serving", "inFlight": 1, "since": "2026-11-22T15:13:54Z", "message": "given requests"}}]}]
}"#;

#[test]
fn nothing_of_a_status_is_lost_or_refused() {
    let status: TrafficShiftStatus = serde_json::from_str(STATUS).unwrap();
    let mut document = documents::document(documents::spec());
    document["status"] = serde_json::to_value(status).unwrap();
    assert_eq!(document["status"], serde_json::from_str::<Value>(STATUS).unwrap());
    assert_eq!(SERVER.take(&document).map(|kept| kept["status"].clone()), Ok(document["status"].clone()));
    // Written by a controller with other reasons.
    document["status"]["reason"] = json!("Unheard");
    document["status"]["services"] = json!([{"name": "checkout.shop"}]);
    assert!(SERVER.take(&document).is_ok());
}

#[test]
fn lists_that_rules_go_over_have_an_end() {
    fn look(schema: &Value, path: &str, endless: &mut Vec<String>) {
        let has_rules = |schema: &Value| schema.to_string().contains("x-kubernetes-validations");
        if schema["type"] == "array" && has_rules(&schema["items"]) && schema["maxItems"].is_null() {
            endless.push(path.to_owned());
        }
        for (name, field) in schema.as_object().into_iter().flatten() {
            look(field, &format!("{path}.{name}"), endless);
        }
    }
    let mut endless = Vec::new();
    look(&object_schema(), "", &mut endless);
    assert_eq!(endless, [""; 0]);
}

/// Values of which each schema of a text accepts some and rejects others.
const TEXTS: &[&str] = &[
    "",
    "a",
    "v1",
    "v2",
    "old",
    "new",
    "A",
    "a b",
    "/",
    "/a",
    "/a?b",
    "GET",
    "x-tideshift-a",
    "X-Tideshift-B",
    "0%",
    "25%",
    "500-599",
    "599-500",
    "404",
    "http://a",
    "https://a.b:1/c?d",
    "127.0.0.1:80",
    "[::1]:80",
    "::1",
    "a:1",
    "apps/v1",
    "Deployment",
    "*.a.example",
];
const NUMBERS: &[i64] = &[0, 1, 2, 5, 10, 100, 300, 404, 599, 600, 1_000_000];

/// The examples that match a schema of a text or a number.
fn examples(schema: &Value) -> Vec<Value> {
    static KNOWN: Mutex<BTreeMap<String, Vec<Value>>> = Mutex::new(BTreeMap::new());
    let make = || {
        let validator = jsonschema::validator_for(schema).unwrap();
        let of_every_kind = || TEXTS.iter().map(|text| json!(text)).chain(NUMBERS.iter().map(|number| json!(number)));
        let made: Vec<Value> = match (schema["enum"].as_array(), schema["type"].as_str()) {
            (Some(words), _) => words.clone(),
            (_, Some("number")) => vec![schema["minimum"].clone(), schema["maximum"].clone()],
            (_, Some("boolean")) => vec![json!(true), json!(false)],
            _ => of_every_kind().filter(|value| validator.is_valid(value)).collect(),
        };
        assert!(!made.is_empty(), "no example for {schema}");
        made
    };
    KNOWN.lock().unwrap().entry(schema.to_string()).or_insert_with(make).clone()
}

/// A random value that matches the schema.
fn some_value(schema: &Value, random: &mut fastrand::Rng, often: f64) -> Value {
    match schema["type"].as_str() {
        Some("object") => {
            let mut fields = Map::new();
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                let is_required = schema["required"].as_array().is_some_and(|required| required.contains(&json!(name)));
                if is_required || random.f64() < often {
                    fields.insert(name.clone(), some_value(field, random, often));
                }
            }
            if schema["additionalProperties"].is_object() && random.bool() {
                fields.insert("a".to_owned(), some_value(&schema["additionalProperties"], random, often));
            }
            fields.into()
        }
        Some("array") => {
            // `documents::agree` checks that hostnames are unique, since that also involves other documents.
            let most =
                if schema["x-kubernetes-list-type"] == "set" { 1 } else { schema["maxItems"].as_u64().unwrap_or(3) };
            let count = random.u64(schema["minItems"].as_u64().unwrap_or(0)..=most.min(3));
            (0..count).map(|_| some_value(&schema["items"], random, often)).collect()
        }
        _ => random.choice(examples(schema)).unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// For documents that match the schema, the rules and the reader agree.
    #[test]
    fn the_rules_say_what_the_reader_says(seed: u64, several: bool, often in prop::sample::select(vec![0.1, 0.3, 0.6])) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut document = documents::document(if several { documents::services() } else { documents::spec() });
        let fields = SERVER.schema["properties"]["spec"]["properties"].as_object().unwrap();
        let (name, field) = random.choice(fields).unwrap();
        document["spec"][name] = some_value(field, &mut random, often);
        let kept = SERVER.take(&document);
        prop_assert_eq!(kept.is_ok(), is_read(&document), "{}\n{:?}\n{:?}", document, kept, TrafficShift::read(&document));
        // In a cluster: the same with discovery for each version.
        let mut here = document.clone();
        let services = here["spec"]["services"].as_array().into_iter().flatten().count();
        for n in 0..services.max(1) {
            let at = if services > 0 { format!("/spec/services/{n}/versions") } else { "/spec/versions".to_owned() };
            let versions = here.pointer_mut(&at).and_then(Value::as_array_mut);
            versions.into_iter().flatten().for_each(|version| _ = version.as_object_mut().and_then(|version| version.remove("endpoints")));
        }
        prop_assert_eq!(SERVER.health_check(&here).1.is_empty(), is_admitted(&here), "{}\n{:?}", here, SERVER.health_check(&here).1);
        if let Ok(kept) = kept {
            prop_assert_eq!(TrafficShift::read(&document), TrafficShift::read(&kept), "{}\nis kept as\n{}", document, kept);
        }
    }
}
