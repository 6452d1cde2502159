//! A small proxy-wasm host on wasmi: runs the real module without an Envoy.
//!
//! It covers what no Envoy can be made to do on demand: a clock that the test sets, callouts that the test answers,
//! host calls that fail, an exact sequence of callbacks. Behaviour visible to users is tested on a real Envoy; where
//! the two could differ, this host follows what was measured on Envoy 1.40:
//!
//! * a configuration is tried by a canary VM on the main thread first, which is thrown away, then given to the main
//!   thread's VM ([`MAIN`]) and to each worker's; a new one gets a new root context in the same VMs;
//! * shared data, queues and metrics belong to the proxy, metric ids and callout tokens to a VM;
//! * an answered request went to the cluster that is called like the version which its header names;
//! * `on_log` comes before `on_done`, and also for exchanges whose headers the module never saw.
//!
//! ```no_run
//! # use tideshift_tests::wasm_host::{Ending, WasmHost};
//! # fn main() -> anyhow::Result<()> {
//! let mut host = WasmHost::new(2)?; // two workers
//! assert!(host.configure(r#"{"revision": 1, "services": []}"#)?);
//! let exchange = host.request(1, &[(":authority", "shop.example.com"), (":path", "/"), (":method", "GET")])?;
//! let version = exchange.header("x-tideshift-version");
//! host.end(exchange, &Ending::status(200))?;
//! # Ok(()) }
//! ```

mod abi;
mod calls;
mod guest;
mod hostile;
mod shared;
mod vm;
mod wasi;

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use wasmi::{Config, Engine, ExternType, Module};

pub use self::abi::{Header, Level, Status};
pub use self::hostile::{Fault, Word};
pub use self::shared::Random;
use self::shared::Shared;
use self::vm::Vm;
use crate::artifacts;
use crate::bootstrap::CONTROLLER_CLUSTER;

/// The main thread's VM: it gets ticks, queues and callouts, but no requests. The workers are 1, 2 and so on.
pub const MAIN: usize = 0;

/// The `vm_id` of all VMs, also their plugin's name and root id.
pub const VM_ID: &str = "tideshift";

/// A proxy that runs the module.
pub struct WasmHost {
    engine: Engine,
    module: Module,
    shared: Arc<Mutex<Shared>>,
    workers: usize,
    configuration: Vec<u8>,
    /// By thread; `None` if a VM trapped and was not reloaded.
    vms: Vec<Option<Vm>>,
    created: u64,
}

impl WasmHost {
    /// A proxy with this many workers, and the module from `make build`.
    pub fn new(workers: usize) -> anyhow::Result<Self> {
        let path = artifacts::wasm()?;
        Self::with_module(&fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?, workers)
    }

    /// The same with another module, in binary or text format.
    ///
    /// Its clock starts at 2026-01-01; it knows the controller's cluster and the plugin's properties; all requests come
    /// from one client, until [`set_property`](Self::set_property) changes `source.address`.
    pub fn with_module(module: &[u8], workers: usize) -> anyhow::Result<Self> {
        let engine = Engine::new(Config::default().consume_fuel(true));
        let module = Module::new(&engine, module).context("not a wasm module")?;
        let host = Self {
            engine,
            module,
            shared: Arc::default(),
            workers,
            configuration: Vec::new(),
            vms: Vec::new(),
            created: 0,
        };
        let mut shared = host.shared();
        shared.now = Duration::from_secs(1_767_225_600);
        shared.log_level = Level::Info as u32;
        shared.clusters.insert(CONTROLLER_CLUSTER.to_owned());
        for path in ["plugin_name", "plugin_root_id", "plugin_vm_id"] {
            shared.properties.insert(abi::property_path(path), VM_ID.as_bytes().to_vec());
        }
        shared.properties.insert(abi::property_path("source.address"), b"127.0.0.1:40000".to_vec());
        drop(shared);
        Ok(host)
    }

