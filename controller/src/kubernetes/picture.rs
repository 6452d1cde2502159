//! What is known of the clusters: the few fields of their objects that matter here, by cluster and namespace.

use std::collections::{BTreeMap, BTreeSet};
use tideshift_core::shift::{LabelSelector, WorkloadRef};

/// A namespace of a cluster; no cluster is the controller's own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The cluster's name, as documents say it.
    pub cluster: Option<String>,
    /// The namespace.
    pub namespace: String,
}

/// Everything that is known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Picture {
    /// By place.
    pub views: BTreeMap<Place, View>,
    /// The clusters that cannot be seen, and why; the controller's own has no name.
    pub lost: BTreeMap<Option<String>, String>,
    /// The places that are not watched, and why: there is no such cluster, or it is not open to documents of the namespace.
    pub closed: BTreeMap<Place, String>,
}

/// What is known of one namespace.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// EndpointSlices by name.
    pub slices: Table<Slice>,
    /// The labels of pods, by the pods' names.
    pub pods: Table<BTreeMap<String, String>>,
    /// Workloads, by what documents call them; one table for each kind.
    pub workloads: BTreeMap<(String, String), Table<Workload>>,
    /// HorizontalPodAutoscalers by name.
    pub autoscalers: Table<Autoscaler>,
    /// PodDisruptionBudgets by name.
    pub budgets: Table<Budget>,
}

/// Objects of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Table<T> {
    /// By name.
    pub objects: BTreeMap<String, T>,
    /// Whether all of them have been seen.
    pub synced: bool,
    /// Why they cannot be seen now, if so; what is here is what was seen last.
    pub lost: Option<String>,
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

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), synced: false, lost: None }
    }
}

impl<T> Table<T> {
    /// Why its objects are not all known, if so.
    fn unseen(&self, what: &str, namespace: &str) -> Option<String> {
        match (&self.lost, self.synced) {
            (Some(why), _) => Some(format!("{what} in namespace {namespace} cannot be seen: {why}")),
            (None, false) => Some(format!("{what} in namespace {namespace} have not been seen yet")),
            (None, true) => None,
        }
    }
}

impl Place {
    /// How people speak of the cluster.
    pub fn cluster_name(&self) -> String {
        self.cluster.as_ref().map_or_else(|| "this cluster".to_owned(), |cluster| format!("cluster {cluster}"))
    }
}

impl Picture {
    /// What is known of a place.
    pub fn view(&self, place: &Place) -> Option<&View> {
        self.views.get(place)
    }

    /// Why something of what a version needs to be known there is not, if so.
    pub fn unseen(&self, place: &Place, needs: &BTreeSet<Need>) -> Option<String> {
        if let Some(why) = self.closed.get(place).or_else(|| self.lost.get(&place.cluster)) {
            return Some(format!("{} cannot be seen: {why}", place.cluster_name()));
        }
        let nothing = View::default();
        let view = self.view(place).unwrap_or(&nothing);
        let of = |what: String| {
            place.cluster.as_ref().map_or(what.clone(), |cluster| format!("{what} of cluster {cluster}"))
        };
        needs.iter().find_map(|need| {
            let namespace = &place.namespace;
            match need {
                Need::Slices => view.slices.unseen(&of("EndpointSlices".to_owned()), namespace),
                Need::Pods => view.pods.unseen(&of("pods".to_owned()), namespace),
                Need::Autoscalers => view.autoscalers.unseen(&of("HorizontalPodAutoscalers".to_owned()), namespace),
                Need::Budgets => view.budgets.unseen(&of("PodDisruptionBudgets".to_owned()), namespace),
                Need::Workloads { api_version, kind } => {
                    let table = view.workloads.get(&(api_version.clone(), kind.clone()));
                    table.unwrap_or(&Table::default()).unseen(&of(format!("{kind}s")), namespace)
                }
            }
        })
    }
}

/// A kind of object that must be watched in a place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
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
}
