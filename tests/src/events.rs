//! A client of the controller's event stream, `GET /v1/events`.

use std::net::SocketAddr;
use std::str;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long an event may take; a status comes each second.
const PATIENCE: Duration = Duration::from_secs(30);

/// The events of one connection; dropping it ends it.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    unread: Vec<u8>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `status` or `transition`.
    pub kind: String,
    /// Its data.
    pub data: Value,
}

impl Events {
    /// Begins to listen, with a token if it is not empty.
    pub async fn open(address: SocketAddr, token: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::get("/v1/events").header("host", address.to_string());
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let (status, kind) = (response.status(), response.headers().get("content-type").cloned());
        ensure!(status == 200, "/v1/events says {status}");
        ensure!(kind.as_ref().is_some_and(|kind| kind == "text/event-stream"), "{kind:?}");
        Ok(Self { body: response.into_body(), unread: Vec::new() })
    }

    /// The next event; `None` at the end.
    pub async fn next(&mut self) -> anyhow::Result<Option<Event>> {
        let mut looked = 0;
        loop {
            if let Some(end) = self.unread[looked..].windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.unread.drain(..looked + end + 2).collect();
                looked = 0;
                match event(str::from_utf8(&block)?.trim_end())? {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                }
            }
            // Events may be large and come in many pieces.
            looked = self.unread.len().saturating_sub(1);
            let Some(frame) = timeout(PATIENCE, self.body.frame()).await.context("no event comes")? else {
                ensure!(self.unread.is_empty(), "it ends within an event of {} bytes", self.unread.len());
                return Ok(None);
            };
            self.unread.extend_from_slice(&frame?.into_data().ok().context("trailers")?);
        }
    }

    /// The next event of that kind.
    pub async fn next_of(&mut self, kind: &str) -> anyhow::Result<Value> {
        loop {
            match self.next().await? {
                Some(event) if event.kind == kind => return Ok(event.data),
                Some(_) => {}
                None => bail!("no {kind} before the end"),
            }
        }
    }
}

/// The event of a block of lines; `None` if it is a comment.
fn event(block: &str) -> anyhow::Result<Option<Event>> {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let Some(kind) = field("event") else {
        ensure!(block.lines().all(|line| line.starts_with(':')), "no event: {block:?}");
        return Ok(None);
    };
    let data = field("data").with_context(|| format!("no data in {block:?}"))?;
    Ok(Some(Event { kind: kind.to_owned(), data: serde_json::from_str(data)? }))
}
