//! The JSON Schema of a TrafficShift, generated from the types that documents are read into. Kubernetes' API server and
//! the OpenAPI document use it. This module adds what those types leave to their readers: fields that do not belong to a
//! single type, and the limits of strings and numbers. A schema cannot express rules that span fields;
//! [`TrafficShift::read`] checks those.
//!
//! The schema declares a default only if omitting the field means the same as writing it; the descriptions name the other
//! defaults.

use crate::matching;
use crate::shift::{self, LONGEST_ROUTE_TIMEOUT, LONGEST_SECONDS, NotificationFormat, ShiftService, TrafficShift};
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::marker::PhantomData;

/// The schema of a whole document; `$defs` contains its types by name.
pub fn traffic_shift() -> Schema {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let spec = generator.subschema_for::<TrafficShift>();
    let mut schema = json_schema!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "The desired traffic of one service, or of several services that move together. `tideshift validate` \
                        checks a document.",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"type": "string", "const": shift::API_VERSION},
            "kind": {"type": "string", "const": shift::KIND},
            "metadata": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": generator.subschema_for::<Name>(),
                    "namespace": generator.subschema_for::<Name>(),
                },
            },
            "spec": spec,
            "status": {"description": "The observed state, which the controller writes in Kubernetes; ignored when a document is read.", "type": "object"},
        },
        "additionalProperties": false,
        "$defs": generator.take_definitions(true),
    });
    RecursiveTransform(without_null).transform(&mut schema);
    schema
}

/// Null means the same as an omitted field everywhere, so the schema does not list it.
fn without_null(schema: &mut Schema) {
    if let Some(kinds) = schema.get_mut("type").and_then(Value::as_array_mut) {
        kinds.retain(|kind| kind != "null");
        if let [kind] = kinds.as_slice() {
            let kind = kind.clone();
            schema.insert("type".to_owned(), kind);
        }
    }
    if let Some(values) = schema.get_mut("enum").and_then(Value::as_array_mut) {
        values.retain(|value| !value.is_null());
    }
    let others = schema.get("anyOf").and_then(Value::as_array).map(|alternatives| {
        let other = alternatives.iter().filter(|alternative| alternative.get("type") != Some(&json!("null")));
        other.filter_map(Value::as_object).cloned().collect::<Vec<_>>()
    });
    if let Some([one]) = others.as_deref() {
        schema.remove("anyOf");
        for (keyword, value) in one {
            schema.ensure_object().entry(keyword).or_insert_with(|| value.clone());
        }
    }
}

