//! Waiting for endpoints: what counts towards the deadline, and which steps need some.

use super::*;

#[test]
fn a_target_that_comes_and_goes_meets_its_deadline() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 5}]));
    let steps = json!([{"weight": 25, "holdSeconds": 5}]);
    play.set("strategy", json!({"steps": steps, "progressDeadlineSeconds": 12, "progressDeadlineAbort": true}));
    let mut seconds = 0;
    while play.rollout.phase.is_under_way() || seconds == 0 {
        play.ready("v2", if seconds % 4 < 2 { 1 } else { 0 });
        play.pass(1);
        seconds += 1;
        assert!(seconds < 60, "{:?}", play.rollout);
    }
    assert_eq!(play.stands(), (Phase::Failed, Reason::ProgressDeadlineExceeded));
    assert!((22..=28).contains(&seconds), "12 s of waiting took {seconds} s");
    let words = "v2 has 0 of 1 endpoints ready that 25 % of the load need; no progress for 12 s; back to v1 as far as \
                 it can carry the load";
    assert_eq!(play.rollout.message, words);
}

#[test]
fn time_in_which_it_is_held_does_not_count() {
    let steps = json!([{"weight": 25, "holdSeconds": 600}]);
    let mut play = Play::new("v1", Some("v2"), steps.clone());
    play.set("strategy", json!({"steps": steps, "progressDeadlineSeconds": 60}));
    play.pass(300).ready("v2", 0);
    assert_eq!(play.pass(50).rollout.reason, Reason::EndpointsLost);
    let deadline = play.rollout.deadline(&read(&play.document)).unwrap();
    assert!((359_000..=361_000).contains(&deadline), "{deadline}");
    assert_eq!(play.pass(12).rollout.reason, Reason::ProgressDeadlineExceeded);
    play.ready("v2", 1);
    assert_eq!(play.pass(300).stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.rollout.deadline(&read(&play.document)), None);
}

#[test]
fn what_has_never_served_is_waited_for_and_not_lost() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 25, "holdSeconds": 5}]));
    for version in ["v1", "v2", "v3"] {
        play.ready(version, 0);
    }
    assert_eq!(play.pass(1).stands(), (Phase::Progressing, Reason::WaitingForCapacity));
    for version in ["v1", "v2"] {
        play.ready(version, 4);
    }
    assert_eq!(play.pass(1).stands(), (Phase::Progressing, Reason::Holding));
    assert!(play.news().iter().all(|(_, reason, _)| *reason != Reason::EndpointsLost));
}

#[test]
fn a_hold_of_no_time_is_progress_once() {
    let steps = json!([{"weight": 25, "pause": true}]);
    let mut play = Play::new("v1", Some("v2"), steps.clone());
    play.set("strategy", json!({"steps": steps, "progressDeadlineSeconds": 12, "progressDeadlineAbort": true}));
    for _ in 0..8 {
        play.pass(2).ready("v2", 0);
        play.pass(2).ready("v2", 1);
    }
    assert_eq!(play.stands(), (Phase::Failed, Reason::ProgressDeadlineExceeded));
}

#[test]
fn testers_are_waited_for_until_somebody_can_answer_them() {
    let steps = json!([{"matches": [{"headers": [{"name": "x-beta", "value": "1"}]}], "holdSeconds": 10},
        {"weight": 50, "holdSeconds": 600}]);
    let mut play = Play::new("v1", Some("v2"), steps.clone());
    play.ready("v2", 0);
    assert_eq!(play.pass(60).stands(), (Phase::Progressing, Reason::WaitingForCapacity));
    assert_eq!(play.rollout.message, "step 1: v2 has 0 of 1 endpoints ready that testers need");
    play.ready("v2", 2);
    assert_eq!(play.pass(9).stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.pass(2).rollout.step, 1);
    // If testers have no endpoint for too long, the rollout fails, if the document says so.
    let mut play = Play::new("v1", Some("v2"), steps.clone());
    play.set("strategy", json!({"steps": steps, "progressDeadlineSeconds": 30, "progressDeadlineAbort": true}));
    play.ready("v2", 0);
    assert_eq!(play.pass(32).stands(), (Phase::Failed, Reason::ProgressDeadlineExceeded));
}

#[test]
fn a_preview_is_held_while_there_is_all_of_it() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("strategy", json!({"blueGreen": {"autoPromotionSeconds": 10}}));
    play.ready("v2", 3);
    assert_eq!(play.pass(60).stands(), (Phase::Progressing, Reason::WaitingForCapacity));
    assert_eq!(play.rollout.message, "step 1: v2 has 3 of 4 endpoints ready that the load needs");
    play.ready("v2", 4);
    assert_eq!(play.pass(9).stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.shares(), [100.0, 0.0, 0.0]);
    assert_eq!(play.pass(3).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn what_remains_of_a_warm_up_remains_while_no_controller_is_there() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    let steps = json!([{"weight": 100, "holdSeconds": 60}]);
    play.set("strategy", json!({"steps": steps, "warmUp": {"seconds": 30, "mirrorPercent": 5}}));
    let absent = |play: &mut Play| {
        play.now += 3_600_000;
        play.rollout.was_unattended(3_600_000, 0);
    };
    play.pass(20);
    absent(&mut play);
    assert_eq!(play.pass(9).rollout.message, "step 1: v2 gets copies of requests for 2 s more");
    assert_eq!(play.pass(2).rollout.reason, Reason::Ramping);
    let before = play.pass(10).shares()[1];
    absent(&mut play);
    let after = play.pass(2).shares()[1];
    assert!(after > before && after < before + 11.0, "{before} {after}");
    play.pass(30).rollout.since = 7_000_000;
    let (held, attended) = (play.rollout.held_since.unwrap(), play.rollout.attended_since());
    // Setting the system clock renumbers the same moments; no time has passed.
    play.rollout.was_unattended(5_000, 3_000);
    assert_eq!((play.rollout.held_since, play.rollout.since), (Some(held + 5_000), 7_003_000));
    assert_eq!(play.rollout.attended_since(), attended + 5_000);
}
