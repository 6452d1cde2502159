//! Reconciling only what has changed gives the same result as reconciling everything, for any sequence of events; and
//! the cost depends only on what has changed.

use super::*;
use crate::metrics::Claim;
use crate::rollout::Command;
use proptest::prelude::*;
use tideshift_core::guard::Veto;
use tideshift_core::protocol::report::Tally;

const DOCUMENTS: [&[&str]; 3] = [&["a"], &["b"], &["c1", "c2"]];
const SERVICES: [&str; 4] = ["a", "b", "c1", "c2"];
const PROXIES: [&str; 2] = ["edge", "other"];

/// The events.
#[derive(Debug, Clone)]
enum Event {
    /// Time passes, in this many steps of this many milliseconds; proxies report after each of them.
    Passes { steps: u8, millis: u64, reports: bool },
    /// The controller stalls.
    StandsStill(u64),
    /// A document is edited.
    Edited { document: usize, kind: u8 },
    /// A document is removed or comes back.
    Listed { document: usize, is_listed: bool },
    /// This many endpoints of a version are ready; or the readiness is not known.
    Ready { service: usize, version: usize, ready: u8, known: bool },
    /// A proxy reports these counts of a service.
    Reports { proxy: usize, service: usize, said: Said },
    /// A user gives a command.
    Wants { document: usize, what: u8 },
    /// A gate answers.
    Answers(bool),
    /// Counts can be persisted, or cannot.
    Keeps(bool),
}

/// A proxy's report of a service.
#[derive(Debug, Clone, Copy, Default)]
struct Said {
    ok: u64,
    errors: u64,
    astray: u64,
    in_flight: u64,
    vetoes: bool,
    is_behind: bool,
}

