//! What a version did lately.

use super::Sample;
use serde::{Deserialize, Serialize};

/// So many requests are remembered, and at most about twice as many.
const REMEMBERED: u64 = 5_000;

/// A version's last requests, 5,000 to 10,000 of them: those before are forgotten, so that what it did long ago is no
/// measure for anybody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lately {
    #[serde(flatten)]
    now: Sample,
    /// The 5,000 before those.
    #[serde(default)]
    before: Sample,
}

impl Lately {
    /// Takes in what ended since.
    pub fn add(&mut self, later: &Sample) {
        self.now.add(later);
        if self.now.requests >= REMEMBERED {
            self.before = std::mem::take(&mut self.now);
        }
    }

    /// All that is remembered.
    pub fn sample(&self) -> Sample {
        let mut sample = self.before.clone();
        sample.add(&self.now);
        sample
    }
}
