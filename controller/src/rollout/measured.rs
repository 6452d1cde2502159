//! Only what was measured counts: whether proxies that are there run what was decided and lead requests to the target,
//! and what came of those. A step that no request can have tried is neither held nor ended by time alone.

use super::{Reason, Rollout, RolloutInputs, Warming};
use crate::clock::Millis;
use crate::rollout::allocation::EPSILON;
use crate::rollout::shortfall::of_service;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::counts::Counts;
use tideshift_core::shift::{ShiftService, TrafficShift};

/// A revision is applied and said to be within a fraction of a second; so long, nothing is said of it.
pub(super) const USUAL: Millis = 3_000;

/// What is known of the proxies, as far as a rollout's services are concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Those that have reported within the last seconds.
    pub live: usize,
    /// Those that have been silent for longer, and are not forgotten yet.
    pub silent: usize,
    /// The first of them by name, and for how long.
    pub first_silent: Option<(String, Millis)>,
    /// Those that report and have not applied what was published last for these services.
    pub behind: usize,
    /// The first of them by name, and the revision that it runs: none of this controller's, if none.
    pub first_behind: Option<(String, Option<u64>)>,
    /// The revision that they are to run, or a newer one.
    pub revision: u64,
}

/// What had been counted of a service when the present step began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Begun {
    target: Counts,
    /// The stable version's good answers.
    stable: u64,
    /// Requests of the target that did not reach it.
    misrouted: u64,
    /// How many there were when one came last, how many had reached the target then, and when that was.
    last: (u64, u64, Millis),
}

impl Begun {
    /// When a request went astray last.
    pub(super) fn last_time(&mut self) -> &mut Millis {
        &mut self.last.2
    }

    /// When what went astray since then counts no longer, if all goes well.
    pub(super) fn mended(&self) -> Millis {
        self.last.2 + USUAL + 1
    }
}

impl Rollout {
    /// Notes what had been counted when the step began, and when a request went astray last.
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
                // What was counted is lost.
                *begun = new();
            }
            if misrouted != begun.last.0 {
                begun.last = last;
            }
        }
    }

    /// Time goes on, measured or not.
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

    /// Whether nothing has been measured for longer than is usual with each new revision.
    pub(super) fn is_unmeasured_for_long(&self, now: Millis) -> bool {
        self.unmeasured_since.is_some_and(|since| now.saturating_sub(since) > USUAL)
    }

    /// Up to when time counts that is held or warmed up in.
    pub(super) fn measured_until(&self, now: Millis) -> Millis {
        self.unmeasured_since.filter(|_| self.is_unmeasured_for_long(now)).unwrap_or(now)
    }

    /// For how long the target has had the step's share, as far as that was measured.
    pub fn held(&self, now: Millis) -> Option<Millis> {
        self.held_since.map(|since| self.measured_until(now).saturating_sub(since))
    }

    /// Why nothing can be known of the target now, and what to do, if so.
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

    /// Whether requests of the target went elsewhere, and no more than those came to it.
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
            // A route that has been added leads all to it from then on.
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

    /// Whether the target has given no good answer in this step where the stable version has, in words.
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
            // With everything at the target, what the stable version still answers was sent before.
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

    /// Whether guards keep the target out on half of the proxies or more, in words. Its users are the others' there,
    /// whatever share it has on paper, so that the step is not held.
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
    /// The errors and requests that the guards of half of the proxies or more have seen, if most failed there.
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

/// Which proxies do not do what was decided, and what to do.
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
