//! Determines whether the target is measured: whether live proxies run the current policy and route requests to the
//! target, and what became of these requests. A step that no request can have exercised neither completes its hold nor
//! ends by time alone.

use super::{Reason, Rollout, RolloutInputs, Warming};
use crate::clock::Millis;
use crate::rollout::allocation::EPSILON;
use crate::rollout::shortfall::of_service;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::counts::Counts;
use tideshift_core::shift::{ShiftService, TrafficShift};

/// Proxies apply and report a revision within a fraction of a second; nothing is reported as missing for this long.
pub(super) const USUAL: Millis = 3_000;

/// The state of the proxies with regard to a rollout's services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Proxies that have reported within the last seconds.
    pub live: usize,
    /// Proxies that have been silent for longer and are not forgotten yet.
    pub silent: usize,
    /// The first silent proxy by name, and for how long it has been silent.
    pub first_silent: Option<(String, Millis)>,
    /// Live proxies that have not applied the latest policy for these services.
    pub behind: usize,
    /// The first of them by name, and the revision that it runs; `None` if it runs none of this controller's.
    pub first_behind: Option<(String, Option<u64>)>,
    /// The revision that they are to run, or a newer one.
    pub revision: u64,
}

/// A service's counts when the current step began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Begun {
    target: Counts,
    /// The stable version's successful answers.
    stable: u64,
    /// Requests of the target that did not reach it.
    misrouted: u64,
    /// The state at the last misrouted request: how many there were, how many requests had reached the target, and
    /// when.
    last: (u64, u64, Millis),
}

impl Begun {
    /// When a request was last misrouted.
    pub(super) fn last_time(&mut self) -> &mut Millis {
        &mut self.last.2
    }

    /// When the misrouted requests so far stop counting, if no more follow.
    pub(super) fn mended(&self) -> Millis {
        self.last.2 + USUAL + 1
    }
}

impl Rollout {
    /// Records the counts at the beginning of the step, and when a request was last misrouted.
    pub(super) fn take_stock(&mut self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) {
        let stable = self.stable.clone();
        for service in &shift.services {
            let counts = world.counts(&service.name, target);
            let others = world.counts(&service.name, &stable).ok;
            let misrouted = world.misrouted(&service.name, target);
            let last = (misrouted, counts.total(), now);
            let new = || Begun { target: counts, stable: others, misrouted, last };
            let begun = self.begun.entry(service.name.clone()).or_insert_with(new);
            if counts.any_below(&begun.target) || others < begun.stable || misrouted < begun.misrouted {
                // The counts were lost.
                *begun = new();
            }
            if misrouted != begun.last.0 {
                begun.last = last;
            }
        }
    }

    /// Accounts for time, measured or not: unmeasured time does not count towards holds and the warm-up.
    pub(super) fn count_measured(&mut self, is_measured: bool, now: Millis) {
        match (is_measured, self.unmeasured_since) {
            (false, None) => self.unmeasured_since = Some(now),
            (true, Some(since)) => {
                if self.is_unmeasured_for_long(now) {
                    let later = |time: Millis| time + now.saturating_sub(since.max(time));
                    self.held_since = self.held_since.map(later);
                    if let Warming::Since(time) = self.warming {
                        self.warming = Warming::Since(later(time));
                    }
                }
                self.unmeasured_since = None;
            }
            _ => {}
        }
    }

    /// Whether the target has been unmeasured for longer than is usual after each new revision.
    pub(super) fn is_unmeasured_for_long(&self, now: Millis) -> bool {
        self.unmeasured_since.is_some_and(|since| now.saturating_sub(since) > USUAL)
    }

    /// Until when time counts towards the hold and the warm-up.
    pub(super) fn measured_until(&self, now: Millis) -> Millis {
        self.unmeasured_since.filter(|_| self.is_unmeasured_for_long(now)).unwrap_or(now)
    }

    /// For how long the target has had the step's share while measured.
    pub fn held(&self, now: Millis) -> Option<Millis> {
        self.held_since.map(|since| self.measured_until(now).saturating_sub(since))
    }

