//! What survives a restart of the controller: rollouts, the revision, readiness and counts, as two small files in a
//! directory that one controller at a time has. Files are replaced as a whole, so a kill at any moment leaves the old
//! or the new one.

use crate::control::{Applied, Counted, Idle, Judges, Young};
use crate::readiness::RememberedReadiness;
use crate::rollout::{Millis, Rollout, Transition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tideshift_core::policy::Policy;

/// The format that this build writes; it reads the two before, too. (4: counts tell how requests were chosen.)
const FORMAT: u64 = 4;
const ROLLOUTS: &str = "rollouts.json";
const COUNTS: &str = "counts.json";

/// Everything but the counts, which change all the time and are kept apart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// When this was decided.
    #[serde(default)]
    pub time: Millis,
    /// What the system's clock said then; 0: not known.
    #[serde(default)]
    pub wall: Millis,
    /// Names this state; a new one is made when the state is lost, so that proxies do not compare its revisions.
    pub epoch: String,
    /// The revision of the last policy.
    pub revision: u64,
    /// The services of the last policy as JSON, to tell whether they have changed.
    pub services: String,
    /// Where each service's rollout stands.
    pub rollouts: BTreeMap<String, Rollout>,
    /// What has happened to each rollout, the newest last.
    pub history: BTreeMap<String, VecDeque<Transition>>,
    /// The documents that came through the API, by name.
    pub applied: BTreeMap<String, Applied>,
    /// The versions that are given nothing.
    pub idle: Idle,
    /// The endpoints that were ready.
    pub ready: RememberedReadiness,
    /// Those of them that have become so of late.
    #[serde(default)]
    pub young: Young,
    /// Signs the cookies of sessions whose document brings no secret of its own.
    #[serde(default)]
    pub session_secret: String,
}

impl Kept {
    /// The last policy, which is safe to give to proxies; `None` before the first.
    pub fn policy(&self) -> Option<Policy> {
        let services: Value = serde_json::from_str(&self.services).ok()?;
        Policy::read(&serde_json::json!({ "revision": self.revision, "services": services })).ok()
    }

    /// A state that begins now; `epoch` names it.
    ///
    /// # Errors
    ///
    /// If the system has no random numbers to give.
    pub fn fresh(epoch: String) -> io::Result<Self> {
        Ok(Self { epoch, session_secret: new_secret()?, ..Self::default() })
    }
}

/// 128 random bits in hex.
fn new_secret() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The directory of one controller's state.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Held until the process ends, whichever way.
    _lock: File,
}

/// Why the state cannot be used. Nothing is overwritten.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory or a file in it cannot be read or written.
    #[error("state in {}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Another controller has it.
    #[error("state in {}: in use by another tideshift serve; give this one a --state-dir of its own", .0.display())]
    InUse(PathBuf),
    /// The file is not one that this build wrote.
    #[error(
        "state in {}: {why}; it is left as it is. Move it away to start afresh ({lost})", path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What that costs.
        lost: &'static str,
    },
}

/// What is around the content.
#[derive(Deserialize)]
struct Envelope<'a> {
    /// SHA-256 of the content as it is written.
    checksum: String,
    #[serde(borrow)]
    content: &'a RawValue,
}

/// What was written is not something that this build wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(pub String);

/// State as it is written, wherever that is: `{"format": 4, "checksum": "...", "content": {...}}`.
pub fn encode<T: Serialize>(content: &T) -> Vec<u8> {
    let content = serde_json::to_string(content).unwrap_or_default();
    format!(r#"{{"format":{FORMAT},"checksum":"{}","content":{content}}}"#, checksum(&content)).into_bytes()
}

/// State from what was written.
///
/// # Errors
///
/// If it is not of this build's format or the two before, or not what was written.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    read(bytes).map_err(Unreadable)
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(default)]
        format: Option<u64>,
    }
    let said = |error: serde_json::Error| error.to_string();
    match serde_json::from_slice::<Versioned>(bytes).map_err(said)?.format {
        Some(3..=FORMAT) => {
            let Envelope { checksum: written, content } = serde_json::from_slice(bytes).map_err(said)?;
            if checksum(content.get()) != written {
                return Err("damaged: its content is not that of its checksum".to_owned());
            }
            serde_json::from_str(content.get()).map_err(said)
        }
        // Its fields were beside the format, without a checksum.
        Some(2) => serde_json::from_slice(bytes).map_err(said),
        Some(format) => Err(format!("format {format}, of another version of tideshift (this one has {FORMAT})")),
        None => Err("no format in it".to_owned()),
    }
}

