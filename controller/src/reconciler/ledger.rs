//! The ledger: what the proxies have counted, summed over all of them. Reports are cumulative for each run of a proxy
//! and numbered. The difference from the previous report is new; an older report is ignored. Lost, repeated or delayed
//! reports therefore neither lose nor double any count.
//!
//! The ledger's size is bounded, however many proxies come and go. The last report of a run is kept while the run
//! reports, and for a while after. Then the run is folded: its counts stay in the totals, and only a hash of the run
//! remains, so that its next report becomes a baseline and is not counted twice.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use tideshift_core::counts::{Counts, DURATION_BOUNDS};
use tideshift_core::protocol::report::{Report, ServiceReport, Tally, VersionReport};

#[path = "ledger/folded.rs"]
mod folded;
#[path = "ledger/packed.rs"]
mod packed;
#[cfg(test)]
#[path = "ledger/tests.rs"]
mod tests;
#[path = "ledger/total.rs"]
mod total;
#[path = "ledger/written.rs"]
mod written;

use folded::Folded;
pub use total::Total;
pub use written::Written;

/// The names of a service and of a version.
pub type VersionKey = (String, String);

/// A run of a proxy: its id and its start. (Two proxies may share an id by mistake.)
pub type RunKey = (String, String);

/// The resolution at which the time of a run's last report is noted, in milliseconds.
const NOTED: u64 = 20_000;
/// A run that is silent for longer may be folded to make room.
const SILENT: u64 = 60_000;
/// A run that is silent for longer is folded.
const FOLDED_AFTER: u64 = 3_600_000;
/// How long the counts of versions without a document are kept. Proxies forget them sooner, and count versions that
/// come back from 0.
const LEFT: u64 = 600_000;
/// The minimum interval between two searches for room.
const ROOM: u64 = 1_000;
/// The largest number of durations in a version's report.
const MOST_DURATIONS: usize = DURATION_BOUNDS.len() + 1;

/// All counts. Persisted across restarts of the controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Ledger {
    /// When the ledger began, in milliseconds since 1970; 0: before any proxy that runs.
    since: u64,
    services: HashMap<String, OfService>,
    /// The next id. Ids are not reused.
    next: u32,
    /// The last report of each run, by proxy and start.
    runs: HashMap<RunKey, Run>,
    /// The folded runs.
    folded: Folded,
    /// The memory that runs take.
    bytes: usize,
    /// The limits for runs and for their memory.
    most: (usize, usize),
    /// When the last search for room failed.
    full: Option<u64>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            since: 0,
            services: HashMap::new(),
            next: 0,
            runs: HashMap::new(),
            folded: Folded::default(),
            bytes: 0,
            most: (Self::MAX_RUNS, Self::MAX_BYTES),
            full: None,
        }
    }
}

impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        let Self { since, services, next, runs, folded, bytes, most: _, full: _ } = self;
        let all = (since, services, next, runs, folded, bytes);
        all == (&other.since, &other.services, &other.next, &other.runs, &other.folded, &other.bytes)
    }
}

/// The effect of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Ignored: its run has already sent a newer report.
    Old,
    /// It contains no new counts.
    NoNews,
    /// It contains new counts to persist.
    News,
}

/// One service, over all proxies, including those that no longer exist.
#[derive(Debug, Clone, Default, PartialEq)]
struct OfService {
    /// The id of its unrouted requests in the runs' reports.
    id: u32,
    /// Requests for which no version was in service.
    unrouted: u64,
    versions: Vec<OfVersion>,
}

/// One version of a service.
#[derive(Debug, Clone, Default, PartialEq)]
struct OfVersion {
    name: String,
    /// The version's id in the runs' reports.
    id: u32,
    total: Total,
    /// The counts that are not judged, because proxies had made them before the ledger began.
    before: Option<Box<Total>>,
    /// Since when no document contains it.
    left: Option<u64>,
}

