//! One VM of the plugin: the policy in force, its changes, and the exchanges that it chooses for.

use crate::counters::{Counters, PlanCounters, Seen};
use crate::events::EventLog;
use crate::exchange::Exchange;
use crate::guards::{Guards, Noted};
use crate::headers::Headers;
use crate::host;
use crate::link::{Answer, Link};
use crate::pulse::Pulse;
use crate::shared::{Place, Shared};
use crate::totals::{Published, Totals};
use crate::workers::Workers;
use fastrand::Rng;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use tideshift_core::plan::{Decision, Plan, Turns};
use tideshift_core::policy::{Explain, Policy};
use tideshift_core::report::ServiceReport;
use tideshift_core::tallies::{ServiceTally, Tallies};

/// The first tick comes soon after configuring, so that the first policy does.
const FIRST_TICK: Duration = Duration::from_millis(20);
/// The later ones: counts, heartbeats, the lease, retries; and on the VM that leads, the guard.
const TICK: Duration = Duration::from_millis(100);
/// How long the right to lead lasts without a renewal.
const LEASE: Duration = Duration::from_secs(2);

/// What all plugin configurations of a VM have together.
#[derive(Default)]
pub struct VmState {
    counters: RefCell<Counters>,
    /// This VM among the others of the proxy, in each corner of the shared data.
    members: RefCell<BTreeMap<String, Rc<RefCell<Member>>>>,
}

/// This VM among the others of the proxy. A configuration that takes another's place in the same corner goes on as the
/// same one, so that what was counted is not counted twice.
#[derive(Default)]
struct Member {
    /// `None` until the first tick.
    workers: Option<Workers>,
    published: Published,
    seen: Seen,
    /// The tick after which a first error was published at once.
    urgent_at: Option<u64>,
    ticks: u64,
    /// The configuration that acts for it, the newest one, and the one that is woken for it: they are numbered.
    newest: u64,
    woken: u64,
}

/// The plugin's root context: state of its own, because Envoy may keep several configurations alive in one VM.
pub struct Root {
    vm: Rc<VmState>,
    worker: Rc<Worker>,
    /// The policy in force, as it was written.
    policy: Policy,
    place: Place,
    /// What only the plugin configuration may say.
    own: Own,
    /// `None` until configured.
    fleet: Option<Fleet>,
    random: Rng,
}

/// What exchanges need of their VM.
pub struct Worker {
    in_force: RefCell<Rc<InForce>>,
    turns: RefCell<Turns>,
    /// Names new users.
    random: RefCell<Rng>,
}

/// A plan with the counters of its services, by the plan's indexes.
#[derive(Default)]
pub struct InForce {
    /// The plan.
    pub plan: Plan,
    /// Who may ask why.
    pub explain: Option<Explain>,
    /// The counters of each of its services.
    pub counters: Vec<PlanCounters>,
    strips: bool,
}

/// What the plugin configuration says for good.
#[derive(Default)]
struct Own {
    explain: Option<Explain>,
    strips: bool,
}

/// The proxy's VMs, seen from this one.
struct Fleet {
    shared: Shared,
    link: Option<Link>,
    guards: Guards,
    member: Rc<RefCell<Member>>,
    /// This configuration's number there.
    number: u64,
    /// What all VMs have counted, on the one that leads.
    totals: Totals,
    events: EventLog,
    /// Whether this VM had the lease at its last tick: one of them talks to the controller and guards.
    leads: bool,
    /// The version of the shared vetoes that this VM has applied.
    vetoes: u32,
    tick: Duration,
}

impl InForce {
    /// The headers of the request, as many as this policy can look at.
    pub fn headers(&self) -> Headers<'_> {
        match self.plan.few_headers() {
            Some(names) if !self.strips => Headers::few(names),
            _ => Headers::all(),
        }
    }
}

impl Worker {
    /// The policy in force.
    pub fn in_force(&self) -> Rc<InForce> {
        self.in_force.borrow().clone()
    }

