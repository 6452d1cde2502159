//! Leader election through a Lease that the leader renews. [`evaluate`] alone decides, from the Lease and from how long
//! this replica has seen it unchanged by its own clock; the timestamps in the Lease are informational. Clock skew is
//! therefore harmless. A leader that was paused is fenced by the Secret store, which rejects writes from a replica that
//! has been superseded.
//!
//! Leader election has a thread, a runtime and a connection of its own, so that the Lease is renewed however busy the
//! rest of the process is. A process that is stuck gives up its Lease: [`STUCK`].

use crate::kubernetes::{reason, transport};
use crate::role::Role;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, Config};
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

/// How long a Lease that is not renewed stays valid.
const DURATION: Duration = Duration::from_secs(5);
/// How often the leader renews it.
const RENEW: Duration = Duration::from_secs(1);
/// A leader that could not renew the Lease for this long, by its own clock, steps down: before another replica may take
/// over.
const DEADLINE: Duration = Duration::from_millis(3_500);
/// A process whose heartbeat has stopped for this long gives up the Lease, so that another replica can take over.
pub const STUCK: Duration = Duration::from_secs(30);
/// How often followers poll the Lease.
const LOOK: Duration = Duration::from_millis(500);
/// Timeout for the API server.
const PATIENCE: Duration = Duration::from_secs(2);
/// The annotation with the address at which other replicas reach the leader.
const ADDRESS: &str = "tideshift.dev/address";

/// A Lease as last observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedLease {
    /// The identity of the holder; empty: no holder.
    pub holder: String,
    /// How long it stays valid without renewal.
    pub duration: Duration,
}

/// The next action of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Take the Lease.
    Acquire,
    /// Renew the Lease that this replica holds.
    Renew,
    /// Leave it to its current holder.
    Wait,
}

/// Decides the next action of a replica that has seen the Lease unchanged for `unchanged`; `None`: there is no Lease
/// yet.
pub fn evaluate(lease: Option<&ObservedLease>, identity: &str, unchanged: Duration) -> Next {
    match lease {
        None => Next::Acquire,
        Some(seen) if seen.holder == identity => Next::Renew,
        Some(seen) if seen.holder.is_empty() || unchanged >= seen.duration => Next::Acquire,
        Some(_) => Next::Wait,
    }
}

/// A candidate for leadership.
#[derive(Clone)]
pub struct Elector {
    /// The cluster.
    pub config: Config,
    /// The namespace of the Lease.
    pub namespace: String,
    /// The Lease's name.
    pub name: String,
    /// The identity of this replica: the name of its pod.
    pub identity: String,
    /// The address at which other replicas reach it.
    pub address: String,
    /// How long it keeps the Lease without a heartbeat: [`STUCK`].
    pub stuck: Duration,
}

impl Elector {
    /// Acquires the Lease whenever it is free and renews it while it can, until `ending`; then releases it once `ended`
    /// completes. The returned handle completes after that. `pulse` is the time of the last heartbeat of the rest of
    /// the process.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn start(
        self,
        role: watch::Sender<Role>,
        pulse: watch::Receiver<Instant>,
        ending: impl Future<Output = ()> + Send + 'static,
        ended: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<oneshot::Receiver<()>> {
        let (done, is_done) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("lease".to_owned()).spawn(move || {
            runtime.block_on(async {
                match transport::plain(self.config.clone()) {
                    Ok(client) => Contender { client, candidate: self, pulse }.run(role, ending, ended).await,
                    Err(error) => tracing::error!("lease {}/{}: {}", self.namespace, self.name, reason(&error)),
                }
            });
            let _ = done.send(());
        })?;
        Ok(is_done)
    }
}

/// The candidate on its own thread.
struct Contender {
    client: Client,
    candidate: Elector,
    pulse: watch::Receiver<Instant>,
}

impl Contender {
    async fn run(self, role: watch::Sender<Role>, ending: impl Future<Output = ()>, ended: impl Future<Output = ()>) {
        tokio::select! {
            () = self.run_election(&role) => {}
            () = ending => {}
        }
        let led = *role.borrow() == Role::Leads;
        if led {
            // No other replica leads while this one persists its state.
            tokio::select! {
                () = self.run_election(&role) => {}
                () = ended => {}
            }
        }
        if *role.borrow() == Role::Leads {
            role.send_replace(Role::Follows(None));
            let release = async {
                let Elector { name, identity, .. } = &self.candidate;
                let mut lease = self.api().get(name).await?;
                if holder(&lease) == identity {
                    let spec = lease.spec.get_or_insert_default();
                    spec.holder_identity = None;
                    spec.lease_duration_seconds = Some(1);
                    self.api().replace(name, &PostParams::default(), &lease).await?;
                }
                Ok::<_, kube::Error>(())
            };
            match timeout(PATIENCE, release).await {
                Ok(Ok(())) => tracing::info!("gave the lease back"),
                Ok(Err(error)) => tracing::warn!("cannot give the lease back: {}", reason(&error)),
                Err(_) => tracing::warn!("cannot give the lease back: no answer"),
            }
        }
    }

