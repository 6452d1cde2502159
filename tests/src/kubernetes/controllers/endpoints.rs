//! Creates EndpointSlices from the selectors of Services, with ready, serving and terminating as Kubernetes defines
//! them. An endpoint stays in its slice, so that a change of another endpoint never makes it seem deleted.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::apiserver::Objects;
use super::super::apiserver::selector::Labels;
use super::super::kubelet::PORT;
use super::{owner, owner_of, ready, terminating, text};

/// As many endpoints as real slices hold.
const FULL: usize = 100;

/// Endpoints by their pods' names.
type Endpoints = BTreeMap<String, Value>;

pub(super) fn reconcile(objects: &Objects) {
    let (pods, slices) = (objects.all("pods"), objects.all("endpointslices.discovery.k8s.io"));
    for service in objects.all("services").iter().filter(|service| service["spec"]["selector"].is_object()) {
        let uid = text(service, "/metadata/uid");
        let own: Vec<_> = slices.iter().filter(|slice| owner_of(slice) == uid).collect();
        slice(objects, service, &pods, &own);
    }
}

fn slice(objects: &Objects, service: &Value, pods: &[Arc<Value>], slices: &[&Arc<Value>]) {
    let selector = Labels::of(&service["spec"]["selector"]);
    let namespace = text(service, "/metadata/namespace");
    // Pods whose ports differ are in different slices; a Service without any has an empty slice.
    let mut wanted = BTreeMap::<String, Endpoints>::new();
    for pod in pods {
        let here = text(pod, "/metadata/namespace") == namespace && selector.select(&pod["metadata"]["labels"]);
        let runs =
            !text(pod, "/status/podIP").is_empty() && !matches!(text(pod, "/status/phase"), "Succeeded" | "Failed");
        if here && runs {
            let endpoints = wanted.entry(ports(service, pod).to_string()).or_default();
            endpoints.insert(text(pod, "/metadata/name").to_owned(), endpoint(service, pod));
        }
    }
    if wanted.is_empty() {
        wanted.insert("[]".to_owned(), Endpoints::new());
    }
    for slice in slices {
        let name = text(slice, "/metadata/name");
        let Some(endpoints) = wanted.get_mut(&slice["ports"].to_string()) else {
            let _ = objects.delete("endpointslices.discovery.k8s.io", namespace, name);
            continue;
        };
        let before = slice["endpoints"].as_array().into_iter().flatten();
        let mut kept: Vec<_> =
            before.filter_map(|endpoint| endpoints.remove(text(endpoint, "/targetRef/name"))).collect();
        while kept.len() < FULL
            && let Some((_, endpoint)) = endpoints.pop_first()
        {
            kept.push(endpoint);
        }
        if kept.is_empty() && slices.len() > 1 {
            let _ = objects.delete("endpointslices.discovery.k8s.io", namespace, name);
        } else if slice["endpoints"].as_array().is_none_or(|before| *before != kept) {
            let _ = objects.patch("endpointslices.discovery.k8s.io", namespace, name, json!({ "endpoints": kept }));
        }
    }
    for (ports, endpoints) in wanted {
        let ports: Value = serde_json::from_str(&ports).unwrap_or_default();
        let empty = endpoints.is_empty() && slices.is_empty();
        let endpoints: Vec<_> = endpoints.into_values().collect();
        let chunks = endpoints.chunks(FULL).chain(empty.then_some([].as_slice()));
        for chunk in chunks {
            let _ = objects.create(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "generateName": format!("{}-", text(service, "/metadata/name")),
                    "namespace": namespace,
                    "labels": {
                        "kubernetes.io/service-name": service["metadata"]["name"],
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    },
                    "ownerReferences": owner(service),
                },
                "addressType": "IPv4",
                "ports": ports,
                "endpoints": chunk,
            }));
        }
    }
}

fn endpoint(service: &Value, pod: &Value) -> Value {
    let (ready, terminating) = (ready(pod), terminating(pod));
    let publishes_all = service["spec"]["publishNotReadyAddresses"] == true;
    json!({
        "addresses": [pod["status"]["podIP"]],
        "conditions": {
            "ready": publishes_all || (ready && !terminating),
            "serving": publishes_all || ready,
            "terminating": terminating,
        },
        "nodeName": pod["spec"]["nodeName"],
        "targetRef": {
            "kind": "Pod",
            "namespace": pod["metadata"]["namespace"],
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"],
        },
    })
}

/// A Service's ports as they are in this pod.
fn ports(service: &Value, pod: &Value) -> Value {
    let of_pod = pod["metadata"]["annotations"][PORT].as_str().and_then(|port| port.parse::<u16>().ok());
    let containers = || pod["spec"]["containers"].as_array().into_iter().flatten();
    let named = |name: &str| {
        let mut all = containers().flat_map(|container| container["ports"].as_array().into_iter().flatten());
        all.find(|port| port["name"] == name).map(|port| port["containerPort"].clone())
    };
    let port = |port: &Value| {
        let target = match (&port["targetPort"], of_pod) {
            (_, Some(number)) => number.into(),
            (Value::String(name), None) => named(name)?,
            (number, None) => number.clone(),
        };
        // As the server writes them, with their fields in order.
        let mut slices = json!({ "name": text(port, "/name"), "port": target, "protocol": port["protocol"] });
        if let Some(protocol) = port.get("appProtocol") {
            slices["appProtocol"] = protocol.clone();
        }
        Some(slices)
    };
    service["spec"]["ports"].as_array().into_iter().flatten().filter_map(port).collect()
}
