//! The lines of a task. A line is one of
//!
//! - `{"prompt", "choices": [..], "answer": 0}`: which continuation is likeliest: `acc`, and `acc_norm`, where likelihoods
//!   are divided by the lengths of the choices in characters (`multiple_choice`);
//! - `{"prompt", "choices": [..], "labels": [1, 0, ..]}`: the share of probability of the right ones: `mc2` (TruthfulQA);
//! - `{"contexts": [..], "continuation", "answer": 0}`: behind which context a continuation is likeliest (Winogrande);
//! - `{"prompt" or "messages", "answer": "..", "until": [..], "max_tokens", "extract", "take", "ignore", "ignore_case"}`:
//!   what is generated, greedily, and what `extract`'s first group finds in it, equals the answer: `exact_match`.
//!
//! Continuations and choices are joined to their contexts by `delimiter`, a space unless given. An answer to messages of
//! which the last is the assistant's goes on with that one.

use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use crate::text::StopStrings;
use crate::text_model::Prompt;

/// A line as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    prompt: Option<String>,
    messages: Option<Value>,
    choices: Option<Vec<String>>,
    contexts: Option<Vec<String>>,
    continuation: Option<String>,
    answer: Option<Value>,
    labels: Option<Vec<u8>>,
    delimiter: Option<String>,
    #[serde(default)]
    until: Vec<String>,
    max_tokens: Option<usize>,
    extract: Option<String>,
    take: Option<String>,
    #[serde(default)]
    ignore: Vec<String>,
    #[serde(default)]
    ignore_case: bool,
}

/// A line that can be scored.
pub enum Item {
    Choose(Choose),
    Generate(Generate),
}

pub struct Choose {
    /// Contexts and their continuations.
    pub pairs: Vec<(String, String)>,
    /// The choices' characters; none where contexts are chosen from, which share a continuation.
    pub lengths: Vec<usize>,
    pub truth: Truth,
}

pub enum Truth {
    Answer(usize),
    Labels(Vec<bool>),
}

pub struct Generate {
    pub prompt: Prompt,
    pub until: Vec<String>,
    pub max_tokens: usize,
    answer: String,
    extract: Option<Regex>,
    last: bool,
    ignore: Vec<Regex>,
    ignore_case: bool,
}

/// Tokens of a generated answer, where a line does not say: lm-evaluation-harness's `max_gen_toks`.
const MAX_TOKENS: usize = 256;

