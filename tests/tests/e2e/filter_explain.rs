//! Explanations in a real Envoy, only for clients that know the token; and what clients send in our name, with
//! the filter removing it and with Envoy removing it before the filter.

use anyhow::Context as _;
use serde_json::{Value, json};
use tideshift_tests::backend::Mode;
use tideshift_tests::bootstrap::{Bootstrap, CONTROLLER_CLUSTER, VERSION_HEADER, strip_early};
use tideshift_tests::client::{Request, Response};
use tideshift_tests::envoy_fixture::{EachWorker, EnvoyFixture, served_by};
use tideshift_tests::policy_server::{PolicyServer, held_after};

const WORKERS: usize = 3;
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];
const HOST: &str = "shop.example.com";
const EXPLAIN: &str = "x-tideshift-explain";
const CUSTOM: &str = "x-why";
const TOKEN: &str = "open-sesame";

/// What removes `x-tideshift-*` headers of clients: the filter or Envoy.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Strips {
    Filter,
    Envoy,
}

async fn start(
    strips: Strips,
    mut policy: Value,
    build: impl FnOnce(Bootstrap) -> Bootstrap,
) -> anyhow::Result<EnvoyFixture> {
    let patch = |bootstrap: &mut Value| {
        if strips == Strips::Envoy {
            strip_early(bootstrap);
        }
    };
    policy["stripClientHeaders"] = json!(strips == Strips::Filter);
    let setup = EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, build, patch).await?;
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.mode = Mode::Echo));
    Ok(setup)
}

fn service(name: &str, fields: Value) -> Value {
    let mut service = json!({
        "name": name,
        "hostnames": [format!("{name}.example.com")],
        "versions": [{ "name": "v1" }, { "name": "v2", "weight": 0 }],
    });
    for (key, value) in fields.as_object().into_iter().flatten() {
        service[key] = value.clone();
    }
    service
}

fn policy(revision: u64, explain: Option<Value>, services: &[Value]) -> Value {
    let mut policy = json!({ "revision": revision, "services": services });
    explain.into_iter().for_each(|explain| policy["explain"] = explain);
    policy
}

/// The values with which a header reached the backend that echoed it.
fn arrived(response: &Response, name: &str) -> anyhow::Result<Vec<String>> {
    let echo = response.json()?;
    let headers = echo["headers"].as_array().context("no headers in the echo")?;
    let named = headers.iter().filter(|header| header["name"] == name);
    Ok(named.map(|header| header["value"].as_str().unwrap_or_default().to_owned()).collect())
}

/// The parts of an explanation, by name.
fn parts(explanation: &str) -> Vec<(&str, &str)> {
    explanation.split("; ").map(|part| part.split_once('=').unwrap_or((part, ""))).collect()
}

fn part<'e>(explanation: &'e str, name: &str) -> &'e str {
    parts(explanation).into_iter().find(|(other, _)| *other == name).map_or("", |(_, value)| value)
}

