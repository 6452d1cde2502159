//! What is done with a request: sessions, mirroring, and the order of rule, session and weight.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // Tests say what must hold by unwrapping it.

use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use tideshift_core::choice::plan::{Decision, Plan, Reason, Turns};
use tideshift_core::matching::Match;
use tideshift_core::matching::request::Request;
use tideshift_core::protocol::policy::Policy;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// A worker with a policy of one service.
struct Worker {
    plan: Plan,
    turns: Turns,
    ids: u64,
}

impl Worker {
    fn new(service: Value) -> Self {
        let mut worker = Self { plan: plan(service), turns: Turns::default(), ids: 0 };
        worker.turns = Turns::for_plan(&worker.plan, 1, None);
        worker
    }

    /// Changes the service as a new policy does.
    fn apply(&mut self, service: Value) {
        let plan = plan(service);
        self.turns = Turns::for_plan(&plan, 2, Some((&self.plan, &self.turns)));
        self.plan = plan;
    }

    fn decide(&mut self, headers: &[(&str, &str)]) -> Decision<'_> {
        self.ids += 1;
        let id = self.ids.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.plan.decide(headers, &mut self.turns, || id).unwrap()
    }

    /// The version of a request, and the cookie's value that it gets.
    fn ask(&mut self, headers: &[(&str, &str)]) -> (String, Option<String>) {
        let decision = self.decide(headers);
        let (service, version, cookie) = (decision.service, decision.version, decision.cookie.clone());
        let name = version.map_or("-", |version| &self.plan.services[service].versions[version]).to_owned();
        (name, cookie.map(|cookie| cookie.split(';').next().unwrap().to_owned()))
    }
}

fn plan(service: Value) -> Plan {
    Plan::new(
        &Policy::read(&json!({"revision": 1, "services": [service]})).unwrap_or_else(|e| unreachable!("{e}")),
        |_, _| false,
    )
}

/// A service with a cookie session and these weights.
fn sticky(weights: &[(&str, u32)]) -> Value {
    let versions: Vec<Value> = weights.iter().map(|(name, weight)| json!({"name": name, "weight": weight})).collect();
    json!({"name": "checkout", "versions": versions, "session": {"type": "Cookie", "name": "s"}})
}

/// A user who returns the cookie stays on the version while weights move either way, until the version has no weight.
#[test]
fn a_user_with_a_cookie_keeps_the_version_as_long_as_it_has_weight() {
    let mut worker = Worker::new(sticky(&[("v1", 90), ("v2", 10)]));
    let users: Vec<(String, String)> = (0..200).map(|_| worker.ask(&[])).map(|(v, c)| (v, c.unwrap())).collect();
    let on_v2 = users.iter().filter(|(version, _)| version == "v2").count();
    assert!((18..=22).contains(&on_v2), "new users come by turn: {on_v2} of 20");
    for weights in [[50, 50], [1, 99], [99, 1]] {
        worker.apply(sticky(&[("v1", weights[0]), ("v2", weights[1])]));
        for (version, cookie) in &users {
            assert_eq!(worker.ask(&[("cookie", cookie)]), (version.clone(), None), "nothing to set either");
        }
    }
    worker.apply(sticky(&[("v1", 0), ("v2", 100)]));
    for (version, cookie) in &users {
        let (now, set) = worker.ask(&[("cookie", cookie)]);
        assert_eq!((now.as_str(), set.is_some()), ("v2", version == "v1"));
    }
}

