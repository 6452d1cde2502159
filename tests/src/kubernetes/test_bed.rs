//! The fixture of end-to-end tests in a cluster: a namespace with versions, the controller's replicas, and a proxy.
//!
//! The cluster is the tests' own [`ApiServer`] with its stand-ins, or a real one, whose kubeconfig file is in
//! [`KUBECONFIG`]. Pods have addresses to which no traffic must be sent; the proxy sends its requests to backends with
//! the versions' names on loopback, by weights that follow from the pods.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::{env, fs, process, thread};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Node, ServiceAccount};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime;
use tokio::sync::oneshot;

use crate::backend::Backend;
use crate::client::get;
use crate::controller::Controller;
use crate::envoy::Envoy;
use crate::kubernetes::apiserver::ApiServer;
use crate::kubernetes::client;
use crate::kubernetes::controllers::Controllers;
use crate::kubernetes::kubelet::{Kubelet, NODE};
use crate::load::{Load, Plan, Tally};
use crate::ports::Port;
use crate::test_bed::{CONNECTIONS, DEADLINE, OUTCOMES, counts_of, render};
use crate::wait::eventually;
use crate::{artifacts, envoy};

/// The environment variable with the path of a real cluster's kubeconfig.
pub const KUBECONFIG: &str = "TIDESHIFT_TEST_KUBECONFIG";
/// The hostname of [`shift`]s.
pub const HOST: &str = "payment.example.com";

/// The API of each kind that tests use.
const KINDS: [(&str, &str); 12] = [
    ("TrafficShift", "tideshift.dev/v1alpha1"),
    ("Deployment", "apps/v1"),
    ("Pod", "v1"),
    ("Service", "v1"),
    ("Secret", "v1"),
    ("Namespace", "v1"),
    ("ServiceAccount", "v1"),
    ("Event", "events.k8s.io/v1"),
    ("EndpointSlice", "discovery.k8s.io/v1"),
    ("Lease", "coordination.k8s.io/v1"),
    ("HorizontalPodAutoscaler", "autoscaling/v2"),
    ("PodDisruptionBudget", "policy/v1"),
];

/// A namespace of a cluster. Dropping it deletes the namespace in a real cluster; the CRD stays, because others may
/// have TrafficShifts.
pub struct Cluster {
    /// The client of the cluster's administrator.
    pub client: Client,
    /// The unique name of the namespace.
    pub namespace: String,
    kubeconfig: PathBuf,
    own: Option<StandIn>,
}

struct StandIn {
    server: ApiServer,
    _kubelet: Kubelet,
    _controllers: Controllers,
}

impl Cluster {
    /// A namespace of the real cluster if the environment names one, otherwise of a [stand-in](Self::stand_in).
    pub async fn start() -> anyhow::Result<Self> {
        let Some(path) = env::var_os(KUBECONFIG) else { return Self::stand_in().await };
        let kubeconfig = PathBuf::from(path);
        let client = client(&kubeconfig).await?;
        take_kubelet(&client, &kubeconfig).await?;
        let cluster = Self { client, namespace: unique_name(), kubeconfig, own: None };
        cluster.apply(json!({ "kind": "Namespace", "metadata": { "name": cluster.namespace } })).await?;
        cluster.install().await?;
        Ok(cluster)
    }

    /// A stand-in cluster of the test's own.
    pub async fn stand_in() -> anyhow::Result<Self> {
        let cluster = Self::stand_in_without_crd().await?;
        cluster.install().await?;
        Ok(cluster)
    }

    /// The same without the CRD.
    pub async fn stand_in_without_crd() -> anyhow::Result<Self> {
        let server = ApiServer::start().await?;
        let kubeconfig = server.kubeconfig()?;
        let kubelet = Kubelet::start(client(&server.kubeconfig_of("kubelet")?).await?).await?;
        let controllers = Controllers::start(&server);
        let own = Some(StandIn { server, _kubelet: kubelet, _controllers: controllers });
        Ok(Self { client: client(&kubeconfig).await?, namespace: unique_name(), kubeconfig, own })
    }

