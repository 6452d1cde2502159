//! The persisted form of the ledger, within a size limit.

use super::folded::Folded;
use super::{Ledger, NOTED, OfService, OfVersion, Run, RunKey, SILENT, Total, VersionKey, packed, started};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

/// How many bytes the names of runs may take whose counts do not fit.
const NAMES: usize = 64 << 10;

/// A service's name and id, and those of its versions.
type Named = (String, u32, Vec<(String, u32)>);

/// [`Ledger`] in its persisted form.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Written {
    #[serde(default)]
    since: u64,
    /// The names of the ids in runs: of each service, for its unrouted requests, and of its versions.
    #[serde(default)]
    names: Vec<Named>,
    #[serde(default)]
    next: u32,
    totals: Vec<(VersionKey, Total)>,
    #[serde(default)]
    before: Vec<(VersionKey, Total)>,
    unrouted: BTreeMap<String, u64>,
    /// The last report of each run.
    #[serde(default)]
    starts: Hex,
    /// The folded runs.
    #[serde(default)]
    folded: Hex,
    #[serde(default)]
    horizon: u64,
    /// The runs in the form before format 5.
    #[serde(default, skip_serializing)]
    runs: Vec<(RunKey, OldRun)>,
}

impl Written {
    /// How many bytes single runs take.
    pub fn bytes_of_runs(&self) -> usize {
        self.starts.0.len()
    }
}

/// A run before format 5.
#[derive(Debug, Clone, Deserialize)]
struct OldRun {
    reported_at: u64,
    #[serde(default)]
    sequence: u64,
    counts: Vec<(VersionKey, Total)>,
    unrouted: BTreeMap<String, u64>,
}

/// Bytes as JSON stores them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Hex(Vec<u8>);

impl From<Hex> for String {
    fn from(hex: Hex) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |half: u8| char::from(DIGITS[usize::from(half & 15)]);
        hex.0.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
    }
}

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digit = |digit: &u8| char::from(*digit).to_digit(16).map(|digit| digit as u8);
        let byte = |pair: &[u8]| match pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.map(Self).ok_or_else(|| "not hexadecimal digits in pairs".to_owned())
    }
}

impl Ledger {
    /// The form to persist if `room` bytes are available for single runs. Counts that do not fit become a baseline:
    /// first those of silent runs, then those of runs that report. The totals are always included.
    pub fn written(&self, room: usize) -> Written {
        let mut runs: Vec<_> = self.runs.iter().collect();
        runs.sort_unstable_by_key(|(key, run)| (Reverse(run.reported_at), *key));
        let last = runs.first().map_or(0, |(_, run)| run.reported_at);
        let (mut starts, mut folded) = (Vec::new(), self.folded.clone());
        let mut names = NAMES.min(room);
        let mut left_out = Vec::new();
        for (key, run) in runs {
            let from = starts.len();
            put_run(&mut starts, key, run);
            if starts.len() <= room {
                continue;
            }
            starts.truncate(from);
            // Drains wait for the runs that were live.
            let name = Run { counts: None, ..*run };
            put_run(&mut starts, key, &name);
            let was_there = run.reported_at + NOTED + SILENT >= last;
            if was_there && starts.len() - from <= names {
                names -= starts.len() - from;
            } else {
                starts.truncate(from);
                left_out.push((key, run));
            }
        }
        for (key, run) in left_out.into_iter().rev() {
            folded.add(key, started(&key.1).map_or(run.reported_at, |started| started.min(run.reported_at)));
        }
        if room == 0 {
            folded.forget_all();
        }
        self.with(Hex(starts), &folded)
    }