#[test]
fn a_version_out_of_service_hands_its_users_on_by_weight_and_moves_nobody_else() {
    let mut worker = Worker::new(sticky(&[("v1", 50), ("v2", 30), ("v3", 20)]));
    let users: Vec<(String, String)> = (0..600).map(|_| worker.ask(&[])).map(|(v, c)| (v, c.unwrap())).collect();
    let mut fewer = sticky(&[("v1", 50), ("v2", 30), ("v3", 20)]);
    fewer["versions"][0]["serving"] = json!(false);
    worker.apply(fewer);
    let mut handed_on: BTreeMap<String, u32> = BTreeMap::new();
    for (version, cookie) in &users {
        let (now, set) = worker.ask(&[("cookie", cookie)]);
        if version == "v1" {
            let again = set.unwrap();
            assert_eq!(worker.ask(&[("cookie", &again)]), (now.clone(), None), "and stay there");
            *handed_on.entry(now).or_default() += 1;
        } else {
            assert_eq!((&now, set), (version, None));
        }
    }
    assert!((297..=303).contains(&handed_on.values().sum::<u32>()), "half of them, by turn: {handed_on:?}");
    assert!((150..=210).contains(&handed_on["v2"]), "3 to 2: {handed_on:?}");
}

#[test]
fn cookies_that_do_not_hold_are_replaced_and_choose_nothing() {
    let mut other = sticky(&[("v1", 99), ("v2", 1)]);
    other["session"]["secret"] = json!("another");
    let foreign = Worker::new(other).ask(&[]).1.unwrap();
    let mut worker = Worker::new(sticky(&[("v1", 99), ("v2", 1)]));
    let own = worker.ask(&[]).1.unwrap();
    let forged = own.replace("v1", "v2");
    for cookie in ["s=v2", "s=", "s", "s=v2~0~0000000000000001~0000000000000000", &foreign, &forged, "s=\u{ff}~~~"] {
        let chosen: Vec<String> = (0..50)
            .map(|_| {
                let (version, set) = worker.ask(&[("cookie", cookie)]);
                assert!(set.is_some(), "{cookie}");
                version
            })
            .collect();
        assert!(chosen.iter().filter(|version| *version == "v2").count() <= 2, "{cookie} chooses");
    }
    // One that holds is found among others of its name, which a page on another path may have set.
    assert_eq!(worker.ask(&[("cookie", &format!("a=b; s=v2; {own}"))]), ("v1".to_owned(), None));
    // A retired version's cookie is replaced even where there is only one version left.
    worker.apply(sticky(&[("v3", 1)]));
    let (version, set) = worker.ask(&[("cookie", &own)]);
    assert_eq!((version.as_str(), set.is_some()), ("v3", true));
    assert_eq!(worker.ask(&[]), ("v3".to_owned(), None), "nothing to remember");
}

#[test]
fn a_new_generation_revokes_what_users_were_given() {
    let mut service = sticky(&[("v1", 50), ("v2", 50)]);
    let mut worker = Worker::new(service.clone());
    let users: Vec<String> = (0..400).map(|_| worker.ask(&[])).filter(|u| u.0 == "v2").map(|u| u.1.unwrap()).collect();
    service["session"]["generation"] = json!(1);
    service["versions"][1]["weight"] = json!(1);
    worker.apply(service);
    let on_v2 = users.iter().filter(|cookie| {
        let (version, set) = worker.ask(&[("cookie", cookie)]);
        assert!(set.is_some());
        version == "v2"
    });
    assert!(on_v2.count() <= 15, "1 of 51 is about 4 of 200");
}

#[test]
fn a_new_secret_moves_nobody_while_the_one_before_holds() {
    let mut service = sticky(&[("v1", 50), ("v2", 50)]);
    (service["session"]["secret"], service["step"]) = (json!("one"), json!(3));
    let mut worker = Worker::new(service.clone());
    let users: Vec<(String, String)> = (0..100).map(|_| worker.ask(&[])).map(|(v, c)| (v, c.unwrap())).collect();
    (service["session"]["secret"], service["step"]) = (json!("two"), json!(4));
    service["session"]["previousSecrets"] = json!(["zero", "one"]);
    worker.apply(service.clone());
    let mut renewed = Vec::new();
    for (version, cookie) in &users {
        assert!(!worker.decide(&[("cookie", cookie)]).is_compared, "given at an earlier step");
        let (now, set) = worker.ask(&[("cookie", cookie)]);
        assert_eq!(&now, version);
        let again = set.unwrap();
        // It is renewed once, and still says when the user was given the version.
        let decision = worker.decide(&[("cookie", &again)]);
        assert!(decision.cookie.is_none() && !decision.is_compared);
        renewed.push((version.clone(), again));
    }
    // Later the one before holds no longer: a user who was away meanwhile begins again.
    service["session"].as_object_mut().unwrap().remove("previousSecrets");
    worker.apply(service);
    for ((version, again), (_, old)) in renewed.into_iter().zip(&users) {
        assert_eq!(worker.ask(&[("cookie", &again)]), (version, None));
        assert!(worker.ask(&[("cookie", old)]).1.is_some());
    }
}

