//! A controller that is killed at each of its writes in turn, with a proxy that continues to count. Time is simulated.

use super::*;
use crate::clock::Millis;
use crate::readiness::{EndpointState, Readiness};
use crate::rollout::{Phase, Reason};
use crate::status::ServiceStatus;
use futures_util::FutureExt;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use tideshift_core::counts::Counts;
use tideshift_core::protocol::policy::Policy;
use tideshift_core::protocol::report::{Report, ServiceReport, VersionReport};
use tideshift_core::shift::{Endpoint, TrafficShift};

type File = RefCell<Option<String>>;

/// Two files, and when the process that writes them is killed.
#[derive(Debug, Default)]
struct Files {
    kept: File,
    counted: File,
    /// How many writes the process has left, and whether the last one is completed; `None`: no limit.
    left: Cell<Option<(usize, bool)>>,
    writes: Cell<usize>,
}

impl Files {
    fn write(&self, file: &File, text: String) -> Result<usize, KeepError> {
        let left = self.left.get();
        if left.is_none_or(|(left, is_last_done)| left > 1 || (left == 1 && is_last_done)) {
            *file.borrow_mut() = Some(text);
        }
        self.left.set(left.map(|(left, is_last_done)| (left.saturating_sub(1), is_last_done)));
        self.writes.set(self.writes.get() + 1);
        Ok(0)
    }

    fn is_killed(&self) -> bool {
        self.left.get().is_some_and(|(left, _)| left == 0)
    }
}

impl StateStore for &Files {
    const IS_CONTENDED: bool = false;
    const LIMIT: Option<usize> = None;

    async fn keep(&mut self, kept: &PersistedState) -> Result<usize, KeepError> {
        self.write(&self.kept, serde_json::to_string(kept).unwrap())
    }
}

impl CountsStore for &Files {
    fn limit(&self) -> Option<usize> {
        None
    }

    async fn keep_counts(&mut self, counted: &CountState) -> Result<usize, KeepError> {
        self.write(&self.counted, serde_json::to_string(counted).unwrap())
    }
}

fn read<T: DeserializeOwned>(file: &File) -> Option<T> {
    file.borrow().as_ref().map(|text| serde_json::from_str(text).unwrap())
}

fn documents(target: Option<&str>) -> Vec<(TrafficShift, Value)> {
    let version = |name: &str, port: u16| json!({"name": name, "endpoints": [format!("127.0.0.1:{port}")]});
    let step = |weight: u32| json!({"weight": weight, "holdSeconds": 1});
    let document = json!({
        "apiVersion": "tideshift.dev/v1alpha1",
        "kind": "TrafficShift",
        "metadata": {"name": "shop"},
        "spec": {
            "versions": [version("v1", 9001), version("v2", 9002)],
            "stable": "v1",
            "target": target,
            "strategy": {"steps": [step(20), step(50), step(80)]},
            "analysis": {"maxErrorRate": 0.1},
        },
    });
    vec![(TrafficShift::read(&document).unwrap(), document)]
}

/// Everything is ready.
fn readiness() -> Arc<Readiness> {
    let of = |version: &str, port| {
        let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port };
        (version.to_owned(), vec![EndpointState { endpoint, ready: true, known: true, warming: false, reason: None }])
    };
    let versions = BTreeMap::from([of("v1", 9001), of("v2", 9002)]);
    let services = BTreeMap::from([("shop".to_owned(), versions)]);
    Arc::new(Readiness { services, ..Readiness::default() })
}

/// A proxy: it has requests, and accepts newer policies only.
#[derive(Default)]
struct Proxy {
    policy: Option<Policy>,
    /// All policies so far, by revision.
    seen: BTreeMap<u64, String>,
    due: BTreeMap<String, f64>,
    counts: BTreeMap<String, Counts>,
    fails: Option<String>,
}

