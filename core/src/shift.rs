//! The TrafficShift: the document that describes the desired traffic of a service. The same format works with
//! `tideshift serve -f` and as a Kubernetes resource.

mod place;
mod secret_ref;
mod strategy;
mod warm_up;
mod webhook;

pub use place::{Discovery, LabelOperator, LabelRequirement, LabelSelector, PortRef, WorkloadRef};
pub use secret_ref::SecretKeyRef;
pub use strategy::{Quantity, Step, Strategy};
pub use warm_up::{WarmUp, WarmUpRequests};
pub use webhook::{HookSecret, HookUrl, NotificationFormat, PHASES, Webhook, WebhookKind, is_webhook_url};

use crate::decode::{Decoder, Errors, Fields};
use crate::guard::GuardPolicy;
use crate::name;
use crate::outcome::ErrorCodes;
use crate::policy::{self, Mirror, Rule, VersionNames};
#[cfg(feature = "schema")]
use crate::schema;
use crate::session::Session;
use crate::verdict::Settings;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// The `apiVersion` that this build reads.
pub const API_VERSION: &str = "tideshift.dev/v1alpha1";
/// The `kind` that this build reads.
pub const KIND: &str = "TrafficShift";

/// The desired traffic of one service, or of several services that move together.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "schema",
    derive(schemars::JsonSchema),
    schemars(rename_all = "camelCase", deny_unknown_fields, rename = "TrafficShiftSpec")
)]
pub struct TrafficShift {
    /// The name of the rollout, from `metadata.name`.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub name: String,
    /// The namespace, from `metadata.namespace`.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub namespace: Option<String>,
    /// At least one service. A document without `services` describes one service with the document's name. All services
    /// have the same versions.
    #[cfg_attr(feature = "schema", schemars(flatten, with = "schema::Services"))]
    pub services: Vec<ShiftService>,
    /// The version that serves now, and to which a rollout rolls back.
    #[cfg_attr(feature = "schema", schemars(with = "schema::VersionName"))]
    pub stable: String,
    /// The version to move to. There is no rollout if it is absent or equal to stable.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::VersionName>"))]
    pub target: Option<String>,
    /// How traffic moves from stable to target.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Strategy>"))]
    pub strategy: Strategy,
    /// How the rollout analyses the target.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Settings>"))]
    pub analysis: Settings,
    /// How long a version may take to finish its requests in flight after its last traffic; default 300 s.
    #[cfg_attr(feature = "schema", schemars(rename = "drain", with = "Option<schema::Drain>"))]
    pub drain_timeout: Duration,
    /// What becomes of its traffic when the document is deleted.
    #[cfg_attr(feature = "schema", schemars(with = "Option<OnDelete>", extend("default" = "Keep")))]
    pub on_delete: OnDelete,
    /// Gates that approve steps, and receivers of notifications.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::Webhook>>"))]
    pub webhooks: Vec<Webhook>,
}

/// What becomes of the traffic of a document that is deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum OnDelete {
    /// Its last weights stay in force until another document claims its services or hostnames, or they are given up.
    #[default]
    Keep,
    /// Its weights stay in force until its drain deadline; then its traffic goes to Envoy's default route, if the version
    /// that the document calls stable, which that route leads to, has a ready endpoint.
    Drain,
}

