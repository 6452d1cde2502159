//! Sends many requests over keep-alive connections, with an exact count of responses by backend.
//!
//! Every request that was sent is counted once: answered, failed or still in flight. A connection that the server
//! closed between two requests is reopened and is no failure; a request without a complete response is one, and so is
//! one that its client cancelled.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Collected, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use crate::backend::SERVED_BY;
use crate::client::connect_from;

/// Stands for the version in a [`Tally`] if a response names no backend, such as Envoy's own 503.
pub const NOBODY: &str = "-";

/// How often a request is retried on a new connection if the old one was closed before it was sent.
const STALE_CONNECTIONS: usize = 3;

/// The address of the first of many callers; the others follow it.
const FIRST_CALLER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// The parameters of a load; by default a closed loop of `GET /` over 4 connections until it is stopped.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The address to call.
    pub address: SocketAddr,
    /// The `host` header.
    pub host: String,
    /// Path and query.
    pub path: String,
    /// Additional headers of each request.
    pub headers: Vec<(String, String)>,
    /// Connections, each with at most one request at a time.
    pub connections: usize,
    /// Requests per second of all connections together; `None`: each connection sends as fast as it gets responses.
    pub rate: Option<f64>,
    /// Ends after this many requests.
    pub requests: Option<u64>,
    /// Client addresses of the loopback interface, used by the connections in turn; empty: 127.0.0.1 for all.
    pub sources: Vec<Ipv4Addr>,
    /// A client cancels after this long without a complete response and closes its connection.
    pub patience: Option<Duration>,
    /// The message of unary gRPC calls over HTTP/2, instead of `GET`; a response without `grpc-status: 0` is a failure.
    pub grpc: Option<&'static [u8]>,
}

impl Plan {
    /// A plan with the defaults.
    pub fn new(address: SocketAddr, host: &str) -> Self {
        Self {
            address,
            host: host.to_owned(),
            path: "/".to_owned(),
            headers: Vec::new(),
            connections: 4,
            rate: None,
            requests: None,
            sources: Vec::new(),
            patience: None,
            grpc: None,
        }
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the number of connections.
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections;
        self
    }

    /// Sends at this rate instead of a closed loop.
    pub fn rate(mut self, per_second: f64) -> Self {
        self.rate = Some(per_second);
        self
    }

    /// Sends from this many client addresses, each over its own connection.
    pub fn callers(mut self, callers: usize) -> Self {
        let first = u32::from(FIRST_CALLER);
        self.sources = (first..).take(callers).map(Ipv4Addr::from).collect();
        self.connections(callers)
    }

    /// Clients cancel after this long.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Sends unary gRPC calls that a backend of [`Mode::Grpc`](crate::backend::Mode::Grpc) answers at once.
    #[cfg(feature = "streams")]
    pub fn grpc(mut self) -> Self {
        crate::grpc::UNARY.clone_into(&mut self.path);
        self.grpc = Some(crate::grpc::EMPTY_SCRIPT);
        self
    }

    /// Starts it; it ends with [`Load::stop`].
    pub fn start(self) -> Load {
        Load::start(self)
    }

    /// Sends exactly `requests` and returns their tally.
    pub async fn run(mut self, requests: u64) -> anyhow::Result<Tally> {
        self.requests = Some(requests);
        Load::start(self).finish().await
    }
}

/// The counts of a load: responses by version, and failures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that were sent.
    pub sent: u64,
    /// Requests with a complete response.
    pub answered: u64,
    /// Requests that ended without a complete response.
    pub failed: u64,
    /// Those that the client cancelled.
    pub gave_up: u64,
    /// Responses by version ([`NOBODY`] if none was named) and status.
    pub by: BTreeMap<(String, u16), u64>,
    /// When the versions were called and when they failed.
    pub times: BTreeMap<String, Times>,
    /// The messages of the first failures.
    pub failures: Vec<String>,
}

/// When clients called a version, as far as it answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// When the latest of its requests was sent.
    pub last_sent: Instant,
    /// When its first response with a status of 500 or above arrived.
    pub first_error: Option<Instant>,
}

