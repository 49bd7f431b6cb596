//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with the status that clients expect.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use quaver_core::Error;
use serde_json::{Value, json};

/// The result of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

/// What a client is told went wrong.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>, code: Option<&'static str>) -> Self {
        ApiError { status, message: message.into(), param: None, code }
    }

    /// The request means nothing, or asks for what there is not.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, message, None) }
    }

    /// The body is no request.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message, None)
    }

    /// The body is larger than the server takes.
    pub fn too_large(limit: u64) -> Self {
        let message = format!("the request is larger than {limit} bytes; shorten it, or raise --max-body-size");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message, Some("request_too_large"))
    }

    /// No key, or a wrong one.
    pub fn unauthorized() -> Self {
        let message = "this server wants an API key; send it as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, message, Some("invalid_api_key"))
    }

    /// There is no such model here.
    pub fn no_model(name: &str) -> Self {
        let message = format!("the model `{name}` does not exist here; GET /v1/models lists what does");
        let error = Self::new(StatusCode::NOT_FOUND, message, Some("model_not_found"));
        ApiError { param: Some("model".into()), ..error }
    }

    /// There is no such route.
    pub fn no_route(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message, None)
    }

    /// There is such a route, and it takes another method.
    pub fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "this route does not take that method", None)
    }

    /// The server loads its model, or is about to end.
    pub fn unavailable(message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message, None)
    }

    /// The request took longer than it may.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, message, Some("timeout"))
    }

    /// The request is not done within the time that it may take.
    pub fn request_timeout(limit: std::time::Duration) -> Self {
        let seconds = limit.as_secs();
        Self::timeout(format!("the request is not done after {seconds} s; ask for less, or raise --request-timeout"))
    }

    /// The head of the request has too many lines or bytes.
    pub fn head_too_large(lines: usize, bytes: usize) -> Self {
        let message = format!("the request's headers may be {lines} lines and {bytes} bytes; send fewer");
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message, Some("headers_too_large"))
    }

    /// What a client is told.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The server is at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message, None)
    }

    /// The error's body.
    pub fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::PromptTooLong { .. } | Error::TextTooLong { .. } => {
                Self::new(StatusCode::BAD_REQUEST, message, Some("context_length_exceeded"))
            }
            Error::Sampling { name, .. } => Self::invalid(name, message),
            Error::PromptEmpty | Error::TokenOutOfRange { .. } | Error::Text { .. } => Self::malformed(message),
            Error::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, message, Some("rate_limit_exceeded")),
            _ => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            // A browser asks for the key, as a password, and sends it from then on.
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"quaver\""));
        }
        response
    }
}
