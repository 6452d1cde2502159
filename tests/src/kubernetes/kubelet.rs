//! Stands in for the scheduler and the kubelet: pods are bound to its one node, run, become ready and end, controlled
//! by annotations. Nothing actually runs, but to clients of the API server it looks that way.
//!
//! A pod's annotations, which may change while it runs:
//!
//! | annotation | what for |
//! | --- | --- |
//! | [`READY`] | `"false"`: it runs but is not ready |
//! | [`READY_DELAY`] | seconds from its start until it is ready |
//! | [`TERM_DELAY`] | seconds from its deletion until it is gone |
//! | [`ADDRESSES`] | `IP` or `IP:PORT`, several with commas between: it gets the first that no other pod has |
//! | [`PORT`] | where its process listens, whatever the Service says; set here for an address with a port |
//!
//! Without [`ADDRESSES`] pods get addresses of the documentation range, to which no traffic must ever be sent. A real
//! control plane refuses loopback addresses and does not know [`PORT`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// Whether the pod is ready while it runs.
pub const READY: &str = "tideshift.dev/test-ready";
/// Seconds until the pod is ready.
pub const READY_DELAY: &str = "tideshift.dev/test-ready-delay";
/// Seconds until the pod is gone after its deletion.
pub const TERM_DELAY: &str = "tideshift.dev/test-term-delay";
/// The addresses to choose from.
pub const ADDRESSES: &str = "tideshift.dev/test-addresses";
/// The port of its process.
pub const PORT: &str = "tideshift.dev/test-port";

/// The name of the one node.
pub const NODE: &str = "tideshift-test-node";

/// The delay after a failed request.
const RETRY: Duration = Duration::from_millis(100);

/// The maximum number of concurrent requests.
const AT_ONCE: usize = 16;

/// A running stand-in; dropping it ends it, and leaves the pods as they are.
#[derive(Debug)]
pub struct Kubelet(JoinHandle<()>);

impl Kubelet {
    /// Registers the node and manages every pod from now on.
    pub async fn start(client: Client) -> anyhow::Result<Self> {
        register(&client).await.context("cannot register the node")?;
        Ok(Self(tokio::spawn(run(client))))
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn register(client: &Client) -> kube::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let body = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": NODE, "labels": { "kubernetes.io/hostname": NODE, "kubernetes.io/os": "linux" } },
        // A real server adds a taint to a new node.
        "spec": { "taints": [] },
    });
    let params = PatchParams::apply("tideshift-test-kubelet").force();
    nodes.patch(NODE, &params, &Patch::Apply(body)).await?;
    let room = json!({ "cpu": "64", "memory": "256Gi", "pods": "10000" });
    let status = json!({
        "capacity": room,
        "allocatable": room,
        "addresses": [{ "type": "InternalIP", "address": "198.51.100.1" }],
        "conditions": [condition("Ready", true)],
    });
    nodes.patch_status(NODE, &PatchParams::default(), &Patch::Merge(json!({ "status": status }))).await?;
    nodes.patch(NODE, &PatchParams::default(), &Patch::Merge(json!({ "spec": { "taints": null } }))).await?;
    Ok(())
}