/// One service of a shift.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct ShiftService {
    /// The name of the service in policies, metrics and the status.
    #[cfg_attr(feature = "schema", schemars(with = "schema::Name"))]
    pub name: String,
    /// The hostnames that clients call: exact, or `*.suffix`. Default: every host.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::Hostname>>"))]
    pub hostnames: Vec<String>,
    /// The versions, at least one.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = policy::MAX_VERSIONS)))]
    pub versions: Vec<ShiftVersion>,
    /// Rules for requests with a split of their own; the first matching rule applies.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<Rule>>"))]
    pub rules: Vec<Rule>,
    /// Sticky sessions: how users stay on one version. Default: each request is independent.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Session>"))]
    pub session: Option<Session>,
    /// Where the session's secret is, if it is not in the document.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub session_secret: Option<SecretKeyRef>,
    /// What is the versions' fault.
    #[cfg_attr(feature = "schema", schemars(with = "Option<ErrorCodes>"))]
    pub errors: ErrorCodes,
    /// Mirroring: which requests without a matching rule are also copied to another version.
    pub mirror: Option<Mirror>,
    /// Outlier ejection: each proxy's own fast veto on a failing version.
    #[cfg_attr(feature = "schema", schemars(with = "Option<GuardPolicy>"))]
    pub guard: GuardPolicy,
    /// The number of endpoints that carry the full load. Default: the number that the stable version has when a rollout
    /// starts.
    #[cfg_attr(feature = "schema", schemars(rename = "capacity", with = "Option<schema::Capacity>"))]
    pub endpoints_for_full_load: Option<u32>,
    /// The request timeout of the routes that `tideshift render` prints, from the end of the request to the end of the
    /// response; 0 disables it, for streams and long polls. Default: 15 s for Envoy, otherwise the gateway's default.
    #[cfg_attr(feature = "schema", schemars(rename = "timeoutSeconds", with = "Option<schema::RouteTimeout>"))]
    pub timeout: Option<Duration>,
}

/// One version and where it runs.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct ShiftVersion {
    /// The name of the version.
    #[cfg_attr(feature = "schema", schemars(with = "schema::VersionName"))]
    pub name: String,
    /// The endpoints outside Kubernetes, as `host:port`. Without endpoints the version cannot receive traffic yet.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::EndpointText>>"))]
    pub endpoints: Vec<Endpoint>,
    /// How to find the endpoints in Kubernetes; excludes `endpoints`.
    #[cfg_attr(feature = "schema", schemars(flatten, with = "Discovery"))]
    pub discovery: Option<Discovery>,
    /// In Kubernetes: the name of the cluster that the version runs in. Default: the controller's cluster.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::VersionName>"))]
    pub cluster: Option<String>,
    /// The Kubernetes workload that runs the version, if the rollout should scale it.
    #[cfg_attr(feature = "schema", schemars(rename = "workloadRef"))]
    pub workload: Option<WorkloadRef>,
    /// The desired number of endpoints, if a source other than their list defines it: in Kubernetes the workload. Never
    /// part of a document.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub replicas: Option<u32>,
    /// Until when, in milliseconds since 1970, it may go on serving although its document no longer has it. Never in a
    /// document.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub leaving_until: Option<u64>,
    /// How to tell that an endpoint can take traffic; none: it can as soon as it is listed, or Kubernetes says so.
    pub readiness_probe: Option<Probe>,
}

/// A host (a name or an address) and a port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// A host name or an address, IPv6 without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

/// A readiness probe with Kubernetes' fields and defaults.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct Probe {
    /// The action.
    #[cfg_attr(feature = "schema", schemars(flatten, with = "schema::Check"))]
    pub check: Check,
    /// The time from an endpoint's first appearance to its first probe; default 0.
    #[cfg_attr(feature = "schema", schemars(rename = "initialDelaySeconds", with = "Option<schema::Seconds>", extend("default" = 0)))]
    pub initial_delay: Duration,
    /// The time between probes; default 10 s.
    #[cfg_attr(feature = "schema", schemars(flatten, with = "schema::Period"))]
    pub period: Duration,
    /// The timeout of a probe; default 1 s.
    #[cfg_attr(feature = "schema", schemars(rename = "timeoutSeconds", with = "Option<schema::AtLeastOneSecond>", extend("default" = 1)))]
    pub timeout: Duration,
    /// The number of consecutive successes that make an endpoint ready; default 1.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Times>", extend("default" = 1)))]
    pub success_threshold: u32,
    /// The number of consecutive failures that make an endpoint not ready; default 3.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Times>", extend("default" = 3)))]
    pub failure_threshold: u32,
}

