//! The evidence that a bad request of one client adds against a version: the influence of a single client is limited,
//! however many requests it sends.
//!
//! A bad request whose version was decided by chance adds to the evidence for "r times worse":
//! Δ = ln r − ln(rρ + 1 − ρ) if the version had it, and −ln(rρ + 1 − ρ) if another had it; ρ is the probability that
//! this one had it if it is no worse. Five limits apply, each of which only reduces evidence (earlier events decide
//! what is left out), so that P(ever E ≥ 1/α) ≤ α (Ville) holds whatever clients do, as long as they do not know where
//! their next request goes:
//!
//! - A user of a session, whose version was chosen once, counts once.
//! - The requests of a client within two seconds count as one: they may be one attempt and its retries.
//! - The contribution of a client over any period is capped, even if it knows where its next request goes, …
//! - … and the verdict leaves out the client that contributed most. Whichever client is malicious, what remains is no
//!   more than the contribution of all the others, so that the bound holds with it as without it. A version therefore
//!   fails only on several clients.
//! - Of what counts, at most a quarter is from the same client, except for its first few bad requests. A client that
//!   has all of its bad requests at the stable version on purpose can hide a bad target no longer than that.
//!
//! If a sample of all requests shows only a few clients, these limits would leave nothing: then requests that were
//! dealt by weight are judged by their counts, and users of sessions count once each.

use crate::outcome::Outcome;
use siphasher::sip::SipHasher24;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Requests of a client within this number of milliseconds count as one.
const ONE_MILLIS: u64 = 2_000;
/// Of the bad requests that count, at most one in this many is from the same client, …
const ONE_IN: u64 = 4;
/// … but for its first few.
const FIRST: u64 = 4;
/// The interval in milliseconds between sweeps of clients that need not be tracked.
const SWEEP_MILLIS: u64 = 1_000;
/// The maximum number of clients, and of users, that are tracked; requests of others are ignored.
pub(crate) const MOST_CLIENTS: usize = 4_096;

/// One request that ended, whose version was decided by chance in the current step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// A hash of the client's address.
    pub client: u32,
    /// A hash of the user, if there is a session.
    pub user: Option<u32>,
    /// Whether the version was assigned by a session; otherwise it was dealt by weight.
    pub is_session: bool,
    /// Whether it belongs to the sample of all requests; otherwise it is reported because it ended badly.
    pub is_sampled: bool,
    /// Whether the target had it; otherwise the stable version had it.
    pub is_target: bool,
    /// How it ended.
    pub outcome: Outcome,
    /// Its duration, as an index of a report's durations.
    pub duration: usize,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            client: 0,
            user: None,
            is_session: false,
            is_sampled: false,
            is_target: false,
            outcome: Outcome::Ok,
            duration: 0,
        }
    }
}

/// The identity of a client in reports: a hash of its address without the port; for IPv6 of the /64 network, since one
/// host can use all of its addresses. Never 0. Anything but an address with a port is hashed as it is.
pub fn client(address: &[u8]) -> u32 {
    let parsed = std::str::from_utf8(address).ok().and_then(|text| text.parse::<SocketAddr>().ok());
    let hash = match parsed.map(|address| address.ip().to_canonical()) {
        Some(IpAddr::V4(address)) => SipHasher24::new().hash(&address.octets()),
        Some(IpAddr::V6(address)) => SipHasher24::new().hash(address.octets().get(..8).unwrap_or_default()),
        None => SipHasher24::new().hash(address),
    };
    (hash as u32).max(1)
}

/// The contributions of each client and user.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Limits<const RATIOS: usize> {
    clients: BTreeMap<u32, Client<RATIOS>>,
    /// The users of sessions, and when they last counted.
    users: BTreeMap<u32, u64>,
    /// The number of bad requests that counted, of all clients.
    counted: u64,
    /// The time of the last sweep.
    swept: u64,
}

#[derive(Debug, Clone, PartialEq)]
struct Client<const RATIOS: usize> {
    /// The time until which it does not count again.
    until: u64,
    /// The number of its bad requests that counted.
    counted: u64,
    /// Its contribution since it last had none, for each ratio.
    added: [f64; RATIOS],
}

impl<const RATIOS: usize> Default for Limits<RATIOS> {
    fn default() -> Self {
        Self { clients: BTreeMap::new(), users: BTreeMap::new(), counted: 0, swept: 0 }
    }
}

impl<const RATIOS: usize> Limits<RATIOS> {
    /// Restores the persisted state.
    pub(crate) fn of(
        clients: impl Iterator<Item = (u32, [f64; RATIOS])>,
        users: impl IntoIterator<Item = u32>,
    ) -> Self {
        let clients = clients.map(|(id, added)| (id, Client { until: 0, counted: 0, added })).collect();
        Self { clients, users: users.into_iter().map(|user| (user, 0)).collect(), counted: 0, swept: 0 }
    }

