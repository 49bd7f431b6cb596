//! Tool calling in the forms of Llama 3.2: `{"name": "f", "parameters": {..}}`, several of them separated by semicolons,
//! or Python's `[f(a=1), g(b="x")]`. An answer that begins like a call is held back until it is clear whether it is one.

use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::app::random_id;
use super::error::{ApiError, ApiResult};
use super::pythonic;
use super::structure::Grammar;

/// Functions of a request, at most.
const MAX_TOOLS: usize = 128;

/// The fields of a request that speak of tools.
#[derive(Debug, Default, Deserialize)]
pub struct Tools {
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
}

/// Tools that were checked.
pub struct Checked {
    /// Name and schema of the parameters.
    functions: Vec<(String, Value)>,
    choice: Choice,
    /// Calls of an answer, at most.
    most: usize,
}

#[derive(Debug, PartialEq)]
enum Choice {
    None,
    Auto,
    Required,
    Named(String),
}

impl Tools {
    fn choice(&self) -> ApiResult<Choice> {
        let wrong = || ApiError::invalid("tool_choice", "tool_choice must be none, auto, required, or name a function");
        match &self.tool_choice {
            None | Some(Value::Null) if self.tools.as_ref().is_none_or(Vec::is_empty) => Ok(Choice::None),
            None | Some(Value::Null) => Ok(Choice::Auto),
            Some(Value::String(choice)) => match choice.as_str() {
                "none" => Ok(Choice::None),
                "auto" => Ok(Choice::Auto),
                "required" => Ok(Choice::Required),
                _ => Err(wrong()),
            },
            Some(object) => {
                let name = object.pointer("/function/name").or_else(|| object.get("name")).and_then(Value::as_str);
                name.map(|name| Choice::Named(name.to_owned())).ok_or_else(wrong)
            }
        }
    }

    /// What the chat template is given.
    pub fn for_template(&self) -> ApiResult<Option<Value>> {
        let tools = self.tools.as_ref().filter(|tools| !tools.is_empty());
        Ok(tools.filter(|_| self.choice().is_ok_and(|choice| choice != Choice::None)).cloned().map(Value::Array))
    }

    /// Checks them.
    pub fn check(&self) -> ApiResult<Checked> {
        let tools = self.tools.as_deref().unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            return Err(ApiError::invalid(
                "tools",
                format!("{} tools are given, at most {MAX_TOOLS} may be", tools.len()),
            ));
        }
        let function = |(i, tool): (usize, &Value)| match tool.pointer("/function/name").and_then(Value::as_str) {
            Some(name) if tool["type"].as_str().is_none_or(|kind| kind == "function") => {
                let parameters = &tool["function"]["parameters"];
                let any = json!({"type": "object"});
                Ok((name.to_owned(), if parameters.is_object() { parameters.clone() } else { any }))
            }
            _ => Err(ApiError::invalid("tools", format!("tools[{i}] must be a function with a name"))),
        };
        let functions = tools.iter().enumerate().map(function).collect::<ApiResult<Vec<_>>>()?;
        let choice = self.choice()?;
        let is_known = |name: &String| functions.iter().any(|(have, _)| have == name);
        match &choice {
            Choice::Named(name) if !is_known(name) => {
                return Err(ApiError::invalid(
                    "tool_choice",
                    format!("tool_choice names {name}, which is none of the tools"),
                ));
            }
            Choice::Required if functions.is_empty() => {
                return Err(ApiError::invalid("tool_choice", "tool_choice is required, but there are no tools"));
            }
            _ => {}
        }
        let most = if self.parallel_tool_calls == Some(false) { 1 } else { MAX_TOOLS };
        Ok(Checked { functions, choice, most })
    }
}

impl Checked {
    /// The grammar of an answer that must be a call.
    pub fn grammar(&self) -> Option<Grammar> {
        let call = |(name, parameters): &(String, Value)| {
            json!({
                "type": "object", "properties": {"name": {"const": name}, "parameters": parameters},
                "required": ["name", "parameters"], "additionalProperties": false
            })
        };
        match &self.choice {
            Choice::None | Choice::Auto => None,
            Choice::Named(name) => self.functions.iter().find(|(have, _)| have == name).map(call).map(Grammar::Schema),
            Choice::Required => {
                let calls: Value = self.functions.iter().map(call).collect();
                Some(Grammar::Schema(json!({"anyOf": calls})))
            }
        }
    }

    /// What finds the calls in one answer.
    pub fn calls(&self) -> ToolCalls {
        let names: Vec<String> = match self.choice {
            Choice::None => Vec::new(),
            _ => self.functions.iter().map(|(name, _)| name.clone()).collect(),
        };
        let form = if names.is_empty() { Form::Text } else { Form::Unknown };
        ToolCalls { names, most: self.most, form, held: String::new(), count: 0 }
    }
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Text for the user.
    Text(String),
    /// A call begins.
    Call {
        /// Its number.
        index: usize,
        /// Its own name.
        id: String,
        /// The function's.
        name: String,
    },
    /// More of a call's arguments, as JSON's text.
    Arguments {
        /// The call's number.
        index: usize,
        /// What follows.
        text: String,
    },
}