#[tokio::test]
async fn those_who_know_the_token_are_told_why() -> anyhow::Result<()> {
    let is_beta = json!([{ "headers": [{ "name": "x-beta", "value": "1" }] }]);
    let is_unnamed = json!([{ "headers": [{ "name": "x-unnamed", "type": "Present" }] }]);
    let rules = json!([
        { "name": "beta; users é", "matches": is_beta, "versions": [{ "name": "v2" }] },
        { "matches": is_unnamed, "versions": [{ "name": "v2" }] },
    ]);
    let services = [
        service("shop", json!({ "rules": rules })),
        service("split", json!({ "versions": [{ "name": "v1", "weight": 60 }, { "name": "v2", "weight": 40 }] })),
        service(
            "hash",
            json!({
                "versions": [{ "name": "v1" }, { "name": "v2" }],
                "session": { "type": "Header", "name": "x-user" },
            }),
        ),
        service(
            "cookie",
            json!({
                "versions": [{ "name": "v1" }, { "name": "v2" }],
                "session": { "type": "Cookie", "name": "s" },
            }),
        ),
        service("gone", json!({ "versions": [{ "name": "v1", "serving": false }] })),
        service("mirror", json!({ "mirror": { "version": "v2" } })),
    ];
    let setup = start(Strips::Filter, policy(7, Some(json!({ "token": TOKEN })), &services), |b| b).await?;
    let ask = |host: &str| setup.get(&format!("{host}.example.com"), "/").header(EXPLAIN, TOKEN);
    for (request, expected) in [
        (ask("shop"), "service=shop; rule=-; version=v1; reason=weight; bucket=0/1; revision=7"),
        (
            ask("shop").header("x-beta", "1"),
            "service=shop; rule=beta__users__; version=v2; reason=weight; bucket=0/1; revision=7",
        ),
        (
            ask("shop").header("x-unnamed", ""),
            "service=shop; rule=#1; version=v2; reason=weight; bucket=0/1; revision=7",
        ),
        (ask("gone"), "service=gone; rule=-; version=-; reason=unrouted; bucket=-; revision=7"),
        (ask("elsewhere"), "service=-; reason=no-service; revision=7"),
        (ask("mirror"), "service=mirror; rule=-; version=v1; reason=weight; bucket=0/1; mirror=mirror_v2; revision=7"),
    ] {
        let response = request.send().await?;
        assert_eq!(response.header(EXPLAIN).as_deref(), Some(expected));
        assert_eq!(arrived(&response, EXPLAIN)?, Vec::<String>::new(), "the token stays here");
    }
    // Where there is a choice it is the one that was made.
    let bucket = |why: &str| -> anyhow::Result<(u32, u32)> {
        let (point, of) = part(why, "bucket").split_once('/').context("no bucket")?;
        Ok((point.parse()?, of.parse()?))
    };
    for _ in 0..20 {
        let response = ask("split").send().await?;
        let (why, version) = (response.header(EXPLAIN).context("no explanation")?, served_by(&response)?);
        let (point, of) = bucket(&why)?;
        assert_eq!((part(&why, "version"), part(&why, "reason"), of), (version.as_str(), "weight", 100), "{why}");
        assert_eq!(version, if point < 60 { "v1" } else { "v2" }, "{why}");
    }
    let mut buckets = Vec::new();
    for user in 0..20 {
        let request = ask("hash").header("x-user", user.to_string());
        let (one, two) = (request.send().await?, request.send().await?);
        let why = one.header(EXPLAIN).context("no explanation")?;
        assert_eq!(two.header(EXPLAIN).as_deref(), Some(why.as_str()), "the same for the same user");
        let (point, of) = bucket(&why)?;
        assert!(point < of && of == 10_000, "{why}");
        assert_eq!((part(&why, "version"), part(&why, "reason")), (served_by(&one)?.as_str(), "hash"), "{why}");
        buckets.push(point);
    }
    buckets.sort_unstable();
    buckets.dedup();
    assert!(buckets.len() >= 18, "users have buckets of their own: {buckets:?}");
    let response = ask("cookie").send().await?;
    let cookie = response.header("set-cookie").context("no cookie")?;
    let response = ask("cookie").header("cookie", cookie.split(';').next().context("empty")?).send().await?;
    let why = response.header(EXPLAIN).context("no explanation")?;
    assert_eq!((part(&why, "reason"), part(&why, "version")), ("session", served_by(&response)?.as_str()), "{why}");

    // Whatever the answer is: an error, Envoy's own, or one whose header tries to be ours.
    setup.backend("v1").set(|behaviour| behaviour.headers = vec![(EXPLAIN.to_owned(), "of the upstream".to_owned())]);
    let response = ask("shop").send().await?;
    let told: Vec<_> = response.headers.iter().filter(|(name, _)| name == EXPLAIN).collect();
    assert!(matches!(told[..], [(_, why)] if why.starts_with(b"service=shop; ")), "{told:?}");
    setup.backend("v1").stop().await;
    let response = ask("shop").send().await?;
    assert_eq!(response.status, 503);
    assert!(response.header(EXPLAIN).is_some_and(|why| why.starts_with("service=shop; ")), "{response:?}");
    assert!(!setup.envoy.log().contains(TOKEN), "the token is in the log");
    setup.no_trap().await
}

