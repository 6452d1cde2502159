//! Webhooks: gates that approve steps, and notifications of transitions. The controller sends the requests.

use super::SecretKeyRef;
use crate::decode::Decoder;
use crate::limits::PHASES;
use crate::matching::choice;
use crate::name;
use crate::session::Secret;
use crate::shift::fields::seconds;
use serde_json::Value;
use std::fmt;
use std::net::Ipv6Addr;
use std::time::Duration;

/// An HTTP endpoint that approves steps or receives notifications.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// The name in messages; unique within the document.
    pub name: String,
    /// Where to send.
    pub url: HookUrl,
    /// What requests are signed with; none: they are not.
    pub secret: Option<HookSecret>,
    /// The timeout of a request; default 10 s.
    pub timeout: Duration,
    /// Gate or notification.
    pub kind: WebhookKind,
}

/// Where a webhook's URL is, which may be a secret, as with chats.
#[derive(Clone, PartialEq, Eq)]
pub enum HookUrl {
    /// In the document: `http` or `https`, without user or fragment.
    Text(String),
    /// Outside of it.
    Ref(SecretKeyRef),
}

impl fmt::Debug for HookUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("…"),
            Self::Ref(secret) => secret.fmt(f),
        }
    }
}

/// Where a webhook's secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HookSecret {
    /// In the document.
    Text(Secret),
    /// In a file on the controller's machine, read for each request; a trailing newline is ignored.
    File(String),
    /// Outside of the document.
    Ref(SecretKeyRef),
}

/// What a webhook is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WebhookKind {
    /// Must approve a step before it begins.
    Gate {
        /// The numbers of the guarded steps, counted from 1; empty: every step.
        steps: Vec<usize>,
        /// The time between a refusal and the next request; default 15 s.
        period: Duration,
    },
    /// Receives transitions.
    Notification {
        /// The names of the phases; empty: every transition.
        phases: Vec<&'static str>,
        /// The number of retries of a failed delivery; default 5.
        retries: u32,
        /// The format of the body.
        format: NotificationFormat,
    },
}

/// The format of a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum NotificationFormat {
    /// All details as fields.
    Json,
    /// `{"text": "..."}`, which Slack, Mattermost and others accept.
    Slack,
}

/// The maximum number of webhooks in a document.
const MAX_WEBHOOKS: usize = 20;
/// The maximum length of a URL.
const LONGEST_URL: usize = 2048;

/// Reads webhooks with unique names.
pub(super) fn webhooks(d: &mut Decoder, value: &Value) -> Option<Vec<Webhook>> {
    let webhooks = d.list(value, Webhook::read)?;
    if value.as_array().is_some_and(|list| list.len() > MAX_WEBHOOKS) {
        d.invalid(value, format!("{MAX_WEBHOOKS} webhooks at most"));
    }
    for (n, (i, webhook)) in webhooks.iter().enumerate() {
        if webhooks.iter().take(n).any(|(_, earlier)| earlier.name == webhook.name) {
            let allowed = "a name that no webhook before has";
            d.at(*i, |d| d.within("name", |d| d.invalid(&Value::from(webhook.name.clone()), allowed)));
        }
    }
    Some(webhooks.into_iter().map(|(_, webhook)| webhook).collect())
}