/// The action of a probe.
#[derive(Debug, Clone, PartialEq)]
pub enum Check {
    /// An HTTP GET request; statuses 200 to 399 are successes.
    HttpGet(HttpGet),
    /// A TCP connection; success if it opens.
    TcpSocket {
        /// Replaces the endpoint's host.
        host: Option<String>,
        /// Replaces the endpoint's port.
        port: Option<u16>,
    },
    /// A command that the controller runs with `TIDESHIFT_ENDPOINT`, `TIDESHIFT_SERVICE` and `TIDESHIFT_VERSION` in its
    /// environment; exit code 0 is success.
    Exec {
        /// The program and its arguments; they do not run in a shell.
        command: Vec<String>,
    },
    /// A call of `grpc.health.v1.Health/Check` without TLS; the response `SERVING` is success.
    Grpc {
        /// Replaces the endpoint's port.
        port: Option<u16>,
        /// The service to check; default empty, which means the whole server.
        service: String,
    },
}

/// The request of an `httpGet` probe.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct HttpGet {
    /// Path and query; default `/`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Path>", extend("default" = "/")))]
    pub path: String,
    /// Replaces the endpoint's host.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Host>"))]
    pub host: Option<String>,
    /// Replaces the endpoint's port.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Port>"))]
    pub port: Option<u16>,
    /// HTTP, or HTTPS without certificate verification, as in Kubernetes; default HTTP.
    #[cfg_attr(feature = "schema", schemars(rename = "scheme", with = "Option<schema::Scheme>", extend("default" = "HTTP")))]
    pub https: bool,
    /// Additional headers.
    #[cfg_attr(feature = "schema", schemars(rename = "httpHeaders", with = "Option<Vec<schema::HttpHeader>>"))]
    pub headers: Vec<(String, String)>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// The default drain deadline.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// The maximum timeout of a route: one day, in seconds.
pub(crate) const LONGEST_ROUTE_TIMEOUT: u64 = 24 * 3600;
/// The maximum duration in a document: one year, in seconds.
pub(crate) const LONGEST_SECONDS: u64 = 365 * 24 * 3600;

