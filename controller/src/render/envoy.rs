//! `tideshift render envoy`: a complete Envoy bootstrap for TrafficShift documents. Listener, filter, a route for each
//! version by `x-tideshift-version`, clusters with health checks like the readiness probes, and the tags that give the
//! filter's metrics their labels.
//!
//! It is put together as text, from the outside in, because people read it, keep it and change it.

use super::kubernetes::{Unfit, namespace};
use super::yaml::{indent, json, list, scalar, seconds};
use crate::compile;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tideshift_core::protocol::policy::{ControllerRef, Policy};
use tideshift_core::shift::probe::{Check, HttpGet, Probe};
use tideshift_core::shift::{Discovery, Endpoint, ShiftService, ShiftVersion, TrafficShift};
use tideshift_core::{MIRROR_HEADER, OWN_HEADERS, VERSION_HEADER};

/// How long a request may take where the document says nothing: Envoy's own default.
const TIMEOUT: Duration = Duration::from_secs(15);

/// What the documents do not say.
#[derive(Debug, Clone)]
pub struct Options {
    /// The address on which Envoy accepts requests.
    pub listen: SocketAddr,
    /// The address of Envoy's admin interface; every client that reaches it can stop Envoy.
    pub admin: SocketAddr,
    /// The address of the controller.
    pub controller: Endpoint,
    /// The name of the controller's Envoy cluster.
    pub controller_cluster: String,
    /// The bearer token for the controller, if it wants one.
    pub controller_token: Option<String>,
    /// The certificates that the controller's TLS is verified by, as Envoy finds them; `None`: it speaks none.
    pub controller_ca: Option<String>,
    /// The filter's module, as Envoy finds it.
    pub module: String,
    /// A file for one line about each request; `-` is standard output.
    pub access_log: Option<String>,
}

/// Two clusters would have this name: the controller's, and that of a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the controller's cluster and that of version {version} of {service} would both be called {cluster}")]
pub struct NameTaken {
    cluster: String,
    service: String,
    version: String,
}

/// Documents for an Envoy in the cluster that they are of: with the names that the controller gives them there, and each
/// version's Service as its endpoint, which Envoy finds by DNS. Those that speak of no cluster stay as they are.
///
/// # Errors
///
/// If DNS has no name for a version.
pub fn in_cluster(shifts: Vec<TrafficShift>, service_port: u16) -> Result<Vec<TrafficShift>, Unfit> {
    let in_cluster = |mut shift: TrafficShift| {
        let mut versions = shift.services.iter().flat_map(|service| &service.versions);
        if versions.all(|version| version.discovery.is_none()) {
            return Ok(shift);
        }
        let namespace = namespace(&shift).to_owned();
        for service in &mut shift.services {
            let hosts: Vec<_> =
                service.versions.iter().map(|version| host(service, version, &namespace)).collect::<Result<_, _>>()?;
            for (version, host) in service.versions.iter_mut().zip(hosts) {
                version.endpoints = vec![Endpoint { host, port: service_port }];
            }
        }
        Ok(TrafficShift { namespace: Some(namespace), ..shift }.qualified())
    };
    shifts.into_iter().map(in_cluster).collect()
}

fn host(service: &ShiftService, version: &ShiftVersion, namespace: &str) -> Result<String, Unfit> {
    let unfit = |why: &str| Err(Unfit::version(service, version, why));
    match &version.discovery {
        _ if version.cluster.is_some() => unfit("is in another cluster; Envoy finds Services of its own alone"),
        Some(Discovery { service: Some(name), selector: None, .. }) => {
            Ok(format!("{name}.{namespace}.svc.cluster.local"))
        }
        _ => unfit("expected a service and no selector; Envoy finds whole Services, by DNS"),
    }
}

