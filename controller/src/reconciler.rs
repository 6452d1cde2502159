//! The reconciler: documents, readiness, counts and commands go in; policies and status come out. It does no I/O and
//! has no clock. The server's reconcile loop feeds it and carries out what it decides.

mod analysis;
mod baseline;
mod claims;
mod drain;
mod due;
mod leaving;
pub mod ledger;
mod observations;
mod overrides;
mod pace;
mod proxies;
mod requests;
mod rotation;
pub mod series;
pub mod state;
mod status;
#[cfg(test)]
mod tests;

pub use analysis::Analyses;
pub use baseline::Baselines;
pub use claims::Ignored;
pub use drain::DrainTracker;
pub use leaving::{Departure, Leaving, Remains};
pub use observations::Young;
pub use overrides::ApiOverride;
use overrides::InForce;
pub use rotation::Rotations;

use crate::admission::Held;
use crate::clock::{Millis, timestamp};
use crate::metrics::Claim;
use crate::readiness::Readiness;
use crate::reconciler::ledger::{Ledger, Taken, Written};
use crate::reconciler::series::Series;
use crate::reconciler::state::PersistedState;
use crate::rollout::{Allocation, Command, Refused, Rollout, Transition, remember};
use crate::secret_values::SecretValues;
use crate::{admission, clock, compile};
use claims::Advances;
use due::{Document, Due};
use observations::{Availability, Observations};
use pace::Pace;
use proxies::{Census, Proxies};
use requests::Requests;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tideshift_core::decode::Errors;
use tideshift_core::protocol::policy::{Policy, Service};
use tideshift_core::protocol::report::Report;
use tideshift_core::session::Secret;
use tideshift_core::shift::{OnDelete, ShiftService, TrafficShift};

/// A document, and how it is written.
type ReadDocument = (TrafficShift, Value);

/// The complete state of the controller's reconcile logic.
#[derive(Debug)]
pub struct Reconciler {
    /// The documents in force: those from files, overridden by those from the API, with the versions that were removed
    /// from them and still serve, and the deleted documents that still serve.
    shifts: Vec<TrafficShift>,
    /// Deleted documents that still serve, with their endpoints as the cluster currently reports them.
    resolved: BTreeMap<String, TrafficShift>,
    /// The documents with a removed or deleted part that still serves and that has not been found in the cluster yet.
    unfound: BTreeSet<String>,
    /// By new document: the version that already serves.
    starts: BTreeMap<String, String>,
    /// Documents that came back, with the time at which they were deleted.
    returned: Vec<(String, Millis)>,
    /// How many documents have been deleted so far, and how many of these have come back.
    documents_left: u64,
    documents_returned: u64,
    /// The same documents as written, where they do not come from a cluster.
    held: Vec<Arc<Held>>,
    /// By name, why a document's current text is not in force: the document itself is refused, or its compiled form is.
    refused: BTreeMap<String, Errors>,
    unreadable: BTreeMap<String, Errors>,
    /// Who last edited each document, where known: an API user, a file, or a field manager of a cluster.
    editors: BTreeMap<String, String>,
    /// The values that documents refer to by secretRef, and by document the references that are not resolved.
    secrets: Arc<SecretValues>,
    unresolved: BTreeMap<String, Vec<String>>,
    /// By service name: the index of its document in `shifts`, and its index in that document.
    places: HashMap<String, (usize, usize)>,
    /// Which documents need reconciling, and the result of each document's last reconcile.
    due: Due,
    /// Whether the services to publish differ from the published ones, as far as they have been reconciled.
    unpublished: bool,
    /// The documents from files, parsed and as written.
    files: Vec<(TrafficShift, Value)>,
    /// Whether the documents in force have changed since the last call of `changed_shifts`.
    shifts_changed: bool,
    document_errors: Vec<String>,
    /// Why decisions cannot be persisted; `None` if they can.
    state_error: Option<String>,
    /// Whether publishing waits until decisions can be persisted.
    waits_for_state: bool,
    /// Why counts cannot be persisted; `None` if they can.
    counts_error: Option<String>,
    /// The policy that proxies were given last; `None` if this process has published none.
    published: Option<Policy>,
    /// By service name: its index in that policy.
    published_at: HashMap<String, usize>,
    /// The rollouts that have changed since state was last persisted, and the last persisted revision.
    unwritten: BTreeSet<String>,
    written: u64,
    /// The namespaces whose documents cannot be read; their services stay as proxies have them. `None` stands for all
    /// namespaces.
    hidden: Vec<Option<String>>,
    readiness: Arc<Readiness>,
    /// The services whose endpoints have changed since the last reconcile.
    changed_ready: BTreeSet<String>,
    availability: Availability,
    /// When the next endpoint that recently became ready reaches `minReadySeconds`; 0: not computed yet.
    young_until: Option<Millis>,
    /// The services with vetoed versions as of the last reconcile.
    vetoed: BTreeSet<String>,
    /// Whether proxies had reported the counts from the time without a controller, as of the last reconcile.
    was_up_to_date: bool,
    counted: CountState,
    /// Whether counts have changed since the last call of `changed_counts`.
    counts_changed: bool,
    /// The services, as in `places`, whose counts have changed since the baselines last took them.
    recounted: BTreeSet<(usize, usize)>,
    /// Whether that may apply to all services.
    all_recounted: bool,
    /// By document: the services with counts that the analysis has not taken yet.
    unjudged: BTreeMap<usize, BTreeSet<usize>>,
    /// When obsolete counts were last removed.
    tidied: Millis,
    kept: PersistedState,
    /// Whether the persisted state has changed since the last reconcile.
    dirty: bool,
    news: Vec<(String, Transition)>,
    policy: Option<Policy>,
    pace: Pace,
    /// Whether a policy waits for the publishing interval.
    is_held_back: bool,
    /// Since when a change of the ready endpoints has not been persisted; `None` if there is none.
    stale_since: Option<Millis>,
    /// The services that proxies ran last, under this controller or its predecessor.
    in_force: Vec<Service>,
    /// By service name: its index in `in_force`.
    in_force_at: HashMap<String, usize>,
    /// The services in `in_force` whose versions are compared.
    compared: HashSet<String>,
    /// Until when proxies may still report counts from the time without a controller; `None` before the first
    /// reconcile.
    catching_up: Option<Millis>,
    /// When the last reconcile ran.
    looked: Option<Millis>,
    proxies: Proxies,
    /// How often proxies have advanced the revision.
    advances: Advances,
    /// Single requests that the analysis has not taken yet.
    requests: Requests,
    /// The live proxies, when that census was taken, and at which revision.
    census: (Census, Millis, u64),
    /// By service: the revision that changed it last.
    changed_in: HashMap<String, u64>,
    /// The proxies' change counter when drains were last checked, and when a drain next changes by time alone.
    drains: (u64, Option<Millis>),
    /// The time series of the last minutes.
    series: Series,
}

/// The counts and what was derived from them. They are persisted together, so that no count is judged twice.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CountState {
    /// The time of the newest count.
    #[serde(default)]
    pub time: Millis,
    /// All counts.
    #[serde(flatten)]
    pub ledger: Ledger,
    /// The evidence for and against the targets.
    #[serde(default)]
    pub judges: Analyses,
    /// The baselines that targets are compared with.
    #[serde(default)]
    pub recent: Baselines,
}

