//! The second opinion: slow, plain, and straight from what the README says a request meets.

use super::EXPRESSIONS;
use serde_json::Value;

/// What is asked: the service's place, the rule's, and the versions to choose among with their weights.
pub(super) type Found<'d> = (usize, Option<usize>, Vec<(&'d str, u32)>);

pub(super) fn route<'d>(document: &'d Value, vetoed: &str, headers: &[(String, Vec<u8>)]) -> Option<Found<'d>> {
    let services = items(&document["services"]);
    // The longest hostname that fits is the most specific: an exact one is longer than any suffix of it.
    let authority = header(headers, ":authority").unwrap_or_default();
    let fits = |service: &'d Value| {
        let hostnames = items(&service["hostnames"]);
        if hostnames.is_empty() {
            return Some(0);
        }
        hostnames.iter().map(text).filter(|name| host_fits(name, &authority)).map(str::len).max()
    };
    let candidates = services.iter().enumerate().filter_map(|(at, service)| Some((fits(service)?, at, service)));
    let (_, at, service) = candidates.max_by_key(|(length, ..)| *length)?;
    // A veto that would leave users without a version has no effect.
    let is_left = |version: &Value| {
        version["serving"] != false && version["name"] != vetoed && version["weight"].as_u64() != Some(0)
    };
    let is_heeded = items(&service["versions"]).iter().any(is_left);
    let serving = |name: &Value| {
        let version = items(&service["versions"]).iter().find(|version| version["name"] == *name);
        version.is_some_and(|version| version["serving"] != false && !(is_heeded && version["name"] == vetoed))
    };
    let split = |versions: &'d Value| -> Vec<(&str, u32)> {
        let weighed = items(versions).iter().map(|version| (version, version["weight"].as_u64().unwrap_or(1) as u32));
        let in_service = weighed.filter(|(version, weight)| *weight > 0 && serving(&version["name"]));
        in_service.map(|(version, weight)| (text(&version["name"]), weight)).collect()
    };
    let rules = items(&service["rules"]).iter().enumerate();
    let takes = |rule: &Value| {
        let matches = items(&rule["matches"]);
        matches.is_empty() || matches.iter().any(|m| holds(m, headers))
    };
    let mut taken = rules.filter(|(_, rule)| takes(rule)).map(|(n, rule)| (n, split(&rule["versions"])));
    match taken.find(|(_, split)| !split.is_empty()) {
        Some((rule, split)) => Some((at, Some(rule), split)),
        None => Some((at, None, split(&service["versions"]))),
    }
}

fn host_fits(hostname: &str, authority: &[u8]) -> bool {
    let Ok(authority) = std::str::from_utf8(authority) else { return false };
    let authority = authority.to_ascii_lowercase();
    let host = match authority.strip_prefix('[') {
        Some(rest) if rest.contains(']') => rest.split(']').next().unwrap_or_default(),
        _ => authority.rfind(':').map_or(authority.as_str(), |colon| &authority[..colon]),
    };
    match hostname.strip_prefix('*') {
        Some(suffix) => host.ends_with(suffix),
        None => host == hostname,
    }
}

fn holds(m: &Value, headers: &[(String, Vec<u8>)]) -> bool {
    let path = header(headers, ":path");
    let parts = path.as_ref().map(|path| {
        let mut parts = path.splitn(2, |b| *b == b'?');
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    });
    let of_header = |name: &str| header(headers, if name == "host" { ":authority" } else { name });
    let of_cookie = |name: &str| {
        let cookies = header(headers, "cookie")?;
        let found = pairs(&cookies, b';').find(|(key, _)| key == name.as_bytes());
        found.map(|(_, value)| value)
    };
    let of_query = |name: &str| {
        let found = pairs(parts?.1, b'&').find(|(key, _)| decoded(key) == name.as_bytes());
        found.map(|(_, value)| decoded(&value))
    };
    let named = |field: &str, find: &dyn Fn(&str) -> Option<Vec<u8>>| {
        items(&m[field]).iter().all(|wanted| find(text(&wanted["name"])).is_some_and(|found| value_is(wanted, &found)))
    };
    named("headers", &of_header)
        && named("cookies", &of_cookie)
        && named("queryParams", &of_query)
        && (m["path"].is_null() || parts.is_some_and(|(path, _)| value_is(&m["path"], path)))
        && (m["method"].is_null() || header(headers, ":method").as_deref() == Some(text(&m["method"]).as_bytes()))
}

fn value_is(wanted: &Value, found: &[u8]) -> bool {
    let value = wanted["value"].as_str().unwrap_or_default();
    match text(&wanted["type"]) {
        "Exact" => found == value.as_bytes(),
        "Prefix" => found.starts_with(value.as_bytes()),
        "PathPrefix" => {
            let (mut prefix, mut path) = (value.as_bytes().to_vec(), found.to_vec());
            if prefix.last() != Some(&b'/') {
                prefix.push(b'/');
            }
            path.push(b'/');
            path.starts_with(&prefix)
        }
        "RegularExpression" => {
            let meaning = EXPRESSIONS.iter().find(|(expression, _)| *expression == value).map(|(_, meaning)| meaning);
            std::str::from_utf8(found).is_ok_and(|found| meaning.is_some_and(|meaning| meaning(found)))
        }
        _ => true,
    }
}

/// A header's values, joined.
fn header(headers: &[(String, Vec<u8>)], name: &str) -> Option<Vec<u8>> {
    let separator: &[u8] = if name == "cookie" { b"; " } else { b"," };
    let values: Vec<&[u8]> = headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_slice()).collect();
    (!values.is_empty()).then(|| values.join(separator))
}

fn pairs(text: &[u8], separator: u8) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
    text.split(move |b| *b == separator).map(move |pair| {
        let pair = if separator == b';' { pair.trim_ascii() } else { pair };
        let mut halves = pair.splitn(2, |b| *b == b'=').map(<[u8]>::to_vec);
        (halves.next().unwrap_or_default(), halves.next().unwrap_or_default())
    })
}

fn decoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let escaped = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let escaped = escaped.filter(|two| two.bytes().all(|b| b.is_ascii_hexdigit()));
        match (first, escaped.and_then(|two| u8::from_str_radix(two, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                rest = &after[2..];
                continue;
            }
            (b'+', _) => out.push(b' '),
            _ => out.push(*first),
        }
        rest = after;
    }
    out
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
