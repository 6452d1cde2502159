//! TrafficShift documents that are taken, and those that are refused, for the tests of everybody who tells them apart: the
//! reader here, and the schema and the rules that Kubernetes has of them.

use serde_json::{Value, json};

/// A document of the usual name.
pub(crate) fn document(spec: Value) -> Value {
    json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "checkout"}, "spec": spec})
}

/// The usual spec.
pub(crate) fn spec() -> Value {
    json!({
        "hostnames": ["checkout.example.com"],
        "versions": [
            {"name": "v1", "endpoints": ["127.0.0.1:9001"], "readinessProbe": {"httpGet": {"path": "/health"}}},
            {"name": "v2", "endpoints": ["[::1]:9002", "payments.internal:80"]},
        ],
        "stable": "v1",
    })
}

/// The spec of several services.
pub(crate) fn services() -> Value {
    let service = |name: &str| {
        json!({"name": name, "hostnames": [format!("{name}.example.com")], "capacity": {"endpointsForFullLoad": 3},
            "versions": [{"name": "old", "endpoints": ["127.0.0.1:1"]}, {"name": "new"}]})
    };
    json!({"services": [service("cart"), service("search")], "stable": "old", "target": "new"})
}

/// A document of this spec, with the field at this place of it changed.
pub(crate) fn with(mut spec: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap_or_default();
    match (spec.pointer_mut(parent), field.parse::<usize>()) {
        (Some(list), Ok(index)) => list[index] = value,
        (Some(object), Err(_)) => object[field] = value,
        (None, _) => unreachable!("{pointer}"),
    }
    document(spec)
}