impl CountState {
    /// Starts without history: counts that running proxies already have become the baseline and are not judged.
    pub fn beginning(now: Millis) -> Self {
        Self { ledger: Ledger::beginning(now), ..Self::default() }
    }

    /// The form to persist if `room` bytes are available for the counts of single proxy runs: see [`Ledger::written`].
    pub fn written(&self, room: usize) -> WrittenCounts<'_> {
        let Self { time, ledger, judges, recent } = self;
        WrittenCounts { time: *time, ledger: ledger.written(room), judges, recent }
    }
}

/// [`CountState`] in its persisted form.
#[derive(Debug, serde::Serialize)]
pub struct WrittenCounts<'a> {
    time: Millis,
    #[serde(flatten)]
    ledger: Written,
    judges: &'a Analyses,
    recent: &'a Baselines,
}

impl WrittenCounts<'_> {
    /// How many of its bytes hold the counts of single proxy runs.
    pub fn bytes_of_runs(&self) -> usize {
        self.ledger.bytes_of_runs()
    }
}

/// The result of one reconcile.
#[derive(Debug, Default)]
pub struct ReconcileOutput {
    /// A policy to publish once the state is persisted.
    pub policy: Option<Policy>,
    /// Whether the persisted state has changed.
    pub keep: bool,
    /// The transitions, each with the rollout's name.
    pub transitions: Vec<(String, Transition)>,
    /// Messages for the log, each with the rollout's name.
    pub messages: Vec<(String, String)>,
}

/// The result of reconciling one document.
#[derive(Debug, Default)]
struct Looked {
    document: Document,
    /// The rollout if it has changed; its transitions; and a message for the log.
    rollout: Option<Rollout>,
    news: Vec<Transition>,
    message: Option<String>,
    /// Whether the change must be persisted.
    keep: bool,
    /// Whether the document must be reconciled once more.
    again: bool,
}

/// The result of processing a report.
#[derive(Debug, Default)]
pub struct Reported {
    /// Whether the report changed anything that may lead to a decision.
    pub decides: bool,
    /// The parts of it that were ignored.
    pub ignored: Vec<Ignored>,
}

/// A step that waits for a gate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PendingGate {
    /// The rollout's name.
    pub name: String,
    /// Its number.
    pub rollout: u64,
    /// The index of the step.
    pub step: usize,
    /// The names of the webhooks that must approve it.
    pub gates: Vec<String>,
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// There is no such rollout or version.
    #[error("{0}")]
    NotFound(String),
    /// The command conflicts with the rollout's current state.
    #[error("{0}")]
    Conflict(String),
    /// The command is invalid in any state; one line for each error.
    #[error("{0}")]
    Invalid(String),
}

impl From<Refused> for CommandError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Invalid(why) => Self::Invalid(why),
            Refused::Conflict(why) => Self::Conflict(why),
        }
    }
}

/// How long to wait after a restart for the counts from the time without a controller. Proxies report every second.
const CATCH_UP: Millis = 2_000;
/// The interval between two censuses of the live proxies.
const CENSUS: Millis = 100;
/// The interval between two removals of obsolete counts.
const TIDY: Millis = 10_000;
/// How far the revision of a policy that is published before it is persisted leaps ahead. A replica that continues from
/// an older state does not get that far before proxies report their revision.
const LEAP: u64 = 1_000;
/// How often the time is persisted while a rollout is held or waits.
const KEEP_TIME: Millis = 5_000;
/// How long a change of the ready endpoints may stay unpersisted if nothing else has to be persisted.
const KEEP_READY: Millis = 1_000;
/// A proxy's report advances the revision no further than this, which leaves room for as many again.
const MAX_REVISION: u64 = u64::MAX / 2;

impl Reconciler {
    /// Continues from the persisted state.
    pub fn new(files: Vec<(TrafficShift, Value)>, kept: PersistedState, counted: CountState) -> Self {
        let mut reconciler = Self::empty(kept, counted);
        reconciler.set_documents(files);
        reconciler
    }

    /// The same, for documents of which some namespaces cannot be read (`None` stands for all): services of those stay
    /// as they are. The second list holds documents that are being deleted.
    pub fn with_hidden(
        (files, deleted): (Vec<ReadDocument>, &[ReadDocument]),
        hidden: Vec<Option<String>>,
        kept: PersistedState,
        counted: CountState,
    ) -> Self {
        let mut reconciler = Self::empty(kept, counted);
        reconciler.set_documents_but(files, hidden, BTreeMap::new(), deleted);
        reconciler
    }

    fn empty(kept: PersistedState, counted: CountState) -> Self {
        let mut reconciler = Self {
            shifts: Vec::new(),
            resolved: BTreeMap::new(),
            unfound: BTreeSet::new(),
            starts: BTreeMap::new(),
            returned: Vec::new(),
            documents_left: 0,
            documents_returned: 0,
            held: Vec::new(),
            refused: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            editors: BTreeMap::new(),
            secrets: Arc::default(),
            unresolved: BTreeMap::new(),
            places: HashMap::new(),
            due: Due::default(),
            unpublished: true,
            files: Vec::new(),
            shifts_changed: false,
            document_errors: Vec::new(),
            state_error: None,
            waits_for_state: false,
            counts_error: None,
            published: None,
            published_at: HashMap::new(),
            unwritten: BTreeSet::new(),
            written: kept.revision,
            hidden: Vec::new(),
            readiness: Arc::default(),
            changed_ready: BTreeSet::new(),
            young_until: Some(0),
            vetoed: BTreeSet::new(),
            was_up_to_date: false,
            availability: Availability::new(&kept.ready, &kept.young),
            proxies: Proxies::awaiting(counted.ledger.heard_of_last(proxies::SILENT)),
            counted,
            requests: Requests::default(),
            advances: Advances::new(kept.revision > 0),
            counts_changed: false,
            recounted: BTreeSet::new(),
            all_recounted: true,
            unjudged: BTreeMap::new(),
            tidied: 0,
            dirty: false,
            news: Vec::new(),
            policy: None,
            pace: Pace::default(),
            is_held_back: false,
            stale_since: None,
            in_force: Vec::new(),
            in_force_at: HashMap::new(),
            compared: HashSet::new(),
            catching_up: None,
            looked: None,
            census: Default::default(),
            changed_in: HashMap::new(),
            drains: (0, Some(0)),
            kept,
            series: Series::default(),
        };
        let in_force = reconciler.kept.policy().map(|policy| policy.services).unwrap_or_default();
        reconciler.put_services_in_force(&in_force);
        reconciler
    }

    /// Sets the documents from files. Each is accepted or refused on its own.
    pub fn set_documents(&mut self, files: Vec<(TrafficShift, Value)>) {
        self.files = files;
        self.document_errors.clear();
        let admitted = overrides::admit(&self.held, &self.files, &self.kept.applied);
        self.take_in(admitted);
    }

