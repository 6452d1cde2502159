//! How long a target that fails everything keeps its share, and how many requests that costs: on a real Envoy, with
//! 100 requests a second of which the target has a tenth. `make bench-safety` runs it; `RUNS=20` says how often.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;
use tideshift_tests::{
    backend::Errors,
    rig::{DEADLINE, FOR_EVER, Rig, next_answers, until_shares},
    wait::eventually,
};
use tokio::time::Instant;

const WORKERS: usize = 2;
const RATE: f64 = 100.0;
/// So long without a request of the target, its share is 0.
const QUIET: Duration = Duration::from_millis(1_500);

/// Who watches.
struct Case {
    name: &'static str,
    guard: bool,
    controller: bool,
}

const CASES: [Case; 3] = [
    Case { name: "controller and guard", guard: true, controller: true },
    Case { name: "controller, guard off", guard: false, controller: true },
    Case { name: "guard, controller killed", guard: true, controller: false },
];

/// What one run gave.
struct Run {
    /// From the moment that the target fails to the last request that it was sent.
    lasted: Duration,
    failed: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let runs: usize = std::env::var("RUNS").ok().map_or(Ok(20), |runs| runs.parse()).context("RUNS: a number")?;
    println!(
        "v2 has 10 % of {RATE} requests/s and answers 500 to everything from a random moment on; {runs} runs each.\n"
    );
    println!("| who watches | share is 0 after, median | p90 | at most | failed requests, median | at most |");
    println!("|---|---|---|---|---|---|");
    for case in CASES {
        let mut results = Vec::new();
        for run in 1..=runs {
            eprint!("\r{}: run {run} of {runs} ", case.name);
            results.push(case.run().await.with_context(|| format!("{}, run {run}", case.name))?);
        }
        eprint!("\r{:60}\r", "");
        let seconds = sorted(results.iter().map(|run| run.lasted.as_secs_f64()));
        let failed = sorted(results.iter().map(|run| run.failed as f64));
        println!(
            "| {} | {:.2} s | {:.2} s | {:.2} s | {} | {} |",
            case.name,
            quantile(&seconds, 0.5),
            quantile(&seconds, 0.9),
            quantile(&seconds, 1.0),
            quantile(&failed, 0.5),
            quantile(&failed, 1.0),
        );
    }
    Ok(())
}

impl Case {
    async fn run(&self) -> anyhow::Result<Run> {
        let mut rig = Rig::new(&[("v1", 1), ("v2", 1)]).await?;
        let strategy = json!({ "steps": [{ "weight": 10, "holdSeconds": FOR_EVER }] });
        let guard = json!({ "enabled": self.guard });
        rig.write(&rig.document(json!({ "target": "v2", "strategy": strategy, "guard": guard })))?;
        let mut controller = rig.start_controller().await?;
        let _envoy = rig.start_envoy(WORKERS).await?;
        until_shares(&controller, "v2 at its step", &[90.0, 10.0]).await?;
        let load = rig.load(RATE);
        // At any point of the proxy's and the controller's periods.
        next_answers(&load, fastrand::u64(200..300)).await?;
        if !self.controller {
            controller.kill()?;
        }
        let begun = Instant::now();
        rig.version("v2")
            .iter()
            .for_each(|backend| backend.set(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 }));
        let last = eventually("v2 to be left alone", DEADLINE, async || {
            let tally = load.tally();
            let times = tally.times.get("v2").context("v2 was never asked")?;
            let quiet = Instant::now() - times.last_sent;
            ensure!(tally.bad() > 0 && quiet >= QUIET, "v2 was asked {quiet:?} ago");
            Ok(times.last_sent)
        })
        .await?;
        let tally = load.stop().await?;
        ensure!(tally.failed == 0 && tally.of_class("v1", 5) == 0, "only v2 fails: {tally:?}");
        Ok(Run { lasted: last - begun, failed: tally.of_class("v2", 5) })
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// A value of the list that so many are no greater than.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let index = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
