//! The backend of one version: an HTTP server on a loopback port whose behaviour a test changes while it runs.
//!
//! It speaks HTTP/1.1 and HTTP/2 with prior knowledge (for gRPC trailers), answers `GET /health` by its own `ready`
//! flag, and names itself in the response header [`SERVED_BY`] so that a client can count responses by backend. It
//! serves gRPC and WebSocket if enabled.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, Sleep, sleep};

use crate::bootstrap::VERSION_HEADER;
use crate::ports::Port;
use crate::wait::eventually;

/// The response header that names the backend which answered.
pub const SERVED_BY: &str = "x-served-by";

/// How long a half-sent body stays half-sent before the reset, so that it reaches the client first.
const BEFORE_RESET: Duration = Duration::from_millis(20);

/// How long a port may be busy before a backend gives up.
const TO_LISTEN: Duration = Duration::from_secs(5);

/// What happens to a request, `/health` excepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The body is `ok`.
    Answer,
    /// The body is JSON with the request's `method`, `path` and `headers` as they arrived: each header as
    /// `{name, value, hex}`, the value with bytes that are not UTF-8 replaced, and all its bytes in hex.
    Echo,
    /// The connection is reset once the request was read, before any byte of an answer.
    Reset,
    /// The status, the headers and half of the body, then a reset.
    ResetInBody,
    /// The status, the headers and half of the body, then an orderly close.
    CloseInBody,
    /// No answer, ever.
    Hang,
    /// The headers at once, each half of the body after this pause.
    SlowBody(Duration),
    /// Server-sent events, one after each pause, until there were so many.
    Events(Duration, u32),
    /// gRPC: the calls say what happens to them, see [`grpc`](crate::grpc).
    #[cfg(feature = "streams")]
    Grpc,
    /// gRPC's health is answered; calls get a message, and an end without a status.
    #[cfg(feature = "streams")]
    GrpcWithoutStatus,
    /// WebSocket: says again what it hears.
    #[cfg(feature = "streams")]
    WebSocket,
}

/// How many of the requests go wrong, evenly spread: 1 of 4 is each fourth request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errors {
    /// So many fail,
    pub bad: u64,
    /// of so many.
    pub of: u64,
}

impl Errors {
    fn fails(self, request: u64) -> bool {
        self.of > 0 && (request % self.of) * self.bad % self.of + self.bad >= self.of
    }
}

/// The behaviour of a backend; by default it is ready and answers 200 at once.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// What happens to a request.
    pub mode: Mode,
    /// The status of the answers that [`errors`](Self::errors) does not turn into 500.
    pub status: u16,
    /// Which part of the requests answers 500.
    pub errors: Errors,
    /// Which part of the requests gets no answer, ever.
    pub hanging: Errors,
    /// The path whose requests answer 500 whatever else is set: an endpoint that fails on bad input.
    pub bad_input: Option<&'static str>,
    /// The pause before an answer (or a reset) begins.
    pub latency: Duration,
    /// Whether `GET /health` answers 200 or 503, and `grpc.health.v1` that it is serving or not.
    pub ready: bool,
    /// Further headers of each answer, such as `grpc-status: 14`.
    pub headers: Vec<(String, String)>,
    /// Trailers of each answer; they reach a client of HTTP/2 only.
    pub trailers: Vec<(String, String)>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            mode: Mode::Answer,
            status: 200,
            errors: Errors { bad: 0, of: 1 },
            hanging: Errors { bad: 0, of: 1 },
            bad_input: None,
            latency: Duration::ZERO,
            ready: true,
            headers: Vec::new(),
            trailers: Vec::new(),
        }
    }
}

/// The requests that a backend has received; kept across [`Backend::stop`] and [`Backend::start_again`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that arrived whole, without those of [`health`](Self::health).
    pub requests: u64,
    /// Those of them that were answered with a status of 500 or above.
    pub errors: u64,
    /// `GET /health`, or requests to `grpc.health.v1`.
    pub health: u64,
}

/// A running (or stopped) backend; dropping it stops it.
#[derive(Debug)]
pub struct Backend {
    port: Port,
    state: Arc<State>,
    server: Mutex<Option<AbortHandle>>,
    closed: Mutex<Option<mpsc::Receiver<()>>>,
}

#[derive(Debug)]
struct State {
    name: Mutex<String>,
    behaviour: Mutex<Arc<Behaviour>>,
    requests: AtomicU64,
    errors: AtomicU64,
    health: AtomicU64,
    /// Whether connections end with a reset.
    reset: AtomicBool,
    /// The requests by the version that they came for.
    versions: Mutex<BTreeMap<String, u64>>,
    /// When the latest of them came.
    asked_last: Mutex<Option<Instant>>,
    /// How many requests there were when the first of them came.
    before_users: OnceLock<u64>,
}

