//! Scenarios read, and played through.

use super::*;
use crate::rollout::{Phase, Reason};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tideshift_core::shift::TrafficShift;

/// Four endpoints for each of v1, v2 and v3; from v1 to v2 in three steps of half a minute.
fn shift(fields: Value) -> TrafficShift {
    let version = |n: u16| {
        let endpoints: Vec<String> = (0..4).map(|i| format!("127.0.0.1:{}", 9_000 + 10 * n + i)).collect();
        json!({"name": format!("v{n}"), "endpoints": endpoints})
    };
    let steps = json!([{"weight": 5, "holdSeconds": 30}, {"weight": 50, "holdSeconds": 30}, {"weight": 100}]);
    let mut spec = json!({
        "versions": [version(1), version(2), version(3)],
        "stable": "v1",
        "target": "v2",
        "strategy": {"steps": steps},
        "analysis": {"maxErrorRate": 0.02},
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        spec[name] = value.clone();
    }
    let document = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "checkout"}, "spec": spec,
    });
    TrafficShift::read(&document).unwrap_or_else(|errors| panic!("{errors}"))
}

fn document(fields: Value) -> Value {
    let mut document = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "Scenario", "durationSeconds": 300, "requestsPerSecond": 100,
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        document[name] = value.clone();
    }
    document
}

fn play_on(shift: &TrafficShift, fields: Value) -> Run {
    let scenario = Scenario::read(&document(fields), Some(shift)).unwrap_or_else(|errors| panic!("{errors}"));
    run(shift, &scenario, scenario.seed, true)
}

fn play(fields: Value) -> Run {
    play_on(&shift(json!({})), fields)
}

fn error_rates(v1: Value, v2: Value) -> Value {
    json!([{"name": "v1", "errorRate": v1}, {"name": "v2", "errorRate": v2}])
}

fn errors(document: Value) -> Vec<String> {
    let read = Scenario::read(&document, Some(&shift(json!({}))));
    read.map_or_else(|errors| errors.0.iter().map(ToString::to_string).collect(), |_| Vec::new())
}

/// The reasons in the order in which they came.
fn reasons(run: &Run) -> Vec<Reason> {
    run.transitions.iter().map(|transition| transition.reason).collect()
}

/// The shares of a version over time, without repetitions.
fn weights(run: &Run, version: usize) -> Vec<f64> {
    let mut weights: Vec<f64> = run.samples.iter().map(|sample| sample.services[0][version].weight).collect();
    weights.dedup();
    weights
}

#[test]
fn what_a_scenario_leaves_out_is_harmless() {
    let read = |document: &Value| Scenario::read(document, Some(&shift(json!({}))));
    let mut least = document(json!({}));
    least.as_object_mut().unwrap().remove("durationSeconds");
    let scenario = read(&least).unwrap();
    assert_eq!((scenario.duration, scenario.seed, scenario.proxies, scenario.target_at), (3_600_000, 1, 1, 0));
    assert_eq!(*scenario.load_of("checkout").requests_per_second.at(7), 100.0);
    assert!(scenario.load.versions.is_empty() && scenario.events.is_empty());
}

#[test]
fn a_series_holds_each_value_until_the_next() {
    let series = json!([{"atSeconds": 0, "value": 1}, {"atSeconds": 2.5, "value": 7}, {"atSeconds": 60, "value": 0}]);
    let scenario = Scenario::read(&document(json!({"requestsPerSecond": series})), None).unwrap();
    let rate = |at| *scenario.load.requests_per_second.at(at);
    assert_eq!([0, 2_499, 2_500, 59_999, 60_000, 900_000].map(rate), [1.0, 1.0, 7.0, 7.0, 0.0, 0.0]);
}

