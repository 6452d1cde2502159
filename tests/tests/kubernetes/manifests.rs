//! The Helm chart and the plain manifests that are made of it agree with each other, with the CRD, with the binary's flags
//! and with what the controller does: under exactly these rules it is forbidden nothing, and it needs all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tideshift_tests::client::{Request, get};
use tideshift_tests::envoy_fixture::DEADLINE;
use tideshift_tests::kubernetes::apiserver::{ApiServer, Attempt};
use tideshift_tests::kubernetes::chart::{Chart, Rendered, ValueRow, readme};
use tideshift_tests::kubernetes::controllers::Controllers;
use tideshift_tests::kubernetes::kubelet::Kubelet;
use tideshift_tests::kubernetes::{client, jwt};
use tideshift_tests::ports::Port;
use tideshift_tests::process::Process;
use tideshift_tests::wait::eventually;
use tideshift_tests::{artifacts, controller};

const NAMESPACE: &str = "tideshift-system";

/// Values that turn on all there is.
fn everything() -> Value {
    json!({
        "replicas": 3,
        "watchNamespaces": ["shop", "store"],
        "documentSecrets": [{"namespace": "shop", "names": ["payment-session", "payment-webhooks"]}],
        "proxyTokenAudience": "tideshift",
        "webhookAllow": ["public", "10.0.0.0/8"],
        "tls": {"secret": "tideshift-tls", "clientCa": true},
        "ipv6": true,
        "image": {"digest": format!("sha256:{}", "0123456789abcdef".repeat(4)), "pullSecrets": [{"name": "registry"}]},
        "service": {"annotations": {"example.com/a": "1"}},
        "serviceAccount": {"annotations": {"example.com/b": "2"}},
        "podAnnotations": {"example.com/c": "3"},
        "podLabels": {"team": "traffic"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"mesh": "yes"}}}]},
        "serviceMonitor": {"enabled": true, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": true},
    })
}

fn render(values: &Value) -> anyhow::Result<Vec<Value>> {
    let rendered = Chart::load()?.render("tideshift", NAMESPACE, values, &[])?;
    Ok(rendered.into_iter().map(|Rendered { object, .. }| object).collect())
}

/// With which values the rest is looked at.
fn variants() -> [Value; 3] {
    [json!({}), json!({"name": "other", "tokens": {"existingSecret": "mine"}}), everything()]
}

fn one<'a>(objects: &'a [Value], kind: &str) -> anyhow::Result<&'a Value> {
    let found: Vec<_> = objects.iter().filter(|object| object["kind"] == kind).collect();
    ensure!(found.len() == 1, "{} objects of kind {kind}", found.len());
    Ok(found[0])
}

fn texts(value: &Value) -> BTreeSet<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Whether a selector's labels are among an object's, of which there must be some.
fn selects(labels: &Value, of: &Value) -> bool {
    labels.as_object().is_some_and(|labels| {
        !labels.is_empty() && labels.iter().all(|(key, value)| of["metadata"]["labels"][key] == *value)
    })
}

#[test]
fn what_is_committed_is_what_the_chart_renders() -> anyhow::Result<()> {
    let chart = Chart::load()?;
    let committed = fs::read_to_string(artifacts::workspace().join("envoy-configs/kubernetes/tideshift.yaml"))?;
    ensure!(committed == chart.plain()?, "envoy-configs/kubernetes/tideshift.yaml is old: run `make manifests`");
    let committed = fs::read_to_string(chart.folder().join("README.md"))?;
    ensure!(committed == readme(&chart)?, "the chart's README.md is old: run `make manifests`");
    Ok(())
}

#[test]
fn the_chart_has_no_copies_that_could_be_other_than_the_originals() -> anyhow::Result<()> {
    let chart = Chart::load()?;
    let configs = artifacts::workspace().join("envoy-configs");
    for (copy, original) in
        [("crds/trafficshifts.yaml", "kubernetes/crd.yaml"), ("files/grafana-dashboard.json", "grafana-dashboard.json")]
    {
        let (copy, original) = (chart.folder().join(copy), configs.join(original));
        let same =
            fs::read_to_string(&copy).with_context(|| copy.display().to_string())? == fs::read_to_string(&original)?;
        ensure!(same, "{} is not {}", copy.display(), original.display());
    }
    let objects = render(&everything())?;
    let dashboard = one(&objects, "ConfigMap")?;
    let text = dashboard["data"]["tideshift.json"].as_str().context("no dashboard")?;
    let original: Value = serde_json::from_str(&fs::read_to_string(configs.join("grafana-dashboard.json"))?)?;
    assert_eq!(serde_json::from_str::<Value>(text)?, original);
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
    Ok(())
}