impl Backend {
    /// Starts a backend on a free port that answers as `name`.
    pub async fn start(name: &str) -> anyhow::Result<Self> {
        Self::start_with(name, Behaviour::default()).await
    }

    /// The same with a behaviour that holds from the first request on.
    pub async fn start_with(name: &str, behaviour: Behaviour) -> anyhow::Result<Self> {
        let backend = Self {
            port: Port::reserve()?,
            state: Arc::new(State {
                name: Mutex::new(name.to_owned()),
                behaviour: Mutex::new(Arc::new(behaviour)),
                requests: AtomicU64::new(0),
                errors: AtomicU64::new(0),
                health: AtomicU64::new(0),
                reset: AtomicBool::new(false),
                versions: Mutex::default(),
                asked_last: Mutex::default(),
                before_users: OnceLock::new(),
            }),
            server: Mutex::new(None),
            closed: Mutex::new(None),
        };
        backend.start_again().await?;
        Ok(backend)
    }

    /// Listens again on the same port after [`stop`](Self::stop); nothing happens if it never stopped.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        if lock(&self.server).is_some() {
            return Ok(());
        }
        let address = self.address();
        // The listener that was stopped may live on for a moment in a process that another thread is about to start.
        let listener =
            eventually(&format!("{address}"), TO_LISTEN, async || Ok(TcpListener::bind(address).await?)).await;
        let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
        let (open, closed) = mpsc::channel(1);
        let server = tokio::spawn(serve(listener, Arc::clone(&self.state), open));
        *lock(&self.server) = Some(server.abort_handle());
        *lock(&self.closed) = Some(closed);
        Ok(())
    }

    /// Closes the listener and every connection. When this returns, connections are refused.
    pub async fn stop(&self) {
        if let Some(server) = lock(&self.server).take() {
            server.abort();
        }
        let closed = lock(&self.closed).take();
        if let Some(mut closed) = closed {
            // Nothing is ever sent: this ends when the last task that held a socket has dropped its sender.
            let _ = closed.recv().await;
        }
    }

    /// The same with a reset of every connection.
    pub async fn reset(&self) {
        self.state.reset.store(true, Ordering::Relaxed);
        self.stop().await;
        self.state.reset.store(false, Ordering::Relaxed);
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Changes the behaviour of the requests that arrive from now on.
    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(Arc::make_mut(&mut lock(&self.state.behaviour)));
    }

    /// Shorthand for the most frequent [`set`](Self::set): whether `GET /health` answers 200.
    pub fn set_ready(&self, ready: bool) {
        self.set(|behaviour| behaviour.ready = ready);
    }

    /// Changes the name that it answers with.
    pub fn set_name(&self, name: &str) {
        name.clone_into(&mut lock(&self.state.name));
    }

    /// The requests by the version header that they came with; those without are not in it.
    pub fn versions(&self) -> BTreeMap<String, u64> {
        lock(&self.state.versions).clone()
    }

    /// When the latest request with the version header came, answered or not; `None` as long as none has.
    pub fn asked_last(&self) -> Option<Instant> {
        *lock(&self.state.asked_last)
    }

    /// How many requests it had got when the first came with the version header, which is to say through a proxy; `None`
    /// as long as none has.
    pub fn asked_before_users(&self) -> Option<u64> {
        self.state.before_users.get().copied()
    }

    /// The requests that came without the version header, which is to say past the proxies.
    pub fn asked_directly(&self) -> u64 {
        self.counts().requests - self.versions().values().sum::<u64>()
    }

    /// The requests that it has received.
    pub fn counts(&self) -> Counts {
        Counts {
            requests: self.state.requests.load(Ordering::Relaxed),
            errors: self.state.errors.load(Ordering::Relaxed),
            health: self.state.health.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(server) = lock(&self.server).take() {
            server.abort();
        }
    }
}

