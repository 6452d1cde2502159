//! One VM: the instance of the module, its contexts, and the callbacks in Envoy's order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use wasmi::{Engine, FuncType, Instance, Linker, Module, Store, Val};

use super::abi::{Header, Map, property_path};
use super::hostile::Fault;
use super::shared::{Kind, Shared};
use super::{Answer, Ending, LocalResponse, calls, wasi};
use crate::bootstrap::VERSION_HEADER;

/// The state of one VM for host calls.
#[derive(Debug)]
pub(super) struct State {
    pub(super) shared: Arc<Mutex<Shared>>,
    /// The thread that it belongs to, for log lines and callouts; a reloaded VM keeps it.
    pub(super) thread: usize,
    /// The number of the VM; a reloaded VM gets a new one.
    pub(super) number: u64,
    /// The context that host calls are made for.
    pub(super) current: u32,
    pub(super) roots: BTreeMap<u32, Root>,
    pub(super) streams: BTreeMap<u32, Stream>,
    /// Metrics by their ids in this VM.
    pub(super) metrics: Vec<(Kind, String)>,
    pub(super) callout: Option<Answer>,
    pub(super) last_token: u32,
    /// The fault of the current host call.
    pub(super) fault: Option<Fault>,
}

/// A root context: one plugin configuration.
#[derive(Debug, Default)]
pub(super) struct Root {
    pub(super) configuration: Vec<u8>,
    pub(super) tick: Option<Tick>,
}

/// A root context's timer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tick {
    pub(super) period: Duration,
    pub(super) due: Duration,
}

/// An HTTP context: one exchange.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) root: u32,
    pub(super) request: Option<Vec<Header>>,
    pub(super) response: Option<Vec<Header>>,
    pub(super) trailers: Option<Vec<Header>>,
    pub(super) properties: BTreeMap<Vec<u8>, Vec<u8>>,
    /// In `on_log` a missing map is `NotFound` and no map may be changed.
    pub(super) logging: bool,
    pub(super) local_response: Option<LocalResponse>,
}

impl Stream {
    /// A property of the exchange; `request.headers.NAME` is all values of a request header, joined, and
    /// `xds.cluster_name` the version's cluster, unless the test overrides it.
    pub(super) fn property(&self, path: &[u8]) -> Option<Vec<u8>> {
        if path == property_path("xds.cluster_name") {
            return self.properties.get(path).cloned().or_else(|| self.cluster());
        }
        let Some(name) = path.strip_prefix(b"request\0headers\0") else {
            return self.properties.get(path).cloned();
        };
        let named = self.request.iter().flatten().filter(|(other, _)| other == name);
        let values: Vec<&[u8]> = named.map(|(_, value)| value.as_slice()).collect();
        (!values.is_empty()).then(|| values.join(&b","[..]))
    }
}

impl Stream {
    /// The cluster of an answered request, with a route for each version and a default one.
    fn cluster(&self) -> Option<Vec<u8>> {
        self.response.as_ref()?;
        let mut headers = self.request.as_ref()?.iter();
        let version = headers.find(|(name, _)| name == VERSION_HEADER.as_bytes());
        Some(version.map_or(b"default".to_vec(), |(_, version)| version.clone()))
    }
}

impl State {
    pub(super) fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stream(&mut self) -> Option<&mut Stream> {
        self.streams.get_mut(&self.current)
    }

    /// The root context of the current context.
    pub(super) fn root(&self) -> u32 {
        self.streams.get(&self.current).map_or(self.current, |stream| stream.root)
    }

    pub(super) fn map(&mut self, map: Map) -> Option<&mut Vec<Header>> {
        match map {
            Map::CalloutHeaders => {
                self.callout.as_mut().filter(|answer| !answer.failed).map(|answer| &mut answer.headers)
            }
            Map::CalloutTrailers => self.callout.as_mut().map(|answer| &mut answer.trailers),
            Map::RequestHeaders => self.stream()?.request.as_mut(),
            Map::ResponseHeaders => self.stream()?.response.as_mut(),
            Map::ResponseTrailers => self.stream()?.trailers.as_mut(),
            Map::RequestTrailers => None,
        }
    }

    pub(super) fn is_logging(&self) -> bool {
        self.streams.get(&self.current).is_some_and(|stream| stream.logging)
    }
}

/// A VM with its root contexts.
pub(super) struct Vm {
    store: Store<State>,
    instance: Instance,
    last_context: u32,
    /// The root context of new exchanges.
    root: u32,
}

