//! The result of a verdict, as numbers and as text.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::fmt::Write;
use std::time::Duration;

/// Requests of one version, and how many of them were bad: failed, or slow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests.
    pub requests: u64,
    /// The bad requests.
    pub errors: u64,
}

impl Totals {
    /// Adds more requests.
    pub(super) fn add(&mut self, more: Self) {
        self.requests = self.requests.saturating_add(more.requests);
        self.errors = self.errors.saturating_add(more.errors);
    }

    pub(super) fn good(&self) -> u64 {
        self.requests.saturating_sub(self.errors)
    }
}

/// The outcome of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It fails less than it may.
    Pass,
    /// It is worse than the stable version, or than what is allowed.
    Fail,
    /// Neither can be said yet.
    Undecided,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Undecided => "undecided",
        })
    }
}

/// What speaks against a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Ground {
    /// Requests that failed.
    #[default]
    Errors,
    /// Requests that were refused because of what the client asked.
    ClientErrors,
    /// Requests that clients gave up.
    Cancelled,
    /// Requests that took long.
    Slowness,
}

impl Ground {
    /// The verb for bad requests of this kind.
    fn verb(self) -> &'static str {
        match self {
            Self::Errors | Self::Slowness => "failed",
            Self::ClientErrors => "were answered with a client error",
            Self::Cancelled => "were given up by clients",
        }
    }
}

/// A verdict and what it rests on.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The verdict.
    pub outcome: Outcome,
    /// Both versions exceed the limit, and the target is not known to be worse than the stable version: the rollout holds
    /// and neither version is blamed. The outcome is then `undecided`.
    pub both_bad: bool,
    /// The target since the rollout began.
    pub target: Totals,
    /// The stable version in the same time.
    pub stable: Totals,
    /// Of several services, the one that fails, or at which both versions do.
    pub at: Option<At>,
    /// The strongest kind of evidence against the target.
    pub ground: Ground,
    /// Requests that were answered with a client error, then those that were given up: of the target and of the stable
    /// version, since the rollout began.
    pub others: [(Totals, Totals); 2],
    /// The evidence that the target is worse: at most 1 on average if it is not. 0 to 1e15.
    pub evidence: f64,
    /// `fail` from this evidence on.
    pub bound: f64,
    /// The error rate below which the target passes; `None` if no pass is required.
    pub max_error_rate: Option<f64>,
    /// The evidence for a pass since the step began, 0 to 1e15; 0 if no pass is required.
    pub pass_evidence: f64,
    /// `pass` from this evidence on.
    pub pass_bound: f64,
    /// The judgement of durations, if they are analysed.
    pub latency: Option<LatencyJudgement>,
}

/// The counts at one of several services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    /// Its name.
    pub service: String,
    /// The target since the rollout began.
    pub target: Totals,
    /// The stable version in the same time.
    pub stable: Totals,
}

/// The judgement of the target's durations.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyJudgement {
    /// Of several services, the one with the most evidence against the target.
    pub service: Option<String>,
    /// Of the configured quantiles, the one with the most evidence against the target.
    pub quantile: f64,
    /// The duration above which a request is slow at this step; `None` while too little is known of the stable version.
    pub slower_than: Option<Duration>,
    /// The target since the step began, and how many of its requests were slow.
    pub target: Totals,
    /// The stable version in the same time.
    pub stable: Totals,
    /// The evidence that the target is slower: at most 1 on average if it is not. 0 to 1e15.
    pub evidence: f64,
    /// `fail` from this evidence on.
    pub bound: f64,
}