/// Accepts until it is aborted; its connections end with it. Each holds a clone of `open` next to its socket.
async fn serve(listener: TcpListener, state: Arc<State>, open: mpsc::Sender<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    let (state, open) = (Arc::clone(&state), open.clone());
                    connections.spawn(async move {
                        connection(stream, state).await;
                        drop(open);
                    });
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A connection, as its requests see it.
struct Peer {
    state: Arc<State>,
    /// Set by who wants it to end with a reset.
    reset: Arc<AtomicBool>,
    /// What becomes of it after its last HTTP answer.
    #[cfg(feature = "streams")]
    upgrade: Mutex<Option<hyper::upgrade::OnUpgrade>>,
}

async fn connection(stream: TcpStream, state: Arc<State>) {
    // A peer that went away a moment after it connected is no concern of a backend.
    let _ = stream.set_nodelay(true);
    let reset = Arc::new(AtomicBool::new(false));
    let socket = Socket { stream, reset: Arc::clone(&reset), state: Arc::clone(&state) };
    let peer = Arc::new(Peer {
        state,
        reset,
        #[cfg(feature = "streams")]
        upgrade: Mutex::default(),
    });
    let service = service_fn(|request| answer(request, Arc::clone(&peer)));
    let server = auto::Builder::new(TokioExecutor::new());
    let _ = server.serve_connection_with_upgrades(TokioIo::new(socket), service).await;
    #[cfg(feature = "streams")]
    {
        let upgrade = lock(&peer.upgrade).take();
        if let Some(upgrade) = upgrade
            && let Ok(upgraded) = upgrade.await
        {
            crate::websocket::serve(upgraded).await;
        }
    }
}

type ResponseBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

async fn answer(request: Request<Incoming>, peer: Arc<Peer>) -> Result<Response<ResponseBody>, ConnectionReset> {
    let state = &peer.state;
    let behaviour = Arc::clone(&lock(&state.behaviour));
    let boxed = |answer: Answer| answer.map_err(Into::into).boxed_unsync();
    if let Some(version) = request.headers().get(VERSION_HEADER) {
        state.before_users.get_or_init(|| state.requests.load(Ordering::Relaxed));
        *lock(&state.versions).entry(String::from_utf8_lossy(version.as_bytes()).into_owned()).or_default() += 1;
        *lock(&state.asked_last) = Some(Instant::now());
    }
    let mut response = Response::builder().header(SERVED_BY, lock(&state.name).as_str());
    #[cfg(feature = "streams")]
    if matches!(behaviour.mode, Mode::Grpc | Mode::GrpcWithoutStatus) && request.uri().path() == crate::grpc::HEALTH {
        state.health.fetch_add(1, Ordering::Relaxed);
        let answer = crate::grpc::health(request, behaviour.ready).await;
        return Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()));
    } else if behaviour.mode == Mode::Grpc {
        state.requests.fetch_add(1, Ordering::Relaxed);
        let mut answer = crate::grpc::answer(request).await.map(|body| body.map_err(Into::into).boxed_unsync());
        if let Ok(name) = HeaderValue::from_str(&lock(&state.name)) {
            answer.headers_mut().insert(SERVED_BY, name);
        }
        return Ok(answer);
    } else if behaviour.mode == Mode::WebSocket
        && let Some(key) = crate::websocket::accept_key(&request)
    {
        state.requests.fetch_add(1, Ordering::Relaxed);
        *lock(&peer.upgrade) = Some(hyper::upgrade::on(request));
        let headers = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", key.as_str())];
        for (name, value) in headers {
            response = response.header(name, value);
        }
        return response.status(101).body(boxed(Answer::whole(""))).map_err(|_| ConnectionReset);
    }
    let (head, body) = request.into_parts();
    if body.collect().await.is_err() {
        return Err(ConnectionReset);
    }

    if head.uri.path() == "/health" {
        state.health.fetch_add(1, Ordering::Relaxed);
        let status = if behaviour.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        return response.status(status).body(boxed(Answer::whole(""))).map_err(|_| ConnectionReset);
    }

    let number = state.requests.fetch_add(1, Ordering::Relaxed);
    if !behaviour.latency.is_zero() {
        sleep(behaviour.latency).await;
    }
    let is_bad_input = behaviour.bad_input.is_some_and(|path| head.uri.path() == path);
    if !is_bad_input && behaviour.hanging.fails(number) {
        return pending().await;
    }
    let status = if is_bad_input || behaviour.errors.fails(number) { 500 } else { behaviour.status };
    let reset = Arc::clone(&peer.reset);
    let body = match behaviour.mode {
        Mode::Answer => Answer::whole("ok"),
        #[cfg(feature = "streams")]
        Mode::Grpc | Mode::WebSocket => Answer::whole("ok"),
        #[cfg(feature = "streams")]
        Mode::GrpcWithoutStatus => {
            response = response.header("content-type", "application/grpc");
            Answer::whole(crate::grpc::EMPTY_MESSAGE)
        }
        Mode::Echo => Answer::whole(echo(&head.method, &head.uri, &head.headers).to_string()),
        Mode::Reset => {
            reset.store(true, Ordering::Relaxed);
            return Err(ConnectionReset);
        }
        Mode::ResetInBody => Answer::cut("the first half", BEFORE_RESET, Step::Reset(reset)),
        Mode::CloseInBody => Answer::cut("the first half", BEFORE_RESET, Step::Close),
        Mode::Hang => pending().await,
        Mode::SlowBody(pause) => Answer::slow("the first half", "and the second", pause),
        Mode::Events(pause, events) => {
            response = response.header("content-type", "text/event-stream");
            Answer::events(pause, events)
        }
    };
    if status >= 500 {
        state.errors.fetch_add(1, Ordering::Relaxed);
    }
    for (name, value) in &behaviour.headers {
        response = response.header(name, value);
    }
    let body = body.with_trailers(&behaviour.trailers);
    response.status(status).body(boxed(body)).map_err(|_| ConnectionReset)
}

