//! HTTP/JSON API: policies and reports for proxies, status and commands for users, health and metrics for machines.
//!
//! This file holds the routes, who may use them, and what applies to all of them; each concern has a file of its own.

use crate::clock::now;
use crate::kubernetes::TokenReviewer;
use crate::metrics::ControllerMetrics;
use crate::reconciler::{CommandError, Reconciler};
use crate::rollout::Command;
use crate::status::ServiceStatus;
use auth::{Guard, Scope};
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use rollouts::{Nothing, Promote, Rollback, SetTarget, SetWeight, command};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

mod admission;
mod auth;
mod barrier;
mod caller;
mod events;
mod forward;
mod openapi;
mod pinned_cert;
mod proxies;
mod published;
mod rollouts;
mod shifts;
mod status;

pub use admission::{Admission, Ticket};
pub use auth::{TokenError, TokenFiles, Tokens};
pub use barrier::ReconcileBarrier;
pub use caller::{Certificate, Filtered};
pub use events::{Events, keep_telling};
pub use forward::Leader;
pub use pinned_cert::PinnedCertVerifier;
pub use proxies::Complaints;
pub use published::Published;

/// The default maximum size of a request body.
const MAX_BODY_BYTES: usize = 64 << 10;
/// The maximum size of a report: some 5,000 versions.
const MAX_REPORT_BYTES: usize = 1 << 20;
/// The maximum size of a document, as for files.
const MAX_SHIFT_BYTES: usize = 4 << 20;
/// The timeout of a request, including its body, except for requests that wait on purpose.
const PATIENCE: Duration = Duration::from_secs(15);

/// State shared by all requests.
#[derive(Debug)]
pub struct Shared {
    /// The reconciler.
    pub reconciler: Mutex<Reconciler>,
    /// Notified when a change requires a reconcile.
    pub counted: Notify,
    /// Lets a command wait until the reconcile that includes it is done.
    pub turns: ReconcileBarrier,
    /// Subscribers to the event stream.
    pub events: Events,
    /// Counters for `/metrics`.
    pub done: ControllerMetrics,
    /// The latest policy, `None` before the first.
    pub published: watch::Receiver<Option<Published>>,
    /// Policies for proxies that may see only part of it.
    pub filtered: Filtered,
    /// Rate-limited log of false claims.
    pub complaints: Complaints,
    /// The tokens that authenticate callers.
    pub tokens: watch::Receiver<Tokens>,
    /// Reviews tokens of proxies that are in no file; `None` outside Kubernetes.
    pub reviewer: Option<Arc<TokenReviewer>>,
    /// Whether proxies may authenticate with client certificates.
    pub certificates: bool,
    /// The leader, if it is another replica.
    pub leader: Leader,
    /// Becomes true on shutdown.
    pub ending: watch::Receiver<bool>,
}

impl Shared {
    /// Locks the reconciler.
    pub fn reconciler(&self) -> MutexGuard<'_, Reconciler> {
        self.reconciler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The services of a rollout after the reconcile that includes a command.
    async fn after(&self, turn: u64, rollout: &str) -> Result<Services, ApiError> {
        let services = self.after_which_may_be_gone(turn, rollout).await?;
        match services.services.is_empty() {
            true => Err(ApiError::not_found("it is gone already")),
            false => Ok(services),
        }
    }

    /// The same for a rollout that may no longer exist.
    async fn after_which_may_be_gone(&self, turn: u64, rollout: &str) -> Result<Services, ApiError> {
        self.counted.notify_one();
        let mut ending = self.ending.clone();
        tokio::select! {
            () = self.turns.wait(turn) => {}
            _ = ending.wait_for(|ending| *ending) => {
                return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting down; it may not have been done"));
            }
        }
        let reconciler = self.reconciler();
        let services = reconciler.rollout_status(rollout, now()).unwrap_or_default();
        Ok(Services { services, unchanged: false, state_error: reconciler.state_error().map(str::to_owned) })
    }
}

