//! A proxy in memory: a second shim, beside the one for Envoy. It has properties, headers, shared data with compare and
//! swap, queues, ticks, metrics and HTTP callouts, with a clock that the test sets and responses that the test gives. On
//! request it answers host calls with nonsense.

use crate::header_pairs;
use crate::header_pairs::HeaderPairs;
use crate::host::{HeaderMap, Host, MetricKind};
use crate::vm::Vm;
use fastrand::Rng;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Once;
use std::time::Duration;

pub type Header = (Vec<u8>, Vec<u8>);

/// The name of the controller's cluster, the only one that there is.
pub const CONTROLLER: &str = "tideshift_controller";

/// What all VMs of the proxy share.
#[derive(Default)]
struct World {
    now: u64,
    shared: BTreeMap<String, (Vec<u8>, u32)>,
    queues: Vec<Queue>,
    wakes: VecDeque<u32>,
    /// By name; the id is the index.
    metrics: Vec<(String, i64)>,
    calls: Vec<Call>,
    tokens: u32,
    /// Run before the next conditional write of a key that ends like this.
    before_write: Option<(String, Box<dyn FnOnce()>)>,
    /// Answers so many of a hundred host calls with nonsense.
    storm: Option<(u32, Rng)>,
}

struct Queue {
    name: String,
    vm: usize,
    root: u32,
    items: usize,
}

/// A callout.
#[derive(Debug, Clone)]
pub struct Call {
    pub vm: usize,
    root: u32,
    token: u32,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// One VM of the proxy, as the filter sees it.
#[derive(Clone)]
pub struct FakeHost {
    world: Rc<RefCell<World>>,
    vm: usize,
    context: Rc<RefCell<Context>>,
}

/// What the callback that is running can see.
#[derive(Default)]
struct Context {
    root: u32,
    buffer: Vec<u8>,
    maps: BTreeMap<u32, Vec<Header>>,
    properties: BTreeMap<String, Vec<u8>>,
    tick_period: Option<Duration>,
}

impl FakeHost {
    /// Whether the next answer is nonsense.
    fn lies(&self) -> bool {
        self.world.borrow_mut().storm.as_mut().is_some_and(|(percent, random)| random.u32(..100) < *percent)
    }

    /// Bytes without a request.
    fn nonsense(&self) -> Option<Vec<u8>> {
        let mut world = self.world.borrow_mut();
        let (_, random) = world.storm.as_mut()?;
        let size = if random.bool() { random.usize(..12) } else { random.usize(..300) };
        random.bool().then(|| std::iter::repeat_with(|| random.u8(..)).take(size).collect())
    }

    fn odd_number(&self) -> u64 {
        let mut world = self.world.borrow_mut();
        let Some((_, random)) = world.storm.as_mut() else { return 0 };
        match random.u32(..4) {
            0 => 0,
            1 => u64::MAX,
            2 => random.u64(..),
            _ => random.u64(..9),
        }
    }

    fn returns(&self, truth: impl FnOnce() -> Option<Vec<u8>>) -> Option<Vec<u8>> {
        if self.lies() { self.nonsense() } else { truth() }
    }

    fn change_headers(&self, map: HeaderMap, change: impl FnOnce(&mut Vec<Header>)) {
        change(self.context.borrow_mut().maps.entry(map as u32).or_default());
    }
}

impl Host for FakeHost {
    type Bytes = Vec<u8>;
    type Headers = HeaderPairs<Vec<u8>>;

    fn now(&self) -> u64 {
        if self.lies() { self.odd_number() } else { self.world.borrow().now }
    }

    fn seed(&self) -> u64 {
        self.world.borrow().now ^ self.vm as u64
    }

    fn tick_every(&self, period: Duration) {
        self.context.borrow_mut().tick_period = Some(period);
    }

    fn plugin_configuration(&self, size: usize) -> Option<Vec<u8>> {
        self.returns(|| self.context.borrow().buffer.get(..size).map(<[u8]>::to_vec))
    }

    fn property(&self, path: &str) -> Option<Vec<u8>> {
        self.returns(|| {
            let context = self.context.borrow();
            let joined = |name: &str| {
                let headers = context.maps.get(&(HeaderMap::Request as u32))?;
                let values: Vec<&[u8]> =
                    headers.iter().filter(|(n, _)| n == name.as_bytes()).map(|(_, value)| value.as_slice()).collect();
                (!values.is_empty()).then(|| values.join(&b","[..]))
            };
            match path.strip_prefix("request\0headers\0") {
                Some(name) => joined(name),
                None => context.properties.get(&path.replace('\0', ".")).cloned(),
            }
        })
    }