    fn with(&self, starts: Hex, folded: &Folded) -> Written {
        let mut services: Vec<_> = self.services.iter().collect();
        services.sort_unstable_by_key(|(name, _)| *name);
        let versions = || services.iter().flat_map(|(service, of)| of.versions.iter().map(move |of| (*service, of)));
        let key = |service: &String, of: &OfVersion| (service.clone(), of.name.clone());
        let (hashes, horizon) = folded.parts();
        let mut bytes = Vec::new();
        for (hash, started) in hashes {
            bytes.extend_from_slice(&hash.to_le_bytes());
            packed::put(&mut bytes, started);
        }
        let ids = |of: &OfService| of.versions.iter().map(|of| (of.name.clone(), of.id)).collect();
        Written {
            since: self.since,
            names: services.iter().map(|(name, of)| ((*name).clone(), of.id, ids(of))).collect(),
            next: self.next,
            totals: versions().map(|(service, of)| (key(service, of), of.total.clone())).collect(),
            before: versions()
                .filter_map(|(name, of)| Some((key(name, of), Total::clone(of.before.as_ref()?))))
                .collect(),
            unrouted: services.iter().map(|(name, of)| ((*name).clone(), of.unrouted)).collect(),
            starts,
            folded: Hex(bytes),
            horizon,
            runs: Vec::new(),
        }
    }
}

fn put_run(bytes: &mut Vec<u8>, (proxy, start): &RunKey, run: &Run) {
    packed::put_bytes(bytes, proxy.as_bytes());
    packed::put_bytes(bytes, start.as_bytes());
    packed::put(bytes, run.reported_at);
    packed::put(bytes, run.sequence);
    bytes.push(run.counts.is_some().into());
    if let Some(counts) = &run.counts {
        packed::put_bytes(bytes, counts);
    }
}

fn take_run(bytes: &mut &[u8]) -> Option<(RunKey, Run)> {
    let mut text = || Some(String::from_utf8_lossy(packed::take_bytes(bytes)?).into_owned());
    let key = (text()?, text()?);
    let (reported_at, sequence) = (packed::take(bytes)?, packed::take(bytes)?);
    let counts = match packed::take(bytes)? {
        0 => None,
        _ => Some(packed::take_bytes(bytes)?.into()),
    };
    Some((key, Run { reported_at, sequence, counts }))
}

impl From<Ledger> for Written {
    fn from(ledger: Ledger) -> Self {
        ledger.written(usize::MAX)
    }
}

impl From<Written> for Ledger {
    fn from(written: Written) -> Self {
        let Written { since, names, next, totals, before, unrouted, starts, folded, horizon, runs } = written;
        let mut ledger = Self { since, next, ..Self::default() };
        ledger.services =
            names.into_iter().map(|(name, id, versions)| (name, of_service(id, versions))).collect::<HashMap<_, _>>();
        for ((service, version), total) in totals {
            ledger.version(&service, &version).total = total;
        }
        for ((service, version), total) in before {
            ledger.version(&service, &version).before = Some(Box::new(total));
        }
        for (service, number) in unrouted {
            ledger.service(&service).unrouted = number;
        }
        let mut bytes = folded.0.as_slice();
        let hashes = std::iter::from_fn(|| {
            let (hash, rest) = bytes.split_first_chunk()?;
            bytes = rest;
            Some((u64::from_le_bytes(*hash), packed::take(&mut bytes)?))
        });
        ledger.folded = Folded::new(hashes, horizon);
        let mut bytes = starts.0.as_slice();
        while let Some((key, run)) = take_run(&mut bytes) {
            ledger.put(&key, run);
        }
        for (key, run) in runs {
            ledger.put_old(&key, run);
        }
        ledger
    }
}

fn of_service(id: u32, versions: Vec<(String, u32)>) -> OfService {
    let versions = versions.into_iter().map(|(name, id)| OfVersion { name, id, ..OfVersion::default() });
    OfService { id, unrouted: 0, versions: versions.collect() }
}

impl Ledger {
    fn put_old(&mut self, key: &RunKey, run: OldRun) {
        let OldRun { reported_at, sequence, counts, unrouted } = run;
        let mut entries = BTreeMap::new();
        for ((service, version), total) in counts {
            let mut bytes = Vec::new();
            packed::put_total(&mut bytes, &total);
            entries.insert(self.version(&service, &version).id, bytes);
        }
        for (service, number) in unrouted {
            let mut bytes = Vec::new();
            packed::put(&mut bytes, number);
            entries.insert(self.service(&service).id, bytes);
        }
        let mut bytes = Vec::new();
        packed::put_entries(&mut bytes, entries.iter().map(|(id, counts)| (*id, counts.as_slice())));
        self.put(key, Run { reported_at, sequence, counts: Some(bytes.into()) });
    }
}
