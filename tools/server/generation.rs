//! One HTTP request in the engine: its prompts, each with its answers, and what becomes of them, as text. Dropping it
//! frees all that it holds in the engine: so does a client that hangs up.

use std::time::{Duration, Instant};

use quaver_core::engine::{FinishReason, Output, Token};
use quaver_core::guide::Guide;
use quaver_core::sampler::SamplingParams;
use quaver_core::service::Ticket;
use quaver_core::{Error, Result};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout_at;

use super::error::{ApiError, ApiResult};
use super::metrics::Ending;
use super::model::Model;
use super::sampling::Writing;
use crate::text::{AnswerText, StopStrings};

/// What is asked for.
pub struct Order {
    /// Tokens of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// Answers of each prompt. Their seeds follow each other where the request has one.
    pub n: usize,
    /// How to choose tokens.
    pub params: SamplingParams,
    /// How they become text.
    pub writing: Writing,
}

/// What a step brought for one answer.
#[derive(Debug)]
pub struct Delta {
    /// Which answer: those of the first prompt come first.
    pub choice: usize,
    /// Text that is certain now.
    pub text: String,
    /// The token that was generated, where one was.
    pub token: Option<Token>,
    /// Scores of the prompt's tokens, from the second on.
    pub scores: Vec<Token>,
    /// How the answer ended, where it did.
    pub end: Option<End>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Stop or length.
    pub reason: FinishReason,
    /// The stop string or token that ended it, where the request named it.
    pub stop: Option<StopReason>,
}

/// What of the request ended an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(u32),
}

/// Tokens that were read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of all prompts.
    pub prompt: usize,
    /// Those of them that were in the cache.
    pub cached: usize,
    /// Of all answers.
    pub completion: usize,
}

/// See the module.
pub struct Generation {
    model: std::sync::Arc<Model>,
    outputs: UnboundedReceiver<(usize, Output)>,
    answers: Vec<Answer>,
    order: Order,
    usage: Usage,
    start: Instant,
    deadline: tokio::time::Instant,
    left: usize,
}

