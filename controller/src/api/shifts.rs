//! Documents that come and go through the API: `/v1/shifts/{name}`.

use super::caller::Caller;
use super::{Part, Peer, Problem, Services, Shared, parse};
use crate::kubernetes::Role;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::{Extension, Json};
use bytes::Bytes;
use serde_json::Value;
use std::sync::Arc;

/// The document in force, as it was written.
pub(super) async fn get(
    State(shared): State<Arc<Shared>>,
    Part(Path(name)): Part<Path<String>>,
) -> Result<Json<Value>, Problem> {
    let document = shared.control().document(&name);
    document.map(Json).ok_or_else(|| Problem::not_found(format!("there is no TrafficShift {name}")))
}

/// Puts a document in force in place of the one of the same name, until the file of that one changes.
pub(super) async fn put(
    State(shared): State<Arc<Shared>>,
    Part(Path(name)): Part<Path<String>>,
    peer: Peer,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Services>), Problem> {
    outside_of_clusters(&shared, "apply")?;
    let document: Value = parse(body, "a TrafficShift")?;
    let by = super::who(&caller, &peer, &headers);
    let (is_new, turn) = {
        let mut control = shared.control();
        let is_new = control.put_shift(&name, document)?;
        control.edited_by(&name, &by);
        (is_new, shared.turns.ask())
    };
    tracing::info!(shift = name, by, "a document came through the API");
    let services = shared.after(turn, &name).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(services)))
}

/// Takes back a document that came through the API. Its services as they stand now: none, or those of the file's document
/// of the same name, which is in force again.
pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    Part(Path(name)): Part<Path<String>>,
    peer: Peer,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
) -> Result<Json<Services>, Problem> {
    outside_of_clusters(&shared, "delete trafficshift")?;
    let by = super::who(&caller, &peer, &headers);
    let turn = {
        let mut control = shared.control();
        control.delete_shift(&name)?;
        control.edited_by(&name, &by);
        shared.turns.ask()
    };
    tracing::info!(shift = name, by, "a document was deleted through the API");
    Ok(Json(shared.after_which_may_be_gone(turn, &name).await?))
}

fn outside_of_clusters(shared: &Shared, instead: &str) -> Result<(), Problem> {
    match shared.leader.role() {
        Role::Alone => Ok(()),
        _ => {
            let why = format!("documents are resources of the cluster here; expected `kubectl {instead}`");
            Err(Problem::new(StatusCode::CONFLICT, why))
        }
    }
}
