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

    /// Until when the certificate is valid; `None` if that cannot be read.
    pub(super) fn expires(&self) -> Option<jiff::Timestamp> {
        not_after(&CertificateDer::from_pem_file(&self.cert).ok()?)
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

/// The end of a certificate's validity (RFC 5280, section 4.1).
fn not_after(certificate: &[u8]) -> Option<jiff::Timestamp> {
    const SEQUENCE: u8 = 0x30;
    let inside = |der| element(der).filter(|(tag, ..)| *tag == SEQUENCE).map(|(_, content, _)| content);
    let mut fields = inside(inside(certificate)?)?;
    // The version may be left out; serial number, signature's algorithm and issuer are passed over.
    let (first, _, rest) = element(fields)?;
    fields = if first == 0xa0 { rest } else { fields };
    for _ in 0..3 {
        fields = element(fields)?.2;
    }
    let (_, _, not_after) = element(inside(fields)?)?;
    let (tag, time, _) = element(not_after)?;
    let time = std::str::from_utf8(time).ok()?;
    // UTCTime has years of two digits, from 1950 to 2049.
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

/// The first element of DER: its tag, what is in it, and what follows.
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
}
