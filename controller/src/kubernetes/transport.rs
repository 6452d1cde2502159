//! The transport to the API server: HTTP/2 where possible, so that hundreds of watches share a few connections. kube's
//! own client speaks HTTP/1.1 only, with one connection for each watch.
//!
//! An HTTP/2 server limits concurrent streams on a connection and queues further requests silently. A watch occupies a
//! stream for as long as it lasts. Therefore there are several connections, each with fewer streams than any API server
//! allows, and watches use other connections than short requests.

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::{Request, Response, Uri};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::legacy::{Builder, Client as Legacy};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use rustls::pki_types::ServerName;
use std::error::Error;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::OnceCell;
use tower::retry::RetryLayer;
use tower::util::option_layer;
use tower::{BoxError, Layer, Service};

/// The maximum number of streams on one HTTP/2 connection. API servers allow 100 or 250.
const MAX_EXCHANGES: usize = 80;
/// After this long without data a connection is pinged.
const PING: Duration = Duration::from_secs(10);
/// How long the server may take to answer a ping.
const PONG: Duration = Duration::from_secs(5);

/// A client that uses one HTTP/1.1 connection at a time, for sequential requests. Cancelling a request closes its
/// connection, so that the next request finds out at once whether the server is reachable.
pub(super) fn plain(config: Config) -> Result<Client, kube::Error> {
    Client::try_from(config)
}

/// A client whose watches share HTTP/2 connections.
pub(super) fn shared(config: Config) -> Result<Client, kube::Error> {
    // Without TLS there is no ALPN to negotiate the protocol; proxies are left to kube's client.
    if config.cluster_url.scheme_str() != Some("https") || config.proxy_url.is_some() {
        return plain(config);
    }
    let lanes = Lanes(Arc::new(Shared {
        one: Legacy::builder(TokioExecutor::new()).build(connector(&config, false)?),
        two: connector(&config, true)?,
        server: config.cluster_url.clone(),
        speaks_two: Mutex::default(),
        watches: Mutex::default(),
        others: Mutex::default(),
    }));
    let service = config.extra_headers_layer()?.layer(lanes);
    let service = option_layer(config.auth_layer()?).layer(service);
    let retry = config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry()));
    let service = config.base_uri_layer().layer(option_layer(retry).layer(service));
    Ok(Client::new(service, config.default_namespace))
}

type Secure = TimeoutConnector<HttpsConnector<HttpConnector>>;

/// The connector of kube's own client, which also offers HTTP/2 if `two` is set.
fn connector(config: &Config, two: bool) -> Result<Secure, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    let builder = HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
    let builder = match &config.tls_server_name {
        Some(name) => {
            let name = ServerName::try_from(name.clone()).map_err(|error| kube::Error::Service(error.into()))?;
            builder.with_server_name_resolver(FixedServerNameResolver::new(name))
        }
        None => builder,
    };
    let builder = builder.enable_http1();
    let tls = if two { builder.enable_http2().wrap_connector(tcp) } else { builder.wrap_connector(tcp) };
    let mut connector = TimeoutConnector::new(tls);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    Ok(connector)
}

/// Assigns each request to a connection with a free stream.
#[derive(Clone)]
struct Lanes(Arc<Shared>);

struct Shared {
    /// For servers that speak only HTTP/1.1.
    one: Legacy<Secure, Body>,
    two: Secure,
    server: Uri,
    /// Whether the server speaks HTTP/2, once negotiated. Another server may later answer at the same address.
    speaks_two: Mutex<Arc<OnceCell<bool>>>,
    watches: Mutex<Vec<Lane>>,
    others: Mutex<Vec<Lane>>,
}

/// One HTTP/2 connection, which is re-established when it is lost.
struct Lane {
    client: Legacy<OnlyTwo, Body>,
    load: Arc<Load>,
}

#[derive(Default)]
struct Load {
    exchanges: AtomicUsize,
    /// Whether a request on it timed out: the server may be gone.
    is_suspect: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service<Request<Body>> for Lanes {
    type Response = Response<Answer>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move { shared.send(request).await })
    }
}

