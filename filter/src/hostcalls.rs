//! [`Host`] by the host calls of proxy-wasm ABI 0.2.1, and the memory in which Envoy returns results.
//!
//! Nothing that Envoy returns is taken on trust: a status other than 0 is a failure whatever its number, and a result
//! counts only if it lies in memory that was lent for it.

use crate::header_pairs;
use crate::header_pairs::HeaderPairs;
use crate::host::{HeaderMap, Host, MetricKind};
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

/// The most that Envoy may return at once; far more than headers or a policy have.
const LARGEST_LOAN: usize = 64 << 20;
/// A buffer of up to this size is kept for the next result.
const KEPT_BUFFER: usize = 64 << 10;

thread_local! {
    /// The buffer that Envoy was lent last, until its result is taken or the next one is lent.
    static LOAN: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Memory for a result of `size` bytes; null if it is too much. Envoy asks while it answers a host call.
pub fn lend(size: usize) -> *mut u8 {
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
    /// The result at an address that Envoy names; `None` if it is not in memory that Envoy was lent.
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
}

impl From<Received> for Vec<u8> {
    fn from(mut received: Received) -> Self {
        std::mem::take(&mut received.0)
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

/// Makes a call that returns bytes.
fn receive(call: impl FnOnce(*mut *const u8, *mut usize) -> u32) -> Option<Received> {
    let (mut data, mut size) = (std::ptr::null(), 0);
    if call(&raw mut data, &raw mut size) == 0 { Received::at(data, size) } else { None }
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

const PLUGIN_CONFIGURATION: u32 = 7;
const RESPONSE_BODY: u32 = 1;
const CALL_RESPONSE_BODY: u32 = 4;

#[allow(unsafe_code)]
fn buffer(buffer: u32, size: usize) -> Option<Received> {
    // SAFETY: the pointers are those of `receive`'s live variables.
    receive(|data, length| unsafe { import::proxy_get_buffer_bytes(buffer, 0, size, data, length) })
}

/// Envoy, around this VM.
#[derive(Clone)]
pub struct HostCalls;

#[allow(unsafe_code)]
impl Host for HostCalls {
    type Bytes = Received;
    type Headers = HeaderPairs<Received>;

    fn now(&self) -> u64 {
        let mut now = 0;
        // SAFETY: the pointer is to a live u64.
        let status = unsafe { import::proxy_get_current_time_nanoseconds(&raw mut now) };
        if status == 0 { now } else { 0 }
    }

    fn seed(&self) -> u64 {
        let now = self.now();
        now ^ std::ptr::from_ref(&now) as u64
    }

    fn tick_every(&self, period: Duration) {
        import::proxy_set_tick_period_milliseconds(period.as_millis() as u32);
    }

    fn plugin_configuration(&self, size: usize) -> Option<Received> {
        buffer(PLUGIN_CONFIGURATION, size)
    }

    fn property(&self, path: &str) -> Option<Received> {
        // SAFETY: pointers and size are those of a live string and of `receive`'s live variables.
        receive(|data, size| unsafe { import::proxy_get_property(path.as_ptr(), path.len(), data, size) })
    }

    fn headers(&self, map: HeaderMap) -> HeaderPairs<Received> {
        // SAFETY: the pointers are those of `receive`'s live variables.
        let pairs = receive(|data, size| unsafe { import::proxy_get_header_map_pairs(map as u32, data, size) });
        HeaderPairs(pairs.unwrap_or_default())
    }

    fn header(&self, map: HeaderMap, name: &str) -> Option<Received> {
        // SAFETY: pointers and size are those of a live string and of `receive`'s live variables.
        receive(|data, size| unsafe {
            import::proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), data, size)
        })
    }

    fn set_header(&self, map: HeaderMap, name: &str, value: &str) {
        // SAFETY: pointers and sizes are those of live strings.
        unsafe {
            import::proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
        }
    }

    fn add_header(&self, map: HeaderMap, name: &str, value: &str) {
        // SAFETY: pointers and sizes are those of live strings.
        unsafe {
            import::proxy_add_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
        }
    }

    fn remove_header(&self, map: HeaderMap, name: &[u8]) {
        // SAFETY: pointer and size are those of a live slice.
        unsafe {
            import::proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len());
        }
    }

    fn response_body(&self, size: usize) -> Received {
        buffer(RESPONSE_BODY, size).unwrap_or_default()
    }

    fn shared(&self, key: &str) -> Option<(Received, u32)> {
        let mut cas = 0;
        // SAFETY: pointers and size are those of a live string and of live variables.
        let value = receive(|data, size| unsafe {
            import::proxy_get_shared_data(key.as_ptr(), key.len(), data, size, &raw mut cas)
        })?;
        // Envoy does not tell an empty value from none.
        (!value.is_empty()).then_some((value, cas))
    }

    fn replace_shared(&self, key: &str, value: &[u8], version: u32) -> bool {
        // SAFETY: pointers and sizes are those of a live string and slice.
        unsafe { import::proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), version) == 0 }
    }

    fn register_queue(&self, name: &str) -> Option<u32> {
        let mut id = 0;
        // SAFETY: pointers and size are those of a live string and a live u32.
        let status = unsafe { import::proxy_register_shared_queue(name.as_ptr(), name.len(), &raw mut id) };
        (status == 0).then_some(id)
    }

    fn enqueue(&self, queue: u32) {
        let item = b"!";
        // SAFETY: pointer and size are those of a live array.
        unsafe { import::proxy_enqueue_shared_queue(queue, item.as_ptr(), item.len()) };
    }

    fn dequeue(&self, queue: u32) -> bool {
        // SAFETY: the pointers are those of `receive`'s live variables.
        receive(|data, size| unsafe { import::proxy_dequeue_shared_queue(queue, data, size) }).is_some()
    }

    fn define_metric(&self, kind: MetricKind, name: &str) -> Option<u32> {
        let mut id = 0;
        // SAFETY: pointers and size are those of a live string and a live u32.
        let status = unsafe { import::proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &raw mut id) };
        (status == 0).then_some(id)
    }

    fn increment_metric(&self, metric: u32, amount: i64) {
        import::proxy_increment_metric(metric, amount);
    }

    fn record_metric(&self, metric: u32, value: u64) {
        import::proxy_record_metric(metric, value);
    }

    fn http_call(&self, cluster: &str, headers: &[(&str, &str)], body: &[u8], timeout: Duration) -> Option<u32> {
        let headers = header_pairs::encode(headers);
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

    fn http_call_response_body(&self, size: usize) -> Received {
        buffer(CALL_RESPONSE_BODY, size).unwrap_or_default()
    }
}
