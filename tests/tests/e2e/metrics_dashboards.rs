//! The dashboard and the alert rules in `envoy-configs/` name nothing that is not there: every metric, label and value
//! exists in what a real Envoy and a real controller say of themselves.

mod promql;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context as _, ensure};
use promql::Existing;
use serde_json::{Value, json};
use tideshift_tests::artifacts;
use tideshift_tests::client::get;
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, TestBed, next_answers, until_shares};
use tideshift_tests::wait::eventually;

fn text(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(artifacts::workspace().join(path)).with_context(|| path.to_owned())
}

fn yaml(path: &str) -> anyhow::Result<Value> {
    serde_saphyr::from_str(&text(path)?).with_context(|| path.to_owned())
}

fn dashboard() -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&text("envoy-configs/grafana-dashboard.json")?)?)
}

fn list<'a>(value: &'a Value, what: &str) -> anyhow::Result<&'a Vec<Value>> {
    value.as_array().with_context(|| format!("no list of {what}: {value}"))
}

fn string<'a>(value: &'a Value, field: &str) -> anyhow::Result<&'a str> {
    let text = value[field].as_str().filter(|text| !text.trim().is_empty());
    text.with_context(|| format!("no {field} in {value}"))
}

/// What Grafana fills in.
fn filled_in(expression: &str) -> String {
    let all = [("$__rate_interval", "1m"), ("$__range", "1h"), ("$rollout", ".*"), ("$service", ".*")];
    all.iter().fold(expression.to_owned(), |expression, (variable, value)| expression.replace(variable, value))
}

/// The words between `{{` and `}}`.
fn placeholders(text: &str) -> impl Iterator<Item = &str> {
    text.split("{{").skip(1).filter_map(|rest| rest.split_once("}}")).map(|(word, _)| word.trim())
}

/// A real Envoy and a controller half-way in a rollout with everything that has metrics of its own.
async fn existing() -> anyhow::Result<Existing> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    let steps = json!({ "steps": [{ "weight": 50, "holdSeconds": FOR_EVER }] });
    rig.write(&rig.document(json!({ "target": "v2", "strategy": steps, "analysis": { "latency": {} } })))?;
    let controller = rig.start_controller().await?;
    let envoy = rig.start_envoy(2).await?;
    let load = rig.load(200.0);
    until_shares(&controller, "v2 at its step", &[50.0, 50.0]).await?;
    next_answers(&load, 200).await?;
    let mut existing = Existing::default();
    eventually("what was judged", DEADLINE, async || {
        let metrics = controller.metrics().await?;
        let judged = metrics.sum("tideshift_controller_verdict_requests", &[("side", "target")]);
        ensure!(judged > Some(10.0), "{judged:?}");
        existing.add(&metrics);
        Ok(())
    })
    .await?;
    existing.add(&envoy.prometheus().await?);
    // The paths that the example of a configuration scrapes.
    let scrapes = yaml("envoy-configs/prometheus.yaml")?;
    let scrapes = list(&scrapes["scrape_configs"], "scrapes")?;
    let addresses = [("tideshift-controller", controller.address()), ("envoy", envoy.admin_address())];
    for (job, address) in addresses {
        let scrape = scrapes.iter().find(|scrape| scrape["job_name"] == job).with_context(|| job.to_owned())?;
        let answer = get(address, string(scrape, "metrics_path")?).send().await?;
        ensure!(answer.status == 200 && answer.text().contains("tideshift_"), "{job}: {}", answer.status);
    }
    load.stop().await?;
    // Reasons are shown one at a time; what there are is documented.
    let documented = text("docs/rollouts.md")?;
    let phases = documented.lines().filter(|line| line.starts_with("| `") && line.matches('|').count() == 4);
    let words = phases.flat_map(|line| line.split('`').skip(1).step_by(2)).map(str::to_owned);
    existing.add_values("reason", words.collect::<Vec<_>>());
    Ok(existing)
}

