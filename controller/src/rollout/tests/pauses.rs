//! Commands: pausing and what stops then, shares set by users, and how they are reported.

use super::*;

#[test]
fn a_ramp_stands_still_while_it_is_paused() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100, "holdSeconds": 600}]));
    let warm_up = json!({"seconds": 30, "mirrorPercent": 5});
    play.set("strategy", json!({"steps": [{"weight": 100, "holdSeconds": 600}], "warmUp": warm_up}));
    let mirrored = |play: &Play| play.rollout.mirror(&read(&play.document)).is_some();
    assert!(mirrored(play.pass(20)));
    play.command(Command::Pause).unwrap();
    assert_eq!((play.pass(600).shares(), mirrored(&play)), (vec![100.0, 0.0, 0.0], false));
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(9).stands(), (Phase::Progressing, Reason::WarmingUp), "10 s were left");
    let before = play.pass(10).shares()[1];
    assert!(before > 10.0 && before < 40.0, "{before}");
    play.command(Command::Pause).unwrap();
    assert_eq!(play.pass(600).shares()[1], before);
    play.command(Command::Resume).unwrap();
    let after = play.pass(3).shares()[1];
    assert!(after > before && after < before + 15.0, "{before} {after}");
}

#[test]
fn a_paused_rollout_does_not_grow_with_its_endpoints() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100, "holdSeconds": 600}]));
    play.ready("v2", 1);
    play.pass(1).command(Command::Pause).unwrap();
    play.ready("v2", 4);
    assert_eq!(play.pass(600).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.rollout.message, "step 1: paused by hand; v2 has 25 %");
    play.ready("v2", 0);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    play.ready("v2", 4);
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    // A share that a user sets during a pause applies.
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 600}]));
    play.pass(1).command(Command::Pause).unwrap();
    play.command(Command::SetWeight { weight: 30, override_gates: false }).unwrap();
    assert_eq!(play.pass(1).shares(), [70.0, 30.0, 0.0]);
}

#[test]
fn a_pause_before_a_gate_is_said_to_be_one() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 600}]));
    play.set("webhooks", json!([{"name": "gate", "type": "Gate", "url": "http://127.0.0.1:1/"}]));
    assert_eq!(play.pass(1).stands(), (Phase::Waiting, Reason::GateClosed));
    play.command(Command::Pause).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Paused, Reason::PausedByUser));
    assert!(play.rollout.message.contains("paused by hand"), "{}", play.rollout.message);
    play.rollout.gate_answered(0, true, "");
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0], "it stays as it is");
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(1).shares(), [90.0, 10.0, 0.0]);
}

#[test]
fn promoting_after_a_weight_by_hand_is_no_step_back() {
    let steps = json!([{"weight": 10, "holdSeconds": 600}, {"weight": 50, "holdSeconds": 600},
        {"weight": 90, "holdSeconds": 600}]);
    for (weight, next) in [(80, 90.0), (50, 90.0), (5, 50.0), (95, 100.0)] {
        let mut play = Play::new("v1", Some("v2"), steps.clone());
        play.pass(1).command(Command::SetWeight { weight, override_gates: false }).unwrap();
        play.world.opinion.passes = false;
        play.pass(1).command(PROMOTE).unwrap();
        assert_eq!(play.pass(1).shares()[1], next, "from {weight}");
    }
}

#[test]
fn every_step_and_every_command_is_told() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 1}, {"weight": 5}, {"weight": 25}, {"weight": 50}]));
    play.pass(2);
    let steps: Vec<_> = play.news().into_iter().map(|(_, _, step)| step).collect();
    assert_eq!(steps, [Some(1), Some(2), Some(3), Some(4), Some(5), None]);
    play.command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    play.news();
    for weight in [60, 80] {
        play.command(Command::SetWeight { weight, override_gates: false }).unwrap();
        let told = play.rollout.take_news();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0].message, format!("v3 is to get {weight} % by hand"));
    }
}
