//! "The target is worse than what is allowed", which needs no comparison; and whether both versions are.

use super::{Batch, CLUMP, Sample, Settings, Totals, settings::DEFAULT_MAX_ERROR_RATE};
use crate::evidence::{Evidence, bits, log_mean_exp, tilt};
use serde::{Deserialize, Serialize};

/// So many times the odds that are allowed.
const ODDS: [f64; 4] = [1.5, 3.0, 10.0, 100.0];
/// Requests of the stable version that make a batch, to see whether it does well at the time, …
const LEAST_STABLE: u64 = 10;
/// … and the milliseconds that a batch takes at least.
const LEAST_MILLIS: u64 = 1_000;
/// The most that evidence grows with one batch, as a logarithm.
const GROWTH: f64 = 4.0;
/// How far above what the stable version did lately the allowed rate is, in standard deviations.
const DEVIATIONS: f64 = 3.0;
/// Just now: the stable version's last requests, at most twice as many.
const JUST_NOW: u64 = 500;
/// By how much what was lately bad by itself exceeds its bound at most, as a logarithm: it should be over soon after.
const EXCESS: f64 = 2.0;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Absolute {
    evidence: Evidence,
    batch: Batch,
    /// The stable version just now.
    just_now: Totals,
    target: Bad,
    stable: Bad,
}

impl Absolute {
    pub(super) fn new() -> Self {
        Self {
            evidence: Evidence::new(ODDS.len()),
            batch: Batch::default(),
            just_now: Totals::default(),
            target: Bad::new(),
            stable: Bad::new(),
        }
    }

    /// Takes in what ended. `recent`: what the stable version did before; `share`: the target's, by weight.
    pub(super) fn add(&mut self, settings: &Settings, recent: &Sample, ended: &Batch, share: f64) {
        self.just_now.add(ended.stable);
        while self.just_now.requests > 2 * JUST_NOW {
            (self.just_now.requests, self.just_now.errors) = (self.just_now.requests / 2, self.just_now.errors / 2);
        }
        let allowed = self.allowed(settings, recent);
        let asked = settings.max_error_rate.unwrap_or(allowed);
        let most = libm::log(settings.bound()) + EXCESS;
        self.target.add(&ended.target, asked, most);
        self.stable.add(&ended.stable, asked, most);

        self.batch.add(ended);
        // Where the stable version gets nothing, there is nothing to wait for.
        let can_compare = self.batch.stable.requests >= LEAST_STABLE || share >= 1.0;
        if self.batch.millis < LEAST_MILLIS || !can_compare {
            return;
        }
        let Batch { target, stable, .. } = std::mem::take(&mut self.batch);
        // While the stable version fails too, the target is not to blame.
        if stable.errors as f64 <= allowed * stable.requests as f64 {
            self.evidence.add(ODDS.map(|odds| tempered(&target, allowed, odds).min(GROWTH)));
        }
    }

    /// The rate of errors that is allowed: what the document says, or what is hardly less than the stable version's, if
    /// that is more: than what it did lately, even if all came in clumps, and than what it does just now.
    fn allowed(&self, settings: &Settings, recent: &Sample) -> f64 {
        let lately = most(recent.errors as f64 / CLUMP) * CLUMP / recent.requests.max(1) as f64;
        let just_now = most(self.just_now.errors as f64) / self.just_now.requests.max(JUST_NOW) as f64;
        settings.max_error_rate.unwrap_or(DEFAULT_MAX_ERROR_RATE).max(lately.max(just_now).min(0.5))
    }

    /// The logarithm of the evidence.
    pub(super) fn log(&self) -> f64 {
        self.evidence.log()
    }

    /// Whether both versions were bad lately, each by itself, with as much evidence as this bound asks for.
    pub(super) fn both_bad(&self, bound: f64) -> bool {
        self.target.log().min(self.stable.log()) >= libm::log(bound)
    }
}

/// Evidence that a version is worse than allowed, which forgets good times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Bad(#[serde(with = "bits")] Vec<f64>);

impl Bad {
    fn new() -> Self {
        Self(vec![0.0; ODDS.len()])
    }

    fn add(&mut self, ended: &Totals, allowed: f64, most: f64) {
        for (log, odds) in self.0.iter_mut().zip(ODDS) {
            *log = (log.max(0.0) + tempered(ended, allowed, odds)).min(most);
        }
    }

    fn log(&self) -> f64 {
        log_mean_exp(&self.0)
    }
}

/// The log-evidence of so many times the allowed odds, as if each clump of errors were one.
fn tempered(ended: &Totals, allowed: f64, odds: f64) -> f64 {
    tilt(ended.errors as f64, ended.requests as f64, allowed, odds) / CLUMP
}

/// How many were to be expected at most where so many were counted.
fn most(counted: f64) -> f64 {
    let half = DEVIATIONS * DEVIATIONS / 2.0;
    counted + half + DEVIATIONS * (counted + half / 2.0).sqrt()
}