/// The whole bootstrap as YAML.
///
/// # Errors
///
/// If the controller's cluster has a version's name.
pub fn bootstrap(shifts: &[TrafficShift], options: &Options) -> Result<String, NameTaken> {
    for (service, version) in versions(shifts) {
        if cluster_name(service, &version.name) == options.controller_cluster {
            let cluster = options.controller_cluster.clone();
            return Err(NameTaken { cluster, service: service.name.clone(), version: version.name.clone() });
        }
    }
    let names: Vec<_> = shifts.iter().map(|shift| shift.name.as_str()).collect();
    let Options { listen, admin, controller, .. } = options;
    Ok(format!(
        r##"# An Envoy for the TrafficShift documents: {names}. Printed by `tideshift render envoy`, yours to keep and change.
# Clients call {listen}, metrics are at http://{admin}/stats/prometheus, the controller is asked at {controller}.

# The controller tells proxies apart by their id. Give each its own: `envoy --service-node NAME`.
node: {{id: tideshift, cluster: tideshift}}

admin:
  address: {admin_address}

static_resources:
  listeners:
{listener}
  # Health checks are like the readiness probes, so that requests avoid a lost endpoint before any weights move; without
  # retriable_statuses one bad answer would be enough, whatever unhealthy_threshold says. Retries are not held back: they
  # are of requests whose endpoint was not there or went away, two at most, so they make no storm.
  clusters:
{clusters}
{stats}"##,
        names = names.join(", "),
        admin_address = address(&admin.ip().to_string(), admin.port()),
        listener = indent(2, &listener(shifts, options)),
        clusters = indent(2, &clusters(shifts, options)),
        stats = STATS,
    ))
}

fn versions(shifts: &[TrafficShift]) -> impl Iterator<Item = (&ShiftService, &ShiftVersion)> {
    let services = shifts.iter().flat_map(|shift| &shift.services);
    services.flat_map(|service| service.versions.iter().map(move |version| (service, version)))
}

/// No service's name has a `_` in it, so no two versions share a cluster.
fn cluster_name(service: &ShiftService, version: &str) -> String {
    format!("{}_{version}", service.name)
}

fn listener(shifts: &[TrafficShift], options: &Options) -> String {
    let access_log = options.access_log.as_deref().map(access_log).unwrap_or_default();
    let of_shift = |shift: &TrafficShift| shift.services.iter().map(|of| virtual_host(shift, of)).collect::<String>();
    let virtual_hosts: String = shifts.iter().map(of_shift).collect();
    format!(
        r##"- name: tideshift
  address: {address}
  filter_chains:
  - filters:
    - name: envoy.filters.network.http_connection_manager
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
        stat_prefix: ingress_http
        # Clients are not trusted: what they say in x-envoy-* headers is removed, x-forwarded-for gets their address.
        use_remote_address: true
        upgrade_configs: [{{upgrade_type: websocket}}]
        # What they say in x-tideshift-* too; the filter need not look for it then.
        early_header_mutation_extensions:
        - name: envoy.http.early_header_mutation.header_mutation
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
            mutations:
            - remove_on_match: {{key_matcher: {{prefix: {OWN_HEADERS}}}}}
{access_log}        http_filters:
{filter}        - name: envoy.filters.http.router
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
        route_config:
          name: tideshift
          ignore_port_in_host_matching: true
          # A request that takes longer than `timeout` is an error of its version: 504, or an answer that is cut. It is the
          # document's timeoutSeconds, else Envoy's default of 15 s; 0s is no limit, which streams need.
          # Retries go to another endpoint of the same version: for every method what no endpoint has begun to work on, for
          # GET (which may be repeated) also what was under way on an endpoint that went away.
          virtual_hosts:
{virtual_hosts}"##,
        address = address(&options.listen.ip().to_string(), options.listen.port()),
        access_log = indent(8, &access_log),
        filter = indent(8, &filter(shifts, options)),
        virtual_hosts = indent(10, &virtual_hosts),
    )
}

fn access_log(path: &str) -> String {
    let (name, kind, path) = match path {
        "-" => ("stdout", "stream.v3.StdoutAccessLog", String::new()),
        path => ("file", "file.v3.FileAccessLog", format!("    path: {}\n", scalar(path))),
    };
    format!(
        r##"access_log:
- name: envoy.access_loggers.{name}
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.access_loggers.{kind}
{path}    log_format:
      text_format_source:
        inline_string: "%START_TIME% %REQ(:METHOD)% %REQ(:AUTHORITY)%%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% \
          version=%REQ({version})% status=%RESPONSE_CODE% flags=%RESPONSE_FLAGS% ms=%DURATION% \
          upstream=%UPSTREAM_HOST%\n"
"##,
        version = VERSION_HEADER.to_ascii_uppercase(),
    )
}

