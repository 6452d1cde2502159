//! A backend with minimal cost, so that the core it shares with the clients keeps up with a proxy on a core of its own:
//! one thread per connection, and prepared responses.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::Context as _;

/// The answer's body without the version, which stands between the two.
const BODY: [&str; 2] = ["{\"servedBy\":\"", "\"}\n"];
/// The length of each answer's body.
pub(crate) const BODY_LENGTH: usize = BODY[0].len() + 2 + BODY[1].len();

/// The version that an answer's body names.
pub(crate) fn served_by(body: &[u8]) -> &[u8] {
    &body[BODY[0].len()..BODY_LENGTH - BODY[1].len()]
}

/// Answers for a version, whose name has two letters, until this process ends. Returns where.
pub(crate) fn serve(version: &str) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
    let address = listener.local_addr()?;
    let head = "HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 12:00:00 GMT\r\nserver: bench\r\n\
                cache-control: no-store\r\nvary: accept-encoding\r\ncontent-type: application/json\r\n";
    let answer = format!("{head}content-length: {BODY_LENGTH}\r\n\r\n{}{version}{}", BODY[0], BODY[1]);
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let answer = answer.clone();
            // A proxy that closes a connection is no news; one that needs it will show.
            thread::spawn(move || answer_all(stream, answer.as_bytes()));
        }
    });
    Ok(address)
}

fn answer_all(mut stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = Vec::with_capacity(1 << 14);
    let mut piece = [0; 1 << 14];
    loop {
        let read = stream.read(&mut piece)?;
        if read == 0 {
            return Ok(());
        }
        request.extend_from_slice(&piece[..read]);
        // No request has a body, and none comes before the last one is answered.
        if request.ends_with(b"\r\n\r\n") {
            stream.write_all(answer)?;
            request.clear();
        }
    }
}
