//! `/v1/chat/completions`: conversations, answered.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use quaver_core::engine::Token;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::account::answer_id;
use super::admission::Admission;
use super::app::{App, Body, Work, unix_time};
use super::completions::{finish_reason, prompt_logprobs, stop_reason, usage_json};
use super::error::{ApiError, ApiResult};
use super::generation::{Delta, End, Generation, Order, Usage, Whole};
use super::logprobs::Speller;
use super::model::Model;
use super::sampling::{Sampling, Streaming, refuse_template};
use super::sse::{self, Chunk, Chunks};
use super::structure::Structure;
use super::tool_calls::ToolCalls;
use super::tools::{Piece, Tools};
use crate::text::RenderOptions;

/// What a chat template is given.
#[derive(Debug, Default, Deserialize)]
pub struct Conversation {
    messages: Option<Value>,
    #[serde(flatten)]
    tools: Tools,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    documents: Option<Value>,
}

impl Conversation {
    /// The tokens of the prompt. `answered`: it is for an answer, unless the request says otherwise.
    pub fn encode(&self, model: &Model, answered: bool) -> ApiResult<Vec<u32>> {
        refuse_template(self.chat_template.as_ref())?;
        let messages = self.messages.as_ref().ok_or_else(|| ApiError::invalid("messages", "messages is missing"))?;
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        let mut extra = self.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(documents) = &self.documents {
            extra.entry("documents").or_insert_with(|| documents.clone());
        }
        let options = RenderOptions {
            add_generation_prompt: self.add_generation_prompt.unwrap_or(answered && !continue_final_message),
            continue_final_message,
            tools: self.tools.for_template()?,
            date: None,
            extra,
        };
        Ok(model.text.encode_chat(&with_parsed_arguments(messages), &options)?)
    }
}

/// OpenAI writes the arguments of an earlier call as the text of their JSON; templates write them out again, and so want
/// the JSON itself.
fn with_parsed_arguments(messages: &Value) -> Value {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten() {
        // OpenAI calls a system's message a developer's now.
        if message["role"] == "developer" {
            message["role"] = "system".into();
        }
    }
    let all = messages.as_array_mut().into_iter().flatten();
    for call in all.filter_map(|message| message.get_mut("tool_calls")?.as_array_mut()).flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
        {
            *arguments = parsed;
        }
    }
    messages
}

/// A request.
#[derive(Debug, Deserialize)]
pub struct Request {
    model: Option<String>,
    #[serde(flatten)]
    conversation: Conversation,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
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
    let logprobs = request.logprobs.unwrap_or(false);
    if request.top_logprobs.is_some_and(|top| top > 0) && !logprobs {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true"));
    }
    let top = logprobs.then(|| request.top_logprobs.unwrap_or(0));
    let context = model.service.limits().context;
    let params = request.sampling.params(model.text.sampling_defaults(), context, top)?;
    let tools = request.conversation.tools.check()?;
    let grammar = match (request.structure.grammar()?, tools.grammar()) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid(
                "tool_choice",
                "a form of the answer and a call that must be made exclude each other",
            ));
        }
        (grammar, call) => grammar.or(call),
    };
    let (n, writing) = (request.sampling.n()?, request.sampling.writing()?);
    let (admission, conversation) = (Admission::new(&app, &model, n, room)?, request.conversation);
    let (admission, prompt) = admission.prepare(Work::Text, move |model| conversation.encode(model, true)).await?;
    let (admission, guides) = admission.guides(grammar).await?;
    let shape = Shape {
        id: answer_id("chatcmpl-"),
        created: unix_time(),
        model: request.model.unwrap_or_else(|| model.names[0].clone()),
        logprobs,
        scores: params.prompt_logprobs.is_some(),
    };
    let order = Order { prompts: vec![prompt], n, params, writing };
    let mut generation = Generation::start(admission, order, || guides.guide())?;
    if request.streaming.is_on() {
        let calls = (0..n).map(|_| tools.calls()).collect();
        return Ok(sse::respond(
            generation,
            Stream { shape, usage: request.streaming.usage(), calls, scores: Vec::new() },
        ));
    }
    let answers = generation.whole().await?;
    let choices = answers.iter().enumerate().map(|(i, answer)| shape.choice(&generation, i, answer, tools.calls()));
    let mut object = shape.object("chat.completion", choices.collect(), Some(generation.usage()));
    if shape.scores {
        object["prompt_logprobs"] = prompt_logprobs(&Speller::new(generation.model()), &answers[0].scores);
    }
    Ok(Json(object).into_response())
}

