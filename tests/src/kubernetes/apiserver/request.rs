//! Parses the path and query of a request.

use std::collections::BTreeMap;

use hyper::{Method, Uri};
use url::form_urlencoded;

use super::refusal::Refusal;

/// A query's parameters.
#[derive(Clone, Debug, Default)]
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    fn of(uri: &Uri) -> Self {
        let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
        Self(pairs.into_owned().collect())
    }

    /// Empty if it is not there.
    pub(super) fn get(&self, name: &str) -> &str {
        self.0.get(name).map(String::as_str).unwrap_or_default()
    }

    pub(super) fn is(&self, name: &str) -> bool {
        matches!(self.get(name), "true" | "1")
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        match self.get(name) {
            "" => Ok(None),
            text => {
                text.parse().map(Some).map_err(|_| Refusal::bad_request(format!("{name}: Invalid value: {text:?}")))
            }
        }
    }
}

/// Objects of some kind, one of them, or a subresource of it.
#[derive(Clone, Debug)]
pub(super) struct Resource {
    pub(super) verb: &'static str,
    pub(super) group: String,
    pub(super) version: String,
    /// Empty for what has none, and for all of them.
    pub(super) namespace: String,
    pub(super) plural: String,
    pub(super) name: Option<String>,
    pub(super) subresource: Option<String>,
    pub(super) query: Query,
}

/// The target of a request.
#[derive(Clone, Debug)]
pub(super) enum About {
    Resource(Resource),
    /// Discovery, health, the version: the path's segments.
    Other(Vec<String>),
}

impl About {
    pub(super) fn of(method: &Method, uri: &Uri) -> Self {
        let segments: Vec<_> = uri.path().split('/').filter(|segment| !segment.is_empty()).map(str::to_owned).collect();
        let parts: Vec<_> = segments.iter().map(String::as_str).collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
            ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
            _ => return Self::Other(segments),
        };
        let (namespace, rest) = match rest {
            ["namespaces", _, "status" | "finalize"] => ("", rest),
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (*plural, None, None),
            [plural, name] => (*plural, Some(*name), None),
            [plural, name, subresource] => (*plural, Some(*name), Some(*subresource)),
            _ => return Self::Other(segments),
        };
        let query = Query::of(uri);
        let verb = match (method, name) {
            (&Method::GET, _) if query.is("watch") => "watch",
            (&Method::GET, Some(_)) => "get",
            (&Method::GET, None) => "list",
            (&Method::POST, _) => "create",
            (&Method::PUT, _) => "update",
            (&Method::PATCH, _) => "patch",
            (&Method::DELETE, Some(_)) => "delete",
            (&Method::DELETE, None) => "deletecollection",
            _ => "",
        };
        Self::Resource(Resource {
            verb,
            group: group.to_owned(),
            version: version.to_owned(),
            namespace: namespace.to_owned(),
            plural: plural.to_owned(),
            name: name.map(str::to_owned),
            subresource: subresource.map(str::to_owned),
            query,
        })
    }
}
