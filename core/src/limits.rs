//! Limits and defaults shared by readers, schema and the rules of the CRD.

/// The maximum timeout of a route: one day, in seconds.
pub(crate) const LONGEST_ROUTE_TIMEOUT: u64 = 24 * 3600;

/// The maximum duration in a document: one year, in seconds.
pub(crate) const LONGEST_SECONDS: u64 = 365 * 24 * 3600;

/// The largest weight, as in Gateway API.
pub const MAX_WEIGHT: u32 = 1_000_000;

/// The maximum number of versions of one service; keeps every sum of weights below 2^32.
pub const MAX_VERSIONS: usize = 1_000;

/// The names of the phases of a rollout.
pub const PHASES: [&str; 6] = ["Initialized", "Waiting", "Progressing", "Paused", "Succeeded", "Failed"];
