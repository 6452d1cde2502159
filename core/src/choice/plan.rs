//! The plan: a policy compiled for fast decisions, and the decision itself. [`Plan::route`] finds the service, rule and
//! split of a request; [`Plan::decide`] then chooses the version by session or by turn.

use crate::choice::rules::RuleIndex;
use crate::choice::sequence::{EvenSequence, SplitMix64, Starts};
pub use crate::choice::split::{Split, Turns};
use crate::matching::hostname::Hostnames;
use crate::matching::request::{AUTHORITY, METHOD, Request, SCHEME};
use crate::matching::{Match, header_name, request};
use crate::outcome::ErrorCodes;
use crate::protocol::policy::{Mirror, Policy, Rule, Service, Version};
use crate::session::{Given, Session, SessionBy, SessionHash};
use std::collections::{BTreeMap, BTreeSet};

/// A compiled policy, ready for decisions.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The revision of the policy.
    pub revision: u64,
    /// The services, in the order of the policy.
    pub services: Vec<ServicePlan>,
    hostnames: Hostnames,
    few_headers: Option<Vec<String>>,
    has_mirrors: bool,
}

/// One service of a plan.
#[derive(Debug, Clone)]
pub struct ServicePlan {
    /// The service's name.
    pub name: String,
    /// The names of its versions, in the order of the policy; splits refer to them by index.
    pub versions: Vec<String>,
    /// Which results count as errors of the version.
    pub errors: ErrorCodes,
    /// The stable version, the baseline for the others, as an index.
    pub stable: Option<usize>,
    /// The Envoy cluster of each version, if the policy names it.
    pub clusters: Vec<Option<String>>,
    /// See [`Service::step`].
    pub step: u64,
    session: Option<SessionPlan>,
    /// For requests that no rule matches.
    own: Destination,
    rules: Vec<(Rule, Destination)>,
    index: RuleIndex,
}

/// The destination of requests that a rule matches, or that none does.
#[derive(Debug, Clone)]
struct Destination {
    split: Split,
    mirror: Option<MirrorPlan>,
}

#[derive(Debug, Clone)]
struct MirrorPlan {
    percent: u32,
    methods: Vec<String>,
    cluster: String,
}

#[derive(Debug, Clone)]
struct SessionPlan {
    session: Session,
    hash: SessionHash,
    /// With the previous secrets.
    previous: Vec<SessionHash>,
}

/// The route of a request.
#[derive(Debug, Clone, Copy)]
pub struct Route<'p> {
    /// The service, as an index of [`Plan::services`].
    pub service: usize,
    /// The matching rule, as an index of the service's rules; `None`: the service's own weights apply.
    pub rule: Option<usize>,
    /// The versions to choose from; empty if none is in service.
    pub split: &'p Split,
    mirror: Option<&'p MirrorPlan>,
}

/// The decision for a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision<'p> {
    /// The service, as an index of [`Plan::services`].
    pub service: usize,
    /// The matching rule, as an index of the service's rules; `None`: the service's own weights apply.
    pub rule: Option<usize>,
    /// The chosen version, as an index of the service's; `None`: none is in service.
    pub version: Option<usize>,
    /// Why it was chosen.
    pub reason: Reason,
    /// How it was chosen, for the counts.
    pub chosen: Chosen,
    /// Whether the result is evidence about the version rather than about the client: the version was dealt, or
    /// assigned to the user, by chance at this step.
    pub is_compared: bool,
    /// A hash of the user of the session; `None` if there is none.
    pub user: Option<u32>,
    /// The value of `Set-Cookie` for the response.
    pub cookie: Option<String>,
    /// The Envoy cluster that receives a mirrored copy.
    pub mirror: Option<&'p str>,
}

/// How a version was chosen, as distinguished in counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chosen {
    /// Dealt by weight, request by request.
    Dealt,
    /// Assigned to the user by a session.
    Session,
    /// By a rule that matched the request.
    Rule,
}

impl Chosen {
    /// All variants.
    pub const ALL: [Self; 3] = [Self::Dealt, Self::Session, Self::Rule];
}

/// Why a version was chosen. Buckets allow comparisons: the bucket of a user is constant, a point advances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its turn in the sequence: the point, and the total.
    Weight(u32, u32),
    /// The user was assigned to it before; the bucket of the user.
    Session(u32),
    /// The hash of the user maps to it; the bucket of the user.
    Hash(u32),
    /// No version is in service.
    Unrouted,
}

