//! Documents that are edited while a rollout is under way, and after it.

use super::*;

/// At 25 % of six steps, where it is held for an hour.
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
    assert_eq!(play.pass(60).shares(), [70.0, 30.0, 0.0]);
    assert_eq!(play.stands(), (Phase::Progressing, Reason::Holding));
    let news = play.rollout.take_news();
    let changed = "step 1: the document's steps have changed; v2, which has 25 %, goes on at step 1 of 3";
    assert_eq!((news[0].reason, news[0].message.as_str()), (Reason::StepsChanged, changed));
    assert_eq!(news.len(), 2, "{news:?}");
    // The step that it goes on from is held from its beginning.
    assert_eq!(play.pass(3_530).rollout.step, 0);
    assert_eq!(play.pass(30).rollout.step, 1);
}

#[test]
fn steps_that_change_within_their_number_are_heeded_and_told() {
    let mut play =
        Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}, {"weight": 50}, {"weight": 100}]));
    play.pass(50).news();
    let held = |weight| json!({"weight": weight, "holdSeconds": 60});
    play.set("strategy", json!({"steps": [held(90), held(95), {"weight": 100}]}));
    assert_eq!(play.pass(30).shares(), [10.0, 90.0, 0.0], "held anew");
    assert_eq!(play.news()[0], (Phase::Progressing, Reason::StepsChanged, Some(1)));
    assert_eq!(play.pass(40).shares(), [5.0, 95.0, 0.0]);
    play.news();
    // No step ahead: what it has not had yet it gets for what it does, not for an edit.
    play.set("strategy", json!({"steps": [{"weight": 5}, {"weight": 10}, held(50)]}));
    assert_eq!(play.pass(30).shares(), [50.0, 50.0, 0.0]);
    assert_eq!(play.news()[0], (Phase::Progressing, Reason::StepsChanged, Some(3)));
    // The present step lowered, and nothing else.
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
        assert_eq!(play.pass(3_600).stands(), (Phase::Paused, Reason::PausedByUser));
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
    assert_eq!(play.pass(1).stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.news()[0], (Phase::Progressing, Reason::StepsChanged, Some(1)));
}

/// A rollout at its second step as builds kept it that knew nothing of what has been added since.
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
    // Waiting for a gate it keeps what it has.
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
    // One that is listed and not ready is missing as ever.
    play.ready("v2", 1);
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
    // Where a workload brings them, pods that come and go say nothing of what the load needs.
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
