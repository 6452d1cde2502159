//! The proxy-wasm module: it hands what Envoy knows to `tideshift-core` and applies the answers. It decides nothing.
//!
//! Envoy enters at [`callbacks`]. A request's way: an [`exchange`] asks the plan in force for a version, sets the header,
//! and counts in [`counters`] how it ended; [`totals`] adds up what all VMs of the proxy have counted, for [`guards`] and
//! for the reports of [`link`]. A policy's way: [`root`] takes it from the plugin configuration; a newer one
//! comes by [`link`], on one VM of the proxy, and reaches the others through [`shared`] and [`workers`]. What the module
//! asks of Envoy goes through [`host`].
//!
//! It speaks proxy-wasm's ABI itself, past the SDK, for two reasons: the SDK panics, and so takes the proxy's worker
//! down, where a host answers what it does not expect; and its map of boxed contexts costs every request. It is built
//! for wasm32-unknown-unknown, so that nothing of WASI can fail either.
#![cfg(target_family = "wasm")]

mod callbacks;
mod counters;
mod events;
mod exchange;
mod guards;
mod headers;
mod host;
mod link;
mod pulse;
mod root;
mod shared;
mod totals;
mod workers;
