//! No increase of the share bypasses a gate.

use super::*;

const FULL: Command = Command::Promote { full: true, override_gates: false };

fn weight(weight: u32) -> Command {
    Command::SetWeight { weight, override_gates: false }
}

fn gate(steps: serde_json::Value) -> serde_json::Value {
    json!([{"name": "approval", "type": "Gate", "url": "http://127.0.0.1:1/", "steps": steps}])
}

/// 10 %, 25 %, 50 % and 100 %, each held for an hour; the gate is before 50 %.
fn gated() -> Play {
    let held = |weight| json!({"weight": weight, "holdSeconds": 3600});
    let mut play = Play::new("v1", None, json!([held(10), held(25), held(50), {"weight": 100}]));
    play.set("webhooks", gate(json!([3])));
    play.pass(1).set("target", json!("v2"));
    play.pass(1);
    assert_eq!(play.shares(), [90.0, 10.0, 0.0]);
    play
}

fn refused(play: &mut Play, command: Command) {
    let shares = play.shares();
    let told = play.command(command.clone());
    let Err(Refused::Conflict(why)) = told else { panic!("{command:?}: {told:?}") };
    assert!(why.contains("gate approval") && why.contains("--override-gates"), "{why}");
    assert_eq!(play.pass(5).shares(), shares);
}

#[test]
fn commands_stop_at_a_closed_gate() {
    let mut play = gated();
    refused(&mut play, FULL);
    refused(&mut play, weight(26));
    refused(&mut play, weight(100));
    refused(&mut play, Command::Rollback { to: "v3".to_owned(), override_gates: false });
    play.command(weight(25)).unwrap();
    assert_eq!(play.pass(1).shares(), [75.0, 25.0, 0.0]);
    refused(&mut play, FULL);
    refused(&mut play, weight(50));
    // It continues to the step of the gate and waits there for approval.
    for on in [PROMOTE, Command::Resume] {
        let mut play = Play { rollout: play.rollout.clone(), now: play.now, ..gated() };
        play.command(on).unwrap();
        let step = play.pass(1).rollout.step;
        if step == 1 {
            play.command(PROMOTE).unwrap();
        }
        assert_eq!(play.pass(5).stands(), (Phase::Waiting, Reason::GateClosed));
        assert_eq!(play.shares(), [75.0, 25.0, 0.0]);
        refused(&mut play, PROMOTE);
        play.rollout.gate_answered(2, true, "");
        assert_eq!(play.pass(1).shares(), [50.0, 50.0, 0.0]);
        play.command(FULL).unwrap();
        assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
    }
}

#[test]
fn a_gate_is_overridden_by_saying_so() {
    let overriding = [
        (Command::Promote { full: true, override_gates: true }, 100.0),
        (Command::SetWeight { weight: 60, override_gates: true }, 60.0),
        (Command::Rollback { to: "v2".to_owned(), override_gates: true }, 100.0),
    ];
    for (command, share) in overriding {
        let mut play = gated();
        play.news();
        play.command(command.clone()).unwrap();
        assert_eq!(play.pass(1).shares()[1], share, "{command:?}");
    }
    let mut play = gated();
    play.command(Command::Promote { full: true, override_gates: true }).unwrap();
    let told = play.rollout.take_news();
    assert!(told.iter().any(|news| news.message.contains("overriding the gate approval of step 3")), "{told:?}");
    // At the gate itself, the step begins and is held as usual.
    let mut play = gated();
    play.command(PROMOTE).unwrap();
    play.pass(1).command(PROMOTE).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Waiting, Reason::GateClosed));
    play.command(Command::Promote { full: false, override_gates: true }).unwrap();
    assert_eq!(play.pass(60).stands(), (Phase::Progressing, Reason::Holding));
    assert_eq!(play.shares(), [50.0, 50.0, 0.0]);
}

