//! Removed versions and deleted documents that still serve. A version that had a share stays in force, as last
//! described, until other versions carry its share or its drain deadline passes. A document stays in force as its
//! `onDelete` says; its rollout is remembered for ten minutes, so that a document that comes back continues where it
//! was.

use crate::clock::{Millis, timestamp};
use crate::reconciler::Reconciler;
use crate::rollout::{Reason, Rollout};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use tideshift_core::limits::MAX_VERSIONS;
use tideshift_core::protocol::policy::Service;
use tideshift_core::shift::{OnDelete, ShiftVersion, TrafficShift};

/// How long the rollout of a deleted document is remembered.
pub(super) const REMEMBERED: Millis = 600_000;

/// The removed versions and deleted documents that still serve or are remembered. Persisted across restarts of the
/// controller.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Leaving {
    /// By document and version.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    versions: BTreeMap<String, BTreeMap<String, LeftVersion>>,
    /// By name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    documents: BTreeMap<String, LeftDocument>,
}

/// A version that was removed from its document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LeftVersion {
    /// The last document that contained it.
    document: Value,
    /// Its drain deadline; 0: not set yet, because the removal has only just been noticed.
    until: Millis,
}

/// A deleted document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LeftDocument {
    /// Its last text; `None` if it was deleted while no controller ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    document: Option<Value>,
    /// Its services.
    services: Vec<String>,
    /// When it was deleted; 0: not set yet, because the deletion has only just been noticed.
    since: Millis,
    /// Its drain deadline; 0: not set yet.
    until: Millis,
    /// Whether its weights are dropped at the deadline.
    drains: bool,
    /// Whether its weights are still in force.
    in_force: bool,
}

/// The state of a deleted document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Departure {
    /// When it was deleted; 0: not set yet, because the deletion has only just been noticed.
    pub since: Millis,
    /// Its drain deadline.
    pub until: Millis,
    /// Whether its weights are dropped at the deadline.
    pub drains: bool,
    /// Whether its weights are still in force.
    pub in_force: bool,
}

/// What must be discovered besides the current documents because it still serves. Endpoints are as the documents list
/// them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Remains {
    /// By document: its removed versions, each with the last document that contained it, its name and its drain
    /// deadline.
    pub versions: BTreeMap<String, Vec<(TrafficShift, String, Millis)>>,
    /// Deleted documents, by name.
    pub documents: BTreeMap<String, TrafficShift>,
}

impl Remains {
    /// Adds to a document the versions that were removed from it and still serve.
    pub fn add_to(&self, shift: &mut TrafficShift) {
        for (before, version, until) in self.versions.get(&shift.name).into_iter().flatten() {
            add_version(shift, before, version, *until);
        }
    }
}

/// Adds a removed version to a document, as `before` describes it.
fn add_version(shift: &mut TrafficShift, before: &TrafficShift, name: &str, until: Millis) {
    if shift.has(name) {
        return;
    }
    for service in shift.services.iter_mut().filter(|service| service.versions.len() < MAX_VERSIONS) {
        let described = before.service(&service.name).and_then(|service| service.version(name)).cloned();
        let version = described.unwrap_or_else(|| ShiftVersion {
            name: name.to_owned(),
            endpoints: Vec::new(),
            discovery: None,
            cluster: None,
            workload: None,
            replicas: None,
            leaving_until: None,
            readiness_probe: None,
        });
        service.versions.push(ShiftVersion { leaving_until: Some(until), ..version });
    }
}

/// Parses a document as written, under the name that it had: in a cluster this includes the namespace.
fn read(name: &str, document: &Value) -> Option<TrafficShift> {
    let shift = TrafficShift::read(document).ok()?;
    Some(if shift.name == name { shift } else { shift.qualified() })
}