    /// Applies a configuration: `false` if the module rejects it, which [`log`](Self::log) explains. The proxy then
    /// keeps its previous configuration; without one it has no VMs. (A VM that rejects what the others accepted, which
    /// only faults can cause, keeps its own.)
    ///
    /// The first call creates the VMs.
    pub fn configure(&mut self, configuration: &str) -> anyhow::Result<bool> {
        let mut canary = self.create(MAIN)?;
        if !canary.configure(configuration.as_bytes()).with_context(|| self.last_words())? {
            return Ok(false);
        }
        drop(canary);
        configuration.as_bytes().clone_into(&mut self.configuration);
        if self.vms.is_empty() {
            self.vms =
                (MAIN..=self.workers).map(|thread| self.create(thread).map(Some)).collect::<anyhow::Result<_>>()?;
        }
        let mut accepted = true;
        for thread in MAIN..=self.workers {
            accepted &= self.on(thread, |vm| vm.configure(configuration.as_bytes()))?;
        }
        Ok(accepted)
    }

    /// Replaces the VM of a thread, as after a trap, with the configuration in force: `false` if the module rejects it.
    pub fn reload(&mut self, thread: usize) -> anyhow::Result<bool> {
        let mut vm = self.create(thread)?;
        let configuration = self.configuration.clone();
        let accepted = vm.configure(&configuration)?;
        *self.vms.get_mut(thread).context("no such thread")? = accepted.then_some(vm);
        Ok(accepted)
    }

    // Requests.

