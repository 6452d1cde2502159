//! Commands to rollouts, `POST /v1/rollouts/{name}/promote` and its siblings, and their history.

use super::caller::Caller;
use super::{ApiError, Extract, Peer, Services, Shared, parse};
use crate::clock::now;
use crate::reconciler::series::RolloutSeries;
use crate::rollout::Command;
use crate::status::TransitionStatus;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::routing::{MethodRouter, post};
use axum::{Extension, Json};
use bytes::Bytes;
use schemars::JsonSchema;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use std::sync::Arc;

/// For commands that need nothing more said.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// How far to go.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Promote {
    /// Straight to the last step, which is everything.
    #[serde(default)]
    pub(super) full: bool,
    /// Past gates that have not said yes.
    #[serde(default, rename = "overrideGates")]
    pub(super) override_gates: bool,
}

/// Where to go back to.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rollback {
    /// The version to go back to.
    pub(super) to: String,
    /// Past gates, if that version has not served everything yet.
    #[serde(default, rename = "overrideGates")]
    pub(super) override_gates: bool,
}

/// Where to go.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SetTarget {
    /// The version to move to.
    pub(super) target: String,
}

/// How much.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SetWeight {
    /// The target's share in percent, 0 to 100.
    #[schemars(range(max = 100))]
    #[serde(deserialize_with = "percent")]
    pub(super) weight: u32,
    /// Past gates that have not said yes.
    #[serde(default, rename = "overrideGates")]
    pub(super) override_gates: bool,
}

fn percent<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    let weight = u32::deserialize(from)?;
    let why = || D::Error::custom(format!("weight: {weight} is not allowed; expected 0 to 100 percent"));
    (weight <= 100).then_some(weight).ok_or_else(why)
}

/// The route of a command with body `B`; an empty body counts as an empty object.
pub(super) fn command<B: DeserializeOwned + 'static>(command: fn(B) -> Command) -> MethodRouter<Arc<Shared>> {
    let handler = async move |State(shared): State<Arc<Shared>>,
                              Extract(Path(name)): Extract<Path<String>>,
                              peer: Peer,
                              Extension(caller): Extension<Caller>,
                              headers: HeaderMap,
                              body: Result<Bytes, BytesRejection>| {
        let body = body.map(|body| if body.is_empty() { Bytes::from_static(b"{}") } else { body });
        let command = command(parse(body, "what this command needs")?);
        let by = super::who(&caller, &peer, &headers);
        tracing::info!(rollout = name, ?command, by, "asked for through the API");
        let (changed, turn) = {
            let mut reconciler = shared.reconciler();
            (reconciler.command_by(Some(&by), &name, &command, now())?, shared.turns.ask())
        };
        let services = shared.after(turn, &name).await?;
        Ok::<_, ApiError>(Json(Services { unchanged: !changed, ..services }))
    };
    post(handler)
}

/// What has happened to a rollout.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct History {
    /// The newest last.
    transitions: Vec<TransitionStatus>,
}

pub(super) async fn history(
    State(shared): State<Arc<Shared>>,
    Extract(Path(name)): Extract<Path<String>>,
) -> Result<Json<History>, ApiError> {
    let transitions = shared.reconciler().history(&name);
    let transitions = transitions.ok_or_else(|| ApiError::not_found(format!("there is no rollout {name}")))?;
    Ok(Json(History { transitions }))
}

pub(super) async fn series(
    State(shared): State<Arc<Shared>>,
    Extract(Path(name)): Extract<Path<String>>,
) -> Result<Json<RolloutSeries>, ApiError> {
    let series = shared.reconciler().series(&name, now());
    series.map(Json).ok_or_else(|| ApiError::not_found(format!("there is no rollout {name}")))
}
