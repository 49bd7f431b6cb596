//! Tasks in local JSON lines, scored as lm-evaluation-harness scores them: `acc`, and `acc_norm`, where likelihoods are
//! divided by the lengths of the choices in characters (`multiple_choice`); `mc2` (TruthfulQA); `exact_match`. A line that
//! a model cannot run is refused before any other is run.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};
use std::path::Path;

use quaver_core::checkpoint::Checkpoint;
use quaver_core::engine;
use quaver_core::evaluate::{Window, log_likelihoods};
use quaver_core::sampler::SamplingParams;
use quaver_core::{Error, Result};

use super::Model;
use super::task_lines::{Choose, Generate, Item, Line, Truth};
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

/// The lines of a file.
pub struct Task {
    /// The file's name without its ending.
    pub name: String,
    path: String,
    /// With their numbers in the file.
    items: Vec<(usize, Item)>,
}

/// A task in a model's tokens: every line of it can be run.
pub struct TokenizedTask {
    /// The task's name.
    pub name: String,
    questions: Vec<Question>,
    /// A context and a continuation each, of all questions.
    windows: Vec<Window>,
    answers: Vec<(Generate, Vec<u32>)>,
}

/// A line with choices.
struct Question {
    windows: Range<usize>,
    lengths: Vec<usize>,
    truth: Truth,
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

impl Task {
    /// Reads a file, at most `limit` lines of it.
    pub fn read(path: &Path, limit: usize) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut task = Task { name, path: path.display().to_string(), items: Vec::new() };
        for (i, line) in lines(path)?.enumerate() {
            let text = line?;
            if text.trim().is_empty() {
                continue;
            }
            if task.items.len() == limit {
                break;
            }
            let line = serde_json::from_str(&text).map_err(|e| e.to_string()).and_then(Line::item);
            task.items.push((i + 1, line.map_err(|why| task.refused(i + 1, &why))?));
        }
        match task.is_empty() {
            true => Err(Error::text(task.path, "has no line; give a JSON object a line")),
            false => Ok(task),
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

    /// What its lines give.
    pub fn metrics(&self) -> BTreeSet<Metric> {
        let of = |(_, item): &(usize, Item)| match item {
            Item::Choose(Choose { truth: Truth::Labels(_), .. }) => vec![Metric::Mc2],
            Item::Choose(Choose { lengths, .. }) if lengths.is_empty() => vec![Metric::Acc],
            Item::Choose(_) => vec![Metric::Acc, Metric::AccNorm],
            Item::Generate(_) => vec![Metric::ExactMatch],
        };
        self.items.iter().flat_map(of).collect()
    }

    /// Its lines in the tokens of a model that runs windows of `positions` tokens, and answers within `context` ones.
    fn tokenized(
        mut self,
        encoder: &Encoder,
        positions: usize,
        context: usize,
        on_line: &mut impl FnMut(),
    ) -> Result<TokenizedTask> {
        let (name, items) = (std::mem::take(&mut self.name), std::mem::take(&mut self.items));
        let mut task = TokenizedTask { name, questions: Vec::new(), windows: Vec::new(), answers: Vec::new() };
        for (number, item) in items {
            match item {
                Item::Choose(Choose { pairs, lengths, truth }) => {
                    let first = task.windows.len();
                    for (before, continuation) in pairs {
                        let window = window(encoder, &before, &continuation)
                            .map_err(|e| self.refused(number, &e.to_string()))?;
                        // Nothing follows the last token, so that it is not run.
                        if window.ids.len() > positions + 1 {
                            let why = format!(
                                "has {} tokens with its choice, the model is made for {positions}; shorten it",
                                window.ids.len()
                            );
                            return Err(self.refused(number, &why));
                        }
                        task.windows.push(window);
                    }
                    task.questions.push(Question { windows: first..task.windows.len(), lengths, truth });
                }
                Item::Generate(generate) => {
                    let ids = encoder.prompt(&generate.prompt).map_err(|e| self.refused(number, &e.to_string()))?;
                    if ids.is_empty() {
                        return Err(self.refused(number, &Error::PromptEmpty.to_string()));
                    }
                    if ids.len().saturating_add(generate.max_tokens) > context {
                        let why = format!(
                            "has {} tokens and wants {} more, the context holds {context}; shorten it, lower its \
                             `max_tokens`, or raise --max-model-len or --kv-cache-memory",
                            ids.len(),
                            generate.max_tokens
                        );
                        return Err(self.refused(number, &why));
                    }
                    task.answers.push((generate, ids));
                }
            }
            on_line();
        }
        Ok(task)
    }

    fn refused(&self, line: usize, why: &str) -> Error {
        Error::text(&self.path, format!("line {line}: {why}"))
    }
}

/// Tasks in a model's tokens. Fails where it cannot run a line. `on_line` is called behind each.
pub fn tokenize(
    tasks: Vec<Task>,
    model: Option<&str>,
    options: &LlmOptions,
    mut on_line: impl FnMut(),
) -> Result<Vec<TokenizedTask>> {
    let checkpoint = Checkpoint::open(crate::files(model, options.offline)?)?;
    let encoder = Encoder::open(&checkpoint)?;
    let (positions, context) = (checkpoint.config().max_positions, engine::context(&checkpoint, &options.engine)?);
    tasks.into_iter().map(|task| task.tokenized(&encoder, positions, context, &mut on_line)).collect()
}

impl TokenizedTask {
    /// Runs the model over the task. `on_line` is called behind each line.
    pub fn run(&self, model: Option<&str>, options: &LlmOptions, mut on_line: impl FnMut()) -> Result<TaskReport> {
        let mut values: BTreeMap<Metric, Vec<f64>> = BTreeMap::new();
        let mut add = |metric: Metric, value: f64| values.entry(metric).or_default().push(value);
        self.choose(model, options, &mut add, &mut on_line)?;
        self.generate(model, options, &mut add, &mut on_line)?;
        let scores = values.into_iter().map(|(metric, values)| (metric, Score::of(&values))).collect();
        Ok(TaskReport { name: self.name.clone(), lines: self.questions.len() + self.answers.len(), scores })
    }

