//! The endpoints for proxies: `GET /v1/policy` and `POST /v1/reports`.

use super::caller::Caller;
use super::{ApiError, Extract, Published, Shared, parse};
use crate::clock::{Millis, now};
use crate::metrics::Claim;
use axum::Extension;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tideshift_core::protocol::report::Report;
use tokio::time::timeout;

/// How long a long poll is held when there is no newer policy.
const HOLD: Duration = Duration::from_secs(25);
/// The maximum length of a proxy id and of its start.
const MAX_NAME: usize = 512;

/// The interval between two log lines about the same kind of claim.
const COMPLAIN_EVERY: Millis = 10_000;

/// The query of a poll.
#[derive(Deserialize)]
pub(super) struct Poll {
    /// The id of the proxy; users omit it.
    #[serde(default)]
    proxy: String,
    #[serde(default)]
    epoch: String,
    #[serde(default)]
    after: u64,
    /// Whether the proxy supports deltas instead of the whole policy.
    #[serde(default)]
    delta: bool,
}

/// Long poll: answers at once if there is a newer policy than the one the proxy has, otherwise as soon as there is one,
/// or with 204 after `HOLD`.
pub(super) async fn policy(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Extract(Query(poll)): Extract<Query<Poll>>,
) -> Result<Response, ApiError> {
    if !poll.proxy.is_empty() {
        speaks_for(&shared, &caller, &poll.proxy)?;
    }
    let is_newer = |published: &Published| published.epoch != poll.epoch || published.revision > poll.after;
    let (mut published, mut ending) = (shared.published.clone(), shared.ending.clone());
    let newer = published.wait_for(|published| published.as_ref().is_some_and(is_newer));
    tokio::select! {
        newer = timeout(HOLD, newer) => match newer {
            Ok(Ok(newer)) => {
                let newer = newer.clone().map(|newer| shared.filtered.of(newer, &caller.sees));
                Ok(newer.map_or_else(|| StatusCode::NO_CONTENT.into_response(), |newer| send(&newer, &poll)))
            }
            _ => Ok(StatusCode::NO_CONTENT.into_response()),
        },
        _ = ending.wait_for(|ending| *ending) => {
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting down"))
        }
    }
}

fn send(published: &Published, poll: &Poll) -> Response {
    let json = match poll.delta {
        true => published.since(&poll.epoch, poll.after),
        false => published.for_older(),
    };
    let mut response = ([(header::CONTENT_TYPE, "application/json")], json).into_response();
    if let Ok(epoch) = HeaderValue::from_str(&published.epoch) {
        response.headers_mut().insert("x-tideshift-epoch", epoch);
    }
    response
}

/// Accepts a report of a proxy.
pub(super) async fn report(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, ApiError> {
    let mut report: Report = parse(body, "a report")?;
    if report.proxy.is_empty() || report.proxy.len() > MAX_NAME || report.start.len() > MAX_NAME {
        return Err(ApiError::bad_request("proxy, start: 1 to 512 bytes"));
    }
    speaks_for(&shared, &caller, &report.proxy)?;
    report.check().map_err(ApiError::bad_request)?;
    if !caller.sees.is_all() {
        let before = report.services.len();
        report.services.retain(|service| caller.sees.includes(&service.name));
        if report.services.len() < before {
            let why = "it reports services that its credential may not see".to_owned();
            ignored(&shared, &report.proxy, Claim::Service, &why);
        }
    }
    shared.done.took_report(now());
    let reported = shared.reconciler().reported(&report, now());
    for (claim, why) in &reported.ignored {
        ignored(&shared, &report.proxy, *claim, why);
    }
    if reported.decides {
        shared.counted.notify_one();
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Rejects a caller that may not speak for the proxy.
fn speaks_for(shared: &Shared, caller: &Caller, proxy: &str) -> Result<(), ApiError> {
    caller.may_speak_for(proxy).map_err(|why| {
        ignored(shared, proxy, Claim::Proxy, &why);
        ApiError::new(StatusCode::FORBIDDEN, why)
    })
}

/// Counts an ignored claim, and logs it at a limited rate.
fn ignored(shared: &Shared, proxy: &str, claim: Claim, why: &str) {
    shared.done.ignored_claim(claim);
    if shared.complaints.may(claim, now()) {
        tracing::warn!(proxy, "ignored: {why}; further ones of this kind are counted only, for 10 s");
    }
}

/// When each kind of claim was last logged.
#[derive(Debug, Default)]
pub struct Complaints([AtomicU64; Claim::ALL.len()]);

impl Complaints {
    fn may(&self, claim: Claim, now: Millis) -> bool {
        let at = Claim::ALL.iter().position(|of| *of == claim).unwrap_or_default();
        let last = self.0[at].load(Ordering::Relaxed);
        let is_due = last == 0 || now.saturating_sub(last) >= COMPLAIN_EVERY;
        is_due && self.0[at].compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
