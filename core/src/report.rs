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
    /// This run of the proxy; counts start from 0 with each. When it began, as a hexadecimal number: of two runs of one
    /// proxy, the greater one is the newer.
    pub start: String,
    /// Grows with every report of this run, so that one that was held up on its way is not taken for news. 0 or left out
    /// by proxies that do not count their reports.
    #[serde(default)]
    pub sequence: u64,
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

/// The most that a report may say of anything that is counted: sums over all proxies stay far below what fits.
pub const MAX_COUNT: u64 = 1 << 48;

impl Report {
    /// Fails with the field that counts more than can be.
    pub fn check(&self) -> Result<(), String> {
        for (i, service) in self.services.iter().enumerate() {
            within(&format_args!("services[{i}].unrouted"), service.unrouted)?;
            for (j, version) in service.versions.iter().enumerate() {
                let VersionReport { ended, in_flight, durations, .. } = version;
                let Counts { ok, error, client_error, cancelled } = *ended;
                let counts = [
                    ("ok", ok),
                    ("error", error),
                    ("clientError", client_error),
                    ("cancelled", cancelled),
                    ("inFlight", *in_flight),
                ];
                for (name, count) in counts {
                    within(&format_args!("services[{i}].versions[{j}].{name}"), count)?;
                }
                for (k, count) in durations.iter().enumerate() {
                    within(&format_args!("services[{i}].versions[{j}].durations[{k}]"), *count)?;
                }
            }
        }
        Ok(())
    }
}

fn within(field: &std::fmt::Arguments<'_>, count: u64) -> Result<(), String> {
    match count {
        0..=MAX_COUNT => Ok(()),
        _ => Err(format!("{field}: {count} is not allowed; expected at most {MAX_COUNT}")),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn what_nobody_can_have_counted_is_named() {
        let with = |place: &str, count: u64| {
            let mut report = json!({"proxy": "p", "start": "1", "revision": 1, "services": [
                {"name": "a", "versions": []},
                {"name": "b", "unrouted": 1, "versions": [{"name": "v1", "ok": 1, "error": 1, "clientError": 1,
                    "cancelled": 1, "inFlight": 1, "durations": [1, 1]}]}]});
            *report.pointer_mut(place).unwrap() = json!(count);
            serde_json::from_value::<Report>(report).unwrap().check()
        };
        for (place, named) in [
            ("/services/1/unrouted", "services[1].unrouted"),
            ("/services/1/versions/0/ok", "services[1].versions[0].ok"),
            ("/services/1/versions/0/error", "services[1].versions[0].error"),
            ("/services/1/versions/0/clientError", "services[1].versions[0].clientError"),
            ("/services/1/versions/0/cancelled", "services[1].versions[0].cancelled"),
            ("/services/1/versions/0/inFlight", "services[1].versions[0].inFlight"),
            ("/services/1/versions/0/durations/1", "services[1].versions[0].durations[1]"),
        ] {
            assert_eq!(with(place, MAX_COUNT), Ok(()));
            let error = format!("{named}: {} is not allowed; expected at most {MAX_COUNT}", MAX_COUNT + 1);
            assert_eq!(with(place, MAX_COUNT + 1), Err(error));
        }
    }
}
