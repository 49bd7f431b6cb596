//! What the handlers share: the options, the model once it is loaded, and whether the server is about to end.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{FromRequest, Request};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::Options;
use super::error::{ApiError, ApiResult};
use super::generation::task_failed;
use super::model::Model;

/// How long a client may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(60);

/// See the module.
pub struct App {
    /// The server's options.
    pub options: Options,
    model: OnceLock<Arc<Model>>,
    draining: AtomicBool,
}

impl App {
    /// Without a model, which may come.
    pub fn new(options: Options) -> Self {
        App { options, model: OnceLock::new(), draining: AtomicBool::new(false) }
    }

    /// The model is loaded. Once.
    pub fn ready(&self, model: Model) {
        // A second one would have nobody to answer to.
        let _ = self.model.set(Arc::new(model));
    }

    /// From now on nothing new is begun.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The model, for a request that begins.
    pub fn model(&self) -> ApiResult<Arc<Model>> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        self.loaded().ok_or_else(|| ApiError::unavailable("the model is being loaded"))
    }

    /// The model, for who only looks.
    pub fn loaded(&self) -> Option<Arc<Model>> {
        self.model.get().cloned()
    }
}

/// The body of a request: JSON, whatever its content type says.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit = app.options.max_body_size;
        let body = Limited::new(request.into_body(), usize::try_from(limit).unwrap_or(usize::MAX));
        let collected = tokio::time::timeout(BODY_TIME, body.collect()).await;
        let late = |_| ApiError::timeout(format!("the request's body did not come within {} s", BODY_TIME.as_secs()));
        let bytes = collected.map_err(late)?.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => ApiError::too_large(limit),
            None => ApiError::malformed(format!("the request's body broke off: {error}")),
        })?;
        serde_json::from_slice(&bytes.to_bytes())
            .map(Body)
            .map_err(|error| ApiError::malformed(format!("the request's body is not what it should be: {error}")))
    }
}

/// Runs what takes a while in a thread where that holds nobody up.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> ApiResult<T> + Send + 'static) -> ApiResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::from(task_failed(error)))?
}

/// A name that nobody else has.
pub fn random_id(prefix: &str) -> String {
    let random = || RandomState::new().hash_one(SystemTime::now());
    format!("{prefix}{:016x}{:016x}", random(), random())
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
