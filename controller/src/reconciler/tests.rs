//! Drains across restarts of the controller, and reports that arrive out of order.

mod costs;
mod isolation;
mod leaving;
mod sessions;

use super::*;
use crate::readiness::EndpointState;
use crate::status::{DrainState, DrainStatus};
use serde_json::json;
use std::collections::BTreeMap;
use tideshift_core::counts::Counts;
use tideshift_core::protocol::report::{ServiceReport, VersionReport};
use tideshift_core::shift::Endpoint;

const VERSIONS: [&str; 2] = ["v1", "v2"];

/// A controller with one document, whose drain deadline is one hour unless the document sets another one.
struct Play {
    reconciler: Reconciler,
    now: Millis,
    sequence: u64,
}

fn documents(spec: &Value) -> Vec<(TrafficShift, Value)> {
    let version = |name: &&str| json!({"name": name, "endpoints": ["127.0.0.1:9001"]});
    let mut all = json!({
        "versions": VERSIONS.iter().map(version).collect::<Vec<_>>(),
        "stable": "v1",
        "target": "v2",
        "strategy": {"steps": [{"weight": 100}]},
        "drain": {"timeoutSeconds": 3_600},
    });
    all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    let document = json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "shop"},
        "spec": all});
    vec![(TrafficShift::read(&document).unwrap(), document)]
}

fn readiness() -> Arc<Readiness> {
    let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port: 9001 };
    let state = EndpointState { endpoint, ready: true, known: true, warming: false, reason: None };
    let versions: BTreeMap<_, _> = VERSIONS.iter().map(|name| ((*name).to_owned(), vec![state.clone()])).collect();
    Arc::new(Readiness { services: BTreeMap::from([("shop".to_owned(), versions)]), ..Readiness::default() })
}

impl Play {
    fn new(spec: Value) -> Self {
        let reconciler =
            Reconciler::new(documents(&spec), PersistedState::fresh("e".to_owned()).unwrap(), CountState::default());
        Self { reconciler, now: 1_000_000, sequence: 0 }.ready()
    }

    fn ready(mut self) -> Self {
        self.reconciler.set_readiness(readiness());
        self
    }

    /// Starts another process after this much time.
    fn restart(&mut self, spec: Value, later: Millis, keeps_state: bool) {
        let (mut kept, counted) = (self.reconciler.kept().clone(), self.reconciler.counted.clone());
        if !keeps_state {
            kept = PersistedState::fresh("another".to_owned()).unwrap();
        }
        let reconciler =
            Reconciler::new(documents(&spec), kept, if keeps_state { counted } else { CountState::default() });
        let (now, sequence) = (self.now + later, self.sequence);
        *self = Self { reconciler, now, sequence }.ready();
    }

    /// Lets this much time pass; the proxies report each second.
    fn pass(&mut self, millis: Millis, proxies: &[(&str, u64)]) {
        for passed in (0..millis).step_by(100) {
            if passed % 1_000 == 0 {
                for (proxy, in_flight) in proxies {
                    self.says(proxy, *in_flight);
                }
            }
            self.reconciler.evaluate(self.now);
            self.now += 100;
        }
    }

    /// The report of a proxy that runs the newest policy and has this many requests of v1 in flight.
    fn report(&mut self, proxy: &str, in_flight: u64) -> Report {
        self.sequence += 1;
        let version = VersionReport { name: "v1".to_owned(), in_flight, ..VersionReport::default() };
        let service = ServiceReport { name: "shop".to_owned(), versions: vec![version], ..ServiceReport::default() };
        Report {
            proxy: proxy.to_owned(),
            start: "1".to_owned(),
            sequence: self.sequence,
            epoch: self.reconciler.kept().epoch.clone(),
            revision: self.reconciler.kept().revision,
            services: vec![service],
            ..Report::default()
        }
    }

    fn says(&mut self, proxy: &str, in_flight: u64) -> bool {
        let report = self.report(proxy, in_flight);
        self.reconciler.reported(&report, self.now).decides
    }

    fn drain(&self) -> DrainStatus {
        self.reconciler.drain("shop", "v1").unwrap()
    }

    fn state(&self) -> DrainState {
        self.drain().state
    }
}