    /// Applies the CRD and waits until the cluster serves it.
    pub async fn install(&self) -> anyhow::Result<()> {
        self.apply(crd()?).await?;
        eventually("the CRD to be served", DEADLINE, async || {
            self.api("TrafficShift").list(&ListParams::default()).await.map(drop).map_err(Into::into)
        })
        .await
    }

    /// The server of a stand-in cluster.
    pub fn server(&self) -> &ApiServer {
        &self.own.as_ref().expect("the cluster is real").server
    }

    /// Whether pods follow their annotations.
    pub fn obeys_annotations(&self) -> bool {
        self.own.is_some() || kubelet().running.is_some()
    }

    /// Starts a replica of the controller for this namespace; in a stand-in cluster as the user with its name.
    pub async fn replica(&self, name: &str, further: &[&str]) -> anyhow::Result<Controller> {
        self.replica_on(Port::reserve()?, name, further).await
    }

    /// The same on a port that was reserved earlier.
    pub async fn replica_on(&self, port: Port, name: &str, further: &[&str]) -> anyhow::Result<Controller> {
        let kubeconfig = match &self.own {
            Some(own) => own.server.kubeconfig_of(name)?,
            None => self.kubeconfig.clone(),
        };
        let namespace = self.namespace.as_str();
        let kubeconfig = kubeconfig.to_str().context("a path that is not UTF-8")?;
        let arguments = ["--kubernetes", "--kubeconfig", kubeconfig, "--pod-name", name, "--pod-namespace", namespace];
        let arguments = [&arguments[..], &["--watch-namespace", namespace], further].concat();
        Controller::start_on(port, &[], &arguments).await
    }

    /// The name of a rollout and its service in policies and in the API.
    pub fn full_name(&self, name: &str) -> String {
        format!("{name}.{}", self.namespace)
    }

    /// The objects of a kind in this namespace.
    pub fn api(&self, kind: &str) -> Api<DynamicObject> {
        self.api_in(kind, &self.namespace)
    }

    fn api_in(&self, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let (_, version) = KINDS.iter().find(|(known, _)| *known == kind).copied().unwrap_or((kind, "v1"));
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        match kind {
            "Namespace" => Api::all_with(self.client.clone(), &resource),
            _ => Api::namespaced_with(self.client.clone(), namespace, &resource),
        }
    }

    /// Applies an object; `apiVersion` and `namespace` are filled in if missing.
    pub async fn apply(&self, mut object: Value) -> anyhow::Result<()> {
        let kind = object["kind"].as_str().context("no kind")?.to_owned();
        let name = object["metadata"]["name"].as_str().context("no name")?.to_owned();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or(&self.namespace).to_owned();
        let params = PatchParams::apply("tideshift-tests").force();
        if kind == "CustomResourceDefinition" {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("apiextensions.k8s.io", "v1", &kind));
            let all: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
            all.patch(&name, &params, &Patch::Apply(&object)).await?;
            return Ok(());
        }
        if let Some((_, version)) = KINDS.iter().find(|(known, _)| *known == kind) {
            object["apiVersion"] = json!(version);
        }
        if kind != "Namespace" {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let applied = self.api_in(&kind, &namespace).patch(&name, &params, &Patch::Apply(&object)).await;
        applied.map(drop).with_context(|| format!("cannot apply {kind} {name}"))
    }

    /// Reads an object.
    pub async fn get(&self, kind: &str, name: &str) -> anyhow::Result<Value> {
        let object = self.api(kind).get(name).await.with_context(|| format!("{kind} {name}"))?;
        Ok(serde_json::to_value(object)?)
    }

