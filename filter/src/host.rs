//! What this module asks of Envoy: the host calls of proxy-wasm ABI 0.2.1 that it needs, and the memory in which Envoy
//! hands results over.
//!
//! Nothing that the host answers is believed: a status other than 0 is a failure whatever its number, a result counts
//! only if it lies in memory that was lent for it, and results of any size and content are only bytes. Failures are
//! `None`s or nothing at all, since there is nothing that a filter can do about one except go on without.

use std::cell::Cell;
use std::ops::Deref;
use std::time::Duration;

/// The host's functions. All return a status; results come through pointers.
#[allow(unsafe_code)]
mod import {
    #[link(wasm_import_module = "env")]
    unsafe extern "C" {
        pub(super) fn proxy_log(level: u32, message: *const u8, size: usize) -> u32;
        pub(super) fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
        pub(super) safe fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
        pub(super) fn proxy_get_buffer_bytes(
            buffer: u32,
            start: usize,
            length: usize,
            data: *mut *const u8,
            size: *mut usize,
        ) -> u32;
        pub(super) fn proxy_get_header_map_pairs(map: u32, data: *mut *const u8, size: *mut usize) -> u32;
        pub(super) fn proxy_get_header_map_value(
            map: u32,
            name: *const u8,
            name_size: usize,
            data: *mut *const u8,
            size: *mut usize,
        ) -> u32;
        pub(super) fn proxy_add_header_map_value(
            map: u32,
            name: *const u8,
            name_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
        pub(super) fn proxy_replace_header_map_value(
            map: u32,
            name: *const u8,
            name_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
        pub(super) fn proxy_remove_header_map_value(map: u32, name: *const u8, name_size: usize) -> u32;
        pub(super) fn proxy_get_property(
            path: *const u8,
            path_size: usize,
            data: *mut *const u8,
            size: *mut usize,
        ) -> u32;
        pub(super) fn proxy_get_shared_data(
            key: *const u8,
            key_size: usize,
            data: *mut *const u8,
            size: *mut usize,
            cas: *mut u32,
        ) -> u32;
        pub(super) fn proxy_set_shared_data(
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
            cas: u32,
        ) -> u32;
        pub(super) fn proxy_register_shared_queue(name: *const u8, name_size: usize, id: *mut u32) -> u32;
        pub(super) fn proxy_dequeue_shared_queue(id: u32, data: *mut *const u8, size: *mut usize) -> u32;
        pub(super) fn proxy_enqueue_shared_queue(id: u32, value: *const u8, size: usize) -> u32;
        pub(super) fn proxy_http_call(
            cluster: *const u8,
            cluster_size: usize,
            headers: *const u8,
            headers_size: usize,
            body: *const u8,
            body_size: usize,
            trailers: *const u8,
            trailers_size: usize,
            timeout: u32,
            token: *mut u32,
        ) -> u32;
        pub(super) fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, id: *mut u32) -> u32;
        pub(super) safe fn proxy_record_metric(id: u32, value: u64) -> u32;
        pub(super) safe fn proxy_increment_metric(id: u32, offset: i64) -> u32;
    }
}

// Results that Envoy hands over in memory of ours.

/// The most that Envoy may hand over at once; far more than headers or a policy have.
const LARGEST_LOAN: usize = 64 << 20;
/// A buffer of up to this size is kept for the next result.
const KEPT_BUFFER: usize = 64 << 10;

thread_local! {
    /// The buffer that Envoy was lent last, until its result is taken or the next one is lent.
    static LOAN: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Memory for a result of `size` bytes; null if it is too much. Envoy asks while it answers a host call.
pub(crate) fn lend(size: usize) -> *mut u8 {
    let mut buffer = LOAN.take();
    buffer.clear();
    if size > LARGEST_LOAN || buffer.try_reserve_exact(size).is_err() {
        LOAN.set(buffer);
        return std::ptr::null_mut();
    }
    buffer.resize(size, 0);
    let memory = buffer.as_mut_ptr();
    LOAN.set(buffer);
    memory
}

/// A result of Envoy's.
#[derive(Default)]
pub struct Received(Vec<u8>);

impl Received {
    /// The result at an address that Envoy names; `None` if it is not where Envoy was lent memory.
    fn at(data: *const u8, size: usize) -> Option<Self> {
        if size == 0 {
            return Some(Self::default());
        }
        let mut buffer = LOAN.take();
        if buffer.as_ptr() == data && size <= buffer.len() {
            buffer.truncate(size);
            return Some(Self(buffer));
        }
        LOAN.set(buffer);
        None
    }

    /// The bytes, for keeps.
    pub fn into_vec(mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if (1..=KEPT_BUFFER).contains(&self.0.capacity()) {
            LOAN.set(std::mem::take(&mut self.0));
        }
    }
}

/// Makes a call that hands a result over.
fn receive(call: impl FnOnce(*mut *const u8, *mut usize) -> u32) -> Option<Received> {
    let (mut data, mut size) = (std::ptr::null(), 0);
    if call(&raw mut data, &raw mut size) == 0 { Received::at(data, size) } else { None }
}

// Time and log.

/// Nanoseconds since 1970; 0 if Envoy does not say.
#[allow(unsafe_code)]
pub fn now() -> u64 {
    let mut now = 0;
    // SAFETY: the pointer is to a live u64.
    let status = unsafe { import::proxy_get_current_time_nanoseconds(&raw mut now) };
    if status == 0 { now } else { 0 }
}

/// Asks for a tick every `period`, in the root context that is being called.
pub fn tick_every(period: Duration) {
    import::proxy_set_tick_period_milliseconds(period.as_millis() as u32);
}

/// Sends what is logged to Envoy's log.
pub fn log_to_envoy() {
    struct Log;
    impl log::Log for Log {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        #[allow(unsafe_code)]
        fn log(&self, record: &log::Record<'_>) {
            let level = match record.level() {
                log::Level::Trace => 0,
                log::Level::Debug => 1,
                log::Level::Info => 2,
                log::Level::Warn => 3,
                log::Level::Error => 4,
            };
            let message = record.args().to_string();
            // SAFETY: pointer and size are those of a live string.
            unsafe { import::proxy_log(level, message.as_ptr(), message.len()) };
        }

        fn flush(&self) {}
    }
    if log::set_logger(&Log).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

// Configuration and attributes.

const PLUGIN_CONFIGURATION: u32 = 7;
const RESPONSE_BODY: u32 = 1;
const CALL_RESPONSE_BODY: u32 = 4;

#[allow(unsafe_code)]
fn buffer(buffer: u32, size: usize) -> Option<Received> {
    // SAFETY: the pointers are those of `receive`'s live variables.
    receive(|data, length| unsafe { import::proxy_get_buffer_bytes(buffer, 0, size, data, length) })
}

/// The plugin configuration; only while Envoy configures the plugin.
pub fn plugin_configuration(size: usize) -> Option<Received> {
    buffer(PLUGIN_CONFIGURATION, size)
}

/// An attribute of Envoy's, such as `node.id`, as a path whose parts are joined by zero bytes.
#[allow(unsafe_code)]
pub fn property(path: &str) -> Option<Received> {
    // SAFETY: pointers and size are those of a live string and of `receive`'s live variables.
    receive(|data, size| unsafe { import::proxy_get_property(path.as_ptr(), path.len(), data, size) })
}

/// An attribute that is an integer.
pub fn property_integer(path: &str) -> Option<u64> {
    property(path)?.first_chunk().copied().map(u64::from_le_bytes)
}

// Headers.

/// The header maps of an exchange and of a call.
#[derive(Clone, Copy)]
pub enum Map {
    /// Of the request.
    Request = 0,
    /// Of the answer to the client.
    Response = 2,
    /// After the answer to the client.
    ResponseTrailers = 3,
    /// Of a call's answer; only if it has any.
    CallResponse = 6,
}

/// All headers of a map, as Envoy writes them down: their number, the sizes of each one's name and value, then each
/// name and value with a zero byte after it; integers little-endian.
#[allow(unsafe_code)]
pub fn headers(map: Map) -> Option<Received> {
    // SAFETY: the pointers are those of `receive`'s live variables.
    receive(|data, size| unsafe { import::proxy_get_header_map_pairs(map as u32, data, size) })
}

/// One header; of one that is there several times, the first.
#[allow(unsafe_code)]
pub fn header(map: Map, name: &str) -> Option<Received> {
    // SAFETY: pointers and size are those of a live string and of `receive`'s live variables.
    receive(|data, size| unsafe {
        import::proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), data, size)
    })
}

/// Sets a header, in place of all that have its name.
#[allow(unsafe_code)]
pub fn set_header(map: Map, name: &str, value: &str) {
    // SAFETY: pointers and sizes are those of live strings.
    unsafe {
        import::proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
    }
}

/// Adds a header, beside others of its name.
#[allow(unsafe_code)]
pub fn add_header(map: Map, name: &str, value: &str) {
    // SAFETY: pointers and sizes are those of live strings.
    unsafe {
        import::proxy_add_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
    }
}

/// Removes a header, each time that it is there.
#[allow(unsafe_code)]
pub fn remove_header(map: Map, name: &[u8]) {
    // SAFETY: pointer and size are those of a live slice.
    unsafe {
        import::proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len());
    }
}

