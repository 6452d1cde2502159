//! Names of services, versions, headers and the like in documents.

use crate::decode::Decoder;
use serde_json::Value;

/// The prefix of Tideshift's own headers; the filter removes them from client requests.
pub const OWN_HEADERS: &str = "x-tideshift-";

/// The header that carries the chosen version to Envoy's routes, the upstream and the access logs.
pub const VERSION_HEADER: &str = "x-tideshift-version";

/// The header that names the Envoy cluster for a copy of the request, to Envoy's mirror policies.
pub const MIRROR_HEADER: &str = "x-tideshift-mirror";

/// The header with which clients that know the token request an explanation, and which returns it.
pub const EXPLAIN_HEADER: &str = "x-tideshift-explain";

/// Parses the name of a service: a Kubernetes object name (RFC 1123 subdomain, up to 253 characters).
pub(crate) fn service(d: &mut Decoder, value: &Value) -> Option<String> {
    named(d, value, "a name of lower-case letters, digits, '-' and '.', up to 253 long (RFC 1123 subdomain)", 253)
}

/// Parses the name of a version: like a service's, up to 63 characters, so that it fits the value of a Kubernetes
/// label.
pub(crate) fn version(d: &mut Decoder, value: &Value) -> Option<String> {
    named(d, value, "a version name of lower-case letters, digits, '-' and '.', up to 63 long", 63)
}

/// If the value is no valid name, the error also says what a name usually looks like.
fn named(d: &mut Decoder, value: &Value, allowed: &str, longest: usize) -> Option<String> {
    let hint = match value {
        Value::Number(_) => "; without quotes YAML reads it as a number: put it in quotes, such as \"1.10\"",
        Value::Bool(_) => "; without quotes YAML reads it as true or false: put it in quotes",
        _ => "",
    };
    d.text_where(value, &format!("{allowed}{hint}"), |name| is_subdomain(name, longest))
}

/// Parses the name of a header, in lower case as in HTTP/2 and Envoy.
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

/// RFC 9110 token, the syntax of header names and methods.
pub(crate) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_name_that_is_none_is_told_what_it_is() {
        let error = |value: Value| Decoder::read(&value, version).unwrap_err().to_string();
        assert!(error(json!(1.1)).ends_with("reads it as a number: put it in quotes, such as \"1.10\""));
        assert!(error(json!(2)).contains("put it in quotes") && error(json!(1e3)).contains("put it in quotes"));
        assert!(error(json!(true)).contains("true or false"));
        assert!(error(json!("{{ .Values.target }}")).ends_with("a template that was not rendered"));
        assert!(error(json!("V1")).ends_with("up to 63 long"));
    }
}