    /// Sets the documents of a cluster, already checked against each other, except those of `hidden` namespaces, which
    /// cannot be read. `gone` holds the documents of [`Self::remains`] with their endpoints as the cluster reports
    /// them; `deleted` holds documents that are being deleted.
    pub fn set_documents_but(
        &mut self,
        files: Vec<(TrafficShift, Value)>,
        hidden: Vec<Option<String>>,
        gone: BTreeMap<String, TrafficShift>,
        deleted: &[(TrafficShift, Value)],
    ) {
        self.hidden = hidden;
        self.resolved = gone;
        let before = std::mem::replace(&mut self.files, files);
        self.document_errors.clear();
        let declared = self.files.iter().map(|(shift, _)| shift.clone()).collect();
        let written = |name: &str| before.iter().find(|(shift, _)| shift.name == name).map(|(_, value)| value.clone());
        self.take_leave(declared, written, deleted);
    }

    /// Records who last edited a document.
    pub fn edited_by(&mut self, name: &str, by: &str) {
        self.editors.insert(name.to_owned(), by.to_owned());
    }

    /// Records the editor of each document that is about to be set and differs from the one in force.
    pub fn edited(&mut self, documents: &[(TrafficShift, Value)], by: impl Fn(&str) -> Option<String>) {
        let before: HashMap<&str, &Value> =
            self.files.iter().map(|(shift, value)| (shift.name.as_str(), value)).collect();
        let is_new = |(shift, value): &&(TrafficShift, Value)| before.get(shift.name.as_str()) != Some(&value);
        let new = documents.iter().filter(is_new).filter_map(|(shift, _)| Some((shift.name.clone(), by(&shift.name)?)));
        let new: Vec<_> = new.collect();
        self.editors.extend(new);
    }

    fn take_in(&mut self, admitted: InForce) {
        for name in &admitted.overtaken {
            self.kept.applied.remove(name);
            self.dirty = true;
        }
        self.refused = admitted.refused;
        let before = std::mem::replace(&mut self.held, admitted.held);
        self.pace.hurry();
        let declared = self.held.iter().map(|held| held.shift.clone()).collect();
        let written = |name: &str| before.iter().find(|held| held.shift.name == name).map(|held| held.document.clone());
        self.take_leave(declared, written, &[]);
    }

    /// Updates the indexes after the documents in force have changed, and drops the state of documents that are long
    /// gone.
    fn know_documents(&mut self, before: &[TrafficShift]) {
        self.due.set(before, &self.shifts);
        let places = self.shifts.iter().enumerate().flat_map(|(i, shift)| {
            shift.services.iter().enumerate().map(move |(j, service)| (service.name.clone(), (i, j)))
        });
        self.places = places.collect();
        (self.all_recounted, self.unpublished) = (true, true);
        self.recounted.clear();
        self.unjudged.clear();
        (self.young_until, self.drains.1) = (Some(0), Some(0));
        let left = self.kept.leaving.names().chain(self.returned.iter().map(|(name, _)| name));
        let left: Vec<usize> = left.filter_map(|name| self.due.place(name)).collect();
        left.into_iter().for_each(|at| self.due.mark(at));
        let (hidden, leaving) = (&self.hidden, &self.kept.leaving);
        let is_known = |name: &String| self.due.place(name).is_some() || leaving.remembers(name) || is_in(name, hidden);
        self.kept.rollouts.retain(|name, _| is_known(name));
        self.kept.history.retain(|name, _| is_known(name));
        self.editors.retain(|name, _| is_known(name));
        self.counted.judges.retain(is_known);
        let has_service = |name: &String| self.places.contains_key(name);
        self.counted.recent.retain(|name| has_service(name) || is_in(name, hidden));
        self.kept.rotations.retain(|name| has_service(name) || is_in(name, hidden));
        self.shifts_changed = true;
        self.look_for_unresolved();
    }

    /// Sets the values of the secrets that documents refer to. A session whose secret is not known keeps its previous
    /// one.
    pub fn set_secrets(&mut self, secrets: Arc<SecretValues>) {
        if self.secrets == secrets {
            return;
        }
        self.secrets = secrets;
        self.due.mark_all();
        self.look_for_unresolved();
    }

    fn look_for_unresolved(&mut self) {
        let of = |shift: &TrafficShift| (shift.name.clone(), self.secrets.unresolved(shift));
        let unresolved = self.shifts.iter().map(of).filter(|(_, lines)| !lines.is_empty()).collect();
        let before = std::mem::replace(&mut self.unresolved, unresolved);
        for (name, lines) in &self.unresolved {
            let is_new = |line: &&String| !before.get(name).is_some_and(|before| before.contains(line));
            lines.iter().filter(is_new).for_each(|line| tracing::error!(rollout = name, "{line}"));
        }
    }

    /// The references of a document that cannot be resolved, one line for each field.
    pub fn unresolved(&self, name: &str) -> &[String] {
        self.unresolved.get(name).map_or(&[], Vec::as_slice)
    }

    /// Finds a document by name. Where names include the namespace, the short name is enough if it is unambiguous.
    fn shift(&self, name: &str) -> Option<&TrafficShift> {
        if let Some(shift) = self.named(name) {
            return Some(shift);
        }
        let is_short = |full: &str, namespace: &Option<String>| {
            namespace
                .as_ref()
                .is_some_and(|namespace| full.strip_suffix(namespace.as_str()) == Some(&format!("{name}.")))
        };
        let mut short = self.shifts.iter().filter(|shift| is_short(&shift.name, &shift.namespace));
        short.next().filter(|_| short.next().is_none())
    }

    /// Finds a document by its exact name.
    fn named(&self, name: &str) -> Option<&TrafficShift> {
        self.shifts.get(self.due.place(name)?)
    }

    /// The documents in force.
    pub fn shifts(&self) -> &[TrafficShift] {
        &self.shifts
    }

    /// The documents in force, if they have changed since the last call.
    pub fn changed_shifts(&mut self) -> Option<&[TrafficShift]> {
        std::mem::take(&mut self.shifts_changed).then_some(&self.shifts)
    }

    /// Sets the errors of documents that cannot be read. Their previous content stays in force.
    pub fn set_document_errors(&mut self, errors: Vec<String>) {
        self.document_errors = errors;
    }

    /// All errors in documents, one line each.
    pub fn document_errors(&self) -> Vec<String> {
        let refused = self.refused.iter().chain(&self.unreadable);
        let lines = refused.flat_map(|(name, errors)| errors.0.iter().map(move |error| format!("{name}: {error}")));
        let unresolved = self.unresolved.iter();
        let unresolved = unresolved.flat_map(|(name, lines)| lines.iter().map(move |line| format!("{name}: {line}")));
        self.document_errors.iter().cloned().chain(lines).chain(unresolved).collect()
    }

    /// Why a document's current text is not in force; `None` if it is.
    pub fn refusal(&self, name: &str) -> Option<String> {
        let mut refused = self.refused.get(name).into_iter().chain(self.unreadable.get(name));
        refused.next().map(Errors::to_string)
    }

    /// Sets why decisions cannot be persisted; `None` if they can. With `waits`, nothing is published until they can.
    pub fn set_state_error(&mut self, error: Option<&str>, waits: bool) {
        if self.state_error.as_deref() != error {
            self.state_error = error.map(str::to_owned);
        }
        self.waits_for_state = waits && error.is_some();
    }

    /// Why nothing can be published; `None` if publishing is possible.
    pub fn held_back(&self) -> Option<&str> {
        self.state_error.as_deref().filter(|_| self.waits_for_state)
    }

