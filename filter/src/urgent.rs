//! The counts that are reported at once instead of in the next report of each second: failed requests of the versions that
//! have the smaller part of the weight, which may be a rollout's target, and the requests in flight of the versions that
//! get no more.

use tideshift_core::choice::plan::Chosen;
use tideshift_core::counting::tallies::Tallies;
use tideshift_core::counts::Counts;
use tideshift_core::protocol::policy::Policy;

/// To be compared with what was reported last.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub struct UrgentCounts {
    bad: u64,
    draining: u64,
}

impl UrgentCounts {
    /// Reads them from what all VMs have counted.
    pub fn read(policy: &Policy, totals: &Tallies) -> Self {
        let mut counts = Self::default();
        for service in &policy.services {
            let Some(of_service) = totals.service(&service.name) else { continue };
            let all: u64 = service.versions.iter().map(|version| u64::from(version.weight)).sum();
            for version in &service.versions {
                let Some(of) = of_service.version(&version.name) else { continue };
                let weight = u64::from(version.weight);
                if weight == 0 {
                    counts.draining = counts.draining.saturating_add(of.in_flight);
                }
                if 2 * weight <= all {
                    let Counts { error, cancelled, client_error, .. } = of.ended(&Chosen::ALL);
                    counts.bad = [error, cancelled, client_error].into_iter().fold(counts.bad, u64::saturating_add);
                }
            }
        }
        counts
    }
}
