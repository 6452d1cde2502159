//! The absolute test: "the target is worse than allowed and, at the same time, worse than the stable version"; and
//! whether both versions are worse than allowed.

use super::settings::DEFAULT_MAX_ERROR_RATE;
use super::{Batch, CLUMP, Settings, Totals};
use crate::evidence::{Evidence, RATIOS, bits, log_mean_exp, tilt};
use serde::{Deserialize, Serialize};

/// The tested multiples of the allowed odds.
const ODDS: [f64; 4] = [1.5, 3.0, 10.0, 100.0];
/// The minimum duration of a batch, in milliseconds.
const LEAST_MILLIS: u64 = 1_000;
/// If all requests go to the target: fewer requests of the stable version count as none.
const LEAST_STABLE: u64 = 10;
/// The maximum growth of evidence in one batch, as a logarithm.
const GROWTH: f64 = 4.0;
/// The margin of the allowed rate above the stable version's, in standard deviations.
const DEVIATIONS: f64 = 3.0;
/// The prior for an unknown stable version: this many requests, with half as many errors as allowed.
const PRIOR: f64 = 100.0;
/// The maximum by which recent absolute evidence exceeds its bound, as a logarithm, so that it decays soon afterwards.
const EXCESS: f64 = 2.0;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Absolute {
    evidence: Evidence,
    batch: Batch,
    target: Bad,
    stable: Bad,
}

impl Absolute {
    pub(super) fn new() -> Self {
        Self { evidence: Evidence::new(ODDS.len()), batch: Batch::default(), target: Bad::new(), stable: Bad::new() }
    }

    /// Adds a batch. `lately`: the recent requests of the stable version; `weight`: the target's fraction of the
    /// weight; `share`: the maximum expected fraction of the requests at the target.
    pub(super) fn add(&mut self, settings: &Settings, lately: Totals, ended: &Batch, weight: f64, share: f64) {
        let least = settings.max_error_rate.unwrap_or(DEFAULT_MAX_ERROR_RATE);
        let (usual, allowed) = known(lately, least);
        let asked = settings.max_error_rate.unwrap_or(allowed);
        let most = libm::log(settings.bound()) + EXCESS;
        self.target.add(&ended.target, asked, most);
        self.stable.add(&ended.stable, asked, most);

        self.batch.add(ended);
        // If the stable version receives no requests, there is nothing to wait for.
        let gets_all = weight >= 1.0;
        if self.batch.millis < LEAST_MILLIS || !(gets_all || self.batch.is_full(share)) {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let is_alone = gets_all && batch.stable.requests < LEAST_STABLE;
        self.evidence.add(ODDS.map(|odds| {
            let worse_than_allowed = tempered(&batch.target, allowed, odds).min(GROWTH);
            // The first term does not grow on average for a target that is no worse than allowed, the second for one
            // that is no worse than the stable version now; so the lesser of both does not grow either.
            let ratio = odds * allowed / (1.0 + allowed * (odds - 1.0)) / usual;
            if is_alone { worse_than_allowed } else { worse_than_allowed.min(worse_than_stable(&batch, ratio)) }
        }));
    }

    /// The logarithm of the evidence.
    pub(super) fn log(&self) -> f64 {
        self.evidence.log()
    }

    /// Whether both versions were recently bad, each on its own, with evidence of at least this bound.
    pub(super) fn both_bad(&self, bound: f64) -> bool {
        self.target.log().min(self.stable.log()) >= libm::log(bound)
    }
}

/// The stable version's error rate as far as it is known, and the allowed rate: the document's, or a rate slightly
/// above the stable version's, with a margin for clumped errors.
fn known(stable: Totals, least: f64) -> (f64, f64) {
    let (taken, errors) = (PRIOR * least / 2.0, stable.errors as f64);
    let all = stable.requests as f64 + PRIOR;
    let usual = (errors + taken) / all;
    let most = usual + DEVIATIONS * libm::sqrt(CLUMP * errors + taken) / all;
    (usual, least.max(most.min(0.5)))
}

/// The log-evidence of "`ratio` times as bad as the stable version at the same time".
fn worse_than_stable(batch: &Batch, ratio: f64) -> f64 {
    let [least, .., most] = RATIOS;
    let (errors, others) = (batch.target.errors as f64, batch.stable.errors as f64);
    tilt(errors, errors + others, batch.chance(), ratio.clamp(least, most))
}

/// Evidence that a version is worse than allowed, which discounts good periods.
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

/// The log-evidence of this many times the allowed odds, with each clump of errors counted as one.
fn tempered(ended: &Totals, allowed: f64, odds: f64) -> f64 {
    tilt(ended.errors as f64, ended.requests as f64, allowed, odds) / CLUMP
}
