//! `tideshift delete`: removes a document that `tideshift apply` added.

use super::{Failure, Output, print};
use crate::api::Services;
use crate::cli::client::Server;
use crate::rollout::Reason;
use reqwest::Method;
use serde_json::json;

/// Remove a document that was applied to a running controller
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The weights that proxies have stay in force, unless the document has `onDelete: Drain` or this is called with --drain.
If the controller has a file with a document of the same name (`serve -f`), that one is in force again. Documents of files are
removed in those files, and in Kubernetes a document is a resource: `kubectl delete trafficshift NAME`.")]
pub(super) struct Arguments {
    /// The document's `metadata.name`.
    name: String,

    /// Let its traffic go to Envoy's default route after its drain deadline. Also of a document that is gone and whose
    /// weights were kept, in Kubernetes too.
    #[arg(long)]
    drain: bool,

    /// A line for people, or the services that are still there under that name as JSON.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    server: Server,
}

impl Arguments {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let controller = self.server.open().await?;
        let name = controller.whole_name(&self.name);
        let query = if self.drain { "?onDelete=Drain" } else { "" };
        let path = format!("/v1/shifts/{name}{query}");
        let answer: Services = controller.send(Method::DELETE, &path, Some(&json!({}))).await?;
        match self.output {
            Output::Text => {
                let left = match answer.services.first() {
                    None => String::new(),
                    Some(service) if service.reason == Reason::DocumentLeft => format!("; {}", service.message),
                    Some(_) => "; the file's document is in force again".to_owned(),
                };
                print(&format!("{name}: deleted{left}\n"))?;
            }
            Output::Json => {
                let json = serde_json::to_value(&answer).map_err(|error| Failure::Other(error.into()))?;
                print(&format!("{json:#}\n"))?;
            }
        }
        match answer.state_error {
            None => Ok(()),
            Some(why) => {
                Err(Failure::NotSafe(format!("{name}: deleted, but the controller could not persist it: {why}")))
            }
        }
    }
}