/// Whether a version has a share of a document's services.
fn has_share(services: &[Service], shift: &TrafficShift, version: &str) -> bool {
    let of_shift = services.iter().filter(|service| shift.service(&service.name).is_some());
    let mut versions = of_shift.flat_map(|service| &service.versions);
    versions.any(|of| of.name == version && of.weight > 0 && of.serving)
}

/// The names and hosts that a document's service claims.
fn claims<'s>(name: &'s str, hostnames: &'s [String]) -> impl Iterator<Item = (bool, &'s str)> {
    let every = hostnames.is_empty().then_some((true, "*"));
    hostnames.iter().map(|host| (true, host.as_str())).chain(every).chain([(false, name)])
}

fn claims_of(shift: &TrafficShift) -> impl Iterator<Item = (bool, &str)> {
    shift.services.iter().flat_map(|service| claims(&service.name, &service.hostnames))
}

impl Leaving {
    /// Accounts for time in which no controller ran.
    pub(super) fn was_unattended(&mut self, long: Millis) {
        let later = |time: &mut Millis| *time = if *time > 0 { time.saturating_add(long) } else { 0 };
        self.versions.values_mut().flat_map(BTreeMap::values_mut).for_each(|version| later(&mut version.until));
        for document in self.documents.values_mut() {
            later(&mut document.since);
            later(&mut document.until);
        }
    }

    /// Whether nothing is removed or deleted.
    fn is_empty(&self) -> bool {
        self.versions.is_empty() && self.documents.is_empty()
    }

    /// The deleted documents that are remembered.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.documents.keys()
    }

    /// Whether the document of this name is deleted and remembered.
    pub(super) fn remembers(&self, name: &str) -> bool {
        self.documents.contains_key(name)
    }

    /// The services that are in force although their deleted document is not known.
    pub(super) fn undescribed(&self) -> impl Iterator<Item = &String> {
        let of = self.documents.values().filter(|document| document.in_force && document.document.is_none());
        of.flat_map(|document| &document.services)
    }
}

impl Reconciler {
    /// The state of a deleted document; `None` if the document exists or was deleted long ago.
    pub fn departure(&self, name: &str) -> Option<Departure> {
        let LeftDocument { since, until, drains, in_force, .. } = self.kept.leaving.documents.get(name)?;
        Some(Departure { since: *since, until: *until, drains: *drains, in_force: *in_force })
    }

    /// How many documents have been deleted since the last call, and how many deleted ones have come back in time.
    pub fn take_departures(&mut self) -> (u64, u64) {
        (std::mem::take(&mut self.documents_left), std::mem::take(&mut self.documents_returned))
    }

    /// How many deleted documents still have their weights in force.
    pub fn kept_documents(&self) -> usize {
        self.kept.leaving.documents.values().filter(|left| left.in_force).count()
    }

    /// Whether the deletion of a document's resource must wait: until its traffic goes to the default route, if it is
    /// to go there. It waits ten minutes at most, and not at all if no version can take traffic any more, as in a
    /// namespace that is being deleted.
    pub fn holds_deletion(&self, name: &str, now: Millis) -> bool {
        let Some(of) = self.departure(name) else { return false };
        let is_late = of.since > 0 && now >= of.since.saturating_add(REMEMBERED);
        let is_late = is_late || (of.until > 0 && now >= of.until);
        let shift = self.named(name);
        let serves =
            shift.is_some_and(|shift| !self.is_known(shift) || shift.versions().any(|of| self.is_ready(shift, of)));
        of.drains && of.in_force && serves && !is_late
    }

    /// Whether a version has a ready endpoint in every service of a document.
    fn is_ready(&self, shift: &TrafficShift, version: &str) -> bool {
        shift.services.iter().all(|service| self.readiness.ready(&service.name, version) > 0)
    }

