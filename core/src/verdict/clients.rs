//! The test by clients: "more clients have bad requests at the target than at the stable version". Evidence from single
//! requests, within [limits](crate::evidence::clients) that keep one client from deciding a verdict.

use crate::evidence::clients::{Limits, MOST_CLIENTS, Request};
use crate::evidence::{RATIOS, bits, log_mean_exp};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// After this many milliseconds evidence is also gathered from a new start, …
const WINDOW_MILLIS: u64 = 60_000;
/// … for this many most recent windows.
const WINDOWS: usize = 2;
/// The weight of the evidence since the rollout began; the windows share the rest.
const WHOLE_PART: f64 = 0.75;
/// The maximum number of clients that are persisted across a restart: those that contributed most.
const MOST_KEPT: usize = 32;

/// The evidence from one kind of bad requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Clients {
    whole: Run,
    /// The recent windows, oldest first.
    windows: VecDeque<Window>,
    /// The number of windows so far.
    count: u64,
    /// Milliseconds since the step began.
    clock: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Window {
    /// The logarithm of its weight in the total.
    part: f64,
    run: Run,
}

/// Evidence since the start of a window.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "KeptRun", into = "KeptRun")]
struct Run {
    /// The log-evidence for each ratio.
    sums: [f64; RATIOS.len()],
    limits: Limits<{ RATIOS.len() }>,
}

/// The part of a window that survives a restart.
#[derive(Serialize, Deserialize)]
struct KeptRun {
    #[serde(with = "bits")]
    sums: Vec<f64>,
    clients: Vec<(u32, Vec<f64>)>,
    users: BTreeSet<u32>,
}

impl From<Run> for KeptRun {
    fn from(run: Run) -> Self {
        let clients = run.limits.added_most(MOST_KEPT).map(|(id, added)| (id, added.to_vec())).collect();
        let users = run.limits.users().take(MOST_KEPT * 8).collect();
        Self { sums: run.sums.to_vec(), clients, users }
    }
}

impl From<KeptRun> for Run {
    fn from(kept: KeptRun) -> Self {
        let each = |numbers: &[f64]| std::array::from_fn(|i| numbers.get(i).copied().unwrap_or_default());
        let clients = kept.clients.iter().map(|(id, added)| (*id, each(added)));
        Self { sums: each(&kept.sums), limits: Limits::of(clients, kept.users) }
    }
}

impl Clients {
    /// Advances the time.
    pub(super) fn pass(&mut self, millis: u64) {
        self.clock = self.clock.saturating_add(millis);
        if self.clock / WINDOW_MILLIS <= self.count {
            return;
        }
        self.count += 1;
        // Over n ≥ 1, 1/(n(n + 1)) adds up to 1.
        let count = self.count as f64;
        let part = libm::log((1.0 - WHOLE_PART) / (count * (count + 1.0)));
        self.windows.push_back(Window { part, run: Run::default() });
        if self.windows.len() > WINDOWS {
            self.windows.pop_front();
        }
    }

    /// Adds a bad request. `share`: the probability that it belongs to the target; `few`: whether there are only a few
    /// clients; `cap`: the maximum that one client contributes, as a logarithm.
    pub(super) fn add(&mut self, request: &Request, share: f64, few: bool, cap: f64) {
        let clock = self.clock;
        let runs = std::iter::once(&mut self.whole).chain(self.windows.iter_mut().map(|window| &mut window.run));
        runs.for_each(|run| run.add(request, share, few, cap, clock));
    }

    /// The logarithm of the evidence.
    pub(super) fn log(&self) -> f64 {
        let whole = self.whole.log() + libm::log(WHOLE_PART);
        let windows = self.windows.iter().map(|window| window.run.log() + window.part);
        let logs: Vec<f64> = std::iter::once(whole).chain(windows).collect();
        log_mean_exp(&logs) + libm::log(logs.len() as f64)
    }
}

