//! A controller scripted by the test: it answers the filter's long polls with the policy of the test or with arbitrary
//! bytes, and records the polls and reports of the filter.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tideshift_core::protocol::report::Report;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::envoy_fixture::DEADLINE;
use crate::ports::Port;
use crate::wait::eventually;

/// How long a poll is held by default.
const HOLD: Duration = Duration::from_secs(25);

/// A long poll of the filter.
#[derive(Clone, Debug)]
pub struct Poll {
    /// When it arrived.
    pub at: Instant,
    /// Its query parameters, decoded only as far as the filter's own names need.
    pub query: BTreeMap<String, String>,
    /// Its `authorization`.
    pub authorization: Option<String>,
}

impl Poll {
    /// The revision that the proxy has.
    pub fn after(&self) -> u64 {
        self.query.get("after").and_then(|after| after.parse().ok()).unwrap_or_default()
    }

    /// The epoch of that revision.
    pub fn epoch(&self) -> &str {
        self.query.get("epoch").map(String::as_str).unwrap_or_default()
    }
}

/// How reports are answered; they are recorded in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportAnswer {
    /// With this status.
    Status(u16),
    /// Not at all: the connection is closed.
    Lost,
}

/// A running (or stopped) server; dropping it stops it.
#[derive(Debug)]
pub struct PolicyServer {
    port: Port,
    state: Arc<State>,
    server: Mutex<Option<AbortHandle>>,
}

#[derive(Debug)]
struct State {
    offer: watch::Sender<Offer>,
    kept: Mutex<Kept>,
}

/// The response to polls.
#[derive(Clone, Debug)]
struct Offer {
    epoch: String,
    revision: u64,
    body: Vec<u8>,
    hold: Duration,
    /// These bytes instead, after which the connection is closed; and whether only once.
    raw: Option<(Vec<u8>, bool)>,
}

#[derive(Debug)]
struct Kept {
    polls: Vec<Poll>,
    held: usize,
    answered: Option<Instant>,
    reports: Vec<(Option<String>, Report)>,
    report_answer: ReportAnswer,
    /// Requests other than polls and reports, and reports that could not be parsed.
    strange: Vec<String>,
}

impl PolicyServer {
    /// Starts a server that has no policy newer than revision 0 of the epoch `e1`.
    pub async fn start() -> anyhow::Result<Self> {
        let offer = Offer { epoch: "e1".to_owned(), revision: 0, body: Vec::new(), hold: HOLD, raw: None };
        let kept = Kept {
            polls: Vec::new(),
            held: 0,
            answered: None,
            reports: Vec::new(),
            report_answer: ReportAnswer::Status(200),
            strange: Vec::new(),
        };
        let state = Arc::new(State { offer: watch::Sender::new(offer), kept: Mutex::new(kept) });
        let server = Self { port: Port::reserve()?, state, server: Mutex::new(None) };
        server.start_again().await?;
        Ok(server)
    }

    /// Listens again on the same port after [`stop`](Self::stop).
    pub async fn start_again(&self) -> anyhow::Result<()> {
        let listener = TcpListener::bind(self.address()).await.context("cannot listen")?;
        let task = tokio::spawn(serve(listener, Arc::clone(&self.state)));
        if let Some(before) = lock(&self.server).replace(task.abort_handle()) {
            before.abort();
        }
        Ok(())
    }

    /// Closes the listener and every connection.
    pub fn stop(&self) {
        if let Some(server) = lock(&self.server).take() {
            server.abort();
        }
    }

    /// The listen address.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Publishes a policy with its own revision, in the current epoch.
    pub fn publish(&self, policy: &Value) {
        let revision = policy["revision"].as_u64().unwrap_or_default();
        self.publish_bytes(revision, policy.to_string());
    }

    /// Publishes arbitrary bytes as the policy of a revision.
    pub fn publish_bytes(&self, revision: u64, body: impl Into<Vec<u8>>) {
        let body = body.into();
        self.state.offer.send_modify(|offer| (offer.revision, offer.body, offer.raw) = (revision, body, None));
    }

