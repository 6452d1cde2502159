use super::*;
use serde_json::{Value, json};
use tideshift_core::protocol::report::{Report, ServiceReport, VersionReport};

const DEADLINE: Duration = Duration::from_secs(300);

fn document(revision: u64, v1: u32, v2: u32) -> Value {
    json!({"revision": revision, "services": [
        {"name": "shop", "versions": [{"name": "v1", "weight": v1}, {"name": "v2", "weight": v2}]},
    ]})
}

fn policy(revision: u64, v1: u32, v2: u32) -> Policy {
    Policy::read(&document(revision, v1, v2)).unwrap()
}

fn v1() -> VersionKey {
    ("shop".to_owned(), "v1".to_owned())
}

/// A policy in force, and proxies with or without it.
#[derive(Default)]
struct Play {
    idle: DrainTracker,
    services: Vec<Service>,
    proxies: Proxies,
    now: Millis,
}

impl Play {
    fn publish(&mut self, policy: &Policy) -> &mut Self {
        self.idle.publish(policy, &self.services, |_| Some(DEADLINE), self.now);
        self.services.clone_from(&policy.services);
        self
    }

    /// A proxy reports its revision (`None`: not one of ours), its requests of v1 in flight, and its guard's vetoes.
    fn says(&mut self, proxy: &str, revision: Option<u64>, in_flight: u64, vetoed: &[&str]) -> &mut Self {
        let (id, start) = proxy.split_once('/').unwrap_or((proxy, "1"));
        let veto = |version: &&str| {
            serde_json::from_value(json!({"version": version, "until": 0, "strikes": 1, "requests": 9, "errors": 9,
                "othersRequests": 9, "othersErrors": 0}))
            .unwrap()
        };
        let version = VersionReport { name: "v1".to_owned(), in_flight, ..VersionReport::default() };
        let service = ServiceReport {
            name: "shop".to_owned(),
            versions: vec![version],
            vetoes: vetoed.iter().map(veto).collect(),
            ..ServiceReport::default()
        };
        let report = Report {
            epoch: revision.map_or("other", |_| "e").to_owned(),
            revision: revision.unwrap_or(99),
            services: vec![service],
            ..Report::default()
        };
        self.proxies.reported(&(id.to_owned(), start.to_owned()), &report, "e", |_, _| true, self.now);
        self
    }

    fn at(&mut self, now: Millis) -> &mut Self {
        self.now = now;
        self
    }

    fn look(&mut self) -> DrainState {
        self.proxies.forget_silent(self.now);
        self.idle.look(self.now, |_| Some(DEADLINE), &self.proxies, &self.services);
        self.state()
    }

    fn status(&self) -> DrainStatus {
        self.idle.status(&v1(), &self.proxies, &self.services)
    }

    fn state(&self) -> DrainState {
        self.status().state
    }

    fn left(&self) -> Option<(Millis, Millis)> {
        self.idle.left(&v1(), &self.proxies, &self.services)
    }
}

#[test]
fn a_version_has_drained_when_every_proxy_knows_and_nothing_is_in_flight() {
    let mut play = Play::default();
    play.publish(&policy(6, 1, 1)).says("edge", Some(6), 0, &[]);
    assert_eq!(play.look(), DrainState::Serving);
    play.at(1_000).publish(&policy(7, 0, 1)).says("edge", Some(7), 0, &[]);
    assert_eq!(play.left(), None, "nobody has looked yet");
    play.at(2_000);
    for (revision, in_flight, message) in [
        (None, 0, "waiting for proxy other to apply revision 7"),
        (Some(6), 0, "waiting for proxy other to apply revision 7"),
        (Some(7), 1, "1 in flight"),
    ] {
        play.says("other", revision, in_flight, &[]);
        assert_eq!((play.look(), play.status().message.as_str()), (DrainState::Draining, message));
    }
    play.at(21_300).says("edge", Some(7), 0, &[]).says("other", Some(9), 0, &[]);
    assert_eq!(play.look(), DrainState::Drained);
    assert!(play.status().message.contains("after 20.3 s"));
    assert_eq!(play.left(), Some((1_000, 21_300)));
    // It stays drained with later policies, until it is given traffic.
    play.publish(&policy(8, 0, 1));
    assert_eq!(play.look(), DrainState::Drained);
    play.publish(&policy(9, 1, 1));
    assert_eq!(play.look(), DrainState::Serving);
}

#[test]
fn the_deadline_is_the_fallback_and_says_what_was_missing() {
    let mut play = Play::default();
    play.publish(&policy(7, 0, 1)).at(299_999).says("edge", Some(7), 2, &[]);
    assert_eq!(play.look(), DrainState::Draining);
    play.at(300_000);
    assert_eq!(play.look(), DrainState::DeadlineExceeded);
    assert_eq!(play.status().message, "after 300.0 s still 2 in flight");
    // A drain that completes after the deadline counts as drained.
    play.at(310_000).says("edge", Some(7), 0, &[]);
    assert_eq!(play.look(), DrainState::Drained);
}

#[test]
fn without_proxies_there_is_only_the_deadline() {
    let mut play = Play::default();
    play.publish(&policy(7, 0, 1)).at(299_999);
    assert_eq!((play.look(), play.status().message.as_str()), (DrainState::Draining, "no proxy has reported"));
    play.at(300_000);
    assert_eq!(play.look(), DrainState::DeadlineExceeded);
    assert_eq!(play.status().message, "after 300.0 s still no proxy has reported");
    assert_eq!(play.left(), None, "nobody can say that traffic has left");
}

