//! TrafficShift as a CustomResourceDefinition: `core`'s schema of the document in the structural form of Kubernetes,
//! with bounds for every list and CEL rules for constraints across fields. The API server therefore rejects an invalid
//! document when it is written, without a webhook. The reader of documents validates again and reports in `status`.
//!
//! The YAML is committed. After changing it or the types run `UPDATE_GOLDEN=1 cargo test -p tideshift kubernetes`.

use crate::kubernetes::status::TrafficShiftStatus;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use tideshift_core::shift::json_schema;

/// The API group.
pub const GROUP: &str = "tideshift.dev";
/// The API version.
pub const VERSION: &str = "v1alpha1";
/// The plural name, used in URLs.
pub const PLURAL: &str = "trafficshifts";

/// The CustomResourceDefinition.
pub fn definition() -> Value {
    let column = |name: &str, path: &str, description: &str| json!({"name": name, "type": "string", "jsonPath": path, "description": description});
    let mut message = column("Message", ".status.message", "Why it is in this phase.");
    message["priority"] = json!(1);
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{PLURAL}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": tideshift_core::shift::KIND,
                "listKind": format!("{}List", tideshift_core::shift::KIND),
                "plural": PLURAL,
                "singular": "trafficshift",
                "shortNames": ["tsh"],
                "categories": ["all"],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": [
                    column("Stable", ".status.stable", "The version that serves what the target does not."),
                    column("Target", ".status.target", "The version that traffic moves to."),
                    column("Phase", ".status.phase", "Where the rollout stands."),
                    column("Weights", ".status.weights", "The versions' shares."),
                    message,
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                ],
                "schema": {"openAPIV3Schema": object_schema()},
            }],
        },
    })
}

/// The CustomResourceDefinition as YAML.
///
/// # Errors
///
/// None known: the definition contains only texts, numbers, lists and objects.
pub fn yaml() -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(&definition())
}

/// The schema of the whole object.
fn object_schema() -> Value {
    let mut schema = Value::from(json_schema::traffic_shift());
    let mut types = schema["$defs"].take();
    for (kind, field, bounds) in bounds() {
        merge(&mut types[kind]["properties"][field], bounds);
    }
    for rule in RULES.iter().chain(CLUSTER_RULES) {
        if let Value::Object(kind) = &mut types[rule.of] {
            let rules = kind.entry("x-kubernetes-validations").or_insert_with(|| json!([]));
            rules.as_array_mut().into_iter().for_each(|rules| rules.push(rule.written()));
        }
    }
    json!({
        "description": schema["description"],
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(&schema["properties"]["spec"], &types),
            "status": status_schema(),
        },
    })
}

/// The schema of `status`. It is permissive: a status that a newer or older controller has written must not prevent
/// users from changing their documents.
fn status_schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let status = generator.subschema_for::<TrafficShiftStatus>();
    let mut types = Value::Object(generator.take_definitions(true));
    for (name, kind) in types.as_object_mut().into_iter().flatten() {
        if let Some(kind) = kind.as_object_mut().filter(|_| name != "Condition") {
            kind.remove("required");
        }
    }
    let by_type = json!({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]});
    merge(&mut types["TrafficShiftStatus"]["properties"]["conditions"], by_type);
    let mut status = structural(&status.into(), &types);
    without_enums(&mut status);
    status
}

/// Merges `more` into a schema.
fn merge(schema: &mut Value, more: Value) {
    match (schema, more) {
        (Value::Object(schema), Value::Object(more)) => {
            more.into_iter().for_each(|(keyword, value)| merge(schema.entry(keyword).or_insert(Value::Null), value));
        }
        (schema, more) => *schema = more,
    }
}

fn without_enums(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("enum").is_some_and(Value::is_array) {
                fields.remove("enum");
            }
            fields.values_mut().for_each(without_enums);
        }
        Value::Array(items) => items.iter_mut().for_each(without_enums),
        _ => {}
    }
}

