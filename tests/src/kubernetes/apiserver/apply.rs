//! Server-side apply: a manager sends all fields that it wants; it becomes their owner unless another manager owns them
//! with other values. Fields that it no longer sends are removed unless another manager still owns them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::fields;
use super::fields::{Fields, Manager, overlap, shown};
use super::kinds::Kind;
use super::refusal::Refusal;
use super::shape::Shape;

/// The result of applying `wanted` to `live` as the manager `by`, with the managers. For a new object `live` is bare.
pub(super) fn apply(live: &Value, wanted: &Value, kind: &Kind, by: Manager, force: bool) -> Result<Value, Refusal> {
    let mut managers = Manager::all_of(live);
    let same = |manager: &Manager| manager.name == by.name && manager.applies && manager.subresource == by.subresource;
    let before = managers.iter().position(same).map(|index| managers.remove(index));
    let (old, new) = (fields::paths(live, kind), fields::paths(wanted, kind));

    let changed = |path: &fields::Path| match (old.get(path), new.get(path)) {
        (Some(old), Some(new)) => old != new,
        _ => true,
    };
    let mut conflicts = BTreeSet::new();
    for manager in &mut managers {
        let lost: Fields = manager
            .fields
            .iter()
            .filter(|owned| {
                // Items of lists hold nothing themselves.
                new.keys().any(|path| overlap(owned, path) && changed(path) && !is_part(owned, path, &new, &old))
            })
            .cloned()
            .collect();
        let using = if manager.applies { String::new() } else { format!(" using {}", kind.api_version()) };
        let who = format!("{:?}{using}", manager.name);
        conflicts.extend(lost.iter().map(|path| (who.clone(), shown(path))));
        manager.fields.retain(|path| !lost.contains(path));
    }
    if !conflicts.is_empty() && !force {
        return Err(Refusal::owned_by_others(&conflicts.into_iter().collect::<Vec<_>>()));
    }

    let mut merged = live.clone();
    merge(&mut merged, wanted, Shape::of(kind));
    let gone = before.iter().flat_map(|before| &before.fields).filter(|path| !new.contains_key(*path));
    // Longer paths first: the fields of an item before the item.
    for path in gone.collect::<Vec<_>>().into_iter().rev() {
        let wanted_by_another =
            managers.iter().any(|manager| manager.fields.iter().any(|owned| owned.starts_with(path)));
        let still_there = new.keys().any(|kept| kept.starts_with(path));
        if !wanted_by_another && !still_there {
            fields::remove(&mut merged, Shape::of(kind), path);
        }
    }

    let fields: Fields = new.into_keys().collect();
    let time = before.filter(|before| before.fields == fields).map_or(by.time, |before| before.time);
    managers.push(Manager { fields, time, ..by });
    managers.sort_by(|one, other| other.applies.cmp(&one.applies).then_with(|| one.name.cmp(&other.name)));
    Manager::write_all(&managers, &mut merged, kind);
    Ok(merged)
}

/// Whether two paths overlap only as an item of a list and a field of that item do, or an empty map and what is put
/// into it: then neither changes the other.
fn is_part(
    owned: &fields::Path,
    path: &fields::Path,
    new: &std::collections::BTreeMap<fields::Path, &Value>,
    old: &std::collections::BTreeMap<fields::Path, &Value>,
) -> bool {
    let container = |value: Option<&&Value>| value.is_some_and(|value| value.is_null() || value.is_object());
    match owned.len().cmp(&path.len()) {
        std::cmp::Ordering::Less => container(old.get(owned)),
        std::cmp::Ordering::Equal => false,
        std::cmp::Ordering::Greater => container(new.get(path)),
    }
}

/// Merges the applied fields into the object.
fn merge(live: &mut Value, wanted: &Value, shape: Shape<'_>) {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) if !shape.atomic_map() => {
            for (name, value) in wanted {
                merge(live.entry(name.as_str()).or_insert(Value::Null), value, shape.field(name));
            }
        }
        (Value::Array(live), Value::Array(wanted)) => {
            let list = shape.list();
            let Some(steps) = list.steps(wanted) else {
                wanted.clone_into(live);
                return;
            };
            for (item, step) in wanted.iter().zip(steps) {
                match live.iter_mut().find(|there| list.step(there).as_ref() == Some(&step)) {
                    Some(there) => merge(there, item, shape.items()),
                    None => live.push(item.clone()),
                }
            }
        }
        (live, wanted) => wanted.clone_into(live),
    }
}
