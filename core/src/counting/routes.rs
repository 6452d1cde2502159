//! Checks that a request reached its version. Envoy's routes decide that: requests for a version without a route of its
//! own are served by another version's cluster, under the name of the first.
//!
//! If the policy names the cluster of a version, that is its own. Otherwise clusters are learned: a cluster that the
//! stable version uses belongs to no other version, and one that two other versions use belongs to the first. Versions
//! that share a cluster can therefore not be distinguished, unless the policy names it.

use siphasher::sip::SipHasher24;

/// The number of requests per version that are checked after each policy.
const FIRST: u8 = 3;
/// The maximum number of remembered clusters per version: routes by path may lead to several.
const MOST_CLUSTERS: usize = 8;

/// The known routes of one service, by version index.
#[derive(Debug, Clone, Default)]
pub struct Routes(Vec<Version>);

#[derive(Debug, Clone, Default)]
struct Version {
    is_stable: bool,
    /// The cluster named by the policy.
    named: Option<u64>,
    learned: Vec<u64>,
    /// How many of its requests were checked and had reached it since the last policy.
    reached: u8,
    is_misrouted: bool,
}

fn hash(cluster: &[u8]) -> u64 {
    SipHasher24::new().hash(cluster)
}

impl Routes {
    /// Applies a policy: whether the version at this index is the stable one, and its cluster if the policy names it.
    /// What was learned about the version is kept.
    pub fn set(&mut self, version: usize, is_stable: bool, cluster: Option<&str>) {
        if self.0.len() <= version {
            self.0.resize_with(version.saturating_add(1), Version::default);
        }
        if let Some(of) = self.0.get_mut(version) {
            of.is_stable = is_stable;
            of.named = cluster.map(|cluster| hash(cluster.as_bytes()));
            of.reached = 0;
        }
    }

    /// Forgets what was learned about a removed version.
    pub fn forget(&mut self, version: usize) {
        if let Some(of) = self.0.get_mut(version) {
            *of = Version::default();
        }
    }

    /// Whether the next request of a version must be checked; otherwise a sample is sufficient.
    pub fn asks_for(&self, version: usize) -> bool {
        self.0.get(version).is_none_or(|version| version.is_misrouted || version.reached < FIRST)
    }

    /// Whether a request of a version that ended at this cluster reached the version. `None`: no cluster.
    pub fn reached(&mut self, version: usize, cluster: Option<&[u8]>) -> bool {
        let reached = match cluster {
            Some(cluster) => self.is_own(version, hash(cluster)),
            // A proxy that never names clusters does not tell where requests went.
            None => self.0.iter().all(|version| version.learned.is_empty() && version.named.is_none()),
        };
        if let Some(of) = self.0.get_mut(version) {
            of.is_misrouted = !reached;
            of.reached = if reached { of.reached.saturating_add(1) } else { 0 };
        }
        reached
    }

    fn is_own(&mut self, version: usize, cluster: u64) -> bool {
        let Some(of) = self.0.get(version) else { return true };
        if let Some(named) = of.named {
            return named == cluster;
        }
        let takes_all = of.is_stable;
        let mut others = self.0.iter_mut().enumerate().filter(|(i, _)| *i != version).map(|(_, other)| other);
        if takes_all {
            for other in others.filter(|other| other.named.is_none() && other.learned.contains(&cluster)) {
                other.learned.retain(|learned| *learned != cluster);
                other.reached = 0;
            }
        } else if others.any(|other| other.learned.contains(&cluster) || other.named == Some(cluster)) {
            return false;
        }
        if let Some(of) = self.0.get_mut(version)
            && !of.learned.contains(&cluster)
            && of.learned.len() < MOST_CLUSTERS
        {
            of.learned.push(cluster);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const V1: usize = 0;
    const V2: usize = 1;
    const V3: usize = 2;

    fn routes() -> Routes {
        let mut routes = Routes::default();
        [V1, V2, V3].iter().for_each(|version| routes.set(*version, *version == V1, None));
        routes
    }

    #[test]
    fn a_version_without_a_route_is_found_out() {
        let mut routes = routes();
        assert!(routes.reached(V1, Some(b"shop_v1")) && routes.reached(V2, Some(b"shop_v2")));
        assert!(!routes.reached(V3, Some(b"shop_v1")), "the default route");
        assert!(!routes.reached(V3, Some(b"shop_v2")) && !routes.reached(V3, None));
        assert!(routes.asks_for(V3), "until it has a route");
        assert!(Routes::default().reached(V3, None), "a proxy that never names clusters");
        assert!((0..3).all(|_| routes.reached(V3, Some(b"shop_v3"))));
        assert!(!routes.asks_for(V3));
        // The next policy requires checks again, and what was learned is kept.
        routes.set(V3, false, None);
        assert!(routes.asks_for(V3) && !routes.reached(V3, Some(b"shop_v1")));
    }

    #[test]
    fn the_stable_version_has_its_cluster_whoever_was_seen_there_first() {
        let mut routes = routes();
        assert!(routes.reached(V3, Some(b"shop_v1")));
        assert!(routes.reached(V1, Some(b"shop_v1")));
        assert!(!routes.reached(V3, Some(b"shop_v1")));
    }

    #[test]
    fn what_the_policy_names_holds() {
        let mut routes = routes();
        routes.set(V1, true, Some("both"));
        routes.set(V2, false, Some("both"));
        assert!(routes.reached(V1, Some(b"both")) && routes.reached(V2, Some(b"both")));
        assert!(!routes.reached(V2, Some(b"other")) && !routes.reached(V3, Some(b"both")));
    }

    #[test]
    fn a_version_may_have_a_cluster_for_each_path() {
        let mut routes = routes();
        for path in ["cart", "pay"] {
            assert!(routes.reached(V1, Some(format!("{path}-v1").as_bytes())));
            assert!(routes.reached(V2, Some(format!("{path}-v2").as_bytes())));
        }
        assert!(!routes.reached(V2, Some(b"pay-v1")));
    }
}
