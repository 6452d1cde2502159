//! Request matching: by header, cookie, query parameter, path and method, with the terms and the semantics of Gateway
//! API's HTTPRoute.

pub mod hostname;
pub mod request;

use crate::decode::{Decoder, Fields};
use crate::matching::request::{AUTHORITY, METHOD, PATH, Request};
use crate::name;
#[cfg(feature = "schema")]
use crate::schema;
use serde::Serialize;
use serde_json::Value;
use std::borrow::Cow;

/// One match; all of its fields must hold. A match without fields matches every request.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct Match {
    /// Headers; their names are case-insensitive.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::NamedMatch<schema::Header>>>"))]
    pub headers: Vec<NamedMatch>,
    /// Cookies, compared without decoding.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::NamedMatch<schema::Cookie>>>"))]
    pub cookies: Vec<NamedMatch>,
    /// Query parameters, compared after decoding `%XX` and `+`; the first parameter of a name counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::NamedMatch<schema::QueryParam>>>"))]
    pub query_params: Vec<NamedMatch>,
    /// The path without its query.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::PathMatch>"))]
    pub path: Option<PathMatch>,
    /// The method, in upper case.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Method>"))]
    pub method: Option<String>,
}

/// A condition on the value of a named part of the request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NamedMatch {
    /// The name of the header, cookie or parameter.
    pub name: String,
    /// The condition on its value.
    #[serde(flatten)]
    pub value: ValueMatch,
}

/// A condition on a value; compares bytes, so that a value that is not UTF-8 can match anything but a regular
/// expression.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", content = "value")]
pub enum ValueMatch {
    /// Exactly this value.
    Exact(String),
    /// A value that starts with this.
    Prefix(String),
    /// A value of at most 4,096 bytes that this expression matches as a whole, as in Envoy's `safe_regex`.
    RegularExpression(Regex),
    /// Any value, including an empty one.
    Present,
}

/// A condition on the path.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", content = "value")]
pub enum PathMatch {
    /// Exactly this path.
    Exact(String),
    /// This path and the paths below it, by path elements: `/cart` matches `/cart/1` but not `/cartoon`.
    PathPrefix(String),
    /// A path of at most 4,096 bytes that this expression matches as a whole.
    RegularExpression(Regex),
}

/// A regular expression in the syntax of the `regex-lite` crate, which takes time linear in the length of the value:
/// some 200 ns per byte in a proxy. Therefore values whose length clients control have a limit.
#[derive(Debug, Clone, Serialize)]
#[serde(into = "String")]
pub struct Regex {
    source: String,
    compiled: regex_lite::Regex,
}

impl Regex {
    /// The maximum size of a compiled expression, in bytes.
    const SIZE_LIMIT: usize = 256 << 10;
    /// The maximum length of a value that can match. 4 kB take an Envoy worker less than 1 ms; the 60 kB that Envoy
    /// accepts as headers would take it 7 to 13 ms.
    const LONGEST_VALUE: usize = 4_096;

    fn new(source: &str) -> Result<Self, regex_lite::Error> {
        // First compiled alone: otherwise `a)(b` would become valid in the added parentheses.
        let build = |source: &str| regex_lite::RegexBuilder::new(source).size_limit(Self::SIZE_LIMIT).build();
        build(source)?;
        Ok(Self { source: source.to_owned(), compiled: build(&format!("^(?:{source})$"))? })
    }

    fn matches(&self, value: &[u8]) -> bool {
        value.len() <= Self::LONGEST_VALUE
            && std::str::from_utf8(value).is_ok_and(|value| self.compiled.is_match(value))
    }
}

