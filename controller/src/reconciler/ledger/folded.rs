//! The folded runs of proxies, whose counts are only in the totals: a hash of each of the latest ones, and the time up
//! to which the forgotten ones had started.

use super::RunKey;
use std::collections::{HashSet, VecDeque};

/// The number of runs that are remembered.
const MOST: usize = 8_192;

/// Runs whose counts are in the totals and of which nothing else is known.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Folded {
    /// Each with a time by which it had started, the newest last.
    order: VecDeque<(u64, u64)>,
    hashes: HashSet<u64>,
    /// A run that started by this time may be one that is not remembered.
    horizon: u64,
}

impl Folded {
    /// Restores the persisted state.
    pub(super) fn new(order: impl Iterator<Item = (u64, u64)>, horizon: u64) -> Self {
        let mut folded = Self { horizon, ..Self::default() };
        order.for_each(|(hash, started)| folded.add_hash(hash, started));
        folded
    }

    /// Adds a run that had started by this time.
    pub(super) fn add(&mut self, key: &RunKey, started: u64) {
        self.add_hash(hash(key), started);
    }

    fn add_hash(&mut self, hash: u64, started: u64) {
        if self.hashes.insert(hash) {
            self.order.push_back((hash, started));
        }
        while self.order.len() > MOST {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((hash, started)) = self.order.pop_front() {
            self.hashes.remove(&hash);
            self.horizon = self.horizon.max(started);
        }
    }

    /// Forgets all runs; only the horizon remains.
    pub(super) fn forget_all(&mut self) {
        while !self.order.is_empty() {
            self.forget_oldest();
        }
    }

    /// Whether a run may be among them, by its name and its start.
    pub(super) fn may_have(&self, key: &RunKey, started: Option<u64>) -> bool {
        started.is_some_and(|started| started <= self.horizon && self.horizon > 0) || self.hashes.contains(&hash(key))
    }

    /// The state to persist: the hash of each run with a time by which it had started, and the horizon.
    pub(super) fn parts(&self) -> (impl Iterator<Item = (u64, u64)>, u64) {
        (self.order.iter().copied(), self.horizon)
    }
}

/// FNV-1a with a final mix: the same in every build, because it is persisted.
fn hash((proxy, start): &RunKey) -> u64 {
    let bytes = proxy.bytes().chain([0]).chain(start.bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}
