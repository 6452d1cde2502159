//! The merge keys of lists and maps: the schema of a CRD declares them, and for built-in kinds they are known.

use serde_json::Value;

use super::kinds::Kind;

/// How the items of a list are identified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum List {
    /// Not at all: the list is one value.
    Atomic,
    /// By these fields of theirs.
    ByKeys(Vec<String>),
    /// By their whole value.
    Set,
}

/// A place in objects of some kind.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape<'a> {
    /// The field of that name, somewhere in a built-in kind.
    BuiltIn { kind: &'a str, field: &'a str },
    /// The shape that a schema describes.
    Schema(&'a Value),
}

impl<'a> Shape<'a> {
    pub(super) fn of(kind: &'a Kind) -> Self {
        match &kind.schema {
            Some(schema) => Self::Schema(schema),
            None => Self::BuiltIn { kind: &kind.kind, field: "" },
        }
    }

    /// The shape of a field of this object.
    pub(super) fn field(self, name: &'a str) -> Self {
        match self {
            Self::BuiltIn { kind, .. } => Self::BuiltIn { kind, field: name },
            Self::Schema(schema) => match &schema["properties"][name] {
                // CRDs leave out what `metadata` holds.
                described if name == "metadata" && described.get("properties").is_none() => {
                    Self::BuiltIn { kind: "ObjectMeta", field: name }
                }
                Value::Null => Self::Schema(&schema["additionalProperties"]),
                described => Self::Schema(described),
            },
        }
    }

    /// The shape of this list's items.
    pub(super) fn items(self) -> Self {
        match self {
            Self::BuiltIn { kind, .. } => Self::BuiltIn { kind, field: "" },
            Self::Schema(schema) => Self::Schema(&schema["items"]),
        }
    }

    pub(super) fn list(self) -> List {
        let by = |keys: &[&str]| List::ByKeys(keys.iter().map(|&key| key.to_owned()).collect());
        match self {
            Self::BuiltIn { kind: "EndpointSlice", field: "ports" } => List::Atomic,
            Self::BuiltIn { kind: "Service", field: "ports" } => by(&["port", "protocol"]),
            Self::BuiltIn { field, .. } => match field {
                "conditions" => by(&["type"]),
                "containers" | "env" | "ephemeralContainers" | "imagePullSecrets" | "initContainers" | "volumes" => {
                    by(&["name"])
                }
                "finalizers" => List::Set,
                "ownerReferences" => by(&["uid"]),
                "ports" => by(&["containerPort", "protocol"]),
                "volumeMounts" => by(&["mountPath"]),
                _ => List::Atomic,
            },
            Self::Schema(schema) => match schema["x-kubernetes-list-type"].as_str() {
                Some("map") => {
                    let keys = schema["x-kubernetes-list-map-keys"].as_array();
                    List::ByKeys(keys.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect())
                }
                Some("set") => List::Set,
                _ => List::Atomic,
            },
        }
    }

    /// Whether this map is one value.
    pub(super) fn atomic_map(self) -> bool {
        match self {
            Self::BuiltIn { field, .. } => matches!(field, "selector" | "nodeSelector"),
            Self::Schema(schema) => schema["x-kubernetes-map-type"] == "atomic",
        }
    }
}

impl List {
    /// What tells an item apart from the others, in the notation of `managedFields`; `None` in atomic lists and for
    /// items without any of the keys.
    pub(super) fn step(&self, item: &Value) -> Option<String> {
        match self {
            Self::Atomic => None,
            Self::Set => Some(format!("v:{item}")),
            Self::ByKeys(keys) => {
                let value = |key: &String| match &item[key] {
                    Value::Null if key == "protocol" => Some((key.clone(), "TCP".into())),
                    Value::Null => None,
                    value => Some((key.clone(), value.clone())),
                };
                let map: serde_json::Map<_, _> = keys.iter().filter_map(value).collect();
                let any = keys.iter().any(|key| !item[key].is_null());
                any.then(|| format!("k:{}", Value::Object(map)))
            }
        }
    }

    /// The steps of all items, if all have one.
    pub(super) fn steps(&self, items: &[Value]) -> Option<Vec<String>> {
        items.iter().map(|item| self.step(item)).collect()
    }
}
