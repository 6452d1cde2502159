//! Many requests over connections that are kept alive, and an exact tally of who answered what.
//!
//! Every request that went out is in the tally once: answered, failed or still in flight. A connection that the server
//! closed between two requests is opened again and is no failure; a request that got no whole answer is one.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request,
    client::conn::http1::{SendRequest, handshake},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::backend::SERVED_BY;

/// Stands for the version in a [`Tally`] where an answer did not name a backend: Envoy's own 503, for instance.
pub const NOBODY: &str = "-";

/// How often one and the same request is tried on a new connection when the old one was closed before it went out.
const STALE_CONNECTIONS: usize = 3;

/// What to send; the defaults are a closed loop of `GET /` over 4 connections until it is stopped.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whom to call.
    pub address: SocketAddr,
    /// The `host` header.
    pub host: String,
    /// Path and query.
    pub path: String,
    /// Further headers of each request.
    pub headers: Vec<(String, String)>,
    /// Connections, each with at most one request at a time.
    pub connections: usize,
    /// Requests per second of all connections together; `None`: each connection sends as fast as it is answered.
    pub rate: Option<f64>,
    /// Ends by itself after so many requests.
    pub requests: Option<u64>,
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
        }
    }

    /// With one more header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Over so many connections.
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections;
        self
    }

    /// So many requests per second instead of a closed loop.
    pub fn rate(mut self, per_second: f64) -> Self {
        self.rate = Some(per_second);
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

/// Who answered what, and what got no answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that went out.
    pub sent: u64,
    /// Requests whose answer was read to its end.
    pub answered: u64,
    /// Requests that ended without a whole answer.
    pub failed: u64,
    /// The answers by version ([`NOBODY`] where none was named) and status.
    pub by: BTreeMap<(String, u16), u64>,
    /// When the versions were called and when they failed.
    pub times: BTreeMap<String, Times>,
    /// What the first failures said.
    pub failures: Vec<String>,
}

/// When clients called a version, as far as it answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// When the latest of its requests was sent.
    pub last_sent: Instant,
    /// When its first answer with a status of 500 and above had arrived.
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

    /// Answers of `version` with any status.
    pub fn of(&self, version: &str) -> u64 {
        self.count(|name, _| name == version)
    }

    /// Answers of any version with a status of that class: 2 for 200 to 299.
    pub fn class(&self, class: u16) -> u64 {
        self.count(|_, status| status / 100 == class)
    }

    /// Answers of `version` with a status of that class.
    pub fn of_class(&self, version: &str, class: u16) -> u64 {
        self.count(|name, status| name == version && status / 100 == class)
    }

    /// The part of all answers that `version` gave, 0 to 1.
    pub fn share(&self, version: &str) -> f64 {
        if self.answered == 0 { 0.0 } else { self.of(version) as f64 / self.answered as f64 }
    }

    /// Requests that a user would call failed: no whole answer, or a status of 500 and above.
    pub fn bad(&self) -> u64 {
        self.failed + self.count(|_, status| status >= 500)
    }

    /// What was added since `earlier`, a tally of the same load; its times are this one's.
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
            by,
            times: self.times.clone(),
            failures: self.failures.get(earlier.failures.len()..).unwrap_or_default().to_vec(),
        }
    }

    fn count(&self, wanted: impl Fn(&str, u16) -> bool) -> u64 {
        self.by.iter().filter(|((name, status), _)| wanted(name, *status)).map(|(_, count)| count).sum()
    }
}

/// A running load; dropping it ends it without waiting for the answers in flight.
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
        for _ in 0..wanted {
            connections.spawn(Arc::clone(&shared).send_all());
        }
        Self { shared, connections }
    }

    /// The tally as it stands now.
    pub fn tally(&self) -> Tally {
        self.shared.tally().clone()
    }

    /// Sends nothing more, waits for the answers in flight and returns the final tally: all that was sent was either
    /// answered or failed.
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

    /// What one connection does: take the next request's number, wait for its time, send it.
    async fn send_all(self: Arc<Self>) -> anyhow::Result<()> {
        let mut connection = None;
        while let Some(due) = self.take() {
            sleep_until(due).await;
            if self.stopping.load(Ordering::Relaxed) {
                break;
            }
            self.tally().sent += 1;
            let sent = Instant::now();
            match self.send(&mut connection).await {
                Ok(answer) => self.tally().add(sent, answer),
                Err(error) => {
                    connection = None;
                    let mut tally = self.tally();
                    tally.failed += 1;
                    if tally.failures.len() < 20 {
                        tally.failures.push(format!("{error:#}"));
                    }
                }
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

    async fn send(&self, connection: &mut Option<SendRequest<Empty<Bytes>>>) -> anyhow::Result<(String, u16)> {
        for _ in 0..STALE_CONNECTIONS {
            let sender = match connection {
                Some(sender) => sender,
                None => connection.insert(self.connect().await?),
            };
            if sender.ready().await.is_err() {
                *connection = None;
                continue;
            }
            match sender.send_request(self.request()?).await {
                Ok(response) => {
                    let version =
                        response.headers().get(SERVED_BY).map(|name| String::from_utf8_lossy(name.as_bytes()));
                    let answer = (version.as_deref().unwrap_or(NOBODY).to_owned(), response.status().as_u16());
                    response.into_body().collect().await.context("the answer broke off")?;
                    return Ok(answer);
                }
                // Cancelled is hyper's word for a request of which not one byte was sent.
                Err(error) if error.is_canceled() => *connection = None,
                Err(error) => return Err(error).context("no answer"),
            }
        }
        bail!("the server closed {STALE_CONNECTIONS} connections before a request could be sent")
    }

    fn request(&self) -> anyhow::Result<Request<Empty<Bytes>>> {
        let mut request = Request::get(&self.plan.path).header("host", &self.plan.host);
        for (name, value) in &self.plan.headers {
            request = request.header(name, value);
        }
        request.body(Empty::new()).context("the plan is not a valid request")
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
        let stream = TcpStream::connect(self.plan.address).await.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.context("cannot connect")?;
        // Its errors reach the sender as well.
        tokio::spawn(connection);
        Ok(sender)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{Backend, Errors, Mode},
        wait::eventually,
    };

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
}
