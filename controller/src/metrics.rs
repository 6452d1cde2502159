//! The controller's own `/metrics`: how things stand is made from the status, one truth for people and for Prometheus;
//! what was done is counted in [`done`]. Names start with `tideshift_controller`, so that a sum over proxies and
//! controller counts no request twice; those of the process are the ones that every Prometheus client has.

mod process;

pub use counters::{Claim, ControllerMetrics};

use crate::rollout::Phase;
use crate::status::{
    DrainState, Judged, ServiceStatus, Status, StepStatus, VerdictOutcome, VerdictStatus, VersionStatus,
};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::fmt;
use tideshift_core::outcome::Outcome;

/// The metrics of a status, of what was done and of the process, in the OpenMetrics text format.
pub fn text(status: Status, done: &ControllerMetrics) -> String {
    for service in &status.services {
        done.knows(&service.rollout);
    }
    let mut registry = Registry::default();
    registry.register_collector(Box::new(process::Process));
    done.register_state(registry.sub_registry_with_prefix("tideshift"));
    let own = registry.sub_registry_with_prefix("tideshift_controller");
    done.register(own);
    own.register_collector(Box::new(status));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

type Labels<'a> = Vec<(&'static str, &'a str)>;

/// Writes families, their samples in the order in which they come.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge<'l>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in samples {
            match labels.is_empty() {
                true => family.encode_gauge(&value)?,
                false => family.encode_family(&labels)?.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    fn counter<'l, V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, V)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            match labels.is_empty() {
                true => family.encode_counter::<NoLabelSet, V, u64>(&value, None)?,
                false => family.encode_family(&labels)?.encode_counter::<NoLabelSet, V, u64>(&value, None)?,
            }
        }
        Ok(())
    }

    fn info<'l>(&mut self, name: &str, help: &str, of: impl IntoIterator<Item = Labels<'l>>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Info)?;
        of.into_iter().try_for_each(|labels| family.encode_info(&labels))
    }

    fn one(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.gauge(name, help, [(Vec::new(), value)])
    }
}

fn is(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

fn seconds(time: jiff::Timestamp) -> f64 {
    time.as_millisecond() as f64 / 1e3
}

impl Collector for Status {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let page = &mut Page(encoder);
        page.info("build", "The running controller.", [vec![("version", env!("CARGO_PKG_VERSION"))]])?;
        page.one("policy_revision", "Revision of the policy that proxies are given.", self.revision as f64)?;
        let errors = self.document_errors.len() as f64;
        page.one("document_errors", "Errors in the documents; what they said before is in force.", errors)?;
        proxies(page, self)?;
        rollouts(page, &self.services)?;
        verdicts(page, &self.services)?;
        services(page, &self.services)?;
        versions(page, self)
    }
}

fn proxies(page: &mut Page<'_>, status: &Status) -> fmt::Result {
    let proxies = &status.proxies;
    page.one("proxies", "Proxies heard of within the last minute.", proxies.len() as f64)?;
    let behind = proxies.iter().filter(|proxy| proxy.revision != Some(status.revision)).count() as f64;
    page.one("proxies_behind", "Proxies that do not run the newest policy on all workers.", behind)?;
    let refusing = proxies.iter().filter(|proxy| proxy.refused.is_some()).count() as f64;
    page.one("proxies_refusing", "Proxies that could not take a policy.", refusing)
}

/// Each rollout once, as any of its services has it.
fn by_rollout(services: &[ServiceStatus]) -> impl Iterator<Item = &ServiceStatus> {
    let by_name: BTreeMap<_, _> = services.iter().map(|service| (&service.rollout, service)).collect();
    by_name.into_values()
}

fn of_rollout<T>(service: &ServiceStatus, value: T) -> (Labels<'_>, T) {
    (vec![("rollout", &service.rollout)], value)
}

fn in_rollout<'a, T>(service: &'a ServiceStatus, name: &'static str, label: &'a str, value: T) -> (Labels<'a>, T) {
    (vec![("rollout", &service.rollout), (name, label)], value)
}