    /// A request arrives on a worker. Names are converted to lower case, as in Envoy.
    pub fn request<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        &mut self,
        worker: usize,
        headers: &[(N, V)],
    ) -> anyhow::Result<Exchange> {
        let headers: Vec<Header> =
            headers.iter().map(|(name, value)| (name.as_ref().to_ascii_lowercase(), value.as_ref().to_vec())).collect();
        self.on(worker, |vm| {
            let context = vm.open()?;
            let goes_on = vm.request(context, headers)?;
            let stream = vm.stream(context)?;
            let headers = stream.request.clone().unwrap_or_default();
            Ok(Exchange { worker, context, headers, goes_on, local_response: stream.local_response.clone() })
        })
    }

    /// The exchange ends: the headers and trailers of the response arrive, if any, then `on_log`, `on_done` and
    /// `on_delete` follow.
    pub fn end(&mut self, exchange: Exchange, ending: &Ending) -> anyhow::Result<()> {
        self.finish(exchange, ending).map(drop)
    }

    /// The same; returns the response headers for the client, as the module left them. `None` if there was no response.
    pub fn finish(&mut self, exchange: Exchange, ending: &Ending) -> anyhow::Result<Option<Vec<Header>>> {
        self.on(exchange.worker, |vm| vm.end(exchange.context, ending))
    }

    /// A malformed request, which Envoy answers itself: the module sees only `on_log`.
    pub fn malformed(&mut self, worker: usize, ending: &Ending) -> anyhow::Result<()> {
        self.on(worker, |vm| {
            let context = vm.open()?;
            vm.end(context, ending).map(drop)
        })
    }

    // Time.

    /// The clock, since 1970.
    pub fn now(&self) -> Duration {
        self.shared().now
    }

    /// Sets the clock, forward or back, without ticks: timers do not depend on it.
    pub fn set_now(&mut self, now: Duration) {
        self.shared().now = now;
    }

    /// Advances the time: each tick at its time, on each thread, followed by the queues it filled.
    pub fn advance(&mut self, by: Duration) -> anyhow::Result<()> {
        let end = self.shared().uptime + by;
        while let Some((due, thread, root)) = self.next_tick(end) {
            self.shared().pass_until(due);
            self.on(thread, |vm| vm.tick(root))?;
            self.wake()?;
        }
        self.shared().pass_until(end);
        Ok(())
    }

    fn next_tick(&self, end: Duration) -> Option<(Duration, usize, u32)> {
        let vms = self.vms.iter().enumerate();
        vms.filter_map(|(thread, vm)| vm.as_ref()?.due(end).map(|(due, root)| (due, thread, root))).min()
    }

    /// `on_tick` on one thread, now.
    pub fn tick(&mut self, thread: usize) -> anyhow::Result<()> {
        self.on(thread, |vm| vm.tick(vm.root().0))
    }

    /// The tick period that a thread's VM requested.
    pub fn tick_period(&self, thread: usize) -> Option<Duration> {
        self.vms.get(thread)?.as_ref()?.root().1
    }

    /// Delivers the wake-ups of shared queues, and those that follow from them; returns their number.
    pub fn wake(&mut self) -> anyhow::Result<usize> {
        let mut delivered = 0;
        loop {
            let next = self.shared().queues.wakes.pop_front();
            let Some((number, root, queue)) = next else {
                return Ok(delivered);
            };
            // A VM that is gone, such as the canary, is not woken.
            let thread = self.vms.iter().position(|vm| vm.as_ref().is_some_and(|vm| vm.number() == number));
            if let Some(thread) = thread {
                self.on(thread, |vm| vm.queue_ready(root, queue))?;
                delivered += 1;
            }
        }
    }

    // Callouts.

    /// Adds a cluster; callouts to unknown ones fail.
    pub fn add_cluster(&mut self, name: &str) {
        self.shared().clusters.insert(name.to_owned());
    }

    /// Removes a cluster.
    pub fn remove_cluster(&mut self, name: &str) {
        self.shared().clusters.remove(name);
    }

    /// Returns the callouts since the last call, oldest first, without those of canaries and of VMs that are gone: no
    /// VM would receive the response.
    pub fn take_callouts(&mut self) -> Vec<Callout> {
        let callouts = std::mem::take(&mut self.shared().callouts);
        let alive = |number| self.vms.iter().flatten().any(|vm| vm.number() == number);
        callouts.into_iter().filter(|callout| alive(callout.number)).collect()
    }

    /// Answers a callout.
    pub fn answer(&mut self, callout: &Callout, answer: &Answer) -> anyhow::Result<()> {
        let vm = self.vms.get(callout.vm).and_then(Option::as_ref);
        if vm.is_none_or(|vm| vm.number() != callout.number) {
            return Ok(());
        }
        self.on(callout.vm, |vm| vm.answer(callout.root, callout.token, answer))
    }

    // State for assertions.

    /// The functions that the module imports.
    pub fn imports(&self) -> Vec<String> {
        self.module.imports().map(|import| import.name().to_owned()).collect()
    }

    /// The functions that the module exports.
    pub fn exports(&self) -> Vec<String> {
        let functions = self.module.exports().filter(|export| matches!(export.ty(), ExternType::Func(_)));
        functions.map(|export| export.name().to_owned()).collect()
    }

    /// The memory of a thread's VM, in pages of 64 KiB; it never shrinks.
    pub fn pages(&self, thread: usize) -> u64 {
        self.vms.get(thread).and_then(Option::as_ref).map_or(0, Vm::pages)
    }

    /// The active root context of a thread.
    pub fn root(&self, thread: usize) -> Option<u32> {
        Some(self.vms.get(thread)?.as_ref()?.root().0)
    }

    /// All log lines so far, of all VMs.
    pub fn log(&self) -> Vec<LogLine> {
        self.shared().log.clone()
    }

    /// The log lines of this level and above.
    pub fn log_from(&self, level: Level) -> Vec<LogLine> {
        self.log().into_iter().filter(|line| line.level >= level).collect()
    }

    /// Clears the log.
    pub fn clear_log(&mut self) {
        self.shared().log.clear();
    }

    /// A counter or gauge by its full name; `None` if it was never defined.
    pub fn metric(&self, name: &str) -> Option<u64> {
        self.shared().metrics.values.get(name).copied()
    }

    /// All counters and gauges.
    pub fn metrics(&self) -> BTreeMap<String, u64> {
        self.shared().metrics.values.clone()
    }

    /// The values that a histogram recorded, in order.
    pub fn histogram(&self, name: &str) -> Vec<u64> {
        self.shared().metrics.histograms.get(name).cloned().unwrap_or_default()
    }

    /// Shared data under a key.
    pub fn shared_data(&self, key: &str) -> Option<Vec<u8>> {
        self.shared().data.get(key.as_bytes()).ok().map(|(value, _)| value)
    }

    /// All keys of shared data.
    pub fn shared_keys(&self) -> Vec<String> {
        self.shared().data.keys().map(|key| String::from_utf8_lossy(key).into_owned()).collect()
    }

    /// Overwrites shared data, as another VM would.
    pub fn set_shared_data(&mut self, key: &str, value: &[u8]) {
        // Unconditional, so that it cannot fail.
        let _ = self.shared().data.set(key.as_bytes().to_vec(), value.to_vec(), 0);
    }

    /// The number of calls of a host call, by its full name such as `proxy_get_property`.
    pub fn calls(&self, call: &str) -> u64 {
        self.shared().calls.get(call).copied().unwrap_or_default()
    }

    /// All host calls made, by name.
    pub fn all_calls(&self) -> BTreeMap<&'static str, u64> {
        self.shared().calls.clone()
    }

    // Fault injection.

    /// Makes a host call fail with a status from now on.
    pub fn fail(&mut self, call: &str, status: Status) {
        self.lie(call, Fault::Status(status as u32));
    }

    /// Makes only the next calls with this name fail.
    pub fn fail_times(&mut self, call: &str, status: Status, times: u64) {
        self.lie_times(call, Fault::Status(status as u32), times);
    }

    /// Makes a host call misbehave from now on.
    pub fn lie(&mut self, call: &str, fault: Fault) {
        self.lie_times(call, fault, u64::MAX);
    }

    /// Makes only the next calls with this name misbehave.
    pub fn lie_times(&mut self, call: &str, fault: Fault, times: u64) {
        self.shared().faults.insert(call.to_owned(), (fault, times.max(1)));
    }

    /// Makes this percentage of all host calls misbehave from now on, each in a different way, as the seed determines.
    pub fn storm(&mut self, of_a_hundred: u64, seed: u64) {
        let mut shared = self.shared();
        (shared.storm, shared.random) = (of_a_hundred, Random::new(seed));
    }

    /// Ends all faults.
    pub fn heal(&mut self) {
        let mut shared = self.shared();
        shared.faults.clear();
        shared.storm = 0;
    }

    /// Calls an export of one thread's VM with arbitrary arguments; `None` if the module has no such export, in which
    /// case Envoy skips it.
    pub fn callback(&mut self, thread: usize, name: &str, arguments: &[u32]) -> anyhow::Result<Option<u32>> {
        self.on(thread, |vm| vm.callback(name, arguments))
    }

    /// Sets a property for all exchanges, such as `node.id`; dots separate the elements of the path.
    pub fn set_property(&mut self, path: &str, value: impl Into<Vec<u8>>) {
        self.shared().properties.insert(abi::property_path(path), value.into());
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&mut self, thread: usize) -> anyhow::Result<Vm> {
        self.created += 1;
        Vm::new(&self.engine, &self.module, Arc::clone(&self.shared), thread, self.created)
    }

    /// Runs a function on a thread's VM; a trap ends that VM.
    fn on<T>(&mut self, thread: usize, run: impl FnOnce(&mut Vm) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let Some(Some(vm)) = self.vms.get_mut(thread) else {
            bail!("thread {thread} has no VM: not configured, or it trapped");
        };
        run(vm).map_err(|trap| {
            if let Some(vm) = self.vms.get_mut(thread) {
                *vm = None;
            }
            trap.context(self.last_words())
        })
    }

    /// The last few lines of the log: a panic takes three.
    fn last_words(&self) -> String {
        let log = &self.shared().log;
        let lines: Vec<&str> = log.iter().rev().take(3).rev().map(|line| line.message.as_str()).collect();
        format!("logged last: {}", lines.join(" | "))
    }
}

