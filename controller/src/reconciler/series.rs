//! The time series of the last minutes: each version's share and counts every two seconds, for users who investigate
//! after an incident. Held in memory only; it is empty after a restart.

use crate::clock::{Millis, timestamp};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};

/// How long samples are kept.
const KEEP: Millis = 15 * 60 * 1_000;
/// The interval between two samples. A version takes about 16 KiB: 32 bytes, 450 times.
const EVERY: Millis = 2_000;

/// The samples of all services, all taken at the same times.
#[derive(Debug, Default)]
pub struct Series {
    times: VecDeque<Millis>,
    services: BTreeMap<String, Samples>,
}

/// A service's samples. Each list ends at the newest time; a list that is shorter than the times began later.
#[derive(Debug, Default)]
struct Samples {
    /// The evidence against the target and for it.
    evidence: VecDeque<Option<[f64; 2]>>,
    versions: BTreeMap<String, VecDeque<VersionSample>>,
}

/// The state of a service at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its name.
    pub service: String,
    /// The evidence against the target and for it; `None` before the first rollout.
    pub evidence: Option<[f64; 2]>,
    /// The versions by name.
    pub versions: Vec<(String, VersionSample)>,
}

/// The state of a version at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VersionSample {
    /// Its share in percent.
    pub weight: f64,
    /// Its total of ended requests, without those that the client cancelled.
    pub requests: u64,
    /// The failed ones among them.
    pub errors: u64,
    /// Requests that the client cancelled.
    pub cancelled: u64,
}

/// The last 15 minutes of a rollout's services, as `GET /v1/rollouts/{name}/series` says it.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutSeries {
    /// The controller's time, by which these are.
    pub now: jiff::Timestamp,
    /// When the samples were taken, RFC 3339, the newest last; all other lists are as long.
    pub times: Vec<jiff::Timestamp>,
    /// The services.
    pub services: Vec<ServiceSeries>,
}

/// A service's last 15 minutes; null where it was not there.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSeries {
    /// Its name.
    pub name: String,
    /// How much spoke against the target.
    pub evidence: Vec<Option<f64>>,
    /// How much spoke for it.
    pub pass_evidence: Vec<Option<f64>>,
    /// The versions, by name.
    pub versions: Vec<VersionSeries>,
}

/// A version's last 15 minutes; null where it was not there.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VersionSeries {
    /// Its name.
    pub name: String,
    /// Its share in percent.
    pub weight: Vec<Option<f64>>,
    /// Its requests that had ended, unless the client ended them, since ever.
    pub requests: Vec<Option<u64>>,
    /// Those that had failed.
    pub errors: Vec<Option<u64>>,
    /// Those that the client had ended.
    pub cancelled: Vec<Option<u64>>,
}

impl Series {
    /// Whether the next sample is due.
    pub fn is_due(&self, now: Millis) -> bool {
        self.times.back().is_none_or(|last| now < *last || now - last >= EVERY)
    }

    /// Takes a sample of all services; services that are not in it are removed.
    pub fn take(&mut self, now: Millis, samples: impl IntoIterator<Item = Sample>) {
        if self.times.back().is_some_and(|last| now <= *last) {
            // The clock was set back: earlier samples cannot be put in order.
            *self = Self::default();
        }
        self.times.push_back(now);
        while self.times.front().is_some_and(|first| now - first > KEEP) {
            self.times.pop_front();
        }
        let length = self.times.len();
        let mut before = std::mem::take(&mut self.services);
        for Sample { service, evidence, versions } in samples {
            let mut samples = before.remove(&service).unwrap_or_default();
            push(&mut samples.evidence, evidence, length);
            let mut earlier = std::mem::take(&mut samples.versions);
            for (name, sample) in versions {
                let mut list = earlier.remove(&name).unwrap_or_default();
                push(&mut list, sample, length);
                samples.versions.insert(name, list);
            }
            self.services.insert(service, samples);
        }
    }

    /// The series of these services at the time `now`.
    pub fn of<'a>(&self, services: impl IntoIterator<Item = &'a str>, now: Millis) -> RolloutSeries {
        let length = self.times.len();
        let services = services.into_iter().filter_map(|name| Some((name, self.services.get(name)?)));
        let service = |(name, samples): (&str, &Samples)| ServiceSeries {
            name: name.to_owned(),
            evidence: list(&samples.evidence, length, |evidence| evidence.map(|[against, _]| against)),
            pass_evidence: list(&samples.evidence, length, |evidence| evidence.map(|[_, for_it]| for_it)),
            versions: samples.versions.iter().map(|(name, samples)| version(name, samples, length)).collect(),
        };
        RolloutSeries {
            now: timestamp(now),
            times: self.times.iter().map(|time| timestamp(*time)).collect(),
            services: services.map(service).collect(),
        }
    }
}

