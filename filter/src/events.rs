//! Single requests that the next reports tell, gathered from all VMs by the one that leads.

use crate::totals::News;
use std::collections::{BTreeMap, VecDeque};
use tideshift_core::counting::tallies::ServiceTally;
use tideshift_core::protocol::report::{Event, Events, MAX_EVENTS};

/// The last of each service.
#[derive(Default)]
pub struct EventLog {
    /// Names the VM that counts them.
    stream: u32,
    services: BTreeMap<String, Log>,
}

#[derive(Default)]
struct Log {
    total: u64,
    /// Each with its version's name.
    last: VecDeque<(String, Event)>,
}

impl EventLog {
    /// Takes in what is new, on the VM of this number.
    pub fn add(&mut self, vm: u32, news: &News) {
        self.stream = vm;
        for (service, events) in news {
            let log = self.services.entry(service.clone()).or_default();
            log.total = log.total.saturating_add(events.len() as u64);
            log.last.extend(events.iter().cloned());
            let too_many = log.last.len().saturating_sub(MAX_EVENTS);
            log.last.drain(..too_many);
        }
    }

    /// Those of a service; their versions as indexes of its tally's.
    pub fn of(&self, tally: &ServiceTally) -> Option<Events> {
        let log = self.services.get(&tally.name)?;
        let event = |(name, event): &(String, Event)| {
            let version = tally.versions.iter().position(|version| version.name == *name)?;
            let &Event(client, user, _, outcome, flags, duration) = event;
            Some(Event(client, user, u16::try_from(version).ok()?, outcome, flags, duration))
        };
        // None is left out, or the number of the last ones would not fit the total.
        let last = log.last.iter().map(|of| event(of).unwrap_or(Event(0, 0, u16::MAX, u8::MAX, 0, 0)));
        Some(Events { stream: format!("{:x}", self.stream), total: log.total, last: last.collect() })
    }
}
