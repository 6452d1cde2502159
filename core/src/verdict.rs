//! The verdict on a rollout, from the counts of all proxies: `pass`, `fail` or `undecided` for the target version.
//!
//! Sequential tests, valid however often they are evaluated. Guarantees and limits: `docs/verdict.md`; assumptions,
//! proof and tables: `docs/verdict-proof.md`. The rollout engine decides what follows from a verdict; it also counts
//! the target's errors against `maxErrors`.

mod absolute;
mod baseline;
mod clients;
mod judgement;
mod relative;
mod settings;
mod slowness;

pub use crate::evidence::clients::Request;
use crate::outcome::Outcome as RequestOutcome;
pub use baseline::RollingBaseline;
pub use judgement::{At, Ground, Judgement, LatencyJudgement, Outcome, Totals};
pub use settings::{DEFAULT_MAX_ERROR_RATE, Latency, Settings};

use crate::evidence::{log_mean_exp, tilt};
use absolute::Absolute;
use clients::{Clients, Fair};
use relative::Relative;
use serde::{Deserialize, Serialize};
use slowness::Slowness;
use std::time::Duration;

/// This many bad requests with a common cause count as one.
const CLUMP: f64 = 10.0;
/// After this many requests in a step, the target's observed share is trusted.
const ENOUGH_FOR_SHARE: u64 = 1_000;
/// The multiples of the odds of `maxErrorRate` that the test for `pass` bets on.
const PASS_ODDS: [f64; 3] = [1.0 / 30.0, 1.0 / 8.0, 1.0 / 3.0];
/// Evidence is capped here: more makes no difference, and JSON has no infinity.
const MOST_EVIDENCE: f64 = 1e15;
/// The fraction of α for errors; the other kinds share the rest.
const ERRORS_PART: f64 = 0.5;
/// A client contributes at most the logarithm of the bound divided by this, and the largest contribution does not
/// count: a target fails on no fewer than four clients.
const CLIENTS_PER_FAIL: f64 = 2.0;
/// The target does not pass while this fraction of its requests is rejected or abandoned, …
const MOST_REFUSED: f64 = 0.2;
/// … and it is this many times the stable version's fraction, …
const REFUSED_TIMES: f64 = 3.0;
/// … once there are this many.
const ENOUGH_FOR_REFUSED: u64 = 10;
/// For this many milliseconds after the target's share was lowered, requests that end may have been dealt at the old
/// share.
const SHARE_MILLIS: u64 = 600_000;

/// The counts of one version over some time, at all proxies. They cover requests whose version was dealt by weight,
/// except in [`RollingBaseline`], which covers all requests that no rule matched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// Requests that were answered.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Those that the version rejected because of the client's request.
    #[serde(default)]
    pub client_errors: u64,
    /// Requests that the client cancelled, in addition to those above.
    #[serde(default)]
    pub cancelled: u64,
    /// Requests that began in that time; 0 if unknown.
    #[serde(default)]
    pub started: u64,
    /// The number of requests by duration, as in [`crate::protocol::report::VersionReport::durations`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub durations: Vec<u64>,
    /// How long clients waited before they cancelled, in the same form.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waited: Vec<u64>,
}

impl Sample {
    fn totals(&self) -> Totals {
        Totals { requests: self.requests, errors: self.errors.min(self.requests) }
    }

    /// The bad requests of one kind, and all requests that are evidence about that kind.
    fn of_kind(&self, kind: Kind) -> Totals {
        let (requests, bad) = match kind {
            Kind::Errors => (self.requests, self.errors),
            Kind::ClientErrors => (self.requests.saturating_sub(self.errors), self.client_errors),
            Kind::Cancelled => (self.requests.saturating_add(self.cancelled), self.cancelled),
        };
        Totals { requests, errors: bad.min(requests) }
    }

    /// The requests that were rejected or cancelled.
    fn refused(&self) -> Totals {
        let requests = self.requests.saturating_add(self.cancelled);
        Totals { requests, errors: self.client_errors.saturating_add(self.cancelled).min(requests) }
    }

