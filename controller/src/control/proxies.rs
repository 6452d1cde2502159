//! What the proxies said last: which policy they run, what they have in flight, whom their guards keep out.

use super::drain::Seen;
use crate::ledger::{Ledger, VersionKey};
use crate::rollout::Millis;
use crate::status::{ProxyStatus, VetoStatus, timestamp};
use std::collections::BTreeMap;
use tideshift_core::guard::Veto;
use tideshift_core::report::{Refused, Report};

/// A proxy that is silent for longer is shown no more, and nobody waits for it.
const SILENT: Millis = 60_000;
/// The most proxies that are shown.
const MAX_PROXIES: usize = 20_000;

/// By proxy and start, since two proxies may share an id by mistake.
#[derive(Debug, Default)]
pub(super) struct Proxies(BTreeMap<(String, String), Proxy>);

/// What one proxy said last.
#[derive(Debug, Default)]
struct Proxy {
    seen: Millis,
    revision: Option<u64>,
    workers: u32,
    in_flight: BTreeMap<VersionKey, u64>,
    refused: Option<Refused>,
    /// By service.
    vetoes: Vec<(String, Veto)>,
}

impl Proxies {
    /// A proxy reports. Returns whether a decision may follow: there is a new veto, it runs another revision, or it has
    /// something else in flight.
    pub(super) fn reported(
        &mut self,
        report: &Report,
        epoch: &str,
        knows: impl Fn(&str, &str) -> bool,
        now: Millis,
    ) -> bool {
        let revision = (report.epoch == epoch).then_some(report.revision);
        let services = report.services.iter();
        let in_flight = services.flat_map(|service| {
            service.versions.iter().map(|version| ((service.name.clone(), version.name.clone()), version.in_flight))
        });
        let in_flight = in_flight.filter(|((service, version), _)| knows(service, version)).collect();
        let vetoes = report.services.iter().flat_map(|service| {
            let known = service.vetoes.iter().filter(|veto| knows(&service.name, &veto.version));
            known.map(|veto| (service.name.clone(), veto.clone()))
        });
        let vetoes: Vec<_> = vetoes.collect();
        let proxy = self.proxy((report.proxy.clone(), report.start.clone()));
        let vetoed = !vetoes.is_empty() && proxy.vetoes != vetoes;
        let moved = proxy.revision != revision || proxy.in_flight != in_flight;
        let (workers, refused) = (report.workers, report.refused.clone());
        *proxy = Proxy { seen: now, revision, workers, in_flight, refused, vetoes };
        vetoed || moved
    }

    fn proxy(&mut self, run: (String, String)) -> &mut Proxy {
        if self.0.len() >= MAX_PROXIES && !self.0.contains_key(&run) {
            let silent = self.0.iter().min_by_key(|(_, proxy)| proxy.seen).map(|(run, _)| run.clone());
            silent.map(|run| self.0.remove(&run));
        }
        self.0.entry(run).or_default()
    }

    fn live(&self, now: Millis) -> impl Iterator<Item = (&String, &Proxy)> {
        let live = self.0.iter().filter(move |(_, proxy)| now.saturating_sub(proxy.seen) <= SILENT);
        live.map(|((id, _), proxy)| (id, proxy))
    }

    /// Whether there is one that is not silent.
    pub(super) fn are_there(&self, now: Millis) -> bool {
        self.live(now).next().is_some()
    }

    /// The vetoes of the live proxies' guards, each with its service.
    pub(super) fn vetoes(&self, now: Millis) -> Vec<(&str, &Veto)> {
        let vetoes = self.live(now).flat_map(|(_, proxy)| &proxy.vetoes);
        vetoes.map(|(service, veto)| (service.as_str(), veto)).collect()
    }

    /// What the live proxies say of a version: also those that reported to the controller before a restart, and not yet
    /// to this one.
    pub(super) fn seen<'a>(&'a self, key: &VersionKey, ledger: &'a Ledger, now: Millis) -> Vec<Seen<'a>> {
        let live = self.live(now).map(|(id, proxy)| Seen {
            proxy: id,
            revision: proxy.revision,
            in_flight: proxy.in_flight.get(key).copied().unwrap_or_default(),
        });
        let known = ledger.reported_since(now.saturating_sub(SILENT));
        let not_yet = known.filter(|run| !self.0.contains_key(run));
        let not_yet = not_yet.map(|(id, _)| Seen { proxy: id.as_str(), revision: None, in_flight: 0 });
        live.chain(not_yet).collect()
    }

    /// For people.
    pub(super) fn status(&self, now: Millis) -> Vec<ProxyStatus> {
        let status = |(id, proxy): (&String, &Proxy)| ProxyStatus {
            id: id.clone(),
            revision: proxy.revision,
            workers: proxy.workers,
            last_seen: timestamp(proxy.seen),
            refused: proxy.refused.clone(),
            vetoes: proxy.vetoes.iter().map(|(service, veto)| VetoStatus::new(service, veto)).collect(),
        };
        self.live(now).map(status).collect()
    }
}