impl Webhook {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a name", name::service);
        let kind = f.required(d, "type", "Gate or Notification", |d, v| choice(d, v, &["Gate", "Notification"]));
        let url = f.optional(d, "url", |d, v| {
            // Its password is for no log.
            let v = &v.as_str().map_or_else(|| v.clone(), |url| Value::from(without_user(url)));
            d.text_where(v, "an http or https URL with a host, without user, spaces or fragment", is_webhook_url)
        });
        let url_secret = f.optional(d, "urlSecretRef", SecretKeyRef::read).map(HookUrl::Ref);
        match (f.has("url"), f.has("urlSecretRef")) {
            (false, false) => d.missing("url", "an http or https URL (or urlSecretRef, where the URL is a secret)"),
            (true, true) => {
                d.within("urlSecretRef", |d| d.invalid(&Value::from("…"), "either url or urlSecretRef"));
            }
            _ => {}
        }
        let url = url.map(HookUrl::Text).or(url_secret);
        let text = f.optional(d, "secret", Secret::read).map(HookSecret::Text);
        let file = f.optional(d, "secretFile", Decoder::filled_text).map(HookSecret::File);
        let secret_ref = f.optional(d, "secretRef", SecretKeyRef::read).map(HookSecret::Ref);
        let secrets = ["secret", "secretFile", "secretRef"].into_iter().filter(|name| f.has(name));
        for name in secrets.skip(1).take(1).collect::<Vec<_>>() {
            d.within(name, |d| d.invalid(&Value::from("…"), "one of secret, secretFile and secretRef"));
        }
        let timeout = Duration::from_secs(f.optional(d, "timeoutSeconds", |d, v| d.integer(v, 1, 300)).unwrap_or(10));
        let kind = match kind {
            Some("Gate") => Some(WebhookKind::Gate {
                steps: f.optional(d, "steps", steps).unwrap_or_default(),
                period: seconds(&mut f, d, "periodSeconds", 1, 15),
            }),
            Some(_) => Some(WebhookKind::Notification {
                phases: f.optional(d, "phases", phases).unwrap_or_default(),
                retries: f.optional(d, "retries", |d, v| d.integer(v, 0, 20)).map_or(5, |retries| retries as u32),
                format: f.optional(d, "format", format).unwrap_or(NotificationFormat::Json),
            }),
            None => None,
        };
        // Without a type the allowed fields are unknown.
        if kind.is_some() {
            f.finish(d);
        }
        Some(Self { name: name?, url: url?, secret: text.or(file).or(secret_ref), timeout, kind: kind? })
    }

    /// Whether it is a gate.
    pub fn is_gate(&self) -> bool {
        matches!(self.kind, WebhookKind::Gate { .. })
    }

    /// Whether it must approve the step of this number, counted from 1.
    pub fn is_gate_of(&self, number: usize) -> bool {
        matches!(&self.kind, WebhookKind::Gate { steps, .. } if steps.is_empty() || steps.contains(&number))
    }

    /// Whether it receives transitions into the phase of this name.
    pub fn hears_of(&self, phase: &str) -> bool {
        matches!(&self.kind, WebhookKind::Notification { phases, .. } if phases.is_empty() || phases.contains(&phase))
    }
}

fn steps(d: &mut Decoder, value: &Value) -> Option<Vec<usize>> {
    if value.as_array().is_some_and(Vec::is_empty) {
        d.invalid(value, "at least one step's number (or no steps at all: every step)");
    }
    let numbers = d.list(value, |d, v| d.integer(v, 1, 1_000))?;
    Some(numbers.into_iter().map(|(_, number)| number as usize).collect())
}

fn phases(d: &mut Decoder, value: &Value) -> Option<Vec<&'static str>> {
    if value.as_array().is_some_and(Vec::is_empty) {
        d.invalid(value, "at least one phase (or no phases at all: every transition)");
    }
    Some(d.list(value, |d, v| choice(d, v, &PHASES))?.into_iter().map(|(_, phase)| phase).collect())
}

fn format(d: &mut Decoder, value: &Value) -> Option<NotificationFormat> {
    let format = choice(d, value, &["Json", "Slack"])?;
    Some(if format == "Slack" { NotificationFormat::Slack } else { NotificationFormat::Json })
}

/// The URL with user and password replaced by `***`.
fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest.get(..end).and_then(|authority| authority.rfind('@')) {
        Some(at) => format!("{scheme}://***{}", rest.get(at..).unwrap_or_default()),
        None => url.to_owned(),
    }
}

/// Whether a webhook may have this URL.
pub fn is_webhook_url(url: &str) -> bool {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let fine = url.len() <= LONGEST_URL && url.bytes().all(|b| b.is_ascii_graphic() && !b"#\\<>\"{}|^`".contains(&b));
    let authority = rest.and_then(|rest| rest.split(['/', '?']).next());
    fine && authority.is_some_and(is_authority)
}

/// `host` or `host:port`, with an IPv6 address in brackets.
fn is_authority(authority: &str) -> bool {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !authority.ends_with(']') => (host, port),
        _ => (authority, "443"),
    };
    let is_port = port.bytes().all(|b| b.is_ascii_digit()) && port.parse().is_ok_and(|port: u16| port != 0);
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_address = address.is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    is_port && (is_address || name::is_subdomain(&host.to_ascii_lowercase(), 253))
}

/// What readers take apart here, as a JSON Schema.
#[cfg(feature = "schema")]
pub(super) mod described {
    use super::NotificationFormat;
    use crate::schema;
    use schemars::JsonSchema;

