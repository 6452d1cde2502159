//! The choice of a version for a request: the compiled policy, its rules, and the split by weight.

pub mod plan;
pub mod rules;
pub mod sequence;
pub mod split;
