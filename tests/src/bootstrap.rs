//! Envoy bootstraps for the filter's tests: one listener, the filter with a policy, a route and a cluster per version.
//!
//! `tideshift render envoy` prints the configuration for users; this one is deliberately separate, so that the filter's
//! tests neither need the controller nor share its bugs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::ports::Port;
use crate::{artifacts, envoy};

/// The header by which the filter tells Envoy's routes the version.
pub const VERSION_HEADER: &str = "x-tideshift-version";

/// The cluster that the filter calls for policies.
pub const CONTROLLER_CLUSTER: &str = "tideshift_controller";

/// A bootstrap in the making. The first version is the default route.
#[derive(Debug)]
pub struct Bootstrap {
    listen: Port,
    admin: Port,
    policy: Option<Value>,
    wasm: Option<PathBuf>,
    versions: Vec<(String, Vec<SocketAddr>)>,
    controller: Option<SocketAddr>,
    timeout: Duration,
    retries: u32,
    http2: Vec<String>,
    access_log: Option<PathBuf>,
}

impl Bootstrap {
    /// A bootstrap on free ports, with the filter under `policy`.
    pub fn new(policy: Value) -> anyhow::Result<Self> {
        Ok(Self {
            listen: Port::reserve()?,
            admin: Port::reserve()?,
            policy: Some(policy),
            wasm: None,
            versions: Vec::new(),
            controller: None,
            timeout: Duration::from_secs(15),
            retries: 0,
            http2: Vec::new(),
            access_log: None,
        })
    }

    /// A bootstrap without the filter: what Envoy does by itself.
    pub fn without_filter() -> anyhow::Result<Self> {
        Ok(Self { policy: None, ..Self::new(Value::Null)? })
    }

    /// One more version; an address without a listener is a version that refuses connections.
    pub fn version(mut self, name: &str, endpoints: &[SocketAddr]) -> Self {
        self.versions.push((name.to_owned(), endpoints.to_vec()));
        self
    }

    /// With the cluster of a controller.
    pub fn controller(mut self, address: SocketAddr) -> Self {
        self.controller = Some(address);
        self
    }

    /// Another module than [`artifacts::wasm`].
    pub fn wasm(mut self, module: &Path) -> Self {
        self.wasm = Some(module.to_owned());
        self
    }

    /// The routes' time-out; 15 s, as in Envoy, where this is not called.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// This many retries on 5xx and resets.
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// Calls these versions by HTTP/2, for gRPC and its trailers.
    pub fn http2(mut self, versions: &[&str]) -> Self {
        self.http2.extend(versions.iter().map(|&name| name.to_owned()));
        self
    }

    /// Writes an access log that [`AccessLog::read`] reads.
    pub fn access_log(mut self, file: &Path) -> Self {
        self.access_log = Some(file.to_owned());
        self
    }

    /// Where clients call.
    pub fn address(&self) -> SocketAddr {
        self.listen.address()
    }

    /// How to start an Envoy with it. Keep the bootstrap as long as that Envoy: the ports are reserved by it.
    pub fn envoy(&self) -> anyhow::Result<envoy::Options> {
        Ok(envoy::Options::new(self.to_json()?.to_string(), self.admin.number()))
    }

    /// The bootstrap itself.
    pub fn to_json(&self) -> anyhow::Result<Value> {
        let version = |(name, endpoints): &(String, Vec<_>)| cluster(name, endpoints, self.http2.contains(name));
        let mut clusters: Vec<Value> = self.versions.iter().map(version).collect();
        clusters.extend(self.controller.map(|address| cluster(CONTROLLER_CLUSTER, &[address], false)));
        Ok(json!({
            "admin": { "address": socket_address(self.admin.address()) },
            "stats_config": { "stats_tags": stats_tags() },
            // Histograms show nothing before the first flush, which would be after 5 s.
            "stats_flush_interval": "0.2s",
            "static_resources": {
                "listeners": [{
                    "name": "tests",
                    "address": socket_address(self.listen.address()),
                    // Few connections should still reach every worker.
                    "connection_balance_config": { "exact_balance": {} },
                    "filter_chains": [{ "filters": [{
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": self.connection_manager()?,
                    }] }],
                }],
                "clusters": clusters,
            },
        }))
    }

    fn connection_manager(&self) -> anyhow::Result<Value> {
        let mut filters = Vec::new();
        if let Some(policy) = &self.policy {
            let module = self.wasm.clone().map_or_else(artifacts::wasm, Ok)?;
            filters.push(filter("tideshift", &module, policy));
        }
        filters.push(json!({
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": type_url("extensions.filters.http.router.v3.Router") },
        }));
        let access_log: Vec<Value> = self.access_log.iter().map(|file| access_log(file)).collect();
        Ok(json!({
            "@type": type_url("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": "tests",
            "access_log": access_log,
            "http_filters": filters,
            "route_config": {
                "name": "tests",
                "ignore_port_in_host_matching": true,
                "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": self.routes() }],
            },
        }))
    }

    /// A header-match route for each version, then the default route.
    fn routes(&self) -> Vec<Value> {
        let retry_policy = (self.retries > 0).then(|| json!({ "retry_on": "5xx,reset", "num_retries": self.retries }));
        let route = |cluster: &str, headers: Value| {
            let mut action = json!({ "cluster": cluster, "timeout": seconds(self.timeout) });
            if let Some(retry_policy) = &retry_policy {
                action["retry_policy"] = retry_policy.clone();
            }
            json!({ "match": { "prefix": "/", "headers": headers }, "route": action })
        };
        let by_version = self
            .versions
            .iter()
            .map(|(name, _)| route(name, json!([{ "name": VERSION_HEADER, "string_match": { "exact": name } }])));
        let default = self.versions.first().map(|(name, _)| route(name, json!([])));
        by_version.chain(default).collect()
    }
}

