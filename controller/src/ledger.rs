//! What the proxies have counted, over all of them. Reports are cumulative for each run of a proxy and numbered, so what
//! is new in one is what it has more than the last one, and one that is older than that is left out: reports that are
//! lost, repeated or held up on their way neither lose nor double anything.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::report::{Counts, DURATION_BOUNDS, Report, Tally, VersionReport};

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
    /// Since when it has been kept, in milliseconds since 1970; 0: for longer than any proxy runs.
    #[serde(default)]
    since: u64,
    /// Over all proxies, those that are gone too.
    #[serde(with = "as_list")]
    totals: BTreeMap<VersionKey, Total>,
    /// What of it no verdict may be made of: proxies had counted it before the ledger began.
    #[serde(default, with = "as_list")]
    before: BTreeMap<VersionKey, Total>,
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
            let goes_back = |version: &VersionReport| {
                let known = self.counts.iter().find(|((of, name), _)| *of == service.name && *name == version.name);
                known.is_some_and(|(_, last)| Total::of(version, report.format).any_below(last))
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
#[serde(from = "KeptTotal", into = "KeptTotal")]
pub struct Total {
    /// Requests whose version was dealt by weight.
    pub dealt: Tally,
    /// Requests whose version was the user's by a session, and those that a rule took; few versions have any.
    others: Option<Box<[Tally; 2]>>,
    /// Requests that did not reach the version.
    pub misrouted: u64,
}

/// [`Total`] as it is written. Before format 4 there were only sums.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptTotal {
    #[serde(flatten)]
    counts: Option<Counts>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    durations: Vec<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dealt: Option<Tally>,
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    session: Tally,
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    rule: Tally,
    #[serde(default)]
    misrouted: u64,
}

impl From<KeptTotal> for Total {
    fn from(kept: KeptTotal) -> Self {
        let KeptTotal { counts, durations, dealt, session, rule, misrouted } = kept;
        // How requests were chosen was not told; they count as dealt.
        let dealt = dealt.unwrap_or_else(|| {
            let ended = counts.unwrap_or_default();
            Tally { started: ended.total(), ended, durations, waited: Vec::new() }
        });
        Self { dealt, others: pair(session, rule), misrouted }
    }
}

impl From<Total> for KeptTotal {
    fn from(total: Total) -> Self {
        let [session, rule] = total.others.map_or_else(Default::default, |others| *others);
        let Total { dealt, misrouted, .. } = total;
        Self { counts: None, durations: Vec::new(), dealt: Some(dealt), session, rule, misrouted }
    }
}

fn pair(session: Tally, rule: Tally) -> Option<Box<[Tally; 2]>> {
    (!session.is_empty() || !rule.is_empty()).then(|| Box::new([session, rule]))
}

impl Total {
    fn of(version: &VersionReport, format: u32) -> Self {
        let by_choice = version.by_choice(format).map(|mut tally| {
            tally.durations.truncate(MOST_DURATIONS);
            tally.waited.truncate(MOST_DURATIONS);
            tally
        });
        let [dealt, session, rule] = by_choice;
        Self { dealt, others: pair(session, rule), misrouted: version.misrouted }
    }

    /// Requests whose version was the user's by a session.
    pub fn session(&self) -> Option<&Tally> {
        self.others.as_deref().map(|[session, _]| session)
    }

    fn all(&self) -> impl Iterator<Item = &Tally> {
        std::iter::once(&self.dealt).chain(self.others.iter().flat_map(|others| others.iter()))
    }

    /// All requests by outcome.
    pub fn counts(&self) -> Counts {
        self.all().fold(Counts::default(), |sum, tally| sum + tally.ended)
    }

    /// Requests that no rule took.
    pub fn without_rules(&self) -> Tally {
        let mut sum = self.dealt.clone();
        self.session().into_iter().for_each(|session| sum += session);
        sum
    }

    /// What was added since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let nothing = [Tally::default(), Tally::default()];
        let [session, rule] = self.others.as_deref().unwrap_or(&nothing);
        let [session_before, rule_before] = before.others.as_deref().unwrap_or(&nothing);
        Self {
            dealt: self.dealt.since(&before.dealt),
            others: pair(session.since(session_before), rule.since(rule_before)),
            misrouted: self.misrouted.saturating_sub(before.misrouted),
        }
    }

    fn add(&mut self, more: &Self) {
        self.dealt += &more.dealt;
        if let Some(more) = &more.others {
            let others = self.others.get_or_insert_default();
            others.iter_mut().zip(more.iter()).for_each(|(sum, more)| *sum += more);
        }
        self.misrouted = self.misrouted.saturating_add(more.misrouted);
    }

    fn any_below(&self, before: &Self) -> bool {
        let nothing = [Tally::default(), Tally::default()];
        let (own, other) = (self.others.as_deref().unwrap_or(&nothing), before.others.as_deref().unwrap_or(&nothing));
        let others = own.iter().zip(other).any(|(own, before)| own.any_below(before));
        self.dealt.any_below(&before.dealt) || others || self.misrouted < before.misrouted
    }
}

impl Ledger {
    /// The most runs that are kept; the ones longest silent go first. A proxy that comes back after that would be
    /// counted twice, which takes that many newer ones.
    const MAX_RUNS: usize = 20_000;

