//! A controller whose API is scripted by the test: the web page is the real one, from a real `tideshift serve` behind
//! it, and the test provides everything under `/v1/`. It records the commands that it receives.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, fs};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::channel::Channel;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::controller::Controller;
use crate::ports::Port;
use crate::{client, timeline};

/// The maximum interval between events, as in the real controller.
const BEAT: Duration = Duration::from_secs(1);

/// A command as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Its path, still encoded.
    pub path: String,
    /// Its `authorization`.
    pub authorization: Option<String>,
    /// Its `content-type`.
    pub content_type: Option<String>,
    /// Its body.
    pub body: Value,
}

/// A running (or stopped) fake controller; dropping it stops it.
#[derive(Debug)]
pub struct FakeController {
    port: Port,
    state: Arc<State>,
    server: Mutex<Option<AbortHandle>>,
    page: Controller,
    _directory: TempDir,
}

#[derive(Debug)]
struct State {
    page: SocketAddr,
    status: watch::Sender<Value>,
    transitions: broadcast::Sender<Value>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    history: Vec<Value>,
    /// The series of the last minutes; `null`: as from a controller that has just started.
    series: Value,
    commands: Vec<Command>,
    refusal: Option<(u16, String)>,
    /// The tokens that may read and operate.
    tokens: Option<[String; 2]>,
    without_events: Option<u16>,
    /// The number of times that open connections were silenced.
    hushed: u64,
}

impl FakeController {
    /// Starts with this status.
    pub async fn start(status: Value) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("shift.yaml");
        let spec = json!({ "stable": "v1", "versions": [{ "name": "v1", "endpoints": ["127.0.0.1:9"] }] });
        let (api, kind) = ("tideshift.dev/v1alpha1", "TrafficShift");
        let document = json!({ "apiVersion": api, "kind": kind, "metadata": { "name": "stage" }, "spec": spec });
        std::fs::write(&file, document.to_string())?;
        let page = Controller::start(&[&file]).await?;
        let state = State {
            page: page.address(),
            status: watch::Sender::new(status),
            transitions: broadcast::Sender::new(64),
            kept: Mutex::default(),
        };
        let (port, state) = (Port::reserve()?, Arc::new(state));
        let stage = Self { port, state, server: Mutex::default(), page, _directory: directory };
        stage.start_again().await?;
        Ok(stage)
    }

    /// Listens again on the same port after [`stop`](Self::stop).
    pub async fn start_again(&self) -> anyhow::Result<()> {
        let listener = TcpListener::bind(self.port.address()).await.context("cannot listen")?;
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

    /// The address of the page.
    pub fn url(&self) -> String {
        format!("http://{}/", self.port.address())
    }

    /// The origin of the real page.
    pub fn page(&self) -> SocketAddr {
        self.page.address()
    }

    /// Sets the status.
    pub fn show(&self, status: Value) {
        self.state.status.send_replace(status);
    }

    /// Changes the status.
    pub fn change(&self, change: impl FnOnce(&mut Value)) {
        self.state.status.send_modify(change);
    }

    /// Adds a transition of the rollout `name`: it is sent to listeners and kept in the history.
    pub fn tell(&self, name: &str, transition: Value) {
        self.kept().history.push(transition.clone());
        let mut event = transition;
        event["name"] = name.into();
        // There may be no listener.
        let _ = self.state.transitions.send(event);
    }

    /// The history of the last minutes; its `now` is the time of the request.
    pub fn recall(&self, series: Value) {
        self.kept().series = series;
    }

    /// Only the first token may read, and only the second may send commands (and read).
    pub fn require_tokens(&self, read: &str, operate: &str) {
        self.kept().tokens = Some([read, operate].map(str::to_owned));
    }

    /// Answers commands with this status and error, or accepts them again.
    pub fn refuse(&self, refusal: Option<(u16, &str)>) {
        self.kept().refusal = refusal.map(|(status, error)| (status, error.to_owned()));
    }

    /// Answers `/v1/events` with this status: unsupported, or too many listeners.
    pub fn without_events(&self, status: u16) {
        self.kept().without_events = Some(status);
    }

    /// Open connections stay open but silent, as after a power cut; new ones work.
    pub fn hush(&self) {
        self.kept().hushed += 1;
    }

    /// The commands so far, including refused ones.
    pub fn commands(&self) -> Vec<Command> {
        self.kept().commands.clone()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.state.kept)
    }
}

