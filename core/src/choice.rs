//! Which version a request goes to: the compiled policy, its rules, and the split by weight.

pub mod plan;
pub mod rules;
pub mod sequence;
pub mod split;
