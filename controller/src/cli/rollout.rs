//! `tideshift set-target`, `promote`, `pause`, `resume`, `abort`, `rollback`, `set-weight`, `apply`: sends a command to a
//! rollout, and optionally waits for the result.

use crate::api::Services;
use crate::cli::client::{Controller, Server};
use crate::cli::wait::{Goal, Progress, Wait};
use crate::cli::{Failure, Output, print};
use crate::documents;
use crate::rollout::Command;
use crate::status::{ServiceStatus, Status};
use reqwest::Method;
use serde_json::Value;
use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Start a rollout to a version, as if you had set it as the document's target
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift set-target v2                       For the only rollout
  tideshift set-target checkout v2 --wait       Wait until it succeeds (exit code 0) or fails (6)

The document does not change; a later change of its target supersedes this command. If the version is already the target or
already serves all traffic, nothing changes and the exit code is 0. Use this command to retry after a rollout has failed.")]
pub(super) struct SetTarget {
    /// The rollout (optional if there is only one) and the version.
    #[arg(value_names = ["ROLLOUT", "VERSION"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// Promote to the next step: skip a pause, the rest of a hold, or an undecided verdict
#[derive(Debug, clap::Args)]
#[command(
    after_help = "It never skips readiness: traffic moves only to ready endpoints. It skips a gate that has not approved only with --override-gates."
)]
pub(super) struct Promote {
    /// Promote directly to the last step.
    #[arg(long)]
    full: bool,
    /// Skip gates that have not approved; history and log record it.
    #[arg(long)]
    override_gates: bool,
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Pause at the current share until resumed
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A failing target is still rolled back. If the rollout is already paused, nothing changes and the exit code is 0.")]
pub(super) struct Pause {
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Resume after a pause or after set-weight
#[derive(Debug, clap::Args)]
pub(super) struct Resume {
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Abort the rollout: return all traffic to the stable version
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Traffic returns immediately, as far as the stable version's endpoints can carry it. Use `set-target` to retry."
)]
pub(super) struct Abort {
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Roll back to a version immediately, as far as its endpoints can carry the load
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift rollback --to v1
  tideshift rollback checkout --to v1 --wait --timeout 60s")]
pub(super) struct Rollback {
    /// The version to roll back to.
    #[arg(long, value_name = "VERSION")]
    to: String,
    /// Skip gates, if that version has never served all traffic; history and log record it.
    #[arg(long)]
    override_gates: bool,
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Set the target's share manually and pause there until resumed
#[derive(Debug, clap::Args)]
pub(super) struct SetWeight {
    /// The rollout (optional if there is only one) and the target's share in percent, 0 to 100.
    #[arg(value_names = ["ROLLOUT", "PERCENT"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    /// Skip gates that have not approved; history and log record it.
    #[arg(long)]
    override_gates: bool,
    #[command(flatten)]
    common: Common,
}

/// Apply documents to a running controller
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift apply -f shift.yaml
  tideshift apply -f shift.yaml --wait --timeout 30m

An applied document overrides the one of the same name in the controller's files (`serve -f`) until those files change. The
controller rejects documents with `readinessProbe.exec`, because they would run commands on the controller's machine.")]
pub(super) struct Apply {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct OptionalRollout {
    /// The rollout; optional if there is only one.
    rollout: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Wait until the rollout has succeeded (exit code 0) or failed (6), or until the change is in force on every proxy. If
    /// another command supersedes this one (another target, a rollback), the exit code is 6.
    #[arg(long, short)]
    wait: bool,

    /// The maximum time to wait, such as 90s, 10m or 1h; after it the exit code is 3.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = crate::cli::duration)]
    timeout: Duration,

