//! The clusters: the controller's own, and remote clusters from Secrets in its namespace.

use super::{reason, transport};
use crate::namespace_ref::NamespaceRef;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::api::Api;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher;
use kube::{Client, Config, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// The label of a Secret with credentials for a cluster; its value is the name of the cluster in documents.
pub const CLUSTER_LABEL: &str = "tideshift.dev/cluster";
/// The annotation of such a Secret with the namespaces whose documents may use the cluster, separated by commas; `*`
/// means every namespace. Default: the namespace of the Secret.
pub const NAMESPACES_ANNOTATION: &str = "tideshift.dev/namespaces";
/// The key of the kubeconfig in the Secret's data.
const KUBECONFIG: &str = "kubeconfig";
/// Timeout of a connection attempt.
const CONNECT: Duration = Duration::from_secs(3);

/// The registry of clusters; cheap to clone.
#[derive(Clone)]
pub struct Clusters {
    home: Client,
    namespace: String,
    table: Arc<Mutex<Remote>>,
    changes: watch::Receiver<u64>,
}

#[derive(Default)]
struct Remote {
    /// Clients by cluster, or why there is none.
    clients: BTreeMap<String, Result<Client, String>>,
    /// The namespaces whose documents may use a cluster.
    namespaces: BTreeMap<String, BTreeSet<String>>,
    /// The Secrets that they were built from.
    secrets: BTreeMap<String, ClusterSecret>,
    changed: BTreeSet<String>,
    /// Why the Secrets cannot be watched, if so.
    lost: Option<String>,
}

/// The content of a Secret with credentials for a cluster.
#[derive(Clone)]
struct ClusterSecret {
    cluster: String,
    namespaces: BTreeSet<String>,
    kubeconfig: Option<Vec<u8>>,
}

/// The controller's own cluster.
pub struct Home {
    /// The client configuration.
    pub config: Config,
    /// A client with this configuration.
    pub client: Client,
    /// The default namespace of the configuration.
    pub namespace: String,
    /// The hosts and addresses of its API server.
    pub api_server: Vec<String>,
}

/// The controller's own cluster, from a kubeconfig or the environment.
///
/// # Errors
///
/// If no cluster is configured, or the configuration is invalid.
pub async fn home(kubeconfig: Option<&Path>) -> Result<Home, String> {
    let mut config = match kubeconfig {
        Some(path) => {
            let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| shown(&error))?;
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
            config.map_err(|error| shown(&error))?
        }
        None => Config::infer().await.map_err(|error| format!("no cluster to speak to: {error}"))?,
    };
    config.connect_timeout = Some(CONNECT);
    let namespace = config.default_namespace.clone();
    let hosts = [config.cluster_url.host().map(str::to_owned), std::env::var("KUBERNETES_SERVICE_HOST").ok()];
    let api_server = hosts.into_iter().flatten().map(|host| host.trim_matches(['[', ']']).to_owned()).collect();
    Ok(Home { client: client(config.clone())?, config, namespace, api_server })
}

fn client(mut config: Config) -> Result<Client, String> {
    config.connect_timeout = Some(CONNECT);
    transport::shared(config).map_err(|error| reason(&error))
}

impl Clusters {
    /// Watches the Secrets of a namespace until the process ends.
    pub fn new(home: Client, namespace: &str) -> Self {
        let (send, changes) = watch::channel(0);
        let table = Arc::default();
        let clusters = Self { home, namespace: namespace.to_owned(), table, changes };
        tokio::spawn(clusters.clone().follow(send));
        clusters
    }

    /// The client of the controller's own cluster.
    pub fn home(&self) -> Client {
        self.home.clone()
    }

    /// The client of a cluster, on behalf of documents of this namespace.
    ///
    /// # Errors
    ///
    /// If there is no such cluster, its credentials are invalid, or documents of the namespace may not use it.
    pub fn client(&self, place: &NamespaceRef) -> Result<Client, String> {
        let Some(cluster) = &place.cluster else { return Ok(self.home()) };
        let remote = self.lock();
        if let Some(open) = remote.namespaces.get(cluster)
            && !is_open(open, &place.namespace)
        {
            let open = open.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(format!(
                "not open to namespace {}; the annotation {NAMESPACES_ANNOTATION} of its Secret in namespace {} allows: {}",
                place.namespace,
                self.namespace,
                if open.is_empty() { "none" } else { &open }
            ));
        }
        match (remote.clients.get(cluster), &remote.lost) {
            (Some(client), _) => client.clone(),
            (None, Some(why)) => Err(format!("Secrets in namespace {} cannot be seen: {why}", self.namespace)),
            (None, None) => {
                Err(format!("no Secret in namespace {} has the label {CLUSTER_LABEL}: {cluster}", self.namespace))
            }
        }
    }

