//! Reads documents from JSON values into types and collects every error instead of stopping at the first.
//!
//! A reader returns `None` if it cannot parse a value and records the reason in the [`Decoder`]; the caller continues
//! with the next field. The names that a reader requests are the known names, so that the error for an unknown field
//! suggests the nearest of them.

use serde_json::{Map, Value};
use std::fmt;

/// The allowed values of [`Decoder::long`].
pub const LONG: &str = "an integer of at least 0, as a number or a string";

/// An error in one field of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The path of the field, such as `spec.versions[1].weight`; empty for the document itself.
    pub path: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// The kinds of errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A required field is missing.
    Missing {
        /// The allowed values.
        allowed: String,
    },
    /// The value is not allowed.
    Invalid {
        /// The value as JSON, shortened.
        value: String,
        /// The allowed values.
        allowed: String,
    },
    /// The field is unknown.
    Unknown {
        /// The most similar known name.
        nearest: Option<&'static str>,
        /// All known names at this path.
        known: Vec<&'static str>,
    },
    /// The document as a whole cannot be read.
    Unreadable(String),
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        match &self.problem {
            Problem::Missing { allowed } => write!(f, "missing; expected {allowed}"),
            Problem::Invalid { value, allowed } => write!(f, "{value} is not allowed; expected {allowed}"),
            Problem::Unknown { nearest, known } => {
                f.write_str("unknown field")?;
                if let Some(nearest) = nearest {
                    write!(f, "; did you mean `{nearest}`?")?;
                }
                write!(f, " (known here: {})", known.join(", "))
            }
            Problem::Unreadable(why) => f.write_str(why),
        }
    }
}

/// All errors of one document, in the order of its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub Vec<FieldError>);

impl Errors {
    /// The single error of a document that is not even JSON or YAML.
    pub fn of_document(why: String) -> Self {
        Self(vec![FieldError { path: String::new(), problem: Problem::Unreadable(why) }])
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// The current path in the document, and the errors so far.
#[derive(Debug, Default)]
pub struct Decoder {
    path: String,
    errors: Vec<FieldError>,
    /// Unknown fields that are harmless: see [`Decoder::read_from_peer`].
    ignored: Vec<FieldError>,
    is_from_peer: bool,
}

impl Decoder {
    /// Reads a whole document with `read`. Returns the document or all errors.
    pub fn read<'v, T>(value: &'v Value, read: impl FnOnce(&mut Self, &'v Value) -> Option<T>) -> Result<T, Errors> {
        let mut decoder = Self::default();
        match read(&mut decoder, value) {
            Some(document) if decoder.errors.is_empty() => Ok(document),
            _ => Err(Errors(decoder.errors)),
        }
    }

    /// Reads a whole document from a program that may be newer than this one: unknown fields are not typing errors, so
    /// that those in objects that [declare them harmless](Fields::finish_harmless) are added to `ignored` instead.
    pub fn read_from_peer<'v, T>(
        value: &'v Value,
        ignored: &mut Vec<FieldError>,
        read: impl FnOnce(&mut Self, &'v Value) -> Option<T>,
    ) -> Result<T, Errors> {
        let mut decoder = Self { is_from_peer: true, ..Self::default() };
        match read(&mut decoder, value) {
            Some(document) if decoder.errors.is_empty() => {
                ignored.append(&mut decoder.ignored);
                Ok(document)
            }
            _ => Err(Errors(decoder.errors)),
        }
    }

    /// Records that `value` is not allowed, and what is.
    pub fn invalid(&mut self, value: &Value, allowed: impl Into<String>) {
        let mut allowed = allowed.into();
        if value.as_str().is_some_and(|text| text.contains("{{")) {
            allowed.push_str("; this is a template that was not rendered");
        }
        self.error(Problem::Invalid { value: shown(value), allowed });
    }

    /// Records that the field `name` of the current object is missing, and what is allowed.
    pub fn missing(&mut self, name: &str, allowed: impl Into<String>) {
        let allowed = allowed.into();
        self.within(name, |d| d.error(Problem::Missing { allowed }));
    }

    /// Runs `inner` in the path of a field.
    pub fn within<T>(&mut self, name: &str, inner: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.path.len();
        if !self.path.is_empty() {
            self.path.push('.');
        }
        self.path.push_str(name);
        let result = inner(self);
        self.path.truncate(before);
        result
    }

    /// Runs `inner` in the path of a list item.
    pub fn at<T>(&mut self, index: usize, inner: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.path.len();
        self.path.push_str(&format!("[{index}]"));
        let result = inner(self);
        self.path.truncate(before);
        result
    }

    /// Starts an object; finish it with [`Fields::finish`].
    pub fn object<'v>(&mut self, value: &'v Value) -> Option<Fields<'v>> {
        match value {
            Value::Object(map) => Some(Fields { map, known: Vec::new() }),
            _ => {
                self.invalid(value, "an object");
                None
            }
        }
    }

