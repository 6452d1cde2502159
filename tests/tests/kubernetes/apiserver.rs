//! The API server that tests bring along does what real ones do, as kube's own client and watcher see it.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, ListParams, PartialObjectMeta, Patch, PatchParams, PostParams,
    Preconditions, WatchEvent, WatchParams,
};
use kube::core::GroupVersionKind;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _, discovery};
use serde_json::{Value, json};
use tideshift_tests::envoy_fixture::DEADLINE;
use tideshift_tests::kubernetes;
use tideshift_tests::kubernetes::apiserver::{ApiServer, Whom, rollouts_crd};
use tideshift_tests::wait::eventually;
use tokio::time::timeout;

async fn client_of(server: &ApiServer, user: &str) -> anyhow::Result<Client> {
    kubernetes::client(&server.kubeconfig_of(user)?).await
}

async fn start() -> anyhow::Result<(ApiServer, Client)> {
    let server = ApiServer::start().await?;
    let client = client_of(&server, "admin").await?;
    Ok((server, client))
}

fn config_map(name: &str, data: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } },
        "data": data,
    })
}

fn deployment(name: &str) -> Value {
    let labels = json!({ "app": name });
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": {
            "replicas": 2,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": { "containers": [{ "name": "main", "image": "main:1" }] },
            },
        },
    })
}

fn typed<T: serde::de::DeserializeOwned>(value: Value) -> anyhow::Result<T> {
    Ok(serde_json::from_value(value)?)
}

/// The code of an API error.
fn code<T>(outcome: Result<T, kube::Error>) -> u16 {
    match outcome {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(_) => 0,
    }
}

#[tokio::test]
async fn one_resource_version_for_all_and_none_for_what_changes_nothing() -> anyhow::Result<()> {
    let (_server, client) = start().await?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "shop");
    let pods = Api::<Pod>::all(client);
    let params = PostParams::default();
    let created = maps.create(&params, &typed(config_map("a", json!({ "x": "1" })))?).await?;
    ensure!(created.uid().is_some() && created.creation_timestamp().is_some());
    assert_eq!(code(maps.create(&params, &created).await), 500);
    assert_eq!(code(maps.create(&params, &typed(config_map("a", json!({})))?).await), 409);

    let mut changed = created.clone();
    changed.data = Some([("x".to_owned(), "2".to_owned())].into());
    let replaced = maps.replace("a", &params, &changed).await?;
    let number = |version: Option<String>| version.unwrap_or_default().parse::<u64>();
    ensure!(number(replaced.resource_version())? > number(created.resource_version())?);
    assert_eq!(code(maps.replace("a", &params, &changed).await), 409, "the resourceVersion is stale");
    let same = maps.replace("a", &params, &replaced).await?;
    assert_eq!(same.resource_version(), replaced.resource_version());
    let list = pods.list(&ListParams::default()).await?;
    assert_eq!(list.metadata.resource_version, replaced.resource_version(), "other kinds' lists are as new");

    let stale = Preconditions { resource_version: created.resource_version(), uid: None };
    let stale = DeleteParams { preconditions: Some(stale), ..DeleteParams::default() };
    assert_eq!(code(maps.delete("a", &stale).await), 409);
    ensure!(maps.delete("a", &DeleteParams::default()).await?.is_right(), "it is gone at once");
    assert_eq!(code(maps.get("a").await), 404);
    Ok(())
}

#[tokio::test]
async fn names_are_generated_and_finalizers_waited_for() -> anyhow::Result<()> {
    let (_server, client) = start().await?;
    let maps: Api<ConfigMap> = Api::namespaced(client, "shop");
    let body = json!({ "metadata": { "generateName": "counts-", "finalizers": ["tideshift.dev/test"] } });
    let created = maps.create(&PostParams::default(), &typed(body)?).await?;
    let name = created.name_any();
    ensure!(name.starts_with("counts-") && name.len() == 12, "{name}");
    let terminating = maps.delete(&name, &DeleteParams::default()).await?.left().context("it is gone")?;
    ensure!(terminating.metadata.deletion_timestamp.is_some());
    let patch = json!({ "metadata": { "finalizers": null } });
    maps.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    assert_eq!(code(maps.get(&name).await), 404);
    Ok(())
}

