//! Prometheus' text format 0.0.4, for clients that do not request OpenMetrics. It is converted from OpenMetrics, so both
//! contain the same data. Samples are identical in both formats; the metadata of metric families differs.

use axum::http::{HeaderMap, header};

/// The content type of the older format.
pub const KIND: &str = "text/plain; version=0.0.4; charset=utf-8";
/// That of OpenMetrics.
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the client prefers OpenMetrics, or accepts it equally, and names it explicitly; `*/*` does not count, since every
/// client sends it.
pub fn asks_for_openmetrics(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let accepted: Vec<Accepted<'_>> = accepted.flat_map(|value| value.split(',')).map(Accepted::read).collect();
    let best = |kind: &str| {
        let of_kind = accepted.iter().filter(|one| one.kind.eq_ignore_ascii_case(kind));
        of_kind.map(|one| one.quality).reduce(f64::max)
    };
    let openmetrics = accepted.iter().filter(|one| {
        let version = one.version.is_none_or(|version| version.starts_with("1."));
        version && one.kind.eq_ignore_ascii_case("application/openmetrics-text")
    });
    let openmetrics = openmetrics.map(|one| one.quality).fold(0.0, f64::max);
    // What is said of the kind itself counts more than what is said of all.
    let text = best("text/plain").or_else(|| best("text/*")).or_else(|| best("*/*")).unwrap_or_default();
    openmetrics > 0.0 && openmetrics >= text
}

/// One of the kinds that `accept` names.
struct Accepted<'a> {
    kind: &'a str,
    version: Option<&'a str>,
    quality: f64,
}

impl<'a> Accepted<'a> {
    fn read(range: &'a str) -> Self {
        let mut parts = range.split(';').map(str::trim);
        let mut accepted = Self { kind: parts.next().unwrap_or_default(), version: None, quality: 1.0 };
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            let value = value.trim().trim_matches('"');
            match name.trim() {
                name if name.eq_ignore_ascii_case("version") => accepted.version = Some(value),
                name if name.eq_ignore_ascii_case("q") => accepted.quality = value.parse().unwrap_or(0.0),
                _ => {}
            }
        }
        accepted
    }
}

/// A page of OpenMetrics in the older format: families are named as their samples are, an info is a gauge, and there are
/// no units and no end.
pub fn from_openmetrics(text: &str) -> String {
    let mut classic = String::with_capacity(text.len());
    // What helps is said before the kind is known, on which the name depends.
    let mut help = None;
    for line in text.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            classic.extend([line, "\n"]);
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("HELP"), Some(_), words) => help = words,
            (Some("TYPE"), Some(family), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    "unknown" => ("", "untyped"),
                    _ => ("", kind),
                };
                if let Some(help) = help.take() {
                    classic.extend(["# HELP ", family, suffix, " ", help, "\n"]);
                }
                classic.extend(["# TYPE ", family, suffix, " ", kind, "\n"]);
            }
            _ => {}
        }
    }
    classic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_whoever_asks_for_it_by_name() {
        let newest = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                      application/openmetrics-text;version=0.0.1;q=0.5,\
                      text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        let long_ago = "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let with_protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;\
                             encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,\
                             text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (accept, expected) in [
            (&[newest][..], true),
            (&[with_protobuf], true),
            (&[long_ago], false),
            (&[], false),
            (&["*/*"], false),
            (&["text/plain;version=0.0.4"], false),
            (&["application/openmetrics-text"], true),
            (&["Application/OpenMetrics-Text; Version=\"1.0.0\""], true),
            (&["application/openmetrics-text;q=0"], false),
            (&["application/openmetrics-text;q=0.5, text/plain;q=0.6"], false),
            (&["application/openmetrics-text;q=0.5", "text/plain;q=0.5"], true),
            (&["application/openmetrics-text;q=0.5, */*;q=0.9"], false),
            (&["application/openmetrics-text;q=0.5, text/plain;q=0.1, */*;q=0.9"], true),
            (&["application/openmetrics-text;q=high, */*"], false),
            (&["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], false),
            (&[",;=,q="], false),
        ] {
            let headers = accept.iter().map(|value| (header::ACCEPT, value.parse().unwrap())).collect();
            assert_eq!(asks_for_openmetrics(&headers), expected, "{accept:?}");
        }
    }

    #[test]
    fn families_are_named_as_their_samples_are() {
        let openmetrics = "\
# HELP a_requests Requests.
# TYPE a_requests counter
a_requests_total{x=\"# TYPE \\\"y\\\"\"} 1
# HELP a_build What runs.
# TYPE a_build info
a_build_info{version=\"1\"} 1
# HELP a_time_seconds When.
# TYPE a_time_seconds gauge
# UNIT a_time_seconds seconds
a_time_seconds 1.5
# EOF
";
        let classic = "\
# HELP a_requests_total Requests.
# TYPE a_requests_total counter
a_requests_total{x=\"# TYPE \\\"y\\\"\"} 1
# HELP a_build_info What runs.
# TYPE a_build_info gauge
a_build_info{version=\"1\"} 1
# HELP a_time_seconds When.
# TYPE a_time_seconds gauge
a_time_seconds 1.5
";
        assert_eq!(from_openmetrics(openmetrics), classic);
    }
}
