//! Plausibility checks for reports. A proxy, or anything that holds a proxy's token, can speak for itself only. A
//! report whose sequence number leaps is ignored. A revision that was never published and a veto that no guard can
//! issue are ignored, and the rest of the report is used.

use crate::clock::Millis;
use crate::metrics::Claim;
use crate::reconciler::ledger::{Ledger, RunKey, started};
use tideshift_core::counts::Counts;
use tideshift_core::protocol::policy::Service;
use tideshift_core::protocol::report::{Report, ServiceReport};

/// A proxy sends at most five reports a second; twice that is allowed.
const REPORTS_PER_SECOND: u64 = 10;
/// The additional burst, for clock differences and for times that are noted late.
const REPORTS_AT_ONCE: u64 = 100;
/// How far the clock of an unknown run may be ahead.
const CLOCK: Millis = 3_600_000;
/// The furthest that a plausible revision is ahead of the persisted one.
const MAX_AHEAD: u64 = 1 << 32;
/// How many times in a row reports may advance the revision; one more is allowed after each [`ADVANCE_EVERY`].
const ADVANCES: u64 = 3;
const ADVANCE_EVERY: Millis = 60_000;

/// The ignored claim, and why it was ignored.
pub type Ignored = (Claim, String);

/// Checks a report's sequence number: it must not be so far ahead that the proxy's own reports would seem old.
pub(super) fn sequence(ledger: &Ledger, run: &RunKey, report: &Report, now: Millis) -> Result<(), Ignored> {
    let (last, since) = match ledger.last_report(run) {
        Some((last, at)) => (last, now.saturating_sub(at)),
        None => (0, now.saturating_sub(started(&run.1).unwrap_or_default()).saturating_add(CLOCK)),
    };
    let most = last.saturating_add(since.saturating_mul(REPORTS_PER_SECOND) / 1_000).saturating_add(REPORTS_AT_ONCE);
    match report.sequence <= most {
        true => Ok(()),
        false => {
            let sequence = report.sequence;
            Err((Claim::Sequence, format!("sequence {sequence} after {last}: it can be {most} at most by now")))
        }
    }
}

/// Removes from a report the vetoes that no guard can have issued.
pub(super) fn vetoes(report: &mut Report, services: &[Service], now: Millis) -> Vec<Ignored> {
    let mut ignored = Vec::new();
    for of in report.services.iter_mut().filter(|of| !of.vetoes.is_empty()) {
        let Some(service) = services.iter().find(|service| service.name == of.name) else {
            // The service has just left the policy or just been added to it.
            of.vetoes.clear();
            continue;
        };
        let vetoes = std::mem::take(&mut of.vetoes);
        of.vetoes = vetoes
            .into_iter()
            .filter(|veto| {
                let (own, others) = counted(of, &veto.version);
                let stable = service.stable.as_deref() == Some(veto.version.as_str());
                let now = now.saturating_mul(1_000_000);
                let Some(why) = veto.impossible(&service.guard, stable, &own, &others, now) else { return true };
                ignored.push((Claim::Veto, format!("veto on {} {}: {why}", of.name, veto.version)));
                false
            })
            .collect();
    }
    ignored
}

/// The counts that a proxy reports for a version, and for the other versions.
fn counted(service: &ServiceReport, version: &str) -> (Counts, Counts) {
    let sum = |own: bool| {
        let versions = service.versions.iter().filter(|of| (of.name == version) == own);
        versions.fold(Counts::default(), |sum, of| sum + of.ended)
    };
    (sum(true), sum(false))
}

/// Limits how often reports may advance the revision: only after a start from persisted state, which may be an older
/// copy. Each advance publishes and persists everything again.
#[derive(Debug, Default)]
pub(super) struct Advances {
    was_restored: bool,
    /// The times of the latest advances.
    last: Vec<Millis>,
}

impl Advances {
    /// `was_restored`: whether there is a persisted revision, which may be an older copy.
    pub(super) fn new(was_restored: bool) -> Self {
        Self { was_restored, last: Vec::new() }
    }

