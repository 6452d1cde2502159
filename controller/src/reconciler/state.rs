//! The reconciler's persisted state: what a store keeps across restarts.

use crate::clock::Millis;
use crate::readiness::RememberedReadiness;
use crate::reconciler::{ApiOverride, DrainTracker, Leaving, Rotations, Young};
use crate::rollout::{Rollout, Transition};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use tideshift_core::protocol::policy::Policy;

/// Everything but the counts, which change all the time and are kept separately.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PersistedState {
    /// When this state was decided.
    #[serde(default)]
    pub time: Millis,
    /// The system clock at that time; 0: not known.
    #[serde(default)]
    pub wall: Millis,
    /// The name of this state. A new name is made when the state is lost, so that proxies do not compare its revisions.
    pub epoch: String,
    /// The revision of the last policy.
    pub revision: u64,
    /// The services of the last policy as JSON, to detect changes.
    pub services: String,
    /// The rollout of each document.
    pub rollouts: BTreeMap<String, Rollout>,
    /// The transitions of each rollout, the newest last.
    pub history: BTreeMap<String, VecDeque<Transition>>,
    /// The documents from the API, by name.
    pub applied: BTreeMap<String, ApiOverride>,
    /// The versions that are given no traffic.
    pub idle: DrainTracker,
    /// The removed versions and deleted documents that still serve.
    #[serde(default)]
    pub leaving: Leaving,
    /// The endpoints that were ready.
    pub ready: RememberedReadiness,
    /// The endpoints among them that became ready recently.
    #[serde(default)]
    pub young: Young,
    /// Signs session cookies if the document does not set a secret.
    #[serde(default)]
    pub session_secret: String,
    /// Previous session secrets that are still valid.
    #[serde(default, skip_serializing_if = "Rotations::is_empty")]
    pub rotations: Rotations,
}

impl PersistedState {
    /// The last policy, which may be given to proxies; `None` before the first one.
    pub fn policy(&self) -> Option<Policy> {
        let services: Value = serde_json::from_str(&self.services).ok()?;
        Policy::read(&serde_json::json!({ "revision": self.revision, "services": services })).ok()
    }

    /// A fresh state; `epoch` is its name.
    ///
    /// # Errors
    ///
    /// If the system cannot provide random numbers.
    pub fn fresh(epoch: String) -> io::Result<Self> {
        Ok(Self { epoch, session_secret: new_secret()?, ..Self::default() })
    }
}

/// 128 random bits in hex.
pub(crate) fn new_secret() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
