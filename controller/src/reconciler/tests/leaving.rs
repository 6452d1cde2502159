//! Removed versions that still serve, and deleted documents.

use super::*;
use crate::rollout::{Phase, Reason};
use proptest::prelude::*;

const STEPS: [(u32, u64); 2] = [(10, 20), (100, 0)];

/// A document with these versions, each with four endpoints.
fn document(name: &str, versions: &[&str], stable: &str, target: Option<&str>) -> Value {
    let endpoints: Vec<String> = (1..5).map(|port| format!("127.0.0.1:{port}")).collect();
    let version = |name: &&str| json!({"name": name, "endpoints": endpoints});
    let steps = STEPS.map(|(weight, hold)| json!({"weight": weight, "holdSeconds": hold}));
    json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": name},
        "spec": {
            "hostnames": ["shop.example.com"], "versions": versions.iter().map(version).collect::<Vec<_>>(),
            "stable": stable, "target": target, "strategy": {"steps": steps}, "drain": {"timeoutSeconds": 300},
        },
    })
}

fn files(documents: &[Value]) -> Vec<(TrafficShift, Value)> {
    documents.iter().map(|document| (TrafficShift::read(document).unwrap(), document.clone())).collect()
}

/// This many of four endpoints are ready of each version of a service.
fn ready(service: &str, versions: &[(&str, usize)]) -> Readiness {
    let endpoint = |port: usize| Endpoint { host: "127.0.0.1".to_owned(), port: port as u16 + 1 };
    let state =
        |n, ready| EndpointState { endpoint: endpoint(n), ready: n < ready, known: true, warming: false, reason: None };
    let of = |(name, ready): &(&str, usize)| ((*name).to_owned(), (0..4).map(|n| state(n, *ready)).collect());
    let versions = versions.iter().map(of).collect();
    Readiness { services: BTreeMap::from([(service.to_owned(), versions)]), ..Readiness::default() }
}

struct Town {
    play: Play,
}

impl Town {
    /// v1, and v2, which has succeeded it.
    fn new() -> Self {
        let documents = [document("shop", &["v1", "v2"], "v1", Some("v2"))];
        let reconciler =
            Reconciler::new(files(&documents), PersistedState::fresh("e".to_owned()).unwrap(), CountState::default());
        let mut town = Self { play: Play { reconciler, now: 1_000_000, sequence: 0 } };
        town.ready(&[("v1", 4), ("v2", 4)]);
        town.pass(60);
        assert_eq!((town.share("v2"), town.play.rollout().phase), (100.0, Phase::Succeeded));
        town
    }

    fn set(&mut self, documents: &[Value]) -> &mut Self {
        self.play.reconciler.set_documents(files(documents));
        self
    }

    fn ready(&mut self, versions: &[(&str, usize)]) -> &mut Self {
        self.play.reconciler.set_readiness(Arc::new(ready("shop", versions)));
        self
    }

    fn pass(&mut self, seconds: u64) -> &mut Self {
        self.play.pass(1_000 * seconds, &EDGE);
        self
    }

    fn restart(&mut self, documents: &[Value], later: Millis) -> &mut Self {
        let kept = serde_json::to_vec(self.play.reconciler.kept()).unwrap();
        let kept = serde_json::from_slice(&kept).unwrap();
        self.play.reconciler = Reconciler::new(files(documents), kept, self.play.reconciler.counted.clone());
        self.play.now += later;
        self
    }

    /// A version's share in the policy of the proxies, in percent.
    fn share(&self, version: &str) -> f64 {
        let service = self.play.reconciler.in_force.iter().find(|service| service.name == "shop");
        service.map_or(0.0, |service| 100.0 * share_of(service, version))
    }

    fn message(&self) -> String {
        self.play.reconciler.rollout_status("shop", self.play.now).unwrap()[0].message.clone()
    }

    fn reasons(&self) -> Vec<Reason> {
        self.play.reconciler.history("shop").unwrap().iter().map(|transition| transition.reason).collect()
    }
}

