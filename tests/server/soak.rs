//! Many clients at once: most ask and are answered, some hang up in the middle, some send nonsense. `QUAVER_SOAK=10000`
//! makes it long.

use std::io::BufRead;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::json;

use super::{HOOK, Server, chat, chunks};

const CHAT: &str = "/v1/chat/completions";

/// KiB of memory that a process holds.
fn memory(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Request number `i`; true where it was answered as it should be.
fn client(server: &Server, i: usize) -> bool {
    match i % 10 {
        3 => server.post_text(CHAT, &format!("{{\"messages\": {i}"), &[]).status == 400,
        7 => {
            let mut stream =
                server.stream(CHAT, &chat("Tell me a story.", json!({"max_tokens": 400, "ignore_eos": true})));
            (0..i % 7).all(|_| stream.read_line(&mut String::new()).is_ok())
        }
        n if n % 2 == 0 => {
            let answer = chunks(server.stream(CHAT, &chat(HOOK.0, json!({}))));
            let text: String = answer.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
            text == HOOK.1
        }
        _ => {
            let body =
                json!({"prompt": format!("Chapter {i}"), "max_tokens": 8, "temperature": 1, "seed": i, "n": 1 + i % 2});
            let reply = server.post("/v1/completions", &body);
            reply.status == 200 && reply.json()["choices"].as_array().unwrap().len() == 1 + i % 2
        }
    }
}

/// Runs clients with these numbers, so many at a time.
fn clients(server: &Server, numbers: std::ops::Range<usize>, side_by_side: usize) {
    let next = AtomicUsize::new(numbers.start);
    thread::scope(|scope| {
        for _ in 0..side_by_side {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= numbers.end {
                        return;
                    }
                    assert!(client(server, i), "request {i}");
                }
            });
        }
    });
}

/// KiB that memory grows by a sample, by least squares.
fn slope(samples: &[u64]) -> f64 {
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / samples.len() as f64;
    let (x, y) = (mean(&mut (0..samples.len()).map(|i| i as f64)), mean(&mut samples.iter().map(|s| *s as f64)));
    let of =
        |f: fn(f64, f64) -> f64| samples.iter().enumerate().map(|(i, s)| f(i as f64 - x, *s as f64 - y)).sum::<f64>();
    of(|dx, dy| dx * dy) / of(|dx, _| dx * dx)
}

#[test]
fn nothing_is_lost_or_leaked_whatever_clients_do() {
    let count = std::env::var("QUAVER_SOAK").map_or(240, |count| count.parse().unwrap());
    // Pages are few, so that sequences wait for them.
    let args = ["--max-num-seqs", "24", "--max-model-len", "512", "--kv-cache-memory", "1600K", "--max-queue", "1000"];
    let server = Server::start(&args);
    // The first half brings every buffer to its size. In the long run what follows is sampled many times.
    clients(&server, 0..count / 2, 64);
    let parts = (count / 1000).clamp(1, 20);
    let at = |part: usize| count / 2 + part * (count - count / 2) / parts;
    let mut samples = vec![memory(&server)];
    for part in 0..parts {
        clients(&server, at(part)..at(part + 1), 64);
        samples.push(memory(&server));
    }
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    // Each that was well-formed ended once for every answer: of ten, one is none and three of five have two.
    let answers = (0..count).filter(|i| i % 10 != 3).map(|i| if [1, 5, 9].contains(&(i % 10)) { 1 + i % 2 } else { 1 });
    assert_eq!(server.metric("vllm:request_success_total"), answers.sum::<usize>() as f64);
    assert_eq!([server.metric("vllm:num_requests_running"), server.metric("vllm:num_requests_waiting")], [0.0, 0.0]);
    let (before, after) = (samples[0], samples[samples.len() - 1]);
    assert!(after < before + before / 4 + 16 * 1024, "memory went from {before} to {after} KiB");
    if samples.len() > 4 {
        // Of what a request leaves behind, a token's text would be more.
        let a_request = slope(&samples) / ((count - count / 2) / parts) as f64;
        assert!(a_request < 0.5, "memory grows by {a_request} KiB a request: {samples:?}");
    }
    println!("{count} requests: {samples:?} KiB; {} preemptions", server.metric("vllm:num_preemptions_total"));
    server.signal();
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(!log.iter().any(|line| line.contains("panicked") || line.contains(" ERROR ")), "{log:?}");
}

/// What became of a request around the end of a server.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// Answered to its end.
    Answered,
    /// Told that the server is shutting down.
    Refused,
    /// Not taken: nobody listened, or the connection was closed before a byte of an answer.
    NotTaken,
}

fn fate(server: &Server, i: usize) -> Fate {
    let is_stream = i.is_multiple_of(2);
    let body = chat(HOOK.0, json!({"stream": is_stream, "max_tokens": 100, "seed": i})).to_string();
    let Ok(response) = server.agent.post(format!("{}{CHAT}", server.url)).send(body) else { return Fate::NotTaken };
    if response.status() == 503 {
        return Fate::Refused;
    }
    assert_eq!(response.status(), 200, "request {i}");
    // From here on it was accepted: whatever breaks off is a loss.
    let mut body = std::io::BufReader::new(response.into_body().into_reader());
    let (text, finish) = if is_stream {
        let chunks = chunks(body);
        let text = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect::<String>();
        (text, chunks.last().unwrap()["choices"][0]["finish_reason"].clone())
    } else {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut body, &mut text).unwrap();
        let choice = serde_json::from_str::<serde_json::Value>(&text).unwrap()["choices"][0].take();
        (choice["message"]["content"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
    };
    assert_eq!((text.as_str(), &finish), (HOOK.1, &json!("stop")), "request {i}");
    Fate::Answered
}

#[test]
fn sigterm_in_the_middle_loses_no_accepted_request() {
    let server = Server::start(&["--max-num-seqs", "4"]);
    let counted = |fates: &[Fate], fate| fates.iter().filter(|f| **f == fate).count();
    let fates: Vec<Fate> = thread::scope(|scope| {
        let ask = |i| {
            let server = &server;
            scope.spawn(move || fate(server, i))
        };
        let mut clients: Vec<_> = (0..24).map(ask).collect();
        server.wait_until(|server| server.metric("vllm:num_requests_running") > 0.0);
        server.signal();
        clients.extend((24..48).map(ask));
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let (code, log) = server.end();
    assert!(code == Some(0) && log.iter().any(|line| line.ends_with("ended")), "{log:?}");
    assert!(counted(&fates, Fate::Answered) > 0, "{fates:?}");
    // What the server took it answered: those that it logs as answered are those that were.
    let logged = log.iter().filter(|line| line.contains(&format!("POST {CHAT} gave 200 after"))).count();
    assert_eq!(logged, counted(&fates, Fate::Answered), "{fates:?}: {log:?}");
    let lost = log.iter().find(|line| line.contains("broken off") && line.contains("tokens read"));
    assert_eq!(lost, None, "{fates:?}");
}