impl Piece {
    /// The delta of a chunk.
    pub fn json(self) -> Value {
        match self {
            Piece::Text(text) => json!({"content": text}),
            Piece::Call { index, id, name } => {
                let function = json!({"name": name, "arguments": ""});
                json!({"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]})
            }
            Piece::Arguments { index, text } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            }
        }
    }
}

/// Finds calls in an answer while it comes.
pub struct ToolCalls {
    /// The functions that may be called.
    names: Vec<String>,
    most: usize,
    form: Form,
    /// Text that is not decided about.
    held: String,
    count: usize,
}

/// What an answer has turned out to be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Nothing but spaces so far.
    Unknown,
    Text,
    /// Between calls of JSON.
    Json,
    /// In the parameters of one.
    Parameters(Nesting),
    Python,
}

/// A place in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Nesting {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Nesting {
    /// Bytes of `text` up to the end of the value; None where it does not end there.
    fn end(&mut self, text: &str) -> Option<usize> {
        for (i, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_string => self.is_escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(i + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// A call of JSON up to its parameters.
static HEADER: LazyLock<Regex> = LazyLock::new(|| {
    let header = r#"^[\s;,}]*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:parameters|arguments)"\s*:\s*\{"#;
    Regex::new(header).expect("the pattern is right")
});

impl ToolCalls {
    /// Calls that were found.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Takes more of the answer and gives what is certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        loop {
            match &mut self.form {
                Form::Unknown => match self.held.trim_start().chars().next() {
                    None => return pieces,
                    Some('{') => self.form = Form::Json,
                    Some('[') => self.form = Form::Python,
                    Some(_) => self.form = Form::Text,
                },
                Form::Text => {
                    if !self.held.is_empty() {
                        pieces.push(Piece::Text(std::mem::take(&mut self.held)));
                    }
                    return pieces;
                }
                Form::Json => {
                    let Some(header) = HEADER.captures(&self.held) else { return pieces };
                    let name = header[1].to_owned();
                    if self.count == 0 && !self.names.contains(&name) {
                        self.form = Form::Text;
                        continue;
                    }
                    // All but the brace that opens the parameters.
                    let end = header[0].len() - 1;
                    self.held.drain(..end);
                    pieces.extend(self.begin(name));
                    self.form = Form::Parameters(Nesting::default());
                }
                Form::Parameters(nesting) => {
                    let end = nesting.end(&self.held);
                    let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                    if self.count <= self.most && !text.is_empty() {
                        pieces.push(Piece::Arguments { index: self.count - 1, text });
                    }
                    if end.is_none() {
                        return pieces;
                    }
                    self.form = Form::Json;
                }
                Form::Python => return pieces,
            }
        }
    }

    /// Counts a call, and gives its beginning unless there are enough.
    fn begin(&mut self, name: String) -> Option<Piece> {
        self.count += 1;
        (self.count <= self.most).then(|| Piece::Call { index: self.count - 1, id: random_id("call_"), name })
    }

    /// Ends the answer: what was held back is calls, or text.
    pub fn finish(&mut self) -> Vec<Piece> {
        let held = std::mem::take(&mut self.held);
        let mut pieces = Vec::new();
        if self.form == Form::Python
            && let Some(calls) = pythonic::parse(held.trim())
            && calls.iter().all(|(name, _)| self.names.contains(name))
        {
            for (name, arguments) in calls {
                if let Some(call) = self.begin(name) {
                    pieces.push(call);
                    pieces.push(Piece::Arguments { index: self.count - 1, text: arguments.to_string() });
                }
            }
        } else if self.count == 0 && !held.is_empty() {
            pieces.push(Piece::Text(held));
        }
        self.count = self.count.min(self.most);
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn calls(most: usize) -> ToolCalls {
        let names = ["weather", "time"].map(String::from).to_vec();
        ToolCalls { names, most, form: Form::Unknown, held: String::new(), count: 0 }
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

    const CASES: [Case; 9] = [
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
    fn one_call_where_no_more_are_wanted() {
        let two = CASES[2].0;
        assert_eq!(whole(calls(1), &[two]).1, [("weather".to_string(), "{}".to_string())]);
        assert_eq!(whole(calls(1), &["[time(), time()]"]).1.len(), 1);
    }

    proptest! {
        #[test]
        fn where_an_answer_is_cut_changes_nothing(case in 0usize..CASES.len(), cuts in prop::collection::vec(0usize..90, 0..6)) {
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
