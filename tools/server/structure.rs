//! Structured output: what a request says of the form of its answer, as a grammar over the model's tokens. llguidance
//! (<https://github.com/guidance-ai/llguidance>) compiles it and says which tokens may come next.

use std::ops::ControlFlow;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use quaver_core::guide::Guide;
use quaver_core::sampler::Mask;
use quaver_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::gbnf;
use super::model::Model;

/// Bytes of a form, whatever its kind, and texts of a choice, at most: compiling takes time and memory with them.
const MAX_FORM_BYTES: usize = 1 << 20;
const MAX_CHOICES: usize = 10_000;

/// The fields that speak of it: OpenAI's, vLLM's, and vLLM's older ones.
#[derive(Debug, Default, Deserialize)]
pub struct Structure {
    response_format: Option<Value>,
    structured_outputs: Option<Fields>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
    guided_whitespace_pattern: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Fields {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    structural_tag: Option<Value>,
    whitespace_pattern: Option<String>,
}

/// The form of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON of a schema.
    Schema(Value),
    /// What a regular expression matches as a whole.
    Regex(String),
    /// One of some texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation.
    Lark(String),
    /// Calls of functions, in JSON of one of some schemas, from one on.
    Calls {
        /// The schema of each function's call.
        calls: Vec<Value>,
        /// Calls of an answer, at most.
        most: usize,
    },
}

impl Structure {
    /// The one form that the request asks for.
    pub fn grammar(&self) -> ApiResult<Option<Grammar>> {
        let none = Fields::default();
        let fields = self.structured_outputs.as_ref().unwrap_or(&none);
        if fields.structural_tag.is_some() {
            let why = "structural_tag is not supported; use json, regex, choice or grammar";
            return Err(ApiError::invalid("structured_outputs", why));
        }
        let schema = |value: &Value| match value {
            // A schema may be given as the text of its JSON.
            Value::String(text) => serde_json::from_str(text)
                .map_err(|e| ApiError::invalid("structured_outputs", format!("the JSON schema is no JSON: {e}"))),
            value => Ok(value.clone()),
        };
        let mut found = Vec::new();
        found.extend(self.response_format.as_ref().map(response_format).transpose()?.flatten());
        for value in [&fields.json, &self.guided_json].into_iter().flatten() {
            found.push(Grammar::Schema(schema(value)?));
        }
        if fields.json_object == Some(true) {
            found.push(Grammar::Schema(json!({"type": "object"})));
        }
        found.extend([&fields.regex, &self.guided_regex].into_iter().flatten().cloned().map(Grammar::Regex));
        found.extend([&fields.choice, &self.guided_choice].into_iter().flatten().cloned().map(Grammar::Choice));
        for grammar in [&fields.grammar, &self.guided_grammar].into_iter().flatten() {
            let wrong = |why| ApiError::invalid("structured_outputs", format!("the grammar cannot be used: {why}"));
            let lark = if gbnf::is_one(grammar) { gbnf::to_lark(grammar).map_err(wrong)? } else { grammar.clone() };
            found.push(Grammar::Lark(lark));
        }
        if found.len() > 1 {
            let why = "several forms of the answer are asked for; give one";
            return Err(ApiError::invalid("structured_outputs", why));
        }
        let mut grammar = found.pop();
        grammar.iter().try_for_each(Grammar::check_size)?;
        let spaces = fields.whitespace_pattern.as_ref().or(self.guided_whitespace_pattern.as_ref());
        if let (Some(Grammar::Schema(Value::Object(schema))), Some(spaces)) = (&mut grammar, spaces) {
            schema.insert("x-guidance".into(), json!({"whitespace_pattern": spaces, "coerce_one_of": true}));
        }
        Ok(grammar)
    }
}

/// `response_format`: text, json_object or json_schema.
pub fn response_format(format: &Value) -> ApiResult<Option<Grammar>> {
    match format["type"].as_str() {
        _ if format.is_null() => Ok(None),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::Schema(json!({"type": "object"})))),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            Value::Null => Err(ApiError::invalid("response_format", "json_schema has no schema; give one")),
            schema => Ok(Some(Grammar::Schema(schema.clone()))),
        },
        Some("structural_tag") => {
            Err(ApiError::invalid("response_format", "structural_tag is not supported; use json_schema"))
        }
        _ => Err(ApiError::invalid("response_format", "the type must be text, json_object or json_schema")),
    }
}

