//! `tideshift set-target`, `promote`, `pause`, `resume`, `abort`, `rollback`, `set-weight`, `apply`: saying something to
//! a rollout, and waiting for what comes of it.

use super::server::{Controller, Server};
use super::{Failure, Output, print};
use crate::documents;
use crate::rollout::{Command, Phase};
use crate::status::{ServiceStatus, Status};
use reqwest::Method;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Start a rollout to a version, as if the document named it as its target
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift set-target v2                       The only rollout there is
  tideshift set-target checkout v2 --wait       Ends when it has succeeded (0) or failed (6)

The document stays as it is; another target in it supersedes this one.")]
pub(super) struct SetTarget {
    /// The rollout, unless there is only one, and the version.
    #[arg(value_names = ["ROLLOUT", "VERSION"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// On to the next step: past a pause, the rest of a hold, or a verdict that is still undecided
#[derive(Debug, clap::Args)]
#[command(after_help = "What it does not skip: endpoints that are not ready, and a gate that has not said yes.")]
pub(super) struct Promote {
    /// Straight to the last step.
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Stay at the present share until resumed
#[derive(Debug, clap::Args)]
#[command(after_help = "A target that fails is taken back all the same.")]
pub(super) struct Pause {
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Go on after a pause, or from a weight that was set by hand
#[derive(Debug, clap::Args)]
pub(super) struct Resume {
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Give the stable version its traffic back
#[derive(Debug, clap::Args)]
#[command(after_help = "At once, as far as the stable version's endpoints can carry it. `set-target` tries again.")]
pub(super) struct Abort {
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Go back to a version at once, as far as its endpoints can carry the load
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift rollback --to v1
  tideshift rollback checkout --to v1 --wait --timeout 60s")]
pub(super) struct Rollback {
    /// The version to go back to.
    #[arg(long, value_name = "VERSION")]
    to: String,
    #[command(flatten)]
    rollout: OptionalRollout,
    #[command(flatten)]
    common: Common,
}

/// Set the target's share by hand and stay there until resumed
#[derive(Debug, clap::Args)]
pub(super) struct SetWeight {
    /// The rollout, unless there is only one, and the target's share in percent, 0 to 100.
    #[arg(value_names = ["ROLLOUT", "PERCENT"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// Put documents in force on a running controller
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift apply -f shift.yaml
  tideshift apply -f shift.yaml --wait --timeout 30m

What the controller reads from files of its own (`serve -f`) is overruled until those files change. Documents with
`readinessProbe.exec` are refused, since it would run commands on the controller's machine.")]
pub(super) struct Apply {
    /// TrafficShift documents in YAML or JSON; `-` reads standard input. May be given several times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct OptionalRollout {
    /// The rollout; may be left out if there is only one.
    rollout: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Wait until it is done: the rollout has succeeded (exit code 0) or failed (6), or what was asked for is in force
    /// on every proxy.
    #[arg(long, short)]
    wait: bool,

    /// How long to wait at most, such as 90s, 10m or 1h; then the exit code is 3.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = super::duration)]
    timeout: Duration,

    /// A line for people, or the rollout's services as JSON.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    server: Server,
}

/// What somebody waits for.
#[derive(Debug, Clone, PartialEq)]
enum Goal {
    /// The end of the rollout, whichever it is.
    End,
    /// The stable version has everything again.
    Back,
    /// This version has everything.
    At(String),
    /// Nothing moves any more.
    Paused,
    /// The target has the share that was set.
    Set,
}

impl SetTarget {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (rollout, target) = last_of(self.words);
        self.common.say(rollout, &Command::SetTarget { target }, &Goal::End).await
    }
}

impl Promote {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Promote { full: self.full }, &Goal::End).await
    }
}

impl Pause {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Pause, &Goal::Paused).await
    }
}

impl Resume {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Resume, &Goal::End).await
    }
}

impl Abort {
    pub(super) async fn run(self) -> Result<(), Failure> {
        self.common.say(self.rollout.rollout, &Command::Abort, &Goal::Back).await
    }
}

impl Rollback {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let goal = Goal::At(self.to.clone());
        self.common.say(self.rollout.rollout, &Command::Rollback { to: self.to }, &goal).await
    }
}

impl SetWeight {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (rollout, percent) = last_of(self.words);
        let weight = percent.trim_end_matches('%').parse().map_err(|_| {
            Failure::Usage(format!("PERCENT: \"{percent}\" is not allowed; expected an integer from 0 to 100"))
        })?;
        self.common.say(rollout, &Command::SetWeight { weight }, &Goal::Set).await
    }
}

