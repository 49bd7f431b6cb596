//! A request's way into the engine: its places are taken, and its time runs, before anything of it costs time.

use std::sync::Arc;

use quaver_core::service::Places;
use tokio::time::Instant;

use super::app::{App, Room, Work};
use super::error::{ApiError, ApiResult};
use super::model::Model;
use super::structure::{Grammar, Guides};

/// See the module.
pub struct Admission {
    /// The model that will answer.
    pub model: Arc<Model>,
    /// One for each answer.
    pub places: Places,
    /// When the request began.
    pub start: Instant,
    /// When it must be done.
    pub deadline: Instant,
    app: Arc<App>,
    /// What the request's body takes of memory, until it is tokens.
    _room: Room,
}

impl Admission {
    /// Takes places for so many answers.
    ///
    /// # Errors
    /// Where so many are not free, or never can be.
    pub fn new(app: &Arc<App>, model: &Arc<Model>, answers: usize, room: Room) -> ApiResult<Self> {
        let most = model.service.most();
        if answers > most {
            let why =
                format!("{answers} answers are asked for, at most {most} can be under way; ask for fewer at a time");
            return Err(ApiError::invalid("prompt", why));
        }
        let places = model.service.reserve(answers)?;
        let (start, deadline) = (Instant::now(), app.deadline());
        Ok(Admission { model: Arc::clone(model), places, start, deadline, app: Arc::clone(app), _room: room })
    }

    /// Runs what takes a while. Where the request is given up, what has begun still holds its places: clients that hang
    /// up cannot begin more than the queue takes.
    pub async fn prepare<T: Send + 'static>(
        self,
        kind: Work,
        work: impl FnOnce(&Model) -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<(Self, T)> {
        let (app, deadline) = (Arc::clone(&self.app), self.deadline);
        let work = move || {
            let value = work(&self.model)?;
            Ok((self, value))
        };
        app.blocking(kind, deadline, work).await
    }

    /// Compiles the form of the answers, where the request has one.
    pub async fn guides(self, grammar: Option<Grammar>) -> ApiResult<(Self, Guides)> {
        match grammar {
            Some(_) => self.prepare(Work::Grammar, |model| Ok(model.guides(grammar)?)).await,
            None => {
                let guides = self.model.guides(None)?;
                Ok((self, guides))
            }
        }
    }
}