#[tokio::test]
async fn status_and_specification_are_written_apart() -> anyhow::Result<()> {
    let (_server, client) = start().await?;
    let deployments: Api<Deployment> = Api::namespaced(client, "shop");
    let mut body = deployment("payment");
    body["status"] = json!({ "replicas": 7 });
    let created = deployments.create(&PostParams::default(), &typed(body)?).await?;
    ensure!(created.status.is_none_or(|status| status.replicas.is_none()), "a new object has no status");
    assert_eq!(created.metadata.generation, Some(1));

    let both = json!({ "spec": { "replicas": 5 }, "status": { "replicas": 2, "readyReplicas": 1 } });
    let by_status = deployments.patch_status("payment", &PatchParams::default(), &Patch::Merge(both.clone())).await?;
    assert_eq!(by_status.spec.and_then(|spec| spec.replicas), Some(2));
    assert_eq!(by_status.status.and_then(|status| status.ready_replicas), Some(1));
    assert_eq!(by_status.metadata.generation, Some(1));

    let by_main = deployments
        .patch(
            "payment",
            &PatchParams::default(),
            &Patch::Merge(json!({ "spec": { "replicas": 5 }, "status": { "readyReplicas": 5 } })),
        )
        .await?;
    assert_eq!(by_main.status.and_then(|status| status.ready_replicas), Some(1));
    assert_eq!((by_main.spec.and_then(|spec| spec.replicas), by_main.metadata.generation), (Some(5), Some(2)));

    let annotated = deployments
        .patch(
            "payment",
            &PatchParams::default(),
            &Patch::Merge(json!({ "metadata": { "annotations": { "a": "b" } } })),
        )
        .await?;
    assert_eq!(annotated.metadata.generation, Some(2));
    let wrong = json!({ "spec": { "replicas": "five" } });
    assert_eq!(code(deployments.patch("payment", &PatchParams::default(), &Patch::Merge(wrong)).await), 400);
    Ok(())
}

#[tokio::test]
async fn scale_is_read_and_written() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    server.apply(deployment("payment"))?;
    server.patch_status("deployments", "shop", "payment", json!({ "status": { "replicas": 2 } }))?;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "shop");
    let scale = deployments.get_scale("payment").await?;
    let status = scale.status.clone().context("no status")?;
    assert_eq!((status.replicas, status.selector.as_deref()), (2, Some("app=payment")));
    assert_eq!(scale.spec.clone().and_then(|spec| spec.replicas), Some(2));

    let patch = Patch::Merge(json!({ "spec": { "replicas": 4 } }));
    let patched = deployments.patch_scale("payment", &PatchParams::default(), &patch).await?;
    assert_eq!(patched.spec.and_then(|spec| spec.replicas), Some(4));
    assert_eq!(server.get("deployments", "shop", "payment")?["metadata"]["generation"], 2);
    let stale = deployments.replace_scale("payment", &PostParams::default(), &scale).await;
    assert_eq!(code(stale), 409, "the scale's resourceVersion is stale");

    let gvk = GroupVersionKind::gvk("argoproj.io", "v1alpha1", "Rollout");
    let rollouts: Api<DynamicObject> = Api::namespaced_with(client, "shop", &ApiResource::from_gvk(&gvk));
    assert_eq!(code(rollouts.get_scale("payment").await), 404, "its CRD is not installed");
    server.apply(rollouts_crd())?;
    server.apply(json!({
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Rollout",
        "metadata": { "name": "payment", "namespace": "shop" },
        "spec": {},
    }))?;
    let patched = rollouts.patch_scale("payment", &PatchParams::default(), &patch).await?;
    assert_eq!(patched.spec.and_then(|spec| spec.replicas), Some(4));
    assert_eq!(server.get("rollouts", "shop", "payment")?["spec"]["replicas"], 4);
    Ok(())
}

