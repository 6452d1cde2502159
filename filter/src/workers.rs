//! The VMs of one proxy: one for each worker and one on the main thread. Each has a number, a queue by which it is
//! woken when a policy arrives, and a heartbeat that says which policy it runs.

use crate::host::Host;
use crate::shared_data::{NEXT_WORKER, PolicyVersion, SharedData, WORKERS, integer};
use crate::totals;
use std::time::Duration;

/// This VM among the others.
pub struct Workers<H> {
    shared: SharedData<H>,
    /// This VM's number, unlike that of any other VM of this proxy.
    pub id: u32,
    queue: Option<u32>,
    /// How many queues it has had.
    queues: u32,
}

/// What a VM says of itself.
#[derive(Clone)]
struct Heartbeat {
    queue: u32,
    at: u64,
    /// How often it has published what it counted.
    published: u64,
    applied: PolicyVersion,
}

/// What the VMs say of themselves.
pub struct Live {
    /// Their numbers, and how often each has published what it counted.
    pub published: Vec<(u32, u64)>,
    /// The policy that all of them have applied; `None` if there is no such policy (some are still in another epoch).
    pub applied: Option<PolicyVersion>,
}

impl<H: Host> Workers<H> {
    /// A VM without a heartbeat for this long is gone.
    const GONE_AFTER: Duration = Duration::from_secs(10);
    /// How often to try again when two VMs change the list at once.
    const TRIES: usize = 100;

    /// Joins the others.
    ///
    /// Not while being configured: Envoy configures a VM that it throws away before it configures the real ones.
    pub fn join(shared: SharedData<H>, now: u64, applied: &PolicyVersion, published: u64) -> Self {
        let next = shared.key(NEXT_WORKER);
        let mut id = 0;
        for _ in 0..Self::TRIES {
            let Some((value, version)) = shared.host.shared(&next) else { continue };
            id = integer(&value, 0) + 1;
            if shared.host.replace_shared(&next, &id.to_le_bytes(), version) {
                break;
            }
        }
        let id = id as u32;
        let mut workers = Self { shared, id, queue: None, queues: 0 };
        workers.listen();
        // Before it is on the list: a VM there without a heartbeat is taken for gone.
        workers.beat(now, applied, published);
        workers.change_list(|list| list.push(id));
        workers
    }

    /// Lets the plugin configuration that is being called be the one that is woken.
    pub fn listen(&mut self) {
        self.queues = self.queues.saturating_add(1);
        self.queue =
            self.shared.host.register_queue(&self.shared.key(&format!("worker/{}/queue/{}", self.id, self.queues)));
    }

    /// Says that this VM lives, which policy it runs, and how often it has published what it counted.
    pub fn beat(&self, now: u64, applied: &PolicyVersion, published: u64) {
        let queue = self.queue.unwrap_or_default();
        self.note(self.id, &Heartbeat { queue, at: now, published, applied: applied.clone() });
    }

    /// Whether this VM stood still for so long, or its clock jumped so far, that it was taken for gone.
    pub fn is_taken_for_gone(&self) -> bool {
        !self.list().contains(&self.id)
    }

    fn note(&self, id: u32, beat: &Heartbeat) {
        let mut value = Vec::with_capacity(32 + beat.applied.epoch.len());
        for number in [u64::from(beat.queue), beat.at, beat.applied.revision, beat.published] {
            value.extend_from_slice(&number.to_le_bytes());
        }
        value.extend_from_slice(beat.applied.epoch.as_bytes());
        self.shared.host.set_shared(&self.heartbeat_key(id), &value);
    }

    /// Takes this VM off the list; what it published is taken over.
    pub fn leave(&self) {
        totals::retire(&self.shared, self.id);
        self.change_list(|list| list.retain(|id| *id != self.id));
    }

