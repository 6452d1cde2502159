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

/// The response header that names the backend.
pub const SERVED_BY: &str = "x-served-by";

/// The delay between half of a body and the reset, so that the half reaches the client first.
const BEFORE_RESET: Duration = Duration::from_millis(20);

/// How long a port may be busy before the backend gives up.
const TO_LISTEN: Duration = Duration::from_secs(5);

/// How a request is handled, except `/health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The body is `ok`.
    Answer,
    /// The body is JSON with the request's `method`, `path` and `headers` as received: each header as `{name, value,
    /// hex}`, with invalid UTF-8 in the value replaced, and all of its bytes in hex.
    Echo,
    /// The connection is reset after the request was read, before any byte of a response.
    Reset,
    /// The status, the headers and half of the body, then a reset.
    ResetInBody,
    /// The status, the headers and half of the body, then an orderly close.
    CloseInBody,
    /// It never responds.
    Hang,
    /// The headers at once, each half of the body after this pause.
    SlowBody(Duration),
    /// Server-sent events, one after each pause, up to this number.
    Events(Duration, u32),
    /// gRPC: each call describes what happens to it, see [`grpc`](crate::grpc).
    #[cfg(feature = "streams")]
    Grpc,
    /// gRPC health checks are answered; calls get a message, and an end without a status.
    #[cfg(feature = "streams")]
    GrpcWithoutStatus,
    /// WebSocket: echoes messages.
    #[cfg(feature = "streams")]
    WebSocket,
}

/// The fraction of requests that fail, evenly spread: 1 of 4 is every fourth request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errors {
    /// This many fail,
    pub bad: u64,
    /// of this many.
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
    /// How requests are handled.
    pub mode: Mode,
    /// The status of responses that [`errors`](Self::errors) does not turn into 500.
    pub status: u16,
    /// The fraction of requests that are answered with 500.
    pub errors: Errors,
    /// The fraction of requests that are never answered.
    pub hanging: Errors,
    /// The path whose requests are always answered with 500: an endpoint that fails on bad input.
    pub bad_input: Option<&'static str>,
    /// The delay before a response (or a reset) starts.
    pub latency: Duration,
    /// Whether `GET /health` answers 200 or 503, and `grpc.health.v1` serving or not.
    pub ready: bool,
    /// Additional headers of each response, such as `grpc-status: 14`.
    pub headers: Vec<(String, String)>,
    /// Trailers of each response; they reach HTTP/2 clients only.
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
    /// Complete requests, without those of [`health`](Self::health).
    pub requests: u64,
    /// Those that were answered with a status of 500 or above.
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
    /// Requests by the version in their header.
    versions: Mutex<BTreeMap<String, u64>>,
    /// The time of the latest of them.
    asked_last: Mutex<Option<Instant>>,
    /// The number of requests before the first of them.
    before_users: OnceLock<u64>,
}

impl Backend {
    /// Starts a backend with this name on a free port.
    pub async fn start(name: &str) -> anyhow::Result<Self> {
        Self::start_with(name, Behaviour::default()).await
    }

    /// The same with an initial behaviour.
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

    /// Listens again on the same port after [`stop`](Self::stop); no effect if it is running.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        if lock(&self.server).is_some() {
            return Ok(());
        }
        let address = self.address();
        // The stopped listener may live on for a moment in a process that another thread is about to start.
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
            // Nothing is ever sent: this completes when the last task that held a socket has dropped its sender.
            let _ = closed.recv().await;
        }
    }

    /// The same, resetting every connection.
    pub async fn reset(&self) {
        self.state.reset.store(true, Ordering::Relaxed);
        self.stop().await;
        self.state.reset.store(false, Ordering::Relaxed);
    }

    /// The listen address.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// The listen port.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Changes the behaviour for later requests.
    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(Arc::make_mut(&mut lock(&self.state.behaviour)));
    }

    /// Shorthand for the most frequent [`set`](Self::set): whether `GET /health` answers 200.
    pub fn set_ready(&self, ready: bool) {
        self.set(|behaviour| behaviour.ready = ready);
    }

    /// Changes its name.
    pub fn set_name(&self, name: &str) {
        name.clone_into(&mut lock(&self.state.name));
    }

    /// Requests by version header; those without the header are not included.
    pub fn versions(&self) -> BTreeMap<String, u64> {
        lock(&self.state.versions).clone()
    }

    /// When the latest request with the version header arrived, answered or not; `None` if there was none.
    pub fn asked_last(&self) -> Option<Instant> {
        *lock(&self.state.asked_last)
    }

    /// The number of requests before the first with the version header, which came through a proxy; `None` if there was
    /// none.
    pub fn asked_before_users(&self) -> Option<u64> {
        self.state.before_users.get().copied()
    }

    /// The requests without the version header, which did not come through a proxy.
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

/// Accepts connections until it is aborted; they end with it. Each holds a clone of `open` next to its socket.
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

/// A connection, as requests on it see it.
struct Peer {
    state: Arc<State>,
    /// Set to end the connection with a reset.
    reset: Arc<AtomicBool>,
    /// How the connection continues after its last HTTP response.
    #[cfg(feature = "streams")]
    upgrade: Mutex<Option<hyper::upgrade::OnUpgrade>>,
}

async fn connection(stream: TcpStream, state: Arc<State>) {
    // The peer may have disconnected right after it connected.
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

/// A lock; no holder panics during a change.
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

/// A body as a list of steps; the announced length may exceed what it sends.
struct Answer {
    steps: VecDeque<Step>,
    pause: Option<Pin<Box<Sleep>>>,
    /// `None`: not announced.
    length: Option<u64>,
}

enum Step {
    Data(Bytes),
    Pause(Duration),
    /// This many events, each after a pause.
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

/// A socket that is reset (RST) instead of closed (FIN) if its or its backend's `reset` is set before it is dropped.
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
        // hyper shuts a failed connection down before dropping it; no FIN must precede the reset.
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