#[test]
fn every_error_of_a_scenario_comes_at_once() {
    let bad = json!({
        "apiVersion": "v1",
        "kind": "Scenario",
        "durationSeconds": 100,
        "proxis": 3,
        "requestsPerSecond": [{"atSeconds": 5, "value": 1}, {"atSeconds": 5, "value": -1}, {"value": 2}],
        "versions": [
            {"name": "v9", "errorRate": 2},
            {"name": "v1", "endpointsReady": 5, "latencyMillis": {"median": 20, "p99": 10}},
            {"name": "v1", "clumps": {"everySeconds": 10, "millis": 5}, "errorRate": []},
        ],
        "services": [{"name": "search"}],
        "events": [
            {"atSeconds": 101, "pause": true},
            {"atSeconds": 1, "pause": false, "resume": true},
            {"atSeconds": 1, "promote": "all"},
            {"atSeconds": 1, "setTarget": "v7"},
            {"atSeconds": 1},
        ],
    });
    insta::assert_snapshot!(errors(bad).join("\n"));
}

#[test]
fn names_are_checked_only_if_there_is_something_to_check_them_by() {
    let of_v9 = document(json!({"versions": [{"name": "v9"}]}));
    assert_eq!(errors(of_v9.clone()).len(), 1);
    assert!(Scenario::read(&of_v9, None).is_ok());
}

#[test]
fn a_healthy_canary_passes() {
    let run = play(json!({"versions": error_rates(json!(0.002), json!(0.002))}));
    assert_eq!((run.phase, run.reason), (Phase::Succeeded, Reason::Completed));
    assert_eq!(weights(&run, 1), [5.0, 50.0, 100.0]);
    let (from, to) = (run.started_at_seconds.unwrap(), run.ended_at_seconds.unwrap());
    assert!(from == 0.0 && (60.0..80.0).contains(&to), "{}", run.to_text());
    let v2 = &run.services[0].versions[1];
    assert!(v2.requests > 20_000 && v2.weight == 100.0, "{v2:?}");
    assert!(run.judged.failed < 40 && run.judged.requests > 6_000, "{:?}", run.judged);
}

#[test]
fn a_canary_that_fails_is_taken_back_at_once() {
    let rate = json!([{"atSeconds": 0, "value": 0.0}, {"atSeconds": 45, "value": 1.0}]);
    let run = play(json!({"versions": error_rates(json!(0.001), rate)}));
    assert_eq!(run.phase, Phase::Failed);
    let ended = run.ended_at_seconds.unwrap();
    assert!((45.0..48.0).contains(&ended), "{}", run.to_text());
    assert_eq!(weights(&run, 1).last(), Some(&0.0));
    assert!((1..150).contains(&run.judged.failed_of_target), "{:?}", run.judged);
}

#[test]
fn too_little_traffic_stays_undecided() {
    let run = play(json!({"requestsPerSecond": 0.5}));
    assert_eq!((run.phase, run.reason), (Phase::Progressing, Reason::Undecided));
    assert_eq!((weights(&run, 1), run.ended_at_seconds), (vec![5.0], None));
}

#[test]
fn nobody_is_blamed_while_both_fail() {
    let run = play(json!({"versions": error_rates(json!(0.2), json!(0.2))}));
    assert_eq!((run.phase, run.reason), (Phase::Progressing, Reason::BothFailing), "{}", run.to_text());
}

#[test]
fn traffic_waits_for_endpoints_and_leaves_with_them() {
    let ready = |v2: Value| json!({"versions": [{"name": "v2", "endpointsReady": v2}]});
    let run = play(ready(json!([{"atSeconds": 0, "value": 0}, {"atSeconds": 100, "value": 1}])));
    assert_eq!((run.phase, run.reason), (Phase::Progressing, Reason::WaitingForCapacity));
    assert_eq!(weights(&run, 1), [0.0, 5.0, 25.0], "one of four endpoints carries a quarter");
    let run = play(ready(json!([{"atSeconds": 0, "value": 4}, {"atSeconds": 100, "value": 0}])));
    assert_eq!(weights(&run, 1), [5.0, 50.0, 100.0, 0.0], "v1 takes over what is lost");
    assert_eq!(run.judged.failed, 0);
}