fn rollouts(page: &mut Page<'_>, services: &[ServiceStatus]) -> fmt::Result {
    let all = || by_rollout(services);
    let phases = all().flat_map(|r| Phase::ALL.map(|p| in_rollout(r, "phase", p.name(), is(p == r.phase))));
    page.gauge("rollout_phase", "1 for the phase that the rollout is in.", phases)?;
    let reasons: Vec<_> = all().map(|r| format!("{:?}", r.reason)).collect();
    let reasons = all().zip(&reasons).map(|(r, reason)| in_rollout(r, "reason", reason, 1.0));
    page.gauge("rollout_reason", "1 for the reason why it is in this phase; others are left out.", reasons)?;
    let since = all().map(|r| of_rollout(r, seconds(r.since)));
    page.gauge("rollout_phase_start_timestamp_seconds", "Since when it is in this phase.", since)?;
    page.gauge("rollout_paused", "1 if a user has paused the rollout.", all().map(|r| of_rollout(r, is(r.paused))))?;
    let deadlines = all().filter_map(|r| Some(of_rollout(r, seconds(r.deadline?))));
    let help = "When it will be said to be stuck; left out while it waits for nothing.";
    page.gauge("rollout_deadline_timestamp_seconds", help, deadlines)?;

    page.gauge("rollout_steps", "How many steps it has.", all().map(|r| of_rollout(r, r.steps.len() as f64)))?;
    let mut step = |name, help, value: fn(&StepStatus) -> f64| {
        page.gauge(name, help, all().map(|r| of_rollout(r, r.step.as_ref().map_or(0.0, value))))
    };
    step("rollout_step", "The step that it is at, the first is 1; 0 while none is under way.", |s| s.number as f64)?;
    let help = "The share that the target is to have in this step; 0 while none is under way.";
    step("rollout_step_weight_ratio", help, |s| f64::from(s.weight) / 100.0)?;
    step("rollout_step_hold_seconds", "How long it must have it.", |s| s.hold_seconds as f64)?;
    let held = |s: &StepStatus| s.held_seconds.unwrap_or_default() as f64;
    step("rollout_step_held_seconds", "How long it has had it.", held)
}

/// The tests of a verdict, each with its evidence and the bound.
fn tests_of(verdict: &VerdictStatus) -> impl Iterator<Item = (&'static str, f64, f64)> {
    let errors = ("errors", verdict.evidence, verdict.bound);
    let pass = ("pass", verdict.pass_evidence, verdict.pass_bound);
    let latency = verdict.latency.as_ref().map(|latency| ("latency", latency.evidence, latency.bound));
    [errors, pass].into_iter().chain(latency)
}

fn verdicts(page: &mut Page<'_>, services: &[ServiceStatus]) -> fmt::Result {
    const OUTCOMES: [(&str, VerdictOutcome); 3] =
        [("pass", VerdictOutcome::Pass), ("fail", VerdictOutcome::Fail), ("undecided", VerdictOutcome::Undecided)];
    let all = || by_rollout(services).filter_map(|rollout| Some((rollout, rollout.verdict.as_ref()?)));
    let outcomes =
        all().flat_map(|(r, v)| OUTCOMES.map(|(name, o)| in_rollout(r, "outcome", name, is(v.outcome == o))));
    page.gauge("verdict_outcome", "1 for what the counts say of the target.", outcomes)?;
    let evidence =
        all().flat_map(|(r, v)| tests_of(v).map(|(test, evidence, _)| in_rollout(r, "test", test, evidence)));
    let help = "How much speaks against the target by its errors or latency, or for its pass, as a likelihood ratio.";
    page.gauge("verdict_evidence", help, evidence)?;
    let bounds = all().flat_map(|(r, v)| tests_of(v).map(|(test, _, bound)| in_rollout(r, "test", test, bound)));
    page.gauge("verdict_bound", "The evidence that decides the test.", bounds)?;
    let mut judged = |name, help, value: fn(&Judged) -> u64| {
        let sides = all().flat_map(|(r, v)| {
            [("target", &v.target), ("stable", &v.stable)]
                .map(|(side, of)| in_rollout(r, "side", side, value(of) as f64))
        });
        page.gauge(name, help, sides)
    };
    judged("verdict_requests", "Requests of this rollout that were judged.", |judged| judged.requests)?;
    judged("verdict_errors", "Those of them that failed.", |judged| judged.errors)
}

