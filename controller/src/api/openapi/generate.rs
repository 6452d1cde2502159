//! The OpenAPI document, made from the table of routes, the types of what they take and give, and the words here.

use crate::api::events::TransitionEvent;
use crate::api::rollouts::{History, Nothing, Promote, Rollback, SetTarget, SetWeight};
use crate::api::{ProblemBody, Route, Services, routes};
use crate::series::RolloutSeries;
use crate::status::{DrainStatus, Status};
use axum::http::Method;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema, json_schema};
use serde_json::{Map, Value, json};
use tideshift_core::report::Report;

/// What the code alone does not say of a route.
struct Operation {
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    description: &'static str,
    /// Name, schema, what it means; all optional.
    query: Vec<(&'static str, Value, &'static str)>,
    body: Option<Schema>,
    /// The good answers, and those that need words of their own.
    answers: Vec<(u16, &'static str, Content)>,
}

enum Content {
    Nothing,
    Json(Schema),
    /// One of these kinds of text, as the client likes it.
    Text(&'static [&'static str]),
    Problem,
}

/// What answers hold and what bodies hold are not the same: what may be left out there is always here.
struct Types {
    answers: SchemaGenerator,
    bodies: SchemaGenerator,
}

impl Types {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
            })
        };
        let answers = settings().for_serialize().into_generator();
        Self { answers, bodies: settings().for_deserialize().into_generator() }
    }

    fn answer<T: JsonSchema>(&mut self) -> Content {
        Content::Json(self.answers.subschema_for::<T>())
    }

    fn body<T: JsonSchema>(&mut self) -> Option<Schema> {
        Some(self.bodies.subschema_for::<T>())
    }
}

