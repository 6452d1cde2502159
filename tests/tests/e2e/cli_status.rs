//! `tideshift status`, and the command line as a whole: what it shows, how it ends, and that it helps.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::artifacts;
use tideshift_tests::controller::cli;
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, TestBed};
use tideshift_tests::wait::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_for_people_and_json_for_programs() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 2), ("v2", 1), ("v3", 1)]).await?;
    rig.set_ready("v3", false);
    let steps = json!([{ "weight": 25, "holdSeconds": FOR_EVER }]);
    rig.write(&rig.document(json!({ "target": "v2", "strategy": { "steps": steps } })))?;
    let controller = rig.start_controller().await?;
    let server = format!("http://{}", controller.address());

    let held = "shop: Progressing, step 1 of 2 (25 %, held ";
    let table = eventually("the first step", DEADLINE, async || {
        let table = cli(["status", "--server", &server])?;
        ensure!(table.stdout.starts_with(held), "{}{}", table.stdout, table.stderr);
        Ok(table)
    });
    let table = table.await?;
    assert_eq!((table.code, table.stderr.as_str()), (Some(0), ""));
    assert!(!table.stdout.contains('\x1b'), "no colours and no cursor where there is no terminal");
    let lines: Vec<Vec<&str>> = table.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    let row = |name: &str| lines.iter().find(|row| row.first() == Some(&name)).cloned().unwrap_or_default();
    assert_eq!(row("VERSION")[..4], ["VERSION", "ROLE", "WEIGHT", "READY"]);
    assert_eq!(row("v1")[..5], ["v1", "stable", "75", "%", "2/2"]);
    assert_eq!(row("v2")[..5], ["v2", "target", "25", "%", "1/1"]);
    // It is not known yet that nothing of it is in flight.
    assert_eq!(row("v3")[..5], ["v3", "draining", "0", "%", "0/1"]);
    assert!(row("v3").join(" ").ends_with(": HTTP status 503"), "{}", table.stdout);
    assert!(table.stdout.contains("no proxy has asked for it yet"), "{}", table.stdout);

    // The environment says where the controller is as well.
    let json = Command::new(artifacts::tideshift()?)
        .args(["status", "-o", "json"])
        .env("TIDESHIFT_SERVER", format!("{server}/"))
        .output()?;
    let json: Value = serde_json::from_slice(&json.stdout)?;
    assert_eq!(json, controller_status(&controller.status().await?, &json));

    // Again every second, one line each; a reader that goes away ends it.
    let mut watch = Command::new(artifacts::tideshift()?)
        .args(["status", "--watch", "-o", "json", "--server", &server])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(watch.stdout.take().context("no output")?).lines();
    for _ in 0..2 {
        let line: Value = serde_json::from_str(&lines.next().context("no line")??)?;
        assert_eq!(line["services"][0]["versions"][1]["weight"], 25.0);
    }
    drop(lines);
    let ended = eventually("the watch to end", DEADLINE, async || watch.try_wait()?.context("it runs")).await;
    let _ = watch.kill();
    assert_eq!(ended?.code(), Some(0));

    drop(controller);
    let gone = cli(["status", "--server", &server])?;
    let expected = format!("error: {server}/v1/status: connection refused; is `tideshift serve` running there?\n");
    assert_eq!((gone.code, gone.stdout.as_str(), gone.stderr), (Some(1), "", expected));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watching_goes_on_over_a_restart_of_the_controller() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("v1", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    let mut controller = rig.start_controller().await?;
    let server = format!("http://{}", controller.address());
    let errors = rig.path("errors");
    let mut watch = Command::new(artifacts::tideshift()?)
        .args(["status", "--watch", "-o", "json", "--server", &server])
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(&errors)?)
        .spawn()?;
    let mut lines = BufReader::new(watch.stdout.take().context("no output")?).lines();
    let mut shows = || -> anyhow::Result<Value> { Ok(serde_json::from_str(&lines.next().context("it ended")??)?) };
    let outcome = async {
        assert_eq!(shows()?["services"][0]["stable"], "v1");
        controller.kill()?;
        eventually("words on that", DEADLINE, async || {
            let said = std::fs::read_to_string(&errors)?;
            ensure!(said.contains("is `tideshift serve` running there?"), "{said}");
            Ok(())
        })
        .await?;
        controller.start_again().await?;
        let epoch = controller.status().await?["epoch"].clone();
        assert_eq!(shows()?["epoch"], epoch);
        assert_eq!(std::fs::read_to_string(&errors)?.lines().count(), 1, "once");
        anyhow::Ok(())
    };
    let outcome = outcome.await;
    watch.kill()?;
    watch.wait()?;
    outcome
}