/// The services that a rollout moves, as they stand.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Services {
    /// Each of them.
    pub services: Vec<ServiceStatus>,
    /// What was asked for was so already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unchanged: bool,
    /// Why what was asked for is done but not kept, if so: a restart would go on from what was kept before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
}

/// The peer address of the caller, if known.
type Peer = Option<Extension<ConnectInfo<SocketAddr>>>;

/// The caller, for logs and history: the name of its credential and its address, including for requests that another
/// replica has forwarded.
fn who(caller: &caller::Caller, peer: &Peer, headers: &HeaderMap) -> String {
    let direct = forward::address(peer);
    let address = match forward::handed_on_for(headers) {
        Some(first) => format!("{first} by way of {direct}"),
        None => direct,
    };
    caller.name().map_or_else(|| address.clone(), |name| format!("{name} from {address}"))
}

/// One path and one method.
struct Route {
    method: Method,
    path: &'static str,
    /// The scopes that grant access; empty: no token needed.
    allowed: &'static [Scope],
    /// The timeout; `None`: it waits on purpose.
    patience: Option<Duration>,
    /// Whether every replica serves it, not only the leader.
    by_all: bool,
    handler: MethodRouter<Arc<Shared>>,
}

impl Route {
    fn new(method: Method, path: &'static str, allowed: &'static [Scope], handler: MethodRouter<Arc<Shared>>) -> Self {
        Self { method, path, allowed, patience: Some(PATIENCE), by_all: false, handler }
    }

    fn by_all(self) -> Self {
        Self { by_all: true, ..self }
    }

    fn that_waits(self) -> Self {
        Self { patience: None, ..self }
    }
}

const EVERYBODY: &[Scope] = &[];
const READERS: &[Scope] = &[Scope::Read, Scope::Operate];
const OPERATORS: &[Scope] = &[Scope::Operate];
const PROXIES: &[Scope] = &[Scope::Proxy];
/// A policy contains session secrets, so that read-only tokens do not grant access.
const PROXIES_AND_OPERATORS: &[Scope] = &[Scope::Proxy, Scope::Operate];

/// All routes.
fn routes() -> Vec<Route> {
    let get_by = |path, allowed, handler| Route::new(Method::GET, path, allowed, handler);
    let told = |path, handler| Route::new(Method::POST, path, OPERATORS, handler);
    let reports = post(proxies::report).layer(DefaultBodyLimit::max(MAX_REPORT_BYTES));
    let put_shift = put(shifts::put).layer(DefaultBodyLimit::max(MAX_SHIFT_BYTES));
    vec![
        get_by("/v1/policy", PROXIES_AND_OPERATORS, get(proxies::policy)).that_waits().by_all(),
        Route::new(Method::POST, "/v1/reports", PROXIES, reports),
        get_by("/v1/status", READERS, get(status::status)),
        get_by("/v1/events", READERS, get(events::events)).that_waits(),
        get_by("/v1/services/{service}/versions/{version}/drain", READERS, get(status::drain)),
        get_by("/v1/rollouts/{name}/history", READERS, get(rollouts::history)),
        get_by("/v1/rollouts/{name}/series", READERS, get(rollouts::series)),
        told(
            "/v1/rollouts/{name}/promote",
            command(|Promote { full, override_gates }| Command::Promote { full, override_gates }),
        ),
        told("/v1/rollouts/{name}/pause", command(|Nothing {}| Command::Pause)),
        told("/v1/rollouts/{name}/resume", command(|Nothing {}| Command::Resume)),
        told("/v1/rollouts/{name}/abort", command(|Nothing {}| Command::Abort)),
        told(
            "/v1/rollouts/{name}/rollback",
            command(|Rollback { to, override_gates }| Command::Rollback { to, override_gates }),
        ),
        told("/v1/rollouts/{name}/set-target", command(|SetTarget { target }| Command::SetTarget { target })),
        told(
            "/v1/rollouts/{name}/set-weight",
            command(|SetWeight { weight, override_gates }| Command::SetWeight { weight, override_gates }),
        ),
        // A document may contain secrets.
        get_by("/v1/shifts/{name}", OPERATORS, get(shifts::get)),
        Route::new(Method::PUT, "/v1/shifts/{name}", OPERATORS, put_shift),
        Route::new(Method::DELETE, "/v1/shifts/{name}", OPERATORS, delete(shifts::delete)),
        get_by("/metrics", READERS, get(status::metrics)).by_all(),
        get_by("/healthz", EVERYBODY, get(status::healthy)).by_all(),
        get_by("/readyz", EVERYBODY, get(status::ready)).by_all(),
        get_by("/v1/openapi.json", EVERYBODY, get(openapi::document)).by_all(),
    ]
}

