//! The decisions of `--wait`: whether the goal is reached, what is still missing, or whether it can no longer be reached.

use crate::rollout::Phase;
use crate::status::{ProxyStatus, ServiceStatus, Status, VersionStatus};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A wait ignores a proxy that has not reported for this long. Proxies report every second.
const SILENT: Duration = Duration::from_secs(5);
/// The time within which the controller must begin a document's rollout once all endpoints are probed. After a restart it
/// first waits for the reports of the proxies.
const TO_BEGIN: Duration = Duration::from_secs(5);
/// Percent; shares are given in thousandths.
const ROUNDING: f64 = 0.01;
/// The maximum number of proxies and endpoints that a message names.
const NAMED: usize = 3;

/// The state to wait for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Goal {
    /// The rollout has ended, with success or failure.
    End,
    /// The rollout to this version has ended; if the version already serves, that it has all traffic.
    To(String),
    /// The stable version has all traffic again.
    Back,
    /// This version has all traffic.
    At(String),
    /// The rollout is paused.
    Paused,
    /// The target has this manually set share in percent.
    Set(u32),
    /// The document's target, or without a target the stable version, has all traffic.
    Document(Option<String>),
}

/// The progress towards the goal.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Progress {
    /// The goal is reached.
    Reached,
    /// The rollout is progressing.
    Goes(String),
    /// Only this is missing.
    Lacks(String),
    /// The goal can no longer be reached.
    Lost(String),
}

/// The state of one `--wait`.
#[derive(Debug)]
pub(super) struct Wait {
    goal: Goal,
    /// The number and target of the awaited rollout; `None` if it has not begun.
    rollout: Option<(u64, Option<String>)>,
    /// Since when nothing prevents the rollout from beginning.
    could_begin: Option<Instant>,
    /// The last report of each proxy, and when this process first saw it: proxy clocks are not comparable with ours.
    heard: BTreeMap<(String, jiff::Timestamp), Instant>,
}

impl Wait {
    /// Starts from the state that the command's response contained.
    pub(super) fn new(goal: Goal, services: &[ServiceStatus]) -> Self {
        let about = services.first().map(|first| (first.number, first.target.clone()));
        let (goal, rollout) = match (goal, services.first()) {
            (Goal::Document(wanted), _) => (Goal::Document(wanted), None),
            (Goal::To(version), Some(first)) if first.target.as_ref() == Some(&version) => (Goal::End, about),
            (Goal::To(version), _) => (Goal::At(version), about),
            (Goal::Back, Some(first)) => (Goal::At(first.stable.clone()), about),
            (goal, _) => (goal, about),
        };
        Self { goal, rollout, could_begin: None, heard: BTreeMap::new() }
    }

    /// Evaluates the progress. `first` is the first of the rollout's services, `services` all of them.
    pub(super) fn look(
        &mut self,
        status: &Status,
        first: &ServiceStatus,
        services: &[&ServiceStatus],
        now: Instant,
    ) -> Progress {
        self.hear(&status.proxies, now);
        if let Goal::Document(Some(target)) = &self.goal
            && first.target.as_ref() == Some(target)
            && first.phase.is_under_way()
        {
            (self.goal, self.rollout) = (Goal::End, Some((first.number, first.target.clone())));
        }
        if let Some((number, target)) = &self.rollout
            && (first.number != *number || (first.target != *target && first.target.is_some()))
        {
            return Progress::Lost(replaced(*number, target.as_deref(), first));
        }
        let progress = self.of_goal(first, services, now);
        let ends = progress == Progress::Reached || (first.phase == Phase::Failed && self.goal == Goal::End);
        match self.behind(status, now).filter(|_| ends) {
            Some(behind) => Progress::Lacks(behind),
            None => progress,
        }
    }

