//! The TrafficShift: the document that describes the desired traffic of a service. The same format works with
//! `tideshift serve -f` and as a Kubernetes resource.

mod discovery;
pub mod fields;
#[cfg(feature = "schema")]
pub mod json_schema;
pub mod probe;
mod strategy;
mod warm_up;
mod webhook;

pub use crate::limits::PHASES;
pub use crate::secret_ref::SecretKeyRef;
pub use discovery::{Discovery, LabelOperator, LabelRequirement, LabelSelector, PortRef, WorkloadRef};
pub use strategy::{IntOrPercent, Step, Strategy};
pub use warm_up::{WarmUp, WarmUpRequests};
pub use webhook::{HookSecret, HookUrl, NotificationFormat, Webhook, WebhookKind, is_webhook_url};

use crate::decode::{Decoder, Errors, Fields};
use crate::guard::GuardPolicy;
use crate::limits::LONGEST_ROUTE_TIMEOUT;
use crate::name;
use crate::outcome::ErrorCodes;
use crate::protocol::policy;
use crate::protocol::policy::{Mirror, Rule, VersionNames};
#[cfg(feature = "schema")]
use crate::schema;
use crate::session::Session;
use crate::shift::fields::seconds;
use crate::shift::probe::Probe;
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
    #[cfg_attr(feature = "schema", schemars(flatten, with = "described::Services"))]
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
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<webhook::described::Webhook>>"))]
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
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = crate::limits::MAX_VERSIONS)))]
    pub versions: Vec<ShiftVersion>,
    /// Rules for requests with a split of their own; the first matching rule applies.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<Rule>>"))]
    pub rules: Vec<Rule>,
    /// Sticky sessions: how users stay on one version. Default: each request is independent.
    #[cfg_attr(feature = "schema", schemars(with = "Option<crate::session::described::Session>"))]
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

/// What readers take apart here, as a JSON Schema.
#[cfg(feature = "schema")]
mod described {
    use super::ShiftService;
    use schemars::{JsonSchema, Schema, SchemaGenerator};
    use serde_json::{Value, json};
    use std::borrow::Cow;

    /// A spec describes one service with the document's name, or has a list of services.
    pub(crate) struct Services;

    impl JsonSchema for Services {
        fn inline_schema() -> bool {
            true
        }

        fn schema_name() -> Cow<'static, str> {
            "Services".into()
        }

        fn json_schema(generator: &mut SchemaGenerator) -> Schema {
            let mut schema = ShiftService::json_schema(generator);
            schema.remove("required");
            if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
                fields.remove("name");
                let services = json!({
                    "description": "Services that move together. Replaces the per-service fields of the spec: hostnames, versions, \
                                    rules, session, errors, mirror, guard, capacity and timeoutSeconds. All services have the \
                                    same versions.",
                    "type": "array",
                    "minItems": 1,
                    "items": generator.subschema_for::<ShiftService>(),
                });
                fields.insert("services".to_owned(), services);
            }
            schema
        }
    }
}