impl Grammar {
    /// Refuses what is too large to be compiled.
    fn check_size(&self) -> ApiResult<()> {
        let bytes = match self {
            Grammar::Schema(schema) => schema.to_string().len(),
            Grammar::Regex(text) | Grammar::Lark(text) => text.len(),
            Grammar::Choice(choices) if choices.len() > MAX_CHOICES => {
                let why = format!("{} choices are given, at most {MAX_CHOICES} may be", choices.len());
                return Err(ApiError::invalid("structured_outputs", why));
            }
            Grammar::Choice(choices) => choices.iter().map(String::len).sum(),
            Grammar::Calls { calls, .. } => calls.iter().map(|schema| schema.to_string().len()).sum(),
        };
        if bytes > MAX_FORM_BYTES {
            let why = format!("the form of the answer has {bytes} bytes, at most {MAX_FORM_BYTES} may be");
            return Err(ApiError::invalid("structured_outputs", why));
        }
        Ok(())
    }

    fn compile(&self) -> Result<TopLevelGrammar> {
        match self {
            Grammar::Schema(schema) => Ok(TopLevelGrammar::from_json_schema(plain(schema))),
            Grammar::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
            Grammar::Choice(choices) if choices.is_empty() => Err(refused("choice has no texts; give at least one")),
            Grammar::Choice(choices) => {
                // One token, not one for each: a parser has no room for thousands of these side by side.
                let literals: Vec<String> =
                    choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}", literals.join(" | "))))
            }
            Grammar::Lark(grammar) => Ok(TopLevelGrammar::from_lark(grammar.clone())),
            Grammar::Calls { calls, most } => {
                let calls: Vec<String> = calls.iter().map(|call| format!("%json {}", plain(call))).collect();
                let more = match most {
                    0 | 1 => String::new(),
                    most => format!(" (\"; \" call){{0,{}}}", most - 1),
                };
                Ok(TopLevelGrammar::from_lark(format!("start: call{more}\ncall: {}", calls.join(" | "))))
            }
        }
    }
}

/// A schema whose JSON is written in one way, unless it says how itself: a small model would go on with spaces for ever.
fn plain(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert_with(|| {
            json!({
                "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": true
            })
        });
    }
    schema
}

fn refused(why: impl std::fmt::Display) -> Error {
    Error::text("structured output", crate::text::one_line(why))
}

/// Makes the guides of a request: one an answer.
pub struct Guides {
    matcher: Option<Matcher>,
    eos: Vec<u32>,
}

impl Guides {
    /// A guide for one answer; None where the request has no grammar.
    pub fn guide(&self) -> Result<Option<Box<dyn Guide>>> {
        let Some(matcher) = &self.matcher else { return Ok(None) };
        Ok(Some(Box::new(Follower { matcher: matcher.deep_clone(), eos: self.eos.clone() })))
    }
}

impl Model {
    /// Compiles a grammar. Slow where it is large.
    ///
    /// # Errors
    /// Where it cannot be compiled, or the model has no tokenizer.
    pub fn guides(&self, grammar: Option<Grammar>) -> Result<Guides> {
        let eos = self.text.eos().to_vec();
        let Some(grammar) = grammar else { return Ok(Guides { matcher: None, eos }) };
        let parser = self.parsers()?.create_parser(grammar.compile()?).map_err(refused)?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(refused(error)),
            None => Ok(Guides { matcher: Some(matcher), eos }),
        }
    }
}

/// The vocabulary as llguidance wants it: built once, when the first grammar comes.
pub fn parser_factory(model: &Model) -> Result<ParserFactory> {
    let tokenizer = model.text.tokenizer()?;
    let vocab = model.service.limits().vocab as u32;
    // 0xff marks what is no text: a special token never comes of a grammar.
    let words: Vec<Vec<u8>> = (0..vocab)
        .map(|id| match tokenizer.is_special(id) {
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &tokenizer.token_bytes(id)[..]].concat(),
            false => tokenizer.token_bytes(id),
        })
        .collect();
    let eos = model.text.eos().first().copied().unwrap_or(vocab.saturating_sub(1));
    let trie = TokTrie::from(&TokRxInfo::new(vocab, eos), &words);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    ParserFactory::new_simple(&env).map_err(refused)
}

