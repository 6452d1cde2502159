//! The strategy of a rollout: its steps, the allowed shortfall of endpoints, and its progress deadline.

use super::WarmUp;
use crate::decode::Decoder;
use crate::matching::Match;
#[cfg(feature = "schema")]
use crate::schema;
use crate::shift::fields::seconds;
use serde_json::Value;
use std::time::Duration;

/// How traffic moves from the stable version to the target.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct Strategy {
    /// The canary steps, at least one; the last one always moves all traffic. Default: all traffic at once.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<Step>>", length(min = 1)))]
    pub steps: Vec<Step>,
    /// Replaces steps: a preview, then all traffic. The share of each step moves completely or not at all, instead of
    /// gradually as endpoints become ready.
    #[cfg_attr(feature = "schema", schemars(rename = "blueGreen", with = "Option<described::BlueGreen>"))]
    pub whole_steps: bool,
    /// The number of endpoints that a workload may have beyond what the load needs; default 25 %, rounded up.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::QuantityText>", extend("default" = "25%")))]
    pub max_surge: IntOrPercent,
    /// The number of endpoints needed for the load that may be missing while the rollout progresses; default 25 %, rounded
    /// down; at most 100 %.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::PartText>", extend("default" = "25%")))]
    pub max_unavailable: IntOrPercent,
    /// How long an endpoint must be ready before it receives traffic; default 0.
    #[cfg_attr(feature = "schema", schemars(rename = "minReadySeconds", with = "Option<schema::Seconds>", extend("default" = 0)))]
    pub min_ready: Duration,
    /// After this time without progress because endpoints are missing, the rollout counts as stuck; default 600 s.
    #[cfg_attr(feature = "schema", schemars(rename = "progressDeadlineSeconds", with = "Option<schema::AtLeastOneSecond>", extend("default" = 600)))]
    pub progress_deadline: Duration,
    /// Whether the controller aborts a stuck rollout; default false.
    #[cfg_attr(feature = "schema", schemars(rename = "progressDeadlineAbort", with = "Option<bool>", extend("default" = false)))]
    pub abort_at_deadline: bool,
    /// How a new version is warmed up before it gets the full share of its step.
    #[cfg_attr(feature = "schema", schemars(with = "Option<WarmUp>"))]
    pub warm_up: WarmUp,
    /// How long after its drain the workload of a version is scaled down, if the rollout scales it; default 30 s.
    #[cfg_attr(feature = "schema", schemars(rename = "scaleDownDelaySeconds", with = "Option<schema::Seconds>", extend("default" = 30)))]
    pub scale_down_delay: Duration,
}

/// One step of a rollout.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename_all = "camelCase", deny_unknown_fields))]
pub struct Step {
    /// The target's share in percent, 0 to 100. Default: the share of the previous step.
    #[cfg_attr(feature = "schema", schemars(with = "Option<schema::Share>"))]
    pub weight: u32,
    /// How long the target must have this share before the next step; default 0.
    #[cfg_attr(feature = "schema", schemars(rename = "holdSeconds", with = "Option<schema::Seconds>", extend("default" = 0)))]
    pub hold: Duration,
    /// Whether the rollout pauses at this step until it is promoted or resumed.
    #[cfg_attr(feature = "schema", schemars(with = "Option<bool>", extend("default" = false)))]
    pub pause: bool,
    /// Requests that always go to the target, such as those of testers, regardless of its share. They apply from this step
    /// until a step with other matches.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<Match>>"))]
    pub matches: Vec<Match>,
}

/// A number, or a percentage of a number that is known later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntOrPercent {
    /// An absolute number.
    Count(u32),
    /// A percentage.
    Percent(u32),
}

