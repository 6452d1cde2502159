//! Sends one request to a webhook: signed, without following redirects, reading a bounded part of the response.

use hmac::{Hmac, KeyInit, Mac};
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Response, StatusCode, Url, redirect};
use sha2::Sha256;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;
use tideshift_core::shift::{HookSecret, HookUrl, Webhook};
use tokio::sync::watch;

use crate::limits::Limit;
use crate::net::{io_reason, reason};
use crate::secret_values::{SecretUse, SecretValues};
use crate::webhooks::egress::{Egress, Resolver};

/// The maximum number of bytes that are read from a response.
const MAX_ANSWER: usize = 4 << 10;
/// The maximum number of characters of it that are displayed.
const MAX_WORDS: usize = 200;
/// The backoff after the first request without a response, and the maximum; it doubles each time.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

/// The result of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum GateResponse {
    /// 2xx.
    Yes,
    /// 4xx, with its message.
    No(String),
    /// Anything else, or no response: retry.
    None(String),
}

/// Sends requests.
#[derive(Debug, Clone)]
pub(super) struct WebhookClient {
    client: reqwest::Client,
    egress: Egress,
    limit: Limit,
    secrets: watch::Receiver<Arc<SecretValues>>,
}

impl WebhookClient {
    pub(super) fn new(
        egress: Egress,
        limit: Limit,
        secrets: watch::Receiver<Arc<SecretValues>>,
    ) -> Result<Self, reqwest::Error> {
        // A redirect leads to an address that the document does not name.
        let client = reqwest::Client::builder().redirect(redirect::Policy::none());
        let client = client.dns_resolver(Resolver::new(egress.clone()));
        let client = client.user_agent(concat!("tideshift/", env!("CARGO_PKG_VERSION"))).build()?;
        Ok(Self { client, egress, limit, secrets })
    }

    /// Posts a JSON body for a document of this namespace. Receivers deduplicate by `id`.
    pub(super) async fn post(&self, namespace: &str, webhook: &Webhook, id: &str, body: &[u8]) -> GateResponse {
        let (url, is_secret) = match &webhook.url {
            HookUrl::Text(url) => (url.clone(), false),
            HookUrl::Ref(key) => match self.secrets.borrow().get(namespace, SecretUse::Url, key) {
                Ok(secret) => (secret.expose().to_owned(), true),
                Err(why) => return GateResponse::None(format!("urlSecretRef: {why}")),
            },
        };
        let url = match Url::parse(&url) {
            Ok(url) => url,
            Err(error) => return GateResponse::None(error.to_string()),
        };
        let reply = self.post_to(url.clone(), namespace, webhook, id, body).await;
        if is_secret { reply.without(&url) } else { reply }
    }

    /// Completes when a secret has changed.
    pub(super) async fn secrets_changed(&mut self) {
        if self.secrets.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Ignores changes of secrets before this call.
    pub(super) fn mark_secrets_seen(&mut self) {
        self.secrets.mark_unchanged();
    }

    async fn post_to(&self, url: Url, namespace: &str, webhook: &Webhook, id: &str, body: &[u8]) -> GateResponse {
        if let Err(why) = self.egress.check(&url) {
            return GateResponse::None(why);
        }
        let _place = self.limit.admit(namespace).await;
        let timestamp = jiff::Timestamp::now().as_second().to_string();
        let mut request = self.client.post(url).timeout(webhook.timeout);
        request = request.header(CONTENT_TYPE, "application/json");
        request = request.header("x-tideshift-id", id).header("x-tideshift-timestamp", &timestamp);
        match self.secret(namespace, webhook).await {
            Ok(None) => {}
            Ok(Some(secret)) => request = request.header("x-tideshift-signature", sign(&secret, &timestamp, body)),
            Err(why) => return GateResponse::None(why),
        }
        match request.body(body.to_vec()).send().await {
            Ok(response) => read(response).await,
            Err(error) => GateResponse::None(reason(&error)),
        }
    }
}

impl GateResponse {
    /// The same without parts of the URL, which may be a secret.
    fn without(self, url: &Url) -> Self {
        let hide = |words: String| {
            let query = url.query_pairs().map(|(_, value)| value.into_owned());
            let parts = url.path_segments().into_iter().flatten().map(str::to_owned).chain(query);
            // Shorter ones are words such as `api`.
            let parts = parts.filter(|part| part.len() >= 6);
            let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let hidden = [url.to_string(), url.path().to_owned(), host].into_iter().chain(parts);
            hidden.filter(|part| part.len() > 1).fold(words, |words, part| words.replace(&part, "…"))
        };
        match self {
            Self::Yes => Self::Yes,
            Self::No(words) => Self::No(hide(words)),
            Self::None(words) => Self::None(hide(words)),
        }
    }
}

impl WebhookClient {
    async fn secret(&self, namespace: &str, webhook: &Webhook) -> Result<Option<Vec<u8>>, String> {
        match &webhook.secret {
            None => Ok(None),
            Some(HookSecret::Text(secret)) => Ok(Some(secret.as_bytes().to_vec())),
            Some(HookSecret::Ref(key)) => {
                let secrets = self.secrets.borrow();
                let secret = secrets.get(namespace, SecretUse::Signature, key);
                secret.map(|secret| Some(secret.as_bytes().to_vec())).map_err(|why| format!("secretRef: {why}"))
            }
            Some(HookSecret::File(path)) => {
                let bytes = tokio::fs::read(path).await;
                let bytes =
                    bytes.map_err(|error| format!("secretFile {path} cannot be read: {}", io_reason(&error)))?;
                let secret = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
                let secret = secret.strip_suffix(b"\r").unwrap_or(secret).to_vec();
                if secret.is_empty() { Err(format!("secretFile {path} is empty")) } else { Ok(Some(secret)) }
            }
        }
    }
}

/// `sha256=` and the hex HMAC of `TIMESTAMP.BODY`.
fn sign(secret: &[u8], timestamp: &str, body: &[u8]) -> String {
    let mut signature = "sha256=".to_owned();
    // HMAC accepts keys of any length.
    if let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) {
        for part in [timestamp.as_bytes(), b".", body] {
            mac.update(part);
        }
        for byte in mac.finalize().into_bytes() {
            let _ = write!(signature, "{byte:02x}");
        }
    }
    signature
}

