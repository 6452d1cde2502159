//! The filter's metrics in Envoy. They are for Prometheus only and catch up with what was counted at each tick.
//!
//! Names of metrics carry labels in the form that Istio and `tideshift render envoy` extract: `version=.=v1;.;`.

use crate::host::{Host, MetricKind};
use std::cell::Cell;
use tideshift_core::counting::tallies::{ChoiceTally, DURATIONS};
use tideshift_core::counts::DURATION_BOUNDS;
use tideshift_core::outcome::Outcome;

/// A metric that this VM has defined, unless the host refused.
#[derive(Clone, Copy, Default)]
struct Metric(Option<u32>);

impl Metric {
    fn define(host: &impl Host, kind: MetricKind, name: &str) -> Self {
        Self(host.define_metric(kind, name))
    }

    fn add(self, host: &impl Host, amount: i64) {
        if let Some(id) = self.0 {
            host.increment_metric(id, amount);
        }
    }

    fn record(self, host: &impl Host, value: u64) {
        if let Some(id) = self.0 {
            host.record_metric(id, value);
        }
    }
}

/// A counter in Envoy, and how far it has caught up.
#[derive(Default)]
struct FlushedCounter {
    /// `None`: not defined yet, or to be defined again.
    metric: Cell<Option<Metric>>,
    flushed: Cell<u64>,
}

impl FlushedCounter {
    fn define(&self, host: &impl Host, name: &str) {
        self.metric.set(Some(Metric::define(host, MetricKind::Counter, name)));
    }

    fn flush(&self, host: &impl Host, total: u64, name: impl FnOnce() -> String) {
        let more = total.saturating_sub(self.flushed.replace(total));
        if more > 0 {
            if self.metric.get().is_none() {
                self.define(host, &name());
            }
            self.metric.get().unwrap_or_default().add(host, i64::try_from(more).unwrap_or(i64::MAX));
        }
    }
}

/// The metrics of one service.
#[derive(Default)]
pub struct ServiceMetrics {
    unrouted: FlushedCounter,
}

impl ServiceMetrics {
    /// Defines the metrics, or finds them again.
    pub fn define(&self, host: &impl Host, service: &str) {
        self.unrouted.define(host, &format!("service=.={service};.;tideshift_unrouted_requests_total"));
    }

    /// Catches up with what was counted.
    pub fn flush(&self, host: &impl Host, unrouted: u64) {
        self.unrouted.flush(host, unrouted, String::new);
    }
}

/// The metrics of one version.
pub struct VersionMetrics {
    outcomes: [FlushedCounter; Outcome::ALL.len()],
    misrouted: FlushedCounter,
    in_flight: Cell<Metric>,
    milliseconds: Cell<Metric>,
    labels: String,
    durations: [FlushedCounter; DURATIONS],
}

impl VersionMetrics {
    /// The metrics of this version, defined.
    pub fn new(host: &impl Host, service: &str, version: &str) -> Self {
        let new = Self {
            outcomes: Default::default(),
            misrouted: FlushedCounter::default(),
            in_flight: Cell::default(),
            milliseconds: Cell::default(),
            labels: format!("service=.={service};.;version=.={version};.;"),
            durations: Default::default(),
        };
        new.define(host);
        new
    }

    /// Defines the metrics, or finds them again; those that few versions need when they are needed.
    pub fn define(&self, host: &impl Host) {
        let labels = &self.labels;
        for (outcome, metric) in Outcome::ALL.iter().zip(&self.outcomes) {
            metric.define(host, &format!("{labels}outcome=.={};.;tideshift_requests_total", outcome.label()));
        }
        let define = |kind, name| Metric::define(host, kind, &format!("{labels}{name}"));
        self.in_flight.set(define(MetricKind::Gauge, "tideshift_requests_in_flight"));
        self.milliseconds.set(define(MetricKind::Histogram, "tideshift_request_duration_milliseconds"));
        std::iter::once(&self.misrouted).chain(&self.durations).for_each(|counter| counter.metric.set(None));
    }

    /// Shows what is in flight.
    pub fn show_in_flight(&self, host: &impl Host, requests: u64) {
        self.in_flight.get().record(host, requests);
    }

    /// Catches up with the requests that did not reach the version.
    pub fn flush_misrouted(&self, host: &impl Host, total: u64) {
        let name = || format!("{}tideshift_misrouted_requests_total", self.labels);
        self.misrouted.flush(host, total, name);
    }

    /// Catches up with the requests that ended, and records how many milliseconds the last ones took.
    pub fn flush(&self, host: &impl Host, sum: &ChoiceTally, times: Vec<u32>) {
        let unnamed = String::new;
        self.outcomes.iter().zip(sum.ended).for_each(|(counter, total)| counter.flush(host, total, unnamed));
        for (bucket, (counter, total)) in self.durations.iter().zip(&sum.durations).enumerate() {
            counter.flush(host, *total, || {
                let bound = DURATION_BOUNDS.get(bucket).map_or("+Inf".to_owned(), u64::to_string);
                format!("{}upto=.={bound};.;tideshift_requests_by_duration_total", self.labels)
            });
        }
        times.into_iter().for_each(|time| self.milliseconds.get().record(host, u64::from(time)));
    }
}
