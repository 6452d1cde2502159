//! What a PromQL expression needs of the metrics that there are, and which labels its result has.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail, ensure};
use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser;
use promql_parser::parser::{BinaryExpr, Call, Expr, LabelModifier, VectorMatchCardinality, VectorSelector};
use tideshift_tests::metrics::Metrics;

type Labels = BTreeSet<String>;

/// What Prometheus adds to every series.
const OF_TARGETS: [&str; 2] = ["instance", "job"];

/// The metrics that there are: their labels and those labels' values.
#[derive(Debug, Default)]
pub(crate) struct Existing(BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Existing {
    /// Takes in a scrape.
    pub(crate) fn add(&mut self, metrics: &Metrics) {
        for series in metrics.0.keys() {
            let labels = self.0.entry(series.name.clone()).or_default();
            for (name, value) in &series.labels {
                labels.entry(name.clone()).or_default().insert(value.clone());
            }
        }
    }

    /// Takes in values of a label that no scrape shows all at once.
    pub(crate) fn add_values(&mut self, label: &str, values: impl IntoIterator<Item = String> + Clone) {
        for labels in self.0.values_mut() {
            if let Some(known) = labels.get_mut(label) {
                known.extend(values.clone());
            }
        }
    }

    /// The labels of an expression's result, if everything that it names is there.
    pub(crate) fn check(&self, expression: &str) -> anyhow::Result<Labels> {
        let parsed = parser::parse(expression).map_err(|error| anyhow::anyhow!("{error}"));
        parsed.and_then(|parsed| self.labels(&parsed)).with_context(|| expression.to_owned())
    }

    fn labels(&self, expression: &Expr) -> anyhow::Result<Labels> {
        match expression {
            Expr::VectorSelector(selector) => self.select(selector),
            Expr::MatrixSelector(selector) => self.select(&selector.vs),
            Expr::Paren(inner) => self.labels(&inner.expr),
            Expr::Unary(inner) => self.labels(&inner.expr),
            Expr::Subquery(inner) => self.labels(&inner.expr),
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) => Ok(Labels::new()),
            Expr::Call(call) => self.call(call),
            Expr::Binary(binary) => self.binary(binary),
            Expr::Aggregate(aggregate) => {
                let of = self.labels(&aggregate.expr)?;
                match &aggregate.modifier {
                    None => Ok(Labels::new()),
                    Some(LabelModifier::Include(by)) => have(&of, &by.labels),
                    Some(LabelModifier::Exclude(without)) => Ok(&of - &have(&of, &without.labels)?),
                }
            }
            Expr::Extension(_) => bail!("an extension"),
        }
    }

    fn select(&self, selector: &VectorSelector) -> anyhow::Result<Labels> {
        let name = selector.name.as_ref().context("a selector without a name")?;
        let labels = self.0.get(name).with_context(|| format!("there is no metric {name}"))?;
        ensure!(selector.matchers.or_matchers.is_empty(), "`or` between matchers");
        for Matcher { op, name: label, value } in &selector.matchers.matchers {
            let known = labels.get(label).with_context(|| format!("{name} has no label {label}"))?;
            let values: Vec<&str> = match op {
                MatchOp::Equal | MatchOp::NotEqual => vec![value],
                MatchOp::Re(_) | MatchOp::NotRe(_) => value.split('|').collect(),
            };
            let missing = values.into_iter().find(|value| *value != ".*" && !known.contains(*value));
            ensure!(missing.is_none(), "{name} never has {label}={missing:?}; expected one of {known:?}");
        }
        Ok(labels.keys().cloned().chain(OF_TARGETS.map(str::to_owned)).collect())
    }

    fn call(&self, call: &Call) -> anyhow::Result<Labels> {
        let of = call.args.args.iter().map(|argument| self.labels(argument));
        let of = of.collect::<anyhow::Result<Vec<_>>>()?.into_iter().fold(Labels::new(), |all, of| &all | &of);
        match call.func.name {
            "histogram_quantile" => Ok(&of - &have(&of, &["le".to_owned()])?),
            "absent" => Ok(Labels::new()),
            _ => Ok(of),
        }
    }

    fn binary(&self, binary: &BinaryExpr) -> anyhow::Result<Labels> {
        let (left, right) = (self.labels(&binary.lhs)?, self.labels(&binary.rhs)?);
        // What has no labels is a number here; sums without `by` are not compared with anything.
        if left.is_empty() || right.is_empty() {
            return Ok(&left | &right);
        }
        let modifier = binary.modifier.as_ref();
        let matching = match modifier.and_then(|modifier| modifier.matching.as_ref()) {
            Some(LabelModifier::Include(on)) => {
                have(&left, &on.labels)?;
                have(&right, &on.labels)?
            }
            ignoring => {
                let ignored = ignoring.map(|ignoring| ignoring.labels().labels.iter().cloned().collect::<Labels>());
                let ignored = ignored.unwrap_or_default();
                ensure!(&left - &ignored == &right - &ignored, "{left:?} never match {right:?}");
                &left - &ignored
            }
        };
        Ok(match modifier.map(|modifier| &modifier.card) {
            None | Some(VectorMatchCardinality::OneToOne) => matching,
            Some(VectorMatchCardinality::ManyToOne(from_right)) => &left | &have(&right, &from_right.labels)?,
            Some(VectorMatchCardinality::OneToMany(from_left)) => &right | &have(&left, &from_left.labels)?,
            Some(VectorMatchCardinality::ManyToMany) => left,
        })
    }
}

/// These labels, if they are among them.
fn have(all: &Labels, labels: &[String]) -> anyhow::Result<Labels> {
    let missing = labels.iter().find(|label| !all.contains(*label));
    ensure!(missing.is_none(), "no label {missing:?} among {all:?}");
    Ok(labels.iter().cloned().collect())
}
