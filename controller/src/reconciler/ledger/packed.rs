//! The packed counts of one run of a proxy: a fifth of their size as lists of numbers, and there may be millions of
//! them. Numbers use seven bits of each byte, the lowest first. Equal counts have equal bytes.

use super::MOST_DURATIONS;
use super::total::Total;
use tideshift_core::counts::Counts;
use tideshift_core::protocol::report::{Report, Tally, VersionReport};

/// Bits of a version's first byte: the parts that it has besides requests assigned by weight.
const OF_SESSIONS: u8 = 1;
const OF_RULES: u8 = 2;

/// Appends a number.
pub(super) fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Takes a number from the front.
pub(super) fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Appends bytes with their length.
pub(super) fn put_bytes(bytes: &mut Vec<u8>, more: &[u8]) {
    put(bytes, more.len() as u64);
    bytes.extend_from_slice(more);
}

/// Takes bytes with their length from the front.
pub(super) fn take_bytes<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take(bytes)?).ok()?;
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

/// Appends a version's part of a report.
pub(super) fn put_version(bytes: &mut Vec<u8>, version: &VersionReport, format: u32) {
    if format >= Report::FORMAT {
        put_parts(bytes, [&version.dealt, &version.session, &version.rule], version.misrouted);
    } else {
        put_total(bytes, &Total::of(version, format));
    }
}

/// Appends a version's counts.
pub(super) fn put_total(bytes: &mut Vec<u8>, total: &Total) {
    let nothing = Tally::default();
    let of = |tally: Option<&Tally>| tally.unwrap_or(&nothing).clone();
    put_parts(bytes, [&total.dealt, &of(total.session()), &of(total.rule())], total.misrouted);
}

fn put_parts(bytes: &mut Vec<u8>, [dealt, session, rule]: [&Tally; 3], misrouted: u64) {
    let flag = |tally: &Tally, flag| if tally.is_empty() { 0 } else { flag };
    let flags = flag(session, OF_SESSIONS) | flag(rule, OF_RULES);
    bytes.push(flags);
    put(bytes, misrouted);
    put_tally(bytes, dealt);
    if flags & OF_SESSIONS != 0 {
        put_tally(bytes, session);
    }
    if flags & OF_RULES != 0 {
        put_tally(bytes, rule);
    }
}

fn put_tally(bytes: &mut Vec<u8>, tally: &Tally) {
    let Tally { started, ended, durations, waited } = tally;
    // All fields: a new field requires a new format of the persisted state.
    let Counts { ok, error, client_error, cancelled } = *ended;
    for number in [*started, ok, error, client_error, cancelled] {
        put(bytes, number);
    }
    for list in [durations, waited] {
        let list = list.get(..MOST_DURATIONS).unwrap_or(list);
        let length = list.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        put(bytes, length as u64);
        list.iter().take(length).for_each(|count| put(bytes, *count));
    }
}

/// A version's counts; parts that cannot be read are 0.
pub(super) fn total(mut bytes: &[u8]) -> Total {
    read_total(&mut bytes).unwrap_or_default()
}

fn read_total(bytes: &mut &[u8]) -> Option<Total> {
    let (flags, rest) = bytes.split_first()?;
    *bytes = rest;
    let misrouted = take(bytes)?;
    let dealt = take_tally(bytes)?;
    let mut if_any = |flag| if flags & flag != 0 { take_tally(bytes) } else { Some(Tally::default()) };
    let (session, rule) = (if_any(OF_SESSIONS)?, if_any(OF_RULES)?);
    Some(Total::new(dealt, session, rule, misrouted))
}

fn take_tally(bytes: &mut &[u8]) -> Option<Tally> {
    let mut tally = Tally { started: take(bytes)?, ..Tally::default() };
    let Counts { ok, error, client_error, cancelled } = &mut tally.ended;
    for number in [ok, error, client_error, cancelled] {
        *number = take(bytes)?;
    }
    for list in [&mut tally.durations, &mut tally.waited] {
        for _ in 0..take(bytes)?.min(MOST_DURATIONS as u64) {
            list.push(take(bytes)?);
        }
    }
    Some(tally)
}

/// Whether a version has no counts.
pub(super) fn is_nothing(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Appends counts by id, which must be in order.
pub(super) fn put_entries<'a>(bytes: &mut Vec<u8>, entries: impl IntoIterator<Item = (u32, &'a [u8])>) {
    let mut before = 0;
    for (id, counts) in entries {
        put(bytes, u64::from(id - before));
        put_bytes(bytes, counts);
        before = id;
    }
}

/// The counts by id, in their order, as far as they can be read.
pub(super) fn entries(mut bytes: &[u8]) -> Vec<(u32, &[u8])> {
    let mut entries: Vec<(u32, &[u8])> = Vec::new();
    let mut id = 0_u32;
    while !bytes.is_empty() {
        let more = take(&mut bytes).and_then(|more| id.checked_add(u32::try_from(more).ok()?));
        let Some((next, counts)) = more.zip(take_bytes(&mut bytes)) else { break };
        id = next;
        entries.push((id, counts));
    }
    entries
}
