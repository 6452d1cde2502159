//! Authentication and authorization.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde_json::{Value, json};

/// The identity of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Such as `system:serviceaccount:shop:gateway`.
    pub username: String,
    /// For which audiences a token review accepts the token.
    pub audiences: Vec<String>,
}

/// The action that a user requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The user's name.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
    pub verb: String,
    /// The API group; empty for the core group.
    pub group: String,
    /// The plural, with the subresource: `deployments/scale`.
    pub resource: String,
    /// Empty for cluster-scoped objects, and for all namespaces.
    pub namespace: String,
    /// Empty if the request names no object.
    pub name: String,
}

type Rule = Arc<dyn Fn(&Attempt) -> bool + Send + Sync>;

/// The tokens and the rules.
#[derive(Clone, Default)]
pub(super) struct Access {
    tokens: BTreeMap<String, Identity>,
    /// A request that any of these matches is forbidden.
    forbidden: Vec<Rule>,
}

impl fmt::Debug for Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Access").field("tokens", &self.tokens).field("rules", &self.forbidden.len()).finish()
    }
}

impl Access {
    pub(super) fn add_token(&mut self, token: &str, identity: Identity) {
        self.tokens.insert(token.to_owned(), identity);
    }

    pub(super) fn remove_token(&mut self, token: &str) {
        self.tokens.remove(token);
    }

    pub(super) fn forbid(&mut self, rule: Rule) {
        self.forbidden.push(rule);
    }

    pub(super) fn allow_all(&mut self) {
        self.forbidden.clear();
    }

    /// The name of the user; `None` if the token is unknown.
    pub(super) fn user(&self, authorization: Option<&str>) -> Option<String> {
        let Some(authorization) = authorization else { return Some("system:anonymous".to_owned()) };
        let token = authorization.strip_prefix("Bearer ")?.trim();
        self.tokens.get(token).map(|identity| identity.username.clone())
    }

    pub(super) fn allows(&self, attempt: &Attempt) -> bool {
        !self.forbidden.iter().any(|forbids| forbids(attempt))
    }

    /// Answers a TokenReview, SelfSubjectAccessReview or SubjectAccessReview.
    pub(super) fn review(&self, kind: &str, user: &str, mut review: Value) -> Value {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let spec = &review["spec"];
        review["status"] = if kind == "TokenReview" {
            let asked: Vec<_> = spec["audiences"].as_array().into_iter().flatten().map(text).collect();
            let identity = self.tokens.get(&text(&spec["token"]));
            let accepted = |identity: &Identity| {
                let common: Vec<_> =
                    asked.iter().filter(|audience| identity.audiences.contains(audience)).cloned().collect();
                (asked.is_empty() || !common.is_empty()).then_some(common)
            };
            match identity.and_then(|identity| Some((identity, accepted(identity)?))) {
                Some((identity, audiences)) => json!({
                    "authenticated": true,
                    "user": { "username": identity.username, "uid": identity.username, "groups": ["system:authenticated"] },
                    "audiences": audiences,
                }),
                None => json!({ "authenticated": false, "user": {}, "error": "invalid bearer token" }),
            }
        } else {
            let wanted = &spec["resourceAttributes"];
            let subresource = text(&wanted["subresource"]);
            let slash = if subresource.is_empty() { "" } else { "/" };
            let attempt = Attempt {
                user: if kind == "SubjectAccessReview" { text(&spec["user"]) } else { user.to_owned() },
                verb: text(&wanted["verb"]),
                group: text(&wanted["group"]),
                resource: format!("{}{slash}{subresource}", text(&wanted["resource"])),
                namespace: text(&wanted["namespace"]),
                name: text(&wanted["name"]),
            };
            json!({ "allowed": self.allows(&attempt) })
        };
        review
    }
}