impl Tally {
    fn add(&mut self, sent: Instant, (version, status): (String, u16)) {
        let times = self.times.entry(version.clone()).or_insert(Times { last_sent: sent, first_error: None });
        times.last_sent = times.last_sent.max(sent);
        if status >= 500 {
            times.first_error.get_or_insert_with(Instant::now);
        }
        self.answered += 1;
        *self.by.entry((version, status)).or_default() += 1;
    }

    /// Responses of `version` with any status.
    pub fn of(&self, version: &str) -> u64 {
        self.count(|name, _| name == version)
    }

    /// Responses of any version with a status in this class: 2 for 200 to 299.
    pub fn class(&self, class: u16) -> u64 {
        self.count(|_, status| status / 100 == class)
    }

    /// Responses of `version` with a status in this class.
    pub fn of_class(&self, version: &str, class: u16) -> u64 {
        self.count(|name, status| name == version && status / 100 == class)
    }

    /// The fraction of all responses that came from `version`, 0 to 1.
    pub fn share(&self, version: &str) -> f64 {
        if self.answered == 0 { 0.0 } else { self.of(version) as f64 / self.answered as f64 }
    }

    /// Requests that failed from a user's point of view: no complete response, or a status of 500 or above.
    pub fn bad(&self) -> u64 {
        self.failed + self.count(|_, status| status >= 500)
    }

    /// The increase since `earlier`, a tally of the same load; its times are this one's.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut by = self.by.clone();
        by.retain(|key, count| {
            *count -= earlier.by.get(key).copied().unwrap_or_default().min(*count);
            *count > 0
        });
        Self {
            sent: self.sent - earlier.sent.min(self.sent),
            answered: self.answered - earlier.answered.min(self.answered),
            failed: self.failed - earlier.failed.min(self.failed),
            gave_up: self.gave_up - earlier.gave_up.min(self.gave_up),
            by,
            times: self.times.clone(),
            failures: self.failures.get(earlier.failures.len()..).unwrap_or_default().to_vec(),
        }
    }

    fn count(&self, wanted: impl Fn(&str, u16) -> bool) -> u64 {
        self.by.iter().filter(|((name, status), _)| wanted(name, *status)).map(|(_, count)| count).sum()
    }
}

/// A running load; dropping it ends it without waiting for responses in flight.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    connections: JoinSet<anyhow::Result<()>>,
}

#[derive(Debug)]
struct Shared {
    plan: Plan,
    begun: Instant,
    next: AtomicU64,
    stopping: AtomicBool,
    tally: Mutex<Tally>,
}

impl Load {
    /// Starts sending.
    pub fn start(plan: Plan) -> Self {
        let wanted = plan.connections;
        let shared = Arc::new(Shared {
            plan,
            begun: Instant::now(),
            next: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            tally: Mutex::default(),
        });
        let mut connections = JoinSet::new();
        for number in 0..wanted {
            connections.spawn(Arc::clone(&shared).send_all(number));
        }
        Self { shared, connections }
    }

    /// The current tally.
    pub fn tally(&self) -> Tally {
        self.shared.tally().clone()
    }

    /// Stops sending, waits for the responses in flight and returns the final tally: every request was either answered
    /// or failed.
    pub async fn stop(self) -> anyhow::Result<Tally> {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.finish().await
    }

    async fn finish(mut self) -> anyhow::Result<Tally> {
        while let Some(ended) = self.connections.join_next().await {
            ended.context("a connection of the load panicked")??;
        }
        Ok(self.tally())
    }
}

