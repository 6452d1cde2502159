//! The parts of the controller's `GET /v1/status` that the demo shows.

use anyhow::Context as _;
use serde::Deserialize;
use tideshift_core::counts::Counts;
use tideshift_tests::controller::Controller;

use crate::document::SERVICE;

/// The service's status.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Status {
    name: String,
    pub(crate) phase: String,
    pub(crate) message: String,
    pub(crate) stable: String,
    pub(crate) target: Option<String>,
    pub(crate) unrouted: u64,
    pub(crate) versions: Vec<VersionStatus>,
}

/// One version of it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct VersionStatus {
    pub(crate) name: String,
    /// In percent.
    pub(crate) weight: f64,
    pub(crate) endpoints: Endpoints,
    pub(crate) requests: Counts,
}

/// The number of a version's endpoints that can receive traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Endpoints {
    pub(crate) ready: usize,
    pub(crate) listed: usize,
}

#[derive(Deserialize)]
struct Answer {
    services: Vec<Status>,
}

impl Status {
    /// Requests the status from the controller.
    pub(crate) async fn of(controller: &Controller) -> anyhow::Result<Self> {
        let answer: Answer = serde_json::from_str(&controller.get("/v1/status").await?)?;
        let mut services = answer.services.into_iter();
        services.find(|service| service.name == SERVICE).context("the controller does not know the service")
    }
}
