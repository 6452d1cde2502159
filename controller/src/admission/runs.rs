//! The workload and pods of a version. Each belongs to one version of one document: two versions that scale the same
//! workload would take pods from each other, and of two versions that share pods neither can be drained. A version with
//! the same name in several services of a document is one version.

use crate::namespace_ref::NamespaceRef;
use std::collections::BTreeSet;
use std::fmt;
use tideshift_core::shift::{Discovery, LabelOperator, LabelRequirement, ShiftVersion, TrafficShift};

/// Why a second claim is rejected.
pub(super) const ONE_VERSION: &str = "a workload, and a pod, belongs to one version of one TrafficShift";

/// A resource that belongs to one version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Runs {
    /// The workload that is scaled.
    Workload {
        /// The API group; the API version makes no difference.
        group: String,
        kind: String,
        name: String,
    },
    /// The pods that match this selector, written as `kubectl` writes it.
    Pods(BTreeSet<String>),
}

impl Runs {
    /// Whether two claims overlap, as far as the documents tell. Overlaps that only show once the pods exist are found
    /// by `kubernetes::endpoints`.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pods(own), Self::Pods(others)) => own.is_subset(others) || others.is_subset(own),
            _ => self == other,
        }
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload { kind, name, .. } => write!(f, "{kind} {name}"),
            Self::Pods(requirements) => {
                let all: Vec<_> = requirements.iter().map(String::as_str).collect();
                write!(f, "the pods of {}", all.join(", "))
            }
        }
    }
}

/// The claims of a version: the field of each, and its namespace.
pub(super) fn claims(shift: &TrafficShift, version: &ShiftVersion) -> Vec<(&'static str, (NamespaceRef, Runs))> {
    let workload = version.workload.as_ref().map(|workload| {
        let group = workload.api_version.split_once('/').map_or("", |(group, _)| group).to_owned();
        ("workloadRef", Runs::Workload { group, kind: workload.kind.clone(), name: workload.name.clone() })
    });
    let pods = version.discovery.as_ref().map(|discovery| {
        let field = if discovery.service.is_some() { "service" } else { "selector" };
        (field, Runs::Pods(requirements(discovery)))
    });
    let all = workload.into_iter().chain(pods);
    all.map(|(field, runs)| (field, (NamespaceRef::of(shift, version), runs))).collect()
}

fn requirements(discovery: &Discovery) -> BTreeSet<String> {
    let service = discovery.service.iter().map(|service| format!("Service {service}"));
    let selector = discovery.selector.iter();
    let labels = selector.clone().flat_map(|selector| &selector.match_labels);
    let labels = labels.map(|(key, value)| format!("{key}={value}"));
    let expressions = selector.flat_map(|selector| &selector.match_expressions).map(requirement);
    service.chain(labels).chain(expressions).collect()
}

fn requirement(of: &LabelRequirement) -> String {
    let values: BTreeSet<&str> = of.values.iter().map(String::as_str).collect();
    let values: Vec<_> = values.into_iter().collect();
    let key = &of.key;
    match (of.operator, values.as_slice()) {
        (LabelOperator::In, [value]) => format!("{key}={value}"),
        (LabelOperator::In, values) => format!("{key} in ({})", values.join(",")),
        (LabelOperator::NotIn, values) => format!("{key} notin ({})", values.join(",")),
        (LabelOperator::Exists, _) => key.clone(),
        (LabelOperator::DoesNotExist, _) => format!("!{key}"),
    }
}
