//! Single requests that proxies report while versions are compared, buffered until the analysis takes them. Also tracks
//! whether a service has only a few clients.

use crate::clock::Millis;
use crate::reconciler::ledger::RunKey;
use std::collections::BTreeMap;
use tideshift_core::protocol::report::{Event, MAX_CLIENTS, Report, ServiceReport};
use tideshift_core::verdict::Request;

/// How long clients are remembered, in milliseconds.
const CLIENTS: Millis = 300_000;
/// The most clients of a service that are remembered, those with the smallest hashes.
const MOST_CLIENTS: usize = 64;
/// The most requests of a service that wait for the analysis; the oldest are dropped first.
const MOST_WAITING: usize = 20_000;

/// By service. Not persisted: requests that were buffered when the controller ended are lost, and produce no evidence.
#[derive(Debug, Default)]
pub(super) struct Requests {
    services: BTreeMap<String, OfService>,
}

#[derive(Debug, Default)]
struct OfService {
    /// The position up to which each run's requests have been taken: the stream, and the number of its requests.
    taken: BTreeMap<RunKey, (String, u64)>,
    /// Each with its version's name.
    waiting: Vec<(String, Event)>,
    clients: BTreeMap<u32, Millis>,
    /// When a filter last reported that does not distinguish clients. Its requests are judged by their counts, as they
    /// were with such filters.
    untold: Option<Millis>,
}

/// The new requests of two versions.
pub(super) struct News {
    /// Requests of either version.
    pub(super) ended: Vec<Request>,
    /// Whether the service has only a few clients.
    pub(super) few_clients: bool,
}

impl Requests {
    /// Takes the requests that a proxy reports for services that are compared. For a run that reports for the first
    /// time, only later requests are taken: the others may be old.
    pub(super) fn reported(&mut self, run: &RunKey, report: &Report, is_compared: impl Fn(&str) -> bool, now: Millis) {
        for service in report.services.iter().filter(|service| is_compared(&service.name)) {
            let of = self.services.entry(service.name.clone()).or_default();
            if report.format < Report::FORMAT {
                of.untold = Some(now);
            }
            of.clients.extend(service.clients.iter().map(|client| (*client, now)));
            while of.clients.len() > MOST_CLIENTS {
                of.clients.pop_last();
            }
            of.take(run, service);
        }
    }

    /// Removes services that are not compared any more, and runs that are gone.
    pub(super) fn retain(&mut self, is_compared: impl Fn(&str) -> bool, is_there: impl Fn(&RunKey) -> bool) {
        self.services.retain(|name, _| is_compared(name));
        self.services.values_mut().for_each(|service| service.taken.retain(|run, _| is_there(run)));
    }

    /// Takes a service's new requests since the last call.
    pub(super) fn take(&mut self, service: &str, target: &str, stable: &str, now: Millis) -> News {
        let Some(of) = self.services.get_mut(service) else { return News { ended: Vec::new(), few_clients: false } };
        of.clients.retain(|_, seen| now.saturating_sub(*seen) <= CLIENTS);
        let of_either = |(version, event): (String, Event)| match version {
            version if version == target => event.request(true),
            version if version == stable => event.request(false),
            _ => None,
        };
        let ended = std::mem::take(&mut of.waiting).into_iter().filter_map(of_either).collect();
        let untold = of.untold.is_some_and(|time| now.saturating_sub(time) <= CLIENTS);
        News { ended, few_clients: untold || (1..MAX_CLIENTS).contains(&of.clients.len()) }
    }
}

impl OfService {
    fn take(&mut self, run: &RunKey, service: &ServiceReport) {
        let Some(events) = &service.events else { return };
        let taken = self.taken.insert(run.clone(), (events.stream.clone(), events.total));
        let is_same = |(stream, total): &(String, u64)| *stream == events.stream && *total <= events.total;
        let Some((_, total)) = taken.filter(is_same) else { return };
        let new = usize::try_from(events.total - total).unwrap_or(usize::MAX);
        let last = events.last.get(events.last.len().saturating_sub(new)..).unwrap_or_default();
        for event in last {
            if let Some(version) = service.versions.get(usize::from(event.2)) {
                self.waiting.push((version.name.clone(), *event));
            }
        }
        let too_many = self.waiting.len().saturating_sub(MOST_WAITING);
        self.waiting.drain(..too_many);
    }
}
