//! Finds the calls in an answer while it comes. What begins like one is held back until no known function can be meant
//! any more, and given as text then; the arguments of one are given out as they come, as JSON's text.

use super::app::random_id;
use super::pythonic;
use super::tools::Piece;

/// Finds calls in an answer while it comes.
pub struct ToolCalls {
    /// The functions that may be called.
    names: Vec<String>,
    most: usize,
    form: Form,
    /// Text that is not decided about.
    held: String,
    /// Bytes of it that the place in a value is behind.
    read: usize,
    /// Calls stand in a JSON list that is open.
    in_list: bool,
    count: usize,
}

/// Where in an answer its held text begins.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Where a call may begin: at the start, or behind a call.
    Open,
    /// Nothing is a call any more.
    Text,
    /// In the parameters of a call.
    Parameters(Nesting),
    /// At an object whose parameters, from this byte on, come before its name.
    Unnamed { from: usize, nesting: Nesting },
    /// The same, and they have come, up to the second byte.
    Naming { from: usize, end: usize },
    /// Behind the parameters, before the brace that closes the call.
    Closing,
    /// In more fields of it, which say nothing.
    Fields(Nesting),
    /// In an argument of a call of Python's; true where one was given already.
    Argument(bool, Nesting),
    /// Behind a call of Python's, in its list.
    Called,
}

/// A place in a value of JSON or Python.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Nesting {
    depth: usize,
    quote: Option<u8>,
    is_escaped: bool,
}

impl Nesting {
    /// Takes a byte; true where it is no part of a string.
    fn take(&mut self, byte: u8, quotes: &[u8]) -> bool {
        match (self.quote, byte) {
            (Some(_), _) if self.is_escaped => self.is_escaped = false,
            (Some(_), b'\\') => self.is_escaped = true,
            (Some(quote), _) if quote == byte => self.quote = None,
            (Some(_), _) => {}
            (None, _) if quotes.contains(&byte) => self.quote = Some(byte),
            (None, b'{' | b'[' | b'(') => self.depth += 1,
            (None, b'}' | b']' | b')') => self.depth = self.depth.saturating_sub(1),
            (None, _) => {}
        }
        self.quote.is_none()
    }

    /// Bytes of `text` up to the end of the JSON value; None where it does not end there.
    fn json_end(&mut self, text: &str) -> Option<usize> {
        let mut bytes = text.bytes();
        bytes.position(|byte| self.take(byte, b"\"") && matches!(byte, b'}' | b']') && self.depth == 0).map(|i| i + 1)
    }

    /// Bytes of `text` up to the comma or the parenthesis behind Python's argument.
    fn argument_end(&mut self, text: &str) -> Option<usize> {
        text.bytes().position(|byte| {
            let is_end = self.depth == 0 && self.quote.is_none() && matches!(byte, b',' | b')');
            if !is_end {
                self.take(byte, b"\"'");
            }
            is_end
        })
    }
}

/// Why a text has no header.
#[derive(Debug, PartialEq)]
enum Miss {
    /// It ends too early to tell.
    Open,
    /// No text behind it makes it one.
    Never,
}

/// Reads a header token by token; spaces may stand between them.
struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scan<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn spaces(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn next_is(&mut self, token: char) -> Result<bool, Miss> {
        self.spaces();
        self.rest().chars().next().map(|next| next == token).ok_or(Miss::Open)
    }

    fn token(&mut self, token: &str) -> Result<(), Miss> {
        self.spaces();
        match self.rest().starts_with(token) {
            true => self.at += token.len(),
            false if token.starts_with(self.rest()) => return Err(Miss::Open),
            false => return Err(Miss::Never),
        }
        Ok(())
    }

    /// One of some words, with `end` behind it.
    fn word<'w>(&mut self, mut words: impl Iterator<Item = &'w str>, end: char) -> Result<&'w str, Miss> {
        let rest = self.rest();
        let Some(length) = rest.find(end) else {
            let is_open = words.any(|word| word.starts_with(rest));
            return Err(if is_open { Miss::Open } else { Miss::Never });
        };
        let word = words.find(|word| *word == &rest[..length]).ok_or(Miss::Never)?;
        self.at += length + end.len_utf8();
        Ok(word)
    }
}

/// How a call begins.
#[derive(Debug, PartialEq)]
enum Header {
    /// `{"name": "f", "parameters": `, or without the name, which comes later then.
    Json { name: Option<String>, opens_list: bool },
    /// `[f(`.
    Python { name: String },
}

