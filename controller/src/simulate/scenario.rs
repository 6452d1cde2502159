//! The document that says how a made-up world behaves: how many requests come, how each version answers them, which
//! endpoints are ready when, and what people do meanwhile.

use super::random::Latency;
use crate::clock::Millis;
use crate::rollout::Command;
use serde_json::Value;
use std::collections::BTreeMap;
use tideshift_core::decode::{Decoder, Errors, Fields};
use tideshift_core::shift::{API_VERSION, TrafficShift};

/// The `kind` of these documents.
const KIND: &str = "Scenario";
const WEEK_SECONDS: u64 = 7 * 24 * 3600;
const HOUR_SECONDS: u64 = 3600;
const MOST_REQUESTS_PER_SECOND: f64 = 100_000.0;
const MOST_PROXIES: u64 = 100;
const MOST_ENDPOINTS: u64 = 10_000;
/// Requests that take longer end at that time.
const LONGEST_MILLIS: f64 = 60_000.0;

/// A made-up world.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// How long it is watched.
    pub duration: Millis,
    /// What chance is made of; the same seed gives the same run.
    pub seed: u64,
    /// How many proxies share the requests, each with a guard of its own.
    pub proxies: usize,
    /// When the document's target is set; before, the stable version alone serves.
    pub target_at: Millis,
    /// What services have to do that have no load of their own.
    pub load: Load,
    /// By service.
    pub loads: BTreeMap<String, Load>,
    /// What happens besides, in the order of time.
    pub events: Vec<Planned>,
}

/// What one service has to do, and how it does.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Over all proxies.
    pub requests_per_second: Series<f64>,
    /// By version; those that are not named behave well.
    pub versions: BTreeMap<String, Behaviour>,
}

/// How a version behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Behaviour {
    /// The probability that a request fails, 0 to 1.
    pub error_rate: Series<f64>,
    /// How long requests take.
    pub latency: Series<Latency>,
    /// How many endpoints can take traffic; none: all that the document lists.
    pub endpoints_ready: Option<Series<u32>>,
    /// Times when many requests fail for one cause; none: never.
    pub clumps: Option<Clumps>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            error_rate: Series::constant(0.0),
            latency: Series::constant(Latency::default()),
            endpoints_ready: None,
            clumps: None,
        }
    }
}

/// Short times when many requests fail for one cause, such as a restart behind the version.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clumps {
    /// From the end of one to the start of the next, on average (exponentially distributed).
    pub every: Millis,
    /// How long each lasts.
    pub long: Millis,
    /// The probability that a request fails meanwhile, 0 to 1.
    pub error_rate: f64,
}

/// Something that happens at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Since the beginning.
    pub at: Millis,
    /// What.
    pub action: Action,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A command of a user.
    Command(Command),
    /// The controller is gone for so long; proxies keep what they have. It goes on from what it had kept.
    ControllerDown(Millis),
}

/// A value that changes at times and stays as it is in between.
#[derive(Debug, Clone, PartialEq)]
pub struct Series<T>(Vec<(Millis, T)>);

impl<T> Series<T> {
    /// Never changes.
    pub fn constant(value: T) -> Self {
        Self(vec![(0, value)])
    }

    /// The value at a time since the beginning.
    pub fn at(&self, at: Millis) -> &T {
        let next = self.0.partition_point(|(since, _)| *since <= at);
        // (The first is for time 0.)
        &self.0[next.max(1) - 1].1
    }

    /// All values, in the order of time.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }
}

impl Scenario {
    /// Reads a document; every error at once. `shift`: what it is a scenario of, if that could be read; else the names of
    /// services and versions, and how many endpoints there are, are not looked at.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it.
    pub fn read(value: &Value, shift: Option<&TrafficShift>) -> Result<Self, Errors> {
        Decoder::read(value, |d, value| {
            let mut f = d.object(value)?;
            for (name, text) in [("apiVersion", API_VERSION), ("kind", KIND)] {
                f.required(d, name, text, |d, v| d.text_where(v, text, |given| given == text));
            }
            let duration = f.optional(d, "durationSeconds", |d, v| d.integer(v, 1, WEEK_SECONDS));
            let reader = Reader { duration: duration.unwrap_or(HOUR_SECONDS) * 1_000, shift };
            let seed = f.optional(d, "seed", |d, v| d.integer(v, 0, u64::MAX));
            let proxies = f.optional(d, "proxies", |d, v| d.integer(v, 1, MOST_PROXIES));
            let target_at = f.optional(d, "targetAtSeconds", |d, v| reader.at(d, v));
            let rate = "requests per second, a number or a list of {atSeconds, value}";
            let rate = f.required(d, "requestsPerSecond", rate, |d, v| reader.rate(d, v));
            let versions = f.optional(d, "versions", |d, v| reader.versions(d, v, None)).unwrap_or_default();
            let load = rate.map(|requests_per_second| Load { requests_per_second, versions });
            let loads = f.optional(d, "services", |d, v| reader.loads(d, v, load.as_ref())).unwrap_or_default();
            let events = f.optional(d, "events", |d, v| reader.events(d, v)).unwrap_or_default();
            f.finish(d);
            Some(Self {
                duration: reader.duration,
                seed: seed.unwrap_or(1),
                proxies: proxies.unwrap_or(1) as usize,
                target_at: target_at.unwrap_or(0),
                load: load?,
                loads,
                events,
            })
        })
    }

