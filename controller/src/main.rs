//! The binary `tideshift`: reads the command line, does what it says, and tells by its exit code how that went.

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
