//! The compared variants: one listener each, all in one Envoy, with the routes that `tideshift render envoy` prints.

use std::path::PathBuf;

use serde_json::{Value, json};
use tideshift_tests::artifacts;
use tideshift_tests::bootstrap::{VERSION_HEADER, filter, type_url};

use crate::client::HOST;

/// The shares that all weighted variants give.
pub(crate) const WEIGHTS: [(&str, u32); 2] = [("v1", 90), ("v2", 10)];

/// How many of one filter a chain has.
pub(crate) const CHAIN: usize = 6;

/// Rules and services where there are many.
const MANY: usize = 100;

/// Users that take turns where sessions are measured.
const USERS: usize = 20;

/// One way to do the job.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    /// Its name in tables, and for `ONLY`.
    pub(crate) name: String,
    /// The HTTP filters before the router.
    pub(crate) filters: Vec<Value>,
    pub(crate) routes: Routes,
    /// Whether Envoy removes what clients send in our name, before the filters.
    pub(crate) strips: bool,
    pub(crate) requests: Requests,
    pub(crate) expected: Expected,
    pub(crate) counted: Option<Counted>,
    /// Left out, loudly, if the module refuses its policy: what it needs is not built yet.
    pub(crate) optional: bool,
    pub(crate) table: Table,
}

/// How the cluster is chosen.
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
    With(Vec<Vec<(String, String)>>),
    /// This many users, each with the cookie from its first response.
    Cookies(usize),
}

/// The expected responses, which are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Each by its share of [`WEIGHTS`].
    Shares,
    All(&'static str),
    /// Always the same for one user.
    Sticky,
}

/// The stat that counts the requests, which is checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Counted {
    pub(crate) stat: &'static str,
    /// Its label `service`.
    pub(crate) service: String,
}

/// Where the result stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Costs,
    /// A chain of [`CHAIN`] filters, compared with the variant of this name, which has one.
    ChainOf(String),
}

/// The modules that are measured.
#[derive(Clone, Debug)]
pub(crate) struct Modules {
    pub(crate) noop: PathBuf,
    pub(crate) raw: PathBuf,
    pub(crate) ours: PathBuf,
}

impl Modules {
    /// The modules that `make bench` has built, and the one that `MODULE` names.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let built = |name: &str| {
            let file = artifacts::workspace().join("target/wasm32-wasip1/wasm").join(name);
            anyhow::ensure!(file.is_file(), "{} is not there: run `make bench`", file.display());
            Ok(file)
        };
        Ok(Self { noop: built("bench_noop.wasm")?, raw: built("bench_raw.wasm")?, ours: artifacts::wasm()? })
    }

    /// A filter that does nothing.
    pub(crate) fn noop(&self) -> Variant {
        let filters = vec![filter("noop", &self.noop, &json!({}))];
        Variant { filters, expected: Expected::All("v1"), ..variant("no-op, SDK") }
    }

    /// Our yardstick.
    pub(crate) fn raw(&self) -> Variant {
        let counted = Some(Counted { stat: "bench_requests_total", service: "raw".to_owned() });
        Variant { filters: vec![filter("raw", &self.raw, &json!({}))], counted, ..variant("raw ABI, hard-coded") }
    }

    /// Ours, with these fields of its one service.
    pub(crate) fn ours(&self, name: &str, fields: Value) -> Variant {
        let policy = json!({ "stripClientHeaders": false, "services": [service(name, fields)] });
        Variant { strips: true, ..self.under(name, policy) }
    }

    fn under(&self, name: &str, mut policy: Value) -> Variant {
        policy["revision"] = json!(1);
        let counted = Some(Counted { stat: "tideshift_requests_total", service: label(name) });
        let filters = vec![filter(&label(name), &self.ours, &policy)];
        Variant { filters, counted, ..variant(&format!("tideshift: {name}")) }
    }
}

/// Envoy's own weighted clusters, the baseline of all comparisons.
pub(crate) fn native() -> Variant {
    Variant { routes: Routes::Weighted, ..variant("native `weighted_clusters`") }
}

