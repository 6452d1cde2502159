//! What `tideshift render` prints for clusters is what API servers take, by the schemas of the kinds.

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::controller::cli_reading;
use tideshift_tests::schemas;

fn shift(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
        "metadata": { "name": name, "namespace": "shop" }, "spec": spec })
}

/// The objects that `tideshift render` prints.
fn rendered(arguments: &[&str], documents: &[Value]) -> anyhow::Result<Vec<Value>> {
    let text = documents.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n");
    let output = cli_reading(["render"].iter().chain(arguments).chain(&["-f", "-"]), &text)?;
    ensure!(output.code == Some(0) && output.stderr.is_empty(), "{arguments:?}: {}", output.stderr);
    let objects: Vec<Value> = serde_saphyr::from_multiple(&output.stdout)?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

fn documents() -> Vec<Value> {
    let labels = |version: &str| json!({ "matchLabels": { "app": "payment-service", "version": version } });
    let own = |name: &str| json!({ "name": name, "service": format!("search-{name}") });
    let rules = json!([
        { "name": "a \"b\": #c", "matches": [{ "headers": [{ "name": "x-a", "value": "*&!%@`" }] }],
          "versions": [{ "name": "v1", "weight": 1 }] },
        { "versions": [{ "name": "v1", "weight": 0 }] },
    ]);
    vec![
        shift(
            "payment",
            json!({ "hostnames": ["payment.example.com", "*.payment.example.com", "payment", "payment.shop"],
            "versions": [{ "name": "v1", "selector": labels("v1"), "port": "http" },
                         { "name": "2.0", "selector": labels("2.0"), "port": 8080 }, { "name": "true", "selector": labels("true") }],
            "stable": "v1", "rules": rules, "session": { "type": "Cookie", "name": "s", "generation": u64::MAX } }),
        ),
        shift(
            "search",
            json!({ "stable": "v1", "services": [
            { "name": "search", "hostnames": ["search.shop.svc.cluster.local"], "versions": [own("v1"), own("v2")] },
            { "name": "suggest", "hostnames": ["suggest.example.com"], "versions": [own("v2"), own("v1")],
              "mirror": { "version": "v2" } } ] }),
        ),
    ]
}

#[test]
fn what_render_prints_is_what_api_servers_take() -> anyhow::Result<()> {
    let token = tempfile::NamedTempFile::new()?;
    std::fs::write(token.path(), "0123456789abcdef")?;
    let token = token.path().display().to_string();
    let sha256 = "0123456789abcdef".repeat(4);
    let filter = ["--module-sha256", sha256.as_str(), "--controller-token-file", token.as_str()];
    let http = ["--module-url", "https://files.example.com/tideshift.wasm"];
    let cases: [(&[&str], &[&str]); 8] = [
        (&["istio"], &["WasmPlugin", "DestinationRule", "VirtualService"]),
        (&["istio", "--for", "sidecar", "--fail-strategy", "FAIL_CLOSE"], &["WasmPlugin", "VirtualService"]),
        (&["istio", "--for", "sidecar", "--selector", "app=a", "--selector", "b/c=d"], &["WasmPlugin"]),
        (&["istio", "--for", "waypoint", "--fail-strategy", "FAIL_RELOAD"], &["WasmPlugin", "VirtualService"]),
        (&["istio", "--cluster", "east", "--proxy-namespace", "gateways"], &["WasmPlugin", "DestinationRule"]),
        (&["envoy-gateway"], &["EnvoyExtensionPolicy", "HTTPRoute", "ReferenceGrant", "Service"]),
        (
            &["envoy-gateway", "--gateway", "tideshift-system/eg", "--fail-closed"],
            &["EnvoyExtensionPolicy", "HTTPRoute"],
        ),
        (&["httproute", "--service-port", "65535"], &["HTTPRoute", "Service"]),
    ];
    for (arguments, kinds) in cases {
        let with_filter = arguments[0] != "httproute";
        for further in [&[][..], &filter, &http].into_iter().filter(|further| with_filter || further.is_empty()) {
            let objects = rendered(&[arguments, further].concat(), &documents())?;
            for kind in kinds {
                assert!(objects.iter().any(|object| object["kind"] == *kind), "{arguments:?}: no {kind}");
            }
            assert_eq!(schemas::check(&objects)?, [""; 0], "{arguments:?} {further:?}");
        }
    }
    Ok(())
}

/// Whether the check would see anything: of each kind that is printed, with an invalid field and an unknown one.
#[test]
fn what_they_do_not_take_is_seen() -> anyhow::Result<()> {
    let istio = rendered(&["istio"], &documents())?;
    let gateway = rendered(&["envoy-gateway"], &documents())?;
    let cases = [
        ("WasmPlugin", "/spec/failStrategy", json!("FAIL_SOFTLY"), "must be equal to one of the allowed values"),
        ("WasmPlugin", "/spec/url", json!(1), "must be string"),
        ("DestinationRule", "/spec/subsets/0/labels", json!({ "a": 1 }), "must be string"),
        ("VirtualService", "/spec/http/0/route/0/destination/port/number", json!("80"), "must be integer"),
        ("EnvoyExtensionPolicy", "/spec/wasm/0/failOpen", json!("yes"), "must be boolean"),
        ("HTTPRoute", "/spec/rules/0/backendRefs/0/port", json!(65_536), "must be <= 65535"),
        ("ReferenceGrant", "/spec/from/0/namespace", json!("a b"), "must match pattern"),
        ("Service", "/spec/selector", json!("a=b"), "must be object"),
    ];
    for (kind, path, value, expected) in cases {
        let object = istio.iter().chain(&gateway).find(|object| object["kind"] == kind).cloned().unwrap_or_default();
        let mut wrong = object.clone();
        *wrong.pointer_mut(path).unwrap_or_else(|| panic!("{kind} has no {path}")) = value;
        let said = schemas::check(&[wrong])?;
        assert!(said.iter().any(|line| line.contains(expected)), "{kind} {path}: {said:?}");
        let mut unknown = object;
        unknown["spec"]["unheardOf"] = json!(true);
        assert_eq!(
            schemas::check(&[unknown.clone()])?,
            [format!("{kind} {}: /spec/unheardOf is unknown", name_of(&unknown))]
        );
    }
    Ok(())
}

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}
