//! What the proxies have counted, over all of them. Reports are cumulative for each run of a proxy and numbered, so what
//! is new in one is what it has more than the last one, and one that is older than that is left out: reports that are
//! lost, repeated or held up on their way neither lose nor double anything.
//!
//! Its size is bounded, however many proxies come and go: what a run has said last is kept for those that report, and for
//! a while after. Then the run is folded: its counts are in the totals, and of itself only a hash is left, so that what it
//! says when it comes back is a base line and is not counted twice.

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

/// A service's and a version's name.
pub type VersionKey = (String, String);

/// A run of a proxy: its id and its start. (Two proxies may share an id by mistake.)
pub type RunKey = (String, String);

/// How exactly it is noted when a run was heard of, in milliseconds.
const NOTED: u64 = 20_000;
/// A run that is silent for longer may make room for others.
const SILENT: u64 = 60_000;
/// A run that is silent for longer is folded.
const FOLDED_AFTER: u64 = 3_600_000;
/// What was counted of versions that left the documents is kept for so long: proxies forget them sooner, and count those
/// that come back from 0.
const LEFT: u64 = 600_000;
/// From one look for room to the next at least.
const ROOM: u64 = 1_000;
/// The most durations that one version's report can have.
const MOST_DURATIONS: usize = DURATION_BOUNDS.len() + 1;

/// All counts. Kept across restarts of the controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Ledger {
    /// Since when it has been kept, in milliseconds since 1970; 0: for longer than any proxy runs.
    since: u64,
    services: HashMap<String, OfService>,
    /// The next id. None is given twice.
    next: u32,
    /// What each run of a proxy said last, by proxy and start.
    runs: HashMap<RunKey, Run>,
    /// The runs that were folded.
    folded: Folded,
    /// What the runs take.
    bytes: usize,
    /// What they may take.
    most: (usize, usize),
    /// When there was last looked for room, and found none.
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

/// One service, over all proxies, those that are gone too.
#[derive(Debug, Clone, Default, PartialEq)]
struct OfService {
    /// Of what runs say of its unrouted requests.
    id: u32,
    /// Requests that found nothing in service.
    unrouted: u64,
    versions: Vec<OfVersion>,
}

/// One version of a service.
#[derive(Debug, Clone, Default, PartialEq)]
struct OfVersion {
    name: String,
    /// Of what runs say of it.
    id: u32,
    total: Total,
    /// What of it no verdict may be made of: proxies had counted it before the ledger began.
    before: Option<Box<Total>>,
    /// Since when it is in no document.
    left: Option<u64>,
}

impl OfService {
    fn version(&self, name: &str) -> Option<&OfVersion> {
        self.versions.iter().find(|version| version.name == name)
    }
}

/// What one run of a proxy said last.
#[derive(Debug, Clone, Default, PartialEq)]
struct Run {
    /// When that was, in milliseconds since 1970, to within [`NOTED`].
    reported_at: u64,
    /// The number of its last report; 0 if it does not number them.
    sequence: u64,
    /// By id, [packed]. None: its counts were not kept, so that the next ones are a base line.
    counts: Option<Arc<[u8]>>,
}

impl Run {
    /// What it takes in memory, about.
    fn bytes(&self, key: &RunKey) -> usize {
        160 + key.0.len() + key.1.len() + self.counts.as_ref().map_or(0, |counts| counts.len())
    }
}

/// What a report says of one version, beside what its run said before.
struct Said<'a> {
    version: &'a VersionReport,
    is_known: bool,
    /// Where it is in what was packed of the report.
    packed: Range<usize>,
    /// What was said before; none: nothing.
    last: Option<Total>,
    /// The same of what is said now, if that is another; none: not worked out yet.
    all: Option<Total>,
    is_same: bool,
    /// Whether something of it is less than it was.
    goes_back: bool,
}

impl Ledger {
    /// The most runs that are kept. Those that are silent are folded for others; where all report, no more are counted.
    const MAX_RUNS: usize = 20_000;
    /// The most bytes that they may take.
    const MAX_BYTES: usize = 96 << 20;

    /// One that begins now, in milliseconds since 1970: what proxies that run already have counted is the base line for
    /// verdicts.
    pub fn beginning(now: u64) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// The number of a run's last report, and when that was, to within [`NOTED`].
    pub fn last_report(&self, key: &RunKey) -> Option<(u64, u64)> {
        self.runs.get(key).map(|run| (run.sequence, run.reported_at))
    }

