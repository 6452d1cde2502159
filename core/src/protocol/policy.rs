//! The policy: the document that the filter runs, from its plugin configuration or from the controller.

use crate::decode::{Decoder, Errors, Fields, LONG};
use crate::guard::GuardPolicy;
use crate::limits::{MAX_VERSIONS, MAX_WEIGHT};
use crate::matching::request::Request;
use crate::matching::{Match, hostname};
use crate::name::{EXPLAIN_HEADER, MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};
use crate::outcome::ErrorCodes;
#[cfg(feature = "schema")]
use crate::schema;
use crate::session::{Secret, Session};
use crate::{matching, name};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;

/// The complete configuration for routing decisions of a proxy. Valid by construction: created by [`Policy::read`], or
/// by code with the same guarantees (the controller compiles it from valid documents).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// The controller that sends newer policies and receives reports; `None`: this policy is static. Only the one in
    /// the plugin configuration has effect: a delivered policy cannot redirect the proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller: Option<ControllerRef>,
    /// The token that permits requests for explanations; `None`: explanations are disabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explain: Option<Explain>,
    /// Whether the filter removes every `x-tideshift-*` header that a client sends; default `true`. Set `false` if
    /// Envoy does that before the filter (`early_header_mutation`), which is cheaper: the filter need not read headers
    /// that nothing refers to. Only the one in the plugin configuration has effect.
    #[serde(skip_serializing_if = "is_true")]
    pub strip_client_headers: bool,
    /// Increases monotonically within one controller state (epoch).
    pub revision: u64,
    /// The services, with unique hostnames.
    pub services: Vec<Service>,
}

/// The controller as Envoy reaches it.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ControllerRef {
    /// The Envoy cluster of the controller.
    pub cluster: String,
    /// The `:authority` of the calls.
    pub authority: String,
    /// Sent as a bearer token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

impl fmt::Debug for ControllerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("ControllerRef")
            .field("cluster", &self.cluster)
            .field("authority", &self.authority)
            .field("token", &token)
            .finish()
    }
}

/// Who may request an explanation of routing decisions: clients that send the token in a header. The explanation is
/// returned in a header with the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explain {
    /// The header's name, in lower case; default `x-tideshift-explain`.
    pub header: String,
    /// The required token.
    pub token: Secret,
}

/// A service and its versions.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// The name of the service in metrics, reports and messages.
    pub name: String,
    /// Exact, or `*.suffix`; empty: every host. In lower case.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hostnames: Vec<String>,
    /// The stable version, which is the baseline for the others and which the guard never ejects; `None`: the document
    /// does not name one, and the guard may eject any version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable: Option<String>,
    /// The number of the current step of the service's rollouts: while it is not 0, versions are compared, and with
    /// sticky sessions only users who were assigned at this step.
    #[serde(skip_serializing_if = "is_zero")]
    pub step: u64,
    /// At least one.
    pub versions: Vec<Version>,
    /// In order of evaluation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// Sticky sessions; `None`: each request is independent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<Session>,
    /// Which results count as errors of the version.
    pub errors: ErrorCodes,
    /// Mirroring of requests that no rule matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
    /// The guard, which ejects a failing version in the proxy.
    #[serde(skip_serializing_if = "GuardPolicy::is_default")]
    pub guard: GuardPolicy,
}

/// A backend of a service, and its share of the requests that no rule matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// The value of `x-tideshift-version` that Envoy's routes map to a cluster.
    pub name: String,
    /// 0 to [`MAX_WEIGHT`], relative to the sum; default 1, as in Gateway API.
    pub weight: u32,
    /// Whether it may receive requests at all, including from rules.
    pub serving: bool,
    /// Its Envoy cluster, if mirroring must name it; `None`: `SERVICE_VERSION`, as in `tideshift render envoy`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
}

