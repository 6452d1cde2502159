//! Reports of proxies to the controller: the policy that the proxy runs, and the counts of each version.
//!
//! Counts are cumulative since the start of the proxy, so that a lost or repeated report neither loses nor doubles
//! anything. The same is true for the number of single requests, of which a report contains the last ones.
//!
//! Proxies may be older or newer than the controller: it ignores unknown fields, and missing fields count as 0 or
//! empty, except the names of the proxy, policy, service and version. The schema describes what senders write: all
//! fields. `tests/skew.rs` checks this with current reports.

use crate::counts::{Counts, MAX_COUNT, within};
use crate::evidence::clients::Request;
use crate::guard::Veto;
use crate::outcome::Outcome;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;
use std::ops::AddAssign;

/// The body of `POST /v1/reports`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Report {
    /// The proxy: Envoy's node id.
    pub proxy: String,
    /// This run of the proxy; counts start from 0 with each. When it began, as a hexadecimal number: of two runs of one
    /// proxy, the greater one is the newer.
    pub start: String,
    /// Grows with every report of this run, so that one that was held up on its way is not taken for news. 0 or left out
    /// by proxies that do not count their reports.
    #[serde(default)]
    pub sequence: u64,
    /// The controller state that the revision belongs to; empty for the plugin configuration's own policy.
    #[serde(default)]
    pub epoch: String,
    /// The revision that every worker has applied.
    pub revision: u64,
    /// How many workers that are (Envoy's main thread has one too).
    #[serde(default)]
    pub workers: u32,
    /// A newer policy that the proxy could not take, so that the revision above stays in force; or, if that is its
    /// revision, what the proxy could not take of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// The shape of the counts: [`Report::FORMAT`]. 1, or left out, by filters that do not tell how requests were chosen.
    #[serde(default = "first_format")]
    pub format: u32,
    /// The services that the proxy has counted for.
    pub services: Vec<ServiceReport>,
}

fn first_format() -> u32 {
    1
}

/// A policy that was not taken, or some of its services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Refused {
    /// Its revision, if that much could be read.
    pub revision: Option<u64>,
    /// What is wrong with it, one line for each field.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(!default))]
    pub errors: Vec<String>,
    /// The services that are wrong, where all others were taken; they are what they were before. Empty if nothing was
    /// taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
}

/// One service's counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ServiceReport {
    /// The service's name.
    pub name: String,
    /// Requests that found no version in service and went to Envoy's default route.
    #[serde(default)]
    pub unrouted: u64,
    /// Its versions, also those that are no longer in the policy.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(!default))]
    pub versions: Vec<VersionReport>,
    /// The versions that the proxy's guard has taken out of service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vetoes: Vec<Veto>,
    /// The clients of the last minutes, as hashes of their addresses: the [`MAX_CLIENTS`] smallest ones in a small sample of
    /// the requests. Empty as long as the sample is too small to tell how many there are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clients: Vec<u32>,
    /// Single requests that ended, while versions are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<Events>,
}

/// The last of the requests that a proxy tells one by one: every kind that may speak against a version, as far as they
/// fit, and a small sample of all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(!default))]
pub struct Events {
    /// Names the count below: it starts from 0 with each.
    pub stream: String,
    /// How many there were so far.
    pub total: u64,
    /// The last of them, the newest at the end; at most [`MAX_EVENTS`].
    pub last: Vec<Event>,
}

/// One request that ended, as a list of numbers: client, user, version, outcome, flags, duration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Event(
    /// A hash of the client's address; 0 if that is not known.
    pub u32,
    /// A hash of the user whose session it was; 0 for none.
    pub u32,
    /// The version, as an index of the report's.
    pub u16,
    /// The outcome, as an index of [`Outcome::ALL`].
    pub u8,
    /// [`Event::SESSION`], [`Event::SAMPLED`].
    pub u8,
    /// How long it took, as an index of a report's durations.
    pub u8,
);

/// Numbers that a newer filter may add at the end are ignored.
impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;

        impl<'de> Visitor<'de> for Numbers {
            type Value = Event;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of at least 6 numbers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Event, A::Error> {
                let (client, user) = (next(&mut list, 0)?, next(&mut list, 1)?);
                let (version, outcome) = (next(&mut list, 2)?, next(&mut list, 3)?);
                let (flags, duration) = (next(&mut list, 4)?, next(&mut list, 5)?);
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Event(client, user, version, outcome, flags, duration))
            }
        }

        fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(list: &mut A, at: usize) -> Result<T, A::Error> {
            list.next_element()?.ok_or_else(|| de::Error::invalid_length(at, &Numbers))
        }

        deserializer.deserialize_tuple_struct("Event", 6, Numbers)
    }
}