#[test]
fn a_controller_that_was_away_for_long_waits_for_the_proxies_that_were_there() {
    for (away, keeps_state) in [(66_000, true), (3_000_000, true), (66_000, false)] {
        let mut play = Play::new(json!({"drain": {"timeoutSeconds": 10_000}}));
        play.pass(10_000, &[("edge", 1), ("other", 0)]);
        assert_eq!((play.state(), play.drain().message.as_str()), (DrainState::Draining, "1 in flight"));
        play.restart(json!({"stable": "v2"}), away, keeps_state);
        play.pass(1_000, &[]);
        assert_eq!(play.state(), DrainState::Draining, "nobody has reported");
        play.pass(1_000, &[("other", 0)]);
        assert_eq!(play.state(), DrainState::Draining, "not everybody has reported");
        play.pass(10_000, &[("other", 0), ("edge", 1)]);
        assert_eq!(play.drain().message, "1 in flight");
        play.pass(2_000, &[("other", 0), ("edge", 0)]);
        assert_eq!(play.state(), DrainState::Drained);
    }
}

#[test]
fn a_proxy_that_never_comes_back_is_waited_for_a_minute_after_the_restart() {
    let mut play = Play::new(json!({}));
    play.pass(10_000, &[("edge", 1), ("other", 0)]);
    play.restart(json!({}), 600_000, true);
    play.pass(55_000, &[("other", 0)]);
    assert_eq!(play.drain().message, "waiting for proxy edge to report");
    play.pass(10_000, &[("other", 0)]);
    assert_eq!(play.state(), DrainState::Drained);
}

#[test]
fn nobody_is_silent_while_the_controller_stands_still() {
    let mut play = Play::new(json!({}));
    play.pass(10_000, &[("edge", 1), ("other", 0)]);
    play.now += 90_000;
    play.reconciler.evaluate(play.now);
    assert_eq!(play.drain().in_flight, 1);
    assert_eq!(play.reconciler.status(play.now).proxies.len(), 2);
    play.pass(59_000, &[("other", 0)]);
    assert_eq!(play.drain().message, "1 in flight");
    play.pass(3_000, &[("other", 0)]);
    assert_eq!((play.state(), play.reconciler.status(play.now).proxies.len()), (DrainState::Drained, 1));
}

#[test]
fn without_proxies_a_drain_ends_by_its_deadline() {
    let mut play = Play::new(json!({"drain": {"timeoutSeconds": 20}}));
    play.pass(15_000, &[]);
    assert_eq!((play.state(), play.drain().message.as_str()), (DrainState::Draining, "no proxy has reported"));
    play.pass(10_000, &[]);
    assert_eq!(play.state(), DrainState::DeadlineExceeded);
}

#[test]
fn reports_that_were_held_up_change_nothing() {
    let mut play = Play::new(json!({"target": "v1"}));
    play.pass(1_000, &[("edge", 7)]);
    let mut sent: Vec<Report> = Vec::new();
    for i in 1..=20 {
        let mut report = play.report("edge", 20 - i);
        report.services[0].versions[0].ended = Counts { ok: 10 * i, ..Counts::default() };
        report.services[0].versions[0].durations = vec![10 * i];
        sent.push(report);
    }
    sent.rotate_left(13);
    sent.reverse();
    for report in &sent {
        play.reconciler.reported(report, play.now);
    }
    let status = play.reconciler.status(play.now);
    let v1 = &status.services[0].versions[0];
    assert_eq!((v1.requests.ok, v1.in_flight), (200, 0));
    assert_eq!(play.reconciler.counted.ledger.durations("shop", "v1"), [200]);
}