    /// Starts another epoch, with the last policy or a new one.
    pub fn publish_in_epoch(&self, epoch: &str, policy: &Value) {
        self.state.offer.send_modify(|offer| {
            epoch.clone_into(&mut offer.epoch);
            offer.revision = policy["revision"].as_u64().unwrap_or_default();
            (offer.body, offer.raw) = (policy.to_string().into_bytes(), None);
        });
    }

    /// Answers each poll at once with these bytes and closes the connection, until the next policy is published.
    pub fn answer_raw(&self, bytes: impl Into<Vec<u8>>) {
        let raw = Some((bytes.into(), false));
        self.state.offer.send_modify(|offer| offer.raw = raw);
    }

    /// The same for one poll only: the one that is held, or else the next.
    pub fn answer_raw_once(&self, bytes: impl Into<Vec<u8>>) {
        let raw = Some((bytes.into(), true));
        self.state.offer.send_modify(|offer| offer.raw = raw);
    }

    /// Answers polls with 204 after this time if there is no newer policy.
    pub fn hold(&self, hold: Duration) {
        self.state.offer.send_modify(|offer| offer.hold = hold);
    }

    /// Sets how reports are answered.
    pub fn answer_reports(&self, answer: ReportAnswer) {
        self.kept().report_answer = answer;
    }

    /// Every poll so far.
    pub fn polls(&self) -> Vec<Poll> {
        self.kept().polls.clone()
    }

    /// Whether a poll is being held for a policy after `revision`.
    pub fn holds_poll_after(&self, revision: u64) -> bool {
        let kept = self.kept();
        kept.held > 0 && kept.polls.last().is_some_and(|poll| poll.after() == revision)
    }

    /// When a poll was last answered with a policy.
    pub fn answered_at(&self) -> Option<Instant> {
        self.kept().answered
    }

    /// Every report so far.
    pub fn reports(&self) -> Vec<Report> {
        self.kept().reports.iter().map(|(_, report)| report.clone()).collect()
    }

    /// The newest report, if there is one.
    pub fn last_report(&self) -> anyhow::Result<Report> {
        self.kept().reports.last().map(|(_, report)| report.clone()).context("no report yet")
    }

    /// The `authorization` of every report so far.
    pub fn report_authorizations(&self) -> Vec<Option<String>> {
        self.kept().reports.iter().map(|(authorization, _)| authorization.clone()).collect()
    }

    /// The unexpected requests.
    pub fn strange(&self) -> Vec<String> {
        self.kept().strange.clone()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.state.kept)
    }
}

/// Waits until the server holds a poll for a policy after `revision`.
pub async fn held_after(server: &PolicyServer, revision: u64) -> anyhow::Result<()> {
    eventually(&format!("a poll for what comes after {revision}"), DEADLINE, async || {
        ensure!(server.holds_poll_after(revision), "{:?}", server.polls().last());
        Ok(())
    })
    .await
}

