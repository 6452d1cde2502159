//! Informers: watch the objects that documents refer to, in every cluster, and resolve the documents. There is one
//! watch for each kind and namespace that some document needs, and no polling.
//!
//! A watch records objects that differ from the cached state, with what the change can affect ([`News`]). Only the
//! affected documents are resolved again, on a blocking thread and without a lock that other tasks need.

use crate::admission::{Admitted, Held, Size};
use crate::kubernetes::admission::{admit, admit_literals, literal_fields};
use crate::kubernetes::cache::{
    Changes, ClusterCache, NamespaceCache, Objects, ResourceKind, SecretData, Store, Workload, slice_key,
};
use crate::kubernetes::convert::{SERVICE_NAME, TrafficShiftObject, USE_LABEL};
use crate::kubernetes::endpoints::{Owner, Resolved};
use crate::kubernetes::{Clusters, Retry, convert, endpoints, reason};
use crate::namespace_ref::NamespaceRef;
use crate::readiness::DiscoveryInfo;
use crate::reconciler::Remains;
use crate::secret_values::SecretValues;
use crate::{admission, secret_values};
use futures_util::StreamExt;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DynamicObject};
use kube::core::PartialObjectMeta;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tideshift_core::decode::Errors;
use tideshift_core::shift::{OnDelete, TrafficShift};
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, interval, sleep_until, timeout, timeout_at};

/// The interval and timeout of the health check of each cluster.
const LOOK: Duration = Duration::from_secs(2);

/// How long a deleted TrafficShift stays in force. If all are deleted because the CRD is deleted, that is known by
/// then.
const DELETE_GRACE: Duration = Duration::from_secs(2);

/// At most one part in `REST` of the time is spent on resolving: while changes cause much work, more of them are
/// batched.
const REST: u32 = 4;
/// The maximum delay for batching.
const MAX_REST: Duration = Duration::from_secs(1);

/// A document with its endpoints, and as written.
pub type Document = (TrafficShift, Value);

/// The result of resolving everything that is watched.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The documents; the same list as before if it, `outlook`, `errors` and `hidden` are unchanged.
    pub documents: Arc<Vec<Arc<Document>>>,
    /// What discovery knows beyond the documents.
    pub outlook: Arc<DiscoveryInfo>,
    /// The errors, one line each.
    pub errors: Vec<String>,
    /// The namespaces whose TrafficShifts cannot be watched; `None` stands for all.
    pub hidden: Vec<Option<String>>,
    /// Documents that are being deleted, as written.
    pub deleted: Vec<(TrafficShift, Value)>,
    /// Deleted documents that still serve traffic, with their endpoints.
    pub gone: BTreeMap<String, TrafficShift>,
    /// The resources, by rollout; each the same as before if it and its endpoints are unchanged.
    pub objects: Arc<BTreeMap<String, Arc<Object>>>,
    /// The cached state, for scaling.
    pub picture: Arc<ClusterCache>,
    /// The secrets that documents refer to by secretRef.
    pub secrets: Arc<SecretValues>,
    /// Whether anything has been resolved.
    seen: bool,
}

impl Snapshot {
    /// Whether nothing has been resolved yet.
    pub fn is_nothing(&self) -> bool {
        !self.seen
    }

    /// A copy of the documents.
    pub fn documents(&self) -> Vec<Document> {
        self.documents.iter().map(|document| Document::clone(document)).collect()
    }
}

/// A TrafficShift as a resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid, for Events.
    pub uid: String,
    /// The generation that is in force.
    pub generation: i64,
    /// The error in its current version; the previous version stays in force.
    pub error: Option<String>,
    /// The last writer of its spec, and when, if known.
    pub by: Option<String>,
    /// The fields with a literal secret in the document in force; only documents from before literals were refused may
    /// have any.
    pub literals: Vec<String>,
    /// Whether it refers to Secrets.
    pub has_references: bool,
    /// Whether it is being deleted.
    pub is_deleted: bool,
    /// Whether it has the finalizer.
    pub is_held: bool,
    /// Whether it should have the finalizer while it exists.
    pub holds: bool,
}

/// The state that watches record.
#[derive(Debug, Default)]
struct WatchState {
    picture: ClusterCache,
    shifts: BTreeMap<Option<String>, Store<TrafficShiftObject>>,
    news: News,
}

/// Changes since the last pass.
#[derive(Debug, Default)]
struct News {
    /// A TrafficShift has changed.
    shifts: bool,
    /// A Secret that they refer to has changed.
    secrets: bool,
    places: BTreeMap<NamespaceRef, Changes>,
    /// Clusters that have become reachable or unreachable.
    clusters: BTreeSet<Option<String>>,
}

