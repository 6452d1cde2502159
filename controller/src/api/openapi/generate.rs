//! The OpenAPI document, generated from the route table, the request and response types, and the descriptions here.

use crate::api::events::TransitionEvent;
use crate::api::rollouts::{History, Nothing, Promote, Rollback, SetTarget, SetWeight};
use crate::api::{ProblemBody, Route, Services, routes};
use crate::reconciler::series::RolloutSeries;
use crate::status::{DrainStatus, Status};
use axum::http::Method;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema, json_schema};
use serde_json::{Map, Value, json};
use tideshift_core::protocol::report::Report;

/// The description of a route, which the code alone does not contain.
struct Operation {
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    description: &'static str,
    /// Name, schema and description of each query parameter; all are optional.
    query: Vec<(&'static str, Value, &'static str)>,
    body: Option<Schema>,
    /// The successful responses, and those that need a description of their own.
    answers: Vec<(u16, &'static str, Content)>,
}

enum Content {
    Nothing,
    Json(Schema),
    /// One of these content types, chosen by the client.
    Text(&'static [&'static str]),
    ApiError,
}

/// Response schemas and request schemas differ: fields that are optional in requests are always present in responses.
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
            (
                200,
                "The current state of the rollout's services. The change is persisted and published.",
                types.answer::<Services>(),
            ),
            (409, "The command conflicts with the rollout's current state.", Content::ApiError),
        ],
    };
    match (method.as_str(), path) {
        ("GET", "/v1/status") => {
            let answers = vec![(200, "The current status.", types.answer::<Status>())];
            get("getStatus", "status", "Services, versions, rollouts and proxies", "", answers)
        }
        ("GET", "/v1/events") => {
            // Adds the type to the schemas.
            types.answer::<TransitionEvent<'_>>();
            let answers = vec![
                (200, "Server-sent events, until the controller stops.", Content::Text(&["text/event-stream"])),
                (429, "This client has reached its limit of open streams.", Content::ApiError),
                (503, "The limit of open streams is reached, or there is no leader.", Content::ApiError),
            ];
            let description = "`event: status` carries a Status: immediately, after each change (at most four times a second), \
                               and at least once a second. `event: transition` carries a TransitionEvent whenever a \
                               rollout's phase or reason changes. Slow readers miss intermediate statuses. Browsers can \
                               send a token with fetch, but not with EventSource.";
            get("listen", "status", "Stream the status and transitions", description, answers)
        }
        ("GET", "/v1/services/{service}/versions/{version}/drain") => {
            let answers = vec![(200, "The drain status.", types.answer::<DrainStatus>())];
            let description = "`Drained` once every live proxy sends the version no traffic and reports no request of it in \
                               flight; it is withdrawn if a proxy does so again. If no proxy reports, the state is \
                               `Draining` until the deadline. A version that is no longer in any document stays known \
                               until ten minutes after the end of its drain.";
            get("getDrain", "status", "Get the drain status of a version", description, answers)
        }
        ("GET", "/v1/rollouts/{name}/history") => {
            let answers = vec![(200, "The latest transitions, at most 200.", types.answer::<History>())];
            get("getHistory", "rollouts", "Get the history of a rollout", "", answers)
        }
        ("GET", "/v1/rollouts/{name}/series") => {
            let answers = vec![(200, "One sample every two seconds.", types.answer::<RolloutSeries>())];
            let description = "Counts are cumulative, as in the status. The series is kept in memory: it is empty after a \
                               restart and after a change of leader.";
            get("getSeries", "rollouts", "Get the time series of the last 15 minutes", description, answers)
        }
        ("POST", "/v1/rollouts/{name}/promote") => {
            let description = "Skips a pause, the rest of a hold or an undecided verdict; with `full`, all remaining steps. \
                               Returns 409 if a gate on the way has not approved, unless `overrideGates` is set.";
            command("promote", "Promote to the next step", description, types.body::<Promote>(), types)
        }
        ("POST", "/v1/rollouts/{name}/pause") => {
            let description = "If the rollout is already paused, nothing changes (`unchanged`).";
            command("pause", "Pause the rollout", description, types.body::<Nothing>(), types)
        }
        ("POST", "/v1/rollouts/{name}/resume") => {
            command("resume", "Resume after a pause", "", types.body::<Nothing>(), types)
        }
        ("POST", "/v1/rollouts/{name}/abort") => {
            command("abort", "Abort and return to the stable version", "", types.body::<Nothing>(), types)
        }
        ("POST", "/v1/rollouts/{name}/rollback") => {
            let description = "Immediate, as far as that version's endpoints can carry the load. For a version that has never \
                               served, gates apply unless `overrideGates` is set.";
            command("rollback", "Roll back to a version", description, types.body::<Rollback>(), types)
        }
        ("POST", "/v1/rollouts/{name}/set-target") => {
            let description = "Has the same effect as a new target in the document. Supersedes a rollout that is under way. If \
                               the version is already the target or serves all traffic, nothing changes (`unchanged`).";
            command("setTarget", "Start a rollout to a version", description, types.body::<SetTarget>(), types)
        }
        ("POST", "/v1/rollouts/{name}/set-weight") => {
            let description = "Also pauses the rollout. Returns 409 if a gate before that share has not approved, unless `overrideGates`.";
            command("setWeight", "Set the target's share manually", description, types.body::<SetWeight>(), types)
        }
        ("GET", "/v1/shifts/{name}") => {
            let answers = vec![(200, "The document as written, including its secrets.", Content::Json(shift()))];
            get("getShift", "documents", "Get the document in force", "", answers)
        }
        ("PUT", "/v1/shifts/{name}") => Operation {
            id: "putShift",
            tag: "documents",
            summary: "Apply a document",
            description: "Overrides the file's document of the same name until that file changes. The response lists every error \
                          at once, one per line, including conflicts with other documents and exceeded size limits of the \
                          document or its namespace.",
            query: Vec::new(),
            body: Some(shift()),
            answers: vec![
                (
                    200,
                    "The document replaced another one. The current state of its services.",
                    types.answer::<Services>(),
                ),
                (201, "The document is new. The current state of its services.", types.answer::<Services>()),
                (409, "The controller runs in Kubernetes, where documents are resources.", Content::ApiError),
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
                    Content::ApiError,
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
            summary: "Poll for a newer policy",
            description: "Long poll: responds as soon as a newer policy exists, or with 204 after 25 s.",
            query: vec![
                ("proxy", json!({"type": "string"}), "The proxy's id."),
                ("epoch", json!({"type": "string"}), "The `x-tideshift-epoch` of the proxy's current policy."),
                ("after", json!({"type": "integer", "minimum": 0}), "The revision of the proxy's current policy."),
                (
                    "delta",
                    json!({"type": "boolean", "default": false}),
                    "Whether the proxy accepts the changes since that revision instead of the whole policy.",
                ),
            ],
            body: None,
            answers: vec![
                (
                    200,
                    "The policy, or with `delta` possibly only the changes, which have a `base`. The header \
                     `x-tideshift-epoch` names the controller state that the revision belongs to.",
                    Content::Json(policy()),
                ),
                (204, "No newer policy yet; poll again.", Content::Nothing),
                (503, "The controller is stopping.", Content::ApiError),
            ],
        },
        ("POST", "/v1/reports") => Operation {
            id: "report",
            tag: "proxies",
            summary: "Send a proxy's report",
            description: "The policy that the proxy runs, and its counts. Counts are cumulative since the proxy's start, so a lost \
                          or repeated report neither loses nor doubles anything.",
            query: Vec::new(),
            body: types.body::<Report>(),
            answers: vec![(204, "The report is accepted.", Content::Nothing)],
        },
        ("GET", "/metrics") => {
            let kinds = Content::Text(&["text/plain", "application/openmetrics-text"]);
            let answers =
                vec![(200, "Prometheus text format 0.0.4, or OpenMetrics 1.0 if requested with `accept`.", kinds)];
            get("getMetrics", "machines", "Get the controller's metrics", "", answers)
        }
        ("GET", "/healthz") => get(
            "getHealth",
            "machines",
            "Liveness",
            "",
            vec![(200, "The controller runs.", Content::Text(&["text/plain"]))],
        ),
        ("GET", "/readyz") => {
            let answers = vec![
                (200, "The controller is ready.", Content::Text(&["text/plain"])),
                (503, "The controller waits for the first probes.", Content::Text(&["text/plain"])),
            ];
            get("getReadiness", "machines", "Readiness: whether proxies can get a policy", "", answers)
        }
        ("GET", "/v1/openapi.json") => {
            let answers = vec![(200, "This document.", Content::Json(json_schema!({"type": "object"})))];
            get("getOpenApi", "machines", "Get this OpenAPI document", "", answers)
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

/// The schemas of the documents and of the types in a TrafficShift. Rules that span fields exist only in `core`'s
/// readers.
fn documents() -> Map<String, Value> {
    let shift = Value::from(tideshift_core::shift::json_schema::traffic_shift()).to_string();
    let mut shift: Map<String, Value> =
        serde_json::from_str(&shift.replace("#/$defs/", "#/components/schemas/")).expect("it was JSON before");
    shift.remove("$schema");
    let types = shift.remove("$defs").and_then(|mut types| types.as_object_mut().map(std::mem::take));
    let policy = json!({
        "description": "The policy that proxies run.",
        "type": "object",
        "required": ["revision", "services"],
        "properties": {
            "revision": {"type": "integer", "minimum": 0},
            "services": {"type": "array", "items": {"type": "object"}},
            "base": {
                "description": "If present, `services` and `removed` are the changes since this revision; otherwise the policy is complete.",
                "type": "integer", "minimum": 0,
            },
            "removed": {
                "description": "The names of the services that were removed since `base`.",
                "type": "array", "items": {"type": "string"},
            },
        },
    });
    let mut documents = types.unwrap_or_default();
    documents.extend([("TrafficShift".to_owned(), shift.into()), ("Policy".to_owned(), policy)]);
    documents
}

/// Describes a path parameter.
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
            "description": "Errors are `{\"error\": \"...\"}`. With authentication enabled, every request except liveness, \
                            readiness and this document needs a token. Without it, the controller serves only clients on \
                            the same machine. Bodies are JSON, with the content type application/json.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": env!("CARGO_PKG_VERSION"),
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "status", "description": "The current state."},
            {"name": "rollouts", "description": "Moving traffic from one version to another."},
            {"name": "documents", "description": "The desired state."},
            {"name": "proxies", "description": "Policies and reports of the filter."},
            {"name": "machines", "description": "For monitoring and tools."},
        ],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Problem": {
                "description": "Why the request failed.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }},
            "securitySchemes": {
                "read": scheme("Read-only access."),
                "operate": scheme("All user actions, reading included."),
                "proxy": scheme("Policies and reports only."),
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
                Content::ApiError => problem(what),
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
        also(body || named || !self.query.is_empty(), 400, "Malformed request.");
        also(guarded, 401, "No token, or an unknown one.");
        also(
            guarded,
            403,
            "The token lacks the permission, or, without authentication, the request comes from a web page.",
        );
        also(named, 404, "Not found.");
        also(body, 408, "The body arrived too slowly.");
        also(body, 413, "The body is too large.");
        also(body, 415, "The content type is not application/json.");
        // Only the leader serves these.
        also(!route.by_all, 502, "This replica is not the leader, and the leader is unreachable.");
        let done = body && guarded && self.tag != "proxies";
        also(done, 503, "The controller is stopping and may not have applied the change, or there is no leader.");
        also(!route.by_all, 503, "There is no leader.");
        responses
    }
}
