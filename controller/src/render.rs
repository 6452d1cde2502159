//! Configuration for others, made from TrafficShift documents, so that nobody writes it by hand.

pub mod envoy;
pub mod envoy_gateway;
pub mod httproute;
pub mod istio;
mod kubernetes;
mod yaml;

pub use kubernetes::{Filter, Unfit};