    /// Print a line of text, or the rollout's services as JSON.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    server: Server,
}

impl SetTarget {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (rollout, target) = last_of(self.words);
        self.common.say(rollout, &Command::SetTarget { target: target.clone() }, Goal::To(target)).await
    }
}

impl Promote {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common
            .say(
                self.rollout.rollout,
                &Command::Promote { full: self.full, override_gates: self.override_gates },
                Goal::End,
            )
            .await
    }
}

impl Pause {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Pause, Goal::Paused).await
    }
}

impl Resume {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Resume, Goal::End).await
    }
}

impl Abort {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Abort, Goal::Back).await
    }
}

impl Rollback {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let goal = Goal::At(self.to.clone());
        self.common
            .say(self.rollout.rollout, &Command::Rollback { to: self.to, override_gates: self.override_gates }, goal)
            .await
    }
}

impl SetWeight {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (rollout, percent) = last_of(self.words);
        let weight = percent.trim_end_matches('%').parse().map_err(|_| {
            Failure::Usage(format!("PERCENT: \"{percent}\" is not allowed; expected an integer from 0 to 100"))
        })?;
        let command = Command::SetWeight { weight, override_gates: self.override_gates };
        self.common.say(rollout, &command, Goal::Set(weight)).await
    }
}

impl Apply {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let documents = documents::load_as_written(&self.files)?;
        let controller = self.common.server.open().await?;
        let mut answers = Vec::with_capacity(documents.len());
        for (shift, document) in &documents {
            let path = format!("/v1/shifts/{}", shift.name);
            let answer: Services = controller.send(Method::PUT, &path, Some(document)).await?;
            answers.push((Goal::Document(shift.target.clone()), answer));
        }
        for (goal, answer) in answers {
            self.common.finish(&controller, goal, answer).await?;
        }
        Ok(())
    }
}

/// `[ROLLOUT] WORD`.
fn last_of(mut words: Vec<String>) -> (Option<String>, String) {
    let last = words.pop().unwrap_or_default();
    (words.pop(), last)
}

/// The full name of the given rollout, or of the only one.
pub(super) async fn the_rollout(controller: &Controller, named: Option<String>) -> Result<String, Failure> {
    if let Some(named) = named {
        return Ok(controller.whole_name(&named));
    }
    let status: Status = controller.get("/v1/status").await?;
    let mut names: Vec<String> = status.services.into_iter().map(|service| service.rollout).collect();
    names.dedup();
    names.retain(|name| controller.is_meant(name));
    match &names[..] {
        [only] => Ok(only.clone()),
        [] => Err(Failure::Usage(format!("the controller has no rollout{}", controller.place()))),
        several => Err(Failure::Usage(format!(
            "rollout not specified and there are several; expected one of {}",
            several.join(", ")
        ))),
    }
}

impl Common {
    async fn say(self, rollout: Option<String>, command: &Command, goal: Goal) -> Result<(), Failure> {
        let controller = self.server.open().await?;
        let name = the_rollout(&controller, rollout).await?;
        let mut body = serde_json::to_value(command).map_err(|error| Failure::Other(error.into()))?;
        let verb = body.as_object_mut().and_then(|body| body.remove("command"));
        let verb = verb.as_ref().and_then(Value::as_str).unwrap_or_default();
        let path = format!("/v1/rollouts/{name}/{verb}");
        let answer = controller.send(Method::POST, &path, Some(&body)).await?;
        self.finish(&controller, goal, answer).await
    }

