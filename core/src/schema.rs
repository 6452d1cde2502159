//! What a TrafficShift looks like, as a JSON Schema: made from the types that documents are read into, for those who have
//! to know it without this code (Kubernetes' API server, the API's document). Here is what these types leave to their
//! readers: a document's fields where they are not a type's own, and what its texts and numbers may be. What spans
//! fields, a schema cannot say; [`TrafficShift::read`] has the last word.
//!
//! A default is only said where leaving the field out means the same as writing it; other defaults are in the words.

use crate::matching;
use crate::shift::{self, LONGEST_ROUTE_TIMEOUT, LONGEST_SECONDS, NotificationFormat, ShiftService, TrafficShift};
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::marker::PhantomData;

/// The schema of a whole document; its types are in `$defs`, by their names.
pub fn traffic_shift() -> Schema {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let spec = generator.subschema_for::<TrafficShift>();
    let mut schema = json_schema!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "What users want of one service's traffic, or of several that move together; `tideshift validate` says \
                        what is wrong with one.",
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
            "status": {"description": "How it stands, where Kubernetes keeps the document; not read.", "type": "object"},
        },
        "additionalProperties": false,
        "$defs": generator.take_definitions(true),
    });
    RecursiveTransform(without_null).transform(&mut schema);
    schema
}

/// Null is the same as nothing at all, everywhere, so no field needs to say so.
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

/// Schemas of texts and numbers, for `with`.
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

/// The same in letters of any case, or an IPv4 address; what dots may be between is left to the readers.
macro_rules! host {
    () => {
        "[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?"
    };
}

/// What an IPv6 address is made of.
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
    /// [`crate::name::header`], which begins with anything but `x-tideshift-`; a pattern cannot say that.
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
    /// The host of a probe, in place of the endpoint's own.
    Host = {"type": "string", "maxLength": 253, "pattern": concat!("^(", host!(), "|", ipv6!(), ")$")};
    Port = {"type": "integer", "minimum": 1, "maximum": 65_535};
    /// The path of a request of our own.
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
    /// [`shift::Quantity`], no more than everything
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

/// A spec is one service of the document's name, or has a list of services.
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
                "description": "Services that move together, in place of the fields of one service here: hostnames, versions, \
                                rules, session, errors, mirror, guard, capacity and timeoutSeconds. All have the same \
                                versions.",
                "type": "array",
                "minItems": 1,
                "items": generator.subschema_for::<ShiftService>(),
            });
            fields.insert("services".to_owned(), services);
        }
        schema
    }
}

/// A preview of the target, then everything at once.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct BlueGreen {
    /// Whether the target gets everything without being promoted by somebody; default true.
    #[schemars(extend("default" = true))]
    auto_promotion_enabled: Option<bool>,
    /// How long the target is on preview before it gets everything; default 0.
    #[schemars(with = "Option<Seconds>", extend("default" = 0))]
    auto_promotion_seconds: Option<u64>,
    /// Requests that go to the target during the preview: testers before users. Alternatives.
    preview_matches: Option<Vec<matching::Match>>,
    /// How long the target must then have had everything before the rollout has succeeded; default 0.
    #[schemars(with = "Option<Seconds>", extend("default" = 0))]
    hold_seconds: Option<u64>,
}

// The shape of [`matching::NamedMatch`]; `Name` says what names may be, and what it is called.
/// Something named, and what its value must be.
#[derive(JsonSchema)]
#[schemars(rename = "{Name}Match", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct NamedMatch<Name> {
    /// The name; letter case matters, except in headers' names.
    #[schemars(with = "Name")]
    name: PhantomData<Name>,
    /// How the value is compared; default Exact. RegularExpression: from the value's first to its last character; values
    /// longer than 4,096 bytes match none. Present: any value.
    #[schemars(rename = "type", extend("default" = "Exact"))]
    kind: Option<ValueMatchType>,
    /// What the value is compared with; left out where the type is Present. Regular expressions have neither look-around
    /// nor back-references.
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

/// What the path must be, its query left out.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct PathMatch {
    /// How the path is compared; default PathPrefix, which is by path elements: `/cart` is for `/cart/1` and not for
    /// `/cartoon`. RegularExpression: from the path's first to its last character; paths longer than 4,096 bytes match
    /// none.
    #[schemars(rename = "type", extend("default" = "PathPrefix"))]
    kind: Option<PathMatchType>,
    /// A path that starts with `/`, without query, or a regular expression (without look-around and back-references).
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

