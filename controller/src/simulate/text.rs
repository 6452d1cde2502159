//! Runs for people.

use super::many::Many;
use super::record::Run;
use crate::rollout::Phase;
use crate::simulate::format::clock;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::fmt::Write;

impl Run {
    /// What happened, what users got, and how it ended.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut lines: Vec<(f64, String, String)> = Vec::new();
        lines.extend(self.events.iter().map(|event| (event.at_seconds, String::new(), event.message.clone())));
        let transitions = self.transitions.iter();
        lines.extend(transitions.map(|t| (t.at_seconds, format!("{:?}", t.reason), t.message.clone())));
        lines.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (time, reason) = lines
            .iter()
            .fold((0, 0), |(time, reason), (at, word, _)| (time.max(clock(*at).len()), reason.max(word.len())));
        for (at, word, message) in lines {
            let _ = writeln!(text, "{:>time$}  {word:reason$}  {message}", clock(at));
        }
        let _ = writeln!(text, "\n{}\n\n{}", self.table(), self.ending());
        text
    }

    fn table(&self) -> Table {
        let mut table = table(&["SERVICE", "VERSION", "REQUESTS", "FAILED", "FAILED %", "WEIGHT", "READY"]);
        for service in &self.services {
            for version in &service.versions {
                table.add_row([
                    service.name.clone(),
                    version.name.clone(),
                    grouped(version.requests),
                    grouped(version.errors),
                    match version.requests {
                        0 => "-".to_owned(),
                        requests => format!("{:.2} %", version.errors as f64 / requests as f64 * 100.0),
                    },
                    format!("{} %", version.weight),
                    format!("{}/{}", version.endpoints_ready, version.endpoints),
                ]);
            }
            if service.unrouted > 0 {
                table.add_row([service.name.clone(), "(none in service)".to_owned(), grouped(service.unrouted)]);
            }
        }
        table
    }

    /// How it ended, in a few sentences.
    pub fn ending(&self) -> String {
        let mut text = format!("{}: {}.", self.headline(), self.message);
        if let Some(verdict) = self.verdict.as_ref().filter(|verdict| !self.message.contains(&verdict.message)) {
            // Of a target that failed, the message has said it.
            if self.phase != Phase::Failed {
                let _ = write!(text, "\nVerdict: {}.", verdict.message);
            }
        }
        if self.started_at_seconds.is_some() {
            let _ = write!(text, "\n{}.", self.users());
        }
        text
    }

    /// How it ended and when, in a few words.
    pub fn headline(&self) -> String {
        match (self.started_at_seconds, self.ended_at_seconds) {
            (None, _) => "No rollout".to_owned(),
            (Some(from), Some(to)) => format!("{} after {}", self.phase.name(), clock(to - from)),
            (Some(from), None) => {
                format!("still {} ({:?}) after {}", self.phase.name(), self.reason, clock(self.duration_seconds - from))
            }
        }
    }

    /// What users saw of it.
    pub fn users(&self) -> String {
        let target = self.target.as_deref().unwrap_or("the target");
        let judged = &self.judged;
        format!(
            "Until then {} of {} requests failed, {} of them on {target}",
            grouped(judged.failed),
            grouped(judged.requests),
            grouped(judged.failed_of_target)
        )
    }
}

impl Many {
    /// How many ended how, and when.
    pub fn to_text(&self) -> String {
        let mut table = table(&["END", "RUNS", "%", "TIME", "P90", "FAILED", "P90", "OF TARGET", "P90"]);
        for ending in &self.endings {
            let known = |value: String| if ending.runs == 0 { "-".to_owned() } else { value };
            let time = |seconds: Option<f64>| seconds.map_or("-".to_owned(), clock);
            table.add_row([
                ending.end.name().to_owned(),
                grouped(ending.runs),
                format!("{:.1}", ending.runs as f64 / self.runs.max(1) as f64 * 100.0),
                time(ending.seconds.map(|seconds| seconds.median)),
                time(ending.seconds.map(|seconds| seconds.p90)),
                known(grouped(ending.failed.median)),
                known(grouped(ending.failed.p90)),
                known(grouped(ending.failed_of_target.median)),
                known(grouped(ending.failed_of_target.p90)),
            ]);
        }
        let words = "Medians, and what 90 % of the runs do not exceed: the time to the end, and the requests that users saw fail \
                     until then";
        format!("{} runs of {}, seeds from {}\n\n{table}\n\n{words}.\n", grouped(self.runs), self.rollout, self.seed)
    }
}

fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(columns);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// With thousands apart.
fn grouped(number: u64) -> String {
    super::svg::number(number as f64)
}
