//! `make bench`: the cost of the filter on a real Envoy, compared with Envoy's own features and with other filters for
//! the same job. Tables go to the standard output, progress to the standard error; a failed request fails it.
//!
//! Ordinary machines are noisy, so it measures no throughput: Envoy runs one worker on a core of its own, and [`cost`]
//! compares the CPU time of that worker between consecutive batches.

mod client;
mod cost;
mod effect;
mod machine;
mod memory;
mod proxy;
mod server;
mod settings;
mod start;
mod statistics;
mod tables;
mod variants;

use std::io::{IsTerminal as _, stderr};
use std::net::SocketAddr;
use std::process;
use std::process::{Command, ExitCode};
use std::thread::available_parallelism;

use anyhow::{Context as _, bail};
use serde_json::json;
use tideshift_tests::artifacts;
use tokio::signal::unix::{SignalKind, signal};

use machine::{Cores, pin, processor};
use settings::Settings;
use variants::{Modules, Table, Variant, WEIGHTS, native};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Dropping the bench ends its Envoy.
        tokio::select! {
            biased;
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
            ended = bench() => ended,
        }
    })
}

async fn bench() -> anyhow::Result<()> {
    let (settings, modules, cores) = (Settings::read()?, Modules::find()?, Cores::choose()?);
    let backends = WEIGHTS.iter().map(|(version, _)| server::serve(version)).collect::<anyhow::Result<Vec<_>>>()?;
    let workers = available_parallelism()?.get();
    show(&heading(workers)?);
    if settings.has_section("cost") {
        let (variants, left_out) = wanted(&modules, &backends, &settings).await?;
        pin(process::id(), &cores.others)?;
        let costs = cost::measure(variants, &backends, &cores, &settings).await?;
        pin(process::id(), &cores.all)?;
        show(&tables::costs(&costs, &left_out, &settings));
        show(&tables::chains(&costs));
    }
    let ours = modules.ours("weights", json!({}));
    if settings.has_section("memory") {
        let variants = [native(), modules.noop(), modules.raw(), ours.clone()];
        let sizes = [None, Some(&modules.noop), Some(&modules.raw), Some(&modules.ours)];
        show(&tables::memory(&memory::measure(&variants, &backends, settings.memory_runs).await?, &sizes)?);
    }
    if settings.has_section("start") {
        let variants = [native(), modules.noop(), modules.raw(), ours];
        let measured = start::measure(&variants, &backends, settings.start_runs, workers).await?;
        show(&tables::start(&measured, workers));
    }
    if settings.has_section("effect") {
        show(&tables::effects(&effect::measure(settings.changes).await?));
    }
    Ok(())
}

/// The variants to measure, native first, and why those were left out that the module is not made for yet.
async fn wanted(
    modules: &Modules,
    backends: &[SocketAddr],
    settings: &Settings,
) -> anyhow::Result<(Vec<Variant>, Vec<(String, String)>)> {
    let (mut wanted, mut left_out) = (vec![native()], Vec::new());
    for variant in variants::all(modules).into_iter().skip(1).filter(|variant| settings.wants(&variant.name)) {
        let refusal = if variant.optional { cost::refusal(&variant, backends).await? } else { None };
        match refusal {
            Some(why) => {
                eprintln!("\n!! NOT MEASURED: {}: {why}\n", variant.name);
                left_out.push((variant.name, why));
            }
            None => wanted.push(variant),
        }
    }
    // A chain needs the one that it is compared with.
    let names: Vec<String> = wanted.iter().map(|variant| variant.name.clone()).collect();
    wanted.retain(|variant| !matches!(&variant.table, Table::ChainOf(one) if !names.contains(one)));
    Ok((wanted, left_out))
}

fn heading(cores: usize) -> anyhow::Result<String> {
    let said = |command: &mut Command| {
        let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        anyhow::Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let date = said(Command::new("date").arg("+%F"))?;
    let version = said(Command::new(artifacts::envoy()?).arg("--version"))?;
    // PATH version: COMMIT/1.40.0/…
    let version =
        version.rsplit_once("version: ").and_then(|(_, version)| version.split('/').nth(1)).unwrap_or(&version);
    Ok(format!("`make bench` on {date}: Envoy {version}, {}, {cores} cores.\n", processor()))
}

/// A result.
fn show(text: &str) {
    println!("{text}");
}

/// The current activity: one line that is overwritten, unless the output is a file.
fn progress(line: &str) {
    if stderr().is_terminal() {
        eprint!("\r\x1b[2K{line}\r");
    } else {
        eprintln!("{line}");
    }
}