impl Shared {
    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop of one connection: take the next request's number, wait for its time, send it.
    async fn send_all(self: Arc<Self>, number: usize) -> anyhow::Result<()> {
        let source = self.plan.sources.get(number % self.plan.sources.len().max(1)).copied();
        let mut connection = None;
        while let Some(due) = self.take() {
            sleep_until(due).await;
            if self.stopping.load(Ordering::Relaxed) {
                break;
            }
            self.tally().sent += 1;
            let sent = Instant::now();
            let error = match self.send_patiently(source, &mut connection).await {
                Ok(Some(answer)) => {
                    self.tally().add(sent, answer);
                    continue;
                }
                Ok(None) => None,
                Err(error) => Some(error),
            };
            connection = None;
            let mut tally = self.tally();
            tally.failed += 1;
            match error {
                None => tally.gave_up += 1,
                Some(error) if tally.failures.len() < 20 => tally.failures.push(format!("{error:#}")),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// When the next request is due; `None` when there is none.
    fn take(&self) -> Option<Instant> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let over = self.stopping.load(Ordering::Relaxed) || self.plan.requests.is_some_and(|last| number >= last);
        let after = self.plan.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(number as f64 / rate));
        (!over).then(|| self.begun + after)
    }

    /// `None`: the client cancelled.
    async fn send_patiently(
        &self,
        source: Option<Ipv4Addr>,
        connection: &mut Option<Connection>,
    ) -> anyhow::Result<Option<(String, u16)>> {
        let answer = self.send(source, connection);
        match self.plan.patience {
            None => answer.await.map(Some),
            Some(patience) => timeout(patience, answer).await.ok().transpose(),
        }
    }

    async fn send(
        &self,
        source: Option<Ipv4Addr>,
        connection: &mut Option<Connection>,
    ) -> anyhow::Result<(String, u16)> {
        for _ in 0..STALE_CONNECTIONS {
            let open = match connection {
                Some(open) => open,
                None => connection.insert(Connection::open(&self.plan, source).await?),
            };
            if open.ready().await.is_err() {
                *connection = None;
                continue;
            }
            match open.send(self.request()?).await {
                Ok(response) => {
                    let version =
                        response.headers().get(SERVED_BY).map(|name| String::from_utf8_lossy(name.as_bytes()));
                    let answer = (version.as_deref().unwrap_or(NOBODY).to_owned(), response.status().as_u16());
                    let (head, body) = response.into_parts();
                    let body = body.collect().await.context("the answer broke off")?;
                    if self.plan.grpc.is_some() {
                        let status = grpc_status(&head.headers, &body);
                        ensure!(status == Some("0"), "{}: the gRPC status is {status:?}", answer.0);
                    }
                    return Ok(answer);
                }
                // hyper reports "canceled" for a request of which not one byte was sent.
                Err(error) if error.is_canceled() => *connection = None,
                Err(error) => return Err(error).context("no answer"),
            }
        }
        bail!("the server closed {STALE_CONNECTIONS} connections before a request could be sent")
    }

    fn request(&self) -> anyhow::Result<Request<Full<Bytes>>> {
        let Plan { host, path, .. } = &self.plan;
        let (mut request, body) = match self.plan.grpc {
            None => (Request::get(path).header("host", host), Bytes::new()),
            Some(message) => {
                let request = Request::post(format!("http://{host}{path}"));
                let request = request.header("content-type", "application/grpc").header("te", "trailers");
                (request, Bytes::from_static(message))
            }
        };
        for (name, value) in &self.plan.headers {
            request = request.header(name, value);
        }
        request.body(Full::new(body)).context("the plan is not a valid request")
    }
}

/// The status in trailers, or in the headers of a response without a body.
fn grpc_status<'a>(headers: &'a HeaderMap, body: &'a Collected<Bytes>) -> Option<&'a str> {
    let status = body.trailers().and_then(|trailers| trailers.get("grpc-status"));
    status.or_else(|| headers.get("grpc-status"))?.to_str().ok()
}

/// An open connection; dropping it closes it, even while a request is in flight.
struct Connection {
    requests: Requests,
    driver: AbortHandle,
}

enum Requests {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    async fn open(plan: &Plan, source: Option<Ipv4Addr>) -> anyhow::Result<Self> {
        let stream = match source {
            None => TcpStream::connect(plan.address).await,
            Some(source) => connect_from(source, plan.address).await,
        };
        let stream = stream.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let stream = TokioIo::new(stream);
        // The errors of a driver reach its requests as well.
        let (requests, driver) = if plan.grpc.is_some() {
            let handshake = http2::handshake(TokioExecutor::new(), stream).await;
            let (requests, connection) = handshake.context("cannot connect")?;
            (Requests::Http2(requests), tokio::spawn(connection).abort_handle())
        } else {
            let (requests, connection) = http1::handshake(stream).await.context("cannot connect")?;
            (Requests::Http1(requests), tokio::spawn(connection).abort_handle())
        };
        Ok(Self { requests, driver })
    }

