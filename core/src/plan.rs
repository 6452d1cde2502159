//! The plan: a policy compiled for choosing, and the choice itself. One request's way is [`Plan::route`], which finds
//! the service, the rule and the split, then [`Split::choose`], which takes the next point of the even sequence.

use crate::hostname::Hostnames;
use crate::outcome::ErrorCodes;
use crate::policy::{Policy, Rule, Service};
use crate::request::{AUTHORITY, Request};
use crate::sequence::EvenSequence;
use std::collections::BTreeMap;

/// A policy made ready to choose by.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The revision of the policy that it was made from.
    pub revision: u64,
    /// The services, in the policy's order.
    pub services: Vec<ServicePlan>,
    hostnames: Hostnames,
}

/// One service of a plan.
#[derive(Debug, Clone)]
pub struct ServicePlan {
    /// The service's name.
    pub name: String,
    /// The names of its versions, in the policy's order; splits refer to them by index.
    pub versions: Vec<String>,
    /// What counts as a version's fault.
    pub errors: ErrorCodes,
    rules: Vec<RulePlan>,
    split: Split,
}

#[derive(Debug, Clone)]
struct RulePlan {
    rule: Rule,
    split: Split,
}

/// Versions in service with their weights, ready to choose among. Versions that are out of service or have no weight
/// are not in it, so their share goes to the others in proportion.
#[derive(Debug, Clone)]
pub struct Split {
    /// Index of a version, and the sum of the weights up to and including its own.
    entries: Vec<(usize, u32)>,
    total: u32,
    /// Its place among the plan's splits: each service's own, followed by those of its rules.
    slot: usize,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy)]
pub struct Route<'p> {
    /// The service that it is for, as an index of [`Plan::services`].
    pub service: usize,
    /// The rule that took it, as an index of the service's rules; `None`: the service's own weights apply.
    pub rule: Option<usize>,
    /// The versions to choose among; empty if nothing is in service.
    pub split: &'p Split,
}

/// One worker's places in the even sequences of a plan's splits.
#[derive(Debug, Clone, Default)]
pub struct Sequences(Vec<EvenSequence>);

impl Plan {
    /// Compiles a policy.
    pub fn new(policy: &Policy) -> Self {
        let mut hostnames = Hostnames::default();
        let mut slots = 0;
        let mut next_slot = || {
            slots += 1;
            slots - 1
        };
        let mut services = Vec::with_capacity(policy.services.len());
        for (i, service) in policy.services.iter().enumerate() {
            if service.hostnames.is_empty() {
                hostnames.insert(None, i);
            }
            for hostname in &service.hostnames {
                hostnames.insert(Some(hostname), i);
            }
            services.push(ServicePlan::new(service, &mut next_slot));
        }
        Self { revision: policy.revision, services, hostnames }
    }

    /// Where a request goes; `None`: it is for no service of the plan, to be left alone.
    pub fn route(&self, request: &(impl Request + ?Sized)) -> Option<Route<'_>> {
        let authority = if self.hostnames.refer_to_host() { request.header(AUTHORITY) } else { None };
        let index = self.hostnames.find(authority.as_deref().unwrap_or_default())?;
        let service = self.services.get(index)?;
        // Rules come first, so that testers reach what users do not see yet. A rule that has nobody in service to
        // offer is passed over. (Sessions, when they come, stand between the rules and the weights.)
        let takes = |rule: &RulePlan| !rule.split.is_empty() && rule.holds(request);
        match service.rules.iter().enumerate().find(|(_, rule)| takes(rule)) {
            Some((i, rule)) => Some(Route { service: index, rule: Some(i), split: &rule.split }),
            None => Some(Route { service: index, rule: None, split: &service.split }),
        }
    }
}

impl ServicePlan {
    fn new(service: &Service, next_slot: &mut impl FnMut() -> usize) -> Self {
        let position = |name: &str| service.versions.iter().position(|version| version.name == name);
        let mut split = |weights: &mut dyn Iterator<Item = (&str, u32)>| {
            let mut entries = Vec::new();
            let mut total = 0u32;
            for (name, weight) in weights {
                let serving = position(name).and_then(|i| service.versions.get(i).filter(|v| v.serving).map(|_| i));
                if let (Some(index), 1..) = (serving, weight) {
                    total = total.saturating_add(weight);
                    entries.push((index, total));
                }
            }
            Split { entries, total, slot: next_slot() }
        };
        Self {
            name: service.name.clone(),
            versions: service.versions.iter().map(|version| version.name.clone()).collect(),
            errors: service.errors.clone(),
            split: split(&mut service.versions.iter().map(|version| (version.name.as_str(), version.weight))),
            rules: service
                .rules
                .iter()
                .map(|rule| RulePlan {
                    rule: rule.clone(),
                    split: split(&mut rule.versions.iter().map(|version| (version.name.as_str(), version.weight))),
                })
                .collect(),
        }
    }

    /// The rule at an index of [`Route::rule`].
    pub fn rule(&self, index: usize) -> Option<&Rule> {
        self.rules.get(index).map(|rule| &rule.rule)
    }
}

impl RulePlan {
    fn holds(&self, request: &(impl Request + ?Sized)) -> bool {
        self.rule.matches.is_empty() || self.rule.matches.iter().any(|m| m.holds(request))
    }
}

impl Split {
    /// Whether nothing is in service.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The versions in service (by index) and their weights.
    pub fn weights(&self) -> impl Iterator<Item = (usize, u32)> {
        self.entries.iter().scan(0, |before, (version, sum)| {
            let weight = sum - *before;
            *before = *sum;
            Some((*version, weight))
        })
    }

    /// The version (by index) for the next request; `None` if nothing is in service.
    pub fn choose(&self, sequences: &mut Sequences) -> Option<usize> {
        let point = match self.entries.as_slice() {
            [] => return None,
            [(only, _)] => return Some(*only),
            _ => sequences.0.get_mut(self.slot)?.next_below(self.total),
        };
        let at = self.entries.partition_point(|(_, sum)| *sum <= point);
        self.entries.get(at).map(|(version, _)| *version)
    }
}

impl Sequences {
    /// The places for a new plan: splits that were in the old one go on where they were, so that frequent changes of
    /// weights do not make shares uneven; the others start at a place that `seed` decides.
    pub fn for_plan(plan: &Plan, seed: u64, before: Option<(&Plan, &Self)>) -> Self {
        let mut known = BTreeMap::new();
        if let Some((old, _)) = before {
            known.extend(old.services.iter().enumerate().map(|(i, service)| (service.name.clone(), i)));
        }
        // A rule is known again by its service's name and its number.
        let old_place = |service: &ServicePlan, rule: Option<usize>| {
            let (old, places) = before?;
            let service = old.services.get(*known.get(&service.name)?)?;
            let split = match rule {
                None => &service.split,
                Some(rule) => &service.rules.get(rule)?.split,
            };
            places.0.get(split.slot).copied()
        };
        let mut places = Vec::new();
        for service in &plan.services {
            for rule in std::iter::once(None).chain((0..service.rules.len()).map(Some)) {
                // Another odd multiple of the golden ratio for each split, so that they do not move in step.
                let apart = (places.len() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let fresh = || EvenSequence::new(seed.wrapping_add(apart));
                places.push(old_place(service, rule).unwrap_or_else(fresh));
            }
        }
        Self(places)
    }
}
