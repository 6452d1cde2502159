//! A malicious client that fails its requests on purpose to cause a rollback: it requests an endpoint that every
//! version answers with 500, and makes sure that one version receives those requests.
//!
//! It has one address and one connection, thus one Envoy worker.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use crate::client::{Connection, Request, Response};
use crate::envoy_fixture::served_by;

/// The client's address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 200);
/// The path that every version fails; backends need it as their `bad_input`.
pub const BAD_INPUT: &str = "/bad-input";

/// The even sequence behind weights, as known to a client that has read `core/src/choice/sequence.rs`: the strata of a
/// round, and the step between them. The position inside a stratum is unknown.
const STRATA: u32 = 997;
const STEP: u32 = 454;

/// Requests per second of a client that does not predict anything.
const RATE: f64 = 50.0;
/// A predicting client sends this many back to back, since requests of other clients advance the sequence,
const BURST: usize = 100;
/// and starts again after this interval.
const BURST_EVERY: Duration = Duration::from_secs(1);
/// It fails a request if the next turn is the version's with at least this probability.
const SURE: f64 = 0.9;

/// How it makes sure that a version receives its failing requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// It keeps the cookie of a session with this version.
    Cookie(&'static str),
    /// A rule's header.
    Header(&'static str, &'static str),
    /// It knows the sequence, and that the interval of the version is `low` to `high` (0 to 1); between its bursts it
    /// fails only on that version's turns.
    Predicts {
        /// The version.
        version: &'static str,
        /// The start of the interval.
        low: f64,
        /// The end of the interval.
        high: f64,
    },
}

/// The failing requests that it has sent, by the version that answered.
pub type Sent = BTreeMap<String, u64>;

/// A running malicious client; dropping it ends it.
#[derive(Debug)]
pub struct Hostile {
    sent: Arc<Mutex<Sent>>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Hostile {
    /// Sends to `address`, with this `host`, until it is stopped.
    pub fn start(address: SocketAddr, host: &str, way: Way) -> Self {
        let sent = Arc::new(Mutex::default());
        let client = Client { address, host: host.to_owned(), sent: Arc::clone(&sent) };
        let task = tokio::spawn(async move { client.run(way).await.with_context(|| format!("{way:?}")) });
        Self { sent, task }
    }

    /// The requests sent so far.
    pub fn sent(&self) -> Sent {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it and returns what it sent; an error if it ended earlier, which only an error can cause.
    pub async fn stop(mut self) -> anyhow::Result<Sent> {
        self.task.abort();
        match (&mut self.task).await {
            Ok(ended) => ended?,
            Err(error) if error.is_cancelled() => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.sent())
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Client {
    address: SocketAddr,
    host: String,
    sent: Arc<Mutex<Sent>>,
}

impl Client {
    async fn run(&self, way: Way) -> anyhow::Result<()> {
        let mut connection = Connection::open_from(ADDRESS, self.address).await?;
        match way {
            Way::Cookie(version) => {
                let cookie = self.cookie_of(version, &mut connection).await?;
                self.fail_all(&self.get(BAD_INPUT).header("cookie", cookie), &mut connection).await
            }
            Way::Header(name, value) => self.fail_all(&self.get(BAD_INPUT).header(name, value), &mut connection).await,
            Way::Predicts { version, low, high } => {
                self.fail_turns_of(version, Belief::new(low, high), &mut connection).await
            }
        }
    }

    fn get(&self, path: &str) -> Request {
        Request::new(self.address, "GET", path).host(&self.host)
    }

    /// Starts new sessions until one is assigned to the version.
    async fn cookie_of(&self, version: &str, connection: &mut Connection) -> anyhow::Result<String> {
        loop {
            let response = connection.send(&self.get("/")).await?;
            if served_by(&response)? == version {
                let cookie = response.header("set-cookie").context("an answer without a session's cookie")?;
                return Ok(cookie.split(';').next().unwrap_or_default().to_owned());
            }
        }
    }

    async fn fail_all(&self, request: &Request, connection: &mut Connection) -> anyhow::Result<()> {
        let mut turns = interval(Duration::from_secs_f64(1.0 / RATE));
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turns.tick().await;
            self.count(&connection.send(request).await?)?;
        }
    }

    async fn fail_turns_of(
        &self,
        version: &str,
        mut belief: Belief,
        connection: &mut Connection,
    ) -> anyhow::Result<()> {
        let (good, bad) = (self.get("/"), self.get(BAD_INPUT));
        let mut bursts = interval(BURST_EVERY);
        bursts.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            bursts.tick().await;
            belief.forget();
            for _ in 0..BURST {
                let fails = belief.chance() >= SURE;
                let response = connection.send(if fails { &bad } else { &good }).await?;
                belief.learn(served_by(&response)? == version);
                if fails {
                    self.count(&response)?;
                }
            }
        }
    }

    fn count(&self, response: &Response) -> anyhow::Result<()> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        *sent.entry(served_by(response)?).or_default() += 1;
        Ok(())
    }
}

/// The possible strata of the next request, given the responses so far.
struct Belief {
    strata: Vec<u32>,
    /// The interval of the version, in strata.
    low: f64,
    high: f64,
}

impl Belief {
    fn new(low: f64, high: f64) -> Self {
        let strata = f64::from(STRATA);
        Self { strata: (0..STRATA).collect(), low: low * strata, high: high * strata }
    }