impl Drop for FakeController {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Kept {
    fn series(&self) -> Value {
        let mut series = self.series.clone();
        if series.is_null() {
            series = json!({ "times": [], "services": [] });
        }
        series["now"] = timeline::now().into();
        series
    }
}

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

async fn connection(stream: TcpStream, state: Arc<State>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(answer(request, state).await.unwrap_or_else(|error| broken(&error))) }
    });
    // A browser may disconnect at any time.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn answer(request: Request<Incoming>, state: Arc<State>) -> anyhow::Result<Answer> {
    let (head, body) = request.into_parts();
    let of = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let path = head.uri.path().to_owned();
    if !path.starts_with("/v1/") {
        return page(state.page, &path).await;
    }
    let authorization = of(header::AUTHORIZATION);
    let (denied, without_events) = {
        let kept = lock(&state.kept);
        (denied(&kept, &head.method, authorization.as_deref()), kept.without_events)
    };
    if head.method == Method::POST {
        let body = serde_json::from_slice(&body.collect().await?.to_bytes())?;
        let mut kept = lock(&state.kept);
        kept.commands.push(Command { path, authorization, content_type: of(header::CONTENT_TYPE), body });
        return Ok(match denied.or_else(|| kept.refusal.clone()) {
            Some((status, error)) => refusal(status, &error),
            None => json_answer(200, &json!({ "services": state.status.borrow()["services"] })),
        });
    }
    if let Some((status, error)) = denied {
        return Ok(refusal(status, &error));
    }
    Ok(match path.as_str() {
        "/v1/status" => json_answer(200, &state.status.borrow()),
        "/v1/events" => match without_events {
            Some(status) => json_answer(status, &json!({ "error": "ask for /v1/status instead" })),
            None => events(state),
        },
        _ if path.ends_with("/history") => json_answer(200, &json!({ "transitions": lock(&state.kept).history })),
        _ if path.ends_with("/series") => json_answer(200, &lock(&state.kept).series()),
        _ => json_answer(404, &json!({ "error": "no such path" })),
    })
}

fn denied(kept: &Kept, method: &Method, authorization: Option<&str>) -> Option<(u16, String)> {
    let [read, operate] = kept.tokens.as_ref()?;
    let token = authorization.and_then(|value| value.strip_prefix("Bearer "));
    match token {
        Some(token) if token == operate || token == read && method == Method::GET => None,
        Some(token) if token == read => Some((403, "this token may read only".to_owned())),
        Some(_) => Some((401, "unknown token".to_owned())),
        None => Some((401, "a token is needed".to_owned())),
    }
}

/// Sends the status at once and on each change, and transitions as they happen.
fn events(state: Arc<State>) -> Answer {
    let (mut sender, body) = Channel::<Bytes>::new(16);
    let (mut status, mut transitions) = (state.status.subscribe(), state.transitions.subscribe());
    let hushed = lock(&state.kept).hushed;
    tokio::spawn(async move {
        let mut event = format!("event: status\ndata: {}\n\n", *status.borrow_and_update());
        while sender.send_data(event.into()).await.is_ok() {
            event = tokio::select! {
                _ = timeout(BEAT, status.changed()) => {
                    format!("event: status\ndata: {}\n\n", *status.borrow_and_update())
                }
                Ok(transition) = transitions.recv() => format!("event: transition\ndata: {transition}\n\n"),
            };
            if lock(&state.kept).hushed != hushed {
                pending::<()>().await;
            }
        }
    });
    let response = Response::builder().header(header::CONTENT_TYPE, "text/event-stream");
    response.body(body.boxed_unsync()).unwrap_or_default()
}

/// A file of the real page; during development of the page, from the directory `TIDESHIFT_PAGE`, without building.
async fn page(address: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    let mut answer = client::get(address, path).send().await?;
    if let Some(folder) = env::var_os("TIDESHIFT_PAGE") {
        let name = path.strip_prefix("/page/").unwrap_or("index.html");
        answer.body = fs::read(Path::new(&folder).join(name))?;
    }
    let mut response = Response::builder().status(answer.status);
    for (name, value) in &answer.headers {
        if !matches!(name.as_str(), "content-length" | "transfer-encoding" | "date" | "connection") {
            response = response.header(name, value.as_slice());
        }
    }
    Ok(response.body(Full::new(answer.body.into()).boxed_unsync())?)
}

fn json_answer(status: u16, body: &Value) -> Answer {
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, "application/json");
    response.body(Full::new(body.to_string().into()).boxed_unsync()).unwrap_or_default()
}

/// An error response like the real one, which says whether another token would be accepted.
fn refusal(status: u16, error: &str) -> Answer {
    let mut answer = json_answer(status, &json!({ "error": error }));
    if matches!(status, 401 | 403) {
        let challenge = header::HeaderValue::from_static(r#"Bearer realm="tideshift""#);
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    }
    answer
}

fn broken(error: &anyhow::Error) -> Answer {
    json_answer(StatusCode::INTERNAL_SERVER_ERROR.as_u16(), &json!({ "error": format!("the stage: {error:#}") }))
}

/// A lock; no holder panics during a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
