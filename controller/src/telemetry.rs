//! Structured logs: text for a terminal, JSON lines for everything else.

use clap::ValueEnum;
use std::io;
use std::io::IsTerminal;
use tracing_subscriber::{EnvFilter, fmt};

/// How log lines look.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// One line of text each.
    Text,
    /// One JSON object each.
    Json,
}

/// Starts logging to standard error. `level` is a level such as `info`, or a filter as the `tracing` crates know it.
///
/// # Errors
///
/// In words, if `level` is neither.
pub fn start(format: LogFormat, level: &str) -> Result<(), String> {
    // What a cluster's client has to say is said in our words; its own are for those who ask for more.
    let quiet = matches!(level, "error" | "warn" | "info");
    let directives = if quiet { format!("{level},kube_client=off,kube_runtime=off") } else { level.to_owned() };
    let filter = EnvFilter::try_new(directives).map_err(|error| {
        format!("--log-level {level}: {error}; expected error, warn, info, debug, trace or a filter of them")
    })?;
    let terminal = io::stderr().is_terminal();
    let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder = fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colours);
    let started = match (format, terminal) {
        (LogFormat::Json, _) | (LogFormat::Auto, false) => builder.json().flatten_event(true).try_init(),
        _ => builder.with_target(false).try_init(),
    };
    started.map_err(|error| error.to_string())
}