impl Reason {
    /// The number of buckets for users.
    pub const BUCKETS: u32 = 10_000;

    fn bucket(user: u64) -> u32 {
        (((user >> 32) * u64::from(Self::BUCKETS)) >> 32) as u32
    }
}

impl Plan {
    /// Compiles a policy. `is_vetoed` tells, by service and version, which versions the guard has ejected; ignored if
    /// no other version with weight is in service.
    pub fn new(policy: &Policy, is_vetoed: impl Fn(&str, &str) -> bool) -> Self {
        let mut hostnames = Hostnames::default();
        let mut services = Vec::with_capacity(policy.services.len());
        let mut slots = 0;
        for (i, service) in policy.services.iter().enumerate() {
            if service.hostnames.is_empty() {
                hostnames.insert(None, i);
            }
            for hostname in &service.hostnames {
                hostnames.insert(Some(hostname), i);
            }
            let is_out = |version: &Version| !version.serving || is_vetoed(&service.name, &version.name);
            // Ignore vetoes that would leave users without a version; the guard ends them at its next look.
            let is_heeded = service.versions.iter().any(|version| version.weight > 0 && !is_out(version));
            let serves = |version: &Version| version.serving && !(is_heeded && is_out(version));
            services.push(ServicePlan::new(service, slots, serves));
            slots += 1 + service.rules.len();
        }
        let few_headers = few_headers(policy, hostnames.refer_to_host());
        let mirrors = |service: &Service| service.mirror.is_some() || service.rules.iter().any(|r| r.mirror.is_some());
        let has_mirrors = policy.services.iter().any(mirrors);
        Self { revision: policy.revision, services, hostnames, few_headers, has_mirrors }
    }

    /// Whether any request may be mirrored.
    pub fn has_mirrors(&self) -> bool {
        self.has_mirrors
    }

    /// The headers that a decision may read, if they are so few that reading each is cheaper than reading all.
    pub fn few_headers(&self) -> Option<&[String]> {
        self.few_headers.as_deref()
    }

    /// The route of a request; `None`: it belongs to no service of the plan, and passes unchanged.
    pub fn route(&self, request: &(impl Request + ?Sized)) -> Option<Route<'_>> {
        let authority = if self.hostnames.refer_to_host() { request.header(AUTHORITY) } else { None };
        let index = self.hostnames.find(authority.as_deref().unwrap_or_default())?;
        let service = self.services.get(index)?;
        // Rules come first, so that testers reach versions that users do not get yet. Skip a rule without a version in
        // service.
        let takes = |i: &usize| {
            let rule = service.rules.get(*i);
            rule.is_some_and(|(rule, to)| !to.split.is_empty() && rule.holds(request))
        };
        let rule = service.index.candidates(request).find(takes);
        let to = rule.and_then(|i| service.rules.get(i)).map_or(&service.own, |(_, to)| to);
        Some(Route { service: index, rule, split: &to.split, mirror: to.mirror.as_ref() })
    }

    /// The decision for a request; `None`: it belongs to no service of the plan, and passes unchanged. `random` creates
    /// the names of new users.
    pub fn decide(
        &self,
        request: &(impl Request + ?Sized),
        turns: &mut Turns,
        random: impl FnOnce() -> u64,
    ) -> Option<Decision<'_>> {
        let route = self.route(request)?;
        let service = self.services.get(route.service)?;
        let by_session =
            service.session.as_ref().and_then(|session| session.choose(service, &route, request, turns, random));
        let choice = by_session.unwrap_or_else(|| Choice::by_turn(route.split, turns));
        let mirror = route.mirror.filter(|mirror| choice.version.is_some() && mirror.takes(request, turns));
        let chosen = match (route.rule, choice.reason) {
            (Some(_), _) => Chosen::Rule,
            (None, Reason::Session(_) | Reason::Hash(_)) => Chosen::Session,
            (None, Reason::Weight(..) | Reason::Unrouted) => Chosen::Dealt,
        };
        Some(Decision {
            service: route.service,
            rule: route.rule,
            version: choice.version,
            reason: choice.reason,
            chosen,
            is_compared: chosen != Chosen::Rule && choice.is_of_this_step,
            user: choice.user,
            cookie: choice.cookie,
            mirror: mirror.map(|mirror| mirror.cluster.as_str()),
        })
    }
}

