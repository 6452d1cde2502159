//! Outputs to the clusters: statuses and Events of TrafficShifts, and scaling of workloads. Writes never block
//! reconciliation; a failed write is retried with the state current at that time.

use crate::clock::{Millis, timestamp};
use crate::kubernetes::convert::{FINALIZER, MIN_BEFORE};
use crate::kubernetes::informers::{Object, Snapshot};
use crate::kubernetes::scaling::{self, Change, ScaleAction};
use crate::kubernetes::status::{Condition, ConditionStatus, TrafficShiftStatus};
use crate::kubernetes::{Clusters, reason, traffic_shifts};
use crate::namespace_ref::NamespaceRef;
use crate::reconciler::Reconciler;
use crate::rollout::{Phase, Reason, Transition};
use crate::status::{DrainState, Judged, LatencyStatus, ServiceStatus, StepStatus, VerdictStatus};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::ResourceExt;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tideshift_core::counts::Counts;
use tideshift_core::shift::{API_VERSION, KIND};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

/// The field manager, and the reporting controller of Events.
const MANAGER: &str = "tideshift";
/// How often rollouts are examined when nothing happens.
const LOOK: Duration = Duration::from_millis(500);
/// The maximum interval between two examinations of one rollout, even when nothing is under way and nothing has changed
/// in the cluster.
const REST: Duration = Duration::from_secs(3);
/// The minimum interval between two writes of a status, unless the phase or reason of its rollout has changed.
const OFTEN: Duration = Duration::from_secs(1);
/// The maximum number of concurrent status writes.
const AT_A_TIME: usize = 16;
/// The minimum interval between two writes: at most a hundred per second.
const PACE: Duration = Duration::from_millis(10);
/// The maximum backoff for a status that was refused.
const MAX_PAUSE: Duration = Duration::from_secs(16);
/// Timeout of a request.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a requested change may take to show up in a watch.
const SETTLE: Duration = Duration::from_secs(3);
/// The maximum number of queued Events.
const MAX_EVENTS: usize = 1_000;
/// The maximum number of not-ready endpoints that a status names for a version; it always gives their number.
const MAX_NOT_READY: usize = 10;
/// The maximum length of an Event's note, in bytes.
const MAX_NOTE: usize = 1_000;

/// Writes the output of the reconcile loop to the clusters. Stops when dropped.
pub struct Outputs {
    statuses: Desk,
    wants: watch::Sender<Vec<(Arc<Object>, ScaleAction)>>,
    /// Resources that need the finalizer added or removed.
    holds: watch::Sender<Vec<(Arc<Object>, bool)>>,
    events: mpsc::Sender<(Arc<Object>, Note)>,
    looked: Option<Instant>,
    /// The state of each rollout at its last examination.
    known: BTreeMap<String, Known>,
    /// The objects of the last snapshot, and whether there were proxies then.
    objects: Arc<BTreeMap<String, Arc<Object>>>,
    had_proxies: bool,
    /// The last reported error of each resource.
    refused: BTreeMap<String, String>,
    _tasks: JoinSet<()>,
}

/// The state of a rollout at its last examination.
struct Known {
    object: Arc<Object>,
    looked: Instant,
    /// Whether it is expected to change soon: it is then examined each time.
    is_busy: bool,
    wants: Vec<ScaleAction>,
}

/// An Event about a resource.
struct Note {
    reason: String,
    is_warning: bool,
    words: String,
}

impl Outputs {
    /// Starts the output tasks.
    pub fn start(clusters: Clusters, identity: &str) -> Self {
        let statuses = Desk::default();
        let (wants, wanted) = watch::channel(Vec::new());
        let (holds, held) = watch::channel(Vec::new());
        let (events, happened) = mpsc::channel(MAX_EVENTS);
        let mut tasks = JoinSet::new();
        tasks.spawn(write_statuses(clusters.clone(), statuses.clone()));
        tasks.spawn(write_events(clusters.clone(), identity.to_owned(), happened));
        tasks.spawn(hold(clusters.clone(), held));
        tasks.spawn(scale(clusters, wanted, events.clone()));
        Self {
            statuses,
            wants,
            holds,
            events,
            looked: None,
            known: BTreeMap::new(),
            objects: Arc::default(),
            had_proxies: false,
            refused: BTreeMap::new(),
            _tasks: tasks,
        }
    }

