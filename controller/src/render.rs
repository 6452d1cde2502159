//! Configuration for others, made from TrafficShift documents, so that nobody writes it by hand.

pub mod envoy;
mod yaml;
