//! `make demo`: a rollout live in the terminal, with real parts only: Envoy with the module, `tideshift serve` and HTTP
//! backends on loopback ports. It ends by itself and fails unless all counts are equal; with `KEEP=1` it runs until
//! Ctrl-C. However it ends, it leaves no process and no directory.

mod acts;
mod document;
mod guard;
mod screen;
mod show;
mod signals;
mod stage;
mod status;
mod summary;
mod text;
mod view;

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::timeout;

use signals::Signals;

/// A signal to the whole process group ends the children as well; this must not be reported as an error.
const GRACE: Duration = Duration::from_millis(200);

#[tokio::main]
async fn main() -> ExitCode {
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return failed(&error),
    };
    let keep = env::var_os("KEEP").is_some_and(|keep| !keep.is_empty() && keep != "0");
    let ended = tokio::select! {
        biased;
        code = signals.caught() => return stopped(code),
        ended = acts::play(keep) => ended,
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => match timeout(GRACE, signals.caught()).await {
            Ok(code) => stopped(code),
            Err(_) => failed(&error),
        },
    }
}

fn stopped(code: u8) -> ExitCode {
    eprintln!("\nStopped; nothing of it is left running.");
    ExitCode::from(code)
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("\nThe demo failed: {error:#}");
    ExitCode::FAILURE
}