impl News {
    fn place(&mut self, place: &NamespaceRef) -> &mut Changes {
        if !self.places.contains_key(place) {
            self.places.insert(place.clone(), Changes::default());
        }
        self.places.entry(place.clone()).or_default()
    }
}

/// The state shared by all watches.
#[derive(Debug, Clone, Default)]
struct SharedState {
    sight: Arc<Mutex<WatchState>>,
    changed: Arc<Notify>,
}

impl SharedState {
    fn lock(&self) -> MutexGuard<'_, WatchState> {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies a change, and marks the state as changed if the change returns true.
    fn write(&self, write: impl FnOnce(&mut WatchState) -> bool) {
        let is_news = write(&mut self.lock());
        if is_news {
            self.changed.notify_one();
        }
    }
}

/// Owns the watches; dropping it ends them.
#[derive(Debug)]
pub struct Informers {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    remains: watch::Sender<Arc<Remains>>,
    _tasks: JoinSet<()>,
}

impl Informers {
    /// Starts watching. An empty `namespaces` means all namespaces.
    pub fn open(clusters: Clusters, namespaces: &BTreeSet<String>) -> Self {
        let (send, snapshot) = watch::channel(Arc::default());
        let notes = SharedState::default();
        let mut tasks = JoinSet::new();
        let scopes: Vec<Option<String>> = match namespaces.is_empty() {
            true => vec![None],
            false => namespaces.iter().cloned().map(Some).collect(),
        };
        for scope in scopes {
            tasks.spawn(follow_shifts(clusters.home(), scope, notes.clone()));
        }
        let (remains, of_control) = watch::channel(Arc::default());
        let watches = WatchManager::new(clusters, notes, of_control);
        tasks.spawn(watches.run(send));
        Self { snapshot, remains, _tasks: tasks }
    }

    /// The channel for documents that are deleted and still serve traffic, which must also be watched.
    pub fn remains(&self) -> watch::Sender<Arc<Remains>> {
        self.remains.clone()
    }

    /// The current and future snapshots. The first one comes once all TrafficShifts are listed, or have failed to list.
    pub fn snapshot(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.clone()
    }
}

/// A task that is aborted when this is dropped.
#[derive(Debug)]
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What is watched in a cluster; `None`: the health of the cluster itself.
type Watched = (Option<String>, Option<(NamespaceRef, ResourceKind)>);

/// A resource, and the document in it.
type ReadObject = (Arc<TrafficShiftObject>, Result<Arc<Held>, Errors>);

/// The watches that documents need, and the documents resolved from them.
struct WatchManager {
    clusters: Clusters,
    notes: SharedState,
    /// What has left the documents and still serves traffic: the current value, and the last one that was processed.
    of_control: watch::Receiver<Arc<Remains>>,
    remains: Arc<Remains>,
    running: BTreeMap<Watched, Running>,
    /// The resources as last read, by rollout.
    read: BTreeMap<String, ReadObject>,
    /// The last valid documents, by rollout, and their generations.
    good: BTreeMap<String, Arc<Held>>,
    generations: BTreeMap<String, i64>,
    /// The documents in force, oldest resource first.
    in_force: Vec<InForce>,
    /// The errors of resources, by rollout and in total.
    refused: BTreeMap<String, String>,
    errors: Vec<String>,
    /// The last snapshot.
    snapshot: Snapshot,
}

/// A document in force, and its last resolution.
struct InForce {
    held: Arc<Held>,
    /// With the removed versions that still serve traffic.
    shift: TrafficShift,
    /// Whether the document is deleted and still serves traffic.
    is_gone: bool,
    needs: BTreeMap<NamespaceRef, BTreeSet<ResourceKind>>,
    /// None before the first resolution.
    document: Option<Arc<Document>>,
    outlook: DiscoveryInfo,
    owners: Vec<Owner>,
}

impl InForce {
    fn new(held: Arc<Held>, shift: TrafficShift, is_gone: bool) -> Self {
        let needs = endpoints::needs(&shift);
        Self { held, shift, is_gone, needs, document: None, outlook: DiscoveryInfo::default(), owners: Vec::new() }
    }
}

impl WatchManager {
    fn new(clusters: Clusters, notes: SharedState, of_control: watch::Receiver<Arc<Remains>>) -> Self {
        Self {
            clusters,
            notes,
            of_control,
            remains: Arc::default(),
            running: BTreeMap::new(),
            read: BTreeMap::new(),
            good: BTreeMap::new(),
            generations: BTreeMap::new(),
            in_force: Vec::new(),
            refused: BTreeMap::new(),
            errors: Vec::new(),
            snapshot: Snapshot::default(),
        }
    }

