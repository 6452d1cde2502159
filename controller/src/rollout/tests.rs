//! Rollouts in simulated time.

mod edits;
mod endpoints;
mod gates;
mod measured;
mod pauses;
mod waiting;

use super::*;
use serde_json::json;
use std::collections::BTreeMap;
use tideshift_core::guard::GuardPolicy;

/// Inputs that tests set.
#[derive(Default)]
struct World {
    ready: BTreeMap<String, u32>,
    /// The available endpoints where they differ from the ready ones: by service and version.
    available: BTreeMap<(String, String), u32>,
    /// Versions of a service without ready endpoints.
    unready: std::collections::BTreeSet<(String, String)>,
    opinion: AnalysisResult,
    counts: BTreeMap<String, Counts>,
    vetoes: Vec<Veto>,
    behind: bool,
    coverage: Coverage,
    misrouted: u64,
}

impl RolloutInputs for World {
    fn ready(&self, service: &str, version: &str) -> u32 {
        let is_ready = !self.unready.contains(&(service.to_owned(), version.to_owned()));
        self.ready.get(version).copied().filter(|_| is_ready).unwrap_or_default()
    }

    fn available(&self, service: &str, version: &str) -> u32 {
        self.available.get(&(service.to_owned(), version.to_owned())).copied().unwrap_or(self.ready(service, version))
    }

    fn counts(&self, _: &str, version: &str) -> Counts {
        self.counts.get(version).copied().unwrap_or_default()
    }

    fn coverage(&self) -> Coverage {
        self.coverage.clone()
    }

    fn misrouted(&self, _: &str, version: &str) -> u64 {
        if version == "v2" { self.misrouted } else { 0 }
    }

    fn verdict(&self) -> AnalysisResult {
        self.opinion.clone()
    }

    fn vetoes(&self, _: &str, version: &str) -> impl Iterator<Item = &Veto> {
        self.vetoes.iter().filter(move |veto| veto.version == version)
    }

    fn is_up_to_date(&self) -> bool {
        !self.behind
    }
}

/// A service with four endpoints for each of v1, v2 and v3, all of which are ready.
struct Play {
    document: serde_json::Value,
    world: World,
    rollout: Rollout,
    now: Millis,
}

impl Play {
    fn new(stable: &str, target: Option<&str>, steps: serde_json::Value) -> Self {
        let version = |n: u16| {
            let endpoints: Vec<String> = (0..4).map(|i| format!("127.0.0.1:{}", 9_000 + 10 * n + i)).collect();
            json!({"name": format!("v{n}"), "endpoints": endpoints})
        };
        let document = json!({
            "apiVersion": "tideshift.dev/v1alpha1",
            "kind": "TrafficShift",
            "metadata": {"name": "checkout"},
            "spec": {
                "versions": [version(1), version(2), version(3)],
                "stable": stable,
                "target": target,
                "strategy": {"steps": steps},
                "analysis": {"maxErrors": 10},
            },
        });
        let opinion = AnalysisResult { passes: true, ..AnalysisResult::default() };
        let coverage = Coverage { live: 2, ..Coverage::default() };
        let world = World { opinion, coverage, ..World::default() };
        let mut play = Self { world, rollout: Rollout::new(&read(&document), 0), document, now: 0 };
        for version in ["v1", "v2", "v3"] {
            play.ready(version, 4);
        }
        play
    }

    fn set(&mut self, field: &str, value: serde_json::Value) {
        self.document["spec"][field] = value;
    }

    fn ready(&mut self, version: &str, endpoints: u32) {
        self.world.ready.insert(version.to_owned(), endpoints);
    }

    fn count(&mut self, version: &str, ok: u64, error: u64) {
        *self.world.counts.entry(version.to_owned()).or_default() += Counts { ok, error, ..Counts::default() };
    }

    /// Lets time pass, with an update every tenth of a second.
    fn pass(&mut self, seconds: u64) -> &mut Self {
        let shift = read(&self.document);
        for _ in 0..seconds * 10 {
            self.now += 100;
            self.rollout = self.rollout.clone().advance(&shift, &self.world, self.now);
        }
        self
    }

    /// The shares of all versions, in percent.
    fn shares(&self) -> Vec<f64> {
        let shift = read(&self.document);
        let parts = self.rollout.parts(&shift, &shift.services[0], &self.world);
        parts.iter().map(|part| percent(part.share)).collect()
    }
}

fn read(document: &serde_json::Value) -> TrafficShift {
    TrafficShift::read(document).unwrap_or_else(|errors| panic!("{errors}"))
}

#[test]
fn the_stable_version_serves_while_nothing_is_wanted() {
    let mut play = Play::new("v1", None, json!([{"weight": 100}]));
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.rollout.phase, Phase::Initialized);
}

#[test]
fn a_version_at_rest_that_lacks_endpoints_is_said_to() {
    let mut play = Play::new("v1", None, json!([{"weight": 100}]));
    assert_eq!(play.pass(1).rollout.message, "v1 serves");
    play.ready("v1", 3);
    assert_eq!(play.pass(1).rollout.message, "v1 has 3 of 4 endpoints ready that the load needs");
    play.ready("v1", 4);
    assert_eq!(play.pass(1).rollout.message, "v1 serves");
}

