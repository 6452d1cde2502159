//! The controller of Tideshift: what the one binary `tideshift` does, as a library.

pub mod admission;
pub mod api;
pub mod cli;
pub mod clock;
pub mod compile;
pub mod documents;
pub mod explain;
pub mod kubernetes;
pub mod limits;
pub mod metrics;
pub mod namespace_ref;
pub mod net;
pub mod page;
pub mod readiness;
pub mod reconciler;
pub mod render;
pub mod role;
pub mod rollout;
pub mod secret_values;
pub mod server;
pub mod simulate;
pub mod status;
pub mod store;
pub mod telemetry;
pub mod webhooks;
