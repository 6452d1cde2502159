//! Resolves documents that name Services, labels and workloads to documents that list endpoints: the state of the
//! clusters replaces what a user would otherwise write by hand. Pure.

use crate::kubernetes::cache::{Changes, ClusterCache, NamespaceCache, ResourceKind, Slice, SliceEndpoint, Workload};
use crate::kubernetes::convert::USE_LABEL;
use crate::namespace_ref::NamespaceRef;
use crate::readiness::{DiscoveryInfo, ExcludedEndpoint};
use crate::secret_values;
use crate::secret_values::{SecretUse, SecretValues};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use tideshift_core::session::Secret;
use tideshift_core::shift::{
    Discovery, Endpoint, LabelSelector, PortRef, SecretKeyRef, ShiftVersion, TrafficShift, WorkloadRef,
};

/// Why an endpoint gets no probe and no warm-up. Otherwise a user who may write EndpointSlices could direct the
/// controller's requests to any address.
const NO_POD: &str = "its EndpointSlice names no pod of this namespace, and only pods are probed and warmed up";

/// The objects to watch for a document.
pub fn needs(shift: &TrafficShift) -> BTreeMap<NamespaceRef, BTreeSet<ResourceKind>> {
    let mut needs: BTreeMap<NamespaceRef, BTreeSet<ResourceKind>> = BTreeMap::new();
    for version in shift.services.iter().flat_map(|service| &service.versions) {
        needs.entry(NamespaceRef::of(shift, version)).or_default().extend(needs_of(version));
    }
    for reference in secret_values::references(shift) {
        let need = ResourceKind::Secret { name: reference.key.name.clone() };
        needs.entry(home(shift.namespace.as_deref().unwrap_or_default())).or_default().insert(need);
    }
    needs
}

/// A namespace of the controller's own cluster.
fn home(namespace: &str) -> NamespaceRef {
    NamespaceRef { cluster: None, namespace: namespace.to_owned() }
}

/// The values of the secrets that documents refer to.
pub fn secrets<'s>(shifts: impl IntoIterator<Item = &'s TrafficShift>, picture: &ClusterCache) -> SecretValues {
    SecretValues::of(shifts, |namespace, of, key| secret(picture, namespace, of, key))
}

/// A Secret without the label for this use counts as missing: a user who may write TrafficShifts but not read the
/// Secret cannot tell the difference.
fn secret(picture: &ClusterCache, namespace: &str, of: SecretUse, key: &SecretKeyRef) -> Result<Secret, String> {
    let SecretKeyRef { name, key } = key;
    let view = picture.view(&home(namespace));
    let not_yet = || format!("Secret {name} in namespace {namespace} has not been seen yet");
    let table = view.and_then(|view| view.secrets.get(name)).ok_or_else(not_yet)?;
    let (found, label) = (table.objects.get(name), of.label());
    let found = match (found, &table.lost, table.synced) {
        // The last known value, while the Secret cannot be watched.
        (Some(found), ..) => Some(found),
        (None, Some(why), _) => return Err(format!("Secret {name} in namespace {namespace} cannot be read: {why}")),
        (None, None, false) => return Err(not_yet()),
        (None, None, true) => None,
    };
    let found = found.filter(|found| found.label == label).ok_or_else(|| {
        format!("there is no Secret {name} with the label {USE_LABEL}: {label} in namespace {namespace}")
    })?;
    let bytes = found.data.get(key).ok_or_else(|| format!("Secret {name} has no key {key}"))?;
    of.read(bytes).map_err(|why| format!("key {key} of Secret {name}: {why}"))
}

fn needs_of(version: &ShiftVersion) -> BTreeSet<ResourceKind> {
    let mut needs = BTreeSet::new();
    if version.discovery.is_some() || is_found_by_workload(version) {
        needs.insert(ResourceKind::Slices);
    }
    if version.discovery.as_ref().is_some_and(|discovery| discovery.selector.is_some()) {
        needs.insert(ResourceKind::Pods);
    }
    if let Some(workload) = &version.workload {
        let (api_version, kind) = (workload.api_version.clone(), workload.kind.clone());
        needs.extend([
            ResourceKind::Workloads { api_version, kind },
            ResourceKind::Autoscalers,
            ResourceKind::Budgets,
            ResourceKind::Pods,
        ]);
    }
    needs
}

/// Whether a version's endpoints are found through the pods of its workload, because the document has no other
/// discovery.
fn is_found_by_workload(version: &ShiftVersion) -> bool {
    version.workload.is_some() && version.discovery.is_none() && version.endpoints.is_empty()
}

