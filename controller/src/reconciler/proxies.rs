//! The last report of each proxy: which policy it runs, its requests in flight, and its guards' vetoes.

use crate::clock::{Millis, timestamp};
use crate::reconciler::ledger::{RunKey, VersionKey};
use crate::rollout::Coverage;
use crate::status::{ProxyStatus, VetoStatus};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use tideshift_core::guard::Veto;
use tideshift_core::protocol::policy::Service;
use tideshift_core::protocol::report::{Refused, Report};

/// A proxy that is silent for longer is forgotten, and no drain waits for it.
pub(super) const SILENT: Millis = 60_000;
/// A proxy that is silent for longer does not count as live: it reports every second.
const LIVE: Millis = 5_000;
/// A run that is silent for longer is over, if a newer run of the same proxy has reported.
const SUPERSEDED: Millis = 5_000;
/// The most proxies in the status.
const MAX_PROXIES: usize = 20_000;
/// The limits for the reason of a refused policy in the status: the number of lines, and the characters in each.
const MAX_ERRORS: (usize, usize) = (20, 500);

/// All proxies that report, and those that reported to the previous controller.
#[derive(Debug, Default)]
pub(super) struct Proxies {
    runs: BTreeMap<RunKey, Proxy>,
    /// Sums over all runs. Drains are checked many times a second, and there may be thousands of proxies.
    sums: Sums,
    /// The runs with vetoes.
    vetoing: BTreeSet<RunKey>,
    /// How many changes have affected drains.
    changes: u64,
    /// Since when reports have been received: silence counts from then at the earliest.
    listening_since: Millis,
    /// No run last reported before this time.
    longest_ago: Millis,
}

/// The last report of one proxy.
#[derive(Debug, Default)]
struct Proxy {
    /// The time of the report.
    heard: Millis,
    /// `None`: it reported to the previous controller, and has not reported to this one yet.
    said: Option<Said>,
}

#[derive(Debug, Default)]
struct Said {
    /// The revision that all of its workers run; `None` if it is not from this controller.
    revision: Option<u64>,
    workers: u32,
    /// Versions with requests in flight. Thousands of proxies share the same names.
    in_flight: Vec<(Arc<VersionKey>, u64)>,
    refused: Option<Refused>,
    /// By service.
    vetoes: Vec<(String, Veto)>,
}

impl Said {
    /// The services of its policy that it refused: it keeps their previous configuration.
    fn refused_services(&self) -> &[String] {
        let of_this = self.refused.as_ref().filter(|refused| refused.revision == self.revision);
        of_this.map_or(&[], |refused| &refused.services)
    }
}

/// Which proxies are live, and which revisions they run.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Census {
    /// By revision: how many live proxies run it, and the first of them.
    live: BTreeMap<Option<u64>, (usize, String)>,
    silent: usize,
    first_silent: Option<(String, Millis)>,
    /// By service: how many live proxies refused it, and the first of them with its revision.
    refusing: BTreeMap<String, (usize, (String, Option<u64>))>,
}

impl Census {
    /// The coverage for proxies that are to run these services as of a revision or a newer one. A proxy that refused
    /// such a service counts as behind.
    pub(super) fn coverage<'s>(&self, revision: u64, services: impl Iterator<Item = &'s str>) -> Coverage {
        let behind = || self.live.range(..Some(revision));
        let first = behind().min_by(|(_, (_, a)), (_, (_, b))| a.cmp(b));
        let refusing = services.filter_map(|service| self.refusing.get(service)).max_by_key(|(number, _)| *number);
        Coverage {
            live: self.live.values().map(|(number, _)| number).sum(),
            silent: self.silent,
            first_silent: self.first_silent.clone(),
            behind: behind().map(|(_, (number, _))| number).sum::<usize>() + refusing.map_or(0, |(number, _)| *number),
            first_behind: first
                .map(|(revision, (_, id))| (id.clone(), *revision))
                .or_else(|| refusing.map(|(_, first)| first.clone())),
            revision,
        }
    }
}