#[test]
fn a_version_that_leaves_the_document_is_known_until_it_has_drained() {
    let mut play = Play::new(json!({}));
    play.pass(5_000, &[("edge", 1)]);
    let alone = json!({"stable": "v2", "target": null, "versions": [{"name": "v2", "endpoints": ["127.0.0.1:9001"]}]});
    play.reconciler.set_documents(documents(&alone));
    play.pass(5_000, &[("edge", 1)]);
    assert_eq!((play.state(), play.drain().message.as_str()), (DrainState::Draining, "1 in flight"));
    assert_eq!(play.reconciler.status(play.now).services[0].versions.len(), 1);
    play.restart(alone, 5_000, true);
    play.pass(5_000, &[("edge", 1)]);
    assert_eq!((play.state(), play.drain().message.as_str()), (DrainState::Draining, "1 in flight"));
    play.pass(2_000, &[("edge", 0)]);
    assert_eq!(play.state(), DrainState::Drained);
    play.pass(700_000, &[("edge", 0)]);
    assert_eq!(play.reconciler.drain("shop", "v1"), None);
    assert_eq!(play.reconciler.drain("shop", "v9"), None);
}

impl Play {
    fn rollout(&self) -> &Rollout {
        &self.reconciler.kept().rollouts["shop"]
    }

    /// The status of the step, or of the whole rollout.
    fn status(&self) -> crate::status::ServiceStatus {
        self.reconciler.status(self.now).services.remove(0)
    }
}

const HOUR: Millis = 3_600_000;
const EDGE: [(&str, u64); 1] = [("edge", 0)];

#[test]
fn no_hold_passes_while_no_controller_is_there() {
    let steps = json!({"strategy": {"steps": [{"weight": 10, "holdSeconds": 60}, {"weight": 100, "holdSeconds": 60}]}});
    for stands_still in [false, true] {
        let mut play = Play::new(steps.clone());
        play.pass(40_000, &EDGE);
        let since = play.status().since;
        for _ in 0..2 {
            match stands_still {
                true => play.now += HOUR,
                false => play.restart(steps.clone(), HOUR, true),
            }
            play.pass(5_000, &EDGE);
            assert_eq!(play.rollout().step, 0);
        }
        assert!((48..=50).contains(&play.status().step.unwrap().held_seconds.unwrap()), "{:?}", play.status().step);
        assert_eq!(play.status().since, since, "what is shown stays as it was");
        play.pass(15_000, &EDGE);
        assert_eq!(play.rollout().step, 1);
    }
}

#[test]
fn no_deadline_passes_while_no_controller_is_there() {
    let document = json!({"strategy": {"steps": [{"weight": 100}], "progressDeadlineSeconds": 60}});
    let mut unready = (*readiness()).clone();
    unready.services.get_mut("shop").unwrap().get_mut("v2").unwrap()[0].ready = false;
    let unready = Arc::new(unready);
    let mut play = Play::new(document.clone());
    play.reconciler.set_readiness(unready.clone());
    play.pass(40_000, &EDGE);
    play.restart(document, HOUR, true);
    play.reconciler.set_readiness(unready);
    play.pass(10_000, &EDGE);
    assert_eq!(play.rollout().reason, crate::rollout::Reason::WaitingForCapacity);
    assert!(play.status().deadline > Some(timestamp(play.now + 8_000)), "{:?}", play.status().deadline);
    play.pass(12_000, &EDGE);
    assert_eq!(play.rollout().reason, crate::rollout::Reason::ProgressDeadlineExceeded);
}

#[test]
fn no_drain_runs_out_while_no_controller_is_there() {
    let document = json!({"drain": {"timeoutSeconds": 30}, "stable": "v2"});
    let mut play = Play::new(json!({"drain": {"timeoutSeconds": 30}, "stable": "v1", "target": null}));
    play.pass(5_000, &[("edge", 1)]);
    play.reconciler.set_documents(documents(&document));
    play.pass(20_000, &[("edge", 1)]);
    let since = play.drain().since;
    play.restart(document, HOUR, true);
    play.pass(8_000, &[("edge", 1)]);
    assert_eq!((play.state(), play.drain().since), (DrainState::Draining, since));
    play.pass(4_000, &[("edge", 1)]);
    assert_eq!(
        (play.state(), play.drain().message.as_str()),
        (DrainState::DeadlineExceeded, "after 30.0 s still 1 in flight")
    );
}

