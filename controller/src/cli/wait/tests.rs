use super::*;
use serde_json::{Value, json};

/// A rollout from v1 to v2 at 20 %, and a proxy that runs the newest policy.
fn status(change: impl FnOnce(&mut Value)) -> Status {
    let version = |name: &str, weight: u32, ready: u32| {
        json!({
            "name": name, "weight": weight, "serving": weight > 0, "endpoints": {"ready": ready, "listed": 2},
            "requests": {"ok": 0, "error": 0, "clientError": 0, "cancelled": 0}, "inFlight": 0,
            "drain": {"state": "Serving", "inFlight": 0, "message": ""},
        })
    };
    let mut status = json!({
        "epoch": "e", "revision": 6,
        "services": [{
            "name": "shop", "rollout": "shop", "number": 2, "phase": "Progressing", "reason": "Holding", "stable": "v1",
            "target": "v2", "message": "step 1: v2 has 20 %", "since": "2026-11-22T10:00:00Z", "unrouted": 0,
            "step": {"number": 1, "of": 2, "weight": 20, "holdSeconds": 30},
            "versions": [version("v1", 80, 2), version("v2", 20, 2), version("v3", 0, 2)],
        }],
        "proxies": [{"id": "a", "revision": 6, "workers": 2, "lastSeen": "2026-11-22T10:00:00Z"}],
    });
    change(&mut status);
    serde_json::from_value(status).unwrap()
}

fn at_rest(phase: &str, number: u64, stable: &str, target: Option<&str>) -> Status {
    status(|status| {
        let service = &mut status["services"][0];
        (service["phase"], service["number"]) = (json!(phase), json!(number));
        (service["stable"], service["target"]) = (json!(stable), json!(target));
        service["message"] = json!(format!("{stable} serves"));
        for version in service["versions"].as_array_mut().unwrap() {
            version["weight"] = json!(if version["name"] == stable { 100 } else { 0 });
        }
    })
}

fn look(wait: &mut Wait, status: &Status, now: Instant) -> Progress {
    let services: Vec<_> = status.services.iter().collect();
    wait.look(status, services[0], &services, now)
}

/// What becomes of a wait that began with one status and then sees another.
fn then(goal: Goal, first: &Status, second: &Status) -> Progress {
    look(&mut Wait::new(goal, &first.services), second, Instant::now())
}

#[track_caller]
fn is_lost(progress: &Progress, words: &[&str]) {
    let Progress::Lost(why) = progress else { panic!("{progress:?}") };
    assert!(words.iter().all(|word| why.contains(word)), "{words:?} in {why}");
}

fn v2() -> String {
    "v2".to_owned()
}

#[test]
fn only_the_rollout_that_was_meant_ends_well() {
    let under_way = status(|_| ());
    for goal in [Goal::To(v2()), Goal::End, Goal::Document(Some(v2()))] {
        // A document's rollout is known when it is seen.
        let goes = |second: &Status| {
            let mut wait = Wait::new(goal.clone(), &under_way.services);
            assert!(matches!(look(&mut wait, &under_way, Instant::now()), Progress::Goes(_)), "{goal:?}");
            look(&mut wait, second, Instant::now())
        };
        assert_eq!(goes(&at_rest("Succeeded", 2, "v2", Some("v2"))), Progress::Reached);
        is_lost(
            &goes(&at_rest("Succeeded", 3, "v3", Some("v3"))),
            &["rollout 2 to v2", "rollout 3 to v3", "Succeeded"],
        );
        is_lost(&goes(&at_rest("Succeeded", 3, "v1", Some("v1"))), &["rollout 3 to v1"]);
        // The same version, but not the same rollout.
        is_lost(&goes(&at_rest("Succeeded", 4, "v2", Some("v2"))), &["rollout 4 to v2"]);
        is_lost(&goes(&at_rest("Failed", 2, "v1", Some("v2"))), &["v1 serves"]);
        is_lost(&goes(&at_rest("Initialized", 2, "v1", None)), &["withdrawn"]);
    }
}

