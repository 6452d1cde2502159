//! The controller's mind: documents, readiness and counts go in, policies and status come out. No I/O and no clock;
//! [`serve`](crate::serve) feeds it and carries out what it decides.

use crate::compile;
use crate::ledger::{Ledger, VersionKey};
use crate::readiness::Readiness;
use crate::rollout::{Millis, Observed, Rollout, percent};
use crate::status::{
    EndpointsStatus, NotReady, ProxyStatus, ServiceStatus, Status, StepStatus, VersionStatus, VetoStatus,
};
use crate::store::Kept;
use std::collections::BTreeMap;
use std::sync::Arc;
use tideshift_core::guard::Veto;
use tideshift_core::policy::{Policy, Service};
use tideshift_core::report::{Counts, Refused, Report};
use tideshift_core::session::Secret;
use tideshift_core::shift::TrafficShift;

/// Everything that the controller knows.
#[derive(Debug)]
pub struct Control {
    shifts: Vec<TrafficShift>,
    document_errors: Vec<String>,
    readiness: Arc<Readiness>,
    ledger: Ledger,
    /// Whether counts have changed since they were last asked for.
    counted: bool,
    kept: Kept,
    policy: Option<Policy>,
    /// The services that proxies have run last, under this controller or the one before.
    in_force: Vec<Service>,
    /// Until when proxies may still have to say what they counted while no controller was there; `None`: not known
    /// before everything is looked at for the first time.
    catching_up: Option<Millis>,
    /// By proxy and start, since two proxies may share an id by mistake.
    proxies: BTreeMap<(String, String), Proxy>,
}

/// What one proxy said last.
#[derive(Debug, Default)]
struct Proxy {
    seen: Millis,
    revision: Option<u64>,
    workers: u32,
    in_flight: BTreeMap<VersionKey, u64>,
    refused: Option<Refused>,
    /// By service.
    vetoes: Vec<(String, Veto)>,
}

/// What came of looking at everything anew.
#[derive(Debug, Default)]
pub struct Outcome {
    /// A policy that must reach the proxies, once what is kept is safe.
    pub policy: Option<Policy>,
    /// Whether what is kept has changed.
    pub keep: bool,
    /// What happened, for the log: service and message.
    pub events: Vec<(String, String)>,
}

/// A proxy that is silent for longer is shown no more, and what it had in flight is not counted.
const SILENT: Millis = 60_000;
/// The most proxies that are shown.
const MAX_PROXIES: usize = 20_000;
/// Proxies report every second: after a restart, by then they have said what they counted meanwhile.
const CATCH_UP: Millis = 2_000;

/// What the engine may see of one service.
struct World<'a> {
    service: &'a str,
    readiness: &'a Readiness,
    ledger: &'a Ledger,
    vetoes: Vec<&'a Veto>,
    up_to_date: bool,
}

impl Observed for World<'_> {
    fn ready(&self, version: &str) -> u32 {
        self.readiness.ready(self.service, version) as u32
    }

    fn counts(&self, version: &str) -> Counts {
        self.ledger.total(self.service, version)
    }

    fn vetoes(&self, version: &str) -> impl Iterator<Item = &Veto> {
        self.vetoes.iter().copied().filter(move |veto| veto.version == version)
    }

    fn is_up_to_date(&self) -> bool {
        self.up_to_date
    }
}

impl Control {
    /// Goes on from what was kept.
    pub fn new(shifts: Vec<TrafficShift>, kept: Kept, ledger: Ledger) -> Self {
        Self {
            shifts,
            document_errors: Vec::new(),
            readiness: Arc::default(),
            ledger,
            counted: false,
            policy: None,
            in_force: services_of(&kept),
            catching_up: None,
            kept,
            proxies: BTreeMap::new(),
        }
    }

    /// New documents; rollouts of services that are gone are forgotten.
    pub fn set_documents(&mut self, shifts: Vec<TrafficShift>) {
        self.kept.rollouts.retain(|name, _| shifts.iter().any(|shift| shift.name == *name));
        self.shifts = shifts;
        self.document_errors.clear();
    }

    /// Documents that are wrong: what they said before stays.
    pub fn set_document_errors(&mut self, errors: Vec<String>) {
        self.document_errors = errors;
    }

    /// What the probes say now.
    pub fn set_readiness(&mut self, readiness: Arc<Readiness>) {
        self.readiness = readiness;
    }