/// The status that the API gave, with the one field that time moves as it is in `other`.
fn controller_status(status: &Value, other: &Value) -> Value {
    let mut status = status.clone();
    status["services"][0]["step"]["heldSeconds"] = other["services"][0]["step"]["heldSeconds"].clone();
    status
}

#[test]
fn every_command_helps_and_says_its_defaults() -> anyhow::Result<()> {
    let no_command = cli::<&str>([])?;
    let help = cli(["--help"])?;
    assert!(help.stdout.contains("7 applied, but the controller could not"), "{}", help.stdout);
    assert_eq!((no_command.code, help.code), (Some(2), Some(0)));
    for command in ["serve", "status", "validate", "explain", "render"] {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{command}");
        assert!(no_command.stderr.contains(&format!("\n  {command} ")), "{command}");
    }
    for (command, expected) in [
        (
            &["serve"][..],
            &["[default: 127.0.0.1:7460]", "TIDESHIFT_LISTEN", "[default: .tideshift/NAME", "Examples:"][..],
        ),
        (&["status"], &["[default: http://127.0.0.1:7460]", "TIDESHIFT_SERVER", "[default: table]", "Examples:"]),
        (&["validate"], &["`-` reads standard input", "Exit codes: 0 all documents are valid; 2", "Examples:"]),
        (&["explain"], &["[default: GET]", "[default: /]", "[default: text]", "TIDESHIFT_SERVER", "Examples:"]),
        (&["render", "envoy"], &["[default: 127.0.0.1:10000]", "[default: target/tideshift.wasm]", "Examples:"]),
    ] {
        let help = cli(command.iter().chain(&["--help"]))?;
        assert_eq!(help.code, Some(0));
        for expected in expected {
            assert!(help.stdout.contains(expected), "{command:?}: {expected} is not in\n{}", help.stdout);
        }
    }
    let version = cli(["--version"])?;
    assert_eq!(version.stdout, format!("tideshift {}\n", env!("CARGO_PKG_VERSION")));
    let unknown = cli(["serv"])?;
    assert!(unknown.code == Some(2) && unknown.stderr.contains("'serve'"), "{}", unknown.stderr);
    assert_eq!(cli(["validate"])?.code, Some(2), "-f is required");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_are_lines_of_json_or_text_and_without_colours_where_none_are_wanted() -> anyhow::Result<()> {
    let rig = TestBed::new(&[("v1", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    let file = rig.file();
    for (further, is_json) in [(&[][..], true), (&["--log-format", "text"], false), (&["--log-format", "json"], true)] {
        let mut controller = tideshift_tests::controller::Controller::start_with(&[&file], further).await?;
        assert_eq!(controller.terminate().await?.code(), Some(0));
        let log = controller.log();
        assert!(log.contains("serving") && !log.contains('\x1b'), "{log}");
        for line in log.lines() {
            ensure!(serde_json::from_str::<Value>(line).is_ok() == is_json, "{further:?}: {line}");
        }
    }
    // On a terminal there are colours, unless NO_COLOR is set.
    for (no_color, coloured) in [(None, true), (Some("1"), false)] {
        let command = format!("'{}' validate -f /nowhere --nonsense", artifacts::tideshift()?.display());
        let mut terminal = Command::new("script");
        terminal.args(["-qec", &command, "/dev/null"]).env_remove("NO_COLOR").env("TERM", "xterm-256color");
        no_color.map(|value| terminal.env("NO_COLOR", value));
        let output = terminal.stdin(Stdio::null()).output().context("script, of util-linux, is needed")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("--nonsense"), "{said}");
        assert_eq!(said.contains('\x1b'), coloured, "NO_COLOR={no_color:?}: {said:?}");
    }
    Ok(())
}
