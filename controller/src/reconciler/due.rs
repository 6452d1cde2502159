//! Tracks which documents need reconciling: those with changes, and those whose due time has come. The result for a
//! document depends on no other document, so all others keep theirs.

use crate::clock::Millis;
use crate::rollout::Allocation;
use std::collections::{BTreeSet, HashMap};
use tideshift_core::protocol::policy::Service;
use tideshift_core::shift::TrafficShift;

/// The longest interval between two reconciles of a rollout under way.
const LATEST: Millis = 10_000;

/// All documents in force, by index.
#[derive(Debug, Default)]
pub(super) struct Due {
    documents: Vec<Document>,
    names: HashMap<String, usize>,
    /// Documents that have changed.
    changed: BTreeSet<usize>,
    /// Documents that time alone changes, with the time.
    timed: BTreeSet<(Millis, usize)>,
    /// Documents whose rollouts are under way.
    under_way: BTreeSet<usize>,
    /// Documents with endpoints whose readiness is not known.
    unknown: BTreeSet<usize>,
}

/// The result of a document's last reconcile.
#[derive(Debug, Default, Clone)]
pub(super) struct Document {
    /// The compiled services for proxies.
    pub(super) services: Vec<Service>,
    /// The allocation of each version, by service.
    pub(super) parts: Vec<Vec<Allocation>>,
    /// The evidence against the target and for it.
    pub(super) evidence: Option<[f64; 2]>,
    pub(super) is_known: bool,
    pub(super) is_under_way: bool,
    /// When to reconcile again even if nothing changes.
    pub(super) due: Option<Millis>,
    /// How often it has been reconciled.
    pub(super) looks: u64,
}

impl Due {
    /// Sets the documents in force. Unchanged documents keep their results.
    pub(super) fn set(&mut self, before: &[TrafficShift], shifts: &[TrafficShift]) {
        let mut old = std::mem::take(self);
        for (at, shift) in shifts.iter().enumerate() {
            self.names.insert(shift.name.clone(), at);
            let same = old.names.get(&shift.name).copied().filter(|n| before.get(*n) == Some(shift));
            let document = same.and_then(|n| {
                let document = old.documents.get_mut(n).map(std::mem::take)?;
                (!old.changed.contains(&n)).then_some(document)
            });
            self.documents.push(Document::default());
            match document {
                Some(document) => self.put(at, document),
                None => self.mark(at),
            }
        }
    }

    /// The index of a document.
    pub(super) fn place(&self, name: &str) -> Option<usize> {
        self.names.get(name).copied()
    }

    /// Marks a document as changed.
    pub(super) fn mark(&mut self, at: usize) {
        self.changed.insert(at);
    }

    /// Marks a document after a change that affects only rollouts under way.
    pub(super) fn mark_moving(&mut self, at: usize) {
        if self.under_way.contains(&at) {
            self.mark(at);
        }
    }

    /// The same for all documents.
    pub(super) fn mark_all_moving(&mut self) {
        self.changed.extend(&self.under_way);
    }

    /// Marks the documents with unknown endpoints: they keep the services that proxies have, and these have changed.
    pub(super) fn mark_unknown(&mut self) {
        self.changed.extend(&self.unknown);
    }

    /// Marks all documents as changed.
    pub(super) fn mark_all(&mut self) {
        self.changed.extend(0..self.documents.len());
    }

    /// Takes the documents that are due now, in their order.
    pub(super) fn take(&mut self, now: Millis) -> BTreeSet<usize> {
        let mut taken = std::mem::take(&mut self.changed);
        while let Some((_, at)) = self.timed.first().copied().filter(|(due, _)| *due <= now) {
            self.timed.pop_first();
            taken.insert(at);
        }
        taken
    }

    /// Stores the result of reconciling a document.
    pub(super) fn put(&mut self, at: usize, document: Document) {
        let Some(before) = self.documents.get_mut(at) else { return };
        before.due.map(|due| self.timed.remove(&(due, at)));
        document.due.map(|due| self.timed.insert((due, at)));
        for (places, is_in) in [(&mut self.under_way, document.is_under_way), (&mut self.unknown, !document.is_known)] {
            if is_in {
                places.insert(at);
            } else {
                places.remove(&at);
            }
        }
        *before = document;
    }

    /// All results, in the documents' order.
    pub(super) fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// The documents whose rollouts are under way.
    pub(super) fn under_way(&self) -> impl Iterator<Item = usize> {
        self.under_way.iter().copied()
    }

    /// Whether a document's rollout is under way.
    pub(super) fn is_under_way(&self, at: usize) -> bool {
        self.under_way.contains(&at)
    }

    /// Whether there are documents, and each of them has endpoints whose readiness is not known.
    pub(super) fn knows_none(&self) -> bool {
        !self.documents.is_empty() && self.unknown.len() == self.documents.len()
    }
}

/// When to reconcile a rollout under way again.
pub(super) fn at_the_latest(due: impl IntoIterator<Item = Millis>, now: Millis) -> Millis {
    due.into_iter().chain([now + LATEST]).min().unwrap_or(now)
}