#[test]
fn the_cookie_is_for_the_proxy_alone_and_secure_on_tls() {
    let mut worker = Worker::new(sticky(&[("v1", 1), ("v2", 1)]));
    let cookie = worker.decide(&[(":scheme", "http")]).cookie.unwrap();
    let (value, attributes) = cookie.split_once("; ").unwrap();
    assert!(value.starts_with("s=v"), "{value}");
    assert_eq!(attributes, "Path=/; Max-Age=86400; HttpOnly; SameSite=Lax");
    let cookie = worker.decide(&[(":scheme", "https")]).cookie.unwrap();
    assert!(cookie.ends_with("; HttpOnly; SameSite=Lax; Secure"), "{cookie}");
}

#[test]
fn a_user_with_a_header_stays_by_its_hash() {
    let service = |v1: u32, v2: u32| {
        let versions =
            json!([{"name": "v1", "weight": v1}, {"name": "v2", "weight": v2}, {"name": "v3", "weight": 20}]);
        json!({"name": "checkout", "versions": versions, "session": {"type": "Header", "name": "x-user"}})
    };
    let mut worker = Worker::new(service(100, 0));
    let users: Vec<String> = (0..300).map(|i| format!("user-{i}")).collect();
    let mut before: Vec<String> = users.iter().map(|user| worker.ask(&[("x-user", user)]).0).collect();
    for weight in [1, 5, 25, 50, 100, 1_000, 100_000] {
        worker.apply(service(100, weight));
        for (user, before) in users.iter().zip(&mut before) {
            let (now, cookie) = worker.ask(&[("x-user", user)]);
            assert!(now == *before || now == "v2", "{user}: {before} to {now}");
            assert_eq!(cookie, None);
            *before = now;
        }
    }
    // Users without a name come by turn, as if there were no session.
    let turns: Vec<Reason> = [&[][..], &[("x-user", "")]].iter().map(|headers| worker.decide(headers).reason).collect();
    assert!(turns.iter().all(|reason| matches!(reason, Reason::Weight(..))), "{turns:?}");
}

/// Rule, then session, then weight.
#[test]
fn a_rule_goes_before_the_session_which_goes_before_the_weights() {
    let mut service = sticky(&[("v1", 50), ("v2", 50), ("v3", 0)]);
    service["rules"] = json!([
        {"matches": [{"headers": [{"name": "x-one", "type": "Present"}]}], "versions": [{"name": "v3"}]},
        {"matches": [{"headers": [{"name": "x-two", "type": "Present"}]}], "versions": [{"name": "v2"}, {"name": "v3"}]},
    ]);
    let mut worker = Worker::new(service);
    let users: Vec<(String, String)> = (0..100).map(|_| worker.ask(&[])).map(|(v, c)| (v, c.unwrap())).collect();
    for (version, cookie) in &users {
        let ask = |worker: &mut Worker, header| worker.ask(&[(header, "1"), ("cookie", cookie)]);
        assert_eq!(ask(&mut worker, "x-one"), ("v3".to_owned(), None), "the rule's only version");
        let (first, set) = ask(&mut worker, "x-two");
        assert_eq!(set, None, "a rule does not change what the user has elsewhere");
        assert!(first == *version || version == "v1", "of the rule's versions the one that the user has");
        assert_eq!(ask(&mut worker, "x-two").0, first, "and always the same");
        assert_eq!(worker.ask(&[("cookie", cookie)]).0, *version);
    }
    let (under_rule, cookie) = worker.ask(&[("x-two", "1")]);
    let cookie = cookie.unwrap();
    assert_eq!(worker.ask(&[("x-two", "1"), ("cookie", &cookie)]), (under_rule, None), "a new user under a rule");
    assert_eq!(worker.decide(&[("x-one", "1")]).cookie, None);
}

