//! The status, history and drains, for users and tools.

use crate::clock::{Millis, timestamp};
use crate::reconciler::ledger::VersionKey;
use crate::reconciler::series::{RolloutSeries, Sample, VersionSample};
use crate::reconciler::{Document, Reconciler};
use crate::rollout::{Allocation, Reason, Rollout, percent};
use crate::status::{
    DrainStatus, EndpointsStatus, NotReady, ServiceStatus, Status, StepPlan, StepStatus, TransitionStatus,
    VerdictStatus, VersionStatus,
};
use std::borrow::Cow;
use tideshift_core::protocol::policy::Policy;
use tideshift_core::shift::{ShiftService, ShiftVersion, TrafficShift};

/// The values that all services of a document share.
struct OfShift<'a> {
    shift: &'a TrafficShift,
    rollout: &'a Rollout,
    steps: Vec<StepPlan>,
    step: Option<StepStatus>,
    verdict: Option<VerdictStatus>,
    message: String,
}

impl Reconciler {
    /// The current status.
    pub fn status(&self, now: Millis) -> Status {
        Status {
            epoch: self.kept.epoch.clone(),
            // Decisions are in force once proxies have the policy that is about to be published.
            revision: self.policy.as_ref().map_or(0, |policy| policy.revision) + u64::from(self.is_held_back),
            document_errors: self.document_errors(),
            state_error: self.state_error.clone(),
            counts_error: self.counts_error.clone(),
            published_revision: self.unpublished().map(|published| published.revision),
            services: self.shifts.iter().flat_map(|shift| self.shift_status(shift, now)).collect(),
            proxies: self.proxies.status(),
        }
    }

    /// The policy that proxies were given, if it differs from the decided one.
    fn unpublished(&self) -> Option<&Policy> {
        let decided = self.policy.as_ref().map_or(self.kept.revision, |policy| policy.revision);
        self.published.as_ref().filter(|published| published.revision != decided || self.is_held_back)
    }

    fn weight_in_force(&self, service: &str, version: &str) -> Option<f64> {
        let published = self.unpublished()?.services.get(*self.published_at.get(service)?)?;
        Some(percent(crate::reconciler::share_of(published, version)))
    }

    /// The status of a rollout's services; `None` if there is no such rollout.
    pub fn rollout_status(&self, name: &str, now: Millis) -> Option<Vec<ServiceStatus>> {
        Some(self.shift_status(self.shift(name)?, now))
    }

    /// A rollout's transitions, the newest last; `None` if there is no such rollout.
    pub fn history(&self, name: &str) -> Option<Vec<TransitionStatus>> {
        let history = self.kept.history.get(&self.shift(name)?.name).into_iter().flatten();
        Some(history.map(TransitionStatus::from).collect())
    }

    /// A rollout's time series of the last minutes; `None` if there is no such rollout.
    pub fn series(&self, name: &str, now: Millis) -> Option<RolloutSeries> {
        let services = &self.shift(name)?.services;
        Some(self.series.of(services.iter().map(|service| service.name.as_str()), now))
    }

    /// Adds a sample to the time series. Counts from the time without a controller would otherwise appear in the second
    /// in which proxies report them.
    pub(super) fn note(&mut self, now: Millis) {
        if !self.series.is_due(now) || !self.is_up_to_date(now) {
            return;
        }
        let documents = self.shifts.iter().zip(self.due.documents());
        let samples: Vec<_> = documents.flat_map(|(shift, document)| self.samples(shift, document)).collect();
        self.series.take(now, samples);
    }

