//! The guard: outlier ejection of a whole version in one proxy. It ejects a failing version based on the proxy's own
//! counts, within about a second and without asking the controller, and restores its traffic after a cool-down for
//! another attempt. It never ejects the stable version.
//!
//! Its data, bounds, speed and limits: `docs/guard.md`.

use crate::counts::Counts;
use crate::decode::Decoder;
use crate::evidence::clients::{Limits, Request};
use crate::evidence::{Batch, RECENT_RATIOS, RecentEvidence, log_mean_exp};
use crate::outcome::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// The number of requests in a batch. With fewer, a batch at low traffic would contain one version only and allow no
/// comparison; with more, batches at 100 requests a second would take longer than the interval between looks.
const BATCH: u64 = 10;
/// A look at which a version had errors counts as one error against it, however many there were, or as this many if at
/// least half of its requests failed.
const MOST_PER_LOOK: u64 = 2;
/// A veto needs errors in at least this many looks: a burst of errors shorter than 300 ms spans at most four.
const FEWEST_LOOKS: u64 = 5;
/// The guard ignores error rates below one in this many requests, however well the others do. Errors that are further
/// apart do not count together.
const FAILING_ONE_IN: u64 = 50;

/// A client contributes at most the logarithm of the bound divided by this: a veto takes no fewer than three clients.
const CLIENTS_PER_VETO: f64 = 2.5;
/// How long the user of a session does not count again after it counted.
const USER_NANOS: u64 = 600_000_000_000;
/// How long after a version's share was lowered requests that end may have been assigned at the old share.
const SHARE_NANOS: u64 = 60_000_000_000;

/// The guard's settings for a service.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "WrittenGuardPolicy")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(with = "WrittenGuardPolicy"))]
pub struct GuardPolicy {
    /// Whether the guard is enabled.
    pub enabled: bool,
    /// α: a version that is no worse than the others is vetoed at most once in 1/α batches that have errors, on
    /// average. 1e-12 to 0.01.
    pub false_veto_rate: f64,
    /// How long the first veto on a version lasts; each further one lasts twice as long as the previous one.
    pub cool_down: Duration,
    /// The maximum duration of a veto, and the time without vetoes after which the next one counts as the first again.
    pub max_cool_down: Duration,
}

/// The maximum duration of a veto in a document: one day.
const LONGEST_SECONDS: u64 = 24 * 3600;

/// [`GuardPolicy`] as documents have it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
struct WrittenGuardPolicy {
    /// Whether proxies may eject a failing version on their own; default true.
    #[cfg_attr(feature = "schema", schemars(with = "Option<bool>", extend("default" = true)))]
    enabled: bool,
    /// The maximum probability, per batch of requests with errors, of ejecting a version that is no worse than the others;
    /// default 1e-7.
    #[cfg_attr(feature = "schema", schemars(with = "Option<f64>", range(min = 1e-12, max = 0.01), extend("default" = 1e-7)))]
    false_veto_rate: f64,
    /// The duration of the first ejection of a version, at most one day; each further one lasts twice as long. Default 10.
    #[cfg_attr(feature = "schema", schemars(with = "Option<u64>", range(min = 1, max = LONGEST_SECONDS), extend("default" = 10)))]
    cool_down_seconds: u64,
    /// The maximum duration of an ejection, at most one day; after that time without ejections the next one counts as the
    /// first again. Default 300, or coolDownSeconds if that is more.
    #[cfg_attr(feature = "schema", schemars(with = "Option<u64>", range(min = 1, max = LONGEST_SECONDS)))]
    max_cool_down_seconds: u64,
}

impl From<GuardPolicy> for WrittenGuardPolicy {
    fn from(policy: GuardPolicy) -> Self {
        Self {
            enabled: policy.enabled,
            false_veto_rate: policy.false_veto_rate,
            cool_down_seconds: policy.cool_down.as_secs(),
            max_cool_down_seconds: policy.max_cool_down.as_secs(),
        }
    }
}

impl Default for GuardPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            false_veto_rate: 1e-7,
            cool_down: Duration::from_secs(10),
            max_cool_down: Duration::from_secs(300),
        }
    }
}

impl GuardPolicy {
    /// Whether these are the defaults, which a document may omit.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let enabled = f.optional(d, "enabled", Decoder::boolean).unwrap_or(default.enabled);
        let rate = f.optional(d, "falseVetoRate", |d, v| d.number(v, 1e-12, 0.01)).unwrap_or(default.false_veto_rate);
        let mut seconds = |d: &mut Decoder, name| {
            f.optional(d, name, |d, v| d.integer(v, 1, LONGEST_SECONDS)).map(Duration::from_secs)
        };
        let cool_down = seconds(d, "coolDownSeconds").unwrap_or(default.cool_down);
        let most = seconds(d, "maxCoolDownSeconds");
        // Without fields that a newer controller may add, the guard still keeps its bound and never ejects the stable
        // version.
        f.finish_harmless(d);
        if let Some(most) = most.filter(|most| *most < cool_down) {
            let allowed = format!("at least coolDownSeconds, which is {}", cool_down.as_secs());
            d.within("maxCoolDownSeconds", |d| d.invalid(&Value::from(most.as_secs()), allowed));
        }
        let max_cool_down = most.unwrap_or(default.max_cool_down.max(cool_down));
        Some(Self { enabled, false_veto_rate: rate, cool_down, max_cool_down })
    }

    /// The duration of the `strikes`th veto of a version, in nanoseconds.
    pub fn cool_down_for(&self, strikes: u32) -> u64 {
        let doublings = strikes.saturating_sub(1).min(31);
        nanos(self.cool_down.saturating_mul(1 << doublings).min(self.max_cool_down))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The proxy's information about one version when it calls the guard.
#[derive(Debug, Clone, Copy, Default)]
pub struct Observed<'a> {
    /// The version's name.
    pub name: &'a str,
    /// Its weight in the service's own split.
    pub weight: u32,
    /// Whether the policy has it in service; vetoes are the guard's own knowledge.
    pub serving: bool,
    /// Whether it is the stable version, the baseline of the others.
    pub stable: bool,
    /// How the exchanges of this proxy ended since its start, except those that rules matched.
    pub ended: Counts,
    /// Those whose version was dealt by weight; `None`: all of them.
    pub dealt: Option<Counts>,
    /// The number of started requests whose version was dealt by weight; 0 if unknown.
    pub started: u64,
}

