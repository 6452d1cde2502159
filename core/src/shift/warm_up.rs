//! `strategy.warmUp`: how a new version is warmed up before it gets the full share of its step. Each new endpoint first
//! receives configured requests and becomes ready only if it answers them; then the version receives mirrored requests,
//! if the routes support mirroring; then its share ramps up. This module only reads the document; the controller acts.

use crate::decode::Decoder;
use crate::limits::LONGEST_SECONDS;
use crate::matching::choice;
use crate::outcome::status_range;
#[cfg(feature = "schema")]
use crate::schema;
use crate::shift::fields::{headers, path, seconds};
use serde_json::Value;
use std::ops::RangeInclusive;
use std::time::Duration;

/// How a version is warmed up. Default: no warm-up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct WarmUp {
    /// How long the target's share takes to ramp from 0 % to 100 %; a step takes its proportion of that. Default 0:
    /// immediately.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Seconds>", extend("default" = 0)))]
    pub seconds: Duration,
    /// The percentage of user requests, 1 to 100, that are mirrored to the target for the same time before the ramp starts.
    /// Default: no mirroring.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Percent>"))]
    pub mirror_percent: Option<u32>,
    /// The requests that each new endpoint must answer before it becomes ready. Default: none.
    pub requests: Option<WarmUpRequests>,
}

/// The requests that warm up one endpoint, and how many of them must pass. If fewer pass, the endpoint is not ready, and
/// the controller repeats all of them after a pause while the endpoint's probes pass.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct WarmUpRequests {
    /// The number of requests, 1 to 100,000; default 10.
    #[cfg_attr(feature = "schema", schemars(with = "Option<u32>", range(min = 1, max = 100_000), extend("default" = 10)))]
    pub count: u32,
    /// The number of concurrent requests, 1 to 100; default 1.
    #[cfg_attr(feature = "schema", schemars(with = "Option<u32>", range(min = 1, max = 100), extend("default" = 1)))]
    pub concurrency: u32,
    /// Paths with queries, used in rotation; at least one, default `/`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::Path>>", length(min = 1), extend("default" = ["/"])))]
    pub paths: Vec<String>,
    /// The method, GET or HEAD; default GET.
    #[cfg_attr(feature = "schema", schemars(rename = "method", with = "Option<schema::WarmUpMethod>", extend("default" = "GET")))]
    pub head: bool,
    /// HTTP, or HTTPS without certificate verification, as in probes; default HTTP.
    #[cfg_attr(feature = "schema", schemars(rename = "scheme", with = "Option<schema::Scheme>", extend("default" = "HTTP")))]
    pub https: bool,
    /// Headers of each request; `Host` replaces the endpoint's host.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::HttpHeader>>"))]
    pub headers: Vec<(String, String)>,
    /// The statuses that pass; default 200 to 399. Redirects are not followed.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::StatusRange>>", length(min = 1), extend("default" = ["200-399"])))]
    pub status_codes: Vec<RangeInclusive<u16>>,
    /// The percentage of `count`, 1 to 100, that must pass; default 100.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Percent>", extend("default" = 100)))]
    pub min_pass_percent: u32,
    /// The timeout of a request; default 5 s.
    #[cfg_attr(feature = "schema", schemars(rename = "timeoutSeconds", with = "Option<schema::AtLeastOneSecond>", extend("default" = 5)))]
    pub timeout: Duration,
}

impl Default for WarmUpRequests {
    fn default() -> Self {
        Self {
            count: 10,
            concurrency: 1,
            paths: vec!["/".to_owned()],
            head: false,
            https: false,
            headers: Vec::new(),
            status_codes: vec![200..=399],
            min_pass_percent: 100,
            timeout: Duration::from_secs(5),
        }
    }
}

impl WarmUp {
    pub(super) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let seconds = seconds(&mut f, d, "seconds", 0, 0);
        let mirror_percent = f.optional(d, "mirrorPercent", percent);
        let requests = f.optional(d, "requests", WarmUpRequests::read);
        f.finish(d);
        if mirror_percent.is_some() && seconds.is_zero() {
            d.missing("seconds", "for how long the target gets copies of requests, since there is mirrorPercent");
        }
        Some(Self { seconds, mirror_percent, requests })
    }
}

impl WarmUpRequests {
    /// Whether a response with this status passes.
    pub fn passes(&self, status: u16) -> bool {
        self.status_codes.iter().any(|range| range.contains(&status))
    }

    /// The number of requests that may fail: what `min_pass_percent` leaves of `count`, rounded down.
    pub fn failures_borne(&self) -> u32 {
        let percent = 100u64.saturating_sub(self.min_pass_percent.into());
        (u64::from(self.count) * percent / 100) as u32
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let count = f.optional(d, "count", |d, v| d.integer(v, 1, 100_000));
        let concurrency = f.optional(d, "concurrency", |d, v| d.integer(v, 1, 100));
        let paths = f.optional(d, "paths", |d, v| filled_list(d, v, path));
        let method = f.optional(d, "method", |d, v| choice(d, v, &["GET", "HEAD"]));
        let scheme = f.optional(d, "scheme", |d, v| choice(d, v, &["HTTP", "HTTPS"]));
        let headers = f.optional(d, "headers", headers);
        let status_codes = f.optional(d, "statusCodes", |d, v| filled_list(d, v, status_range));
        let min_pass_percent = f.optional(d, "minPassPercent", percent);
        let timeout = f.optional(d, "timeoutSeconds", |d, v| d.integer(v, 1, LONGEST_SECONDS));
        f.finish(d);
        Some(Self {
            count: count.map_or(default.count, |count| count as u32),
            concurrency: concurrency.map_or(default.concurrency, |requests| requests as u32),
            paths: paths.unwrap_or(default.paths),
            head: method == Some("HEAD"),
            https: scheme == Some("HTTPS"),
            headers: headers.unwrap_or_default(),
            status_codes: status_codes.unwrap_or(default.status_codes),
            min_pass_percent: min_pass_percent.unwrap_or(default.min_pass_percent),
            timeout: timeout.map_or(default.timeout, Duration::from_secs),
        })
    }
}

