//! `tideshift render istio`, `envoy-gateway` and `httproute`: Kubernetes objects.

use super::super::{Failure, token_in};
use crate::documents;
use crate::render::{Filter, Unfit, envoy_gateway, httproute, istio};
use clap::{Args, ValueEnum};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use tideshift_core::shift::{Endpoint, TrafficShift};

/// A placeholder for the module in a registry.
const MODULE: &str = concat!("oci://registry.example.com/tideshift-filter:", env!("CARGO_PKG_VERSION"));
/// The controller as the chart installs it.
const CONTROLLER: &str = "tideshift.tideshift-system.svc.cluster.local:7460";

/// Where proxies find the filter and the controller.
#[derive(Debug, Args)]
struct FilterArguments {
    /// The URL of the filter's Wasm module: oci:// for an image in a registry, http:// or https:// for a file, or (Istio
    /// only) file:/// for a path on every proxy.
    #[arg(long, value_name = "URL", default_value = MODULE, value_parser = module_url)]
    module_url: String,
    /// The SHA-256 of the module's image or file in hexadecimal; `make image` prints both.
    #[arg(long, value_name = "HEX", value_parser = sha256)]
    module_sha256: Option<String>,
    /// The controller's Service (fully qualified name) and port.
    #[arg(long, value_name = "HOST:PORT", default_value = CONTROLLER, value_parser = service)]
    controller: Endpoint,
    /// The Envoy cluster name of the controller. [default: outbound|PORT||HOST in Istio,
    /// httproute/NAMESPACE/tideshift-controller/rule/0 in Envoy Gateway]
    #[arg(long, value_name = "NAME")]
    controller_cluster: Option<String>,
    /// A file whose first line is the proxy token, if the controller requires tokens. The output contains the token: every
    /// user who can read these objects in the cluster can read it.
    #[arg(long, value_name = "FILE")]
    controller_token_file: Option<PathBuf>,
}

/// Print Istio objects for TrafficShift documents
///
/// The output is a WasmPlugin with the filter; a VirtualService with a route per version (by the header x-tideshift-version;
/// the default route goes to the stable version); and, if versions share a Service, a DestinationRule with the versions as
/// subsets. A version with `service` uses that Service; a version with only `selector` is a subset of the Service that
/// clients call (--service).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tideshift render istio -f payment.yaml --gateway istio-system/public --module-url oci://REGISTRY/tideshift-filter:TAG \\
    --module-sha256 SHA256 | kubectl apply -f -
  tideshift render istio -f payment.yaml --for sidecar --proxy-namespace web --selector app=frontend
  tideshift render istio -f payment.yaml --for waypoint --waypoint waypoint

Give all documents whose traffic the same proxies shift at once: they have one filter. Weights are not in what is printed, and
nothing of it changes during a rollout: all traffic goes to the stable version until the controller (`tideshift serve
--kubernetes`) has answered. Without the module, too, unless --fail-strategy says otherwise.

With --for sidecar and --for waypoint, `hostnames` must be what callers call the service by, such as payment, payment.shop and
payment.shop.svc.cluster.local. Versions in another `cluster` must be in the same mesh, under the same name there.")]
pub(super) struct Istio {
    /// TrafficShift documents; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The proxies that choose the version: a gateway for requests from outside, client sidecars for calls within the mesh,
    /// or the service's waypoint in an ambient mesh.
    #[arg(long = "for", value_name = "PROXIES", value_enum, default_value_t)]
    proxies: Proxies,
    /// The Gateway that serves the hostnames, as NAMESPACE/NAME. [default with --for gateway: istio-system/ingressgateway]
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = gateway)]
    gateway: Option<httproute::Gateway>,
    /// The namespace of these proxies. [default: istio-system for a gateway, else the documents']
    #[arg(long, value_name = "NAMESPACE")]
    proxy_namespace: Option<String>,
    /// A label of these proxies' pods. Repeatable. [default: istio=ingressgateway for a gateway, else all]
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    selector: Vec<(String, String)>,
    /// The waypoint's Gateway. [default with --for waypoint: waypoint]
    #[arg(long, value_name = "NAME")]
    waypoint: Option<String>,
    /// The Service that clients call, which contains the versions without `service`. [default: the service's name]
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// The port of the versions' Services.
    #[arg(long, value_name = "PORT", default_value = "80", value_parser = clap::value_parser!(u16).range(1..))]
    service_port: u16,
    /// The Istio cluster name of versions without `cluster`; required if other versions have one.
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// How to handle requests if the module cannot be fetched or has failed.
    #[arg(long, value_enum, default_value = "FAIL_OPEN")]
    fail_strategy: istio::FailStrategy,
    #[command(flatten)]
    filter: FilterArguments,
}

