//! When a version has drained: every live proxy has applied a revision that gives it nothing, and reports nothing of it
//! in flight. The deadline is the fallback; which of the two it was is said.

use crate::ledger::VersionKey;
use crate::rollout::Millis;
use crate::status::{DrainState, DrainStatus};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tideshift_core::policy::{Policy, Service};

/// The versions that are given nothing. Kept across restarts of the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Idle(#[serde(with = "crate::ledger::as_list")] BTreeMap<VersionKey, Since>);

/// Since when a version is given nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Since {
    /// The first revision that gives it nothing.
    revision: u64,
    time: Millis,
    /// When it had drained, or its deadline had passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ended: Option<Ended>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ended {
    time: Millis,
    state: DrainState,
    message: String,
}

/// What a live proxy says of a version.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen<'a> {
    /// The proxy.
    pub proxy: &'a str,
    /// What all of its workers run; `None` if that is nothing of this controller's, or if it has not said yet.
    pub revision: Option<u64>,
    /// Its requests of the version under way.
    pub in_flight: u64,
}

impl Idle {
    /// A policy is published. Returns whether anything has changed.
    pub(super) fn publish(&mut self, policy: &Policy, now: Millis) -> bool {
        let before = self.0.clone();
        let mut versions = BTreeMap::new();
        for service in &policy.services {
            for version in service.versions.iter().filter(|version| !is_given(service, &version.name)) {
                let key = (service.name.clone(), version.name.clone());
                let since = before.get(&key).cloned();
                let since = since.unwrap_or(Since { revision: policy.revision, time: now, ended: None });
                versions.insert(key, since);
            }
        }
        self.0 = versions;
        self.0 != before
    }