    /// Adds later counts.
    fn add(&mut self, later: &Self) {
        let Self { requests, errors, client_errors, cancelled, started, durations, waited } = later;
        for (sum, more) in [
            (&mut self.requests, requests),
            (&mut self.errors, errors),
            (&mut self.client_errors, client_errors),
            (&mut self.cancelled, cancelled),
            (&mut self.started, started),
        ] {
            *sum = sum.saturating_add(*more);
        }
        for (sums, more) in [(&mut self.durations, durations), (&mut self.waited, waited)] {
            sums.resize(sums.len().max(more.len()), 0);
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
        }
    }
}

/// The events since the last tick. A tick is due when reports have arrived, at least 0.1 s and at most about 1 s after
/// the previous one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tick {
    /// The elapsed time; capped at 1 s.
    pub elapsed: Duration,
    /// The target's current fraction, 0 to 1, of the combined weight of target and stable version.
    pub share: f64,
    /// Whether there are so few clients that a malicious one cannot be told from the others.
    pub few_clients: bool,
    /// The counts of the target.
    pub target: Sample,
    /// The counts of the stable version.
    pub stable: Sample,
    /// Single requests.
    pub requests: Vec<Request>,
}

/// The comparisons of two versions, other than of durations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Errors,
    ClientErrors,
    Cancelled,
}

impl Kind {
    fn is(self, outcome: RequestOutcome) -> bool {
        match self {
            Self::Errors => outcome == RequestOutcome::Error,
            Self::ClientErrors => outcome == RequestOutcome::ClientError,
            Self::Cancelled => outcome == RequestOutcome::Cancelled,
        }
    }
}

/// The requests of both versions that ended in one period.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Batch {
    target: Totals,
    stable: Totals,
    /// The requests of target and stable version that began in the same period; 0 if unknown.
    #[serde(default)]
    started: (u64, u64),
    millis: u64,
}

impl Batch {
    fn add(&mut self, more: &Self) {
        self.target.add(more.target);
        self.stable.add(more.stable);
        self.started.0 = self.started.0.saturating_add(more.started.0);
        self.started.1 = self.started.1.saturating_add(more.started.1);
        self.millis = self.millis.saturating_add(more.millis);
    }

    /// Counts one request.
    fn count(&mut self, request: &Request, is_bad: bool) {
        let totals = if request.is_target { &mut self.target } else { &mut self.stable };
        totals.add(Totals { requests: 1, errors: u64::from(is_bad) });
    }

    fn all(&self) -> f64 {
        self.target.requests as f64 + self.stable.requests as f64
    }

    /// The target's fraction of the requests that ended, 1 if there are none.
    fn share(&self) -> f64 {
        if self.all() > 0.0 { self.target.requests as f64 / self.all() } else { 1.0 }
    }

    /// The probability that a bad request belongs to the target if that is no worse: the larger of its fractions of the
    /// requests that ended and of those that began, since a new target has only had early ends.
    fn chance(&self) -> f64 {
        let (target, stable) = (self.started.0 as f64, self.started.1 as f64);
        let began = if target + stable > 0.0 { target / (target + stable) } else { 0.0 };
        self.share().max(began)
    }

    fn seconds(&self) -> f64 {
        self.millis as f64 / 1e3
    }
}

/// The largest share at which requests that end now may have been dealt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Share {
    /// In the current step, in millionths.
    now: u32,
    /// Before that step, and for how many more milliseconds that applies.
    before: (u32, u64),
}

impl Share {
    fn step_started(&mut self) {
        self.before = (self.largest(), SHARE_MILLIS);
        self.now = 0;
    }

    fn add(&mut self, share: f64, millis: u64) -> f64 {
        self.now = self.now.max((share * 1e6).ceil() as u32);
        self.before.1 = self.before.1.saturating_sub(millis);
        f64::from(self.largest()) / 1e6
    }

    fn largest(&self) -> u32 {
        if self.before.1 > 0 { self.now.max(self.before.0) } else { self.now }
    }
}

/// The evidence of one kind: from requests and from clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Comparison {
    requests: Relative,
    clients: Clients,
    /// The counts since the rollout began.
    all: Batch,
}

