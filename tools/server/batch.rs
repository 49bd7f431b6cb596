//! OpenAI's batch files: a request a line in, an answer a line out, through the server's own routes and no network.
//! Answers are appended to `OUT.part`, which becomes OUT when all are there; a run that was broken off goes on with it.
//! What an answer says is final: a failure of this machine is none, and ends the run where it does not pass.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::Request;
use http_body_util::BodyExt;
use quaver_core::{Error, Result};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::app::{App, random_id};
use super::completions::MAX_PROMPTS;
use super::model::Model;
use super::sampling::MAX_N;
use super::{Options, router};

/// Pauses before a request is tried again that failed through no fault of its own.
const PAUSES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(25)];

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Requests of the file.
    pub requests: usize,
    /// Those that an earlier run had answered.
    pub found: usize,
    /// Those whose answer is an error.
    pub failed: usize,
}

/// A request of the file.
struct Line {
    id: String,
    url: String,
    body: Value,
}

/// Answers all requests of `input` into `output`; `on_answer` is told how many of how many there are.
///
/// # Errors
/// Where a line is no request, OUT is there already, the part is another file's or another run's, or this machine fails.
pub fn run(options: Options, input: &Path, output: &Path, on_answer: impl Fn(usize, usize)) -> Result<Summary> {
    let lines = read(input)?;
    let mut part = output.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let taken = || Error::text(output.display().to_string(), "is there already; delete it or name another file");
    if output.exists() {
        return Err(taken());
    }
    let (mut file, done) = open_part(&part, &lines)?;
    // Where another run has just become ready, its part is OUT now, and this one may be it.
    if output.exists() {
        return Err(taken());
    }
    let requests = lines.len();
    let mut summary = Summary { requests, found: done.len(), failed: 0 };
    let rest: Vec<Line> = lines.into_iter().filter(|line| !done.contains(&line.id)).collect();
    if !rest.is_empty() {
        let side_by_side = options.llm.engine.max_num_seqs;
        let largest = rest.iter().map(Line::answers).max().unwrap_or(1);
        let most = side_by_side.saturating_mul(largest);
        let model = Model::load(options.model.as_deref(), &options.llm, &options.names, most)?;
        let app = Arc::new(App::new(options));
        app.ready(model);
        let write = |e| Error::io("write", &part, e);
        answer_all(&app, rest, side_by_side, |answer| {
            // The whole line at once: a kill leaves at most its beginning, which the next run cuts off.
            file.write_all(format!("{answer}\n").as_bytes()).map_err(write)?;
            summary.failed += usize::from(answer["response"]["status_code"] != 200);
            summary.found += 1;
            on_answer(summary.found, requests);
            Ok(())
        })?;
        summary.found = done.len();
    }
    file.sync_all().and_then(|()| fs::rename(&part, output)).map_err(|e| Error::io("write", output, e))?;
    Ok(summary)
}

fn read(input: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(input).map_err(|e| Error::io("read", input, e))?;
    let mut ids = HashSet::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let lines = lines.map(|(i, line)| {
        let wrong = |why: String| Error::text(format!("{}, line {}", input.display(), i + 1), why);
        let mut value: Value = serde_json::from_str(line).map_err(|e| wrong(format!("is not JSON: {e}")))?;
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let (Some(id), Some(url)) = (text("custom_id"), text("url").filter(|url| url.starts_with('/'))) else {
            return Err(wrong("must have a custom_id, and a url such as /v1/chat/completions".into()));
        };
        if !ids.insert(id.clone()) {
            return Err(wrong(format!("has the custom_id {id} of an earlier line; each must have its own")));
        }
        let mut body = value["body"].take();
        // An answer here is one object.
        body.as_object_mut().map(|body| body.remove("stream"));
        Ok(Line { id, url, body })
    });
    lines.collect()
}

impl Line {
    /// How many answers it asks for; a request that is refused has none.
    fn answers(&self) -> usize {
        let prompts = match &self.body["prompt"] {
            Value::Array(items) if !items.first().is_some_and(Value::is_number) => items.len(),
            _ => 1,
        };
        let n = self.body["n"].as_u64().map_or(1, |n| n.min(MAX_N as u64) as usize);
        prompts.clamp(1, MAX_PROMPTS) * n.max(1)
    }
}

/// The file of answers so far, this run's alone, cut behind its last whole line, and whose they are.
fn open_part(part: &Path, lines: &[Line]) -> Result<(File, HashSet<String>)> {
    let write = |e| Error::io("write", part, e);
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(part).map_err(write)?;
    file.try_lock().map_err(|e| match e {
        TryLockError::WouldBlock => {
            Error::text(part.display().to_string(), "is being written by another run; wait for it or name another file")
        }
        TryLockError::Error(e) => write(e),
    })?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| Error::io("read", part, e))?;
    let asked: HashSet<&str> = lines.iter().map(|line| line.id.as_str()).collect();
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let mut done = HashSet::new();
    for line in bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let answer: Value = serde_json::from_slice(line).unwrap_or_default();
        match answer["custom_id"].as_str() {
            Some(id) if asked.contains(id) => done.insert(id.to_owned()),
            _ => {
                let why = "holds answers to other requests; delete it or name another file";
                return Err(Error::text(part.display().to_string(), why));
            }
        };
    }
    file.set_len(whole as u64).map_err(write)?;
    Ok((file, done))
}

