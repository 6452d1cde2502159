//! What the controller and the filter exchange: policies, their delivery, and reports.

pub mod delivery;
pub mod policy;
pub mod report;