    /// Accepts the output of a reconcile and the transitions it caused.
    pub fn take(
        &mut self,
        reconciler: &Reconciler,
        snapshot: &Snapshot,
        transitions: &[(String, Transition)],
        now: Millis,
    ) {
        for (rollout, transition) in transitions {
            if let Some(object) = snapshot.objects.get(rollout) {
                let is_warning = transition.phase == Phase::Failed || is_trouble(transition.reason);
                let words = crate::status::TransitionStatus::from(transition).words();
                self.note(object, Note { reason: format!("{:?}", transition.reason), is_warning, words });
            }
        }
        if !Arc::ptr_eq(&self.objects, &snapshot.objects) {
            self.objects = snapshot.objects.clone();
            self.take_objects();
        }
        let is_due = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK);
        if is_due {
            self.look(reconciler, snapshot, now);
        } else {
            let happened: BTreeSet<&String> = transitions.iter().map(|(rollout, _)| rollout).collect();
            for rollout in happened {
                if let Some(object) = self.objects.get(rollout).cloned() {
                    self.health_check(reconciler, snapshot, rollout, &object, now);
                }
            }
        }
        if is_due || !transitions.is_empty() {
            let wants = self.known.values().flat_map(|known| known.wants.iter().map(|want| (&known.object, want)));
            let wants: Vec<_> = wants.map(|(object, want)| (object.clone(), want.clone())).collect();
            if !wants.is_empty() || !self.wants.borrow().is_empty() {
                self.wants.send_replace(wants);
            }
        }
        if is_due {
            let hold = |(rollout, object): (&String, &Arc<Object>)| {
                let holds = if object.is_deleted { reconciler.holds_deletion(rollout, now) } else { object.holds };
                (holds != object.is_held).then(|| (object.clone(), holds))
            };
            let holds: Vec<_> = self.objects.iter().filter_map(hold).collect();
            if !holds.is_empty() {
                self.holds.send_replace(holds);
            }
        }
    }

    /// Handles changed resources and errors.
    fn take_objects(&mut self) {
        let objects = self.objects.clone();
        self.statuses.keep(&objects);
        self.known.retain(|rollout, _| objects.contains_key(rollout));
        let refused = objects.iter().filter_map(|(rollout, object)| Some((rollout, object, object.error.clone()?)));
        let mut now = BTreeMap::new();
        for (rollout, object, error) in refused {
            if self.refused.get(rollout) != Some(&error) {
                self.note(object, Note { reason: "Invalid".to_owned(), is_warning: true, words: error.clone() });
            }
            now.insert(rollout.clone(), error);
        }
        self.refused = now;
    }

    /// Examines rollouts that are under way or have changed each time, and the others in turn.
    fn look(&mut self, reconciler: &Reconciler, snapshot: &Snapshot, now: Millis) {
        self.looked = Some(Instant::now());
        let has_proxies = reconciler.has_proxies();
        let is_elsewhere = std::mem::replace(&mut self.had_proxies, has_proxies) != has_proxies;
        let objects = self.objects.clone();
        // The number of passes until each has had its turn.
        let mut turns = objects.len().div_ceil(REST.div_duration_f32(LOOK) as usize);
        let rests = |known: &Known| !known.is_busy && known.looked.elapsed() < REST;
        let mut at_rest: Vec<(Instant, &String)> = Vec::new();
        for (rollout, object) in objects.iter() {
            match self.known.get(rollout) {
                Some(known) if !is_elsewhere && Arc::ptr_eq(&known.object, object) && !known.is_busy => {
                    if !rests(known) {
                        at_rest.push((known.looked, rollout));
                    }
                }
                _ => self.health_check(reconciler, snapshot, rollout, object, now),
            }
        }
        at_rest.sort_unstable();
        for (_, rollout) in at_rest {
            if turns == 0 {
                break;
            }
            turns -= 1;
            self.health_check(reconciler, snapshot, rollout, &objects[rollout], now);
        }
    }

    fn health_check(
        &mut self,
        reconciler: &Reconciler,
        snapshot: &Snapshot,
        rollout: &str,
        object: &Arc<Object>,
        now: Millis,
    ) {
        let status = status(reconciler, rollout, object, now);
        let wants = scaling::plan(reconciler, rollout, &snapshot.picture, now);
        let drains = |service: &ServiceStatus| {
            service.versions.iter().any(|version| version.drain.state == DrainState::Draining)
        };
        let is_under_way = status.phase.is_some_and(Phase::is_under_way) || status.services.iter().any(drains);
        let has_changed = self.statuses.give(rollout, object, status, Instant::now());
        let is_busy = is_under_way || has_changed || !wants.is_empty();
        let known = Known { object: object.clone(), looked: Instant::now(), is_busy, wants };
        self.known.insert(rollout.to_owned(), known);
    }

    fn note(&self, object: &Arc<Object>, note: Note) {
        if self.events.try_send((object.clone(), note)).is_err() {
            tracing::warn!("too many events wait to be written; one is left out");
        }
    }
}