#[test]
fn a_version_renamed_in_place_serves_until_the_new_one_can() {
    let mut town = Town::new();
    town.set(&[document("shop", &["v1", "v3"], "v1", Some("v3"))]);
    town.ready(&[("v1", 0), ("v2", 4), ("v3", 0)]).pass(10);
    assert_eq!((town.share("v2"), town.share("v3")), (100.0, 0.0));
    let message = town.message();
    assert!(
        message.contains("; v2 left the document; it keeps serving until v3 is ready, at the latest at "),
        "{message}"
    );
    assert!(town.reasons().contains(&Reason::VersionLeft));
    // Also after a restart, which the proxies do not notice.
    let now = [document("shop", &["v1", "v3"], "v1", Some("v3"))];
    town.restart(&now, 5_000).ready(&[("v1", 0), ("v2", 4), ("v3", 0)]).pass(10);
    assert_eq!((town.share("v2"), town.share("v3")), (100.0, 0.0));
    // Its traffic moves in steps, as usual.
    town.ready(&[("v1", 0), ("v2", 4), ("v3", 4)]).pass(10);
    assert_eq!((town.share("v2"), town.share("v3")), (90.0, 10.0));
    town.pass(30);
    assert_eq!((town.share("v2"), town.share("v3"), town.play.rollout().stable.as_str()), (0.0, 100.0, "v3"));
    let versions = &town.play.reconciler.rollout_status("shop", town.play.now).unwrap()[0].versions;
    assert_eq!(versions.iter().map(|version| version.name.as_str()).collect::<Vec<_>>(), ["v1", "v3"]);
    assert_eq!(town.play.reconciler.kept().leaving, Leaving::default());
}

#[test]
fn the_only_version_renamed_with_stable_is_moved_as_far_as_the_new_one_can_carry() {
    let mut town = Town::new();
    town.set(&[document("shop", &["v3"], "v3", None)]).ready(&[("v2", 4), ("v3", 0)]).pass(5);
    assert_eq!((town.share("v2"), town.share("v3")), (100.0, 0.0));
    town.ready(&[("v2", 4), ("v3", 1)]).pass(5);
    assert_eq!((town.share("v2"), town.share("v3")), (75.0, 25.0));
    town.ready(&[("v2", 4), ("v3", 4)]).pass(5);
    assert_eq!((town.share("v3"), town.play.rollout().stable.as_str()), (100.0, "v3"));
}

#[test]
fn what_left_its_document_goes_at_its_drain_deadline() {
    let mut town = Town::new();
    town.set(&[document("shop", &["v1", "v3"], "v1", Some("v3"))]).ready(&[("v1", 1), ("v2", 4), ("v3", 0)]).pass(290);
    assert_eq!((town.share("v1"), town.share("v2")), (0.0, 100.0));
    town.pass(15);
    assert_eq!((town.share("v1"), town.share("v2")), (100.0, 0.0));
    assert_eq!(town.play.reconciler.kept().leaving, Leaving::default());
    // A removed target continues to serve as far as the stable version cannot carry the load.
    let mut town = Town::new();
    town.ready(&[("v1", 4), ("v2", 4)]);
    town.play.reconciler.command("shop", &Command::SetTarget { target: "v1".to_owned() }, town.play.now).unwrap();
    town.set(&[document("shop", &["v1"], "v1", None)]).ready(&[("v1", 2), ("v2", 4)]).pass(5);
    assert_eq!((town.share("v1"), town.share("v2")), (50.0, 50.0));
}

#[test]
fn a_version_that_is_back_in_the_document_has_not_left() {
    let mut town = Town::new();
    town.set(&[document("shop", &["v1", "v3"], "v1", Some("v3"))]).ready(&[("v1", 0), ("v2", 4), ("v3", 0)]).pass(100);
    town.set(&[document("shop", &["v1", "v2"], "v1", Some("v2"))]).pass(400);
    assert_eq!((town.share("v2"), town.message()), (100.0, "v3 is gone from the document; v2 serves".to_owned()));
}