    /// Sets why counts cannot be persisted; `None` if they can. Until they can, rollouts do not advance by evidence.
    pub fn set_counts_error(&mut self, error: Option<&str>) {
        if self.counts_error.as_deref() != error {
            self.counts_error = error.map(str::to_owned);
            self.due.mark_all_moving();
        }
    }

    /// Records that all decisions are persisted.
    pub fn was_written(&mut self) {
        self.unwritten.clear();
        self.written = self.kept.revision;
    }

    /// The part of the unpersisted decisions that proxies must receive all the same: versions that can take no traffic
    /// get none, and targets give back their share. No share grows that a restart would take back. `None` if proxies
    /// already have this.
    pub fn away(&mut self) -> Option<Policy> {
        let (published, decided) = (self.published.as_ref()?, self.policy.as_ref()?);
        let decided: HashMap<&str, &Service> = decided.services.iter().map(|of| (of.name.as_str(), of)).collect();
        let services: Vec<Service> = published
            .services
            .iter()
            .map(|before| {
                let Some(now) = decided.get(before.name.as_str()) else { return before.clone() };
                self.away_of(before, now)
            })
            .collect();
        if services == published.services {
            return None;
        }
        // A replica that continues from the persisted state publishes no policy with this revision.
        let revision = self.kept.revision.max(published.revision).max(self.written.saturating_add(LEAP)) + 1;
        (self.kept.revision, self.policy, self.dirty) = (revision, None, true);
        self.due.mark_all_moving();
        self.pace.hurry();
        self.kept.services.clear();
        Some(Policy { revision, services, ..Policy::default() })
    }

    fn away_of(&self, before: &Service, now: &Service) -> Service {
        let shift = self.places.get(&now.name).and_then(|(shift, _)| self.shifts.get(*shift));
        let rollout = shift.filter(|shift| self.unwritten.contains(&shift.name));
        let rollout = rollout.and_then(|shift| self.kept.rollouts.get(&shift.name));
        let Some(rollout) = rollout.filter(|rollout| !rollout.is_return) else { return now.clone() };
        let target = rollout.target.as_deref().unwrap_or_default();
        if share_of(now, target) <= share_of(before, target) {
            return now.clone();
        }
        let mut held = before.clone();
        for version in &mut held.versions {
            let serves = now.versions.iter().any(|of| of.name == version.name && of.serving);
            version.serving &= serves;
        }
        let carries = held.versions.iter().any(|version| version.serving && version.weight > 0);
        if carries { held } else { now.clone() }
    }

    /// Records the policy that proxies are given from now on.
    pub fn set_published(&mut self, policy: &Policy) {
        self.published = Some(policy.clone());
        self.published_at = places_of(&policy.services);
    }

    /// Whether nothing is being moved, held or drained.
    pub fn is_at_rest(&self) -> bool {
        !self.kept.idle.is_under_way() && !self.kept.rollouts.values().any(|rollout| rollout.phase.is_under_way())
    }

    /// All counts.
    pub fn counted(&self) -> &CountState {
        &self.counted
    }

    /// Applies a document from the API. It overrides the file's document of the same name until the file changes.
    /// Returns whether the document is new.
    ///
    /// # Errors
    ///
    /// If it is invalid or conflicts with another document; the previous one stays in force.
    pub fn put_shift(&mut self, name: &str, document: Value) -> Result<bool, CommandError> {
        overrides::check(name, &document).map_err(CommandError::Invalid)?;
        let over = self.files.iter().find(|(file, _)| file.name == name).map(|(_, value)| value.clone());
        let mut all = self.kept.applied.clone();
        all.insert(name.to_owned(), ApiOverride { document, over });
        let admitted = overrides::admit(&self.held, &self.files, &all);
        if let Some(errors) = admitted.refused.get(name) {
            return Err(CommandError::Invalid(errors.to_string()));
        }
        let is_new = self.named(name).is_none_or(|shift| self.has_left(shift));
        self.kept.applied = all;
        self.dirty = true;
        self.take_in(admitted);
        Ok(is_new)
    }

    /// Deletes a document that was applied through the API; a file's document of the same name comes back into force.
    /// `on_delete` replaces the document's own setting; it also gives up the weights that were kept of a deleted
    /// document.
    ///
    /// # Errors
    ///
    /// If there is no document of this name, or it comes from a file.
    pub fn delete_shift(&mut self, name: &str, on_delete: Option<OnDelete>) -> Result<(), CommandError> {
        let mut all = self.kept.applied.clone();
        if all.remove(name).is_none() {
            return match (self.departure(name).filter(|of| of.in_force), on_delete) {
                (Some(_), Some(on_delete)) => {
                    self.give_up(name, on_delete);
                    Ok(())
                }
                (Some(_), None) => Err(CommandError::Conflict(format!(
                    "{name}: {}",
                    self.departure_in_words(name).unwrap_or_default()
                ))),
                _ if self.document(name).is_some() => Err(CommandError::Conflict(format!(
                    "the TrafficShift {name} comes from a file that the controller was given; remove it there"
                ))),
                _ => Err(CommandError::NotFound(format!("there is no TrafficShift {name}"))),
            };
        }
        let admitted = overrides::admit(&self.held, &self.files, &all);
        self.kept.applied = all;
        self.dirty = true;
        self.take_in(admitted);
        if let Some(on_delete) = on_delete {
            self.give_up(name, on_delete);
        }
        Ok(())
    }

    /// The document in force of this name, as written.
    pub fn document(&self, name: &str) -> Option<Value> {
        let held = self.held.iter().find(|held| held.shift.name == name).map(|held| &held.document);
        let file = self.files.iter().find(|(shift, _)| shift.name == name).map(|(_, value)| value);
        held.or(file).cloned()
    }

    /// Sets the readiness that the probes report.
    pub fn set_readiness(&mut self, readiness: Arc<Readiness>) {
        let before = std::mem::replace(&mut self.readiness, readiness);
        self.changed_ready.extend(self.readiness.differs_from(&before));
    }

    /// Processes a proxy's report. Implausible parts of it are ignored.
    pub fn reported(&mut self, report: &Report, now: Millis) -> Reported {
        let run = (report.proxy.clone(), report.start.clone());
        let mut ignored = Vec::new();
        if let Err(leap) = claims::sequence(&self.counted.ledger, &run, report, now) {
            ignored.push(leap);
            return Reported { decides: false, ignored };
        }
        let is_ahead = report.epoch == self.kept.epoch && report.revision > self.kept.revision;
        let has_vetoes = report.services.iter().any(|service| !service.vetoes.is_empty());
        let mut report = Cow::Borrowed(report);
        let mut advances = false;
        if is_ahead {
            let (kept, revision) = (self.kept.revision, report.revision);
            let is_first = self.proxies.awaits_revision(&run) && revision < MAX_REVISION;
            match is_first.then(|| self.advances.allow(kept, revision, now)) {
                Some(Ok(())) => advances = true,
                Some(Err(why)) => ignored.push(why),
                None => ignored.push((Claim::Revision, format!("revision {revision}, where {kept} was the last"))),
            }
            if !advances {
                // The proxy runs no revision of this controller.
                report.to_mut().epoch.clear();
            }
        }
        if has_vetoes {
            ignored.extend(claims::vetoes(report.to_mut(), &self.in_force, now));
        }
        let (shifts, places, idle) = (&self.shifts, &self.places, &self.kept.idle);
        let knows = |service: &str, version: &str| is_known(shifts, places, idle, service, version);
        let taken = self.counted.ledger.take(&run, &report, knows, now);
        if taken == Taken::Old {
            return Reported { decides: false, ignored };
        }
        let decides = self.proxies.reported(&run, &report, &self.kept.epoch, knows, now);
        self.counts_changed |= taken == Taken::News;
        if !self.compared.is_empty() {
            let compared = &self.compared;
            self.requests.reported(&run, &report, |name| compared.contains(name), now);
        }
        // Counts of a rollout that is not under way wait for the next tick.
        let moves = taken == Taken::News && self.note_counts(&report);
        if advances {
            // The persisted state is an older copy, or later state could not be persisted: proxies have seen a newer
            // revision. They accept only policies newer than that.
            self.kept.revision = report.revision;
            self.kept.services.clear();
            self.changed_in.clear();
            self.due.mark_all_moving();
            self.policy = None;
            self.pace.hurry();
            self.dirty = true;
        }
        Reported { decides: decides || moves, ignored }
    }

