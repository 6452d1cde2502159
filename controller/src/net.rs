//! What every HTTP client and every probe here needs: one TLS provider for the process, and errors in a few words.

use std::error::Error;
use std::io;

/// Sets up TLS for the whole process; to be called before a `reqwest` client is built, any number of times.
pub fn install_crypto_provider() {
    // A provider that is there already is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
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
