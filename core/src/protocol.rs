//! The protocol between controller and filter: policies, their delivery, and reports.

pub mod delivery;
pub mod policy;
pub mod report;