    /// Marks the services of the report as recounted. Returns whether one of their rollouts is under way.
    fn note_counts(&mut self, report: &Report) -> bool {
        let mut moves = false;
        for service in &report.services {
            let Some(&(shift, at)) = self.places.get(&service.name) else { continue };
            self.recounted.insert((shift, at));
            if self.due.is_under_way(shift) {
                moves = true;
                self.due.mark(shift);
                self.unjudged.entry(shift).or_default().insert(at);
            }
        }
        moves
    }

    /// Why decisions cannot be persisted; `None` if they can.
    pub fn state_error(&self) -> Option<&str> {
        self.state_error.as_deref()
    }

    /// Applies a command to a rollout. Returns whether it changed anything.
    ///
    /// # Errors
    ///
    /// If there is no such rollout, or the command conflicts with its state.
    pub fn command(&mut self, name: &str, command: &Command, now: Millis) -> Result<bool, CommandError> {
        self.command_by(None, name, command, now)
    }

    /// The same, and records who gave the command.
    ///
    /// # Errors
    ///
    /// As [`Self::command`].
    pub fn command_by(
        &mut self,
        by: Option<&str>,
        name: &str,
        command: &Command,
        now: Millis,
    ) -> Result<bool, CommandError> {
        let Some(shift) = self.shift(name) else {
            let known: Vec<_> = self.shifts.iter().map(|shift| shift.name.as_str()).collect();
            let known = known.join(", ");
            return Err(CommandError::NotFound(format!("there is no rollout {name}; expected one of {known}")));
        };
        if self.has_left(shift) {
            let why = self.departure_in_words(&shift.name).unwrap_or_default();
            return Err(CommandError::Conflict(format!("{}: {why}", shift.name)));
        }
        if !self.is_known(shift) {
            let why = self.unseen(shift).unwrap_or("waiting for the first probes");
            return Err(CommandError::Conflict(why.to_owned()));
        }
        let world = self.world(shift, now);
        let name = shift.name.clone();
        let starts = self.starts.get(&name).map(String::as_str);
        let first = || Rollout::starting_from(starts, shift, &world, now);
        let before = self.kept.rollouts.get(&name).cloned().unwrap_or_else(first);
        let mut rollout = before.clone().command(command, shift, &world, now)?;
        if rollout == before {
            return Ok(false);
        }
        let by = by.map(str::to_owned);
        let news = rollout.take_news().into_iter().map(|news| Transition { by: by.clone(), ..news });
        self.news.extend(news.map(|news| (name.clone(), news)));
        if is_elsewhere(Some(&before), &rollout) {
            self.unwritten.insert(name.clone());
        }
        self.mark(&name);
        self.kept.rollouts.insert(name, rollout);
        self.dirty = true;
        self.pace.hurry();
        Ok(true)
    }

    /// Marks a document as due for a reconcile.
    fn mark(&mut self, name: &str) {
        if let Some(at) = self.due.place(name) {
            self.due.mark(at);
        }
    }

    /// The steps that wait for a gate, each with a number that grows when its rollout changes.
    pub fn questions(&self) -> Vec<(PendingGate, u64)> {
        let question = |at: usize| {
            let shift = self.shifts.get(at)?;
            let rollout = self.kept.rollouts.get(&shift.name)?;
            let step = rollout.asks_for_step(shift)?;
            let gates = rollout.gates_of(step, shift).map(|webhook| webhook.name.clone()).collect();
            let question = PendingGate { name: shift.name.clone(), rollout: rollout.number, step, gates };
            Some((question, self.due.documents().get(at)?.looks))
        };
        self.due.under_way().filter_map(question).collect()
    }

    /// Records a gate's answer. Answers to outdated questions change nothing.
    pub fn gate_answered(&mut self, question: &PendingGate, allowed: bool, words: &str) {
        if let Some(rollout) = self.kept.rollouts.get_mut(&question.name)
            && rollout.number == question.rollout
        {
            rollout.gate_answered(question.step, allowed, words);
            self.dirty = true;
            self.mark(&question.name);
        }
    }

    /// Runs one reconcile: rollouts advance, and weights follow.
    pub fn evaluate(&mut self, now: Millis) -> ReconcileOutput {
        self.attend(now);
        self.look_at_what_left(now);
        let mut outcome = ReconcileOutput { keep: std::mem::take(&mut self.dirty), ..ReconcileOutput::default() };
        outcome.transitions = std::mem::take(&mut self.news);
        self.look_at_readiness(now);
        self.listen(now);
        self.look_at_vetoes(now);
        let mut due = self.due.take(now);
        self.judge(&mut due, now);
        let looked: Vec<_> = due.into_iter().filter_map(|at| Some((at, self.look(at, now)?))).collect();
        for (at, Looked { document, rollout, news, keep, message, again }) in looked {
            let Some(shift) = self.shifts.get(at) else { continue };
            let name = &shift.name;
            self.unpublished |= self.due.documents().get(at).is_none_or(|before| before.services != document.services);
            let editor = self.editors.get(name);
            let by = |news: Transition| match news.reason.is_of_document() {
                true => Transition { by: editor.cloned(), ..news },
                false => news,
            };
            outcome.transitions.extend(news.into_iter().map(|news| (name.clone(), by(news))));
            outcome.messages.extend(message.map(|message| (name.clone(), message)));
            if let Some(rollout) = rollout {
                if is_elsewhere(self.kept.rollouts.get(name), &rollout) {
                    self.unwritten.insert(name.clone());
                }
                self.starts.remove(name);
                self.kept.rollouts.insert(name.clone(), rollout);
            }
            outcome.keep |= keep;
            self.due.put(at, document);
            if again {
                self.due.mark(at);
            }
        }
        for (name, transition) in &outcome.transitions {
            remember(self.kept.history.entry(name.clone()).or_default(), transition.clone());
        }
        if self.young_until.is_some_and(|until| now >= until) {
            let (young, until) = self.availability.young(&self.shifts, now);
            self.young_until = until;
            outcome.keep |= self.kept.young != young;
            self.kept.young = young;
        }
        self.publish(&mut outcome, now);
        outcome.keep |= self.look_at_drains(now);
        self.note(now);
        // Persist the elapsed part of a hold, so that a restart does not repeat it.
        let passes = self.kept.idle.is_under_way() || self.kept.rollouts.values().any(|of| of.phase.is_under_way());
        outcome.keep |= passes && now.saturating_sub(self.kept.time) >= KEEP_TIME;
        self.counted.time = now;
        outcome.keep |= self.stale_since.is_some_and(|since| now.saturating_sub(since) >= KEEP_READY);
        if outcome.keep {
            self.stale_since = None;
            (self.kept.time, self.kept.wall) = (now, clock::wall(now));
        }
        outcome
    }

