//! A strict parser of the OpenMetrics text format and of Prometheus' naming conventions: anything that a scraper may
//! not accept is an error.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail, ensure};

use crate::metrics::Metrics;

/// Reads a scrape of counters, gauges and infos: the families and their types.
///
/// # Errors
///
/// The first line that is not as it must be: `# TYPE` and `# HELP` once each and before a family's samples, families
/// not interleaved, `_total` for counters and for nothing else, no series twice, numbers that are numbers, `# EOF` at
/// the end and a line feed after it; names of lower-case letters and underscores with an own prefix, or the process's.
pub fn read(text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let body = text.strip_suffix("# EOF\n").context("it does not end with # EOF and a line feed")?;
    let mut types: BTreeMap<String, String> = BTreeMap::new();
    let mut helps = BTreeSet::new();
    let mut family = String::new();
    let mut series = BTreeSet::new();
    for line in body.lines() {
        ensure!(line == line.trim() && !line.is_empty(), "blank: {line:?}");
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (kind, name) = (words.next().unwrap_or_default(), words.next().context("a comment without a name")?);
            let rest = words.next().with_context(|| format!("nothing after the name: {line}"))?;
            match kind {
                "HELP" => ensure!(helps.insert(name.to_owned()) && rest.ends_with('.'), "helps badly: {line}"),
                "TYPE" => {
                    ensure!(["counter", "gauge", "info"].contains(&rest), "not a type: {line}");
                    ensure!(types.insert(name.to_owned(), rest.to_owned()).is_none(), "a family twice: {line}");
                }
                "UNIT" => {}
                _ => bail!("a comment of an unknown kind: {line}"),
            }
            name.clone_into(&mut family);
            let fine = |b: u8| b.is_ascii_lowercase() || b == b'_';
            let own = name.starts_with("tideshift_") || name.starts_with("process_");
            ensure!(own && name.bytes().all(fine), "badly named: {line}");
            continue;
        }
        let (name, _) = line.split_at(line.find(['{', ' ']).with_context(|| format!("no value: {line}"))?);
        let kind = types.get(&family).with_context(|| format!("no type before {line}"))?;
        let suffix = name.strip_prefix(family.as_str()).with_context(|| format!("not of {family}: {line}"))?;
        let expected = match kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        ensure!(suffix == expected, "a {kind} is called {family}{expected}: {line}");
        ensure!(kind == "counter" || !name.ends_with("_total"), "only counters are totals: {line}");
        let parsed = Metrics::parse(line)?;
        let (sample, value) = parsed.0.into_iter().next().context("no sample")?;
        ensure!(value.is_finite() && value >= 0.0, "a value to stumble over: {line}");
        ensure!(!sample.name.contains(':'), "colons are for recording rules: {line}");
        ensure!(series.insert(sample), "a series twice: {line}");
    }
    ensure!(types.keys().all(|name| helps.contains(name)), "a family without help");
    Ok(types)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_scraper_stumbles_over_is_an_error() {
        let good = "# HELP tideshift_a A thing.\n# TYPE tideshift_a counter\ntideshift_a_total{x=\"y\"} 1\n# EOF\n";
        assert_eq!(read(good).unwrap().get("tideshift_a").map(String::as_str), Some("counter"));
        for (from, to) in [
            ("# EOF\n", ""),
            ("a_total{", "a{"),
            ("counter", "counters"),
            (" 1\n", " one\n"),
            (" 1\n", " 1\ntideshift_a_total{x=\"y\"} 2\n"),
            ("# TYPE tideshift_a counter\n", ""),
            ("# HELP tideshift_a A thing.\n", ""),
            ("tideshift_a_total{", "tideshift_b_total{"),
            ("tideshift_a", "otherwise_a"),
        ] {
            assert!(read(&good.replace(from, to)).is_err(), "{from} → {to}");
        }
    }
}