#[test]
fn every_value_is_documented_and_in_the_schema() -> anyhow::Result<()> {
    let chart = Chart::load()?;
    let rows = ValueRow::all(&fs::read_to_string(chart.folder().join("values.yaml"))?);
    for ValueRow { path, comment, .. } in &rows {
        ensure!(!comment.is_empty(), "{path} has no comment");
        let value = path.split('.').fold(chart.values(), |value, part| &value[part]);
        ensure!(!value.is_null(), "{path} is no value");
    }
    let schema: Value = serde_json::from_str(&fs::read_to_string(chart.folder().join("values.schema.json"))?)?;
    let mut in_schema = BTreeSet::new();
    leaves(&schema, "", &mut in_schema);
    // Helm's own.
    in_schema.remove("global");
    assert_eq!(in_schema, rows.into_iter().map(|row| row.path).collect());
    Ok(())
}

/// The paths of everything that a schema knows, where it says what is inside.
fn leaves(schema: &Value, path: &str, all: &mut BTreeSet<String>) {
    match schema["properties"].as_object() {
        Some(properties) => {
            for (name, inner) in properties {
                leaves(inner, &if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, all);
            }
        }
        None => _ = all.insert(path.to_owned()),
    }
}

#[test]
fn tokens_are_random_and_stay_when_the_chart_is_upgraded() -> anyhow::Result<()> {
    let chart = Chart::load()?;
    let secret = |has: &[Value]| -> anyhow::Result<Value> {
        let rendered = chart.render("tideshift", NAMESPACE, &json!({}), has)?;
        let objects: Vec<_> = rendered.into_iter().map(|rendered| rendered.object).collect();
        Ok(one(&objects, "Secret")?.clone())
    };
    let (first, other) = (secret(&[])?, secret(&[])?);
    let tokens = |secret: &Value| ["read", "operate", "proxy"].map(|key| secret["data"][key].to_string());
    let all: BTreeSet<_> = tokens(&first).into_iter().chain(tokens(&other)).collect();
    ensure!(all.len() == 6 && all.iter().all(|token| token.len() > 40), "{all:?}");
    assert_eq!(tokens(&secret(std::slice::from_ref(&first))?), tokens(&first));

    let own = chart.render("tideshift", NAMESPACE, &json!({"tokens": {"existingSecret": "mine"}}), &[])?;
    ensure!(own.iter().all(|rendered| rendered.object["kind"] != "Secret"));
    Ok(())
}