impl IntOrPercent {
    /// The number for `whole`; percentages are rounded up.
    pub fn of_rounded_up(self, whole: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => part(whole, percent).div_ceil(100).min(u64::from(u32::MAX)) as u32,
        }
    }

    /// The number for `whole`; percentages are rounded down.
    pub fn of_rounded_down(self, whole: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => (part(whole, percent) / 100).min(u64::from(u32::MAX)) as u32,
        }
    }

    fn is_zero(self) -> bool {
        matches!(self, Self::Count(0) | Self::Percent(0))
    }

    fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let percent = |text: &str| {
            let digits = text.strip_suffix('%')?;
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| digits.parse().ok()).flatten().filter(|percent: &u32| *percent <= 1_000)
        };
        let read = match value {
            Value::String(text) => percent(text).map(Self::Percent),
            value => value.as_u64().filter(|count| *count <= 1_000_000).map(|count| Self::Count(count as u32)),
        };
        if read.is_none() {
            d.invalid(value, "a number such as 1, up to 1000000, or a percentage such as \"25%\"");
        }
        read
    }
}

fn part(whole: u32, percent: u32) -> u64 {
    u64::from(whole) * u64::from(percent)
}

impl Step {
    /// All traffic, without waiting.
    pub const fn all() -> Self {
        Self { weight: 100, hold: Duration::ZERO, pause: false, matches: Vec::new() }
    }

    /// Reads a step; it inherits weight and matches of the previous step if it has none.
    fn read(d: &mut Decoder, value: &Value, before: Option<&Self>) -> Option<Self> {
        let mut f = d.object(value)?;
        let pause = f.optional(d, "pause", Decoder::boolean).unwrap_or_default();
        let matches = f.optional(d, "matches", matches);
        let given = f.optional(d, "weight", |d, v| d.integer(v, 0, 100).map(|weight| weight as u32));
        if !f.has("weight") && !pause && !f.has("matches") {
            d.missing("weight", "the target's share in percent, 0 to 100 (or pause: true, or matches)");
        }
        let weight = match f.has("weight") {
            true => given,
            false => Some(before.map_or(0, |before| before.weight)),
        };
        let hold = seconds(&mut f, d, "holdSeconds", 0, 0);
        f.finish(d);
        let matches = matches.unwrap_or_else(|| before.map_or(Vec::new(), |before| before.matches.clone()));
        Some(Self { weight: weight?, hold, pause, matches })
    }
}

fn matches(d: &mut Decoder, value: &Value) -> Option<Vec<Match>> {
    Some(d.list(value, Match::read)?.into_iter().map(|(_, one)| one).collect())
}

impl Default for Strategy {
    fn default() -> Self {
        Self {
            steps: vec![Step::all()],
            whole_steps: false,
            max_surge: IntOrPercent::Percent(25),
            max_unavailable: IntOrPercent::Percent(25),
            min_ready: Duration::ZERO,
            progress_deadline: Duration::from_secs(600),
            abort_at_deadline: false,
            warm_up: WarmUp::default(),
            scale_down_delay: Duration::from_secs(30),
        }
    }
}

impl Strategy {
    pub(super) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let mut f = d.object(value)?;
        let default = Self::default();
        let steps = f.optional(d, "steps", steps);
        let blue_green = f.optional(d, "blueGreen", blue_green);
        if f.has("steps") && f.has("blueGreen") {
            d.invalid(value, "either steps or blueGreen");
        }
        let whole_steps = f.has("blueGreen");
        let max_surge = f.optional(d, "maxSurge", IntOrPercent::read).unwrap_or(default.max_surge);
        let max_unavailable = f.optional(d, "maxUnavailable", |d, value| {
            let read = IntOrPercent::read(d, value)?;
            if matches!(read, IntOrPercent::Percent(101..)) {
                d.invalid(value, "no more than 100%, as in Kubernetes");
            }
            Some(read)
        });
        let max_unavailable = max_unavailable.unwrap_or(default.max_unavailable);
        if max_surge.is_zero() && max_unavailable.is_zero() {
            d.within("maxUnavailable", |d| d.invalid(&Value::from(0), "above 0 where maxSurge is 0"));
        }
        let min_ready = seconds(&mut f, d, "minReadySeconds", 0, 0);
        let deadline_default = default.progress_deadline.as_secs();
        let progress_deadline = seconds(&mut f, d, "progressDeadlineSeconds", 1, deadline_default);
        if progress_deadline <= min_ready {
            let allowed = format!("more than minReadySeconds ({})", min_ready.as_secs());
            d.within("progressDeadlineSeconds", |d| d.invalid(&Value::from(progress_deadline.as_secs()), allowed));
        }
        let abort_at_deadline = f.optional(d, "progressDeadlineAbort", Decoder::boolean).unwrap_or_default();
        let warm_up = f.optional(d, "warmUp", WarmUp::read).unwrap_or_default();
        let scale_down_delay = seconds(&mut f, d, "scaleDownDelaySeconds", 0, default.scale_down_delay.as_secs());
        f.finish(d);
        Some(Self {
            steps: steps.or(blue_green).unwrap_or(default.steps),
            whole_steps,
            max_surge,
            max_unavailable,
            min_ready,
            progress_deadline,
            abort_at_deadline,
            warm_up,
            scale_down_delay,
        })
    }
}

