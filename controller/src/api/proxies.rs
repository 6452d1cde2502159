//! What proxies ask for and tell: `GET /v1/policy` and `POST /v1/reports`.

use super::{Part, Problem, Published, Shared, parse};
use crate::clock::now;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tideshift_core::report::Report;
use tokio::time::timeout;

/// How long a poll is held when there is nothing newer.
const HOLD: Duration = Duration::from_secs(25);
/// The longest proxy id and start.
const MAX_NAME: usize = 512;

/// What a poll says; also `proxy`, its id, for which all policies are the same so far.
#[derive(Deserialize)]
pub(super) struct Poll {
    #[serde(default)]
    epoch: String,
    #[serde(default)]
    after: u64,
    /// Whether the proxy understands what has changed in place of the whole.
    #[serde(default)]
    delta: bool,
}

/// Answers at once if there is a policy newer than the one that the proxy has, else when there is, else after a while
/// with 204.
pub(super) async fn policy(
    State(shared): State<Arc<Shared>>,
    Part(Query(poll)): Part<Query<Poll>>,
) -> Result<Response, Problem> {
    let is_newer = |published: &Published| published.epoch != poll.epoch || published.revision > poll.after;
    let (mut published, mut ending) = (shared.published.clone(), shared.ending.clone());
    let newer = published.wait_for(|published| published.as_ref().is_some_and(is_newer));
    tokio::select! {
        newer = timeout(HOLD, newer) => match newer {
            Ok(Ok(newer)) => Ok(newer.clone().map_or_else(|| StatusCode::NO_CONTENT.into_response(), |newer| send(&newer, &poll))),
            _ => Ok(StatusCode::NO_CONTENT.into_response()),
        },
        _ = ending.wait_for(|ending| *ending) => {
            Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "shutting down"))
        }
    }
}

fn send(published: &Published, poll: &Poll) -> Response {
    let json = match poll.delta {
        true => published.since(&poll.epoch, poll.after),
        false => published.json.clone(),
    };
    let mut response = ([(header::CONTENT_TYPE, "application/json")], json).into_response();
    if let Ok(epoch) = HeaderValue::from_str(&published.epoch) {
        response.headers_mut().insert("x-tideshift-epoch", epoch);
    }
    response
}

/// Takes in what a proxy has counted.
pub(super) async fn report(
    State(shared): State<Arc<Shared>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Problem> {
    let report: Report = parse(body, "a report")?;
    if report.proxy.is_empty() || report.proxy.len() > MAX_NAME || report.start.len() > MAX_NAME {
        return Err(Problem::bad_request("proxy, start: 1 to 512 bytes"));
    }
    report.check().map_err(Problem::bad_request)?;
    shared.done.took_report(now());
    if shared.control().reported(&report, now()) {
        shared.counted.notify_one();
    }
    Ok(StatusCode::NO_CONTENT)
}
