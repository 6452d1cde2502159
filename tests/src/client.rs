//! Sends one request at a time, byte for byte as the test specifies it: repeated headers, bytes that are not UTF-8, a
//! client that disconnects. For many fast requests use [`load`](crate::load).

use std::net::{Ipv4Addr, SocketAddr};
use std::{io, str};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

const MAX_HEADERS: usize = 256;

/// A `GET` to `address`; nothing is sent before [`Request::send`].
pub fn get(address: SocketAddr, path: &str) -> Request {
    Request::new(address, "GET", path)
}

/// A request that is being built.
#[derive(Clone, Debug)]
pub struct Request {
    address: SocketAddr,
    line: String,
    host: String,
    headers: Vec<u8>,
    body: Vec<u8>,
}

impl Request {
    /// A request with any method.
    pub fn new(address: SocketAddr, method: &str, path: &str) -> Self {
        Self {
            address,
            line: format!("{method} {path} HTTP/1.1\r\n"),
            host: address.to_string(),
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Sets the `host` header, which is the address by default.
    pub fn host(mut self, host: &str) -> Self {
        host.clone_into(&mut self.host);
        self
    }

    /// Adds a header; names may repeat.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        for part in [name.as_bytes(), b": ", value.as_ref(), b"\r\n"] {
            self.headers.extend_from_slice(part);
        }
        self
    }

    /// A body, with its `content-length`.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        let length = self.body.len().to_string();
        self.header("content-length", length)
    }

    /// Sends it over a connection of its own and reads the whole response.
    pub async fn send(&self) -> anyhow::Result<Response> {
        Connection::open(self.address).await?.send(self).await
    }

    /// Sends it and leaves the response unread; dropping the connection then is a client that disconnects.
    pub async fn begin(&self) -> anyhow::Result<Connection> {
        let mut connection = Connection::open(self.address).await?;
        connection.write(&self.bytes()).await?;
        Ok(connection)
    }

    /// The bytes on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let host = format!("host: {}\r\n", self.host);
        [self.line.as_bytes(), host.as_bytes(), &self.headers, b"\r\n", &self.body].concat()
    }
}

/// A keep-alive connection: all of its requests go to the same Envoy worker.
#[derive(Debug)]
pub struct Connection<S = TcpStream> {
    stream: S,
    unread: Vec<u8>,
}

impl Connection {
    /// Connects.
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self::over(stream))
    }

    /// Connects from this address of the loopback interface, which is the client's address to a proxy.
    pub async fn open_from(source: Ipv4Addr, address: SocketAddr) -> anyhow::Result<Self> {
        let stream = connect_from(source, address).await;
        let stream = stream.with_context(|| format!("cannot connect from {source} to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self::over(stream))
    }

    /// Resets the connection instead of closing it.
    pub fn reset(self) -> anyhow::Result<()> {
        self.stream.set_zero_linger().context("cannot reset the connection")
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// HTTP over another stream than TCP, such as TLS.
    pub fn over(stream: S) -> Self {
        Self { stream, unread: Vec::new() }
    }

    /// The underlying stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Sends `request` (ignoring its address) and reads the whole response.
    pub async fn send(&mut self, request: &Request) -> anyhow::Result<Response> {
        self.write(&request.bytes()).await?;
        self.read(!request.line.starts_with("HEAD ")).await
    }

    /// Writes raw bytes, including those that no HTTP client would send.
    pub async fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes).await.context("cannot send the request")
    }

    /// Reads one response; `has_body` is false after a `HEAD`.
    pub async fn read(&mut self, has_body: bool) -> anyhow::Result<Response> {
        let (mut response, head) = loop {
            if let Some((response, length)) = parse_head(&self.unread)? {
                self.unread.drain(..length);
                if response.status >= 200 {
                    let framing = framing(&response, has_body)?;
                    break (response, framing);
                }
            } else if self.fill().await? == 0 {
                bail!("closed after {} bytes, before the answer's head was whole", self.unread.len());
            }
        };
        response.body = match head {
            Framing::Length(length) => self.read_exactly(length).await?,
            Framing::Chunked => self.read_chunks().await?,
            Framing::UntilClosed => {
                while self.fill().await? > 0 {}
                std::mem::take(&mut self.unread)
            }
        };
        Ok(response)
    }

    /// Waits for the first bytes of a response and leaves the rest unread.
    pub async fn read_some(&mut self) -> anyhow::Result<()> {
        ensure!(!self.unread.is_empty() || self.fill().await? > 0, "closed before the first byte of an answer");
        Ok(())
    }

    /// Reads until these bytes have arrived, and leaves everything unread; for endless responses.
    pub async fn read_until(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        while !self.unread.windows(bytes.len()).any(|window| window == bytes) {
            ensure!(self.fill().await? > 0, "closed before {:?}", String::from_utf8_lossy(bytes));
        }
        Ok(())
    }

    async fn fill(&mut self) -> anyhow::Result<usize> {
        self.stream.read_buf(&mut self.unread).await.context("cannot read the answer")
    }

    async fn read_exactly(&mut self, length: usize) -> anyhow::Result<Vec<u8>> {
        while self.unread.len() < length {
            let so_far = self.unread.len();
            let read = self.fill().await.with_context(|| format!("{so_far} of {length} bytes of the body"))?;
            ensure!(read > 0, "closed after {so_far} of {length} bytes of the body");
        }
        Ok(self.unread.drain(..length).collect())
    }

    async fn read_line(&mut self) -> anyhow::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.unread.drain(..end + 2).take(end).collect();
                return Ok(line);
            }
            ensure!(self.fill().await? > 0, "closed within the chunks of the body");
        }
    }

    /// Reads chunks and discards the trailers after them.
    async fn read_chunks(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.read_line().await?;
            let size = str::from_utf8(&line)?.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).with_context(|| format!("chunk of size {size:?}"))?;
            if size == 0 {
                while !self.read_line().await?.is_empty() {}
                return Ok(body);
            }
            body.extend(self.read_exactly(size).await?);
            self.read_line().await?;
        }
    }
}

/// A connection from this address of the loopback interface.
pub(crate) async fn connect_from(source: Ipv4Addr, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.connect(address).await
}

/// A complete response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The headers in their order, names in lower case.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body without its framing.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header with this name (in lower case); invalid UTF-8 is replaced.
    pub fn header(&self, name: &str) -> Option<String> {
        let (_, value) = self.headers.iter().find(|(other, _)| other == name)?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// The body as text; invalid UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {:?}", self.text()))
    }
}

enum Framing {
    Length(usize),
    Chunked,
    UntilClosed,
}

fn framing(response: &Response, has_body: bool) -> anyhow::Result<Framing> {
    if !has_body || matches!(response.status, 204 | 304) {
        return Ok(Framing::Length(0));
    }
    if response.header("transfer-encoding").is_some_and(|encoding| encoding.eq_ignore_ascii_case("chunked")) {
        return Ok(Framing::Chunked);
    }
    match response.header("content-length") {
        Some(length) => Ok(Framing::Length(length.parse().with_context(|| format!("content-length {length:?}"))?)),
        None => Ok(Framing::UntilClosed),
    }
}

/// The head of the response and its length in bytes, once it is complete.
fn parse_head(bytes: &[u8]) -> anyhow::Result<Option<(Response, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = parsed.parse(bytes).context("not an HTTP answer")? else {
        return Ok(None);
    };
    let status = parsed.code.context("an answer without a status")?;
    let headers =
        parsed.headers.iter().map(|header| (header.name.to_ascii_lowercase(), header.value.to_vec())).collect();
    Ok(Some((Response { status, headers, body: Vec::new() }, length)))
}
