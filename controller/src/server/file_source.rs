//! Polls the files of documents for changes: this works the same for editors, ConfigMaps and network file systems. A
//! changed file is read once it has been stable for a second and, as far as is known, no process has it open for
//! writing. Standard input and pipes are read once, at startup.

mod writers;

use crate::documents::is_static;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// How long a file must be unchanged before it is read.
const SETTLED: Duration = Duration::from_secs(1);

/// The files, and the version of each that was read.
pub(super) struct Files {
    watched: Vec<Watched>,
}

struct Watched {
    path: PathBuf,
    taken: Option<Stamp>,
    seen: Option<Stamp>,
    since: Instant,
    /// When writers of the file were last checked.
    asked: Option<Instant>,
    /// Whether it has been logged that the file is open for writing.
    is_told: bool,
}

/// The metadata that changes when a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    size: u64,
    /// Device and inode: a ConfigMap update and an atomic save replace the file.
    file: (u64, u64),
}

impl Files {
    /// Records the current state of the files; anything but a regular file never changes.
    pub(super) fn new(paths: &[PathBuf], now: Instant) -> Self {
        let watched = paths.iter().filter(|path| !is_static(path)).map(|path| {
            let stamp = stamp(path);
            Watched { path: path.clone(), taken: stamp, seen: stamp, since: now, asked: None, is_told: false }
        });
        Self { watched: watched.collect() }
    }

    /// The files that have changed since they were last read and are stable; this marks them as read.
    pub(super) fn changed(&mut self, now: Instant) -> Vec<PathBuf> {
        self.watched.iter_mut().filter_map(|file| file.is_taken(now).then(|| file.path.clone())).collect()
    }

    /// Whether a file is unchanged since it was marked as read: what was read since then is consistent.
    pub(super) fn is_as_taken(&self, path: &Path) -> bool {
        self.watched.iter().all(|file| file.path != path || stamp(&file.path) == file.taken)
    }
}

impl Watched {
    fn is_taken(&mut self, now: Instant) -> bool {
        let stamp = stamp(&self.path);
        if stamp != self.seen {
            (self.seen, self.since) = (stamp, now);
        }
        if self.seen == self.taken || now.duration_since(self.since) < SETTLED || self.is_being_written(now) {
            return false;
        }
        self.taken = self.seen;
        true
    }

    fn is_being_written(&mut self, now: Instant) -> bool {
        // This inspects all processes: once a second is enough.
        if self.asked.is_some_and(|asked| now.duration_since(asked) < SETTLED) {
            return true;
        }
        let writer = self.seen.and_then(|stamp| writers::of(stamp.file));
        self.asked = writer.map(|_| now);
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
        assert!(files.changed(after(begun, 5_000)).is_empty());
        fs::write(&path, "ab").unwrap();
        assert!(files.changed(after(begun, 6_000)).is_empty());
        fs::write(&path, "abc").unwrap();
        assert!(files.changed(after(begun, 7_000)).is_empty(), "changed again");
        assert!(files.changed(after(begun, 7_900)).is_empty());
        assert_eq!(files.changed(after(begun, 8_000)), [path.as_path()]);
        assert!(files.is_as_taken(&path));
        assert!(files.changed(after(begun, 9_500)).is_empty());
        fs::write(&path, "abcd").unwrap();
        assert!(!files.is_as_taken(&path));
        fs::remove_file(&path).unwrap();
        assert!(files.changed(after(begun, 10_000)).is_empty());
        assert_eq!(files.changed(after(begun, 11_000)), [path.as_path()]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_that_is_open_for_writing_is_left_to_be_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shift.yaml");
        fs::write(&path, "a").unwrap();
        let begun = Instant::now();
        let other = dir.path().join("other.yaml");
        fs::write(&other, "a").unwrap();
        let mut files = Files::new(&[path.clone(), other.clone()], begun);
        let mut writer = fs::OpenOptions::new().append(true).open(&path).unwrap();
        writer.write_all(b"half").unwrap();
        assert!(files.changed(after(begun, 1_000)).is_empty());
        assert!(files.changed(after(begun, 60_000)).is_empty(), "it has stayed the same for a minute");
        // It does not delay other files.
        fs::write(&other, "ab").unwrap();
        assert!(files.changed(after(begun, 60_100)).is_empty());
        assert_eq!(files.changed(after(begun, 61_100)), [other.as_path()]);
        drop(writer);
        let _reader = fs::File::open(&path).unwrap();
        assert_eq!(files.changed(after(begun, 63_000)), [path.as_path()]);
    }

    #[test]
    fn what_is_static_holds_up_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shift.yaml");
        fs::write(&path, "a").unwrap();
        let begun = Instant::now();
        let mut files = Files::new(&[PathBuf::from("-"), path.clone()], begun);
        fs::write(&path, "ab").unwrap();
        assert!(files.changed(begun).is_empty());
        assert_eq!(files.changed(after(begun, 1_000)), [path.as_path()]);
    }
}
