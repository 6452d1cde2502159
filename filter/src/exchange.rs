//! One request and its answer: gets its version, and is counted for it when it ends, whichever way.

use crate::counters::VersionCounters;
use crate::headers::Headers;
use crate::host::{self, Map};
use crate::root::{InForce, Worker};
use std::rc::Rc;
use tideshift_core::outcome::Ending;
use tideshift_core::{OWN_HEADERS, VERSION_HEADER};

/// A request that is being answered.
pub struct Exchange {
    worker: Rc<Worker>,
    chosen: Option<Chosen>,
}

/// What was chosen for it. It is counted by the policy that chose, even if another is in force by the time it ends.
struct Chosen {
    in_force: Rc<InForce>,
    service: usize,
    counters: VersionCounters,
    started: u64,
}

impl Exchange {
    /// A request that has just arrived at this worker.
    pub fn new(worker: Rc<Worker>) -> Self {
        Self { worker, chosen: None }
    }

    /// The request's headers are there: gives it its version.
    pub fn request(&mut self) {
        let headers = Headers::of_request();
        // A client must not choose by forging ours.
        for (name, _) in headers.iter().filter(|(name, _)| name.starts_with(OWN_HEADERS.as_bytes())) {
            host::remove_header(Map::Request, name);
        }
        let in_force = self.worker.in_force();
        let Some(route) = in_force.plan.route(&headers) else { return };
        let Some(counters) = in_force.counters.get(route.service) else { return };
        let version = self.worker.choose(route.split).and_then(|version| {
            let name = in_force.plan.services.get(route.service)?.versions.get(version)?;
            Some((name, *counters.versions.get(version)?))
        });
        let Some((name, counters)) = version else {
            counters.count_unrouted();
            return;
        };
        host::set_header(Map::Request, VERSION_HEADER, name);
        counters.started();
        self.chosen =
            Some(Chosen { counters, service: route.service, in_force: in_force.clone(), started: host::now() });
    }

    /// The exchange is over: counts how it ended.
    pub fn ended(mut self) {
        let Some(chosen) = self.chosen.take() else { return };
        let Some(service) = chosen.in_force.plan.services.get(chosen.service) else { return };
        let outcome = service.errors.outcome(&ending());
        chosen.counters.ended(outcome, host::now().saturating_sub(chosen.started));
    }
}

/// What Envoy knows of the exchange now that it is over. The flags are read each time: only they tell an answer that
/// broke off, after a status that looked fine, from a whole one.
fn ending() -> Ending {
    let number = |text: &[u8]| std::str::from_utf8(text).ok()?.parse::<u32>().ok();
    let grpc_status =
        || host::header(Map::ResponseTrailers, "grpc-status").or_else(|| host::header(Map::Response, "grpc-status"));
    let status = host::header(Map::Response, ":status").and_then(|status| number(&status));
    Ending {
        status: status.and_then(|status| u16::try_from(status).ok()),
        grpc_status: grpc_status().and_then(|status| number(&status)),
        flags: host::property_integer("response\0flags").unwrap_or_default(),
    }
}
