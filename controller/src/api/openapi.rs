//! `GET /v1/openapi.json`: the OpenAPI description of this API.
//!
//! The document is committed. Tests generate it from the routes and types, compare it with the committed file, and
//! check the responses of every route against it. After a change run `UPDATE_GOLDEN=1 cargo test -p tideshift openapi`.

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
