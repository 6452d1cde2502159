//! Lists, complete or in pages. All pages have the revision of the first, as in real servers.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::kinds::Kind;
use super::refusal::Refusal;
use super::request::Query;
use super::store::{Name, Store};
use super::view::{Selection, View};

pub(super) fn list(
    store: &Store,
    kind: &Kind,
    selection: &Selection,
    view: View,
    query: &Query,
) -> Result<Value, Refusal> {
    let limit = query.number("limit")?.and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit > 0);
    let asked = query.number("resourceVersion")?.unwrap_or_default();
    store.check_reached(asked)?;
    let (revision, after) = match query.get("continue") {
        "" if query.get("resourceVersionMatch") == "Exact" => (asked, None),
        "" => (store.revision(), None),
        token => read(token).map(|(revision, name)| (revision, Some(name)))?,
    };
    let objects = match revision == store.revision() {
        true => store.objects(kind),
        false => store.objects_at(kind, revision)?,
    };
    let selected: BTreeMap<_, _> = objects
        .iter()
        .filter(|(name, object)| after.as_ref().is_none_or(|after| *name > after) && selection.selects(object))
        .collect();
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    let page = limit.unwrap_or(usize::MAX);
    if let Some((last, _)) = page.checked_sub(1).and_then(|last| selected.iter().nth(last))
        && selected.len() > page
    {
        metadata["continue"] = format!("{revision}:{}/{}", last.0, last.1).into();
        metadata["remainingItemCount"] = (selected.len() - page).into();
    }
    let items: Vec<&Value> = selected.values().take(page).map(|object| &***object).collect();
    Ok(view.list(kind, metadata, &items))
}

fn read(token: &str) -> Result<(u64, Name), Refusal> {
    let parts =
        token.split_once(':').and_then(|(revision, name)| Some((revision.parse().ok()?, name.split_once('/')?)));
    let (revision, (namespace, name)) = parts.ok_or_else(|| Refusal::bad_request("continue key is not valid"))?;
    Ok((revision, (namespace.to_owned(), name.to_owned())))
}
