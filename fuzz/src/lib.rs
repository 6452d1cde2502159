//! What must hold for any input whatever, one module for each fuzz target. A panic is a finding.

pub mod choice;
pub mod policy;
pub mod report;
pub mod shift;

/// The controller's ledger alone: the rest of that crate would make a fuzz build four times as long.
#[allow(dead_code, unreachable_pub)]
#[path = "../../controller/src/reconciler/ledger.rs"]
mod ledger;
