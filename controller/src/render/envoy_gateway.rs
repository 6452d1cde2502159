//! `tideshift render envoy-gateway`: the filter for a Gateway of Envoy Gateway (EnvoyExtensionPolicy), the HTTPRoutes to the
//! versions, and what makes the controller known to the proxies.

use super::httproute;
use super::httproute::Gateway;
use super::kubernetes::{Filter, Unfit, configuration, metadata, names};
use super::yaml::{indent, json, scalar};
use tideshift_core::shift::TrafficShift;

/// What the documents do not say.
#[derive(Debug, Clone)]
pub struct Options {
    /// The routes' own.
    pub routes: httproute::Options,
    /// The filter's module and the controller.
    pub filter: Filter,
    /// Whether requests are refused when the filter cannot run; else they go on without it, to the stable version.
    pub fail_closed: bool,
}

/// The name of the route that makes the controller known, and of its path.
const CONTROLLER: &str = "tideshift-controller";

/// All objects as YAML documents.
///
/// # Errors
///
/// As [`httproute::objects`].
pub fn objects(shifts: &[TrafficShift], options: &Options) -> Result<String, Unfit> {
    Ok(head(shifts)
        + &policy(shifts, options)
        + &controller(&options.routes.gateway, &options.filter)
        + &httproute::routes(shifts, &options.routes)?)
}

fn head(shifts: &[TrafficShift]) -> String {
    format!(
        "\
# Envoy Gateway: the TrafficShift documents {names}. Printed by `tideshift render envoy-gateway`, yours to keep and change.
#
# Weights are not in it. All requests go to the stable version until the controller has answered; from then on the weights
# come from there, and no object here changes during a rollout: a change of the filter's configuration would drain connections.
---
",
        names = names(shifts)
    )
}

/// The cluster that Envoy Gateway makes of the first rule of the controller's route.
fn cluster(gateway: &Gateway) -> String {
    format!("httproute/{}/{CONTROLLER}/rule/0", gateway.namespace)
}

fn policy(shifts: &[TrafficShift], options: &Options) -> String {
    let Options { routes: httproute::Options { gateway, .. }, filter, fail_closed } = options;
    let checked = match &filter.module_sha256 {
        Some(sha256) => format!("sha256: {}", scalar(sha256)),
        None => "# sha256: what `make image` prints. Without it whatever the URL gives is run.".to_owned(),
    };
    let (kind, field, url) = match filter.module_url.strip_prefix("oci://") {
        Some(image) => ("Image", "image", image),
        None => ("HTTP", "http", filter.module_url.as_str()),
    };
    let fails = match fail_closed {
        false => "failOpen: true # without the module, requests go to the stable version",
        true => "failOpen: false # without the module, every request is refused",
    };
    let configuration = json(&configuration(shifts, filter, cluster(gateway)), 110);
    format!(
        "\
# For all routes of the Gateway, since it has one filter for all services whose traffic it shifts: two would count twice. What
# is no service of these documents, the filter leaves alone. A route with an EnvoyExtensionPolicy of its own is not under this
# one: put the wasm below there too.
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: EnvoyExtensionPolicy
metadata: {metadata}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {gateway}}}]
  wasm:
  - name: tideshift
    rootID: tideshift
    code:
      type: {kind}
      {field}:
        url: {url}
        {checked}
    {fails}
    # In force until the controller has answered: all to the stable versions.
    config:
{configuration}
",
        metadata = metadata("tideshift", &gateway.namespace),
        gateway = scalar(&gateway.name),
        url = scalar(url),
        configuration = indent(6, &configuration),
    )
}

/// A route to the controller, whose cluster the filter calls, and the leave to lead to another namespace.
fn controller(gateway: &Gateway, filter: &Filter) -> String {
    let (service, namespace) = service_of(&filter.controller.host);
    let metadata_of_route = metadata(CONTROLLER, &gateway.namespace);
    let grant = match namespace == gateway.namespace {
        true => String::new(),
        false => format!(
            "\
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {metadata}
spec:
  from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {from}}}]
  to: [{{group: \"\", kind: Service, name: {service}}}]
",
            metadata = metadata(CONTROLLER, namespace),
            from = scalar(&gateway.namespace),
            service = scalar(service),
        ),
    };
    format!(
        "\
---
# Makes the controller's Service known to the proxies, as the cluster that the filter calls,
# {cluster}. (It is called otherwise where the Gateway's EnvoyProxy
# has mergeBackends, or its BackendTrafficPolicy prefers a zone: look into the proxy's configuration, and say --controller-cluster.)
# Who asks for the path from outside gets a 404 from the controller, and nothing else leads there.
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {metadata_of_route}
spec:
  parentRefs: [{{name: {gateway}}}]
  rules:
  - matches: [{{path: {{type: Exact, value: /{CONTROLLER}}}}}]
    backendRefs: [{{name: {service}, namespace: {namespace}, port: {port}}}]
{grant}",
        cluster = cluster(gateway),
        gateway = scalar(&gateway.name),
        service = scalar(service),
        namespace = scalar(namespace),
        port = filter.controller.port,
    )
}

