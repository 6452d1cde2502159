//! Deployments, ReplicaSets and StatefulSets: creates their pods, and counts them in the status.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::apiserver::Objects;
use super::{number, owner, owner_of, ready, terminating, text};

const HASH: &str = "pod-template-hash";

pub(super) fn reconcile(objects: &Objects) {
    let sets = objects.all("replicasets.apps");
    for deployment in objects.all("deployments.apps").iter().filter(|deployment| !terminating(deployment)) {
        let uid = text(deployment, "/metadata/uid");
        let own: Vec<_> = sets.iter().filter(|set| owner_of(set) == uid).collect();
        roll_out(objects, deployment, &own);
    }
    let pods = objects.all("pods");
    for resource in ["replicasets.apps", "statefulsets.apps"] {
        for set in objects.all(resource).iter().filter(|set| !terminating(set)) {
            let uid = text(set, "/metadata/uid");
            let own: Vec<_> = pods.iter().filter(|pod| owner_of(pod) == uid).collect();
            fill(objects, resource, set, &own);
        }
    }
}

/// One ReplicaSet has a Deployment's template and all of its replicas.
fn roll_out(objects: &Objects, deployment: &Value, sets: &[&Arc<Value>]) {
    let mut hasher = DefaultHasher::new();
    deployment["spec"]["template"].to_string().hash(&mut hasher);
    let hash = format!("{:08x}", hasher.finish() >> 32);
    let (namespace, name) = (text(deployment, "/metadata/namespace"), text(deployment, "/metadata/name"));
    let current = format!("{name}-{hash}");
    let replicas = number(deployment, "/spec/replicas");
    if !sets.iter().any(|set| text(set, "/metadata/name") == current) {
        let mut template = deployment["spec"]["template"].clone();
        template["metadata"]["labels"][HASH] = hash.as_str().into();
        let mut selector = deployment["spec"]["selector"].clone();
        selector["matchLabels"][HASH] = hash.as_str().into();
        let _ = objects.create(json!({
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": current,
                "namespace": namespace,
                "labels": template["metadata"]["labels"],
                "ownerReferences": owner(deployment),
            },
            "spec": { "replicas": replicas, "selector": selector, "template": template },
        }));
    }
    let (mut pods, mut ready, mut updated) = (0, 0, 0);
    for set in sets {
        let is_current = text(set, "/metadata/name") == current;
        let wanted = if is_current { replicas } else { 0 };
        let scale = json!({ "spec": { "replicas": wanted } });
        let _ = objects.patch("replicasets.apps", namespace, text(set, "/metadata/name"), scale);
        pods += number(set, "/status/replicas");
        ready += number(set, "/status/readyReplicas");
        updated += if is_current { number(set, "/status/replicas") } else { 0 };
    }
    let available = if ready >= replicas { "True" } else { "False" };
    let status = json!({
        "observedGeneration": deployment["metadata"]["generation"],
        "replicas": pods,
        "updatedReplicas": updated,
        "readyReplicas": ready,
        "availableReplicas": ready,
        "unavailableReplicas": replicas.saturating_sub(ready),
        "conditions": [{ "type": "Available", "status": available, "reason": "TideshiftTest" }],
    });
    let _ = objects.patch_status("deployments.apps", namespace, name, json!({ "status": status }));
}

/// Makes pods, or ends some: first those that are not ready, then the youngest; of a StatefulSet the last.
fn fill(objects: &Objects, resource: &str, set: &Value, pods: &[&Arc<Value>]) {
    let (namespace, name) = (text(set, "/metadata/namespace"), text(set, "/metadata/name"));
    let mut active: Vec<_> = pods.iter().filter(|pod| !terminating(pod)).collect();
    let wanted = number(set, "/spec/replicas");
    let in_order = resource == "statefulsets.apps";
    if in_order {
        // Also those that are still ending have their names.
        let names: BTreeSet<_> = pods.iter().map(|pod| text(pod, "/metadata/name").to_owned()).collect();
        let missing = (0..wanted).map(|ordinal| format!("{name}-{ordinal}")).filter(|pod| !names.contains(pod));
        for pod in missing {
            create(objects, set, json!({ "name": pod }));
        }
        let ordinal =
            |pod: &Value| text(pod, "/metadata/name").rsplit('-').next().and_then(|last| last.parse::<usize>().ok());
        active.sort_by_key(|pod| ordinal(pod));
    } else {
        for _ in active.len()..wanted {
            create(objects, set, json!({ "generateName": format!("{name}-") }));
        }
        let age = |pod: &Value| text(pod, "/metadata/creationTimestamp").to_owned();
        active.sort_by_key(|pod| (!ready(pod), age(pod)));
    }
    for pod in active.iter().skip(wanted) {
        let _ = objects.delete("pods", namespace, text(pod, "/metadata/name"));
    }
    let ready = active.iter().filter(|pod| ready(pod)).count();
    let mut status = json!({
        "observedGeneration": set["metadata"]["generation"],
        "replicas": active.len(),
        "readyReplicas": ready,
        "availableReplicas": ready,
    });
    if in_order {
        status["currentReplicas"] = active.len().into();
        status["updatedReplicas"] = active.len().into();
    }
    let _ = objects.patch_status(resource, namespace, name, json!({ "status": status }));
}

fn create(objects: &Objects, set: &Value, mut metadata: Value) {
    let template = &set["spec"]["template"];
    metadata["namespace"] = set["metadata"]["namespace"].clone();
    metadata["labels"] = template["metadata"]["labels"].clone();
    metadata["annotations"] = template["metadata"]["annotations"].clone();
    metadata["ownerReferences"] = owner(set);
    let _ =
        objects.create(json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"] }));
}
