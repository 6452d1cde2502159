//! A TrafficShift as JSON: it is read or refused, and what is read keeps the promises of its type.

use serde_json::Value;
use tideshift_core::shift::{Endpoint, TrafficShift};

/// Reads `json`.
pub fn holds_for(json: &[u8]) {
    let Ok(document) = serde_json::from_slice::<Value>(json) else { return };
    let shift = match TrafficShift::read(&document) {
        Ok(shift) => shift,
        Err(errors) => {
            assert!(!errors.0.is_empty() && !errors.to_string().is_empty(), "refused without a reason");
            return;
        }
    };
    let steps = &shift.strategy.steps;
    assert!(steps.iter().all(|step| step.weight <= 100) && steps.last().is_some_and(|last| last.weight == 100));
    assert!(!shift.services.is_empty());
    for service in &shift.services {
        let named = [Some(&shift.stable), shift.target.as_ref()].into_iter().flatten();
        let by_rules = service.rules.iter().flat_map(|rule| &rule.versions).map(|version| &version.name);
        for name in named.chain(by_rules) {
            assert!(service.version(name).is_some(), "{name} is none of the versions");
        }
    }
    if let Some(requests) = &shift.strategy.warm_up.requests {
        assert!(requests.count >= 1 && requests.failures_borne() < requests.count, "nothing would have to pass");
        assert!((1..=100).contains(&requests.concurrency) && !requests.paths.is_empty());
        assert!((100..=599).any(|status| requests.passes(status)));
    }
    for version in shift.services.iter().flat_map(|service| &service.versions) {
        for endpoint in &version.endpoints {
            let text = endpoint.to_string();
            assert_eq!(Endpoint::parse(&text).as_ref(), Some(endpoint), "{text}");
        }
        let probe = version.readiness_probe.as_ref();
        assert!(probe.is_none_or(|probe| !probe.period.is_zero() && !probe.timeout.is_zero()));
        assert!(probe.is_none_or(|probe| probe.comeback_period() <= probe.period));
    }
}