impl OfService {
    fn version(&self, name: &str) -> Option<&OfVersion> {
        self.versions.iter().find(|version| version.name == name)
    }
}

/// The last report of one run of a proxy.
#[derive(Debug, Clone, Default, PartialEq)]
struct Run {
    /// The time of the report, in milliseconds since 1970, at the resolution of [`NOTED`].
    reported_at: u64,
    /// The sequence number of the report; 0 if the proxy does not number them.
    sequence: u64,
    /// The counts by id, [packed]. `None`: they were not kept, so that the next ones are a baseline.
    counts: Option<Arc<[u8]>>,
}

impl Run {
    /// The approximate memory that it takes.
    fn bytes(&self, key: &RunKey) -> usize {
        160 + key.0.len() + key.1.len() + self.counts.as_ref().map_or(0, |counts| counts.len())
    }
}

/// One version in a report, compared with the previous report of the run.
struct Said<'a> {
    version: &'a VersionReport,
    is_known: bool,
    /// Its range in the packed report.
    packed: Range<usize>,
    /// The previous counts; `None` if there were none.
    last: Option<Total>,
    /// The current counts if they differ; `None` if not computed yet.
    all: Option<Total>,
    is_same: bool,
    /// Whether a count is lower than before.
    goes_back: bool,
}

impl Ledger {
    /// The most runs that are kept. Silent runs are folded to make room; if all report, further runs are not counted.
    const MAX_RUNS: usize = 20_000;
    /// The most bytes that they may take.
    const MAX_BYTES: usize = 96 << 20;

    /// A ledger that begins now, in milliseconds since 1970: counts that running proxies already have are the baseline
    /// and are not judged.
    pub fn beginning(now: u64) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// The sequence number of a run's last report, and its time at the resolution of [`NOTED`].
    pub fn last_report(&self, key: &RunKey) -> Option<(u64, u64)> {
        self.runs.get(key).map(|run| (run.sequence, run.reported_at))
    }

    /// Takes a report's counts, for the versions that `is_known` accepts.
    pub fn take(&mut self, key: &RunKey, report: &Report, is_known: impl Fn(&str, &str) -> bool, now: u64) -> Taken {
        let before = self.runs.get(key).cloned();
        let is_first = before.is_none();
        // The totals already contain the counts of a run that was folded or whose counts were not kept.
        let is_base =
            before.as_ref().map_or_else(|| self.folded.may_have(key, started(&key.1)), |run| run.counts.is_none());
        let mut run = before.unwrap_or_default();
        let counts = run.counts.take().unwrap_or_default();
        let mut entries = packed::entries(&counts);
        let mut packed = Vec::new();
        let mut said = Vec::new();
        let mut goes_back = false;
        for service in &report.services {
            let of = self.services.get(&service.name);
            goes_back |= service.unrouted < of.map_or(0, |of| number(entry(&entries, of.id)));
            for version in &service.versions {
                let id = of.and_then(|of| of.version(&version.name)).map(|of| of.id);
                let said_of = say(version, is_known(&service.name, &version.name), report.format, &mut packed);
                let said_of = said_of.beside(id.and_then(|id| entry(&entries, id)), &packed, report.format);
                goes_back |= said_of.goes_back;
                said.push(said_of);
            }
        }
        let is_old = match report.sequence {
            0 => goes_back,
            sequence => sequence <= run.sequence,
        };
        if is_old {
            return Taken::Old;
        }
        if is_first && !self.has_room(packed.len(), now) {
            return Taken::NoNews;
        }
        let was_reset = goes_back && report.format < Report::FORMAT;
        if was_reset {
            // The counters of a proxy that reports Envoy's were reset (`/reset_counters`): everything counted since
            // then is new.
            entries.clear();
            for said in &mut said {
                (said.last, said.is_same, said.goes_back) = (None, false, false);
            }
        }
        run.sequence = run.sequence.max(report.sequence);
        // Aligned for all runs, so that the time alone rarely causes a write.
        let mut changed = run.reported_at / NOTED != now / NOTED;
        if changed {
            run.reported_at = now;
        }
        let is_from_before = is_first && started(&key.1).is_some_and(|started| started < self.since);
        let mut new: Vec<(u32, Range<usize>)> = Vec::new();
        let mut all_said = said.into_iter();
        for service in &report.services {
            let mut is_service_known = false;
            for said in all_said.by_ref().take(service.versions.len()).filter(|said| said.is_known) {
                is_service_known = true;
                let bytes = packed.get(said.packed.clone()).unwrap_or_default();
                if said.is_same || (said.last.is_none() && packed::is_nothing(bytes)) {
                    continue;
                }
                let of = self.version(&service.name, &said.version.name);
                new.push((of.id, said.packed.clone()));
                // If a filter has forgotten a version that was gone for a while, its count continues from there.
                if !said.goes_back && !is_base {
                    let all = said.all.unwrap_or_else(|| Total::of(said.version, report.format));
                    let more = match &said.last {
                        Some(last) => all.since(last),
                        None => all,
                    };
                    of.total.add(&more);
                    if is_from_before {
                        of.before.get_or_insert_default().add(&more);
                    }
                }
            }
            if is_service_known {
                new.extend(self.take_unrouted(service, &entries, is_base, &mut packed));
            }
        }
        changed |= !new.is_empty();
        run.counts =
            Some(if new.is_empty() && !was_reset { counts.clone() } else { merged(&entries, &mut new, &packed) });
        self.put(key, run);
        if changed { Taken::News } else { Taken::NoNews }
    }