/// One line of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLog {
    /// The version header as the upstream got it; `-` for none.
    pub version: String,
    /// The status.
    pub status: u16,
    /// Envoy's response flags, such as `UF` or `UT`; `-` for none.
    pub flags: String,
    /// The upstream cluster; `-` for none.
    pub cluster: String,
}

impl AccessLog {
    /// The lines so far; Envoy writes them within 50 ms.
    pub fn read(file: &Path) -> anyhow::Result<Vec<Self>> {
        let text = std::fs::read_to_string(file)?;
        text.lines().map(|line| Self::parse(line).ok_or_else(|| anyhow::anyhow!("access log: {line}"))).collect()
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ').map(str::to_owned);
        Some(Self {
            version: words.next()?,
            status: words.next()?.parse().ok()?,
            flags: words.next()?,
            cluster: words.next()?,
        })
    }
}

fn access_log(file: &Path) -> Value {
    let format = "%REQ(X-TIDESHIFT-VERSION)% %RESPONSE_CODE% %RESPONSE_FLAGS% %UPSTREAM_CLUSTER%\n";
    json!({
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": type_url("extensions.access_loggers.file.v3.FileAccessLog"),
            "path": file,
            "log_format": { "text_format_source": { "inline_string": format } },
        },
    })
}

/// The connection manager of a bootstrap.
pub fn manager(bootstrap: &mut Value) -> &mut Value {
    &mut bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
}

/// The route of a version; the first one, since the first version is the default route as well.
pub fn route<'b>(bootstrap: &'b mut Value, version: &str) -> &'b mut Value {
    let routes = &mut manager(bootstrap)["route_config"]["virtual_hosts"][0]["routes"];
    let mut routes = routes.as_array_mut().into_iter().flatten();
    routes.find(|route| route["route"]["cluster"] == version).expect("a version of the bootstrap")
}

/// The cluster of a version.
pub fn cluster_of<'b>(bootstrap: &'b mut Value, version: &str) -> &'b mut Value {
    let clusters = &mut bootstrap["static_resources"]["clusters"];
    let mut clusters = clusters.as_array_mut().into_iter().flatten();
    clusters.find(|cluster| cluster["name"] == version).expect("a version of the bootstrap")
}

/// Lets Envoy remove what clients send in our name before it comes to the filter, which a policy's
/// `stripClientHeaders: false` relies on.
pub fn strip_early(bootstrap: &mut Value) {
    manager(bootstrap)["early_header_mutation_extensions"] = json!([{
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": type_url("extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"),
            "mutations": [{ "remove_on_match": { "key_matcher": { "prefix": "x-tideshift-" } } }],
        },
    }]);
}

/// A module as an HTTP filter, in VMs of its own unless another one has the same `vm`.
pub fn filter(vm: &str, module: &Path, configuration: &Value) -> Value {
    json!({
        "name": vm,
        "typed_config": {
            "@type": type_url("extensions.filters.http.wasm.v3.Wasm"),
            "config": {
                "name": vm,
                "root_id": vm,
                "failure_policy": "FAIL_RELOAD",
                "vm_config": {
                    "vm_id": vm,
                    "runtime": "envoy.wasm.runtime.v8",
                    "code": { "local": { "filename": module } },
                },
                "configuration": {
                    "@type": "type.googleapis.com/google.protobuf.StringValue",
                    "value": configuration.to_string(),
                },
            },
        },
    })
}

/// Metric names carry their labels as `service=.=checkout;.;`: the first group is cut out, the second is the value.
pub fn stats_tags() -> Value {
    let tag = |name: &str| json!({ "tag_name": name, "regex": format!(r"({name}=\.=(.*?);\.;)") });
    json!(["service", "version", "outcome", "upto"].map(tag))
}

/// A cluster of these endpoints.
pub fn cluster(name: &str, endpoints: &[SocketAddr], http2: bool) -> Value {
    let endpoints: Vec<Value> =
        endpoints.iter().map(|&address| json!({ "endpoint": { "address": socket_address(address) } })).collect();
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": type_url("extensions.upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": { "http2_protocol_options": {} },
            },
        });
    }
    cluster
}

/// An address as Envoy's configuration has it.
pub fn socket_address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } })
}

/// The type URL of one of Envoy's messages.
pub fn type_url(name: &str) -> String {
    format!("type.googleapis.com/envoy.{name}")
}

fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}
