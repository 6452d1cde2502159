//! The real module in the wasm host: requests, one after the other, by the exact callbacks.

use anyhow::ensure;
use serde_json::{Value, json};
use std::time::Duration;
use tideshift_tests::wasm_host::{Ending, Level, WasmHost};

const VERSION: &str = "x-tideshift-version";

fn host(policy: Value) -> anyhow::Result<WasmHost> {
    let mut host = WasmHost::new(2)?;
    ensure!(host.configure(&policy.to_string())?, "refused: {:?}", host.log());
    Ok(host)
}

fn policy() -> Value {
    json!({"revision": 1, "services": [{
        "name": "checkout",
        "hostnames": ["checkout.example.com"],
        "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}],
        "rules": [{"matches": [{"headers": [{"name": "x-beta", "value": "1"}]}], "versions": [{"name": "v2"}]}],
    }]})
}

fn headers<'a>(host: &'a str, more: &[(&'a str, &'a [u8])]) -> Vec<(&'a str, &'a [u8])> {
    let mut headers: Vec<(&str, &[u8])> = vec![(":authority", host.as_bytes()), (":path", b"/"), (":method", b"GET")];
    headers.extend_from_slice(more);
    headers
}

/// Lets the VMs publish what they have counted, and the one that leads add it up.
fn tick(host: &mut WasmHost) -> anyhow::Result<()> {
    host.advance(Duration::from_millis(200))?;
    host.wake().map(drop)
}

fn count(host: &WasmHost, version: &str, outcome: &str) -> u64 {
    let name = format!("service=.=checkout;.;version=.={version};.;outcome=.={outcome};.;tideshift_requests_total");
    host.metric(&name).unwrap_or_default()
}

fn in_flight(host: &WasmHost, version: &str) -> u64 {
    let name = format!("service=.=checkout;.;version=.={version};.;tideshift_requests_in_flight");
    host.metric(&name).unwrap_or_default()
}

#[test]
fn each_ending_is_counted_once_for_the_version_that_was_chosen() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    let asking = |kind| headers("checkout.example.com", &[("x-beta", b"1"), ("content-type", kind)]);
    let (json, grpc) = (asking(&b"application/json"[..]), asking(b"application/grpc+proto"));
    for (request, ending, outcome) in [
        (&json, Ending::status(200), "ok"),
        (&json, Ending::status(404), "client_error"),
        (&json, Ending::status(503).flags(32), "error"),
        (&json, Ending::status(200).flags(0x80_0000), "error"),
        (&json, Ending::status(200).trailer("grpc-status", "14"), "ok"),
        (&json, Ending::status(200).header("grpc-status", "14"), "ok"),
        (&grpc, Ending::status(200).trailer("grpc-status", "14"), "error"),
        (&grpc, Ending::status(200).header("grpc-status", "14"), "error"),
        (&json, Ending::client_gone(), "cancelled"),
    ] {
        let before = count(&host, "v2", outcome);
        let exchange = host.request(1, request)?;
        ensure!(exchange.version().as_deref() == Some("v2"));
        tick(&mut host)?;
        ensure!(in_flight(&host, "v2") == 1);
        host.end(exchange, &ending)?;
        tick(&mut host)?;
        ensure!(count(&host, "v2", outcome) == before + 1, "{outcome}");
        ensure!(in_flight(&host, "v2") == 0);
    }
    let counted: u64 =
        ["ok", "error", "client_error", "cancelled"].map(|outcome| count(&host, "v2", outcome)).iter().sum();
    ensure!(counted == 9, "{counted}");
    ensure!(count(&host, "v1", "ok") == 0);
    Ok(())
}

#[test]
fn what_the_module_never_saw_the_headers_of_is_counted_for_nobody() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    host.malformed(1, &Ending::status(400))?;
    let exchange = host.request(1, &headers("other.example.com", &[]))?;
    host.end(exchange, &Ending::status(500))?;
    tick(&mut host)?;
    ensure!(host.metrics().values().all(|value| *value == 0), "{:?}", host.metrics());
    Ok(())
}

