//! Watches what documents speak of, in every cluster, and says what follows for them: one watch for each kind and
//! namespace that some document needs, none that nobody needs, and no polling.

use super::admission::admit;
use super::picture::{Need, Picture, Place, Table, View, Workload};
use super::views::{self, Written};
use super::{Clusters, Retry, reason, resolve};
use crate::admission::{self, Admitted, Held};
use crate::readiness::Outlook;
use futures_util::StreamExt;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::Pod;
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
use tideshift_core::shift::TrafficShift;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, interval, timeout, timeout_at};

/// How often each cluster is asked whether it is there, and how long it may take to say so.
const LOOK: Duration = Duration::from_secs(2);

/// How long a TrafficShift that is gone stays in force. If they all go because the CRD goes, that is known by then.
const FAREWELL: Duration = Duration::from_secs(2);

/// What follows from everything that is seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scene {
    /// The documents, with their endpoints, and as they were written.
    pub documents: Vec<(TrafficShift, Value)>,
    /// What is known beyond them.
    pub outlook: Arc<Outlook>,
    /// What is wrong, one line each.
    pub errors: Vec<String>,
    /// The namespaces whose TrafficShifts cannot be seen; `None` stands for all.
    pub hidden: Vec<Option<String>>,
    /// The resources, by rollout.
    pub objects: BTreeMap<String, Object>,
    /// All that is known, for what is scaled.
    pub picture: Arc<Picture>,
    /// Whether there was anything to put together.
    seen: bool,
}

impl Scene {
    /// Whether nothing has been seen yet.
    pub fn is_nothing(&self) -> bool {
        !self.seen
    }
}

/// A TrafficShift as a resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid, for events.
    pub uid: String,
    /// The generation that is in force.
    pub generation: i64,
    /// What is wrong with it as it is now; what it said before stays in force.
    pub error: Option<String>,
    /// Who wrote its spec last, and when, where that is known.
    pub by: Option<String>,
}

/// What is seen, as it comes in.
#[derive(Debug, Default)]
struct Sight {
    picture: Picture,
    shifts: BTreeMap<Option<String>, Table<Written>>,
}

/// Where watches write down what they see.
#[derive(Debug, Clone, Default)]
struct Notes {
    sight: Arc<Mutex<Sight>>,
    changed: Arc<Notify>,
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Sight> {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, write: impl FnOnce(&mut Sight)) {
        write(&mut self.lock());
        self.changed.notify_one();
    }
}

/// Looks for as long as it is there.
#[derive(Debug)]
pub struct Eyes {
    scene: watch::Receiver<Arc<Scene>>,
    _tasks: JoinSet<()>,
}

impl Eyes {
    /// Begins to look. `namespaces`: none is all.
    pub fn open(clusters: Clusters, namespaces: &BTreeSet<String>) -> Self {
        let (send, scene) = watch::channel(Arc::default());
        let notes = Notes::default();
        let mut tasks = JoinSet::new();
        let scopes: Vec<Option<String>> = match namespaces.is_empty() {
            true => vec![None],
            false => namespaces.iter().cloned().map(Some).collect(),
        };
        for scope in scopes {
            tasks.spawn(follow_shifts(clusters.home(), scope, notes.clone()));
        }
        let watches = Watches {
            clusters,
            notes: notes.clone(),
            running: BTreeMap::new(),
            good: BTreeMap::new(),
            generations: BTreeMap::new(),
        };
        tasks.spawn(watches.run(send));
        Self { scene, _tasks: tasks }
    }

    /// What follows from what is seen: now, and from now on. The first one comes once all TrafficShifts are seen, or
    /// cannot be.
    pub fn scene(&self) -> watch::Receiver<Arc<Scene>> {
        self.scene.clone()
    }
}

/// A task that ends when nobody needs it any more.
#[derive(Debug)]
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A cluster, and what is watched there; nothing: the cluster itself.
type Watched = (Option<String>, Option<(Place, Need)>);