#[test]
fn a_document_that_comes_back_goes_on_where_it_was() {
    let of_v3 = || document("shop", &["v1", "v2", "v3"], "v1", Some("v3"));
    for restarts in [false, true] {
        let mut town = Town::new();
        town.set(&[of_v3()]).ready(&[("v1", 0), ("v2", 4), ("v3", 4)]).pass(10);
        let before = town.play.rollout().clone();
        assert_eq!((town.share("v3"), before.number, before.step), (10.0, 2, 0));
        town.set(&[]).pass(2);
        assert_eq!((town.share("v2"), town.share("v3")), (90.0, 10.0));
        assert!(town.message().starts_with("the document is gone; its weights stay in force (onDelete: Keep)"));
        if restarts {
            town.restart(&[], 60_000).ready(&[("v1", 0), ("v2", 4), ("v3", 4)]).pass(2);
            assert_eq!((town.share("v2"), town.share("v3")), (90.0, 10.0));
        }
        // Meanwhile the rollout does not advance, and commands apply to existing documents only.
        town.pass(60);
        assert_eq!(town.share("v3"), 10.0);
        let refused = town.play.reconciler.command("shop", &Command::Pause, town.play.now);
        assert!(matches!(refused, Err(CommandError::Conflict(why)) if why.contains("the document is gone")));
        town.set(&[of_v3()]).pass(2);
        let rollout = town.play.rollout();
        assert_eq!((town.share("v3"), rollout.number, rollout.step), (10.0, before.number, before.step));
        let held = rollout.held(town.play.now).unwrap();
        assert!((11_000..15_000).contains(&held), "the time between does not count: {held}");
        assert_eq!(town.reasons()[town.reasons().len() - 2..], [Reason::DocumentLeft, Reason::DocumentReturned]);
        assert_eq!(town.play.reconciler.take_departures(), if restarts { (0, 1) } else { (1, 1) });
        town.pass(20);
        assert_eq!(town.share("v3"), 100.0);
    }
}

#[test]
fn what_is_kept_goes_once_another_document_claims_it_and_that_one_starts_from_what_serves() {
    let mut town = Town::new();
    town.set(&[]).pass(3_600);
    assert_eq!(town.share("v2"), 100.0, "as long as nobody claims it");
    // Under another name, as in Git.
    town.set(&[document("checkout", &["v1", "v2"], "v1", Some("v2"))]);
    let all = [("v1", 0), ("v2", 4)];
    let mut both = ready("shop", &all);
    both.services.extend(ready("checkout", &all).services);
    town.play.reconciler.set_readiness(Arc::new(both));
    let first = town.play.reconciler.evaluate(town.play.now).policy.unwrap();
    assert_eq!(first.services.len(), 1);
    assert_eq!((first.services[0].name.as_str(), share_of(&first.services[0], "v2")), ("checkout", 1.0));
    let status = town.play.reconciler.rollout_status("checkout", town.play.now).unwrap().remove(0);
    assert_eq!((status.stable.as_str(), status.phase, status.number), ("v2", Phase::Initialized, 0));
    // The first document is forgotten after ten minutes.
    town.pass(601);
    assert_eq!(town.play.reconciler.rollout_status("shop", town.play.now), None);
    assert_eq!(town.play.reconciler.kept().rollouts.len(), 1);
}

#[test]
fn what_is_to_drain_goes_to_the_default_route_once_that_leads_to_something_ready() {
    let draining = || {
        let mut document = document("shop", &["v1", "v2"], "v1", Some("v2"));
        document["spec"]["onDelete"] = json!("Drain");
        document
    };
    let mut town = Town::new();
    town.set(&[draining()]).pass(1).set(&[]).ready(&[("v1", 0), ("v2", 4)]).pass(290);
    assert!(town.play.reconciler.holds_deletion("shop", town.play.now));
    assert_eq!(town.share("v2"), 100.0);
    // The default route leads to v1, which has no ready endpoint.
    town.pass(60);
    assert_eq!(town.share("v2"), 100.0);
    assert!(!town.play.reconciler.holds_deletion("shop", town.play.now), "no deletion waits longer than its deadline");
    town.ready(&[("v1", 1), ("v2", 4)]).pass(1);
    assert_eq!(town.play.reconciler.in_force, []);
    // Its rollout is remembered for ten minutes after the deletion.
    town.set(&[draining()]).ready(&[("v1", 1), ("v2", 4)]).pass(1);
    assert_eq!((town.share("v2"), town.play.rollout().stable.as_str()), (100.0, "v2"));
    // If no version can take traffic, there is nothing to wait for.
    town.set(&[]).ready(&[("v1", 0), ("v2", 0)]).pass(1);
    assert!(!town.play.reconciler.holds_deletion("shop", town.play.now));
}