#[test]
fn forged_headers_are_gone_whatever_their_number_and_name() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    let forged: &[(&str, &[u8])] =
        &[(VERSION, b"v2"), ("x-tideshift-other", b"1"), (VERSION, b"v3"), ("x-tideshift-", b"")];
    for authority in ["checkout.example.com", "other.example.com"] {
        let exchange = host.request(1, &headers(authority, forged))?;
        let own: Vec<_> = exchange.headers.iter().filter(|(name, _)| name.starts_with(b"x-tideshift-")).collect();
        let chosen = usize::from(authority == "checkout.example.com");
        ensure!(own.len() == chosen, "{authority}: {own:?}");
        host.end(exchange, &Ending::status(200))?;
    }
    Ok(())
}

#[test]
fn workers_share_counts_but_not_sequences() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    let plain = headers("checkout.example.com", &[]);
    for n in 0..2_000 {
        let exchange = host.request(1 + n % 2, &plain)?;
        host.end(exchange, &Ending::status(200))?;
    }
    tick(&mut host)?;
    let (v1, v2) = (count(&host, "v1", "ok"), count(&host, "v2", "ok"));
    ensure!(v1 + v2 == 2_000 && v2.abs_diff(200) <= 6, "{v1} and {v2}");
    Ok(())
}

#[test]
fn an_exchange_is_counted_by_the_policy_that_chose_for_it() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    let exchange = host.request(1, &headers("checkout.example.com", &[("x-beta", b"1")]))?;
    let other = json!({"revision": 2, "services": [{"name": "checkout", "versions": [{"name": "v3"}]}]});
    ensure!(host.configure(&other.to_string())?);
    host.end(exchange, &Ending::status(500))?;
    tick(&mut host)?;
    ensure!(count(&host, "v2", "error") == 1 && in_flight(&host, "v2") == 0);
    let exchange = host.request(1, &headers("checkout.example.com", &[("x-beta", b"1")]))?;
    ensure!(exchange.version().as_deref() == Some("v3"));
    Ok(())
}

#[test]
fn a_bad_configuration_is_refused_with_its_fields_named_and_the_old_one_stays() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    let mut bad = policy();
    bad["services"][0]["versions"][0]["weight"] = json!(-1);
    bad["services"][0]["rulse"] = json!([]);
    ensure!(!host.configure(&bad.to_string())?);
    let log: Vec<String> = host.log_from(Level::Error).into_iter().map(|line| line.message).collect();
    ensure!(log.iter().any(|line| line.contains("services[0].versions[0].weight: -1 is not allowed")), "{log:?}");
    ensure!(log.iter().any(|line| line.contains("services[0].rulse: unknown field; did you mean `rules`?")), "{log:?}");
    let exchange = host.request(1, &headers("checkout.example.com", &[("x-beta", b"1")]))?;
    ensure!(exchange.version().as_deref() == Some("v2"));
    for nothing in ["", "{", "null", "[]", "\u{0}"] {
        ensure!(!WasmHost::new(1)?.configure(nothing)?, "{nothing:?} was taken");
    }
    Ok(())
}

#[test]
fn absurd_headers_do_no_harm() -> anyhow::Result<()> {
    let mut host = host(policy())?;
    let long = vec![0xff; 64 << 10];
    let absurd: Vec<Vec<(&str, &[u8])>> = vec![
        vec![],
        vec![(":authority", b""), (":path", b"")],
        vec![(":authority", &long), ("x-beta", &long), ("cookie", &long)],
        headers("checkout.example.com", &[("x-beta", b"\xff\xfe"), ("", b""), ("x-beta", b"1")]),
        vec![(":authority", b"checkout.example.com"); 500],
    ];
    for headers in absurd {
        let exchange = host.request(1, &headers)?;
        host.end(exchange, &Ending::status(200).header(":status", "nonsense"))?;
    }
    ensure!(host.log_from(Level::Error).is_empty(), "{:?}", host.log());
    Ok(())
}