    /// A list whose items are read by `read`. Invalid items are skipped, with their errors recorded; each of the others
    /// comes with its index in the document.
    pub fn list<T>(
        &mut self,
        value: &Value,
        mut read: impl FnMut(&mut Self, &Value) -> Option<T>,
    ) -> Option<Vec<(usize, T)>> {
        let Value::Array(items) = value else {
            self.invalid(value, "a list");
            return None;
        };
        let read_items = items.iter().enumerate();
        Some(read_items.filter_map(|(i, item)| Some((i, self.at(i, |d| read(d, item))?))).collect())
    }

    /// Any text.
    pub fn text(&mut self, value: &Value) -> Option<String> {
        self.text_where(value, "a string", |_| true)
    }

    /// Text that is not empty.
    pub fn filled_text(&mut self, value: &Value) -> Option<String> {
        self.text_where(value, "a string that is not empty", |text| !text.is_empty())
    }

    /// A text that satisfies `holds`.
    pub fn text_where(&mut self, value: &Value, allowed: &str, holds: impl FnOnce(&str) -> bool) -> Option<String> {
        match value {
            Value::String(text) if holds(text) => Some(text.clone()),
            _ => {
                self.invalid(value, allowed);
                None
            }
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, value: &Value) -> Option<bool> {
        if value.as_bool().is_none() {
            self.invalid(value, "true or false");
        }
        value.as_bool()
    }

    /// An integer from `low` to `high`, both included.
    pub fn integer(&mut self, value: &Value, low: u64, high: u64) -> Option<u64> {
        // `30.0` is an integer, too; beyond 2^53 floats do not represent every integer.
        let is_whole = |number: &f64| *number >= 0.0 && *number < 9e15 && libm::trunc(*number) == *number;
        let whole = || value.as_f64().filter(is_whole).map(|number| number as u64);
        match value.as_u64().or_else(whole) {
            Some(number) if (low..=high).contains(&number) => Some(number),
            _ => {
                let allowed = match high {
                    u64::MAX => format!("an integer of at least {low}"),
                    _ => format!("an integer from {low} to {high}"),
                };
                self.invalid(value, allowed);
                None
            }
        }
    }

    /// An integer of up to 64 bits. Also accepted as a string, because Istio passes numbers through doubles, which keep
    /// 53 bits.
    pub fn long(&mut self, value: &Value) -> Option<u64> {
        let number = match value {
            Value::String(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok(),
            _ => value.as_u64(),
        };
        if number.is_none() {
            self.invalid(value, LONG);
        }
        number
    }

    /// A number from `low` to `high`, both included.
    pub fn number(&mut self, value: &Value, low: f64, high: f64) -> Option<f64> {
        let number = value.as_f64().filter(|number| (low..=high).contains(number));
        if number.is_none() {
            self.invalid(value, format!("a number from {low:?} to {high:?}"));
        }
        number
    }

    fn error(&mut self, problem: Problem) {
        self.errors.push(FieldError { path: self.path.clone(), problem });
    }
}

/// The fields of an object that is being read.
#[derive(Debug)]
pub struct Fields<'v> {
    map: &'v Map<String, Value>,
    known: Vec<&'static str>,
}

impl<'v> Fields<'v> {
    /// An optional field; null counts as missing, as Kubernetes tools treat it.
    pub fn optional<T>(
        &mut self,
        d: &mut Decoder,
        name: &'static str,
        read: impl FnOnce(&mut Decoder, &'v Value) -> Option<T>,
    ) -> Option<T> {
        self.known.push(name);
        let value = self.map.get(name).filter(|value| !value.is_null())?;
        d.within(name, |d| read(d, value))
    }

    /// A required field; `allowed` is for the message if it is missing.
    pub fn required<T>(
        &mut self,
        d: &mut Decoder,
        name: &'static str,
        allowed: &str,
        read: impl FnOnce(&mut Decoder, &'v Value) -> Option<T>,
    ) -> Option<T> {
        if !self.has(name) {
            d.missing(name, allowed);
        }
        self.optional(d, name, read)
    }

    /// Whether the field is present and not null.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// Ends the object: every unknown field is an error.
    pub fn finish(self, d: &mut Decoder) {
        self.each_unknown(d, Decoder::error);
    }

    /// The same for an object whose unknown fields are harmless: in a document that a newer program may have written
    /// they are ignored.
    pub fn finish_harmless(self, d: &mut Decoder) {
        if !d.is_from_peer {
            return self.finish(d);
        }
        self.each_unknown(d, |d, problem| d.ignored.push(FieldError { path: d.path.clone(), problem }));
    }

    fn each_unknown(self, d: &mut Decoder, note: impl Fn(&mut Decoder, Problem)) {
        for name in self.map.keys() {
            if self.known.contains(&name.as_str()) {
                continue;
            }
            let nearest = nearest(name, &self.known);
            let known = self.known.clone();
            d.within(name, |d| note(d, Problem::Unknown { nearest, known }));
        }
    }
}

/// The most similar known name, if any is similar: at most half of it differs.
fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let distance = |candidate: &str| strsim::levenshtein(&name, &candidate.to_ascii_lowercase());
    let scored = known.iter().map(|candidate| (distance(candidate), *candidate));
    let like = scored.filter(|(distance, candidate)| 2 * distance <= name.len().max(candidate.len()));
    like.min_by_key(|(distance, _)| *distance).map(|(_, candidate)| candidate)
}

/// A value as JSON, truncated if it is long.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[derive(Debug, PartialEq)]
    struct Pair {
        name: String,
        count: u64,
    }

