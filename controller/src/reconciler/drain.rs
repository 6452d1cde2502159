//! Decides when a version has drained: every live proxy has applied a revision that gives it no traffic, and reports no
//! requests of it in flight. The drain deadline is the fallback; the status says which of the two ended the drain. If
//! no proxy reports, traffic cannot be observed to leave, and only the deadline applies.

use crate::clock::Millis;
use crate::reconciler::ledger::VersionKey;
use crate::reconciler::proxies::{DrainBlocker, Proxies};
use crate::status::{DrainState, DrainStatus};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use tideshift_core::protocol::policy::{Policy, Service};

/// How long the result of a drain is remembered once the version is in no document.
const REMEMBERED: Millis = 600_000;
/// The deadline of a version that no known document contains.
pub(super) const DEADLINE: Millis = 300_000;

/// The versions that are given no traffic. Persisted across restarts of the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DrainTracker(#[serde(with = "crate::reconciler::ledger::as_list")] BTreeMap<VersionKey, DrainProgress>);

/// The drain of one version, from when it is given no traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DrainProgress {
    /// The first revision that gives it no traffic.
    revision: u64,
    time: Millis,
    /// When a proxy appeared, after the drain had ended, that still gives it requests or has some in flight. The
    /// deadline counts from then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    again: Option<Millis>,
    /// How much of the time since then passed without a controller.
    #[serde(default, skip_serializing_if = "is_zero")]
    unattended: i64,
    /// The deadline in milliseconds, from the last document that contained the version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deadline: Option<Millis>,
    /// Whether no document contains it any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    gone: bool,
    /// When it had drained or its deadline had passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ended: Option<Ended>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ended {
    time: Millis,
    /// How much of the time since then passed without a controller.
    #[serde(default, skip_serializing_if = "is_zero")]
    unattended: i64,
    state: DrainState,
    message: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl Ended {
    /// The time at which the drain ended, moved forward by the time without a controller.
    fn attended_since(&self) -> Millis {
        self.time.saturating_add_signed(self.unattended)
    }
}

impl DrainProgress {
    fn new(revision: u64, time: Millis) -> Self {
        Self { revision, time, again: None, unattended: 0, deadline: None, gone: false, ended: None }
    }

    /// When the drain began.
    fn begun(&self) -> Millis {
        self.again.unwrap_or(self.time)
    }

    /// How long it has been draining, without the time in which no controller ran.
    fn waited(&self, now: Millis) -> Millis {
        now.saturating_sub(self.begun().saturating_add_signed(self.unattended))
    }
}

impl DrainTracker {
    /// Records a published policy that replaces one with the services `before`. Returns whether anything has changed.
    pub(super) fn publish(
        &mut self,
        policy: &Policy,
        before: &[Service],
        deadline: impl Fn(&str) -> Option<Duration>,
        now: Millis,
    ) -> bool {
        let mut versions = BTreeMap::new();
        for service in &policy.services {
            for version in service.versions.iter().filter(|version| !is_given(service, &version.name)) {
                let key = (service.name.clone(), version.name.clone());
                let since = self.0.get(&key).cloned().unwrap_or_else(|| DrainProgress::new(policy.revision, now));
                versions.insert(key, DrainProgress { gone: false, ..since });
            }
        }
        // Versions that are in no document any more drain as well.
        let by_name: HashMap<&str, &Service> = policy.services.iter().map(|of| (of.name.as_str(), of)).collect();
        let is_in = |(service, version): &VersionKey| {
            by_name.get(service.as_str()).is_some_and(|service| service.versions.iter().any(|of| of.name == *version))
        };
        let left = before.iter().flat_map(|service| {
            let given = service.versions.iter().filter(|version| is_given(service, &version.name));
            given
                .map(|version| ((service.name.clone(), version.name.clone()), DrainProgress::new(policy.revision, now)))
        });
        let drain = self.0.iter().map(|(key, since)| (key.clone(), since.clone()));
        for (key, since) in left.chain(drain).filter(|(key, _)| !is_in(key)) {
            versions.insert(key, DrainProgress { gone: true, ..since });
        }
        for ((service, _), since) in &mut versions {
            since.deadline = deadline(service).map(millis).or(since.deadline);
        }
        let changed = self.0 != versions;
        self.0 = versions;
        changed
    }