/// Schemas of strings and numbers, for `with`.
macro_rules! schemas {
    ($($(#[doc = $doc:literal])* $name:ident = $schema:tt;)*) => {$(
        $(#[doc = $doc])*
        pub(crate) struct $name;

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    )*};
}

/// RFC 1123 subdomain.
macro_rules! subdomain {
    () => {
        "[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
    };
}

/// The same with upper-case letters, or an IPv4 address; the readers check the position of the dots.
macro_rules! host {
    () => {
        "[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?"
    };
}

/// The characters of an IPv6 address.
macro_rules! ipv6 {
    () => {
        "[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*"
    };
}

const TOKEN: &str = "^[-!#$%&'*+.^_`|~0-9A-Za-z]+$";

schemas! {
    /// [`crate::name::service`]
    Name = {"type": "string", "maxLength": 253, "pattern": concat!("^", subdomain!(), "$")};
    /// [`crate::name::version`]
    VersionName = {"type": "string", "maxLength": 63, "pattern": concat!("^", subdomain!(), "$")};
    /// [`crate::name::is_token`]
    Token = {"type": "string", "pattern": TOKEN};
    /// [`crate::name::header`], which rejects names that start with `x-tideshift-`; a pattern cannot express that.
    Header = {"type": "string", "pattern": TOKEN};
    Cookie = {"type": "string", "pattern": TOKEN};
    QueryParam = {"type": "string", "minLength": 1};
    /// [`matching::method`]
    Method = {"type": "string", "pattern": "^[-!#$%&'*+.^_`|~0-9A-Z]+$"};
    FilledText = {"type": "string", "minLength": 1};
    Secret = {"type": "string", "minLength": 1, "maxLength": 1024};
    /// [`shift::SecretKeyRef`], which does not begin with two dots; a pattern of this kind can say that.
    SecretKey = {"type": "string", "maxLength": 253, "pattern": "^(\\.?[-_A-Za-z0-9][-._A-Za-z0-9]*)$"};
    /// [`crate::hostname::read`]
    Hostname = {"type": "string", "maxLength": 255, "pattern": "^(\\*\\.)?[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?(\\.[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?)*$"};
    /// The host of a probe, which replaces the endpoint's.
    Host = {"type": "string", "maxLength": 253, "pattern": concat!("^(", host!(), "|", ipv6!(), ")$")};
    Port = {"type": "integer", "minimum": 1, "maximum": 65_535};
    /// The path of a request that the controller sends.
    Path = {"type": "string", "pattern": "^/[!-~]*$"};
    HeaderValue = {"type": "string", "pattern": "^[ -~]*$"};
    /// [`shift::Endpoint`]
    EndpointText = {
        "type": "string",
        "maxLength": 260,
        "pattern": concat!("^(", host!(), "|\\[", ipv6!(), "\\]):[1-9][0-9]{0,4}$"),
    };
    Url = {
        "type": "string",
        "maxLength": 2048,
        "pattern": concat!("^https?://(", host!(), "|\\[", ipv6!(), "\\])(:[1-9][0-9]{0,4})?([/?][!$-;=?-\\[\\]_a-z~]*)?$"),
    };
    /// Up to a year.
    Seconds = {"type": "integer", "minimum": 0, "maximum": LONGEST_SECONDS};
    AtLeastOneSecond = {"type": "integer", "minimum": 1, "maximum": LONGEST_SECONDS};
    RouteTimeout = {"type": "integer", "minimum": 0, "maximum": LONGEST_ROUTE_TIMEOUT};
    Millis = {"type": "integer", "minimum": 1, "maximum": LONGEST_SECONDS * 1_000};
    Times = {"type": "integer", "minimum": 1, "maximum": 1_000_000};
    /// From 1 to 100.
    Percent = {"type": "integer", "minimum": 1, "maximum": 100};
    /// From 0 to 100.
    Share = {"type": "integer", "minimum": 0, "maximum": 100};
    Weight = {"type": "integer", "minimum": 0, "maximum": crate::policy::MAX_WEIGHT};
    /// [`crate::outcome::status_range`]
    StatusRange = {
        "type": ["integer", "string"],
        "minimum": 100,
        "maximum": 599,
        "pattern": "^ *0*[1-5][0-9]{2} *(- *0*[1-5][0-9]{2} *)?$",
    };
    GrpcStatus = {"type": "integer", "minimum": 1, "maximum": 16};
    /// [`shift::Quantity`]
    QuantityText = {
        "type": ["integer", "string"],
        "minimum": 0,
        "maximum": 1_000_000,
        "pattern": "^0*(1000|[0-9]{1,3})%$",
    };
    /// [`shift::Quantity`], at most 100 %
    PartText = {
        "type": ["integer", "string"],
        "minimum": 0,
        "maximum": 1_000_000,
        "pattern": "^0*(100|[0-9]{1,2})%$",
    };
    /// [`shift::PortRef`]
    NameOrPort = {
        "type": ["integer", "string"],
        "minimum": 1,
        "maximum": 65_535,
        "maxLength": 63,
        "pattern": "^([0-9][-a-z0-9]*)?[a-z]([-a-z0-9]*[a-z0-9])?$",
    };
    GroupVersion = {"type": "string", "pattern": concat!("^", subdomain!(), "(/", subdomain!(), ")?$")};
    WorkloadKind = {"type": "string", "pattern": "^[A-Z][A-Za-z0-9]*$"};
    WarmUpMethod = {"type": "string", "enum": ["GET", "HEAD"]};
    Scheme = {"type": "string", "enum": ["HTTP", "HTTPS"]};
    Phase = {"type": "string", "enum": shift::PHASES};
}

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

/// Blue/green: a preview of the target, then all traffic at once.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct BlueGreen {
    /// Whether the target gets all traffic without a manual promotion; default true.
    #[schemars(extend("default" = true))]
    auto_promotion_enabled: Option<bool>,
    /// How long the preview lasts before the target gets all traffic; default 0.
    #[schemars(with = "Option<Seconds>", extend("default" = 0))]
    auto_promotion_seconds: Option<u64>,
    /// Requests that go to the target during the preview, such as those of testers. A request needs to satisfy one match.
    preview_matches: Option<Vec<matching::Match>>,
    /// How long the target must have all traffic before the rollout succeeds; default 0.
    #[schemars(with = "Option<Seconds>", extend("default" = 0))]
    hold_seconds: Option<u64>,
}

// The shape of [`matching::NamedMatch`]; `Name` determines the allowed names and the name of the type.
/// A name and the value it must have.
#[derive(JsonSchema)]
#[schemars(rename = "{Name}Match", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct NamedMatch<Name> {
    /// The name; case-sensitive, except for header names.
    #[schemars(with = "Name")]
    name: PhantomData<Name>,
    /// How to compare the value; default Exact. RegularExpression must match the whole value; values longer than 4,096 bytes
    /// never match. Present accepts any value.
    #[schemars(rename = "type", extend("default" = "Exact"))]
    kind: Option<ValueMatchType>,
    /// The value to compare with; omit it if the type is Present. Regular expressions support neither look-around nor
    /// back-references.
    value: Option<String>,
}

