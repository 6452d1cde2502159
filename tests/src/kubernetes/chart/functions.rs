//! The template functions that the chart calls, as in Helm.

use std::iter;

use anyhow::bail;
use serde_json::{Value, json};

/// Whether `if` takes it.
pub(super) fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As it is printed.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

pub(super) fn call(name: &str, arguments: &[Value]) -> anyhow::Result<Value> {
    Ok(match (name, arguments) {
        ("default", [default, value]) => if is_true(value) { value } else { default }.clone(),
        ("and", [a, b]) => if is_true(a) { b } else { a }.clone(),
        ("or", [a, b]) => if is_true(a) { a } else { b }.clone(),
        ("not", [value]) => (!is_true(value)).into(),
        ("eq", [a, b]) => (a == b).into(),
        ("ne", [a, b]) => (a != b).into(),
        ("gt", [a, b]) => (a.as_i64() > b.as_i64()).into(),
        ("int", [value]) => json!(value.as_f64().unwrap_or_default() as i64),
        ("dict", []) => json!({}),
        ("list", items) => items.into(),
        ("quote", [value]) => json!(text(value)).to_string().into(),
        ("upper", [value]) => text(value).to_uppercase().into(),
        ("trunc", [length, value]) => {
            text(value).chars().take(length.as_u64().unwrap_or_default() as usize).collect::<String>().into()
        }
        ("trimSuffix", [suffix, value]) => {
            let value = text(value);
            value.strip_suffix(&text(suffix)).unwrap_or(&value).into()
        }
        ("join", [between, Value::Array(items)]) => {
            items.iter().map(text).collect::<Vec<_>>().join(&text(between)).into()
        }
        ("printf", [format, values @ ..]) => {
            let format = text(format);
            let mut values = values.iter();
            let mut printed = String::new();
            for (n, part) in format.split("%s").enumerate() {
                let value = if n > 0 { values.next().map(text).unwrap_or_default() } else { String::new() };
                printed.extend([value.as_str(), part]);
            }
            printed.into()
        }
        ("nindent", [depth, value]) => {
            let indent = " ".repeat(depth.as_u64().unwrap_or_default() as usize);
            let lines = text(value).split('\n').map(|line| format!("\n{indent}{line}")).collect::<String>();
            lines.into()
        }
        ("b64enc", [value]) => base64(text(value).as_bytes()).into(),
        ("randAlphaNum", [length]) => {
            let length = length.as_u64().unwrap_or_default() as usize;
            iter::repeat_with(fastrand::alphanumeric).take(length).collect::<String>().into()
        }
        ("toYaml", [value]) => yaml(value).into(),
        _ => bail!("there is no such function, or not of so many arguments"),
    })
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for three in bytes.chunks(3) {
        let bits = (0..3).fold(0, |bits, n| bits << 8 | usize::from(three.get(n).copied().unwrap_or_default()));
        for n in 0..4 {
            let digit = char::from(DIGITS[bits >> (18 - 6 * n) & 63]);
            encoded.push(if n <= three.len() { digit } else { '=' });
        }
    }
    encoded
}

/// In blocks; lists are not further in than what they belong to.
fn yaml(value: &Value) -> String {
    let scalar = |value: &Value| match value {
        Value::String(text) if is_plain(text) => text.clone(),
        // JSON is YAML.
        value => value.to_string(),
    };
    let below = |value: &Value, indent: &str| match value {
        Value::Object(map) if !map.is_empty() => {
            format!("\n{indent}{}", yaml(value).replace('\n', &format!("\n{indent}")))
        }
        Value::Array(items) if !items.is_empty() => format!("\n{}", yaml(value)),
        value => format!(" {}", scalar(value)),
    };
    let lines: Vec<String> = match value {
        Value::Object(map) if !map.is_empty() => {
            map.iter().map(|(key, value)| format!("{}:{}", scalar(&json!(key)), below(value, "  "))).collect()
        }
        Value::Array(items) if !items.is_empty() => {
            items.iter().map(|item| format!("- {}", yaml(item).replace('\n', "\n  "))).collect()
        }
        value => vec![scalar(value)],
    };
    lines.join("\n")
}

/// Whether it is a string also where nothing is around it.
fn is_plain(text: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(fine)
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text.to_lowercase().as_str())
}