fn filter(shifts: &[TrafficShift], options: &Options) -> String {
    let controller = ControllerRef {
        cluster: options.controller_cluster.clone(),
        authority: "tideshift-controller".to_owned(),
        token: options.controller_token.clone(),
    };
    let services = shifts.iter().flat_map(compile::at_rest).collect();
    let policy = Policy { controller: Some(controller), strip_client_headers: false, services, ..Policy::default() };
    let policy = serde_json::to_value(policy).unwrap_or_default();
    format!(
        r##"- name: tideshift
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
    config:
      name: tideshift
      root_id: tideshift
      failure_policy: FAIL_RELOAD
      vm_config:
        vm_id: tideshift
        runtime: envoy.wasm.runtime.v8
        code: {{local: {{filename: {module}}}}}
      # In force until the controller has answered: all to the stable versions.
      configuration:
        "@type": type.googleapis.com/google.protobuf.StringValue
        value: |
{policy}
"##,
        module = scalar(&options.module),
        policy = indent(10, &json(&policy, 90)),
    )
}

fn virtual_host(shift: &TrafficShift, service: &ShiftService) -> String {
    let route = RouteOptions {
        timeout: seconds(service.timeout.unwrap_or(TIMEOUT)),
        has_mirror: shift.strategy.warm_up.mirror_percent.is_some() || has_mirror(service),
    };
    let every = ["*".to_owned()];
    let domains = if service.hostnames.is_empty() { &every[..] } else { &service.hostnames[..] };
    let mut routes = String::new();
    for version in &service.versions {
        let is_version = format!("{{name: {VERSION_HEADER}, string_match: {{exact: {}}}}}", scalar(&version.name));
        // The policy of the first route has a name, for the others to refer to.
        let policy = match routes.is_empty() {
            true => format!("&get\n      retry_on: connect-failure,refused-stream,reset\n{}", indent(2, OTHER_HOST)),
            false => "*get\n".to_owned(),
        };
        let cluster = cluster_name(service, &version.name);
        routes.push_str(&pair_of_routes(Some(&is_version), &cluster, &policy, &route));
    }
    routes.push_str("# No version in service, or no filter: the stable one.\n");
    routes.push_str(&pair_of_routes(None, &cluster_name(service, &shift.stable), "*get\n", &route));
    format!(
        r##"- name: {name}
  domains: {domains}
  retry_policy:
    retry_on: connect-failure,refused-stream,reset-before-request
{OTHER_HOST}  routes:
{routes}"##,
        name = scalar(&service.name),
        domains = list(domains),
        routes = indent(2, &routes),
    )
}

fn has_mirror(service: &ShiftService) -> bool {
    service.mirror.is_some() || service.rules.iter().any(|rule| rule.mirror.is_some())
}

/// What all routes of a service have.
struct RouteOptions {
    timeout: String,
    has_mirror: bool,
}

/// Routes to a cluster: for GET, with a retry policy of its own, and for all other methods.
fn pair_of_routes(is_version: Option<&str>, cluster: &str, policy: &str, options: &RouteOptions) -> String {
    let RouteOptions { timeout, has_mirror } = options;
    let is_get = r#"{name: ":method", string_match: {exact: GET}}"#;
    let gets: Vec<_> = is_version.into_iter().chain([is_get]).collect();
    let others = is_version.map(|is_version| format!(", headers: [{is_version}]")).unwrap_or_default();
    let cluster = scalar(cluster);
    // The filter names the cluster that gets a copy, if one does.
    let mirror = if *has_mirror { format!("[{{cluster_header: {MIRROR_HEADER}}}]") } else { String::new() };
    let field = |before: &str, after: &str| match has_mirror {
        true => format!("{before}request_mirror_policies: {mirror}{after}"),
        false => String::new(),
    };
    format!(
        "- match: {{prefix: /, headers: [{}]}}\n  route:\n    cluster: {cluster}\n    timeout: {timeout}\n{}    retry_policy: {policy}\
         - match: {{prefix: /{others}}}\n  route: {{cluster: {cluster}, timeout: {timeout}{}}}\n",
        gets.join(", "),
        field("    ", "\n"),
        field(", ", ""),
    )
}

