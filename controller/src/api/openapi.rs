//! `GET /v1/openapi.json`: what this API is, for programs and for people who write them.
//!
//! The document is committed. Tests make it from the routes and the types, hold it against what is committed, and ask
//! every route for what it promises. After a change: `UPDATE_GOLDEN=1 cargo test -p tideshift openapi`.

use axum::http::header;
use axum::response::IntoResponse;

const DOCUMENT: &str = include_str!("../../../docs/openapi.json");

pub(super) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT)
}

#[cfg(test)]
mod generate;
#[cfg(test)]
mod tests;
