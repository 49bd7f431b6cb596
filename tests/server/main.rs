//! The server as a client sees it: the built binary, over HTTP.

#[path = "../support/mod.rs"]
mod support;

mod answers;
mod batch;
mod bench;
mod fuzz;
mod operation;
mod soak;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

/// What the demo model answers at temperature 0.
const HOOK: (&str, &str) = ("Who is Captain Hook?", "Captain Hook is a pirate, and the great enemy of Peter Pan.");

/// A running server; killed where a test forgets it.
struct Server {
    child: Child,
    url: String,
    log: Arc<Mutex<Vec<String>>>,
    /// Reads the log to its end.
    reader: Option<thread::JoinHandle<()>>,
    agent: ureq::Agent,
}

/// An answer.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: ureq::http::HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Status and message of an error.
    fn error(&self) -> (u16, String) {
        (self.status, self.json()["error"]["message"].as_str().unwrap().to_owned())
    }
}

impl Server {
    /// Starts one with the demo model and waits until it is ready.
    fn start(args: &[&str]) -> Self {
        let server = Self::spawn(args, &[]);
        server.wait_until(|server| server.get("/health").status == 200);
        server
    }

    fn spawn(args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quaver"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("QUAVER_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        command.args(["serve", "--backend", "cpu", "--threads", "2", "--port", "0"]).args(args);
        command.envs(env.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut url = None;
        for line in lines.by_ref() {
            let found = line.split_once("http://").map(|(_, rest)| rest.split([';', '"']).next().unwrap().to_owned());
            log.lock().unwrap().push(line);
            if let Some(address) = found {
                url = Some(format!("http://{address}"));
                break;
            }
        }
        let url = url.unwrap_or_else(|| panic!("no address in {:?}", log.lock().unwrap()));
        let kept = Arc::clone(&log);
        // Until the server ends: a full pipe would stop it.
        let reader = Some(thread::spawn(move || lines.for_each(|line| kept.lock().unwrap().push(line))));
        // A draining server closes idle connections.
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_idle_connections(0)
            .timeout_global(Some(Duration::from_secs(120)));
        Server { child, url, log, reader, agent: config.build().new_agent() }
    }

    /// Waits for what must come, and gives up when a machine would have had time for it many times over.
    fn wait_until(&self, is_so: impl Fn(&Server) -> bool) {
        for _ in 0..3000 {
            if is_so(self) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("it never came: {:?}", self.log.lock().unwrap());
    }

    fn get(&self, path: &str) -> Reply {
        Self::reply(self.agent.get(format!("{}{path}", self.url)).call())
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, &body.to_string(), &[])
    }

    fn post_text(&self, path: &str, body: &str, headers: &[(&str, &str)]) -> Reply {
        let request = self.agent.post(format!("{}{path}", self.url));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        Self::reply(request.send(body))
    }

    fn reply(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Reply {
        let mut response = result.unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        Reply { status: response.status().as_u16(), headers: response.headers().clone(), text }
    }

    /// A stream that was begun.
    fn stream(&self, path: &str, body: &Value) -> BufReader<impl Read + use<>> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = self.agent.post(format!("{}{path}", self.url)).send(body.to_string()).unwrap();
        assert_eq!(response.status().as_u16(), 200);
        BufReader::new(response.into_body().into_reader())
    }

    /// The value of a metric, of all its labels together.
    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text;
        let lines = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Sends the first SIGTERM and waits until it is heard.
    fn drain(&self) {
        self.signal();
        // A connection that was just being opened may be closed without an answer.
        self.wait_until(|server| {
            server.agent.get(format!("{}/health", server.url)).call().is_ok_and(|reply| reply.status() == 503)
        });
    }

    fn signal(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// Waits for the end, and gives the exit code and the log.
    fn end(mut self) -> (Option<i32>, Vec<String>) {
        let code = self.child.wait().unwrap().code();
        self.reader.take().unwrap().join().unwrap();
        (code, std::mem::take(&mut self.log.lock().unwrap()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already where the test waited for that.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The chunks of a stream up to its end, which is `[DONE]`.
fn chunks(stream: impl BufRead) -> Vec<Value> {
    let mut data: Vec<String> =
        stream.lines().map(Result::unwrap).filter_map(|line| Some(line.strip_prefix("data: ")?.to_owned())).collect();
    assert_eq!(data.pop().as_deref(), Some("[DONE]"));
    data.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
}

/// A greedy chat of one question, with more fields.
fn chat(question: &str, fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": question}], "temperature": 0});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}