/// How the users of a service are told apart.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Session {
    /// Where a user's name is. Cookie: in a cookie that the proxy sets. Header: in a header of the request; users without
    /// it have no session.
    #[schemars(rename = "type")]
    kind: SessionType,
    /// The cookie's or header's name.
    #[schemars(with = "Token")]
    name: String,
    /// How long browsers keep the cookie, up to 400 days; default a day. Only with type Cookie.
    #[schemars(range(min = 1, max = 34_560_000))]
    ttl_seconds: Option<u64>,
    /// Raised to take back what users were given: cookies of other generations no longer hold. Default 0.
    #[schemars(range(min = 0), extend("default" = 0))]
    generation: Option<u64>,
    /// Salts the hash and signs the cookies; the same in all proxies that see the same users. Default: the service's
    /// name, which keeps accidents out but nobody who knows how cookies are made.
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

/// What a probe tries, exactly one of them.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Check {
    /// An HTTP GET; 200 to 399 is success.
    http_get: Option<shift::HttpGet>,
    /// A TCP connection that opens.
    tcp_socket: Option<TcpSocket>,
    /// A command that ends with 0, run by the controller with `TIDESHIFT_ENDPOINT`, `TIDESHIFT_SERVICE` and
    /// `TIDESHIFT_VERSION` in its environment.
    exec: Option<Exec>,
    /// A call of `grpc.health.v1.Health/Check`, without TLS, that answers `SERVING`.
    grpc: Option<Grpc>,
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
struct TcpSocket {
    /// In place of the endpoint's host.
    #[schemars(with = "Option<Host>")]
    host: Option<String>,
    /// In place of the endpoint's port.
    #[schemars(with = "Option<Port>")]
    port: Option<u16>,
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
struct Exec {
    /// The program and its arguments; no shell.
    #[schemars(length(min = 1))]
    command: Vec<String>,
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
struct Grpc {
    /// In place of the endpoint's port.
    #[schemars(with = "Option<Port>")]
    port: Option<u16>,
    /// The service that is asked for; default empty, which is the server as a whole.
    #[schemars(extend("default" = ""))]
    service: Option<String>,
}

/// How often a probe is made.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Period {
    /// From one probe to the next; default 10.
    #[schemars(with = "Option<AtLeastOneSecond>")]
    period_seconds: Option<u64>,
    /// The same in milliseconds, in place of periodSeconds.
    #[schemars(with = "Option<Millis>")]
    period_millis: Option<u64>,
}

/// A header of a request of our own.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct HttpHeader {
    /// The header's name.
    #[schemars(with = "Token")]
    name: String,
    /// Its value.
    #[schemars(with = "HeaderValue")]
    value: String,
}

/// How a version is given the time to end what it is doing.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Drain {
    /// Default 300.
    #[schemars(with = "Option<Seconds>", extend("default" = 300))]
    timeout_seconds: Option<u64>,
}

/// What the load needs.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Capacity {
    /// How many endpoints carry the whole load. Default: as many as the stable version has when a rollout starts.
    #[schemars(with = "Option<Times>")]
    endpoints_for_full_load: Option<u32>,
}

/// Somebody who is asked or told.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) struct Webhook {
    /// What messages call it; unlike that of any other webhook of the document.
    #[schemars(with = "Name")]
    name: String,
    /// Gate: must say yes before a step begins. Notification: is told of transitions.
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
    /// An answer that takes longer is none; default 10.
    #[schemars(range(min = 1, max = 300), extend("default" = 10))]
    timeout_seconds: Option<u64>,
    /// Of a Gate: the numbers of its steps, counted from 1. Default: every step.
    #[schemars(length(min = 1), inner(range(min = 1, max = 1_000)))]
    steps: Option<Vec<usize>>,
    /// Of a Gate: from a no to the next question; default 15.
    #[schemars(with = "Option<AtLeastOneSecond>")]
    period_seconds: Option<u64>,
    /// Of a Notification: the phases that it is told of. Default: every transition.
    #[schemars(with = "Option<Vec<Phase>>", length(min = 1))]
    phases: Option<Vec<String>>,
    /// Of a Notification: how often what could not be delivered is tried again; default 5.
    #[schemars(range(min = 0, max = 20))]
    retries: Option<u32>,
    /// Of a Notification: what is sent; default Json. Json: all there is to know, as fields. Slack: `{"text": "..."}`, as
    /// Slack, Mattermost and others take it.
    format: Option<NotificationFormat>,
}

#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "only its schema is used")]
enum WebhookType {
    Gate,
    Notification,
}
