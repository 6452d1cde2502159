//! Documents that are edited during a rollout and after it.

use super::*;

/// At 25 % of six steps, with a hold of one hour.
fn at_a_quarter() -> Play {
    let hour = |weight| json!({"weight": weight, "holdSeconds": 3600});
    let steps = json!([{"weight": 1}, {"weight": 5}, {"weight": 10}, hour(25), hour(50), {"weight": 100}]);
    let mut play = Play::new("v1", Some("v2"), steps);
    assert_eq!(play.pass(5).shares(), [75.0, 25.0, 0.0]);
    play.news();
    play
}

#[test]
fn steps_that_are_gone_are_not_done() {
    let mut play = at_a_quarter();
    let hour = |weight| json!({"weight": weight, "holdSeconds": 3600});
    play.set("strategy", json!({"steps": [hour(30), hour(60), hour(100)]}));
    // Each step gives more than the current share: that requires a command, not an edit.
    assert_eq!(play.pass(300).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Paused, Reason::StepsChanged));
    let words = "step 1: the document's steps have changed; paused until it is promoted or resumed; v2 has 25 %";
    assert_eq!(play.rollout.message, words);
    let news = play.rollout.take_news();
    let changed = "step 1: the document's steps have changed; v2 stays at 25 % until it is promoted or resumed";
    assert_eq!((news[0].reason, news[0].message.as_str()), (Reason::StepsChanged, changed));
    assert_eq!(news.len(), 1, "{news:?}");
    // The hold of the step from which it continues starts again.
    play.command(PROMOTE).unwrap();
    assert_eq!(play.pass(3_590).shares(), [70.0, 30.0, 0.0]);
    assert_eq!(play.pass(20).rollout.step, 1);
}

#[test]
fn an_edit_moves_nobody_ahead_at_a_pause() {
    let pause = |weight| json!({"weight": weight, "pause": true});
    for (steps, next) in [
        (json!([pause(50), {"weight": 100}]), 50.0),
        (json!([{"weight": 50, "holdSeconds": 60}]), 50.0),
        (json!([{"weight": 100}]), 100.0),
        // The pause itself is removed.
        (json!([{"weight": 10, "holdSeconds": 60}, pause(40)]), 40.0),
        (json!([{"weight": 5}, {"weight": 10}, {"weight": 60, "holdSeconds": 60}]), 60.0),
    ] {
        for by in [PROMOTE, Command::Resume] {
            let mut play = Play::new("v1", Some("v2"), json!([pause(10), pause(40)]));
            assert_eq!(play.pass(5).stands(), (Phase::Paused, Reason::PauseStep));
            play.set("strategy", json!({"steps": steps}));
            assert_eq!(play.pass(90).shares(), [90.0, 10.0, 0.0], "{steps}");
            assert_eq!(play.stands(), (Phase::Paused, Reason::StepsChanged), "{steps}");
            // A second edit or a restart changes nothing.
            play.set("strategy", json!({"steps": [pause(10), pause(40)]}));
            play.pass(1).set("strategy", json!({"steps": steps}));
            let text = serde_json::to_string(&play.rollout).unwrap();
            play.rollout = serde_json::from_str(&text).unwrap();
            assert_eq!(play.pass(5).shares(), [90.0, 10.0, 0.0], "{steps}");
            play.command(by.clone()).unwrap();
            let mut seen: Vec<f64> = (0..130).map(|_| play.pass(1).shares()[1]).collect();
            seen.dedup();
            let seen: Vec<f64> = seen.into_iter().filter(|share| *share > 10.0).collect();
            assert_eq!(seen[0], next, "{steps} {by:?}");
        }
    }
    // A pause that still exists works as usual.
    let mut play = Play::new("v1", Some("v2"), json!([pause(10), pause(40)]));
    play.pass(5).set("strategy", json!({"steps": [pause(5), pause(10), pause(40)]}));
    assert_eq!(play.pass(5).stands(), (Phase::Paused, Reason::PauseStep));
    play.command(PROMOTE).unwrap();
    assert_eq!(play.pass(1).shares(), [60.0, 40.0, 0.0]);
}

#[test]
fn an_edit_moves_nobody_ahead_before_a_gate() {
    let steps = json!([{"weight": 10}, {"weight": 40, "holdSeconds": 60}]);
    let mut play = Play::new("v1", Some("v2"), steps);
    play.set("webhooks", json!([{"name": "gate", "type": "Gate", "url": "http://127.0.0.1:1/", "steps": [2]}]));
    assert_eq!(play.pass(5).stands(), (Phase::Waiting, Reason::GateClosed));
    play.set("strategy", json!({"steps": [{"weight": 50, "holdSeconds": 60}]}));
    assert_eq!(play.pass(60).shares(), [90.0, 10.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Paused, Reason::StepsChanged));
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(30).stands(), (Phase::Waiting, Reason::GateClosed), "still beyond the 10 % that it had");
    assert_eq!(play.shares(), [90.0, 10.0, 0.0]);
    play.rollout.gate_answered(0, true, "");
    assert_eq!(play.pass(30).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.pass(31).stands(), (Phase::Waiting, Reason::GateClosed), "the second step's gate");
}