impl PartialEq for Regex {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl From<Regex> for String {
    fn from(regex: Regex) -> Self {
        regex.source
    }
}

/// The field of a match that does not match a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mismatch<'m> {
    /// The required method.
    Method(&'m str),
    /// A header that is missing or has another value.
    Header(&'m NamedMatch),
    /// A cookie that is missing or has another value.
    Cookie(&'m NamedMatch),
    /// The required path.
    Path(&'m PathMatch),
    /// A query parameter that is missing or has another value.
    QueryParam(&'m NamedMatch),
}

impl Match {
    /// Whether every field matches the request.
    pub fn holds(&self, request: &(impl Request + ?Sized)) -> bool {
        self.mismatch(request).is_none()
    }

    /// The first field that does not match the request; `None` if all do.
    pub fn mismatch(&self, request: &(impl Request + ?Sized)) -> Option<Mismatch<'_>> {
        // The fields not named here are handled below, together with related ones.
        let Self { headers, cookies: _, query_params: _, path: _, method } = self;
        let method = method.as_deref().filter(|wanted| !method_holds(wanted, request)).map(Mismatch::Method);
        let header_holds = |m: &NamedMatch| header(m, request).is_some_and(|value| m.value.holds(&value));
        let in_headers = || headers.iter().find(|m| !header_holds(m)).map(Mismatch::Header);
        let in_cookies = || self.cookie_mismatch(request).map(Mismatch::Cookie);
        method.or_else(in_headers).or_else(in_cookies).or_else(|| self.path_or_query_mismatch(request))
    }

    fn cookie_mismatch(&self, request: &(impl Request + ?Sized)) -> Option<&NamedMatch> {
        let first = self.cookies.first()?;
        let Some(header) = request.header("cookie") else { return Some(first) };
        let holds = |m: &NamedMatch| request::cookie(&header, &m.name).is_some_and(|value| m.value.holds(value));
        self.cookies.iter().find(|m| !holds(m))
    }

    fn path_or_query_mismatch(&self, request: &(impl Request + ?Sized)) -> Option<Mismatch<'_>> {
        if self.path.is_none() && self.query_params.is_empty() {
            return None;
        }
        // Without a path nothing matches, not even the prefix `/`.
        let path_and_query = request.header(PATH);
        let split = path_and_query.as_deref().map(request::split_path);
        let path_holds = |m: &PathMatch| split.is_some_and(|(path, _)| m.holds(path));
        let param_holds = |m: &NamedMatch| {
            let value = split.and_then(|(_, query)| request::query_param(query, &m.name));
            value.is_some_and(|value| m.value.holds(&value))
        };
        let path = self.path.as_ref().filter(|m| !path_holds(m)).map(Mismatch::Path);
        path.or_else(|| self.query_params.iter().find(|m| !param_holds(m)).map(Mismatch::QueryParam))
    }

    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let headers = named(&mut f, d, "headers", name::header);
        let cookie_name = |d: &mut Decoder, value: &Value| d.text_where(value, "a cookie name", name::is_token);
        let cookies = named(&mut f, d, "cookies", cookie_name);
        let query_params = named(&mut f, d, "queryParams", Decoder::filled_text);
        let path = f.optional(d, "path", PathMatch::read);
        let method = f.optional(d, "method", method);
        f.finish(d);
        Some(Self { headers, cookies, query_params, path, method })
    }
}

/// Parses a method name.
pub(crate) fn method(d: &mut Decoder, value: &Value) -> Option<String> {
    let allowed = "a method in upper case, such as GET";
    d.text_where(value, allowed, |m| name::is_token(m) && !m.bytes().any(|b| b.is_ascii_lowercase()))
}

fn method_holds(wanted: &str, request: &(impl Request + ?Sized)) -> bool {
    request.header(METHOD).is_some_and(|m| *m == *wanted.as_bytes())
}

/// The header that a match refers to.
fn header<'r>(m: &NamedMatch, request: &'r (impl Request + ?Sized)) -> Option<Cow<'r, [u8]>> {
    request.header(header_name(&m.name))
}

/// The name under which Envoy passes a header: the host has its HTTP/2 name.
pub(crate) fn header_name(name: &str) -> &str {
    if name == "host" { AUTHORITY } else { name }
}

impl Mismatch<'_> {
    /// The actual value in the request, decoded as for the comparison; `None` if it is missing.
    pub fn found(&self, request: &(impl Request + ?Sized)) -> Option<Vec<u8>> {
        match self {
            Self::Method(_) => request.header(METHOD).map(Cow::into_owned),
            Self::Header(m) => header(m, request).map(Cow::into_owned),
            Self::Cookie(m) => request::cookie(&request.header("cookie")?, &m.name).map(<[u8]>::to_vec),
            Self::Path(_) => Some(request::split_path(&request.header(PATH)?).0.to_vec()),
            Self::QueryParam(m) => {
                let path_and_query = request.header(PATH)?;
                request::query_param(request::split_path(&path_and_query).1, &m.name).map(Cow::into_owned)
            }
        }
    }
}