// What all VMs of the proxy share.

/// A value that all VMs of the proxy share, and its version for [`shared_replace`].
#[allow(unsafe_code)]
pub fn shared(key: &str) -> Option<(Received, u32)> {
    let mut cas = 0;
    // SAFETY: pointers and size are those of a live string and of live variables.
    let value = receive(|data, size| unsafe {
        import::proxy_get_shared_data(key.as_ptr(), key.len(), data, size, &raw mut cas)
    })?;
    // An empty value is one that nobody set.
    (!value.is_empty()).then_some((value, cas))
}

/// Sets a shared value, whatever it was.
pub fn shared_set(key: &str, value: &[u8]) {
    shared_replace(key, value, 0);
}

/// Sets a shared value if it still has the version that was read (0: whatever it was); says whether it had.
#[allow(unsafe_code)]
pub fn shared_replace(key: &str, value: &[u8], version: u32) -> bool {
    // SAFETY: pointers and sizes are those of a live string and slice.
    unsafe { import::proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), version) == 0 }
}

/// Makes this VM the reader of a queue of that name.
#[allow(unsafe_code)]
pub fn queue(name: &str) -> Option<u32> {
    let mut id = 0;
    // SAFETY: pointers and size are those of a live string and a live u32.
    let status = unsafe { import::proxy_register_shared_queue(name.as_ptr(), name.len(), &raw mut id) };
    (status == 0).then_some(id)
}

