//! Output: on a terminal, lines that stay, with a chart below them that is redrawn; otherwise one line per second.

use std::time::Duration;

use anyhow::Context as _;
use console::{Color, Style, Term, measure_text_width, style, truncate_str};
use tokio::time::Instant;

use crate::text::{bar, clock, percent, thousands, wrap};
use crate::view::{Row, View};

/// The maximum width of the chart, and the width of a row without its bar.
const WIDEST: usize = 110;
const WITHOUT_BAR: usize = 54;
/// Without a terminal: the interval between lines.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// The current act, and what to look at.
#[derive(Clone, Copy)]
pub(crate) struct Narration {
    pub(crate) title: &'static str,
    pub(crate) text: &'static str,
}

/// The standard output.
pub(crate) struct Screen {
    term: Term,
    is_live: bool,
    begun: Instant,
    /// The current chart, to be redrawn.
    drawn: Vec<String>,
    /// The width of the terminal at that time.
    width: usize,
    line_at: Option<Instant>,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let term = Term::stdout();
        let is_live = term.is_term() && std::env::var_os("TERM").is_some_and(|term| term != "dumb");
        Self { term, is_live, begun: Instant::now(), drawn: Vec::new(), width: 0, line_at: None }
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// A line that stays, above the chart.
    pub(crate) fn say(&mut self, line: &str) -> anyhow::Result<()> {
        let picture = self.drawn.clone();
        self.put(&[line.to_owned()], picture)
    }

    /// The same with a timestamp.
    pub(crate) fn note(&mut self, line: &str) -> anyhow::Result<()> {
        let time = style(format!("{:>6}", clock(self.elapsed()))).dim();
        self.say(&format!("{time}  {line}"))
    }

    /// Draws the current state.
    pub(crate) fn draw(&mut self, narration: &Narration, view: &View) -> anyhow::Result<()> {
        if self.is_live {
            let picture = self.picture(narration, view);
            return self.put(&[], picture);
        }
        if self.line_at.is_some_and(|at| at.elapsed() < LINE_EVERY) {
            return Ok(());
        }
        self.line_at = Some(Instant::now());
        self.note(&plain(view))
    }

    /// Leaves the chart as it is; later output follows below it.
    pub(crate) fn leave(&mut self) {
        self.drawn.clear();
    }

    /// In one write to prevent flicker: back to the start of the chart, the new lines, the new chart.
    fn put(&mut self, lines: &[String], picture: Vec<String>) -> anyhow::Result<()> {
        let (height, width) = self.term.size_checked().map_or((24, 80), |(h, w)| (usize::from(h), usize::from(w)));
        let mut out = String::new();
        // After a resize terminals disagree about the position of its lines: the old chart stays.
        if !self.drawn.is_empty() && self.width == width {
            out += &format!("\x1b[{}A\r\x1b[J", self.drawn.len());
        }
        self.width = width;
        let fitting = |line: &String| truncate_str(line, width.saturating_sub(1), "…").into_owned();
        let picture: Vec<String> = picture.iter().take(height.saturating_sub(1)).map(fitting).collect();
        for line in lines {
            out += line;
            out.push('\n');
        }
        for line in &picture {
            out += line;
            out.push('\n');
        }
        self.drawn = picture;
        self.term.write_str(&out).context("cannot write to the standard output")
    }

    fn picture(&self, narration: &Narration, view: &View) -> Vec<String> {
        let width = usize::from(self.term.size().1).saturating_sub(2).min(WIDEST);
        let bar_width = width.saturating_sub(WITHOUT_BAR).max(8);
        let time = clock(self.elapsed());
        let gap = width.saturating_sub(measure_text_width(narration.title) + time.len() + 1);
        let mut lines =
            vec![String::new(), format!(" {}{:gap$}{}", style(narration.title).bold(), "", style(time).dim())];
        lines.extend(wrap(narration.text, width).into_iter().map(|line| format!(" {line}")));
        lines.push(String::new());
        let share = if bar_width < 24 { "share" } else { "share of the last second" };
        let columns = format!(
            " {:<3}{:<bar_width$} {:>8} {:>7} {:>6} {:>9} {:>7}",
            "", share, "", "weight", "ready", "requests", "errors"
        );
        lines.push(style(columns).dim().to_string());
        lines.extend(view.rows.iter().enumerate().map(|(index, row)| bar_row(index, row, bar_width)));
        lines.push(String::new());
        let message = wrap(&format!("{}: {}", view.phase, view.message), width);
        lines
            .extend(message.into_iter().map(|line| format!(" {}", line.replacen(&view.phase, &phase(&view.phase), 1))));
        let failed = format!("{} without an answer", thousands(view.failed));
        let failed = if view.failed > 0 { style(failed).red() } else { style(failed).dim() };
        let sum = style(format!("{:.0} requests/s · {} answered ·", view.rate, thousands(view.answered))).dim();
        lines.push(format!(" {sum} {failed}"));
        lines
    }
}

fn color(index: usize) -> Color {
    [Color::Blue, Color::Green, Color::Magenta].get(index).copied().unwrap_or(Color::White)
}

fn bar_row(index: usize, row: &Row, width: usize) -> String {
    let filled = bar(row.share, width);
    let track = "·".repeat(width.saturating_sub(filled.chars().count()));
    let color = Style::new().fg(color(index));
    let ready = format!("{:>6}", format!("{}/{}", row.endpoints.ready, row.endpoints.listed));
    let ready = if row.endpoints.ready < row.endpoints.listed { style(ready).yellow() } else { style(ready) };
    let errors = format!("{:>7}", thousands(row.errors));
    let errors = if row.errors > 0 { style(errors).red().bold() } else { style(errors) };
    format!(
        " {}{}{} {:>8} {:>7} {ready} {:>9} {errors}  {}",
        color.apply_to(format!("{:<3}", row.name)).bold(),
        color.apply_to(filled),
        style(track).dim(),
        format!("{:.1} %", row.share * 100.0),
        percent(row.weight),
        thousands(row.requests),
        style(row.role).dim(),
    )
}

fn phase(phase: &str) -> String {
    let style = Style::new().bold();
    let style = match phase {
        "Progressing" => style.yellow(),
        "Succeeded" => style.green(),
        "Failed" => style.red(),
        _ => style,
    };
    style.apply_to(phase).to_string()
}

fn plain(view: &View) -> String {
    let row = |row: &Row| {
        let Row { name, endpoints, .. } = row;
        format!("{name} {:.1} % ({}/{} ready)", row.share * 100.0, endpoints.ready, endpoints.listed)
    };
    let rows: Vec<String> = view.rows.iter().map(row).collect();
    let errors: u64 = view.rows.iter().map(|row| row.errors).sum();
    format!("{} | {:.0}/s, {errors} errors, {} unanswered | {}", rows.join(", "), view.rate, view.failed, view.phase)
}
