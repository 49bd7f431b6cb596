//! One HTTP request in the engine: its prompts, each with its answers, and what becomes of them, as text. Dropping it
//! frees all that it holds in the engine: so does a client that hangs up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quaver_core::engine::{FinishReason, Output, Token};
use quaver_core::guide::Guide;
use quaver_core::sampler::SamplingParams;
use quaver_core::service::Ticket;
use quaver_core::{Error, Result};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::AbortHandle;
use tokio::time::timeout_at;

use super::account::{Account, account};
use super::admission::Admission;
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
    model: Arc<Model>,
    outputs: UnboundedReceiver<(usize, Output)>,
    answers: Vec<Answer>,
    /// What each answer holds in the engine, until it is over.
    tickets: Tickets,
    /// Frees all of it when the time is over, whether or not anybody asks for what comes next.
    timer: AbortHandle,
    order: Order,
    usage: Usage,
    start: Instant,
    deadline: tokio::time::Instant,
    limit: Duration,
    left: usize,
    /// What the log will say of it.
    account: Arc<Account>,
}

type Tickets = Arc<Mutex<Vec<Option<Ticket>>>>;

/// One answer under way.
struct Answer {
    is_over: bool,
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
    /// Where the request means nothing.
    pub fn start(
        admission: Admission,
        order: Order,
        guide: impl Fn() -> Result<Option<Box<dyn Guide>>>,
    ) -> ApiResult<Self> {
        let stops = StopStrings::new(&order.writing.stop)?;
        let Admission { model, mut places, start, deadline, .. } = admission;
        let (sender, outputs) = unbounded_channel();
        let (mut answers, mut tickets) = (Vec::new(), Vec::new());
        for (i, prompt) in order.prompts.iter().flat_map(|prompt| (0..order.n).map(move |i| (i, prompt))) {
            let choice = answers.len();
            let mut params = order.params.clone();
            params.seed = params.seed.map(|seed| seed.wrapping_add(i as u64));
            // All answers to a prompt would score it alike.
            params.prompt_logprobs = params.prompt_logprobs.filter(|_| i == 0);
            let sender = sender.clone();
            // Where nobody listens any more, the ticket was dropped too.
            let sink = Box::new(move |output| drop(sender.send((choice, output))));
            let ticket = model.service.submit(&mut places, prompt.clone(), params, guide()?, sink)?;
            tickets.push(Some(ticket));
            let text = match model.text.tokenizer() {
                Ok(tokenizer) => {
                    let detokenizer = tokenizer.detokenizer(order.writing.skip_special);
                    Some(AnswerText::new(detokenizer, stops.clone(), order.params.min_tokens))
                }
                Err(_) => None,
            };
            answers.push(Answer { is_over: false, text, tokens: 0, begun: None, first: None, last: None });
        }
        let tickets = Arc::new(Mutex::new(tickets));
        let usage = Usage { prompt: order.prompts.iter().map(Vec::len).sum(), ..Usage::default() };
        let left = answers.len();
        let timer = end_at(deadline, Arc::clone(&tickets));
        let (start, limit, account) = (start.into_std(), deadline - start, account());
        Ok(Generation { model, outputs, answers, tickets, timer, order, usage, start, deadline, limit, left, account })
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
            let output = timeout_at(self.deadline, self.outputs.recv()).await;
            // Also where outputs are left from before: nobody may take longer by taking them slowly.
            if tokio::time::Instant::now() >= self.deadline {
                return Some(self.fail(ApiError::request_timeout(self.limit)));
            }
            let Ok(Some((choice, output))) = output else {
                return Some(self.fail(ApiError::internal("the engine has stopped; see the server's log")));
            };
            match self.take(choice, output) {
                Ok(None) => {}
                Ok(Some(delta)) => return Some(Ok(delta)),
                Err(error) => {
                    self.end(choice, Ending::Error);
                    return Some(self.fail(error.into()));
                }
            }
        }
        None
    }

    /// An error that ends all of it.
    fn fail(&self, error: ApiError) -> ApiResult<Delta> {
        self.account.fail(error.message());
        Err(error)
    }

    fn take(&mut self, choice: usize, output: Output) -> Result<Option<Delta>> {
        let answer = &mut self.answers[choice];
        if answer.is_over {
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
        if std::mem::replace(&mut answer.is_over, true) {
            return;
        }
        drop(self.tickets.lock().unwrap_or_else(PoisonError::into_inner)[choice].take());
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

/// Drops tickets at a time, unless it is aborted before.
fn end_at(deadline: tokio::time::Instant, tickets: Tickets) -> AbortHandle {
    let timer = async move {
        tokio::time::sleep_until(deadline).await;
        tickets.lock().unwrap_or_else(PoisonError::into_inner).fill_with(|| None);
    };
    tokio::spawn(timer).abort_handle()
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.timer.abort();
        self.account.count(self.usage);
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

#[cfg(test)]
mod tests {
    use super::super::app::{App, Room, tests::options};
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn answers_end_with_their_time_though_nobody_asks_for_what_comes_next() {
        let mut options = options(Duration::from_millis(100));
        options.llm.engine.max_num_seqs = 1;
        let model = Model::load(None, &options.llm, &[], 128).unwrap();
        let app = Arc::new(App::new(options));
        app.ready(model);
        let model = app.model().unwrap();
        // One behind the other, as long as can be.
        let params = SamplingParams { ignore_eos: true, max_tokens: 4000, ..SamplingParams::default() };
        let writing = Writing { stop: Vec::new(), include_stop: false, skip_special: true };
        let order = Order { prompts: vec![vec![1]], n: 128, params, writing };
        let admission = Admission::new(&app, &model, 128, Room::default()).unwrap();
        let mut generation = Generation::start(admission, order, || Ok(None)).unwrap();
        assert_eq!(model.service.under_way(), 128);
        // Many times what is needed, and much less than all those tokens take.
        for _ in 0..1000 {
            if model.service.under_way() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(model.service.under_way(), 0);
        let error = generation.next().await.unwrap().unwrap_err();
        assert!(error.message().contains("raise --request-timeout"));
    }
}
