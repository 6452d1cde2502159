//! Delivers transitions to one webhook, in order, with retries as long as the document allows.

use crate::rollout::Transition;
use crate::status::{ServiceStatus, TransitionStatus};
use crate::webhooks::client::{GateResponse, WebhookClient, backoff};
use serde_json::{Value, json};
use tideshift_core::shift::{NotificationFormat, Webhook, WebhookKind};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// The maximum length of the queue; further transitions are dropped.
const MAX_WAITING: usize = 100;

/// The queue of one webhook; queued transitions are still delivered after this is dropped.
#[derive(Debug)]
pub(super) struct Notifier {
    pub(super) webhook: Webhook,
    queue: mpsc::Sender<Note>,
    worker: JoinHandle<()>,
}

/// A notification.
#[derive(Debug)]
struct Note {
    id: String,
    body: Vec<u8>,
}

impl Notifier {
    pub(super) fn start(namespace: String, webhook: Webhook, client: WebhookClient) -> Self {
        let (queue, notes) = mpsc::channel(MAX_WAITING);
        let worker = tokio::spawn(work(namespace, webhook.clone(), notes, client));
        Self { webhook, queue, worker }
    }

    pub(super) fn tell(&self, rollout: &str, transition: &Transition, services: &[ServiceStatus]) {
        let WebhookKind::Notification { format, .. } = self.webhook.kind else { return };
        let transition = TransitionStatus::from(transition);
        let id = format!("{rollout}/{}/{}/{:?}", transition.rollout, transition.time, transition.reason);
        let body = match format {
            NotificationFormat::Json => json_body(rollout, &id, &transition, services),
            NotificationFormat::Slack => slack_body(rollout, &transition),
        };
        let note = Note { id, body: body.to_string().into_bytes() };
        if self.queue.try_send(note).is_err() {
            let webhook = &self.webhook.name;
            tracing::error!(rollout, webhook, "not told of {}: {MAX_WAITING} are waiting already", transition.message);
        }
    }

    /// Waits until all queued notifications have been delivered.
    pub(super) async fn end(self) {
        drop(self.queue);
        let _ = self.worker.await;
    }
}

async fn work(namespace: String, webhook: Webhook, mut notes: mpsc::Receiver<Note>, client: WebhookClient) {
    let WebhookKind::Notification { retries, .. } = webhook.kind else { return };
    while let Some(Note { id, body }) = notes.recv().await {
        for failures in 0..=retries {
            let why = match client.post(&namespace, &webhook, &id, &body).await {
                GateResponse::Yes => break,
                GateResponse::No(why) => {
                    tracing::error!(id, webhook = webhook.name, "not told: {why}");
                    break;
                }
                GateResponse::None(why) => why,
            };
            if failures == retries {
                tracing::error!(id, webhook = webhook.name, "not told after {} tries: {why}", failures + 1);
                break;
            }
            tracing::warn!(id, webhook = webhook.name, "not told yet, will try again: {why}");
            sleep(backoff(failures)).await;
        }
    }
}

fn json_body(rollout: &str, id: &str, transition: &TransitionStatus, services: &[ServiceStatus]) -> Value {
    let mut body = serde_json::to_value(transition).unwrap_or_default();
    body["type"] = json!("transition");
    body["id"] = json!(id);
    body["name"] = json!(rollout);
    body["services"] = services.iter().map(|service| json!(service.name)).collect();
    body["stable"] = json!(services.first().map(|service| &service.stable));
    body["target"] = json!(transition.target);
    body
}

fn slack_body(rollout: &str, transition: &TransitionStatus) -> Value {
    let TransitionStatus { phase, reason, from, target, .. } = transition;
    let message = transition.words();
    let way = from.as_ref().zip(target.as_ref()).map(|(from, target)| format!(" ({from} → {target})"));
    let text = format!("{rollout}{}: {}, {reason:?}: {message}", way.unwrap_or_default(), phase.name());
    // Escapes what Slack would interpret as links and mentions.
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    json!({ "text": text })
}
