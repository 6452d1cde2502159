//! Connection admission. A client is a stranger until one of its requests has passed authentication. All strangers
//! together hold a bounded part of the connections, each peer a bounded part of that, and incomplete request heads hold
//! a bounded amount of memory. A client without a token therefore cannot starve the others.
//!
//! If there is no room, the oldest stranger of the peer with the most strangers is evicted: a client that sends its
//! request at once is served before it can become the oldest. No I/O and no clock here; the server closes the evicted
//! connections.

use prometheus_client::metrics::counter::Counter;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A stranger of the same peer is not evicted before it is this old: it may be about to send its token.
const FRESH: Duration = Duration::from_secs(1);
/// The maximum number of strangers' connections.
const MAX_STRANGERS: usize = 4_096;
/// The maximum number of connections of one named credential; further ones stay strangers.
const MAX_PER_NAME: usize = 256;
/// The maximum memory of incomplete heads, in bytes.
const MAX_HEADS: usize = 32 << 20;
/// The cost of the first byte of a head: the buffer that it is read into.
const FIRST_BUFFER: usize = 8 << 10;

/// Connection limits.
#[derive(Debug, Clone, Copy)]
struct Limits {
    all: usize,
    strangers: usize,
    per_peer: usize,
}

/// The connections of one listener.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    state: Mutex<State>,
    /// Connections that were closed or refused to make room for others.
    evicted: Counter,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// By peer and by number, which orders them by age.
    strangers: BTreeMap<IpAddr, BTreeMap<u64, Stranger>>,
    number_of_strangers: usize,
    /// The number of connections of each credential; those without a name count together.
    trusted: BTreeMap<Option<String>, usize>,
    number_of_trusted: usize,
    /// Bytes of incomplete heads, by peer.
    heads: BTreeMap<IpAddr, usize>,
    bytes_of_heads: usize,
}

#[derive(Debug)]
struct Stranger {
    since: Instant,
    evicted: Arc<Notify>,
}

/// An admitted connection; it ends when this is dropped.
#[derive(Debug)]
pub struct Ticket {
    admission: Arc<Admission>,
    peer: IpAddr,
    number: u64,
    evicted: Arc<Notify>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The credential that it is counted under, once it is no longer a stranger.
    trusted: Option<Option<String>>,
    head: usize,
}

impl Admission {
    /// For `all` concurrent connections. `evicted` counts those that were closed or refused to make room for others.
    pub fn new(all: usize, evicted: Counter) -> Arc<Self> {
        let strangers = (all / 4).clamp(1, MAX_STRANGERS);
        let limits = Limits { all, strangers, per_peer: (strangers / 4).max(1) };
        Arc::new(Self { limits, state: Mutex::default(), evicted })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a connection of a peer. `None`: close it at once.
    pub fn admit(self: &Arc<Self>, peer: IpAddr, now: Instant) -> Option<Ticket> {
        let peer = network(peer);
        let mut state = self.state();
        if !state.make_room(self.limits, peer, now) {
            self.evicted.inc();
            return None;
        }
        state.next += 1;
        let (number, evicted) = (state.next, Arc::new(Notify::new()));
        let stranger = Stranger { since: now, evicted: evicted.clone() };
        state.strangers.entry(peer).or_default().insert(number, stranger);
        state.number_of_strangers += 1;
        drop(state);
        Some(Ticket { admission: self.clone(), peer, number, evicted, inner: Mutex::default() })
    }
}

impl State {
    fn strangers_of(&self, peer: IpAddr) -> usize {
        self.strangers.get(&peer).map_or(0, BTreeMap::len)
    }

    /// Whether a peer may have one more stranger, after an eviction if needed.
    fn make_room(&mut self, limits: Limits, peer: IpAddr, now: Instant) -> bool {
        let own = self.strangers_of(peer);
        if own < limits.per_peer && self.number_of_strangers < limits.strangers {
            return true;
        }
        let most = self.strangers.iter().max_by_key(|(_, strangers)| strangers.len());
        let most = most.map_or((peer, 0), |(peer, strangers)| (*peer, strangers.len()));
        let crowded = if own >= limits.per_peer || most.1 <= own { peer } else { most.0 };
        self.evict_oldest(crowded, (crowded == peer).then_some(now))
    }

