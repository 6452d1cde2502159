//! Makes safe what must survive a kill at any moment. Counts go before what was decided from them: a kill between the
//! two leaves an undecided rollout with all its evidence, which decides again; never a step whose evidence was counted
//! for the step before, or for an earlier rollout.
//!
//! Counts between decisions are written aside, and less often the more there are. Where they cannot be written, what was
//! decided is written and published all the same, and rollouts go no further by evidence until they can.

use crate::metrics::ControllerMetrics;
use crate::reconciler::state::PersistedState;
use crate::reconciler::{CountState, ReconcileOutput, Reconciler};
use crate::store::secret::{CountsSecretStore, SecretStore, SecretStoreError};
use crate::store::{Store, StoreError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

/// How often counts are made safe at most; what is lost of them, proxies say again.
const OFTEN: Duration = Duration::from_secs(2);
/// How often at least, if they change.
const SELDOM: Duration = Duration::from_secs(60);
/// So many bytes are written a second, and …
const BYTES_PER_SECOND: usize = 256 << 10;
/// … while nothing is being moved, so much more seldom.
const AT_REST: u32 = 5;

/// What keeps everything but the counts.
pub(crate) trait StateStore {
    /// Whether another process may have taken over without this one knowing: then nothing may be published before it is
    /// safe, for that is when this one finds out.
    const IS_CONTENDED: bool;
    /// The most bytes that there is room for, if that is known.
    const LIMIT: Option<usize>;
    /// Replaces it. Returns how many bytes that are.
    async fn keep(&mut self, kept: &PersistedState) -> Result<usize, KeepError>;
    /// Whether what was written is still there.
    fn is_intact(&self) -> bool {
        true
    }
}

/// What keeps the counts.
pub(crate) trait CountsStore {
    /// The most bytes that there is room for.
    fn limit(&self) -> Option<usize>;
    /// Replaces them, as far as there is room. Returns how many bytes that are.
    async fn keep_counts(&mut self, counted: &CountState) -> Result<usize, KeepError>;
}

/// Why something could not be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeepError {
    #[error(transparent)]
    Files(#[from] StoreError),
    #[error(transparent)]
    Secrets(#[from] SecretStoreError),
}

/// Where a process is the only one.
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

/// How safe what was decided is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteStatus {
    /// It may be published.
    Safe,
    /// Not yet.
    Pending,
    /// Somebody else decides now.
    LostLeadership,
}

/// Counts that are being written aside: what keeps them, they, and what came of it.
type Aside<C> = JoinHandle<(C, CountState, Result<usize, KeepError>)>;

/// What is not safe yet, and where to keep it. What cannot be kept (a full disk, no API server) is tried again.
#[derive(Debug)]
pub(crate) struct StateWriter<D, C> {
    disk: D,
    /// None while they are written aside.
    counts: Option<C>,
    aside: Option<Aside<C>>,
    done: ControllerMetrics,
    kept: Option<PersistedState>,
    counted: Option<CountState>,
    /// When counts were last written, or could not be, and how many bytes they were.
    wrote_counts: Option<(Instant, usize)>,
    /// Why the last write failed, if it did.
    trouble: Option<String>,
    /// Whether that was the answer of what keeps state, which thus is there and has heard of nothing newer.
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

    /// Takes what came of looking at everything anew.
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

    /// Takes everything, if what was written is there no longer.
    pub(crate) fn take_what_is_lost(&mut self, reconciler: &Reconciler) -> bool {
        let is_lost = !self.disk.is_intact();
        if is_lost {
            self.kept = Some(reconciler.kept().clone());
            self.counted = Some(reconciler.counted().clone());
        }
        is_lost
    }

    /// Writes what was taken, and what could not be written before. Counts that cannot be kept hold up nothing.
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
                // Said once, not at each try.
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

    /// Whether counts are to be written by themselves now.
    pub(crate) fn counts_are_due(&self, is_at_rest: bool) -> bool {
        let Some((last, bytes)) = self.wrote_counts else { return self.aside.is_none() };
        let long = OFTEN + Duration::from_secs((bytes / BYTES_PER_SECOND) as u64);
        let long = if is_at_rest { long * AT_REST } else { long };
        self.aside.is_none() && last.elapsed() >= long.min(SELDOM)
    }

    /// What came of counts that are written aside, once that is known.
    pub(crate) async fn look_aside(&mut self) -> WriteStatus {
        match &self.aside {
            Some(aside) if aside.is_finished() => self.finish_aside().await,
            _ => WriteStatus::Safe,
        }
    }

    /// Waits for counts that are written aside.
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

    /// Whether something that was decided is not safe yet.
    pub(crate) fn has_pending(&self) -> bool {
        self.kept.is_some()
    }

    /// Why what was decided last is not kept, if so.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Whether what was decided last was refused, and the refusal says that no other replica decides.
    pub(crate) fn is_refused(&self) -> bool {
        self.trouble.is_some() && self.is_refused
    }

    /// Why counts are not kept, if so.
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
                // Newer ones may have been taken meanwhile.
                self.counted.get_or_insert(counted);
                WriteStatus::Pending
            }
        }
    }
}

impl<D: StateStore, C: CountsStore + Send + 'static> StateWriter<D, C> {
    /// Writes counts while everything else goes on.
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