#[test]
fn nobody_answers_where_nobody_is_ready_and_no_controller_sees_it() {
    let gone = json!([{"atSeconds": 0, "value": 4}, {"atSeconds": 100, "value": 0}]);
    let run = play(json!({
        "versions": [{"name": "v2", "endpointsReady": gone}],
        "events": [{"atSeconds": 90, "controllerDownSeconds": 15}],
    }));
    let failed = run.services[0].versions[1].errors;
    assert!((450..550).contains(&failed), "5 s at 100 requests/s: {failed}");
    let mut away = run.samples.iter().filter(|sample| !sample.controller);
    let (first, last) = (away.clone().next().unwrap(), away.next_back().unwrap());
    assert_eq!((first.at_seconds, last.at_seconds), (90.0, 104.0));
}

#[test]
fn a_rollout_goes_on_where_it_was_when_the_controller_is_back() {
    let run = play(json!({"events": [
        {"atSeconds": 20, "controllerDownSeconds": 60}, {"atSeconds": 30, "promote": true},
    ]}));
    assert_eq!(run.phase, Phase::Succeeded);
    assert_eq!(weights(&run, 1), [5.0, 50.0, 100.0]);
    // A minute without it is none of the 30 s that the step is held.
    assert_eq!(run.transitions[2].at_seconds, 90.2, "{}", run.to_text());
    let words: Vec<&str> = run.events.iter().map(|event| event.message.as_str()).collect();
    let refused = "promote: refused: the controller is away";
    assert_eq!(words, ["the controller goes away for 60 s", refused, "the controller is back"]);
}

#[test]
fn people_are_heard() {
    let run = play(json!({"targetAtSeconds": 10, "events": [
        {"atSeconds": 15, "setWeight": 30},
        {"atSeconds": 20, "rollback": "v1"},
        {"atSeconds": 25, "resume": true},
        {"atSeconds": 30, "setTarget": "v3"},
        {"atSeconds": 35, "promote": "full"},
    ]}));
    assert_eq!((run.phase, run.target.as_deref()), (Phase::Succeeded, Some("v3")));
    assert_eq!(weights(&run, 1), [0.0, 5.0, 30.0, 0.0]);
    assert_eq!(weights(&run, 2), [0.0, 5.0, 100.0]);
    assert!([Reason::WeightSet, Reason::RolledBack, Reason::Promoted].iter().all(|r| reasons(&run).contains(r)));
    assert!(run.events[2].message.starts_with("resume: refused: "), "{:?}", run.events);
}

#[test]
fn services_have_loads_of_their_own_and_move_together() {
    let version = |name: &str, endpoints: u16| {
        let endpoints: Vec<String> = (0..endpoints).map(|i| format!("127.0.0.1:{}", 9_000 + i)).collect();
        json!({"name": name, "endpoints": endpoints})
    };
    let service =
        |name: &str| json!({"name": name, "hostnames": [name], "versions": [version("v1", 2), version("v2", 0)]});
    let document = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "shop"},
        "spec": {"services": [service("checkout"), service("search")], "stable": "v1", "target": "v2"},
    });
    let shift = TrafficShift::read(&document).unwrap();
    let slow = json!([{"name": "v2", "endpointsReady": [{"atSeconds": 0, "value": 0}, {"atSeconds": 60, "value": 2}]}]);
    let run = play_on(
        &shift,
        json!({
            "services": [{"name": "search", "requestsPerSecond": 10, "versions": slow}],
        }),
    );
    assert_eq!(run.phase, Phase::Succeeded, "{}", run.to_text());
    assert!((60.0..62.0).contains(&run.ended_at_seconds.unwrap()), "{}", run.to_text());
    let requests = |service: usize| run.services[service].versions.iter().map(|v| v.requests).sum::<u64>();
    assert!((29_000..31_000).contains(&requests(0)) && (2_700..3_300).contains(&requests(1)));
}

#[test]
fn shares_are_what_the_weights_say() {
    let steps = json!({"steps": [{"weight": 25, "pause": true}]});
    let run = play_on(&shift(json!({"strategy": steps})), json!({"proxies": 3}));
    let of = |version: usize| run.services[0].versions[version].requests as f64;
    let share = of(1) / (of(0) + of(1));
    assert!((share - 0.25).abs() < 0.001, "{share}");
}

