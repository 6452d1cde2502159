//! The guard: takes a version that fails out of service in this proxy, from the proxy's own counts, within about a
//! second and without asking anybody; and gives it its traffic back after a while, to try again.
//!
//! What it knows, what it bounds, how fast it is and what it cannot see: `docs/guard.md`.

use crate::decode::Decoder;
use crate::evidence::{Batch, RecentEvidence};
use crate::report::Counts;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// Requests that make a batch. Fewer, and at low traffic each batch would be of one version, with nothing to compare;
/// more, and at 100 requests a second a batch would take longer to fill than a look is worth waiting for.
const BATCH: u64 = 20;
/// A version that fails fewer than one in so many requests does not fail in the guard's sense, however well the others
/// do; nor do errors count together that are further apart.
const FAILING_ONE_IN: u64 = 100;

/// How a service is guarded.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "WrittenGuardPolicy")]
pub struct GuardPolicy {
    /// Whether it is.
    pub enabled: bool,
    /// α: a version that is no worse than the others is vetoed once in 1/α looks that saw an error, at most.
    pub false_veto_rate: f64,
    /// How long the first veto on a version lasts; each further one twice as long as the one before.
    pub cool_down: Duration,
    /// The longest that a veto lasts, and the time without one after which the next is a first one again.
    pub max_cool_down: Duration,
}

/// [`GuardPolicy`] as documents have it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenGuardPolicy {
    enabled: bool,
    false_veto_rate: f64,
    cool_down_seconds: u64,
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
            false_veto_rate: 1e-6,
            cool_down: Duration::from_secs(10),
            max_cool_down: Duration::from_secs(300),
        }
    }
}

impl GuardPolicy {
    /// Whether a document need not say it.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        const LONGEST_SECONDS: u64 = 24 * 3600;
        let default = Self::default();
        let mut f = d.object(value)?;
        let enabled = f.optional(d, "enabled", Decoder::boolean).unwrap_or(default.enabled);
        let rate = f.optional(d, "falseVetoRate", rate).unwrap_or(default.false_veto_rate);
        let mut seconds = |d: &mut Decoder, name| {
            f.optional(d, name, |d, v| d.integer(v, 1, LONGEST_SECONDS)).map(Duration::from_secs)
        };
        let cool_down = seconds(d, "coolDownSeconds").unwrap_or(default.cool_down);
        let most = seconds(d, "maxCoolDownSeconds");
        f.finish(d);
        if let Some(most) = most.filter(|most| *most < cool_down) {
            let allowed = format!("at least coolDownSeconds, which is {}", cool_down.as_secs());
            d.within("maxCoolDownSeconds", |d| d.invalid(&Value::from(most.as_secs()), allowed));
        }
        let max_cool_down = most.unwrap_or(default.max_cool_down.max(cool_down));
        Some(Self { enabled, false_veto_rate: rate, cool_down, max_cool_down })
    }

    /// How long a version's veto lasts that is its `strikes`th, in nanoseconds.
    pub fn cool_down_for(&self, strikes: u32) -> u64 {
        let doublings = strikes.saturating_sub(1).min(31);
        nanos(self.cool_down.saturating_mul(1 << doublings).min(self.max_cool_down))
    }
}

fn rate(d: &mut Decoder, value: &Value) -> Option<f64> {
    let rate = value.as_f64().filter(|rate| (1e-12..=0.01).contains(rate));
    if rate.is_none() {
        d.invalid(value, "a number from 1e-12 to 0.01");
    }
    rate
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What the proxy knows of one version when it asks the guard.
#[derive(Debug, Clone, Copy)]
pub struct Observed<'a> {
    /// The version's name.
    pub name: &'a str,
    /// Its weight in the service's own split.
    pub weight: u32,
    /// Whether the policy has it in service; vetoes are the guard's own knowledge.
    pub serving: bool,
    /// How the exchanges of this proxy ended, since its start.
    pub ended: Counts,
}

/// A version that the guard took out of service, and the counts that spoke against it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Veto {
    /// The version.
    pub version: String,
    /// When it gets its traffic back, in nanoseconds since 1970.
    pub until: u64,
    /// Which veto in a row this is, from 1.
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

/// The guard of one service: one for a proxy, asked about ten times a second.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    policy: GuardPolicy,
    versions: BTreeMap<String, Watched>,
    vetoes: Vec<Veto>,
    /// Vetoes that are over, for the next one's strikes.
    past: Vec<Veto>,
}

#[derive(Debug, Clone, Default)]
struct Watched {
    /// The counts at the start of the running batch.
    base: Counts,
    evidence: RecentEvidence,
    since: Tally,
}

/// Requests and errors since the evidence began.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    requests: u64,
    errors: u64,
    others_requests: u64,
    others_errors: u64,
}