impl Shared {
    async fn send(&self, request: Request<Body>) -> Result<Response<Answer>, BoxError> {
        if !self.speaks_two().await? {
            let response = self.one.request(request).await?;
            return Ok(response.map(|body| Answer { body, _exchange: None }));
        }
        let is_watch = request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"));
        let (client, exchange) = self.take_lane(if is_watch { &self.watches } else { &self.others });
        let mut waiting = Waiting { load: &exchange.0, is_watch, is_answered: false };
        let answered = client.request(request).await;
        waiting.is_answered = true;
        drop(waiting);
        match answered {
            Ok(response) => Ok(response.map(|body| Answer { body, _exchange: Some(exchange) })),
            Err(error) => {
                if is_of_one(&error) {
                    tracing::info!("the API server does not speak HTTP/2 any more");
                    *lock(&self.speaks_two) = Arc::default();
                }
                Err(error.into())
            }
        }
    }

    /// Negotiates the protocol on a separate connection. The first request does this, and the others wait for it.
    async fn speaks_two(&self) -> Result<bool, BoxError> {
        let known = lock(&self.speaks_two).clone();
        let ask = async {
            let mut connector = self.two.clone();
            std::future::poll_fn(|context| connector.poll_ready(context)).await?;
            let stream = connector.call(self.server.clone()).await?;
            Ok(stream.connected().is_negotiated_h2())
        };
        known.get_or_try_init(|| ask).await.copied()
    }

    fn take_lane(&self, lanes: &Mutex<Vec<Lane>>) -> (Legacy<OnlyTwo, Body>, Exchange) {
        for lanes in [&self.watches, &self.others] {
            // Idle connections are closed; the first one stays open for the next request.
            let mut is_first = true;
            lock(lanes).retain(|lane| {
                let is_kept = lane.load.exchanges.load(Ordering::Relaxed) > 0 || is_first;
                is_first = false;
                is_kept && !lane.load.is_suspect.load(Ordering::Relaxed)
            });
        }
        let mut lanes = lock(lanes);
        let has_room = |lane: &&Lane| lane.load.exchanges.load(Ordering::Relaxed) < MAX_EXCHANGES;
        let (client, load) = match lanes.iter().find(has_room) {
            Some(lane) => (lane.client.clone(), lane.load.clone()),
            None => {
                let lane = Lane { client: only_two(self.two.clone()), load: Arc::default() };
                let parts = (lane.client.clone(), lane.load.clone());
                lanes.push(lane);
                parts
            }
        };
        load.exchanges.fetch_add(1, Ordering::Relaxed);
        (client, Exchange(load))
    }
}

fn only_two(connector: Secure) -> Legacy<OnlyTwo, Body> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http2_only(true).timer(TokioTimer::new());
    // A silent watch may also be a dead connection.
    builder.http2_keep_alive_interval(PING).http2_keep_alive_timeout(PONG).http2_keep_alive_while_idle(true);
    builder.build(OnlyTwo(connector))
}

/// A request on a connection, from when it is sent until its response has ended.
struct Exchange(Arc<Load>);

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.exchanges.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits for the head of a response. A request that is cancelled before that marks its connection as suspect, so that
/// the next request uses another one.
struct Waiting<'a> {
    load: &'a Load,
    is_watch: bool,
    is_answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.is_answered && !self.is_watch {
            self.load.is_suspect.store(true, Ordering::Relaxed);
        }
    }
}