fn echo(method: &hyper::Method, uri: &hyper::Uri, headers: &HeaderMap) -> Value {
    let headers: Vec<Value> = headers
        .iter()
        .map(|(name, value)| {
            let hex = value.as_bytes().iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            json!({ "name": name.as_str(), "value": String::from_utf8_lossy(value.as_bytes()), "hex": hex })
        })
        .collect();
    let path = uri.path_and_query().map_or("", |path| path.as_str());
    json!({ "method": method.as_str(), "path": path, "headers": headers })
}

/// A lock whose holder never panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes hyper drop the connection.
#[derive(Debug)]
struct ConnectionReset;

impl std::fmt::Display for ConnectionReset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the backend resets the connection")
    }
}

impl std::error::Error for ConnectionReset {}

/// A body as a list of steps, whose announced length may be longer than what it will send.
struct Answer {
    steps: VecDeque<Step>,
    pause: Option<Pin<Box<Sleep>>>,
    /// `None`: not announced.
    length: Option<u64>,
}

enum Step {
    Data(Bytes),
    Pause(Duration),
    /// So many events, each after a pause.
    Events(Duration, u32),
    Trailers(HeaderMap),
    Close,
    Reset(Arc<AtomicBool>),
}

impl Answer {
    fn new(steps: impl Into<VecDeque<Step>>, length: usize) -> Self {
        Self { steps: steps.into(), pause: None, length: Some(length as u64) }
    }

    fn whole(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let length = body.len();
        Self::new([Step::Data(body)], length)
    }

    fn slow(first: &'static str, second: &'static str, pause: Duration) -> Self {
        let length = first.len() + second.len();
        let (first, second) = (Step::Data(first.into()), Step::Data(second.into()));
        Self::new([Step::Pause(pause), first, Step::Pause(pause), second], length)
    }

    fn cut(half: &'static str, pause: Duration, end: Step) -> Self {
        Self::new([Step::Data(half.into()), Step::Pause(pause), end], 2 * half.len())
    }

    fn events(pause: Duration, events: u32) -> Self {
        Self { steps: [Step::Events(pause, events)].into(), pause: None, length: None }
    }

