//! The settings of a rollout's analysis: `analysis` of a document.

use crate::decode::Decoder;
use serde_json::Value;
use std::time::Duration;

/// The default of `maxErrorRate` in documents with an analysis.
pub const DEFAULT_MAX_ERROR_RATE: f64 = 0.02;

/// How the rollout analyses the target.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "schema",
    derive(schemars::JsonSchema),
    schemars(rename_all = "camelCase", deny_unknown_fields, rename = "Analysis")
)]
pub struct Settings {
    /// α: the maximum probability, per rollout, that a target that is no worse than the stable version fails. 1e-9 to 0.1;
    /// default 0.001.
    #[cfg_attr(feature = "schema", schemars(with = "Option<f64>", range(min = 1e-9, max = 0.1)))]
    pub false_rollback_rate: f64,
    /// The error rate that the target must stay below to pass. 0.0001 to 0.5; default 0.02. If maxErrors is the only other
    /// field, there is no default and no pass is required.
    #[cfg_attr(feature = "schema", schemars(range(min = 0.0001, max = 0.5)))]
    pub max_error_rate: Option<f64>,
    /// The confidence of a pass. 0.5 to 0.9999; default 0.95.
    #[cfg_attr(feature = "schema", schemars(with = "Option<f64>", range(min = 0.5, max = 0.9999)))]
    pub pass_confidence: f64,
    /// How durations are analysed. Default: they are not analysed.
    pub latency: Option<Latency>,
    /// A fixed limit on the target's errors in a rollout, independent of the verdict.
    #[cfg_attr(feature = "schema", schemars(range(min = 0)))]
    pub max_errors: Option<u64>,
}

/// How durations are analysed.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct Latency {
    /// A request is slow if it takes longer than such a quantile of the stable version's durations. One to four quantiles,
    /// each 0.5 to 0.999; default 0.9 and 0.99.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<f64>>", length(min = 1, max = 4), inner(range(min = 0.5, max = 0.999)), extend("default" = [0.9, 0.99])))]
    pub quantiles: Vec<f64>,
    /// The minimum by which a slow request exceeds the quantile, in milliseconds, at most 30 s; default 10 ms.
    #[cfg_attr(feature = "schema", schemars(rename = "minDifferenceMillis", with = "Option<u32>", range(max = 30_000), extend("default" = 10)))]
    pub min_difference: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            false_rollback_rate: 0.001,
            max_error_rate: None,
            pass_confidence: 0.95,
            latency: None,
            max_errors: None,
        }
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self { quantiles: vec![0.9, 0.99], min_difference: Duration::from_millis(10) }
    }
}

impl Settings {
    /// Reads `analysis`. With only `maxErrors`, no pass is required.
    pub fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let false_rollback_rate = f.optional(d, "falseRollbackRate", |d, v| d.number(v, 1e-9, 0.1));
        let max_error_rate = f.optional(d, "maxErrorRate", |d, v| d.number(v, 0.0001, 0.5));
        let pass_confidence = f.optional(d, "passConfidence", |d, v| d.number(v, 0.5, 0.9999));
        let latency = f.optional(d, "latency", Latency::read);
        let max_errors = f.optional(d, "maxErrors", |d, v| d.integer(v, 0, u64::MAX));
        let asks = ["falseRollbackRate", "maxErrorRate", "passConfidence", "latency"].iter().any(|name| f.has(name));
        let asks = asks || !f.has("maxErrors");
        f.finish(d);
        Some(Self {
            false_rollback_rate: false_rollback_rate.unwrap_or(default.false_rollback_rate),
            max_error_rate: max_error_rate.or(asks.then_some(DEFAULT_MAX_ERROR_RATE)),
            pass_confidence: pass_confidence.unwrap_or(default.pass_confidence),
            latency,
            max_errors,
        })
    }

    /// The evidence from which on the target fails: the mean over all kinds, which is at most 1 on average if the
    /// target is no worse.
    pub fn bound(&self) -> f64 {
        1.0 / self.false_rollback_rate
    }

    /// The weight in that mean of each kind other than errors: client errors, cancelled requests and, if analysed,
    /// durations.
    pub(super) fn part_of_others(&self) -> f64 {
        let others = if self.latency.is_some() { 3.0 } else { 2.0 };
        (1.0 - super::ERRORS_PART) / others
    }

    /// The evidence from which on the target passes.
    pub fn pass_bound(&self) -> f64 {
        // 1 - 0.95 is slightly more than 0.05 in binary, and users expect 20.
        (1e6 / (1.0 - self.pass_confidence)).round() / 1e6
    }
}

