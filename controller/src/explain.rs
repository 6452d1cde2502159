//! Which version would a request get, by which rule, and why? Decided by `tideshift-core`'s plan itself, as the proxies
//! run it; what is added here is the telling.

use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;
use tideshift_core::OWN_HEADERS;
use tideshift_core::choice::plan::{Decision, Plan, Reason, Route, Turns};
use tideshift_core::matching::request::{AUTHORITY, METHOD, PATH};
use tideshift_core::matching::{Match, Mismatch, NamedMatch, PathMatch, ValueMatch};
use tideshift_core::protocol::policy::{Mirror, Policy, Rule, Service};
use tideshift_core::session::{Session, SessionBy};

/// The request in question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request {
    /// The host, with or without a port.
    pub host: String,
    /// The method, such as `GET`.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// All other headers, names in any case.
    pub headers: Vec<(String, String)>,
}

/// What becomes of a request; shown to people by `Display`, to programs as JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The request that is explained.
    pub request: Request,
    /// The service that it is for; `None`: no service has its host, it is left alone.
    pub service: Option<String>,
    /// The hostname by which the service was found; `*` for a service of every host.
    pub hostname: Option<String>,
    /// The service's rules, in the order in which they are tried.
    pub rules: Vec<RuleReport>,
    /// The rule that takes the request; `None`: the service's own weights apply.
    pub rule: Option<RuleName>,
    /// The versions that may get it, in the service's order; none if nothing is in service.
    pub versions: Vec<Share>,
    /// The version that gets it, if that is certain.
    pub version: Option<String>,
    /// Versions that would have a share, if they were in service.
    pub out_of_service: Vec<String>,
    /// The whole answer in one sentence.
    pub reason: String,
    /// What else is good to know.
    pub notes: Vec<String>,
}

/// One rule, and whether it takes the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleReport {
    /// Which rule.
    #[serde(flatten)]
    pub rule: RuleName,
    /// Whether it takes the request.
    pub verdict: RuleVerdict,
    /// If it does not match: for each of its alternatives the first thing that does not hold.
    pub why_not: Vec<String>,
}

/// Names a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleName {
    /// Its place among the service's rules, from 0, as in `rules[0]`.
    pub index: usize,
    /// Its name, if it has one.
    pub name: Option<String>,
}

/// What a rule does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum RuleVerdict {
    /// It decides.
    Taken,
    /// It does not match.
    NoMatch,
    /// The rule matches, but is skipped because none of its versions is in service.
    NobodyInService,
    /// A rule before it decides.
    NotReached,
}

/// A version's part of the requests like this one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Share {
    /// The version's name.
    pub name: String,
    /// Its weight.
    pub weight: u32,
    /// Its part, above 0 and up to 1.
    pub share: f64,
}

/// What becomes of `request` under `policy`.
pub fn explain(policy: &Policy, request: &Request) -> Explanation {
    let mut explanation = Explanation {
        request: request.clone(),
        service: None,
        hostname: None,
        rules: Vec::new(),
        rule: None,
        versions: Vec::new(),
        version: None,
        out_of_service: Vec::new(),
        reason: String::new(),
        notes: Vec::new(),
    };
    let headers = headers(request, &mut explanation.notes);
    let plan = Plan::new(policy, |_, _| false);
    let found = plan.route(&headers[..]).and_then(|route| Some((route, policy.services.get(route.service)?)));
    match found {
        Some((route, service)) => explanation.fill_in(&plan, &route, service, &headers),
        None => explanation.reason = no_service(policy, request),
    }
    explanation
}

/// The service that a host leads to, as an index of the policy's services.
pub fn service_of(policy: &Policy, host: &str) -> Option<usize> {
    let headers = [(AUTHORITY, host)];
    Plan::new(policy, |_, _| false).route(&headers[..]).map(|route| route.service)
}

