//! A child process with its log in a file; it ends with its handle.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait::eventually;

/// The number of the log's last lines in messages.
const TAIL: usize = 60;

/// A running (or ended) process; dropping it kills it and waits for its end.
///
/// If that happens while a test panics, the end of its log goes to the standard error.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its output appended to the file `log`. `name` is what messages call it.
    pub fn start(name: &str, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("cannot open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Waits until `ready` returns `Ok`; fails at once, with the log's end, if the process ends before.
    pub async fn until_ready(
        &mut self,
        deadline: Duration,
        mut ready: impl AsyncFnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let what = format!("{} to be ready", self.name);
        let outcome = eventually(&what, deadline, async || match self.ended()? {
            Some(status) => Ok(Some(status)),
            None => ready().await.map(|()| None),
        });
        match outcome.await {
            Ok(None) => Ok(()),
            Ok(Some(status)) => bail!("{} ended at its start ({status}):\n{}", self.name, self.tail()),
            Err(error) => bail!("{error:#}\n{}", self.tail()),
        }
    }

    /// SIGTERM, then waits for its end.
    pub async fn terminate(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        if self.ended()?.is_none() {
            let id = i32::try_from(self.id()).ok().and_then(Pid::from_raw).context("no process id")?;
            kill_process(id, Signal::TERM).with_context(|| format!("cannot signal {}", self.name))?;
        }
        let what = format!("{} to end after SIGTERM", self.name);
        eventually(&what, deadline, async || self.ended()?.context("it runs")).await
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        let _ = self.child.kill();
        self.child.wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// The whole log.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The log's last lines, under a heading.
    pub fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(TAIL)..];
        format!("--- end of the log of {} ---\n{}\n---", self.name, last.join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
        if thread::panicking() {
            eprintln!("{}", self.tail());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, log: &Path) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("sh", command, log).unwrap()
    }

    #[tokio::test]
    async fn an_early_end_is_told_with_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let mut process = shell("echo out of luck >&2; exit 3", &directory.path().join("log"));
        let ready = process.until_ready(Duration::from_secs(5), async || bail!("never"));
        let error = ready.await.unwrap_err().to_string();
        assert!(error.contains("out of luck") && error.contains("status: 3"), "{error}");
    }

    #[tokio::test]
    async fn terminates() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut process = shell("trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done", &log);
        process
            .until_ready(Duration::from_secs(5), async || {
                anyhow::ensure!(fs::read_to_string(&log)?.contains("up"));
                Ok(())
            })
            .await
            .unwrap();
        assert_eq!(process.terminate(Duration::from_secs(5)).await.unwrap().code(), Some(7));
    }
}