/// A request that arrived, and how the module handled it; [`WasmHost::end`] ends it.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// The worker that it is on.
    pub worker: usize,
    /// The id of its context.
    pub context: u32,
    /// The request's headers after `on_request_headers`, in order.
    pub headers: Vec<Header>,
    /// Whether the module let it continue instead of pausing it.
    pub goes_on: bool,
    /// The response that the module sent instead of the upstream.
    pub local_response: Option<LocalResponse>,
}

impl Exchange {
    /// The first value of a header, bytes that are not UTF-8 replaced.
    pub fn header(&self, name: &str) -> Option<String> {
        let (_, value) = self.headers.iter().find(|(other, _)| other == name.as_bytes())?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// The version that the module chose.
    pub fn version(&self) -> Option<String> {
        self.header(crate::bootstrap::VERSION_HEADER)
    }
}

/// A response by the module itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalResponse {
    /// The status.
    pub status: u32,
    /// The headers.
    pub headers: Vec<Header>,
    /// The body.
    pub body: Vec<u8>,
}

/// The end of an exchange.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    status: Option<u16>,
    headers: Vec<Header>,
    body: u32,
    trailers: Vec<Header>,
    flags: i64,
    properties: Vec<(String, Vec<u8>)>,
}

impl Ending {
    /// With a response of this status, from the upstream or from Envoy itself.
    pub fn status(status: u16) -> Self {
        Self { status: Some(status), ..Self::default() }
    }

