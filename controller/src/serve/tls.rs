//! The certificate and its key, from PEM files.

use crate::net::io_reason;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The files of a certificate.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate and those that lead from it to a trusted one, in that order.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
}

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {}: {why}", path.display())]
pub struct TlsError {
    flag: &'static str,
    path: PathBuf,
    why: String,
}

impl TlsFiles {
    /// The files, to look for changes in them.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        vec![self.cert.clone(), self.key.clone()]
    }

    /// Reads them.
    ///
    /// # Errors
    ///
    /// If one cannot be read, is not PEM, or the key is not the certificate's.
    pub(super) fn load(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let of_cert = |why: String| TlsError { flag: "--tls-cert", path: self.cert.clone(), why };
        let of_key = |why: String| TlsError { flag: "--tls-key", path: self.key.clone(), why };
        let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(&self.cert).map_err(of_cert)?).collect();
        let certs = certs.map_err(|error| of_cert(pem_reason(&error)))?;
        if certs.is_empty() {
            return Err(of_cert("no certificate in it; expected PEM".to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key).map_err(of_key)?);
        let key = key.map_err(|error| of_key(pem_reason(&error)))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().map_err(|error| of_cert(error.to_string()))?;
        let config = config.with_no_client_auth().with_single_cert(certs, key);
        let mut config = config.map_err(|error| of_cert(format!("with {}: {error}", self.key.display())))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("cannot be read: {}", io_reason(&error)))
}

fn pem_reason(error: &pem::Error) -> String {
    match error {
        pem::Error::NoItemsFound => "no private key in it; expected PEM".to_owned(),
        error => format!("not PEM: {error}"),
    }
}
