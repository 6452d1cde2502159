//! HTTP/JSON: policies for proxies and their reports, status and commands for people, health and metrics for machines.
//!
//! Here is which routes there are, who may use them, and what holds for all of them; below, one file for each concern.

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

/// The largest body where nothing else is said.
const MAX_BODY_BYTES: usize = 64 << 10;
/// The largest report: some 5,000 versions.
const MAX_REPORT_BYTES: usize = 1 << 20;
/// The largest document, as of files.
const MAX_SHIFT_BYTES: usize = 4 << 20;
/// How long a request may take, with reading its body; those that wait on purpose excepted.
const PATIENCE: Duration = Duration::from_secs(15);

/// What requests share.
#[derive(Debug)]
pub struct Shared {
    /// The controller's mind.
    pub reconciler: Mutex<Reconciler>,
    /// Told when something has changed that the mind should look at.
    pub counted: Notify,
    /// Who waits until the mind has done so.
    pub turns: ReconcileBarrier,
    /// Who wants to hear of everything.
    pub events: Events,
    /// What was done, for `/metrics`.
    pub done: ControllerMetrics,
    /// The newest policy, `None` before the first.
    pub published: watch::Receiver<Option<Published>>,
    /// Policies for proxies that may not see all of them.
    pub filtered: Filtered,
    /// What was said of false claims.
    pub complaints: Complaints,
    /// Who may ask.
    pub tokens: watch::Receiver<Tokens>,
    /// Reviews tokens of proxies that are in no file; none outside Kubernetes.
    pub reviewer: Option<Arc<TokenReviewer>>,
    /// Whether proxies may be known by their certificates.
    pub certificates: bool,
    /// Who decides, if it is not this replica.
    pub leader: Leader,
    /// Becomes true when the process is to end.
    pub ending: watch::Receiver<bool>,
}

impl Shared {
    /// The controller's mind, for as long as one thought takes.
    pub fn reconciler(&self) -> MutexGuard<'_, Reconciler> {
        self.reconciler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a rollout stands once what was asked for is done.
    async fn after(&self, turn: u64, rollout: &str) -> Result<Services, ApiError> {
        let services = self.after_which_may_be_gone(turn, rollout).await?;
        match services.services.is_empty() {
            true => Err(ApiError::not_found("it is gone already")),
            false => Ok(services),
        }
    }

    /// The same where it need not be there any longer.
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

/// The caller's address, where it is known.
type Peer = Option<Extension<ConnectInfo<SocketAddr>>>;

/// Who asks, for the log and for histories: the credential's name and the address, also where another replica has handed
/// the request on.
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
    /// Whose tokens will do; empty: no token is needed.
    allowed: &'static [Scope],
    /// How long it may take; `None`: it waits on purpose.
    patience: Option<Duration>,
    /// Whether every replica answers it, not the leader alone.
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
/// A policy holds the secrets that sign sessions, so that it is not for every reader.
const PROXIES_AND_OPERATORS: &[Scope] = &[Scope::Proxy, Scope::Operate];

/// All there are.
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
        // A document may hold secrets.
        get_by("/v1/shifts/{name}", OPERATORS, get(shifts::get)),
        Route::new(Method::PUT, "/v1/shifts/{name}", OPERATORS, put_shift),
        Route::new(Method::DELETE, "/v1/shifts/{name}", OPERATORS, delete(shifts::delete)),
        get_by("/metrics", READERS, get(status::metrics)).by_all(),
        get_by("/healthz", EVERYBODY, get(status::healthy)).by_all(),
        get_by("/readyz", EVERYBODY, get(status::ready)).by_all(),
        get_by("/v1/openapi.json", EVERYBODY, get(openapi::document)).by_all(),
    ]
}

/// The whole API.
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

/// What the kubelet asks: whether this replica lives, and whether it can take requests. For a listener of its own.
pub fn health_router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(status::healthy))
        .route("/readyz", get(status::ready))
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "only /healthz and /readyz are here"))
        .layer(map_response(for_nobody_else))
        .with_state(shared)
}

/// Refuses what two readers could take for two hosts.
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

/// No answer is for a cache, and none is anything but what it says it is.
async fn for_nobody_else(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Why a request is not done: a status and `{"error": "..."}`.
#[derive(Debug)]
struct ApiError {
    status: StatusCode,
    error: String,
    /// What kind of token would do.
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

    /// Also says by `www-authenticate` that a bearer token is needed, with these attributes of RFC 6750.
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

/// Reads a part of the request as `T` does, and says what is wrong with it in our words.
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

/// The body as JSON; `what` it should be is for the message if it is not.
fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>, what: &str) -> Result<T, ApiError> {
    let body = body?;
    // A list of an object's values would do for serde.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(ApiError::bad_request(format!("not {what}: expected a JSON object")));
    }
    serde_json::from_slice(&body).map_err(|error| ApiError::bad_request(format!("not {what}: {error}")))
}