    async fn run(mut self, snapshot: watch::Sender<Arc<Snapshot>>) {
        let mut of_clusters = self.clusters.changes();
        let mut rest = Instant::now();
        loop {
            let mut have_changed = BTreeSet::new();
            tokio::select! {
                () = self.notes.changed.notified() => {}
                Ok(()) = self.of_control.changed() => {}
                Ok(()) = of_clusters.changed() => have_changed = self.clusters.take_changed(),
            }
            sleep_until(rest).await;
            let began = Instant::now();
            let looking = tokio::task::spawn_blocking(move || {
                let seen = self.look(have_changed);
                (self, seen)
            });
            let Ok((watches, seen)) = looking.await else { return };
            self = watches;
            if let Some(seen) = seen {
                snapshot.send_replace(Arc::new(seen));
            }
            rest = Instant::now() + MAX_REST.min(began.elapsed() * REST);
        }
    }

    /// Resolves what has changed and starts the watches that it needs. `None` if nothing has changed, or not all
    /// TrafficShifts have been listed.
    fn look(&mut self, clusters: BTreeSet<String>) -> Option<Snapshot> {
        for cluster in &clusters {
            self.running.retain(|(of, _), _| of.as_ref() != Some(cluster));
        }
        let (mut news, shifts) = {
            let mut sight = self.notes.lock();
            let of = |place: &NamespaceRef| place.cluster.as_ref().is_some_and(|cluster| clusters.contains(cluster));
            sight.picture.views.retain(|place, _| !of(place));
            sight.news.clusters.extend(clusters.iter().cloned().map(Some));
            let is_complete = sight.shifts.values().all(|table| table.synced || table.lost.is_some());
            if !is_complete || sight.shifts.is_empty() {
                return None;
            }
            (std::mem::take(&mut sight.news), sight.shifts.clone())
        };
        let is_first = self.snapshot.is_nothing();
        let remains = self.of_control.borrow_and_update().clone();
        let remain_others = !Arc::ptr_eq(&remains, &self.remains);
        self.remains = remains;
        let mut are_others = is_first || remain_others;
        if news.shifts || are_others {
            are_others |= self.read(&shifts, remain_others);
        }
        if are_others || !clusters.is_empty() {
            self.watch(&mut news);
        }
        let picture = self.notes.lock().picture.clone();
        let touched = self.resolve(&news, &picture);
        let (mut errors, mut hidden) = (Vec::new(), Vec::new());
        for (scope, table) in &shifts {
            let Some(why) = &table.lost else { continue };
            let of = scope.as_ref().map_or_else(String::new, |namespace| format!(" in namespace {namespace}"));
            errors.push(format!("TrafficShifts{of} cannot be seen: {why}; what they said before stays in force"));
            if !table.synced {
                hidden.push(scope.clone());
            }
        }
        errors.extend(self.errors.iter().cloned());
        are_others |= !touched.is_empty() || (&errors, &hidden) != (&self.snapshot.errors, &self.snapshot.hidden);
        if !are_others && !news.shifts && !news.secrets && news.places.is_empty() && news.clusters.is_empty() {
            return None;
        }
        if are_others {
            let (gone, there): (Vec<_>, Vec<_>) = self.in_force.iter().partition(|one| one.is_gone);
            self.snapshot.documents = Arc::new(there.iter().filter_map(|one| one.document.clone()).collect());
            let gone = gone.iter().filter_map(|one| Some(one.document.as_ref()?.0.clone()));
            self.snapshot.gone = gone.map(|shift| (shift.name.clone(), shift)).collect();
            let all = self.in_force.iter().map(|one| (&one.outlook, one.owners.as_slice()));
            self.snapshot.outlook = Arc::new(endpoints::beyond(all));
        }
        if are_others || news.secrets {
            let shifts = self.in_force.iter().map(|one| &one.held.shift);
            self.snapshot.secrets = Arc::new(endpoints::secrets(shifts, &picture));
        }
        if are_others || news.shifts {
            let deleted = self.read.values().filter(|(written, _)| written.is_deleted);
            let deleted = deleted.filter_map(|(_, held)| held.as_ref().ok());
            self.snapshot.deleted = deleted.map(|held| (held.shift.clone(), held.document.clone())).collect();
            self.snapshot.objects = Arc::new(self.objects(&touched));
        }
        (self.snapshot.errors, self.snapshot.hidden, self.snapshot.seen) = (errors, hidden, true);
        self.snapshot.picture = Arc::new(picture);
        Some(self.snapshot.clone())
    }