    async fn ready(&mut self) -> hyper::Result<()> {
        match &mut self.requests {
            Requests::Http1(requests) => requests.ready().await,
            Requests::Http2(requests) => requests.ready().await,
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match &mut self.requests {
            Requests::Http1(requests) => requests.send_request(request).await,
            Requests::Http2(requests) => requests.send_request(request).await,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Errors, Mode};
    use crate::wait::eventually;

    #[tokio::test]
    async fn tallies_each_request_once() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.errors = Errors { bad: 1, of: 10 });
        let tally = Plan::new(backend.address(), "any").run(1000).await.unwrap();
        assert_eq!((tally.sent, tally.answered, tally.failed), (1000, 1000, 0));
        assert_eq!((tally.of_class("v1", 2), tally.of_class("v1", 5), tally.bad()), (900, 100, 100));
        assert_eq!((backend.counts().requests, backend.counts().errors), (1000, 100));
    }

    #[tokio::test]
    async fn a_broken_answer_is_a_failure() {
        let backend = Backend::start("v1").await.unwrap();
        for mode in [Mode::Reset, Mode::ResetInBody] {
            backend.set(|behaviour| behaviour.mode = mode);
            let tally = Plan::new(backend.address(), "any").connections(1).run(3).await.unwrap();
            assert_eq!((tally.sent, tally.answered, tally.failed), (3, 0, 3), "{mode:?}: {tally:?}");
        }
        assert_eq!(backend.counts().requests, 6);
    }

    #[tokio::test]
    async fn a_connection_closed_between_requests_is_no_failure() {
        let backend = Backend::start("v1").await.unwrap();
        let load = Plan::new(backend.address(), "any").connections(1).rate(20.0).start();
        for _ in 0..3 {
            let seen = load.tally().answered;
            eventually("an answer", Duration::from_secs(5), async || {
                anyhow::ensure!(load.tally().answered > seen);
                Ok(())
            })
            .await
            .unwrap();
            backend.stop().await;
            backend.start_again().await.unwrap();
        }
        let tally = load.stop().await.unwrap();
        assert_eq!((tally.failed, tally.sent), (0, tally.answered), "{tally:?}");
    }

    #[tokio::test]
    async fn keeps_its_rate() {
        let backend = Backend::start("v1").await.unwrap();
        let begun = Instant::now();
        let tally = Plan::new(backend.address(), "any").rate(500.0).run(100).await.unwrap();
        assert_eq!(tally.answered, 100);
        assert!(begun.elapsed() >= Duration::from_millis(190), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_client_gives_up_on_an_answer_that_does_not_come() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.hanging = Errors { bad: 1, of: 2 });
        let plan = Plan::new(backend.address(), "any").connections(2).patience(Duration::from_millis(50));
        let tally = plan.run(10).await.unwrap();
        assert_eq!((tally.sent, tally.answered, tally.failed, tally.gave_up), (10, 5, 5, 5), "{tally:?}");
        assert_eq!((tally.of_class("v1", 2), tally.failures.len(), backend.counts().requests), (5, 0, 10));
    }

    #[tokio::test]
    async fn each_caller_has_an_address_of_its_own() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let load = Plan::new(listener.local_addr().unwrap(), "any").callers(3).start();
        let mut callers = Vec::new();
        for _ in 0..3 {
            callers.push(listener.accept().await.unwrap().1.ip().to_string());
        }
        callers.sort_unstable();
        assert_eq!(callers, ["127.0.0.2", "127.0.0.3", "127.0.0.4"]);
        drop(load);
    }

    #[cfg(feature = "streams")]
    #[tokio::test]
    async fn a_grpc_answer_without_a_status_is_a_failure() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::GrpcWithoutStatus);
        let plan = Plan::new(backend.address(), "any").connections(1).grpc();
        let tally = plan.clone().run(3).await.unwrap();
        assert_eq!((tally.sent, tally.answered, tally.failed), (3, 0, 3), "{tally:?}");
        backend.set(|behaviour| behaviour.mode = Mode::Grpc);
        let tally = plan.run(3).await.unwrap();
        assert_eq!((tally.sent, tally.of_class("v1", 2), tally.failed), (3, 3, 0), "{tally:?}");
    }
}