/// The cached workload of a version.
pub fn workload<'v>(view: &'v NamespaceCache, version: &ShiftVersion) -> Option<&'v Workload> {
    let workload = version.workload.as_ref()?;
    view.workloads.get(&(workload.api_version.clone(), workload.kind.clone()))?.objects.get(&workload.name)
}

/// How the endpoints of a version are discovered.
fn discovery(view: &NamespaceCache, version: &ShiftVersion) -> Option<Discovery> {
    let of_workload = || {
        let selector = workload(view, version).filter(|_| is_found_by_workload(version))?.selector.clone()?;
        Some(Discovery { service: None, selector: Some(selector), port: None })
    };
    version.discovery.clone().or_else(of_workload)
}

/// Whether changes in a namespace can affect the endpoints of a document that depends on it.
pub fn depends(shift: &TrafficShift, view: &NamespaceCache, changes: &Changes) -> bool {
    let is_changed = |workload: &WorkloadRef| {
        changes.workloads.iter().any(|(api_version, kind, name)| {
            (api_version, kind, name) == (&workload.api_version, &workload.kind, &workload.name)
        })
    };
    let mut versions = shift.services.iter().flat_map(|service| &service.versions);
    changes.all
        || versions.any(|version| {
            let of_workload = || workload(view, version).filter(|_| is_found_by_workload(version))?.selector.as_ref();
            let discovery = version.discovery.as_ref();
            let service = discovery.and_then(|discovery| discovery.service.as_ref());
            let selector = discovery.and_then(|discovery| discovery.selector.as_ref()).or_else(of_workload);
            let is_in_slices = || service.is_none_or(|service| changes.services.contains(service));
            let by_pods = |selector: &LabelSelector| {
                let labels = |pod: &String| view.pods.objects.get(pod);
                changes.labels.iter().any(|labels| selector.selects(labels))
                    || (is_in_slices() && changes.endpoints.iter().filter_map(labels).any(|of| selector.selects(of)))
            };
            version.workload.as_ref().is_some_and(is_changed)
                || match selector {
                    Some(selector) => by_pods(selector),
                    None => service.is_some() && is_in_slices(),
                }
        })
}

/// The documents with the endpoints that can receive traffic according to the clusters, and what discovery knows beyond
/// them.
pub fn resolve(
    shifts: impl IntoIterator<Item = TrafficShift>,
    picture: &ClusterCache,
) -> (Vec<TrafficShift>, DiscoveryInfo) {
    let all: Vec<Resolved> = shifts.into_iter().map(|shift| resolve_one(shift, picture)).collect();
    let outlook = beyond(all.iter().map(|one| (&one.outlook, one.owners.as_slice())));
    (all.into_iter().map(|one| one.shift).collect(), outlook)
}

/// Combines what discovery knows beyond each document.
pub fn beyond<'r>(all: impl Iterator<Item = (&'r DiscoveryInfo, &'r [Owner])> + Clone) -> DiscoveryInfo {
    let mut outlook =
        DiscoveryInfo { shared: shared(all.clone().flat_map(|(_, owners)| owners)), ..DiscoveryInfo::default() };
    for (one, _) in all {
        outlook.unseen.extend(one.unseen.clone());
        outlook.held_back.extend(one.held_back.clone());
    }
    outlook
}

/// The pods of a version that are ready endpoints, by name and address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    shift: String,
    service: String,
    version: String,
    namespace: String,
    pods: Vec<(String, String)>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {} of the TrafficShift {}", self.version, self.shift)
    }
}

/// The errors of versions that share a pod, by service and version. A pod has the same namespace, name and address
/// whatever name a document uses for its cluster.
pub fn shared<'o>(owners: impl IntoIterator<Item = &'o Owner>) -> BTreeMap<(String, String), String> {
    let mut pods: HashMap<(&str, &str, &str), &Owner> = HashMap::new();
    let mut shared: BTreeMap<(String, String), String> = BTreeMap::new();
    for own in owners {
        for (pod, address) in &own.pods {
            let first = *pods.entry((&own.namespace, pod, address)).or_insert(own);
            // A version with the same name in several services is one version.
            if (&first.shift, &first.version) == (&own.shift, &own.version) {
                continue;
            }
            let why = format!(
                "pod {pod} is a ready endpoint of {first} and of {own}; a pod belongs to one version of one TrafficShift, \
                 so the workloads of both versions are not scaled"
            );
            for owner in [first, own] {
                let key = (owner.service.clone(), owner.version.clone());
                shared.entry(key).or_insert_with(|| why.clone());
            }
        }
    }
    shared
}

