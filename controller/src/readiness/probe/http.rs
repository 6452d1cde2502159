//! The `httpGet` probe, as the kubelet does it: one GET on its own connection; 200 to 399 is success. Certificates are
//! not verified, and redirects are followed while they stay on the same host.

use crate::net::{direct_client, header_map, status_of};
use reqwest::header::CONNECTION;
use reqwest::redirect;
use tideshift_core::shift::Endpoint;
use tideshift_core::shift::probe::HttpGet;

/// The most redirects that are followed.
const MAX_REDIRECTS: usize = 10;
/// The most bytes of an answer that are read. Their content does not matter, but they must arrive.
const MAX_BODY_BYTES: usize = 10 << 10;

/// The client for `httpGet` probes; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client(reqwest::Client);

impl Client {
    /// A client for any number of probes. It uses no proxy from the environment: probes go directly to their endpoints.
    ///
    /// # Errors
    ///
    /// If the TLS library cannot be set up.
    pub fn new() -> Result<Self, reqwest::Error> {
        let client = direct_client(concat!("tideshift-probe/", env!("CARGO_PKG_VERSION")));
        client.redirect(redirect::Policy::custom(follow_on_same_host)).pool_max_idle_per_host(0).build().map(Self)
    }

    /// Whether the endpoint answers `get` with 200 to 399. The caller limits the time.
    pub(super) async fn get(&self, endpoint: &Endpoint, get: &HttpGet) -> Result<(), String> {
        let request = self.0.get(url(endpoint, get)).header(CONNECTION, "close").headers(header_map(&get.headers)?);
        match status_of(request, MAX_BODY_BYTES).await? {
            200..400 => Ok(()),
            status => Err(format!("HTTP status {status}")),
        }
    }
}

/// A redirect to another host shows that this one is alive: it ends the probe successfully.
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