async fn read(mut response: Response) -> GateResponse {
    let status = response.status();
    if status.is_success() {
        return GateResponse::Yes;
    }
    let mut bytes = Vec::new();
    while bytes.len() < MAX_ANSWER
        && let Ok(Some(chunk)) = response.chunk().await
    {
        bytes.extend_from_slice(&chunk);
    }
    bytes.truncate(MAX_ANSWER);
    let words = words(response.headers(), &bytes);
    let said = if words.is_empty() { format!("status {status}") } else { format!("status {status}: {words}") };
    let try_again = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
    match status {
        status if status.is_client_error() && !try_again.contains(&status) => GateResponse::No(said),
        status if status.is_redirection() => GateResponse::None(format!("{said}, and redirections are not followed")),
        _ => GateResponse::None(said),
    }
}

/// The message of a response: the `message` or `error` of JSON, or plain text.
fn words(headers: &HeaderMap, body: &[u8]) -> String {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let text = match kind.split(';').next().unwrap_or_default().trim() {
        "text/plain" => String::from_utf8_lossy(body).into_owned(),
        "application/json" => {
            let json = serde_json::from_slice::<serde_json::Value>(body).unwrap_or_default();
            let word = ["message", "error"].iter().find_map(|name| json[*name].as_str());
            word.unwrap_or_default().to_owned()
        }
        _ => String::new(),
    };
    let one_line = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let one_line = one_line.collect::<Vec<_>>().join(" ");
    match one_line.char_indices().nth(MAX_WORDS) {
        Some((cut, _)) => format!("{}…", &one_line[..cut]),
        None => one_line,
    }
}

/// The backoff after this many requests without a response: a random time between half and all of an exponentially
/// growing time.
pub(super) fn backoff(failures: u32) -> Duration {
    let longest = FIRST_BACKOFF.saturating_mul(1 << failures.min(10)).min(LONGEST_BACKOFF);
    let jitter = getrandom::u32().map_or(1.0, |random| f64::from(random) / f64::from(u32::MAX));
    longest.mul_f64(0.5 + jitter / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_what_others_compute() {
        // printf '%s' '1700000000.{"a":1}' | openssl dgst -sha256 -hmac secret
        let expected = "sha256=49f24e537407743fa4a0242bb63b94b9a47ee99cbbe071ccd8a22550ae411686";
        assert_eq!(sign(b"secret", "1700000000", br#"{"a":1}"#), expected);
    }

    #[test]
    fn nothing_is_said_of_a_url_that_is_a_secret() {
        let url = Url::parse("https://chat.example.com/services/T0/hush-hush?token=psst-psst").unwrap();
        for words in [
            "webhooks may not go to chat.example.com, which is 10.0.0.1",
            "status 404 Not Found: no such hook /services/T0/hush-hush",
            "status 403 Forbidden: hush-hush and psst-psst are unknown",
            "https://chat.example.com/services/T0/hush-hush?token=psst-psst",
        ] {
            let GateResponse::None(shown) = GateResponse::None(words.to_owned()).without(&url) else {
                panic!("another reply")
            };
            for hidden in ["chat.example", "hush", "psst", "T0"] {
                assert!(!shown.contains(hidden), "{shown}");
            }
        }
        let fine = "connection refused".to_owned();
        assert_eq!(GateResponse::No(fine.clone()).without(&url), GateResponse::No(fine));
    }

    #[test]
    fn an_answer_is_shown_in_one_line_of_bounded_length() {
        let words_of = |kind: &str, body: &str| {
            words(&[(CONTENT_TYPE, kind.parse().unwrap())].into_iter().collect(), body.as_bytes())
        };
        assert_eq!(words_of("text/plain; charset=utf-8", " change\r\n\u{7} freeze\u{1b}[2J "), "change freeze [2J");
        assert_eq!(words_of("application/json", r#"{"message": "ask Ann", "error": "no"}"#), "ask Ann");
        assert_eq!(words_of("application/json", r#"{"error": "no"}"#), "no");
        for (kind, body) in [("application/json", "{"), ("application/json", "[1]"), ("text/html", "<p>no</p>")] {
            assert_eq!(words_of(kind, body), "");
        }
        assert_eq!(words_of("text/plain", &"ä".repeat(1000)).chars().count(), MAX_WORDS + 1);
    }

    #[test]
    fn waits_grow_and_are_bounded() {
        for (failures, longest) in [(0, 500), (1, 1_000), (3, 4_000), (6, 30_000), (u32::MAX, 30_000)] {
            let wait = backoff(failures).as_millis();
            assert!((longest / 2..=longest).contains(&wait), "{failures}: {wait}");
        }
    }
}
