//! Documents that came through the API: each takes the place of the file's of the same name until that one changes.

use crate::documents;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use tideshift_core::shift::TrafficShift;

/// A document from the API. Kept across restarts of the controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// As it was sent.
    pub document: Value,
    /// The file's document of the same name at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<Value>,
}

/// The documents in force. Those from the API that a file has overtaken are forgotten.
pub(super) fn in_force(files: &[(TrafficShift, Value)], applied: &mut BTreeMap<String, Applied>) -> Vec<TrafficShift> {
    applied.retain(|name, applied| {
        let file = files.iter().find(|(shift, _)| shift.name == *name).map(|(_, value)| value);
        file == applied.over.as_ref() && TrafficShift::read(&applied.document).is_ok()
    });
    let read = |name: &String| applied.get(name).and_then(|applied| TrafficShift::read(&applied.document).ok());
    let of_files = files.iter().map(|(shift, _)| read(&shift.name).unwrap_or_else(|| shift.clone()));
    let mut shifts: Vec<TrafficShift> = of_files.collect();
    let others = applied.keys().filter(|name| !files.iter().any(|(shift, _)| shift.name == **name));
    shifts.extend(others.filter_map(read));
    shifts
}

/// Whether a document can be put in force under this name beside the others.
///
/// # Errors
///
/// Everything that is wrong with it, one line each.
pub(super) fn check(name: &str, document: &Value, others: &[TrafficShift]) -> Result<(), String> {
    let shift = TrafficShift::read(document).map_err(|errors| errors.to_string())?;
    if shift.name != name {
        return Err(format!("metadata.name: \"{}\" is not allowed; expected \"{name}\", as in the path", shift.name));
    }
    documents::comes_from_elsewhere(&shift)?;
    documents::needs_no_cluster(&shift)?;
    let others: Vec<TrafficShift> = others.iter().filter(|other| other.name != name).cloned().collect();
    documents::agree(&others, shift).map_err(|errors| errors.join("\n"))
}