#[test]
fn an_endpoint_is_no_longer_ready_for_a_time_in_which_no_controller_was_there() {
    let document = json!({"strategy": {"steps": [{"weight": 100, "holdSeconds": 600}], "minReadySeconds": 60}});
    let mut play = Play::new(document.clone());
    let mut unready = (*readiness()).clone();
    unready.services.get_mut("shop").unwrap().get_mut("v2").unwrap()[0].ready = false;
    play.reconciler.set_readiness(Arc::new(unready));
    play.pass(5_000, &EDGE);
    play.reconciler.set_readiness(readiness());
    play.pass(30_000, &EDGE);
    play.restart(document, HOUR, true);
    play.pass(25_000, &EDGE);
    assert_eq!(play.status().versions[1].weight, 0.0);
    play.pass(10_000, &EDGE);
    assert_eq!(play.status().versions[1].weight, 100.0);
}

#[test]
fn the_time_is_kept_while_something_is_held_and_only_then() {
    let mut play = Play::new(json!({"strategy": {"steps": [{"weight": 10, "holdSeconds": 60}, {"weight": 100}]}}));
    play.pass(5_000, &EDGE);
    for _ in 0..100 {
        play.pass(500, &EDGE);
        assert!(play.now - play.reconciler.kept().time <= 5_100, "{} {}", play.now, play.reconciler.kept().time);
    }
    play.pass(30_000, &EDGE);
    let quiet = play.reconciler.kept().time;
    play.pass(60_000, &EDGE);
    assert_eq!((play.rollout().phase.is_under_way(), play.reconciler.kept().time), (false, quiet));
}

#[test]
fn a_state_that_does_not_say_when_it_was_kept_goes_on_as_it_is() {
    let steps = json!({"strategy": {"steps": [{"weight": 10, "holdSeconds": 60}, {"weight": 100}]}});
    let mut play = Play::new(steps.clone());
    play.pass(40_000, &EDGE);
    let mut kept = serde_json::to_value(play.reconciler.kept()).unwrap();
    for field in ["time", "wall", "young"] {
        kept.as_object_mut().unwrap().remove(field);
    }
    let counted = CountState { time: 0, ..play.reconciler.counted.clone() };
    play.reconciler = Reconciler::new(documents(&steps), serde_json::from_value(kept).unwrap(), counted);
    play.reconciler.set_readiness(readiness());
    play.pass(15_000, &EDGE);
    assert_eq!(play.rollout().step, 0);
    play.pass(10_000, &EDGE);
    assert!(play.rollout().step == 1 || !play.rollout().phase.is_under_way());
}

#[test]
fn a_rollout_ends_only_where_proxies_report_what_they_run() {
    use crate::rollout::{Phase, Reason};
    let steps = json!({"strategy": {"steps": [{"weight": 1, "holdSeconds": 20}, {"weight": 100}]}});
    let mut play = Play::new(steps.clone());
    play.pass(60_000, &[]);
    assert_eq!((play.rollout().step, play.rollout().reason), (0, Reason::NoProxies));
    // A proxy that runs its initial policy.
    for _ in 0..10 {
        let report = Report { epoch: String::new(), revision: 1, ..play.report("edge", 0) };
        play.reconciler.reported(&report, play.now);
        play.pass(1_000, &[]);
    }
    assert_eq!((play.rollout().step, play.rollout().reason), (0, Reason::ProxiesBehind));
    let words = "step 1: proxy edge runs no policy of this controller and has not applied 1; tideshift status says what \
                 it refused";
    assert_eq!(play.rollout().message, words);
    // One silent proxy of two is more than a tenth.
    play.pass(1_000, &[("edge", 0), ("other", 0)]);
    play.pass(12_000, &[("edge", 0)]);
    assert!(play.rollout().message.starts_with("step 1: proxy other of 2 proxies has been silent for 1"));
    assert_eq!((play.rollout().step, play.rollout().reason), (0, Reason::ProxiesBehind));
    // Until it is forgotten.
    play.pass(80_000, &[("edge", 0)]);
    assert_eq!(play.rollout().phase, Phase::Succeeded);
    let history = play.reconciler.history("shop").unwrap();
    let reasons: Vec<Reason> = history.iter().map(|transition| transition.reason).collect();
    use Reason::{Completed, Holding, NoProxies, ProxiesBehind, Started, StepStarted};
    assert_eq!(
        reasons,
        [Started, Holding, NoProxies, ProxiesBehind, Holding, ProxiesBehind, Holding, StepStarted, Completed]
    );
}

