//! Proxies' tokens that the cluster itself has given them: a TokenReview says whether a token is one, for the audience
//! that proxies ask for. Answers are remembered for a while, so that reports do not become as many reviews.

use super::reason;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a yes holds: a token that is withdrawn is refused after that.
const YES: Duration = Duration::from_secs(60);
/// How long a no holds.
const NO: Duration = Duration::from_secs(10);
/// How long a review may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// The most answers that are remembered.
const MAX_ANSWERS: usize = 20_000;

/// Asks the cluster about tokens.
pub struct Reviewer {
    client: Client,
    audience: String,
    /// By the token's SHA-256.
    answers: Mutex<BTreeMap<[u8; 32], (bool, Instant)>>,
}

impl Reviewer {
    /// For tokens of this audience.
    pub fn new(client: Client, audience: String) -> Self {
        Self { client, audience, answers: Mutex::default() }
    }

    /// Whether a token is one that the cluster has given for the audience. No answer is no.
    pub async fn accepts(&self, token: &[u8]) -> bool {
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(answer) = self.remembered(&key) {
            return answer;
        }
        let Ok(token) = std::str::from_utf8(token) else { return false };
        match timeout(PATIENCE, self.ask(token)).await {
            Ok(Ok(answer)) => {
                self.remember(key, answer);
                answer
            }
            Ok(Err(error)) => {
                tracing::warn!("cannot have a proxy's token reviewed: {}", reason(&error));
                false
            }
            Err(_) => {
                tracing::warn!("cannot have a proxy's token reviewed: no answer within {} s", PATIENCE.as_secs());
                false
            }
        }
    }

    async fn ask(&self, token: &str) -> Result<bool, kube::Error> {
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.audience.clone()]) },
            status: None,
        };
        let answer = Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        let status = answer.status.unwrap_or_default();
        // A reviewer that does not know of audiences answers without them, and is not to be trusted about them.
        let audiences = status.audiences.unwrap_or_default();
        Ok(status.authenticated.unwrap_or_default() && audiences.contains(&self.audience))
    }

    fn remembered(&self, key: &[u8; 32]) -> Option<bool> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(key).filter(|(_, until)| Instant::now() < *until).map(|(answer, _)| *answer)
    }

    fn remember(&self, key: [u8; 32], answer: bool) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if answers.len() >= MAX_ANSWERS {
            answers.retain(|_, (_, until)| now < *until);
        }
        if answers.len() < MAX_ANSWERS {
            answers.insert(key, (answer, now + if answer { YES } else { NO }));
        }
    }
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").field("audience", &self.audience).finish_non_exhaustive()
    }
}