    /// All objects of a kind.
    pub async fn list(&self, kind: &str) -> anyhow::Result<Vec<Value>> {
        let list = self.api(kind).list(&ListParams::default()).await?;
        Ok(list.items.into_iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
    }

    /// Changes an object with a merge patch.
    pub async fn patch(&self, kind: &str, name: &str, patch: Value) -> anyhow::Result<()> {
        self.api(kind).patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Deletes an object.
    pub async fn delete(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        self.api(kind).delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Waits until `holds` accepts an object.
    pub async fn until(
        &self,
        what: &str,
        kind: &str,
        name: &str,
        holds: impl Fn(&Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<Value> {
        eventually(what, DEADLINE, async || {
            let object = self.get(kind, name).await?;
            holds(&object)
                .with_context(|| json!({ "spec": object["spec"], "status": object["status"] }).to_string())?;
            Ok(object)
        })
        .await
    }

    /// Deploys a version with pods `app: APP`, `version: VERSION`, named `APP-VERSION`, and waits until they are ready.
    pub async fn deploy(&self, app: &str, version: &str, replicas: u32) -> anyhow::Result<()> {
        let labels = json!({ "app": app, "version": version });
        let probe = json!({ "httpGet": { "path": "/", "port": "http" }, "periodSeconds": 1 });
        let container = json!({
            "name": "main",
            "image": env::var("TIDESHIFT_TEST_IMAGE").unwrap_or_else(|_| "nginx:stable".to_owned()),
            "ports": [{ "name": "http", "containerPort": 80 }],
            "readinessProbe": probe,
        });
        let name = format!("{app}-{version}");
        self.apply(json!({
            "kind": "Deployment",
            "metadata": { "name": name },
            "spec": {
                "replicas": replicas,
                "selector": { "matchLabels": labels },
                "template": { "metadata": { "labels": labels }, "spec": { "containers": [container] } },
            },
        }))
        .await?;
        let ready = |deployment: &Value| {
            let ready = deployment["status"]["readyReplicas"].as_u64().unwrap_or_default();
            ensure!(ready == u64::from(replicas), "{ready} are ready");
            Ok(())
        };
        self.until(&format!("{replicas} ready pods"), "Deployment", &name, ready).await.map(drop)
    }

    /// Creates a Service for all pods `app: APP`.
    pub async fn expose(&self, app: &str) -> anyhow::Result<()> {
        let ports = json!([{ "name": "http", "port": 80, "targetPort": "http" }]);
        let spec = json!({ "selector": { "app": app }, "ports": ports });
        self.apply(json!({ "kind": "Service", "metadata": { "name": app }, "spec": spec })).await
    }

    /// Creates a slice of a Service with this many endpoints, of which this many are ready. It needs no Service and no
    /// pods.
    pub async fn slice(&self, service: &str, listed: u8, ready: u8) -> anyhow::Result<()> {
        self.apply(slice(service, listed, ready)).await
    }

    /// A token of a ServiceAccount for an audience.
    pub async fn token(&self, account: &str, audience: &str) -> anyhow::Result<String> {
        if let Some(own) = &self.own {
            let token = crate::kubernetes::jwt(account, audience);
            let username = format!("system:serviceaccount:{}:{account}", self.namespace);
            own.server.token(&token, &username, &[audience]);
            return Ok(token);
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace);
        let spec = TokenRequestSpec { audiences: Some(vec![audience.to_owned()]), ..TokenRequestSpec::default() };
        let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await?;
        answer.status.and_then(|status| status.token).context("no token")
    }

    /// The reasons of the Events about a TrafficShift.
    pub async fn events(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let events = self.list("Event").await?;
        let about = events.iter().filter(|event| event["regarding"]["name"] == name);
        Ok(about.filter_map(|event| event["reason"].as_str().map(ToOwned::to_owned)).collect())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.own.is_some() {
            return;
        }
        let (kubeconfig, namespace) = (self.kubeconfig.clone(), self.namespace.clone());
        let cleaned = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = client(&kubeconfig).await?;
                let namespaces: Api<Namespace> = Api::all(client.clone());
                namespaces.delete(&namespace, &DeleteParams::default()).await?;
                let gone = eventually("the namespace to be gone", DEADLINE, async || {
                    ensure!(namespaces.get_opt(&namespace).await?.is_none(), "it is still there");
                    Ok(())
                });
                let gone = gone.await;
                give_kubelet_back(client).await.and(gone)
            })
        });
        if let Ok(Err(error)) = cleaned.join() {
            eprintln!("namespace {} is left behind: {error:#}", self.namespace);
        }
    }
}

fn unique_name() -> String {
    static MADE: AtomicU32 = AtomicU32::new(0);
    format!("ts-{:x}-{}-{:04x}", process::id(), MADE.fetch_add(1, Ordering::Relaxed), fastrand::u16(..))
}

/// The CRD as users apply it.
pub fn crd() -> anyhow::Result<Value> {
    let path = artifacts::workspace().join("envoy-configs/kubernetes/crd.yaml");
    serde_saphyr::from_str(&fs::read_to_string(&path)?).with_context(|| path.display().to_string())
}

/// The stand-in for the kubelet in the real cluster, shared by all tests of this process.
#[derive(Default)]
struct SharedKubelet {
    users: usize,
    /// Dropping it ends the stand-in; `None` if the cluster has nodes that run pods.
    running: Option<oneshot::Sender<()>>,
}

static KUBELET: Mutex<SharedKubelet> = Mutex::new(SharedKubelet { users: 0, running: None });

fn kubelet() -> MutexGuard<'static, SharedKubelet> {
    KUBELET.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the stand-in for the kubelet if no node is ready to run pods.
async fn take_kubelet(client: &Client, kubeconfig: &Path) -> anyhow::Result<()> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let is_ready = |node: &Node| {
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        node.name_any() != NODE && conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True")
    };
    let is_needed = !nodes.items.iter().any(is_ready);
    let mut shared = kubelet();
    if is_needed && shared.users == 0 {
        let (stop, stopped) = oneshot::channel();
        let (started, has_started) = mpsc::channel();
        let kubeconfig = kubeconfig.to_owned();
        // It must outlive the runtime of each test.
        thread::spawn(move || -> anyhow::Result<()> {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let _kubelet = Kubelet::start(crate::kubernetes::client(&kubeconfig).await?).await?;
                let _ = started.send(());
                let _ = stopped.await;
                Ok(())
            })
        });
        has_started.recv().context("the stand-in for kubelet does not start")?;
        shared.running = Some(stop);
    }
    shared.users += 1;
    Ok(())
}