/// A document with its endpoints, the discovery info that does not depend on other documents, and the pods of its
/// versions.
#[derive(Debug)]
pub struct Resolved {
    /// The document.
    pub shift: TrafficShift,
    /// The discovery info.
    pub outlook: DiscoveryInfo,
    /// The pods.
    pub owners: Vec<Owner>,
}

/// Resolves one document.
pub fn resolve_one(mut shift: TrafficShift, picture: &ClusterCache) -> Resolved {
    let (mut outlook, mut owners) = (DiscoveryInfo::default(), Vec::new());
    let unresolved = shift.clone();
    let mut unseen = None;
    for service in &mut shift.services {
        let mut found: Vec<(usize, Vec<Candidate>)> = Vec::new();
        let mut absent: BTreeMap<usize, Vec<ExcludedEndpoint>> = BTreeMap::new();
        for (n, version) in service.versions.iter_mut().enumerate() {
            let place = NamespaceRef::of(&unresolved, version);
            unseen = unseen.or_else(|| picture.unseen(&place, &needs_of(version)));
            let Some(view) = picture.view(&place) else { continue };
            if let Some(discovery) = discovery(view, version) {
                let endpoints = find(view, &discovery);
                version.replicas = Some(endpoints.len() as u32);
                found.push((n, endpoints));
            }
            let replicas = workload(view, version).map(|workload| workload.replicas);
            version.replicas = replicas.or(version.replicas);
            absent.insert(
                n,
                missing_pods(view, version, found.last().filter(|(of, _)| *of == n).map(|(_, found)| found)),
            );
        }
        // If there are no other endpoints, terminating endpoints that still serve receive traffic, as with Services.
        let mut all = found.iter().flat_map(|(_, endpoints)| endpoints);
        let last_resort = !all.any(|found| found.state.ready && !found.state.terminating);
        for (n, endpoints) in found {
            let version = &mut service.versions[n];
            let held_back = absent.entry(n).or_default();
            let is_asked = version.readiness_probe.is_some() || unresolved.strategy.warm_up.requests.is_some();
            let mut pods = Vec::new();
            for found in endpoints {
                let stranger = (is_asked && found.state.pod.is_none()).then_some(NO_POD);
                match (stranger.or_else(|| found.not_ready_reason(last_resort)), found.endpoint) {
                    (None, Some(endpoint)) => {
                        version.endpoints.push(endpoint);
                        pods.extend(found.state.pod.map(|pod| (pod, found.state.address)));
                    }
                    (not_ready_reason, endpoint) => held_back.push(ExcludedEndpoint {
                        endpoint: endpoint.map_or(found.name, |endpoint| endpoint.to_string()),
                        reason: not_ready_reason.unwrap_or("its EndpointSlice has no such port").to_owned(),
                    }),
                }
            }
            owners.push(Owner {
                shift: unresolved.name.clone(),
                service: service.name.clone(),
                version: version.name.clone(),
                namespace: NamespaceRef::of(&unresolved, version).namespace,
                pods,
            });
        }
        for (n, held_back) in absent.into_iter().filter(|(_, held_back)| !held_back.is_empty()) {
            outlook.held_back.insert((service.name.clone(), service.versions[n].name.clone()), held_back);
        }
    }
    if let Some(why) = unseen {
        outlook.unseen.extend(shift.services.iter().map(|service| (service.name.clone(), why.clone())));
    }
    Resolved { shift, outlook, owners }
}

/// Messages for expected endpoints that do not exist: pods that no Service lists, a missing workload.
fn missing_pods(
    view: &NamespaceCache,
    version: &ShiftVersion,
    found: Option<&Vec<Candidate>>,
) -> Vec<ExcludedEndpoint> {
    let mut absent = Vec::new();
    if let Some(named) = version.workload.as_ref().filter(|_| workload(view, version).is_none()) {
        absent.push(ExcludedEndpoint { endpoint: named.to_string(), reason: "there is no such workload".to_owned() });
    }
    let discovery = discovery(view, &ShiftVersion { endpoints: Vec::new(), ..version.clone() });
    // If a Service is named as well, pods that it does not select do not belong to the version.
    let discovery = discovery.filter(|discovery| discovery.service.is_none());
    let Some(selector) = discovery.and_then(|discovery| discovery.selector) else { return absent };
    let listed = |pod: &String| found.into_iter().flatten().any(|found| found.state.pod.as_ref() == Some(pod));
    let pods = view.pods.objects.iter().filter(|(pod, labels)| selector.selects(labels) && !listed(pod));
    let reason = "in no EndpointSlice: it has no address yet, or no Service selects it";
    absent.extend(pods.map(|(pod, _)| ExcludedEndpoint { endpoint: pod.clone(), reason: reason.to_owned() }));
    absent
}

