//! Policy delivery: a complete policy, or a delta from another one. A proxy applies the valid services; an invalid
//! service keeps its previous configuration. A proxy rejects the whole policy only if it cannot read it at all.
//!
//! The controller may be newer than the proxy. An unknown field is ignored where that is harmless: beside the services
//! (a proxy declares in its poll which of those fields it supports, such as `delta`) and in `guard`. Anywhere else it
//! may affect which requests a version receives, so that the service is rejected: docs/upgrade.md.
//!
//! A delta looks like a policy with two additional fields: `base`, the revision that it applies to, and `removed`, the
//! names of the removed services. Each service in it is new or replaces the one with the same name.

use crate::decode::{Decoder, Errors, FieldError};
use crate::protocol::policy::{Policy, Service, Unique};
use crate::protocol::report::Refused;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The policy that a proxy runs after a delivery, and the services that it rejected.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    /// The policy, in which the last valid configuration replaces each invalid service.
    pub policy: Policy,
    /// The invalid services.
    pub refused: Vec<RefusedService>,
    /// The base revision of a delta; `None` for a complete policy.
    pub base: Option<u64>,
    /// Unknown fields from a newer controller that were ignored because they are harmless.
    pub ignored: Vec<FieldError>,
}

/// An invalid service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedService {
    /// Its name, or its position if the name cannot be read.
    pub name: String,
    /// The errors, one per line.
    pub errors: Vec<String>,
}

/// Why the whole delivery was rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The document cannot be read, or none of its services is valid.
    Wrong {
        /// Its revision, if that can be read.
        revision: Option<u64>,
        /// All errors.
        errors: Errors,
    },
    /// The delta applies to another policy.
    OtherBase(u64),
}

/// The running policy when a delivery arrives.
#[derive(Debug, Clone, Copy)]
pub struct Before<'p> {
    /// The policy.
    pub policy: &'p Policy,
    /// Its revision, if it has the same epoch as the delivery.
    pub revision: Option<u64>,
    /// The services that were rejected in it.
    pub refused: &'p [RefusedService],
}

/// A delivery whose services have not been parsed yet.
struct Head<'v> {
    policy: Policy,
    base: Option<u64>,
    removed: BTreeSet<String>,
    services: &'v [Value],
}

impl Delivery {
    /// Parses a delivery from JSON text.
    ///
    /// # Errors
    ///
    /// If nothing in it can be applied.
    pub fn read(json: &[u8], before: Before<'_>) -> Result<Self, Refusal> {
        let wrong = |revision, errors| Refusal::Wrong { revision, errors };
        let document: Value = serde_json::from_slice(json)
            .map_err(|error| wrong(None, Errors::of_document(format!("not JSON: {error}"))))?;
        let revision = document.get("revision").and_then(|revision| Decoder::default().long(revision));
        let mut ignored = Vec::new();
        let head =
            Decoder::read_from_peer(&document, &mut ignored, Head::read).map_err(|errors| wrong(revision, errors))?;
        if let Some(base) = head.base.filter(|base| before.revision != Some(*base)) {
            return Err(Refusal::OtherBase(base));
        }
        let mut claims = Claims::default();
        let (mut good, mut refused, mut errors) = (BTreeMap::new(), Vec::new(), Vec::new());
        // Changed services do not conflict with their own previous configuration.
        let named: BTreeSet<&str> = head.services.iter().filter_map(name).collect();
        let stays = |service: &&Service| {
            head.base.is_some() && !named.contains(service.name.as_str()) && !head.removed.contains(&service.name)
        };
        for service in before.policy.services.iter().filter(stays) {
            claims.take(&mut Decoder::default(), service);
        }
        let mut order = Vec::with_capacity(head.services.len());
        for (i, value) in head.services.iter().enumerate() {
            let read = |d: &mut Decoder, value| d.within("services", |d| d.at(i, |d| Service::read(d, value)));
            let read = Decoder::read_from_peer(value, &mut ignored, read);
            let read = read.and_then(|service| {
                let take = |d: &mut Decoder| claims.take(d, &service).then_some(());
                Decoder::read(value, |d, _| d.within("services", |d| d.at(i, take)))?;
                Ok(service)
            });
            let name = name(value).map_or_else(|| format!("services[{i}]"), str::to_owned);
            match read {
                Ok(service) => drop(good.insert(name.clone(), service)),
                Err(found) => {
                    let lines = found.0.iter().map(ToString::to_string).collect();
                    refused.push(RefusedService { name: name.clone(), errors: lines });
                    errors.extend(found.0);
                }
            }
            order.push(name);
        }
        if good.is_empty() && !refused.is_empty() {
            return Err(wrong(revision, Errors(errors)));
        }
        // Keep their previous configuration, unless another service has claimed its names.
        for RefusedService { name, .. } in &refused {
            let was = before.policy.services.iter().find(|service| service.name == *name);
            if let Some(was) = was.filter(|was| claims.take(&mut Decoder::default(), was)) {
                good.insert(name.clone(), was.clone());
            }
        }
        if head.base.is_some() {
            let is_new = |name: &String| before.policy.services.iter().all(|service| service.name != *name);
            order.retain(is_new);
            let known = before.policy.services.iter().map(|service| service.name.clone());
            order = known.chain(order).collect();
            let still = |of: &&RefusedService| !named.contains(of.name.as_str()) && !head.removed.contains(&of.name);
            refused.extend(before.refused.iter().filter(still).cloned());
        }
        let mut staying: BTreeMap<&str, &Service> =
            before.policy.services.iter().filter(stays).map(|service| (service.name.as_str(), service)).collect();
        let services =
            order.iter().filter_map(|name| good.remove(name).or_else(|| staying.remove(name.as_str()).cloned()));
        let services = services.collect();
        let policy = match head.base {
            None => Policy { services, ..head.policy },
            Some(_) => Policy { revision: head.policy.revision, services, ..before.policy.clone_head() },
        };
        Ok(Self { policy, refused, base: head.base, ignored })
    }
}

