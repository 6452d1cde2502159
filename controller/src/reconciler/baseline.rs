//! The rolling baseline of each version, whether it is being rolled out or not. Targets are compared with it.

use crate::reconciler::analysis::{Cursor, sample};
use crate::reconciler::ledger::Ledger;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::shift::ShiftService;
use tideshift_core::verdict::RollingBaseline;

/// By service and version. Persisted across restarts of the controller, together with the counts that it derives from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Baselines(BTreeMap<String, BTreeMap<String, OfVersion>>);

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct OfVersion {
    lately: RollingBaseline,
    /// The counts that have been taken already.
    taken: Cursor,
}

impl Baselines {
    /// A version's rolling baseline; empty if it is not known.
    pub(super) fn of(&self, service: &str, version: &str) -> RollingBaseline {
        let of_version = self.0.get(service).and_then(|versions| versions.get(version));
        of_version.map(|of| of.lately.clone()).unwrap_or_default()
    }

    /// Removes services that no longer exist.
    pub(super) fn retain(&mut self, is_known: impl Fn(&String) -> bool) {
        self.0.retain(|name, _| is_known(name));
    }

    /// Takes the new counts of all versions of these services, and removes versions that no longer exist. Returns
    /// whether there were new counts.
    pub(super) fn look<'s>(&mut self, services: impl IntoIterator<Item = &'s ShiftService>, ledger: &Ledger) -> bool {
        let mut changed = false;
        // State without baselines starts from all counts ever made; …
        let is_first = self.0.is_empty();
        for service in services {
            let of_service = self.0.entry(service.name.clone()).or_default();
            of_service.retain(|version, _| service.version(version).is_some());
            for version in &service.versions {
                let of_version = of_service.entry(version.name.clone()).or_insert_with(|| match is_first {
                    true => OfVersion::default(),
                    // … but a version that comes back does not inherit its counts from before it was removed.
                    false => {
                        OfVersion { taken: Cursor::now(ledger, &service.name, &version.name), ..Default::default() }
                    }
                });
                if of_version.taken.is_behind(ledger, &service.name, &version.name) {
                    let new = of_version.taken.take(ledger, &service.name, &version.name).without_rules();
                    of_version.lately.add(&sample(new));
                    changed = true;
                }
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tideshift_core::shift::TrafficShift;

    fn services(versions: &[&str]) -> Vec<ShiftService> {
        let version = |name: &&str| json!({"name": name, "endpoints": ["127.0.0.1:1"]});
        let spec = json!({"versions": versions.iter().map(version).collect::<Vec<_>>(), "stable": versions[0]});
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "shop"}, "spec": spec,
        });
        TrafficShift::read(&document).unwrap().services
    }

    fn report(ok: u64, errors: u64) -> tideshift_core::protocol::report::Report {
        let version = json!({"name": "v1", "ok": ok, "error": errors, "clientError": 0, "cancelled": 0});
        serde_json::from_value(json!({
            "proxy": "p", "start": "1", "revision": 1, "services": [{"name": "shop", "versions": [version]}],
        }))
        .unwrap()
    }

    fn run() -> (String, String) {
        ("p".to_owned(), "1".to_owned())
    }

    fn known(recent: &Baselines) -> (u64, u64) {
        let sample = recent.of("shop", "v1").sample();
        (sample.requests, sample.errors)
    }

    #[test]
    fn what_was_long_ago_is_forgotten_and_a_restart_changes_nothing() {
        let (mut ledger, mut recent, services) = (Ledger::default(), Baselines::default(), services(&["v1", "v2"]));
        let mut count = |recent: &mut Baselines, ok, errors| {
            ledger.take(&run(), &report(ok, errors), |_, _| true, 0);
            recent.look(&services, &ledger);
            let json = serde_json::to_string(recent).unwrap();
            assert_eq!(serde_json::from_str::<Baselines>(&json).unwrap(), *recent);
            recent.look(&services, &ledger);
            known(recent)
        };
        assert_eq!(count(&mut recent, 100_000, 50_000), (150_000, 50_000));
        assert_eq!(count(&mut recent, 104_000, 50_000), (154_000, 50_000));
        assert_eq!(count(&mut recent, 105_000, 50_001), (5_001, 1));
        assert_eq!(count(&mut recent, 109_000, 50_002), (9_002, 2));
        assert_eq!(count(&mut recent, 110_000, 50_002), (5_001, 1));
    }

    #[test]
    fn who_comes_back_begins_anew() {
        let (mut ledger, mut recent) = (Ledger::default(), Baselines::default());
        ledger.take(&run(), &report(100, 0), |_, _| true, 0);
        recent.look(&services(&["v1", "v2"]), &ledger);
        assert_eq!(known(&recent), (100, 0));
        recent.look(&services(&["v2"]), &ledger);
        recent.look(&services(&["v1", "v2"]), &ledger);
        assert_eq!(known(&recent), (0, 0));
        ledger.take(&run(), &report(103, 1), |_, _| true, 0);
        recent.look(&services(&["v1", "v2"]), &ledger);
        assert_eq!(known(&recent), (4, 1));
    }
}
