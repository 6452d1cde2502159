//! The Secret store: state that survives the end of a replica, in two Secrets of the controller's namespace. It uses
//! Secrets because policies contain session secrets. Each write names the version that it replaces. A replica that has
//! been superseded without noticing (it was stalled, or its clock stood still) therefore cannot write any more, and
//! finds out by the failed write.

use crate::kubernetes::reason;
use crate::reconciler::state::PersistedState;
use crate::reconciler::{Analyses, CountState};
use crate::store::{Corrupt, Fit, TooLarge, decode, encode};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{Read, Write};
use std::time::Duration;
use tokio::time::timeout;

/// The key of the data.
const KEY: &str = "state.json.gz";
/// The annotation with the last writer.
const WRITER: &str = "tideshift.dev/writer";
/// The largest size of the state in a Secret: the API server's limit is 1 MiB for all of its data.
pub const MAX_BYTES: usize = 1_000_000;
/// The largest unpacked size in bytes.
const MAX_UNPACKED: u64 = 256 << 20;
/// The numbers of transitions to keep of each rollout, tried in this order until they fit.
const HISTORIES: [usize; 4] = [200, 50, 10, 0];
/// The timeout of a write.
const PATIENCE: Duration = Duration::from_secs(2);

/// The Secret for everything but the counts, as this replica last wrote it.
#[derive(Debug)]
pub struct SecretStore {
    state: SecretSlot,
}

/// The Secret for the counts.
#[derive(Debug)]
pub struct CountsSecretStore {
    counts: SecretSlot,
    fit: Fit,
}

/// One Secret.
#[derive(Debug)]
struct SecretSlot {
    api: Api<Secret>,
    name: String,
    writer: String,
    /// The version that the next write replaces.
    version: Option<String>,
}

/// Why state cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SecretStoreError {
    /// Another replica has written since.
    #[error("another replica has taken over")]
    LostLeadership,
    /// The content was not written by this build.
    #[error(
        "Secret {0}: {1}; it is left as it is. Delete it to start afresh (traffic then starts at the stable versions)"
    )]
    Corrupt(String, Corrupt),
    /// The API server refuses the request.
    #[error("Secret {0}: {1}")]
    Refused(String, String),
    /// The API server does not answer, or the Secret has changed meanwhile.
    #[error("Secret {0}: {1}")]
    Unknown(String, String),
    /// The content is too large for a Secret.
    #[error("Secret {0}: {1}")]
    TooLarge(String, TooLarge),
}

/// The name of the Secret that holds everything but the counts.
pub fn state_name(prefix: &str) -> String {
    format!("{prefix}-state")
}

impl SecretStore {
    /// Takes over from the last writer: after this, no other replica can write.
    ///
    /// # Errors
    ///
    /// If the Secrets cannot be read or written.
    pub async fn take(
        client: Client,
        namespace: &str,
        prefix: &str,
        identity: &str,
    ) -> Result<((Self, CountsSecretStore), Option<PersistedState>, Option<CountState>), SecretStoreError> {
        let slot = |name: String| SecretSlot {
            api: Api::namespaced(client.clone(), namespace),
            name,
            writer: format!("{identity}/{:016x}", fastrand::u64(..)),
            version: None,
        };
        let (mut state, mut counts) = (slot(state_name(prefix)), slot(format!("{prefix}-counts")));
        // The state is taken last: a replica that has it has the counts as well.
        let counted: Option<CountState> = counts.take().await?;
        let kept: Option<PersistedState> = state.take().await?;
        let counted = match (&kept, counted) {
            // Rollouts are counted from 1 again: existing analyses of rollouts with the same numbers do not apply to
            // them.
            (None, Some(counted)) => Some(CountState { judges: Analyses::default(), ..counted }),
            (_, counted) => counted,
        };
        let counts = CountsSecretStore { counts, fit: Fit::into(MAX_BYTES) };
        Ok(((Self { state }, counts), kept, counted))
    }

    /// Replaces everything but the counts. Returns the size in bytes.
    ///
    /// # Errors
    ///
    /// If it is not certain that the state was written.
    pub async fn keep(&mut self, kept: &PersistedState) -> Result<usize, SecretStoreError> {
        let packed = pack_state(kept).map_err(|error| SecretStoreError::TooLarge(self.state.name.clone(), error))?;
        let bytes = packed.len();
        self.state.write(packed).await?;
        Ok(bytes)
    }
}

impl CountsSecretStore {
    /// Replaces the counts, as far as they fit. Returns the size in bytes.
    ///
    /// # Errors
    ///
    /// If it is not certain that the counts were written.
    pub async fn keep(&mut self, counted: &CountState) -> Result<usize, SecretStoreError> {
        let packed = self.fit.pack(counted, |written| pack(written));
        let packed = packed.map_err(|error| SecretStoreError::TooLarge(self.counts.name.clone(), error))?;
        let bytes = packed.len();
        self.counts.write(packed).await?;
        Ok(bytes)
    }
}

