//! `tideshift migrate-secrets`: documents that hold secrets become documents that refer to Secrets.

use super::{Failure, print};
use crate::documents;
use crate::kubernetes::convert::USE_LABEL;
use crate::secret_values::SecretUse;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Print documents with references in place of the secrets that they hold, and the Secrets that these refer to
///
/// In a cluster a TrafficShift must not hold secrets, as everyone who may see it could read them. Sessions' secrets become keys of
/// a Secret NAME-session, webhooks' secrets and the URLs of chats (format Slack) keys of a Secret NAME-webhooks, each with the label
/// that lets documents use it. Documents that hold no secrets are not printed. What is printed holds the secrets.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift migrate-secrets -f shift.yaml
  kubectl get trafficshifts -A -o yaml | tideshift migrate-secrets -f - > migrated.yaml
  kubectl apply -l tideshift.dev/use -f migrated.yaml    # the Secrets
  kubectl replace -f migrated.yaml                       # and the documents that refer to them

The controller must be allowed to read these Secrets: documentSecrets in the Helm chart.")]
pub(super) struct Arguments {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. May be given several times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

impl Arguments {
    pub(super) fn run(self) -> Result<(), Failure> {
        let documents = documents::load_each(&self.files)?;
        let mut text = String::new();
        // Those that hold none stay as they are.
        for object in documents.into_iter().flat_map(migrate) {
            let yaml = serde_saphyr::to_string(&object).map_err(|error| Failure::Other(error.into()))?;
            text.push_str("---\n");
            text.push_str(&yaml);
        }
        print(&text)
    }
}

/// The Secrets that a document needs, and the document that refers to them; nothing if it holds no secrets.
fn migrate(document: Value) -> Vec<Value> {
    let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let mut metadata = Map::new();
    for field in ["name", "namespace", "labels", "annotations"] {
        metadata.extend(document["metadata"].get(field).map(|value| (field.to_owned(), value.clone())));
    }
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        // It holds the whole document of before.
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    let mut spec = document["spec"].clone();
    let mut of_sessions = Moved::to(format!("{name}-session"));
    if let Some(session) = spec.get_mut("session") {
        of_sessions.take(session, "secret", "secretRef", "secret".to_owned());
    }
    for service in spec.get_mut("services").and_then(Value::as_array_mut).into_iter().flatten() {
        let key = service["name"].as_str().unwrap_or_default().to_owned();
        if let Some(session) = service.get_mut("session") {
            of_sessions.take(session, "secret", "secretRef", key);
        }
    }
    let mut of_webhooks = Moved::to(format!("{name}-webhooks"));
    for webhook in spec.get_mut("webhooks").and_then(Value::as_array_mut).into_iter().flatten() {
        let key = webhook["name"].as_str().unwrap_or_default().to_owned();
        of_webhooks.take(webhook, "secret", "secretRef", format!("{key}.secret"));
        if webhook["format"] == "Slack" {
            of_webhooks.take(webhook, "url", "urlSecretRef", format!("{key}.url"));
        }
    }
    let namespace = metadata.get("namespace").cloned();
    let secrets = [(of_sessions, SecretUse::Session), (of_webhooks, SecretUse::Signature)];
    let secrets = secrets.into_iter().filter(|(moved, _)| !moved.values.is_empty());
    let secrets = secrets.map(|(moved, of)| moved.secret(of.label(), namespace.as_ref()));
    let migrated = json!({
        "apiVersion": document["apiVersion"], "kind": document["kind"], "metadata": metadata, "spec": spec,
    });
    let secrets: Vec<Value> = secrets.collect();
    if secrets.is_empty() { secrets } else { secrets.into_iter().chain([migrated]).collect() }
}

/// Secrets that go to one Secret.
struct Moved {
    name: String,
    values: Map<String, Value>,
}

impl Moved {
    fn to(name: String) -> Self {
        Self { name, values: Map::new() }
    }

    /// Moves a field's value under a key, and leaves a reference to that.
    fn take(&mut self, object: &mut Value, field: &str, reference: &str, key: String) {
        let Some(fields) = object.as_object_mut() else { return };
        if let Some(value) = fields.remove(field).filter(|value| !value.is_null()) {
            fields.insert(reference.to_owned(), json!({"name": self.name, "key": key}));
            self.values.insert(key, value);
        }
    }

    fn secret(self, label: &str, namespace: Option<&Value>) -> Value {
        let mut metadata = json!({"name": self.name, "labels": {USE_LABEL: label}});
        if let Some(namespace) = namespace {
            metadata["namespace"] = namespace.clone();
        }
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": self.values})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::admission;
    use crate::secret_values;
    use crate::secret_values::SecretValues;
    use tideshift_core::shift::TrafficShift;

    fn migrated(spec: Value) -> Vec<Value> {
        migrate(json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "spec": spec,
            "metadata": {
                "name": "shop", "namespace": "store", "uid": "1", "labels": {"team": "a"},
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "hush", "a": "b"},
            },
            "status": {"phase": "Succeeded"},
        }))
    }

    #[test]
    fn what_is_printed_is_admitted_and_its_references_lead_to_what_was_there() {
        let session = |secret: &str| json!({"type": "Cookie", "name": "c", "secret": secret});
        let webhooks = json!([
            {"name": "ci", "type": "Gate", "url": "https://ci.example.com", "secret": "hush-ci"},
            {"name": "chat", "type": "Notification", "url": "https://chat.example.com/hush", "format": "Slack"},
        ]);
        let version = json!([{"name": "v1", "service": "a"}]);
        let alone = json!({"versions": version, "stable": "v1", "session": session("hush-1"), "webhooks": webhooks});
        let service = |name: &str| {
            let (host, session) = (format!("{name}.example.com"), session(&format!("hush-{name}")));
            json!({"name": name, "hostnames": [host], "versions": version, "session": session})
        };
        let several = json!({"services": [service("cart"), service("till")], "stable": "v1"});
        for (spec, secrets) in [(alone, 3), (several, 2)] {
            let mut objects = migrated(spec);
            let document = objects.pop().unwrap();
            let shift = TrafficShift::read(&document).unwrap();
            assert_eq!(admission::admit_literals(&shift, None), Ok(()));
            let references = secret_values::references(&shift);
            assert_eq!(references.len(), secrets);
            let values = SecretValues::of([&shift], |namespace, of, key| {
                let is_it = |object: &&Value| object["metadata"]["name"] == key.name.as_str();
                let secret = objects.iter().find(is_it).ok_or("no Secret")?;
                assert_eq!((&secret["metadata"]["namespace"], namespace), (&json!("store"), "store"));
                assert_eq!(secret["metadata"]["labels"][USE_LABEL], of.label());
                of.read(secret["stringData"][&key.key].as_str().ok_or("no key")?.as_bytes())
            });
            assert_eq!(values.unresolved(&shift), [""; 0]);
            let labels = json!({"team": "a"});
            let metadata = json!({"name": "shop", "namespace": "store", "labels": labels, "annotations": {"a": "b"}});
            assert_eq!(document["metadata"], metadata);
            assert!(!document.to_string().contains("hush"), "{document}");
        }
        assert_eq!(migrated(json!({"versions": version, "stable": "v1"})), [Value::Null; 0]);
    }
}
