//! Probes every endpoint of the documents in force, each by a task of its own, and keeps the table of readiness.

use super::{EndpointState, Readiness, RememberedReadiness};
use crate::probe::threshold::Threshold;
use crate::probe::{self, Client, Subject};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tideshift_core::shift::{Endpoint, Probe, ShiftVersion, TrafficShift};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

/// Runs the probes. Ends them when dropped.
#[derive(Debug)]
pub struct Prober {
    client: Client,
    remembered: RememberedReadiness,
    table: Arc<Table>,
}

/// The readiness, and whose results count towards it.
#[derive(Debug)]
struct Table {
    tasks: Mutex<Tasks>,
    readiness: watch::Sender<Arc<Readiness>>,
}

#[derive(Debug, Default)]
struct Tasks {
    running: BTreeMap<Subject, Running>,
    started: u64,
}

/// The task that probes one endpoint.
#[derive(Debug)]
struct Running {
    /// A task that was stopped may still be about to hand in a result; its number gives it away.
    number: u64,
    probe: Probe,
    stop: AbortHandle,
}

impl Prober {
    /// A prober without endpoints. The `remembered` ones begin as ready when they appear with their service for the
    /// first time, until their probes say otherwise.
    ///
    /// # Errors
    ///
    /// If the TLS library cannot be set up.
    pub fn start(remembered: RememberedReadiness) -> Result<Self, reqwest::Error> {
        let table = Table { tasks: Mutex::default(), readiness: watch::Sender::default() };
        Ok(Self { client: Client::new()?, remembered, table: Arc::new(table) })
    }

    /// The readiness now, and from now on.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Readiness>> {
        self.table.readiness.subscribe()
    }

    /// Probes the endpoints of these documents from now on, and no others. An endpoint that was probed before keeps
    /// its state, and its task too if the probe is the same. Must be called from within a Tokio runtime.
    pub fn set(&self, shifts: &[TrafficShift]) {
        let mut tasks = self.table.lock();
        let before = Arc::clone(&self.table.readiness.borrow());
        let mut readiness = Readiness::default();
        let mut running = BTreeMap::new();
        for service in shifts.iter().flat_map(|shift| &shift.services) {
            let versions = readiness.services.entry(service.name.clone()).or_default();
            for version in &service.versions {
                let states = self.states(&before, &service.name, version);
                if let Some(probe) = &version.readiness_probe {
                    for state in &states {
                        let subject = Subject {
                            service: service.name.clone(),
                            version: version.name.clone(),
                            endpoint: state.endpoint.clone(),
                        };
                        let kept = tasks.running.remove(&subject).filter(|running| running.probe == *probe);
                        let task = kept.unwrap_or_else(|| {
                            tasks.started += 1;
                            self.watch(tasks.started, &subject, probe, state.ready)
                        });
                        running.insert(subject, task);
                    }
                }
                versions.insert(version.name.clone(), states);
            }
        }
        // What is still in the old map is dropped here, and ends.
        tasks.running = running;
        self.table.readiness.send_replace(Arc::new(readiness));
    }

    /// What is known of a version's endpoints before their first result.
    fn states(&self, before: &Readiness, service: &str, version: &ShiftVersion) -> Vec<EndpointState> {
        let is_watched = before.services.contains_key(service);
        let state = |endpoint: &Endpoint| {
            let unprobed = version.readiness_probe.is_none();
            let earlier = before.find(service, &version.name, endpoint);
            let remembered = !is_watched && self.remembered.has(service, &version.name, endpoint);
            EndpointState {
                endpoint: endpoint.clone(),
                ready: unprobed || remembered || earlier.is_some_and(|state| state.ready),
                known: unprobed || remembered || earlier.map_or(is_watched, |state| state.known),
                reason: earlier.filter(|_| !unprobed).and_then(|state| state.reason.clone()),
            }
        };
        version.endpoints.iter().map(state).collect()
    }

    fn watch(&self, number: u64, subject: &Subject, probe: &Probe, ready: bool) -> Running {
        let task = watch(Arc::clone(&self.table), self.client.clone(), number, subject.clone(), probe.clone(), ready);
        Running { number, probe: probe.clone(), stop: tokio::spawn(task).abort_handle() }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.table.lock().running.clear();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.abort();
    }
}