/// Converts a JSON Schema to a structural schema: without references, with one type or "int or string", alternatives of
/// constants as `enum`, and nothing about unknown fields, which the API server handles by its own rules.
fn structural(schema: &Value, types: &Value) -> Value {
    let Value::Object(own) = schema else { return schema.clone() };
    let mut fields = Map::new();
    if let Some(name) = own.get("$ref").and_then(Value::as_str).and_then(|path| path.rsplit('/').next())
        && let Value::Object(referred) = structural(&types[name], types)
    {
        fields = referred;
    }
    for (keyword, value) in own {
        let (keyword, value) = match (keyword.as_str(), value) {
            ("$ref", _) | ("additionalProperties", Value::Bool(_)) => continue,
            ("format", Value::String(format)) if format.starts_with("uint") => continue,
            ("properties", Value::Object(properties)) => {
                let property = |(name, schema): (&String, _)| (name.clone(), structural(schema, types));
                ("properties", Value::Object(properties.iter().map(property).collect()))
            }
            ("items" | "additionalProperties", schema) => (keyword.as_str(), structural(schema, types)),
            ("description", Value::String(text)) => ("description", text.replace('\n', " ").into()),
            ("type", Value::Array(kinds)) => match kinds.iter().find(|kind| *kind != "null") {
                Some(kind) if !kinds.contains(&json!("string")) || kind == "string" => ("type", kind.clone()),
                _ => ("x-kubernetes-int-or-string", json!(true)),
            },
            ("anyOf", Value::Array(alternatives)) => {
                let other = alternatives.iter().find(|alternative| alternative["type"] != "null");
                if let Some(Value::Object(other)) = other.map(|other| structural(other, types)) {
                    other.into_iter().for_each(|(keyword, value)| {
                        fields.entry(keyword).or_insert(value);
                    });
                }
                continue;
            }
            ("oneOf", Value::Array(choices)) => {
                fields.insert("type".to_owned(), json!("string"));
                ("enum", choices.iter().map(|choice| choice["const"].clone()).collect())
            }
            (keyword, value) => (keyword, value.clone()),
        };
        fields.insert(keyword.to_owned(), value);
    }
    Value::Object(fields)
}

/// Bounds of lists and texts, from which the API server estimates the cost of the CEL rules, and the merge strategy of
/// lists: type, field and schema.
fn bounds() -> impl Iterator<Item = (&'static str, &'static str, Value)> {
    let most = |most: u32| json!({"maxItems": most});
    let named =
        |most: u32| json!({"maxItems": most, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]});
    let set = |most: u32| json!({"maxItems": most, "x-kubernetes-list-type": "set"});
    let long = |most: u32| json!({"maxLength": most});
    let ranges = || json!({"maxItems": 32, "items": {"maxLength": 16}});
    let of_service = ["TrafficShiftSpec", "ShiftService"]
        .into_iter()
        .flat_map(move |kind| [(kind, "versions", named(32)), (kind, "hostnames", set(32)), (kind, "rules", most(16))]);
    of_service.chain([
        ("TrafficShiftSpec", "services", named(128)),
        ("TrafficShiftSpec", "webhooks", named(20)),
        ("ShiftVersion", "endpoints", set(1_000)),
        ("LabelSelector", "matchExpressions", most(32)),
        ("LabelRequirement", "values", most(64)),
        ("Rule", "name", long(63)),
        ("Rule", "matches", most(16)),
        ("Rule", "versions", named(32)),
        ("Match", "headers", most(8)),
        ("Match", "cookies", most(8)),
        ("Match", "queryParams", most(8)),
        ("HeaderMatch", "name", long(64)),
        ("HeaderMatch", "value", long(4_096)),
        ("CookieMatch", "name", long(256)),
        ("CookieMatch", "value", long(4_096)),
        ("QueryParamMatch", "name", long(256)),
        ("QueryParamMatch", "value", long(4_096)),
        ("PathMatch", "value", long(256)),
        ("Session", "name", long(128)),
        ("ErrorCodes", "statusCodes", ranges()),
        ("ErrorCodes", "grpcStatusCodes", most(16)),
        ("Strategy", "steps", most(100)),
        ("Step", "matches", most(16)),
        ("BlueGreen", "previewMatches", most(16)),
        ("WarmUpRequests", "statusCodes", ranges()),
        ("Webhook", "steps", most(100)),
    ])
}

