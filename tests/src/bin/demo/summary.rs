//! The summary: the counts of each side, and whether they are equal.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{bail, ensure};
use console::{Style, style};
use tideshift_core::outcome::{Ending, ErrorCodes, Outcome};
use tideshift_tests::load::Tally;
use tideshift_tests::wait::eventually;

use crate::document::SERVICE;
use crate::stage::{Stage, V3, VERSIONS};
use crate::text::thousands;

/// How long the last report may take to reach the controller.
const DEADLINE: Duration = Duration::from_secs(15);

/// A version's name and how requests ended.
type Key = (String, Outcome);
type Counts = BTreeMap<Key, u64>;

/// The final output.
pub(crate) struct Summary {
    /// By version and outcome: the statuses that clients saw.
    statuses: BTreeMap<Key, Vec<String>>,
    client: Counts,
    backends: Counts,
    envoy: Counts,
    controller: Counts,
    sent: u64,
    unanswered: u64,
    /// Errors of v3, which is meant to fail.
    expected: u64,
    /// All other errors, and requests without a response.
    unexpected: u64,
    failures: Vec<String>,
    taken_back: Option<[String; 2]>,
    difference: Option<String>,
}

/// Waits until the counts of all sides equal the client's; reports if they never do.
pub(crate) async fn take(stage: &mut Stage, tally: &Tally) -> anyhow::Result<Summary> {
    let mut client = Counts::new();
    let mut statuses = BTreeMap::<Key, Vec<String>>::new();
    for ((version, status), count) in &tally.by {
        let ending = Ending { status: Some(*status), ..Ending::default() };
        let key = (version.clone(), ErrorCodes::default().outcome(&ending));
        *client.entry(key.clone()).or_default() += count;
        statuses.entry(key).or_default().push(status.to_string());
    }
    let expected = tally.of_class(V3, 5);
    let mut summary = Summary {
        statuses,
        client,
        backends: Counts::new(),
        envoy: Counts::new(),
        controller: Counts::new(),
        sent: tally.sent,
        unanswered: tally.failed,
        expected,
        unexpected: tally.bad() - expected,
        failures: tally.failures.clone(),
        taken_back: taken_back(tally, V3),
        difference: None,
    };
    let equal = eventually("the last report", DEADLINE, async || summary.ask(stage).await).await;
    summary.difference = equal.err().map(|error| format!("{error:#}"));
    Ok(summary)
}

/// How long the broken version continued to receive requests.
fn taken_back(tally: &Tally, version: &str) -> Option<[String; 2]> {
    let times = tally.times.get(version)?;
    let seconds = times.last_sent.saturating_duration_since(times.first_error?).as_secs_f64();
    let (requests, errors) = (thousands(tally.of(version)), thousands(tally.of_class(version, 5)));
    Some([
        format!("{version} was taken back in {seconds:.2} s, after {requests} requests, {errors} of them errors"),
        style(format!("(from the first error that a client saw to the last request that {version} got)"))
            .dim()
            .to_string(),
    ])
}

impl Summary {
    /// Collects the counts of all sides; fails if they differ.
    async fn ask(&mut self, stage: &mut Stage) -> anyhow::Result<()> {
        self.backends = VERSIONS.iter().flat_map(|version| of_backends(stage, version)).collect();
        let by_version = stage.envoy().prometheus().await?.requests_by_version(SERVICE);
        let outcome = |label: &str| Outcome::ALL.into_iter().find(|outcome| outcome.label() == label);
        let known = by_version.into_iter().filter_map(|((version, label), n)| Some(((version, outcome(&label)?), n)));
        self.envoy = known.filter(|(_, count)| *count > 0).collect();

        let status = stage.status().await?;
        let counts = status.versions.iter().flat_map(|version| {
            Outcome::ALL.map(|outcome| ((version.name.clone(), outcome), version.requests.of(outcome)))
        });
        self.controller = counts.filter(|(_, count)| *count > 0).collect();
        ensure!(status.unrouted == 0, "{} requests found no version in service", status.unrouted);
        for (who, counts) in self.others() {
            if let Some(key) = self.keys().into_iter().find(|key| counts.get(key) != self.client.get(key)) {
                let [theirs, ours] = [counts, &self.client].map(|counts| counts.get(&key).copied().unwrap_or_default());
                bail!("{who} counted {theirs} of {} {}, the client {ours}", key.0, key.1.label());
            }
        }
        Ok(())
    }