#[test]
fn copies_are_a_share_of_the_safe_requests() {
    let service = json!({
        "name": "checkout",
        "versions": [{"name": "v1"}, {"name": "v2", "weight": 0}, {"name": "v3", "weight": 0, "cluster": "three"}],
        "mirror": {"version": "v2", "percent": 10},
        "rules": [{
            "matches": [{"path": {"value": "/search"}}],
            "versions": [{"name": "v1"}],
            "mirror": {"version": "v3", "methods": ["POST"]},
        }],
    });
    let mut worker = Worker::new(service.clone());
    let copies = |worker: &mut Worker, method: &str, path: &str| {
        let copy = |_| worker.decide(&[(":method", method), (":path", path)]).mirror.map(str::to_owned);
        (0..1_000).filter_map(copy).fold(BTreeMap::new(), |mut copies, cluster| {
            *copies.entry(cluster).or_insert(0) += 1;
            copies
        })
    };
    let copied = copies(&mut worker, "GET", "/");
    assert_eq!(copied.keys().collect::<Vec<_>>(), ["checkout_v2"]);
    assert!((60..=140).contains(&copied["checkout_v2"]), "100, by chance: {copied:?}");
    assert_eq!(copies(&mut worker, "POST", "/"), BTreeMap::new());
    assert_eq!(copies(&mut worker, "POST", "/search"), BTreeMap::from([("three".to_owned(), 1_000)]));
    assert_eq!(copies(&mut worker, "GET", "/search"), BTreeMap::new());
    let mut without = service;
    without["versions"][1]["serving"] = json!(false);
    worker.apply(without);
    assert_eq!(copies(&mut worker, "GET", "/"), BTreeMap::new(), "a version out of service gets no copies either");
}

/// Copies are of requests to each version, whatever its share: the version does not say what is copied.
#[test]
fn each_version_s_requests_are_copied_as_often() {
    const REQUESTS: u32 = 100_000;
    let mut worker = Worker::new(json!({
        "name": "checkout",
        "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}],
        "mirror": {"version": "v1", "percent": 10},
    }));
    let (mut asked, mut copied) = ([0u32; 2], [0u32; 2]);
    for _ in 0..REQUESTS {
        let decision = worker.decide(&[(":method", "GET"), (":path", "/")]);
        let version = decision.version.unwrap();
        asked[version] += 1;
        copied[version] += u32::from(decision.mirror.is_some());
    }
    assert!(asked[1].abs_diff(REQUESTS / 10) <= 25, "{asked:?}");
    for (asked, copied) in asked.into_iter().zip(copied) {
        let due = f64::from(asked) / 10.0;
        assert!((f64::from(copied) - due).abs() < 5.0 * (due * 0.9).sqrt(), "{copied} of {asked}");
    }
}

