//! The bounded history of a rollout.

use super::{Phase, Reason};
use crate::clock::Millis;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// A change of a rollout's state that users may want to see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// When it happened.
    pub time: Millis,
    /// The number of the rollout.
    pub rollout: u64,
    /// The phase since then.
    pub phase: Phase,
    /// Why, in one word.
    pub reason: Reason,
    /// Why, for people.
    pub message: String,
    /// The index of the current step, if the rollout is under way.
    pub step: Option<usize>,
    /// The version that served before the rollout.
    #[serde(default)]
    pub from: Option<String>,
    /// The version that the rollout moves to or moved to, or that failed.
    #[serde(default)]
    pub target: Option<String>,
    /// Who gave the command, where known: `NAME from ADDRESS`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// How many transitions just before this one are left out, because endpoints came and went repeatedly.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The most transitions of a rollout that are kept.
const MOST: usize = 200;
/// The most transitions of one step that only report endpoints coming or going: the first and the latest ones.
const MOST_TO_AND_FRO: usize = 12;

/// Adds a transition. Endpoints that come and go all day do not push out the other transitions.
pub fn remember(history: &mut VecDeque<Transition>, transition: Transition) {
    let is_like = |other: &&Transition| {
        other.reason.is_to_and_fro() && (other.rollout, other.step) == (transition.rollout, transition.step)
    };
    let alike = match transition.reason.is_to_and_fro() {
        true => history.iter().rev().take_while(is_like).count(),
        false => 0,
    };
    history.push_back(transition);
    // The latest half of similar transitions is replaced continuously; the first half stays.
    let begins = history.len() - 1 - alike + MOST_TO_AND_FRO / 2;
    if alike >= MOST_TO_AND_FRO
        && let Some(gone) = history.remove(begins)
        && let Some(next) = history.get_mut(begins)
    {
        next.left_out += gone.left_out + 1;
    }
    let too_many = history.len().saturating_sub(MOST);
    history.drain(..too_many);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transition(time: Millis, reason: Reason) -> Transition {
        let (message, phase) = (String::new(), Phase::Progressing);
        let (from, target) = (None, None);
        Transition { time, rollout: 1, phase, reason, message, step: Some(0), from, target, by: None, left_out: 0 }
    }

    #[test]
    fn endpoints_that_come_and_go_all_day_leave_room_for_everything_else() {
        let mut history = VecDeque::new();
        remember(&mut history, transition(0, Reason::Started));
        for time in 0..500 {
            remember(&mut history, transition(2 * time + 1, Reason::EndpointsLost));
            remember(&mut history, transition(2 * time + 2, Reason::EndpointsBack));
        }
        remember(&mut history, transition(1_001, Reason::StepStarted));
        let times: Vec<_> = history.iter().map(|transition| transition.time).collect();
        assert_eq!(times, [0, 1, 2, 3, 4, 5, 6, 995, 996, 997, 998, 999, 1_000, 1_001]);
        let left_out: Vec<_> = history.iter().map(|transition| transition.left_out).collect();
        assert_eq!(left_out, [0, 0, 0, 0, 0, 0, 0, 988, 0, 0, 0, 0, 0, 0]);
    }
}
