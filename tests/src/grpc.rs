//! gRPC with tonic, both sides: a client, and the server side in a [`Backend`](crate::backend::Backend).
//!
//! Each call describes what happens to it, so that one upstream serves every test. The messages are JSON instead of
//! protocol buffers: no generated code is needed, and proxies do not inspect them.

use std::collections::VecDeque;
use std::future::pending;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Buf as _, BufMut as _};
use futures_util::{Stream, stream};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::http::uri::PathAndQuery;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use tonic::server::{StreamingService, UnaryService};
use tonic::{Code, Request, Response, Status, Streaming, client, server};
use tonic_health::ServingStatus;

/// How long a client waits for the next event.
const PATIENCE: Duration = Duration::from_secs(20);

/// The path of a unary call.
pub(crate) const UNARY: &str = "/tests.Scripts/Unary";
const STREAM: &str = "/tests.Scripts/Stream";
/// The path of the gRPC health check.
pub(crate) const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// A script without steps: a call that succeeds at once.
pub(crate) const EMPTY_SCRIPT: &[u8] = b"\0\0\0\0\x02[]";
/// A message without bytes.
pub(crate) const EMPTY_MESSAGE: &[u8] = &[0; 5];

/// How the upstream handles a call. After the last step of the last message the call succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Sends this many messages; a unary call sends its one message anyway.
    Say(u32),
    /// Ends the call with this status.
    End(i32),
    /// Does nothing more.
    Hang,
}

/// One HTTP/2 connection to an Envoy, thus to one of its workers; clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    grpc: client::Grpc<Connection>,
    metadata: MetadataMap,
}

impl Client {
    /// Connects; `host` is the authority of the calls.
    pub async fn connect(address: SocketAddr, host: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        // Its errors reach the calls as well.
        tokio::spawn(connection);
        let origin = format!("http://{host}").parse()?;
        Ok(Self { grpc: client::Grpc::with_origin(Connection(sender), origin), metadata: MetadataMap::new() })
    }

    /// The same connection, with an additional header for its calls.
    pub fn header(&self, name: &str, value: &str) -> anyhow::Result<Self> {
        let mut with = self.clone();
        let name: MetadataKey<Ascii> = name.parse()?;
        with.metadata.insert(name, MetadataValue::try_from(value)?);
        Ok(with)
    }

    /// A unary call. A status other than 0 is returned in a trailers-only response.
    pub async fn unary(&self, script: &[Step]) -> Result<(), Status> {
        let mut grpc = self.grpc.clone();
        grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
        let path = PathAndQuery::from_static(UNARY);
        patiently(grpc.unary(self.request(script.to_vec()), path, Json::default())).await.map(Response::into_inner)
    }

    /// Starts a bidirectional stream; returns when the head of the response has arrived. The status comes in trailers.
    pub async fn stream(&self, script: &[Step]) -> Result<Call, Status> {
        let mut grpc = self.grpc.clone();
        grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
        let (asks, mut asked) = mpsc::unbounded_channel();
        let _ = asks.send(script.to_vec());
        let request = self.request(stream::poll_fn(move |context| asked.poll_recv(context)));
        let path = PathAndQuery::from_static(STREAM);
        let answers = patiently(grpc.streaming(request, path, Json::default())).await?.into_inner();
        Ok(Call { asks, answers })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        Request::from_parts(self.metadata.clone(), tonic::Extensions::default(), message)
    }
}

/// An open stream; dropping it cancels it.
#[derive(Debug)]
pub struct Call {
    asks: mpsc::UnboundedSender<Vec<Step>>,
    answers: Streaming<()>,
}

impl Call {
    /// Sends another script.
    pub fn ask(&self, script: &[Step]) {
        // A stream that has ended reports that in its responses.
        let _ = self.asks.send(script.to_vec());
    }

    /// The next message; `None` when the stream has ended successfully.
    pub async fn next(&mut self) -> Result<Option<()>, Status> {
        patiently(self.answers.message()).await
    }

    /// Waits until the upstream ends it, and returns the number of messages until then.
    pub async fn ended(&mut self) -> Result<u32, Status> {
        let mut messages = 0;
        while self.next().await?.is_some() {
            messages += 1;
        }
        Ok(messages)
    }

    /// Closes the client's side and waits for the end.
    pub async fn close(self) -> Result<u32, Status> {
        let Self { asks, answers } = self;
        let (closed, _) = mpsc::unbounded_channel();
        drop(asks);
        Self { asks: closed, answers }.ended().await
    }
}

/// Waits with a timeout.
async fn patiently<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match timeout(PATIENCE, answer).await {
        Ok(answer) => answer,
        // Not a status, since tests expect those.
        Err(_) => panic!("the call neither went on nor ended within {PATIENCE:?}"),
    }
}

/// Executes the script of a call.
pub(crate) async fn answer(request: hyper::Request<Incoming>) -> hyper::Response<Body> {
    let mut grpc = server::Grpc::new(Json::default());
    match request.uri().path() {
        UNARY => grpc.unary(Scripts, request).await,
        STREAM => grpc.streaming(Scripts, request).await,
        other => Status::unimplemented(other).into_http(),
    }
}