impl Guard {
    /// A guard that knows nothing yet.
    pub fn new(policy: GuardPolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Takes over from another guard of the same proxy, which left its [`Guard::vetoes`] and [`Guard::past`].
    pub fn resume(policy: GuardPolicy, now: u64, left: impl IntoIterator<Item = Veto>) -> Self {
        let (vetoes, past) = left.into_iter().partition(|veto| veto.until > now);
        Self { policy, versions: BTreeMap::new(), vetoes, past }
    }

    /// Goes on by another policy; what is known stays.
    pub fn set_policy(&mut self, policy: GuardPolicy) {
        self.policy = policy;
    }

    /// The vetoes in force, as of the last [`Guard::observe`].
    pub fn vetoes(&self) -> &[Veto] {
        &self.vetoes
    }

    /// The vetoes that are over but not forgotten: the next one on the same version lasts longer.
    pub fn past(&self) -> &[Veto] {
        &self.past
    }

    /// Looks at the counts of every version of the service. `now` is in nanoseconds since 1970. Whether the vetoes in
    /// force are others than before.
    pub fn observe(&mut self, now: u64, observed: &[Observed<'_>]) -> bool {
        if !self.policy.enabled {
            let had_vetoes = !self.vetoes.is_empty();
            *self = Self::new(self.policy.clone());
            return had_vetoes;
        }
        let left = self.drop_those_that_left(observed);
        let ended = self.end_vetoes(now);
        // All counts of a batch must be of the same time, or they could not be compared. So whoever is new, or comes
        // back, or has counters that were reset, starts a new batch for all; what it counted before is no news.
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

    fn end_vetoes(&mut self, now: u64) -> bool {
        let most = nanos(self.policy.max_cool_down);
        // A clock that was set back keeps nobody out for longer, and no strike in mind.
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
            known.is_none_or(|known| version.ended.any_below(&known.base))
        })
    }

    fn start_batch(&mut self, observed: &[Observed<'_>]) {
        for version in observed {
            match self.versions.get_mut(version.name) {
                Some(watched) => watched.base = version.ended,
                None => {
                    let watched = Watched { base: version.ended, ..Watched::default() };
                    self.versions.insert(version.name.to_owned(), watched);
                }
            }
        }
    }

    /// Takes the running batch in if it is full.
    fn close_batch(&mut self, observed: &[Observed<'_>]) -> bool {
        // What still arrives of a vetoed version was sent before the veto: no news, and nothing to compare with.
        let vetoes = &self.vetoes;
        let in_service = observed.iter().filter(|version| !vetoes.iter().any(|veto| veto.version == version.name));
        let mut all = Counts::default();
        for version in in_service.clone() {
            if let Some(watched) = self.versions.get(version.name) {
                all += version.ended.since(&watched.base);
            }
        }
        if all.answered() < BATCH {
            return false;
        }
        for version in in_service {
            if let Some(watched) = self.versions.get_mut(version.name) {
                watched.take(&version.ended.since(&watched.base), &all);
            }
        }
        self.start_batch(observed);
        true
    }

    /// Vetoes whom it may, worst evidence first. Whether there was anybody.
    fn veto_whom_evidence_is_against(&mut self, now: u64, observed: &[Observed<'_>]) -> bool {
        let enough = -libm::log(self.policy.false_veto_rate);
        let mut accused: Vec<(f64, &Observed<'_>)> = Vec::new();
        for version in observed.iter().filter(|version| !self.is_vetoed(version.name)) {
            let evidence = self.versions.get(version.name).map(|watched| watched.evidence.log());
            accused.extend(evidence.filter(|evidence| *evidence >= enough).map(|evidence| (evidence, version)));
        }
        accused.sort_unstable_by(|(a, _), (b, _)| b.total_cmp(a));
        let before = self.vetoes.len();
        for (_, version) in accused {
            // Evidence that could not be acted on is gone too: who may be vetoed later is judged by what it does then.
            let Some(watched) = self.versions.get_mut(version.name) else { continue };
            let (Tally { requests, errors, others_requests, others_errors }, name) = (watched.since, version.name);
            (watched.evidence, watched.since) = Default::default();
            if !self.can_be_spared(version, observed) {
                continue;
            }
            let strikes = self.past.extract_if(.., |veto| veto.version == name).map(|veto| veto.strikes).max();
            let strikes = strikes.unwrap_or(0).saturating_add(1);
            let until = now.saturating_add(self.policy.cool_down_for(strikes));
            let version = name.to_owned();
            self.vetoes.push(Veto { version, until, strikes, requests, errors, others_requests, others_errors });
        }
        self.vetoes.len() != before
    }

    /// Whether the others in service can do without a version: it has at most half of their and its weight (what has
    /// more is what the others are measured by, and to move so much onto them is for the controller, who knows what
    /// they can carry), and one of them has weight.
    fn can_be_spared(&self, version: &Observed<'_>, observed: &[Observed<'_>]) -> bool {
        let in_service = observed.iter().filter(|other| other.serving && !self.is_vetoed(other.name));
        let others = in_service.filter(|other| other.name != version.name);
        let others: u64 = others.map(|other| u64::from(other.weight)).sum();
        version.serving && others > 0 && u64::from(version.weight) <= others
    }
}

impl Watched {
    /// Takes in what ended for this version in a batch, and for all.
    fn take(&mut self, own: &Counts, all: &Counts) {
        let others = all.since(own);
        self.evidence.add(&Batch::of(own.answered(), own.error, others.answered(), others.error));
        let since = &mut self.since;
        since.requests = since.requests.saturating_add(own.answered());
        since.errors = since.errors.saturating_add(own.error);
        since.others_requests = since.others_requests.saturating_add(others.answered());
        since.others_errors = since.others_errors.saturating_add(others.error);
        // Taking evidence away early breaks no bound.
        if self.evidence.is_none() || since.errors.saturating_mul(FAILING_ONE_IN) < since.requests {
            (self.evidence, self.since) = Default::default();
        }
    }
}
