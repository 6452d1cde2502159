//! Readiness probes: what is tried, and how often.

use crate::decode::{Decoder, Fields};
use crate::limits::LONGEST_SECONDS;
#[cfg(feature = "schema")]
use crate::schema;
use crate::shift::fields::{headers, host, path, port, seconds};
use serde_json::Value;
use std::time::Duration;

/// A readiness probe with Kubernetes' fields and defaults.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct Probe {
    /// The action.
    #[cfg_attr(feature = "schema", schemars(flatten, with = "described::Check"))]
    pub check: Check,
    /// The time from an endpoint's first appearance to its first probe; default 0.
    #[cfg_attr(feature = "schema", schemars(rename = "initialDelaySeconds", with = "Option<schema::Seconds>", extend("default" = 0)))]
    pub initial_delay: Duration,
    /// The time between probes; default 10 s.
    #[cfg_attr(feature = "schema", schemars(flatten, with = "described::Period"))]
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

impl Probe {
    /// How often a proxy checks an endpoint that is not ready: the period, at most 1 s. A proxy detects readiness at most
    /// this long after the controller.
    pub fn comeback_period(&self) -> Duration {
        self.period.min(Duration::from_secs(1))
    }

    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
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

impl HttpGet {
    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
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

pub(crate) fn period(f: &mut Fields<'_>, d: &mut Decoder, probe: &Value) -> Duration {
    let millis = f.optional(d, "periodMillis", |d, v| d.integer(v, 1, LONGEST_SECONDS * 1_000));
    if f.has("periodMillis") && f.has("periodSeconds") {
        d.invalid(probe, "either periodSeconds or periodMillis");
    }
    let seconds = seconds(f, d, "periodSeconds", 1, 10);
    millis.map_or(seconds, Duration::from_millis)
}

pub(crate) fn tcp_socket(d: &mut Decoder, value: &Value) -> Option<Check> {
    let mut f = d.object(value)?;
    let check = Check::TcpSocket { host: f.optional(d, "host", host), port: f.optional(d, "port", port) };
    f.finish(d);
    Some(check)
}

/// What readers take apart here, as a JSON Schema.
#[cfg(feature = "schema")]
mod described {
    use crate::schema;
    use schemars::JsonSchema;

    /// The action of a probe; exactly one.
    #[derive(JsonSchema)]
    #[schemars(rename_all = "camelCase")]
    #[allow(dead_code, reason = "only its schema is used")]
    pub(crate) struct Check {
        /// An HTTP GET request; statuses 200 to 399 are successes.
        http_get: Option<super::HttpGet>,
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
        #[schemars(with = "Option<schema::Host>")]
        host: Option<String>,
        /// Replaces the endpoint's port.
        #[schemars(with = "Option<schema::Port>")]
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
        #[schemars(with = "Option<schema::Port>")]
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
        #[schemars(with = "Option<schema::AtLeastOneSecond>")]
        period_seconds: Option<u64>,
        /// The time between probes in milliseconds; replaces periodSeconds.
        #[schemars(with = "Option<schema::Millis>")]
        period_millis: Option<u64>,
    }
}
