//! The policy in force on a VM, compiled, and the choice by it.

use crate::counters::PlanCounters;
use crate::host::Host;
use crate::request_headers::RequestHeaders;
use fastrand::Rng;
use std::cell::RefCell;
use std::rc::Rc;
use tideshift_core::choice::plan::{Decision, Plan, Turns};
use tideshift_core::protocol::policy::Explain;

/// A plan with the counters of its services, by the plan's indexes.
#[derive(Default)]
pub struct ActivePolicy {
    /// The plan.
    pub plan: Plan,
    /// Who may ask why.
    pub explain: Option<Explain>,
    /// The counters of each of its services.
    pub counters: Vec<PlanCounters>,
    /// Whether client headers that start like ours are to be removed.
    pub strips: bool,
}

impl ActivePolicy {
    /// The headers of the request, as many as this policy can look at.
    pub fn headers<H: Host>(&self, host: &H) -> RequestHeaders<'_, H> {
        match self.plan.few_headers() {
            Some(names) if !self.strips => RequestHeaders::few(host, names),
            _ => RequestHeaders::all(host),
        }
    }
}

/// Chooses versions for the requests of a plugin configuration, by the policy in force at that moment.
pub struct Router<H> {
    /// The proxy.
    pub host: H,
    active: RefCell<Rc<ActivePolicy>>,
    turns: RefCell<Turns>,
    /// Names new users.
    random: RefCell<Rng>,
}

impl<H: Host> Router<H> {
    /// Without a policy.
    pub fn new(host: H) -> Self {
        Self { host, active: RefCell::default(), turns: RefCell::default(), random: RefCell::new(Rng::with_seed(0)) }
    }

    /// Sets what names new users.
    pub fn set_random(&self, random: Rng) {
        self.random.replace(random);
    }

    /// The policy in force.
    pub fn active(&self) -> Rc<ActivePolicy> {
        self.active.borrow().clone()
    }

    /// Puts a policy in force. Sequences that were in the last one go on; `seed` decides where new ones start.
    pub fn activate(&self, policy: ActivePolicy, seed: u64) {
        let old = self.active();
        let turns = {
            let turns = self.turns.borrow();
            Turns::for_plan(&policy.plan, seed, Some((&old.plan, &turns)))
        };
        self.turns.replace(turns);
        self.active.replace(Rc::new(policy));
    }

    /// What is to be done with a request, by this policy.
    pub fn decide<'p>(&self, active: &'p ActivePolicy, headers: &RequestHeaders<'_, H>) -> Option<Decision<'p>> {
        active.plan.decide(headers, &mut self.turns.borrow_mut(), || self.random.borrow_mut().u64(..))
    }
}
