//! Label selectors and field selectors, in queries and in objects.

use anyhow::{Context as _, bail};
use serde_json::Value;

/// The condition of one requirement on the value of a label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wants {
    Exists,
    Absent,
    In(Vec<String>),
    /// Or absent.
    NotIn(Vec<String>),
}

/// All requirements must hold; an empty selector selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::kubernetes) struct Labels(Vec<(String, Wants)>);

impl Labels {
    /// Reads a query's `labelSelector`.
    pub(in crate::kubernetes) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut rest = text.trim();
        let mut requirements = Vec::new();
        while !rest.is_empty() {
            let end = match (rest.find(','), rest.find('(')) {
                (Some(comma), Some(open)) if open < comma => rest.find(')').context("')' is missing")? + 1,
                (Some(comma), _) => comma,
                (None, _) => rest.len(),
            };
            let (requirement, after) = rest.split_at(end);
            requirements.push(Self::requirement(requirement.trim())?);
            rest = after.trim_start().strip_prefix(',').unwrap_or(after).trim_start();
        }
        Ok(Self(requirements))
    }

    fn requirement(text: &str) -> anyhow::Result<(String, Wants)> {
        let one = |value: &str| vec![value.trim().to_owned()];
        let set = |set: &str| -> anyhow::Result<_> {
            let inner = set.trim().strip_prefix('(').and_then(|set| set.strip_suffix(')'));
            Ok(inner
                .with_context(|| format!("{set:?} is no set"))?
                .split(',')
                .map(|value| value.trim().to_owned())
                .collect())
        };
        let (key, wants) = if let Some(key) = text.strip_prefix('!') {
            (key, Wants::Absent)
        } else if let Some((key, values)) = text.split_once(" notin ") {
            (key, Wants::NotIn(set(values)?))
        } else if let Some((key, values)) = text.split_once(" in ") {
            (key, Wants::In(set(values)?))
        } else if let Some((key, value)) = text.split_once("!=") {
            (key, Wants::NotIn(one(value)))
        } else if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
            (key, Wants::In(one(value)))
        } else {
            (text, Wants::Exists)
        };
        if key.trim().is_empty() {
            bail!("{text:?} names no label");
        }
        Ok((key.trim().to_owned(), wants))
    }

    /// Reads a `LabelSelector` object, or a plain map of labels as in Services.
    pub(in crate::kubernetes) fn of(selector: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let texts = |value: &Value| value.as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
        let is_object = selector.get("matchLabels").is_some() || selector.get("matchExpressions").is_some();
        let labels = if is_object { &selector["matchLabels"] } else { selector };
        let equal =
            labels.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), Wants::In(vec![text(value)])));
        let expressions = selector["matchExpressions"].as_array().into_iter().flatten().map(|expression| {
            let wants = match expression["operator"].as_str() {
                Some("In") => Wants::In(texts(&expression["values"])),
                Some("NotIn") => Wants::NotIn(texts(&expression["values"])),
                Some("DoesNotExist") => Wants::Absent,
                _ => Wants::Exists,
            };
            (text(&expression["key"]), wants)
        });
        Self(equal.chain(expressions).collect())
    }

    /// Whether it selects an object with these `metadata.labels`.
    pub(in crate::kubernetes) fn select(&self, labels: &Value) -> bool {
        self.0.iter().all(|(key, wants)| {
            let value = labels.get(key).and_then(Value::as_str);
            let among = |values: &[String]| value.is_some_and(|value| values.iter().any(|one| one == value));
            match wants {
                Wants::Exists => value.is_some(),
                Wants::Absent => value.is_none(),
                Wants::In(values) => among(values),
                Wants::NotIn(values) => !among(values),
            }
        })
    }
}

impl std::fmt::Display for Labels {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, (key, wants)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match wants {
                Wants::Exists => write!(formatter, "{comma}{key}")?,
                Wants::Absent => write!(formatter, "{comma}!{key}")?,
                Wants::In(values) if values.len() == 1 => write!(formatter, "{comma}{key}={}", values.concat())?,
                Wants::In(values) => write!(formatter, "{comma}{key} in ({})", values.join(","))?,
                Wants::NotIn(values) => write!(formatter, "{comma}{key} notin ({})", values.join(","))?,
            }
        }
        Ok(())
    }
}

/// Paths, whether their value must be equal, and the value.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields(Vec<(String, bool, String)>);

impl Fields {
    /// Reads a query's `fieldSelector`. Kinds of CRDs know the name and the namespace only.
    pub(super) fn parse(text: &str, custom: bool) -> anyhow::Result<Self> {
        let mut fields = Vec::new();
        for requirement in text.split(',').filter(|requirement| !requirement.is_empty()) {
            let unequal = requirement.split_once("!=").map(|(field, value)| (field, false, value));
            let equal = || requirement.split_once("==").or_else(|| requirement.split_once('='));
            let found = unequal.or_else(|| equal().map(|(field, value)| (field, true, value)));
            let (field, equal, value) = found.with_context(|| format!("invalid selector: {requirement:?}"))?;
            if custom && !matches!(field, "metadata.name" | "metadata.namespace") {
                bail!("field label not supported: {field}");
            }
            fields.push((format!("/{}", field.replace('.', "/")), equal, value.to_owned()));
        }
        Ok(Self(fields))
    }

    pub(super) fn select(&self, object: &Value) -> bool {
        self.0.iter().all(|(pointer, equal, wanted)| {
            let is = match object.pointer(pointer) {
                Some(Value::String(text)) => text.clone(),
                None | Some(Value::Null) => String::new(),
                Some(other) => other.to_string(),
            };
            (is == *wanted) == *equal
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors_select_as_in_kubernetes() {
        let labels = json!({ "app": "payment", "version": "v2" });
        for (selector, selects) in [
            ("", true),
            ("app=payment,version==v2", true),
            ("app!=payment", false),
            ("tier!=front", true),
            ("version in (v1, v2),app", true),
            ("app,version notin (v1,v2)", false),
            ("tier notin (front)", true),
            ("!tier", true),
            ("!app", false),
            ("tier", false),
        ] {
            let parsed = Labels::parse(selector).unwrap();
            assert_eq!(parsed.select(&labels), selects, "{selector}");
            assert_eq!(Labels::parse(&parsed.to_string()).unwrap(), parsed, "{selector}");
        }
        assert!(Labels::parse("version in v1").is_err() && Labels::parse("=v1").is_err());
    }

    #[test]
    fn selectors_of_deployments_and_of_services_are_read() {
        let expressions = json!([{ "key": "version", "operator": "In", "values": ["v1", "v2"] }]);
        let of_deployment = Labels::of(&json!({ "matchLabels": { "app": "a" }, "matchExpressions": expressions }));
        assert_eq!(of_deployment.to_string(), "app=a,version in (v1,v2)");
        assert_eq!(Labels::of(&json!({ "app": "a" })).to_string(), "app=a");
    }
}