    /// Without a response: the client disconnected (`response.flags` 16384, `response.code` absent).
    pub fn client_gone() -> Self {
        Self::default().flags(16_384)
    }

    /// With Envoy's `response.flags`: 4 upstream timeout, 32 connect failure, 64 connection terminated, 8388608 broke
    /// off within the body.
    pub fn flags(mut self, flags: i64) -> Self {
        self.flags = flags;
        self
    }

    /// Adds a header of the response.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.as_bytes().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Adds a body of this many bytes, in one piece.
    pub fn body(mut self, size: u32) -> Self {
        self.body = size;
        self
    }

    /// Adds a trailer of the response.
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.trailers.push((name.as_bytes().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Adds a property for `on_log`, as bytes; dots separate the elements of the path.
    pub fn property(mut self, path: &str, value: impl Into<Vec<u8>>) -> Self {
        self.properties.push((path.to_owned(), value.into()));
        self
    }

    /// Adds an integer property, such as `request.duration` in nanoseconds: eight bytes, little-endian.
    pub fn integer(self, path: &str, value: i64) -> Self {
        self.property(path, value.to_le_bytes())
    }
}

/// A callout that the module made.
#[derive(Clone, Debug)]
pub struct Callout {
    /// The thread whose VM made it.
    pub vm: usize,
    /// The cluster that it calls.
    pub cluster: String,
    /// Its headers, pseudo-headers included.
    pub headers: Vec<Header>,
    /// Its body.
    pub body: Vec<u8>,
    /// Its timeout.
    pub timeout: Duration,
    /// When it was made.
    pub sent: Duration,
    number: u64,
    root: u32,
    token: u32,
}

impl Callout {
    /// The first value of a header, such as `:path`.
    pub fn header(&self, name: &str) -> Option<String> {
        let (_, value) = self.headers.iter().find(|(other, _)| other == name.as_bytes())?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// The response to a callout.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    headers: Vec<Header>,
    body: Vec<u8>,
    trailers: Vec<Header>,
    failed: bool,
}

impl Answer {
    /// A response with this status and body. A dead server is an ordinary 503, a timeout a 504.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let headers = vec![(b":status".to_vec(), status.to_string().into_bytes())];
        Self { headers, body: body.into(), ..Self::default() }
    }

    /// A response that broke off: the module receives no headers at all, and reading one is an error.
    pub fn broken() -> Self {
        Self { failed: true, ..Self::default() }
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.as_bytes().to_vec(), value.as_ref().to_vec()));
        self
    }
}

