//! The listener: accepts connections up to a limit, terminates TLS if there is a certificate, and passes requests to
//! the API. A client that is slow to send its request is disconnected; `api/admission` decides which connections to
//! close when there are too many.

use crate::api::{Admission, Certificate, Ticket};
use crate::server::tls::Server;
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
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

/// Timeout of a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Timeout of a request head, and of an idle connection.
const HEAD: Duration = Duration::from_secs(5);
/// The maximum size of a request head, in bytes.
const MAX_HEAD: usize = 16 << 10;
/// How long a client may leave sent data unacknowledged.
#[cfg(target_os = "linux")]
const UNREAD_MILLIS: u32 = 30_000;
/// The maximum number of connections: two for each of 10,000 proxies, with a reserve.
const MAX_CONNECTIONS: u64 = 30_000;
/// The minimum number of connections, whatever the limit on open files.
const MIN_CONNECTIONS: u64 = 64;
/// Open files other than client connections: probes, state, webhooks.
const OTHER_FILES: u64 = 512;

/// The TLS configuration of new connections.
pub(super) type Tls = watch::Receiver<Arc<Server>>;

/// Serves until `ending` is true and every request in flight has been answered.
pub(super) async fn serve(
    listener: TcpListener,
    admission: Arc<Admission>,
    tls: Option<Tls>,
    api: Router,
    mut ending: watch::Receiver<bool>,
) {
    let graceful = GracefulShutdown::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            _ = ending.wait_for(|ending| *ending) => break,
        };
        let Some(ticket) = admission.admit(peer.ip(), Instant::now()).map(Arc::new) else {
            tracing::debug!(%peer, "too many connections without a good token");
            continue;
        };
        let connection = Connection { peer, api: api.clone(), watcher: graceful.watcher(), ticket };
        // Spawned as separate task types, so that plain connections do not reserve memory for TLS.
        match tls.as_ref().map(|tls| tls.borrow().clone()) {
            None => tokio::spawn(connection.run(stream)),
            Some(tls) => tokio::spawn(connection.run_tls(stream, tls)),
        };
    }
    drop(listener);
    graceful.shutdown().await;
}

/// A client connection.
struct Connection {
    peer: SocketAddr,
    api: Router,
    watcher: Watcher,
    ticket: Arc<Ticket>,
}

impl Connection {
    async fn run_tls(self, stream: TcpStream, tls: Arc<Server>) {
        let (peer, ticket) = (self.peer, self.ticket.clone());
        let acceptor = TlsAcceptor::from(tls.config.clone());
        let serve = async {
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let certificates = stream.get_ref().1.peer_certificates();
                    let certificate = certificates.and_then(<[_]>::first).map(|own| tls.client(own));
                    self.serve(stream, certificate).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, "no TLS: {error}"),
                Err(_) => tracing::debug!(%peer, "no TLS within {} s", HANDSHAKE.as_secs()),
            }
        };
        unless_evicted(peer, &ticket, serve).await;
    }

    async fn run(self, stream: TcpStream) {
        let (peer, ticket) = (self.peer, self.ticket.clone());
        unless_evicted(peer, &ticket, self.serve(stream, None)).await;
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static, certificate: Option<Certificate>) {
        let Self { peer, api, watcher, ticket } = self;
        let phase = Arc::new(InHead(AtomicBool::new(true)));
        let stream = Metered { stream, ticket: ticket.clone(), phase: phase.clone() };
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            phase.0.store(false, Ordering::Relaxed);
            ticket.end_head();
            let extensions = request.extensions_mut();
            extensions.insert(ConnectInfo(peer));
            extensions.insert(ticket.clone());
            certificate.clone().map(|certificate| extensions.insert(certificate));
            let (answer, phase) = (api.clone().oneshot(request.map(Body::new)), phase.clone());
            async move {
                let answer = answer.await;
                phase.0.store(true, Ordering::Relaxed);
                answer
            }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD).max_header_size(MAX_HEAD);
        // An error here is the client's: it disconnected, or it does not speak HTTP.
        let _ = watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await;
    }
}

async fn unless_evicted(peer: SocketAddr, ticket: &Ticket, serve: impl Future<Output = ()>) {
    tokio::select! {
        () = serve => {}
        () = ticket.evicted() => tracing::debug!(%peer, "closed for another: it has shown no good token"),
    }
}

/// Whether the data being read is a request head: from one response until the next head is complete.
struct InHead(AtomicBool);

/// A connection with accounting of incomplete heads.
struct Metered<S> {
    stream: S,
    ticket: Arc<Ticket>,
    phase: Arc<InHead>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        let read = into.filled().len() - before;
        let fits = read == 0 || !self.phase.0.load(Ordering::Relaxed) || self.ticket.read_head(read);
        Poll::Ready(if fits { Ok(()) } else { Err(io::ErrorKind::OutOfMemory.into()) })
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
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

/// Whether an error affects only the one connection.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, InvalidInput, NotConnected};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | InvalidInput | NotConnected)
}

/// The maximum number of connections within the limit on open files, which this raises as far as allowed.
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

    async fn start(api: Router, connections: usize) -> (SocketAddr, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ending) = watch::channel(false);
        (
            address,
            end,
            tokio::spawn(serve(listener, Admission::new(connections, Default::default()), None, api, ending)),
        )
    }

    #[tokio::test]
    async fn strangers_that_hold_their_connections_give_way_and_clients_with_a_token_do_not() {
        let hello = get(async || "hello").layer(axum::middleware::from_fn(
            async |request: axum::extract::Request, next: axum::middleware::Next| {
                if request.uri().query() == Some("token") {
                    request.extensions().get::<Arc<Ticket>>().unwrap().trust(None);
                }
                next.run(request).await
            },
        ));
        // Of 64 connections 16 are for strangers, 4 for each address.
        let (address, _end, _server) = start(Router::new().route("/", hello), 64).await;
        let mut trusted = TcpStream::connect(address).await.unwrap();
        trusted.write_all(b"GET /?token HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert!(answer(&mut trusted).await.ends_with("hello"));
        let mut idle = Vec::new();
        for _ in 0..4 {
            idle.push(TcpStream::connect(address).await.unwrap());
            idle.last_mut().unwrap().write_all(REQUEST).await.unwrap();
            assert!(answer(idle.last_mut().unwrap()).await.ends_with("hello"));
        }
        sleep(Duration::from_millis(1_100)).await;
        let mut another = TcpStream::connect(address).await.unwrap();
        another.write_all(REQUEST).await.unwrap();
        assert!(answer(&mut another).await.ends_with("hello"));
        assert_eq!(answer(&mut idle[0]).await, "", "the oldest is closed");
        trusted.write_all(REQUEST).await.unwrap();
        assert!(answer(&mut trusted).await.ends_with("hello"), "a good token keeps its connection");
    }

    #[tokio::test]
    async fn what_has_begun_is_ended_and_nothing_else_begun() {
        let ((go, gone), (begin, mut has_begun)) = (watch::channel(false), watch::channel(false));
        let slow = get(async move || {
            begin.send_replace(true);
            let _ = gone.clone().wait_for(|gone| *gone).await;
            "at last"
        });
        let (address, end, server) = start(Router::new().route("/", get("hello")).route("/slow", slow), 64).await;
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
