//! `tideshift render istio`: the filter for Istio's proxies (WasmPlugin), and what leads to each version by
//! `x-tideshift-version` (VirtualService, and subsets in a DestinationRule where versions share a Service).
//!
//! Nothing of it changes during a rollout: weights come to the filter by the controller.

use super::kubernetes::{
    Filter, Unfit, check_names, configuration, discovery, label_map, labels, metadata, mirrors, names, namespace,
    services, without_dots,
};
use super::yaml::{indent, json, list, scalar, seconds};
use std::collections::BTreeMap;
use tideshift_core::VERSION_HEADER;
use tideshift_core::shift::{Endpoint, ShiftService, ShiftVersion, TrafficShift};

/// What the documents do not say.
#[derive(Debug, Clone)]
pub struct Options {
    /// The proxies that choose.
    pub proxies: Proxies,
    /// The namespace that these proxies run in.
    pub namespace: String,
    /// The filter's module and the controller.
    pub filter: Filter,
    /// What becomes of requests when the filter cannot run.
    pub fail_strategy: FailStrategy,
    /// The Service of versions that name none, where it is not called like the service of the document.
    pub service: Option<String>,
    /// The port of the versions' Services.
    pub service_port: u16,
    /// What Istio calls the cluster of the versions that name none; must be there if any does.
    pub cluster: Option<String>,
}

/// Whose proxies choose.
#[derive(Debug, Clone)]
pub enum Proxies {
    /// Gateways, for requests from outside.
    Gateway {
        /// The Gateway that takes the hosts, as `NAMESPACE/NAME`.
        gateway: String,
        /// The labels of the gateway's pods.
        selector: BTreeMap<String, String>,
    },
    /// The sidecars of callers in the mesh.
    Sidecar {
        /// The labels of the callers' pods; none: every pod of the namespace.
        selector: BTreeMap<String, String>,
    },
    /// A waypoint of the callees, in an ambient mesh.
    Waypoint {
        /// The name of its Gateway.
        name: String,
    },
}

/// What becomes of requests when the filter cannot run: its module cannot be fetched, or it has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FailStrategy {
    /// They go on without it, to the stable version.
    #[value(name = "FAIL_OPEN")]
    Open,
    /// They are refused.
    #[value(name = "FAIL_CLOSE")]
    Close,
    /// They are refused if the module cannot be fetched; if it has failed, it is started again (Istio 1.27 and later).
    #[value(name = "FAIL_RELOAD")]
    Reload,
}

/// All objects as YAML documents.
///
/// # Errors
///
/// If a version is nowhere in Kubernetes, or where Istio's routes cannot lead to; if names clash; and in a mesh, where
/// proxies see all that a pod calls, if a service takes every host.
pub fn objects(shifts: &[TrafficShift], options: &Options) -> Result<String, Unfit> {
    let mut objects = format!("{}{}", head(shifts, options), plugin(shifts, options));
    let mut subsets: BTreeMap<(&str, String), Vec<Subset>> = BTreeMap::new();
    let mut routes = String::new();
    for (shift, service) in services(shifts) {
        check_names(service)?;
        let destinations = destinations(service, options)?;
        routes.push_str(&virtual_service(shift, service, &destinations, options)?);
        for Destination { service, subset, .. } in destinations {
            if let Some(subset) = subset {
                subsets.entry((namespace(shift), service)).or_default().push(subset);
            }
        }
    }
    for ((namespace, service), subsets) in &subsets {
        objects.push_str(&destination_rule(namespace, service, subsets));
    }
    Ok(objects + &routes)
}

/// What a route leads to.
struct Destination<'d> {
    version: &'d ShiftVersion,
    /// The Service's name.
    service: String,
    /// Which of its endpoints; none: all.
    subset: Option<Subset>,
}

/// Endpoints of a Service, by their labels.
struct Subset {
    name: String,
    labels: BTreeMap<String, String>,
}

