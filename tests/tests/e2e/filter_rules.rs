//! Hosts, rules and versions out of service in a real Envoy: who gets which version.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::{Mode, SERVED_BY};
use tideshift_tests::bootstrap::VERSION_HEADER;
use tideshift_tests::client::{Connection, Request};
use tideshift_tests::envoy_fixture::{DEADLINE, EnvoyFixture, served_by};
use tideshift_tests::wait::eventually;

const WORKERS: usize = 3;

/// Who answered, and whether marked as that version; the default route leads to v1 unmarked.
async fn chosen(request: &Request) -> anyhow::Result<String> {
    let response = request.send().await?;
    ensure!(response.status == 200, "{}: {}", response.status, response.text());
    let by = response.header(SERVED_BY).context("no version served it")?;
    let echo = response.json()?;
    let headers = echo["headers"].as_array().context("no headers in the echo")?;
    let marks: Vec<_> = headers.iter().filter(|h| h["name"] == VERSION_HEADER).map(|h| h["value"].clone()).collect();
    match marks.as_slice() {
        [] => Ok(format!("{by} unmarked")),
        [mark] if *mark == by.as_str() => Ok(by),
        marks => anyhow::bail!("{by}, but marked {marks:?}"),
    }
}

async fn start(policy: Value) -> anyhow::Result<EnvoyFixture> {
    let setup = EnvoyFixture::start(policy, &["v1", "v2", "v3", "v4"], WORKERS).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Echo));
    Ok(setup)
}

