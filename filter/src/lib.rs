//! The proxy-wasm module: it hands what Envoy knows to `tideshift-core` and applies the answers. It decides nothing.
//!
//! A request's way: [`root`] makes an [`exchange`] for it, which asks the plan in force for a version, sets the
//! header, and counts in [`counters`] how it ended. A policy's way: [`root`] takes it from the plugin configuration;
//! a newer one comes by [`link`], on one VM of the proxy, and reaches the others through [`shared`] and [`workers`].

mod counters;
mod exchange;
mod host;
mod link;
mod root;
mod shared;
mod workers;

use proxy_wasm::traits::RootContext;
use proxy_wasm::types::LogLevel;

#[allow(unsafe_code, missing_docs)]
mod entry {
    use super::*;

    proxy_wasm::main! {{
        proxy_wasm::set_log_level(LogLevel::Info);
        proxy_wasm::set_root_context(|_| -> Box<dyn RootContext> { Box::new(root::Root::new()) });
    }}
}
