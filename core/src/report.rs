//! What a proxy tells the controller: which policy it runs, and how each version does.
//!
//! Counts are cumulative since the proxy's start, so that a report that is lost or repeated loses and doubles nothing.

use crate::guard::Veto;
use crate::outcome::Outcome;
use serde::{Deserialize, Serialize};
use std::ops::{Add, AddAssign};

/// The body of `POST /v1/reports`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Report {
    /// The proxy: Envoy's node id.
    pub proxy: String,
    /// This run of the proxy; counts start from 0 with each.
    pub start: String,
    /// The controller state that the revision belongs to; empty for the plugin configuration's own policy.
    #[serde(default)]
    pub epoch: String,
    /// The revision that every worker has applied.
    pub revision: u64,
    /// How many workers that are (Envoy's main thread has one too).
    #[serde(default)]
    pub workers: u32,
    /// A newer policy that the proxy could not take; the revision above stays in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// The services that the proxy has counted for.
    pub services: Vec<ServiceReport>,
}

/// A policy that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Refused {
    /// Its revision, if that much could be read.
    pub revision: Option<u64>,
    /// What is wrong with it, one line for each field.
    pub errors: Vec<String>,
}

/// One service's counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ServiceReport {
    /// The service's name.
    pub name: String,
    /// Requests that found no version in service and went to Envoy's default route.
    #[serde(default)]
    pub unrouted: u64,
    /// Its versions, also those that are no longer in the policy.
    pub versions: Vec<VersionReport>,
    /// The versions that the proxy's guard has taken out of service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vetoes: Vec<Veto>,
}

/// One version's counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VersionReport {
    /// The version's name.
    pub name: String,
    /// Exchanges that have ended.
    #[serde(flatten)]
    pub ended: Counts,
    /// Exchanges that have not ended yet.
    #[serde(default)]
    pub in_flight: u64,
    /// How long exchanges took that were not cancelled: how many took up to the first of [`DURATION_BOUNDS`], from there
    /// to the second, and so on, and those beyond all bounds. Zeros at the end are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub durations: Vec<u64>,
}

/// The bounds of a report's durations in milliseconds: three for each power of two and a half at the fast end, where
/// most exchanges are, coarser after 10 s.
pub const DURATION_BOUNDS: [u64; 22] =
    [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1_000, 2_000, 5_000, 10_000, 30_000];

/// Which of a report's durations an exchange of so many milliseconds counts to.
pub fn duration_bucket(milliseconds: u64) -> usize {
    DURATION_BOUNDS.partition_point(|bound| *bound < milliseconds)
}

/// Exchanges by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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
    /// All of them.
    pub fn total(&self) -> u64 {
        Outcome::ALL.iter().fold(0, |sum, outcome| sum.saturating_add(self.of(*outcome)))
    }

    /// Those that speak for or against the version: not the ones that the client ended.
    pub fn answered(&self) -> u64 {
        self.total().saturating_sub(self.cancelled)
    }

    /// Those with one outcome.
    pub fn of(&self, outcome: Outcome) -> u64 {
        match outcome {
            Outcome::Ok => self.ok,
            Outcome::Error => self.error,
            Outcome::ClientError => self.client_error,
            Outcome::Cancelled => self.cancelled,
        }
    }

    /// What was added since `before`, at least 0 each.
    pub fn since(&self, before: &Self) -> Self {
        self.each(before, u64::saturating_sub)
    }

    /// Whether any count went back, which a counter that was reset does.
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