fn describe(method: &Method, path: &str, types: &mut Types) -> Operation {
    let get = |id, tag, summary, description, answers| Operation {
        id,
        tag,
        summary,
        description,
        query: Vec::new(),
        body: None,
        answers,
    };
    let command = |id, summary, description, body: Option<Schema>, types: &mut Types| Operation {
        id,
        tag: "rollouts",
        summary,
        description,
        query: Vec::new(),
        body,
        answers: vec![
            (200, "The rollout's services as they stand now; it is kept and published.", types.answer::<Services>()),
            (409, "It does not fit how the rollout stands.", Content::Problem),
        ],
    };
    match (method.as_str(), path) {
        ("GET", "/v1/status") => {
            let answers = vec![(200, "How things stand.", types.answer::<Status>())];
            get("getStatus", "status", "Services, versions, rollouts and proxies", "", answers)
        }
        ("GET", "/v1/events") => {
            // So that it is among the types.
            types.answer::<TransitionEvent<'_>>();
            let answers = vec![
                (200, "Server-sent events, until the controller ends.", Content::Text(&["text/event-stream"])),
                (429, "This caller listens as often as it may.", Content::Problem),
                (503, "As many listen as may, or no replica leads at the moment.", Content::Problem),
            ];
            let description = "`event: status` with a Status at once, when it changes (at most four times a second), and at \
                               least once a second; `event: transition` with a TransitionEvent whenever a rollout's phase \
                               or reason changes. Who reads slowly misses statuses in between. Browsers can send a token \
                               with fetch, not with EventSource.";
            get("listen", "status", "The status and what happens, as it happens", description, answers)
        }
        ("GET", "/v1/services/{service}/versions/{version}/drain") => {
            let answers = vec![(200, "How far it is.", types.answer::<DrainStatus>())];
            let description = "`Drained` once every proxy that is there gives it nothing and reports nothing of it in \
                               flight, and not again while one does. Where no proxy reports, it is `Draining` until its \
                               deadline. A version that is in no document any more is known until ten minutes after the \
                               end of its drain.";
            get("getDrain", "status", "How far a version is from being at rest", description, answers)
        }
        ("GET", "/v1/rollouts/{name}/history") => {
            let answers = vec![(200, "The last 200 at most.", types.answer::<History>())];
            get("getHistory", "rollouts", "What has happened to a rollout", "", answers)
        }
        ("GET", "/v1/rollouts/{name}/series") => {
            let answers = vec![(200, "One sample every two seconds.", types.answer::<RolloutSeries>())];
            let description = "Counts are cumulative, as in the status. Kept in memory: after a restart, and on a replica \
                               that has begun to lead, it begins anew.";
            get("getSeries", "rollouts", "What the last 15 minutes were like", description, answers)
        }
        ("POST", "/v1/rollouts/{name}/promote") => {
            let description = "Past a pause, the rest of a hold or an undecided verdict; `full`: straight to the end. 409 if a gate that has not said yes lies \
                               before that, unless `overrideGates`.";
            command("promote", "On to the next step", description, types.body::<Promote>(), types)
        }
        ("POST", "/v1/rollouts/{name}/pause") => {
            let description = "What is paused already stays so (`unchanged`).";
            command("pause", "Stay as it is", description, types.body::<Nothing>(), types)
        }
        ("POST", "/v1/rollouts/{name}/resume") => {
            command("resume", "Go on after a pause", "", types.body::<Nothing>(), types)
        }
        ("POST", "/v1/rollouts/{name}/abort") => {
            command("abort", "Back to the stable version", "", types.body::<Nothing>(), types)
        }
        ("POST", "/v1/rollouts/{name}/rollback") => {
            let description = "At once, as far as that version can carry the load. To a version that has not served yet, gates \
                               have to be overridden (`overrideGates`).";
            command("rollback", "Back to a version", description, types.body::<Rollback>(), types)
        }
        ("POST", "/v1/rollouts/{name}/set-target") => {
            let description = "As if the document said so. A rollout under way is superseded. If that version is the \
                               target already or serves everything, nothing changes (`unchanged`).";
            command("setTarget", "A rollout to a version", description, types.body::<SetTarget>(), types)
        }
        ("POST", "/v1/rollouts/{name}/set-weight") => {
            let description =
                "And pause there. 409 if a gate that has not said yes lies before that share, unless `overrideGates`.";
            command("setWeight", "Set the target's share by hand", description, types.body::<SetWeight>(), types)
        }
        ("GET", "/v1/shifts/{name}") => {
            let answers = vec![(200, "As it was written, with the secrets that it holds.", Content::Json(shift()))];
            get("getShift", "documents", "The document in force", "", answers)
        }
        ("PUT", "/v1/shifts/{name}") => Operation {
            id: "putShift",
            tag: "documents",
            summary: "Put a document in force",
            description: "In place of the file's of the same name, until that file changes. Everything that is wrong with it \
                          is said at once, one error on a line: also what another document claims already, and bytes \
                          beyond what a document or a namespace may have.",
            query: Vec::new(),
            body: Some(shift()),
            answers: vec![
                (200, "It took the place of another; its services as they stand now.", types.answer::<Services>()),
                (201, "It is the first of its name.", types.answer::<Services>()),
                (409, "In Kubernetes, where documents are resources of the cluster.", Content::Problem),
            ],
        },
        ("DELETE", "/v1/shifts/{name}") => {
            let answers = vec![
                (
                    200,
                    "It is gone. Its services, while their weights stay in force, or those of the file's document of the same \
                     name, which is in force again.",
                    types.answer::<Services>(),
                ),
                (
                    409,
                    "It comes from a file; it is gone already and its weights are kept; or in Kubernetes, where documents \
                     are resources of the cluster.",
                    Content::Problem,
                ),
            ];
            let description = "One that was put here before; what a file says is removed in that file. What becomes of its \
                               traffic is for its `onDelete` to say, or for the query. With `onDelete=Drain` it also gives \
                               up the weights that were kept of a document that is gone, in Kubernetes too.";
            let query = vec![(
                "onDelete",
                json!({"type": "string", "enum": ["Keep", "Drain"]}),
                "What becomes of its traffic, in place of what the document says.",
            )];
            Operation { query, ..get("deleteShift", "documents", "Take a document back", description, answers) }
        }
        ("GET", "/v1/policy") => Operation {
            id: "getPolicy",
            tag: "proxies",
            summary: "A policy newer than what the proxy has",
            description: "At once if there is one, else when there is, else 204 after 25 s.",
            query: vec![
                ("proxy", json!({"type": "string"}), "The proxy's id."),
                ("epoch", json!({"type": "string"}), "The `x-tideshift-epoch` that came with the policy that it has."),
                ("after", json!({"type": "integer", "minimum": 0}), "The revision of that policy."),
                (
                    "delta",
                    json!({"type": "boolean", "default": false}),
                    "Whether the proxy takes what has changed since then in place of the whole policy.",
                ),
            ],
            body: None,
            answers: vec![
                (
                    200,
                    "The policy, or with `delta` perhaps what has changed, which has a `base`; `x-tideshift-epoch` names the \
                     state that its revision is of.",
                    Content::Json(policy()),
                ),
                (204, "Nothing newer yet: ask again.", Content::Nothing),
                (503, "The controller ends.", Content::Problem),
            ],
        },
        ("POST", "/v1/reports") => Operation {
            id: "report",
            tag: "proxies",
            summary: "What a proxy runs, and what it has counted",
            description: "Cumulative since the proxy's start, so that a report that is lost or repeated loses and doubles \
                          nothing.",
            query: Vec::new(),
            body: types.body::<Report>(),
            answers: vec![(204, "Taken in.", Content::Nothing)],
        },
        ("GET", "/metrics") => {
            let kinds = Content::Text(&["text/plain", "application/openmetrics-text"]);
            let answers =
                vec![(200, "Prometheus' text format 0.0.4, or OpenMetrics 1.0 where `accept` asks for it.", kinds)];
            get("getMetrics", "machines", "The controller's metrics", "", answers)
        }
        ("GET", "/healthz") => {
            get("getHealth", "machines", "Whether it runs", "", vec![(200, "It does.", Content::Text(&["text/plain"]))])
        }
        ("GET", "/readyz") => {
            let answers = vec![
                (200, "It is.", Content::Text(&["text/plain"])),
                (503, "It waits for the first probes.", Content::Text(&["text/plain"])),
            ];
            get("getReadiness", "machines", "Whether proxies can be given a policy", "", answers)
        }
        ("GET", "/v1/openapi.json") => {
            let answers = vec![(200, "This.", Content::Json(json_schema!({"type": "object"})))];
            get("getOpenApi", "machines", "This document", "", answers)
        }
        _ => panic!("{method} {path}: not described"),
    }
}

