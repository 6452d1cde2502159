//! `tideshift simulate`: plays a strategy against a scenario.

use super::{Failure, Output, print};
use crate::documents::DocumentErrors;
use crate::simulate::Scenario;
use crate::{documents, simulate};
use clap::builder::RangedU64ValueParser;
use std::fs;
use std::path::{Path, PathBuf};
use tideshift_core::shift::TrafficShift;

/// Simulate a rollout under a scenario, in seconds, with a chart
///
/// The scenario defines the request rate, each version's error rate, and when its endpoints become ready. The simulation
/// runs the production code: the controller's rollout engine and verdict, and the proxies' version choice and guard. The
/// same seed gives the same run.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift simulate -f shift.yaml --scenario scenario.yaml
  tideshift simulate -f shift.yaml --scenario scenario.yaml --svg simulation.svg
  tideshift simulate -f shift.yaml --scenario scenario.yaml --runs 1000

Exit codes: 0 the simulation completed, whatever the result of the rollout; 2 invalid document or command line.
The scenario's fields: docs/simulate.md")]
pub(super) struct Arguments {
    /// The TrafficShift; `-` reads standard input.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    file: PathBuf,
    /// The Scenario in YAML or JSON.
    #[arg(long, value_name = "FILE")]
    scenario: PathBuf,
    /// The random seed; overrides the scenario's.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Write a chart to this file: shares, failed requests, evidence and endpoints over time, and every decision.
    #[arg(long, value_name = "FILE", conflicts_with = "runs")]
    svg: Option<PathBuf>,
    /// Simulate this number of runs, each with the next seed, and count the results.
    #[arg(long, value_name = "NUMBER", value_parser = RangedU64ValueParser::<u64>::new().range(1..=1_000_000))]
    runs: Option<u64>,
    /// The output format.
    #[arg(long, short = 'o', value_enum, default_value_t)]
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let (shift, scenario) = load(&arguments.file, &arguments.scenario)?;
    let seed = arguments.seed.unwrap_or(scenario.seed);
    if let Some(runs) = arguments.runs {
        let many = simulate::many(&shift, &scenario, seed, runs);
        return match arguments.output {
            Output::Text => print(&many.to_text()),
            Output::Json => print_json(&many),
        };
    }
    let run = simulate::run(&shift, &scenario, seed, true);
    if let Some(file) = &arguments.svg {
        fs::write(file, simulate::draw(&run)).map_err(|error| {
            Failure::Other(format!("{}: cannot be written: {}", file.display(), crate::net::io_reason(&error)).into())
        })?;
    }
    match arguments.output {
        Output::Text => {
            let picture = arguments.svg.as_ref().map(|file| format!("The picture is in {}.\n", file.display()));
            print(&(run.to_text() + &picture.unwrap_or_default()))
        }
        Output::Json => print_json(&run),
    }
}

/// Reads both documents, or returns the errors of both.
fn load(shift: &Path, scenario: &Path) -> Result<(TrafficShift, Scenario), DocumentErrors> {
    let shift = documents::load_one(shift, TrafficShift::read);
    let scenario = documents::load_one(scenario, |value| Scenario::read(value, shift.as_ref().ok()));
    match (shift, scenario) {
        (Ok(shift), Ok(scenario)) => Ok((shift, scenario)),
        (shift, scenario) => {
            let errors = [shift.err(), scenario.err()].into_iter().flatten();
            Err(DocumentErrors(errors.flat_map(|errors| errors.0).collect()))
        }
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(value).map_err(|error| Failure::Other(error.into()))?;
    print(&format!("{json}\n"))
}