#[test]
fn proxies_are_behind_only_what_concerns_the_rollout() {
    let other = |endpoint: &str| {
        let document = json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "cart"},
            "spec": {"hostnames": ["cart.example.com"], "stable": "v1",
                "versions": [{"name": "v1", "endpoints": [endpoint]}, {"name": "v2", "endpoints": [endpoint]}]}});
        (TrafficShift::read(&document).unwrap(), document)
    };
    let steps = json!({"hostnames": ["shop.example.com"], "strategy": {"steps": [{"weight": 10, "holdSeconds": 30}]}});
    let all = |n: u64| {
        let mut all = documents(&steps);
        let mut cart = other("127.0.0.1:9001");
        cart.0.services[0].hostnames = vec![format!("cart{n}.example.com").parse().unwrap()];
        all.push(cart);
        all
    };
    let mut play = Play::new(steps.clone());
    let mut ready = (*readiness()).clone();
    let shop = ready.services["shop"].clone();
    ready.services.insert("cart".to_owned(), shop);
    play.reconciler.set_readiness(Arc::new(ready));
    // Another service changes all the time, and proxies are always one revision behind.
    for n in 0..60 {
        play.reconciler.set_documents(all(n));
        let before = play.reconciler.kept().revision;
        play.pass(500, &[]);
        assert!(play.reconciler.kept().revision > before);
        let report = Report { revision: before.max(1), ..play.report("edge", 0) };
        play.reconciler.reported(&report, play.now);
    }
    assert!(play.rollout().held(play.now) > Some(25_000), "{:?}", play.rollout());
}

#[test]
fn a_restart_says_nothing_of_proxies_that_are_there() {
    let steps = json!({"strategy": {"steps": [{"weight": 10, "holdSeconds": 60}, {"weight": 100}]}});
    let mut play = Play::new(steps.clone());
    play.pass(30_000, &EDGE);
    play.restart(steps, 10_000, true);
    play.pass(900, &[]);
    play.pass(60_000, &EDGE);
    let history = play.reconciler.history("shop").unwrap();
    let reasons: Vec<crate::rollout::Reason> = history.iter().map(|transition| transition.reason).collect();
    use crate::rollout::Reason::{Completed, Holding, Started, StepStarted};
    assert_eq!(reasons, [Started, Holding, StepStarted, Completed]);
}

/// Readiness without the endpoints of one version.
fn readiness_without(version: &str) -> Arc<Readiness> {
    let mut readiness = (*readiness()).clone();
    let endpoints = readiness.services.get_mut("shop").and_then(|versions| versions.get_mut(version));
    endpoints.into_iter().flatten().for_each(|state| state.ready = false);
    Arc::new(readiness)
}

const TWO_STEPS: &str = r#"{"strategy": {"steps": [{"weight": 10, "holdSeconds": 20}, {"weight": 100}]}}"#;

/// The shares of v1 and v2, in percent.
fn shares(policy: &Policy) -> [f64; 2] {
    VERSIONS.map(|version| 100.0 * share_of(&policy.services[0], version))
}

#[test]
fn counts_that_cannot_be_kept_hold_back_steps_by_evidence_and_nothing_else() {
    use crate::rollout::{Phase, Reason};
    let mut play = Play::new(serde_json::from_str(TWO_STEPS).unwrap());
    play.reconciler.set_counts_error(Some("no space left on device"));
    play.pass(60_000, &EDGE);
    assert_eq!((play.rollout().step, play.rollout().reason), (0, Reason::CatchingUp), "{}", play.rollout().message);
    assert_eq!(play.reconciler.status(play.now).counts_error.as_deref(), Some("no space left on device"));
    // Readiness still applies, in both directions.
    for (now, then) in [(readiness_without("v2"), [100.0, 0.0]), (readiness(), [90.0, 10.0])] {
        play.reconciler.set_readiness(now);
        play.pass(2_000, &EDGE);
        assert_eq!(play.reconciler.policy.as_ref().map(shares), Some(then));
    }
    // Commands still apply.
    play.reconciler.command("shop", &Command::Promote { full: false, override_gates: false }, play.now).unwrap();
    play.pass(1_000, &EDGE);
    assert_eq!(play.rollout().step, 1);
    play.reconciler.command("shop", &Command::Abort, play.now).unwrap();
    assert_eq!(play.reconciler.evaluate(play.now).policy.as_ref().map(shares), Some([100.0, 0.0]));
    // The rollout advances once counts can be persisted.
    let mut play = Play::new(serde_json::from_str(TWO_STEPS).unwrap());
    play.reconciler.set_counts_error(Some("no space left on device"));
    play.pass(60_000, &EDGE);
    play.reconciler.set_counts_error(None);
    play.pass(30_000, &EDGE);
    assert_eq!(play.rollout().phase, Phase::Succeeded);
}

