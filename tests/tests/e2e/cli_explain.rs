//! `tideshift explain`: what it says of a request is what a real Envoy then does with it.

use anyhow::Context as _;
use serde_json::{Value, json};
use tideshift_tests::backend::SERVED_BY;
use tideshift_tests::client::get;
use tideshift_tests::controller::{Output, cli, cli_reading};
use tideshift_tests::test_bed::{FOR_EVER, HOST, TestBed, until_shares};

fn explain(arguments: &[&str]) -> anyhow::Result<Output> {
    cli(["explain"].iter().chain(arguments))
}

fn rules() -> Value {
    json!([
        { "name": "beta", "matches": [{ "headers": [{ "name": "x-beta", "value": "1" }],
            "path": { "type": "PathPrefix", "value": "/cart" } }], "versions": [{ "name": "v2" }] },
        { "matches": [{ "cookies": [{ "name": "canary", "value": "always" }] },
            { "queryParams": [{ "name": "v", "type": "RegularExpression", "value": "[3-9]" }] }],
          "versions": [{ "name": "v3" }] },
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_says_what_envoy_does() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1), ("v3", 1)]).await?;
    let steps = json!([{ "weight": 25, "holdSeconds": FOR_EVER }]);
    let fields = json!({ "target": "v2", "rules": rules(), "strategy": { "steps": steps } });
    rig.write(&rig.document(fields))?;
    let file = rig.file().display().to_string();
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(2).await?;
    until_shares(&controller, "v2 at 25 %", &[75.0, 25.0, 0.0]).await?;

    /// The path, further headers, and the version if it is certain.
    type Case = (&'static str, &'static [(&'static str, &'static str)], Option<&'static str>);
    let requests: [Case; 8] = [
        ("/cart/1", &[("x-beta", "1")], Some("v2")),
        ("/cartoon", &[("x-beta", "1")], None),
        ("/", &[("cookie", "a=b; canary=always")], Some("v3")),
        ("/?v=7", &[], Some("v3")),
        ("/?v=2", &[], None),
        ("/", &[("x-tideshift-version", "v3")], None),
        ("/cart", &[("X-BETA", "1"), ("cookie", "canary=always")], Some("v2")),
        ("/", &[("x-beta", "2")], None),
    ];
    for (path, headers, expected) in requests {
        let headers_given: Vec<String> = headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let mut arguments = vec!["-f", &file, "--path", path, "--output", "json"];
        headers_given.iter().for_each(|header| arguments.extend(["-H", header.as_str()]));
        let output = explain(&arguments)?;
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
        let explained: Value = serde_json::from_str(&output.stdout)?;
        assert_eq!(explained["rule"].is_null(), expected.is_none(), "{path} {headers:?}: {}", output.stdout);
        assert_eq!(explained["version"], expected.unwrap_or("v1"), "at rest; {path} {headers:?}");
        let mut request = get(rig.address(), path).host(HOST);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        // Without a rule, weights decide: v1 or v2, by turns.
        let mut answers = Vec::new();
        for _ in 0..8 {
            answers.push(request.send().await?.header(SERVED_BY).context("no version served")?);
        }
        match expected {
            Some(version) => assert!(answers.iter().all(|name| name == version), "{path} {headers:?}: {answers:?}"),
            None => assert!(answers.contains(&"v1".to_owned()) && !answers.contains(&"v3".to_owned()), "{answers:?}"),
        }
    }

    // Without a document: as it is right now.
    let server = format!("http://{}", controller.address());
    let now = explain(&["--server", &server, "--host", HOST, "-o", "json"])?;
    let now: Value = serde_json::from_str(&now.stdout)?;
    let share = |name: &str, weight: u32| json!({ "name": name, "weight": weight, "share": f64::from(weight) / 100.0 });
    assert_eq!((&now["versions"], &now["version"]), (&json!([share("v1", 75), share("v2", 25)]), &Value::Null));
    let text = explain(&["--server", &server, "--path", "/cart", "-H", "x-beta: 1"])?.stdout;
    assert!(text.ends_with("version: v2 by rules[0] (beta)\n"), "{text}");
    Ok(())
}

#[test]
fn it_says_why_not_and_what_it_needs() -> anyhow::Result<()> {
    let document = |name: &str, hostname: &str| {
        json!({ "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": name },
            "spec": { "hostnames": [hostname], "versions": [{ "name": "v1" }, { "name": "v2" }, { "name": "v3" }],
                "stable": "v1", "rules": rules() } })
        .to_string()
    };
    let one = document("shop", "*.example.com");
    let two = format!("{one}\n---\n{}", document("till", "till.example.com"));
    let explain =
        |arguments: &[&str], documents: &str| cli_reading(["explain", "-f", "-"].iter().chain(arguments), documents);
    let text = explain(&["--path", "/cart", "-H", "x-beta: 2"], &one)?.stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "request: GET any.example.com/cart");
    assert_eq!(lines[1], "service: shop (hostname *.example.com)");
    assert_eq!(lines[2], "  rules[0] (beta): no match: header x-beta is \"2\", wanted is \"1\"");
    assert!(lines[3].starts_with("  rules[1]: no match: "), "{text}");
    assert_eq!(lines[4], "version: v1 by the service's weights, as no rule takes it");

    let text = explain(&["--weights", "v1=90,v2=10"], &one)?.stdout;
    assert!(text.contains("v1 90 %, v2 10 %"), "{text}");
    let text = explain(&["--host", "till.example.com:443"], &two)?.stdout;
    assert!(text.contains("service: till (hostname till.example.com)"), "the most specific one: {text}");
    let text = explain(&["--host", "elsewhere.org"], &two)?.stdout;
    assert!(text.contains("no service has the host elsewhere.org"), "{text}");
    for (arguments, error) in [
        (&[][..], "error: which service? Give --host, or --service with one of shop, till"),
        (&["--service", "shoop"], "error: --service: there is no service shoop; expected one of shop, till"),
        (&["--service", "shop", "--weights", "v9=1"], "error: --weights: shop has no version v9; expected v1, v2, v3"),
        (&["--host", "a", "-H", "nonsense"], "error: invalid value 'nonsense' for '--header <NAME: VALUE>'"),
        (&["--host", "a", "--path", "cart"], "error: invalid value 'cart' for '--path <PATH>'"),
    ] {
        let output = explain(arguments, &two)?;
        assert!(output.code == Some(2) && output.stderr.starts_with(error), "{error}: {output:?}");
    }
    Ok(())
}
