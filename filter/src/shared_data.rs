//! What the VMs of one proxy share: the newest policy from the controller, the guard's vetoes, the lease, the number of
//! the last report, and the identity of this run of the proxy.
//!
//! Envoy's shared data is one table for all plugins without a `vm_id` of their own, as all are in Istio, so keys have a
//! prefix. It also names the controller, so that a plugin configured for another one starts afresh; without a
//! controller, it names the configuration itself: two of them have nothing in common.

use crate::host::Host;
use siphasher::sip::SipHasher24;
use tideshift_core::protocol::delivery::{Before, Delivery, RefusedService};
use tideshift_core::protocol::policy::{ControllerRef, Policy};

/// The keys of what VMs change together.
const START: &str = "start";
const LEASE: &str = "lease";
const VETOES: &str = "vetoes";
/// The newest policy as a whole, its version, what changed in it since the one before, and what was refused of it.
const POLICY: &str = "policy";
const POLICY_VERSION: &str = "place";
const CHANGES: &str = "changes";
const REFUSED: &str = "refused";
/// The number of the last report.
const REPORTS: &str = "reports";
/// The number of the VM that joined last.
pub const NEXT_WORKER: &str = "next-worker";
/// The list of VMs that are there.
pub const WORKERS: &str = "workers";

/// This plugin's part of the shared data.
#[derive(Clone)]
pub struct SharedData<H> {
    /// The proxy.
    pub host: H,
    prefix: String,
}

/// Which policy of all: revisions only grow within one epoch; an epoch is one controller state, and a new one begins when
/// that state is lost. Policies of the plugin configuration have no epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyVersion {
    /// Names the controller state, or is empty.
    pub epoch: String,
    /// The policy's revision.
    pub revision: u64,
}

/// A policy that the controller sent, as VMs pass it on.
pub struct StoredPolicy {
    /// The policy.
    pub policy: Policy,
    /// Its version.
    pub version: PolicyVersion,
}

impl PolicyVersion {
    /// Whether the controller's policy of this version replaces one of another. What the controller sends takes
    /// precedence over the configuration; of two epochs, the one that it names now.
    pub fn replaces(&self, other: &Self) -> bool {
        self.epoch != other.epoch || self.revision > other.revision
    }
}

/// A number for a report.
pub struct Number {
    /// Greater than those of all reports before it in this run of the proxy.
    pub sequence: u64,
    /// Of the shared value.
    version: u32,
}

impl<H: Host> SharedData<H> {
    /// The part of the plugin with this controller. To be made while the plugin is configured: Envoy does that on one VM
    /// before all others, so whatever VMs change together later is there when they do. (A value that is not there cannot
    /// be compared with, so two VMs that both wanted to be the first would both believe that they were.)
    pub fn new(host: H, controller: Option<&ControllerRef>, configuration: &[u8]) -> Self {
        let root = host.property("plugin_root_id").unwrap_or_default();
        let root = String::from_utf8_lossy(&root).into_owned();
        let part = match controller {
            Some(controller) => format!("{}/{}", controller.cluster, controller.authority),
            None => format!("static/{:016x}", SipHasher24::new().hash(configuration)),
        };
        let now = host.now();
        let shared = Self { host, prefix: format!("tideshift/{root}/{part}") };
        shared.set_first(START, format!("{now:x}").as_bytes());
        shared.set_first(LEASE, &[0; 16]);
        shared.set_first(REPORTS, &[0; 8]);
        shared.set_first(NEXT_WORKER, &[0; 8]);
        shared.set_first(WORKERS, &[0; 4]);
        shared
    }

    /// Sets what is not there yet.
    pub fn set_first(&self, name: &str, value: &[u8]) {
        let key = self.key(name);
        if self.host.shared(&key).is_none() {
            self.host.set_shared(&key, value);
        }
    }

    /// A key of this part.
    pub fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// This run of the proxy: the time at which its first VM came up, the same for all.
    pub fn start(&self) -> String {
        let start = self.host.shared(&self.key(START)).map(|(start, _)| start).unwrap_or_default();
        String::from_utf8_lossy(&start).into_owned()
    }

    /// The newest policy that the controller sent, for a VM that runs this one: by what has changed since, if that is
    /// known, else as a whole.
    pub fn newest(&self, policy: &Policy, version: &PolicyVersion) -> Option<StoredPolicy> {
        let newest = self.newest_version()?;
        let before = Before { policy, revision: Some(version.revision), refused: &[] };
        let changes = self.value_of(CHANGES, &newest).filter(|_| version.epoch == newest.epoch);
        let changed = changes.and_then(|changes| Delivery::read(&changes, before).ok());
        if let Some(Delivery { policy, .. }) = changed.filter(|changed| changed.base.is_some()) {
            return Some(StoredPolicy { policy, version: newest });
        }
        let stored = self.host.shared(&self.key(POLICY))?.0;
        let (version, json) = split(&stored)?;
        // Only valid policies are stored; should this one not be, what runs keeps running.
        Some(StoredPolicy { policy: Policy::from_json(json).ok()?, version })
    }