    /// `unless_fresh`: only if it is old enough at that time.
    fn evict_oldest(&mut self, peer: IpAddr, unless_fresh: Option<Instant>) -> bool {
        let oldest = self.strangers.get(&peer).and_then(BTreeMap::first_key_value);
        let Some((number, stranger)) = oldest else { return false };
        if unless_fresh.is_some_and(|now| now.saturating_duration_since(stranger.since) < FRESH) {
            return false;
        }
        stranger.evicted.notify_one();
        let number = *number;
        self.remove_stranger(peer, number)
    }

    fn remove_stranger(&mut self, peer: IpAddr, number: u64) -> bool {
        let Some(strangers) = self.strangers.get_mut(&peer) else { return false };
        let was_there = strangers.remove(&number).is_some();
        if strangers.is_empty() {
            self.strangers.remove(&peer);
        }
        self.number_of_strangers -= usize::from(was_there);
        was_there
    }

    fn release_head(&mut self, peer: IpAddr, bytes: usize) {
        self.bytes_of_heads = self.bytes_of_heads.saturating_sub(bytes);
        if let Some(sum) = self.heads.get_mut(&peer) {
            *sum = sum.saturating_sub(bytes);
            if *sum == 0 {
                self.heads.remove(&peer);
            }
        }
    }
}

impl Ticket {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes when the connection must be closed.
    pub async fn evicted(&self) {
        self.evicted.notified().await;
        self.admission.evicted.inc();
    }

    /// Marks the connection as authenticated, by a credential of this name, if it has one.
    pub fn trust(&self, name: Option<&str>) {
        let mut inner = self.inner();
        if inner.trusted.is_some() {
            return;
        }
        let (mut state, limits) = (self.admission.state(), self.admission.limits);
        let key = name.map(str::to_owned);
        let of_name = state.trusted.get(&key).copied().unwrap_or_default();
        let is_full = state.number_of_trusted + limits.strangers >= limits.all;
        if is_full || key.is_some() && of_name >= MAX_PER_NAME {
            return;
        }
        if state.remove_stranger(self.peer, self.number) {
            *state.trusted.entry(key.clone()).or_default() += 1;
            state.number_of_trusted += 1;
            inner.trusted = Some(key);
        }
    }

    /// Accounts for bytes of an incomplete head. Returns whether there is room for them.
    pub fn read_head(&self, bytes: usize) -> bool {
        let mut inner = self.inner();
        let bytes = if inner.head == 0 { bytes.max(FIRST_BUFFER) } else { bytes };
        inner.head += bytes;
        let mut state = self.admission.state();
        state.bytes_of_heads += bytes;
        let own = state.heads.entry(self.peer).or_default();
        *own += bytes;
        let own = *own;
        // A fair share for each peer with incomplete heads; the first buffer is always available.
        let part = MAX_HEADS / state.heads.len().max(1);
        state.bytes_of_heads <= MAX_HEADS || own <= part.max(FIRST_BUFFER)
    }

    /// The head is complete.
    pub fn end_head(&self) {
        let bytes = std::mem::take(&mut self.inner().head);
        if bytes > 0 {
            self.admission.state().release_head(self.peer, bytes);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.end_head();
        let trusted = self.inner().trusted.take();
        let mut state = self.admission.state();
        match trusted {
            None => drop(state.remove_stranger(self.peer, self.number)),
            Some(name) => {
                state.number_of_trusted -= 1;
                if let Some(number) = state.trusted.get_mut(&name) {
                    *number -= 1;
                    if *number == 0 {
                        state.trusted.remove(&name);
                    }
                }
            }
        }
    }
}

/// The key under which a peer is limited: for IPv6 its network, because one customer owns all of its addresses.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_evicted(ticket: &Ticket) -> bool {
        use futures_util::FutureExt;
        ticket.evicted().now_or_never().is_some()
    }

