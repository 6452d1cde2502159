//! Lost endpoints: which versions take over, and how that is reported.

use super::*;

impl Play {
    /// The last transition; fails if there has been none since the last call.
    fn last_news(&mut self) -> (Phase, Reason, String) {
        let last = self.rollout.take_news().pop().expect("a transition");
        (last.phase, last.reason, last.message)
    }
}

fn held(steps: serde_json::Value) -> Play {
    let mut play = Play::new("v1", Some("v2"), steps);
    play.pass(2).news();
    play
}

#[test]
fn endpoints_that_vanish_one_by_one_are_told_when_the_first_and_when_the_last_is_missed() {
    let mut play = held(json!([{"weight": 50, "holdSeconds": 600}]));
    let mut told = Vec::new();
    for ready in [3, 2, 1, 0, 1, 2, 4] {
        play.ready("v1", ready);
        play.pass(1);
        told.extend(play.rollout.take_news().into_iter().map(|news| (ready, news.reason, news.message)));
    }
    let lost = |ready: u32, words: &str| {
        let lacks = format!("step 1: v1 has {ready} of 2 endpoints ready that 50 % of the load need");
        (ready, Reason::EndpointsLost, format!("{lacks}; {words}"))
    };
    let back = "step 1: v2 has 50 %; each version can carry its share again".to_owned();
    assert_eq!(
        told,
        [
            lost(1, "v1 has 25 %, v2 75 %"),
            lost(0, "v2 has 100 %"),
            lost(1, "v1 has 25 %, v2 75 %"),
            (2, Reason::EndpointsBack, back)
        ]
    );
    assert_eq!(play.stands(), (Phase::Progressing, Reason::Holding));
}

#[test]
fn what_is_lost_while_it_waits_for_somebody_is_told() {
    let paused = json!([{"weight": 25, "pause": true}]);
    let mut play = held(paused);
    play.ready("v1", 0);
    play.pass(1);
    let words = "step 1: v1 has 0 of 3 endpoints ready that 75 % of the load need; v2 has 100 %";
    let told = format!("{words}; paused until it is promoted");
    assert_eq!(play.rollout.message, told);
    assert_eq!(play.stands(), (Phase::Paused, Reason::PauseStep));
    assert_eq!(play.last_news(), (Phase::Paused, Reason::EndpointsLost, told));
    play.ready("v1", 4);
    play.pass(1);
    let told = "step 1: v2 has 25 %; paused until it is promoted; each version can carry its share again";
    assert_eq!(play.last_news(), (Phase::Paused, Reason::EndpointsBack, told.to_owned()));

    let mut play = held(json!([{"weight": 25}]));
    play.rollout = Play::new("v1", None, json!([{"weight": 1}])).rollout;
    play.world.opinion = AnalysisResult { words: "v2: 0 of 3 failed".to_owned(), ..AnalysisResult::default() };
    play.pass(2).news();
    play.ready("v1", 0);
    play.pass(1);
    let told = "step 1: v2: 0 of 3 failed; v1 has 0 of 3 endpoints ready that 75 % of the load need; v2 has 100 %";
    assert_eq!((play.rollout.reason, play.rollout.message.as_str()), (Reason::Undecided, told));
    assert_eq!(play.last_news(), (Phase::Progressing, Reason::EndpointsLost, told.to_owned()));

    let mut play = held(json!([{"weight": 10, "holdSeconds": 600}]));
    play.command(Command::Pause).unwrap();
    play.pass(1).news();
    play.ready("v2", 0);
    play.pass(1);
    let told = "step 1: paused by hand; v2 has 0 of 1 endpoints ready that 10 % of the load need; v1 has 100 %";
    assert_eq!(play.rollout.message, told);
    assert_eq!(play.last_news(), (Phase::Paused, Reason::EndpointsLost, told.to_owned()));
    play.ready("v2", 1);
    play.command(Command::SetWeight { weight: 80, override_gates: false }).unwrap();
    play.pass(1);
    let told = "step 1: paused by hand; v2 has 25 % of the 80 % wanted: v2 has 1 of 4 endpoints ready that 80 % of \
                the load need";
    assert_eq!(play.rollout.message, told);
}

