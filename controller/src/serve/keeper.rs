//! Makes safe what must survive a kill at any moment. Counts go before what was decided from them: a kill between the
//! two leaves an undecided rollout with all its evidence, which decides again; never a step whose evidence was counted
//! for the step before, or for an earlier rollout.

use crate::control::{Control, Counted, Outcome};
use crate::kubernetes::{Memory, MemoryError};
use crate::metrics::Done;
use crate::store::{Kept, Store, StoreError};

/// What keeps state.
pub(super) trait Disk {
    /// Whether another process may have taken over without this one knowing: then nothing may be published before it is
    /// safe, for that is when this one finds out.
    const IS_CONTENDED: bool;
    /// Replaces everything but the counts.
    async fn keep(&mut self, kept: &Kept) -> Result<usize, KeepError>;
    /// Replaces the counts.
    async fn keep_counts(&mut self, counted: &Counted) -> Result<usize, KeepError>;
}

/// Why something could not be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    #[error(transparent)]
    Files(#[from] StoreError),
    #[error(transparent)]
    Secrets(#[from] MemoryError),
}

/// Where a process is the only one.
impl Disk for Option<Store> {
    const IS_CONTENDED: bool = false;

    async fn keep(&mut self, kept: &Kept) -> Result<usize, KeepError> {
        Ok(self.as_mut().map_or(Ok(0), |store| store.keep(kept))?)
    }

    async fn keep_counts(&mut self, counted: &Counted) -> Result<usize, KeepError> {
        Ok(self.as_mut().map_or(Ok(0), |store| store.keep_counts(counted))?)
    }
}

impl Disk for Memory {
    const IS_CONTENDED: bool = true;

    async fn keep(&mut self, kept: &Kept) -> Result<usize, KeepError> {
        Ok(Self::keep(self, kept).await?)
    }

    async fn keep_counts(&mut self, counted: &Counted) -> Result<usize, KeepError> {
        Ok(Self::keep_counts(self, counted).await?)
    }
}

/// How safe what was decided is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Safety {
    /// It may be published.
    Safe,
    /// Not yet.
    Pending,
    /// Somebody else decides now.
    Deposed,
}

/// What is not safe yet, and where to keep it. What cannot be kept (a full disk, no API server) is tried again.
#[derive(Debug)]
pub(super) struct Keeper<D> {
    disk: D,
    done: Done,
    kept: Option<Kept>,
    counted: Option<Counted>,
    /// Why the last write failed, if it did.
    trouble: Option<String>,
}

impl<D: Disk> Keeper<D> {
    pub(super) fn new(disk: D, done: Done) -> Self {
        Self { disk, done, kept: None, counted: None, trouble: None }
    }

    /// Takes what came of looking at everything anew.
    pub(super) fn take(&mut self, control: &mut Control, outcome: &Outcome) {
        if outcome.keep {
            self.kept = Some(control.kept().clone());
            if !outcome.transitions.is_empty() {
                self.take_counts(control);
            }
        }
    }

    /// Takes the counts.
    pub(super) fn take_counts(&mut self, control: &mut Control) {
        self.counted = control.changed_counts().or(self.counted.take());
    }

    /// Writes what was taken, and what could not be written before.
    pub(super) async fn write(&mut self) -> Safety {
        let before = self.trouble.take();
        if let Some(counted) = &self.counted {
            let result = self.disk.keep_counts(counted).await;
            match self.judge(result, &before) {
                Safety::Safe => self.counted = None,
                // What was decided from counts that are not safe is not safe either.
                unsafe_ if D::IS_CONTENDED => return unsafe_,
                _ => {}
            }
        }
        if let Some(kept) = &self.kept {
            let result = self.disk.keep(kept).await;
            match self.judge(result, &before) {
                Safety::Safe => self.kept = None,
                unsafe_ if D::IS_CONTENDED => return unsafe_,
                _ => {}
            }
        }
        Safety::Safe
    }

    /// Whether something that was decided is not safe yet.
    pub(super) fn has_pending(&self) -> bool {
        self.kept.is_some()
    }

    /// Why what was decided last is not kept, if so.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    fn judge(&mut self, result: Result<usize, KeepError>, before: &Option<String>) -> Safety {
        self.done.wrote(result.is_ok());
        match result {
            Ok(_) => Safety::Safe,
            Err(KeepError::Secrets(MemoryError::Deposed)) => Safety::Deposed,
            Err(error) => {
                // Said once, not at each try.
                if before.is_none() && self.trouble.is_none() {
                    tracing::error!("{error}");
                }
                self.trouble = Some(error.to_string());
                Safety::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests;
