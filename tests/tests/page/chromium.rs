//! The web page in a real Chromium: what users see, can do, and cannot be harmed by.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs;
use std::io::Cursor;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};
use tideshift_tests::backend::Errors;
use tideshift_tests::browser::{Browser, DEADLINE};
use tideshift_tests::client::{Request, Response, get};
use tideshift_tests::fake_controller::{Command, FakeController};
use tideshift_tests::test_bed::{FOR_EVER, SERVICE, TestBed, until_shares};
use tideshift_tests::timeline::Timeline;
use tideshift_tests::wait::eventually;
use tideshift_tests::{artifacts, timeline};
use tokio::time::{Instant, sleep_until};

/// What typing these keys sends.
const TAB: &str = "\u{e004}";
const ENTER: &str = "\u{e007}";
const ESCAPE: &str = "\u{e00c}";
const RIGHT: &str = "\u{e014}";

/// A stage with this status, and a browser that shows it.
async fn open(status: Value) -> anyhow::Result<(FakeController, Browser)> {
    let stage = FakeController::start(status).await?;
    let browser = Browser::start().await?;
    browser.goto(&stage.url()).await?;
    browser.says("#heard", "live").await?;
    Ok((stage, browser))
}

/// Nothing in the console: no error, no warning, no violation of the content security policy.
async fn assert_quiet(browser: &Browser) -> anyhow::Result<()> {
    let console = browser.console().await?;
    ensure!(console.is_empty(), "the console says {console:#?}");
    Ok(())
}

/// The cells of a version's row by their columns' names.
async fn row(browser: &Browser, version: &str) -> anyhow::Result<Value> {
    let script = "const row = [...document.querySelectorAll('.versions tbody tr')].find((row) => \
                  row.querySelector('.name').textContent === arguments[0]); \
                  return Object.fromEntries([['', row.querySelector('.role').innerText], \
                  ...[...row.querySelectorAll('td')].map((cell) => [cell.dataset.label, cell.innerText.trim()])])";
    browser.run(script, &[version.into()]).await
}

