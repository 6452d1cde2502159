//! A client with minimal cost: a few keep-alive connections, one request at a time on each, and two system calls per
//! request. It checks every response.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, bail, ensure};
use tideshift_tests::envoy_fixture::DEADLINE;

use crate::server::{BODY_LENGTH, served_by};

/// The host of every request.
pub(crate) const HOST: &str = "shop.example.com";

/// A client's connections, each with at most one request at a time.
pub(crate) const CONNECTIONS: usize = 8;

/// Typical headers of a browser behind a mesh.
const HEADERS: [(&str, &str); 15] = [
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0"),
    ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    ("accept-language", "en-GB,en;q=0.7,de;q=0.3"),
    ("accept-encoding", "gzip, deflate, br, zstd"),
    ("referer", "https://shop.example.com/cart/items?page=2"),
    ("dnt", "1"),
    ("sec-fetch-dest", "document"),
    ("sec-fetch-mode", "navigate"),
    ("sec-fetch-site", "same-origin"),
    ("priority", "u=0, i"),
    ("authorization", "Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiI0MiJ9.c2lnbmF0dXJlLWluLXNpemUtb25seQ"),
    ("x-forwarded-proto", "https"),
    ("x-b3-sampled", "0"),
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    ("x-user-group", "customers"),
];

/// The cookies of every request.
const COOKIES: &str = "theme=dark; consent=2026-01-03; sid=8f14e45fceea167a5a36dedd4bea2543";

/// A request; `cookie` is an additional cookie, `headers` are additional headers.
pub(crate) fn request(cookie: Option<&str>, headers: &[(String, String)]) -> Vec<u8> {
    let mut request = format!("GET /cart/items?page=3 HTTP/1.1\r\nhost: {HOST}\r\ncookie: {COOKIES}");
    cookie.iter().for_each(|cookie| request.extend(["; ", cookie]));
    request.push_str("\r\n");
    let all = HEADERS.into_iter().chain(headers.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    all.for_each(|(name, value)| request.extend([name, ": ", value, "\r\n"]));
    request.push_str("\r\n");
    request.into_bytes()
}

/// A client of one listener.
#[derive(Debug)]
pub(crate) struct Client {
    /// At least one.
    connections: Vec<Connection>,
    requests: Vec<Sent>,
    next: usize,
    /// Responses by version.
    pub(crate) answers: BTreeMap<String, u64>,
}

/// One of the requests that are sent in turn.
#[derive(Debug)]
struct Sent {
    bytes: Vec<u8>,
    /// The version that answered first must always answer.
    by: Option<String>,
    sticky: bool,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    /// The request whose response it waits for.
    asked: usize,
}

impl Client {
    /// Connects; `requests` are sent in turn. `sticky`: the version that answered a request first must always answer
    /// it.
    pub(crate) fn connect(address: SocketAddr, requests: Vec<Vec<u8>>, sticky: bool) -> anyhow::Result<Self> {
        let connections = (0..CONNECTIONS).map(|_| Connection::open(address)).collect::<anyhow::Result<_>>()?;
        let requests = requests.into_iter().map(|bytes| Sent { bytes, by: None, sticky }).collect();
        Ok(Self { connections, requests, next: 0, answers: BTreeMap::new() })
    }

    /// Connects; this many users are sent in turn, each with the cookie from the first response.
    pub(crate) fn with_cookies(address: SocketAddr, users: usize) -> anyhow::Result<Self> {
        let mut client = Self::connect(address, vec![request(None, &[])], false)?;
        let mut requests = Vec::with_capacity(users);
        for _ in 0..users {
            client.batch(1)?;
            let connection = &client.connections[0];
            let answer = &connection.buffer[..connection.filled];
            let by = std::str::from_utf8(served_by(&answer[answer.len() - BODY_LENGTH..]))?.to_owned();
            let answer = String::from_utf8_lossy(answer);
            let set = answer.lines().find_map(|line| line.strip_prefix("set-cookie: "));
            let cookie = set.with_context(|| format!("no cookie was set: {answer}"))?.split(';').next();
            requests.push(Sent { bytes: request(cookie, &[]), by: Some(by), sticky: true });
        }
        Ok(Self { requests, next: 0, ..client })
    }

    /// The number of responses so far.
    pub(crate) fn answered(&self) -> u64 {
        self.answers.values().sum()
    }

    /// Sends this many requests and reads their responses.
    pub(crate) fn batch(&mut self, requests: usize) -> anyhow::Result<()> {
        let open = self.connections.len();
        for number in 0..requests + open {
            let connection = &mut self.connections[number % open];
            if number >= open && number - open < requests {
                let asked = connection.asked;
                let body = connection.answer()?;
                let sent = &mut self.requests[asked];
                let version = std::str::from_utf8(served_by(body))?;
                if sent.sticky {
                    let by = sent.by.get_or_insert_with(|| version.to_owned());
                    ensure!(by == version, "one user was served by {by} and then by {version}");
                }
                match self.answers.get_mut(version) {
                    Some(answers) => *answers += 1,
                    None => drop(self.answers.insert(version.to_owned(), 1)),
                }
            }
            if number < requests {
                connection.asked = self.next;
                connection.stream.write_all(&self.requests[self.next].bytes).context("cannot send")?;
                self.next = (self.next + 1) % self.requests.len();
            }
        }
        Ok(())
    }
}

impl Connection {
    fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).context("cannot connect to Envoy")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(Self { stream, buffer: vec![0; 1 << 14], filled: 0, asked: 0 })
    }

    /// Reads the next response, which must be complete with status 200, and returns its body.
    fn answer(&mut self) -> anyhow::Result<&[u8]> {
        self.filled = 0;
        let body = loop {
            let read = self.stream.read(&mut self.buffer[self.filled..]).context("no answer")?;
            ensure!(read > 0, "Envoy closed a connection: {}", String::from_utf8_lossy(&self.buffer[..self.filled]));
            self.filled += read;
            let answer = &self.buffer[..self.filled];
            let Some(head) = answer.windows(4).position(|end| end == b"\r\n\r\n") else { continue };
            ensure!(answer.starts_with(b"HTTP/1.1 200 "), "a failed request: {}", String::from_utf8_lossy(answer));
            let end = head + 4 + BODY_LENGTH;
            if answer.len() > end {
                bail!("more than an answer: {}", String::from_utf8_lossy(answer));
            }
            if answer.len() == end {
                break head + 4..end;
            }
        };
        Ok(&self.buffer[body])
    }
}