    /// What a service has to do.
    pub fn load_of(&self, service: &str) -> &Load {
        self.loads.get(service).unwrap_or(&self.load)
    }
}

/// What has to be known while reading.
struct Reader<'s> {
    duration: Millis,
    shift: Option<&'s TrafficShift>,
}

impl Reader<'_> {
    /// Seconds since the beginning.
    fn at(&self, d: &mut Decoder, value: &Value) -> Option<Millis> {
        d.number(value, 0.0, self.duration as f64 / 1e3).map(|seconds| (seconds * 1e3).round() as Millis)
    }

    /// One value, or a list of `{atSeconds, value}`.
    fn series<T>(
        &self,
        d: &mut Decoder,
        value: &Value,
        read: impl Fn(&mut Decoder, &Value) -> Option<T>,
    ) -> Option<Series<T>> {
        let Value::Array(items) = value else { return read(d, value).map(Series::constant) };
        if items.is_empty() {
            d.invalid(value, "a value, or a list of at least one {atSeconds, value}");
        }
        let mut before = None;
        let points = d.list(value, |d, value| {
            let mut f = d.object(value)?;
            let at = f.required(d, "atSeconds", "seconds since the beginning", |d, v| {
                let at = self.at(d, v)?;
                match before.replace(at) {
                    None if at > 0 => d.invalid(v, "0, since the first value is the one at the beginning"),
                    Some(earlier) if at <= earlier => d.invalid(v, "more than the one before"),
                    _ => {}
                }
                Some(at)
            });
            let value = f.required(d, "value", "the value from then on", &read);
            f.finish(d);
            Some((at?, value?))
        })?;
        let points: Vec<_> = points.into_iter().map(|(_, point)| point).collect();
        (!points.is_empty()).then_some(Series(points))
    }

    fn rate(&self, d: &mut Decoder, value: &Value) -> Option<Series<f64>> {
        self.series(d, value, |d, v| d.number(v, 0.0, MOST_REQUESTS_PER_SECOND))
    }

    fn loads(&self, d: &mut Decoder, value: &Value, common: Option<&Load>) -> Option<BTreeMap<String, Load>> {
        let mut loads = BTreeMap::new();
        d.list(value, |d, value| {
            let mut f = d.object(value)?;
            let name = f.required(d, "name", "a service's name", |d, v| self.service(d, v, &loads));
            let rate = f.optional(d, "requestsPerSecond", |d, v| self.rate(d, v));
            let versions = f.optional(d, "versions", |d, v| self.versions(d, v, name.as_deref()));
            f.finish(d);
            let requests_per_second = rate.or(common.map(|common| common.requests_per_second.clone()))?;
            let versions = versions.or(common.map(|common| common.versions.clone()))?;
            loads.insert(name?, Load { requests_per_second, versions });
            Some(())
        })?;
        Some(loads)
    }

    fn service(&self, d: &mut Decoder, value: &Value, before: &BTreeMap<String, Load>) -> Option<String> {
        let known: Option<Vec<_>> = self.shift.map(|shift| shift.services.iter().map(|s| s.name.as_str()).collect());
        let name = one_of(d, value, known.as_deref(), "services")?;
        if before.contains_key(&name) {
            d.invalid(value, "a service that is not there already");
        }
        Some(name)
    }

    fn version(&self, d: &mut Decoder, value: &Value) -> Option<String> {
        let known: Option<Vec<_>> = self.shift.map(|shift| shift.versions().collect());
        one_of(d, value, known.as_deref(), "versions")
    }

    /// `service`: of which one; `None`: of each that has none of its own.
    fn versions(&self, d: &mut Decoder, value: &Value, service: Option<&str>) -> Option<BTreeMap<String, Behaviour>> {
        let mut versions = BTreeMap::new();
        d.list(value, |d, value| {
            let mut f = d.object(value)?;
            let name = f.required(d, "name", "a version's name", |d, v| {
                let name = self.version(d, v)?;
                if versions.contains_key(&name) {
                    d.invalid(v, "a version that is not there already");
                }
                Some(name)
            });
            let most = name.as_deref().map_or(MOST_ENDPOINTS, |name| self.most_endpoints(name, service));
            let behaviour = self.behaviour(d, &mut f, most);
            f.finish(d);
            versions.insert(name?, behaviour);
            Some(())
        })?;
        Some(versions)
    }

    fn behaviour(&self, d: &mut Decoder, f: &mut Fields<'_>, most_endpoints: u64) -> Behaviour {
        let default = Behaviour::default();
        let error_rate = f.optional(d, "errorRate", |d, v| self.series(d, v, |d, v| d.number(v, 0.0, 1.0)));
        let latency = f.optional(d, "latencyMillis", |d, v| self.series(d, v, latency));
        let endpoints_ready = f.optional(d, "endpointsReady", |d, v| {
            self.series(d, v, |d, v| d.integer(v, 0, most_endpoints).map(|endpoints| endpoints as u32))
        });
        let clumps = f.optional(d, "clumps", clumps);
        Behaviour {
            error_rate: error_rate.unwrap_or(default.error_rate),
            latency: latency.unwrap_or(default.latency),
            endpoints_ready,
            clumps,
        }
    }

    /// No more can be ready than the document lists; if it lists none (in Kubernetes), as many as you like.
    fn most_endpoints(&self, version: &str, service: Option<&str>) -> u64 {
        let services = self.shift.iter().flat_map(|shift| &shift.services);
        let services = services.filter(|of| service.is_none_or(|service| of.name == service));
        let listed = services.filter_map(|of| of.version(version)).map(|version| version.endpoints.len() as u64);
        listed.filter(|listed| *listed > 0).min().unwrap_or(MOST_ENDPOINTS)
    }

    fn events(&self, d: &mut Decoder, value: &Value) -> Option<Vec<Planned>> {
        let events = d.list(value, |d, value| self.event(d, value))?;
        let mut events: Vec<_> = events.into_iter().map(|(_, event)| event).collect();
        events.sort_by_key(|event| event.at);
        Some(events)
    }

    fn event(&self, d: &mut Decoder, value: &Value) -> Option<Planned> {
        let mut f = d.object(value)?;
        let at = f.required(d, "atSeconds", "seconds since the beginning", |d, v| self.at(d, v));
        let yes = |d: &mut Decoder, v: &Value| {
            let said = v.as_bool().filter(|said| *said);
            if said.is_none() {
                d.invalid(v, "true");
            }
            said
        };
        let promote = f.optional(d, "promote", |d, v| match v.as_str() {
            Some("full") => Some(Command::Promote { full: true, override_gates: true }),
            Some(_) => {
                d.invalid(v, "true, or full");
                None
            }
            None => yes(d, v).map(|_| Command::Promote { full: false, override_gates: true }),
        });
        let commands = [
            promote,
            f.optional(d, "pause", yes).map(|_| Command::Pause),
            f.optional(d, "resume", yes).map(|_| Command::Resume),
            f.optional(d, "abort", yes).map(|_| Command::Abort),
            f.optional(d, "rollback", |d, v| self.version(d, v))
                .map(|to| Command::Rollback { to, override_gates: true }),
            f.optional(d, "setTarget", |d, v| self.version(d, v)).map(|target| Command::SetTarget { target }),
            f.optional(d, "setWeight", |d, v| d.integer(v, 0, 100))
                .map(|weight| Command::SetWeight { weight: weight as u32, override_gates: true }),
        ];
        let down = f.optional(d, "controllerDownSeconds", |d, v| d.integer(v, 1, WEEK_SECONDS));
        f.finish(d);
        const ACTIONS: [&str; 8] =
            ["promote", "pause", "resume", "abort", "rollback", "setTarget", "setWeight", "controllerDownSeconds"];
        if ACTIONS.iter().filter(|name| value.get(**name).is_some_and(|value| !value.is_null())).count() != 1 {
            d.invalid(value, format!("exactly one of {}", ACTIONS.join(", ")));
        }
        let command = commands.into_iter().flatten().next().map(Action::Command);
        let action = command.or(down.map(|seconds| Action::ControllerDown(seconds * 1_000)))?;
        Some(Planned { at: at?, action })
    }
}

