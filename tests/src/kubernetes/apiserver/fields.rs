//! Field ownership: sets of paths, as in `metadata.managedFields`.
//!
//! A path leads to a leaf: a scalar, an atomic list or map, or an empty map. An item of a list with keys has a path of
//! its own in addition to those of its fields.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::kinds::Kind;
use super::shape::Shape;

/// Steps in the notation of `managedFields`: `f:NAME`, `k:{"name":"value"}`, `v:"value"`.
pub(super) type Path = Vec<String>;

/// Paths that a manager owns.
pub(super) type Fields = BTreeSet<Path>;

/// The fields that the server sets and that no manager owns.
const NOBODYS: [&str; 10] = [
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generateName",
    "generation",
    "managedFields",
    "name",
    "namespace",
    "resourceVersion",
    "uid",
];

/// One of an object's managers.
#[derive(Clone, Debug)]
pub(super) struct Manager {
    pub(super) name: String,
    /// Whether it uses apply, not update.
    pub(super) applies: bool,
    /// `status`, or empty.
    pub(super) subresource: String,
    pub(super) time: String,
    pub(super) fields: Fields,
}

impl Manager {
    /// The managers of an object.
    pub(super) fn all_of(object: &Value) -> Vec<Self> {
        let entries = object["metadata"]["managedFields"].as_array();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let of_entry = |entry: &Value| {
            let mut fields = Fields::new();
            read(&entry["fieldsV1"], &mut Vec::new(), &mut fields);
            Self {
                name: text(&entry["manager"]),
                applies: entry["operation"] == "Apply",
                subresource: text(&entry["subresource"]),
                time: text(&entry["time"]),
                fields,
            }
        };
        entries.into_iter().flatten().map(of_entry).collect()
    }

    /// Writes them into an object; managers that own nothing are dropped.
    pub(super) fn write_all(managers: &[Self], object: &mut Value, kind: &Kind) {
        let entry = |manager: &Self| {
            let mut entry = json!({
                "manager": manager.name,
                "operation": if manager.applies { "Apply" } else { "Update" },
                "apiVersion": kind.api_version(),
                "time": manager.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": written(&manager.fields),
            });
            if !manager.subresource.is_empty() {
                entry["subresource"] = manager.subresource.as_str().into();
            }
            entry
        };
        let owners = managers.iter().filter(|manager| !manager.fields.is_empty());
        object["metadata"]["managedFields"] = owners.map(entry).collect();
    }
}

fn read(tree: &Value, path: &mut Path, fields: &mut Fields) {
    let Some(tree) = tree.as_object() else { return };
    if tree.is_empty() && !path.is_empty() {
        fields.insert(path.clone());
    }
    for (step, below) in tree {
        if step == "." {
            fields.insert(path.clone());
        } else {
            path.push(step.clone());
            read(below, path, fields);
            path.pop();
        }
    }
}

fn written(fields: &Fields) -> Value {
    let mut tree = Map::new();
    for path in fields {
        let mut at = &mut tree;
        for step in path {
            let below = at.entry(step.as_str()).or_insert_with(|| json!({}));
            let Value::Object(below) = below else { return Value::Null };
            at = below;
        }
    }
    // A path that is owned itself, not only paths below it.
    for path in fields {
        let mut at = &mut tree;
        for step in path {
            let Some(Value::Object(below)) = at.get_mut(step) else { return Value::Null };
            at = below;
        }
        if !at.is_empty() {
            at.insert(".".to_owned(), json!({}));
        }
    }
    Value::Object(tree)
}

/// All paths of an object that a manager can own, with their values.
pub(super) fn paths<'a>(object: &'a Value, kind: &Kind) -> BTreeMap<Path, &'a Value> {
    let mut found = BTreeMap::new();
    walk(object, Shape::of(kind), &mut Vec::new(), &mut found);
    found.retain(|path, _| {
        let [first, rest @ ..] = path.as_slice() else { return false };
        let second = rest.first().and_then(|step| step.strip_prefix("f:"));
        match first.as_str() {
            "f:apiVersion" | "f:kind" => false,
            "f:metadata" => second.is_some_and(|name| !NOBODYS.contains(&name)),
            _ => true,
        }
    });
    found
}

fn walk<'a>(value: &'a Value, shape: Shape<'_>, path: &mut Path, found: &mut BTreeMap<Path, &'a Value>) {
    match value {
        Value::Object(map) if !map.is_empty() && !shape.atomic_map() => {
            for (name, below) in map {
                path.push(format!("f:{name}"));
                walk(below, shape.field(name), path, found);
                path.pop();
            }
        }
        Value::Array(items) if !items.is_empty() => match shape.list().steps(items) {
            None => _ = found.insert(path.clone(), value),
            Some(steps) => {
                for (item, step) in items.iter().zip(steps) {
                    path.push(step);
                    if item.is_object() {
                        found.insert(path.clone(), &Value::Null);
                    }
                    walk(item, shape.items(), path, found);
                    path.pop();
                }
            }
        },
        _ => _ = found.insert(path.clone(), value),
    }
}

/// Whether one of these paths is a prefix of the other.
pub(super) fn overlap(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// A path as displayed in messages: `.spec.containers[name="a"].image`.
pub(super) fn shown(path: &Path) -> String {
    let step = |step: &String| match step.split_once(':') {
        Some(("k", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let keys: Vec<_> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", keys.join(","))
        }
        Some(("v", value)) => format!("[={value}]"),
        Some((_, name)) => format!(".{name}"),
        None => step.clone(),
    };
    path.iter().map(step).collect()
}

/// Removes the value at a path from an object, and the maps that become empty.
pub(super) fn remove(value: &mut Value, shape: Shape<'_>, path: &[String]) {
    let [step, rest @ ..] = path else { return };
    match value {
        Value::Object(map) => {
            let Some(name) = step.strip_prefix("f:") else { return };
            let Some(below) = map.get_mut(name) else { return };
            if !rest.is_empty() {
                remove(below, shape.field(name), rest);
            }
            let empty = below.as_object().is_some_and(Map::is_empty) || below.as_array().is_some_and(Vec::is_empty);
            if rest.is_empty() || empty {
                map.remove(name);
            }
        }
        Value::Array(items) => {
            let list = shape.list();
            let Some(index) = items.iter().position(|item| list.step(item).as_ref() == Some(step)) else { return };
            if rest.is_empty() {
                items.remove(index);
            } else if let Some(item) = items.get_mut(index) {
                remove(item, shape.items(), rest);
            }
        }
        _ => {}
    }
}

/// Updates the managers after an update by one of them: it owns what it changed, and the others no longer do.
pub(super) fn updated(before: &Value, after: &Value, kind: &Kind, by: Manager) -> Vec<Manager> {
    let mut managers = Manager::all_of(before);
    let (old, new) = (paths(before, kind), paths(after, kind));
    let changed: Fields =
        new.iter().filter(|(path, value)| old.get(*path) != Some(value)).map(|(path, _)| path.clone()).collect();
    for manager in &mut managers {
        manager.fields.retain(|path| new.contains_key(path) && !changed.contains(path));
    }
    if changed.is_empty() {
        return managers;
    }
    let same =
        |manager: &&mut Manager| manager.name == by.name && !manager.applies && manager.subresource == by.subresource;
    match managers.iter_mut().find(same) {
        Some(manager) => {
            manager.fields.extend(changed);
            manager.time = by.time;
        }
        None => managers.push(Manager { fields: changed, ..by }),
    }
    managers
}
