//! What this module asks of Envoy, in one place: the SDK's host calls with their failures as `Option`s, since there
//! is nothing that a filter can do about one except go on without.

use proxy_wasm::hostcalls;
use proxy_wasm::types::{BufferType, MapType, MetricType};
use std::time::{Duration, SystemTime};

/// Nanoseconds since 1970; 0 if Envoy does not say.
pub fn now() -> u64 {
    let now = hostcalls::get_current_time().unwrap_or(SystemTime::UNIX_EPOCH);
    now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// The plugin configuration; only while Envoy configures the plugin.
pub fn plugin_configuration(size: usize) -> Option<Vec<u8>> {
    hostcalls::get_buffer(BufferType::PluginConfiguration, 0, size).ok().flatten()
}

/// An attribute of Envoy's, such as `node.id`.
pub fn property(path: &[&str]) -> Option<Vec<u8>> {
    hostcalls::get_property(path.to_vec()).ok().flatten()
}

/// An attribute that is an integer.
pub fn property_integer(path: &[&str]) -> Option<u64> {
    let bytes = property(path)?;
    Some(u64::from_le_bytes(bytes.as_slice().try_into().ok()?))
}

/// All headers of the request, names in lower case.
pub fn request_headers() -> Vec<(String, Vec<u8>)> {
    hostcalls::get_map_bytes(MapType::HttpRequestHeaders).unwrap_or_default()
}

/// Sets a request header, in place of all that have its name.
pub fn set_request_header(name: &str, value: &str) {
    let _ = hostcalls::set_map_value(MapType::HttpRequestHeaders, name, Some(value));
}

/// Removes a request header, each time that it is there.
pub fn remove_request_header(name: &str) {
    let _ = hostcalls::remove_map_value(MapType::HttpRequestHeaders, name);
}

/// A header of the answer to the client.
pub fn response_header(name: &str) -> Option<Vec<u8>> {
    hostcalls::get_map_value_bytes(MapType::HttpResponseHeaders, name).ok().flatten()
}

/// A trailer of the answer to the client.
pub fn response_trailer(name: &str) -> Option<Vec<u8>> {
    hostcalls::get_map_value_bytes(MapType::HttpResponseTrailers, name).ok().flatten()
}

/// Asks for [`RootContext::on_tick`](proxy_wasm::traits::RootContext::on_tick) every `period`.
pub fn tick_every(period: Duration) {
    let _ = hostcalls::set_tick_period(period);
}

/// A value that all VMs of the proxy share, and its version for [`shared_replace`].
pub fn shared(key: &str) -> Option<(Vec<u8>, u32)> {
    match hostcalls::get_shared_data(key) {
        Ok((Some(value), Some(version))) => Some((value, version)),
        _ => None,
    }
}

/// Sets a shared value, whatever it was.
pub fn shared_set(key: &str, value: &[u8]) {
    let _ = hostcalls::set_shared_data(key, Some(value), None);
}

/// Sets a shared value if it still has the version that was read; says whether it had.
pub fn shared_replace(key: &str, value: &[u8], version: u32) -> bool {
    hostcalls::set_shared_data(key, Some(value), Some(version)).is_ok()
}

/// Makes this VM the reader of a queue of that name.
pub fn queue(name: &str) -> Option<u32> {
    hostcalls::register_shared_queue(name).ok()
}

/// Wakes the reader of a queue.
pub fn enqueue(queue: u32) {
    let _ = hostcalls::enqueue_shared_queue(queue, Some(b"!"));
}

/// Takes one item off a queue; says whether there was one.
pub fn dequeue(queue: u32) -> bool {
    matches!(hostcalls::dequeue_shared_queue(queue), Ok(Some(_)))
}

/// Defines a stat, or finds it again.
pub fn stat(kind: MetricType, name: &str) -> Option<u32> {
    hostcalls::define_metric(kind, name).ok()
}

/// The value of a counter or gauge, of the whole process.
pub fn stat_value(stat: Option<u32>) -> u64 {
    stat.and_then(|stat| hostcalls::get_metric(stat).ok()).unwrap_or_default()
}

/// Adds to a counter or gauge.
pub fn stat_add(stat: Option<u32>, amount: i64) {
    let _ = stat.map(|stat| hostcalls::increment_metric(stat, amount));
}

/// Records a value in a histogram.
pub fn stat_record(stat: Option<u32>, value: u64) {
    let _ = stat.map(|stat| hostcalls::record_metric(stat, value));
}

/// Starts an HTTP call; `None` if Envoy cannot (no such cluster, say). The answer comes with this token.
pub fn call(cluster: &str, headers: Vec<(&str, &str)>, body: Option<&[u8]>, timeout: Duration) -> Option<u32> {
    hostcalls::dispatch_http_call(cluster, headers, body, Vec::new(), timeout).ok()
}

/// A header of a call's answer; only if it has any.
pub fn call_header(name: &str) -> Option<Vec<u8>> {
    hostcalls::get_map_value_bytes(MapType::HttpCallResponseHeaders, name).ok().flatten()
}

/// The body of a call's answer.
pub fn call_body(size: usize) -> Vec<u8> {
    hostcalls::get_buffer(BufferType::HttpCallResponseBody, 0, size).ok().flatten().unwrap_or_default()
}