    /// Notifies of changes of the clusters.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// The clusters that have changed since the last call.
    pub fn take_changed(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.lock().changed)
    }

    fn lock(&self) -> MutexGuard<'_, Remote> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn follow(self, send: watch::Sender<u64>) {
        let api: Api<Secret> = Api::namespaced(self.home(), &self.namespace);
        let events = super::watch(api, watcher::Config::default().labels(CLUSTER_LABEL));
        let mut events = pin!(events);
        let mut coming = BTreeMap::new();
        while let Some(event) = events.next().await {
            let mut secrets = self.lock().secrets.clone();
            let mut lost = None;
            match event {
                Ok(watcher::Event::Init) => continue,
                Ok(watcher::Event::InitApply(secret)) => {
                    coming.insert(secret.name_any(), ClusterSecret::read(&secret));
                    continue;
                }
                Ok(watcher::Event::InitDone) => secrets = std::mem::take(&mut coming),
                Ok(watcher::Event::Apply(secret)) => {
                    _ = secrets.insert(secret.name_any(), ClusterSecret::read(&secret))
                }
                Ok(watcher::Event::Delete(secret)) => _ = secrets.remove(&secret.name_any()),
                Err(error) => {
                    coming.clear();
                    lost = Some(super::watch_reason(&error));
                }
            }
            self.take_in(secrets, lost).await;
            send.send_modify(|times| *times += 1);
        }
    }

    async fn take_in(&self, secrets: BTreeMap<String, ClusterSecret>, lost: Option<String>) {
        let before = {
            let mut remote = self.lock();
            let namespaces = secrets.values().map(|secret| (secret.cluster.clone(), secret.namespaces.clone()));
            let namespaces = namespaces.collect();
            // Who may use a cluster changes what can be seen, as its kubeconfig does.
            let opened = changed_keys(&remote.namespaces, &namespaces);
            remote.changed.extend(opened);
            (remote.namespaces, remote.lost) = (namespaces, lost);
            std::mem::replace(&mut remote.secrets, secrets.clone())
        };
        let by_cluster = |secrets: &BTreeMap<String, ClusterSecret>| {
            let pairs = secrets.values().map(|secret| (secret.cluster.clone(), secret.kubeconfig.clone()));
            pairs.collect::<BTreeMap<String, Option<Vec<u8>>>>()
        };
        let (before, now) = (by_cluster(&before), by_cluster(&secrets));
        for cluster in before.keys().chain(now.keys()).collect::<BTreeSet<_>>() {
            if before.get(cluster) == now.get(cluster) {
                continue;
            }
            let client = match now.get(cluster) {
                None => None,
                Some(None) => Some(Err(format!("its Secret has no key {KUBECONFIG}"))),
                Some(Some(text)) => Some(remote(text).await),
            };
            let mut remote = self.lock();
            match client {
                Some(client) => _ = remote.clients.insert(cluster.clone(), client),
                None => _ = remote.clients.remove(cluster),
            }
            remote.changed.insert(cluster.clone());
        }
    }
}

impl std::fmt::Debug for Clusters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clusters").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl ClusterSecret {
    fn read(secret: &Secret) -> Self {
        let named = secret.annotations().get(NAMESPACES_ANNOTATION).map(|text| {
            let names = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|name| !name.is_empty());
            names.map(str::to_owned).collect()
        });
        Self {
            cluster: secret.labels().get(CLUSTER_LABEL).cloned().unwrap_or_default(),
            namespaces: named.unwrap_or_else(|| secret.namespace().into_iter().collect()),
            kubeconfig: secret.data.as_ref().and_then(|data| data.get(KUBECONFIG)).map(|bytes| bytes.0.clone()),
        }
    }
}

/// The keys whose values differ.
fn changed_keys<T: PartialEq>(before: &BTreeMap<String, T>, now: &BTreeMap<String, T>) -> Vec<String> {
    let keys: BTreeSet<_> = before.keys().chain(now.keys()).collect();
    keys.into_iter().filter(|key| before.get(*key) != now.get(*key)).cloned().collect()
}

/// Whether documents of a namespace may use a cluster that is open to these.
fn is_open(namespaces: &BTreeSet<String>, namespace: &str) -> bool {
    namespaces.contains(namespace) || namespaces.contains("*")
}

/// A client from a kubeconfig. A kubeconfig that runs programs or reads local files is refused.
async fn remote(text: &[u8]) -> Result<Client, String> {
    let text = std::str::from_utf8(text).map_err(|_| "its kubeconfig is not UTF-8".to_owned())?;
    let kubeconfig = Kubeconfig::from_yaml(text).map_err(|error| format!("its kubeconfig: {error}"))?;
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let users = kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref());
    let reads = clusters.clone().any(|cluster| cluster.certificate_authority.is_some());
    let outside = users.clone().any(|user| {
        let files = [&user.client_certificate, &user.client_key, &user.token_file];
        user.exec.is_some() || user.auth_provider.is_some() || files.iter().any(|file| file.is_some())
    });
    if reads || outside {
        return Err("its kubeconfig runs a program or names a file; expected everything to be in it, as \
                    certificate-authority-data, client-certificate-data, client-key-data or token"
            .to_owned());
    }
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    client(config.map_err(|error| format!("its kubeconfig: {error}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn opened(annotations: Value) -> BTreeSet<String> {
        let metadata = json!({"name": "west", "namespace": "tideshift-system", "annotations": annotations});
        ClusterSecret::read(&serde_json::from_value(json!({"metadata": metadata})).unwrap()).namespaces
    }

    #[test]
    fn a_cluster_is_open_to_the_namespaces_that_its_secret_names() {
        let named = opened(json!({NAMESPACES_ANNOTATION: "shop, store"}));
        assert!(is_open(&named, "shop") && is_open(&named, "store") && !is_open(&named, "shop2"));
        assert!(!is_open(&named, "tideshift-system"), "what is named is all");
        assert!(is_open(&opened(json!({NAMESPACES_ANNOTATION: "*"})), "anything"));
        let unnamed = opened(json!({}));
        assert!(is_open(&unnamed, "tideshift-system") && !is_open(&unnamed, "shop"));
        assert!(opened(json!({NAMESPACES_ANNOTATION: ""})).is_empty(), "an empty list is no namespace");
    }
}