/// Answers requests, so many side by side, in any order.
fn answer_all(
    app: &Arc<App>,
    lines: Vec<Line>,
    side_by_side: usize,
    mut on_answer: impl FnMut(Value) -> Result<()>,
) -> Result<()> {
    let failed = |e| Error::device("batch", format!("no threads to work with ({e}); free some memory"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(failed)?;
    let result = runtime.block_on(async {
        let queue = Arc::new(Mutex::new(lines.into_iter()));
        let (sender, mut answers) = tokio::sync::mpsc::channel(side_by_side);
        for _ in 0..side_by_side {
            let (queue, sender, router) = (Arc::clone(&queue), sender.clone(), router(app));
            tokio::spawn(async move {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(line) = next else { return };
                    if sender.send(answer(router.clone(), line, &PAUSES).await).await.is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        while let Some(answer) = answers.recv().await {
            on_answer(answer?)?;
        }
        Ok(())
    });
    runtime.shutdown_background();
    result
}

/// One line of the answers. Where this machine is at fault the request is tried again.
async fn answer(router: axum::Router, line: Line, pauses: &[Duration]) -> Result<Value> {
    let body = Bytes::from(line.body.to_string());
    let mut pauses = pauses.iter();
    let (status, body) = loop {
        let (status, body) = ask(router.clone(), &line.url, body.clone()).await;
        if status != 429 && status < 500 {
            break (status, body);
        }
        let Some(pause) = pauses.next() else {
            let why = body["error"]["message"].as_str().unwrap_or("no reason was given").to_owned();
            let why = format!("failed with status {status} ({why}); the answers so far are kept, run it again");
            return Err(Error::device(format!("request {}", line.id), why));
        };
        tokio::time::sleep(*pause).await;
    };
    Ok(json!({
        "id": random_id("batch_req_"), "custom_id": line.id, "error": null,
        "response": {"status_code": status, "request_id": random_id("req-"), "body": body}
    }))
}

/// Status and body of what a route answers.
async fn ask(router: axum::Router, url: &str, body: Bytes) -> (u16, Value) {
    let request = match Request::post(url).body(Body::from(body)) {
        Ok(request) => request,
        Err(error) => return (400, json!({"error": {"message": format!("url: {error}")}})),
    };
    let response = match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    (status, serde_json::from_slice(&bytes).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::http::StatusCode;
    use axum::routing::post;

    use super::*;

    /// What a request becomes where the first so many times are failures of this machine.
    async fn failing(times: usize) -> (Result<Value>, usize) {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let route = post(move || async move {
            match counted.fetch_add(1, Ordering::Relaxed) {
                n if n >= times => (StatusCode::OK, r#"{"all": "well"}"#),
                n if n % 2 == 0 => (StatusCode::INTERNAL_SERVER_ERROR, r#"{"error": {"message": "broken"}}"#),
                _ => (StatusCode::TOO_MANY_REQUESTS, r#"{"error": {"message": "full"}}"#),
            }
        });
        let line = Line { id: "a".into(), url: "/x".into(), body: json!({}) };
        let answer = answer(axum::Router::new().route("/x", route), line, &[Duration::ZERO; 3]).await;
        (answer, asked.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn what_fails_through_no_fault_of_its_own_is_tried_again_and_never_recorded() {
        for times in 0..=3 {
            let (answer, asked) = failing(times).await;
            let response = &answer.unwrap()["response"];
            assert_eq!((&response["status_code"], &response["body"]["all"]), (&json!(200), &json!("well")));
            assert_eq!(asked, times + 1);
        }
        let (answer, asked) = failing(4).await;
        let why = "request a: failed with status 429 (full); the answers so far are kept, run it again";
        assert_eq!((answer.unwrap_err().to_string(), asked), (why.into(), 4));
    }

    #[test]
    fn a_line_takes_as_many_places_as_it_asks_for_answers() {
        let answers = |body| Line { id: String::new(), url: String::new(), body }.answers();
        assert_eq!(answers(json!({"messages": []})), 1);
        assert_eq!(answers(json!({"prompt": [1, 2, 3], "n": 3})), 3);
        assert_eq!(answers(json!({"prompt": ["a", "b"], "n": 3})), 6);
        assert_eq!(answers(json!({"prompt": [[1], [2]]})), 2);
        // These are refused.
        assert_eq!(answers(json!({"prompt": [], "n": 0})), 1);
        assert_eq!(answers(json!({"n": u64::MAX})), MAX_N);
    }
}
