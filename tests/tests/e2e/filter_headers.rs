//! What clients send to the filter to fool or to break it, in a real Envoy of several workers.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::backend::{Mode, SERVED_BY};
use tideshift_tests::bootstrap::{VERSION_HEADER, manager};
use tideshift_tests::client::{Connection, Request, Response};
use tideshift_tests::envoy_fixture::EnvoyFixture;

const WORKERS: usize = 3;
const SHOP: &str = "shop.example.com";

/// Shop's users get v1; v2 is for clients that send `x-beta: 1`, and v3 gets no traffic. Another service has no version in service.
fn policy() -> Value {
    let nobody = json!({
        "name": "nobody",
        "hostnames": ["nobody.example.com"],
        "versions": [{ "name": "v3", "serving": false }],
    });
    json!({ "revision": 1, "services": [nobody, {
        "name": "shop",
        "hostnames": [SHOP],
        "versions": [{ "name": "v1", "weight": 1 }, { "name": "v2", "weight": 0 }, { "name": "v3", "weight": 0 }],
        "rules": [
            { "name": "beta", "versions": [{ "name": "v2" }], "matches": [
                { "headers": [{ "name": "x-beta", "value": "1" }] },
                { "headers": [{ "name": "x-tester", "type": "RegularExpression", "value": "a+" }] },
                { "cookies": [{ "name": "beta", "type": "Prefix", "value": "yes" }] },
                { "queryParams": [{ "name": "beta", "type": "Present" }] },
            ] },
        ],
    }] })
}

async fn echoing() -> anyhow::Result<EnvoyFixture> {
    let setup = EnvoyFixture::start(policy(), &["v1", "v2", "v3"], WORKERS).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Echo));
    Ok(setup)
}

/// The values with which headers whose name starts with `prefix` reached the backend that echoed them.
fn arrived(response: &Response, prefix: &str) -> anyhow::Result<Vec<(String, String)>> {
    let echo = response.json()?;
    let headers = echo["headers"].as_array().context("no headers in the echo")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let named = headers.iter().filter(|header| text(&header["name"]).starts_with(prefix));
    Ok(named.map(|header| (text(&header["name"]), text(&header["value"]))).collect())
}

#[tokio::test]
async fn a_forged_version_neither_reaches_the_upstream_nor_picks_the_route() -> anyhow::Result<()> {
    let setup = echoing().await?;
    let forgeries: [&[(&str, &str)]; 8] = [
        &[("x-tideshift-version", "v3")],
        &[("X-Tideshift-Version", "v3")],
        &[("X-TIDESHIFT-VERSION", "v3"), ("x-tideshift-version", "v2"), ("x-tideshift-version", "v3")],
        &[("x-tideshift-version", "")],
        &[("x-tideshift-version", "v1"), ("x-other", "1"), ("x-tideshift-version", "v3")],
        &[("x-tideshift-session", "v3"), ("X-tideshift-", "v3"), ("x-TIDESHIFT-anything", "v3")],
        &[("x-tideshift-version", "v3"), ("connection", "x-tideshift-version")],
        &[("x-tideshift-version", "\u{fc}\u{fd}"), ("x-tideshift-version", "v3,v3")],
    ];
    for forged in forgeries {
        for (host, beta, chosen) in [
            (SHOP, false, Some("v1")),
            (SHOP, true, Some("v2")),
            ("elsewhere.example.com", false, None),
            ("nobody.example.com", true, None),
        ] {
            let mut request = setup.get(host, "/");
            for (name, value) in forged {
                request = request.header(name, value);
            }
            if beta {
                request = request.header("x-beta", "1");
            }
            let response = request.send().await?;
            let case = format!("{forged:?} to {host}, beta: {beta}");
            assert_eq!(response.status, 200, "{case}: {}", response.text());
            // The default route, for hosts without a service or without a version in service, leads to v1 as well.
            assert_eq!(response.header(SERVED_BY).as_deref(), chosen.or(Some("v1")), "{case}");
            let ours: Vec<_> =
                chosen.map(|version| (VERSION_HEADER.to_owned(), version.to_owned())).into_iter().collect();
            assert_eq!(arrived(&response, "x-tideshift")?, ours, "{case}");
        }
    }
    let metrics = setup.settled("shop", 2 * forgeries.len() as u64).await?;
    assert_eq!(metrics.requests_total("shop", "v3", "ok"), 0);
    assert_eq!(setup.backend("v3").counts().requests, 0);
    setup.no_trap().await
}