/// Documents that are right.
pub(crate) fn taken() -> Vec<Value> {
    let usual = [
        ("/target", json!("v2")),
        ("/target", json!(null)),
        ("/hostnames", json!(["*.Example.com", "a"])),
        ("/versions/0/endpoints", json!(["10.0.0.1:1", "a-b.example.com:65535", "1a:80", "[fe80::1]:443"])),
        (
            "/versions/0/readinessProbe",
            json!({
                "exec": {"command": ["check", "--fast"]}, "initialDelaySeconds": 5, "periodMillis": 50, "timeoutSeconds": 2,
                "successThreshold": 2, "failureThreshold": 1,
            }),
        ),
        ("/versions/0/readinessProbe", json!({"grpc": {"port": 50051, "service": "shop.Cart"}, "periodSeconds": 1})),
        ("/versions/0/readinessProbe", json!({"tcpSocket": {"host": "::1", "port": 1}})),
        (
            "/versions/0/readinessProbe",
            json!({"httpGet": {"path": "/a?b", "host": "a.b", "port": 65535, "scheme": "HTTPS",
            "httpHeaders": [{"name": "Host", "value": ""}, {"name": "x", "value": "a b"}]}}),
        ),
        (
            "/versions/0",
            json!({
                "name": "v1", "service": "payment", "port": "http", "cluster": "west",
                "selector": {
                    "matchLabels": {"app": "payment"},
                    "matchExpressions": [
                        {"key": "track", "operator": "In", "values": ["stable", "old"]},
                        {"key": "canary", "operator": "DoesNotExist"},
                    ],
                },
                "workloadRef": {"name": "payment-v1"},
            }),
        ),
        (
            "/versions/0",
            json!({"name": "v1", "selector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]},
            "port": 8080, "workloadRef": {"apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "name": "payment"}}),
        ),
        ("/versions/0", json!({"name": "v1", "workloadRef": {"apiVersion": "v1", "name": "payment"}})),
        (
            "/rules",
            json!([
                {"name": "a", "versions": [{"name": "v1", "weight": 0}, {"name": "v2", "weight": 1_000_000}],
                    "mirror": {"version": "v1", "percent": 0, "methods": ["GET", "M-SEARCH"]}},
                {"versions": [{"name": "v2"}], "matches": [
                    {"headers": [{"name": "X-Beta", "type": "Present"}, {"name": "host", "value": ""}],
                        "cookies": [{"name": "canary", "type": "Prefix", "value": "a"}], "method": "POST"},
                    {"path": {"value": "/cart"}, "queryParams": [{"name": "a b", "type": "RegularExpression", "value": "a|b"}]},
                    {"path": {"type": "RegularExpression", "value": "(/a)?"}}, {"path": {"type": "Exact", "value": "/"}}, {},
                ]},
                {"versions": [{"name": "v2"}], "matches": []},
            ]),
        ),
        ("/session", json!({"type": "Header", "name": "X-User-Id", "generation": 3, "secret": "s"})),
        ("/session", json!({"type": "Cookie", "name": "x-tideshift-c", "ttlSeconds": 60})),
        ("/mirror", json!({"version": "v2", "percent": 5})),
        ("/guard", json!({"coolDownSeconds": 400})),
        ("/guard", json!({"coolDownSeconds": 30, "maxCoolDownSeconds": 30, "enabled": false, "falseVetoRate": 1e-12})),
        ("/errors", json!({"statusCodes": [429, "500-599", "503", "500 - 500"], "grpcStatusCodes": [1, 16]})),
        ("/errors", json!({"statusCodes": [], "grpcStatusCodes": []})),
        ("/capacity", json!({"endpointsForFullLoad": 1})),
        ("/drain", json!({"timeoutSeconds": 0})),
        ("/onDelete", json!("Keep")),
        ("/onDelete", json!("Drain")),
        ("/timeoutSeconds", json!(0)),
        ("/timeoutSeconds", json!(86_400)),
        ("/analysis", json!({"maxErrors": 3})),
        (
            "/analysis",
            json!({"falseRollbackRate": 0.1, "maxErrorRate": 0.5, "passConfidence": 0.5, "maxErrors": 0,
            "latency": {"quantiles": [0.5], "minDifferenceMillis": 0}}),
        ),
        (
            "/strategy",
            json!({"steps": [
                {"matches": [{"headers": [{"name": "x-beta", "value": "1"}]}]}, {"weight": 5, "holdSeconds": 30},
                {"pause": true}, {"matches": [], "weight": 50}, {"weight": 100, "pause": true},
            ]}),
        ),
        ("/strategy", json!({"maxSurge": "0%", "maxUnavailable": "1%", "minReadySeconds": 599})),
        (
            "/strategy",
            json!({"maxSurge": 1, "maxUnavailable": 0, "progressDeadlineAbort": true, "scaleDownDelaySeconds": 0}),
        ),
        ("/strategy", json!({"maxSurge": "1000%", "maxUnavailable": "100%"})),
        ("/strategy", json!({"blueGreen": {}})),
        (
            "/strategy",
            json!({"blueGreen": {"autoPromotionEnabled": false, "holdSeconds": 5, "autoPromotionSeconds": 9,
            "previewMatches": [{"cookies": [{"name": "a", "value": "b"}]}]}}),
        ),
        (
            "/strategy",
            json!({"warmUp": {"seconds": 30, "mirrorPercent": 5, "requests": {
                "count": 50, "concurrency": 4, "paths": ["/", "/cart?warm=1"], "method": "HEAD", "scheme": "HTTPS",
                "headers": [{"name": "Host", "value": "shop.example.com"}], "statusCodes": ["200-299", 404],
                "minPassPercent": 90, "timeoutSeconds": 20,
            }}}),
        ),
        ("/session", json!({"type": "Cookie", "name": "c", "secretRef": {"name": "shop.keys", "key": "session"}})),
        ("/strategy", json!({"warmUp": {"requests": {}}})),
        (
            "/webhooks",
            json!([
                {"name": "a", "type": "Gate", "url": "https://ci.example.com/gate?team=a", "steps": [2, 3], "periodSeconds": 1},
                {"name": "b", "type": "Gate", "url": "http://[::1]:8443/a", "secretFile": "/etc/hook", "timeoutSeconds": 300},
                {"name": "c", "type": "Notification", "url": "http://127.0.0.1:8080", "secret": "s"},
                {"name": "e", "type": "Gate", "url": "http://a", "secretRef": {"name": "hooks", "key": "ci.secret"}},
                {"name": "f", "type": "Notification", "urlSecretRef": {"name": "hooks", "key": ".chat_URL-1"}},
                {"name": "d", "type": "Notification", "url": "https://Example.com?a=b%20", "phases": ["Failed", "Succeeded"],
                    "retries": 0, "format": "Slack"},
            ]),
        ),
    ];
    let changed = usual.into_iter().map(|(pointer, value)| with(spec(), pointer, value));
    let in_one_of_several = [
        ("/services/1/rules", json!([{"versions": [{"name": "new"}]}])),
        ("/services/1/mirror", json!({"version": "old"})),
        ("/services/1/timeoutSeconds", json!(30)),
        ("/services/1/session", json!({"type": "Cookie", "name": "c"})),
        ("/services/1/versions", json!([{"name": "new"}, {"name": "old"}])),
    ];
    let several = in_one_of_several.into_iter().map(|(pointer, value)| with(services(), pointer, value));
    changed.chain(several).chain([document(spec()), document(services())]).collect()
}

/// A document that is wrong.
pub(crate) struct Refused {
    /// The document.
    pub(crate) document: Value,
    /// What an error says, or a part of that.
    pub(crate) error: &'static str,
    /// Whether only the reader can see what is wrong with it.
    #[allow(dead_code, reason = "not everybody who uses this module asks")]
    pub(crate) by_the_reader_alone: bool,
}

/// Documents with one mistake each.
pub(crate) fn refused() -> Vec<Refused> {
    let version = |further: Value| {
        let mut version = json!({"name": "v1"});
        if let (Some(version), Value::Object(further)) = (version.as_object_mut(), further) {
            version.extend(further);
        }
        json!([version])
    };
    let rule = |matches: Value| json!([{"versions": [{"name": "v2"}], "matches": [matches]}]);
    let webhook = |field: &str, value: Value| {
        let mut webhook = json!({"name": "a", "type": "Gate", "url": "https://ci.example.com/gate"});
        webhook[field] = value;
        json!([webhook])
    };
    let requests = |field: &str, value: Value| json!({"warmUp": {"requests": {field: value}}});
    let gate = json!({"name": "a", "type": "Gate", "url": "http://a"});
    let both_secrets = json!([{"name": "a", "type": "Gate", "url": "http://a", "secret": "a", "secretFile": "b"}]);
    let usual = [
        ("/stable", json!("v9"), "spec.stable: \"v9\" is not allowed; expected one of the versions v1, v2"),
        ("/stable", json!(null), "spec.stable: missing; expected a version's name"),
        ("/target", json!("v9"), "spec.target: \"v9\" is not allowed"),
        ("/stabel", json!("v1"), "spec.stabel: unknown field; did you mean `stable`?"),
        ("/hostnames", json!("a.example.com"), "spec.hostnames: \"a.example.com\" is not allowed; expected a list"),
        ("/hostnames", json!(["a.example.com:80"]), "spec.hostnames[0]: \"a.example.com:80\" is not allowed"),
        ("/hostnames", json!(["*"]), "spec.hostnames[0]: \"*\" is not allowed"),
        ("/capacity", json!({"endpointsForFullLoad": 0}), "spec.capacity.endpointsForFullLoad: 0 is not allowed"),
        ("/onDelete", json!("drain"), "spec.onDelete: \"drain\" is not allowed; expected Keep or Drain"),
        ("/drain", json!({"timeoutSeconds": -1}), "spec.drain.timeoutSeconds: -1 is not allowed"),
        ("/timeoutSeconds", json!(-1), "spec.timeoutSeconds: -1 is not allowed; expected an integer from 0 to 86400"),
        ("/timeoutSeconds", json!(86_401), "spec.timeoutSeconds: 86401 is not allowed"),
        ("/timeoutSeconds", json!("15s"), "spec.timeoutSeconds: \"15s\" is not allowed"),
        // Versions.
        ("/versions", json!([]), "spec.versions: [] is not allowed; expected 1 to 1000 versions"),
        ("/versions", json!(null), "spec.versions: missing; expected a list of versions"),
        ("/versions/1/name", json!("v1"), "spec.versions[1].name: \"v1\" is not allowed"),
        ("/versions/1/name", json!(1), "spec.versions[1].name: 1 is not allowed; expected a version name"),
        ("/versions/1/name", json!("V2"), "spec.versions[1].name: \"V2\" is not allowed; expected a version name"),
        ("/versions/1/endpoints", json!({}), "spec.versions[1].endpoints: {} is not allowed; expected a list"),
        ("/versions/0/endpoints", json!(["127.0.0.1"]), "spec.versions[0].endpoints[0]: \"127.0.0.1\" is not allowed"),
        ("/versions/0/endpoints", json!(["127.0.0.1:0"]), "spec.versions[0].endpoints[0]: "),
        ("/versions/0/endpoints", json!(["::1:80"]), "spec.versions[0].endpoints[0]: "),
        (
            "/versions/0/endpoints",
            json!(["a:1", "b:1", "a:1"]),
            "spec.versions[0].endpoints[2]: \"a:1\" is not allowed",
        ),
        (
            "/versions",
            version(json!({"service": "s", "endpoints": ["a:1"]})),
            "expected either endpoints or, in Kubernetes, service and selector",
        ),
        ("/versions", version(json!({"port": 80})), "expected service or selector beside port"),
        ("/versions", version(json!({"cluster": "a"})), "expected service or selector beside cluster"),
        (
            "/versions",
            version(json!({"selector": {}})),
            "versions[0].selector: {} is not allowed; expected at least one of",
        ),
        ("/versions", version(json!({"selector": {"matchLabels": {}}})), "expected at least one of matchLabels"),
        ("/versions", version(json!({"selector": {"matchExpressions": []}})), "expected at least one of matchLabels"),
        (
            "/versions",
            version(json!({"selector": {"matchLabels": {"a": 1}}})),
            "selector.matchLabels.a: 1 is not allowed; expected a string",
        ),
        (
            "/versions",
            version(json!({"selector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}})),
            "expected values with the operators In and NotIn, and none with Exists",
        ),
        (
            "/versions",
            version(json!({"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}})),
            "expected values with the operators In and NotIn, and none with Exists",
        ),
        (
            "/versions",
            version(json!({"selector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}})),
            "operator: \"Is\" is not allowed",
        ),
        ("/versions", version(json!({"service": "s", "port": "a.b"})), "versions[0].port: \"a.b\" is not allowed"),
        ("/versions", version(json!({"service": "s", "port": "80"})), "versions[0].port: \"80\" is not allowed"),
        ("/versions", version(json!({"service": "s", "port": 0})), "versions[0].port: 0 is not allowed"),
        (
            "/versions",
            version(json!({"workloadRef": {"kind": "deployment", "name": "a"}})),
            "workloadRef.kind: \"deployment\" is not allowed",
        ),
        (
            "/versions",
            version(json!({"workloadRef": {"apiVersion": "a/b/c", "name": "a"}})),
            "workloadRef.apiVersion: ",
        ),
        ("/versions", version(json!({"workloadRef": {}})), "workloadRef.name: missing; expected a workload's name"),
        // Probes.
        (
            "/versions/0/readinessProbe",
            json!({}),
            "spec.versions[0].readinessProbe: {} is not allowed; expected exactly",
        ),
        ("/versions/0/readinessProbe", json!({"httpGet": {}, "tcpSocket": {}}), "spec.versions[0].readinessProbe: "),
        (
            "/versions/0/readinessProbe",
            json!({"tcpSocket": {}, "periodSeconds": 1, "periodMillis": 1}),
            "expected either periodSeconds or periodMillis",
        ),
        (
            "/versions/0/readinessProbe",
            json!({"exec": {"command": []}}),
            "spec.versions[0].readinessProbe.exec.command: [] is not allowed",
        ),
        (
            "/versions/0/readinessProbe/periodSeconds",
            json!(0),
            "spec.versions[0].readinessProbe.periodSeconds: 0 is not",
        ),
        (
            "/versions/0/readinessProbe",
            json!({"grpc": {"port": 0, "service": "a"}}),
            "spec.versions[0].readinessProbe.grpc.port: 0 is not allowed; expected an integer from 1 to 65535",
        ),
        ("/versions/0/readinessProbe/httpGet/path", json!("health"), "spec.versions[0].readinessProbe.httpGet.path: "),
        ("/versions/0/readinessProbe/httpGet/host", json!("a_b"), "spec.versions[0].readinessProbe.httpGet.host: "),
        (
            "/versions/0/readinessProbe/httpGet/scheme",
            json!("https"),
            "spec.versions[0].readinessProbe.httpGet.scheme: ",
        ),
        (
            "/versions/0/readinessProbe/faliureThreshold",
            json!(3),
            "spec.versions[0].readinessProbe.faliureThreshold: unknown field; did you mean `failureThreshold`?",
        ),
        // Rules.
        ("/rules", json!([{"versions": [{"name": "v3"}]}]), "spec.rules[0].versions[0].name: \"v3\" is not allowed"),
        ("/rules", json!([{"versions": []}]), "spec.rules[0].versions: [] is not allowed; expected 1 to 1000 versions"),
        (
            "/rules",
            json!([{"versions": [{"name": "v1"}, {"name": "v1"}]}]),
            "spec.rules[0].versions[1].name: \"v1\" is not allowed",
        ),
        (
            "/rules",
            json!([{"versions": [{"name": "v1", "weight": 1_000_001}]}]),
            "spec.rules[0].versions[0].weight: 1000001 is not allowed",
        ),
        (
            "/rules",
            json!([{"name": "a", "versions": [{"name": "v1"}]}, {"name": "a", "versions": [{"name": "v1"}]}]),
            "spec.rules[1].name: \"a\" is not allowed; expected a rule name that no other rule here has",
        ),
        (
            "/rules",
            json!([{"versions": [{"name": "v1"}], "mirror": {"version": "v3"}}]),
            "spec.rules[0].mirror.version: \"v3\" is not allowed",
        ),
        ("/rules", rule(json!({"headers": [{"name": "X-Tideshift-Version", "value": "a"}]})), "headers[0].name: "),
        (
            "/rules",
            rule(json!({"headers": [{"name": "a b", "value": "a"}]})),
            "headers[0].name: \"a b\" is not allowed",
        ),
        ("/rules", rule(json!({"headers": [{"name": "a"}]})), "headers[0].value: missing"),
        (
            "/rules",
            rule(json!({"cookies": [{"name": "a", "type": "Present", "value": ""}]})),
            "cookies[0].value: \"\" is not allowed; expected no value when type is Present",
        ),
        (
            "/rules",
            rule(json!({"queryParams": [{"name": "", "value": "a"}]})),
            "queryParams[0].name: \"\" is not allowed",
        ),
        (
            "/rules",
            rule(json!({"queryParams": [{"name": "a", "type": "Suffix", "value": "a"}]})),
            "queryParams[0].type: \"Suffix\" is not allowed",
        ),
        ("/rules", rule(json!({"path": {"value": "cart"}})), "path.value: \"cart\" is not allowed"),
        (
            "/rules",
            rule(json!({"path": {"type": "Exact", "value": "/cart?a"}})),
            "path.value: \"/cart?a\" is not allowed",
        ),
        ("/rules", rule(json!({"path": {"type": "Exact"}})), "path.value: missing"),
        ("/rules", rule(json!({"method": "get"})), "method: \"get\" is not allowed; expected a method in upper case"),
        // Sessions, errors, mirrors, the guard.
        ("/session", json!({"type": "Cookie"}), "spec.session.name: missing; expected a cookie's name"),
        ("/session", json!({"type": "Cookie", "name": "a b"}), "spec.session.name: \"a b\" is not allowed"),
        ("/session", json!({"type": "Cookie", "name": "a", "ttlSeconds": 0}), "spec.session.ttlSeconds: 0 is not"),
        ("/session", json!({"type": "Header", "name": "a", "ttlSeconds": 5}), "spec.session.ttlSeconds: unknown field"),
        ("/session", json!({"type": "Header", "name": "X-Tideshift-A"}), "spec.session.name: \"X-Tideshift-A\" is not"),
        ("/session", json!({"type": "Header", "name": "a", "secret": ""}), "spec.session.secret: \"…\" is not allowed"),
        (
            "/session",
            json!({"type": "Cookie", "name": "a", "secret": "b", "secretRef": {"name": "a", "key": "b"}}),
            "spec.session.secretRef: \"…\" is not allowed; expected either secret or secretRef",
        ),
        (
            "/session",
            json!({"type": "Cookie", "name": "a", "secretRef": {"name": "a", "key": "../b"}}),
            "spec.session.secretRef.key: \"../b\" is not allowed; expected a key of a Secret",
        ),
        (
            "/session",
            json!({"type": "Cookie", "name": "a", "previousSecrets": ["b"]}),
            "spec.session.previousSecrets: unknown field",
        ),
        ("/session", json!({"type": "Header", "name": "a", "generation": -1}), "spec.session.generation: -1 is not"),
        ("/errors", json!({"statusCodes": ["5xx"]}), "spec.errors.statusCodes[0]: \"5xx\" is not allowed"),
        ("/errors", json!({"statusCodes": [99]}), "spec.errors.statusCodes[0]: 99 is not allowed"),
        ("/errors", json!({"statusCodes": ["599-500"]}), "spec.errors.statusCodes[0]: \"599-500\" is not allowed"),
        ("/errors", json!({"grpcStatusCodes": [0]}), "spec.errors.grpcStatusCodes[0]: 0 is not allowed"),
        (
            "/mirror",
            json!({"version": "v9"}),
            "spec.mirror.version: \"v9\" is not allowed; expected one of the versions",
        ),
        ("/mirror", json!({"version": "v2", "percent": 101}), "spec.mirror.percent: 101 is not allowed"),
        (
            "/guard",
            json!({"coolDownSeconds": 30, "maxCoolDownSeconds": 20}),
            "spec.guard.maxCoolDownSeconds: 20 is not",
        ),
        ("/guard", json!({"maxCoolDownSeconds": 9}), "spec.guard.maxCoolDownSeconds: 9 is not allowed"),
        ("/guard", json!({"falseVetoRate": 0.1}), "spec.guard.falseVetoRate: 0.1 is not allowed"),
        // The analysis.
        ("/analysis", json!({"maxErrors": -1}), "spec.analysis.maxErrors: -1 is not allowed"),
        ("/analysis", json!({"maxErrorRate": "2%"}), "spec.analysis.maxErrorRate: \"2%\" is not allowed"),
        ("/analysis", json!({"passConfidence": 95}), "spec.analysis.passConfidence: 95 is not allowed"),
        ("/analysis", json!({"latency": {"quantiles": []}}), "spec.analysis.latency.quantiles: [] is not allowed"),
        ("/analysis", json!({"latency": {"quantiles": [99]}}), "spec.analysis.latency.quantiles[0]: 99 is not allowed"),
        // The strategy.
        (
            "/strategy",
            json!({"steps": [{"weight": 101}]}),
            "spec.strategy.steps[0].weight: 101 is not allowed; expected an integer from 0 to 100",
        ),
        ("/strategy", json!({"steps": [{"holdSeconds": 1}]}), "spec.strategy.steps[0].weight: missing"),
        ("/strategy", json!({"steps": [{"pause": false}]}), "spec.strategy.steps[0].weight: missing"),
        ("/strategy", json!({"steps": []}), "spec.strategy.steps: [] is not allowed; expected at least one step"),
        (
            "/strategy",
            json!({"steps": [{"weight": 1, "pause": "yes"}]}),
            "spec.strategy.steps[0].pause: \"yes\" is not",
        ),
        ("/strategy", json!({"steps": [{"weight": 1}], "blueGreen": {}}), "expected either steps or blueGreen"),
        (
            "/strategy",
            json!({"maxSurge": 0, "maxUnavailable": "0%"}),
            "spec.strategy.maxUnavailable: 0 is not allowed; expected above 0",
        ),
        (
            "/strategy",
            json!({"maxSurge": "25"}),
            "spec.strategy.maxSurge: \"25\" is not allowed; expected a number such as 1",
        ),
        ("/strategy", json!({"maxSurge": "+25%"}), "spec.strategy.maxSurge: \"+25%\" is not allowed"),
        ("/strategy", json!({"maxSurge": "1001%"}), "spec.strategy.maxSurge: \"1001%\" is not allowed"),
        ("/strategy", json!({"maxSurge": true}), "spec.strategy.maxSurge: true is not allowed"),
        (
            "/strategy",
            json!({"maxUnavailable": "101%"}),
            "spec.strategy.maxUnavailable: \"101%\" is not allowed; expected no more than 100%",
        ),
        ("/strategy", json!({"maxUnavailable": -1}), "spec.strategy.maxUnavailable: -1 is not allowed"),
        (
            "/strategy",
            json!({"minReadySeconds": 600}),
            "spec.strategy.progressDeadlineSeconds: 600 is not allowed; expected more than",
        ),
        (
            "/strategy",
            json!({"progressDeadlineSeconds": 0, "minReadySeconds": null}),
            "progressDeadlineSeconds: 0 is not",
        ),
        (
            "/strategy",
            json!({"warmUp": {"seconds": 1, "mirrorPercent": 0}}),
            "spec.strategy.warmUp.mirrorPercent: 0 is not",
        ),
        ("/strategy", json!({"warmUp": {"mirrorPercent": 5}}), "spec.strategy.warmUp.seconds: missing"),
        (
            "/strategy",
            requests("counts", json!(1)),
            "spec.strategy.warmUp.requests.counts: unknown field; did you mean `count`?",
        ),
        ("/strategy", requests("count", json!(0)), "spec.strategy.warmUp.requests.count: 0 is not allowed"),
        ("/strategy", requests("paths", json!([])), "spec.strategy.warmUp.requests.paths: [] is not allowed"),
        ("/strategy", requests("method", json!("POST")), "spec.strategy.warmUp.requests.method: \"POST\" is not"),
        ("/strategy", requests("statusCodes", json!([])), "spec.strategy.warmUp.requests.statusCodes: [] is not"),
        (
            "/strategy",
            requests("statusCodes", json!(["300-200"])),
            "requests.statusCodes[0]: \"300-200\" is not allowed",
        ),
        (
            "/strategy",
            requests("headers", json!([{"name": "a b", "value": ""}])),
            "requests.headers[0].name: \"a b\" is",
        ),
        // Webhooks.
        ("/webhooks", webhook("url", json!("ftp://example.com")), "spec.webhooks[0].url: \"ftp://example.com\" is not"),
        ("/webhooks", webhook("url", json!("https://user:word@example.com/")), "spec.webhooks[0].url: "),
        ("/webhooks", webhook("url", json!("http://a/#b")), "spec.webhooks[0].url: \"http://a/#b\" is not allowed"),
        ("/webhooks", webhook("type", json!("Hook")), "spec.webhooks[0].type: \"Hook\" is not allowed"),
        ("/webhooks", webhook("steps", json!([])), "spec.webhooks[0].steps: [] is not allowed"),
        ("/webhooks", webhook("steps", json!([0])), "spec.webhooks[0].steps[0]: 0 is not allowed"),
        ("/webhooks", webhook("timeoutSeconds", json!(301)), "spec.webhooks[0].timeoutSeconds: 301 is not allowed"),
        ("/webhooks", webhook("retries", json!(3)), "spec.webhooks[0].retries: unknown field"),
        ("/webhooks", webhook("phases", json!(["Failed"])), "spec.webhooks[0].phases: unknown field"),
        (
            "/webhooks",
            json!([{"name": "a", "type": "Notification", "url": "http://a", "periodSeconds": 1}]),
            "spec.webhooks[0].periodSeconds: unknown field",
        ),
        (
            "/webhooks",
            json!([{"name": "a", "type": "Notification", "url": "http://a", "phases": ["Done"]}]),
            "spec.webhooks[0].phases[0]: \"Done\" is not allowed",
        ),
        (
            "/webhooks",
            json!([{"name": "a", "type": "Gate"}]),
            "spec.webhooks[0].url: missing; expected an http or https",
        ),
        (
            "/webhooks",
            webhook("urlSecretRef", json!({"name": "a", "key": "b"})),
            "spec.webhooks[0].urlSecretRef: \"…\" is not allowed; expected either url or urlSecretRef",
        ),
        (
            "/webhooks",
            webhook("secretRef", json!({"name": "a"})),
            "spec.webhooks[0].secretRef.key: missing; expected a key of the Secret",
        ),
        ("/webhooks", both_secrets, "spec.webhooks[0].secretFile: \"…\" is not allowed; expected one of secret,"),
        ("/webhooks", json!([gate.clone(), gate]), "spec.webhooks[1].name: \"a\" is not allowed"),
    ];
    let several = [
        ("/services/1/name", json!("cart"), "spec.services[1].name: \"cart\" is not allowed"),
        ("/services/1/versions", json!([{"name": "new"}]), "expected the versions of the first service"),
        (
            "/services/1/versions",
            json!([{"name": "old"}, {"name": "newer"}]),
            "spec.services[1].versions: [\"newer\",\"old\"] is not allowed; expected the versions",
        ),
        (
            "/services/1/versions",
            json!([]),
            "spec.services[1].versions: [] is not allowed; expected 1 to 1000 versions",
        ),
        (
            "/services/0/rules",
            json!([{"versions": [{"name": "v3"}]}]),
            "rules[0].versions[0].name: \"v3\" is not allowed",
        ),
        ("/services/0/mirror", json!({"version": "v3"}), "spec.services[0].mirror.version: \"v3\" is not allowed"),
        ("/versions", json!([{"name": "old"}]), "spec.versions: unknown field"),
        ("/session", json!({"type": "Cookie", "name": "a"}), "spec.session: unknown field"),
        ("/target", json!("newer"), "spec.target: \"newer\" is not allowed; expected one of the versions old, new"),
    ];
    // What numbers there are in addresses, what regular expressions are, what is the same in another letter case.
    let by_the_reader_alone = [
        ("/webhooks", webhook("url", json!("http://a:65536")), "spec.webhooks[0].url: \"http://a:65536\" is not"),
        ("/versions/0/endpoints", json!(["127.0.0.256:80"]), "spec.versions[0].endpoints[0]: "),
        ("/versions/0/endpoints", json!(["127.0.0.1:65536"]), "spec.versions[0].endpoints[0]: "),
        ("/versions/0/endpoints", json!(["[1:2]:80"]), "spec.versions[0].endpoints[0]: \"[1:2]:80\" is not allowed"),
        ("/versions/0/endpoints", json!(["a:1", "A:1"]), "spec.versions[0].endpoints[1]: \"a:1\" is not allowed"),
        (
            "/versions/0/readinessProbe/httpGet/host",
            json!("1:2"),
            "readinessProbe.httpGet.host: \"1:2\" is not allowed",
        ),
        (
            "/rules",
            rule(json!({"path": {"type": "RegularExpression", "value": "("}})),
            "path.value: \"(\" is not allowed; expected a regular expression",
        ),
    ];
    let refused = |spec: Value, by_the_reader_alone: bool| {
        move |(pointer, value, error): (&str, Value, &'static str)| {
            let document = with(spec.clone(), pointer, value);
            Refused { document, error, by_the_reader_alone }
        }
    };
    let usual = usual.into_iter().map(refused(spec(), false));
    let several = several.into_iter().map(refused(services(), false));
    usual.chain(several).chain(by_the_reader_alone.into_iter().map(refused(spec(), true))).collect()
}