    /// Takes a report's counts, for the versions that `is_known` knows.
    pub fn take(&mut self, key: &RunKey, report: &Report, is_known: impl Fn(&str, &str) -> bool, now: u64) -> Taken {
        let before = self.runs.get(key).cloned();
        let is_first = before.is_none();
        // What a run had counted that was folded, or whose counts were not kept, is in the totals.
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
            // Somebody has reset the counters of a proxy that reports Envoy's (`/reset_counters`): what they have since
            // then is all new.
            entries.clear();
            for said in &mut said {
                (said.last, said.is_same, said.goes_back) = (None, false, false);
            }
        }
        run.sequence = run.sequence.max(report.sequence);
        // In step with all others, so that it is not written down all the time only for that.
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
                // A filter that has forgotten a version which was gone for a while counts on from there.
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

    /// Takes what is new of a service's unrouted requests; where what to keep of it is packed, if anything is.
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

    /// Whether one more run may be kept; those that are silent make room for it, the longest silent first.
    fn has_room(&mut self, bytes: usize, now: u64) -> bool {
        let (runs, most) = self.most;
        let is_full = |ledger: &Self| ledger.runs.len() >= runs || ledger.bytes + bytes > most;
        if !is_full(self) {
            return true;
        }
        // All of them are looked at, which is not for every stranger.
        if self.full.is_some_and(|full| now.saturating_sub(full) < ROOM) {
            return false;
        }
        let silent = self.runs.iter().filter(|(_, run)| now.saturating_sub(run.reported_at) > SILENT + NOTED);
        let mut silent: Vec<_> = silent.map(|(key, run)| (run.reported_at, key.clone())).collect();
        silent.sort_unstable();
        // Some more than are needed, so that the next ones find room.
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

    /// Folds runs that are silent for long, and forgets the versions that have been unknown for long.
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

    /// What runs said of versions that are there no longer.
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

    /// The same by outcome, without those that rules took.
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

    /// What of a version's counts verdicts may be made of.
    pub fn judged(&self, service: &str, version: &str) -> Total {
        let Some(OfVersion { total, before, .. }) = self.of(service, version) else { return Total::default() };
        before.as_deref().map_or_else(|| total.clone(), |before| total.since(before))
    }

    /// How long a version's exchanges took, over all proxies: as in [`tideshift_core::protocol::report::VersionReport`].
    pub fn durations(&self, service: &str, version: &str) -> Vec<u64> {
        let mut sum = Tally::default();
        self.of(service, version).into_iter().flat_map(|of| of.total.all()).for_each(|tally| sum += tally);
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
        self.services.get(service).map_or(0, |of| of.unrouted)
    }
}

fn service_of<'a>(services: &'a mut HashMap<String, OfService>, next: &mut u32, name: &str) -> &'a mut OfService {
    services.entry(name.to_owned()).or_insert_with(|| {
        *next += 1;
        OfService { id: *next, ..OfService::default() }
    })
}

/// Packs what a report says of a version.
fn say<'a>(version: &'a VersionReport, is_known: bool, format: u32, packed: &mut Vec<u8>) -> Said<'a> {
    let from = packed.len();
    packed::put_version(packed, version, format);
    let packed = from..packed.len();
    Said { version, is_known, packed, last: None, all: None, is_same: false, goes_back: false }
}

impl Said<'_> {
    /// Compares it with what was said before. What is the same is not unpacked.
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

/// What a run said last by an id.
fn entry<'a>(entries: &[(u32, &'a [u8])], id: u32) -> Option<&'a [u8]> {
    let at = entries.binary_search_by_key(&id, |(id, _)| *id).ok()?;
    entries.get(at).map(|(_, counts)| *counts)
}

fn number(mut bytes: Option<&[u8]>) -> u64 {
    bytes.as_mut().and_then(packed::take).unwrap_or_default()
}

/// What a run said before, with what is new in its place.
fn merged(before: &[(u32, &[u8])], new: &mut [(u32, Range<usize>)], packed: &[u8]) -> Arc<[u8]> {
    // Of a report that says something twice, the last word counts.
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

/// When a run started, in milliseconds since 1970; `None` if its name does not say.
pub(crate) fn started(start: &str) -> Option<u64> {
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