    /// Reconciles one document.
    fn look(&self, at: usize, now: Millis) -> Option<Looked> {
        let shift = self.shifts.get(at)?;
        let looks = self.due.documents().get(at).map_or(0, |before| before.looks) + 1;
        let world = self.world(shift, now);
        let before = self.kept.rollouts.get(&shift.name);
        let evidence = |rollout: &Rollout| self.counted.judges.evidence(shift, rollout);
        // A service whose endpoints have not all been probed yet stays as proxies have it: assuming that they are not
        // ready would take traffic away from those that are.
        if !self.is_known(shift) || (before.is_none() && self.has_left(shift)) {
            let stable = self.starts.get(&shift.name).unwrap_or(&shift.stable);
            let services = shift.services.iter().map(|service| {
                let in_force = self.service_in_force(service, stable);
                self.with_session(in_force, before)
            });
            let rollout = before.cloned().unwrap_or_else(|| Rollout::new(shift, now));
            let (evidence, parts) = (evidence(&rollout), rollout.all_parts(shift, &world));
            let is_under_way = rollout.phase.is_under_way();
            let services = services.collect();
            let document = Document { services, parts, evidence, is_under_way, looks, ..Document::default() };
            return Some(Looked { document, ..Looked::default() });
        }
        let first = || Rollout::starting_from(self.starts.get(&shift.name).map(String::as_str), shift, &world, now);
        let mut after = before.cloned().unwrap_or_else(first);
        // The rollout of a deleted document does not advance. Its weights still follow readiness.
        if !self.has_left(shift) {
            after = after.advance(shift, &world, now);
        }
        let news = after.take_news();
        let parts = after.all_parts(shift, &world);
        let services = shift.services.iter().zip(&parts).map(|(service, parts)| {
            let compiled = service_of(&after, shift, service, parts);
            self.with_session(compiled, Some(&after))
        });
        let (services, evidence) = (services.collect(), evidence(&after));
        let is_under_way = after.phase.is_under_way() && !self.has_left(shift);
        let due = is_under_way.then(|| {
            let of_endpoints = self.availability.next(shift, now);
            due::at_the_latest(after.next_due(shift, now).into_iter().chain(of_endpoints), now)
        });
        let document = Document { services, parts, evidence, is_known: true, is_under_way, due, looks };
        let is_same = before == Some(&after);
        // A change of counts in the message alone does not require a write.
        let keep = !is_same && before.is_none_or(|before| !before.is_but_in_words(&after));
        let is_said = before.is_some_and(|before| before.message == after.message);
        let message = (!is_said).then(|| format!("{}: {}", after.phase.name(), after.message));
        // One step per reconcile: the next one handles what follows from this state.
        let (rollout, again) = ((!is_same).then_some(after), !is_same);
        Some(Looked { document, rollout, news, keep, message, again })
    }

    /// Completes a service's session. It is signed with the secret that the document contains or refers to; while that
    /// cannot be resolved, with the previous secret; else with the controller's own.
    fn with_session(&self, mut service: Service, rollout: Option<&Rollout>) -> Service {
        if let Some(session) = &mut service.session {
            let place = self.places.get(&service.name);
            let of = place.and_then(|(shift, at)| Some((self.shifts.get(*shift)?, *at)));
            let of = of.and_then(|(shift, at)| Some((shift, shift.services.get(at)?)));
            if let Some((shift, of)) = of.filter(|(_, of)| of.session_secret.is_some()) {
                let was =
                    || self.in_force.get(*self.in_force_at.get(&service.name)?)?.session.as_ref()?.secret.as_ref();
                session.secret = self.secrets.of_session(shift, of).or_else(was).cloned();
            }
            session.secret.get_or_insert_with(|| Secret::new(self.kept.session_secret.clone()));
            session.generation = session.generation.saturating_add(rollout.map_or(0, |rollout| rollout.rollback_count));
        }
        service
    }

    /// Marks the services whose endpoints have changed.
    fn look_at_readiness(&mut self, now: Millis) {
        if self.changed_ready.is_empty() {
            return;
        }
        let changed = std::mem::take(&mut self.changed_ready);
        self.availability.look(&changed, &self.readiness, now);
        self.young_until = Some(0);
        for (shift, _) in changed.iter().filter_map(|name| self.places.get(name)) {
            self.due.mark(*shift);
        }
        let services = &self.readiness.services;
        if !services.is_empty() && self.readiness.remember(&mut self.kept.ready, &changed) {
            self.stale_since.get_or_insert(now);
        }
    }

    /// Marks rollouts under way whose vetoed versions have changed.
    fn look_at_vetoes(&mut self, now: Millis) {
        let vetoed: BTreeSet<String> = self.proxies.vetoes(now).iter().map(|(name, _)| (*name).to_owned()).collect();
        let before = std::mem::replace(&mut self.vetoed, vetoed);
        for (shift, _) in before.iter().chain(&self.vetoed).filter_map(|name| self.places.get(name)) {
            self.due.mark_moving(*shift);
        }
    }

    /// Accounts for time in which the process did not reconcile, at the start and after each stall: that time does not
    /// count towards holds, waits and drains.
    fn attend(&mut self, now: Millis) {
        let kept = &mut self.kept;
        let (last, restated) = match self.looked {
            Some(looked) => (looked, 0),
            None => {
                let ahead = |wall: Millis, time: Millis| wall.cast_signed().saturating_sub(time.cast_signed());
                let before = if kept.wall > 0 { ahead(kept.wall, kept.time) } else { 0 };
                (kept.time.max(self.counted.time), before.saturating_sub(ahead(clock::wall(now), now)))
            }
        };
        let long = now.saturating_sub(last);
        // State from an older build does not contain the time at which it was persisted.
        let is_known = last > 0;
        if !is_known || (self.looked.is_some() && long <= CATCH_UP) {
            return;
        }
        for rollout in kept.rollouts.values_mut() {
            rollout.was_unattended(long, restated);
        }
        for transition in kept.history.values_mut().flatten() {
            transition.time = transition.time.saturating_add_signed(restated);
        }
        kept.idle.was_unattended(long, restated);
        kept.leaving.was_unattended(long);
        self.availability.was_unattended(long);
        self.due.mark_all();
        (self.young_until, self.drains.1) = (Some(0), Some(0));
    }

    /// Accounts for time in which reports were not received, at the start and after each stall.
    fn listen(&mut self, now: Millis) {
        let looked = self.looked.replace(now);
        if looked.is_none_or(|looked| now.saturating_sub(looked) > CATCH_UP) {
            let had_proxies = looked.is_some() || !self.in_force.is_empty();
            self.catching_up = Some(if had_proxies { now + CATCH_UP } else { now });
            self.proxies.listen(now);
        }
        self.proxies.forget_silent(now);
        self.tidy(now);
        // There may be thousands of proxies, so the census is limited in rate.
        let (_, counted, revision) = &self.census;
        let is_due = now.saturating_sub(*counted) >= CENSUS || *revision != self.kept.revision;
        if is_due && self.kept.rollouts.values().any(|rollout| rollout.phase.is_under_way()) {
            let census = self.proxies.census(now);
            if census != self.census.0 {
                self.due.mark_all_moving();
            }
            self.census = (census, now, self.kept.revision);
        }
        if self.is_up_to_date(now) != self.was_up_to_date {
            self.was_up_to_date = !self.was_up_to_date;
            self.due.mark_all();
        }
    }