#[derive(Debug, Default, PartialEq)]
struct Sums {
    /// How many have yet to report.
    awaited: usize,
    /// By revision: how many run it.
    revisions: BTreeMap<Option<u64>, usize>,
    in_flight: HashMap<Arc<VersionKey>, u64>,
    /// By service: how many refused it.
    refusing: BTreeMap<String, usize>,
}

impl Sums {
    fn add(&mut self, proxy: &Proxy) {
        let Some(said) = &proxy.said else {
            self.awaited += 1;
            return;
        };
        *self.revisions.entry(said.revision).or_default() += 1;
        for service in said.refused_services() {
            *self.refusing.entry(service.clone()).or_default() += 1;
        }
        for (key, number) in &said.in_flight {
            match self.in_flight.get_mut(&**key) {
                Some(sum) => *sum = sum.saturating_add(*number),
                None => drop(self.in_flight.insert(key.clone(), *number)),
            }
        }
    }

    fn remove(&mut self, proxy: &Proxy) {
        let Some(said) = &proxy.said else {
            self.awaited -= 1;
            return;
        };
        // Entries that reach zero are removed.
        match self.revisions.get_mut(&said.revision) {
            Some(sum) if *sum > 1 => *sum -= 1,
            _ => drop(self.revisions.remove(&said.revision)),
        }
        for service in said.refused_services() {
            match self.refusing.get_mut(service) {
                Some(sum) if *sum > 1 => *sum -= 1,
                _ => drop(self.refusing.remove(service)),
            }
        }
        for (key, number) in &said.in_flight {
            match self.in_flight.get_mut(&**key) {
                Some(sum) if *sum > *number => *sum -= number,
                _ => drop(self.in_flight.remove(&**key)),
            }
        }
    }
}

impl Proxy {
    /// Whether both contribute the same to the sums.
    fn adds_the_same(&self, other: &Self) -> bool {
        match (&self.said, &other.said) {
            (Some(own), Some(other)) => {
                own.revision == other.revision
                    && own.in_flight == other.in_flight
                    && own.refused_services() == other.refused_services()
            }
            (own, other) => own.is_none() && other.is_none(),
        }
    }
}

