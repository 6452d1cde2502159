//! WebSocket, both sides: a client, and the server side in a [`Backend`](crate::backend::Backend).

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

/// A text that makes the upstream close the socket in good order, instead of saying it again.
const CLOSE: &str = "please close";

/// An open socket; dropping it is a client that goes away without a word.
#[derive(Debug)]
pub struct Client(WebSocketStream<TcpStream>);

impl Client {
    /// Connects and performs the handshake; a response other than 101 is an error.
    pub async fn connect(address: SocketAddr, host: &str, headers: &[(&'static str, &str)]) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        let mut request = format!("ws://{host}/").into_client_request()?;
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse()?);
        }
        let (socket, response) = client_async(request, stream).await?;
        ensure!(response.status() == 101, "{response:?}");
        Ok(Self(socket))
    }

    /// Says something and waits to hear it.
    pub async fn echo(&mut self, text: &str) -> anyhow::Result<()> {
        self.0.send(Message::text(text)).await?;
        match self.0.next().await {
            Some(Ok(Message::Text(heard))) if heard.as_str() == text => Ok(()),
            other => bail!("{text:?} came back as {other:?}"),
        }
    }

    /// Closes it as RFC 6455 has it: a frame there, a frame back, and the server closes the connection.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.0.close(None).await?;
        self.ended().await
    }

    /// The same with the server's frame first.
    pub async fn be_closed(mut self) -> anyhow::Result<()> {
        self.0.send(Message::text(CLOSE)).await?;
        self.ended().await
    }

    /// Sends a frame that closes, and the connection without waiting for the answer, as browsers do whose page goes.
    pub async fn close_and_leave(mut self) -> anyhow::Result<()> {
        Ok(self.0.close(None).await?)
    }

    /// Waits until the connection is closed; an error if it was without a closing frame.
    pub async fn ended(&mut self) -> anyhow::Result<()> {
        loop {
            match self.0.next().await {
                None | Some(Err(Error::ConnectionClosed)) => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
            }
        }
    }

    /// Ends the connection with a reset.
    pub fn reset(self) -> anyhow::Result<()> {
        self.0.get_ref().set_zero_linger().context("cannot reset the connection")
    }
}

/// The response that completes the handshake; `None` for a request without an upgrade.
pub(crate) fn accept_key(request: &Request<Incoming>) -> Option<String> {
    let wanted = request.headers().get(header::UPGRADE)?;
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY)?;
    wanted.as_bytes().eq_ignore_ascii_case(b"websocket").then(|| derive_accept_key(key.as_bytes()))
}

/// Says everything again until the socket is closed.
pub(crate) async fn serve(upgraded: Upgraded) {
    let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
    while let Some(Ok(message)) = socket.next().await {
        let sent = match message {
            Message::Text(text) if text.as_str() == CLOSE => socket.close(None).await,
            Message::Text(_) | Message::Binary(_) => socket.send(message).await,
            _ => Ok(()),
        };
        if sent.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Mode};

    #[tokio::test]
    async fn a_socket_is_closed_by_either_side_or_breaks() {
        let backend = Backend::start("v1").await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::WebSocket);
        let open = async || {
            let mut client = Client::connect(backend.address(), "any", &[]).await.unwrap();
            client.echo("hello").await.unwrap();
            client
        };
        open().await.close().await.unwrap();
        open().await.be_closed().await.unwrap();
        let mut killed = open().await;
        backend.stop().await;
        let error = killed.ended().await.unwrap_err();
        assert!(format!("{error:#}").contains("without closing handshake"), "{error:#}");
        backend.start_again().await.unwrap();
        let mut reset = open().await;
        backend.reset().await;
        reset.ended().await.unwrap_err();
        assert_eq!(backend.counts().requests, 4);
        backend.start_again().await.unwrap();
        backend.set(|behaviour| behaviour.mode = Mode::Answer);
        Client::connect(backend.address(), "any", &[]).await.unwrap_err();
    }
}