/// Answers `grpc.health.v1.Health/Check` for the server as a whole; other services are unknown to it.
pub(crate) async fn health(request: hyper::Request<Incoming>, ready: bool) -> hyper::Response<Body> {
    let (reporter, mut health) = tonic_health::server::health_reporter();
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status("", status).await;
    health.call(request).await.unwrap_or_else(|never| match never {})
}

struct Scripts;

type Answer<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

impl UnaryService<Vec<Step>> for Scripts {
    type Response = ();
    type Future = Answer<()>;

    fn call(&mut self, request: Request<Vec<Step>>) -> Self::Future {
        Box::pin(async {
            for step in request.into_inner() {
                match step {
                    Step::Say(_) | Step::End(0) => {}
                    Step::End(code) => return Err(status(code)),
                    Step::Hang => pending().await,
                }
            }
            Ok(Response::new(()))
        })
    }
}

impl StreamingService<Vec<Step>> for Scripts {
    type Response = ();
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<(), Status>> + Send>>;
    type Future = Answer<Self::ResponseStream>;

    fn call(&mut self, request: Request<Streaming<Vec<Step>>>) -> Self::Future {
        let script = (request.into_inner(), VecDeque::new());
        let answers = stream::unfold(script, async |(mut asked, mut steps)| {
            loop {
                match steps.pop_front() {
                    Some(Step::Say(0)) => {}
                    Some(Step::Say(messages)) => {
                        steps.push_front(Step::Say(messages - 1));
                        return Some((Ok(()), (asked, steps)));
                    }
                    Some(Step::End(0)) => return None,
                    Some(Step::End(code)) => return Some((Err(status(code)), (asked, steps))),
                    Some(Step::Hang) => pending().await,
                    None => match asked.message().await {
                        Ok(Some(more)) => steps.extend(more),
                        Ok(None) => return None,
                        Err(status) => return Some((Err(status), (asked, steps))),
                    },
                }
            }
        });
        Box::pin(async { Ok(Response::new(Box::pin(answers) as Self::ResponseStream)) })
    }
}

fn status(code: i32) -> Status {
    Status::new(Code::from_i32(code), "as asked")
}

/// A client connection in the form that tonic requires.
#[derive(Clone, Debug)]
struct Connection(http2::SendRequest<Body>);

impl GrpcService<Body> for Connection {
    type ResponseBody = Incoming;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<hyper::Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: hyper::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Messages as JSON.
struct Json<E, D>(PhantomData<(E, D)>);

impl<E, D> Default for Json<E, D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E: Serialize + Send + 'static, D: DeserializeOwned + Send + 'static> Codec for Json<E, D> {
    type Encode = E;
    type Decode = D;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl<E: Serialize, D> Encoder for Json<E, D> {
    type Item = E;
    type Error = Status;

    fn encode(&mut self, message: E, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        serde_json::to_writer(buffer.writer(), &message).map_err(|error| Status::internal(error.to_string()))
    }
}

impl<E, D: DeserializeOwned> Decoder for Json<E, D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        serde_json::from_reader(buffer.reader()).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Full};

    use super::*;
    use crate::backend::{Backend, Mode};

    async fn backend() -> Backend {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::Grpc);
        backend
    }

    #[tokio::test]
    async fn a_call_ends_as_it_says() {
        let backend = backend().await;
        let client = Client::connect(backend.address(), "any").await.unwrap();
        client.unary(&[]).await.unwrap();
        assert_eq!(client.unary(&[Step::End(5)]).await.unwrap_err().code(), Code::NotFound);
        let mut call = client.stream(&[Step::Say(2)]).await.unwrap();
        call.next().await.unwrap().unwrap();
        call.ask(&[Step::Say(3)]);
        assert_eq!(call.close().await.unwrap(), 4);
        let mut call = client.stream(&[Step::Say(2), Step::End(13)]).await.unwrap();
        assert_eq!(call.ended().await.unwrap_err().code(), Code::Internal);
        assert_eq!(backend.counts().requests, 4);
    }

    /// Which of gRPC's two ways to end is used where, since a proxy sees them in different places.
    #[tokio::test]
    async fn a_unary_error_is_trailers_only_and_a_stream_has_trailers() {
        let backend = backend().await;
        let stream = TcpStream::connect(backend.address()).await.unwrap();
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        for (path, in_headers) in [(UNARY, true), (STREAM, false)] {
            let script = serde_json::to_vec(&[Step::End(14)]).unwrap();
            let message = [&[0, 0, 0, 0, script.len() as u8], &script[..]].concat();
            let request = hyper::Request::post(format!("http://any{path}")).header("content-type", "application/grpc");
            let request = request.body(Full::new(bytes::Bytes::from(message))).unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!((response.status().as_u16(), response.headers().contains_key("grpc-status")), (200, in_headers));
            let trailers = response.into_body().collect().await.unwrap().trailers().cloned().unwrap_or_default();
            assert_eq!(trailers.contains_key("grpc-status"), !in_headers, "{path}");
        }
    }
}
