//! What the controller should hear of at once, instead of in the next report of each second: errors of the versions
//! that have the smaller part of the weight, which may be a rollout's target, and the end of what is in flight of the
//! versions that are given nothing more.

use crate::root::InForce;
use tideshift_core::policy::Policy;

/// What was last reported of it, and what there is now, are compared.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub struct Pulse {
    errors: u64,
    draining: u64,
}

impl Pulse {
    /// The pulse of now.
    pub fn feel(policy: &Policy, in_force: &InForce) -> Self {
        let mut pulse = Self::default();
        for (service, counters) in policy.services.iter().zip(&in_force.counters) {
            let all: u64 = service.versions.iter().map(|version| u64::from(version.weight)).sum();
            for (version, counters) in service.versions.iter().zip(&counters.versions) {
                let weight = u64::from(version.weight);
                if weight == 0 {
                    pulse.draining = pulse.draining.saturating_add(counters.in_flight());
                }
                if 2 * weight <= all {
                    pulse.errors = pulse.errors.saturating_add(counters.errors());
                }
            }
        }
        pulse
    }
}