impl ToolCalls {
    /// For one answer, of which calls of `names` are looked for; of these at most `most` are given.
    pub fn new(names: Vec<String>, most: usize) -> Self {
        let form = if names.is_empty() { Form::Text } else { Form::Open };
        ToolCalls { names, most, form, held: String::new(), read: 0, in_list: false, count: 0 }
    }

    /// Calls that were given.
    pub fn count(&self) -> usize {
        self.count.min(self.most)
    }

    /// Takes more of the answer and gives what is certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces).is_some() {}
        pieces
    }

    /// Ends the answer: what was held back and is not part of a call is text.
    pub fn finish(&mut self) -> Vec<Piece> {
        let held = std::mem::take(&mut self.held);
        let is_text = match self.form {
            Form::Open | Form::Called => self.count == 0 || !held.trim_matches(is_between).is_empty(),
            Form::Text | Form::Unnamed { .. } | Form::Naming { .. } => true,
            _ => false,
        };
        if is_text && !held.is_empty() { vec![Piece::Text(held)] } else { Vec::new() }
    }

    /// Goes on by one form; None where more text is needed for that.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> Option<()> {
        match self.form {
            Form::Open => self.open(pieces)?,
            Form::Text => {
                if !self.held.is_empty() {
                    pieces.push(Piece::Text(std::mem::take(&mut self.held)));
                }
                return None;
            }
            Form::Parameters(mut nesting) => {
                let end = nesting.json_end(&self.held);
                let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                self.arguments(text, pieces);
                self.form = if end.is_some() { Form::Closing } else { Form::Parameters(nesting) };
                end?;
            }
            Form::Unnamed { from, mut nesting } => {
                let read = std::mem::replace(&mut self.read, self.held.len());
                let end = nesting.json_end(&self.held[read..]);
                self.form = match end {
                    Some(end) => Form::Naming { from, end: read + end },
                    None => Form::Unnamed { from, nesting },
                };
                end?;
            }
            Form::Naming { from, end } => {
                match self.late_name(end) {
                    Err(Miss::Open) => return None,
                    Err(Miss::Never) => self.form = Form::Text,
                    Ok((name, behind)) => {
                        let arguments = self.held[from..end].to_owned();
                        self.held.drain(..behind);
                        self.begin(name, pieces);
                        self.arguments(arguments, pieces);
                        self.form = Form::Closing;
                    }
                };
            }
            Form::Closing => {
                let mut scan = Scan { text: &self.held, at: 0 };
                self.form = match scan.token("}") {
                    Err(Miss::Open) => return None,
                    Ok(()) => {
                        let behind = scan.at;
                        self.held.drain(..behind);
                        Form::Open
                    }
                    Err(Miss::Never) => match scan.token(",").and_then(|()| scan.next_is('"')) {
                        Err(Miss::Open) => return None,
                        Ok(true) => Form::Fields(Nesting { depth: 1, ..Nesting::default() }),
                        // A brace that is missing is often the only fault of a small model's call.
                        _ => Form::Open,
                    },
                };
            }
            Form::Fields(mut nesting) => {
                let end = nesting.json_end(&self.held);
                self.held.drain(..end.unwrap_or(self.held.len()));
                self.form = if end.is_some() { Form::Open } else { Form::Fields(nesting) };
                end?;
            }
            Form::Argument(is_later, nesting) => self.argument(is_later, nesting, pieces)?,
            Form::Called => match self.next_call() {
                Err(Miss::Open) => return None,
                Err(Miss::Never) => self.form = Form::Text,
                Ok((name, end)) => self.called(name, end, pieces),
            },
        }
        Some(())
    }

    /// Where a call may begin: begins one, or knows that there is none.
    fn open(&mut self, pieces: &mut Vec<Piece>) -> Option<()> {
        // Behind a call stands what separates it from the next one.
        let is_between = |c: char| if self.count > 0 { is_between(c) } else { c.is_whitespace() };
        let start = self.held.find(|c| !is_between(c))?;
        if self.in_list && self.held[start..].starts_with(']') {
            self.held.drain(..=start);
            self.in_list = false;
            return Some(());
        }
        match self.header(start) {
            Err(Miss::Open) => return None,
            Err(Miss::Never) => self.form = Form::Text,
            Ok((Header::Python { name }, end)) => self.called(Some(name), end, pieces),
            Ok((Header::Json { name, opens_list }, end)) => {
                self.in_list |= opens_list;
                self.form = match name {
                    Some(name) => {
                        self.held.drain(..end);
                        self.begin(name, pieces);
                        Form::Parameters(Nesting::default())
                    }
                    None => {
                        self.read = end;
                        Form::Unnamed { from: end, nesting: Nesting::default() }
                    }
                };
            }
        }
        Some(())
    }

    /// The header that begins at a byte of the held text, and where it ends: at the brace of its parameters, or behind
    /// the parenthesis of its arguments.
    fn header(&self, start: usize) -> Result<(Header, usize), Miss> {
        let mut scan = Scan { text: &self.held, at: start };
        let opens_list = scan.next_is('[')?;
        if opens_list {
            scan.token("[")?;
            if !scan.next_is('{')? {
                let name = scan.word(self.names.iter().map(String::as_str), '(')?.to_owned();
                return Ok((Header::Python { name }, scan.at));
            }
        }
        scan.token("{")?;
        let mut name = None;
        loop {
            match self.field(&mut scan, &["type", "name", "parameters", "arguments"])? {
                Field::Type => {}
                Field::Name(own) => name = Some(own),
                Field::Parameters => return Ok((Header::Json { name, opens_list }, scan.at)),
            }
            scan.token(",")?;
        }
    }

    /// The name behind a call's parameters, and where it ends.
    fn late_name(&self, from: usize) -> Result<(String, usize), Miss> {
        let mut scan = Scan { text: &self.held, at: from };
        loop {
            scan.token(",")?;
            if let Field::Name(name) = self.field(&mut scan, &["type", "name"])? {
                return Ok((name, scan.at));
            }
        }
    }

    /// One field of a call; of its parameters the name alone.
    fn field(&self, scan: &mut Scan, keys: &[&str]) -> Result<Field, Miss> {
        scan.token("\"")?;
        let key = scan.word(keys.iter().copied(), '"')?;
        scan.token(":")?;
        match key {
            "type" => scan.token("\"function\"").map(|()| Field::Type),
            "name" => {
                scan.token("\"")?;
                scan.word(self.names.iter().map(String::as_str), '"').map(|name| Field::Name(name.to_owned()))
            }
            _ if scan.next_is('{')? => Ok(Field::Parameters),
            _ => Err(Miss::Never),
        }
    }

    /// What follows a call of Python's, and where it ends: the header of another one, or None for the list's end.
    fn next_call(&self) -> Result<(Option<String>, usize), Miss> {
        let mut scan = Scan { text: &self.held, at: 0 };
        if !scan.next_is(']')? {
            scan.token(",")?;
        }
        // A comma may stand behind the last one.
        if scan.next_is(']')? {
            scan.token("]")?;
            return Ok((None, scan.at));
        }
        let name = scan.word(self.names.iter().map(String::as_str), '(')?;
        Ok((Some(name.to_owned()), scan.at))
    }

    /// Goes on behind a header of Python's, or, without a name, behind the list.
    fn called(&mut self, name: Option<String>, behind: usize, pieces: &mut Vec<Piece>) {
        self.held.drain(..behind);
        self.read = 0;
        self.form = match name {
            None => Form::Open,
            Some(name) => {
                self.begin(name, pieces);
                Form::Argument(false, Nesting::default())
            }
        };
    }

    /// Gives an argument of Python's when all of it has come.
    fn argument(&mut self, is_later: bool, mut nesting: Nesting, pieces: &mut Vec<Piece>) -> Option<()> {
        let read = std::mem::replace(&mut self.read, self.held.len());
        let Some(end) = nesting.argument_end(&self.held[read..]) else {
            self.form = Form::Argument(is_later, nesting);
            return None;
        };
        let rest = self.held.split_off(read + end + 1);
        let text = std::mem::replace(&mut self.held, rest);
        self.read = 0;
        let (argument, closes) = (text[..read + end].trim(), text.ends_with(')'));
        let mut json = String::from(if is_later { "" } else { "{" });
        // A comma may stand behind the last one.
        if !argument.is_empty() || !closes {
            json += if is_later { "," } else { "" };
            // What is no argument is given as it is: who reads the JSON sees that it is none.
            json += &pythonic::argument(argument).unwrap_or_else(|| argument.to_owned());
        }
        json += if closes { "}" } else { "" };
        self.arguments(json, pieces);
        self.form = if closes { Form::Called } else { Form::Argument(true, Nesting::default()) };
        Some(())
    }

    /// Counts a call, and gives its beginning unless there are enough.
    fn begin(&mut self, name: String, pieces: &mut Vec<Piece>) {
        self.count += 1;
        if self.count <= self.most {
            pieces.push(Piece::Call { index: self.count - 1, id: random_id("call_"), name });
        }
    }

    /// Gives arguments of the last call, unless there are enough.
    fn arguments(&self, text: String, pieces: &mut Vec<Piece>) {
        if self.count <= self.most && !text.is_empty() {
            pieces.push(Piece::Arguments { index: self.count - 1, text });
        }
    }
}

