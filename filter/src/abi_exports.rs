//! What Envoy calls: the exports of proxy-wasm ABI 0.2.1, which hand over to [`Vm`].
//!
//! The module speaks the ABI itself instead of through the proxy-wasm SDK (0.2.5), for two reasons:
//!
//! * The SDK panics, and so takes the proxy's worker down, where a host returns what it does not expect: a status that it
//!   does not know, a header that is not UTF-8, headers of a callout that broke off.
//! * It exports all 25 callbacks, and Envoy enters the VM for each export that is there; its map of boxed contexts costs
//!   every request, too. Measured on Envoy 1.40 for the same job, as CPU per request against native weighted clusters:
//!   1.24 to 1.26 with the SDK, 1.22 with its unused callbacks cut out, 1.19 to 1.20 like this.
//!
//! So there are as few exports here as the filter needs. The target is wasm32-unknown-unknown, so that nothing of WASI can
//! fail either.

#![allow(unsafe_code, reason = "an export's name counts as unsafe")]

use crate::hostcalls;
use crate::hostcalls::HostCalls;
use crate::vm::Vm;
use std::cell::RefCell;

thread_local! {
    static VM: RefCell<Vm<HostCalls>> = RefCell::new(Vm::new(HostCalls));
}

/// Calls `act` with the VM; does nothing if a host call called back into the module, which Envoy's never do.
fn with_vm<T: Default>(act: impl FnOnce(&mut Vm<HostCalls>) -> T) -> T {
    VM.with(|vm| vm.try_borrow_mut().map(|mut vm| act(&mut vm)).unwrap_or_default())
}

/// Envoy lets the request or the response go on.
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
    hostcalls::log_to_envoy();
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    hostcalls::lend(size)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_context_create(id: u32, parent: u32) {
    with_vm(|vm| vm.context_created(id, parent));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(id: u32, size: usize) -> u32 {
    with_vm(|vm| u32::from(vm.configure(id, size)))
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(id: u32) {
    with_vm(|vm| vm.tick(id));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_queue_ready(id: u32, queue: u32) {
    with_vm(|vm| vm.queue_ready(id, queue));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_http_call_response(id: u32, token: u32, headers: usize, body: usize, _: usize) {
    with_vm(|vm| vm.http_call_response(id, token, headers, body));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(id: u32, _: u32, _: u32) -> u32 {
    with_vm(|vm| vm.request_headers(id));
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(id: u32, _: u32, is_last: u32) -> u32 {
    with_vm(|vm| vm.response_headers(id, is_last != 0));
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_body(id: u32, size: usize, is_last: u32) -> u32 {
    with_vm(|vm| vm.response_body(id, size, is_last != 0));
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_trailers(id: u32, _: u32) -> u32 {
    with_vm(|vm| vm.response_trailers(id));
    CONTINUE
}

/// (What `proxy_on_log` could read in addition has been read before; one callback less is one entry into the VM less.)
#[unsafe(no_mangle)]
extern "C" fn proxy_on_done(id: u32) -> u32 {
    with_vm(|vm| vm.done(id));
    1
}