    /// Takes a service's new unrouted requests. Returns the packed range to keep, if there is any.
    fn take_unrouted(
        &mut self,
        service: &ServiceReport,
        entries: &[(u32, &[u8])],
        is_base: bool,
        packed: &mut Vec<u8>,
    ) -> Option<(u32, Range<usize>)> {
        let of = self.service(&service.name);
        let last = number(entry(entries, of.id));
        if service.unrouted <= last {
            return None;
        }
        if !is_base {
            of.unrouted = of.unrouted.saturating_add(service.unrouted - last);
        }
        let from = packed.len();
        packed::put(packed, service.unrouted);
        Some((of.id, from..packed.len()))
    }

    fn put(&mut self, key: &RunKey, run: Run) {
        self.bytes += run.bytes(key);
        match self.runs.get_mut(key) {
            Some(before) => {
                self.bytes -= before.bytes(key);
                *before = run;
            }
            None => drop(self.runs.insert(key.clone(), run)),
        }
    }

    fn fold(&mut self, key: &RunKey) {
        let Some(run) = self.runs.remove(key) else { return };
        self.bytes -= run.bytes(key);
        self.folded.add(key, started(&key.1).map_or(run.reported_at, |started| started.min(run.reported_at)));
    }

    /// Whether one more run may be kept; silent runs are folded to make room, the longest silent first.
    fn has_room(&mut self, bytes: usize, now: u64) -> bool {
        let (runs, most) = self.most;
        let is_full = |ledger: &Self| ledger.runs.len() >= runs || ledger.bytes + bytes > most;
        if !is_full(self) {
            return true;
        }
        // The search visits all runs, so it is limited in rate.
        if self.full.is_some_and(|full| now.saturating_sub(full) < ROOM) {
            return false;
        }
        let silent = self.runs.iter().filter(|(_, run)| now.saturating_sub(run.reported_at) > SILENT + NOTED);
        let mut silent: Vec<_> = silent.map(|(key, run)| (run.reported_at, key.clone())).collect();
        silent.sort_unstable();
        // Folds some more than needed, so that the next runs find room.
        for (_, key) in silent {
            if self.runs.len() < runs - runs / 16 && self.bytes + bytes < most - most / 16 {
                break;
            }
            self.fold(&key);
        }
        let has_room = !is_full(self);
        self.full = (!has_room).then_some(now);
        has_room
    }

