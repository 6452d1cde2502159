//! Admission of documents that are in force together, from any source: files, the API or a cluster. Each document must
//! compile to services that proxies accept and stay within its size limit; no two documents may claim the same name,
//! hostname, workload or pods. A rejected document claims nothing and does not block others.

mod runs;

use crate::compile;
use crate::namespace_ref::NamespaceRef;
use flate2::Compression;
use flate2::write::GzEncoder;
use runs::{ONE_VERSION, Runs, claims};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use tideshift_core::decode::{Errors, FieldError, Problem};
use tideshift_core::limits::MAX_WEIGHT;
use tideshift_core::protocol::policy::{Policy, Service};
use tideshift_core::session::{MAX_PREVIOUS_SECRETS, Secret};
use tideshift_core::shift::{ShiftService, TrafficShift};

/// The maximum size of one document: of its JSON, and of the services that proxies receive for it.
pub const MAX_DOCUMENT_BYTES: usize = 256 << 10;
/// The maximum size of all documents of one namespace; documents without a namespace count as one.
pub const MAX_NAMESPACE_BYTES: usize = 512 << 10;
/// The maximum size of all documents together, each compressed with gzip. The state is compressed, too, and in
/// Kubernetes it must fit into a Secret of 1 MiB: this leaves a third of that for rollouts and readiness.
pub const MAX_PACKED_BYTES: usize = 640 << 10;

/// The size of a document.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// The larger of its JSON and of the services that proxies receive for it.
    pub bytes: usize,
    /// The same, compressed.
    pub packed: usize,
}

/// A document that can be in force: parsed and as written.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// The parsed document.
    pub shift: TrafficShift,
    /// The document as written.
    pub document: Value,
    /// Its size.
    pub size: Size,
}

/// Checks whether a document alone can be in force: proxies accept its services at every step, and it is not too large.
///
/// # Errors
///
/// Every error in the document.
pub fn check(shift: &TrafficShift, document: &Value) -> Result<Size, Errors> {
    let mut contradictions = Admission::default().contradictions(shift, "the same document");
    contradictions.extend(shared_by_versions(shift));
    if !contradictions.is_empty() {
        return Err(Errors(contradictions));
    }
    let services: Vec<Service> = shift.services.iter().map(|service| at_its_largest(service, shift)).collect();
    let json = read_back(shift, &services)?;
    // Testers of one step at a time, and the same in each service.
    let mut testers = 0;
    for step in shift.strategy.steps.iter().filter(|step| !step.matches.is_empty()) {
        let first = services.iter().take(1).cloned().map(|mut service| {
            let target = shift.target.as_ref().unwrap_or(&shift.stable);
            compile::put_first(&mut service, compile::testers(target, step.matches.clone()));
            service
        });
        let rule = serde_json::to_vec(&step.matches).map_or(0, |json| json.len());
        testers = testers.max(rule * services.len());
        read_back(shift, &first.collect::<Vec<_>>())?;
    }
    let document = serde_json::to_vec(document).unwrap_or_default();
    let bytes = document.len().max(json.len() + testers);
    if bytes > MAX_DOCUMENT_BYTES {
        return Err(Errors::of_document(format!(
            "{bytes} bytes, as proxies get it or as JSON; at most {MAX_DOCUMENT_BYTES} are allowed for one document"
        )));
    }
    let packed = packed(&json).max(packed(&document)) + testers;
    Ok(Size { bytes, packed })
}