/// An expression, and the texts beside it that show labels of its result.
struct Shown {
    place: String,
    expression: String,
    beside: Vec<String>,
}

impl Shown {
    fn check(&self, existing: &Existing) -> anyhow::Result<()> {
        let labels = existing.check(&self.expression).with_context(|| self.place.clone())?;
        for text in &self.beside {
            let unknown = placeholders(text).find(|word| !labels.contains(*word));
            ensure!(unknown.is_none(), "{}: {text} shows {unknown:?}, there are {labels:?}", self.place);
        }
        Ok(())
    }
}

fn of_dashboard(dashboard: &Value) -> anyhow::Result<Vec<Shown>> {
    let mut all = Vec::new();
    for panel in list(&dashboard["panels"], "panels")?.iter().filter(|panel| panel["type"] != "row") {
        for target in list(&panel["targets"], "targets")? {
            let beside = vec![target["legendFormat"].as_str().context("no legend")?.to_owned()];
            let expression = filled_in(string(target, "expr")?);
            all.push(Shown { place: string(panel, "title")?.to_owned(), expression, beside });
        }
    }
    for annotation in list(&dashboard["annotations"]["list"], "annotations")? {
        if annotation["builtIn"] == 1 {
            continue;
        }
        let mut beside =
            vec![string(annotation, "titleFormat")?.to_owned(), string(annotation, "textFormat")?.to_owned()];
        beside.extend(string(annotation, "tagKeys")?.split(',').map(|key| format!("{{{{{key}}}}}")));
        let expression = filled_in(string(annotation, "expr")?);
        all.push(Shown { place: string(annotation, "name")?.to_owned(), expression, beside });
    }
    for variable in list(&dashboard["templating"]["list"], "variables")? {
        if variable["type"] == "query" {
            let query = string(&variable["query"], "query")?;
            let inner = query.strip_prefix("label_values(").and_then(|query| query.strip_suffix(')'));
            let (expression, label) = inner.and_then(|inner| inner.rsplit_once(", ")).context("not label_values")?;
            let (place, beside) = (format!("${}", string(variable, "name")?), vec![format!("{{{{{label}}}}}")]);
            all.push(Shown { place, expression: filled_in(expression), beside });
        }
    }
    Ok(all)
}