impl Drop for PolicyServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Accepts connections until it is aborted; they end with it.
async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(connection(stream, Arc::clone(&state)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection until either side closes it.
async fn connection(mut stream: TcpStream, state: Arc<State>) {
    let _ = stream.set_nodelay(true);
    let mut unread = Vec::new();
    loop {
        match request(&mut stream, &mut unread).await {
            Ok(Some(request)) => {
                if !matches!(answer(&mut stream, request, &state).await, Ok(Next::Request)) {
                    return;
                }
            }
            // An Envoy may disconnect during a request.
            Ok(None) | Err(_) => return,
        }
    }
}

struct Asked {
    method: String,
    path: String,
    authorization: Option<String>,
    body: Vec<u8>,
}

enum Next {
    Request,
    Close,
}

async fn answer(stream: &mut TcpStream, asked: Asked, state: &State) -> anyhow::Result<Next> {
    let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
    match (asked.method.as_str(), path) {
        ("GET", "/v1/policy") => {
            let query = query.split('&').filter_map(|pair| pair.split_once('='));
            let query = query.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            answer_poll(stream, Poll { at: Instant::now(), query, authorization: asked.authorization }, state).await
        }
        ("POST", "/v1/reports") => {
            let report_answer = {
                let mut kept = lock(&state.kept);
                match serde_json::from_slice(&asked.body) {
                    Ok(report) => kept.reports.push((asked.authorization, report)),
                    Err(error) => kept.strange.push(format!("{error}: {}", String::from_utf8_lossy(&asked.body))),
                }
                kept.report_answer
            };
            match report_answer {
                ReportAnswer::Status(status) => respond(stream, status, "", b"").await,
                ReportAnswer::Lost => Ok(Next::Close),
            }
        }
        _ => {
            lock(&state.kept).strange.push(format!("{} {}", asked.method, asked.path));
            respond(stream, 404, "", b"").await
        }
    }
}

async fn answer_poll(stream: &mut TcpStream, poll: Poll, state: &State) -> anyhow::Result<Next> {
    let (after, epoch) = (poll.after(), poll.epoch().to_owned());
    {
        let mut kept = lock(&state.kept);
        kept.polls.push(poll);
        kept.held += 1;
    }
    let _held = Held(state);
    let mut offers = state.offer.subscribe();
    let hold = offers.borrow().hold;
    let news =
        |offer: &Offer| offer.raw.is_some() || offer.revision > 0 && (offer.epoch != epoch || offer.revision > after);
    let mut byte = [0];
    let offer = tokio::select! {
        offer = timeout(hold, offers.wait_for(news)) => offer.ok().and_then(Result::ok).map(|offer| offer.clone()),
        // Nothing is sent while a poll is held: the proxy cancelled or disconnected.
        _ = stream.peek(&mut byte) => bail!("the proxy went away"),
    };
    match offer {
        None => respond(stream, 204, "", b"").await,
        Some(Offer { raw: Some((raw, once)), .. }) => {
            if once {
                state.offer.send_modify(|offer| offer.raw = None);
            }
            stream.write_all(&raw).await?;
            Ok(Next::Close)
        }
        Some(offer) => {
            let epoch = format!("x-tideshift-epoch: {}\r\ncontent-type: application/json\r\n", offer.epoch);
            lock(&state.kept).answered = Some(Instant::now());
            respond(stream, 200, &epoch, &offer.body).await
        }
    }
}

/// Counts a poll as held until this is dropped.
struct Held<'s>(&'s State);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        lock(&self.0.kept).held -= 1;
    }
}

async fn respond(stream: &mut TcpStream, status: u16, headers: &str, body: &[u8]) -> anyhow::Result<Next> {
    let length = if status == 204 { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    let head = format!("HTTP/1.1 {status} -\r\n{headers}{length}\r\n");
    stream.write_all(&[head.as_bytes(), body].concat()).await?;
    Ok(Next::Request)
}

/// The next request of a connection; `None` when it is closed.
async fn request(stream: &mut TcpStream, unread: &mut Vec<u8>) -> anyhow::Result<Option<Asked>> {
    loop {
        if let Some((asked, length)) = parse(unread)? {
            unread.drain(..length);
            return Ok(Some(asked));
        }
        if stream.read_buf(unread).await? == 0 {
            return Ok(None);
        }
    }
}

/// A complete request and its length in bytes, once it has arrived.
fn parse(bytes: &[u8]) -> anyhow::Result<Option<(Asked, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = parsed.parse(bytes)? else { return Ok(None) };
    let header = |name: &str| {
        let header = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok().map(str::to_owned)
    };
    let length: usize = header("content-length").map_or(Ok(0), |length| length.parse())?;
    let Some(body) = bytes.get(head..head + length) else { return Ok(None) };
    let asked = Asked {
        method: parsed.method.context("no method")?.to_owned(),
        path: parsed.path.context("no path")?.to_owned(),
        authorization: header("authorization"),
        body: body.to_vec(),
    };
    Ok(Some((asked, head + length)))
}

/// A lock; no holder panics during a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
