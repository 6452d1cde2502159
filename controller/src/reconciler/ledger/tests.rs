//! The totals of reports that are lost, repeated, folded or persisted.

use super::*;
use proptest::prelude::*;
use tideshift_core::protocol::report::{ServiceReport, VersionReport};

fn report(start: &str, ok: u64) -> Report {
    let ended = Counts { ok, ..Counts::default() };
    let version = VersionReport { name: "v1".to_owned(), ended, ..VersionReport::default() };
    let service = ServiceReport {
        name: "checkout".to_owned(),
        unrouted: ok / 2,
        versions: vec![version],
        ..ServiceReport::default()
    };
    Report { proxy: "p".to_owned(), start: start.to_owned(), services: vec![service], ..Report::default() }
}

fn known(service: &str, version: &str) -> bool {
    (service, version) == ("checkout", "v1")
}

fn take(ledger: &mut Ledger, report: &Report) -> Taken {
    ledger.take(&(report.proxy.clone(), report.start.clone()), report, known, 0)
}

#[test]
fn every_run_of_a_proxy_counts_from_nothing() {
    let mut ledger = Ledger::default();
    for (start, ok) in [("a", 3), ("a", 5), ("b", 2), ("a", 7), ("b", 2)] {
        take(&mut ledger, &report(start, ok));
    }
    assert_eq!(ledger.total("checkout", "v1").ok, 9);
    assert_eq!(ledger.unrouted("checkout"), 4);
}

#[test]
fn a_counter_that_was_reset_counts_on() {
    let mut ledger = Ledger::default();
    for (sequence, ok) in [(1, 10), (2, 4), (1, 10), (2, 4), (3, 6)] {
        take(&mut ledger, &Report { sequence, ..report("a", ok) });
    }
    assert_eq!((ledger.total("checkout", "v1").ok, ledger.unrouted("checkout")), (16, 8));
}

#[test]
fn a_report_without_a_number_that_says_less_is_an_old_one() {
    let mut ledger = Ledger::default();
    let taken = [10, 4, 10, 12].map(|ok| take(&mut ledger, &report("a", ok)));
    assert_eq!(taken, [Taken::News, Taken::Old, Taken::NoNews, Taken::News]);
    assert_eq!(ledger.total("checkout", "v1").ok, 12);
    // A filter that numbers its reports replaces the filter, and the older one replaces it again.
    let numbered = Report { sequence: 1, ..report("a", 14) };
    assert_eq!([take(&mut ledger, &numbered), take(&mut ledger, &numbered)], [Taken::News, Taken::Old]);
    assert_eq!(take(&mut ledger, &report("a", 15)), Taken::News);
    assert_eq!(ledger.total("checkout", "v1").ok, 15);
}

#[test]
fn what_no_document_names_is_not_kept() {
    let mut ledger = Ledger::default();
    ledger.take(&("p".to_owned(), "a".to_owned()), &report("a", 10), |_, _| false, 0);
    assert_eq!(ledger.total("checkout", "v1"), Counts::default());
}

/// A report of a filter that counts by how versions were chosen: `dealt` requests by weight, `session` requests by a
/// session.
fn by_choice(sequence: u64, dealt: u64, session: u64) -> Report {
    let tally = |ok| Tally { started: ok, ended: Counts { ok, ..Counts::default() }, ..Tally::default() };
    let mut report = Report { sequence, format: Report::FORMAT, ..report("a", dealt + session) };
    let version = &mut report.services[0].versions[0];
    (version.dealt, version.session) = (tally(dealt), tally(session));
    report
}

#[test]
fn what_a_filter_has_forgotten_is_not_counted_again() {
    let mut ledger = Ledger::default();
    for (sequence, dealt, session) in [(1, 10, 4), (2, 12, 4), (3, 0, 1), (4, 3, 1)] {
        take(&mut ledger, &by_choice(sequence, dealt, session));
    }
    let total = ledger.judged("checkout", "v1");
    assert_eq!((total.dealt.ended.ok, total.session().map(|of| of.ended.ok)), (15, Some(4)));
    assert_eq!(ledger.total("checkout", "v1").ok, 19);
}

#[test]
fn what_was_counted_before_the_ledger_began_is_in_no_verdict() {
    let began = 1_800_000_000_000;
    let mut ledger = Ledger::beginning(began);
    let run = |start: u64| Report { start: format!("{:x}", start * 1_000_000), ..by_choice(0, 0, 0) };
    let mut take_of = |start, sequence, dealt| {
        let report = Report { start: run(start).start, ..by_choice(sequence, dealt, 0) };
        take(&mut ledger, &report);
        (ledger.total("checkout", "v1").ok, ledger.judged_counts("checkout", "v1").ok)
    };
    assert_eq!(take_of(began - 1, 1, 100), (100, 0), "the first report of a proxy that ran before");
    assert_eq!(take_of(began - 1, 2, 103), (103, 3));
    assert_eq!(take_of(began + 1, 1, 5), (108, 8), "of one that started since");
}