/// An endpoint of a version in any state.
struct Candidate {
    /// The pod, or the address if there is none.
    name: String,
    /// None: the slice lacks the requested port.
    endpoint: Option<Endpoint>,
    state: SliceEndpoint,
}

impl Candidate {
    /// Why it cannot receive traffic, if so.
    fn not_ready_reason(&self, last_resort: bool) -> Option<&'static str> {
        match (self.state.terminating, self.state.ready, self.state.serving) {
            (false, true, _) => None,
            (true, _, true) if last_resort => None,
            (true, _, true) => Some("terminating"),
            (true, _, false) => Some("terminating, and not ready"),
            (false, false, _) => Some("not ready"),
        }
    }
}

/// The endpoints of a version. A pod that several Services list is one endpoint, which is ready if all of them report
/// it as ready.
fn find(view: &NamespaceCache, discovery: &Discovery) -> Vec<Candidate> {
    let mut found: BTreeMap<String, Candidate> = BTreeMap::new();
    let slices = || view.slices.objects.of_service(discovery.service.as_deref());
    // Pods with two address families are in slices of both; one of them is enough.
    let has_ipv4 =
        slices().any(|slice| !slice.is_ipv6 && slice.endpoints.iter().any(|state| selects(view, discovery, state)));
    for slice in slices().filter(|slice| !(has_ipv4 && slice.is_ipv6)) {
        let port = port(slice, discovery.port.as_ref());
        for state in slice.endpoints.iter().filter(|state| selects(view, discovery, state)) {
            let host = &state.address;
            let endpoint = port.filter(|_| !host.is_empty()).map(|port| Endpoint { host: host.clone(), port });
            let name = state.pod.clone().unwrap_or_else(|| host.clone());
            let one = Candidate { name: name.clone(), endpoint, state: state.clone() };
            match found.get_mut(&name) {
                None => _ = found.insert(name, one),
                Some(before) => {
                    before.state.ready &= one.state.ready;
                    before.state.serving &= one.state.serving;
                    before.state.terminating |= one.state.terminating;
                    before.endpoint = before.endpoint.take().or(one.endpoint);
                }
            }
        }
    }
    found.into_values().collect()
}

/// The pods behind a version's endpoints: all, or those that can receive traffic.
pub fn pods(view: &NamespaceCache, version: &ShiftVersion, only_ready: bool) -> BTreeSet<String> {
    let unresolved = ShiftVersion { endpoints: Vec::new(), ..version.clone() };
    let found = discovery(view, &unresolved).map(|discovery| find(view, &discovery)).unwrap_or_default().into_iter();
    let found = found.filter(|found| !only_ready || found.not_ready_reason(false).is_none());
    found.filter_map(|found| found.state.pod).collect()
}

/// The pods of a version's workload and endpoints, by name and address, as far as a slice lists them.
pub fn workload_pods(view: &NamespaceCache, version: &ShiftVersion) -> BTreeSet<(String, String)> {
    let mut names = pods(view, version, false);
    if let Some(selector) = workload(view, version).and_then(|workload| workload.selector.as_ref()) {
        let selected = view.pods.objects.iter().filter(|(_, labels)| selector.selects(labels));
        names.extend(selected.map(|(name, _)| name.clone()));
    }
    let endpoints = view.slices.objects.values().flat_map(|slice| &slice.endpoints);
    let pods = endpoints.filter_map(|state| Some((state.pod.clone()?, state.address.clone())));
    pods.filter(|(name, _)| names.contains(name)).collect()
}

/// One of these pods, by name and address, that is a ready endpoint of a version, if any.
pub fn ready_among(view: &NamespaceCache, version: &ShiftVersion, pods: &BTreeSet<(String, String)>) -> Option<String> {
    let unresolved = ShiftVersion { endpoints: Vec::new(), ..version.clone() };
    let mut ready =
        find(view, &discovery(view, &unresolved)?).into_iter().filter(|found| found.not_ready_reason(false).is_none());
    ready.find_map(|found| {
        let pod = (found.state.pod?, found.state.address);
        pods.contains(&pod).then_some(pod.0)
    })
}

fn selects(view: &NamespaceCache, discovery: &Discovery, state: &SliceEndpoint) -> bool {
    let Some(selector) = &discovery.selector else { return true };
    let labels = state.pod.as_ref().and_then(|pod| view.pods.objects.get(pod));
    labels.is_some_and(|labels| selector.selects(labels))
}

