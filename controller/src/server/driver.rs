//! The reconcile loop: feeds the reconciler and applies its output, which is persisted first and then published.

use crate::api::{Published, Shared};
use crate::clock::now;
use crate::documents::LastGood;
use crate::kubernetes::{Outputs, Snapshot};
use crate::readiness::Prober;
use crate::reconciler::{ReconcileOutput, Remains};
use crate::rollout::Transition;
use crate::server::LOOK;
use crate::server::file_source::Files;
use crate::server::secret_files::SecretFiles;
use crate::store::writer::{CountsStore, StateStore, StateWriter, WriteStatus};
use crate::webhooks::{Answer, Hooks};
use std::sync::Arc;
use std::time::Duration;
use tideshift_core::protocol::policy::Policy;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// How often the loop runs for the clock alone; every other input wakes it at once.
const TICK: Duration = Duration::from_millis(100);
/// The minimum interval between two reconciles for proxy reports.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// How often the loop checks whether counts are due to be persisted, or a write must be retried.
const KEEP_COUNTS: Duration = Duration::from_secs(1);
/// How long pending notifications may take at shutdown.
const GRACE: Duration = Duration::from_secs(5);

/// The source of documents.
pub(super) enum Source {
    /// Files, their last valid documents, and the secrets that documents refer to.
    Files(Files, LastGood, SecretFiles),
    /// A cluster.
    Cluster {
        /// The latest snapshot.
        snapshot: watch::Receiver<Arc<Snapshot>>,
        /// The snapshot that the reconciler has processed: documents and discovery go together.
        shown: Arc<Snapshot>,
        /// What must also be watched, because it still serves traffic.
        remains: watch::Sender<Arc<Remains>>,
        /// The outputs to the cluster.
        outputs: Outputs,
    },
}

/// Feeds the reconciler and applies its output.
pub(super) struct ReconcileLoop<D, C> {
    shared: Arc<Shared>,
    writer: StateWriter<D, C>,
    publish: watch::Sender<Option<Published>>,
    /// Output that must not be published before it is persisted.
    secret: ReconcileOutput,
    /// Whether this replica has lost leadership.
    deposed: bool,
    prober: Prober,
    source: Source,
    hooks: Hooks,
    /// Responses of gates.
    answers: mpsc::Receiver<Answer>,
}