impl Vm {
    /// A VM without a root context.
    pub(super) fn new(
        engine: &Engine,
        module: &Module,
        shared: Arc<Mutex<Shared>>,
        thread: usize,
        number: u64,
    ) -> anyhow::Result<Self> {
        let state = State {
            shared,
            thread,
            number,
            current: 0,
            roots: BTreeMap::new(),
            streams: BTreeMap::new(),
            metrics: Vec::new(),
            callout: None,
            last_token: 0,
            fault: None,
        };
        let mut store = Store::new(engine, state);
        let mut linker = Linker::new(engine);
        calls::define(&mut linker)?;
        wasi::define(&mut linker)?;
        let instance = linker.instantiate_and_start(&mut store, module).context("the module cannot be linked")?;
        let mut vm = Self { store, instance, last_context: 0, root: 0 };
        vm.call("_initialize", &[])?;
        Ok(vm)
    }

    pub(super) fn number(&self) -> u64 {
        self.store.data().number
    }

    /// Creates a root context with this configuration: `false` if the module rejects it.
    pub(super) fn configure(&mut self, configuration: &[u8]) -> anyhow::Result<bool> {
        let root = self.new_context();
        let state = self.store.data_mut();
        state.roots.insert(root, Root { configuration: configuration.to_vec(), tick: None });
        self.call_for(root, "proxy_on_context_create", &[root, 0])?;
        let started = self.call_for(root, "proxy_on_vm_start", &[root, 0])?.unwrap_or(1) != 0;
        let size = configuration.len() as u32;
        let accepted = started && self.call_for(root, "proxy_on_configure", &[root, size])?.unwrap_or(1) != 0;
        if accepted {
            let before = std::mem::replace(&mut self.root, root);
            self.retire(before)?;
        } else {
            self.store.data_mut().roots.remove(&root);
        }
        Ok(accepted)
    }

    /// Ends a root context that no exchange uses any more.
    fn retire(&mut self, root: u32) -> anyhow::Result<()> {
        let state = self.store.data();
        let used = root == self.root || state.streams.values().any(|stream| stream.root == root);
        if used || !state.roots.contains_key(&root) {
            return Ok(());
        }
        self.delete(root)?;
        self.store.data_mut().roots.remove(&root);
        Ok(())
    }

    fn delete(&mut self, context: u32) -> anyhow::Result<()> {
        let done = self.call_for(context, "proxy_on_done", &[context])?.unwrap_or(1);
        ensure!(done != 0, "the module puts off the end of context {context}: this host does not do that");
        self.call_for(context, "proxy_on_delete", &[context])?;
        Ok(())
    }

    /// Creates an HTTP context, without any callback for its headers.
    pub(super) fn open(&mut self) -> anyhow::Result<u32> {
        let (context, root) = (self.new_context(), self.root);
        ensure!(root != 0, "no configuration is in force");
        let properties = Ending::default().properties().collect();
        self.store.data_mut().streams.insert(context, Stream { root, properties, ..Stream::default() });
        self.call_for(context, "proxy_on_context_create", &[context, root])?;
        Ok(context)
    }

    /// The request's headers arrive. Returns whether the request continues at once.
    pub(super) fn request(&mut self, context: u32, headers: Vec<Header>) -> anyhow::Result<bool> {
        let count = headers.len() as u32;
        self.stream(context)?.request = Some(headers);
        let action = self.call_for(context, "proxy_on_request_headers", &[context, count, 1])?;
        Ok(action.unwrap_or(0) == 0)
    }

    pub(super) fn stream(&mut self, context: u32) -> anyhow::Result<&mut Stream> {
        self.store.data_mut().streams.get_mut(&context).context("the exchange is over")
    }

    /// The response arrives, if any, then the exchange ends: log, done, delete, in Envoy's order.
    pub(super) fn end(&mut self, context: u32, ending: &Ending) -> anyhow::Result<Option<Vec<Header>>> {
        let stream = self.stream(context)?;
        let root = stream.root;
        stream.properties.extend(ending.properties());
        if let Some(headers) = ending.headers() {
            stream.response = Some(headers.clone());
            // A response with flags, after a status of its own, is one that broke off.
            let last = u32::from(ending.trailers.is_empty() && ending.flags == 0);
            let is_all = last & u32::from(ending.body == 0);
            self.call_for(context, "proxy_on_response_headers", &[context, headers.len() as u32, is_all])?;
            if ending.body > 0 {
                self.call_for(context, "proxy_on_response_body", &[context, ending.body, last])?;
            }
            if !ending.trailers.is_empty() {
                self.stream(context)?.trailers = Some(ending.trailers.clone());
                let count = ending.trailers.len() as u32;
                self.call_for(context, "proxy_on_response_trailers", &[context, count])?;
            }
        }
        self.stream(context)?.logging = true;
        self.call_for(context, "proxy_on_log", &[context])?;
        self.delete(context)?;
        let stream = self.store.data_mut().streams.remove(&context);
        self.retire(root)?;
        Ok(stream.and_then(|stream| stream.response))
    }

