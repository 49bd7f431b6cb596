//! Tasks in local JSON lines, scored as lm-evaluation-harness scores them. A line is one of
//!
//! - `{"prompt", "choices": [..], "answer": 0}`: which continuation is likeliest: `acc`, and `acc_norm`, where likelihoods
//!   are divided by the lengths of the choices in characters (`multiple_choice`);
//! - `{"prompt", "choices": [..], "labels": [1, 0, ..]}`: the share of probability of the right ones: `mc2` (TruthfulQA);
//! - `{"contexts": [..], "continuation", "answer": 0}`: behind which context a continuation is likeliest (Winogrande);
//! - `{"prompt" or "messages", "answer": "..", "until": [..], "max_tokens", "extract", "take", "ignore", "ignore_case"}`:
//!   what is generated, greedily, and what `extract`'s first group finds in it, equals the answer: `exact_match`.
//!
//! Continuations and choices are joined to their contexts by `delimiter`, a space unless given.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use quaver_core::checkpoint::Checkpoint;
use quaver_core::evaluate::{Likelihood, Window, likelihoods};
use quaver_core::sampler::SamplingParams;
use quaver_core::{Error, Result};
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::Model;
use crate::llm::{Llm, LlmOptions, Progress, Request};
use crate::samples::{Encoder, lines};
use crate::text_model::Prompt;

/// A measure of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// The share of lines whose likeliest choice is the answer.
    Acc,
    /// The same, likelihoods divided by the choices' characters.
    AccNorm,
    /// The share of probability that right choices have.
    Mc2,
    /// The share of lines whose generated answer is the answer.
    ExactMatch,
}

impl Metric {
    /// All of them.
    pub const ALL: [Metric; 4] = [Metric::Acc, Metric::AccNorm, Metric::Mc2, Metric::ExactMatch];

    /// lm-evaluation-harness's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::Mc2 => "mc2",
            Metric::ExactMatch => "exact_match",
        }
    }
}

/// A line as it is written.
#[derive(Deserialize)]
struct Line {
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
enum Item {
    Choose(Choose),
    Generate(Generate),
}

struct Choose {
    /// Contexts and their continuations.
    pairs: Vec<(String, String)>,
    /// The choices' characters; none where contexts are chosen from, which share a continuation.
    lengths: Vec<usize>,
    truth: Truth,
}

enum Truth {
    Answer(usize),
    Labels(Vec<bool>),
}

struct Generate {
    prompt: Prompt,
    until: Vec<String>,
    max_tokens: usize,
    answer: String,
    extract: Option<Regex>,
    last: bool,
    ignore: Vec<Regex>,
    ignore_case: bool,
}

/// The lines of a file.
pub struct Task {
    /// The file's name without its ending.
    pub name: String,
    items: Vec<Item>,
}

/// A mean over lines, and the standard error of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// From 0 to 1.
    pub value: f64,
    /// The sample's standard deviation over the root of the lines; 0 for a single line.
    pub stderr: f64,
}

/// What a model scored.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskReport {
    /// The task's name.
    pub name: String,
    /// Lines.
    pub lines: usize,
    /// By metric.
    pub scores: BTreeMap<Metric, Score>,
}

/// Tokens of a generated answer, where a line does not say: lm-evaluation-harness's `max_gen_toks`.
const MAX_TOKENS: usize = 256;

impl Task {
    /// Reads a file, at most `limit` lines of it.
    pub fn read(path: &Path, limit: usize) -> Result<Self> {
        let mut items = Vec::new();
        for (i, line) in lines(path)?.enumerate() {
            let text = line?;
            if text.trim().is_empty() {
                continue;
            }
            if items.len() == limit {
                break;
            }
            let fail = |why: String| Error::text(path.display().to_string(), format!("line {}: {why}", i + 1));
            let line: Line = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
            items.push(line.item().map_err(fail)?);
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        match items.is_empty() {
            true => Err(Error::text(path.display().to_string(), "has no line; give a JSON object a line")),
            false => Ok(Task { name, items }),
        }
    }

    /// Lines that are scored.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// False: a task has a line at least.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Runs a model over the task. `on_line` is called behind each line.
    pub fn run(&self, model: Option<&str>, options: &LlmOptions, mut on_line: impl FnMut()) -> Result<TaskReport> {
        let mut values: BTreeMap<Metric, Vec<f64>> = BTreeMap::new();
        let mut add = |metric: Metric, value: f64| values.entry(metric).or_default().push(value);
        self.choose(model, options, &mut add, &mut on_line)?;
        self.generate(model, options, &mut add, &mut on_line)?;
        let scores = values.into_iter().map(|(metric, values)| (metric, Score::of(&values))).collect();
        Ok(TaskReport { name: self.name.clone(), lines: self.items.len(), scores })
    }

    /// All lines with choices, by their likelihoods.
    fn choose(
        &self,
        model: Option<&str>,
        options: &LlmOptions,
        add: &mut impl FnMut(Metric, f64),
        on_line: &mut impl FnMut(),
    ) -> Result<()> {
        let items: Vec<&Choose> = self.items.iter().filter_map(Item::choices).collect();
        if items.is_empty() {
            return Ok(());
        }
        let files = crate::files(model, options.offline)?;
        let encoder = Encoder::open(&Checkpoint::open(files.clone())?)?;
        let mut windows = Vec::new();
        for item in &items {
            for (context, continuation) in &item.pairs {
                windows.push(window(&encoder, context, continuation)?);
            }
        }
        let longest = windows.iter().map(|window: &Window| window.ids.len()).max().unwrap_or(0);
        let mut model = Model::open(files, options, longest)?;
        let add_up = |end: &mut usize, item: &&Choose| {
            *end += item.pairs.len();
            Some(*end)
        };
        let ends: Vec<usize> = items.iter().scan(0, add_up).collect();
        let mut done = 0;
        let mut scored = likelihoods(&mut model.scorer, &windows, |window| {
            while done < ends.len() && window >= ends[done] {
                done += 1;
                on_line();
            }
        })?
        .into_iter();
        (done..ends.len()).for_each(|_| on_line());
        for item in items {
            let scored: Vec<Likelihood> = scored.by_ref().take(item.pairs.len()).collect();
            judge(&scored, item, add);
        }
        Ok(())
    }

    /// All lines with answers to be generated, as one batch.
    fn generate(
        &self,
        model: Option<&str>,
        options: &LlmOptions,
        add: &mut impl FnMut(Metric, f64),
        on_line: &mut impl FnMut(),
    ) -> Result<()> {
        let items: Vec<&Generate> = self.items.iter().filter_map(Item::generated).collect();
        if items.is_empty() {
            return Ok(());
        }
        let mut llm = Llm::with_options(model, options)?;
        let request = |item: &&Generate| Request {
            prompt: item.prompt.clone(),
            params: SamplingParams { temperature: 0.0, max_tokens: item.max_tokens, ..SamplingParams::default() },
            stop: item.until.clone(),
        };
        let answers = llm.run(items.iter().map(request).collect(), |_, progress| {
            if progress == Progress::Done {
                on_line();
            }
            ControlFlow::Continue(())
        })?;
        for (item, answer) in items.into_iter().zip(answers) {
            add(Metric::ExactMatch, f64::from(u8::from(item.is_met(&answer.text))));
        }
        Ok(())
    }
}

impl Item {
    fn choices(&self) -> Option<&Choose> {
        match self {
            Item::Choose(choose) => Some(choose),
            Item::Generate(_) => None,
        }
    }