/// The proxies that choose the version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Proxies {
    #[default]
    Gateway,
    Sidecar,
    Waypoint,
}

/// Print Envoy Gateway objects for TrafficShift documents
///
/// The output is an EnvoyExtensionPolicy with the filter for the whole Gateway; an HTTPRoute with a rule per version (by the
/// header x-tideshift-version) and a default rule to the stable version; Services for versions that have a selector and no
/// Service; and an HTTPRoute that gives the gateway's proxies a route to the controller.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tideshift render envoy-gateway -f payment.yaml --gateway default/eg --module-url oci://REGISTRY/tideshift-filter:TAG \\
    --module-sha256 SHA256 | kubectl apply -f -

The Gateway's listener must allow routes from the documents' namespaces (allowedRoutes). Give all documents whose traffic the
Gateway shifts at once: it has one filter. The output contains no weights and does not change during a rollout.")]
pub(super) struct EnvoyGateway {
    /// TrafficShift documents; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The Gateway that serves the hostnames.
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "default/eg", value_parser = gateway)]
    gateway: httproute::Gateway,
    /// The port of the versions' Services.
    #[arg(long, value_name = "PORT", default_value = "80", value_parser = clap::value_parser!(u16).range(1..))]
    service_port: u16,
    /// Reject requests if the module cannot be fetched or has failed. Without it they go to the stable version.
    #[arg(long)]
    fail_closed: bool,
    #[command(flatten)]
    filter: FilterArguments,
}

/// Print HTTPRoutes for the versions of TrafficShift documents
///
/// For any implementation of Gateway API: a rule per version (by the header x-tideshift-version), a default rule to the
/// stable version, and Services for versions that have a selector and no Service. How to install the filter in the proxies
/// depends on the implementation.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tideshift render httproute -f payment.yaml --gateway infra/public | kubectl apply -f -

The Gateway's listener must allow routes from the documents' namespaces (allowedRoutes).")]
pub(super) struct HttpRoute {
    /// TrafficShift documents; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The Gateway that serves the hostnames.
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "default/gateway", value_parser = gateway)]
    gateway: httproute::Gateway,
    /// The port of the versions' Services.
    #[arg(long, value_name = "PORT", default_value = "80", value_parser = clap::value_parser!(u16).range(1..))]
    service_port: u16,
}

impl FilterArguments {
    fn filter(&self) -> Result<Filter, Failure> {
        let token = self.controller_token_file.as_ref().map(|path| token_in("--controller-token-file", path));
        Ok(Filter {
            module_url: self.module_url.clone(),
            module_sha256: self.module_sha256.clone(),
            controller: self.controller.clone(),
            controller_cluster: self.controller_cluster.clone(),
            controller_token: token.transpose()?,
        })
    }
}

impl Istio {
    pub(super) fn objects(&self) -> Result<String, Failure> {
        let shifts = documents::load(&self.files)?;
        self.check_flags(&shifts)?;
        let selector: BTreeMap<_, _> = self.selector.iter().cloned().collect();
        let proxies = match self.proxies {
            Proxies::Gateway => istio::Proxies::Gateway {
                gateway: self.gateway.as_ref().map_or("istio-system/ingressgateway".to_owned(), |gateway| {
                    format!("{}/{}", gateway.namespace, gateway.name)
                }),
                selector: match selector.is_empty() {
                    true => BTreeMap::from([("istio".to_owned(), "ingressgateway".to_owned())]),
                    false => selector,
                },
            },
            Proxies::Sidecar => istio::Proxies::Sidecar { selector },
            Proxies::Waypoint => {
                istio::Proxies::Waypoint { name: self.waypoint.clone().unwrap_or_else(|| "waypoint".to_owned()) }
            }
        };
        let options = istio::Options {
            proxies,
            namespace: self.namespace(&shifts)?,
            filter: self.filter.filter()?,
            fail_strategy: self.fail_strategy,
            service: self.service.clone(),
            service_port: self.service_port,
            cluster: self.cluster.clone(),
        };
        istio::objects(&shifts, &options).map_err(unfit)
    }

    /// Rejects flags that would have no effect.
    fn check_flags(&self, shifts: &[TrafficShift]) -> Result<(), Failure> {
        let usage = |why: &str| Err(Failure::Usage(why.to_owned()));
        if self.gateway.is_some() && self.proxies != Proxies::Gateway {
            return usage("--gateway is for --for gateway");
        }
        if self.waypoint.is_some() && self.proxies != Proxies::Waypoint {
            return usage("--waypoint is for --for waypoint");
        }
        if !self.selector.is_empty() && self.proxies == Proxies::Waypoint {
            return usage("--selector is for --for gateway and --for sidecar; waypoints have a name (--waypoint)");
        }
        if self.service.is_some() && shifts.iter().map(|shift| shift.services.len()).sum::<usize>() > 1 {
            return usage("--service is for one service, and the documents have several");
        }
        Ok(())
    }

