//! How soon a new policy is in force on every worker, as observed by clients.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::backend::SERVED_BY;
use crate::client::{Connection, Request};
use crate::envoy_fixture::DEADLINE;
use crate::policy_server::{PolicyServer, held_after};

/// How long one policy took to reach the last worker.
#[derive(Clone, Copy, Debug)]
pub struct Effect {
    /// From publishing it.
    pub since_published: Duration,
    /// From the server's answer to the poll that was held for it.
    pub since_answered: Duration,
}

/// Publishes revisions 1 to `changes`, one after the other; `policy` says what each is and which version then answers
/// all requests. One client on each of `connections`, which must be one to each worker, sends `request` as fast as it
/// is answered and notes when that version answers it first. Also returns how many requests they sent, each of which
/// was answered by 200. The proxy must be polling for what comes after revision `first`.
pub async fn of_changes(
    server: &PolicyServer,
    first: u64,
    connections: Vec<Connection>,
    request: &Request,
    changes: u64,
    policy: impl Fn(u64) -> (&'static str, Value),
) -> anyhow::Result<(Vec<Effect>, u64)> {
    // The revision that was published last, and who answers then.
    let published = Arc::new(watch::Sender::new((0_u64, "")));
    let mut clients = JoinSet::new();
    let mut seen = Vec::new();
    for mut connection in connections {
        let request = request.clone();
        let mut published = published.subscribe();
        let (tell, told) = mpsc::unbounded_channel();
        seen.push(told);
        clients.spawn(async move {
            let mut sent = 0_u64;
            for revision in 1..=changes {
                let (_, version) = *published.wait_for(|(published, _)| *published >= revision).await?;
                loop {
                    let response = connection.send(&request).await?;
                    sent += 1;
                    ensure!(response.status == 200, "{response:?}");
                    if response.header(SERVED_BY).as_deref() == Some(version) {
                        break;
                    }
                }
                tell.send(Instant::now())?;
            }
            anyhow::Ok(sent)
        });
    }
    let mut effects = Vec::new();
    for revision in 1..=changes {
        held_after(server, if revision == 1 { first } else { revision - 1 }).await?;
        let (version, policy) = policy(revision);
        published.send_replace((revision, version));
        let begun = Instant::now();
        server.publish(&policy);
        let mut last = begun;
        for client in &mut seen {
            let at = timeout(DEADLINE, client.recv()).await;
            match at.with_context(|| format!("revision {revision} reached not all workers"))? {
                Some(at) => last = last.max(at),
                None => sent_by_all(&mut clients).await.map(drop)?,
            }
        }
        let answered = server.answered_at().context("no answer")?;
        effects.push(Effect {
            since_published: last.duration_since(begun),
            since_answered: last.saturating_duration_since(answered),
        });
    }
    Ok((effects, sent_by_all(&mut clients).await?))
}

/// Waits for all clients; fails as the first one of them did.
async fn sent_by_all(clients: &mut JoinSet<anyhow::Result<u64>>) -> anyhow::Result<u64> {
    let mut sent = 0;
    while let Some(client) = clients.join_next().await {
        sent += client??;
    }
    Ok(sent)
}
