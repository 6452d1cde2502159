//! Handles requests: authentication, authorization, injected faults, and then the store.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::kinds::{Kind, ScalePaths};
use super::patch::Type;
use super::refusal::Refusal;
use super::request::{About, Resource};
use super::view::{Selection, View};
use super::watch::Watch;
use super::write::{Deleted, Part, Writer};
use super::{Attempt, Seen, Shared, discovery, forward, list, lock, patch, scale};

type Body = UnsyncBoxBody<Bytes, anyhow::Error>;

/// Accepts until it is stopped; its connections end with it.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let _ = stream.set_nodelay(true);
                let shared = Arc::clone(&shared);
                let service = service_fn(move |request| respond(Arc::clone(&shared), request));
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades());
            }
            Some(_) = connections.join_next() => {}
            _ = &mut stopped => break,
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn respond(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    Ok(answer(&shared, request).await.unwrap_or_else(|refusal| json_answer(refusal.code, &refusal.to_status())))
}

fn json_answer(status: u16, body: &Value) -> Response<Body> {
    let text = match body {
        Value::String(plain) => plain.clone(),
        other => other.to_string(),
    };
    let content_type = if body.is_string() { "text/plain" } else { "application/json" };
    whole(status, content_type, Full::from(text).map_err(|never| match never {}).boxed_unsync())
}

fn whole(status: u16, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

fn header<'a>(headers: &'a HeaderMap, name: &hyper::header::HeaderName) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    let authorization = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let user = lock(&shared.access).user(authorization).ok_or_else(Refusal::unauthorized)?;
    let about = About::of(request.method(), request.uri());
    if let About::Resource(resource) = &about {
        lock(&shared.seen).push(Seen { attempt: attempt(&user, resource, resource.verb), at: Instant::now() });
        if (resource.plural.as_str(), resource.subresource.as_deref()) == ("pods", Some("portforward")) {
            permit(shared, &user, resource, resource.verb)?;
            return forward::answer(shared, resource, request).map(|response| response.map(|()| Body::default()));
        }
    }
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(|error| Refusal::bad_request(error.to_string()))?.to_bytes();
    // The sender lives as long as `shared`.
    let _ = shared.faults.subscribe().wait_for(|faults| !faults.holds(&user)).await;
    match about {
        About::Other(segments) => Ok(json_answer(200, &discovery::answer(&shared.store(), &segments)?)),
        About::Resource(resource) => {
            permit(shared, &user, &resource, resource.verb)?;
            Call { shared, user, resource, headers: &parts.headers, body }.answer()
        }
    }
}

fn attempt(user: &str, resource: &Resource, verb: &str) -> Attempt {
    let subresource = resource.subresource.as_deref().unwrap_or_default();
    let slash = if subresource.is_empty() { "" } else { "/" };
    // As in a real server: who selects objects of one name attempts no more than that.
    let mut selected = resource.query.get("fieldSelector").split(',');
    let selected = selected.find_map(|field| field.strip_prefix("metadata.name=")).map(str::to_owned);
    Attempt {
        user: user.to_owned(),
        verb: verb.to_owned(),
        group: resource.group.clone(),
        resource: format!("{}{slash}{subresource}", resource.plural),
        namespace: resource.namespace.clone(),
        name: resource.name.clone().or(selected).unwrap_or_default(),
    }
}

fn permit(shared: &Shared, user: &str, resource: &Resource, verb: &str) -> Result<(), Refusal> {
    let attempt = attempt(user, resource, verb);
    if lock(&shared.access).allows(&attempt) {
        return Ok(());
    }
    let Attempt { user, verb, group, resource, namespace, name } = attempt;
    let dot = if group.is_empty() { "" } else { "." };
    let plural = resource.split('/').next().unwrap_or_default();
    let name = if name.is_empty() { String::new() } else { format!(" {name:?}") };
    let scope = if namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {namespace:?}")
    };
    Err(Refusal::forbidden(format!(
        "{plural}{dot}{group}{name} is forbidden: User {user:?} cannot {verb} resource {resource:?} in API group {group:?} {scope}"
    )))
}

/// An authorised request for a resource.
struct Call<'a> {
    shared: &'a Arc<Shared>,
    user: String,
    resource: Resource,
    headers: &'a HeaderMap,
    body: Bytes,
}