/// Wakes the reader of a queue.
#[allow(unsafe_code)]
pub fn enqueue(queue: u32) {
    let item = b"!";
    // SAFETY: pointer and size are those of a live array.
    unsafe { import::proxy_enqueue_shared_queue(queue, item.as_ptr(), item.len()) };
}

/// Takes one item off a queue; says whether there was one.
#[allow(unsafe_code)]
pub fn dequeue(queue: u32) -> bool {
    // SAFETY: the pointers are those of `receive`'s live variables.
    receive(|data, size| unsafe { import::proxy_dequeue_shared_queue(queue, data, size) }).is_some()
}

// Stats.

/// The kinds of stats.
#[derive(Clone, Copy)]
pub enum StatKind {
    /// Only grows.
    Counter = 0,
    /// Goes up and down.
    Gauge = 1,
    /// Takes values apart by size.
    Histogram = 2,
}

/// A stat that this VM has defined, unless Envoy would not.
#[derive(Clone, Copy, Default)]
pub struct Stat(Option<u32>);

impl Stat {
    /// Defines a stat, or finds it again.
    #[allow(unsafe_code)]
    pub fn define(kind: StatKind, name: &str) -> Self {
        let mut id = 0;
        // SAFETY: pointers and size are those of a live string and a live u32.
        let status = unsafe { import::proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &raw mut id) };
        Self((status == 0).then_some(id))
    }

    /// Adds to a counter.
    pub fn add(self, amount: i64) {
        if let Some(id) = self.0 {
            import::proxy_increment_metric(id, amount);
        }
    }

    /// Records a value in a histogram, or sets a gauge to it.
    pub fn record(self, value: u64) {
        if let Some(id) = self.0 {
            import::proxy_record_metric(id, value);
        }
    }
}

// Calls.

/// Starts an HTTP call; `None` if Envoy cannot (no such cluster, say). The answer comes with this token.
#[allow(unsafe_code)]
pub fn call(cluster: &str, headers: &[(&str, &str)], body: &[u8], timeout: Duration) -> Option<u32> {
    let headers = written(headers);
    let no_trailers = 0u32.to_le_bytes();
    let mut token = 0;
    // SAFETY: pointers and sizes are those of live strings, slices and a live u32.
    let status = unsafe {
        import::proxy_http_call(
            cluster.as_ptr(),
            cluster.len(),
            headers.as_ptr(),
            headers.len(),
            body.as_ptr(),
            body.len(),
            no_trailers.as_ptr(),
            no_trailers.len(),
            timeout.as_millis() as u32,
            &raw mut token,
        )
    };
    (status == 0).then_some(token)
}

/// Headers as Envoy reads them; see [`headers`].
fn written(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = (headers.len() as u32).to_le_bytes().to_vec();
    for (name, value) in headers {
        bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
    }
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes
}

/// The part of the answer's body that is being called for.
pub fn answer_body(size: usize) -> Received {
    buffer(RESPONSE_BODY, size).unwrap_or_default()
}

/// The body of a call's answer.
pub fn call_body(size: usize) -> Received {
    buffer(CALL_RESPONSE_BODY, size).unwrap_or_default()
}
