//! Formats the results as Markdown.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tideshift_tests::effect::Effect;

use crate::client::CONNECTIONS;
use crate::cost::Cost;
use crate::effect::{Effects, RATE};
use crate::memory::Memory;
use crate::settings::Settings;
use crate::start::Start;
use crate::variants::{CHAIN, Table};
use crate::{effect, memory};

/// The cost of each variant compared with native, the first of them; then the variants that were left out, and why.
pub(crate) fn costs(costs: &[Cost], left_out: &[(String, String)], settings: &Settings) -> String {
    let Some(native) = costs.first() else { return String::new() };
    let waited: Duration = costs.iter().map(|cost| cost.waited).sum();
    let took: Duration = costs.iter().map(|cost| cost.took).sum();
    let mut text = format!(
        "### CPU time for each request\n\n\
         Of Envoy's one worker, on a core of its own: {} rounds of {} requests to each of {} listeners of one Envoy, in\n\
         random order, {CONNECTIONS} at a time. × native is the median over the rounds of what a listener cost against native in\n\
         the same round. Others took the worker's core for {:.0} % of the time.\n\n\
         | filter | × native | 95 % of it | quartiles | µs |\n|---|---|---|---|---|\n",
        settings.rounds,
        settings.batch,
        costs.len(),
        100.0 * waited.as_secs_f64() / took.as_secs_f64(),
    );
    for cost in costs.iter().filter(|cost| cost.variant.table == Table::Costs) {
        let ratio = cost.with(native, |own, native| own / native);
        let (Some(ratio), Some(micros)) = (ratio, cost.summary()) else { continue };
        let (low, high) = ratio.interval;
        let (first, third) = ratio.quartiles;
        let _ = writeln!(
            text,
            "| {} | **{:.2}** | {low:.3} to {high:.3} | {first:.2} to {third:.2} | {:.1} |",
            cost.variant.name, ratio.median, micros.median
        );
    }
    for (name, why) in left_out {
        let _ = writeln!(text, "| {name} | – | not measured: {why} | | |");
    }
    text
}

/// The cost of one more filter in a chain.
pub(crate) fn chains(costs: &[Cost]) -> String {
    let mut text = format!(
        "### CPU time of one more filter\n\n\
         A chain of {CHAIN} of them against one, for each that is more: what a filter costs once the way into the VM is in\n\
         the caches.\n\n\
         | filter | warm µs | 95 % of it |\n|---|---|---|\n"
    );
    for chain in costs {
        let Table::ChainOf(name) = &chain.variant.table else { continue };
        let Some(one) = costs.iter().find(|cost| cost.variant.name == *name) else { continue };
        let Some(more) = chain.with(one, |all, one| (all - one) / (CHAIN - 1) as f64) else { continue };
        let (low, high) = more.interval;
        let _ = writeln!(text, "| {name} | **{:.1}** | {low:.1} to {high:.1} |", more.median);
    }
    text
}

/// Memory and size of the modules; the first is an Envoy without one.
pub(crate) fn memory(measured: &[Memory], modules: &[Option<&PathBuf>]) -> anyhow::Result<String> {
    let workers = memory::WORKERS;
    let mut text = format!(
        "### Size and memory\n\n\
         Resident memory of Envoy after {} requests to each worker: with one (so a VM for it and one for the main thread),\n\
         and what each further one takes, up to {workers}. Its VM is what it takes more than one without a filter.\n\n\
         | filter | module | one worker | each further worker | of that its VM |\n|---|---|---|---|---|\n",
        memory::REQUESTS
    );
    let Some(native) = measured.first() else { return Ok(text) };
    let mb = |kb: f64| format!("{:.2} MB", kb / 1024.0);
    for (memory, module) in measured.iter().zip(modules) {
        let size = module.map(fs::metadata).transpose()?.map(|file| format!("{} KB", file.len() / 1000));
        let vm = size.as_ref().map_or("–".to_owned(), |_| format!("**{}**", mb(memory.further - native.further)));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {vm} |",
            memory.variant.name,
            size.as_deref().unwrap_or("–"),
            mb(memory.one),
            mb(memory.further)
        );
    }
    Ok(text)
}

/// Start-up times.
pub(crate) fn start(measured: &[Start], workers: usize) -> String {
    let runs = measured.first().map_or(0, |start| start.runs.len());
    let mut text = format!(
        "### Start of Envoy\n\n\
         From the start of the process until `/ready` says so, {workers} workers, median of {runs} runs.\n\n\
         | filter | ms | quartiles |\n|---|---|---|\n"
    );
    for start in measured {
        let Some(time) = start.summary() else { continue };
        let (first, third) = time.quartiles;
        let _ = writeln!(text, "| {} | **{:.0}** | {first:.0} to {third:.0} |", start.variant.name, time.median);
    }
    text
}

/// From policy to effect.
pub(crate) fn effects(effects: &Effects) -> String {
    let mut text = format!(
        "### From a policy to its effect\n\n\
         Until clients of each of {} workers see it, with {RATE:.0} requests a second besides theirs: {} changes, {} requests,\n\
         0 failed.\n\n\
         | from | median | p99 | max |\n|---|---|---|---|\n",
        effect::WORKERS,
        effects.effects.len(),
        effects.requests,
    );
    let mut row = |name: &str, of: fn(&Effect) -> Duration| {
        let times = || effects.effects.iter().map(of);
        let [median, p99, max] = [0.5, 0.99, 1.0].map(|part| effect::at(times(), part).as_secs_f64() * 1e3);
        let _ = writeln!(text, "| {name} | {median:.2} ms | **{p99:.2} ms** | {max:.2} ms |");
    };
    row("its publication in the controller", |effect| effect.since_published);
    row("the controller's answer to the poll", |effect| effect.since_answered);
    text
}