    /// Resolves the documents that a change may affect. Returns the rollouts whose document differs.
    fn resolve(&mut self, news: &News, picture: &ClusterCache) -> BTreeSet<String> {
        let mut touched = BTreeSet::new();
        let nothing = NamespaceCache::default();
        for one in &mut self.in_force {
            let concerns = |place: &NamespaceRef| {
                let changes = news.places.get(place);
                news.clusters.contains(&place.cluster)
                    || changes.is_some_and(|changes| {
                        endpoints::depends(&one.shift, picture.view(place).unwrap_or(&nothing), changes)
                    })
            };
            if one.document.is_some() && !one.needs.keys().any(concerns) {
                continue;
            }
            let Resolved { shift, outlook, owners } = endpoints::resolve_one(one.shift.clone(), picture);
            let before = one.document.as_ref().map(|document| &document.0);
            if before != Some(&shift) || outlook != one.outlook || owners != one.owners {
                touched.insert(shift.name.clone());
                one.document = Some(Arc::new((shift, one.held.document.clone())));
                (one.outlook, one.owners) = (outlook, owners);
            }
        }
        touched
    }

    /// Reads the resources. An invalid resource stays as it was, and of two conflicting documents the one already in
    /// force wins, otherwise the older resource. Returns whether the documents in force have changed.
    fn read(&mut self, shifts: &BTreeMap<Option<String>, Store<TrafficShiftObject>>, remain_others: bool) -> bool {
        let all = shifts.values().flat_map(|table| table.objects.all().values());
        let mut written: Vec<(String, &Arc<TrafficShiftObject>)> =
            all.map(|written| (written.rollout(), written)).collect();
        written.sort_by(|(_, a), (_, b)| (a.created, &a.uid).cmp(&(b.created, &b.uid)));
        let mut read = std::mem::take(&mut self.read);
        for (rollout, written) in &written {
            let before = read.remove(rollout).filter(|(before, _)| before.document == written.document);
            let document = before.map_or_else(|| self.read_one(rollout, written), |(_, document)| document);
            self.read.insert(rollout.clone(), ((*written).clone(), document));
        }
        let there = written.iter().filter(|(_, written)| !written.is_deleted);
        let documents = there.map(|(rollout, _)| (rollout.clone(), self.read[rollout].1.clone()));
        let Admitted { held, refused } = admission::agree(&self.good, documents);
        self.errors.clear();
        let mut generations = BTreeMap::new();
        for (rollout, written) in &written {
            let error = refused.get(rollout).map(Errors::to_string);
            let lines = error.iter().flat_map(|error| error.lines());
            self.errors.extend(lines.map(|line| format!("{}/{}: {line}", written.namespace, written.name)));
            let generation = match (&error, held.contains_key(rollout)) {
                (None, _) => written.generation,
                (Some(_), true) => self.generations.get(rollout).copied().unwrap_or_default(),
                (Some(_), false) => 0,
            };
            generations.insert(rollout.clone(), generation);
        }
        self.refused = refused.into_iter().map(|(rollout, errors)| (rollout, errors.to_string())).collect();
        (self.generations, self.good) = (generations, held);
        let before = std::mem::take(&mut self.in_force);
        let order: Vec<_> = before.iter().map(|one| one.held.clone()).collect();
        let mut before: BTreeMap<_, _> = before.into_iter().map(|one| (one.held.shift.name.clone(), one)).collect();
        for held in written.iter().filter_map(|(rollout, _)| self.good.get(rollout)) {
            let is_same = |one: &InForce| Arc::ptr_eq(&one.held, held) && !one.is_gone && !remain_others;
            let same = before.remove(&held.shift.name).filter(is_same);
            let new = || {
                let mut shift = held.shift.clone();
                self.remains.add_to(&mut shift);
                InForce::new(held.clone(), shift, false)
            };
            self.in_force.push(same.unwrap_or_else(new));
        }
        for (name, shift) in self.remains.documents.iter().filter(|(name, _)| !self.good.contains_key(*name)) {
            let same = before.remove(name).filter(|one| one.is_gone && !remain_others);
            let held = || Held { shift: shift.clone(), document: Value::Null, size: Size::default() };
            self.in_force.push(same.unwrap_or_else(|| InForce::new(Arc::new(held()), shift.clone(), true)));
        }
        let is_same = |(one, before): (&InForce, &Arc<Held>)| Arc::ptr_eq(&one.held, before);
        self.in_force.len() != order.len() || !self.in_force.iter().zip(&order).all(is_same)
    }