/// How a retry finds another endpoint of its cluster.
const OTHER_HOST: &str = r##"    num_retries: 2
    retry_host_predicate:
    - name: envoy.retry_host_predicates.previous_hosts
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate
    host_selection_retry_max_attempts: 3
"##;

fn clusters(shifts: &[TrafficShift], options: &Options) -> String {
    let mut clusters: String = versions(shifts).map(|(service, version)| version_cluster(service, version)).collect();
    let controller = std::slice::from_ref(&options.controller);
    let head = cluster_head(&options.controller_cluster, controller);
    clusters.push_str(&head);
    clusters.push_str(&options.controller_ca.as_deref().map(|ca| tls(ca, &options.controller)).unwrap_or_default());
    clusters.push_str(&indent(2, &load_assignment(&options.controller_cluster, controller, |_| None)));
    clusters
}

/// TLS to the controller, whose certificate must be for the host that it is called by.
fn tls(ca: &str, controller: &Endpoint) -> String {
    let host = scalar(&controller.host);
    let (kind, sni) = match controller.host.parse::<IpAddr>() {
        Ok(_) => ("IP_ADDRESS", String::new()),
        Err(_) => ("DNS", format!("      sni: {host}\n")),
    };
    format!(
        r##"  transport_socket:
    name: envoy.transport_sockets.tls
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
{sni}      common_tls_context:
        validation_context:
          trusted_ca: {{filename: {ca}}}
          match_typed_subject_alt_names: [{{san_type: {kind}, matcher: {{exact: {host}}}}}]
"##,
        ca = scalar(ca),
    )
}

fn version_cluster(service: &ShiftService, version: &ShiftVersion) -> String {
    let name = cluster_name(service, &version.name);
    let checks = match version.readiness_probe.as_ref().map(|probe| (probe, HealthCheck::of(probe))) {
        None => String::new(),
        Some((probe, Ok(check))) => health_checks(probe, &check),
        Some((_, Err(why))) => format!("# No health checks: {why}; the controller's probes decide.\n"),
    };
    let config = |endpoint: &Endpoint| {
        let probe = version.readiness_probe.as_ref()?;
        HealthCheck::of(probe).ok()?.endpoint_config(endpoint)
    };
    let protocols = version.readiness_probe.as_ref().map(protocols).unwrap_or_default();
    format!(
        "{}  circuit_breakers: {{thresholds: [{{max_retries: 1024}}]}}\n{}{}{}",
        cluster_head(&name, &version.endpoints),
        indent(2, &protocols),
        indent(2, &checks),
        indent(2, &load_assignment(&name, &version.endpoints, config)),
    )
}

/// Envoy calls `grpc.health.v1` only of clusters that speak HTTP/2. Endpoints that answer it on their own port do; what
/// those do that have another port for it is left to the client, who speaks HTTP/2 for gRPC.
fn protocols(probe: &Probe) -> String {
    let protocols = match &probe.check {
        Check::Grpc { port: None, .. } => "explicit_http_config: {http2_protocol_options: {}}",
        Check::Grpc { port: Some(_), .. } => {
            "use_downstream_protocol_config: {http_protocol_options: {}, http2_protocol_options: {}}"
        }
        _ => return String::new(),
    };
    format!(
        r##"typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    {protocols}
"##
    )
}

fn cluster_head(name: &str, endpoints: &[Endpoint]) -> String {
    let is_address = |endpoint: &Endpoint| endpoint.host.parse::<IpAddr>().is_ok();
    let kind = match endpoints.iter().all(is_address) {
        true => "STATIC",
        false => "STRICT_DNS\n  dns_lookup_family: V4_PREFERRED",
    };
    // A dot in the name would end the cluster's name in Envoy's metrics.
    let alias = name.contains('.').then(|| format!("  alt_stat_name: {}\n", scalar(&name.replace('.', "_"))));
    format!("- name: {}\n{}  type: {kind}\n  connect_timeout: 1s\n", scalar(name), alias.unwrap_or_default())
}

