//! Arguments of calls as Python writes them: `[f(a=1, b='x'), g()]`, with literals for values.

use serde_json::{Map, Value};

/// Levels of a value; JSON readers accept as many.
const MAX_DEPTH: usize = 128;

/// `name=value` as a field of a JSON object; None where the text is no such argument.
pub fn argument(text: &str) -> Option<String> {
    let mut parser = Parser { rest: text };
    let name = parser.name()?;
    parser.take('=')?;
    let value = parser.value(0)?;
    parser.rest.trim().is_empty().then(|| format!("{}:{value}", Value::from(name)))
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn take(&mut self, token: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn next_is(&self, token: char) -> bool {
        self.rest.trim_start().starts_with(token)
    }

    /// Things between brackets, separated by commas; the last may have one behind it.
    fn list<T>(&mut self, open: char, close: char, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.take(open)?;
        let mut items = Vec::new();
        while !self.next_is(close) {
            items.push(item(self)?);
            if !self.next_is(close) {
                self.take(',')?;
            }
        }
        self.take(close)?;
        Some(items)
    }

    fn word(&mut self, is_part: impl Fn(char) -> bool) -> Option<&str> {
        let rest = self.rest.trim_start();
        let (word, rest) = rest.split_at(rest.find(|c| !is_part(c)).unwrap_or(rest.len()));
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    fn name(&mut self) -> Option<String> {
        self.word(|c| c.is_alphanumeric() || "_.-".contains(c)).map(str::to_owned)
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.rest.trim_start().chars().next()? {
            '[' => self.list('[', ']', |parser| parser.value(depth + 1)).map(Value::Array),
            '(' => self.list('(', ')', |parser| parser.value(depth + 1)).map(Value::Array),
            '{' => {
                let pairs = self.list('{', '}', |parser| {
                    let key = parser.string()?;
                    parser.take(':')?;
                    Some((key, parser.value(depth + 1)?))
                })?;
                Some(Value::Object(pairs.into_iter().collect::<Map<_, _>>()))
            }
            '"' | '\'' => self.string().map(Value::String),
            _ => match self.word(|c| c.is_alphanumeric() || "+-._".contains(c))? {
                "True" | "true" => Some(true.into()),
                "False" | "false" => Some(false.into()),
                "None" | "null" => Some(Value::Null),
                number => serde_json::from_str(&number.replace('_', "")).ok().filter(Value::is_number),
            },
        }
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.rest.trim_start().chars().next().filter(|c| matches!(c, '"' | '\''))?;
        self.take(quote)?;
        let mut text = String::new();
        loop {
            match self.next_char()? {
                '\\' => self.escape(&mut text)?,
                c if c == quote => return Some(text),
                c => text.push(c),
            }
        }
    }

    fn next_char(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    /// Appends what an escape stands for.
    fn escape(&mut self, text: &mut String) -> Option<()> {
        match self.next_char()? {
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            'b' => text.push('\u{8}'),
            'f' => text.push('\u{c}'),
            'x' => text.push(char::from(self.code(2)? as u8)),
            'U' => text.push(char::from_u32(self.code(8)?)?),
            'u' => {
                let first = self.code(4)?;
                // Models write pairs, as JSON has them, although Python has none.
                let pair = (0xd800..0xdc00).contains(&first).then(|| self.rest.strip_prefix("\\u")).flatten();
                let code = match pair {
                    None => first,
                    Some(rest) => {
                        self.rest = rest;
                        let second = self.code(4)?.checked_sub(0xdc00).filter(|second| *second < 0x400)?;
                        0x10000 + (first - 0xd800) * 0x400 + second
                    }
                };
                text.push(char::from_u32(code)?);
            }
            c @ ('\\' | '\'' | '"') => text.push(c),
            // As Python: what is no escape stands for itself.
            c => text.extend(['\\', c]),
        }
        Some(())
    }

    /// A character's number, in so many hexadecimal digits.
    fn code(&mut self, digits: usize) -> Option<u32> {
        let (digits, rest) = self.rest.split_at_checked(digits)?;
        self.rest = rest;
        // A sign is no digit.
        digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_argument_becomes_a_field_of_json() {
        for (python, json) in [
            ("a=1", r#""a":1"#),
            (" a = -2.5 ", r#""a":-2.5"#),
            ("a=[True, None, (1, 'x')]", r#""a":[true,null,[1,"x"]]"#),
            ("a={'b': {\"c\": 1}}", r#""a":{"b":{"c":1}}"#),
            (r"a='\x41\u00e9\U0001F600\ud83d\ude00\n\q'", r#""a":"Aé😀😀\n\\q""#),
        ] {
            assert_eq!(argument(python).as_deref(), Some(json), "{python}");
        }
        for wrong in
            ["", "a", "a=", "a=b", "'x'", "a=1 2", "a='", r"a='\x4'", r"a='\u+041'", r"a='\ud83d'", r"a='\ud83d\u0041'"]
        {
            assert_eq!(argument(wrong), None, "{wrong}");
        }
    }
}
