//! The task of one endpoint: its probes, and its warm-up if it is new.
//!
//! If the document configures warm-up requests, a new endpoint whose probes pass must also answer those before it is
//! ready. An endpoint is new unless one of these applies:
//!
//! - It is remembered as ready, or was ready under the previous document: it already serves.
//! - Its probes have failed for no longer than it takes to detect that it is away (`failureThreshold` periods). That is
//!   a hiccup; after a longer failure the process may have restarted, and a restarted process is cold.
//! - The service appears for the first time, nothing is remembered of it, and the endpoint belongs to the stable
//!   version: a controller without other information assumes that the stable version already serves.
//!
//! The stable version waits for its warm-up only while another version is ready: without one, users are waiting. If a
//! version has no ready endpoint yet, its endpoints wait for each other's first attempt, because with the version's
//! first weight, users reach every endpoint that passes the proxies' health checks. For the same reason an endpoint
//! that joins a serving version may receive user requests during its warm-up; only the capacity of the version waits
//! for it then.

use crate::limits::{Limit, Limits};
use crate::readiness::probe::threshold::Threshold;
use crate::readiness::probe::{Client, Subject};
use crate::readiness::table::{Finding, ReadinessSpec, Table};
use crate::readiness::warm_up::Progress;
use crate::readiness::{Readiness, probe, warm_up};
use futures_util::future::{FutureExt, OptionFuture};
use futures_util::stream;
use futures_util::stream::{Stream, StreamExt};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tideshift_core::shift::WarmUpRequests;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep};

/// The clients for probes and warm-up requests; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Clients {
    probes: Client,
    warm_ups: warm_up::Client,
    limit: Limit,
}

impl Clients {
    pub(super) fn new(limits: Limits) -> Result<Self, reqwest::Error> {
        let warm_ups = warm_up::Client::new(limits.warm_ups)?;
        Ok(Self { probes: Client::new()?, warm_ups, limit: limits.probes })
    }
}

/// What a task needs for one endpoint.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) table: Arc<Table>,
    pub(super) clients: Clients,
    pub(super) number: u64,
    pub(super) subject: Subject,
    /// The document's namespace, to which limits apply.
    pub(super) namespace: String,
    pub(super) terms: ReadinessSpec,
}

impl Watch {
    /// Runs probes and warm-up until the task is stopped. `ready` is the initial state; `serves` says whether the
    /// endpoint needs no warm-up.
    pub(super) async fn run(&self, mut ready: bool, mut serves: bool) {
        let probe = self.terms.probe.as_ref();
        let mut threshold = probe.map(|probe| Threshold::new(probe, ready));
        // Proxies run their own health checks, and detect a ready endpoint a little later. Weight for it before that
        // would send requests to endpoints that are not ready.
        let until_proxies_know = probe.map_or(Duration::ZERO, |probe| probe.comeback_period().mul_f64(1.5));
        // How many probe results have been negative since it was last ready.
        let mut away = 0u32;
        // The transition from passing probes to readiness. Only this task polls it, so it reports nothing after it has
        // been cancelled.
        let mut settling = probe.is_none().then(|| self.settle(serves, Duration::ZERO).boxed());
        let mut results = pin!(self.results());
        loop {
            tokio::select! {
                Some(result) = results.next() => {
                    if !threshold.as_mut().is_none_or(|threshold| threshold.observe(result.is_ok())) {
                        away = away.saturating_add(1);
                        (ready, settling) = (false, None);
                        self.take_in(Finding { reason: result.err(), ..Finding::default() });
                    } else if ready {
                        self.take_in(Finding { ready, reason: result.err(), ..Finding::default() });
                    } else if settling.is_none() {
                        serves &= probe.is_none_or(|probe| away <= probe.failure_threshold);
                        let pause = if away == 0 { Duration::ZERO } else { until_proxies_know };
                        settling = Some(self.settle(serves, pause).boxed());
                    }
                }
                Some(()) = OptionFuture::from(settling.as_mut()) => {
                    (ready, serves, away, settling) = (true, true, 0, None);
                    self.take_in(Finding { ready, ..Finding::default() });
                }
                else => return,
            }
        }
    }

