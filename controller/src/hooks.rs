//! Webhooks: gates are asked whether a step may begin, notifications tell of what happens.
//!
//! Nothing here holds up the mind: it says which questions are open and what has happened, and gets answers when they
//! come. A step begins only after a yes of each of its gates; whatever else an answer is, or if there is none, it waits.

mod deliver;
mod gate;
mod notify;

use crate::control::Question;
use crate::rollout::Transition;
use crate::status::ServiceStatus;
use deliver::Courier;
use gate::Asking;
use notify::Teller;
use std::collections::BTreeMap;
use tideshift_core::shift::{TrafficShift, Webhook};
use tokio::sync::mpsc;

/// Answers that the mind has not looked at yet; whoever has more of them waits.
const MAX_ANSWERS: usize = 64;

/// What the gates of a step say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The question.
    pub question: Question,
    /// Whether the step may begin; if not, they are asked again.
    pub allowed: bool,
    /// Who does not allow it, and why.
    pub words: String,
}

/// All webhooks of all documents.
#[derive(Debug)]
pub struct Hooks {
    courier: Courier,
    answers: mpsc::Sender<Answer>,
    /// By rollout.
    webhooks: BTreeMap<String, Vec<Webhook>>,
    /// The questions that are open or were answered with yes.
    asking: BTreeMap<Question, Asking>,
    /// By rollout and webhook.
    tellers: BTreeMap<(String, String), Teller>,
}

impl Hooks {
    /// No webhooks yet, and where answers will come.
    ///
    /// # Errors
    ///
    /// If the HTTP client cannot be set up.
    pub fn start() -> Result<(Self, mpsc::Receiver<Answer>), reqwest::Error> {
        let (answers, receiver) = mpsc::channel(MAX_ANSWERS);
        let courier = Courier::new()?;
        let hooks =
            Self { courier, answers, webhooks: BTreeMap::new(), asking: BTreeMap::new(), tellers: BTreeMap::new() };
        Ok((hooks, receiver))
    }

    /// The documents in force. Questions to gates that have changed are asked anew; what was to be told of what happened
    /// before is still told.
    pub fn set(&mut self, shifts: &[TrafficShift]) {
        let webhooks: BTreeMap<_, _> =
            shifts.iter().map(|shift| (shift.name.clone(), shift.webhooks.clone())).collect();
        self.asking.retain(|question, _| webhooks.get(&question.name) == self.webhooks.get(&question.name));
        self.tellers.retain(|(rollout, _), teller| {
            webhooks.get(rollout).is_some_and(|webhooks| webhooks.contains(&teller.webhook))
        });
        self.webhooks = webhooks;
    }

    /// The questions that are open now; `status` says how a rollout's services stand. Those that are no longer open are
    /// not asked any more.
    pub fn ask(&mut self, open: Vec<Question>, status: impl Fn(&str) -> Option<Vec<ServiceStatus>>) {
        self.asking.retain(|question, _| open.contains(question));
        for question in open {
            let Some(services) = status(&question.name) else { continue };
            if let Some(asking) = self.asking.get(&question) {
                asking.update(&question, &services);
                continue;
            }
            let webhooks = self.webhooks.get(&question.name).into_iter().flatten();
            let gates: Vec<_> = webhooks.filter(|webhook| question.gates.contains(&webhook.name)).cloned().collect();
            let asking = Asking::start(question.clone(), &services, gates, self.courier.clone(), self.answers.clone());
            self.asking.insert(question, asking);
        }
    }

    /// Tells of what has happened: the rollout's name and how it stands since then.
    pub fn tell(&mut self, transitions: &[(String, Transition)], status: impl Fn(&str) -> Option<Vec<ServiceStatus>>) {
        for (rollout, transition) in transitions {
            let webhooks = self.webhooks.get(rollout).into_iter().flatten();
            let hearers: Vec<_> = webhooks.filter(|webhook| webhook.hears_of(transition.phase.name())).collect();
            if hearers.is_empty() {
                continue;
            }
            let services = status(rollout).unwrap_or_default();
            for webhook in hearers {
                let teller = self.tellers.entry((rollout.clone(), webhook.name.clone()));
                let teller = teller.or_insert_with(|| Teller::start(webhook.clone(), self.courier.clone()));
                teller.tell(rollout, transition, &services);
            }
        }
    }

    /// Asks nothing more, and waits until what has happened has been told.
    pub async fn end(self) {
        drop(self.asking);
        for teller in self.tellers.into_values() {
            teller.end().await;
        }
    }
}
