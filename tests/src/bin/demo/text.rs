//! Formats numbers for display.

use std::time::Duration;

/// 12345 as `12,345`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Minutes and seconds: `1:05`.
pub(crate) fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

/// A percentage without insignificant digits: `75 %`, `33.3 %`.
pub(crate) fn percent(value: f64) -> String {
    match (value - value.round()).abs() < 0.05 {
        true => format!("{value:.0} %"),
        false => format!("{value:.1} %"),
    }
}

/// The filled part of a bar that is `width` characters long, to an eighth of a character.
pub(crate) fn bar(share: f64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * (width * 8) as f64).round() as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

/// Wraps words into lines of at most `width` characters (a longer word is a line of its own).
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([7, 999, 1_000, 1_234_567].map(thousands), ["7", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 9, 65].map(|seconds| clock(Duration::from_secs(seconds))), ["0:00", "0:09", "1:05"]);
        assert_eq!([0.0, 25.0, 100.0 / 3.0, 99.99].map(percent), ["0 %", "25 %", "33.3 %", "100 %"]);
    }

    #[test]
    fn words_are_wrapped() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("incomprehensible", 7), ["incomprehensible"]);
        assert_eq!(wrap(" ", 7), [""; 0]);
    }

    #[test]
    fn a_bar_is_as_long_as_its_share() {
        assert_eq!([0.0, 0.5, 1.0, 7.0].map(|share| bar(share, 4)), ["", "██", "████", "████"]);
        assert_eq!(bar(0.25, 2), "▌");
        assert_eq!(bar(f64::NAN, 2), "");
    }
}
