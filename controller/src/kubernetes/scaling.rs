//! Plans the replicas of each version's workload: the target gets as many as its step needs, in batches; the stable
//! version never has fewer than a rollback needs; a version without traffic gets none once it has drained. Pure. A
//! version without a workload is not scaled, nor is one that no rollout has moved traffic to or from. A workload that
//! two versions share is not scaled, and no workload is scaled down while one of its pods is a ready endpoint of a
//! version in use, in any document.

use crate::clock::Millis;
use crate::kubernetes::cache::{Autoscaler, ClusterCache, NamespaceCache};
use crate::kubernetes::endpoints;
use crate::namespace_ref::NamespaceRef;
use crate::reconciler::Reconciler;
use crate::rollout::{Phase, Rollout};
use std::collections::BTreeSet;
use tideshift_core::shift::{ShiftService, ShiftVersion, TrafficShift, WorkloadRef};

/// A change to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScaleAction {
    /// The namespace.
    pub place: NamespaceRef,
    /// The change.
    pub change: Change,
    /// The reason, for users.
    pub why: String,
}

/// A change of one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Set the replicas of a workload.
    Replicas {
        /// The workload.
        workload: WorkloadRef,
        /// The number of replicas.
        replicas: u32,
    },
    /// Set the `minReplicas` of a HorizontalPodAutoscaler.
    MinReplicas {
        /// The name of the autoscaler.
        autoscaler: String,
        /// The new `minReplicas`.
        min: u32,
        /// The value before a rollout raised it, to record in an annotation; `None`: it is being restored, so that the
        /// annotation is removed.
        before: Option<u32>,
    },
    /// A workload that would be scaled stays as it is, because it shares pods with another version.
    Nothing {
        /// The workload.
        workload: WorkloadRef,
    },
}

/// When a version stopped receiving traffic, and when it had drained, if it has; by service and version.
pub type Drained<'a> = dyn Fn(&str, &str) -> Option<(Millis, Millis)> + 'a;

/// Why the workload of a version must not be scaled, if so; by service and version.
pub type Shared<'a> = dyn Fn(&str, &str) -> Option<String> + 'a;

/// The version in use that has one of these pods, by name and address, as a ready endpoint, for messages.
pub type InUse<'a> = dyn Fn(&BTreeSet<(String, String)>) -> Option<String> + 'a;

/// The inputs of the scaling plan of one rollout.
pub struct ScalePlanner<'a> {
    /// The document with its endpoints.
    pub shift: &'a TrafficShift,
    /// The state of its rollout.
    pub rollout: &'a Rollout,
    /// The cached state of the clusters.
    pub picture: &'a ClusterCache,
    /// Whether versions without traffic have drained.
    pub drained: &'a Drained<'a>,
    /// Whether versions share workloads or pods.
    pub shared: &'a Shared<'a>,
    /// Whether pods are in use.
    pub in_use: &'a InUse<'a>,
    /// The current time.
    pub now: Millis,
}

/// The scaling actions of a rollout.
pub fn plan(reconciler: &Reconciler, rollout: &str, picture: &ClusterCache, now: Millis) -> Vec<ScaleAction> {
    let Some((shift, rollout)) = reconciler.scalable(rollout) else { return Vec::new() };
    let drained = |service: &str, version: &str| reconciler.drained(service, version);
    let shared = |service: &str, version: &str| reconciler.shared(service, version).map(str::to_owned);
    let in_use = |pods: &BTreeSet<(String, String)>| {
        let of_namespace = reconciler.shifts().iter().filter(|of| of.namespace == shift.namespace);
        let is_used = |of: &TrafficShift, service: &ShiftService, version: &ShiftVersion| {
            reconciler.is_used(of, service, version)
        };
        in_use(of_namespace, is_used, picture, pods)
    };
    ScalePlanner { shift, rollout, picture, drained: &drained, shared: &shared, in_use: &in_use, now }.plan()
}

