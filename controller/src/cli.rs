//! The command line: what there is to say to `tideshift`, and how it answers. Each subcommand is a file of its own
//! below; it reads its arguments and leaves the work to the library.

mod completions;
mod crd;
mod delete;
mod explain;
mod history;
mod install;
mod migrate_secrets;
mod plugin;
mod render;
mod serve;
mod server;
mod simulate;
mod status;
mod steer;
mod validate;
mod wait;
mod wait_drained;

use crate::documents::DocumentErrors;
use crate::net::io_reason;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Traffic shifting inside the proxy: which version of a service answers, decided request by request.
#[derive(Debug, Parser)]
#[command(name = "tideshift", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
From a document to moving traffic:
  tideshift validate -f shift.yaml                 Is the document right?
  tideshift render envoy -f shift.yaml > envoy.yaml
                                                   An Envoy that does what it says
  tideshift serve -f shift.yaml                    The controller that moves its weights
  tideshift status --watch                         How things stand
  tideshift explain -f shift.yaml --host shop.example.com --path /cart -H 'x-beta: 1'
                                                   Which version would this request get, and why?
  tideshift simulate -f shift.yaml --scenario scenario.yaml --svg simulation.svg
                                                   What would the strategy do if versions behaved like this?

While it runs:
  tideshift set-target v2 --wait                   A rollout; 0 when it has succeeded, 6 when it has failed
  tideshift promote | pause | resume | abort | rollback --to v1 | set-weight 25
  tideshift apply -f shift.yaml | delete checkout  A document into the running controller, and out of it again
  tideshift watch                                  Each transition as it happens
  tideshift wait-drained checkout v1               Until nothing of v1 is in flight any more

In Kubernetes:
  tideshift crd | kubectl apply --server-side -f -
                                                   Documents become resources
  tideshift serve --kubernetes                     The controller; several replicas may run
  tideshift render istio -f shift.yaml | kubectl apply -f -
                                                   The filter and the routes; also envoy-gateway, httproute

Exit codes: 0 fine; 2 a document or the command line is wrong; 3 what was waited for has not come in time; 4 it does not fit
how things stand; 5 the controller wants another token; 6 the rollout that was waited for has failed, or something else took its
place; 7 done, but not safe from a restart of the controller, which cannot keep it; 1 anything else.";

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Arguments),
    Status(status::Arguments),
    Validate(validate::Arguments),
    Explain(explain::Arguments),
    Render(render::Arguments),
    Watch(history::Watch),
    History(history::History),
    Apply(steer::Apply),
    Delete(delete::Arguments),
    SetTarget(steer::SetTarget),
    Promote(steer::Promote),
    Pause(steer::Pause),
    Resume(steer::Resume),
    Abort(steer::Abort),
    Rollback(steer::Rollback),
    SetWeight(steer::SetWeight),
    WaitDrained(wait_drained::Arguments),
    Install(install::Arguments),
    Completions(completions::Arguments),
    Crd(crd::Arguments),
    MigrateSecrets(migrate_secrets::Arguments),
    Simulate(simulate::Arguments),
}

/// How to print an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

impl Cli {
    /// Reads the command line of this process, as `tideshift` or as the plugin of kubectl. Ends it if there is nothing to do
    /// but to tell the user something.
    pub fn of_this_process() -> Self {
        let command = if plugin::has_called() { plugin::named(Self::command()) } else { Self::command() };
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }

    /// Does what the command line says.
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

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Documents that are wrong; shown one error a line.
    #[error(transparent)]
    Documents(#[from] DocumentErrors),
    /// Arguments that make no sense together or with the documents.
    #[error("error: {0}")]
    Usage(String),
    /// What was waited for has not come in time.
    #[error("error: {0}")]
    TooLate(String),
    /// The rollout that was waited for has failed, or something else took its place.
    #[error("error: {0}")]
    RolloutFailed(String),
    /// It is done, but the controller could not keep it.
    #[error("error: {0}")]
    NotSafe(String),
    /// The controller wants another token, or one at all.
    #[error("error: {0}")]
    NotAllowed(String),
    /// What is asked for does not fit how things stand.
    #[error("error: {0}")]
    Conflict(String),
    /// Anything else: the network, the file system, a controller that does not answer.
    #[error("error: {0}")]
    Other(#[from] Box<dyn Error + Send + Sync>),
}

impl Failure {
    /// As `tideshift --help` says.
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

/// The first line of a file that is not empty: a token.
fn token_in(flag: &str, path: &Path) -> Result<String, Failure> {
    let usage = |why: &str| Failure::Usage(format!("{flag} {}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| usage(&io_reason(&error)))?;
    let token = text.lines().map(str::trim).find(|line| !line.is_empty()).ok_or_else(|| usage("no token in it"))?;
    match token.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(token.to_owned()),
        false => Err(usage("a token has visible ASCII characters only")),
    }
}

/// Writes to standard output. A reader that has gone away (`| head`) has seen enough: no error.
fn print(text: &str) -> Result<(), Failure> {
    print_on(text).map(|_| ())
}

/// The same for output that goes on; says whether the reader is still there.
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
