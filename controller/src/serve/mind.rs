//! Feeds the controller's mind, and carries out what it decides: first safe, then published.

use super::LOOK;
use super::files::Files;
use super::keeper::{CountsDisk, Disk, Keeper, Safety};
use super::secret_files::SecretFiles;
use crate::api::{Published, Shared};
use crate::clock::now;
use crate::control::{Outcome, Remains};
use crate::documents::LastGood;
use crate::hooks::{Answer, Hooks};
use crate::kubernetes::{Hands, Scene};
use crate::readiness::Prober;
use crate::rollout::Transition;
use std::sync::Arc;
use std::time::Duration;
use tideshift_core::policy::Policy;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// How often the mind looks at the clock; everything else reaches it at once.
const TICK: Duration = Duration::from_millis(100);
/// From one look at what proxies report to the next at least.
const BREATH: Duration = Duration::from_millis(20);
/// How often it is looked whether counts are to be made safe, or anything is to be written again.
const KEEP_COUNTS: Duration = Duration::from_secs(1);
/// How long what was to be told may take at the end.
const GRACE: Duration = Duration::from_secs(5);

/// Where documents come from.
pub(super) enum Source {
    /// Files, what was right in them last, and the secrets that documents refer to.
    Files(Files, LastGood, SecretFiles),
    /// A cluster.
    Cluster {
        /// What is seen of it.
        scene: watch::Receiver<Arc<Scene>>,
        /// What of that the mind has taken in: documents and what is known beyond them go together.
        shown: Arc<Scene>,
        /// What must be looked at besides, because it still serves.
        remains: watch::Sender<Arc<Remains>>,
        /// What is done in it.
        hands: Hands,
    },
}

/// Feeds the mind and carries out what it decides.
pub(super) struct Mind<D, C> {
    shared: Arc<Shared>,
    keeper: Keeper<D, C>,
    publish: watch::Sender<Option<Published>>,
    /// What nobody may know before it is safe.
    secret: Outcome,
    /// Whether somebody else decides now.
    deposed: bool,
    prober: Prober,
    source: Source,
    hooks: Hooks,
    /// What gates say.
    answers: mpsc::Receiver<Answer>,
}

