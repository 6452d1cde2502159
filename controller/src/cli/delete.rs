//! `tideshift delete`: removes a document that `tideshift apply` added.

use super::server::Server;
use super::{Failure, Output, print};
use crate::api::Services;
use reqwest::Method;
use serde_json::json;

/// Remove a document that was applied to a running controller
#[derive(Debug, clap::Args)]
#[command(after_help = "\
If a file of the controller (`serve -f`) has a document of the same name, that document is in force again. To remove a document
that comes from a file, edit the file. In Kubernetes a document is a resource: use `kubectl delete trafficshift NAME`.")]
pub(super) struct Arguments {
    /// The document's `metadata.name`.
    name: String,

    /// Print a line of text, or the services that remain under that name as JSON.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,

    #[command(flatten)]
    server: Server,
}

impl Arguments {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let controller = self.server.open().await?;
        let name = controller.whole_name(&self.name);
        let path = format!("/v1/shifts/{name}");
        let answer: Services = controller.send(Method::DELETE, &path, Some(&json!({}))).await?;
        match self.output {
            Output::Text => {
                let left = if answer.services.is_empty() { "" } else { "; the file's document is in force again" };
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
