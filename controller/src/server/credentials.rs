//! Tokens and certificates from files, which are read at startup and reloaded on change.

use crate::api::Tokens;
use crate::metrics::ControllerMetrics;
use crate::server::file_source::Files;
use crate::server::tls::Server;
use crate::server::{LOOK, Options, ServeError, TlsFiles};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;
use tokio::time::interval;

/// A certificate that expires within this many seconds causes a warning: one week.
const SOON: i64 = 7 * 24 * 3600;

/// The tokens and the TLS certificate with its key, reloaded when their files change.
pub(super) struct Secrets {
    files: Files,
    pub(super) tokens: watch::Sender<Tokens>,
    pub(super) tls: Option<watch::Sender<Arc<Server>>>,
}

impl Secrets {
    pub(super) fn load(options: &Options) -> Result<Self, ServeError> {
        let mut paths = options.tokens.paths();
        paths.extend(options.tls.iter().flat_map(TlsFiles::paths));
        // Stat the files before reading them, as for documents.
        let files = Files::new(&paths, Instant::now());
        let tokens = options.tokens.load()?;
        if !tokens.are_needed() && !options.has_client_ca() && !options.listen.ip().is_loopback() {
            return Err(ServeError::NotLoopback(options.listen));
        }
        let tls = options.tls.as_ref().map(TlsFiles::load).transpose()?;
        Ok(Self { files, tokens: watch::Sender::new(tokens), tls: tls.map(watch::Sender::new) })
    }

    /// Reloads them on change; if that fails, the previous ones stay in use.
    pub(super) async fn keep_fresh(mut self, options: Options, done: ControllerMetrics) {
        let look_at_certificate = || {
            let Some((tls, at)) = options.tls.as_ref().and_then(|tls| Some((tls, tls.expires()?))) else { return };
            done.certificate_expires(at.as_millisecond() as f64 / 1e3);
            let (path, left) = (tls.cert.display(), at.as_second() - jiff::Timestamp::now().as_second());
            match left {
                ..=0 => tracing::warn!("--tls-cert {path}: expired at {at}; clients refuse it, renew it"),
                1..SOON => tracing::warn!("--tls-cert {path}: expires at {at}; renew it"),
                _ => {}
            }
        };
        look_at_certificate();
        let left_out = options.tokens.left_out(options.has_client_ca());
        if !left_out.is_empty() {
            tracing::warn!("{left_out}");
        }
        if self.tokens.borrow().has_nameless_proxies() {
            tracing::warn!(
                "--proxy-token-file has tokens without a name, each of which speaks for any proxy and sees all services; \
                 write NAME TOKEN, or NAME TOKEN SERVICES, to bind one to the proxy NAME"
            );
        }
        if options.tls.is_none() && !options.listen.ip().is_loopback() {
            tracing::warn!(
                "tokens and sessions' secrets travel in clear text unless something else encrypts: no --tls-cert"
            );
        }
        let mut look = interval(LOOK);
        loop {
            look.tick().await;
            if self.files.changed(Instant::now()).is_empty() {
                continue;
            }
            match options.tokens.load() {
                Ok(tokens) => {
                    if tokens.are_needed() {
                        tracing::info!("tokens were read again");
                    }
                    self.tokens.send_replace(tokens);
                }
                Err(error) => tracing::error!("{error}; the tokens from before stay"),
            }
            match (&self.tls, options.tls.as_ref().map(TlsFiles::load)) {
                (Some(tls), Some(Ok(config))) => {
                    tls.send_replace(config);
                    look_at_certificate();
                    tracing::info!("the certificate and the clients' authority were read again");
                }
                (_, Some(Err(error))) => tracing::error!("{error}; the certificate from before stays"),
                _ => {}
            }
        }
    }
}