    /// Checks the reports of proxies about draining versions against the services of the last policy. Returns whether
    /// anything has changed.
    pub(super) fn look(
        &mut self,
        now: Millis,
        deadline: impl Fn(&str) -> Option<Duration>,
        proxies: &Proxies,
        services: &[Service],
    ) -> bool {
        let mut changed = false;
        for (key, since) in &mut self.0 {
            let waiting = proxies.waiting(key, since.revision, services);
            let waited = since.waited(now);
            let state = since.ended.as_ref().map(|ended| ended.state);
            let (state, message) = match waiting {
                None if state != Some(DrainState::Drained) => {
                    (DrainState::Drained, format!("nothing is in flight on any proxy, after {}", shown(waited)))
                }
                Some(waiting) if state == Some(DrainState::Drained) && waiting.is_said() => {
                    (since.ended, since.again, since.unattended, changed) = (None, Some(now), 0, true);
                    continue;
                }
                Some(waiting) if state.is_none() => {
                    if waited < deadline(&key.0).map(millis).or(since.deadline).unwrap_or(DEADLINE) {
                        continue;
                    }
                    let what = proxies.in_words(waiting, key, since.revision, services);
                    (DrainState::DeadlineExceeded, format!("after {} still {what}", shown(waited)))
                }
                _ => continue,
            };
            since.ended = Some(Ended { time: now, unattended: 0, state, message });
            changed = true;
        }
        let before = self.0.len();
        let is_over = |since: &DrainProgress| {
            since.gone
                && since.ended.as_ref().is_some_and(|ended| now.saturating_sub(ended.attended_since()) > REMEMBERED)
        };
        self.0.retain(|_, since| !is_over(since));
        changed || self.0.len() != before
    }

    /// When time alone next ends a drain or removes its result.
    pub(super) fn next_due(&self, now: Millis, deadline: impl Fn(&str) -> Option<Duration>) -> Option<Millis> {
        let due = |(key, since): (&VersionKey, &DrainProgress)| match &since.ended {
            None => {
                let long = deadline(&key.0).map(millis).or(since.deadline).unwrap_or(DEADLINE);
                Some(since.begun().saturating_add_signed(since.unattended).saturating_add(long))
            }
            Some(ended) => since.gone.then(|| ended.attended_since().saturating_add(REMEMBERED + 1)),
        };
        // What is overdue is checked again at the next change.
        self.0.iter().filter_map(due).filter(|due| *due > now).min()
    }

    /// Accounts for time in which no controller ran: as [`crate::rollout::Rollout::was_unattended`].
    pub(super) fn was_unattended(&mut self, long: Millis, restated: i64) {
        for since in self.0.values_mut() {
            let other = |time: &mut Millis| *time = time.saturating_add_signed(restated);
            let more = |unattended: &mut i64| {
                *unattended = unattended.saturating_add_unsigned(long).saturating_sub(restated);
            };
            other(&mut since.time);
            since.again.iter_mut().for_each(other);
            more(&mut since.unattended);
            if let Some(ended) = &mut since.ended {
                other(&mut ended.time);
                more(&mut ended.unattended);
            }
        }
    }

    /// Whether any version is draining.
    pub(super) fn is_under_way(&self) -> bool {
        self.0.values().any(|since| since.ended.is_none())
    }

    /// When a version was given no traffic, and when it had drained or its deadline had passed, as proxies report it.
    /// `None` if no proxy reports, because then traffic cannot be observed to leave.
    pub(super) fn left(&self, key: &VersionKey, proxies: &Proxies, services: &[Service]) -> Option<(Millis, Millis)> {
        let since = self.0.get(key)?;
        let ended = since.ended.as_ref()?;
        let waits = proxies.waiting(key, since.revision, services).is_some_and(DrainBlocker::is_said);
        let at_rest = ended.state == DrainState::DeadlineExceeded || !waits;
        (at_rest && proxies.are_there()).then_some((since.time, ended.attended_since()))
    }

    /// Whether a version is tracked here because it is given no traffic, whether a document contains it or not.
    pub(super) fn has(&self, service: &str, version: &str) -> bool {
        self.0.contains_key(&(service.to_owned(), version.to_owned()))
    }

    /// The drain status of a version.
    pub(super) fn status(&self, key: &VersionKey, proxies: &Proxies, services: &[Service]) -> DrainStatus {
        let in_flight = proxies.in_flight(key);
        let status = |state, since, message| DrainStatus { state, in_flight, since, message };
        let time = |millis| Some(crate::reconciler::timestamp(millis));
        match self.0.get(key) {
            None => status(DrainState::Serving, None, "it is given requests".to_owned()),
            Some(DrainProgress { ended: Some(ended), .. }) => {
                status(ended.state, time(ended.time), ended.message.clone())
            }
            Some(since) => {
                let waiting = proxies.waiting(key, since.revision, services);
                let what = waiting.map(|waiting| proxies.in_words(waiting, key, since.revision, services));
                let what = what.unwrap_or_else(|| "being looked at".to_owned());
                status(DrainState::Draining, time(since.begun()), what)
            }
        }
    }
}

fn millis(duration: Duration) -> Millis {
    duration.as_millis() as Millis
}

/// Whether a policy gives a version any requests.
fn is_given(service: &Service, name: &str) -> bool {
    let Some(version) = service.versions.iter().find(|version| version.name == name) else { return false };
    let by_rule = service.rules.iter().any(|rule| {
        let of_rule = rule.versions.iter().any(|version| version.name == name && version.weight > 0);
        of_rule || rule.mirror.as_ref().is_some_and(|mirror| mirror.version == name)
    });
    let by_mirror = service.mirror.as_ref().is_some_and(|mirror| mirror.version == name);
    version.serving && (version.weight > 0 || by_rule || by_mirror)
}

fn shown(millis: Millis) -> String {
    format!("{}.{} s", millis / 1_000, millis % 1_000 / 100)
}

#[cfg(test)]
mod tests;
