//! Container images without a container engine, as OCI image layouts: what `docker build` would do for `FROM scratch`,
//! but the same bytes whenever and wherever it is done. No times, no users' names, files in order.

mod layout;

pub use layout::Digest;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// An image of one layer.
#[derive(Debug, Clone)]
pub struct Image {
    /// What the image is called, without a registry.
    name: &'static str,
    /// Shown by registries.
    description: &'static str,
    /// What runs it: architecture and operating system.
    platform: [&'static str; 2],
    /// How it is run, as the image configuration has it.
    run: Value,
    /// In the order of their paths.
    files: Vec<File>,
}

/// A file of an image, owned by root.
#[derive(Debug, Clone)]
struct File {
    /// From the root on, without the first `/`.
    path: &'static str,
    mode: u32,
    content: Vec<u8>,
}

impl Image {
    /// The filter's module, as those fetch it who take modules from registries (Istio's agent, Envoy Gateway): in its
    /// only layer, as `plugin.wasm`.
    pub fn module(wasm: Vec<u8>) -> Self {
        Self {
            name: "tideshift-filter",
            description: "Tideshift's filter for Envoy: a WebAssembly module",
            platform: ["wasm", "wasip1"],
            run: json!({}),
            files: vec![File { path: "plugin.wasm", mode: 0o644, content: wasm }],
        }
    }

    /// The controller's image: a static binary and the CA certificates that it trusts when it calls webhooks. It runs as
    /// user 65532, as distroless images do.
    pub fn controller(binary: Vec<u8>) -> Self {
        let certificates = File { path: CERTIFICATES, mode: 0o644, content: certificates().into_bytes() };
        Self {
            name: "tideshift",
            description: "Tideshift's controller and command line",
            platform: ["amd64", "linux"],
            run: json!({"Entrypoint": ["/tideshift"], "User": "65532:65532", "WorkingDir": "/"}),
            files: vec![certificates, File { path: "tideshift", mode: 0o755, content: binary }],
        }
    }
}

/// Where the first of TLS libraries look.
const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// The certificate authorities that Mozilla trusts, as PEM.
fn certificates() -> String {
    let pem = |der: &[u8]| {
        let base64 = STANDARD.encode(der);
        let lines: String =
            base64.as_bytes().chunks(64).map(|line| format!("{}\n", String::from_utf8_lossy(line))).collect();
        format!("-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n")
    };
    webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().map(|der| pem(der)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_pem() {
        let pem = certificates();
        let begins = pem.matches("-----BEGIN CERTIFICATE-----\n").count();
        assert!(begins > 100 && begins == webpki_root_certs::TLS_SERVER_ROOT_CERTS.len(), "{begins}");
        assert!(pem.lines().all(|line| line.len() <= 64 && !line.is_empty()));
        let first = pem.split("-----").nth(2).unwrap().replace('\n', "");
        assert_eq!(STANDARD.decode(first).unwrap(), webpki_root_certs::TLS_SERVER_ROOT_CERTS[0].as_ref());
    }
}
