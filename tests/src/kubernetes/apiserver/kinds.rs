//! The kinds of objects: some of Kubernetes' own, and those of installed CRDs.

use serde_json::{Value, json};

/// The paths of a kind's scale subresource, as JSON pointers.
#[derive(Clone, Debug)]
pub(super) struct ScalePaths {
    pub(super) spec_replicas: String,
    pub(super) status_replicas: String,
    /// A string or a label selector.
    pub(super) selector: Option<String>,
}

/// A kind of objects, in its one version.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    pub(super) group: String,
    pub(super) version: String,
    pub(super) kind: String,
    pub(super) plural: String,
    pub(super) singular: String,
    pub(super) short_names: Vec<String>,
    pub(super) namespaced: bool,
    /// Whether it has a status subresource.
    pub(super) status: bool,
    pub(super) scale: Option<ScalePaths>,
    /// Whether `metadata.generation` counts changes of its specification.
    pub(super) generation: bool,
    /// The `openAPIV3Schema`, if it comes from a CRD.
    pub(super) schema: Option<Value>,
}

impl Kind {
    /// `PLURAL.GROUP`, or `PLURAL` in the core group: its name in messages and helpers.
    pub(super) fn resource(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Whether it comes from a CRD.
    pub(super) fn custom(&self) -> bool {
        self.schema.is_some()
    }

    /// Whether it is a review, which can only be created and is answered.
    pub(super) fn review(&self) -> bool {
        matches!(self.group.as_str(), "authentication.k8s.io" | "authorization.k8s.io")
    }

    /// The kind that a CRD defines, in its storage version.
    pub(super) fn of_crd(crd: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let spec = &crd["spec"];
        let names = &spec["names"];
        let version = spec["versions"].as_array()?.iter().find(|version| version["storage"] == true)?;
        let pointer = |path: &Value| text(path).map(|path| path.replace('.', "/"));
        let scale = &version["subresources"]["scale"];
        let scale = pointer(&scale["specReplicasPath"]).map(|spec_replicas| ScalePaths {
            spec_replicas,
            status_replicas: pointer(&scale["statusReplicasPath"]).unwrap_or_default(),
            selector: pointer(&scale["labelSelectorPath"]),
        });
        let kind = text(&names["kind"])?;
        Some(Self {
            group: text(&spec["group"])?,
            version: text(&version["name"])?,
            plural: text(&names["plural"])?,
            singular: text(&names["singular"]).unwrap_or_else(|| kind.to_lowercase()),
            short_names: names["shortNames"].as_array().into_iter().flatten().filter_map(text).collect(),
            namespaced: spec["scope"] == "Namespaced",
            status: version["subresources"]["status"].is_object(),
            scale,
            generation: true,
            schema: Some(version["schema"]["openAPIV3Schema"].clone()),
            kind,
        })
    }
}

/// Properties of a built-in kind.
const NAMESPACED: u8 = 1;
const STATUS: u8 = 2;
const SCALE: u8 = 4;
const GENERATION: u8 = 8;
const WORKLOAD: u8 = NAMESPACED | STATUS | SCALE | GENERATION;

/// Group, version, kind, plural, short names, properties.
type BuiltIn = (&'static str, &'static str, &'static str, &'static str, &'static [&'static str], u8);

const BUILT_IN: [BuiltIn; 28] = [
    ("", "v1", "ConfigMap", "configmaps", &["cm"], NAMESPACED),
    ("", "v1", "Event", "events", &["ev"], NAMESPACED),
    ("", "v1", "Namespace", "namespaces", &["ns"], STATUS),
    ("", "v1", "Node", "nodes", &["no"], STATUS),
    ("", "v1", "Pod", "pods", &["po"], NAMESPACED | STATUS | GENERATION),
    ("", "v1", "Secret", "secrets", &[], NAMESPACED),
    ("", "v1", "Service", "services", &["svc"], NAMESPACED | STATUS),
    ("", "v1", "ServiceAccount", "serviceaccounts", &["sa"], NAMESPACED),
    (
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        &["crd"],
        STATUS | GENERATION,
    ),
    ("apps", "v1", "DaemonSet", "daemonsets", &["ds"], NAMESPACED | STATUS | GENERATION),
    ("apps", "v1", "Deployment", "deployments", &["deploy"], WORKLOAD),
    ("apps", "v1", "ReplicaSet", "replicasets", &["rs"], WORKLOAD),
    ("apps", "v1", "StatefulSet", "statefulsets", &["sts"], WORKLOAD),
    ("authentication.k8s.io", "v1", "TokenReview", "tokenreviews", &[], 0),
    ("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", &[], 0),
    ("authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews", &[], 0),
    ("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", &["hpa"], NAMESPACED | STATUS),
    ("batch", "v1", "Job", "jobs", &[], NAMESPACED | STATUS | GENERATION),
    ("coordination.k8s.io", "v1", "Lease", "leases", &[], NAMESPACED),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", &[], NAMESPACED | GENERATION),
    ("events.k8s.io", "v1", "Event", "events", &["ev"], NAMESPACED),
    ("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", &["netpol"], NAMESPACED | GENERATION),
    ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", &["pdb"], NAMESPACED | STATUS | GENERATION),
    ("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", &[], 0),
    ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings", &[], 0),
    ("rbac.authorization.k8s.io", "v1", "Role", "roles", &[], NAMESPACED),
    ("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", &[], NAMESPACED),
    ("storage.k8s.io", "v1", "StorageClass", "storageclasses", &["sc"], 0),
];

/// The kinds that exist without any CRD.
pub(super) fn built_in() -> impl Iterator<Item = Kind> {
    BUILT_IN.into_iter().map(|(group, version, kind, plural, short_names, has)| Kind {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
        singular: kind.to_lowercase(),
        short_names: short_names.iter().map(|&name| name.to_owned()).collect(),
        namespaced: has & NAMESPACED != 0,
        status: has & STATUS != 0,
        scale: (has & SCALE != 0).then(|| ScalePaths {
            spec_replicas: "/spec/replicas".to_owned(),
            status_replicas: "/status/replicas".to_owned(),
            selector: Some("/spec/selector".to_owned()),
        }),
        generation: has & GENERATION != 0,
        schema: None,
    })
}

/// A CRD of Argo Rollouts, as far as its scale subresource is concerned.
pub fn rollouts_crd() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": "rollouts.argoproj.io" },
        "spec": {
            "group": "argoproj.io",
            "scope": "Namespaced",
            "names": { "kind": "Rollout", "plural": "rollouts", "singular": "rollout", "shortNames": ["ro"] },
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
                "subresources": {
                    "status": {},
                    "scale": {
                        "specReplicasPath": ".spec.replicas",
                        "statusReplicasPath": ".status.HPAReplicas",
                        "labelSelectorPath": ".status.selector",
                    },
                },
            }],
        },
    })
}
