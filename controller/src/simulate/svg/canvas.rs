//! What pictures are made of: lines, areas, texts, scales and their ticks. No clock, no random number and no number of
//! more digits than one sees, so that the same run is the same picture, byte for byte.

use std::fmt::{Display, Write};

/// An SVG under way.
#[derive(Default)]
pub(super) struct Canvas(String);

/// Where a text is held.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Canvas {
    /// A whole picture of the given size around what was drawn.
    pub(super) fn finish(self, width: f64, height: f64, title: &str, description: &str, style: &str) -> String {
        let (width, height) = (px(width), px(height));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\" aria-labelledby=\"title description\">\n<title id=\"title\">{}</title>\n\
             <desc id=\"description\">{}</desc>\n<style>\n{style}</style>\n{}</svg>\n",
            escaped(title),
            escaped(description),
            self.0
        )
    }

    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        self.add(format_args!(
            "<text x=\"{}\" y=\"{}\" class=\"{class}\"{anchor}>{}</text>",
            px(x),
            px(y),
            escaped(text)
        ));
    }

    pub(super) fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.add(format_args!("<path class=\"{class}\" d=\"M{} {}L{} {}\"/>", px(x1), px(y1), px(x2), px(y2)));
    }

    pub(super) fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        let (x, y, width, height) = (px(x), px(y), px(width), px(height));
        self.add(format_args!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"/>"));
    }

    pub(super) fn path(&mut self, class: &str, path: &Path) {
        if !path.0.is_empty() {
            self.add(format_args!("<path class=\"{class}\" d=\"{}\"/>", path.0));
        }
    }

    /// Draws something that tells more when one points at it.
    pub(super) fn told(&mut self, words: &str, draw: impl FnOnce(&mut Self)) {
        self.add(format_args!("<g><title>{}</title>", escaped(words)));
        draw(self);
        self.add(format_args!("</g>"));
    }

    /// On top of everything so far.
    pub(super) fn append(&mut self, other: Self) {
        self.0.push_str(&other.0);
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.0, "{element}");
    }
}

/// A path under way.
#[derive(Default)]
pub(super) struct Path(String);

impl Path {
    pub(super) fn move_to(&mut self, x: f64, y: f64) {
        let _ = write!(self.0, "M{} {}", px(x), px(y));
    }

    pub(super) fn line_to(&mut self, x: f64, y: f64) {
        let _ = write!(self.0, "L{} {}", px(x), px(y));
    }

    /// Along to `x`, then up or down to `y`.
    pub(super) fn step_to(&mut self, x: f64, y: f64) {
        let _ = write!(self.0, "H{}V{}", px(x), px(y));
    }

    pub(super) fn bar(&mut self, x: f64, y: f64, width: f64, height: f64) {
        let (x, y, width, height) = (px(x), px(y), px(width), px(height));
        let _ = write!(self.0, "M{x} {y}h{width}v{height}h-{width}z");
    }

    pub(super) fn close(&mut self) {
        self.0.push('z');
    }
}

/// A coordinate: tenths are finer than one sees.
fn px(coordinate: f64) -> impl Display {
    let rounded = (coordinate * 10.0).round() / 10.0;
    // (No -0.)
    rounded + 0.0
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// How wide a text is about, in a font of this size: no font is asked, so rather too wide.
pub(super) fn width_of(text: &str, size: f64) -> f64 {
    let narrow =
        |c: &char| matches!(c, 'i' | 'j' | 'l' | 't' | 'f' | 'r' | 'I' | '.' | ',' | ':' | ';' | ' ' | '\'' | '|');
    let wide = |c: &char| matches!(c, 'm' | 'w' | 'M' | 'W' | '%' | '@');
    let ems: f64 = text
        .chars()
        .map(|c| {
            if narrow(&c) {
                0.34
            } else if wide(&c) {
                0.9
            } else {
                0.61
            }
        })
        .sum();
    ems * size
}

/// A text in lines that are no wider than this.
pub(super) fn wrapped(text: &str, size: f64, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if width_of(&format!("{line} {word}"), size) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// From values to coordinates.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) low: f64,
    pub(super) high: f64,
    /// The coordinates of the lowest and the highest value.
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Scale {
    /// The coordinate of a value; those beyond the ends are at the ends.
    pub(super) fn of(&self, value: f64) -> f64 {
        let part = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + part * (self.to - self.from)
    }
}

/// A round number that is at least this, and how far its ticks are apart.
pub(super) fn round_up(value: f64, most_ticks: f64) -> (f64, f64) {
    let rough = value / most_ticks;
    let ten = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * ten).into_iter().find(|step| *step >= rough * 0.999_999);
    let step = step.unwrap_or(10.0 * ten);
    ((value / step * 0.999_999).ceil() * step, step)
}

/// How far apart the ticks of a time axis are that shows so many seconds.
pub(super) fn time_step(seconds: f64) -> f64 {
    const STEPS: [f64; 19] = [
        1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1_800.0, 3_600.0, 7_200.0, 10_800.0,
        21_600.0, 43_200.0, 86_400.0, 172_800.0,
    ];
    STEPS.into_iter().find(|step| seconds / step <= 12.0).unwrap_or(172_800.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::format::number;

    #[test]
    fn numbers_are_round() {
        assert_eq!(round_up(0.7, 3.0), (1.0, 0.5));
        assert_eq!(round_up(3.0, 3.0), (3.0, 1.0));
        assert_eq!(round_up(104.0, 3.0), (150.0, 50.0));
        assert_eq!([number(0.01), number(1_000.0), number(1_234_567.0)], ["0.01", "1,000", "1,234,567"]);
        assert_eq!(px(-0.01).to_string(), "0");
        assert_eq!([30.0, 180.0, 3_600.0, 86_400.0].map(time_step), [5.0, 15.0, 300.0, 7_200.0]);
    }

    #[test]
    fn texts_cannot_break_out() {
        assert_eq!(escaped("<a b=\"&\">"), "&lt;a b=&quot;&amp;&quot;&gt;");
    }

    #[test]
    fn long_texts_are_broken_into_lines() {
        let lines = wrapped(&"word ".repeat(40), 13.0, 300.0);
        assert!(lines.len() > 2 && lines.iter().all(|line| width_of(line, 13.0) <= 300.0));
        assert_eq!(lines.join(" "), "word ".repeat(40).trim());
    }
}