#[tokio::test]
async fn server_side_apply_keeps_to_what_a_manager_owns() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "shop");
    let apply = |data: Value| Patch::Apply(json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": data }));
    let one = PatchParams::apply("one");
    let other = PatchParams::apply("other");

    let created = maps.patch("a", &one, &apply(json!({ "x": "1", "y": "1" }))).await?;
    let again = maps.patch("a", &one, &apply(json!({ "x": "1", "y": "1" }))).await?;
    assert_eq!(created.resource_version(), again.resource_version(), "nothing has changed");

    let refused = maps.patch("a", &other, &apply(json!({ "x": "2" }))).await;
    let Err(kube::Error::Api(status)) = refused else { bail!("no conflict: {refused:?}") };
    assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"));
    ensure!(status.message.contains(r#"conflict with "one": .data.x"#), "{}", status.message);

    // What both say the same of is both's; what one no longer says is gone unless the other does.
    maps.patch("a", &other, &apply(json!({ "x": "1", "z": "1" }))).await?;
    let left = maps.patch("a", &one, &apply(json!({}))).await?;
    assert_eq!(serde_json::to_value(left.data)?, json!({ "x": "1", "z": "1" }));
    maps.patch("a", &one.clone().force(), &apply(json!({ "z": "2" }))).await?;
    let left = maps.patch("a", &other, &apply(json!({ "x": "1" }))).await?;
    assert_eq!(serde_json::to_value(left.data)?, json!({ "x": "1", "z": "2" }), "z is no longer its own");

    // An update takes what it changes.
    maps.patch(
        "a",
        &PatchParams { field_manager: Some("hand".to_owned()), ..PatchParams::default() },
        &Patch::Merge(json!({ "data": { "x": "3" } })),
    )
    .await?;
    assert_eq!(code(maps.patch("a", &other, &apply(json!({ "x": "1" }))).await), 409);

    // Conditions by their type.
    server.apply(deployment("payment"))?;
    let deployments: Api<Deployment> = Api::namespaced(client, "shop");
    let status = |kind: &str, value: &str| {
        Patch::Apply(json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "status": { "conditions": [{ "type": kind, "status": value }] },
        }))
    };
    deployments.patch_status("payment", &one, &status("A", "True")).await?;
    deployments.patch_status("payment", &other, &status("B", "True")).await?;
    let both = deployments.patch_status("payment", &one, &status("A", "False")).await?;
    let conditions = both.status.and_then(|status| status.conditions).context("no conditions")?;
    let mut conditions: Vec<_> =
        conditions.iter().map(|condition| (condition.type_.as_str(), condition.status.as_str())).collect();
    conditions.sort_unstable();
    assert_eq!(conditions, [("A", "False"), ("B", "True")]);
    Ok(())
}

#[tokio::test]
async fn lists_are_selected_and_come_in_pages_of_one_revision() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    for name in ["a", "b", "c", "d"] {
        server.apply(config_map(name, json!({})))?;
    }
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "shop");
    let names = |list: &kube::core::ObjectList<ConfigMap>| list.iter().map(|map| map.name_any()).collect::<Vec<_>>();
    assert_eq!(names(&maps.list(&ListParams::default().labels("app in (b,c)")).await?), ["b", "c"]);
    assert_eq!(names(&maps.list(&ListParams::default().fields("metadata.name=d")).await?), ["d"]);
    assert_eq!(Api::<ConfigMap>::namespaced(client, "other").list(&ListParams::default()).await?.items.len(), 0);

    let page = maps.list(&ListParams::default().limit(3)).await?;
    let rest = page.metadata.continue_.clone().context("no second page")?;
    server.delete("configmaps", "shop", "d")?;
    server.apply(config_map("e", json!({})))?;
    let second = maps.list(&ListParams::default().limit(3).continue_token(&rest)).await?;
    assert_eq!((names(&page).join(""), names(&second).join("")), ("abc".to_owned(), "d".to_owned()));
    assert_eq!(page.metadata.resource_version, second.metadata.resource_version);
    server.compact();
    assert_eq!(code(maps.list(&ListParams::default().continue_token(&rest)).await), 410);
    Ok(())
}