    /// The first tick due at `end` or earlier: its time and its root context.
    pub(super) fn due(&self, end: Duration) -> Option<(Duration, u32)> {
        let roots = self.store.data().roots.iter();
        roots.filter_map(|(&root, state)| Some((state.tick?.due, root))).filter(|(due, _)| *due <= end).min()
    }

    /// `on_tick` of one root context; the next one is due a period later.
    pub(super) fn tick(&mut self, root: u32) -> anyhow::Result<()> {
        let now = self.store.data().shared().uptime;
        if let Some(Root { tick: Some(tick), .. }) = self.store.data_mut().roots.get_mut(&root) {
            tick.due = now + tick.period;
        }
        self.call_for(root, "proxy_on_tick", &[root]).map(drop)
    }

    /// The active root context, and its tick period if it has one.
    pub(super) fn root(&self) -> (u32, Option<Duration>) {
        let root = self.store.data().roots.get(&self.root);
        (self.root, root.and_then(|root| root.tick).map(|tick| tick.period))
    }

    pub(super) fn queue_ready(&mut self, root: u32, queue: u32) -> anyhow::Result<()> {
        if !self.store.data().roots.contains_key(&root) {
            return Ok(());
        }
        self.call_for(root, "proxy_on_queue_ready", &[root, queue]).map(drop)
    }

    /// The answer to a callout, or its failure, which comes with all numbers zero.
    pub(super) fn answer(&mut self, root: u32, token: u32, answer: &Answer) -> anyhow::Result<()> {
        let counts = [answer.headers.len(), answer.body.len(), answer.trailers.len()].map(|count| count as u32);
        let [headers, body, trailers] = if answer.failed { [0; 3] } else { counts };
        self.store.data_mut().callout = Some(answer.clone());
        let outcome = self.call_for(root, "proxy_on_http_call_response", &[root, token, headers, body, trailers]);
        self.store.data_mut().callout = None;
        outcome.map(drop)
    }

    fn new_context(&mut self) -> u32 {
        self.last_context += 1;
        self.last_context
    }

    fn call_for(&mut self, context: u32, name: &str, arguments: &[u32]) -> anyhow::Result<Option<u32>> {
        self.store.data_mut().current = context;
        let outcome = self.call(name, arguments);
        self.store.data_mut().current = 0;
        outcome
    }

    /// Calls any export with any arguments, in the context that the first of them names.
    pub(super) fn callback(&mut self, name: &str, arguments: &[u32]) -> anyhow::Result<Option<u32>> {
        self.call_for(arguments.first().copied().unwrap_or_default(), name, arguments)
    }

    /// Pages of memory, 64 KiB each.
    pub(super) fn pages(&self) -> u64 {
        let memory = self.instance.get_memory(&self.store, "memory");
        memory.map_or(0, |memory| memory.size(&self.store))
    }

    /// Calls an export with as many of the arguments as it takes; `None` if there is no such export.
    fn call(&mut self, name: &str, arguments: &[u32]) -> anyhow::Result<Option<u32>> {
        let Some(function) = self.instance.get_func(&self.store, name) else {
            return Ok(None);
        };
        let (arguments, mut results) = values(&function.ty(&self.store), arguments);
        self.store.set_fuel(FUEL)?;
        function.call(&mut self.store, &arguments, &mut results).map_err(|trap| {
            let thread = self.store.data().thread;
            anyhow!("thread {thread}: {name} trapped: {trap}")
        })?;
        Ok(results.first().and_then(Val::i32).map(i32::cast_unsigned))
    }
}

/// The fuel of one callback; thousands of times what any needs, so that an endless one is detected.
const FUEL: u64 = 2_000_000_000;

/// As many arguments as a function takes (0 for missing ones), and space for its results.
pub(super) fn values(signature: &FuncType, arguments: &[u32]) -> (Vec<Val>, Vec<Val>) {
    let given = arguments.iter().copied().chain(std::iter::repeat(0)).take(signature.params().len());
    let arguments = given.map(|value| Val::I32(value.cast_signed())).collect();
    (arguments, vec![Val::I32(0); signature.results().len()])
}

impl Ending {
    /// The properties that `on_log` can read.
    fn properties(&self) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
        let own = self.properties.iter().map(|(path, value)| (property_path(path), value.clone()));
        let code = self.status.map(|status| (property_path("response.code"), i64::from(status).to_le_bytes().to_vec()));
        let flags = (property_path("response.flags"), self.flags.to_le_bytes().to_vec());
        code.into_iter().chain([flags]).chain(own)
    }

    /// The answer's headers with their `:status`.
    fn headers(&self) -> Option<Vec<Header>> {
        let status = (b":status".to_vec(), self.status?.to_string().into_bytes());
        Some([status].into_iter().chain(self.headers.iter().cloned()).collect())
    }
}