    /// Removes the counts of versions and proxies that are long gone.
    fn tidy(&mut self, now: Millis) {
        if now.saturating_sub(self.tidied) < TIDY {
            return;
        }
        self.tidied = now;
        let (shifts, places, idle, hidden) = (&self.shifts, &self.places, &self.kept.idle, &self.hidden);
        let is_known =
            |service: &str, version: &str| is_known(shifts, places, idle, service, version) || is_in(service, hidden);
        self.counted.ledger.tidy(is_known, now);
        let (compared, proxies) = (&self.compared, &self.proxies);
        self.requests.retain(|name| compared.contains(name), |run| proxies.has(run));
    }

    /// Gathers evidence from new counts, for the documents that are due and for those whose services have new counts.
    /// The latter become due if their evidence changes.
    fn judge(&mut self, due: &mut BTreeSet<usize>, now: Millis) {
        let (recounted, all) = (std::mem::take(&mut self.recounted), std::mem::take(&mut self.all_recounted));
        let (recent, ledger) = (&mut self.counted.recent, &self.counted.ledger);
        let mut changed = if all {
            for (at, shift) in self.shifts.iter().enumerate() {
                self.unjudged.insert(at, (0..shift.services.len()).collect());
            }
            recent.look(self.shifts.iter().flat_map(|shift| &shift.services), ledger)
        } else {
            let services = recounted.iter().filter_map(|(shift, at)| self.shifts.get(*shift)?.services.get(*at));
            recent.look(services, ledger)
        };
        let mut judges = std::mem::take(&mut self.counted.judges);
        let mut requests = std::mem::take(&mut self.requests);
        let mut unjudged = std::mem::take(&mut self.unjudged);
        let nothing = BTreeSet::new();
        for at in due.iter().chain(unjudged.keys()).copied().collect::<BTreeSet<_>>() {
            let is_judged = |shift: &&TrafficShift| self.is_known(shift) && !self.has_left(shift);
            let Some(shift) = self.shifts.get(at).filter(is_judged) else { continue };
            let Some(rollout) = self.kept.rollouts.get(&shift.name) else {
                unjudged.remove(&at);
                continue;
            };
            let parts = || rollout.all_parts(shift, &self.world(shift, now));
            let new = unjudged.get(&at).unwrap_or(&nothing);
            let looked = judges.look(shift, rollout, parts, (&self.counted, &mut requests, new), now);
            if looked.all {
                unjudged.remove(&at);
            }
            if looked.changed {
                changed = true;
                due.insert(at);
            }
        }
        (self.counted.judges, self.requests, self.unjudged) = (judges, requests, unjudged);
        self.counts_changed |= changed;
    }

    /// Whether the readiness of all endpoints of a document is known.
    fn is_known(&self, shift: &TrafficShift) -> bool {
        !self.unfound.contains(&shift.name)
            && shift.services.iter().all(|service| self.readiness.is_known(&service.name))
    }

    /// Why not all endpoints of a document can be discovered; `None` if they can.
    fn unseen(&self, shift: &TrafficShift) -> Option<&str> {
        let why = shift.services.iter().find_map(|service| self.readiness.outlook.unseen.get(&service.name));
        why.map(String::as_str)
    }

    /// Whether proxies have reported the counts from the time without a controller.
    fn is_up_to_date(&self, now: Millis) -> bool {
        self.catching_up.is_some_and(|until| now >= until)
    }

    fn world<'a>(&'a self, shift: &'a TrafficShift, now: Millis) -> Observations<'a> {
        let up_to_date = self.is_up_to_date(now);
        let opinion = self.counted.judges.opinion(shift);
        let availability = self.availability.of(shift, &self.readiness, now);
        let revision = |service: &ShiftService| self.changed_in.get(&service.name).copied();
        let revision = shift.services.iter().map(|service| revision(service).unwrap_or(self.kept.revision)).max();
        Observations::new(&self.counted.ledger, availability, self.proxies.vetoes(now), opinion, up_to_date)
            .with_proxies(&self.census.0, revision.unwrap_or_default(), shift)
            .with_counts_kept(self.counts_error.is_none())
    }

    fn publish(&mut self, outcome: &mut ReconcileOutput, now: Millis) {
        self.unpublished |= self.kept.rotations.next().is_some_and(|at| now >= at);
        // Without known endpoints, the policy that proxies started with stays.
        if (self.policy.is_some() && !self.unpublished) || self.due.knows_none() {
            return;
        }
        let mut services: Vec<Service> =
            self.due.documents().iter().flat_map(|document| &document.services).cloned().collect();
        let undescribed: BTreeSet<&String> = self.kept.leaving.undescribed().collect();
        if !self.hidden.is_empty() || !undescribed.is_empty() {
            let seen: HashSet<&str> = services.iter().map(|service| service.name.as_str()).collect();
            let stays = |of: &&Service| is_in(&of.name, &self.hidden) || undescribed.contains(&of.name);
            let stays = |of: &&Service| stays(of) && !seen.contains(&*of.name);
            let stays: Vec<Service> = self.in_force.iter().filter(stays).cloned().collect();
            services.extend(stays);
            if self.shifts.is_empty() && services.is_empty() {
                return;
            }
        }
        outcome.keep |= self.put_in_rotations(&mut services, now);
        if self.policy.as_ref().is_some_and(|policy| policy.services == services) {
            self.unreadable.clear();
            (self.is_held_back, self.unpublished) = (false, false);
            return;
        }
        self.leave_out_unreadable(&mut services);
        if self.policy.as_ref().is_some_and(|policy| policy.services == services) {
            self.unpublished = self.is_held_back;
            return;
        }
        let ready = |service: &str, version: &str| {
            self.readiness.endpoints(service, version).iter().filter(|endpoint| endpoint.ready).count()
        };
        self.is_held_back = !self.pace.lets((&self.in_force, &services), ready, now);
        if self.is_held_back {
            return;
        }
        let json = serde_json::to_string(&services).unwrap_or_default();
        // After a restart an unchanged policy keeps its revision.
        if self.kept.services != json || self.kept.revision == 0 {
            self.kept.revision += 1;
            self.kept.services = json;
            outcome.keep = true;
        }
        let policy = Policy { revision: self.kept.revision, services, ..Policy::default() };
        let mut changed_in = std::mem::take(&mut self.changed_in);
        for service in &policy.services {
            let before = self.in_force_at.get(&service.name).and_then(|at| self.in_force.get(*at));
            let known = changed_in.remove(&service.name).filter(|_| before == Some(service));
            self.changed_in.insert(service.name.clone(), known.unwrap_or(policy.revision));
        }
        let deadline = |service: &str| drain_deadline(&self.shifts, &self.places, service);
        outcome.keep |= self.kept.idle.publish(&policy, &self.in_force, deadline, now);
        self.due.mark_all_moving();
        self.due.mark_unknown();
        (self.unpublished, self.drains.1) = (false, Some(0));
        self.put_services_in_force(&policy.services);
        self.policy = Some(policy.clone());
        outcome.policy = Some(policy);
    }