#[tokio::test]
async fn nobody_else_is_told_and_no_token_goes_further() -> anyhow::Result<()> {
    let long = "a".repeat(10_000);
    let wrong: [&[u8]; 9] = [
        b"",
        b"open",
        b"open-sesame!",
        b"Open-Sesame",
        b"open-sesame,open-sesame",
        b"\xff\xfe",
        b"1",
        b"true",
        long.as_bytes(),
    ];
    let services = [service("shop", json!({}))];
    for (strips, header, explain) in [
        (Strips::Filter, EXPLAIN, Some(json!({ "token": TOKEN }))),
        (Strips::Filter, CUSTOM, Some(json!({ "token": TOKEN, "header": "X-Why" }))),
        (Strips::Envoy, CUSTOM, Some(json!({ "token": TOKEN, "header": "x-why" }))),
        (Strips::Filter, EXPLAIN, None),
    ] {
        let case = format!("{strips:?} strips, {explain:?}");
        let setup = start(strips, policy(1, explain.clone(), &services), |b| b).await?;
        for host in [HOST, "elsewhere.example.com"] {
            for wrong in wrong {
                let response = setup.get(host, "/").header(header, wrong).send().await?;
                assert_eq!(response.status, 200, "{case}");
                assert_eq!(response.header(header), None, "{case}: {wrong:?}");
                assert_eq!(arrived(&response, header)?, Vec::<String>::new(), "{case}: {wrong:?}");
            }
            let unasked = setup.get(host, "/").send().await?;
            assert!(
                unasked.headers.iter().all(|(name, _)| !name.starts_with("x-tideshift") && name != CUSTOM),
                "{case}"
            );
            let twice = setup.get(host, "/").header(header, TOKEN).header(header, TOKEN).send().await?;
            assert_eq!((twice.header(header), arrived(&twice, header)?), (None, vec![]), "{case}: sent twice");
            let right = setup.get(host, "/").header(header, TOKEN).send().await?;
            assert_eq!(right.header(header).is_some(), explain.is_some(), "{case}: {right:?}");
            assert_eq!(arrived(&right, header)?, Vec::<String>::new(), "{case}");
        }
        setup.no_trap().await?;
    }
    Ok(())
}

