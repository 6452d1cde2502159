//! HTTP/JSON: policies for proxies, their reports, status for people, health and metrics for machines.

use crate::control::Control;
use crate::metrics;
use crate::rollout::Millis;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tideshift_core::report::Report;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

/// How long a poll is held when there is nothing newer.
const HOLD: Duration = Duration::from_secs(25);
/// The largest report: some 5,000 versions.
const MAX_REPORT_BYTES: usize = 1 << 20;
/// The longest proxy id and start.
const MAX_NAME: usize = 512;

/// What requests share.
#[derive(Debug)]
pub struct Shared {
    /// The controller's mind.
    pub control: Mutex<Control>,
    /// Told when a report has changed the counts.
    pub counted: Notify,
    /// The newest policy, `None` before the first.
    pub published: watch::Receiver<Option<Published>>,
    /// Becomes true when the process is to end.
    pub ending: watch::Receiver<bool>,
}

/// A policy as it is sent.
#[derive(Debug, Clone)]
pub struct Published {
    /// Names the controller's state.
    pub epoch: String,
    /// The policy's revision.
    pub revision: u64,
    /// The document.
    pub json: Bytes,
}

impl Shared {
    /// The controller's mind, for as long as one thought takes.
    pub fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time, for a mind that has no clock.
pub fn now() -> Millis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as Millis)
}

/// All routes.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/policy", get(policy))
        .route("/v1/reports", post(report).layer(DefaultBodyLimit::max(MAX_REPORT_BYTES)))
        .route("/v1/status", get(async |State(shared): State<Arc<Shared>>| Json(shared.control().status(now()))))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(openmetrics))
        .fallback(async || problem(StatusCode::NOT_FOUND, "no such path"))
        .with_state(shared)
}

/// What a poll says; also `proxy`, its id, for which all policies are the same so far.
#[derive(Deserialize)]
struct Poll {
    #[serde(default)]
    epoch: String,
    #[serde(default)]
    after: u64,
}

/// Answers at once if there is a policy newer than the one that the proxy has, else when there is, else after a while
/// with 204.
async fn policy(State(shared): State<Arc<Shared>>, Query(poll): Query<Poll>) -> Response {
    let is_newer = |published: &Published| published.epoch != poll.epoch || published.revision > poll.after;
    let (mut published, mut ending) = (shared.published.clone(), shared.ending.clone());
    let newer = published.wait_for(|published| published.as_ref().is_some_and(is_newer));
    tokio::select! {
        newer = timeout(HOLD, newer) => match newer {
            Ok(Ok(newer)) => newer.clone().map_or_else(|| StatusCode::NO_CONTENT.into_response(), send),
            _ => StatusCode::NO_CONTENT.into_response(),
        },
        _ = ending.wait_for(|ending| *ending) => problem(StatusCode::SERVICE_UNAVAILABLE, "shutting down"),
    }
}

fn send(published: Published) -> Response {
    let mut response = ([(header::CONTENT_TYPE, "application/json")], published.json).into_response();
    if let Ok(epoch) = HeaderValue::from_str(&published.epoch) {
        response.headers_mut().insert("x-tideshift-epoch", epoch);
    }
    response
}

async fn report(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    let report: Report = match serde_json::from_slice(&body) {
        Ok(report) => report,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &format!("not a report: {error}")),
    };
    if report.proxy.is_empty() || report.proxy.len() > MAX_NAME || report.start.len() > MAX_NAME {
        return problem(StatusCode::BAD_REQUEST, "proxy, start: 1 to 512 bytes");
    }
    if shared.control().reported(&report, now()) {
        shared.counted.notify_one();
    }
    StatusCode::NO_CONTENT.into_response()
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    match shared.published.borrow().is_some() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting for the first probes\n").into_response(),
    }
}

async fn openmetrics(State(shared): State<Arc<Shared>>) -> Response {
    let text = metrics::text(&shared.control().status(now()));
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

fn problem(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({"error": error}))).into_response()
}
