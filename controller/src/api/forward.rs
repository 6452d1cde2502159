//! Request forwarding: a follower forwards requests that only the leader can answer.

use crate::api::caller::Certificate;
use crate::api::{ApiError, MAX_SHIFT_BYTES, Peer, PinnedCertVerifier, Shared};
use crate::role::Role;
use axum::Extension;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// Marks a forwarded request, which is not forwarded again.
const HANDED_ON: HeaderName = HeaderName::from_static("x-tideshift-handed-on");
/// The address of the client whose request was forwarded.
const HANDED_ON_FOR: HeaderName = HeaderName::from_static("x-tideshift-handed-on-for");
/// The names in that client's certificate, one header per name. Accepted from other replicas only.
const HANDED_ON_NAME: HeaderName = HeaderName::from_static("x-tideshift-handed-on-name");
/// The connection timeout to the leader.
const CONNECT: Duration = Duration::from_secs(2);

/// How followers reach the leader.
#[derive(Debug)]
pub struct Leader {
    role: watch::Receiver<Role>,
    /// Verifies the leader's certificate.
    twin: Option<PinnedCertVerifier>,
    client: OnceLock<Result<reqwest::Client, String>>,
}

impl Leader {
    /// From the role of this replica. With TLS all replicas have the same certificate.
    pub fn new(role: watch::Receiver<Role>, twin: Option<PinnedCertVerifier>) -> Self {
        Self { role, twin, client: OnceLock::new() }
    }

    /// The current role of this replica.
    pub fn role(&self) -> Role {
        self.role.borrow().clone()
    }

    fn client(&self) -> Result<reqwest::Client, ApiError> {
        let client = self.client.get_or_init(|| build(self.twin.as_ref()));
        client.clone().map_err(|why| ApiError::new(StatusCode::BAD_GATEWAY, why))
    }
}

fn build(twin: Option<&PinnedCertVerifier>) -> Result<reqwest::Client, String> {
    let builder = match twin {
        Some(twin) => twin.client()?,
        None => reqwest::Client::builder(),
    };
    builder.no_proxy().connect_timeout(CONNECT).build().map_err(|error| error.to_string())
}

/// The address of a caller.
pub(super) fn address(peer: &Peer) -> String {
    peer.as_ref().map_or_else(
        || "an unknown address".to_owned(),
        |Extension(ConnectInfo(peer))| peer.ip().to_canonical().to_string(),
    )
}

/// The client address in a forwarded request. Clients can set it, too, so that it is always shown together with the
/// address of the sender.
pub(super) fn handed_on_for(headers: &HeaderMap) -> Option<IpAddr> {
    headers.get(HANDED_ON).and(headers.get(HANDED_ON_FOR))?.to_str().ok()?.parse().ok()
}

/// The certificate of the client: that of the connection or, for a request forwarded by another replica, that of the
/// original client.
pub(super) fn certificate(certificate: &Certificate, headers: &HeaderMap) -> Certificate {
    match certificate {
        Certificate::Proxy(_) => certificate.clone(),
        Certificate::Replica => {
            let names = headers.get_all(HANDED_ON_NAME).iter().filter_map(|name| name.to_str().ok());
            Certificate::proxy(names.map(str::to_owned))
        }
    }
}

/// Serves a request here if this replica is the leader, and otherwise forwards it. A leader that loses leadership is
/// not waited for.
pub(super) async fn forward_to_leader(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let role = shared.leader.role();
    let Role::Follows(leader) = &role else { return next.run(request).await };
    let nobody = || {
        let why = "no replica leads at the moment; try again in a few seconds";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why).into_response()
    };
    let Some(leader) = leader.as_ref().filter(|_| !request.headers().contains_key(HANDED_ON)) else { return nobody() };
    let mut changes = shared.leader.role.clone();
    tokio::select! {
        answer = ask(&shared, leader, request) => answer.unwrap_or_else(IntoResponse::into_response),
        _ = changes.wait_for(|now| *now != role) => nobody(),
    }
}

async fn ask(shared: &Shared, leader: &str, request: Request) -> Result<Response, ApiError> {
    let gone = |error: &dyn std::fmt::Display| ApiError::new(StatusCode::BAD_GATEWAY, format!("the leader: {error}"));
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, MAX_SHIFT_BYTES).await;
    let body = body.map_err(|_| ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "the body is too long"))?;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut headers = parts.headers;
    for own in [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION] {
        headers.remove(own);
    }
    headers.remove(HANDED_ON_NAME);
    if let Some(Certificate::Proxy(names)) = parts.extensions.get::<Certificate>() {
        for name in names.iter().filter_map(|name| HeaderValue::from_str(name).ok()) {
            headers.append(HANDED_ON_NAME, name);
        }
    }
    headers.insert(HANDED_ON, HeaderValue::from_static("1"));
    let peer: Peer = parts.extensions.get::<ConnectInfo<SocketAddr>>().cloned().map(Extension);
    HeaderValue::try_from(address(&peer)).ok().map(|peer| headers.insert(HANDED_ON_FOR, peer));
    let request = shared.leader.client()?.request(parts.method, format!("{}{path}", leader.trim_end_matches('/')));
    let answer = request.headers(headers).body(body).send().await.map_err(|error| gone(&crate::net::reason(&error)))?;
    let mut response = Response::builder().status(answer.status());
    if let Some(headers) = response.headers_mut() {
        headers.clone_from(answer.headers());
        for own in [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION] {
            headers.remove(own);
        }
    }
    response.body(Body::from_stream(answer.bytes_stream())).map_err(|error| gone(&error))
}
