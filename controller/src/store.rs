//! The file store for the controller's persisted state: rollouts, the revision, readiness and counts, as two small
//! files in a directory that one controller at a time owns. Files are replaced as a whole, so a kill at any moment
//! leaves either the old file or the new one.

pub mod secret;
pub(crate) mod writer;

use crate::reconciler::state::{PersistedState, new_secret};
use crate::reconciler::{Analyses, CountState, WrittenCounts};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, io};

/// The format that this build writes; it also reads the four previous ones. (4: counts record how requests were chosen;
/// 5: the last reports of proxy runs are packed; 6: removed versions and deleted documents that still serve.)
const FORMAT: u64 = 6;
/// The largest size of the counts file in bytes.
pub const MAX_COUNTS: usize = 32 << 20;
const ROLLOUTS: &str = "rollouts.json";
const COUNTS: &str = "counts.json";
const LOCK: &str = "lock";

/// The directory of one controller's state. Clones share its lock.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    fit: Fit,
    /// Held until the process ends in any way.
    lock: Arc<Mutex<File>>,
}

/// Why the state cannot be used. Nothing is overwritten.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The given path is not a directory, and none can be created there.
    #[error(
        "--state-dir {}: {why}; expected a folder that this user may write to, or a path where it may make one, such as \
         /var/lib/tideshift", path.display()
    )]
    NoFolder {
        /// The path.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The directory or a file in it cannot be read or written.
    #[error("state in {}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// Another controller uses it.
    #[error("state in {}: in use by another tideshift serve; give this one a --state-dir of its own", .0.display())]
    InUse(PathBuf),
    /// This build did not write the file.
    #[error(
        "state in {}: {why}; it is left as it is. Move it away to start afresh ({lost})", path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What is lost without it.
        lost: &'static str,
    },
}

/// The envelope of the content.
#[derive(Deserialize)]
struct Envelope<'a> {
    /// SHA-256 of the serialized content and of the format.
    checksum: String,
    #[serde(borrow)]
    content: &'a RawValue,
}

/// The data was not written by this build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Corrupt(pub String);

/// Makes counts fit into the store's size limit.
#[derive(Debug, Clone)]
pub struct Fit {
    limit: usize,
    /// How many bytes the counts of single proxy runs may take, as determined last time.
    room: usize,
}

/// The data to persist does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes do not fit; at most {limit} do")]
pub struct TooLarge {
    /// The size of the data.
    pub bytes: usize,
    /// The limit.
    pub limit: usize,
}

impl Fit {
    /// For a limit in bytes.
    pub fn into(limit: usize) -> Self {
        Self { limit, room: usize::MAX }
    }

    /// The limit in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Packs counts. What does not fit is left out: the counts of single proxy runs, first of silent ones, then of
    /// those that report.
    ///
    /// # Errors
    ///
    /// If not even the totals fit.
    pub fn pack(
        &mut self,
        counted: &CountState,
        pack: impl Fn(&WrittenCounts<'_>) -> Vec<u8>,
    ) -> Result<Vec<u8>, TooLarge> {
        let written = counted.written(self.room);
        let whole = pack(&written);
        if whole.len() <= self.limit {
            // There may be room for more next time.
            self.room = self.room.saturating_add(self.room / 8);
            return Ok(whole);
        }
        let totals = pack(&counted.written(0));
        let Some(left) = self.limit.checked_sub(totals.len()) else {
            return Err(TooLarge { bytes: totals.len(), limit: self.limit });
        };
        // The part of the runs that fits next to the totals, if all of them pack equally well.
        let (left, all) = (left as f64, whole.len().saturating_sub(totals.len()).max(1) as f64);
        let mut part = (0.95 * left / all).min(0.95);
        while part > 0.02 {
            let room = (written.bytes_of_runs() as f64 * part) as usize;
            let packed = pack(&counted.written(room));
            if packed.len() <= self.limit {
                self.room = room + room / 8;
                return Ok(packed);
            }
            part *= 0.8;
        }
        Ok(totals)
    }
}

/// Serializes state for any store: `{"format": 6, "checksum": "...", "content": {...}}`.
pub fn encode<T: Serialize>(content: &T) -> Vec<u8> {
    let content = serde_json::to_string(content).unwrap_or_default();
    format!(r#"{{"format":{FORMAT},"checksum":"{}","content":{content}}}"#, checksum(FORMAT, &content)).into_bytes()
}

/// Parses serialized state.
///
/// # Errors
///
/// If it has neither this build's format nor one of the supported older ones, or if it is damaged.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Corrupt> {
    read(bytes).map_err(Corrupt)
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(default)]
        format: Option<u64>,
    }
    let said = |error: serde_json::Error| error.to_string();
    match serde_json::from_slice::<Versioned>(bytes).map_err(said)?.format {
        Some(format @ 3..=FORMAT) => {
            let Envelope { checksum: written, content } = serde_json::from_slice(bytes).map_err(said)?;
            if checksum(format, content.get()) != written {
                return Err("damaged: its content is not that of its checksum".to_owned());
            }
            serde_json::from_str(content.get()).map_err(said)
        }
        // Format 2 has the fields beside the format, without a checksum.
        Some(2) => serde_json::from_slice(bytes).map_err(said),
        Some(format) => Err(format!("format {format}, of another version of tideshift (this one has {FORMAT})")),
        None => Err("no format in it".to_owned()),
    }
}