impl<D: Disk, C: CountsDisk + Send + 'static> Mind<D, C> {
    pub(super) fn new(
        shared: Arc<Shared>,
        publish: watch::Sender<Option<Published>>,
        keeper: Keeper<D, C>,
        prober: Prober,
        source: Source,
        hooks: (Hooks, mpsc::Receiver<Answer>),
    ) -> Self {
        let (hooks, answers) = hooks;
        if let Source::Cluster { shown, .. } = &source {
            hooks.set_secrets(shown.secrets.clone());
        }
        let (secret, deposed) = (Outcome::default(), false);
        Self { shared, keeper, publish, secret, deposed, prober, source, hooks, answers }
    }

    /// Decides until `stop`, or until somebody else does.
    pub(super) async fn run(&mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        let (mut tick, mut look, mut keep_counts) = (every(TICK), every(LOOK), every(KEEP_COUNTS));
        let mut readiness = self.prober.subscribe();
        readiness.mark_changed();
        let mut looked = Instant::now();
        while !self.deposed {
            tokio::select! {
                () = &mut stop => break,
                // Reports of thousands of proxies are looked at together.
                _ = self.shared.counted.notified() => sleep_until(looked + BREATH).await,
                Ok(()) = readiness.changed() => {
                    let now_ready = readiness.borrow_and_update().clone();
                    self.shared.control().set_readiness(now_ready);
                }
                Some(answer) = self.answers.recv() => {
                    self.shared.control().gate_answered(&answer.question, answer.allowed, &answer.words);
                }
                () = changed(&mut self.source) => self.look_at_scene(),
                _ = look.tick() => self.look_at_files(),
                _ = keep_counts.tick() => self.keep_counts().await,
                _ = tick.tick() => {}
            }
            self.evaluate().await;
            looked = Instant::now();
        }
        if !self.deposed {
            // What somebody has just asked for is safe before he is told so.
            self.evaluate().await;
            self.keeper.take_counts(&mut self.shared.control());
            self.keeper.write_aside();
            let _ = self.keeper.finish_aside().await;
        }
    }

    /// Tells what is still to be told.
    pub(super) async fn end(self) {
        let _ = tokio::time::timeout(GRACE, self.hooks.end()).await;
    }

    async fn evaluate(&mut self) {
        let (turn, outcome) = {
            let mut control = self.shared.control();
            if let Some(shifts) = control.changed_shifts() {
                let secrets = match &mut self.source {
                    Source::Files(_, _, secrets) => {
                        self.prober.set(shifts);
                        Some(secrets.set(shifts, Instant::now().into_std()))
                    }
                    Source::Cluster { shown, .. } => {
                        self.prober.set_with(shifts, shown.outlook.clone());
                        None
                    }
                };
                // Before webhooks that refer to them are called.
                if let Some(secrets) = &secrets {
                    self.hooks.set_secrets(secrets.clone());
                }
                self.hooks.set(shifts);
                secrets.into_iter().for_each(|secrets| control.set_secrets(secrets));
                if let Source::Cluster { remains, .. } = &self.source {
                    let now = control.remains();
                    remains.send_if_modified(|before| {
                        let differs = **before != now;
                        if differs {
                            *before = Arc::new(now);
                        }
                        differs
                    });
                }
                // With the readiness of the endpoints that they have now, not of those that they had.
                let readiness = self.prober.subscribe().borrow().clone();
                control.set_readiness(readiness);
            }
            let outcome = control.evaluate(now());
            self.keeper.take(&mut control, &outcome);
            self.shared.done.documents_left(control.take_departures(), control.kept_documents());
            (self.shared.turns.begin(), outcome)
        };
        for (rollout, message) in &outcome.messages {
            tracing::debug!(rollout, "{message}");
        }
        for (rollout, transition) in &outcome.transitions {
            let Transition { phase, reason, message, by, .. } = transition;
            tracing::info!(rollout, ?phase, ?reason, by, "{message}");
            self.shared.done.changed(rollout, transition);
        }
        // First safe, then published: a revision that proxies have seen is never given to another policy. Where this is
        // the only process, traffic goes on being moved also where nothing can be kept (a full disk).
        let is_due = outcome.keep || (D::IS_CONTENDED && self.keeper.has_pending());
        self.secret.policy = outcome.policy.or(self.secret.policy.take());
        self.secret.transitions.extend(outcome.transitions);
        match if is_due { self.write().await } else { Safety::Safe } {
            Safety::Safe => {}
            Safety::Pending => {
                // What would not survive a restart is not published; what takes traffic away is.
                if self.keeper.is_refused() {
                    self.publish_away();
                    self.shared.turns.end(turn);
                }
                return;
            }
            Safety::Deposed => {
                tracing::warn!("another replica has taken over; what was decided last is not published");
                return;
            }
        }
        let outcome = std::mem::take(&mut self.secret);
        if let Some(policy) = &outcome.policy {
            self.publish(policy);
        }
        self.tell(&outcome.transitions);
        self.shared.turns.end(turn);
    }

    async fn write(&mut self) -> Safety {
        let safety = self.keeper.write().await;
        self.note(safety);
        safety
    }

    fn note(&mut self, safety: Safety) {
        self.deposed |= safety == Safety::Deposed;
        let mut control = self.shared.control();
        control.set_state_error(self.keeper.trouble(), D::IS_CONTENDED);
        control.set_counts_error(self.keeper.counts_trouble());
        if !self.keeper.has_pending() {
            control.was_written();
        }
    }

    /// Publishes of what was decided what takes traffic away.
    fn publish_away(&mut self) {
        let Some(policy) = self.shared.control().away() else { return };
        // The whole of it comes after that, with a newer revision.
        self.secret.policy = None;
        self.publish(&policy);
    }

    fn publish(&self, policy: &Policy) {
        let epoch = {
            let mut control = self.shared.control();
            control.set_published(policy);
            control.kept().epoch.clone()
        };
        tracing::info!(revision = policy.revision, "policy published");
        self.shared.done.published();
        let next = Published::next(self.publish.borrow().as_ref(), epoch, policy);
        self.publish.send_replace(Some(next));
    }

    fn tell(&mut self, transitions: &[(String, Transition)]) {
        let control = self.shared.control();
        let status = |rollout: &str| control.rollout_status(rollout, now());
        self.hooks.ask(control.questions(), status);
        self.hooks.tell(transitions, status);
        if let Source::Cluster { shown, hands, .. } = &mut self.source {
            hands.take(&control, shown, transitions, now());
        }
        drop(control);
        self.shared.events.tell(transitions);
    }

    fn look_at_scene(&mut self) {
        let Source::Cluster { scene, shown, .. } = &mut self.source else { return };
        let before = std::mem::replace(shown, scene.borrow_and_update().clone());
        self.hooks.set_secrets(shown.secrets.clone());
        let are_same = Arc::ptr_eq(&before.documents, &shown.documents);
        if are_same && (&before.gone, &before.deleted) == (&shown.gone, &shown.deleted) {
            self.shared.control().set_secrets(shown.secrets.clone());
            return;
        }
        let documents = shown.documents();
        let mut control = self.shared.control();
        for error in &shown.errors {
            if !control.document_errors().contains(error) {
                tracing::error!("{error}");
            }
        }
        control.edited(&documents, |rollout| shown.objects.get(rollout)?.by.clone());
        control.set_documents_but(documents, shown.hidden.clone(), shown.gone.clone(), &shown.deleted);
        control.set_document_errors(shown.errors.clone());
        control.set_secrets(shown.secrets.clone());
    }

    fn look_at_files(&mut self) {
        let Source::Files(files, good, secrets) = &mut self.source else { return };
        if let Some(secrets) = secrets.changed(Instant::now().into_std()) {
            self.hooks.set_secrets(secrets.clone());
            self.shared.control().set_secrets(secrets);
        }
        let mut has_changed = false;
        for path in files.changed(Instant::now().into_std()) {
            let mut read = good.clone();
            read.read_again(&path);
            // One that was written again meanwhile is seen by the next look.
            if files.is_as_taken(&path) {
                (*good, has_changed) = (read, true);
            }
        }
        if !has_changed {
            return;
        }
        let errors = good.errors().map(ToString::to_string).collect();
        tracing::info!("documents have changed");
        let (mut control, documents, origins) = (self.shared.control(), good.documents(), good.origins());
        control.edited(&documents, |name| origins.get(name).cloned());
        control.set_documents(documents);
        control.set_document_errors(errors);
        for error in control.document_errors() {
            tracing::error!("{error}; what it said before stays in force");
        }
    }

    /// Writes counts aside if that is due, and once more what could not be written or is lost.
    async fn keep_counts(&mut self) {
        let safety = self.keeper.look_aside().await;
        self.note(safety);
        let is_at_rest = {
            let control = self.shared.control();
            self.keeper.take_what_is_lost(&control);
            control.is_at_rest()
        };
        if self.keeper.has_pending() && !D::IS_CONTENDED {
            self.write().await;
        }
        if self.keeper.counts_are_due(is_at_rest) {
            self.keeper.take_counts(&mut self.shared.control());
            self.keeper.write_aside();
        }
    }
}

/// Ends when a cluster shows something new.
async fn changed(source: &mut Source) {
    if let Source::Cluster { scene, .. } = source
        && scene.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