/// The body of a response.
struct Answer {
    body: Incoming,
    _exchange: Option<Exchange>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Connects, and refuses a server that does not speak HTTP/2.
#[derive(Clone)]
struct OnlyTwo(Secure);

#[derive(Debug, thiserror::Error)]
#[error("the API server does not speak HTTP/2 any more")]
struct SpeaksOne;

fn is_of_one(error: &(dyn Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(this) = error {
        if this.is::<SpeaksOne>() {
            return true;
        }
        error = this.source();
    }
    false
}

impl Service<Uri> for OnlyTwo {
    type Response = <Secure as Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        ready!(self.0.poll_ready(context))?;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let connecting = self.0.call(server);
        Box::pin(async move {
            let stream = connecting.await?;
            if stream.connected().is_negotiated_h2() { Ok(stream) } else { Err(SpeaksOne.into()) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body as Content;
    use futures_util::StreamExt;
    use futures_util::future::join_all;
    use hyper::server::conn::{http1, http2};
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::Api;
    use kube::api::{ListParams, WatchParams};
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::PrivateKeyDer;
    use std::sync::atomic::AtomicU32;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;

    /// The name in the server's certificate, which differs from its address.
    const NAME: &str = "kubernetes.default.svc";
    /// The maximum number of concurrent streams on a connection.
    const STREAMS: u32 = 100;

    /// An API server without objects: lists are empty, and watches never end.
    #[derive(Default)]
    struct Server {
        connections: AtomicUsize,
        watches: AtomicUsize,
        /// New connections speak only HTTP/1.1.
        is_old: AtomicBool,
        /// It accepts requests and never answers.
        is_mute: AtomicBool,
        /// It answers this many more requests with 429.
        is_busy: AtomicU32,
    }

    impl Server {
        async fn start() -> (Arc<Self>, Config) {
            let mut params = CertificateParams::new([NAME.to_owned()]).unwrap();
            params.is_ca = rcgen::IsCa::NoCa;
            let key = KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap().der().clone();
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let tls = rustls::ServerConfig::builder().with_no_client_auth();
            let tls = tls.with_single_cert(vec![certificate.clone()], key).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut config = Config::new(format!("https://{}", listener.local_addr().unwrap()).parse().unwrap());
            config.root_cert = Some(vec![certificate.to_vec()]);
            config.tls_server_name = Some(NAME.to_owned());
            config.auth_info.token = Some("secret".to_owned().into());
            let server = Arc::new(Self::default());
            let serving = server.clone();
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let mut tls = tls.clone();
                    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
                    if !serving.is_old.load(Ordering::Relaxed) {
                        tls.alpn_protocols.insert(0, b"h2".to_vec());
                    }
                    tokio::spawn(serving.clone().serve(stream, TlsAcceptor::from(Arc::new(tls))));
                }
            });
            (server, config)
        }

        async fn serve(self: Arc<Self>, stream: TcpStream, tls: TlsAcceptor) {
            let Ok(stream) = tls.accept(stream).await else { return };
            self.connections.fetch_add(1, Ordering::Relaxed);
            let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let server = self.clone();
            let service = service_fn(move |request| server.clone().answer(request));
            let stream = TokioIo::new(stream);
            if is_h2 {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                let _ = builder.max_concurrent_streams(STREAMS).serve_connection(stream, service).await;
            } else {
                let _ = http1::Builder::new().serve_connection(stream, service).await;
            }
            self.connections.fetch_sub(1, Ordering::Relaxed);
        }

        async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Content>, hyper::Error> {
            if self.is_mute.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            let is_busy = |left: u32| left.checked_sub(1);
            if self.is_busy.fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_busy).is_ok() {
                let mut response = Response::new(Content::empty());
                *response.status_mut() = hyper::StatusCode::TOO_MANY_REQUESTS;
                return Ok(response);
            }
            assert_eq!(request.headers()["authorization"], "Bearer secret");
            if request.uri().query().unwrap_or_default().contains("watch=true") {
                let watching = Watching(self);
                watching.0.watches.fetch_add(1, Ordering::Relaxed);
                let event = r#"{"type":"BOOKMARK","object":{"kind":"ConfigMap","apiVersion":"v1","metadata":{"resourceVersion":"1"}}}"#;
                let first = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from(format!("{event}\n")))]);
                let rest = futures_util::stream::once(async move {
                    let _watching = watching;
                    std::future::pending().await
                });
                return Ok(Response::new(Content::from_stream(first.chain(rest))));
            }
            let list = r#"{"kind":"ConfigMapList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}"#;
            Ok(Response::new(Content::from(list)))
        }
    }

    struct Watching(Arc<Server>);

    impl Drop for Watching {
        fn drop(&mut self) {
            self.0.watches.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn api(client: &Client, namespace: usize) -> Api<ConfigMap> {
        Api::namespaced(client.clone(), &format!("n{namespace}"))
    }

    async fn asked(client: &Client, within: Duration) -> bool {
        let api = api(client, 0);
        tokio::time::timeout(within, api.list(&ListParams::default())).await.is_ok_and(|answer| answer.is_ok())
    }

    const LONG: Duration = Duration::from_secs(10);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn watches_of_five_kinds_in_a_hundred_namespaces_take_fewer_than_twenty_connections() {
        let (server, config) = Server::start().await;
        let client = shared(config).unwrap();
        let params = WatchParams::default();
        let watch = async |n: usize| {
            let api = api(&client, n);
            api.list(&ListParams::default()).await.unwrap();
            let mut events = api.watch(&params, "0").await.unwrap().boxed();
            events.next().await.unwrap().unwrap();
            events
        };
        let watches = tokio::time::timeout(LONG, join_all((0..500).map(watch))).await.unwrap();
        let (open, connections) = (server.watches.load(Ordering::Relaxed), server.connections.load(Ordering::Relaxed));
        println!("WATCHES {open} on {connections} connections");
        assert_eq!(open, 500, "none of them waits for another one to end");
        assert!(connections <= 20, "{connections}");
        assert!(asked(&client, LONG).await, "what ends soon waits for no watch");
        drop(watches);
        let begun = tokio::time::Instant::now();
        while server.watches.load(Ordering::Relaxed) > 0 || server.connections.load(Ordering::Relaxed) > 2 {
            assert!(asked(&client, LONG).await && begun.elapsed() < LONG, "what is not used any more is closed");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_server_that_speaks_http_1_only_is_asked_by_that() {
        let (server, config) = Server::start().await;
        server.is_old.store(true, Ordering::Relaxed);
        let client = shared(config.clone()).unwrap();
        assert!(asked(&client, LONG).await);
        let watching = api(&client, 1).watch(&WatchParams::default(), "0").await.unwrap();
        assert!(asked(&client, LONG).await);
        drop(watching);

        // Another server may answer at the same address at any time.
        server.is_old.store(false, Ordering::Relaxed);
        let client = shared(config).unwrap();
        assert!(asked(&client, LONG).await);
        server.is_old.store(true, Ordering::Relaxed);
        server.is_mute.store(true, Ordering::Relaxed);
        assert!(!asked(&client, Duration::from_millis(100)).await);
        server.is_mute.store(false, Ordering::Relaxed);
        assert!(!asked(&client, LONG).await, "it finds out");
        assert!(asked(&client, LONG).await);
    }

    #[tokio::test]
    async fn a_connection_that_does_not_answer_is_left_for_another_one() {
        let (server, config) = Server::start().await;
        let client = shared(config).unwrap();
        assert!(asked(&client, LONG).await);
        server.is_mute.store(true, Ordering::Relaxed);
        assert!(!asked(&client, Duration::from_millis(100)).await);
        server.is_mute.store(false, Ordering::Relaxed);
        let before = server.connections.load(Ordering::Relaxed);
        assert!(asked(&client, LONG).await);
        assert!(server.connections.load(Ordering::Relaxed) > 0 && before <= 2, "{before}");
    }

    #[tokio::test]
    async fn a_server_that_is_busy_is_asked_again() {
        let (server, config) = Server::start().await;
        let client = shared(config).unwrap();
        server.is_busy.store(3, Ordering::Relaxed);
        assert!(asked(&client, LONG).await);
        assert_eq!(server.is_busy.load(Ordering::Relaxed), 0);
    }
}
