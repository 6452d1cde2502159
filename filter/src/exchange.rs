//! One request and its answer: gets its version, and is counted for it when it ends, whichever way.

use crate::counters::{Ended, PlanCounters, ServiceCounters, VersionCounters};
use crate::headers::{Headers, is_grpc};
use crate::host::{self, Map};
use crate::root::{InForce, Worker};
use std::rc::Rc;
use tideshift_core::outcome::{Ending, Outcome};
use tideshift_core::plan::{Chosen, Decision};
use tideshift_core::request::Request;
use tideshift_core::session::same_bytes;
use tideshift_core::websocket::Frames;
use tideshift_core::{MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};

const SWITCHING_PROTOCOLS: u16 = 101;

/// A request that is being answered.
pub struct Exchange {
    /// The root context that it is of.
    pub root: u32,
    worker: Rc<Worker>,
    taken: Option<Taken>,
    /// What the answer gets: the session's cookie, and why.
    for_answer: Option<Box<ForAnswer>>,
    /// How it ends, as far as that is known.
    ending: Ending,
    /// Whether the whole answer has passed.
    is_whole: bool,
    /// Of a WebSocket.
    frames: Option<Box<Frames>>,
}

/// What was chosen for it. It is counted by the policy that chose, even if another is in force by the time it ends.
struct Taken {
    in_force: Rc<InForce>,
    service: usize,
    version: usize,
    chosen: Chosen,
    is_compared: bool,
    user: Option<u32>,
    started: u64,
}

impl Taken {
    fn counters(&self) -> Option<(&PlanCounters, &VersionCounters)> {
        let counters = self.in_force.counters.get(self.service)?;
        Some((counters, counters.versions.get(self.version)?))
    }
}

struct ForAnswer {
    cookie: Option<String>,
    /// A header's name and value.
    explanation: Option<(String, String)>,
}

impl Exchange {
    /// A request that has just arrived at this worker.
    pub fn new(worker: Rc<Worker>, root: u32) -> Self {
        Self { root, worker, taken: None, for_answer: None, ending: Ending::default(), is_whole: false, frames: None }
    }

    /// The request's headers are there: gives it its version.
    pub fn request(&mut self) {
        if self.taken.is_some() {
            return;
        }
        let in_force = self.worker.in_force();
        let headers = in_force.headers();
        if let Headers::All(all) = &headers {
            // A client must not choose by forging ours.
            for (name, _) in all.iter().filter(|(name, _)| name.starts_with(OWN_HEADERS.as_bytes())) {
                host::remove_header(Map::Request, name);
            }
        }
        let decision = self.worker.decide(&in_force, &headers);
        let explanation = explanation(&in_force, &headers, decision.as_ref());
        let cookie = decision.as_ref().and_then(|decision| decision.cookie.clone());
        if cookie.is_some() || explanation.is_some() {
            self.for_answer = Some(Box::new(ForAnswer { cookie, explanation }));
        }
        let has_version = decision.is_some_and(|decision| self.apply(&in_force, &decision, &headers));
        if !has_version && matches!(headers, Headers::Few(..)) {
            // After an internal redirect they are those of the request before.
            host::remove_header(Map::Request, VERSION_HEADER.as_bytes());
            host::remove_header(Map::Request, MIRROR_HEADER.as_bytes());
        }
    }

    /// Marks the request with its version; whether there is one.
    fn apply(&mut self, in_force: &Rc<InForce>, decision: &Decision<'_>, headers: &Headers<'_>) -> bool {
        let service = decision.service;
        let Some(counters) = in_force.counters.get(service) else { return false };
        let version = decision.version.and_then(|version| {
            let name = in_force.plan.services.get(service)?.versions.get(version)?;
            Some((version, name, counters.versions.get(version)?))
        });
        let Some((version, name, of_version)) = version else {
            counters.service.count_unrouted();
            return false;
        };
        host::set_header(Map::Request, VERSION_HEADER, name);
        if let Some(cluster) = decision.mirror {
            host::set_header(Map::Request, MIRROR_HEADER, cluster);
        }
        // The answer's own type can be read no more when its trailers come, and costs more: most services have none.
        if counters.service.asks_for_kind() && headers.is_grpc() {
            counters.service.note_grpc();
            self.ending.is_grpc = true;
        }
        let &Decision { chosen, is_compared, user, .. } = decision;
        counters.service.started(of_version, chosen);
        let (in_force, started) = (in_force.clone(), host::now());
        self.taken = Some(Taken { in_force, service, version, chosen, is_compared, user, started });
        true
    }

