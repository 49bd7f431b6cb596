//! What the log says of a request when it is over, with its body: how it went, what it took, and whether the client
//! stayed to the end.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use hyper::body::{Frame, SizeHint};

use super::app::random_id;
use super::generation::Usage;

tokio::task_local! {
    /// The request that this task answers, or that a line of the log is about.
    pub static REQUEST: Arc<Account>;
}

/// The id of the request that this task answers, or that the line which is being logged is about.
pub fn request_id() -> Option<String> {
    REQUEST.try_with(|account| account.id.clone()).ok()
}

/// The id of an answer: made of the request's id where the client gave one, as vLLM does.
pub fn answer_id(prefix: &str) -> String {
    let given = REQUEST.try_with(|account| account.is_given.then(|| format!("{prefix}{}", account.id)));
    given.ok().flatten().unwrap_or_else(|| random_id(prefix))
}

/// The account of the request that this task answers; nobody reads it where there is none.
pub fn account() -> Arc<Account> {
    REQUEST.try_with(Arc::clone).unwrap_or_else(|_| Account::new(String::new(), None))
}

/// See the module.
pub struct Account {
    id: String,
    /// The client gave it.
    is_given: bool,
    /// Method and path.
    what: String,
    start: Instant,
    /// The tokens, where there were any, and what ended the answer besides its end.
    spent: Mutex<(Usage, Option<String>)>,
}

impl Account {
    /// Of a request that begins, with the id that the client gave it.
    pub fn new(what: String, id: Option<&str>) -> Arc<Self> {
        let (is_given, start) = (id.is_some(), Instant::now());
        let id = id.map_or_else(|| random_id("req-"), str::to_owned);
        Arc::new(Account { id, is_given, what, start, spent: Mutex::default() })
    }

    /// The request's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// So many tokens were read and written.
    pub fn count(&self, usage: Usage) {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner).0 = usage;
    }

    /// It failed when the head of its answer may have been written.
    pub fn fail(&self, why: &str) {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(why.to_owned());
    }

    /// The line.
    fn line(&self, status: Option<StatusCode>, is_whole: bool) -> String {
        let (usage, failed) = self.spent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut line = match (status.map(|status| status.as_u16()), is_whole) {
            (Some(status), true) => format!("{} gave {status}", self.what),
            (Some(status), false) => format!("{} gave {status} and was broken off", self.what),
            (None, _) => format!("{} was broken off", self.what),
        };
        line += &format!(" after {} ms", self.start.elapsed().as_millis());
        if usage != Usage::default() {
            line += &format!(", {} tokens read, {} written", usage.prompt, usage.completion);
        }
        if let Some(why) = failed {
            line += &format!(": {why}");
        }
        line + &format!(" (request {})", self.id)
    }
}

/// A request on its way to the end of its answer's body: where it is dropped, the line is written.
pub struct Followed {
    account: Arc<Account>,
    status: Option<StatusCode>,
    is_whole: bool,
}

impl Followed {
    /// A request that begins; `is_whole` where its answer has no body.
    pub fn new(account: Arc<Account>, is_whole: bool) -> Self {
        Followed { account, status: None, is_whole }
    }

    /// The head of the answer is there.
    pub fn began(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// A body that is followed to its end.
    pub fn body(mut self, body: Body) -> Body {
        self.is_whole |= hyper::body::Body::is_end_stream(&body);
        Body::new(FollowedBody { body, followed: self })
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let log = || log::info!("{}", self.account.line(self.status, self.is_whole));
        REQUEST.sync_scope(Arc::clone(&self.account), log);
    }
}

/// The body goes first, and with it a generation, which says what it took.
struct FollowedBody {
    body: Body,
    followed: Followed,
}

impl hyper::body::Body for FollowedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.followed.is_whole |= frame.is_none() || self.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
