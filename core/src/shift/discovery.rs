//! Endpoint discovery in Kubernetes: which endpoints belong to a version, and which workload scales it.

use crate::decode::Decoder;
use crate::matching::choice;
use crate::name;
#[cfg(feature = "schema")]
use crate::schema;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// Selects the endpoints of a version among the cluster's EndpointSlices; every condition must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase"))]
pub struct Discovery {
    /// In Kubernetes: the endpoints of this Service.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Name>"))]
    pub service: Option<String>,
    /// In Kubernetes: the endpoints whose pods have these labels; with `service`, only endpoints of that Service.
    pub selector: Option<LabelSelector>,
    /// In Kubernetes: the port of the EndpointSlices, by name or number. Default: their first port.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::NameOrPort>"))]
    pub port: Option<PortRef>,
}

/// A port of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortRef {
    /// By name.
    Name(String),
    /// By number, 1 to 65535.
    Number(u16),
}

/// A label selector with the fields of a Deployment's. All requirements must hold; at least one is required.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct LabelSelector {
    /// Labels and their required values.
    #[cfg_attr(feature = "schema", schemars(with = "Option<BTreeMap<String, String>>"))]
    pub match_labels: BTreeMap<String, String>,
    /// Further requirements.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<LabelRequirement>>"))]
    pub match_expressions: Vec<LabelRequirement>,
}

/// A requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct LabelRequirement {
    /// The label.
    #[cfg_attr(feature = "schema", schemars(with = "schema::FilledText"))]
    pub key: String,
    /// The operator.
    pub operator: LabelOperator,
    /// The values for the operator; empty with Exists and DoesNotExist.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<String>>"))]
    pub values: Vec<String>,
}

/// The operator of a label requirement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum LabelOperator {
    /// The label has one of the values.
    In,
    /// The label has none of the values, or is absent.
    NotIn,
    /// The label is present.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

/// The workload that runs a version; the controller uses its `scale` subresource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct WorkloadRef {
    /// API group and version; default `apps/v1`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::GroupVersion>", extend("default" = "apps/v1")))]
    pub api_version: String,
    /// The kind; default `Deployment`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::WorkloadKind>", extend("default" = "Deployment")))]
    pub kind: String,
    /// The name, in the document's namespace.
    #[cfg_attr(feature = "schema", schemars(with = "schema::Name"))]
    pub name: String,
}

impl LabelSelector {
    /// Whether an object with these labels is selected.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        let has = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.match_labels.iter().all(has) && self.match_expressions.iter().all(|one| one.holds(labels))
    }

    pub(super) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let match_labels = f.optional(d, "matchLabels", labels).unwrap_or_default();
        let expressions = f.optional(d, "matchExpressions", |d, v| d.list(v, LabelRequirement::read));
        let says_nothing = |field: &str| match value.get(field) {
            Some(Value::Object(labels)) => labels.is_empty(),
            Some(Value::Array(requirements)) => requirements.is_empty(),
            other => other.is_none_or(Value::is_null),
        };
        if says_nothing("matchLabels") && says_nothing("matchExpressions") {
            d.invalid(
                value,
                "at least one of matchLabels, matchExpressions (an empty selector would select every pod)",
            );
        }
        f.finish(d);
        let match_expressions = expressions.unwrap_or_default().into_iter().map(|(_, one)| one).collect();
        Some(Self { match_labels, match_expressions })
    }
}

impl LabelRequirement {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        let is_one_of = value.is_some_and(|value| self.values.contains(value));
        match self.operator {
            LabelOperator::In => is_one_of,
            LabelOperator::NotIn => !is_one_of,
            LabelOperator::Exists => value.is_some(),
            LabelOperator::DoesNotExist => value.is_none(),
        }
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let key = f.required(d, "key", "a label's key", Decoder::filled_text);
        let operator = f.required(d, "operator", "In, NotIn, Exists or DoesNotExist", |d, v| {
            Some(match choice(d, v, &["In", "NotIn", "Exists", "DoesNotExist"])? {
                "In" => LabelOperator::In,
                "NotIn" => LabelOperator::NotIn,
                "Exists" => LabelOperator::Exists,
                _ => LabelOperator::DoesNotExist,
            })
        });
        let values = f.optional(d, "values", |d, v| d.list(v, Decoder::text)).unwrap_or_default();
        let needs_values = matches!(operator, Some(LabelOperator::In | LabelOperator::NotIn));
        if operator.is_some() && needs_values == values.is_empty() {
            d.invalid(value, "values with the operators In and NotIn, and none with Exists and DoesNotExist");
        }
        f.finish(d);
        Some(Self { key: key?, operator: operator?, values: values.into_iter().map(|(_, value)| value).collect() })
    }
}

impl WorkloadRef {
    pub(super) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let api_version = f.optional(d, "apiVersion", |d, v| {
            let parts =
                |text: &str| text.split('/').count() <= 2 && text.split('/').all(|p| name::is_subdomain(p, 253));
            d.text_where(v, "a group and version, such as apps/v1", parts)
        });
        let kind = f.optional(d, "kind", |d, v| {
            let fine = |text: &str| {
                text.starts_with(|c: char| c.is_ascii_uppercase()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
            };
            d.text_where(v, "a kind with a scale subresource, such as Deployment", fine)
        });
        let name = f.required(d, "name", "a workload's name", name::service);
        f.finish(d);
        Some(Self {
            api_version: api_version.unwrap_or_else(|| "apps/v1".to_owned()),
            kind: kind.unwrap_or_else(|| "Deployment".to_owned()),
            name: name?,
        })
    }
}

impl PortRef {
    pub(super) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let named = |text: &str| {
            let letter = text.bytes().any(|b| b.is_ascii_lowercase());
            (1..=63).contains(&text.len()) && letter && !text.contains('.') && name::is_subdomain(text, 63)
        };
        match value {
            Value::String(text) if named(text) => Some(Self::Name(text.clone())),
            value => match value.as_u64().filter(|port| (1..=65_535).contains(port)) {
                Some(port) => Some(Self::Number(port as u16)),
                None => {
                    d.invalid(value, "a port's name, or its number from 1 to 65535");
                    None
                }
            },
        }
    }
}

impl fmt::Display for WorkloadRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

fn labels(d: &mut Decoder, value: &Value) -> Option<BTreeMap<String, String>> {
    let Value::Object(map) = value else {
        d.invalid(value, "an object of strings");
        return None;
    };
    let mut labels = BTreeMap::new();
    for (key, value) in map {
        let text = d.within(key, |d| d.text(value));
        labels.extend(text.map(|text| (key.clone(), text)));
    }
    Some(labels)
}