/// The headers as the filter sees them after its first step, which removes our own.
fn headers(request: &Request, notes: &mut Vec<String>) -> Vec<(String, String)> {
    let pseudo = [(AUTHORITY, &request.host), (METHOD, &request.method), (PATH, &request.path)];
    let mut headers: Vec<_> = pseudo.map(|(name, value)| (name.to_owned(), value.clone())).to_vec();
    let mut removed = BTreeSet::new();
    for (name, value) in &request.headers {
        let name = name.to_ascii_lowercase();
        match name.starts_with(OWN_HEADERS) {
            true => drop(removed.insert(name)),
            false => headers.push((name, value.clone())),
        }
    }
    notes.extend(removed.iter().map(|name| format!("the client's header {name} is removed first; it decides nothing")));
    headers
}

impl Explanation {
    fn fill_in(&mut self, plan: &Plan, route: &Route<'_>, service: &Service, headers: &[(String, String)]) {
        self.service = Some(service.name.clone());
        self.hostname = Some(hostname_found(service, &self.request.host));
        self.rules = service.rules.iter().enumerate().map(|(i, rule)| report(i, rule, route.rule, headers)).collect();
        let rule = route.rule.and_then(|index| service.rules.get(index).map(|rule| (index, rule)));
        self.rule = rule.map(|(index, rule)| RuleName { index, name: rule.name.clone() });

        let total: u64 = route.split.weights().map(|(_, weight)| u64::from(weight)).sum();
        let versions = plan.services.get(route.service).map_or(&[][..], |service| &service.versions);
        let share = |(index, weight): (usize, u32)| {
            Some(Share { name: versions.get(index)?.clone(), weight, share: f64::from(weight) / total as f64 })
        };
        self.versions = route.split.weights().filter_map(share).collect();
        self.version = match &self.versions[..] {
            [only] => Some(only.name.clone()),
            _ => None,
        };
        self.out_of_service = out_of_service(service, rule.map(|(_, rule)| rule));

        let by = match &self.rule {
            Some(rule) => rule.to_string(),
            None if service.rules.is_empty() => "the service's weights".to_owned(),
            None => "the service's weights, as no rule takes it".to_owned(),
        };
        self.reason = match (&self.version, &self.versions[..]) {
            (Some(version), _) => format!("{version} by {by}"),
            (None, []) => "no version is in service: the request goes on without a version, to the proxy's default \
                           route"
                .to_owned(),
            (None, shares) => {
                let shares: Vec<_> = shares.iter().map(|share| format!("{} {}", share.name, share.percent())).collect();
                format!("{} by {by}", shares.join(", "))
            }
        };
        if let (None, Some(session)) = (&self.version, &service.session) {
            self.tell_session(plan, session, headers);
        }
        let mirror = rule.map_or(service.mirror.as_ref(), |(_, rule)| rule.mirror.as_ref());
        self.notes.extend(mirror.map(|Mirror { version, percent, methods }| {
            format!(
                "{percent} % of such requests are also sent to {version}, if their method is {}",
                methods.join(", ")
            )
        }));
    }

    /// Who stays on which version.
    fn tell_session(&mut self, plan: &Plan, session: &Session, headers: &[(String, String)]) {
        let by = match &session.by {
            SessionBy::Cookie { name, .. } => format!("cookie {name}"),
            SessionBy::Header { name } => format!("header {name}"),
        };
        let mut turns = Turns::for_plan(plan, 0, None);
        let decision = plan.decide(headers, &mut turns, || 0);
        let is_of_user = |decision: &Decision<'_>| match session.by {
            SessionBy::Cookie { .. } => matches!(decision.reason, Reason::Session(_)),
            SessionBy::Header { .. } => matches!(decision.reason, Reason::Hash(_)),
        };
        let user = decision.filter(is_of_user);
        let note = match (user, &session.secret) {
            (Some(Decision { service, version: Some(version), .. }), Some(_)) => {
                self.version = plan.services.get(service).and_then(|service| service.versions.get(version)).cloned();
                let version = self.version.as_deref().unwrap_or_default();
                self.reason = format!("{version} by the user's {by}; for others, {}", self.reason);
                return;
            }
            (Some(_), None) => format!(
                "this user always gets the same of them, by {by}; which one depends on the controller's secret: ask a \
                 running one with --server"
            ),
            _ => format!("users with a {by} stay on the version that they have"),
        };
        self.notes.push(note);
    }
}

