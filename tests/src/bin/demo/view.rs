//! The displayed state at one moment, from the controller's status and the client's own counts.

use std::collections::VecDeque;
use std::time::Duration;

use tideshift_tests::load::Tally;
use tokio::time::Instant;

use crate::status::{Endpoints, Status};

/// The time over which shares and rates are taken.
const WINDOW: Duration = Duration::from_secs(1);

/// The state at one moment.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) rows: Vec<Row>,
    pub(crate) phase: String,
    pub(crate) message: String,
    /// Responses within the last second.
    pub(crate) rate: f64,
    pub(crate) answered: u64,
    /// Requests without a complete response.
    pub(crate) failed: u64,
}

/// One version.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) role: &'static str,
    /// The fraction of the responses within the last second, 0 to 1.
    pub(crate) share: f64,
    /// In percent.
    pub(crate) weight: f64,
    pub(crate) endpoints: Endpoints,
    pub(crate) requests: u64,
    pub(crate) errors: u64,
}

impl View {
    pub(crate) fn new(status: &Status, tally: &Tally, recent: &Recent) -> Self {
        let (last_second, seconds) = recent.last_second(tally);
        let row = |version: &crate::status::VersionStatus| Row {
            name: version.name.clone(),
            role: match &version.name {
                name if *name == status.stable => "stable",
                name if Some(name) == status.target.as_ref() => "target",
                _ => "",
            },
            share: last_second.share(&version.name),
            weight: version.weight,
            endpoints: version.endpoints,
            requests: tally.of(&version.name),
            errors: tally.of_class(&version.name, 5),
        };
        Self {
            rows: status.versions.iter().map(row).collect(),
            phase: status.phase.clone(),
            message: status.message.clone(),
            rate: last_second.answered as f64 / seconds,
            answered: tally.answered,
            failed: tally.failed,
        }
    }

    fn row(&self, version: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == version)
    }

    /// Whether a version has this weight, in percent.
    pub(crate) fn weighs(&self, version: &str, percent: f64) -> bool {
        self.row(version).is_some_and(|row| (row.weight - percent).abs() < 0.01)
    }

    /// Whether this many of a version's endpoints are ready.
    pub(crate) fn is_ready(&self, version: &str, endpoints: usize) -> bool {
        self.row(version).is_some_and(|row| row.endpoints.ready == endpoints)
    }
}

/// The tallies of the last second.
#[derive(Default)]
pub(crate) struct Recent(VecDeque<(Instant, Tally)>);

impl Recent {
    pub(crate) fn add(&mut self, tally: &Tally) {
        let now = Instant::now();
        self.0.push_back((now, tally.clone()));
        // One that is older than the window stays, as the baseline.
        while self.0.get(1).is_some_and(|(at, _)| now - *at >= WINDOW) {
            self.0.pop_front();
        }
    }

    fn last_second(&self, tally: &Tally) -> (Tally, f64) {
        match self.0.front() {
            Some((at, earlier)) => (tally.since(earlier), at.elapsed().as_secs_f64().max(0.1)),
            None => (Tally::default(), 1.0),
        }
    }
}
