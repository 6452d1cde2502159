//! The controller in Kubernetes: the tests' own API server, or a real control plane.

mod apiserver;
mod cluster;
mod controllers;
mod faults;
mod manifests;
mod plugin;
mod schemas;
mod secrets;
mod state;
mod tls;
mod trust;
mod webhooks;