/// Those that have weight in the split that applies, but are not in service.
fn out_of_service(service: &Service, rule: Option<&Rule>) -> Vec<String> {
    let has_share = |name: &str, weight: u32| match rule {
        Some(rule) => rule.versions.iter().any(|version| version.name == name && version.weight > 0),
        None => weight > 0,
    };
    let versions = service.versions.iter().filter(|version| !version.serving);
    versions.filter(|version| has_share(&version.name, version.weight)).map(|version| version.name.clone()).collect()
}

/// The most specific of the service's hostnames that leads to it; the plan itself is asked about each.
fn hostname_found(service: &Service, host: &str) -> String {
    let leads = |hostname: &&String| {
        let service = Service { hostnames: vec![hostname.to_string()], ..service.clone() };
        service_of(&Policy { services: vec![service], ..Policy::default() }, host).is_some()
    };
    let leading = service.hostnames.iter().filter(leads);
    // Without `*` is more specific, and so is longer.
    let specific = leading.max_by_key(|hostname| (!hostname.starts_with('*'), hostname.len()));
    specific.map_or_else(|| "*".to_owned(), String::clone)
}

fn no_service(policy: &Policy, request: &Request) -> String {
    let known: Vec<_> = policy.services.iter().map(|s| format!("{}: {}", s.name, s.hostnames.join(", "))).collect();
    let known = if known.is_empty() { "there is none".to_owned() } else { known.join("; ") };
    format!("no service has the host {} ({known}): the request is left alone", request.host)
}

fn report(index: usize, rule: &Rule, taken: Option<usize>, headers: &[(String, String)]) -> RuleReport {
    let (verdict, why_not) = match taken {
        Some(taken) if taken == index => (RuleVerdict::Taken, Vec::new()),
        Some(taken) if taken < index => (RuleVerdict::NotReached, Vec::new()),
        _ => {
            let why_not = |m: &Match| m.mismatch(headers).map(|mismatch| told(&mismatch, headers));
            let why_not: Option<Vec<_>> = rule.matches.iter().map(why_not).collect();
            match why_not {
                Some(why_not) if !why_not.is_empty() => (RuleVerdict::NoMatch, why_not),
                _ => (RuleVerdict::NobodyInService, Vec::new()),
            }
        }
    };
    RuleReport { rule: RuleName { index, name: rule.name.clone() }, verdict, why_not }
}

/// A mismatch in words: what there is, and what is wanted.
fn told(mismatch: &Mismatch<'_>, headers: &[(String, String)]) -> String {
    let (what, wanted) = match mismatch {
        Mismatch::Method(wanted) => ("method".to_owned(), (*wanted).to_owned()),
        Mismatch::Path(wanted) => ("path".to_owned(), wanted_path(wanted)),
        Mismatch::Header(m) => (format!("header {}", m.name), wanted_value(m)),
        Mismatch::Cookie(m) => (format!("cookie {}", m.name), wanted_value(m)),
        Mismatch::QueryParam(m) => (format!("query parameter {}", m.name), wanted_value(m)),
    };
    match mismatch.found(headers) {
        Some(found) => format!("{what} is {:?}, wanted is {wanted}", String::from_utf8_lossy(&found)),
        None => format!("{what} is not there, wanted is {wanted}"),
    }
}

fn wanted_value(m: &NamedMatch) -> String {
    match &m.value {
        ValueMatch::Exact(value) => format!("{value:?}"),
        ValueMatch::Prefix(prefix) => format!("a value that starts with {prefix:?}"),
        ValueMatch::RegularExpression(regex) => format!("a value that matches {}", String::from(regex.clone())),
        ValueMatch::Present => "any value".to_owned(),
    }
}

fn wanted_path(path: &PathMatch) -> String {
    match path {
        PathMatch::Exact(path) => format!("{path:?}"),
        PathMatch::PathPrefix(prefix) => format!("{prefix:?} or a path below it"),
        PathMatch::RegularExpression(regex) => format!("a path that matches {}", String::from(regex.clone())),
    }
}

