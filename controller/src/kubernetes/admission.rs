//! Admission rules for documents in a cluster. A user who may write TrafficShifts in one namespace must not gain more
//! access through the controller, which has an address in the cluster network and more permissions than the user: its
//! requests go only to pods in the document's own namespace, and it runs no commands and reads no files for the
//! document. The CRD has the same rules in CEL; these also cover objects that were stored before the rules existed.

use crate::secret_values;
use std::fmt;
use std::time::Duration;
use tideshift_core::shift::probe::{Check, Probe};
use tideshift_core::shift::{HookSecret, HookUrl, NotificationFormat, TrafficShift, WebhookKind};

/// The shortest probe period, the same as in Kubernetes.
const SHORTEST_PERIOD: Duration = Duration::from_secs(1);

/// Checks whether a document may be in force in a cluster.
///
/// # Errors
///
/// Every field that is not allowed, one line each.
pub fn admit(shift: &TrafficShift) -> Result<(), String> {
    let mut refused = Refused::default();
    for (at, service) in secret_values::services(shift) {
        for (i, version) in service.versions.iter().enumerate() {
            let at = format!("{at}.versions[{i}]");
            if !version.endpoints.is_empty() {
                let why = "the controller sends requests to pods of the document's namespace alone; expected service, \
                           selector or workloadRef";
                refused.push(format!("{at}.endpoints"), why);
            }
            if let Some(probe) = &version.readiness_probe {
                admit_probe(&format!("{at}.readinessProbe"), probe, &mut refused);
            }
        }
    }
    for (i, webhook) in shift.webhooks.iter().enumerate() {
        if matches!(webhook.secret, Some(HookSecret::File(_))) {
            refused.push(format!("spec.webhooks[{i}].secretFile"), "it names a file of the controller's machine");
        }
    }
    refused.into_result()
}

/// A secret that is written in the document itself, readable by every user who may read TrafficShifts.
#[derive(Debug)]
struct Literal<'s> {
    field: String,
    /// The owner of the field, independent of its current position.
    of: (&'s str, &'static str),
    value: &'s [u8],
    instead: &'static str,
}

fn literals(shift: &TrafficShift) -> Vec<Literal<'_>> {
    let sessions = secret_values::services(shift).filter_map(|(at, service)| {
        let secret = service.session.as_ref()?.secret.as_ref()?;
        let (of, field) = ((service.name.as_str(), "session"), format!("{at}.session.secret"));
        Some(Literal { field, of, value: secret.as_bytes(), instead: "secretRef" })
    });
    let webhooks = shift.webhooks.iter().enumerate().flat_map(|(i, webhook)| {
        let at = format!("spec.webhooks[{i}]");
        let secret = match &webhook.secret {
            Some(HookSecret::Text(secret)) => Some(("secret", secret.as_bytes(), "secretRef")),
            _ => None,
        };
        // The URL of a chat webhook is a credential: it grants permission to post.
        let is_chat = matches!(webhook.kind, WebhookKind::Notification { format: NotificationFormat::Slack, .. });
        let url = match &webhook.url {
            HookUrl::Text(url) if is_chat => Some(("url", url.as_bytes(), "urlSecretRef")),
            _ => None,
        };
        secret.into_iter().chain(url).map(move |(field, value, instead)| {
            let of = (webhook.name.as_str(), field);
            Literal { field: format!("{at}.{field}"), of, value, instead }
        })
    });
    sessions.chain(webhooks).collect()
}

/// The fields of a document that contain a literal secret.
pub fn literal_fields(shift: &TrafficShift) -> Vec<String> {
    literals(shift).into_iter().map(|literal| literal.field).collect()
}

/// Checks that a document contains no literal secrets other than those it had when it came into force, before they were
/// refused.
///
/// # Errors
///
/// The fields with a new literal secret, and what to write instead; one line each.
pub fn admit_literals(shift: &TrafficShift, before: Option<&TrafficShift>) -> Result<(), String> {
    let held = before.map(literals).unwrap_or_default();
    let mut refused = Refused::default();
    for Literal { field, of, value, instead } in literals(shift) {
        if !held.iter().any(|held| (held.of, held.value) == (of, value)) {
            let why = format!(
                "everyone who may see TrafficShifts could read this secret; expected {instead}: {{name: SECRET, key: KEY}} of a \
                 Secret in this namespace (`tideshift migrate-secrets` writes both)"
            );
            refused.push(field, &why);
        }
    }
    refused.into_result()
}

fn admit_probe(at: &str, probe: &Probe, refused: &mut Refused) {
    let to_the_pod = "probes go to the pod's own address";
    match &probe.check {
        Check::HttpGet(get) if get.host.is_some() => {
            let why = format!("{to_the_pod}; expected a Host among httpHeaders instead");
            refused.push(format!("{at}.httpGet.host"), &why);
        }
        Check::TcpSocket { host: Some(_), .. } => refused.push(format!("{at}.tcpSocket.host"), to_the_pod),
        Check::Exec { .. } => refused.push(format!("{at}.exec"), "it runs a command on the controller's machine"),
        Check::HttpGet(_) | Check::TcpSocket { .. } | Check::Grpc { .. } => {}
    }
    if probe.period < SHORTEST_PERIOD {
        refused.push(format!("{at}.periodMillis"), "expected 1000 or more");
    }
}

/// The violations in a document.
#[derive(Debug, Default)]
struct Refused(Vec<String>);

impl Refused {
    fn push(&mut self, field: impl fmt::Display, why: &str) {
        self.0.push(format!("{field}: not allowed in a cluster: {why}"));
    }

