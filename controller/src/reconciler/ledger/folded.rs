//! The runs of proxies that are only in the totals any more: a hash of each of the last ones, and up to when those started
//! that are not even among them.

use super::RunKey;
use std::collections::{HashSet, VecDeque};

/// So many are remembered.
const MOST: usize = 8_192;

/// Runs that have been counted, and that nothing else is known of.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Folded {
    /// Each with a time up to which it had started, the newest last.
    order: VecDeque<(u64, u64)>,
    hashes: HashSet<u64>,
    /// Whoever started up to then may be one that is not remembered.
    horizon: u64,
}

impl Folded {
    /// Goes on from what was written down.
    pub(super) fn new(order: impl Iterator<Item = (u64, u64)>, horizon: u64) -> Self {
        let mut folded = Self { horizon, ..Self::default() };
        order.for_each(|(hash, started)| folded.add_hash(hash, started));
        folded
    }

    /// One more, which had started by that time.
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

    /// Remembers none of them by itself.
    pub(super) fn forget_all(&mut self) {
        while !self.order.is_empty() {
            self.forget_oldest();
        }
    }

    /// Whether a run may be one of them, by its name and when it started.
    pub(super) fn may_have(&self, key: &RunKey, started: Option<u64>) -> bool {
        started.is_some_and(|started| started <= self.horizon && self.horizon > 0) || self.hashes.contains(&hash(key))
    }

    /// What to write down: of each its hash and a time by which it had started; and the horizon.
    pub(super) fn parts(&self) -> (impl Iterator<Item = (u64, u64)>, u64) {
        (self.order.iter().copied(), self.horizon)
    }
}

/// FNV-1a with a mix at the end: the same in every build, as it is written down.
fn hash((proxy, start): &RunKey) -> u64 {
    let bytes = proxy.bytes().chain([0]).chain(start.bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}