/// Mirroring: copies of requests go to a version, and its responses are discarded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct Mirror {
    /// One of the service's versions.
    #[cfg_attr(feature = "schema", schemars(with = "schema::VersionName"))]
    pub version: String,
    /// The percentage of the requests, 0 to 100; default 100.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Share>", extend("default" = 100)))]
    pub percent: u32,
    /// Mirror only requests with these methods. Default: GET, HEAD, OPTIONS and TRACE, because a mirrored POST could place an
    /// order twice.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::Method>>", extend("default" = Self::SAFE)))]
    pub methods: Vec<String>,
}

/// A rule for requests with a split of their own.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct Rule {
    /// A name for messages and `tideshift explain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::FilledText>"))]
    pub name: Option<String>,
    /// The matches; a request needs to satisfy one of them. Default: every request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<Match>>"))]
    pub matches: Vec<Match>,
    /// The versions and their weights; at least one.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_VERSIONS)))]
    pub versions: Vec<WeightedVersion>,
    /// Which of the rule's requests are also mirrored to another version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
}

/// A version's share in a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct WeightedVersion {
    /// One of the service's versions.
    #[cfg_attr(feature = "schema", schemars(with = "schema::VersionName"))]
    pub name: String,
    /// The weight, 0 to 1,000,000, relative to the sum; default 1, as in Gateway API.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Weight>", extend("default" = 1)))]
    pub weight: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { controller: None, explain: None, strip_client_headers: true, revision: 0, services: Vec::new() }
    }
}

impl Policy {
    /// Reads a policy from JSON text.
    pub fn from_json(json: &[u8]) -> Result<Self, Errors> {
        match serde_json::from_slice(json) {
            Ok(value) => Self::read(&value),
            Err(error) => Err(Errors::of_document(format!("not JSON: {error}"))),
        }
    }

    /// Parses a policy from a JSON value; reports all errors at once.
    pub fn read(value: &Value) -> Result<Self, Errors> {
        Decoder::read(value, |d, value| {
            let mut f = d.object(value)?;
            let head = Self::read_head(d, &mut f);
            let services = f.required(d, "services", "a list of services", services);
            f.finish(d);
            Some(Self { services: services?, ..head? })
        })
    }

    /// Parses everything but the services.
    pub(crate) fn read_head(d: &mut Decoder, f: &mut Fields<'_>) -> Option<Self> {
        let controller = f.optional(d, "controller", ControllerRef::read);
        let explain = f.optional(d, "explain", Explain::read);
        let strip_client_headers = f.optional(d, "stripClientHeaders", Decoder::boolean).unwrap_or(true);
        if let Some(explain) = explain.as_ref().filter(|e| !strip_client_headers && e.header.starts_with(OWN_HEADERS)) {
            let allowed = format!("a header without {OWN_HEADERS}, which Envoy removes if stripClientHeaders is false");
            let header = Value::String(explain.header.clone());
            d.within("explain", |d| d.within("header", |d| d.invalid(&header, allowed)));
        }
        let revision = f.required(d, "revision", LONG, Decoder::long);
        Some(Self { controller, explain, strip_client_headers, revision: revision?, services: Vec::new() })
    }

