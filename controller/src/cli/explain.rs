//! `tideshift explain`: which version would a request get, and why?

use super::{Failure, Output, print};
use crate::cli::client::{Controller, Server};
use crate::documents::Document;
use crate::explain::{Request, explain, service_of};
use crate::{compile, documents};
use std::path::PathBuf;
use tideshift_core::limits::MAX_WEIGHT;
use tideshift_core::protocol::policy::{Policy, Service};

/// Show which version a request would get, by which rule, and why
///
/// Runs the same code as the proxies. The weights come from the documents: a policy has its own; for a TrafficShift the
/// stable version has 100 and all endpoints count as ready. --weights overrides them. Without documents, the command
/// fetches the policy in force from the running controller. With authentication enabled this needs an operate token,
/// because policies contain session secrets.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift explain -f shift.yaml --host shop.example.com --path /cart -H 'x-beta: 1'
  tideshift explain -f shift.yaml --service checkout --weights v1=90,v2=10
  tideshift explain --host shop.example.com -H 'cookie: canary=always' --output json     # as it is right now")]
pub(super) struct Arguments {
    /// TrafficShift or policy documents; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Explain for this service only; --host then defaults to one of its hostnames.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// The request's host; optional if there is only one service.
    #[arg(long)]
    host: Option<String>,
    /// The request's path, including the query.
    #[arg(long, default_value = "/", value_parser = path)]
    path: String,
    /// The request's method.
    #[arg(long, short = 'X', default_value = "GET")]
    method: String,
    /// A header of the request. Repeatable.
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Weights that replace the document's; versions that you do not name get 0.
    #[arg(long, value_name = "VERSION=WEIGHT", value_delimiter = ',', value_parser = weight)]
    weights: Vec<(String, u32)>,
    /// The output format.
    #[arg(long, short = 'o', value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    server: Server,
}

pub(super) async fn run(mut arguments: Arguments) -> Result<(), Failure> {
    let mut policy = match arguments.files.is_empty() {
        true => {
            let controller = arguments.server.open().await?;
            arguments.service = arguments.service.map(|name| controller.whole_name(&name));
            policy_in_force(&controller).await?
        }
        false => policy_of(&arguments.files)?,
    };
    if let Some(name) = &arguments.service {
        let names = names(&policy.services);
        policy.services.retain(|service| service.name == *name);
        if policy.services.is_empty() {
            return Err(Failure::Usage(format!("--service: there is no service {name}; expected one of {names}")));
        }
    }
    let host = match (&arguments.host, &policy.services[..]) {
        (Some(host), _) => host.clone(),
        (None, [only]) => host_of(only),
        (None, several) => {
            let names = names(several);
            return Err(Failure::Usage(format!("which service? Give --host, or --service with one of {names}")));
        }
    };
    if !arguments.weights.is_empty() {
        let service = service_of(&policy, &host).and_then(|index| policy.services.get_mut(index));
        let service = service.ok_or_else(|| Failure::Usage(format!("--weights: no service has the host {host}")))?;
        set_weights(service, &arguments.weights)?;
    }
    let request = Request { host, method: arguments.method, path: arguments.path, headers: arguments.headers };
    let explanation = explain(&policy, &request);
    match arguments.output {
        Output::Text => print(&explanation.to_string()),
        Output::Json => {
            let json = serde_json::to_string_pretty(&explanation).map_err(|error| Failure::Other(error.into()))?;
            print(&format!("{json}\n"))
        }
    }
}

/// All documents as one policy; a policy document must be alone.
fn policy_of(files: &[PathBuf]) -> Result<Policy, Failure> {
    let documents = documents::load_any(files)?;
    let mut services = Vec::new();
    let alone = documents.len() == 1;
    for (source, document) in documents {
        match document {
            Document::Policy(policy) if alone => return Ok(policy),
            Document::Policy(_) => {
                return Err(Failure::Usage(format!("{source}: a policy is explained alone, without other documents")));
            }
            Document::Shift(shift) => {
                let at_rest = |name: &str| (compile::weight_at_rest(&shift.stable, name), true);
                services.extend(shift.services.iter().map(|service| compile::service(service, at_rest)));
            }
        }
    }
    Ok(Policy { services, ..Policy::default() })
}

