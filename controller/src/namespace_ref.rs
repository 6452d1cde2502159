//! A namespace of a cluster: where the objects of a version are.

use tideshift_core::shift::{ShiftVersion, TrafficShift};

/// A namespace of a cluster; no cluster is the controller's own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceRef {
    /// The cluster's name, as documents say it.
    pub cluster: Option<String>,
    /// The namespace.
    pub namespace: String,
}

impl NamespaceRef {
    /// How people speak of the cluster.
    pub fn cluster_name(&self) -> String {
        self.cluster.as_ref().map_or_else(|| "this cluster".to_owned(), |cluster| format!("cluster {cluster}"))
    }
}

impl NamespaceRef {
    /// Where a version of a document runs.
    pub fn of(shift: &TrafficShift, version: &ShiftVersion) -> Self {
        let namespace = shift.namespace.clone().unwrap_or_else(|| "default".to_owned());
        Self { cluster: version.cluster.clone(), namespace }
    }
}
