//! What the controller should hear of at once, instead of in the next report of each second: bad requests of the versions
//! that have the smaller part of the weight, which may be a rollout's target, and the end of what is in flight of the
//! versions that are given nothing more.

use tideshift_core::plan::Chosen;
use tideshift_core::policy::Policy;
use tideshift_core::report::Counts;
use tideshift_core::tallies::Tallies;

/// What was last reported of it, and what there is now, are compared.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub struct Pulse {
    bad: u64,
    draining: u64,
}

impl Pulse {
    /// The pulse of now.
    pub fn feel(policy: &Policy, totals: &Tallies) -> Self {
        let mut pulse = Self::default();
        for service in &policy.services {
            let Some(of_service) = totals.service(&service.name) else { continue };
            let all: u64 = service.versions.iter().map(|version| u64::from(version.weight)).sum();
            for version in &service.versions {
                let Some(of) = of_service.version(&version.name) else { continue };
                let weight = u64::from(version.weight);
                if weight == 0 {
                    pulse.draining = pulse.draining.saturating_add(of.in_flight);
                }
                if 2 * weight <= all {
                    let Counts { error, cancelled, client_error, .. } = of.ended(&Chosen::ALL);
                    pulse.bad = [error, cancelled, client_error].into_iter().fold(pulse.bad, u64::saturating_add);
                }
            }
        }
        pulse
    }
}
