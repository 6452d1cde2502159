//! The `httpGet` probe, as the kubelet does it: one GET on a connection of its own, 200 to 399 is success,
//! certificates are not verified, and a redirect is followed as long as it stays on the same host.

use crate::net::{install_crypto_provider, reason};
use reqwest::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{StatusCode, redirect};
use tideshift_core::shift::{Endpoint, HttpGet};

/// The most redirects that are followed.
const MAX_REDIRECTS: usize = 10;
/// The most bytes that are read of an answer; what is in them does not matter, that they come does.
const MAX_BODY_BYTES: usize = 10 << 10;

/// What `httpGet` probes are sent with; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client(reqwest::Client);

impl Client {
    /// A client for any number of probes. Takes no proxy from the environment: probes go straight to their endpoints.
    ///
    /// # Errors
    ///
    /// If the TLS library cannot be set up.
    pub fn new() -> Result<Self, reqwest::Error> {
        install_crypto_provider();
        let client = reqwest::Client::builder()
            .user_agent(concat!("tideshift-probe/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::custom(follow_on_same_host))
            .tls_danger_accept_invalid_certs(true)
            .pool_max_idle_per_host(0)
            .no_proxy();
        client.build().map(Self)
    }

    /// Whether the endpoint answers `get` with 200 to 399. The caller bounds the time.
    pub(super) async fn get(&self, endpoint: &Endpoint, get: &HttpGet) -> Result<(), String> {
        let request = self.0.get(url(endpoint, get)).headers(headers(get)?);
        let mut answer = request.send().await.map_err(|error| reason(&error))?;
        let status = answer.status();
        let mut left = MAX_BODY_BYTES;
        while left > 0 {
            match answer.chunk().await.map_err(|error| reason(&error))? {
                Some(chunk) => left = left.saturating_sub(chunk.len()),
                None => break,
            }
        }
        match (StatusCode::OK..StatusCode::BAD_REQUEST).contains(&status) {
            true => Ok(()),
            false => Err(format!("HTTP status {}", status.as_u16())),
        }
    }
}

/// A redirect to another host says that this one is alive: it ends the probe, successfully.
fn follow_on_same_host(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let first = attempt.previous().first().and_then(|url| url.host_str());
    if first != attempt.url().host_str() {
        attempt.stop()
    } else if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error(format!("more than {MAX_REDIRECTS} redirects"))
    } else {
        attempt.follow()
    }
}

fn url(endpoint: &Endpoint, get: &HttpGet) -> String {
    let host = get.host.clone().unwrap_or_else(|| endpoint.host.clone());
    let authority = Endpoint { host, port: get.port.unwrap_or(endpoint.port) };
    let scheme = if get.https { "https" } else { "http" };
    format!("{scheme}://{authority}{}", get.path)
}

fn headers(get: &HttpGet) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::from_iter([(CONNECTION, HeaderValue::from_static("close"))]);
    for (name, value) in &get.headers {
        let name = HeaderName::try_from(name).map_err(|_| format!("`{name}` is not a header name"))?;
        let value = HeaderValue::try_from(value).map_err(|_| format!("the value of `{name}` is not one"))?;
        headers.append(name, value);
    }
    Ok(headers)
}