async fn policy_in_force(controller: &Controller) -> Result<Policy, Failure> {
    // As a proxy that has nothing yet.
    let path = "/v1/policy?after=0&epoch=&delta=true";
    let policy: serde_json::Value = controller.get(path).await?;
    let no_policy = |errors| Failure::Other(format!("{}: no policy: {errors}", controller.url(path)).into());
    Policy::read(&policy).map_err(no_policy)
}

/// A host that leads to the service.
fn host_of(service: &Service) -> String {
    let first = service.hostnames.first().map_or("localhost", String::as_str);
    first.strip_prefix('*').map_or_else(|| first.to_owned(), |suffix| format!("any{suffix}"))
}

fn set_weights(service: &mut Service, weights: &[(String, u32)]) -> Result<(), Failure> {
    let known: Vec<_> = service.versions.iter().map(|version| version.name.clone()).collect();
    if let Some((name, _)) = weights.iter().find(|(name, _)| !known.contains(name)) {
        let known = known.join(", ");
        return Err(Failure::Usage(format!("--weights: {} has no version {name}; expected {known}", service.name)));
    }
    for version in &mut service.versions {
        let given = weights.iter().find(|(name, _)| *name == version.name);
        version.weight = given.map_or(0, |(_, weight)| *weight);
    }
    Ok(())
}

fn names(services: &[Service]) -> String {
    let names: Vec<_> = services.iter().map(|service| service.name.as_str()).collect();
    names.join(", ")
}

fn path(text: &str) -> Result<String, String> {
    let fine = text.starts_with('/') && !text.contains('#');
    fine.then(|| text.to_owned()).ok_or_else(|| "expected a path that starts with / (and has no #)".to_owned())
}

fn header(text: &str) -> Result<(String, String), String> {
    let is_token = |name: &str| reqwest::header::HeaderName::try_from(name).is_ok();
    let (name, value) = text.split_once(':').ok_or("expected NAME: VALUE")?;
    match name.trim() {
        name if name.eq_ignore_ascii_case("host") => Err("the host is given with --host".to_owned()),
        name if is_token(name) => Ok((name.to_owned(), value.trim().to_owned())),
        _ => Err("expected NAME: VALUE with the name of a header".to_owned()),
    }
}

fn weight(text: &str) -> Result<(String, u32), String> {
    let parsed = text.split_once('=').and_then(|(name, weight)| Some((name.to_owned(), weight.parse().ok()?)));
    let parsed = parsed.filter(|(_, weight)| *weight <= MAX_WEIGHT);
    parsed.ok_or_else(|| format!("expected VERSION=WEIGHT with a weight from 0 to {MAX_WEIGHT}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_say_what_is_allowed() {
        assert_eq!(header("X-Beta:  1 "), Ok(("X-Beta".to_owned(), "1".to_owned())));
        assert_eq!(header("x-empty:"), Ok(("x-empty".to_owned(), String::new())));
        for bad in ["x-beta", "x beta: 1", ": 1", ":path: /", "Host: a"] {
            assert!(header(bad).is_err(), "{bad}");
        }
        assert_eq!(weight("v1=1000000"), Ok(("v1".to_owned(), 1_000_000)));
        for bad in ["v1", "v1=", "v1=-1", "v1=1000001", "v1=1.5"] {
            assert!(weight(bad).is_err(), "{bad}");
        }
        assert_eq!(path("/a?b=c"), Ok("/a?b=c".to_owned()));
        assert!(path("a").is_err() && path("/a#b").is_err());
    }

    #[test]
    fn a_service_has_a_host_to_try() {
        let service = |hostnames: &str| {
            let text = format!(
                r#"{{"revision": 1, "services": [{{"name": "s", "versions": [{{"name": "v1"}}],
                "hostnames": {hostnames}}}]}}"#
            );
            Policy::from_json(text.as_bytes()).unwrap()
        };
        for hostnames in ["[]", r#"["a.example.com", "b.example.com"]"#, r#"["*.example.com"]"#] {
            let policy = service(hostnames);
            assert_eq!(service_of(&policy, &host_of(&policy.services[0])), Some(0));
        }
    }
}