#[test]
fn steps_are_taken_after_their_holds() {
    let steps = json!([{"weight": 1, "holdSeconds": 30}, {"weight": 25, "holdSeconds": 60}, {"weight": 100}]);
    let mut play = Play::new("v1", Some("v2"), steps);
    assert_eq!(play.pass(29).shares(), [99.0, 1.0, 0.0]);
    assert_eq!(play.pass(2).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.pass(58).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.pass(3).shares(), [0.0, 100.0, 0.0]);
    assert_eq!((play.rollout.phase, play.rollout.stable.as_str()), (Phase::Succeeded, "v2"));
}

#[test]
fn a_last_step_below_everything_is_followed_by_everything() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 1}]));
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.pass(2).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn traffic_moves_no_faster_than_endpoints_become_ready() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    for (ready, shares) in [(0, [100.0, 0.0]), (1, [75.0, 25.0]), (3, [25.0, 75.0]), (2, [50.0, 50.0])] {
        play.ready("v2", ready);
        assert_eq!(play.pass(5).shares()[..2], shares, "{ready} ready");
        assert_eq!(play.rollout.phase, Phase::Progressing);
    }
    play.ready("v2", 4);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    assert_eq!(play.rollout.phase, Phase::Succeeded);
}

#[test]
fn a_hold_begins_again_when_readiness_is_lost() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 10}, {"weight": 100}]));
    play.pass(8).ready("v2", 1);
    assert_eq!(play.pass(5).shares(), [75.0, 25.0, 0.0]);
    play.ready("v2", 4);
    assert_eq!(play.pass(9).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.pass(3).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn a_version_that_never_becomes_ready_stalls_and_says_so() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 30, "holdSeconds": 1}, {"weight": 100}]));
    play.ready("v2", 0);
    assert_eq!(play.pass(599).shares(), [100.0, 0.0, 0.0]);
    let message = "step 1: v2 has 0 of 2 endpoints ready that 30 % of the load need";
    assert_eq!((play.rollout.reason, play.rollout.message.as_str()), (Reason::WaitingForCapacity, message));
    assert_eq!(play.pass(3_600).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.rollout.message, format!("{message}; no progress for 600 s"));
    assert_eq!((play.rollout.phase, play.rollout.reason), (Phase::Progressing, Reason::ProgressDeadlineExceeded));
    // Only the status changes: as soon as there are endpoints, the rollout continues.
    play.ready("v2", 4);
    assert_eq!(play.pass(3).rollout.phase, Phase::Succeeded);
}

#[test]
fn whoever_is_ready_takes_over_from_a_version_that_is_gone() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 1000}]));
    play.pass(1).ready("v1", 0);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    play.ready("v2", 0);
    assert_eq!(play.pass(1).shares(), [0.0, 0.0, 100.0]);
    play.ready("v3", 0);
    assert_eq!(play.pass(1).shares(), [0.0, 0.0, 0.0]);
    play.ready("v1", 4);
    play.ready("v2", 4);
    assert_eq!(play.pass(1).shares(), [90.0, 10.0, 0.0]);
}

#[test]
fn too_many_errors_take_the_target_back() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 1000}]));
    play.count("v2", 50, 100);
    play.pass(1).count("v2", 90, 10);
    assert_eq!(play.pass(1).shares(), [90.0, 10.0, 0.0], "ten errors since the start are borne");
    play.count("v2", 0, 1);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.rollout.phase, Phase::Failed);
    let message = "v2: 11 of 101 requests failed, more than the 10 allowed; back to v1 as far as it can carry the load";
    assert_eq!(play.rollout.message, message);
    assert_eq!(play.pass(3_600).shares(), [100.0, 0.0, 0.0], "it stays failed");
}

#[test]
fn back_goes_only_what_the_old_version_can_carry() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 75, "holdSeconds": 1000}]));
    play.pass(1).ready("v1", 2);
    play.count("v2", 90, 11);
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    play.ready("v1", 4);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
}

#[test]
fn a_target_that_fails_most_requests_loses_all_at_once() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 75, "holdSeconds": 1000}]));
    play.pass(1).ready("v1", 1);
    play.count("v2", 10, 11);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    play.ready("v1", 0);
    assert_eq!(play.pass(1).shares(), [0.0, 0.0, 100.0], "even an uninvolved version is better");
    play.ready("v3", 0);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0], "and a bad answer better than none");
}

/// A guard's veto on v2 that began at this time, in milliseconds.
fn veto(at: u64, strikes: u32) -> Veto {
    let until = at * 1_000_000 + GuardPolicy::default().cool_down_for(strikes);
    Veto { version: "v2".to_owned(), until, strikes, requests: 9, errors: 9, others_requests: 81, others_errors: 0 }
}

