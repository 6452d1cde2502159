//! Cleans up if the demo is killed with SIGKILL and cannot clean up itself: a small shell process waits for the end of
//! a pipe, which closes with the demo, then kills the demo's programs and removes its directory.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

/// The arguments are the directory and the programs: a process that runs one of them with a path in the directory
/// belongs to the demo.
const SCRIPT: &str = r#"
trap '' INT TERM HUP
read -r _
folder=$1
shift
ps -eo pid=,args= | while read -r pid args; do
    for program; do
        case $args in "$program "*"$folder"*) kill -KILL "$pid" ;; esac
    done
done
rm -rf "$folder"
"#;

/// The guard of one directory; dropping it ends it without any cleanup.
pub(crate) struct Guard {
    shell: Child,
}

impl Guard {
    pub(crate) fn new(folder: &Path, programs: [&Path; 2]) -> anyhow::Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT, "guard"]).arg(folder).args(programs);
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { shell: shell.spawn().context("cannot start sh")? })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}
