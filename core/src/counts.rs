//! Counts of exchanges by outcome and by duration.

use crate::outcome::Outcome;
use serde::{Deserialize, Serialize};
use std::ops::{Add, AddAssign};

/// Exchanges by outcome. One that the sender does not know of is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(!default))]
pub struct Counts {
    /// Answered.
    pub ok: u64,
    /// The version's fault.
    pub error: u64,
    /// The client's fault.
    pub client_error: u64,
    /// The client went away.
    pub cancelled: u64,
}

impl Counts {
    pub(crate) fn check(&self, at: &str) -> Result<(), String> {
        let Self { ok, error, client_error, cancelled } = *self;
        let counts = [("ok", ok), ("error", error), ("clientError", client_error), ("cancelled", cancelled)];
        counts.iter().try_for_each(|(name, count)| within(&format_args!("{at}.{name}"), *count, MAX_COUNT))
    }

    /// Counts an exchange.
    pub fn count(&mut self, outcome: Outcome) {
        let count = match outcome {
            Outcome::Ok => &mut self.ok,
            Outcome::Error => &mut self.error,
            Outcome::ClientError => &mut self.client_error,
            Outcome::Cancelled => &mut self.cancelled,
        };
        *count = count.saturating_add(1);
    }

    /// The total.
    pub fn total(&self) -> u64 {
        Outcome::ALL.iter().fold(0, |sum, outcome| sum.saturating_add(self.of(*outcome)))
    }

    /// Exchanges that count for or against the version: not those that the client ended.
    pub fn answered(&self) -> u64 {
        self.total().saturating_sub(self.cancelled)
    }

    /// The exchanges with one outcome.
    pub fn of(&self, outcome: Outcome) -> u64 {
        match outcome {
            Outcome::Ok => self.ok,
            Outcome::Error => self.error,
            Outcome::ClientError => self.client_error,
            Outcome::Cancelled => self.cancelled,
        }
    }

    /// The increase since `before`, each at least 0.
    pub fn since(&self, before: &Self) -> Self {
        self.each(before, u64::saturating_sub)
    }

    /// Whether any count decreased, as after a reset.
    pub fn any_below(&self, before: &Self) -> bool {
        Outcome::ALL.iter().any(|outcome| self.of(*outcome) < before.of(*outcome))
    }

    fn each(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            ok: f(self.ok, other.ok),
            error: f(self.error, other.error),
            client_error: f(self.client_error, other.client_error),
            cancelled: f(self.cancelled, other.cancelled),
        }
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.each(&other, u64::saturating_add)
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// The bounds of a report's durations in milliseconds: six per decade from 10 ms to 1 s, where most exchanges are, and
/// coarser above.
pub const DURATION_BOUNDS: [u64; 22] =
    [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1_000, 2_000, 5_000, 10_000, 30_000];

/// The index of the duration bucket of an exchange.
pub fn duration_bucket(milliseconds: u64) -> usize {
    DURATION_BOUNDS.partition_point(|bound| *bound < milliseconds)
}

/// The maximum of any count in a report, so that sums over all proxies do not overflow.
pub const MAX_COUNT: u64 = 1 << 48;

pub(crate) fn within(field: &std::fmt::Arguments<'_>, count: u64, most: u64) -> Result<(), String> {
    if count <= most { Ok(()) } else { Err(format!("{field}: {count} is not allowed; expected at most {most}")) }
}
