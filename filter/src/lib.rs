//! The proxy-wasm filter: it reads what Envoy knows, asks `tideshift-core`, and applies the answers. It decides nothing.
//!
//! A request: [`vm`] finds the request's [`http_context`], which asks the [`active_policy`] for a version, sets the
//! header and counts in [`counters`] how the request ended. [`totals`] adds up the counts of all VMs of the proxy, for
//! the [`guards`] and for the reports of the [`controller_client`]. A policy: [`root_context`] takes it from the plugin
//! configuration. A newer one arrives through [`controller_client`], on one VM of the proxy, and reaches the other VMs
//! through [`shared_data`] and [`workers`].
//!
//! The logic knows the proxy only as a [`host::Host`], by static dispatch, so it compiles and is tested natively:
//! `cargo test -p tideshift-filter`. Only `abi_exports` and `hostcalls` speak proxy-wasm's ABI. A shim for another proxy
//! implements [`host::Host`] and calls [`vm::Vm`], as the proxy in memory does that the tests run on (`tests/proxy.rs`).

#[cfg(target_family = "wasm")]
mod abi_exports;
mod active_policy;
mod controller_client;
mod counters;
mod events;
mod guards;
pub mod header_pairs;
pub mod host;
#[cfg(target_family = "wasm")]
mod hostcalls;
mod http_context;
mod metrics;
mod request_headers;
mod root_context;
mod shared_data;
#[cfg(test)]
mod tests;
mod totals;
mod urgent;
pub mod vm;
mod workers;
