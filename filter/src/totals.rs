//! What all VMs of the proxy have counted together: each publishes its own totals in shared data; the one that leads adds
//! them up, with those of the VMs that are gone.

use crate::host::Host;
use crate::shared_data::SharedData;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::counting::tallies::Tallies;
use tideshift_core::protocol::report::Event;

/// What the VMs that are gone have counted.
const RETIRED: &str = "retired";
/// How many of them are remembered by number.
const MOST_RETIRED: usize = 256;
/// How often to try again when two VMs change that at once.
const TRIES: usize = 100;

/// The totals of the VMs that are gone.
#[derive(Default, Serialize, Deserialize)]
struct Retired {
    /// Their numbers, the last ones.
    ids: Vec<u32>,
    tallies: Tallies,
}

/// What this VM published last.
#[derive(Default)]
pub struct Published {
    /// How often it has published.
    pub number: u64,
    last: Tallies,
    /// What other VMs have taken over of it.
    taken_over: Tallies,
}

/// What the VM that leads knows of all.
#[derive(Default)]
pub struct Totals {
    vms: BTreeMap<u32, Vm>,
    /// Whether it has led before this look.
    leads: bool,
    /// All together, as of the last [`Totals::gather`].
    pub sum: Tallies,
}

/// Of one VM.
struct Vm {
    published: u64,
    tallies: Tallies,
    /// The single requests that have been seen, by service.
    seen: BTreeMap<String, u64>,
}

/// Single requests that ended since the last look, by service; their versions by name.
pub type News = BTreeMap<String, Vec<(String, Event)>>;

fn key<H: Host>(shared: &SharedData<H>, id: u32) -> String {
    shared.key(&format!("worker/{id}/counts"))
}

fn read<T: for<'de> Deserialize<'de>>(host: &impl Host, key: &str) -> Option<(T, u32)> {
    let (bytes, version) = host.shared(key)?;
    Some((postcard::from_bytes(&bytes).ok()?, version))
}

impl Published {
    /// Publishes what this VM has counted.
    pub fn publish(&mut self, shared: &SharedData<impl Host>, id: u32, mut tallies: Tallies) {
        tallies.subtract(&self.taken_over);
        if let Ok(bytes) = postcard::to_allocvec(&tallies) {
            shared.host.set_shared(&key(shared, id), &bytes);
            self.number = self.number.saturating_add(1);
            self.last = tallies;
        }
    }

    /// This VM was taken for gone, or leaves: if what it had published last was taken over, it starts again from there;
    /// else that is withdrawn, and published again under another number.
    pub fn start_again(&mut self, shared: &SharedData<impl Host>, id: u32) {
        let last = std::mem::take(&mut self.last);
        let is_taken_over =
            read::<Retired>(&shared.host, &shared.key(RETIRED)).is_some_and(|(retired, _)| retired.ids.contains(&id));
        if is_taken_over {
            self.taken_over.add(&last, false);
        } else {
            shared.host.set_shared(&key(shared, id), b"");
        }
    }
}

/// Takes over what a VM has counted that is gone.
pub fn retire(shared: &SharedData<impl Host>, id: u32) {
    let of_vm = key(shared, id);
    let Some((tallies, _)) = read::<Tallies>(&shared.host, &of_vm) else { return };
    for _ in 0..TRIES {
        let (mut retired, version) = read::<Retired>(&shared.host, &shared.key(RETIRED)).unwrap_or_default();
        if !retired.ids.contains(&id) {
            retired.ids.push(id);
            let too_many = retired.ids.len().saturating_sub(MOST_RETIRED);
            retired.ids.drain(..too_many);
            retired.tallies.add(&tallies, false);
        }
        let Ok(bytes) = postcard::to_allocvec(&retired) else { return };
        if shared.host.replace_shared(&shared.key(RETIRED), &bytes, version) {
            shared.host.set_shared(&of_vm, b"");
            return;
        }
    }
}

/// Makes room for what [`retire`] keeps, so that two VMs that are the first to do so do not both believe it.
pub fn prepare(shared: &SharedData<impl Host>) {
    if let Ok(bytes) = postcard::to_allocvec(&Retired::default()) {
        shared.set_first(RETIRED, &bytes);
    }
}

impl Totals {
    /// Adds up what the VMs with these numbers have published, by how often they have. What is new of single requests.
    pub fn gather(&mut self, shared: &SharedData<impl Host>, live: &[(u32, u64)]) -> News {
        let mut news = News::new();
        for (id, published) in live {
            let known = self.vms.get(id).map(|vm| vm.published);
            if known == Some(*published) || *published == 0 {
                continue;
            }
            let Some((tallies, _)) = read::<Tallies>(&shared.host, &key(shared, *id)) else { continue };
            let vm = self.vms.entry(*id).or_insert_with(|| Vm {
                published: 0,
                tallies: Tallies::default(),
                seen: BTreeMap::new(),
            });
            vm.published = *published;
            for service in &tallies.services {
                // What was logged before this VM led, the one before has seen.
                let before = if self.leads { 0 } else { service.logged };
                let seen = vm.seen.entry(service.name.clone()).or_insert(before);
                let since = std::mem::replace(seen, service.logged);
                for event in service.logged_since(since) {
                    if let Some(version) = service.versions.get(usize::from(event.2)) {
                        news.entry(service.name.clone()).or_default().push((version.name.clone(), *event));
                    }
                }
            }
            vm.tallies = tallies;
        }
        self.leads = true;
        self.vms.retain(|id, _| live.iter().any(|(known, _)| known == id));
        // After the VMs: one that was taken over meanwhile is in here, and is not counted twice.
        let (retired, _) = read::<Retired>(&shared.host, &shared.key(RETIRED)).unwrap_or_default();
        let mut sum = retired.tallies;
        for (_, vm) in self.vms.iter().filter(|(id, _)| !retired.ids.contains(id)) {
            sum.add(&vm.tallies, true);
        }
        self.sum = sum;
        news
    }
}