impl<D: StateStore, C: CountsStore + Send + 'static> ReconcileLoop<D, C> {
    pub(super) fn new(
        shared: Arc<Shared>,
        publish: watch::Sender<Option<Published>>,
        writer: StateWriter<D, C>,
        prober: Prober,
        source: Source,
        hooks: (Hooks, mpsc::Receiver<Answer>),
    ) -> Self {
        let (hooks, answers) = hooks;
        if let Source::Cluster { shown, .. } = &source {
            hooks.set_secrets(shown.secrets.clone());
        }
        let (secret, deposed) = (ReconcileOutput::default(), false);
        Self { shared, writer, publish, secret, deposed, prober, source, hooks, answers }
    }

    /// Runs until `stop` completes or leadership is lost.
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
                // Batches the reports of thousands of proxies.
                _ = self.shared.counted.notified() => sleep_until(looked + DEBOUNCE).await,
                Ok(()) = readiness.changed() => {
                    let now_ready = readiness.borrow_and_update().clone();
                    self.shared.reconciler().set_readiness(now_ready);
                }
                Some(answer) = self.answers.recv() => {
                    self.shared.reconciler().gate_answered(&answer.question, answer.allowed, &answer.words);
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
            // A command is persisted before it is answered.
            self.evaluate().await;
            self.writer.take_counts(&mut self.shared.reconciler());
            self.writer.write_aside();
            let _ = self.writer.finish_aside().await;
        }
    }

    /// Delivers pending notifications.
    pub(super) async fn end(self) {
        let _ = tokio::time::timeout(GRACE, self.hooks.end()).await;
    }

    async fn evaluate(&mut self) {
        let (turn, outcome) = {
            let mut reconciler = self.shared.reconciler();
            if let Some(shifts) = reconciler.changed_shifts() {
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
                secrets.into_iter().for_each(|secrets| reconciler.set_secrets(secrets));
                if let Source::Cluster { remains, .. } = &self.source {
                    let now = reconciler.remains();
                    remains.send_if_modified(|before| {
                        let differs = **before != now;
                        if differs {
                            *before = Arc::new(now);
                        }
                        differs
                    });
                }
                // With the readiness of the current endpoints, not of the previous ones.
                let readiness = self.prober.subscribe().borrow().clone();
                reconciler.set_readiness(readiness);
            }
            let outcome = reconciler.evaluate(now());
            self.writer.take(&mut reconciler, &outcome);
            self.shared.done.documents_left(reconciler.take_departures(), reconciler.kept_documents());
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
        // Persist first, then publish: a revision that proxies have seen is never reused for another policy. In a
        // single process traffic continues to move even if nothing can be persisted (a full disk).
        let is_due = outcome.keep || (D::IS_CONTENDED && self.writer.has_pending());
        self.secret.policy = outcome.policy.or(self.secret.policy.take());
        self.secret.transitions.extend(outcome.transitions);
        match if is_due { self.write().await } else { WriteStatus::Safe } {
            WriteStatus::Safe => {}
            WriteStatus::Pending => {
                // Output that would not survive a restart is not published, except what takes traffic away.
                if self.writer.is_refused() {
                    self.publish_away();
                    self.shared.turns.end(turn);
                }
                return;
            }
            WriteStatus::LostLeadership => {
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

    async fn write(&mut self) -> WriteStatus {
        let safety = self.writer.write().await;
        self.note(safety);
        safety
    }

    fn note(&mut self, safety: WriteStatus) {
        self.deposed |= safety == WriteStatus::LostLeadership;
        let mut reconciler = self.shared.reconciler();
        reconciler.set_state_error(self.writer.trouble(), D::IS_CONTENDED);
        reconciler.set_counts_error(self.writer.counts_trouble());
        if !self.writer.has_pending() {
            reconciler.was_written();
        }
    }

    /// Publishes the part of the output that takes traffic away.
    fn publish_away(&mut self) {
        let Some(policy) = self.shared.reconciler().away() else { return };
        // The complete policy follows with a newer revision.
        self.secret.policy = None;
        self.publish(&policy);
    }

    fn publish(&self, policy: &Policy) {
        let epoch = {
            let mut reconciler = self.shared.reconciler();
            reconciler.set_published(policy);
            reconciler.kept().epoch.clone()
        };
        tracing::info!(revision = policy.revision, "policy published");
        self.shared.done.published();
        let next = Published::next(self.publish.borrow().as_ref(), epoch, policy);
        self.publish.send_replace(Some(next));
    }

    fn tell(&mut self, transitions: &[(String, Transition)]) {
        let reconciler = self.shared.reconciler();
        let status = |rollout: &str| reconciler.rollout_status(rollout, now());
        self.hooks.ask(reconciler.questions(), status);
        self.hooks.tell(transitions, status);
        if let Source::Cluster { shown, outputs, .. } = &mut self.source {
            outputs.take(&reconciler, shown, transitions, now());
        }
        drop(reconciler);
        self.shared.events.tell(transitions);
    }

    fn look_at_scene(&mut self) {
        let Source::Cluster { snapshot, shown, .. } = &mut self.source else { return };
        let before = std::mem::replace(shown, snapshot.borrow_and_update().clone());
        self.hooks.set_secrets(shown.secrets.clone());
        let are_same = Arc::ptr_eq(&before.documents, &shown.documents);
        if are_same && (&before.gone, &before.deleted) == (&shown.gone, &shown.deleted) {
            self.shared.reconciler().set_secrets(shown.secrets.clone());
            return;
        }
        let documents = shown.documents();
        let mut reconciler = self.shared.reconciler();
        for error in &shown.errors {
            if !reconciler.document_errors().contains(error) {
                tracing::error!("{error}");
            }
        }
        reconciler.edited(&documents, |rollout| shown.objects.get(rollout)?.by.clone());
        reconciler.set_documents_but(documents, shown.hidden.clone(), shown.gone.clone(), &shown.deleted);
        reconciler.set_document_errors(shown.errors.clone());
        reconciler.set_secrets(shown.secrets.clone());
    }

    fn look_at_files(&mut self) {
        let Source::Files(files, good, secrets) = &mut self.source else { return };
        if let Some(secrets) = secrets.changed(Instant::now().into_std()) {
            self.hooks.set_secrets(secrets.clone());
            self.shared.reconciler().set_secrets(secrets);
        }
        let mut has_changed = false;
        for path in files.changed(Instant::now().into_std()) {
            let mut read = good.clone();
            read.read_again(&path);
            // A file that was written again meanwhile is read in the next pass.
            if files.is_as_taken(&path) {
                (*good, has_changed) = (read, true);
            }
        }
        if !has_changed {
            return;
        }
        let errors = good.errors().map(ToString::to_string).collect();
        tracing::info!("documents have changed");
        let (mut reconciler, documents, origins) = (self.shared.reconciler(), good.documents(), good.origins());
        reconciler.edited(&documents, |name| origins.get(name).cloned());
        reconciler.set_documents(documents);
        reconciler.set_document_errors(errors);
        for error in reconciler.document_errors() {
            tracing::error!("{error}; what it said before stays in force");
        }
    }

    /// Persists counts if that is due, and retries writes that failed or were lost.
    async fn keep_counts(&mut self) {
        let safety = self.writer.look_aside().await;
        self.note(safety);
        let is_at_rest = {
            let reconciler = self.shared.reconciler();
            self.writer.take_what_is_lost(&reconciler);
            reconciler.is_at_rest()
        };
        if self.writer.has_pending() && !D::IS_CONTENDED {
            self.write().await;
        }
        if self.writer.counts_are_due(is_at_rest) {
            self.writer.take_counts(&mut self.shared.reconciler());
            self.writer.write_aside();
        }
    }
}

/// Completes when the cluster's snapshot changes.
async fn changed(source: &mut Source) {
    if let Source::Cluster { snapshot, .. } = source
        && snapshot.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
