//! One request and its response: gets its version, and is counted for it when it ends, whichever way.

use crate::active_policy::{ActivePolicy, Router};
use crate::counters::{Ended, PlanCounters, ServiceCounters, VersionCounters};
use crate::host::{HeaderList, HeaderMap, Host};
use crate::request_headers::{RequestHeaders, is_grpc};
use std::rc::Rc;
use tideshift_core::choice::plan::{Chosen, Decision};
use tideshift_core::counting::websocket::Frames;
use tideshift_core::matching::request::Request;
use tideshift_core::outcome::{Ending, Outcome};
use tideshift_core::session::same_bytes;
use tideshift_core::{MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};

const SWITCHING_PROTOCOLS: u16 = 101;
/// Envoy's response flag for a request that no route was found for.
const NO_ROUTE: u64 = 0x100;

/// A request that is being answered.
pub struct HttpContext<H: Host> {
    /// The root context that it is of.
    pub root: u32,
    router: Rc<Router<H>>,
    taken: Option<Taken>,
    for_response: Option<Box<ForResponse>>,
    /// How it ends, as far as that is known.
    ending: Ending,
    /// Whether the whole response has passed.
    is_whole: bool,
    /// Of a WebSocket.
    frames: Option<Box<Frames>>,
}

/// What was chosen for it. It is counted by the policy that chose, even if another is in force by the time it ends.
struct Taken {
    policy: Rc<ActivePolicy>,
    service: usize,
    version: usize,
    chosen: Chosen,
    is_compared: bool,
    user: Option<u32>,
    started: u64,
}

impl Taken {
    fn counters(&self) -> Option<(&PlanCounters, &VersionCounters)> {
        let counters = self.policy.counters.get(self.service)?;
        Some((counters, counters.versions.get(self.version)?))
    }
}

/// What is added to the response.
struct ForResponse {
    /// The session's cookie.
    cookie: Option<String>,
    /// A header that tells why: its name and value.
    explanation: Option<(String, String)>,
}

impl<H: Host> HttpContext<H> {
    /// A request that has just arrived, for the root context of this number.
    pub fn new(router: Rc<Router<H>>, root: u32) -> Self {
        let ending = Ending::default();
        Self { root, router, taken: None, for_response: None, ending, is_whole: false, frames: None }
    }

    fn host(&self) -> &H {
        &self.router.host
    }

    /// The request's headers are there: gives it its version.
    pub fn request_headers(&mut self) {
        if self.taken.is_some() {
            return;
        }
        let host = self.host().clone();
        let policy = self.router.active();
        let headers = policy.headers(&host);
        if let RequestHeaders::All(all) = &headers {
            // A client must not choose by forging ours.
            for (name, _) in all.iter().filter(|(name, _)| name.starts_with(OWN_HEADERS.as_bytes())) {
                host.remove_header(HeaderMap::Request, name);
            }
        }
        let decision = self.router.decide(&policy, &headers);
        let explanation = explanation(&host, &policy, &headers, decision.as_ref());
        let cookie = decision.as_ref().and_then(|decision| decision.cookie.clone());
        if cookie.is_some() || explanation.is_some() {
            self.for_response = Some(Box::new(ForResponse { cookie, explanation }));
        }
        let has_version = decision.is_some_and(|decision| self.apply(&policy, &decision, &headers));
        if !has_version && matches!(headers, RequestHeaders::Few(..)) {
            // After an internal redirect they are those of the request before.
            host.remove_header(HeaderMap::Request, VERSION_HEADER.as_bytes());
            host.remove_header(HeaderMap::Request, MIRROR_HEADER.as_bytes());
        }
    }

    /// Marks the request with its version; whether there is one.
    fn apply(&mut self, policy: &Rc<ActivePolicy>, decision: &Decision<'_>, headers: &RequestHeaders<'_, H>) -> bool {
        let service = decision.service;
        let Some(counters) = policy.counters.get(service) else { return false };
        let version = decision.version.and_then(|version| {
            let name = policy.plan.services.get(service)?.versions.get(version)?;
            Some((version, name, counters.versions.get(version)?))
        });
        let Some((version, name, of_version)) = version else {
            counters.service.count_unrouted();
            return false;
        };
        self.host().set_header(HeaderMap::Request, VERSION_HEADER, name);
        if let Some(cluster) = decision.mirror {
            self.host().set_header(HeaderMap::Request, MIRROR_HEADER, cluster);
        }
        // The response's own type can no longer be read when its trailers come, and costs more: most services have none.
        if counters.service.asks_for_kind() && headers.is_grpc(self.host()) {
            counters.service.note_grpc();
            self.ending.is_grpc = true;
        }
        let &Decision { chosen, is_compared, user, .. } = decision;
        counters.service.started(of_version, chosen);
        let (policy, started) = (policy.clone(), self.host().now());
        self.taken = Some(Taken { policy, service, version, chosen, is_compared, user, started });
        true
    }

