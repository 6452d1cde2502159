//! Which documents are to be looked at: those of which something has changed, and those whose time has come. What becomes
//! of a document depends on no other one, so that all others are as they were.

use crate::clock::Millis;
use crate::rollout::Allocation;
use std::collections::{BTreeSet, HashMap};
use tideshift_core::protocol::policy::Service;
use tideshift_core::shift::TrafficShift;

/// At the latest after so long a rollout under way is looked at, whatever is expected of it.
const LATEST: Millis = 10_000;

/// All documents in force, by their places.
#[derive(Debug, Default)]
pub(super) struct Due {
    documents: Vec<Document>,
    names: HashMap<String, usize>,
    /// Something of them has changed.
    changed: BTreeSet<usize>,
    /// Those that time alone changes, and when.
    timed: BTreeSet<(Millis, usize)>,
    /// Those whose rollouts are on their way.
    under_way: BTreeSet<usize>,
    /// Those of which not all endpoints are known.
    unknown: BTreeSet<usize>,
}

/// What came of the last look at a document.
#[derive(Debug, Default, Clone)]
pub(super) struct Document {
    /// What proxies are to run of it.
    pub(super) services: Vec<Service>,
    /// Each version's part, by service.
    pub(super) parts: Vec<Vec<Allocation>>,
    /// What speaks against the target, and for it.
    pub(super) evidence: Option<[f64; 2]>,
    pub(super) is_known: bool,
    pub(super) is_under_way: bool,
    /// When it is to be looked at again although nothing has changed.
    pub(super) due: Option<Millis>,
    /// How often it was looked at.
    pub(super) looks: u64,
}

impl Due {
    /// Other documents are in force. Those that are the same are as they were.
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

    /// Where a document is.
    pub(super) fn place(&self, name: &str) -> Option<usize> {
        self.names.get(name).copied()
    }

    /// Something of a document has changed.
    pub(super) fn mark(&mut self, at: usize) {
        self.changed.insert(at);
    }

    /// Something that moves only rollouts under way has changed of a document.
    pub(super) fn mark_moving(&mut self, at: usize) {
        if self.under_way.contains(&at) {
            self.mark(at);
        }
    }

    /// The same of all.
    pub(super) fn mark_all_moving(&mut self) {
        self.changed.extend(&self.under_way);
    }

    /// What proxies have been given has changed, which stays in force where endpoints are not known.
    pub(super) fn mark_unknown(&mut self) {
        self.changed.extend(&self.unknown);
    }

    /// Something of all documents has changed.
    pub(super) fn mark_all(&mut self) {
        self.changed.extend(0..self.documents.len());
    }

    /// The documents that are to be looked at now, in their order.
    pub(super) fn take(&mut self, now: Millis) -> BTreeSet<usize> {
        let mut taken = std::mem::take(&mut self.changed);
        while let Some((_, at)) = self.timed.first().copied().filter(|(due, _)| *due <= now) {
            self.timed.pop_first();
            taken.insert(at);
        }
        taken
    }

    /// What came of a look at a document.
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

    /// All of them, in their order.
    pub(super) fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// The documents whose rollouts are on their way.
    pub(super) fn under_way(&self) -> impl Iterator<Item = usize> {
        self.under_way.iter().copied()
    }

    /// Whether a document's rollout is on its way.
    pub(super) fn is_under_way(&self, at: usize) -> bool {
        self.under_way.contains(&at)
    }

    /// Whether there are documents, and all endpoints are known of none of them.
    pub(super) fn knows_none(&self) -> bool {
        !self.documents.is_empty() && self.unknown.len() == self.documents.len()
    }
}

/// When to look again at a rollout under way.
pub(super) fn at_the_latest(due: impl IntoIterator<Item = Millis>, now: Millis) -> Millis {
    due.into_iter().chain([now + LATEST]).min().unwrap_or(now)
}
