//! The `exec` probe: a command that the controller runs; exit code 0 is success.

use crate::net::io_reason;
use crate::readiness::probe::Subject;
use rustix::process::{Pid, Signal, kill_process_group};
use std::process::Stdio;
use tokio::process::{Child, Command};

/// Runs the command in its own process group. The caller limits the time: if the future is dropped before the command
/// has ended, the whole group is killed.
pub(super) async fn run(command: &[String], subject: &Subject) -> Result<(), String> {
    let (program, arguments) = command.split_first().ok_or("no command")?;
    let child = Command::new(program)
        .args(arguments)
        .env("TIDESHIFT_ENDPOINT", subject.endpoint.to_string())
        .env("TIDESHIFT_SERVICE", &subject.service)
        .env("TIDESHIFT_VERSION", &subject.version)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{program} cannot be run: {}", io_reason(&error)))?;
    let status = Group(child).0.wait().await.map_err(|error| io_reason(&error))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{program} ended with {status}")),
    }
}

/// A command and all processes that it has started. Until the first process is reaped, no other process can have its
/// id.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(leader) = id {
            // It may have just ended on its own, which is fine.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}