fn one_of(d: &mut Decoder, value: &Value, known: Option<&[&str]>, what: &str) -> Option<String> {
    let allowed = known.map_or_else(|| "a name".to_owned(), |known| format!("one of the {what} {}", known.join(", ")));
    d.text_where(value, &allowed, |name| known.is_none_or(|known| known.contains(&name)))
}

fn latency(d: &mut Decoder, value: &Value) -> Option<Latency> {
    let mut f = d.object(value)?;
    let median = f.required(d, "median", "milliseconds", |d, v| d.number(v, 0.1, LONGEST_MILLIS));
    let p99 = f.required(d, "p99", "milliseconds", |d, v| d.number(v, median.unwrap_or(0.1), LONGEST_MILLIS));
    f.finish(d);
    Some(Latency::new(median?, p99?))
}

fn clumps(d: &mut Decoder, value: &Value) -> Option<Clumps> {
    let mut f = d.object(value)?;
    let every = f.required(d, "everySeconds", "seconds", |d, v| d.number(v, 1.0, WEEK_SECONDS as f64));
    let long = f.required(d, "millis", "milliseconds", |d, v| d.integer(v, 100, 600_000));
    let rate = f.optional(d, "errorRate", |d, v| d.number(v, 0.0, 1.0));
    f.finish(d);
    Some(Clumps { every: (every? * 1e3) as Millis, long: long?, error_rate: rate.unwrap_or(1.0) })
}