#[test]
fn a_guards_veto_is_no_verdict() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}]));
    play.world.coverage.live = 3;
    play.pass(30).world.vetoes = vec![veto(play.now, 2)];
    // One proxy of three does not block the rollout.
    assert_eq!(play.pass(20).stands(), (Phase::Progressing, Reason::Holding));
    // On most proxies the share is nominal only, and the step is not held.
    play.world.vetoes.push(veto(play.now, 1));
    assert_eq!(play.pass(300).stands(), (Phase::Progressing, Reason::GuardVeto));
    assert_eq!(play.rollout.message, "step 1: the guards of 2 of 3 proxies keep v2 out");
    assert_eq!(play.shares(), [90.0, 10.0, 0.0]);
    play.world.vetoes.pop();
    assert_eq!((play.pass(59).rollout.reason, play.pass(2).rollout.phase), (Reason::Holding, Phase::Succeeded));
    // Half of the proxies are too many as well.
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}]));
    play.pass(1).world.vetoes = vec![veto(play.now, 1)];
    assert_eq!(play.pass(1).rollout.message, "step 1: the guards of 1 of 2 proxies keep v2 out");
    // A failing verdict still rolls back, and the guards' counts show how bad the failure is now.
    play.world.opinion = AnalysisResult { fails: true, requests: 53, errors: 21, ..AnalysisResult::default() };
    play.ready("v1", 1);
    assert_eq!(play.pass(1).stands(), (Phase::Failed, Reason::VerdictFail));
    assert_eq!(play.shares(), [100.0, 0.0, 0.0], "all at once");
}

#[test]
fn a_new_target_supersedes_the_old_one_half_way() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 1000}]));
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
    play.set("target", json!("v3"));
    assert_eq!(play.pass(1).shares(), [75.0, 0.0, 25.0]);
    assert_eq!(play.rollout.stable, "v1");
}

#[test]
fn the_next_rollout_starts_from_the_last_ones_target() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 5}]));
    assert_eq!(play.pass(10).shares(), [0.0, 100.0, 0.0]);
    play.set("target", json!("v3"));
    assert_eq!(play.pass(1).shares(), [0.0, 75.0, 25.0]);
    play.count("v3", 0, 20);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    // The document catches up with the actual state: nothing moves.
    play.set("stable", json!("v2"));
    play.set("target", json!(null));
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    assert_eq!(play.rollout.phase, Phase::Initialized);
}

#[test]
fn back_to_stable_is_at_once_and_capacity_capped() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 5}]));
    play.pass(10).ready("v1", 1);
    play.set("target", json!("v1"));
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0]);
    play.ready("v1", 4);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!((play.rollout.phase, play.rollout.stable.as_str()), (Phase::Succeeded, "v1"));
}

#[test]
fn back_to_stable_asks_nobody() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 5}]));
    play.pass(10);
    play.set("webhooks", json!([{"name": "gate", "type": "Gate", "url": "http://127.0.0.1:1/"}]));
    let warm_up = json!({"seconds": 30, "mirrorPercent": 5});
    play.set("strategy", json!({"steps": [{"weight": 25, "holdSeconds": 5}], "warmUp": warm_up}));
    play.world.opinion = AnalysisResult { fails: true, both_fail: true, ..AnalysisResult::default() };
    play.set("target", json!("v1"));
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!((play.stands(), play.rollout.stable.as_str()), ((Phase::Succeeded, Reason::Completed), "v1"));
    // On the way forward, gates and analysis apply.
    play.world.opinion = AnalysisResult { passes: true, ..AnalysisResult::default() };
    play.set("target", json!("v3"));
    assert_eq!(play.pass(60).stands(), (Phase::Waiting, Reason::GateClosed));
    assert_eq!(play.shares(), [100.0, 0.0, 0.0]);
    play.rollout.gate_answered(0, false, "no: it is Friday");
    assert_eq!(play.pass(1).rollout.message, "step 1: no: it is Friday");
    play.rollout.gate_answered(0, true, "");
    assert_eq!(play.pass(1).stands(), (Phase::Progressing, Reason::WarmingUp));
}

#[test]
fn a_withdrawn_target_gives_its_share_back() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 1000}]));
    play.pass(1);
    for withdrawn in [json!(null), json!("v1")] {
        play.set("target", json!("v2"));
        assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
        play.set("target", withdrawn);
        assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
        assert_eq!(play.rollout.phase, Phase::Initialized);
    }
}

#[test]
fn a_restart_goes_on_where_it_was() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}, {"weight": 100}]));
    play.pass(30);
    let stored = serde_json::to_string(&play.rollout).unwrap();
    play.rollout = serde_json::from_str(&stored).unwrap();
    assert_eq!(play.pass(29).shares(), [90.0, 10.0, 0.0]);
    assert_eq!(play.pass(3).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn capacity_can_be_said_instead_of_counted() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("capacity", json!({"endpointsForFullLoad": 2}));
    play.ready("v2", 1);
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    play.ready("v2", 2);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn no_step_is_taken_on_counts_from_before_a_restart() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 5}, {"weight": 50}]));
    play.pass(1);
    play.world.behind = true;
    assert_eq!(play.pass(60).shares(), [90.0, 10.0, 0.0]);
    play.count("v2", 0, 11);
    play.world.behind = false;
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.rollout.phase, Phase::Failed);
}

#[test]
fn a_changed_capacity_counts_at_once_and_is_forgotten_when_it_is_taken_back() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 80, "holdSeconds": 3600}]));
    play.ready("v2", 1);
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
    play.set("capacity", json!({"endpointsForFullLoad": 2}));
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    play.set("capacity", json!({}));
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
}

impl Play {
    /// The transitions since the last call: phase, reason and step's number.
    fn news(&mut self) -> Vec<(Phase, Reason, Option<usize>)> {
        let news = self.rollout.take_news();
        news.into_iter().map(|news| (news.phase, news.reason, news.step.map(|step| step + 1))).collect()
    }

