//! The representation of objects that a client requests: complete or metadata only; and the selection of objects.

use serde_json::{Value, json};

use super::kinds::Kind;
use super::refusal::Refusal;
use super::request::Query;
use super::selector::{Fields, Labels};

/// The objects of a kind that a list or watch selects.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    /// Empty: all namespaces.
    namespace: String,
    /// A watch of one object, by its path.
    name: Option<String>,
    labels: Labels,
    fields: Fields,
}

impl Selection {
    pub(super) fn of(kind: &Kind, namespace: &str, name: Option<&str>, query: &Query) -> Result<Self, Refusal> {
        let wrong = |error: anyhow::Error| Refusal::bad_request(error.to_string());
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.map(str::to_owned),
            labels: Labels::parse(query.get("labelSelector")).map_err(wrong)?,
            fields: Fields::parse(query.get("fieldSelector"), kind.custom()).map_err(wrong)?,
        })
    }

    pub(super) fn selects(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        (self.namespace.is_empty() || metadata["namespace"] == self.namespace)
            && self.name.as_ref().is_none_or(|name| metadata["name"] == *name)
            && self.labels.select(&metadata["labels"])
            && self.fields.select(object)
    }
}

/// The representation of objects in responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Whole,
    MetadataOnly,
}

impl View {
    /// Parses the header `accept`. Unsupported representations, such as tables, are returned as whole objects, as from
    /// old servers.
    pub(super) fn of(accept: &str) -> Self {
        let first = accept.split(',').next().unwrap_or_default();
        if first.contains("as=PartialObjectMetadata") { Self::MetadataOnly } else { Self::Whole }
    }

    pub(super) fn object(self, object: &Value) -> Value {
        match self {
            Self::Whole => object.clone(),
            Self::MetadataOnly => json!({
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": object["metadata"],
            }),
        }
    }

    pub(super) fn list(self, kind: &Kind, metadata: Value, items: &[&Value]) -> Value {
        let (list, version) = match self {
            Self::Whole => (format!("{}List", kind.kind), kind.api_version()),
            Self::MetadataOnly => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned()),
        };
        let item = |item: &&Value| {
            let mut item = self.object(item);
            // As in lists of built-in kinds of real servers.
            if let (Self::Whole, false, Some(fields)) = (self, kind.custom(), item.as_object_mut()) {
                fields.remove("kind");
                fields.remove("apiVersion");
            }
            item
        };
        let items: Vec<_> = items.iter().map(item).collect();
        json!({ "kind": list, "apiVersion": version, "metadata": metadata, "items": items })
    }
}