#[tokio::test]
async fn a_watch_resumes_where_it_was_and_sees_its_selection() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    let maps: Api<ConfigMap> = Api::namespaced(client, "shop");
    let since = maps.list(&ListParams::default()).await?.metadata.resource_version.context("no resourceVersion")?;
    server.apply(config_map("a", json!({})))?;
    server.patch("configmaps", "shop", "a", json!({ "data": { "x": "1" } }))?;
    server.patch("configmaps", "shop", "a", json!({ "metadata": { "labels": { "app": "b" } } }))?;
    server.delete("configmaps", "shop", "a")?;
    let seen = async |params: WatchParams, count: usize| -> anyhow::Result<Vec<&str>> {
        let watch = maps.watch(&params, &since).await?.map_ok(|event| match event {
            WatchEvent::Added(_) => "added",
            WatchEvent::Modified(_) => "modified",
            WatchEvent::Deleted(_) => "deleted",
            WatchEvent::Bookmark(_) => "bookmark",
            WatchEvent::Error(_) => "error",
        });
        Ok(timeout(DEADLINE, watch.take(count).try_collect()).await??)
    };
    assert_eq!(seen(WatchParams::default(), 4).await?, ["added", "modified", "modified", "deleted"]);
    assert_eq!(seen(WatchParams::default().labels("app=a"), 3).await?, ["added", "modified", "deleted"]);
    assert_eq!(seen(WatchParams::default().labels("app=b"), 2).await?, ["added", "deleted"]);
    assert_eq!(seen(WatchParams::default().fields("metadata.name=b").timeout(1), 9).await?, ["bookmark"]);
    server.compact();
    assert_eq!(seen(WatchParams::default(), 1).await?, ["error"]);
    Ok(())
}

/// What a watcher says, in words.
fn words(
    watcher: impl futures_util::Stream<Item = watcher::Result<watcher::Event<ConfigMap>>> + Send + 'static,
) -> BoxStream<'static, String> {
    let say = async |event: watcher::Result<watcher::Event<ConfigMap>>| {
        Some(match event {
            Ok(watcher::Event::Init) => "init".to_owned(),
            Ok(watcher::Event::InitApply(map)) => format!("init {}", map.name_any()),
            Ok(watcher::Event::InitDone) => "done".to_owned(),
            Ok(watcher::Event::Apply(map)) => format!("apply {}", map.name_any()),
            Ok(watcher::Event::Delete(map)) => format!("delete {}", map.name_any()),
            Err(_) => return None,
        })
    };
    watcher.filter_map(say).boxed()
}

async fn hear(watcher: &mut BoxStream<'static, String>, expected: &[&str]) -> anyhow::Result<()> {
    for word in expected {
        let heard = timeout(DEADLINE, watcher.next()).await.with_context(|| format!("waited for {word:?}"))?;
        ensure!(heard.as_deref() == Some(word), "heard {heard:?}, not {word:?} of {expected:?}");
    }
    Ok(())
}

fn watch(client: &Client, config: watcher::Config) -> BoxStream<'static, String> {
    let maps: Api<ConfigMap> = Api::all(client.clone());
    words(watcher(maps, config).default_backoff())
}

#[tokio::test]
async fn kubes_watcher_lists_and_follows_both_ways() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    server.apply(config_map("a", json!({})))?;
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let mut watcher = watch(&client, config);
        hear(&mut watcher, &["init", "init a", "done"]).await?;
        server.apply(config_map("b", json!({})))?;
        hear(&mut watcher, &["apply b"]).await?;
        server.delete("configmaps", "shop", "b")?;
        hear(&mut watcher, &["delete b"]).await?;
    }
    assert_eq!(server.count("list", "configmaps"), 1, "a streaming list is no list");
    Ok(())
}

#[tokio::test]
async fn a_cut_watch_goes_on_without_a_new_list() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    server.apply(config_map("a", json!({})))?;
    let mut watcher = watch(&client, watcher::Config::default());
    hear(&mut watcher, &["init", "init a", "done"]).await?;
    server.apply(config_map("b", json!({})))?;
    hear(&mut watcher, &["apply b"]).await?;
    server.cut_watches();
    server.apply(config_map("c", json!({})))?;
    hear(&mut watcher, &["apply c"]).await?;
    assert_eq!(server.count("list", "configmaps"), 1);
    Ok(())
}

#[tokio::test]
async fn a_server_that_was_away_is_resumed_and_after_compaction_listed_anew() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    server.apply(config_map("a", json!({})))?;
    let mut watcher = watch(&client, watcher::Config::default());
    hear(&mut watcher, &["init", "init a", "done"]).await?;

    server.go_away().await;
    server.apply(config_map("b", json!({})))?;
    server.come_back().await?;
    hear(&mut watcher, &["apply b"]).await?;
    assert_eq!(server.count("list", "configmaps"), 1);

    server.go_away().await;
    server.delete("configmaps", "shop", "a")?;
    server.compact();
    server.come_back().await?;
    hear(&mut watcher, &["init", "init b", "done"]).await?;
    assert_eq!(server.count("list", "configmaps"), 2);
    Ok(())
}

