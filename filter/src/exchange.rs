//! One request and its answer: gets its version, and is counted for it when it ends, whichever way.

use crate::counters::VersionCounters;
use crate::headers::Headers;
use crate::host::{self, Map};
use crate::root::{InForce, Worker};
use std::rc::Rc;
use tideshift_core::outcome::Ending;
use tideshift_core::plan::Decision;
use tideshift_core::request::Request;
use tideshift_core::session::same_bytes;
use tideshift_core::{MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};

/// A request that is being answered.
pub struct Exchange {
    worker: Rc<Worker>,
    chosen: Option<Chosen>,
    /// What the answer gets: the session's cookie, and why.
    for_answer: Option<Box<ForAnswer>>,
    is_grpc: bool,
    /// Whether the whole answer has passed, all but trailers.
    is_whole: bool,
}

/// What was chosen for it. It is counted by the policy that chose, even if another is in force by the time it ends.
struct Chosen {
    in_force: Rc<InForce>,
    service: usize,
    counters: VersionCounters,
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
        Self { worker, chosen: None, for_answer: None, is_grpc: false, is_whole: false }
    }

    /// The request's headers are there: gives it its version.
    pub fn request(&mut self) {
        let headers = Headers::of_request();
        // A client must not choose by forging ours.
        for (name, _) in headers.iter().filter(|(name, _)| name.starts_with(OWN_HEADERS.as_bytes())) {
            host::remove_header(Map::Request, name);
        }
        let in_force = self.worker.in_force();
        let decision = self.worker.decide(&in_force, &headers);
        let explanation = explanation(&in_force, &headers, decision.as_ref());
        if let Some(decision) = decision {
            self.apply(&in_force, &headers, decision, explanation);
        } else if explanation.is_some() {
            self.for_answer = Some(Box::new(ForAnswer { cookie: None, explanation }));
        }
    }

    fn apply(
        &mut self,
        in_force: &Rc<InForce>,
        headers: &Headers,
        decision: Decision<'_>,
        explanation: Option<(String, String)>,
    ) {
        let Decision { service, version, cookie, mirror, .. } = decision;
        if cookie.is_some() || explanation.is_some() {
            self.for_answer = Some(Box::new(ForAnswer { cookie, explanation }));
        }
        let Some(counters) = in_force.counters.get(service) else { return };
        let version = version.and_then(|version| {
            let name = in_force.plan.services.get(service)?.versions.get(version)?;
            Some((name, *counters.versions.get(version)?))
        });
        let Some((name, counters)) = version else {
            counters.count_unrouted();
            return;
        };
        host::set_header(Map::Request, VERSION_HEADER, name);
        if let Some(cluster) = mirror {
            host::set_header(Map::Request, MIRROR_HEADER, cluster);
        }
        counters.started();
        self.is_grpc = headers.header("content-type").is_some_and(|kind| kind.starts_with(b"application/grpc"));
        self.chosen = Some(Chosen { counters, service, in_force: in_force.clone(), started: host::now() });
    }

    /// The answer's headers are there, and nothing else if `is_all`.
    pub fn answer(&mut self, is_all: bool) {
        self.is_whole = is_all;
        let Some(answer) = self.for_answer.take() else { return };
        if let Some(cookie) = answer.cookie {
            host::add_header(Map::Response, "set-cookie", &cookie);
        }
        if let Some((name, explanation)) = answer.explanation {
            host::set_header(Map::Response, &name, &explanation);
        }
    }

    /// A part of the answer's body is there, and nothing after it if `is_last`.
    pub fn answer_body(&mut self, is_last: bool) {
        self.is_whole |= is_last;
    }

    /// The exchange is over: counts how it ended.
    pub fn ended(mut self) {
        let Some(chosen) = self.chosen.take() else { return };
        let Some(service) = chosen.in_force.plan.services.get(chosen.service) else { return };
        let outcome = service.errors.outcome(&self.ending());
        chosen.counters.ended(outcome, host::now().saturating_sub(chosen.started));
    }

    /// What Envoy knows of the exchange now that it is over.
    fn ending(&self) -> Ending {
        let number = |text: &[u8]| std::str::from_utf8(text).ok()?.parse::<u32>().ok();
        let read = |map, name| host::header(map, name).and_then(|text| number(&text));
        let status = read(Map::Response, ":status").and_then(|status| u16::try_from(status).ok());
        let grpc_status = match self.is_grpc {
            true => read(Map::ResponseTrailers, "grpc-status").or_else(|| read(Map::Response, "grpc-status")),
            false => None,
        };
        // The flags are dear, and say nothing more of an answer that is whole and no failure.
        let speaks_for_itself = self.is_whole && status.is_some_and(|status| status < 500);
        let flags = if speaks_for_itself { None } else { host::property_integer("response\0flags") };
        Ending { status, grpc_status, flags: flags.unwrap_or_default() }
    }
}

/// The header that tells why, if the client asks and may know.
fn explanation(in_force: &InForce, headers: &Headers, decision: Option<&Decision<'_>>) -> Option<(String, String)> {
    let explain = in_force.explain.as_ref()?;
    let token = headers.header(&explain.header)?;
    // Upstreams need not know the token.
    host::remove_header(Map::Request, explain.header.as_bytes());
    let may_know = same_bytes(&token, explain.token.as_bytes());
    may_know.then(|| (explain.header.clone(), in_force.plan.explain(decision)))
}
