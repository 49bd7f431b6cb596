//! Answers as server-sent events: chunks as they come, errors as data, `[DONE]` at the end, and a comment from time to
//! time so that nobody between takes the connection for dead.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::generation::{Delta, Generation};

/// Between two comments.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What turns a generation into the chunks of one API.
pub trait Chunks: Send + 'static {
    /// Before the first delta.
    fn begin(&mut self, generation: &Generation) -> Vec<Chunk>;
    /// For a delta.
    fn delta(&mut self, generation: &Generation, delta: Delta) -> ApiResult<Vec<Chunk>>;
    /// Behind the last.
    fn end(&mut self, generation: &Generation) -> Vec<Chunk>;
    /// For an error behind which nothing comes.
    fn error(&mut self, error: &ApiError) -> Chunk {
        error.json().into()
    }
    /// The word behind the last chunk, where the API has one.
    const DONE: Option<&'static str> = Some("[DONE]");
}

/// An event: its name, where the API names them, and its data.
pub struct Chunk {
    /// `event:`.
    pub name: Option<&'static str>,
    /// `data:`.
    pub data: Value,
}

impl From<Value> for Chunk {
    fn from(data: Value) -> Self {
        Chunk { name: None, data }
    }
}

impl Chunk {
    fn event(self) -> Event {
        let event = Event::default();
        // Simple readers want the name first.
        let event = if let Some(name) = self.name { event.event(name) } else { event };
        event.data(self.data.to_string())
    }
}

struct Stream<C> {
    generation: Generation,
    chunks: C,
    ready: VecDeque<Event>,
    is_over: bool,
}

impl<C: Chunks> Stream<C> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            let chunks = match self.generation.next().await {
                Some(Ok(delta)) => self.chunks.delta(&self.generation, delta),
                Some(Err(error)) => Err(error),
                None => {
                    self.is_over = true;
                    Ok(self.chunks.end(&self.generation))
                }
            };
            match chunks {
                Ok(chunks) => self.ready.extend(chunks.into_iter().map(Chunk::event)),
                // The status is long gone: the error is data, and the stream ends.
                Err(error) => {
                    self.is_over = true;
                    self.ready.push_back(self.chunks.error(&error).event());
                }
            }
            if self.is_over {
                self.ready.extend(C::DONE.map(|done| Event::default().data(done)));
            }
        }
    }
}

/// The response. Where the client hangs up, the generation is dropped with it.
pub fn respond(generation: Generation, mut chunks: impl Chunks) -> Response {
    let ready = chunks.begin(&generation).into_iter().map(Chunk::event).collect();
    let stream = Stream { generation, chunks, ready, is_over: false };
    let events = unfold(stream, |mut stream| async {
        let event = stream.next().await?;
        Some((Ok::<_, Infallible>(event), stream))
    });
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // nginx would hold the chunks back.
    response.headers_mut().insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}
