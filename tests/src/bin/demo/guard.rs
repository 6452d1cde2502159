//! Cleans up if the demo is killed with SIGKILL, when nothing of its own can: a small shell process that waits for the
//! end of a pipe which ends with the demo, then kills what it was told of and removes the folder.

use std::{
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;

const SCRIPT: &str = r#"
trap '' INT TERM HUP
pids=
while read -r pid; do pids="$pids $pid"; done
[ -z "$pids" ] || kill -KILL $pids
rm -rf "$1"
"#;

/// The guard of one folder; dropping it sends it away with nothing done.
pub(crate) struct Guard {
    shell: Child,
}

impl Guard {
    pub(crate) fn of(folder: &Path) -> anyhow::Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT, "guard"]).arg(folder);
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { shell: shell.spawn().context("cannot start sh")? })
    }

    /// Has this process killed when the demo is.
    pub(crate) fn watch(&mut self, process: u32) -> anyhow::Result<()> {
        let pipe = self.shell.stdin.as_mut().context("no pipe to the guard")?;
        writeln!(pipe, "{process}").context("cannot write to the guard")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}
