//! Makes safe what must survive a kill at any moment. Counts go before what was decided from them: a kill between the
//! two leaves an undecided rollout with all its evidence, which decides again; never a step whose evidence was counted
//! for the step before, or for an earlier rollout.

use crate::control::{Control, Counted, Outcome};
use crate::metrics::Done;
use crate::store::{Kept, Store, StoreError};

/// What keeps state.
pub(super) trait Disk {
    /// Replaces everything but the counts.
    fn keep(&self, kept: &Kept) -> Result<(), StoreError>;
    /// Replaces the counts.
    fn keep_counts(&self, counted: &Counted) -> Result<(), StoreError>;
}

impl Disk for Store {
    fn keep(&self, kept: &Kept) -> Result<(), StoreError> {
        Self::keep(self, kept)
    }

    fn keep_counts(&self, counted: &Counted) -> Result<(), StoreError> {
        Self::keep_counts(self, counted)
    }
}

/// What is not safe yet, and where to keep it. Where nothing can be kept (a full disk), it is tried again.
#[derive(Debug)]
pub(super) struct Keeper<D> {
    /// None: nothing is kept.
    disk: Option<D>,
    done: Done,
    kept: Option<Kept>,
    counted: Option<Counted>,
}

impl<D: Disk> Keeper<D> {
    pub(super) fn new(disk: Option<D>, done: Done) -> Self {
        Self { disk, done, kept: None, counted: None }
    }

    /// Takes what came of looking at everything anew.
    pub(super) fn take(&mut self, control: &mut Control, outcome: &Outcome) {
        if outcome.keep && self.disk.is_some() {
            self.kept = Some(control.kept().clone());
            if !outcome.transitions.is_empty() {
                self.take_counts(control);
            }
        }
    }

    /// Takes the counts.
    pub(super) fn take_counts(&mut self, control: &mut Control) {
        if self.disk.is_some() {
            self.counted = control.changed_counts().or(self.counted.take());
        }
    }

    /// Writes what was taken, and what could not be written before.
    pub(super) fn write(&mut self) {
        let Some(disk) = &self.disk else { return };
        let is_safe = |result: Result<(), StoreError>| {
            self.done.wrote(&result);
            result.inspect_err(|error| tracing::error!("{error}")).is_ok()
        };
        self.counted.take_if(|counted| is_safe(disk.keep_counts(counted)));
        self.kept.take_if(|kept| is_safe(disk.keep(kept)));
    }
}

#[cfg(test)]
mod tests;
