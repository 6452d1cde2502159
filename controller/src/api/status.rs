//! How things stand: `GET /v1/status` for people and tools, `/metrics`, `/healthz` and `/readyz` for machines.

use super::{Shared, now};
use crate::metrics;
use crate::status::Status;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(shared.control().status(now()))
}

pub(super) async fn healthy() -> &'static str {
    "ok\n"
}

pub(super) async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    match shared.published.borrow().is_some() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting for the first probes\n").into_response(),
    }
}

pub(super) async fn openmetrics(State(shared): State<Arc<Shared>>) -> Response {
    let text = metrics::text(&shared.control().status(now()));
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}