#[tokio::test]
async fn bookmarks_carry_a_watch_over_a_compaction() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    let maps: Api<ConfigMap> = Api::all(client);
    let mut watch = maps.watch(&WatchParams::default(), "0").await?.boxed();
    server.apply(deployment("payment"))?;
    server.compact();
    server.send_bookmarks();
    let Some(Ok(WatchEvent::Bookmark(bookmark))) = timeout(DEADLINE, watch.next()).await? else { bail!("no bookmark") };
    let mut resumed = maps.watch(&WatchParams::default(), &bookmark.metadata.resource_version).await?.boxed();
    server.apply(config_map("a", json!({})))?;
    let event = timeout(DEADLINE, resumed.next()).await?;
    ensure!(matches!(event, Some(Ok(WatchEvent::Added(_)))), "{event:?}");
    Ok(())
}

#[tokio::test]
async fn metadata_comes_alone_where_that_is_asked_for() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    server.apply(config_map("a", json!({ "x": "1" })))?;
    let maps: Api<PartialObjectMeta<ConfigMap>> = Api::all(client);
    let mut watcher = watcher(maps, watcher::Config::default()).boxed();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        match timeout(DEADLINE, watcher.next()).await?.context("the watcher ended")?? {
            watcher::Event::InitApply(map) | watcher::Event::Apply(map) => {
                let types = map.types.clone().context("no types")?;
                seen.push(format!("{} {}", types.kind, map.name_any()));
            }
            watcher::Event::InitDone => {
                seen.push("done".to_owned());
                server.apply(config_map("b", json!({})))?;
            }
            other => seen.push(format!("{other:?}").to_lowercase()),
        }
    }
    assert_eq!(seen, ["init", "PartialObjectMetadata a", "done", "PartialObjectMetadata b"]);
    Ok(())
}

#[tokio::test]
async fn a_crd_brings_its_kind_with_defaults_and_rules_and_takes_it_away() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    let gvk = GroupVersionKind::gvk("example.com", "v1", "Shift");
    let shifts: Api<DynamicObject> = Api::namespaced_with(client.clone(), "shop", &ApiResource::from_gvk(&gvk));
    assert_eq!(code(shifts.list(&ListParams::default()).await), 404);
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let schema = json!({ "type": "object", "properties": {
        "spec": { "type": "object", "required": ["stable"], "properties": {
            "stable": { "type": "string" },
            "mode": { "type": "string", "enum": ["A", "B"], "default": "A" },
        } },
        "status": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
    } });
    let crd = json!({
        "metadata": { "name": "shifts.example.com" },
        "spec": {
            "group": "example.com",
            "scope": "Namespaced",
            "names": { "kind": "Shift", "plural": "shifts" },
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": schema },
                "subresources": { "status": {} },
            }],
        },
    });
    crds.create(&PostParams::default(), &typed(crd)?).await?;
    let established = kube::runtime::wait::conditions::is_crd_established();
    timeout(DEADLINE, kube::runtime::wait::await_condition(crds.clone(), "shifts.example.com", established)).await??;
    let (found, _) = discovery::pinned_kind(&client, &gvk).await?;
    assert_eq!(found.plural, "shifts");

    let shift = |spec: Value| {
        typed::<DynamicObject>(
            json!({ "apiVersion": "example.com/v1", "kind": "Shift", "metadata": { "name": "a" }, "spec": spec }),
        )
    };
    let params = PostParams::default();
    assert_eq!(code(shifts.create(&params, &shift(json!({ "stable": "v1", "mode": "C" }))?).await), 422);
    assert_eq!(code(shifts.create(&params, &shift(json!({}))?).await), 422);
    let created = shifts.create(&params, &shift(json!({ "stable": "v1", "odd": 1 }))?).await?;
    assert_eq!(created.data["spec"], json!({ "stable": "v1", "mode": "A" }));
    let mut bare = created.clone();
    bare.metadata.resource_version = None;
    assert_eq!(code(shifts.replace("a", &params, &bare).await), 422, "updates of custom kinds name a resourceVersion");

    let mut watch =
        shifts.watch(&WatchParams::default(), &created.resource_version().unwrap_or_default()).await?.boxed();
    crds.delete("shifts.example.com", &DeleteParams::default()).await?;
    let event = timeout(DEADLINE, watch.next()).await?;
    ensure!(matches!(event, Some(Ok(WatchEvent::Deleted(_)))), "{event:?}");
    assert_eq!(code(shifts.list(&ListParams::default()).await), 404);
    assert_eq!(
        server.get("crd", "", "").map_err(|error| error.to_string()),
        Err("no kind \"crd\" is served".to_owned())
    );
    Ok(())
}