#[test]
fn the_binary_knows_every_flag_and_variable_and_finds_every_file() -> anyhow::Result<()> {
    let help = controller::cli(["serve", "--help"])?.stdout;
    for values in variants() {
        let objects = render(&values)?;
        let pod = &one(&objects, "Deployment")?["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let mut arguments: Vec<_> =
            container["args"].as_array().context("no args")?.iter().filter_map(Value::as_str).collect();
        let mounts: Vec<_> = container["volumeMounts"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|mount| mount["mountPath"].as_str())
            .collect();
        for argument in &arguments {
            let Some((flag, path)) = argument.split_once("=/") else { continue };
            let folder = Path::new(path).parent().and_then(Path::to_str).unwrap_or_default();
            ensure!(mounts.contains(&format!("/{folder}").as_str()), "{flag}: nothing is mounted at /{folder}");
        }
        // The last flag is looked at after all others have been taken.
        arguments.push("--help");
        let taken = controller::cli(&arguments)?;
        ensure!(taken.code == Some(0), "{arguments:?}: {}", taken.stderr);
        let variables = container["env"].as_array().context("no env")?.iter();
        let names: Vec<_> = variables.clone().filter_map(|variable| variable["name"].as_str()).collect();
        for (n, name) in names.iter().enumerate() {
            let used = container["env"].to_string().contains(&format!("$({name})"));
            ensure!(used || help.contains(&format!("[env: {name}=")), "{name} means nothing to the binary");
            // What another variable refers to must come before it.
            let later = names[n..]
                .iter()
                .any(|later| container["env"][n]["value"].to_string().contains(&format!("$({later})")));
            ensure!(!later, "{name} refers to one that comes later");
        }
    }
    Ok(())
}

#[test]
fn everything_refers_to_what_is_there() -> anyhow::Result<()> {
    for values in variants() {
        let objects = render(&values)?;
        let deployment = one(&objects, "Deployment")?;
        let (template, name) = (&deployment["spec"]["template"], &deployment["metadata"]["name"]);
        let (service, policy) = (one(&objects, "Service")?, one(&objects, "NetworkPolicy")?);
        for selector in [
            &deployment["spec"]["selector"]["matchLabels"],
            &service["spec"]["selector"],
            &policy["spec"]["podSelector"]["matchLabels"],
            &one(&objects, "PodDisruptionBudget")?["spec"]["selector"]["matchLabels"],
            &template["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        ] {
            ensure!(selects(selector, template), "{selector} does not select {}", template["metadata"]["labels"]);
        }
        let container = &template["spec"]["containers"][0];
        let port = &container["ports"][0];
        assert_eq!((&port["containerPort"], &service["spec"]["ports"][0]["port"]), (&json!(7460), &json!(7460)));
        for named in [&service["spec"]["ports"][0]["targetPort"], &policy["spec"]["ingress"][0]["ports"][0]["port"]] {
            assert_eq!(named, &port["name"]);
        }
        // The kubelet has a listener of its own, which no client reaches by the Service.
        let health = &container["ports"][1];
        for probe in ["readinessProbe", "livenessProbe"] {
            assert_eq!(container[probe]["httpGet"]["port"], health["name"]);
        }
        let args = container["args"].as_array().context("no args")?;
        let listens = format!(":{}", health["containerPort"]);
        let is_health = |arg: &str| arg.starts_with("--health-listen=") && arg.ends_with(&listens);
        ensure!(args.iter().any(|arg| arg.as_str().is_some_and(is_health)), "{args:?}");
        if let Ok(monitor) = one(&objects, "ServiceMonitor") {
            ensure!(selects(&monitor["spec"]["selector"]["matchLabels"], service));
            let endpoint = &monitor["spec"]["endpoints"][0];
            assert_eq!(endpoint["port"], service["spec"]["ports"][0]["name"]);
            assert_eq!(
                endpoint["authorization"]["credentials"]["name"],
                template["spec"]["volumes"][0]["secret"]["secretName"]
            );
        }
        if let Ok(secret) = one(&objects, "Secret") {
            assert_eq!(secret["metadata"]["name"], template["spec"]["volumes"][0]["secret"]["secretName"]);
        }
        // Followers must reach the leader.
        let from = policy["spec"]["ingress"][0]["from"].as_array();
        let own = |from: &Vec<Value>| from.iter().any(|from| selects(&from["podSelector"]["matchLabels"], template));
        ensure!(from.is_none_or(own), "{from:?}");

        let account = &one(&objects, "ServiceAccount")?["metadata"];
        assert_eq!(template["spec"]["serviceAccountName"], account["name"]);
        let bindings =
            objects.iter().filter(|object| object["kind"].as_str().is_some_and(|kind| kind.ends_with("Binding")));
        for binding in bindings {
            let subject = &binding["subjects"][0];
            assert_eq!((&subject["name"], &subject["namespace"]), (&account["name"], &account["namespace"]));
            let role = |object: &&Value| {
                object["kind"] == binding["roleRef"]["kind"]
                    && object["metadata"]["name"] == binding["roleRef"]["name"]
                    && object["metadata"]["namespace"] == binding["metadata"]["namespace"]
            };
            ensure!(objects.iter().any(|object| role(&object)), "{} is not there", binding["roleRef"]);
        }
        for object in &objects {
            let cluster_wide = object["kind"].as_str().is_some_and(|kind| kind.starts_with("Cluster"));
            ensure!(cluster_wide != object["metadata"]["namespace"].is_string(), "{}", object["metadata"]);
            ensure!(
                object["metadata"]["name"].as_str().unwrap_or_default().starts_with(name.as_str().unwrap_or_default())
            );
        }
        let pod = &template["spec"]["securityContext"];
        let security = &container["securityContext"];
        ensure!(pod["runAsNonRoot"] == true && security["readOnlyRootFilesystem"] == true);
        ensure!(security["capabilities"]["drop"] == json!(["ALL"]) && security["allowPrivilegeEscalation"] == false);
    }
    let notes = Chart::load()?.notes("tideshift", NAMESPACE)?;
    ensure!(notes.contains("tideshift-tokens") && !notes.contains("--controller "), "{notes}");
    Ok(())
}

/// What a role allows, one line each: namespace (`*` for all), group, resource, verb, name (`*` for all).
type Grant = [String; 5];

/// What the chart allows the controller.
fn grants(objects: &[Value]) -> BTreeSet<Grant> {
    let mut grants = BTreeSet::new();
    // The roles for people have no bindings here.
    let is_bound = |role: &Value| {
        objects.iter().any(|object| {
            object["roleRef"]["name"] == role["metadata"]["name"] && object["roleRef"]["kind"] == role["kind"]
        })
    };
    for role in objects.iter().filter(|role| role["rules"].is_array() && is_bound(role)) {
        let namespace = role["metadata"]["namespace"].as_str().unwrap_or("*");
        for rule in role["rules"].as_array().into_iter().flatten() {
            let names = if rule["resourceNames"].is_null() {
                BTreeSet::from(["*".to_owned()])
            } else {
                texts(&rule["resourceNames"])
            };
            for (group, resource) in texts(&rule["apiGroups"])
                .iter()
                .flat_map(|group| texts(&rule["resources"]).into_iter().map(move |resource| (group.clone(), resource)))
            {
                for (verb, name) in
                    texts(&rule["verbs"]).iter().flat_map(|verb| names.iter().map(move |name| (verb, name)))
                {
                    grants.insert([namespace, &group, &resource, verb, name].map(str::to_owned));
                }
            }
        }
    }
    grants
}

fn allows(grant: &Grant, attempt: &Attempt) -> bool {
    let Attempt { verb, group, resource, namespace, name, .. } = attempt;
    let is = |granted: &String, wanted: &String| granted == "*" || granted == wanted;
    let [in_namespace, of_group, of_resource, to, named] = grant;
    is(in_namespace, namespace) && of_group == group && of_resource == resource && to == verb && is(named, name)
}

/// A cluster in which the controller may do what the chart allows, and a note of what it made of that.
struct Cluster {
    server: Arc<ApiServer>,
    _kubelet: Kubelet,
    _controllers: Controllers,
    refused: Arc<Mutex<Vec<Attempt>>>,
}

impl Cluster {
    async fn start(grants: BTreeSet<Grant>) -> anyhow::Result<Self> {
        let server = Arc::new(ApiServer::start().await?);
        let kubelet = Kubelet::start(client(&server.kubeconfig_of("kubelet")?).await?).await?;
        let controllers = Controllers::start(&server);
        let crd = fs::read_to_string(artifacts::workspace().join("envoy-configs/kubernetes/crd.yaml"))?;
        server.create(serde_saphyr::from_str(&crd)?)?;
        let refused = Arc::new(Mutex::new(Vec::new()));
        let note = Arc::clone(&refused);
        server.forbid(move |attempt| {
            let forbidden = attempt.user == "controller" && !grants.iter().any(|grant| allows(grant, attempt));
            if forbidden {
                note.lock().unwrap_or_else(PoisonError::into_inner).push(attempt.clone());
            }
            forbidden
        });
        Ok(Self { server, _kubelet: kubelet, _controllers: controllers, refused })
    }

    /// The controller as the Deployment runs it, but for its address and the place of its tokens.
    async fn controller(&self, deployment: &Value, port: &Port, tokens: &TempDir) -> anyhow::Result<Process> {
        let mut command = Command::new(artifacts::tideshift()?);
        for argument in deployment["spec"]["template"]["spec"]["containers"][0]["args"].as_array().context("no args")? {
            let argument = argument.as_str().context("no text")?;
            command.arg(match argument.split_once('=') {
                Some(("--listen", _)) => format!("--listen={}", port.address()),
                Some(("--health-listen", _)) => "--health-listen=127.0.0.1:0".to_owned(),
                _ => argument.replace("/etc/tideshift/tokens", &tokens.path().to_string_lossy()),
            });
        }
        command.env("KUBECONFIG", self.server.kubeconfig_of("controller")?);
        command.envs([("POD_NAME", "tideshift-0"), ("POD_NAMESPACE", NAMESPACE)]);
        let mut process = Process::start("the controller", command, &tokens.path().join("log"))?;
        let ready = process.until_ready(DEADLINE, async || {
            let ready = get(port.address(), "/readyz").send().await?;
            ensure!(ready.status == 200, "/readyz says {}", ready.status);
            Ok(())
        });
        ready.await?;
        Ok(process)
    }
}

fn workload(name: &str, version: &str, replicas: usize) -> Value {
    let labels = json!({"app": "payment", "version": version});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "main", "image": "main:1", "ports": [{"name": "http", "containerPort": 80}]}]},
            },
        },
    })
}