impl Proxy {
    fn take(&mut self, policy: Policy) {
        let text = serde_json::to_string(&policy).unwrap();
        let before = self.seen.insert(policy.revision, text.clone());
        assert!(before.is_none_or(|before| before == text), "revision {} is two policies", policy.revision);
        let newest = self.policy.as_ref().map_or(0, |policy| policy.revision);
        assert!(policy.revision >= newest, "revision {} after {newest}", policy.revision);
        self.policy = Some(policy);
    }

    /// This many requests end.
    fn serve(&mut self, requests: u32) {
        let Some(policy) = &self.policy else { return };
        let versions = &policy.services[0].versions;
        let all: u32 = versions.iter().map(|version| version.weight).sum();
        for version in versions {
            let due = self.due.entry(version.name.clone()).or_default();
            *due += f64::from(requests) * f64::from(version.weight) / f64::from(all);
            let now = due.floor();
            *due -= now;
            let counts = self.counts.entry(version.name.clone()).or_default();
            match self.fails.as_ref() == Some(&version.name) {
                true => counts.error += now as u64,
                false => counts.ok += now as u64,
            }
        }
    }

    fn report(&self, epoch: &str) -> Report {
        let version = |(name, ended): (&String, &Counts)| VersionReport {
            name: name.clone(),
            ended: *ended,
            ..VersionReport::default()
        };
        let versions = self.counts.iter().map(version).collect();
        Report {
            proxy: "edge".to_owned(),
            start: "1".to_owned(),
            epoch: epoch.to_owned(),
            revision: self.policy.as_ref().map_or(0, |policy| policy.revision),
            services: vec![ServiceReport { name: "shop".to_owned(), versions, ..ServiceReport::default() }],
            ..Report::default()
        }
    }

    fn of(&self, version: &str) -> u64 {
        self.counts.get(version).map_or(0, Counts::answered)
    }
}

/// In-memory files are written at once.
fn write(writer: &mut StateWriter<&Files, &Files>) {
    assert_eq!(writer.write().now_or_never(), Some(WriteStatus::Safe));
}

/// A process, from its start to its end.
struct Process<'a> {
    reconciler: Reconciler,
    writer: StateWriter<&'a Files, &'a Files>,
    started: Millis,
}

impl<'a> Process<'a> {
    fn start(files: &'a Files, target: Option<&str>, now: Millis) -> Self {
        let kept = read(&files.kept).unwrap_or_else(|| PersistedState::fresh("e".to_owned()).unwrap());
        let mut reconciler = Reconciler::new(documents(target), kept, read(&files.counted).unwrap_or_default());
        reconciler.set_readiness(readiness());
        Self { reconciler, writer: StateWriter::new(files, files, ControllerMetrics::default()), started: now }
    }

    fn service(&self, now: Millis) -> ServiceStatus {
        self.reconciler.status(now).services.remove(0)
    }
}

