//! Shortfalls: versions that cannot carry their share, and the versions that carry it instead. Detects changes and
//! describes them.

use crate::rollout::allocation::EPSILON;
use crate::rollout::{Allocation, Phase, Rollout, RolloutInputs, percent};
use serde::{Deserialize, Serialize};
use tideshift_core::shift::{ShiftService, TrafficShift};

/// A service whose traffic is not distributed as intended. The amounts are not part of it: a change of single endpoints
/// is not a transition each time, the loss of a version is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ShortfallReason {
    service: String,
    /// The versions that carry less than intended, but something.
    short: Vec<String>,
    /// The versions that carry nothing of their intended share.
    gone: Vec<String>,
    /// The versions that carry more than intended.
    helping: Vec<String>,
}

/// The current shortfalls and their description.
#[derive(Debug, Default)]
pub(super) struct Shortfall {
    /// The services whose traffic is not distributed as intended.
    pub strains: Vec<ShortfallReason>,
    /// The missing endpoints, for people.
    pub missing: Vec<String>,
    /// The versions that have the traffic instead, for people.
    pub holders: String,
    /// Whether no version of any service has traffic.
    pub nobody_serves: bool,
}

impl Shortfall {
    /// The missing endpoints and the versions that have the traffic instead; `None` if nothing is missing.
    pub(super) fn words(&self) -> Option<String> {
        (!self.strains.is_empty()).then(|| sentences(self.missing.iter().chain([&self.holders])))
    }

    /// Appends to `words` the versions that have the traffic, if it is not distributed as intended.
    pub(super) fn beside(&self, words: String) -> String {
        self.words().map_or(words.clone(), |shortfall| format!("{words}; {shortfall}"))
    }
}

/// Joins the parts of a message.
pub(super) fn sentences<'a>(parts: impl IntoIterator<Item = &'a String>) -> String {
    parts.into_iter().map(String::as_str).collect::<Vec<_>>().join("; ")
}

impl Rollout {
    /// The current shortfall.
    pub(super) fn shortfall(&self, shift: &TrafficShift, world: &impl RolloutInputs) -> Shortfall {
        let target = self.target.as_ref().filter(|_| self.phase.is_under_way());
        let meant = self.meant(shift, world);
        let (mut strains, mut missing, mut held) = (Vec::new(), Vec::new(), Vec::new());
        for (service, parts) in shift.services.iter().zip(self.all_parts(shift, world)) {
            let should = |name: &String| match () {
                () if Some(name) == target => meant,
                () if *name == self.stable => 1.0 - meant,
                () => 0.0,
            };
            let of = |is: &dyn Fn(&Allocation, f64) -> bool| -> Vec<String> {
                let parts = parts.iter().filter(|part| is(part, should(&part.version)));
                parts.map(|part| part.version.clone()).collect()
            };
            let strain = ShortfallReason {
                service: service.name.clone(),
                short: of(&|part, should| part.share > 0.0 && part.share + ROUNDING < should),
                gone: of(&|part, should| part.share == 0.0 && ROUNDING < should),
                helping: of(&|part, should| part.share > should + ROUNDING),
            };
            missing.extend(self.missing_of_target(shift, service, world));
            missing.extend(self.missing_of_stable(shift, service, 1.0 - meant, world));
            held.push((&service.name, self.holders(&parts), strain.is_any()));
            strains.extend(Some(strain).filter(ShortfallReason::is_any));
        }
        let nobody_serves = held.iter().all(|(_, holders, _)| holders == NOBODY);
        let all_alike = held.windows(2).all(|pair| pair[0].1 == pair[1].1);
        let holders = match all_alike {
            true => held.into_iter().take(1).map(|(_, holders, _)| holders).collect(),
            false => {
                let strained = held.into_iter().filter(|(.., is_strained)| *is_strained);
                let of: Vec<String> = strained.map(|(name, holders, _)| format!("{name}: {holders}")).collect();
                sentences(&of)
            }
        };
        Shortfall { strains, missing, holders, nobody_serves }
    }

