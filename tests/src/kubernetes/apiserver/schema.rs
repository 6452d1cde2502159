//! The schemas of CRDs: prunes unknown fields, fills in defaults and checks the plain rules. Formats, patterns and CEL
//! rules are left to real API servers.

use serde_json::Value;

/// Drops what the schema does not describe and fills in its defaults.
pub(super) fn prune_and_default(value: &mut Value, schema: &Value) {
    match value {
        Value::Object(map) => {
            let described = schema["properties"].as_object();
            let others = schema.get("additionalProperties").filter(|others| !others.is_boolean());
            let keeps = schema["x-kubernetes-preserve-unknown-fields"] == true
                || schema["x-kubernetes-embedded-resource"] == true
                || schema["additionalProperties"] == true;
            if let Some(described) = described {
                for (name, schema) in described {
                    if let Some(default) = schema.get("default")
                        && map.get(name).is_none_or(|value| value.is_null() && schema["nullable"] != true)
                    {
                        map.insert(name.clone(), default.clone());
                    }
                }
            }
            map.retain(|name, value| match described.and_then(|described| described.get(name)).or(others) {
                Some(schema) => {
                    // A bare `metadata: {type: object}` stands for all of it.
                    if name != "metadata" || schema.get("properties").is_some() {
                        prune_and_default(value, schema);
                    }
                    true
                }
                None => keeps || matches!(name.as_str(), "apiVersion" | "kind" | "metadata"),
            });
        }
        Value::Array(items) => items.iter_mut().for_each(|item| prune_and_default(item, &schema["items"])),
        _ => {}
    }
}

/// Reports an error and its path.
pub(super) fn check(value: &Value, schema: &Value, at: &str, wrong: &mut Vec<(String, String)>) {
    let mut found = |what: String| wrong.push((at.trim_start_matches('.').to_owned(), what));
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    let fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0)
        }
        Some("number") => value.is_number(),
        _ if schema["x-kubernetes-int-or-string"] == true => value.is_i64() || value.is_string(),
        _ => true,
    };
    if !fits {
        return found(format!(
            "Invalid value: {value}: must be of type {}",
            schema["type"].as_str().unwrap_or("integer or string")
        ));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let allowed: Vec<_> = allowed.iter().map(Value::to_string).collect();
        found(format!("Unsupported value: {value}: supported values: {}", allowed.join(", ")));
    }
    let size = match value {
        Value::String(text) => Some((text.chars().count(), "minLength", "maxLength")),
        Value::Array(items) => Some((items.len(), "minItems", "maxItems")),
        Value::Object(map) => Some((map.len(), "minProperties", "maxProperties")),
        _ => None,
    };
    if let Some((size, least, most)) = size {
        let limit = |name: &str| schema[name].as_u64().and_then(|limit| usize::try_from(limit).ok());
        if limit(least).is_some_and(|least| size < least) {
            found(format!("Invalid value: {value}: should have {least} {}", schema[least]));
        }
        if limit(most).is_some_and(|most| size > most) {
            found(format!("Invalid value: {value}: should have {most} {}", schema[most]));
        }
    }
    if let Some(number) = value.as_f64() {
        let exclusive = |name: &str| schema[name] == true;
        if schema["minimum"]
            .as_f64()
            .is_some_and(|least| number < least || number == least && exclusive("exclusiveMinimum"))
        {
            found(format!("Invalid value: {value}: should be greater than or equal to {}", schema["minimum"]));
        }
        if schema["maximum"]
            .as_f64()
            .is_some_and(|most| number > most || number == most && exclusive("exclusiveMaximum"))
        {
            found(format!("Invalid value: {value}: should be less than or equal to {}", schema["maximum"]));
        }
    }
    match value {
        Value::Object(map) => {
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !map.contains_key(name) {
                    wrong
                        .push((format!("{at}.{name}").trim_start_matches('.').to_owned(), "Required value".to_owned()));
                }
            }
            for (name, value) in map {
                let described = &schema["properties"][name];
                let described = if described.is_null() { &schema["additionalProperties"] } else { described };
                check(value, described, &format!("{at}.{name}"), wrong);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check(item, &schema["items"], &format!("{at}[{index}]"), wrong);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn drops_fills_in_and_checks() {
        let schema = json!({
            "type": "object",
            "properties": { "spec": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": { "type": "string", "minLength": 2 },
                    "mode": { "type": "string", "enum": ["A", "B"], "default": "A" },
                    "count": { "type": "integer", "minimum": 1 },
                    "labels": { "type": "object", "additionalProperties": { "type": "string" } },
                    "free": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                },
            } },
        });
        let mut object = json!({
            "kind": "X",
            "metadata": { "name": "x" },
            "spec": { "name": "ab", "odd": 1, "labels": { "a": "b" }, "free": { "odd": 1 } },
        });
        prune_and_default(&mut object, &schema);
        let spec = json!({ "name": "ab", "mode": "A", "labels": { "a": "b" }, "free": { "odd": 1 } });
        assert_eq!(object, json!({ "kind": "X", "metadata": { "name": "x" }, "spec": spec }));
        let mut wrong = Vec::new();
        check(&object, &schema, "", &mut wrong);
        assert_eq!(wrong, []);
        check(&json!({ "spec": { "mode": "C", "count": 0, "labels": { "a": 1 } } }), &schema, "", &mut wrong);
        let fields: Vec<_> = wrong.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["spec.name", "spec.count", "spec.labels.a", "spec.mode"]);
    }
}