impl Judgement {
    /// Combines the verdicts of several services of a rollout, by name: the mean of the evidence against each, so that
    /// a healthy rollout is rolled back no more often than with a single service; a pass requires a pass of each.
    /// `None` if there are none.
    pub fn of_all(services: &[(String, Self)]) -> Option<Self> {
        let (_, first) = services.first()?;
        let worst = services.iter().max_by(|(_, a), (_, b)| a.evidence.total_cmp(&b.evidence));
        let mut all = first.clone();
        all.ground = worst.map_or(all.ground, |(_, worst)| worst.ground);
        if services.len() == 1 {
            return Some(all);
        }
        for (_, service) in services.iter().skip(1) {
            all.target.add(service.target);
            all.stable.add(service.stable);
            for (all, service) in all.others.iter_mut().zip(service.others) {
                all.0.add(service.0);
                all.1.add(service.1);
            }
            all.pass_evidence = all.pass_evidence.min(service.pass_evidence);
        }
        // If both versions are bad, neither is blamed.
        let blamed = |service: &Self| !service.both_bad || services.iter().all(|(_, service)| service.both_bad);
        let mean = |of: fn(&Self) -> f64| {
            let sum = services.iter().filter(|(_, service)| blamed(service)).fold(0.0, |sum, (_, one)| sum + of(one));
            sum / services.len() as f64
        };
        all.evidence = mean(|service| service.evidence);
        let timed = services.iter().filter_map(|(name, service)| Some((name, service.latency.as_ref()?)));
        let slowest = timed.max_by(|(_, a), (_, b)| a.evidence.total_cmp(&b.evidence));
        all.latency = slowest.map(|(name, latency)| LatencyJudgement {
            service: Some(name.clone()),
            evidence: mean(Self::latency_evidence),
            ..latency.clone()
        });
        all.both_bad = services.iter().all(|(_, service)| service.both_bad);
        all.decide(services.iter().all(|(_, service)| service.outcome == Outcome::Pass));
        if all.outcome != Outcome::Fail && services.iter().any(|(_, service)| service.both_bad) {
            all.both_bad = true;
            all.outcome = Outcome::Undecided;
        }
        let is_meant = |service: &Self| match all.outcome {
            Outcome::Fail => blamed(service),
            _ => service.both_bad,
        };
        let against = |service: &Self| service.evidence.max(service.latency_evidence());
        let meant = services.iter().filter(|(_, service)| is_meant(service));
        let worst = meant.max_by(|(_, a), (_, b)| against(a).total_cmp(&against(b)));
        let at = |(name, of): &(String, Self)| At { service: name.clone(), target: of.target, stable: of.stable };
        all.at = worst.map(at);
        Some(all)
    }

    fn latency_evidence(&self) -> f64 {
        self.latency.as_ref().map_or(0.0, |latency| latency.evidence)
    }

    /// Derives the outcome from the other fields.
    pub(super) fn decide(&mut self, passes: bool) {
        let is_slow = self.latency.as_ref().is_some_and(|latency| latency.evidence >= latency.bound);
        self.outcome = match () {
            () if self.both_bad => Outcome::Undecided,
            () if self.evidence >= self.bound || is_slow => Outcome::Fail,
            () if passes => Outcome::Pass,
            () => Outcome::Undecided,
        };
    }

