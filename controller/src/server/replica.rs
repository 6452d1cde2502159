//! `tideshift serve --kubernetes`: several replicas with one leader. Followers serve the last policy to proxies, which
//! they read from where the leader persisted it before publishing, and forward all other requests to the leader.

use crate::api::{Published, Shared};
use crate::clock;
use crate::kubernetes::{
    Clusters, Elector, Informers, Outputs, Retry, STUCK, TokenReviewer, clusters, watch as watch_objects,
};
use crate::limits::Limits;
use crate::metrics::ControllerMetrics;
use crate::readiness::Prober;
use crate::reconciler::state::PersistedState;
use crate::reconciler::{CountState, Reconciler};
use crate::role::Role;
use crate::server::credentials::Secrets;
use crate::server::driver::{ReconcileLoop, Source};
use crate::server::{Cluster, Options, ServeError, Service, fresh, listen, signals};
use crate::store::secret;
use crate::store::secret::{CountsSecretStore, SecretStore, SecretStoreError};
use crate::store::writer::StateWriter;
use crate::webhooks::{Egress, Hooks};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::Api;
use kube::runtime::watcher;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep};

/// The interval of the process heartbeat.
const BEAT: Duration = Duration::from_secs(1);

pub(super) async fn serve(options: Options, cluster: Cluster) -> Result<(), ServeError> {
    let secrets = Secrets::load(&options)?;
    let home = clusters::home(cluster.kubeconfig.as_deref()).await.map_err(ServeError::NoCluster)?;
    let clusters::Home { config, client, namespace, api_server } = home;
    let namespace = cluster.namespace.clone().unwrap_or(namespace);
    let listeners = listen(&options).await?;
    let address = listeners.api.local_addr()?;
    let done = ControllerMetrics::default();
    let reviewer =
        cluster.proxy_token_audience.clone().map(|audience| TokenReviewer::new(client.clone(), audience, done.clone()));
    let role = watch::Sender::new(Role::Follows(None));
    let nothing = Reconciler::new(Vec::new(), PersistedState::default(), CountState::default());
    let shown = watch::Sender::new(Role::Follows(None));
    let service =
        Service::start(&options, listeners, secrets, nothing, shown.subscribe(), (reviewer.map(Arc::new), done));
    tracing::info!(%address, tls = options.tls.is_some(), namespace, identity = cluster.identity, "serving");

    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let candidate = Elector {
        config,
        namespace: namespace.clone(),
        name: cluster.lease.clone(),
        identity: cluster.identity.clone(),
        address: cluster.advertise.clone().unwrap_or_else(|| format!("{scheme}://{address}")),
        stuck: STUCK,
    };
    let (asked_to_end, ending) = watch::channel(false);
    let (ended, has_ended) = watch::channel(false);
    let (beat, pulse) = watch::channel(Instant::now());
    let heart = tokio::spawn(beat_on(service.shared.clone(), beat));
    let contest = candidate.start(role.clone(), pulse, is_true(ending.clone()), is_true(has_ended))?;
    let reader =
        tokio::spawn(read_policies(client.clone(), namespace.clone(), cluster.lease.clone(), service.publish.clone()));
    let signals = signals()?;
    let asked = asked_to_end.clone();
    tokio::spawn(async move {
        signals.await;
        asked.send_replace(true);
    });

    let clusters = Clusters::new(client.clone(), &namespace);
    let informers = Informers::open(clusters.clone(), &cluster.namespaces);
    let role = role.subscribe();
    let egress = Egress::of_cluster(options.webhooks_allowed, api_server);
    let mut replica = Replica { cluster, client, namespace, egress, clusters, informers, service, role, shown, ending };
    let result = replica.run().await;
    tracing::info!("ending");
    // Even without a signal: it releases the Lease to another replica.
    asked_to_end.send_replace(true);
    ended.send_replace(true);
    let _ = contest.await;
    heart.abort();
    reader.abort();
    replica.service.end().await;
    result
}

/// Sends heartbeats: the runtime makes progress, and the reconciler is not deadlocked.
async fn beat_on(shared: Arc<Shared>, beat: watch::Sender<Instant>) {
    let mut ticks = interval(BEAT);
    loop {
        ticks.tick().await;
        drop(shared.reconciler());
        beat.send_replace(Instant::now());
    }
}

async fn is_true(mut flag: watch::Receiver<bool>) {
    let _ = flag.wait_for(|flag| *flag).await;
}

/// One of the replicas.
struct Replica {
    cluster: Cluster,
    client: Client,
    namespace: String,
    egress: Egress,
    clusters: Clusters,
    informers: Informers,
    service: Service,
    role: watch::Receiver<Role>,
    /// The published role: this replica does not appear as the leader before it has loaded its state.
    shown: watch::Sender<Role>,
    ending: watch::Receiver<bool>,
}