    /// What is to be done with a request, by the policy in force.
    pub fn decide<'p>(&self, in_force: &'p InForce, headers: &Headers<'_>) -> Option<Decision<'p>> {
        in_force.plan.decide(headers, &mut self.turns.borrow_mut(), || self.random.borrow_mut().u64(..))
    }
}

impl Root {
    /// A VM that has not been configured.
    pub fn new(vm: Rc<VmState>) -> Self {
        Self {
            vm,
            worker: Rc::new(Worker {
                in_force: RefCell::default(),
                turns: RefCell::default(),
                random: RefCell::new(Rng::with_seed(0)),
            }),
            policy: Policy::default(),
            place: Place::default(),
            own: Own::default(),
            fleet: None,
            random: Rng::with_seed(0),
        }
    }

    /// Takes the plugin configuration; `false`: it is not a policy, and what ran before stays.
    pub fn configure(&mut self, size: usize) -> bool {
        let json = host::plugin_configuration(size).unwrap_or_default();
        match Policy::from_json(&json) {
            Ok(policy) => {
                self.random = Rng::with_seed(host::now() ^ std::ptr::from_ref(self) as u64);
                self.worker.random.replace(self.random.fork());
                self.own = Own { explain: policy.explain.clone(), strips: policy.strip_client_headers };
                let shared = Shared::new(policy.controller.as_ref(), &json);
                let link = policy.controller.as_ref().map(|controller| Link::new(controller, &shared));
                let place = Place { epoch: String::new(), revision: policy.revision };
                let member = self.vm.members.borrow_mut().entry(shared.key("")).or_default().clone();
                let number = {
                    let member = &mut *member.borrow_mut();
                    member.newest = member.newest.wrapping_add(1);
                    member.newest
                };
                self.fleet = Some(Fleet {
                    shared,
                    link,
                    guards: Guards::default(),
                    member,
                    number,
                    totals: Totals::default(),
                    events: EventLog::default(),
                    leads: false,
                    vetoes: 0,
                    tick: FIRST_TICK,
                });
                log::info!("policy revision {} of the plugin configuration in force", policy.revision);
                self.vm.counters.borrow().define_again();
                self.adopt(policy, place);
                self.catch_up();
                host::tick_every(FIRST_TICK);
                true
            }
            Err(errors) => {
                for error in &errors.0 {
                    log::error!("plugin configuration: {error}");
                }
                false
            }
        }
    }

    fn adopt(&mut self, mut policy: Policy, place: Place) {
        // Here, because the plan has to know of every header that is looked at.
        policy.explain = self.own.explain.clone().or(policy.explain);
        self.policy = policy;
        self.place = place;
        self.compile();
    }

    /// Makes the policy with the vetoes what requests go by.
    fn compile(&mut self) {
        let vetoes = self.fleet.as_ref().and_then(|fleet| fleet.shared.vetoes());
        let vetoes = vetoes.map_or_else(Vec::new, |(text, version)| {
            self.fleet.iter_mut().for_each(|fleet| fleet.vetoes = version);
            Noted::read(&text)
        });
        let is_vetoed = |service: &str, version: &str| {
            vetoes.iter().any(|noted| noted.in_force && noted.service == service && noted.veto.version == version)
        };
        let plan = Plan::new(&self.policy, is_vetoed);
        let counters = self.vm.counters.borrow_mut().cover(&plan);
        let old = self.worker.in_force();
        let turns = {
            let turns = self.worker.turns.borrow();
            Turns::for_plan(&plan, self.random.u64(..), Some((&old.plan, &turns)))
        };
        self.worker.turns.replace(turns);
        let explain = self.policy.explain.clone();
        self.worker.in_force.replace(Rc::new(InForce { plan, explain, counters, strips: self.own.strips }));
    }