impl Default for Comparison {
    fn default() -> Self {
        Self { requests: Relative::new(), clients: Clients::default(), all: Batch::default() }
    }
}

/// The analysis of a rollout, which survives a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Analysis {
    /// Since the rollout began.
    all: Batch,
    /// Since the step began.
    step: Batch,
    /// The part of the step that counts for a pass: no client counts more than others.
    #[serde(default)]
    fair_step: Batch,
    /// The requests of the step that were rejected or cancelled, counted in the same way.
    #[serde(default)]
    refused_step: Batch,
    /// The recent requests of the stable version.
    recent: RollingBaseline,
    /// Evidence from errors, by requests.
    relative: Relative,
    /// Evidence from errors, by clients.
    #[serde(default)]
    clients: Clients,
    #[serde(default)]
    client_errors: Comparison,
    #[serde(default)]
    cancelled: Comparison,
    absolute: Absolute,
    slowness: Slowness,
    #[serde(default)]
    share: Share,
    #[serde(default)]
    few_clients: bool,
    #[serde(skip)]
    fair: Fair,
    #[serde(skip)]
    fairly_refused: Fair,
}

impl Analysis {
    /// The start of a rollout. `baseline`: the earlier requests of the stable version, as far as known.
    pub fn new(baseline: RollingBaseline) -> Self {
        Self {
            all: Batch::default(),
            step: Batch::default(),
            fair_step: Batch::default(),
            refused_step: Batch::default(),
            recent: baseline,
            relative: Relative::new(),
            clients: Clients::default(),
            client_errors: Comparison::default(),
            cancelled: Comparison::default(),
            absolute: Absolute::new(),
            slowness: Slowness::new(),
            share: Share::default(),
            few_clients: false,
            fair: Fair::default(),
            fairly_refused: Fair::default(),
        }
    }

    /// Starts a step: the evidence for a pass restarts, and the bound of slow requests is measured from the stable
    /// version's current durations.
    pub fn step_started(&mut self) {
        self.step = Batch::default();
        self.fair_step = Batch::default();
        self.refused_step = Batch::default();
        (self.fair, self.fairly_refused) = Default::default();
        self.share.step_started();
        self.slowness.thaw();
    }

    /// Adds what ended since the last tick.
    pub fn tick(&mut self, settings: &Settings, tick: &Tick) {
        let millis = u64::try_from(tick.elapsed.as_millis()).unwrap_or(u64::MAX).clamp(1, 1_000);
        let started = (tick.target.started, tick.stable.started);
        let of_kind = |kind| {
            let (target, stable) = (tick.target.of_kind(kind), tick.stable.of_kind(kind));
            Batch { target, stable, started, millis }
        };
        let (ended, recent) = (of_kind(Kind::Errors), self.recent.sample());
        let shares = self.shares(tick.share);
        let largest = self.share.add(shares.1, millis);
        self.few_clients = tick.few_clients;

        // With many clients, requests may come from a malicious one, and are no evidence if other clients later leave.
        let few = tick.few_clients;
        if few {
            self.relative.add(&ended, shares);
        }
        self.clients.pass(millis);
        for (comparison, kind) in
            [(&mut self.client_errors, Kind::ClientErrors), (&mut self.cancelled, Kind::Cancelled)]
        {
            let ended = of_kind(kind);
            comparison.all.add(&ended);
            if few {
                comparison.requests.add(&ended, shares);
            }
            comparison.clients.pass(millis);
        }
        let cap = |part: f64| libm::log(settings.bound() / part) / CLIENTS_PER_FAIL;
        let other = settings.part_of_others();
        let mut fair = if few { ended } else { Batch { started: (0, 0), millis, ..Batch::default() } };
        let mut refused = match few {
            true => Batch { target: tick.target.refused(), stable: tick.stable.refused(), ..Batch::default() },
            false => Batch::default(),
        };
        for request in &tick.requests {
            if Kind::Errors.is(request.outcome) {
                self.clients.add(request, largest, few, cap(ERRORS_PART));
            }
            for (comparison, kind) in
                [(&mut self.client_errors, Kind::ClientErrors), (&mut self.cancelled, Kind::Cancelled)]
            {
                if kind.is(request.outcome) {
                    comparison.clients.add(request, largest, few, cap(other));
                }
            }
            // With a few clients, all dealt requests are counted already.
            if !request.is_sampled || few && !request.is_session {
                continue;
            }
            let failed = request.outcome == RequestOutcome::Error;
            if request.outcome != RequestOutcome::Cancelled && self.fair.counts(request, failed) {
                fair.count(request, failed);
            }
            let is_refused = matches!(request.outcome, RequestOutcome::ClientError | RequestOutcome::Cancelled);
            if self.fairly_refused.counts(request, is_refused) {
                refused.count(request, is_refused);
            }
        }
        self.refused_step.add(&refused);
        let is_even = |fair: &Batch| Batch { started: (0, 0), ..*fair };
        self.absolute.add(settings, recent.totals(), &is_even(&fair), tick.share, shares.1);
        if let Some(latency) = &settings.latency {
            let slow = slowness::News {
                recent: &recent,
                ended: [&tick.target, &tick.stable],
                requests: &tick.requests,
                few,
                share: shares.1,
                largest,
                millis,
                cap: cap(other),
            };
            self.slowness.add(latency, &slow);
        }
        self.all.add(&ended);
        self.step.add(&ended);
        self.fair_step.add(&fair);
        self.recent.add(&tick.stable);
    }