/// Checks every case, and tells all that went wrong rather than the first.
async fn check(cases: Vec<(&str, Request, &str)>) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for (name, request, expected) in cases {
        match chosen(&request).await {
            Ok(version) if version == expected => {}
            Ok(version) => wrong.push(format!("{name}: {version}, not {expected}")),
            Err(error) => wrong.push(format!("{name}: {error:#}")),
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

/// v1 for who matches nothing.
fn service(name: &str, rules: Value) -> Value {
    json!({
        "name": name,
        "hostnames": [format!("{name}.example.com")],
        "versions": [
            { "name": "v1", "weight": 1 },
            { "name": "v2", "weight": 0 },
            { "name": "v3", "weight": 0 },
            { "name": "v4", "weight": 0, "serving": false },
        ],
        "rules": rules,
    })
}

/// A rule for each match, to v2 in the order of their list.
fn to(version: &str, matches: Value) -> Value {
    json!({ "matches": matches, "versions": [{ "name": version }] })
}

#[tokio::test]
async fn each_type_of_match_takes_what_it_should_and_nothing_else() -> anyhow::Result<()> {
    let named = |name: &str, kind: &str, value: &str| json!({ "name": name, "type": kind, "value": value });
    let setup = start(json!({ "revision": 1, "services": [
        service("headers", json!([
            to("v2", json!([
                { "headers": [named("X-Exact", "Exact", "Beta")] },
                { "headers": [named("x-prefix", "Prefix", "be")] },
                { "headers": [{ "name": "x-present", "type": "Present" }] },
                { "headers": [named("x-regex", "RegularExpression", "(beta|alpha)-[0-9]+")] },
                { "headers": [{ "name": "x-default", "value": "exact" }] },
                { "headers": [named("user-agent", "Prefix", "tester/")] },
            ])),
        ])),
        service("cookies", json!([
            to("v2", json!([
                { "cookies": [{ "name": "canary", "value": "always" }] },
                { "cookies": [named("prefix", "Prefix", "be")] },
                { "cookies": [{ "name": "present", "type": "Present" }] },
                { "cookies": [named("regex", "RegularExpression", "[0-9a-f]{8}")] },
            ])),
            to("v3", json!([{ "cookies": [{ "name": "canary", "value": "\"always\"" }] }])),
        ])),
        service("query", json!([
            to("v2", json!([
                { "queryParams": [{ "name": "canary", "value": "a b&c" }] },
                { "queryParams": [named("prefix", "Prefix", "be")] },
                { "queryParams": [{ "name": "present", "type": "Present" }] },
                { "queryParams": [named("regex", "RegularExpression", "\\d+")] },
                { "queryParams": [{ "name": "né", "value": "ü" }] },
            ])),
        ])),
        service("paths", json!([
            to("v2", json!([
                { "path": { "type": "Exact", "value": "/exact" } },
                { "path": { "type": "PathPrefix", "value": "/cart" } },
                { "path": { "value": "/slash/" } },
                { "path": { "type": "RegularExpression", "value": "/items/[0-9]+" } },
            ])),
        ])),
        service("methods", json!([
            to("v2", json!([{ "method": "POST" }, { "method": "PURGE" }])),
        ])),
    ] }))
    .await?;

    let h = |name: &str, value: &str| setup.get("headers.example.com", "/").header(name, value);
    let c = |value: &str| setup.get("cookies.example.com", "/").header("cookie", value);
    let q = |query: &str| setup.get("query.example.com", &format!("/any{query}"));
    let p = |path: &str| setup.get("paths.example.com", path);
    let m = |method: &str| setup.request(method, "methods.example.com", "/");
    check(vec![
        ("no header", setup.get("headers.example.com", "/"), "v1"),
        ("exact", h("x-exact", "Beta"), "v2"),
        ("exact, name in any case", h("X-EXACT", "Beta"), "v2"),
        ("exact, value in another case", h("x-exact", "beta"), "v1"),
        ("exact, longer", h("x-exact", "Beta1"), "v1"),
        ("exact, empty", h("x-exact", ""), "v1"),
        ("exact, space around it", h("x-exact", "  Beta  "), "v2"),
        ("exact, repeated", h("x-exact", "Beta").header("x-exact", "Beta"), "v1"),
        ("prefix", h("x-prefix", "beta"), "v2"),
        ("prefix, just that", h("x-prefix", "be"), "v2"),
        ("prefix, shorter", h("x-prefix", "b"), "v1"),
        ("prefix, inside", h("x-prefix", "abe"), "v1"),
        ("present", h("x-present", "whatever"), "v2"),
        ("present, empty", h("x-present", ""), "v2"),
        ("present, another", h("x-presents", "1"), "v1"),
        ("regex", h("x-regex", "beta-42"), "v2"),
        ("regex, other branch", h("x-regex", "alpha-1"), "v2"),
        ("regex is anchored at its end", h("x-regex", "beta-42x"), "v1"),
        ("regex is anchored at its start", h("x-regex", "xbeta-42"), "v1"),
        ("a type left out is Exact", h("x-default", "exact"), "v2"),
        ("a type left out is Exact, and no prefix", h("x-default", "exactly"), "v1"),
        ("a header that Envoy knows", h("user-agent", "tester/1.0"), "v2"),
        ("no cookie", setup.get("cookies.example.com", "/"), "v1"),
        ("cookie", c("canary=always"), "v2"),
        ("cookie, case of its name", c("Canary=always"), "v1"),
        ("cookie, another value", c("canary=never"), "v1"),
        ("cookie among others", c("a=1; canary=always; b=2"), "v2"),
        ("cookies without spaces", c("a=1;canary=always;b=2"), "v2"),
        ("the first of a name counts", c("canary=never; canary=always"), "v1"),
        ("cookie as part of another", c("not-canary=always; canary2=always"), "v1"),
        ("cookie in another's value", c("a=canary=always"), "v1"),
        ("cookie with quotes, which belong to it", c("canary=\"always\""), "v3"),
        ("repeated cookie headers", c("a=1").header("cookie", "canary=always").header("cookie", "b=2"), "v2"),
        ("repeated cookie headers, the first counts", c("canary=never").header("cookie", "canary=always"), "v1"),
        ("cookie prefix", c("prefix=beta"), "v2"),
        ("cookie present and empty", c("present="), "v2"),
        ("cookie present without =", c("present"), "v2"),
        ("cookie regex", c("regex=00ffaa11"), "v2"),
        ("cookie regex, too long", c("regex=00ffaa112"), "v1"),
        ("no query", q(""), "v1"),
        ("query, %20", q("?canary=a%20b%26c"), "v2"),
        ("query, +", q("?x=1&canary=a+b%26c"), "v2"),
        ("query, name encoded", q("?c%61nary=a+b%26c"), "v2"),
        ("query, not decoded twice", q("?canary=a%2520b%2526c"), "v1"),
        ("query, the first counts", q("?canary=1&canary=a+b%26c"), "v1"),
        ("query, another case", q("?Canary=a+b%26c"), "v1"),
        ("query in the fragment's place", q("?x=?canary=a+b%26c"), "v1"),
        ("query prefix", q("?prefix=beta"), "v2"),
        ("query present", q("?present"), "v2"),
        ("query present, empty", q("?present="), "v2"),
        ("query regex", q("?regex=123"), "v2"),
        ("query regex, no number", q("?regex=12a"), "v1"),
        ("query, UTF-8", q("?n%C3%A9=%C3%BC"), "v2"),
        ("path, none of them", p("/"), "v1"),
        ("path exact", p("/exact"), "v2"),
        ("path exact, with a query", p("/exact?a=/b"), "v2"),
        ("path exact, below", p("/exact/1"), "v1"),
        ("path exact, slash", p("/exact/"), "v1"),
        ("path exact, another case", p("/Exact"), "v1"),
        ("path prefix", p("/cart"), "v2"),
        ("path prefix, slash", p("/cart/"), "v2"),
        ("path prefix, below", p("/cart/1/2?x=y"), "v2"),
        ("path prefix, query", p("/cart?x=y"), "v2"),
        ("path prefix is by element", p("/cartoon"), "v1"),
        ("path prefix, not inside", p("/a/cart"), "v1"),
        ("path prefix with a slash at its end, without it", p("/slash"), "v2"),
        ("path prefix with a slash at its end, below", p("/slash/1"), "v2"),
        ("path prefix with a slash at its end, by element", p("/slashes"), "v1"),
        ("path regex", p("/items/12?page=x"), "v2"),
        ("path regex is whole", p("/items/12/more"), "v1"),
        ("method", m("POST").body("x"), "v2"),
        ("method of one's own", m("PURGE"), "v2"),
        ("another method", m("PUT").body("x"), "v1"),
        ("no method", m("GET"), "v1"),
    ])
    .await?;
    setup.no_trap().await
}

#[tokio::test]
async fn all_fields_of_one_match_any_match_of_a_rule_the_first_rule_that_can() -> anyhow::Result<()> {
    let beta = json!({ "name": "x-beta", "value": "1" });
    let exactly = |name: &str| json!({ "headers": [{ "name": "x-want", "value": name }] });
    let setup = start(json!({ "revision": 1, "services": [
        service("and", json!([
            to("v2", json!([{
                "headers": [beta, { "name": "x-team", "value": "a" }],
                "cookies": [{ "name": "c", "value": "1" }],
                "queryParams": [{ "name": "q", "value": "1" }],
                "path": { "value": "/p" },
                "method": "PUT",
            }])),
        ])),
        service("order", json!([
            to("v2", json!([exactly("a"), exactly("b")])),
            to("v3", json!([exactly("b"), exactly("c")])),
            // No version in service: the next rule applies.
            to("v4", json!([exactly("d"), exactly("e")])),
            to("v3", json!([exactly("d")])),
            // The same if all weights are 0.
            { "matches": [exactly("f")], "versions": [{ "name": "v2", "weight": 0 }] },
            // One of two is out of service: its share goes to the other.
            { "matches": [exactly("g")], "versions": [{ "name": "v4", "weight": 99 }, { "name": "v2", "weight": 1 }] },
            // Without matches: for all that come so far, with `x-all` in the next service only.
        ])),
        {
            "name": "all", "hostnames": ["all.example.com"],
            "versions": [{ "name": "v1" }, { "name": "v2", "weight": 0 }, { "name": "v3", "weight": 0 }],
            "rules": [to("v3", json!([exactly("a")])), { "versions": [{ "name": "v2" }] }],
        },
        {
            "name": "shares", "hostnames": ["shares.example.com"],
            "versions": [
                { "name": "v1", "weight": 30 },
                { "name": "v2", "weight": 10 },
                { "name": "v3", "weight": 60, "serving": false },
                { "name": "v4", "weight": 0 },
            ],
        },
        {
            "name": "nobody", "hostnames": ["nobody.example.com"],
            "versions": [
                { "name": "v2", "serving": false },
                { "name": "v3", "weight": 0 },
                { "name": "v4", "serving": false },
            ],
            "rules": [to("v4", json!([exactly("a")])), to("v3", json!([exactly("b")]))],
        },
    ] }))
    .await?;

    let and = |method: &str, path: &str, cookie: &str, beta: &str, team: &str| {
        let request = setup.request(method, "and.example.com", path).header("cookie", cookie);
        request.header("x-beta", beta).header("x-team", team).body("")
    };
    let want = |host: &str, want: &str| setup.get(&format!("{host}.example.com"), "/").header("x-want", want);
    check(vec![
        ("all fields", and("PUT", "/p/1?q=1", "c=1", "1", "a"), "v2"),
        ("not the method", and("POST", "/p/1?q=1", "c=1", "1", "a"), "v1"),
        ("not the path", and("PUT", "/x/1?q=1", "c=1", "1", "a"), "v1"),
        ("not the query", and("PUT", "/p/1?q=2", "c=1", "1", "a"), "v1"),
        ("not the cookie", and("PUT", "/p/1?q=1", "c=2", "1", "a"), "v1"),
        ("not the one header", and("PUT", "/p/1?q=1", "c=1", "2", "a"), "v1"),
        ("not the other header", and("PUT", "/p/1?q=1", "c=1", "1", "b"), "v1"),
        ("the first match", want("order", "a"), "v2"),
        ("the second match, and the first rule of two", want("order", "b"), "v2"),
        ("the second rule, to a version of weight 0", want("order", "c"), "v3"),
        ("a rule out of service falls through to the next", want("order", "d"), "v3"),
        ("a rule out of service falls through to the weights", want("order", "e"), "v1"),
        ("a rule whose weights are all 0 falls through", want("order", "f"), "v1"),
        ("a rule of which one is out of service", want("order", "g"), "v2"),
        ("no rule", want("order", "h"), "v1"),
        ("before the rule for all", want("all", "a"), "v3"),
        ("the rule for all", want("all", "b"), "v2"),
        ("nothing in service", want("nobody", "-"), "v1 unmarked"),
        ("nothing in service, nor by the rule", want("nobody", "a"), "v1 unmarked"),
        ("only the rule's version in service", want("nobody", "b"), "v3"),
    ])
    .await?;

    let metrics = setup.settled("nobody", 1).await?;
    eventually("two requests that nothing was in service for", DEADLINE, async || {
        let metrics = setup.envoy.prometheus().await?;
        let unrouted = |service: &str| metrics.sum("tideshift_unrouted_requests_total", &[("service", service)]);
        let seen = (unrouted("nobody"), unrouted("order"));
        ensure!(seen == (Some(2.0), Some(0.0)), "{seen:?}");
        Ok(())
    })
    .await?;
    assert_eq!(metrics.requests_total("nobody", "v3", "ok"), 1);
    assert_eq!(setup.backend("v4").counts().requests, 0, "a version out of service was asked");

    // v3's share of 60 goes to v1 and v2, 3 to 1 as between them.
    let choices = setup.choices("shares.example.com", 1_000).await?;
    let share = |version: &str| choices.iter().filter(|choice| *choice == version).count();
    assert!(share("v1").abs_diff(750) <= 3 && share("v2").abs_diff(250) <= 3, "{} and {}", share("v1"), share("v2"));
    setup.no_trap().await
}

#[tokio::test]
async fn the_most_specific_hostname_decides_and_other_hosts_are_left_alone() -> anyhow::Result<()> {
    let service = |name: &str, hostnames: Value, version: &str| json!({ "name": name, "hostnames": hostnames, "versions": [{ "name": version }] });
    let services = [
        service("exact", json!(["Shop.example.com", "2.example.org"]), "v2"),
        service("wildcard", json!(["*.example.com"]), "v3"),
        service("longer", json!(["*.eu.example.com"]), "v4"),
    ];
    let setup = start(json!({ "revision": 1, "services": services })).await?;
    let host = |host: &str| setup.get(host, "/");
    check(vec![
        ("exact", host("shop.example.com"), "v2"),
        ("exact, another case", host("SHOP.Example.COM"), "v2"),
        ("exact, with a port", host("shop.example.com:8443"), "v2"),
        ("another exact one", host("2.example.org"), "v2"),
        ("wildcard", host("cart.example.com"), "v3"),
        ("wildcard, case and port", host("CART.example.com:80"), "v3"),
        ("wildcard, two labels", host("a.cart.example.com"), "v3"),
        ("the longer wildcard", host("a.eu.example.com"), "v4"),
        ("the longer wildcard, two labels", host("a.b.eu.example.com"), "v4"),
        ("not the longer wildcard's suffix", host("eu.example.com"), "v3"),
        ("not the wildcard's suffix", host("example.com"), "v1 unmarked"),
        ("not by the end of the name alone", host("badexample.com"), "v1 unmarked"),
        ("another host", host("example.org"), "v1 unmarked"),
        ("an address", host("127.0.0.1:80"), "v1 unmarked"),
        ("an IPv6 address", host("[::1]:80"), "v1 unmarked"),
    ])
    .await?;

    // Left alone: not a header more or less than Envoy itself makes of it.
    let response = host("example.org").header("x-a", "1").header("x-a", "2").header("x-empty", "").send().await?;
    let echo = response.json()?;
    let names: Vec<_> = echo["headers"].as_array().into_iter().flatten().filter_map(|h| h["name"].as_str()).collect();
    let envoys = ["x-forwarded-proto", "x-request-id", "x-envoy-expected-rq-timeout-ms"];
    let rest: Vec<_> = names.into_iter().filter(|name| !envoys.contains(name)).collect();
    assert_eq!(rest, ["host", "x-a", "x-a", "x-empty"]);
    for (service, requests) in [("exact", 4), ("wildcard", 4), ("longer", 2)] {
        setup.settled(service, requests).await?;
    }
    let metrics = setup.envoy.prometheus().await?;
    assert_eq!(metrics.sum("tideshift_requests_total", &[]), Some(10.0), "the others are not counted");
    assert_eq!(metrics.sum("tideshift_unrouted_requests_total", &[]), Some(0.0));
    setup.no_trap().await
}

/// Longer values match no expression, so that clients cannot keep a worker busy.
#[tokio::test]
async fn a_long_header_costs_little_where_an_expression_looks_at_it() -> anyhow::Result<()> {
    const ROUNDS: usize = 200;
    let is_browser = json!([{ "headers": [{ "name": "user-agent", "type": "RegularExpression", "value": ".*(Chrome|Firefox)/[0-9]+.*" }] }]);
    let services = json!([
        { "name": "shop", "hostnames": ["shop.example.com"], "versions": [{ "name": "v1" }, { "name": "v2", "weight": 0 }],
          "rules": [{ "matches": is_browser, "versions": [{ "name": "v2" }] }] },
        { "name": "plain", "hostnames": ["plain.example.com"], "versions": [{ "name": "v1" }] },
    ]);
    let setup = start(json!({ "revision": 1, "stripClientHeaders": false, "services": services })).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Answer));
    let short = setup.get("shop.example.com", "/").header("user-agent", "Mozilla Firefox/1 of the tests");
    assert_eq!(served_by(&short.send().await?)?, "v2");
    let long = "ab ".repeat(50_000 / 3);
    let mut connection = Connection::open(setup.address()).await?;
    let mut times: [Vec<Duration>; 2] = Default::default();
    let requests =
        ["shop.example.com", "plain.example.com"].map(|host| setup.get(host, "/").header("user-agent", &long));
    for _ in 0..ROUNDS {
        for (request, times) in requests.iter().zip(&mut times) {
            let begun = Instant::now();
            let response = connection.send(request).await?;
            times.push(begun.elapsed());
            assert_eq!((response.status, served_by(&response)?.as_str()), (200, "v1"));
        }
    }
    let [with, without] = times.map(|mut times| {
        times.sort_unstable();
        times[ROUNDS / 2]
    });
    println!("{with:?} with an expression, {without:?} without");
    assert!(with < without + Duration::from_millis(1), "{with:?} with an expression, {without:?} without");
    setup.no_trap().await
}

#[tokio::test]
async fn a_service_without_hostnames_is_for_every_host_that_no_other_has() -> anyhow::Result<()> {
    let setup = start(json!({ "revision": 1, "services": [
        { "name": "rest", "versions": [{ "name": "v2" }] },
        { "name": "one", "hostnames": ["one.example.com"], "versions": [{ "name": "v3" }] },
    ] }))
    .await?;
    check(vec![
        ("its own", setup.get("one.example.com", "/"), "v3"),
        ("another", setup.get("two.example.com", "/"), "v2"),
        ("an address", setup.get("[::1]", "/"), "v2"),
        ("an empty one", setup.get("", "/"), "v2"),
    ])
    .await?;
    setup.no_trap().await
}
