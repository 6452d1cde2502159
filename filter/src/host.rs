//! What the filter asks of the proxy that it runs in: the one interface between logic and ABI.
//!
//! Calls are about the context that the proxy is calling at that moment. The logic takes nothing on trust that a host
//! returns: bytes have any size and content, and a failed call is `None`, `false` or nothing at all, because there is
//! nothing that a filter can do about one except go on without.

use std::ops::Deref;
use std::time::Duration;

/// A proxy, as one of its VMs sees it. Clones are handles of the same one.
pub trait Host: Clone {
    /// Bytes that the proxy returns.
    type Bytes: Deref<Target = [u8]> + Default + Into<Vec<u8>>;
    /// All headers of a map.
    type Headers: HeaderList + Default;

    /// Nanoseconds since 1970; 0 if the proxy does not say.
    fn now(&self) -> u64;
    /// A seed for random numbers. It need not be secret, but should differ between the VMs of a proxy.
    fn seed(&self) -> u64;
    /// Asks for a tick every `period`, in the root context that is being called.
    fn tick_every(&self, period: Duration);

    /// The plugin configuration of this size; only while the proxy configures the plugin.
    fn plugin_configuration(&self, size: usize) -> Option<Self::Bytes>;
    /// An attribute such as `node.id`, as a path whose parts are joined by zero bytes.
    fn property(&self, path: &str) -> Option<Self::Bytes>;
    /// An attribute that is an integer.
    fn integer_property(&self, path: &str) -> Option<u64> {
        self.property(path)?.first_chunk().copied().map(u64::from_le_bytes)
    }

    /// All headers of a map.
    fn headers(&self, map: HeaderMap) -> Self::Headers;
    /// One header; of one that occurs several times, the first.
    fn header(&self, map: HeaderMap, name: &str) -> Option<Self::Bytes>;
    /// Sets a header, in place of all of its name.
    fn set_header(&self, map: HeaderMap, name: &str, value: &str);
    /// Adds a header, beside others of its name.
    fn add_header(&self, map: HeaderMap, name: &str, value: &str);
    /// Removes all headers of a name.
    fn remove_header(&self, map: HeaderMap, name: &[u8]);
    /// The part of the response's body that is being called for, of this size.
    fn response_body(&self, size: usize) -> Self::Bytes;

    /// A value that all VMs of the proxy share, and its version for [`Self::replace_shared`]. A value that is empty is
    /// one that is not set.
    fn shared(&self, key: &str) -> Option<(Self::Bytes, u32)>;
    /// Sets a shared value, whatever it was.
    fn set_shared(&self, key: &str, value: &[u8]) {
        self.replace_shared(key, value, 0);
    }
    /// Compare and swap: sets a shared value if it still has the version that was read (0: in any case). `false` if it
    /// has another.
    fn replace_shared(&self, key: &str, value: &[u8], version: u32) -> bool;
    /// Makes this VM the reader of a queue of that name.
    fn register_queue(&self, name: &str) -> Option<u32>;
    /// Wakes the reader of a queue.
    fn enqueue(&self, queue: u32);
    /// Takes one item off a queue; `false` if there was none.
    fn dequeue(&self, queue: u32) -> bool;

    /// Defines a metric, or finds it again.
    fn define_metric(&self, kind: MetricKind, name: &str) -> Option<u32>;
    /// Adds to a counter.
    fn increment_metric(&self, metric: u32, amount: i64);
    /// Sets a gauge, or records a value in a histogram.
    fn record_metric(&self, metric: u32, value: u64);

    /// Starts an HTTP callout; `None` if the proxy cannot (there is no such cluster, for example). The response comes with
    /// the returned token.
    fn http_call(&self, cluster: &str, headers: &[(&str, &str)], body: &[u8], timeout: Duration) -> Option<u32>;
    /// The body of a callout's response, of this size.
    fn http_call_response_body(&self, size: usize) -> Self::Bytes;
}

/// All headers of a map, as a host returns them.
pub trait HeaderList {
    /// Names, in lower case as Envoy has them, and values.
    fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])>;
}

/// The header maps of a request and of a callout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderMap {
    /// Of the request.
    Request = 0,
    /// Of the response to the client.
    Response = 2,
    /// After the body of the response to the client.
    ResponseTrailers = 3,
    /// Of a callout's response; only if it has any.
    CallResponse = 6,
}

/// The kinds of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter = 0,
    /// Goes up and down.
    Gauge = 1,
    /// Counts values by size.
    Histogram = 2,
}