impl TrafficShift {
    /// Reads a document from a JSON value and returns every error at once. Ignores fields that Kubernetes adds, such as
    /// `status`.
    pub fn read(value: &Value) -> Result<Self, Errors> {
        Decoder::read(value, |d, value| {
            let mut f = d.object(value)?;
            let only = |text: &'static str| {
                move |d: &mut Decoder, value: &Value| d.text_where(value, text, |given| given == text).map(|_| ())
            };
            f.required(d, "apiVersion", API_VERSION, only(API_VERSION));
            f.required(d, "kind", KIND, only(KIND));
            let (name, namespace) = f.required(d, "metadata", "an object with a name", metadata).unwrap_or_default();
            let shift = f.required(d, "spec", "an object", |d, spec| Self::read_spec(d, spec, name.as_ref()));
            let shift = shift.map(|shift| Self { namespace, ..shift });
            f.optional(d, "status", |_, _| Some(()));
            f.finish(d);
            shift
        })
    }

    fn read_spec(d: &mut Decoder, spec: &Value, name: Option<&String>) -> Option<Self> {
        let mut f = d.object(spec)?;
        let several = f.has("services");
        // The per-service fields are either in the spec or in `services`.
        let own = match several {
            false => ShiftService::read_fields(d, &mut f, spec, name.cloned()).map(|service| vec![service]),
            true => f.optional(d, "services", services),
        };
        let known = match several {
            true => spec
                .get("services")
                .and_then(|services| services.get(0))
                .map_or(VersionNames::of(spec), VersionNames::of),
            false => VersionNames::of(spec),
        };
        let stable = f.required(d, "stable", "a version's name", |d, v| known.read(d, v));
        let target = f.optional(d, "target", |d, v| known.read(d, v));
        let strategy = f.optional(d, "strategy", Strategy::read).unwrap_or_default();
        let analysis = f.optional(d, "analysis", Settings::read).unwrap_or_default();
        let drain_timeout = f.optional(d, "drain", drain).unwrap_or(DRAIN_TIMEOUT);
        let on_delete = f.optional(d, "onDelete", on_delete).unwrap_or_default();
        let webhooks = f.optional(d, "webhooks", webhook::webhooks).unwrap_or_default();
        f.finish(d);
        let (name, services, stable) = (name.cloned()?, own?, stable?);
        let namespace = None;
        Some(Self { name, namespace, services, stable, target, strategy, analysis, drain_timeout, on_delete, webhooks })
    }

    /// The same document for a cluster, where names are unique within a namespace: the rollout and its services get the
    /// name `NAME.NAMESPACE`.
    pub fn qualified(mut self) -> Self {
        if let Some(namespace) = &self.namespace {
            let qualified = |name: &str| format!("{name}.{namespace}");
            self.name = qualified(&self.name);
            for service in &mut self.services {
                service.name = qualified(&service.name);
            }
        }
        self
    }

    /// The gates that must approve before the step of this index begins.
    pub fn gates_of(&self, step: usize) -> impl Iterator<Item = &Webhook> {
        self.webhooks.iter().filter(move |webhook| webhook.is_gate_of(step.saturating_add(1)))
    }

    /// The service with this name.
    pub fn service(&self, name: &str) -> Option<&ShiftService> {
        self.services.iter().find(|service| service.name == name)
    }

    /// The names of the versions, which are the same for all services.
    pub fn versions(&self) -> impl Iterator<Item = &str> {
        self.services.iter().take(1).flat_map(|service| &service.versions).map(|version| version.name.as_str())
    }

    /// Whether there is a version of this name, in the document or leaving it.
    pub fn has(&self, version: &str) -> bool {
        self.versions().any(|name| name == version)
    }

    /// Whether the document itself has a version of this name.
    pub fn declares(&self, version: &str) -> bool {
        self.has(version) && self.leaving_until(version).is_none()
    }

    /// Until when a version may go on serving that has left the document, in milliseconds since 1970; none: it has not.
    pub fn leaving_until(&self, version: &str) -> Option<u64> {
        self.services.first()?.version(version)?.leaving_until
    }

    /// The versions that have left the document and go on serving.
    pub fn leaving(&self) -> impl Iterator<Item = &str> {
        self.versions().filter(|version| self.leaving_until(version).is_some())
    }
}

impl ShiftService {
    /// Reads the per-service fields from `value`, the object of `f`.
    fn read_fields(d: &mut Decoder, f: &mut Fields<'_>, value: &Value, name: Option<String>) -> Option<Self> {
        let hostnames = f.optional(d, "hostnames", policy::hostnames).unwrap_or_default();
        let versions = f.required(d, "versions", "a list of versions", |d, v| {
            let versions = d.list(v, ShiftVersion::read)?;
            policy::check_versions(d, v, versions.iter().map(|(i, version)| (*i, version.name.as_str())));
            Some(versions.into_iter().map(|(_, version)| version).collect::<Vec<_>>())
        });
        let known = VersionNames::of(value);
        let rules = f.optional(d, "rules", |d, v| policy::rules(d, v, &known)).unwrap_or_default();
        let errors = f.optional(d, "errors", ErrorCodes::read).unwrap_or_default();
        let endpoints_for_full_load = f.optional(d, "capacity", capacity).flatten();
        let session = f.optional(d, "session", Session::read_in_document);
        let (session, session_secret) = session.map_or((None, None), |(session, secret)| (Some(session), secret));
        let mirror = f.optional(d, "mirror", |d, v| Mirror::read(d, v, &known));
        let guard = f.optional(d, "guard", GuardPolicy::read).unwrap_or_default();
        let timeout = f.optional(d, "timeoutSeconds", |d, v| d.integer(v, 0, LONGEST_ROUTE_TIMEOUT));
        let timeout = timeout.map(Duration::from_secs);
        let (name, versions) = (name?, versions?);
        Some(Self {
            name,
            hostnames,
            versions,
            rules,
            session,
            session_secret,
            errors,
            mirror,
            guard,
            endpoints_for_full_load,
            timeout,
        })
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a name", name::service);
        let service = Self::read_fields(d, &mut f, value, name);
        f.finish(d);
        service
    }