#[tokio::test]
async fn tokens_rules_and_reviews() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    let gateway = client_of(&server, "gateway").await?;
    server.forbid(|attempt| attempt.user == "gateway" && attempt.namespace == "secret");
    server.forbid(|attempt| attempt.resource == "configmaps" && attempt.verb == "create");
    let secrets = |namespace: &str| Api::<Secret>::namespaced(gateway.clone(), namespace);
    assert_eq!(code(secrets("secret").list(&ListParams::default()).await), 403);
    assert_eq!(code(secrets("shop").list(&ListParams::default()).await), 200);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "shop");
    let apply = Patch::Apply(config_map("a", json!({})));
    assert_eq!(code(maps.patch("a", &PatchParams::apply("one"), &apply).await), 403, "it would be created");
    server.allow_all();
    assert_eq!(code(maps.patch("a", &PatchParams::apply("one"), &apply).await), 200);

    server.token("t1", "system:serviceaccount:shop:proxy", &["tideshift"]);
    let reviews: Api<TokenReview> = Api::all(client);
    let review = async |token: &str, audience: &str| -> anyhow::Result<Option<String>> {
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![audience.to_owned()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let status = reviews.create(&PostParams::default(), &review).await?.status.context("no status")?;
        assert_eq!(status.authenticated == Some(true), status.error.is_none());
        Ok(status.user.and_then(|user| user.username))
    };
    assert_eq!(review("t1", "tideshift").await?.as_deref(), Some("system:serviceaccount:shop:proxy"));
    assert_eq!(review("t1", "vault").await?, None);
    assert_eq!(review("t2", "tideshift").await?, None);
    server.forget_token("gateway");
    assert_eq!(code(secrets("shop").list(&ListParams::default()).await), 401);
    Ok(())
}

#[tokio::test]
async fn faults_meet_whom_they_should() -> anyhow::Result<()> {
    let (server, client) = start().await?;
    let other = client_of(&server, "other").await?;
    let maps = |client: &Client| Api::<ConfigMap>::namespaced(client.clone(), "shop");
    server.refuse_writes("configmaps", 2);
    let params = PostParams::default();
    for expected in [409, 409, 200] {
        let map = typed(config_map("a", json!({})))?;
        assert_eq!(code(maps(&client).create(&params, &map).await), expected);
    }

    server.hold(Whom::user("other"));
    let held = tokio::spawn(async move { maps(&other).get("a").await.map(|map| map.name_any()) });
    eventually("the held request to come", DEADLINE, async || {
        ensure!(server.count("get", "configmaps") == 1);
        Ok(())
    })
    .await?;
    assert_eq!(maps(&client).get("a").await?.name_any(), "a");
    ensure!(!held.is_finished());
    server.release(&Whom::user("other"));
    assert_eq!(timeout(DEADLINE, held).await???, "a");

    // Later than what comes after it by another way.
    let mut watch = maps(&client).watch(&WatchParams::default(), "0").await?.boxed();
    ensure!(matches!(timeout(DEADLINE, watch.next()).await?, Some(Ok(WatchEvent::Added(_)))));
    let delay = Duration::from_millis(300);
    server.delay_watches(Whom::All, delay);
    let before = std::time::Instant::now();
    server.delete("configmaps", "shop", "a")?;
    ensure!(matches!(timeout(DEADLINE, watch.next()).await?, Some(Ok(WatchEvent::Deleted(_)))));
    ensure!(before.elapsed() >= delay);
    Ok(())
}
