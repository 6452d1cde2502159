//! Garbage collection: deletes the dependents of deleted objects.

use std::collections::BTreeSet;

use super::super::apiserver::Objects;
use super::{owner_of, terminating, text};

/// The kinds that own, and those that are owned.
const OWNERS: [&str; 4] = ["deployments.apps", "replicasets.apps", "services", "statefulsets.apps"];
const OWNED: [&str; 3] = ["endpointslices.discovery.k8s.io", "pods", "replicasets.apps"];

pub(super) fn collect(objects: &Objects) {
    let owned: Vec<_> = OWNED.iter().map(|&resource| (resource, objects.all(resource))).collect();
    let owners: Vec<_> = OWNERS.iter().flat_map(|resource| objects.all(resource)).collect();
    let there: BTreeSet<_> = owners.iter().map(|owner| text(owner, "/metadata/uid")).collect();
    for (resource, owned) in &owned {
        for object in owned {
            let owner = owner_of(object);
            if !owner.is_empty() && !there.contains(owner) && !terminating(object) {
                let _ = objects.delete(resource, text(object, "/metadata/namespace"), text(object, "/metadata/name"));
            }
        }
    }
}
