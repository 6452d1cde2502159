//! The documents' files, watched for changes by looking: it works the same for editors, ConfigMaps and network file
//! systems. A changed file is taken once it has stayed the same for a second, and while no process has it open for writing,
//! as far as that can be known. Standard input and pipes are read once, when the controller starts.

mod writers;

use crate::documents::is_static;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A file must have stayed the same for so long.
const SETTLED: Duration = Duration::from_secs(1);

/// Files, and which of their states has been taken.
pub(super) struct Files {
    watched: Vec<Watched>,
}

struct Watched {
    path: PathBuf,
    taken: Option<Stamp>,
    seen: Option<Stamp>,
    since: Instant,
    /// Whether the log says already that it is open for writing.
    is_told: bool,
}

/// What is another when a file has been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    size: u64,
    /// Device and inode: a ConfigMap and a careful editor put another file in its place.
    file: (u64, u64),
}

impl Files {
    /// The files as they are now; what is no regular file does not change.
    pub(super) fn new(paths: &[PathBuf], now: Instant) -> Self {
        let watched = paths.iter().filter(|path| !is_static(path)).map(|path| {
            let stamp = stamp(path);
            Watched { path: path.clone(), taken: stamp, seen: stamp, since: now, is_told: false }
        });
        Self { watched: watched.collect() }
    }

    /// Whether some have changed since the last time that this was true, and all of these have settled.
    pub(super) fn have_changed(&mut self, now: Instant) -> bool {
        let mut has_changed = false;
        let mut is_settled = true;
        for file in &mut self.watched {
            let stamp = stamp(&file.path);
            if stamp != file.seen {
                (file.seen, file.since) = (stamp, now);
            }
            if file.seen != file.taken {
                has_changed = true;
                is_settled &= now.duration_since(file.since) >= SETTLED && !file.is_being_written();
            }
        }
        if !(has_changed && is_settled) {
            return false;
        }
        self.watched.iter_mut().for_each(|file| file.taken = file.seen);
        true
    }

    /// Whether they are still as they were taken: what was read since then is whole.
    pub(super) fn are_as_taken(&self) -> bool {
        self.watched.iter().all(|file| stamp(&file.path) == file.taken)
    }
}

impl Watched {
    fn is_being_written(&mut self) -> bool {
        let writer = self.seen.and_then(|stamp| writers::of(stamp.file));
        if let Some(pid) = writer.filter(|_| !self.is_told) {
            let file = self.path.display();
            tracing::warn!(
                "{file}: has changed, and process {pid} has it open for writing; it is read once that has ended"
            );
        }
        self.is_told = writer.is_some();
        writer.is_some()
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let data = fs::metadata(path).ok()?;
    #[cfg(unix)]
    let file = {
        use std::os::unix::fs::MetadataExt as _;
        (data.dev(), data.ino())
    };
    #[cfg(not(unix))]
    let file = (0, 0);
    Some(Stamp { modified: data.modified().ok(), size: data.len(), file })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn after(begun: Instant, millis: u64) -> Instant {
        begun + Duration::from_millis(millis)
    }

    #[test]
    fn a_change_counts_once_it_has_settled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shift.yaml");
        fs::write(&path, "a").unwrap();
        let begun = Instant::now();
        let mut files = Files::new(std::slice::from_ref(&path), begun);
        assert!(!files.have_changed(after(begun, 5_000)));
        fs::write(&path, "ab").unwrap();
        assert!(!files.have_changed(after(begun, 6_000)));
        fs::write(&path, "abc").unwrap();
        assert!(!files.have_changed(after(begun, 7_000)), "changed again");
        assert!(!files.have_changed(after(begun, 7_900)));
        assert!(files.have_changed(after(begun, 8_000)) && files.are_as_taken());
        assert!(!files.have_changed(after(begun, 9_500)));
        fs::write(&path, "abcd").unwrap();
        assert!(!files.are_as_taken());
        fs::remove_file(&path).unwrap();
        assert!(!files.have_changed(after(begun, 10_000)));
        assert!(files.have_changed(after(begun, 11_000)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_that_is_open_for_writing_is_left_to_be_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shift.yaml");
        fs::write(&path, "a").unwrap();
        let begun = Instant::now();
        let mut files = Files::new(std::slice::from_ref(&path), begun);
        let mut writer = fs::OpenOptions::new().append(true).open(&path).unwrap();
        writer.write_all(b"half").unwrap();
        assert!(!files.have_changed(after(begun, 1_000)));
        assert!(!files.have_changed(after(begun, 60_000)), "it has stayed the same for a minute");
        drop(writer);
        let _reader = fs::File::open(&path).unwrap();
        assert!(files.have_changed(after(begun, 61_000)));
    }

    #[test]
    fn what_is_static_holds_up_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shift.yaml");
        fs::write(&path, "a").unwrap();
        let begun = Instant::now();
        let mut files = Files::new(&[PathBuf::from("-"), path.clone()], begun);
        fs::write(&path, "ab").unwrap();
        assert!(!files.have_changed(begun));
        assert!(files.have_changed(after(begun, 1_000)));
    }
}