    fn read_one(&self, rollout: &str, written: &TrafficShiftObject) -> Result<Arc<Held>, Errors> {
        let before = self.good.get(rollout);
        if let Some(before) = before.filter(|before| before.document == written.document) {
            return Ok(before.clone());
        }
        let shift = TrafficShift::read(&written.document)?.qualified();
        admit(&shift).map_err(Errors::of_document)?;
        // A document that was in force with a literal secret keeps it across a restart.
        if before.is_some() || !written.was_in_force {
            admit_literals(&shift, before.map(|before| &before.shift)).map_err(Errors::of_document)?;
        }
        let size = admission::check(&shift, &written.document)?;
        Ok(Arc::new(Held { shift, document: written.document.clone(), size }))
    }

    /// The resources, each the same as before if it and its document are unchanged.
    fn objects(&self, touched: &BTreeSet<String>) -> BTreeMap<String, Arc<Object>> {
        let object = |(rollout, (written, _)): (&String, &(Arc<TrafficShiftObject>, _))| {
            let held = self.good.get(rollout);
            let now = Object {
                namespace: written.namespace.clone(),
                name: written.name.clone(),
                uid: written.uid.clone(),
                generation: self.generations.get(rollout).copied().unwrap_or_default(),
                error: self.refused.get(rollout).cloned(),
                by: written.by.clone(),
                literals: held.map_or_else(Vec::new, |held| literal_fields(&held.shift)),
                has_references: held.is_some_and(|held| !secret_values::references(&held.shift).is_empty()),
                is_deleted: written.is_deleted,
                is_held: written.is_held,
                holds: self.good.get(rollout).is_some_and(|held| held.shift.on_delete == OnDelete::Drain),
            };
            let before = self.snapshot.objects.get(rollout).filter(|before| ***before == now);
            let same = before.filter(|_| !touched.contains(rollout)).cloned();
            (rollout.clone(), same.unwrap_or_else(|| Arc::new(now)))
        };
        self.read.iter().map(object).collect()
    }

    /// Starts the watches that documents need, and stops those that none needs any more.
    fn watch(&mut self, news: &mut News) {
        let mut needs: BTreeMap<NamespaceRef, BTreeSet<ResourceKind>> = BTreeMap::new();
        for (place, of_shift) in self.in_force.iter().flat_map(|one| &one.needs) {
            match needs.get_mut(place) {
                Some(needs) => needs.extend(of_shift.iter().cloned()),
                None => _ = needs.insert(place.clone(), of_shift.clone()),
            }
        }
        let notes = self.notes.clone();
        let picture = &mut notes.lock().picture;
        let before = std::mem::take(&mut picture.closed);
        self.watch_all(&needs, picture);
        let are_others = |place: &&NamespaceRef| before.get(*place) != picture.closed.get(*place);
        for place in before.keys().chain(picture.closed.keys()).filter(are_others) {
            news.place(place).all = true;
        }
    }

    fn watch_all(&mut self, needs: &BTreeMap<NamespaceRef, BTreeSet<ResourceKind>>, picture: &mut ClusterCache) {
        let home = NamespaceRef { cluster: None, namespace: String::new() };
        let mut clients: BTreeMap<Option<String>, Client> = BTreeMap::new();
        let mut open: BTreeMap<NamespaceRef, BTreeSet<ResourceKind>> = BTreeMap::new();
        for place in needs.keys().chain([&home]) {
            match self.clusters.client(place) {
                Ok(client) => {
                    clients.entry(place.cluster.clone()).or_insert(client);
                    open.insert(place.clone(), needs.get(place).cloned().unwrap_or_default());
                }
                Err(why) => _ = picture.closed.insert(place.clone(), why),
            }
        }
        let needs = &open;
        let wanted = |key: &Watched| match key {
            (cluster, None) => clients.contains_key(cluster),
            (_, Some((place, need))) => needs.get(place).is_some_and(|needs| needs.contains(need)),
        };
        self.running.retain(|key, _| wanted(key));
        picture.views.retain(|place, _| needs.contains_key(place));
        picture.lost.retain(|cluster, _| clients.contains_key(cluster));
        for (place, view) in &mut picture.views {
            let is_needed = |name: &str| {
                let need = ResourceKind::Secret { name: name.to_owned() };
                needs.get(place).is_some_and(|needs| needs.contains(&need))
            };
            view.secrets.retain(|name, _| is_needed(name));
        }
        for (cluster, client) in clients {
            self.running.entry((cluster.clone(), None)).or_insert_with(|| {
                // Counts as unreachable until its first response.
                picture.lost.insert(cluster.clone(), "it has not answered yet".to_owned());
                let look = health_check(client.clone(), cluster.clone(), self.notes.clone());
                Running(tokio::spawn(look).abort_handle())
            });
            for (place, needs) in needs.iter().filter(|(place, _)| place.cluster == cluster) {
                for need in needs {
                    let key = (cluster.clone(), Some((place.clone(), need.clone())));
                    self.running.entry(key).or_insert_with(|| {
                        forget(picture.views.entry(place.clone()).or_default(), need);
                        see(client.clone(), place.clone(), need.clone(), self.notes.clone())
                    });
                }
            }
        }
    }
}