    /// A proxy reports. Returns whether counts or vetoes changed.
    pub fn reported(&mut self, report: &Report, now: Millis) -> bool {
        let knows = |service: &str, version: &str| {
            let shift = self.shifts.iter().find(|shift| shift.name == service);
            shift.is_some_and(|shift| shift.version(version).is_some())
        };
        let changed = self.ledger.take(report, knows, now);
        self.counted |= changed;
        let revision = (report.epoch == self.kept.epoch).then_some(report.revision);
        let services = report.services.iter();
        let in_flight = services.flat_map(|service| {
            service.versions.iter().map(|version| ((service.name.clone(), version.name.clone()), version.in_flight))
        });
        let vetoes = report.services.iter().flat_map(|service| {
            let known = service.vetoes.iter().filter(|veto| knows(&service.name, &veto.version));
            known.map(|veto| (service.name.clone(), veto.clone()))
        });
        let vetoes: Vec<_> = vetoes.collect();
        let in_flight = in_flight.filter(|((service, version), _)| knows(service, version)).collect();
        let proxy = self.proxy((report.proxy.clone(), report.start.clone()), now);
        proxy.revision = revision;
        proxy.workers = report.workers;
        proxy.refused = report.refused.clone();
        proxy.in_flight = in_flight;
        let vetoed = !vetoes.is_empty() && proxy.vetoes != vetoes;
        proxy.vetoes = vetoes;
        changed || vetoed
    }

    fn proxy(&mut self, run: (String, String), now: Millis) -> &mut Proxy {
        if self.proxies.len() >= MAX_PROXIES && !self.proxies.contains_key(&run) {
            let silent = self.proxies.iter().min_by_key(|(_, proxy)| proxy.seen).map(|(run, _)| run.clone());
            silent.map(|run| self.proxies.remove(&run));
        }
        let proxy = self.proxies.entry(run).or_default();
        proxy.seen = now;
        proxy
    }

    /// Looks at everything anew: rollouts go on, weights follow.
    pub fn evaluate(&mut self, now: Millis) -> Outcome {
        let mut outcome = Outcome::default();
        let restarted = !self.in_force.is_empty();
        let up_to_date = now >= *self.catching_up.get_or_insert(if restarted { now + CATCH_UP } else { now });
        let mut services = Vec::with_capacity(self.shifts.len());
        for shift in &self.shifts {
            // A service whose endpoints have not all been probed yet stays as proxies have it: guessing that they
            // are not ready would take traffic away from those that are.
            if !self.readiness.is_known(&shift.name) {
                services.push(self.service_in_force(shift));
                continue;
            }
            let proxies = self.proxies.values().filter(|proxy| now.saturating_sub(proxy.seen) <= SILENT);
            let vetoes = proxies.flat_map(|proxy| &proxy.vetoes).filter(|(service, _)| *service == shift.name);
            let world = World {
                service: &shift.name,
                readiness: &self.readiness,
                ledger: &self.ledger,
                vetoes: vetoes.map(|(_, veto)| veto).collect(),
                up_to_date,
            };
            let before = self.kept.rollouts.get(&shift.name).cloned();
            let after = before.clone().unwrap_or_else(|| Rollout::new(shift, now)).advance(shift, &world, now);
            let parts = after.parts(shift, &world);
            services.push(compile::service(shift, |version| {
                let part = parts.iter().find(|part| part.version == version);
                part.map_or((0, false), |part| (part.weight, part.serving))
            }));
            if before.as_ref() != Some(&after) {
                if before.as_ref().is_none_or(|before| before.message != after.message) {
                    outcome.events.push((shift.name.clone(), format!("{}: {}", after.phase.name(), after.message)));
                }
                self.kept.rollouts.insert(shift.name.clone(), after);
                outcome.keep = true;
            }
        }
        let ready = self.readiness.remember();
        if self.kept.ready != ready && !self.readiness.services.is_empty() {
            self.kept.ready = ready;
            outcome.keep = true;
        }
        self.publish(services, &mut outcome);
        outcome
    }

    fn publish(&mut self, mut services: Vec<Service>, outcome: &mut Outcome) {
        for service in &mut services {
            let Some(session) = &mut service.session else { continue };
            let secret = || Secret::new(self.kept.session_secret.clone());
            session.secret.get_or_insert_with(secret);
            let rollout = self.kept.rollouts.get(&service.name);
            session.generation = session.generation.saturating_add(rollout.map_or(0, |rollout| rollout.taken_back));
        }
        let is_known = |shift: &TrafficShift| self.readiness.is_known(&shift.name);
        let nothing_known = !self.shifts.is_empty() && !self.shifts.iter().any(is_known);
        if nothing_known || self.policy.as_ref().is_some_and(|policy| policy.services == services) {
            return;
        }
        let json = serde_json::to_string(&services).unwrap_or_default();
        // After a restart the same policy keeps its revision.
        if self.kept.services != json || self.kept.revision == 0 {
            self.kept.revision += 1;
            self.kept.services = json;
            outcome.keep = true;
        }
        self.in_force.clone_from(&services);
        let policy = Policy { revision: self.kept.revision, services, ..Policy::default() };
        self.policy = Some(policy.clone());
        outcome.policy = Some(policy);
    }

