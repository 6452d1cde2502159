//! Determines the documents in force: those from files, overridden by those from the API until the file's document of
//! the same name changes. For a refused document, the previous one stays in force.

use crate::admission::{Admitted, Held};
use crate::{admission, documents};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use tideshift_core::decode::{Errors, FieldError, Problem};
use tideshift_core::shift::TrafficShift;

/// A document from the API. Persisted across restarts of the controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApiOverride {
    /// The document as sent.
    pub document: Value,
    /// The file's document of the same name at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<Value>,
}

/// The result of admitting all documents.
#[derive(Debug, Default)]
pub(super) struct InForce {
    /// The documents in force, in their order.
    pub(super) held: Vec<Arc<Held>>,
    /// By name, why other documents are refused.
    pub(super) refused: BTreeMap<String, Errors>,
    /// The API documents that a change of the file has replaced.
    pub(super) overtaken: Vec<String>,
}

/// Admits all documents. Each is accepted or refused on its own. If two claim the same host or name, the current owner
/// keeps it. (An API document was accepted only because it agreed with the files at that time: it is the older one.)
pub(super) fn admit(
    before: &[Arc<Held>],
    files: &[(TrafficShift, Value)],
    applied: &BTreeMap<String, ApiOverride>,
) -> InForce {
    let (files, twice) = each_name_once(before, files);
    let of_file: BTreeMap<&str, &Value> = files.iter().map(|(shift, value)| (shift.name.as_str(), *value)).collect();
    let read = |applied: &ApiOverride| TrafficShift::read(&applied.document);
    let is_current = |name: &str, applied: &ApiOverride| {
        of_file.get(name).copied() == applied.over.as_ref() && read(applied).is_ok()
    };
    let (current, overtaken): (Vec<_>, Vec<_>) = applied.iter().partition(|(name, of)| is_current(name, of));
    let before: BTreeMap<String, Arc<Held>> =
        before.iter().map(|held| (held.shift.name.clone(), held.clone())).collect();
    let document = |name: &str, document: &Value, shift: Result<TrafficShift, Errors>| {
        let held = shift.and_then(|shift| {
            let size = admission::check(&shift, document)?;
            Ok(Arc::new(Held { shift, document: document.clone(), size }))
        });
        (name.to_owned(), held)
    };
    let is_over = |name: &str| current.iter().any(|(applied, _)| *applied == name);
    let of_files = files.iter().filter(|(shift, _)| !is_over(&shift.name));
    let of_files = of_files.map(|(shift, value)| document(&shift.name, value, Ok((*shift).clone())));
    let of_api = current.iter().map(|(name, applied)| document(name, &applied.document, read(applied)));
    let Admitted { mut held, mut refused } = admission::agree(&before, of_api.chain(of_files));
    refused.extend(twice);
    // An API document stays as long as the file's document that would replace it is refused.
    let overtaken = overtaken.into_iter().map(|(name, _)| name).filter(|name| !refused.contains_key(*name));
    let overtaken = overtaken.cloned().collect();
    let others = current.iter().map(|(name, _)| name.as_str()).filter(|name| !of_file.contains_key(name));
    let order = files.iter().map(|(shift, _)| shift.name.as_str()).chain(others);
    let held = order.filter_map(|name| held.remove(name)).collect();
    InForce { held, refused, overtaken }
}

/// For file documents with the same name: the one in force, or else the first; and the errors of the others.
fn each_name_once<'d>(
    before: &[Arc<Held>],
    files: &'d [(TrafficShift, Value)],
) -> (Vec<(&'d TrafficShift, &'d Value)>, BTreeMap<String, Errors>) {
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut once, mut twice): (Vec<(&TrafficShift, &Value)>, _) = (Vec::with_capacity(files.len()), BTreeMap::new());
    for (shift, document) in files {
        let Some(place) = places.get(shift.name.as_str()) else {
            places.insert(&shift.name, once.len());
            once.push((shift, document));
            continue;
        };
        let path = "metadata.name".to_owned();
        let why = format!("\"{}\" is the name of two TrafficShifts in the files", shift.name);
        twice.insert(shift.name.clone(), Errors(vec![FieldError { path, problem: Problem::Unreadable(why) }]));
        let is_in_force = |document: &Value| before.iter().any(|held| held.document == *document);
        if is_in_force(document) && !is_in_force(once[*place].1) {
            once[*place] = (shift, document);
        }
    }
    (once, twice)
}

/// Checks whether a document may be applied through the API under this name.
///
/// # Errors
///
/// All its errors, one line each.
pub(super) fn check(name: &str, document: &Value) -> Result<(), String> {
    let shift = TrafficShift::read(document).map_err(|errors| errors.to_string())?;
    if shift.name != name {
        return Err(format!("metadata.name: \"{}\" is not allowed; expected \"{name}\", as in the path", shift.name));
    }
    documents::comes_from_elsewhere(&shift)?;
    documents::needs_no_cluster(&shift)
}
