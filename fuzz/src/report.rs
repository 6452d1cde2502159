//! Reports as a controller gets them, one on each line: totals never go back, what is repeated counts once, and the
//! ledger survives being stored.

use crate::ledger::Ledger;
use serde_json::from_slice;
use std::collections::{BTreeMap, BTreeSet};
use tideshift_core::report::{Counts, Report};

/// Takes the reports in turn; each line that is none is one that the controller refuses.
pub fn holds_for(lines: &[u8]) {
    let mut ledger = Ledger::default();
    let mut oracle = Oracle::default();
    for (now, line) in lines.split(|b| *b == b'\n').enumerate() {
        let Ok(report) = from_slice::<Report>(line) else { continue };
        let written = serde_json::to_vec(&report).expect("a report can be written");
        assert_eq!(from_slice::<Report>(&written).ok().as_ref(), Some(&report));
        let before = ledger.clone();
        ledger.take(&report, is_known, now as u64);
        for (service, version) in versions(&report) {
            let (old, new) = (before.total(service, version), ledger.total(service, version));
            assert!(!new.any_below(&old), "{service}/{version}: from {old:?} to {new:?}");
            assert!(is_known(service, version) || new == Counts::default());
            assert!(ledger.unrouted(service) >= before.unrouted(service));
        }
        oracle.take(&report);
        for (version, total) in &oracle.totals {
            assert_eq!(ledger.total(&version.0, &version.1), *total, "{version:?}");
        }
        if says_everything_once(&report) {
            let once = ledger.clone();
            assert!(!ledger.take(&report, is_known, now as u64), "counted twice");
            assert_eq!(ledger, once);
        }
    }
    let stored = serde_json::to_vec(&ledger).expect("a ledger can be stored");
    assert_eq!(from_slice::<Ledger>(&stored).ok(), Some(ledger));
}

/// Totals counted again, one count at a time.
#[derive(Default)]
struct Oracle {
    last: BTreeMap<(String, String, Version), Counts>,
    totals: BTreeMap<Version, Counts>,
}

type Version = (String, String);

impl Oracle {
    fn take(&mut self, report: &Report) {
        for service in &report.services {
            for version in service.versions.iter().filter(|version| is_known(&service.name, &version.name)) {
                let name = (service.name.clone(), version.name.clone());
                let run = (report.proxy.clone(), report.start.clone(), name.clone());
                let Counts { ok, error, client_error, cancelled } = version.ended;
                let last = self.last.insert(run, version.ended).unwrap_or_default();
                let was_reset = ok < last.ok
                    || error < last.error
                    || client_error < last.client_error
                    || cancelled < last.cancelled;
                let last = if was_reset { Counts::default() } else { last };
                let total = self.totals.entry(name).or_default();
                total.ok = total.ok.saturating_add(ok - last.ok);
                total.error = total.error.saturating_add(error - last.error);
                total.client_error = total.client_error.saturating_add(client_error - last.client_error);
                total.cancelled = total.cancelled.saturating_add(cancelled - last.cancelled);
            }
        }
    }
}

fn is_known(_: &str, version: &str) -> bool {
    version != "gone"
}

fn versions(report: &Report) -> impl Iterator<Item = (&str, &str)> {
    report.services.iter().flat_map(|s| s.versions.iter().map(|v| (s.name.as_str(), v.name.as_str())))
}

/// Our own proxies list nothing twice; to what extent a report that does is counted twice is its own affair.
fn says_everything_once(report: &Report) -> bool {
    let mut services = BTreeSet::new();
    let mut seen = BTreeSet::new();
    report.services.iter().all(|service| services.insert(&service.name)) && versions(report).all(|v| seen.insert(v))
}