fn events() -> impl Strategy<Value = Event> {
    let document = || 0..DOCUMENTS.len();
    let service = || 0..SERVICES.len();
    let passes = (1u8..8, prop::sample::select(vec![20, 100, 1_000, 3_000]), prop::bool::weighted(0.8));
    let ready = (service(), 0..2usize, 0u8..3, prop::bool::weighted(0.9));
    let said = (0..400u64, 0..30u64, 0..3u64, 0..2u64, prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let said = said.prop_map(|(ok, errors, astray, in_flight, vetoes, is_behind)| Said {
        ok: if astray > 0 { 0 } else { ok },
        errors: errors.saturating_sub(25),
        astray,
        in_flight,
        vetoes,
        is_behind,
    });
    prop_oneof![
        8 => passes.prop_map(|(steps, millis, reports)| Event::Passes { steps, millis, reports }),
        1 => (3_000u64..100_000).prop_map(Event::StandsStill),
        2 => (document(), 0u8..7).prop_map(|(document, kind)| Event::Edited { document, kind }),
        1 => (document(), prop::bool::weighted(0.7)).prop_map(|(document, is_listed)| Event::Listed { document, is_listed }),
        4 => ready.prop_map(|(service, version, ready, known)| Event::Ready { service, version, ready, known }),
        6 => (0..2usize, service(), said).prop_map(|(proxy, service, said)| Event::Reports { proxy, service, said }),
        3 => (document(), 0u8..7).prop_map(|(document, what)| Event::Wants { document, what }),
        1 => any::<bool>().prop_map(Event::Answers),
        1 => any::<bool>().prop_map(Event::Keeps),
    ]
}

/// Two controllers that receive the same events. One of them reconciles everything each time.
struct Both {
    changed: Reconciler,
    full: Reconciler,
    now: Millis,
    kinds: [u8; 3],
    listed: [bool; 3],
    readiness: Readiness,
    counts: BTreeMap<(usize, usize), [u64; 3]>,
    sequences: [u64; 2],
}

fn spec(document: usize, kind: u8) -> Value {
    let version = |name: &&str| json!({"name": name, "endpoints": ["127.0.0.1:9001", "127.0.0.1:9002"]});
    let versions: Vec<Value> = VERSIONS.iter().map(version).collect();
    let steps =
        |hold: u64| json!([{"weight": 10, "holdSeconds": hold}, {"weight": 50, "pause": true}, {"weight": 100}]);
    let mut spec = json!({"stable": "v1", "target": "v2", "drain": {"timeoutSeconds": 20}});
    let more = match kind {
        0 => json!({"target": null}),
        1 => json!({"strategy": {"steps": steps(2)}}),
        2 => json!({"strategy": {"steps": steps(5), "minReadySeconds": 4, "progressDeadlineSeconds": 6}}),
        3 => {
            json!({"strategy": {"steps": [{"weight": 20, "holdSeconds": 3}, {"weight": 100}], "warmUp": {"mirrorPercent": 5, "seconds": 7}}})
        }
        4 => {
            json!({"strategy": {"steps": steps(1)}, "webhooks": [{"name": "gate", "type": "Gate", "url": "http://127.0.0.1:1"}]})
        }
        5 => json!({"stable": "v2", "target": null}),
        _ => {
            json!({"strategy": {"steps": [{"weight": 100}], "progressDeadlineAbort": true, "progressDeadlineSeconds": 3}, "analysis": {"maxErrors": 9},
            "session": {"type": "Cookie", "name": "c"}})
        }
    };
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    match DOCUMENTS[document] {
        [_] => spec["versions"] = versions.into(),
        several => {
            spec.as_object_mut().unwrap().remove("session");
            spec["services"] =
                several.iter().map(|name| json!({"name": name, "hostnames": [name], "versions": versions})).collect();
        }
    }
    spec
}

impl Both {
    fn new() -> Self {
        let kept = PersistedState::fresh("e".to_owned()).unwrap();
        let reconciler = || Reconciler::new(Vec::new(), kept.clone(), CountState::default());
        let mut readiness = Readiness::default();
        let states = crate::reconciler::tests::readiness().services["shop"]["v1"].clone();
        for service in SERVICES {
            let both = [
                states[0].clone(),
                EndpointState { endpoint: Endpoint { port: 9002, ..states[0].endpoint.clone() }, ..states[0].clone() },
            ];
            let versions = VERSIONS.iter().map(|name| ((*name).to_owned(), both.to_vec())).collect();
            readiness.services.insert(service.to_owned(), versions);
        }
        let mut both = Self {
            changed: reconciler(),
            full: reconciler(),
            now: 1_000_000,
            kinds: [4, 2, 1],
            listed: [true; 3],
            readiness,
            counts: BTreeMap::new(),
            sequences: [0; 2],
        };
        both.edit();
        both.each(|reconciler, readiness| reconciler.set_readiness(readiness));
        both
    }

    fn each(&mut self, mut happens: impl FnMut(&mut Reconciler, Arc<Readiness>)) {
        let readiness = Arc::new(self.readiness.clone());
        happens(&mut self.changed, readiness.clone());
        happens(&mut self.full, readiness);
    }

    fn edit(&mut self) {
        let listed = (0..DOCUMENTS.len()).filter(|n| self.listed[*n]);
        let documents: Vec<_> = listed
            .map(|n| {
                let document = json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
                    "metadata": {"name": DOCUMENTS[n][0]}, "spec": with_host(spec(n, self.kinds[n]), DOCUMENTS[n][0])});
                (TrafficShift::read(&document).unwrap(), document)
            })
            .collect();
        self.each(|reconciler, _| reconciler.set_documents(documents.clone()));
    }

    fn happens(&mut self, event: &Event) {
        let now = self.now;
        match event.clone() {
            Event::Passes { steps, millis, reports } => {
                for _ in 0..steps {
                    self.now += millis;
                    for proxy in (0..PROXIES.len()).filter(|_| reports) {
                        let said = Said { ok: 20, ..Said::default() };
                        (0..SERVICES.len()).for_each(|service| self.report(proxy, service, said));
                    }
                    self.evaluate();
                }
            }
            Event::StandsStill(millis) => self.now += millis,
            Event::Edited { document, kind } => {
                self.kinds[document] = kind;
                self.edit();
            }
            Event::Listed { document, is_listed } => {
                self.listed[document] = is_listed;
                self.edit();
            }
            Event::Ready { service, version, ready, known } => {
                let endpoints =
                    self.readiness.services.get_mut(SERVICES[service]).unwrap().get_mut(VERSIONS[version]).unwrap();
                for (n, endpoint) in endpoints.iter_mut().enumerate() {
                    (endpoint.ready, endpoint.known) = (n < usize::from(ready), known);
                }
                self.each(|reconciler, readiness| reconciler.set_readiness(readiness));
            }
            Event::Reports { proxy, service, said } => self.report(proxy, service, said),
            Event::Wants { document, what } => {
                let command = match what {
                    0 => Command::Promote { full: false, override_gates: true },
                    1 => Command::Pause,
                    2 => Command::Resume,
                    3 => Command::Abort,
                    4 => Command::SetWeight { weight: 30, override_gates: true },
                    5 => Command::SetTarget { target: "v2".to_owned() },
                    _ => Command::Rollback { to: "v1".to_owned(), override_gates: true },
                };
                let name = DOCUMENTS[document][0];
                assert_eq!(self.changed.command(name, &command, now), self.full.command(name, &command, now));
            }
            Event::Answers(allowed) => self.each(|reconciler, _| {
                for (question, _) in reconciler.questions() {
                    reconciler.gate_answered(&question, allowed, "not today");
                }
            }),
            Event::Keeps(keeps) => {
                self.each(|reconciler, _| reconciler.set_counts_error((!keeps).then_some("no room")))
            }
        }
        self.evaluate();
    }

    fn report(&mut self, proxy: usize, service: usize, said: Said) {
        let now = self.now;
        let counts = self.counts.entry((proxy, service)).or_default();
        for (sum, more) in counts.iter_mut().zip([said.ok, said.errors, said.astray]) {
            *sum += more;
        }
        let [ok, errors, misrouted] = *counts;
        self.sequences[proxy] += 1;
        let version = |name: &str, ok: u64, error: u64, misrouted: u64| {
            let (ended, in_flight) = (Counts { ok, error, ..Counts::default() }, said.in_flight);
            let dealt = Tally { started: ended.total() + in_flight, ended, ..Tally::default() };
            VersionReport { name: name.to_owned(), ended, in_flight, dealt, misrouted, ..VersionReport::default() }
        };
        let veto = Veto {
            version: "v2".to_owned(),
            until: (now + 10_000) * 1_000_000,
            strikes: 1,
            requests: errors,
            errors,
            others_requests: 10 * ok,
            others_errors: 0,
        };
        let versions = vec![version("v1", 10 * ok, 0, 0), version("v2", ok, errors, misrouted)];
        let vetoes = if said.vetoes { vec![veto] } else { Vec::new() };
        let of = ServiceReport { name: SERVICES[service].to_owned(), versions, vetoes, ..ServiceReport::default() };
        let sequence = self.sequences[proxy];
        self.each(|reconciler, _| {
            let report = Report {
                proxy: PROXIES[proxy].to_owned(),
                start: "1".to_owned(),
                sequence,
                format: Report::FORMAT,
                epoch: "e".to_owned(),
                revision: reconciler.kept().revision.saturating_sub(u64::from(said.is_behind)),
                services: vec![of.clone()],
                ..Report::default()
            };
            let is_fair = |claim: Claim| matches!(claim, Claim::Veto | Claim::Sequence);
            let reported = reconciler.reported(&report, now);
            assert!(reported.ignored.iter().all(|(claim, _)| is_fair(*claim)), "{:?}", reported.ignored);
        });
    }

    fn evaluate(&mut self) {
        let now = self.now;
        let full = &mut self.full;
        full.due.mark_all();
        full.changed_ready.extend(SERVICES.map(str::to_owned));
        (full.all_recounted, full.unpublished) = (true, true);
        (full.young_until, full.drains.1) = (Some(0), Some(0));
        let seen = |reconciler: &mut Reconciler| {
            let ReconcileOutput { policy, keep, transitions, messages } = reconciler.evaluate(now);
            if let Some(policy) = &policy {
                reconciler.set_published(policy);
            }
            let questions: Vec<_> = reconciler.questions().into_iter().map(|(question, _)| question).collect();
            (policy, keep, transitions, messages, questions, reconciler.status(now))
        };
        assert_eq!(seen(&mut self.changed), seen(&mut self.full));
        assert_eq!(self.changed.kept, self.full.kept);
        assert_eq!(self.changed.counted, self.full.counted);
    }
}

