//! The module in a wasm host, without Envoy.

mod controller;
mod guard;
mod hostile;
mod requests;
mod soak;