    /// Everything but the services.
    pub(crate) fn clone_head(&self) -> Self {
        let (controller, explain) = (self.controller.clone(), self.explain.clone());
        let &Self { strip_client_headers, revision, .. } = self;
        Self { controller, explain, strip_client_headers, revision, services: Vec::new() }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The shape that serde asks for.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The shape that serde asks for.
fn is_true(flag: &bool) -> bool {
    *flag
}

fn services(d: &mut Decoder, value: &Value) -> Option<Vec<Service>> {
    let services = d.list(value, Service::read)?;
    let (mut names, mut hostnames) = (Unique::of_services(), Unique::of_hostnames());
    for (i, service) in &services {
        d.at(*i, |d| {
            d.within("name", |d| names.insert(d, &service.name));
            d.within("hostnames", |d| match service.hostnames.is_empty() {
                true => hostnames.insert(d, "*"),
                false => {
                    for (k, hostname) in service.hostnames.iter().enumerate() {
                        d.at(k, |d| hostnames.insert(d, hostname));
                    }
                }
            });
        });
    }
    Some(services.into_iter().map(|(_, service)| service).collect())
}

impl ControllerRef {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let cluster = f.required(d, "cluster", "the name of an Envoy cluster", Decoder::filled_text);
        let authority = f.optional(d, "authority", Decoder::filled_text);
        let token = f.optional(d, "token", |d, v| {
            // The message never shows the value.
            let allowed = "a bearer token of visible ASCII characters";
            let fine = |token: &str| !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
            let hidden = Value::String("…".to_owned());
            if !v.as_str().is_some_and(fine) {
                d.invalid(&hidden, allowed);
            }
            v.as_str().map(str::to_owned)
        });
        f.finish(d);
        let cluster = cluster?;
        Some(Self { authority: authority.unwrap_or_else(|| cluster.clone()), cluster, token })
    }
}

impl Explain {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let header = f.optional(d, "header", |d, v| {
            let name = d.text_where(v, "a header name (RFC 9110 token)", name::is_token)?.to_ascii_lowercase();
            if name == VERSION_HEADER || name == MIRROR_HEADER {
                d.invalid(v, "a header that has no other use");
            }
            Some(name)
        });
        let token = f.required(d, "token", "a string that only those know who may ask", Secret::read);
        f.finish(d);
        Some(Self { header: header.unwrap_or_else(|| EXPLAIN_HEADER.to_owned()), token: token? })
    }
}

impl Service {
    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a name", name::service);
        let hostnames = f.optional(d, "hostnames", hostnames).unwrap_or_default();
        let versions = f.required(d, "versions", "a list of versions", |d, v| {
            let versions = d.list(v, Version::read)?;
            check_versions(d, v, versions.iter().map(|(i, version)| (*i, version.name.as_str())));
            Some(versions.into_iter().map(|(_, version)| version).collect::<Vec<_>>())
        });
        let known = VersionNames::of(value);
        let stable = f.optional(d, "stable", |d, v| known.read(d, v));
        let step = f.optional(d, "step", Decoder::long).unwrap_or_default();
        let rules = f.optional(d, "rules", |d, v| rules(d, v, &known)).unwrap_or_default();
        let errors = f.optional(d, "errors", ErrorCodes::read).unwrap_or_default();
        let session = f.optional(d, "session", Session::read);
        let mirror = f.optional(d, "mirror", |d, v| Mirror::read(d, v, &known));
        let guard = f.optional(d, "guard", GuardPolicy::read).unwrap_or_default();
        f.finish(d);
        let versions = versions?;
        Some(Self { name: name?, hostnames, stable, step, versions, rules, session, errors, mirror, guard })
    }
}

impl Version {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a name", name::version);
        let weight = weight(&mut f, d);
        let serving = f.optional(d, "serving", Decoder::boolean).unwrap_or(true);
        let cluster = f.optional(d, "cluster", cluster);
        f.finish(d);
        Some(Self { name: name?, weight, serving, cluster })
    }
}

/// Parses the name of an Envoy cluster, which must be valid in a header.
fn cluster(d: &mut Decoder, value: &Value) -> Option<String> {
    let fine = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic());
    d.text_where(value, "the name of an Envoy cluster, of visible ASCII characters", fine)
}

impl Mirror {
    /// The safe methods (RFC 9110, 9.2.1).
    const SAFE: [&str; 4] = ["GET", "HEAD", "OPTIONS", "TRACE"];

    /// Mirrors this percentage of the requests with safe methods.
    pub fn of(version: String, percent: u32) -> Self {
        Self { version, percent, methods: Self::SAFE.map(str::to_owned).to_vec() }
    }