    /// The log-evidence that a bad request adds for each ratio; `None` if it does not count. `share`: the probability
    /// that the version had it if it is no worse; `few`: whether there are only a few clients; `cap`: the maximum
    /// contribution of one client; `now`: in milliseconds.
    pub(crate) fn gains(
        &mut self,
        request: &Request,
        ratios: &[f64; RATIOS],
        share: f64,
        few: bool,
        cap: f64,
        now: u64,
    ) -> Option<[f64; RATIOS]> {
        if let Some(user) = request.user {
            let is_known = self.users.contains_key(&user);
            if !is_known && self.users.len() < MOST_CLIENTS {
                self.users.insert(user, now);
            }
            if request.is_session && (is_known || !self.users.contains_key(&user)) {
                return None;
            }
        }
        let share = if share.is_finite() { share.clamp(1e-6, 1.0) } else { 1.0 };
        let mut gains = ratios.map(|ratio| gain(request.is_target, share, ratio));
        if few {
            return request.is_session.then_some(gains);
        }
        if !self.clients.contains_key(&request.client) && !self.has_room(now) {
            return None;
        }
        let new = Client { until: 0, counted: 0, added: [0.0; RATIOS] };
        let client = self.clients.entry(request.client).or_insert(new);
        if now < client.until || client.counted >= FIRST.saturating_add(self.counted / ONE_IN) {
            return None;
        }
        client.until = now.saturating_add(ONE_MILLIS);
        client.counted = client.counted.saturating_add(1);
        self.counted = self.counted.saturating_add(1);
        for (gain, added) in gains.iter_mut().zip(&mut client.added) {
            *gain = gain.min(cap - *added);
            *added = (*added + *gain).max(0.0);
        }
        Some(gains)
    }

    /// Whether another client can be tracked. A client without a contribution need not be: it may contribute as much as
    /// a new one.
    fn has_room(&mut self, now: u64) -> bool {
        if self.clients.len() >= MOST_CLIENTS && now >= self.swept.saturating_add(SWEEP_MILLIS) {
            self.swept = now;
            self.clients.retain(|_, client| client.until > now || client.added.iter().any(|added| *added > 0.0));
        }
        self.clients.len() < MOST_CLIENTS
    }

    /// Restarts the evidence, and with it the contribution that each client may make.
    pub(crate) fn start_again(&mut self) {
        self.counted = 0;
        for client in self.clients.values_mut() {
            (client.counted, client.added) = (0, [0.0; RATIOS]);
        }
    }

    /// Drops users that counted before a time.
    pub(crate) fn forget_before(&mut self, time: u64) {
        self.users.retain(|_, at| *at >= time);
        self.clients.retain(|_, client| client.until >= time || client.added.iter().any(|added| *added > 0.0));
    }

    /// The largest contribution of one client, for each ratio.
    pub(crate) fn most_added(&self) -> [f64; RATIOS] {
        let mut most = [0.0_f64; RATIOS];
        for client in self.clients.values() {
            most.iter_mut().zip(&client.added).for_each(|(most, added)| *most = most.max(*added));
        }
        most
    }

    /// The clients with the largest contributions, and these.
    pub(crate) fn added_most(&self, number: usize) -> impl Iterator<Item = (u32, [f64; RATIOS])> + use<RATIOS> {
        let mut clients: Vec<_> = self.clients.iter().map(|(id, client)| (*id, client.added)).collect();
        let sum = |added: &[f64; RATIOS]| added.iter().sum::<f64>();
        clients.sort_by(|(_, a), (_, b)| sum(b).total_cmp(&sum(a)));
        clients.into_iter().take(number)
    }

    /// The users that have counted.
    pub(crate) fn users(&self) -> impl Iterator<Item = u32> + '_ {
        self.users.keys().copied()
    }
}

/// The log-evidence of one bad request for this ratio.
fn gain(is_target: bool, share: f64, ratio: f64) -> f64 {
    let of_any = libm::log1p(share * (ratio - 1.0));
    if is_target { libm::log1p(ratio - 1.0) - of_any } else { -of_any }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn a_client_is_its_address_without_the_port() {
        assert_eq!(client(b"192.0.2.7:1000"), client(b"192.0.2.7:2000"));
        assert_eq!(client(b"192.0.2.7:1000"), client(b"[::ffff:192.0.2.7]:1000"));
        assert_ne!(client(b"192.0.2.7:1000"), client(b"192.0.2.8:1000"));
        assert_eq!(client(b"[2001:db8::1]:80"), client(b"[2001:db8:0:0:9::2]:81"));
        assert_ne!(client(b"[2001:db8::1]:80"), client(b"[2001:db8:0:1::1]:80"));
        assert_ne!(client(b"@/run/a"), client(b"@/run/b"));
        assert_ne!(client(b""), 0);
    }
}
