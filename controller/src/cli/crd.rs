//! `tideshift crd`: TrafficShift as Kubernetes knows it.

use super::{Failure, print};
use crate::kubernetes::crd;

/// Print the CustomResourceDefinition of TrafficShift for Kubernetes
///
/// It is of this version of Tideshift: apply it before the controller that needs it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift crd | kubectl apply --server-side -f -
  tideshift crd > crd.yaml
  kubectl explain trafficshift.spec.strategy       What may be in a document, once it is applied")]
pub(super) struct Arguments {}

impl Arguments {
    pub(super) fn run(&self) -> Result<(), Failure> {
        print(&crd::yaml().map_err(|error| Failure::Other(error.into()))?)
    }
}