fn checksum(content: &str) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Store {
    /// Whether there is a state in a directory, readable or not.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(ROLLOUTS).symlink_metadata().is_ok()
    }

    /// Opens the state in a directory, which is made if it is not there.
    pub fn open(dir: &Path) -> Result<(Self, Option<Kept>, Option<Counted>), StoreError> {
        let io = |error| StoreError::Io { path: dir.to_owned(), error };
        fs::create_dir_all(dir).map_err(io)?;
        let lock = File::create(dir.join("lock")).map_err(io)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StoreError::InUse(dir.to_owned()),
            TryLockError::Error(error) => io(error),
        })?;
        let store = Self { dir: dir.to_owned(), _lock: lock };
        let (mut kept, mut counted) = (store.read::<Kept>(ROLLOUTS)?, store.read::<Counted>(COUNTS)?);
        if let (None, Some(counted)) = (&kept, &mut counted) {
            // Rollouts are counted from 1 anew: what was found out about others of the same number is not theirs.
            counted.judges = Judges::default();
        }
        if let Some(kept) = kept.as_mut().filter(|kept| kept.session_secret.is_empty()) {
            kept.session_secret = new_secret().map_err(io)?;
        }
        Ok((store, kept, counted))
    }

    /// Replaces everything but the counts.
    pub fn keep(&self, kept: &Kept) -> Result<(), StoreError> {
        self.write(ROLLOUTS, kept)
    }

    /// Replaces the counts.
    pub fn keep_counts(&self, counted: &Counted) -> Result<(), StoreError> {
        self.write(COUNTS, counted)
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
            Err(error) => return Err(StoreError::Unreadable { path, why: format!("cannot be read: {error}"), lost }),
        };
        decode(&bytes).map(Some).map_err(|Unreadable(why)| StoreError::Unreadable { path, why, lost })
    }

    fn write<T: Serialize>(&self, name: &str, content: &T) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        let replace = || {
            let new = path.with_extension("new");
            // Nobody else's business: the policy may hold secrets.
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(&encode(content))?;
            file.sync_data()?;
            fs::rename(&new, &path)?;
            // The new name must be as safe as what it names.
            File::open(&self.dir)?.sync_all()
        };
        replace().map_err(|error| StoreError::Io { path: path.clone(), error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept { revision: u64::MAX, ..Kept::fresh("e".to_owned()).unwrap() };
        {
            let (store, nothing, counts) = Store::open(dir.path()).unwrap();
            assert_eq!((nothing, counts), (None, None));
            store.keep(&kept).unwrap();
            store.keep_counts(&Counted::default()).unwrap();
        }
        let (_store, found, counts) = Store::open(dir.path()).unwrap();
        assert_eq!((found, counts), (Some(kept), Some(Counted::default())));
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
            ("{\"format\": 5}", "format 5, of another version"),
            ("{\"format\": 4, \"chec", "EOF while parsing"),
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
        let kept = Kept { revision: 7, ..Kept::fresh("e".to_owned()).unwrap() };
        let written = encode(&kept);
        assert_eq!(decode::<Kept>(&written), Ok(kept.clone()));
        for bit in 0..written.len() * 8 {
            let mut flipped = written.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // What means the same all the same does no harm: a hex digit in upper case is refused, too.
            assert!(decode::<Kept>(&flipped).is_err(), "bit {bit}: {}", String::from_utf8_lossy(&flipped));
        }
    }

    #[test]
    fn the_format_before_is_still_read() {
        let kept = Kept { revision: 7, ..Kept::fresh("e".to_owned()).unwrap() };
        let mut before = serde_json::to_value(&kept).unwrap();
        before["format"] = 2.into();
        assert_eq!(decode::<Kept>(before.to_string().as_bytes()), Ok(kept));
    }
}
