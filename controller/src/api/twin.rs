//! How replicas know each other when they speak TLS: all have the same certificate. It names a Service, not the addresses
//! by which replicas reach each other, and who has issued it need not be in its file; so it is compared itself.

use reqwest::Client;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use std::path::PathBuf;
use std::sync::Arc;

/// A client's builder that talks to replicas with the certificate in a file alone, as it is by then.
pub(super) fn client(certificate: PathBuf) -> Result<reqwest::ClientBuilder, String> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let twin = Twin { certificate, provider };
    let config =
        config.map_err(|error| error.to_string())?.dangerous().with_custom_certificate_verifier(Arc::new(twin));
    Ok(Client::builder().tls_backend_preconfigured(config.with_no_client_auth()))
}

/// Takes nobody but whoever has this replica's own certificate, and its key.
#[derive(Debug)]
struct Twin {
    certificate: PathBuf,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Twin {
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