impl Latency {
    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let quantiles = f.optional(d, "quantiles", |d, value| {
            let quantiles = d.list(value, |d, v| d.number(v, 0.5, 0.999))?;
            if value.as_array().is_some_and(|items| !(1..=4).contains(&items.len())) {
                d.invalid(value, "one to four quantiles, such as [0.9, 0.99]");
            }
            Some(quantiles.into_iter().map(|(_, quantile)| quantile).collect())
        });
        let difference = f.optional(d, "minDifferenceMillis", |d, v| d.integer(v, 0, 30_000));
        f.finish(d);
        Some(Self {
            quantiles: quantiles.unwrap_or(default.quantiles),
            min_difference: difference.map_or(default.min_difference, Duration::from_millis),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(value: Value) -> Result<Settings, Vec<String>> {
        let read = Decoder::read(&value, |d, v| d.within("analysis", |d| Settings::read(d, v)));
        read.map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_pass_is_asked_for_unless_there_is_nothing_but_a_limit() {
        let asks = Settings { max_error_rate: Some(0.02), ..Settings::default() };
        assert_eq!(read(json!({})), Ok(asks.clone()));
        assert_eq!(
            read(json!({"maxErrors": 3})),
            Ok(Settings { max_error_rate: None, max_errors: Some(3), ..Settings::default() })
        );
        let both = read(json!({"maxErrors": 3, "latency": {}, "passConfidence": null}));
        assert_eq!(both, Ok(Settings { latency: Some(Latency::default()), max_errors: Some(3), ..asks }));
    }

    #[test]
    fn every_field_is_read() {
        let all = json!({
            "falseRollbackRate": 0.01, "maxErrorRate": 0.05, "passConfidence": 0.9,
            "latency": {"quantiles": [0.5], "minDifferenceMillis": 100}, "maxErrors": 0,
        });
        let expected = Settings {
            false_rollback_rate: 0.01,
            max_error_rate: Some(0.05),
            pass_confidence: 0.9,
            latency: Some(Latency { quantiles: vec![0.5], min_difference: Duration::from_millis(100) }),
            max_errors: Some(0),
        };
        assert_eq!((expected.bound(), expected.pass_bound()), (100.0, 10.0));
        assert_eq!(read(all), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        for (value, expected) in [
            (json!([]), "analysis: [] is not allowed; expected an object"),
            (
                json!({"falseRollbackRate": 0.5}),
                "analysis.falseRollbackRate: 0.5 is not allowed; expected a number from 1e-9 to 0.1",
            ),
            (
                json!({"maxErrorRate": "2%"}),
                "analysis.maxErrorRate: \"2%\" is not allowed; expected a number from 0.0001 to 0.5",
            ),
            (
                json!({"passConfidence": 95}),
                "analysis.passConfidence: 95 is not allowed; expected a number from 0.5 to 0.9999",
            ),
            (json!({"maxErrors": -1}), "analysis.maxErrors: -1 is not allowed; expected an integer of at least 0"),
            (json!({"latency": true}), "analysis.latency: true is not allowed; expected an object"),
            (
                json!({"latency": {"quantiles": []}}),
                "analysis.latency.quantiles: [] is not allowed; expected one to four quantiles, such as [0.9, 0.99]",
            ),
            (
                json!({"latency": {"quantiles": [0.9, 99]}}),
                "analysis.latency.quantiles[1]: 99 is not allowed; expected a number from 0.5 to 0.999",
            ),
            (
                json!({"latency": {"minDifferenceMs": 5}}),
                "analysis.latency.minDifferenceMs: unknown field; did you mean `minDifferenceMillis`?",
            ),
            (json!({"maxErrorRates": 0.1}), "analysis.maxErrorRates: unknown field; did you mean `maxErrorRate`?"),
        ] {
            let errors = read(value.clone()).err().unwrap_or_default();
            assert_eq!(errors.len(), 1, "{value}: {errors:?}");
            assert!(errors[0].starts_with(expected), "{}\nshould start with\n{expected}", errors[0]);
        }
    }
}
