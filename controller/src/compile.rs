//! From a TrafficShift to what a proxy runs: its service, with the weights and the readiness of the moment put in.

use tideshift_core::policy::{Service, Version};
use tideshift_core::shift::TrafficShift;

/// The service that proxies run for a TrafficShift. `state` gives for each version's name its weight, 0 to
/// [`tideshift_core::policy::MAX_WEIGHT`] relative to the sum, and whether it may get requests at all.
pub fn service(shift: &TrafficShift, state: impl Fn(&str) -> (u32, bool)) -> Service {
    let version = |name: &String| {
        let (weight, serving) = state(name);
        Version { name: name.clone(), weight, serving, cluster: None }
    };
    Service {
        name: shift.name.clone(),
        hostnames: shift.hostnames.clone(),
        versions: shift.versions.iter().map(|v| version(&v.name)).collect(),
        rules: shift.rules.clone(),
        session: shift.session.clone(),
        errors: shift.errors.clone(),
        mirror: shift.mirror.clone(),
        guard: shift.guard.clone(),
    }
}

/// The weight of a version when no rollout is under way: 100 for the stable one, 0 for the others.
pub fn weight_at_rest(shift: &TrafficShift, version: &str) -> u32 {
    if version == shift.stable { 100 } else { 0 }
}

/// The service before anything is known of readiness: the stable version gets everything, and rules lead only to
/// versions that have endpoints.
pub fn service_at_rest(shift: &TrafficShift) -> Service {
    service(shift, |name| {
        let has_endpoints = shift.version(name).is_some_and(|version| !version.endpoints.is_empty());
        (weight_at_rest(shift, name), has_endpoints || name == shift.stable)
    })
}
