//! How things stand, as `GET /v1/status` says it and `tideshift status` shows it.

use crate::clock::timestamp;
use crate::rollout::{Phase, Reason, Transition};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tideshift_core::counts::Counts;
use tideshift_core::guard::Veto;
use tideshift_core::protocol::report::Refused;

/// The answer to `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Names the controller's state.
    pub epoch: String,
    /// The revision of the policy that proxies are given, or are about to be given; 0 before the first.
    pub revision: u64,
    /// What is wrong with the documents as they are now; what they said before stays in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub document_errors: Vec<String>,
    /// Why what was decided last is not kept, if it is not: a restart would go on from what was kept before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
    /// Why counts are not kept, if they are not: rollouts go no further by evidence until they are. All else goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts_error: Option<String>,
    /// The revision that is in force, if what was decided since then is not published yet. Versions then have
    /// `weightInForce`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published_revision: Option<u64>,
    /// The services, by name.
    pub services: Vec<ServiceStatus>,
    /// The proxies, by id.
    pub proxies: Vec<ProxyStatus>,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// The rollout that moves it; services of one document share one.
    pub rollout: String,
    /// Counts the rollouts of its document, the first is 1; 0 before it.
    #[serde(default)]
    pub number: u64,
    /// Where its rollout stands.
    pub phase: Phase,
    /// Why it is in this phase, in a word.
    pub reason: Reason,
    /// Whether a user has paused the rollout.
    #[serde(default)]
    pub paused: bool,
    /// The version that serves what the target does not.
    pub stable: String,
    /// The version to move to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The steps of its rollouts.
    #[serde(default)]
    pub steps: Vec<StepPlan>,
    /// The step that the rollout is at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<StepStatus>,
    /// When it will be said to be stuck, if it gets no further, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<jiff::Timestamp>,
    /// What the counts say of the target; none before the first rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<VerdictStatus>,
    /// Why it is in this phase.
    pub message: String,
    /// Since when, RFC 3339.
    pub since: jiff::Timestamp,
    /// Requests that found no version in service.
    pub unrouted: u64,
    /// The versions, in the document's order.
    pub versions: Vec<VersionStatus>,
}

/// One step of a rollout, as it is planned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepPlan {
    /// The target's share in percent.
    pub weight: u32,
    /// How long it must have it.
    pub hold_seconds: u64,
    /// Whether the rollout then pauses until it is promoted.
    pub pause: bool,
    /// How many kinds of testers reach the target whatever its share is.
    pub matches: usize,
}

/// What the counts say of a rollout's target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerdictStatus {
    /// What follows.
    pub outcome: VerdictOutcome,
    /// The counts, the evidence and its bound in words.
    pub message: String,
    /// The target's requests since the rollout began.
    pub target: Judged,
    /// Those of the version that it is measured by.
    pub stable: Judged,
    /// How much speaks against the target; it fails at the bound.
    pub evidence: f64,
    /// 1 / `falseRollbackRate`.
    pub bound: f64,
    /// How much speaks for the target; it passes at the bound.
    pub pass_evidence: f64,
    /// 1 / (1 − `passConfidence`).
    pub pass_bound: f64,
    /// The same of how long requests take, if the document asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyStatus>,
}

/// What follows from the counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerdictOutcome {
    /// Good enough.
    Pass,
    /// Worse than it may be.
    Fail,
    /// Neither is known yet.
    Undecided,
}

/// Requests that were judged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Judged {
    /// The version's name.
    #[serde(default)]
    pub version: String,
    /// Those that ended, unless the client ended them.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
}

/// How much speaks against a target's speed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LatencyStatus {
    /// In words.
    pub message: String,
    /// It fails at the bound.
    pub evidence: f64,
    /// The bound.
    pub bound: f64,
}

/// A transition of a rollout, as `GET /v1/rollouts/{name}/history` and the events say it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransitionStatus {
    /// When, RFC 3339.
    pub time: jiff::Timestamp,
    /// Counts the rollouts of the document, the first is 1; 0 before it.
    pub rollout: u64,
    /// The phase since then.
    pub phase: Phase,
    /// Why, in a word.
    pub reason: Reason,
    /// Why, in words.
    pub message: String,
    /// The number of the step, counted from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<usize>,
    /// How many transitions just before this one are left out, because endpoints came and went again and again; 0 where
    /// it is left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: u64,
    /// The version that served before the rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The version to move to, or that was moved to, or that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Who asked for it: the name of the credential and the address, such as `alice from 10.1.2.3`. Left out for what the
    /// controller decided itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