/// A Service's name and namespace, from `SERVICE.NAMESPACE` and whatever follows.
fn service_of(host: &str) -> (&str, &str) {
    let mut labels = host.split('.');
    (labels.next().unwrap_or_default(), labels.next().unwrap_or("default"))
}

#[cfg(test)]
mod tests {
    use super::super::kubernetes::tests::{PAYMENT, filter, objects_in, shift};
    use super::*;
    use serde_json::{Value, json};
    use tideshift_core::protocol::policy::Policy;

    fn options() -> Options {
        let gateway = Gateway { namespace: "infra".to_owned(), name: "public".to_owned() };
        let routes = httproute::Options { gateway, service_port: 8080 };
        Options { routes, filter: filter(), fail_closed: false }
    }

    fn named(name: &str, kind: &str, objects: &[Value]) -> Value {
        let is_it = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
        objects.iter().find(is_it).unwrap().clone()
    }

    #[test]
    fn the_objects_are_what_they_were() {
        insta::assert_snapshot!("envoy_gateway", objects(&[shift(PAYMENT)], &options()).unwrap());
    }

    #[test]
    fn the_filter_calls_the_cluster_of_the_controllers_route() {
        let objects = objects_in(&objects(&[shift(PAYMENT)], &options()).unwrap());
        let policy = named("tideshift", "EnvoyExtensionPolicy", &objects);
        assert_eq!(
            (&policy["metadata"]["namespace"], &policy["spec"]["wasm"][0]["failOpen"]),
            (&json!("infra"), &json!(true))
        );
        let configuration = Policy::read(&policy["spec"]["wasm"][0]["config"]).unwrap();
        let route = named("tideshift-controller", "HTTPRoute", &objects);
        let (name, namespace) =
            (route["metadata"]["name"].as_str().unwrap(), route["metadata"]["namespace"].as_str().unwrap());
        assert_eq!(configuration.controller.unwrap().cluster, format!("httproute/{namespace}/{name}/rule/0"));
        let backend = json!([{"name": "tideshift", "namespace": "tideshift-system", "port": 7460}]);
        assert_eq!(route["spec"]["rules"][0]["backendRefs"], backend);
        let grant = named("tideshift-controller", "ReferenceGrant", &objects);
        assert_eq!(grant["metadata"]["namespace"], "tideshift-system");
        assert_eq!(grant["spec"]["from"][0]["namespace"], "infra");
    }

    #[test]
    fn a_module_is_an_image_or_a_file() {
        let code = |url: &str| {
            let filter = Filter { module_url: url.to_owned(), ..filter() };
            let objects = objects_in(&objects(&[shift(PAYMENT)], &Options { filter, ..options() }).unwrap());
            named("tideshift", "EnvoyExtensionPolicy", &objects)["spec"]["wasm"][0]["code"].clone()
        };
        let sha256 = filter().module_sha256;
        assert_eq!(code("oci://a/b:1"), json!({"type": "Image", "image": {"url": "a/b:1", "sha256": sha256}}));
        assert_eq!(
            code("https://a/b.wasm"),
            json!({"type": "HTTP", "http": {"url": "https://a/b.wasm", "sha256": sha256}})
        );
    }

    #[test]
    fn the_cluster_may_have_another_name() {
        let filter = Filter { controller_cluster: Some("another".to_owned()), ..filter() };
        let objects = objects_in(&objects(&[shift(PAYMENT)], &Options { filter, ..options() }).unwrap());
        let policy = named("tideshift", "EnvoyExtensionPolicy", &objects);
        assert_eq!(policy["spec"]["wasm"][0]["config"]["controller"]["cluster"], "another");
    }

    #[test]
    fn no_leave_is_needed_in_the_controllers_own_namespace() {
        let mut options = options();
        options.routes.gateway.namespace = "tideshift-system".to_owned();
        assert!(!objects(&[shift(PAYMENT)], &options).unwrap().contains("ReferenceGrant"));
    }
}
