//! One VM of the plugin: the policy in force, its changes, and the exchanges that it chooses for.

use crate::counters::{Counters, PlanCounters};
use crate::exchange::Exchange;
use crate::headers::Headers;
use crate::host;
use crate::link::{Answer, Link};
use crate::shared::{Place, Shared};
use crate::workers::Workers;
use fastrand::Rng;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use tideshift_core::plan::{Decision, Plan, Turns};
use tideshift_core::policy::{ControllerRef, Explain, Policy};

/// The first tick comes soon after configuring, so that the first policy does.
const FIRST_TICK: Duration = Duration::from_millis(20);
/// The later ones: heartbeats, the lease, retries.
const TICK: Duration = Duration::from_millis(200);
/// How long the right to talk to the controller lasts without a renewal.
const LEASE: Duration = Duration::from_secs(2);

/// The plugin's root context: state of its own, because Envoy may keep several configurations alive in one VM.
pub struct Root {
    worker: Rc<Worker>,
    counters: Counters,
    place: Place,
    /// Who may ask why where a policy from the controller does not say.
    explain: Option<Explain>,
    controller: Option<Controller>,
    random: Rng,
}

/// What exchanges need of their VM.
pub struct Worker {
    in_force: RefCell<Rc<InForce>>,
    turns: RefCell<Turns>,
    /// Names new users.
    random: RefCell<Rng>,
}

/// A plan with the stats of its services, by the plan's indexes.
pub struct InForce {
    /// The plan.
    pub plan: Plan,
    /// Who may ask why.
    pub explain: Option<Explain>,
    /// The stats of each of its services.
    pub counters: Vec<PlanCounters>,
}

struct Controller {
    shared: Shared,
    link: Link,
    /// `None` until the first tick.
    workers: Option<Workers>,
    /// Whether this VM had the lease at its last tick.
    leads: bool,
}

impl Worker {
    /// The policy in force.
    pub fn in_force(&self) -> Rc<InForce> {
        self.in_force.borrow().clone()
    }

    /// What is to be done with a request, by the policy in force.
    pub fn decide<'p>(&self, in_force: &'p InForce, headers: &Headers) -> Option<Decision<'p>> {
        in_force.plan.decide(headers, &mut self.turns.borrow_mut(), || self.random.borrow_mut().u64(..))
    }
}

impl Root {
    /// A VM that has not been configured.
    pub fn new() -> Self {
        let nothing = Plan::new(&Policy { controller: None, explain: None, revision: 0, services: Vec::new() });
        Self {
            worker: Rc::new(Worker {
                in_force: RefCell::new(Rc::new(InForce { plan: nothing, explain: None, counters: Vec::new() })),
                turns: RefCell::default(),
                random: RefCell::new(Rng::with_seed(0)),
            }),
            counters: Counters::default(),
            place: Place::default(),
            explain: None,
            controller: None,
            random: Rng::with_seed(0),
        }
    }

    fn apply(&mut self, policy: &Policy, place: Place) {
        let plan = Plan::new(policy);
        let counters = self.counters.cover(&plan);
        let old = self.worker.in_force();
        let turns = {
            let turns = self.worker.turns.borrow();
            Turns::for_plan(&plan, self.random.u64(..), Some((&old.plan, &turns)))
        };
        self.worker.turns.replace(turns);
        let explain = policy.explain.clone().or_else(|| self.explain.clone());
        self.worker.in_force.replace(Rc::new(InForce { plan, explain, counters }));
        self.place = place;
    }

    /// Applies what the controller has sent, if this VM does not run it yet.
    fn catch_up(&mut self) {
        let Some(controller) = &self.controller else { return };
        if !controller.shared.delivered_place().is_some_and(|place| place.replaces(&self.place)) {
            return;
        }
        let Some(delivered) = controller.shared.delivered() else { return };
        // Only valid policies are stored; should this one not be, what runs keeps running.
        if let Ok(policy) = Policy::from_json(&delivered.json) {
            self.apply(&policy, delivered.place);
            log::debug!("policy revision {} of the controller in force", self.place.revision);
        }
    }

    fn beat(&mut self, now: u64) {
        if let Some(Controller { workers: Some(workers), .. }) = &self.controller {
            workers.beat(now, &self.place);
        }
    }

    /// Takes up the talk with the controller that a configuration names.
    fn connect(&mut self, controller: &ControllerRef) {
        let shared = Shared::new(controller);
        let link = Link::new(controller, &shared);
        self.controller = Some(Controller { shared, link, workers: None, leads: false });
        self.catch_up();
        host::tick_every(FIRST_TICK);
    }

    /// Takes the plugin configuration; `false`: it is not a policy, and what ran before stays.
    pub fn configure(&mut self, size: usize) -> bool {
        let json = host::plugin_configuration(size).unwrap_or_default();
        match Policy::from_json(&json) {
            Ok(policy) => {
                self.random = Rng::with_seed(host::now() ^ std::ptr::from_ref(self) as u64);
                self.worker.random.replace(self.random.fork());
                self.explain.clone_from(&policy.explain);
                self.apply(&policy, Place { epoch: String::new(), revision: policy.revision });
                log::info!("policy revision {} of the plugin configuration in force", policy.revision);
                if let Some(controller) = &policy.controller {
                    self.connect(controller);
                }
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

    /// A request that has just arrived.
    pub fn exchange(&self) -> Exchange {
        Exchange::new(self.worker.clone())
    }

    /// Heartbeat, lease, and the talk with the controller if this VM has the lease.
    pub fn tick(&mut self) {
        let now = host::now();
        self.catch_up();
        let Some(controller) = &mut self.controller else { return };
        if controller.workers.is_none() {
            host::tick_every(TICK);
            controller.workers = Some(Workers::join(controller.shared.clone()));
        }
        self.beat(now);
        let Some(Controller { shared, link, workers: Some(workers), leads }) = &mut self.controller else { return };
        *leads = shared.lease(workers.id, now, now.saturating_add(LEASE.as_nanos() as u64));
        if *leads {
            link.poll(now, &self.place, &mut self.random);
            link.report(now, workers.applied_by_all(now), || self.counters.read());
        }
    }

    /// Another VM says that there is something new.
    pub fn woken(&mut self, queue: u32) {
        let woken = match &self.controller {
            Some(Controller { workers: Some(workers), .. }) => workers.is_woken_by(queue),
            _ => false,
        };
        if woken {
            self.catch_up();
            self.beat(host::now());
        }
    }

    /// The answer to a call of the link's; `headers` and `body` are its sizes.
    pub fn answered(&mut self, token: u32, headers: usize, body: usize) {
        let now = host::now();
        let Some(Controller { shared, link, .. }) = &mut self.controller else { return };
        match link.answered(token, (headers, body), now, shared, &self.place, &mut self.random) {
            Answer::Policy => {
                if let Some(Controller { workers: Some(workers), .. }) = &self.controller {
                    workers.wake();
                }
                self.catch_up();
                self.beat(now);
            }
            Answer::Nothing => {}
        }
        // At once, not at the next tick; but a VM that has lost the lease meanwhile leaves it to the one that has it.
        if let Some(Controller { link, leads: true, .. }) = &mut self.controller {
            link.poll(now, &self.place, &mut self.random);
        }
    }

    /// This configuration is being replaced, or the proxy ends: others need not wait for it.
    pub fn leave(self) {
        if let Some(Controller { shared, workers: Some(workers), .. }) = self.controller {
            workers.leave();
            shared.end_lease(workers.id);
        }
    }
}