fn services(page: &mut Page<'_>, services: &[ServiceStatus]) -> fmt::Result {
    let rollouts = services.iter().map(|s| vec![("service", s.name.as_str()), ("rollout", s.rollout.as_str())]);
    page.info("service", "The rollout that moves the service.", rollouts)?;
    let unrouted = services.iter().map(|s| (vec![("service", s.name.as_str())], s.unrouted));
    page.counter("unrouted_requests", "Requests that found no version in service.", unrouted)
}

fn of_version<'a>(service: &'a ServiceStatus, version: &'a VersionStatus) -> Labels<'a> {
    vec![("service", &service.name), ("version", &version.name)]
}

fn in_version<'a>(
    service: &'a ServiceStatus,
    version: &'a VersionStatus,
    name: &'static str,
    label: &'a str,
) -> Labels<'a> {
    vec![("service", &service.name), ("version", &version.name), (name, label)]
}

fn versions(page: &mut Page<'_>, status: &Status) -> fmt::Result {
    const DRAINS: [(&str, DrainState); 4] = [
        ("Serving", DrainState::Serving),
        ("Draining", DrainState::Draining),
        ("Drained", DrainState::Drained),
        ("DeadlineExceeded", DrainState::DeadlineExceeded),
    ];
    let all = || status.services.iter().flat_map(|s| s.versions.iter().map(move |v| (s, v)));
    let requests =
        all().flat_map(|(s, v)| Outcome::ALL.map(|o| (in_version(s, v, "outcome", o.label()), v.requests.of(o))));
    page.counter("requests", "Requests that have ended, over all proxies.", requests)?;
    let drains = all()
        .flat_map(|(s, v)| DRAINS.map(|(name, state)| (in_version(s, v, "state", name), is(v.drain.state == state))));
    page.gauge("version_drain_state", "1 for the state of the version's drain.", drains)?;

    let mut gauge = |name, help, value: &dyn Fn(&ServiceStatus, &VersionStatus) -> f64| {
        page.gauge(name, help, all().map(|(s, v)| (of_version(s, v), value(s, v))))
    };
    gauge("requests_in_flight", "Requests under way, over all proxies.", &|_, v| v.in_flight as f64)?;
    gauge("version_share_ratio", "Share of the traffic that no rule takes.", &|_, v| v.weight / 100.0)?;
    gauge("version_serving", "1 if it can take requests at all.", &|_, v| is(v.serving))?;
    let is_target = |s: &ServiceStatus, v: &VersionStatus| s.phase.is_under_way() && s.target.as_ref() == Some(&v.name);
    let help = "1 for the stable version, and for the target while a rollout is under way.";
    gauge("version_wanted", help, &|s, v| is(s.stable == v.name || is_target(s, v)))?;
    gauge("endpoints", "Endpoints in the document.", &|_, v| v.endpoints.listed as f64)?;
    gauge("endpoints_ready", "Endpoints that can take traffic.", &|_, v| v.endpoints.ready as f64)?;
    let mut vetoes: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    for veto in status.proxies.iter().flat_map(|proxy| &proxy.vetoes) {
        *vetoes.entry((&veto.service, &veto.version)).or_default() += 1.0;
    }
    let vetoed = |s: &ServiceStatus, v: &VersionStatus| vetoes.get(&(s.name.as_str(), v.name.as_str())).copied();
    gauge("guard_vetoes", "Proxies whose guard keeps it out of service.", &|s, v| vetoed(s, v).unwrap_or_default())
}

mod counters;
#[cfg(test)]
mod tests;
pub mod text_format;
