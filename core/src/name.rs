//! The names that documents give to services, versions, headers and the like.

use crate::decode::Decoder;
use serde_json::Value;

/// The prefix of every header that is ours; clients never get one of them past the filter.
pub const OWN_HEADERS: &str = "x-tideshift-";

/// The header that carries the chosen version to Envoy's routes, the upstream and the access logs.
pub const VERSION_HEADER: &str = "x-tideshift-version";

/// The header that names the Envoy cluster for a copy of the request, to Envoy's mirror policies.
pub const MIRROR_HEADER: &str = "x-tideshift-mirror";

/// The header by which those who know the token ask why, and are told.
pub const EXPLAIN_HEADER: &str = "x-tideshift-explain";

/// A service's name: a Kubernetes object name (RFC 1123 subdomain, up to 253 characters).
pub(crate) fn service(d: &mut Decoder, value: &Value) -> Option<String> {
    let allowed = "a name of lower-case letters, digits, '-' and '.', up to 253 long (RFC 1123 subdomain)";
    d.text_where(value, allowed, |name| is_subdomain(name, 253))
}

/// A version's name: like a service's, up to 63 characters, so that it fits a Kubernetes label's value.
pub(crate) fn version(d: &mut Decoder, value: &Value) -> Option<String> {
    let allowed = "a version name of lower-case letters, digits, '-' and '.', up to 63 long";
    d.text_where(value, allowed, |name| is_subdomain(name, 63))
}

/// A header's name, in lower case as HTTP/2 and Envoy have it.
pub(crate) fn header(d: &mut Decoder, value: &Value) -> Option<String> {
    let allowed = format!("a header name (RFC 9110 token) not starting with {OWN_HEADERS}, which the filter removes");
    let name =
        d.text_where(value, &allowed, |name| is_token(name) && !name.to_ascii_lowercase().starts_with(OWN_HEADERS))?;
    Some(name.to_ascii_lowercase())
}

/// RFC 1123 subdomain: labels of letters, digits and inner hyphens, joined by dots.
pub(crate) fn is_subdomain(name: &str, longest: usize) -> bool {
    let label = |label: &str| {
        label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= longest && name.split('.').all(label)
}

/// RFC 9110 token, which header names and methods are.
pub(crate) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}
