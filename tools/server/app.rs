//! What the handlers share: the options, the model once it is loaded, whether the server is about to end, and how much of
//! what costs memory and time may be under way at once.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{FromRequest, Request};
use axum::http::header;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::Options;
use super::error::{ApiError, ApiResult};
use super::generation::task_failed;
use super::model::Model;

/// How long a client may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(60);

/// Bodies that may be in memory at once, in those of the largest size.
const LARGEST_BODIES: u64 = 4;

/// Bytes of a body from which on it is parsed where that holds nobody up: below, it takes less than the way there.
const LARGE_BODY: usize = 64 << 10;

/// Threads for texts and for grammars, and one that loads the model: neither kind waits for the other.
const TEXTS: usize = 4;
const GRAMMARS: usize = 2;
pub const BLOCKING_THREADS: usize = TEXTS + GRAMMARS + 1;

/// Work that takes a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reading and tokenizing.
    Text,
    /// Compiling what an answer must look like.
    Grammar,
}

/// See the module.
pub struct App {
    /// The server's options.
    pub options: Options,
    model: OnceLock<Arc<Model>>,
    draining: AtomicBool,
    texts: Arc<Semaphore>,
    grammars: Arc<Semaphore>,
    /// Bytes that bodies may still take.
    room: Arc<Semaphore>,
}

impl App {
    /// Without a model, which may come.
    pub fn new(options: Options) -> Self {
        let room = options.max_body_size.saturating_mul(LARGEST_BODIES);
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let [texts, grammars, room] = [TEXTS, GRAMMARS, room].map(|permits| Arc::new(Semaphore::new(permits)));
        App { options, model: OnceLock::new(), draining: AtomicBool::new(false), texts, grammars, room }
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

    /// When a request that begins now must be done.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.options.request_timeout
    }

    /// Runs what takes a while in a thread where that holds nobody up, some of a kind at a time. What waits for its turn
    /// is given up with the request; what has begun is not, and keeps its turn until it is over.
    pub async fn blocking<T: Send + 'static>(
        &self,
        kind: Work,
        deadline: Instant,
        work: impl FnOnce() -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let turns = match kind {
            Work::Text => &self.texts,
            Work::Grammar => &self.grammars,
        };
        let done = async {
            let turn = Arc::clone(turns).acquire_owned().await.map_err(task_failed)?;
            let work = move || {
                let result = work();
                drop(turn);
                result
            };
            tokio::task::spawn_blocking(work).await.map_err(task_failed)?
        };
        timeout_at(deadline, done)
            .await
            .unwrap_or_else(|_| Err(ApiError::request_timeout(self.options.request_timeout)))
    }
}

/// The body of a request: JSON, whatever its content type says; and the room that it takes, to be kept for as long as it.
pub struct Body<T>(pub T, pub Room);

/// Bytes among those that bodies may take.
#[derive(Default)]
pub struct Room(Option<OwnedSemaphorePermit>);

impl Room {
    fn add(&mut self, all: &Arc<Semaphore>, bytes: usize) -> ApiResult<()> {
        let full = "the requests that are being read fill the memory that there is for them; try again in a moment";
        let bytes = u32::try_from(bytes).map_err(|_| ApiError::unavailable(full))?;
        let more = Arc::clone(all).try_acquire_many_owned(bytes).map_err(|_| ApiError::unavailable(full))?;
        match &mut self.0 {
            Some(room) => room.merge(more),
            room => *room = Some(more),
        }
        Ok(())
    }
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let deadline = Instant::now() + BODY_TIME;
        let late = |_| ApiError::timeout(format!("the request's body did not come within {} s", BODY_TIME.as_secs()));
        let (bytes, room) = timeout_at(deadline, read(request, app)).await.map_err(late)??;
        let is_large = bytes.len() >= LARGE_BODY;
        let parse = move || {
            let wrong = |error| ApiError::malformed(format!("the request's body is not what it should be: {error}"));
            serde_json::from_slice(&bytes).map(|value| Body(value, room)).map_err(wrong)
        };
        if is_large { app.blocking(Work::Text, app.deadline(), parse).await } else { parse() }
    }
}

/// The bytes of a body, as long as they are not too many for one or, with those of others, for all.
async fn read(request: Request, app: &App) -> ApiResult<(Vec<u8>, Room)> {
    let limit = app.options.max_body_size;
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    // Before the body is asked for: a client that waits for `100 Continue` need not send it.
    if announced.is_some_and(|length: u64| length > limit) {
        return Err(ApiError::too_large(limit));
    }
    let (mut body, mut bytes, mut room) = (request.into_body(), Vec::new(), Room::default());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| ApiError::malformed(format!("the request's body broke off: {e}")))?;
        // Trailers are nothing to a request.
        let Ok(data) = frame.into_data() else { continue };
        if (bytes.len() + data.len()) as u64 > limit {
            return Err(ApiError::too_large(limit));
        }
        room.add(&app.room, data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, room))
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

#[cfg(test)]
pub mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::LlmOptions;

    /// Options of a server with the demo model that has no port.
    pub fn options(request_timeout: Duration) -> Options {
        Options {
            model: None,
            llm: LlmOptions::default(),
            host: String::new(),
            port: 0,
            names: Vec::new(),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            max_queue: 0,
            max_body_size: 1 << 20,
            request_timeout,
            shutdown_timeout: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn grammars_hold_up_no_text_and_what_was_given_up_before_its_turn_never_begins() {
        let app = Arc::new(App::new(options(Duration::from_secs(600))));
        let mut held = Vec::new();
        for _ in 0..GRAMMARS {
            let ((go, wait), (begun, is_there)) = (channel::<()>(), channel());
            let app = Arc::clone(&app);
            let work = move || {
                begun.send(()).unwrap();
                // Until the other end is dropped.
                let _ = wait.recv();
                Ok(())
            };
            let task = tokio::spawn(async move { app.blocking(Work::Grammar, app.deadline(), work).await });
            while is_there.try_recv().is_err() {
                tokio::task::yield_now().await;
            }
            held.push((task, go));
        }
        assert_eq!(app.blocking(Work::Text, app.deadline(), || Ok(7)).await.unwrap(), 7);
        // One more waits for its turn until its time is over.
        let began = Arc::new(AtomicBool::new(false));
        let begin = Arc::clone(&began);
        let soon = Instant::now() + Duration::from_millis(50);
        let work = move || {
            begin.store(true, Ordering::Relaxed);
            Ok(())
        };
        let late = app.blocking(Work::Grammar, soon, work).await;
        assert!(late.unwrap_err().message().contains("raise --request-timeout"));
        for (task, go) in held {
            drop(go);
            task.await.unwrap().unwrap();
        }
        app.blocking(Work::Grammar, app.deadline(), || Ok(())).await.unwrap();
        assert!(!began.load(Ordering::Relaxed));
    }
}
