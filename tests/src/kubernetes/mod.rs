//! Kubernetes for tests: an API server of the tests' own, and what makes pods and endpoints there.

pub mod apiserver;