#[tokio::test]
async fn names_that_only_look_like_ours_are_the_clients_own() -> anyhow::Result<()> {
    let setup = echoing().await?;
    let names = ["x-tideshif", "x-tideshift", "xx-tideshift-version", "tideshift-version", "x-tideshiftversion"];
    let request = names.iter().fold(setup.get(SHOP, "/"), |request, name| request.header(name, "kept"));
    let response = request.send().await?;
    for name in names {
        assert!(arrived(&response, name)?.contains(&(name.to_owned(), "kept".to_owned())), "{name}");
    }
    setup.no_trap().await
}

/// What becomes of a request.
#[derive(Debug, PartialEq)]
enum Expected {
    /// 200 from this version, marked and counted for it.
    By(&'static str),
    /// 200 from the default route, unmarked and not counted.
    Unmarked,
    /// Envoy refuses it with this status before the filter sees it.
    Refused(u16),
    /// The filter chose v1, but Envoy has no route for it: 404, and counted as misrouted.
    NoRoute,
}

#[tokio::test]
async fn hostile_requests_are_answered_counted_and_survived() -> anyhow::Result<()> {
    use Expected::{By, NoRoute, Refused, Unmarked};
    let accept_http_10 = |bootstrap: &mut Value| {
        manager(bootstrap)["http_protocol_options"] =
            json!({ "accept_http_10": true, "default_host_for_http_10": SHOP });
    };
    let setup =
        EnvoyFixture::start_with(policy(), &["v1", "v2", "v3"], WORKERS, |bootstrap| bootstrap, accept_http_10).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Echo));
    let shop = || setup.get(SHOP, "/");
    let long = "a".repeat(8 << 10);
    let many = (0..90).fold(shop(), |request, n| request.header(&format!("x-{n}"), "1"));
    let too_many = (0..200).fold(shop(), |request, n| request.header(&format!("x-{n}"), "1"));
    let bad = b"\xff\xfe\x80\xc3\x28\xed\xa0\x80";
    let raw = |text: &str| text.replace('\n', "\r\n").into_bytes();
    let head = |request: Request| request.bytes();

    let cases: Vec<(&str, Vec<u8>, Expected)> = vec![
        ("plain", head(shop()), By("v1")),
        ("not UTF-8 in a header that a rule reads", head(shop().header("x-beta", bad)), By("v1")),
        ("not UTF-8 for a regular expression", head(shop().header("x-tester", b"aaa\xff")), By("v1")),
        ("not UTF-8 in another header", head(shop().header("x-any", bad).header("x-beta", "1")), By("v2")),
        ("not UTF-8 in a forged header", head(shop().header("x-tideshift-version", bad)), By("v1")),
        ("not UTF-8 in a cookie", head(shop().header("cookie", b"\xff=\xfe; beta=yes\xff")), By("v2")),
        ("not UTF-8 in accept, which Envoy knows", head(shop().header("accept", bad)), By("v1")),
        ("8 KB that a rule reads", head(shop().header("x-beta", &long)), By("v1")),
        ("4 KB for a regular expression", head(shop().header("x-tester", &long[..4 << 10])), By("v2")),
        ("8 KB for a regular expression, which is too long", head(shop().header("x-tester", &long)), By("v1")),
        ("8 KB of cookie", head(shop().header("cookie", format!("a={long}; beta=yes{long}"))), By("v2")),
        ("8 KB of path", head(setup.get(SHOP, &format!("/{long}?beta={long}"))), By("v2")),
        ("8 KB of a header's name", head(shop().header(&format!("x-{long}"), "1")), By("v1")),
        ("8 KB of a forged header's name", head(shop().header(&format!("x-tideshift-{long}"), "1")), By("v1")),
        ("repeated, the second would match", head(shop().header("x-beta", "0").header("x-beta", "1")), By("v1")),
        ("repeated, for a regular expression", head(shop().header("x-tester", "a").header("x-tester", "a")), By("v1")),
        ("empty", head(shop().header("x-beta", "").header("x-tester", "").header("cookie", "")), By("v1")),
        ("empty among cookies", head(shop().header("cookie", ";;=;; ;beta;=yes;beta=yes")), By("v1")),
        ("90 headers", head(many.header("x-beta", "1")), By("v2")),
        ("200 headers", head(too_many), Refused(431)),
        ("every byte that a name may have", head(shop().header("!#$%&'*+-.^_`|~09azAZ", "1")), By("v1")),
        ("not UTF-8 in a header's name", head(shop().header("x-a", "1")).splice_name(b"x-\xff\xfe"), Refused(400)),
        (
            "not UTF-8 in a forged header's name",
            head(shop().header("x-a", "1")).splice_name(b"x-tideshift-\xff"),
            Refused(400),
        ),
        (
            "a space in a header's name",
            head(shop().header("x-a", "1")).splice_name(b"x-tideshift-version "),
            Refused(400),
        ),
        ("a NUL in a value", head(shop().header("x-beta", b"1\0")), Refused(400)),
        (
            "not UTF-8 in the path",
            b"GET /\xff\xfe?beta=\xff HTTP/1.1\r\nhost: shop.example.com\r\n\r\n".to_vec(),
            Refused(400),
        ),
        ("not UTF-8 in the host", b"GET / HTTP/1.1\r\nhost: \xff.example.com\r\n\r\n".to_vec(), Refused(400)),
        ("bad escapes in the query", head(setup.get(SHOP, "/?%zz=%&%=%ff&beta%")), By("v1")),
        ("nothing but ? and &", head(setup.get(SHOP, "/?&&=&?&=?")), By("v1")),
        ("no host", raw("GET / HTTP/1.1\n\n"), Refused(400)),
        ("HTTP/1.0 without host", raw("GET /?beta HTTP/1.0\n\n"), By("v2")),
        ("an empty host", raw("GET / HTTP/1.1\nhost:\n\n"), Unmarked),
        ("two hosts", raw("GET / HTTP/1.1\nhost: shop.example.com\nhost: elsewhere.example.com\n\n"), Unmarked),
        (
            "absolute form, whose host counts",
            raw("GET http://shop.example.com/?beta HTTP/1.1\nhost: elsewhere\n\n"),
            By("v2"),
        ),
        ("OPTIONS *", raw("OPTIONS * HTTP/1.1\nhost: shop.example.com\n\n"), Refused(404)),
        ("CONNECT", raw("CONNECT shop.example.com:443 HTTP/1.1\nhost: shop.example.com:443\n\n"), NoRoute),
        ("no HTTP at all", raw("\u{1}\u{2}\u{3}\n\n"), Refused(400)),
        ("plain again", head(shop()), By("v1")),
    ];

    let mut failed = Vec::new();
    // Each case reaches each worker.
    for _ in 0..WORKERS {
        for (name, bytes, expected) in &cases {
            if let Err(error) = check(&setup, bytes, expected).await {
                failed.push(format!("{name}: {error:#}"));
            }
        }
        assert!(failed.is_empty(), "{failed:#?}");
    }
    setup.no_trap().await?;

    let count = |wanted: Expected| (cases.iter().filter(|case| case.2 == wanted).count() * WORKERS) as u64;
    let metrics = setup.settled("shop", count(By("v1")) + count(By("v2"))).await?;
    assert_eq!(metrics.requests_total("shop", "v1", "ok"), count(By("v1")));
    assert_eq!(metrics.misrouted_total("shop", "v1"), count(NoRoute));
    assert_eq!(metrics.requests_total("shop", "v2", "ok"), count(By("v2")));
    assert_eq!(setup.backend("v2").counts().requests, count(By("v2")));
    assert_eq!(setup.backend("v1").counts().requests, count(By("v1")) + count(Unmarked));
    Ok(())
}