    /// Folds runs that have been silent for long, and removes versions that have been unknown for long.
    pub fn tidy(&mut self, is_known: impl Fn(&str, &str) -> bool, now: u64) {
        let silent = self.runs.iter().filter(|(_, run)| now.saturating_sub(run.reported_at) > FOLDED_AFTER);
        let silent: Vec<_> = silent.map(|(key, _)| key.clone()).collect();
        silent.iter().for_each(|key| self.fold(key));
        let before = self.services.len() + self.services.values().map(|of| of.versions.len()).sum::<usize>();
        self.services.retain(|service, of| {
            of.versions.retain_mut(|version| {
                let is_known = is_known(service, &version.name);
                version.left = if is_known { None } else { version.left.or(Some(now)) };
                version.left.is_none_or(|left| now.saturating_sub(left) <= LEFT)
            });
            !of.versions.is_empty()
        });
        let after = self.services.len() + self.services.values().map(|of| of.versions.len()).sum::<usize>();
        if after < before {
            self.forget_what_is_gone();
        }
    }

    /// Removes from the runs the counts of versions that no longer exist.
    fn forget_what_is_gone(&mut self) {
        let ids = self.services.values().flat_map(|of| of.versions.iter().map(|of| of.id).chain([of.id]));
        let ids: std::collections::HashSet<u32> = ids.collect();
        for run in self.runs.values_mut() {
            let Some(counts) = &run.counts else { continue };
            let mut left = Vec::new();
            packed::put_entries(&mut left, packed::entries(counts).into_iter().filter(|(id, _)| ids.contains(id)));
            self.bytes -= counts.len() - left.len();
            run.counts = Some(left.into());
        }
    }

    fn service(&mut self, name: &str) -> &mut OfService {
        service_of(&mut self.services, &mut self.next, name)
    }

    fn version(&mut self, service: &str, name: &str) -> &mut OfVersion {
        let of = service_of(&mut self.services, &mut self.next, service);
        let known = of.versions.iter().position(|version| version.name == name);
        let at = known.unwrap_or_else(|| {
            self.next += 1;
            of.versions.push(OfVersion { name: name.to_owned(), id: self.next, ..OfVersion::default() });
            of.versions.len() - 1
        });
        &mut of.versions[at]
    }

    fn of(&self, service: &str, version: &str) -> Option<&OfVersion> {
        self.services.get(service)?.version(version)
    }

    /// A version's counts over all proxies.
    pub fn total(&self, service: &str, version: &str) -> Counts {
        self.of(service, version).map_or(Counts::default(), |of| of.total.counts())
    }

    /// The counts by outcome that are judged, without requests that a rule matched.
    pub fn judged_counts(&self, service: &str, version: &str) -> Counts {
        let of = |total: &Total| total.dealt.ended + total.session().map_or(Counts::default(), |session| session.ended);
        self.of(service, version).map_or(Counts::default(), |version| {
            of(&version.total).since(&version.before.as_deref().map_or(Counts::default(), of))
        })
    }

    /// A version's requests that did not reach it, over all proxies.
    pub fn misrouted(&self, service: &str, version: &str) -> u64 {
        self.of(service, version).map_or(0, |of| of.total.misrouted)
    }

    /// The part of a version's counts that verdicts may use.
    pub fn judged(&self, service: &str, version: &str) -> Total {
        let Some(OfVersion { total, before, .. }) = self.of(service, version) else { return Total::default() };
        before.as_deref().map_or_else(|| total.clone(), |before| total.since(before))
    }

    /// The durations of a version's exchanges over all proxies: as in
    /// [`tideshift_core::protocol::report::VersionReport`].
    pub fn durations(&self, service: &str, version: &str) -> Vec<u64> {
        let mut sum = Tally::default();
        self.of(service, version).into_iter().flat_map(|of| of.total.all()).for_each(|tally| sum += tally);
        sum.durations
    }

