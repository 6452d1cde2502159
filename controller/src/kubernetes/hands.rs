//! What is done in the clusters: statuses and Events of TrafficShifts are written, and workloads are scaled. Nothing
//! here holds up the mind: what cannot be written now is written later, as it is then.

use super::eyes::{Object, Scene};
use super::picture::Place;
use super::scale::{Change, Want};
use super::shift_status::{Condition, ConditionStatus, TrafficShiftStatus};
use super::views::MIN_BEFORE;
use super::{Clusters, reason, traffic_shifts};
use crate::control::Control;
use crate::rollout::{Millis, Phase, Reason, Transition};
use crate::status::{ServiceStatus, StepStatus, timestamp};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tideshift_core::shift::{API_VERSION, KIND};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Whose fields these are, and who sends events.
const MANAGER: &str = "tideshift";
/// How often statuses are put together when nothing happens.
const LOOK: Duration = Duration::from_millis(500);
/// How often a status is written at most, unless its rollout has got somewhere.
const OFTEN: Duration = Duration::from_secs(1);
/// How often one is written when only counts have changed.
const SELDOM: Duration = Duration::from_secs(10);
/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// After a change was asked for, how long it may take until it is seen to be made.
const SETTLE: Duration = Duration::from_secs(3);
/// The most events that wait to be written.
const MAX_EVENTS: usize = 1_000;
/// The most endpoints of a version that a status names as not ready; how many there are is said anyway.
const MAX_NOT_READY: usize = 10;
/// The longest note of an event, in bytes.
const MAX_NOTE: usize = 1_000;

/// Does what the mind decides, in the clusters. Stops when dropped.
pub struct Hands {
    statuses: watch::Sender<BTreeMap<String, (Object, TrafficShiftStatus)>>,
    wants: watch::Sender<Vec<(Object, Want)>>,
    events: mpsc::Sender<(Object, Note)>,
    looked: Option<Instant>,
    /// What was said to be wrong with each resource.
    refused: BTreeMap<String, String>,
    _tasks: JoinSet<()>,
}

/// Something to tell about a resource.
struct Note {
    reason: String,
    is_warning: bool,
    words: String,
}

impl Hands {
    /// Begins to work.
    pub fn start(clusters: Clusters, identity: &str) -> Self {
        let (statuses, told) = watch::channel(BTreeMap::new());
        let (wants, wanted) = watch::channel(Vec::new());
        let (events, happened) = mpsc::channel(MAX_EVENTS);
        let mut tasks = JoinSet::new();
        tasks.spawn(write_statuses(clusters.clone(), told));
        tasks.spawn(write_events(clusters.clone(), identity.to_owned(), happened));
        tasks.spawn(scale(clusters, wanted, events.clone()));
        Self { statuses, wants, events, looked: None, refused: BTreeMap::new(), _tasks: tasks }
    }

    /// Takes note of how everything stands, and of what has happened.
    pub fn take(&mut self, control: &Control, scene: &Scene, transitions: &[(String, Transition)], now: Millis) {
        for (rollout, transition) in transitions {
            if let Some(object) = scene.objects.get(rollout) {
                let is_warning = transition.phase == Phase::Failed || is_trouble(transition.reason);
                let words = crate::status::TransitionStatus::from(transition).words();
                self.note(object, Note { reason: format!("{:?}", transition.reason), is_warning, words });
            }
        }
        let refused =
            scene.objects.iter().filter_map(|(rollout, object)| Some((rollout, object, object.error.clone()?)));
        let refused: Vec<_> =
            refused.map(|(rollout, object, error)| (rollout.clone(), object.clone(), error)).collect();
        for (rollout, object, error) in &refused {
            if self.refused.get(rollout) != Some(error) {
                self.note(object, Note { reason: "Invalid".to_owned(), is_warning: true, words: error.clone() });
            }
        }
        self.refused = refused.into_iter().map(|(rollout, _, error)| (rollout, error)).collect();
        if transitions.is_empty() && self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        self.looked = Some(Instant::now());
        let status = |(rollout, object): (&String, &Object)| {
            let status = status(control, rollout, object, now);
            (rollout.clone(), (object.clone(), status))
        };
        self.statuses.send_replace(scene.objects.iter().map(status).collect());
        let wants = scene.objects.iter().flat_map(|(rollout, object)| {
            control.scale(rollout, &scene.picture, now).into_iter().map(|want| (object.clone(), want))
        });
        self.wants.send_replace(wants.collect());
    }