impl Apply {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let documents = documents::load_as_written(&self.files)?;
        let controller = self.common.server.open().await?;
        for (shift, document) in &documents {
            let path = format!("/v1/shifts/{}", shift.name);
            let _: Value = controller.send(Method::PUT, &path, Some(document)).await?;
        }
        for (shift, _) in &documents {
            let goal = if shift.target.is_some() { Goal::End } else { Goal::Back };
            self.common.finish(&controller, &shift.name, &goal).await?;
        }
        Ok(())
    }
}

/// `[ROLLOUT] WORD`.
fn last_of(mut words: Vec<String>) -> (Option<String>, String) {
    let last = words.pop().unwrap_or_default();
    (words.pop(), last)
}

/// The rollout that is meant: the one of that name, or the only one.
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
        several => Err(Failure::Usage(format!("which rollout? Expected one of {}", several.join(", ")))),
    }
}

impl Common {
    async fn say(self, rollout: Option<String>, command: &Command, goal: &Goal) -> Result<(), Failure> {
        let controller = self.server.open().await?;
        let name = the_rollout(&controller, rollout).await?;
        let mut body = serde_json::to_value(command).map_err(|error| Failure::Other(error.into()))?;
        let verb = body.as_object_mut().and_then(|body| body.remove("command"));
        let verb = verb.as_ref().and_then(Value::as_str).unwrap_or_default();
        let path = format!("/v1/rollouts/{name}/{verb}");
        let told: Value = controller.send(Method::POST, &path, Some(&body)).await?;
        // Where namespaces are part of names, the controller also takes a name without one, and answers with the whole.
        let whole = told.pointer("/services/0/rollout").and_then(Value::as_str).unwrap_or(&name);
        self.finish(&controller, whole, goal).await
    }

    /// Waits if that is wanted, then says how things stand.
    async fn finish(&self, controller: &Controller, name: &str, goal: &Goal) -> Result<(), Failure> {
        const EVERY: Duration = Duration::from_millis(200);
        let begun = Instant::now();
        loop {
            let status: Status = controller.get("/v1/status").await?;
            let services: Vec<&ServiceStatus> = status.services.iter().filter(|of| of.rollout == name).collect();
            let Some(first) = services.first() else {
                return Err(Failure::Other(format!("{name} is not there any longer").into()));
            };
            let ended = !self.wait || goal.is_reached(&status, &services);
            let too_late = begun.elapsed() >= self.timeout;
            if !ended && !too_late {
                tokio::time::sleep(EVERY).await;
                continue;
            }
            if let Some(error) = &status.state_error {
                eprintln!("warning: it is done, but not safe from a restart of the controller: {error}");
            }
            match self.output {
                Output::Text => print(&format!("{name}: {} - {}\n", first.phase.name(), first.message))?,
                Output::Json => print(&format!("{:#}\n", json!({ "services": services })))?,
            }
            return match (ended, first.phase) {
                (false, _) => {
                    Err(Failure::TooLate(format!("{name} is not where it should be after {:?}", self.timeout)))
                }
                (true, Phase::Failed) if self.wait && *goal == Goal::End => {
                    Err(Failure::RolloutFailed(format!("{name}: {}", first.message)))
                }
                _ => Ok(()),
            };
        }
    }
}

impl Goal {
    fn is_reached(&self, status: &Status, services: &[&ServiceStatus]) -> bool {
        let in_force = status.proxies.iter().all(|proxy| proxy.revision == Some(status.revision));
        let has = |service: &ServiceStatus, version: &str| {
            let version = service.versions.iter().find(|known| known.name == version);
            version.is_some_and(|version| version.weight >= 100.0)
        };
        let all = |is_so: &dyn Fn(&ServiceStatus) -> bool| services.iter().all(|service| is_so(service));
        in_force
            && match self {
                Self::End => all(&|service| matches!(service.phase, Phase::Succeeded | Phase::Failed)),
                Self::Back => all(&|service| !service.phase.is_under_way() && has(service, &service.stable)),
                Self::At(version) => all(&|service| !service.phase.is_under_way() && has(service, version)),
                Self::Paused => all(&|service| service.phase == Phase::Paused),
                Self::Set => all(&|service| {
                    let target = service.versions.iter().find(|version| Some(&version.name) == service.target.as_ref());
                    let (weight, step) = (target.map(|target| target.weight), service.step.as_ref());
                    weight.zip(step).is_some_and(|(weight, step)| weight >= f64::from(step.weight))
                }),
            }
    }
}
