//! Kubernetes: TrafficShifts as resources, readiness from EndpointSlices, several replicas of which one leads.

pub mod picture;
pub mod resolve;
