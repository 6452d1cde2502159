//! What fixed thresholds say of the same traffic, all requests of the target counted, as a service mesh's metrics do:
//!
//! - Flagger, as its documentation configures a canary: `interval: 1m`, `request-success-rate` with `min: 99` over
//!   `1m`; rollback after `threshold: 5` failed checks. Beside it, what its first failed check says, which stops the
//!   rollout.
//! - An Argo Rollouts analysis: every 30 s, the success rate of the last 30 s must be 0.98 at least; `failureLimit` 0,
//!   its default: the first failed measurement takes the target back.
//!
//! A window without a request of the target says nothing.

const FLAGGER: (usize, f64, u32) = (60, 0.01, 5);
const ARGO: (usize, f64) = (30, 0.02);

/// The three of them.
#[derive(Clone, Default)]
pub struct Thresholds {
    /// Requests and errors of the target in each of the last seconds.
    seconds: Vec<(u64, u64)>,
    failed_checks: u32,
    /// When the first check of the Flagger-like one failed, when it took the target back, and when the Argo-like one did.
    pub first_check: Option<f64>,
    pub flagger: Option<f64>,
    pub argo: Option<f64>,
}

impl Thresholds {
    /// One second more, in which the target had so many requests and errors.
    pub fn second(&mut self, requests: u64, errors: u64) {
        self.seconds.push((requests, errors));
        let now = self.seconds.len();
        let is_bad = |window: usize, most: f64| {
            let (requests, errors) = self.seconds[now.saturating_sub(window)..]
                .iter()
                .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            now.is_multiple_of(window) && requests > 0 && errors as f64 > most * requests as f64
        };
        let (of_flagger, of_argo) = (is_bad(FLAGGER.0, FLAGGER.1), is_bad(ARGO.0, ARGO.1));
        let at = Some(now as f64);
        if of_flagger {
            self.failed_checks += 1;
            self.first_check = self.first_check.or(at);
            if self.failed_checks >= FLAGGER.2 {
                self.flagger = self.flagger.or(at);
            }
        }
        if of_argo {
            self.argo = self.argo.or(at);
        }
    }
}
