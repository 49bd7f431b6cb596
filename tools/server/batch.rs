//! OpenAI's batch files: a request a line in, an answer a line out, through the server's own routes and no network.
//! Answers are appended to `OUT.part`, which becomes OUT when all are there; a run that was broken off goes on with it.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use quaver_core::{Error, Result};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::app::{App, random_id};
use super::model::Model;
use super::{Options, router};

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
/// Where a line is no request, OUT is there already, or the part is another file's.
pub fn run(options: Options, input: &Path, output: &Path, on_answer: impl Fn(usize, usize)) -> Result<Summary> {
    let lines = read(input)?;
    if output.exists() {
        return Err(Error::text(output.display().to_string(), "is there already; delete it or name another file"));
    }
    let mut part = output.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let (mut file, done) = open_part(&part, &lines)?;
    let requests = lines.len();
    let mut summary = Summary { requests, found: done.len(), failed: 0 };
    let rest: Vec<Line> = lines.into_iter().filter(|line| !done.contains(&line.id)).collect();
    if !rest.is_empty() {
        let side_by_side = options.llm.engine.max_num_seqs;
        let model = Model::load(options.model.as_deref(), &options.llm, &options.names, side_by_side.max(128))?;
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

/// The file of answers so far, cut behind its last whole line, and whose they are.
fn open_part(part: &Path, lines: &[Line]) -> Result<(File, HashSet<String>)> {
    let bytes = match fs::read(part) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(Error::io("read", part, e)),
    };
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
    let open = || {
        let file = OpenOptions::new().create(true).append(true).open(part)?;
        file.set_len(whole as u64)?;
        Ok(file)
    };
    Ok((open().map_err(|e| Error::io("write", part, e))?, done))
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
                    if sender.send(answer(router.clone(), line).await).await.is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        while let Some(answer) = answers.recv().await {
            on_answer(answer)?;
        }
        Ok(())
    });
    runtime.shutdown_background();
    result
}

/// One line of the answers.
async fn answer(router: axum::Router, line: Line) -> Value {
    let request = Request::post(&line.url).body(Body::from(line.body.to_string()));
    let (status, body) = match request {
        Ok(request) => match router.oneshot(request).await {
            Ok(response) => {
                let status = response.status().as_u16();
                let bytes = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                (status, serde_json::from_slice(&bytes).unwrap_or_default())
            }
            Err(never) => match never {},
        },
        Err(error) => (400, json!({"error": {"message": format!("url: {error}")}})),
    };
    json!({
        "id": random_id("batch_req_"), "custom_id": line.id, "error": null,
        "response": {"status_code": status, "request_id": random_id("req-"), "body": body}
    })
}