#[test]
fn a_proxy_that_gives_it_requests_after_all_takes_it_back() {
    let mut play = Play::default();
    play.publish(&policy(7, 0, 1)).says("edge", Some(7), 0, &[]);
    for (came, revision, in_flight) in [(400_000, None, 0), (500_000, Some(7), 1)] {
        play.at(came).says("edge", Some(7), 0, &[]).says("late", Some(7), 0, &[]);
        assert_eq!(play.look(), DrainState::Drained);
        play.says("late", revision, in_flight, &[]);
        assert_eq!(play.left(), None, "at once");
        assert_eq!(play.look(), DrainState::Draining);
        // The deadline starts again, so it has not passed.
        play.at(came + 50_000).says("edge", Some(7), 0, &[]).says("late", revision, in_flight, &[]);
        assert_eq!(play.look(), DrainState::Draining);
        assert_eq!(play.status().since, Some(crate::reconciler::timestamp(came)));
    }
    // A proxy that is only silent does not restart the drain.
    play.says("late", Some(7), 0, &[]).look();
    play.at(900_000);
    assert_eq!((play.look(), play.left()), (DrainState::Drained, None));
}

#[test]
fn who_gets_what_guards_keep_from_all_others_has_not_drained() {
    let mut play = Play::default();
    play.publish(&policy(7, 0, 1)).says("edge", Some(7), 0, &["v2"]).says("other", Some(7), 0, &[]);
    assert_eq!(play.look(), DrainState::Draining);
    assert_eq!(play.status().message, "given requests where guards keep out all others: proxy edge");
    play.says("edge", Some(7), 0, &[]);
    assert_eq!(play.look(), DrainState::Drained);
    play.says("edge", Some(7), 0, &["v2"]);
    assert_eq!(play.look(), DrainState::Draining);
    // Out of service it gets no traffic, whatever the guards veto.
    let mut out = document(8, 0, 1);
    out["services"][0]["versions"][0]["serving"] = json!(false);
    play.publish(&Policy::read(&out).unwrap());
    assert_eq!(play.look(), DrainState::Drained);
}

#[test]
fn who_was_there_before_a_restart_is_waited_for_until_it_is_silent_for_a_minute() {
    let run = |id: &str| (id.to_owned(), "1".to_owned());
    let (edge, gone) = (run("edge"), run("gone"));
    let mut play = Play { proxies: Proxies::awaiting([(&edge, 5_000), (&gone, 5_000)].into_iter()), ..Play::default() };
    play.publish(&policy(7, 0, 1)).at(100_000);
    play.proxies.listen(100_000);
    assert_eq!(play.look(), DrainState::Draining);
    play.says("edge", Some(7), 0, &[]);
    assert_eq!(
        (play.look(), play.status().message.as_str()),
        (DrainState::Draining, "waiting for proxy gone to report")
    );
    assert_eq!(play.proxies.status().len(), 1, "who has said nothing is not shown");
    play.at(160_000).says("edge", Some(7), 0, &[]);
    assert_eq!(play.look(), DrainState::Draining);
    play.at(160_001);
    assert_eq!(play.look(), DrainState::Drained);
}

#[test]
fn a_newer_run_of_a_proxy_ends_an_older_one_that_is_silent() {
    let mut play = Play::default();
    play.publish(&policy(7, 0, 1)).says("edge/ff", Some(7), 3, &[]).says("egde/1", Some(7), 1, &[]);
    play.at(5_000).says("edge/100", Some(7), 0, &[]);
    assert_eq!(play.status().in_flight, 4, "it may be ending its requests");
    play.at(5_001).says("edge/100", Some(7), 0, &[]);
    assert_eq!(play.status().in_flight, 1, "another proxy's are its own");
    play.at(11_000).says("edge/ff", Some(7), 3, &[]);
    assert_eq!((play.status().in_flight, play.proxies.status().len()), (4, 3), "an older one ends nobody");
}

#[test]
fn who_leaves_the_document_drains_all_the_same() {
    let without = json!({"revision": 8, "services": [{"name": "shop", "versions": [{"name": "v2"}]}]});
    let without = Policy::read(&without).unwrap();
    let nothing = Policy { revision: 9, ..Policy::default() };
    for leaves in [&[&without][..], &[&without, &nothing], &[&nothing]] {
        for drains in [false, true] {
            let mut play = Play::default();
            play.publish(&policy(6, 1, 1)).says("edge", Some(6), 1, &[]);
            if drains {
                play.publish(&policy(7, 0, 1)).says("edge", Some(7), 1, &[]).look();
            }
            for policy in leaves {
                play.publish(policy);
            }
            play.at(10_000).says("edge", Some(9), 1, &[]);
            assert_eq!((play.look(), play.status().message.as_str()), (DrainState::Draining, "1 in flight"));
            play.at(20_000).says("edge", Some(9), 0, &[]);
            assert_eq!(play.look(), DrainState::Drained);
            // The status reports the result; then it is forgotten.
            play.at(620_000).look();
            assert!(play.idle.has("shop", "v1"));
            play.at(620_001).look();
            assert!(!play.idle.has("shop", "v1"));
        }
    }
}

#[test]
fn a_rule_or_a_mirror_gives_a_version_requests_too() {
    let state = |document: &Value| {
        let mut play = Play::default();
        play.publish(&Policy::read(document).unwrap());
        play.state()
    };
    for (field, value) in [("rules", json!([{"versions": [{"name": "v1"}]}])), ("mirror", json!({"version": "v1"}))] {
        let mut with = document(1, 0, 1);
        with["services"][0][field] = value;
        assert_eq!(state(&with), DrainState::Serving, "{field}");
    }
    let mut out = document(1, 1, 1);
    out["services"][0]["versions"][0]["serving"] = json!(false);
    assert_eq!(state(&out), DrainState::Draining);
}