impl Plan {
    /// An explanation of a decision for users, in a form that fits in a header.
    pub fn explain(&self, decision: Option<&Decision<'_>>) -> String {
        let revision = self.revision;
        let known = decision.and_then(|decision| Some((decision, self.services.get(decision.service)?)));
        let Some((decision, service)) = known else {
            return format!("service=-; reason=no-service; revision={revision}");
        };
        let version = decision.version.and_then(|version| service.versions.get(version)).map_or("-", String::as_str);
        let rule = match decision.rule {
            Some(rule) => {
                let name = service.rule(rule).and_then(|rule| rule.name.as_deref()).map(in_header);
                name.unwrap_or_else(|| format!("#{rule}"))
            }
            None => "-".to_owned(),
        };
        let (reason, bucket) = match decision.reason {
            Reason::Weight(point, total) => ("weight", format!("{point}/{total}")),
            Reason::Session(bucket) => ("session", format!("{bucket}/{}", Reason::BUCKETS)),
            Reason::Hash(bucket) => ("hash", format!("{bucket}/{}", Reason::BUCKETS)),
            Reason::Unrouted => ("unrouted", "-".to_owned()),
        };
        let mirror = decision.mirror.map(|cluster| format!("; mirror={cluster}")).unwrap_or_default();
        let service = &service.name;
        format!(
            "service={service}; rule={rule}; version={version}; reason={reason}; bucket={bucket}{mirror}; \
             revision={revision}"
        )
    }
}

/// The name of a rule, which may be any text, without characters that are special in a header.
fn in_header(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() && c != ';' { c } else { '_' }).collect()
}

/// See [`Plan::few_headers`]. If cookies, paths or methods matter, nearly every request has the requested headers, and
/// reading one that exists costs almost as much as reading all.
fn few_headers(policy: &Policy, refers_to_host: bool) -> Option<Vec<String>> {
    const MOST: usize = 4;
    let mut names = BTreeSet::new();
    names.extend(policy.explain.as_ref().map(|explain| explain.header.as_str()));
    for service in &policy.services {
        match service.session.as_ref().map(|session| &session.by) {
            Some(SessionBy::Cookie { .. }) => return None,
            Some(SessionBy::Header { name }) => drop(names.insert(header_name(name))),
            None => {}
        }
        if service.mirror.is_some() || service.rules.iter().any(|rule| rule.mirror.is_some()) {
            return None;
        }
        for m in service.rules.iter().flat_map(|rule| &rule.matches) {
            // Each field declares the headers that it reads; a field that is missing here would never match.
            let Match { headers, cookies, query_params, path, method } = m;
            let is_common = method.is_some() || path.is_some() || !cookies.is_empty() || !query_params.is_empty();
            // (Several cookie headers would be joined differently.)
            if is_common || headers.iter().any(|header| header.name == "cookie") {
                return None;
            }
            names.extend(headers.iter().map(|header| header_name(&header.name)));
        }
    }
    names.extend(refers_to_host.then_some(AUTHORITY));
    (names.len() <= MOST).then(|| names.into_iter().map(str::to_owned).collect())
}

/// A chosen version and how it was chosen.
struct Choice {
    version: Option<usize>,
    reason: Reason,
    /// Whether the version was dealt, or assigned to the user, at the current step.
    is_of_this_step: bool,
    user: Option<u32>,
    cookie: Option<String>,
}

impl Choice {
    fn by_turn(split: &Split, turns: &mut Turns) -> Self {
        let next = split.next(turns);
        let reason = next.map_or(Reason::Unrouted, |(_, point)| Reason::Weight(point, split.total()));
        Self { version: next.map(|(version, _)| version), reason, is_of_this_step: true, user: None, cookie: None }
    }
}

/// The hash of a user in reports. Uses other bits than the choice of the version.
fn told_apart(user: u64) -> u32 {
    (user as u32).max(1)
}

impl SessionPlan {
    fn new(service: &str, session: &Session, hash: SessionHash) -> Self {
        let previous = session.previous_secrets.iter().map(|secret| SessionHash::new(service, secret.as_bytes()));
        Self { session: session.clone(), hash, previous: previous.collect() }
    }

