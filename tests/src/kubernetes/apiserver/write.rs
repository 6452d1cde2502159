//! Validates and completes writes: names, resourceVersions, generations, finalizers, the parts that a subresource may
//! change, and field ownership.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::admit::{admit, now};
use super::fields::Manager;
use super::kinds::Kind;
use super::refusal::Refusal;
use super::store::Store;
use super::{apply, fields, patch};

/// The part of an object that a write affects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Everything but the status, if that is a subresource.
    Main,
    Status,
    /// Like `Main`, through the subresource `scale`.
    Scale,
}

/// The writer.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    /// The `fieldManager`.
    pub(super) manager: String,
    pub(super) part: Part,
    pub(super) dry_run: bool,
}

/// The origin of the next state of an object.
enum By {
    Update,
    /// Server-side apply, which has already updated the managed fields.
    Apply,
}

/// The result of a deletion.
pub(super) enum Deleted {
    /// It is deleted.
    Gone(Arc<Value>),
    /// It waits for its finalizers or its grace period.
    Terminating(Arc<Value>),
}

impl Writer {
    fn as_manager(&self, applies: bool) -> Manager {
        let subresource = match self.part {
            Part::Main => "",
            Part::Status => "status",
            Part::Scale => "scale",
        };
        let (name, fields) = (self.manager.clone(), fields::Fields::new());
        Manager { name, applies, subresource: subresource.to_owned(), time: now(), fields }
    }
}

impl Store {
    pub(super) fn create(
        &mut self,
        kind: &Kind,
        namespace: &str,
        body: Value,
        writer: &Writer,
    ) -> Result<Arc<Value>, Refusal> {
        self.create_by(kind, namespace, body, writer, By::Update)
    }

    fn create_by(
        &mut self,
        kind: &Kind,
        namespace: &str,
        body: Value,
        writer: &Writer,
        by: By,
    ) -> Result<Arc<Value>, Refusal> {
        let mut object = body;
        if text(&object["metadata"]["name"]).is_empty() {
            let prefix = text(&object["metadata"]["generateName"]);
            if prefix.is_empty() {
                let cause = ("metadata.name".to_owned(), "Required value: name or generateName is required".to_owned());
                return Err(Refusal::invalid(kind, "", &[cause]));
            }
            object["metadata"]["name"] = format!("{prefix}{}", suffix()).into();
        }
        let name = text(&object["metadata"]["name"]).to_owned();
        expect(kind, namespace, &name, &mut object)?;
        if !text(&object["metadata"]["resourceVersion"]).is_empty() {
            return Err(Refusal::versioned_before_it_is_there());
        }
        let namespaces = self.kind("namespaces").filter(|_| self.strict_namespaces && kind.namespaced);
        if let Some(namespaces) = namespaces
            && self.get(&namespaces, "", namespace).is_none()
        {
            return Err(Refusal::not_found(&namespaces, namespace));
        }
        if self.get(kind, namespace, &name).is_some() {
            return Err(Refusal::already_exists(kind, &name));
        }
        if kind.status {
            without(&mut object, "status");
        }
        let metadata = &mut object["metadata"];
        metadata["uid"] = uid().into();
        metadata["creationTimestamp"] = now().into();
        for given in ["deletionTimestamp", "deletionGracePeriodSeconds", "generation"] {
            without(metadata, given);
        }
        if kind.generation {
            metadata["generation"] = 1.into();
        }
        if matches!(by, By::Update) {
            without(metadata, "managedFields");
        }
        admit(kind, &mut object)?;
        if matches!(by, By::Update) {
            Manager::write_all(
                &fields::updated(&Value::Null, &object, kind, writer.as_manager(false)),
                &mut object,
                kind,
            );
        }
        if writer.dry_run {
            return Ok(Arc::new(object));
        }
        Ok(self.commit(kind, (namespace.to_owned(), name), object, false))
    }

    pub(super) fn replace(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        body: Value,
        writer: &Writer,
    ) -> Result<Arc<Value>, Refusal> {
        let live = self.live(kind, namespace, name)?;
        if kind.custom() && text(&body["metadata"]["resourceVersion"]).is_empty() {
            let cause =
                ("metadata.resourceVersion".to_owned(), "Invalid value: 0: must be specified for an update".to_owned());
            return Err(Refusal::invalid(kind, name, &[cause]));
        }
        self.finish(kind, namespace, name, &live, body, writer, By::Update)
    }