#[test]
fn clumps_come_as_often_as_they_should() {
    let clumps = json!({"everySeconds": 20, "millis": 500, "errorRate": 0.5});
    let run = play(json!({
        "durationSeconds": 3600, "targetAtSeconds": 3600, "versions": [{"name": "v1", "clumps": clumps}],
    }));
    // 3600 s / 20.5 s clumps of half a second of 100 requests/s, half of which fail: 4,400 ± 5 standard deviations.
    let failed = run.services[0].versions[0].errors;
    assert!((2_700..6_100).contains(&failed), "{failed}");
}

#[test]
fn slow_requests_are_in_flight_and_judged() {
    let slow = json!([{"atSeconds": 0, "value": {"median": 20, "p99": 60}},
        {"atSeconds": 50, "value": {"median": 400, "p99": 900}}]);
    let run = play_on(
        &shift(json!({"analysis": {"latency": {}}})),
        json!({"versions": [{"name": "v2", "latencyMillis": slow}]}),
    );
    assert_eq!((run.phase, run.reason), (Phase::Failed, Reason::VerdictFail), "{}", run.to_text());
    assert_eq!(run.judged.failed, 0);
}

/// What it was like before is no excuse for a target, and no measure of what is slow.
#[test]
fn the_stable_version_is_known_by_what_it_did_lately() {
    let since =
        |before: Value, now: Value| json!([{"atSeconds": 0, "value": before}, {"atSeconds": 400, "value": now}]);
    let world = json!({"durationSeconds": 900, "targetAtSeconds": 600});
    let play = |analysis: Value, v1: Value, v2: Value| {
        let mut world = world.clone();
        world["versions"] = json!([v1, v2]);
        let strategy = json!({"blueGreen": {"holdSeconds": 60}});
        play_on(&shift(json!({"analysis": analysis, "strategy": strategy})), world)
    };
    let bad = json!({"name": "v2", "errorRate": 0.15});
    let failed = play(json!({}), json!({"name": "v1", "errorRate": since(json!(0.15), json!(0.001))}), bad);
    assert_eq!((failed.phase, failed.reason), (Phase::Failed, Reason::VerdictFail), "{}", failed.to_text());

    let (slow, fast) = (json!({"median": 2000, "p99": 4000}), json!({"median": 30, "p99": 60}));
    let steps = json!([{"weight": 20, "holdSeconds": 200}, {"weight": 100}]);
    let mut world = world;
    world["versions"] = json!([
        {"name": "v1", "latencyMillis": since(slow, fast)}, {"name": "v2", "latencyMillis": {"median": 1500, "p99": 2500}},
    ]);
    let failed = play_on(&shift(json!({"analysis": {"latency": {}}, "strategy": {"steps": steps}})), world);
    assert_eq!((failed.phase, failed.reason), (Phase::Failed, Reason::VerdictFail), "{}", failed.to_text());
    let said = failed.verdict.unwrap().message;
    assert!(["70", "100"].iter().any(|ms| said.contains(&format!("took more than {ms} ms at this step"))), "{said}");
}

/// Nothing but what is allowed can be held against it then.
#[test]
fn a_target_that_gets_everything_at_once_fails_too() {
    let blue_green = || shift(json!({"strategy": {"blueGreen": {"holdSeconds": 60}}, "analysis": {}}));
    let failing = |rate: f64, at: u64| {
        let versions = error_rates(json!(0.001), json!(rate));
        play_on(&blue_green(), json!({"targetAtSeconds": at, "durationSeconds": 300, "versions": versions}))
    };
    for (rate, at, most) in [(0.4, 0, 15.0), (0.2, 0, 20.0), (0.2, 10, 30.0), (0.1, 60, 120.0)] {
        let run = failing(rate, at);
        assert_eq!((run.phase, run.reason), (Phase::Failed, Reason::VerdictFail), "{rate}: {}", run.to_text());
        assert!(run.ended_at_seconds.unwrap() <= most + at as f64, "{rate}: {}", run.to_text());
    }
}

