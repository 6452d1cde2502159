//! A command is answered only after the reconcile that includes it has been persisted and published.

use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

/// Numbers the commands, and tracks up to which one they are done.
#[derive(Debug, Default)]
pub struct ReconcileBarrier {
    asked: AtomicU64,
    done: watch::Sender<u64>,
}

impl ReconcileBarrier {
    /// Requests another reconcile. Call it with the lock held, after a change.
    pub(super) fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Waits until that reconcile is done.
    pub(super) async fn wait(&self, turn: u64) {
        let _ = self.done.subscribe().wait_for(|done| *done >= turn).await;
    }

    /// The reconcile that begins now. Call it with the lock held.
    pub fn begin(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Marks the result of that reconcile as persisted and published.
    pub fn end(&self, turn: u64) {
        self.done.send_replace(turn);
    }
}
