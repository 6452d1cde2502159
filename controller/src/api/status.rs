//! The current state: `GET /v1/status` for users and tools, `/metrics`, `/healthz` and `/readyz` for machines.

use super::{ApiError, Extract, Shared};
use crate::clock::now;
use crate::metrics;
use crate::metrics::text_format;
use crate::role::Role;
use crate::status::{DrainStatus, Status};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(shared.reconciler().status(now()))
}

/// The drain status of a version.
pub(super) async fn drain(
    State(shared): State<Arc<Shared>>,
    Extract(Path((service, version))): Extract<Path<(String, String)>>,
) -> Result<Json<DrainStatus>, ApiError> {
    let drain = shared.reconciler().drain(&service, &version);
    drain.map(Json).ok_or_else(|| ApiError::not_found(format!("there is no version {version} of a service {service}")))
}

pub(super) async fn healthy() -> &'static str {
    "ok\n"
}

pub(super) async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    if let Some(why) = shared.reconciler().held_back() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("nothing can be published: {why}\n")).into_response();
    }
    match shared.published.borrow().is_some() {
        true => "ok\n".into_response(),
        // A follower is ready: it forwards requests to the leader.
        false if matches!(shared.leader.role(), Role::Follows(Some(_))) => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting for the first probes\n").into_response(),
    }
}

/// Uses OpenMetrics for clients that request it, as newer Prometheus versions do.
pub(super) async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let status = shared.reconciler().status(now());
    shared.done.leads(shared.leader.role().decides());
    let text = metrics::text(status, &shared.done);
    let (kind, text) = match text_format::asks_for_openmetrics(&headers) {
        true => (text_format::OPEN_METRICS, text),
        false => (text_format::KIND, text_format::from_openmetrics(&text)),
    };
    ([(header::CONTENT_TYPE, kind), (header::VARY, "accept")], text).into_response()
}
