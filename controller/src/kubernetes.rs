//! Kubernetes integration: TrafficShifts as custom resources, readiness from EndpointSlices, and leader election among
//! several replicas.

pub mod admission;
pub mod cache;
pub mod clusters;
pub mod convert;
pub mod crd;
pub mod endpoints;
pub mod informers;
pub mod leader_election;
pub mod outputs;
pub mod scaling;
pub mod status;
pub mod token_review;
mod transport;

pub use clusters::Clusters;
pub use informers::{Informers, Object, Snapshot};
pub use leader_election::{Elector, STUCK};
pub use outputs::Outputs;
pub use token_review::TokenReviewer;

use futures_util::{Stream, TryStreamExt, future};
use kube::api::{Api, ApiResource, GroupVersionKind};
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, discovery};
use serde::de::DeserializeOwned;
use std::error::Error;
use std::fmt::Debug;
use std::time::Duration;

/// The API resource of TrafficShift.
pub fn traffic_shifts() -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("tideshift.dev", "v1alpha1", "TrafficShift"),
        "trafficshifts",
    )
}

/// Discovers the API resource of a kind.
///
/// # Errors
///
/// If the cluster does not serve the kind, or discovery fails.
pub async fn resource(client: &Client, api_version: &str, kind: &str) -> Result<ApiResource, String> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let found = discovery::pinned_kind(client, &GroupVersionKind::gvk(group, version, kind)).await;
    found.map(|(resource, _)| resource).map_err(|error| reason(&error))
}

/// Backoff between retries: short at first, so that a cluster that recovers is noticed at once, then longer with each
/// failure.
#[derive(Debug, Clone, Default)]
pub struct Retry(u32);

impl Retry {
    const LONGEST: Duration = Duration::from_secs(2);

    /// The next delay.
    pub fn pause(&mut self) -> Duration {
        self.0 = self.0.saturating_add(1);
        let longest = Self::LONGEST.min(Duration::from_millis(100) * 2u32.saturating_pow(self.0.min(10)));
        // Jitter: many controllers must not retry at the same moment.
        longest.mul_f64(0.75 + fastrand::f64() / 4.0)
    }
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.pause())
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.0 = 0;
    }
}

/// Watches objects and restarts with growing backoff as long as a watch yields nothing. [`watcher::Event::Init`], which
/// this filters out, does not count as a result. After an error the watcher lists again or resumes at its last resource
/// version.
pub fn watch<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = Result<watcher::Event<K>, watcher::Error>>
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let says_something = |event: &watcher::Event<K>| future::ready(!matches!(event, watcher::Event::Init));
    watcher(api, config).try_filter(says_something).backoff(Retry::default())
}

/// The reason for an API server error, in a few words.
pub fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        error => {
            let mut inner: &dyn Error = error;
            while let Some(source) = inner.source() {
                inner = source;
            }
            inner.to_string()
        }
    }
}

/// The reason why a watch failed.
fn watch_reason(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => reason(error),
        watcher::Error::WatchError(status) => status.message.clone(),
        error => error.to_string(),
    }
}