/// The router of the whole API.
pub fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for Route { method, path, allowed, patience, by_all, handler } in routes() {
        let (tokens, reviewer) = (shared.tokens.clone(), shared.reviewer.clone());
        let (certificates, changes) = (shared.certificates, method != Method::GET);
        let guard = Guard { tokens, reviewer, certificates, changes, allowed, patience };
        let handler = match by_all {
            true => handler,
            false => handler.route_layer(from_fn_with_state(shared.clone(), forward::forward_to_leader)),
        };
        router = router.route(path, handler.route_layer(from_fn_with_state(guard, auth::guard)));
    }
    router
        .merge(crate::page::router())
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "no such path"))
        .method_not_allowed_fallback(async || ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "no such method here"))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(map_response(for_nobody_else))
        .layer(from_fn(one_host))
        .layer(from_fn_with_state(shared.clone(), count))
        .with_state(shared)
}

/// The liveness and readiness endpoints for the kubelet, on a listener of their own.
pub fn health_router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(status::healthy))
        .route("/readyz", get(status::ready))
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "only /healthz and /readyz are here"))
        .layer(map_response(for_nobody_else))
        .with_state(shared)
}

/// Rejects a request whose host two parsers could read differently.
async fn one_host(request: Request, next: Next) -> Response {
    match request.headers().get_all(header::HOST).iter().count() {
        0 | 1 => next.run(request).await,
        number => ApiError::bad_request(format!("{number} host headers; expected one")).into_response(),
    }
}

/// Counts responses, including forwarded ones.
async fn count(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    shared.done.answered(route.as_ref().map_or("none", MatchedPath::as_str), response.status().as_u16());
    response
}

/// Sets headers that forbid caching and content sniffing.
async fn for_nobody_else(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// An error response: a status and `{"error": "..."}`.
#[derive(Debug)]
struct ApiError {
    status: StatusCode,
    error: String,
    /// The `www-authenticate` header, if any.
    challenge: Option<HeaderValue>,
}

/// What is said of it.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Problem")]
struct ProblemBody {
    /// In words.
    error: String,
}

impl ApiError {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into(), challenge: None }
    }

    /// Adds a `www-authenticate` header for a bearer token with these attributes of RFC 6750.
    fn with_challenge(self, attributes: &str) -> Self {
        let challenge = HeaderValue::try_from(format!(r#"Bearer realm="tideshift"{attributes}"#));
        Self { challenge: challenge.ok(), ..self }
    }

    fn not_found(error: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, error)
    }

    fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(ProblemBody { error: self.error })).into_response();
        self.challenge.map(|challenge| response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge));
        response
    }
}

impl From<CommandError> for ApiError {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::NotFound(why) => Self::not_found(why),
            CommandError::Conflict(why) => Self::new(StatusCode::CONFLICT, why),
            CommandError::Invalid(why) => Self::bad_request(why),
        }
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

/// An extractor that runs `T` and rewords its errors.
struct Extract<T>(T);

impl<S: Sync, T: FromRequestParts<S>> FromRequestParts<S> for Extract<T>
where
    ApiError: From<T::Rejection>,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        Ok(Self(T::from_request_parts(parts, state).await?))
    }
}

/// Parses the body as JSON; `what` names the expected content in the error.
fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>, what: &str) -> Result<T, ApiError> {
    let body = body?;
    // serde would also accept an array of the object's values.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(ApiError::bad_request(format!("not {what}: expected a JSON object")));
    }
    serde_json::from_slice(&body).map_err(|error| ApiError::bad_request(format!("not {what}: {error}")))
}
