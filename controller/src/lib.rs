//! The controller of Tideshift: what the one binary `tideshift` does, as a library.

pub mod admission;
pub mod api;
pub mod cli;
pub mod clock;
pub mod compile;
pub mod control;
pub mod documents;
pub mod explain;
pub mod hooks;
pub mod kubernetes;
pub mod ledger;
pub mod metrics;
pub mod net;
pub mod page;
pub mod probe;
pub mod readiness;
pub mod render;
pub mod rollout;
pub mod series;
pub mod serve;
pub mod shares;
pub mod simulate;
pub mod status;
pub mod store;
pub mod telemetry;
pub mod warm_up;
