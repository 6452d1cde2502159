//! Secret rotation for sessions: after a session's secret changes, cookies signed with the previous one stay valid for
//! a while, so that users keep their version.

use crate::clock::Millis;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tideshift_core::session::{MAX_PREVIOUS_SECRETS, Secret, Session, SessionBy};

/// The longest time that a previous secret stays valid. A secret that was changed because it leaked must not stay valid
/// for as long as browsers keep cookies.
const LONGEST: Millis = 24 * 3_600 * 1_000;

/// The previous secrets, by service.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rotations(BTreeMap<String, Vec<Before>>);

/// A previous secret; the newest comes first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Before {
    secret: Secret,
    until: Millis,
}

impl Rotations {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When the next previous secret expires.
    pub(super) fn next(&self) -> Option<Millis> {
        self.0.values().flatten().map(|before| before.until).min()
    }

    /// Removes services that no longer exist.
    pub fn retain(&mut self, is_known: impl Fn(&String) -> bool) {
        self.0.retain(|service, _| is_known(service));
    }

    /// Adds to a session the previous secrets that are still valid; `was` is the session that proxies have now. A
    /// session of another generation invalidates users' assignments, so no previous secret stays valid. Returns whether
    /// anything has changed.
    pub(super) fn look(&mut self, service: &str, session: &mut Session, was: Option<&Session>, now: Millis) -> bool {
        let before = self.0.get(service).cloned().unwrap_or_default();
        let mut holds = before.clone();
        holds.retain(|before| before.until > now && Some(&before.secret) != session.secret.as_ref());
        if was.is_some_and(|was| was.generation != session.generation) {
            holds.clear();
        } else if let Some((secret, ttl)) = was.and_then(|was| replaced(session, was))
            && holds.iter().all(|before| before.secret != secret)
        {
            let until = now.saturating_add(LONGEST.min(ttl.saturating_mul(1_000)));
            holds.insert(0, Before { secret, until });
            holds.truncate(MAX_PREVIOUS_SECRETS);
        }
        session.previous_secrets = holds.iter().map(|before| before.secret.clone()).collect();
        let has_changed = holds != before;
        match holds.is_empty() {
            true => drop(self.0.remove(service)),
            false => drop(self.0.insert(service.to_owned(), holds)),
        }
        has_changed
    }
}

/// The replaced secret, if cookies were signed with it, and for how many seconds browsers keep them.
fn replaced(session: &Session, was: &Session) -> Option<(Secret, u64)> {
    let SessionBy::Cookie { name, .. } = &session.by else { return None };
    let SessionBy::Cookie { name: before, ttl_seconds } = &was.by else { return None };
    let secret = was.secret.clone().filter(|secret| Some(secret) != session.secret.as_ref())?;
    (name == before).then_some((secret, *ttl_seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(secret: &str, generation: u64) -> Session {
        let by = SessionBy::Cookie { name: "c".to_owned(), ttl_seconds: 60 };
        Session { by, generation, secret: Some(Secret::new(secret.to_owned())), previous_secrets: Vec::new() }
    }

    fn previous(session: &Session) -> Vec<&str> {
        session.previous_secrets.iter().map(Secret::expose).collect()
    }

    #[test]
    fn what_was_replaced_holds_as_long_as_its_cookies_and_no_longer_than_a_day() {
        let mut rotations = Rotations::default();
        let one = session("one", 0);
        let mut two = session("two", 0);
        assert!(rotations.look("shop", &mut two, Some(&one), 1_000));
        assert_eq!(previous(&two), ["one"]);
        // Until proxies have it, and after that.
        assert!(!rotations.look("shop", &mut two, Some(&one), 2_000));
        let was = two.clone();
        assert!(!rotations.look("shop", &mut two, Some(&was), 60_999));
        assert_eq!(previous(&two), ["one"]);
        assert!(rotations.look("shop", &mut two, Some(&was), 61_000));
        assert!(previous(&two).is_empty() && rotations.is_empty());

        let mut long = session("one", 0);
        long.by = SessionBy::Cookie { name: "c".to_owned(), ttl_seconds: 34_560_000 };
        rotations.look("shop", &mut two, Some(&long), 0);
        rotations.look("shop", &mut two, None, LONGEST - 1);
        assert_eq!(previous(&two), ["one"]);
        rotations.look("shop", &mut two, None, LONGEST);
        assert_eq!(previous(&two), [""; 0]);
    }

    #[test]
    fn a_new_generation_takes_back_what_was_before_and_only_the_newest_are_kept() {
        let mut rotations = Rotations::default();
        let mut was = session("s0", 0);
        for n in 1..5 {
            let mut next = session(&format!("s{n}"), 0);
            rotations.look("shop", &mut next, Some(&was), n);
            was = next;
        }
        assert_eq!(previous(&was), ["s3", "s2"]);
        let mut back = session("s3", 0);
        rotations.look("shop", &mut back, Some(&was), 9);
        assert_eq!(previous(&back), ["s4", "s2"], "what is in force again is not of before");
        let mut revoked = session("s5", 1);
        rotations.look("shop", &mut revoked, Some(&back), 10);
        assert!(previous(&revoked).is_empty() && rotations.is_empty());
    }

    #[test]
    fn sessions_by_header_have_no_cookies_to_keep() {
        let mut rotations = Rotations::default();
        let by_header = |secret: &str| Session { by: SessionBy::Header { name: "x".to_owned() }, ..session(secret, 0) };
        let mut two = by_header("two");
        assert!(!rotations.look("shop", &mut two, Some(&by_header("one")), 1));
        assert!(!format!("{:?}", by_header("hush")).contains("hush"));
    }
}