#[test]
fn what_is_lost_at_rest_is_told_with_who_serves_instead() {
    let mut play = held(json!([{"weight": 100}]));
    play.ready("v2", 3);
    play.pass(1);
    let told = "v2 has 3 of 4 endpoints ready that the load needs; v1 has 25 %, v2 75 %";
    assert_eq!(play.rollout.message, told);
    assert_eq!(play.last_news(), (Phase::Succeeded, Reason::EndpointsLost, told.to_owned()));
    play.ready("v2", 0);
    play.pass(1);
    let told = "v2 has 0 of 4 endpoints ready that the load needs; v1 has 100 %";
    assert_eq!(play.last_news(), (Phase::Succeeded, Reason::EndpointsLost, told.to_owned()));
    play.ready("v2", 4);
    play.pass(1);
    let told = "v2 serves everything; each version can carry its share again";
    assert_eq!(play.last_news(), (Phase::Succeeded, Reason::EndpointsBack, told.to_owned()));
    for version in ["v1", "v2", "v3"] {
        play.ready(version, 0);
    }
    play.pass(1);
    let told = "v2 has 0 of 4 endpoints ready that the load needs; no version has a ready endpoint";
    assert_eq!(play.last_news(), (Phase::Succeeded, Reason::EndpointsLost, told.to_owned()));
}

#[test]
fn what_nobody_takes_over_is_said_and_no_news() {
    let mut play = Play::new("v1", None, json!([{"weight": 100}]));
    for version in ["v1", "v2", "v3"] {
        play.ready(version, 0);
    }
    play.pass(1).ready("v1", 3);
    assert_eq!(play.pass(1).rollout.message, "v1 has 3 of 4 endpoints ready that the load needs");
    assert_eq!((play.shares(), play.news()), (vec![100.0, 0.0, 0.0], vec![]), "neither when it begins");
}

#[test]
fn whoever_really_serves_is_named() {
    let mut play = held(json!([{"weight": 10, "holdSeconds": 600}]));
    play.ready("v1", 0);
    play.ready("v2", 0);
    let told = "step 1: v2 has 0 of 1 endpoints ready that 10 % of the load need; v1 has 0 of 4 endpoints ready that \
                90 % of the load need; v3 has 100 %";
    assert_eq!(play.pass(1).rollout.message, told);
}

#[test]
fn each_service_of_several_is_named_where_they_differ() {
    let mut play = moving_house();
    play.document["spec"]["strategy"] = json!({"steps": [{"weight": 50, "holdSeconds": 600}]});
    play.pass(1).news();
    play.world.unready.insert(("search".to_owned(), "v1".to_owned()));
    let told = "step 1: v1 of search has 0 of 1 endpoints ready that 50 % of the load need; search: v2 has 100 %";
    assert_eq!(play.pass(1).rollout.message, told);
    assert_eq!(play.last_news(), (Phase::Progressing, Reason::EndpointsLost, told.to_owned()));
}

#[test]
fn a_superseded_version_goes_on_carrying_what_the_stable_one_cannot() {
    let mut play = held(json!([{"weight": 1}, {"weight": 75, "holdSeconds": 600}]));
    play.pass(1).ready("v1", 1);
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0]);
    for (said, shares) in
        [(Command::SetTarget { target: "v3".to_owned() }, [25.0, 74.0, 1.0]), (Command::Abort, [25.0, 75.0, 0.0])]
    {
        play.world.opinion.passes = false;
        play.command(said).unwrap();
        assert_eq!(play.pass(1).shares(), shares);
    }
    // The untried v3 does not take over either when it is withdrawn.
    play.command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    play.pass(1).command(Command::SetTarget { target: "v1".to_owned() }).unwrap();
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0]);
}

