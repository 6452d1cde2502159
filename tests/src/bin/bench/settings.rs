//! What people may change on the command line: `make bench ROUNDS=100 ONLY=weights MODULE=other.wasm`.

use std::{env, fmt::Display, str::FromStr};

use anyhow::Context as _;

/// How much to measure.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Rounds that count.
    pub(crate) rounds: usize,
    /// Rounds before them.
    pub(crate) warm_up: usize,
    /// Requests to each listener in each round.
    pub(crate) batch: usize,
    /// Only variants with one of these in their name, besides native; empty: all.
    pub(crate) only: Vec<String>,
}

impl Settings {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let quick = variable("QUICK", 0)? != 0;
        let only = env::var("ONLY").unwrap_or_default();
        Ok(Self {
            rounds: variable("ROUNDS", if quick { 60 } else { 300 })?.max(1),
            warm_up: 5,
            batch: variable("BATCH", if quick { 200 } else { 300 })?.max(1),
            only: only.split('|').filter(|name| !name.is_empty()).map(str::to_lowercase).collect(),
        })
    }
}

fn variable<T: FromStr<Err: Display>>(name: &str, default: T) -> anyhow::Result<T> {
    match env::var(name) {
        Ok(text) if !text.is_empty() => {
            text.parse().map_err(|error| anyhow::anyhow!("{error}")).with_context(|| format!("{name}={text}"))
        }
        _ => Ok(default),
    }
}
