//! What a VM of the filter counts: how requests ended, and where they went.

pub mod routes;
pub mod tallies;
pub mod websocket;