impl Proxies {
    /// Starts without reports. `before` holds the runs that reported to the previous controller, and when.
    pub(super) fn awaiting<'a>(before: impl Iterator<Item = (&'a RunKey, Millis)>) -> Self {
        let mut proxies = Self::default();
        for (run, heard) in before {
            proxies.put(run, Proxy { heard, said: None });
        }
        proxies
    }

    /// Starts receiving reports after a time in which none were received.
    pub(super) fn listen(&mut self, now: Millis) {
        self.listening_since = now;
    }

    /// How many changes have affected drains.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// Since when reports have been received.
    pub(super) fn listening_since(&self) -> Millis {
        self.listening_since
    }

    /// Forgets proxies that are silent.
    pub(super) fn forget_silent(&mut self, now: Millis) {
        if self.silence(self.longest_ago, now) <= SILENT {
            return;
        }
        let silent = self.runs.iter().filter(|(_, proxy)| self.silence(proxy.heard, now) > SILENT);
        let silent: Vec<_> = silent.map(|(run, _)| run.clone()).collect();
        silent.iter().for_each(|run| self.remove(run));
        self.longest_ago = self.runs.values().map(|proxy| proxy.heard).min().unwrap_or(now);
    }

    fn silence(&self, heard: Millis, now: Millis) -> Millis {
        now.saturating_sub(heard.max(self.listening_since))
    }

    /// Processes a proxy's report. Returns whether a decision may follow: the proxy or a veto is new, or its revision
    /// or its requests in flight have changed.
    pub(super) fn reported(
        &mut self,
        run: &RunKey,
        report: &Report,
        epoch: &str,
        knows: impl Fn(&str, &str) -> bool,
        now: Millis,
    ) -> bool {
        let revision = (report.epoch == epoch).then_some(report.revision);
        let mut in_flight = Vec::new();
        let mut vetoes = Vec::new();
        for service in &report.services {
            for version in service.versions.iter().filter(|version| version.in_flight > 0) {
                if knows(&service.name, &version.name) {
                    let key = (service.name.clone(), version.name.clone());
                    let known = self.sums.in_flight.get_key_value(&key).map(|(known, _)| known.clone());
                    in_flight.push((known.unwrap_or_else(|| Arc::new(key)), version.in_flight));
                }
            }
            let known = service.vetoes.iter().filter(|veto| knows(&service.name, &veto.version));
            vetoes.extend(known.map(|veto| (service.name.clone(), veto.clone())));
        }
        in_flight.shrink_to_fit();
        let before = self.runs.get(run).and_then(|proxy| proxy.said.as_ref());
        let decides = before.is_none_or(|before| {
            before.vetoes != vetoes || before.revision != revision || before.in_flight != in_flight
        });
        let refused = report.refused.as_ref().map(in_short);
        let said = Said { revision, workers: report.workers, in_flight, refused, vetoes };
        self.end_older(run, now);
        self.put(run, Proxy { heard: now, said: Some(said) });
        decides
    }

    /// Removes the runs of the same proxy that are over.
    fn end_older(&mut self, run: &RunKey, now: Millis) {
        // Starts are hexadecimal numbers without leading zeros.
        let order = |start: &str| (start.len(), start.to_owned());
        let of_proxy = (run.0.clone(), String::new())..;
        let of_proxy = self.runs.range(of_proxy).take_while(|((id, _), _)| *id == run.0);
        let older = of_proxy.filter(|((_, start), proxy)| {
            *start != run.1 && order(start) < order(&run.1) && self.silence(proxy.heard, now) > SUPERSEDED
        });
        let older: Vec<_> = older.map(|(run, _)| run.clone()).collect();
        older.iter().for_each(|run| self.remove(run));
    }

    fn put(&mut self, run: &RunKey, proxy: Proxy) {
        if self.runs.is_empty() || proxy.heard < self.longest_ago {
            self.longest_ago = proxy.heard;
        }
        let has_vetoes = proxy.said.as_ref().is_some_and(|said| !said.vetoes.is_empty());
        let had_vetoes = match has_vetoes {
            true => !self.vetoing.insert(run.clone()),
            false => self.vetoing.remove(run),
        };
        self.changes += u64::from(has_vetoes || had_vetoes);
        if let Some(before) = self.runs.get_mut(run) {
            if !before.adds_the_same(&proxy) {
                self.changes += 1;
                self.sums.add(&proxy);
                self.sums.remove(before);
            }
            *before = proxy;
            return;
        }
        self.changes += 1;
        self.sums.add(&proxy);
        if self.runs.len() >= MAX_PROXIES {
            let silent = self.runs.iter().min_by_key(|(_, proxy)| proxy.heard).map(|(run, _)| run.clone());
            silent.iter().for_each(|run| self.remove(run));
        }
        self.runs.insert(run.clone(), proxy);
    }

    fn remove(&mut self, run: &RunKey) {
        self.changes += 1;
        self.vetoing.remove(run);
        let proxy = self.runs.remove(run);
        proxy.iter().for_each(|proxy| self.sums.remove(proxy));
    }

    fn said(&self) -> impl Iterator<Item = (&RunKey, &Proxy, &Said)> {
        self.runs.iter().filter_map(|(run, proxy)| Some((run, proxy, proxy.said.as_ref()?)))
    }

    /// Whether a run is known.
    pub(super) fn has(&self, run: &RunKey) -> bool {
        self.runs.contains_key(run)
    }

    /// Whether a run has yet to report which revision of this controller it runs.
    pub(super) fn awaits_revision(&self, run: &RunKey) -> bool {
        let said = self.runs.get(run).and_then(|proxy| proxy.said.as_ref());
        said.is_none_or(|said| said.revision.is_none())
    }

    /// Whether any proxy has reported to this controller and is not forgotten.
    pub(super) fn are_there(&self) -> bool {
        self.runs.len() > self.sums.awaited
    }

    /// Takes a census of the live proxies. Visits all of them.
    pub(super) fn census(&self, now: Millis) -> Census {
        let mut census = Census::default();
        for ((id, _), proxy) in &self.runs {
            let silence = self.silence(proxy.heard, now);
            match &proxy.said {
                _ if silence > LIVE => {
                    census.silent += 1;
                    census.first_silent.get_or_insert_with(|| (id.clone(), silence));
                }
                Some(said) => {
                    census.live.entry(said.revision).or_insert_with(|| (0, id.clone())).0 += 1;
                    for service in said.refused_services() {
                        let first = || (0, (id.clone(), said.revision));
                        census.refusing.entry(service.clone()).or_insert_with(first).0 += 1;
                    }
                }
                // It reported to the previous controller, and may still be live.
                None => {}
            }
        }
        census
    }

    /// The vetoes of live proxies' guards, each with its service.
    pub(super) fn vetoes(&self, now: Millis) -> Vec<(&str, &Veto)> {
        let is_live = |run: &&RunKey| self.runs.get(*run).is_some_and(|proxy| self.silence(proxy.heard, now) <= LIVE);
        let said = self.vetoing.iter().filter(is_live).filter_map(|run| self.runs.get(run)?.said.as_ref());
        said.flat_map(|said| &said.vetoes).map(|(service, veto)| (service.as_str(), veto)).collect()
    }

    fn vetoing(&self) -> impl Iterator<Item = (&str, &[(String, Veto)])> {
        let vetoing = self.vetoing.iter().filter_map(|run| Some((run, self.runs.get(run)?.said.as_ref()?)));
        vetoing.map(|((id, _), said)| (id.as_str(), said.vetoes.as_slice()))
    }

    /// A version's requests in flight.
    pub(super) fn in_flight(&self, key: &VersionKey) -> u64 {
        self.sums.in_flight.get(key).copied().unwrap_or_default()
    }

    /// What blocks the drain of a version that is given no traffic since a revision; `services` are those of the last
    /// policy.
    pub(super) fn waiting(&self, key: &VersionKey, revision: u64, services: &[Service]) -> Option<DrainBlocker> {
        let behind: usize = self.sums.revisions.range(..Some(revision)).map(|(_, number)| number).sum();
        let behind = behind + self.sums.refusing.get(&key.0).copied().unwrap_or_default();
        let in_flight = self.in_flight(key);
        let sent_back = || self.who_sends_back(key, services).count();
        match (behind, in_flight) {
            (1.., _) => Some(DrainBlocker::Behind(behind)),
            (0, 1..) => Some(DrainBlocker::InFlight(in_flight)),
            (0, 0) => match (sent_back(), self.sums.awaited) {
                (number @ 1.., _) => Some(DrainBlocker::SentBack(number)),
                (0, awaited @ 1..) => Some(DrainBlocker::Unheard(awaited)),
                (0, 0) => (!self.are_there()).then_some(DrainBlocker::Nobody),
            },
        }
    }

    /// The proxies whose guards veto every version that is given traffic, so that requests go to this one, which is in
    /// service with no weight.
    fn who_sends_back(&self, (name, version): &VersionKey, services: &[Service]) -> impl Iterator<Item = &str> {
        let vetoes = || self.vetoing().filter(|(_, vetoes)| vetoes.iter().any(|(service, _)| service == name));
        let service = vetoes().next().and_then(|_| services.iter().find(|service| service.name == *name));
        let takes = |service: &&Service| service.versions.iter().any(|of| of.name == *version && of.serving);
        let given = service.filter(takes).map_or(Vec::new(), |service| {
            let given = service.versions.iter().filter(|of| of.serving && of.weight > 0);
            given.map(|of| of.name.as_str()).collect::<Vec<_>>()
        });
        let all_out = |vetoes: &[(String, Veto)]| {
            given.iter().all(|given| vetoes.iter().any(|(service, veto)| service == name && veto.version == *given))
        };
        let sends_back = |(_, vetoes): &(&str, &[(String, Veto)])| !given.is_empty() && all_out(vetoes);
        vetoes().filter(sends_back).map(|(id, _)| id).collect::<Vec<_>>().into_iter()
    }

    /// The blocker as a message.
    pub(super) fn in_words(
        &self,
        waiting: DrainBlocker,
        key: &VersionKey,
        revision: u64,
        services: &[Service],
    ) -> String {
        let named = |first: Option<&str>, number: usize| {
            let more = if number > 1 { format!(" and {} more", number - 1) } else { String::new() };
            format!("{}{more}", first.unwrap_or_default())
        };
        match waiting {
            DrainBlocker::Behind(number) => {
                let refuses = |said: &Said| said.refused_services().contains(&key.0);
                let mut behind = self.said().filter(|(_, _, said)| said.revision < Some(revision) || refuses(said));
                let first = behind.next().map(|((id, _), ..)| id.as_str());
                format!("waiting for proxy {} to apply revision {revision}", named(first, number))
            }
            DrainBlocker::InFlight(number) => format!("{number} in flight"),
            DrainBlocker::SentBack(number) => {
                let first = self.who_sends_back(key, services).next();
                format!("given requests where guards keep out all others: proxy {}", named(first, number))
            }
            DrainBlocker::Unheard(number) => {
                let first = self.runs.iter().find(|(_, proxy)| proxy.said.is_none()).map(|((id, _), _)| id.as_str());
                format!("waiting for proxy {} to report", named(first, number))
            }
            DrainBlocker::Nobody => "no proxy has reported".to_owned(),
        }
    }

    /// The proxies in status form.
    pub(super) fn status(&self) -> Vec<ProxyStatus> {
        let status = |((id, start), proxy, said): (&RunKey, &Proxy, &Said)| ProxyStatus {
            id: id.clone(),
            start: start.clone(),
            revision: said.revision,
            workers: said.workers,
            last_seen: timestamp(proxy.heard),
            refused: said.refused.clone(),
            vetoes: said.vetoes.iter().map(|(service, veto)| VetoStatus::new(service, veto)).collect(),
        };
        self.said().map(status).collect()
    }
}