/// Where each version of a service is.
fn destinations<'d>(service: &'d ShiftService, options: &Options) -> Result<Vec<Destination<'d>>, Unfit> {
    /// The label that Istio gives to endpoints in a mesh of several clusters.
    const CLUSTER: &str = "topology.istio.io/cluster";
    let several = service.versions.iter().any(|version| version.cluster.is_some());
    let destination = |version: &'d ShiftVersion| {
        let mut labels = labels(service, version)?;
        if several {
            let missing = "cluster is missing, and others have one; say by --cluster what Istio calls its own";
            let cluster = version.cluster.as_ref().or(options.cluster.as_ref());
            let cluster = cluster.ok_or_else(|| Unfit::version(service, version, missing))?;
            labels.insert(CLUSTER.to_owned(), cluster.clone());
        }
        let own = discovery(service, version)?.service.clone();
        let subset = (!labels.is_empty()).then(|| Subset { name: without_dots(version), labels });
        Ok(Destination { version, service: own.unwrap_or_else(|| called(service, options)), subset })
    };
    service.versions.iter().map(destination).collect()
}

/// The Service that callers call, and that versions without one of their own are in.
fn called(service: &ShiftService, options: &Options) -> String {
    options.service.clone().unwrap_or_else(|| service.name.clone())
}

fn host(service: &str, namespace: &str) -> String {
    format!("{service}.{namespace}.svc.cluster.local")
}

/// What Istio calls the cluster of a Service's port in its proxies.
fn cluster(endpoint: &Endpoint) -> String {
    format!("outbound|{}||{}", endpoint.port, endpoint.host)
}

fn head(shifts: &[TrafficShift], options: &Options) -> String {
    let (whom, known) = match &options.proxies {
        Proxies::Gateway { .. } => (
            "gateways",
            "# The gateway must know the controller's Service, as gateways do unless PILOT_FILTER_GATEWAY_CLUSTER_CONFIG is on.\n",
        ),
        Proxies::Sidecar { .. } => (
            "the sidecars of callers",
            "# The sidecars must know the controller's Service: a Sidecar that narrows egress.hosts must list its namespace too.\n",
        ),
        Proxies::Waypoint { .. } => ("a waypoint", ""),
    };
    format!(
        "\
# Istio, {whom}: the TrafficShift documents {names}. Printed by `tideshift render istio`, yours to keep and change.
#
# Weights are not in it. All requests go to the stable version until the controller has answered; from then on the weights
# come from there, and no object here changes during a rollout.
{known}# The filter's metrics get their labels if the proxies' pods have the annotation
# sidecar.istio.io/extraStatTags: service,version,outcome,upto (or the mesh, as defaultConfig.extraStatTags).
---
",
        names = names(shifts),
    )
}

fn plugin(shifts: &[TrafficShift], options: &Options) -> String {
    let Filter { module_url, module_sha256, controller, .. } = &options.filter;
    let whom = match &options.proxies {
        Proxies::Gateway { selector, .. } => format!("  selector: {{matchLabels: {}}}\n", label_map(selector)),
        Proxies::Sidecar { selector } => {
            let selector = match selector.is_empty() {
                true => "  # Every sidecar of the namespace; --selector narrows that.\n".to_owned(),
                false => format!("  selector: {{matchLabels: {}}}\n", label_map(selector)),
            };
            format!("{selector}  match: [{{mode: CLIENT}}] # what they call, not what calls them\n")
        }
        Proxies::Waypoint { name } => {
            let name = scalar(name);
            format!("  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {name}}}]\n")
        }
    };
    let sha256 = match module_sha256 {
        Some(sha256) => format!("  sha256: {}\n", scalar(sha256)),
        None => "  # sha256: what `make image` prints. Without it whatever the URL gives is run.\n".to_owned(),
    };
    let fails = match options.fail_strategy {
        FailStrategy::Open => "FAIL_OPEN # without the module, requests go to the stable version",
        FailStrategy::Close => "FAIL_CLOSE # without the module, every request is refused",
        FailStrategy::Reload => "FAIL_RELOAD # without the module, every request is refused",
    };
    let configuration = json(&configuration(shifts, &options.filter, cluster(controller)), 110);
    format!(
        "\
# One for these proxies, for all the services whose traffic they shift: two filters would undo each other's work.
apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {metadata}
spec:
{whom}  url: {url}
{sha256}  failStrategy: {fails}
  pluginName: tideshift
  # In force until the controller has answered: all to the stable versions. Numbers pass through doubles here, so those that
  # may be large (revision) are texts.
  pluginConfig:
{configuration}
",
        metadata = metadata("tideshift", &options.namespace),
        url = scalar(module_url),
        configuration = indent(4, &configuration),
    )
}