/// Errors for resources that two versions of a document claim.
fn shared_by_versions(shift: &TrafficShift) -> Vec<FieldError> {
    let mut taken: BTreeMap<NamespaceRef, Vec<(Runs, &str)>> = BTreeMap::new();
    let mut errors = Vec::new();
    for (n, service) in shift.services.iter().enumerate() {
        for (i, version) in service.versions.iter().enumerate() {
            for (field, (place, runs)) in claims(shift, version) {
                let of_place = taken.entry(place).or_default();
                let earlier = of_place.iter().find(|(other, name)| *name != version.name && runs.overlaps(other));
                if let Some((other, name)) = earlier {
                    let overlap = if runs == *other { String::new() } else { format!("overlaps with {other}, ") };
                    errors.push(FieldError {
                        path: format!("{}.versions[{i}].{field}", path_of(shift, n)),
                        problem: Problem::Unreadable(format!(
                            "{runs}: not allowed for version {}: {overlap}already version {name}'s in the same document; \
                             {ONE_VERSION}",
                            version.name
                        )),
                    });
                }
                of_place.push((runs, &version.name));
            }
        }
    }
    errors
}

/// The path of a service in the document.
fn path_of(shift: &TrafficShift, service: usize) -> String {
    match has_several(shift) {
        true => format!("spec.services[{service}]"),
        false => "spec".to_owned(),
    }
}

fn has_several(shift: &TrafficShift) -> bool {
    shift.services.len() > 1 || shift.services.iter().any(|service| service.name != shift.name)
}

/// A service with as many digits as it can ever have.
fn at_its_largest(service: &ShiftService, shift: &TrafficShift) -> Service {
    let mut compiled = compile::service(service, |_| (MAX_WEIGHT, false));
    compiled.stable = Some(shift.stable.clone());
    compiled.step = u64::MAX;
    if let Some(session) = &mut compiled.session {
        let longest = || Secret::new("0".repeat(if service.session_secret.is_some() { 1024 } else { 32 }));
        let secret = session.secret.get_or_insert_with(longest).clone();
        session.previous_secrets = vec![secret; MAX_PREVIOUS_SECRETS];
    }
    compiled
}

/// Decodes services as a proxy does. Returns their JSON.
///
/// # Errors
///
/// What proxies would reject, by the document's fields.
fn read_back(shift: &TrafficShift, services: &[Service]) -> Result<Vec<u8>, Errors> {
    let policy = Policy { revision: 1, services: services.to_vec(), ..Policy::default() };
    let json = serde_json::to_vec(&policy).unwrap_or_default();
    match Policy::from_json(&json) {
        Ok(_) => Ok(json),
        Err(errors) => Err(in_document(shift, errors)),
    }
}

/// Maps errors in services to the document's fields.
fn in_document(shift: &TrafficShift, errors: Errors) -> Errors {
    let alone = shift.services.len() == 1;
    let field = |path: &str| match path.strip_prefix("services[0]") {
        Some(rest) if alone => format!("spec{rest}"),
        _ => format!("spec.{path}"),
    };
    let told = |error: FieldError| FieldError {
        path: field(&error.path),
        problem: Problem::Unreadable(format!(
            "proxies would refuse what becomes of it: {}",
            FieldError { path: String::new(), ..error }
        )),
    };
    Errors(errors.0.into_iter().map(told).collect())
}

/// Checks that proxies accept the services that are about to be published.
///
/// # Errors
///
/// What proxies would reject, by the document's fields.
pub fn readable(shift: &TrafficShift, services: &[Service]) -> Result<(), Errors> {
    read_back(shift, services).map(|_| ())
}

fn packed(json: &[u8]) -> usize {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing to memory does not fail.
    let _ = encoder.write_all(json);
    encoder.finish().map_or(json.len(), |packed| packed.len())
}

/// The documents accepted so far, by what each of them claims.
#[derive(Debug, Default)]
pub struct Admission {
    /// The owner of each name, service and hostname: the name of the TrafficShift and its source.
    names: BTreeMap<String, String>,
    services: BTreeMap<String, (String, String)>,
    hostnames: BTreeMap<String, (String, String)>,
    /// The same for workloads and pods, with the version that claims each.
    runs: BTreeMap<(NamespaceRef, Runs), (String, String, String)>,
    bytes: BTreeMap<Option<String>, usize>,
    packed: usize,
}