/// Requests of two services, of a service and of its rule, called in turn: the version of one says nothing about the other's.
#[test]
fn splits_that_are_used_in_turn_do_not_move_in_step() {
    const PAIRS: usize = 10_000;
    let versions = json!([{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}]);
    let service = |name: &str| {
        let rule = json!({"matches": [{"path": {"value": "/search"}}], "versions": versions});
        json!({"name": name, "hostnames": [name], "versions": versions, "rules": [rule]})
    };
    let policy = |names: &[&str]| {
        let services: Vec<Value> = names.iter().map(|name| service(name)).collect();
        Plan::new(&Policy::read(&json!({"revision": 1, "services": services})).unwrap(), |_, _| false)
    };
    let calls = [("cart", "/"), ("cart", "/search"), ("shop", "/"), ("shop", "/search")];
    let check = |plan: &Plan, turns: &mut Turns| {
        let mut both = [[0; 4]; 4];
        for _ in 0..PAIRS {
            let on_v2 = calls.map(|(host, path)| {
                let request = [(":authority", host), (":method", "GET"), (":path", path)];
                plan.decide(&request[..], turns, || 0).unwrap().version == Some(1)
            });
            for (i, counts) in both.iter_mut().enumerate() {
                counts.iter_mut().zip(on_v2).for_each(|(count, other)| *count += usize::from(on_v2[i] && other));
            }
        }
        for (i, counts) in both.iter().enumerate() {
            for (j, count) in counts.iter().enumerate().filter(|(j, _)| *j != i) {
                assert!(count.abs_diff(PAIRS / 100) <= 40, "{:?} and {:?}: {both:?}", calls[i], calls[j]);
            }
        }
    };
    let one = policy(&["shop"]);
    let turns = Turns::for_plan(&one, 1, None);
    // A service that comes before one that goes on starts apart from it.
    let two = policy(&["cart", "shop"]);
    for mut turns in [Turns::for_plan(&two, 1, Some((&one, &turns))), Turns::for_plan(&two, 1, None)] {
        check(&two, &mut turns);
    }
}

/// A request of which only these headers can be seen, as in a proxy that reads no others.
struct Seen<'a>(&'a [(&'a str, &'a str)], Option<&'a [String]>);

impl Request for Seen<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        if self.1.is_some_and(|names| !names.iter().any(|known| known == name)) {
            return None;
        }
        self.0.header(name)
    }
}

/// A field of a match that the plan did not count among the headers it looks at, or that the rules' index passed over,
/// would never match, or always.
#[test]
fn match_on_each_field_is_honoured() {
    let request = [
        (":authority", "shop.test"),
        (":method", "PUT"),
        (":path", "/cart?q=1"),
        ("x-beta", "1"),
        ("cookie", "canary=always"),
    ];
    let samples = [
        ("headers", json!([{"name": "x-beta", "value": "1"}]), json!([{"name": "x-beta", "value": "2"}])),
        ("headers", json!([{"name": "host", "value": "shop.test"}]), json!([{"name": "host", "value": "b.test"}])),
        ("headers", json!([{"name": "cookie", "type": "Present"}]), json!([{"name": "cookies", "type": "Present"}])),
        ("cookies", json!([{"name": "canary", "value": "always"}]), json!([{"name": "canary", "value": "never"}])),
        ("queryParams", json!([{"name": "q", "value": "1"}]), json!([{"name": "q", "value": "2"}])),
        ("path", json!({"value": "/cart"}), json!({"value": "/search"})),
        ("path", json!({"type": "Exact", "value": "/cart"}), json!({"type": "Exact", "value": "/"})),
        ("method", json!("PUT"), json!("GET")),
    ];
    let service = |matches: Value| {
        let rules = json!([{"matches": [matches], "versions": [{"name": "v2"}]}]);
        json!({"name": "shop", "versions": [{"name": "v1"}, {"name": "v2", "weight": 0}], "rules": rules})
    };
    let mut fields = BTreeMap::new();
    for (field, holds, fails) in samples {
        for (value, expected) in [(&holds, Some(0)), (&fails, None)] {
            let plan = plan(service(json!({field: value})));
            for names in [None, plan.few_headers()] {
                let rule = plan.route(&Seen(&request, names)).unwrap().rule;
                assert_eq!(rule, expected, "{field}: {value}, of {names:?}");
            }
        }
        fields.insert(field, holds);
    }
    // All fields at once: each of them can make the match fail. (A new field does not compile here before it has a sample.)
    let all = json!(fields);
    let policy = json!({"revision": 1, "services": [service(all.clone())]});
    let Match { headers, cookies, query_params, path, method } =
        &Policy::read(&policy).unwrap().services[0].rules[0].matches[0];
    assert!(!headers.is_empty() && !cookies.is_empty() && !query_params.is_empty());
    assert!(path.is_some() && method.is_some());
    assert_eq!(plan(service(all)).route(&request[..]).unwrap().rule, Some(0));
}