/// Plays the failure of v2, then its success, while `kill` kills the process: it returns how many writes the process
/// has, and whether the last one is completed.
fn play(mut kill: impl FnMut(usize) -> Option<(usize, bool)>) -> usize {
    const LIMIT: Millis = 600_000;
    let files = Files::default();
    let mut proxy = Proxy { fails: Some("v2".to_owned()), ..Proxy::default() };
    // The target and whether it has failed; and the requests v2 had served when it became the target for the second
    // time.
    let (mut target, mut had) = (Some("v2"), None);
    let (mut starts, mut again, mut told) = (0, 0, 0);
    let mut process: Option<Process<'_>> = None;
    for now in (0..LIMIT).step_by(100) {
        proxy.serve(10);
        if process.is_none() && now >= again {
            files.left.set(kill(starts));
            starts += 1;
            process = Some(Process::start(&files, target, now));
        }
        let Some(alive) = &mut process else { continue };
        let outcome = alive.reconciler.evaluate(now);
        alive.writer.take(&mut alive.reconciler, &outcome);
        if outcome.keep {
            write(&mut alive.writer);
        }
        if !files.is_killed() && (now - alive.started) % 2_000 == 0 {
            alive.writer.take_counts(&mut alive.reconciler);
            write(&mut alive.writer);
        }
        if files.is_killed() {
            process = None;
            again = now + 100 + 700 * (files.writes.get() as u64 % 4);
            continue;
        }
        outcome.policy.into_iter().for_each(|policy| proxy.take(policy));
        let service = alive.service(now);
        let report = |process: &mut Process<'_>| process.reconciler.reported(&proxy.report("e"), now).decides;
        match (service.phase, target, had) {
            (Phase::Succeeded, ..) => {
                let verdict = service.verdict.unwrap();
                let since = told - had.unwrap();
                assert_eq!((verdict.target.requests, verdict.target.errors), (since, 0), "what was judged of v2");
                let history = alive.reconciler.history("shop").unwrap();
                let begins = [Reason::Started, Reason::StepStarted];
                let begun = history.iter().filter(|transition| begins.contains(&transition.reason));
                let begun: Vec<_> = begun.map(|transition| (transition.rollout, transition.step.unwrap())).collect();
                assert_eq!(begun, [(1, 1), (2, 1), (2, 2), (2, 3), (2, 4)], "each step once: {history:#?}");
                return files.writes.get();
            }
            // At once, so that hardly any count of the failure is older than two seconds.
            (Phase::Failed, Some(_), None) => {
                assert_eq!(service.reason, Reason::VerdictFail);
                report(alive);
                (target, proxy.fails) = (None, None);
                alive.reconciler.set_documents(documents(target));
            }
            (Phase::Initialized, None, None) => {
                (target, had) = (Some("v2"), Some(proxy.of("v2")));
                alive.reconciler.set_documents(documents(target));
            }
            (Phase::Failed, ..) => panic!("v2 fails no longer: {}", service.message),
            _ if now % 1_000 == 0 => {
                report(alive);
                told = proxy.of("v2");
            }
            _ => {}
        }
    }
    panic!("it never ends: {target:?}, {starts} starts");
}

#[test]
fn a_kill_at_any_write_neither_repeats_nor_leaves_out_a_step_and_neither_doubles_nor_loses_evidence() {
    let writes = play(|_| None);
    assert!(writes > 20, "{writes} writes");
    for last in 1..=writes {
        for is_done in [false, true] {
            play(|start| (start == 0).then_some((last, is_done)));
        }
    }
}

#[test]
fn nor_do_kills_again_and_again() {
    for writes in 2..12 {
        for is_done in [false, true] {
            play(|start| (start < 40).then_some((writes, is_done)));
        }
    }
}

#[test]
fn an_older_copy_of_the_state_gives_proxies_newer_revisions_all_the_same() {
    let files = Files::default();
    let mut process = Process::start(&files, None, 0);
    let mut proxy = Proxy::default();
    process.reconciler.evaluate(0).policy.into_iter().for_each(|policy| proxy.take(policy));
    // No proxy can be ahead of a state that has just begun.
    let mut forged = proxy.report(&process.reconciler.kept().epoch);
    forged.revision = 41;
    process.reconciler.reported(&forged, 50);
    assert_eq!(process.reconciler.evaluate(50).policy, None);
    *files.kept.borrow_mut() = Some(serde_json::to_string(process.reconciler.kept()).unwrap());
    let mut process = Process::start(&files, None, 60);
    process.reconciler.evaluate(60);
    let mut ahead = proxy.report(&process.reconciler.kept().epoch);
    ahead.revision = 41;
    assert!(process.reconciler.reported(&ahead, 100).decides);
    let outcome = process.reconciler.evaluate(100);
    assert_eq!((outcome.policy.map(|policy| policy.revision), outcome.keep), (Some(42), true));
    // No other controller's revision, and none that leaves no room for more.
    for (epoch, revision) in [("other", 50), ("e", u64::MAX), ("e", 42)] {
        let report = Report { epoch: epoch.to_owned(), revision, ..ahead.clone() };
        process.reconciler.reported(&report, 200);
        assert_eq!(process.reconciler.evaluate(200).policy, None, "{epoch} {revision}");
    }
}