    pub(crate) fn read(d: &mut Decoder, value: &Value, known: &VersionNames<'_>) -> Option<Self> {
        let mut f = d.object(value)?;
        let version = f.required(d, "version", "a version's name", |d, v| known.read(d, v));
        let percent = f.optional(d, "percent", |d, v| d.integer(v, 0, 100)).unwrap_or(100);
        let methods = f.optional(d, "methods", |d, v| d.list(v, matching::method));
        let methods = methods.map(|methods| methods.into_iter().map(|(_, method)| method).collect());
        f.finish(d);
        let safe = || Self::SAFE.map(str::to_owned).to_vec();
        Some(Self { version: version?, percent: percent as u32, methods: methods.unwrap_or_else(safe) })
    }
}

fn weight(f: &mut Fields<'_>, d: &mut Decoder) -> u32 {
    f.optional(d, "weight", |d, v| d.integer(v, 0, MAX_WEIGHT.into())).map_or(1, |weight| weight as u32)
}

/// Parses hostnames, which must be unique.
pub(crate) fn hostnames(d: &mut Decoder, value: &Value) -> Option<Vec<String>> {
    let read = d.list(value, hostname::read)?;
    Some(read.into_iter().map(|(_, hostname)| hostname).collect())
}

/// The rules for every list of versions: not empty, not too long, unique names.
pub(crate) fn check_versions<'a>(d: &mut Decoder, list: &Value, versions: impl Iterator<Item = (usize, &'a str)>) {
    let length = list.as_array().map_or(0, Vec::len);
    if length == 0 || length > MAX_VERSIONS {
        d.invalid(list, format!("1 to {MAX_VERSIONS} versions"));
    }
    let mut names = Unique::new("a version name that no other version here has");
    for (i, name) in versions {
        d.at(i, |d| d.within("name", |d| names.insert(d, name)));
    }
}

/// The names of the versions in a document, taken from the document itself, so that rules can refer to a version that
/// has an error of its own.
pub(crate) struct VersionNames<'v>(Vec<&'v str>);

impl<'v> VersionNames<'v> {
    /// From the list `versions` of this object.
    pub(crate) fn of(object: &'v Value) -> Self {
        let versions = object.get("versions").and_then(Value::as_array).into_iter().flatten();
        Self(versions.filter_map(|version| version.get("name")?.as_str()).collect())
    }

    /// Parses a name from this list.
    pub(crate) fn read(&self, d: &mut Decoder, value: &Value) -> Option<String> {
        let allowed = format!("one of the versions {}", self.0.join(", "));
        d.text_where(value, &allowed, |name| self.0.contains(&name))
    }
}

/// Parses rules, in order.
pub(crate) fn rules(d: &mut Decoder, value: &Value, known: &VersionNames<'_>) -> Option<Vec<Rule>> {
    let rules = d.list(value, |d, value| Rule::read(d, value, known))?;
    let mut names = Unique::new("a rule name that no other rule here has");
    for (i, rule) in &rules {
        if let Some(name) = &rule.name {
            d.at(*i, |d| d.within("name", |d| names.insert(d, name)));
        }
    }
    Some(rules.into_iter().map(|(_, rule)| rule).collect())
}

impl Rule {
    fn read(d: &mut Decoder, value: &Value, known: &VersionNames<'_>) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.optional(d, "name", Decoder::filled_text);
        let matches = f.optional(d, "matches", |d, v| d.list(v, Match::read)).unwrap_or_default();
        let versions = f.required(d, "versions", "a list of versions", |d, v| {
            let versions = d.list(v, |d, value| {
                let mut f = d.object(value)?;
                let name = f.required(d, "name", "a version's name", |d, v| known.read(d, v));
                let weight = weight(&mut f, d);
                f.finish(d);
                Some(WeightedVersion { name: name?, weight })
            })?;
            check_versions(d, v, versions.iter().map(|(i, version)| (*i, version.name.as_str())));
            Some(versions.into_iter().map(|(_, version)| version).collect())
        });
        let mirror = f.optional(d, "mirror", |d, v| Mirror::read(d, v, known));
        f.finish(d);
        let matches = matches.into_iter().map(|(_, m)| m).collect();
        Some(Self { name, matches, versions: versions?, mirror })
    }

