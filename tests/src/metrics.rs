//! Parses Prometheus' text format, from Envoy and the controller, into a map.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, bail};

/// A metric's name and labels, the labels sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (index, (name, value)) in self.labels.iter().enumerate() {
            write!(f, "{}{name}={value:?}", if index == 0 { "{" } else { "," })?;
        }
        f.write_str(if self.labels.is_empty() { "" } else { "}" })
    }
}

/// One scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(pub BTreeMap<Series, f64>);

impl Metrics {
    /// Reads a scrape.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines
            .map(|line| parse_line(line).with_context(|| format!("not a Prometheus sample: {line}")))
            .collect::<anyhow::Result<_>>()
            .map(Self)
    }

    /// The sum over all series of that name that have (at least) these labels; `None` where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut found = self.select(name, labels).peekable();
        found.peek().is_some().then(|| found.map(|(_, value)| value).sum())
    }

    /// The series of that name that have (at least) these labels.
    pub fn select(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = (&Series, f64)> {
        self.0
            .iter()
            .filter(move |(series, _)| {
                let has = |(name, value): &(&str, &str)| series.labels.get(*name).is_some_and(|other| other == value);
                series.name == name && labels.iter().all(has)
            })
            .map(|(series, value)| (series, *value))
    }

    /// `tideshift_requests_total` of a service's version and outcome; 0 where nothing was counted yet.
    pub fn requests_total(&self, service: &str, version: &str, outcome: &str) -> u64 {
        let labels = [("service", service), ("version", version), ("outcome", outcome)];
        self.sum("tideshift_requests_total", &labels).unwrap_or_default() as u64
    }

    /// `tideshift_misrouted_requests_total` of a service's version; 0 where nothing was counted yet.
    pub fn misrouted_total(&self, service: &str, version: &str) -> u64 {
        let labels = [("service", service), ("version", version)];
        self.sum("tideshift_misrouted_requests_total", &labels).unwrap_or_default() as u64
    }

    /// `tideshift_requests_total` of a service by version and outcome.
    pub fn requests_by_version(&self, service: &str) -> BTreeMap<(String, String), u64> {
        let label = |series: &Series, name: &str| series.labels.get(name).cloned().unwrap_or_default();
        let mut by = BTreeMap::new();
        for (series, value) in self.select("tideshift_requests_total", &[("service", service)]) {
            *by.entry((label(series, "version"), label(series, "outcome"))).or_default() += value as u64;
        }
        by
    }
}

fn parse_line(line: &str) -> anyhow::Result<(Series, f64)> {
    let name_end = line.find(['{', ' ']).context("no value")?;
    let (name, rest) = line.split_at(name_end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => parse_labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = rest.split_whitespace().next().context("no value")?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        number => number.parse()?,
    };
    Ok((Series { name: name.to_owned(), labels }, value))
}

fn parse_labels(mut rest: &str) -> anyhow::Result<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Ok((labels, rest));
        }
        let (name, after) = rest.split_once("=\"").context("a label without a value")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        rest = loop {
            match chars.next() {
                Some((end, '"')) => break &after[end + 1..],
                Some((_, '\\')) => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, other)) => value.push(other),
                    None => bail!("a label's value that does not end"),
                },
                Some((_, other)) => value.push(other),
                None => bail!("a label's value that does not end"),
            }
        };
        labels.insert(name.trim().to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = r#"
# TYPE tideshift_requests_total counter
tideshift_requests_total{service="checkout",version="v1",outcome="ok"} 12
tideshift_requests_total{service="checkout",version="v1",outcome="error"} 3
tideshift_requests_total{outcome="ok",service="a \"b\"\\, c}",version="v1",} 1 1700000000
up 1e3
le_bucket{le="+Inf"} +Inf
"#;

    #[test]
    fn reads_labels_in_any_order() {
        let metrics = Metrics::parse(SCRAPE).unwrap();
        assert_eq!(metrics.requests_total("checkout", "v1", "ok"), 12);
        assert_eq!(metrics.requests_total("checkout", "v9", "ok"), 0);
        assert_eq!(metrics.requests_total("a \"b\"\\, c}", "v1", "ok"), 1);
        assert_eq!(metrics.sum("tideshift_requests_total", &[("service", "checkout")]), Some(15.0));
        assert_eq!(metrics.sum("up", &[]), Some(1000.0));
        assert_eq!(metrics.sum("down", &[]), None);
        assert_eq!(metrics.requests_by_version("checkout").len(), 2);
    }

    #[test]
    fn names_the_line_that_it_cannot_read() {
        for bad in ["name", "name{a=\"b} 1", "name{a} 1", "name nine"] {
            let error = Metrics::parse(bad).unwrap_err().to_string();
            assert!(error.ends_with(bad), "{error}");
        }
    }
}