/// A rule across fields.
struct Rule {
    /// The type that it applies to.
    of: &'static str,
    /// The field that errors refer to, with a leading dot, or empty.
    about: &'static str,
    /// The CEL condition on `self`.
    holds: &'static str,
    /// The expectation that the error names.
    expected: &'static str,
}

impl Rule {
    fn written(&self) -> Value {
        let mut rule = json!({"rule": self.holds, "message": format!("expected {}", self.expected)});
        if !self.about.is_empty() {
            rule["fieldPath"] = self.about.into();
        }
        rule
    }
}

/// The names of all versions.
macro_rules! names {
    () => {
        "(has(self.versions) ? self.versions.map(v, v.name) : self.services[0].versions.map(v, v.name))"
    };
}

const RULES_ARE_OF_VERSIONS: &str = "!has(self.rules) || !has(self.versions) || \
     [self.versions.map(v, v.name)].all(names, self.rules.all(r, r.versions.all(w, w.name in names)))";
const MIRROR_IS_OF_VERSIONS: &str =
    "!has(self.mirror) || !has(self.versions) || self.versions.exists(v, v.name == self.mirror.version)";
const MIRRORS_ARE_OF_VERSIONS: &str = "!has(self.rules) || !has(self.versions) || \
     [self.versions.map(v, v.name)].all(names, self.rules.all(r, !has(r.mirror) || r.mirror.version in names))";
const RULES_HAVE_DIFFERENT_NAMES: &str = "!has(self.rules) || self.rules.all(r, !has(r.name) || \
     self.rules.exists_one(o, has(o.name) && o.name == r.name))";
const HAS_A_VALUE: &str = "has(self.value) == (self.type != 'Present')";
const RANGES_GO_UP: &str = "!has(self.statusCodes) || self.statusCodes.all(c, type(c) == int || !c.contains('-') || \
     c.split('-')[0].trim() <= c.split('-')[1].trim())";

