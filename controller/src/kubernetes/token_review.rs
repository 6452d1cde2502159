//! Authenticates proxies by ServiceAccount tokens: a TokenReview tells whether a token is valid for the audience of
//! proxies. Results are cached for a while, so that reports do not cause one review each. A token that cannot be valid
//! is not reviewed, and a peer that sends many invalid tokens is rate limited.

use crate::kubernetes::reason;
use crate::metrics::ControllerMetrics;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a positive result is cached: a revoked token is refused after that.
const YES: Duration = Duration::from_secs(60);
/// How long a negative result is cached.
const NO: Duration = Duration::from_secs(10);
/// Timeout of a review.
const PATIENCE: Duration = Duration::from_secs(3);
/// The maximum number of cached results of each kind.
const MAX_ANSWERS: usize = 20_000;
/// The longest token that is reviewed.
const MAX_TOKEN: usize = 8 << 10;
/// How many invalid tokens a peer may have reviewed at once, and how many more each second.
const MAX_NOES: f64 = 20.0;
const NOES_PER_SECOND: f64 = 1.0;
/// The maximum number of peers whose invalid tokens are counted.
const MAX_PEERS: usize = 4_096;

/// Reviews tokens with the cluster.
pub struct TokenReviewer {
    client: Client,
    audience: String,
    known: Mutex<Known>,
    done: ControllerMetrics,
}

/// The identity that a valid token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reviewed {
    /// The user name.
    pub user: String,
    /// The namespace and name of the pod that the token is bound to, if any.
    pub pod: Option<(String, String)>,
}

/// The cache. No I/O and no clock.
#[derive(Debug, Default)]
struct Known {
    /// By SHA-256 of the token; negative results are kept apart, so that no number of them evicts a positive one.
    yes: Answers<Reviewed>,
    no: Answers<()>,
    /// The number of invalid tokens of each peer, decayed over time, and when it was last updated.
    peers: BTreeMap<IpAddr, (f64, Instant)>,
}

#[derive(Debug)]
struct Answers<T>(BTreeMap<[u8; 32], (T, Instant)>);

impl<T> Default for Answers<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Answers<T> {
    fn get(&self, key: &[u8; 32], now: Instant) -> Option<&T> {
        self.0.get(key).filter(|(_, until)| now < *until).map(|(answer, _)| answer)
    }

    fn insert(&mut self, key: [u8; 32], answer: T, until: Instant, now: Instant) {
        if self.0.len() >= MAX_ANSWERS {
            self.0.retain(|_, (_, until)| now < *until);
        }
        if self.0.len() < MAX_ANSWERS {
            self.0.insert(key, (answer, until));
        }
    }
}

impl Known {
    fn noes_of(&self, peer: IpAddr, now: Instant) -> f64 {
        self.peers.get(&peer).map_or(0.0, |(noes, at)| {
            (noes - now.saturating_duration_since(*at).as_secs_f64() * NOES_PER_SECOND).max(0.0)
        })
    }

    /// Whether a peer may have a token reviewed; it counts as invalid until the review accepts it.
    fn may_ask(&mut self, peer: Option<IpAddr>, now: Instant) -> bool {
        let Some(peer) = peer else { return true };
        let noes = self.noes_of(peer, now);
        if noes + 1.0 > MAX_NOES {
            return false;
        }
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&peer) {
            let (peers, forgiven) =
                (std::mem::take(&mut self.peers), Duration::from_secs_f64(MAX_NOES / NOES_PER_SECOND));
            self.peers =
                peers.into_iter().filter(|(_, (_, at))| now.saturating_duration_since(*at) < forgiven).collect();
            if self.peers.len() >= MAX_PEERS {
                return false;
            }
        }
        self.peers.insert(peer, (noes + 1.0, now));
        true
    }

    fn was_yes(&mut self, peer: Option<IpAddr>, now: Instant) {
        let Some(peer) = peer else { return };
        let noes = self.noes_of(peer, now) - 1.0;
        match noes > 0.0 {
            true => drop(self.peers.insert(peer, (noes, now))),
            false => drop(self.peers.remove(&peer)),
        }
    }
}

impl TokenReviewer {
    /// A reviewer for tokens of this audience.
    pub fn new(client: Client, audience: String, done: ControllerMetrics) -> Self {
        Self { client, audience, known: Mutex::default(), done }
    }

