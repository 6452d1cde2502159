//! One VM of the plugin, as a shim drives it: each of the proxy's callbacks is a method here, which finds the context
//! that the callback is for.

use crate::host::Host;
use crate::http_context::HttpContext;
use crate::root_context::{RootContext, VmState};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

/// Everything that a VM holds, by context id.
pub struct Vm<H: Host> {
    host: H,
    /// One for each plugin configuration that is alive; usually one.
    roots: Vec<(u32, RootContext<H>)>,
    state: Rc<VmState<H>>,
    requests: HashMap<u32, HttpContext<H>, BuildHasherDefault<IdHasher>>,
}

/// Context ids are counted up, so any mixing at all spreads them.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = (self.0 ^ u64::from(id)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl<H: Host> Vm<H> {
    /// A VM without contexts.
    pub fn new(host: H) -> Self {
        Self { host, roots: Vec::new(), state: Rc::default(), requests: HashMap::default() }
    }

    fn root(&mut self, id: u32) -> Option<&mut RootContext<H>> {
        self.roots.iter_mut().find(|(root, _)| *root == id).map(|(_, root)| root)
    }

    /// A root context (`parent` 0), or a request of one.
    pub fn context_created(&mut self, id: u32, parent: u32) {
        if parent == 0 {
            self.roots.retain(|(root, _)| *root != id);
            let root = RootContext::new(self.host.clone(), self.state.clone());
            self.roots.push((id, root));
        } else if let Some(root) = self.root(parent) {
            let request = root.request(parent);
            self.requests.insert(id, request);
        }
    }

    /// The proxy gives a root context its plugin configuration, of this size; `false`: it is refused.
    pub fn configure(&mut self, id: u32, size: usize) -> bool {
        self.root(id).is_some_and(|root| root.configure(size))
    }

    /// The time that was asked for is up.
    pub fn tick(&mut self, id: u32) {
        if let Some(root) = self.root(id) {
            root.tick();
        }
    }

    /// There is an item in a queue that this VM reads.
    pub fn queue_ready(&mut self, id: u32, queue: u32) {
        if let Some(root) = self.root(id) {
            root.queue_ready(queue);
        }
    }

    /// A callout has a response, with so many headers (0: it broke off) and a body of this size.
    pub fn http_call_response(&mut self, id: u32, token: u32, headers: usize, body: usize) {
        if let Some(root) = self.root(id) {
            root.http_call_response(token, headers, body);
        }
    }

    /// The headers of a request are there.
    pub fn request_headers(&mut self, id: u32) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.request_headers();
        }
    }

    /// The headers of the response are there, and nothing follows them if `is_last`.
    pub fn response_headers(&mut self, id: u32, is_last: bool) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.response_headers(is_last);
        }
    }

    /// So many bytes of the response's body are there, and nothing follows them if `is_last`.
    pub fn response_body(&mut self, id: u32, size: usize, is_last: bool) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.response_body(size, is_last);
        }
    }

    /// The trailers of the response are there.
    pub fn response_trailers(&mut self, id: u32) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.response_trailers();
        }
    }

    /// The end of a request, however it ended, or of a configuration that has been replaced.
    pub fn done(&mut self, id: u32) {
        if let Some(request) = self.requests.remove(&id) {
            let root = request.root;
            request.done();
            if let Some(root) = self.root(root) {
                root.request_done();
            }
        } else if let Some(at) = self.roots.iter().position(|(root, _)| *root == id) {
            self.roots.remove(at).1.leave();
        }
    }
}