    fn note(&self, object: &Object, note: Note) {
        if self.events.try_send((object.clone(), note)).is_err() {
            tracing::warn!("too many events wait to be written; one is left out");
        }
    }
}

fn is_trouble(reason: Reason) -> bool {
    use Reason::{BothFailing, EndpointsLost, GateClosed, ProgressDeadlineExceeded};
    use Reason::{NoGoodAnswer, NoProxies, NotRouted, ProxiesBehind};
    let is_unmeasured = matches!(reason, NoProxies | ProxiesBehind | NotRouted | NoGoodAnswer);
    is_unmeasured || matches!(reason, BothFailing | EndpointsLost | GateClosed | ProgressDeadlineExceeded)
}

/// The status of one resource.
fn status(control: &Control, rollout: &str, object: &Object, now: Millis) -> TrafficShiftStatus {
    let mut services = control.rollout_status(rollout, now).unwrap_or_default();
    for service in &mut services {
        // A clock in it would be written again and again.
        service.step = service.step.take().map(|step| StepStatus { held_seconds: None, ..step });
        service.versions.iter_mut().for_each(|version| version.endpoints.not_ready.truncate(MAX_NOT_READY));
    }
    let condition = |kind: &str, status, reason: &str, message: &str, since| Condition {
        kind: kind.to_owned(),
        status,
        observed_generation: Some(object.generation).filter(|generation| *generation > 0),
        last_transition_time: since,
        reason: reason.to_owned(),
        message: message.to_owned(),
    };
    let is = |so: bool| if so { ConditionStatus::True } else { ConditionStatus::False };
    let accepted = match object.error.clone().or_else(|| control.refusal(rollout)).as_ref() {
        None => condition("Accepted", is(true), "Valid", "in force", timestamp(now)),
        Some(error) => condition("Accepted", is(false), "Invalid", error, timestamp(now)),
    };
    let Some(first) = services.first() else {
        return TrafficShiftStatus { conditions: vec![accepted], ..TrafficShiftStatus::default() };
    };
    let available = match control.sight(rollout) {
        Ok(()) => {
            let serves = |service: &ServiceStatus| service.versions.iter().any(|version| version.weight > 0.0);
            match services.iter().all(serves) {
                true if !control.has_proxies() => {
                    let why = "no proxy has asked for its policy; nothing is scaled down before one has";
                    condition("Available", ConditionStatus::Unknown, "NoProxy", why, timestamp(now))
                }
                true => condition(
                    "Available",
                    is(true),
                    "Serving",
                    "every service has a version that serves",
                    timestamp(now),
                ),
                false => condition(
                    "Available",
                    is(false),
                    "NothingReady",
                    "no version has an endpoint that is ready",
                    timestamp(now),
                ),
            }
        }
        Err(why) => {
            let why = why.unwrap_or("waiting for the first probes");
            condition("Available", ConditionStatus::Unknown, "OutOfSight", why, timestamp(now))
        }
    };
    let shared = control.shared_pods(rollout);
    let shared = shared.map(|why| condition("PodsShared", is(true), "TwoVersions", why, timestamp(now)));
    let reason = format!("{:?}", first.reason);
    let (under_way, succeeded) = (first.phase.is_under_way(), first.phase == Phase::Succeeded);
    let progressing = condition("Progressing", is(under_way), &reason, &first.message, first.since);
    let completed = condition("Completed", is(succeeded), &reason, &first.message, first.since);
    let weights = first.versions.iter().map(|version| format!("{} {} %", version.name, version.weight));
    TrafficShiftStatus {
        observed_generation: Some(object.generation),
        conditions: [accepted, available, progressing, completed].into_iter().chain(shared).collect(),
        phase: Some(first.phase),
        reason: Some(first.reason),
        message: Some(first.message.clone()),
        stable: Some(first.stable.clone()),
        target: first.target.clone(),
        step: first.step.clone(),
        weights: Some(weights.collect::<Vec<_>>().join(", ")),
        verdict: first.verdict.clone(),
        services,
    }
}