    /// An HTTP endpoint that approves steps or receives notifications.
    #[derive(JsonSchema)]
    #[schemars(rename_all = "camelCase", deny_unknown_fields)]
    #[allow(dead_code, reason = "only its schema is used")]
    pub(crate) struct Webhook {
        /// The name in messages; unique within the document.
        #[schemars(with = "schema::Name")]
        name: String,
        /// Gate: must approve a step before it begins. Notification: receives transitions.
        #[schemars(rename = "type")]
        kind: WebhookType,
        /// Where to send: `http` or `https`, without user or fragment. Either this or urlSecretRef.
        #[schemars(with = "Option<schema::Url>")]
        url: Option<String>,
        /// Where the URL is, in place of url, if it is a secret, as those of chats are: a key of a Secret of the document's
        /// namespace, labelled `tideshift.dev/use: webhook`; outside of Kubernetes a file of `--secrets-dir`.
        url_secret_ref: Option<crate::secret_ref::SecretKeyRef>,
        /// What requests are signed with; they are not signed where neither this nor secretRef nor secretFile is given.
        #[schemars(with = "Option<schema::Secret>")]
        secret: Option<String>,
        /// Where the secret is, in place of secret; as urlSecretRef.
        secret_ref: Option<crate::secret_ref::SecretKeyRef>,
        /// A file of the controller's with the secret, in place of secret. It is read each time.
        #[schemars(with = "Option<schema::FilledText>")]
        secret_file: Option<String>,
        /// The timeout of a request; default 10.
        #[schemars(range(min = 1, max = 300), extend("default" = 10))]
        timeout_seconds: Option<u64>,
        /// Gate only: the numbers of the steps that it guards, counted from 1. Default: every step.
        #[schemars(length(min = 1), inner(range(min = 1, max = 1_000)))]
        steps: Option<Vec<usize>>,
        /// Gate only: the time between a refusal and the next request; default 15.
        #[schemars(with = "Option<schema::AtLeastOneSecond>")]
        period_seconds: Option<u64>,
        /// Notification only: the phases that it receives. Default: every transition.
        #[schemars(with = "Option<Vec<schema::Phase>>", length(min = 1))]
        phases: Option<Vec<String>>,
        /// Notification only: the number of retries of a failed delivery; default 5.
        #[schemars(range(min = 0, max = 20))]
        retries: Option<u32>,
        /// Notification only: the format of the body; default Json. Json: all details as fields. Slack: `{"text": "..."}`, which
        /// Slack, Mattermost and others accept.
        format: Option<NotificationFormat>,
    }

    #[derive(JsonSchema)]
    #[schemars(inline)]
    #[allow(dead_code, reason = "only its schema is used")]
    enum WebhookType {
        Gate,
        Notification,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(value: &Value) -> Result<Vec<Webhook>, Vec<String>> {
        Decoder::read(value, |d, value| d.within("webhooks", |d| webhooks(d, value)))
            .map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
    }

    fn gate() -> Value {
        json!({"name": "approval", "type": "Gate", "url": "https://ci.example.com/gate?team=a"})
    }

    fn notification() -> Value {
        json!({"name": "chat", "type": "Notification", "url": "http://127.0.0.1:8080"})
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let webhooks = read(&json!([gate(), notification()])).unwrap();
        let seconds = Duration::from_secs;
        assert_eq!(webhooks[0].kind, WebhookKind::Gate { steps: vec![], period: seconds(15) });
        let format = NotificationFormat::Json;
        assert_eq!(webhooks[1].kind, WebhookKind::Notification { phases: vec![], retries: 5, format });
        assert!(webhooks.iter().all(|hook| hook.secret.is_none() && hook.timeout == seconds(10)));
        assert!(webhooks[0].is_gate_of(1) && webhooks[0].is_gate_of(99) && !webhooks[0].hears_of("Failed"));
        assert!(webhooks[1].hears_of("Failed") && !webhooks[1].is_gate_of(1));
    }

    #[test]
    fn what_is_said_is_taken() {
        let (mut gate, mut notification) = (gate(), notification());
        gate["steps"] = json!([2, 3]);
        gate["periodSeconds"] = json!(1);
        gate["secretFile"] = json!("/etc/hook");
        gate["timeoutSeconds"] = json!(300);
        notification["phases"] = json!(["Failed", "Succeeded"]);
        notification["retries"] = json!(0);
        notification["format"] = json!("Slack");
        notification["secret"] = json!("hush-hush");
        notification["url"] = json!("https://chat.example.com/T0/hush-hush");
        let webhooks = read(&json!([gate, notification])).unwrap();
        assert!(!webhooks[0].is_gate_of(1) && webhooks[0].is_gate_of(3));
        assert!(webhooks[1].hears_of("Succeeded") && !webhooks[1].hears_of("Paused"));
        assert_eq!(webhooks[0].secret, Some(HookSecret::File("/etc/hook".to_owned())));
        assert!(!format!("{webhooks:?}").contains("hush"), "secrets are not shown");
    }