/// The rules. The cost of a rule on a type within lists is multiplied by the maximum length of the lists. Fields with a
/// default are always present.
#[rustfmt::skip]
const RULES: &[Rule] = &[
    Rule { of: "TrafficShiftSpec", about: "", holds: "has(self.versions) != has(self.services)",
        expected: "either versions, or services with versions of their own" },
    Rule { of: "TrafficShiftSpec", about: "", holds: "!has(self.services) || !(has(self.hostnames) || has(self.rules) || \
        has(self.session) || has(self.errors) || has(self.mirror) || has(self.guard) || has(self.capacity) || has(self.timeoutSeconds))",
        expected: "hostnames, rules, session, errors, mirror, guard, capacity and timeoutSeconds within each of the services" },
    Rule { of: "TrafficShiftSpec", about: ".stable", holds: concat!("has(self.versions) == has(self.services) || self.stable in ", names!()),
        expected: "the name of one of the versions" },
    Rule { of: "TrafficShiftSpec", about: ".target", holds: concat!("!has(self.target) || has(self.versions) == has(self.services) || self.target in ", names!()),
        expected: "the name of one of the versions" },
    Rule { of: "TrafficShiftSpec", about: ".services", holds: "!has(self.services) || self.services.all(s, \
        size(s.versions) == size(self.services[0].versions) && \
        s.versions.all(v, self.services[0].versions.exists(w, w.name == v.name)))",
        expected: "the same versions in all services, since all move together" },
    Rule { of: "TrafficShiftSpec", about: ".rules", holds: RULES_ARE_OF_VERSIONS, expected: "rules for versions of this service" },
    Rule { of: "TrafficShiftSpec", about: ".rules", holds: RULES_HAVE_DIFFERENT_NAMES, expected: "rules of different names" },
    Rule { of: "TrafficShiftSpec", about: ".rules", holds: MIRRORS_ARE_OF_VERSIONS, expected: "mirrors that are versions of this service" },
    Rule { of: "TrafficShiftSpec", about: ".mirror", holds: MIRROR_IS_OF_VERSIONS, expected: "a mirror that is a version of this service" },
    Rule { of: "ShiftService", about: ".rules", holds: RULES_ARE_OF_VERSIONS, expected: "rules for versions of this service" },
    Rule { of: "ShiftService", about: ".rules", holds: RULES_HAVE_DIFFERENT_NAMES, expected: "rules of different names" },
    Rule { of: "ShiftService", about: ".rules", holds: MIRRORS_ARE_OF_VERSIONS, expected: "mirrors that are versions of this service" },
    Rule { of: "ShiftService", about: ".mirror", holds: MIRROR_IS_OF_VERSIONS, expected: "a mirror that is a version of this service" },

    Rule { of: "ShiftVersion", about: "", holds: "!has(self.endpoints) || !(has(self.service) || has(self.selector))",
        expected: "either endpoints or, in Kubernetes, service and selector" },
    Rule { of: "ShiftVersion", about: ".port", holds: "!has(self.port) || has(self.service) || has(self.selector)",
        expected: "service or selector beside port" },
    Rule { of: "ShiftVersion", about: ".cluster", holds: "!has(self.cluster) || has(self.service) || has(self.selector) || has(self.workloadRef)",
        expected: "service or selector beside cluster" },
    Rule { of: "LabelSelector", about: "", holds: "(has(self.matchLabels) && size(self.matchLabels) > 0) || \
        (has(self.matchExpressions) && size(self.matchExpressions) > 0)",
        expected: "at least one of matchLabels, matchExpressions (an empty selector would select every pod)" },
    Rule { of: "LabelRequirement", about: "", holds: "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
        expected: "values with the operators In and NotIn, and none with Exists and DoesNotExist" },
    Rule { of: "Probe", about: "", holds: "[has(self.httpGet), has(self.tcpSocket), has(self.exec), has(self.grpc)].exists_one(h, h)",
        expected: "exactly one of httpGet, tcpSocket, exec, grpc" },
    Rule { of: "Probe", about: "", holds: "!has(self.periodSeconds) || !has(self.periodMillis)",
        expected: "either periodSeconds or periodMillis" },

    Rule { of: "HeaderMatch", about: ".name", holds: "!self.name.lowerAscii().startsWith('x-tideshift-')",
        expected: "a header that does not start with x-tideshift-, since the filter removes those" },
    Rule { of: "HeaderMatch", about: "", holds: HAS_A_VALUE, expected: "a value, unless the type is Present" },
    Rule { of: "CookieMatch", about: "", holds: HAS_A_VALUE, expected: "a value, unless the type is Present" },
    Rule { of: "QueryParamMatch", about: "", holds: HAS_A_VALUE, expected: "a value, unless the type is Present" },
    Rule { of: "PathMatch", about: ".value", holds: "self.type == 'RegularExpression' || \
        (self.value.startsWith('/') && !self.value.contains('?') && !self.value.contains('#'))",
        expected: "a path that starts with / and has no query" },

    Rule { of: "Session", about: ".name", holds: "self.type != 'Header' || !self.name.lowerAscii().startsWith('x-tideshift-')",
        expected: "a header that does not start with x-tideshift-, since the filter removes those" },
    Rule { of: "Session", about: ".ttlSeconds", holds: "self.type == 'Cookie' || !has(self.ttlSeconds)",
        expected: "ttlSeconds only with type Cookie" },
    Rule { of: "ErrorCodes", about: ".statusCodes", holds: RANGES_GO_UP, expected: "ranges from a lower to a higher status" },
    Rule { of: "GuardPolicy", about: ".maxCoolDownSeconds", holds: "!has(self.maxCoolDownSeconds) || self.maxCoolDownSeconds >= self.coolDownSeconds",
        expected: "at least coolDownSeconds" },

    Rule { of: "Strategy", about: "", holds: "!has(self.steps) || !has(self.blueGreen)", expected: "either steps or blueGreen" },
    Rule { of: "Strategy", about: ".maxUnavailable", holds: "[self.maxSurge, self.maxUnavailable].exists(q, \
        type(q) == int ? q > 0 : q.matches('[1-9]'))", expected: "above 0 where maxSurge is 0" },
    Rule { of: "Strategy", about: ".progressDeadlineSeconds", holds: "self.progressDeadlineSeconds > self.minReadySeconds",
        expected: "more than minReadySeconds" },
    Rule { of: "Step", about: ".weight", holds: "has(self.weight) || has(self.matches) || self.pause",
        expected: "the target's share in percent, 0 to 100 (or pause: true, or matches)" },
    Rule { of: "WarmUp", about: ".seconds", holds: "!has(self.mirrorPercent) || self.seconds > 0",
        expected: "for how long the target gets copies of requests, since there is mirrorPercent" },
    Rule { of: "WarmUpRequests", about: ".statusCodes", holds: RANGES_GO_UP, expected: "ranges from a lower to a higher status" },
    Rule { of: "Session", about: ".secretRef", holds: "!has(self.secret) || !has(self.secretRef)", expected: "either secret or secretRef" },
    Rule { of: "Webhook", about: "", holds: "has(self.url) != has(self.urlSecretRef)", expected: "either url or urlSecretRef" },
    Rule { of: "Webhook", about: "", holds: "[has(self.secret), has(self.secretFile), has(self.secretRef)].filter(s, s).size() <= 1",
        expected: "one of secret, secretFile and secretRef" },
    Rule { of: "Webhook", about: "", holds: "self.type == 'Gate' || !(has(self.steps) || has(self.periodSeconds))",
        expected: "steps and periodSeconds only with type Gate" },
    Rule { of: "Webhook", about: "", holds: "self.type == 'Notification' || !(has(self.phases) || has(self.retries) || has(self.format))",
        expected: "phases, retries and format only with type Notification" },
];

