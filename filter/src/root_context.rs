//! The plugin's root context: one VM with one plugin configuration, its policy, and the VM's part among all of the proxy.

use crate::active_policy::{ActivePolicy, Router};
use crate::controller_client::{CallResult, ControllerClient};
use crate::counters::{Counters, Seen};
use crate::events::EventLog;
use crate::guards::{Guards, SharedVeto};
use crate::host::Host;
use crate::http_context::HttpContext;
use crate::shared_data::{PolicyVersion, SharedData, StoredPolicy};
use crate::totals;
use crate::totals::{Published, Totals};
use crate::urgent::UrgentCounts;
use crate::workers::Workers;
use fastrand::Rng;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use tideshift_core::choice::plan::Plan;
use tideshift_core::counting::tallies::{ServiceTally, Tallies};
use tideshift_core::protocol::policy::{ControllerRef, Explain, Policy};
use tideshift_core::protocol::report::ServiceReport;

/// The first tick comes soon after configuring, so that the first policy does.
const FIRST_TICK: Duration = Duration::from_millis(20);
/// The later ones: counts, heartbeats, the lease, retries; and on the VM that leads, the guard.
const TICK: Duration = Duration::from_millis(100);
/// How long the right to lead lasts without a renewal.
const LEASE: Duration = Duration::from_secs(2);

/// What all plugin configurations of a VM have together.
pub struct VmState<H> {
    counters: RefCell<Counters>,
    /// This VM among the others of the proxy, in each part of the shared data.
    members: RefCell<BTreeMap<String, Rc<RefCell<Member<H>>>>>,
}

impl<H> Default for VmState<H> {
    fn default() -> Self {
        Self { counters: RefCell::default(), members: RefCell::default() }
    }
}

/// This VM among the others of the proxy. A configuration that takes another's place in the same part of the shared data
/// goes on as the same one, so that what was counted is not counted twice.
struct Member<H> {
    /// `None` until the first tick.
    workers: Option<Workers<H>>,
    published: Published,
    seen: Seen,
    /// The tick after which a first error was published at once.
    urgent_at: Option<u64>,
    ticks: u64,
    /// The configuration that acts for it, the newest one, and the one that is woken for it: they are numbered.
    newest: u64,
    woken: u64,
}

impl<H> Default for Member<H> {
    fn default() -> Self {
        let (published, seen) = Default::default();
        Self { workers: None, published, seen, urgent_at: None, ticks: 0, newest: 0, woken: 0 }
    }
}

/// A root context. It has a state of its own, because Envoy may keep several configurations alive in one VM.
pub struct RootContext<H: Host> {
    host: H,
    vm: Rc<VmState<H>>,
    router: Rc<Router<H>>,
    /// The policy in force, as it was written.
    policy: Policy,
    version: PolicyVersion,
    static_config: StaticConfig,
    /// `None` until configured.
    proxy: Option<ProxyState<H>>,
    random: Rng,
}

/// What only the plugin configuration may say.
#[derive(Default)]
struct StaticConfig {
    explain: Option<Explain>,
    strips: bool,
}

/// The proxy's VMs, seen from this one.
struct ProxyState<H> {
    shared: SharedData<H>,
    client: Option<ControllerClient>,
    guards: Guards,
    member: Rc<RefCell<Member<H>>>,
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

impl<H: Host> ProxyState<H> {
    fn new(host: &H, vm: &VmState<H>, controller: Option<&ControllerRef>, configuration: &[u8]) -> Self {
        let shared = SharedData::new(host.clone(), controller, configuration);
        totals::prepare(&shared);
        let client = controller.map(|controller| ControllerClient::new(controller, &shared));
        let member = vm.members.borrow_mut().entry(shared.key("")).or_default().clone();
        let number = {
            let member = &mut *member.borrow_mut();
            member.newest = member.newest.wrapping_add(1);
            member.newest
        };
        Self {
            shared,
            client,
            guards: Guards::default(),
            member,
            number,
            totals: Totals::default(),
            events: EventLog::default(),
            leads: false,
            vetoes: 0,
            tick: FIRST_TICK,
        }
    }

    /// Says that this VM lives and which policy it runs.
    fn beat(&self, now: u64, version: &PolicyVersion) {
        let member = self.member.borrow();
        if let Some(workers) = &member.workers {
            workers.beat(now, version, member.published.number);
        }
    }

    /// Publishes what this VM has counted since it last did, if there is anything.
    fn publish(&self, now: u64, counters: &Counters) {
        let Member { workers: Some(workers), published, seen, .. } = &mut *self.member.borrow_mut() else { return };
        if let Some(tallies) = counters.news(now, seen) {
            published.publish(&self.shared, workers.id, tallies);
        }
    }

