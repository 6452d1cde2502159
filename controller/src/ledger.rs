//! What the proxies have counted, over all of them. Reports are cumulative for each run of a proxy and numbered, so what
//! is new in one is what it has more than the last one, and one that is older than that is left out: reports that are
//! lost, repeated or held up on their way neither lose nor double anything.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::report::{Counts, DURATION_BOUNDS, Report, VersionReport};

/// A service's and a version's name.
pub type VersionKey = (String, String);

/// A run of a proxy: its id and its start. (Two proxies may share an id by mistake.)
pub type RunKey = (String, String);

/// How exactly it is noted when a run was heard of, in milliseconds.
const NOTED: u64 = 20_000;

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
    runs: BTreeMap<RunKey, Run>,
}

/// What a report was worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Its run has said something newer before: nothing of it holds any more.
    Old,
    /// It counts what was counted already.
    NoNews,
    /// There is something new to be kept.
    News,
}

/// What one run of a proxy said last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Run {
    /// When that was, in milliseconds since 1970, to within [`NOTED`].
    reported_at: u64,
    /// The number of its last report; 0 if it does not number them.
    #[serde(default)]
    sequence: u64,
    /// A list, since a map of two entries is many times as large, and there are thousands of runs.
    counts: Vec<(VersionKey, Total)>,
    /// Those services that have any.
    unrouted: BTreeMap<String, u64>,
}

impl Run {
    /// Whether a report says less than the last one did.
    fn goes_back(&self, report: &Report) -> bool {
        report.services.iter().any(|service| {
            let before = |version: &VersionReport| {
                self.counts.iter().find(|((of, name), _)| *of == service.name && *name == version.name)
            };
            let goes_back = |version: &VersionReport| {
                before(version).is_some_and(|(_, last)| {
                    let durations = version.durations.iter().chain(std::iter::repeat(&0));
                    let less = last.durations.iter().zip(durations).any(|(last, now)| now < last);
                    less || version.ended.any_below(&last.counts)
                })
            };
            service.unrouted < self.unrouted(&service.name) || service.versions.iter().any(goes_back)
        })
    }

    fn unrouted(&self, service: &str) -> u64 {
        self.unrouted.get(service).copied().unwrap_or_default()
    }

    /// What it said last of a version.
    fn last(&mut self, service: &str, version: &str) -> &mut Total {
        let at = self.counts.iter().position(|((of, name), _)| of == service && name == version);
        let at = at.unwrap_or_else(|| {
            self.counts.push(((service.to_owned(), version.to_owned()), Total::default()));
            self.counts.len() - 1
        });
        &mut self.counts[at].1
    }
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

/// What is in `all` and was not in `before`, for each duration.
pub fn since(all: &[u64], before: &[u64]) -> Vec<u64> {
    let before = before.iter().chain(std::iter::repeat(&0));
    all.iter().zip(before).map(|(all, before)| all.saturating_sub(*before)).collect()
}

fn add(sums: &mut Vec<u64>, new: &[u64]) {
    sums.resize(sums.len().max(new.len()), 0);
    sums.iter_mut().zip(new).for_each(|(sum, new)| *sum = sum.saturating_add(*new));
}

impl Ledger {
    /// The most runs that are kept; the ones longest silent go first. A proxy that comes back after that would be
    /// counted twice, which takes that many newer ones.
    const MAX_RUNS: usize = 20_000;

    /// Takes a report's counts, for the versions that `is_known` knows.
    pub fn take(&mut self, key: &RunKey, report: &Report, is_known: impl Fn(&str, &str) -> bool, now: u64) -> Taken {
        let run = match self.runs.get_mut(key) {
            Some(run) => run,
            None => self.runs.entry(key.clone()).or_default(),
        };
        let goes_back = run.goes_back(report);
        let is_old = match report.sequence {
            0 => goes_back,
            sequence => sequence <= run.sequence,
        };
        if is_old {
            return Taken::Old;
        }
        if goes_back {
            // Somebody has reset the proxy's counters (Envoy's `/reset_counters`): what they have since then is all new.
            run.counts.clear();
            run.unrouted.clear();
        }
        run.sequence = run.sequence.max(report.sequence);
        // In step with all others, so that it is not written down all the time only for that.
        let mut changed = run.reported_at / NOTED != now / NOTED;
        if changed {
            run.reported_at = now;
        }
        for service in &report.services {
            let known = || service.versions.iter().filter(|version| is_known(&service.name, &version.name));
            for version in known() {
                let last = run.last(&service.name, &version.name);
                let durations = version.durations.get(..MOST_DURATIONS).unwrap_or(&version.durations);
                let new = version.ended.since(&last.counts);
                if new != Counts::default() || last.durations != durations {
                    let total = self.totals.entry((service.name.clone(), version.name.clone())).or_default();
                    total.counts += new;
                    add(&mut total.durations, &since(durations, &last.durations));
                    *last = Total { counts: version.ended, durations: durations.to_vec() };
                    changed = true;
                }
            }
            if service.unrouted > run.unrouted(&service.name) && known().next().is_some() {
                let new = service.unrouted - run.unrouted(&service.name);
                run.unrouted.insert(service.name.clone(), service.unrouted);
                let total = self.unrouted.entry(service.name.clone()).or_default();
                *total = total.saturating_add(new);
                changed = true;
            }
        }
        if self.runs.len() > Self::MAX_RUNS {
            let silent = self.runs.iter().min_by_key(|(_, run)| run.reported_at).map(|(key, _)| key.clone());
            silent.map(|key| self.runs.remove(&key));
        }
        if changed { Taken::News } else { Taken::NoNews }
    }