    fn samples<'a>(&'a self, shift: &'a TrafficShift, document: &'a Document) -> impl Iterator<Item = Sample> + 'a {
        shift.services.iter().zip(&document.parts).map(|(service, parts)| {
            let versions = parts.iter().map(|part| {
                let counts = self.counted.ledger.total(&service.name, &part.version);
                let sample = VersionSample {
                    weight: percent(part.share),
                    requests: counts.ok + counts.error + counts.client_error,
                    errors: counts.error,
                    cancelled: counts.cancelled,
                };
                (part.version.clone(), sample)
            });
            Sample { service: service.name.clone(), evidence: document.evidence, versions: versions.collect() }
        })
    }

    /// A version's drain status; `None` if there is no such version.
    pub fn drain(&self, service: &str, version: &str) -> Option<DrainStatus> {
        let known = self.places.get(service);
        let known = known.and_then(|(shift, at)| self.shifts.get(*shift)?.services.get(*at));
        // The only service of a document has the document's name, and may be given in the same short form.
        let alone = || self.shift(service).filter(|shift| shift.services.len() == 1)?.services.first();
        let known = known.or_else(alone);
        let key = (known.map_or(service, |service| &service.name).to_owned(), version.to_owned());
        // A version that is in no document any more is known until it has drained.
        let is_known = known.is_some_and(|service| service.version(version).is_some());
        (is_known || self.kept.idle.has(&key.0, &key.1)).then(|| self.drain_status(&key))
    }

    /// A document whose workloads may be scaled, with its rollout; `None` while some of its endpoints are unknown, and
    /// for a deleted document, which scales nothing.
    pub fn scalable(&self, name: &str) -> Option<(&TrafficShift, &Rollout)> {
        let shift = self.named(name).filter(|shift| self.is_known(shift) && !self.has_left(shift));
        shift.zip(self.kept.rollouts.get(name))
    }

    /// When a drained version was given no traffic, and when it had drained; `None` if it has not drained.
    pub fn drained(&self, service: &str, version: &str) -> Option<(Millis, Millis)> {
        let key = (service.to_owned(), version.to_owned());
        self.kept.idle.left(&key, &self.proxies, &self.in_force)
    }

    /// Whether a version is given requests, has not drained, or is the source or target of a rollout.
    pub fn is_used(&self, shift: &TrafficShift, service: &ShiftService, version: &ShiftVersion) -> bool {
        let name = &version.name;
        let by_rollout = match self.kept.rollouts.get(&shift.name) {
            Some(rollout) => {
                rollout.stable == *name || (rollout.phase.is_under_way() && rollout.target.as_ref() == Some(name))
            }
            None => shift.stable == *name,
        };
        let key = (service.name.clone(), name.clone());
        let is_published = self
            .in_force
            .iter()
            .any(|of| of.name == service.name && of.versions.iter().any(|version| version.name == *name));
        by_rollout || (is_published && self.kept.idle.left(&key, &self.proxies, &self.in_force).is_none())
    }

    /// A message about the versions with which a version shares pods.
    pub fn shared(&self, service: &str, version: &str) -> Option<&str> {
        let shared = self.readiness.outlook.shared.get(&(service.to_owned(), version.to_owned()));
        shared.map(String::as_str)
    }

    /// The error for a rollout whose versions share pods with other versions; `None` if none do.
    pub fn shared_pods(&self, name: &str) -> Option<&str> {
        if self.readiness.outlook.shared.is_empty() {
            return None;
        }
        let services = &self.named(name)?.services;
        services
            .iter()
            .find_map(|service| service.versions.iter().find_map(|version| self.shared(&service.name, &version.name)))
    }

    /// Whether any proxy reports.
    pub fn has_proxies(&self) -> bool {
        self.proxies.are_there()
    }

    /// Whether the readiness of all endpoints of a rollout is known; if not, the reason, where there is one.
    pub fn sight(&self, name: &str) -> Result<(), Option<&str>> {
        match self.named(name) {
            Some(shift) if self.is_known(shift) => Ok(()),
            Some(shift) => Err(self.unseen(shift)),
            None => Err(None),
        }
    }

    fn drain_status(&self, key: &VersionKey) -> DrainStatus {
        self.kept.idle.status(key, &self.proxies, &self.in_force)
    }

    fn shift_status(&self, shift: &TrafficShift, now: Millis) -> Vec<ServiceStatus> {
        let world = self.world(shift, now);
        let known = self.kept.rollouts.get(&shift.name);
        let rollout = known.map_or_else(|| Cow::Owned(Rollout::new(shift, now)), Cow::Borrowed);
        let parts = rollout.all_parts(shift, &world);
        let steps = rollout.steps(shift);
        let step = rollout.current_step(shift).map(|step| StepStatus {
            number: rollout.step + 1,
            of: steps.len(),
            weight: rollout.weight_by_hand.unwrap_or(step.weight),
            hold_seconds: step.hold.as_secs(),
            held_seconds: rollout.held(now).map(|held| held / 1_000),
        });
        let steps = steps.iter().map(|step| StepPlan {
            weight: step.weight,
            hold_seconds: step.hold.as_secs(),
            pause: step.pause,
            matches: step.matches.len(),
        });
        let all = OfShift {
            shift,
            rollout: &rollout,
            steps: steps.collect(),
            step,
            verdict: self.counted.judges.status(shift, &rollout),
            message: self.message(shift, known),
        };
        shift.services.iter().zip(parts).map(|(service, parts)| self.service_status(&all, service, parts)).collect()
    }

    fn service_status(&self, all: &OfShift<'_>, service: &ShiftService, parts: Vec<Allocation>) -> ServiceStatus {
        let OfShift { shift, rollout, .. } = all;
        let versions = parts.into_iter().map(|part| {
            let endpoints = self.readiness.endpoints(&service.name, &part.version);
            let held_back = self.readiness.held_back(&service.name, &part.version);
            let not_ready = endpoints.iter().filter(|endpoint| !endpoint.ready);
            let not_ready = not_ready
                .map(|state| NotReady { endpoint: state.endpoint.to_string(), reason: state.reason.clone() })
                .chain(held_back.iter().map(|held_back| NotReady {
                    endpoint: held_back.endpoint.clone(),
                    reason: Some(held_back.reason.clone()),
                }))
                .collect::<Vec<_>>();
            let listed = endpoints.len() + held_back.len();
            let drain = self.drain_status(&(service.name.clone(), part.version.clone()));
            VersionStatus {
                endpoints: EndpointsStatus { ready: listed - not_ready.len(), listed, not_ready },
                requests: self.counted.ledger.total(&service.name, &part.version),
                in_flight: drain.in_flight,
                drain,
                weight: percent(part.share),
                weight_in_force: self.weight_in_force(&service.name, &part.version),
                serving: part.serving,
                name: part.version,
            }
        });
        ServiceStatus {
            name: service.name.clone(),
            rollout: shift.name.clone(),
            number: rollout.number,
            phase: rollout.phase,
            reason: if self.has_left(shift) { Reason::DocumentLeft } else { rollout.reason },
            paused: rollout.paused,
            stable: rollout.stable.clone(),
            target: rollout.target.clone(),
            steps: all.steps.clone(),
            step: all.step.clone(),
            deadline: rollout.deadline(shift).map(timestamp),
            verdict: all.verdict.clone(),
            message: all.message.clone(),
            since: timestamp(rollout.since),
            unrouted: self.counted.ledger.unrouted(&service.name),
            versions: versions.collect(),
        }
    }

    /// Why a rollout is in its state, including removed or deleted parts that still serve.
    fn message(&self, shift: &TrafficShift, rollout: Option<&Rollout>) -> String {
        if let Some(why) = self.departure_in_words(&shift.name) {
            return why;
        }
        let mut message = match (self.unseen(shift), rollout) {
            (Some(why), _) => format!("weights stay as they are: {why}"),
            (None, Some(rollout)) => rollout.message.clone(),
            (None, None) => "waiting for the first probes".to_owned(),
        };
        for version in shift.leaving() {
            let words = rollout.map(|rollout| rollout.leaving_in_words(version, shift));
            message.extend(words.map(|words| format!("; {words}")));
        }
        message
    }
}