    /// Joins the other VMs, again if this one was taken for gone; `false` if a newer configuration acts for this VM.
    fn join(&self, now: u64, version: &PolicyVersion) -> bool {
        let Member { workers, published, seen, ticks, newest, woken, .. } = &mut *self.member.borrow_mut();
        if *newest != self.number {
            return false;
        }
        if let Some(gone) = workers.take_if(|workers| workers.is_taken_for_gone()) {
            published.start_again(&self.shared, gone.id);
            // Also what is in flight, which no other VM took over.
            *seen = Seen::default();
        }
        if workers.is_none() {
            *workers = Some(Workers::join(self.shared.clone(), now, version, published.number));
        } else if *woken != self.number {
            workers.iter_mut().for_each(Workers::listen);
        }
        *woken = self.number;
        *ticks = ticks.wrapping_add(1);
        true
    }

    /// Takes or renews the lease, if no other VM has it.
    fn contend(&mut self, now: u64) {
        let id = self.member.borrow().workers.as_ref().map(|workers| workers.id);
        let until = now.saturating_add(LEASE.as_nanos() as u64);
        self.leads = id.is_some_and(|id| self.shared.lease(id, now, until));
        if !self.leads {
            // The VM that leads next starts without evidence.
            (self.guards, self.totals, self.events) = Default::default();
        }
    }

    /// Publishes an error for the VM that leads, if it is the first one since the last tick; whether it was.
    fn publish_urgent(&self, host: &H, counters: &Counters, version: &PolicyVersion) {
        {
            let member = &mut *self.member.borrow_mut();
            // What is published by a VM that was taken for gone would be lost.
            let is_gone = || member.workers.as_ref().is_none_or(Workers::is_taken_for_gone);
            let is_news = counters.is_urgent(member.seen) && !is_gone();
            if !is_news || member.urgent_at.replace(member.ticks) == Some(member.ticks) {
                return;
            }
        }
        let now = host.now();
        self.publish(now, counters);
        self.beat(now, version);
        if let Some(workers) = &self.member.borrow().workers {
            workers.wake_leader();
        }
    }

    fn wake_others(&self) {
        if let Some(workers) = &self.member.borrow().workers {
            workers.wake();
        }
    }

    fn is_woken_by(&self, queue: u32) -> bool {
        self.member.borrow().workers.as_ref().is_some_and(|workers| workers.is_woken_by(queue))
    }
}

impl<H: Host> RootContext<H> {
    /// A root context that has not been configured.
    pub fn new(host: H, vm: Rc<VmState<H>>) -> Self {
        Self {
            host: host.clone(),
            vm,
            router: Rc::new(Router::new(host)),
            policy: Policy::default(),
            version: PolicyVersion::default(),
            static_config: StaticConfig::default(),
            proxy: None,
            random: Rng::with_seed(0),
        }
    }

