//! `/v1/responses`: text in, text out, and its events. Nothing is stored: a request brings its whole conversation.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use quaver_core::engine::FinishReason;
use serde::Deserialize;
use serde_json::{Value, json};

use super::account::answer_id;
use super::admission::Admission;
use super::app::{App, Body, Work, random_id, unix_time};
use super::error::{ApiError, ApiResult};
use super::generation::{Delta, End, Generation, Order};
use super::model::Model;
use super::sampling::{Sampling, refuse};
use super::sse::{self, Chunk, Chunks};
use super::structure::{Structure, response_format};
use crate::Prompt;

/// A request.
#[derive(Debug, Deserialize)]
pub struct Request {
    model: Option<String>,
    #[serde(default)]
    input: Value,
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    stream: Option<bool>,
    text: Option<Value>,
    previous_response_id: Option<String>,
    tools: Option<Vec<Value>>,
    metadata: Option<Value>,
    background: Option<Value>,
    include: Option<Vec<String>>,
    top_logprobs: Option<usize>,
    truncation: Option<String>,
    #[serde(flatten)]
    sampling: Sampling,
    #[serde(flatten)]
    structure: Structure,
}

/// Answers a request.
pub async fn create(State(app): State<Arc<App>>, Body(request, room): Body<Request>) -> ApiResult<Response> {
    let model = app.model()?;
    model.check_name(request.model.as_deref())?;
    if request.previous_response_id.is_some() {
        let why = "responses are not stored here; send the whole conversation as input";
        return Err(ApiError::invalid("previous_response_id", why));
    }
    if request.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        return Err(ApiError::invalid("tools", "tools are supported by /v1/chat/completions alone"));
    }
    refuse("background", request.background.as_ref())?;
    let truncation = request.truncation.filter(|truncation| truncation != "disabled").map(Value::from);
    refuse("truncation", truncation.as_ref())?;
    refuse("top_logprobs", request.top_logprobs.filter(|top| *top > 0).map(Value::from).as_ref())?;
    // What else may be included are results of tools, of which there are none.
    if request.include.iter().flatten().any(|part| part == "message.output_text.logprobs") {
        return Err(ApiError::invalid("include", "message.output_text.logprobs is not supported; leave it out"));
    }
    if request.sampling.n()? > 1 {
        return Err(ApiError::invalid("n", "a response is one answer; ask again for another"));
    }
    let messages = messages(&request.input, request.instructions.as_deref())?;
    let context = model.service.limits().context;
    let most = request.max_output_tokens.unwrap_or(context);
    let params = request.sampling.params(model.text.sampling_defaults(), most, None)?;
    let format = request.text.as_ref().map(|text| &text["format"]);
    let grammar = match (format.map(schema_of).transpose()?.flatten(), request.structure.grammar()?) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("text", "several forms of the answer are asked for; give one"));
        }
        (format, other) => format.or(other),
    };
    let writing = request.sampling.writing()?;
    let admission = Admission::new(&app, &model, 1, room)?;
    let encode = move |model: &Model| Ok(model.text.encode(&Prompt::Messages(messages))?);
    let (admission, prompt) = admission.prepare(Work::Text, encode).await?;
    let (admission, guides) = admission.guides(grammar).await?;
    let shape = Shape {
        id: answer_id("resp_"),
        message: random_id("msg_"),
        created: unix_time(),
        model: request.model.unwrap_or_else(|| model.names[0].clone()),
        instructions: request.instructions,
        metadata: request.metadata.unwrap_or_else(|| json!({})),
    };
    let order = Order { prompts: vec![prompt], n: 1, params, writing };
    let mut generation = Generation::start(admission, order, || guides.guide())?;
    if request.stream.unwrap_or(false) {
        return Ok(sse::respond(generation, Stream { shape, number: 0, text: String::new(), end: None }));
    }
    let answers = generation.whole().await?;
    Ok(Json(shape.response(&generation, &answers[0].text, answers[0].end.as_ref())).into_response())
}

/// `text.format`: as `response_format`, but a schema stands beside its name.
fn schema_of(format: &Value) -> ApiResult<Option<super::structure::Grammar>> {
    if format["type"] == "json_schema" {
        return response_format(&json!({"type": "json_schema", "json_schema": format}));
    }
    response_format(format)
}

/// The conversation as chat templates know it.
fn messages(input: &Value, instructions: Option<&str>) -> ApiResult<Value> {
    let system = instructions.iter().map(|text| json!({"role": "system", "content": text}));
    let wrong = || ApiError::invalid("input", "input must be a text, or a list of messages with role and content");
    let turns = match input {
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        Value::Array(items) => items.iter().map(|item| message(item).ok_or_else(wrong)).collect::<ApiResult<_>>()?,
        _ => return Err(wrong()),
    };
    Ok(system.chain(turns).collect())
}