    /// One that begins now, in milliseconds since 1970: what proxies that run already have counted is the base line for
    /// verdicts.
    pub fn beginning(now: u64) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// Takes a report's counts, for the versions that `is_known` knows.
    pub fn take(&mut self, key: &RunKey, report: &Report, is_known: impl Fn(&str, &str) -> bool, now: u64) -> Taken {
        let is_first = !self.runs.contains_key(key);
        let is_from_before = is_first && started(&key.1).is_some_and(|started| started < self.since);
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
        if goes_back && report.format < Report::FORMAT {
            // Somebody has reset the counters of a proxy that reports Envoy's (`/reset_counters`): what they have since
            // then is all new.
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
                let all = Total::of(version, report.format);
                if *last == all {
                    continue;
                }
                // A filter that has forgotten a version which was gone for a while counts on from there.
                if !all.any_below(last) {
                    let new = all.since(last);
                    let key = || (service.name.clone(), version.name.clone());
                    self.totals.entry(key()).or_default().add(&new);
                    if is_from_before {
                        self.before.entry(key()).or_default().add(&new);
                    }
                }
                *last = all;
                changed = true;
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

    fn of(&self, service: &str, version: &str) -> Option<&Total> {
        self.totals.get(&(service.to_owned(), version.to_owned()))
    }

    /// A version's counts over all proxies.
    pub fn total(&self, service: &str, version: &str) -> Counts {
        self.of(service, version).map_or(Counts::default(), Total::counts)
    }

    /// The same by outcome, without those that rules took.
    pub fn judged_counts(&self, service: &str, version: &str) -> Counts {
        let key = (service.to_owned(), version.to_owned());
        let of = |totals: &BTreeMap<VersionKey, Total>| {
            totals.get(&key).map_or(Counts::default(), |total| {
                total.dealt.ended + total.session().map_or(Counts::default(), |session| session.ended)
            })
        };
        of(&self.totals).since(&of(&self.before))
    }

    /// A version's requests that did not reach it, over all proxies.
    pub fn misrouted(&self, service: &str, version: &str) -> u64 {
        self.of(service, version).map_or(0, |total| total.misrouted)
    }

    /// What of a version's counts verdicts may be made of.
    pub fn judged(&self, service: &str, version: &str) -> Total {
        let key = (service.to_owned(), version.to_owned());
        let total = self.totals.get(&key).cloned().unwrap_or_default();
        match self.before.get(&key) {
            Some(before) => total.since(before),
            None => total,
        }
    }

    /// How long a version's exchanges took, over all proxies: as in [`tideshift_core::report::VersionReport`].
    pub fn durations(&self, service: &str, version: &str) -> Vec<u64> {
        let mut sum = Tally::default();
        self.of(service, version).into_iter().flat_map(Total::all).for_each(|tally| sum += tally);
        sum.durations
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

/// When a run started, in milliseconds since 1970; `None` if its name does not say.
fn started(start: &str) -> Option<u64> {
    Some(u64::from_str_radix(start, 16).ok()? / 1_000_000)
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
            ..ServiceReport::default()
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

    /// As filters report that count for themselves; `session`: of what was dealt before the last, so many.
    fn by_choice(sequence: u64, dealt: u64, session: u64) -> Report {
        let tally = |ok| Tally { started: ok, ended: Counts { ok, ..Counts::default() }, ..Tally::default() };
        let mut report = Report { sequence, format: Report::FORMAT, ..report("a", dealt + session) };
        let version = &mut report.services[0].versions[0];
        (version.dealt, version.session) = (tally(dealt), tally(session));
        report
    }

    #[test]
    fn what_a_filter_has_forgotten_is_not_counted_again() {
        let mut ledger = Ledger::default();
        for (sequence, dealt, session) in [(1, 10, 4), (2, 12, 4), (3, 0, 1), (4, 3, 1)] {
            take(&mut ledger, &by_choice(sequence, dealt, session));
        }
        let total = ledger.judged("checkout", "v1");
        assert_eq!((total.dealt.ended.ok, total.session().map(|of| of.ended.ok)), (15, Some(4)));
        assert_eq!(ledger.total("checkout", "v1").ok, 19);
    }

    #[test]
    fn what_was_counted_before_the_ledger_began_is_in_no_verdict() {
        let began = 1_800_000_000_000;
        let mut ledger = Ledger::beginning(began);
        let run = |start: u64| Report { start: format!("{:x}", start * 1_000_000), ..by_choice(0, 0, 0) };
        let mut take_of = |start, sequence, dealt| {
            let report = Report { start: run(start).start, ..by_choice(sequence, dealt, 0) };
            take(&mut ledger, &report);
            (ledger.total("checkout", "v1").ok, ledger.judged_counts("checkout", "v1").ok)
        };
        assert_eq!(take_of(began - 1, 1, 100), (100, 0), "the first report of a proxy that ran before");
        assert_eq!(take_of(began - 1, 2, 103), (103, 3));
        assert_eq!(take_of(began + 1, 1, 5), (108, 8), "of one that started since");
    }

    #[test]
    fn a_ledger_of_before_is_converted() {
        let old = r#"{"totals": [[["checkout", "v1"], {"ok": 7, "error": 1, "clientError": 0, "cancelled": 2,
            "durations": [5, 3]}]], "unrouted": {}, "runs": [[["p", "a"], {"reportedAt": 1, "reported_at": 1,
            "sequence": 3, "counts": [[["checkout", "v1"], {"ok": 7, "error": 1, "clientError": 0, "cancelled": 2,
            "durations": [5, 3]}]], "unrouted": {}}]]}"#;
        let mut ledger: Ledger = serde_json::from_str(old).unwrap();
        assert_eq!(ledger.total("checkout", "v1").total(), 10);
        assert_eq!(ledger.durations("checkout", "v1"), [5, 3]);
        assert_eq!(ledger.judged("checkout", "v1").dealt.ended.error, 1);
        // The same proxy goes on, with the filter of before.
        take(&mut ledger, &Report { sequence: 4, ..report("a", 9) });
        assert_eq!(ledger.total("checkout", "v1").ok, 16, "what goes back in the old format was reset");
        let again: Ledger = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
        assert_eq!(again, ledger);
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