    /// Looks at the versions that drain; `seen` says what the live proxies report of a version. Returns whether anything
    /// has changed.
    pub(super) fn look<'a>(
        &mut self,
        now: Millis,
        deadline: impl Fn(&str) -> Duration,
        seen: impl Fn(&VersionKey) -> Vec<Seen<'a>>,
    ) -> bool {
        let mut changed = false;
        for (key, since) in self.0.iter_mut().filter(|(_, since)| since.ended.is_none()) {
            let (deadline, waited) = (deadline(&key.0), now.saturating_sub(since.time));
            let waits_for = waits_for(&seen(key), since.revision);
            let (state, message) = match waits_for {
                None => (DrainState::Drained, format!("nothing is in flight on any proxy, after {}", shown(waited))),
                Some(what) if waited >= deadline.as_millis() as u64 => {
                    (DrainState::DeadlineExceeded, format!("after {} still {what}", shown(waited)))
                }
                Some(_) => continue,
            };
            since.ended = Some(Ended { time: now, state, message });
            changed = true;
        }
        changed
    }

    /// Since when a version is given nothing, and when it had drained, or its deadline had passed: by the word of proxies
    /// that are there. Where there are none, nobody can say that traffic has left.
    pub(super) fn left(&self, key: &VersionKey, seen: &[Seen<'_>]) -> Option<(Millis, Millis)> {
        let since = self.0.get(key)?;
        let ended = since.ended.as_ref()?;
        let at_rest = ended.state == DrainState::DeadlineExceeded || waits_for(seen, since.revision).is_none();
        (at_rest && !seen.is_empty()).then_some((since.time, ended.time))
    }

    /// How a version stands.
    pub(super) fn status(&self, key: &VersionKey, seen: &[Seen<'_>]) -> DrainStatus {
        let in_flight = seen.iter().fold(0, |sum: u64, seen| sum.saturating_add(seen.in_flight));
        let status = |state, since, message| DrainStatus { state, in_flight, since, message };
        let time = |millis| Some(super::timestamp(millis));
        match self.0.get(key) {
            None => status(DrainState::Serving, None, "it is given requests".to_owned()),
            Some(Since { ended: Some(ended), .. }) => status(ended.state, time(ended.time), ended.message.clone()),
            Some(since) => {
                let what = waits_for(seen, since.revision).unwrap_or_else(|| "being looked at".to_owned());
                status(DrainState::Draining, time(since.time), what)
            }
        }
    }
}

/// Whether a policy gives a version any request.
fn is_given(service: &Service, name: &str) -> bool {
    let Some(version) = service.versions.iter().find(|version| version.name == name) else { return false };
    let by_rule = service.rules.iter().any(|rule| {
        let of_rule = rule.versions.iter().any(|version| version.name == name && version.weight > 0);
        of_rule || rule.mirror.as_ref().is_some_and(|mirror| mirror.version == name)
    });
    let by_mirror = service.mirror.as_ref().is_some_and(|mirror| mirror.version == name);
    version.serving && (version.weight > 0 || by_rule || by_mirror)
}

/// What a version still waits for, in words.
fn waits_for(seen: &[Seen<'_>], revision: u64) -> Option<String> {
    let behind: Vec<_> = seen.iter().filter(|seen| seen.revision.is_none_or(|has| has < revision)).collect();
    if let Some(first) = behind.first() {
        let more = if behind.len() > 1 { format!(" and {} more", behind.len() - 1) } else { String::new() };
        return Some(format!("waiting for proxy {}{more} to apply revision {revision}", first.proxy));
    }
    let in_flight = seen.iter().fold(0, |sum: u64, seen| sum.saturating_add(seen.in_flight));
    (in_flight > 0).then(|| format!("{in_flight} in flight"))
}

fn shown(millis: Millis) -> String {
    format!("{}.{} s", millis / 1_000, millis % 1_000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(revision: u64, v1: u32, v2: u32) -> Policy {
        let document = serde_json::json!({"revision": revision, "services": [
            {"name": "shop", "versions": [{"name": "v1", "weight": v1}, {"name": "v2", "weight": v2}]},
        ]});
        Policy::read(&document).unwrap()
    }

    fn v1() -> VersionKey {
        ("shop".to_owned(), "v1".to_owned())
    }

    fn state(idle: &Idle) -> DrainState {
        idle.status(&v1(), &[]).state
    }

    const DEADLINE: Duration = Duration::from_secs(300);

    #[test]
    fn a_version_has_drained_when_every_proxy_knows_and_nothing_is_in_flight() {
        let mut idle = Idle::default();
        idle.publish(&policy(6, 1, 1), 0);
        assert_eq!(state(&idle), DrainState::Serving);
        idle.publish(&policy(7, 0, 1), 1_000);
        let seen = |revision, in_flight| Seen { proxy: "edge", revision, in_flight };
        let ready = seen(Some(7), 0);
        assert_eq!(idle.left(&v1(), &[ready]), None, "nobody has looked yet");
        for waits in [seen(None, 0), seen(Some(6), 0), seen(Some(7), 1)] {
            idle.look(2_000, |_| DEADLINE, |_| vec![ready, waits]);
            assert_eq!(state(&idle), DrainState::Draining, "{waits:?}");
        }
        assert!(idle.status(&v1(), &[seen(Some(7), 1)]).message.contains("1 in flight"));
        idle.look(21_300, |_| DEADLINE, |_| vec![ready, seen(Some(9), 0)]);
        assert_eq!(state(&idle), DrainState::Drained);
        assert!(idle.status(&v1(), &[]).message.contains("after 20.3 s"));
        assert_eq!(idle.left(&v1(), &[ready]), Some((1_000, 21_300)));
        assert_eq!(idle.left(&v1(), &[]), None, "without proxies nobody can say so");
        assert_eq!(idle.left(&v1(), &[ready, seen(Some(6), 0)]), None, "a proxy has come that still gives it requests");
        // It stays so with the next policies, until it is given something.
        idle.publish(&policy(8, 0, 1), 30_000);
        assert_eq!(state(&idle), DrainState::Drained);
        idle.publish(&policy(9, 1, 1), 30_000);
        assert_eq!(state(&idle), DrainState::Serving);
    }

    #[test]
    fn the_deadline_is_the_fallback_and_says_what_was_missing() {
        let mut idle = Idle::default();
        idle.publish(&policy(7, 0, 1), 0);
        let stuck = Seen { proxy: "edge", revision: Some(7), in_flight: 2 };
        idle.look(299_999, |_| DEADLINE, |_| vec![stuck]);
        assert_eq!(state(&idle), DrainState::Draining);
        idle.look(300_000, |_| DEADLINE, |_| vec![stuck]);
        let status = idle.status(&v1(), &[stuck]);
        assert_eq!(
            (status.state, status.message.as_str()),
            (DrainState::DeadlineExceeded, "after 300.0 s still 2 in flight")
        );
    }

    #[test]
    fn a_rule_or_a_mirror_gives_a_version_requests_too() {
        let mut document = serde_json::json!({"revision": 1, "services": [{"name": "shop",
            "versions": [{"name": "v1", "weight": 0}, {"name": "v2", "weight": 1}]}]});
        for (field, value) in [
            ("rules", serde_json::json!([{"versions": [{"name": "v1"}]}])),
            ("mirror", serde_json::json!({"version": "v1"})),
        ] {
            let mut with = document.clone();
            with["services"][0][field] = value;
            let mut idle = Idle::default();
            idle.publish(&Policy::read(&with).unwrap(), 0);
            assert_eq!(state(&idle), DrainState::Serving, "{field}");
        }
        document["services"][0]["versions"][0]["serving"] = serde_json::json!(false);
        let mut idle = Idle::default();
        idle.publish(&Policy::read(&document).unwrap(), 0);
        assert_eq!(state(&idle), DrainState::Draining);
    }
}
