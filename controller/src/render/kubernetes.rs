//! What the renderers for Kubernetes share: the filter's configuration, where a version is, and what does not fit.

use super::yaml::scalar;
use crate::compile;
use serde_json::Value;
use std::collections::BTreeMap;
use tideshift_core::protocol::policy::{ControllerRef, Policy};
use tideshift_core::shift::{Discovery, Endpoint, ShiftService, ShiftVersion, TrafficShift};

/// The filter's module, and what asks the controller.
#[derive(Debug, Clone)]
pub struct Filter {
    /// Where proxies find the module: `oci://REGISTRY/IMAGE:TAG`, or a file by `http://` or `https://`.
    pub module_url: String,
    /// The SHA-256 of the image's manifest, or of the file; none: it is not checked.
    pub module_sha256: Option<String>,
    /// The controller's Service, by its whole name: `SERVICE.NAMESPACE.svc.cluster.local`.
    pub controller: Endpoint,
    /// What the proxies call its cluster, where that is not what they always do.
    pub controller_cluster: Option<String>,
    /// The bearer token for the controller, if it wants one.
    pub controller_token: Option<String>,
}

/// Why a document cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {why}")]
pub struct Unfit {
    subject: String,
    why: String,
}

impl Unfit {
    pub(super) fn service(of: &ShiftService, why: impl Into<String>) -> Self {
        Self { subject: of.name.clone(), why: why.into() }
    }

    pub(super) fn version(of: &ShiftService, version: &ShiftVersion, why: impl Into<String>) -> Self {
        Self { subject: format!("version {} of {}", version.name, of.name), why: why.into() }
    }
}

/// Every service of the documents, with the shift that it is of.
pub(super) fn services(shifts: &[TrafficShift]) -> impl Iterator<Item = (&TrafficShift, &ShiftService)> {
    shifts.iter().flat_map(|shift| shift.services.iter().map(move |service| (shift, service)))
}

/// The namespace of a document.
pub(super) fn namespace(shift: &TrafficShift) -> &str {
    shift.namespace.as_deref().unwrap_or("default")
}

/// The filter's configuration: the controller's cluster, and the policy until the first response, which sends all traffic to
/// the stable versions.
///
/// Numbers that a double does not hold are texts, since that is what becomes of numbers on the way to the filter. So is the
/// revision, which is not 0 for ever where people change what was printed.
pub(super) fn configuration(shifts: &[TrafficShift], filter: &Filter, cluster: String) -> Value {
    let controller = ControllerRef {
        cluster: filter.controller_cluster.clone().unwrap_or(cluster),
        authority: filter.controller.to_string(),
        token: filter.controller_token.clone(),
    };
    let qualified = |shift: &TrafficShift| {
        let namespace = Some(namespace(shift).to_owned());
        TrafficShift { namespace, ..shift.clone() }.qualified()
    };
    let at_rest = |shift: &TrafficShift| compile::at_rest(&qualified(shift)).collect::<Vec<_>>();
    let services = shifts.iter().flat_map(at_rest).collect();
    let policy = Policy { controller: Some(controller), services, ..Policy::default() };
    let revision = Value::from(policy.revision.to_string());
    let mut policy = serde_json::to_value(policy).unwrap_or_default();
    policy["revision"] = revision;
    without_large_numbers(policy)
}

fn without_large_numbers(value: Value) -> Value {
    /// The first integer that a double leaves out is one more.
    const LARGEST: u64 = 1 << 53;
    match value {
        Value::Number(number) if number.as_u64().is_some_and(|number| number > LARGEST) => {
            Value::from(number.to_string())
        }
        Value::Array(items) => items.into_iter().map(without_large_numbers).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, without_large_numbers(value))).collect(),
        other => other,
    }
}

/// How a version's endpoints are found.
pub(super) fn discovery<'v>(service: &ShiftService, version: &'v ShiftVersion) -> Result<&'v Discovery, Unfit> {
    let missing = "service and selector are missing; one of them must say where it runs in Kubernetes";
    version.discovery.as_ref().ok_or_else(|| Unfit::version(service, version, missing))
}

/// The labels that a version's selector asks for; none without a selector.
pub(super) fn labels(service: &ShiftService, version: &ShiftVersion) -> Result<BTreeMap<String, String>, Unfit> {
    match &discovery(service, version)?.selector {
        Some(selector) if !selector.match_expressions.is_empty() => {
            let why = "selector.matchExpressions cannot be rendered; expected matchLabels alone, or a service";
            Err(Unfit::version(service, version, why))
        }
        Some(selector) => Ok(selector.match_labels.clone()),
        None => Ok(BTreeMap::new()),
    }
}

/// A version's name where no dots are allowed.
pub(super) fn without_dots(version: &ShiftVersion) -> String {
    version.name.replace('.', "-")
}

/// Fails if two versions of a service have the same name where no dots are allowed.
pub(super) fn check_names(service: &ShiftService) -> Result<(), Unfit> {
    let names: Vec<_> = service.versions.iter().map(without_dots).collect();
    let twice = service.versions.iter().enumerate().find(|(i, _)| names.iter().take(*i).any(|name| *name == names[*i]));
    let why =
        |version| Unfit::version(service, version, format!("another is also {} without dots", without_dots(version)));
    twice.map_or(Ok(()), |(_, version)| Err(why(version)))
}

/// `{name: NAME, namespace: NAMESPACE}`.
pub(super) fn metadata(name: &str, namespace: &str) -> String {
    format!("{{name: {}, namespace: {}}}", scalar(name), scalar(namespace))
}

