//! Creates, reads and deletes documents through the API: `/v1/shifts/{name}`.

use super::caller::Caller;
use super::{ApiError, Extract, Peer, Services, Shared, parse};
use crate::role::Role;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::{Extension, Json};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use std::sync::Arc;
use tideshift_core::shift::OnDelete;

/// The document in force, as written.
pub(super) async fn get(
    State(shared): State<Arc<Shared>>,
    Extract(Path(name)): Extract<Path<String>>,
) -> Result<Json<Value>, ApiError> {
    let document = shared.reconciler().document(&name);
    document.map(Json).ok_or_else(|| ApiError::not_found(format!("there is no TrafficShift {name}")))
}

/// Puts a document in force, in place of the one with the same name until the file of that one changes.
pub(super) async fn put(
    State(shared): State<Arc<Shared>>,
    Extract(Path(name)): Extract<Path<String>>,
    peer: Peer,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Services>), ApiError> {
    outside_of_clusters(&shared, "apply")?;
    let document: Value = parse(body, "a TrafficShift")?;
    let by = super::who(&caller, &peer, &headers);
    let (is_new, turn) = {
        let mut reconciler = shared.reconciler();
        let is_new = reconciler.put_shift(&name, document)?;
        reconciler.edited_by(&name, &by);
        (is_new, shared.turns.ask())
    };
    tracing::info!(shift = name, by, "a document came through the API");
    let services = shared.after(turn, &name).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(services)))
}

/// How a document is deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Delete {
    /// What becomes of its traffic, in place of what it says itself.
    #[serde(default)]
    on_delete: Option<Traffic>,
}

/// What becomes of the traffic of a document that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Traffic {
    Keep,
    Drain,
}

/// Removes a document that came through the API, or discards the state of one that is gone. Returns its services:
/// unchanged while its weights are in force, or those of the file's document with the same name, which comes into force
/// again.
pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    Extract(Path(name)): Extract<Path<String>>,
    Extract(Query(how)): Extract<Query<Delete>>,
    peer: Peer,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
) -> Result<Json<Services>, ApiError> {
    let by = super::who(&caller, &peer, &headers);
    let on_delete = how.on_delete.map(|traffic| match traffic {
        Traffic::Keep => OnDelete::Keep,
        Traffic::Drain => OnDelete::Drain,
    });
    let turn = {
        let mut reconciler = shared.reconciler();
        if reconciler.departure(&name).is_none() {
            outside_of_clusters(&shared, "delete trafficshift")?;
        }
        reconciler.delete_shift(&name, on_delete)?;
        reconciler.edited_by(&name, &by);
        shared.turns.ask()
    };
    tracing::info!(shift = name, by, "a document was deleted through the API");
    Ok(Json(shared.after_which_may_be_gone(turn, &name).await?))
}

fn outside_of_clusters(shared: &Shared, instead: &str) -> Result<(), ApiError> {
    match shared.leader.role() {
        Role::Alone => Ok(()),
        _ => {
            let why = format!("documents are resources of the cluster here; expected `kubectl {instead}`");
            Err(ApiError::new(StatusCode::CONFLICT, why))
        }
    }
}