/// The watches that documents need.
struct Watches {
    clusters: Clusters,
    notes: Notes,
    running: BTreeMap<Watched, Running>,
    /// The documents that were right last, by rollout, and their generations.
    good: BTreeMap<String, Arc<Held>>,
    generations: BTreeMap<String, i64>,
}

impl Watches {
    async fn run(mut self, scene: watch::Sender<Arc<Scene>>) {
        let mut of_clusters = self.clusters.changes();
        loop {
            tokio::select! {
                () = self.notes.changed.notified() => {}
                Ok(()) = of_clusters.changed() => {
                    for cluster in self.clusters.take_changed() {
                        self.running.retain(|(of, _), _| *of != Some(cluster.clone()));
                        self.notes.lock().picture.views.retain(|place, _| place.cluster.as_ref() != Some(&cluster));
                    }
                }
            }
            let is_complete = {
                let sight = self.notes.lock();
                sight.shifts.values().all(|table| table.synced || table.lost.is_some()) && !sight.shifts.is_empty()
            };
            if is_complete {
                let now = self.look();
                scene.send_if_modified(|before| {
                    let now = Scene { seen: true, ..now };
                    let differs = **before != now;
                    if differs {
                        *before = Arc::new(now);
                    }
                    differs
                });
            }
        }
    }

    /// Puts together what follows, and begins to watch what that needs.
    fn look(&mut self) -> Scene {
        let notes = self.notes.clone();
        let mut sight = notes.lock();
        let mut scene = Scene::default();
        for (scope, table) in &sight.shifts {
            if let Some(why) = &table.lost {
                let of = scope.as_ref().map_or_else(String::new, |namespace| format!(" in namespace {namespace}"));
                scene
                    .errors
                    .push(format!("TrafficShifts{of} cannot be seen: {why}; what they said before stays in force"));
                if !table.synced {
                    scene.hidden.push(scope.clone());
                }
            }
        }
        self.read(&sight, &mut scene);
        let mut needs: BTreeMap<Place, BTreeSet<Need>> = BTreeMap::new();
        for (shift, _) in &scene.documents {
            for (place, of_shift) in resolve::needs(shift) {
                needs.entry(place).or_default().extend(of_shift);
            }
        }
        self.watch(&needs, &mut sight.picture);
        let shifts = scene.documents.iter().map(|(shift, _)| shift.clone());
        let (resolved, outlook) = resolve::resolve(shifts, &sight.picture);
        for (document, resolved) in scene.documents.iter_mut().zip(resolved) {
            document.0 = resolved;
        }
        scene.outlook = Arc::new(outlook);
        scene.picture = Arc::new(sight.picture.clone());
        scene
    }

    /// The documents in force: what is wrong is left as it was, and of two that contradict each other the one that is in
    /// force already, or else the older resource.
    fn read(&mut self, sight: &Sight, scene: &mut Scene) {
        let mut written: Vec<&Written> = sight.shifts.values().flat_map(|table| table.objects.values()).collect();
        written.sort_by(|a, b| (a.created, &a.uid).cmp(&(b.created, &b.uid)));
        let documents = written.iter().map(|written| (written.rollout(), self.read_one(written)));
        let Admitted { held, refused } = admission::agree(&self.good, documents);
        for written in written {
            let rollout = written.rollout();
            let error = refused.get(&rollout).map(Errors::to_string);
            let lines = error.iter().flat_map(|error| error.lines());
            scene.errors.extend(lines.map(|line| format!("{}/{}: {line}", written.namespace, written.name)));
            let held = held.get(&rollout);
            let before = self.generations.get(&rollout).copied().unwrap_or_default();
            let generation = match (&error, held) {
                (None, _) => written.generation,
                (Some(_), Some(_)) => before,
                (Some(_), None) => 0,
            };
            self.generations.insert(rollout.clone(), generation);
            let (namespace, name, uid) = (written.namespace.clone(), written.name.clone(), written.uid.clone());
            let by = written.by.clone();
            scene.objects.insert(rollout, Object { namespace, name, uid, generation, error, by });
            scene.documents.extend(held.map(|held| (held.shift.clone(), held.document.clone())));
        }
        self.generations.retain(|rollout, _| scene.objects.contains_key(rollout));
        self.good = held;
    }