fn condition(r#type: &str, holds: bool) -> Value {
    let status = if holds { "True" } else { "False" };
    json!({ "type": r#type, "status": status, "reason": "TideshiftTest", "lastTransitionTime": now() })
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The next step for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Bind,
    /// Report that it runs, and whether it is ready.
    Report {
        ready: bool,
    },
    /// Remove it: it has ended.
    Remove,
}

/// The address of a pod, and its port if that is its own.
type Address = (IpAddr, Option<u16>);

/// A pod, with the state that the API server does not store.
#[derive(Debug)]
struct Known {
    pod: Pod,
    /// When it was first seen: at all, bound, deleted.
    seen: Instant,
    started: Option<Instant>,
    ending: Option<Instant>,
    /// The chosen address; the API server may not have it yet.
    address: Option<Address>,
    /// The earliest time of the next attempt.
    retry: Option<Instant>,
    /// The step taken for this resourceVersion; the watch delivers the next one.
    done: Option<(Step, String)>,
}

impl Known {
    fn new(pod: Pod, now: Instant) -> Self {
        Self { pod, seen: now, started: None, ending: None, address: None, retry: None, done: None }
    }

    fn see(&mut self, pod: Pod, now: Instant) {
        if pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()) {
            self.started.get_or_insert(now);
        }
        if pod.metadata.deletion_timestamp.is_some() {
            self.ending.get_or_insert(now);
        }
        self.pod = pod;
        self.address = self.reported_address().or(self.address);
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.pod.annotations().get(name).map(String::as_str)
    }

    fn seconds(&self, name: &str) -> Duration {
        let seconds = self.annotation(name).and_then(|text| text.parse().ok());
        seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or_default()
    }

    /// Whether it was reported as running, and then whether it is ready.
    fn reported(&self) -> Option<bool> {
        let status = self.pod.status.as_ref()?;
        status.pod_ip.as_ref()?;
        let ready = status.conditions.iter().flatten().find(|condition| condition.type_ == "Ready");
        Some(ready.is_some_and(|ready| ready.status == "True"))
    }

    /// Where it runs, as far as the API server knows.
    fn reported_address(&self) -> Option<Address> {
        let ip = self.pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
        Some((ip, self.annotation(PORT).and_then(|port| port.parse().ok())))
    }

    /// The next step, and when it is due.
    fn next(&self) -> Option<(Instant, Step)> {
        let (at, step) = if let Some(ending) = self.ending {
            (ending + self.seconds(TERM_DELAY), Step::Remove)
        } else if let Some(started) = self.started {
            let wanted = self.annotation(READY) != Some("false");
            match self.reported() {
                None => (started, Step::Report { ready: wanted && self.seconds(READY_DELAY).is_zero() }),
                Some(ready) if ready == wanted => return None,
                Some(false) => (started + self.seconds(READY_DELAY), Step::Report { ready: true }),
                Some(true) => (started, Step::Report { ready: false }),
            }
        } else {
            (self.seen, Step::Bind)
        };
        let version = self.pod.resource_version().unwrap_or_default();
        let again = self.done.as_ref().is_some_and(|(done, of)| *done == step && *of == version);
        (!again).then(|| (self.retry.map_or(at, |retry| retry.max(at)), step))
    }

    fn acted(&mut self, step: Step, outcome: kube::Result<()>) {
        match outcome {
            // The watch reports a deleted pod.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(_) => {
                self.retry = Some(Instant::now() + RETRY);
                return;
            }
            Ok(()) => {}
        }
        self.done = Some((step, self.pod.resource_version().unwrap_or_default()));
    }
}

/// Every pod by its uid.
type Pods = BTreeMap<String, Known>;

async fn run(client: Client) {
    let mut events = watcher(Api::<Pod>::all(client.clone()), watcher::Config::default()).default_backoff().boxed();
    let mut pods = Pods::new();
    let mut listed = BTreeSet::new();
    loop {
        let next = pods.values().filter_map(|known| known.next().map(|(at, _)| at)).min();
        tokio::select! {
            event = events.next() => {
                let mut event = event;
                // All that have come, before all pods are looked through.
                while let Some(heard) = event {
                    hear(&mut pods, &mut listed, heard);
                    event = events.next().now_or_never().flatten();
                }
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => act_on_due(&client, &mut pods).await,
        }
    }
}

/// Takes the steps that are due for all pods.
async fn act_on_due(client: &Client, pods: &mut Pods) {
    let now = Instant::now();
    let due = |(uid, known): (&String, &Known)| {
        known.next().filter(|(at, _)| *at <= now).map(|(_, step)| (uid.clone(), step))
    };
    let due: Vec<_> = pods.iter().filter_map(due).collect();
    choose(pods, &due);
    let known = &*pods;
    let act = |(uid, step): (String, Step)| async move {
        let outcome = match known.get(&uid) {
            Some(known) => act(client, known, step).await,
            None => Ok(()),
        };
        (uid, step, outcome)
    };
    let outcomes: Vec<_> = stream::iter(due).map(act).buffer_unordered(AT_ONCE).collect().await;
    for (uid, step, outcome) in outcomes {
        if let Some(known) = pods.get_mut(&uid) {
            known.acted(step, outcome);
        }
    }
}

/// Processes an event of the watcher.
fn hear(pods: &mut Pods, listed: &mut BTreeSet<String>, event: watcher::Result<watcher::Event<Pod>>) {
    match event {
        Ok(watcher::Event::Init) => listed.clear(),
        Ok(watcher::Event::InitApply(pod)) => {
            listed.insert(pod.uid().unwrap_or_default());
            see(pods, pod);
        }
        Ok(watcher::Event::InitDone) => pods.retain(|uid, _| listed.contains(uid)),
        Ok(watcher::Event::Apply(pod)) => see(pods, pod),
        Ok(watcher::Event::Delete(pod)) => _ = pods.remove(&pod.uid().unwrap_or_default()),
        // It is tried again.
        Err(_) => {}
    }
}

fn see(pods: &mut Pods, pod: Pod) {
    let uid = pod.uid().unwrap_or_default();
    let now = Instant::now();
    pods.entry(uid).or_insert_with(|| Known::new(pod.clone(), now)).see(pod, now);
}

async fn act(client: &Client, known: &Known, step: Step) -> kube::Result<()> {
    match step {
        Step::Bind => bind(client, &known.pod).await,
        Step::Report { ready } => report(client, &known.pod, known.address, ready).await,
        Step::Remove => remove(client, &known.pod).await,
    }
}

fn api(client: &Client, pod: &Pod) -> Api<Pod> {
    Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default())
}