impl SecretSlot {
    /// Reads the content and writes it again in this replica's name.
    async fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, SecretStoreError> {
        let secret = self.within(self.api.get_opt(&self.name)).await?;
        let content =
            secret.as_ref().map(|secret| unpack(secret).map_err(|why| self.unreadable(why))).transpose()?.flatten();
        let data = secret.as_ref().and_then(|secret| secret.data.clone()).and_then(|mut data| data.remove(KEY));
        self.version = secret.and_then(|secret| secret.resource_version());
        self.write(data.map(|data| data.0).unwrap_or_default()).await?;
        Ok(content)
    }

    async fn write(&mut self, packed: Vec<u8>) -> Result<(), SecretStoreError> {
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: self.version.clone(),
                labels: Some([("app.kubernetes.io/managed-by".to_owned(), "tideshift".to_owned())].into()),
                annotations: Some([(WRITER.to_owned(), self.writer.clone())].into()),
                ..ObjectMeta::default()
            },
            data: Some([(KEY.to_owned(), ByteString(packed))].into()),
            ..Secret::default()
        };
        let parameters = PostParams::default();
        let written = match self.version {
            None => self.within(self.api.create(&parameters, &secret)).await,
            Some(_) => self.within(self.api.replace(&self.name, &parameters, &secret)).await,
        };
        match written {
            Ok(written) => {
                self.version = written.resource_version();
                Ok(())
            }
            Err(Refusal::Conflict) => {
                // This may be the replica's own write, whose response was lost.
                let now = self.within(self.api.get_opt(&self.name)).await?;
                let writer = now.as_ref().and_then(|secret| secret.annotations().get(WRITER));
                if now.is_some() && writer != Some(&self.writer) {
                    return Err(SecretStoreError::LostLeadership);
                }
                self.version = now.and_then(|secret| secret.resource_version());
                Err(SecretStoreError::Unknown(self.name.clone(), "it has changed meanwhile".to_owned()))
            }
            Err(Refusal::Gone) => {
                // The Secret was deleted. The next write creates it again, unless another replica is faster.
                self.version = None;
                Err(SecretStoreError::Unknown(self.name.clone(), "it is gone, and will be written again".to_owned()))
            }
            Err(refusal) => Err(refusal.into()),
        }
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Refusal> {
        match timeout(PATIENCE, call).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Err(Refusal::Conflict),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 && self.version.is_some() => Err(Refusal::Gone),
            Ok(Err(error @ kube::Error::Api(_))) => Err(Refusal::Answered(self.name.clone(), reason(&error))),
            Ok(Err(error)) => Err(Refusal::Other(self.name.clone(), reason(&error))),
            Err(_) => Err(Refusal::Other(self.name.clone(), format!("no answer within {} s", PATIENCE.as_secs()))),
        }
    }

    fn unreadable(&self, why: Corrupt) -> SecretStoreError {
        SecretStoreError::Corrupt(self.name.clone(), why)
    }
}

/// Why an API call failed.
enum Refusal {
    Conflict,
    Gone,
    Answered(String, String),
    Other(String, String),
}

impl From<Refusal> for SecretStoreError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Conflict | Refusal::Gone => Self::LostLeadership,
            Refusal::Answered(name, why) => Self::Refused(name, why),
            Refusal::Other(name, why) => Self::Unknown(name, why),
        }
    }
}

/// Packs everything but the counts, with as much of the history as fits.
fn pack_state(kept: &PersistedState) -> Result<Vec<u8>, TooLarge> {
    let mut bytes = 0;
    for histories in HISTORIES {
        let mut kept = kept.clone();
        for history in kept.history.values_mut() {
            let too_many = history.len().saturating_sub(histories);
            history.drain(..too_many);
        }
        let packed = pack(&kept);
        if packed.len() <= MAX_BYTES {
            return Ok(packed);
        }
        bytes = packed.len();
    }
    Err(TooLarge { bytes, limit: MAX_BYTES })
}

fn pack<T: Serialize>(content: &T) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing to memory does not fail.
    let _ = encoder.write_all(&encode(content));
    encoder.finish().unwrap_or_default()
}

/// The content of a Secret; `None` if it has none yet.
pub fn unpack<T: DeserializeOwned>(secret: &Secret) -> Result<Option<T>, Corrupt> {
    let packed =
        secret.data.as_ref().and_then(|data| data.get(KEY)).map(|bytes| bytes.0.as_slice()).unwrap_or_default();
    if packed.is_empty() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    let read = GzDecoder::new(packed).take(MAX_UNPACKED).read_to_end(&mut bytes);
    read.map_err(|error| Corrupt(format!("{KEY}: {error}")))?;
    decode(&bytes).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let kept = PersistedState { revision: u64::MAX, ..PersistedState::fresh("e".to_owned()).unwrap() };
        let secret =
            |packed: Vec<u8>| Secret { data: Some([(KEY.to_owned(), ByteString(packed))].into()), ..Secret::default() };
        assert_eq!(unpack::<PersistedState>(&secret(pack(&kept))).unwrap(), Some(kept));
        assert_eq!(unpack::<PersistedState>(&secret(Vec::new())).unwrap(), None);
        let error = unpack::<PersistedState>(&secret(b"nonsense".to_vec())).unwrap_err();
        assert!(error.to_string().starts_with("state.json.gz: "), "{error}");
    }
}
