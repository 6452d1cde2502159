//! Error responses: Kubernetes' `Status` objects, with the codes, reasons and messages of a real API server.

use serde_json::{Value, json};

use super::kinds::Kind;

/// A refused request.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The HTTP status.
    pub code: u16,
    /// The machine's word for it, such as `NotFound`.
    pub reason: &'static str,
    /// The sentence for people.
    pub message: String,
    details: Value,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}: {}", self.code, self.reason, self.message)
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: json!({}) }
    }

    fn about(mut self, kind: &Kind, name: &str) -> Self {
        self.details = json!({ "group": kind.group, "kind": kind.plural, "name": name });
        self
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// Real servers have no word for this one.
    pub(super) fn versioned_before_it_is_there() -> Self {
        Self::new(500, "", "resourceVersion should not be set on objects to be created")
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, "Forbidden", message)
    }

    /// The path names no resource that is served: an API group or a CRD that is not installed.
    pub(super) fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    pub(super) fn not_found(kind: &Kind, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} {name:?} not found", kind.resource())).about(kind, name)
    }

    pub(super) fn no_such_method() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", message)
    }

    pub(super) fn already_exists(kind: &Kind, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} {name:?} already exists", kind.resource())).about(kind, name)
    }

    pub(super) fn conflict(kind: &Kind, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {name:?}: {why}", kind.resource());
        Self::new(409, "Conflict", message).about(kind, name)
    }

    /// The object has another resourceVersion by now.
    pub(super) fn stale(kind: &Kind, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(kind, name, why)
    }

    /// Server-side apply: `owned` are the managers and the fields of theirs that would change.
    pub(super) fn owned_by_others(owned: &[(String, String)]) -> Self {
        let cause = |(manager, field): &(String, String)| {
            let message = format!("conflict with {manager}");
            json!({ "reason": "FieldManagerConflict", "message": message, "field": field })
        };
        let named: Vec<_> = owned.iter().map(|(manager, field)| format!("conflict with {manager}: {field}")).collect();
        let s = if owned.len() == 1 { "" } else { "s" };
        let message = format!("Apply failed with {} conflict{s}: {}", owned.len(), named.join("; "));
        let mut refusal = Self::new(409, "Conflict", message);
        refusal.details = json!({ "causes": owned.iter().map(cause).collect::<Vec<_>>() });
        refusal
    }

    /// The resourceVersion has been compacted away.
    pub(super) fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    pub(super) fn unsupported(content_type: &str) -> Self {
        let message = format!("the body of the request was in an unknown format: {content_type:?}");
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// `causes` are fields and what is wrong with them.
    pub(super) fn invalid(kind: &Kind, name: &str, causes: &[(String, String)]) -> Self {
        let all: Vec<_> = causes.iter().map(|(field, wrong)| format!("{field}: {wrong}")).collect();
        let message = format!("{}.{} {name:?} is invalid: {}", kind.kind, kind.group, all.join(", "));
        let mut refusal = Self::new(422, "Invalid", message).about(kind, name);
        let cause = |(field, wrong): &(String, String)| json!({ "reason": "FieldValueInvalid", "message": wrong, "field": field });
        refusal.details["causes"] = causes.iter().map(cause).collect();
        refusal
    }

    /// The resourceVersion is one that this server has not reached.
    pub(super) fn too_large(asked: u64, current: u64) -> Self {
        let mut refusal = Self::new(504, "Timeout", format!("Too large resource version: {asked}, current: {current}"));
        let cause = json!({ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" });
        refusal.details = json!({ "causes": [cause], "retryAfterSeconds": 1 });
        refusal
    }

    /// The answer's body, and the object of a watch's `ERROR` event.
    pub(super) fn to_status(&self) -> Value {
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        })
    }
}