impl Line {
    /// What is to be done, or why the line says nothing that can be.
    pub fn item(self) -> Result<Item, String> {
        let delimiter = self.delimiter.unwrap_or_else(|| " ".into());
        let choose = |pairs: Vec<(String, String)>, lengths: Vec<usize>| {
            if pairs.len() < 2 {
                return Err("has fewer than two choices".to_owned());
            }
            let truth = match (&self.labels, &self.answer) {
                (Some(labels), _) if labels.len() == pairs.len() && labels.contains(&1) => {
                    Truth::Labels(labels.iter().map(|label| *label == 1).collect())
                }
                (Some(_), _) => return Err("`labels` must have a 0 or a 1 for each choice, and a 1 at all".to_owned()),
                (None, Some(answer)) => match answer.as_u64().filter(|n| (*n as usize) < pairs.len()) {
                    Some(n) => Truth::Answer(n as usize),
                    None => return Err(format!("`answer` must be the number of a choice from 0 on, found {answer}")),
                },
                (None, None) => return Err("has neither `answer` nor `labels`".to_owned()),
            };
            Ok(Item::Choose(Choose { pairs, lengths, truth }))
        };
        let length = |text: &String| text.chars().count().max(1);
        match (self.prompt, self.messages, self.choices, self.contexts, self.continuation) {
            (Some(prompt), None, Some(choices), None, None) => {
                let lengths = choices.iter().map(length).collect();
                choose(choices.iter().map(|choice| (prompt.clone(), format!("{delimiter}{choice}"))).collect(), lengths)
            }
            (None, None, None, Some(contexts), Some(continuation)) => {
                let pair = |context| (context, format!("{delimiter}{continuation}"));
                choose(contexts.into_iter().map(pair).collect(), Vec::new())
            }
            (prompt, messages, None, None, None) if prompt.is_some() != messages.is_some() => {
                let Some(answer) = self.answer.as_ref().and_then(Value::as_str) else {
                    return Err("`answer` must be the text of the right answer".into());
                };
                StopStrings::new(&self.until).map_err(|e| format!("`until`: {e}"))?;
                let compile = |pattern: &String| Regex::new(pattern).map_err(|e| format!("pattern {pattern}: {e}"));
                Ok(Item::Generate(Generate {
                    prompt: messages
                        .map(Prompt::Messages)
                        .or(prompt.map(Prompt::Text))
                        .expect("one of the two is there"),
                    until: self.until,
                    max_tokens: self.max_tokens.unwrap_or(MAX_TOKENS),
                    answer: answer.to_owned(),
                    extract: self.extract.as_ref().map(compile).transpose()?,
                    last: match self.take.as_deref() {
                        None | Some("first") => false,
                        Some("last") => true,
                        Some(other) => return Err(format!("`take` must be first or last, found {other}")),
                    },
                    ignore: self.ignore.iter().map(compile).collect::<Result<_, _>>()?,
                    ignore_case: self.ignore_case,
                }))
            }
            (_, Some(_), Some(_), ..) => {
                Err("has choices behind messages; write the conversation as a `prompt`, as the template renders it"
                    .into())
            }
            _ => Err("must have prompt and choices, contexts and continuation, or prompt or messages alone".into()),
        }
    }
}

impl Generate {
    /// True where the text, or what is extracted from it, is the answer. As lm-evaluation-harness has it: of the first or
    /// last match the first group that is not empty, without spaces around it; a text that nothing is extracted from is
    /// compared as it is.
    pub fn is_met(&self, text: &str) -> bool {
        let found = match &self.extract {
            None => Some(text),
            Some(pattern) => {
                let mut all = pattern.captures_iter(text);
                let groups = if self.last { all.last() } else { all.next() };
                groups.and_then(|groups| {
                    let own = groups.iter().skip(usize::from(groups.len() > 1)).flatten();
                    own.map(|group| group.as_str()).find(|text| !text.is_empty()).map(str::trim)
                })
            }
        };
        let Some(found) = found else { return false };
        self.plain(found) == self.plain(&self.answer)
    }

    /// Without what is ignored.
    fn plain(&self, text: &str) -> String {
        let text =
            self.ignore.iter().fold(text.to_owned(), |text, pattern| pattern.replace_all(&text, "").into_owned());
        if self.ignore_case { text.to_lowercase() } else { text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generate(extract: Option<&str>, last: bool, answer: &str) -> Generate {
        let extract = extract.map(|pattern| Regex::new(pattern).unwrap());
        let (prompt, until) = (Prompt::Text(String::new()), Vec::new());
        let (answer, ignore) = (answer.to_owned(), Vec::new());
        Generate { prompt, until, answer, extract, last, ignore, ignore_case: false, max_tokens: 1 }
    }

    #[test]
    fn an_answer_is_met_as_the_harness_compares_it() {
        for (extract, last, text, answer, is_met) in [
            (None, false, " of", "of", false),
            (None, false, " of", " of", true),
            (Some("[a-z ]+"), false, " of ", "of", true),
            (Some("a(x)|b(y)"), false, "by", "y", true),
            (Some("(x*)y"), false, "y", "", false),
            (Some("([0-9]+)"), true, "1 2 3", "3", true),
            (Some("([0-9]+)"), false, "1 2 3", "3", false),
        ] {
            assert_eq!(generate(extract, last, answer).is_met(text), is_met, "{extract:?} of {text:?}: {answer:?}");
        }
    }
}