    fn with_trailers(mut self, trailers: &[(String, String)]) -> Self {
        if !trailers.is_empty() {
            let parsed = trailers.iter().filter_map(|(name, value)| {
                Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?))
            });
            self.steps.push_back(Step::Trailers(parsed.collect()));
        }
        self
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = ConnectionReset;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ConnectionReset>>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            match self.steps.pop_front() {
                Some(Step::Data(data)) => {
                    self.length = self.length.map(|length| length.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Step::Pause(pause)) => self.pause = Some(Box::pin(sleep(pause))),
                Some(Step::Events(_, 0)) => {}
                Some(Step::Events(pause, events)) => {
                    self.steps.push_front(Step::Events(pause, events - 1));
                    self.steps.push_front(Step::Data("data: tick\n\n".into()));
                    self.pause = Some(Box::pin(sleep(pause)));
                }
                Some(Step::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Some(Step::Reset(reset)) => {
                    reset.store(true, Ordering::Relaxed);
                    return Poll::Ready(Some(Err(ConnectionReset)));
                }
                Some(Step::Close) => return Poll::Ready(Some(Err(ConnectionReset))),
                None => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.steps.is_empty() && self.pause.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// A socket that is reset (RST) instead of closed (FIN) when its or its backend's `reset` is set before it is dropped.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
    state: Arc<State>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Relaxed) || self.state.reset.load(Ordering::Relaxed) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper shuts a failed connection down before it drops it; a FIN must not go ahead of the reset.
        if self.reset.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::get;

    #[test]
    fn errors_are_evenly_spread() {
        let quarter = Errors { bad: 1, of: 4 };
        let failing: Vec<u64> = (0..12).filter(|&request| quarter.fails(request)).collect();
        assert_eq!(failing, [3, 7, 11]);
        assert!((0..9).all(|request| Errors { bad: 1, of: 1 }.fails(request)));
        assert!(!(0..9).any(|request| Errors { bad: 0, of: 1 }.fails(request)));
        assert_eq!((0..1000).filter(|&request| Errors { bad: 3, of: 100 }.fails(request)).count(), 30);
    }

    #[tokio::test]
    async fn answers_by_its_name_and_status() {
        let backend = Backend::start("v1").await.unwrap();
        let response = get(backend.address(), "/").send().await.unwrap();
        assert_eq!((response.status, response.header(SERVED_BY)), (200, Some("v1".into())));
        backend.set_name("v1b");
        backend.set(|behaviour| behaviour.status = 404);
        let response = get(backend.address(), "/").send().await.unwrap();
        assert_eq!((response.status, response.header(SERVED_BY)), (404, Some("v1b".into())));
        assert_eq!(backend.counts(), Counts { requests: 2, errors: 0, health: 0 });
    }

    #[tokio::test]
    async fn health_follows_the_ready_flag_and_is_not_counted() {
        let backend = Backend::start("v1").await.unwrap();
        assert_eq!(get(backend.address(), "/health").send().await.unwrap().status, 200);
        backend.set_ready(false);
        assert_eq!(get(backend.address(), "/health").send().await.unwrap().status, 503);
        assert_eq!(backend.counts(), Counts { requests: 0, errors: 0, health: 2 });
    }

    #[tokio::test]
    async fn echoes_what_arrived_byte_for_byte() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::Echo);
        let request = get(backend.address(), "/a?b=c").header("x-odd", b"\xff\xfe").header("x-twice", "1");
        let echo = request.header("x-twice", "2").send().await.unwrap().json().unwrap();
        assert_eq!(echo["path"], "/a?b=c");
        let headers = echo["headers"].as_array().unwrap();
        assert!(headers.iter().any(|header| header["name"] == "x-odd" && header["hex"] == "fffe"));
        assert_eq!(headers.iter().filter(|header| header["name"] == "x-twice").count(), 2);
    }

    #[tokio::test]
    async fn resets_before_and_within_an_answer() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::Reset);
        let error = get(backend.address(), "/").send().await.unwrap_err();
        assert!(format!("{error:#}").contains("reset"), "{error:#}");
        backend.set(|behaviour| behaviour.mode = Mode::ResetInBody);
        let error = format!("{:#}", get(backend.address(), "/").send().await.unwrap_err());
        assert!(error.contains("reset") && error.contains("14 of 28 bytes"), "{error}");
        backend.set(|behaviour| behaviour.mode = Mode::CloseInBody);
        let error = format!("{:#}", get(backend.address(), "/").send().await.unwrap_err());
        assert!(error.contains("closed after 14 of 28 bytes"), "{error}");
        assert_eq!(backend.counts().requests, 3);
    }

    #[tokio::test]
    async fn bad_input_fails_on_its_path_only() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.bad_input = Some("/bad"));
        assert_eq!(get(backend.address(), "/bad").send().await.unwrap().status, 500);
        assert_eq!(get(backend.address(), "/good").send().await.unwrap().status, 200);
        assert_eq!(backend.counts(), Counts { requests: 2, errors: 1, health: 0 });
        assert_eq!(backend.asked_last(), None, "nothing came through a proxy");
    }

    #[tokio::test]
    async fn a_hanging_backend_is_cut_off_by_stop_and_comes_back_on_its_port() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::Hang);
        let address = backend.address();
        let hanging = tokio::spawn(async move { get(address, "/").send().await });
        crate::wait::eventually("the request to arrive", Duration::from_secs(5), async || {
            anyhow::ensure!(backend.counts().requests == 1);
            Ok(())
        })
        .await
        .unwrap();
        backend.stop().await;
        assert!(hanging.await.unwrap().is_err());
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        backend.set(|behaviour| behaviour.mode = Mode::SlowBody(Duration::from_millis(1)));
        backend.start_again().await.unwrap();
        assert_eq!(get(address, "/").send().await.unwrap().body, b"the first halfand the second");
    }

    #[tokio::test]
    async fn events_end_when_there_were_so_many() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::Events(Duration::from_millis(1), 3));
        let response = get(backend.address(), "/").header(VERSION_HEADER, "v1").send().await.unwrap();
        assert_eq!(response.header("content-type").as_deref(), Some("text/event-stream"));
        assert_eq!(response.text(), "data: tick\n\n".repeat(3));
        assert_eq!(backend.versions(), [("v1".to_owned(), 1)].into());
    }
}
