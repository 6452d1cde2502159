//! The JSON Schema of a TrafficShift, generated from the types that documents are read into. Kubernetes' API server and
//! the OpenAPI document use it. This module adds what those types leave to their readers: fields that do not belong to
//! a single type, and the limits of strings and numbers. A schema cannot express rules that span fields;
//! [`TrafficShift::read`] checks those.
//!
//! The schema declares a default only if omitting the field means the same as writing it; the descriptions name the
//! other defaults.

use crate::limits::{LONGEST_ROUTE_TIMEOUT, LONGEST_SECONDS};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use std::borrow::Cow;
use std::marker::PhantomData;

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
    /// [`shift::SecretKeyRef`], which must not begin with two dots; this pattern can express that.
    SecretKey = {"type": "string", "maxLength": 253, "pattern": "^(\\.?[-_A-Za-z0-9][-._A-Za-z0-9]*)$"};
    /// [`crate::matching::hostname::read`]
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
    /// At most a year.
    Seconds = {"type": "integer", "minimum": 0, "maximum": LONGEST_SECONDS};
    AtLeastOneSecond = {"type": "integer", "minimum": 1, "maximum": LONGEST_SECONDS};
    RouteTimeout = {"type": "integer", "minimum": 0, "maximum": LONGEST_ROUTE_TIMEOUT};
    Millis = {"type": "integer", "minimum": 1, "maximum": LONGEST_SECONDS * 1_000};
    Times = {"type": "integer", "minimum": 1, "maximum": 1_000_000};
    /// From 1 to 100.
    Percent = {"type": "integer", "minimum": 1, "maximum": 100};
    /// From 0 to 100.
    Share = {"type": "integer", "minimum": 0, "maximum": 100};
    Weight = {"type": "integer", "minimum": 0, "maximum": crate::limits::MAX_WEIGHT};
    /// [`crate::outcome::status_range`]
    StatusRange = {
        "type": ["integer", "string"],
        "minimum": 100,
        "maximum": 599,
        "pattern": "^ *0*[1-5][0-9]{2} *(- *0*[1-5][0-9]{2} *)?$",
    };
    GrpcStatus = {"type": "integer", "minimum": 1, "maximum": 16};
    /// [`shift::IntOrPercent`]
    QuantityText = {
        "type": ["integer", "string"],
        "minimum": 0,
        "maximum": 1_000_000,
        "pattern": "^0*(1000|[0-9]{1,3})%$",
    };
    /// [`shift::IntOrPercent`], at most 100 %
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
    Phase = {"type": "string", "enum": crate::limits::PHASES};
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
