//! `tideshift render httproute`: what leads to each version by `x-tideshift-version`, for whatever implements Gateway API.
//! The filter is not in it: how that comes to the proxies is each implementation's own.

use super::kubernetes::{
    Unfit, check_names, discovery, label_map, labels, metadata, mirrors, names, namespace, services, without_dots,
};
use super::yaml::{list, scalar, seconds};
use tideshift_core::VERSION_HEADER;
use tideshift_core::shift::{PortRef, ShiftService, ShiftVersion, TrafficShift};

/// What the documents do not say.
#[derive(Debug, Clone)]
pub struct Options {
    /// The Gateway that takes the hosts.
    pub gateway: Gateway,
    /// The port of the versions' Services.
    pub service_port: u16,
}

/// A Gateway by its name.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// An HTTPRoute for each service, and Services for the versions that have none, as YAML documents.
///
/// # Errors
///
/// If a version is nowhere in Kubernetes, or where routes cannot lead to; if names clash.
pub fn objects(shifts: &[TrafficShift], options: &Options) -> Result<String, Unfit> {
    let head = format!(
        "\
# Gateway API: the TrafficShift documents {}. Printed by `tideshift render httproute`, yours to keep and change.
#
# Weights are not in it: the filter, which must run in the gateway's proxies, says by a header which version answers. Without it
# all requests go to the stable version.
",
        names(shifts)
    );
    Ok(head + &routes(shifts, options)?)
}

/// The same without a word before.
pub(super) fn routes(shifts: &[TrafficShift], options: &Options) -> Result<String, Unfit> {
    let mut objects = String::new();
    for (shift, service) in services(shifts) {
        check_names(service)?;
        let backends = service.versions.iter().map(|version| Backend::of(service, version));
        let backends = backends.collect::<Result<Vec<_>, _>>()?;
        for backend in backends.iter().filter(|backend| backend.is_ours) {
            objects.push_str(&backend.service(namespace(shift), options)?);
        }
        objects.push_str(&route(shift, service, &backends, options)?);
    }
    Ok(objects)
}

/// What a route leads to.
struct Backend<'b> {
    of: &'b ShiftService,
    version: &'b ShiftVersion,
    /// The Service's name.
    service: String,
    /// Whether the Service is one of those that we print.
    is_ours: bool,
}

impl<'b> Backend<'b> {
    fn of(of: &'b ShiftService, version: &'b ShiftVersion) -> Result<Self, Unfit> {
        let unfit = |why: &str| Err(Unfit::version(of, version, why));
        let discovery = discovery(of, version)?;
        if let Some(cluster) = &version.cluster {
            return unfit(&format!("cluster is {cluster}; an HTTPRoute leads to Services of its own cluster only"));
        }
        let (service, is_ours) = match (&discovery.service, &discovery.selector) {
            (Some(_), Some(_)) => {
                return unfit(
                    "has a service and a selector; an HTTPRoute leads to a whole Service, expected one of them",
                );
            }
            (Some(service), None) => (service.clone(), false),
            (None, _) => (format!("{}-{}", of.name, without_dots(version)), true),
        };
        Ok(Self { of, version, service, is_ours })
    }

    /// A Service for the pods that the version's selector selects.
    fn service(&self, namespace: &str, options: &Options) -> Result<String, Unfit> {
        let selector = labels(self.of, self.version)?;
        let target = match discovery(self.of, self.version)?.port.as_ref() {
            Some(PortRef::Name(name)) => format!(", targetPort: {}", scalar(name)),
            Some(PortRef::Number(number)) => format!(", targetPort: {number}"),
            None => String::new(),
        };
        Ok(format!(
            "\
---
# The pods of {version}, which its selector names: HTTPRoutes lead to Services only.
apiVersion: v1
kind: Service
metadata: {metadata}
spec:
  selector: {selector}
  ports: [{{name: http, port: {port}{target}}}]
",
            version = self.version.name,
            metadata = metadata(&self.service, namespace),
            selector = label_map(&selector),
            port = options.service_port,
        ))
    }

    fn rule(&self, matches: &str, options: &Options) -> String {
        let (service, port) = (scalar(&self.service), options.service_port);
        let timeout = self.of.timeout.map(|timeout| format!("    timeouts: {{request: {}}}\n", seconds(timeout)));
        format!("{matches}    backendRefs: [{{name: {service}, port: {port}}}]\n{}", timeout.unwrap_or_default())
    }
}