fn message(item: &Value) -> Option<Value> {
    // OpenAI calls a system's message a developer's now.
    let role = match item["role"].as_str()? {
        "developer" => "system",
        role => role,
    };
    let content = match &item["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Option<Vec<&str>> = parts.iter().map(|part| part["text"].as_str()).collect();
            texts?.join("\n")
        }
        _ => return None,
    };
    Some(json!({"role": role, "content": content}))
}

/// What every response has.
struct Shape {
    id: String,
    message: String,
    created: u64,
    model: String,
    instructions: Option<String>,
    metadata: Value,
}

impl Shape {
    fn part(text: &str) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
    }

    fn item(&self, status: &str, content: Vec<Value>) -> Value {
        json!({"id": self.message, "type": "message", "status": status, "role": "assistant", "content": content})
    }

    /// The response; without an end it is under way.
    fn response(&self, generation: &Generation, text: &str, end: Option<&End>) -> Value {
        let status = match end.map(|end| end.reason) {
            None => "in_progress",
            Some(FinishReason::Stop) => "completed",
            Some(FinishReason::Length) => "incomplete",
        };
        let (usage, params) = (generation.usage(), &generation.order().params);
        let usage = json!({
            "input_tokens": usage.prompt, "output_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "input_tokens_details": {"cached_tokens": usage.cached}, "output_tokens_details": {"reasoning_tokens": 0}
        });
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": end.map(|_| vec![self.item(status, vec![Self::part(text)])]).unwrap_or_default(),
            "usage": end.map(|_| usage), "error": null,
            "incomplete_details": (status == "incomplete").then(|| json!({"reason": "max_output_tokens"})),
            "instructions": self.instructions, "metadata": self.metadata, "parallel_tool_calls": true,
            "temperature": params.temperature, "top_p": params.top_p, "max_output_tokens": params.max_tokens,
            "tool_choice": "auto", "tools": [], "store": false
        })
    }
}

struct Stream {
    shape: Shape,
    /// Events so far.
    number: usize,
    text: String,
    end: Option<End>,
}

impl Stream {
    fn event(&mut self, name: &'static str, fields: Value) -> Chunk {
        let mut data = json!({"type": name, "sequence_number": self.number});
        self.number += 1;
        if let (Some(data), Value::Object(fields)) = (data.as_object_mut(), fields) {
            data.extend(fields);
        }
        Chunk { name: Some(name), data }
    }

    fn place(&self) -> Value {
        json!({"item_id": self.shape.message, "output_index": 0, "content_index": 0})
    }
}

/// An object with one more field.
fn with(mut object: Value, name: &str, value: Value) -> Value {
    object[name] = value;
    object
}

impl Chunks for Stream {
    const DONE: Option<&'static str> = None;

    fn begin(&mut self, generation: &Generation) -> Vec<Chunk> {
        let response = json!({"response": self.shape.response(generation, "", None)});
        let item = json!({"output_index": 0, "item": self.shape.item("in_progress", Vec::new())});
        let part = with(self.place(), "part", Shape::part(""));
        vec![
            self.event("response.created", response.clone()),
            self.event("response.in_progress", response),
            self.event("response.output_item.added", item),
            self.event("response.content_part.added", part),
        ]
    }

    fn delta(&mut self, _: &Generation, delta: Delta) -> ApiResult<Vec<Chunk>> {
        self.end = delta.end.or(self.end.take());
        if delta.text.is_empty() {
            return Ok(Vec::new());
        }
        self.text += &delta.text;
        let fields = with(with(self.place(), "delta", delta.text.into()), "logprobs", json!([]));
        Ok(vec![self.event("response.output_text.delta", fields)])
    }

    fn end(&mut self, generation: &Generation) -> Vec<Chunk> {
        let response = self.shape.response(generation, &self.text, self.end.as_ref());
        let name = if response["status"] == "incomplete" { "response.incomplete" } else { "response.completed" };
        let part = Shape::part(&self.text);
        let text = with(with(self.place(), "text", self.text.clone().into()), "logprobs", json!([]));
        let done = with(self.place(), "part", part);
        let item = json!({"output_index": 0, "item": response["output"][0]});
        vec![
            self.event("response.output_text.done", text),
            self.event("response.content_part.done", done),
            self.event("response.output_item.done", item),
            self.event(name, json!({"response": response})),
        ]
    }

    fn error(&mut self, error: &ApiError) -> Chunk {
        let error = &error.json()["error"];
        self.event("error", json!({"code": error["code"], "message": error["message"], "param": error["param"]}))
    }
}
