//! Renders the Helm chart without Helm, with the small part of Go templates that it deliberately limits itself to. Helm
//! itself renders the same output (checked with Helm 4.3).

mod functions;
mod run;
mod table;
mod template;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::artifacts;

use self::run::World;
pub use self::table::{ValueRow, readme};

/// The order in which kinds are installed; those that are not here come last.
const ORDER: [&str; 10] = [
    "Namespace",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "ServiceAccount",
    "Secret",
    "ConfigMap",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
];

/// The values of the plain manifests: nothing random is committed.
const PLAIN: &str = r#"{"tokens": {"existingSecret": "tideshift-tokens"}}"#;

/// The Helm chart.
#[derive(Debug)]
pub struct Chart {
    folder: PathBuf,
    values: Value,
    chart: Value,
    /// Its files other than templates, by path.
    files: BTreeMap<String, String>,
    /// By path.
    templates: BTreeMap<String, String>,
}

/// An object of the chart.
#[derive(Clone, Debug)]
pub struct Rendered {
    /// As it was printed.
    pub text: String,
    /// What that says.
    pub object: Value,
}

impl Chart {
    /// The one in this checkout.
    pub fn load() -> anyhow::Result<Self> {
        let folder = artifacts::workspace().join("envoy-configs/helm/tideshift");
        let yaml = |name: &str| -> anyhow::Result<Value> {
            let text = fs::read_to_string(folder.join(name)).with_context(|| name.to_owned())?;
            serde_saphyr::from_str(&text).with_context(|| name.to_owned())
        };
        let read = |name: &str| -> anyhow::Result<BTreeMap<String, String>> {
            let mut files = BTreeMap::new();
            for entry in fs::read_dir(folder.join(name))? {
                let file = entry?.file_name().to_string_lossy().into_owned();
                let path = format!("{name}/{file}");
                let text = fs::read_to_string(folder.join(&path)).with_context(|| path.clone())?;
                files.insert(path, text);
            }
            Ok(files)
        };
        let (values, chart) = (yaml("values.yaml")?, yaml("Chart.yaml")?);
        Ok(Self { values, chart, files: read("files")?, templates: read("templates")?, folder })
    }

    /// Where it is.
    pub fn folder(&self) -> &PathBuf {
        &self.folder
    }

    /// The default values.
    pub fn values(&self) -> &Value {
        &self.values
    }

    /// The objects that `helm install RELEASE --namespace NAMESPACE` would make with these values, where the cluster has
    /// these objects.
    pub fn render(
        &self,
        release: &str,
        namespace: &str,
        values: &Value,
        has: &[Value],
    ) -> anyhow::Result<Vec<Rendered>> {
        let mut rendered = Vec::new();
        for (path, text) in self.print(release, namespace, values, has)? {
            if path.ends_with(".yaml") {
                for text in format!("\n{text}").split("\n---\n").map(str::trim).filter(|text| !text.is_empty()) {
                    let object = serde_saphyr::from_str(text).with_context(|| format!("{path}:\n{text}"))?;
                    rendered.push(Rendered { text: text.to_owned(), object });
                }
            }
        }
        rendered.retain(|rendered| !rendered.object.is_null());
        rendered.sort_by_key(|rendered| {
            let kind = rendered.object["kind"].as_str();
            ORDER.iter().position(|known| Some(*known) == kind).unwrap_or(ORDER.len())
        });
        Ok(rendered)
    }

    /// The message of `helm install`.
    pub fn notes(&self, release: &str, namespace: &str) -> anyhow::Result<String> {
        let mut printed = self.print(release, namespace, &json!({}), &[])?;
        printed.remove("templates/NOTES.txt").context("there are no notes")
    }

    /// The manifests for those who have no Helm.
    pub fn plain(&self) -> anyhow::Result<String> {
        let mut text = String::from(
            "# Tideshift's controller, as the Helm chart beside this folder installs it in namespace tideshift-system, rendered by\n\
             # `make manifests`. Its image is yours to push, and the Secret with its tokens yours to make; docs/kubernetes.md says how.\n\
             apiVersion: v1\n\
             kind: Namespace\n\
             metadata:\n\
             \x20 name: tideshift-system\n\
             \x20 labels:\n\
             \x20   pod-security.kubernetes.io/enforce: restricted\n",
        );
        for rendered in self.render("tideshift", "tideshift-system", &serde_json::from_str(PLAIN)?, &[])? {
            text.push_str("---\n");
            text.push_str(
                &rendered.text.replace("app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: tideshift"),
            );
            text.push('\n');
        }
        Ok(text)
    }

    /// The output of every template, by path.
    fn print(
        &self,
        release: &str,
        namespace: &str,
        values: &Value,
        has: &[Value],
    ) -> anyhow::Result<BTreeMap<String, String>> {
        let mut all = self.values.clone();
        merge(&mut all, values);
        let dot = json!({
            "Values": all,
            "Chart": {"Name": self.chart["name"], "Version": self.chart["version"], "AppVersion": self.chart["appVersion"]},
            "Release": {"Name": release, "Namespace": namespace, "Service": "Helm"},
        });
        let mut world = World { definitions: BTreeMap::new(), files: self.files.clone(), objects: has };
        let mut parsed = BTreeMap::new();
        for (path, text) in &self.templates {
            let nodes = template::parse(text).with_context(|| path.clone())?;
            world.define(&nodes);
            parsed.insert(path, nodes);
        }
        let print = |(path, nodes): (&String, Vec<template::Node>)| {
            Ok((path.clone(), world.print(&nodes, &dot).with_context(|| path.clone())?))
        };
        parsed.into_iter().map(print).collect()
    }
}

/// Puts a user's values over the chart's own: maps field by field, all else as a whole.
fn merge(values: &mut Value, over: &Value) {
    match (values, over) {
        (Value::Object(values), Value::Object(over)) => {
            for (key, over) in over {
                merge(values.entry(key.clone()).or_insert(Value::Null), over);
            }
        }
        (values, over) => values.clone_from(over),
    }
}