    /// Applies what other VMs have left: a policy that the controller sent, vetoes.
    fn catch_up(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        if fleet.shared.delivered_place().is_some_and(|place| place.replaces(&self.place)) {
            if let Some((policy, place)) = fleet.shared.newest((&self.policy, &self.place)) {
                self.adopt(policy, place);
                log::debug!("policy revision {} of the controller in force", self.place.revision);
            }
        } else if fleet.shared.vetoes().is_some_and(|(_, version)| version != fleet.vetoes) {
            self.compile();
        }
    }

    fn beat(&self, now: u64) {
        let Some(Fleet { member, .. }) = &self.fleet else { return };
        let member = member.borrow();
        if let Some(workers) = &member.workers {
            workers.beat(now, &self.place, member.published.number);
        }
    }

    /// Publishes what this VM has counted since it last did, if there is anything.
    fn publish(&self, now: u64) {
        let Some(Fleet { member, shared, .. }) = &self.fleet else { return };
        let Member { workers: Some(workers), published, seen, .. } = &mut *member.borrow_mut() else { return };
        if let Some(tallies) = self.vm.counters.borrow().news(now, seen) {
            published.publish(shared, workers.id, tallies);
        }
    }

    /// A request of this worker has ended. The VM that leads should know of a first error at once.
    pub fn exchange_ended(&self) {
        let Some(Fleet { member, .. }) = &self.fleet else { return };
        {
            let member = &mut *member.borrow_mut();
            // What is published by a VM that was taken for gone would be lost.
            let is_gone = || member.workers.as_ref().is_none_or(Workers::is_taken_for_gone);
            let is_news = self.vm.counters.borrow().is_urgent(member.seen) && !is_gone();
            if !is_news || member.urgent_at.replace(member.ticks) == Some(member.ticks) {
                return;
            }
        }
        let now = host::now();
        self.publish(now);
        self.beat(now);
        if let Some(workers) = &member.borrow().workers {
            workers.wake_leader();
        }
    }

    /// A request that has just arrived, for the root context of this number.
    pub fn exchange(&self, root: u32) -> Exchange {
        Exchange::new(self.worker.clone(), root)
    }

    /// Heartbeat and lease; for the VM that has the lease, the guard and the talk with the controller.
    pub fn tick(&mut self) {
        let now = host::now();
        self.catch_up();
        let Some(fleet) = &self.fleet else { return };
        {
            let Member { workers, published, seen, ticks, newest, woken, .. } = &mut *fleet.member.borrow_mut();
            if *newest != fleet.number {
                return;
            }
            if let Some(gone) = workers.take_if(|workers| workers.is_taken_for_gone()) {
                published.start_again(&fleet.shared, gone.id);
                // Also what is in flight, which nobody took over.
                *seen = Seen::default();
            }
            if workers.is_none() {
                *workers = Some(Workers::join(fleet.shared.clone(), now, &self.place, published.number));
            } else if *woken != fleet.number {
                workers.iter_mut().for_each(Workers::listen);
            }
            *woken = fleet.number;
            *ticks = ticks.wrapping_add(1);
        }
        self.vm.counters.borrow_mut().tick(now);
        self.publish(now);
        self.beat(now);
        let Some(fleet) = &mut self.fleet else { return };
        let id = fleet.member.borrow().workers.as_ref().map(|workers| workers.id);
        let until = now.saturating_add(LEASE.as_nanos() as u64);
        fleet.leads = id.is_some_and(|id| fleet.shared.lease(id, now, until));
        if std::mem::replace(&mut fleet.tick, TICK) != TICK {
            host::tick_every(TICK);
        }
        if fleet.leads {
            self.lead(now);
        } else {
            // The VM that leads next starts without evidence.
            (fleet.guards, fleet.totals, fleet.events) = Default::default();
        }
    }