/// Labels on one line.
pub(super) fn label_map(labels: &BTreeMap<String, String>) -> String {
    let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{}: {}", scalar(key), scalar(value))).collect();
    format!("{{{}}}", labels.join(", "))
}

/// The names of the documents, for people.
pub(super) fn names(shifts: &[TrafficShift]) -> String {
    let name = |shift: &TrafficShift| format!("{} in {}", shift.name, namespace(shift));
    shifts.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Whether any request of a service is to be sent to two versions.
pub(super) fn mirrors(shift: &TrafficShift, service: &ShiftService) -> bool {
    let of_rules = service.rules.iter().any(|rule| rule.mirror.is_some());
    service.mirror.is_some() || of_rules || shift.strategy.warm_up.mirror_percent.is_some()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::Map;
    use std::collections::BTreeMap;

    /// Two versions in one Service.
    pub(in crate::render) const PAYMENT: &str = "\
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: payment, namespace: shop}
spec:
  hostnames: [payment.example.com, payment, payment.shop]
  versions:
  - name: v1
    selector: {matchLabels: {app: payment-service, version: v1}}
    port: http
  - name: v2
    selector: {matchLabels: {app: payment-service, version: v2}}
    port: http
  stable: v1
";

    /// Several services in the namespace `default`: versions with Services, in two clusters, with names that look like
    /// something else, and all that the filter can be told.
    pub(in crate::render) const SHOP: &str = r##"
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: shop}
spec:
  services:
  - name: search
    hostnames: ["*.search.example.com"]
    versions:
    - {name: v1, service: search-v1}
    - {name: "4.0", service: search, selector: {matchLabels: {"app.kubernetes.io/version": "4.0"}}, port: 8080}
    - {name: west, service: search-v1, cluster: west}
    mirror: {version: "4.0", percent: 10}
  - name: cart
    hostnames: [cart.example.com]
    versions:
    - {name: v1, service: cart-v1}
    - {name: "4.0", service: cart-v4}
    - {name: west, service: cart-west}
    rules:
    - name: testers
      matches: [{headers: [{name: x-beta, type: RegularExpression, value: "[0-9]+"}], path: {type: PathPrefix, value: /}}]
      versions: [{name: "4.0", weight: 1000000}, {name: v1, weight: 0}]
    session: {type: Cookie, name: cart, ttlSeconds: 34560000, generation: 9007199254740993}
    errors: {statusCodes: [500-502, "504"], grpcStatusCodes: [14]}
    guard: {falseVetoRate: 0.000001}
  stable: v1
"##;

    pub(in crate::render) fn shift(document: &str) -> TrafficShift {
        let value: Value = serde_saphyr::from_str(document).unwrap();
        TrafficShift::read(&value).unwrap()
    }

    pub(in crate::render) fn filter() -> Filter {
        Filter {
            module_url: "oci://registry.example.com/tideshift-filter:1".to_owned(),
            module_sha256: Some("0123456789abcdef".repeat(4)),
            controller: Endpoint::parse("tideshift.tideshift-system.svc.cluster.local:7460").unwrap(),
            controller_cluster: None,
            controller_token: Some("0123456789abcdef".to_owned()),
        }
    }

    /// The objects of YAML documents.
    pub(in crate::render) fn objects_in(text: &str) -> Vec<Value> {
        let objects: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
        objects.into_iter().filter(|object| !object.is_null()).collect()
    }

    /// What Istio makes of a configuration: every number a double, fields in the order of their names, no spaces.
    fn through_doubles(value: &Value) -> String {
        match value {
            Value::Number(number) => number.as_f64().unwrap().to_string(),
            Value::Array(items) => format!("[{}]", items.iter().map(through_doubles).collect::<Vec<_>>().join(",")),
            Value::Object(fields) => {
                let fields: BTreeMap<_, _> = fields.iter().collect();
                let field = |(name, value): (&String, &Value)| {
                    format!("{}:{}", Value::from(name.as_str()), through_doubles(value))
                };
                format!("{{{}}}", fields.into_iter().map(field).collect::<Vec<_>>().join(","))
            }
            other => other.to_string(),
        }
    }

    #[test]
    fn what_comes_to_the_filter_through_doubles_is_what_was_meant() {
        let shifts = [shift(SHOP), shift(PAYMENT)];
        let configuration = configuration(&shifts, &filter(), "outbound|7460||tideshift".to_owned());
        let policy = Policy::from_json(through_doubles(&configuration).as_bytes()).unwrap();
        let names: Vec<_> = policy.services.iter().map(|service| service.name.as_str()).collect();
        assert_eq!(names, ["search.default", "cart.default", "payment.shop"]);
        for (service, (shift, meant)) in policy.services.iter().zip(services(&shifts)) {
            let meant = compile::service_at_rest(meant, &shift.stable);
            let name = format!("{}.{}", meant.name, namespace(shift));
            assert_eq!(*service, tideshift_core::protocol::policy::Service { name, ..meant });
        }
        assert_eq!(policy.services[1].session.as_ref().unwrap().generation, (1 << 53) + 1);
        assert_eq!((policy.revision, configuration["revision"].as_str()), (0, Some("0")));
        let controller = policy.controller.unwrap();
        assert_eq!(controller.cluster, "outbound|7460||tideshift");
        assert_eq!(controller.token.as_deref(), Some("0123456789abcdef"));
    }

    #[test]
    fn numbers_that_no_double_holds_are_texts() {
        let number = |number: u64| Value::Object(Map::from_iter([("n".to_owned(), Value::Array(vec![number.into()]))]));
        assert_eq!(without_large_numbers(number(1 << 53)), number(1 << 53));
        assert_eq!(without_large_numbers(number(u64::MAX))["n"][0], "18446744073709551615");
    }
}
