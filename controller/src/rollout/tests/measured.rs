//! Proxies that are missing, behind or misrouting requests, and targets without successful answers.

use super::*;

fn held() -> Play {
    Play::new("v1", Some("v2"), json!([{"weight": 10, "holdSeconds": 60}, {"weight": 50, "holdSeconds": 60}]))
}

fn live(live: usize) -> Coverage {
    Coverage { live, ..Coverage::default() }
}

fn behind(behind: usize) -> Coverage {
    let first_behind = Some(("edge".to_owned(), Some(7)));
    Coverage { live: 20, behind, first_behind, revision: 9, ..Coverage::default() }
}

fn silent(silent: usize) -> Coverage {
    Coverage { silent, first_silent: Some(("edge".to_owned(), 12_345)), ..live(20 - silent) }
}

#[test]
fn without_a_proxy_nothing_ends() {
    let preview = json!([{"headers": [{"name": "x-beta", "value": "1"}]}]);
    for strategy in [
        json!({}),
        json!({"steps": [{"weight": 1, "holdSeconds": 30}, {"weight": 25, "holdSeconds": 60}, {"weight": 100}]}),
        json!({"steps": [{"matches": preview, "holdSeconds": 30}, {"weight": 100}]}),
        json!({"blueGreen": {"autoPromotionSeconds": 30, "previewMatches": preview}}),
        json!({"steps": [{"weight": 50}], "warmUp": {"seconds": 20, "mirrorPercent": 5}}),
        json!({"steps": [{"weight": 50}], "warmUp": {"seconds": 20}}),
    ] {
        let mut play = held();
        play.set("strategy", strategy.clone());
        play.world.coverage = live(0);
        assert_eq!(play.pass(900).stands(), (Phase::Progressing, Reason::NoProxies), "{strategy}");
        assert_eq!(play.rollout.step, 0, "{strategy}");
        let what_to_do = "no proxy reports; start an Envoy with this policy (tideshift render envoy), or check its \
                          cluster tideshift_controller";
        assert!(play.rollout.message.ends_with(what_to_do), "{}", play.rollout.message);
        play.world.coverage = live(1);
        assert_eq!(play.pass(600).stands(), (Phase::Succeeded, Reason::Completed), "{strategy}");
    }
}

#[test]
fn only_time_counts_in_which_proxies_do_what_was_decided() {
    for gone in [live(0), behind(1), silent(3)] {
        let mut play = held();
        play.pass(20).news();
        play.world.coverage = gone;
        // For as long as after each new revision, the reason does not change.
        assert_eq!(play.pass(2).stands(), (Phase::Progressing, Reason::Holding));
        play.pass(598);
        assert_eq!(play.rollout.held(play.now).unwrap() / 1_000, 19);
        play.world.coverage = live(20);
        assert_eq!((play.pass(39).rollout.step, play.rollout.reason), (0, Reason::Holding));
        assert_eq!(play.pass(2).rollout.step, 1);
    }
    // A moment does not count.
    let mut play = held();
    play.pass(20).world.coverage = live(0);
    play.pass(2).world.coverage = live(20);
    assert_eq!((play.pass(37).rollout.step, play.pass(2).rollout.step), (0, 1));
}

#[test]
fn a_step_without_a_hold_waits_until_its_revision_is_everywhere() {
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10}, {"weight": 50}]));
    play.world.coverage = behind(1);
    play.pass(2);
    assert_eq!((play.rollout.step, play.news()), (0, vec![(Phase::Progressing, Reason::Started, Some(1))]));
    assert_eq!(play.pass(2).stands(), (Phase::Progressing, Reason::ProxiesBehind));
    play.world.coverage = live(20);
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
}

#[test]
fn which_proxy_is_behind_and_what_to_do_is_said() {
    let no_revision = Coverage { first_behind: Some(("edge".to_owned(), None)), ..behind(3) };
    for (coverage, words) in [
        (behind(1), "proxy edge runs revision 7 and has not applied 9; tideshift status says what it refused"),
        (
            no_revision,
            "proxy edge (and 2 more) runs no policy of this controller and has not applied 9; tideshift status says \
             what it refused",
        ),
        (
            silent(3),
            "proxy edge (and 2 more) of 20 proxies has been silent for 12 s; check it and its cluster \
             tideshift_controller, or wait until it is forgotten after 60 s",
        ),
    ] {
        let mut play = held();
        play.world.coverage = coverage;
        assert_eq!(play.pass(100).stands(), (Phase::Progressing, Reason::ProxiesBehind));
        assert_eq!(play.rollout.message, format!("step 1: {words}"));
    }
    // A tenth of the proxies may be silent.
    let mut play = held();
    play.world.coverage = silent(2);
    assert_eq!(play.pass(62).rollout.step, 1);
}