impl Event {
    /// The version was assigned by a session; otherwise it was dealt by weight.
    pub const SESSION: u8 = 1;
    /// The request belongs to the sample of all requests.
    pub const SAMPLED: u8 = 2;

    /// The request, for the target or for another version; `None` if its outcome is invalid.
    pub fn request(&self, is_target: bool) -> Option<Request> {
        let &Self(client, user, _, outcome, flags, duration) = self;
        Some(Request {
            client,
            user: (user != 0).then_some(user),
            is_session: flags & Self::SESSION != 0,
            is_sampled: flags & Self::SAMPLED != 0,
            is_target,
            outcome: Outcome::ALL.get(usize::from(outcome)).copied()?,
            duration: usize::from(duration),
        })
    }
}

/// The maximum number of clients of a service that a report names: with that many there are not only a few.
pub const MAX_CLIENTS: usize = 4;
/// The maximum number of single requests of a service in a report.
pub const MAX_EVENTS: usize = 128;

/// One version's counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VersionReport {
    /// The version's name.
    pub name: String,
    /// Exchanges that have ended.
    #[serde(flatten)]
    pub ended: Counts,
    /// Exchanges that have not ended yet.
    #[serde(default)]
    pub in_flight: u64,
    /// Exchanges that ended at another version's cluster, or at none: no word about this version.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub misrouted: u64,
    /// How long exchanges took that were not cancelled: how many took up to the first of [`DURATION_BOUNDS`], from there
    /// to the second, and so on, and those beyond all bounds. Zeros at the end are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub durations: Vec<u64>,
    /// Those of the above whose version was dealt by weight.
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    pub dealt: Tally,
    /// Those whose version was the user's by a session.
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    pub session: Tally,
    /// Those that a rule took.
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    pub rule: Tally,
}

/// Exchanges whose version was chosen in one way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Tally {
    /// Exchanges that have started.
    #[serde(default)]
    pub started: u64,
    /// Exchanges that have ended.
    #[serde(flatten)]
    pub ended: Counts,
    /// As [`VersionReport::durations`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub durations: Vec<u64>,
    /// How long clients had waited that went away, in the same way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waited: Vec<u64>,
}

/// [`VersionReport`] as it is parsed. For flattened fields serde buffers every field first, which costs more than the
/// rest of the report.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FlatVersion {
    name: String,
    #[serde(default)]
    ok: u64,
    #[serde(default)]
    error: u64,
    #[serde(default)]
    client_error: u64,
    #[serde(default)]
    cancelled: u64,
    #[serde(default)]
    in_flight: u64,
    #[serde(default)]
    misrouted: u64,
    #[serde(default)]
    durations: Vec<u64>,
    #[serde(default)]
    dealt: Tally,
    #[serde(default)]
    session: Tally,
    #[serde(default)]
    rule: Tally,
}

/// The same for [`Tally`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FlatTally {
    #[serde(default)]
    started: u64,
    #[serde(default)]
    ok: u64,
    #[serde(default)]
    error: u64,
    #[serde(default)]
    client_error: u64,
    #[serde(default)]
    cancelled: u64,
    #[serde(default)]
    durations: Vec<u64>,
    #[serde(default)]
    waited: Vec<u64>,
}

impl<'de> Deserialize<'de> for VersionReport {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let flat = FlatVersion::deserialize(from)?;
        let FlatVersion { ok, error, client_error, cancelled, .. } = flat;
        let ended = Counts { ok, error, client_error, cancelled };
        let FlatVersion { name, in_flight, misrouted, durations, dealt, session, rule, .. } = flat;
        Ok(Self { name, ended, in_flight, misrouted, durations, dealt, session, rule })
    }
}

impl<'de> Deserialize<'de> for Tally {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let FlatTally { started, ok, error, client_error, cancelled, durations, waited } =
            FlatTally::deserialize(from)?;
        Ok(Self { started, ended: Counts { ok, error, client_error, cancelled }, durations, waited })
    }
}

impl VersionReport {
    /// The counts by how the version was chosen: dealt, by a session, by a rule. Filters with an older
    /// [format](Report::format) did not distinguish them: their requests count as dealt, as they did then.
    pub fn by_choice(&self, format: u32) -> [Tally; 3] {
        if format >= Report::FORMAT {
            return [&self.dealt, &self.session, &self.rule].map(Clone::clone);
        }
        let started = self.ended.total().saturating_add(self.in_flight);
        let dealt = Tally { started, ended: self.ended, durations: self.durations.clone(), waited: Vec::new() };
        [dealt, Tally::default(), Tally::default()]
    }
}

