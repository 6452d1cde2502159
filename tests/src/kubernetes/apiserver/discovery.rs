//! Discovery: groups, versions, resources, and the server's own version.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::kinds::Kind;
use super::refusal::Refusal;
use super::store::Store;

/// Answers a path that names no resource.
pub(super) fn answer(store: &Store, segments: &[String]) -> Result<Value, Refusal> {
    let parts: Vec<_> = segments.iter().map(String::as_str).collect();
    match parts.as_slice() {
        ["healthz" | "livez" | "readyz"] => Ok("ok".into()),
        ["version"] => Ok(
            json!({ "major": "1", "minor": "36", "gitVersion": "v1.36.0+tideshift-tests", "platform": "linux/amd64" }),
        ),
        ["api"] => Ok(json!({ "kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [] })),
        ["apis"] => {
            let all: Vec<_> = groups(store).iter().map(|(name, versions)| group(name, versions)).collect();
            Ok(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": all }))
        }
        ["apis", name] => {
            let groups = groups(store);
            let mut found = group(name, groups.get(*name).ok_or_else(Refusal::no_such_path)?);
            (found["kind"], found["apiVersion"]) = ("APIGroup".into(), "v1".into());
            Ok(found)
        }
        ["api", version] => resources(store, "", version),
        ["apis", group, version] => resources(store, group, version),
        ["openapi", "v3"] => {
            let path = |kind: &Kind| match kind.group.as_str() {
                "" => format!("api/{}", kind.version),
                group => format!("apis/{group}/{}", kind.version),
            };
            let paths: BTreeMap<_, _> = store
                .kinds()
                .map(|kind| (path(kind), json!({ "serverRelativeURL": format!("/openapi/v3/{}", path(kind)) })))
                .collect();
            Ok(json!({ "paths": paths }))
        }
        ["openapi", "v3", "api", version] => Ok(openapi(store, "", version)),
        ["openapi", "v3", "apis", group, version] => Ok(openapi(store, group, version)),
        _ => Err(Refusal::no_such_path()),
    }
}

/// The versions of each group but the core one.
fn groups(store: &Store) -> BTreeMap<String, Vec<String>> {
    let mut groups = BTreeMap::<_, Vec<_>>::new();
    for kind in store.kinds().filter(|kind| !kind.group.is_empty()) {
        let versions = groups.entry(kind.group.clone()).or_default();
        if !versions.contains(&kind.version) {
            versions.push(kind.version.clone());
        }
    }
    groups
}

fn group(name: &str, versions: &[String]) -> Value {
    let version = |version: &String| json!({ "groupVersion": format!("{name}/{version}"), "version": version });
    let versions: Vec<_> = versions.iter().map(version).collect();
    json!({ "name": name, "versions": versions, "preferredVersion": versions.first() })
}

fn of<'a>(store: &'a Store, group: &'a str, version: &'a str) -> impl Iterator<Item = &'a Kind> {
    store.kinds().map(|kind| &**kind).filter(move |kind| kind.group == group && kind.version == version)
}

fn resources(store: &Store, group: &str, version: &str) -> Result<Value, Refusal> {
    let mut resources = Vec::new();
    for kind in of(store, group, version) {
        let verbs = match kind.review() {
            true => json!(["create"]),
            false => json!(["create", "delete", "get", "list", "patch", "update", "watch"]),
        };
        resources.push(json!({
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": verbs,
            "shortNames": kind.short_names,
        }));
        let mut subresource = |name: &str, described: &str| {
            resources.push(json!({
                "name": format!("{}/{name}", kind.plural),
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": described,
                "verbs": ["get", "patch", "update"],
            }));
        };
        if kind.status {
            subresource("status", &kind.kind);
        }
        if kind.scale.is_some() {
            subresource("scale", "Scale");
        }
    }
    if resources.is_empty() {
        return Err(Refusal::no_such_path());
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources }))
}

/// As much of an OpenAPI document as kubectl wants before it lets the server check fields.
fn openapi(store: &Store, group: &str, version: &str) -> Value {
    let path = |kind: &Kind| {
        let prefix = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        let namespace = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let operation = json!({
            "parameters": [{ "name": "fieldValidation", "in": "query", "schema": { "type": "string" } }],
            "responses": {},
            "x-kubernetes-group-version-kind": { "group": group, "version": version, "kind": kind.kind },
        });
        (format!("{prefix}{namespace}/{}/{{name}}", kind.plural), json!({ "patch": operation }))
    };
    let paths: serde_json::Map<_, _> = of(store, group, version).map(path).collect();
    json!({ "openapi": "3.0.0", "info": { "title": "Tideshift's tests", "version": "v1.36.0" }, "paths": paths })
}
