//! What every HTTP client and every probe here needs: one TLS provider for the process, and errors in a few words.

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use std::error::Error;
use std::io;

/// Sets up TLS for the whole process; to be called before a `reqwest` client is built, any number of times.
pub fn install_crypto_provider() {
    // A provider that is there already is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client that goes straight to endpoints: through no proxy that the environment names, and to any certificate.
pub fn direct_client(user_agent: &str) -> reqwest::ClientBuilder {
    install_crypto_provider();
    reqwest::Client::builder().user_agent(user_agent).tls_danger_accept_invalid_certs(true).no_proxy()
}

/// A document's headers, in order.
///
/// # Errors
///
/// If a name or a value cannot be one.
pub fn header_map(headers: &[(String, String)]) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let name = HeaderName::try_from(name).map_err(|_| format!("`{name}` is not a header name"))?;
        let value = HeaderValue::try_from(value).map_err(|_| format!("the value of `{name}` is not one"))?;
        map.append(name, value);
    }
    Ok(map)
}

/// The status of the answer, once its body is there too; of longer ones than `longest` bytes, so much of it.
///
/// # Errors
///
/// Why there is no answer, or not all of it, as [`reason`] has it.
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

/// Why a request failed: the innermost cause, which is what went wrong rather than during what.
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

/// What an I/O error means, without the operating system's number for it: `connection refused`.
pub fn io_reason(error: &io::Error) -> String {
    let text = error.to_string();
    let words = text.split(" (os error").next().unwrap_or_default();
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
