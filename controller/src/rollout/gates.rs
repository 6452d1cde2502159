//! Gates before a share of the target. Everything that increases the target's share checks them: the next step,
//! `promote`, `set-weight`, `resume`, edited steps, an edited `stable`, and `rollback` to a version that has not
//! served.

use super::{Refused, Rollout};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::shift::{Step, TrafficShift, Webhook};

/// The gates of a rollout's steps, by their webhooks' names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Gates {
    /// The gates of each step, as the document listed them when last observed.
    planned: Vec<Vec<String>>,
    /// Gates that were still closed when the steps were edited, with the share in percent above which each of them
    /// applies. Editing the steps does not remove a gate.
    kept: BTreeMap<String, u32>,
}

/// A gate that has not approved.
struct Closed {
    /// The index of its step.
    step: usize,
    /// The webhook's name.
    name: String,
}

impl Rollout {
    /// The webhooks that must approve before the step of this index begins.
    pub fn gates_of<'a>(&'a self, step: usize, shift: &'a TrafficShift) -> impl Iterator<Item = &'a Webhook> {
        let is_forward = !self.goes_back(shift);
        self.gates_in(&shift.strategy.steps, step, shift).filter(move |_| is_forward)
    }

    fn gates_in<'a>(
        &'a self,
        steps: &[Step],
        step: usize,
        shift: &'a TrafficShift,
    ) -> impl Iterator<Item = &'a Webhook> {
        let weight = steps.get(step).map_or(100, |step| step.weight);
        let is_kept =
            move |webhook: &Webhook| self.gates.kept.get(&webhook.name).is_some_and(|beyond| weight > *beyond);
        let is_of_step = move |webhook: &Webhook| webhook.is_gate_of(step.saturating_add(1));
        shift.webhooks.iter().filter(move |webhook| webhook.is_gate() && (is_of_step(webhook) || is_kept(webhook)))
    }

    pub(super) fn needs_gate(&self, step: usize, shift: &TrafficShift) -> bool {
        self.gates_of(step, shift).next().is_some()
    }

    /// The first closed gate that the target must pass to get this share, in percent.
    fn closed_gate(&self, weight: u32, shift: &TrafficShift) -> Option<Closed> {
        if self.goes_back(shift) { None } else { self.closed_gate_ahead(weight, shift) }
    }

    /// Whether a closed gate remains before 100 %.
    pub(super) fn waits_for_gate(&self, shift: &TrafficShift) -> bool {
        self.closed_gate(100, shift).is_some()
    }

    /// The same, for a target on its way forward.
    fn closed_gate_ahead(&self, weight: u32, shift: &TrafficShift) -> Option<Closed> {
        let steps = &shift.strategy.steps;
        let first = if self.allowed { self.step + 1 } else { self.step };
        // A share that a user has set has already passed the gates below it.
        let had = self.weight_by_hand.unwrap_or(0);
        (first..steps.len()).find_map(|step| {
            let beyond = most(steps, step);
            let name = || self.gates_in(steps, step, shift).next().map(|webhook| webhook.name.clone());
            (had <= beyond && beyond < weight).then(name).flatten().map(|name| Closed { step, name })
        })
    }

    /// Checks that no closed gate lies before a share of the target, in percent. Returns the text to append to a
    /// message.
    pub(super) fn pass_gates(&self, weight: u32, is_override: bool, shift: &TrafficShift) -> Result<String, Refused> {
        match self.closed_gate(weight, shift) {
            None => Ok(String::new()),
            Some(Closed { name, step }) if is_override => {
                Ok(format!(", overriding the gate {name} of step {}", step + 1))
            }
            Some(Closed { name, step }) => Err(self.conflict(&format!(
                "the gate {name} of step {} has not said yes, and lies before {weight} %; wait for it, or override it with \
                 --override-gates (overrideGates)",
                step + 1
            ))),
        }
    }

    /// The step to continue from to reach `step`: that step, or an earlier one whose gate must be asked first.
    pub(super) fn step_up_to(&self, step: usize, shift: &TrafficShift) -> usize {
        let weight = self.steps(shift).get(step).map_or(100, |step| step.weight);
        self.closed_gate(weight, shift).map_or(step, |gate| gate.step.min(step))
    }

    /// Whether the document's `stable` names a version that would get all traffic without passing its gates.
    pub(super) fn is_stable_gated(&self, shift: &TrafficShift) -> bool {
        let stable = &shift.stable;
        if *stable == self.stable || self.has_served(stable) || !shift.has(&self.stable) {
            return false;
        }
        let is_target = self.phase.is_under_way() && self.target.as_ref() == Some(stable);
        let is_on_its_way = self.said.gated.as_ref() == Some(stable);
        if is_target {
            is_on_its_way || self.closed_gate_ahead(100, shift).is_some()
        } else {
            shift.webhooks.iter().any(Webhook::is_gate)
        }
    }

    /// Whether a version is remembered to have had all traffic.
    pub(super) fn has_served(&self, version: &str) -> bool {
        self.stable == version || self.said.stable == version || self.served_before.as_deref() == Some(version)
    }

    /// Records that a gate of the current step has approved.
    pub(super) fn gate_opened(&mut self, weight: u32) {
        self.gates.kept.retain(|_, beyond| *beyond >= weight);
    }

    /// Sets the gates for a new rollout: those of the document.
    pub(super) fn reset_gates(&mut self, shift: &TrafficShift) {
        self.gates = Gates { planned: planned(shift), kept: BTreeMap::new() };
    }

    /// Keeps the closed gates of steps that have been edited; `old` are the previous steps' weights.
    pub(super) fn keep_gates(&mut self, old: &[u32], shift: &TrafficShift) {
        let first = if self.allowed { self.step + 1 } else { self.step };
        let before = std::mem::replace(&mut self.gates.planned, planned(shift));
        for (step, names) in before.into_iter().enumerate().skip(first) {
            let beyond = old.iter().take(step).copied().max().unwrap_or(0);
            for name in names {
                let known = self.gates.kept.entry(name).or_insert(beyond);
                *known = beyond.min(*known);
            }
        }
    }

    /// Updates the gates from the document while its steps are unchanged.
    pub(super) fn note_gates(&mut self, shift: &TrafficShift) {
        if !(shift.webhooks.is_empty() && self.gates.planned.is_empty()) {
            self.gates.planned = planned(shift);
        }
    }
}

/// The largest weight before a step.
fn most(steps: &[Step], step: usize) -> u32 {
    steps.iter().take(step).map(|step| step.weight).max().unwrap_or(0)
}

fn planned(shift: &TrafficShift) -> Vec<Vec<String>> {
    if shift.webhooks.is_empty() {
        return Vec::new();
    }
    let gates = |step| shift.gates_of(step).map(|webhook| webhook.name.clone()).collect();
    (0..shift.strategy.steps.len()).map(gates).collect()
}
