//! The `status` of a TrafficShift in Kubernetes. Filling it is left to the controller; nothing is read back from it but
//! what it says for people.

use crate::rollout::{Phase, Reason};
use crate::status::{ServiceStatus, StepStatus, VerdictStatus};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the shift stands. Written by the controller alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrafficShiftStatus {
    /// The `metadata.generation` of the document that is in force; while it is behind, the latest one is not yet in
    /// force, or was refused, which the conditions say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// What is so and what is not, each by its type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Where the rollout stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Why it is in this phase, in a word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Why it is in this phase, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The version that serves what the target does not. Once a rollout has succeeded it is the target, whatever the
    /// spec calls stable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<String>,
    /// The version that traffic moves to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The step that the rollout is at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<StepStatus>,
    /// The versions' shares of the requests that no rule takes, such as `v1 75 %, v2 25 %`; of the first service, where
    /// there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// What the counts say of the target; none before the first rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<VerdictStatus>,
    /// The services that move together, with their versions, endpoints and counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServiceStatus>,
}

/// One thing that is so, or is not, as Kubernetes' own objects say it (`metav1.Condition`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it is so.
    pub status: ConditionStatus,
    /// The `metadata.generation` that it was said of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Since when it is so, RFC 3339.
    pub last_transition_time: jiff::Timestamp,
    /// Why, in a word.
    pub reason: String,
    /// Why, in words.
    pub message: String,
}

/// Whether a condition is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It is so.
    True,
    /// It is not.
    False,
    /// Nobody can tell at present.
    Unknown,
}