impl Admission {
    /// Accepts a document with everything that it claims, or rejects it as a whole. `from` is its source, for the
    /// errors of later documents.
    ///
    /// # Errors
    ///
    /// Every claim that another document already holds, with its name, and every size limit that is exceeded.
    pub fn take(&mut self, shift: &TrafficShift, size: Size, from: &str) -> Result<(), Errors> {
        let mut errors = self.contradictions(shift, from);
        let of_namespace = self.bytes.get(&shift.namespace).copied().unwrap_or_default() + size.bytes;
        if of_namespace > MAX_NAMESPACE_BYTES {
            let all = match &shift.namespace {
                Some(namespace) => format!("all documents of namespace {namespace}"),
                None => "all documents".to_owned(),
            };
            errors.extend(whole(format!(
                "with its {} bytes {all} have {of_namespace}; at most {MAX_NAMESPACE_BYTES} are allowed for one \
                 namespace",
                size.bytes
            )));
        }
        let packed = self.packed + size.packed;
        if packed > MAX_PACKED_BYTES {
            errors.extend(whole(format!(
                "with it all documents together have {packed} bytes by gzip; at most {MAX_PACKED_BYTES} are allowed"
            )));
        }
        if !errors.is_empty() {
            return Err(Errors(errors));
        }
        self.bytes.insert(shift.namespace.clone(), of_namespace);
        self.packed = packed;
        let claim = || (shift.name.clone(), from.to_owned());
        self.names.insert(shift.name.clone(), from.to_owned());
        for service in &shift.services {
            self.services.insert(service.name.clone(), claim());
            for hostname in hostnames(service) {
                self.hostnames.insert(hostname.to_owned(), claim());
            }
            for version in &service.versions {
                let of_version = || (version.name.clone(), shift.name.clone(), from.to_owned());
                self.runs.extend(claims(shift, version).into_iter().map(|(_, runs)| (runs, of_version())));
            }
        }
        Ok(())
    }

    /// Releases the claims of a document that was accepted.
    pub fn give_back(&mut self, shift: &TrafficShift, size: Size) {
        self.names.remove(&shift.name);
        for service in &shift.services {
            self.services.remove(&service.name);
            hostnames(service).for_each(|hostname| drop(self.hostnames.remove(hostname)));
            let claims = service.versions.iter().flat_map(|version| claims(shift, version));
            claims.for_each(|(_, runs)| drop(self.runs.remove(&runs)));
        }
        if let Some(bytes) = self.bytes.get_mut(&shift.namespace) {
            *bytes = bytes.saturating_sub(size.bytes);
        }
        self.packed = self.packed.saturating_sub(size.packed);
    }

    fn contradictions(&self, shift: &TrafficShift, from: &str) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let mut wrong = |path: String, why: String| errors.push(FieldError { path, problem: Problem::Unreadable(why) });
        if let Some(earlier) = self.names.get(&shift.name) {
            let why = format!("\"{}\" is already the name of the TrafficShift in {earlier}", shift.name);
            wrong("metadata.name".to_owned(), why);
        }
        let mut own = BTreeMap::new();
        let several = has_several(shift);
        for (n, service) in shift.services.iter().enumerate() {
            let at = path_of(shift, n);
            let taken = self.services.get(&service.name).filter(|(name, _)| several || *name != service.name);
            if let Some((name, earlier)) = taken {
                let why = format!("\"{}\" is already a service of the TrafficShift {name} in {earlier}", service.name);
                wrong(if several { format!("{at}.name") } else { "metadata.name".to_owned() }, why);
            }
            for (i, hostname) in hostnames(service).enumerate() {
                let own_claim = own.insert(hostname, ()).map(|()| (shift.name.as_str(), from));
                let claim = self.hostnames.get(hostname).map(|(name, from)| (name.as_str(), from.as_str()));
                let Some((name, earlier)) = claim.or(own_claim) else { continue };
                let (path, what) = match hostname {
                    EVERY_HOST => (format!("{at}.hostnames"), "missing, which means every host; so does".to_owned()),
                    _ => (format!("{at}.hostnames[{i}]"), format!("\"{hostname}\" is already a hostname of")),
                };
                wrong(path, format!("{what} the TrafficShift {name} in {earlier}"));
            }
            for (i, version) in service.versions.iter().enumerate() {
                for (field, (place, runs)) in claims(shift, version) {
                    let what = runs.to_string();
                    let Some((other, name, earlier)) = self.runs.get(&(place, runs)) else { continue };
                    let why = format!(
                        "{what}: not allowed for version {}: already version {other}'s of the TrafficShift {name} in \
                         {earlier}; {ONE_VERSION}",
                        version.name
                    );
                    wrong(format!("{at}.versions[{i}].{field}"), why);
                }
            }
        }
        errors
    }
}

