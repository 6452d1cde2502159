//! Single requests that proxies tell while versions are compared, until the verdict takes them; and whether a service has
//! only a few clients.

use crate::clock::Millis;
use crate::reconciler::ledger::RunKey;
use std::collections::BTreeMap;
use tideshift_core::protocol::report::{Event, MAX_CLIENTS, Report, ServiceReport};
use tideshift_core::verdict::Request;

/// Clients are remembered for so long, in milliseconds.
const CLIENTS: Millis = 300_000;
/// The most clients of a service that are remembered, those with the smallest hashes.
const MOST_CLIENTS: usize = 64;
/// The most requests of a service that wait for the verdict; the oldest go first.
const MOST_WAITING: usize = 20_000;

/// By service. Not kept: what was on its way when the controller ended is lost, and no evidence is made of it.
#[derive(Debug, Default)]
pub(super) struct Requests {
    services: BTreeMap<String, OfService>,
}

#[derive(Debug, Default)]
struct OfService {
    /// Up to where the requests of each run have been taken: the stream, and how many of it.
    taken: BTreeMap<RunKey, (String, u64)>,
    /// Each with its version's name.
    waiting: Vec<(String, Event)>,
    clients: BTreeMap<u32, Millis>,
    /// When a filter reported last that does not tell clients apart. Its requests are judged by their counts, as they were
    /// then.
    untold: Option<Millis>,
}

/// What is new of two versions.
pub(super) struct News {
    /// Requests of either.
    pub(super) ended: Vec<Request>,
    /// Whether the service has only a few clients.
    pub(super) few_clients: bool,
}

impl Requests {
    /// Takes in what a proxy reports of services that are compared. Of a run that is heard of for the first time only
    /// those that come after: the others may be old.
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

    /// Forgets the services that are gone, and the runs that are.
    pub(super) fn retain(&mut self, is_compared: impl Fn(&str) -> bool, is_there: impl Fn(&RunKey) -> bool) {
        self.services.retain(|name, _| is_compared(name));
        self.services.values_mut().for_each(|service| service.taken.retain(|run, _| is_there(run)));
    }

    /// What is new of a service since this was last asked.
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
