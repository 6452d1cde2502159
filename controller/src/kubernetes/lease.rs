//! Which of several replicas leads: a Lease that the leader renews. What to do is decided by [`evaluate`] alone, from the
//! Lease and from how long this replica has seen it unchanged by its own clock; the times in the Lease are for people.
//! Clocks that differ thus do no harm, and a leader that was held up is stopped by [`memory`](super::memory), which
//! writes down nothing for a replica that another one has followed.

use super::reason;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use std::future::Future;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How long a Lease holds that nobody renews.
const DURATION: Duration = Duration::from_secs(5);
/// How often it is renewed.
const RENEW: Duration = Duration::from_secs(1);
/// A leader that could not renew it for so long leads no longer, by its own clock: before anybody else may.
const DEADLINE: Duration = Duration::from_millis(3_500);
/// How often the others look at it.
const LOOK: Duration = Duration::from_millis(500);
/// How long the API server may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Where the leader says how the others reach it.
const ADDRESS: &str = "tideshift.dev/address";

/// Who leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Role {
    /// This replica does.
    Leads,
    /// Another one does, which is reached at this address, or nobody that is known.
    Follows(Option<String>),
    /// There is nobody else.
    #[default]
    Alone,
}

impl Role {
    /// Whether decisions are made here.
    pub fn decides(&self) -> bool {
        !matches!(self, Self::Follows(_))
    }
}

/// A Lease as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Who holds it; empty: nobody.
    pub holder: String,
    /// How long it holds when nobody renews it.
    pub duration: Duration,
}

/// What a replica does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Take the Lease.
    Acquire,
    /// Say that it still holds it.
    Renew,
    /// Leave it to its holder.
    Wait,
}

/// What a replica does about a Lease that it has seen unchanged for so long; `None`: there is no Lease yet.
pub fn evaluate(lease: Option<&Seen>, identity: &str, unchanged: Duration) -> Next {
    match lease {
        None => Next::Acquire,
        Some(seen) if seen.holder == identity => Next::Renew,
        Some(seen) if seen.holder.is_empty() || unchanged >= seen.duration => Next::Acquire,
        Some(_) => Next::Wait,
    }
}

/// A replica that would lead.
#[derive(Clone)]
pub struct Candidate {
    /// The cluster.
    pub client: Client,
    /// Where the Lease is.
    pub namespace: String,
    /// The Lease's name.
    pub name: String,
    /// Which replica this is: the pod's name.
    pub identity: String,
    /// How the others reach it.
    pub address: String,
}

impl Candidate {
    /// Takes the Lease whenever it is free and renews it as long as it can, until `ending`; then gives it back once
    /// `ended`.
    pub async fn run(
        self,
        role: watch::Sender<Role>,
        ending: impl Future<Output = ()>,
        ended: impl Future<Output = ()>,
    ) {
        tokio::select! {
            () = self.contend(&role) => {}
            () = ending => {}
        }
        let led = *role.borrow() == Role::Leads;
        if led {
            // Nobody else leads while this one puts down what it knows.
            tokio::select! {
                () = self.contend(&role) => {}
                () = ended => {}
            }
        }
        if *role.borrow() == Role::Leads {
            role.send_replace(Role::Follows(None));
            let release = async {
                let mut lease = self.api().get(&self.name).await?;
                if holder(&lease) == self.identity {
                    let spec = lease.spec.get_or_insert_default();
                    spec.holder_identity = None;
                    spec.lease_duration_seconds = Some(1);
                    self.api().replace(&self.name, &PostParams::default(), &lease).await?;
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
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn contend(&self, role: &watch::Sender<Role>) {
        let mut seen: Option<(String, Instant)> = None;
        let mut renewed = Instant::now();
        let mut complained = false;
        loop {
            let began = Instant::now();
            let leads = *role.borrow() == Role::Leads;
            let patience = if leads { PATIENCE.min(DEADLINE.saturating_sub(renewed.elapsed())) } else { PATIENCE };
            let result = match timeout(patience, self.turn(&mut seen)).await {
                Ok(result) => result.map_err(|error| reason(&error)),
                Err(_) => Err(format!("no answer within {:.1} s", patience.as_secs_f64())),
            };
            match result {
                Ok(now) => {
                    complained = false;
                    if now == Role::Leads {
                        // By when it began: the Lease may have been written right then.
                        renewed = began;
                    }
                    become_(role, now);
                }
                Err(why) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!("lease {}/{}: {why}", self.namespace, self.name);
                    }
                    if leads && renewed.elapsed() >= DEADLINE {
                        tracing::error!("the lease could not be renewed for {} s", DEADLINE.as_secs_f64());
                        become_(role, Role::Follows(None));
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

    /// Looks at the Lease once, and does what follows.
    async fn turn(&self, seen: &mut Option<(String, Instant)>) -> Result<Role, kube::Error> {
        let api = self.api();
        let lease = api.get_opt(&self.name).await?;
        let version = lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone()).unwrap_or_default();
        let since = match seen {
            Some((before, since)) if *before == version => *since,
            _ => seen.insert((version, Instant::now())).1,
        };
        let view = lease.as_ref().map(|lease| {
            let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
            let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
            Seen { holder: holder(lease).to_owned(), duration }
        });
        let next = evaluate(view.as_ref(), &self.identity, since.elapsed());
        if next == Next::Wait {
            return Ok(Role::Follows(lease.and_then(|lease| lease.metadata.annotations?.remove(ADDRESS))));
        }
        let written = self.held(lease.clone(), next);
        let result = match lease {
            None => api.create(&PostParams::default(), &written).await,
            Some(_) => api.replace(&self.name, &PostParams::default(), &written).await,
        };
        match result {
            Ok(_) => Ok(Role::Leads),
            // Somebody else was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Role::Follows(None)),
            Err(error) => Err(error),
        }
    }

    /// The Lease as this replica's own.
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

fn become_(role: &watch::Sender<Role>, now: Role) {
    role.send_if_modified(|before| {
        let differs = *before != now;
        if differs {
            match &now {
                Role::Leads => tracing::info!("this replica leads now"),
                Role::Follows(Some(leader)) => tracing::info!(leader, "another replica leads"),
                Role::Follows(None) => tracing::info!("nobody is known to lead"),
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

    #[test]
    fn a_lease_is_left_to_its_holder_until_it_has_been_unchanged_for_as_long_as_it_holds() {
        let held = |holder: &str| Seen { holder: holder.to_owned(), duration: DURATION };
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
}