    /// The verdict and its basis in one sentence, rates first: `v2 is worse than v1: 7 of 41 failed, v1 1 of 366; by
    /// chance in fewer than 1 of 2,300; taken back at 1 of 1,000`.
    pub fn in_words(&self, target: &str, stable: &str) -> String {
        let mut words = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut words, target, stable);
        words
    }

    fn write(&self, to: &mut String, target: &str, stable: &str) -> fmt::Result {
        let is_failed = self.outcome == Outcome::Fail;
        // Then the evidence is that of the durations, which have their own sentence.
        let is_slowness = self.ground == Ground::Slowness && self.latency.is_some();
        if self.both_bad {
            write!(to, "both fail, and nothing points at {target}, so nothing is moved: ")?;
            self.write_counts(to, target, stable)?;
            write!(to, " failed")?;
        } else if !is_failed || (self.evidence >= self.bound && !is_slowness) {
            let sign = if is_slowness { Sign::None } else { Sign::of(self.evidence, self.bound, is_failed) };
            write!(to, "{}: ", sign.in_words(target, "worse", stable))?;
            self.write_counts(to, target, stable)?;
            write!(to, "{}", sign.odds())?;
        }
        if let Some(latency) = &self.latency {
            let separator = if to.is_empty() { "" } else { "; " };
            write!(to, "{separator}{}", latency.sentence(target, stable, is_failed))?;
        }
        if let Some(most) = self.max_error_rate.filter(|_| !is_failed && !self.both_bad) {
            write!(to, "; {}", self.pass_in_words(most))?;
            if self.pass_evidence >= self.pass_bound && self.outcome == Outcome::Undecided {
                write!(to, ", but far more of {target}'s requests are refused or cancelled than of {stable}'s")?;
            }
        }
        Ok(())
    }

    /// `7 of 41 failed, v1 1 of 366`.
    fn write_counts(&self, to: &mut String, target: &str, stable: &str) -> fmt::Result {
        let verb = self.ground.verb();
        let place = self.at.as_ref().map(|at| format!(" at {}", at.service)).unwrap_or_default();
        let (of_target, of_stable, verb) = match (self.ground, self.others, &self.at) {
            (Ground::ClientErrors, [of, _], _) | (Ground::Cancelled, [_, of], _) if self.outcome == Outcome::Fail => {
                (of.0, of.1, verb)
            }
            (_, _, Some(at)) => (at.target, at.stable, "failed"),
            (_, _, None) => (self.target, self.stable, "failed"),
        };
        if self.both_bad {
            return write!(to, "{target} {}{place}, {stable} {}", of_target.in_words(), of_stable.in_words());
        }
        write!(to, "{} {verb}{place}, {stable} {}", of_target.in_words(), of_stable.in_words())
    }

    /// Whether the target is good enough, or at most how many more requests that takes.
    fn pass_in_words(&self, most: f64) -> String {
        let most_percent = percent(most);
        if self.pass_evidence >= self.pass_bound {
            let sure = percent(1.0 - 1.0 / self.pass_bound);
            return format!("good enough: fewer than {most_percent} % fail ({sure} % sure)");
        }
        let words = format!("not sure yet that fewer than {most_percent} % fail");
        // A request that does not fail adds about 7/8 of the rate to the logarithm of the evidence. Evidence far below
        // 1 means that requests do fail: then no number can be predicted.
        if self.pass_evidence < 0.5 {
            return words;
        }
        let more = (libm::log(self.pass_bound) - libm::log(self.pass_evidence)) / (most * 0.875);
        format!("{words}: about {} more requests", grouped((libm::ceil(more / 10.0) * 10.0) as u128))
    }
}

/// The strength of the evidence against the target.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Sign {
    /// No evidence.
    None,
    /// Some evidence, and the required amount.
    Some(f64, f64),
    /// Sufficient evidence.
    Enough(f64, f64),
}

impl Sign {
    /// Evidence below this is ordinary noise.
    const WORTH_A_WORD: f64 = 10.0;

    fn of(evidence: f64, bound: f64, is_failed: bool) -> Self {
        if is_failed && evidence >= bound {
            Self::Enough(evidence, bound)
        } else if evidence >= Self::WORTH_A_WORD {
            Self::Some(evidence, bound)
        } else {
            Self::None
        }
    }

    fn in_words(self, target: &str, how: &str, stable: &str) -> String {
        match self {
            Self::None => format!("no sign that {target} is {how} than {stable}"),
            Self::Some(..) => format!("{target} looks {how} than {stable}"),
            Self::Enough(..) => format!("{target} is {how} than {stable}"),
        }
    }

    /// The probability that chance alone produces this much evidence: at most 1/evidence, since evidence is at most 1
    /// on average without a cause.
    fn odds(self) -> String {
        match self {
            Self::None => String::new(),
            Self::Some(evidence, bound) | Self::Enough(evidence, bound) => {
                format!("; by chance in fewer than 1 of {}; taken back at 1 of {}", number(evidence), number(bound))
            }
        }
    }
}

impl LatencyJudgement {
    /// The judgement of durations in one sentence: `v2 is slower than v1: 40 of 100 took more than 30 ms at this step,
    /// v1 9 of 366; by chance in fewer than 1 of 5,100; taken back at 1 of 2,000`.
    pub fn in_words(&self, target: &str, stable: &str) -> String {
        self.sentence(target, stable, self.evidence >= self.bound)
    }

    fn sentence(&self, target: &str, stable: &str, is_failed: bool) -> String {
        let Some(bound) = self.slower_than else {
            return format!("what is slow is not known: {stable} had too few requests, or they take too long to tell");
        };
        let sign = Sign::of(self.evidence, self.bound, is_failed);
        let at = self.service.as_ref().map(|service| format!(" at {service}")).unwrap_or_default();
        let how = format!("took more than {} ms{at} at this step", grouped(bound.as_millis()));
        let (of_target, of_stable) = (self.target.in_words(), self.stable.in_words());
        let verdict = sign.in_words(target, "slower", stable);
        format!("{verdict}: {of_target} {how}, {stable} {of_stable}{}", sign.odds())
    }
}