    fn command(&mut self, command: Command) -> Result<(), Refused> {
        let shift = read(&self.document);
        let rollout = self.rollout.clone().command(&command, &shift, &self.world, self.now)?;
        self.rollout = rollout.advance(&shift, &self.world, self.now);
        Ok(())
    }

    fn stands(&self) -> (Phase, Reason) {
        (self.rollout.phase, self.rollout.reason)
    }
}

const PROMOTE: Command = Command::Promote { full: false, override_gates: false };

#[test]
fn a_pause_waits_for_somebody() {
    let steps =
        json!([{"weight": 10}, {"pause": true}, {"weight": 50, "holdSeconds": 10, "pause": true}, {"weight": 100}]);
    let mut play = Play::new("v1", Some("v2"), steps);
    assert_eq!(play.pass(3_600).shares(), [90.0, 10.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Paused, Reason::PauseStep));
    assert_eq!(play.rollout.message, "step 2: v2 has 10 %; paused until it is promoted");
    play.command(PROMOTE).unwrap();
    assert_eq!(play.pass(5).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.pass(10).stands(), (Phase::Paused, Reason::PauseStep));
    // Resuming a pause step is the same as promoting.
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Succeeded, Reason::Completed));
    use Phase::{Paused, Progressing, Succeeded};
    assert_eq!(
        play.news(),
        [
            (Progressing, Reason::Started, Some(1)),
            (Progressing, Reason::StepStarted, Some(2)),
            (Paused, Reason::PauseStep, Some(2)),
            (Progressing, Reason::Promoted, Some(2)),
            (Progressing, Reason::StepStarted, Some(3)),
            (Progressing, Reason::Holding, Some(3)),
            (Paused, Reason::PauseStep, Some(3)),
            (Progressing, Reason::Promoted, Some(3)),
            (Progressing, Reason::StepStarted, Some(4)),
            (Succeeded, Reason::Completed, None),
        ]
    );
    assert!(play.command(PROMOTE).is_err(), "there is nothing to promote");
}

#[test]
fn somebody_can_pause_and_resume_at_any_time() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 10}, {"weight": 100}]));
    assert!(play.command(Command::Pause).is_err(), "nothing is under way");
    play.pass(5).command(Command::Pause).unwrap();
    assert_eq!(play.pass(3_600).shares(), [90.0, 10.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Paused, Reason::PausedByUser));
    let paused = play.rollout.clone();
    play.command(Command::Pause).unwrap();
    assert_eq!(play.rollout, paused, "it is so already");
    // Paused or not, a failing target is rolled back.
    let mut failing = Play {
        document: play.document.clone(),
        rollout: play.rollout.clone(),
        ..Play::new("v1", None, json!([{"weight": 1}]))
    };
    failing.now = play.now;
    failing.count("v2", 0, 11);
    assert_eq!(failing.pass(1).stands(), (Phase::Failed, Reason::TooManyErrors));
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed), "it was held long enough");
    assert!(play.command(Command::Resume).is_err());
}

#[test]
fn promoting_skips_a_hold_and_an_undecided_verdict_but_not_the_endpoints() {
    let mut play =
        Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 600}, {"weight": 50, "holdSeconds": 600}]));
    play.world.opinion = AnalysisResult::default();
    play.pass(1).command(PROMOTE).unwrap();
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    play.ready("v2", 1);
    play.pass(1).command(Command::Promote { full: true, override_gates: false }).unwrap();
    assert_eq!(play.pass(60).shares(), [75.0, 25.0, 0.0]);
    play.ready("v2", 4);
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
}

#[test]
fn a_weight_by_hand_stays_until_the_rollout_is_resumed() {
    let mut play =
        Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 5}, {"weight": 50, "holdSeconds": 5}]));
    assert!(play.command(Command::SetWeight { weight: 30, override_gates: false }).is_err());
    play.pass(1).command(Command::SetWeight { weight: 30, override_gates: false }).unwrap();
    assert!(matches!(
        play.command(Command::SetWeight { weight: 101, override_gates: false }),
        Err(Refused::Invalid(_))
    ));
    assert_eq!(play.pass(3_600).shares(), [70.0, 30.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Paused, Reason::WeightSet));
    // Continues from the first step that does not reduce the share.
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.pass(6).stands(), (Phase::Succeeded, Reason::Completed));
}

#[test]
fn aborting_gives_everything_back_and_revokes_sessions() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 600}]));
    play.pass(1).command(Command::Abort).unwrap();
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!((play.stands(), play.rollout.rollback_count), ((Phase::Failed, Reason::Aborted), 1));
    assert!(play.command(Command::Abort).is_err());
    // The same target again is another rollout.
    play.command(Command::SetTarget { target: "v2".to_owned() }).unwrap();
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.rollout.number, 2);
}