    /// The content of a cookie, and whether it is signed with a previous secret.
    fn read<'c>(&self, cookie: &'c [u8]) -> Option<(Given<'c>, bool)> {
        let of_before = || self.previous.iter().find_map(|hash| hash.read(cookie)).map(|given| (given, true));
        self.hash.read(cookie).map(|given| (given, false)).or_else(of_before)
    }

    /// The version of the user; `None` if there is no user, or nothing to choose from.
    fn choose(
        &self,
        service: &ServicePlan,
        route: &Route<'_>,
        request: &(impl Request + ?Sized),
        turns: &mut Turns,
        random: impl FnOnce() -> u64,
    ) -> Option<Choice> {
        // For a rule with one version there is nothing to remember.
        if route.split.is_empty() || (route.rule.is_some() && route.split.has_one()) {
            return None;
        }
        match &self.session.by {
            SessionBy::Header { name } => {
                let user = request.header(header_name(name)).filter(|user| !user.is_empty())?;
                let user = self.hash.of(&user);
                Some(Choice {
                    version: route.split.of_user(user),
                    reason: Reason::Hash(Reason::bucket(user)),
                    is_of_this_step: true,
                    user: Some(told_apart(user)),
                    cookie: None,
                })
            }
            SessionBy::Cookie { name, ttl_seconds } => {
                let header = request.header("cookie").unwrap_or_default();
                let mut cookies = request::cookies(&header, name).peekable();
                let sent = cookies.peek().is_some();
                // If all users get the same version there is nothing to remember, but possibly a cookie to correct.
                if !sent && route.split.has_one() {
                    return None;
                }
                let given = cookies.find_map(|cookie| self.read(cookie));
                let is_signed_anew = given.as_ref().is_some_and(|(_, is_of_before)| *is_of_before);
                let given = given.map(|(given, _)| given);
                let is_new = given.is_none();
                let id = given.as_ref().map_or_else(random, |given| given.id);
                let user = self.hash.of(&id.to_le_bytes());
                let bucket = Reason::bucket(user);
                let current = given.filter(|given| given.generation == self.session.generation);
                let given_at = current.as_ref().map_or(service.step, |given| given.step);
                let kept = current.and_then(|given| service.version(given.version));
                let keeps = |split: &Split| kept.filter(|version| split.has(*version));
                let (version, reason) = match keeps(route.split) {
                    Some(version) => (Some(version), Reason::Session(bucket)),
                    // A new user: by turn, so that shares are even for clients that ignore cookies, too. Under a rule
                    // by hash, because the cookie may have to name another version.
                    None if is_new && route.rule.is_none() => {
                        let choice = Choice::by_turn(route.split, turns);
                        (choice.version, choice.reason)
                    }
                    None => (route.split.of_user(user), Reason::Hash(bucket)),
                };
                // The cookie records the user's version by the service's own weights; rules come and go.
                let own = keeps(&service.own.split)
                    .or_else(|| version.filter(|version| service.own.split.has(*version)))
                    .or_else(|| service.own.split.of_user(user));
                let cookie = own.filter(|own| is_signed_anew || kept != Some(*own)).and_then(|own| {
                    let generation = self.session.generation;
                    // An existing assignment keeps its step, whatever secret it is signed with.
                    let step = if kept == Some(own) { given_at } else { service.step };
                    let value = self.hash.cookie(service.versions.get(own)?, generation, step, id);
                    let secure = if request.header(SCHEME).as_deref() == Some(b"https") { "; Secure" } else { "" };
                    Some(format!("{name}={value}; Path=/; Max-Age={ttl_seconds}; HttpOnly; SameSite=Lax{secure}"))
                });
                let is_of_this_step = given_at == service.step || version != kept;
                Some(Choice { version, reason, is_of_this_step, user: Some(told_apart(user)), cookie })
            }
        }
    }
}

impl MirrorPlan {
    fn takes(&self, request: &(impl Request + ?Sized), turns: &mut Turns) -> bool {
        let method = request.header(METHOD).unwrap_or_default();
        self.methods.iter().any(|safe| safe.as_bytes() == &*method)
            // By chance: with an even sequence the mirrored requests would favour some versions.
            && turns.random.next_below(100) < self.percent
    }
}