#[test]
fn an_edit_moves_nobody_ahead_on_a_ramp_or_while_endpoints_are_missing() {
    let hour = |weight| json!({"weight": weight, "holdSeconds": 3600});
    let warm_up = json!({"seconds": 100});
    let strategy = |steps: &[serde_json::Value]| json!({"steps": steps, "warmUp": warm_up});
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("strategy", strategy(&[hour(30)]));
    let before = play.pass(20).shares()[1];
    assert!((15.0..25.0).contains(&before), "{before}");
    play.set("strategy", strategy(&[hour(60)]));
    assert_eq!(play.pass(60).shares()[1], before);
    play.command(Command::Resume).unwrap();
    let after = play.pass(10).shares()[1];
    assert!(after > before && after < before + 15.0, "the ramp goes on: {before} {after}");
    // The share that it was moving to, or a smaller one, is not an increase.
    play.set("strategy", strategy(&[hour(55)]));
    assert_eq!(play.pass(60).shares()[1], 55.0);
    // The same holds if endpoints are missing; a larger share is an increase.
    for (weight, shares) in [(20, [80.0, 20.0, 0.0]), (60, [100.0, 0.0, 0.0])] {
        let mut play = Play::new("v1", Some("v2"), json!([hour(25)]));
        play.ready("v2", 0);
        play.pass(5).set("strategy", json!({"steps": [hour(weight)]}));
        play.pass(5).ready("v2", 4);
        assert_eq!(play.pass(5).shares(), shares);
    }
}

#[test]
fn an_edit_moves_nobody_ahead_of_a_weight_by_hand() {
    for (by, next) in [(PROMOTE, 50.0), (Command::Resume, 50.0)] {
        let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 600}]));
        play.pass(1).command(Command::SetWeight { weight: 30, override_gates: false }).unwrap();
        play.set("webhooks", json!([{"name": "gate", "type": "Gate", "url": "http://127.0.0.1:1/", "steps": [1]}]));
        play.set("strategy", json!({"steps": [{"weight": 50, "holdSeconds": 600}]}));
        assert_eq!(play.pass(60).shares(), [70.0, 30.0, 0.0]);
        assert_eq!(play.stands(), (Phase::Paused, Reason::WeightSet));
        play.rollout.gate_answered(0, true, "");
        play.pass(1).command(by).unwrap();
        play.rollout.gate_answered(0, true, "");
        assert_eq!(play.pass(1).shares()[1], next);
    }
    // The edit does not pass a gate that has not answered.
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 600}]));
    play.pass(1).command(Command::SetWeight { weight: 30, override_gates: false }).unwrap();
    play.set("webhooks", json!([{"name": "gate", "type": "Gate", "url": "http://127.0.0.1:1/", "steps": [1]}]));
    play.set("strategy", json!({"steps": [{"weight": 50, "holdSeconds": 600}]}));
    play.pass(1).command(Command::Resume).unwrap();
    assert_eq!(play.pass(60).stands(), (Phase::Waiting, Reason::GateClosed));
    assert_eq!(play.shares(), [70.0, 30.0, 0.0]);
}

#[test]
fn an_edit_moves_nobody_ahead_of_a_preview() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    let preview = json!([{"headers": [{"name": "x-beta", "value": "1"}]}]);
    let blue_green = |auto| json!({"blueGreen": {"autoPromotionEnabled": auto, "autoPromotionSeconds": 600, "previewMatches": preview}});
    for strategy in [json!({}), json!({"steps": [{"weight": 10, "holdSeconds": 60}]}), blue_green(true)] {
        play.set("strategy", blue_green(false));
        play.rollout = Rollout::new(&read(&play.document), play.now);
        assert_eq!(play.pass(601).stands(), (Phase::Paused, Reason::PauseStep));
        play.set("strategy", strategy.clone());
        assert_eq!(play.pass(700).shares(), [100.0, 0.0, 0.0], "{strategy}");
        assert_eq!(play.stands(), (Phase::Paused, Reason::StepsChanged), "{strategy}");
    }
    // Steps that become a blue/green switch at once.
    let mut play = at_a_quarter();
    play.set("strategy", json!({"blueGreen": {}}));
    assert_eq!(play.pass(60).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Paused, Reason::StepsChanged));
    play.command(PROMOTE).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
    // A blue/green switch that waits for endpoints gets no partial share.
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("strategy", json!({"blueGreen": {"holdSeconds": 60}}));
    play.pass(1).ready("v2", 3);
    play.pass(1).ready("v1", 4);
    play.set("strategy", json!({"blueGreen": {"autoPromotionEnabled": false, "holdSeconds": 60}}));
    play.rollout = Rollout::new(&read(&play.document), play.now);
    play.ready("v2", 4);
    assert_eq!(play.pass(5).stands(), (Phase::Paused, Reason::PauseStep));
    play.ready("v2", 3);
    play.command(PROMOTE).unwrap();
    assert_eq!(play.pass(5).stands(), (Phase::Progressing, Reason::WaitingForCapacity));
    play.set("strategy", json!({"steps": [{"weight": 50, "holdSeconds": 60}]}));
    assert_eq!(play.pass(60).shares(), [100.0, 0.0, 0.0]);
}