/// A field of a call.
enum Field {
    Type,
    Name(String),
    Parameters,
}

/// What stands between calls.
fn is_between(c: char) -> bool {
    c.is_whitespace() || matches!(c, ';' | ',')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn calls(most: usize) -> ToolCalls {
        ToolCalls::new(["weather", "time"].map(String::from).to_vec(), most)
    }

    /// Text, and calls with their arguments, whatever the pieces.
    fn whole(mut calls: ToolCalls, texts: &[&str]) -> (String, Vec<(String, String)>) {
        let mut pieces: Vec<Piece> = texts.iter().flat_map(|text| calls.push(text)).collect();
        pieces.extend(calls.finish());
        let (mut content, mut made) = (String::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Text(text) => content += &text,
                Piece::Call { index, name, .. } => {
                    assert_eq!(index, made.len());
                    made.push((name, String::new()));
                }
                Piece::Arguments { index, text } => made[index].1 += &text,
            }
        }
        assert_eq!(calls.count(), made.len());
        (content, made)
    }

    /// An answer, its text, and the names and arguments of its calls.
    type Case = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

    const CASES: [Case; 24] = [
        ("Hello {you}", "Hello {you}", &[]),
        (
            r#"{"name": "weather", "parameters": {"city": "Paris }\" {", "days": [1, {"a": 2}]}}"#,
            "",
            &[("weather", r#"{"city": "Paris }\" {", "days": [1, {"a": 2}]}"#)],
        ),
        (
            r#"{"type": "function", "name": "weather", "parameters": {}}; {"name": "time", "arguments": {"zone": "é"}}"#,
            "",
            &[("weather", "{}"), ("time", r#"{"zone": "é"}"#)],
        ),
        (r#"{"answer": 42}"#, r#"{"answer": 42}"#, &[]),
        (r#"{"name": "Ann", "parameters": {}}"#, r#"{"name": "Ann", "parameters": {}}"#, &[]),
        (
            r#"[weather(city='Paris', days=[1, 2.5], deep={'a': None}), time()]"#,
            "",
            &[("weather", r#"{"city":"Paris","days":[1,2.5],"deep":{"a":null}}"#), ("time", "{}")],
        ),
        ("[1] is a footnote", "[1] is a footnote", &[]),
        ("[other(a=1)]", "[other(a=1)]", &[]),
        ("[weatherman(a=1)]", "[weatherman(a=1)]", &[]),
        // The second call's name is none of the functions'.
        (
            r#"{"name": "time", "parameters": {}}; {"name": "rm", "parameters": {}}"#,
            r#"; {"name": "rm", "parameters": {}}"#,
            &[("time", "{}")],
        ),
        ("[time(), rm(a=1)]", ", rm(a=1)]", &[("time", "{}")]),
        // Text behind a call.
        (r#"{"name": "time", "parameters": {}} Let me see."#, " Let me see.", &[("time", "{}")]),
        ("[time()]\nLet me see.", "\nLet me see.", &[("time", "{}")]),
        (r#"{"name": "time", "parameters": {}}; "#, "", &[("time", "{}")]),
        // Parameters before the name, and a name that never comes.
        (
            r#"{"type": "function", "parameters": {"zone": "}"}, "name": "time"}; {"arguments": {}, "name": "weather"}"#,
            "",
            &[("time", r#"{"zone": "}"}"#), ("weather", "{}")],
        ),
        (r#"{"parameters": {"a": 1}, "b": 2}"#, r#"{"parameters": {"a": 1}, "b": 2}"#, &[]),
        (r#"{"parameters": {"a": 1}}"#, r#"{"parameters": {"a": 1}}"#, &[]),
        // A JSON list, fields behind the parameters, and a brace that is missing.
        (
            r#"[{"name": "time", "parameters": {}}, {"name": "weather", "parameters": {"a": [1]}}] Done."#,
            " Done.",
            &[("time", "{}"), ("weather", r#"{"a": [1]}"#)],
        ),
        (
            r#"{"name": "time", "parameters": {}, "type": "function", "x": "}"}; {"name": "weather", "parameters": {}"#,
            "",
            &[("time", "{}"), ("weather", "{}")],
        ),
        (
            r#"{"name": "time", "parameters": {"a": 1}; {"name": "time", "parameters": {}}"#,
            "",
            &[("time", r#"{"a": 1}"#), ("time", "{}")],
        ),
        // Commas and parentheses in strings and lists, and commas behind the last of all.
        (
            r#"[ weather(city='a, b) \'c', at=(1, [2, "x)"],),), time(), ]"#,
            "",
            &[("weather", r#"{"city":"a, b) 'c","at":[1,[2,"x)"]]}"#), ("time", "{}")],
        ),
        // An argument that is none makes no JSON.
        ("[weather(city='Paris', rain)]", "", &[("weather", r#"{"city":"Paris",rain}"#)]),
        ("[weather(city='Paris', day", "", &[("weather", r#"{"city":"Paris""#)]),
        (r#"{"name": "weather", "parameters": {"city": "Pa"#, "", &[("weather", r#"{"city": "Pa"#)]),
    ];

    #[test]
    fn calls_are_found_in_all_forms_and_what_is_none_stays_text() {
        for (answer, text, made) in CASES {
            let made: Vec<_> = made.iter().map(|(name, arguments)| (name.to_string(), arguments.to_string())).collect();
            assert_eq!(whole(calls(9), &[answer]), (text.to_string(), made), "{answer}");
        }
    }

    #[test]
    fn arguments_are_given_out_while_they_come() {
        let mut calls = calls(9);
        let begun = calls.push(r#"{"name": "weather", "parameters": {"ci"#);
        assert!(matches!(&begun[..], [Piece::Call { name, .. }, Piece::Arguments { text, .. }]
            if name == "weather" && text == r#"{"ci"#));
        assert_eq!(calls.push("ty\""), [Piece::Arguments { index: 0, text: "ty\"".into() }]);
    }

    #[test]
    fn arguments_of_python_are_given_out_one_by_one() {
        let mut calls = calls(9);
        let begun = calls.push("[weather(");
        assert!(matches!(&begun[..], [Piece::Call { name, .. }] if name == "weather"));
        assert_eq!(calls.push("city='Par"), []);
        assert_eq!(calls.push("is', "), [Piece::Arguments { index: 0, text: r#"{"city":"Paris""#.into() }]);
        assert_eq!(calls.push("day=3)"), [Piece::Arguments { index: 0, text: r#","day":3}"#.into() }]);
        assert!(matches!(&calls.push(", time(")[..], [Piece::Call { index: 1, name, .. }] if name == "time"));
    }

    #[test]
    fn what_begins_like_a_call_is_text_as_soon_as_it_can_be_none() {
        for (held, told) in [
            ("{\"na", "{\"nav"),
            ("{ \"name\": \"wea", "{ \"name\": \"weak"),
            ("[ti", "[tin"),
            ("[", "[1"),
            ("{", "{1"),
        ] {
            let mut calls = calls(9);
            assert_eq!(calls.push(held), [], "{held}");
            assert_eq!(calls.push(&told[held.len()..]), [Piece::Text(told.into())], "{told}");
        }
    }

    #[test]
    fn one_call_where_no_more_are_wanted() {
        let two = CASES[2].0;
        assert_eq!(whole(calls(1), &[two]).1, [("weather".to_string(), "{}".to_string())]);
        assert_eq!(whole(calls(1), &["[time(), time()]"]).1.len(), 1);
    }

    proptest! {
        #[test]
        fn where_an_answer_is_cut_changes_nothing(case in 0usize..CASES.len(), cuts in prop::collection::vec(0usize..110, 0..6)) {
            let answer = CASES[case].0;
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| answer.is_char_boundary(*cut)).collect();
            cuts.extend([0, answer.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|pair| &answer[pair[0]..pair[1]]).collect();
            prop_assert_eq!(whole(calls(9), &pieces), whole(calls(9), &[answer]));
        }

        #[test]
        fn no_text_panics(text in r#"[\[\]{}(),;:="'a-c0-9\\. é]{0,60}"#) {
            whole(calls(9), &[&text]);
        }
    }
}