    fn pair(d: &mut Decoder, value: &Value) -> Option<Pair> {
        let mut f = d.object(value)?;
        let name = f.required(d, "name", "a name", Decoder::filled_text);
        let count = f.optional(d, "holdSeconds", |d, v| d.integer(v, 1, 9));
        f.finish(d);
        Some(Pair { name: name?, count: count.unwrap_or(7) })
    }

    fn errors(value: Value) -> Vec<String> {
        let read = |d: &mut Decoder, v: &Value| d.within("pairs", |d| d.list(v, pair));
        let errors = Decoder::read(&value, read).map_or_else(|errors| errors.0, |_| Vec::new());
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn fields_left_out_or_null_have_their_defaults() {
        assert_eq!(
            Decoder::read(&json!({"name": "a", "holdSeconds": null}), pair),
            Ok(Pair { name: "a".to_owned(), count: 7 })
        );
    }

    #[test]
    fn every_error_is_told_at_once_with_its_place() {
        let value = json!([
            {"nmae": "a", "holdSeconds": 10},
            {"name": "", "holdSecond": 3},
            "text",
            {"name": "b", "holdSeconds": 1.5},
        ]);
        assert_eq!(
            errors(value),
            [
                "pairs[0].name: missing; expected a name",
                "pairs[0].holdSeconds: 10 is not allowed; expected an integer from 1 to 9",
                "pairs[0].nmae: unknown field; did you mean `name`? (known here: name, holdSeconds)",
                "pairs[1].name: \"\" is not allowed; expected a string that is not empty",
                "pairs[1].holdSecond: unknown field; did you mean `holdSeconds`? (known here: name, holdSeconds)",
                "pairs[2]: \"text\" is not allowed; expected an object",
                "pairs[3].holdSeconds: 1.5 is not allowed; expected an integer from 1 to 9",
            ]
        );
    }

    #[test]
    fn a_name_like_nothing_known_gets_no_suggestion() {
        let errors = errors(json!([{"name": "a", "zzz": 1}]));
        assert_eq!(errors, ["pairs[0].zzz: unknown field (known here: name, holdSeconds)"]);
    }

    #[test]
    fn long_values_are_cut() {
        let errors = errors(json!(["ä".repeat(500)]));
        assert!(errors.concat().len() < 300 && errors.concat().contains('…'), "{errors:?}");
    }
}