/// What every object of a response has.
struct Shape {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
    scores: bool,
}

impl Shape {
    fn object(&self, kind: &str, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
            "usage": usage.map(usage_json), "system_fingerprint": null
        })
    }

    fn choice(&self, generation: &Generation, i: usize, answer: &Whole, mut calls: ToolCalls) -> Value {
        let mut pieces = calls.push(&answer.text);
        pieces.extend(calls.finish());
        let (mut content, mut made) = (String::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Text(text) => content += &text,
                Piece::Call { id, name, .. } => {
                    made.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}}));
                }
                Piece::Arguments { index, text } => {
                    if let Some(Value::String(arguments)) = made[index].pointer_mut("/function/arguments") {
                        arguments.push_str(&text);
                    }
                }
            }
        }
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !made.is_empty() {
            message["tool_calls"] = made.into();
            if content.is_empty() {
                message["content"] = Value::Null;
            }
        }
        let last = answer.tokens.last().map(|token| token.id);
        let logprobs = self.logprobs(generation.model(), &answer.tokens);
        let ended = answer.end.as_ref().map(|end| ending(generation, end, last, calls.count()));
        let (finish, stop) = ended.unwrap_or_default();
        json!({"index": i, "message": message, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop})
    }

    fn logprobs(&self, model: &Model, tokens: &[Token]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let speller = Speller::new(model);
        json!({"content": tokens.iter().map(|token| speller.chat(token)).collect::<Value>(), "refusal": null})
    }
}

/// `finish_reason` and `stop_reason`.
fn ending(generation: &Generation, end: &End, last: Option<u32>, calls: usize) -> (Value, Value) {
    let stop = generation.stop_reason(end, last).map(stop_reason).unwrap_or_default();
    let finish = match finish_reason(end) {
        "stop" if calls > 0 => "tool_calls",
        other => other,
    };
    (finish.into(), stop)
}

struct Stream {
    shape: Shape,
    usage: (bool, bool),
    calls: Vec<ToolCalls>,
    scores: Vec<Token>,
}

impl Stream {
    fn chunk(&self, generation: &Generation, choices: Vec<Value>) -> Chunk {
        let usage = Some(generation.usage()).filter(|_| self.usage.1);
        let mut chunk = self.shape.object("chat.completion.chunk", choices, usage);
        if !self.usage.0 {
            chunk.as_object_mut().map(|chunk| chunk.remove("usage"));
        }
        chunk.into()
    }
}

/// A choice of a chunk.
fn choice(index: usize, delta: Value) -> Value {
    json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null})
}

impl Chunks for Stream {
    fn begin(&mut self, generation: &Generation) -> Vec<Chunk> {
        let role = |i| self.chunk(generation, vec![choice(i, json!({"role": "assistant", "content": ""}))]);
        (0..self.calls.len()).map(role).collect()
    }

    fn delta(&mut self, generation: &Generation, delta: Delta) -> ApiResult<Vec<Chunk>> {
        let i = delta.choice;
        self.scores.extend(delta.scores);
        let mut pieces = self.calls[i].push(&delta.text);
        if delta.end.is_some() {
            pieces.extend(self.calls[i].finish());
        }
        let mut choices: Vec<Value> = pieces.into_iter().map(|piece| choice(i, piece.json())).collect();
        if self.shape.logprobs && delta.token.is_some() {
            if choices.is_empty() {
                choices.push(choice(i, json!({"content": ""})));
            }
            choices[0]["logprobs"] = self.shape.logprobs(generation.model(), delta.token.as_slice());
        }
        if let Some(end) = &delta.end {
            let last = delta.token.as_ref().map(|token| token.id);
            let mut choice = choice(i, json!({}));
            (choice["finish_reason"], choice["stop_reason"]) = ending(generation, end, last, self.calls[i].count());
            choices.push(choice);
        }
        let mut chunks: Vec<Chunk> = choices.into_iter().map(|choice| self.chunk(generation, vec![choice])).collect();
        // The scores are those of the prompt, whose first answer has them.
        let scored = chunks.last_mut().filter(|_| self.shape.scores && i == 0 && delta.end.is_some());
        if let Some(chunk) = scored {
            chunk.data["prompt_logprobs"] = prompt_logprobs(&Speller::new(generation.model()), &self.scores);
        }
        Ok(chunks)
    }

    fn end(&mut self, generation: &Generation) -> Vec<Chunk> {
        if !self.usage.0 {
            return Vec::new();
        }
        vec![self.shape.object("chat.completion.chunk", Vec::new(), Some(generation.usage())).into()]
    }
}
