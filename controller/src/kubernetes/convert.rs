//! Converts Kubernetes objects to the few fields that the controller uses.

use crate::kubernetes::cache::{Autoscaler, Budget, SecretData, Slice, SliceEndpoint, Workload};
use crate::secret_values::MAX_BYTES;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use kube::api::DynamicObject;
use kube::core::PartialObjectMeta;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tideshift_core::shift::{API_VERSION, KIND, LabelOperator, LabelRequirement, LabelSelector, WorkloadRef};

/// The annotation in which a rollout records the `minReplicas` of a HorizontalPodAutoscaler before raising it.
pub const MIN_BEFORE: &str = "tideshift.dev/min-replicas-before";

/// The label of an EndpointSlice that names its Service.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The label that marks Secrets as usable by documents; its value is the purpose. Without it, anyone with permission to
/// write TrafficShifts could use Secrets that they may not read.
pub const USE_LABEL: &str = "tideshift.dev/use";

/// The finalizer of a TrafficShift with `onDelete: Drain`.
pub const FINALIZER: &str = "tideshift.dev/drain";

/// A TrafficShift as stored in the cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct TrafficShiftObject {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    /// The creation time, in milliseconds since 1970.
    pub(super) created: i64,
    pub(super) generation: i64,
    /// The field manager that last wrote the spec, and when, as far as the API server has recorded it.
    pub(super) by: Option<String>,
    /// Whether a generation of it has been in force, including under another controller or before a restart.
    pub(super) was_in_force: bool,
    /// Whether it has a deletion timestamp and waits for its finalizers.
    pub(super) is_deleted: bool,
    /// Whether it carries this controller's finalizer.
    pub(super) is_held: bool,
    /// The document alone, as in a file.
    pub(super) document: Value,
}

impl TrafficShiftObject {
    /// The name of its rollout.
    pub(super) fn rollout(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }
}

pub(super) fn from_traffic_shift(object: &DynamicObject) -> Option<TrafficShiftObject> {
    let (namespace, name) = (object.namespace()?, object.name_any());
    let document = json!({
        "apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name, "namespace": namespace},
        "spec": object.data.get("spec").cloned().unwrap_or_default(),
    });
    Some(TrafficShiftObject {
        namespace,
        name,
        uid: object.uid().unwrap_or_default(),
        created: object.creation_timestamp().map_or(0, |time| time.0.as_millisecond()),
        generation: object.metadata.generation.unwrap_or_default(),
        by: last_editor(object),
        was_in_force: object.data["status"]["observedGeneration"].as_i64().is_some_and(|generation| generation > 0),
        is_deleted: object.metadata.deletion_timestamp.is_some(),
        is_held: object.finalizers().iter().any(|name| name == FINALIZER),
        document,
    })
}

/// The field manager that last wrote the spec, and when.
fn last_editor(object: &DynamicObject) -> Option<String> {
    let entries = object.metadata.managed_fields.iter().flatten();
    let of_spec = entries.filter(|entry| {
        let has_spec = entry.fields_v1.as_ref().is_some_and(|fields| fields.0.get("f:spec").is_some());
        has_spec && entry.subresource.as_deref().is_none_or(str::is_empty)
    });
    let newest = of_spec.max_by_key(|entry| entry.time.as_ref().map(|time| time.0))?;
    let manager = newest.manager.as_deref().filter(|manager| !manager.is_empty())?;
    Some(newest.time.as_ref().map_or_else(|| manager.to_owned(), |time| format!("{manager} at {}", time.0)))
}

pub(super) fn slice(slice: &EndpointSlice) -> Option<Slice> {
    // FQDN slices hold names instead of addresses; the controller cannot count those.
    if slice.address_type == "FQDN" {
        return None;
    }
    let ports = slice.ports.iter().flatten();
    let ports = ports.filter_map(|port| Some((port.name.clone().unwrap_or_default(), u16::try_from(port.port?).ok()?)));
    Some(Slice {
        service: slice.labels().get(SERVICE_NAME).cloned(),
        is_ipv6: slice.address_type == "IPv6",
        ports: ports.collect(),
        endpoints: slice.endpoints.iter().flatten().map(|one| endpoint(one, slice.namespace().as_deref())).collect(),
    })
}

/// An endpoint of a slice in this namespace. A pod of another namespace does not belong to the slice.
fn endpoint(endpoint: &Endpoint, namespace: Option<&str>) -> SliceEndpoint {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let pod = endpoint.target_ref.as_ref().filter(|target| {
        target.kind.as_deref() == Some("Pod") && target.namespace.as_deref().is_none_or(|own| Some(own) == namespace)
    });
    SliceEndpoint {
        address: endpoint.addresses.first().cloned().unwrap_or_default(),
        pod: pod.and_then(|pod| pod.name.clone()),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or_default(),
    }
}