#[test]
fn a_document_is_in_force_when_what_it_names_serves() {
    let fresh = at_rest("Initialized", 0, "v1", None);
    for wanted in [None, Some("v1".to_owned())] {
        assert_eq!(then(Goal::Document(wanted), &fresh, &fresh), Progress::Reached);
    }
    let unprobed = status(|status| {
        status["services"][0]["phase"] = json!("Initialized");
        status["services"][0]["versions"][1]["endpoints"]["notReady"] = json!([{"endpoint": "127.0.0.1:1"}]);
    });
    assert!(matches!(then(Goal::Document(None), &fresh, &unprobed), Progress::Goes(_)));

    // A rollout is to begin. What does not begin in time never does: the document says nothing new.
    let mut wait = Wait::new(Goal::Document(Some(v2())), &fresh.services);
    let now = Instant::now();
    assert!(matches!(look(&mut wait, &unprobed, now), Progress::Goes(_)));
    assert!(matches!(look(&mut wait, &fresh, now + TO_BEGIN), Progress::Goes(_)));
    is_lost(&look(&mut wait, &fresh, now + TO_BEGIN * 2), &["no rollout to v2 begins", "tideshift set-target v2"]);
    let mut wait = Wait::new(Goal::Document(Some(v2())), &fresh.services);
    assert!(matches!(look(&mut wait, &fresh, now), Progress::Goes(_)));
    assert!(matches!(look(&mut wait, &status(|_| ()), now + TO_BEGIN * 2), Progress::Goes(_)));
    assert_eq!(look(&mut wait, &at_rest("Succeeded", 2, "v2", Some("v2")), now), Progress::Reached);
}

#[test]
fn going_back_is_over_when_that_version_has_everything() {
    let back = at_rest("Failed", 2, "v1", Some("v2"));
    let part = status(|status| status["services"][0]["phase"] = json!("Failed"));
    for goal in [Goal::At("v1".to_owned()), Goal::Back, Goal::To("v1".to_owned())] {
        assert_eq!(then(goal.clone(), &back, &back), Progress::Reached);
        let Progress::Lacks(what) = then(goal.clone(), &back, &part) else { panic!("{goal:?}") };
        assert!(what.starts_with("v1 of shop to have 100 % instead of 80 % (v1 has 2 of 2 endpoints ready"), "{what}");
        is_lost(&then(goal, &back, &at_rest("Succeeded", 3, "v2", Some("v2"))), &["rollout 3 to v2"]);
    }
}

#[test]
fn a_share_by_hand_is_neither_less_nor_more() {
    let with = |share: f64, weight: u32| {
        status(|status| {
            let service = &mut status["services"][0];
            (service["phase"], service["step"]["weight"]) = (json!("Paused"), json!(weight));
            service["versions"][0]["endpoints"]["ready"] = json!(0);
            service["versions"][1]["weight"] = json!(share);
        })
    };
    let set = |share, weight| then(Goal::Set(10), &with(20.0, 10), &with(share, weight));
    assert_eq!(set(10.0, 10), Progress::Reached);
    assert_eq!(set(10.001, 10), Progress::Reached);
    for share in [9.5, 100.0] {
        let Progress::Lacks(what) = set(share, 10) else { panic!("{share}") };
        assert!(what.contains(&format!("10 % instead of {share} % (v1 has 0 of 2 endpoints ready")), "{what}");
    }
    is_lost(&set(20.0, 20), &["10 %"]);
    is_lost(&then(Goal::Set(10), &with(20.0, 10), &at_rest("Failed", 2, "v1", Some("v2"))), &["Failed"]);
}

#[test]
fn a_pause_is_over_when_somebody_resumes() {
    let paused = status(|status| status["services"][0]["paused"] = json!(true));
    assert_eq!(then(Goal::Paused, &paused, &paused), Progress::Reached);
    is_lost(&then(Goal::Paused, &paused, &status(|_| ())), &["no longer paused"]);
}

#[test]
fn proxies_are_waited_for_as_long_as_they_are_heard_of() {
    let heard = |seen: &str| {
        let mut status = at_rest("Succeeded", 2, "v2", Some("v2"));
        let behind = json!([{"id": "b", "revision": 5, "workers": 1, "lastSeen": seen},
            {"id": "c", "workers": 1, "lastSeen": "2026-11-22T09:59:30Z",
             "refused": {"revision": 6, "errors": ["services: no"]}}]);
        status.proxies.extend(serde_json::from_value::<Vec<ProxyStatus>>(behind).unwrap());
        status
    };
    let mut wait = Wait::new(Goal::End, &heard("2026-11-22T10:00:00Z").services);
    let begun = Instant::now();
    let Progress::Lacks(what) = look(&mut wait, &heard("2026-11-22T10:00:00Z"), begun) else { panic!() };
    assert_eq!(what, "proxies b (runs 5), c (refuses a policy: services: no) to run revision 6");
    // The one that goes on reporting is waited for, the one that does not is not.
    let now = begun + SILENT;
    let Progress::Lacks(what) = look(&mut wait, &heard("2026-11-22T10:00:05Z"), now) else { panic!() };
    assert_eq!(what, "proxy b (runs 5) to run revision 6");
    assert_eq!(look(&mut wait, &heard("2026-11-22T10:00:05Z"), now + SILENT), Progress::Reached);
    assert_eq!(wait.silent(&heard("2026-11-22T10:00:05Z"), now + SILENT), ["b", "c"]);
}