    fn generated(&self) -> Option<&Generate> {
        match self {
            Item::Choose(_) => None,
            Item::Generate(generate) => Some(generate),
        }
    }
}

impl Line {
    /// What is to be done, or why the line says nothing that can be.
    fn item(self) -> std::result::Result<Item, String> {
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
                    ignore: self.ignore.iter().map(compile).collect::<std::result::Result<_, _>>()?,
                    ignore_case: self.ignore_case,
                }))
            }
            _ => Err("must have prompt and choices, contexts and continuation, or prompt or messages alone".into()),
        }
    }
}

/// A continuation behind its context, tokenized together as lm-evaluation-harness does: spaces at the end of the context
/// belong to the continuation, and what the text has more tokens than the context alone is scored.
fn window(encoder: &Encoder, context: &str, continuation: &str) -> Result<Window> {
    let bare = context.trim_end();
    let whole = format!("{context}{continuation}");
    let before = if bare.is_empty() { encoder.bos.into_iter().collect() } else { encoder.text(bare)? };
    let ids = encoder.text(&whole)?;
    let from = before.len();
    if from == 0 || from >= ids.len() {
        let why = "has no token of its own behind the context; give a choice that has, or a tokenizer with a BOS token";
        return Err(Error::text(format!("the choice {continuation:?}"), why));
    }
    Ok(Window { ids, from })
}

/// The measures of one line.
fn judge(scored: &[Likelihood], item: &Choose, add: &mut impl FnMut(Metric, f64)) {
    match &item.truth {
        Truth::Answer(answer) => {
            let right = |value: &dyn Fn(usize) -> f64| {
                let better = |best: usize, i: usize| if value(i) > value(best) { i } else { best };
                f64::from(u8::from((0..scored.len()).fold(0, better) == *answer))
            };
            add(Metric::Acc, right(&|i| scored[i].log_likelihood));
            if !item.lengths.is_empty() {
                add(Metric::AccNorm, right(&|i| scored[i].log_likelihood / item.lengths[i] as f64));
            }
        }
        Truth::Labels(labels) => {
            // Relative to the likeliest, so that long answers, of next to no probability each, do not all become 0.
            let most = scored.iter().map(|scored| scored.log_likelihood).fold(f64::NEG_INFINITY, f64::max);
            let sum = |right: bool| -> f64 {
                let of = scored.iter().zip(labels).filter(|(_, label)| **label == right);
                of.map(|(scored, _)| (scored.log_likelihood - most).exp()).sum()
            };
            add(Metric::Mc2, sum(true) / (sum(true) + sum(false)));
        }
    }
}

impl Generate {
    /// True where the text, or what is extracted from it, is the answer. As lm-evaluation-harness has it: of the first or
    /// last match the first group that is not empty, without spaces around it; a text that nothing is extracted from is
    /// compared as it is.
    fn is_met(&self, text: &str) -> bool {
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

impl Score {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let value = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|x| (x - value).powi(2)).sum();
        let stderr = if values.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 };
        Score { value, stderr }
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

    #[test]
    fn answers_of_next_to_no_probability_have_their_share_of_it() {
        let scored = [-2000.0, -2001.0].map(|log_likelihood| Likelihood { log_likelihood });
        let item = Choose { pairs: Vec::new(), lengths: Vec::new(), truth: Truth::Labels(vec![true, false]) };
        let mut seen = Vec::new();
        judge(&scored, &item, &mut |_, value| seen.push(value));
        assert!((seen[0] - 1.0 / (1.0 + (-1f64).exp())).abs() < 1e-12, "{seen:?}");
    }
}