    /// Checks the first revision that a proxy reports, if it is newer than the persisted one.
    pub(super) fn allow(&mut self, kept: u64, revision: u64, now: Millis) -> Result<(), Ignored> {
        self.last.retain(|at| now.saturating_sub(*at) < ADVANCE_EVERY * ADVANCES);
        let why = match () {
            () if !self.was_restored => "this state began with this process",
            () if revision - kept > MAX_AHEAD => "that many were never published",
            () if self.last.len() as u64 >= ADVANCES => "proxies have brought it forward too often; it is tried again",
            () => {
                self.last.push(now);
                return Ok(());
            }
        };
        Err((Claim::Revision, format!("revision {revision}, where {kept} was the last: {why}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(sequence: u64) -> Report {
        let versions =
            vec![tideshift_core::protocol::report::VersionReport { name: "v1".to_owned(), ..Default::default() }];
        let service = ServiceReport { name: "shop".to_owned(), versions, ..ServiceReport::default() };
        Report { proxy: "p".to_owned(), start: "a".to_owned(), sequence, services: vec![service], ..Report::default() }
    }

    #[test]
    fn a_forged_number_silences_a_proxy_for_seconds_at_most() {
        let run: RunKey = ("p".to_owned(), "a".to_owned());
        let (mut ledger, mut now) = (Ledger::default(), 1_000_000);
        let say = |ledger: &mut Ledger, number: u64, now: Millis| {
            let report = report(number);
            sequence(ledger, &run, &report, now).is_ok()
                && ledger.take(&run, &report, |_, _| true, now) != crate::reconciler::ledger::Taken::Old
        };
        assert!(say(&mut ledger, 1, now));
        assert!(!say(&mut ledger, u64::MAX, now), "a leap");
        assert!(!say(&mut ledger, 1 << 40, now), "a leap");
        assert!(say(&mut ledger, 2, now), "the proxy itself goes on");
        // A number that is accepted must be one that the proxy reaches soon.
        assert!(say(&mut ledger, 2 + REPORTS_AT_ONCE, now));
        // After an hour without controller or connection: the proxy meanwhile sends five reports a second.
        now += 3_600_000;
        assert!(say(&mut ledger, 2 + 5 * 3_600, now));
    }

    #[test]
    fn a_veto_that_no_guard_issues_is_left_out_and_the_rest_of_the_report_stays() {
        use serde_json::json;
        let policy = json!({"revision": 1, "services": [{"name": "shop", "stable": "v1",
            "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}]}]});
        let policy = tideshift_core::protocol::policy::Policy::read(&policy).unwrap();
        let veto = |version: &str, errors: u64| {
            json!({"version": version, "until": 1_010_000_000_000_u64, "strikes": 1, "requests": errors, "errors": errors,
                "othersRequests": 70, "othersErrors": 0})
        };
        let with = |veto: serde_json::Value| {
            let report = json!({"proxy": "p", "start": "a", "revision": 1, "services": [{"name": "shop", "vetoes": [veto],
                "versions": [{"name": "v1", "ok": 90, "error": 0, "clientError": 0, "cancelled": 0},
                    {"name": "v2", "ok": 0, "error": 8, "clientError": 0, "cancelled": 0}]}]});
            let mut report: Report = serde_json::from_value(report).unwrap();
            let ignored = vetoes(&mut report, &policy.services, 1_000_000);
            (report.services[0].vetoes.len(), ignored)
        };
        assert_eq!(with(veto("v2", 8)), (1, vec![]));
        for (version, errors) in [("v2", 9), ("v2", 1_000), ("v2", 4), ("v1", 8)] {
            let (left, ignored) = with(veto(version, errors));
            assert!(left == 0 && matches!(ignored.as_slice(), [(Claim::Veto, _)]), "{version} {errors}: {ignored:?}");
        }
    }

    #[test]
    fn the_revision_goes_forward_a_few_times_and_only_from_kept_state() {
        let mut fresh = Advances::new(false);
        assert!(fresh.allow(1, 2, 0).is_err());
        let mut restored = Advances::new(true);
        assert!(restored.allow(5, 5 + MAX_AHEAD + 1, 0).is_err());
        let allowed = (0..50).filter(|i| restored.allow(5, 6 + i, 1_000 * i).is_ok()).count();
        assert_eq!(allowed, 3, "of 50 forged ones in 50 s");
        assert!(restored.allow(5, 6, ADVANCE_EVERY * ADVANCES).is_ok(), "later it goes on");
    }
}
