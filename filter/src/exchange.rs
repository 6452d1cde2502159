//! One request and its answer: gets its version, and is counted for it when it ends, whichever way.

use crate::headers::Headers;
use crate::host::{self, Map};
use crate::root::{InForce, Worker};
use std::rc::Rc;
use tideshift_core::outcome::Ending;
use tideshift_core::plan::Decision;
use tideshift_core::request::Request;
use tideshift_core::session::same_bytes;
use tideshift_core::websocket::Frames;
use tideshift_core::{MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};

const SWITCHING_PROTOCOLS: u16 = 101;

/// A request that is being answered.
pub struct Exchange {
    worker: Rc<Worker>,
    chosen: Option<Chosen>,
    /// What the answer gets: the session's cookie, and why.
    for_answer: Option<Box<ForAnswer>>,
    /// How it ends, as far as that is known.
    ending: Ending,
    /// Whether the whole answer has passed.
    is_whole: bool,
    is_grpc: bool,
    /// Of a WebSocket.
    frames: Option<Box<Frames>>,
}

/// What was chosen for it. It is counted by the policy that chose, even if another is in force by the time it ends.
struct Chosen {
    in_force: Rc<InForce>,
    service: usize,
    version: usize,
    started: u64,
}

struct ForAnswer {
    cookie: Option<String>,
    /// A header's name and value.
    explanation: Option<(String, String)>,
}

impl Exchange {
    /// A request that has just arrived at this worker.
    pub fn new(worker: Rc<Worker>) -> Self {
        Self {
            worker,
            chosen: None,
            for_answer: None,
            ending: Ending::default(),
            is_whole: false,
            is_grpc: false,
            frames: None,
        }
    }

    /// The request's headers are there: gives it its version.
    pub fn request(&mut self) {
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
        if let Some(decision) = decision {
            // The answer's own type can be read no more when its trailers come, and costs more: most requests have none.
            self.is_grpc = headers.is_grpc();
            self.apply(&in_force, &decision);
        }
    }

    fn apply(&mut self, in_force: &Rc<InForce>, decision: &Decision<'_>) {
        let service = decision.service;
        let Some(counters) = in_force.counters.get(service) else { return };
        let version = decision.version.and_then(|version| {
            let name = in_force.plan.services.get(service)?.versions.get(version)?;
            Some((version, name, counters.versions.get(version)?))
        });
        let Some((version, name, counters)) = version else {
            counters.count_unrouted();
            return;
        };
        host::set_header(Map::Request, VERSION_HEADER, name);
        if let Some(cluster) = decision.mirror {
            host::set_header(Map::Request, MIRROR_HEADER, cluster);
        }
        counters.started();
        self.chosen = Some(Chosen { in_force: in_force.clone(), service, version, started: host::now() });
    }

    /// The answer's headers are there, and nothing else if `is_all`.
    pub fn answer(&mut self, is_all: bool) {
        if self.chosen.is_some() {
            let status = host::header(Map::Response, ":status").and_then(|status| number(&status));
            self.ending.status = status.and_then(|status| u16::try_from(status).ok());
            self.is_whole = is_all;
            self.heed_grpc_status(Map::Response);
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
        if self.chosen.is_some() {
            self.heed_grpc_status(Map::ResponseTrailers);
        }
    }

    /// gRPC has its own status, in the trailers or, where there is nothing else, in the headers.
    fn heed_grpc_status(&mut self, map: Map) {
        if self.is_grpc {
            self.ending.grpc_status = host::header(map, "grpc-status").and_then(|status| number(&status));
        }
    }

    /// The exchange is over: counts how it ended.
    pub fn ended(mut self) {
        let Some(Chosen { in_force, service, version, started }) = self.chosen.take() else { return };
        // The flags are dear, and say nothing more of an answer that is whole and no failure.
        let failed = self.ending.status.is_none_or(|status| status >= 500) || self.ending.grpc_status.unwrap_or(0) > 0;
        if !self.is_whole || failed {
            self.ending.flags = host::property_integer("response\0flags").unwrap_or_default();
        }
        self.ending.is_closed = self.frames.is_some_and(|frames| frames.is_closed());
        let Some(plan) = in_force.plan.services.get(service) else { return };
        let Some(counters) = in_force.counters.get(service).and_then(|service| service.versions.get(version)) else {
            return;
        };
        match self.ending.goes_on() {
            true => counters.redirected(),
            false => counters.ended(plan.errors.outcome(&self.ending), host::now().saturating_sub(started)),
        }
    }
}

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