    /// All lines with choices, by their likelihoods.
    fn choose(
        &self,
        model: Option<&str>,
        options: &LlmOptions,
        add: &mut impl FnMut(Metric, f64),
        on_line: &mut impl FnMut(),
    ) -> Result<()> {
        let Some(longest) = self.windows.iter().map(|window| window.ids.len()).max() else { return Ok(()) };
        let mut model = Model::open(crate::files(model, options.offline)?, options, longest)?;
        let mut done = 0;
        let scored = log_likelihoods(&mut model.scorer, &self.windows, |window| {
            while done < self.questions.len() && window >= self.questions[done].windows.end {
                done += 1;
                on_line();
            }
        })?;
        (done..self.questions.len()).for_each(|_| on_line());
        for question in &self.questions {
            judge(&scored[question.windows.clone()], question, add);
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
        if self.answers.is_empty() {
            return Ok(());
        }
        let mut llm = Llm::with_options(model, options)?;
        let request = |(item, ids): &(Generate, Vec<u32>)| Request {
            prompt: Prompt::Ids(ids.clone()),
            params: SamplingParams { temperature: 0.0, max_tokens: item.max_tokens, ..SamplingParams::default() },
            stop: item.until.clone(),
        };
        let answers = llm.run(self.answers.iter().map(request).collect(), |_, progress| {
            if progress == Progress::Done {
                on_line();
            }
            ControlFlow::Continue(())
        })?;
        for ((item, _), answer) in self.answers.iter().zip(answers) {
            add(Metric::ExactMatch, f64::from(u8::from(item.is_met(&answer.text))));
        }
        Ok(())
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

/// The measures of one line, by its log-likelihoods.
fn judge(scored: &[f64], question: &Question, add: &mut impl FnMut(Metric, f64)) {
    match &question.truth {
        Truth::Answer(answer) => {
            let right = |value: &dyn Fn(usize) -> f64| {
                let better = |best: usize, i: usize| if value(i) > value(best) { i } else { best };
                f64::from(u8::from((0..scored.len()).fold(0, better) == *answer))
            };
            add(Metric::Acc, right(&|i| scored[i]));
            if !question.lengths.is_empty() {
                add(Metric::AccNorm, right(&|i| scored[i] / question.lengths[i] as f64));
            }
        }
        Truth::Labels(labels) => {
            // Relative to the likeliest, so that long answers, of next to no probability each, do not all become 0.
            let most = scored.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = |right: bool| -> f64 {
                let of = scored.iter().zip(labels).filter(|(_, label)| **label == right);
                of.map(|(scored, _)| (scored - most).exp()).sum()
            };
            add(Metric::Mc2, sum(true) / (sum(true) + sum(false)));
        }
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

    #[test]
    fn answers_of_next_to_no_probability_have_their_share_of_it() {
        let question = Question { windows: 0..2, lengths: Vec::new(), truth: Truth::Labels(vec![true, false]) };
        let mut seen = Vec::new();
        judge(&[-2000.0, -2001.0], &question, &mut |_, value| seen.push(value));
        assert!((seen[0] - 1.0 / (1.0 + (-1f64).exp())).abs() < 1e-12, "{seen:?}");
    }
}