impl<'v> Head<'v> {
    fn read(d: &mut Decoder, value: &'v Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let policy = Policy::read_head(d, &mut f);
        let services = f.required(d, "services", "a list of services", |d, value| {
            if !value.is_array() {
                d.invalid(value, "a list");
            }
            value.as_array()
        });
        let base = f.optional(d, "base", Decoder::long);
        let removed = f.optional(d, "removed", |d, value| d.list(value, Decoder::text)).unwrap_or_default();
        f.finish_harmless(d);
        let removed = removed.into_iter().map(|(_, name)| name).collect();
        Some(Self { policy: policy?, base, removed, services: services? })
    }
}

fn name(service: &Value) -> Option<&str> {
    service.get("name")?.as_str()
}

/// The claimed names and hostnames.
struct Claims {
    names: Unique,
    hostnames: Unique,
}

impl Default for Claims {
    fn default() -> Self {
        Self { names: Unique::of_services(), hostnames: Unique::of_hostnames() }
    }
}

impl Claims {
    /// Claims the names of a service, or none of them if another service has claimed any.
    fn take(&mut self, d: &mut Decoder, service: &Service) -> bool {
        let every = ["*".to_owned()];
        let hostnames = if service.hostnames.is_empty() { &every[..] } else { &service.hostnames[..] };
        let mut fits = d.within("name", |d| self.names.is_free(d, &service.name));
        let mut own = BTreeSet::new();
        for (i, hostname) in hostnames.iter().enumerate() {
            let is_free = |d: &mut Decoder| self.hostnames.is_free(d, hostname);
            fits &= d.within("hostnames", |d| if service.hostnames.is_empty() { is_free(d) } else { d.at(i, is_free) });
            if !own.insert(hostname) {
                fits = false;
                let value = Value::String(hostname.clone());
                d.within("hostnames", |d| d.at(i, |d| d.invalid(&value, "each hostname once")));
            }
        }
        if fits {
            self.names.add(&service.name);
            hostnames.iter().for_each(|hostname| self.hostnames.add(hostname));
        }
        fits
    }
}

/// The error in a report about services that were rejected in a policy in force; `None` if none were.
pub fn report(revision: u64, refused: &[RefusedService]) -> Option<Refused> {
    let errors = refused.iter().flat_map(|service| service.errors.iter().cloned()).collect();
    let services = refused.iter().map(|service| service.name.clone()).collect();
    (!refused.is_empty()).then_some(Refused { revision: Some(revision), errors, services })
}

#[cfg(test)]
mod tests;