#[test]
fn an_override_opens_no_gate_that_lies_beyond_it() {
    let mut play = gated();
    play.command(PROMOTE).unwrap();
    play.pass(1).command(PROMOTE).unwrap();
    assert_eq!(play.pass(1).stands(), (Phase::Waiting, Reason::GateClosed));
    play.command(Command::SetWeight { weight: 5, override_gates: true }).unwrap();
    assert_eq!(play.pass(1).shares(), [95.0, 5.0, 0.0]);
    refused(&mut play, FULL);
    refused(&mut play, weight(60));
    play.command(Command::Resume).unwrap();
    for _ in 0..3 {
        let _ = play.pass(5).command(PROMOTE);
    }
    assert_eq!(play.pass(5).stands(), (Phase::Waiting, Reason::GateClosed));
    assert!(play.shares()[1] <= 25.0);
}

#[test]
fn edited_steps_move_no_gate_out_of_the_way() {
    // The gate's number belongs to no step any more, or to a later one.
    for steps in
        [json!([{"weight": 100}]), json!([{"weight": 5}, {"weight": 100}]), json!([{"weight": 10}, {"weight": 100}])]
    {
        let mut play = gated();
        play.set("strategy", json!({"steps": steps}));
        for _ in 0..4 {
            play.pass(60);
            assert!(play.shares()[1] <= 25.0, "{steps}: {:?}", play.shares());
            let _ = play.command(Command::Resume);
            let _ = play.command(PROMOTE);
            let _ = play.command(FULL);
        }
        assert_eq!(play.stands(), (Phase::Waiting, Reason::GateClosed), "{steps}");
        let step = play.rollout.step;
        play.rollout.gate_answered(step, true, "");
        assert_eq!(play.pass(60).shares(), [0.0, 100.0, 0.0], "{steps}");
    }
}

#[test]
fn an_edited_stable_is_a_rollout_where_there_are_gates() {
    // Of the target under way, and of a version at rest.
    for (under_way, version) in [(true, "v2"), (false, "v3")] {
        let mut play = gated();
        if !under_way {
            play.set("target", json!(null));
            play.pass(1);
        }
        play.set("stable", json!(version));
        play.pass(10);
        assert!(play.shares()[0] >= 75.0, "{version}: {:?}", play.shares());
        assert_eq!((play.rollout.stable.as_str(), play.rollout.target.as_deref()), ("v1", Some(version)));
        play.command(PROMOTE).unwrap();
        play.pass(1).command(PROMOTE).unwrap();
        assert_eq!(play.pass(10).stands(), (Phase::Waiting, Reason::GateClosed));
        play.command(Command::Promote { full: true, override_gates: true }).unwrap();
        assert_eq!(play.pass(5).rollout.stable, version);
        assert_eq!(play.stands(), (Phase::Succeeded, Reason::Completed));
        // Going back to the version that served before needs no gate.
        play.set("stable", json!("v1"));
        play.set("target", json!(null));
        assert_eq!(play.pass(5).shares(), [100.0, 0.0, 0.0]);
    }
    // Without gates, an edited `stable` serves at once.
    let mut play = Play::new("v1", None, json!([{"weight": 10, "holdSeconds": 60}]));
    play.pass(1).set("stable", json!("v2"));
    assert_eq!(play.pass(1).shares(), [0.0, 100.0, 0.0]);
}

#[test]
fn a_superseded_target_has_not_served() {
    // It still helps to carry the load, but has never had all traffic: its gate still applies.
    let superseded = || {
        let mut play = gated();
        play.ready("v1", 3);
        play.pass(1).set("target", json!("v3"));
        play.pass(1);
        assert_eq!(play.rollout.leaving.as_deref(), Some("v2"));
        play
    };
    refused(&mut superseded(), Command::Rollback { to: "v2".to_owned(), override_gates: false });
    let mut play = superseded();
    play.set("stable", json!("v2"));
    play.set("target", json!(null));
    play.pass(10);
    assert_eq!((play.rollout.stable.as_str(), play.rollout.target.as_deref()), ("v1", Some("v2")));
}
