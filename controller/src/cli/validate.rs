//! `tideshift validate`: checks documents.

use super::{Failure, print};
use crate::documents;
use crate::documents::Document;
use std::path::PathBuf;

/// Validate documents and print every error
///
/// Reads TrafficShift documents, and policies in the format of the filter's plugin configuration. Prints every error of
/// every file, one per line: FILE: FIELD: the error and the allowed values.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift validate -f shift.yaml
  tideshift validate -f checkout.yaml -f search.yaml
  generate-shift checkout | tideshift validate -f -

Exit codes: 0 all documents are valid; 2 at least one is invalid.")]
pub(super) struct Arguments {
    /// YAML or JSON, several documents separated by `---`; `-` reads standard input. Repeatable.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let documents = documents::load_any(&arguments.files)?;
    let line = |(source, document): &(documents::Source, Document)| match document {
        Document::Shift(shift) => format!("{source}: TrafficShift {} is valid\n", shift.name),
        Document::Policy(policy) => {
            let services: Vec<_> = policy.services.iter().map(|service| service.name.as_str()).collect();
            format!("{source}: policy of revision {} ({}) is valid\n", policy.revision, services.join(", "))
        }
    };
    print(&documents.iter().map(line).collect::<String>())
}
