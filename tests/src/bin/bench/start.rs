//! Measures the additional startup time of Envoy.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::ensure;
use tideshift_tests::client::get;
use tideshift_tests::envoy::Envoy;
use tideshift_tests::envoy_fixture::DEADLINE;
use tokio::time::sleep;

use crate::progress;
use crate::proxy::Proxy;
use crate::statistics::Summary;
use crate::variants::Variant;

/// The interval of polls while Envoy starts.
const EVERY: Duration = Duration::from_millis(1);

/// From the start of the process until `/ready` says so, in milliseconds.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) variant: Variant,
    pub(crate) runs: Vec<f64>,
}

impl Start {
    pub(crate) fn summary(&self) -> Option<Summary> {
        Summary::of(self.runs.iter().copied())
    }
}

/// Starts an Envoy for each variant in turn, so many times, with so many workers.
pub(crate) async fn measure(
    variants: &[Variant],
    backends: &[SocketAddr],
    runs: usize,
    workers: usize,
) -> anyhow::Result<Vec<Start>> {
    let of = |variant: &Variant| Start { variant: variant.clone(), runs: Vec::new() };
    let mut measured: Vec<Start> = variants.iter().map(of).collect();
    for run in 1..=runs {
        progress(&format!("start: run {run} of {runs}"));
        for start in &mut measured {
            let proxy = Proxy::new(std::slice::from_ref(&start.variant), backends)?;
            let begun = Instant::now();
            let mut envoy = Envoy::spawn(proxy.options(workers))?;
            let admin = envoy.admin_address();
            while !get(admin, "/ready").send().await.is_ok_and(|ready| ready.status == 200) {
                ensure!(envoy.is_running() && begun.elapsed() < DEADLINE, "no Envoy:\n{}", envoy.tail());
                sleep(EVERY).await;
            }
            start.runs.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(measured)
}