/// Ends it and removes its node, if no other test needs it.
async fn give_kubelet_back(client: Client) -> anyhow::Result<()> {
    let is_last = {
        let mut shared = kubelet();
        shared.users -= 1;
        shared.users == 0 && shared.running.take().is_some()
    };
    if is_last {
        Api::<Node>::all(client).delete(NODE, &DeleteParams::default()).await?;
    }
    Ok(())
}

/// A TrafficShift for [`HOST`] with versions v1 and v2 in the Services `NAME-v1` and `NAME-v2`, starting from v1.
/// `fields` override those of `spec`.
pub fn shift(name: &str, fields: Value) -> Value {
    let version = |version: &str| json!({ "name": version, "service": format!("{name}-{version}") });
    let mut spec = json!({ "hostnames": [HOST], "versions": [version("v1"), version("v2")], "stable": "v1" });
    if let (Some(spec), Value::Object(fields)) = (spec.as_object_mut(), fields) {
        spec.extend(fields);
    }
    json!({ "kind": "TrafficShift", "metadata": { "name": name }, "spec": spec })
}

/// The fields of [`shift`] that move this percentage to v2 and hold it there.
pub fn hold_at(weight: u32) -> Value {
    json!({ "target": "v2", "strategy": { "steps": [{ "weight": weight, "holdSeconds": crate::test_bed::FOR_EVER }] } })
}

