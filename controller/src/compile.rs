//! From a TrafficShift to what a proxy runs: its services, with the weights and the readiness of the moment put in.

use tideshift_core::matching::Match;
use tideshift_core::protocol::policy::{Rule, Service, Version, WeightedVersion};
use tideshift_core::shift::{ShiftService, TrafficShift};

/// What proxies run for a service of a TrafficShift. `state` gives for each version's name its weight, 0 to
/// [`tideshift_core::limits::MAX_WEIGHT`] relative to the sum, and whether it may get requests at all.
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

/// The rule that leads some requests to a version whatever its share is, while a rollout has such a step.
pub fn testers(version: &str, matches: Vec<Match>) -> Rule {
    let versions = vec![WeightedVersion { name: version.to_owned(), weight: 1 }];
    Rule { name: Some("testers of the rollout".to_owned()), matches, versions, mirror: None }
}

/// Puts a rule that no document has before those of a service. No two rules of a service have the same name, and the
/// document's may have any: this one gets another name where its own is taken.
pub fn put_first(service: &mut Service, mut rule: Rule) {
    if let Some(name) = &rule.name {
        let is_free = |name: &String| service.rules.iter().all(|rule| rule.name.as_ref() != Some(name));
        let names = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name} ({n})")));
        rule.name = names.into_iter().find(is_free);
    }
    service.rules.insert(0, rule);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tideshift_core::protocol::policy::Policy;

    #[test]
    fn a_generated_rule_has_a_name_that_no_rule_of_the_document_has() {
        let named = |name: &str| json!({"name": name, "versions": [{"name": "v1"}]});
        let rules = [named("testers of the rollout"), named("testers of the rollout (2)")];
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "shop"},
            "spec": {"versions": [{"name": "v1"}], "stable": "v1", "rules": rules},
        });
        let shift = TrafficShift::read(&document).unwrap();
        let mut service = at_rest(&shift).next().unwrap();
        put_first(&mut service, testers("v1", Vec::new()));
        let name = service.rules[0].name.clone();
        assert_eq!(name.as_deref(), Some("testers of the rollout (3)"));
        let policy = Policy { revision: 1, services: vec![service], ..Policy::default() };
        Policy::read(&serde_json::to_value(&policy).unwrap()).unwrap();
    }
}
