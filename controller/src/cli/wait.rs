//! What `--wait` waits for: whether it has come, what it still lacks, or that it will not come any more.

use crate::rollout::Phase;
use crate::status::{ProxyStatus, ServiceStatus, Status, VersionStatus};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A proxy that has said nothing for so long is not waited for. They report every second.
const SILENT: Duration = Duration::from_secs(5);
/// How long the controller may take to begin what a document asks for, once all endpoints are probed: after a restart
/// it hears what proxies have to say first.
const TO_BEGIN: Duration = Duration::from_secs(5);
/// Percent; shares are given in thousandths.
const ROUNDING: f64 = 0.01;
/// The most proxies and endpoints that are named.
const NAMED: usize = 3;

/// What somebody wants to come.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Goal {
    /// The end of the rollout, whichever it is.
    End,
    /// The end of the rollout to this version; if it serves already, that it has everything.
    To(String),
    /// The stable version has everything again.
    Back,
    /// This version has everything.
    At(String),
    /// Nothing moves any more.
    Paused,
    /// The target has this share in percent, by hand.
    Set(u32),
    /// What a document wants: its target, or without one the stable version, has everything.
    Document(Option<String>),
}

/// How far it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Progress {
    /// It has come.
    Reached,
    /// It is on its way.
    Goes(String),
    /// It would be there but for this.
    Lacks(String),
    /// It will not come.
    Lost(String),
}

/// Somebody who waits.
#[derive(Debug)]
pub(super) struct Wait {
    goal: Goal,
    /// The rollout's number and target that it is about; `None`: it has not begun.
    rollout: Option<(u64, Option<String>)>,
    /// Since when nothing keeps it from beginning.
    could_begin: Option<Instant>,
    /// When each proxy was heard of last, and since when nothing newer is known: their clock is not ours.
    heard: BTreeMap<(String, jiff::Timestamp), Instant>,
}

impl Wait {
    /// By how the services stood when what was asked for was done.
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

    /// How far it is by now. The rollout's services are `first` and whichever others there are.
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

    /// The proxies that are not waited for.
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
                        "no rollout to {target} begins, for that is nothing new in the document: {}; \
                         `tideshift set-target {target}` begins one",
                        stands()
                    )),
                }
            }
            Goal::Document(_) => has_all(&first.stable, services),
            Goal::At(_) | Goal::To(_) | Goal::Back if under_way => Progress::Goes(stands()),
            Goal::At(version) | Goal::To(version) if first.stable != *version => {
                Progress::Lost(format!("{version} does not serve everything: {}", stands()))
            }
            Goal::At(_) | Goal::To(_) | Goal::Back => has_all(&first.stable, services),
            Goal::Paused if first.paused || first.phase == Phase::Paused => Progress::Reached,
            Goal::Paused => Progress::Lost(format!("it is not paused any more: {}", stands())),
            Goal::Set(weight) => match &first.step {
                Some(step) if under_way && step.weight == *weight => has_share(*weight, first, services),
                _ => Progress::Lost(format!("{weight} % is not what it is to have any more: {}", stands())),
            },
        }
    }

    /// The target that it is about.
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

/// The first few, and how many more there are.
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
        "rollout {number}{} has not come to its end: rollout {}{} took its place ({} - {})",
        to(target),
        now.number,
        to(now.target.as_deref()),
        now.phase.name(),
        now.message
    )
}

/// Whether all endpoints were probed at least once: nothing begins before.
fn is_probed(service: &ServiceStatus) -> bool {
    service.versions.iter().flat_map(|version| &version.endpoints.not_ready).all(|endpoint| endpoint.reason.is_some())
}

fn version<'a>(service: &'a ServiceStatus, name: &str) -> Option<&'a VersionStatus> {
    service.versions.iter().find(|version| version.name == name)
}

/// Whether a version serves everything; nothing is under way.
fn has_all(name: &str, services: &[&ServiceStatus]) -> Progress {
    let has_it = |service: &&&ServiceStatus| version(service, name).is_some_and(|version| version.weight >= 100.0);
    match services.iter().find(|service| !has_it(service)) {
        None => Progress::Reached,
        Some(service) => Progress::Lacks(lacks(name, 100, service)),
    }
}

/// Whether the target has a share, no more and no less.
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

/// What a version has instead of its share, and how many endpoints there are to carry it.
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
