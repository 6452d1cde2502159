//! The cached state of the clusters: the fields of their objects that the controller uses, by cluster and namespace.

use crate::namespace_ref::NamespaceRef;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Bound, Index};
use std::sync::Arc;
use tideshift_core::shift::{LabelSelector, WorkloadRef};

/// The cached state of all clusters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterCache {
    /// By cluster and namespace.
    pub views: BTreeMap<NamespaceRef, NamespaceCache>,
    /// The unreachable clusters, and why; the controller's own cluster has no name.
    pub lost: BTreeMap<Option<String>, String>,
    /// The namespaces that are not watched, and why: the cluster does not exist, or documents of the namespace may not
    /// use it.
    pub closed: BTreeMap<NamespaceRef, String>,
}

/// The cached state of one namespace.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NamespaceCache {
    /// EndpointSlices by [`slice_key`].
    pub slices: Store<Slice>,
    /// The labels of pods, by pod name.
    pub pods: Store<Labels>,
    /// Workloads by name; one store for each API version and kind.
    pub workloads: BTreeMap<(String, String), Store<Workload>>,
    /// HorizontalPodAutoscalers by name.
    pub autoscalers: Store<Autoscaler>,
    /// PodDisruptionBudgets by name.
    pub budgets: Store<Budget>,
    /// The Secrets that documents refer to, by name; each has a store of its own, because each has a watch of its own.
    pub secrets: BTreeMap<String, Store<SecretData>>,
}

/// A Secret that documents may use.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretData {
    /// The allowed use: the value of its label.
    pub label: String,
    /// The data by key; values that exceed the limit are truncated just beyond it.
    pub data: BTreeMap<String, Vec<u8>>,
}

impl fmt::Debug for SecretData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretData").field("label", &self.label).field("keys", &self.data.keys()).finish()
    }
}

/// The labels of a pod.
pub type Labels = BTreeMap<String, String>;

/// Objects of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Store<T> {
    /// By name.
    pub objects: Objects<T>,
    /// Whether the initial list is complete.
    pub synced: bool,
    /// Why the objects cannot be watched at present, if so; the store then holds their last known state.
    pub lost: Option<String>,
}

/// Objects by name. Clones share unchanged objects, so that a snapshot of everything is cheap.
#[derive(Debug, PartialEq)]
pub struct Objects<T>(Arc<BTreeMap<String, Arc<T>>>);

impl<T> Objects<T> {
    /// The object of this name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.get(name).map(Arc::as_ref)
    }

    /// The same, shared.
    pub fn shared(&self, name: &str) -> Option<&Arc<T>> {
        self.0.get(name)
    }

    /// The same, mutable.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut T>
    where
        T: Clone,
    {
        Arc::make_mut(&mut self.0).get_mut(name).map(Arc::make_mut)
    }

    /// Inserts or replaces an object.
    pub fn insert(&mut self, name: String, object: impl Into<Arc<T>>) -> Option<Arc<T>> {
        Arc::make_mut(&mut self.0).insert(name, object.into())
    }

    /// Removes the object of this name.
    pub fn remove(&mut self, name: &str) -> Option<Arc<T>> {
        Arc::make_mut(&mut self.0).remove(name)
    }

    /// All objects with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &T)> {
        self.0.iter().map(|(name, object)| (name, object.as_ref()))
    }

    /// All objects without their names.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.values().map(Arc::as_ref)
    }

    /// The same, shared.
    pub fn all(&self) -> &BTreeMap<String, Arc<T>> {
        &self.0
    }

    /// The number of objects.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> Clone for Objects<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Objects<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Extend<(String, T)> for Objects<T> {
    fn extend<I: IntoIterator<Item = (String, T)>>(&mut self, objects: I) {
        Arc::make_mut(&mut self.0).extend(objects.into_iter().map(|(name, object)| (name, Arc::new(object))));
    }
}

impl<T> FromIterator<(String, T)> for Objects<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(objects: I) -> Self {
        Self(Arc::new(objects.into_iter().map(|(name, object)| (name, Arc::new(object))).collect()))
    }
}

impl<T> From<BTreeMap<String, T>> for Objects<T> {
    fn from(objects: BTreeMap<String, T>) -> Self {
        objects.into_iter().collect()
    }
}

impl<T> Index<&str> for Objects<T> {
    type Output = T;

    fn index(&self, name: &str) -> &T {
        &self.0[name]
    }
}

/// The key of a slice, which keeps the slices of one Service adjacent.
pub fn slice_key(service: Option<&str>, name: &str) -> String {
    format!("{}/{name}", service.unwrap_or_default())
}

impl Objects<Slice> {
    /// The slices of a Service, or all slices.
    pub fn of_service(&self, service: Option<&str>) -> impl Iterator<Item = &Slice> {
        // `0` follows `/` in ASCII: no key lies between.
        let bounds = match service {
            Some(service) => (Bound::Included(format!("{service}/")), Bound::Excluded(format!("{service}0"))),
            None => (Bound::Unbounded, Bound::Unbounded),
        };
        self.0.range::<String, _>(bounds).map(|(_, slice)| slice.as_ref())
    }
}

/// Changes in a namespace that can affect endpoints.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// A whole kind has been listed, or can no longer be watched.
    pub all: bool,
    /// The Services with changed slices.
    pub services: BTreeSet<String>,
    /// The pods with changed endpoints.
    pub endpoints: BTreeSet<String>,
    /// The label sets that pods have now and did not have before, or the reverse.
    pub labels: Vec<Arc<Labels>>,
    /// Changed workloads, by API version, kind and name.
    pub workloads: BTreeSet<(String, String, String)>,
}