/// Resets a store for a watch that starts.
fn forget(view: &mut NamespaceCache, need: &ResourceKind) {
    match need {
        ResourceKind::Slices => view.slices = Store::default(),
        ResourceKind::Pods => view.pods = Store::default(),
        ResourceKind::Autoscalers => view.autoscalers = Store::default(),
        ResourceKind::Budgets => view.budgets = Store::default(),
        ResourceKind::Workloads { api_version, kind } => {
            view.workloads.insert((api_version.clone(), kind.clone()), Store::default());
        }
        ResourceKind::Secret { name } => _ = view.secrets.insert(name.clone(), Store::default()),
    }
}

/// Polls the health of a cluster: a silent watch may also be a dead connection.
async fn health_check(client: Client, cluster: Option<String>, notes: SharedState) {
    let mut ticks = interval(LOOK);
    loop {
        ticks.tick().await;
        let answer = match timeout(LOOK, client.apiserver_version()).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(reason(&error)),
            Err(_) => Some(format!("no answer within {} s", LOOK.as_secs())),
        };
        let before = notes.lock().picture.lost.get(&cluster).cloned();
        if answer != before {
            let name = cluster.as_deref().unwrap_or("(this one)");
            match &answer {
                Some(why) => tracing::warn!(cluster = name, "cannot be seen: {why}"),
                None => tracing::info!(cluster = name, "in sight"),
            }
            notes.write(|sight| {
                match answer {
                    Some(why) => _ = sight.picture.lost.insert(cluster.clone(), why),
                    None => _ = sight.picture.lost.remove(&cluster),
                }
                sight.news.clusters.insert(cluster.clone())
            });
        }
    }
}

/// Starts watching objects of one kind in one namespace.
fn see(client: Client, place: NamespaceRef, need: ResourceKind, notes: SharedState) -> Running {
    let namespace = place.namespace.clone();
    let task = match need {
        ResourceKind::Slices => {
            let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
            let page = InView { place, table: |view| &mut view.slices, note: Changes::slice };
            let key = |slice: &EndpointSlice| {
                slice_key(slice.labels().get(SERVICE_NAME).map(String::as_str), &slice.name_any())
            };
            tokio::spawn(reflect(api, watcher::Config::default(), notes, page, key, convert::slice, None))
        }
        ResourceKind::Pods => {
            let api: Api<PartialObjectMeta<Pod>> = Api::namespaced(client, &namespace);
            let page = InView { place, table: |view| &mut view.pods, note: Changes::pod };
            tokio::spawn(reflect(
                api,
                watcher::Config::default(),
                notes,
                page,
                ResourceExt::name_any,
                convert::labels,
                None,
            ))
        }
        ResourceKind::Autoscalers => {
            let api: Api<HorizontalPodAutoscaler> = Api::namespaced(client, &namespace);
            let page = InView { place, table: |view| &mut view.autoscalers, note: |_, _, _| () };
            tokio::spawn(reflect(
                api,
                watcher::Config::default(),
                notes,
                page,
                ResourceExt::name_any,
                convert::autoscaler,
                None,
            ))
        }
        ResourceKind::Budgets => {
            let api: Api<PodDisruptionBudget> = Api::namespaced(client, &namespace);
            let page = InView { place, table: |view| &mut view.budgets, note: |_, _, _| () };
            tokio::spawn(reflect(
                api,
                watcher::Config::default(),
                notes,
                page,
                ResourceExt::name_any,
                convert::budget,
                None,
            ))
        }
        ResourceKind::Secret { name } => {
            let api: Api<Secret> = Api::namespaced(client, &namespace);
            // By name, so that no permission to read all Secrets is needed; and by label, so that no other Secret is
            // received.
            let one = watcher::Config::default().fields(&format!("metadata.name={name}")).labels(USE_LABEL);
            let page = OneSecret { place, name };
            tokio::spawn(reflect(api, one, notes, page, ResourceExt::name_any, convert::secret, None))
        }
        ResourceKind::Workloads { api_version, kind } => {
            tokio::spawn(see_workloads(client, place, (api_version, kind), notes))
        }
    };
    Running(task.abort_handle())
}