impl Replica {
    /// Leads whenever it holds the Lease, until shutdown.
    async fn run(&mut self) -> Result<(), ServeError> {
        loop {
            let now = self.role.borrow_and_update().clone();
            if now.decides() {
                self.lead().await?;
                // Its state becomes stale.
                self.shown.send_replace(Role::Follows(None));
                *self.service.shared.reconciler() =
                    Reconciler::new(Vec::new(), PersistedState::default(), CountState::default());
            } else {
                self.shown.send_replace(now);
            }
            // Also after losing leadership unnoticed: the Lease tells soon.
            tokio::select! {
                () = is_true(self.ending.clone()) => return Ok(()),
                _ = self.role.changed() => {}
            }
        }
    }

    /// Runs the reconcile loop while it is the leader.
    async fn lead(&mut self) -> Result<(), ServeError> {
        let (mut role, ending) = (self.role.clone(), self.ending.clone());
        let stop = async move {
            tokio::select! {
                () = is_true(ending) => {}
                _ = role.wait_for(|role| !role.decides()) => {}
            }
        };
        let mut stop = pin!(stop);
        let mut snapshot = self.informers.snapshot();
        let taken = tokio::select! {
            () = &mut stop => return Ok(()),
            taken = self.take(&mut snapshot) => taken?,
        };
        let ((memory, counts), kept, counted) = taken;
        // The clock of the previous leader may have been ahead.
        clock::not_before(kept.time.max(counted.time));
        let shown = snapshot.borrow_and_update().clone();
        let limits = Limits::of_cluster();
        let hooks = Hooks::start(self.egress.clone(), limits.webhooks.clone()).map_err(ServeError::Tls)?;
        let prober = Prober::start_within(limits, kept.ready.clone()).map_err(ServeError::Tls)?;
        let mut reconciler =
            Reconciler::with_hidden((shown.documents(), &shown.deleted), shown.hidden.clone(), kept, counted);
        for (rollout, object) in shown.objects.iter() {
            object.by.iter().for_each(|by| reconciler.edited_by(rollout, by));
        }
        for error in &shown.errors {
            tracing::error!("{error}");
        }
        reconciler.set_document_errors(shown.errors.clone());
        reconciler.set_secrets(shown.secrets.clone());
        *self.service.shared.reconciler() = reconciler;
        self.shown.send_replace(Role::Leads);
        let outputs = Outputs::start(self.clusters.clone(), &self.cluster.identity);
        let writer = StateWriter::new(memory, counts, self.service.shared.done.clone());
        let (shared, publish) = (self.service.shared.clone(), self.service.publish.clone());
        let source = Source::Cluster { snapshot, shown, remains: self.informers.remains(), outputs };
        let mut reconcile_loop = ReconcileLoop::new(shared, publish, writer, prober, source, hooks);
        reconcile_loop.run(stop).await;
        reconcile_loop.end().await;
        Ok(())
    }

    /// The initial snapshot, once all TrafficShifts are listed or have failed to list.
    async fn take(
        &self,
        snapshot: &mut watch::Receiver<Arc<crate::kubernetes::Snapshot>>,
    ) -> Result<((SecretStore, CountsSecretStore), PersistedState, CountState), ServeError> {
        if snapshot.borrow().is_nothing() {
            // The informers live as long as this replica.
            let _ = snapshot.wait_for(|snapshot| !snapshot.is_nothing()).await;
        }
        let mut retry = Retry::default();
        loop {
            let taken =
                SecretStore::take(self.client.clone(), &self.namespace, &self.cluster.lease, &self.cluster.identity);
            match taken.await {
                Ok((memory, kept, counted)) => {
                    let kept = kept.map_or_else(fresh, Ok)?;
                    return Ok((memory, kept, counted.unwrap_or_else(|| CountState::beginning(crate::clock::now()))));
                }
                Err(error @ SecretStoreError::Corrupt(..)) => return Err(error.into()),
                Err(error) => tracing::error!("cannot take over yet: {error}"),
            }
            sleep(retry.pause()).await;
        }
    }
}

/// Publishes the policy that the leader has persisted, until the process ends.
async fn read_policies(client: Client, namespace: String, lease: String, publish: watch::Sender<Option<Published>>) {
    let name = secret::state_name(&lease);
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = pin!(watch_objects(Api::<Secret>::namespaced(client, &namespace), config));
    while let Some(event) = events.next().await {
        let (Ok(watcher::Event::Apply(secret)) | Ok(watcher::Event::InitApply(secret))) = event else { continue };
        let kept = match secret::unpack::<PersistedState>(&secret) {
            Ok(Some(kept)) => kept,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!("Secret {name}: {error}");
                continue;
            }
        };
        let Some(policy) = kept.policy() else { continue };
        publish.send_if_modified(|published| {
            let is_newer = published
                .as_ref()
                .is_none_or(|published| published.epoch != kept.epoch || published.revision < policy.revision);
            if is_newer {
                *published = Some(Published::next(published.as_ref(), kept.epoch.clone(), &policy));
            }
            is_newer
        });
    }
}
