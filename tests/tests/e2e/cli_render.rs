//! `tideshift render envoy`: Envoy takes what it prints, for documents of every kind, and does what its comments say.

use std::fs;
use std::net::SocketAddr;

use serde_json::{Value, json};
use tideshift_tests::backend::{Backend, Mode, SERVED_BY};
use tideshift_tests::client::{Request, get};
use tideshift_tests::controller::{cli, cli_reading};
use tideshift_tests::envoy::Envoy;
use tideshift_tests::ports::Port;
use tideshift_tests::{artifacts, envoy, test_bed};

fn shift(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": name }, "spec": spec })
}

fn version(name: &str, endpoints: &[&str], probe: Value) -> Value {
    json!({ "name": name, "endpoints": endpoints, "readinessProbe": probe })
}

/// Documents as a file would have them.
fn text(documents: &[Value]) -> String {
    documents.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n")
}

#[test]
fn envoy_takes_documents_of_every_kind() -> anyhow::Result<()> {
    let module = artifacts::wasm()?.display().to_string();
    let v1 = || version("v1", &["127.0.0.1:9001"], Value::Null);
    let rule = |matches: Value| json!({ "matches": [matches], "versions": [{ "name": "v1", "weight": 3 }] });
    let value = |kind: &str| json!([{ "name": "x-a", "type": kind, "value": "a\"'\\ %REQ(x)% {b}: #c" }]);
    let rules = json!([
        rule(json!({ "headers": value("Exact"), "method": "POST" })),
        rule(json!({ "headers": value("Prefix"), "path": { "type": "Exact", "value": "/a" } })),
        rule(json!({ "headers": [{ "name": "x-b", "type": "Present" }] })),
        rule(json!({ "cookies": [{ "name": "c", "value": "ü" }], "path": { "type": "PathPrefix", "value": "/" } })),
        rule(json!({ "queryParams": [{ "name": "q", "type": "RegularExpression", "value": "^a+$" }] })),
        rule(json!({ "path": { "type": "RegularExpression", "value": "/v[0-9]+/.*" } })),
        { "name": "\"quoted\": *name", "versions": [{ "name": "v1", "weight": 0 }] },
    ]);
    let probes = json!([
        version(
            "http",
            &["127.0.0.1:1"],
            json!({ "httpGet": { "path": "/a?b=%20c&d={e}", "port": 81,
            "httpHeaders": [{ "name": "Host", "value": "a b" }, { "name": "X-Quote", "value": "\"%\\'" }] } })
        ),
        version("https", &["127.0.0.1:2"], json!({ "httpGet": { "scheme": "HTTPS" } })),
        version("elsewhere", &["127.0.0.1:3"], json!({ "httpGet": { "host": "health.example.com" } })),
        version("tcp", &["127.0.0.1:4"], json!({ "tcpSocket": { "host": "::1" }, "periodMillis": 1 })),
        version("exec", &["127.0.0.1:5"], json!({ "exec": { "command": ["true"] } })),
        version("grpc", &["127.0.0.1:7", "[::1]:7"], json!({ "grpc": {} })),
        version("grpc-elsewhere", &["127.0.0.1:8"], json!({ "grpc": { "port": 88, "service": "a \"b\": %c" } })),
        version(
            "slow",
            &["127.0.0.1:6"],
            json!({ "tcpSocket": {}, "periodSeconds": 86400, "timeoutSeconds": 600,
            "initialDelaySeconds": 5, "successThreshold": 9, "failureThreshold": 100 })
        ),
    ]);
    let everything = shift("a", json!({ "versions": [v1()], "stable": "v1" }));
    let cases = [
        ("no hostnames", vec![everything.clone()]),
        (
            "wildcards",
            vec![shift(
                "a",
                json!({ "hostnames": ["*.example.com", "a.b.example.com"], "versions": [v1()],
            "stable": "v1" }),
            )],
        ),
        (
            "IPv6 and DNS",
            vec![shift(
                "a",
                json!({ "stable": "v1", "versions": [
            version("v1", &["[::1]:9001", "127.0.0.1:9001", "payments.internal:8080"], Value::Null),
            version("v2", &["[2001:db8::1]:1"], json!({ "httpGet": {} })) ] }),
            )],
        ),
        (
            "versions without endpoints",
            vec![shift(
                "a",
                json!({ "stable": "v1", "target": "v2",
            "versions": [{ "name": "v1" }, { "name": "v2" }] }),
            )],
        ),
        ("no time-out", vec![shift("a", json!({ "versions": [v1()], "stable": "v1", "timeoutSeconds": 0 }))]),
        (
            "a time-out of a day",
            vec![shift("a", json!({ "versions": [v1()], "stable": "v1", "timeoutSeconds": 86_400 }))],
        ),
        ("rules of each kind", vec![shift("a", json!({ "versions": [v1()], "stable": "v1", "rules": rules }))]),
        ("probes of each kind", vec![shift("a", json!({ "versions": probes, "stable": "http" }))]),
        (
            "names that look like something else",
            vec![shift(
                "1.0",
                json!({ "stable": "0x1", "versions": [
            version("0x1", &["127.0.0.1:1"], Value::Null), version("1e3", &["127.0.0.1:2"], Value::Null),
            version("null", &[], Value::Null), version("4.0", &[], Value::Null), version("true", &[], Value::Null) ] }),
            )],
        ),
        (
            "several documents",
            vec![
                everything,
                shift("b", json!({ "hostnames": ["b.example.com"], "versions": [v1()], "stable": "v1" })),
                shift(
                    "c",
                    json!({ "hostnames": ["c.example.com"], "versions": [v1()], "stable": "v1",
                "errors": { "statusCodes": ["500-502", "504"], "grpcStatusCodes": [14] } }),
                ),
            ],
        ),
    ];
    for (what, documents) in cases {
        for further in [&[][..], &["--access-log", "-", "--listen", "[::1]:10000", "--controller", "localhost:7460"]] {
            let arguments = ["render", "envoy", "-f", "-", "--module", &module];
            let output = cli_reading(arguments.iter().chain(further), &text(&documents))?;
            assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{what}");
            Envoy::validate(&output.stdout).unwrap_or_else(|error| panic!("{what}: {error}\n{}", output.stdout));
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_rendered_is_said() -> anyhow::Result<()> {
    let document = text(&[shift("a", json!({ "versions": [{ "name": "v1" }], "stable": "v1" }))]);
    let taken = cli_reading(["render", "envoy", "-f", "-", "--cluster", "a_v1"], &document)?;
    let expected = "error: the controller's cluster and that of version v1 of a would both be called a_v1; choose \
                    another name with --cluster\n";
    assert_eq!((taken.code, taken.stdout.as_str(), taken.stderr.as_str()), (Some(2), "", expected));
    let bad = cli_reading(["render", "envoy", "-f", "-"], "kind: TrafficShift\n")?;
    assert!(bad.code == Some(2) && bad.stdout.is_empty() && bad.stderr.lines().count() == 3, "{bad:?}");
    let file = cli(["render", "envoy", "-f", "nowhere.yaml"])?;
    assert_eq!(file.code, Some(2));
    Ok(())
}

#[test]
fn what_cannot_be_rendered_for_a_cluster_is_said() -> anyhow::Result<()> {
    let nowhere = text(&[shift("a", json!({ "versions": [{ "name": "v1" }], "stable": "v1" }))]);
    let of = |name: &str| {
        shift(name, json!({ "hostnames": [name], "stable": "v1", "versions": [{ "name": "v1", "service": name }] }))
    };
    let fine = text(&[of("a"), of("b")]);
    let missing = "version v1 of a: service and selector are missing; one of them must say where it runs in Kubernetes";
    let cases: [(&[&str], &str, &str); 7] = [
        (&["istio"], &nowhere, missing),
        (&["envoy-gateway"], &nowhere, missing),
        (&["httproute"], &nowhere, missing),
        (&["istio", "--for", "sidecar", "--gateway", "a/b"], &fine, "--gateway is for --for gateway"),
        (&["istio", "--waypoint", "a"], &fine, "--waypoint is for --for waypoint"),
        (
            &["istio", "--for", "waypoint", "--selector", "a=b"],
            &fine,
            "--selector is for --for gateway and --for sidecar; waypoints have a name (--waypoint)",
        ),
        (&["istio", "--service", "a"], &fine, "--service is for one service, and the documents have several"),
    ];
    for (arguments, document, expected) in cases {
        let said = cli_reading(["render"].iter().chain(arguments).chain(&["-f", "-"]), document)?;
        let expected = format!("error: {expected}\n");
        assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (Some(2), "", expected.as_str()));
    }
    Ok(())
}

/// An Envoy for a document of one version without probes, so that nothing but retries helps.
async fn start(endpoints: &[&Backend]) -> anyhow::Result<(Envoy, SocketAddr, Port)> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("shift.yaml");
    let endpoints: Vec<String> = endpoints.iter().map(|backend| backend.address().to_string()).collect();
    let versions = json!([{ "name": "v1", "endpoints": endpoints }]);
    fs::write(&file, shift("shop", json!({ "versions": versions, "stable": "v1" })).to_string())?;
    let (listen, admin, controller) = (Port::reserve()?, Port::reserve()?, Port::reserve()?);
    let rendered = test_bed::render(&file, listen.address(), admin.address(), controller.address())?;
    let envoy = envoy::Options::new(rendered.stdout, admin.number()).start().await?;
    Ok((envoy, listen.address(), listen))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_endpoint_has_begun_to_work_on_goes_to_another_whatever_the_method() -> anyhow::Result<()> {
    let (good, gone) = (Backend::start("good").await?, Backend::start("gone").await?);
    let (_envoy, address, _port) = start(&[&good, &gone]).await?;
    gone.stop().await;
    for method in ["GET", "POST", "PUT", "DELETE"] {
        for _ in 0..20 {
            let answer = Request::new(address, method, "/").body("x").send().await?;
            assert_eq!((answer.status, answer.header(SERVED_BY).as_deref()), (200, Some("good")), "{method}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_endpoint_had_begun_is_repeated_only_where_that_is_safe() -> anyhow::Result<()> {
    const REQUESTS: u64 = 20;
    let (good, dying) = (Backend::start("good").await?, Backend::start("dying").await?);
    let (_envoy, address, _port) = start(&[&good, &dying]).await?;
    dying.set(|behaviour| behaviour.mode = Mode::Reset);
    let arrived = || good.counts().requests + dying.counts().requests;
    for (method, is_safe) in [("GET", true), ("POST", false), ("DELETE", false)] {
        let (before, of_dying) = (arrived(), dying.counts().requests);
        let mut failed = 0;
        for _ in 0..REQUESTS {
            // A client has no say in it.
            let request = Request::new(address, method, "/").header("x-envoy-retry-on", "reset,5xx").body("x");
            failed += u64::from(request.header("x-envoy-max-retries", "9").send().await?.status != 200);
        }
        let died = dying.counts().requests - of_dying;
        assert!(died > 0, "{method} never came to the dying endpoint");
        let expected = if is_safe { (0, REQUESTS + died) } else { (died, REQUESTS) };
        assert_eq!((failed, arrived() - before), expected, "{method}: failed, and arrived at endpoints");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_see_what_clients_sent_and_not_how_it_was_decided() -> anyhow::Result<()> {
    let backend = Backend::start("v1").await?;
    backend.set(|behaviour| behaviour.mode = Mode::Echo);
    let (_envoy, address, _port) = start(&[&backend]).await?;
    let forged = get(address, "/a?b").host("any.example.com").header("x-tideshift-version", "v9");
    let echo = forged.header("x-tideshift-x", "1").header("x-own", "1").send().await?.json()?;
    let header = |name: &str| {
        let headers = echo["headers"].as_array().into_iter().flatten();
        headers.filter(|header| header["name"] == name).map(|header| header["value"].clone()).collect::<Vec<_>>()
    };
    assert_eq!((header("x-tideshift-version"), header("x-own")), (vec![json!("v1")], vec![json!("1")]));
    assert_eq!((header("x-tideshift-x"), header("x-envoy-retry-on")), (vec![], vec![]));
    assert_eq!(header("host"), [json!("any.example.com")]);
    Ok(())
}
