//! Patches: JSON merge patch (RFC 7386), JSON patch (RFC 6902) and Kubernetes' strategic merge patch.

use serde_json::{Map, Value};

use super::kinds::Kind;
use super::refusal::Refusal;
use super::shape::{List, Shape};

/// How a patch is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Json,
    Merge,
    Strategic,
    Apply,
}

impl Type {
    pub(super) fn of(content_type: &str) -> Result<Self, Refusal> {
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Ok(Self::Apply),
            other => Err(Refusal::unsupported(other)),
        }
    }
}

/// The result of a patch other than server-side apply.
pub(super) fn patched(live: &Value, patch: &Value, r#type: Type, kind: &Kind) -> Result<Value, Refusal> {
    let mut object = live.clone();
    match r#type {
        Type::Json => {
            let wrong =
                |error: &dyn std::fmt::Display| Refusal::bad_request(format!("cannot apply the JSON patch: {error}"));
            let patch: json_patch::Patch = serde_json::from_value(patch.clone()).map_err(|error| wrong(&error))?;
            json_patch::patch(&mut object, &patch).map_err(|error| wrong(&error))?;
        }
        Type::Strategic if kind.custom() => return Err(Refusal::unsupported("application/strategic-merge-patch+json")),
        Type::Strategic => strategic(&mut object, patch, Shape::of(kind)),
        Type::Merge | Type::Apply => json_patch::merge(&mut object, patch),
    }
    Ok(object)
}

/// Merges lists by their keys, and follows `$patch`, `$retainKeys` and `$deleteFromPrimitiveList`; the order of lists
/// (`$setElementOrder`) stays as it is.
fn strategic(live: &mut Value, patch: &Value, shape: Shape<'_>) {
    let Value::Object(patch) = patch else {
        patch.clone_into(live);
        return;
    };
    if patch.get("$patch").is_some_and(|directive| directive == "replace") || !live.is_object() {
        *live = Value::Object(Map::new());
    }
    let Value::Object(live) = live else { return };
    if let Some(Value::Array(keys)) = patch.get("$retainKeys") {
        live.retain(|name, _| keys.iter().any(|key| key == name));
    }
    for (name, value) in patch {
        if let Some(list) = name.strip_prefix("$deleteFromPrimitiveList/") {
            if let Some(Value::Array(items)) = live.get_mut(list) {
                items.retain(|item| !value.as_array().is_some_and(|gone| gone.contains(item)));
            }
        } else if name.starts_with('$') {
        } else if value.is_null() {
            live.remove(name);
        } else {
            let shape = shape.field(name);
            let below = live.entry(name.as_str()).or_insert(Value::Null);
            match value {
                Value::Array(items) => strategic_list(below, items, shape),
                value => strategic(below, value, shape),
            }
        }
    }
}

fn strategic_list(live: &mut Value, patch: &[Value], shape: Shape<'_>) {
    let list = shape.list();
    let replaces = patch.iter().any(|item| item["$patch"] == "replace");
    let steps = if replaces { None } else { list.steps(patch) };
    let (Some(steps), true) = (steps, live.is_array() && list != List::Atomic) else {
        *live = patch.iter().filter(|item| item.get("$patch").is_none()).cloned().collect();
        return;
    };
    let Value::Array(live) = live else { return };
    for (item, step) in patch.iter().zip(steps) {
        let there = live.iter().position(|there| list.step(there).as_ref() == Some(&step));
        match (there, item["$patch"] == "delete") {
            (Some(index), true) => _ = live.remove(index),
            (Some(index), false) => {
                if let Some(there) = live.get_mut(index) {
                    strategic(there, item, shape.items());
                }
            }
            (None, true) => {}
            (None, false) => live.push(item.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::kinds;
    use super::*;

    #[test]
    fn a_strategic_merge_patch_merges_containers_by_name() {
        let deployment = kinds::built_in().find(|kind| kind.kind == "Deployment").unwrap();
        let live = json!({ "spec": { "template": { "spec": { "containers": [
            { "name": "a", "image": "a:1", "env": [{ "name": "X", "value": "1" }] },
            { "name": "b", "image": "b:1" },
        ] } } } });
        let patch = json!({ "spec": { "template": { "spec": {
            "$setElementOrder/containers": [{ "name": "a" }, { "name": "c" }],
            "containers": [
                { "name": "a", "image": "a:2" },
                { "name": "c", "image": "c:1" },
                { "name": "b", "$patch": "delete" },
            ],
        } } } });
        let expected = json!({ "spec": { "template": { "spec": { "containers": [
            { "name": "a", "image": "a:2", "env": [{ "name": "X", "value": "1" }] },
            { "name": "c", "image": "c:1" },
        ] } } } });
        assert_eq!(patched(&live, &patch, Type::Strategic, &deployment).unwrap(), expected);
    }
}
