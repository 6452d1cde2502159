//! The subresource `scale`: an `autoscaling/v1` Scale in front of the fields that hold the replicas.

use serde_json::{Map, Value, json};

use super::kinds::ScalePaths;
use super::refusal::Refusal;
use super::selector::Labels;

/// The scale of an object.
pub(super) fn of(object: &Value, paths: &ScalePaths) -> Value {
    let number = |pointer: &str| object.pointer(pointer).and_then(Value::as_i64).unwrap_or_default();
    let metadata = &object["metadata"];
    let selector = match paths.selector.as_deref().and_then(|pointer| object.pointer(pointer)) {
        Some(Value::String(text)) => text.clone(),
        Some(selector) => Labels::of(selector).to_string(),
        None => String::new(),
    };
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
            "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": { "replicas": number(&paths.spec_replicas) },
        "status": { "replicas": number(&paths.status_replicas) },
    });
    if !selector.is_empty() {
        scale["status"]["selector"] = selector.into();
    }
    scale
}

/// The object as a scale wants it.
pub(super) fn scaled(object: &Value, scale: &Value, paths: &ScalePaths) -> Result<Value, Refusal> {
    let replicas = match &scale["spec"]["replicas"] {
        // A field with the value 0 may be left out.
        Value::Null => 0,
        given => given.as_i64().filter(|replicas| *replicas >= 0).ok_or_else(|| {
            Refusal::bad_request(format!(
                "spec.replicas: Invalid value: {given}: should be a number greater than or equal to 0"
            ))
        })?,
    };
    let mut next = object.clone();
    next["metadata"]["resourceVersion"] = scale["metadata"]["resourceVersion"].clone();
    let mut at = &mut next;
    for field in paths.spec_replicas.split('/').skip(1) {
        if !at[field].is_object() {
            at[field] = Value::Object(Map::new());
        }
        at = &mut at[field];
    }
    *at = replicas.into();
    Ok(next)
}