impl ScalePlanner<'_> {
    /// The actions to take now; none while part of the cluster state is unknown.
    pub fn plan(&self) -> Vec<ScaleAction> {
        let mut wants = Vec::new();
        for service in &self.shift.services {
            for version in &service.versions {
                wants.extend(self.of(service, version));
            }
        }
        wants
    }

    fn of(&self, service: &ShiftService, version: &ShiftVersion) -> Option<ScaleAction> {
        let want = self.wanted(service, version)?;
        let keeps = (self.shared)(&service.name, &version.name).or_else(|| self.serves(version, &want));
        Some(match keeps.zip(version.workload.clone()) {
            Some((why, workload)) => ScaleAction { change: Change::Nothing { workload }, why, ..want },
            None => want,
        })
    }

    /// The version in use that would lose a pod by an action, for messages.
    fn serves(&self, version: &ShiftVersion, want: &ScaleAction) -> Option<String> {
        let Change::Replicas { replicas, .. } = want.change else { return None };
        let view = self.picture.view(&want.place)?;
        if replicas >= endpoints::workload(view, version)?.replicas {
            return None;
        }
        (self.in_use)(&endpoints::workload_pods(view, version))
    }

    fn wanted(&self, service: &ShiftService, version: &ShiftVersion) -> Option<ScaleAction> {
        let workload = version.workload.as_ref()?;
        let place = NamespaceRef::of(self.shift, version);
        let view = self.picture.view(&place)?;
        let now = endpoints::workload(view, version)?.replicas;
        let want = |change, why: String| Some(ScaleAction { place: place.clone(), change, why });
        let replicas = |replicas| Change::Replicas { workload: workload.clone(), replicas };
        let autoscaler = view.autoscalers.objects.iter().find(|(_, autoscaler)| scales(autoscaler, workload));
        if let Some((needed, why)) = self.needed(service, version) {
            let raise = autoscaler.filter(|_| now > 0).map(|(name, autoscaler)| {
                let min = needed.min(autoscaler.max);
                let before = Some(autoscaler.min_before.unwrap_or(autoscaler.min));
                (autoscaler.min < min).then(|| Change::MinReplicas { autoscaler: name.clone(), min, before })
            });
            return match raise {
                // The autoscaler does the rest; two controllers that scale one workload would fight.
                Some(change) => want(change?, why),
                None if needed > now => want(replicas(needed), why),
                None => None,
            };
        }
        // A version that was removed from its document is not scaled down here: that is up to the user who removed it.
        if version.leaving_until.is_none() && self.is_left(service, version) && now > 0 {
            let (floor, why) = self.floor(service, version, view);
            if floor < now {
                return want(replicas(floor), why);
            }
        }
        // Nothing is needed any more: the autoscaler gets its previous minimum back.
        let (name, autoscaler) = autoscaler.filter(|_| !self.rollout.phase.is_under_way())?;
        let min = autoscaler.min_before?;
        let change = Change::MinReplicas { autoscaler: name.clone(), min, before: None };
        want(change, format!("{} is over", if self.rollout.number > 0 { "the rollout" } else { "what raised it" }))
    }

    /// The minimum number of pods of a version in the current state of the rollout, and why.
    fn needed(&self, service: &ShiftService, version: &ShiftVersion) -> Option<(u32, String)> {
        let rollout = self.rollout;
        let full = rollout.full_load(service);
        let is_target = rollout.target.as_ref() == Some(&version.name);
        let is_stable = rollout.stable == version.name;
        match rollout.phase.is_under_way() {
            true if is_target => {
                let step = rollout.current_step(self.shift)?;
                // A version that moves in one step needs all of its pods before that step.
                let is_whole = self.shift.strategy.whole_steps && !rollout.goes_back(self.shift);
                let planned = if is_whole { 100 } else { step.weight };
                let weight = rollout.weight_by_hand.unwrap_or(planned);
                let needed = (u64::from(full) * u64::from(weight)).div_ceil(100).max(1) as u32;
                // Back to the previous version: do not wait for batches.
                if rollout.goes_back(self.shift) {
                    return Some((needed, format!("{} is to serve again", version.name)));
                }
                let ready = version.endpoints.len() as u32;
                let batch = self.shift.strategy.max_surge.of_rounded_up(full).max(1);
                let number = rollout.step + 1;
                let why = match is_whole && step.weight == 0 && weight > 0 {
                    true => format!("the preview of {} needs all of the {full} pods that carry the load", version.name),
                    false => format!("step {number} gives {} {weight} % of what {full} pods carry", version.name),
                };
                Some((needed.min(ready.saturating_add(batch)), why))
            }
            true if is_stable => Some((full, format!("{} must be able to take everything back", version.name))),
            false if is_stable && rollout.phase == Phase::Failed && !self.target_has_drained(service) => {
                Some((full, format!("{} has taken everything back", version.name)))
            }
            _ => None,
        }
    }

    fn target_has_drained(&self, service: &ShiftService) -> bool {
        let target = self.rollout.target.as_ref();
        target.is_none_or(|target| (self.drained)(&service.name, target).is_some())
    }

    /// Whether a rollout has moved traffic away from a version, and it has been drained for long enough.
    fn is_left(&self, service: &ShiftService, version: &ShiftVersion) -> bool {
        let rollout = self.rollout;
        let name = &version.name;
        let is_in_use =
            rollout.stable == *name || (rollout.phase.is_under_way() && rollout.target.as_ref() == Some(name));
        let Some((since, drained)) = (self.drained)(&service.name, name) else { return false };
        let named = rollout.target.as_ref() == Some(name) || rollout.leaving.as_ref() == Some(name);
        let was_used = rollout.number > 0 && (since >= rollout.started || named);
        let delay = self.shift.strategy.scale_down_delay.as_millis() as u64;
        // During a rollout the stable version may be needed again.
        let may_be_needed = rollout.phase.is_under_way() && rollout.leaving.as_ref() == Some(name);
        !is_in_use
            && was_used
            && !may_be_needed
            && self.now.saturating_sub(drained.max(rollout.attended_since())) >= delay
    }

    /// How many pods of an unneeded version must stay because of a PodDisruptionBudget.
    fn floor(&self, service: &ShiftService, version: &ShiftVersion, view: &NamespaceCache) -> (u32, String) {
        let own = endpoints::pods(view, version, false);
        let place = NamespaceRef::of(self.shift, version);
        let others = service
            .versions
            .iter()
            .filter(|other| other.name != version.name && NamespaceRef::of(self.shift, other) == place);
        let others: BTreeSet<String> = others.flat_map(|other| endpoints::pods(view, other, true)).collect();
        let promised = view.budgets.objects.iter().filter_map(|(name, budget)| {
            let covers =
                |pod: &String| view.pods.objects.get(pod).is_some_and(|labels| budget.selector.selects(labels));
            let is_covered = own.iter().any(covers);
            let elsewhere = others.difference(&own).filter(|pod| covers(pod)).count() as u32;
            is_covered.then(|| (budget.min_available.saturating_sub(elsewhere), name))
        });
        match promised.max() {
            Some((floor, name)) if floor > 0 => (
                floor,
                format!("{} has drained; PodDisruptionBudget {name} promises {floor} of its pods", version.name),
            ),
            _ => (0, format!("{} has drained", version.name)),
        }
    }
}

