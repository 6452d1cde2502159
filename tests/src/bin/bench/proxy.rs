//! The measured Envoy, with a listener for each variant.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tideshift_core::OWN_HEADERS;
use tideshift_tests::bootstrap::{VERSION_HEADER, cluster, socket_address, stats_tags, type_url};
use tideshift_tests::envoy::Options;
use tideshift_tests::ports::Port;

use crate::variants::{Routes, Variant, WEIGHTS};

/// Envoy's settings and the ports that it takes.
#[derive(Debug)]
pub(crate) struct Proxy {
    admin: Port,
    listeners: Vec<(Port, Variant)>,
    backends: Vec<SocketAddr>,
}

impl Proxy {
    /// With these backends, one for each version.
    pub(crate) fn new(variants: &[Variant], backends: &[SocketAddr]) -> anyhow::Result<Self> {
        let listener = |variant: &Variant| Ok((Port::reserve()?, variant.clone()));
        Ok(Self {
            admin: Port::reserve()?,
            listeners: variants.iter().map(listener).collect::<anyhow::Result<_>>()?,
            backends: backends.to_vec(),
        })
    }

    /// Where each variant listens.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|(port, _)| port.address())
    }

    /// How to start it with so many workers.
    pub(crate) fn options(&self, workers: usize) -> Options {
        Options::new(self.bootstrap().to_string(), self.admin.number()).concurrency(workers)
    }

    fn bootstrap(&self) -> Value {
        let clusters = WEIGHTS.iter().zip(&self.backends).map(|((name, _), &address)| cluster(name, &[address], false));
        json!({
            "admin": { "address": socket_address(self.admin.address()) },
            "stats_config": { "stats_tags": stats_tags() },
            "static_resources": {
                "listeners": self.listeners.iter().map(|(port, variant)| listener(port, variant)).collect::<Vec<_>>(),
                "clusters": clusters.collect::<Vec<_>>(),
            },
        })
    }
}

fn listener(port: &Port, variant: &Variant) -> Value {
    let mut filters = variant.filters.clone();
    filters.push(json!({
        "name": "envoy.filters.http.router",
        "typed_config": { "@type": type_url("extensions.filters.http.router.v3.Router") },
    }));
    json!({
        "name": variant.name,
        "address": socket_address(port.address()),
        // Few connections should still reach every worker.
        "connection_balance_config": { "exact_balance": {} },
        "filter_chains": [{ "filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": type_url("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
                "stat_prefix": format!("bench_{}", port.number()),
                "use_remote_address": true,
                "early_header_mutation_extensions": if variant.strips { vec![strip()] } else { Vec::new() },
                "http_filters": filters,
                "route_config": {
                    "name": "bench",
                    "ignore_port_in_host_matching": true,
                    "virtual_hosts": [{
                        "name": "shop",
                        "domains": ["*"],
                        "retry_policy": retries("connect-failure,refused-stream,reset-before-request"),
                        "routes": routes(variant.routes),
                    }],
                },
            },
        }] }],
    })
}

/// As `tideshift render envoy` prints them: `GET` has retries of its own.
fn routes(routes: Routes) -> Vec<Value> {
    let get = json!({ "name": ":method", "string_match": { "exact": "GET" } });
    let pair = |headers: Vec<Value>, action: Value| {
        let mut action_of_get = action.clone();
        action_of_get["retry_policy"] = retries("connect-failure,refused-stream,reset");
        let headers_of_get = [headers.as_slice(), std::slice::from_ref(&get)].concat();
        [
            json!({ "match": { "prefix": "/", "headers": headers_of_get }, "route": action_of_get }),
            json!({ "match": { "prefix": "/", "headers": headers }, "route": action }),
        ]
    };
    match routes {
        Routes::Weighted => {
            let clusters = WEIGHTS.map(|(name, weight)| json!({ "name": name, "weight": weight }));
            pair(Vec::new(), json!({ "weighted_clusters": { "clusters": clusters } })).into()
        }
        Routes::ByHeader => {
            let [(stable, _), ..] = WEIGHTS;
            let version = |(name, _): (&str, u32)| {
                let header = json!({ "name": VERSION_HEADER, "string_match": { "exact": name } });
                pair(vec![header], json!({ "cluster": name }))
            };
            let default = pair(Vec::new(), json!({ "cluster": stable }));
            WEIGHTS.into_iter().flat_map(version).chain(default).collect()
        }
    }
}

fn strip() -> Value {
    json!({
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": type_url("extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"),
            "mutations": [{ "remove_on_match": { "key_matcher": { "prefix": OWN_HEADERS } } }],
        },
    })
}

fn retries(on: &str) -> Value {
    json!({
        "retry_on": on,
        "num_retries": 2,
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": { "@type": type_url("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate") },
        }],
        "host_selection_retry_max_attempts": 3,
    })
}