async fn check(setup: &EnvoyFixture, bytes: &[u8], expected: &Expected) -> anyhow::Result<()> {
    let mut connection = Connection::open(setup.address()).await?;
    connection.write(bytes).await?;
    let response = connection.read(true).await?;
    let (status, by) = (response.status, response.header(SERVED_BY));
    let (wanted, mark) = match expected {
        Expected::By(version) => ((200, Some(*version)), Some(*version)),
        Expected::Unmarked => ((200, Some("v1")), None),
        Expected::Refused(status) => ((*status, None), None),
        Expected::NoRoute => ((404, None), None),
    };
    ensure!((status, by.as_deref()) == wanted, "{status} by {by:?}: {}", response.text());
    if status == 200 {
        let mark: Vec<_> = mark.map(|version| (VERSION_HEADER.to_owned(), version.to_owned())).into_iter().collect();
        let arrived = arrived(&response, "x-tideshift-")?;
        ensure!(arrived == mark, "{arrived:?} arrived");
    }
    Ok(())
}

/// Puts a name that is not text in place of the header `x-a`.
trait SpliceName {
    fn splice_name(self, name: &[u8]) -> Self;
}

impl SpliceName for Vec<u8> {
    fn splice_name(self, name: &[u8]) -> Self {
        let at = self.windows(4).position(|window| window == b"\nx-a").map_or(0, |at| at + 1);
        [&self[..at], name, &self[at + 3..]].concat()
    }
}
