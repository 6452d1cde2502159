//! Tideshift's decisions, shared by the filter (data plane) and the controller (control plane): the documents and their
//! validation, the choice of a version for a request, and the classification of an exchange. All functions are pure: no
//! clock, randomness, I/O or logging, so the same code runs in a proxy, in tests, in a browser's wasm and in `explain`.
//!
//! The path of a request: a [`policy::Policy`] is compiled to a [`plan::Plan`]; [`plan::Plan::decide`] finds the
//! service, rule and split, and then the version by session ([`session`]) or by turn ([`split`]);
//! [`outcome::ErrorCodes::outcome`] classifies the result.

pub mod choice;
pub mod counting;
pub mod counts;
pub mod decode;
pub mod evidence;
pub mod guard;
pub mod limits;
pub mod matching;
mod name;
pub mod outcome;
pub mod protocol;
#[cfg(feature = "schema")]
pub mod schema;
pub mod secret_ref;
pub mod session;
pub mod shift;
pub mod verdict;

pub use name::{EXPLAIN_HEADER, MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};
