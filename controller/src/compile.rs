//! From a TrafficShift to what a proxy runs: its services, with the weights and the readiness of the moment put in.

use tideshift_core::policy::{Service, Version};
use tideshift_core::shift::{ShiftService, TrafficShift};

/// What proxies run for a service of a TrafficShift. `state` gives for each version's name its weight, 0 to
/// [`tideshift_core::policy::MAX_WEIGHT`] relative to the sum, and whether it may get requests at all.
pub fn service(service: &ShiftService, state: impl Fn(&str) -> (u32, bool)) -> Service {
    let version = |name: &String| {
        let (weight, serving) = state(name);
        Version { name: name.clone(), weight, serving, cluster: None }
    };
    Service {
        name: service.name.clone(),
        hostnames: service.hostnames.clone(),
        stable: None,
        step: 0,
        versions: service.versions.iter().map(|v| version(&v.name)).collect(),
        rules: service.rules.clone(),
        session: service.session.clone(),
        errors: service.errors.clone(),
        mirror: service.mirror.clone(),
        guard: service.guard.clone(),
    }
}

/// The weight of a version when no rollout is under way: 100 for the stable one, 0 for the others.
pub fn weight_at_rest(stable: &str, version: &str) -> u32 {
    if version == stable { 100 } else { 0 }
}

/// A service before anything is known of readiness: the stable version gets everything, and rules lead only to
/// versions that have endpoints.
pub fn service_at_rest(of: &ShiftService, stable: &str) -> Service {
    let at_rest = service(of, |name| {
        let has_endpoints = of.version(name).is_some_and(|version| !version.endpoints.is_empty());
        (weight_at_rest(stable, name), has_endpoints || name == stable)
    });
    Service { stable: Some(stable.to_owned()), ..at_rest }
}

/// All services of a shift before anything is known of readiness.
pub fn at_rest(shift: &TrafficShift) -> impl Iterator<Item = Service> {
    shift.services.iter().map(|service| service_at_rest(service, &shift.stable))
}
