//! Port-forwards to pods over WebSocket, as in real API servers and kubelets. A pod is reached at the address in its
//! status, at the requested port or the one in its annotation [`PORT`](crate::kubernetes::kubelet::PORT).

use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::{SinkExt as _, StreamExt as _};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use hyper::{Request, Response, StatusCode, upgrade};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::kubernetes::kubelet::PORT;

use super::Shared;
use super::refusal::Refusal;
use super::request::Resource;

/// Bytes of one channel each, the first byte saying which.
const PROTOCOL: &str = "v4.channel.k8s.io";
/// The channel of the port's data, if one port is requested; its errors use the next channel.
const DATA: u8 = 0;

/// Answers that it will, and then does.
pub(super) fn answer(
    shared: &Arc<Shared>,
    resource: &Resource,
    mut request: Request<Incoming>,
) -> Result<Response<()>, Refusal> {
    let key = request.headers().get(SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
    let key = key.ok_or_else(|| Refusal::bad_request("expected a WebSocket"))?;
    let asked = resource.query.number("ports")?.and_then(|port| u16::try_from(port).ok());
    let asked = asked.ok_or_else(|| Refusal::bad_request("expected one port"))?;
    let name = resource.name.as_deref().unwrap_or_default();
    let pod = {
        let store = shared.store();
        let pods = store.kind("pods").ok_or_else(Refusal::no_such_path)?;
        Value::clone(&*store.live(&pods, &resource.namespace, name)?)
    };
    let to = address(&pod, asked).ok_or_else(|| Refusal::bad_request(format!("pod {name} does not run")))?;
    let upgraded = upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgraded.await {
            let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
            // Either side closes the connection for both.
            let _ = forward(socket, asked, to).await;
        }
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header(SEC_WEBSOCKET_ACCEPT, key)
        .header(SEC_WEBSOCKET_PROTOCOL, PROTOCOL);
    response.body(()).map_err(|error| Refusal::bad_request(error.to_string()))
}

fn address(pod: &Value, asked: u16) -> Option<SocketAddr> {
    let port = pod["metadata"]["annotations"][PORT].as_str().and_then(|port| port.parse().ok());
    let host = pod["status"]["podIP"].as_str()?.parse().ok()?;
    Some(SocketAddr::new(host, port.unwrap_or(asked)))
}

async fn forward(
    socket: WebSocketStream<TokioIo<upgrade::Upgraded>>,
    asked: u16,
    to: SocketAddr,
) -> anyhow::Result<()> {
    let (mut sink, mut frames) = socket.split();
    for channel in [DATA, DATA + 1] {
        let [low, high] = asked.to_le_bytes();
        sink.send(Message::binary(vec![channel, low, high])).await?;
    }
    let (mut read, mut write) = TcpStream::connect(to).await?.into_split();
    let down = async {
        let mut buffer = vec![DATA; 16 << 10];
        loop {
            let length = read.read(&mut buffer[1..]).await?;
            if length == 0 {
                return anyhow::Ok(sink.close().await?);
            }
            sink.send(Message::binary(buffer[..=length].to_vec())).await?;
        }
    };
    let up = async {
        while let Some(frame) = frames.next().await {
            match frame? {
                Message::Binary(bytes) if bytes.first() == Some(&DATA) => write.write_all(&bytes[1..]).await?,
                Message::Close(_) => break,
                _ => {}
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = down => ended,
        ended = up => ended,
    }
}
