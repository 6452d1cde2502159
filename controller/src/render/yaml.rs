//! YAML as text that people read and change: quoting, indenting and JSON that is not one number a line.

use serde_json::Value;
use std::time::Duration;

/// A text as a YAML scalar; in quotes (JSON's, which are YAML's too) wherever a reader could take it for anything else.
pub(super) fn scalar(text: &str) -> String {
    // Names that some YAML reader or other takes for a truth, a number or nothing.
    const TAKEN: [&str; 12] = ["true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf", "infinity"];
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
        && !TAKEN.contains(&text.to_ascii_lowercase().as_str());
    if is_plain { text.to_owned() } else { quoted(text) }
}

/// A text in quotes as JSON and YAML have them, what YAML does not let through escaped.
fn quoted(text: &str) -> String {
    let refused =
        |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}'..='\u{ffff}');
    let mut quoted = String::new();
    for c in Value::from(text).to_string().chars() {
        match refused(c) {
            true => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => quoted.push(c),
        }
    }
    quoted
}

/// Scalars as a list on one line.
pub(super) fn list<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| scalar(item.as_ref())).collect();
    format!("[{}]", items.join(", "))
}

/// A duration as protobuf's JSON has it: `10s`, `0.25s`.
pub(super) fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}

/// The lines of a block, each `by` spaces further to the right; empty lines stay empty.
pub(super) fn indent(by: usize, block: &str) -> String {
    let line = |line: &str| if line.trim().is_empty() { "\n".to_owned() } else { format!("{:by$}{line}", "") };
    block.split_inclusive('\n').map(line).collect()
}

/// JSON in lines of up to `width` characters: what fits on one line is on one, and `name` comes first.
pub(super) fn json(value: &Value, width: usize) -> String {
    json_after(0, value, width)
}

/// The same, with `used` characters already on the line.
fn json_after(used: usize, value: &Value, width: usize) -> String {
    let (open, items, close): (_, Vec<(String, &Value)>, _) = match value {
        Value::Array(items) => ('[', items.iter().map(|item| (String::new(), item)).collect(), ']'),
        Value::Object(fields) => {
            let (names, others): (Vec<_>, Vec<_>) = fields.iter().partition(|(name, _)| *name == "name");
            let fields = names.into_iter().chain(others);
            ('{', fields.map(|(name, value)| (format!("{}: ", quoted(name)), value)).collect(), '}')
        }
        Value::String(text) => return quoted(text),
        _ => return value.to_string(),
    };
    let written = |width: usize| -> Vec<String> {
        let item =
            |(name, value): &(String, &Value)| format!("{name}{}", json_after(name.chars().count(), value, width));
        items.iter().map(item).collect()
    };
    let line = format!("{open}{}{close}", written(usize::MAX).join(", "));
    if used.saturating_add(line.chars().count()) <= width {
        return line;
    }
    let lines: Vec<_> = written(width.saturating_sub(2)).iter().map(|item| indent(2, item)).collect();
    format!("{open}\n{}\n{close}", lines.join(",\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn scalars_are_in_quotes_where_they_must_be() {
        for plain in ["v1", "checkout_v1", "checkout.example.com", "a/b"] {
            assert_eq!(scalar(plain), plain);
        }
        for quoted in ["", "1", "1e3", "on", "Yes", "null", "*.example.com", "a: b", "a #b", "/x", "::1", "a\"b"] {
            assert_eq!(scalar(quoted), json!(quoted).to_string());
        }
    }

    proptest! {
        #[test]
        fn scalars_are_read_as_what_they_were(text in "(?s).*|[a-z0-9.e-]{1,5}") {
            let read: Value = serde_saphyr::from_str(&format!("a: {}\n", scalar(&text))).unwrap();
            prop_assert_eq!(&read["a"], &json!(text));
        }

        #[test]
        fn spread_json_means_the_same(
            names in prop::collection::vec("(?s).{0,30}", 0..20),
            numbers in prop::collection::vec(any::<u64>(), 0..20),
            width in 0usize..120,
        ) {
            let value = json!({"names": names, "numbers": numbers, "both": {"n": numbers, "s": names}, "none": []});
            let json = json(&value, width);
            let read: Value = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&read, &value);
            let block: Value = serde_saphyr::from_str(&format!("a: |\n{}\n", indent(2, &json))).unwrap();
            prop_assert_eq!(&block["a"], &Value::from(format!("{json}\n")));
        }
    }

    #[test]
    fn short_json_is_on_one_line() {
        let value = json!({"a": [1, 2], "name": "x", "long": ["123456789", "123456789"]});
        assert_eq!(json(&value, 100), r#"{"name": "x", "a": [1, 2], "long": ["123456789", "123456789"]}"#);
        let spread =
            "{\n  \"name\": \"x\",\n  \"a\": [1, 2],\n  \"long\": [\n    \"123456789\",\n    \"123456789\"\n  ]\n}";
        assert_eq!(json(&value, 30), spread);
    }

    #[test]
    fn durations_are_in_seconds() {
        assert_eq!(seconds(Duration::from_secs(10)), "10s");
        assert_eq!(seconds(Duration::from_millis(1)), "0.001s");
        assert_eq!(seconds(Duration::from_secs(365 * 24 * 3600)), "31536000s");
    }
}