    /// The version with this name.
    pub fn version(&self, name: &str) -> Option<&ShiftVersion> {
        self.versions.iter().find(|version| version.name == name)
    }
}

/// Reads services that move together: unique names, the same versions.
fn services(d: &mut Decoder, value: &Value) -> Option<Vec<ShiftService>> {
    if value.as_array().is_some_and(Vec::is_empty) {
        d.invalid(value, "at least one service (or none: the document's own versions)");
    }
    let services = d.list(value, ShiftService::read)?;
    let names = |service: &ShiftService| service.versions.iter().map(|v| v.name.clone()).collect::<BTreeSet<_>>();
    for (n, (i, service)) in services.iter().enumerate() {
        let earlier = services.iter().take(n).map(|(_, earlier)| earlier);
        if earlier.clone().any(|earlier| earlier.name == service.name) {
            let allowed = "a name that no service before has";
            d.at(*i, |d| d.within("name", |d| d.invalid(&Value::from(service.name.clone()), allowed)));
        }
        if let Some(first) = earlier.map(names).next().filter(|first| *first != names(service)) {
            let of = |names: BTreeSet<String>| Value::from(names.into_iter().collect::<Vec<_>>());
            let (own, first) = (of(names(service)), of(first));
            let allowed = format!("the versions of the first service, {first}, since all move together");
            d.at(*i, |d| d.within("versions", |d| d.invalid(&own, allowed)));
        }
    }
    Some(services.into_iter().map(|(_, service)| service).collect())
}

fn drain(d: &mut Decoder, value: &Value) -> Option<Duration> {
    let mut f = d.object(value)?;
    let timeout = seconds(&mut f, d, "timeoutSeconds", 0, DRAIN_TIMEOUT.as_secs());
    f.finish(d);
    Some(timeout)
}

fn on_delete(d: &mut Decoder, value: &Value) -> Option<OnDelete> {
    let text = d.text_where(value, "Keep or Drain", |text| matches!(text, "Keep" | "Drain"))?;
    Some(if text == "Drain" { OnDelete::Drain } else { OnDelete::Keep })
}

/// What Kubernetes itself writes into `metadata`, as `kubectl get -o yaml` shows it; nothing to us.
const OF_KUBERNETES: [&str; 9] = [
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "finalizers",
    "ownerReferences",
    "managedFields",
];

/// The name and the namespace.
fn metadata(d: &mut Decoder, value: &Value) -> Option<(Option<String>, Option<String>)> {
    let mut f = d.object(value)?;
    let name = f.required(d, "name", "a name", name::service);
    let namespace = f.optional(d, "namespace", name::service);
    for tags in ["labels", "annotations"] {
        f.optional(d, tags, |d, value| {
            let strings = |map: &Map<String, Value>| map.values().all(Value::is_string);
            if !value.as_object().is_some_and(strings) {
                d.invalid(value, "an object of strings");
            }
            Some(())
        });
    }
    for field in OF_KUBERNETES {
        f.optional(d, field, |_, _| Some(()));
    }
    f.finish(d);
    Some((name, namespace))
}

fn capacity(d: &mut Decoder, value: &Value) -> Option<Option<u32>> {
    let mut f = d.object(value)?;
    let endpoints = f.optional(d, "endpointsForFullLoad", |d, v| d.integer(v, 1, 1_000_000));
    f.finish(d);
    Some(endpoints.map(|endpoints| endpoints as u32))
}