/// Probes one endpoint for as long as the task is left alone.
async fn watch(table: Arc<Table>, client: Client, number: u64, subject: Subject, probe: Probe, ready: bool) {
    let mut threshold = Threshold::new(&probe, ready);
    // Proxies check endpoints themselves, and find out about one that has become ready a little later. Weight for it
    // before they know would send requests to endpoints that are not ready.
    let until_proxies_know = probe.comeback_period().mul_f64(1.5);
    let mut was_ready = None;
    sleep(probe.initial_delay).await;
    // The first at once; the others at a phase of the endpoint's own, so that many do not all come at one moment.
    let mut ticks = interval_at(Instant::now() + probe.period + phase(&subject, probe.period), probe.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let result = probe::once(&client, &subject, &probe).await;
        let ready = threshold.observe(result.is_ok());
        if ready && was_ready == Some(false) {
            sleep(until_proxies_know).await;
        }
        was_ready = Some(ready);
        table.take_in(number, &subject, ready, result.err());
        ticks.tick().await;
    }
}

/// Where in a period an endpoint's probes lie: up to a tenth of it, always the same place; 0 for periods below 1 s.
fn phase(subject: &Subject, period: Duration) -> Duration {
    if period < Duration::from_secs(1) {
        return Duration::ZERO;
    }
    let mut hasher = DefaultHasher::new();
    subject.hash(&mut hasher);
    period.mul_f64(hasher.finish() as f64 / u64::MAX as f64 / 10.0)
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Tasks> {
        // Nothing that holds the lock panics half-way; if it did, the map would still be whole.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what the task `number` found out, unless it has been replaced.
    fn take_in(&self, number: u64, subject: &Subject, ready: bool, reason: Option<String>) {
        let tasks = self.lock();
        if tasks.running.get(subject).is_none_or(|running| running.number != number) {
            return;
        }
        self.readiness.send_if_modified(|readiness| {
            let Subject { service, version, endpoint } = subject;
            let Some(state) = readiness.find(service, version, endpoint) else { return false };
            if state.known && state.ready == ready && state.reason == reason {
                return false;
            }
            let first_failure = !ready && state.reason.is_none();
            if !state.known || state.ready != ready || first_failure {
                let reason = reason.as_deref();
                tracing::info!(service, version, %endpoint, ready, reason, "readiness");
            }
            if let Some(state) = Arc::make_mut(readiness).find_mut(service, version, endpoint) {
                (state.ready, state.known, state.reason) = (ready, true, reason);
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tokio::net::TcpListener;

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

    #[tokio::test]
    async fn what_was_ready_before_a_restart_is_so_until_its_probes_deny_it() {
        let (closed, port) = listener().await;
        drop(closed);
        let remembered = json!({"checkout": {"v1": [format!("127.0.0.1:{port}"), "127.0.0.1:1"]}});
        let prober = Prober::start(serde_json::from_value(remembered.clone()).unwrap()).unwrap();
        prober.set(&[shift((&[port], tcp(json!({"failureThreshold": 20}))), (&[], Value::Null))]);
        let readiness = until(&prober, |readiness| readiness.ready("checkout", "v1") == 1).await;
        assert!(readiness.is_known("checkout"));
        assert_eq!(readiness.remember().0["checkout"]["v1"].len(), 1);
        let readiness = until(&prober, |readiness| readiness.ready("checkout", "v1") == 0).await;
        assert_eq!(serde_json::to_value(readiness.remember()).unwrap(), json!({"checkout": {"v1": [], "v2": []}}));
    }

    #[tokio::test]
    async fn a_changed_document_leaves_alone_what_it_does_not_change() {
        let (_open, port) = listener().await;
        let (_other, other_port) = listener().await;
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        prober.set(&[shift((&[port], tcp(json!({}))), (&[], Value::Null))]);
        until(&prober, |readiness| readiness.ready("checkout", "v1") == 1).await;
        // An endpoint more: the old one keeps its task, the new one is known to be new.
        let never = json!({"tcpSocket": {}, "initialDelaySeconds": 3600});
        prober.set(&[shift((&[port], tcp(json!({}))), (&[other_port], never.clone()))]);
        let readiness = Arc::clone(&prober.subscribe().borrow());
        assert_eq!((readiness.ready("checkout", "v1"), readiness.ready("checkout", "v2")), (1, 0));
        assert!(readiness.is_known("checkout"));
        assert_eq!(numbers(&prober), [1, 2]);
        // Another probe: another task, which begins with the state that there was.
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
        prober.table.take_in(1, &subject, true, None);
        assert_eq!(prober.subscribe().borrow().ready("checkout", "v1"), 0);
        prober.table.take_in(2, &subject, true, None);
        assert_eq!(prober.subscribe().borrow().ready("checkout", "v1"), 1);
    }

    proptest! {
        #[test]
        fn a_phase_is_less_than_a_tenth_of_the_period(port in 1u16.., millis in 1u64..100_000_000) {
            let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port };
            let subject = Subject { service: "s".to_owned(), version: "v".to_owned(), endpoint };
            let period = Duration::from_millis(millis);
            let phase = phase(&subject, period);
            prop_assert!(phase <= period / 10 + Duration::from_nanos(1) && (millis >= 1000 || phase.is_zero()));
        }
    }
}
