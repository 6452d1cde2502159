//! How things stand, as `GET /v1/status` says it and `tideshift status` shows it.

use crate::rollout::Phase;
use serde::{Deserialize, Serialize};
use tideshift_core::guard::Veto;
use tideshift_core::report::{Counts, Refused};

/// The answer to `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Names the controller's state.
    pub epoch: String,
    /// The revision of the policy that proxies are given; 0 before the first.
    pub revision: u64,
    /// What is wrong with the documents as they are now; what they said before stays in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub document_errors: Vec<String>,
    /// The services, by name.
    pub services: Vec<ServiceStatus>,
    /// The proxies, by id.
    pub proxies: Vec<ProxyStatus>,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Where its rollout stands.
    pub phase: Phase,
    /// The version that serves what the target does not.
    pub stable: String,
    /// The version to move to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The step that the rollout is at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<StepStatus>,
    /// Why it is in this phase.
    pub message: String,
    /// Since when, RFC 3339.
    pub since: jiff::Timestamp,
    /// Requests that found no version in service.
    pub unrouted: u64,
    /// The versions, in the document's order.
    pub versions: Vec<VersionStatus>,
}

/// A rollout's present step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionStatus {
    /// Its name.
    pub name: String,
    /// Its share of the requests that no rule takes, in percent.
    pub weight: f64,
    /// Whether it can take requests at all.
    pub serving: bool,
    /// Its endpoints.
    pub endpoints: EndpointsStatus,
    /// Its requests over all proxies, since ever.
    pub requests: Counts,
    /// Its requests under way, over the proxies that are there.
    pub in_flight: u64,
}

/// A version's endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NotReady {
    /// `host:port`.
    pub endpoint: String,
    /// Why the last probe failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// One proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// Envoy's node id.
    pub id: String,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