fn with_host(mut spec: Value, name: &str) -> Value {
    if spec.get("services").is_none() {
        spec["hostnames"] = json!([name]);
    }
    spec
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_has_changed_is_enough_to_look_at(events in prop::collection::vec(events(), 1..50)) {
        let mut both = Both::new();
        for event in &events {
            both.happens(event);
        }
        let series = |reconciler: &Reconciler| DOCUMENTS.map(|of| reconciler.series(of[0], both.now));
        prop_assert_eq!(series(&both.changed), series(&both.full));
    }
}

#[test]
fn time_alone_is_enough_to_look() {
    for reports in [0, 40, 80] {
        let mut both = Both::new();
        for (document, kind) in [(0, 1), (1, 2), (2, 6)] {
            both.happens(&Event::Edited { document, kind });
        }
        both.happens(&Event::Ready { service: 1, version: 1, ready: 0, known: true });
        both.happens(&Event::Keeps(false));
        for n in 0..200 {
            both.now += 100;
            if n % 10 == 0 && n < 2 * reports {
                // The proxies continue to report, without new counts.
                let said = Said { ok: if n < reports { 20 } else { 0 }, ..Said::default() };
                (0..SERVICES.len()).for_each(|service| both.report(0, service, said));
            }
            both.evaluate();
            if n == 110 {
                both.happens(&Event::Keeps(true));
            }
        }
    }
}