/// Watches workloads of one kind, once discovery has found the kind.
async fn see_workloads(client: Client, place: NamespaceRef, of: (String, String), notes: SharedState) {
    let namespace = place.namespace.clone();
    let page = Workloads { place, of: of.clone() };
    let mut retry = Retry::default();
    let resource = loop {
        match crate::kubernetes::resource(&client, &of.0, &of.1).await {
            Ok(resource) => break resource,
            Err(why) => notes.write(|sight| page.lose(sight, why)),
        }
        tokio::time::sleep(retry.pause()).await;
    };
    let api: Api<DynamicObject> = Api::namespaced_with(client, &namespace, &resource);
    reflect(api, watcher::Config::default(), notes, page, ResourceExt::name_any, convert::workload, None).await;
}

/// Watches the TrafficShifts of a namespace, or of all namespaces.
async fn follow_shifts(client: Client, scope: Option<String>, notes: SharedState) {
    let resource = crate::kubernetes::traffic_shifts();
    let api: Api<DynamicObject> = match &scope {
        Some(namespace) => Api::namespaced_with(client, namespace, &resource),
        None => Api::all_with(client, &resource),
    };
    let key = |object: &DynamicObject| format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
    reflect(
        api,
        watcher::Config::default(),
        notes,
        Shifts(scope),
        key,
        convert::from_traffic_shift,
        Some(DELETE_GRACE),
    )
    .await;
}

/// The store of objects of one kind.
trait Page: Send {
    /// The cached form of an object.
    type Object: Clone + PartialEq + Send + Sync;

    /// The store within the state.
    fn table<'s>(&self, sight: &'s mut WatchState) -> &'s mut Store<Self::Object>;

    /// Notes what a change of an object may affect.
    fn note(&self, news: &mut News, name: &str, before: Option<&Arc<Self::Object>>, now: Option<&Arc<Self::Object>>);

    /// Notes that all objects have been listed, or can no longer be watched.
    fn note_all(&self, news: &mut News);

    /// Stores the current object. Returns whether it has changed.
    fn put(&self, sight: &mut WatchState, name: String, now: Option<Self::Object>) -> bool {
        let table = self.table(sight);
        let before = table.objects.shared(&name).cloned();
        if before.as_deref() == now.as_ref() {
            return false;
        }
        let now = now.map(Arc::new);
        match &now {
            Some(now) => _ = table.objects.insert(name.clone(), now.clone()),
            None => _ = table.objects.remove(&name),
        }
        self.note(&mut sight.news, &name, before.as_ref(), now.as_ref());
        true
    }

    /// Replaces all objects. Returns whether any has changed.
    fn put_all(&self, sight: &mut WatchState, objects: Objects<Self::Object>) -> bool {
        let table = self.table(sight);
        let comes_into_sight = !table.synced || table.lost.is_some();
        (table.synced, table.lost) = (true, None);
        let before = std::mem::replace(&mut table.objects, objects.clone());
        if comes_into_sight {
            self.note_all(&mut sight.news);
            return true;
        }
        let names: BTreeSet<&String> = before.all().keys().chain(objects.all().keys()).collect();
        let mut is_news = false;
        for name in names {
            let (before, now) = (before.shared(name), objects.shared(name));
            if before != now {
                self.note(&mut sight.news, name, before, now);
                is_news = true;
            }
        }
        is_news
    }

    /// Marks the kind as not watchable. Returns whether that is new.
    fn lose(&self, sight: &mut WatchState, why: String) -> bool {
        let table = self.table(sight);
        if table.lost.as_ref() == Some(&why) {
            return false;
        }
        table.lost = Some(why);
        self.note_all(&mut sight.news);
        true
    }
}

/// The TrafficShifts of a namespace, or of all namespaces.
struct Shifts(Option<String>);

impl Page for Shifts {
    type Object = TrafficShiftObject;

    fn table<'s>(&self, sight: &'s mut WatchState) -> &'s mut Store<TrafficShiftObject> {
        sight.shifts.entry(self.0.clone()).or_default()
    }

    fn note(&self, news: &mut News, _: &str, _: Option<&Arc<TrafficShiftObject>>, _: Option<&Arc<TrafficShiftObject>>) {
        news.shifts = true;
    }

    fn note_all(&self, news: &mut News) {
        news.shifts = true;
    }
}

/// The Secret with this name.
struct OneSecret {
    place: NamespaceRef,
    name: String,
}

impl Page for OneSecret {
    type Object = SecretData;

