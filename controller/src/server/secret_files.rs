//! The secrets of documents outside clusters: `DIR/NAME/KEY` below `--secrets-dir`, like a mounted Secret. Secrets are
//! read when a document that refers to them comes into force, and again when they change.

use crate::net::io_reason;
use crate::secret_values;
use crate::secret_values::{MAX_BYTES, SecretValues};
use crate::server::file_source::Files;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use std::{fs, io};
use tideshift_core::shift::{SecretKeyRef, TrafficShift};

/// The secret files that documents refer to.
pub(super) struct SecretFiles {
    dir: Option<PathBuf>,
    shifts: Vec<TrafficShift>,
    watched: Files,
    read: BTreeMap<SecretKeyRef, Result<Vec<u8>, String>>,
}

impl SecretFiles {
    /// Without a directory no secret can be read.
    pub(super) fn new(dir: Option<PathBuf>) -> Self {
        let watched = Files::new(&[], Instant::now());
        Self { dir, shifts: Vec::new(), watched, read: BTreeMap::new() }
    }

    /// Sets the documents in force. Returns the secrets that they refer to.
    pub(super) fn set(&mut self, shifts: &[TrafficShift], now: Instant) -> Arc<SecretValues> {
        let has_any = |shift: &&TrafficShift| !secret_values::references(shift).is_empty();
        self.shifts = shifts.iter().filter(has_any).cloned().collect();
        let keys = self.shifts.iter().flat_map(secret_values::references).map(|reference| reference.key.clone());
        let keys: BTreeSet<SecretKeyRef> = keys.collect();
        if !self.read.keys().eq(&keys) {
            // Stat the files before reading them, as for documents.
            let paths: Vec<PathBuf> = keys.iter().filter_map(|key| self.path(key)).collect();
            self.watched = Files::new(&paths, now);
            self.read = keys.into_iter().map(|key| (key.clone(), self.read_one(&key))).collect();
        }
        self.values()
    }

    /// The secrets, if any file has changed.
    pub(super) fn changed(&mut self, now: Instant) -> Option<Arc<SecretValues>> {
        let changed: BTreeSet<PathBuf> = self.watched.changed(now).into_iter().collect();
        let keys = self.read.keys().filter(|key| self.path(key).is_some_and(|path| changed.contains(&path)));
        let keys: Vec<SecretKeyRef> = keys.cloned().collect();
        for key in &keys {
            let read = self.read_one(key);
            tracing::info!("secret {key} has changed");
            self.read.insert(key.clone(), read);
        }
        (!keys.is_empty()).then(|| self.values())
    }

    fn values(&self) -> Arc<SecretValues> {
        let look_up = |_: &str, of: secret_values::SecretUse, key: &SecretKeyRef| {
            let bytes = self.read.get(key).cloned().unwrap_or_else(|| Err("it was not read".to_owned()))?;
            of.read(&bytes).map_err(|why| format!("{}: {why}", self.shown(key)))
        };
        Arc::new(SecretValues::of(&self.shifts, look_up))
    }

    /// Names and keys contain no slash and are not `..`, so that the path stays within the directory.
    fn path(&self, key: &SecretKeyRef) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(&key.name).join(&key.key))
    }

    fn shown(&self, key: &SecretKeyRef) -> String {
        self.path(key).map_or_else(|| key.to_string(), |path| path.display().to_string())
    }

    fn read_one(&self, key: &SecretKeyRef) -> Result<Vec<u8>, String> {
        let Some(path) = self.path(key) else {
            return Err(format!("{key} cannot be read: this controller was started without --secrets-dir"));
        };
        read(&path).map_err(|error| format!("{} cannot be read: {}", path.display(), io_reason(&error)))
    }
}

/// Reads one byte more than the limit if the file exceeds it.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe would block the loop.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    fn shift(key: &str) -> TrafficShift {
        let session = json!({"type": "Cookie", "name": "c", "secretRef": {"name": "shop", "key": key}});
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "shop"},
            "spec": {"versions": [{"name": "v1"}], "stable": "v1", "session": session},
        });
        TrafficShift::read(&document).unwrap()
    }

    fn secret_of(values: &SecretValues, shift: &TrafficShift) -> Result<String, Vec<String>> {
        let secret = values.of_session(shift, &shift.services[0]);
        secret.map(|secret| secret.expose().to_owned()).ok_or_else(|| values.unresolved(shift))
    }

    #[cfg(unix)]
    #[test]
    fn a_mounted_secret_is_read_and_followed_as_kubelet_changes_it() {
        let dir = tempfile::tempdir().unwrap();
        let mounted = dir.path().join("shop");
        for (folder, secret) in [("..one", "first\n"), ("..two", "second\n")] {
            fs::create_dir_all(mounted.join(folder)).unwrap();
            fs::write(mounted.join(folder).join("session"), secret).unwrap();
        }
        std::os::unix::fs::symlink("..one", mounted.join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/session", mounted.join("session")).unwrap();
        let (mut files, shift, begun) =
            (SecretFiles::new(Some(dir.path().to_owned())), shift("session"), Instant::now());
        let values = files.set(std::slice::from_ref(&shift), begun);
        assert_eq!(secret_of(&values, &shift).unwrap(), "first");
        assert!(files.changed(begun + Duration::from_secs(5)).is_none());

        std::os::unix::fs::symlink("..two", mounted.join("..data_tmp")).unwrap();
        fs::rename(mounted.join("..data_tmp"), mounted.join("..data")).unwrap();
        assert!(files.changed(begun + Duration::from_secs(6)).is_none(), "not yet settled");
        let values = files.changed(begun + Duration::from_secs(8)).unwrap();
        assert_eq!(secret_of(&values, &shift).unwrap(), "second");
        // A deleted file is missing, and a new one is read.
        fs::remove_file(mounted.join("session")).unwrap();
        assert!(files.changed(begun + Duration::from_secs(9)).is_none());
        let values = files.changed(begun + Duration::from_secs(11)).unwrap();
        let lines = secret_of(&values, &shift).unwrap_err();
        assert!(lines[0].starts_with("spec.session.secretRef: ") && lines[0].contains("no such file"), "{lines:?}");
        fs::write(mounted.join("session"), "third").unwrap();
        assert!(files.changed(begun + Duration::from_secs(12)).is_none());
        let values = files.changed(begun + Duration::from_secs(14)).unwrap();
        assert_eq!(secret_of(&values, &shift).unwrap(), "third");
    }

    #[test]
    fn what_is_no_file_or_too_long_is_refused_without_being_shown() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("shop");
        fs::create_dir_all(folder.join("folder")).unwrap();
        fs::write(folder.join("long"), "hush".repeat(1_000_000)).unwrap();
        fs::write(folder.join("bytes"), b"hush\xff").unwrap();
        let mut files = SecretFiles::new(Some(dir.path().to_owned()));
        for (key, why) in [("folder", "it is not a file"), ("long", "longer than 1,024 bytes"), ("bytes", "not UTF-8")]
        {
            let shift = shift(key);
            let lines = secret_of(&files.set(std::slice::from_ref(&shift), Instant::now()), &shift).unwrap_err();
            assert!(lines[0].contains(why) && !lines[0].contains("hush"), "{lines:?}");
        }
        let shift = shift("session");
        let mut nowhere = SecretFiles::new(None);
        let lines = secret_of(&nowhere.set(std::slice::from_ref(&shift), Instant::now()), &shift).unwrap_err();
        assert!(lines[0].contains("without --secrets-dir"), "{lines:?}");
    }
}