/// One answer under way.
struct Answer {
    ticket: Option<Ticket>,
    text: Option<AnswerText>,
    tokens: usize,
    begun: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Generation {
    /// Hands the request over to the engine. `guide` makes a guide for each answer, where the request has a grammar.
    ///
    /// # Errors
    /// Where the request means nothing, or does not fit into the queue as a whole.
    pub fn start(
        model: std::sync::Arc<Model>,
        order: Order,
        limit: Duration,
        guide: impl Fn() -> Result<Option<Box<dyn Guide>>>,
    ) -> ApiResult<Self> {
        let stops = StopStrings::new(&order.writing.stop)?;
        let (count, most) = (order.prompts.len() * order.n, model.service.most());
        if count > most {
            let why =
                format!("{count} answers are asked for, at most {most} can be under way; ask for fewer at a time");
            return Err(ApiError::invalid("prompt", why));
        }
        let (sender, outputs) = unbounded_channel();
        let mut answers = Vec::new();
        for (i, prompt) in order.prompts.iter().flat_map(|prompt| (0..order.n).map(move |i| (i, prompt))) {
            let choice = answers.len();
            let mut params = order.params.clone();
            params.seed = params.seed.map(|seed| seed.wrapping_add(i as u64));
            // All answers to a prompt would score it alike.
            params.prompt_logprobs = params.prompt_logprobs.filter(|_| i == 0);
            let sender = sender.clone();
            // Where nobody listens any more, the ticket was dropped too.
            let sink = Box::new(move |output| drop(sender.send((choice, output))));
            let ticket = model.service.submit(prompt.clone(), params, guide()?, sink)?;
            let text = match model.text.tokenizer() {
                Ok(tokenizer) => {
                    Some(AnswerText::new(tokenizer.detokenizer(order.writing.skip_special), stops.clone()))
                }
                Err(_) => None,
            };
            answers.push(Answer { ticket: Some(ticket), text, tokens: 0, begun: None, first: None, last: None });
        }
        let start = Instant::now();
        let usage = Usage { prompt: order.prompts.iter().map(Vec::len).sum(), ..Usage::default() };
        let left = answers.len();
        let deadline = tokio::time::Instant::from_std(start) + limit;
        Ok(Generation { model, outputs, answers, order, usage, start, deadline, left })
    }

    /// The tokens so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What was asked for.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// The model that answers.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What comes next; None where all answers are complete. Behind an error nothing comes.
    pub async fn next(&mut self) -> Option<ApiResult<Delta>> {
        while self.left > 0 {
            let (choice, output) = match timeout_at(self.deadline, self.outputs.recv()).await {
                Ok(Some(output)) => output,
                Ok(None) => return Some(Err(ApiError::internal("the engine has stopped; see the server's log"))),
                Err(_) => {
                    let seconds = self.start.elapsed().as_secs();
                    let why =
                        format!("the request is not done after {seconds} s; ask for less, or raise --request-timeout");
                    return Some(Err(ApiError::timeout(why)));
                }
            };
            match self.take(choice, output) {
                Ok(None) => {}
                Ok(Some(delta)) => return Some(Ok(delta)),
                Err(error) => {
                    self.end(choice, Ending::Error);
                    return Some(Err(error.into()));
                }
            }
        }
        None
    }

    fn take(&mut self, choice: usize, output: Output) -> Result<Option<Delta>> {
        let answer = &mut self.answers[choice];
        if answer.ticket.is_none() {
            // A stop string ended it; what the engine had ready by then is nobody's.
            return Ok(None);
        }
        let now = Instant::now();
        let mut delta = Delta { choice, text: String::new(), token: None, scores: Vec::new(), end: None };
        match output {
            Output::Begun { cached } => {
                answer.begun = Some(now);
                // The answers to one prompt share its tokens, which are counted once.
                if choice.is_multiple_of(self.order.n) {
                    self.usage.cached += cached;
                }
                return Ok(None);
            }
            Output::Prompt(scores) => delta.scores = scores,
            Output::Token(token) => {
                self.usage.completion += 1;
                answer.tokens += 1;
                let metrics = &self.model.metrics;
                match answer.last.replace(now) {
                    None => metrics.time_to_first_token.observe(now - self.start),
                    Some(last) => metrics.inter_token_latency.observe(now - last),
                }
                answer.first.get_or_insert(now);
                if let Some(text) = &mut answer.text {
                    let piece = text.push(token.id)?;
                    delta.text = piece.text;
                    if let Some(stop) = piece.stopped {
                        let stop = self.order.writing.stop[stop].clone();
                        if self.order.writing.include_stop {
                            delta.text += &stop;
                        }
                        delta.end = Some(End { reason: FinishReason::Stop, stop: Some(StopReason::Text(stop)) });
                        self.end(choice, Ending::Stop);
                    }
                }
                delta.token = Some(token);
            }
            Output::Finished(reason) => {
                if let Some(text) = &mut answer.text {
                    delta.text = text.finish().text;
                }
                delta.end = Some(End { reason, stop: None });
                self.end(choice, if reason == FinishReason::Stop { Ending::Stop } else { Ending::Length });
            }
            Output::Failed(error) => return Err(error),
        }
        Ok(Some(delta))
    }

    /// Books the end of an answer, and frees what it held.
    fn end(&mut self, choice: usize, ending: Ending) {
        let answer = &mut self.answers[choice];
        if answer.ticket.take().is_none() {
            return;
        }
        self.left -= 1;
        let (now, metrics) = (Instant::now(), &self.model.metrics);
        metrics.ended(ending);
        metrics.e2e_request_latency.observe(now - self.start);
        metrics.request_prompt_tokens.observe_count(self.order.prompts[choice / self.order.n].len());
        metrics.request_generation_tokens.observe_count(answer.tokens);
        metrics.request_params_n.observe_count(self.order.n);
        metrics.request_params_max_tokens.observe_count(self.order.params.max_tokens);
        let Some(begun) = answer.begun else { return };
        metrics.request_queue_time.observe(begun - self.start);
        metrics.request_inference_time.observe(now - begun);
        let Some(first) = answer.first else { return };
        metrics.request_prefill_time.observe(first - begun);
        metrics.request_decode_time.observe(now - first);
        if answer.tokens > 1 {
            metrics.request_time_per_output_token.observe((now - first) / (answer.tokens - 1) as u32);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        (0..self.answers.len()).for_each(|choice| self.end(choice, Ending::Abort));
    }
}

/// An answer from its first token to its last.
#[derive(Debug, Default)]
pub struct Whole {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Scores of its prompt's tokens, from the second on.
    pub scores: Vec<Token>,
    /// How it ended.
    pub end: Option<End>,
}

impl Generation {
    /// All answers, when they are complete.
    pub async fn whole(&mut self) -> ApiResult<Vec<Whole>> {
        let mut answers: Vec<Whole> = self.answers.iter().map(|_| Whole::default()).collect();
        while let Some(delta) = self.next().await {
            let delta = delta?;
            let answer = &mut answers[delta.choice];
            answer.text += &delta.text;
            answer.tokens.extend(delta.token);
            answer.scores.extend(delta.scores);
            answer.end = delta.end.or(answer.end.take());
        }
        Ok(answers)
    }

    /// What ended an answer, in vLLM's `stop_reason`: its own stop string or token.
    pub fn stop_reason(&self, end: &End, last: Option<u32>) -> Option<StopReason> {
        let named = |id: &u32| self.order.params.stop_token_ids.contains(id);
        match (&end.stop, end.reason) {
            (Some(stop), _) => Some(stop.clone()),
            (None, FinishReason::Stop) => last.filter(named).map(StopReason::Token),
            (None, FinishReason::Length) => None,
        }
    }
}

/// The engine's word for an unknown failure of a task of ours.
pub fn task_failed(error: impl std::fmt::Display) -> Error {
    Error::device("server", format!("a task failed ({error}); see the log"))
}
