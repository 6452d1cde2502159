//! A webhook receiver: records requests and sends configured responses.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::ensure;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::test_bed::DEADLINE;
use crate::wait::eventually;

/// A running receiver; dropping it closes its sockets.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    _tasks: JoinSet<()>,
}

/// The requests that it received.
#[derive(Clone, Debug)]
pub struct Got {
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// How it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// With a status and a plain text.
    Status(u16, &'static str),
    /// With a redirection to there.
    Redirect(String),
    /// Not at all.
    Silence,
}

#[derive(Debug)]
struct State {
    /// Used up one after the other.
    next: VecDeque<Answer>,
    /// And then for ever.
    answer: Answer,
    got: Vec<Got>,
}

impl Got {
    /// The body as JSON.
    pub fn json(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }

    /// A header; empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Receiver {
    /// One on a port of its own.
    pub async fn start(answer: Answer) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State { next: VecDeque::new(), answer, got: Vec::new() }));
        let mut tasks = JoinSet::new();
        let shared = state.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let state = shared.clone();
                let service = service_fn(move |request| respond(state.clone(), request));
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(Self { address, state, _tasks: tasks })
    }

    /// Where to send to.
    pub fn url(&self) -> String {
        format!("http://{}/hook?from=test", self.address)
    }

    /// How it answers from now on.
    pub fn answer(&self, answer: Answer) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.next.clear();
        state.answer = answer;
    }

    /// How it answers next, one after the other, before it goes on as it was.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).next.extend(answers);
    }

    /// The requests received so far.
    pub fn got(&self) -> Vec<Got> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).got.clone()
    }

    /// Waits until it has received this many requests.
    pub async fn until(&self, count: usize) -> anyhow::Result<Vec<Got>> {
        eventually(&format!("{count} requests to the webhook"), DEADLINE, async || {
            let got = self.got();
            ensure!(got.len() >= count, "{} so far", got.len());
            Ok(got)
        })
        .await
    }
}

async fn respond(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let answer = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.got.push(Got { headers, body });
        let next = state.next.pop_front();
        next.unwrap_or_else(|| state.answer.clone())
    };
    let response = match answer {
        Answer::Status(status, text) => {
            Response::builder().status(status).header("content-type", "text/plain").body(text.into())
        }
        Answer::Redirect(to) => Response::builder().status(302).header("location", to).body(Full::default()),
        Answer::Silence => std::future::pending().await,
    };
    Ok(response.unwrap_or_default())
}
