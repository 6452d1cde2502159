//! Webhooks: gates decide whether a step may begin, notifications report transitions.
//!
//! Webhooks never block reconciliation: the reconciler lists pending gates and transitions, and receives responses when
//! they arrive. A step begins only after each of its gates has allowed it; with any other response, or none, the
//! rollout waits.

mod client;
mod egress;
mod gate;
mod notifier;

use crate::limits::Limit;
use crate::reconciler::PendingGate;
use crate::rollout::Transition;
use crate::secret_values::SecretValues;
use crate::status::ServiceStatus;
use client::WebhookClient;
pub use egress::{Allowed, Egress};
use gate::GateCheck;
use notifier::Notifier;
use std::collections::BTreeMap;
use std::sync::Arc;
use tideshift_core::shift::{TrafficShift, Webhook};
use tokio::sync::{mpsc, watch};

/// Buffered responses that the reconciler has not processed; further ones wait.
const MAX_ANSWERS: usize = 64;

/// A response of the gates of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The gate check that it answers.
    pub question: PendingGate,
    /// Whether the step may begin; if not, the gates are polled again.
    pub allowed: bool,
    /// The gate that does not allow it, and why.
    pub words: String,
}

/// All webhooks of all documents.
#[derive(Debug)]
pub struct Hooks {
    client: WebhookClient,
    /// The values of the secrets that webhooks refer to.
    secrets: watch::Sender<Arc<SecretValues>>,
    answers: mpsc::Sender<Answer>,
    /// By rollout, with the document's namespace.
    webhooks: BTreeMap<String, (String, Vec<Webhook>)>,
    /// The gate checks that are pending or were allowed.
    asking: BTreeMap<PendingGate, GateCheck>,
    /// By rollout and webhook.
    tellers: BTreeMap<(String, String), Notifier>,
}

impl Hooks {
    /// Without webhooks at first. Returns the receiver of responses; `egress` limits the destinations and `limit` the
    /// concurrent requests.
    ///
    /// # Errors
    ///
    /// If the HTTP client cannot be set up.
    pub fn start(egress: Egress, limit: Limit) -> Result<(Self, mpsc::Receiver<Answer>), reqwest::Error> {
        let (answers, receiver) = mpsc::channel(MAX_ANSWERS);
        let secrets = watch::Sender::new(Arc::default());
        let client = WebhookClient::new(egress, limit, secrets.subscribe())?;
        let (webhooks, asking, tellers) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let hooks = Self { client, secrets, answers, webhooks, asking, tellers };
        Ok((hooks, receiver))
    }

    /// Sets the secrets that webhooks refer to, from the next request on. Pending gates are polled at once.
    pub fn set_secrets(&self, secrets: Arc<SecretValues>) {
        self.secrets.send_if_modified(|before| {
            let differs = *before != secrets;
            *before = secrets;
            differs
        });
    }

    /// Sets the documents in force. Gates that have changed are polled from the start; earlier transitions are still
    /// delivered.
    pub fn set(&mut self, shifts: &[TrafficShift]) {
        let of = |shift: &TrafficShift| (shift.namespace.clone().unwrap_or_default(), shift.webhooks.clone());
        let webhooks: BTreeMap<_, _> = shifts.iter().map(|shift| (shift.name.clone(), of(shift))).collect();
        self.asking.retain(|question, _| webhooks.get(&question.name) == self.webhooks.get(&question.name));
        self.tellers.retain(|(rollout, _), notifier| {
            webhooks.get(rollout).is_some_and(|(_, webhooks)| webhooks.contains(&notifier.webhook))
        });
        self.webhooks = webhooks;
    }

    /// Sets the pending gate checks, each with a number that grows when the state of its rollout changes; `status`
    /// returns the status of a rollout's services. Checks that are no longer pending are dropped.
    pub fn ask(&mut self, open: Vec<(PendingGate, u64)>, status: impl Fn(&str) -> Option<Vec<ServiceStatus>>) {
        if open.is_empty() {
            return self.asking.clear();
        }
        let numbers: BTreeMap<&PendingGate, u64> = open.iter().map(|(question, number)| (question, *number)).collect();
        self.asking.retain(|question, _| numbers.contains_key(question));
        for (question, number) in open {
            if self.asking.get(&question).is_some_and(|asking| !asking.is_old(number)) {
                continue;
            }
            let Some(services) = status(&question.name) else { continue };
            if let Some(asking) = self.asking.get_mut(&question) {
                asking.update(&question, number, &services);
                continue;
            }
            let (namespace, webhooks) = self.webhooks.get(&question.name).cloned().unwrap_or_default();
            let gates = webhooks.into_iter().filter(|webhook| question.gates.contains(&webhook.name)).collect();
            let (client, answers) = (self.client.clone(), self.answers.clone());
            let asking = GateCheck::start(namespace, (question.clone(), number), &services, gates, client, answers);
            self.asking.insert(question, asking);
        }
    }

    /// Notifies of transitions: the name of the rollout and its new state.
    pub fn tell(&mut self, transitions: &[(String, Transition)], status: impl Fn(&str) -> Option<Vec<ServiceStatus>>) {
        for (rollout, transition) in transitions {
            let Some((namespace, webhooks)) = self.webhooks.get(rollout) else { continue };
            let hearers = webhooks.iter().filter(|webhook| webhook.hears_of(transition.phase.name()));
            let hearers: Vec<_> = hearers.collect();
            if hearers.is_empty() {
                continue;
            }
            let services = status(rollout).unwrap_or_default();
            for webhook in hearers {
                let notifier = self.tellers.entry((rollout.clone(), webhook.name.clone()));
                let notifier = notifier
                    .or_insert_with(|| Notifier::start(namespace.clone(), webhook.clone(), self.client.clone()));
                notifier.tell(rollout, transition, &services);
            }
        }
    }

    /// Stops polling gates, and waits until all transitions have been delivered.
    pub async fn end(self) {
        drop(self.asking);
        for notifier in self.tellers.into_values() {
            notifier.end().await;
        }
    }
}
