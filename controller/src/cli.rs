//! The command line of `tideshift`. Each subcommand has its own file below: it parses its arguments and calls the
//! library for the work.

mod client;
mod completions;
mod crd;
mod delete;
mod explain;
mod history;
mod install;
mod migrate_secrets;
mod plugin;
mod render;
mod rollout;
mod serve;
mod simulate;
mod status;
mod validate;
mod wait;
mod wait_drained;

use crate::documents::DocumentErrors;
use crate::net::io_reason;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use std::{fs, io};

/// Progressive delivery inside the proxy: canary, blue/green and A/B releases, decided for each request.
#[derive(Debug, Parser)]
#[command(name = "tideshift", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
From a document to moving traffic:
  tideshift validate -f shift.yaml                 Check the document
  tideshift render envoy -f shift.yaml > envoy.yaml
                                                   Generate an Envoy configuration for it
  tideshift serve -f shift.yaml                    Run the controller, which moves the weights
  tideshift status --watch                         Show the current state
  tideshift explain -f shift.yaml --host shop.example.com --path /cart -H 'x-beta: 1'
                                                   Show which version this request gets, and why
  tideshift simulate -f shift.yaml --scenario scenario.yaml --svg simulation.svg
                                                   Predict what the strategy does in this scenario

While it runs:
  tideshift set-target v2 --wait                   Start a rollout; exit 0 or, if it fails, 6
  tideshift promote | pause | resume | abort | rollback --to v1 | set-weight 25
  tideshift apply -f shift.yaml | delete checkout  Add a document, or remove it
  tideshift watch                                  Print each transition as it happens
  tideshift wait-drained checkout v1               Wait until v1 has no request in flight

In Kubernetes:
  tideshift crd | kubectl apply --server-side -f -
                                                   Install the CustomResourceDefinition
  tideshift serve --kubernetes                     Run the controller, as one replica or several
  tideshift render istio -f shift.yaml | kubectl apply -f -
                                                   Install the filter and the routes

Exit codes: 0 success; 1 any other error; 2 invalid document or command line; 3 timed out waiting;
4 conflicts with the rollout's current state; 5 authentication failed; 6 the rollout failed or was
superseded; 7 applied, but the controller could not persist it.";

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Arguments),
    Status(status::Arguments),
    Validate(validate::Arguments),
    Explain(explain::Arguments),
    Render(render::Arguments),
    Watch(history::Watch),
    History(history::History),
    Apply(rollout::Apply),
    Delete(delete::Arguments),
    SetTarget(rollout::SetTarget),
    Promote(rollout::Promote),
    Pause(rollout::Pause),
    Resume(rollout::Resume),
    Abort(rollout::Abort),
    Rollback(rollout::Rollback),
    SetWeight(rollout::SetWeight),
    WaitDrained(wait_drained::Arguments),
    Install(install::Arguments),
    Completions(completions::Arguments),
    Crd(crd::Arguments),
    MigrateSecrets(migrate_secrets::Arguments),
    Simulate(simulate::Arguments),
}

/// The output format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// Text for people.
    #[default]
    Text,
    /// JSON for programs.
    Json,
}

impl Cli {
    /// Parses the command line of this process, as `tideshift` or as the kubectl plugin. Exits the process on `--help`,
    /// `--version` and usage errors.
    pub fn of_this_process() -> Self {
        let command = if plugin::has_called() { plugin::named(Self::command()) } else { Self::command() };
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }

    /// Runs the subcommand.
    pub async fn run(self) -> Result<(), Failure> {
        crate::net::install_crypto_provider();
        match self.command {
            Command::Serve(arguments) => serve::run(arguments).await,
            Command::Status(arguments) => status::run(arguments).await,
            Command::Validate(arguments) => validate::run(&arguments),
            Command::Explain(arguments) => explain::run(arguments).await,
            Command::Render(arguments) => render::run(&arguments),
            Command::Watch(arguments) => arguments.run().await,
            Command::History(arguments) => arguments.run().await,
            Command::Apply(arguments) => arguments.run().await,
            Command::Delete(arguments) => arguments.run().await,
            Command::SetTarget(arguments) => arguments.run().await,
            Command::Promote(arguments) => arguments.run().await,
            Command::Pause(arguments) => arguments.run().await,
            Command::Resume(arguments) => arguments.run().await,
            Command::Abort(arguments) => arguments.run().await,
            Command::Rollback(arguments) => arguments.run().await,
            Command::SetWeight(arguments) => arguments.run().await,
            Command::WaitDrained(arguments) => arguments.run().await,
            Command::Install(arguments) => arguments.run(),
            Command::Completions(arguments) => arguments.run(),
            Command::Crd(arguments) => arguments.run(),
            Command::MigrateSecrets(arguments) => arguments.run(),
            Command::Simulate(arguments) => simulate::run(&arguments),
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Invalid documents; one error per line.
    #[error(transparent)]
    Documents(#[from] DocumentErrors),
    /// Arguments that contradict each other or the documents.
    #[error("error: {0}")]
    Usage(String),
    /// The wait timed out.
    #[error("error: {0}")]
    TooLate(String),
    /// The rollout failed or was superseded.
    #[error("error: {0}")]
    RolloutFailed(String),
    /// The change is applied, but the controller could not persist it.
    #[error("error: {0}")]
    NotSafe(String),
    /// Authentication failed: no token, or one without the needed permission.
    #[error("error: {0}")]
    NotAllowed(String),
    /// The command conflicts with the current state.
    #[error("error: {0}")]
    Conflict(String),
    /// Anything else: the network, the file system, a controller that does not answer.
    #[error("error: {0}")]
    Other(#[from] Box<dyn Error + Send + Sync>),
}

impl Failure {
    /// The exit code that `tideshift --help` documents.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Documents(_) | Self::Usage(_) => ExitCode::from(2),
            Self::TooLate(_) => ExitCode::from(3),
            Self::Conflict(_) => ExitCode::from(4),
            Self::NotAllowed(_) => ExitCode::from(5),
            Self::RolloutFailed(_) => ExitCode::from(6),
            Self::NotSafe(_) => ExitCode::from(7),
            Self::Other(_) => ExitCode::FAILURE,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Other(error.into())
    }
}

/// A time such as `90s`, `10m` or `1h 30m`.
fn duration(text: &str) -> Result<Duration, String> {
    let allowed = || "expected a time such as 90s, 10m or 1h".to_owned();
    let parsed: jiff::SignedDuration = text.parse().map_err(|_| allowed())?;
    Duration::try_from(parsed).map_err(|_| allowed())
}

/// Reads a token: the first line of a file that is not empty.
fn token_in(flag: &str, path: &Path) -> Result<String, Failure> {
    let usage = |why: &str| Failure::Usage(format!("{flag} {}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| usage(&io_reason(&error)))?;
    let token = text.lines().map(str::trim).find(|line| !line.is_empty()).ok_or_else(|| usage("no token in it"))?;
    match token.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(token.to_owned()),
        false => Err(usage("a token has visible ASCII characters only")),
    }
}

/// Writes to standard output. A closed pipe (`| head`) is not an error.
fn print(text: &str) -> Result<(), Failure> {
    print_on(text).map(|_| ())
}

/// The same for continuous output; returns whether the reader is still there.
fn print_on(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
