//! The objects and the log of their changes: one resourceVersion for all of them, which only increases. It enforces no
//! rules: `write` decides what may be written.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;

use super::kinds;
use super::kinds::Kind;
use super::refusal::Refusal;

/// Namespace (empty for cluster-scoped objects) and name.
pub(super) type Name = (String, String);

/// The objects of one kind.
pub(super) type Objects = BTreeMap<Name, Arc<Value>>;

/// A change of one object.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) at: Instant,
    pub(super) resource: String,
    pub(super) name: Name,
    /// The previous state; `None` if it was created.
    pub(super) before: Option<Arc<Value>>,
    /// The new state; for a deletion the last state, with the revision of the deletion.
    pub(super) after: Arc<Value>,
    pub(super) deleted: bool,
}

#[derive(Debug)]
pub(super) struct Store {
    revision: u64,
    /// The oldest revision that a watch can resume from.
    compacted: u64,
    objects: BTreeMap<String, Objects>,
    log: VecDeque<Change>,
    kinds: BTreeMap<String, Arc<Kind>>,
    /// Whether objects are accepted only in namespaces that exist.
    pub(super) strict_namespaces: bool,
}

impl Store {
    pub(super) fn new() -> Self {
        let kinds = kinds::built_in().map(|kind| (kind.resource(), Arc::new(kind))).collect();
        // Real servers are never at revision 0 or 1 when the first client connects.
        Self {
            revision: 100,
            compacted: 100,
            objects: BTreeMap::new(),
            log: VecDeque::new(),
            kinds,
            strict_namespaces: false,
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn kinds(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.kinds.values()
    }

    /// The kind called `PLURAL.GROUP`, or `PLURAL` if it is in the core group or in one group only.
    pub(super) fn kind(&self, resource: &str) -> Option<Arc<Kind>> {
        let mut of_that_name = self.kinds().filter(|kind| kind.plural == resource);
        self.kinds.get(resource).or_else(|| of_that_name.next()).cloned()
    }

    pub(super) fn kind_at(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        self.kinds().find(|kind| kind.group == group && kind.version == version && kind.plural == plural).cloned()
    }

    pub(super) fn kind_of(&self, object: &Value) -> Option<Arc<Kind>> {
        self.kinds().find(|kind| object["kind"] == kind.kind && object["apiVersion"] == kind.api_version()).cloned()
    }

    /// The objects of a kind, in order.
    pub(super) fn each(&self, kind: &Kind) -> impl Iterator<Item = (&Name, &Arc<Value>)> + use<'_> {
        self.objects.get(&kind.resource()).into_iter().flatten()
    }

    /// A copy of them.
    pub(super) fn objects(&self, kind: &Kind) -> Objects {
        self.each(kind).map(|(name, object)| (name.clone(), Arc::clone(object))).collect()
    }

    pub(super) fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Option<&Arc<Value>> {
        self.objects.get(&kind.resource())?.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// Stores or removes an object, with the next revision.
    pub(super) fn commit(&mut self, kind: &Kind, name: Name, mut object: Value, deleted: bool) -> Arc<Value> {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let object = Arc::new(object);
        let objects = self.objects.entry(kind.resource()).or_default();
        let before = if deleted { objects.remove(&name) } else { objects.insert(name.clone(), Arc::clone(&object)) };
        let (revision, at, resource) = (self.revision, Instant::now(), kind.resource());
        let after = Arc::clone(&object);
        self.log.push_back(Change { revision, at, resource, name, before, after, deleted });
        if kind.plural == "customresourcedefinitions" {
            self.register(&object, deleted);
        }
        object
    }

    /// Starts or stops serving the kind of a CRD.
    fn register(&mut self, crd: &Value, deleted: bool) {
        let Some(kind) = Kind::of_crd(crd) else { return };
        if deleted {
            for (name, object) in self.objects(&kind) {
                self.commit(&kind, name, Value::clone(&object), true);
            }
            self.kinds.remove(&kind.resource());
        } else {
            self.kinds.insert(kind.resource(), Arc::new(kind));
        }
    }

    /// Rejects a revision that has been compacted.
    pub(super) fn check_kept(&self, revision: u64) -> Result<(), Refusal> {
        if revision < self.compacted { Err(Refusal::expired(revision, self.compacted)) } else { Ok(()) }
    }

    /// Rejects a revision in the future.
    pub(super) fn check_reached(&self, revision: u64) -> Result<(), Refusal> {
        if revision > self.revision { Err(Refusal::too_large(revision, self.revision)) } else { Ok(()) }
    }

    /// The objects of a kind at a revision.
    pub(super) fn objects_at(&self, kind: &Kind, revision: u64) -> Result<Objects, Refusal> {
        self.check_kept(revision)?;
        let mut objects = self.objects(kind);
        let changes: Vec<_> = self.changes_after(kind, revision).collect();
        for change in changes.into_iter().rev() {
            match &change.before {
                Some(before) => objects.insert(change.name.clone(), Arc::clone(before)),
                None => objects.remove(&change.name),
            };
        }
        Ok(objects)
    }

    /// The changes of objects of a kind after a revision, oldest first.
    pub(super) fn changes_after(&self, kind: &Kind, revision: u64) -> impl Iterator<Item = &Change> + use<'_> {
        let from = self.log.partition_point(|change| change.revision <= revision);
        let resource = kind.resource();
        self.log.range(from..).filter(move |change| change.resource == resource)
    }

    /// Compacts the history. The revision advances by one, as if another object had changed: a client that resumes from
    /// the last revision it has seen is too late. Open watches continue.
    pub(super) fn compact(&mut self) {
        self.revision += 1;
        self.compacted = self.revision;
    }
}
