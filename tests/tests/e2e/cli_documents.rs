//! `tideshift validate` as a user sees it: every error of every file at once, with its place and what is allowed.

use std::fs;

use tempfile::TempDir;
use tideshift_tests::controller::{Output, cli, cli_reading};

const GOOD: &str = r#"
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: checkout}
spec:
  hostnames: [checkout.example.com]
  versions:
  - name: v1
    endpoints: ["127.0.0.1:9001"]
    readinessProbe: {httpGet: {path: /health}}
  - {name: v2, endpoints: ["127.0.0.1:9002"]}
  stable: v1
  target: v2
  strategy: {steps: [{weight: 1, holdSeconds: 30}, {weight: 100}]}
"#;

/// Files by name and text, and what `tideshift validate` says of them, the folder's name left out.
fn validate(files: &[(&str, &str)]) -> anyhow::Result<Output> {
    let folder: TempDir = tempfile::tempdir()?;
    let mut arguments = vec!["validate".to_owned()];
    for (name, text) in files {
        let file = folder.path().join(name);
        fs::write(&file, text)?;
        arguments.extend(["-f".to_owned(), file.display().to_string()]);
    }
    let mut output = cli(&arguments)?;
    let folder = format!("{}/", folder.path().display());
    output.stderr = output.stderr.replace(&folder, "");
    output.stdout = output.stdout.replace(&folder, "");
    Ok(output)
}

/// Fails unless the errors begin like this, all of them, in this order.
fn assert_errors(output: &Output, expected: &[&str]) {
    let lines: Vec<&str> = output.stderr.lines().collect();
    assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""), "{output:?}");
    assert_eq!(lines.len(), expected.len(), "{}", output.stderr);
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}\nis not\n{expected}");
    }
}

#[test]
fn what_is_right_is_said_to_be() -> anyhow::Result<()> {
    let policy = r#"{"revision": "9007199254740993", "services": [{"name": "search", "versions": [{"name": "v1"}]}]}"#;
    let two = format!("{GOOD}---\n{}", GOOD.replace("checkout", "till"));
    let output = validate(&[("two.yaml", &two), ("policy.json", policy)])?;
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
    assert_eq!(
        output.stdout.lines().collect::<Vec<_>>(),
        [
            "two.yaml (document 1): TrafficShift checkout is valid",
            "two.yaml (document 2): TrafficShift till is valid",
            "policy.json: policy of revision 9007199254740993 (search) is valid",
        ]
    );
    let output = cli_reading(["validate", "-f", "-"], GOOD)?;
    assert_eq!((output.code, output.stdout.as_str()), (Some(0), "<stdin>: TrafficShift checkout is valid\n"));
    Ok(())
}

#[test]
fn every_error_comes_at_once_with_place_value_and_what_is_allowed() -> anyhow::Result<()> {
    let bad = r#"
apiVersion: tideshift.dev/v1
kind: TrafficShift
metadata: {name: Check_out, lables: {}}
spec:
  hostnames: ["*.example.com", "a b"]
  verions: []
  versions:
  - {name: v1, endpoints: ["127.0.0.1"], readinessProbe: {httpGet: {prot: 80}, tcpSocket: {}}}
  - {name: v1, readinessProbe: {tcpSocket: {port: 70000}, periodSeconds: 0, periodMillis: 5}}
  - {name: 2}
  stable: v9
  target: true
  strategy: {steps: [{weight: 101}, {weight: 5, holdSeconds: -1}, {holdSeconds: 1}]}
  rules:
  - versions: [{name: v7, weight: 1000001}]
    matches: [{headers: [{name: "x beta", type: Exactly, value: 1}], path: {type: PathPrefix, value: cart}}]
  analysis: {maxErrors: -1}
  capacity: {endpointsForFullLoad: 0}
"#;
    assert_errors(
        &validate(&[("good.yaml", GOOD), ("bad.yaml", bad)])?,
        &[
            "bad.yaml: apiVersion: \"tideshift.dev/v1\" is not allowed; expected tideshift.dev/v1alpha1",
            "bad.yaml: metadata.name: \"Check_out\" is not allowed; expected a name of lower-case letters, digits,",
            "bad.yaml: metadata.lables: unknown field; did you mean `labels`? (known here: name, ",
            "bad.yaml: spec.hostnames[1]: \"a b\" is not allowed; expected a hostname without port, such as ",
            "bad.yaml: spec.versions[0].endpoints[0]: \"127.0.0.1\" is not allowed; expected host:port, such as ",
            "bad.yaml: spec.versions[0].readinessProbe.httpGet.prot: unknown field; did you mean `port`?",
            "bad.yaml: spec.versions[0].readinessProbe: {\"httpGet\":{\"prot\":80},\"tcpSocket\":{}} is not allowed; \
             expected exactly one of httpGet, tcpSocket, exec",
            "bad.yaml: spec.versions[1].readinessProbe.tcpSocket.port: 70000 is not allowed; expected an integer from \
             1 to 65535",
            "bad.yaml: spec.versions[1].readinessProbe: {\"",
            "bad.yaml: spec.versions[1].readinessProbe.periodSeconds: 0 is not allowed; expected an integer from 1 to ",
            "bad.yaml: spec.versions[2].name: 2 is not allowed; expected a version name of lower-case letters,",
            "bad.yaml: spec.versions[1].name: \"v1\" is not allowed; expected a version name that no other",
            "bad.yaml: spec.rules[0].matches[0].headers[0].name: \"x beta\" is not allowed; expected a header name",
            "bad.yaml: spec.rules[0].matches[0].headers[0].type: \"Exactly\" is not allowed; expected one of Exact, \
             Prefix, RegularExpression, Present",
            "bad.yaml: spec.rules[0].matches[0].headers[0].value: 1 is not allowed; expected a string",
            "bad.yaml: spec.rules[0].matches[0].path.value: \"cart\" is not allowed; expected a path that starts with",
            "bad.yaml: spec.rules[0].versions[0].name: \"v7\" is not allowed; expected one of the versions v1",
            "bad.yaml: spec.rules[0].versions[0].weight: 1000001 is not allowed; expected an integer from 0 to 1000000",
            "bad.yaml: spec.capacity.endpointsForFullLoad: 0 is not allowed; expected an integer from 1 to 1000000",
            "bad.yaml: spec.stable: \"v9\" is not allowed; expected one of the versions v1",
            "bad.yaml: spec.target: true is not allowed; expected one of the versions v1",
            "bad.yaml: spec.strategy.steps[0].weight: 101 is not allowed; expected an integer from 0 to 100",
            "bad.yaml: spec.strategy.steps[1].holdSeconds: -1 is not allowed; expected an integer from 0 to ",
            "bad.yaml: spec.strategy.steps[2].weight: missing; expected the target's share in percent, 0 to 100",
            "bad.yaml: spec.analysis.maxErrors: -1 is not allowed; expected an integer of at least 0",
            "bad.yaml: spec.verions: unknown field; did you mean `versions`? (known here: hostnames, versions, ",
        ],
    );
    Ok(())
}