    fn api(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.candidate.namespace)
    }

    async fn run_election(&self, role: &watch::Sender<Role>) {
        let mut seen: Option<(String, Instant)> = None;
        let mut renewed = Instant::now();
        let mut complained = false;
        loop {
            let stuck_for = self.pulse.borrow().elapsed();
            if stuck_for >= self.candidate.stuck {
                if *role.borrow() == Role::Leads {
                    let seconds = stuck_for.as_secs_f64();
                    tracing::error!("this process has not gone on for {seconds:.1} s; the lease is left to others");
                }
                set_role(role, Role::Follows(None));
                sleep(LOOK).await;
                continue;
            }
            let began = Instant::now();
            let leads = *role.borrow() == Role::Leads;
            let patience = if leads { PATIENCE.min(DEADLINE.saturating_sub(renewed.elapsed())) } else { PATIENCE };
            let result = match timeout(patience, self.try_acquire(&mut seen)).await {
                Ok(result) => result.map_err(|error| reason(&error)),
                Err(_) => Err(format!("no answer within {:.1} s", patience.as_secs_f64())),
            };
            match result {
                Ok(now) => {
                    complained = false;
                    if now == Role::Leads {
                        // Counts from the start of the request: the Lease may have been written right then.
                        renewed = began;
                    }
                    set_role(role, now);
                }
                Err(why) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!("lease {}/{}: {why}", self.candidate.namespace, self.candidate.name);
                    }
                    if leads && renewed.elapsed() >= DEADLINE {
                        tracing::error!("the lease could not be renewed for {} s", DEADLINE.as_secs_f64());
                        set_role(role, Role::Follows(None));
                    }
                }
            }
            let leads = *role.borrow() == Role::Leads;
            sleep(match (leads, complained) {
                (true, false) => RENEW,
                (true, true) => LOOK.min(DEADLINE.saturating_sub(renewed.elapsed())),
                (false, _) => LOOK,
            })
            .await;
        }
    }

    /// Reads the Lease once and acts on it.
    async fn try_acquire(&self, seen: &mut Option<(String, Instant)>) -> Result<Role, kube::Error> {
        let api = self.api();
        let Elector { name, identity, .. } = &self.candidate;
        let lease = api.get_opt(name).await?;
        let version = lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone()).unwrap_or_default();
        let since = match seen {
            Some((before, since)) if *before == version => *since,
            _ => seen.insert((version, Instant::now())).1,
        };
        let view = lease.as_ref().map(|lease| {
            let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
            let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
            ObservedLease { holder: holder(lease).to_owned(), duration }
        });
        let next = evaluate(view.as_ref(), identity, since.elapsed());
        if next == Next::Wait {
            return Ok(Role::Follows(lease.and_then(|lease| lease.metadata.annotations?.remove(ADDRESS))));
        }
        let written = self.candidate.held(lease.clone(), next);
        let result = match lease {
            None => api.create(&PostParams::default(), &written).await,
            Some(_) => api.replace(name, &PostParams::default(), &written).await,
        };
        match result {
            Ok(_) => Ok(Role::Leads),
            // Another replica was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Role::Follows(None)),
            Err(error) => Err(error),
        }
    }
}

impl Elector {
    /// The Lease with this replica as its holder.
    fn held(&self, lease: Option<Lease>, next: Next) -> Lease {
        let mut lease = lease.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
            spec: None,
        });
        let annotations = lease.metadata.annotations.get_or_insert_default();
        annotations.insert(ADDRESS.to_owned(), self.address.clone());
        let before = lease.spec.take().unwrap_or_default();
        let now = MicroTime(jiff::Timestamp::now());
        let changes = before.lease_transitions.unwrap_or(-1);
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            renew_time: Some(now.clone()),
            acquire_time: if next == Next::Acquire { Some(now) } else { before.acquire_time.clone() },
            lease_transitions: Some(if next == Next::Acquire { changes.saturating_add(1) } else { changes.max(0) }),
            ..before
        });
        lease
    }
}

