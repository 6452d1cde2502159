//! Direct access to the objects, without HTTP, permissions and faults: for tests and for components in the test's
//! process.

use std::sync::Arc;

use anyhow::Context as _;
use serde_json::Value;

use super::kinds::Kind;
use super::store::Store;
use super::write::{Part, Writer};
use super::{Shared, patch};
use crate::envoy_fixture::DEADLINE;
use crate::wait::eventually;

/// The objects of a server; clones refer to the same server.
///
/// Resources are named `PLURAL.GROUP`, or `PLURAL` if that is unambiguous; the namespace is empty for cluster-scoped
/// objects.
#[derive(Clone, Debug)]
pub struct Objects {
    pub(super) shared: Arc<Shared>,
}

impl Objects {
    pub(super) fn of(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Waits for a change while the server listens. `false`: there will be no more.
    pub(in crate::kubernetes) async fn changed(&self, since: &mut u64) -> bool {
        let changed = self.shared.head.subscribe().wait_for(|head| *head != *since).await.map(|head| *head);
        let up = self.shared.up.subscribe().wait_for(|up| *up).await.is_ok();
        changed.map(|head| *since = head).is_ok() && up
    }

    /// Every object of a kind.
    pub(in crate::kubernetes) fn all(&self, resource: &str) -> Vec<Arc<Value>> {
        let store = self.shared.store();
        store.kind(resource).iter().flat_map(|kind| store.each(kind)).map(|(_, object)| Arc::clone(object)).collect()
    }

    /// An object, which must be there.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> anyhow::Result<Value> {
        let store = self.shared.store();
        let kind = kind(&store, resource)?;
        Ok(Value::clone(&*store.live(&kind, namespace, name)?))
    }

    /// Every object of a namespace, or of all for an empty one.
    pub fn list(&self, resource: &str, namespace: &str) -> anyhow::Result<Vec<Value>> {
        let store = self.shared.store();
        let kind = kind(&store, resource)?;
        let there = store.each(&kind).filter(|(name, _)| namespace.is_empty() || name.0 == namespace);
        Ok(there.map(|(_, object)| Value::clone(object)).collect())
    }

    /// Creates an object.
    pub fn create(&self, object: Value) -> anyhow::Result<Value> {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        self.shared.write(|store| {
            let kind = kind_of(store, &object)?;
            Ok(Value::clone(&*store.create(&kind, &namespace, object, &writer(Part::Main))?))
        })
    }

    /// Creates or updates an object, like server-side apply with force.
    pub fn apply(&self, object: Value) -> anyhow::Result<Value> {
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (text("namespace"), text("name"));
        self.shared.write(|store| {
            let kind = kind_of(store, &object)?;
            let patch = (patch::Type::Apply, object);
            Ok(Value::clone(&*store.patch(&kind, (&namespace, &name), patch, true, &writer(Part::Main))?))
        })
    }

    /// Changes an object with a merge patch.
    pub fn patch(&self, resource: &str, namespace: &str, name: &str, patch: Value) -> anyhow::Result<Value> {
        self.patch_part(Part::Main, resource, (namespace, name), patch)
    }

    /// Changes the status of an object with a merge patch, which begins with `status`.
    pub fn patch_status(&self, resource: &str, namespace: &str, name: &str, patch: Value) -> anyhow::Result<Value> {
        self.patch_part(Part::Status, resource, (namespace, name), patch)
    }

    fn patch_part(&self, part: Part, resource: &str, name: (&str, &str), patch: Value) -> anyhow::Result<Value> {
        self.shared.write(|store| {
            let kind = kind(store, resource)?;
            Ok(Value::clone(&*store.patch(&kind, name, (patch::Type::Merge, patch), false, &writer(part))?))
        })
    }

    /// Deletes an object like a client: finalizers and the kubelet can delay it.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> anyhow::Result<()> {
        self.shared.write(|store| {
            let kind = kind(store, resource)?;
            store.delete(&kind, namespace, name, &Value::Null, false)?;
            Ok(())
        })
    }

    /// Waits until an object exists and `condition` accepts it, and returns it.
    pub async fn until(
        &self,
        what: &str,
        resource: &str,
        namespace: &str,
        name: &str,
        condition: impl Fn(&Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<Value> {
        eventually(what, DEADLINE, async || {
            let object = self.get(resource, namespace, name)?;
            condition(&object).with_context(|| object.to_string())?;
            Ok(object)
        })
        .await
    }
}

fn kind(store: &Store, resource: &str) -> anyhow::Result<Arc<Kind>> {
    store.kind(resource).with_context(|| format!("no kind {resource:?} is served"))
}

fn kind_of(store: &Store, object: &Value) -> anyhow::Result<Arc<Kind>> {
    store.kind_of(object).with_context(|| format!("no kind {} of {} is served", object["kind"], object["apiVersion"]))
}

fn writer(part: Part) -> Writer {
    Writer { manager: "tests".to_owned(), part, dry_run: false }
}