    /// 64 connections: 16 for strangers, 4 for each peer.
    fn admission() -> (Arc<Admission>, Instant) {
        (Admission::new(64, Counter::default()), Instant::now())
    }

    #[test]
    fn a_peer_that_holds_connections_loses_the_oldest_to_itself_only() {
        let (admission, now) = admission();
        let held: Vec<_> = (0..4).filter_map(|_| admission.admit(peer(1), now)).collect();
        let other = admission.admit(peer(2), now).unwrap();
        assert_eq!(held.len(), 4);
        assert!(admission.admit(peer(1), now).is_none(), "those that it has are as new");
        let later = now + FRESH;
        let _fifth = admission.admit(peer(1), later).unwrap();
        assert_eq!(held.iter().map(is_evicted).collect::<Vec<_>>(), [true, false, false, false]);
        assert!(!is_evicted(&other));
        assert_eq!(admission.evicted.get(), 2);
    }

    #[test]
    fn a_peer_that_has_few_takes_the_place_of_one_that_has_the_most() {
        let (admission, now) = admission();
        let mut held: Vec<_> = (1..=4).flat_map(|last| (0..4).map(move |_| last)).collect::<Vec<_>>();
        let tickets: Vec<_> = held.drain(..).filter_map(|last| admission.admit(peer(last), now)).collect();
        assert_eq!(tickets.len(), 16);
        let new = admission.admit(peer(9), now).unwrap();
        assert_eq!(tickets.iter().filter(|ticket| is_evicted(ticket)).count(), 1);
        assert!(!is_evicted(&new));
    }

    #[test]
    fn a_good_token_makes_room_and_is_never_evicted() {
        let (admission, now) = admission();
        let trusted: Vec<_> = (0..100)
            .filter_map(|_| {
                let ticket = admission.admit(peer(1), now)?;
                ticket.trust(None);
                Some(ticket)
            })
            .collect();
        assert_eq!(trusted.len(), 48 + 4, "strangers' connections are left to strangers");
        assert!(admission.admit(peer(2), now).is_some());
        assert_eq!(trusted.iter().filter(|ticket| is_evicted(ticket)).count(), 0);
        drop(trusted);
        let state = admission.state();
        assert!(state.strangers.is_empty() && state.trusted.is_empty() && state.number_of_trusted == 0);
    }

    #[test]
    fn one_credential_has_so_many_connections_and_no_more() {
        let (admission, now) = (Admission::new(30_000, Counter::default()), Instant::now());
        let of = |name| {
            let ticket = admission.admit(peer(1), now).unwrap();
            ticket.trust(Some(name));
            ticket
        };
        let greedy: Vec<_> = (0..300).map(|_| of("greedy")).collect();
        let other = of("other");
        assert_eq!(greedy.iter().filter(|ticket| ticket.inner().trusted.is_some()).count(), MAX_PER_NAME);
        assert!(other.inner().trusted.is_some());
    }

    #[test]
    fn incomplete_heads_have_a_fair_part_of_a_bounded_memory() {
        let (admission, now) = (Admission::new(30_000, Counter::default()), Instant::now());
        let slow: Vec<_> = (0..1_000).map(|_| admission.admit(peer(1), now).unwrap()).collect();
        let mut kept = slow.iter().filter(|ticket| (0..8).all(|_| ticket.read_head(8 << 10))).count();
        assert!(kept < 600, "{kept} of 64 KiB each");
        let honest = admission.admit(peer(2), now).unwrap();
        assert!(honest.read_head(500), "another peer has its part");
        honest.end_head();
        drop(slow);
        assert_eq!(admission.state().bytes_of_heads, 0);
        kept = (0..100).filter(|_| honest.read_head(1_000)).count();
        assert_eq!(kept, 100);
    }

    #[test]
    fn a_network_of_ipv6_is_one_peer_and_a_mapped_address_is_the_same_as_its_own() {
        let of = |address: &str| network(address.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:0:0:2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
    }
}