/// How many pixels of a plot have a colour, which neither grid nor axes have.
async fn coloured(browser: &Browser, plot: &str) -> anyhow::Result<u64> {
    let script = "const canvas = document.querySelector(`[data-plot=${arguments[0]}] canvas`); \
                  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d'); \
                  copy.drawImage(canvas, 0, 0); \
                  const {data} = copy.getImageData(0, 0, canvas.width, canvas.height); let n = 0; \
                  for (let i = 0; i < data.length; i += 4) { const rgb = [data[i], data[i + 1], data[i + 2]]; \
                  if (data[i + 3] > 99 && Math.max(...rgb) - Math.min(...rgb) > 60) n++ } return n";
    browser.run(script, &[plot.into()]).await?.as_u64().context("no count")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shows_how_things_stand_and_how_they_change() -> anyhow::Result<()> {
    let (stage, browser) = open(timeline::half_way()).await?;
    browser.says("h1", "checkout").await?;
    assert_eq!(browser.text(".title .chip").await?, "Progressing");
    assert!(browser.text(".why").await?.starts_with("step 2: v2 has its 25 %, held for 12 of 60 s Holding · for "));
    assert_eq!(browser.text("#to-proxies").await?, "Proxies 2, 1 behind");
    assert_eq!(browser.text(".track [aria-current=step]").await?, "25 % held 12 of 60 s");
    let states = "return [...document.querySelectorAll('.track li')].map((step) => step.dataset.state)";
    assert_eq!(browser.run(states, &[]).await?, json!(["done", "present", "ahead", "ahead"]));

    let (v1, v2) = (row(&browser, "v1").await?, row(&browser, "v2").await?);
    let cells = |row: &Value| ["", "Share", "Ready", "OK", "Errors", "4xx", "Cancelled"].map(|cell| row[cell].clone());
    assert_eq!(cells(&v1), ["stable", "75\u{a0}%", "4/4", "12,345", "21", "34", "5"]);
    assert_eq!(cells(&v2), ["target", "25\u{a0}%", "3/4", "2,100", "42", "3", "2"]);
    assert_eq!((&v2["In flight"], &row(&browser, "v3").await?[""]), (&json!("3"), &json!("out of service")));

    // Why an endpoint is not ready.
    browser.click("tr:nth-child(2) summary").await?;
    browser.says("tr:nth-child(2) details", "10.0.2.4:8080: HTTP status 503").await?;

    let verdict = browser.text(".verdict").await?;
    assert!(
        verdict.contains("42 of 2,145 failed")
            && verdict.contains("by chance in fewer than 1 of 31, taken back at 1 of 1,000"),
        "{verdict}"
    );
    let meter = "return document.querySelector('.evidence.bad [role=meter]').getAttribute('aria-valuenow')";
    assert_eq!(browser.run(meter, &[]).await?, "50", "32 is half-way to 1,000, by their logarithms");

    // 90 more succeed and 10 fail: 10 % errors, until it is 5 s ago.
    eventually("a first second", DEADLINE, async || {
        ensure!(row(&browser, "v1").await?["Requests"] == "0/s");
        Ok(())
    })
    .await?;
    stage.change(|status| {
        let requests = &mut status["services"][0]["versions"][1]["requests"];
        (requests["ok"], requests["error"]) = (2_190.into(), 52.into());
    });
    eventually("the rates", DEADLINE, async || {
        let v2 = row(&browser, "v2").await?;
        ensure!(v2["Error rate"] == "10\u{a0}%" && v2["OK"] == "2,190", "{v2}");
        Ok(())
    })
    .await?;
    for plot in ["shares", "errors", "requests", "evidence"] {
        eventually(plot, DEADLINE, async || {
            let pixels = coloured(&browser, plot).await?;
            ensure!(pixels > 50, "{pixels} coloured pixels");
            Ok(())
        })
        .await?;
    }
    let label = "return document.querySelector('[data-plot=shares] [role=img]').ariaLabel";
    assert_eq!(browser.run(label, &[]).await?, "Share of requests, now: v1 75\u{a0}%, v2 25\u{a0}%, v3 0\u{a0}%");

    // What was unfolded stays so, and what has the focus keeps it, however often the status changes.
    browser.run("document.querySelector('[data-command=pause]').focus()", &[]).await?;
    for weight in [26.0, 27.0, 28.0] {
        stage.change(|status| status["services"][0]["versions"][1]["weight"] = weight.into());
        browser.says("tr:nth-child(2) td", &format!("{weight}\u{a0}%").replace('\u{a0}', " ")).await?;
    }
    let kept =
        "return [document.activeElement.dataset.command, document.querySelector('tr:nth-child(2) details').open]";
    assert_eq!(browser.run(kept, &[]).await?, json!(["pause", true]));
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn says_what_happened_and_what_happens() -> anyhow::Result<()> {
    let stage = FakeController::start(timeline::half_way()).await?;
    let past = |reason: &str, message: &str| json!({ "time": timeline::now(), "rollout": 3, "phase": "Progressing", "reason": reason, "message": message, "step": 1 });
    stage.tell("checkout", past("Started", "from v1 to v2"));
    let browser = Browser::start().await?;
    browser.goto(&stage.url()).await?;
    browser.says(".history", "Started, step 1 from v1 to v2").await?;

    stage.tell("checkout", past("StepStarted", "step 2"));
    stage.tell("other", past("StepStarted", "of another rollout"));
    browser.says(".history li:first-child", "StepStarted, step 1 step 2").await?;
    assert!(!browser.text(".history").await?.contains("another"));
    // Of what happens within a millisecond the last is on top, whether it was heard or asked for later.
    let mut next = past("StepStarted", "all at once");
    next["step"] = 2.into();
    for reason in ["StepStarted", "Ready", "Holding"] {
        next["reason"] = reason.into();
        stage.tell("checkout", next.clone());
    }
    let order = "return [...document.querySelectorAll('.history b')].slice(0, 3).map((one) => one.innerText).join() \
                 === 'Holding, step 2,Ready, step 2,StepStarted, step 2'";
    browser.until(order).await?;
    browser.goto("about:blank").await?;
    browser.goto(&stage.url()).await?;
    browser.until(order).await?;

    stage.change(|status| {
        let service = &mut status["services"][0];
        (service["phase"], service["reason"]) = ("Failed".into(), "VerdictFail".into());
        service["message"] = "v2 failed: all traffic is back on v1".into();
        service["verdict"]["outcome"] = "fail".into();
        service["verdict"]["evidence"] = 2300.0.into();
        service["versions"][1]["drain"] =
            json!({ "state": "Drained", "inFlight": 0, "since": timeline::now(), "message": "nothing is in flight" });
    });
    // Also said to those who do not see.
    browser.says("#live", "checkout: Failed. v2 failed: all traffic is back on v1").await?;
    browser.says(".title .chip", "Failed").await?;
    browser.says(".track [data-state=failed]", "25 % failed here").await?;
    let states = "return [...document.querySelectorAll('.track li')].map((step) => step.dataset.state)";
    assert_eq!(browser.run(states, &[]).await?, json!(["done", "failed", "ahead", "ahead"]));
    browser.says(".verdict", "by chance in fewer than 1 of 2,300, taken back at 1 of 1,000").await?;
    browser.says("tr:nth-child(2) [data-label=Drain]", "drained, ").await?;
    browser.until("return document.title === 'checkout: Failed, v2 25\\u00a0% – Tideshift'").await?;
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buttons_send_their_commands_with_the_token() -> anyhow::Result<()> {
    let stage = FakeController::start(timeline::half_way()).await?;
    stage.require_tokens("reader", "operator");
    let browser = Browser::start().await?;
    browser.goto(&stage.url()).await?;

    // Nothing without a token, everything but commands with one that may read.
    browser.says("main", "The controller wants a token: a token is needed").await?;
    let enter = async |token: &str| {
        let field = browser.find("#token-field").await?;
        field.clear().await?;
        field.send_keys(&format!("{token}{ENTER}")).await?;
        anyhow::Ok(())
    };
    browser.click("main button").await?;
    enter("reader").await?;
    browser.says("main", "step 2: v2 has its 25 %").await?;
    browser.click("[data-command=promote]").await?;
    let words = browser.text("dialog").await?;
    assert!(words.contains("The present hold ends now") && words.contains("Step 3 of 4 begins: v2 gets 25"), "{words}");
    assert_eq!(stage.commands(), [], "asked first");
    browser.click("dialog .solid").await?;
    browser.says("dialog .problem", "this token may read only").await?;
    browser.click("dialog.command .quiet").await?;
    enter("operator").await?;
    browser.until("return !document.getElementById('token-field')").await?;
    browser.click("dialog .solid").await?;
    browser.until("return !document.querySelector('dialog')").await?;
    browser.says("#live", "Promote: done").await?;
    let mut sent = stage.commands();
    assert_eq!(sent.len(), 2);
    let command = |path: &str, body: Value| Command {
        path: format!("/v1/rollouts/checkout/{path}"),
        authorization: Some("Bearer operator".to_owned()),
        content_type: Some("application/json".to_owned()),
        body,
    };
    assert_eq!(sent.pop(), Some(command("promote", json!({ "full": false }))));
    assert_eq!(sent[0].authorization.as_deref(), Some("Bearer reader"));

    // The others: what is chosen, what it says, what is sent.
    for (button, choice, says, path, body) in [
        (
            "promote-full",
            "",
            "v2 gets 100 %, as far as its endpoints can carry it (3 of 4 endpoints ready)",
            "promote",
            json!({ "full": true }),
        ),
        ("pause", "", "stays where it is (v1 75 %, v2 25 %)", "pause", json!({})),
        ("abort", "", "back to v1, as far as its endpoints can carry it (4 of 4 endpoints ready)", "abort", json!({})),
        ("rollback", "v3", "v3 gets all traffic at once", "rollback", json!({ "to": "v3" })),
        ("set-target", "v3", "A rollout from v1 to v3 begins", "set-target", json!({ "target": "v3" })),
        ("set-weight", "40", "v2 gets 40 % of the traffic", "set-weight", json!({ "weight": 40 })),
    ] {
        browser.click(&format!("[data-command={button}]")).await?;
        browser.find("dialog[open]").await?;
        if !choice.is_empty() {
            browser.keys(choice).await?;
        }
        browser.says("dialog", says).await.with_context(|| button.to_owned())?;
        browser.click("dialog .solid").await?;
        browser.until("return !document.querySelector('dialog')").await?;
        assert_eq!(stage.commands().pop(), Some(command(path, body)), "{button}");
    }
    stage.change(|status| {
        (status["services"][0]["phase"], status["services"][0]["paused"]) = ("Paused".into(), true.into());
    });
    browser.click("[data-command=resume]").await?;
    browser.click("dialog .solid").await?;
    browser.until("return !document.querySelector('dialog')").await?;
    assert_eq!(stage.commands().pop(), Some(command("resume", json!({}))));

    // The token goes with the tab.
    let kept = "return [localStorage.length, document.cookie, Object.values({...sessionStorage})]";
    assert_eq!(browser.run(kept, &[]).await?, json!([0, "", ["operator"]]));
    let console = browser.console().await?;
    let denied = |line: &String| line.contains("401 (Unauthorized)") || line.contains("403 (Forbidden)");
    assert!(console.iter().all(denied), "{console:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_does_not_fit_says_why() -> anyhow::Result<()> {
    let mut status = timeline::half_way();
    (status["services"][0]["phase"], status["services"][0]["step"]) = ("Succeeded".into(), Value::Null);
    let (stage, browser) = open(status).await?;
    browser.click("[data-command=promote]").await?;
    browser.says(".toolbar", "Promote: No rollout is on its way.").await?;
    assert_eq!(browser.run("return document.querySelectorAll('dialog').length", &[]).await?, 0);
    let described = "const button = document.querySelector('[data-command=promote]'); \
                     return [button.ariaDisabled, document.getElementById(button.getAttribute('aria-describedby')).textContent]";
    assert_eq!(browser.run(described, &[]).await?, json!(["true", "No rollout is on its way."]));

    // One that fits here and not there: the controller has the last word.
    stage.refuse(Some((409, "v3 has no ready endpoint")));
    browser.click("[data-command=set-target]").await?;
    browser.click("dialog .solid").await?;
    browser.says("dialog .problem", "v3 has no ready endpoint").await?;
    // What no longer fits while it is asked cannot be confirmed.
    browser.keys(ESCAPE).await?;
    stage.change(|status| status["services"][0]["phase"] = "Progressing".into());
    browser.until("return !document.querySelector('[data-command=abort]').ariaDisabled").await?;
    browser.click("[data-command=abort]").await?;
    stage.change(|status| status["services"][0]["phase"] = "Failed".into());
    browser.says("dialog", "No rollout is on its way.").await?;
    let sent = stage.commands().len();
    browser.click("dialog .solid").await?;
    browser.run("return 1", &[]).await?;
    assert_eq!(stage.commands().len(), sent);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_by_keyboard() -> anyhow::Result<()> {
    let mut status = timeline::half_way();
    let services = status["services"].as_array_mut().context("no services")?;
    services.push(timeline::service("search", vec![timeline::version("v1", 100.0, [2, 2], [0; 4])]));
    let (stage, browser) = open(status).await?;
    let focused = "const one = document.activeElement; return one.dataset.command ?? (one.id || one.innerText)";

    browser.keys(TAB).await?;
    assert_eq!(browser.run(focused, &[]).await?, "Skip to the content");
    browser.keys(ENTER).await?;
    assert_eq!(browser.run(focused, &[]).await?, "main");
    browser.keys(TAB).await?;
    assert_eq!(browser.run(focused, &[]).await?, "checkout");
    browser.keys(ENTER).await?;
    browser.says("h1", "checkout").await?;
    assert_eq!(browser.run(focused, &[]).await?, "checkout", "the heading of the new page");
    assert_eq!(
        browser.run("return document.activeElement.tagName + location.hash", &[]).await?,
        "H1#/rollout/checkout"
    );

    // Every button in turn, each with a mark that it has the focus.
    for command in ["promote", "promote-full", "pause", "abort"] {
        browser.keys(TAB).await?;
        assert_eq!(browser.run(focused, &[]).await?, command);
        let outline = "return parseFloat(getComputedStyle(document.activeElement).outlineWidth)";
        assert_eq!(browser.run(outline, &[]).await?, 2);
    }
    browser.keys(ENTER).await?;
    browser.says("dialog", "Traffic goes back to v1").await?;
    assert_eq!(browser.run(focused, &[]).await?, "Cancel", "so that a second Enter does no harm");
    browser.keys(ESCAPE).await?;
    browser.until("return !document.querySelector('dialog')").await?;
    assert_eq!(browser.run(focused, &[]).await?, "abort");
    browser.keys(ENTER).await?;
    browser.find("dialog").await?;
    browser.keys(TAB).await?;
    browser.keys(ENTER).await?;
    browser.until("return !document.querySelector('dialog')").await?;
    assert_eq!(stage.commands().pop().map(|command| command.path).as_deref(), Some("/v1/rollouts/checkout/abort"));

    // Plots tell their values one by one.
    browser.until("return document.querySelector('[data-plot=shares] canvas') !== null").await?;
    let plot = "document.querySelector('[data-plot=shares] [role=img]')";
    browser.run(&format!("{plot}.focus()"), &[]).await?;
    browser.keys(RIGHT).await?;
    browser.until(&format!("return /^Share of requests, at [0-9:]+: v1 /.test({plot}.ariaLabel)")).await?;
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phone_needs_no_sideways_scrolling() -> anyhow::Result<()> {
    let stage = FakeController::start(crowd()).await?;
    let browser = Browser::start().await?;
    browser.screen(360, 740, true).await?;
    for (view, says) in [("", "Rollouts"), ("#/proxies", "Proxies"), (&rollout_path(HOSTILE), "Steps")] {
        browser.goto(&format!("{}{view}", stage.url())).await?;
        browser.says("main", says).await?;
        let width = "return [innerWidth, document.documentElement.scrollWidth]";
        assert_eq!(browser.run(width, &[]).await?, json!([360, 360]), "{view}");
        let beyond = "return [...document.querySelectorAll('main *')].filter((one) => \
                      one.getBoundingClientRect().right > 360 && !one.closest('.unseen, thead')).map((one) => one.outerHTML)";
        assert_eq!(browser.run(beyond, &[]).await?, json!([]), "{view}");
    }
    browser.click("[data-command=set-weight]").await?;
    let dialog = browser.find("dialog").await?.rectangle().await?;
    assert!(dialog.0 >= 0.0 && dialog.0 + dialog.2 <= 360.0, "{dialog:?}");
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_stay_whole_however_narrow_it_is() -> anyhow::Result<()> {
    let name = "release-2026-11-22-with-a-long-name-x86-64-build-4711";
    let drain = |state: &str| json!({ "state": state, "inFlight": 0, "since": timeline::now(), "message": "" });
    let mut status = timeline::half_way();
    let mut versions = vec![
        timeline::version("v1", 75.0, [4, 4], [1_204_113, 13_035, 22_871, 641]),
        timeline::version("v2", 25.0, [3, 4], [13_035, 42, 3, 2]),
    ];
    for (name, ready, state) in
        [("v3", 0, "Drained"), (name, 4, "DeadlineExceeded"), ("v5", 4, "Serving"), ("v6", 4, "Draining")]
    {
        let mut version = timeline::version(name, 0.0, [ready, 4], [130_350, 13_035, 1, 1]);
        version["drain"] = drain(state);
        versions.push(version);
    }
    status["services"][0]["versions"] = versions.into();
    let (_stage, browser) = open(status).await?;
    // Words of the cells, roles among them, that are on more than one line; cells that are beyond their card, which does
    // not scroll; cards on top of each other; a page that has to be moved sideways.
    let faults = "
        const faults = [];
        for (const cell of document.querySelectorAll('.versions td, .versions .role, .legend b')) {
            const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                if (texts.currentNode.parentElement.closest('ul')) continue;
                const whole = cell.matches('.role, :not([data-label=Drain])') ? /.+/g : /\\S+/g;
                for (const { 0: word, index } of texts.currentNode.data.matchAll(whole)) {
                    const range = document.createRange();
                    range.setStart(texts.currentNode, index);
                    range.setEnd(texts.currentNode, index + word.length);
                    const lines = new Set([...range.getClientRects()].map((one) => one.top));
                    if (lines.size > 1) faults.push(`${word} on ${lines.size} lines`);
                }
            }
        }
        const box = (selector) => document.querySelector(selector).getBoundingClientRect();
        const [card, verdict] = [box('.pair .scrolls'), box('.verdict')];
        if (card.right > verdict.left && card.bottom > verdict.top) faults.push('the cards overlap');
        const scrolls = document.querySelector('.scrolls');
        const isWider = scrolls.scrollWidth > scrolls.clientWidth;
        if (isWider && (getComputedStyle(scrolls).overflowX !== 'auto' || scrolls.tabIndex !== 0)) faults.push('cannot be scrolled');
        if (document.documentElement.scrollWidth > innerWidth) faults.push('sideways');
        return [faults, isWider];";
    for (width, scrolls) in [(1920, false), (1280, false), (1230, true), (1024, false), (800, true), (375, false)] {
        browser.screen(width, 900, width < 500).await?;
        browser.until(&format!("return innerWidth === {width}")).await?;
        eventually(&format!("numbers at {width} px"), DEADLINE, async || {
            let found = browser.run(faults, &[]).await?;
            ensure!(found == json!([[], scrolls]), "{found}");
            Ok(())
        })
        .await?;
    }
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_of_one_id_are_all_there() -> anyhow::Result<()> {
    let run = |id: &str, start: &str, revision: u64| {
        let mut proxy = timeline::proxy(id, revision);
        proxy["start"] = start.into();
        proxy
    };
    let mut status = timeline::half_way();
    status["proxies"] = json!([run("edge-1", "1", 11), run("edge-1", "2", 12), run("edge-2", "1", 12)]);
    let (stage, browser) = open(status).await?;
    assert_eq!(browser.text("#to-proxies").await?, "Proxies 3, 1 behind");
    browser.click("#to-proxies").await?;
    browser.says("main", "1 of 3 proxies behind").await?;
    let rows = "return [...document.querySelectorAll('tbody tr')].map((row) => \
                [...row.children].slice(0, 2).map((cell) => cell.innerText).join(' ')).join()";
    assert_eq!(browser.run(rows, &[]).await?, "edge-1 11, behind,edge-1 12,edge-2 12");
    // The run that was killed is over.
    stage.change(|status| drop(status["proxies"].as_array_mut().map(|proxies| proxies.remove(0))));
    browser.says("main", "2 proxies, none behind").await?;
    assert_eq!(browser.run(rows, &[]).await?, "edge-1 12,edge-2 12");
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_token_lifts_asks_for_none() -> anyhow::Result<()> {
    let stage = FakeController::start(timeline::half_way()).await?;
    let browser = Browser::start().await?;
    // By a DNS name, which an attacker could point here, to a controller without tokens.
    browser.goto(&format!("http://tideshift.example:{}/", stage.page().port())).await?;
    let why = "The controller refuses: host \"tideshift.example";
    browser.says("main", why).await?;
    browser.says("main", "--operate-token-file").await?;
    browser.says("#heard", "refused by the controller").await?;
    let enter = "return document.querySelector('main button').hidden";
    assert_eq!(browser.run(enter, &[]).await?, true);
    browser.goto(&format!("http://{}/", stage.page())).await?;
    browser.says("#heard", "live").await
}

/// Samples of `checkout` every two seconds for so long until now: v2 with this share and a failure in ten, v1 without any.
fn last_seconds(seconds: u64, share: u64) -> Value {
    let ago: Vec<u64> = (1..=seconds / 2).rev().map(|sample| 2 * sample).collect();
    let now = Timestamp::now();
    let times = ago.iter().map(|ago| format!("{:.3}", now - Duration::from_secs(*ago)));
    let all = |value: Value| vec![value; ago.len()];
    let counts = |to: u64, rate: u64| ago.iter().map(|ago| Value::from(to - ago * rate)).collect::<Vec<_>>();
    let version = |name: &str, weight: u64, [requests, errors]: [u64; 2], rate: u64| {
        json!({
            "name": name, "weight": all(weight.into()), "requests": counts(requests, 20), "errors": counts(errors, rate),
            "cancelled": all(0.into()),
        })
    };
    json!({
        "times": times.collect::<Vec<_>>(),
        "services": [{
            "name": "checkout", "evidence": all(7.into()), "passEvidence": all(Value::Null),
            "versions": [version("v1", 100 - share, [12_400, 21], 0), version("v2", share, [22_145, 2_042], 2)],
        }],
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_late_sees_what_was_before() -> anyhow::Result<()> {
    let stage = FakeController::start(timeline::half_way()).await?;
    stage.change(|status| {
        let requests = &mut status["services"][0]["versions"][1]["requests"];
        (requests["ok"], requests["error"]) = (20_100.into(), 2_042.into());
    });
    stage.recall(last_seconds(120, 50));
    let began = json!({ "time": format!("{:.3}", Timestamp::now() - Duration::from_secs(60)), "rollout": 1,
        "phase": "Progressing", "reason": "StepStarted", "message": "", "step": 2 });
    stage.tell("checkout", began);
    let browser = Browser::start().await?;
    browser.goto(&stage.url()).await?;
    browser.says("#heard", "live").await?;
    // Forty seconds back.
    let back = "if (!document.querySelector('[data-plot=evidence] canvas')) return; \
                return ['shares', 'errors', 'requests', 'evidence'].map((name) => { \
                    const plot = document.querySelector(`[data-plot=${name}] [role=img]`); \
                    plot.dispatchEvent(new Event('blur')); \
                    for (let times = 0; times < 4; times++) \
                        plot.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft', shiftKey: true })); \
                    return plot.ariaLabel.replace(/, at [0-9:]+:/, ':').replaceAll('\\u00a0', ' ') })";
    let before = json!([
        "Share of requests: v1 50 %, v2 50 %, v3 –",
        "Errors: v1 0 %, v2 10 %, v3 –",
        "Requests: v1 20/s, v2 20/s, v3 –",
        "Evidence: worse 7, fine –",
    ]);
    eventually("the time before", DEADLINE, async || {
        let said = browser.run(back, &[]).await?;
        ensure!(said == before, "{said}");
        Ok(())
    })
    .await?;
    assert!(coloured(&browser, "requests").await? > 400, "two minutes of two lines");

    // What was missed while the connection was lost comes with the next one.
    stage.stop();
    browser.until("return /last heard [4-9].s ago/.test(document.getElementById('heard').textContent)").await?;
    stage.recall(last_seconds(4, 60));
    stage.start_again().await?;
    browser.says("#heard", "live").await?;
    let missed = "const plot = document.querySelector('[data-plot=shares] [role=img]'); \
                  plot.dispatchEvent(new Event('blur')); \
                  return Array.from({ length: 60 }, () => { \
                  plot.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' })); return plot.ariaLabel }) \
                  .some((said) => said.includes('v2 60'))";
    browser.until(missed).await?;
    let console = browser.console().await?;
    assert!(console.iter().all(|line| line.contains("net::ERR_")), "{console:#?}");
    Ok(())
}

/// A name that would do something if it were taken for markup.
const HOSTILE: &str = r#"<img src=x onerror="window.pwned=1">'/..%2f?#&amp;${pwned=1}"#;
const LONG: &str = "a-name-without-a-place-to-break-it-that-goes-on-and-on-and-on-and-on-and-on-and-on-and-on-and-on";

fn rollout_path(name: &str) -> String {
    let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
    format!("#/rollout/{encoded}")
}

/// Names, messages and ids that are hostile or too long, wherever there are any.
fn crowd() -> Value {
    let mut status = timeline::half_way();
    let service = &mut status["services"][0];
    for field in ["name", "rollout", "message", "reason", "stable"] {
        service[field] = HOSTILE.into();
    }
    service["target"] = LONG.into();
    service["unrouted"] = 3.into();
    service["verdict"]["message"] = HOSTILE.into();
    service["verdict"]["latency"] = json!({ "message": HOSTILE, "evidence": 0.4, "bound": 1000.0 });
    service["versions"][0]["name"] = HOSTILE.into();
    service["versions"][1]["name"] = LONG.into();
    service["versions"][1]["endpoints"]["notReady"] = json!([{ "endpoint": HOSTILE, "reason": HOSTILE }]);
    service["versions"][1]["drain"] = json!({ "state": HOSTILE, "inFlight": 1, "since": HOSTILE, "message": HOSTILE });
    let plain = timeline::service(LONG, vec![timeline::version("v1", 100.0, [1, 1], [0; 4])]);
    status["services"] = json!([status["services"][0], plain]);
    status["documentErrors"] = json!([HOSTILE, LONG]);
    let mut proxy = timeline::proxy(HOSTILE, 3);
    proxy["refused"] = json!({ "revision": 12, "errors": [HOSTILE] });
    proxy["vetoes"] = json!([{
        "service": HOSTILE, "version": HOSTILE, "until": timeline::now(),
        "requests": 10, "errors": 9, "othersRequests": 100, "othersErrors": 0,
    }]);
    status["proxies"] = json!([proxy, timeline::proxy(LONG, 12)]);
    status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_only_ever_text() -> anyhow::Result<()> {
    let (stage, browser) = open(crowd()).await?;
    let transition = json!({
        "time": HOSTILE, "rollout": 1, "phase": HOSTILE, "reason": HOSTILE, "message": HOSTILE, "step": HOSTILE,
    });
    stage.tell(HOSTILE, transition);
    let shown = HOSTILE.split_whitespace().collect::<Vec<_>>().join(" ");
    for view in ["#/", "#/proxies", &rollout_path(HOSTILE), &rollout_path("<b>nobody</b>")] {
        browser.run("location.hash = arguments[0]", &[view.into()]).await?;
        let expected = if view.ends_with("3e") { "There is no rollout of this name" } else { &shown };
        browser.says("main", expected).await?;
        browser.says("#problems", &format!("Not in force: {shown}")).await?;
        let markup = "return document.querySelectorAll('main img, main script, main b > *, #problems *:not(p)').length";
        assert_eq!(browser.run(markup, &[]).await?, 0, "{view}");
    }
    browser.run("location.hash = arguments[0]", &[rollout_path(HOSTILE).into()]).await?;
    browser.says("h1", &shown).await?;
    for command in ["abort", "rollback", "set-target"] {
        browser.click(&format!("[data-command={command}]")).await?;
        browser.says("dialog h2", &shown).await?;
        assert_eq!(browser.run("return document.querySelectorAll('dialog img').length", &[]).await?, 0);
        browser.keys(ESCAPE).await?;
        browser.until("return !document.querySelector('dialog')").await?;
    }
    browser.click("[data-command=abort]").await?;
    browser.click("dialog .solid").await?;
    browser.until("return !document.querySelector('dialog')").await?;
    let path = stage.commands().pop().context("no command")?.path;
    assert!(path.starts_with("/v1/rollouts/%3Cimg%20src%3Dx") && path.ends_with("%7Bpwned%3D1%7D/abort"), "{path}");

    assert_eq!(browser.run("return window.pwned ?? null", &[]).await?, Value::Null);
    assert_quiet(&browser).await?;
    // Were there a hole, the policy would close it: markup from text is refused, code in an attribute too.
    let hole =
        "try { document.body.innerHTML = '<p onclick=\"\">'; return 'open' } catch (error) { return error.name }";
    assert_eq!(browser.run(hole, &[]).await?, "TypeError");
    let attribute = "const p = document.querySelector('p'); p.setAttribute('onclick', 'window.pwned = 2'); p.click(); \
                     return window.pwned ?? null";
    let _ = browser.run(attribute, &[]).await;
    assert_eq!(browser.run("return window.pwned ?? null", &[]).await?, Value::Null);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_connection_is_said_and_comes_back() -> anyhow::Result<()> {
    let (stage, browser) = open(timeline::half_way()).await?;
    let greyed = "return getComputedStyle(document.querySelector('main > *')).filter";
    assert_eq!(browser.run(greyed, &[]).await?, "none");

    stage.stop();
    browser.says("#heard", "connection lost, last heard").await?;
    browser.says("#live", "Connection to the controller lost.").await?;
    browser.until("return /last heard [2-9].s ago/.test(document.getElementById('heard').textContent)").await?;
    assert_eq!(browser.run(greyed, &[]).await?, "grayscale(1)");
    browser.click("[data-command=abort]").await?;
    browser.says(".toolbar", "Abort: The controller is not heard now.").await?;
    assert!(browser.text("main").await?.contains("step 2: v2 has its 25 %"), "what was heard last stays");

    stage.change(|status| status["services"][0]["message"] = "back again".into());
    stage.start_again().await?;
    browser.says("#heard", "live").await?;
    browser.says(".why", "back again").await?;
    browser.until("return getComputedStyle(document.querySelector('main > *')).filter === 'none'").await?;

    // One that is connected and says nothing is as good as lost.
    stage.hush();
    browser.says("#heard", "connection lost, last heard").await?;
    browser.says("#heard", "live").await?;
    let console = browser.console().await?;
    assert!(console.iter().all(|line| line.contains("net::ERR_")), "{console:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asks_where_there_are_no_events() -> anyhow::Result<()> {
    let stage = FakeController::start(timeline::half_way()).await?;
    let browser = Browser::start().await?;
    for (status, revision) in [(404, 13), (503, 14)] {
        stage.without_events(status);
        browser.goto("about:blank").await?;
        browser.goto(&stage.url()).await?;
        browser.says("#heard", &format!("live, revision {}", revision - 1)).await?;
        stage.change(|status| status["revision"] = revision.into());
        browser.says("#heard", &format!("live, revision {revision}")).await?;
    }
    let console = browser.console().await?;
    assert!(console.iter().all(|line| line.contains("/v1/events")), "{console:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_rollouts_can_be_searched() -> anyhow::Result<()> {
    let services = (0..200).map(|number| {
        let shares = vec![
            timeline::version("v1", 90.0, [2, 2], [9, 0, 0, 0]),
            timeline::version("v2", 10.0, [2, 2], [1, 0, 0, 0]),
        ];
        let mut service = timeline::service(&format!("service-{number:03}"), shares);
        if number == 150 {
            (service["phase"], service["target"]) = ("Progressing".into(), "v2".into());
            service["step"] = json!({ "number": 1, "of": 3, "weight": 10, "holdSeconds": 30 });
        }
        service
    });
    let (stage, browser) = open(timeline::status(services.collect())).await?;
    assert_eq!(browser.text("#to-rollouts").await?, "Rollouts 200");
    let first = browser.text(".rollouts li:first-child").await?;
    assert!(first.starts_with("service-150 Progressing v1 90 % · v2 10 %") && first.contains("step 1 of 3"), "{first}");
    browser.find("input[type=search]").await?.send_keys("SERVICE-07").await?;
    browser.until("return document.querySelectorAll('.rollouts li').length === 10").await?;
    assert_eq!(browser.text(".search").await?, "10 of 200");
    browser.keys("3").await?;
    browser.until("return document.querySelectorAll('.rollouts li').length === 1").await?;
    browser.click(".rollouts a").await?;
    browser.says("h1", "service-073").await?;
    browser.click(".back").await?;
    browser.says(".rollouts", "service-199").await?;

    // No proxies, then many: those with something wrong are on top.
    browser.click("#to-proxies").await?;
    browser.says("main", "No proxy has asked for it yet.").await?;
    stage.change(|status| {
        let mut proxies: Vec<Value> = (0..2000).map(|number| timeline::proxy(&format!("edge-{number}"), 12)).collect();
        proxies[1234]["revision"] = 11.into();
        proxies[777]["refused"] = json!({ "revision": 12, "errors": ["services[0].name: too long"] });
        status["proxies"] = proxies.into();
    });
    browser.says("main", "1 of 2,000 proxies behind").await?;
    browser.says("tbody tr:first-child", "edge-777 12 4").await?;
    browser.says("tbody tr:first-child", "Refused revision 12: services[0].name: too long").await?;
    browser.says("tbody tr:nth-child(2)", "edge-1234 11, behind 4").await?;
    assert_eq!(browser.run("return document.querySelectorAll('tbody tr').length", &[]).await?, 300);
    stage.show(timeline::status(Vec::new()));
    browser.click("#to-rollouts").await?;
    browser.says("main", "No rollouts: the controller has no document yet.").await?;
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_rollout_of_several_services() -> anyhow::Result<()> {
    let mut status = timeline::half_way();
    let mut other = status["services"][0].clone();
    other["name"] = "basket".into();
    other["versions"][1]["endpoints"] = json!({ "ready": 1, "listed": 2 });
    status["services"] = json!([status["services"][0], other]);
    let (stage, browser) = open(status).await?;
    let counts = "return ['h1', '.toolbar', '.steps', '.service', '.versions', '.verdict', '.plot canvas'].map((one) => \
                  document.querySelectorAll(one).length)";
    browser.until("return document.querySelectorAll('.plot canvas').length === 7").await?;
    // There is one verdict, of all services together.
    assert_eq!(browser.run(counts, &[]).await?, json!([1, 1, 1, 2, 2, 1, 7]));
    assert!(browser.text(".together").await?.starts_with("All services together Evidence"));
    browser.says(".together .verdict", "42 of 2,145 failed").await?;
    assert_eq!(browser.text("[data-service=basket] h2").await?, "basket");
    browser.click("[data-command=promote-full]").await?;
    browser.says("dialog", "4 of 6 endpoints ready").await?;
    browser.keys(ESCAPE).await?;

    // Among others, the worst of its services speaks for it.
    stage.change(|status| {
        let search = timeline::service("search", vec![timeline::version("v1", 100.0, [2, 2], [0; 4])]);
        if let Some(services) = status["services"].as_array_mut() {
            services.push(search);
        }
    });
    browser.run("location.hash = '#/'", &[]).await?;
    browser.says(".rollouts li:first-child", "v1 75 % · v2 25 %").await?;
    // The page shows a rate over a second or more, and this status is the last one.
    tokio::time::sleep(Duration::from_secs(1)).await;
    stage.change(|status| {
        for (service, errors) in [(0, 42), (1, 52)] {
            let requests = &mut status["services"][service]["versions"][1]["requests"];
            (requests["ok"], requests["error"]) = (2_190.into(), errors.into());
        }
    });
    browser.says(".rollouts li:first-child", "errors – · 10 %").await?;

    stage.change(|status| drop(status["services"].as_array_mut().map(|services| services.drain(1..))));
    browser.until("return document.querySelectorAll('.service').length === 1").await?;
    browser.says(".service .verdict", "42 of 2,145 failed").await?;
    browser.until("return document.querySelectorAll('.plot canvas').length === 4").await?;
    assert_eq!(browser.run(counts, &[]).await?, json!([1, 1, 1, 1, 1, 1, 4]));
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn light_and_dark_and_for_everybody() -> anyhow::Result<()> {
    let mut status = timeline::half_way();
    let services = status["services"].as_array_mut().context("no services")?;
    services.push(timeline::service("search", vec![timeline::version("v1", 100.0, [2, 2], [0; 4])]));
    status["documentErrors"] = json!(["shift.yaml: spec.target: v9 is none of the versions"]);
    status["proxies"][0]["refused"] = json!({ "revision": 12, "errors": ["services[0].name: too long"] });
    let (stage, browser) = open(status).await?;
    let transition =
        json!({ "time": timeline::now(), "rollout": 1, "phase": "Failed", "reason": "Aborted", "message": "by you" });
    stage.tell("checkout", transition);
    let axe = fs::read_to_string(artifacts::axe()?)?;
    let mut grounds = Vec::new();
    for scheme in ["light", "dark"] {
        browser.prefer(&[("prefers-color-scheme", scheme), ("prefers-reduced-motion", "reduce")]).await?;
        grounds.push(browser.run("return getComputedStyle(document.body).backgroundColor", &[]).await?);
        for (view, says, open) in [
            ("#/", "Rollouts", None),
            ("#/proxies", "Refused revision", None),
            ("#/rollout/checkout", "Aborted", None),
            ("#/rollout/checkout", "Aborted", Some("[data-command=set-weight]")),
            ("#/rollout/checkout", "Aborted", Some("#token")),
        ] {
            browser.run("location.hash = arguments[0]", &[view.into()]).await?;
            browser.says("main", says).await?;
            if let Some(button) = open {
                browser.click(button).await?;
                browser.find("dialog[open]").await?;
            }
            browser.run(&axe, &[]).await?;
            let violations = browser.run_async(
                "return (await axe.run()).violations.map(({id, nodes}) => \
                 [id, ...nodes.map(({html, failureSummary}) => html + ' ' + failureSummary)])",
                &[],
            );
            assert_eq!(violations.await?, json!([]), "{scheme} {view} {open:?}");
            if open.is_some() {
                browser.keys(ESCAPE).await?;
                browser.until("return !document.querySelector('dialog')").await?;
            }
        }
        let moving = "return [...document.querySelectorAll('*')].filter((one) => \
                      getComputedStyle(one).transitionProperty !== 'none' && \
                      parseFloat(getComputedStyle(one).transitionDuration) > 0).length";
        assert_eq!(browser.run(moving, &[]).await?, 0);
    }
    assert_eq!(grounds, [json!("rgb(244, 246, 248)"), json!("rgb(14, 19, 24)")]);
    // Plots that are there follow at once: v1's line has the light one's colour again.
    let colour = "document.querySelector('[data-plot=errors] .swatch').style.backgroundColor";
    browser.until(&format!("return {colour} === 'rgb(88, 166, 242)'")).await?;
    browser.prefer(&[("prefers-color-scheme", "light")]).await?;
    browser.until(&format!("return {colour} === 'rgb(19, 104, 181)'")).await?;
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shows_what_a_real_controller_and_envoy_do() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let steps = json!([{ "weight": 20, "holdSeconds": FOR_EVER }]);
    rig.write(&rig.document(json!({ "target": "v2", "strategy": { "steps": steps } })))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(1).await?;
    let browser = Browser::start().await?;
    browser.goto(&format!("http://{}/", controller.address())).await?;
    until_shares(&controller, "v2 at its step", &[80.0, 20.0]).await?;
    let load = rig.load(200.0);
    browser.says("h1", SERVICE).await?;
    eventually("shares and rates", DEADLINE, async || {
        let (v1, v2) = (row(&browser, "v1").await?, row(&browser, "v2").await?);
        ensure!((&v1["Share"], &v2["Share"]) == (&json!("80\u{a0}%"), &json!("20\u{a0}%")), "{v1} {v2}");
        let rate = v1["Requests"].as_str().and_then(|rate| rate.strip_suffix("/s")?.parse::<f64>().ok());
        ensure!(rate.is_some_and(|rate| (130.0..190.0).contains(&rate)), "160 a second: {v1}");
        Ok(())
    })
    .await?;
    assert_eq!(browser.text("#to-proxies").await?, "Proxies 1");

    // What is clicked is done.
    browser.click("[data-command=set-weight]").await?;
    browser.keys("50").await?;
    browser.says("dialog", "v2 gets 50 %").await?;
    browser.click("dialog .solid").await?;
    until_shares(&controller, "what was asked for", &[50.0, 50.0]).await?;
    browser.says(".title .chip", "Paused").await?;
    browser.says(".history li:first-child", "Paused WeightSet, step 1 v2 is to get 50 % by hand").await?;
    browser.says(".history", "Started").await?;
    assert_quiet(&browser).await?;

    rig.version("v2")[0].set(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 });
    browser.says(".title .chip", "Failed").await?;
    let seen = until_shares(&controller, "v1 alone", &[100.0, 0.0]).await?;
    assert!(browser.text(".why").await?.contains(seen.message()));
    let tally = load.stop().await?;
    eventually("the page to have counted what the client has", DEADLINE, async || {
        for version in ["v1", "v2"] {
            let row = row(&browser, version).await?;
            let counted = ["OK", "Errors"].map(|cell| row[cell].as_str().unwrap_or_default().replace(',', ""));
            let expected = [2, 5].map(|class| tally.of_class(version, class).to_string());
            ensure!(counted == expected, "{version}: {counted:?}, not {expected:?}");
        }
        Ok(())
    })
    .await?;

    // Who comes only now sees what was before. There is a sample every two seconds.
    let counted = [2, 5].map(|class| tally.of_class("v2", class));
    eventually("the last sample", DEADLINE, async || {
        let series: Value = serde_json::from_str(&controller.get(&format!("/v1/rollouts/{SERVICE}/series")).await?)?;
        let [v1, v2] = [0, 1].map(|version| &series["services"][0]["versions"][version]);
        let last = |list: &str| v2[list].as_array().and_then(|list| list.last()?.as_u64());
        let had_80 = v1["weight"].as_array().is_some_and(|weights| weights.contains(&json!(80.0)));
        ensure!(had_80 && last("errors") == Some(counted[1]), "{series}");
        ensure!(last("requests") == Some(counted[0] + counted[1]), "{series}");
        Ok(())
    })
    .await?;
    browser.goto("about:blank").await?;
    browser.goto(&format!("http://{}/", controller.address())).await?;
    eventually("what was before", DEADLINE, async || {
        let pixels = coloured(&browser, "requests").await?;
        ensure!(pixels > 100, "{pixels} coloured pixels");
        Ok(())
    })
    .await?;

    // An Envoy that is killed and started again is one proxy.
    let first = controller.status().await?["proxies"][0].clone();
    drop(envoy);
    let _envoy = rig.start_envoy(1).await?;
    eventually("its second run alone", DEADLINE, async || {
        let status = controller.status().await?;
        let [second] = status["proxies"].as_array().map_or(&[][..], Vec::as_slice) else {
            bail!("{}", status["proxies"])
        };
        ensure!(second["id"] == first["id"] && second["start"] != first["start"], "{first} {second}");
        Ok(())
    })
    .await?;
    browser.click("#to-proxies").await?;
    browser.says("main", "1 proxy, none behind").await?;
    browser.until("return document.querySelectorAll('tbody tr').length === 1").await?;
    browser.says("tbody [data-label='Last seen']", "just now").await?;
    assert_quiet(&browser).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_seen_is_bounded_and_honest() -> anyhow::Result<()> {
    let (_stage, browser) = open(timeline::half_way()).await?;
    let seen = "
        const { Record, KEEP } = await import('/page/history.js');
        const record = new Record();
        const status = (ok, error = 0) => ({ services: [{ name: 's', phase: 'Progressing', step: { number: 1, weight: 5 },
            verdict: { evidence: ok, passEvidence: 1 }, versions: [{ name: 'v1', weight: 100,
            requests: { ok, error, clientError: 0, cancelled: 0 } }] }] });
        const version = () => record.service('s').version('v1');
        const last = (series, n) => record.values(series, n);
        const result = {};
        for (let second = 1000; second < 4000; second++) record.take(status(second * 50, second), second * 1000);
        result.kept = [KEEP, version().requests.length, last(version().share, KEEP).filter((value) => value !== null).length];
        result.rates = record.rates('s', 'v1');
        // A second without a status is bridged, a minute is a gap.
        record.take(status(4001 * 50, 4001), 4001000);
        result.bridged = last(version().share, 3);
        record.take(status(4061 * 50, 4061), 4061000);
        result.gap = last(version().share, 61).filter((value) => value === null).length;
        result.afterGap = last(version().requests, 1);
        // Counts that restart do not give a negative rate.
        record.take(status(4062 * 50, 4062), 4062000);
        record.take(status(10), 4063000);
        result.anew = last(version().requests, 1);
        record.take(status(60), 4064000);
        result.after = last(version().requests, 1);
        // After a new connection, what was counted meanwhile comes in one second, from one proxy after the other.
        record.anew();
        [60, 400, 700, 740, 780].forEach((ok, index) => record.take(status(ok), 4066000 + 1000 * index));
        result.late = last(version().requests, 5);
        // What the controller kept fills the gaps, and nothing else.
        const late = new Record();
        late.take(status(870, 90), 7000500);
        const ages = [8, 6, 4, 2];
        const past = (age) => 1000 - 40 * age;
        late.fill({
            now: new Date(7003500).toISOString(),
            times: ages.map((age) => new Date(7003500 - 1000 * age).toISOString()),
            services: [{ name: 's', evidence: ages, passEvidence: [null, null, null, null], versions: [{ name: 'v1',
                weight: [null, 30, 20, 10], requests: ages.map(past), errors: ages.map((age) => 100 - 10 * age),
                cancelled: [0, 0, 0, 0] }] }],
        }, 7001500);
        const one = late.service('s');
        result.filled = ['share', 'requests', 'errors'].map((name) => late.values(one.version('v1')[name], 9));
        result.filledEvidence = late.values(one.evidence, 9);
        result.first = one.first;
        const fresh = new Record();
        fresh.take(status(1), 9000000);
        result.fresh = fresh.values(fresh.service('s').version('v1').share, 3);
        record.take({ services: [] }, 4065000);
        result.gone = record.service('s') === undefined;
        return result;";
    let result = browser.run_async(seen, &[]).await?;
    assert_eq!(result["kept"], json!([900, 900, 900]));
    assert_eq!(result["rates"]["requests"], 51);
    assert!((result["rates"]["errors"].as_f64().context("no rate")? - 1.0 / 51.0).abs() < 1e-9);
    assert_eq!(result["bridged"], json!([100, 100, 100]));
    assert_eq!((&result["gap"], &result["afterGap"]), (&json!(59), &json!([null])));
    assert_eq!((&result["anew"], &result["after"]), (&json!([null]), &json!([50])));
    assert_eq!(result["late"], json!([null, null, null, 40, 40]));
    let filled = json!([
        [null, null, null, 30, 30, 20, 20, 10, 100],
        [null, null, null, null, null, 40, 40, 40, 40],
        [null, null, null, null, null, 0.25, 0.25, 0.25, 0.25],
    ]);
    assert_eq!(result["filled"], filled);
    assert_eq!(result["filledEvidence"], json!([null, 8, 8, 6, 6, 4, 4, 2, 870]));
    assert_eq!(result["first"], 6993);
    assert_eq!((&result["fresh"], &result["gone"]), (&json!([null, null, 100]), &json!(true)));

    let events = "
        const { Events } = await import('/page/sse.js');
        const text = ': hello\\r\\n\\r\\nevent: status\\r\\ndata: {\"a\":\\r\\ndata: 1}\\r\\n\\r\\ndata:x\\n\\nevent: y\\n\\nid: 1\\rdata\\r\\r';
        const whole = new Events().take(text + '\\n');
        const bytes = new Events();
        const pieces = [...text + '\\n'].flatMap((one) => bytes.take(one));
        return [whole, pieces];";
    let expected = json!([
        { "event": "status", "data": "{\"a\":\n1}" }, { "event": "message", "data": "x" }, { "event": "message", "data": "" },
    ]);
    assert_eq!(browser.run_async(events, &[]).await?, json!([expected, expected]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_come_with_their_types_and_policies() -> anyhow::Result<()> {
    let stage = FakeController::start(timeline::status(Vec::new())).await?;
    let folder = artifacts::workspace().join("controller/src/page");
    let mut paths = vec!["/".to_owned()];
    for file in fs::read_dir(&folder)? {
        let name = file?.file_name().into_string().ok().context("a name that is not UTF-8")?;
        if !["README.md", "uPlot.LICENSE", "index.html"].contains(&name.as_str()) {
            paths.push(format!("/page/{name}"));
        }
    }
    for path in &paths {
        let answer = file(stage.page(), path, None).await?;
        let types = [("/", "text/html"), ("js", "text/javascript"), ("css", "text/css"), ("svg", "image/svg+xml")];
        let expected = types.iter().find(|(end, _)| path.ends_with(end)).context("an unknown type")?.1;
        let is = |name: &str| answer.header(name).unwrap_or_default();
        assert!(answer.status == 200 && is("content-type").starts_with(expected), "{path}: {}", is("content-type"));
        let policy = is("content-security-policy");
        for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "require-trusted-types-for"] {
            assert!(policy.contains(part) && !policy.contains("unsafe"), "{path}: {policy}");
        }
        assert_eq!((is("x-content-type-options"), is("referrer-policy")), ("nosniff".into(), "no-referrer".into()));
        assert_eq!(is("cache-control"), "no-cache");
        // A browser that has it is told so, with as little as that takes.
        let again = file(stage.page(), path, Some(&is("etag"))).await?;
        assert_eq!((again.status, again.body.len()), (304, 0), "{path}");
        let other = file(stage.page(), path, Some("\"other\"")).await?;
        assert_eq!((other.status, other.body), (200, answer.body), "{path}");
    }
    assert_eq!(get(stage.page(), "/page/README.md").send().await?.status, 404);
    Ok(())
}

async fn file(address: SocketAddr, path: &str, has: Option<&str>) -> anyhow::Result<Response> {
    let request = Request::new(address, "GET", path);
    match has {
        Some(tag) => request.header("if-none-match", tag).send().await,
        None => request.send().await,
    }
}

/// So many times as fast as in life, so that five minutes of plots are there in half a minute.
const SPEED: f64 = 10.0;
const TO_LOAD: Duration = Duration::from_secs(6);

/// `make pictures`: the README's pictures, of the play.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "makes pictures for the README, and takes a while: make pictures"]
async fn pictures() -> anyhow::Result<()> {
    let folder = artifacts::workspace().join("docs/images");
    fs::create_dir_all(&folder)?;
    for (width, height, is_phone, second, files) in [
        (390, 844, true, 84, &[("light", "page-phone.png")][..]),
        (1240, 1190, false, 262, &[("light", "page-light.png"), ("dark", "page-dark.png")]),
    ] {
        let browser = Browser::start().await?;
        browser.screen(width, height, is_phone).await?;
        let _stage = play_until(second, &browser).await?;
        for (scheme, name) in files {
            browser.prefer(&[("prefers-color-scheme", scheme), ("prefers-reduced-motion", "reduce")]).await?;
            // Two frames later everything is drawn.
            let drawn = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))";
            browser.run_async(drawn, &[]).await?;
            let picture = small(&browser.picture().await?)?;
            ensure!(picture.len() < 150_000, "{name} would have {} bytes", picture.len());
            fs::write(folder.join(name), picture)?;
        }
    }
    Ok(())
}

/// A page that has seen so many seconds of the play, and whose clock stands still from then on.
async fn play_until(second: u64, browser: &Browser) -> anyhow::Result<FakeController> {
    let stage = FakeController::start(timeline::status(Vec::new())).await?;
    // The page's clock stands still until it is loaded.
    let (begin, started) = (Timestamp::now(), Instant::now() + TO_LOAD);
    let mut play = Timeline::new(begin);
    stage.show(play.status());
    let (from, rest) = (begin.as_millisecond(), TO_LOAD.as_millis());
    let clock = format!(
        "const real = Date.now.bind(Date); \
         Date.now = () => window.stopped ?? {from} + Math.max(0, real() - {from} - {rest}) * {SPEED};"
    );
    browser.devtools("Page.addScriptToEvaluateOnNewDocument", json!({ "source": clock })).await?;
    browser.goto(&format!("{}#/rollout/checkout", stage.url())).await?;
    browser.says("h1", "checkout").await?;
    while play.second() < second {
        sleep_until(started + Duration::from_secs_f64((play.second() + 1) as f64 / SPEED)).await;
        play.tick();
        for transition in play.told() {
            stage.tell("checkout", transition);
        }
        stage.show(play.status());
    }
    browser.run("window.stopped = Date.now()", &[]).await?;
    Ok(stage)
}

/// A PNG once more, in its 256 most frequent colours (the others are edges of letters), which halves it.
fn small(picture: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut reader = png::Decoder::new(Cursor::new(picture)).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().context("too large")?];
    let info = reader.next_frame(&mut pixels)?;
    let colours: Vec<[u8; 3]> =
        pixels.chunks(info.color_type.samples()).map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    let mut counts = HashMap::<[u8; 3], usize>::new();
    colours.iter().for_each(|colour| *counts.entry(*colour).or_default() += 1);
    let mut palette: Vec<[u8; 3]> = counts.keys().copied().collect();
    palette.sort_by_key(|colour| (Reverse(counts[colour]), *colour));
    palette.truncate(256);
    let distance =
        |a: &[u8; 3], b: &[u8; 3]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b) as u32).map(|d| d * d).sum::<u32>();
    let nearest =
        |colour: &[u8; 3]| (0..palette.len()).min_by_key(|&index| distance(&palette[index], colour)).unwrap_or(0);
    let places: HashMap<[u8; 3], u8> = counts.keys().map(|colour| (*colour, nearest(colour) as u8)).collect();

    let mut small = Vec::new();
    let mut encoder = png::Encoder::new(&mut small, info.width, info.height);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_palette(palette.concat());
    encoder.set_compression(png::Compression::High);
    encoder.set_filter(png::Filter::NoFilter);
    let indexes: Vec<u8> = colours.iter().map(|colour| places[colour]).collect();
    encoder.write_header()?.write_image_data(&indexes)?;
    Ok(small)
}
