//! Shared by all HTTP clients and probes: one TLS provider for the process, and short error texts.

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use std::error::Error;
use std::io;

/// Installs the TLS provider of the process. Call it before building a `reqwest` client; repeated calls are harmless.
pub fn install_crypto_provider() {
    // A provider that is already installed is just as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client that connects directly to endpoints: it ignores proxies from the environment and accepts any certificate.
pub fn direct_client(user_agent: &str) -> reqwest::ClientBuilder {
    install_crypto_provider();
    reqwest::Client::builder().user_agent(user_agent).tls_danger_accept_invalid_certs(true).no_proxy()
}

/// The headers of a document, in order.
///
/// # Errors
///
/// If a name or value is not a valid header.
pub fn header_map(headers: &[(String, String)]) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let name = HeaderName::try_from(name).map_err(|_| format!("`{name}` is not a header name"))?;
        let value = HeaderValue::try_from(value).map_err(|_| format!("the value of `{name}` is not one"))?;
        map.append(name, value);
    }
    Ok(map)
}

/// The status of the response, once its body has been read, up to `longest` bytes.
///
/// # Errors
///
/// The reason why there is no complete response, as [`reason`] words it.
pub async fn status_of(request: reqwest::RequestBuilder, longest: usize) -> Result<u16, String> {
    let mut answer = request.send().await.map_err(|error| reason(&error))?;
    let mut left = longest;
    while left > 0 {
        match answer.chunk().await.map_err(|error| reason(&error))? {
            Some(chunk) => left = left.saturating_sub(chunk.len()),
            None => break,
        }
    }
    Ok(answer.status().as_u16())
}

/// The reason why a request failed: the innermost cause, which names the failure and not the operation.
pub fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    cause(error)
}

/// The innermost cause of an error, in a few words.
pub fn cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.downcast_ref::<io::Error>().map_or_else(|| cause.to_string(), io_reason)
}

/// The meaning of an I/O error without the operating system's error number: `connection refused`.
pub fn io_reason(error: &io::Error) -> String {
    let text = error.to_string();
    let words = text.split(" (os error").next().unwrap_or_default();
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
