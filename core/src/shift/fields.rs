//! Fields that several parts of a document have.

use crate::decode::{Decoder, Fields};
use crate::limits::LONGEST_SECONDS;
use crate::name;
use serde_json::Value;
use std::net::Ipv6Addr;
use std::time::Duration;

pub(crate) fn seconds(f: &mut Fields<'_>, d: &mut Decoder, name: &'static str, low: u64, default: u64) -> Duration {
    Duration::from_secs(f.optional(d, name, |d, v| d.integer(v, low, LONGEST_SECONDS)).unwrap_or(default))
}

pub(crate) fn path(d: &mut Decoder, value: &Value) -> Option<String> {
    let fine = |path: &str| path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic());
    d.text_where(value, "a path that starts with /, without spaces", fine)
}

/// A list of `{name, value}` headers for requests that the controller sends.
pub(crate) fn headers(d: &mut Decoder, value: &Value) -> Option<Vec<(String, String)>> {
    let headers = d.list(value, |d, value| {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a header name", |d, v| {
            d.text_where(v, "a header name (RFC 9110 token)", name::is_token)
        });
        let value = f.required(d, "value", "a header value", |d, v| {
            let fine = |text: &str| text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
            d.text_where(v, "visible ASCII characters and spaces", fine)
        });
        f.finish(d);
        Some((name?, value?))
    })?;
    Some(headers.into_iter().map(|(_, header)| header).collect())
}

pub(crate) fn host(d: &mut Decoder, value: &Value) -> Option<String> {
    let fine = |host: &str| host.parse::<Ipv6Addr>().is_ok() || name::is_subdomain(&host.to_ascii_lowercase(), 253);
    d.text_where(value, "a host name or an address", fine)
}

pub(crate) fn port(d: &mut Decoder, value: &Value) -> Option<u16> {
    d.integer(value, 1, 65_535).map(|port| port as u16)
}