fn named<'v>(
    f: &mut Fields<'v>,
    d: &mut Decoder,
    field: &'static str,
    mut read_name: impl FnMut(&mut Decoder, &Value) -> Option<String>,
) -> Vec<NamedMatch> {
    let read = |d: &mut Decoder, value: &'v Value| {
        d.list(value, |d, value| {
            let mut f = d.object(value)?;
            let name = f.required(d, "name", "a name", &mut read_name);
            let kind = f.optional(d, "type", |d, v| choice(d, v, &["Exact", "Prefix", "RegularExpression", "Present"]));
            let value = match kind {
                Some("Present") => {
                    f.optional(d, "value", |d, v| d.text_where(v, "no value when type is Present", |_| false));
                    Some(ValueMatch::Present)
                }
                Some("RegularExpression") => f.required(d, "value", REGEX, regex).map(ValueMatch::RegularExpression),
                Some("Prefix") => f.required(d, "value", "a string", Decoder::text).map(ValueMatch::Prefix),
                _ => f.required(d, "value", "a string", Decoder::text).map(ValueMatch::Exact),
            };
            f.finish(d);
            Some(NamedMatch { name: name?, value: value? })
        })
    };
    let items = f.optional(d, field, read).unwrap_or_default();
    items.into_iter().map(|(_, item)| item).collect()
}

impl ValueMatch {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => value == wanted.as_bytes(),
            Self::Prefix(prefix) => value.starts_with(prefix.as_bytes()),
            Self::RegularExpression(regex) => regex.matches(value),
            Self::Present => true,
        }
    }
}

impl PathMatch {
    fn holds(&self, path: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => path == wanted.as_bytes(),
            Self::PathPrefix(prefix) => {
                let below = path.strip_prefix(prefix.trim_end_matches('/').as_bytes());
                below.is_some_and(|rest| rest.first().is_none_or(|b| *b == b'/'))
            }
            Self::RegularExpression(regex) => regex.matches(path),
        }
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let kind = f.optional(d, "type", |d, v| choice(d, v, &["Exact", "PathPrefix", "RegularExpression"]));
        let allowed = "a path that starts with / and has no query";
        let path = |d: &mut Decoder, v: &Value| {
            d.text_where(v, allowed, |path| path.starts_with('/') && !path.contains(['?', '#']))
        };
        let read = match kind {
            Some("RegularExpression") => f.required(d, "value", REGEX, regex).map(Self::RegularExpression),
            Some("Exact") => f.required(d, "value", allowed, path).map(Self::Exact),
            _ => f.required(d, "value", allowed, path).map(Self::PathPrefix),
        };
        f.finish(d);
        read
    }
}

const REGEX: &str = "a regular expression (regex-lite syntax: no look-around, no back-references)";

fn regex(d: &mut Decoder, value: &Value) -> Option<Regex> {
    match Regex::new(&d.text_where(value, REGEX, |_| true)?) {
        Ok(regex) => Some(regex),
        Err(error) => {
            d.invalid(value, format!("{REGEX}: {error}"));
            None
        }
    }
}

