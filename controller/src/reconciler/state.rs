//! What the reconciler decides and must not forget: what a store keeps over a restart.

use crate::clock::Millis;
use crate::readiness::RememberedReadiness;
use crate::reconciler::{ApiOverride, DrainTracker, Leaving, Rotations, Young};
use crate::rollout::{Rollout, Transition};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use tideshift_core::protocol::policy::Policy;

/// Everything but the counts, which change all the time and are kept apart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PersistedState {
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
    pub applied: BTreeMap<String, ApiOverride>,
    /// The versions that are given nothing.
    pub idle: DrainTracker,
    /// The versions and documents that are gone and still serve.
    #[serde(default)]
    pub leaving: Leaving,
    /// The endpoints that were ready.
    pub ready: RememberedReadiness,
    /// Those of them that have become so of late.
    #[serde(default)]
    pub young: Young,
    /// Signs the cookies of sessions whose document brings no secret of its own.
    #[serde(default)]
    pub session_secret: String,
    /// What sessions were signed with before, where that still holds.
    #[serde(default, skip_serializing_if = "Rotations::is_empty")]
    pub rotations: Rotations,
}

impl PersistedState {
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
pub(crate) fn new_secret() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
