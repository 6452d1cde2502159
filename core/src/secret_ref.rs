//! A reference to a secret, in place of the secret itself. The controller resolves it: in Kubernetes to a Secret in the
//! namespace of the document, elsewhere to a file.

use crate::decode::Decoder;
use crate::name;
#[cfg(feature = "schema")]
use crate::schema;
use serde_json::Value;
use std::fmt;

/// One key of a Secret, with the fields that Kubernetes calls it by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct SecretKeyRef {
    /// The Secret's name.
    #[cfg_attr(feature = "schema", schemars(with = "schema::Name"))]
    pub name: String,
    /// The key in its data.
    #[cfg_attr(feature = "schema", schemars(with = "schema::SecretKey"))]
    pub key: String,
}

/// The maximum length of a key of a Secret, as in Kubernetes.
const LONGEST_KEY: usize = 253;

impl SecretKeyRef {
    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "the name of a Secret", name::service);
        let key = f.required(d, "key", "a key of the Secret", |d, v| {
            let allowed = "a key of a Secret: letters, digits, -, _ and ., not beginning with two dots";
            d.text_where(v, allowed, is_key)
        });
        f.finish(d);
        Some(Self { name: name?, key: key? })
    }
}

impl fmt::Display for SecretKeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.key)
    }
}

/// As in Kubernetes, so that no key escapes the directory where Secrets are mounted.
fn is_key(key: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    (1..=LONGEST_KEY).contains(&key.len()) && key.bytes().all(fine) && key != "." && !key.starts_with("..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn names_and_keys_lead_nowhere_else() {
        let read = |name: &str, key: &str| Decoder::read(&json!({"name": name, "key": key}), SecretKeyRef::read);
        for (name, key) in [("hook", "secret"), ("a.b-c", "TOKEN_1"), ("hook", ".hidden"), ("hook", "tls.key")] {
            assert_eq!(read(name, key).unwrap().to_string(), format!("{name}/{key}"));
        }
        let long = "k".repeat(LONGEST_KEY + 1);
        for (name, key) in [
            ("..", "secret"),
            (".", "secret"),
            ("", "secret"),
            ("a/b", "secret"),
            ("/etc", "secret"),
            ("a\0", "secret"),
            ("Hook", "secret"),
            ("hook", "."),
            ("hook", ".."),
            ("hook", "..data"),
            ("hook", "../other"),
            ("hook", "a/b"),
            ("hook", "a\\b"),
            ("hook", "a\0b"),
            ("hook", ""),
            ("hook", &long),
        ] {
            assert!(read(name, key).is_err(), "{name} {key}");
        }
    }
}