#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "only its schema is used")]
enum ValueMatchType {
    Exact,
    Prefix,
    RegularExpression,
    Present,
}

/// The required path, without the query.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct PathMatch {
    /// How to compare the path; default PathPrefix, which compares path elements: `/cart` matches `/cart/1` but not
    /// `/cartoon`. RegularExpression must match the whole path; paths longer than 4,096 bytes never match.
    #[schemars(rename = "type", extend("default" = "PathPrefix"))]
    kind: Option<PathMatchType>,
    /// A path that starts with `/` and has no query, or a regular expression (without look-around and back-references).
    value: String,
}

#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "only its schema is used")]
enum PathMatchType {
    Exact,
    PathPrefix,
    RegularExpression,
}

/// Sticky sessions: how the proxies identify the users of a service.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Session {
    /// What identifies a user. Cookie: a cookie that the proxy sets. Header: a header of the request; requests without it
    /// have no session.
    #[schemars(rename = "type")]
    kind: SessionType,
    /// The name of the cookie or header.
    #[schemars(with = "Token")]
    name: String,
    /// How long browsers keep the cookie, at most 400 days; default one day. Only with type Cookie.
    #[schemars(range(min = 1, max = 34_560_000))]
    ttl_seconds: Option<u64>,
    /// Increase it to revoke all assignments of users to versions: cookies of other generations become invalid. Default 0.
    #[schemars(range(min = 0), extend("default" = 0))]
    generation: Option<u64>,
    /// The key that salts the hash and signs the cookies; identical in all proxies that serve the same users. Default: the
    /// service's name, which prevents accidents but lets attackers forge cookies.
    #[schemars(with = "Option<Secret>")]
    secret: Option<String>,
    /// Where the secret is, in place of secret: a key of a Secret of the document's namespace, labelled
    /// `tideshift.dev/use: session`; outside of Kubernetes a file of `--secrets-dir`.
    secret_ref: Option<shift::SecretKeyRef>,
}

#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "only its schema is used")]
enum SessionType {
    Cookie,
    Header,
}

