//! The same scenario with many seeds: how often it ends how.

use super::record::Run;
use super::run::run;
use super::scenario::Scenario;
use crate::rollout::Phase;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use tideshift_core::shift::TrafficShift;

/// What came of many runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Many {
    /// The rollout's name.
    pub rollout: String,
    /// How many.
    pub runs: u64,
    /// The first one's seed; each has one more than the one before.
    pub seed: u64,
    /// Each way to end, those that did not occur too.
    pub endings: Vec<Ending>,
}

/// The runs that ended one way.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ending {
    /// Which way.
    pub end: End,
    /// How many.
    pub runs: u64,
    /// From the rollout's beginning to its end; none where it has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<Quantiles<f64>>,
    /// Failed requests that users saw in that time.
    pub failed: Quantiles<u64>,
    /// Those of the target.
    pub failed_of_target: Quantiles<u64>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum End {
    /// The target serves everything.
    Succeeded,
    /// The target was taken back.
    Failed,
    /// Neither, when the time was over.
    Undecided,
}

/// Of 100 runs, 50 and 90 have no more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Quantiles<T> {
    /// Of half of the runs.
    pub median: T,
    /// Of nine of ten.
    pub p90: T,
}

impl End {
    /// How a run ended.
    pub fn of(run: &Run) -> Self {
        match run.phase {
            Phase::Succeeded => Self::Succeeded,
            Phase::Failed => Self::Failed,
            _ => Self::Undecided,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Undecided => "Undecided",
        }
    }
}

impl<T: Copy + Default + PartialOrd> Quantiles<T> {
    fn of(mut values: Vec<T>) -> Self {
        values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
        let quantile = |tenths: usize| {
            let at = (values.len() * tenths).div_ceil(10).saturating_sub(1);
            values.get(at).copied().unwrap_or_default()
        };
        Self { median: quantile(5), p90: quantile(9) }
    }
}

/// Plays a scenario so many times, on all cores. The same arguments give the same answer.
pub fn many(shift: &TrafficShift, scenario: &Scenario, seed: u64, runs: u64) -> Many {
    let next = AtomicU64::new(0);
    let some = || {
        let mut some = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= runs {
                return some;
            }
            some.push(run(shift, scenario, seed.wrapping_add(i), false));
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let all: Vec<Run> = thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(some)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    let ending = |end: End| {
        let runs: Vec<&Run> = all.iter().filter(|run| End::of(run) == end).collect();
        let seconds: Vec<f64> =
            runs.iter().filter_map(|run| Some(run.ended_at_seconds? - run.started_at_seconds?)).collect();
        Ending {
            end,
            runs: runs.len() as u64,
            seconds: (!seconds.is_empty()).then(|| Quantiles::of(seconds)),
            failed: Quantiles::of(runs.iter().map(|run| run.judged.failed).collect()),
            failed_of_target: Quantiles::of(runs.iter().map(|run| run.judged.failed_of_target).collect()),
        }
    };
    let endings = [End::Succeeded, End::Failed, End::Undecided].map(ending).into();
    Many { rollout: shift.name.clone(), runs, seed, endings }
}