fn push<T>(list: &mut VecDeque<T>, sample: T, length: usize) {
    list.push_back(sample);
    let too_many = list.len().saturating_sub(length);
    list.drain(..too_many);
}

fn version(name: &str, samples: &VecDeque<VersionSample>, length: usize) -> VersionSeries {
    VersionSeries {
        name: name.to_owned(),
        weight: list(samples, length, |sample| Some(sample.weight)),
        requests: list(samples, length, |sample| Some(sample.requests)),
        errors: list(samples, length, |sample| Some(sample.errors)),
        cancelled: list(samples, length, |sample| Some(sample.cancelled)),
    }
}

/// A list that ends at the newest time and is as long as the times.
fn list<S, T>(samples: &VecDeque<S>, length: usize, value: impl Fn(&S) -> Option<T>) -> Vec<Option<T>> {
    let missing = std::iter::repeat_with(|| None).take(length.saturating_sub(samples.len()));
    missing.chain(samples.iter().map(value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `shop` with v1, and v2 if it has a share.
    fn shop(requests: u64, share: f64) -> Vec<Sample> {
        let of = |name: &str, weight| (name.to_owned(), VersionSample { weight, requests, errors: 1, cancelled: 2 });
        let mut versions = vec![of("v1", 100.0 - share)];
        versions.extend((share > 0.0).then(|| of("v2", share)));
        let evidence = (share > 0.0).then_some([share, 1.0]);
        vec![Sample { service: "shop".to_owned(), evidence, versions }]
    }

    /// Takes samples ten times a second, as the controller does.
    fn look(series: &mut Series, times: std::ops::Range<Millis>, share: f64) {
        for now in times.step_by(100) {
            if series.is_due(now) {
                series.take(now, shop(now, share));
            }
        }
    }

    #[test]
    fn a_sample_every_two_seconds_of_the_last_fifteen_minutes() {
        let mut series = Series::default();
        look(&mut series, 10_000..20_000, 0.0);
        let seen = series.of(["shop"], 0);
        let seconds: Vec<_> = seen.times.iter().map(|time| time.as_second()).collect();
        assert_eq!(seconds, [10, 12, 14, 16, 18]);
        let v1 = &seen.services[0].versions[0];
        assert_eq!(v1.requests, [10_000, 12_000, 14_000, 16_000, 18_000].map(Some));
        assert_eq!(
            (&v1.weight, &v1.errors[..1], &v1.cancelled[..1]),
            (&vec![Some(100.0); 5], &[Some(1)][..], &[Some(2)][..])
        );
        assert_eq!(seen.services[0].evidence, [None; 5]);

        // Hours later it is no larger.
        look(&mut series, 20_000..10_000_000, 5.0);
        let seen = series.of(["shop"], 0);
        assert_eq!(seen.times.len(), 451);
        assert_eq!(seen.times[450].as_second() - seen.times[0].as_second(), 900);
        for version in &seen.services[0].versions {
            assert_eq!(version.requests.len(), 451);
            assert!(version.weight.iter().all(Option::is_some));
        }
        let samples = &series.services["shop"];
        assert!(samples.versions.values().all(|list| list.capacity() * size_of::<VersionSample>() <= 16 << 10));
        assert_eq!((seen.services[0].evidence[450], seen.services[0].pass_evidence[450]), (Some(5.0), Some(1.0)));
    }

    #[test]
    fn what_comes_and_goes_is_in_its_place() {
        let mut series = Series::default();
        look(&mut series, 0..4_000, 0.0);
        look(&mut series, 4_000..8_000, 5.0);
        let weights = |series: &Series| {
            let seen = series.of(["shop", "nobody"], 0);
            assert_eq!(seen.services.len(), 1);
            seen.services[0].versions.iter().map(|one| (one.name.clone(), one.weight.clone())).collect::<Vec<_>>()
        };
        let v1 = ("v1".to_owned(), vec![Some(100.0), Some(100.0), Some(95.0), Some(95.0)]);
        assert_eq!(weights(&series), [v1, ("v2".to_owned(), vec![None, None, Some(5.0), Some(5.0)])]);
        // A version that was removed and added again starts over.
        series.take(8_000, shop(1, 0.0));
        series.take(10_000, shop(1, 6.0));
        assert_eq!(weights(&series)[1].1, [None, None, None, None, None, Some(6.0)]);
        series.take(12_000, []);
        assert!(series.of(["shop"], 0).services.is_empty());
        assert_eq!(series.of([], 0).times.len(), 7);

        // After a gap the series restarts; the same holds if the clock is set back.
        series.take(2_000_000, shop(1, 0.0));
        assert_eq!(series.of(["shop"], 0).times.len(), 1);
        assert!(series.is_due(1_999_000));
        series.take(1_999_000, shop(1, 0.0));
        assert_eq!(series.of(["shop"], 0).times.len(), 1);
    }
}
