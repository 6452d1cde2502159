//! Persists the state that must survive a kill at any moment. Counts are written before the decisions that they led to.
//! A kill between the two writes leaves an undecided rollout with all its evidence, which decides again; it never
//! leaves a step whose evidence was counted for the step before, or for an earlier rollout.
//!
//! Counts between decisions are written in the background, less often the more there are. If they cannot be written,
//! decisions are still persisted and published, but rollouts do not advance by evidence until counts can be written
//! again.

use crate::metrics::ControllerMetrics;
use crate::reconciler::state::PersistedState;
use crate::reconciler::{CountState, ReconcileOutput, Reconciler};
use crate::store::secret::{CountsSecretStore, SecretStore, SecretStoreError};
use crate::store::{Store, StoreError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

/// The shortest interval between two writes of counts; proxies report lost counts again.
const OFTEN: Duration = Duration::from_secs(2);
/// The longest interval, if counts change.
const SELDOM: Duration = Duration::from_secs(60);
/// The write rate from which the interval between two writes of counts is derived.
const BYTES_PER_SECOND: usize = 256 << 10;
/// The factor for this interval while nothing is being moved.
const AT_REST: u32 = 5;

/// Stores everything but the counts.
pub(crate) trait StateStore {
    /// Whether another process may have taken over without this one noticing. Then nothing may be published before it
    /// is persisted, because the write reveals the takeover.
    const IS_CONTENDED: bool;
    /// The size limit in bytes, if it is known.
    const LIMIT: Option<usize>;
    /// Replaces the state. Returns the size in bytes.
    async fn keep(&mut self, kept: &PersistedState) -> Result<usize, KeepError>;
    /// Whether the written state still exists.
    fn is_intact(&self) -> bool {
        true
    }
}

/// Stores the counts.
pub(crate) trait CountsStore {
    /// The size limit in bytes.
    fn limit(&self) -> Option<usize>;
    /// Replaces the counts, as far as they fit. Returns the size in bytes.
    async fn keep_counts(&mut self, counted: &CountState) -> Result<usize, KeepError>;
}

/// Why state could not be persisted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeepError {
    #[error(transparent)]
    Files(#[from] StoreError),
    #[error(transparent)]
    Secrets(#[from] SecretStoreError),
}

/// For a process without replicas.
impl StateStore for Option<Store> {
    const IS_CONTENDED: bool = false;
    const LIMIT: Option<usize> = None;

    async fn keep(&mut self, kept: &PersistedState) -> Result<usize, KeepError> {
        Ok(self.as_mut().map_or(Ok(0), |store| store.keep(kept))?)
    }

    fn is_intact(&self) -> bool {
        self.as_ref().is_none_or(Store::is_intact)
    }
}

impl CountsStore for Option<Store> {
    fn limit(&self) -> Option<usize> {
        self.as_ref().map(|_| crate::store::MAX_COUNTS)
    }

    async fn keep_counts(&mut self, counted: &CountState) -> Result<usize, KeepError> {
        Ok(self.as_mut().map_or(Ok(0), |store| store.keep_counts(counted))?)
    }
}

impl StateStore for SecretStore {
    const IS_CONTENDED: bool = true;
    const LIMIT: Option<usize> = Some(crate::store::secret::MAX_BYTES);

    async fn keep(&mut self, kept: &PersistedState) -> Result<usize, KeepError> {
        Ok(Self::keep(self, kept).await?)
    }
}

impl CountsStore for CountsSecretStore {
    fn limit(&self) -> Option<usize> {
        Some(crate::store::secret::MAX_BYTES)
    }

    async fn keep_counts(&mut self, counted: &CountState) -> Result<usize, KeepError> {
        Ok(self.keep(counted).await?)
    }
}

/// Whether the latest decisions may be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteStatus {
    /// They may be published.
    Safe,
    /// They are not persisted yet and must not be published.
    Pending,
    /// Another replica has taken over.
    LostLeadership,
}

/// A background write of counts: the store, the counts and the result.
type Aside<C> = JoinHandle<(C, CountState, Result<usize, KeepError>)>;

/// State that is not persisted yet, and the stores for it. Failed writes (a full disk, no API server) are retried.
#[derive(Debug)]
pub(crate) struct StateWriter<D, C> {
    disk: D,
    /// `None` during a background write.
    counts: Option<C>,
    aside: Option<Aside<C>>,
    done: ControllerMetrics,
    kept: Option<PersistedState>,
    counted: Option<CountState>,
    /// When counts were last written or failed to be written, and their size in bytes.
    wrote_counts: Option<(Instant, usize)>,
    /// Why the last write failed; `None` if it did not.
    trouble: Option<String>,
    /// Whether the store itself refused the write, which shows that it is reachable and contains nothing newer.
    is_refused: bool,
    counts_trouble: Option<String>,
}

impl<D: StateStore, C: CountsStore> StateWriter<D, C> {
    pub(crate) fn new(disk: D, counts: C, done: ControllerMetrics) -> Self {
        if let Some(limit) = D::LIMIT {
            done.state_limit("rollouts", limit);
        }
        if let Some(limit) = counts.limit() {
            done.state_limit("counts", limit);
        }
        Self {
            disk,
            counts: Some(counts),
            aside: None,
            done,
            kept: None,
            counted: None,
            wrote_counts: None,
            trouble: None,
            is_refused: false,
            counts_trouble: None,
        }
    }

    /// Takes the result of a reconcile.
    pub(crate) fn take(&mut self, reconciler: &mut Reconciler, outcome: &ReconcileOutput) {
        if outcome.keep {
            self.kept = Some(reconciler.kept().clone());
            if !outcome.transitions.is_empty() {
                self.take_counts(reconciler);
            }
        }
    }

    /// Takes the counts.
    pub(crate) fn take_counts(&mut self, reconciler: &mut Reconciler) {
        self.counted = reconciler.changed_counts().or(self.counted.take());
    }

    /// Takes everything if the written state no longer exists.
    pub(crate) fn take_what_is_lost(&mut self, reconciler: &Reconciler) -> bool {
        let is_lost = !self.disk.is_intact();
        if is_lost {
            self.kept = Some(reconciler.kept().clone());
            self.counted = Some(reconciler.counted().clone());
        }
        is_lost
    }

    /// Writes the state that was taken, and retries failed writes. Counts that cannot be written block nothing else.
    pub(crate) async fn write(&mut self) -> WriteStatus {
        if self.counted.is_some() && self.counts_trouble.is_none() {
            if self.finish_aside().await == WriteStatus::LostLeadership {
                return WriteStatus::LostLeadership;
            }
            if let (Some(counted), Some(counts)) = (self.counted.take(), &mut self.counts) {
                let result = counts.keep_counts(&counted).await;
                if self.judge_counts(result, counted) == WriteStatus::LostLeadership {
                    return WriteStatus::LostLeadership;
                }
            }
        }
        let Some(kept) = &self.kept else { return WriteStatus::Safe };
        let result = self.disk.keep(kept).await;
        self.done.wrote(result.is_ok());
        match result {
            Ok(bytes) => {
                self.done.state_bytes("rollouts", bytes);
                (self.kept, self.trouble) = (None, None);
                WriteStatus::Safe
            }
            Err(KeepError::Secrets(SecretStoreError::LostLeadership)) => WriteStatus::LostLeadership,
            Err(error) => {
                // Logged once, not at each retry.
                if self.trouble.is_none() {
                    tracing::error!("{error}");
                }
                self.trouble = Some(error.to_string());
                self.is_refused =
                    matches!(error, KeepError::Secrets(SecretStoreError::Refused(..) | SecretStoreError::TooLarge(..)));
                if D::IS_CONTENDED { WriteStatus::Pending } else { WriteStatus::Safe }
            }
        }
    }

    /// Whether counts are due for a write of their own.
    pub(crate) fn counts_are_due(&self, is_at_rest: bool) -> bool {
        let Some((last, bytes)) = self.wrote_counts else { return self.aside.is_none() };
        let long = OFTEN + Duration::from_secs((bytes / BYTES_PER_SECOND) as u64);
        let long = if is_at_rest { long * AT_REST } else { long };
        self.aside.is_none() && last.elapsed() >= long.min(SELDOM)
    }

    /// The result of a background write, once it has finished.
    pub(crate) async fn look_aside(&mut self) -> WriteStatus {
        match &self.aside {
            Some(aside) if aside.is_finished() => self.finish_aside().await,
            _ => WriteStatus::Safe,
        }
    }

    /// Waits for a background write to finish.
    pub(crate) async fn finish_aside(&mut self) -> WriteStatus {
        let Some(aside) = self.aside.take() else { return WriteStatus::Safe };
        match aside.await {
            Ok((counts, counted, result)) => {
                self.counts = Some(counts);
                self.judge_counts(result, counted)
            }
            Err(error) => {
                self.counts_trouble = Some(format!("counts are written no longer: {error}"));
                WriteStatus::Pending
            }
        }
    }

    /// Whether a decision is not persisted yet.
    pub(crate) fn has_pending(&self) -> bool {
        self.kept.is_some()
    }

    /// Why the last decision is not persisted; `None` if it is.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Whether the last decision was refused, and the refusal shows that no other replica has taken over.
    pub(crate) fn is_refused(&self) -> bool {
        self.trouble.is_some() && self.is_refused
    }

    /// Why counts are not persisted; `None` if they are.
    pub(crate) fn counts_trouble(&self) -> Option<&str> {
        self.counts_trouble.as_deref()
    }

    fn judge_counts(&mut self, result: Result<usize, KeepError>, counted: CountState) -> WriteStatus {
        self.done.wrote(result.is_ok());
        let before = self.wrote_counts.map_or(0, |(_, bytes)| bytes);
        self.wrote_counts = Some((Instant::now(), result.as_ref().map_or(before, |bytes| *bytes)));
        match result {
            Ok(bytes) => {
                self.done.state_bytes("counts", bytes);
                self.counts_trouble = None;
                WriteStatus::Safe
            }
            Err(KeepError::Secrets(SecretStoreError::LostLeadership)) => WriteStatus::LostLeadership,
            Err(error) => {
                if self.counts_trouble.is_none() {
                    tracing::error!("{error}; rollouts go no further by evidence until counts can be kept");
                }
                self.counts_trouble = Some(error.to_string());
                // Newer counts may have been taken meanwhile.
                self.counted.get_or_insert(counted);
                WriteStatus::Pending
            }
        }
    }
}

impl<D: StateStore, C: CountsStore + Send + 'static> StateWriter<D, C> {
    /// Starts a background write of the counts.
    pub(crate) fn write_aside(&mut self) {
        if self.counted.is_none() || self.counts.is_none() {
            return;
        }
        if let (Some(counted), Some(mut counts)) = (self.counted.take(), self.counts.take()) {
            let handle = Handle::current();
            self.aside = Some(spawn_blocking(move || {
                let result = handle.block_on(counts.keep_counts(&counted));
                (counts, counted, result)
            }));
        }
    }
}

#[cfg(test)]
mod tests;