impl Tally {
    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.started == 0 && self.ended == Counts::default()
    }

    /// The increase since `before`, each at least 0. (The number of started requests can decrease when Envoy follows an
    /// internal redirect.)
    pub fn since(&self, before: &Self) -> Self {
        let each = |now: &[u64], before: &[u64]| {
            let before = before.iter().chain(std::iter::repeat(&0));
            now.iter().zip(before).map(|(now, before)| now.saturating_sub(*before)).collect()
        };
        Self {
            started: self.started.saturating_sub(before.started),
            ended: self.ended.since(&before.ended),
            durations: each(&self.durations, &before.durations),
            waited: each(&self.waited, &before.waited),
        }
    }

    /// Whether any count of ended requests is lower than in `before`.
    pub fn any_below(&self, before: &Self) -> bool {
        let less = |now: &[u64], before: &[u64]| {
            let now = now.iter().chain(std::iter::repeat(&0));
            before.iter().zip(now).any(|(before, now)| now < before)
        };
        self.ended.any_below(&before.ended)
            || less(&self.durations, &before.durations)
            || less(&self.waited, &before.waited)
    }
}

impl AddAssign<&Self> for Tally {
    fn add_assign(&mut self, more: &Self) {
        let Self { started, ended, durations, waited } = more;
        self.started = self.started.saturating_add(*started);
        self.ended += *ended;
        for (sums, more) in [(&mut self.durations, durations), (&mut self.waited, waited)] {
            sums.resize(sums.len().max(more.len()), 0);
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
        }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The shape that serde asks for.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Report {
    /// The format of the counts in this build.
    pub const FORMAT: u32 = 2;

    /// Fails with the field whose count or length exceeds its limit.
    pub fn check(&self) -> Result<(), String> {
        for (i, service) in self.services.iter().enumerate() {
            within(&format_args!("services[{i}].unrouted"), service.unrouted, MAX_COUNT)?;
            within(&format_args!("services[{i}].clients"), service.clients.len() as u64, MAX_CLIENTS as u64)?;
            if let Some(events) = &service.events {
                let (last, most) = (events.last.len() as u64, MAX_EVENTS as u64);
                within(&format_args!("services[{i}].events.last"), last, most)?;
                within(&format_args!("services[{i}].events.total"), events.total, MAX_COUNT)?;
            }
            for (j, version) in service.versions.iter().enumerate() {
                let at = format!("services[{i}].versions[{j}]");
                let VersionReport { name: _, ended, in_flight, misrouted, durations, dealt, session, rule } = version;
                ended.check(&at)?;
                within(&format_args!("{at}.inFlight"), *in_flight, MAX_COUNT)?;
                within(&format_args!("{at}.misrouted"), *misrouted, MAX_COUNT)?;
                check_each(&at, "durations", durations)?;
                for (name, tally) in [("dealt", dealt), ("session", session), ("rule", rule)] {
                    let at = format!("{at}.{name}");
                    tally.ended.check(&at)?;
                    within(&format_args!("{at}.started"), tally.started, MAX_COUNT)?;
                    check_each(&at, "durations", &tally.durations)?;
                    check_each(&at, "waited", &tally.waited)?;
                }
            }
        }
        Ok(())
    }
}

fn check_each(at: &str, name: &str, counts: &[u64]) -> Result<(), String> {
    let mut counts = counts.iter().enumerate();
    counts.try_for_each(|(k, count)| within(&format_args!("{at}.{name}[{k}]"), *count, MAX_COUNT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn what_nobody_can_have_counted_is_named() {
        let with = |place: &str, count: u64| {
            let mut report = json!({"proxy": "p", "start": "1", "revision": 1, "services": [
                {"name": "a", "versions": []},
                {"name": "b", "unrouted": 1, "versions": [{"name": "v1", "ok": 1, "error": 1, "clientError": 1,
                    "cancelled": 1, "inFlight": 1, "durations": [1, 1]}]}]});
            *report.pointer_mut(place).unwrap() = json!(count);
            serde_json::from_value::<Report>(report).unwrap().check()
        };
        for (place, named) in [
            ("/services/1/unrouted", "services[1].unrouted"),
            ("/services/1/versions/0/ok", "services[1].versions[0].ok"),
            ("/services/1/versions/0/error", "services[1].versions[0].error"),
            ("/services/1/versions/0/clientError", "services[1].versions[0].clientError"),
            ("/services/1/versions/0/cancelled", "services[1].versions[0].cancelled"),
            ("/services/1/versions/0/inFlight", "services[1].versions[0].inFlight"),
            ("/services/1/versions/0/durations/1", "services[1].versions[0].durations[1]"),
        ] {
            assert_eq!(with(place, MAX_COUNT), Ok(()));
            let error = format!("{named}: {} is not allowed; expected at most {MAX_COUNT}", MAX_COUNT + 1);
            assert_eq!(with(place, MAX_COUNT + 1), Err(error));
        }
    }
}
