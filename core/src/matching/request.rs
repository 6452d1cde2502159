//! The view of a request for routing decisions, and parsers of its parts.

use percent_encoding::percent_decode;
use std::borrow::Cow;

/// The host of a request, as Envoy's pseudo-header.
pub const AUTHORITY: &str = ":authority";
/// The scheme of the client's connection, `http` or `https`, as Envoy's pseudo-header.
pub const SCHEME: &str = ":scheme";
/// The method of a request, as Envoy's pseudo-header.
pub const METHOD: &str = ":method";
/// The path and query of a request, as Envoy's pseudo-header.
pub const PATH: &str = ":path";

/// The headers of a request. Values are bytes, since they need not be UTF-8.
pub trait Request {
    /// The header `name` (in lower case), including pseudo-headers; `None` if it is missing. Repeated headers are
    /// joined by `,` (RFC 9110, 5.3) and `cookie` by `; `, as in Envoy's own matchers.
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>>;
}

/// A request as a list of headers with lower-case names.
impl<N: AsRef<str>, V: AsRef<[u8]>> Request for [(N, V)] {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        joined(name, self.iter().filter(|(n, _)| n.as_ref() == name).map(|(_, value)| value.as_ref()))
    }
}

/// The joined values of the header `name`; `None` if there are none.
pub fn joined<'r>(name: &str, mut values: impl Iterator<Item = &'r [u8]>) -> Option<Cow<'r, [u8]>> {
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
    let separator: &[u8] = if name == "cookie" { b"; " } else { b"," };
    let mut joined = first.to_vec();
    for value in std::iter::once(second).chain(values) {
        joined.extend_from_slice(separator);
        joined.extend_from_slice(value);
    }
    Some(Cow::Owned(joined))
}

/// The path without query, and the query without `?` (empty if there is none).
pub(crate) fn split_path(path_and_query: &[u8]) -> (&[u8], &[u8]) {
    split_once(path_and_query, b'?').unwrap_or((path_and_query, b""))
}

/// The value of the first cookie with this name, undecoded.
pub(crate) fn cookie<'a>(header: &'a [u8], name: &str) -> Option<&'a [u8]> {
    cookies(header, name).next()
}

/// The values of all cookies with this name, undecoded.
pub(crate) fn cookies<'a>(header: &'a [u8], name: &str) -> impl Iterator<Item = &'a [u8]> {
    let pairs = header.split(|b| *b == b';').map(|pair| {
        let pair = pair.trim_ascii();
        split_once(pair, b'=').unwrap_or((pair, b""))
    });
    pairs.filter(move |(n, _)| *n == name.as_bytes()).map(|(_, value)| value)
}

/// The value of the first query parameter with this name; `%XX` and `+` are decoded in both.
pub(crate) fn query_param<'a>(query: &'a [u8], name: &str) -> Option<Cow<'a, [u8]>> {
    let mut pairs = query.split(|b| *b == b'&').map(|pair| split_once(pair, b'=').unwrap_or((pair, b"")));
    pairs.find(|(n, _)| *decoded(n) == *name.as_bytes()).map(|(_, value)| decoded(value))
}

fn decoded(text: &[u8]) -> Cow<'_, [u8]> {
    match text.contains(&b'+') {
        false => percent_decode(text).into(),
        true => {
            let spaced: Vec<u8> = text.iter().map(|b| if *b == b'+' { b' ' } else { *b }).collect();
            Cow::Owned(percent_decode(&spaced).collect())
        }
    }
}

fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|b| *b == separator)?;
    let (before, after) = text.split_at_checked(at)?;
    Some((before, after.get(1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn a_repeated_header_is_its_values_joined() {
        let headers = [("x-a", "1"), ("cookie", "a=1"), ("x-a", ""), ("cookie", "b=2"), ("x-b", "")];
        assert_eq!(headers[..].header("x-a").as_deref(), Some(&b"1,"[..]));
        assert_eq!(headers[..].header("cookie").as_deref(), Some(&b"a=1; b=2"[..]));
        assert_eq!(headers[..].header("x-b").as_deref(), Some(&b""[..]));
        assert_eq!(headers[..].header("x-c"), None);
    }

    #[test]
    fn cookies_are_found_whatever_surrounds_them() {
        let header = b"a=1;b = 2; canary=always=yes; c; canary=never; =x;;";
        assert_eq!(cookie(header, "a"), Some(&b"1"[..]));
        assert_eq!(cookie(header, "canary"), Some(&b"always=yes"[..]));
        assert_eq!(cookie(header, "c"), Some(&b""[..]));
        assert_eq!(cookie(header, "always"), None);
        assert_eq!(cookie(b"\xff\xfe=\x80; a=\xff", "a"), Some(&b"\xff"[..]));
    }

    #[test]
    fn query_parameters_are_decoded() {
        let query = b"user=a%20b&n+m=1%2B1&flag&bad=%zz&user=second";
        assert_eq!(query_param(query, "user").as_deref(), Some(&b"a b"[..]));
        assert_eq!(query_param(query, "n m").as_deref(), Some(&b"1+1"[..]));
        assert_eq!(query_param(query, "flag").as_deref(), Some(&b""[..]));
        assert_eq!(query_param(query, "bad").as_deref(), Some(&b"%zz"[..]));
        assert_eq!(query_param(query, "absent"), None);
    }

    #[test]
    fn a_path_ends_where_its_query_starts() {
        assert_eq!(split_path(b"/a?b?c"), (&b"/a"[..], &b"b?c"[..]));
        assert_eq!(split_path(b"/a"), (&b"/a"[..], &b""[..]));
        assert_eq!(split_path(b""), (&b""[..], &b""[..]));
    }
}