impl ServicePlan {
    fn new(service: &Service, first_slot: usize, serves: impl Fn(&Version) -> bool) -> Self {
        let secret = service.session.as_ref().and_then(|session| session.secret.as_ref());
        let hash = SessionHash::new(&service.name, secret.map_or(service.name.as_bytes(), |secret| secret.as_bytes()));
        let session = service.session.as_ref().map(|session| SessionPlan::new(&service.name, session, hash));
        let mut slots = first_slot..;
        let mut destination = |weights: &mut dyn Iterator<Item = (&str, u32)>, mirror: Option<&Mirror>| {
            let slot = slots.next().unwrap_or_default();
            let mut split = Split::new(slot);
            for (name, weight) in weights {
                let index = service.versions.iter().position(|version| version.name == name && serves(version));
                if let Some(index) = index {
                    split.push(index, weight, hash.of(name.as_bytes()));
                }
            }
            Destination { split, mirror: mirror.and_then(|mirror| MirrorPlan::new(service, mirror, &serves)) }
        };
        let own = destination(
            &mut service.versions.iter().map(|version| (version.name.as_str(), version.weight)),
            service.mirror.as_ref(),
        );
        let rules = service.rules.iter().map(|rule| {
            let versions = &mut rule.versions.iter().map(|version| (version.name.as_str(), version.weight));
            (rule.clone(), destination(versions, rule.mirror.as_ref()))
        });
        Self {
            name: service.name.clone(),
            versions: service.versions.iter().map(|version| version.name.clone()).collect(),
            errors: service.errors.clone(),
            stable: service.stable.as_ref().and_then(|name| service.versions.iter().position(|v| v.name == *name)),
            clusters: service.versions.iter().map(|version| version.cluster.clone()).collect(),
            step: service.step,
            session,
            own,
            rules: rules.collect(),
            index: RuleIndex::new(&service.rules),
        }
    }

    /// The rule at an index of [`Route::rule`].
    pub fn rule(&self, index: usize) -> Option<&Rule> {
        self.rules.get(index).map(|(rule, _)| rule)
    }

    /// The index of a version.
    fn version(&self, name: &[u8]) -> Option<usize> {
        self.versions.iter().position(|version| version.as_bytes() == name)
    }

    /// The split of a rule, or of requests that no rule matches.
    fn split(&self, rule: Option<usize>) -> Option<&Split> {
        let to = rule.map_or(Some(&self.own), |rule| self.rules.get(rule).map(|(_, to)| to))?;
        Some(&to.split)
    }
}

impl MirrorPlan {
    /// `None` if the version is out of service.
    fn new(service: &Service, mirror: &Mirror, serves: impl Fn(&Version) -> bool) -> Option<Self> {
        let version = service.versions.iter().find(|version| version.name == mirror.version && serves(version))?;
        let cluster = version.cluster.clone().unwrap_or_else(|| format!("{}_{}", service.name, version.name));
        Some(Self { percent: mirror.percent, methods: mirror.methods.clone(), cluster })
    }
}

impl Turns {
    /// The positions for a new plan: sequences that were in the old one continue, so that frequent changes of weights
    /// do not make shares uneven; the others start at a position that `seed` determines.
    pub fn for_plan(plan: &Plan, seed: u64, before: Option<(&Plan, &Self)>) -> Self {
        let mut known = BTreeMap::new();
        if let Some((old, _)) = before {
            known.extend(old.services.iter().map(|service| (service.name.as_str(), service)));
        }
        // A rule is identified by the name of its service and its number.
        let old_place = |service: &ServicePlan, rule: Option<usize>| {
            let split = known.get(service.name.as_str())?.split(rule)?;
            before?.1.sequences.get(split.slot()).copied()
        };
        let kept: Vec<Option<EvenSequence>> = plan
            .services
            .iter()
            .flat_map(|service| {
                let rules = std::iter::once(None).chain((0..service.rules.len()).map(Some));
                rules.map(move |rule| old_place(service, rule))
            })
            .collect();
        let mut random = SplitMix64::new(seed);
        let mut starts = Starts::beside(kept.iter().flatten(), random.next_u64());
        let sequences = kept.into_iter().map(|place| place.unwrap_or_else(|| starts.start())).collect();
        Self { sequences, random }
    }
}