#[test]
fn what_was_applied_is_deleted_as_any_document_and_what_was_kept_can_be_given_up() {
    let mut town = Town::new();
    town.set(&[]).pass(1);
    let of_api = document("shop", &["v1", "v2"], "v1", Some("v2"));
    assert!(town.play.reconciler.put_shift("shop", of_api).unwrap(), "it is new");
    town.pass(1);
    town.play.reconciler.delete_shift("shop", None).unwrap();
    town.pass(1_000);
    assert_eq!(town.share("v2"), 100.0);
    let again = town.play.reconciler.delete_shift("shop", None).unwrap_err().to_string();
    assert!(again.contains("tideshift delete --drain"), "{again}");
    town.play.reconciler.delete_shift("shop", Some(OnDelete::Drain)).unwrap();
    town.pass(290);
    assert_eq!(town.share("v2"), 100.0);
    town.pass(15);
    assert_eq!(town.play.reconciler.in_force, []);
    assert!(matches!(town.play.reconciler.delete_shift("shop", None), Err(CommandError::NotFound(_))));
}

#[test]
fn a_document_that_went_while_no_controller_was_there_is_kept_as_it_is() {
    let mut town = Town::new();
    town.restart(&[], 3_600_000).pass(60);
    assert_eq!(town.share("v2"), 100.0);
    let now = [document("shop", &["v1", "v2"], "v1", Some("v2"))];
    town.set(&now).ready(&[("v1", 4), ("v2", 4)]).pass(5);
    assert_eq!((town.share("v2"), town.play.rollout().number), (100.0, 1));
}

#[test]
fn a_new_document_starts_from_the_only_version_with_pods() {
    let now = document("shop", &["v1", "v2"], "v1", Some("v2"));
    let mut documents = files(std::slice::from_ref(&now));
    // As a cluster reports it: the workload of v1 is scaled to 0.
    documents[0].0.services[0].versions[0].replicas = Some(0);
    documents[0].0.services[0].versions[0].endpoints.clear();
    let fresh = || PersistedState::fresh("e".to_owned()).unwrap();
    let mut reconciler = Reconciler::new(documents.clone(), fresh(), CountState::default());
    reconciler.set_readiness(Arc::new(ready("shop", &[("v1", 0), ("v2", 4)])));
    let policy = reconciler.evaluate(1_000_000).policy.unwrap();
    assert_eq!(shares(&policy), [0.0, 100.0]);
    let rollout = &reconciler.kept().rollouts["shop"];
    assert_eq!((rollout.stable.as_str(), rollout.full_load(&documents[0].0.services[0])), ("v2", 4));
    // If the document wants v1, traffic moves back as far as v1 can carry the load of v2.
    documents[0].0.target = None;
    let mut reconciler = Reconciler::new(documents, fresh(), CountState::default());
    reconciler.set_readiness(Arc::new(ready("shop", &[("v1", 0), ("v2", 4)])));
    assert_eq!(shares(&reconciler.evaluate(1_000_000).policy.unwrap()), [0.0, 100.0]);
    reconciler.set_readiness(Arc::new(ready("shop", &[("v1", 1), ("v2", 4)])));
    reconciler.evaluate(1_002_000);
    assert_eq!(reconciler.policy.as_ref().map(shares), Some([25.0, 75.0]));
}

#[test]
fn neither_renaming_nor_deleting_goes_past_a_gate() {
    let gated = |mut document: Value| {
        document["spec"]["webhooks"] = json!([{"name": "approval", "type": "Gate", "url": "http://127.0.0.1:1/"}]);
        document
    };
    let renamed = gated(document("shop", &["v3"], "v3", None));
    // The old stable version is removed while another one is named.
    let mut town = Town::new();
    town.set(&[gated(document("shop", &["v1", "v2"], "v1", Some("v2")))]).pass(5);
    town.set(std::slice::from_ref(&renamed)).ready(&[("v2", 4), ("v3", 4)]).pass(1_000);
    assert_eq!((town.share("v2"), town.share("v3")), (100.0, 0.0), "no deadline opens a gate");
    assert_eq!((town.play.rollout().phase, town.play.rollout().reason), (Phase::Waiting, Reason::GateClosed));
    assert!(town.message().contains("as long as a gate is closed"), "{}", town.message());
    // The document is deleted and created again.
    let mut town = Town::new();
    town.set(&[]).pass(1_000).set(std::slice::from_ref(&renamed)).ready(&[("v2", 4), ("v3", 4)]).pass(1_000);
    assert_eq!((town.share("v2"), town.share("v3")), (100.0, 0.0));
    let questions = town.play.reconciler.questions();
    let [(question, _)] = questions.as_slice() else { panic!("{questions:?}") };
    town.play.reconciler.gate_answered(question, true, "");
    town.pass(25);
    for (question, _) in town.play.reconciler.questions() {
        town.play.reconciler.gate_answered(&question, true, "");
    }
    town.pass(60);
    assert_eq!((town.share("v3"), town.play.rollout().stable.as_str()), (100.0, "v3"));
}