impl Changes {
    /// Records that a slice changed from `before` to `now`.
    pub fn slice(&mut self, before: Option<&Arc<Slice>>, now: Option<&Arc<Slice>>) {
        let both = || before.into_iter().chain(now);
        self.services.extend(both().filter_map(|slice| slice.service.clone()));
        let frame = |slice: &Slice| (slice.service.clone(), slice.is_ipv6, slice.ports.clone(), slice.endpoints.len());
        match (before, now) {
            (Some(before), Some(now)) if frame(before) == frame(now) => {
                let pairs = before.endpoints.iter().zip(&now.endpoints).filter(|(before, now)| before != now);
                self.endpoints.extend(pairs.flat_map(|(before, now)| [&before.pod, &now.pod]).flatten().cloned());
            }
            _ => self.endpoints.extend(both().flat_map(|slice| &slice.endpoints).filter_map(|one| one.pod.clone())),
        }
    }

    /// Records a change of a pod's labels.
    pub fn pod(&mut self, before: Option<&Arc<Labels>>, now: Option<&Arc<Labels>>) {
        self.labels.extend(before.into_iter().chain(now).cloned());
    }
}

/// An EndpointSlice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slice {
    /// The Service that it belongs to.
    pub service: Option<String>,
    /// Whether its addresses are IPv6.
    pub is_ipv6: bool,
    /// The names and numbers of its ports.
    pub ports: Vec<(String, u16)>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// An endpoint of an EndpointSlice, with the conditions as Kubernetes defines them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its address; all addresses of an endpoint are equivalent to clients.
    pub address: String,
    /// The pod behind it, in the namespace of the slice.
    pub pod: Option<String>,
    /// Whether it should receive traffic. Unknown counts as yes.
    pub ready: bool,
    /// Whether it responds, independent of `ready`. Defaults to `ready`.
    pub serving: bool,
    /// Whether it is terminating.
    pub terminating: bool,
}

/// A workload that scales a version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// The desired number of pods; 1 by default.
    pub replicas: u32,
    /// The selector of its pods.
    pub selector: Option<LabelSelector>,
}

/// A HorizontalPodAutoscaler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Autoscaler {
    /// The workload that it scales.
    pub target: WorkloadRef,
    /// `minReplicas`; 1 by default.
    pub min: u32,
    /// `maxReplicas`.
    pub max: u32,
    /// The value of `minReplicas` before a rollout raised it, from the annotation.
    pub min_before: Option<u32>,
}

/// A PodDisruptionBudget with a number in `minAvailable`. Budgets with percentages or `maxUnavailable` do not limit a
/// workload that is meant to shrink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// The selector of its pods.
    pub selector: LabelSelector,
    /// The minimum number of available pods.
    pub min_available: u32,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self { objects: Objects::default(), synced: false, lost: None }
    }
}

impl<T> Store<T> {
    /// Why not all objects are known, if so.
    fn unseen(&self, what: &str, namespace: &str) -> Option<String> {
        match (&self.lost, self.synced) {
            (Some(why), _) => Some(format!("{what} in namespace {namespace} cannot be seen: {why}")),
            (None, false) => Some(format!("{what} in namespace {namespace} have not been seen yet")),
            (None, true) => None,
        }
    }
}

impl ClusterCache {
    /// The cached state of a namespace.
    pub fn view(&self, place: &NamespaceRef) -> Option<&NamespaceCache> {
        self.views.get(place)
    }

    /// Why something that a version needs there is unknown, if so.
    pub fn unseen(&self, place: &NamespaceRef, needs: &BTreeSet<ResourceKind>) -> Option<String> {
        if let Some(why) = self.closed.get(place).or_else(|| self.lost.get(&place.cluster)) {
            return Some(format!("{} cannot be seen: {why}", place.cluster_name()));
        }
        let nothing = NamespaceCache::default();
        let view = self.view(place).unwrap_or(&nothing);
        let of = |what: String| {
            place.cluster.as_ref().map_or(what.clone(), |cluster| format!("{what} of cluster {cluster}"))
        };
        needs.iter().find_map(|need| {
            let namespace = &place.namespace;
            match need {
                ResourceKind::Slices => view.slices.unseen(&of("EndpointSlices".to_owned()), namespace),
                ResourceKind::Pods => view.pods.unseen(&of("pods".to_owned()), namespace),
                ResourceKind::Autoscalers => {
                    view.autoscalers.unseen(&of("HorizontalPodAutoscalers".to_owned()), namespace)
                }
                ResourceKind::Budgets => view.budgets.unseen(&of("PodDisruptionBudgets".to_owned()), namespace),
                // A missing Secret has a condition of its own and does not block endpoints.
                ResourceKind::Secret { .. } => None,
                ResourceKind::Workloads { api_version, kind } => {
                    let table = view.workloads.get(&(api_version.clone(), kind.clone()));
                    table.unwrap_or(&Store::default()).unseen(&of(format!("{kind}s")), namespace)
                }
            }
        })
    }
}

/// A kind of object to watch in a namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResourceKind {
    /// EndpointSlices, for endpoints.
    Slices,
    /// Pods, for their labels.
    Pods,
    /// Workloads of one kind.
    Workloads {
        /// The API group and version.
        api_version: String,
        /// The kind.
        kind: String,
    },
    /// HorizontalPodAutoscalers.
    Autoscalers,
    /// PodDisruptionBudgets.
    Budgets,
    /// One Secret that documents refer to.
    Secret {
        /// Its name.
        name: String,
    },
}
