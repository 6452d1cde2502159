//! What a TrafficShift looks like, as a JSON Schema: made from the types that documents are read into.

use crate::schema::Name;
use crate::shift::{self, TrafficShift};
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{Schema, json_schema};
use serde_json::{Value, json};

/// The schema of a whole document; `$defs` contains its types by name.
pub fn traffic_shift() -> Schema {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let spec = generator.subschema_for::<TrafficShift>();
    let mut schema = json_schema!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "The desired traffic of one service, or of several services that move together. `tideshift validate` \
                        checks a document.",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"type": "string", "const": shift::API_VERSION},
            "kind": {"type": "string", "const": shift::KIND},
            "metadata": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": generator.subschema_for::<Name>(),
                    "namespace": generator.subschema_for::<Name>(),
                },
            },
            "spec": spec,
            "status": {"description": "The observed state, which the controller writes in Kubernetes; ignored when a document is read.", "type": "object"},
        },
        "additionalProperties": false,
        "$defs": generator.take_definitions(true),
    });
    RecursiveTransform(without_null).transform(&mut schema);
    schema
}

/// Null means the same as an omitted field everywhere, so the schema does not list it.
pub(crate) fn without_null(schema: &mut Schema) {
    if let Some(kinds) = schema.get_mut("type").and_then(Value::as_array_mut) {
        kinds.retain(|kind| kind != "null");
        if let [kind] = kinds.as_slice() {
            let kind = kind.clone();
            schema.insert("type".to_owned(), kind);
        }
    }
    if let Some(values) = schema.get_mut("enum").and_then(Value::as_array_mut) {
        values.retain(|value| !value.is_null());
    }
    let others = schema.get("anyOf").and_then(Value::as_array).map(|alternatives| {
        let other = alternatives.iter().filter(|alternative| alternative.get("type") != Some(&json!("null")));
        other.filter_map(Value::as_object).cloned().collect::<Vec<_>>()
    });
    if let Some([one]) = others.as_deref() {
        schema.remove("anyOf");
        for (keyword, value) in one {
            schema.ensure_object().entry(keyword).or_insert_with(|| value.clone());
        }
    }
}