/// The version in use that has one of these pods, by name and address, as a ready endpoint.
pub fn in_use<'s>(
    shifts: impl IntoIterator<Item = &'s TrafficShift>,
    is_used: impl Fn(&TrafficShift, &ShiftService, &ShiftVersion) -> bool,
    picture: &ClusterCache,
    pods: &BTreeSet<(String, String)>,
) -> Option<String> {
    let of_shift = |shift: &'s TrafficShift| {
        let of_service =
            move |service: &'s ShiftService| service.versions.iter().map(move |version| (shift, service, version));
        shift.services.iter().flat_map(of_service)
    };
    let all = shifts.into_iter().flat_map(of_shift);
    all.filter(|(shift, service, version)| is_used(shift, service, version)).find_map(|(shift, _, version)| {
        let pod = endpoints::ready_among(picture.view(&NamespaceRef::of(shift, version))?, version, pods)?;
        let (version, shift) = (&version.name, &shift.name);
        Some(format!(
            "its pod {pod} is a ready endpoint of version {version} of the TrafficShift {shift}, which is in use, so it is \
             not scaled down"
        ))
    })
}

fn scales(autoscaler: &Autoscaler, workload: &WorkloadRef) -> bool {
    let group = |api_version: &str| api_version.split_once('/').map_or(String::new(), |(group, _)| group.to_owned());
    let WorkloadRef { api_version, kind, name } = &autoscaler.target;
    group(api_version) == group(&workload.api_version) && *kind == workload.kind && *name == workload.name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::cache::{Budget, Slice, SliceEndpoint, Store, Workload, slice_key};
    use crate::rollout::RolloutInputs;
    use serde_json::json;
    use std::collections::BTreeMap;
    use tideshift_core::counts::Counts;
    use tideshift_core::guard::Veto;
    use tideshift_core::shift::LabelSelector;

    /// Payment v1 with four pods and v2 with none, each with a Deployment; steps of 10, 50 and 100 %.
    struct Play {
        document: serde_json::Value,
        rollout: Option<Rollout>,
        view: NamespaceCache,
        /// The number of ready pods of each version.
        ready: BTreeMap<String, u32>,
        drained: BTreeMap<String, (Millis, Millis)>,
        /// Another document, in which every version is in use.
        other: Option<serde_json::Value>,
        now: Millis,
    }

    /// The only input of the rollout is which pods are ready.
    impl RolloutInputs for BTreeMap<String, u32> {
        fn ready(&self, _: &str, version: &str) -> u32 {
            self.get(version).copied().unwrap_or_default()
        }

        fn available(&self, service: &str, version: &str) -> u32 {
            self.ready(service, version)
        }

        fn counts(&self, _: &str, _: &str) -> Counts {
            Counts::default()
        }

        fn coverage(&self) -> crate::rollout::Coverage {
            crate::rollout::Coverage { live: 1, ..Default::default() }
        }

        fn misrouted(&self, _: &str, _: &str) -> u64 {
            0
        }

        fn vetoes(&self, _: &str, _: &str) -> impl Iterator<Item = &Veto> {
            std::iter::empty()
        }

        fn is_up_to_date(&self) -> bool {
            true
        }

        fn verdict(&self) -> crate::rollout::AnalysisResult {
            crate::rollout::AnalysisResult { passes: true, ..Default::default() }
        }
    }

    impl Play {
        fn new() -> Self {
            let version = |name: &str| {
                json!({
                    "name": name, "selector": {"matchLabels": {"version": name}},
                    "workloadRef": {"name": format!("payment-{name}")},
                })
            };
            let document = json!({
                "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
                "metadata": {"name": "payment", "namespace": "shop"},
                "spec": {
                    "versions": [version("v1"), version("v2")], "stable": "v1",
                    "strategy": {"steps": [{"weight": 10, "pause": true}, {"weight": 50, "pause": true}, {"weight": 100}]},
                },
            });
            let mut play = Self {
                document,
                rollout: None,
                view: NamespaceCache::default(),
                ready: BTreeMap::new(),
                drained: BTreeMap::new(),
                other: None,
                now: 1_000,
            };
            play.scaled("v1", 4).scaled("v2", 0).has("v1", 4).pass();
            play
        }

        fn scaled(&mut self, version: &str, replicas: u32) -> &mut Self {
            let key = ("apps/v1".to_owned(), "Deployment".to_owned());
            let table = self.view.workloads.entry(key).or_default();
            table.objects.insert(format!("payment-{version}"), Workload { replicas, selector: None });
            self
        }

        /// Sets the number of ready pods.
        fn has(&mut self, version: &str, ready: u32) -> &mut Self {
            self.ready.insert(version.to_owned(), ready);
            let pod = |n: u32| format!("{version}-{n}");
            let labels = BTreeMap::from([("app", "payment"), ("version", version)]);
            let labels: BTreeMap<_, _> = labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            self.view.pods.objects.extend((0..ready).map(|n| (pod(n), labels.clone())));
            let endpoint = |n: u32| SliceEndpoint {
                address: format!("10.0.{}.{n}", &version[1..]),
                pod: Some(pod(n)),
                ready: true,
                serving: true,
                terminating: false,
            };
            let ports = vec![("http".to_owned(), 80)];
            let slice = Slice { ports, endpoints: (0..ready).map(endpoint).collect(), ..Slice::default() };
            self.view.slices.objects.insert(version.to_owned(), slice);
            self
        }

        fn target(&mut self, target: &str) -> &mut Self {
            self.document["spec"]["target"] = json!(target);
            self
        }

        fn shift(&self) -> TrafficShift {
            let shift = TrafficShift::read(&self.document).unwrap().qualified();
            endpoints::resolve([shift], &self.picture()).0.remove(0)
        }

        fn picture(&self) -> ClusterCache {
            let place = NamespaceRef { cluster: None, namespace: "shop".to_owned() };
            ClusterCache { views: BTreeMap::from([(place, self.view.clone())]), ..ClusterCache::default() }
        }

        /// Two passes, a second apart.
        fn pass(&mut self) -> &mut Self {
            let shift = self.shift();
            for _ in 0..2 {
                self.now += 1_000;
                let rollout = self.rollout.take().unwrap_or_else(|| Rollout::new(&shift, self.now));
                self.rollout = Some(rollout.advance(&shift, &self.ready, self.now));
            }
            self
        }

        fn promote(&mut self) -> &mut Self {
            let shift = self.shift();
            let command = crate::rollout::Command::Promote { full: false, override_gates: false };
            self.rollout = Some(self.rollout.take().unwrap().command(&command, &shift, &self.ready, self.now).unwrap());
            self.pass()
        }

        /// A version drained this long ago.
        fn drained(&mut self, version: &str, ago: Millis) -> &mut Self {
            self.drained.insert(version.to_owned(), (self.now, self.now));
            self.now += ago;
            self
        }

        fn plan(&self) -> Vec<String> {
            let (shift, picture) = (self.shift(), self.picture());
            let drained = |_: &str, version: &str| self.drained.get(version).copied();
            let rollout = self.rollout.as_ref().unwrap();
            let other = self.other.as_ref().map(|other| TrafficShift::read(other).unwrap().qualified());
            let shifts: Vec<TrafficShift> = [shift.clone()].into_iter().chain(other).collect();
            let outlook = endpoints::resolve(shifts.clone(), &picture).1;
            let shared =
                |service: &str, version: &str| outlook.shared.get(&(service.to_owned(), version.to_owned())).cloned();
            let is_used = |of: &TrafficShift, _: &ShiftService, version: &ShiftVersion| {
                of.name != shift.name || !self.drained.contains_key(&version.name)
            };
            let serving = |pods: &BTreeSet<(String, String)>| in_use(&shifts, is_used, &picture, pods);
            let now = self.now;
            let facts = ScalePlanner {
                shift: &shift,
                rollout,
                picture: &picture,
                drained: &drained,
                shared: &shared,
                in_use: &serving,
                now,
            };
            let shown = |want: ScaleAction| match want.change {
                Change::Nothing { workload } => format!("{} stays: {}", workload.name, want.why),
                Change::Replicas { workload, replicas } => format!("{} {replicas}: {}", workload.name, want.why),
                Change::MinReplicas { autoscaler, min, before } => format!("{autoscaler} min {min}, was {before:?}"),
            };
            facts.plan().into_iter().map(shown).collect()
        }

        fn autoscaler(&mut self, version: &str, min: u32, min_before: Option<u32>) -> &mut Self {
            let target = WorkloadRef {
                api_version: "apps/v1".to_owned(),
                kind: "Deployment".to_owned(),
                name: format!("payment-{version}"),
            };
            let autoscaler = Autoscaler { target, min, max: 10, min_before };
            self.view.autoscalers.objects.insert(format!("hpa-{version}"), autoscaler);
            self
        }
    }

    #[test]
    fn the_target_gets_what_its_step_needs_a_few_at_a_time_and_the_stable_version_stays_whole() {
        let mut play = Play::new();
        assert_eq!(play.plan(), [""; 0], "nobody has asked for anything");
        play.target("v2").pass();
        assert_eq!(play.plan(), ["payment-v2 1: step 1 gives v2 10 % of what 4 pods carry"]);
        play.scaled("v2", 1);
        assert_eq!(play.plan(), [""; 0], "it is being done");
        play.has("v2", 1).pass().promote();
        assert_eq!(play.plan(), ["payment-v2 2: step 2 gives v2 50 % of what 4 pods carry"]);
        play.scaled("v2", 2).has("v2", 2).pass().promote();
        assert_eq!(play.plan(), ["payment-v2 3: step 3 gives v2 100 % of what 4 pods carry"], "25 % of 4 is one more");
        // A user has scaled the stable version down: a rollback would need its pods.
        play.scaled("v1", 2);
        assert_eq!(play.plan()[0], "payment-v1 4: v1 must be able to take everything back");
        play.scaled("v1", 4).scaled("v2", 4).has("v2", 4).pass();
        assert_eq!(play.rollout.as_ref().unwrap().phase, Phase::Succeeded);
        assert_eq!(play.plan(), [""; 0], "v1 has not drained");
        play.drained("v1", 29_000);
        assert_eq!(play.plan(), [""; 0], "30 s have not passed");
        play.now += 1_000;
        assert_eq!(play.plan(), ["payment-v1 0: v1 has drained"]);
        play.scaled("v1", 0).has("v1", 0).pass();
        assert_eq!(play.plan(), [""; 0]);
    }

    #[test]
    fn a_stable_version_that_grew_is_replaced_by_as_many() {
        let mut play = Play::new();
        play.target("v2").pass().scaled("v2", 1).has("v2", 1).pass().promote();
        assert_eq!(play.plan(), ["payment-v2 2: step 2 gives v2 50 % of what 4 pods carry"]);
        // The autoscaler adds pods: they count once they are ready, not when they are requested.
        play.scaled("v1", 12).pass();
        assert_eq!(play.plan(), ["payment-v2 2: step 2 gives v2 50 % of what 4 pods carry"]);
        play.has("v1", 12).pass();
        assert_eq!(
            play.plan(),
            ["payment-v2 4: step 2 gives v2 50 % of what 12 pods carry"],
            "25 % of 12 are three more"
        );
        play.scaled("v2", 6).has("v2", 6).pass().promote().pass();
        assert_eq!(play.plan(), ["payment-v2 9: step 3 gives v2 100 % of what 12 pods carry"]);
        // A restart of its pods is no growth, and pods that are removed for good are no load.
        play.has("v1", 13).pass();
        assert_eq!(play.rollout.as_ref().unwrap().full_load(&play.shift().services[0]), 12);
        play.scaled("v1", 8).pass();
        assert_eq!(play.rollout.as_ref().unwrap().full_load(&play.shift().services[0]), 8);
    }

    #[test]
    fn the_load_is_never_taken_for_fewer_pods_than_are_ready() {
        let mut play = Play::new();
        play.scaled("v1", 1).pass().target("v2").pass();
        assert_eq!(play.rollout.as_ref().unwrap().full_load(&play.shift().services[0]), 4, "four are ready");
    }

    #[test]
    fn the_whole_of_a_preview_is_there_before_it_is_held() {
        let mut play = Play::new();
        play.document["spec"]["strategy"] = json!({"blueGreen": {"autoPromotionEnabled": false}});
        play.target("v2").pass();
        for pods in 1..=4 {
            let why = "the preview of v2 needs all of the 4 pods that carry the load";
            assert_eq!(play.plan(), [format!("payment-v2 {pods}: {why}")]);
            play.scaled("v2", pods).has("v2", pods).pass();
        }
        assert_eq!((play.plan(), play.rollout.as_ref().unwrap().phase), (vec![], Phase::Paused));
    }

    #[test]
    fn a_target_that_is_taken_back_is_scaled_down_and_one_that_nobody_used_is_left_alone() {
        let mut play = Play::new();
        play.scaled("v2", 3).has("v2", 3).drained("v2", 600_000);
        assert_eq!(play.plan(), [""; 0], "v2 was scaled by somebody else, for whatever reason");
        play.target("v2").pass();
        let shift = play.shift();
        let abort = crate::rollout::Command::Abort;
        play.rollout = Some(play.rollout.take().unwrap().command(&abort, &shift, &play.ready, play.now).unwrap());
        assert_eq!(play.plan(), [""; 0]);
        play.drained("v2", 30_000);
        assert_eq!(play.plan(), ["payment-v2 0: v2 has drained"]);
    }

    #[test]
    fn an_autoscaler_is_told_the_least_and_gets_back_what_it_had() {
        let mut play = Play::new();
        play.autoscaler("v1", 2, None).autoscaler("v2", 1, None).target("v2").pass();
        assert_eq!(
            play.plan(),
            ["hpa-v1 min 4, was Some(2)", "payment-v2 1: step 1 gives v2 10 % of what 4 pods carry"],
            "an autoscaler does nothing about a workload of no pods"
        );
        play.autoscaler("v1", 4, Some(2)).scaled("v2", 1).has("v2", 1).pass().promote();
        assert_eq!(play.plan(), ["hpa-v2 min 2, was Some(1)"]);
        play.autoscaler("v2", 2, Some(1)).scaled("v2", 4).has("v2", 4).pass().promote();
        assert_eq!(play.rollout.as_ref().unwrap().phase, Phase::Succeeded);
        assert_eq!(play.plan(), ["hpa-v1 min 2, was None", "hpa-v2 min 1, was None"]);
        play.autoscaler("v1", 2, None).autoscaler("v2", 1, None).drained("v1", 30_000);
        assert_eq!(play.plan(), ["payment-v1 0: v1 has drained"]);
    }

    /// A Service that also lists the pods of another version.
    fn listing(play: &mut Play, service: &str, of: &str) {
        let mut slice = play.view.slices.objects[of].clone();
        slice.service = Some(service.to_owned());
        play.view.slices.objects.insert(slice_key(Some(service), service), slice);
    }

    #[test]
    fn no_pod_that_serves_is_taken_from_a_version_in_use() {
        let mut play = Play::new();
        play.target("v2").pass().scaled("v2", 4).has("v2", 4).pass().promote().promote();
        assert_eq!(play.rollout.as_ref().unwrap().phase, Phase::Succeeded);
        play.drained("v1", 30_000);
        assert_eq!(play.plan(), ["payment-v1 0: v1 has drained"]);
        // v1 names a Deployment other than the owner of its pods: that of the serving version.
        play.document["spec"]["versions"][0]["workloadRef"]["name"] = json!("payment-v2");
        let selector = LabelSelector {
            match_labels: BTreeMap::from([("version".to_owned(), "v2".to_owned())]),
            ..LabelSelector::default()
        };
        let key = ("apps/v1".to_owned(), "Deployment".to_owned());
        let workloads = &mut play.view.workloads.get_mut(&key).unwrap().objects;
        workloads.insert("payment-v2".to_owned(), Workload { replicas: 4, selector: Some(selector) });
        let kept = "payment-v2 stays: its pod v2-0 is a ready endpoint of version v2 of the TrafficShift payment.shop, \
                    which is in use, so it is not scaled down";
        assert_eq!(play.plan(), [kept]);
    }

    #[test]
    fn nothing_is_scaled_that_two_versions_have_in_common() {
        let mut play = Play::new();
        // After "Completed", v1 also lists the pods of v2.
        play.target("v2").pass().scaled("v2", 4).has("v2", 4).pass().promote().promote();
        listing(&mut play, "everything", "v2");
        play.document["spec"]["versions"][0].as_object_mut().unwrap().remove("selector");
        play.document["spec"]["versions"][0]["service"] = json!("everything");
        play.drained("v1", 30_000);
        let plan = play.plan();
        assert!(
            plan.len() == 1 && plan[0].starts_with("payment-v1 stays: pod v2-0 is a ready endpoint of"),
            "{plan:?}"
        );
    }

    #[test]
    fn another_document_keeps_the_pods_that_it_uses() {
        let mut play = Play::new();
        play.target("v2").pass().scaled("v2", 4).has("v2", 4).pass().promote().promote().drained("v1", 30_000);
        listing(&mut play, "reports", "v1");
        let version = json!({"name": "only", "service": "reports"});
        play.other = Some(json!({
            "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
            "metadata": {"name": "reports", "namespace": "shop"}, "spec": {"versions": [version], "stable": "only"},
        }));
        let plan = play.plan();
        assert!(plan.len() == 1 && plan[0].contains("of the TrafficShift reports.shop"), "{plan:?}");
        // Pods that are not ready serve nothing.
        for slice in [&slice_key(Some("reports"), "reports"), "v1"] {
            let slice = play.view.slices.objects.get_mut(slice).unwrap();
            slice.endpoints.iter_mut().for_each(|endpoint| endpoint.ready = false);
        }
        assert_eq!(play.plan(), ["payment-v1 0: v1 has drained"]);
    }

    #[test]
    fn what_a_disruption_budget_promises_stays() {
        let mut play = Play::new();
        play.target("v2").pass().scaled("v2", 4).has("v2", 4).pass().promote().promote();
        play.drained("v1", 30_000);
        let budget = |label: (&str, &str), min_available| Budget {
            selector: LabelSelector {
                match_labels: BTreeMap::from([(label.0.to_owned(), label.1.to_owned())]),
                ..LabelSelector::default()
            },
            min_available,
        };
        let mut with = |budget| {
            play.view.budgets =
                Store { objects: BTreeMap::from([("pdb".to_owned(), budget)]).into(), ..Store::default() };
            play.plan()
        };
        let kept = "payment-v1 2: v1 has drained; PodDisruptionBudget pdb promises 2 of its pods";
        assert_eq!(with(budget(("version", "v1"), 2)), [kept]);
        assert_eq!(with(budget(("app", "payment"), 3)), ["payment-v1 0: v1 has drained"], "v2 has enough of them");
        assert_eq!(with(budget(("app", "payment"), 6)), [kept], "v2 has four of the six");
        assert_eq!(with(budget(("app", "other"), 6)), ["payment-v1 0: v1 has drained"]);
        assert_eq!(with(budget(("version", "v1"), 9)), [""; 0], "nobody adds pods for a promise");
    }
}
