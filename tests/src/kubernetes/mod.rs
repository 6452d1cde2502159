//! Kubernetes for tests: an API server of the tests' own, and what makes pods and endpoints there.
//!
//! [`kubelet`] goes with any API server, also with a bare control plane that has no node; [`controllers`] are for the
//! [`apiserver`] here, which has no controller manager. [`chart`] is the Helm chart as Helm would render it.

use std::path::Path;

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

pub mod apiserver;
pub mod chart;
pub mod controllers;
pub mod kubelet;
pub mod rig;

/// A client by a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
