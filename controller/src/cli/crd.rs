//! `tideshift crd`: the CustomResourceDefinition of TrafficShift.

use super::{Failure, print};
use crate::kubernetes::crd;

/// Print the CustomResourceDefinition of TrafficShift for Kubernetes
///
/// It matches this version of Tideshift. Apply it before you upgrade the controller.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift crd | kubectl apply --server-side -f -
  tideshift crd > crd.yaml
  kubectl explain trafficshift.spec.strategy       Show the fields of a document, once the CRD is applied")]
pub(super) struct Arguments {}

impl Arguments {
    pub(super) fn run(&self) -> Result<(), Failure> {
        print(&crd::yaml().map_err(|error| Failure::Other(error.into()))?)
    }
}