    fn lead(&mut self, now: u64) {
        let Some(Fleet { shared, link, guards, member, totals, events, .. }) = &mut self.fleet else { return };
        let member = member.borrow();
        let Some(workers) = &member.workers else { return };
        let live = workers.live(now);
        let number = shared.next_number();
        let news = totals.gather(shared, &live.published);
        events.add(workers.id, &news);
        self.vm.counters.borrow().show_in_flight(&totals.sum);
        let left = || shared.vetoes().map_or_else(Vec::new, |(text, _)| Noted::read(&text));
        let vetoes_changed = guards.look(now, &self.policy, &totals.sum, &news, left);
        if vetoes_changed {
            shared.set_vetoes(&Noted::write(guards.noted()));
            workers.wake();
        }
        if let Some(link) = link {
            if vetoes_changed {
                link.report_soon();
            }
            link.poll(now, &self.place, &mut self.random);
            let pulse = Pulse::feel(&self.policy, &totals.sum);
            let services = || services(&self.policy, &totals.sum, guards, events);
            link.report(now, live, pulse, (shared, number), services);
        }
        drop(member);
        if vetoes_changed {
            self.compile();
        }
    }

    /// Another VM says that there is something new: a policy, vetoes or, for the one that leads, an error.
    pub fn woken(&mut self, queue: u32) {
        let is_woken = |fleet: &Fleet| fleet.member.borrow().workers.as_ref().is_some_and(|w| w.is_woken_by(queue));
        if self.fleet.as_ref().is_some_and(is_woken) {
            let now = host::now();
            self.catch_up();
            self.beat(now);
            if self.fleet.as_ref().is_some_and(|fleet| fleet.leads) {
                self.lead(now);
            }
        }
    }

    /// The answer to a call of the link's; `headers` and `body` are its sizes.
    pub fn answered(&mut self, token: u32, headers: usize, body: usize) {
        let now = host::now();
        let Some(Fleet { shared, link: Some(link), .. }) = &mut self.fleet else { return };
        let runs = (&self.policy, &self.place);
        match link.answered(token, (headers, body), now, shared, runs, &mut self.random) {
            Answer::Policy => {
                if let Some(Fleet { member, .. }) = &self.fleet
                    && let Some(workers) = &member.borrow().workers
                {
                    workers.wake();
                }
                self.catch_up();
                self.beat(now);
            }
            Answer::Nothing => {}
        }
        // At once, not at the next tick; but a VM that has lost the lease meanwhile leaves it to the one that has it.
        if let Some(Fleet { link: Some(link), leads: true, .. }) = &mut self.fleet {
            link.poll(now, &self.place, &mut self.random);
        }
    }

    /// This configuration has been replaced, or the proxy ends: others need not wait for it.
    pub fn leave(self) {
        let now = host::now();
        self.vm.counters.borrow_mut().tick(now);
        self.publish(now);
        let Some(Fleet { shared, link, member, .. }) = self.fleet else { return };
        // Another configuration in the same corner goes on: this one and the list have the only other two.
        if Rc::strong_count(&member) > 2 {
            return;
        }
        // A controller that is configured again is not told again what it was told before. Guards only go by what is new.
        if link.is_none() {
            self.vm.members.borrow_mut().remove(&shared.key(""));
        }
        let member = &mut *member.borrow_mut();
        if let Some(workers) = member.workers.take() {
            workers.leave();
            shared.end_lease(workers.id);
            member.published.start_again(&shared, workers.id);
            member.seen = Seen::default();
        }
    }
}

/// What a report says of all services.
fn services(policy: &Policy, totals: &Tallies, guards: &Guards, events: &EventLog) -> Vec<ServiceReport> {
    let report = |tally: &ServiceTally| {
        let service = policy.services.iter().find(|service| service.name == tally.name);
        let is_compared = service.is_some_and(|service| service.step > 0);
        tally.report(guards.vetoes(&tally.name), is_compared.then(|| events.of(tally)).flatten())
    };
    totals.services.iter().map(report).collect()
}