    fn headers(&self, map: HeaderMap) -> HeaderPairs<Vec<u8>> {
        let pairs = self.returns(|| {
            self.context.borrow().maps.get(&(map as u32)).map(|headers| header_pairs::encode(headers.as_slice()))
        });
        HeaderPairs(pairs.unwrap_or_default())
    }

    fn header(&self, map: HeaderMap, name: &str) -> Option<Vec<u8>> {
        self.returns(|| {
            let context = self.context.borrow();
            let mut headers = context.maps.get(&(map as u32))?.iter();
            headers.find(|(n, _)| n == name.as_bytes()).map(|(_, value)| value.clone())
        })
    }

    fn set_header(&self, map: HeaderMap, name: &str, value: &str) {
        self.remove_header(map, name.as_bytes());
        self.add_header(map, name, value);
    }

    fn add_header(&self, map: HeaderMap, name: &str, value: &str) {
        self.change_headers(map, |headers| headers.push((name.into(), value.into())));
    }

    fn remove_header(&self, map: HeaderMap, name: &[u8]) {
        self.change_headers(map, |headers| headers.retain(|(n, _)| n != name));
    }

    fn response_body(&self, size: usize) -> Vec<u8> {
        self.plugin_configuration(size).unwrap_or_default()
    }

    fn shared(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        let known = self.world.borrow().shared.get(key).cloned();
        let version = known.as_ref().map(|(_, version)| *version);
        let value = self.returns(|| known.map(|(value, _)| value)).filter(|value| !value.is_empty())?;
        Some((value, version.unwrap_or_else(|| self.odd_number() as u32)))
    }

    fn replace_shared(&self, key: &str, value: &[u8], version: u32) -> bool {
        let mut world = self.world.borrow_mut();
        if version != 0
            && let Some((_, before)) = world.before_write.take_if(|(suffix, _)| key.ends_with(suffix.as_str()))
        {
            drop(world);
            before();
            world = self.world.borrow_mut();
        }
        let known = world.shared.get(key).map_or(0, |(_, version)| *version);
        let fits = version == 0 || known == version;
        if fits {
            world.shared.insert(key.to_owned(), (value.to_vec(), known + 1));
        }
        drop(world);
        fits && !self.lies()
    }

    fn register_queue(&self, name: &str) -> Option<u32> {
        let (vm, root) = (self.vm, self.context.borrow().root);
        let mut world = self.world.borrow_mut();
        let at = world.queues.iter().position(|queue| queue.name == name).unwrap_or_else(|| {
            world.queues.push(Queue { name: name.to_owned(), vm, root, items: 0 });
            world.queues.len() - 1
        });
        (world.queues[at].vm, world.queues[at].root) = (vm, root);
        Some(at as u32)
    }

    fn enqueue(&self, queue: u32) {
        let mut world = self.world.borrow_mut();
        if let Some(known) = world.queues.get_mut(queue as usize) {
            known.items += 1;
            world.wakes.push_back(queue);
        }
    }

    fn dequeue(&self, queue: u32) -> bool {
        if self.lies() {
            return true;
        }
        let mut world = self.world.borrow_mut();
        let Some(queue) = world.queues.get_mut(queue as usize).filter(|queue| queue.items > 0) else { return false };
        queue.items -= 1;
        true
    }

    fn define_metric(&self, _: MetricKind, name: &str) -> Option<u32> {
        if self.lies() {
            return None;
        }
        let mut world = self.world.borrow_mut();
        let at = world.metrics.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            world.metrics.push((name.to_owned(), 0));
            world.metrics.len() - 1
        });
        Some(at as u32)
    }

    fn increment_metric(&self, metric: u32, amount: i64) {
        self.world.borrow_mut().metrics[metric as usize].1 += amount;
    }

    fn record_metric(&self, metric: u32, value: u64) {
        self.world.borrow_mut().metrics[metric as usize].1 = value as i64;
    }

    fn http_call(&self, cluster: &str, headers: &[(&str, &str)], body: &[u8], _: Duration) -> Option<u32> {
        if cluster != CONTROLLER || self.lies() {
            return None;
        }
        let mut world = self.world.borrow_mut();
        world.tokens += 1;
        let headers: Vec<(String, String)> = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let path = headers.iter().find(|(name, _)| name == ":path").map(|(_, path)| path.clone()).unwrap();
        let root = self.context.borrow().root;
        let call = Call { vm: self.vm, root, token: world.tokens, path, headers, body: body.to_vec() };
        world.calls.push(call);
        Some(world.tokens)
    }

    fn http_call_response_body(&self, size: usize) -> Vec<u8> {
        self.plugin_configuration(size).unwrap_or_default()
    }
}