/// A whole rollout with workloads, an autoscaler and a budget, and a restart; every right must be needed by it.
async fn goes_through_a_rollout(values: Value) -> anyhow::Result<()> {
    let objects = render(&values)?;
    let grants = grants(&objects);
    let cluster = Cluster::start(grants.clone()).await?;
    let server = &cluster.server;
    server.create(workload("payment-v1", "v1", 2))?;
    server.create(workload("payment-v2", "v2", 0))?;
    server.create(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "payment", "namespace": "shop"},
        "spec": {"selector": {"app": "payment"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }))?;
    server.create(json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "payment-v1", "namespace": "shop"},
        "spec": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "payment-v1"}, "minReplicas": 1, "maxReplicas": 5},
    }))?;
    server.create(json!({
        "apiVersion": "v1", "kind": "Secret", "stringData": {"key": "0123456789abcdef"},
        "metadata": {"name": "payment-session", "namespace": "shop", "labels": {"tideshift.dev/use": "session"}},
    }))?;
    let version = |name: &str| {
        let labels = json!({"matchLabels": {"app": "payment", "version": name}});
        json!({"name": name, "selector": labels, "workloadRef": {"name": format!("payment-{name}")}})
    };
    server.create(json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "payment", "namespace": "shop"},
        "spec": {
            "versions": [version("v1"), version("v2")], "stable": "v1", "target": "v2", "onDelete": "Drain",
            "session": {"type": "Cookie", "name": "c", "secretRef": {"name": "payment-session", "key": "key"}},
            "strategy": {"steps": [{"pause": true}, {"weight": 100}], "scaleDownDelaySeconds": 0},
        },
    }))?;

    let (port, folder) = (Port::reserve()?, tempfile::tempdir()?);
    for token in ["read", "operate", "proxy"] {
        fs::write(folder.path().join(token), format!("{token}-0123456789abcdef"))?;
    }
    let deployment = one(&objects, "Deployment")?;
    let mut controller = cluster.controller(deployment, &port, &folder).await?;
    let say = async |verb: &str, body: &str| -> anyhow::Result<()> {
        let request = Request::new(port.address(), "POST", &format!("/v1/rollouts/payment.shop/{verb}"));
        let request = request
            .header("authorization", "Bearer operate-0123456789abcdef")
            .header("content-type", "application/json")
            .body(body);
        let answer = request.send().await?;
        ensure!(answer.status == 200, "{verb}: {}", answer.text());
        Ok(())
    };
    let until = async |phase: &'static str| {
        let is = |shift: &Value| {
            ensure!(shift["status"]["phase"] == phase, "{}", shift["status"]);
            Ok(())
        };
        server.until(phase, "trafficshifts.tideshift.dev", "shop", "payment", is).await
    };
    until("Paused").await?;
    if grants.iter().any(|grant| grant[2] == "tokenreviews") {
        let token = jwt("proxy", "tideshift");
        let policy = get(port.address(), "/v1/policy?proxy=a&epoch=&after=0");
        let policy = policy.header("authorization", format!("Bearer {token}"));
        server.token(&token, "system:serviceaccount:shop:proxy", &["tideshift"]);
        assert_eq!(policy.send().await?.status, 200);
    }
    // A leader that ends gives the Lease back; the next one takes over what it knew.
    controller.terminate(DEADLINE).await?;
    let _controller = cluster.controller(deployment, &port, &folder).await?;
    eventually("the next one to lead", DEADLINE, async || say("resume", "{}").await).await?;
    // No proxy is there to measure the last step.
    say("promote", r#"{"full": true}"#).await?;
    until("Succeeded").await?;
    let refused = cluster.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(refused.is_empty(), "the chart lacks {refused:#?}");
    eventually("every right to be used", DEADLINE, async || {
        let seen: Vec<Attempt> = server.requests().into_iter().map(|seen| seen.attempt).collect();
        let needed = |grant: &&Grant| seen.iter().any(|attempt| attempt.user == "controller" && allows(grant, attempt));
        let unused: BTreeMap<_, _> =
            grants.iter().filter(|grant| !needed(grant)).map(|grant| (grant[2].clone(), grant)).collect();
        ensure!(unused.is_empty(), "unused: {unused:#?}");
        Ok(())
    })
    .await
}