    /// A service with the weights that proxies have for it; if they have none, with those that they start with.
    fn service_in_force(&self, shift: &TrafficShift) -> Service {
        let Some(in_force) = self.in_force.iter().find(|service| service.name == shift.name) else {
            return compile::service_at_rest(shift);
        };
        compile::service(shift, |name| {
            let version = in_force.versions.iter().find(|version| version.name == name);
            version.map_or((0, false), |version| (version.weight, version.serving))
        })
    }

    /// What to keep for the next start.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// The counts to keep for the next start, if they have changed since this was last asked.
    pub fn changed_counts(&mut self) -> Option<Ledger> {
        std::mem::take(&mut self.counted).then(|| self.ledger.clone())
    }

    /// How things stand.
    pub fn status(&self, now: Millis) -> Status {
        let live = |proxy: &&Proxy| now.saturating_sub(proxy.seen) <= SILENT;
        let mut in_flight: BTreeMap<&VersionKey, u64> = BTreeMap::new();
        for (key, number) in self.proxies.values().filter(live).flat_map(|proxy| &proxy.in_flight) {
            let sum = in_flight.entry(key).or_default();
            *sum = sum.saturating_add(*number);
        }
        let services = self.shifts.iter().map(|shift| self.service_status(shift, &in_flight, now)).collect();
        let proxies = self.proxies.iter().filter(|(_, proxy)| live(proxy)).map(|((id, _), proxy)| ProxyStatus {
            id: id.clone(),
            revision: proxy.revision,
            workers: proxy.workers,
            last_seen: timestamp(proxy.seen),
            refused: proxy.refused.clone(),
            vetoes: proxy.vetoes.iter().map(|(service, veto)| VetoStatus::new(service, veto)).collect(),
        });
        Status {
            epoch: self.kept.epoch.clone(),
            revision: self.policy.as_ref().map_or(0, |policy| policy.revision),
            document_errors: self.document_errors.clone(),
            services,
            proxies: proxies.collect(),
        }
    }

    fn service_status(
        &self,
        shift: &TrafficShift,
        in_flight: &BTreeMap<&VersionKey, u64>,
        now: Millis,
    ) -> ServiceStatus {
        let (readiness, ledger) = (&self.readiness, &self.ledger);
        let world = World { service: &shift.name, readiness, ledger, vetoes: Vec::new(), up_to_date: true };
        let rollout = self.kept.rollouts.get(&shift.name).cloned();
        let known = rollout.is_some();
        let rollout = rollout.unwrap_or_else(|| Rollout::new(shift, now));
        let step = rollout.current_step(shift).map(|step| StepStatus {
            number: rollout.step + 1,
            of: rollout.steps(shift).len(),
            weight: step.weight,
            hold_seconds: step.hold.as_secs(),
            held_seconds: rollout.held_since.map(|since| now.saturating_sub(since) / 1_000),
        });
        let versions = rollout.parts(shift, &world).into_iter().map(|part| {
            let endpoints = self.readiness.endpoints(&shift.name, &part.version);
            let not_ready = endpoints.iter().filter(|endpoint| !endpoint.ready);
            let not_ready = not_ready
                .map(|state| NotReady { endpoint: state.endpoint.to_string(), reason: state.reason.clone() })
                .collect::<Vec<_>>();
            let key = (shift.name.clone(), part.version.clone());
            VersionStatus {
                endpoints: EndpointsStatus {
                    ready: endpoints.len() - not_ready.len(),
                    listed: endpoints.len(),
                    not_ready,
                },
                requests: self.ledger.total(&shift.name, &part.version),
                in_flight: in_flight.get(&key).copied().unwrap_or_default(),
                weight: percent(part.share),
                serving: part.serving,
                name: part.version,
            }
        });
        ServiceStatus {
            name: shift.name.clone(),
            phase: rollout.phase,
            stable: rollout.stable.clone(),
            target: rollout.target.clone(),
            step,
            message: if known { rollout.message.clone() } else { "waiting for the first probes".to_owned() },
            since: timestamp(rollout.since),
            unrouted: self.ledger.unrouted(&shift.name),
            versions: versions.collect(),
        }
    }
}

/// The services of the last policy that is known to have been published.
fn services_of(kept: &Kept) -> Vec<Service> {
    let services = serde_json::from_str(&kept.services).unwrap_or(serde_json::Value::Null);
    let policy = Policy::read(&serde_json::json!({ "revision": kept.revision, "services": services }));
    policy.map(|policy| policy.services).unwrap_or_default()
}

fn timestamp(millis: Millis) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(i64::try_from(millis).unwrap_or(i64::MAX)).unwrap_or(jiff::Timestamp::MAX)
}
