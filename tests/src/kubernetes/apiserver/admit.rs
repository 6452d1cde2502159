//! Validation and defaulting of objects: defaults, types, and the schemas of CRDs.

use jiff::{Timestamp, Unit};
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::kinds::Kind;
use super::refusal::Refusal;
use super::schema;

/// The time as it stands in objects.
pub(super) fn now() -> String {
    let now = Timestamp::now();
    now.round(Unit::Second).unwrap_or(now).to_string()
}

/// Fills in what an object leaves out, and refuses it if it is not what its kind wants. Fields that the kind does not
/// know are dropped.
pub(super) fn admit(kind: &Kind, object: &mut Value) -> Result<(), Refusal> {
    if let Some(described) = &kind.schema {
        schema::prune_and_default(object, described);
        let mut wrong = Vec::new();
        schema::check(object, described, "", &mut wrong);
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        return if wrong.is_empty() { Ok(()) } else { Err(Refusal::invalid(kind, name, &wrong)) };
    }
    default(kind, object);
    typed(kind, object)?;
    let data = object.get("data").filter(|_| kind.kind == "Secret").and_then(Value::as_object);
    let bytes: usize = data.into_iter().flat_map(|data| data.values()).map(decoded).sum();
    if bytes > MAX_SECRET {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let wrong = format!("Too long: may not be more than {MAX_SECRET} bytes");
        return Err(Refusal::invalid(kind, name, &[("data".to_owned(), wrong)]));
    }
    Ok(())
}

/// The maximum size of all data of a Secret, as in a real API server.
const MAX_SECRET: usize = 1 << 20;

/// The bytes that Base64 stands for.
fn decoded(value: &Value) -> usize {
    value.as_str().map_or(0, |text| text.trim_end_matches('=').len() * 3 / 4)
}

fn set(object: &mut Value, pointer: &str, value: Value) {
    let Some((parent, field)) = pointer.rsplit_once('/') else { return };
    if let Some(Value::Object(parent)) = object.pointer_mut(parent) {
        parent.entry(field).or_insert(value);
    }
}

fn default(kind: &Kind, object: &mut Value) {
    match kind.kind.as_str() {
        "Deployment" | "ReplicaSet" | "StatefulSet" => {
            set(object, "/spec/replicas", 1.into());
            default_pod(object.pointer_mut("/spec/template/spec"));
        }
        "Pod" => {
            default_pod(object.pointer_mut("/spec"));
            set(object, "/status", json!({ "phase": "Pending" }));
        }
        "Service" => {
            set(object, "/spec/type", "ClusterIP".into());
            for port in object["spec"]["ports"].as_array_mut().into_iter().flatten() {
                set(port, "/protocol", "TCP".into());
                let number = port["port"].clone();
                set(port, "/targetPort", number);
            }
        }
        "Secret" => {
            set(object, "/type", "Opaque".into());
            let texts = object.as_object_mut().and_then(|secret| secret.remove("stringData"));
            for (key, text) in texts.as_ref().and_then(Value::as_object).into_iter().flatten() {
                let bytes = ByteString(text.as_str().unwrap_or_default().into());
                object["data"][key] = json!(bytes);
            }
        }
        "HorizontalPodAutoscaler" => set(object, "/spec/minReplicas", 1.into()),
        "Namespace" => set(object, "/status", json!({ "phase": "Active" })),
        "CustomResourceDefinition" => established(object),
        _ => {}
    }
}

fn default_pod(spec: Option<&mut Value>) {
    let Some(spec) = spec else { return };
    set(spec, "/terminationGracePeriodSeconds", 30.into());
    for container in spec["containers"].as_array_mut().into_iter().flatten() {
        for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            set(port, "/protocol", "TCP".into());
        }
    }
}

/// A CRD is in force at once.
fn established(crd: &mut Value) {
    if crd["status"]["conditions"].is_array() || !crd["spec"]["names"].is_object() {
        return;
    }
    let names = &mut crd["spec"]["names"];
    let kind = names["kind"].as_str().unwrap_or_default().to_owned();
    set(names, "/singular", kind.to_lowercase().into());
    set(names, "/listKind", format!("{kind}List").into());
    let versions = crd["spec"]["versions"].as_array().into_iter().flatten();
    let stored: Vec<_> =
        versions.filter(|version| version["storage"] == true).map(|version| version["name"].clone()).collect();
    let condition = |r#type: &str, reason: &str| json!({ "type": r#type, "status": "True", "reason": reason, "message": "", "lastTransitionTime": now() });
    crd["status"] = json!({
        "acceptedNames": crd["spec"]["names"],
        "storedVersions": stored,
        "conditions": [condition("NamesAccepted", "NoConflicts"), condition("Established", "InitialNamesAccepted")],
    });
}

/// Reads an object as the type of its kind and serialises it again.
fn typed(kind: &Kind, object: &mut Value) -> Result<(), Refusal> {
    fn as_type<T: DeserializeOwned + Serialize>(object: &Value) -> serde_json::Result<Value> {
        serde_json::to_value(serde_json::from_value::<T>(object.clone())?)
    }
    let read = match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "ConfigMap") => as_type::<core::ConfigMap>,
        ("", "Event") => as_type::<core::Event>,
        ("", "Namespace") => as_type::<core::Namespace>,
        ("", "Node") => as_type::<core::Node>,
        ("", "Pod") => as_type::<core::Pod>,
        ("", "Secret") => as_type::<core::Secret>,
        ("", "Service") => as_type::<core::Service>,
        ("", "ServiceAccount") => as_type::<core::ServiceAccount>,
        (_, "ClusterRole") => as_type::<ClusterRole>,
        (_, "ClusterRoleBinding") => as_type::<ClusterRoleBinding>,
        (_, "CustomResourceDefinition") => as_type::<CustomResourceDefinition>,
        (_, "DaemonSet") => as_type::<DaemonSet>,
        (_, "Deployment") => as_type::<Deployment>,
        (_, "EndpointSlice") => as_type::<EndpointSlice>,
        (_, "Event") => as_type::<Event>,
        (_, "HorizontalPodAutoscaler") => as_type::<HorizontalPodAutoscaler>,
        (_, "Job") => as_type::<Job>,
        (_, "Lease") => as_type::<Lease>,
        (_, "NetworkPolicy") => as_type::<NetworkPolicy>,
        (_, "PodDisruptionBudget") => as_type::<PodDisruptionBudget>,
        (_, "ReplicaSet") => as_type::<ReplicaSet>,
        (_, "Role") => as_type::<Role>,
        (_, "RoleBinding") => as_type::<RoleBinding>,
        (_, "StatefulSet") => as_type::<StatefulSet>,
        (_, "StorageClass") => as_type::<StorageClass>,
        _ => return Ok(()),
    };
    *object = read(object).map_err(|error| {
        let message =
            format!("{} in version {:?} cannot be handled as a {}: {error}", kind.kind, kind.version, kind.kind);
        Refusal::bad_request(message)
    })?;
    Ok(())
}