/// A thread of the proxy with its VM.
#[derive(Clone)]
pub struct Thread {
    vm: Rc<RefCell<Vm<FakeHost>>>,
    host: FakeHost,
    /// The root context of the configuration in force; 0 if there is none.
    root: u32,
}

impl Thread {
    /// Runs a callback of the root context.
    fn on_root<T>(&self, act: impl FnOnce(&mut Vm<FakeHost>, u32) -> T) -> T {
        self.host.context.borrow_mut().root = self.root;
        act(&mut self.vm.borrow_mut(), self.root)
    }

    pub fn tick(&self) {
        self.on_root(Vm::tick);
    }

    /// Takes the number of the next report, as another VM would.
    pub fn take_report_number(&self) -> u64 {
        let world = &mut *self.host.world.borrow_mut();
        let (value, version) = world.shared.iter_mut().find(|(key, _)| key.ends_with("/reports")).unwrap().1;
        let taken = u64::from_le_bytes(value.as_slice().try_into().unwrap()) + 1;
        (*value, *version) = (taken.to_le_bytes().to_vec(), *version + 1);
        taken
    }

    /// Its configuration is replaced, or the proxy ends.
    pub fn done(&self) {
        self.on_root(Vm::done);
    }
}

/// A request that a VM has seen.
pub struct Exchange {
    vm: usize,
    context: u32,
    pub headers: Vec<Header>,
}

impl Exchange {
    pub fn header(&self, name: &str) -> Option<String> {
        let found = self.headers.iter().find(|(n, _)| n == name.as_bytes());
        found.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    }

    pub fn version(&self) -> Option<String> {
        self.header("x-tideshift-version")
    }
}

/// How the response to a request looks.
#[derive(Debug, Clone, Default)]
pub struct Response {
    pub status: &'static str,
    pub headers: Vec<(&'static str, &'static str)>,
    pub trailers: Vec<(&'static str, &'static str)>,
    pub flags: u64,
    /// The cluster that answered, if that is not the version's.
    pub cluster: Option<&'static str>,
}

impl Response {
    pub fn status(status: &'static str) -> Self {
        Self { status, ..Self::default() }
    }
}

/// The proxy.
pub struct Proxy {
    world: Rc<RefCell<World>>,
    pub threads: Vec<Thread>,
    /// The threads that stand still.
    pub dead: Vec<usize>,
    polls: Vec<Call>,
    /// All reports.
    pub reports: Vec<Value>,
    contexts: u32,
}

fn headers(list: &[(impl AsRef<[u8]>, impl AsRef<[u8]>)]) -> Vec<Header> {
    list.iter().map(|(name, value)| (name.as_ref().to_vec(), value.as_ref().to_vec())).collect()
}

impl Proxy {
    /// With a main thread, which is thread 0, and so many workers.
    pub fn new(workers: usize) -> Self {
        catch_log();
        let world = Rc::new(RefCell::new(World { now: 1_767_225_600_000_000_000, ..World::default() }));
        let thread = |vm| {
            let host = FakeHost { world: world.clone(), vm, context: Rc::default() };
            let node = [("xds.node.id", "envoy 1"), ("source.address", "10.0.0.1:4000")];
            let properties = node.map(|(path, value)| (path.to_owned(), value.as_bytes().to_vec()));
            host.context.borrow_mut().properties.extend(properties);
            Thread { vm: Rc::new(RefCell::new(Vm::new(host.clone()))), host, root: 0 }
        };
        let threads = (0..=workers).map(thread).collect();
        Self { world, threads, dead: Vec::new(), polls: Vec::new(), reports: Vec::new(), contexts: 0 }
    }

    /// With a configuration in force on all threads, half a second later.
    pub fn with(workers: usize, configuration: &Value) -> Self {
        let mut proxy = Self::new(workers);
        assert!(proxy.configure(configuration), "{:?}", take_log());
        proxy.pass(500);
        proxy
    }

