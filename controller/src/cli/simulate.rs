//! `tideshift simulate`: what would a strategy do?

use super::{Failure, Output, print};
use crate::documents::{self, DocumentErrors};
use crate::simulate::{self, Scenario};
use clap::builder::RangedU64ValueParser;
use std::fs;
use std::path::{Path, PathBuf};
use tideshift_core::shift::TrafficShift;

/// Play a rollout through in a made-up world, in seconds, with a picture
///
/// The scenario says how many requests come, how often each version fails and when its endpoints are ready. What is
/// done about it is decided by what decides in production: the controller's engine and verdict, the proxies' choice
/// and guard. The same seed gives the same run.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift simulate -f shift.yaml --scenario scenario.yaml
  tideshift simulate -f shift.yaml --scenario scenario.yaml --svg simulation.svg
  tideshift simulate -f shift.yaml --scenario scenario.yaml --runs 1000

Exit codes: 0 it was played through, however the rollout ended; 2 a document or the command line is wrong.
The scenario's fields: docs/simulate.md")]
pub(super) struct Arguments {
    /// The TrafficShift; `-` reads standard input.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    file: PathBuf,
    /// How the world behaves: a Scenario in YAML or JSON.
    #[arg(long, value_name = "FILE")]
    scenario: PathBuf,
    /// What chance is made of, in place of the scenario's seed.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Where to put a picture: shares, failed requests, evidence and endpoints over time, and every decision.
    #[arg(long, value_name = "FILE", conflicts_with = "runs")]
    svg: Option<PathBuf>,
    /// Play it so many times, each with the next seed, and count how it ends.
    #[arg(long, value_name = "NUMBER", value_parser = RangedU64ValueParser::<u64>::new().range(1..=1_000_000))]
    runs: Option<u64>,
    /// How to print the answer.
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

/// Both documents, or the errors of both.
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
