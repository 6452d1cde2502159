//! Decides when a policy is published: at once after a quiet time, then at most once a second, so that an endpoint that
//! comes and goes does not send policies to all proxies many times a second. Changes that take traffic away from a
//! version do not wait, nor do a rollout's decisions and users' requests.

use crate::clock::Millis;
use std::collections::BTreeMap;
use tideshift_core::protocol::policy::{Service, Version};

/// The minimum interval between two publications that may wait.
const PERIOD: Millis = 1_000;

/// What was published last, and when.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Option<Millis>,
    hurries: bool,
    /// By service: how many endpoints each version had ready then.
    ready: BTreeMap<String, Vec<usize>>,
}

impl Pace {
    /// Publishes the next policy without waiting.
    pub(super) fn hurry(&mut self) {
        self.hurries = true;
    }

    /// Whether `after` may be published now in place of `before`. `ready` returns how many endpoints of a version are
    /// ready.
    pub(super) fn lets(
        &mut self,
        (before, after): (&[Service], &[Service]),
        ready: impl Fn(&str, &str) -> usize,
        now: Millis,
    ) -> bool {
        let ready = |service: &Service| -> Vec<usize> {
            service.versions.iter().map(|version| ready(&service.name, &version.name)).collect()
        };
        let is_quiet = self.last.is_none_or(|last| now < last || now - last >= PERIOD);
        if !(is_quiet || self.hurries || self.takes_away(before, after, &ready)) {
            return false;
        }
        self.last = Some(now);
        self.hurries = false;
        self.ready = after.iter().map(|service| (service.name.clone(), ready(service))).collect();
        true
    }

    fn takes_away(&self, before: &[Service], after: &[Service], ready: &impl Fn(&Service) -> Vec<usize>) -> bool {
        let after: BTreeMap<&str, &Service> = after.iter().map(|service| (service.name.as_str(), service)).collect();
        before.iter().any(|before| match after.get(before.name.as_str()) {
            None => true,
            Some(after) if *after == before => false,
            Some(after) => {
                let generation = |of: &Service| of.session.as_ref().map(|session| session.generation);
                let was_ready = self.ready.get(&before.name);
                let lost = || was_ready.is_none_or(|was| ready(after).iter().zip(was).any(|(now, was)| now < was));
                before.step != after.step
                    || before.stable != after.stable
                    || generation(before) != generation(after)
                    || before.versions.iter().any(|version| is_given_less(version, before, after, &lost))
            }
        })
    }
}

/// Whether a version is given less than before. For the stable version, traffic that other versions have become able to
/// take does not count.
fn is_given_less(version: &Version, before: &Service, after: &Service, has_lost: &impl Fn() -> bool) -> bool {
    let Some(now) = after.versions.iter().find(|now| now.name == version.name) else { return true };
    let is_stable = after.stable.as_ref() == Some(&version.name);
    let less = share(now, after) + 1e-9 < share(version, before);
    (version.serving && !now.serving) || (less && (!is_stable || now.weight == 0 || has_lost()))
}

fn share(version: &Version, service: &Service) -> f64 {
    let whole: u64 = service.versions.iter().map(|version| u64::from(version.weight)).sum();
    f64::from(version.weight) / (whole.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tideshift_core::protocol::policy::Policy;

    fn service(weights: [u32; 2], serving: [bool; 2], step: u64) -> Vec<Service> {
        let version = |n: usize| json!({"name": format!("v{}", n + 1), "weight": weights[n], "serving": serving[n]});
        let service = json!({"name": "shop", "stable": "v1", "step": step, "versions": [version(0), version(1)]});
        Policy::read(&json!({"revision": 1, "services": [service]})).unwrap().services
    }

    /// Whether `after` may be published half a second after `before`, with these numbers of ready endpoints.
    fn goes_at_once(before: &[Service], after: &[Service], ready: [[usize; 2]; 2]) -> bool {
        let of = |ready: [usize; 2]| move |_: &str, version: &str| if version == "v1" { ready[0] } else { ready[1] };
        let mut pace = Pace::default();
        assert!(pace.lets((&[], before), of(ready[0]), 1_000));
        pace.lets((before, after), of(ready[1]), 1_500)
    }

    #[test]
    fn what_takes_away_goes_at_once_and_what_gives_waits() {
        let all = [true, true];
        let half = service([50, 50], all, 1);
        // An endpoint of the target goes, and comes back.
        assert!(goes_at_once(&half, &service([75, 25], all, 1), [[4, 4], [4, 2]]));
        assert!(!goes_at_once(&service([75, 25], all, 1), &half, [[4, 2], [4, 4]]));
        // Endpoints of the stable version go: others take over.
        assert!(goes_at_once(&half, &service([25, 75], all, 1), [[4, 4], [1, 4]]));
        // A version loses its last endpoint, or gets one again.
        assert!(goes_at_once(&half, &service([50, 50], [false, true], 1), [[4, 4], [4, 4]]));
        assert!(!goes_at_once(&service([50, 50], [false, true], 1), &half, [[4, 4], [4, 4]]));
        // A rollout advances, is rolled back, ends.
        assert!(goes_at_once(&half, &service([25, 75], all, 2), [[4, 4], [4, 4]]));
        assert!(goes_at_once(&half, &service([100, 0], all, 1), [[4, 4], [4, 4]]));
        assert!(goes_at_once(&half, &service([0, 100], all, 1), [[4, 4], [4, 4]]));
        assert!(goes_at_once(&half, &[], [[4, 4], [4, 4]]));
    }

    #[test]
    fn one_endpoint_that_comes_and_goes_is_published_twice_a_second_at_most() {
        let all = [true, true];
        let (up, down) = (service([50, 50], all, 1), service([75, 25], all, 1));
        let mut pace = Pace::default();
        let mut published: Vec<Service> = Vec::new();
        let mut publications = 0;
        for now in (0..10_000).step_by(10) {
            let is_up = now / 150 % 2 == 0;
            let wanted = if is_up { &up } else { &down };
            let ready = |_: &str, version: &str| if version == "v2" && !is_up { 2 } else { 4 };
            if *wanted != published && pace.lets((&published, wanted), ready, now) {
                published.clone_from(wanted);
                publications += 1;
            }
        }
        assert!((10..=20).contains(&publications), "{publications}");
    }

    #[test]
    fn what_waits_goes_after_a_second_and_what_was_asked_for_at_once() {
        let (less, more) = (service([75, 25], [true, true], 1), service([50, 50], [true, true], 1));
        let ready = |_: &str, _: &str| 4;
        let mut pace = Pace::default();
        assert!(pace.lets((&[], &less), ready, 10_000));
        assert!(!pace.lets((&less, &more), ready, 10_999));
        assert!(pace.lets((&less, &more), ready, 11_000));
        assert!(!pace.lets((&less, &more), ready, 11_001));
        pace.hurry();
        assert!(pace.lets((&less, &more), ready, 11_002));
    }
}