/// The controller's policies need not repeat who may ask: it is the plugin configuration's to say.
#[tokio::test]
async fn who_may_ask_still_may_under_the_controllers_policies() -> anyhow::Result<()> {
    for (strips, header) in [(Strips::Filter, EXPLAIN), (Strips::Envoy, CUSTOM)] {
        let server = PolicyServer::start().await?;
        let mut own = policy(1, Some(json!({ "token": TOKEN, "header": header })), &[service("shop", json!({}))]);
        own["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
        let setup = start(strips, own, |bootstrap| bootstrap.controller(server.address())).await?;
        let to_v2 = json!({ "versions": [{ "name": "v1", "weight": 0 }, { "name": "v2" }] });
        server.publish(&policy(2, None, &[service("shop", to_v2)]));
        held_after(&server, 2).await?;
        EachWorker::open(&setup, setup.get(HOST, "/")).await?.all_to("v2").await?;
        let response = setup.get(HOST, "/").header(header, TOKEN).send().await?;
        assert_eq!(
            arrived(&response, header)?,
            Vec::<String>::new(),
            "{strips:?} strips: the token reached the upstream"
        );
        let expected = "service=shop; rule=-; version=v2; reason=weight; bucket=0/1; revision=2";
        assert_eq!(response.header(header).as_deref(), Some(expected), "{strips:?} strips");
        setup.no_trap().await?;
    }
    Ok(())
}

/// Requests that say something by their headers, and the version that they get; v1 is everybody's.
fn cases(setup: &EnvoyFixture, host: &str) -> Vec<(String, Request, &'static str)> {
    let get = || setup.get(host, "/");
    let header = |name: &str, values: &[&[u8]]| values.iter().fold(get(), |request, value| request.header(name, value));
    let values: Vec<(&str, Vec<&[u8]>, &str)> = vec![
        ("x-a", vec![b"1"], "v1"),
        ("x-a", vec![b"2"], "v1"),
        ("x-a", vec![b"1,2"], "v2"),
        ("x-a", vec![b"1", b"2"], "v2"),
        ("X-A", vec![b"1", b"2"], "v2"),
        ("x-a", vec![b"2", b"1"], "v1"),
        ("x-a", vec![b"1", b"2", b"3"], "v1"),
        ("x-a", vec![b"1, 2"], "v1"),
        ("x-a", vec![b" 1 ", b"\t2 "], "v2"),
        ("x-a", vec![b"", b"1", b"2"], "v1"),
        ("x-a", vec![b"\xff"], "v1"),
        ("x-empty", vec![b""], "v2"),
        ("x-empty", vec![b"", b""], "v1"),
        ("x-empty", vec![b"1"], "v1"),
        ("x-present", vec![b""], "v2"),
        ("x-present", vec![b"\xff\xfe"], "v2"),
        ("x-present", vec![b"", b""], "v2"),
        ("x-prefix", vec![b"be", b"ta"], "v1"),
        ("x-prefix", vec![b"beta", b"other"], "v2"),
        ("x-prefix", vec![b"other", b"beta"], "v1"),
    ];
    let mut cases: Vec<_> = values
        .into_iter()
        .map(|(name, values, version)| (format!("{name}: {values:?}"), header(name, &values), version))
        .collect();
    for forged in ["v2", "v3", ""] {
        cases.push((format!("forged {forged:?}"), get().header(VERSION_HEADER, forged), "v1"));
        let twice = get().header("X-Tideshift-Version", forged).header(VERSION_HEADER, "v3").header("x-a", "1,2");
        cases.push((format!("forged {forged:?} twice, and a rule"), twice, "v2"));
    }
    cases.push((
        "other names of ours".to_owned(),
        get().header("x-tideshift-anything", "v3").header("X-TIDESHIFT-", "v3"),
        "v1",
    ));
    cases
}

#[tokio::test]
async fn who_strips_makes_no_difference() -> anyhow::Result<()> {
    let named = |name: &str, kind: &str, value: Option<&str>| {
        let mut header = json!({ "name": name, "type": kind });
        value.into_iter().for_each(|value| header["value"] = json!(value));
        json!({ "headers": [header] })
    };
    let rules = |matches: Value| json!({ "rules": [{ "matches": matches, "versions": [{ "name": "v2" }] }] });
    let few = json!([
        named("x-a", "Exact", Some("1,2")),
        named("x-empty", "Exact", Some("")),
        named("x-present", "Present", None),
        named("x-prefix", "Prefix", Some("beta")),
    ]);
    // A path in any rule, and the filter reads all headers at once.
    let mut all = few.clone();
    all.as_array_mut().into_iter().for_each(|all| all.push(json!({ "path": { "value": "/elsewhere" } })));
    let mut outcomes = Vec::new();
    for (strips, matches) in [(Strips::Filter, &few), (Strips::Envoy, &few), (Strips::Envoy, &all)] {
        // For every host: with the four headers as many as are asked for by name.
        let mut service = service("shop", rules(matches.clone()));
        service["hostnames"] = json!([]);
        let setup = start(strips, policy(1, None, &[service]), |b| b).await?;
        let mut outcome = Vec::new();
        for (case, request, expected) in cases(&setup, HOST) {
            let response = request.send().await?;
            outcome.push((case.clone(), served_by(&response)?, expected));
            let echo = response.json()?;
            let ours = echo["headers"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|h| h["name"].as_str().is_some_and(|name| name.starts_with("x-tideshift-")));
            let ours: Vec<_> = ours.map(|h| (h["name"].clone(), h["value"].clone())).collect();
            assert_eq!(ours, [(json!(VERSION_HEADER), json!(served_by(&response)?))], "{strips:?} strips, {case}");
        }
        let wrong: Vec<_> = outcome.iter().filter(|(_, version, expected)| version != expected).collect();
        assert!(wrong.is_empty(), "{strips:?} strips: {wrong:#?}");
        outcomes.push(outcome);
        assert_eq!(setup.backend("v3").counts().requests, 0);
        setup.no_trap().await?;
    }
    assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]));
    Ok(())
}