    /// Gives each VM a new root context with this configuration; `false` if they refuse it.
    pub fn configure(&mut self, configuration: &Value) -> bool {
        let json = configuration.to_string().into_bytes();
        let mut is_taken = true;
        for at in 0..self.threads.len() {
            self.contexts += 1;
            let (root, thread) = (self.contexts, &mut self.threads[at]);
            {
                let context = &mut *thread.host.context.borrow_mut();
                (context.root, context.buffer) = (root, json.clone());
            }
            let is_new = {
                let vm = &mut *thread.vm.borrow_mut();
                vm.context_created(root, 0);
                vm.configure(root, json.len())
            };
            if is_new {
                let before = std::mem::replace(&mut thread.root, root);
                thread.vm.borrow_mut().done(before);
            }
            is_taken &= is_new;
        }
        is_taken
    }

    /// Lets time pass by steps of 100 ms, with a tick of each thread that does not stand still.
    pub fn pass(&mut self, millis: u64) {
        for _ in 0..millis / 100 {
            self.world.borrow_mut().now += 100_000_000;
            for at in 0..self.threads.len() {
                if !self.dead.contains(&at) {
                    self.threads[at].tick();
                    self.wake();
                }
            }
        }
    }

    /// Calls the VMs whose queues were filled.
    pub fn wake(&mut self) {
        for _ in 0..1_000 {
            let Some(queue) = self.world.borrow_mut().wakes.pop_front() else { return };
            let (vm, root) = {
                let world = self.world.borrow();
                (world.queues[queue as usize].vm, world.queues[queue as usize].root)
            };
            if !self.dead.contains(&vm) {
                let thread = &self.threads[vm];
                thread.host.context.borrow_mut().root = root;
                thread.vm.borrow_mut().queue_ready(root, queue);
            }
        }
    }

    /// A request arrives on a thread.
    pub fn request(&mut self, vm: usize, list: &[(impl AsRef<[u8]>, impl AsRef<[u8]>)]) -> Exchange {
        self.contexts += 1;
        let (context, thread) = (self.contexts, &self.threads[vm]);
        thread.host.context.borrow_mut().maps.insert(HeaderMap::Request as u32, headers(list));
        {
            let vm = &mut *thread.vm.borrow_mut();
            vm.context_created(context, thread.root);
            vm.request_headers(context);
        }
        let headers = thread.host.context.borrow().maps[&(HeaderMap::Request as u32)].clone();
        Exchange { vm, context, headers }
    }

    /// The response passes and the request ends; the response's headers as the client gets them.
    pub fn finish(&mut self, exchange: &Exchange, response: &Response) -> Vec<Header> {
        let thread = &self.threads[exchange.vm];
        let mut list = headers(&[(":status", response.status)]);
        list.extend(headers(&response.headers));
        {
            let context = &mut *thread.host.context.borrow_mut();
            context.maps.insert(HeaderMap::Request as u32, exchange.headers.clone());
            context.maps.insert(HeaderMap::Response as u32, list);
            context.maps.insert(HeaderMap::ResponseTrailers as u32, headers(&response.trailers));
            let cluster = response.cluster.map(str::to_owned).or_else(|| exchange.version()).unwrap_or_default();
            context.properties.insert("xds.cluster_name".to_owned(), cluster.into_bytes());
            context.properties.insert("response.flags".to_owned(), response.flags.to_le_bytes().to_vec());
            context.buffer = b"body".to_vec();
        }
        {
            let vm = &mut *thread.vm.borrow_mut();
            vm.response_headers(exchange.context, false);
            vm.response_body(exchange.context, 4, response.trailers.is_empty());
            if !response.trailers.is_empty() {
                vm.response_trailers(exchange.context);
            }
            vm.done(exchange.context);
        }
        self.wake();
        self.threads[exchange.vm].host.context.borrow().maps[&(HeaderMap::Response as u32)].clone()
    }

    /// The callouts since the last time, those of threads that stand still left out.
    pub fn take_calls(&mut self) -> Vec<Call> {
        let calls = std::mem::take(&mut self.world.borrow_mut().calls);
        calls.into_iter().filter(|call| !self.dead.contains(&call.vm)).collect()
    }

