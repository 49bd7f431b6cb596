//! The routes that tell something and generate nothing: models, health, version, metrics, and tokens of texts.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use quaver_core::engine::PAGE_TOKENS;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::app::{App, Body, Work};
use super::chat::Conversation;
use super::completions::ids;
use super::error::{ApiError, ApiResult};
use super::model::Model;
use crate::{Error, Prompt};

/// `GET /health`: whether requests are taken.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    let status = match app.model() {
        Ok(model) if model.service.is_well() => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    status.into_response()
}

/// `GET /version`.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "commit": crate::COMMIT}))
}

/// `GET /metrics`.
pub async fn metrics(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let model = app.loaded().ok_or_else(|| ApiError::unavailable("the model is being loaded"))?;
    let text = model.metrics.render(&model.names[0], &model.service.stats(), PAGE_TOKENS);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

fn model_json(model: &Model, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": model.created, "owned_by": "quaver", "root": model.text.name(),
        "parent": null, "max_model_len": model.service.limits().context, "device": model.device.name, "permission": []
    })
}

/// `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> ApiResult<Json<Value>> {
    let model = app.model()?;
    let data: Value = model.names.iter().map(|name| model_json(&model, name)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `GET /v1/models/NAME`.
pub async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> ApiResult<Json<Value>> {
    let model = app.model()?;
    model.check_name(Some(&name))?;
    Ok(Json(model_json(&model, &name)))
}

/// `POST /v1/embeddings`, which a language model has none of.
pub async fn embeddings() -> ApiError {
    ApiError::no_route("embeddings are not supported: this model generates text; use /v1/chat/completions")
}

/// A request for tokens.
#[derive(Deserialize)]
pub struct Tokenize {
    model: Option<String>,
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
    #[serde(flatten)]
    conversation: Conversation,
}

/// `POST /tokenize`: the tokens of a text or a conversation.
pub async fn tokenize(State(app): State<Arc<App>>, Body(request, room): Body<Tokenize>) -> ApiResult<Json<Value>> {
    let model = app.model()?;
    model.check_name(request.model.as_deref())?;
    let context = model.service.limits().context;
    let with_names = request.return_token_strs.unwrap_or(false);
    let work = move || {
        // Until the tokens are there.
        let _room = room;
        let tokenizer = model.text.tokenizer()?;
        let tokens = match &request.prompt {
            Some(prompt) if request.add_special_tokens == Some(false) => model.text.encode_text(prompt, false)?,
            // As for a completion: what begins with the begin-of-text token gets no second one.
            Some(prompt) => model.text.encode(&Prompt::Text(prompt.clone()))?,
            None => request.conversation.encode(&model, true)?,
        };
        let names: Option<Vec<String>> =
            with_names.then(|| tokens.iter().map(|id| tokenizer.id_to_token(*id).unwrap_or_default()).collect());
        Ok((tokens, names))
    };
    let (tokens, names) = app.blocking(Work::Text, app.deadline(), work).await?;
    let count = tokens.len();
    Ok(Json(json!({"count": count, "max_model_len": context, "tokens": tokens, "token_strs": names})))
}

/// A request for the text of tokens.
#[derive(Deserialize)]
pub struct Detokenize {
    model: Option<String>,
    tokens: Vec<Value>,
}

/// `POST /detokenize`.
pub async fn detokenize(State(app): State<Arc<App>>, Body(request, room): Body<Detokenize>) -> ApiResult<Json<Value>> {
    let model = app.model()?;
    model.check_name(request.model.as_deref())?;
    model.text.check_count(request.tokens.len())?;
    let work = move || {
        let _room = room;
        let (tokenizer, ids) = (model.text.tokenizer()?, ids(&request.tokens)?);
        let vocab = tokenizer.vocab_size();
        match ids.iter().find(|id| **id as usize >= vocab) {
            Some(&id) => Err(Error::TokenOutOfRange { id, vocab }.into()),
            None => Ok(tokenizer.decode(&ids, false)?),
        }
    };
    let text = app.blocking(Work::Text, app.deadline(), work).await?;
    Ok(Json(json!({"prompt": text})))
}

/// `GET /tokenizer_info`: what a client needs to render prompts itself.
pub async fn tokenizer_info(State(app): State<Arc<App>>) -> ApiResult<Json<Value>> {
    let model = app.model()?;
    let mut info = model.tokenizer_config.as_object().cloned().unwrap_or_else(Map::new);
    info.entry("tokenizer_class").or_insert_with(|| "PreTrainedTokenizerFast".into());
    Ok(Json(Value::Object(info)))
}

/// `GET /`: a page to chat with, in one piece. It asks nobody but this server.
pub async fn page() -> Response {
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
    let headers = [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, policy)];
    (headers, include_str!("page.html")).into_response()
}

/// Any other route.
pub async fn not_found() -> ApiError {
    ApiError::no_route(
        "there is no such route; /v1/chat/completions, /v1/completions and /v1/models are some that there are",
    )
}
