//! The current state: `GET /v1/status` for people and tools, `/metrics`, `/healthz` and `/readyz` for machines.

use super::{Part, Problem, Shared};
use crate::clock::now;
use crate::kubernetes::Role;
use crate::metrics::{self, classic};
use crate::status::{DrainStatus, Status};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(shared.control().status(now()))
}

/// How far a version is from being at rest.
pub(super) async fn drain(
    State(shared): State<Arc<Shared>>,
    Part(Path((service, version))): Part<Path<(String, String)>>,
) -> Result<Json<DrainStatus>, Problem> {
    let drain = shared.control().drain(&service, &version);
    drain.map(Json).ok_or_else(|| Problem::not_found(format!("there is no version {version} of a service {service}")))
}

pub(super) async fn healthy() -> &'static str {
    "ok\n"
}

pub(super) async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    if let Some(why) = shared.control().held_back() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("nothing can be published: {why}\n")).into_response();
    }
    match shared.published.borrow().is_some() {
        true => "ok\n".into_response(),
        // A follower has nothing to wait for: it forwards requests to the leader.
        false if matches!(shared.leader.role(), Role::Follows(Some(_))) => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting for the first probes\n").into_response(),
    }
}

/// Uses OpenMetrics for clients that request it, as newer Prometheus versions do.
pub(super) async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let status = shared.control().status(now());
    shared.done.leads(shared.leader.role().decides());
    let text = metrics::text(status, &shared.done);
    let (kind, text) = match classic::asks_for_openmetrics(&headers) {
        true => (classic::OPEN_METRICS, text),
        false => (classic::KIND, classic::from_openmetrics(&text)),
    };
    ([(header::CONTENT_TYPE, kind), (header::VARY, "accept")], text).into_response()
}