/// Of workloads, only the kind that the test has.
fn deployments_alone(mut values: Value) -> Value {
    values["workloads"] = json!([{"apiGroup": "apps", "resources": ["deployments"]}]);
    values["documentSecrets"] = json!([{"namespace": "shop", "names": ["payment-session"]}]);
    values
}

#[tokio::test]
async fn the_controller_needs_all_that_it_is_allowed_and_no_more() -> anyhow::Result<()> {
    goes_through_a_rollout(deployments_alone(json!({"proxyTokenAudience": "tideshift"}))).await
}

#[tokio::test]
async fn the_same_in_one_namespace_without_a_cluster_role() -> anyhow::Result<()> {
    let values = deployments_alone(json!({"watchNamespaces": ["shop"]}));
    ensure!(grants(&render(&values)?).iter().all(|[namespace, ..]| namespace != "*"));
    goes_through_a_rollout(values).await
}

#[test]
fn the_examples_are_valid_and_call_the_binary_as_it_is() -> anyhow::Result<()> {
    let folder = artifacts::workspace().join("envoy-configs/kubernetes");
    for name in ["payment.yaml", "payment-plain-envoy.yaml", "new-cluster.yaml"] {
        let valid = controller::cli(["validate".as_ref(), "-f".as_ref(), folder.join(name).as_os_str()])?;
        ensure!(valid.code == Some(0), "{}", valid.stderr);
    }
    let read = |name: &str| -> anyhow::Result<Vec<Value>> {
        serde_saphyr::from_multiple(&fs::read_to_string(folder.join(name))?).with_context(|| name.to_owned())
    };
    let patch = &read("prestop.yaml")?[0]["spec"]["template"]["spec"];
    let hook = &patch["containers"][0]["lifecycle"]["preStop"]["exec"]["command"];
    let mut arguments: Vec<_> =
        hook.as_array().context("no command")?.iter().skip(1).filter_map(Value::as_str).collect();
    arguments.push("--help");
    let taken = controller::cli(&arguments)?;
    ensure!(taken.code == Some(0), "{arguments:?}: {}", taken.stderr);
    assert_eq!(patch["initContainers"][0]["args"][0], "install");

    // In other clusters there are no TrafficShifts, and nothing is told; and there are rights in named namespaces alone.
    let own = |grant: &Grant| grant[0] == "shop" && !["tideshift.dev", "events.k8s.io"].contains(&grant[1].as_str());
    let here: BTreeSet<_> = grants(&render(&json!({"watchNamespaces": ["shop"]}))?).into_iter().filter(own).collect();
    assert_eq!(grants(&read("remote-cluster.yaml")?), here);
    Ok(())
}