#[test]
fn back_to_any_version_at_once_as_far_as_it_can_carry_the_load() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 5}]));
    play.pass(10);
    play.set("target", json!("v3"));
    assert_eq!(play.pass(1).shares(), [0.0, 50.0, 50.0]);
    play.ready("v1", 3);
    let refused = play.command(Command::Rollback { to: "v9".to_owned(), override_gates: false });
    assert_eq!(
        refused,
        Err(Refused::Invalid("to: \"v9\" is not allowed; expected one of the versions v1, v2, v3".to_owned()))
    );
    play.command(Command::Rollback { to: "v1".to_owned(), override_gates: false }).unwrap();
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0], "what v1 cannot carry, the stable version does");
    play.ready("v1", 4);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!((play.stands(), play.rollout.stable.as_str()), ((Phase::Succeeded, Reason::Completed), "v1"));
    // The unchanged document does not start another rollout.
    assert_eq!(play.pass(60).shares(), [100.0, 0.0, 0.0]);
}

#[test]
fn rolling_back_to_the_stable_version_ends_what_is_under_way() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 600}]));
    play.pass(1).command(Command::Rollback { to: "v1".to_owned(), override_gates: false }).unwrap();
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!((play.stands(), play.rollout.rollback_count), ((Phase::Failed, Reason::RolledBack), 1));
    assert!(play.command(Command::Rollback { to: "v1".to_owned(), override_gates: false }).is_err());
}

#[test]
fn a_target_by_hand_is_as_one_of_the_document() {
    let mut play = Play::new("v1", None, json!([{"weight": 50, "holdSeconds": 600}]));
    play.pass(1).command(Command::SetTarget { target: "v2".to_owned() }).unwrap();
    assert_eq!(play.pass(60).shares(), [50.0, 50.0, 0.0], "the document, which names none, does not undo it");
    let under_way = play.rollout.clone();
    play.command(Command::SetTarget { target: "v2".to_owned() }).unwrap();
    assert_eq!(play.rollout, under_way, "it is so already");
    play.command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    assert_eq!(play.pass(1).shares(), [50.0, 0.0, 50.0]);
    play.command(Command::SetTarget { target: "v1".to_owned() }).unwrap();
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Initialized, Reason::TargetWithdrawn));
    let withdrawn = play.rollout.clone();
    play.command(Command::SetTarget { target: "v1".to_owned() }).unwrap();
    assert_eq!(play.rollout, withdrawn, "it serves already");
}

#[test]
fn a_rollout_that_is_stuck_can_be_aborted_by_itself() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("strategy", json!({"progressDeadlineSeconds": 60, "progressDeadlineAbort": true}));
    play.ready("v2", 1);
    assert_eq!(play.pass(50).shares(), [75.0, 25.0, 0.0]);
    // One more endpoint is progress.
    play.ready("v2", 2);
    assert_eq!(play.pass(59).stands(), (Phase::Progressing, Reason::WaitingForCapacity));
    assert_eq!(play.pass(2).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Failed, Reason::ProgressDeadlineExceeded));
}

#[test]
fn blue_green_moves_everything_at_once_when_all_of_it_can_be_carried() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("strategy", json!({"blueGreen": {"autoPromotionEnabled": false, "holdSeconds": 30}}));
    assert_eq!(play.pass(5).stands(), (Phase::Paused, Reason::PauseStep));
    assert_eq!(play.shares(), [100.0, 0.0, 0.0]);
    play.command(PROMOTE).unwrap();
    play.ready("v2", 3);
    assert_eq!(play.pass(60).shares(), [100.0, 0.0, 0.0], "three of four are not enough");
    assert_eq!(play.stands(), (Phase::Progressing, Reason::WaitingForCapacity));
    play.ready("v2", 4);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.pass(31).stands(), (Phase::Succeeded, Reason::Completed));
}

#[test]
fn testers_come_before_users() {
    let steps = json!([{"matches": [{"headers": [{"name": "x-beta", "value": "1"}]}], "holdSeconds": 10},
        {"weight": 50, "holdSeconds": 10}, {"matches": [], "holdSeconds": 10}]);
    let mut play = Play::new("v1", Some("v2"), steps);
    let testers = |play: &Play| play.rollout.testers(&read(&play.document)).map(|rule| rule.versions[0].name.clone());
    assert_eq!(play.pass(5).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(testers(&play).as_deref(), Some("v2"));
    assert_eq!(play.pass(10).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(testers(&play).as_deref(), Some("v2"), "they stay on it when users come");
    assert_eq!(play.pass(10).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(testers(&play), None, "until a step names others");
    assert_eq!(play.pass(15).stands(), (Phase::Succeeded, Reason::Completed));
    play.command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    play.pass(1).command(Command::Abort).unwrap();
    assert_eq!(testers(&play), None, "a target that was taken back has no testers");
}

#[test]
fn a_target_warms_up_by_copies_and_then_by_a_growing_share() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 600}]));
    play.set(
        "strategy",
        json!({"steps": [{"weight": 50, "holdSeconds": 600}], "warmUp": {"seconds": 20, "mirrorPercent": 5}}),
    );
    play.ready("v2", 0);
    let mirrored =
        |play: &Play| play.rollout.mirror(&read(&play.document)).map(|mirror| (mirror.version, mirror.percent));
    assert_eq!((play.pass(60).shares(), mirrored(&play)), (vec![100.0, 0.0, 0.0], None));
    play.ready("v2", 4);
    assert_eq!((play.pass(19).shares(), mirrored(&play)), (vec![100.0, 0.0, 0.0], Some(("v2".to_owned(), 5))));
    assert_eq!(play.rollout.reason, Reason::WarmingUp);
    let mut shares: Vec<f64> = (0..2).map(|_| play.pass(2).shares()[1]).collect();
    assert_eq!(mirrored(&play), None);
    // While no controller runs, the share does not grow, and afterwards it does not catch up.
    play.now += 15_000;
    shares.extend((0..2).map(|_| play.pass(1).shares()[1]));
    assert!(shares.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 10.1), "{shares:?}");
    assert!(shares[3] < 50.0 && play.rollout.reason == Reason::Ramping, "{shares:?}");
    assert_eq!((play.pass(6).shares()[1], play.rollout.reason), (50.0, Reason::Holding));
    // A rollback does not ramp, and neither does taking over lost endpoints of the stable version.
    play.command(Command::Abort).unwrap();
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
}

