//! Mutual authentication of replicas with TLS: all have the same certificate. It names a Service, not the addresses of
//! replicas, and its issuer need not be in the file; therefore the certificate itself is compared. The client also
//! presents it, so that the server trusts it about the proxy whose request it forwards.

use reqwest::Client;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use std::path::PathBuf;
use std::sync::Arc;

/// Accepts only peers with this replica's own certificate and key, as currently in the files.
#[derive(Debug, Clone)]
pub struct PinnedCertVerifier {
    certificate: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
}

impl PinnedCertVerifier {
    /// From the files that this replica serves with.
    pub fn new(certificate: PathBuf, key: PathBuf) -> Self {
        Self { certificate, key, provider: Arc::new(ring::default_provider()) }
    }

    /// A client builder that connects only to such replicas.
    pub(super) fn client(&self) -> Result<reqwest::ClientBuilder, String> {
        let config = ClientConfig::builder_with_provider(self.provider.clone()).with_safe_default_protocol_versions();
        let config = config.map_err(|error| error.to_string())?.dangerous();
        let config = config.with_custom_certificate_verifier(Arc::new(self.clone()));
        Ok(Client::builder().tls_backend_preconfigured(config.with_client_cert_resolver(Arc::new(self.clone()))))
    }
}

impl ResolvesClientCert for PinnedCertVerifier {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let certificate = CertificateDer::from_pem_file(&self.certificate).ok()?;
        let key = ring::sign::any_supported_type(&PrivateKeyDer::from_pem_file(&self.key).ok()?).ok()?;
        Some(Arc::new(CertifiedKey::new(vec![certificate], key)))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for PinnedCertVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let path = self.certificate.display();
        let own = CertificateDer::from_pem_file(&self.certificate)
            .map_err(|error| Error::General(format!("{path}: {error}")))?;
        match own == *end_entity {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(Error::General(format!("its certificate is not the one in {path}"))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
