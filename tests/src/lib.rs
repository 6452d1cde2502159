//! The components shared by the end-to-end tests, the demo and the bench.
//!
//! Everything visible to users is real: [`envoy`] runs the Envoy binary, [`controller`] the `tideshift` binary,
//! [`backend`] answers over real sockets, and [`client`] and [`load`] call through them. The stand-ins are
//! [`wasm_host`], which runs the real module in a small interpreter to test what no Envoy can be made to do, and
//! [`kubernetes`], whose API server fails on demand.
//!
//! A component ends when its value is dropped: this kills its process or closes its sockets.

pub mod artifacts;
pub mod backend;
pub mod bootstrap;
#[cfg(feature = "browser")]
pub mod browser;
pub mod client;
pub mod controller;
pub mod ecds_file;
pub mod effect;
pub mod envoy;
pub mod envoy_fixture;
pub mod events;
#[cfg(feature = "browser")]
pub mod fake_controller;
#[cfg(feature = "streams")]
pub mod grpc;
pub mod hook;
pub mod hostile;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod load;
pub mod metrics;
pub mod openmetrics;
pub mod policy_server;
pub mod ports;
pub mod process;
pub mod reporter;
pub mod schemas;
pub mod test_bed;
#[cfg(feature = "browser")]
pub mod timeline;
pub mod usage;
pub mod wait;
#[cfg(feature = "wasm-host")]
pub mod wasm_host;
#[cfg(feature = "streams")]
pub mod websocket;