fn steps(d: &mut Decoder, value: &Value) -> Option<Vec<Step>> {
    if value.as_array().is_some_and(Vec::is_empty) {
        d.invalid(value, "at least one step (or no steps at all: straight to 100)");
    }
    let mut before: Option<Step> = None;
    let steps = d.list(value, |d, value| {
        let step = Step::read(d, value, before.as_ref())?;
        before = Some(step.clone());
        Some(step)
    })?;
    let mut steps: Vec<Step> = steps.into_iter().map(|(_, step)| step).collect();
    match steps.last() {
        Some(last) if last.weight == 100 && !last.pause => {}
        // A pause at 100 % still needs a promotion; the step after it is 100 % without waiting.
        _ => steps.push(Step::all()),
    }
    Some(steps)
}

/// Converts blue/green, with Argo Rollouts' field names, to steps: the preview, then all traffic at once.
fn blue_green(d: &mut Decoder, value: &Value) -> Option<Vec<Step>> {
    let mut f = d.object(value)?;
    let by_itself = f.optional(d, "autoPromotionEnabled", Decoder::boolean).unwrap_or(true);
    let preview = seconds(&mut f, d, "autoPromotionSeconds", 0, 0);
    let matches = f.optional(d, "previewMatches", matches).unwrap_or_default();
    let hold = seconds(&mut f, d, "holdSeconds", 0, 0);
    f.finish(d);
    let preview = Step { weight: 0, hold: preview, pause: !by_itself, matches };
    let is_preview = preview.pause || !preview.hold.is_zero() || !preview.matches.is_empty();
    let all = Step { hold, ..Step::all() };
    Some(is_preview.then_some(preview).into_iter().chain([all]).collect())
}

/// What readers take apart here, as a JSON Schema.
#[cfg(feature = "schema")]
mod described {
    use crate::matching::Match;
    use crate::schema;
    use schemars::JsonSchema;

    /// Blue/green: a preview of the target, then all traffic at once.
    #[derive(JsonSchema)]
    #[schemars(rename_all = "camelCase", deny_unknown_fields)]
    #[allow(dead_code, reason = "only its schema is used")]
    pub(crate) struct BlueGreen {
        /// Whether the target gets all traffic without a manual promotion; default true.
        #[schemars(extend("default" = true))]
        auto_promotion_enabled: Option<bool>,
        /// How long the preview lasts before the target gets all traffic; default 0.
        #[schemars(with = "Option<schema::Seconds>", extend("default" = 0))]
        auto_promotion_seconds: Option<u64>,
        /// Requests that go to the target during the preview, such as those of testers. A request needs to satisfy one match.
        preview_matches: Option<Vec<Match>>,
        /// How long the target must have all traffic before the rollout succeeds; default 0.
        #[schemars(with = "Option<schema::Seconds>", extend("default" = 0))]
        hold_seconds: Option<u64>,
    }
}
