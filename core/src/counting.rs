//! The counts of a VM of the filter: how requests ended, and which version they reached.

pub mod routes;
pub mod tallies;
pub mod websocket;
