//! The secrets that documents refer to, and their current values. Documents keep their references; the values are used
//! only in webhook requests and in the services of a policy.

use std::collections::BTreeMap;
use std::fmt;
use tideshift_core::session::Secret;
use tideshift_core::shift::{HookSecret, HookUrl, SecretKeyRef, ShiftService, TrafficShift, is_webhook_url};

/// The maximum number of bytes read from a secret: the longest secret that a document can contain, and a newline.
pub const MAX_BYTES: usize = 1024 + 2;

/// The use of a secret. A secret for one use must not be used for another: session secrets are sent to proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecretUse {
    /// Signs session cookies and salts their hash.
    Session,
    /// Signs webhook requests.
    Signature,
    /// The URL of a webhook.
    Url,
}

impl SecretUse {
    /// The value of the label that allows this use.
    pub fn label(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Signature | Self::Url => "webhook",
        }
    }

    /// Parses a secret for this use from bytes outside documents.
    ///
    /// # Errors
    ///
    /// What is wrong with it, without revealing it.
    pub fn read(self, bytes: &[u8]) -> Result<Secret, String> {
        let secret = Secret::from_outside(bytes)?;
        if self == Self::Url && !is_webhook_url(secret.expose()) {
            return Err("not an http or https URL with a host, without user, spaces or fragment".to_owned());
        }
        Ok(secret)
    }
}

/// A field of a document that refers to a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference<'s> {
    /// The field, such as `spec.session.secretRef`.
    pub field: String,
    /// Its use.
    pub of: SecretUse,
    /// The name and key of the secret.
    pub key: &'s SecretKeyRef,
}

/// All references to secrets in a document.
pub fn references(shift: &TrafficShift) -> Vec<Reference<'_>> {
    let sessions = services(shift).filter_map(|(at, service)| {
        let key = service.session_secret.as_ref()?;
        Some(Reference { field: format!("{at}.session.secretRef"), of: SecretUse::Session, key })
    });
    let webhooks = shift.webhooks.iter().enumerate().flat_map(|(i, webhook)| {
        let url = match &webhook.url {
            HookUrl::Ref(key) => Some(("urlSecretRef", SecretUse::Url, key)),
            HookUrl::Text(_) => None,
        };
        let secret = match &webhook.secret {
            Some(HookSecret::Ref(key)) => Some(("secretRef", SecretUse::Signature, key)),
            _ => None,
        };
        let both = url.into_iter().chain(secret);
        both.map(move |(field, of, key)| Reference { field: format!("spec.webhooks[{i}].{field}"), of, key })
    });
    sessions.chain(webhooks).collect()
}

/// The services of a document, each with its path.
pub fn services(shift: &TrafficShift) -> impl Iterator<Item = (String, &ShiftService)> {
    let several = shift.services.len() > 1 || shift.services.iter().any(|service| service.name != shift.name);
    let at = move |n| if several { format!("spec.services[{n}]") } else { "spec".to_owned() };
    shift.services.iter().enumerate().map(move |(n, service)| (at(n), service))
}

/// The namespace whose secrets a document may use; empty outside clusters, where there are no namespaces.
fn namespace(shift: &TrafficShift) -> &str {
    shift.namespace.as_deref().unwrap_or_default()
}

/// The values of the secrets that documents refer to.
#[derive(Clone, Default, PartialEq)]
pub struct SecretValues(BTreeMap<(String, SecretUse, SecretKeyRef), Result<Secret, String>>);

