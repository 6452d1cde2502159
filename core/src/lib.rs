//! Tideshift's decisions, shared by the proxy's filter and the controller: the documents and what is valid in them,
//! which version a request goes to, and how an exchange counts. Pure functions of their arguments: no clock, no
//! randomness, no I/O and no log, so the same code runs in a proxy, in tests, in a browser's wasm and in `explain`.
//!
//! A request's way: [`policy::Policy`] is read and compiled to a [`plan::Plan`]; [`plan::Plan::decide`] finds service,
//! rule and split, and the version by session ([`session`]) or by turn ([`split`]); [`outcome::ErrorCodes::outcome`] says
//! how it ended.

pub mod clients;
pub mod decode;
pub mod delivery;
pub mod evidence;
pub mod guard;
pub mod hostname;
pub mod matching;
mod name;
pub mod outcome;
pub mod plan;
pub mod policy;
pub mod report;
pub mod request;
pub mod routes;
mod rules;
#[cfg(feature = "schema")]
pub mod schema;
pub mod sequence;
pub mod session;
pub mod shift;
pub mod split;
pub mod tallies;
pub mod verdict;
pub mod websocket;

pub use name::{EXPLAIN_HEADER, MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};