/// The claim of a service without hostnames.
const EVERY_HOST: &str = "*";

fn hostnames(service: &ShiftService) -> impl Iterator<Item = &str> {
    let every = service.hostnames.is_empty().then_some(EVERY_HOST);
    service.hostnames.iter().map(String::as_str).chain(every)
}

fn whole(why: String) -> Option<FieldError> {
    Some(FieldError { path: String::new(), problem: Problem::Unreadable(why) })
}

/// The result of admission.
#[derive(Debug, Default)]
pub struct Admitted {
    /// The documents in force, by name.
    pub held: BTreeMap<String, Arc<Held>>,
    /// Why the current version of a document is not in force, by name.
    pub refused: BTreeMap<String, Errors>,
}

/// Decides which of the current documents are in force, by name: all of them if they do not conflict. In a conflict the
/// older claim wins: a document in force keeps what it has, and among new documents the first in the list wins. A
/// rejected document stays in force as it was before.
pub fn agree(
    before: &BTreeMap<String, Arc<Held>>,
    documents: impl IntoIterator<Item = (String, Result<Arc<Held>, Errors>)>,
) -> Admitted {
    let (mut held, mut refused, mut waiting) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    let mut there = Vec::new();
    for (name, document) in documents {
        there.push(name.clone());
        match document {
            Ok(document) => waiting.push((name, document)),
            Err(errors) => {
                held.extend(before.get(&name).map(|before| (name.clone(), before.clone())));
                refused.insert(name, errors);
            }
        }
    }
    let mut admission = Admission::default();
    let mut take = |held: &Held| admission.take(&held.shift, held.size, FORCE).is_ok();
    if held.values().all(|held| take(held)) && waiting.iter().all(|(_, held)| take(held)) {
        held.extend(waiting);
        return Admitted { held, refused };
    }
    // One document after the other, starting from what is in force. What one releases, another may claim in the next
    // round.
    let of_before = there.into_iter().filter_map(|name| before.get(&name).map(|before| (name, before.clone())));
    held.extend(of_before);
    let mut admission = Admission::default();
    held.retain(|_, held| admission.take(&held.shift, held.size, FORCE).is_ok());
    loop {
        let were_waiting = waiting.len();
        waiting.retain(|(name, document)| {
            let before = held.get(name).cloned();
            // A document that is in force unchanged has nothing to release.
            if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, document)) {
                refused.remove(name);
                return false;
            }
            before.iter().for_each(|before| admission.give_back(&before.shift, before.size));
            match admission.take(&document.shift, document.size, FORCE) {
                Ok(()) => {
                    held.insert(name.clone(), document.clone());
                    refused.remove(name);
                    false
                }
                Err(errors) => {
                    before.iter().for_each(|before| drop(admission.take(&before.shift, before.size, FORCE)));
                    refused.insert(name.clone(), errors);
                    true
                }
            }
        });
        if waiting.len() == were_waiting {
            return Admitted { held, refused };
        }
    }
}

/// The source of documents in force, in the errors of those that conflict with them.
const FORCE: &str = "force";

#[cfg(test)]
mod tests;
