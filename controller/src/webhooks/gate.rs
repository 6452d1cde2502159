//! Polls the gates of one step, one after the other, until each has allowed it.

use crate::reconciler::PendingGate;
use crate::rollout::Phase;
use crate::status::ServiceStatus;
use crate::webhooks::Answer;
use crate::webhooks::client::{GateResponse, WebhookClient, backoff};
use serde_json::json;
use std::time::Duration;
use tideshift_core::shift::{Webhook, WebhookKind};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// The maximum age of the state in a gate's request; also the shortest period.
const FRESH: Duration = Duration::from_secs(1);

/// Polls gates until it is dropped.
#[derive(Debug)]
pub(super) struct GateCheck {
    task: JoinHandle<()>,
    /// The request body, with a recent verdict.
    body: watch::Sender<Vec<u8>>,
    /// The version of the rollout's state in it, and its time.
    state: (u64, Instant),
}

impl Drop for GateCheck {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl GateCheck {
    pub(super) fn start(
        namespace: String,
        (question, number): (PendingGate, u64),
        services: &[ServiceStatus],
        gates: Vec<Webhook>,
        client: WebhookClient,
        answers: mpsc::Sender<Answer>,
    ) -> Self {
        let (body, newest) = watch::channel(body(&question, services));
        let mut client = client;
        let task = tokio::spawn(async move {
            for gate in &gates {
                until_yes(&namespace, gate, &question, &newest, &mut client, &answers).await;
            }
            let _ = answers.send(Answer { question, allowed: true, words: String::new() }).await;
        });
        Self { task, body, state: (number, Instant::now()) }
    }

    /// Whether the state of its rollout has changed and the body is no longer fresh.
    pub(super) fn is_old(&self, number: u64) -> bool {
        let (of, since) = self.state;
        of != number && since.elapsed() >= FRESH
    }

    /// Updates the state of the services for the next request.
    pub(super) fn update(&mut self, question: &PendingGate, number: u64, services: &[ServiceStatus]) {
        self.state = (number, Instant::now());
        self.body.send_replace(body(question, services));
    }
}

/// An id that is the same for each request about one step, including from another controller or after a restart.
fn id(question: &PendingGate) -> String {
    format!("{}/{}/{}", question.name, question.rollout, question.step + 1)
}

/// Polls one gate until it allows the step, and reports each response to the reconciler.
async fn until_yes(
    namespace: &str,
    gate: &Webhook,
    question: &PendingGate,
    body: &watch::Receiver<Vec<u8>>,
    client: &mut WebhookClient,
    answers: &mpsc::Sender<Answer>,
) {
    let WebhookKind::Gate { period, .. } = gate.kind else { return };
    let (id, mut failures, mut said) = (id(question), 0, String::new());
    loop {
        let newest = body.borrow().clone();
        client.mark_secrets_seen();
        let (words, wait): (String, Duration) = match client.post(namespace, gate, &id, &newest).await {
            GateResponse::Yes => {
                tracing::info!(
                    rollout = question.name,
                    gate = gate.name,
                    step = question.step + 1,
                    "the gate says yes"
                );
                return;
            }
            GateResponse::No(why) => {
                failures = 0;
                (format!("gate {} says no: {why}", gate.name), period)
            }
            GateResponse::None(why) => {
                let wait = backoff(failures);
                failures = failures.saturating_add(1);
                (format!("gate {} has not answered: {why}", gate.name), wait)
            }
        };
        if words != said {
            tracing::info!(rollout = question.name, step = question.step + 1, "{words}");
            let answer = Answer { question: question.clone(), allowed: false, words: words.clone() };
            let _ = answers.send(answer).await;
            said = words;
        }
        // The gate may be waiting for another secret.
        tokio::select! {
            () = sleep(wait) => {}
            () = client.secrets_changed() => failures = 0,
        }
    }
}

fn body(question: &PendingGate, services: &[ServiceStatus]) -> Vec<u8> {
    let first = services.first();
    let steps = first.map_or(&[][..], |service| &service.steps);
    let names: Vec<_> = services.iter().map(|service| &service.name).collect();
    let body = json!({
        "type": "gate",
        "id": id(question),
        "name": question.name,
        "services": names,
        "rollout": question.rollout,
        "stable": first.map(|service| &service.stable),
        "target": first.and_then(|service| service.target.as_ref()),
        "phase": Phase::Waiting,
        "step": {
            "number": question.step + 1,
            "of": steps.len(),
            "weight": steps.get(question.step).map(|step| step.weight),
        },
        "verdict": first.and_then(|service| service.verdict.as_ref()).map(|verdict| &verdict.message),
    });
    body.to_string().into_bytes()
}