    /// Wakes the others.
    pub fn wake(&self) {
        for id in self.list().into_iter().filter(|id| *id != self.id) {
            if let Some(heartbeat) = self.heartbeat(id) {
                self.shared.host.enqueue(heartbeat.queue);
            }
        }
    }

    /// Wakes the VM that leads, unless this is it.
    pub fn wake_leader(&self) {
        let leader = self.shared.leader().filter(|leader| *leader != self.id);
        if let Some(heartbeat) = leader.and_then(|leader| self.heartbeat(leader)) {
            self.shared.host.enqueue(heartbeat.queue);
        }
    }

    /// Whether a queue is the one that wakes this VM; empties it.
    pub fn is_woken_by(&self, queue: u32) -> bool {
        // No more than were ever put there, should the queue seem to have no end.
        let _ = (0..Self::TRIES).take_while(|_| self.shared.host.dequeue(queue)).count();
        self.queue == Some(queue)
    }

    /// The VMs that live. What those have counted that are gone is taken over.
    pub fn live(&self, now: u64) -> Live {
        let mut live = Vec::new();
        let mut gone = Vec::new();
        for id in self.list() {
            match self.heartbeat(id) {
                // From before the clock was set back: it ages from now on.
                Some(beat) if beat.at > now => {
                    self.note(id, &Heartbeat { at: now, ..beat.clone() });
                    live.push((id, beat));
                }
                Some(beat) if beat.at.saturating_add(Self::GONE_AFTER.as_nanos() as u64) >= now => {
                    live.push((id, beat));
                }
                _ => gone.push(id),
            }
        }
        if !gone.is_empty() {
            self.change_list(|list| list.retain(|id| !gone.contains(id)));
            gone.iter().for_each(|id| totals::retire(&self.shared, *id));
        }
        let beats = || live.iter().map(|(_, beat)| beat);
        let oldest = beats().min_by_key(|beat| beat.applied.revision).map(|beat| beat.applied.clone());
        let applied = oldest.filter(|oldest| beats().all(|beat| beat.applied.epoch == oldest.epoch));
        Live { published: live.iter().map(|(id, beat)| (*id, beat.published)).collect(), applied }
    }

    fn heartbeat_key(&self, id: u32) -> String {
        self.shared.key(&format!("worker/{id}"))
    }

    fn heartbeat(&self, id: u32) -> Option<Heartbeat> {
        let value = self.shared.host.shared(&self.heartbeat_key(id))?.0;
        let epoch = String::from_utf8(value.get(32..)?.to_vec()).ok()?;
        let applied = PolicyVersion { epoch, revision: integer(&value, 16) };
        let (queue, at, published) = (integer(&value, 0) as u32, integer(&value, 8), integer(&value, 24));
        Some(Heartbeat { queue, at, published, applied })
    }

    fn list(&self) -> Vec<u32> {
        self.shared.host.shared(&self.shared.key(WORKERS)).map(|(list, _)| decode(&list)).unwrap_or_default()
    }

    fn change_list(&self, change: impl Fn(&mut Vec<u32>)) {
        let key = self.shared.key(WORKERS);
        for _ in 0..Self::TRIES {
            let Some((value, version)) = self.shared.host.shared(&key) else { continue };
            let mut list = decode(&value);
            change(&mut list);
            if self.shared.host.replace_shared(&key, &encode(&list), version) {
                return;
            }
        }
    }
}

/// A list of numbers; the first four bytes only keep it from being empty, which Envoy does not tell from nothing.
fn encode(list: &[u32]) -> Vec<u8> {
    std::iter::once(&0).chain(list).flat_map(|id| id.to_le_bytes()).collect()
}

fn decode(value: &[u8]) -> Vec<u32> {
    let numbers = value.chunks_exact(4).filter_map(|four| four.try_into().ok().map(u32::from_le_bytes));
    let mut list: Vec<u32> = numbers.skip(1).collect();
    list.sort_unstable();
    list.dedup();
    list
}
