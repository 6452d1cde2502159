//! State shared by all VMs of a proxy: the clock, shared data, queues, metrics, callouts, the log, and the faults that
//! the test injects.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::abi::{Level, Status};
use super::hostile::Fault;
use super::{Callout, LogLine};

/// The state behind the host calls of all VMs.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The clock that the module reads.
    pub(super) now: Duration,
    /// The clock of timers.
    pub(super) uptime: Duration,
    pub(super) log_level: u32,
    pub(super) data: Data,
    pub(super) queues: Queues,
    pub(super) metrics: Metrics,
    pub(super) clusters: BTreeSet<String>,
    pub(super) callouts: Vec<Callout>,
    pub(super) properties: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) log: Vec<LogLine>,
    pub(super) calls: BTreeMap<&'static str, u64>,
    /// The fault of the next calls with a name, and the number of these calls.
    pub(super) faults: BTreeMap<String, (Fault, u64)>,
    /// The percentage of all other calls that misbehave.
    pub(super) storm: u64,
    pub(super) random: Random,
}

impl Shared {
    /// Counts a call; returns its fault, if the test injected one.
    pub(super) fn enter(&mut self, call: &'static str) -> Option<Fault> {
        *self.calls.entry(call).or_default() += 1;
        let Some((fault, times)) = self.faults.get_mut(call) else {
            let strikes = self.random.below(100) < self.storm;
            return strikes.then(|| Fault::any(&mut self.random));
        };
        let fault = fault.clone();
        *times -= 1;
        if *times == 0 {
            self.faults.remove(call);
        }
        Some(fault)
    }

    /// Advances both clocks.
    pub(super) fn pass_until(&mut self, uptime: Duration) {
        self.now += uptime.saturating_sub(self.uptime);
        self.uptime = uptime;
    }

    pub(super) fn log(&mut self, vm: usize, level: Level, message: String) {
        self.log.push(LogLine { vm, level, message });
    }
}

/// splitmix64: the same numbers in each run.
#[derive(Clone, Debug, Default)]
pub struct Random(u64);

impl Random {
    /// Starts from the seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A number that is likely to reveal bugs: a small one, or one next to a power of two.
    pub fn odd_number(&mut self) -> u64 {
        match self.below(3) {
            0 => self.below(100),
            1 => (1u64 << self.below(64)).wrapping_sub(self.below(3)),
            _ => self.next(),
        }
    }

    /// One of a few.
    pub fn one_of<T>(&mut self, choices: impl IntoIterator<Item = T>) -> T {
        let mut choices: Vec<T> = choices.into_iter().collect();
        let at = self.below(choices.len() as u64) as usize;
        choices.swap_remove(at)
    }
}

/// Shared data, with one sequence of CAS numbers over all keys, as in Envoy.
#[derive(Debug, Default)]
pub(super) struct Data {
    values: BTreeMap<Vec<u8>, (Vec<u8>, u32)>,
    last_cas: u32,
}

impl Data {
    pub(super) fn keys(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.values.keys()
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<(Vec<u8>, u32), Status> {
        self.values.get(key).cloned().ok_or(Status::NotFound)
    }

    /// `cas` 0 is unconditional; a new key accepts any `cas`.
    pub(super) fn set(&mut self, key: Vec<u8>, value: Vec<u8>, cas: u32) -> Result<(), Status> {
        if cas != 0 && self.values.get(&key).is_some_and(|(_, current)| *current != cas) {
            return Err(Status::CasMismatch);
        }
        self.last_cas += 1;
        self.values.insert(key, (value, self.last_cas));
        Ok(())
    }
}

/// Shared queues; each wakes the VM that registered it last.
#[derive(Debug, Default)]
pub(super) struct Queues {
    queues: Vec<Queue>,
    /// Pending wake-ups: VM, root context, queue.
    pub(super) wakes: VecDeque<(u64, u32, u32)>,
}

#[derive(Debug)]
struct Queue {
    vm_id: Vec<u8>,
    name: Vec<u8>,
    consumer: (u64, u32),
    messages: VecDeque<Vec<u8>>,
}

impl Queues {
    pub(super) fn register(&mut self, vm_id: &[u8], name: &[u8], consumer: (u64, u32)) -> u32 {
        if let Ok(id) = self.resolve(vm_id, name) {
            if let Some(queue) = self.get(id) {
                queue.consumer = consumer;
            }
            return id;
        }
        let queue = Queue { vm_id: vm_id.to_vec(), name: name.to_vec(), consumer, messages: VecDeque::new() };
        self.queues.push(queue);
        self.queues.len() as u32
    }