    /// The response's headers are there, and nothing else if `is_last`.
    pub fn response_headers(&mut self, is_last: bool) {
        if self.taken.is_some() {
            let status = self.host().header(HeaderMap::Response, ":status").and_then(|status| number(&status));
            self.ending.status = status.and_then(|status| u16::try_from(status).ok());
            self.is_whole = is_last;
            // Without a body there are no trailers: gRPC then has its status here.
            if is_last || self.ending.is_grpc {
                self.take_grpc_status(HeaderMap::Response);
            }
            self.frames = (self.ending.status == Some(SWITCHING_PROTOCOLS)).then(Box::default);
        }
        let Some(response) = self.for_response.take() else { return };
        if let Some(cookie) = response.cookie {
            self.host().add_header(HeaderMap::Response, "set-cookie", &cookie);
        }
        if let Some((name, explanation)) = response.explanation {
            self.host().set_header(HeaderMap::Response, &name, &explanation);
        }
    }

    /// So many bytes of the response's body are there, and nothing after them if `is_last`.
    pub fn response_body(&mut self, size: usize, is_last: bool) {
        self.is_whole |= is_last;
        if let Some(frames) = &mut self.frames {
            frames.pass(&self.router.host.response_body(size));
        }
    }

    /// The response's trailers are there.
    pub fn response_trailers(&mut self) {
        self.is_whole = true;
        if self.taken.is_some() {
            self.take_grpc_status(HeaderMap::ResponseTrailers);
        }
    }

    /// The status of a gRPC response; where it was not known before that this is one, its request's type is asked for.
    fn take_grpc_status(&mut self, map: HeaderMap) {
        let Some(status) = self.host().header(map, "grpc-status").and_then(|status| number(&status)) else { return };
        let content_type = || self.host().property("request\0headers\0content-type");
        if !self.ending.is_grpc && !content_type().is_some_and(|kind| is_grpc(&kind)) {
            return;
        }
        self.ending.grpc_status = Some(status);
        if let Some((counters, _)) = self.taken.as_ref().and_then(Taken::counters) {
            counters.service.note_grpc();
        }
    }

    /// The request is over: counts how it ended.
    pub fn done(mut self) {
        let Some(taken) = self.taken.take() else { return };
        let Some((PlanCounters { service, .. }, version)) = taken.counters() else { return };
        let Some(plan) = taken.policy.plan.services.get(taken.service) else { return };
        let is_sampled = service.samples();
        let is_looked_at = is_sampled || service.asks_for_route(version);
        let failed = self.ending.status.is_none_or(|status| status >= 500) || self.ending.grpc_status.unwrap_or(0) > 0;
        if failed || is_looked_at || self.may_have_flags(service) {
            self.ending.flags = self.host().integer_property("response\0flags").unwrap_or_default();
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
        if (is_looked_at && !self.reached_version(service, version, outcome)) || found_no_route {
            service.misrouted(version, taken.chosen);
            return;
        }
        let nanoseconds = self.host().now().saturating_sub(taken.started);
        let Taken { chosen, is_compared, user, .. } = taken;
        let ended = Ended { chosen, is_compared, user, outcome, nanoseconds, is_sampled };
        service.ended(self.host(), version, &ended);
    }

    /// Whether the response flags may say more than a status that is no failure. They are expensive to read, and hardly
    /// ever say more of a response that is whole: that Envoy made it and `local_reply_config` changed its status. A sample
    /// finds that out. A 404 may be Envoy's, which found no route.
    fn may_have_flags(&self, service: &ServiceCounters) -> bool {
        !self.is_whole || self.ending.status == Some(404) || service.are_answers_rewritten()
    }

    /// Whether it went to its version's cluster.
    fn reached_version(&self, service: &ServiceCounters, version: &VersionCounters, outcome: Outcome) -> bool {
        let cluster = self.host().property("xds\0cluster_name").filter(|cluster| !cluster.is_empty());
        // A client that went away, or a cluster that is not there, leaves no trace of a cluster. A direct response or a
        // redirection has no flag.
        if cluster.is_none() && (outcome == Outcome::Cancelled || self.ending.flags & !NO_ROUTE != 0) {
            return true;
        }
        service.reached(version, cluster.as_deref())
    }
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The header that tells why, if the client asks and may know.
fn explanation<H: Host>(
    host: &H,
    policy: &ActivePolicy,
    headers: &RequestHeaders<'_, H>,
    decision: Option<&Decision<'_>>,
) -> Option<(String, String)> {
    let explain = policy.explain.as_ref()?;
    let token = headers.header(&explain.header)?;
    // Upstreams need not know the token.
    host.remove_header(HeaderMap::Request, explain.header.as_bytes());
    let may_know = same_bytes(&token, explain.token.as_bytes());
    may_know.then(|| (explain.header.clone(), policy.plan.explain(decision)))
}