/// Of two services one is fine and has most of the requests.
#[test]
fn the_service_that_fails_is_named_and_loses_its_traffic_whole() {
    let version = |name: &str, endpoints: u16| {
        let endpoints: Vec<String> = (0..endpoints).map(|i| format!("127.0.0.1:{}", 9_000 + i)).collect();
        json!({"name": name, "endpoints": endpoints})
    };
    let service =
        |name: &str| json!({"name": name, "hostnames": [name], "versions": [version("v1", 4), version("v2", 4)]});
    let document = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "shop"},
        "spec": {
            "services": [service("checkout"), service("search")], "stable": "v1", "target": "v2",
            "strategy": {"steps": [{"weight": 50, "holdSeconds": 60}, {"weight": 100}]}, "analysis": {},
        },
    });
    let shift = TrafficShift::read(&document).unwrap();
    let bad = json!([{"name": "v2", "errorRate": 0.9}]);
    let run = play_on(&shift, json!({"services": [{"name": "search", "requestsPerSecond": 10, "versions": bad}]}));
    assert_eq!((run.phase, run.reason), (Phase::Failed, Reason::VerdictFail), "{}", run.to_text());
    let said = &run.transitions.last().unwrap().message;
    assert!(said.contains(" failed at search, v1 0 of ") && said.ends_with("all at once"), "{said}");
}

#[test]
fn a_verdict_is_of_the_rollout_that_it_is_told_with() {
    let run = play(json!({
        "requestsPerSecond": 200, "versions": [{"name": "v3", "errorRate": 0.2}],
        "events": [{"atSeconds": 40, "setTarget": "v3"}, {"atSeconds": 100, "rollback": "v2"}],
    }));
    assert_eq!((run.phase, run.target.as_deref()), (Phase::Succeeded, Some("v2")), "{}", run.to_text());
    assert!(run.transitions.iter().any(|transition| transition.phase == Phase::Failed), "{}", run.to_text());
    assert_eq!(run.verdict, None);
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let world = json!({"proxies": 3, "versions": error_rates(json!(0.01), json!(0.01))});
    let all = |run: &Run| (run.to_text(), draw(run), serde_json::to_string(run).unwrap());
    let (one, again) = (play(world.clone()), play(world.clone()));
    assert_eq!(all(&one), all(&again));
    let mut other = world;
    other["seed"] = json!(2);
    assert_ne!(play(other).services, one.services);
}

