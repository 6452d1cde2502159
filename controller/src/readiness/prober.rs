//! The prober: runs one task for each endpoint of the documents in force ([`crate::readiness::worker`]), and keeps the
//! readiness table.

use super::{DiscoveryInfo, EndpointState, Readiness, RememberedReadiness};
use crate::limits::Limits;
use crate::readiness::probe::Subject;
use crate::readiness::table::{Logged, ReadinessSpec, Running, Table};
use crate::readiness::worker::{Clients, Watch};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tideshift_core::shift::TrafficShift;
use tokio::sync::watch;
use tokio::time::Instant;

/// Runs the probes. Stops them when dropped.
#[derive(Debug)]
pub struct Prober {
    clients: Clients,
    remembered: RememberedReadiness,
    table: Arc<Table>,
}

impl Prober {
    /// A prober without endpoints. The `remembered` endpoints start as ready when they first appear with their service,
    /// until their probes report otherwise.
    ///
    /// # Errors
    ///
    /// If the TLS library cannot be set up.
    pub fn start(remembered: RememberedReadiness) -> Result<Self, reqwest::Error> {
        Self::start_within(Limits::of_machine(), remembered)
    }

    /// The same with other limits.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_within(limits: Limits, remembered: RememberedReadiness) -> Result<Self, reqwest::Error> {
        let table = Table { tasks: Mutex::default(), readiness: watch::Sender::default() };
        Ok(Self { clients: Clients::new(limits)?, remembered, table: Arc::new(table) })
    }

    /// Subscribes to the readiness, starting with the current one.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Readiness>> {
        self.table.readiness.subscribe()
    }

    /// Sets the documents whose endpoints are probed. An endpoint that was probed before keeps its state, and also its
    /// task if the conditions for its readiness are unchanged. Must be called from within a Tokio runtime.
    pub fn set(&self, shifts: &[TrafficShift]) {
        let outlook = self.table.readiness.borrow().outlook.clone();
        self.set_with(shifts, outlook);
    }

    /// The same, with additional information from a cluster.
    pub fn set_with(&self, shifts: &[TrafficShift], outlook: Arc<DiscoveryInfo>) {
        let mut tasks = self.table.lock();
        let before = Arc::clone(&self.table.readiness.borrow());
        let mut readiness = Readiness { outlook, ..Readiness::default() };
        let mut running = BTreeMap::new();
        for (shift, service) in
            shifts.iter().flat_map(|shift| shift.services.iter().map(move |service| (shift, service)))
        {
            let versions = readiness.services.entry(service.name.clone()).or_default();
            for version in &service.versions {
                let terms = ReadinessSpec::of(shift, version);
                let endpoints = version.endpoints.iter().map(|endpoint| {
                    let (service, version) = (service.name.clone(), version.name.clone());
                    let subject = Subject { service, version, endpoint: endpoint.clone() };
                    let (mut state, serves) = self.state(&before, &subject, &terms);
                    if terms.probe.is_some() || !state.ready {
                        let kept = tasks.running.remove(&subject).filter(|running| running.terms == terms);
                        let task = kept.unwrap_or_else(|| {
                            tasks.started += 1;
                            state.warming = false;
                            let namespace = shift.namespace.clone().unwrap_or_default();
                            let watch = self.watch(tasks.started, namespace, &subject, terms.clone());
                            watch.start(state.ready, serves)
                        });
                        running.insert(subject, task);
                    }
                    state
                });
                versions.insert(version.name.clone(), endpoints.collect());
            }
        }
        // Tasks that remain in the old map are dropped here, which stops them.
        tasks.running = running;
        self.table.readiness.send_replace(Arc::new(readiness));
    }

    /// The initial state of an endpoint before its first result, and whether it is assumed to serve already.
    fn state(&self, before: &Readiness, subject: &Subject, terms: &ReadinessSpec) -> (EndpointState, bool) {
        let Subject { service, version, endpoint } = subject;
        let is_watched = before.services.contains_key(service);
        let earlier = before.find(service, version, endpoint);
        let remembered = !is_watched && self.remembered.has(service, version, endpoint);
        let unheard_of = earlier.map_or(!is_watched, |state| !state.known) && !self.remembered.0.contains_key(service);
        let trusted = terms.yields && unheard_of;
        let unprobed = terms.probe.is_none();
        let at_once = unprobed && (terms.warm_up.is_none() || trusted);
        let state = EndpointState {
            endpoint: endpoint.clone(),
            ready: at_once || remembered || earlier.is_some_and(|state| state.ready),
            known: unprobed || remembered || earlier.map_or(is_watched, |state| state.known),
            warming: earlier.is_some_and(|state| state.warming),
            reason: earlier.filter(|_| !at_once).and_then(|state| state.reason.clone()),
        };
        let serves = state.ready || trusted;
        (state, serves)
    }

    fn watch(&self, number: u64, namespace: String, subject: &Subject, terms: ReadinessSpec) -> Watch {
        let (table, clients) = (Arc::clone(&self.table), self.clients.clone());
        Watch { table, clients, number, subject: subject.clone(), namespace, terms }
    }
}

