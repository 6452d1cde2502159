//! The readiness table: which endpoints can take traffic now. Probes keep it up to date, and other modules subscribe to
//! it. It does not compute weights from readiness.

pub mod probe;
mod prober;
pub mod table;
pub mod warm_up;
mod worker;

pub use prober::Prober;

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tideshift_core::shift::Endpoint;

/// The endpoints' readiness at one moment: service → version → endpoints, in the order of the documents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Readiness {
    /// All services, with all versions in their documents, including those without endpoints.
    pub services: BTreeMap<String, BTreeMap<String, Vec<EndpointState>>>,
    /// What a cluster reports in addition to the usable endpoints; empty outside Kubernetes.
    pub outlook: Arc<DiscoveryInfo>,
}

/// What a cluster reports in addition to the endpoints that can take traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiscoveryInfo {
    /// The services whose endpoints cannot all be discovered, and why: their weights stay as they are.
    pub unseen: BTreeMap<String, String>,
    /// The endpoints that exist but cannot take traffic, by service and version.
    pub held_back: BTreeMap<(String, String), Vec<ExcludedEndpoint>>,
    /// Why a version is not scaled: it shares a pod with another one; by service and version.
    pub shared: BTreeMap<(String, String), String>,
}

/// An endpoint that cannot take traffic according to its cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExcludedEndpoint {
    /// `host:port`, or the pod's name if it has no address.
    pub endpoint: String,
    /// Why it cannot take traffic.
    pub reason: String,
}

/// The readiness of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointState {
    /// The endpoint's address.
    pub endpoint: Endpoint,
    /// Whether it can take traffic.
    pub ready: bool,
    /// Whether `ready` has a basis: a first result, a remembered state, no probe at all, or that the endpoint was added
    /// to a service that is already watched (it is new then, so not ready).
    pub known: bool,
    /// Whether its first attempt of warm-up requests is running.
    pub warming: bool,
    /// Why the latest probe failed, or how far the warm-up is; `None` if neither applies, or before the first probe.
    pub reason: Option<String>,
}

/// The endpoints that were ready, for a controller that restarts: service → version → endpoints (`host:port`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RememberedReadiness(pub BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Readiness {
    /// The endpoints of a version; empty if there is no such version.
    pub fn endpoints(&self, service: &str, version: &str) -> &[EndpointState] {
        self.services.get(service).and_then(|versions| versions.get(version)).map_or(&[], Vec::as_slice)
    }

    /// How many endpoints of a version can take traffic.
    pub fn ready(&self, service: &str, version: &str) -> usize {
        self.endpoints(service, version).iter().filter(|endpoint| endpoint.ready).count()
    }

    /// How many endpoints a version has.
    pub fn listed(&self, service: &str, version: &str) -> usize {
        self.endpoints(service, version).len()
    }

    /// The endpoints of a version that cannot take traffic according to their cluster.
    pub fn held_back(&self, service: &str, version: &str) -> &[ExcludedEndpoint] {
        let held_back = self.outlook.held_back.get(&(service.to_owned(), version.to_owned()));
        held_back.map_or(&[], Vec::as_slice)
    }

    /// Whether the readiness of all of a service's endpoints is known; `false` for an unknown service.
    pub fn is_known(&self, service: &str) -> bool {
        let versions = self.services.get(service).filter(|_| !self.outlook.unseen.contains_key(service));
        versions.is_some_and(|versions| versions.values().flatten().all(|endpoint| endpoint.known))
    }

    /// The services that differ from `before`.
    pub fn differs_from(&self, before: &Self) -> BTreeSet<String> {
        let names: BTreeSet<&String> = self.services.keys().chain(before.services.keys()).collect();
        let (own, other) = (&self.outlook.unseen, &before.outlook.unseen);
        let is_same_outlook = Arc::ptr_eq(&self.outlook, &before.outlook) || own == other;
        let is_other = |name: &&String| {
            let is_same = self.services.get(*name) == before.services.get(*name);
            !(is_same && (is_same_outlook || own.get(*name) == other.get(*name)))
        };
        names.into_iter().filter(is_other).cloned().collect()
    }

    /// Updates what a controller remembers for its next start, for the services that have changed. Returns whether that
    /// differs from before.
    pub fn remember(&self, remembered: &mut RememberedReadiness, changed: &BTreeSet<String>) -> bool {
        let ready = |endpoints: &Vec<EndpointState>| {
            let ready = endpoints.iter().filter(|endpoint| endpoint.ready);
            ready.map(|endpoint| endpoint.endpoint.to_string()).collect()
        };
        let number = remembered.0.len();
        remembered.0.retain(|name, _| self.services.contains_key(name));
        let mut is_other = remembered.0.len() != number;
        for (name, versions) in changed.iter().filter_map(|name| self.services.get_key_value(name)) {
            let now = versions.iter().map(|(name, endpoints)| (name.clone(), ready(endpoints))).collect();
            let before = remembered.0.insert(name.clone(), now);
            is_other |= before.as_ref() != remembered.0.get(name);
        }
        is_other
    }

    /// Whether another version has an endpoint that can take traffic.
    fn has_other(&self, service: &str, version: &str) -> bool {
        let versions = self.services.get(service).into_iter().flatten();
        let others = versions.filter(|(name, _)| *name != version);
        others.flat_map(|(_, endpoints)| endpoints).any(|endpoint| endpoint.ready)
    }

    /// Whether an endpoint of a version in its warm-up need not wait for the others: one is ready, or none is in its
    /// first attempt.
    fn waits_for_none(&self, service: &str, version: &str) -> bool {
        let endpoints = self.endpoints(service, version);
        endpoints.iter().any(|endpoint| endpoint.ready) || !endpoints.iter().any(|endpoint| endpoint.warming)
    }

    fn find(&self, service: &str, version: &str, endpoint: &Endpoint) -> Option<&EndpointState> {
        self.endpoints(service, version).iter().find(|state| state.endpoint == *endpoint)
    }

    fn find_mut(&mut self, service: &str, version: &str, endpoint: &Endpoint) -> Option<&mut EndpointState> {
        let endpoints = self.services.get_mut(service)?.get_mut(version)?;
        endpoints.iter_mut().find(|state| state.endpoint == *endpoint)
    }
}

impl RememberedReadiness {
    fn has(&self, service: &str, version: &str, endpoint: &Endpoint) -> bool {
        let endpoints = self.0.get(service).and_then(|versions| versions.get(version));
        endpoints.is_some_and(|endpoints| endpoints.contains(&endpoint.to_string()))
    }
}
