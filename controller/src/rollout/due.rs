//! When a rollout is due although nothing but the time has changed.

use super::measured::{Begun, USUAL};
use super::{Rollout, Warming};
use crate::clock::Millis;
use tideshift_core::shift::TrafficShift;

impl Rollout {
    /// When time alone next changes a state that [`Self::advance`] has produced; `None`: never.
    pub fn next_due(&self, shift: &TrafficShift, now: Millis) -> Option<Millis> {
        if !self.phase.is_under_way() {
            return None;
        }
        let millis = |duration: std::time::Duration| duration.as_millis() as Millis;
        let strategy = &shift.strategy;
        let ramp = millis(strategy.warm_up.seconds);
        let stuck =
            self.unblocked_since.is_none().then(|| self.progressed.saturating_add(millis(strategy.progress_deadline)));
        let unmeasured = self.unmeasured_since.map(|since| since + USUAL + 1);
        let held = self.held_since.map(|since| since.saturating_add(millis(self.present(shift).hold)));
        // The message counts the remaining seconds.
        let next_second = |since: Millis| since + (now.saturating_sub(since) / 1_000 + 1) * 1_000;
        let copies = match self.warming {
            Warming::Since(since) => Some(since.saturating_add(ramp).min(next_second(since))),
            _ => None,
        };
        let grows = (ramp > 0 && !self.goes_back(shift)).then(|| self.level_since + 1_000);
        let mended = self.begun.values().map(Begun::mended);
        let all = [stuck, unmeasured, held, copies, grows].into_iter().flatten().chain(mended);
        all.filter(|due| *due > now).min()
    }
}