impl Run {
    fn add(&mut self, request: &Request, share: f64, few: bool, cap: f64, now: u64) {
        if let Some(gains) = self.limits.gains(request, &RATIOS, share, few, cap, now) {
            self.sums.iter_mut().zip(gains).for_each(|(sum, gain)| *sum += gain);
        }
    }

    /// Without the client that contributed most.
    fn log(&self) -> f64 {
        let most = self.limits.most_added();
        let mut sums = self.sums;
        sums.iter_mut().zip(most).for_each(|(sum, most)| *sum -= most);
        log_mean_exp(&sums)
    }
}

/// Limits how much of each client counts in the sample of all requests, so that no single client decides.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Fair {
    clients: BTreeMap<(bool, u32), (u64, u64)>,
    /// Requests and errors of the stable version and of the target.
    all: [(u64, u64); 2],
}

impl Fair {
    /// Of the counted requests of a version, at most one in this many is from the same client, except for the first
    /// few.
    const ONE_IN: u64 = 4;
    /// The first few requests, and errors.
    const FIRST: (u64, u64) = (10, 2);

    /// Adds a request that failed or not. Returns whether it counts.
    pub(super) fn counts(&mut self, request: &Request, failed: bool) -> bool {
        let key = (request.is_target, request.client);
        if !self.clients.contains_key(&key) && self.clients.len() >= MOST_CLIENTS {
            return false;
        }
        let (requests, errors) = self.clients.entry(key).or_default();
        let [stable, target] = &mut self.all;
        let all = if request.is_target { target } else { stable };
        let is_within = |own: u64, first: u64, all: u64| own < first.saturating_add(all / Self::ONE_IN);
        if !is_within(*requests, Self::FIRST.0, all.0) || failed && !is_within(*errors, Self::FIRST.1, all.1) {
            return false;
        }
        for (count, more) in
            [(requests, 1), (errors, u64::from(failed)), (&mut all.0, 1), (&mut all.1, u64::from(failed))]
        {
            *count = count.saturating_add(more);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Outcome;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const CAP: f64 = 3.0;

    fn bad(client: u32, is_target: bool) -> Request {
        Request { client, is_target, outcome: Outcome::Error, ..Request::default() }
    }

    fn of_user(user: u32, client: u32) -> Request {
        Request { user: Some(user), is_session: true, ..bad(client, true) }
    }

    #[test]
    fn several_clients_are_evidence_soon() {
        let mut clients = Clients::default();
        (0..8).for_each(|client| clients.add(&bad(client, true), 0.1, false, CAP));
        assert!(clients.log() > libm::log(10_000.0), "{}", clients.log());
    }

    /// One client with arbitrary behaviour for ten minutes, even if it knows where its requests go.
    #[test]
    fn one_client_adds_no_more_than_its_cap() {
        for share in [0.001, 0.1, 0.5, 0.9] {
            for pattern in [[true; 4], [true, false, true, true], [false, true, true, true], [false, false, true, true]]
            {
                let mut clients = Clients::default();
                let mut most = f64::MIN;
                for i in 0..20_000 {
                    clients.pass(30);
                    clients.add(&bad(7, pattern[i / 1_000 % 4]), share, false, CAP);
                    most = most.max(clients.log());
                }
                assert!(most <= CAP, "{share} {pattern:?}: {most}");
            }
        }
    }

    /// The client fails only at the stable version, every two seconds; each minute twenty others fail at the target.
    #[test]
    fn one_client_does_not_hide_a_bad_target() {
        for share in [0.1, 0.5] {
            let mut clients = Clients::default();
            for i in 0..6_000u32 {
                clients.pass(100);
                if i.is_multiple_of(20) {
                    clients.add(&bad(7, false), share, false, CAP);
                }
                if i.is_multiple_of(30) {
                    clients.add(&bad(100 + i / 30 % 20, true), share, false, CAP);
                }
            }
            assert!(clients.log() > libm::log(8_000.0), "{share}: {}", clients.log());
        }
    }

    /// Others have occasional errors; the client's contribution changes nothing.
    #[test]
    fn one_client_changes_no_evidence_of_others() {
        for share in [0.01, 0.1, 0.5, 0.9] {
            let (mut with, mut without) = (Clients::default(), Clients::default());
            for i in 0..3_000u32 {
                if i.is_multiple_of(100) {
                    let other = bad(100 + i, i.is_multiple_of(1_000));
                    with.add(&other, share, false, CAP);
                    without.add(&other, share, false, CAP);
                }
                with.add(&bad(7, true), share, false, CAP);
                with.pass(100);
                without.pass(100);
                let most = without.whole.sums.iter().zip(&with.whole.sums).map(|(without, with)| with - without);
                let left_out = with.whole.limits.most_added();
                assert!(most.zip(left_out).all(|(more, left_out)| more <= left_out + 1e-9), "{share}");
            }
        }
    }

    #[test]
    fn repetitions_are_one() {
        let (mut once, mut often) = (Clients::default(), Clients::default());
        once.add(&bad(1, true), 0.1, false, CAP);
        for _ in 0..10 {
            often.add(&bad(1, true), 0.1, false, CAP);
            often.pass(100);
        }
        assert_eq!(once.log(), often.log());
    }

    #[test]
    fn a_user_counts_once_whatever_the_address() {
        for few in [false, true] {
            let (mut once, mut often) = (Clients::default(), Clients::default());
            once.add(&of_user(1, 1), 0.1, few, CAP);
            (0..50).for_each(|client| often.add(&of_user(1, client), 0.1, few, CAP));
            assert_eq!(once.log(), often.log());
        }
        let mut users = Clients::default();
        (0..8).for_each(|user| users.add(&of_user(user, 9), 0.1, true, CAP));
        assert!(users.log() > libm::log(10_000.0), "many users behind one address: {}", users.log());
    }

    /// A target that starts to fail after an hour in which each client had occasional errors is still detected.
    #[test]
    fn evidence_also_starts_again() {
        let mut clients = Clients::default();
        for i in 0..36_000u32 {
            clients.pass(100);
            clients.add(&bad(i * 7 % 50, i.is_multiple_of(20)), 0.1, false, CAP);
        }
        assert!(clients.log() < 3.0, "{}", clients.log());
        for i in 0..60u32 {
            clients.pass(100);
            clients.add(&bad(i * 7 % 50, true), 0.1, false, CAP);
        }
        assert!(clients.log() > libm::log(2_000.0), "{}", clients.log());
    }

    /// More clients than can be told apart had errors at the stable version.
    #[test]
    fn new_clients_count_after_many_others() {
        let mut clients = Clients::default();
        for i in 0..20_000u32 {
            clients.pass(2);
            clients.add(&bad(i, false), 0.1, false, CAP);
        }
        let before = clients.whole.sums;
        clients.pass(3_000);
        (20_000..20_010).for_each(|client| clients.add(&bad(client, true), 0.1, false, CAP));
        assert!(clients.whole.sums.iter().zip(before).all(|(sum, before)| *sum > before));
    }

    #[test]
    fn what_is_kept_says_the_same() {
        let mut clients = Clients::default();
        for client in 0..40 {
            clients.pass(3_000);
            clients.add(&bad(client, client % 3 == 0), 0.2, false, CAP);
        }
        let text = serde_json::to_string(&clients).unwrap();
        let again: Clients = serde_json::from_str(&text).unwrap();
        assert_eq!(clients.log().to_bits(), again.log().to_bits());
    }

    #[test]
    fn no_client_makes_more_than_a_quarter() {
        let mut fair = Fair::default();
        let failed = (0..1_000).filter(|_| fair.counts(&bad(1, true), true)).count();
        assert_eq!(failed, 2);
        for client in 2..200 {
            assert!(fair.counts(&bad(client, true), false));
        }
        let more = (0..1_000).filter(|_| fair.counts(&bad(1, true), false)).count();
        assert!(more <= 202 / 3 + 15, "{more} of 200 by others");
    }
}