    /// The silent proxies, which the wait ignores.
    pub(super) fn silent<'a>(&self, status: &'a Status, now: Instant) -> Vec<&'a str> {
        let silent = status.proxies.iter().filter(|proxy| is_behind(proxy, status) && self.is_silent(proxy, now));
        silent.map(|proxy| proxy.id.as_str()).collect()
    }

    fn of_goal(&mut self, first: &ServiceStatus, services: &[&ServiceStatus], now: Instant) -> Progress {
        let stands = || format!("{} - {}", first.phase.name(), first.message);
        let under_way = first.phase.is_under_way();
        match &self.goal {
            Goal::End => match first.phase {
                Phase::Succeeded => Progress::Reached,
                Phase::Failed => Progress::Lost(first.message.clone()),
                Phase::Initialized if self.about() == Some(&first.stable) => has_all(&first.stable, services),
                Phase::Initialized => Progress::Lost(format!("the target was withdrawn: {}", first.message)),
                _ => Progress::Goes(stands()),
            },
            Goal::Document(_) if under_way || !services.iter().all(|service| is_probed(service)) => {
                self.could_begin = None;
                Progress::Goes(stands())
            }
            Goal::Document(Some(target)) if first.stable != *target => {
                match now.duration_since(*self.could_begin.get_or_insert(now)) < TO_BEGIN {
                    true => Progress::Goes(stands()),
                    false => Progress::Lost(format!(
                        "no rollout to {target} begins, because the document's target has not changed: {}; \
                         `tideshift set-target {target}` begins one",
                        stands()
                    )),
                }
            }
            Goal::Document(_) => has_all(&first.stable, services),
            Goal::At(_) | Goal::To(_) | Goal::Back if under_way => Progress::Goes(stands()),
            Goal::At(version) | Goal::To(version) if first.stable != *version => {
                Progress::Lost(format!("{version} does not serve all traffic: {}", stands()))
            }
            Goal::At(_) | Goal::To(_) | Goal::Back => has_all(&first.stable, services),
            Goal::Paused if first.paused || first.phase == Phase::Paused => Progress::Reached,
            Goal::Paused => Progress::Lost(format!("the rollout is no longer paused: {}", stands())),
            Goal::Set(weight) => match &first.step {
                Some(step) if under_way && step.weight == *weight => has_share(*weight, first, services),
                _ => Progress::Lost(format!("the share is no longer set to {weight} %: {}", stands())),
            },
        }
    }

    /// The target of the awaited rollout.
    fn about(&self) -> Option<&String> {
        self.rollout.as_ref()?.1.as_ref()
    }

    fn hear(&mut self, proxies: &[ProxyStatus], now: Instant) {
        let heard = proxies.iter().map(|proxy| {
            let key = (proxy.id.clone(), proxy.last_seen);
            let at = self.heard.get(&key).copied().unwrap_or(now);
            (key, at)
        });
        self.heard = heard.collect();
    }

    fn is_silent(&self, proxy: &ProxyStatus, now: Instant) -> bool {
        let heard = self.heard.get(&(proxy.id.clone(), proxy.last_seen));
        heard.is_some_and(|heard| now.duration_since(*heard) >= SILENT)
    }

    /// The proxies that do not run the newest policy yet.
    fn behind(&self, status: &Status, now: Instant) -> Option<String> {
        let behind = status.proxies.iter().filter(|proxy| is_behind(proxy, status) && !self.is_silent(proxy, now));
        let behind: Vec<String> = behind.map(described).collect();
        let proxies = if behind.len() == 1 { "proxy" } else { "proxies" };
        let all = some_of(&behind);
        (!behind.is_empty()).then(|| format!("{proxies} {all} to run revision {}", status.revision))
    }
}

fn is_behind(proxy: &ProxyStatus, status: &Status) -> bool {
    proxy.revision != Some(status.revision)
}

fn described(proxy: &ProxyStatus) -> String {
    let id = &proxy.id;
    match (&proxy.refused, proxy.revision) {
        (Some(refused), _) => format!("{id} (refuses a policy: {})", refused.errors.join("; ")),
        (None, Some(revision)) => format!("{id} (runs {revision})"),
        (None, None) => format!("{id} (runs its own policy)"),
    }
}

/// The first items, and the number of further ones.
fn some_of(all: &[String]) -> String {
    let more = match all.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    all.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ") + &more
}

fn replaced(number: u64, target: Option<&str>, now: &ServiceStatus) -> String {
    let to = |target: Option<&str>| target.map_or_else(String::new, |target| format!(" to {target}"));
    format!(
        "rollout {number}{} was superseded by rollout {}{} ({} - {})",
        to(target),
        now.number,
        to(now.target.as_deref()),
        now.phase.name(),
        now.message
    )
}

/// Whether all endpoints were probed at least once; no rollout begins before.
fn is_probed(service: &ServiceStatus) -> bool {
    service.versions.iter().flat_map(|version| &version.endpoints.not_ready).all(|endpoint| endpoint.reason.is_some())
}

fn version<'a>(service: &'a ServiceStatus, name: &str) -> Option<&'a VersionStatus> {
    service.versions.iter().find(|version| version.name == name)
}

/// Whether a version serves all traffic while no rollout is under way.
fn has_all(name: &str, services: &[&ServiceStatus]) -> Progress {
    let has_it = |service: &&&ServiceStatus| version(service, name).is_some_and(|version| version.weight >= 100.0);
    match services.iter().find(|service| !has_it(service)) {
        None => Progress::Reached,
        Some(service) => Progress::Lacks(lacks(name, 100, service)),
    }
}

/// Whether the target has exactly this share.
fn has_share(weight: u32, first: &ServiceStatus, services: &[&ServiceStatus]) -> Progress {
    let target = first.target.as_deref().unwrap_or_default();
    let has_it = |service: &&&ServiceStatus| {
        version(service, target).is_some_and(|version| (version.weight - f64::from(weight)).abs() < ROUNDING)
    };
    match services.iter().find(|service| !has_it(service)) {
        None => Progress::Reached,
        Some(service) => Progress::Lacks(lacks(target, weight, service)),
    }
}

/// The actual share of a version, and the number of ready endpoints.
fn lacks(name: &str, weight: u32, service: &ServiceStatus) -> String {
    let has = version(service, name).map_or(0.0, |version| version.weight);
    let ready = service.versions.iter().map(|version| {
        let endpoints = &version.endpoints;
        format!("{} has {} of {} endpoints ready", version.name, endpoints.ready, endpoints.listed)
    });
    let ready = some_of(&ready.collect::<Vec<_>>());
    format!("{name} of {} to have {weight} % instead of {has} % ({ready})", service.name)
}

#[cfg(test)]
mod tests;
