//! What came of a run, for pictures, people and programs.

use crate::rollout::{Phase, Reason};
use crate::status::VerdictStatus;
use serde::Serialize;

/// One run. All times are seconds since its beginning.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    /// The rollout's name.
    pub rollout: String,
    /// What chance was made of.
    pub seed: u64,
    /// How long was watched.
    pub duration_seconds: f64,
    /// How it ended: `Succeeded` or `Failed`, or what it was still doing.
    pub phase: Phase,
    /// Why, in a word.
    pub reason: Reason,
    /// Why, in words.
    pub message: String,
    /// The version that serves what the target does not.
    pub stable: String,
    /// The version to move to, or that was moved to, or that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// When the last rollout began; none: there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at_seconds: Option<f64>,
    /// When it succeeded or failed; none: it did neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at_seconds: Option<f64>,
    /// What the counts say of the last target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<VerdictStatus>,
    /// From the last rollout's beginning to its end, and until what was in flight of a failed target has ended.
    pub judged: Judged,
    /// What happened to the rollout.
    pub transitions: Vec<Transition>,
    /// What else happened.
    pub events: Vec<Event>,
    /// What users got, over the whole time.
    pub services: Vec<ServiceTotals>,
    /// How things stood, at least every `sampleSeconds`; none in runs of many.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Sample>,
    /// From one regular sample to the next; there are others where something changes.
    pub sample_seconds: f64,
    /// Whether more requests come at one time than at another.
    pub load_changes: bool,
}

/// Requests during a rollout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Judged {
    /// All that ended.
    pub requests: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that failed of the target.
    pub failed_of_target: u64,
}

/// A change of the rollout's state.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    /// When.
    pub at_seconds: f64,
    /// The number of the rollout.
    pub rollout: u64,
    /// The phase since then.
    pub phase: Phase,
    /// Why, in a word.
    pub reason: Reason,
    /// Why, in words.
    pub message: String,
    /// The number of the step, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<usize>,
    /// What the step gives to the target, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

/// Something that happened and was no transition: a command, a guard's veto, the controller's absence.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When.
    pub at_seconds: f64,
    /// In words.
    pub message: String,
}

/// What users of one service got.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceTotals {
    /// Its name.
    pub name: String,
    /// Requests that found no version in service.
    pub unrouted: u64,
    /// Its versions, in the document's order.
    pub versions: Vec<VersionTotals>,
}

/// What users of one version got.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionTotals {
    /// Its name.
    pub name: String,
    /// Requests that ended.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Its endpoints at the end: those that can take traffic, and all.
    pub endpoints_ready: u32,
    /// All of them.
    pub endpoints: u32,
    /// Its share at the end, in percent.
    pub weight: f64,
}

/// How things stood at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// When.
    pub at_seconds: f64,
    /// Whether this is a regular one.
    pub regular: bool,
    /// Whether the controller was there.
    pub controller: bool,
    /// Of each service, each version.
    pub services: Vec<Vec<VersionSample>>,
    /// What spoke against the target; none: nothing was judged, or the controller was away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<f64>,
    /// The target fails from this evidence on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<f64>,
    /// What spoke for the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_evidence: Option<f64>,
    /// The target passes from this evidence on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_bound: Option<f64>,
    /// What spoke against the target's speed, if that is judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_evidence: Option<f64>,
}

/// How a version stood at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionSample {
    /// Its share of the requests that no rule takes, over all proxies, in percent.
    pub weight: f64,
    /// Endpoints that can take traffic.
    pub endpoints_ready: u32,
    /// Requests that have ended since the beginning.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
}