    fn namespace(&self, shifts: &[TrafficShift]) -> Result<String, Failure> {
        if let Some(namespace) = &self.proxy_namespace {
            return Ok(namespace.clone());
        }
        if self.proxies == Proxies::Gateway {
            return Ok("istio-system".to_owned());
        }
        let namespaces = shifts.iter().map(|shift| shift.namespace.clone().unwrap_or_else(|| "default".to_owned()));
        let mut namespaces: BTreeSet<_> = namespaces.collect();
        match (namespaces.pop_first(), namespaces.is_empty()) {
            (Some(namespace), true) => Ok(namespace),
            _ => Err(Failure::Usage(
                "the documents are in several namespaces; pass the namespace of the proxies with --proxy-namespace"
                    .to_owned(),
            )),
        }
    }
}

impl EnvoyGateway {
    pub(super) fn objects(&self) -> Result<String, Failure> {
        let filter = self.filter.filter()?;
        if filter.module_url.starts_with("file:") {
            let why = "Envoy Gateway takes no files of its proxies; expected oci://, http:// or https://";
            return Err(Failure::Usage(format!("--module-url {}: {why}", filter.module_url)));
        }
        let options = envoy_gateway::Options {
            routes: httproute::Options { gateway: self.gateway.clone(), service_port: self.service_port },
            filter,
            fail_closed: self.fail_closed,
        };
        envoy_gateway::objects(&documents::load(&self.files)?, &options).map_err(unfit)
    }
}

impl HttpRoute {
    pub(super) fn objects(&self) -> Result<String, Failure> {
        let options = httproute::Options { gateway: self.gateway.clone(), service_port: self.service_port };
        httproute::objects(&documents::load(&self.files)?, &options).map_err(unfit)
    }
}

fn unfit(why: Unfit) -> Failure {
    Failure::Usage(why.to_string())
}

fn module_url(text: &str) -> Result<String, String> {
    let rest = ["oci://", "http://", "https://", "file:///"].into_iter().find_map(|scheme| text.strip_prefix(scheme));
    let is_one = rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic()));
    let allowed = "expected oci://REGISTRY/IMAGE:TAG, http:// or https:// and where the file is, or file:///PATH";
    if is_one { Ok(text.to_owned()) } else { Err(allowed.to_owned()) }
}

fn sha256(text: &str) -> Result<String, String> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    let is_one = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if is_one { Ok(hex.to_owned()) } else { Err("expected 64 of 0 to 9 and a to f".to_owned()) }
}

/// A Service's name from Kubernetes' DNS, and a port.
fn service(text: &str) -> Result<Endpoint, String> {
    let allowed = || format!("expected a Service's whole name and port, such as {CONTROLLER}");
    let is_service = |endpoint: &Endpoint| endpoint.host.split('.').nth(2) == Some("svc");
    Endpoint::parse(text).filter(is_service).ok_or_else(allowed)
}

fn gateway(text: &str) -> Result<httproute::Gateway, String> {
    let part = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
    match text.split_once('/') {
        Some((namespace, name)) if part(namespace) && part(name) => {
            Ok(httproute::Gateway { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err("expected NAMESPACE/NAME".to_owned()),
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let label = text.split_once('=').filter(|(key, _)| !key.is_empty());
    label.map(|(key, value)| (key.to_owned(), value.to_owned())).ok_or_else(|| "expected KEY=VALUE".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_flags_hold_is_looked_at() {
        assert!(module_url(MODULE).is_ok() && module_url("http://a/b.wasm").is_ok());
        assert!(module_url("a/b").is_err() && module_url("oci://").is_err() && module_url("oci://a b").is_err());
        let hex = "0123456789abcdef".repeat(4);
        assert_eq!((sha256(&hex), sha256(&format!("sha256:{hex}"))), (Ok(hex.clone()), Ok(hex)));
        assert!(sha256("0").is_err());
        assert!(service(CONTROLLER).is_ok() && service("127.0.0.1:7460").is_err() && service("a.b:7460").is_err());
        assert!(gateway("a/b").is_ok() && gateway("a").is_err() && gateway("/b").is_err() && gateway("a/b/c").is_err());
        assert_eq!(label("app=a=b"), Ok(("app".to_owned(), "a=b".to_owned())));
        assert!(label("app").is_err() && label("=a").is_err());
    }
}
