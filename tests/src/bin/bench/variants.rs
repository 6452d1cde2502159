//! What is compared: a listener each, all in one Envoy, with the routes that `tideshift render envoy` prints.

use std::path::PathBuf;

use serde_json::{Value, json};
use tideshift_tests::{
    artifacts,
    bootstrap::{filter, type_url},
};

/// The shares that all weighted variants are to give.
pub(crate) const WEIGHTS: [(&str, u32); 2] = [("v1", 90), ("v2", 10)];

/// One way to do the job.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    /// What tables call it, and `ONLY` knows it by.
    pub(crate) name: String,
    /// The HTTP filters before the router.
    pub(crate) filters: Vec<Value>,
    pub(crate) routes: Routes,
    pub(crate) requests: Requests,
    pub(crate) expected: Expected,
}

/// What picks the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Routes {
    /// Envoy's own `weighted_clusters`.
    Weighted,
    /// A route for each version, by header; the stable one is the default.
    ByHeader,
}

/// The headers that a variant's requests have besides those of all requests; they are sent in turn.
#[derive(Clone, Debug)]
pub(crate) enum Requests {
    Plain,
    With(Vec<Vec<(String, String)>>),
}

/// Who answers, which is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Each by its share of [`WEIGHTS`].
    Shares,
    All(&'static str),
    /// Always the same for one request.
    Sticky,
}

/// The modules that are measured.
#[derive(Clone, Debug)]
pub(crate) struct Modules {
    pub(crate) noop: PathBuf,
    pub(crate) raw: PathBuf,
    pub(crate) ours: PathBuf,
}

impl Modules {
    /// What `make bench` has built, and `MODULE`.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let built = |name: &str| {
            let file = artifacts::workspace().join("target/wasm32-wasip1/wasm").join(name);
            anyhow::ensure!(file.is_file(), "{} is not there: run `make bench`", file.display());
            Ok(file)
        };
        Ok(Self { noop: built("bench_noop.wasm")?, raw: built("bench_raw.wasm")?, ours: artifacts::wasm()? })
    }
}

/// What everything else is measured against.
pub(crate) const NATIVE: &str = "native `weighted_clusters`";

/// All variants; the first one is [`NATIVE`].
pub(crate) fn all(modules: &Modules) -> Vec<Variant> {
    let native = |name: &str| Variant { routes: Routes::Weighted, ..variant(name, Vec::new()) };
    let one = |header: &str, value: &str| vec![(header.to_owned(), value.to_owned())];
    // 9 of 10 requests have the header of the one version, 1 that of the other.
    let chosen = (0..10).map(|n| one("x-tideshift-version", if n == 5 { "v2" } else { "v1" })).collect();
    vec![
        native(NATIVE),
        native("the same again"),
        Variant { requests: Requests::With(chosen), ..variant("native header match", Vec::new()) },
        Variant {
            expected: Expected::All("v1"),
            ..variant("no-op SDK module", vec![filter("noop", &modules.noop, &json!({}))])
        },
        variant("whole job, raw ABI, hard-coded", vec![filter("raw", &modules.raw, &json!({}))]),
        ours(modules, "weights", policy(&[], json!({}))),
        variant("Lua: choose, set, count", vec![lua(include_str!("whole_job.lua"))]),
        variant("Lua: choose, set, count, latency", vec![lua(include_str!("whole_job_latency.lua"))]),
    ]
}

fn variant(name: &str, filters: Vec<Value>) -> Variant {
    Variant {
        name: name.to_owned(),
        filters,
        routes: Routes::ByHeader,
        requests: Requests::Plain,
        expected: Expected::Shares,
    }
}

fn ours(modules: &Modules, name: &str, policy: Value) -> Variant {
    variant(&format!("tideshift: {name}"), vec![filter(name, &modules.ours, &policy)])
}

/// A policy with one service, and further fields of it.
fn policy(hostnames: &[&str], fields: Value) -> Value {
    let versions = WEIGHTS.map(|(name, weight)| json!({ "name": name, "weight": weight }));
    let mut service = json!({ "name": "shop", "versions": versions });
    if !hostnames.is_empty() {
        service["hostnames"] = json!(hostnames);
    }
    for (name, value) in fields.as_object().into_iter().flatten() {
        service[name] = value.clone();
    }
    json!({ "revision": 1, "services": [service] })
}

fn lua(script: &str) -> Value {
    json!({
        "name": "lua",
        "typed_config": {
            "@type": type_url("extensions.filters.http.lua.v3.Lua"),
            "default_source_code": { "inline_string": script },
        },
    })
}