    pub(super) fn resolve(&self, vm_id: &[u8], name: &[u8]) -> Result<u32, Status> {
        let found = self.queues.iter().position(|queue| queue.vm_id == vm_id && queue.name == name);
        found.map(|index| index as u32 + 1).ok_or(Status::NotFound)
    }

    pub(super) fn enqueue(&mut self, id: u32, message: Vec<u8>) -> Result<(), Status> {
        let queue = self.get(id).ok_or(Status::NotFound)?;
        queue.messages.push_back(message);
        let (vm, root) = queue.consumer;
        self.wakes.push_back((vm, root, id));
        Ok(())
    }

    pub(super) fn dequeue(&mut self, id: u32) -> Result<Vec<u8>, Status> {
        self.get(id).ok_or(Status::NotFound)?.messages.pop_front().ok_or(Status::Empty)
    }

    fn get(&mut self, id: u32) -> Option<&mut Queue> {
        self.queues.get_mut((id as usize).checked_sub(1)?)
    }
}

/// The kinds of metrics; the discriminants are the ABI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Metrics by kind and name, shared by all VMs. Rules and statuses are Envoy's, including odd ones.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) values: BTreeMap<String, u64>,
    pub(super) histograms: BTreeMap<String, Vec<u64>>,
}

impl Metrics {
    pub(super) fn define(&mut self, kind: Kind, name: &str) {
        if kind == Kind::Histogram {
            self.histograms.entry(name.to_owned()).or_default();
        } else {
            self.values.entry(name.to_owned()).or_default();
        }
    }

    pub(super) fn increment(&mut self, kind: Kind, name: &str, offset: i64) -> Result<(), Status> {
        if kind == Kind::Histogram || (kind == Kind::Counter && offset <= 0) {
            return Err(Status::BadArgument);
        }
        let value = self.values.entry(name.to_owned()).or_default();
        // A gauge wraps around below zero, as in Envoy.
        *value = value.wrapping_add_signed(offset);
        Ok(())
    }

    /// Increments a counter, sets a gauge.
    pub(super) fn record(&mut self, kind: Kind, name: &str, value: u64) {
        match kind {
            Kind::Counter => *self.values.entry(name.to_owned()).or_default() += value,
            Kind::Gauge => drop(self.values.insert(name.to_owned(), value)),
            Kind::Histogram => self.histograms.entry(name.to_owned()).or_default().push(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_data_is_compared_and_swapped_as_in_envoy() {
        let mut data = Data::default();
        assert_eq!(data.get(b"k"), Err(Status::NotFound));
        assert_eq!(data.set(b"k".to_vec(), b"1".to_vec(), 7), Ok(()), "an absent key takes any CAS");
        let (_, cas) = data.get(b"k").unwrap();
        assert_eq!(data.set(b"k".to_vec(), b"2".to_vec(), cas + 1), Err(Status::CasMismatch));
        assert_eq!(data.set(b"k".to_vec(), b"2".to_vec(), cas), Ok(()));
        assert_eq!(data.set(b"k".to_vec(), b"3".to_vec(), 0), Ok(()), "0 is unconditional");
        assert_eq!(data.get(b"k"), Ok((b"3".to_vec(), cas + 2)));
    }

    #[test]
    fn the_last_to_register_a_queue_is_woken() {
        let mut queues = Queues::default();
        let id = queues.register(b"vm", b"q", (1, 1));
        assert_eq!(queues.register(b"vm", b"q", (2, 1)), id);
        assert_eq!(queues.resolve(b"other", b"q"), Err(Status::NotFound));
        assert_eq!(queues.enqueue(id, b"m".to_vec()), Ok(()));
        assert_eq!(queues.wakes, [(2, 1, id)]);
        assert_eq!((queues.dequeue(id), queues.dequeue(id)), (Ok(b"m".to_vec()), Err(Status::Empty)));
        assert_eq!(queues.enqueue(99, vec![]), Err(Status::NotFound));
    }

    #[test]
    fn metrics_have_envoys_odd_rules() {
        let mut metrics = Metrics::default();
        for refused in [0, -1] {
            assert_eq!(metrics.increment(Kind::Counter, "c", refused), Err(Status::BadArgument));
        }
        assert_eq!(metrics.increment(Kind::Counter, "c", 2), Ok(()));
        metrics.record(Kind::Counter, "c", 5);
        assert_eq!(metrics.values["c"], 7, "recording adds on a counter");
        assert_eq!(metrics.increment(Kind::Gauge, "g", -1), Ok(()));
        assert_eq!(metrics.values["g"], u64::MAX);
        assert_eq!(metrics.increment(Kind::Gauge, "g", 3), Ok(()));
        assert_eq!(metrics.values["g"], 2);
    }
}