    /// The results of the endpoint's probes; empty if it has no probe.
    fn results(&self) -> impl Stream<Item = Result<(), String>> {
        let results = stream::unfold(None, move |ticks: Option<Interval>| async move {
            let probe = self.terms.probe.as_ref()?;
            let ticks = match ticks {
                Some(mut ticks) => {
                    ticks.tick().await;
                    ticks
                }
                None => {
                    sleep(probe.initial_delay).await;
                    // The first probe runs at once; the others have a phase specific to the endpoint, so that many
                    // endpoints are not probed at the same moment.
                    let start = Instant::now() + probe.period + phase(&self.subject, probe.period);
                    let mut ticks = interval_at(start, probe.period);
                    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
                    ticks
                }
            };
            let _place = self.clients.limit.admit(&self.namespace).await;
            Some((probe::once(&self.clients.probes, &self.subject, probe).await, Some(ticks)))
        });
        results.fuse()
    }

    /// Completes once an endpoint whose probes pass is ready: after its warm-up, if it needs one, and not before
    /// `pause`.
    async fn settle(&self, serves: bool, pause: Duration) {
        let mut pause = pin!(sleep(pause));
        if let Some(requests) = self.terms.warm_up.as_ref().filter(|_| !serves) {
            let Subject { service, version, .. } = &self.subject;
            let alone = self.until(|readiness| self.terms.yields && !readiness.has_other(service, version));
            let warm_up = async {
                self.warm_up(requests).await;
                // Other endpoints may be one probe behind.
                pause.as_mut().await;
                self.until(|readiness| readiness.waits_for_none(service, version)).await;
            };
            tokio::select! {
                biased;
                () = alone => {}
                () = warm_up => {}
            }
        }
        pause.await;
    }

    async fn warm_up(&self, requests: &WarmUpRequests) {
        let say = |progress: Progress| {
            let warming = !progress.has_failed;
            self.take_in(Finding { ready: false, warming, reason: Some(progress.message) });
        };
        self.clients.warm_ups.warm_up(&self.namespace, &self.subject, requests, say).await;
        let reason = Some("warmed up; waits for the other endpoints of its version".to_owned());
        self.take_in(Finding { reason, ..Finding::default() });
    }

    async fn until(&self, holds: impl Fn(&Readiness) -> bool) {
        // The table exists for as long as this task does.
        let _ = self.table.readiness.subscribe().wait_for(|readiness| holds(readiness)).await;
    }

    /// Stores a result, unless the task has been replaced.
    fn take_in(&self, finding: Finding) {
        self.table.take_in(self.number, &self.subject, finding);
    }
}