impl TransitionStatus {
    /// The message, with who asked for it.
    pub fn words(&self) -> String {
        match &self.by {
            Some(by) => format!("{} (by {by})", self.message),
            None => self.message.clone(),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl From<&Transition> for TransitionStatus {
    fn from(transition: &Transition) -> Self {
        Self {
            time: timestamp(transition.time),
            rollout: transition.rollout,
            phase: transition.phase,
            reason: transition.reason,
            message: transition.message.clone(),
            step: transition.step.map(|step| step + 1),
            left_out: transition.left_out,
            from: transition.from.clone(),
            target: transition.target.clone(),
            by: transition.by.clone(),
        }
    }
}

/// How far a version is from being at rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DrainStatus {
    /// Where it stands.
    pub state: DrainState,
    /// Its requests under way, over the proxies that are there.
    pub in_flight: u64,
    /// Since when it is in this state, RFC 3339; none while it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<jiff::Timestamp>,
    /// What it waits for, or how it ended.
    pub message: String,
}

/// The states of a version's drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DrainState {
    /// It is given requests.
    Serving,
    /// It is given nothing more, and not at rest yet; or no proxy says that it is.
    Draining,
    /// Every proxy gives it nothing, and nothing is in flight.
    Drained,
    /// That was not so when its deadline had passed, and has not been since.
    DeadlineExceeded,
}

/// A rollout's present step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepStatus {
    /// Counted from 1.
    pub number: usize,
    /// How many there are.
    pub of: usize,
    /// The target's share in percent.
    pub weight: u32,
    /// How long it must have it.
    pub hold_seconds: u64,
    /// How long it has had it; none: it does not have it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_seconds: Option<u64>,
}

/// One version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VersionStatus {
    /// Its name.
    pub name: String,
    /// Its share of the requests that no rule takes, in percent.
    pub weight: f64,
    /// The share that proxies were given last, if what was decided since then is not published yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_in_force: Option<f64>,
    /// Whether it can take requests at all.
    pub serving: bool,
    /// Its endpoints.
    pub endpoints: EndpointsStatus,
    /// Its requests over all proxies, since ever.
    pub requests: Counts,
    /// Its requests under way, over the proxies that are there.
    pub in_flight: u64,
    /// How far it is from being at rest.
    pub drain: DrainStatus,
}

/// A version's endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointsStatus {
    /// Can take traffic now.
    pub ready: usize,
    /// Are in the document.
    pub listed: usize,
    /// Those that cannot, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_ready: Vec<NotReady>,
}

/// An endpoint that cannot take traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NotReady {
    /// `host:port`.
    pub endpoint: String,
    /// Why the last probe failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// One proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// Envoy's node id.
    pub id: String,
    /// Names this run of it: one that is started again has another, and so has a second one with the same id.
    #[serde(default)]
    pub start: String,
    /// The revision that all of its workers run; none: its plugin configuration's, or that of a lost state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// How many VMs of the filter it runs.
    pub workers: u32,
    /// When it was last heard of, RFC 3339.
    pub last_seen: jiff::Timestamp,
    /// A policy that it could not take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// The versions that its guard has taken out of service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vetoes: Vec<VetoStatus>,
}

/// A version that a proxy's guard has taken out of service, and the counts that spoke against it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VetoStatus {
    /// The service.
    pub service: String,
    /// The version.
    pub version: String,
    /// When it gets its traffic back, by the proxy's clock, RFC 3339.
    pub until: jiff::Timestamp,
    /// Its requests.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// The requests of the other versions in the same time.
    pub others_requests: u64,
    /// Those that failed.
    pub others_errors: u64,
}

impl VetoStatus {
    /// What a proxy reported.
    pub fn new(service: &str, veto: &Veto) -> Self {
        let until = i128::from(veto.until);
        Self {
            service: service.to_owned(),
            version: veto.version.clone(),
            until: jiff::Timestamp::from_nanosecond(until).unwrap_or(jiff::Timestamp::MAX),
            requests: veto.requests,
            errors: veto.errors,
            others_requests: veto.others_requests,
            others_errors: veto.others_errors,
        }
    }
}

mod table;
