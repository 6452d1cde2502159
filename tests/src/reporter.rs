//! A connected proxy that applies policies but serves no traffic: it polls the policy and reports every second what it
//! runs, like the filter. For tests of rollouts that need no traffic; a rollout does not progress without a live proxy.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::client::{Request, get};

/// From one report to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// The retry interval while the controller is unreachable.
const RETRY: Duration = Duration::from_millis(100);

/// A proxy without traffic; dropping it ends it.
#[derive(Debug)]
pub struct Reporter {
    tasks: [JoinHandle<()>; 2],
}

/// The policy that it runs.
#[derive(Debug, Clone, Default)]
struct Runs {
    epoch: String,
    revision: u64,
    reports: u64,
}

impl Reporter {
    /// Reports to a controller at this address, for as long as it lives: also while no controller is there, and to the
    /// one that is started again.
    pub fn start(controller: SocketAddr, proxy: &str) -> Self {
        let runs = Arc::new(Mutex::new(Runs::default()));
        let (polling, reporting) = (runs.clone(), runs);
        let (poller, reporter) = (proxy.to_owned(), proxy.to_owned());
        let polls = tokio::spawn(async move {
            loop {
                let before = lock(&polling).clone();
                match poll(controller, &poller, &before).await {
                    // Changes are reported at once.
                    Ok(Some((epoch, revision))) => {
                        let runs = {
                            let mut runs = lock(&polling);
                            *runs = Runs { epoch, revision, reports: runs.reports + 1 };
                            runs.clone()
                        };
                        let _ = report(controller, &poller, &runs).await;
                    }
                    Ok(None) => {}
                    Err(_) => sleep(RETRY).await,
                }
            }
        });
        let reports = tokio::spawn(async move {
            loop {
                let runs = {
                    let mut runs = lock(&reporting);
                    runs.reports += 1;
                    runs.clone()
                };
                let _ = report(controller, &reporter, &runs).await;
                sleep(PERIOD).await;
            }
        });
        Self { tasks: [polls, reports] }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn lock(runs: &Mutex<Runs>) -> std::sync::MutexGuard<'_, Runs> {
    runs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The epoch and revision of the newer policy; none if there was none for a while.
async fn poll(controller: SocketAddr, proxy: &str, runs: &Runs) -> anyhow::Result<Option<(String, u64)>> {
    let Runs { epoch, revision, .. } = runs;
    let answer = get(controller, &format!("/v1/policy?proxy={proxy}&epoch={epoch}&after={revision}")).send().await?;
    if answer.status == 204 {
        return Ok(None);
    }
    ensure!(answer.status == 200, "/v1/policy says {}", answer.status);
    let policy: Value = serde_json::from_str(&answer.text())?;
    let revision = policy["revision"].as_u64().context("a policy without a revision")?;
    let epoch = answer.header("x-tideshift-epoch").context("a policy without an epoch")?;
    Ok(Some((epoch, revision)))
}

async fn report(controller: SocketAddr, proxy: &str, runs: &Runs) -> anyhow::Result<()> {
    let Runs { epoch, revision, reports } = runs;
    let body = json!({
        "proxy": proxy, "start": "1", "sequence": reports, "epoch": epoch, "revision": revision, "workers": 1,
        "services": [],
    });
    let request = Request::new(controller, "POST", "/v1/reports").header("content-type", "application/json");
    let answer = request.body(body.to_string()).send().await?;
    ensure!(answer.status == 204, "/v1/reports says {}: {}", answer.status, answer.text());
    Ok(())
}
