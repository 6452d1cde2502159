//! Sticky sessions: how a user stays on one version while weights move. A request header or a cookie of the proxy
//! identifies the user; [`crate::choice::split`] and [`crate::choice::plan`] choose the user's version.
//!
//! Everything is based on one hash per service: SipHash-2-4 with a key derived from the session's secret. Without the
//! secret, an attacker can neither find a user name that maps to a version nor forge a cookie.
//!
//! A cookie is `VERSION~GENERATION~STEP~ID~MAC`: the user's version, the generation of the session and the step of the
//! rollout at the time of the assignment in decimal, a random number that distinguishes users, and the SipHash of
//! everything before the last `~`, with a key that includes the name of the service; the last two numbers have 16 hex
//! digits.

use crate::decode::{Decoder, Fields};
use crate::matching::choice;
use crate::name;
use crate::secret_ref::SecretKeyRef;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use siphasher::sip::SipHasher24;
use siphasher::sip128;
use std::fmt;

/// How the users of one service are identified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// How a user is identified.
    #[serde(flatten)]
    pub by: SessionBy,
    /// Cookies of other generations are invalid: increase it to revoke assignments. Default 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub generation: u64,
    /// The key that salts the hash and signs the cookies; identical in all proxies that serve the same users. Default: the
    /// service's name, which prevents accidents but lets attackers forge cookies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<Secret>,
    /// Previous secrets that cookies may be signed with after a rotation: a user with such a cookie keeps the version
    /// and gets a cookie signed with the new secret. Never in a document.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub previous_secrets: Vec<Secret>,
}

/// The location of the user's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum SessionBy {
    /// In a cookie that the proxy sets, which records the user's assignment.
    Cookie {
        /// The cookie's name.
        name: String,
        /// How long browsers keep it, 1 s to 400 days; default a day.
        ttl_seconds: u64,
    },
    /// In a header of the request; an empty value identifies no user.
    Header {
        /// The header's name, in lower case.
        name: String,
    },
}

/// A string that never appears in messages or logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(String);

impl Secret {
    /// A secret created by code.
    pub fn new(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// The default lifetime of a cookie in browsers: one day.
const DEFAULT_TTL_SECONDS: u64 = 86_400;
/// The maximum length of a secret, in bytes.
const LONGEST_SECRET: usize = 1024;
/// The maximum number of previous secrets.
pub const MAX_PREVIOUS_SECRETS: usize = 2;
/// Browsers cap `Max-Age` at 400 days (RFC 6265bis).
const LONGEST_TTL_SECONDS: u64 = 400 * 86_400;

#[allow(clippy::trivially_copy_pass_by_ref)] // The shape that serde asks for.
fn is_zero(generation: &u64) -> bool {
    *generation == 0
}

impl Session {
    /// Reads the form in policies.
    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let session = Self::read_fields(&mut f, d);
        let previous = f.optional(d, "previousSecrets", |d, v| {
            let secrets = d.list(v, Secret::read)?;
            if secrets.len() > MAX_PREVIOUS_SECRETS {
                d.invalid(&Value::from("…"), format!("{MAX_PREVIOUS_SECRETS} secrets at most"));
            }
            Some(secrets.into_iter().map(|(_, secret)| secret).collect())
        });
        f.finish(d);
        Some(Self { previous_secrets: previous.unwrap_or_default(), ..session? })
    }

    /// Reads the form in documents, with the reference to the secret if there is one.
    pub(crate) fn read_in_document(d: &mut Decoder, value: &Value) -> Option<(Self, Option<SecretKeyRef>)> {
        let mut f = d.object(value)?;
        let session = Self::read_fields(&mut f, d);
        let secret = f.optional(d, "secretRef", SecretKeyRef::read);
        if f.has("secret") && f.has("secretRef") {
            d.within("secretRef", |d| d.invalid(&Value::from("…"), "either secret or secretRef"));
        }
        f.finish(d);
        Some((session?, secret))
    }

    fn read_fields(f: &mut Fields<'_>, d: &mut Decoder) -> Option<Self> {
        let allowed = "one of Cookie, Header";
        let kind = f.required(d, "type", allowed, |d, v| choice(d, v, &["Cookie", "Header"]));
        let by = match kind {
            Some("Header") => {
                f.required(d, "name", "a header's name", name::header).map(|name| SessionBy::Header { name })
            }
            _ => Self::read_cookie(f, d),
        };
        let generation = f.optional(d, "generation", Decoder::long).unwrap_or_default();
        let secret = f.optional(d, "secret", Secret::read);
        Some(Self { by: by?, generation, secret, previous_secrets: Vec::new() })
    }

    fn read_cookie(f: &mut Fields<'_>, d: &mut Decoder) -> Option<SessionBy> {
        let cookie_name = |d: &mut Decoder, v: &Value| d.text_where(v, "a cookie name", name::is_token);
        let name = f.required(d, "name", "a cookie's name", cookie_name);
        let ttl = f.optional(d, "ttlSeconds", |d, v| d.integer(v, 1, LONGEST_TTL_SECONDS));
        Some(SessionBy::Cookie { name: name?, ttl_seconds: ttl.unwrap_or(DEFAULT_TTL_SECONDS) })
    }
}

impl Secret {
    /// Errors never show the value.
    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let text = value.as_str().filter(|text| (1..=LONGEST_SECRET).contains(&text.len()));
        if text.is_none() {
            d.invalid(&Value::String("…".to_owned()), "a string of 1 to 1024 bytes");
        }
        text.map(|text| Self(text.to_owned()))
    }