    fn into_result(self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0.join("\n")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// The errors for a document with this `v1` and these fields of its spec.
    fn refused(v1: Value, fields: Value) -> Vec<String> {
        let mut v1 = v1;
        v1["name"] = json!("v1");
        let mut spec = json!({"versions": [v1, {"name": "v2", "service": "shop-v2"}], "stable": "v1"});
        spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
            "metadata": {"name": "shop", "namespace": "store"}, "spec": spec,
        });
        let shift = TrafficShift::read(&document).unwrap().qualified();
        admit(&shift).err().iter().flat_map(|errors| errors.lines()).map(str::to_owned).collect()
    }

    fn probed(probe: Value) -> Vec<String> {
        refused(json!({"service": "shop-v1", "readinessProbe": probe}), json!({}))
    }

    #[test]
    fn what_stays_within_the_namespace_is_admitted() {
        let get = json!({"path": "/", "port": 8080, "httpHeaders": [{"name": "Host", "value": "shop.example.com"}]});
        for probe in [json!({"httpGet": get, "periodSeconds": 1}), json!({"tcpSocket": {}}), json!({"grpc": {}})] {
            assert_eq!(probed(probe), [""; 0]);
        }
        let hook = json!({"name": "ci", "type": "Gate", "url": "https://ci.example.com"});
        let whole = refused(json!({"workloadRef": {"name": "shop-v1"}}), json!({"webhooks": [hook]}));
        assert_eq!(whole, [""; 0]);
    }

    #[test]
    fn addresses_of_the_users_choosing_are_refused_with_the_field() {
        let listed = refused(json!({"endpoints": ["169.254.169.254:80"]}), json!({}));
        assert!(listed[0].starts_with("spec.versions[0].endpoints: not allowed in a cluster: "), "{listed:?}");
        let http = probed(json!({"httpGet": {"host": "metadata.internal"}}));
        assert!(http[0].starts_with("spec.versions[0].readinessProbe.httpGet.host: not allowed"), "{http:?}");
        let tcp = probed(json!({"tcpSocket": {"host": "10.0.0.1", "port": 22}}));
        assert!(tcp[0].starts_with("spec.versions[0].readinessProbe.tcpSocket.host: not allowed"), "{tcp:?}");
    }

    #[test]
    fn commands_files_and_haste_are_refused_all_at_once() {
        let v1 = json!({"service": "shop-v1", "readinessProbe": {"exec": {"command": ["id"]}, "periodMillis": 999}});
        let hook = json!({"name": "ci", "type": "Gate", "url": "https://ci.example.com", "secretFile": "/etc/passwd"});
        let errors = refused(v1, json!({"webhooks": [hook]}));
        let fields: Vec<_> = errors.iter().filter_map(|error| error.split(": ").next()).collect();
        let probe = "spec.versions[0].readinessProbe";
        let expected =
            [format!("{probe}.exec"), format!("{probe}.periodMillis"), "spec.webhooks[0].secretFile".to_owned()];
        assert_eq!(fields, expected);
    }

    #[test]
    fn secrets_in_documents_are_refused_unless_they_were_in_force() {
        let read = |session: &str, hook: &str, weight: u32| {
            let hooks = json!([
                {"name": "first", "type": "Gate", "url": "https://ci.example.com/a"},
                {"name": "ci", "type": "Gate", "url": "https://ci.example.com", "secret": hook},
                {"name": "chat", "type": "Notification", "url": "https://chat.example.com/T0/hush", "format": "Slack"},
                {"name": "json", "type": "Notification", "url": "https://bus.example.com/"},
            ]);
            let document = json!({
                "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
                "metadata": {"name": "shop", "namespace": "store"},
                "spec": {
                    "versions": [{"name": "v1", "service": "a"}], "stable": "v1", "webhooks": hooks,
                    "session": {"type": "Cookie", "name": "c", "secret": session},
                    "strategy": {"steps": [{"weight": weight}]},
                },
            });
            TrafficShift::read(&document).unwrap().qualified()
        };
        let fields = |refused: Result<(), String>| -> Vec<String> {
            let refused = refused.err().unwrap_or_default();
            assert!(!refused.contains("hush"), "{refused}");
            refused.lines().map(|line| line.split(": ").next().unwrap_or_default().to_owned()).collect()
        };
        let old = read("hush-hush", "hush", 10);
        let all = ["spec.session.secret", "spec.webhooks[1].secret", "spec.webhooks[2].url"];
        assert_eq!(fields(admit_literals(&old, None)), all);
        assert_eq!(literal_fields(&old), all);
        assert!(admit_literals(&old, None).unwrap_err().contains("urlSecretRef: {name: SECRET, key: KEY}"));
        // The rest of the document may change, so that a rollout can be rolled back.
        let mut moved = read("hush-hush", "hush", 20);
        moved.webhooks.remove(0);
        assert_eq!(admit_literals(&moved, Some(&old)), Ok(()));
        let another = read("hush-hush", "hush-2", 10);
        assert_eq!(fields(admit_literals(&another, Some(&old))), ["spec.webhooks[1].secret"]);
    }

    #[test]
    fn fields_of_several_services_have_their_index() {
        let service = |name: &str, version: Value| json!({"name": name, "versions": [version]});
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
            "metadata": {"name": "shop", "namespace": "store"},
            "spec": {"stable": "v1", "services": [
                service("cart", json!({"name": "v1", "service": "cart"})),
                service("till", json!({"name": "v1", "endpoints": ["10.0.0.1:80"]})),
            ]},
        });
        let errors = admit(&TrafficShift::read(&document).unwrap().qualified()).unwrap_err();
        assert!(errors.starts_with("spec.services[1].versions[0].endpoints: "), "{errors}");
    }
}
