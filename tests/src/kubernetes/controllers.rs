//! A controller manager, as far as tests need it: Deployments create ReplicaSets, these and StatefulSets create pods,
//! Services create EndpointSlices, PodDisruptionBudgets count healthy pods, and dependents of deleted objects are
//! deleted.
//!
//! The controllers work on the server's objects directly, and pause while it is down. The rolling update of a
//! Deployment is instant: the new ReplicaSet is scaled up and the old ones to 0 together.

mod budgets;
mod endpoints;
mod owners;
mod workloads;

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::apiserver::{ApiServer, Objects};

/// Running controllers; dropping it ends them.
#[derive(Debug)]
pub struct Controllers(JoinHandle<()>);

impl Controllers {
    /// Starts them for a server.
    pub fn start(server: &ApiServer) -> Self {
        let objects = Objects::clone(server);
        Self(tokio::spawn(async move {
            let mut seen = 0;
            while objects.changed(&mut seen).await {
                let start = Instant::now();
                // A step that fails because of a concurrent change is retried after that change.
                workloads::reconcile(&objects);
                owners::collect(&objects);
                endpoints::reconcile(&objects);
                budgets::reconcile(&objects);
                // With thousands of pods others want their turn, and many changes are then seen at once.
                sleep(start.elapsed() * 4).await;
            }
        }))
    }
}

impl Drop for Controllers {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn number(object: &Value, pointer: &str) -> usize {
    object.pointer(pointer).and_then(Value::as_u64).and_then(|number| usize::try_from(number).ok()).unwrap_or_default()
}

fn terminating(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

fn ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// The reference of an owner that controls what it owns.
fn owner(object: &Value) -> Value {
    json!([{
        "apiVersion": object["apiVersion"],
        "kind": object["kind"],
        "name": object["metadata"]["name"],
        "uid": object["metadata"]["uid"],
        "controller": true,
        "blockOwnerDeletion": true,
    }])
}

/// The uid of an object's controlling owner; empty if there is none.
fn owner_of(object: &Value) -> &str {
    let owners = object["metadata"]["ownerReferences"].as_array();
    let controls = owners.into_iter().flatten().find(|owner| owner["controller"] == true);
    controls.map(|owner| text(owner, "/uid")).unwrap_or_default()
}
