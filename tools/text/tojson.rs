//! The `tojson` filter as transformers has it: Python's `json.dumps(x, ensure_ascii=False)`, nothing escaped for HTML,
//! keys in order.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// JSON readers accept 128 levels (serde_json); what a template nests deeper is refused instead of overflowing the
/// stack.
const MAX_DEPTH: usize = 128;

/// An indent beyond this is an attack, not a layout.
const MAX_INDENT: usize = 64;

pub(super) fn tojson(state: &State, value: Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let invalid = |why: &'static str| Error::new(ErrorKind::InvalidOperation, why);
    let indent = indent.or(options.get("indent")?).filter(|indent| !indent.is_none());
    let indent = match indent.map(|indent| indent.as_usize()) {
        None => None,
        Some(Some(indent)) if indent <= MAX_INDENT => Some(indent),
        Some(_) => return Err(invalid("tojson: indent must be a number from 0 to 64")),
    };
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(invalid("tojson: separators must be two strings")),
    };
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = Writer { out: String::new(), state, paid: 0, indent, item, key, ensure_ascii, sort_keys };
    writer.value(&value, 0)?;
    // A safe string, as Jinja's own filter returns; nothing is escaped anyway.
    Ok(Value::from_safe_string(writer.out))
}

struct Writer<'a, 'env, 'template> {
    out: String,
    state: &'a State<'env, 'template>,
    /// Bytes of `out` that the template has paid for.
    paid: usize,
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::BadSerialization, "tojson: more than 128 levels"));
        }
        // minijinja takes one unit of fuel for 64 bytes.
        self.state.consume_fuel(1 + ((self.out.len() - self.paid) / 64) as u64)?;
        self.paid = self.out.len();
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
                if self.sort_keys {
                    keys.sort();
                }
                self.list('{', '}', depth, keys, |writer, key| {
                    writer.name(&key)?;
                    writer.out.push_str(writer.key);
                    writer.value(&value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
                self.list('[', ']', depth, items, |writer, item| writer.value(&item, depth + 1))?;
            }
            kind => {
                let why = format!("tojson: a value that is {kind} has no JSON");
                return Err(Error::new(ErrorKind::BadSerialization, why));
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: Vec<Value>,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let empty = items.is_empty();
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.out.push_str(self.item);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    /// A key: Python writes a constant or a number as a string.
    fn name(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            _ => {
                self.out.push('"');
                self.value(key, MAX_DEPTH)?;
                self.out.push('"');
            }
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        let text = if value.is_integer() { value.to_string() } else { float(f64::try_from(value.clone())?) };
        self.out.push_str(&text);
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "NaN" } else { ["-Infinity", "Infinity"][usize::from(value > 0.0)] }.to_string();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{value:?}")
}

#[cfg(test)]
mod tests {
    use super::super::messages::to_jinja;
    use super::*;
    use minijinja::Environment;
    use serde_json::json;

    fn render(template: &str) -> Result<String, Error> {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        env.render_str(
            template,
            to_jinja(&json!({"x": {"b": [1, -2, 0.5, true, null], "a": "<é'\"\n\u{1}>"}, "e": {"l": [], "m": {}}})),
        )
    }

    #[test]
    fn json_is_that_of_python() {
        let x = r#"{"b": [1, -2, 0.5, true, null], "a": "<é'\"\n\u0001>"}"#;
        assert_eq!(render("{{ x | tojson }}").unwrap(), x);
        assert_eq!(render("{{ x | tojson(indent=none) }}").unwrap(), x);
        assert_eq!(render("{{ e | tojson(indent=2) }}").unwrap(), "{\n  \"l\": [],\n  \"m\": {}\n}");
        assert_eq!(render("{{ x.b | tojson(4) }}").unwrap(), "[\n    1,\n    -2,\n    0.5,\n    true,\n    null\n]");
        assert_eq!(
            render("{{ x | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}").unwrap(),
            r#"{"a":"<\u00e9'\"\n\u0001>","b":[1,-2,0.5,true,null]}"#
        );
        assert_eq!(
            render("{{ {1: 2, none: 3, false: '😀'} | tojson }}").unwrap(),
            r#"{"1": 2, "null": 3, "false": "😀"}"#
        );
    }

    #[test]
    fn floats_are_those_of_python() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (value, text) in cases {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let detail = |template: &str| render(template).unwrap_err().detail().unwrap().to_string();
        assert_eq!(detail("{{ nothing | tojson }}"), "tojson: a value that is undefined has no JSON");
        assert_eq!(detail("{{ x | tojson(indent=9999999) }}"), "tojson: indent must be a number from 0 to 64");
        assert_eq!(detail("{{ x | tojson(separators=['']) }}"), "tojson: separators must be two strings");
        assert_eq!(
            detail(
                "{% set ns = namespace(x=[]) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}"
            ),
            "tojson: more than 128 levels"
        );
    }
}