    /// The runs that reported at the time of the newest report or shortly before it, each with its time: the proxies
    /// that were live when the ledger was persisted.
    pub fn heard_of_last(&self, shortly: u64) -> impl Iterator<Item = (&RunKey, u64)> {
        let last = self.runs.values().map(|run| run.reported_at).max().unwrap_or_default();
        let were_there = self.runs.iter().filter(move |(_, run)| run.reported_at + NOTED + shortly >= last);
        were_there.map(|(key, run)| (key, run.reported_at))
    }

    /// A service's requests for which no version was in service, over all proxies.
    pub fn unrouted(&self, service: &str) -> u64 {
        self.services.get(service).map_or(0, |of| of.unrouted)
    }
}

fn service_of<'a>(services: &'a mut HashMap<String, OfService>, next: &mut u32, name: &str) -> &'a mut OfService {
    services.entry(name.to_owned()).or_insert_with(|| {
        *next += 1;
        OfService { id: *next, ..OfService::default() }
    })
}

/// Packs a version's part of a report.
fn say<'a>(version: &'a VersionReport, is_known: bool, format: u32, packed: &mut Vec<u8>) -> Said<'a> {
    let from = packed.len();
    packed::put_version(packed, version, format);
    let packed = from..packed.len();
    Said { version, is_known, packed, last: None, all: None, is_same: false, goes_back: false }
}

impl Said<'_> {
    /// Compares it with the previous report. Equal counts are not unpacked.
    fn beside(self, last: Option<&[u8]>, packed: &[u8], format: u32) -> Self {
        let Some(last) = last else { return self };
        if packed.get(self.packed.clone()) == Some(last) {
            return Self { is_same: true, ..self };
        }
        let last = packed::total(last);
        let all = Total::of(self.version, format);
        Self { goes_back: all.any_below(&last), last: Some(last), all: Some(all), ..self }
    }
}

/// The counts of an id in a run's last report.
fn entry<'a>(entries: &[(u32, &'a [u8])], id: u32) -> Option<&'a [u8]> {
    let at = entries.binary_search_by_key(&id, |(id, _)| *id).ok()?;
    entries.get(at).map(|(_, counts)| *counts)
}

fn number(mut bytes: Option<&[u8]>) -> u64 {
    bytes.as_mut().and_then(packed::take).unwrap_or_default()
}

/// The previous counts of a run, with the new ones replacing them.
fn merged(before: &[(u32, &[u8])], new: &mut [(u32, Range<usize>)], packed: &[u8]) -> Arc<[u8]> {
    // If a report contains an id twice, the last entry counts.
    new.sort_by_key(|(id, _)| *id);
    let mut all: Vec<(u32, &[u8])> = Vec::with_capacity(before.len() + new.len());
    let mut before = before.iter().copied().peekable();
    for (id, range) in new.iter() {
        while let Some(kept) = before.next_if(|(of, _)| of < id) {
            all.push(kept);
        }
        before.next_if(|(of, _)| of == id);
        let counts = packed.get(range.clone()).unwrap_or_default();
        match all.last_mut().filter(|(of, _)| of == id) {
            Some(last) => last.1 = counts,
            None => all.push((*id, counts)),
        }
    }
    all.extend(before);
    let mut bytes = Vec::with_capacity(all.iter().map(|(_, counts)| counts.len() + 3).sum());
    packed::put_entries(&mut bytes, all);
    bytes.into()
}

/// When a run started, in milliseconds since 1970; `None` if its name does not contain it.
pub(crate) fn started(start: &str) -> Option<u64> {
    Some(u64::from_str_radix(start, 16).ok()? / 1_000_000)
}

/// Serializes maps with keys that are not strings as lists of pairs, because JSON has no other form for them.
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
