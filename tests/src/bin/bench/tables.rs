//! What was measured, as Markdown.

use std::fmt::Write as _;

use crate::{cost::Cost, statistics::Summary};

/// CPU time against that of the first one.
pub(crate) fn costs(costs: &[Cost]) -> String {
    let mut table = "| filter | × native | 95 % | quartiles | µs a request |\n|---|---|---|---|---|\n".to_owned();
    let Some(native) = costs.first() else { return table };
    for cost in costs {
        let (Some(ratio), Some(micros)) = (cost.against(native), Summary::of(cost.rounds.iter().copied())) else {
            continue;
        };
        let between = |(low, high): (f64, f64)| format!("{low:.2} to {high:.2}");
        let (interval, quartiles) = (between(ratio.interval), between(ratio.quartiles));
        let _ = writeln!(
            table,
            "| {} | {:.3} | {interval} | {quartiles} | {:.1} |",
            cost.name, ratio.median, micros.median
        );
    }
    table
}