#[test]
fn a_ledger_of_before_is_converted() {
    let old = r#"{"totals": [[["checkout", "v1"], {"ok": 7, "error": 1, "clientError": 0, "cancelled": 2,
        "durations": [5, 3]}]], "unrouted": {}, "runs": [[["p", "a"], {"reportedAt": 1, "reported_at": 1,
        "sequence": 3, "counts": [[["checkout", "v1"], {"ok": 7, "error": 1, "clientError": 0, "cancelled": 2,
        "durations": [5, 3]}]], "unrouted": {}}]]}"#;
    let mut ledger: Ledger = serde_json::from_str(old).unwrap();
    assert_eq!(ledger.total("checkout", "v1").total(), 10);
    assert_eq!(ledger.durations("checkout", "v1"), [5, 3]);
    assert_eq!(ledger.judged("checkout", "v1").dealt.ended.error, 1);
    // The same proxy continues with its previous filter.
    take(&mut ledger, &Report { sequence: 4, ..report("a", 9) });
    assert_eq!(ledger.total("checkout", "v1").ok, 16, "what goes back in the old format was reset");
    let again: Ledger = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
    assert_eq!(again, ledger);
}

proptest! {
    /// Each step: the number of new requests, how far back late reports go and how many arrive, whether the counts are
    /// persisted, and whether the controller is then killed.
    #[test]
    fn reports_lost_repeated_in_any_order_or_after_a_crash_lose_and_double_nothing(
        numbered in any::<bool>(),
        steps in prop::collection::vec(
            (0u64..50, 0usize..6, 0usize..4, any::<bool>(), prop::bool::weighted(0.2)), 1..60
        )
    ) {
        let mut ledger = Ledger::default();
        let mut stored = ledger.clone();
        let mut sent: Vec<Report> = Vec::new();
        let mut ok = 0;
        for (more, back, times, store, crash) in steps {
            ok += more;
            let sequence = if numbered { sent.len() as u64 + 1 } else { 0 };
            let mut report = report("a", ok);
            report.services[0].versions[0].durations = vec![ok / 2, ok - ok / 2];
            sent.push(Report { sequence, ..report });
            for i in 0..times {
                let late = &sent[sent.len().saturating_sub(1 + back * i)];
                take(&mut ledger, late);
            }
            if store {
                stored = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
            }
            if crash {
                ledger = stored.clone();
            }
            prop_assert!(ledger.total("checkout", "v1").ok <= ok);
        }
        take(&mut ledger, sent.last().unwrap());
        prop_assert_eq!(ledger.total("checkout", "v1").ok, ok);
        prop_assert_eq!(ledger.durations("checkout", "v1").iter().sum::<u64>(), ok);
        prop_assert_eq!(ledger.unrouted("checkout"), ok / 2);
    }
}

/// A run of a proxy that started at this time, in milliseconds.
fn began(at: u64, ok: u64) -> Report {
    let sequence = ok + 1;
    Report { sequence, ..report(&format!("{:x}", at * 1_000_000), ok) }
}

fn take_at(ledger: &mut Ledger, report: &Report, now: u64) -> Taken {
    ledger.take(&(report.proxy.clone(), report.start.clone()), report, known, now)
}

fn again(ledger: &Ledger, room: usize) -> Ledger {
    let json = serde_json::to_string(&ledger.written(room)).unwrap();
    serde_json::from_str(&json).unwrap()
}

const HOUR: u64 = 3_600_000;

#[test]
fn a_run_that_is_silent_for_long_is_folded_and_counts_on_when_it_is_back() {
    let mut ledger = Ledger::default();
    for start in 1..=100 {
        take_at(&mut ledger, &began(start, 10), 1_000);
    }
    let before = ledger.written(usize::MAX).bytes_of_runs();
    ledger.tidy(known, 30 * 60_000);
    assert_eq!(ledger.written(usize::MAX).bytes_of_runs(), before, "it may be back soon");
    ledger.tidy(known, HOUR + 2_000);
    assert_eq!((ledger.written(usize::MAX).bytes_of_runs(), ledger.total("checkout", "v1").ok), (0, 1_000));
    // Its previous counts are not counted again, before and after a restart; new ones are.
    let mut ledger = again(&ledger, usize::MAX);
    take_at(&mut ledger, &began(7, 25), HOUR + 3_000);
    assert_eq!(ledger.total("checkout", "v1").ok, 1_000, "a base line");
    take_at(&mut ledger, &began(7, 30), HOUR + 4_000);
    assert_eq!(ledger.total("checkout", "v1").ok, 1_005);
    // An unknown run counts from 0, even if it is older than the folded ones.
    take_at(&mut ledger, &began(1_000_000, 3), HOUR + 5_000);
    assert_eq!(ledger.total("checkout", "v1").ok, 1_008);
}

