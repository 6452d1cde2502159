//! Reports as a controller gets them, one on each line: totals never go back, what is repeated or older counts once, and
//! the ledger survives being stored.

use crate::ledger::{Ledger, Taken};
use serde_json::from_slice;
use std::collections::{BTreeMap, BTreeSet};
use tideshift_core::counts::{Counts, DURATION_BOUNDS};
use tideshift_core::protocol::report::Report;

/// Takes the reports in turn; each line that is none is one that the controller refuses.
pub fn holds_for(lines: &[u8]) {
    // All reports, and those of which it can be said what they should come to.
    let (mut all, mut ledger) = (Ledger::default(), Ledger::default());
    let mut oracle = Oracle::default();
    for (now, line) in lines.split(|b| *b == b'\n').enumerate() {
        let Ok(report) = from_slice::<Report>(line) else { continue };
        let written = serde_json::to_vec(&report).expect("a report can be written");
        assert_eq!(from_slice::<Report>(&written).ok().as_ref(), Some(&report));
        let run = (report.proxy.clone(), report.start.clone());
        let before = all.clone();
        all.take(&run, &report, is_known, now as u64);
        for (service, version) in versions(&report) {
            let (old, new) = (before.total(service, version), all.total(service, version));
            assert!(!new.any_below(&old), "{service}/{version}: from {old:?} to {new:?}");
            assert!(is_known(service, version) || new == Counts::default());
            assert!(all.unrouted(service) >= before.unrouted(service));
        }
        // The oracle counts as filters did that reported Envoy's counters, which may be reset.
        if !says_everything_once(&report) || report.format >= Report::FORMAT {
            continue;
        }
        let taken = ledger.take(&run, &report, is_known, now as u64);
        assert_eq!(taken != Taken::Old, oracle.take(&report));
        for (service, version) in versions(&report) {
            let Counts { ok, error, client_error, cancelled } = ledger.total(service, version);
            let durations = ledger.durations(service, version);
            for (i, count) in [ok, error, client_error, cancelled].into_iter().chain(durations).enumerate() {
                assert_eq!(count, oracle.total(service, version, i), "{service}/{version}, {i}");
            }
            assert_eq!(ledger.unrouted(service), oracle.total(service, "", UNROUTED), "{service}");
        }
        let once = ledger.clone();
        assert_ne!(ledger.take(&run, &report, is_known, now as u64), Taken::News, "counted twice");
        assert_eq!(ledger, once);
    }
    let stored = serde_json::to_vec(&all).expect("a ledger can be stored");
    assert_eq!(from_slice::<Ledger>(&stored).ok(), Some(all));
}

/// Totals counted again, one count at a time: by service, version (none for what was unrouted) and number.
#[derive(Default)]
struct Oracle {
    last: BTreeMap<(String, String), (u64, BTreeMap<Counter, u64>)>,
    totals: BTreeMap<Counter, u64>,
}

type Counter = (String, String, usize);

const UNROUTED: usize = usize::MAX;

impl Oracle {
    /// Whether it was news.
    fn take(&mut self, report: &Report) -> bool {
        let (sequence, last) = self.last.entry((report.proxy.clone(), report.start.clone())).or_default();
        let (mut counters, mut goes_back) = (BTreeMap::new(), false);
        for service in &report.services {
            let known = || service.versions.iter().filter(|version| is_known(&service.name, &version.name));
            let unrouted = (service.name.clone(), String::new(), UNROUTED);
            goes_back |= service.unrouted < last.get(&unrouted).copied().unwrap_or_default();
            if known().next().is_some() {
                counters.insert(unrouted, service.unrouted);
            }
            for version in known() {
                let Counts { ok, error, client_error, cancelled } = version.ended;
                let durations = version.durations.iter().copied().chain(std::iter::repeat(0));
                let durations = durations.take(DURATION_BOUNDS.len() + 1);
                for (i, count) in [ok, error, client_error, cancelled].into_iter().chain(durations).enumerate() {
                    counters.insert((service.name.clone(), version.name.clone(), i), count);
                }
            }
        }
        goes_back |= counters.iter().any(|(key, count)| last.get(key).is_some_and(|last| count < last));
        if if report.sequence == 0 { goes_back } else { report.sequence <= *sequence } {
            return false;
        }
        if goes_back {
            last.clear();
        }
        *sequence = report.sequence.max(*sequence);
        for (key, count) in counters {
            let total = self.totals.entry(key.clone()).or_default();
            *total = total.saturating_add(count - last.insert(key, count).unwrap_or_default());
        }
        true
    }

    fn total(&self, service: &str, version: &str, i: usize) -> u64 {
        self.totals.get(&(service.to_owned(), version.to_owned(), i)).copied().unwrap_or_default()
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