    /// Resets to all strata.
    fn forget(&mut self) {
        self.strata = (0..STRATA).collect();
    }

    /// The fraction of a stratum that belongs to the version.
    fn part(&self, stratum: u32) -> f64 {
        let (begin, end) = (f64::from(stratum), f64::from(stratum + 1));
        (end.min(self.high) - begin.max(self.low)).clamp(0.0, 1.0)
    }

    /// The probability that the version answers the next request.
    fn chance(&self) -> f64 {
        let parts: f64 = self.strata.iter().map(|&stratum| self.part(stratum)).sum();
        parts / self.strata.len().max(1) as f64
    }

    /// Updates after a response from the version or from another one.
    fn learn(&mut self, is_version: bool) {
        let fits = |part: f64| if is_version { part > 0.0 } else { part < 1.0 };
        let possible = |strata: &[u32]| -> Vec<u32> {
            strata.iter().copied().filter(|&stratum| fits(self.part(stratum))).collect()
        };
        let mut strata = possible(&self.strata);
        if strata.is_empty() {
            // A request of another client came in between.
            strata = possible(&(0..STRATA).collect::<Vec<_>>());
        }
        self.strata = strata.into_iter().map(|stratum| (stratum + STEP) % STRATA).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::wait::eventually;

    /// A walk over the strata with random positions, as `turns` of the version.
    fn turns(begin: u32, low: f64) -> impl Iterator<Item = bool> {
        let strata = std::iter::successors(Some(begin), |stratum| Some((stratum + STEP) % STRATA));
        strata.map(move |stratum| (f64::from(stratum) + fastrand::f64()) / f64::from(STRATA) >= low)
    }

    /// The number of turns in a burst that it was sure of, and how many of these were the version's.
    fn predicted(turns: impl Iterator<Item = bool>) -> (u32, u32) {
        let mut belief = Belief::new(0.9, 1.0);
        let (mut sure, mut right) = (0, 0);
        for is_version in turns {
            if belief.chance() >= SURE {
                sure += 1;
                right += u32::from(is_version);
            }
            belief.learn(is_version);
        }
        (sure, right)
    }

    #[test]
    fn a_client_alone_on_its_worker_knows_the_versions_turns() {
        for begin in [0, 1, 500, 900, 996] {
            let (sure, right) = predicted(turns(begin, 0.9).take(BURST));
            assert!(sure >= 4 && right + 1 >= sure, "from {begin}: {right} of {sure}");
        }
    }

    #[test]
    fn it_starts_over_when_other_requests_came_in_between() {
        // Every 40th turn belongs to another client.
        let seen = turns(3, 0.9).enumerate().filter(|(number, _)| number % 40 != 39).map(|(_, turn)| turn);
        let (sure, right) = predicted(seen.take(4_000));
        assert!(sure >= 150 && f64::from(right) >= 0.6 * f64::from(sure), "{right} of {sure}");
    }

    #[tokio::test]
    async fn its_failing_requests_are_counted_by_who_answered() {
        let backend = Backend::start("v2").await.unwrap();
        backend.set(|behaviour| behaviour.bad_input = Some(BAD_INPUT));
        let hostile = Hostile::start(backend.address(), "any", Way::Header("x-beta", "1"));
        eventually("failing requests", Duration::from_secs(5), async || {
            anyhow::ensure!(hostile.sent().get("v2").is_some_and(|failed| *failed >= 3));
            Ok(())
        })
        .await
        .unwrap();
        let sent = hostile.stop().await.unwrap();
        // One may be in flight when it is stopped.
        assert!(backend.counts().errors - sent["v2"] <= 1, "{sent:?}");
    }
}
