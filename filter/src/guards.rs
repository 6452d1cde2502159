//! The guards of all services, on the VM that leads; and how their vetoes reach the others.

use crate::totals::News;
use std::collections::BTreeMap;
use tideshift_core::choice::plan::Chosen;
use tideshift_core::counting::tallies::{ServiceTally, Tallies};
use tideshift_core::evidence::clients::Request;
use tideshift_core::guard::{Guard, Observed, Veto};
use tideshift_core::protocol::policy::{Policy, Service, Version};
use tideshift_core::protocol::report::Event;

/// The guards of the services, by name.
#[derive(Default)]
pub struct Guards(BTreeMap<String, Guard>);

/// A veto on a version of a service, as VMs pass it to each other, and whether it is in force or over.
pub struct SharedVeto {
    /// The service.
    pub service: String,
    /// The veto.
    pub veto: Veto,
    /// Whether it is in force.
    pub in_force: bool,
}

impl Guards {
    /// Looks at what has been counted; whether the vetoes are others than before. `left` is what the guards before
    /// these left.
    pub fn look(
        &mut self,
        now: u64,
        policy: &Policy,
        totals: &Tallies,
        news: &News,
        left: impl Fn() -> Vec<SharedVeto>,
    ) -> bool {
        let is_there = |name: &String| policy.services.iter().any(|service| service.name == *name);
        let mut changed = self.0.iter().any(|(name, guard)| !is_there(name) && !guard.vetoes().is_empty());
        self.0.retain(|name, _| is_there(name));
        let mut shared = None;
        for service in &policy.services {
            let guard = self.0.entry(service.name.clone()).or_insert_with(|| {
                let shared: &Vec<SharedVeto> = shared.get_or_insert_with(&left);
                let of_service = shared.iter().filter(|shared| shared.service == service.name);
                // Those whose time was up while no VM led have yet to be ended.
                changed |= of_service.clone().any(|shared| shared.in_force && shared.veto.until <= now);
                Guard::resume(service.guard.clone(), now, of_service.map(|shared| shared.veto.clone()))
            });
            let events = news.get(&service.name).map(Vec::as_slice).unwrap_or_default();
            changed |= look_at(guard, now, service, totals.service(&service.name), events);
        }
        changed
    }

    /// The vetoes in force on versions of a service.
    pub fn vetoes(&self, service: &str) -> &[Veto] {
        self.0.get(service).map_or(&[], Guard::vetoes)
    }

    /// All vetoes, those that are over too.
    pub fn all(&self) -> impl Iterator<Item = SharedVeto> {
        self.0.iter().flat_map(|(service, guard)| {
            let shared =
                |in_force| move |veto: &Veto| SharedVeto { service: service.clone(), veto: veto.clone(), in_force };
            guard.vetoes().iter().map(shared(true)).chain(guard.past().iter().map(shared(false)))
        })
    }
}

/// One service's guard looks at what was counted; whether its vetoes are others than before.
fn look_at(
    guard: &mut Guard,
    now: u64,
    service: &Service,
    tally: Option<&ServiceTally>,
    events: &[(String, Event)],
) -> bool {
    let nothing = ServiceTally::default();
    let tally = tally.unwrap_or(&nothing);
    let before: Vec<String> = guard.vetoes().iter().map(|veto| veto.version.clone()).collect();
    let observed: Vec<_> = service.versions.iter().map(|version| observed(service, version, tally)).collect();
    guard.set_policy(service.guard.clone());
    let requests: Vec<_> = events.iter().filter_map(|(version, event)| request(version, event)).collect();
    guard.hear(now, tally.has_few_clients(), &requests);
    if !guard.observe(now, &observed) {
        return false;
    }
    for veto in guard.vetoes().iter().filter(|veto| !before.contains(&veto.version)) {
        let Veto { version, requests, errors, others_requests, others_errors, .. } = veto;
        let seconds = veto.until.saturating_sub(now) / 1_000_000_000;
        log::warn!(
            "guard: {version} of {} is out of service for {seconds} s: {errors} of its {requests} requests failed, of \
             the others' {others_errors} of {others_requests}",
            service.name
        );
    }
    for version in before.iter().filter(|version| !guard.vetoes().iter().any(|v| v.version == **version)) {
        log::info!("guard: {version} of {} is back in service", service.name);
    }
    true
}

fn observed<'a>(service: &Service, version: &'a Version, tally: &ServiceTally) -> Observed<'a> {
    let of = tally.version(&version.name);
    let ended = |chosen: &[Chosen]| of.map(|of| of.ended(chosen)).unwrap_or_default();
    Observed {
        name: &version.name,
        weight: version.weight,
        serving: version.serving,
        stable: service.stable.as_ref() == Some(&version.name),
        ended: ended(&[Chosen::Dealt, Chosen::Session]),
        dealt: Some(ended(&[Chosen::Dealt])),
        started: of.and_then(|of| of.of(Chosen::Dealt)).map_or(0, |dealt| dealt.started),
    }
}

fn request<'a>(version: &'a str, event: &Event) -> Option<(&'a str, Request)> {
    Some((version, event.request(false)?))
}

impl SharedVeto {
    /// Vetoes as VMs pass them to each other: a line each.
    pub fn write(vetoes: impl Iterator<Item = Self>) -> String {
        let mut text = String::from("vetoes\n");
        for Self { service, veto, in_force } in vetoes {
            let Veto { version, until, strikes, requests, errors, others_requests, others_errors } = veto;
            let in_force = u8::from(in_force);
            text += &format!(
                "{service} {version} {in_force} {until} {strikes} {requests} {errors} {others_requests} {others_errors}\n"
            );
        }
        text
    }

    /// Reads what [`Self::write`] wrote; lines that make no sense are left out.
    pub fn read(text: &[u8]) -> Vec<Self> {
        let text = std::str::from_utf8(text).unwrap_or_default();
        text.lines().filter_map(Self::read_line).collect()
    }

    fn read_line(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (service, version) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut number = || words.next()?.parse::<u64>().ok();
        let in_force = number()? == 1;
        let (until, strikes) = (number()?, number()? as u32);
        let (requests, errors, others_requests, others_errors) = (number()?, number()?, number()?, number()?);
        let veto = Veto { version, until, strikes, requests, errors, others_requests, others_errors };
        Some(Self { service, veto, in_force })
    }
}
