//! Settings from the command line: `make bench ROUNDS=100 ONLY='weights|Lua' SECTIONS=cost`.

use std::env;
use std::fmt::Display;
use std::str::FromStr;

use anyhow::{Context as _, ensure};

/// The measurements.
const SECTIONS: [&str; 4] = ["cost", "memory", "start", "effect"];

/// How much to measure.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Rounds that count, of what requests cost.
    pub(crate) rounds: usize,
    /// Rounds before them.
    pub(crate) warm_up: usize,
    /// Requests to each listener in each round.
    pub(crate) batch: usize,
    /// Only variants with one of these in their name, in lower case, besides native; empty: all.
    only: Vec<String>,
    sections: Vec<String>,
    /// Envoys for each figure of memory.
    pub(crate) memory_runs: usize,
    /// Starts of each Envoy.
    pub(crate) start_runs: usize,
    /// Policies that are published.
    pub(crate) changes: u64,
}

impl Settings {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let quick = variable("QUICK", 0)? != 0;
        let sections: Vec<String> = words("SECTIONS", ' ').collect();
        for section in &sections {
            ensure!(SECTIONS.contains(&section.as_str()), "SECTIONS={section}: there are {}", SECTIONS.join(", "));
        }
        Ok(Self {
            rounds: variable("ROUNDS", if quick { 40 } else { 300 })?.max(1),
            warm_up: 5,
            batch: variable("BATCH", if quick { 200 } else { 300 })?.max(1),
            only: words("ONLY", '|').map(|name| name.to_lowercase()).collect(),
            sections,
            memory_runs: if quick { 1 } else { 5 },
            start_runs: if quick { 3 } else { 15 },
            changes: if quick { 100 } else { 1_000 },
        })
    }

    /// Whether to measure a variant.
    pub(crate) fn wants(&self, variant: &str) -> bool {
        let variant = variant.to_lowercase();
        self.only.is_empty() || self.only.iter().any(|only| variant.contains(only))
    }

    /// Whether to measure all of that.
    pub(crate) fn has_section(&self, section: &str) -> bool {
        self.sections.is_empty() || self.sections.iter().any(|wanted| wanted == section)
    }
}

fn words(name: &str, separator: char) -> impl Iterator<Item = String> {
    let words: Vec<String> = env::var(name).unwrap_or_default().split(separator).map(str::to_owned).collect();
    words.into_iter().filter(|word| !word.is_empty())
}

fn variable<T: FromStr<Err: Display>>(name: &str, default: T) -> anyhow::Result<T> {
    match env::var(name) {
        Ok(text) if !text.is_empty() => {
            text.parse().map_err(|error| anyhow::anyhow!("{error}")).with_context(|| format!("{name}={text}"))
        }
        _ => Ok(default),
    }
}
