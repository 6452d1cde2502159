//! The documents' files, watched for changes by looking: it works the same for editors, ConfigMaps and pipes.

use std::fs;
use std::path::PathBuf;

/// Files and what was in them.
pub(super) struct Files {
    paths: Vec<PathBuf>,
    taken: Vec<Option<Vec<u8>>>,
    seen: Vec<Option<Vec<u8>>>,
}

impl Files {
    /// The files as they are now. Standard input does not change.
    pub(super) fn new(paths: &[PathBuf]) -> Self {
        let paths: Vec<PathBuf> = paths.to_vec();
        let taken = read(&paths);
        Self { seen: taken.clone(), taken, paths }
    }

    /// Whether they have changed since the last time that this was true, and have stayed the same since the last
    /// look: a file that is being written is left to be finished.
    pub(super) fn have_changed(&mut self) -> bool {
        if self.paths.iter().any(|path| path.as_os_str() == "-") {
            return false;
        }
        let now = read(&self.paths);
        let changed = now == self.seen && now != self.taken;
        self.seen = now;
        if changed {
            self.taken.clone_from(&self.seen);
        }
        changed
    }
}

fn read(paths: &[PathBuf]) -> Vec<Option<Vec<u8>>> {
    paths.iter().map(|path| if path.as_os_str() == "-" { None } else { fs::read(path).ok() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_it_has_settled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shift.yaml");
        fs::write(&path, "a").unwrap();
        let mut files = Files::new(std::slice::from_ref(&path));
        assert!(!files.have_changed());
        fs::write(&path, "ab").unwrap();
        assert!(!files.have_changed());
        fs::write(&path, "abc").unwrap();
        assert!(!files.have_changed());
        assert!(files.have_changed());
        assert!(!files.have_changed());
        fs::remove_file(&path).unwrap();
        assert!(!files.have_changed());
        assert!(files.have_changed());
    }
}