    /// The version of the newest policy; cheap enough for every tick.
    pub fn newest_version(&self) -> Option<PolicyVersion> {
        decode_version(&self.host.shared(&self.key(POLICY_VERSION))?.0)
    }

    /// What was refused of the newest policy, if that is the one of this version.
    pub fn refused(&self, of: &PolicyVersion) -> Vec<RefusedService> {
        let refused = self.value_of(REFUSED, of);
        refused.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
    }

    /// Stores a policy from the controller for all VMs: as a whole, what was sent if that were changes, and what was
    /// refused.
    pub fn store(&self, version: &PolicyVersion, whole: &[u8], changes: Option<&[u8]>, refused: &[RefusedService]) {
        let version = format!("{} {}", version.revision, version.epoch);
        let refused = serde_json::to_vec(refused).unwrap_or_default();
        for (name, json) in [(POLICY, whole), (CHANGES, changes.unwrap_or_default()), (REFUSED, &refused)] {
            let mut value = version.clone().into_bytes();
            value.push(b'\n');
            value.extend_from_slice(json);
            self.host.set_shared(&self.key(name), &value);
        }
        self.host.set_shared(&self.key(POLICY_VERSION), version.as_bytes());
    }

    /// A value that belongs to the policy of a version.
    fn value_of(&self, name: &str, version: &PolicyVersion) -> Option<Vec<u8>> {
        let stored = self.host.shared(&self.key(name))?.0;
        let (of, value) = split(&stored)?;
        (of == *version).then(|| value.to_vec())
    }

    /// The guard's vetoes as [`Self::set_vetoes`] has them, and their version.
    pub fn vetoes(&self) -> Option<(H::Bytes, u32)> {
        self.host.shared(&self.key(VETOES))
    }

    /// Stores the guard's vetoes for all VMs.
    pub fn set_vetoes(&self, text: &str) {
        self.host.set_shared(&self.key(VETOES), text.as_bytes());
    }

    /// The number for a report whose counts are read after this. A VM that then [takes](Self::take_number) it knows that
    /// no other has read counts for another report meanwhile: a greater number never goes with smaller counts.
    pub fn next_number(&self) -> Option<Number> {
        let (last, version) = self.host.shared(&self.key(REPORTS))?;
        Some(Number { sequence: integer(&last, 0).saturating_add(1), version })
    }

    /// Takes a number; not if another VM has taken it.
    pub fn take_number(&self, number: &Number) -> bool {
        self.host.replace_shared(&self.key(REPORTS), &number.sequence.to_le_bytes(), number.version)
    }

    /// Takes or renews the right to lead until `until`, in nanoseconds. One VM has it at a time;
    /// if it dies, another takes it when its time is up.
    pub fn lease(&self, worker: u32, now: u64, until: u64) -> bool {
        let key = self.key(LEASE);
        let value = [u64::from(worker).to_le_bytes(), until.to_le_bytes()].concat();
        let Some((held, version)) = self.host.shared(&key) else { return false };
        let (holder, expires) = (integer(&held, 0), integer(&held, 8));
        let ours = holder == u64::from(worker);
        // A clock that jumped back must not leave the lease with a dead holder for good.
        let expired = expires < now || expires > now.saturating_add(2 * (until - now));
        (ours || expired) && self.host.replace_shared(&key, &value, version)
    }

    /// The VM that leads.
    pub fn leader(&self) -> Option<u32> {
        let (held, _) = self.host.shared(&self.key(LEASE))?;
        u32::try_from(integer(&held, 0)).ok().filter(|holder| *holder != 0)
    }

    /// Gives the lease up, if this VM has it.
    pub fn end_lease(&self, worker: u32) {
        let key = self.key(LEASE);
        if let Some((held, version)) = self.host.shared(&key)
            && integer(&held, 0) == u64::from(worker)
        {
            self.host.replace_shared(&key, &[0; 16], version);
        }
    }
}

fn split(value: &[u8]) -> Option<(PolicyVersion, &[u8])> {
    let line = value.iter().position(|b| *b == b'\n')?;
    let (version, rest) = value.split_at_checked(line)?;
    Some((decode_version(version)?, rest.get(1..)?))
}

fn decode_version(value: &[u8]) -> Option<PolicyVersion> {
    let (revision, epoch) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    Some(PolicyVersion { epoch: epoch.to_owned(), revision: revision.parse().ok()? })
}

/// The little-endian integer at a place in a shared value; 0 if the value is too short.
pub fn integer(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at.saturating_add(8)).and_then(|eight| eight.try_into().ok());
    eight.map_or(0, u64::from_le_bytes)
}
