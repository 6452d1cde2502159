//! The counts of one version, from one run of a proxy or from all of them.

use super::MOST_DURATIONS;
use serde::{Deserialize, Serialize};
use tideshift_core::counts::Counts;
use tideshift_core::protocol::report::{Tally, VersionReport};

/// The counts of one version.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "KeptTotal", into = "KeptTotal")]
pub struct Total {
    /// Requests that were assigned by weight.
    pub dealt: Tally,
    /// Requests that were assigned by a session, and those that a rule matched; few versions have any.
    others: Option<Box<[Tally; 2]>>,
    /// Requests that did not reach the version.
    pub misrouted: u64,
}

/// [`Total`] in its persisted form. Before format 4 there were only sums.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptTotal {
    #[serde(flatten)]
    counts: Option<Counts>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    durations: Vec<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dealt: Option<Tally>,
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    session: Tally,
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    rule: Tally,
    #[serde(default)]
    misrouted: u64,
}

impl From<KeptTotal> for Total {
    fn from(kept: KeptTotal) -> Self {
        let KeptTotal { counts, durations, dealt, session, rule, misrouted } = kept;
        // Without information on how requests were chosen, they count as assigned by weight.
        let dealt = dealt.unwrap_or_else(|| {
            let ended = counts.unwrap_or_default();
            Tally { started: ended.total(), ended, durations, waited: Vec::new() }
        });
        Self { dealt, others: pair(session, rule), misrouted }
    }
}

impl From<Total> for KeptTotal {
    fn from(total: Total) -> Self {
        let [session, rule] = total.others.map_or_else(Default::default, |others| *others);
        let Total { dealt, misrouted, .. } = total;
        Self { counts: None, durations: Vec::new(), dealt: Some(dealt), session, rule, misrouted }
    }
}

fn pair(session: Tally, rule: Tally) -> Option<Box<[Tally; 2]>> {
    (!session.is_empty() || !rule.is_empty()).then(|| Box::new([session, rule]))
}

impl Total {
    /// From requests by how their version was chosen.
    pub(super) fn new(dealt: Tally, session: Tally, rule: Tally, misrouted: u64) -> Self {
        Self { dealt, others: pair(session, rule), misrouted }
    }

    /// From a version's part of a report.
    pub(super) fn of(version: &VersionReport, format: u32) -> Self {
        let by_choice = version.by_choice(format).map(|mut tally| {
            tally.durations.truncate(MOST_DURATIONS);
            tally.waited.truncate(MOST_DURATIONS);
            tally
        });
        let [dealt, session, rule] = by_choice;
        Self::new(dealt, session, rule, version.misrouted)
    }

    /// Requests that were assigned by a session.
    pub fn session(&self) -> Option<&Tally> {
        self.others.as_deref().map(|[session, _]| session)
    }

    /// Requests that a rule matched.
    pub(super) fn rule(&self) -> Option<&Tally> {
        self.others.as_deref().map(|[_, rule]| rule)
    }

    /// All tallies, by how the version was chosen.
    pub(super) fn all(&self) -> impl Iterator<Item = &Tally> {
        std::iter::once(&self.dealt).chain(self.others.iter().flat_map(|others| others.iter()))
    }

    /// All requests by outcome.
    pub fn counts(&self) -> Counts {
        self.all().fold(Counts::default(), |sum, tally| sum + tally.ended)
    }

    /// Requests that no rule matched.
    pub fn without_rules(&self) -> Tally {
        let mut sum = self.dealt.clone();
        self.session().into_iter().for_each(|session| sum += session);
        sum
    }

    /// The difference from `before`.
    pub fn since(&self, before: &Self) -> Self {
        let nothing = [Tally::default(), Tally::default()];
        let [session, rule] = self.others.as_deref().unwrap_or(&nothing);
        let [session_before, rule_before] = before.others.as_deref().unwrap_or(&nothing);
        Self {
            dealt: self.dealt.since(&before.dealt),
            others: pair(session.since(session_before), rule.since(rule_before)),
            misrouted: self.misrouted.saturating_sub(before.misrouted),
        }
    }

    /// Adds other counts.
    pub(super) fn add(&mut self, more: &Self) {
        self.dealt += &more.dealt;
        if let Some(more) = &more.others {
            let others = self.others.get_or_insert_default();
            others.iter_mut().zip(more.iter()).for_each(|(sum, more)| *sum += more);
        }
        self.misrouted = self.misrouted.saturating_add(more.misrouted);
    }

    /// Whether any count of ended requests is lower than in `before`.
    pub(super) fn any_below(&self, before: &Self) -> bool {
        let nothing = [Tally::default(), Tally::default()];
        let (own, other) = (self.others.as_deref().unwrap_or(&nothing), before.others.as_deref().unwrap_or(&nothing));
        let others = own.iter().zip(other).any(|(own, before)| own.any_below(before));
        self.dealt.any_below(&before.dealt) || others || self.misrouted < before.misrouted
    }
}