#[test]
fn many_runs_count_what_each_of_them_is() {
    let shift = shift(json!({}));
    // Bad enough to fail now and then.
    let world = document(json!({"durationSeconds": 120, "versions": error_rates(json!(0.001), json!(0.015))}));
    let scenario = Scenario::read(&world, Some(&shift)).unwrap();
    let many = many(&shift, &scenario, 5, 12);
    let whole: Vec<Run> = (5..17).map(|seed| run(&shift, &scenario, seed, true)).collect();
    for (ending, end) in many.endings.iter().zip([End::Succeeded, End::Failed, End::Undecided]) {
        let runs: Vec<&Run> = whole.iter().filter(|run| End::of(run) == end).collect();
        assert_eq!((ending.end, ending.runs), (end, runs.len() as u64));
        let mut seconds: Vec<f64> = runs.iter().filter_map(|run| run.ended_at_seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds.len().checked_sub(1).map(|last| seconds[last / 2]);
        assert_eq!(ending.seconds.map(|seconds| seconds.median), median);
        let mut failed: Vec<u64> = runs.iter().map(|run| run.judged.failed_of_target).collect();
        failed.sort_unstable();
        assert_eq!(
            ending.failed_of_target.p90,
            failed.get((failed.len() * 9).div_ceil(10).max(1) - 1).copied().unwrap_or(0)
        );
    }
    assert!(many.endings.iter().filter(|ending| ending.runs > 0).count() > 1, "{many:?}");
}

/// A run that is made up, so that its picture is another one only if pictures are.
fn small_run() -> Run {
    let sample = |at_seconds: f64, weight: f64, (v1, v2): (u64, u64), evidence: Option<f64>| {
        let version = |weight, endpoints_ready, errors| VersionSample {
            weight,
            endpoints_ready,
            requests: 100 * at_seconds as u64,
            errors,
        };
        Sample {
            at_seconds,
            regular: true,
            controller: at_seconds != 3.0,
            services: vec![vec![version(100.0 - weight, 2, v1), version(weight, 1, v2)]],
            evidence: evidence.filter(|_| at_seconds != 3.0),
            bound: Some(1_000.0),
            pass_evidence: evidence.map(|evidence| 1.0 / evidence),
            pass_bound: Some(20.0),
            latency_evidence: None,
        }
    };
    let transition = |at_seconds, phase, reason, weight, message: &str| Transition {
        at_seconds,
        rollout: 1,
        phase,
        reason,
        message: message.to_owned(),
        step: None,
        weight,
    };
    let total = |name: &str, requests, errors, weight| VersionTotals {
        name: name.to_owned(),
        requests,
        errors,
        endpoints_ready: 1,
        endpoints: 2,
        weight,
    };
    Run {
        rollout: "<checkout>".to_owned(),
        seed: 1,
        duration_seconds: 6.0,
        phase: Phase::Failed,
        reason: Reason::VerdictFail,
        message: "v2: too much & too often".to_owned(),
        stable: "v1".to_owned(),
        target: Some("v2".to_owned()),
        started_at_seconds: Some(1.0),
        ended_at_seconds: Some(5.0),
        verdict: None,
        judged: Judged { requests: 1_400, failed: 8, failed_of_target: 7 },
        transitions: vec![
            transition(1.0, Phase::Progressing, Reason::Started, Some(25), "moving from v1 to v2"),
            transition(1.0, Phase::Progressing, Reason::WaitingForCapacity, Some(25), "v2 has 0 of 1"),
            transition(2.0, Phase::Progressing, Reason::Holding, Some(25), "v2 has 25 %"),
            transition(5.0, Phase::Failed, Reason::VerdictFail, None, "v2: too much & too often"),
        ],
        events: vec![Event { at_seconds: 3.0, message: "the controller goes away for 1 s".to_owned() }],
        services: vec![ServiceTotals {
            name: "checkout".to_owned(),
            unrouted: 3,
            versions: vec![total("v1", 1_000, 1, 100.0), total("v2", 400, 7, 0.0)],
        }],
        samples: vec![
            sample(0.0, 0.0, (0, 0), None),
            sample(1.0, 0.0, (0, 0), Some(1.0)),
            sample(2.0, 25.0, (0, 1), Some(4.0)),
            sample(3.0, 25.0, (1, 2), Some(4.0)),
            sample(4.0, 25.0, (1, 5), Some(300.0)),
            sample(5.0, 0.0, (1, 7), Some(2_000.0)),
            sample(6.0, 0.0, (1, 7), None),
        ],
        sample_seconds: 1.0,
        load_changes: true,
    }
}

#[test]
fn a_small_run_looks_as_it_did() {
    insta::assert_snapshot!(draw(&small_run()));
    insta::assert_snapshot!(small_run().to_text());
}

/// As `make simulation` draws it.
#[test]
fn the_committed_picture_is_what_the_example_gives() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let of = |name: &str| root.join("envoy-configs").join(name);
    let shift = crate::documents::load_one(&of("checkout.yaml"), TrafficShift::read).unwrap();
    let read = |value: &Value| Scenario::read(value, Some(&shift));
    let scenario = crate::documents::load_one(&of("scenario.yaml"), read).unwrap();
    let picture = draw(&run(&shift, &scenario, scenario.seed, true));
    let committed = fs::read_to_string(root.join("docs/images/simulation.svg")).unwrap();
    assert!(picture == committed, "docs/images/simulation.svg is of another time; `make simulation` draws it anew");
}
