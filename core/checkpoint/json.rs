//! Reads values of a JSON object that a stranger wrote: each accessor either gives what was asked for, or an error
//! that names the file, the key, what is allowed and what was found. `null` counts as absent, as it does in Python.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::bytes::Bytes;
use crate::error::{Error, Result};

/// The largest JSON file that is read. Real configs have some kilobytes; the index of the largest models, one line a
/// tensor, has less than 10 MiB. Parsed JSON takes many times its size, so that a bound is needed.
const MAX_JSON_BYTES: usize = 32 << 20;

/// Parses a whole file.
pub(crate) fn parse(file: &str, bytes: &Bytes) -> Result<Value> {
    if bytes.len() > MAX_JSON_BYTES {
        let why = format!("has {} bytes, more than {MAX_JSON_BYTES}; this is no model's JSON", bytes.len());
        return Err(Error::checkpoint(file, why));
    }
    serde_json::from_slice(bytes)
        .map_err(|e| Error::checkpoint(file, format!("is not valid JSON: {e}; download the model again")))
}

/// A JSON object and the file that it came from.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a> {
    file: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// The object of a whole file.
    pub(crate) fn root(file: &'a str, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Object { file, map }),
            other => Err(Error::checkpoint(file, format!("must hold a JSON object, found {}", short(other)))),
        }
    }

    /// The value of a key, where there is one.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// All keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// True where any value is an object.
    pub(crate) fn is_nested(&self) -> bool {
        self.map.values().any(Value::is_object)
    }

    /// An error about a key.
    pub(crate) fn error(&self, key: &str, why: impl std::fmt::Display) -> Error {
        Error::checkpoint(self.file, format!("`{key}` {why}"))
    }

    fn must(&self, key: &str, allowed: impl std::fmt::Display, found: &Value) -> Error {
        self.error(key, format_args!("must be {allowed}, found {}", short(found)))
    }

    /// The value of a key that the file cannot do without.
    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "is missing; take the file from the model's repository"))
    }

    /// An object.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Object { file: self.file, map })),
            Some(other) => Err(self.must(key, "an object", other)),
        }
    }

    /// A whole number in a range.
    pub(crate) fn whole(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                Err(self.must(key, format_args!("a whole number from {} to {}", range.start(), range.end()), value))
            }
        }
    }

    /// A number in a range.
    pub(crate) fn real(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|x| range.contains(x)) {
            Some(x) => Ok(Some(x)),
            None => Err(self.must(key, format_args!("a number from {:?} to {:?}", range.start(), range.end()), value)),
        }
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.must(key, "true or false", value))
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.must(key, "a string", value))
    }

    /// A token id, or a list of them.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.must(key, "a token id or a list of token ids", value))
    }

    /// One token id.
    pub(crate) fn token_id(&self, key: &str) -> Result<Option<u32>> {
        match self.whole(key, 0..=u32::MAX as usize)? {
            Some(id) => Ok(u32::try_from(id).ok()),
            None => Ok(None),
        }
    }
}

/// A value as an error message quotes it: whole where it is small.
pub(crate) fn short(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
        other => clipped(&other.to_string()),
    }
}

/// A stranger's text as an error message quotes it: one line, not too long.
pub(crate) fn clipped(text: &str) -> String {
    const MOST: usize = 80;
    let mut line: String = text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T: std::fmt::Debug>(value: Value, read: impl Fn(Object) -> Result<T>) -> String {
        let object = Object::root("config.json", &value).unwrap();
        read(object).unwrap_err().to_string()
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named_with_what_is_allowed() {
        let value = serde_json::json!({"a": "x", "b": 1.5, "c": [1, -1], "d": {}});
        let cases = [
            (message(value.clone(), |o| o.whole("a", 1..=9)), "`a` must be a whole number from 1 to 9, found \"x\""),
            (message(value.clone(), |o| o.whole("b", 1..=9)), "`b` must be a whole number from 1 to 9, found 1.5"),
            (
                message(value.clone(), |o| o.real("a", 0.0..=1e9)),
                "`a` must be a number from 0.0 to 1000000000.0, found \"x\"",
            ),
            (message(value.clone(), |o| o.real("b", 0.0..=1.0)), "`b` must be a number from 0.0 to 1.0, found 1.5"),
            (message(value.clone(), |o| o.flag("b")), "`b` must be true or false, found 1.5"),
            (message(value.clone(), |o| o.text("c").map(|_| ())), "`c` must be a string, found a list of 2"),
            (
                message(value.clone(), |o| o.token_ids("c")),
                "`c` must be a token id or a list of token ids, found a list of 2",
            ),
            (message(value.clone(), |o| o.text("d").map(|_| ())), "`d` must be a string, found an object"),
            (message(value.clone(), |o| o.object("b").map(|_| ())), "`b` must be an object, found 1.5"),
        ];
        for (got, want) in cases {
            assert_eq!(got, format!("config.json: {want}"));
        }
    }

    #[test]
    fn null_counts_as_absent() {
        let value = serde_json::json!({"a": null});
        let object = Object::root("config.json", &value).unwrap();
        assert_eq!(object.whole("a", 0..=9).unwrap(), None);
        assert_eq!(object.token_ids("a").unwrap(), None);
    }

    #[test]
    fn a_long_or_many_lined_text_is_quoted_in_one_short_line() {
        assert_eq!(clipped("a\nb\u{7}c"), "a b c");
        assert_eq!(clipped(&"x".repeat(1000)).len(), 83);
    }
}
