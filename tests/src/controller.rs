//! The real `tideshift` binary: the controller and the command line.

use std::ffi::OsStr;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::artifacts;
use crate::client::get;
use crate::metrics::Metrics;
use crate::ports::Port;
use crate::process::Process;

const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(20);
/// The timeout of a command that ends by itself: a guard may veto its target twice, for ten seconds and for twenty.
const CLI: Duration = Duration::from_secs(60);

/// A controller on a port of its own; dropping it kills it.
///
/// For a restart with the same arguments on the same port call [`kill`](Self::kill) or [`terminate`](Self::terminate),
/// then [`start_again`](Self::start_again).
#[derive(Debug)]
pub struct Controller {
    port: Port,
    program: PathBuf,
    arguments: Vec<String>,
    process: Process,
    directory: TempDir,
}

impl Controller {
    /// `tideshift serve -f FILE --listen 127.0.0.1:PORT` for each of the documents, waiting until it is ready.
    pub async fn start(documents: &[&Path]) -> anyhow::Result<Self> {
        Self::start_with(documents, &[]).await
    }

    /// The same with additional arguments.
    pub async fn start_with(documents: &[&Path], further: &[&str]) -> anyhow::Result<Self> {
        Self::start_on(Port::reserve()?, documents, further).await
    }

    /// The same on a port that was reserved earlier, so that an Envoy can be configured with it first.
    pub async fn start_on(port: Port, documents: &[&Path], further: &[&str]) -> anyhow::Result<Self> {
        Self::start_program(artifacts::tideshift()?, port, documents, further).await
    }

    /// The same with another build of the binary.
    pub async fn start_program(
        program: PathBuf,
        port: Port,
        documents: &[&Path],
        further: &[&str],
    ) -> anyhow::Result<Self> {
        let mut arguments = vec!["serve".to_owned(), "--listen".to_owned(), port.address().to_string()];
        for document in documents {
            arguments.push("-f".to_owned());
            arguments.push(document.to_str().context("a path that is not UTF-8")?.to_owned());
        }
        arguments.extend(further.iter().map(|&argument| argument.to_owned()));
        let directory = tempfile::tempdir()?;
        let process = spawn(&program, &arguments, &log_of(&directory))?;
        let mut controller = Self { port, program, arguments, process, directory };
        controller.until_ready().await?;
        Ok(controller)
    }

    /// Starts it again after its end and waits until it is ready; its log continues in the same file.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.ended()?.is_some(), "the controller still runs");
        self.process = spawn(&self.program, &self.arguments, &log_of(&self.directory))?;
        self.until_ready().await
    }

    async fn until_ready(&mut self) -> anyhow::Result<()> {
        let address = self.port.address();
        self.process
            .until_ready(START, async || {
                let ready = get(address, "/readyz").send().await?;
                ensure!(ready.status == 200, "/readyz says {}: {}", ready.status, ready.text().trim());
                Ok(())
            })
            .await
    }

    /// SIGKILL: it cannot shut down gracefully.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill().map(drop)
    }

    /// SIGTERM; returns how it ended.
    pub async fn terminate(&mut self) -> anyhow::Result<ExitStatus> {
        self.process.terminate(END).await
    }

    /// SIGSTOP: it pauses, as on a suspended machine, until [`go_on`](Self::go_on).
    pub fn stand_still(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub fn go_on(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = i32::try_from(self.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        kill_process(id, signal).context("cannot signal the controller")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The listen address.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Gets a path of its API, which must answer 200.
    pub async fn get(&self, path: &str) -> anyhow::Result<String> {
        let response = get(self.address(), path).send().await?;
        ensure!(response.status == 200, "{path} says {}: {}", response.status, response.text());
        Ok(response.text())
    }

    /// `GET /v1/status`.
    pub async fn status(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.get("/v1/status").await?)?)
    }

    /// `GET /metrics`.
    pub async fn metrics(&self) -> anyhow::Result<Metrics> {
        Metrics::parse(&self.get("/metrics").await?)
    }

    /// The complete log, of all its starts.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The last lines of the log.
    pub fn tail(&self) -> String {
        self.process.tail()
    }
}

/// The result of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The standard output.
    pub stdout: String,
    /// The standard error.
    pub stderr: String,
}

/// Runs `tideshift` with these arguments until it ends.
pub fn cli<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> anyhow::Result<Output> {
    cli_reading(arguments, "")
}

/// The same with a standard input.
pub fn cli_reading<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>, stdin: &str) -> anyhow::Result<Output> {
    let mut command = Command::new(artifacts::tideshift()?);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // It may end without reading all of it.
    let _ = child.stdin.take().context("no standard input")?.write_all(stdin.as_bytes());
    // A command that does not end is killed, and then has no exit code.
    let (ended, to_end) = mpsc::channel::<()>();
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
    let guard = thread::spawn(move || {
        if to_end.recv_timeout(CLI) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(id, Signal::KILL);
        }
    });
    let output = child.wait_with_output()?;
    drop(ended);
    let _ = guard.join();
    Ok(Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn log_of(directory: &TempDir) -> PathBuf {
    directory.path().join("controller.log")
}

fn spawn(program: &Path, arguments: &[String], log: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(program);
    command.args(arguments);
    Process::start("the controller", command, log)
}