    /// The identity of a token, if the cluster issued it for the audience. A failed review counts as invalid.
    pub async fn review(&self, token: &[u8], peer: Option<IpAddr>) -> Option<Reviewed> {
        let key: [u8; 32] = Sha256::digest(token).into();
        let now = Instant::now();
        {
            let known = self.known();
            if let Some(reviewed) = known.yes.get(&key, now) {
                return Some(reviewed.clone());
            }
            if known.no.get(&key, now).is_some() {
                return None;
            }
        }
        let Some(token) =
            std::str::from_utf8(token).ok().filter(|token| is_for(token, &self.audience, jiff::Timestamp::now()))
        else {
            self.done.reviewed("malformed");
            return None;
        };
        if !self.known().may_ask(peer, now) {
            self.done.reviewed("limited");
            return None;
        }
        let answer = match timeout(PATIENCE, self.ask(token)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                self.done.reviewed("error");
                tracing::warn!("cannot have a proxy's token reviewed: {}", reason(&error));
                return None;
            }
            Err(_) => {
                self.done.reviewed("error");
                tracing::warn!("cannot have a proxy's token reviewed: no answer within {} s", PATIENCE.as_secs());
                return None;
            }
        };
        self.done.reviewed(if answer.is_some() { "yes" } else { "no" });
        let (mut known, now) = (self.known(), Instant::now());
        match &answer {
            Some(reviewed) => {
                known.was_yes(peer, now);
                known.yes.insert(key, reviewed.clone(), now + YES, now);
            }
            None => known.no.insert(key, (), now + NO, now),
        }
        answer
    }

    async fn ask(&self, token: &str) -> Result<Option<Reviewed>, kube::Error> {
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.audience.clone()]) },
            status: None,
        };
        let answer = Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        let status = answer.status.unwrap_or_default();
        // A cluster that does not support audiences returns none; its answer does not prove the audience.
        let audiences = status.audiences.unwrap_or_default();
        if !status.authenticated.unwrap_or_default() || !audiences.contains(&self.audience) {
            return Ok(None);
        }
        let user = status.user.unwrap_or_default();
        let username = user.username.unwrap_or_default();
        let extra = user.extra.unwrap_or_default();
        let pod = extra.get("authentication.kubernetes.io/pod-name").and_then(|names| names.first());
        let namespace = username.strip_prefix("system:serviceaccount:").and_then(|of| of.split(':').next());
        let pod = namespace.zip(pod).map(|(namespace, pod)| (namespace.to_owned(), pod.clone()));
        Ok(Some(Reviewed { user: username, pod }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a token looks like one that the cluster may have issued for an audience: an unexpired JWT with an issuer
/// that names the audience. Only a review proves its validity.
fn is_for(token: &str, audience: &str, now: jiff::Timestamp) -> bool {
    let parts: Vec<&str> = token.split('.').collect();
    let [header, claims, signature] = parts.as_slice() else { return false };
    let is_part =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if token.len() > MAX_TOKEN || !is_part(signature) {
        return false;
    }
    let read = |part: &str| serde_json::from_slice::<Value>(&base64url(part)?).ok();
    let Some((header, claims)) = read(header).zip(read(claims)) else { return false };
    let names_audience = match &claims["aud"] {
        Value::Array(audiences) => audiences.iter().any(|of| of == audience),
        of => of == audience,
    };
    let is_over = claims["exp"].as_f64().is_some_and(|at| at < now.as_second() as f64);
    header["alg"].is_string() && claims["iss"].is_string() && names_audience && !is_over
}

/// Decodes unpadded base64url.
fn base64url(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut number) = (Vec::with_capacity(text.len() * 3 / 4), 0_u32, 0_u32);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        number += 6;
        if number >= 8 {
            number -= 8;
            bytes.push((bits >> number) as u8);
        }
    }
    Some(bytes)
}

impl std::fmt::Debug for TokenReviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").field("audience", &self.audience).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn encode(value: &Value) -> String {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let text = value.to_string();
        let bits: Vec<u8> = text.bytes().flat_map(|byte| (0..8).rev().map(move |i| byte >> i & 1)).collect();
        let digit =
            |bits: &[u8]| (0..6).fold(0, |sum, i| sum << 1 | usize::from(bits.get(i).copied().unwrap_or_default()));
        bits.chunks(6).map(|bits| char::from(DIGITS[digit(bits)])).collect()
    }

    fn token(claims: &Value) -> String {
        format!("{}.{}.c2ln", encode(&json!({"alg": "RS256"})), encode(claims))
    }

    #[test]
    fn only_what_looks_like_a_token_of_the_audience_is_reviewed() {
        let now = jiff::Timestamp::from_second(1_800_000_000).unwrap();
        let is_for = |token: &str| is_for(token, "tideshift", now);
        let good = json!({"iss": "https://cluster", "aud": ["tideshift"], "exp": 1_800_000_100, "sub": "å"});
        assert!(is_for(&token(&good)));
        assert!(is_for(&token(&json!({"iss": "x", "aud": "tideshift"}))));
        for wrong in [
            json!({"iss": "x", "aud": ["other"]}),
            json!({"aud": ["tideshift"]}),
            json!({"iss": "x", "aud": ["tideshift"], "exp": 1_700_000_000}),
            json!([1]),
        ] {
            assert!(!is_for(&token(&wrong)), "{wrong}");
        }
        let (long, unsigned) = (format!("{}{}", token(&good), "a".repeat(MAX_TOKEN)), token(&good).replace("c2ln", ""));
        for garbage in ["", "garbage-garbage-garbage", "a.b.c", "..", "é.é.é", &long, &unsigned] {
            assert!(!is_for(garbage), "{garbage}");
        }
    }

    #[test]
    fn noes_keep_no_yes_out_and_a_peer_has_few_of_them() {
        let (mut known, now) = (Known::default(), Instant::now());
        for i in 0..MAX_ANSWERS as u64 + 10 {
            let key: [u8; 32] = Sha256::digest(i.to_le_bytes()).into();
            known.no.insert(key, (), now + NO, now);
        }
        assert_eq!(known.no.0.len(), MAX_ANSWERS);
        let reviewed = Reviewed { user: "u".to_owned(), pod: None };
        known.yes.insert([0; 32], reviewed, now + YES, now);
        assert!(known.yes.get(&[0; 32], now).is_some());

        let peer = |last| Some(IpAddr::from([10, 0, 0, last]));
        let asked = (0..1_000).filter(|_| known.may_ask(peer(1), now)).count();
        assert_eq!(asked, MAX_NOES as usize, "of a thousand made-up tokens");
        assert!(known.may_ask(peer(2), now), "another peer is not concerned");
        assert!(known.may_ask(peer(1), now + Duration::from_secs(1)), "time forgives");
        // If thousands of proxies share one address, valid tokens cost nothing.
        let good = (0..1_000).all(|_| {
            let may = known.may_ask(peer(3), now);
            known.was_yes(peer(3), now);
            may
        });
        assert!(good);
    }
}
