//! What is known of the clusters: the few fields of their objects that matter here, by cluster and namespace.

use crate::namespace_ref::NamespaceRef;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Bound, Index};
use std::sync::Arc;
use tideshift_core::shift::{LabelSelector, WorkloadRef};

/// Everything that is known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterCache {
    /// By place.
    pub views: BTreeMap<NamespaceRef, NamespaceCache>,
    /// The clusters that cannot be seen, and why; the controller's own has no name.
    pub lost: BTreeMap<Option<String>, String>,
    /// The places that are not watched, and why: there is no such cluster, or it is not open to documents of the namespace.
    pub closed: BTreeMap<NamespaceRef, String>,
}

/// What is known of one namespace.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NamespaceCache {
    /// EndpointSlices by [`slice_key`].
    pub slices: Store<Slice>,
    /// The labels of pods, by the pods' names.
    pub pods: Store<Labels>,
    /// Workloads, by what documents call them; one table for each kind.
    pub workloads: BTreeMap<(String, String), Store<Workload>>,
    /// HorizontalPodAutoscalers by name.
    pub autoscalers: Store<Autoscaler>,
    /// PodDisruptionBudgets by name.
    pub budgets: Store<Budget>,
    /// Secrets that documents refer to, by name; one table for each, as each is watched by itself.
    pub secrets: BTreeMap<String, Store<SecretData>>,
}

/// A Secret that documents may use.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretData {
    /// What for: the value of its label.
    pub label: String,
    /// By key; of values that are too long, only as much as shows that.
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
    /// Whether all of them have been seen.
    pub synced: bool,
    /// Why they cannot be seen now, if so; what is here is what was seen last.
    pub lost: Option<String>,
}

/// Objects by name. Copies share what none of them has changed since, so that a picture of everything costs little.
#[derive(Debug, PartialEq)]
pub struct Objects<T>(Arc<BTreeMap<String, Arc<T>>>);

impl<T> Objects<T> {
    /// The object of that name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.get(name).map(Arc::as_ref)
    }

    /// The same, to be shared.
    pub fn shared(&self, name: &str) -> Option<&Arc<T>> {
        self.0.get(name)
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut T>
    where
        T: Clone,
    {
        Arc::make_mut(&mut self.0).get_mut(name).map(Arc::make_mut)
    }

    /// Puts an object in the place of what had its name.
    pub fn insert(&mut self, name: String, object: impl Into<Arc<T>>) -> Option<Arc<T>> {
        Arc::make_mut(&mut self.0).insert(name, object.into())
    }

    /// Takes the object of that name out.
    pub fn remove(&mut self, name: &str) -> Option<Arc<T>> {
        Arc::make_mut(&mut self.0).remove(name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &T)> {
        self.0.iter().map(|(name, object)| (name, object.as_ref()))
    }

    /// The same without names.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.values().map(Arc::as_ref)
    }

    /// The same, to be shared.
    pub fn all(&self) -> &BTreeMap<String, Arc<T>> {
        &self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
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

/// The key of a slice: those of one Service are one after the other.
pub fn slice_key(service: Option<&str>, name: &str) -> String {
    format!("{}/{name}", service.unwrap_or_default())
}

impl Objects<Slice> {
    /// The slices of a Service, or all.
    pub fn of_service(&self, service: Option<&str>) -> impl Iterator<Item = &Slice> {
        // Nothing comes between the slash and the nought after it.
        let bounds = match service {
            Some(service) => (Bound::Included(format!("{service}/")), Bound::Excluded(format!("{service}0"))),
            None => (Bound::Unbounded, Bound::Unbounded),
        };
        self.0.range::<String, _>(bounds).map(|(_, slice)| slice.as_ref())
    }
}

/// What has changed of a namespace, as far as endpoints may depend on it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// All that is known of a kind has come into sight, or has gone out of it.
    pub all: bool,
    /// The Services whose slices have changed.
    pub services: BTreeSet<String>,
    /// The pods that slices say something else of.
    pub endpoints: BTreeSet<String>,
    /// The labels that pods have now and did not have before, or the other way round.
    pub labels: Vec<Arc<Labels>>,
    /// Workloads, by group and version, kind and name.
    pub workloads: BTreeSet<(String, String, String)>,
}

impl Changes {
    /// A slice was as it was `before`, and is as it is `now`.
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

    /// The same of a pod's labels.
    pub fn pod(&mut self, before: Option<&Arc<Labels>>, now: Option<&Arc<Labels>>) {
        self.labels.extend(before.into_iter().chain(now).cloned());
    }
}

/// An EndpointSlice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slice {
    /// The Service that it is of.
    pub service: Option<String>,
    /// Whether its addresses are IPv6.
    pub is_ipv6: bool,
    /// Names and numbers of its ports.
    pub ports: Vec<(String, u16)>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// An endpoint of an EndpointSlice, with the conditions as Kubernetes means them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its address; all of an endpoint's addresses are the same to clients.
    pub address: String,
    /// The pod of the slice's namespace behind it.
    pub pod: Option<String>,
    /// It should get traffic. Unknown counts as yes.
    pub ready: bool,
    /// It answers, whether it should get traffic or not. As `ready` where that is not said.
    pub serving: bool,
    /// It is about to go.
    pub terminating: bool,
}

/// What scales a version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// How many pods it asks for; 1 where it does not say.
    pub replicas: u32,
    /// Which pods are its own.
    pub selector: Option<LabelSelector>,
}

/// A HorizontalPodAutoscaler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Autoscaler {
    /// What it scales.
    pub target: WorkloadRef,
    /// The fewest replicas; 1 where it does not say.
    pub min: u32,
    /// The most.
    pub max: u32,
    /// What the fewest were before a rollout raised them, as the rollout wrote it down.
    pub min_before: Option<u32>,
}

/// A PodDisruptionBudget that promises a number of pods. One that speaks of percentages, or of what may be missing,
/// promises nothing of a workload that is meant to be smaller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// The pods that it speaks of.
    pub selector: LabelSelector,
    /// How many of them there must be.
    pub min_available: u32,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self { objects: Objects::default(), synced: false, lost: None }
    }
}

impl<T> Store<T> {
    /// Why its objects are not all known, if so.
    fn unseen(&self, what: &str, namespace: &str) -> Option<String> {
        match (&self.lost, self.synced) {
            (Some(why), _) => Some(format!("{what} in namespace {namespace} cannot be seen: {why}")),
            (None, false) => Some(format!("{what} in namespace {namespace} have not been seen yet")),
            (None, true) => None,
        }
    }
}

impl ClusterCache {
    /// What is known of a place.
    pub fn view(&self, place: &NamespaceRef) -> Option<&NamespaceCache> {
        self.views.get(place)
    }

    /// Why something of what a version needs to be known there is not, if so.
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
                // What is missing of them has a condition of its own, and holds up no endpoint.
                ResourceKind::Secret { .. } => None,
                ResourceKind::Workloads { api_version, kind } => {
                    let table = view.workloads.get(&(api_version.clone(), kind.clone()));
                    table.unwrap_or(&Store::default()).unseen(&of(format!("{kind}s")), namespace)
                }
            }
        })
    }
}

/// A kind of object that must be watched in a place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResourceKind {
    /// For endpoints.
    Slices,
    /// For their labels.
    Pods,
    /// For what scales a version.
    Workloads {
        /// Group and version.
        api_version: String,
        /// The kind.
        kind: String,
    },
    /// For what else scales it.
    Autoscalers,
    /// For what has been promised of its pods.
    Budgets,
    /// One Secret, for what documents refer to.
    Secret {
        /// Its name.
        name: String,
    },
}