#[test]
fn steps_that_change_within_their_number_are_heeded_and_told() {
    let mut play =
        Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}, {"weight": 50}, {"weight": 100}]));
    play.pass(50).news();
    let held = |weight| json!({"weight": weight, "holdSeconds": 60});
    play.set("strategy", json!({"steps": [held(90), held(95), {"weight": 100}]}));
    assert_eq!(play.pass(30).shares(), [90.0, 10.0, 0.0], "it stays");
    assert_eq!(play.news()[0], (Phase::Paused, Reason::StepsChanged, Some(1)));
    play.command(Command::Resume).unwrap();
    assert_eq!(play.pass(30).shares(), [10.0, 90.0, 0.0], "held anew");
    assert_eq!(play.pass(40).shares(), [5.0, 95.0, 0.0]);
    play.news();
    // No increase: it gets a share that it has not had by completing steps, not by an edit.
    play.set("strategy", json!({"steps": [{"weight": 5}, {"weight": 10}, held(50)]}));
    assert_eq!(play.pass(30).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.news()[0], (Phase::Progressing, Reason::StepsChanged, Some(3)));
    // Only the current step is lowered.
    play.set("strategy", json!({"steps": [{"weight": 5}, {"weight": 10}, held(20)]}));
    assert_eq!(play.pass(50).shares(), [80.0, 20.0, 0.0], "held anew");
}

#[test]
fn later_steps_that_change_do_not_touch_the_present_one() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}, {"weight": 50}]));
    play.pass(50).news();
    play.set("strategy", json!({"steps": [{"weight": 10, "holdSeconds": 60}, {"weight": 20, "holdSeconds": 60}]}));
    assert_eq!(
        play.pass(9).news(),
        [(Phase::Progressing, Reason::StepsChanged, Some(1)), (Phase::Progressing, Reason::Holding, Some(1))]
    );
    assert_eq!(play.pass(2).shares(), [80.0, 20.0, 0.0], "its hold has gone on");
}

#[test]
fn a_rollout_that_is_paused_stays_paused_whatever_its_steps_become() {
    for strategy in [json!({"steps": [{"weight": 100}]}), json!({"blueGreen": {"autoPromotionEnabled": false}})] {
        let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 60}]));
        play.pass(1).command(Command::Pause).unwrap();
        play.set("strategy", strategy);
        assert_eq!(play.pass(3_600).rollout.phase, Phase::Paused);
        assert!(play.shares()[1] <= 50.0, "{:?}", play.shares());
    }
}

#[test]
fn a_way_that_becomes_blue_green_waits_for_its_promotion() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 60}]));
    play.pass(1);
    play.set("strategy", json!({"blueGreen": {"autoPromotionEnabled": false}}));
    assert_eq!(play.pass(3_600).stands(), (Phase::Paused, Reason::PauseStep));
    assert_eq!(play.shares(), [100.0, 0.0, 0.0], "half of it is nothing there");
}

#[test]
fn steps_edited_while_no_controller_was_there_are_as_those_edited_while_one_was() {
    let mut play = at_a_quarter();
    let text = serde_json::to_string(&play.rollout).unwrap();
    play.set("strategy", json!({"steps": [{"weight": 100, "holdSeconds": 60}]}));
    play.rollout = serde_json::from_str(&text).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Paused, Reason::StepsChanged));
    assert_eq!(play.news()[0], (Phase::Paused, Reason::StepsChanged, Some(1)));
}

/// A rollout at its second step as persisted by builds without the later fields.
const OF_AN_OLDER_BUILD: &str = r#"{"number": 1, "phase": "Progressing", "reason": "Holding",
    "message": "step 2: v2 has 25 %", "since": 1000, "started": 1000, "stable": "v1", "target": "v2", "leaving": null,
    "step": 1, "allowed": true, "heldSince": 2000, "paused": false, "weightByHand": null, "isReturn": false,
    "gateSays": null, "endpointsForFullLoad": {"checkout": 4}, "takenBack": 0, "waived": false, "progressed": 1000,
    "mostReady": 4, "warming": "Over", "level": 0, "levelSince": 1000,
    "countedBefore": {}, "said": {"stable": "v1", "target": "v2"},
    "shunned": false}"#;