/// A version that the guard took out of service, and the counts that spoke against it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(!default))]
pub struct Veto {
    /// The version.
    pub version: String,
    /// When the veto ends, in nanoseconds since 1970.
    pub until: u64,
    /// The number of this veto in the current series, counted from 1.
    pub strikes: u32,
    /// Its requests since the evidence began, and how many failed.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// The requests of the others in the same time.
    pub others_requests: u64,
    /// Those that failed.
    pub others_errors: u64,
}

/// The maximum time that a veto may end after the current time, which limits the effect of a wrong clock.
const CLOCK_NANOS: u64 = 24 * 3600 * 1_000_000_000;

impl Veto {
    /// Why the guard of a proxy cannot have issued this veto, if so: according to the policy, whether the version is
    /// the `stable` one, and what the proxy has counted of the version and of the others since its start. `now` is in
    /// nanoseconds since 1970. Every veto that a guard issues passes; passing does not prove that it was issued.
    pub fn impossible(
        &self,
        policy: &GuardPolicy,
        stable: bool,
        own: &Counts,
        others: &Counts,
        now: u64,
    ) -> Option<&'static str> {
        let most = nanos(policy.max_cool_down).saturating_add(CLOCK_NANOS);
        let enough = -libm::log(policy.false_veto_rate);
        let most_for_each = RECENT_RATIOS.iter().fold(0.0, |most, ratio| libm::fmax(most, libm::log(*ratio)));
        let fails = |errors: u64, requests: u64| u128::from(errors) * u128::from(requests);
        let reasons = [
            (!policy.enabled, "the guard is disabled"),
            (stable, "the guard never takes out the stable version"),
            (self.strikes == 0 || self.until > now.saturating_add(most), "no veto lasts that long"),
            (self.errors > self.requests || self.others_errors > self.others_requests, "more errors than requests"),
            (self.errors < FEWEST_LOOKS, "too few errors for a veto"),
            (self.errors as f64 * most_for_each < enough, "too few errors for falseVetoRate"),
            (self.errors.saturating_mul(FAILING_ONE_IN) < self.requests, "it fails too rarely for a veto"),
            (
                fails(self.errors, self.others_requests) < fails(self.others_errors, self.requests),
                "it fails less often than the others",
            ),
            (
                self.requests > own.answered() || self.errors > own.error,
                "the proxy has not counted so many requests of the version",
            ),
            (
                self.others_requests > others.answered() || self.others_errors > others.error,
                "the proxy has not counted so many requests of the others",
            ),
        ];
        reasons.into_iter().find_map(|(is_so, why)| is_so.then_some(why))
    }
}

/// The guard of one service: one per proxy, called about ten times a second.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    policy: GuardPolicy,
    versions: BTreeMap<String, VersionWindow>,
    vetoes: Vec<Veto>,
    /// Expired vetoes, for the strikes of the next one.
    past: Vec<Veto>,
    /// Whether there are enough clients to tell a malicious one from the others.
    many_clients: bool,
}

/// One version of the service.
#[derive(Debug, Clone, Default)]
struct VersionWindow {
    /// Its counts at the start of the running batch.
    base: Counted,
    /// Its counts at the last look.
    seen: Counted,
    /// Looks in the running batch that saw errors of it.
    looks: u64,
    /// The maximum number of errors that the running batch counts against it.
    most: u64,
    evidence: RecentEvidence,
    /// The requests since the evidence began, and the number of looks with errors.
    since: Batch,
    since_looks: u64,
    /// The evidence from clients, and the requests since that began.
    clients: Clients,
    /// The largest fraction of the weight in service that it had in the last minute, and when that expires.
    share: (f64, u64),
}

/// The counts of a version.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    ended: Counts,
    dealt: Counts,
    started: u64,
}

impl Counted {
    fn of(version: &Observed<'_>) -> Self {
        Self { ended: version.ended, dealt: version.dealt.unwrap_or(version.ended), started: version.started }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            ended: self.ended.since(&before.ended),
            dealt: self.dealt.since(&before.dealt),
            started: self.started.saturating_sub(before.started),
        }
    }

    fn add(&mut self, more: &Self) {
        self.ended += more.ended;
        self.dealt += more.dealt;
        self.started = self.started.saturating_add(more.started);
    }
}