impl ShiftVersion {
    /// The desired number of endpoints.
    pub fn desired(&self) -> u32 {
        self.replicas.unwrap_or(self.endpoints.len() as u32)
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a name", name::version);
        let endpoints = f.optional(d, "endpoints", |d, value| {
            let endpoints = d.list(value, Endpoint::read)?;
            for (n, (i, endpoint)) in endpoints.iter().enumerate() {
                if endpoints.iter().take(n).any(|(_, earlier)| earlier == endpoint) {
                    d.at(*i, |d| {
                        d.invalid(&Value::String(endpoint.to_string()), "an endpoint that is not listed before")
                    });
                }
            }
            Some(endpoints.into_iter().map(|(_, endpoint)| endpoint).collect())
        });
        let readiness_probe = f.optional(d, "readinessProbe", Probe::read);
        let service = f.optional(d, "service", name::service);
        let selector = f.optional(d, "selector", LabelSelector::read);
        let port = f.optional(d, "port", PortRef::read);
        let cluster = f.optional(d, "cluster", name::version);
        let workload = f.optional(d, "workloadRef", WorkloadRef::read);
        let in_kubernetes = f.has("service") || f.has("selector");
        if in_kubernetes && f.has("endpoints") {
            d.invalid(value, "either endpoints or, in Kubernetes, service and selector");
        }
        for needs in ["port", "cluster"] {
            if f.has(needs) && !in_kubernetes && !(needs == "cluster" && f.has("workloadRef")) {
                d.invalid(value, format!("service or selector beside {needs}"));
            }
        }
        f.finish(d);
        let discovery = in_kubernetes.then_some(Discovery { service, selector, port });
        let endpoints = endpoints.unwrap_or_default();
        Some(Self {
            name: name?,
            endpoints,
            discovery,
            cluster,
            workload,
            replicas: None,
            leaving_until: None,
            readiness_probe,
        })
    }
}

impl Endpoint {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let parsed = value.as_str().and_then(Self::parse);
        if parsed.is_none() {
            let hint = match value.as_str() {
                Some(text) if text.contains("://") => "; an endpoint is no URL: leave out the scheme and the path",
                _ => "",
            };
            d.invalid(value, format!("host:port, such as 127.0.0.1:9001, [::1]:9001 or payments.internal:8080{hint}"));
        }
        parsed
    }

    /// Reads `host:port`, with an IPv6 address in brackets.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => address.parse::<Ipv6Addr>().ok()?.to_string(),
            None if host.parse::<Ipv4Addr>().is_ok() => host.to_owned(),
            // A name whose last label is a number is a malformed address.
            None if name::is_subdomain(&host.to_ascii_lowercase(), 253) => {
                let last = host.rsplit('.').next().unwrap_or_default();
                (!last.bytes().all(|b| b.is_ascii_digit())).then(|| host.to_ascii_lowercase())?
            }
            None => return None,
        };
        Some(Self { host, port })
    }
}

impl Probe {
    /// How often a proxy checks an endpoint that is not ready: the period, at most 1 s. A proxy detects readiness at most
    /// this long after the controller.
    pub fn comeback_period(&self) -> Duration {
        self.period.min(Duration::from_secs(1))
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let http = f.optional(d, "httpGet", HttpGet::read).map(Check::HttpGet);
        let tcp = f.optional(d, "tcpSocket", tcp_socket);
        let exec = f.optional(d, "exec", |d, value| {
            let mut f = d.object(value)?;
            let command = f.required(d, "command", "a list: the program and its arguments", |d, value| {
                let command = d.list(value, Decoder::text)?;
                if value.as_array().is_some_and(Vec::is_empty) {
                    d.invalid(value, "a list that is not empty: the program and its arguments");
                }
                Some(command.into_iter().map(|(_, word)| word).collect())
            });
            f.finish(d);
            Some(Check::Exec { command: command? })
        });
        let grpc = f.optional(d, "grpc", |d, value| {
            let mut f = d.object(value)?;
            let (port, service) = (f.optional(d, "port", port), f.optional(d, "service", Decoder::text));
            f.finish(d);
            Some(Check::Grpc { port, service: service.unwrap_or_default() })
        });
        let handlers = ["httpGet", "tcpSocket", "exec", "grpc"].iter().filter(|name| f.has(name)).count();
        if handlers != 1 {
            d.invalid(value, "exactly one of httpGet, tcpSocket, exec, grpc");
        }
        let initial_delay = seconds(&mut f, d, "initialDelaySeconds", 0, 0);
        let period = period(&mut f, d, value);
        let timeout = seconds(&mut f, d, "timeoutSeconds", 1, 1);
        let mut threshold = |name, default| {
            f.optional(d, name, |d, v| d.integer(v, 1, 1_000_000)).map_or(default, |times| times as u32)
        };
        let (success_threshold, failure_threshold) =
            (threshold("successThreshold", 1), threshold("failureThreshold", 3));
        f.finish(d);
        let check = http.or(tcp).or(exec).or(grpc)?;
        Some(Self { check, initial_delay, period, timeout, success_threshold, failure_threshold })
    }
}