/// See [`Cluster::slice`].
pub fn slice(service: &str, listed: u8, ready: u8) -> Value {
    let endpoint = |n: u8| {
        let conditions = json!({ "ready": n < ready, "serving": n < ready, "terminating": false });
        json!({ "addresses": [format!("198.51.100.{}", 10 + n)], "conditions": conditions })
    };
    json!({
        "kind": "EndpointSlice",
        "metadata": { "name": format!("{service}-1"), "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": (0..listed).map(endpoint).collect::<Vec<_>>(),
    })
}

/// A proxy, and a backend for each version.
pub struct Front {
    /// The proxy.
    pub envoy: Envoy,
    /// By version.
    pub backends: BTreeMap<String, Backend>,
    service: String,
    listen: Port,
    _admin: Port,
}

impl Front {
    /// Starts an Envoy with the output of `tideshift render envoy` for a service of [`HOST`] with versions v1 and v2,
    /// with all these replicas as the controller.
    pub async fn start(service: &str, controllers: &[&Controller]) -> anyhow::Result<Self> {
        let addresses: Vec<_> = controllers.iter().map(|controller| controller.address()).collect();
        Self::start_before(service, &addresses).await
    }

    /// The same for replicas that start later.
    pub async fn start_before(service: &str, controllers: &[SocketAddr]) -> anyhow::Result<Self> {
        let mut backends = BTreeMap::new();
        for version in ["v1", "v2"] {
            backends.insert(version.to_owned(), Backend::start(version).await?);
        }
        let version = |(name, backend): (&String, &Backend)| json!({ "name": name, "endpoints": [backend.address().to_string()] });
        let versions: Vec<_> = backends.iter().map(version).collect();
        let directory: TempDir = tempfile::tempdir()?;
        let file = directory.path().join("shift.yaml");
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1",
            "kind": "TrafficShift",
            "metadata": { "name": service },
            "spec": { "hostnames": [HOST], "versions": versions, "stable": "v1" },
        });
        fs::write(&file, document.to_string())?;
        let (listen, admin) = (Port::reserve()?, Port::reserve()?);
        let first = *controllers.first().context("no replica")?;
        let rendered = render(&file, listen.address(), admin.address(), first)?;
        ensure!(rendered.code == Some(0) && rendered.stderr.is_empty(), "tideshift render envoy: {rendered:?}");
        let mut bootstrap: Value = serde_saphyr::from_str(&rendered.stdout)?;
        let clusters = bootstrap["static_resources"]["clusters"].as_array_mut().context("no clusters")?;
        let controller = clusters.iter_mut().find(|cluster| cluster["name"] == "tideshift_controller");
        let endpoint = |address: &SocketAddr| {
            let address = json!({ "address": address.ip().to_string(), "port_value": address.port() });
            json!({ "endpoint": { "address": { "socket_address": address } } })
        };
        controller.context("no controller")?["load_assignment"]["endpoints"][0]["lb_endpoints"] =
            controllers.iter().map(endpoint).collect();
        let envoy = envoy::Options::new(bootstrap.to_string(), admin.number()).start().await?;
        Ok(Self { envoy, backends, service: service.to_owned(), listen, _admin: admin })
    }

    /// The backend of a version.
    pub fn version(&self, name: &str) -> &Backend {
        &self.backends[name]
    }

    /// The address for clients.
    pub fn address(&self) -> SocketAddr {
        self.listen.address()
    }

    /// Sends requests at this rate.
    pub fn load(&self, per_second: f64) -> Load {
        Plan::new(self.address(), HOST).connections(CONNECTIONS).rate(per_second).start()
    }

    /// Waits until the controller's totals, Envoy's own counts and the client's tally are equal.
    pub async fn assert_counts_agree(&self, controller: &Controller, tally: &Tally) -> anyhow::Result<()> {
        let expected = counts_of(tally);
        assert_eq!((tally.failed, tally.sent), (0, tally.answered), "{:?}", tally.failures);
        eventually("controller, Envoy and client to agree", DEADLINE, async || {
            let seen = View::of(controller, &self.service).await?.counts();
            let metrics = self.envoy.prometheus().await?.requests_by_version(&self.service);
            let proxy: BTreeMap<_, _> = metrics.into_iter().filter(|(_, count)| *count > 0).collect();
            ensure!(seen == expected, "the controller has {seen:?}, the client {expected:?}");
            ensure!(proxy == expected, "Envoy has {proxy:?}, the client {expected:?}");
            Ok(())
        })
        .await
    }
}

/// A service in the status of a replica.
#[derive(Clone, Debug)]
pub struct View {
    /// The service.
    pub service: Value,
    status: Value,
}

