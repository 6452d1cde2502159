//! Commands that users give to a rollout, in addition to its document.

use super::{Phase, Reason, Rollout, RolloutInputs, Warming};
use crate::clock::Millis;
use serde::{Deserialize, Serialize};
use tideshift_core::shift::TrafficShift;

/// A command for a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "camelCase", tag = "command")]
pub enum Command {
    /// Advances to the next step: past a pause, the rest of a hold, or an undecided verdict.
    Promote {
        /// Advances straight to the last step.
        full: bool,
        /// Overrides gates that have not approved.
        #[serde(default)]
        override_gates: bool,
    },
    /// Keeps the current share.
    Pause,
    /// Continues after a pause.
    Resume,
    /// Goes back to the stable version.
    Abort,
    /// Goes back to a version, at once as far as it can carry the load.
    Rollback {
        /// The version.
        to: String,
        /// Overrides gates, if the version has not served before.
        #[serde(default)]
        override_gates: bool,
    },
    /// Starts a rollout to this version, as if the document named it.
    SetTarget {
        /// The version.
        target: String,
    },
    /// Keeps the target at this share.
    SetWeight {
        /// Percent, 0 to 100.
        weight: u32,
        /// Overrides gates that have not approved.
        #[serde(default)]
        override_gates: bool,
    },
}

/// Why a command is refused, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The command is invalid in any state.
    #[error("{0}")]
    Invalid(String),
    /// The command conflicts with the current state.
    #[error("{0}")]
    Conflict(String),
}