/// A line that a module logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// The thread whose VM logged it; the canary's are the main thread's.
    pub vm: usize,
    /// Its level.
    pub level: Level,
    /// Its message.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rejects an empty configuration, ticks every second, strips `x-bad` and sets `x-v: 1`, counts the ends of
    /// exchanges under `n`, traps on requests with nine headers, calls the controller on each tick and logs the
    /// responses.
    const MODULE: &str = include_str!("module.wat");

    const REQUEST: [(&str, &str); 3] = [(":path", "/"), ("X-Bad", "forged"), ("x-bad", "again")];

    fn configured(workers: usize) -> WasmHost {
        let mut host = WasmHost::with_module(MODULE.as_bytes(), workers).unwrap();
        assert!(host.configure("{}").unwrap());
        host
    }

    #[test]
    fn a_refused_configuration_leaves_the_old_one_in_force() {
        let mut host = WasmHost::with_module(MODULE.as_bytes(), 1).unwrap();
        assert!(!host.configure("").unwrap());
        assert!(host.request(1, &REQUEST).is_err(), "there is no VM yet");
        assert!(host.configure("{}").unwrap());
        assert!(!host.configure("").unwrap());
        assert!(host.request(1, &REQUEST).is_ok());
    }

    #[test]
    fn a_request_is_changed_and_its_end_is_counted_over_all_workers() {
        let mut host = configured(2);
        for worker in [1, 2] {
            let exchange = host.request(worker, &REQUEST).unwrap();
            assert_eq!((exchange.header("x-bad"), exchange.header("x-v")), (None, Some("1".into())));
            assert!(exchange.goes_on);
            host.end(exchange, &Ending::status(200)).unwrap();
        }
        host.malformed(1, &Ending::status(400)).unwrap();
        assert_eq!(host.metric("n"), Some(3));
        assert_eq!(host.calls("proxy_remove_header_map_value"), 2);
    }

    #[test]
    fn host_calls_fail_when_told_to() {
        let mut host = configured(1);
        host.fail_times("proxy_remove_header_map_value", Status::InternalFailure, 1);
        assert_eq!(host.request(1, &REQUEST).unwrap().header("x-bad"), Some("forged".into()));
        assert_eq!(host.request(1, &REQUEST).unwrap().header("x-bad"), None);
    }

    #[test]
    fn a_trap_ends_the_vm_until_it_is_reloaded() {
        let mut host = configured(2);
        let long = [("a", ""); 9];
        let error = host.request(1, &long).unwrap_err();
        assert!(format!("{error:#}").contains("proxy_on_request_headers trapped"), "{error:#}");
        assert!(host.request(1, &REQUEST).is_err());
        assert!(host.request(2, &REQUEST).is_ok());
        assert!(host.reload(1).unwrap());
        assert!(host.request(1, &REQUEST).is_ok());
    }

    #[test]
    fn ticks_come_in_time_and_their_callouts_are_answered() {
        let mut host = configured(1);
        host.advance(Duration::from_millis(2_500)).unwrap();
        let callouts = host.take_callouts();
        let made: Vec<_> = callouts.iter().map(|callout| (callout.vm, callout.header(":path").unwrap())).collect();
        assert_eq!(made, [(0, "/".into()), (1, "/".into()), (0, "/".into()), (1, "/".into())]);
        host.answer(&callouts[1], &Answer::new(200, "body")).unwrap();
        assert_eq!(host.log().last().map(|line| (line.vm, line.message.as_str())), Some((1, "body")));
        host.remove_cluster(CONTROLLER_CLUSTER);
        host.advance(Duration::from_secs(1)).unwrap();
        assert!(host.take_callouts().is_empty());
    }
}