    /// Why the target is not measured now, and what to do; `None` if it is.
    pub(super) fn unmeasured(
        &self,
        target: &str,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Option<(Reason, String)> {
        if self.goes_back(shift) {
            return None;
        }
        let coverage = world.coverage();
        if coverage.live == 0 {
            let why = "no proxy reports; start an Envoy with this policy (tideshift render envoy), or check its cluster \
                       tideshift_controller";
            return Some((Reason::NoProxies, why.to_owned()));
        }
        let behind = behind(&coverage).map(|why| (Reason::ProxiesBehind, why));
        behind.or_else(|| Some((Reason::NotRouted, self.not_routed(target, shift, world, now)?)))
    }

    /// Whether the target's requests were misrouted in this step, more of them than reached it.
    fn not_routed(
        &self,
        target: &str,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Option<String> {
        shift.services.iter().find_map(|service| {
            let begun = self.begun.get(&service.name)?;
            let reached = world.counts(&service.name, target).total();
            let astray = world.misrouted(&service.name, target).saturating_sub(begun.misrouted);
            let (_, reached_then, time) = begun.last;
            // Once a route is added, all requests reach the target.
            let is_mended = reached > reached_then && now.saturating_sub(time) > USUAL;
            let is_astray = astray > reached.saturating_sub(begun.target.total()) && !is_mended;
            let of = of_service(shift, service);
            is_astray.then(|| {
                format!(
                    "{astray} {} of {target}{of} went elsewhere; add a route that matches x-tideshift-version: {target} \
                     (tideshift render prints it)",
                    if astray == 1 { "request" } else { "requests" }
                )
            })
        })
    }

    /// The message if the target has given no successful answer in this step and the stable version has.
    pub(super) fn no_good_answer(
        &self,
        target: &str,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
    ) -> Option<String> {
        let of = |service: &ShiftService| {
            let begun = self.begun.get(&service.name)?;
            let got = world.counts(&service.name, target).since(&begun.target);
            let others = world.counts(&service.name, &self.stable).ok.saturating_sub(begun.stable);
            // If the target has all traffic, the stable version still answers earlier requests.
            let are_late = got.total() == 0 && self.goal(shift) + EPSILON >= 1.0;
            if got.ok > 0 || others == 0 || are_late {
                return None;
            }
            let ended = [(got.error, "failed"), (got.client_error, "with client errors"), (got.cancelled, "cancelled")];
            let ended = ended.iter().filter(|(number, _)| *number > 0);
            let ended: Vec<String> = ended.map(|(number, how)| format!("{number} {how}")).collect();
            let requests = match got.total() {
                0 => "none of its requests has ended".to_owned(),
                total => format!("{total} of its requests have ended: {}", ended.join(", ")),
            };
            Some(format!(
                "{target}{} has given no good answer in this step, {} {others}; {requests}",
                of_service(shift, service),
                self.stable
            ))
        };
        shift.services.iter().find_map(of)
    }

    /// The message if guards veto the target on half of the proxies or more. Its users are served by other versions
    /// there, whatever share it nominally has, so the step is not held.
    pub(super) fn kept_out(&self, target: &str, shift: &TrafficShift, world: &impl RolloutInputs) -> Option<String> {
        let live = world.coverage().live;
        shift.services.iter().find_map(|service| {
            let out = world.vetoes(&service.name, target).count();
            let of = of_service(shift, service);
            let words = || format!("the guards of {out} of {} keep {target}{of} out", proxies(live));
            (out > 0 && 2 * out >= live).then(words)
        })
    }
}

impl Rollout {
    /// The errors and requests that guards have counted, if guards on half of the proxies or more have counted mostly
    /// errors.
    pub(super) fn fails_most(
        &self,
        target: &str,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
    ) -> Option<(u64, u64)> {
        let live = world.coverage().live;
        let of = |service: &ShiftService| {
            let vetoes = world.vetoes(&service.name, target);
            let (proxies, errors, requests) = vetoes.fold((0, 0_u64, 0_u64), |(proxies, errors, requests), veto| {
                (proxies + 1, errors.saturating_add(veto.errors), requests.saturating_add(veto.requests))
            });
            (proxies > 0 && 2 * proxies >= live && errors.saturating_mul(2) > requests).then_some((errors, requests))
        };
        shift.services.iter().find_map(of)
    }
}

fn proxies(number: usize) -> String {
    format!("{number} {}", if number == 1 { "proxy" } else { "proxies" })
}

/// Which proxies do not run the current policy, and what to do.
fn behind(coverage: &Coverage) -> Option<String> {
    let more = |number: usize| if number > 1 { format!(" (and {} more)", number - 1) } else { String::new() };
    if let Some((first, revision)) = coverage.first_behind.as_ref().filter(|_| coverage.behind > 0) {
        let runs = match revision {
            Some(revision) => format!("runs revision {revision}"),
            None => "runs no policy of this controller".to_owned(),
        };
        return Some(format!(
            "proxy {first}{} {runs} and has not applied {}; tideshift status says what it refused",
            more(coverage.behind),
            coverage.revision
        ));
    }
    let known = coverage.live + coverage.silent;
    let (first, long) = coverage.first_silent.as_ref().filter(|_| 10 * coverage.silent > known)?;
    Some(format!(
        "proxy {first}{} of {} has been silent for {} s; check it and its cluster tideshift_controller, or wait until \
         it is forgotten after 60 s",
        more(coverage.silent),
        proxies(known),
        long / 1_000
    ))
}

/// By service.
pub(super) type Stock = BTreeMap<String, Begun>;