#[test]
fn requests_that_go_elsewhere_are_no_test() {
    let mut play = held();
    play.pass(10).world.misrouted = 12;
    play.count("v1", 500, 0);
    assert_eq!(play.pass(600).stands(), (Phase::Progressing, Reason::NotRouted));
    let words = "step 1: 12 requests of v2 went elsewhere; add a route that matches x-tideshift-version: v2 (tideshift \
                 render prints it)";
    assert_eq!(play.rollout.message, words);
    // Fewer requests reach it than are misrouted, and some still are.
    play.count("v2", 11, 0);
    play.world.misrouted = 13;
    assert_eq!(play.pass(2).stands(), (Phase::Progressing, Reason::NotRouted));
    // With a route all reach it, and the hold continues where it was.
    play.pass(2).count("v2", 1, 0);
    assert_eq!(play.pass(45).stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.pass(8).rollout.step, 1);
    // The next step starts without counts of its own.
    assert_eq!(play.pass(5).stands(), (Phase::Progressing, Reason::Holding));
    // Most requests reach it from the beginning.
    let mut play = held();
    play.pass(10).world.misrouted = 12;
    play.count("v2", 12, 0);
    assert_eq!(play.pass(52).rollout.step, 1);
}

#[test]
fn without_a_good_answer_where_others_give_some_no_step_ends() {
    let mut play = held();
    for second in 0..120 {
        play.count("v1", 9, 0);
        play.pass(if second == 0 { 1 } else { 0 });
        *play.world.counts.entry("v2".to_owned()).or_default() += Counts { cancelled: 1, ..Counts::default() };
        play.pass(1);
        assert_eq!(play.rollout.step, 0, "{second}");
    }
    assert_eq!(play.stands(), (Phase::Progressing, Reason::NoGoodAnswer));
    assert!(
        play.rollout.message.ends_with(" of its requests have ended: 120 cancelled")
            && play.rollout.message.starts_with("step 1: v2 has given no good answer in this step, v1 1"),
        "{}",
        play.rollout.message
    );
    // If promoted it continues, and the next step needs its own answer.
    let (mut promoted, shift) = (play.rollout.clone(), read(&play.document));
    promoted = promoted.command(&PROMOTE, &shift, &play.world, play.now).unwrap();
    assert_eq!(promoted.advance(&shift, &play.world, play.now).step, 1);
    play.count("v2", 1, 0);
    assert_eq!(play.pass(1).rollout.step, 1);
    play.pass(59).count("v1", 1, 0);
    assert_eq!(play.pass(5).stands(), (Phase::Progressing, Reason::NoGoodAnswer));
    let words = "step 2: v2 has given no good answer in this step, v1 1; none of its requests has ended";
    assert_eq!(play.rollout.message, words);
    // Counts from before a restart still belong to the same step.
    let text = serde_json::to_string(&play.rollout).unwrap();
    play.rollout = serde_json::from_str(&text).unwrap();
    play.count("v2", 1, 0);
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
}

#[test]
fn nobody_has_to_answer_where_nobody_asks_or_users_are_not_there_yet() {
    let mut play = held();
    assert_eq!(play.pass(125).stands(), (Phase::Succeeded, Reason::Completed));
    // Testers may not send requests during the step.
    let mut play =
        Play::new("v1", Some("v2"), json!([{"weight": 0, "holdSeconds": 10}, {"weight": 50, "holdSeconds": 9}]));
    play.pass(5).count("v1", 100, 0);
    assert_eq!(play.pass(6).rollout.step, 1);
}

#[test]
fn each_service_needs_a_good_answer() {
    let mut play = moving_house();
    play.pass(5).count("v1", 9, 0);
    assert_eq!(play.pass(60).stands(), (Phase::Progressing, Reason::NoGoodAnswer));
    assert!(play.rollout.message.starts_with("step 1: v2 of cart has given no good"), "{}", play.rollout.message);
}

#[test]
fn whoever_is_asked_for_is_moved_to_without_proxies_and_it_is_said() {
    let mut play = held();
    play.world.coverage = live(0);
    play.pass(10).command(PROMOTE).unwrap();
    let told = play.rollout.take_news();
    let words = "v2: on to the next step, by hand, although no proxy reports; start an Envoy with this policy";
    assert!(told.iter().any(|news| news.message.starts_with(words)), "{told:?}");
    assert_eq!((play.pass(60).rollout.step, play.rollout.reason), (1, Reason::NoProxies));
    play.command(Command::Promote { full: true, override_gates: false }).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
    // None of this blocks the way back.
    play.set("target", json!("v1"));
    assert_eq!(play.pass(1).stands(), (Phase::Succeeded, Reason::Completed));
    assert_eq!(play.shares(), [100.0, 0.0, 0.0]);
    // A pause step still pauses, and the message says what is missing.
    let mut play = Play::new("v1", Some("v2"), json!([{"weight": 10, "pause": true}]));
    play.pass(5).world.coverage = live(0);
    assert_eq!(play.pass(5).stands(), (Phase::Paused, Reason::PauseStep));
    let words = "step 1: v2 has 10 %; paused until it is promoted; no proxy reports; ";
    assert!(play.rollout.message.starts_with(words), "{}", play.rollout.message);
}