    /// What must be discovered besides the current documents.
    pub fn remains(&self) -> Remains {
        let leaving = &self.kept.leaving;
        let versions = leaving.versions.iter().map(|(name, versions)| {
            let of = |(version, left): (&String, &LeftVersion)| {
                Some((read(name, &left.document)?, version.clone(), left.until))
            };
            (name.clone(), versions.iter().filter_map(of).collect())
        });
        let documents = leaving.documents.iter().filter(|(_, left)| left.in_force);
        let documents = documents.filter_map(|(name, left)| Some((name.clone(), read(name, left.document.as_ref()?)?)));
        Remains { versions: versions.collect(), documents: documents.collect() }
    }

    /// Sets the documents in force and keeps the removed and deleted parts that still serve. `before` returns a
    /// document's previous text; `deleted` holds documents that are being deleted.
    pub(super) fn take_leave(
        &mut self,
        declared: Vec<TrafficShift>,
        before: impl Fn(&str) -> Option<Value>,
        deleted: &[(TrafficShift, Value)],
    ) {
        let shifts = std::mem::take(&mut self.shifts);
        let there: HashMap<&str, &TrafficShift> = declared.iter().map(|shift| (shift.name.as_str(), shift)).collect();
        for shift in &shifts {
            let left = self.kept.leaving.documents.get(&shift.name);
            let (has_left, document) = (left.is_some(), left.and_then(|left| left.document.clone()));
            let Some(now) = there.get(shift.name.as_str()) else {
                if !has_left {
                    self.document_left(shift, before(&shift.name));
                }
                continue;
            };
            let gone = shift.versions().filter(|version| shift.declares(version) && !now.declares(version));
            for version in gone.filter(|version| has_share(&self.in_force, shift, version)) {
                let Some(document) = document.clone().or_else(|| before(&shift.name)) else { continue };
                let versions = self.kept.leaving.versions.entry(shift.name.clone()).or_default();
                versions.insert(version.to_owned(), LeftVersion { document, until: 0 });
            }
        }
        for (shift, document) in deleted {
            let left = self.kept.leaving.documents.get_mut(&shift.name);
            match left.map(|left| left.document.get_or_insert_with(|| document.clone())) {
                Some(_) => {}
                None => self.document_left(shift, Some(document.clone())),
            }
        }
        // Documents that were deleted while no controller ran.
        let leaving = &mut self.kept.leaving;
        for (name, rollout) in &self.kept.rollouts {
            let is_gone = !there.contains_key(name.as_str()) && !crate::reconciler::is_in(name, &self.hidden);
            if is_gone && !leaving.remembers(name) {
                leaving.documents.insert(name.clone(), undescribed(rollout));
            }
        }
        for (name, versions) in &mut leaving.versions {
            let now = there.get(name.as_str());
            versions.retain(|version, _| now.is_none_or(|now| !now.declares(version)));
        }
        leaving.versions.retain(|_, versions| !versions.is_empty());
        let returned = &mut self.returned;
        leaving.documents.retain(|name, left| {
            let is_back = there.contains_key(name.as_str());
            if is_back {
                returned.push((name.clone(), left.since));
            }
            !is_back
        });
        self.note_what_serves(&declared);
        self.put_together(declared, &shifts);
    }

    fn document_left(&mut self, shift: &TrafficShift, document: Option<Value>) {
        if crate::reconciler::is_in(&shift.name, &self.hidden) {
            return;
        }
        let left = LeftDocument {
            document,
            services: shift.services.iter().map(|service| service.name.clone()).collect(),
            since: 0,
            until: 0,
            drains: shift.on_delete == OnDelete::Drain,
            in_force: true,
        };
        self.kept.leaving.documents.insert(shift.name.clone(), left);
        self.dirty = true;
    }

    /// Finds the version that already serves for documents without a rollout, whichever document it belongs to.
    fn note_what_serves(&mut self, declared: &[TrafficShift]) {
        let new = declared.iter().filter(|shift| !self.kept.rollouts.contains_key(&shift.name));
        let serving = |shift: &TrafficShift| Some((shift.name.clone(), self.serving(shift)?.to_owned()));
        let starts: Vec<_> = new.filter_map(serving).collect();
        self.starts.extend(starts);
        self.starts.retain(|name, _| declared.iter().any(|shift| shift.name == *name));
    }