fn load_assignment(name: &str, endpoints: &[Endpoint], config: impl Fn(&Endpoint) -> Option<String>) -> String {
    let endpoint = |endpoint: &Endpoint| {
        let config = config(endpoint).map(|config| format!(", health_check_config: {config}")).unwrap_or_default();
        format!("    - endpoint: {{address: {}{config}}}\n", address(&endpoint.host, endpoint.port))
    };
    let endpoints = match endpoints {
        [] => "  endpoints: []\n".to_owned(),
        endpoints => format!("  endpoints:\n  - lb_endpoints:\n{}", endpoints.iter().map(endpoint).collect::<String>()),
    };
    format!("load_assignment:\n  cluster_name: {}\n{endpoints}", scalar(name))
}

fn address(host: &str, port: u16) -> String {
    format!("{{socket_address: {{address: {}, port_value: {port}}}}}", scalar(host))
}

/// A readiness probe that Envoy can do as well.
struct HealthCheck<'p> {
    /// In place of the endpoint's own address and port.
    host: Option<IpAddr>,
    port: Option<u16>,
    asks: Asks<'p>,
}

/// What a health check asks.
enum Asks<'p> {
    /// For a connection, no more.
    Tcp,
    Http(&'p HttpGet),
    /// For the health of a service.
    Grpc(&'p str),
}

impl<'p> HealthCheck<'p> {
    /// Or why Envoy cannot do it.
    fn of(probe: &'p Probe) -> Result<Self, &'static str> {
        let (host, port, asks) = match &probe.check {
            Check::HttpGet(get) if get.https => return Err("Envoy would probe without TLS"),
            Check::HttpGet(get) => (get.host.as_ref(), get.port, Asks::Http(get)),
            Check::TcpSocket { host, port } => (host.as_ref(), *port, Asks::Tcp),
            Check::Exec { .. } => return Err("Envoy runs no commands"),
            Check::Grpc { port, service } => (None, *port, Asks::Grpc(service)),
        };
        let host = host.map(|host| host.parse()).transpose();
        Ok(Self { host: host.map_err(|_| "Envoy probes addresses, not other host names")?, port, asks })
    }

    /// What is different for one endpoint: where it is probed, and the host that it is called by, which is the probed
    /// address as in Kubernetes and would be the cluster's name in Envoy.
    fn endpoint_config(&self, endpoint: &Endpoint) -> Option<String> {
        let host = self.host.map(|host| host.to_string());
        let port = self.port.filter(|port| *port != endpoint.port);
        let mut fields = Vec::new();
        let called_by = match self.asks {
            Asks::Http(get) if host_header(get).is_none() => Some(get.host.as_ref().unwrap_or(&endpoint.host)),
            Asks::Grpc(_) => Some(&endpoint.host),
            _ => None,
        };
        if let Some(host) = called_by.cloned() {
            let probed = Endpoint { host, port: self.port.unwrap_or(endpoint.port) };
            fields.push(format!("hostname: {}", scalar(&probed.to_string())));
        }
        if let Some(host) = host.filter(|host| *host != endpoint.host) {
            fields.push(format!("address: {}", address(&host, self.port.unwrap_or(endpoint.port))));
        }
        fields.extend(port.map(|port| format!("port_value: {port}")));
        (!fields.is_empty()).then(|| format!("{{{}}}", fields.join(", ")))
    }
}

fn host_header(get: &HttpGet) -> Option<&str> {
    let header = get.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
    header.map(|(_, value)| value.as_str())
}

fn health_checks(probe: &Probe, check: &HealthCheck<'_>) -> String {
    let kind = match check.asks {
        Asks::Tcp => "  tcp_health_check: {}\n".to_owned(),
        Asks::Http(get) => http_health_check(get),
        Asks::Grpc(service) => grpc_health_check(service),
    };
    format!(
        r##"# Endpoints that fail their checks get requests only if all fail; by default that is so once half of them do.
# What the checks find out holds at once; by default a second change waits until a second after the first.
common_lb_config: {{healthy_panic_threshold: {{value: 1}}, update_merge_window: 0s}}
# Those that fail them are checked more often, so that Envoy knows of one that is ready before it gets weight.
health_checks:
- interval: {interval}
  no_traffic_interval: {comeback}
  no_traffic_healthy_interval: {interval}
  unhealthy_interval: {comeback}
  timeout: {timeout}
  healthy_threshold: {healthy}
  unhealthy_threshold: {unhealthy}
  reuse_connection: false
{kind}"##,
        interval = seconds(probe.period),
        comeback = seconds(probe.comeback_period()),
        timeout = seconds(probe.timeout),
        healthy = probe.success_threshold,
        unhealthy = probe.failure_threshold,
    )
}

fn http_health_check(get: &HttpGet) -> String {
    let header = |(name, value): &(String, String)| {
        // Envoy reads `%` in header values as the start of a variable.
        let value = value.replace('%', "%%");
        format!("    - header: {{key: {}, value: {}}}\n", scalar(name), scalar(&value))
    };
    let host = host_header(get).map(|host| format!("    host: {}\n", scalar(host))).unwrap_or_default();
    let others = get.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host"));
    let others: String = others.map(header).collect();
    let others = if others.is_empty() { others } else { format!("    request_headers_to_add:\n{others}") };
    format!(
        r##"  http_health_check:
    path: {path}
{host}{others}    expected_statuses: [{{start: 200, end: 400}}]
    retriable_statuses: [{{start: 100, end: 600}}]
"##,
        path = scalar(&get.path),
    )
}

fn grpc_health_check(service: &str) -> String {
    let service = if service.is_empty() { String::new() } else { format!("service_name: {}", scalar(service)) };
    format!(
        "  # One answer other than SERVING is enough, whatever unhealthy_threshold says; Envoy has no setting for that.\n  \
         grpc_health_check: {{{service}}}\n"
    )
}

/// The filter's metrics carry their labels in their names, as `wasmcustom.service=.=checkout;.;version=.=v1;.;…`.
const STATS: &str = r##"# The filter's metrics with labels: tideshift_requests_total{service="checkout",version="v1",outcome="ok"}.
stats_config:
  stats_tags:
  - {tag_name: service, regex: '^wasmcustom\..*?(service=\.=(.*?);\.;)'}
  - {tag_name: version, regex: '^wasmcustom\..*?(version=\.=(.*?);\.;)'}
  - {tag_name: upto, regex: '^wasmcustom\..*?(upto=\.=(.*?);\.;)'}
  - {tag_name: outcome, regex: '^wasmcustom\..*?(outcome=\.=(.*?);\.;)'}
"##;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::BTreeSet;

    fn shift(document: &str) -> TrafficShift {
        let value: Value = serde_saphyr::from_str(document).unwrap();
        TrafficShift::read(&value).unwrap()
    }

    fn options() -> Options {
        Options {
            listen: "127.0.0.1:10000".parse().unwrap(),
            admin: "127.0.0.1:9901".parse().unwrap(),
            controller: Endpoint { host: "tideshift.internal".to_owned(), port: 7460 },
            controller_cluster: "tideshift_controller".to_owned(),
            controller_token: None,
            controller_ca: None,
            module: "target/tideshift.wasm".to_owned(),
            access_log: Some("-".to_owned()),
        }
    }

    /// Every kind of endpoint and of probe.
    const CHECKOUT: &str = r##"
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: checkout}
spec:
  hostnames: [checkout.example.com, "*.shop.example.com"]
  versions:
  - name: v1
    endpoints: ["127.0.0.1:9001", "127.0.0.1:9011"]
    readinessProbe:
      httpGet: {path: "/health?deep=1", httpHeaders: [{name: Host, value: shop}, {name: X-A, value: "100%"}]}
  - name: v2
    endpoints: ["127.0.0.1:9002"]
    readinessProbe: {httpGet: {path: /health, port: 9102}, periodMillis: 250, successThreshold: 2}
  - {name: v3, endpoints: ["localhost:9003"], readinessProbe: {tcpSocket: {port: 9103}}}
  - {name: "4.0", endpoints: ["[::1]:9004"], readinessProbe: {exec: {command: ["true"]}}}
  - {name: "5", endpoints: ["127.0.0.1:9005"], readinessProbe: {httpGet: {scheme: HTTPS}}}
  - {name: v6}
  - {name: v7, endpoints: ["127.0.0.1:9007"], readinessProbe: {httpGet: {host: 127.0.0.2, port: 80}}}
  - {name: v8, endpoints: ["127.0.0.1:9008"], readinessProbe: {tcpSocket: {host: elsewhere.internal}}}
  - {name: v9, endpoints: ["127.0.0.1:9009"], readinessProbe: {grpc: {}}}
  - {name: v10, endpoints: ["127.0.0.1:9010"], readinessProbe: {grpc: {port: 9110, service: shop.Cart}}}
  stable: v1
  rules:
  - name: beta
    matches: [{headers: [{name: x-beta, value: "1"}]}]
    versions: [{name: v2}]
"##;

    /// Accepted by Envoy 1.40.0 with `--mode validate`; the end-to-end tests ask it again.
    #[test]
    fn the_bootstrap_is_what_it_was() {
        let search = "{apiVersion: tideshift.dev/v1alpha1, kind: TrafficShift, metadata: {name: search}, \
                      spec: {versions: [{name: blue, endpoints: [\"127.0.0.1:9021\"]}, {name: green}], stable: blue}}";
        let bootstrap = bootstrap(&[shift(CHECKOUT), shift(search)], &options()).unwrap();
        insta::assert_snapshot!(bootstrap);
    }

    #[test]
    fn the_bootstrap_is_yaml_with_a_policy_that_the_filter_takes() {
        let checkout = shift(CHECKOUT);
        let bootstrap = bootstrap(std::slice::from_ref(&checkout), &options()).unwrap();
        let bootstrap: Value = serde_saphyr::from_str(&bootstrap).unwrap();
        let chain = &bootstrap["static_resources"]["listeners"][0]["filter_chains"][0];
        let manager = &chain["filters"][0]["typed_config"];
        let policy = &manager["http_filters"][0]["typed_config"]["config"]["configuration"]["value"];
        let policy = Policy::from_json(policy.as_str().unwrap().as_bytes()).unwrap();
        assert_eq!((policy.revision, policy.services.len()), (0, 1));
        assert_eq!(
            (&policy.services[0].rules, &policy.services[0].errors),
            (&checkout.services[0].rules, &checkout.services[0].errors)
        );
        let weights: Vec<_> = policy.services[0].versions.iter().map(|v| (v.weight, v.serving)).collect();
        assert_eq!(weights[..3], [(100, true), (0, true), (0, true)]);
        assert_eq!(weights[5], (0, false), "a rule must not lead to a version without endpoints");
        let clusters = bootstrap["static_resources"]["clusters"].as_array().unwrap();
        let names: Vec<_> = clusters.iter().map(|cluster| &cluster["name"]).collect();
        let routes = manager["route_config"]["virtual_hosts"][0]["routes"].as_array().unwrap();
        assert_eq!(routes.len(), 2 * checkout.services[0].versions.len() + 2);
        assert!(routes.iter().all(|route| names.contains(&&route["route"]["cluster"])));
        assert_eq!(routes.last().unwrap()["match"], json!({"prefix": "/"}));
    }

    #[test]
    fn requests_may_take_as_long_as_the_document_says() {
        let timeouts = |document: &str| {
            let bootstrap = bootstrap(&[shift(document)], &options()).unwrap();
            let bootstrap: Value = serde_saphyr::from_str(&bootstrap).unwrap();
            let chain = &bootstrap["static_resources"]["listeners"][0]["filter_chains"][0];
            let hosts = &chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"];
            let timeouts = |host: &Value| {
                let routes = host["routes"].as_array().unwrap();
                let timeouts: BTreeSet<_> = routes.iter().map(|route| route["route"]["timeout"].to_string()).collect();
                timeouts.into_iter().collect::<Vec<_>>().join(" ")
            };
            hosts.as_array().unwrap().iter().map(timeouts).collect::<Vec<_>>()
        };
        assert_eq!(timeouts(CHECKOUT), [r#""15s""#], "Envoy's own default");
        for (said, expected) in [(0, r#""0s""#), (60, r#""60s""#), (86_400, r#""86400s""#)] {
            assert_eq!(timeouts(&format!("{CHECKOUT}  timeoutSeconds: {said}\n")), [expected]);
        }
        let service = |name: &str, further: &str| {
            format!("{{name: {name}, hostnames: [{name}], versions: [{{name: v1}}]{further}}}")
        };
        let several = format!(
            "{{apiVersion: tideshift.dev/v1alpha1, kind: TrafficShift, metadata: {{name: shop}}, \
             spec: {{stable: v1, services: [{}, {}]}}}}",
            service("cart", ", timeoutSeconds: 0"),
            service("search", ""),
        );
        assert_eq!(timeouts(&several), [r#""0s""#, r#""15s""#], "each service its own");
    }

    #[test]
    fn the_controller_is_called_with_a_token_and_by_tls_where_it_wants_that() {
        let bootstrap = |host: &str| {
            let controller = Endpoint { host: host.to_owned(), port: 7460 };
            let token = Some("0123456789abcdef".to_owned());
            let options =
                Options { controller, controller_token: token, controller_ca: Some("/ca.pem".to_owned()), ..options() };
            let text = bootstrap(&[shift(CHECKOUT)], &options).unwrap();
            assert!(text.contains(r#""token": "0123456789abcdef""#), "{text}");
            let bootstrap: Value = serde_saphyr::from_str(&text).unwrap();
            let clusters = bootstrap["static_resources"]["clusters"].as_array().unwrap();
            assert!(clusters[..clusters.len() - 1].iter().all(|cluster| cluster["transport_socket"].is_null()));
            clusters.last().unwrap()["transport_socket"]["typed_config"].clone()
        };
        let trusted = |kind: &str, host: &str| {
            json!({"validation_context": {
                "trusted_ca": {"filename": "/ca.pem"},
                "match_typed_subject_alt_names": [{"san_type": kind, "matcher": {"exact": host}}],
            }})
        };
        let name = bootstrap("tideshift.internal");
        assert_eq!(
            (&name["sni"], &name["common_tls_context"]),
            (&json!("tideshift.internal"), &trusted("DNS", "tideshift.internal"))
        );
        let address = bootstrap("::1");
        assert_eq!((&address["sni"], &address["common_tls_context"]), (&Value::Null, &trusted("IP_ADDRESS", "::1")));
    }

    #[test]
    fn in_a_cluster_envoy_finds_services_and_calls_them_as_the_controller_does() {
        let document = |v1: &str| {
            let versions = format!("[{{name: v1, {v1}}}, {{name: v2, service: pay-v2, port: 8080}}]");
            format!(
                "apiVersion: tideshift.dev/v1alpha1\nkind: TrafficShift\nmetadata: {{name: pay, namespace: shop}}\n\
                 spec: {{versions: {versions}, stable: v1}}\n"
            )
        };
        let read = |v1: &str| in_cluster(vec![shift(&document(v1))], 80);
        let shifts = read("service: pay-v1").unwrap();
        assert_eq!(shifts[0].services[0].name, "pay.shop");
        let endpoints: Vec<_> = versions(&shifts).map(|(_, version)| version.endpoints[0].to_string()).collect();
        assert_eq!(endpoints, ["pay-v1.shop.svc.cluster.local:80", "pay-v2.shop.svc.cluster.local:80"]);
        let error = read("selector: {matchLabels: {app: pay}}").unwrap_err().to_string();
        assert_eq!(error, "version v1 of pay: expected a service and no selector; Envoy finds whole Services, by DNS");
        assert!(read("service: pay-v1, cluster: west").unwrap_err().to_string().contains("another cluster"));
        let outside = vec![shift(CHECKOUT)];
        assert_eq!(in_cluster(outside.clone(), 80), Ok(outside));
    }

    #[test]
    fn the_controllers_cluster_has_a_name_of_its_own() {
        let options = Options { controller_cluster: "checkout_v2".to_owned(), ..options() };
        let taken = bootstrap(&[shift(CHECKOUT)], &options).unwrap_err().to_string();
        assert!(taken.ends_with("version v2 of checkout would both be called checkout_v2"), "{taken}");
    }
}
