//! `tideshift simulate` as a user sees it: what it prints and draws, its errors and exit codes.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;
use tideshift_tests::artifacts;
use tideshift_tests::controller::{Output, cli};

const SHIFT: &str = r#"
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: checkout}
spec:
  versions:
  - {name: v1, endpoints: ["127.0.0.1:9001"]}
  - {name: v2, endpoints: ["127.0.0.1:9002"]}
  stable: v1
  target: v2
  strategy: {steps: [{weight: 10, holdSeconds: 20}, {weight: 100}]}
"#;

const BAD_RELEASE: &str = "
apiVersion: tideshift.dev/v1alpha1
kind: Scenario
durationSeconds: 60
requestsPerSecond: 100
versions: [{name: v2, errorRate: [{atSeconds: 0, value: 0}, {atSeconds: 10, value: 1}]}]
";

/// The two documents in a folder of their own.
struct World(TempDir);

impl World {
    fn new(shift: &str, scenario: &str) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("shift.yaml"), shift)?;
        fs::write(folder.path().join("scenario.yaml"), scenario)?;
        Ok(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What `tideshift simulate` says of them, the folder's name left out.
    fn simulate(&self, further: &[&str]) -> anyhow::Result<Output> {
        let path = |name| self.path(name).to_str().map(str::to_owned).context("a path that is not UTF-8");
        let (shift, scenario) = (path("shift.yaml")?, path("scenario.yaml")?);
        let arguments = ["simulate", "-f", &shift, "--scenario", &scenario];
        let mut output = cli(arguments.iter().chain(further))?;
        let folder = format!("{}/", self.0.path().display());
        output.stdout = output.stdout.replace(&folder, "");
        output.stderr = output.stderr.replace(&folder, "");
        Ok(output)
    }
}

#[test]
fn a_bad_release_is_played_through_and_drawn() -> anyhow::Result<()> {
    let world = World::new(SHIFT, BAD_RELEASE)?;
    let picture = world.path("simulation.svg");
    let file = picture.to_str().context("a path that is not UTF-8")?.to_owned();
    let output = world.simulate(&["--svg", &file])?;
    // It did what it was asked for; how the rollout ended is what it says.
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
    let lines: Vec<&str> = output.stdout.lines().collect();
    ensure!(lines[0].contains("Started") && lines[0].contains("moving from v1 to v2"), "{}", output.stdout);
    ensure!(lines.iter().any(|line| line.starts_with("Failed after 0:1")), "{}", output.stdout);
    ensure!(lines.contains(&"The picture is in simulation.svg."), "{}", output.stdout);
    let drawn = fs::read_to_string(&picture)?;
    ensure!(drawn.starts_with("<svg ") && drawn.ends_with("</svg>\n") && drawn.contains("checkout: Failed after 0:1"));

    let again = world.simulate(&["--svg", &file])?;
    assert_eq!((again.stdout, fs::read_to_string(&picture)?), (output.stdout, drawn), "the same seed");
    let output = world.simulate(&["--svg", "/nowhere/at/all.svg"])?;
    let error = "error: /nowhere/at/all.svg: cannot be written: no such file or directory\n";
    assert_eq!((output.code, output.stderr.as_str()), (Some(1), error));
    Ok(())
}

#[test]
fn programs_get_the_series_and_the_transitions() -> anyhow::Result<()> {
    let world = World::new(SHIFT, BAD_RELEASE)?;
    let run: Value = serde_json::from_str(&world.simulate(&["--output", "json", "--seed", "7"])?.stdout)?;
    assert_eq!((&run["phase"], &run["seed"]), (&"Failed".into(), &7.into()));
    assert_eq!(run["transitions"][0]["reason"], "Started");
    let samples = run["samples"].as_array().context("no samples")?;
    ensure!(samples.iter().any(|sample| sample["services"][0][1]["weight"] == 10.0), "{run}");
    let ended = run["endedAtSeconds"].as_f64().context("it did not end")?;
    ensure!((10.0..20.0).contains(&ended), "{ended}");
    Ok(())
}

#[test]
fn many_runs_are_counted() -> anyhow::Result<()> {
    let world = World::new(SHIFT, BAD_RELEASE)?;
    let output = world.simulate(&["--runs", "20"])?;
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
    let failed = output.stdout.lines().find(|line| line.trim_start().starts_with("Failed")).context("no line")?;
    assert_eq!(failed.split_whitespace().nth(1), Some("20"), "{}", output.stdout);
    let many: Value = serde_json::from_str(&world.simulate(&["--runs", "3", "-o", "json"])?.stdout)?;
    assert_eq!((&many["runs"], &many["endings"][1]["runs"]), (&3.into(), &3.into()), "{many}");
    let output = world.simulate(&["--runs", "3", "--svg", "x.svg"])?;
    assert_eq!(output.code, Some(2), "one picture is of one run: {output:?}");
    Ok(())
}

#[test]
fn errors_of_both_documents_come_at_once() -> anyhow::Result<()> {
    let shift = SHIFT.replace("stable: v1", "stable: v9");
    let scenario = BAD_RELEASE.replace("durationSeconds: 60", "durationSeconds: 0").replace("errorRate", "errorRat");
    let output = World::new(&shift, &scenario)?.simulate(&[])?;
    assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""));
    let expected = [
        "shift.yaml: spec.stable: \"v9\" is not allowed; expected one of the versions v1, v2",
        "scenario.yaml: durationSeconds: 0 is not allowed; expected an integer from 1 to 604800",
        "scenario.yaml: versions[0].errorRat: unknown field; did you mean `errorRate`? (known here: ",
    ];
    assert_eq!(output.stderr.lines().count(), expected.len(), "{}", output.stderr);
    for (line, expected) in output.stderr.lines().zip(expected) {
        ensure!(line.starts_with(expected), "{line}\nis not\n{expected}");
    }
    let two = format!("{SHIFT}---\n{}", SHIFT.replace("checkout", "search"));
    let output = World::new(&two, BAD_RELEASE)?.simulate(&[])?;
    let error = "shift.yaml: 2 documents in it; expected one\n";
    assert_eq!((output.code, output.stderr.as_str()), (Some(2), error));
    Ok(())
}

#[test]
fn the_examples_work_as_they_stand() -> anyhow::Result<()> {
    let configs = artifacts::workspace().join("envoy-configs");
    for (shift, scenario) in
        [("checkout.yaml", "scenario.yaml"), ("quick-start/shift.yaml", "quick-start/scenario.yaml")]
    {
        let (shift, scenario) = (configs.join(shift), configs.join(scenario));
        let output =
            cli(["simulate".as_ref(), "-f".as_ref(), shift.as_os_str(), "--scenario".as_ref(), scenario.as_os_str()])?;
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{}", shift.display());
    }
    Ok(())
}
