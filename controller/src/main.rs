//! The binary `tideshift`: parses the command line, runs the subcommand and reports the result as an exit code.

use std::process::ExitCode;
use tideshift::cli::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    match Cli::of_this_process().run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}