fn set_role(role: &watch::Sender<Role>, now: Role) {
    role.send_if_modified(|before| {
        let differs = *before != now;
        if differs {
            match &now {
                Role::Leads => tracing::info!("this replica leads now"),
                Role::Follows(Some(leader)) => tracing::info!(leader, "another replica leads"),
                Role::Follows(None) => tracing::info!("no replica is known to lead"),
                Role::Alone => {}
            }
            *before = now;
        }
        differs
    });
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Json;
    use axum::extract::State;
    use axum::http::{Method, StatusCode};
    use serde_json::{Value, json};
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_lease_is_left_to_its_holder_until_it_has_been_unchanged_for_as_long_as_it_holds() {
        let held = |holder: &str| ObservedLease { holder: holder.to_owned(), duration: DURATION };
        let just_under = DURATION - Duration::from_millis(1);
        for (lease, unchanged, next) in [
            (None, Duration::ZERO, Next::Acquire),
            (Some(held("a")), Duration::MAX, Next::Renew),
            (Some(held("b")), just_under, Next::Wait),
            (Some(held("b")), DURATION, Next::Acquire),
            (Some(held("")), Duration::ZERO, Next::Acquire),
        ] {
            assert_eq!(evaluate(lease.as_ref(), "a", unchanged), next, "{lease:?} {unchanged:?}");
        }
        assert!(DEADLINE + PATIENCE / 2 < DURATION, "a leader steps down before anybody else may take over");
    }

    /// An API server that knows one Lease, on a thread of its own: when it was written, and by which connections.
    #[derive(Clone, Default)]
    struct Server {
        lease: Arc<Mutex<Option<Value>>>,
        written: Arc<Mutex<Vec<Instant>>>,
    }

    impl Server {
        fn start() -> (Self, Config) {
            let server = Self::default();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap();
            let router = axum::Router::new().fallback(answer).with_state(server.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                    axum::serve(listener, router).await.unwrap();
                });
            });
            (server, Config::new(format!("http://{address}").parse().unwrap()))
        }

        fn since_written(&self) -> Duration {
            self.written.lock().unwrap().last().unwrap().elapsed()
        }
    }

    async fn answer(State(server): State<Server>, method: Method, body: String) -> (StatusCode, Json<Value>) {
        let mut lease = server.lease.lock().unwrap();
        match (method, lease.clone()) {
            (Method::GET, None) => {
                (StatusCode::NOT_FOUND, Json(json!({"kind": "Status", "reason": "NotFound", "code": 404})))
            }
            (Method::GET, Some(lease)) => (StatusCode::OK, Json(lease)),
            _ => {
                let mut written = server.written.lock().unwrap();
                written.push(Instant::now());
                let mut now: Value = serde_json::from_str(&body).unwrap();
                now["metadata"]["resourceVersion"] = json!(written.len().to_string());
                *lease = Some(now.clone());
                (StatusCode::OK, Json(now))
            }
        }
    }

    fn candidate(config: Config, stuck: Duration) -> Elector {
        let address = "http://127.0.0.1:1".to_owned();
        Elector { config, namespace: "n".to_owned(), name: "l".to_owned(), identity: "a".to_owned(), address, stuck }
    }

    /// The only thread of the test's runtime stands still, with a lock of everybody's.
    #[tokio::test]
    async fn a_leader_whose_other_threads_stand_still_keeps_the_lease() {
        let (server, config) = Server::start();
        let (role, pulse) = (watch::Sender::new(Role::Follows(None)), watch::Sender::new(Instant::now()));
        let mut seen = role.subscribe();
        let (forever, never) = (std::future::pending(), std::future::pending());
        let _done = candidate(config, STUCK).start(role, pulse.subscribe(), forever, never).unwrap();
        seen.wait_for(|role| *role == Role::Leads).await.unwrap();
        seen.mark_unchanged();
        std::thread::sleep(DURATION);
        assert!(server.since_written() < RENEW * 2, "it was not renewed for {:?}", server.since_written());
        assert!(!seen.has_changed().unwrap(), "{:?}", *seen.borrow());
    }

    #[tokio::test]
    async fn a_leader_that_does_not_go_on_at_all_gives_the_lease_up_and_takes_it_when_it_does() {
        let (server, config) = Server::start();
        let (role, pulse) = (watch::Sender::new(Role::Follows(None)), watch::Sender::new(Instant::now()));
        let mut seen = role.subscribe();
        let (end, ending) = oneshot::channel::<()>();
        let ending = async { _ = ending.await };
        let done = candidate(config, RENEW).start(role, pulse.subscribe(), ending, async {}).unwrap();
        seen.wait_for(|role| *role == Role::Leads).await.unwrap();
        seen.wait_for(|role| *role == Role::Follows(None)).await.unwrap();
        let written = server.written.lock().unwrap().len();
        sleep(RENEW).await;
        assert_eq!(server.written.lock().unwrap().len(), written);
        pulse.send_replace(Instant::now());
        seen.wait_for(|role| *role == Role::Leads).await.unwrap();
        end.send(()).unwrap();
        done.await.unwrap();
        assert_eq!(server.lease.lock().unwrap().as_ref().unwrap()["spec"].get("holderIdentity"), None, "given back");
    }
}
