//! When probe results change an endpoint's readiness: a number of consecutive successes makes it ready, a number of
//! consecutive failures makes it not ready, as in the kubelet. Pure logic: other modules run the probes.

use tideshift_core::shift::probe::Probe;

/// The readiness of one endpoint, and how far its latest results have come towards changing it.
#[derive(Debug, Clone)]
pub struct Threshold {
    success: u32,
    failure: u32,
    ready: bool,
    /// The latest result, and how many equal results came in a row.
    run: (bool, u32),
}

impl Threshold {
    /// The state before the first result; `ready` is the previously known readiness, `false` if there is none.
    pub fn new(probe: &Probe, ready: bool) -> Self {
        Self { success: probe.success_threshold, failure: probe.failure_threshold, ready, run: (ready, 0) }
    }

    /// Adds the next result. Returns the readiness after it.
    pub fn observe(&mut self, success: bool) -> bool {
        let before = if self.run.0 == success { self.run.1 } else { 0 };
        self.run = (success, before.saturating_add(1));
        if self.run.1 >= if success { self.success } else { self.failure } {
            self.ready = success;
        }
        self.ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;
    use tideshift_core::shift::probe::Check;

    fn threshold(success: u32, failure: u32, ready: bool) -> Threshold {
        let probe = Probe {
            check: Check::TcpSocket { host: None, port: None },
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            success_threshold: success,
            failure_threshold: failure,
        };
        Threshold::new(&probe, ready)
    }

    fn observe(threshold: &mut Threshold, results: &str) -> String {
        results.chars().map(|result| if threshold.observe(result == '+') { 'R' } else { '.' }).collect()
    }

    #[test]
    fn one_success_makes_ready_and_three_failures_take_it_back() {
        assert_eq!(observe(&mut threshold(1, 3, false), "--+--+---+"), "..RRRRRR.R");
    }

    #[test]
    fn a_failure_in_between_starts_the_successes_anew() {
        assert_eq!(observe(&mut threshold(3, 1, false), "++-++++-"), ".....RR.");
    }

    #[test]
    fn what_was_ready_before_stays_so_until_enough_failures() {
        assert_eq!(observe(&mut threshold(1, 3, true), "--+---"), "RRRRR.");
    }

    proptest! {
        /// The definition itself, on the whole history: readiness changes at a result exactly when the last `threshold`
        /// results are all equal to it.
        #[test]
        fn readiness_follows_the_last_results(
            (success, failure) in (1u32..6, 1u32..6),
            ready in any::<bool>(),
            results in prop::collection::vec(any::<bool>(), 0..60),
        ) {
            let mut threshold = threshold(success, failure, ready);
            let mut expected = ready;
            for n in 1..=results.len() {
                let latest = results[n - 1];
                let needed = if latest { success } else { failure } as usize;
                let run = results[..n].iter().rev().take_while(|result| **result == latest).count();
                if run >= needed {
                    expected = latest;
                }
                prop_assert_eq!(threshold.observe(latest), expected);
            }
        }
    }
}