fn destination_rule(namespace: &str, service: &str, subsets: &[Subset]) -> String {
    let subset =
        |Subset { name, labels }: &Subset| format!("  - {{name: {}, labels: {}}}\n", scalar(name), label_map(labels));
    format!(
        "\
---
# The versions as parts of one Service, by their pods' labels. A host has one DestinationRule: if there is one already, it
# gets these subsets.
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {metadata}
spec:
  host: {host}
  subsets:
{subsets}",
        metadata = metadata(service, namespace),
        host = scalar(&host(service, namespace)),
        subsets = subsets.iter().map(subset).collect::<String>(),
    )
}

fn virtual_service(
    shift: &TrafficShift,
    service: &ShiftService,
    destinations: &[Destination<'_>],
    options: &Options,
) -> Result<String, Unfit> {
    let namespace = namespace(shift);
    let (name, hosts, gateways) = match &options.proxies {
        Proxies::Gateway { gateway, .. } => {
            (service.name.clone(), hosts_at_gateways(service), format!("  gateways: {}\n", list([gateway])))
        }
        _ if service.hostnames.is_empty() => {
            let called = called(service, options);
            let why = format!(
                "hostnames is missing, which means every host, and these proxies see other services' requests too; expected \
                 what callers call it by, such as {called}, {called}.{namespace} and {}",
                host(&called, namespace)
            );
            return Err(Unfit::service(service, why));
        }
        // A name of its own, so that it can stand beside that of a gateway.
        _ => (format!("{}-mesh", service.name), list([host(&called(service, options), namespace)]), String::new()),
    };
    // Istio refuses 0s, and has no time-out where none is set.
    let timeout = service.timeout.filter(|timeout| !timeout.is_zero());
    let about_timeouts = match (timeout, service.timeout) {
        (Some(_), _) => "The timeout is the document's timeoutSeconds.",
        (None, Some(_)) => "No timeout, which in Istio is none, as the document says.",
        (None, None) => "No timeout, which in Istio is none: the document has no timeoutSeconds.",
    };
    let timeout = timeout.map(|timeout| format!("    timeout: {}\n", seconds(timeout))).unwrap_or_default();
    let route = |to: &Destination<'_>| {
        let subset = to.subset.as_ref().map(|subset| format!(", subset: {}", scalar(&subset.name))).unwrap_or_default();
        let (host, port) = (scalar(&host(&to.service, namespace)), options.service_port);
        format!("    route: [{{destination: {{host: {host}{subset}, port: {{number: {port}}}}}}}]\n{timeout}")
    };
    let mut routes = String::new();
    for to in destinations {
        let version = scalar(&to.version.name);
        let is_version = format!("{{headers: {{{VERSION_HEADER}: {{exact: {version}}}}}}}");
        routes.push_str(&format!("  - name: {version}\n    match: [{is_version}]\n{}", route(to)));
    }
    if matches!(options.proxies, Proxies::Waypoint { .. }) {
        routes.push_str(&known_to_waypoints(&options.filter.controller));
    }
    if let Some(stable) = destinations.iter().find(|to| to.version.name == shift.stable) {
        let why = "  # No version in service, or no filter: the stable one.\n";
        routes.push_str(&format!("{why}  - name: stable\n{}", route(stable)));
    }
    let mirror = match mirrors(shift, service) {
        true => "# Not done: copies of requests (mirror). No route of Istio can lead where a header says.\n",
        false => "",
    };
    Ok(format!(
        "\
---
# The filter says by a header which version answers.
{mirror}apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {metadata}
spec:
  hosts: {hosts}
{gateways}  # {about_timeouts} Retries are Istio's own: two, of what no endpoint has begun to work on.
  http:
{routes}",
        metadata = metadata(&name, namespace),
    ))
}