fn of_rules(rules: &Value) -> anyhow::Result<Vec<Shown>> {
    let mut all = Vec::new();
    for group in list(&rules["groups"], "groups")? {
        for rule in list(&group["rules"], "rules")? {
            let texts = rule["annotations"].as_object().context("no annotations")?.values();
            let texts = texts.map(|text| text.as_str().unwrap_or_default());
            // `$value` is always there, `humanize` is Prometheus' own.
            let labels = texts.flat_map(placeholders).filter_map(|word| word.strip_prefix("$labels."));
            let beside = labels.map(|label| format!("{{{{{label}}}}}")).collect();
            all.push(Shown {
                place: string(rule, "alert")?.to_owned(),
                expression: string(rule, "expr")?.to_owned(),
                beside,
            });
        }
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_label_and_value_that_is_named_exists() -> anyhow::Result<()> {
    let existing = existing().await?;
    let (dashboard, rules) = (dashboard()?, yaml("envoy-configs/prometheus-rules.yaml")?);
    let shown: Vec<_> = of_dashboard(&dashboard)?.into_iter().chain(of_rules(&rules)?).collect();
    ensure!(shown.len() > 40, "{} expressions only", shown.len());
    let wrong: Vec<_> = shown.iter().filter_map(|shown| shown.check(&existing).err()).collect();
    ensure!(wrong.is_empty(), "{wrong:#?}");

    // It is noticed if one of them does not.
    let phase = "tideshift_controller_rollout_phase{phase=\"Failed\"} == 1";
    let share = "sum by (service) (rate(tideshift_requests_total[1m]))";
    existing.check(phase)?;
    existing.check(share)?;
    for (what, wrong) in [
        ("a name", phase.replace("rollout_phase", "rollouts_phase")),
        ("a label", phase.replace("{phase", "{phases")),
        ("a value", phase.replace("Failed", "Failing")),
        ("a label to sum by", share.replace("service", "cluster")),
        ("labels that never match", format!("{share} / tideshift_requests_total")),
        ("a word", share.replace("sum by", "sum buy")),
    ] {
        ensure!(existing.check(&wrong).is_err(), "{what} is not noticed: {wrong}");
    }
    let legend =
        Shown { place: "a legend".to_owned(), expression: share.to_owned(), beside: vec!["{{version}}".to_owned()] };
    ensure!(legend.check(&existing).is_err(), "a legend is not noticed");
    Ok(())
}

#[test]
fn every_panel_has_what_grafana_needs_to_show_it() -> anyhow::Result<()> {
    let dashboard = dashboard()?;
    let variables = list(&dashboard["templating"]["list"], "variables")?;
    let names: Vec<_> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
    assert_eq!(names, ["datasource", "rollout", "service"]);
    let (mut ids, mut titles, mut taken) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    let source = json!({ "type": "prometheus", "uid": "${datasource}" });
    for panel in list(&dashboard["panels"], "panels")? {
        let title = string(panel, "title")?;
        ensure!(ids.insert(panel["id"].as_u64().context("no id")?), "{title}: its id is another's");
        ensure!(titles.insert(title), "{title} twice");
        let place = |side: &str| panel["gridPos"][side].as_u64().with_context(|| format!("{title} has no {side}"));
        let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
        ensure!(x + w <= 24 && w * h > 0, "{title} is {w} by {h} at {x}");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            let other = taken.insert(cell, title);
            ensure!(other.is_none(), "{title} lies on {other:?}");
        }
        if panel["type"] == "row" {
            continue;
        }
        string(panel, "description")?;
        string(&panel["fieldConfig"]["defaults"], "unit").with_context(|| title.to_owned())?;
        assert_eq!(panel["datasource"], source, "{title}");
        let targets = list(&panel["targets"], "targets")?;
        let references: BTreeSet<_> = targets.iter().map(|target| target["refId"].as_str()).collect();
        ensure!(references.len() == targets.len() && !targets.is_empty(), "{title}: {references:?}");
        ensure!(targets.iter().all(|target| target["datasource"] == source), "{title} has another data source");
    }
    Ok(())
}

#[test]
fn every_alert_says_how_bad_it_is_and_what_to_do() -> anyhow::Result<()> {
    let rules = yaml("envoy-configs/prometheus-rules.yaml")?;
    let mut names = BTreeSet::new();
    for rule in list(&rules["groups"], "groups")?.iter().flat_map(|group| group["rules"].as_array()).flatten() {
        let name = string(rule, "alert")?;
        ensure!(name.starts_with("Tideshift") && names.insert(name.to_owned()), "{name}");
        string(rule, "for").with_context(|| name.to_owned())?;
        let severity = string(&rule["labels"], "severity")?;
        ensure!(["critical", "warning", "info"].contains(&severity), "{name}: {severity}");
        for annotation in ["summary", "description", "runbook"] {
            string(&rule["annotations"], annotation).with_context(|| name.to_owned())?;
        }
    }
    ensure!(names.len() > 10, "{names:?}");
    let scrapes = yaml("envoy-configs/prometheus.yaml")?;
    assert_eq!(scrapes["rule_files"], json!(["prometheus-rules.yaml"]));
    let envoy = text("envoy-configs/envoy.yaml")?;
    for target in list(&scrapes["scrape_configs"], "scrapes")?
        .iter()
        .flat_map(|scrape| scrape["static_configs"][0]["targets"].as_array())
        .flatten()
    {
        let target = target.as_str().context("no address")?;
        ensure!(envoy.lines().take(3).any(|line| line.contains(target)), "{target} is not in envoy.yaml's first lines");
    }
    Ok(())
}