    /// A version's counts over all proxies.
    pub fn total(&self, service: &str, version: &str) -> Counts {
        self.totals.get(&(service.to_owned(), version.to_owned())).map_or(Counts::default(), |total| total.counts)
    }

    /// How long a version's exchanges took, over all proxies: as in [`tideshift_core::report::VersionReport`].
    pub fn durations(&self, service: &str, version: &str) -> &[u64] {
        self.totals.get(&(service.to_owned(), version.to_owned())).map_or(&[], |total| &total.durations)
    }

    /// The runs that were heard of until the last report of all, or shortly before: those of the proxies that were there
    /// when this was written down, and when each was heard of.
    pub fn heard_of_last(&self, shortly: u64) -> impl Iterator<Item = (&RunKey, u64)> {
        let last = self.runs.values().map(|run| run.reported_at).max().unwrap_or_default();
        let were_there = self.runs.iter().filter(move |(_, run)| run.reported_at + NOTED + shortly >= last);
        were_there.map(|(key, run)| (key, run.reported_at))
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

    fn take(ledger: &mut Ledger, report: &Report) -> Taken {
        ledger.take(&(report.proxy.clone(), report.start.clone()), report, known, 0)
    }

    #[test]
    fn every_run_of_a_proxy_counts_from_nothing() {
        let mut ledger = Ledger::default();
        for (start, ok) in [("a", 3), ("a", 5), ("b", 2), ("a", 7), ("b", 2)] {
            take(&mut ledger, &report(start, ok));
        }
        assert_eq!(ledger.total("checkout", "v1").ok, 9);
        assert_eq!(ledger.unrouted("checkout"), 4);
    }

    #[test]
    fn a_counter_that_was_reset_counts_on() {
        let mut ledger = Ledger::default();
        for (sequence, ok) in [(1, 10), (2, 4), (1, 10), (2, 4), (3, 6)] {
            take(&mut ledger, &Report { sequence, ..report("a", ok) });
        }
        assert_eq!((ledger.total("checkout", "v1").ok, ledger.unrouted("checkout")), (16, 8));
    }

    #[test]
    fn a_report_without_a_number_that_says_less_is_an_old_one() {
        let mut ledger = Ledger::default();
        let taken = [10, 4, 10, 12].map(|ok| take(&mut ledger, &report("a", ok)));
        assert_eq!(taken, [Taken::News, Taken::Old, Taken::NoNews, Taken::News]);
        assert_eq!(ledger.total("checkout", "v1").ok, 12);
        // The filter was replaced by one that numbers its reports, and that by the older one again.
        let numbered = Report { sequence: 1, ..report("a", 14) };
        assert_eq!([take(&mut ledger, &numbered), take(&mut ledger, &numbered)], [Taken::News, Taken::Old]);
        assert_eq!(take(&mut ledger, &report("a", 15)), Taken::News);
        assert_eq!(ledger.total("checkout", "v1").ok, 15);
    }

    #[test]
    fn what_no_document_names_is_not_kept() {
        let mut ledger = Ledger::default();
        ledger.take(&("p".to_owned(), "a".to_owned()), &report("a", 10), |_, _| false, 0);
        assert_eq!(ledger.total("checkout", "v1"), Counts::default());
    }

    proptest! {
        /// Each step: so many more requests, how many of the reports so far may yet arrive and which of them does how
        /// often, whether the counts are written down, and whether the controller is killed then.
        #[test]
        fn reports_lost_repeated_in_any_order_or_after_a_crash_lose_and_double_nothing(
            numbered in any::<bool>(),
            steps in prop::collection::vec(
                (0u64..50, 0usize..6, 0usize..4, any::<bool>(), prop::bool::weighted(0.2)), 1..60
            )
        ) {
            let mut ledger = Ledger::default();
            let mut stored = ledger.clone();
            let mut sent: Vec<Report> = Vec::new();
            let mut ok = 0;
            for (more, back, times, store, crash) in steps {
                ok += more;
                let sequence = if numbered { sent.len() as u64 + 1 } else { 0 };
                let mut report = report("a", ok);
                report.services[0].versions[0].durations = vec![ok / 2, ok - ok / 2];
                sent.push(Report { sequence, ..report });
                for i in 0..times {
                    let late = &sent[sent.len().saturating_sub(1 + back * i)];
                    take(&mut ledger, late);
                }
                if store {
                    stored = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
                }
                if crash {
                    ledger = stored.clone();
                }
                prop_assert!(ledger.total("checkout", "v1").ok <= ok);
            }
            take(&mut ledger, sent.last().unwrap());
            prop_assert_eq!(ledger.total("checkout", "v1").ok, ok);
            prop_assert_eq!(ledger.durations("checkout", "v1").iter().sum::<u64>(), ok);
            prop_assert_eq!(ledger.unrouted("checkout"), ok / 2);
        }
    }
}
