//! What Envoy calls: the exports of proxy-wasm ABI 0.2.1, as few as the module needs, since Envoy enters the VM only for
//! those that are there. Each finds the context that it is for and hands on to [`Root`] or [`Exchange`].

#![allow(unsafe_code, reason = "an export's name counts as unsafe")]

use crate::exchange::Exchange;
use crate::host;
use crate::root::{Root, VmState};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

/// Everything that this VM holds, by context id.
#[derive(Default)]
struct Vm {
    /// One for each plugin configuration that is alive; usually one.
    roots: Vec<(u32, Root)>,
    state: Rc<VmState>,
    exchanges: HashMap<u32, Exchange, BuildHasherDefault<IdHasher>>,
}

thread_local! {
    static VM: RefCell<Vm> = RefCell::default();
}

/// Calls `act` with the VM; does nothing if a host call called back into the module, which Envoy's never do.
fn with_vm<T: Default>(act: impl FnOnce(&mut Vm) -> T) -> T {
    VM.with(|vm| vm.try_borrow_mut().map(|mut vm| act(&mut vm)).unwrap_or_default())
}

impl Vm {
    fn root(&mut self, id: u32) -> Option<&mut Root> {
        self.roots.iter_mut().find(|(root, _)| *root == id).map(|(_, root)| root)
    }
}

fn with_root<T: Default>(id: u32, act: impl FnOnce(&mut Root) -> T) -> T {
    with_vm(|vm| vm.root(id).map(act).unwrap_or_default())
}

fn with_exchange(id: u32, act: impl FnOnce(&mut Exchange)) {
    with_vm(|vm| vm.exchanges.get_mut(&id).map(act).unwrap_or_default());
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

/// Envoy lets the request or the answer go on.
const CONTINUE: u32 = 0;

unsafe extern "C" {
    fn __wasm_call_ctors();
}

#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

#[unsafe(no_mangle)]
extern "C" fn _initialize() {
    // SAFETY: the linker's function, called once, before anything else.
    unsafe { __wasm_call_ctors() };
    host::log_to_envoy();
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    host::lend(size)
}

/// A root context (`parent` 0) or an exchange of one.
#[unsafe(no_mangle)]
extern "C" fn proxy_on_context_create(id: u32, parent: u32) {
    with_vm(|vm| {
        if parent == 0 {
            vm.roots.retain(|(root, _)| *root != id);
            let root = Root::new(vm.state.clone());
            vm.roots.push((id, root));
        } else if let Some(root) = vm.root(parent) {
            let exchange = root.exchange(parent);
            vm.exchanges.insert(id, exchange);
        }
    });
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(id: u32, size: usize) -> u32 {
    with_root(id, |root| u32::from(root.configure(size)))
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(id: u32) {
    with_root(id, Root::tick);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_queue_ready(id: u32, queue: u32) {
    with_root(id, |root| root.woken(queue));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_http_call_response(id: u32, token: u32, headers: usize, body: usize, _: usize) {
    with_root(id, |root| root.answered(token, headers, body));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(id: u32, _: u32, _: u32) -> u32 {
    with_exchange(id, Exchange::request);
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(id: u32, _: u32, is_all: u32) -> u32 {
    with_exchange(id, |exchange| exchange.answer(is_all != 0));
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_body(id: u32, size: usize, is_last: u32) -> u32 {
    with_exchange(id, |exchange| exchange.answer_body(size, is_last != 0));
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_trailers(id: u32, _: u32) -> u32 {
    with_exchange(id, Exchange::answer_trailers);
    CONTINUE
}

/// The end of an exchange, whichever it was, or of a configuration that has been replaced. (What `proxy_on_log` could
/// read in addition has been read before; one callback less is one entry into the VM less.)
#[unsafe(no_mangle)]
extern "C" fn proxy_on_done(id: u32) -> u32 {
    with_vm(|vm| {
        if let Some(exchange) = vm.exchanges.remove(&id) {
            let root = exchange.root;
            exchange.ended();
            if let Some(root) = vm.root(root) {
                root.exchange_ended();
            }
        } else if let Some(at) = vm.roots.iter().position(|(root, _)| *root == id) {
            vm.roots.remove(at).1.leave();
        }
    });
    1
}