    /// Takes the plugin configuration; `false`: it is not a policy, and what ran before stays.
    pub fn configure(&mut self, size: usize) -> bool {
        let json = self.host.plugin_configuration(size).unwrap_or_default();
        match Policy::from_json(&json) {
            Ok(policy) => {
                self.start(policy, &json);
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

    fn start(&mut self, policy: Policy, configuration: &[u8]) {
        self.random = Rng::with_seed(self.host.seed());
        self.router.set_random(self.random.fork());
        self.static_config = StaticConfig { explain: policy.explain.clone(), strips: policy.strip_client_headers };
        self.proxy = Some(ProxyState::new(&self.host, &self.vm, policy.controller.as_ref(), configuration));
        log::info!("policy revision {} of the plugin configuration in force", policy.revision);
        self.vm.counters.borrow().define_again(&self.host);
        let version = PolicyVersion { epoch: String::new(), revision: policy.revision };
        self.adopt(policy, version);
        self.catch_up();
        self.host.tick_every(FIRST_TICK);
    }

    fn adopt(&mut self, mut policy: Policy, version: PolicyVersion) {
        // Here, because the plan has to know of every header that is looked at.
        policy.explain = self.static_config.explain.clone().or(policy.explain);
        self.policy = policy;
        self.version = version;
        self.compile();
    }

    /// Makes the policy with the vetoes the active one.
    fn compile(&mut self) {
        let vetoes = self.proxy.as_ref().and_then(|proxy| proxy.shared.vetoes());
        let vetoes = vetoes.map_or_else(Vec::new, |(text, version)| {
            self.proxy.iter_mut().for_each(|proxy| proxy.vetoes = version);
            SharedVeto::read(&text)
        });
        let is_vetoed = |service: &str, version: &str| {
            vetoes.iter().any(|shared| shared.in_force && shared.service == service && shared.veto.version == version)
        };
        let plan = Plan::new(&self.policy, is_vetoed);
        let counters = self.vm.counters.borrow_mut().cover(&self.host, &plan);
        let explain = self.policy.explain.clone();
        let active = ActivePolicy { plan, explain, counters, strips: self.static_config.strips };
        self.router.activate(active, self.random.u64(..));
    }

    /// Applies what other VMs have left: a policy that the controller sent, vetoes.
    fn catch_up(&mut self) {
        let Some(proxy) = &self.proxy else { return };
        if proxy.shared.newest_version().is_some_and(|newest| newest.replaces(&self.version)) {
            if let Some(StoredPolicy { policy, version }) = proxy.shared.newest(&self.policy, &self.version) {
                self.adopt(policy, version);
                log::debug!("policy revision {} of the controller in force", self.version.revision);
            }
        } else if proxy.shared.vetoes().is_some_and(|(_, version)| version != proxy.vetoes) {
            self.compile();
        }
    }

    fn beat(&self, now: u64) {
        self.proxy.iter().for_each(|proxy| proxy.beat(now, &self.version));
    }

    fn publish(&self, now: u64) {
        self.proxy.iter().for_each(|proxy| proxy.publish(now, &self.vm.counters.borrow()));
    }

    /// A request that has just arrived, for the root context of this number.
    pub fn request(&self, root: u32) -> HttpContext<H> {
        HttpContext::new(self.router.clone(), root)
    }

    /// A request of this VM has ended. The VM that leads should know of a first error at once.
    pub fn request_done(&self) {
        if let Some(proxy) = &self.proxy {
            proxy.publish_urgent(&self.host, &self.vm.counters.borrow(), &self.version);
        }
    }

    /// Heartbeat and lease; for the VM that has the lease, the guard and the controller.
    pub fn tick(&mut self) {
        let now = self.host.now();
        self.catch_up();
        if !self.proxy.as_ref().is_some_and(|proxy| proxy.join(now, &self.version)) {
            return;
        }
        self.vm.counters.borrow_mut().tick(&self.host, now);
        self.publish(now);
        self.beat(now);
        let Some(proxy) = &mut self.proxy else { return };
        proxy.contend(now);
        if std::mem::replace(&mut proxy.tick, TICK) != TICK {
            self.host.tick_every(TICK);
        }
        if proxy.leads {
            self.lead(now);
        }
    }

    /// Adds up what all VMs have counted, for the guard and the controller.
    fn lead(&mut self, now: u64) {
        let Some(ProxyState { shared, client, guards, member, totals, events, .. }) = &mut self.proxy else { return };
        let member = member.borrow();
        let Some(workers) = &member.workers else { return };
        let live = workers.live(now);
        let number = shared.next_number();
        let news = totals.gather(shared, &live.published);
        events.add(workers.id, &news);
        self.vm.counters.borrow().show_in_flight(&self.host, &totals.sum);
        let left = || shared.vetoes().map_or_else(Vec::new, |(text, _)| SharedVeto::read(&text));
        let vetoes_changed = guards.look(now, &self.policy, &totals.sum, &news, left);
        if vetoes_changed {
            shared.set_vetoes(&SharedVeto::write(guards.all()));
            workers.wake();
        }
        if let Some(client) = client {
            if vetoes_changed {
                client.report_soon();
            }
            client.poll(&self.host, now, &self.version, &mut self.random);
            let urgent = UrgentCounts::read(&self.policy, &totals.sum);
            let services = || services(&self.policy, &totals.sum, guards, events);
            client.report(shared, now, live, urgent, number, services);
        }
        drop(member);
        if vetoes_changed {
            self.compile();
        }
    }

    /// Another VM says that there is something new: a policy, vetoes or, for the one that leads, an error.
    pub fn queue_ready(&mut self, queue: u32) {
        if self.proxy.as_ref().is_some_and(|proxy| proxy.is_woken_by(queue)) {
            let now = self.host.now();
            self.catch_up();
            self.beat(now);
            if self.proxy.as_ref().is_some_and(|proxy| proxy.leads) {
                self.lead(now);
            }
        }
    }

    /// The response to a callout; `headers` and `body` are its sizes.
    pub fn http_call_response(&mut self, token: u32, headers: usize, body: usize) {
        let now = self.host.now();
        let Some(ProxyState { shared, client: Some(client), .. }) = &mut self.proxy else { return };
        let runs = (&self.policy, &self.version);
        match client.response(shared, token, (headers, body), now, runs, &mut self.random) {
            CallResult::Policy => {
                self.proxy.iter().for_each(ProxyState::wake_others);
                self.catch_up();
                self.beat(now);
            }
            CallResult::Nothing => {}
        }
        // At once, not at the next tick; but a VM that has lost the lease meanwhile leaves it to the one that has it.
        if let Some(ProxyState { client: Some(client), leads: true, .. }) = &mut self.proxy {
            client.poll(&self.host, now, &self.version, &mut self.random);
        }
    }

    /// This configuration has been replaced, or the proxy ends: others need not wait for it.
    pub fn leave(self) {
        let now = self.host.now();
        self.vm.counters.borrow_mut().tick(&self.host, now);
        self.publish(now);
        let Some(ProxyState { shared, client, member, .. }) = self.proxy else { return };
        // Another configuration in the same part goes on: this one and the list have the only other two.
        if Rc::strong_count(&member) > 2 {
            return;
        }
        // A configuration for the same controller that comes later does not report again what was reported before.
        // Guards only go by what is new.
        if client.is_none() {
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