impl Rollout {
    /// The state after a command. A command that changes nothing is accepted, so it can be repeated.
    ///
    /// # Errors
    ///
    /// If the command conflicts with the rollout's state, or names a version that does not exist.
    pub fn command(
        mut self,
        command: &Command,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Result<Self, Refused> {
        match command {
            Command::Promote { full, override_gates } => self.promote(*full, *override_gates, shift, world, now)?,
            Command::Pause => self.pause(shift, world, now)?,
            Command::Resume => self.resume(shift, world, now)?,
            Command::Abort => {
                let target = self.target_under_way()?;
                self.take_back(Reason::Aborted, &format!("{target}: aborted by hand"), now);
            }
            Command::Rollback { to, override_gates } => self.roll_back(to, *override_gates, shift, world, now)?,
            Command::SetTarget { target } => self.set_target(target, shift, world, now)?,
            Command::SetWeight { weight, override_gates } => {
                let target = self.target_under_way()?;
                if *weight > 100 {
                    return Err(Refused::Invalid(format!(
                        "weight: {weight} is not allowed; expected 0 to 100 percent"
                    )));
                }
                let besides = self.pass_gates(*weight, *override_gates, shift)?;
                if !self.allowed && !override_gates {
                    return Err(self.conflict("the gate of the present step has not said yes"));
                }
                // A gate before a larger share stays closed.
                self.allowed |= !besides.is_empty();
                self.unpause(now);
                (self.paused, self.weight_by_hand, self.held_since) = (true, Some(*weight), None);
                self.announce(
                    Phase::Paused,
                    Reason::WeightSet,
                    format!("{target} is to get {weight} % by hand{besides}"),
                    now,
                );
            }
        }
        Ok(self)
    }

    pub(super) fn conflict(&self, why: &str) -> Refused {
        Refused::Conflict(format!("{why} (phase {}: {})", self.phase.name(), self.message))
    }

    fn target_under_way(&self) -> Result<String, Refused> {
        let target = self.target.clone().filter(|_| self.phase.is_under_way());
        target.ok_or_else(|| self.conflict("no rollout is under way"))
    }

    fn promote(
        &mut self,
        full: bool,
        override_gates: bool,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Result<(), Refused> {
        let target = self.target_under_way()?;
        let share = self.wanted(shift, world);
        // The user may promote an unmeasured target, but the message says what is not measured.
        let unmeasured = self.unmeasured(&target, shift, world, now);
        let besides = unmeasured.map(|(_, why)| format!(", although {why}")).unwrap_or_default();
        let last = self.steps(shift).len().saturating_sub(1);
        if full {
            let past_gates = self.pass_gates(100, override_gates, shift)?;
            if self.step != last || self.paused {
                let was_allowed = self.allowed && self.step == last;
                self.unpause(now);
                self.begin_step(last, share, shift, now);
                self.allowed |= was_allowed;
            }
            self.allowed |= override_gates;
            self.skip_hold = true;
            self.announce(
                Phase::Progressing,
                Reason::Promoted,
                format!("{target} is to get everything, by hand{past_gates}{besides}"),
                now,
            );
            return Ok(());
        }
        if !self.allowed && !self.edited {
            return self.open_by_hand(&target, override_gates, shift, now);
        }
        let (by_hand, edited) = (self.weight_by_hand, self.edited);
        // If the current step never had its share, promoting goes to the current step.
        let has_had = self.reached >= self.present(shift).weight * 1_000;
        self.unpause(now);
        match by_hand {
            // The next step is the first one above the current share.
            Some(weight) if self.step < last => {
                let steps = self.steps(shift);
                let first = if has_had { self.step + 1 } else { self.step };
                let mut above = (first..last).filter(|index| steps[*index].weight > weight);
                let next = self.step_up_to(above.next().unwrap_or(last), shift);
                self.begin_step(next, share, shift, now);
            }
            _ => self.skip_hold = has_had || !edited,
        }
        self.get_further(now);
        self.announce(
            Phase::Progressing,
            Reason::Promoted,
            format!("{target}: on to the next step, by hand{besides}"),
            now,
        );
        Ok(())
    }

    /// Begins a step although its gate has not approved it.
    fn open_by_hand(
        &mut self,
        target: &str,
        override_gates: bool,
        shift: &TrafficShift,
        now: Millis,
    ) -> Result<(), Refused> {
        let weight = self.present(shift).weight;
        let besides = self.pass_gates(weight, override_gates, shift)?;
        if !override_gates {
            return Err(self.conflict("the gate of the present step has not said yes"));
        }
        self.allowed = true;
        self.gate_opened(weight);
        self.get_further(now);
        let message = format!("step {}: {target} is to get {weight} %, by hand{besides}", self.step + 1);
        self.announce(Phase::Progressing, Reason::Promoted, message, now);
        Ok(())
    }

    fn pause(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Result<(), Refused> {
        let target = self.target_under_way()?;
        if self.paused {
            return Ok(());
        }
        self.freeze(shift, world, now);
        self.announce(Phase::Paused, Reason::PausedByUser, format!("{target}: paused by hand"), now);
        Ok(())
    }

    fn resume(&mut self, shift: &TrafficShift, world: &impl RolloutInputs, now: Millis) -> Result<(), Refused> {
        let target = self.target_under_way()?;
        if !self.paused && self.reason == Reason::PauseStep {
            return self.promote(false, false, shift, world, now);
        }
        if !self.paused {
            return Err(self.conflict("it is not paused"));
        }
        let (by_hand, share) = (self.weight_by_hand, self.wanted(shift, world));
        self.unpause(now);
        if let Some(weight) = by_hand {
            // Continues from the first step that does not reduce the share.
            let next = self.step_up_to(self.step_from(f64::from(weight) / 100.0, shift), shift);
            let is_allowed = self.allowed && next == self.step;
            self.begin_step(next, share, shift, now);
            self.allowed |= is_allowed;
        }
        self.get_further(now);
        self.announce(Phase::Progressing, Reason::Resumed, format!("{target}: resumed by hand"), now);
        Ok(())
    }

    fn roll_back(
        &mut self,
        to: &str,
        override_gates: bool,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Result<(), Refused> {
        must_have(shift, "to", to)?;
        if let Some(gate) = shift.webhooks.iter().find(|webhook| webhook.is_gate())
            && !self.has_served(to)
            && *to != shift.stable
            && !override_gates
        {
            return Err(self.conflict(&format!(
                "{to} has not served everything, and the gate {} lies before that; set-target moves to it step by step, or \
                 override the gates with --override-gates (overrideGates)",
                gate.name
            )));
        }
        let under_way = self.phase.is_under_way();
        if to == self.stable {
            let Ok(target) = self.target_under_way() else {
                return Err(self.conflict(&format!("{to} serves already")));
            };
            self.take_back(Reason::RolledBack, &format!("{target}: rolled back by hand"), now);
            return Ok(());
        }
        let from = self.target.clone().filter(|from| under_way && from != to).unwrap_or(self.stable.clone());
        self.start(to.to_owned(), shift, world, now);
        (self.is_return, self.allowed, self.warming) = (true, true, Warming::Over);
        self.plan = self.planned(shift);
        self.rollback_count += 1;
        let message = format!("rolling back from {from} to {to} by hand");
        self.announce(Phase::Progressing, Reason::RolledBack, message, now);
        Ok(())
    }

    fn set_target(
        &mut self,
        target: &str,
        shift: &TrafficShift,
        world: &impl RolloutInputs,
        now: Millis,
    ) -> Result<(), Refused> {
        must_have(shift, "target", target)?;
        let under_way = self.phase.is_under_way();
        if under_way && self.target.as_deref() == Some(target) && !self.is_return {
            return Ok(());
        }
        if target != self.stable {
            self.start(target.to_owned(), shift, world, now);
        } else if under_way {
            self.withdraw(shift, world, now);
        }
        Ok(())
    }
}

fn must_have(shift: &TrafficShift, field: &str, version: &str) -> Result<(), Refused> {
    if shift.declares(version) {
        return Ok(());
    }
    let known: Vec<_> = shift.versions().filter(|version| shift.declares(version)).collect();
    let known = known.join(", ");
    Err(Refused::Invalid(format!("{field}: \"{version}\" is not allowed; expected one of the versions {known}")))
}