    /// The minimum and maximum fraction of requests expected at the target: by its weight, and by the step so far.
    fn shares(&self, share: f64) -> (f64, f64) {
        let by_weight = if share.is_finite() { share.clamp(0.0, 1.0) } else { 1.0 };
        let measured = if self.step.all() >= ENOUGH_FOR_SHARE as f64 { self.step.share() } else { by_weight };
        (by_weight.min(measured), by_weight.max(measured))
    }

    /// The verdict from all of the evidence.
    pub fn judgement(&self, settings: &Settings) -> Judgement {
        let bound = settings.bound();
        // Evidence from requests is used only if there are too few clients for evidence from clients.
        let few = self.few_clients;
        let log = |requests: f64, clients: f64| if few { log_mean_exp(&[requests, clients]) } else { clients };
        let relative = log(self.relative.log(), self.clients.log());
        let pass_evidence = settings.max_error_rate.map_or(0.0, |most| {
            let Totals { requests, errors } = self.fair_step.target;
            told(log_mean_exp(&PASS_ODDS.map(|odds| tilt(errors as f64, requests as f64, most, odds))))
        });
        let errors = told(log_mean_exp(&[relative, relative, relative, self.absolute.log()]));
        let other = settings.part_of_others();
        let of = |comparison: &Comparison| told(log(comparison.requests.log(), comparison.clients.log()));
        let latency = settings.latency.as_ref().map(|latency| self.slowness.judgement(latency, few, bound / other));
        let mut parts = vec![
            (Ground::Errors, errors * ERRORS_PART),
            (Ground::ClientErrors, of(&self.client_errors) * other),
            (Ground::Cancelled, of(&self.cancelled) * other),
        ];
        parts.extend(latency.as_ref().map(|latency| (Ground::Slowness, latency.evidence * other)));
        let evidence = parts.iter().map(|(_, part)| part).sum::<f64>().min(MOST_EVIDENCE);
        let worst = parts.iter().max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(ground, _)| *ground);
        let mut judgement = Judgement {
            outcome: Outcome::Undecided,
            both_bad: self.absolute.both_bad(bound) && told(relative) * ERRORS_PART < bound,
            target: self.all.target,
            stable: self.all.stable,
            at: None,
            ground: worst.unwrap_or_default(),
            others: [self.client_errors.all, self.cancelled.all].map(|all| (all.target, all.stable)),
            evidence,
            bound,
            max_error_rate: settings.max_error_rate,
            pass_evidence,
            pass_bound: settings.pass_bound(),
            latency,
        };
        judgement.decide(pass_evidence >= judgement.pass_bound && !self.refuses());
        judgement
    }

    /// Whether the target rejects or leaves unanswered so many requests that it must not pass, however few fail. This
    /// is no evidence against it: with sticky sessions a few users may never provide enough.
    fn refuses(&self) -> bool {
        let part = |totals: Totals| totals.errors as f64 / totals.requests.max(1) as f64;
        let Batch { target, stable, .. } = self.refused_step;
        let usual = part(stable).max(part(self.recent.sample().refused()));
        target.requests >= ENOUGH_FOR_REFUSED && part(target) >= MOST_REFUSED.max(REFUSED_TIMES * usual)
    }
}