/// An edit of the document, or of the ready endpoints.
#[derive(Debug, Clone)]
enum Edit {
    Document { versions: Vec<usize>, stable: usize, target: Option<usize> },
    Gone,
    Ready([usize; 4]),
    Pass(u64),
    Restart,
}

const NAMES: [&str; 4] = ["v1", "v2", "v3", "v4"];

fn edit() -> impl Strategy<Value = Edit> {
    let versions = prop::sample::subsequence(vec![0, 1, 2, 3], 1..4);
    let document = (versions, 0..4usize, prop::option::of(0..4usize))
        .prop_map(|(versions, stable, target)| Edit::Document { versions, stable, target });
    prop_oneof![
        3 => document,
        1 => Just(Edit::Gone),
        3 => prop::array::uniform4(prop_oneof![Just(0), Just(1), Just(4)]).prop_map(Edit::Ready),
        3 => (1..25u64).prop_map(Edit::Pass),
        1 => Just(Edit::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// For all edits: before its deadline, a ready version loses no more of its share than other versions can carry,
    /// and some version serves as long as any version in force is ready.
    #[test]
    fn nothing_that_serves_is_dropped_by_edits(edits in prop::collection::vec(edit(), 1..16)) {
        let mut town = Town::new();
        let mut now = vec![document("shop", &["v1", "v2"], "v1", Some("v2"))];
        let mut counts = [4usize, 4, 0, 0];
        for edit in edits {
            let before = town.play.reconciler.in_force.first().cloned();
            let mut seconds = 1;
            match &edit {
                Edit::Document { versions, stable, target } => {
                    let names: Vec<&str> = versions.iter().map(|n| NAMES[*n]).collect();
                    let of = |n: &usize| names[n % names.len()];
                    now = vec![document("shop", &names, of(stable), target.as_ref().map(of))];
                    now[0]["spec"]["drain"] = json!({"timeoutSeconds": 100_000});
                }
                Edit::Gone => now.clear(),
                Edit::Ready(ready) => counts = *ready,
                Edit::Pass(passed) => seconds = *passed,
                Edit::Restart => _ = town.restart(&now, 3_000),
            }
            town.set(&now);
            let ready: Vec<_> = NAMES.iter().copied().zip(counts).collect();
            town.ready(&ready).pass(seconds);
            let Some(service) = town.play.reconciler.in_force.first().cloned() else { panic!("nothing in force") };
            let count = |name: &str| ready.iter().find(|(of, _)| *of == name).map_or(0, |(_, count)| *count);
            let served = before.iter().flat_map(|service| &service.versions).filter(|version| version.weight > 0);
            let could = served.map(|version| count(&version.name)).sum::<usize>();
            let of_all: f64 = service.versions.iter().map(|version| share_of(&service, &version.name)).sum();
            let can = service.versions.iter().any(|version| count(&version.name) > 0);
            prop_assert_eq!(of_all > 0.0, can, "{:?}: {:?}", edit, service);
            prop_assert!(could == 0 || of_all > 0.0, "{:?}: what served is ready and nothing serves", edit);
            // A larger share than before can be carried by its version, unless all versions together cannot carry the
            // load.
            let carries: usize = service.versions.iter().map(|version| count(&version.name)).sum();
            for version in service.versions.iter().filter(|version| carries > 4 && version.weight > 0) {
                let share = share_of(&service, &version.name);
                let full = 4.0f64;
                prop_assert!(share <= count(&version.name) as f64 / full + 1e-6 || count(&version.name) >= 4
                    || helpers(&service, &count) <= 4, "{:?}: {:?}", edit, service);
            }
        }
    }
}

/// How many endpoints of all versions in use are ready.
fn helpers(service: &Service, count: &impl Fn(&str) -> usize) -> usize {
    service.versions.iter().filter(|version| version.weight > 0).map(|version| count(&version.name)).sum()
}