#[test]
fn a_state_of_an_older_build_goes_on_where_it_was() {
    let steps = json!([{"weight": 10}, {"weight": 25, "holdSeconds": 60}, {"weight": 50, "holdSeconds": 60}]);
    let mut play = Play::new("v1", Some("v2"), steps);
    play.rollout = serde_json::from_str(OF_AN_OLDER_BUILD).unwrap();
    assert_eq!(play.shares(), [75.0, 25.0, 0.0]);
    play.now = 2_000;
    assert_eq!(play.pass(59).shares(), [75.0, 25.0, 0.0]);
    assert_eq!(play.news(), []);
    assert_eq!(play.pass(2).shares(), [50.0, 50.0, 0.0]);
    // While it waits for a gate, it keeps its share.
    let waits = OF_AN_OLDER_BUILD.replace("\"allowed\": true", "\"allowed\": false");
    play.rollout = serde_json::from_str(&waits).unwrap();
    assert_eq!(play.shares(), [90.0, 10.0, 0.0]);
}

#[test]
fn another_stable_version_in_the_middle_is_told() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 60}]));
    play.pass(1).news();
    play.set("stable", json!("v3"));
    assert_eq!(play.pass(1).shares(), [0.0, 50.0, 50.0]);
    let news = play.rollout.take_news();
    let words = "step 1: v3 is the stable version instead of v1, as the document says";
    assert_eq!((news[0].reason, news[0].message.as_str()), (Reason::StableChanged, words));
}

#[test]
fn what_the_document_says_is_heeded_again_when_a_version_set_by_hand_is_gone() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 60}]));
    play.pass(1).command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    play.pass(130);
    assert_eq!((play.stands(), play.rollout.stable.as_str()), ((Phase::Succeeded, Reason::Completed), "v3"));
    play.news();
    play.document["spec"]["versions"].as_array_mut().unwrap().pop();
    play.pass(1);
    assert_eq!((play.stands(), play.rollout.target.as_deref()), ((Phase::Progressing, Reason::Holding), Some("v2")));
    let news = play.rollout.take_news();
    assert_eq!(news[0].message, "v1 serves instead of v3, which is gone from the document");
    assert_eq!(news[1].message, "moving from v1 to v2");
}

#[test]
fn a_withdrawn_target_is_named() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 60}]));
    play.pass(1).set("target", json!(null));
    assert_eq!(play.pass(1).rollout.message, "v2 is no longer the target; v1 serves");
}

#[test]
fn fewer_endpoints_listed_at_rest_are_what_the_load_needs() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.pass(2).news();
    play.document["spec"]["versions"][1]["endpoints"] = json!(["127.0.0.1:1", "127.0.0.1:2"]);
    play.ready("v2", 2);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    assert_eq!(play.rollout.message, "v2 serves everything");
    assert_eq!(play.news(), []);
    // An endpoint that is listed and not ready counts as missing, as usual.
    play.ready("v2", 1);
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    // If a workload provides the endpoints, the number of pods does not define how many carry the load.
    play.document["spec"]["versions"][1]["workloadRef"] = json!({"name": "checkout-v2"});
    play.pass(1);
    play.document["spec"]["versions"][1]["endpoints"] = json!(["127.0.0.1:1"]);
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
}

#[test]
fn a_service_that_is_added_in_the_middle_has_the_cap_of_its_own_endpoints() {
    let mut play = moving_house();
    let four: Vec<String> = (1..5).map(|port| format!("127.0.0.1:{port}")).collect();
    play.document["spec"]["strategy"] = json!({"steps": [{"weight": 50, "holdSeconds": 600}]});
    assert_eq!(play.pass(1).shares(), [50.0, 50.0]);
    let mut added = play.document["spec"]["services"][0].clone();
    added["name"] = json!("pay");
    added["hostnames"] = json!(["pay.example.com"]);
    added["versions"] = json!([{"name": "v1", "endpoints": four}, {"name": "v2", "endpoints": four}]);
    play.document["spec"]["services"].as_array_mut().unwrap().push(added);
    play.world.ready.insert("v1".to_owned(), 4);
    play.world.available.insert(("pay".to_owned(), "v2".to_owned()), 1);
    assert_eq!(play.pass(1).shares(), [75.0, 25.0]);
    assert!(
        play.rollout.message.starts_with("step 1: v2 of pay has 1 of 2 endpoints ready"),
        "{}",
        play.rollout.message
    );
}