impl Totals {
    /// `7 of 41`.
    fn in_words(&self) -> String {
        format!("{} of {}", grouped(self.errors.into()), grouped(self.requests.into()))
    }
}

/// Formats a number with commas between thousands.
fn grouped(number: u128) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Integers from 10 on, one decimal below; rounded down, so that no number appears to have reached its bound.
fn number(number: f64) -> String {
    match number {
        1e6.. => "1,000,000".to_owned(),
        10.0.. => grouped(number as u128),
        _ => format!("{:.1}", (number * 10.0).floor() / 10.0),
    }
}

/// 0.025 as 2.5.
fn percent(rate: f64) -> f64 {
    (rate * 1e6).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn judgement(evidence: f64, pass_evidence: f64) -> Judgement {
        let mut judgement = Judgement {
            outcome: Outcome::Undecided,
            both_bad: false,
            target: Totals { requests: 41, errors: 7 },
            stable: Totals { requests: 12_366, errors: 1 },
            at: None,
            ground: Ground::Errors,
            others: Default::default(),
            evidence,
            bound: 1_000.0,
            max_error_rate: Some(0.02),
            pass_evidence,
            pass_bound: 20.0,
            latency: None,
        };
        judgement.decide(pass_evidence >= judgement.pass_bound);
        judgement
    }

    fn slow(judgement: Judgement, evidence: f64) -> Judgement {
        let latency = LatencyJudgement {
            service: None,
            quantile: 0.9,
            slower_than: Some(Duration::from_millis(1_000)),
            target: Totals { requests: 41, errors: 30 },
            stable: Totals { requests: 12_366, errors: 900 },
            evidence,
            bound: 1_000.0,
        };
        let mut judgement = Judgement { latency: Some(latency), ..judgement };
        judgement.decide(false);
        judgement
    }

    /// The sentence of the verdict: rates first, then the probability by chance.
    #[test]
    fn verdict_in_words() {
        let words = |judgement: Judgement| judgement.in_words("v2", "v1");
        let counts = "7 of 41 failed, v1 1 of 12,366";
        let odds = |evidence: &str| format!("; by chance in fewer than 1 of {evidence}; taken back at 1 of 1,000");
        assert_eq!(words(judgement(2_300.0, 0.0)), format!("v2 is worse than v1: {counts}{}", odds("2,300")));
        assert_eq!(words(judgement(1e15, 0.0)), format!("v2 is worse than v1: {counts}{}", odds("1,000,000")));
        let none = "no sign that v2 is worse than v1";
        assert_eq!(
            words(judgement(0.46, 20.1)),
            format!("{none}: {counts}; good enough: fewer than 2 % fail (95 % sure)")
        );
        let unsure = "not sure yet that fewer than 2 % fail";
        assert_eq!(words(judgement(0.27, 4.6)), format!("{none}: {counts}; {unsure}: about 90 more requests"));
        assert_eq!(words(judgement(999.9, 0.1)), format!("v2 looks worse than v1: {counts}{}; {unsure}", odds("999")));
        let unasked = Judgement { max_error_rate: None, ..judgement(0.5, 0.0) };
        assert_eq!(words(unasked), format!("{none}: {counts}"));
        let both = Judgement { both_bad: true, max_error_rate: Some(0.029), ..judgement(0.5, 0.0) };
        assert_eq!(
            words(both),
            "both fail, and nothing points at v2, so nothing is moved: v2 7 of 41, v1 1 of 12,366 failed"
        );
        assert_eq!(
            words(slow(judgement(1.0, 0.0), 5_100.0)),
            format!(
                "v2 is slower than v1: 30 of 41 took more than 1,000 ms at this step, v1 900 of 12,366{}",
                odds("5,100")
            )
        );
    }

    #[test]
    fn several_services_fail_together_and_pass_one_by_one() {
        let all = |services: &[&Judgement]| {
            let named = services.iter().zip(["cart", "payment", "search"]);
            Judgement::of_all(&named.map(|(of, name)| (name.to_owned(), (*of).clone())).collect::<Vec<_>>())
        };
        assert_eq!(all(&[]), None);
        let (bad, fine, slow) = (judgement(2_500.0, 0.0), judgement(0.5, 30.0), slow(judgement(0.5, 0.0), 2_500.0));
        assert_eq!(all(&[&bad]), Some(bad.clone()));
        let outcome = |services: &[&Judgement]| all(services).map(|all| all.outcome);
        assert_eq!(outcome(&[&fine, &fine]), Some(Outcome::Pass));
        assert_eq!(outcome(&[&fine, &judgement(0.5, 3.0)]), Some(Outcome::Undecided));
        assert_eq!(outcome(&[&fine, &bad]), Some(Outcome::Fail));
        assert_eq!(outcome(&[&fine, &bad, &fine]), Some(Outcome::Undecided));
        assert_eq!(outcome(&[&fine, &slow]), Some(Outcome::Fail));
        assert_eq!(outcome(&[&fine, &fine, &slow]), Some(Outcome::Undecided));

        let held = Judgement { both_bad: true, outcome: Outcome::Undecided, ..bad.clone() };
        let one = all(&[&fine, &held]);
        assert_eq!(one.as_ref().map(|all| (all.outcome, all.both_bad)), Some((Outcome::Undecided, true)));
        let worse = all(&[&bad, &held]);
        assert_eq!(worse.map(|all| (all.outcome, all.both_bad, all.target.errors)), Some((Outcome::Fail, false, 14)));
    }

    #[test]
    fn of_several_services_the_one_that_fails_is_named() {
        let named = |services: &[(&str, &Judgement)]| {
            let of: Vec<_> = services.iter().map(|(name, of)| ((*name).to_owned(), (*of).clone())).collect();
            Judgement::of_all(&of).unwrap()
        };
        let (fine, mut bad) = (judgement(0.0, 0.0), judgement(4_000.0, 0.0));
        bad.target = Totals { requests: 40, errors: 40 };
        let failed = named(&[("cart", &fine), ("payment", &bad)]);
        assert_eq!(
            failed.in_words("v2", "v1"),
            "v2 is worse than v1: 40 of 40 failed at payment, v1 1 of 12,366; by chance in fewer than 1 of 2,000; taken back at \
             1 of 1,000"
        );
        assert_eq!((failed.target.requests, failed.target.errors), (81, 47));
        let slow = named(&[("cart", &slow(fine.clone(), 5_000.0)), ("payment", &fine)]);
        let words = slow.in_words("v2", "v1");
        assert_eq!(
            words,
            "v2 is slower than v1: 30 of 41 took more than 1,000 ms at cart at this step, v1 900 of 12,366; by chance in \
             fewer than 1 of 2,500; taken back at 1 of 1,000"
        );
        let undecided = named(&[("cart", &fine), ("payment", &fine)]);
        assert!(
            undecided
                .in_words("v2", "v1")
                .starts_with("no sign that v2 is worse than v1: 14 of 82 failed, v1 2 of 24,732")
        );
    }

    #[test]
    fn what_is_held_keeps_its_evidence() {
        let mut held = Judgement { both_bad: true, ..judgement(300.0, 0.0) };
        held.decide(false);
        let of = |names: &[&str]| {
            let of: Vec<_> = names.iter().map(|name| ((*name).to_owned(), held.clone())).collect();
            Judgement::of_all(&of).map(|all| (all.both_bad, all.outcome, all.evidence, all.in_words("v2", "v1")))
        };
        let (both_bad, outcome, evidence, words) = of(&["cart"]).unwrap();
        assert_eq!((both_bad, outcome, evidence), (true, Outcome::Undecided, 300.0));
        assert!(
            words.starts_with("both fail, and nothing points at v2, so nothing is moved: v2 7 of 41, v1 1 of 12,366"),
            "{words}"
        );
        let (both_bad, outcome, evidence, words) = of(&["cart", "payment"]).unwrap();
        assert_eq!((both_bad, outcome, evidence), (true, Outcome::Undecided, 300.0));
        assert!(words.contains(" at payment") && !words.contains("-0"), "{words}");
        // Zero evidence is never displayed as less than zero.
        let fine = judgement(0.0, 0.0);
        let one = Judgement::of_all(&[("cart".to_owned(), held), ("payment".to_owned(), fine)]).unwrap();
        assert!(one.evidence.is_sign_positive() && one.both_bad, "{one:?}");
    }
}