#[test]
fn what_helps_at_rest_helps_when_the_next_rollout_begins() {
    let mut play = held(json!([{"weight": 1, "holdSeconds": 600}]));
    play.command(Command::Promote { full: true, override_gates: false }).unwrap();
    play.pass(2).ready("v2", 3);
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0]);
    play.command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    assert_eq!(play.pass(1).shares(), [24.0, 75.0, 1.0]);
}

#[test]
fn back_is_at_once_and_whole_however_young_the_stable_versions_endpoints_are() {
    let mut play = held(json!([{"weight": 50, "holdSeconds": 600}]));
    play.set("strategy", json!({"steps": [{"weight": 50, "holdSeconds": 600}], "minReadySeconds": 30}));
    play.world.available.insert(("checkout".to_owned(), "v1".to_owned()), 0);
    assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0], "what is ready serves");
    play.count("v2", 0, 40);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    // A rollback to any version is immediate, too.
    play.command(Command::SetTarget { target: "v3".to_owned() }).unwrap();
    play.pass(1).command(Command::Promote { full: true, override_gates: false }).unwrap();
    assert_eq!(play.pass(2).rollout.stable, "v3");
    play.command(Command::Rollback { to: "v1".to_owned(), override_gates: false }).unwrap();
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
}

#[test]
fn endpoints_that_are_too_young_are_called_so() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 50, "holdSeconds": 600}]));
    play.set("strategy", json!({"steps": [{"weight": 50}], "minReadySeconds": 5}));
    play.world.available.insert(("checkout".to_owned(), "v2".to_owned()), 1);
    let told = "step 1: v2 has 1 of 2 endpoints ready for 5 s that 50 % of the load need";
    assert_eq!(play.pass(1).rollout.message, told);
}

#[test]
fn a_failed_target_gets_nobody_back_once_the_stable_version_is_whole() {
    let mut play = held(json!([{"weight": 50, "holdSeconds": 600}]));
    play.ready("v1", 3);
    play.count("v2", 14, 11);
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0], "back as far as it goes");
    play.ready("v1", 4);
    play.pass(1).news();
    play.ready("v1", 3);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    let failed = "v2: 11 of 25 requests failed, more than the 10 allowed; back to v1 as far as it can carry the load";
    assert_eq!(play.rollout.message, format!("{failed}; v1 has 3 of 4 endpoints ready that the load needs"));
    play.ready("v1", 0);
    play.ready("v3", 0);
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    let told =
        format!("{failed}; v1 has 0 of 4 endpoints ready that the load needs; v2, which was taken back, has 100 %");
    assert_eq!(play.rollout.message, told);
    assert_eq!(play.last_news(), (Phase::Failed, Reason::EndpointsLost, told));
}

#[test]
fn blue_green_bears_after_the_move_what_any_way_bears() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 100}]));
    play.set("strategy", json!({"blueGreen": {"holdSeconds": 600}}));
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    play.ready("v2", 3);
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0], "25 % may be missing");
    play.ready("v2", 2);
    assert_eq!(play.pass(1).shares(), [100.0, 0.0, 0.0]);
    play.ready("v2", 3);
    assert_eq!(play.pass(1).shares(), [25.0, 75.0, 0.0], "it had moved");
}

#[test]
fn a_stable_version_that_grows_during_a_rollout_is_the_load() {
    let mut play = held(json!([{"weight": 50, "pause": true}, {"weight": 100}]));
    assert_eq!(play.rollout.full_load(&read(&play.document).services[0]), 4);
    let endpoints: Vec<String> = (0..12).map(|i| format!("127.0.0.1:{}", 9_100 + i)).collect();
    play.document["spec"]["versions"][0]["endpoints"] = json!(endpoints);
    play.pass(1);
    assert_eq!(play.rollout.full_load(&read(&play.document).services[0]), 4, "listed and not ready");
    play.ready("v1", 12);
    play.pass(1);
    assert_eq!(play.rollout.full_load(&read(&play.document).services[0]), 12);
    assert_eq!(play.shares(), [66.667, 33.333, 0.0], "4 of 12");
}
