//! What the proxies have counted, over all of them. Reports are cumulative for each run of a proxy, so what is new in
//! one is what it has more than the last one: a report that is lost, repeated or late neither loses nor doubles.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::report::{Counts, DURATION_BOUNDS, Report};

/// A service's and a version's name.
pub type VersionKey = (String, String);

/// The most durations that one version's report can have.
const MOST_DURATIONS: usize = DURATION_BOUNDS.len() + 1;

/// All counts. Kept across restarts of the controller.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Over all proxies, those that are gone too.
    #[serde(with = "as_list")]
    totals: BTreeMap<VersionKey, Total>,
    /// Requests that found nothing in service, by service.
    unrouted: BTreeMap<String, u64>,
    /// What each run of a proxy said last, by proxy and start.
    #[serde(with = "as_list")]
    runs: BTreeMap<(String, String), Run>,
}

/// What one run of a proxy said last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Run {
    /// Milliseconds since 1970.
    reported_at: u64,
    #[serde(with = "as_list")]
    counts: BTreeMap<VersionKey, Total>,
    unrouted: BTreeMap<String, u64>,
}

/// What was counted for one version.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Total {
    #[serde(flatten)]
    counts: Counts,
    /// As in [`tideshift_core::report::VersionReport`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    durations: Vec<u64>,
}

/// What is in `all` and was not in `before`, for each duration. All of it if one went back, as reset counters do.
pub fn newer(all: &[u64], before: &[u64]) -> Vec<u64> {
    let before_of = |i: usize| before.get(i).copied().unwrap_or_default();
    let was_reset = all.iter().enumerate().any(|(i, count)| *count < before_of(i)) || before.len() > all.len();
    let new = |(i, count): (usize, &u64)| if was_reset { *count } else { count - before_of(i) };
    all.iter().enumerate().map(new).collect()
}

fn add(sums: &mut Vec<u64>, new: &[u64]) {
    sums.resize(sums.len().max(new.len()), 0);
    sums.iter_mut().zip(new).for_each(|(sum, new)| *sum = sum.saturating_add(*new));
}

impl Ledger {
    /// The most runs that are kept; the ones longest silent go first. A proxy that comes back after that would be
    /// counted twice, which takes that many newer ones.
    const MAX_RUNS: usize = 20_000;

    /// Takes a report's counts, for the versions that `is_known` knows. Returns whether any count changed.
    pub fn take(&mut self, report: &Report, is_known: impl Fn(&str, &str) -> bool, now: u64) -> bool {
        let run = self.runs.entry((report.proxy.clone(), report.start.clone())).or_default();
        run.reported_at = now;
        let mut changed = false;
        for service in &report.services {
            for version in service.versions.iter().filter(|version| is_known(&service.name, &version.name)) {
                let key = (service.name.clone(), version.name.clone());
                let last = run.counts.entry(key.clone()).or_default();
                // Counters go back when somebody resets them; what they have since then is all new.
                let before = if version.ended.any_below(&last.counts) { Counts::default() } else { last.counts };
                let new = version.ended.since(&before);
                changed |= new != Counts::default();
                let durations = version.durations.get(..MOST_DURATIONS).unwrap_or(&version.durations);
                let total = self.totals.entry(key).or_default();
                total.counts += new;
                add(&mut total.durations, &newer(durations, &last.durations));
                *last = Total { counts: version.ended, durations: durations.to_vec() };
            }
            if service.versions.iter().any(|version| is_known(&service.name, &version.name)) {
                let last = run.unrouted.entry(service.name.clone()).or_default();
                let new = if service.unrouted < *last { service.unrouted } else { service.unrouted - *last };
                *last = service.unrouted;
                let total = self.unrouted.entry(service.name.clone()).or_default();
                *total = total.saturating_add(new);
                changed |= new > 0;
            }
        }
        if self.runs.len() > Self::MAX_RUNS {
            let silent = self.runs.iter().min_by_key(|(_, run)| run.reported_at).map(|(key, _)| key.clone());
            silent.map(|key| self.runs.remove(&key));
        }
        changed
    }

    /// A version's counts over all proxies.
    pub fn total(&self, service: &str, version: &str) -> Counts {
        self.totals.get(&(service.to_owned(), version.to_owned())).map_or(Counts::default(), |total| total.counts)
    }

    /// How long a version's exchanges took, over all proxies: as in [`tideshift_core::report::VersionReport`].
    pub fn durations(&self, service: &str, version: &str) -> &[u64] {
        self.totals.get(&(service.to_owned(), version.to_owned())).map_or(&[], |total| &total.durations)
    }

    /// The runs of proxies that have reported since then: proxy and start.
    pub fn reported_since(&self, then: u64) -> impl Iterator<Item = &(String, String)> {
        self.runs.iter().filter(move |(_, run)| run.reported_at >= then).map(|(run, _)| run)
    }

    /// A service's requests that found nothing in service, over all proxies.
    pub fn unrouted(&self, service: &str) -> u64 {
        self.unrouted.get(service).copied().unwrap_or_default()
    }
}

/// Maps with keys that are not strings, as lists of pairs, since JSON has no other way.
pub(crate) mod as_list {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::collections::BTreeMap;

    pub(crate) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    pub(crate) fn deserialize<'de, K, V, D>(from: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(from)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tideshift_core::report::{ServiceReport, VersionReport};

    fn report(start: &str, ok: u64) -> Report {
        let ended = Counts { ok, ..Counts::default() };
        let version = VersionReport { name: "v1".to_owned(), ended, ..VersionReport::default() };
        let service = ServiceReport {
            name: "checkout".to_owned(),
            unrouted: ok / 2,
            versions: vec![version],
            vetoes: Vec::new(),
        };
        Report { proxy: "p".to_owned(), start: start.to_owned(), services: vec![service], ..Report::default() }
    }

    fn known(service: &str, version: &str) -> bool {
        (service, version) == ("checkout", "v1")
    }

    #[test]
    fn every_run_of_a_proxy_counts_from_nothing() {
        let mut ledger = Ledger::default();
        for (start, ok) in [("a", 3), ("a", 5), ("b", 2), ("a", 7), ("b", 2)] {
            ledger.take(&report(start, ok), known, 0);
        }
        assert_eq!(ledger.total("checkout", "v1").ok, 9);
        assert_eq!(ledger.unrouted("checkout"), 4);
    }

    #[test]
    fn a_counter_that_was_reset_counts_on() {
        let mut ledger = Ledger::default();
        for ok in [10, 4, 6] {
            ledger.take(&report("a", ok), known, 0);
        }
        assert_eq!(ledger.total("checkout", "v1").ok, 16);
    }

    #[test]
    fn what_no_document_names_is_not_kept() {
        let mut ledger = Ledger::default();
        assert!(!ledger.take(&report("a", 10), |_, _| false, 0));
        assert_eq!(ledger.total("checkout", "v1"), Counts::default());
    }

    proptest! {
        #[test]
        fn reports_lost_repeated_or_after_a_restart_lose_and_double_nothing(
            steps in prop::collection::vec((0u64..50, 1usize..4, any::<bool>(), any::<bool>()), 1..40)
        ) {
            let mut ledger = Ledger::default();
            let mut stored = ledger.clone();
            let mut ok = 0;
            for (more, times, store, crash) in steps {
                ok += more;
                for _ in 0..times {
                    ledger.take(&report("a", ok), known, 0);
                }
                if store {
                    stored = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
                }
                if crash {
                    ledger = stored.clone();
                }
            }
            ledger.take(&report("a", ok), known, 0);
            prop_assert_eq!(ledger.total("checkout", "v1").ok, ok);
        }
    }
}
