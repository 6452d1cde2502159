//! Rollouts played through, in no time at all.

use super::*;
use serde_json::json;
use std::collections::BTreeMap;
use tideshift_core::guard::GuardPolicy;

/// A world that tests set.
#[derive(Default)]
struct World {
    ready: BTreeMap<String, u32>,
    counts: BTreeMap<String, Counts>,
    vetoes: Vec<Veto>,
    behind: bool,
}

impl Observed for World {
    fn ready(&self, version: &str) -> u32 {
        self.ready.get(version).copied().unwrap_or_default()
    }

    fn counts(&self, version: &str) -> Counts {
        self.counts.get(version).copied().unwrap_or_default()
    }

    fn vetoes(&self, version: &str) -> impl Iterator<Item = &Veto> {
        self.vetoes.iter().filter(move |veto| veto.version == version)
    }

    fn is_up_to_date(&self) -> bool {
        !self.behind
    }
}

/// A service with four endpoints for each of v1, v2 and v3, in a world where all are ready.
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
            },
        });
        let mut play = Self { world: World::default(), rollout: Rollout::new(&read(&document), 0), document, now: 0 };
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

    /// Lets time pass, a tenth of a second for each look.
    fn pass(&mut self, seconds: u64) -> &mut Self {
        let shift = read(&self.document);
        for _ in 0..seconds * 10 {
            self.now += 100;
            self.rollout = self.rollout.clone().advance(&shift, &self.world, self.now);
        }
        self
    }

    /// The shares in percent, and which versions can be reached at all.
    fn shares(&self) -> Vec<f64> {
        let parts = self.rollout.parts(&read(&self.document), &self.world);
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
    assert_eq!(play.pass(3_600).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.rollout.message, "step 1: v2 has 0 of 2 endpoints ready that 30 % of the load need");
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

/// A guard's veto on v2 that began at a time, in milliseconds.
fn veto(at: u64, strikes: u32) -> Veto {
    let until = at * 1_000_000 + GuardPolicy::default().cool_down_for(strikes);
    Veto { version: "v2".to_owned(), until, strikes, requests: 9, errors: 9, others_requests: 81, others_errors: 0 }
}

#[test]
fn a_guards_veto_takes_the_target_back() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}]));
    assert_eq!(play.pass(1).shares(), [90.0, 10.0, 0.0]);
    play.world.vetoes = vec![veto(play.now, 2)];
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    assert_eq!(
        (play.rollout.phase, play.rollout.taken_back, play.rollout.message.as_str()),
        (
            Phase::Failed,
            1,
            "v2: a proxy's guard stopped it: 9 of 9 requests failed there, of the others' 0 of 81; back to v1 all at once"
        )
    );
    // Tried again while that veto still lasts: it speaks of the first attempt.
    play.set("target", json!(null));
    play.pass(1);
    play.set("target", json!("v2"));
    assert_eq!(play.pass(2).shares(), [90.0, 10.0, 0.0]);
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
    // The document catches up with what is so: nothing moves.
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