fn shift() -> Schema {
    json_schema!({"$ref": "#/components/schemas/TrafficShift"})
}

fn policy() -> Schema {
    json_schema!({"$ref": "#/components/schemas/Policy"})
}

/// The documents, and the types that a TrafficShift is made of. What spans fields, their readers in `core` know alone.
fn documents() -> Map<String, Value> {
    let shift = Value::from(tideshift_core::schema::traffic_shift()).to_string();
    let mut shift: Map<String, Value> =
        serde_json::from_str(&shift.replace("#/$defs/", "#/components/schemas/")).expect("it was JSON before");
    shift.remove("$schema");
    let types = shift.remove("$defs").and_then(|mut types| types.as_object_mut().map(std::mem::take));
    let policy = json!({
        "description": "What proxies run.",
        "type": "object",
        "required": ["revision", "services"],
        "properties": {
            "revision": {"type": "integer", "minimum": 0},
            "services": {"type": "array", "items": {"type": "object"}},
            "base": {
                "description": "The revision that `services` and `removed` are the changes since; left out: it is whole.",
                "type": "integer", "minimum": 0,
            },
            "removed": {
                "description": "The names of the services that are gone since `base`.",
                "type": "array", "items": {"type": "string"},
            },
        },
    });
    let mut documents = types.unwrap_or_default();
    documents.extend([("TrafficShift".to_owned(), shift.into()), ("Policy".to_owned(), policy)]);
    documents
}

/// What the names in paths are.
fn parameter(name: &str, path: &str) -> &'static str {
    match name {
        "service" => "The service's name.",
        "version" => "The version's name.",
        "name" if path.starts_with("/v1/shifts/") => "The document's `metadata.name`.",
        "name" => "The rollout's name, which is its document's `metadata.name`.",
        name => panic!("{path}: {name}: not described"),
    }
}

fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