/// This many documents without a rollout under way, all of them reconciled.
fn at_rest(number: usize) -> Reconciler {
    let names: Vec<String> = (0..number).map(|n| format!("s{n}")).collect();
    let one = crate::reconciler::tests::readiness().services["shop"].clone();
    let files = names.iter().map(|name| {
        let document = json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": name},
            "spec": with_host(spec(0, 0), name)});
        (TrafficShift::read(&document).unwrap(), document)
    });
    let mut reconciler =
        Reconciler::new(files.collect(), PersistedState::fresh("e".to_owned()).unwrap(), CountState::default());
    let services = names.iter().map(|name| (name.clone(), one.clone())).collect();
    reconciler.set_readiness(Arc::new(Readiness { services, ..Readiness::default() }));
    for n in 0..50 {
        reconciler.evaluate(1_000_000 + 100 * n);
    }
    reconciler
}

#[test]
fn documents_at_rest_are_not_looked_at() {
    let mut reconciler = at_rest(20);
    let looks = |reconciler: &Reconciler| reconciler.due.documents().iter().map(|of| of.looks).collect::<Vec<_>>();
    let before = looks(&reconciler);
    for n in 50..1_000 {
        reconciler.evaluate(1_000_000 + 100 * n);
    }
    assert_eq!(looks(&reconciler), before);
    // A report, an endpoint and a command cause a reconcile of their own document only.
    let mut readiness = (*reconciler.readiness).clone();
    readiness.services.get_mut("s3").unwrap().get_mut("v2").unwrap()[0].ready = false;
    reconciler.set_readiness(Arc::new(readiness));
    let command = Command::SetTarget { target: "v2".to_owned() };
    reconciler.command("s7", &command, 1_100_000).unwrap();
    reconciler.evaluate(1_100_000);
    let after = looks(&reconciler);
    let looked: Vec<usize> = (0..20).filter(|n| after[*n] > before[*n]).collect();
    assert_eq!(looked, [3, 7]);
}
