//! `tideshift install`: the binary copies itself, because the image contains no other program that could.

use super::{Failure, print};
use crate::net::io_reason;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// Copy this program into a directory, for containers that do not ship it
///
/// Use it in an init container: it copies the program to a volume shared with the pod's other containers, whose preStop
/// hooks can then call it. The program is statically linked and has no dependencies.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift install /shared        Creates /shared/tideshift

In a pod:
  initContainers:
  - {name: tideshift, image: tideshift, args: [install, /shared], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - name: payment
    volumeMounts: [{name: shared, mountPath: /shared, readOnly: true}]
    lifecycle:
      preStop: {exec: {command: [/shared/tideshift, wait-drained, payment.shop, v1, --server,
                                 http://tideshift.tideshift-system:7460]}}
  volumes: [{name: shared, emptyDir: {}}]")]
pub(super) struct Arguments {
    /// The directory; it must exist.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl Arguments {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let installed = self.folder.join("tideshift");
        let program = env::current_exe().and_then(fs::read)?;
        replace(&installed, &program).map_err(|error| {
            Failure::Other(format!("{} cannot be written: {}", installed.display(), io_reason(&error)).into())
        })?;
        print(&format!("{}\n", installed.display()))
    }
}

/// Replaces a file atomically: concurrent callers run the old program or the new one, never a partial file.
fn replace(path: &Path, program: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let unfinished = folder.join(format!(".tideshift-{}", std::process::id()));
    let written = executable(&unfinished).and_then(|mut file| {
        file.write_all(program)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&unfinished, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// Creates a file that every user can execute.
fn executable(path: &Path) -> io::Result<fs::File> {
    let file = fs::File::create(path)?;
    #[cfg(unix)]
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_takes_anothers_place_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tideshift");
        for program in ["the first and longer one", "the second"] {
            replace(&path, program.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), program);
        }
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o755);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_put_there_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tideshift");
        fs::create_dir(&path).unwrap();
        assert!(replace(&path, b"program").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