    /// Whether the rule matches the request.
    pub fn holds(&self, request: &(impl Request + ?Sized)) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|m| m.holds(request))
    }
}

/// Names that must be unique.
pub(crate) struct Unique {
    allowed: &'static str,
    seen: BTreeSet<String>,
}

impl Unique {
    fn new(allowed: &'static str) -> Self {
        Self { allowed, seen: BTreeSet::new() }
    }

    pub(crate) fn of_services() -> Self {
        Self::new("a service name that no other service has")
    }

    pub(crate) fn of_hostnames() -> Self {
        Self::new("a hostname that no other service has")
    }

    fn insert(&mut self, d: &mut Decoder, name: &str) {
        if self.is_free(d, name) {
            self.add(name);
        }
    }

    /// Whether a name is new; records an error if it is not.
    pub(crate) fn is_free(&self, d: &mut Decoder, name: &str) -> bool {
        let is_free = !self.seen.contains(name);
        if !is_free {
            d.invalid(&Value::String(name.to_owned()), self.allowed);
        }
        is_free
    }

    pub(crate) fn add(&mut self, name: &str) {
        self.seen.insert(name.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn errors(policy: &Value) -> Vec<String> {
        Policy::read(policy).map_or_else(|errors| errors.0, |_| Vec::new()).iter().map(ToString::to_string).collect()
    }

    fn one_service(service: Value) -> Value {
        json!({"revision": 1, "services": [service]})
    }

    #[test]
    fn a_policy_needs_no_more_than_a_revision_and_services() {
        let policy = Policy::read(&one_service(json!({"name": "checkout", "versions": [{"name": "v1"}]})));
        let version = Version { name: "v1".to_owned(), weight: 1, serving: true, cluster: None };
        assert_eq!(policy.map(|policy| policy.services[0].versions.clone()), Ok(vec![version]));
    }

    #[test]
    fn revisions_of_64_bits_may_be_strings() {
        let read = |revision: Value| Policy::read(&json!({"revision": revision, "services": []})).map(|p| p.revision);
        assert_eq!(read(json!(u64::MAX)), Ok(u64::MAX));
        assert_eq!(read(json!("18446744073709551615")), Ok(u64::MAX));
        for bad in [json!("18446744073709551616"), json!(-1), json!(1.5), json!("1.0"), json!(""), json!("+1")] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_policy_is_written_as_it_is_read() {
        let value = json!({
            "controller": {"cluster": "c", "authority": "a", "token": "t"},
            "revision": 7,
            "services": [{
                "name": "checkout",
                "hostnames": ["checkout.example.com"],
                "versions": [{"name": "v1", "weight": 90, "serving": true}, {"name": "v2", "weight": 10, "serving": false}],
                "rules": [{"name": "beta", "matches": [{"method": "GET"}], "versions": [{"name": "v2", "weight": 1}]}],
                "session": {"type": "Cookie", "name": "c", "ttlSeconds": 60, "generation": 2, "secret": "s"},
                "errors": {"statusCodes": ["429", "500-599"], "grpcStatusCodes": [14]},
                "guard": {"enabled": true, "falseVetoRate": 1e-9, "coolDownSeconds": 5, "maxCoolDownSeconds": 60},
                "mirror": {"version": "v2", "percent": 10, "methods": ["GET"]},
            }],
        });
        let written = Policy::read(&value).map(|policy| serde_json::to_value(policy).ok());
        assert_eq!(written, Ok(Some(value)));
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let policy = json!({
            "revison": 1,
            "services": [
                {
                    "name": "Checkout",
                    "hostnames": ["shop.example.com:80", "*"],
                    "versions": [{"name": "v1", "weight": 1_000_001}, {"name": "v2", "serving": "yes"}, {"name": "v2"}],
                    "rules": [{"versions": [{"name": "v3"}]}, {"name": "r", "versions": []}],
                    "session": {"type": "Cookie"},
                    "mirror": {"version": "v9", "percent": 101},
                },
                {"name": "b", "versions": [{"name": "v1"}], "hostnames": ["a.example.com", "A.example.com"]},
            ],
        });
        let found = errors(&policy);
        let expected = [
            "revision: missing; expected an integer of at least 0, as a number or a string",
            "services[0].name: \"Checkout\" is not allowed",
            "services[0].hostnames[0]: \"shop.example.com:80\" is not allowed; expected a hostname without port",
            "services[0].hostnames[1]: \"*\" is not allowed",
            "services[0].versions[0].weight: 1000001 is not allowed; expected an integer from 0 to 1000000",
            "services[0].versions[1].serving: \"yes\" is not allowed; expected true or false",
            "services[0].versions[2].name: \"v2\" is not allowed; expected a version name that no other version here has",
            "services[0].rules[0].versions[0].name: \"v3\" is not allowed; expected one of the versions v1, v2, v2",
            "services[0].rules[1].versions: [] is not allowed; expected 1 to 1000 versions",
            "services[0].session.name: missing; expected a cookie's name",
            "services[0].mirror.version: \"v9\" is not allowed; expected one of the versions v1, v2, v2",
            "services[0].mirror.percent: 101 is not allowed; expected an integer from 0 to 100",
            "services[1].hostnames[1]: \"a.example.com\" is not allowed; expected a hostname that no other service has",
            "revison: unknown field; did you mean `revision`?",
        ];
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found}\nshould start with\n{expected}");
        }
        assert_eq!(found.len(), expected.len(), "{found:#?}");
    }

    #[test]
    fn only_one_service_is_for_every_host() {
        let service = |name: &str| json!({"name": name, "versions": [{"name": "v1"}]});
        let found = errors(&json!({"revision": 1, "services": [service("a"), service("b"), service("a")]}));
        assert_eq!(found.len(), 3, "{found:#?}");
        assert!(found[0].starts_with("services[1].hostnames: \"*\" is not allowed"));
        assert!(found.iter().any(|error| error.starts_with("services[2].name: \"a\"")));
    }

    #[test]
    fn who_asks_why_needs_a_header_that_arrives() {
        let policy = |header: Value, strips: bool| {
            let explain = json!({"header": header, "token": "t"});
            errors(&json!({"explain": explain, "stripClientHeaders": strips, "revision": 1, "services": []}))
        };
        assert_eq!(policy(Value::Null, true), [""; 0]);
        assert_eq!(policy(json!("X-Why"), false), [""; 0]);
        assert!(policy(Value::Null, false)[0].starts_with("explain.header: \"x-tideshift-explain\" is not allowed"));
        assert!(policy(json!("x-tideshift-version"), true)[0].starts_with("explain.header: "));
    }

    #[test]
    fn a_token_is_never_shown() {
        let policy = json!({"controller": {"cluster": "c", "token": "secret "}, "revision": 1, "services": []});
        assert!(!errors(&policy).concat().contains("secret"));
        let policy = json!({"controller": {"cluster": "c", "token": "secret"}, "revision": 1, "services": []});
        assert!(Policy::read(&policy).is_ok_and(|policy| !format!("{policy:?}").contains("secret")));
    }

    #[test]
    fn what_is_no_json_is_said_to_be_none() {
        let error = Policy::from_json(b"{\"revision\": 1,").map_or_else(|errors| errors.to_string(), |_| String::new());
        assert!(error.starts_with("not JSON: "), "{error}");
        assert!(Policy::from_json(b"\xff").is_err());
        assert!(Policy::from_json(b"").is_err());
    }
}