    fn others(&self) -> [(&'static str, &Counts); 3] {
        [("the backends", &self.backends), ("the filter", &self.envoy), ("the controller", &self.controller)]
    }

    fn keys(&self) -> Vec<Key> {
        let all = [&self.client, &self.backends, &self.envoy, &self.controller];
        let mut keys: Vec<Key> = all.into_iter().flat_map(BTreeMap::keys).cloned().collect();
        keys.sort();
        keys.dedup();
        keys
    }

    /// Whether all counts are equal and nothing failed unexpectedly.
    pub(crate) fn is_fine(&self) -> bool {
        self.difference.is_none() && self.unexpected == 0 && self.expected > 0
    }

    /// The whole summary, in lines.
    pub(crate) fn lines(&self, took: Duration) -> Vec<String> {
        let columns = ["version", "status", "client", "backends", "filter in Envoy", "controller"];
        let mut lines = vec![String::new(), style(row(columns.map(str::to_owned))).dim().to_string()];
        for key in self.keys() {
            let of = |counts: &Counts| thousands(counts.get(&key).copied().unwrap_or_default());
            let status =
                self.statuses.get(&key).map_or_else(|| key.1.label().to_owned(), |statuses| statuses.join(", "));
            let counted = [&self.client, &self.backends, &self.envoy, &self.controller].map(of);
            let [client, backends, envoy, controller] = counted;
            lines.push(row([key.0.clone(), status, client, backends, envoy, controller]));
        }
        let sum = |counts: &Counts| thousands(counts.values().sum());
        let [client, backends, envoy, controller] =
            [&self.client, &self.backends, &self.envoy, &self.controller].map(sum);
        lines.push(
            style(row(["all".to_owned(), String::new(), client, backends, envoy, controller])).bold().to_string(),
        );
        lines.push(String::new());
        lines.extend(self.verdicts());
        lines.push(format!("  all of it in {:.0} s", took.as_secs_f64()));
        lines
    }

    fn verdicts(&self) -> Vec<String> {
        let (good, bad) = (Style::new().green(), Style::new().red().bold());
        let mut verdicts = Vec::new();
        verdicts.push(match &self.difference {
            None => format!("  {} for each version and outcome: all four counted the same", good.apply_to("equal")),
            Some(difference) => format!("  {}: {difference}", bad.apply_to("not equal")),
        });
        let failed = match self.unexpected {
            0 => good.apply_to("0 failed".to_owned()),
            failed => bad.apply_to(format!("{} failed", thousands(failed))),
        };
        let (sent, answered) = (thousands(self.sent), thousands(self.sent - self.unanswered));
        let expected = thousands(self.expected);
        verdicts.push(format!("  {sent} sent, {answered} answered, {failed} other than the {expected} errors of v3"));
        verdicts.extend(self.failures.iter().take(3).map(|failure| format!("    {failure}")));
        match &self.taken_back {
            Some(lines) => verdicts.extend(lines.iter().map(|line| format!("  {line}"))),
            None => {
                verdicts.push(format!("  {}", bad.apply_to("no client saw v3 fail: there was nothing to take back")))
            }
        }
        verdicts
    }
}

fn of_backends(stage: &Stage, version: &'static str) -> Vec<(Key, u64)> {
    let counts = stage.endpoints(version).iter().map(|endpoint| endpoint.counts());
    let (requests, errors) =
        counts.fold((0, 0), |(requests, errors), counts| (requests + counts.requests, errors + counts.errors));
    let by_outcome = [(Outcome::Ok, requests - errors), (Outcome::Error, errors)];
    by_outcome
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(outcome, count)| ((version.to_owned(), outcome), count))
        .collect()
}

fn row([version, status, client, backends, envoy, controller]: [String; 6]) -> String {
    format!("  {version:<8} {status:<8} {client:>9} {backends:>9} {envoy:>16} {controller:>11}")
}