/// All variants; the first one is [`native`].
pub(crate) fn all(modules: &Modules) -> Vec<Variant> {
    // As many requests have each version's header as the weights say.
    let chosen = (0..10).map(|n| one(VERSION_HEADER, if n == 5 { "v2" } else { "v1" })).collect();
    let beta = |name: &str| modules.ours(name, json!({ "rules": [rule("x-beta", "1")] }));
    let rules = |rule: &dyn Fn(usize) -> Value| json!({ "rules": (0..MANY).map(rule).collect::<Vec<_>>() });
    let others = (1..MANY).map(|n| service(&format!("other{n}"), json!({ "hostnames": [format!("{n}.{HOST}")] })));
    let services = others.chain([service("100 services", json!({ "hostnames": [HOST] }))]);
    let services = json!({ "stripClientHeaders": false, "services": services.collect::<Vec<_>>() });
    let strips_itself = json!({ "services": [service("weights, strips by itself", json!({}))] });
    let user = |n: usize| one("x-user-id", &format!("user-{n}"));

    let mut variants = vec![
        native(),
        Variant { name: "the same again".to_owned(), ..native() },
        Variant { name: "the same, our headers stripped".to_owned(), strips: true, ..native() },
        Variant { requests: Requests::With(chosen), ..variant("native header match") },
        modules.noop(),
        modules.raw(),
        modules.ours("weights", json!({})),
        modules.ours("hostname", json!({ "hostnames": [HOST] })),
        beta("a header rule that misses"),
        Variant {
            requests: Requests::With(vec![one("x-beta", "1")]),
            expected: Expected::All("v2"),
            ..beta("a header rule that matches")
        },
        Variant {
            requests: Requests::Cookies(USERS),
            expected: Expected::Sticky,
            optional: true,
            ..modules.ours("a session by cookie", json!({ "session": { "type": "Cookie", "name": "tideshift_shop" } }))
        },
        Variant {
            requests: Requests::With((0..USERS).map(user).collect()),
            expected: Expected::Sticky,
            optional: true,
            ..modules.ours("a session by header", json!({ "session": { "type": "Header", "name": "x-user-id" } }))
        },
        modules.ours("100 rules for one header", rules(&|n| rule("x-user-group", &format!("group-{n}")))),
        modules.ours("100 rules for 100 headers", rules(&|n| rule(&format!("x-test-{n}"), "1"))),
        Variant { strips: true, ..modules.under("100 services", services) },
        modules.under("weights, strips by itself", strips_itself),
        lua("Lua: choose, set, count", include_str!("whole_job.lua")),
        lua("Lua: choose, set, count, latency", include_str!("whole_job_latency.lua")),
    ];
    let chained = ["weights", "a header rule that misses"].map(|name| format!("tideshift: {name}"));
    let chained = ["no-op, SDK", "raw ABI, hard-coded", &chained[0], &chained[1], "Lua: choose, set, count, latency"];
    let chains: Vec<_> = variants.iter().filter(|v| chained.contains(&v.name.as_str())).map(chain).collect();
    variants.extend(chains);
    variants
}

/// Six filters in a row, in VMs that are not those of the one.
fn chain(one: &Variant) -> Variant {
    let mut filters = one.filters.clone();
    for filter in &mut filters {
        if let Some(vm) = filter.pointer_mut("/typed_config/config/vm_config/vm_id") {
            *vm = json!(format!("chain of {}", vm.as_str().unwrap_or_default()));
        }
    }
    Variant {
        name: format!("{CHAIN} × {}", one.name),
        filters: filters.into_iter().cycle().take(CHAIN).collect(),
        table: Table::ChainOf(one.name.clone()),
        ..one.clone()
    }
}

fn variant(name: &str) -> Variant {
    Variant {
        name: name.to_owned(),
        filters: Vec::new(),
        routes: Routes::ByHeader,
        strips: false,
        requests: Requests::With(vec![Vec::new()]),
        expected: Expected::Shares,
        counted: None,
        optional: false,
        table: Table::Costs,
    }
}

fn lua(name: &str, script: &str) -> Variant {
    let filter = json!({
        "name": "lua",
        "typed_config": {
            "@type": type_url("extensions.filters.http.lua.v3.Lua"),
            "default_source_code": { "inline_string": script },
        },
    });
    Variant { filters: vec![filter], ..variant(name) }
}

/// A service of our policy, with further fields.
fn service(name: &str, mut fields: Value) -> Value {
    fields["name"] = json!(label(name));
    fields["versions"] = json!(WEIGHTS.map(|(name, weight)| json!({ "name": name, "weight": weight })));
    fields
}

/// A name that a service may have.
fn label(name: &str) -> String {
    name.replace(", ", "-").replace(' ', "-")
}

/// Requests with this header go to v2.
fn rule(header: &str, value: &str) -> Value {
    json!({
        "matches": [{ "headers": [{ "name": header, "value": value }] }],
        "versions": [{ "name": "v2", "weight": 1 }],
    })
}

fn one(header: &str, value: &str) -> Vec<(String, String)> {
    vec![(header.to_owned(), value.to_owned())]
}