impl Watch {
    fn start(self, ready: bool, serves: bool) -> Running {
        let (number, terms) = (self.number, self.terms.clone());
        let task = tokio::spawn(async move { self.run(ready, serves).await });
        let logged = Logged { since: Instant::now(), lines: 0 };
        Running { number, terms, stop: task.abort_handle(), logged }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.table.lock().running.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::table::Finding;
    use serde_json::{Value, json};
    use std::time::Duration;
    use tokio::net::TcpListener;

    #[test]
    fn an_endpoint_that_comes_and_goes_does_not_fill_the_log() {
        let begun = Instant::now();
        let mut logged = Logged { since: begun, lines: 0 };
        let at = |millis: u64| begun + Duration::from_millis(millis);
        let lines: Vec<_> = (0..30_000).step_by(100).filter_map(|millis| logged.line(at(millis))).collect();
        let window = |left_out| [left_out, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(lines, [window(0), window(90), window(90)].concat());
    }

    /// The TrafficShift `checkout` with these endpoints and probes of v1 and v2.
    fn shift(v1: (&[u16], Value), v2: (&[u16], Value)) -> TrafficShift {
        let version = |name, (ports, probe): (&[u16], Value)| {
            let endpoints: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
            json!({"name": name, "endpoints": endpoints, "readinessProbe": probe})
        };
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "checkout"},
            "spec": {"versions": [version("v1", v1), version("v2", v2)], "stable": "v1"},
        });
        TrafficShift::read(&document).unwrap()
    }

    fn tcp(fields: Value) -> Value {
        let mut probe = json!({"tcpSocket": {}, "periodMillis": 5});
        probe.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        probe
    }

    async fn listener() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    async fn until(prober: &Prober, holds: impl FnMut(&Arc<Readiness>) -> bool) -> Arc<Readiness> {
        let mut readiness = prober.subscribe();
        let holds = tokio::time::timeout(Duration::from_secs(20), readiness.wait_for(holds)).await;
        Arc::clone(&holds.expect("in time").unwrap())
    }

    fn numbers(prober: &Prober) -> Vec<u64> {
        prober.table.lock().running.values().map(|running| running.number).collect()
    }

    #[tokio::test]
    async fn without_a_probe_endpoints_are_ready_as_soon_as_they_are_listed() {
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        prober.set(&[shift((&[1, 2], Value::Null), (&[], Value::Null))]);
        let readiness = Arc::clone(&prober.subscribe().borrow());
        assert_eq!((readiness.ready("checkout", "v1"), readiness.listed("checkout", "v1")), (2, 2));
        assert_eq!((readiness.ready("checkout", "v2"), readiness.listed("checkout", "v2")), (0, 0));
        assert_eq!((readiness.is_known("checkout"), readiness.is_known("search")), (true, false));
        assert_eq!((readiness.ready("checkout", "v3"), readiness.ready("search", "v1")), (0, 0));
    }

    #[tokio::test]
    async fn readiness_comes_and_goes_with_the_endpoint() {
        let (open, port) = listener().await;
        let (closed, closed_port) = listener().await;
        drop(closed);
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        prober.set(&[shift((&[port], tcp(json!({}))), (&[closed_port], tcp(json!({}))))]);
        assert!(!prober.subscribe().borrow().is_known("checkout"));
        let readiness = until(&prober, |readiness| readiness.is_known("checkout")).await;
        assert_eq!((readiness.ready("checkout", "v1"), readiness.ready("checkout", "v2")), (1, 0));
        assert_eq!(readiness.endpoints("checkout", "v2")[0].reason.as_deref(), Some("connection refused"));
        drop(open);
        until(&prober, |readiness| readiness.ready("checkout", "v1") == 0).await;
        let _open = TcpListener::bind(("127.0.0.1", closed_port)).await.unwrap();
        let readiness = until(&prober, |readiness| readiness.ready("checkout", "v2") == 1).await;
        assert_eq!(readiness.endpoints("checkout", "v2")[0].reason, None);
    }

    #[tokio::test]
    async fn an_endpoint_that_comes_back_counts_once_proxies_have_had_the_time_to_see_it() {
        let (closed, port) = listener().await;
        drop(closed);
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        prober.set(&[shift((&[port], tcp(json!({"periodMillis": 100}))), (&[], Value::Null))]);
        until(&prober, |readiness| readiness.is_known("checkout")).await;
        let _open = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let begun = Instant::now();
        until(&prober, |readiness| readiness.ready("checkout", "v1") == 1).await;
        assert!(begun.elapsed() >= Duration::from_millis(150), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn the_first_probe_comes_at_once_and_not_after_a_period() {
        let (_open, port) = listener().await;
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        let slow = json!({"tcpSocket": {}, "periodSeconds": 3600});
        let delayed = json!({"tcpSocket": {}, "initialDelaySeconds": 3600});
        prober.set(&[shift((&[port], slow), (&[port], delayed))]);
        let readiness = until(&prober, |readiness| readiness.ready("checkout", "v1") == 1).await;
        assert!(!readiness.endpoints("checkout", "v2")[0].known);
    }

    fn remembered_of(readiness: &Readiness) -> Value {
        let mut remembered = RememberedReadiness::default();
        assert!(readiness.remember(&mut remembered, &readiness.services.keys().cloned().collect()));
        serde_json::to_value(remembered).unwrap()
    }

    #[tokio::test]
    async fn what_was_ready_before_a_restart_is_so_until_its_probes_deny_it() {
        let (closed, port) = listener().await;
        drop(closed);
        let remembered = json!({"checkout": {"v1": [format!("127.0.0.1:{port}"), "127.0.0.1:1"]}});
        let prober = Prober::start(serde_json::from_value(remembered.clone()).unwrap()).unwrap();
        prober.set(&[shift((&[port], tcp(json!({"failureThreshold": 20}))), (&[], Value::Null))]);
        let readiness = until(&prober, |readiness| readiness.ready("checkout", "v1") == 1).await;
        assert!(readiness.is_known("checkout"));
        assert_eq!(remembered_of(&readiness)["checkout"]["v1"].as_array().unwrap().len(), 1);
        let readiness = until(&prober, |readiness| readiness.ready("checkout", "v1") == 0).await;
        assert_eq!(remembered_of(&readiness), json!({"checkout": {"v1": [], "v2": []}}));
    }

    #[tokio::test]
    async fn a_changed_document_leaves_alone_what_it_does_not_change() {
        let (_open, port) = listener().await;
        let (_other, other_port) = listener().await;
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        prober.set(&[shift((&[port], tcp(json!({}))), (&[], Value::Null))]);
        until(&prober, |readiness| readiness.ready("checkout", "v1") == 1).await;
        // One more endpoint: the old one keeps its task, the new one is known to be new.
        let never = json!({"tcpSocket": {}, "initialDelaySeconds": 3600});
        prober.set(&[shift((&[port], tcp(json!({}))), (&[other_port], never.clone()))]);
        let readiness = Arc::clone(&prober.subscribe().borrow());
        assert_eq!((readiness.ready("checkout", "v1"), readiness.ready("checkout", "v2")), (1, 0));
        assert!(readiness.is_known("checkout"));
        assert_eq!(numbers(&prober), [1, 2]);
        // Another probe starts another task, which continues with the current state.
        prober.set(&[shift((&[port], never), (&[], Value::Null))]);
        assert_eq!(prober.subscribe().borrow().ready("checkout", "v1"), 1);
        assert_eq!(numbers(&prober), [3]);
        prober.set(&[]);
        assert_eq!(**prober.subscribe().borrow(), Readiness::default());
        assert!(numbers(&prober).is_empty());
    }

    #[tokio::test]
    async fn a_late_result_of_a_task_that_was_replaced_counts_for_nothing() {
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        let never = json!({"tcpSocket": {}, "initialDelaySeconds": 3600});
        prober.set(&[shift((&[9], never.clone()), (&[], Value::Null))]);
        prober.set(&[shift((&[9], tcp(json!({"initialDelaySeconds": 3600}))), (&[], Value::Null))]);
        let subject = prober.table.lock().running.keys().next().unwrap().clone();
        let ready = || Finding { ready: true, ..Finding::default() };
        prober.table.take_in(1, &subject, ready());
        assert_eq!(prober.subscribe().borrow().ready("checkout", "v1"), 0);
        prober.table.take_in(2, &subject, ready());
        assert_eq!(prober.subscribe().borrow().ready("checkout", "v1"), 1);
    }
}