fn percent(d: &mut Decoder, value: &Value) -> Option<u32> {
    d.integer(value, 1, 100).map(|percent| percent as u32)
}

fn filled_list<T>(
    d: &mut Decoder,
    value: &Value,
    read: impl FnMut(&mut Decoder, &Value) -> Option<T>,
) -> Option<Vec<T>> {
    let items = d.list(value, read)?;
    if value.as_array().is_some_and(Vec::is_empty) {
        d.invalid(value, "a list that is not empty");
    }
    Some(items.into_iter().map(|(_, item)| item).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(value: &Value) -> Result<WarmUp, Vec<String>> {
        Decoder::read(value, WarmUp::read).map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_is_left_out_has_its_defaults() {
        assert_eq!(read(&json!({})), Ok(WarmUp::default()));
        let requests = Some(WarmUpRequests::default());
        assert_eq!(read(&json!({"requests": {}})), Ok(WarmUp { requests, ..WarmUp::default() }));
    }

    #[test]
    fn everything_is_read() {
        let read = read(&json!({"seconds": 30, "mirrorPercent": 5, "requests": {
            "count": 50, "concurrency": 4, "paths": ["/", "/cart?warm=1"], "method": "HEAD", "scheme": "HTTPS",
            "headers": [{"name": "Host", "value": "shop.example.com"}], "statusCodes": ["200-299", 404],
            "minPassPercent": 90, "timeoutSeconds": 20,
        }}));
        let requests = WarmUpRequests {
            count: 50,
            concurrency: 4,
            paths: vec!["/".to_owned(), "/cart?warm=1".to_owned()],
            head: true,
            https: true,
            headers: vec![("Host".to_owned(), "shop.example.com".to_owned())],
            status_codes: vec![200..=299, 404..=404],
            min_pass_percent: 90,
            timeout: Duration::from_secs(20),
        };
        assert!(requests.passes(204) && requests.passes(404) && !requests.passes(302) && !requests.passes(500));
        let seconds = Duration::from_secs(30);
        assert_eq!(read, Ok(WarmUp { seconds, mirror_percent: Some(5), requests: Some(requests) }));
    }

    #[test]
    fn what_may_fail_is_rounded_down() {
        for (count, min_pass_percent, borne) in
            [(10, 100, 0), (10, 95, 0), (10, 80, 2), (3, 50, 1), (1, 1, 0), (100_000, 1, 99_000)]
        {
            let requests = WarmUpRequests { count, min_pass_percent, ..WarmUpRequests::default() };
            assert_eq!(requests.failures_borne(), borne, "{min_pass_percent} % of {count}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        for (value, expected) in [
            (json!({"seconds": -1}), "seconds: -1 is not allowed; expected an integer from 0 to 31536000"),
            (json!({"mirrorPercent": 0}), "mirrorPercent: 0 is not allowed; expected an integer from 1 to 100"),
            (json!({"second": 3}), "second: unknown field; did you mean `seconds`?"),
            (
                json!({"requests": {"count": 0}}),
                "requests.count: 0 is not allowed; expected an integer from 1 to 100000",
            ),
            (json!({"requests": {"concurrency": 101}}), "requests.concurrency: 101 is not allowed"),
            (
                json!({"requests": {"paths": []}}),
                "requests.paths: [] is not allowed; expected a list that is not empty",
            ),
            (json!({"requests": {"paths": ["/", "cart"]}}), "requests.paths[1]: \"cart\" is not allowed"),
            (
                json!({"requests": {"method": "POST"}}),
                "requests.method: \"POST\" is not allowed; expected one of GET, HEAD",
            ),
            (json!({"requests": {"headers": [{"name": "a b", "value": ""}]}}), "requests.headers[0].name: \"a b\""),
            (json!({"requests": {"statusCodes": []}}), "requests.statusCodes: [] is not allowed"),
            (json!({"requests": {"statusCodes": ["2xx"]}}), "requests.statusCodes[0]: \"2xx\" is not allowed"),
            (json!({"requests": {"minPassPercent": 101}}), "requests.minPassPercent: 101 is not allowed"),
            (json!({"requests": {"timeoutSeconds": 0}}), "requests.timeoutSeconds: 0 is not allowed"),
        ] {
            let errors = read(&value).expect_err("a mistake");
            assert_eq!(errors.len(), 1, "{value}: {errors:?}");
            assert!(errors[0].starts_with(expected), "{}\nshould start with\n{expected}", errors[0]);
        }
    }
}