    /// `force` applies to server-side apply.
    pub(super) fn patch(
        &mut self,
        kind: &Kind,
        (namespace, name): (&str, &str),
        patch: (patch::Type, Value),
        force: bool,
        writer: &Writer,
    ) -> Result<Arc<Value>, Refusal> {
        let (r#type, mut patch) = patch;
        if r#type != patch::Type::Apply {
            let live = self.live(kind, namespace, name)?;
            let next = patch::patched(&live, &patch, r#type, kind)?;
            return self.finish(kind, namespace, name, &live, next, writer, By::Update);
        }
        expect(kind, namespace, name, &mut patch)?;
        if patch["metadata"].get("managedFields").is_some_and(|fields| !fields.is_null()) {
            return Err(Refusal::bad_request("metadata.managedFields must be nil"));
        }
        if let (Part::Status, Some(fields)) = (writer.part, patch.as_object_mut()) {
            fields.retain(|name, _| matches!(name.as_str(), "apiVersion" | "kind" | "metadata" | "status"));
            fields["metadata"] = json!({ "name": name, "resourceVersion": fields["metadata"]["resourceVersion"] });
        } else if kind.status {
            without(&mut patch, "status");
        }
        let by = writer.as_manager(true);
        match self.get(kind, namespace, name).cloned() {
            Some(live) => {
                let mut next = apply::apply(&live, &patch, kind, by, force)?;
                if next["metadata"]["resourceVersion"].is_null() {
                    next["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"].clone();
                }
                self.finish(kind, namespace, name, &live, next, writer, By::Apply)
            }
            None if writer.part != Part::Main => Err(Refusal::not_found(kind, name)),
            None if !text(&patch["metadata"]["uid"]).is_empty() => Err(Refusal::conflict(
                kind,
                name,
                "uid mismatch: the provided object specified a uid, and no object was found",
            )),
            None => {
                let bare = json!({ "apiVersion": kind.api_version(), "kind": kind.kind, "metadata": { "name": name } });
                let object = apply::apply(&bare, &patch, kind, by, force)?;
                self.create_by(kind, namespace, object, writer, By::Apply)
            }
        }
    }

    /// Replaces `live` by `next` as far as the writer may.
    #[expect(clippy::too_many_arguments, reason = "the object's place, its two states, and who writes how")]
    fn finish(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        live: &Value,
        mut next: Value,
        writer: &Writer,
        by: By,
    ) -> Result<Arc<Value>, Refusal> {
        expect(kind, namespace, name, &mut next)?;
        let given = &next["metadata"];
        let version = text(&given["resourceVersion"]);
        if !version.is_empty() && version != text(&live["metadata"]["resourceVersion"]) {
            return Err(Refusal::stale(kind, name));
        }
        let uid = text(&given["uid"]);
        if !uid.is_empty() && uid != text(&live["metadata"]["uid"]) {
            let why = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                text(&live["metadata"]["uid"])
            );
            return Err(Refusal::conflict(kind, name, &why));
        }
        let managed = given["managedFields"].clone();
        if writer.part == Part::Status {
            let status = next["status"].take();
            next = live.clone();
            put(&mut next, "status", status);
        } else if kind.status {
            put(&mut next, "status", live["status"].clone());
        }
        for servers in [
            "uid",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
            "managedFields",
            "resourceVersion",
        ] {
            put(&mut next["metadata"], servers, live["metadata"][servers].clone());
        }
        admit(kind, &mut next)?;
        if kind.generation && specification(&next, kind) != specification(live, kind) {
            next["metadata"]["generation"] = (live["metadata"]["generation"].as_u64().unwrap_or_default() + 1).into();
        }
        let same = next == *live;
        match by {
            By::Update if same => return self.live(kind, namespace, name),
            By::Update => {
                Manager::write_all(&fields::updated(live, &next, kind, writer.as_manager(false)), &mut next, kind)
            }
            By::Apply if same && managed == live["metadata"]["managedFields"] => {
                return self.live(kind, namespace, name);
            }
            By::Apply => next["metadata"]["managedFields"] = managed,
        }
        if writer.dry_run {
            return Ok(Arc::new(next));
        }
        let deleted = !next["metadata"]["deletionTimestamp"].is_null()
            && !waits(&next)
            && next["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or_default() == 0;
        Ok(self.commit(kind, (namespace.to_owned(), name.to_owned()), next, deleted))
    }

    /// `options` are the `DeleteOptions` of the query and the body.
    pub(super) fn delete(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        options: &Value,
        dry_run: bool,
    ) -> Result<Deleted, Refusal> {
        let live = self.live(kind, namespace, name)?;
        for (field, shown) in [("uid", "UID"), ("resourceVersion", "ResourceVersion")] {
            let (wanted, is) = (text(&options["preconditions"][field]), text(&live["metadata"][field]));
            if !wanted.is_empty() && wanted != is {
                let why =
                    format!("Precondition failed: {shown} in precondition: {wanted}, {shown} in object meta: {is}");
                return Err(Refusal::conflict(kind, name, &why));
            }
        }
        // Only the kubelet knows when a pod that runs on a node has ended.
        let runs = kind.kind == "Pod" && live["spec"]["nodeName"].is_string();
        let own = || live["spec"]["terminationGracePeriodSeconds"].as_u64();
        let grace = if runs { options["gracePeriodSeconds"].as_u64().or_else(own).unwrap_or(30) } else { 0 };
        let mut next = Value::clone(&live);
        if grace == 0 && !waits(&live) {
            return Ok(Deleted::Gone(match dry_run {
                true => live,
                false => self.commit(kind, (namespace.to_owned(), name.to_owned()), next, true),
            }));
        }
        let metadata = &mut next["metadata"];
        if metadata["deletionTimestamp"].is_null() {
            metadata["deletionTimestamp"] = now().into();
            if kind.generation {
                metadata["generation"] = (metadata["generation"].as_u64().unwrap_or_default() + 1).into();
            }
            metadata["deletionGracePeriodSeconds"] = grace.into();
        } else if metadata["deletionGracePeriodSeconds"].as_u64().is_some_and(|before| grace < before) {
            metadata["deletionGracePeriodSeconds"] = grace.into();
        }
        if dry_run || next == *live {
            return Ok(Deleted::Terminating(live));
        }
        Ok(Deleted::Terminating(self.commit(kind, (namespace.to_owned(), name.to_owned()), next, false)))
    }

    /// The object, which must exist.
    pub(super) fn live(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Arc<Value>, Refusal> {
        self.get(kind, namespace, name).cloned().ok_or_else(|| Refusal::not_found(kind, name))
    }
}

/// Checks the kind, namespace and name in an object against the request, and fills in missing ones.
fn expect(kind: &Kind, namespace: &str, name: &str, object: &mut Value) -> Result<(), Refusal> {
    let Some(fields) = object.as_object_mut() else {
        return Err(Refusal::bad_request("the object provided is not an object"));
    };
    if !fields.get("metadata").is_some_and(Value::is_object) {
        fields.insert("metadata".to_owned(), Value::Object(Map::new()));
    }
    for (field, wanted) in [("apiVersion", kind.api_version()), ("kind", kind.kind.clone())] {
        let is = fields.entry(field).or_insert_with(|| wanted.clone().into());
        if *is != wanted {
            let message =
                format!("the {field} in the data ({}) does not match the expected {field} ({wanted})", text(is));
            return Err(Refusal::bad_request(message));
        }
    }
    let metadata = &mut object["metadata"];
    for (field, wanted) in [("namespace", namespace), ("name", name)] {
        if !metadata[field].is_null() && metadata[field] != wanted {
            let message = format!(
                "the {field} of the object ({}) does not match the {field} on the URL ({wanted})",
                text(&metadata[field])
            );
            return Err(Refusal::bad_request(message));
        }
        put(metadata, field, if wanted.is_empty() { Value::Null } else { wanted.into() });
    }
    let strange = |letter: char| !matches!(letter, 'a'..='z' | '0'..='9' | '-' | '.' | ':');
    if name.is_empty() || name.contains(strange) || name.len() > 253 {
        let wrong = format!(
            "Invalid value: {name:?}: a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
        );
        return Err(Refusal::invalid(kind, name, &[("metadata.name".to_owned(), wrong)]));
    }
    Ok(())
}

/// The part of an object whose changes the generation counts.
fn specification(object: &Value, kind: &Kind) -> Map<String, Value> {
    let mut fields = object.as_object().cloned().unwrap_or_default();
    fields.retain(|name, _| name != "metadata" && !(kind.status && name == "status"));
    fields
}

fn waits(object: &Value) -> bool {
    object["metadata"]["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Sets a field, or removes it for null.
fn put(object: &mut Value, field: &str, value: Value) {
    if value.is_null() {
        without(object, field);
    } else {
        object[field] = value;
    }
}

fn without(object: &mut Value, field: &str) {
    if let Value::Object(fields) = object {
        fields.remove(field);
    }
}

/// The suffix for `generateName`, with the alphabet of real servers.
fn suffix() -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5).map(|_| char::from(LETTERS[fastrand::usize(..LETTERS.len())])).collect()
}

fn uid() -> String {
    let bits = fastrand::u128(..);
    let hex = format!("{bits:032x}");
    format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..])
}