fn port(slice: &Slice, wanted: Option<&PortRef>) -> Option<u16> {
    let is_wanted = |(name, number): &&(String, u16)| match wanted {
        None => true,
        Some(PortRef::Name(wanted)) => name == wanted,
        Some(PortRef::Number(wanted)) => number == wanted,
    };
    slice.ports.iter().find(is_wanted).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::cache::{Labels, Objects, SecretData, Store, slice_key};
    use serde_json::{Value, json};
    use std::sync::Arc;
    use tideshift_core::shift::WarmUpRequests;

    fn shift(v1: Value, v2: Value) -> TrafficShift {
        let mut versions = [v1, v2];
        versions[0]["name"] = json!("v1");
        versions[1]["name"] = json!("v2");
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
            "metadata": {"name": "shop", "namespace": "store"},
            "spec": {"versions": versions, "stable": "v1"},
        });
        TrafficShift::read(&document).unwrap().qualified()
    }

    fn endpoint(n: u8, conditions: &str) -> SliceEndpoint {
        SliceEndpoint {
            address: format!("10.0.0.{n}"),
            pod: Some(format!("pod-{n}")),
            ready: conditions.contains('r'),
            serving: conditions.contains('s'),
            terminating: conditions.contains('t'),
        }
    }

    fn slice(service: &str, endpoints: &[SliceEndpoint]) -> Slice {
        let ports = vec![("http".to_owned(), 8080), ("grpc".to_owned(), 9090)];
        Slice { service: Some(service.to_owned()), ports, endpoints: endpoints.to_vec(), ..Slice::default() }
    }

    /// A cache of the one namespace, completely listed.
    fn picture(slices: &[Slice], labels: &[(u8, &str)]) -> ClusterCache {
        let key = |n: usize, slice: &Slice| slice_key(slice.service.as_deref(), &format!("slice-{n}"));
        let slices = slices.iter().enumerate().map(|(n, slice)| (key(n, slice), slice.clone())).collect();
        let track = |track: &str| BTreeMap::from([("track".to_owned(), track.to_owned())]);
        let pods = labels.iter().map(|(n, value)| (format!("pod-{n}"), track(value))).collect();
        let deployments = Store {
            objects: BTreeMap::from([("shop-v1".to_owned(), Workload { replicas: 5, selector: None })]).into(),
            synced: true,
            lost: None,
        };
        let view = NamespaceCache {
            slices: Store { objects: slices, synced: true, lost: None },
            pods: Store { objects: pods, synced: true, lost: None },
            workloads: BTreeMap::from([(("apps/v1".to_owned(), "Deployment".to_owned()), deployments)]),
            autoscalers: Store { synced: true, ..Store::default() },
            budgets: Store { synced: true, ..Store::default() },
            secrets: BTreeMap::new(),
        };
        let place = NamespaceRef { cluster: None, namespace: "store".to_owned() };
        ClusterCache { views: BTreeMap::from([(place, view)]), ..ClusterCache::default() }
    }

    /// The endpoints of the versions, and the excluded ones.
    fn resolved(shift: TrafficShift, picture: &ClusterCache) -> (Vec<Vec<String>>, Vec<String>) {
        let (shifts, outlook) = resolve([shift], picture);
        let versions = &shifts[0].services[0].versions;
        let endpoints = versions.iter().map(|version| version.endpoints.iter().map(Endpoint::to_string).collect());
        let held_back = outlook.held_back.values().flatten();
        (endpoints.collect(), held_back.map(|one| format!("{}: {}", one.endpoint, one.reason)).collect())
    }

    #[test]
    fn endpoints_are_those_of_the_service_with_the_labels_and_that_port() {
        let slices = [
            slice("shop", &[endpoint(1, "rs"), endpoint(2, "rs"), endpoint(3, "")]),
            slice("other", &[endpoint(1, "rs"), endpoint(4, "rs")]),
        ];
        let picture = picture(&slices, &[(1, "old"), (2, "new"), (3, "new"), (4, "new")]);
        let track = |track: &str| json!({"matchLabels": {"track": track}});
        let by_both = shift(
            json!({"service": "shop", "selector": track("old"), "port": "grpc"}),
            json!({"service": "shop", "selector": track("new"), "port": 8080}),
        );
        assert_eq!(
            resolved(by_both, &picture),
            (
                vec![vec!["10.0.0.1:9090".to_owned()], vec!["10.0.0.2:8080".to_owned()]],
                vec!["10.0.0.3:8080: not ready".to_owned()]
            )
        );
        let by_labels_only = shift(json!({"selector": track("old")}), json!({"selector": track("new")}));
        let (by_labels, _) = resolved(by_labels_only.clone(), &picture);
        assert_eq!(by_labels[0], ["10.0.0.1:8080"], "one pod of two Services is one endpoint");
        assert_eq!(by_labels[1], ["10.0.0.2:8080", "10.0.0.4:8080"]);
        let nowhere = picture.views.values().next().unwrap().clone();
        let nowhere = NamespaceCache { slices: Store { synced: true, ..Store::default() }, ..nowhere };
        let held_back = missing_pods(&nowhere, &by_labels_only.services[0].versions[0], None);
        assert_eq!(
            (held_back[0].endpoint.as_str(), held_back.len()),
            ("pod-1", 1),
            "a pod that no Service lists is said"
        );
        let (_, held_back) = resolved(shift(json!({"service": "other", "port": "ftp"}), json!({})), &picture);
        assert_eq!(held_back[0], "pod-1: its EndpointSlice has no such port");
    }

    #[test]
    fn only_secrets_of_the_namespace_that_are_labelled_for_it_are_used() {
        let key = |name: &str| json!({"name": name, "key": "key"});
        let by = |namespace: &str, name: &str| {
            let document = json!({
                "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
                "metadata": {"name": "shop", "namespace": namespace},
                "spec": {
                    "versions": [{"name": "v1"}], "stable": "v1",
                    "session": {"type": "Cookie", "name": "c", "secretRef": key(name)},
                    "webhooks": [{"name": "a", "type": "Gate", "url": "https://a.example.com", "secretRef": key(name)}],
                },
            });
            TrafficShift::read(&document).unwrap().qualified()
        };
        let need = ResourceKind::Secret { name: "hook".to_owned() };
        assert!(needs(&by("store", "hook"))[&home("store")].contains(&need));
        let mut picture = picture(&[], &[]);
        let labelled = |name: &str, label: &str| {
            let data = BTreeMap::from([("key".to_owned(), b"hush".to_vec())]);
            let secret = SecretData { label: label.to_owned(), data };
            let objects = Objects::from(BTreeMap::from([(name.to_owned(), secret)]));
            (name.to_owned(), Store { objects, synced: true, lost: None })
        };
        let store = picture.views.get_mut(&home("store")).unwrap();
        store.secrets =
            BTreeMap::from([labelled("hook", "webhook"), labelled("user", "session"), labelled("any", "true")]);
        store.secrets.insert("bare".to_owned(), Store { synced: true, ..Store::default() });
        store.secrets.insert("later".to_owned(), Store::default());
        let unresolved = |namespace: &str, name: &str, picture: &ClusterCache| {
            let shift = by(namespace, name);
            secrets([&shift], picture).unresolved(&shift)
        };
        let none = |field: &str, name: &str, label: &str| {
            format!("{field}: there is no Secret {name} with the label {USE_LABEL}: {label} in namespace store")
        };
        let (session, hook) = ("spec.session.secretRef", "spec.webhooks[0].secretRef");
        assert_eq!(unresolved("store", "hook", &picture), [none(session, "hook", "session")]);
        assert_eq!(unresolved("store", "user", &picture), [none(hook, "user", "webhook")]);
        for name in ["any", "bare"] {
            let expected = [none(session, name, "session"), none(hook, name, "webhook")];
            assert_eq!(unresolved("store", name, &picture), expected);
        }
        assert_eq!(unresolved("other", "hook", &picture).len(), 2, "another namespace has its own");
        assert!(unresolved("store", "later", &picture)[0].ends_with("has not been seen yet"));
        // The last known value remains while the Secret cannot be watched.
        let store = picture.views.get_mut(&home("store")).unwrap();
        store.secrets.get_mut("hook").unwrap().lost = Some("connection refused".to_owned());
        assert_eq!(unresolved("store", "hook", &picture).len(), 1);
        assert!(!format!("{picture:?}").contains(&format!("{:?}", b"hush")));
    }

    #[test]
    fn only_pods_are_probed_and_warmed_up() {
        let stranger = SliceEndpoint { pod: None, ..endpoint(2, "rs") };
        let picture = picture(&[slice("v1", &[endpoint(1, "rs"), stranger])], &[]);
        let probed = json!({"service": "v1", "readinessProbe": {"httpGet": {"port": 8080}}});
        let (endpoints, held_back) = resolved(shift(probed, json!({})), &picture);
        assert_eq!(
            (endpoints[0].as_slice(), held_back.as_slice()),
            (&["10.0.0.1:8080".to_owned()][..], &[format!("10.0.0.2:8080: {NO_POD}")][..])
        );
        let mut warmed_up = shift(json!({"service": "v1"}), json!({}));
        let unasked = resolved(warmed_up.clone(), &picture).0;
        assert_eq!(unasked[0].len(), 2, "the controller asks neither, so the slice's word is enough: {unasked:?}");
        warmed_up.strategy.warm_up.requests = Some(WarmUpRequests::default());
        assert_eq!(resolved(warmed_up, &picture).0[0], ["10.0.0.1:8080"]);
    }

    #[test]
    fn what_is_about_to_go_takes_traffic_only_where_nobody_else_can() {
        let of = |v1: &str, v2: &str| {
            let slices = [slice("v1", &[endpoint(1, v1)]), slice("v2", &[endpoint(2, v2)])];
            let (endpoints, _) =
                resolved(shift(json!({"service": "v1"}), json!({"service": "v2"})), &picture(&slices, &[]));
            (endpoints[0].len(), endpoints[1].len())
        };
        assert_eq!(of("rs", "rs"), (1, 1));
        assert_eq!(of("st", "rs"), (0, 1));
        assert_eq!(of("st", ""), (1, 0), "it still answers, and the other is not ready");
        assert_eq!(of("t", ""), (0, 0));
    }

    #[test]
    fn of_two_address_families_one_counts() {
        let six = SliceEndpoint { address: "fd00::1".to_owned(), ..endpoint(1, "rs") };
        let slices = [Slice { is_ipv6: true, ..slice("v1", &[six]) }, slice("v1", &[endpoint(1, "rs")])];
        let (endpoints, _) = resolved(shift(json!({"service": "v1"}), json!({})), &picture(&slices, &[]));
        assert_eq!(endpoints[0], ["10.0.0.1:8080"]);
        let (endpoints, _) = resolved(shift(json!({"service": "v1"}), json!({})), &picture(&slices[..1], &[]));
        assert_eq!(endpoints[0], ["[fd00::1]:8080"]);
    }

    #[test]
    fn what_the_load_needs_is_what_the_workload_asks_for_or_what_is_there() {
        let slices = [slice("v1", &[endpoint(1, "rs")]), slice("v2", &[endpoint(2, ""), endpoint(3, "rs")])];
        let shift = shift(
            json!({"service": "v1", "workloadRef": {"name": "shop-v1"}}),
            json!({"service": "v2", "workloadRef": {"name": "not-there"}}),
        );
        let (shifts, outlook) = resolve([shift], &picture(&slices, &[]));
        let held_back = &outlook.held_back[&("shop.store".to_owned(), "v2".to_owned())];
        let held_back: Vec<_> = held_back.iter().map(|one| format!("{}: {}", one.endpoint, one.reason)).collect();
        assert_eq!(held_back, ["Deployment not-there: there is no such workload", "10.0.0.2:8080: not ready"]);
        let desired: Vec<_> = shifts[0].services[0].versions.iter().map(ShiftVersion::desired).collect();
        assert_eq!(desired, [5, 2]);
    }

    #[test]
    fn a_pod_of_two_versions_is_said_with_both_names() {
        let shared = |shifts: Vec<TrafficShift>, slices: &[Slice]| resolve(shifts, &picture(slices, &[])).1.shared;
        let slices = [
            slice("all", &[endpoint(1, "rs"), endpoint(2, "rs")]),
            slice("new", &[endpoint(2, "rs")]),
            slice("other", &[endpoint(3, "rs")]),
        ];
        let within = shift(json!({"service": "all"}), json!({"service": "new"}));
        let of_both = shared(vec![within.clone()], &slices);
        let keys: Vec<_> = of_both.keys().map(|(service, version)| format!("{service} {version}")).collect();
        assert_eq!(keys, ["shop.store v1", "shop.store v2"]);
        let why = "pod pod-2 is a ready endpoint of version v1 of the TrafficShift shop.store and of version v2 of the \
                   TrafficShift shop.store; ";
        assert!(of_both.values().all(|said| said.starts_with(why)), "{of_both:?}");
        let apart = shift(json!({"service": "all"}), json!({"service": "other"}));
        assert_eq!(shared(vec![apart.clone()], &slices), BTreeMap::new());
        let mut rival = shift(json!({"service": "new"}), json!({"service": "nothing"}));
        rival.name = "rival.store".to_owned();
        rival.services[0].name = rival.name.clone();
        let of_two = shared(vec![apart, rival], &slices);
        assert_eq!(of_two.len(), 2);
        assert!(
            of_two[&("rival.store".to_owned(), "v1".to_owned())].contains("of version v1 of the TrafficShift rival")
        );
        // A pod that is not ready has no owner yet.
        let not_ready = [slice("all", &[endpoint(2, "")]), slice("new", &[endpoint(2, "")])];
        assert_eq!(shared(vec![within], &not_ready), BTreeMap::new());
    }

    #[test]
    fn services_that_are_not_in_sight_are_said_to_be_so() {
        let by_service = || shift(json!({"service": "v1"}), json!({"service": "v2", "cluster": "west"}));
        let unseen = |picture: &ClusterCache| resolve([by_service()], picture).1.unseen.into_values().next().unwrap();
        let mut here = picture(&[], &[]);
        assert_eq!(unseen(&here), "EndpointSlices of cluster west in namespace store have not been seen yet");
        let west = NamespaceRef { cluster: Some("west".to_owned()), namespace: "store".to_owned() };
        let view = NamespaceCache { slices: Store { synced: true, ..Store::default() }, ..NamespaceCache::default() };
        here.views.insert(west.clone(), view);
        assert_eq!(resolve([by_service()], &here).1, DiscoveryInfo::default());
        here.lost.insert(west.cluster.clone(), "connection refused".to_owned());
        assert_eq!(unseen(&here), "cluster west cannot be seen: connection refused");
        here.lost.clear();
        let slices = &mut here.views.get_mut(&west).unwrap().slices;
        slices.lost = Some("forbidden".to_owned());
        assert_eq!(unseen(&here), "EndpointSlices of cluster west in namespace store cannot be seen: forbidden");
    }

    #[test]
    fn a_document_is_looked_at_again_for_what_it_depends_on_and_for_nothing_else() {
        let slices = [slice("shop", &[endpoint(1, "rs"), endpoint(2, "rs")]), slice("other", &[endpoint(3, "rs")])];
        let mut picture = picture(&slices, &[(1, "old"), (2, "new"), (3, "new")]);
        let view = picture.views.values_mut().next().unwrap();
        let track = |track: &str| json!({"matchLabels": {"track": track}});
        let by_service = shift(json!({"service": "shop"}), json!({"service": "more"}));
        let by_labels = shift(json!({"selector": track("old")}), json!({"selector": track("gone")}));
        let by_both = shift(json!({"service": "shop", "selector": track("old")}), json!({"service": "more"}));
        let of = |view: &NamespaceCache, changes: &Changes| {
            [&by_service, &by_labels, &by_both].map(|shift| depends(shift, view, changes))
        };
        let changed = |from: usize, to: &[SliceEndpoint]| {
            let mut changes = Changes::default();
            let service = slices[from].service.as_deref().unwrap();
            changes.slice(Some(&Arc::new(slices[from].clone())), Some(&Arc::new(slice(service, to))));
            of(view, &changes)
        };
        assert_eq!(changed(0, &[endpoint(1, ""), endpoint(2, "rs")]), [true, true, true]);
        assert_eq!(changed(0, &[endpoint(1, "rs"), endpoint(2, "")]), [true, false, false], "pod 2 is new");
        assert_eq!(changed(1, &[endpoint(3, "")]), [false, false, false], "another Service, and other labels");
        assert_eq!(changed(1, &[]), [false, false, false]);

        let labelled = |before: Option<&str>, now: Option<&str>| {
            let labels = |track: &str| Arc::new(Labels::from([("track".to_owned(), track.to_owned())]));
            let mut changes = Changes::default();
            changes.pod(before.map(labels).as_ref(), now.map(labels).as_ref());
            of(view, &changes)
        };
        assert_eq!(labelled(None, Some("new")), [false, false, false]);
        assert_eq!(labelled(None, Some("old")), [false, true, true]);
        assert_eq!(labelled(Some("gone"), Some("new")), [false, true, false], "it was one of v2's");
        assert_eq!(of(view, &Changes { all: true, ..Changes::default() }), [true; 3]);

        let scaled = shift(json!({"workloadRef": {"name": "shop-v1"}}), json!({"service": "v2"}));
        let workload = |name: &str| ("apps/v1".to_owned(), "Deployment".to_owned(), name.to_owned());
        for (name, is_touched) in [("shop-v1", true), ("shop-v2", false)] {
            let changes = Changes { workloads: BTreeSet::from([workload(name)]), ..Changes::default() };
            assert_eq!(depends(&scaled, view, &changes), is_touched, "{name}");
        }
    }

    #[test]
    fn slices_of_a_service_are_those_of_no_other() {
        let services = ["shop", "shop-v1", "shop.v1", "shop0", "sho", ""];
        let slices = services.map(|service| (slice_key(Some(service), "a"), slice(service, &[])));
        let objects: Objects<Slice> = slices.into_iter().collect();
        let found = |service: Option<&str>| {
            let found = objects.of_service(service).filter_map(|slice| slice.service.clone());
            found.collect::<Vec<_>>()
        };
        for service in services {
            assert_eq!(found(Some(service)), [service]);
        }
        assert_eq!(found(None).len(), services.len());
    }
}
