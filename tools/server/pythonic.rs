//! Calls as Python writes them: `[f(a=1, b='x'), g()]`, with literals for arguments.

use serde_json::{Map, Value};

/// Levels of a value; JSON readers accept as many.
const MAX_DEPTH: usize = 128;

/// Names and arguments of the calls; None where the text is no list of calls and nothing else.
pub fn parse(text: &str) -> Option<Vec<(String, Value)>> {
    let mut parser = Parser { rest: text };
    let calls = parser.list('[', ']', Parser::call)?;
    (parser.rest.trim().is_empty() && !calls.is_empty()).then_some(calls)
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

    fn call(&mut self) -> Option<(String, Value)> {
        let name = self.name()?;
        let arguments = self.list('(', ')', |parser| {
            let name = parser.name()?;
            parser.take('=')?;
            Some((name, parser.value(0)?))
        })?;
        Some((name, Value::Object(arguments.into_iter().collect())))
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
        let mut chars = self.rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    c @ ('\\' | '\'' | '"') => text.push(c),
                    // As Python: what is no escape stands for itself.
                    c => text.extend(['\\', c]),
                },
                c if c == quote => {
                    self.rest = &self.rest[at + c.len_utf8()..];
                    return Some(text);
                }
                c => text.push(c),
            }
        }
        None
    }
}