pub(super) fn labels(pod: &PartialObjectMeta<Pod>) -> Option<BTreeMap<String, String>> {
    Some(pod.labels().clone())
}

pub(super) fn workload(object: &DynamicObject) -> Option<Workload> {
    let spec = object.data.get("spec");
    let replicas = spec.and_then(|spec| spec.get("replicas")).and_then(Value::as_u64);
    let labels = spec.and_then(|spec| spec.get("selector")).cloned();
    let labels = labels.and_then(|labels| serde_json::from_value::<v1::LabelSelector>(labels).ok());
    let replicas = replicas.unwrap_or(1).min(1_000_000) as u32;
    Some(Workload { replicas, selector: labels.and_then(|labels| selector(&labels)) })
}

pub(super) fn autoscaler(object: &HorizontalPodAutoscaler) -> Option<Autoscaler> {
    let spec = &object.spec;
    let target = &spec.scale_target_ref;
    let count = |replicas: i32| u32::try_from(replicas).unwrap_or_default();
    Some(Autoscaler {
        target: WorkloadRef {
            api_version: target.api_version.clone().unwrap_or_else(|| "apps/v1".to_owned()),
            kind: target.kind.clone(),
            name: target.name.clone(),
        },
        min: spec.min_replicas.map_or(1, count),
        max: count(spec.max_replicas),
        min_before: object.annotations().get(MIN_BEFORE).and_then(|text| text.parse().ok()),
    })
}

pub(super) fn budget(object: &PodDisruptionBudget) -> Option<Budget> {
    let spec = object.spec.as_ref()?;
    let IntOrString::Int(min_available) = spec.min_available.as_ref()? else { return None };
    Some(Budget {
        selector: selector(spec.selector.as_ref()?)?,
        min_available: u32::try_from(*min_available).unwrap_or_default(),
    })
}

pub(super) fn secret(secret: &Secret) -> Option<SecretData> {
    let label = secret.labels().get(USE_LABEL)?.clone();
    let value = |(key, bytes): (&String, &k8s_openapi::ByteString)| {
        (key.clone(), bytes.0.iter().take(MAX_BYTES + 1).copied().collect())
    };
    Some(SecretData { label, data: secret.data.iter().flatten().map(value).collect() })
}

fn selector(selector: &v1::LabelSelector) -> Option<LabelSelector> {
    let expressions = selector.match_expressions.iter().flatten();
    let expressions = expressions.map(|one| {
        let operator = match one.operator.as_str() {
            "In" => LabelOperator::In,
            "NotIn" => LabelOperator::NotIn,
            "Exists" => LabelOperator::Exists,
            "DoesNotExist" => LabelOperator::DoesNotExist,
            _ => return None,
        };
        Some(LabelRequirement { key: one.key.clone(), operator, values: one.values.clone().unwrap_or_default() })
    });
    Some(LabelSelector {
        match_labels: selector.match_labels.clone().unwrap_or_default(),
        match_expressions: expressions.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wrote_a_spec_last_is_known_by_its_managed_fields() {
        let entry = |manager: &str, minute: u8, subresource: &str, field: &str| {
            json!({"manager": manager, "time": format!("2026-12-01T03:{minute:02}:00Z"), "operation": "Update",
                "subresource": subresource, "fieldsType": "FieldsV1", "fieldsV1": {field: {}}})
        };
        let by = |entries: Value| {
            let object = json!({"apiVersion": API_VERSION, "kind": KIND, "spec": {},
                "metadata": {"name": "a", "namespace": "shop", "managedFields": entries}});
            from_traffic_shift(&serde_json::from_value(object).unwrap()).unwrap().by
        };
        let edited = entry("kubectl-edit", 2, "", "f:spec");
        let all = json!([
            entry("argocd", 1, "", "f:spec"),
            edited,
            entry("tideshift", 3, "status", "f:status"),
            entry("labeller", 4, "", "f:metadata")
        ]);
        assert_eq!(by(all).as_deref(), Some("kubectl-edit at 2026-12-01T03:02:00Z"));
        assert_eq!(by(json!([])), None);
    }

    #[test]
    fn a_pod_is_one_of_the_slices_own_namespace() {
        let pod_of = |target: Value| {
            let slice = json!({
                "metadata": {"name": "a", "namespace": "shop"}, "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": target}],
            });
            let slice = super::slice(&serde_json::from_value(slice).unwrap()).unwrap();
            slice.endpoints[0].pod.clone()
        };
        assert_eq!(pod_of(json!({"kind": "Pod", "name": "a", "namespace": "shop"})).as_deref(), Some("a"));
        assert_eq!(pod_of(json!({"kind": "Pod", "name": "a", "namespace": "vault"})), None);
        assert_eq!(pod_of(json!({"kind": "Node", "name": "a", "namespace": "shop"})), None);
        assert_eq!(pod_of(Value::Null), None);
    }
}
