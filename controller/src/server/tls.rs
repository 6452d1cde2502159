//! The TLS certificate and key, from PEM files, and the verification of client certificates: those that the client CA
//! has signed, and those of other replicas, which share this one's certificate.

use crate::api::Certificate;
use crate::net::io_reason;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme,
};

/// The files of the TLS configuration.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate and its chain, in that order.
    pub cert: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The CA that signs client certificates of proxies; `None`: no client certificates.
    pub client_ca: Option<PathBuf>,
}

/// The current TLS configuration.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) config: Arc<ServerConfig>,
    /// The server's certificate, which other replicas share.
    own: CertificateDer<'static>,
}

impl Server {
    /// The identity in a verified client certificate.
    pub(super) fn client(&self, certificate: &CertificateDer<'_>) -> Certificate {
        match *certificate == self.own {
            true => Certificate::Replica,
            false => Certificate::proxy(names(certificate).unwrap_or_default()),
        }
    }
}

/// Why TLS cannot be configured.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {}: {why}", path.display())]
pub struct TlsError {
    flag: &'static str,
    path: PathBuf,
    why: String,
}

impl TlsFiles {
    /// The files, to watch them for changes.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        [&self.cert, &self.key].into_iter().chain(&self.client_ca).cloned().collect()
    }

    /// The expiry of the certificate; `None` if it cannot be parsed.
    pub(super) fn expires(&self) -> Option<jiff::Timestamp> {
        not_after(&CertificateDer::from_pem_file(&self.cert).ok()?)
    }

    /// Loads the files.
    ///
    /// # Errors
    ///
    /// If a file cannot be read or is not PEM, or if the key does not match the certificate.
    pub(super) fn load(&self) -> Result<Arc<Server>, TlsError> {
        let of_cert = |why: String| TlsError { flag: "--tls-cert", path: self.cert.clone(), why };
        let of_key = |why: String| TlsError { flag: "--tls-key", path: self.key.clone(), why };
        let certs = certificates(&self.cert).map_err(of_cert)?;
        let Some(own) = certs.first().cloned() else {
            return Err(of_cert("no certificate in it; expected PEM".to_owned()));
        };
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key).map_err(of_key)?);
        let key = key.map_err(|error| of_key(pem_reason(&error)))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().map_err(|error| of_cert(error.to_string()))?;
        let config = match &self.client_ca {
            None => config.with_no_client_auth(),
            Some(path) => {
                let clients = Clients::read(path, own.clone());
                let of_ca = |why| TlsError { flag: "--tls-client-ca", path: path.clone(), why };
                config.with_client_cert_verifier(Arc::new(clients.map_err(of_ca)?))
            }
        };
        let config = config.with_single_cert(certs, key);
        let mut config = config.map_err(|error| of_cert(format!("with {}: {error}", self.key.display())))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(Server { config: Arc::new(config), own }))
    }
}

/// Verifies client certificates, which are optional.
#[derive(Debug)]
struct Clients {
    own: CertificateDer<'static>,
    of_authority: Arc<dyn ClientCertVerifier>,
}

impl Clients {
    fn read(path: &Path, own: CertificateDer<'static>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|error| format!("not an authority's certificate: {error}"))?;
        }
        if roots.is_empty() {
            return Err("no certificate in it; expected PEM".to_owned());
        }
        let provider = Arc::new(ring::default_provider());
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let of_authority = builder.allow_unauthenticated().build().map_err(|error| error.to_string())?;
        Ok(Self { own, of_authority })
    }
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.of_authority.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.own == *end_entity {
            true => Ok(ClientCertVerified::assertion()),
            false => self.of_authority.verify_client_cert(end_entity, intermediates, now),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.of_authority.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.of_authority.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.of_authority.supported_verify_schemes()
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    certificates.map_err(|error| pem_reason(&error))
}

const SEQUENCE: u8 = 0x30;

/// The content of the leading SEQUENCE.
fn inside(der: &[u8]) -> Option<&[u8]> {
    element(der).filter(|(tag, ..)| *tag == SEQUENCE).map(|(_, content, _)| content)
}

/// The fields of a certificate from its validity on (RFC 5280, section 4.1).
fn from_validity(certificate: &[u8]) -> Option<&[u8]> {
    let mut fields = inside(inside(certificate)?)?;
    // The version is optional; serial number, signature algorithm and issuer are skipped.
    let (first, _, rest) = element(fields)?;
    fields = if first == 0xa0 { rest } else { fields };
    for _ in 0..3 {
        fields = element(fields)?.2;
    }
    Some(fields)
}