#[test]
fn starts_by_the_hundred_thousand_take_no_more_than_they_may() {
    let mut ledger = Ledger { most: (1_000, usize::MAX), ..Ledger::default() };
    let mut now = 1_800_000_000_000;
    let first = now;
    for _ in 0..100_000 {
        now += 1_000;
        take_at(&mut ledger, &began(now - 500, 10), now);
    }
    assert!(ledger.runs.len() <= 1_000, "{}", ledger.runs.len());
    assert_eq!(ledger.total("checkout", "v1").ok, 1_000_000);
    let written = serde_json::to_vec(&ledger.written(usize::MAX)).unwrap().len();
    assert!(written < 500_000, "{written} bytes");
    // One of the first runs is not remembered any more: it started before other forgotten runs.
    take_at(&mut ledger, &began(first + 500, 99), now);
    assert_eq!(ledger.total("checkout", "v1").ok, 1_000_000, "a base line");
    take_at(&mut ledger, &began(first + 500, 100), now);
    assert_eq!(ledger.total("checkout", "v1").ok, 1_000_001);
}

#[test]
fn where_all_report_those_that_there_is_no_room_for_are_not_counted_and_the_others_are() {
    let mut ledger = Ledger { most: (10, usize::MAX), ..Ledger::default() };
    for ok in 1..=5 {
        for start in 1..=12 {
            take_at(&mut ledger, &began(start, ok * 10), ok * 1_000);
        }
    }
    assert_eq!(ledger.total("checkout", "v1").ok, 10 * 50);
    // The other runs fall silent and make room.
    for seconds in 6..=200 {
        take_at(&mut ledger, &began(12, seconds * 10), seconds * 1_000);
    }
    assert!(ledger.total("checkout", "v1").ok > 10 * 50);
}

#[test]
fn what_there_is_no_room_for_is_a_base_line_of_the_silent_first() {
    let mut ledger = Ledger::default();
    for start in 1..=20 {
        take_at(&mut ledger, &began(start, 10), if start <= 10 { 1_000 } else { 500_000 });
    }
    let all = ledger.written(usize::MAX).bytes_of_runs();
    let next = |room: usize| {
        let mut ledger = again(&ledger, room);
        assert!(ledger.written(usize::MAX).bytes_of_runs() <= 2 * room);
        assert_eq!((ledger.total("checkout", "v1").ok, ledger.unrouted("checkout")), (200, 100));
        for start in 1..=20 {
            take_at(&mut ledger, &began(start, 11), 501_000);
        }
        ledger.total("checkout", "v1").ok - 200
    };
    assert_eq!(next(all), 20, "each counts on");
    assert_eq!(next(all / 2 + 20), 10, "those that report");
    let few = next(all / 4);
    assert!((1..10).contains(&few), "{few}");
    assert_eq!(next(0), 0, "nothing is counted twice");
    let mut empty = again(&ledger, 0);
    take_at(&mut empty, &began(600_000, 5), 600_100);
    assert_eq!(empty.total("checkout", "v1").ok, 205, "a start after that counts from nothing");
}

#[test]
fn who_was_there_is_known_by_name_where_there_is_no_room_for_its_counts() {
    let mut ledger = Ledger::default();
    for start in 1..=20 {
        take_at(&mut ledger, &began(start, 10), if start <= 10 { 1_000 } else { 500_000 });
    }
    assert_eq!(again(&ledger, 600).heard_of_last(60_000).count(), 10);
}

#[test]
fn what_leaves_the_documents_leaves_the_ledger_and_comes_back_as_new() {
    let mut ledger = Ledger::default();
    take_at(&mut ledger, &began(1, 10), 1_000);
    let nothing = |_: &str, _: &str| false;
    ledger.tidy(nothing, 2_000);
    ledger.tidy(nothing, 500_000);
    assert_eq!(ledger.total("checkout", "v1").ok, 10, "it may come back");
    ledger.tidy(known, 501_000);
    ledger.tidy(nothing, 700_000);
    ledger.tidy(nothing, 1_200_000);
    assert_eq!(ledger.total("checkout", "v1").ok, 10, "it was back in between");
    ledger.tidy(nothing, 1_400_000);
    assert_eq!((ledger.total("checkout", "v1").ok, ledger.services.len()), (0, 0));
    // By now the proxy has forgotten the version as well.
    take_at(&mut ledger, &Report { sequence: 50, ..began(1, 4) }, 1_500_000);
    assert_eq!(ledger.total("checkout", "v1").ok, 4);
}
