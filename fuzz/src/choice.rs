//! The whole choice: policies and requests made of pieces that often meet, compared with a second opinion that knows the
//! document's JSON and the README, and nothing of `tideshift-core`'s types.

mod oracle;

use arbitrary::{Result, Unstructured};
use serde_json::{Map, Value, json};
use tideshift_core::choice::plan::{Decision, Plan, Reason, Turns};
use tideshift_core::protocol::policy::Policy;

/// A request's headers.
type Headers = Vec<(String, Vec<u8>)>;

const HOSTNAMES: [&str; 6] =
    ["shop.example.com", "cart.example.com", "*.example.com", "*.eu.example.com", "*.com", "127.0.0.1"];
const AUTHORITIES: [&str; 12] = [
    "shop.example.com",
    "SHOP.example.com:8443",
    "cart.example.com",
    "a.b.example.com",
    "x.eu.example.com:1",
    "eu.example.com",
    "example.com",
    "com",
    "127.0.0.1:80",
    "[::1]:80",
    "",
    ":",
];
const VERSIONS: [&str; 4] = ["v1", "v2", "v3", "blue"];
const NAMES: [&str; 4] = ["x-a", "x-b", "host", "c"];
const VALUES: [&str; 10] = ["", "1", "10", "a", "ab", "a b", "ä", "/cart", "/cart/1", "GET"];
/// An expression and what it means, in other words.
type Expression = (&'static str, fn(&str) -> bool);
const EXPRESSIONS: [Expression; 6] = [
    ("", |text| text.is_empty()),
    ("a|ab", |text| matches!(text, "a" | "ab")),
    ("1.*", |text| text.starts_with('1') && !text.contains('\n')),
    ("[a-c]+", |text| !text.is_empty() && text.bytes().all(|b| (b'a'..=b'c').contains(&b))),
    ("(?i)GET", |text| text.eq_ignore_ascii_case("get")),
    ("/cart(/.*)?", |text| text == "/cart" || text.strip_prefix("/cart/").is_some_and(|rest| !rest.contains('\n'))),
];

/// Makes a policy and requests of the bytes, and asks both opinions.
pub fn holds_for(bytes: &[u8]) {
    // Bytes that run out give the first of each list, so this always makes something.
    let Ok((document, vetoed, requests, seed)) = case(&mut Unstructured::new(bytes)) else { return };
    let policy = match Policy::read(&document) {
        Ok(policy) => policy,
        // What two services may not share, or one list may not repeat, is left to chance.
        Err(errors) => {
            let all = errors.to_string();
            let excused = all.lines().all(|line| line.contains("that no other") || line.contains("1 to 1000 versions"));
            assert!(excused, "{all}\n{document}");
            return;
        }
    };
    let plan = Plan::new(&policy, |_, version| version == vetoed);
    let mut turns = Turns::for_plan(&plan, seed, None);
    for headers in &requests {
        let route = plan.route(headers.as_slice());
        let found = route.map(|route| {
            let service = &plan.services[route.service];
            let weights = route.split.weights().map(|(version, weight)| (service.versions[version].as_str(), weight));
            (route.service, route.rule, weights.collect::<Vec<_>>())
        });
        assert_eq!(found, oracle::route(&document, vetoed, headers), "{headers:?}\n{document}");
        let before = turns.clone();
        let decision = plan.decide(headers.as_slice(), &mut turns, || seed);
        if let Some(few) = plan.few_headers() {
            let few: Headers = headers.iter().filter(|(name, _)| few.contains(name)).cloned().collect();
            assert_eq!(decision, plan.decide(few.as_slice(), &mut before.clone(), || seed), "{headers:?}\n{document}");
        }
        let context = || format!("{decision:?} for {headers:?}\n{document}");
        assert_eq!(decision.as_ref().map(|d| (d.service, d.rule)), found.as_ref().map(|(s, r, _)| (*s, *r)));
        let (Some(decision), Some((service, _, weights))) = (&decision, found) else { continue };
        let name = |version: usize| plan.services[service].versions[version].as_str();
        assert_eq!(decision.version.is_none(), weights.is_empty(), "{}", context());
        let is_offered = |version| weights.iter().any(|(offered, _)| *offered == name(version));
        assert!(decision.version.is_none_or(is_offered), "{}", context());
        stays(&plan, decision, &document["services"][service]["session"], headers, &mut turns);
    }
}

/// A user who has been given a version gets it again: by the cookie that came with it, or by the header that names them.
fn stays(plan: &Plan, first: &Decision<'_>, session: &Value, headers: &Headers, turns: &mut Turns) {
    let mut headers = headers.clone();
    match (session["type"].as_str(), &first.cookie, first.reason) {
        // Under a rule the cookie speaks of the service's own weights.
        (Some("Cookie"), Some(cookie), _) if first.rule.is_none() => {
            let pair = cookie.split(';').next().unwrap_or_default();
            headers.insert(0, ("cookie".to_owned(), pair.as_bytes().to_vec()));
        }
        (Some("Header"), None, Reason::Hash(_)) => {}
        _ => return,
    }
    let again = plan.decide(headers.as_slice(), turns, || 99);
    // The cookie itself may be what a rule looks for.
    let Some(again) = again.filter(|again| again.rule == first.rule) else { return };
    assert_eq!(again.version, first.version, "{first:?}, then {again:?} for {headers:?}");
    assert_eq!(again.cookie, None, "{first:?}, then {again:?} for {headers:?}");
}

fn case(u: &mut Unstructured<'_>) -> Result<(Value, &'static str, Vec<Headers>, u64)> {
    let services: Vec<Value> = (0..u.int_in_range(0..=3)?).map(|n| service(u, n)).collect::<Result<_>>()?;
    let requests = (0..u.int_in_range(1..=12)?).map(|_| headers(u)).collect::<Result<_>>()?;
    let vetoed = u.choose(&["", "", "v1", "v2"])?;
    Ok((json!({"revision": 1, "services": services}), vetoed, requests, u.arbitrary()?))
}

fn service(u: &mut Unstructured<'_>, number: u32) -> Result<Value> {
    let mut service = Map::new();
    service.insert("name".to_owned(), json!(format!("s{number}")));
    let hostnames = list(u, 2, |u| Ok(json!(u.choose(&HOSTNAMES)?)))?;
    service.insert("hostnames".to_owned(), hostnames);
    let count = u.int_in_range(1..=VERSIONS.len())?;
    let known = &VERSIONS[..count];
    let versions: Vec<Value> = known.iter().map(|name| version(u, name, true)).collect::<Result<_>>()?;
    service.insert("versions".to_owned(), json!(versions));
    let rules = list(u, 3, |u| {
        let versions = list(u, 2, |u| {
            let name = *u.choose(known)?;
            version(u, name, false)
        })?;
        Ok(json!({"matches": list(u, 2, a_match)?, "versions": versions}))
    })?;
    service.insert("rules".to_owned(), rules);
    match u.int_in_range(0..=3)? {
        0 => service.insert("session".to_owned(), json!({"type": "Cookie", "name": "c", "generation": number})),
        1 => service.insert("session".to_owned(), json!({"type": "Header", "name": u.choose(&NAMES)?})),
        _ => None,
    };
    if u.ratio(1, 4)? {
        let mirror = json!({"version": u.choose(known)?, "percent": u.int_in_range(0..=100)?});
        service.insert("mirror".to_owned(), mirror);
    }
    Ok(service.into())
}

fn version(u: &mut Unstructured<'_>, name: &str, has_serving: bool) -> Result<Value> {
    let mut version = json!({"name": name});
    match u.int_in_range(0..=3)? {
        0 => {}
        1 => version["weight"] = json!(0),
        _ => version["weight"] = json!(u.int_in_range(0..=1_000_000)?),
    }
    if has_serving && u.ratio(1, 4)? {
        version["serving"] = json!(u.arbitrary::<bool>()?);
    }
    Ok(version)
}

fn a_match(u: &mut Unstructured<'_>) -> Result<Value> {
    let mut fields = Map::new();
    // Mostly one field, so that it is the one that decides.
    for _ in 0..=u.int_in_range(0..=5)? / 5 {
        let field = *u.choose(&["path", "headers", "cookies", "queryParams", "method"])?;
        let condition = match field {
            "path" => {
                let mut path = value(u, &["PathPrefix", "Exact", "RegularExpression"])?;
                if path["type"] != "RegularExpression" {
                    path["value"] = json!(u.choose(&["/cart", "/", "/cart/", "/cart/1", "/%20"])?);
                }
                path
            }
            "method" => json!(u.choose(&["GET", "POST"])?),
            _ => list(u, 2, |u| {
                let name = *u.choose(&NAMES)?;
                let mut condition = value(u, &["Exact", "Prefix", "RegularExpression", "Present"])?;
                condition["name"] = json!(name);
                Ok(condition)
            })?,
        };
        fields.insert(field.to_owned(), condition);
    }
    Ok(fields.into())
}

/// A type and a value that goes with it.
fn value(u: &mut Unstructured<'_>, types: &[&str]) -> Result<Value> {
    let kind = *u.choose(types)?;
    Ok(match kind {
        "Present" => json!({"type": kind}),
        "RegularExpression" => json!({"type": kind, "value": u.choose(&EXPRESSIONS)?.0}),
        _ => json!({"type": kind, "value": u.choose(&VALUES)?}),
    })
}

/// Headers whose names come in lower case, some of them several times.
fn headers(u: &mut Unstructured<'_>) -> Result<Headers> {
    let mut headers = Headers::new();
    for _ in 0..u.int_in_range(0..=6)? {
        let name = *u.choose(&[":authority", ":path", ":method", "cookie", "x-a", "x-b", "host", "c"])?;
        let mut text = Vec::new();
        match name {
            ":authority" => text.extend(u.choose(&AUTHORITIES)?.as_bytes()),
            ":path" => {
                text.extend(u.choose(&["/", "/cart", "/cart/1", "/cartoon", "", "/cart/a\nb"])?.as_bytes());
                pairs(u, &mut text, b"?", b"&")?;
            }
            "cookie" => pairs(u, &mut text, b"", b"; ")?,
            _ => text.extend(u.choose(&VALUES)?.as_bytes()),
        }
        if u.ratio(1, 8)? {
            text.extend(u.arbitrary::<[u8; 3]>()?);
        }
        headers.push((name.to_owned(), text));
    }
    Ok(headers)
}

fn pairs(u: &mut Unstructured<'_>, text: &mut Vec<u8>, first: &[u8], then: &[u8]) -> Result<()> {
    for n in 0..u.int_in_range(0..=3)? {
        text.extend(if n == 0 { first } else { then });
        text.extend(u.choose(&["c", "x-a", "x-%61", "x+b", "", " c", "host"])?.as_bytes());
        text.extend(u.choose(&["=", "", "==", " = "])?.as_bytes());
        text.extend(u.choose(&["", "1", "10", "a%62", "a+b", "a b", "%", "%zz", "%C3%A4", "ä", "%ff"])?.as_bytes());
    }
    Ok(())
}

fn list(
    u: &mut Unstructured<'_>,
    most: usize,
    mut item: impl FnMut(&mut Unstructured<'_>) -> Result<Value>,
) -> Result<Value> {
    let count = u.int_in_range(0..=most)?;
    (0..count).map(|_| item(u)).collect::<Result<Vec<_>>>().map(Value::Array)
}