fn in_short(refused: &Refused) -> Refused {
    let (lines, characters) = MAX_ERRORS;
    let short = |all: &[String]| all.iter().take(lines).map(|line| line.chars().take(characters).collect()).collect();
    Refused { revision: refused.revision, errors: short(&refused.errors), services: short(&refused.services) }
}

/// What blocks the drain of a version: the first of these that applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainBlocker {
    /// The number of proxies that have yet to apply the revision that gives it no traffic.
    Behind(usize),
    /// The number of requests in flight.
    InFlight(u64),
    /// The number of proxies whose guards veto all versions that are given traffic, so that requests go to other
    /// versions in service.
    SentBack(usize),
    /// The number of proxies that reported to the previous controller and have yet to report to this one.
    Unheard(usize),
    /// No proxy reports.
    Nobody,
}

impl DrainBlocker {
    /// Whether reports of proxies show this, rather than missing reports.
    pub(crate) fn is_said(self) -> bool {
        !matches!(self, Self::Unheard(_) | Self::Nobody)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tideshift_core::protocol::report::{ServiceReport, VersionReport};

    fn report(revision: u64, in_flight: &[u64]) -> Report {
        let version = |(i, in_flight): (usize, &u64)| VersionReport {
            name: format!("v{i}"),
            in_flight: *in_flight,
            ..VersionReport::default()
        };
        let versions = in_flight.iter().enumerate().map(version).collect();
        let service = ServiceReport { name: "shop".to_owned(), versions, ..ServiceReport::default() };
        Report { revision, services: vec![service], ..Report::default() }
    }

    #[test]
    fn why_a_policy_was_refused_is_kept_in_short() {
        let mut proxies = Proxies::default();
        let errors = vec!["é".repeat(100_000); 1_000];
        let refused = Some(Refused { revision: None, services: errors.clone(), errors });
        let run = ("p".to_owned(), "1".to_owned());
        proxies.reported(&run, &Report { refused, ..Report::default() }, "", |_, _| true, 0);
        let refused = proxies.status().remove(0).refused.unwrap();
        assert_eq!(refused.errors, vec!["é".repeat(500); 20]);
        assert_eq!(refused.services, refused.errors);
    }

    #[test]
    fn who_has_refused_a_service_does_not_run_it_as_it_is() {
        let mut proxies = Proxies::default();
        let run = ("p".to_owned(), "1".to_owned());
        let says = |proxies: &mut Proxies, refused: &[&str]| {
            let services: Vec<String> = refused.iter().map(ToString::to_string).collect();
            let refused = Some(Refused { revision: Some(7), errors: Vec::new(), services });
            proxies.reported(&run, &Report { refused, ..report(7, &[0]) }, "", |_, _| true, 0);
        };
        let key = ("shop".to_owned(), "v1".to_owned());
        says(&mut proxies, &["shop"]);
        let coverage = |proxies: &Proxies, service: &str| proxies.census(0).coverage(7, [service].into_iter());
        assert_eq!((coverage(&proxies, "shop").behind, coverage(&proxies, "other").behind), (1, 0));
        assert_eq!(coverage(&proxies, "shop").first_behind, Some(("p".to_owned(), Some(7))));
        assert!(matches!(proxies.waiting(&key, 7, &[]), Some(DrainBlocker::Behind(1))));
        let words = proxies.in_words(DrainBlocker::Behind(1), &key, 7, &[]);
        assert_eq!(words, "waiting for proxy p to apply revision 7");
        says(&mut proxies, &["other"]);
        assert_eq!((coverage(&proxies, "shop").behind, proxies.waiting(&key, 7, &[])), (0, None));
        proxies.forget_silent(100_000);
        assert_eq!(proxies.sums, Sums::default());
    }

    #[test]
    fn nothing_is_left_of_the_silent() {
        let mut proxies = Proxies::default();
        for i in 0..100 {
            let run = (format!("p{i}"), "1".to_owned());
            proxies.reported(&run, &report(7, &[1, 2]), "", |_, _| true, 1_000 * i);
        }
        for (now, left) in [(60_000, 100), (60_001, 99), (100_500, 59), (1_000_000, 0)] {
            proxies.forget_silent(now);
            assert_eq!((proxies.runs.len(), proxies.status().len()), (left, left), "{now}");
            assert_eq!(proxies.in_flight(&("shop".to_owned(), "v1".to_owned())), 2 * left as u64);
        }
        assert_eq!(proxies.sums, Sums::default());
    }

    proptest! {
        #[test]
        fn sums_are_those_of_all_that_are_there(
            steps in prop::collection::vec((0u8..4, 0u8..3, 0u64..3, prop::collection::vec(0u64..3, 0..3), 0u64..40_000), 1..60)
        ) {
            let known: Vec<_> = (0..3).map(|i| ((format!("p{i}"), "1".to_owned()), i)).collect();
            let mut proxies = Proxies::awaiting(known.iter().map(|(run, heard)| (run, *heard)));
            let mut now = 0;
            for (proxy, start, revision, in_flight, later) in steps {
                now += later;
                let run = (format!("p{proxy}"), start.to_string());
                let is_known = |_: &str, version: &str| version != "v2";
                proxies.reported(&run, &report(revision, &in_flight), "", is_known, now);
                proxies.forget_silent(now);
                let mut sums = Sums::default();
                proxies.runs.values().for_each(|proxy| sums.add(proxy));
                prop_assert_eq!(&proxies.sums, &sums);
                prop_assert!(proxies.runs.values().all(|proxy| now.saturating_sub(proxy.heard) <= SILENT));
            }
        }
    }
}