    /// Prints the state of the rollout; with --wait, waits first.
    async fn finish(&self, controller: &Controller, goal: Goal, answer: Services) -> Result<(), Failure> {
        let (stand, progress) = match self.wait {
            true => self.wait_for(controller, goal, answer).await?,
            false => (answer, Progress::Reached),
        };
        let Some(first) = stand.services.first() else { return Ok(()) };
        let name = &first.rollout;
        match self.output {
            Output::Text => {
                let already = if stand.unchanged { " (already so)" } else { "" };
                print(&format!("{name}: {} - {}{already}\n", first.phase.name(), first.message))?;
            }
            Output::Json => {
                let json = serde_json::to_value(&stand).map_err(|error| Failure::Other(error.into()))?;
                print(&format!("{json:#}\n"))?;
            }
        }
        let unsafe_ =
            stand.state_error.map(|error| format!("applied, but the controller could not persist it: {error}"));
        match (progress, unsafe_) {
            (Progress::Reached, None) => Ok(()),
            (Progress::Reached, Some(why)) => Err(Failure::NotSafe(format!("{name}: {why}"))),
            (progress, unsafe_) => {
                unsafe_.iter().for_each(|why| eprintln!("warning: {why}"));
                Err(match progress {
                    Progress::Lost(why) => Failure::RolloutFailed(format!("{name}: {why}")),
                    Progress::Goes(why) | Progress::Lacks(why) => {
                        Failure::TooLate(format!("{name}: timed out after {:?}: {why}", self.timeout))
                    }
                    Progress::Reached => return Ok(()),
                })
            }
        }
    }

    /// Waits until the goal is reached, lost, or timed out, and returns the last known state.
    async fn wait_for(
        &self,
        controller: &Controller,
        goal: Goal,
        answer: Services,
    ) -> Result<(Services, Progress), Failure> {
        const EVERY: Duration = Duration::from_millis(200);
        let (begun, mut murmur) = (Instant::now(), WaitLog::default());
        let mut wait = Wait::new(goal, &answer.services);
        let Some(name) = answer.services.first().map(|first| first.rollout.clone()) else {
            return Ok((answer, Progress::Reached));
        };
        let (mut stand, mut first_look) = (answer, true);
        loop {
            let progress = match controller.get::<Status>("/v1/status").await {
                Ok(status) => {
                    let services: Vec<&ServiceStatus> =
                        status.services.iter().filter(|of| of.rollout == name).collect();
                    let Some(first) = services.first() else {
                        return Err(Failure::Other(format!("{name} no longer exists").into()));
                    };
                    let progress = wait.look(&status, first, &services, Instant::now());
                    if progress == Progress::Reached {
                        murmur.leave_out(&wait.silent(&status, Instant::now()));
                    }
                    let services = services.into_iter().cloned().collect();
                    // A state that was reached while waiting does not count as unchanged.
                    let unchanged = stand.unchanged && first_look;
                    stand = Services { services, unchanged, state_error: status.state_error.clone() };
                    progress
                }
                // The controller may be restarting.
                Err(error @ Failure::Other(_)) => Progress::Lacks(format!("the controller ({error})")),
                Err(error) => return Err(error),
            };
            let too_late = begun.elapsed() >= self.timeout;
            if too_late || matches!(progress, Progress::Reached | Progress::Lost(_)) {
                return Ok((stand, progress));
            }
            murmur.look(&progress);
            first_look = false;
            tokio::time::sleep(EVERY).await;
        }
    }
}

/// Prints on standard error what a long wait is blocked on: on a terminal whenever it changes, otherwise once.
#[derive(Debug, Default)]
struct WaitLog {
    since: Option<Instant>,
    said: Option<String>,
}

impl WaitLog {
    fn look(&mut self, progress: &Progress) {
        /// Proxies report every second.
        const A_WHILE: Duration = Duration::from_secs(2);
        let Progress::Lacks(what) = progress else {
            self.since = None;
            return;
        };
        let is_late = self.since.get_or_insert_with(Instant::now).elapsed() >= A_WHILE;
        let is_new = self.said.as_ref().is_none_or(|said| said != what && stderr().is_terminal());
        if is_late && is_new {
            eprintln!("waiting for {what}");
            self.said = Some(what.clone());
        }
    }

    fn leave_out(&self, silent: &[&str]) {
        if !silent.is_empty() {
            eprintln!("ignoring proxies that have not reported for 5 s: {}", silent.join(", "));
        }
    }
}