/// A grammar that an answer follows.
struct Follower {
    matcher: Matcher,
    eos: Vec<u32>,
}

impl Guide for Follower {
    fn mask(&mut self, mask: &mut Mask) -> Result<()> {
        let mut allowed = self.matcher.compute_mask().map_err(refused)?;
        let may_end = self.matcher.is_accepting().map_err(refused)?;
        let vocab = allowed.len();
        for id in self.eos.iter().map(|id| *id as usize).filter(|id| *id < vocab) {
            allowed.set(id, may_end);
        }
        mask.keep(allowed.as_slice());
        Ok(())
    }

    fn advance(&mut self, token: u32) -> Result<ControlFlow<()>> {
        self.matcher.consume_token(token).map_err(refused)?;
        Ok(if self.matcher.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a text that a request's grammar lets pass, and whether the answer may end behind them.
    fn passes(request: Value, text: &str) -> (usize, bool) {
        let structure: Structure = serde_json::from_value(request).unwrap();
        follow(&structure.grammar().unwrap().unwrap(), text)
    }

    fn follow(grammar: &Grammar, text: &str) -> (usize, bool) {
        let factory = ParserFactory::new_simple(&ApproximateTokEnv::single_byte_env()).unwrap();
        let mut matcher = Matcher::new(factory.create_parser(grammar.compile().unwrap()));
        for (count, byte) in text.bytes().enumerate() {
            if !matcher.compute_mask().unwrap().is_allowed(u32::from(byte)) {
                return (count, matcher.is_accepting().unwrap());
            }
            matcher.consume_token(u32::from(byte)).unwrap();
            if matcher.is_stopped() {
                return (count + 1, true);
            }
        }
        (text.len(), matcher.is_accepting().unwrap())
    }

    #[test]
    fn grammars_of_llama_cpp_and_larks_are_followed() {
        let sums = "root ::= sum\nsum ::= term (\" \"* [+*] \" \"* term)*\nterm ::= [0-9]+ | \"(\" sum \")\"";
        for grammar in [sums, "start: sum\nsum: term (/ *[+*] */ term)*\nterm: /[0-9]+/ | \"(\" sum \")\""] {
            assert_eq!(passes(json!({"guided_grammar": grammar}), "(1 + 23) *(4)"), (13, true), "{grammar}");
            assert_eq!(passes(json!({"structured_outputs": {"grammar": grammar}}), "(1 + )"), (5, false), "{grammar}");
        }
        let structure: Structure = serde_json::from_value(json!({"guided_grammar": "root ::= nothing"})).unwrap();
        assert!(structure.grammar().is_err());
    }

    #[test]
    fn thousands_of_choices_are_one_token() {
        let choices: Vec<String> = (0..6000).map(|i| format!("the choice {i}")).collect();
        let request = json!({"guided_choice": choices});
        assert_eq!(passes(request.clone(), "the choice 5999"), (15, true));
        assert_eq!(passes(request, "the choice 6000"), (14, true));
    }

    #[test]
    fn spaces_are_those_that_are_asked_for() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        let wide = "{ \"a\": 1 }";
        assert_eq!(passes(json!({"guided_json": schema}), wide).0, 1);
        for request in [
            json!({"guided_json": schema, "guided_whitespace_pattern": " ?"}),
            json!({"structured_outputs": {"json": schema, "whitespace_pattern": " ?"}}),
        ] {
            assert_eq!(passes(request, wide), (wide.len(), true));
        }
    }

    #[test]
    fn several_calls_are_written_where_they_may_be_and_references_are_from_their_roots() {
        let call = |name: &str| {
            json!({"type": "object", "properties": {"name": {"const": name}, "parameters": {"$ref": "#/$defs/P"}},
                "required": ["name", "parameters"], "additionalProperties": false,
                "$defs": {"P": {"type": "object", "properties": {}, "additionalProperties": false}}})
        };
        let two = r#"{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}"#;
        let follow = |most| follow(&Grammar::Calls { calls: vec![call("f"), call("g")], most }, two);
        assert_eq!(follow(128), (two.len(), true));
        assert_eq!(follow(1), (two.find(';').unwrap(), true));
    }
}