#[test]
fn endpoints_that_have_been_ready_for_a_moment_only_carry_nothing_yet() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 600}]));
    play.world.available.insert(("checkout".to_owned(), "v2".to_owned()), 1);
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
    // Unless no better version is available.
    play.ready("v1", 0);
    play.ready("v3", 0);
    play.world.available.insert(("checkout".to_owned(), "v2".to_owned()), 0);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn no_step_is_taken_while_more_is_missing_than_may_be() {
    let mut play =
        Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 5}, {"weight": 50, "holdSeconds": 5}]));
    play.ready("v2", 2);
    play.ready("v1", 0);
    assert_eq!(play.pass(60).stands(), (Phase::Progressing, Reason::EndpointsLost));
    let message = "step 1: v1 and v2 have 2 of 4 endpoints ready together, and no more than 1 may be missing; v1 has 0 \
                   of 3 endpoints ready that 75 % of the load need; v2 has 100 %";
    assert_eq!(play.rollout.message, message);
    play.set(
        "strategy",
        json!({"steps": [{"weight": 25, "holdSeconds": 5}, {"weight": 50, "holdSeconds": 5}], "maxUnavailable": "50%"}),
    );
    assert_eq!(play.pass(6).rollout.step, 1);
}

#[test]
fn kubernetes_arithmetic_of_what_may_be_missing() {
    for (surge, unavailable, whole, may_be_missing) in [
        (json!("25%"), json!("25%"), 4, 1),
        (json!("25%"), json!("25%"), 3, 0),
        (json!(1), json!("50%"), 3, 1),
        (json!(0), json!("10%"), 5, 1),
        (json!(1), json!(0), 5, 0),
        (json!("100%"), json!(2), 5, 2),
    ] {
        let mut play = Play::new("v1", None, json!([{"weight": 100}]));
        play.set("strategy", json!({"maxSurge": surge, "maxUnavailable": unavailable}));
        let strategy = read(&play.document).strategy;
        assert_eq!(allocation::max_unavailable(&strategy, whole), may_be_missing, "{surge} {unavailable} of {whole}");
    }
}

#[test]
fn endpoints_lost_in_the_middle_of_a_step_move_traffic_at_once_and_it_is_said() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 600}]));
    play.pass(5).news();
    play.ready("v2", 1);
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.news(), [(Phase::Progressing, Reason::EndpointsLost, Some(1))]);
    let message = "step 1: v2 has 1 of 2 endpoints ready that 50 % of the load need; v1 has 75 %, v2 25 %";
    assert_eq!(play.rollout.message, message);
    play.ready("v2", 0);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    play.ready("v2", 4);
    play.ready("v1", 1);
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0]);
    let message = "step 1: v1 has 1 of 2 endpoints ready that 50 % of the load need; v1 has 25 %, v2 75 %";
    assert_eq!((play.rollout.reason, play.rollout.message.as_str()), (Reason::EndpointsLost, message));
}

#[test]
fn a_step_that_ends_undecided_waits_and_says_so() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 10}]));
    play.world.opinion = AnalysisResult { words: "v2: 0 of 3 failed".to_owned(), ..AnalysisResult::default() };
    assert_eq!(play.pass(3_600).shares(), [50.0, 50.0, 0.0]);
    assert_eq!((play.rollout.reason, play.rollout.message.as_str()), (Reason::Undecided, "step 1: v2: 0 of 3 failed"));
    play.world.opinion.passes = true;
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
}

#[test]
fn a_verdict_takes_the_target_back_and_both_failing_does_not() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 10}]));
    let both =
        AnalysisResult { both_fail: true, passes: true, words: "hold: both".to_owned(), ..AnalysisResult::default() };
    play.world.opinion = both;
    assert_eq!(play.pass(600).stands(), (Phase::Progressing, Reason::BothFailing));
    assert_eq!(play.shares(), [50.0, 50.0, 0.0]);
    let words = "v2 is worse than v1: 7 of 41 failed".to_owned();
    play.world.opinion = AnalysisResult { fails: true, requests: 41, errors: 7, words, ..AnalysisResult::default() };
    play.ready("v1", 2);
    assert_eq!(play.pass(1).stands(), (Phase::Failed, Reason::VerdictFail));
    assert_eq!(play.shares(), [50.0, 50.0, 0.0], "no more than v1 can carry");
    assert_eq!(
        play.rollout.message,
        "v2 is worse than v1: 7 of 41 failed; back to v1 as far as it can carry the load; v1 has 2 of 4 endpoints ready \
         that the load needs; v1 has 50 %, v2, which was taken back, has 50 %"
    );
}