    /// The callouts since the last time: polls are kept, reports answered at once. The last report.
    fn last_report(&mut self) -> Option<Value> {
        let mut report = None;
        for call in self.take_calls() {
            if call.path == "/v1/reports" {
                self.respond(&call, &[(":status", "204")], b"");
                let new: Value = serde_json::from_slice(&call.body).unwrap();
                self.reports.push(new.clone());
                report = Some(new);
            } else {
                self.polls.push(call);
            }
        }
        report
    }

    /// The polls that no test has taken yet.
    pub fn take_polls(&mut self) -> Vec<Call> {
        self.last_report();
        std::mem::take(&mut self.polls)
    }

    /// The one poll that is under way.
    pub fn poll(&mut self) -> Call {
        let mut polls = self.take_polls();
        assert_eq!(polls.len(), 1, "{polls:?}");
        polls.remove(0)
    }

    /// A report of what has been counted by now.
    pub fn report(&mut self) -> Value {
        let mut last = None;
        for _ in 0..15 {
            self.pass(100);
            last = self.last_report().or(last);
        }
        last.expect("a report")
    }

    /// The controller answers a callout.
    pub fn respond(&mut self, call: &Call, list: &[(&str, &str)], body: &[u8]) {
        let thread = &self.threads[call.vm];
        {
            let context = &mut *thread.host.context.borrow_mut();
            context.root = call.root;
            context.maps.insert(HeaderMap::CallResponse as u32, headers(list));
            context.buffer = body.to_vec();
        }
        thread.vm.borrow_mut().http_call_response(call.root, call.token, list.len(), body.len());
        self.wake();
    }

    /// The controller answers a poll with a policy.
    pub fn send(&mut self, poll: &Call, epoch: &str, policy: &Value) {
        self.respond(poll, &[(":status", "200"), ("x-tideshift-epoch", epoch)], policy.to_string().as_bytes());
    }

    /// The version that each worker gives to one more request.
    pub fn versions(&mut self) -> Vec<String> {
        let workers = 1..self.threads.len();
        workers.map(|vm| self.request(vm, &[(":path", "/")]).version().unwrap_or_default()).collect()
    }

    /// A metric whose name contains all of these.
    pub fn metric(&self, parts: &[&str]) -> i64 {
        let world = self.world.borrow();
        let mut found = world.metrics.iter().filter(|(name, _)| parts.iter().all(|part| name.contains(part)));
        let metric = found.next().map(|(_, value)| *value);
        assert!(found.next().is_none(), "several of {parts:?}");
        metric.unwrap_or_default()
    }

    /// The shared value whose key ends like this.
    pub fn shared(&self, suffix: &str) -> Option<Vec<u8>> {
        let world = self.world.borrow();
        world.shared.iter().find(|(key, _)| key.ends_with(suffix)).map(|(_, (value, _))| value.clone())
    }

    /// Fills a shared value, chosen by `at`, with these bytes, as a VM that went wrong would.
    pub fn spoil_shared(&self, at: usize, value: &[u8]) {
        let world = &mut *self.world.borrow_mut();
        let count = world.shared.len().max(1);
        if let Some((bytes, version)) = world.shared.values_mut().nth(at % count) {
            (*bytes, *version) = (value.to_vec(), *version + 1);
        }
    }

    /// Runs something just before the next conditional write of a key that ends like this.
    pub fn before_write(&self, suffix: &str, act: impl FnOnce() + 'static) {
        self.world.borrow_mut().before_write = Some((suffix.to_owned(), Box::new(act)));
    }

    /// Whether what was to run before a write has run.
    pub fn has_raced(&self) -> bool {
        self.world.borrow().before_write.is_none()
    }

    /// Answers so many of a hundred host calls with nonsense; 0: all are right again.
    pub fn storm(&self, percent: u32, seed: u64) {
        self.world.borrow_mut().storm = (percent > 0).then(|| (percent, Rng::with_seed(seed)));
    }

    pub fn set_now(&self, now: u64) {
        self.world.borrow_mut().now = now;
    }

    pub fn tick_period(&self, vm: usize) -> Option<Duration> {
        self.threads[vm].host.context.borrow().tick_period
    }
}

thread_local! {
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// What was logged since the last time, by this test.
pub fn take_log() -> Vec<String> {
    LOG.take()
}

fn catch_log() {
    struct Catch;
    impl log::Log for Catch {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            LOG.with_borrow_mut(|log| log.push(format!("{} {}", record.level(), record.args())));
        }

        fn flush(&self) {}
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Catch).unwrap();
        log::set_max_level(log::LevelFilter::Info);
    });
}
