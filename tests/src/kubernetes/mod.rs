//! Kubernetes for tests: an API server, and stand-ins that create pods and endpoints.
//!
//! [`kubelet`] works with any API server, including a bare control plane without nodes; [`controllers`] are for the
//! [`apiserver`] here, which has no controller manager. [`chart`] is the Helm chart as Helm would render it.

use std::path::Path;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

pub mod apiserver;
pub mod chart;
pub mod controllers;
pub mod kubelet;
pub mod test_bed;

/// A client by a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// The format of a ServiceAccount's token for an audience. It is not signed.
pub fn jwt(account: &str, audience: &str) -> String {
    let claims = serde_json::json!({ "iss": "https://kubernetes.default.svc", "aud": [audience], "sub": account });
    let header = serde_json::json!({ "alg": "RS256", "kid": "of-the-tests" });
    format!("{}.{}.c2lnbmVk", base64url(&header.to_string()), base64url(&claims.to_string()))
}

fn base64url(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let of_three = |bytes: &[u8]| {
        let bits = (0..3).fold(0, |bits, i| bits << 8 | usize::from(bytes.get(i).copied().unwrap_or_default()));
        let digits = (0..4).map(move |i| char::from(DIGITS[bits >> (18 - 6 * i) & 63]));
        digits.take(bytes.len() + 1).collect::<String>()
    };
    text.as_bytes().chunks(3).map(of_three).collect()
}
