//! Webhooks: gates are asked whether a step may begin, notifications tell of what happens.
//!
//! Nothing here holds up the mind: it says which questions are open and what has happened, and gets answers when they
//! come. A step begins only after a yes of each of its gates; whatever else an answer is, or if there is none, it waits.

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

/// Answers that the mind has not looked at yet; whoever has more of them waits.
const MAX_ANSWERS: usize = 64;

/// What the gates of a step say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The question.
    pub question: PendingGate,
    /// Whether the step may begin; if not, they are asked again.
    pub allowed: bool,
    /// Who does not allow it, and why.
    pub words: String,
}

/// All webhooks of all documents.
#[derive(Debug)]
pub struct Hooks {
    client: WebhookClient,
    /// What the secrets are that webhooks refer to.
    secrets: watch::Sender<Arc<SecretValues>>,
    answers: mpsc::Sender<Answer>,
    /// By rollout, with the document's namespace.
    webhooks: BTreeMap<String, (String, Vec<Webhook>)>,
    /// The questions that are open or were answered with yes.
    asking: BTreeMap<PendingGate, GateCheck>,
    /// By rollout and webhook.
    tellers: BTreeMap<(String, String), Notifier>,
}

impl Hooks {
    /// No webhooks yet, and where answers will come; where requests may go, and how many at a time.
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

    /// What the secrets are that webhooks refer to, from the next request on. Gates that have not said yes are asked at once.
    pub fn set_secrets(&self, secrets: Arc<SecretValues>) {
        self.secrets.send_if_modified(|before| {
            let differs = *before != secrets;
            *before = secrets;
            differs
        });
    }

    /// The documents in force. Questions to gates that have changed are asked anew; what was to be told of what happened
    /// before is still told.
    pub fn set(&mut self, shifts: &[TrafficShift]) {
        let of = |shift: &TrafficShift| (shift.namespace.clone().unwrap_or_default(), shift.webhooks.clone());
        let webhooks: BTreeMap<_, _> = shifts.iter().map(|shift| (shift.name.clone(), of(shift))).collect();
        self.asking.retain(|question, _| webhooks.get(&question.name) == self.webhooks.get(&question.name));
        self.tellers.retain(|(rollout, _), notifier| {
            webhooks.get(rollout).is_some_and(|(_, webhooks)| webhooks.contains(&notifier.webhook))
        });
        self.webhooks = webhooks;
    }

    /// The questions that are open now, each with a number that grows when something of its rollout has changed; `status`
    /// says how a rollout's services stand. Those that are no longer open are not asked any more.
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

    /// Tells of what has happened: the rollout's name and how it stands since then.
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

    /// Asks nothing more, and waits until what has happened has been told.
    pub async fn end(self) {
        drop(self.asking);
        for notifier in self.tellers.into_values() {
            notifier.end().await;
        }
    }
}