    /// Parses a secret that is stored outside documents; a trailing newline, which editors add, is not part of it.
    ///
    /// # Errors
    ///
    /// What is wrong with it, without revealing it.
    pub fn from_outside(bytes: &[u8]) -> Result<Self, &'static str> {
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|_| "not UTF-8")?;
        match text.len() {
            0 => Err("empty"),
            1..=LONGEST_SECRET => Ok(Self(text.to_owned())),
            _ => Err("longer than 1,024 bytes, the most that a secret may have"),
        }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The text, for its intended use.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// Compares two byte strings in a time that depends only on their lengths.
pub fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
}

/// The keyed hash of the sessions of one service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionHash {
    users: SipHasher24,
    cookies: SipHasher24,
}

impl SessionHash {
    /// The key of cookies includes the service, so that a cookie is valid for one service only.
    pub(crate) fn new(service: &str, secret: &[u8]) -> Self {
        let keyed = |purpose: u64, text: &[u8]| {
            let key = sip128::SipHasher24::new_with_keys(purpose, 0).hash(text);
            SipHasher24::new_with_keys(key.h1, key.h2)
        };
        let of_service = [&(service.len() as u64).to_le_bytes(), service.as_bytes(), secret].concat();
        Self { users: keyed(0, secret), cookies: keyed(2, &of_service) }
    }

    /// The hash of the name of a user or a version.
    pub(crate) fn of(&self, name: &[u8]) -> u64 {
        self.users.hash(name)
    }

    /// The value of a cookie.
    pub(crate) fn cookie(&self, version: &str, generation: u64, step: u64, id: u64) -> String {
        let signed = format!("{version}~{generation}~{step}~{id:016x}");
        let mac = self.cookies.hash(signed.as_bytes());
        format!("{signed}~{mac:016x}")
    }

    /// The content of a cookie; `None` if [`Self::cookie`] did not create it with the same secret.
    pub(crate) fn read<'c>(&self, cookie: &'c [u8]) -> Option<Given<'c>> {
        let (signed, mac) = rsplit(cookie)?;
        if !same_bytes(&hex(self.cookies.hash(signed)), mac) {
            return None;
        }
        let (rest, id) = rsplit(signed)?;
        let (rest, step) = rsplit(rest)?;
        let (version, generation) = rsplit(rest)?;
        let text = |bytes| std::str::from_utf8(bytes).ok();
        Some(Given {
            version,
            generation: text(generation)?.parse().ok()?,
            step: text(step)?.parse().ok()?,
            id: u64::from_str_radix(text(id)?, 16).ok()?,
        })
    }
}

/// The assignment of a user, from a cookie.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Given<'c> {
    pub(crate) version: &'c [u8],
    pub(crate) generation: u64,
    pub(crate) step: u64,
    pub(crate) id: u64,
}

fn rsplit(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = text.iter().rposition(|b| *b == b'~')?;
    let (before, after) = text.split_at_checked(at)?;
    Some((before, after.get(1..)?))
}

/// Formats 16 lower-case hex digits.
fn hex(number: u64) -> [u8; 16] {
    std::array::from_fn(|i| {
        let digit = (number >> (60 - 4 * i)) as u8 & 15;
        if digit < 10 { b'0' + digit } else { b'a' + digit - 10 }
    })
}

/// JSON Schemas of the fields that the readers here parse.
#[cfg(feature = "schema")]
pub(crate) mod described {
    use crate::schema;
    use crate::secret_ref::SecretKeyRef;
    use schemars::JsonSchema;