/// Two services that move from one cluster to another.
fn moving_house() -> Play {
    let service = |name: &str| {
        let version = |name: &str| json!({"name": name, "endpoints": ["127.0.0.1:1", "127.0.0.1:2"]});
        json!({"name": name, "hostnames": [format!("{name}.example.com")], "versions": [version("v1"), version("v2")]})
    };
    let mut play = Play::new("v1", None, json!([{"weight": 100}]));
    play.document["spec"] = json!({
        "services": [service("cart"), service("search")], "stable": "v1", "target": "v2",
        "strategy": {"steps": [{"weight": 50, "holdSeconds": 10}]}, "analysis": {"maxErrors": 10},
    });
    play.rollout = Rollout::new(&read(&play.document), 0);
    for version in ["v1", "v2"] {
        play.ready(version, 2);
    }
    play
}

#[test]
fn services_of_one_shift_move_together_and_go_back_together() {
    let mut play = moving_house();
    let both = |play: &Play| -> Vec<Vec<f64>> {
        let shift = read(&play.document);
        let parts = shift.services.iter().map(|service| play.rollout.parts(&shift, service, &play.world));
        parts.map(|parts| parts.iter().map(|part| percent(part.share)).collect()).collect()
    };
    let half = vec![50.0, 50.0];
    assert_eq!(both(play.pass(1)), [half.clone(), half.clone()]);
    // Missing endpoints of one service hold back the other one too.
    play.world.available.insert(("search".to_owned(), "v2".to_owned()), 0);
    let back = vec![100.0, 0.0];
    assert_eq!(both(play.pass(1)), [back.clone(), back.clone()]);
    assert_eq!(
        play.rollout.message,
        "step 1: v2 of search has 0 of 1 endpoints ready that 50 % of the load need; v1 has 100 %"
    );
    play.world.available.clear();
    assert_eq!(both(play.pass(1)), [half.clone(), half]);
    play.count("v2", 100, 6);
    assert_eq!(both(play.pass(1)), [back.clone(), back], "12 errors in both together");
    assert_eq!(play.stands(), (Phase::Failed, Reason::TooManyErrors));
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    /// The events of a rollout.
    #[derive(Debug, Clone)]
    enum Happening {
        Ready(usize, u32),
        Count(usize, u64, u64),
        AnalysisResult(bool, bool, bool),
        Behind(bool),
        Document(Option<usize>, usize),
        Strategy(serde_json::Value),
        Said(Command),
        Restart,
        Pass(u64),
    }

    fn version(i: usize) -> String {
        format!("v{}", i % 3 + 1)
    }

    fn happening() -> impl Strategy<Value = Happening> {
        let command = prop_oneof![
            any::<bool>().prop_map(|full| Command::Promote { full, override_gates: false }),
            Just(Command::Pause),
            Just(Command::Resume),
            Just(Command::Abort),
            (0usize..4).prop_map(|i| Command::Rollback { to: version(i), override_gates: false }),
            (0usize..4).prop_map(|i| Command::SetTarget { target: version(i) }),
            (0u32..110).prop_map(|weight| Command::SetWeight { weight, override_gates: false }),
        ];
        prop_oneof![
            3 => (0usize..3, 0u32..6).prop_map(|(v, ready)| Happening::Ready(v, ready)),
            2 => (0usize..3, 0u64..50, 0u64..8).prop_map(|(v, ok, error)| Happening::Count(v, ok, error)),
            2 => any::<(bool, bool, bool)>().prop_map(|(fails, passes, both)| Happening::AnalysisResult(fails, passes, both)),
            1 => any::<bool>().prop_map(Happening::Behind),
            1 => (prop::option::of(0usize..3), 0usize..3).prop_map(|(target, stable)| Happening::Document(target, stable)),
            1 => strategies().prop_map(Happening::Strategy),
            3 => command.prop_map(Happening::Said),
            1 => Just(Happening::Restart),
            4 => (0u64..40_000).prop_map(Happening::Pass),
        ]
    }

    fn strategies() -> impl Strategy<Value = serde_json::Value> {
        prop_oneof![
            Just(
                json!({"steps": [{"weight": 10, "holdSeconds": 5}, {"pause": true}, {"weight": 60, "holdSeconds": 5}]})
            ),
            Just(json!({"blueGreen": {"autoPromotionEnabled": false, "holdSeconds": 3}})),
            Just(json!({"steps": [{"weight": 30}], "warmUp": {"seconds": 9, "mirrorPercent": 5}, "maxUnavailable": 0})),
            Just(json!({"steps": [{"weight": 50}], "progressDeadlineSeconds": 9, "progressDeadlineAbort": true})),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        #[test]
        fn whatever_happens_nothing_is_dropped_overloaded_repeated_or_skipped(
            strategy in strategies(), happenings in prop::collection::vec(happening(), 1..60),
        ) {
            let mut play = Play::new("v1", None, json!([{"weight": 100}]));
            play.set("strategy", strategy);
            for happening in happenings {
                let before = play.rollout.clone();
                let mut said = false;
                let mut promised = None;
                match happening {
                    Happening::Ready(v, ready) => play.ready(&version(v), ready),
                    Happening::Count(v, ok, error) => play.count(&version(v), ok, error),
                    Happening::AnalysisResult(fails, passes, both_fail) => {
                        play.world.opinion = AnalysisResult { fails, passes, both_fail, ..AnalysisResult::default() };
                    }
                    Happening::Behind(behind) => play.world.behind = behind,
                    Happening::Document(target, stable) => {
                        play.set("target", json!(target.map(version)));
                        play.set("stable", json!(version(stable)));
                    }
                    Happening::Strategy(strategy) => {
                        promised = before.phase.is_under_way().then(|| before.goal(&read(&play.document)));
                        play.set("strategy", strategy);
                        said = true;
                    }
                    Happening::Said(command) => said = play.command(command).is_ok(),
                    Happening::Restart => {
                        let text = serde_json::to_string(&play.rollout).unwrap();
                        let news = play.rollout.take_news();
                        let stored: Rollout = serde_json::from_str(&text).unwrap();
                        prop_assert_eq!(&stored, &play.rollout);
                        play.rollout = stored;
                        play.rollout.news = news;
                    }
                    Happening::Pass(millis) => play.now += millis,
                }
                let shift = read(&play.document);
                play.rollout = play.rollout.clone().advance(&shift, &play.world, play.now);
                let (rollout, steps) = (&play.rollout, play.rollout.steps(&shift));
                // An edit of the steps alone does not increase the share.
                let is_edited = rollout.news.last().is_some_and(|news| news.reason == Reason::StepsChanged);
                if let Some(promised) = promised.filter(|_| is_edited && rollout.number == before.number) {
                    prop_assert!(rollout.wanted(&shift, &play.world) <= promised + 1e-9, "{:?}", rollout);
                }
                prop_assert!(rollout.number == before.number || rollout.number == before.number + 1);
                if rollout.number == before.number && rollout.phase.is_under_way() && !said {
                    prop_assert!(rollout.step == before.step || rollout.step == before.step + 1, "{:?}", rollout);
                }
                prop_assert!(!rollout.phase.is_under_way() || rollout.step < steps.len());
                // Only the last step completes a rollout.
                let is_over = rollout.phase == Phase::Succeeded && before.phase != Phase::Succeeded;
                prop_assert!(!is_over || (!before.paused && before.phase.is_under_way()) || said, "{:?}", before);
                // A paused rollout does not grow beyond the share at which it was paused.
                if rollout.frozen.is_some() && before.frozen == rollout.frozen && rollout.number == before.number {
                    prop_assert!(rollout.wanted(&shift, &play.world) <= allocation::share_of(before.frozen.unwrap()) + 1e-9);
                }
                prop_assert_eq!(rollout.phase.is_under_way(), rollout.current_step(&shift).is_some());
                prop_assert!(rollout.target.is_some() || !rollout.phase.is_under_way());
                prop_assert!(rollout.phase.is_under_way() || (rollout.testers(&shift).is_none() && rollout.mirror(&shift).is_none()));
                let service = &shift.services[0];
                let parts = rollout.parts(&shift, service, &play.world);
                let any_ready = (0..3).any(|v| play.world.ready(&service.name, &version(v)) > 0);
                let sum: f64 = parts.iter().map(|part| part.share).sum();
                prop_assert!((sum - f64::from(u8::from(any_ready))).abs() < 1e-6, "{:?}", parts);
                for part in &parts {
                    prop_assert!(part.share == 0.0 || play.world.ready(&service.name, &part.version) > 0);
                    prop_assert!(part.serving || part.weight == 0);
                }
            }
            let news = play.rollout.take_news();
            prop_assert!(news.windows(2).all(|pair| pair[0].time <= pair[1].time && pair[0].rollout <= pair[1].rollout));
        }
    }
}

#[test]
fn a_rollout_is_not_judged_by_what_the_counts_said_of_the_one_before() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 30}]));
    play.pass(1);
    play.world.opinion = AnalysisResult { fails: true, requests: 20, errors: 20, ..AnalysisResult::default() };
    assert_eq!(play.pass(1).rollout.phase, Phase::Failed);
    play.document["spec"]["target"] = json!("v3");
    // The first update starts the rollout, and only then is v3 judged.
    let shift = read(&play.document);
    play.rollout = play.rollout.clone().advance(&shift, &play.world, play.now + 100);
    assert_eq!((play.rollout.phase, play.rollout.reason), (Phase::Progressing, Reason::Started));
    play.world.opinion = AnalysisResult::default();
    assert_eq!(play.pass(1).rollout.phase, Phase::Progressing);
}

#[test]
fn after_a_restart_a_rollout_begins_once_it_is_known_what_ended_before() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 30}]));
    play.world.behind = true;
    assert_eq!(play.pass(1).rollout.number, 0);
    play.world.behind = false;
    assert_eq!((play.pass(1).rollout.number, play.rollout.phase), (1, Phase::Progressing));
    play.world.behind = true;
    play.document["spec"]["target"] = json!("v3");
    assert_eq!((play.pass(1).rollout.number, play.rollout.target.as_deref()), (1, Some("v2")));
    // Going back does not wait.
    play.document["spec"]["target"] = json!("v1");
    assert_eq!(play.pass(1).rollout.phase, Phase::Initialized);
}