/// The hostnames, without names of one label: those Istio reads as Services of the namespace, which only callers in the mesh
/// may mean by them.
fn hosts_at_gateways(service: &ShiftService) -> String {
    let of_gateways: Vec<_> = service.hostnames.iter().filter(|host| host.contains('.')).collect();
    match (service.hostnames.is_empty(), of_gateways.is_empty()) {
        (true, _) => list(["*"]),
        (_, true) => list(&service.hostnames),
        _ => list(of_gateways),
    }
}

/// A waypoint knows the Services behind it, and those that their routes lead to.
fn known_to_waypoints(controller: &Endpoint) -> String {
    format!(
        "  # Makes the controller's Service known to the waypoint. No request goes there: the header is to be there and not there.
  - name: known-to-the-waypoint
    match: [{{headers: {{x-tideshift: {{}}}}, withoutHeaders: {{x-tideshift: {{}}}}}}]
    route: [{{destination: {{host: {}, port: {{number: {}}}}}}}]
",
        scalar(&controller.host),
        controller.port
    )
}

#[cfg(test)]
mod tests {
    use super::super::kubernetes::tests::{PAYMENT, SHOP, filter, objects_in, shift};
    use super::*;
    use serde_json::{Value, json};

    fn options(proxies: Proxies) -> Options {
        Options {
            proxies,
            namespace: "proxies".to_owned(),
            filter: filter(),
            fail_strategy: FailStrategy::Open,
            service: None,
            service_port: 8080,
            cluster: Some("east".to_owned()),
        }
    }

    fn gateway() -> Proxies {
        let selector = BTreeMap::from([("istio".to_owned(), "ingressgateway".to_owned())]);
        Proxies::Gateway { gateway: "istio-system/public".to_owned(), selector }
    }

    fn sidecar() -> Proxies {
        Proxies::Sidecar { selector: BTreeMap::from([("app".to_owned(), "frontend".to_owned())]) }
    }

    fn waypoint() -> Proxies {
        Proxies::Waypoint { name: "waypoint".to_owned() }
    }

    /// What the printed objects are, by kind.
    fn of_kind(kind: &str, document: &str, options: &Options) -> Vec<Value> {
        let objects = objects_in(&objects(&[shift(document)], options).unwrap());
        objects.into_iter().filter(|object| object["kind"] == kind).collect()
    }

    #[test]
    fn the_objects_are_what_they_were() {
        let shifts = [shift(SHOP), shift(PAYMENT)];
        insta::assert_snapshot!("istio_gateway", objects(&shifts, &options(gateway())).unwrap());
        insta::assert_snapshot!("istio_sidecar", objects(&shifts, &options(sidecar())).unwrap());
        insta::assert_snapshot!("istio_waypoint", objects(&shifts, &options(waypoint())).unwrap());
    }

    #[test]
    fn every_version_has_a_route_by_its_header_to_its_own_pods_and_the_stable_one_has_the_rest() {
        for proxies in [gateway(), sidecar(), waypoint()] {
            let options = options(proxies);
            let rules = of_kind("DestinationRule", PAYMENT, &options);
            let [virtual_service] = &of_kind("VirtualService", PAYMENT, &options)[..] else { panic!("one") };
            let routes = virtual_service["spec"]["http"].as_array().unwrap();
            let to = |route: &Value| route["route"][0]["destination"].clone();
            let own = |version: &str| {
                let by_header = json!([{"headers": {"x-tideshift-version": {"exact": version}}}]);
                let own: Vec<_> = routes.iter().filter(|route| route["match"] == by_header).collect();
                assert_eq!(own.len(), 1, "{version}");
                to(own[0])
            };
            for version in ["v1", "v2"] {
                let to = own(version);
                assert_eq!(to["port"]["number"], 8080);
                let rule = rules.iter().find(|rule| rule["spec"]["host"] == to["host"]).unwrap();
                let subsets = rule["spec"]["subsets"].as_array().unwrap();
                let subset = subsets.iter().find(|subset| subset["name"] == to["subset"]).unwrap();
                assert_eq!(subset["labels"], json!({"app": "payment-service", "version": version}));
            }
            assert_eq!((&to(routes.last().unwrap()), &routes.last().unwrap()["match"]), (&own("v1"), &Value::Null));
            assert!(routes.iter().all(|route| route["timeout"].is_null() && route["retries"].is_null()));
        }
    }

