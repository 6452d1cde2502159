//! The encoded policy: as a whole, or as a delta from the policy that the proxy has. For each service it records the
//! revision of its last change, and it keeps the most recently removed services: enough for deltas from many revisions,
//! with no more memory than two policies.

use bytes::Bytes;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tideshift_core::protocol::policy::Policy;

/// The maximum number of removed services that are remembered.
const MAX_REMOVED: usize = 1_000;

/// An encoded policy.
#[derive(Debug, Clone)]
pub struct Published {
    /// The epoch of the controller's state.
    pub epoch: String,
    /// The revision of the policy.
    pub revision: u64,
    /// The whole policy.
    pub json: Bytes,
    parts: Arc<Parts>,
    /// The previous revision, which most proxies have when a new one is published, and the delta from it.
    last: Option<(u64, Bytes)>,
}

#[derive(Debug, Clone, Default)]
struct Parts {
    /// Each service as JSON, and the revision of its last change.
    services: BTreeMap<String, (Bytes, u64)>,
    /// The removed services and the revision of their removal; oldest first.
    removed: VecDeque<(u64, String)>,
    /// Deltas are available from this revision on.
    since: u64,
}

impl Published {
    /// The encoding of a policy that follows `before`.
    pub fn next(before: Option<&Self>, epoch: String, policy: &Policy) -> Self {
        let before = before.filter(|before| before.epoch == epoch && before.revision < policy.revision);
        let revision = policy.revision;
        let mut parts = Parts { since: revision, ..Parts::default() };
        if let Some(before) = before {
            (parts.since, parts.removed) = (before.parts.since, before.parts.removed.clone());
        }
        let mut json = format!(r#"{{"revision":{revision},"services":["#).into_bytes();
        for (n, service) in policy.services.iter().enumerate() {
            let part = Bytes::from(serde_json::to_vec(service).unwrap_or_default());
            json.extend_from_slice(if n > 0 { b"," } else { b"" });
            json.extend_from_slice(&part);
            let same = before.and_then(|before| before.parts.services.get(&service.name));
            let part = match same.filter(|(before, _)| *before == part) {
                Some(same) => same.clone(),
                None => (part, revision),
            };
            parts.services.insert(service.name.clone(), part);
        }
        json.extend_from_slice(b"]}");
        let gone = before.into_iter().flat_map(|before| before.parts.services.keys());
        let gone = gone.filter(|name| !parts.services.contains_key(*name)).map(|name| (revision, name.clone()));
        parts.removed.extend(gone);
        parts.removed.retain(|(_, name)| !parts.services.contains_key(name));
        while parts.removed.len() > MAX_REMOVED {
            parts.since = parts.removed.pop_front().map_or(parts.since, |(revision, _)| revision.max(parts.since));
        }
        let mut published = Self { epoch, revision, json: json.into(), parts: Arc::new(parts), last: None };
        published.last = before.and_then(|before| Some((before.revision, published.changes(before.revision)?)));
        published
    }

    /// The whole policy for older proxies without support for deltas: they reject a service with an unknown field.
    pub fn for_older(&self) -> Bytes {
        const NEWER: &str = "previousSecrets";
        if !self.json.windows(NEWER.len()).any(|part| part == NEWER.as_bytes()) {
            return self.json.clone();
        }
        let mut policy: Value = serde_json::from_slice(&self.json).unwrap_or_default();
        for service in policy["services"].as_array_mut().into_iter().flatten() {
            service.get_mut("session").and_then(Value::as_object_mut).map(|session| session.remove(NEWER));
        }
        serde_json::to_vec(&policy).map_or_else(|_| self.json.clone(), Bytes::from)
    }

    /// The policy without the services that a proxy may not see.
    pub(super) fn only(&self, sees: impl Fn(&str) -> bool) -> Self {
        let services = self.parts.services.iter().filter(|(name, _)| sees(name));
        let services: BTreeMap<_, _> = services.map(|(name, part)| (name.clone(), part.clone())).collect();
        let removed = self.parts.removed.iter().filter(|(_, name)| sees(name)).cloned().collect();
        let mut json = format!(r#"{{"revision":{},"services":["#, self.revision).into_bytes();
        for (n, (part, _)) in services.values().enumerate() {
            json.extend_from_slice(if n > 0 { b"," } else { b"" });
            json.extend_from_slice(part);
        }
        json.extend_from_slice(b"]}");
        let parts = Arc::new(Parts { services, removed, since: self.parts.since });
        Self { epoch: self.epoch.clone(), revision: self.revision, json: json.into(), parts, last: None }
    }

    /// The response for a proxy that has this revision of this epoch and supports deltas.
    pub fn since(&self, epoch: &str, revision: u64) -> Bytes {
        let changes = match &self.last {
            _ if epoch != self.epoch => None,
            Some((last, changes)) if *last == revision => Some(changes.clone()),
            _ => self.changes(revision),
        };
        changes.unwrap_or_else(|| self.json.clone())
    }

    /// The delta from a revision, if it is known and smaller than the whole.
    fn changes(&self, base: u64) -> Option<Bytes> {
        let Parts { services, removed, since } = &*self.parts;
        if !(*since..self.revision).contains(&base) {
            return None;
        }
        let mut json = format!(r#"{{"revision":{},"base":{base},"services":["#, self.revision).into_bytes();
        for (n, (part, _)) in services.values().filter(|(_, changed)| *changed > base).enumerate() {
            json.extend_from_slice(if n > 0 { b"," } else { b"" });
            json.extend_from_slice(part);
        }
        json.push(b']');
        let removed = removed.iter().filter(|(gone, _)| *gone > base).map(|(_, name)| name.as_str());
        let removed: Vec<&str> = removed.collect();
        if !removed.is_empty() {
            json.extend_from_slice(br#","removed":"#);
            json.extend_from_slice(&serde_json::to_vec(&removed).unwrap_or_default());
        }
        json.push(b'}');
        (json.len() < self.json.len()).then(|| json.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tideshift_core::protocol::delivery::{Before, Delivery};
    use tideshift_core::protocol::policy::Service;

    fn service(name: &str, weight: u32) -> Service {
        let host = format!("{name}.shop.example.com");
        let versions = serde_json::json!([{"name": "v1", "weight": 100}, {"name": "v2", "weight": weight}]);
        let service = serde_json::json!({"name": name, "hostnames": [host], "stable": "v1", "versions": versions});
        Policy::read(&serde_json::json!({"revision": 1, "services": [service]})).unwrap().services.remove(0)
    }

    fn policy(revision: u64, services: impl IntoIterator<Item = Service>) -> Policy {
        Policy { revision, services: services.into_iter().collect(), ..Policy::default() }
    }

    #[test]
    fn one_service_of_a_thousand_costs_no_more_than_twice_its_own_bytes() {
        let all = |changed: u32| (0..1_000).map(move |n| service(&format!("s{n}"), if n == 500 { changed } else { 0 }));
        let first = Published::next(None, "e".to_owned(), &policy(1, all(0)));
        assert_eq!(first.json, serde_json::to_vec(&policy(1, all(0))).unwrap());
        let second = Published::next(Some(&first), "e".to_owned(), &policy(2, all(1)));
        let (own, sent) = (serde_json::to_vec(&service("s500", 1)).unwrap().len(), second.since("e", 1).len());
        println!("{sent} bytes for a change of one service of {own} bytes; the whole policy has {}", second.json.len());
        assert!(sent <= 2 * own, "{sent} of {own}");
        // Without a known base it is the whole policy.
        for (epoch, base) in [("other", 1), ("e", 0), ("e", 2), ("e", 3)] {
            assert_eq!(second.since(epoch, base), second.json);
        }
        let again = Published::next(Some(&second), "f".to_owned(), &policy(3, all(2)));
        assert_eq!(again.since("e", 2), again.json, "another state's revisions are others");
    }

    #[test]
    fn a_proxy_that_sees_a_part_hears_of_no_other_service() {
        let of = |revision, names: &[&str]| policy(revision, names.iter().map(|name| service(name, revision as u32)));
        let first = Published::next(None, "e".to_owned(), &of(1, &["a.shop", "b.bank", "c.bank"]));
        let second = Published::next(Some(&first), "e".to_owned(), &of(2, &["a.shop", "c.bank"]));
        let seen = second.only(|name| name.ends_with(".shop"));
        for sent in [seen.json.clone(), seen.since("e", 1), seen.since("", 0)] {
            let sent = String::from_utf8(sent.to_vec()).unwrap();
            assert!(sent.contains("a.shop") && !sent.contains("bank"), "{sent}");
        }
        assert!(Policy::read(&serde_json::from_slice(&seen.json).unwrap()).is_ok());
    }

    #[test]
    fn older_proxies_are_sent_no_field_that_they_would_refuse() {
        let with = |previous: &[&str]| {
            let session =
                serde_json::json!({"type": "Cookie", "name": "c", "secret": "new", "previousSecrets": previous});
            let service = serde_json::json!({"name": "shop", "versions": [{"name": "v1"}], "session": session});
            let policy = serde_json::json!({"revision": 1, "services": [service]});
            Published::next(None, "e".to_owned(), &Policy::read(&policy).unwrap())
        };
        let rotated = with(&["old"]);
        assert!(String::from_utf8_lossy(&rotated.json).contains(r#""previousSecrets":["old"]"#));
        let older: Value = serde_json::from_slice(&rotated.for_older()).unwrap();
        assert_eq!(older, serde_json::from_slice::<Value>(&with(&[]).json).unwrap());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let keeps = service("keeps", 1);
        let mut published = Published::next(None, "e".to_owned(), &policy(1, [keeps.clone()]));
        for n in 0..3_000 {
            let passing = service(&format!("s{n}"), 1);
            published = Published::next(Some(&published), "e".to_owned(), &policy(2 + n, [keeps.clone(), passing]));
        }
        assert_eq!(published.parts.removed.len(), MAX_REMOVED);
        assert_eq!(published.since("e", 1), published.json);
        assert!(published.changes(published.revision - 3).is_some() || published.revision < 3);
    }

    proptest! {
        #[test]
        fn changes_since_any_revision_lead_to_the_whole(
            steps in prop::collection::vec(prop::collection::btree_map(0u8..6, 0u32..3, 0..6), 1..12),
        ) {
            let of = |(name, weight): (&u8, &u32)| service(&format!("s{name}"), *weight);
            let mut known: Vec<(Published, Policy)> = Vec::new();
            for (n, step) in steps.iter().enumerate() {
                let policy = policy(n as u64 + 1, step.iter().map(of));
                let published = Published::next(known.last().map(|(last, _)| last), "e".to_owned(), &policy);
                for (before, ran) in &known {
                    let sent = published.since("e", before.revision);
                    let before = Before { policy: ran, revision: Some(before.revision), refused: &[] };
                    let mut after = Delivery::read(&sent, before).unwrap().policy;
                    after.services.sort_by(|a, b| a.name.cmp(&b.name));
                    prop_assert_eq!(&after, &policy);
                }
                known.push((published, policy));
            }
        }
    }
}