impl SecretValues {
    /// Looks up all references, by namespace, use, name and key.
    pub fn of<'s>(
        shifts: impl IntoIterator<Item = &'s TrafficShift>,
        look_up: impl Fn(&str, SecretUse, &SecretKeyRef) -> Result<Secret, String>,
    ) -> Self {
        let mut values = BTreeMap::new();
        for shift in shifts {
            let namespace = namespace(shift);
            for Reference { of, key, .. } in references(shift) {
                values.entry((namespace.to_owned(), of, key.clone())).or_insert_with(|| look_up(namespace, of, key));
            }
        }
        Self(values)
    }

    /// The value of a secret.
    ///
    /// # Errors
    ///
    /// Why the value is unknown.
    pub fn get(&self, namespace: &str, of: SecretUse, key: &SecretKeyRef) -> Result<&Secret, String> {
        match self.0.get(&(namespace.to_owned(), of, key.clone())) {
            Some(Ok(secret)) => Ok(secret),
            Some(Err(why)) => Err(why.clone()),
            None => Err("it has not been looked up yet".to_owned()),
        }
    }

    /// The session secret of a service, if known.
    pub fn of_session(&self, shift: &TrafficShift, service: &ShiftService) -> Option<&Secret> {
        self.get(namespace(shift), SecretUse::Session, service.session_secret.as_ref()?).ok()
    }

    /// The unresolved references of a document, one line for each field.
    pub fn unresolved(&self, shift: &TrafficShift) -> Vec<String> {
        let line = |Reference { field, of, key }: Reference<'_>| {
            let why = self.get(namespace(shift), of, key).err()?;
            Some(format!("{field}: {why}"))
        };
        references(shift).into_iter().filter_map(line).collect()
    }
}

impl fmt::Debug for SecretValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shift() -> TrafficShift {
        let key = |key: &str| json!({"name": "keys", "key": key});
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
            "metadata": {"name": "shop", "namespace": "store"},
            "spec": {
                "versions": [{"name": "v1"}], "stable": "v1",
                "session": {"type": "Cookie", "name": "c", "secretRef": key("session")},
                "webhooks": [
                    {"name": "ci", "type": "Gate", "url": "https://ci.example.com", "secretRef": key("sign")},
                    {"name": "chat", "type": "Notification", "urlSecretRef": key("url")},
                ],
            },
        });
        TrafficShift::read(&document).unwrap()
    }

    #[test]
    fn what_is_referred_to_is_looked_up_in_the_documents_namespace_and_shown_nowhere() {
        let shift = shift();
        let values = SecretValues::of([&shift], |namespace, of, key| {
            assert_eq!((namespace, key.name.as_str()), ("store", "keys"));
            match key.key.as_str() {
                "session" => of.read(b"hush-hush\n"),
                "sign" => Err("there is no Secret keys".to_owned()),
                _ => of.read(b"hush-hush, and no URL"),
            }
        });
        assert_eq!(values.of_session(&shift, &shift.services[0]).unwrap().expose(), "hush-hush");
        let unresolved = values.unresolved(&shift);
        assert_eq!(
            unresolved,
            [
                "spec.webhooks[0].secretRef: there is no Secret keys",
                "spec.webhooks[1].urlSecretRef: not an http or https URL with a host, without user, spaces or fragment",
            ]
        );
        let shown = format!("{values:?} {shift:?} {unresolved:?}");
        assert!(shown.contains("keys") && !shown.contains("hush"), "{shown}");
        let key = SecretKeyRef { name: "keys".to_owned(), key: "session".to_owned() };
        assert!(values.get("store", SecretUse::Signature, &key).is_err(), "what is for sessions signs no webhook");
        assert!(values.get("shop", SecretUse::Session, &key).is_err(), "nor is it of another namespace");
    }

    #[test]
    fn what_is_kept_outside_is_text_of_a_bounded_length() {
        let read = |bytes: &[u8]| SecretUse::Signature.read(bytes).map(|secret| secret.expose().to_owned());
        assert_eq!(read(b"a\r\n").unwrap(), "a");
        assert_eq!(read(b" a\n\n").unwrap(), " a\n", "one newline, and nothing else");
        assert_eq!(read(&[b'x'; MAX_BYTES - 2]).unwrap().len(), 1024);
        assert!(read(&[b'x'; MAX_BYTES - 1]).unwrap_err().starts_with("longer than 1,024 bytes"));
        assert_eq!((read(b"").unwrap_err(), read(b"\n").unwrap_err()), ("empty".to_owned(), "empty".to_owned()));
        assert_eq!(read(b"hush\xff").unwrap_err(), "not UTF-8");
        assert!(SecretUse::Url.read(b"https://chat.example.com/T0/hush\n").is_ok());
        assert!(!SecretUse::Url.read(b"hush:hush").unwrap_err().contains("hush"));
    }
}