/// The checksum of the content; since format 5 also of the format, which determines how the content is read.
fn checksum(format: u64, content: &str) -> String {
    let mut digest = Sha256::new();
    if format >= 5 {
        digest.update(format.to_le_bytes());
    }
    digest.update(content);
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn take_lock(dir: &Path) -> Result<File, StoreError> {
    let io = |error| StoreError::Io { path: dir.to_owned(), error };
    let lock = File::create(dir.join(LOCK)).map_err(io)?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => StoreError::InUse(dir.to_owned()),
        TryLockError::Error(error) => io(error),
    })?;
    Ok(lock)
}

impl Store {
    /// Whether the directory is still the locked one, and still contains the state.
    pub fn is_intact(&self) -> bool {
        self.is_locked() && Self::is_in(&self.dir)
    }

    fn is_locked(&self) -> bool {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        match (lock.metadata(), fs::metadata(self.dir.join(LOCK))) {
            (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }

    /// Creates and locks a removed or replaced directory again, unless another controller has done so.
    fn lock_again(&self) -> Result<(), StoreError> {
        if self.is_locked() {
            return Ok(());
        }
        fs::create_dir_all(&self.dir).map_err(|error| StoreError::Io { path: self.dir.clone(), error })?;
        let new = take_lock(&self.dir)?;
        tracing::warn!("state in {}: the folder was removed; it is made again", self.dir.display());
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Whether a directory contains a state, readable or not.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(ROLLOUTS).symlink_metadata().is_ok()
    }

    /// Opens the state in a directory, which is created if it does not exist.
    pub fn open(dir: &Path) -> Result<(Self, Option<PersistedState>, Option<CountState>), StoreError> {
        let io = |error| StoreError::Io { path: dir.to_owned(), error };
        fs::create_dir_all(dir).map_err(io)?;
        let lock = Arc::new(Mutex::new(take_lock(dir)?));
        let store = Self { dir: dir.to_owned(), fit: Fit::into(MAX_COUNTS), lock };
        let (mut kept, mut counted) = (store.read::<PersistedState>(ROLLOUTS)?, store.read::<CountState>(COUNTS)?);
        if let (None, Some(counted)) = (&kept, &mut counted) {
            // Rollouts are counted from 1 again: existing analyses of rollouts with the same numbers do not apply to
            // them.
            counted.judges = Analyses::default();
        }
        if let Some(kept) = kept.as_mut().filter(|kept| kept.session_secret.is_empty()) {
            kept.session_secret = new_secret().map_err(io)?;
        }
        Ok((store, kept, counted))
    }

    /// Replaces everything but the counts. Returns the size in bytes.
    pub fn keep(&mut self, kept: &PersistedState) -> Result<usize, StoreError> {
        self.write(ROLLOUTS, &encode(kept))
    }

    /// Replaces the counts. Returns the size in bytes.
    pub fn keep_counts(&mut self, counted: &CountState) -> Result<usize, StoreError> {
        let packed = self.fit.pack(counted, |written| encode(written));
        let path = self.dir.join(COUNTS);
        let packed = packed.map_err(|error| StoreError::Io { path, error: io::Error::other(error) })?;
        self.write(COUNTS, &packed)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let path = self.dir.join(name);
        let lost = match name {
            COUNTS => "what was counted and judged so far is lost",
            _ => "traffic then starts at the stable version",
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::Corrupt { path, why: format!("cannot be read: {error}"), lost }),
        };
        decode(&bytes).map(Some).map_err(|Corrupt(why)| StoreError::Corrupt { path, why, lost })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<usize, StoreError> {
        self.lock_again()?;
        let path = self.dir.join(name);
        let replace = || {
            let new = path.with_extension("new");
            // Readable by the owner only: the policy may contain secrets.
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(bytes)?;
            file.sync_data()?;
            fs::rename(&new, &path)?;
            // The new directory entry must be as durable as the file.
            File::open(&self.dir)?.sync_all()
        };
        replace().map_err(|error| StoreError::Io { path: path.clone(), error })?;
        Ok(bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn what_was_kept_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let kept = PersistedState { revision: u64::MAX, ..PersistedState::fresh("e".to_owned()).unwrap() };
        {
            let (mut store, nothing, counts) = Store::open(dir.path()).unwrap();
            assert_eq!((nothing, counts), (None, None));
            store.keep(&kept).unwrap();
            store.keep_counts(&CountState::default()).unwrap();
        }
        let (_store, found, counts) = Store::open(dir.path()).unwrap();
        assert_eq!((found, counts), (Some(kept), Some(CountState::default())));
    }

    /// Counts of this many proxy runs, each with this many services of two versions.
    fn counted(starts: u64, services: usize) -> CountState {
        let mut counted = CountState::default();
        for start in 0..starts {
            count(&mut counted, start, services, 1);
        }
        counted
    }

    /// One of them sends its nth report.
    fn count(counted: &mut CountState, start: u64, services: usize, sequence: u64) {
        let mut random = fastrand::Rng::with_seed(start);
        let mut version = |name: &str| {
            let ok = 900 * sequence + random.u64(..1_000);
            let durations: Vec<_> = (0..12).map(|_| random.u64(..200) + 10 * sequence).collect();
            let counts = serde_json::json!({"started": ok, "ok": ok, "error": 0, "clientError": 0, "cancelled": 0});
            let mut version = counts.clone();
            (version["name"], version["dealt"]) = (name.into(), counts);
            version["dealt"]["durations"] = durations.into();
            version
        };
        let mut service =
            |i| serde_json::json!({"name": format!("service-{i}"), "versions": [version("v1"), version("v2")]});
        let services: Vec<_> = (0..services).map(&mut service).collect();
        let report = serde_json::json!({"proxy": format!("proxy-{start}"), "start": format!("{:x}", (start + 1) << 40),
            "sequence": sequence, "revision": 1, "format": 2, "services": services});
        let report: tideshift_core::protocol::report::Report = serde_json::from_value(report).unwrap();
        let run = (report.proxy.clone(), report.start.clone());
        counted.ledger.take(&run, &report, |_, _| true, 1_000_000 + start);
    }

    /// State that another minor version wrote is read: with fields that a later one added, and without those that an earlier
    /// one did not have. `UPDATE_GOLDEN=1` writes the files; a new format gives them new names.
    #[test]
    fn state_of_another_minor_version_is_read() {
        let path = |name: &str| format!("{}/src/store/golden/{name}-v{FORMAT}.json", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let (epoch, services) = ("e".to_owned(), "[]".to_owned());
            let state = PersistedState { epoch, revision: 7, services, ..PersistedState::default() };
            fs::write(path("rollouts"), encode(&state)).unwrap();
            fs::write(path("counts"), encode(&counted(2, 1))).unwrap();
        }
        let content = |name: &str| {
            let bytes = fs::read(path(name)).unwrap();
            (serde_json::from_slice::<Value>(&bytes).unwrap()["content"].clone(), bytes)
        };
        let ((rollouts, state), (counts, counted_then)) = (content("rollouts"), content("counts"));
        let (state, counted_then): (PersistedState, CountState) =
            (decode(&state).unwrap(), decode(&counted_then).unwrap());
        let total = counted_then.ledger.total("service-0", "v1");
        assert_eq!((state.revision, total, total.ok > 0), (7, counted(2, 1).ledger.total("service-0", "v1"), true));
        let with = |content: &Value, place: &str| {
            let mut content = content.clone();
            content.pointer_mut(place).unwrap()["fromTheFuture"] = serde_json::json!([1]);
            encode(&content)
        };
        assert_eq!(decode::<PersistedState>(&with(&rollouts, "")).unwrap(), state);
        for place in ["", "/totals/0/1", "/totals/0/1/dealt"] {
            assert_eq!(decode::<CountState>(&with(&counts, place)).unwrap(), counted_then, "{place}");
        }
        // An outcome that the build before did not count is 0.
        let mut less = counts;
        less.pointer_mut("/totals/0/1/dealt").unwrap().as_object_mut().unwrap().remove("cancelled").unwrap();
        assert_eq!(decode::<CountState>(&encode(&less)).unwrap(), counted_then);
    }

    fn packed(written: &WrittenCounts<'_>) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&encode(written)).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn counts_of_any_number_of_starts_fit_where_a_secret_has_room() {
        const LIMIT: usize = 1_000_000;
        for (starts, services, whole) in [(8_000, 1, true), (360, 20, true), (500, 50, false)] {
            let mut counted = counted(starts, services);
            let mut fit = Fit::into(LIMIT);
            let bytes = fit.pack(&counted, packed).unwrap();
            assert!(
                bytes.len() <= LIMIT && (whole || bytes.len() > LIMIT / 2),
                "{starts}, {services}: {}",
                bytes.len()
            );
            let mut text = String::new();
            io::Read::read_to_string(&mut flate2::read::GzDecoder::new(bytes.as_slice()), &mut text).unwrap();
            let mut found: CountState = decode(text.as_bytes()).unwrap();
            let total = |of: &CountState| of.ledger.total("service-0", "v2");
            assert_eq!(total(&found), total(&counted));
            if !whole {
                // Each sends two more reports: the first one is a baseline where the run was left out.
                (0..starts).for_each(|start| count(&mut found, start, services, 2));
                let between = total(&found);
                (0..starts).for_each(|start| count(&mut found, start, services, 3));
                assert_eq!(total(&found).since(&between).ok, 900 * starts);
                assert!(total(&found).ok <= total(&counted).ok + 2 * 900 * starts, "nothing twice");
                continue;
            }
            for start in 0..starts {
                count(&mut found, start, services, 2);
                count(&mut counted, start, services, 2);
            }
            assert_eq!(total(&found), total(&counted), "{starts} starts of {services} services");
        }
    }

    #[test]
    fn totals_that_do_not_fit_are_said_so() {
        let mut fit = Fit::into(1_000);
        let error = fit.pack(&counted(1, 100), packed).unwrap_err();
        assert!(error.bytes > 1_000 && error.to_string().ends_with("at most 1000 do"), "{error}");
    }

    #[test]
    fn a_folder_that_is_removed_is_made_again_and_belongs_to_one_controller() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("state");
        let kept = PersistedState::fresh("e".to_owned()).unwrap();
        let (mut store, ..) = Store::open(&dir).unwrap();
        store.keep(&kept).unwrap();
        assert!(store.is_intact());
        fs::remove_dir_all(&dir).unwrap();
        assert!(!store.is_intact());
        store.keep(&kept).unwrap();
        assert!(store.is_intact() && matches!(Store::open(&dir), Err(StoreError::InUse(_))));
        // Another controller is faster.
        fs::remove_dir_all(&dir).unwrap();
        let (mut other, found, _) = Store::open(&dir).unwrap();
        assert_eq!(found, None);
        other.keep(&PersistedState { revision: 7, ..kept.clone() }).unwrap();
        assert!(matches!(store.keep(&kept), Err(StoreError::InUse(_))), "nothing of the other's is overwritten");
        assert!(matches!(store.keep_counts(&CountState::default()), Err(StoreError::InUse(_))));
        drop(other);
        store.keep(&kept).unwrap();
    }

    #[test]
    fn one_controller_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path()).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StoreError::InUse(_))));
    }

    #[test]
    fn a_file_of_somebody_else_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rollouts.json");
        for (text, why) in [
            ("{\"format\": 7}", "format 7, of another version"),
            ("{\"format\": 5, \"chec", "EOF while parsing"),
            ("{\"format\": 4}", "missing field `checksum`"),
            ("{\"format\": 3}", "missing field `checksum`"),
            ("{\"format\": 4, \"checksum\": \"\", \"content\": {}}", "damaged"),
            ("{\"format\": 2}", "missing field `epoch`"),
            ("[]", "no format"),
        ] {
            fs::write(&path, text).unwrap();
            let error = Store::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("rollouts.json"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn no_bit_of_it_may_change_unnoticed() {
        let kept = PersistedState { revision: 7, ..PersistedState::fresh("e".to_owned()).unwrap() };
        let written = encode(&kept);
        assert_eq!(decode::<PersistedState>(&written), Ok(kept.clone()));
        for bit in 0..written.len() * 8 {
            let mut flipped = written.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // Changes that keep the meaning are harmless, but are refused as well, such as a hex digit in upper case.
            assert!(decode::<PersistedState>(&flipped).is_err(), "bit {bit}: {}", String::from_utf8_lossy(&flipped));
        }
    }

    #[test]
    fn the_formats_before_are_still_read() {
        let kept = PersistedState { revision: 7, ..PersistedState::fresh("e".to_owned()).unwrap() };
        let mut before = serde_json::to_value(&kept).unwrap();
        before["format"] = 2.into();
        assert_eq!(decode::<PersistedState>(before.to_string().as_bytes()), Ok(kept.clone()));
        let content = serde_json::to_string(&kept).unwrap();
        for format in 3..=FORMAT {
            let checksum = checksum(format, &content);
            let text = format!(r#"{{"format":{format},"checksum":"{checksum}","content":{content}}}"#);
            assert_eq!(decode::<PersistedState>(text.as_bytes()), Ok(kept.clone()), "format {format}");
        }
    }
}
