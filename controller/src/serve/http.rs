//! The listening side: takes connections, as many as there may be, speaks TLS with them if there is a certificate, and
//! leaves their requests to the API. Whoever is slow to say what he wants is sent away.

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tower::ServiceExt;

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long the head of a request may take, and how long a connection may have none under way.
const HEAD: Duration = Duration::from_secs(15);
/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// How long a client may leave what it is sent unread.
#[cfg(target_os = "linux")]
const UNREAD_MILLIS: u32 = 30_000;
/// The most connections: two for each of 10,000 proxies, and then some.
const MAX_CONNECTIONS: u64 = 30_000;
/// The least that is tried, however few files the system gives.
const MIN_CONNECTIONS: u64 = 64;
/// Open files that are not clients' connections: probes, state, webhooks.
const OTHER_FILES: u64 = 512;

/// The TLS configuration for connections from now on.
pub(super) type Tls = watch::Receiver<Arc<ServerConfig>>;

/// Serves until `ending` is true and every request that had begun by then has its answer. Of more than so many
/// connections at a time, the others wait.
pub(super) async fn serve(
    listener: TcpListener,
    connections: usize,
    tls: Option<Tls>,
    api: Router,
    mut ending: watch::Receiver<bool>,
) {
    let slots = Arc::new(Semaphore::new(connections));
    let graceful = GracefulShutdown::new();
    loop {
        // The semaphore is never closed.
        let next = async { (slots.clone().acquire_owned().await.ok(), accept(&listener).await) };
        let (slot, (stream, peer)) = tokio::select! {
            next = next => next,
            _ = ending.wait_for(|ending| *ending) => break,
        };
        let connection = Connection { peer, api: api.clone(), watcher: graceful.watcher(), _slot: slot };
        // Each in a task of its own kind: thousands that speak no TLS need not have the room for it.
        match tls.as_ref().map(|tls| TlsAcceptor::from(tls.borrow().clone())) {
            None => tokio::spawn(connection.serve(stream)),
            Some(acceptor) => tokio::spawn(connection.serve_tls(stream, acceptor)),
        };
    }
    drop(listener);
    graceful.shutdown().await;
}

/// One of a client's connections.
struct Connection {
    peer: SocketAddr,
    api: Router,
    watcher: Watcher,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Connection {
    async fn serve_tls(self, stream: TcpStream, acceptor: TlsAcceptor) {
        match timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.serve(stream).await,
            Ok(Err(error)) => tracing::debug!(peer = %self.peer, "no TLS: {error}"),
            Err(_) => tracing::debug!(peer = %self.peer, "no TLS within {} s", HANDSHAKE.as_secs()),
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
        let Self { peer, api, watcher, _slot } = self;
        let service = service_fn(|mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            api.clone().oneshot(request.map(Body::new))
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD).max_header_size(MAX_HEAD);
        // What fails now is the client's: it went away, or it does not speak HTTP.
        let _ = watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await;
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        let error = match listener.accept().await.and_then(set_up) {
            Ok(accepted) => return accepted,
            Err(error) => error,
        };
        if !is_the_clients(&error) {
            tracing::error!("cannot take a connection: {error}");
            sleep(Duration::from_secs(1)).await;
        }
    }
}

fn set_up((stream, peer): (TcpStream, SocketAddr)) -> io::Result<(TcpStream, SocketAddr)> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    rustix::net::sockopt::set_tcp_user_timeout(&stream, UNREAD_MILLIS)?;
    Ok((stream, peer))
}

/// Whether it concerns the one connection only.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, InvalidInput, NotConnected};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | InvalidInput | NotConnected)
}

/// As many connections as the system lets us have files, which is raised as far as it goes.
pub(super) fn max_connections() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = MAX_CONNECTIONS + OTHER_FILES;
    let most = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let mut files = limit.current.unwrap_or(wanted);
    if files < most && setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit }).is_ok() {
        files = most;
    }
    files.saturating_sub(OTHER_FILES).clamp(MIN_CONNECTIONS, MAX_CONNECTIONS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    async fn answer(stream: &mut TcpStream) -> String {
        let mut bytes = [0; 1024];
        let read = stream.read(&mut bytes).await.unwrap();
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    }

    async fn start(api: Router) -> (SocketAddr, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ending) = watch::channel(false);
        (address, end, tokio::spawn(serve(listener, 2, None, api, ending)))
    }

    #[tokio::test]
    async fn connections_beyond_the_most_wait_their_turn() {
        let (address, _end, _server) = start(Router::new().route("/", get(async || "hello"))).await;
        let mut idle = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        for stream in &mut idle {
            stream.write_all(REQUEST).await.unwrap();
            assert!(answer(stream).await.ends_with("hello"));
        }
        let mut third = TcpStream::connect(address).await.unwrap();
        third.write_all(REQUEST).await.unwrap();
        let turn = timeout(Duration::from_millis(200), answer(&mut third)).await;
        assert!(turn.is_err(), "it was answered beyond the most: {turn:?}");
        drop(idle);
        assert!(answer(&mut third).await.ends_with("hello"));
    }

    #[tokio::test]
    async fn what_has_begun_is_ended_and_nothing_else_begun() {
        let ((go, gone), (begin, mut has_begun)) = (watch::channel(false), watch::channel(false));
        let slow = get(async move || {
            begin.send_replace(true);
            let _ = gone.clone().wait_for(|gone| *gone).await;
            "at last"
        });
        let (address, end, server) = start(Router::new().route("/", get("hello")).route("/slow", slow)).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        idle.write_all(REQUEST).await.unwrap();
        assert!(answer(&mut idle).await.ends_with("hello"));
        let mut begun = TcpStream::connect(address).await.unwrap();
        begun.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        has_begun.wait_for(|begun| *begun).await.unwrap();
        end.send_replace(true);
        assert_eq!(answer(&mut idle).await, "", "closed at once");
        assert!(!server.is_finished());
        go.send_replace(true);
        assert!(answer(&mut begun).await.ends_with("at last"));
        server.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }
}
