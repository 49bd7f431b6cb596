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

#[test]
fn nothing_is_lost_or_leaked_whatever_clients_do() {
    let count = std::env::var("QUAVER_SOAK").map_or(240, |count| count.parse().unwrap());
    // Pages are few, so that sequences must give theirs up.
    let args = ["--max-num-seqs", "24", "--max-model-len", "1024", "--kv-cache-memory", "8M", "--max-queue", "1000"];
    let server = Server::start(&args);
    clients(&server, 0..count / 2, 64);
    let before = memory(&server);
    clients(&server, count / 2..count, 64);
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    let (ended, after) = (server.metric("vllm:request_success_total"), memory(&server));
    // Each that was well-formed ended once for every answer: of ten, one is none and three of five have two.
    let answers = (0..count).filter(|i| i % 10 != 3).map(|i| if [1, 5, 9].contains(&(i % 10)) { 1 + i % 2 } else { 1 });
    assert_eq!(ended, answers.sum::<usize>() as f64);
    assert_eq!([server.metric("vllm:num_requests_running"), server.metric("vllm:num_requests_waiting")], [0.0, 0.0]);
    assert!(after < before + before / 4 + 16 * 1024, "memory went from {before} to {after} KiB");
    println!(
        "{count} requests: {before} KiB, then {after} KiB; {} preemptions",
        server.metric("vllm:num_preemptions_total")
    );
    server.signal();
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(!log.iter().any(|line| line.contains("panicked") || line.contains(" ERROR ")), "{log:?}");
}

#[test]
fn sigterm_in_the_middle_loses_no_accepted_request() {
    let server = Server::start(&["--max-num-seqs", "4"]);
    let (accepted, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for i in 0..24 {
            let (server, accepted, refused) = (&server, &accepted, &refused);
            scope.spawn(move || {
                let body = chat(HOOK.0, json!({"stream": true, "max_tokens": 100, "seed": i})).to_string();
                let response = server.agent.post(format!("{}{CHAT}", server.url)).send(body);
                // Once the last answer is given, nobody listens any more.
                let Ok(response) = response else { return refused.fetch_add(1, Ordering::Relaxed) };
                if response.status() == 503 {
                    return refused.fetch_add(1, Ordering::Relaxed);
                }
                let answer = chunks(std::io::BufReader::new(response.into_body().into_reader()));
                assert_eq!(answer.last().unwrap()["choices"][0]["finish_reason"], "stop");
                accepted.fetch_add(1, Ordering::Relaxed)
            });
        }
        server.wait_until(|server| server.metric("vllm:num_requests_running") > 0.0);
        server.signal();
    });
    assert_eq!(accepted.into_inner() + refused.into_inner(), 24);
    assert_eq!(server.end().0, Some(0));
}