fn route(
    shift: &TrafficShift,
    service: &ShiftService,
    backends: &[Backend<'_>],
    options: &Options,
) -> Result<String, Unfit> {
    /// The most rules that an HTTPRoute has.
    const MOST_RULES: usize = 16;
    if backends.len() >= MOST_RULES {
        let why = format!("{} versions; an HTTPRoute has rules for {} at most", backends.len(), MOST_RULES - 1);
        return Err(Unfit::service(service, why));
    }
    let mut rules = String::new();
    for backend in backends {
        let version = scalar(&backend.version.name);
        let is_version = format!("  - matches: [{{headers: [{{name: {VERSION_HEADER}, value: {version}}}]}}]\n");
        rules.push_str(&backend.rule(&is_version, options));
    }
    if let Some(stable) = backends.iter().find(|backend| backend.version.name == shift.stable) {
        let otherwise = "  # No version in service, or no filter: the stable one.\n  - matches: [{path: {type: PathPrefix, value: /}}]\n";
        rules.push_str(&stable.rule(otherwise, options));
    }
    let hostnames = match service.hostnames.is_empty() {
        true => String::new(),
        false => format!("  hostnames: {}\n", list(&service.hostnames)),
    };
    let about_timeouts = match service.timeout {
        Some(timeout) if timeout.is_zero() => "Requests may take as long as they do, as the document says.",
        Some(_) => "timeouts.request is the document's timeoutSeconds.",
        None => "How long a request may take is the gateway's own default: the document has no timeoutSeconds.",
    };
    let mirror = match mirrors(shift, service) {
        true => "# Not done: copies of requests (mirror). No HTTPRoute can lead where a header says.\n",
        false => "",
    };
    Ok(format!(
        "\
---
# The filter says by a header which version answers.
{mirror}apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {metadata}
spec:
  parentRefs: [{parent}]
{hostnames}  # {about_timeouts}
  rules:
{rules}",
        metadata = metadata(&service.name, namespace(shift)),
        parent = metadata(&options.gateway.name, &options.gateway.namespace),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::kubernetes::tests::{PAYMENT, SHOP, objects_in, shift};
    use super::*;
    use serde_json::{Value, json};

    fn options() -> Options {
        let gateway = Gateway { namespace: "infra".to_owned(), name: "public".to_owned() };
        Options { gateway, service_port: 8080 }
    }

    /// Without what no HTTPRoute can do.
    fn shop() -> String {
        let without = SHOP.replace(", cluster: west", "");
        without.replace("service: search, selector", "selector")
    }

    #[test]
    fn the_objects_are_what_they_were() {
        insta::assert_snapshot!("httproute", objects(&[shift(&shop()), shift(PAYMENT)], &options()).unwrap());
    }

    #[test]
    fn every_version_has_a_rule_by_its_header_to_a_service_and_the_stable_one_has_the_rest() {
        let objects = objects_in(&objects(&[shift(PAYMENT)], &options()).unwrap());
        let of_kind = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).collect::<Vec<_>>();
        let [route] = of_kind("HTTPRoute")[..] else { panic!("one") };
        assert_eq!(route["spec"]["parentRefs"], json!([{"name": "public", "namespace": "infra"}]));
        let rules = route["spec"]["rules"].as_array().unwrap();
        assert_eq!(rules.len(), 3);
        assert!(rules.iter().all(|rule| rule["timeouts"].is_null()));
        for version in ["v1", "v2"] {
            let header = json!([{"headers": [{"name": "x-tideshift-version", "value": version}]}]);
            let rule = rules.iter().find(|rule| rule["matches"] == header).unwrap();
            let backend = &rule["backendRefs"][0];
            let service = of_kind("Service").into_iter().find(|service| service["metadata"]["name"] == backend["name"]);
            let spec = &service.unwrap()["spec"];
            assert_eq!(spec["selector"], json!({"app": "payment-service", "version": version}));
            assert_eq!(spec["ports"], json!([{"name": "http", "port": 8080, "targetPort": "http"}]));
            assert_eq!(backend["port"], 8080);
        }
        assert_eq!(rules[2]["backendRefs"], rules[0]["backendRefs"]);
        assert_eq!(rules[2]["matches"], json!([{"path": {"type": "PathPrefix", "value": "/"}}]));
    }

    #[test]
    fn rules_have_a_timeout_where_the_document_has_one() {
        for (said, expected) in [("0", "0s"), ("86400", "86400s")] {
            let document = PAYMENT.replace("  stable:", &format!("  timeoutSeconds: {said}\n  stable:"));
            let objects = objects_in(&objects(&[shift(&document)], &options()).unwrap());
            let route = objects.iter().find(|object| object["kind"] == "HTTPRoute").unwrap();
            let timeouts = route["spec"]["rules"].as_array().unwrap().iter().map(|rule| &rule["timeouts"]);
            assert_eq!(timeouts.collect::<Vec<_>>(), [&json!({"request": expected}); 3]);
        }
    }

    #[test]
    fn what_an_httproute_cannot_do_is_said() {
        let said = |document: &str| objects(&[shift(document)], &options()).unwrap_err().to_string();
        let both = "version 4.0 of search: has a service and a selector; an HTTPRoute leads to a whole Service, expected one of them";
        assert_eq!(said(&SHOP.replace(", cluster: west", "")), both);
        let elsewhere =
            "version west of search: cluster is west; an HTTPRoute leads to Services of its own cluster only";
        assert_eq!(said(&SHOP.replace("service: search, selector", "selector")), elsewhere);
        let many: Vec<Value> =
            (0..16).map(|n| json!({"name": format!("v{n}"), "service": format!("a-v{n}")})).collect();
        let many = json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "a"},
            "spec": {"versions": many, "stable": "v1"}});
        assert_eq!(said(&many.to_string()), "a: 16 versions; an HTTPRoute has rules for 15 at most");
    }
}