    /// Keeps previous session secrets valid for a while. Returns whether the persisted state has changed.
    fn put_in_rotations(&mut self, services: &mut [Service], now: Millis) -> bool {
        let mut has_changed = false;
        for service in services {
            let Some(session) = &mut service.session else { continue };
            let was = self.in_force_at.get(&service.name).and_then(|at| self.in_force.get(*at));
            let was = was.and_then(|was| was.session.as_ref());
            has_changed |= self.kept.rotations.look(&service.name, session, was, now);
        }
        has_changed
    }

    /// Checks each compiled document by decoding it as proxies do. If that fails, its services stay as they are, and
    /// other documents are published all the same.
    fn leave_out_unreadable(&mut self, services: &mut Vec<Service>) {
        let before: BTreeMap<&str, &Service> = self.in_force.iter().map(|of| (of.name.as_str(), of)).collect();
        let names = services.iter().enumerate().map(|(n, service)| (service.name.clone(), n));
        let places: BTreeMap<String, usize> = names.collect();
        let mut left_out = Vec::new();
        let mut unreadable = BTreeMap::new();
        for shift in &self.shifts {
            let of_shift = || shift.services.iter().filter_map(|service| places.get(&service.name).copied());
            let is_as_before = |n: usize| before.get(services[n].name.as_str()).copied() == services.get(n);
            if of_shift().all(is_as_before) {
                continue;
            }
            let compiled: Vec<Service> = of_shift().map(|n| services[n].clone()).collect();
            let Err(errors) = admission::readable(shift, &compiled) else { continue };
            unreadable.insert(shift.name.clone(), errors);
            for n in of_shift().collect::<Vec<_>>() {
                match before.get(services[n].name.as_str()) {
                    Some(before) => services[n] = (*before).clone(),
                    None => left_out.push(n),
                }
            }
        }
        left_out.sort_unstable();
        left_out.into_iter().rev().for_each(|n| drop(services.remove(n)));
        for (name, errors) in unreadable.iter().filter(|(name, errors)| self.unreadable.get(*name) != Some(errors)) {
            tracing::error!(rollout = name, "not published, what it was before stays: {errors}");
        }
        self.unreadable = unreadable;
    }

    fn put_services_in_force(&mut self, services: &[Service]) {
        services.clone_into(&mut self.in_force);
        self.in_force_at = places_of(services);
        let compared = services.iter().filter(|service| service.step > 0);
        self.compared = compared.map(|service| service.name.clone()).collect();
        self.requests.retain(|name| self.compared.contains(name), |run| self.proxies.has(run));
    }

    fn look_at_drains(&mut self, now: Millis) -> bool {
        // Before this time, not every proxy has had the chance to report.
        if now.saturating_sub(self.proxies.listening_since()) < CATCH_UP {
            return false;
        }
        let changes = self.proxies.changes();
        let (seen, due) = self.drains;
        if changes == seen && due.is_none_or(|due| now < due) {
            return false;
        }
        let deadline = |service: &str| drain_deadline(&self.shifts, &self.places, service);
        let changed = self.kept.idle.look(now, deadline, &self.proxies, &self.in_force);
        self.drains = (changes, self.kept.idle.next_due(now, deadline));
        changed
    }

    /// A service with the weights that proxies have for it; if they have none, with its initial weights.
    fn service_in_force(&self, service: &ShiftService, stable: &str) -> Service {
        let Some(in_force) = self.in_force_at.get(&service.name).and_then(|at| self.in_force.get(*at)) else {
            return compile::service_at_rest(service, stable);
        };
        let compiled = compile::service(service, |name| {
            let version = in_force.versions.iter().find(|version| version.name == name);
            version.map_or((0, false), |version| (version.weight, version.serving))
        });
        let stable = in_force.stable.clone().filter(|stable| service.version(stable).is_some());
        Service { stable, step: in_force.step, ..compiled }
    }

    /// The state to persist.
    pub fn kept(&self) -> &PersistedState {
        &self.kept
    }

    /// The counts to persist, if they have changed since the last call.
    pub fn changed_counts(&mut self) -> Option<CountState> {
        std::mem::take(&mut self.counts_changed).then(|| self.counted.clone())
    }
}

/// Whether a version is in a document, or was removed from its document and is draining.
fn is_known(
    shifts: &[TrafficShift],
    places: &HashMap<String, (usize, usize)>,
    idle: &DrainTracker,
    service: &str,
    version: &str,
) -> bool {
    let place = places.get(service).and_then(|(shift, at)| shifts.get(*shift)?.services.get(*at));
    place.is_some_and(|service| service.version(version).is_some()) || idle.has(service, version)
}

/// Whether the rollout itself has moved, as opposed to a change of endpoints or proxies.
fn is_elsewhere(before: Option<&Rollout>, after: &Rollout) -> bool {
    let place = |of: &Rollout| (of.number, of.step, of.allowed, of.paused, of.weight_by_hand);
    let versions = |of: &Rollout| (of.stable.clone(), of.target.clone());
    before.is_none_or(|before| place(before) != place(after) || versions(before) != versions(after))
}

/// A version's share of the requests that no rule matches, 0 to 1.
fn share_of(service: &Service, name: &str) -> f64 {
    let serving = || service.versions.iter().filter(|version| version.serving);
    let all: f64 = serving().map(|version| f64::from(version.weight)).sum();
    let own: f64 = serving().filter(|version| version.name == name).map(|version| f64::from(version.weight)).sum();
    if all > 0.0 { own / all } else { 0.0 }
}

/// The drain timeout of a service's versions.
fn drain_deadline(
    shifts: &[TrafficShift],
    places: &HashMap<String, (usize, usize)>,
    service: &str,
) -> Option<Duration> {
    let (shift, _) = places.get(service)?;
    shifts.get(*shift).map(|shift| shift.drain_timeout)
}

/// Indexes services by name.
fn places_of(services: &[Service]) -> HashMap<String, usize> {
    services.iter().enumerate().map(|(at, service)| (service.name.clone(), at)).collect()
}

/// Whether an object of a cluster belongs to one of these namespaces.
fn is_in(name: &str, namespaces: &[Option<String>]) -> bool {
    let of = |namespace: &String| name.strip_suffix(namespace.as_str()).is_some_and(|rest| rest.ends_with('.'));
    namespaces.iter().any(|namespace| namespace.as_ref().is_none_or(of))
}

/// Compiles a service for proxies from the rollout's current state.
fn service_of(rollout: &Rollout, shift: &TrafficShift, service: &ShiftService, parts: &[Allocation]) -> Service {
    let mut compiled = compile::service(service, |version| {
        let part = parts.iter().find(|part| part.version == version);
        part.map_or((0, false), |part| (part.weight, part.serving))
    });
    rollout.testers(shift).into_iter().for_each(|rule| compile::put_first(&mut compiled, rule));
    compiled.mirror = compiled.mirror.or_else(|| rollout.mirror(shift));
    compiled.stable = Some(rollout.stable.clone());
    compiled.step = rollout.compared_step(shift);
    compiled
}