    fn read_one(&self, written: &Written) -> Result<Arc<Held>, Errors> {
        let before = self.good.get(&written.rollout());
        if let Some(before) = before.filter(|before| before.document == written.document) {
            return Ok(before.clone());
        }
        let shift = TrafficShift::read(&written.document)?.qualified();
        admit(&shift).map_err(Errors::of_document)?;
        let size = admission::check(&shift, &written.document)?;
        Ok(Arc::new(Held { shift, document: written.document.clone(), size }))
    }

    fn watch(&mut self, needs: &BTreeMap<Place, BTreeSet<Need>>, picture: &mut Picture) {
        let home = Place { cluster: None, namespace: String::new() };
        let mut clients: BTreeMap<Option<String>, Client> = BTreeMap::new();
        let mut open: BTreeMap<Place, BTreeSet<Need>> = BTreeMap::new();
        picture.closed.clear();
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
        for (cluster, client) in clients {
            self.running.entry((cluster.clone(), None)).or_insert_with(|| {
                // Not known to be there before it has said so.
                picture.lost.insert(cluster.clone(), "it has not answered yet".to_owned());
                let look = look_at(client.clone(), cluster.clone(), self.notes.clone());
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

/// A watch that begins has seen nothing.
fn forget(view: &mut View, need: &Need) {
    match need {
        Need::Slices => view.slices = Table::default(),
        Need::Pods => view.pods = Table::default(),
        Need::Autoscalers => view.autoscalers = Table::default(),
        Need::Budgets => view.budgets = Table::default(),
        Need::Workloads { api_version, kind } => {
            view.workloads.insert((api_version.clone(), kind.clone()), Table::default());
        }
    }
}

/// Asks a cluster again and again whether it is there: a watch that says nothing may also be one whose other end is
/// gone.
async fn look_at(client: Client, cluster: Option<String>, notes: Notes) {
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
            notes.write(|sight| match answer {
                Some(why) => _ = sight.picture.lost.insert(cluster.clone(), why),
                None => _ = sight.picture.lost.remove(&cluster),
            });
        }
    }
}

/// Begins to watch objects of one kind in one place.
fn see(client: Client, place: Place, need: Need, notes: Notes) -> Running {
    let namespace = place.namespace.clone();
    let task = match need {
        Need::Slices => {
            let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
            tokio::spawn(follow(api, notes, in_view(place, |view| &mut view.slices), views::slice, None))
        }
        Need::Pods => {
            let api: Api<PartialObjectMeta<Pod>> = Api::namespaced(client, &namespace);
            tokio::spawn(follow(api, notes, in_view(place, |view| &mut view.pods), views::labels, None))
        }
        Need::Autoscalers => {
            let api: Api<HorizontalPodAutoscaler> = Api::namespaced(client, &namespace);
            tokio::spawn(follow(api, notes, in_view(place, |view| &mut view.autoscalers), views::autoscaler, None))
        }
        Need::Budgets => {
            let api: Api<PodDisruptionBudget> = Api::namespaced(client, &namespace);
            tokio::spawn(follow(api, notes, in_view(place, |view| &mut view.budgets), views::budget, None))
        }
        Need::Workloads { api_version, kind } => tokio::spawn(see_workloads(client, place, (api_version, kind), notes)),
    };
    Running(task.abort_handle())
}

/// Watches workloads of one kind, once the cluster has said how that kind is asked for.
async fn see_workloads(client: Client, place: Place, of: (String, String), notes: Notes) {
    let namespace = place.namespace.clone();
    let key = of.clone();
    let table = move |sight: &mut Sight, change: Change<'_, Workload>| {
        let view = sight.picture.views.entry(place.clone()).or_default();
        change(view.workloads.entry(key.clone()).or_default());
    };
    let mut retry = Retry::default();
    let resource = loop {
        match super::resource(&client, &of.0, &of.1).await {
            Ok(resource) => break resource,
            Err(why) => notes.write(|sight| table(sight, &mut |table| table.lost = Some(why.clone()))),
        }
        tokio::time::sleep(retry.pause()).await;
    };
    let api: Api<DynamicObject> = Api::namespaced_with(client, &namespace, &resource);
    follow(api, notes, table, views::workload, None).await;
}

/// A change of a table, wherever that is.
type Change<'a, T> = &'a mut dyn FnMut(&mut Table<T>);

/// Where a table is.
fn in_view<T>(place: Place, get: impl Fn(&mut View) -> &mut Table<T>) -> impl Fn(&mut Sight, Change<'_, T>) {
    move |sight, change| change(get(sight.picture.views.entry(place.clone()).or_default()))
}

/// Watches the TrafficShifts of a namespace, or of all.
async fn follow_shifts(client: Client, scope: Option<String>, notes: Notes) {
    let resource = super::traffic_shifts();
    let api: Api<DynamicObject> = match &scope {
        Some(namespace) => Api::namespaced_with(client, namespace, &resource),
        None => Api::all_with(client, &resource),
    };
    let table = move |sight: &mut Sight, change: Change<'_, Written>| {
        change(sight.shifts.entry(scope.clone()).or_default());
    };
    follow(api, notes, table, views::written, Some(FAREWELL)).await;
}

/// Keeps a table as the cluster has it, for as long as nobody ends it. Where there is a farewell, what is deleted stays for
/// so long, and goes only if the cluster then says what there is without it.
async fn follow<K, T>(
    api: Api<K>,
    notes: Notes,
    table: impl Fn(&mut Sight, Change<'_, T>),
    view: impl Fn(&K) -> Option<T>,
    farewell: Option<Duration>,
) where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    T: Clone,
{
    let key = |object: &K| format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
    // Within one namespace the name is enough, and it is what others know the object by.
    let is_all = api.namespace().is_none();
    let key = |object: &K| if is_all { key(object) } else { object.name_any() };
    let mut retry = Retry::default();
    loop {
        let mut events = pin!(super::watch(api.clone(), watcher::Config::default()));
        let mut coming: BTreeMap<String, T> = BTreeMap::new();
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
                    let objects = std::mem::take(&mut coming);
                    let now = Table { objects, synced: true, lost: None };
                    notes.write(|sight| table(sight, &mut |table| table.clone_from(&now)));
                }
                Ok(watcher::Event::Apply(object)) => notes.write(|sight| {
                    table(sight, &mut |table| match view(&object) {
                        Some(view) => _ = table.objects.insert(key(&object), view),
                        None => _ = table.objects.remove(&key(&object)),
                    });
                }),
                Ok(watcher::Event::Delete(_)) if farewell.is_some() => {
                    ask_again = ask_again.or(farewell.map(|farewell| Instant::now() + farewell));
                }
                Ok(watcher::Event::Delete(object)) => notes.write(|sight| {
                    table(sight, &mut |table| _ = table.objects.remove(&key(&object)));
                }),
                // A watch that has become too old: everything is listed anew, at once; nothing is missed by that.
                Err(watcher::Error::WatchError(status)) if status.code == 410 => {}
                Err(error) => {
                    coming.clear();
                    let why = super::watch_reason(&error);
                    tracing::debug!(url = api.resource_url(), "watch: {why}");
                    notes.write(|sight| table(sight, &mut |table| table.lost = Some(why.clone())));
                    // A watch that goes on where it was says nothing until something changes. Listed anew, the table is
                    // known to be right again.
                    if !matches!(error, watcher::Error::InitialListFailed(_)) {
                        break;
                    }
                }
            }
        }
        tokio::time::sleep(retry.pause()).await;
    }
}