    /// The versions that have traffic, and how much.
    fn holders(&self, parts: &[Allocation]) -> String {
        let holders: Vec<&Allocation> = parts.iter().filter(|part| part.share > 0.0).collect();
        let mut words = Vec::new();
        for part in &holders {
            let was_taken_back = self.phase == Phase::Failed && self.target.as_ref() == Some(&part.version);
            let which = if was_taken_back { ", which was taken back," } else { "" };
            let has = if words.is_empty() || was_taken_back { " has" } else { "" };
            words.push(format!("{}{which}{has} {} %", part.version, percent(part.share)));
        }
        match holders.is_empty() {
            true => NOBODY.to_owned(),
            false => words.join(", "),
        }
    }

    /// The target's endpoints that are missing in a service for the share of the current step.
    pub(super) fn missing_of_target(
        &self,
        shift: &TrafficShift,
        service: &ShiftService,
        world: &impl RolloutInputs,
    ) -> Option<String> {
        let target = self.target.as_ref().filter(|_| self.phase.is_under_way())?;
        let (full, goal) = (self.full_load(service), self.goal(shift));
        let for_users = needed(full, goal);
        let is_steps = self.allowed && self.weight_by_hand.is_none() && !self.goes_back(shift);
        let testers = is_steps && self.current_step(shift).is_some_and(|step| !step.matches.is_empty());
        let (needed, by) = match () {
            // Before any traffic moves, all endpoints must be ready.
            () if is_steps && shift.strategy.whole_steps && for_users < full => (full, "the load needs".to_owned()),
            () if testers && for_users == 0 => (1, "testers need".to_owned()),
            () => (for_users, format!("{} % of the load need", percent(goal))),
        };
        self.missing(shift, service, target, needed, &by, world)
    }

    /// The stable version's endpoints that are missing in a service for this share.
    fn missing_of_stable(
        &self,
        shift: &TrafficShift,
        service: &ShiftService,
        share: f64,
        world: &impl RolloutInputs,
    ) -> Option<String> {
        let by = match self.phase.is_under_way() {
            true => format!("{} % of the load need", percent(share)),
            false => "the load needs".to_owned(),
        };
        self.missing(shift, service, &self.stable, needed(self.full_load(service), share), &by, world)
    }

    fn missing(
        &self,
        shift: &TrafficShift,
        service: &ShiftService,
        version: &str,
        needed: u32,
        by: &str,
        world: &impl RolloutInputs,
    ) -> Option<String> {
        let counted = self.counted_on(shift, service, version, world);
        let of = of_service(shift, service);
        let long = match shift.strategy.min_ready.as_secs() {
            seconds if seconds > 0 && self.must_have_been_ready(shift, version) => format!(" for {seconds} s"),
            _ => String::new(),
        };
        (counted < needed).then(|| format!("{version}{of} has {counted} of {needed} endpoints ready{long} that {by}"))
    }

    /// The message while nothing is being moved: the result of the last rollout, and the versions that serve if the
    /// stable version cannot.
    pub(super) fn at_rest(&self, shortfall: &Shortfall) -> String {
        let stable = &self.stable;
        let came_of_it = match (self.outcome.as_str(), self.phase) {
            ("", Phase::Succeeded) => format!("{stable} serves everything"),
            ("", _) => format!("{stable} serves"),
            (outcome, _) => outcome.to_owned(),
        };
        let missing = (!shortfall.missing.is_empty()).then(|| sentences(&shortfall.missing));
        match shortfall.words().or(missing) {
            // The target's failure stays in the message.
            Some(words) if self.phase == Phase::Failed => format!("{came_of_it}; {words}"),
            Some(words) => words,
            None => came_of_it,
        }
    }
}

/// The message if no version has traffic.
const NOBODY: &str = "no version has a ready endpoint";
/// Differences below a thousandth of a percent do not count as a loss.
const ROUNDING: f64 = 1e-5 + EPSILON;

impl ShortfallReason {
    fn is_any(&self) -> bool {
        !(self.short.is_empty() && self.gone.is_empty() && self.helping.is_empty())
    }
}

/// Names the service, if there are several.
pub(super) fn of_service(shift: &TrafficShift, service: &ShiftService) -> String {
    if shift.services.len() > 1 { format!(" of {}", service.name) } else { String::new() }
}

/// How many endpoints a share needs, of those for the whole load.
fn needed(full: u32, share: f64) -> u32 {
    (f64::from(full) * share - 1e-6).ceil().max(0.0) as u32
}