/// What of a status is worth writing at once.
fn gist(status: &TrafficShiftStatus) -> Value {
    let conditions = status.conditions.iter().map(|one| json!([one.kind, one.status, one.reason]));
    json!([
        status.phase,
        status.reason,
        status.stable,
        status.target,
        status.weights,
        conditions.collect::<Vec<_>>(),
        status.observed_generation,
        status.step.as_ref().map(|step| step.number)
    ])
}

/// The conditions, each with the time of the last change of its status.
fn since_before(status: &mut TrafficShiftStatus, before: Option<&TrafficShiftStatus>) {
    for condition in &mut status.conditions {
        let same = before.into_iter().flat_map(|before| &before.conditions);
        let mut same = same.filter(|before| before.kind == condition.kind && before.status == condition.status);
        if let Some(before) = same.next() {
            condition.last_transition_time = before.last_transition_time;
        }
    }
}

async fn write_statuses(clusters: Clusters, mut told: watch::Receiver<BTreeMap<String, (Object, TrafficShiftStatus)>>) {
    /// As it was written last, and when.
    type Written = BTreeMap<String, (String, TrafficShiftStatus, Instant)>;
    let mut written = Written::new();
    while told.changed().await.is_ok() {
        let statuses = told.borrow_and_update().clone();
        written.retain(|rollout, (uid, ..)| statuses.get(rollout).is_some_and(|(object, _)| object.uid == *uid));
        for (rollout, (object, mut status)) in statuses {
            let before = written.get(&rollout);
            since_before(&mut status, before.map(|(_, status, _)| status));
            let is_due = before.is_none_or(|(_, before, when)| {
                let pause = if gist(before) == gist(&status) { SELDOM } else { OFTEN };
                let got_somewhere = before.phase != status.phase || before.reason != status.reason;
                *before != status && (got_somewhere || when.elapsed() >= pause)
            });
            if !is_due {
                continue;
            }
            match timeout(PATIENCE, write_status(&clusters, &object, &status)).await {
                Ok(Ok(())) => _ = written.insert(rollout, (object.uid, status, Instant::now())),
                // It is gone.
                Ok(Err(kube::Error::Api(answer))) if answer.code == 404 => {}
                Ok(Err(error)) => {
                    tracing::warn!(rollout, "cannot write its status: {}", reason(&error));
                    sleep(OFTEN).await;
                }
                Err(_) => tracing::warn!(rollout, "cannot write its status: no answer within {} s", PATIENCE.as_secs()),
            }
        }
    }
}

async fn write_status(clusters: &Clusters, object: &Object, status: &TrafficShiftStatus) -> Result<(), kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(clusters.home(), &object.namespace, &traffic_shifts());
    let body = json!({
        "apiVersion": API_VERSION, "kind": KIND,
        // Another object of the same name must not get it.
        "metadata": {"name": object.name, "uid": object.uid},
        "status": status,
    });
    api.patch_status(&object.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await.map(|_| ())
}

async fn write_events(clusters: Clusters, identity: String, mut happened: mpsc::Receiver<(Object, Note)>) {
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(identity) };
    while let Some((object, note)) = happened.recv().await {
        let about = ObjectReference {
            api_version: Some(API_VERSION.to_owned()),
            kind: Some(KIND.to_owned()),
            name: Some(object.name.clone()),
            namespace: Some(object.namespace.clone()),
            uid: Some(object.uid.clone()),
            ..ObjectReference::default()
        };
        let end = (0..=MAX_NOTE.min(note.words.len())).rev().find(|end| note.words.is_char_boundary(*end)).unwrap_or(0);
        let event = Event {
            type_: if note.is_warning { EventType::Warning } else { EventType::Normal },
            reason: note.reason,
            note: Some(note.words[..end].to_owned()),
            action: "Shift".to_owned(),
            secondary: None,
        };
        // A recorder takes events of the same reason for the same event, whatever their words; a new one has seen none.
        let recorder = Recorder::new(clusters.home(), reporter.clone());
        match timeout(PATIENCE, recorder.publish(&event, &about)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("cannot write an event: {}", reason(&error)),
            Err(_) => tracing::warn!("cannot write an event: no answer within {} s", PATIENCE.as_secs()),
        }
    }
}

