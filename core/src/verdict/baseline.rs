//! The recent requests of a version: the baseline for comparison.

use crate::verdict::Sample;
use serde::{Deserialize, Serialize};

/// The minimum number of requests that are kept; the maximum is about twice that.
const REMEMBERED: u64 = 5_000;

/// The last 5,000 to 10,000 requests of a version. Older ones are dropped, so that they no longer affect comparisons.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollingBaseline {
    #[serde(flatten)]
    now: Sample,
    /// The 5,000 before the current ones.
    #[serde(default)]
    before: Sample,
}

impl RollingBaseline {
    /// Adds the requests that have ended since the last call.
    pub fn add(&mut self, later: &Sample) {
        self.now.add(later);
        if self.now.requests >= REMEMBERED {
            self.before = std::mem::take(&mut self.now);
        }
    }

    /// All requests that are kept.
    pub fn sample(&self) -> Sample {
        let mut sample = self.before.clone();
        sample.add(&self.now);
        sample
    }
}