/// The evidence with this logarithm, as reported.
fn told(log: f64) -> f64 {
    libm::exp(log).min(MOST_EVIDENCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn settings() -> Settings {
        Settings { max_error_rate: Some(0.02), latency: Some(Latency::default()), ..Settings::default() }
    }

    fn sample(requests: u64, errors: u64) -> Sample {
        Sample { requests, errors, ..Sample::default() }
    }

    fn known(sample: Sample) -> RollingBaseline {
        let mut lately = RollingBaseline::default();
        lately.add(&sample);
        lately
    }

    fn tick(share: f64, target: (u64, u64), stable: (u64, u64)) -> Tick {
        let (target, stable) = (sample(target.0, target.1), sample(stable.0, stable.1));
        Tick { elapsed: Duration::from_millis(500), share, few_clients: true, target, stable, ..Tick::default() }
    }

    fn after(settings: &Settings, ticks: &[Tick]) -> Judgement {
        let mut analysis = Analysis::new(RollingBaseline::default());
        ticks.iter().for_each(|tick| analysis.tick(settings, tick));
        analysis.judgement(settings)
    }

    /// The probabilities of 0, 1, 2 … events out of `of`.
    fn chances(of: u64, probability: f64) -> Vec<f64> {
        (0..of).fold(vec![1.0], |chances, _| {
            let mut next: Vec<f64> = chances.iter().map(|chance| chance * (1.0 - probability)).chain([0.0]).collect();
            next.iter_mut().skip(1).zip(&chances).for_each(|(next, chance)| *next += chance * probability);
            next
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

        /// All outcomes of two batches with their probabilities: the target is never worse than the stable version,
        /// whatever rate is allowed.
        #[test]
        fn nothing_speaks_against_a_healthy_target_on_average(
            requests in prop::array::uniform2((1u64..5, 6u64..9)), share in prop::sample::select(vec![0.1, 0.4, 0.9, 1.0]),
            rates in prop::array::uniform2(0.0..0.5), better in 0.0..=1.0, most in prop::sample::select(vec![0.01, 0.5]),
        ) {
            let settings = Settings { max_error_rate: Some(most), ..settings() };
            let [first, second] = [0, 1].map(|i| {
                let ((target, stable), rate) = (requests[i], rates[i]);
                let mut all = Vec::new();
                for (errors, chance) in chances(target, rate * better).into_iter().enumerate() {
                    for (others, other) in chances(stable, rate).into_iter().enumerate() {
                        all.push((tick(share, (target, errors as u64), (stable, others as u64)), chance * other));
                    }
                }
                all
            });
            let mut mean = 0.0;
            for (first, chance) in first {
                let mut analysis = Analysis::new(RollingBaseline::default());
                analysis.tick(&settings, &first);
                for (second, other) in &second {
                    let mut analysis = analysis.clone();
                    analysis.tick(&settings, second);
                    mean += chance * other * analysis.judgement(&settings).evidence;
                }
            }
            prop_assert!(mean <= 1.0 + 1e-9 && mean > 0.1, "{}", mean);
        }

        #[test]
        fn nothing_speaks_for_a_bad_target_on_average(requests in 1u64..60, most in 0.001..0.5, worse in 0.0..=1.0) {
            let settings = Settings { max_error_rate: Some(most), ..settings() };
            let rate = most + worse * (1.0 - most);
            let mean: f64 = chances(requests, rate).into_iter().enumerate().map(|(errors, chance)| {
                chance * after(&settings, &[tick(0.5, (requests, errors as u64), (0, 0))]).pass_evidence
            }).sum();
            prop_assert!(mean <= 1.0 + 1e-9, "{}", mean);
        }

        #[test]
        fn a_restart_changes_nothing_and_numbers_are_numbers(
            ticks in prop::collection::vec(
                (any::<[u64; 5]>(), prop::collection::vec(any::<u64>(), 0..30), any::<f64>(), any::<bool>()), 1..30),
            small in any::<bool>(),
        ) {
            let settings = settings();
            let mut analysis = Analysis::new(known(Sample { requests: u64::MAX, errors: 7, durations: vec![u64::MAX; 40], ..Sample::default() }));
            let mut restarted = analysis.clone();
            let size = |n: u64| if small { n % 100 } else { n };
            for ([elapsed, requests, errors, others, others_errors], durations, share, step) in ticks {
                let durations: Vec<u64> = durations.into_iter().map(size).collect();
                let tick = Tick {
                    elapsed: Duration::from_millis(elapsed),
                    share,
                    few_clients: true,
                    requests: Vec::new(),
                    target: Sample { requests: size(requests), errors: size(errors), durations: durations.clone(), ..Sample::default() },
                    stable: Sample { requests: size(others), errors: size(others_errors), durations, ..Sample::default() },
                };
                for analysis in [&mut analysis, &mut restarted] {
                    analysis.tick(&settings, &tick);
                    if step {
                        analysis.step_started();
                    }
                }
                let json = serde_json::to_string(&restarted).unwrap();
                restarted = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(&restarted, &analysis);
                let judgement = analysis.judgement(&settings);
                let latency = judgement.latency.unwrap();
                for number in [judgement.evidence, judgement.pass_evidence, latency.evidence] {
                    prop_assert!((0.0..=MOST_EVIDENCE).contains(&number), "{}", number);
                }
                prop_assert!(json.len() < 10_000, "{}", json.len());
            }
        }
    }

    #[test]
    fn the_counts_decide() {
        let settings = settings();
        let outcome = |ticks: &[Tick]| after(&settings, ticks).outcome;
        let bad = after(&settings, &[tick(0.1, (5, 5), (45, 0)), tick(0.1, (5, 5), (45, 0))]);
        assert_eq!((bad.outcome, bad.target.errors, bad.stable.requests), (Outcome::Fail, 10, 90));
        assert!(
            bad.in_words("v2", "v1")
                .starts_with("v2 is worse than v1: 10 of 10 failed, v1 0 of 90; by chance in fewer than 1 of "),
            "{}",
            bad.in_words("v2", "v1")
        );
        assert_eq!(outcome(&vec![tick(0.1, (5, 0), (45, 0)); 40]), Outcome::Pass);
        assert_eq!(outcome(&vec![tick(0.1, (5, 0), (45, 0)); 20]), Outcome::Undecided);
        // Without a version to compare with, the allowed rate decides.
        assert_eq!(outcome(&vec![tick(1.0, (50, 50), (0, 0)); 8]), Outcome::Fail);
        let unasked = Settings { max_error_rate: None, ..settings.clone() };
        let judgement = after(&unasked, &vec![tick(0.1, (5, 0), (45, 0)); 40]);
        assert_eq!((judgement.outcome, judgement.pass_evidence), (Outcome::Undecided, 0.0));
    }

    /// Twenty users with sticky sessions are too few to prove anything.
    #[test]
    fn a_target_that_refuses_everything_does_not_pass() {
        let settings = settings();
        let pass = |of_target, of_stable| {
            let mut analysis = Analysis::new(known(sample(1_000, 0)));
            for i in 0..600u32 {
                let request = |user: u32| {
                    let is_target = user < 18;
                    let outcome = if is_target { of_target } else { of_stable };
                    let (client, user) = (user, Some(user));
                    Request { client, user, is_session: true, is_sampled: true, is_target, outcome, duration: 0 }
                };
                let requests = vec![request(i % 18), request(18 + i % 2)];
                analysis.tick(&settings, &Tick { few_clients: false, requests, ..tick(0.9, (0, 0), (0, 0)) });
            }
            analysis.judgement(&settings)
        };
        for refused in [RequestOutcome::ClientError, RequestOutcome::Cancelled] {
            let judgement = pass(refused, RequestOutcome::Ok);
            assert_eq!(judgement.outcome, Outcome::Undecided);
            let words = judgement.in_words("v2", "v1");
            // Cancelled requests count for no pass anyway.
            let is_told = words.contains(", but far more of v2's requests are refused");
            assert_eq!(is_told, refused == RequestOutcome::ClientError, "{words}");
            assert_eq!(pass(RequestOutcome::Ok, refused).outcome, Outcome::Pass, "the stable version's fault");
        }
        assert_eq!(pass(RequestOutcome::ClientError, RequestOutcome::ClientError).outcome, Outcome::Pass, "both alike");
    }

    /// A client that knew how requests are dealt has left, and later most others have.
    #[test]
    fn requests_count_only_while_there_are_few_clients() {
        let settings = settings();
        let mut analysis = Analysis::new(known(sample(1_000, 1)));
        for few_clients in [vec![false; 100], vec![true; 100]].concat() {
            let errors = if few_clients { 0 } else { 20 };
            analysis.tick(&settings, &Tick { few_clients, ..tick(0.1, (25, errors), (45, 0)) });
            assert_ne!(analysis.judgement(&settings).outcome, Outcome::Fail);
        }
    }

    #[test]
    fn without_traffic_of_the_target_nothing_is_ever_decided() {
        let settings = settings();
        for ended in [tick(0.1, (0, 0), (0, 0)), tick(0.1, (0, 0), (100, 0)), tick(0.1, (0, 0), (100, 100))] {
            let mut analysis = Analysis::new(known(sample(1_000, 1)));
            for _ in 0..2_000 {
                analysis.tick(&settings, &ended);
                let judgement = analysis.judgement(&settings);
                assert_eq!((judgement.outcome, judgement.both_bad), (Outcome::Undecided, false), "{ended:?}");
            }
        }
    }

    #[test]
    fn where_both_are_bad_nobody_is_to_blame() {
        let settings = settings();
        let both = after(&settings, &vec![tick(0.1, (5, 5), (45, 45)); 20]);
        assert_eq!((both.outcome, both.both_bad), (Outcome::Undecided, true));
        // Nor does it pass, however well it did before.
        let mut ticks = vec![tick(0.1, (5, 0), (45, 0)); 100];
        ticks.extend(vec![tick(0.1, (1, 1), (45, 45)); 100]);
        let both = after(&Settings { max_error_rate: Some(0.3), ..settings.clone() }, &ticks);
        assert!(
            both.pass_evidence > both.pass_bound && both.both_bad && both.outcome == Outcome::Undecided,
            "{both:?}"
        );
        let worse = after(&settings, &vec![tick(0.1, (5, 5), (45, 5)); 20]);
        assert_eq!((worse.outcome, worse.both_bad), (Outcome::Fail, false));
    }

    #[test]
    fn a_pass_is_earned_at_each_step() {
        let settings = settings();
        let mut analysis = Analysis::new(RollingBaseline::default());
        let good = vec![tick(0.1, (5, 0), (45, 0)); 40];
        good.iter().for_each(|tick| analysis.tick(&settings, tick));
        assert_eq!(analysis.judgement(&settings).outcome, Outcome::Pass);
        analysis.step_started();
        let judgement = analysis.judgement(&settings);
        assert_eq!((judgement.outcome, judgement.target.requests), (Outcome::Undecided, 200));
        good.iter().for_each(|tick| analysis.tick(&settings, tick));
        assert_eq!(analysis.judgement(&settings).outcome, Outcome::Pass);
    }

    /// Durations: `fast` requests up to 10 ms, `slow` ones up to 100 ms.
    fn timed(fast: u64, slow: u64) -> Sample {
        let mut durations = vec![0; 12];
        (durations[5], durations[11]) = (fast, slow);
        Sample { requests: fast + slow, durations, ..Sample::default() }
    }

    #[test]
    fn what_is_slow_is_frozen_when_a_step_starts() {
        let settings = settings();
        let slower_than = |analysis: &Analysis| {
            analysis.judgement(&settings).latency.and_then(|latency| latency.slower_than).map(|bound| bound.as_millis())
        };
        let seconds = |analysis: &mut Analysis, times, target: Sample, stable: Sample| {
            let tick = Tick {
                elapsed: Duration::from_secs(1),
                share: 0.1,
                few_clients: true,
                target,
                stable,
                ..Tick::default()
            };
            (0..times).for_each(|_| analysis.tick(&settings, &tick));
        };
        // Nine of ten take up to 10 ms; a slow request takes 10 ms longer.
        let mut analysis = Analysis::new(known(timed(9_900, 100)));
        assert_eq!(slower_than(&analysis), None);
        seconds(&mut analysis, 1, timed(10, 0), timed(90, 0));
        assert_eq!(slower_than(&analysis), Some(20));
        // Later slowness of the stable version does not move the bound until the next step.
        seconds(&mut analysis, 200, timed(0, 10), timed(0, 90));
        assert_eq!((slower_than(&analysis), analysis.judgement(&settings).outcome), (Some(20), Outcome::Pass));
        analysis.step_started();
        assert_eq!(slower_than(&analysis), Some(20));
        seconds(&mut analysis, 1, timed(10, 0), timed(90, 0));
        assert_eq!(slower_than(&analysis), Some(150));
        // Requests counted as slow by the previous bound do not count for this one.
        let counted = analysis.judgement(&settings).latency.map(|latency| (latency.target, latency.stable.requests));
        assert_eq!(counted, Some((Totals { requests: 10, errors: 0 }, 90)));
        // A target that alone is slow fails.
        let mut analysis = Analysis::new(known(timed(10_000, 0)));
        seconds(&mut analysis, 20, timed(0, 10), timed(90, 0));
        let judgement = analysis.judgement(&settings);
        assert_eq!(judgement.outcome, Outcome::Fail);
        let words = judgement.in_words("v2", "v1");
        assert!(
            words.starts_with(
                "v2 is slower than v1: 200 of 200 took more than 20 ms at this step, v1 0 of 1,800; by chance"
            ),
            "{words}"
        );
        // With too few requests the bound of slow requests is unknown.
        let mut analysis = Analysis::new(known(timed(9, 0)));
        seconds(&mut analysis, 1, timed(0, 10), timed(90, 0));
        assert_eq!(slower_than(&analysis), None);
    }

    /// A state in an old format: a single sample of the stable version's past and a recent one; bounds of durations
    /// without an age.
    #[test]
    fn what_was_kept_by_an_older_controller_is_read() {
        let settings = settings();
        let mut analysis = Analysis::new(known(timed(900, 100)));
        analysis.tick(
            &settings,
            &Tick {
                elapsed: Duration::from_secs(1),
                share: 0.1,
                target: timed(1, 0),
                stable: timed(9, 0),
                ..Tick::default()
            },
        );
        let mut old = serde_json::to_value(&analysis).unwrap();
        old["recent"].as_object_mut().unwrap().remove("before");
        old["absolute"]["justNow"] = serde_json::json!({"requests": 9, "errors": 0});
        let quantiles = old["slowness"]["quantiles"].as_array_mut().unwrap();
        quantiles.iter_mut().for_each(|slow| assert!(slow.as_object_mut().unwrap().remove("is_old").is_some()));
        assert_eq!(serde_json::from_value::<Analysis>(old).unwrap(), analysis);
    }

    /// Every build computes the same bits.
    #[test]
    fn a_verdict_is_what_it_was() {
        let settings = settings();
        let mut analysis = Analysis::new(known(timed(9_000, 1_000)));
        for i in 0..40 {
            let timed = |n| Sample { errors: (n + i) % 3 / 2, ..timed(n, i % 5) };
            let elapsed = Duration::from_millis(250 + 10 * i);
            analysis.tick(
                &settings,
                &Tick {
                    elapsed,
                    share: 0.2,
                    few_clients: true,
                    target: timed(4 + i % 3),
                    stable: timed(25),
                    ..Tick::default()
                },
            );
        }
        let judgement = analysis.judgement(&settings);
        let latency = judgement.latency.map(|latency| latency.evidence.to_bits());
        assert_eq!(
            (judgement.evidence.to_bits(), judgement.pass_evidence.to_bits(), latency),
            (4617088725920532106, 4531339409682563360, Some(4603804719079489536))
        );
    }
}
