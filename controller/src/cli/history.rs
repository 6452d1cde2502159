//! `tideshift history` and `tideshift watch`: past transitions, and transitions as they happen.

use super::{Failure, print, print_on};
use crate::cli::client::Server;
use crate::cli::rollout::the_rollout;
use crate::status::{Status, TransitionStatus};
use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{IsTerminal, stdout};
use std::time::Duration;

/// Show the history of a rollout: each transition with its time and reason
#[derive(Debug, clap::Args)]
pub(super) struct History {
    /// The rollout; optional if there is only one.
    rollout: Option<String>,

    /// Print a table, or the JSON of GET /v1/rollouts/ROLLOUT/history.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    #[command(flatten)]
    server: Server,
}

/// Watch rollouts: a live status and each transition as it happens
///
/// Runs until Ctrl-C, and keeps retrying while the controller is unreachable. If the output is not a terminal, it prints
/// transitions only, one per line, starting with the latest.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift watch
  tideshift watch checkout --output json | jq .message")]
pub(super) struct Watch {
    /// Only this rollout.
    rollout: Option<String>,

    /// Print text, or one JSON line per transition.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    #[command(flatten)]
    server: Server,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Deserialize)]
struct Transitions {
    transitions: Vec<TransitionStatus>,
}

impl History {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let controller = self.server.open().await?;
        let name = the_rollout(&controller, self.rollout).await?;
        let history: Transitions = controller.get(&format!("/v1/rollouts/{name}/history")).await?;
        match self.output {
            Output::Json => {
                let json = serde_json::json!({ "transitions": history.transitions });
                print(&format!("{json:#}\n"))
            }
            Output::Table => print(&format!("{}\n", table(&history.transitions))),
        }
    }
}

fn table(transitions: &[TransitionStatus]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["TIME", "ROLLOUT", "STEP", "PHASE", "REASON", "MESSAGE"]);
    for transition in transitions {
        table.add_row([
            format!("{:.1}", transition.time),
            transition.rollout.to_string(),
            transition.step.map_or(String::new(), |step| step.to_string()),
            transition.phase.name().to_owned(),
            format!("{:?}", transition.reason),
            message(transition),
        ]);
    }
    table
}

/// The message, with the number of similar transitions that were left out.
fn message(transition: &TransitionStatus) -> String {
    match transition.left_out {
        0 => transition.words(),
        left_out => format!("{} ({left_out} like it before are left out)", transition.words()),
    }
}

impl Watch {
    pub(super) async fn run(self) -> Result<(), Failure> {
        const EVERY: Duration = Duration::from_millis(500);
        let controller = self.server.open().await?;
        let wanted = self.rollout.as_ref().map(|name| controller.whole_name(name));
        let is_wanted =
            |name: &String| wanted.as_ref().map_or_else(|| controller.is_meant(name), |wanted| wanted == name);
        let redraws = self.output == Output::Table && stdout().is_terminal();
        // How much of each rollout's history has been shown.
        let mut shown: BTreeMap<String, TransitionStatus> = BTreeMap::new();
        let mut first = true;
        loop {
            let status: Status = match controller.get("/v1/status").await {
                Ok(status) => status,
                // Fail if the first request fails; retry later ones, since the controller may be restarting.
                Err(error) if first => return Err(error),
                Err(error) => {
                    eprintln!("{error}");
                    tokio::time::sleep(EVERY).await;
                    continue;
                }
            };
            let mut names: Vec<String> = status.services.iter().map(|service| service.rollout.clone()).collect();
            names.dedup();
            names.retain(is_wanted);
            if let Some(wanted) = wanted.as_ref().filter(|_| names.is_empty() && first) {
                return Err(Failure::Usage(format!("there is no rollout {wanted}")));
            }
            let mut text = String::new();
            let mut recent = Vec::new();
            for name in &names {
                let path = format!("/v1/rollouts/{name}/history");
                let Ok(history) = controller.get::<Transitions>(&path).await else { continue };
                let last = shown.get(name).and_then(|last| history.transitions.iter().rposition(|one| one == last));
                // Of the transitions from before the start, print the latest only.
                let before = if first { history.transitions.len().saturating_sub(1) } else { 0 };
                for transition in history.transitions.iter().skip(last.map_or(before, |last| last + 1)) {
                    let _ = match self.output {
                        Output::Table => writeln!(text, "{}", line(name, transition)),
                        Output::Json => {
                            let mut json = serde_json::to_value(transition).unwrap_or_default();
                            json["name"] = name.clone().into();
                            writeln!(text, "{json}")
                        }
                    };
                }
                if let Some(last) = history.transitions.last() {
                    shown.insert(name.clone(), last.clone());
                }
                recent.extend(history.transitions.iter().rev().take(8).map(|one| (one.time, line(name, one))));
            }
            if redraws {
                recent.sort();
                let recent: String = recent.iter().rev().take(8).rev().map(|(_, line)| format!("{line}\n")).collect();
                let only = Status {
                    services: status.services.iter().filter(|of| is_wanted(&of.rollout)).cloned().collect(),
                    ..status
                };
                text = format!("\x1b[H\x1b[J{}\n{recent}", only.to_table());
            }
            if !text.is_empty() && !print_on(&text)? {
                return Ok(());
            }
            first = false;
            tokio::time::sleep(EVERY).await;
        }
    }
}

fn line(name: &str, transition: &TransitionStatus) -> String {
    format!(
        "{:.1}  {name}: {} ({:?}) - {}",
        transition.time,
        transition.phase.name(),
        transition.reason,
        transition.message
    )
}