#[test]
fn of_what_cannot_be_kept_only_what_takes_traffic_away_is_published() {
    let mut play = Play::new(serde_json::from_str(TWO_STEPS).unwrap());
    let first = play.reconciler.evaluate(play.now).policy.unwrap();
    play.reconciler.set_published(&first);
    play.reconciler.was_written();
    assert_eq!(shares(&first), [90.0, 10.0]);
    // A step forward waits, because a restart would lose it.
    play.pass(1_000, &EDGE);
    play.reconciler.was_written();
    play.reconciler.set_state_error(Some("Secret tideshift-state: forbidden"), true);
    play.reconciler.command("shop", &Command::Promote { full: false, override_gates: false }, play.now).unwrap();
    let decided = play.reconciler.evaluate(play.now).policy.unwrap();
    assert_eq!((shares(&decided), play.reconciler.away()), ([0.0, 100.0], None));
    let status = play.reconciler.status(play.now);
    assert_eq!((status.revision, status.published_revision), (decided.revision, Some(first.revision)));
    let weights = status.services[0].versions.iter().map(|version| (version.weight, version.weight_in_force));
    assert_eq!(weights.collect::<Vec<_>>(), [(0.0, Some(90.0)), (100.0, Some(10.0))]);
    assert_eq!(play.reconciler.held_back(), Some("Secret tideshift-state: forbidden"));
    // The loss of a version does not wait.
    play.reconciler.set_readiness(readiness_without("v2"));
    play.reconciler.evaluate(play.now);
    let away = play.reconciler.away().unwrap();
    play.reconciler.set_published(&away);
    assert_eq!(shares(&away), [100.0, 0.0]);
    assert!(away.revision > first.revision + LEAP, "no other policy has it");
    let after = play.reconciler.evaluate(play.now);
    assert!(after.keep && after.policy.unwrap().revision > away.revision);
    assert_eq!(play.reconciler.away(), None, "it is said once");
    // A rollback by a command does not wait either.
    play.reconciler.set_readiness(readiness());
    play.reconciler.evaluate(play.now);
    play.reconciler.command("shop", &Command::Abort, play.now).unwrap();
    play.reconciler.evaluate(play.now);
    let away = play.reconciler.away().unwrap();
    assert_eq!(shares(&away), [100.0, 0.0]);
    // Once state can be persisted, everything is published.
    play.reconciler.set_state_error(None, true);
    let all = play.reconciler.evaluate(play.now).policy.unwrap();
    play.reconciler.was_written();
    play.reconciler.set_published(&all);
    assert_eq!((play.reconciler.held_back(), play.reconciler.status(play.now).published_revision), (None, None));
}

#[test]
fn a_command_leaves_who_gave_it_in_the_history() {
    let mut play = Play::new(json!({"strategy": {"steps": [{"weight": 10, "holdSeconds": 600}, {"weight": 100}]}}));
    play.pass(1_000, &[("a", 0)]);
    play.reconciler.command_by(Some("alice from 10.0.0.1"), "shop", &Command::Pause, play.now).unwrap();
    play.pass(200, &[("a", 0)]);
    let history = play.reconciler.history("shop").unwrap();
    let by: Vec<_> = history.iter().filter_map(|of| of.by.as_deref().zip(Some(of.words()))).collect();
    let [("alice from 10.0.0.1", words)] = by.as_slice() else { panic!("{history:?}") };
    assert!(words.ends_with(" (by alice from 10.0.0.1)"), "{words}");
}