    fn table<'s>(&self, sight: &'s mut WatchState) -> &'s mut Store<SecretData> {
        let view = sight.picture.views.entry(self.place.clone()).or_default();
        view.secrets.entry(self.name.clone()).or_default()
    }

    fn note(&self, news: &mut News, _: &str, _: Option<&Arc<SecretData>>, _: Option<&Arc<SecretData>>) {
        news.secrets = true;
    }

    fn note_all(&self, news: &mut News) {
        news.secrets = true;
    }
}

/// Notes what an object was and is.
type NoteChange<T> = fn(&mut Changes, Option<&Arc<T>>, Option<&Arc<T>>);

/// Objects that are known by their names alone.
struct InView<T> {
    place: NamespaceRef,
    table: fn(&mut NamespaceCache) -> &mut Store<T>,
    note: NoteChange<T>,
}

impl<T: Clone + PartialEq + Send + Sync> Page for InView<T> {
    type Object = T;

    fn table<'s>(&self, sight: &'s mut WatchState) -> &'s mut Store<T> {
        (self.table)(sight.picture.views.entry(self.place.clone()).or_default())
    }

    fn note(&self, news: &mut News, _: &str, before: Option<&Arc<T>>, now: Option<&Arc<T>>) {
        (self.note)(news.place(&self.place), before, now);
    }

    fn note_all(&self, news: &mut News) {
        news.place(&self.place).all = true;
    }
}

/// Workloads of one kind: the API version, and the name of the kind.
struct Workloads {
    place: NamespaceRef,
    of: (String, String),
}

impl Page for Workloads {
    type Object = Workload;

    fn table<'s>(&self, sight: &'s mut WatchState) -> &'s mut Store<Workload> {
        let view = sight.picture.views.entry(self.place.clone()).or_default();
        view.workloads.entry(self.of.clone()).or_default()
    }

    fn note(&self, news: &mut News, name: &str, _: Option<&Arc<Workload>>, _: Option<&Arc<Workload>>) {
        let (api_version, kind) = self.of.clone();
        news.place(&self.place).workloads.insert((api_version, kind, name.to_owned()));
    }

    fn note_all(&self, news: &mut News) {
        news.place(&self.place).all = true;
    }
}

/// Keeps a store in sync with the cluster until the task is aborted. With a grace period a deleted object stays for
/// that long, and is removed only if the cluster then lists objects without it.
async fn reflect<K, P: Page>(
    api: Api<K>,
    config: watcher::Config,
    notes: SharedState,
    page: P,
    key: impl Fn(&K) -> String,
    view: impl Fn(&K) -> Option<P::Object>,
    farewell: Option<Duration>,
) where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut retry = Retry::default();
    loop {
        let mut events = pin!(crate::kubernetes::watch(api.clone(), config.clone()));
        let mut coming: BTreeMap<String, P::Object> = BTreeMap::new();
        let mut ask_again: Option<Instant> = None;
        loop {
            let event = match ask_again {
                None => events.next().await,
                Some(at) => match timeout_at(at, events.next()).await {
                    Ok(event) => event,
                    Err(_) => break,
                },
            };
            let Some(event) = event else { break };
            match event {
                Ok(watcher::Event::Init) => {}
                Ok(watcher::Event::InitApply(object)) => coming.extend(view(&object).map(|view| (key(&object), view))),
                Ok(watcher::Event::InitDone) => {
                    retry.reset();
                    let objects = std::mem::take(&mut coming).into();
                    notes.write(|sight| page.put_all(sight, objects));
                }
                Ok(watcher::Event::Apply(object)) => {
                    let (key, view) = (key(&object), view(&object));
                    notes.write(|sight| page.put(sight, key, view));
                }
                Ok(watcher::Event::Delete(_)) if farewell.is_some() => {
                    ask_again = ask_again.or(farewell.map(|farewell| Instant::now() + farewell));
                }
                Ok(watcher::Event::Delete(object)) => notes.write(|sight| page.put(sight, key(&object), None)),
                // The watch has expired: list again at once; no change is lost.
                Err(watcher::Error::WatchError(status)) if status.code == 410 => {}
                Err(error) => {
                    coming.clear();
                    let why = crate::kubernetes::watch_reason(&error);
                    tracing::debug!(url = api.resource_url(), "watch: {why}");
                    notes.write(|sight| page.lose(sight, why));
                    // A resumed watch stays silent until something changes. Listing again confirms that the store is
                    // current.
                    if !matches!(error, watcher::Error::InitialListFailed(_)) {
                        break;
                    }
                }
            }
        }
        tokio::time::sleep(retry.pause()).await;
    }
}

#[cfg(test)]
mod tests;