/// The whole document.
pub(super) fn document() -> Value {
    let mut types = Types::new();
    types.answer::<ProblemBody>();
    let mut paths: Map<String, Value> = Map::new();
    for route in routes() {
        let operation = describe(&route.method, route.path, &mut types);
        let methods = paths.entry(route.path).or_insert_with(|| json!({}));
        methods[route.method.as_str().to_lowercase()] = operation.value(&route);
    }
    let mut schemas = types.bodies.take_definitions(true);
    schemas.extend(types.answers.take_definitions(true));
    for (name, schema) in documents() {
        let taken = schemas.insert(name.clone(), schema);
        assert!(taken.is_none(), "{name}: two types of this name");
    }
    let scheme = |what: &str| json!({"type": "http", "scheme": "bearer", "description": what});
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tideshift's controller",
            "description": "Errors are `{\"error\": \"...\"}`. Where the controller has tokens, every request needs one, except \
                            for health, readiness and this document; where it has none, only programs of the same machine \
                            are answered. Bodies are JSON, and said to be so by their content-type.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": env!("CARGO_PKG_VERSION"),
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "status", "description": "How things stand."},
            {"name": "rollouts", "description": "Moving traffic from one version to another."},
            {"name": "documents", "description": "What is wanted."},
            {"name": "proxies", "description": "What the filter asks for and tells."},
            {"name": "machines", "description": "For those who watch the controller, and for tools."},
        ],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Problem": {
                "description": "Why it was not done.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }},
            "securitySchemes": {
                "read": scheme("To look."),
                "operate": scheme("Everything that a user can do."),
                "proxy": scheme("Policies and reports, nothing else."),
            },
        },
    })
}

impl Operation {
    fn value(self, route: &Route) -> Value {
        let in_path = names(route.path).map(|name| {
            let what = parameter(name, route.path);
            json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}, "description": what})
        });
        let in_query = self
            .query
            .iter()
            .map(|(name, schema, what)| json!({"name": name, "in": "query", "schema": schema, "description": what}));
        let parameters: Vec<Value> = in_path.chain(in_query).collect();
        let mut value = json!({
            "operationId": self.id,
            "tags": [self.tag],
            "summary": self.summary,
            "security": route.allowed.iter().map(|scope| json!({scope.name(): []})).collect::<Vec<_>>(),
            "responses": self.responses(route),
        });
        if !self.description.is_empty() {
            value["description"] = json!(self.description);
        }
        if !parameters.is_empty() {
            value["parameters"] = json!(parameters);
        }
        if let Some(schema) = self.body {
            value["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        }
        value
    }

    fn responses(&self, route: &Route) -> Map<String, Value> {
        let problem = |what: &str| json!({"$ref": "#/components/responses/Problem", "description": what});
        let mut responses = Map::new();
        let text = |kind: &str| (kind.to_owned(), json!({"schema": {"type": "string"}}));
        let texts = |kinds: &[&str]| Value::Object(kinds.iter().map(|kind| text(kind)).collect());
        for (status, what, content) in &self.answers {
            let response = match content {
                Content::Nothing => json!({"description": what}),
                Content::Json(schema) => {
                    json!({"description": what, "content": {"application/json": {"schema": schema}}})
                }
                Content::Text(kinds) => json!({"description": what, "content": texts(kinds)}),
                Content::Problem => problem(what),
            };
            responses.insert(status.to_string(), response);
        }
        let mut also = |condition: bool, status: u16, what: &str| {
            if condition {
                responses.entry(status.to_string()).or_insert_with(|| problem(what));
            }
        };
        let (body, guarded) = (self.body.is_some(), !route.allowed.is_empty());
        let named = names(route.path).next().is_some();
        also(body || named || !self.query.is_empty(), 400, "What was sent makes no sense.");
        also(guarded, 401, "No token, or none that is known.");
        also(guarded, 403, "The token is for something else, or, where there are no tokens, a web page asks.");
        also(named, 404, "There is nothing of that name.");
        also(body, 408, "The body took too long.");
        also(body, 413, "The body is too large.");
        also(body, 415, "The body is not said to be JSON.");
        // Of several replicas only one answers these.
        also(!route.by_all, 502, "This replica does not lead, and the one that does cannot be reached.");
        let done = body && guarded && self.tag != "proxies";
        also(done, 503, "The controller ends; it may not have been done. Or no replica leads at the moment.");
        also(!route.by_all, 503, "No replica leads at the moment.");
        responses
    }
}