/// The action of a probe; exactly one.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Check {
    /// An HTTP GET request; statuses 200 to 399 are successes.
    http_get: Option<shift::HttpGet>,
    /// A TCP connection; success if it opens.
    tcp_socket: Option<TcpSocket>,
    /// A command that the controller runs with `TIDESHIFT_ENDPOINT`, `TIDESHIFT_SERVICE` and `TIDESHIFT_VERSION` in its
    /// environment; exit code 0 is success.
    exec: Option<Exec>,
    /// A call of `grpc.health.v1.Health/Check` without TLS; the response `SERVING` is success.
    grpc: Option<Grpc>,
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
struct TcpSocket {
    /// Replaces the endpoint's host.
    #[schemars(with = "Option<Host>")]
    host: Option<String>,
    /// Replaces the endpoint's port.
    #[schemars(with = "Option<Port>")]
    port: Option<u16>,
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
struct Exec {
    /// The program and its arguments; they do not run in a shell.
    #[schemars(length(min = 1))]
    command: Vec<String>,
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
struct Grpc {
    /// Replaces the endpoint's port.
    #[schemars(with = "Option<Port>")]
    port: Option<u16>,
    /// The service to check; default empty, which means the whole server.
    #[schemars(extend("default" = ""))]
    service: Option<String>,
}

/// The interval of a probe.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Period {
    /// The time between probes; default 10.
    #[schemars(with = "Option<AtLeastOneSecond>")]
    period_seconds: Option<u64>,
    /// The time between probes in milliseconds; replaces periodSeconds.
    #[schemars(with = "Option<Millis>")]
    period_millis: Option<u64>,
}

/// A header of a request that the controller sends.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct HttpHeader {
    /// The name of the header.
    #[schemars(with = "Token")]
    name: String,
    /// The value of the header.
    #[schemars(with = "HeaderValue")]
    value: String,
}

/// How long a version may drain: finish the requests in flight.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Drain {
    /// The deadline of the drain; default 300.
    #[schemars(with = "Option<Seconds>", extend("default" = 300))]
    timeout_seconds: Option<u64>,
}

/// The capacity that the load needs.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Capacity {
    /// The number of endpoints that carry the full load. Default: the number that the stable version has when a rollout
    /// starts.
    #[schemars(with = "Option<Times>")]
    endpoints_for_full_load: Option<u32>,
}

/// An HTTP endpoint that approves steps or receives notifications.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Webhook {
    /// The name in messages; unique within the document.
    #[schemars(with = "Name")]
    name: String,
    /// Gate: must approve a step before it begins. Notification: receives transitions.
    #[schemars(rename = "type")]
    kind: WebhookType,
    /// Where to send: `http` or `https`, without user or fragment. Either this or urlSecretRef.
    #[schemars(with = "Option<Url>")]
    url: Option<String>,
    /// Where the URL is, in place of url, if it is a secret, as those of chats are: a key of a Secret of the document's
    /// namespace, labelled `tideshift.dev/use: webhook`; outside of Kubernetes a file of `--secrets-dir`.
    url_secret_ref: Option<shift::SecretKeyRef>,
    /// What requests are signed with; they are not signed where neither this nor secretRef nor secretFile is given.
    #[schemars(with = "Option<Secret>")]
    secret: Option<String>,
    /// Where the secret is, in place of secret; as urlSecretRef.
    secret_ref: Option<shift::SecretKeyRef>,
    /// A file of the controller's with the secret, in place of secret. It is read each time.
    #[schemars(with = "Option<FilledText>")]
    secret_file: Option<String>,
    /// The timeout of a request; default 10.
    #[schemars(range(min = 1, max = 300), extend("default" = 10))]
    timeout_seconds: Option<u64>,
    /// Gate only: the numbers of the steps that it guards, counted from 1. Default: every step.
    #[schemars(length(min = 1), inner(range(min = 1, max = 1_000)))]
    steps: Option<Vec<usize>>,
    /// Gate only: the time between a refusal and the next request; default 15.
    #[schemars(with = "Option<AtLeastOneSecond>")]
    period_seconds: Option<u64>,
    /// Notification only: the phases that it receives. Default: every transition.
    #[schemars(with = "Option<Vec<Phase>>", length(min = 1))]
    phases: Option<Vec<String>>,
    /// Notification only: the number of retries of a failed delivery; default 5.
    #[schemars(range(min = 0, max = 20))]
    retries: Option<u32>,
    /// Notification only: the format of the body; default Json. Json: all details as fields. Slack: `{"text": "..."}`, which
    /// Slack, Mattermost and others accept.
    format: Option<NotificationFormat>,
}

#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "only its schema is used")]
enum WebhookType {
    Gate,
    Notification,
}
