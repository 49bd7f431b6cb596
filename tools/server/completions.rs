//! `/v1/completions`: texts or token ids, continued.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use quaver_core::engine::FinishReason;
use serde::Deserialize;
use serde_json::{Value, json};

use super::account::answer_id;
use super::admission::Admission;
use super::app::{App, Body, Work, unix_time};
use super::error::{ApiError, ApiResult};
use super::generation::{Delta, End, Generation, Order, StopReason, Usage, Whole};
use super::logprobs::{Speller, TextLogprobs};
use super::model::Model;
use super::sampling::{Sampling, Streaming};
use super::sse::{self, Chunk, Chunks};
use super::structure::Structure;
use crate::Prompt;

/// Prompts of a request, at most.
pub const MAX_PROMPTS: usize = 1024;

/// What OpenAI and vLLM generate where a request does not say.
const MAX_TOKENS: usize = 16;

/// A request.
#[derive(Debug, Deserialize)]
pub struct Request {
    model: Option<String>,
    #[serde(default)]
    prompt: Value,
    suffix: Option<String>,
    echo: Option<bool>,
    logprobs: Option<usize>,
    #[serde(flatten)]
    sampling: Sampling,
    #[serde(flatten)]
    streaming: Streaming,
    #[serde(flatten)]
    structure: Structure,
}

/// Answers a request.
pub async fn create(State(app): State<Arc<App>>, Body(request, room): Body<Request>) -> ApiResult<Response> {
    let model = app.model()?;
    model.check_name(request.model.as_deref())?;
    if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "suffix is not supported; leave it out"));
    }
    let echo = request.echo.unwrap_or(false);
    let mut params = request.sampling.params(model.text.sampling_defaults(), MAX_TOKENS, request.logprobs)?;
    if echo && params.prompt_logprobs.is_none() {
        params.prompt_logprobs = request.logprobs;
    }
    let asked_for_scores = request.sampling.asks_for_prompt_logprobs();
    let grammar = request.structure.grammar()?;
    let prompts = prompts(&model, &request.prompt)?;
    let (n, writing) = (request.sampling.n()?, request.sampling.writing()?);
    let admission = Admission::new(&app, &model, prompts.len() * n, room)?;
    let encode = move |model: &Model| {
        let ids = prompts.iter().map(|prompt| model.text.encode(prompt));
        Ok(ids.collect::<crate::Result<Vec<_>>>()?)
    };
    let (admission, prompts) = admission.prepare(Work::Text, encode).await?;
    let (admission, guides) = admission.guides(grammar).await?;
    let order = Order { prompts, n, params, writing };
    let mut generation = Generation::start(admission, order, || guides.guide())?;
    let shape = Shape {
        id: answer_id("cmpl-"),
        created: unix_time(),
        model: request.model.unwrap_or_else(|| model.names[0].clone()),
        echo,
        logprobs: request.logprobs.is_some(),
        scores: asked_for_scores,
    };
    if request.streaming.is_on() {
        let offsets = vec![0; generation.order().prompts.len() * n];
        let echoed = vec![false; offsets.len()];
        return Ok(sse::respond(generation, Stream { shape, usage: request.streaming.usage(), offsets, echoed }));
    }
    let answers = generation.whole().await?;
    let mut choices = Vec::new();
    let mut scores = Vec::new();
    for (i, answer) in answers.into_iter().enumerate() {
        if i % n == 0 {
            scores.clone_from(&answer.scores);
        }
        choices.push(shape.choice(&generation, i, &answer, &scores)?);
    }
    Ok(Json(shape.object(choices, Some(generation.usage()))).into_response())
}

/// What every object of a response has.
struct Shape {
    id: String,
    created: u64,
    model: String,
    echo: bool,
    logprobs: bool,
    scores: bool,
}

impl Shape {
    fn object(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "choices": choices, "usage": usage.map(usage_json)
        })
    }

    fn choice(
        &self,
        generation: &Generation,
        i: usize,
        answer: &Whole,
        scores: &[quaver_core::engine::Token],
    ) -> ApiResult<Value> {
        let prompt = &generation.order().prompts[i / generation.order().n];
        let model = generation.model();
        let speller = Speller::new(model);
        let mut text = String::new();
        let mut logprobs = TextLogprobs::default();
        if self.echo {
            text += &decode(model, prompt)?;
            logprobs.push_unscored(&speller, prompt[0]);
            scores.iter().for_each(|token| logprobs.push(&speller, token));
        }
        text += &answer.text;
        answer.tokens.iter().for_each(|token| logprobs.push(&speller, token));
        let end = answer.end.as_ref();
        let mut choice = json!({
            "index": i, "text": text, "logprobs": self.logprobs.then(|| logprobs.json()),
            "finish_reason": end.map(finish_reason),
            "stop_reason": end.and_then(|end| generation.stop_reason(end, answer.tokens.last().map(|t| t.id))).map(stop_reason),
        });
        if self.scores {
            choice["prompt_logprobs"] = prompt_logprobs(&speller, scores);
        }
        Ok(choice)
    }
}

