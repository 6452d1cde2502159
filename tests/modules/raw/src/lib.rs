//! The whole job, hard-coded on the bare proxy-wasm ABI 0.2.1: look for a header that is absent, choose 9:1 between two
//! versions, set the header that the routes match, and count outcome, latency and requests in flight. No policy, no
//! controller, no callback that is not needed: a yardstick for what Wasm can do at all, which `make bench` measures.

// Its host calls are only there in a proxy.
#![cfg(target_family = "wasm")]

use std::cell::UnsafeCell;
use std::ptr;

const REQUEST_HEADERS: u32 = 0;
const RESPONSE_HEADERS: u32 = 2;
const COUNTER: u32 = 0;
const GAUGE: u32 = 1;
const HISTOGRAM: u32 = 2;
const CONTINUE: u32 = 0;

/// Exchanges in flight at most; with more, some are not counted.
const SLOTS: usize = 1024;
/// What the host writes into our memory lives until the callback's end.
const HEAP: usize = 4096;
/// 2^32 / golden ratio.
const GOLDEN: u32 = 0x9E37_79B9;
/// 9/10 of 2^32.
const NINE_TENTHS: u32 = 3_865_470_566;

const VERSIONS: [&str; 2] = ["v1", "v2"];
const OUTCOMES: [&str; 3] = ["ok", "error", "client_error"];

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_header_map_value(
        map: u32,
        name: *const u8,
        name_size: usize,
        value: *mut *const u8,
        value_size: *mut usize,
    ) -> u32;
    fn proxy_replace_header_map_value(
        map: u32,
        name: *const u8,
        name_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, metric: *mut u32) -> u32;
    fn proxy_increment_metric(metric: u32, offset: i64) -> u32;
    fn proxy_record_metric(metric: u32, value: u64) -> u32;
}

struct Module {
    point: u32,
    exchanges: [Exchange; SLOTS],
    versions: [Stats; VERSIONS.len()],
    heap: [u8; HEAP],
    heap_used: usize,
}

#[derive(Clone, Copy)]
struct Exchange {
    context: u32,
    version: usize,
    started: u64,
}

#[derive(Clone, Copy)]
struct Stats {
    outcomes: [u32; OUTCOMES.len()],
    in_flight: u32,
    milliseconds: u32,
}

/// A VM has one thread.
struct OneThread(UnsafeCell<Module>);
// SAFETY: see above.
unsafe impl Sync for OneThread {}

static MODULE: OneThread = OneThread(UnsafeCell::new(Module {
    point: 0,
    exchanges: [Exchange { context: 0, version: 0, started: 0 }; SLOTS],
    versions: [Stats { outcomes: [0; OUTCOMES.len()], in_flight: 0, milliseconds: 0 }; VERSIONS.len()],
    heap: [0; HEAP],
    heap_used: 0,
}));

/// Every callback calls this once; of those only the allocator runs inside another, which holds no reference then.
fn module() -> *mut Module {
    MODULE.0.get()
}

fn header(map: u32, name: &str) -> Option<&'static [u8]> {
    let (mut value, mut size) = (ptr::null(), 0);
    // SAFETY: the host reads `name`, and writes to memory that our allocator gave it.
    unsafe {
        (*module()).heap_used = 0;
        let status = proxy_get_header_map_value(map, name.as_ptr(), name.len(), &mut value, &mut size);
        (status == 0 && !value.is_null()).then(|| std::slice::from_raw_parts(value, size))
    }
}

fn now() -> u64 {
    let mut time = 0;
    // SAFETY: the host writes to it.
    unsafe { proxy_get_current_time_nanoseconds(&mut time) };
    time
}

fn metric(kind: u32, name: &str) -> u32 {
    let mut metric = 0;
    // SAFETY: the host reads `name` and writes to `metric`.
    unsafe { proxy_define_metric(kind, name.as_ptr(), name.len(), &mut metric) };
    metric
}

#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    // SAFETY: one thread, and no reference into the module is alive while the host is called.
    unsafe {
        let module = module();
        let start = (*module).heap_used;
        if size > HEAP - start {
            return ptr::null_mut();
        }
        (*module).heap_used = start + size;
        ptr::addr_of_mut!((*module).heap).cast::<u8>().add(start)
    }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_vm_start(_: u32, _: usize) -> u32 {
    1
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(_: u32, _: usize) -> u32 {
    for (index, version) in VERSIONS.iter().enumerate() {
        let labels = format!("service=.=raw;.;version=.={version};.;");
        let stats = Stats {
            outcomes: OUTCOMES
                .map(|outcome| metric(COUNTER, &format!("{labels}outcome=.={outcome};.;bench_requests_total"))),
            in_flight: metric(GAUGE, &format!("{labels}bench_requests_in_flight")),
            milliseconds: metric(HISTOGRAM, &format!("{labels}bench_request_duration_milliseconds")),
        };
        // SAFETY: one thread, one callback.
        unsafe { (*module()).versions[index] = stats };
    }
    1
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(context: u32, _: u32, _: u32) -> u32 {
    let tester = header(REQUEST_HEADERS, "x-beta").is_some_and(|value| value == b"1");
    // SAFETY: one thread, and the host calls below do not call back.
    unsafe {
        let module = &mut *module();
        module.point = module.point.wrapping_add(GOLDEN);
        let version = usize::from(tester || module.point >= NINE_TENTHS);
        let (name, value) = ("x-tideshift-version", VERSIONS[version]);
        proxy_replace_header_map_value(REQUEST_HEADERS, name.as_ptr(), name.len(), value.as_ptr(), value.len());
        proxy_increment_metric(module.versions[version].in_flight, 1);
        module.exchanges[context as usize % SLOTS] = Exchange { context, version, started: now() };
    }
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_log(context: u32) {
    let outcome = match header(RESPONSE_HEADERS, ":status").and_then(|status| status.first()) {
        Some(b'1'..=b'3') => 0,
        Some(b'4') => 2,
        _ => 1,
    };
    // SAFETY: one thread, and the host calls below do not call back.
    unsafe {
        let module = &mut *module();
        let exchange = module.exchanges[context as usize % SLOTS];
        if exchange.context != context {
            return;
        }
        let stats = module.versions[exchange.version];
        proxy_increment_metric(stats.in_flight, -1);
        proxy_increment_metric(stats.outcomes[outcome], 1);
        proxy_record_metric(stats.milliseconds, now().saturating_sub(exchange.started) / 1_000_000);
    }
}
