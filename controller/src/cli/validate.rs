//! `tideshift validate`: are the documents right?

use super::{Failure, print};
use crate::documents::{self, Document};
use std::path::PathBuf;

/// Say whether documents are right, and everything that is wrong with them
///
/// Reads TrafficShift documents, and policies as the filter's plugin configuration has them. Every error of every file
/// is printed, one a line, as FILE: FIELD: what is wrong and what is allowed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift validate -f shift.yaml
  tideshift validate -f checkout.yaml -f search.yaml
  generate-shift checkout | tideshift validate -f -

Exit codes: 0 all are right; 2 at least one is not.")]
pub(super) struct Arguments {
    /// YAML or JSON, several documents divided by `---`; `-` reads standard input. May be given several times.
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