async fn bind(client: &Client, pod: &Pod) -> kube::Result<()> {
    let target = json!({ "apiVersion": "v1", "kind": "Node", "name": NODE });
    let binding =
        json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": pod.name_any() }, "target": target });
    let _: Value =
        api(client, pod).create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await?;
    Ok(())
}

/// Gives addresses to pods that are about to run.
fn choose(pods: &mut Pods, due: &[(String, Step)]) {
    let mut taken: BTreeSet<_> = pods.values().filter_map(|known| known.address).collect();
    for (uid, _) in due.iter().filter(|(_, step)| matches!(step, Step::Report { .. })) {
        let Some(known) = pods.get_mut(uid).filter(|known| known.address.is_none()) else { continue };
        let read = |text: &str| {
            let with_port = text.parse().map(|address: SocketAddr| (address.ip(), Some(address.port())));
            with_port.or_else(|_| text.parse().map(|ip| (ip, None))).ok()
        };
        let given = known.annotation(ADDRESSES).unwrap_or_default().split(',').filter_map(|text| read(text.trim()));
        // The documentation range, and then that for benchmarks.
        let documentation = (10..=254).map(|last| (IpAddr::from([198, 51, 100, last]), None));
        let benchmarks =
            (0..=255).flat_map(|third| (1..=254).map(move |last| (IpAddr::from([198, 18, third, last]), None)));
        known.address = given.chain(documentation).chain(benchmarks).find(|address| !taken.contains(address));
        taken.extend(known.address);
    }
}

async fn report(client: &Client, pod: &Pod, address: Option<Address>, ready: bool) -> kube::Result<()> {
    let (api, name, params) = (api(client, pod), pod.name_any(), PatchParams::default());
    let Some((ip, port)) = address else { return Ok(()) };
    if let Some(port) = port
        && !pod.annotations().contains_key(PORT)
    {
        let annotations = json!({ "metadata": { "annotations": { PORT: port.to_string() } } });
        api.patch(&name, &params, &Patch::Merge(annotations)).await?;
    }
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| {
        json!({
            "name": container.name,
            "image": container.image,
            "imageID": "",
            "ready": ready,
            "started": true,
            "restartCount": 0,
            "state": { "running": { "startedAt": now() } },
        })
    });
    let status = json!({
        "phase": "Running",
        "hostIP": "198.51.100.1",
        "podIP": ip.to_string(),
        "podIPs": [{ "ip": ip.to_string() }],
        "startTime": pod.status.as_ref().and_then(|status| status.start_time.clone()).map_or_else(|| json!(now()), |time| json!(time)),
        "conditions": [
            condition("PodScheduled", true),
            condition("Initialized", true),
            condition("ContainersReady", ready),
            condition("Ready", ready),
        ],
        "containerStatuses": containers.collect::<Vec<_>>(),
    });
    api.patch_status(&name, &params, &Patch::Merge(json!({ "status": status }))).await?;
    Ok(())
}

async fn remove(client: &Client, pod: &Pod) -> kube::Result<()> {
    let preconditions = Some(Preconditions { uid: pod.uid(), resource_version: None });
    let params = DeleteParams { grace_period_seconds: Some(0), preconditions, ..DeleteParams::default() };
    api(client, pod).delete(&pod.name_any(), &params).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(body: Value) -> Pod {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn pods_are_bound_run_become_ready_and_end() {
        let start = Instant::now();
        let bare = json!({ "metadata": { "name": "a", "uid": "1", "resourceVersion": "1" } });
        let mut known = Known::new(pod(bare.clone()), start);
        assert_eq!(known.next(), Some((start, Step::Bind)));
        known.done = Some((Step::Bind, "1".to_owned()));
        assert_eq!(known.next(), None, "until the watch says more");

        let mut body = bare;
        body["spec"] = json!({ "nodeName": NODE, "containers": [] });
        body["metadata"]["resourceVersion"] = "2".into();
        body["metadata"]["annotations"] = json!({ READY_DELAY: "1.5", TERM_DELAY: "2" });
        known.see(pod(body.clone()), start);
        assert_eq!(known.next(), Some((start, Step::Report { ready: false })));
        let conditions =
            |ready: &str| json!({ "podIP": "198.51.100.10", "conditions": [{ "type": "Ready", "status": ready }] });
        body["status"] = conditions("False");
        known.see(pod(body.clone()), start + Duration::from_secs(1));
        assert_eq!(known.next(), Some((start + Duration::from_millis(1500), Step::Report { ready: true })));
        body["status"] = conditions("True");
        known.see(pod(body.clone()), start);
        assert_eq!(known.next(), None);
        body["metadata"]["annotations"][READY] = "false".into();
        known.see(pod(body.clone()), start);
        assert_eq!(known.next(), Some((start, Step::Report { ready: false })));
        body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        known.see(pod(body), start);
        assert_eq!(known.next(), Some((start + Duration::from_secs(2), Step::Remove)));
    }
}