/// Evidence from clients that discounts good periods, like [`RecentEvidence`].
#[derive(Debug, Clone, Default)]
struct Clients {
    limits: Limits<{ RECENT_RATIOS.len() }>,
    sums: [f64; RECENT_RATIOS.len()],
    since: Batch,
    looks: u64,
    /// Whether there were errors since the last look.
    failed: bool,
}

impl Clients {
    fn is_none(&self) -> bool {
        self.sums.iter().all(|sum| *sum <= 0.0)
    }

    /// Discards the evidence and returns what had ended since it began.
    fn forget(&mut self) -> Batch {
        (self.sums, self.looks) = Default::default();
        self.limits.start_again();
        std::mem::take(&mut self.since)
    }
}

impl Guard {
    /// A guard without any counts.
    pub fn new(policy: GuardPolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Adds single requests that ended since the last look, each with its version; ignores [`Request::is_target`].
    /// `few_clients`: whether there are so few clients that a malicious one cannot be told from the others.
    pub fn hear(&mut self, now: u64, few_clients: bool, requests: &[(&str, Request)]) {
        self.many_clients = !few_clients;
        let cap = -libm::log(self.policy.false_veto_rate) / CLIENTS_PER_VETO;
        for (version, request) in requests.iter().filter(|(_, request)| request.outcome == Outcome::Error) {
            for (name, watched) in &mut self.versions {
                let request = Request { is_target: name == version, ..*request };
                let clients = &mut watched.clients;
                let share = watched.share.0;
                let gains = clients.limits.gains(&request, &RECENT_RATIOS, share, few_clients, cap, now / 1_000_000);
                for (sum, gain) in clients.sums.iter_mut().zip(gains.unwrap_or_default()) {
                    *sum = (*sum + gain).max(0.0);
                }
                clients.failed |= request.is_target;
            }
        }
    }

    /// Takes over from another guard of the same proxy, which left its [`Guard::vetoes`] and [`Guard::past`].
    pub fn resume(policy: GuardPolicy, now: u64, left: impl IntoIterator<Item = Veto>) -> Self {
        let (vetoes, past) = left.into_iter().partition(|veto| veto.until > now);
        Self { policy, vetoes, past, ..Self::default() }
    }

    /// Replaces the settings and keeps the evidence.
    pub fn set_policy(&mut self, policy: GuardPolicy) {
        self.policy = policy;
    }

    /// The vetoes in force, as of the last [`Guard::observe`].
    pub fn vetoes(&self) -> &[Veto] {
        &self.vetoes
    }

    /// The vetoes that have expired but still count: the next one on the same version lasts longer.
    pub fn past(&self) -> &[Veto] {
        &self.past
    }

    /// Evaluates the counts of every version of the service. `now` is in nanoseconds since 1970. Returns whether the
    /// vetoes in force have changed.
    pub fn observe(&mut self, now: u64, observed: &[Observed<'_>]) -> bool {
        if !self.policy.enabled {
            let had_vetoes = !self.vetoes.is_empty();
            *self = Self::new(self.policy.clone());
            return had_vetoes;
        }
        let left = self.drop_those_that_left(observed);
        self.note_shares(now, observed);
        self.end_vetoes_of_the_last(now, observed);
        let ended = self.end_vetoes(now);
        // All counts of a batch must cover the same time to be comparable. Therefore a version that is new, returns, or
        // has reset counters starts a new batch for all versions; its earlier counts are ignored.
        if ended || self.has_new_counters(observed) {
            self.start_batch(observed);
            return left || ended;
        }
        let vetoed = self.close_batch(observed) && self.veto_whom_evidence_is_against(now, observed);
        left || vetoed
    }

    fn drop_those_that_left(&mut self, observed: &[Observed<'_>]) -> bool {
        if self.versions.len() == observed.len() && observed.iter().all(|v| self.versions.contains_key(v.name)) {
            return false;
        }
        let is_there = |name: &str| observed.iter().any(|version| version.name == name);
        let before = self.vetoes.len();
        self.versions.retain(|name, _| is_there(name));
        self.vetoes.retain(|veto| is_there(&veto.version));
        self.past.retain(|veto| is_there(&veto.version));
        self.vetoes.len() != before
    }

    /// Records the fractions of the weight in service, by which requests are dealt.
    fn note_shares(&mut self, now: u64, observed: &[Observed<'_>]) {
        let in_service = |version: &&Observed<'_>| version.serving && !self.is_vetoed(version.name);
        let all: u64 = observed.iter().filter(in_service).map(|version| u64::from(version.weight)).sum();
        for version in observed {
            let Some(watched) = self.versions.get_mut(version.name) else { continue };
            let share = if all > 0 { (f64::from(version.weight) / all as f64).min(1.0) } else { 1.0 };
            if share >= watched.share.0 || now >= watched.share.1 {
                watched.share = (share, now.saturating_add(SHARE_NANOS));
            }
            watched.clients.limits.forget_before(now.saturating_sub(USER_NANOS) / 1_000_000);
        }
    }

    /// Ends all vetoes if no other version with weight is in service, since they would leave users without a version.
    fn end_vetoes_of_the_last(&mut self, now: u64, observed: &[Observed<'_>]) {
        let is_left = |version: &Observed<'_>| version.serving && version.weight > 0 && !self.is_vetoed(version.name);
        if !observed.iter().any(is_left) {
            self.vetoes.iter_mut().for_each(|veto| veto.until = now);
        }
    }

    fn end_vetoes(&mut self, now: u64) -> bool {
        let most = nanos(self.policy.max_cool_down);
        // A clock that was set back extends neither a veto nor the memory of past vetoes.
        self.vetoes.iter_mut().for_each(|veto| veto.until = veto.until.min(now.saturating_add(most)));
        self.past.iter_mut().for_each(|veto| veto.until = veto.until.min(now));
        self.past.retain(|veto| now - veto.until < most);
        let before = self.vetoes.len();
        self.past.extend(self.vetoes.extract_if(.., |veto| veto.until <= now));
        self.vetoes.len() != before
    }

    fn is_vetoed(&self, name: &str) -> bool {
        self.vetoes.iter().any(|veto| veto.version == name)
    }

    fn has_new_counters(&self, observed: &[Observed<'_>]) -> bool {
        observed.iter().any(|version| {
            let known = self.versions.get(version.name);
            known.is_none_or(|known| version.ended.any_below(&known.seen.ended))
        })
    }

    fn start_batch(&mut self, observed: &[Observed<'_>]) {
        for version in observed {
            match self.versions.get_mut(version.name) {
                Some(watched) => watched.start_batch(version),
                None => {
                    let mut watched = VersionWindow::default();
                    watched.start_batch(version);
                    self.versions.insert(version.name.to_owned(), watched);
                }
            }
        }
    }

    /// Adds the running batch to the evidence if it is full.
    fn close_batch(&mut self, observed: &[Observed<'_>]) -> bool {
        // Requests of a vetoed version that still end were sent before the veto: they are neither new evidence nor a
        // baseline.
        let vetoes = &self.vetoes;
        let in_service = observed.iter().filter(|version| vetoes.iter().all(|veto| veto.version != version.name));
        let mut all = Counted::default();
        for version in in_service.clone() {
            if let Some(watched) = self.versions.get_mut(version.name) {
                watched.look(version);
                all.add(&watched.batch());
            }
        }
        if all.ended.answered() < BATCH {
            return false;
        }
        let many = self.many_clients;
        for version in in_service {
            if let Some(watched) = self.versions.get_mut(version.name) {
                watched.close_batch(&all, many);
            }
        }
        self.start_batch(observed);
        true
    }

    /// Vetoes the versions with enough evidence, worst first, if they can be spared. Returns whether any was vetoed.
    fn veto_whom_evidence_is_against(&mut self, now: u64, observed: &[Observed<'_>]) -> bool {
        let enough = -libm::log(self.policy.false_veto_rate);
        let many = self.many_clients;
        let mut accused: Vec<(f64, &Observed<'_>)> = Vec::new();
        for version in observed.iter().filter(|version| !self.is_vetoed(version.name)) {
            let evidence = self.versions.get(version.name).and_then(|watched| watched.evidence_of(many));
            let evidence = evidence.filter(|evidence| *evidence >= enough);
            accused.extend(evidence.map(|evidence| (evidence, version)));
        }
        accused.sort_unstable_by(|(a, _), (b, _)| b.total_cmp(a));
        let before = self.vetoes.len();
        for (_, version) in accused {
            // Drop evidence even if it cannot be acted on: a version that can be spared later is judged by its later
            // requests.
            let Some(watched) = self.versions.get_mut(version.name) else { continue };
            let of_clients = watched.clients.forget();
            let of_requests = watched.forget();
            let since = if many { of_clients } else { of_requests };
            let Batch { requests, errors, others_requests, others_errors, .. } = since;
            if !self.can_be_spared(version, observed) {
                continue;
            }
            let name = version.name;
            let strikes = self.past.extract_if(.., |veto| veto.version == name).map(|veto| veto.strikes).max();
            let strikes = strikes.unwrap_or(0).saturating_add(1);
            let until = now.saturating_add(self.policy.cool_down_for(strikes));
            let version = name.to_owned();
            self.vetoes.push(Veto { version, until, strikes, requests, errors, others_requests, others_errors });
        }
        self.vetoes.len() != before
    }

    /// Whether the other versions in service can replace a version: it has at most half of the total weight (a version
    /// with more is the baseline of the others, and moving that much traffic is up to the controller, which knows their
    /// capacity), and one of them has weight.
    fn can_be_spared(&self, version: &Observed<'_>, observed: &[Observed<'_>]) -> bool {
        let in_service = observed.iter().filter(|other| other.serving && !self.is_vetoed(other.name));
        let others = in_service.filter(|other| other.name != version.name);
        let others: u64 = others.map(|other| u64::from(other.weight)).sum();
        version.serving && !version.stable && others > 0 && u64::from(version.weight) <= others
    }
}

impl VersionWindow {
    fn start_batch(&mut self, version: &Observed<'_>) {
        self.base = Counted::of(version);
        (self.seen, self.looks, self.most) = (self.base, 0, 0);
    }

    fn look(&mut self, version: &Observed<'_>) {
        let now = Counted::of(version);
        let news = now.dealt.since(&self.seen.dealt);
        self.seen = now;
        if news.error > 0 {
            let is_failing = news.error >= news.answered().saturating_sub(news.error);
            self.looks += 1;
            self.most += if is_failing { news.error.min(MOST_PER_LOOK) } else { 1 };
        }
        self.clients.looks += u64::from(std::mem::take(&mut self.clients.failed));
    }

    /// The counts of the running batch.
    fn batch(&self) -> Counted {
        self.seen.since(&self.base)
    }

    /// Adds the running batch, which has these counts for all versions.
    fn close_batch(&mut self, all: &Counted, many_clients: bool) {
        let own = self.batch();
        let others = all.since(&own);
        let batch_of = |own: &Counts, others: &Counts| Batch {
            requests: own.answered(),
            errors: own.error,
            others_requests: others.answered(),
            others_errors: others.error,
            ..Batch::default()
        };
        let (started, others_started) = (own.started, others.started);
        let batch = Batch { started, others_started, ..batch_of(&own.dealt, &others.dealt) };
        self.evidence.add(&batch, self.most);
        self.since += batch;
        self.since_looks += self.looks;
        self.clients.since += batch_of(&own.ended, &others.ended);
        // Dropping evidence early breaks no bound.
        let is_rare = |since: &Batch| since.errors.saturating_mul(FAILING_ONE_IN) < since.requests;
        // With many clients, requests may come from a malicious one, and are no evidence if other clients later leave.
        if many_clients || self.evidence.is_none() || is_rare(&self.since) {
            self.forget();
        }
        if self.clients.is_none() || is_rare(&self.clients.since) {
            self.clients.forget();
        }
    }

    /// The logarithm of the evidence, if errors were seen at enough looks: from clients if there are many of them;
    /// otherwise from users of sessions or from requests.
    fn evidence_of(&self, many_clients: bool) -> Option<f64> {
        let of_clients = (self.clients.looks >= FEWEST_LOOKS).then(|| log_mean_exp(&self.clients.sums));
        let of_requests = (!many_clients && self.since_looks >= FEWEST_LOOKS).then(|| self.evidence.log());
        of_clients.into_iter().chain(of_requests).max_by(f64::total_cmp)
    }

    /// Discards the evidence and returns what had ended since it began.
    fn forget(&mut self) -> Batch {
        (self.evidence, self.since_looks) = Default::default();
        std::mem::take(&mut self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const START: u64 = 1_800_000_000 * SECOND;
    const SECOND: u64 = 1_000_000_000;
    const LOOK: u64 = SECOND / 10;

    /// A proxy that serves one service, evaluated ten times a second.
    struct Proxy {
        guard: Guard,
        now: u64,
        versions: Vec<(&'static str, u32, bool, Counts)>,
    }

    impl Proxy {
        /// Versions with their weights, all in service.
        fn new(weights: &[(&'static str, u32)]) -> Self {
            let versions = weights.iter().map(|(name, weight)| (*name, *weight, true, Counts::default())).collect();
            let mut proxy = Self { guard: Guard::new(GuardPolicy::default()), now: START, versions };
            proxy.look();
            proxy
        }

        fn look(&mut self) -> bool {
            let observed = self.versions.iter().map(|(name, weight, serving, ended)| Observed {
                name,
                weight: *weight,
                serving: *serving,
                ended: *ended,
                ..Observed::default()
            });
            self.now += LOOK;
            self.guard.observe(self.now, &observed.collect::<Vec<_>>())
        }

        fn counts(&mut self, version: &str) -> &mut Counts {
            self.versions.iter_mut().find(|(name, ..)| *name == version).map(|(.., counts)| counts).unwrap()
        }

        /// Runs this many looks, before each of which these versions answer and fail this many requests. Returns the
        /// number of looks until the vetoes changed.
        fn serve(&mut self, looks: u64, ended: &[(&str, u64, u64)]) -> Option<u64> {
            (1..=looks).find(|_| {
                for (version, ok, errors) in ended {
                    self.counts(version).ok += ok;
                    self.counts(version).error += errors;
                }
                self.look()
            })
        }

        fn vetoed(&self) -> Vec<&str> {
            self.guard.vetoes().iter().map(|veto| veto.version.as_str()).collect()
        }

        /// Makes v2 fail every request until it is vetoed. Returns the duration of the veto.
        fn fail_v2(&mut self) -> u64 {
            assert!(self.serve(20, &[("v1", 9, 0), ("v2", 0, 1)]).is_some());
            (self.guard.vetoes()[0].until - self.now) / SECOND
        }
    }

    #[test]
    fn a_version_that_fails_everything_is_out_within_a_second() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        assert_eq!(proxy.serve(100, &[("v1", 9, 0), ("v2", 1, 0)]), None);
        assert_eq!(proxy.serve(100, &[("v1", 9, 0), ("v2", 0, 1)]), Some(8));
        let veto = Veto {
            version: "v2".to_owned(),
            until: proxy.now + 10 * SECOND,
            strikes: 1,
            requests: 8,
            errors: 8,
            others_requests: 72,
            others_errors: 0,
        };
        assert_eq!(proxy.guard.vetoes(), [veto]);
    }

    /// A report may claim only what a guard can have seen.
    #[test]
    fn a_veto_of_the_guard_is_possible_and_a_made_up_one_is_not() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        proxy.fail_v2();
        let (own, others) = (*proxy.counts("v2"), *proxy.counts("v1"));
        let (policy, now) = (GuardPolicy::default(), proxy.now);
        let veto = proxy.guard.vetoes()[0].clone();
        let impossible = |veto: &Veto| veto.impossible(&policy, false, &own, &others, now);
        assert_eq!(impossible(&veto), None);
        assert!(veto.impossible(&policy, true, &own, &others, now).is_some(), "of the stable version");
        let off = GuardPolicy { enabled: false, ..policy.clone() };
        assert!(veto.impossible(&off, false, &own, &others, now).is_some(), "by a guard that is off");
        let strict = GuardPolicy { false_veto_rate: 1e-12, ..policy.clone() };
        let few = Veto { requests: 5, errors: 5, ..veto.clone() };
        assert!(impossible(&few).is_none() && few.impossible(&strict, false, &own, &others, now).is_some());
        for made_up in [
            Veto { requests: 1_000, errors: 1_000, ..veto.clone() },
            Veto { errors: 4, requests: 4, ..veto.clone() },
            Veto { errors: veto.requests + 1, ..veto.clone() },
            Veto { others_requests: others.answered() + 1, ..veto.clone() },
            Veto { others_requests: 10, others_errors: 10, ..veto.clone() },
            Veto { until: u64::MAX, ..veto.clone() },
            Veto { strikes: 0, ..veto.clone() },
            Veto { requests: u64::MAX, errors: u64::MAX, others_requests: u64::MAX, ..veto.clone() },
        ] {
            assert!(impossible(&made_up).is_some(), "{made_up:?}");
        }
    }

    /// Even by the same few clients again, after its veto has expired.
    #[test]
    fn a_version_that_fails_every_client_is_vetoed_again_and_again() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        let mut strikes = Vec::new();
        for i in 0..3_000u32 {
            let is_out = proxy.vetoed() == ["v2"];
            let request = Request { client: i % 5, is_target: true, outcome: Outcome::Error, ..Request::default() };
            let failed = if is_out { 0 } else { 1 };
            let heard = [("v2", request)];
            proxy.guard.hear(proxy.now, false, if is_out { &[] } else { &heard });
            if proxy.serve(1, &[("v1", 9, 0), ("v2", 0, failed)]).is_some() {
                strikes.extend(proxy.guard.vetoes().iter().map(|veto| veto.strikes));
            }
        }
        assert_eq!(strikes, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn errors_at_few_looks_veto_nobody() {
        let mut proxy = Proxy::new(&[("v1", 99), ("v2", 1)]);
        assert_eq!(proxy.serve(4, &[("v1", 990, 0), ("v2", 0, 10)]), None);
        assert_eq!(proxy.serve(1, &[("v1", 990, 0), ("v2", 0, 10)]), Some(1));
    }

    #[test]
    fn what_fails_for_all_is_nobodys_fault() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        assert_eq!(proxy.serve(1_000, &[("v1", 0, 9), ("v2", 0, 1)]), None);
    }

    #[test]
    fn a_few_errors_among_many_answers_veto_nobody() {
        let mut proxy = Proxy::new(&[("v1", 50), ("v2", 50)]);
        assert_eq!(proxy.serve(10_000, &[("v1", 100, 0), ("v2", 99, 1)]), None);
        assert!(proxy.serve(100, &[("v1", 100, 0), ("v2", 97, 3)]).is_some());
    }

    #[test]
    fn requests_that_clients_ended_are_no_requests() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        let mut vetoed = None;
        for look in 1..20 {
            // If they did, v2 would fail one of 100, and each look would close a batch.
            proxy.counts("v1").cancelled += 100;
            proxy.counts("v2").cancelled += 99;
            if proxy.serve(1, &[("v1", 5, 0), ("v2", 0, 1)]).is_some() {
                vetoed = Some((look, proxy.guard.vetoes()[0].requests));
                break;
            }
        }
        assert_eq!(vetoed, Some((10, 10)));
    }

    #[test]
    fn what_carries_most_or_all_stays() {
        let fails = |weights: &[(&'static str, u32)]| {
            let mut proxy = Proxy::new(weights);
            proxy.serve(100, &[("v1", 6, 0), ("v2", 0, 4)]).is_some()
        };
        assert!(fails(&[("v1", 50), ("v2", 50)]));
        assert!(fails(&[("v1", 50), ("v2", 0)]), "rules may send requests to it");
        assert!(!fails(&[("v1", 49), ("v2", 51)]));
        assert!(!fails(&[("v1", 0), ("v2", 1)]), "no other version has weight");
        assert!(!fails(&[("v1", 0), ("v2", 0)]), "no version has weight");

        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        proxy.versions[0].2 = false;
        assert_eq!(proxy.serve(100, &[("v1", 9, 0), ("v2", 0, 1)]), None);
        // A version that can be spared from now on is not judged by earlier complete evidence.
        proxy.versions[0].2 = true;
        assert_eq!(proxy.serve(100, &[("v1", 9, 0), ("v2", 0, 1)]), Some(4));
    }

    #[test]
    fn a_veto_ends_when_nobody_else_is_left() {
        // Out of service or without weight.
        for (weight, serving) in [(90, false), (0, true), (0, false)] {
            let mut proxy = Proxy::new(&[("v1", 80), ("v2", 10), ("v3", 10)]);
            proxy.fail_v2();
            assert!(proxy.serve(20, &[("v1", 9, 0), ("v3", 0, 1)]).is_some());
            (proxy.versions[0].1, proxy.versions[0].2) = (weight, serving);
            assert!(proxy.look(), "at the next look");
            assert!(proxy.vetoed().is_empty(), "of v2 and v3, that fail alike, both");
            // New evidence judges both, and their past vetoes still count.
            assert_eq!(proxy.serve(100, &[("v2", 0, 10), ("v3", 0, 10)]), None);
            (proxy.versions[0].1, proxy.versions[0].2) = (80, true);
            assert_eq!(proxy.serve(100, &[("v1", 9, 0), ("v3", 1, 0)]), None);
            assert_eq!(proxy.fail_v2(), 20);
        }
        // Another version remains.
        let mut proxy = Proxy::new(&[("v1", 80), ("v2", 10), ("v3", 10)]);
        proxy.fail_v2();
        proxy.versions[0].2 = false;
        assert!(!proxy.look() && proxy.vetoed() == ["v2"]);
    }

    #[test]
    fn of_several_that_fail_the_worst_goes_first_and_one_stays() {
        // v1 has no weight, but receives the requests of a rule. Both have enough evidence at the same look.
        let mut proxy = Proxy::new(&[("v1", 0), ("v2", 50), ("v3", 50)]);
        let ended = [("v1", 980, 0), ("v2", 0, 10), ("v3", 0, 5)];
        assert_eq!(proxy.serve(10, &ended), Some(FEWEST_LOOKS));
        assert_eq!(proxy.vetoed(), ["v3"]);
        assert_eq!(proxy.serve(90, &ended), None);

        let mut proxy = Proxy::new(&[("v1", 40), ("v2", 30), ("v3", 30)]);
        assert!(proxy.serve(100, &[("v1", 98, 0), ("v2", 0, 1), ("v3", 0, 1)]).is_some());
        assert_eq!(proxy.vetoed(), ["v2", "v3"]);
    }

    #[test]
    fn each_veto_lasts_twice_as_long_until_there_was_none_for_a_while() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        for expected in [10, 20, 40, 80, 160, 300, 300] {
            assert_eq!(proxy.fail_v2(), expected);
            assert_eq!(proxy.serve(expected * 10 - 1, &[("v1", 10, 0)]), None);
            assert_eq!(proxy.serve(1, &[("v1", 10, 0)]), Some(1));
            assert!(proxy.vetoed().is_empty());
        }
        assert_eq!(proxy.guard.past()[0].strikes, 7);
        assert_eq!(proxy.serve(2_980, &[("v1", 9, 0), ("v2", 1, 0)]), None);
        assert_eq!(proxy.fail_v2(), 300);
        assert_eq!(proxy.serve(3_000, &[("v1", 10, 0)]), Some(3_000));
        assert_eq!(proxy.serve(3_000, &[("v1", 9, 0), ("v2", 1, 0)]), None);
        assert_eq!(proxy.guard.past(), []);
        assert_eq!(proxy.fail_v2(), 10);
    }

    #[test]
    fn what_arrives_late_counts_against_nobody() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        proxy.fail_v2();
        assert_eq!(proxy.serve(99, &[("v1", 9, 0), ("v2", 0, 1)]), None);
        assert_eq!(proxy.serve(1, &[("v1", 9, 0), ("v2", 0, 1)]), Some(1));
        assert_eq!(proxy.serve(7, &[("v1", 9, 0), ("v2", 0, 1)]), None);
        assert_eq!(proxy.guard.versions["v2"].since.errors, 7);
    }

    #[test]
    fn a_clock_that_jumps_keeps_nobody_out_for_ever() {
        let mut proxy = Proxy::new(&[("v1", 90), ("v2", 10)]);
        proxy.fail_v2();
        proxy.now -= 1_000 * SECOND;
        assert_eq!(proxy.serve(2_999, &[]), None);
        assert_eq!(proxy.serve(10, &[]), Some(2));
        proxy.now = 0;
        assert_eq!(proxy.fail_v2(), 20);
        proxy.now = u64::MAX - LOOK;
        assert!(proxy.look() && proxy.vetoed().is_empty());
    }

    #[test]
    fn counts_from_before_are_no_news() {
        let mut proxy = Proxy::new(&[("v1", 90)]);
        proxy.serve(10, &[("v1", 10, 0)]);
        proxy.versions.push(("v2", 10, true, Counts { ok: 1_000, error: 1_000, ..Counts::default() }));
        assert_eq!(proxy.serve(2, &[("v1", 10, 0)]), None);
        assert_eq!(proxy.guard.versions["v2"].since, Batch::default());
        // Nor are those of a counter that was reset.
        *proxy.counts("v2") = Counts { error: 1_100, ..Counts::default() };
        assert_eq!(proxy.serve(2, &[("v1", 10, 0)]), None);
        assert_eq!(proxy.guard.versions["v2"].since, Batch::default());
        assert!(proxy.serve(9, &[("v1", 9, 0), ("v2", 0, 1)]).is_some());
    }

    #[test]
    fn vetoes_go_with_their_versions_and_with_the_guard() {
        let mut proxy = Proxy::new(&[("v1", 80), ("v2", 10), ("v3", 10)]);
        proxy.fail_v2();
        let v2 = proxy.versions.remove(1);
        assert!(proxy.look() && proxy.vetoed().is_empty());
        proxy.versions.push(v2);
        proxy.look();
        assert_eq!(proxy.fail_v2(), 10);

        proxy.guard.set_policy(GuardPolicy { enabled: false, ..GuardPolicy::default() });
        assert!(proxy.look() && proxy.vetoed().is_empty());
        assert_eq!(proxy.serve(100, &[("v1", 9, 0), ("v2", 0, 1)]), None);
        proxy.guard.set_policy(GuardPolicy::default());
        proxy.look();
        assert_eq!(proxy.fail_v2(), 10);
    }

    #[test]
    fn another_vm_takes_over() {
        let mut proxy = Proxy::new(&[("v1", 80), ("v2", 10), ("v3", 10)]);
        proxy.fail_v2();
        proxy.serve(100, &[("v1", 10, 0)]);
        assert!(proxy.serve(9, &[("v1", 9, 0), ("v3", 0, 1)]).is_some());
        let left: Vec<_> = proxy.guard.vetoes().iter().chain(proxy.guard.past()).collect();
        let left: Vec<Veto> = serde_json::from_str(&serde_json::to_string(&left).unwrap()).unwrap();
        proxy.guard = Guard::resume(GuardPolicy::default(), proxy.now, left);
        assert_eq!(proxy.vetoed(), ["v3"]);
        assert_eq!(proxy.serve(98, &[("v1", 10, 0)]), None);
        assert_eq!(proxy.serve(98, &[("v1", 10, 0)]), Some(2));
        assert_eq!(proxy.fail_v2(), 20);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn one_with_weight_stays_whatever_is_counted(
            looks in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<[u64; 4]>(), 3)), 1..40),
            weights in prop::collection::vec(0u32..4, 120), serving in prop::collection::vec(any::<bool>(), 120),
        ) {
            let mut guard = Guard::new(GuardPolicy { false_veto_rate: 0.01, ..GuardPolicy::default() });
            for (look, (now, counts)) in looks.into_iter().enumerate() {
                let (weights, serving) = (&weights[3 * look..], &serving[3 * look..]);
                let observed: Vec<_> = counts.iter().enumerate().map(|(i, [ok, error, client_error, cancelled])| {
                    let (ok, error, client_error, cancelled) = (*ok, *error, *client_error, *cancelled);
                    let ended = Counts { ok, error, client_error, cancelled };
                    Observed { name: ["a", "b", "c"][i], weight: weights[i], serving: serving[i], ended, ..Observed::default() }
                }).collect();
                guard.observe(now, &observed);
                let has_weight = |v: &&Observed<'_>| v.serving && v.weight > 0;
                let stays = |v: &&Observed<'_>| guard.vetoes().iter().all(|veto| veto.version != v.name);
                let weighty = observed.iter().filter(has_weight);
                prop_assert!(weighty.clone().count() == 0 || weighty.filter(stays).count() > 0);
                prop_assert!(guard.vetoes().iter().all(|veto| veto.until <= now.saturating_add(300 * SECOND)));
            }
        }
    }

    fn read(value: Value) -> Result<GuardPolicy, Vec<String>> {
        let read = Decoder::read(&value, |d, v| d.within("guard", |d| GuardPolicy::read(d, v)));
        read.map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_policy_left_out_is_the_usual_one() {
        assert_eq!(read(json!({})), Ok(GuardPolicy::default()));
        let longer = read(json!({"coolDownSeconds": 600})).map(|policy| policy.max_cool_down.as_secs());
        assert_eq!(longer, Ok(600));
    }

    #[test]
    fn a_policy_is_written_as_it_is_read() {
        let value =
            json!({"enabled": false, "falseVetoRate": 0.000001, "coolDownSeconds": 5, "maxCoolDownSeconds": 60});
        assert_eq!(read(value.clone()).map(|policy| serde_json::to_value(policy).ok()), Ok(Some(value)));
        let default = json!({"enabled": true, "falseVetoRate": 1e-7, "coolDownSeconds": 10, "maxCoolDownSeconds": 300});
        assert_eq!(serde_json::to_value(GuardPolicy::default()).ok(), Some(default));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        for (value, expected) in [
            (json!(true), "guard: true is not allowed; expected an object"),
            (json!({"enabled": 1}), "guard.enabled: 1 is not allowed; expected true or false"),
            (
                json!({"falseVetoRate": 0}),
                "guard.falseVetoRate: 0 is not allowed; expected a number from 1e-12 to 0.01",
            ),
            (json!({"falseVetoRate": "1e-6"}), "guard.falseVetoRate: \"1e-6\" is not allowed; expected a number from"),
            (
                json!({"coolDownSeconds": 0}),
                "guard.coolDownSeconds: 0 is not allowed; expected an integer from 1 to 86400",
            ),
            (
                json!({"coolDownSeconds": 60, "maxCoolDownSeconds": 59}),
                "guard.maxCoolDownSeconds: 59 is not allowed; expected at least coolDownSeconds, which is 60",
            ),
            (
                json!({"maxCoolDownSeconds": 9}),
                "guard.maxCoolDownSeconds: 9 is not allowed; expected at least coolDownSeconds, which is 10",
            ),
            (json!({"cooldownSeconds": 3}), "guard.cooldownSeconds: unknown field; did you mean `coolDownSeconds`?"),
        ] {
            let errors = read(value.clone()).err().unwrap_or_default();
            assert_eq!(errors.len(), 1, "{value}: {errors:?}");
            assert!(errors[0].starts_with(expected), "{}\nshould start with\n{expected}", errors[0]);
        }
    }
}