impl View {
    /// The current state.
    pub async fn of(controller: &Controller, service: &str) -> anyhow::Result<Self> {
        let status = controller.status().await?;
        let services = status["services"].as_array();
        let found = services.and_then(|services| services.iter().find(|one| one["name"] == service));
        let found = found.cloned().with_context(|| format!("there is no service {service}: {status}"))?;
        Ok(Self { service: found, status })
    }

    /// The share of each version in percent.
    pub fn weights(&self) -> Vec<f64> {
        self.versions().map(|version| version["weight"].as_f64().unwrap_or(f64::NAN)).collect()
    }

    /// The phase.
    pub fn phase(&self) -> &str {
        self.service["phase"].as_str().unwrap_or_default()
    }

    /// The reason for the phase.
    pub fn message(&self) -> &str {
        self.service["message"].as_str().unwrap_or_default()
    }

    /// The number of the current step.
    pub fn step(&self) -> Option<u64> {
        self.service["step"]["number"].as_u64()
    }

    /// The revision of the published policy.
    pub fn revision(&self) -> u64 {
        self.status["revision"].as_u64().unwrap_or_default()
    }

    /// Whether at least one proxy has reported, and every proxy runs the newest revision on all workers.
    pub fn is_in_force(&self) -> bool {
        let proxies = self.status["proxies"].as_array();
        proxies.is_some_and(|all| !all.is_empty() && all.iter().all(|one| one["revision"] == self.status["revision"]))
    }

    fn versions(&self) -> impl Iterator<Item = &Value> {
        self.service["versions"].as_array().into_iter().flatten()
    }

    fn counts(&self) -> BTreeMap<(String, String), u64> {
        let of = |version: &Value| {
            let name = version["name"].as_str().unwrap_or_default().to_owned();
            let requests = version["requests"].clone();
            OUTCOMES.map(|(field, label)| ((name.clone(), label.to_owned()), requests[field].as_u64().unwrap_or(0)))
        };
        self.versions().flat_map(of).filter(|(_, count)| *count > 0).collect()
    }
}

/// Waits until a service is as wanted.
pub async fn until(
    controller: &Controller,
    service: &str,
    what: &str,
    holds: impl Fn(&View) -> anyhow::Result<()>,
) -> anyhow::Result<View> {
    let outcome = eventually(what, DEADLINE, async || {
        let view = View::of(controller, service).await?;
        holds(&view).with_context(|| view.service.to_string())?;
        Ok(view)
    });
    outcome.await.with_context(|| controller.tail())
}

/// Waits until the versions have these shares in percent.
pub async fn until_weights(controller: &Controller, service: &str, weights: &[f64]) -> anyhow::Result<View> {
    until(controller, service, &format!("the shares {weights:?}"), |view| {
        ensure!(view.weights() == weights, "they are {:?}", view.weights());
        Ok(())
    })
    .await
}

/// The same, and every proxy applies them.
pub async fn until_in_force(controller: &Controller, service: &str, weights: &[f64]) -> anyhow::Result<View> {
    until(controller, service, &format!("the shares {weights:?} in every proxy"), |view| {
        ensure!(view.weights() == weights, "they are {:?}", view.weights());
        ensure!(view.is_in_force(), "not in force yet: {}", view.status["proxies"]);
        Ok(())
    })
    .await
}

/// The current policy of a replica.
pub async fn policy(controller: &Controller) -> anyhow::Result<Value> {
    let policy = get(controller.address(), "/v1/policy?proxy=probe&epoch=&after=0").send().await?;
    ensure!(policy.status == 200, "{}: {}", policy.status, policy.text());
    policy.json()
}

/// The weights of a service in a policy.
pub fn weights_of(policy: &Value, service: &str) -> Vec<u64> {
    let services = policy["services"].as_array().into_iter().flatten();
    let versions = services.filter(|one| one["name"] == service).filter_map(|one| one["versions"].as_array());
    versions.flatten().map(|version| version["weight"].as_u64().unwrap_or_default()).collect()
}