impl Share {
    fn percent(&self) -> String {
        let percent = format!("{:.2}", self.share * 100.0);
        let percent = percent.trim_end_matches('0').trim_end_matches('.');
        // One in a million is little, but not nothing; what is left of it is not all.
        match percent {
            "0" => "<0.01 %".to_owned(),
            "100" if self.share < 1.0 => ">99.99 %".to_owned(),
            percent => format!("{percent} %"),
        }
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rules[{}]", self.index)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "request: {} {}{}", self.request.method, self.request.host, self.request.path)?;
        if let (Some(service), Some(hostname)) = (&self.service, &self.hostname) {
            let found = if hostname == "*" { "every host".to_owned() } else { format!("hostname {hostname}") };
            writeln!(f, "service: {service} ({found})")?;
        }
        for rule in &self.rules {
            writeln!(f, "  {}: {}", rule.rule, rule.told())?;
        }
        for name in &self.out_of_service {
            writeln!(f, "note: {name} is out of service, so it gets nothing")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        let what = if self.versions.is_empty() { "answer" } else { "version" };
        writeln!(f, "{what}: {}", self.reason)
    }
}

impl RuleReport {
    fn told(&self) -> String {
        match self.verdict {
            RuleVerdict::Taken => "takes it".to_owned(),
            RuleVerdict::NotReached => "not reached".to_owned(),
            RuleVerdict::NobodyInService => "matches, but none of its versions is in service; passed over".to_owned(),
            RuleVerdict::NoMatch => format!("no match: {}", self.why_not.join("; nor: ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn policy(document: Value) -> Policy {
        Policy::read(&document).unwrap()
    }

    fn shop() -> Policy {
        policy(json!({"revision": 1, "services": [{
            "name": "checkout",
            "hostnames": ["checkout.example.com", "*.example.com", "*.eu.example.com"],
            "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10},
                {"name": "v3", "weight": 5, "serving": false}],
            "rules": [
                {"name": "gone", "versions": [{"name": "v3"}]},
                {"name": "beta", "versions": [{"name": "v2"}], "matches": [
                    {"headers": [{"name": "x-beta", "value": "1"}], "path": {"value": "/cart"}},
                    {"cookies": [{"name": "canary", "type": "Prefix", "value": "al"}], "method": "GET"},
                ]},
                {"matches": [{"queryParams": [{"name": "v", "type": "Present"}]}],
                    "versions": [{"name": "v1", "weight": 1}, {"name": "v2", "weight": 999_999}]},
            ],
        }]}))
    }

    fn request(host: &str, path: &str, headers: &[(&str, &str)]) -> Request {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Request { host: host.to_owned(), method: "GET".to_owned(), path: path.to_owned(), headers }
    }

    fn told(host: &str, path: &str, headers: &[(&str, &str)]) -> String {
        explain(&shop(), &request(host, path, headers)).to_string()
    }

    #[test]
    fn a_users_session_is_told_as_far_as_it_is_known() {
        let shop = |secret: Option<&str>| {
            policy(json!({"revision": 1, "services": [{
                "name": "checkout",
                "versions": [{"name": "v1", "weight": 50}, {"name": "v2", "weight": 50}],
                "session": {"type": "Header", "name": "x-user", "secret": secret},
                "mirror": {"version": "v2", "percent": 5},
            }]}))
        };
        let explain = |secret, headers| explain(&shop(secret), &request("a", "/", headers));
        let known = explain(Some("s"), &[("x-user", "42")]);
        let version = known.version.unwrap();
        let by = "by the user's header x-user; for others, v1 50 %, v2 50 % by the service's weights";
        assert_eq!(known.reason, format!("{version} {by}"));
        assert_eq!(
            known.notes,
            ["5 % of such requests are also sent to v2, if their method is GET, HEAD, OPTIONS, TRACE"]
        );
        let unknown = explain(None, &[("x-user", "42")]);
        assert_eq!(unknown.version, None);
        assert!(unknown.notes[0].starts_with("this user always gets the same of them"), "{:?}", unknown.notes);
        let nobody = explain(Some("s"), &[]);
        assert!(nobody.notes[0].starts_with("users with a header x-user stay"), "{:?}", nobody.notes);
    }

    #[test]
    fn a_rule_that_takes_the_request_is_named() {
        assert_eq!(
            told("a.eu.example.com:443", "/cart/1", &[("X-Beta", "1"), ("X-Tideshift-Version", "v1")]),
            "\
request: GET a.eu.example.com:443/cart/1
service: checkout (hostname *.eu.example.com)
  rules[0] (gone): matches, but none of its versions is in service; passed over
  rules[1] (beta): takes it
  rules[2]: not reached
note: the client's header x-tideshift-version is removed first; it decides nothing
version: v2 by rules[1] (beta)
"
        );
    }

    #[test]
    fn rules_that_do_not_match_say_why_and_weights_are_shares() {
        assert_eq!(
            told("checkout.example.com", "/cartoon", &[("x-beta", "1"), ("cookie", "a=1; canary=no")]),
            "\
request: GET checkout.example.com/cartoon
service: checkout (hostname checkout.example.com)
  rules[0] (gone): matches, but none of its versions is in service; passed over
  rules[1] (beta): no match: path is \"/cartoon\", wanted is \"/cart\" or a path below it; nor: cookie canary is \
             \"no\", wanted is a value that starts with \"al\"
  rules[2]: no match: query parameter v is not there, wanted is any value
note: v3 is out of service, so it gets nothing
version: v1 90 %, v2 10 % by the service's weights, as no rule takes it
"
        );
    }

    #[test]
    fn the_smallest_share_is_not_nothing_and_the_largest_not_all() {
        assert!(told("a.example.com", "/?v", &[]).ends_with("version: v1 <0.01 %, v2 >99.99 % by rules[2]\n"));
    }

    #[test]
    fn a_host_of_no_service_is_left_alone() {
        assert_eq!(
            told("example.com", "/", &[]),
            "request: GET example.com/\nanswer: no service has the host example.com (checkout: \
             checkout.example.com, *.example.com, *.eu.example.com): the request is left alone\n"
        );
    }

    #[test]
    fn nobody_in_service_is_said() {
        let policy =
            policy(json!({"revision": 1, "services": [{"name": "s", "versions": [{"name": "v1", "weight": 0}]}]}));
        let explanation = explain(&policy, &request("localhost", "/", &[]));
        assert_eq!((explanation.version, explanation.versions.len()), (None, 0));
        assert!(explanation.reason.starts_with("no version is in service"));
    }

    #[test]
    fn programs_get_the_same_facts() {
        let explanation = explain(&shop(), &request("checkout.example.com", "/?v=1", &[]));
        let told = serde_json::to_value(explanation).unwrap();
        assert_eq!(told["rule"], json!({"index": 2, "name": null}));
        assert_eq!(told["version"], Value::Null);
        assert_eq!(told["versions"][1], json!({"name": "v2", "weight": 999_999, "share": 0.999_999}));
        assert_eq!(told["rules"][0]["verdict"], "nobodyInService");
        assert_eq!(told["rules"][1]["whyNot"].as_array().map(Vec::len), Some(2));
    }

    proptest! {
        /// Whatever is asked, the telling and the plan agree, and the shares are all there is.
        #[test]
        fn the_telling_agrees_with_the_decision(
            host in "(checkout|a|a\\.eu)\\.example\\.com(:80)?|.{0,5}",
            path in "/(cart)?(/1)?(\\?v=1)?",
            beta in "[01]",
            canary in "(always|no)",
        ) {
            let policy = shop();
            let cookie = format!("canary={canary}");
            let request = request(&host, &path, &[("x-beta", &beta), ("cookie", &cookie)]);
            let explanation = explain(&policy, &request);
            let taken = explanation.rules.iter().filter(|rule| rule.verdict == RuleVerdict::Taken);
            let taken: Vec<_> = taken.map(|rule| rule.rule.clone()).collect();
            prop_assert_eq!(taken, explanation.rule.clone().into_iter().collect::<Vec<_>>());
            for rule in &explanation.rules {
                let decides_at = explanation.rule.as_ref().map_or(usize::MAX, |rule| rule.index);
                prop_assert_eq!(rule.verdict == RuleVerdict::NotReached, rule.rule.index > decides_at);
                prop_assert_eq!(rule.verdict == RuleVerdict::NoMatch, !rule.why_not.is_empty());
            }
            let shares: f64 = explanation.versions.iter().map(|share| share.share).sum();
            prop_assert!(explanation.service.is_none() || (shares - 1.0).abs() < 1e-9);
        }
    }
}