/// Rules that apply only in clusters ([`crate::kubernetes::admission`]).
#[rustfmt::skip]
const CLUSTER_RULES: &[Rule] = &[
    Rule { of: "ShiftVersion", about: ".endpoints", holds: "!has(self.endpoints) || size(self.endpoints) == 0",
        expected: "service, selector or workloadRef in a cluster, where the controller sends requests to pods of the document's namespace alone" },
    Rule { of: "HttpGet", about: ".host", holds: "!has(self.host)",
        expected: "no host in a cluster, where probes go to the pod's own address (a Host among httpHeaders may say another name)" },
    Rule { of: "TcpSocket", about: ".host", holds: "!has(self.host)",
        expected: "no host in a cluster, where probes go to the pod's own address" },
    Rule { of: "Probe", about: ".exec", holds: "!has(self.exec)",
        expected: "no exec in a cluster, as it runs a command on the controller's machine" },
    Rule { of: "Probe", about: ".periodMillis", holds: "!has(self.periodMillis) || self.periodMillis >= 1000",
        expected: "1000 or more in a cluster" },
    Rule { of: "Webhook", about: ".secretFile", holds: "!has(self.secretFile)",
        expected: "no secretFile in a cluster, as it names a file of the controller's machine" },
];

#[cfg(test)]
mod tests;