impl Call<'_> {
    fn answer(self) -> Result<Response<Body>, Refusal> {
        let Resource { verb, group, version, plural, .. } = &self.resource;
        let kind = self.shared.store().kind_at(group, version, plural).ok_or_else(Refusal::no_such_path)?;
        let across = matches!(*verb, "list" | "watch" | "deletecollection") || kind.review();
        match (kind.namespaced, self.resource.namespace.is_empty()) {
            (false, false) => return Err(Refusal::no_such_path()),
            (true, true) if !across => return Err(Refusal::no_such_method()),
            _ => {}
        }
        let writes = matches!(*verb, "create" | "update" | "patch" | "delete");
        if writes && self.shared.faults.send_if_modified(|faults| faults.take_conflict(&kind.resource())) {
            return Err(Refusal::stale(&kind, self.resource.name.as_deref().unwrap_or_default()));
        }
        let view = View::of(header(self.headers, &ACCEPT));
        let Resource { namespace, name, subresource, query, .. } = &self.resource;
        match (*verb, name.as_deref(), subresource.as_deref()) {
            ("create", None, None) if kind.review() => {
                let review = lock(&self.shared.access).review(&kind.kind, &self.user, self.read()?);
                Ok(json_answer(201, &review))
            }
            _ if kind.review() => Err(Refusal::no_such_method()),
            ("watch", name, None) => {
                let selection = Selection::of(&kind, namespace, name, query)?;
                let lines = Watch::start(self.shared, &kind, selection, view, &self.user, query)?.lines();
                Ok(whole(200, "application/json", StreamBody::new(lines.map_ok(Frame::data)).boxed_unsync()))
            }
            ("list", None, None) => {
                let selection = Selection::of(&kind, namespace, None, query)?;
                Ok(json_answer(200, &list::list(&self.shared.store(), &kind, &selection, view, query)?))
            }
            ("deletecollection", None, None) => {
                let selection = Selection::of(&kind, namespace, None, query)?;
                let options = self.delete_options()?;
                self.shared.write(|store| {
                    for ((namespace, name), object) in store.objects(&kind) {
                        if selection.selects(&object) {
                            store.delete(&kind, &namespace, &name, &options, query.get("dryRun") == "All")?;
                        }
                    }
                    Ok(json_answer(200, &success(&kind, "")))
                })
            }
            ("create", None, None) => {
                let (body, writer) = (self.read()?, self.writer(Part::Main));
                let created = self.shared.write(|store| store.create(&kind, namespace, body, &writer))?;
                Ok(json_answer(201, &view.object(&created)))
            }
            ("create", Some(name), Some("binding")) if kind.kind == "Pod" => self.bind(&kind, name),
            ("get", Some(name), None | Some("status")) => {
                Ok(json_answer(200, &view.object(&*self.shared.store().live(&kind, namespace, name)?)))
            }
            ("update", Some(name), None) => self.replace(&kind, name, Part::Main, view),
            ("update", Some(name), Some("status")) if kind.status => self.replace(&kind, name, Part::Status, view),
            ("patch", Some(name), None) => self.patch(&kind, name, Part::Main, view),
            ("patch", Some(name), Some("status")) if kind.status => self.patch(&kind, name, Part::Status, view),
            ("delete", Some(name), None) => {
                let (options, dry_run) = (self.delete_options()?, query.get("dryRun") == "All");
                let deleted = self.shared.write(|store| store.delete(&kind, namespace, name, &options, dry_run))?;
                Ok(match deleted {
                    Deleted::Terminating(object) => json_answer(200, &view.object(&object)),
                    Deleted::Gone(object) => {
                        json_answer(200, &success(&kind, object["metadata"]["uid"].as_str().unwrap_or_default()))
                    }
                })
            }
            (_, Some(name), Some("scale")) => match &kind.scale {
                Some(paths) => self.scale(&kind, name, paths),
                None => Err(Refusal::no_such_path()),
            },
            (_, _, Some(_)) => Err(Refusal::no_such_path()),
            _ => Err(Refusal::no_such_method()),
        }
    }

    fn writer(&self, part: Part) -> Writer {
        let agent = header(self.headers, &USER_AGENT).split('/').next().unwrap_or_default();
        let given = self.resource.query.get("fieldManager");
        let manager = [given, agent, "unknown"].into_iter().find(|name| !name.is_empty()).unwrap_or_default();
        Writer { manager: manager.to_owned(), part, dry_run: self.resource.query.get("dryRun") == "All" }
    }

    /// The body, which may be YAML.
    fn read(&self) -> Result<Value, Refusal> {
        let content_type = header(self.headers, &CONTENT_TYPE);
        if content_type.contains("protobuf") || content_type.contains("cbor") {
            return Err(Refusal::unsupported(content_type));
        }
        if let Ok(value) = serde_json::from_slice(&self.body) {
            return Ok(value);
        }
        let text = str::from_utf8(&self.body).map_err(|error| Refusal::bad_request(error.to_string()))?;
        serde_saphyr::from_str(text).map_err(|error| Refusal::bad_request(format!("error decoding the body: {error}")))
    }

    /// The body's options, with the query's.
    fn delete_options(&self) -> Result<Value, Refusal> {
        let mut options = if self.body.is_empty() { json!({}) } else { self.read()? };
        if let Some(grace) = self.resource.query.number("gracePeriodSeconds")? {
            options["gracePeriodSeconds"] = grace.into();
        }
        Ok(options)
    }

    fn replace(&self, kind: &Kind, name: &str, part: Part, view: View) -> Result<Response<Body>, Refusal> {
        let (body, writer) = (self.read()?, self.writer(part));
        let replaced = self.shared.write(|store| store.replace(kind, &self.resource.namespace, name, body, &writer))?;
        Ok(json_answer(200, &view.object(&replaced)))
    }

    fn patch(&self, kind: &Kind, name: &str, part: Part, view: View) -> Result<Response<Body>, Refusal> {
        let Resource { namespace, query, .. } = &self.resource;
        let r#type = Type::of(header(self.headers, &CONTENT_TYPE))?;
        let (patch, writer, force) = (self.read()?, self.writer(part), query.is("force"));
        if r#type == Type::Apply && query.get("fieldManager").is_empty() {
            return Err(Refusal::bad_request("fieldManager: Required value: is required for apply patch"));
        }
        let new = self.shared.store().get(kind, namespace, name).is_none();
        if r#type == Type::Apply && new {
            permit(self.shared, &self.user, &self.resource, "create")?;
        }
        let patched =
            self.shared.write(|store| store.patch(kind, (namespace, name), (r#type, patch), force, &writer))?;
        Ok(json_answer(if new { 201 } else { 200 }, &view.object(&patched)))
    }

    /// Server-side apply is treated as a merge patch here.
    fn scale(&self, kind: &Kind, name: &str, paths: &ScalePaths) -> Result<Response<Body>, Refusal> {
        let namespace = &self.resource.namespace;
        let live = self.shared.store().live(kind, namespace, name)?;
        let is = scale::of(&live, paths);
        let wanted = match self.resource.verb {
            "get" => return Ok(json_answer(200, &is)),
            "update" => self.read()?,
            "patch" => {
                let mut bare = is;
                // A patch conflicts only if it says what it is about.
                bare["metadata"]["resourceVersion"] = Value::Null;
                patch::patched(&bare, &self.read()?, Type::of(header(self.headers, &CONTENT_TYPE))?, kind)?
            }
            _ => return Err(Refusal::no_such_method()),
        };
        let writer = self.writer(Part::Scale);
        let scaled = self.shared.write(|store| {
            let live = store.live(kind, namespace, name)?;
            let mut next = scale::scaled(&live, &wanted, paths)?;
            if next["metadata"]["resourceVersion"].is_null() {
                next["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"].clone();
            }
            store.replace(kind, namespace, name, next, &writer)
        })?;
        Ok(json_answer(200, &scale::of(&scaled, paths)))
    }

    /// Gives a pod to a node, once.
    fn bind(&self, kind: &Kind, name: &str) -> Result<Response<Body>, Refusal> {
        let (binding, namespace) = (self.read()?, &self.resource.namespace);
        let node = binding["target"]["name"].clone();
        let writer = self.writer(Part::Main);
        self.shared.write(|store| {
            let mut pod = Value::clone(&*store.live(kind, namespace, name)?);
            if pod["spec"]["nodeName"].is_string() {
                let why = format!("pod {name} is already assigned to node {}", pod["spec"]["nodeName"]);
                return Err(Refusal::conflict(kind, name, &why));
            }
            pod["spec"]["nodeName"] = node;
            store.replace(kind, namespace, name, pod, &writer)?;
            Ok(json_answer(201, &success(kind, "")))
        })
    }
}

fn success(kind: &Kind, uid: &str) -> Value {
    let details = json!({ "group": kind.group, "kind": kind.plural, "uid": uid });
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details })
}
