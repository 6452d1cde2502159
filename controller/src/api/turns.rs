//! Who has asked for something is answered once the mind has looked at everything anew, and what it decided is safe and
//! published.

use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

/// Numbers what was asked for, and says up to where it is done.
#[derive(Debug, Default)]
pub struct Turns {
    asked: AtomicU64,
    done: watch::Sender<u64>,
}

impl Turns {
    /// The mind must have another turn; to be called while it is locked, after something has changed.
    pub(super) fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Waits until that turn is over.
    pub(super) async fn wait(&self, turn: u64) {
        let _ = self.done.subscribe().wait_for(|done| *done >= turn).await;
    }

    /// The turn that begins now; to be called while the mind is locked for it.
    pub fn begin(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// What was decided in that turn is safe and published.
    pub fn end(&self, turn: u64) {
        self.done.send_replace(turn);
    }
}