#[test]
fn the_whole_of_the_documented_shape_is_taken() -> anyhow::Result<()> {
    let document = "
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: checkout}
spec:
  hostnames: [checkout.example.com]
  versions:
  - {name: v1, endpoints: [\"127.0.0.1:9001\"], readinessProbe: {httpGet: {path: /health}, periodSeconds: 10}}
  - {name: v2, endpoints: [\"127.0.0.1:9002\"], readinessProbe: {grpc: {port: 9102}}}
  stable: v1
  target: v2
  rules: []
  session: {type: Header, name: x-user-id}
  strategy:
    steps: [{weight: 1, holdSeconds: 30}, {weight: 25, holdSeconds: 60}, {pause: true}, {weight: 100}]
    maxSurge: 25%
    maxUnavailable: 25%
    minReadySeconds: 0
    progressDeadlineSeconds: 600
    warmUp: {seconds: 30}
  analysis: {falseRollbackRate: 0.001, maxErrorRate: 0.02, passConfidence: 0.95, latency: {}}
  drain: {timeoutSeconds: 300}
";
    let output = validate(&[("a.yaml", document)])?;
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output:?}");
    Ok(())
}

#[test]
fn documents_must_agree_and_files_must_be_there() -> anyhow::Result<()> {
    let same_host = GOOD.replace("{name: checkout}", "{name: till}");
    let same_name = GOOD.replace("checkout.example.com", "other.example.com");
    assert_errors(
        &validate(&[("1.yaml", GOOD), ("2.yaml", &same_host), ("3.yaml", &same_name)])?,
        &[
            "2.yaml: spec.hostnames[0]: \"checkout.example.com\" is already a hostname of the TrafficShift checkout in ",
            "3.yaml: metadata.name: \"checkout\" is already the name of the TrafficShift in 1.yaml",
        ],
    );
    let output = cli(["validate", "-f", "nowhere.yaml"])?;
    assert_errors(&output, &["nowhere.yaml: cannot be read: no such file or directory"]);
    Ok(())
}

#[test]
fn what_is_not_yaml_is_answered_with_line_and_column() -> anyhow::Result<()> {
    for (text, place) in [
        (GOOD.replace("stable: v1", "stable: [v1"), "line 13, column"),
        (GOOD.replace("  stable", "\tstable"), "line 12, column"),
        (format!("{GOOD}  stable: v2\n"), "line 15, column"),
    ] {
        let output = validate(&[("a.yaml", &text)])?;
        assert_errors(&output, &["a.yaml: not YAML: "]);
        assert!(output.stderr.contains(place), "{place} is not in {}", output.stderr);
    }
    assert_errors(&cli_reading(["validate", "-f", "-"], "")?, &["<stdin>: no document in it"]);
    Ok(())
}
