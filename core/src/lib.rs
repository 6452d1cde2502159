//! Tideshift's decisions, shared by the proxy's filter and the controller: the documents and what is valid in them,
//! which version a request goes to, and how an exchange counts. Pure functions of their arguments: no clock, no
//! randomness, no I/O and no log, so the same code runs in a proxy, in tests, in a browser's wasm and in `explain`.
//!
//! A request's way: [`policy::Policy`] is read and compiled to a [`plan::Plan`]; [`plan::Plan::route`] finds service,
//! rule and split; [`plan::Split::choose`] the version; [`outcome::ErrorCodes::outcome`] says how it ended.

pub mod decode;
pub mod hostname;
pub mod matching;
mod name;
pub mod outcome;
pub mod plan;
pub mod policy;
pub mod report;
pub mod request;
pub mod sequence;
pub mod shift;

pub use name::{OWN_HEADERS, VERSION_HEADER};