    /// Sticky sessions: how the proxies identify the users of a service.
    #[derive(JsonSchema)]
    #[schemars(rename_all = "camelCase", deny_unknown_fields)]
    #[allow(dead_code, reason = "only its schema is used")]
    pub(crate) struct Session {
        /// What identifies a user. Cookie: a cookie that the proxy sets. Header: a header of the request; requests without it
        /// have no session.
        #[schemars(rename = "type")]
        kind: SessionType,
        /// The name of the cookie or header.
        #[schemars(with = "schema::Token")]
        name: String,
        /// How long browsers keep the cookie, at most 400 days; default one day. Only with type Cookie.
        #[schemars(range(min = 1, max = 34_560_000))]
        ttl_seconds: Option<u64>,
        /// Increase it to revoke all assignments of users to versions: cookies of other generations become invalid. Default 0.
        #[schemars(range(min = 0), extend("default" = 0))]
        generation: Option<u64>,
        /// The key that salts the hash and signs the cookies; identical in all proxies that serve the same users. Default: the
        /// service's name, which prevents accidents but lets attackers forge cookies.
        #[schemars(with = "Option<schema::Secret>")]
        secret: Option<String>,
        /// Where the secret is, in place of secret: a key of a Secret of the document's namespace, labelled
        /// `tideshift.dev/use: session`; outside of Kubernetes a file of `--secrets-dir`.
        secret_ref: Option<SecretKeyRef>,
    }

    #[derive(JsonSchema)]
    #[schemars(inline)]
    #[allow(dead_code, reason = "only its schema is used")]
    enum SessionType {
        Cookie,
        Header,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn errors(session: Value) -> String {
        Decoder::read(&session, Session::read).map_or_else(|errors| errors.to_string(), |_| String::new())
    }

    #[test]
    fn a_session_is_read_with_its_defaults_and_written_as_it_was() {
        let cookie = json!({"type": "Cookie", "name": "tideshift_checkout", "ttlSeconds": 86400});
        let header = json!({"type": "Header", "name": "X-User-Id", "generation": 3, "secret": "s"});
        let read = |value: &Value| Decoder::read(value, Session::read).unwrap();
        assert_eq!(serde_json::to_value(read(&cookie)).unwrap(), cookie);
        let written = json!({"type": "Header", "name": "x-user-id", "generation": 3, "secret": "s"});
        assert_eq!(serde_json::to_value(read(&header)).unwrap(), written);
        let without_ttl = read(&json!({"type": "Cookie", "name": "tideshift_checkout"}));
        assert_eq!(without_ttl, read(&cookie));
        assert!(!format!("{:?}", read(&header)).contains("\"s\""));
    }

    #[test]
    fn errors_name_the_field_and_never_the_secret() {
        assert_eq!(
            errors(json!({"type": "Sticky"})),
            "type: \"Sticky\" is not allowed; expected one of Cookie, Header\nname: missing; expected a cookie's name"
        );
        assert!(errors(json!({"type": "Cookie", "name": "a b"})).starts_with("name: \"a b\" is not allowed"));
        assert!(errors(json!({"type": "Cookie", "name": "a", "ttlSeconds": 0})).starts_with("ttlSeconds: 0 is not"));
        assert!(errors(json!({"type": "Header", "name": "x-tideshift-x"})).starts_with("name: "));
        assert!(errors(json!({"type": "Header", "name": "x", "ttlSeconds": 5})).starts_with("ttlSeconds: unknown"));
        let long = "geheim".repeat(200);
        assert_eq!(errors(json!({"type": "Header", "name": "x", "secret": long})).matches("geheim").count(), 0);
    }

    #[test]
    fn a_cookie_says_what_it_was_made_of_and_nobody_else_can_make_one() {
        let hash = SessionHash::new("shop", b"secret");
        let cookie = hash.cookie("v2.1~b", 7, 3, 0xabc);
        let given = Given { version: b"v2.1~b", generation: 7, step: 3, id: 0xabc };
        assert_eq!(hash.read(cookie.as_bytes()), Some(given));
        assert_eq!(SessionHash::new("shop", b"other").read(cookie.as_bytes()), None);
        assert_eq!(SessionHash::new("pay", b"secret").read(cookie.as_bytes()), None, "a cookie of another service");
        for at in 0..cookie.len() {
            let mut forged = cookie.clone().into_bytes();
            forged[at] ^= 1;
            assert_eq!(hash.read(&forged), None, "{}", String::from_utf8_lossy(&forged));
        }
        for made_up in ["", "v2", "~", "~~~~", "v2~0~0~0000000000000abc", "v2~0~0~0000000000000abc~0000000000000000"] {
            assert_eq!(hash.read(made_up.as_bytes()), None, "{made_up}");
        }
        assert_eq!(hash.read(cookie.to_uppercase().as_bytes()), None);
    }
}