async fn scale(
    clusters: Clusters,
    mut wanted: watch::Receiver<Vec<(Object, Want)>>,
    events: mpsc::Sender<(Object, Note)>,
) {
    let mut asked: BTreeMap<(Place, Change), Instant> = BTreeMap::new();
    let mut complained: BTreeMap<(Place, Change), String> = BTreeMap::new();
    while wanted.changed().await.is_ok() {
        let wants = wanted.borrow_and_update().clone();
        asked.retain(|_, when| when.elapsed() < SETTLE);
        complained.retain(|key, _| wants.iter().any(|(_, want)| (&want.place, &want.change) == (&key.0, &key.1)));
        for (object, Want { place, change, why }) in wants {
            let key = (place.clone(), change.clone());
            if asked.contains_key(&key) {
                continue;
            }
            let words = match &change {
                Change::Replicas { workload, replicas } => format!("{workload} is scaled to {replicas}: {why}"),
                Change::MinReplicas { autoscaler, min, .. } => {
                    format!("HorizontalPodAutoscaler {autoscaler} has minReplicas {min} now: {why}")
                }
                Change::Nothing { workload } => {
                    let words = format!("{workload} stays as it is: {why}");
                    if complained.insert(key, words.clone()).as_ref() != Some(&words) {
                        tracing::warn!(namespace = place.namespace, cluster = place.cluster, "{words}");
                        let note = Note { reason: "NotScaled".to_owned(), is_warning: true, words };
                        _ = events.try_send((object, note));
                    }
                    continue;
                }
            };
            let result = match timeout(PATIENCE, make(&clusters, &place, &change)).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            let note = match result {
                Ok(()) => {
                    tracing::info!(namespace = place.namespace, cluster = place.cluster, "{words}");
                    Some(Note { reason: "Scaled".to_owned(), is_warning: false, words })
                }
                Err(error) => {
                    let is_new = complained.insert(key.clone(), error.clone()) != Some(error.clone());
                    let words = format!("{words}; that failed: {error}");
                    is_new.then(|| {
                        tracing::error!(namespace = place.namespace, cluster = place.cluster, "{words}");
                        Note { reason: "ScaleFailed".to_owned(), is_warning: true, words }
                    })
                }
            };
            asked.insert(key, Instant::now());
            // A full queue has been complained of already.
            note.map(|note| events.try_send((object, note)).is_ok());
        }
    }
}

async fn make(clusters: &Clusters, place: &Place, change: &Change) -> Result<(), String> {
    let client = clusters.client(place)?;
    let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    match change {
        Change::Nothing { .. } => Ok(()),
        Change::Replicas { workload, replicas } => {
            let resource = super::resource(&client, &workload.api_version, &workload.kind).await?;
            let api: Api<DynamicObject> = Api::namespaced_with(client, &place.namespace, &resource);
            let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
            api.patch_scale(&workload.name, &parameters, &patch).await.map(|_| ()).map_err(|error| reason(&error))
        }
        Change::MinReplicas { autoscaler, min, before } => {
            let api: Api<HorizontalPodAutoscaler> = Api::namespaced(client, &place.namespace);
            let before = before.map(|before| before.to_string());
            let patch = json!({
                "metadata": {"annotations": {MIN_BEFORE: before}},
                "spec": {"minReplicas": min},
            });
            let patched = api.patch(autoscaler, &parameters, &Patch::Merge(patch)).await;
            patched.map(|_| ()).map_err(|error| reason(&error))
        }
    }
}