fn is_trouble(reason: Reason) -> bool {
    use Reason::{
        BothFailing, EndpointsLost, GateClosed, NoGoodAnswer, NoProxies, NotRouted, ProgressDeadlineExceeded,
        ProxiesBehind,
    };
    let is_unmeasured = matches!(reason, NoProxies | ProxiesBehind | NotRouted | NoGoodAnswer);
    is_unmeasured || matches!(reason, BothFailing | EndpointsLost | GateClosed | ProgressDeadlineExceeded)
}

/// The status of one resource.
fn status(reconciler: &Reconciler, rollout: &str, object: &Object, now: Millis) -> TrafficShiftStatus {
    let mut services = reconciler.rollout_status(rollout, now).unwrap_or_default();
    for service in &mut services {
        // Clock values in it would cause a write each time.
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
    let accepted = match object.error.clone().or_else(|| reconciler.refusal(rollout)).as_ref() {
        None if !object.literals.is_empty() => {
            let why = format!(
                "in force, with secrets that everyone who may see TrafficShifts can read: {}; expected references instead \
                 (`tideshift migrate-secrets` writes them)",
                object.literals.join(", ")
            );
            condition("Accepted", is(true), "LiteralSecrets", &why, timestamp(now))
        }
        None => condition("Accepted", is(true), "Valid", "in force", timestamp(now)),
        Some(error) => condition("Accepted", is(false), "Invalid", error, timestamp(now)),
    };
    let resolved = object.has_references.then(|| match reconciler.unresolved(rollout) {
        [] => condition(
            "ResolvedRefs",
            is(true),
            "ResolvedRefs",
            "every secret that it refers to is known",
            timestamp(now),
        ),
        lines => condition("ResolvedRefs", is(false), "InvalidSecretRef", &lines.join("\n"), timestamp(now)),
    });
    let Some(first) = services.first() else {
        let conditions = [Some(accepted), resolved].into_iter().flatten().collect();
        return TrafficShiftStatus { conditions, ..TrafficShiftStatus::default() };
    };
    let available = match reconciler.sight(rollout) {
        Ok(()) => {
            let serves = |service: &ServiceStatus| service.versions.iter().any(|version| version.weight > 0.0);
            match services.iter().all(serves) {
                true if !reconciler.has_proxies() => {
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
    let shared = reconciler.shared_pods(rollout);
    let shared = shared.map(|why| condition("PodsShared", is(true), "TwoVersions", why, timestamp(now)));
    let reason = format!("{:?}", first.reason);
    let (under_way, succeeded) = (first.phase.is_under_way(), first.phase == Phase::Succeeded);
    let progressing = condition("Progressing", is(under_way), &reason, &first.message, first.since);
    let completed = condition("Completed", is(succeeded), &reason, &first.message, first.since);
    let weights = first.versions.iter().map(|version| format!("{} {} %", version.name, version.weight));
    TrafficShiftStatus {
        observed_generation: Some(object.generation),
        conditions: [accepted, available, progressing, completed].into_iter().chain(shared).chain(resolved).collect(),
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

/// The significant part of a status: everything that justifies a write. It leaves out what changes while the rollout
/// stands still: the counts, the evidence, requests in flight, timestamps that the reason already implies, and numbers
/// in messages ("in about 12 s"). A write contains all of them with their current values.
fn gist(status: &TrafficShiftStatus) -> TrafficShiftStatus {
    let mut gist = status.clone();
    gist.message = gist.message.as_deref().map(without_numbers);
    gist.verdict = gist.verdict.as_ref().map(outcome);
    for condition in &mut gist.conditions {
        condition.message = without_numbers(&condition.message);
    }
    for service in &mut gist.services {
        service.message = without_numbers(&service.message);
        service.verdict = service.verdict.as_ref().map(outcome);
        service.unrouted = 0;
        service.deadline = None;
        for version in &mut service.versions {
            version.requests = Counts::default();
            version.in_flight = 0;
            version.drain.in_flight = 0;
            version.drain.message = String::new();
            for endpoint in &mut version.endpoints.not_ready {
                endpoint.reason = endpoint.reason.as_deref().map(without_numbers);
            }
        }
    }
    gist
}

/// The outcome of a verdict, without counts.
fn outcome(verdict: &VerdictStatus) -> VerdictStatus {
    let none = Judged::default();
    VerdictStatus {
        outcome: verdict.outcome,
        message: String::new(),
        target: Judged { version: verdict.target.version.clone(), ..none.clone() },
        stable: Judged { version: verdict.stable.version.clone(), ..none },
        evidence: 0.0,
        bound: verdict.bound,
        pass_evidence: 0.0,
        pass_bound: verdict.pass_bound,
        latency: verdict.latency.as_ref().map(|latency| LatencyStatus {
            message: String::new(),
            evidence: 0.0,
            bound: latency.bound,
        }),
    }
}

/// A message with each number replaced by a placeholder.
fn without_numbers(message: &str) -> String {
    let mut words = String::with_capacity(message.len());
    let mut in_number = false;
    for character in message.chars() {
        let is_digit = character.is_ascii_digit() || (in_number && matches!(character, '.' | ','));
        match is_digit {
            true if !in_number => words.push('#'),
            true => {}
            false => words.push(character),
        }
        in_number = is_digit;
    }
    words
}

/// Sets the transition time of each condition to the last change of its status.
fn since_before(status: &mut TrafficShiftStatus, before: &[Condition]) {
    for condition in &mut status.conditions {
        let mut same =
            before.iter().filter(|before| before.kind == condition.kind && before.status == condition.status);
        if let Some(before) = same.next() {
            condition.last_transition_time = before.last_transition_time;
        }
    }
}

/// The pending statuses, and the significant part of each that was written; cheap to clone.
#[derive(Clone, Default)]
struct Desk {
    sheets: Arc<Mutex<Sheets>>,
    has_more: Arc<Notify>,
}

/// Decides when each status is written. No I/O and no clock.
#[derive(Default)]
struct Sheets {
    /// By rollout.
    all: BTreeMap<String, Sheet>,
    /// The rollouts with a pending write, by due time and order of arrival.
    waiting: BTreeMap<(Instant, u64), String>,
    given: u64,
    /// No writes before this time, because the API server does not respond.
    paused: Option<Instant>,
}

/// The status of one rollout.
#[derive(Default)]
struct Sheet {
    uid: String,
    /// Its significant part as last given, and the conditions with their times.
    gist: Option<TrafficShiftStatus>,
    /// The status to write, and its position in the queue unless a write is in flight.
    wanted: Option<(Arc<Object>, TrafficShiftStatus)>,
    place: Option<(Instant, u64)>,
    is_under_way: bool,
    /// When the last write began, and its phase and reason.
    began: Option<(Instant, Option<Phase>, Option<Reason>)>,
    /// The number of refusals since then.
    refusals: u32,
}

/// The result of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    ControllerMetrics,
    /// The resource no longer exists.
    Gone,
    /// The API server refused it.
    Refused,
    /// The API server did not respond.
    Unanswered,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Sheets> {
        self.sheets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops rollouts whose resource no longer exists.
    fn keep(&self, objects: &BTreeMap<String, Arc<Object>>) {
        let mut sheets = self.lock();
        let Sheets { all, waiting, .. } = &mut *sheets;
        all.retain(|rollout, sheet| {
            let is_kept = objects.get(rollout).is_some_and(|object| object.uid == sheet.uid);
            if let Some(place) = sheet.place.take_if(|_| !is_kept) {
                waiting.remove(&place);
            }
            is_kept
        });
    }

    /// Accepts the current status. Returns whether its significant part has changed.
    fn give(&self, rollout: &str, object: &Arc<Object>, status: TrafficShiftStatus, now: Instant) -> bool {
        let is_news = self.lock().give(rollout, object, status, now);
        if is_news {
            self.has_more.notify_one();
        }
        is_news
    }
}

impl Sheets {
    fn give(&mut self, rollout: &str, object: &Arc<Object>, mut status: TrafficShiftStatus, now: Instant) -> bool {
        let sheet = self.all.entry(rollout.to_owned()).or_default();
        sheet.uid.clone_from(&object.uid);
        since_before(&mut status, sheet.gist.as_ref().map_or(&[], |before| &before.conditions));
        let gist = gist(&status);
        if sheet.gist.as_ref() == Some(&gist) {
            // A pending write is updated to the current status.
            if let Some(wanted) = &mut sheet.wanted {
                *wanted = (object.clone(), status);
            }
            return false;
        }
        let due = match sheet.began {
            Some((began, phase, reason)) if (phase, reason) == (status.phase, status.reason) => now.max(began + OFTEN),
            _ => now,
        };
        sheet.gist = Some(gist);
        sheet.wanted = Some((object.clone(), status));
        if !sheet.is_under_way {
            self.queue(rollout, due);
        }
        true
    }

    fn queue(&mut self, rollout: &str, due: Instant) {
        let Some(sheet) = self.all.get_mut(rollout) else { return };
        self.given += 1;
        let place = (due, self.given);
        let place = match sheet.place.take() {
            Some(before) => {
                self.waiting.remove(&before);
                before.min(place)
            }
            None => place,
        };
        sheet.place = Some(place);
        self.waiting.insert(place, rollout.to_owned());
    }

    /// The next write that is due.
    fn next(&mut self, now: Instant) -> Option<(String, Arc<Object>, TrafficShiftStatus)> {
        self.paused.take_if(|until| *until <= now);
        if self.paused.is_some() || self.waiting.first_key_value()?.0.0 > now {
            return None;
        }
        let (_, rollout) = self.waiting.pop_first()?;
        let sheet = self.all.get_mut(&rollout)?;
        sheet.place = None;
        let (object, status) = sheet.wanted.take()?;
        (sheet.is_under_way, sheet.began) = (true, Some((now, status.phase, status.reason)));
        Some((rollout, object, status))
    }

    /// When the next write is due.
    fn due(&self) -> Option<Instant> {
        let first = self.waiting.first_key_value().map(|(place, _)| place.0)?;
        Some(self.paused.map_or(first, |until| first.max(until)))
    }

    /// Records the result of a write.
    fn ended(&mut self, rollout: &str, job: (Arc<Object>, TrafficShiftStatus), written: Written, now: Instant) {
        if written == Written::Unanswered {
            self.paused = Some(now + OFTEN);
        }
        let Some(sheet) = self.all.get_mut(rollout).filter(|sheet| sheet.uid == job.0.uid) else { return };
        sheet.is_under_way = false;
        let pause = match written {
            Written::ControllerMetrics | Written::Gone => {
                sheet.refusals = 0;
                OFTEN
            }
            Written::Refused | Written::Unanswered => {
                sheet.refusals += 1;
                sheet.wanted.get_or_insert(job);
                MAX_PAUSE.min(OFTEN * 2_u32.saturating_pow(sheet.refusals - 1))
            }
        };
        let Some((_, status)) = &sheet.wanted else { return };
        let is_elsewhere =
            sheet.began.is_none_or(|(_, phase, reason)| (phase, reason) != (status.phase, status.reason));
        let due = if is_elsewhere && written == Written::ControllerMetrics { now } else { now + pause };
        self.queue(rollout, due);
    }
}

/// Writes statuses concurrently, each with its current value, at a rate the API server can sustain.
async fn write_statuses(clusters: Clusters, desk: Desk) {
    let mut writes = JoinSet::new();
    let mut may = Instant::now();
    loop {
        let now = Instant::now();
        while writes.len() < AT_A_TIME && may <= now {
            let Some((rollout, object, status)) = desk.lock().next(now) else { break };
            may = may.max(now - PACE) + PACE;
            let clusters = clusters.clone();
            writes.spawn(async move {
                let written = match timeout(PATIENCE, write_status(&clusters, &object, &status)).await {
                    Ok(Ok(())) => Written::ControllerMetrics,
                    Ok(Err(kube::Error::Api(answer))) if answer.code == 404 => Written::Gone,
                    Ok(Err(error)) => {
                        tracing::warn!(rollout, "cannot write its status: {}", reason(&error));
                        let is_answer = matches!(error, kube::Error::Api(_));
                        if is_answer { Written::Refused } else { Written::Unanswered }
                    }
                    Err(_) => {
                        let seconds = PATIENCE.as_secs();
                        tracing::warn!(rollout, "cannot write its status: no answer within {seconds} s");
                        Written::Unanswered
                    }
                };
                (rollout, (object, status), written)
            });
        }
        let due = desk.lock().due().filter(|_| writes.len() < AT_A_TIME).map(|due| due.max(may));
        let until_due = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = desk.has_more.notified() => {}
            Some(ended) = writes.join_next() => {
                if let Ok((rollout, job, written)) = ended {
                    desk.lock().ended(&rollout, job, written, Instant::now());
                }
            }
            () = until_due => {}
        }
    }
}

async fn write_status(clusters: &Clusters, object: &Object, status: &TrafficShiftStatus) -> Result<(), kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(clusters.home(), &object.namespace, &traffic_shifts());
    let body = json!({
        "apiVersion": API_VERSION, "kind": KIND,
        // A new object of the same name must not receive it.
        "metadata": {"name": object.name, "uid": object.uid},
        "status": status,
    });
    api.patch_status(&object.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await.map(|_| ())
}

/// Adds and removes finalizers.
async fn hold(clusters: Clusters, mut wanted: watch::Receiver<Vec<(Arc<Object>, bool)>>) {
    let mut asked: BTreeMap<(String, bool), Instant> = BTreeMap::new();
    while wanted.changed().await.is_ok() {
        let wants = wanted.borrow_and_update().clone();
        asked.retain(|_, when| when.elapsed() < SETTLE);
        for (object, holds) in wants {
            let key = (object.uid.clone(), holds);
            if asked.contains_key(&key) {
                continue;
            }
            let what = if holds { "set" } else { "remove" };
            let Object { namespace, name, .. } = &*object;
            match timeout(PATIENCE, set_finalizer(&clusters, &object, holds)).await {
                Ok(Ok(())) => tracing::info!(namespace, name, "{what} finalizer {FINALIZER}"),
                Ok(Err(why)) => tracing::warn!(namespace, name, "cannot {what} finalizer {FINALIZER}: {why}"),
                Err(_) => tracing::warn!(namespace, name, "cannot {what} finalizer {FINALIZER}: no answer"),
            }
            asked.insert(key, Instant::now());
        }
    }
}

async fn set_finalizer(clusters: &Clusters, object: &Object, holds: bool) -> Result<(), String> {
    let api: Api<DynamicObject> = Api::namespaced_with(clusters.home(), &object.namespace, &traffic_shifts());
    let now = match api.get_metadata(&object.name).await {
        // The resource is gone.
        Err(kube::Error::Api(answer)) if answer.code == 404 => return Ok(()),
        now => now.map_err(|error| reason(&error))?,
    };
    let mut finalizers = now.finalizers().to_vec();
    let is_held = finalizers.iter().any(|name| name == FINALIZER);
    let is_other = now.uid().as_ref() != Some(&object.uid);
    if is_other || is_held == holds || (holds && now.metadata.deletion_timestamp.is_some()) {
        return Ok(());
    }
    match holds {
        true => finalizers.push(FINALIZER.to_owned()),
        false => finalizers.retain(|name| name != FINALIZER),
    }
    // With the resourceVersion that was read, so that finalizers of others are not lost.
    let metadata = json!({"uid": object.uid, "resourceVersion": now.resource_version(), "finalizers": finalizers});
    let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let patched = api.patch(&object.name, &parameters, &Patch::Merge(json!({"metadata": metadata}))).await;
    patched.map(|_| ()).map_err(|error| reason(&error))
}

async fn write_events(clusters: Clusters, identity: String, mut happened: mpsc::Receiver<(Arc<Object>, Note)>) {
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
        // A recorder aggregates Events with the same reason even if their notes differ; a new one has no history.
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
    mut wanted: watch::Receiver<Vec<(Arc<Object>, ScaleAction)>>,
    events: mpsc::Sender<(Arc<Object>, Note)>,
) {
    let mut asked: BTreeMap<(NamespaceRef, Change), Instant> = BTreeMap::new();
    let mut complained: BTreeMap<(NamespaceRef, Change), String> = BTreeMap::new();
    while wanted.changed().await.is_ok() {
        let wants = wanted.borrow_and_update().clone();
        asked.retain(|_, when| when.elapsed() < SETTLE);
        complained.retain(|key, _| wants.iter().any(|(_, want)| (&want.place, &want.change) == (&key.0, &key.1)));
        for (object, ScaleAction { place, change, why }) in wants {
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
            // The full queue has already been logged.
            note.map(|note| events.try_send((object, note)).is_ok());
        }
    }
}

async fn make(clusters: &Clusters, place: &NamespaceRef, change: &Change) -> Result<(), String> {
    let client = clusters.client(place)?;
    let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    match change {
        Change::Nothing { .. } => Ok(()),
        Change::Replicas { workload, replicas } => {
            let resource = crate::kubernetes::resource(&client, &workload.api_version, &workload.kind).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str) -> Arc<Object> {
        Arc::new(Object {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            generation: 1,
            error: None,
            by: None,
            literals: Vec::new(),
            has_references: false,
            is_deleted: false,
            is_held: false,
            holds: false,
        })
    }

    /// The status of a rollout that holds its step, with this number of requests.
    fn status(requests: u64) -> TrafficShiftStatus {
        let service = json!({
            "name": "a.shop", "rollout": "a.shop", "number": 1, "phase": "Progressing", "reason": "Holding",
            "stable": "v1", "target": "v2", "message": format!("step 1 holds for {} s more", 100 - requests),
            "since": "2026-01-01T00:00:00Z", "unrouted": requests, "deadline": "2026-01-01T00:10:00Z",
            "versions": [{
                "name": "v1", "weight": 90.0, "serving": true, "inFlight": requests,
                "endpoints": {"ready": 1, "listed": 2, "notReady": [{"endpoint": "a", "reason": "timed out after 1.5 s"}]},
                "requests": {"ok": requests, "error": 0, "clientError": 0, "cancelled": 0},
                "drain": {"state": "Draining", "inFlight": requests, "message": format!("{requests} are in flight")},
            }],
            "verdict": {
                "outcome": "undecided", "message": format!("{requests} requests"), "evidence": requests, "bound": 1000.0,
                "passEvidence": requests, "passBound": 20.0,
                "target": {"version": "v2", "requests": requests, "errors": 0},
                "stable": {"version": "v1", "requests": requests, "errors": 0},
            },
        });
        let service: ServiceStatus = serde_json::from_value(service).unwrap();
        TrafficShiftStatus {
            phase: Some(service.phase),
            reason: Some(service.reason),
            message: Some(service.message.clone()),
            verdict: service.verdict.clone(),
            weights: Some("v1 90 %, v2 10 %".to_owned()),
            services: vec![service],
            ..TrafficShiftStatus::default()
        }
    }

    #[test]
    fn counts_alone_are_no_reason_to_write_a_status_and_everything_else_is() {
        let before = gist(&status(1));
        for requests in [2, 50, 99] {
            assert_eq!(gist(&status(requests)), before);
        }
        let changes: [fn(&mut TrafficShiftStatus); 7] = [
            |status| status.weights = Some("v1 80 %, v2 20 %".to_owned()),
            |status| status.message = Some("waits for the gate".to_owned()),
            |status| status.services[0].versions[0].endpoints.ready = 2,
            |status| status.services[0].versions[0].drain.state = DrainState::Drained,
            |status| status.services[0].versions[0].serving = false,
            |status| status.verdict.as_mut().unwrap().outcome = crate::status::VerdictOutcome::Pass,
            |status| status.observed_generation = Some(2),
        ];
        for change in changes {
            let mut other = status(1);
            change(&mut other);
            assert_ne!(gist(&other), before);
        }
        assert_eq!(without_numbers("in about 12 s, 1,000.5 of 3 requests."), "in about # s, # of # requests.");
    }

    #[test]
    fn a_status_is_written_once_and_as_it_is_by_then() {
        let (mut sheets, start, a) = (Sheets::default(), Instant::now(), object("a"));
        assert!(sheets.give("a", &a, status(1), start));
        assert!(!sheets.give("a", &a, status(2), start));
        let (_, object, written) = sheets.next(start).unwrap();
        assert_eq!(written, status(2), "the counts of now");
        assert!(sheets.next(start).is_none());
        sheets.ended("a", (object, written), Written::ControllerMetrics, start);
        assert!(!sheets.give("a", &a, status(3), start + MAX_PAUSE) && sheets.due().is_none());

        // The next write follows after a second, or at once if the phase or reason has changed.
        let weights = |weights: &str| TrafficShiftStatus { weights: Some(weights.to_owned()), ..status(4) };
        assert!(sheets.give("a", &a, weights("v1 80 %"), start));
        assert_eq!((sheets.due(), sheets.next(start).is_none()), (Some(start + OFTEN), true));
        let next = TrafficShiftStatus { reason: Some(Reason::GateClosed), ..weights("v1 70 %") };
        assert!(sheets.give("a", &a, next, start));
        assert_eq!(sheets.next(start).unwrap().2.weights.as_deref(), Some("v1 70 %"));
    }

    #[test]
    fn what_is_refused_holds_up_no_other_and_is_tried_ever_more_seldom() {
        let (mut sheets, mut now) = (Sheets::default(), Instant::now());
        sheets.give("a", &object("a"), status(1), now);
        sheets.give("b", &object("b"), status(1), now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let (rollout, object, job) = sheets.next(now).unwrap();
            assert_eq!(rollout, "a");
            sheets.ended("a", (object, job), Written::Refused, now);
            if let Some((rollout, object, job)) = sheets.next(now) {
                sheets.ended(&rollout, (object, job), Written::ControllerMetrics, now);
            }
            pauses.push((sheets.due().unwrap() - now).as_secs());
            now = sheets.due().unwrap();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 16, 16]);

        // If the API server does not respond, nothing is tried for a while.
        let (rollout, object, job) = sheets.next(now).unwrap();
        sheets.give("b", &super::tests::object("b"), status(5), now);
        let other = TrafficShiftStatus { stable: Some("v2".to_owned()), ..status(5) };
        sheets.give("b", &super::tests::object("b"), other, now);
        sheets.ended(&rollout, (object, job), Written::Unanswered, now);
        assert!(sheets.next(now).is_none());
        assert_eq!(sheets.next(now + OFTEN).unwrap().0, "b");
    }

    #[test]
    fn one_of_the_same_name_begins_afresh_and_what_is_gone_is_not_written() {
        let (desk, now) = (Desk::default(), Instant::now());
        let objects = |object: Arc<Object>| BTreeMap::from([("a".to_owned(), object)]);
        assert!(desk.give("a", &object("a"), status(1), now));
        let other = Arc::new(Object { uid: "other".to_owned(), ..(*object("a")).clone() });
        desk.keep(&objects(other.clone()));
        assert!(desk.lock().due().is_none());
        assert!(desk.give("a", &other, status(1), now));
        assert_eq!(desk.lock().next(now).unwrap().1.uid, "other");
    }
}