    #[test]
    fn a_secret_may_be_a_reference() {
        let reference = json!({"name": "hooks", "key": "chat"});
        let mut by_ref = notification();
        by_ref.as_object_mut().unwrap().remove("url");
        (by_ref["urlSecretRef"], by_ref["secretRef"]) = (reference.clone(), json!({"name": "hooks", "key": "sign"}));
        let webhook = read(&json!([by_ref])).unwrap().remove(0);
        let key = |key: &str| SecretKeyRef { name: "hooks".to_owned(), key: key.to_owned() };
        assert_eq!((webhook.url, webhook.secret), (HookUrl::Ref(key("chat")), Some(HookSecret::Ref(key("sign")))));
        (by_ref["url"], by_ref["secret"]) = (json!("https://chat.example.com/T0/hush"), json!("hush"));
        let mut neither = gate();
        neither.as_object_mut().unwrap().remove("url");
        neither["secretRef"] = json!({"name": "hooks"});
        assert_eq!(
            read(&json!([by_ref, neither])).unwrap_err(),
            [
                "webhooks[0].urlSecretRef: \"…\" is not allowed; expected either url or urlSecretRef",
                "webhooks[0].secretRef: \"…\" is not allowed; expected one of secret, secretFile and secretRef",
                "webhooks[1].url: missing; expected an http or https URL (or urlSecretRef, where the URL is a secret)",
                "webhooks[1].secretRef.key: missing; expected a key of the Secret",
            ]
        );
    }

    #[test]
    fn mistakes_are_told_at_once_with_their_places() {
        let mut with_both = gate();
        (with_both["secret"], with_both["secretFile"]) = (json!("hush"), json!("/etc/hook"));
        (with_both["retries"], with_both["steps"]) = (json!(3), json!([0]));
        let mut wrong = notification();
        (wrong["phases"], wrong["format"], wrong["secret"]) = (json!([]), json!("XML"), json!(""));
        let untyped = json!({"name": "approval", "url": "ftp://example.com", "phases": ["Done"]});
        assert_eq!(
            read(&json!([with_both, wrong, untyped, gate()])).unwrap_err(),
            [
                "webhooks[0].secretFile: \"…\" is not allowed; expected one of secret, secretFile and secretRef",
                "webhooks[0].steps[0]: 0 is not allowed; expected an integer from 1 to 1000",
                "webhooks[0].retries: unknown field (known here: name, type, url, urlSecretRef, secret, secretFile, \
                 secretRef, timeoutSeconds, steps, periodSeconds)",
                "webhooks[1].secret: \"…\" is not allowed; expected a string of 1 to 1024 bytes",
                "webhooks[1].phases: [] is not allowed; expected at least one phase (or no phases at all: every \
                 transition)",
                "webhooks[1].format: \"XML\" is not allowed; expected one of Json, Slack",
                "webhooks[2].type: missing; expected Gate or Notification",
                "webhooks[2].url: \"ftp://example.com\" is not allowed; expected an http or https URL with a host, without \
                 user, spaces or fragment",
                "webhooks[3].name: \"approval\" is not allowed; expected a name that no webhook before has",
            ]
        );
    }

    #[test]
    fn only_urls_of_the_web_are_taken() {
        for fine in [
            "http://a",
            "https://hooks.example.com/services/T0/B0/x?y=%20",
            "http://127.0.0.1:8080/",
            "https://[::1]",
            "https://[::1]:8443/a",
            "HTTP://a".to_ascii_lowercase().as_str(),
            "https://Example.com?a=b",
        ] {
            assert!(is_webhook_url(fine), "{fine}");
        }
        for bad in [
            "",
            "a",
            "http://",
            "http:///a",
            "https://user:word@example.com/",
            "file:///etc/passwd",
            "http://a:0",
            "http://a:65536",
            "http://a:",
            "http://a b",
            "http://a/#b",
            "http://a\\@b",
            "http://[::1",
            "http://::1",
            "http://a/\u{e9}",
            "http://a_b",
        ] {
            assert!(!is_webhook_url(bad), "{bad}");
        }
        assert!(!is_webhook_url(&format!("http://a/{}", "b".repeat(LONGEST_URL))));
    }

    #[test]
    fn a_password_in_a_url_is_in_no_message() {
        for (url, shown) in [
            ("https://user:hunter2@a.example/b?c@d", "https://***@a.example/b?c@d"),
            ("https://user@p@ss@a.example", "https://***@a.example"),
            ("https://a.example/b@c", "https://a.example/b@c"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(without_user(url), shown);
        }
        let webhook = json!({"name": "a", "type": "Gate", "url": "https://user:hunter2@a.example/"});
        let error = Decoder::read(&webhook, Webhook::read).unwrap_err().to_string();
        assert!(error.contains("without user") && !error.contains("hunter2"), "{error}");
    }
}