    /// The version that has most of the traffic that a document claims, if it is the same for all its services.
    fn serving<'s>(&self, shift: &'s TrafficShift) -> Option<&'s str> {
        let mut common = None;
        for service in &shift.services {
            let same = self.in_force.iter().find(|of| of.name == service.name);
            let is_own = |of: &&Service| claims(&of.name, &of.hostnames).any(|claim| claim.0 && own(service, claim.1));
            let of = same.or_else(|| self.in_force.iter().find(is_own))?;
            let most = of.versions.iter().filter(|version| version.serving && version.weight > 0);
            let most = &most.max_by_key(|version| version.weight)?.name;
            let version = shift.versions().find(|version| version == most)?;
            if common.is_some_and(|common| common != version) {
                return None;
            }
            common = Some(version);
        }
        common
    }

    /// Assembles the documents in force: the declared ones with their removed versions, and the deleted ones. `before`
    /// holds the previous documents in force.
    fn put_together(&mut self, declared: Vec<TrafficShift>, before: &[TrafficShift]) {
        self.unfound.clear();
        if self.kept.leaving.is_empty() {
            self.shifts = declared;
            for service in self.shifts.iter_mut().flat_map(|shift| &mut shift.services) {
                service.versions.retain(|version| version.leaving_until.is_none());
            }
            return self.know_documents(before);
        }
        let remains = self.remains();
        let described = |name: &str, version: &str| before.iter().find(|of| of.name == name && of.has(version));
        let mut unfound = BTreeSet::new();
        let is_found = |version: &ShiftVersion| version.discovery.is_some() || version.workload.is_some();
        let mut shifts = declared;
        for shift in &mut shifts {
            let of = remains.versions.get(&shift.name).map(Vec::as_slice).unwrap_or_default();
            for service in &mut shift.services {
                // The version as the cluster currently reports it, if it is still to serve.
                service.versions.retain(|version| {
                    version.leaving_until.is_none() || of.iter().any(|(_, name, _)| *name == version.name)
                });
            }
            for (document, version, until) in of {
                let known = described(&shift.name, version);
                let is_new = !shift.has(version);
                add_version(shift, known.unwrap_or(document), version, *until);
                for service in &mut shift.services {
                    let added = service.versions.iter_mut().filter(|of| of.name == *version);
                    added.for_each(|of| of.leaving_until = Some(*until));
                    let is_unresolved = |of: &&ShiftVersion| of.name == *version && is_found(of);
                    if is_new && known.is_none() && service.versions.iter().any(|of| is_unresolved(&of)) {
                        unfound.insert(shift.name.clone());
                    }
                }
            }
        }
        let claimed: BTreeSet<(bool, &str)> = shifts.iter().flat_map(claims_of).collect();
        let mut kept = Vec::new();
        for (name, left) in self.kept.leaving.documents.iter_mut().filter(|(_, left)| left.in_force) {
            let of_policy = self.in_force.iter().filter(|service| left.services.contains(&service.name));
            let mut of_policy = of_policy.flat_map(|service| claims(&service.name, &service.hostnames));
            let is_claimed = match remains.documents.get(name) {
                Some(shift) => claims_of(shift).any(|claim| claimed.contains(&claim)),
                None => of_policy.any(|claim| claimed.contains(&claim)),
            };
            if is_claimed {
                left.in_force = false;
                tracing::info!(rollout = name, "its weights are no longer kept: another document claims its services");
                continue;
            }
            let Some(shift) = remains.documents.get(name) else { continue };
            let resolved = self.resolved.get(name).or_else(|| before.iter().find(|of| of.name == *name));
            let all = || shift.services.iter().flat_map(|service| &service.versions);
            if resolved.is_none() && all().any(is_found) {
                unfound.insert(name.clone());
            }
            kept.push(resolved.unwrap_or(shift).clone());
        }
        shifts.extend(kept);
        self.shifts = shifts;
        self.unfound = unfound;
        self.know_documents(before);
    }

    /// Whether a document is deleted and only its weights are in force.
    pub(super) fn has_left(&self, shift: &TrafficShift) -> bool {
        self.kept.leaving.remembers(&shift.name)
    }

    /// Advances removed and deleted parts: deadlines begin, versions go once others carry their share, rollouts are
    /// forgotten.
    pub(super) fn look_at_what_left(&mut self, now: Millis) {
        for (name, since) in std::mem::take(&mut self.returned) {
            let Some(rollout) = self.kept.rollouts.get_mut(&name) else { continue };
            let away = if since > 0 { now.saturating_sub(since) } else { 0 };
            rollout.was_unattended(away, 0);
            let message = format!("the document is back after {} s; it goes on where it was", away / 1_000);
            tracing::warn!(rollout = name, "{message}");
            rollout.note(Reason::DocumentReturned, message, now);
            self.news.extend(rollout.take_news().into_iter().map(|news| (name.clone(), news)));
            self.documents_returned += 1;
            self.dirty = true;
        }
        if self.kept.leaving.is_empty() {
            return;
        }
        let left: BTreeSet<String> = self.kept.leaving.documents.keys().cloned().collect();
        let changed = self.begin_to_leave(now) | self.let_versions_go(now) | self.let_documents_go(now);
        if changed {
            self.dirty = true;
            self.pace.hurry();
            let before = std::mem::take(&mut self.shifts);
            let declared = before.iter().filter(|shift| !left.contains(&shift.name)).cloned().collect();
            self.put_together(declared, &before);
        }
    }

    fn begin_to_leave(&mut self, now: Millis) -> bool {
        let mut changed = false;
        let deadline = |name: &str| {
            let shift = self.shifts.iter().find(|shift| shift.name == name);
            now + shift.map_or(crate::reconciler::drain::DEADLINE, |shift| shift.drain_timeout.as_millis() as u64)
        };
        for (name, versions) in &mut self.kept.leaving.versions {
            for left in versions.values_mut().filter(|left| left.until == 0) {
                left.until = deadline(name);
                changed = true;
            }
        }
        for (name, left) in &mut self.kept.leaving.documents {
            if left.since == 0 {
                left.since = now;
                left.until = 0;
                self.documents_left += 1;
            }
            if left.until > 0 {
                continue;
            }
            left.until = deadline(name);
            changed = true;
            let message = format!("the document is gone; {}", becomes(left));
            tracing::warn!(rollout = name, "{message}");
            if let Some(rollout) = self.kept.rollouts.get_mut(name) {
                rollout.note(Reason::DocumentLeft, message, now);
                self.news.extend(rollout.take_news().into_iter().map(|news| (name.clone(), news)));
            }
        }
        changed
    }

    /// Drops removed versions once others carry their share, or at their deadline if no gate prevents it.
    fn let_versions_go(&mut self, now: Millis) -> bool {
        let mut gone = Vec::new();
        for (name, versions) in &self.kept.leaving.versions {
            let shift = self.named(name);
            let rollout = self.kept.rollouts.get(name);
            let Some((shift, rollout)) = shift.zip(rollout).filter(|(shift, _)| !self.has_left(shift)) else {
                continue;
            };
            for (version, left) in versions {
                let is_over = !rollout.uses(version) && !has_share(&self.in_force, shift, version);
                let is_late = now >= left.until && !rollout.holds_by_gate(version, shift);
                if is_over || is_late {
                    gone.push((name.clone(), version.clone(), is_over));
                }
            }
        }
        for (name, version, is_over) in &gone {
            match is_over {
                true => tracing::info!(rollout = name, "{version} left the document, and others carry its share"),
                false => tracing::warn!(rollout = name, "{version} left the document; its drain deadline has passed"),
            }
            if let Some(versions) = self.kept.leaving.versions.get_mut(name) {
                versions.remove(version);
            }
        }
        self.kept.leaving.versions.retain(|_, versions| !versions.is_empty());
        !gone.is_empty()
    }

    fn let_documents_go(&mut self, now: Millis) -> bool {
        let is_late = |of: Departure| of.in_force && of.drains && now >= of.until;
        let late = self.shifts.iter().filter(|shift| self.departure(&shift.name).is_some_and(is_late));
        let over: BTreeSet<String> = late.filter(|shift| self.may_go(shift)).map(|shift| shift.name.clone()).collect();
        for name in &over {
            tracing::warn!(rollout = name, "the document is gone, and its drain deadline has passed: {DEFAULT_ROUTE}");
            if let Some(left) = self.kept.leaving.documents.get_mut(name) {
                left.in_force = false;
            }
        }
        // Of a document that was deleted without being seen only the weights are known; they may be dropped all the
        // same.
        let unseen = self.kept.leaving.documents.values_mut();
        let unseen = unseen.filter(|left| left.document.is_none() && left.drains && left.in_force && now >= left.until);
        let is_unseen = unseen.map(|left| left.in_force = false).count() > 0;
        let before = self.kept.leaving.documents.len();
        self.kept.leaving.documents.retain(|_, left| left.in_force || now.saturating_sub(left.since) <= REMEMBERED);
        !over.is_empty() || is_unseen || before != self.kept.leaving.documents.len()
    }

    /// Whether a document's traffic may go to the default route: the route's version can take traffic, or no version
    /// can.
    fn may_go(&self, shift: &TrafficShift) -> bool {
        let ready = |version: &str| self.is_ready(shift, version);
        self.is_known(shift) && (ready(&shift.stable) || !shift.versions().any(ready))
    }

    /// Sets what happens to the weights of a deleted document, on request of the API.
    pub(super) fn give_up(&mut self, name: &str, on_delete: OnDelete) -> bool {
        let Some(left) = self.kept.leaving.documents.get_mut(name).filter(|left| left.in_force) else { return false };
        let drains = on_delete == OnDelete::Drain;
        if left.drains != drains {
            // Its deadline begins now.
            (left.drains, left.until) = (drains, 0);
            self.dirty = true;
        }
        true
    }

    /// The message about a deleted document; `None` if it is not deleted.
    pub(super) fn departure_in_words(&self, name: &str) -> Option<String> {
        let left = self.kept.leaving.documents.get(name)?;
        Some(format!("the document is gone; {}", becomes(left)))
    }
}

/// Where traffic without a policy goes.
const DEFAULT_ROUTE: &str = "its traffic goes to the default route";

/// What happens to the weights of a deleted document, for messages.
fn becomes(left: &LeftDocument) -> String {
    match (left.in_force, left.drains) {
        (false, _) => DEFAULT_ROUTE.to_owned(),
        (true, false) => {
            "its weights stay in force (onDelete: Keep) until another document claims its services, or `tideshift delete \
             --drain` gives them up"
                .to_owned()
        }
        (true, true) => {
            let until = timestamp(left.until);
            format!(
                "its weights stay in force until {until:.0} (onDelete: Drain); then {DEFAULT_ROUTE}, once its stable \
                 version is ready"
            )
        }
    }
}

fn undescribed(rollout: &Rollout) -> LeftDocument {
    let services = rollout.services().cloned().collect();
    let drains = rollout.drains_on_delete();
    LeftDocument { document: None, services, since: 0, until: 0, drains, in_force: true }
}

/// Whether a service claims a host.
fn own(service: &tideshift_core::shift::ShiftService, host: &str) -> bool {
    claims(&service.name, &service.hostnames).any(|claim| claim == (true, host))
}