/// The phase of an endpoint's probes within a period: up to a tenth of it, and constant; 0 for periods below 1 s.
fn phase(subject: &Subject, period: Duration) -> Duration {
    if period < Duration::from_secs(1) {
        return Duration::ZERO;
    }
    let mut hasher = DefaultHasher::new();
    subject.hash(&mut hasher);
    period.mul_f64(hasher.finish() as f64 / u64::MAX as f64 / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::warm_up::tests::Upstream;
    use crate::readiness::{Prober, RememberedReadiness};
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tideshift_core::shift::{Endpoint, TrafficShift};

    const SHOP: &str = "shop";
    const COUNT: usize = 4;

    /// A document whose endpoints are all probed every 10 ms and warmed up by four requests; v1 is the stable version.
    fn document(v1: &[&Upstream], v2: &[&Upstream]) -> Value {
        let version = |name, upstreams: &[&Upstream]| {
            let endpoints: Vec<_> = upstreams.iter().map(|upstream| format!("127.0.0.1:{}", upstream.port())).collect();
            let probe = json!({"httpGet": {"path": "/health"}, "periodMillis": 10, "failureThreshold": 2});
            json!({"name": name, "endpoints": endpoints, "readinessProbe": probe})
        };
        json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": SHOP},
            "spec": {
                "versions": [version("v1", v1), version("v2", v2)], "stable": "v1",
                "strategy": {"warmUp": {"requests": {"count": COUNT}}},
            },
        })
    }

    fn set(prober: &Prober, document: &Value) {
        prober.set(&[TrafficShift::read(document).unwrap()]);
    }

    fn start(document: &Value) -> Prober {
        let prober = Prober::start(RememberedReadiness::default()).unwrap();
        set(&prober, document);
        prober
    }

    async fn until(prober: &Prober, what: &str, holds: impl Fn(&Readiness) -> bool) -> Arc<Readiness> {
        let mut readiness = prober.subscribe();
        let waited = tokio::time::timeout(Duration::from_secs(20), readiness.wait_for(|now| holds(now))).await;
        let seen = waited.map(|seen| Arc::clone(&seen.unwrap()));
        seen.unwrap_or_else(|_| panic!("{what}; seen last: {:#?}", prober.subscribe().borrow()))
    }

    /// Waits until this many endpoints of v1 and v2 are ready.
    async fn until_ready(prober: &Prober, v1: usize, v2: usize) -> Arc<Readiness> {
        until(prober, &format!("{v1} and {v2} ready"), |now| {
            now.is_known(SHOP) && (now.ready(SHOP, "v1"), now.ready(SHOP, "v2")) == (v1, v2)
        })
        .await
    }

    /// Waits until the endpoint of this index is not ready, with a reason that starts like this.
    async fn until_reason(prober: &Prober, version: &str, index: usize, reason: &str) -> Arc<Readiness> {
        until(prober, reason, |now| {
            let state = &now.endpoints(SHOP, version)[index];
            state.known && !state.ready && state.reason.as_deref().is_some_and(|why| why.starts_with(reason))
        })
        .await
    }

    #[tokio::test]
    async fn a_new_endpoint_is_ready_once_its_warm_up_requests_have_passed() {
        let (v1, v2) = (Upstream::start().await, Upstream::start_held().await);
        let prober = start(&document(&[&v1], &[&v2]));
        until_reason(&prober, "v2", 0, "warming up: 0 of 4 requests").await;
        v2.allow(2);
        let readiness = until_reason(&prober, "v2", 0, "warming up: 2 of 4 requests").await;
        assert!(readiness.is_known(SHOP) && readiness.endpoints(SHOP, "v2")[0].warming);
        v2.allow(2);
        let readiness = until_ready(&prober, 1, 1).await;
        let state = &readiness.endpoints(SHOP, "v2")[0];
        assert_eq!((state.warming, &state.reason, v2.asked()), (false, &None, COUNT));
        assert_eq!(v1.asked(), 0, "the stable version serves already when the first document is read");
    }

    #[tokio::test]
    async fn an_endpoint_whose_warm_up_fails_is_not_ready_and_is_asked_again() {
        let (v1, v2) = (Upstream::start().await, Upstream::start().await);
        v2.with(|own| own.statuses = [200, 503].into());
        let prober = start(&document(&[&v1], &[&v2]));
        let failed = "warm-up: 1 of 4 requests failed (HTTP status 503)";
        let readiness = until_reason(&prober, "v2", 0, failed).await;
        assert_eq!((readiness.ready(SHOP, "v2"), readiness.endpoints(SHOP, "v2")[0].warming), (0, false));
        until_ready(&prober, 1, 1).await;
        assert_eq!(v2.asked(), 2 + COUNT);
    }

    #[tokio::test]
    async fn what_serves_already_is_not_asked() {
        let (v1, v2, new) = (Upstream::start().await, Upstream::start().await, Upstream::start_held().await);
        let endpoint = |upstream: &Upstream| format!("127.0.0.1:{}", upstream.port());
        let remembered = json!({SHOP: {"v1": [endpoint(&v1)], "v2": [endpoint(&v2)]}});
        let prober = Prober::start(serde_json::from_value(remembered).unwrap()).unwrap();
        let document = document(&[&v1], &[&v2, &new]);
        set(&prober, &document);
        until_reason(&prober, "v2", 1, "warming up: ").await;
        until_ready(&prober, 1, 1).await;
        // Another probe starts another task, for ready endpoints and others.
        let mut changed = document;
        changed["spec"]["versions"][1]["readinessProbe"]["periodMillis"] = json!(20);
        set(&prober, &changed);
        new.allow(2 * COUNT);
        until_ready(&prober, 1, 2).await;
        assert_eq!((v1.asked(), v2.asked()), (0, 0));
    }

    #[tokio::test]
    async fn an_endpoint_that_was_away_is_new_and_one_with_a_hiccup_is_not() {
        let (v1, v2) = (Upstream::start().await, Upstream::start().await);
        let prober = start(&document(&[&v1], &[&v2]));
        until_ready(&prober, 1, 1).await;
        // Away from the second consecutive failure on, for two periods, which is the threshold.
        v2.with(|own| own.health = [500, 500, 500, 200].into());
        until_ready(&prober, 1, 0).await;
        until_ready(&prober, 1, 1).await;
        assert_eq!(v2.asked(), COUNT);
        v2.with(|own| own.health = [500, 500, 500, 500, 200].into());
        until_ready(&prober, 1, 0).await;
        until_ready(&prober, 1, 1).await;
        assert_eq!(v2.asked(), 2 * COUNT);
    }

    #[tokio::test]
    async fn a_probe_that_fails_ends_a_warm_up() {
        let (v1, v2) = (Upstream::start().await, Upstream::start_held().await);
        let prober = start(&document(&[&v1], &[&v2]));
        until_reason(&prober, "v2", 0, "warming up: ").await;
        v2.with(|own| own.health = [500].into());
        let readiness = until_reason(&prober, "v2", 0, "HTTP status 500").await;
        assert!(!readiness.endpoints(SHOP, "v2")[0].warming);
        v2.with(|own| own.health = [200].into());
        until_reason(&prober, "v2", 0, "warming up: ").await;
        v2.allow(100);
        until_ready(&prober, 1, 1).await;
    }

    #[tokio::test]
    async fn without_a_probe_there_is_a_warm_up_all_the_same() {
        let (v1, v2) = (Upstream::start().await, Upstream::start_held().await);
        let mut document = document(&[&v1], &[&v2]);
        document["spec"]["versions"][0]["readinessProbe"] = Value::Null;
        document["spec"]["versions"][1]["readinessProbe"] = Value::Null;
        let prober = start(&document);
        until_ready(&prober, 1, 0).await;
        v2.allow(COUNT);
        until_ready(&prober, 1, 1).await;
        assert_eq!((v1.asked(), v2.asked()), (0, COUNT));
        // Already ready, so later changes of the document do not matter.
        document["spec"]["strategy"]["warmUp"]["requests"]["count"] = json!(9);
        set(&prober, &document);
        until_ready(&prober, 1, 1).await;
        assert_eq!((v1.asked(), v2.asked()), (0, COUNT));
    }

    #[tokio::test]
    async fn the_stable_version_waits_for_its_warm_up_only_while_another_is_ready() {
        let (v1, late, later) = (Upstream::start().await, Upstream::start().await, Upstream::start_held().await);
        let v2 = Upstream::start().await;
        v2.with(|own| own.health = [500].into());
        let prober = start(&document(&[&v1], &[&v2]));
        until_ready(&prober, 1, 0).await;
        set(&prober, &document(&[&v1, &late], &[&v2]));
        until_ready(&prober, 2, 0).await;
        assert_eq!(late.asked(), 0);
        v2.with(|own| own.health = [200].into());
        until_ready(&prober, 2, 1).await;
        set(&prober, &document(&[&v1, &late, &later], &[&v2]));
        until_reason(&prober, "v1", 2, "warming up: ").await;
        v2.with(|own| own.health = [500].into());
        until_ready(&prober, 3, 0).await;
    }

    #[tokio::test]
    async fn a_controller_that_knows_nothing_takes_the_stable_version_for_what_serves() {
        let (v1, v2) = (Upstream::start().await, Upstream::start().await);
        let mut document = document(&[&v1], &[&v2]);
        document["spec"]["versions"][0]["readinessProbe"]["initialDelaySeconds"] = json!(1);
        let prober = start(&document);
        until(&prober, "v2 to be ready first", |now| now.ready(SHOP, "v2") == 1 && !now.is_known(SHOP)).await;
        until_ready(&prober, 1, 1).await;
        assert_eq!((v1.asked(), v2.asked()), (0, COUNT));
    }

    #[tokio::test]
    async fn the_first_endpoints_of_a_version_are_ready_together() {
        let (v1, fast, slow) = (Upstream::start().await, Upstream::start_held().await, Upstream::start_held().await);
        let prober = start(&document(&[&v1], &[&fast, &slow]));
        until_reason(&prober, "v2", 0, "warming up: ").await;
        until_reason(&prober, "v2", 1, "warming up: ").await;
        fast.allow(COUNT);
        let readiness = until_reason(&prober, "v2", 0, "warmed up; waits for the other endpoints").await;
        assert_eq!(readiness.ready(SHOP, "v2"), 0);
        slow.allow(COUNT);
        until_ready(&prober, 1, 2).await;
        // From then on, each endpoint becomes ready on its own.
        let (new, never) = (Upstream::start().await, Upstream::start_held().await);
        set(&prober, &document(&[&v1], &[&fast, &slow, &never, &new]));
        until_ready(&prober, 1, 3).await;
    }

    #[tokio::test]
    async fn an_endpoint_whose_first_try_has_failed_is_waited_for_no_longer() {
        let (v1, good, bad) = (Upstream::start().await, Upstream::start().await, Upstream::start().await);
        bad.with(|own| own.statuses = [500; 100].into());
        let prober = start(&document(&[&v1], &[&good, &bad]));
        until_reason(&prober, "v2", 1, "warm-up: 1 of 4 requests failed").await;
        until_ready(&prober, 1, 1).await;
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
