//! `tideshift render`: prints configuration for Envoy, Istio and Gateway API.

mod kubernetes;

use super::{Failure, print, token_in};
use crate::documents;
use crate::render::envoy;
use clap::Subcommand;
use std::net::SocketAddr;
use std::path::PathBuf;
use tideshift_core::shift::Endpoint;

/// Print proxy configuration generated from documents
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum Target {
    Envoy(EnvoyArguments),
    Istio(kubernetes::Istio),
    EnvoyGateway(kubernetes::EnvoyGateway),
    #[command(name = "httproute")]
    HttpRoute(kubernetes::HttpRoute),
}

/// Print a complete Envoy bootstrap for TrafficShift documents
///
/// It contains the listener, the filter, a route per version (by the header x-tideshift-version; the default route goes to
/// the stable version), clusters with health checks that mirror the readiness probes, the controller's cluster and the
/// labels of the metrics.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift render envoy -f shift.yaml > envoy.yaml && envoy -c envoy.yaml
  tideshift render envoy -f shift.yaml --listen 0.0.0.0:80 --module /etc/envoy/tideshift.wasm --access-log -

It contains no weights: all traffic goes to the stable version until the controller (`tideshift serve`) sends a policy.")]
struct EnvoyArguments {
    /// TrafficShift documents; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The address on which Envoy accepts requests.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:10000")]
    listen: SocketAddr,
    /// The address of Envoy's admin interface. It has no authentication: keep it private.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9901")]
    admin: SocketAddr,
    /// The address of the controller.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7460", value_parser = endpoint)]
    controller: Endpoint,
    /// A file whose first line is the proxy token, if the controller requires tokens. The output contains the token, and
    /// Envoy's admin interface shows it.
    #[arg(long, value_name = "FILE")]
    controller_token_file: Option<PathBuf>,
    /// CA certificates that verify a controller with TLS; a path on the machine of Envoy.
    #[arg(long, value_name = "PATH")]
    controller_ca_file: Option<String>,
    /// The port of the versions' Services, if the documents name Services; for headless Services the port of the pods.
    #[arg(long, value_name = "PORT", default_value = "80", value_parser = clap::value_parser!(u16).range(1..))]
    service_port: u16,
    /// The filter's Wasm module; a path on the machine of Envoy.
    #[arg(long, value_name = "PATH", default_value = "target/tideshift.wasm")]
    module: String,
    /// The name of the controller's cluster in Envoy.
    #[arg(long, value_name = "NAME", default_value = "tideshift_controller")]
    cluster: String,
    /// Access log file, one line per request with its version; `-` is Envoy's standard output.
    #[arg(long, value_name = "PATH")]
    access_log: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    print(&match &arguments.target {
        Target::Envoy(arguments) => arguments.bootstrap()?,
        Target::Istio(arguments) => arguments.objects()?,
        Target::EnvoyGateway(arguments) => arguments.objects()?,
        Target::HttpRoute(arguments) => arguments.objects()?,
    })
}

impl EnvoyArguments {
    fn bootstrap(&self) -> Result<String, Failure> {
        let shifts = envoy::in_cluster(documents::load(&self.files)?, self.service_port);
        let shifts = shifts.map_err(|why| Failure::Usage(why.to_string()))?;
        let token = self.controller_token_file.as_ref().map(|path| token_in("--controller-token-file", path));
        let options = envoy::Options {
            listen: self.listen,
            admin: self.admin,
            controller: self.controller.clone(),
            controller_cluster: self.cluster.clone(),
            controller_token: token.transpose()?,
            controller_ca: self.controller_ca_file.clone(),
            module: self.module.clone(),
            access_log: self.access_log.clone(),
        };
        envoy::bootstrap(&shifts, &options)
            .map_err(|taken| Failure::Usage(format!("{taken}; choose another name with --cluster")))
    }
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    let allowed = "expected host:port, such as 127.0.0.1:7460, [::1]:7460 or tideshift.internal:7460";
    Endpoint::parse(text).ok_or_else(|| allowed.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controller_may_be_an_address_or_a_name() {
        for fine in ["127.0.0.1:7460", "[::1]:7460", "tideshift.internal:7460", "localhost:1"] {
            assert_eq!(endpoint(fine).map(|endpoint| endpoint.to_string()), Ok(fine.to_owned()));
        }
        for bad in ["127.0.0.1", "localhost:", ":7460", "a b:1", "localhost:0", "localhost:65536", "::1:7460"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }
}