    /// The answer's headers are there, and nothing else if `is_all`.
    pub fn answer(&mut self, is_all: bool) {
        if self.taken.is_some() {
            let status = host::header(Map::Response, ":status").and_then(|status| number(&status));
            self.ending.status = status.and_then(|status| u16::try_from(status).ok());
            self.is_whole = is_all;
            // Without a body there are no trailers: gRPC then has its status here.
            if is_all || self.ending.is_grpc {
                self.take_grpc_status(Map::Response);
            }
            self.frames = (self.ending.status == Some(SWITCHING_PROTOCOLS)).then(Box::default);
        }
        let Some(answer) = self.for_answer.take() else { return };
        if let Some(cookie) = answer.cookie {
            host::add_header(Map::Response, "set-cookie", &cookie);
        }
        if let Some((name, explanation)) = answer.explanation {
            host::set_header(Map::Response, &name, &explanation);
        }
    }

    /// So many bytes of the answer's body are there, and nothing after them if `is_last`.
    pub fn answer_body(&mut self, size: usize, is_last: bool) {
        self.is_whole |= is_last;
        if let Some(frames) = &mut self.frames {
            frames.pass(&host::answer_body(size));
        }
    }

    /// The answer's trailers are there.
    pub fn answer_trailers(&mut self) {
        self.is_whole = true;
        if self.taken.is_some() {
            self.take_grpc_status(Map::ResponseTrailers);
        }
    }

    /// The status of a gRPC answer; where it was not known before that this is one, its request's type is asked for.
    fn take_grpc_status(&mut self, map: Map) {
        let Some(status) = host::header(map, "grpc-status").and_then(|status| number(&status)) else { return };
        if !self.ending.is_grpc && !host::property("request\0headers\0content-type").is_some_and(|kind| is_grpc(&kind))
        {
            return;
        }
        self.ending.grpc_status = Some(status);
        if let Some((counters, _)) = self.taken.as_ref().and_then(Taken::counters) {
            counters.service.note_grpc();
        }
    }

    /// The exchange is over: counts how it ended.
    pub fn ended(mut self) {
        let Some(taken) = self.taken.take() else { return };
        let Some((PlanCounters { service, .. }, version)) = taken.counters() else { return };
        let Some(plan) = taken.in_force.plan.services.get(taken.service) else { return };
        let is_sampled = service.samples();
        let is_looked_at = is_sampled || service.asks_for_route(version);
        // The flags are dear, and hardly ever say more of an answer that is whole and no failure: that Envoy made it, and
        // was told to make it look well. A sample finds that out. A 404 may be Envoy's, which found no route.
        let failed = self.ending.status.is_none_or(|status| status >= 500) || self.ending.grpc_status.unwrap_or(0) > 0;
        let is_404 = self.ending.status == Some(404);
        if !self.is_whole || failed || is_404 || is_looked_at || service.are_answers_rewritten() {
            self.ending.flags = host::property_integer("response\0flags").unwrap_or_default();
        }
        self.ending.is_closed = self.frames.as_ref().is_some_and(|frames| frames.is_closed());
        if self.ending.goes_on() {
            service.redirected(version, taken.chosen);
            return;
        }
        let outcome = plan.errors.outcome(&self.ending);
        if self.is_whole && !failed && outcome == Outcome::Error && self.ending.flags != 0 {
            service.note_rewritten();
        }
        let found_no_route = self.ending.flags & NO_ROUTE != 0;
        if (is_looked_at && !self.is_at_home(service, version, outcome)) || found_no_route {
            service.misrouted(version, taken.chosen);
            return;
        }
        let nanoseconds = host::now().saturating_sub(taken.started);
        let Taken { chosen, is_compared, user, .. } = taken;
        service.ended(version, &Ended { chosen, is_compared, user, outcome, nanoseconds, is_sampled });
    }

    /// Whether it went to its version's cluster.
    fn is_at_home(&self, service: &ServiceCounters, version: &VersionCounters, outcome: Outcome) -> bool {
        let cluster = host::property("xds\0cluster_name").filter(|cluster| !cluster.is_empty());
        // A client that went away, or a cluster that is not there, leaves no trace of a cluster. An answer that Envoy was
        // told to give, or a redirection, has no flag.
        if cluster.is_none() && (outcome == Outcome::Cancelled || self.ending.flags & !NO_ROUTE != 0) {
            return true;
        }
        service.reached(version, cluster.as_deref())
    }
}

/// Envoy's response flag for a request that no route was found for.
const NO_ROUTE: u64 = 0x100;

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The header that tells why, if the client asks and may know.
fn explanation(in_force: &InForce, headers: &Headers<'_>, decision: Option<&Decision<'_>>) -> Option<(String, String)> {
    let explain = in_force.explain.as_ref()?;
    let token = headers.header(&explain.header)?;
    // Upstreams need not know the token.
    host::remove_header(Map::Request, explain.header.as_bytes());
    let may_know = same_bytes(&token, explain.token.as_bytes());
    may_know.then(|| (explain.header.clone(), in_force.plan.explain(decision)))
}
