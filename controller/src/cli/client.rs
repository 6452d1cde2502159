//! The API client of the subcommands that talk to a running controller.

use crate::cli::plugin::{Place, Way};
use crate::cli::{Failure, token_in};
use crate::net;
use crate::net::io_reason;
use reqwest::{Certificate, Method, StatusCode, header, redirect};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// The timeout of a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// The default address of the controller.
const NEAR: &str = "http://127.0.0.1:7460";
/// The environment variable with the token. There is no flag for it, because other users can read command lines.
const TOKEN: &str = "TIDESHIFT_TOKEN";

/// The address of the controller and the credentials.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The controller")]
pub(super) struct Server {
    /// The URL of the controller. Without it, the kubectl plugin connects through the API server.
    ///
    /// [default: http://127.0.0.1:7460]
    #[arg(long, value_name = "URL", env = "TIDESHIFT_SERVER")]
    server: Option<String>,

    /// A file whose first line is the bearer token. Alternatively set TIDESHIFT_TOKEN to the token itself.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_TOKEN_FILE")]
    token_file: Option<PathBuf>,

    /// CA certificates in PEM to trust instead of the system's, if the controller uses TLS.
    #[arg(long, value_name = "FILE", env = "TIDESHIFT_CA_FILE")]
    ca_file: Option<PathBuf>,

    #[command(flatten)]
    place: Place,
}

/// A client of one controller.
#[derive(Debug)]
pub(super) struct Controller {
    base: String,
    client: reqwest::Client,
    /// The namespace of rollout names that have none.
    namespace: Option<String>,
}

impl Server {
    /// Creates the client. Sends nothing to the controller yet.
    pub(super) async fn open(&self) -> Result<Controller, Failure> {
        let mut client = reqwest::Client::builder().no_proxy().redirect(redirect::Policy::none());
        let way = if self.server.is_some() { None } else { self.place.way().await? };
        let base = match (&self.server, &way) {
            (Some(server), _) => base_of(server).map_err(Failure::Usage)?,
            (None, Some(Way { address, host: Some(host), .. })) => {
                client = client.resolve(host, *address);
                format!("https://{host}:{}", address.port())
            }
            (None, Some(Way { address, host: None, .. })) => format!("http://{address}"),
            (None, None) => NEAR.to_owned(),
        };
        if let Some(token) = self.token()?.or_else(|| way.and_then(|way| way.token)) {
            let mut value = header::HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| {
                Failure::Usage(
                    "the token contains characters that a header cannot carry; expected visible ASCII".to_owned(),
                )
            })?;
            value.set_sensitive(true);
            client = client.default_headers([(header::AUTHORIZATION, value)].into_iter().collect());
        }
        if let Some(path) = &self.ca_file {
            let usage = |why: String| Failure::Usage(format!("--ca-file {}: {why}", path.display()));
            let pem = fs::read(path).map_err(|error| usage(io_reason(&error)))?;
            let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| usage(net::reason(&error)))?;
            if certificates.is_empty() {
                return Err(usage("no certificate in it; expected PEM".to_owned()));
            }
            client = client.tls_certs_only(certificates);
        } else if !base.starts_with("https:") {
            // Without TLS no certificates are needed, and loading the system's fails in a container that has none.
            client = client.tls_certs_only([]);
        }
        let client = client.build().map_err(|error| Failure::Other(net::reason(&error).into()))?;
        Ok(Controller { base, client, namespace: self.place.namespace().await? })
    }

    fn token(&self) -> Result<Option<String>, Failure> {
        match &self.token_file {
            Some(path) => token_in("--token-file", path).map(Some),
            None => Ok(std::env::var(TOKEN).ok().filter(|token| !token.is_empty())),
        }
    }
}

/// What paths are put behind, of what the user says.
fn base_of(server: &str) -> Result<String, String> {
    let full = with_scheme(server);
    let is_right = |url: &reqwest::Url| {
        let is_http = matches!(url.scheme(), "http" | "https") && url.has_host();
        is_http && url.username().is_empty() && url.password().is_none()
    };
    match reqwest::Url::parse(&full).ok().filter(is_right) {
        Some(_) => Ok(full.trim_end_matches('/').to_owned()),
        None => {
            // A password is for no log.
            let shown = server.rsplit_once('@').map_or_else(|| server.to_owned(), |(_, rest)| format!("***@{rest}"));
            Err(format!(
                "--server {shown}: expected HOST:PORT, or a URL of http or https with a host and without a user, such as \
                 {NEAR}"
            ))
        }
    }
}

/// `host:port` alone is taken for HTTP, as curl does.
fn with_scheme(server: &str) -> String {
    if server.contains("://") { server.to_owned() } else { format!("http://{server}") }
}

impl Controller {
    /// The JSON document at a path, such as `/v1/status`.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.send(Method::GET, path, None::<&()>).await
    }

    /// Whether a rollout is in the selected namespace; true if no namespace is selected.
    pub(super) fn is_meant(&self, rollout: &str) -> bool {
        let of = |namespace: &String| rollout.strip_suffix(namespace).is_some_and(|rest| rest.ends_with('.'));
        self.namespace.as_ref().is_none_or(of)
    }

    /// The selected namespace, for messages.
    pub(super) fn place(&self) -> String {
        self.namespace.as_ref().map_or_else(String::new, |namespace| format!(" in namespace {namespace}"))
    }

    /// The full name of a rollout or service. Adds the selected namespace unless the name contains a dot.
    pub(super) fn whole_name(&self, name: &str) -> String {
        match &self.namespace {
            Some(namespace) if !name.contains('.') => format!("{name}.{namespace}"),
            _ => name.to_owned(),
        }
    }

    /// The URL of a path, for messages.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Sends a request and returns the decoded response. Requests that change something need a body, even if empty.
    pub(super) async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let url = self.url(path);
        let absent = |why: String| Failure::Other(format!("{url}: {why}; is `tideshift serve` running there?").into());
        let mut request = self.client.request(method, &url).timeout(PATIENCE);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|error| absent(net::reason(&error)))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| absent(net::reason(&error)))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| absent(format!("unexpected response body: {error}")));
        }
        let said = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
        let Some(error) = said["error"].as_str() else { return Err(absent(format!("status {status}"))) };
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Failure::NotAllowed(format!("{url}: {error}; see --token-file"))
            }
            StatusCode::CONFLICT => Failure::Conflict(error.to_owned()),
            status if status.is_client_error() => Failure::Usage(error.to_owned()),
            _ => Failure::Other(format!("{url}: {error}").into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_address_without_scheme_is_http() {
        assert_eq!(base_of("https://tideshift.example/"), Ok("https://tideshift.example".to_owned()));
        for wrong in ["ftp://x", "https://", "", "http://me:hunter2@x:7460", "a b"] {
            let error = base_of(wrong).unwrap_err();
            assert!(error.contains("expected HOST:PORT") && !error.contains("hunter2"), "{error}");
        }
        assert_eq!(with_scheme("127.0.0.1:7460"), "http://127.0.0.1:7460");
        assert_eq!(with_scheme("https://tideshift.example"), "https://tideshift.example");
    }
}