fn period(f: &mut Fields<'_>, d: &mut Decoder, probe: &Value) -> Duration {
    let millis = f.optional(d, "periodMillis", |d, v| d.integer(v, 1, LONGEST_SECONDS * 1_000));
    if f.has("periodMillis") && f.has("periodSeconds") {
        d.invalid(probe, "either periodSeconds or periodMillis");
    }
    let seconds = seconds(f, d, "periodSeconds", 1, 10);
    millis.map_or(seconds, Duration::from_millis)
}

fn seconds(f: &mut Fields<'_>, d: &mut Decoder, name: &'static str, low: u64, default: u64) -> Duration {
    Duration::from_secs(f.optional(d, name, |d, v| d.integer(v, low, LONGEST_SECONDS)).unwrap_or(default))
}

impl HttpGet {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let path = f.optional(d, "path", path);
        let (host, port) = (f.optional(d, "host", host), f.optional(d, "port", port));
        let scheme = f.optional(d, "scheme", |d, v| crate::matching::choice(d, v, &["HTTP", "HTTPS"]));
        let headers = f.optional(d, "httpHeaders", headers);
        f.finish(d);
        Some(Self {
            path: path.unwrap_or_else(|| "/".to_owned()),
            host,
            port,
            https: scheme == Some("HTTPS"),
            headers: headers.unwrap_or_default(),
        })
    }
}

fn path(d: &mut Decoder, value: &Value) -> Option<String> {
    let fine = |path: &str| path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic());
    d.text_where(value, "a path that starts with /, without spaces", fine)
}

/// A list of `{name, value}` headers for requests that the controller sends.
fn headers(d: &mut Decoder, value: &Value) -> Option<Vec<(String, String)>> {
    let headers = d.list(value, |d, value| {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a header name", |d, v| {
            d.text_where(v, "a header name (RFC 9110 token)", name::is_token)
        });
        let value = f.required(d, "value", "a header value", |d, v| {
            let fine = |text: &str| text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
            d.text_where(v, "visible ASCII characters and spaces", fine)
        });
        f.finish(d);
        Some((name?, value?))
    })?;
    Some(headers.into_iter().map(|(_, header)| header).collect())
}

fn tcp_socket(d: &mut Decoder, value: &Value) -> Option<Check> {
    let mut f = d.object(value)?;
    let check = Check::TcpSocket { host: f.optional(d, "host", host), port: f.optional(d, "port", port) };
    f.finish(d);
    Some(check)
}

fn host(d: &mut Decoder, value: &Value) -> Option<String> {
    let fine = |host: &str| host.parse::<Ipv6Addr>().is_ok() || name::is_subdomain(&host.to_ascii_lowercase(), 253);
    d.text_where(value, "a host name or an address", fine)
}

fn port(d: &mut Decoder, value: &Value) -> Option<u16> {
    d.integer(value, 1, 65_535).map(|port| port as u16)
}