/// The names in a certificate: the subject's common name, and the DNS names and URIs of the subject alternative name.
fn names(certificate: &[u8]) -> Option<Vec<String>> {
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];
    let mut names = Vec::new();
    let (_, subject, rest) = element(element(from_validity(certificate)?)?.2)?;
    for (_, set) in elements(subject) {
        for (_, attribute) in elements(set) {
            let (_, kind, value) = element(attribute)?;
            let value = element(value).filter(|_| kind == COMMON_NAME);
            names.extend(value.map(|(_, text, _)| text));
        }
    }
    // The key comes next, then the optional fields: unique identifiers and extensions.
    let extensions = elements(element(rest)?.2).find(|(tag, _)| *tag == 0xa3).and_then(|(_, all)| inside(all));
    for (_, extension) in elements(extensions.unwrap_or_default()) {
        let Some((_, content)) = elements(extension)
            .last()
            .filter(|_| element(extension).is_some_and(|(_, kind, _)| kind == ALTERNATIVE_NAMES))
        else {
            continue;
        };
        // DNS names are [2], URIs [6].
        let of_kinds = elements(inside(content)?).filter(|(tag, _)| [0x82, 0x86].contains(tag));
        names.extend(of_kinds.map(|(_, text)| text));
    }
    let mut texts: Vec<String> = Vec::new();
    for text in names.into_iter().filter_map(|name| std::str::from_utf8(name).ok()) {
        if !texts.iter().any(|known| known == text) {
            texts.push(text.to_owned());
        }
    }
    Some(texts)
}

/// Iterates over consecutive DER elements, each with its tag.
fn elements(mut der: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (tag, content, rest) = element(der)?;
        der = rest;
        Some((tag, content))
    })
}

/// The end of a certificate's validity.
fn not_after(certificate: &[u8]) -> Option<jiff::Timestamp> {
    let fields = from_validity(certificate)?;
    let (_, _, not_after) = element(inside(fields)?)?;
    let (tag, time, _) = element(not_after)?;
    let time = std::str::from_utf8(time).ok()?;
    // UTCTime has two-digit years, from 1950 to 2049.
    let century = if tag != 0x17 {
        ""
    } else if time < "50" {
        "20"
    } else {
        "19"
    };
    let digits = format!("{century}{time}");
    let part = |from: usize, to: usize| digits.get(from..to);
    let (year, month, day) = (part(0, 4)?, part(4, 6)?, part(6, 8)?);
    format!("{year}-{month}-{day}T{}:{}:{}Z", part(8, 10)?, part(10, 12)?, part(12, 14)?).parse().ok()
}

/// The first DER element: its tag, its content and the rest.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk()?;
    let (length, rest) = match first {
        0..0x80 => (usize::from(first), rest),
        _ => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let wide = bytes.len() <= 4;
            (wide.then(|| bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))?, rest)
        }
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = match u8::try_from(content.len()) {
            Ok(short) if short < 0x80 => vec![short],
            _ => [&[0x82][..], &u16::try_from(content.len()).unwrap().to_be_bytes()].concat(),
        };
        [&[tag][..], &length, content].concat()
    }

    fn certificate(version: &[u8], issuer: &[u8], end: (u8, &str)) -> Vec<u8> {
        let validity = der(0x30, &[der(0x17, b"250101000000Z"), der(end.0, end.1.as_bytes())].concat());
        let fields = [version, &der(2, &[1]), &der(0x30, &[]), &der(0x30, issuer), &validity, &der(0x30, &[])].concat();
        der(0x30, &[der(0x30, &fields), der(0x30, &[])].concat())
    }

    #[test]
    fn the_end_of_a_certificate_is_read() {
        let version = der(0xa0, &der(2, &[2]));
        for (version, issuer, end, expected) in [
            (version.as_slice(), &[0; 300][..], (0x17, "261201235959Z"), Some("2026-12-01T23:59:59Z")),
            (&[], &[], (0x17, "991231000000Z"), Some("1999-12-31T00:00:00Z")),
            (&[], &[], (0x18, "21000101000000Z"), Some("2100-01-01T00:00:00Z")),
            (&[], &[], (0x17, "no time"), None),
        ] {
            let read = not_after(&certificate(version, issuer, end)).map(|at| at.to_string());
            assert_eq!(read.as_deref(), expected);
        }
        let whole = certificate(&[], &[], (0x17, "261201235959Z"));
        assert!((0..whole.len() / 2).all(|end| not_after(&whole[..end]).is_none()), "cut off");
    }

    #[test]
    fn a_certificate_names_its_subject_and_its_alternative_names() {
        let oid = |bytes: &[u8]| der(6, bytes);
        let attribute = |kind: &[u8], text: &[u8]| der(0x31, &der(0x30, &[oid(kind), der(0x0c, text)].concat()));
        let subject = [attribute(&[0x55, 4, 10], b"an organisation"), attribute(&[0x55, 4, 3], b"edge-1")].concat();
        let general = [der(0x82, b"edge-1"), der(0x86, b"spiffe://a/b"), der(0x87, &[10, 0, 0, 1])].concat();
        let extension = |kind: &[u8], content: &[u8]| {
            der(0x30, &[oid(kind), der(1, &[0xff]), der(4, &der(0x30, content))].concat())
        };
        let extensions = [extension(&[0x55, 0x1d, 0x0f], &general), extension(&[0x55, 0x1d, 0x11], &general)].concat();
        let fields = [
            der(2, &[1]),
            der(0x30, &[]),
            der(0x30, &[]),
            der(0x30, &[]),
            der(0x30, &subject),
            der(0x30, &[]),
            der(0xa3, &der(0x30, &extensions)),
        ];
        let whole = der(0x30, &[der(0x30, &fields.concat()), der(0x30, &[])].concat());
        assert_eq!(names(&whole).unwrap(), ["edge-1", "spiffe://a/b"]);
        assert!((0..whole.len()).all(|end| names(&whole[..end]).is_none_or(|names| names.len() <= 2)), "cut off");
    }
}