/// Parses one of a few keywords.
pub(crate) fn choice(d: &mut Decoder, value: &Value, words: &[&'static str]) -> Option<&'static str> {
    let found = words.iter().find(|word| value.as_str() == Some(word));
    if found.is_none() {
        d.invalid(value, format!("one of {}", words.join(", ")));
    }
    found.copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// The field of the match that does not match the request, and its actual value.
    fn mismatch(of: &str, request: &[(&str, &str)]) -> Option<(String, Option<String>)> {
        let value = serde_json::from_str(of).unwrap();
        let m = Decoder::read(&value, Match::read).unwrap();
        let mismatch = m.mismatch(request);
        assert_eq!(mismatch.is_none(), m.holds(request));
        let mismatch = mismatch?;
        let name = match mismatch {
            Mismatch::Method(_) => "method".to_owned(),
            Mismatch::Path(_) => "path".to_owned(),
            Mismatch::Header(m) | Mismatch::Cookie(m) | Mismatch::QueryParam(m) => m.name.clone(),
        };
        Some((name, mismatch.found(request).map(|found| String::from_utf8(found).unwrap())))
    }

    #[test]
    fn the_first_field_that_does_not_hold_is_named_with_what_was_found() {
        const MATCH: &str = r#"{"method": "GET", "path": {"value": "/cart"}, "headers": [{"name": "x-a", "value": "1"}],
            "cookies": [{"name": "c", "value": "2"}], "queryParams": [{"name": "q", "type": "Prefix", "value": "3"}]}"#;
        let request = [(":method", "GET"), (":path", "/cart/1?q=30"), ("x-a", "1"), ("cookie", "b=1; c=2")];
        assert_eq!(mismatch(MATCH, &request), None);
        let cases = [
            (0, ":method", "POST", "method", Some("POST")),
            (2, "x-a", "2", "x-a", Some("2")),
            (2, "x-b", "1", "x-a", None),
            (3, "cookie", "c=3", "c", Some("3")),
            (3, "cookie", "b=2", "c", None),
            (3, "x-b", "2", "c", None),
            (1, ":path", "/cartoon?q=3", "path", Some("/cartoon")),
            (1, ":path", "/cart?q=%34", "q", Some("4")),
            (1, ":path", "/cart", "q", None),
            (1, "x-b", "/cart?q=3", "path", None),
        ];
        for (at, name, value, field, found) in cases {
            let mut request = request;
            request[at] = (name, value);
            assert_eq!(mismatch(MATCH, &request), Some((field.to_owned(), found.map(str::to_owned))));
        }
    }

    #[test]
    fn a_match_without_fields_holds_for_a_request_without_headers() {
        assert_eq!(mismatch("{}", &[]), None);
        assert_eq!(
            mismatch(r#"{"queryParams": [{"name": "q", "type": "Present"}]}"#, &[]),
            Some(("q".to_owned(), None))
        );
    }

    fn read(value: Value) -> Match {
        Decoder::read(&value, Match::read).unwrap_or_else(|errors| unreachable!("{errors}"))
    }

    /// Whether a match matches `GET /cart/1?q=a%20b` with these headers and cookies.
    fn holds(value: Value, headers: &[(&str, &str)]) -> bool {
        let mut request: Vec<(&str, &[u8])> = vec![(":method", b"GET"), (":path", b"/cart/1?q=a%20b&empty=")];
        request.extend(headers.iter().map(|(name, value)| (*name, value.as_bytes())));
        read(value).holds(request.as_slice())
    }

    fn header(kind: &str, value: &str) -> Value {
        json!({"headers": [{"name": "X-Beta", "type": kind, "value": value}]})
    }

    #[test]
    fn headers_match_by_type() {
        for (wanted, sent, expected) in [
            (header("Exact", "1"), "1", true),
            (header("Exact", "1"), "10", false),
            (header("Exact", ""), "", true),
            (header("Prefix", "eu-"), "eu-west", true),
            (header("Prefix", "eu-"), "us-eu-", false),
            (header("RegularExpression", "[0-9]+"), "12", true),
            (header("RegularExpression", "[0-9]+"), "a12", false),
            (header("RegularExpression", "a|b"), "ab", false),
        ] {
            assert_eq!(holds(wanted.clone(), &[("x-beta", sent)]), expected, "{wanted} for {sent:?}");
            assert!(!holds(wanted, &[("x-other", sent)]));
        }
        let present = json!({"headers": [{"name": "x-beta", "type": "Present"}]});
        assert!(holds(present.clone(), &[("x-beta", "")]));
        assert!(!holds(present, &[]));
    }

    #[test]
    fn exact_is_the_type_where_none_is_said() {
        assert!(holds(json!({"headers": [{"name": "x-beta", "value": "1"}]}), &[("x-beta", "1")]));
        assert!(holds(
            json!({"cookies": [{"name": "canary", "value": "always"}]}),
            &[("cookie", "a=b; canary=always")]
        ));
        assert!(holds(json!({"path": {"value": "/cart"}}), &[]), "and PathPrefix for paths");
    }

    #[test]
    fn values_that_are_not_utf8_match_as_bytes_but_no_expression() {
        let request: [(&str, &[u8]); 1] = [("x-beta", b"eu-\xff")];
        assert!(read(header("Prefix", "eu-")).holds(&request[..]));
        assert!(!read(header("RegularExpression", ".*")).holds(&request[..]));
        assert!(read(json!({"headers": [{"name": "x-beta", "type": "Present"}]})).holds(&request[..]));
    }

    #[test]
    fn what_is_longer_than_4_kb_matches_no_expression() {
        let expression = |field: &str| json!({field: [{"name": "x", "type": "RegularExpression", "value": "a*"}]});
        let path = json!({"path": {"type": "RegularExpression", "value": "/a*"}});
        for (length, expected) in [(4_096, true), (4_097, false), (60_000, false)] {
            let value = "a".repeat(length);
            let below = "a".repeat(length - 1);
            let cookies = format!("b=1; x={value}");
            // The limit applies to the compared part, after decoding.
            let query = format!("/?y={value}&x={}", value.replace('a', "%61"));
            let long_query = format!("/{below}?y={value}");
            for (of, name, sent) in [
                (expression("headers"), "x", &value),
                (expression("cookies"), "cookie", &cookies),
                (expression("queryParams"), ":path", &query),
                (path.clone(), ":path", &long_query),
            ] {
                assert_eq!(read(of.clone()).holds(&[(name, sent)][..]), expected, "{of} for {length} bytes");
            }
            assert!(read(header("Prefix", "a")).holds(&[("x-beta", &value)][..]), "other types have no limit");
        }
    }

    #[test]
    fn all_fields_of_a_match_must_hold() {
        let both = json!({
            "method": "GET",
            "path": {"type": "PathPrefix", "value": "/cart"},
            "queryParams": [{"name": "q", "value": "a b"}, {"name": "empty", "type": "Present"}],
            "headers": [{"name": "x-beta", "value": "1"}],
        });
        assert!(holds(both.clone(), &[("x-beta", "1")]));
        assert!(!holds(both.clone(), &[("x-beta", "2")]));
        for (field, other) in [("method", json!("POST")), ("path", json!({"value": "/other"}))] {
            let mut changed = both.clone();
            changed[field] = other;
            assert!(!holds(changed, &[("x-beta", "1")]), "{field}");
        }
        assert!(holds(json!({}), &[]), "a match without fields holds for every request");
    }

    #[test]
    fn path_prefixes_go_by_path_elements() {
        let prefix = |prefix: &str, path: &str| {
            let request = [(":path", path)];
            read(json!({"path": {"type": "PathPrefix", "value": prefix}})).holds(&request[..])
        };
        for path in ["/cart", "/cart/", "/cart/1", "/cart?x=1", "/cart/?x=1"] {
            assert!(prefix("/cart", path) && prefix("/cart/", path) && prefix("/", path), "{path}");
        }
        for path in ["/cartoon", "/car", "/", "", "*", "/CART", "/x/cart"] {
            assert!(!prefix("/cart", path), "{path}");
        }
    }

    #[test]
    fn the_host_header_is_the_authority() {
        let request = [(":authority", "a.example.com")];
        assert!(read(json!({"headers": [{"name": "Host", "value": "a.example.com"}]})).holds(&request[..]));
    }

    #[test]
    fn what_can_never_match_or_be_read_is_an_error() {
        for (value, place) in [
            (json!({"headers": [{"name": "x-tideshift-version", "value": "v2"}]}), "headers[0].name"),
            (json!({"headers": [{"name": "a b", "value": ""}]}), "headers[0].name"),
            (json!({"headers": [{"name": "a", "type": "exact", "value": ""}]}), "headers[0].type"),
            (json!({"headers": [{"name": "a"}]}), "headers[0].value"),
            (json!({"headers": [{"name": "a", "type": "Present", "value": "x"}]}), "headers[0].value"),
            (json!({"headers": [{"name": "a", "type": "RegularExpression", "value": "("}]}), "headers[0].value"),
            (json!({"headers": [{"name": "a", "type": "RegularExpression", "value": "a)(b"}]}), "headers[0].value"),
            (
                json!({"headers": [{"name": "a", "type": "RegularExpression", "value": "(((a{99}){99}){99})"}]}),
                "headers[0].value",
            ),
            (json!({"headers": [{"name": "a", "type": "RegularExpression", "value": 1}]}), "headers[0].value"),
            (json!({"path": {"type": "Exact", "value": "cart"}}), "path.value"),
            (json!({"path": {"type": "PathPrefix", "value": "/a?b"}}), "path.value"),
            (json!({"method": "get"}), "method"),
            (json!({"queryParams": [{"name": "", "value": "a"}]}), "queryParams[0].name"),
        ] {
            let errors = Decoder::read(&value, Match::read).map_or_else(|errors| errors.0, |_| Vec::new());
            assert_eq!(errors.iter().map(|e| e.path.as_str()).collect::<Vec<_>>(), [place], "{value}");
        }
    }

    #[test]
    fn a_match_is_written_as_it_is_read() {
        let value = json!({
            "headers": [{"name": "host", "type": "RegularExpression", "value": "a|b"}, {"name": "x-a", "type": "Present"}],
            "queryParams": [{"name": "q", "type": "Prefix", "value": "x"}],
            "path": {"type": "PathPrefix", "value": "/cart"},
            "method": "GET",
        });
        assert_eq!(serde_json::to_value(read(value.clone())).ok(), Some(value));
    }
}