/// The prompt's text, as it is echoed.
fn decode(model: &Model, prompt: &[u32]) -> ApiResult<String> {
    match model.text.tokenizer() {
        Ok(tokenizer) => Ok(tokenizer.decode(prompt, true)?),
        Err(_) => Ok(String::new()),
    }
}

struct Stream {
    shape: Shape,
    usage: (bool, bool),
    /// Where each answer's next token begins, in characters.
    offsets: Vec<usize>,
    /// Whether each answer's prompt was given.
    echoed: Vec<bool>,
}

impl Stream {
    fn chunk(&self, generation: &Generation, choices: Vec<Value>) -> Chunk {
        let mut chunk = self.shape.object(choices, Some(generation.usage()).filter(|_| self.usage.1));
        if !self.usage.0 {
            chunk.as_object_mut().map(|chunk| chunk.remove("usage"));
        }
        chunk.into()
    }
}

impl Chunks for Stream {
    fn begin(&mut self, _: &Generation) -> Vec<Chunk> {
        Vec::new()
    }

    fn delta(&mut self, generation: &Generation, delta: Delta) -> ApiResult<Vec<Chunk>> {
        let speller = Speller::new(generation.model());
        let prompt = &generation.order().prompts[delta.choice / generation.order().n];
        let mut logprobs = TextLogprobs::at(self.offsets[delta.choice]);
        let mut text = String::new();
        if self.shape.echo && !std::mem::replace(&mut self.echoed[delta.choice], true) {
            text += &decode(generation.model(), prompt)?;
            logprobs.push_unscored(&speller, prompt[0]);
        }
        if self.shape.echo {
            delta.scores.iter().for_each(|token| logprobs.push(&speller, token));
        }
        text += &delta.text;
        delta.token.iter().for_each(|token| logprobs.push(&speller, token));
        self.offsets[delta.choice] = logprobs.offset();
        if text.is_empty() && delta.end.is_none() && !self.shape.logprobs && delta.scores.is_empty() {
            return Ok(Vec::new());
        }
        let last = delta.token.as_ref().map(|token| token.id);
        let mut choice = json!({
            "index": delta.choice, "text": text, "logprobs": self.shape.logprobs.then(|| logprobs.json()),
            "finish_reason": delta.end.as_ref().map(finish_reason),
            "stop_reason": delta.end.as_ref().and_then(|end| generation.stop_reason(end, last)).map(stop_reason),
        });
        if self.shape.scores && !delta.scores.is_empty() {
            choice["prompt_logprobs"] = delta.scores.iter().map(|token| speller.prompt(token)).collect();
        }
        Ok(vec![self.chunk(generation, vec![choice])])
    }

    fn end(&mut self, generation: &Generation) -> Vec<Chunk> {
        if !self.usage.0 {
            return Vec::new();
        }
        vec![self.shape.object(Vec::new(), Some(generation.usage())).into()]
    }
}

/// `prompt`: a text, token ids, or a list of either.
fn prompts(model: &Model, prompt: &Value) -> ApiResult<Vec<Prompt>> {
    let wrong = || ApiError::invalid("prompt", "prompt must be a text, a list of token ids, or a list of either");
    let ids = |items: &[Value]| {
        model.text.check_count(items.len())?;
        Ok::<_, ApiError>(Prompt::Ids(ids(items)?))
    };
    let prompts = match prompt {
        Value::String(text) => vec![Prompt::Text(text.clone())],
        Value::Array(items) if items.first().is_some_and(Value::is_number) => vec![ids(items)?],
        Value::Array(items) => {
            let each = items.iter().map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text.clone())),
                Value::Array(items) => ids(items),
                _ => Err(wrong()),
            });
            each.collect::<ApiResult<Vec<_>>>()?
        }
        _ => return Err(wrong()),
    };
    if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
        let why = format!("{} prompts are given; give 1 to {MAX_PROMPTS}", prompts.len());
        return Err(ApiError::invalid("prompt", why));
    }
    Ok(prompts)
}

/// Token ids of JSON.
pub fn ids(items: &[Value]) -> ApiResult<Vec<u32>> {
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Option<Vec<u32>> = items.iter().map(id).collect();
    ids.ok_or_else(|| ApiError::invalid("prompt", "a list of token ids holds whole numbers from 0 on and nothing else"))
}

/// `usage`.
pub fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    })
}

/// `finish_reason`.
pub fn finish_reason(end: &End) -> &'static str {
    match end.reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// `stop_reason`.
pub fn stop_reason(reason: StopReason) -> Value {
    match reason {
        StopReason::Text(text) => text.into(),
        StopReason::Token(id) => id.into(),
    }
}

/// `prompt_logprobs`: nothing for the first token.
pub fn prompt_logprobs(speller: &Speller, scores: &[quaver_core::engine::Token]) -> Value {
    std::iter::once(Value::Null).chain(scores.iter().map(|token| speller.prompt(token))).collect()
}