/// A store that another process may have taken over: the results of its writes, in order.
#[derive(Debug)]
struct Contended(Vec<Result<usize, SecretStoreError>>);

impl StateStore for Contended {
    const IS_CONTENDED: bool = true;
    const LIMIT: Option<usize> = Some(1_000);

    async fn keep(&mut self, _: &PersistedState) -> Result<usize, KeepError> {
        Ok(self.0.remove(0)?)
    }
}

impl CountsStore for Contended {
    fn limit(&self) -> Option<usize> {
        Some(1_000)
    }

    async fn keep_counts(&mut self, _: &CountState) -> Result<usize, KeepError> {
        Ok(self.0.remove(0)?)
    }
}

fn away() -> Result<usize, SecretStoreError> {
    Err(SecretStoreError::Refused("tideshift-state".to_owned(), "no answer".to_owned()))
}

#[test]
fn where_another_process_may_have_taken_over_nothing_is_safe_before_it_is_written() {
    let state = Contended(vec![away(), Ok(1), Err(SecretStoreError::LostLeadership)]);
    let mut writer = StateWriter::new(state, Contended(vec![Ok(1)]), ControllerMetrics::default());
    (writer.kept, writer.counted) = (Some(PersistedState::default()), Some(CountState::default()));
    let mut write = || writer.write().now_or_never().unwrap();
    assert_eq!(write(), WriteStatus::Pending, "the counts are safe, what was decided is not");
    assert_eq!(write(), WriteStatus::Safe);
    assert_eq!(write(), WriteStatus::Safe, "there is nothing left to write");
    writer.kept = Some(PersistedState::default());
    assert_eq!(writer.write().now_or_never(), Some(WriteStatus::LostLeadership));
}

#[test]
fn counts_that_cannot_be_kept_hold_up_nothing_that_was_decided() {
    let counts = Contended(vec![away(), Err(SecretStoreError::LostLeadership)]);
    let mut writer = StateWriter::new(Contended(vec![Ok(1), Ok(1)]), counts, ControllerMetrics::default());
    for _ in 0..2 {
        (writer.kept, writer.counted) = (Some(PersistedState::default()), Some(CountState::default()));
        assert_eq!(writer.write().now_or_never(), Some(WriteStatus::Safe), "the second time they are not even tried");
        assert_eq!((writer.trouble(), writer.counts_trouble().is_some()), (None, true));
    }
    assert!(!writer.has_pending() && writer.counted.is_some());
}

#[tokio::test]
async fn counts_are_written_aside_and_tried_again() {
    let counts = Contended(vec![away(), Ok(100), Err(SecretStoreError::LostLeadership)]);
    let mut writer = StateWriter::new(Contended(Vec::new()), counts, ControllerMetrics::default());
    for (safety, trouble) in
        [(WriteStatus::Pending, true), (WriteStatus::Safe, false), (WriteStatus::LostLeadership, false)]
    {
        writer.counted.get_or_insert_default();
        writer.write_aside();
        assert!(!writer.counts_are_due(false), "one after the other");
        assert_eq!((writer.finish_aside().await, writer.counts_trouble().is_some()), (safety, trouble));
    }
}

#[test]
fn counts_are_written_the_more_seldom_the_more_there_are_and_while_nothing_is_moved() {
    let mut writer = StateWriter::new(Contended(Vec::new()), Contended(Vec::new()), ControllerMetrics::default());
    assert!(writer.counts_are_due(true), "for the first time");
    for (bytes, is_at_rest, seconds) in
        [(1_000, false, 2), (1_000, true, 10), (4 << 20, false, 18), (1 << 30, true, 60)]
    {
        let mut is_due = |ago: u64| {
            writer.wrote_counts = Some((Instant::now() - Duration::from_secs(ago), bytes));
            writer.counts_are_due(is_at_rest)
        };
        assert_eq!((is_due(seconds - 1), is_due(seconds)), (false, true), "{bytes} {is_at_rest}");
    }
}