    #[test]
    fn routes_have_a_timeout_where_the_document_has_one() {
        let timeouts = |said: &str| {
            let document = PAYMENT.replace("  stable:", &format!("  timeoutSeconds: {said}\n  stable:"));
            let [virtual_service] = &of_kind("VirtualService", &document, &options(gateway()))[..] else {
                panic!("one")
            };
            let routes = virtual_service["spec"]["http"].as_array().unwrap().clone();
            routes.into_iter().map(|route| route["timeout"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(timeouts("60"), ["60s", "60s", "60s"]);
        // Istio would refuse 0s.
        assert_eq!(timeouts("0"), [Value::Null, Value::Null, Value::Null]);
    }

    #[test]
    fn the_plugin_is_where_the_proxies_are() {
        let plugin = |proxies| of_kind("WasmPlugin", PAYMENT, &options(proxies)).remove(0);
        let gateways = plugin(gateway());
        assert_eq!(gateways["metadata"]["namespace"], "proxies");
        assert_eq!(gateways["spec"]["selector"], json!({"matchLabels": {"istio": "ingressgateway"}}));
        assert_eq!(
            (&gateways["spec"]["match"], &gateways["spec"]["failStrategy"]),
            (&Value::Null, &json!("FAIL_OPEN"))
        );
        let cluster = "outbound|7460||tideshift.tideshift-system.svc.cluster.local";
        assert_eq!(gateways["spec"]["pluginConfig"]["controller"]["cluster"], cluster);
        let callers = plugin(sidecar());
        assert_eq!(callers["spec"]["selector"], json!({"matchLabels": {"app": "frontend"}}));
        assert_eq!(callers["spec"]["match"], json!([{"mode": "CLIENT"}]));
        // Waypoints ignore selectors and matches.
        let waypoint = plugin(waypoint());
        assert_eq!((&waypoint["spec"]["selector"], &waypoint["spec"]["match"]), (&Value::Null, &Value::Null));
        let target = json!([{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint"}]);
        assert_eq!(waypoint["spec"]["targetRefs"], target);
    }

    #[test]
    fn names_of_one_label_are_no_hosts_of_a_gateway() {
        let hosts =
            |document: &str| of_kind("VirtualService", document, &options(gateway()))[0]["spec"]["hosts"].clone();
        assert_eq!(hosts(PAYMENT), json!(["payment.example.com", "payment.shop"]));
        assert_eq!(hosts(&PAYMENT.replace("[payment.example.com, payment, payment.shop]", "[]")), json!(["*"]));
        assert_eq!(hosts(&PAYMENT.replace("[payment.example.com, payment, payment.shop]", "[a]")), json!(["a"]));
    }

    #[test]
    fn what_istio_cannot_do_is_said() {
        let said = |document: &str, options: &Options| objects(&[shift(document)], options).unwrap_err().to_string();
        let nowhere = PAYMENT.replace("selector: {matchLabels: {app: payment-service, version: v2}}", "endpoints: []");
        let expected =
            "version v2 of payment: service and selector are missing; one of them must say where it runs in Kubernetes";
        assert_eq!(said(&nowhere.replace("    port: http\n", ""), &options(gateway())), expected);
        let expressions = PAYMENT.replace(
            "matchLabels: {app: payment-service, version: v2}",
            "matchExpressions: [{key: a, operator: Exists}]",
        );
        assert!(
            said(&expressions, &options(gateway())).starts_with("version v2 of payment: selector.matchExpressions")
        );
        let every = PAYMENT.replace("[payment.example.com, payment, payment.shop]", "[]");
        assert!(
            said(&every, &options(sidecar()))
                .ends_with("such as payment, payment.shop and payment.shop.svc.cluster.local")
        );
        let dots = PAYMENT
            .replace("name: v1", "name: \"1.0\"")
            .replace("name: v2", "name: 1-0")
            .replace("stable: v1", "stable: \"1.0\"");
        assert_eq!(said(&dots, &options(gateway())), "version 1-0 of payment: another is also 1-0 without dots");
        let missing =
            "version v1 of search: cluster is missing, and others have one; say by --cluster what Istio calls its own";
        assert_eq!(said(SHOP, &Options { cluster: None, ..options(gateway()) }), missing);
    }
}
