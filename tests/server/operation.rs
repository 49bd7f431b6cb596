//! How a server is run: keys, limits, logs, its config file, and its end.

use std::io::{BufRead, Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use super::{HOOK, Server, chat, chunks};

const CHAT: &str = "/v1/chat/completions";

/// An answer that takes a while.
fn long() -> Value {
    chat("Tell me a story.", json!({"ignore_eos": true, "max_tokens": 3000}))
}

#[test]
fn every_route_but_health_wants_a_key() {
    let server = Server::start(&["--api-key", "sk-one,sk-two"]);
    let ask = |headers: &[(&str, &str)]| server.post_text(CHAT, &chat(HOOK.0, json!({})).to_string(), headers).status;
    for path in ["/v1/models", "/metrics", "/version", "/", "/no/route"] {
        let reply = server.get(path);
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
    }
    assert_eq!(server.get("/health").status, 200);
    for wrong in ["Bearer sk-", "Bearer sk-one ,", "sk-one", "Bearer "] {
        assert_eq!(ask(&[("authorization", wrong)]), 401, "{wrong}");
    }
    assert_eq!(
        [ask(&[("authorization", "Bearer sk-one")]), ask(&[("authorization", "Bearer sk-two")]), ask(&[])],
        [200, 200, 401]
    );
}

#[test]
fn other_origins_may_ask_only_where_they_are_named() {
    let allowed = |server: &Server, origin: &str| {
        let request = server.agent.get(format!("{}/version", server.url)).header("origin", origin);
        Server::reply(request.call()).header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(allowed(&Server::start(&[]), "https://a.example"), None);
    let server = Server::start(&["--cors-origin", "https://a.example"]);
    assert_eq!(allowed(&server, "https://a.example").as_deref(), Some("https://a.example"));
    assert_eq!(allowed(&server, "https://b.example"), None);
}

#[test]
fn a_full_queue_refuses_and_a_client_that_hangs_up_frees_its_pages() {
    let server = Server::start(&["--max-num-seqs", "1", "--max-queue", "0"]);
    let mut stream = server.stream(CHAT, &long());
    stream.read_line(&mut String::new()).unwrap();
    server.wait_until(|server| server.metric("quaver:kv_pages_used") > 0.0);
    let refused = server.post(CHAT, &chat(HOOK.0, json!({})));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    drop(stream);
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    assert_eq!(server.post(CHAT, &chat(HOOK.0, json!({}))).status, 200);
    // So does one that asked for the whole answer, and goes before it is there.
    let mut client = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    let body = long().to_string();
    write!(client, "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    server.wait_until(|server| server.metric("quaver:kv_pages_used") > 0.0);
    drop(client);
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    server.wait_until(|server| server.get("/metrics").text.contains(r#"finished_reason="abort"} 2"#));
}

#[test]
fn a_request_that_takes_too_long_ends_in_an_error_also_within_a_stream() {
    let server = Server::start(&["--request-timeout", "0"]);
    assert_eq!(server.post(CHAT, &long()).status, 504);
    let last = chunks(server.stream(CHAT, &long())).pop().unwrap();
    assert_eq!(last["error"]["code"], "timeout");
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
}

#[test]
fn request_ids_are_kept_or_given() {
    let server = Server::start(&[]);
    let reply = server.post_text("/tokenize", r#"{"prompt": "a"}"#, &[("x-request-id", "mine-7")]);
    assert_eq!(reply.header("x-request-id"), Some("mine-7"));
    assert!(server.get("/health").header("x-request-id").unwrap().starts_with("req-"));
    let is_logged = |server: &Server| {
        server
            .log
            .lock()
            .unwrap()
            .iter()
            .any(|line| line.contains("POST /tokenize gave 200") && line.contains("mine-7"))
    };
    server.wait_until(is_logged);
}

#[test]
fn sigterm_refuses_what_is_new_and_finishes_what_was_begun() {
    let server = Server::start(&[]);
    let mut stream = server.stream(CHAT, &long());
    stream.read_line(&mut String::new()).unwrap();
    server.drain();
    let refused = server.post(CHAT, &chat(HOOK.0, json!({})));
    assert_eq!(refused.error(), (503, "the server is shutting down".into()));
    let answer = chunks(stream);
    assert_eq!(answer.last().unwrap()["choices"][0]["finish_reason"], "length");
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(log.last().unwrap().ends_with("ended"), "{log:?}");
}

#[test]
fn a_second_signal_ends_at_once() {
    let server = Server::start(&[]);
    let mut stream = server.stream(CHAT, &chat("Hi", json!({"ignore_eos": true, "n": 8, "temperature": 1})));
    stream.read_line(&mut String::new()).unwrap();
    server.drain();
    server.signal();
    let mut rest = Vec::new();
    // The stream breaks off, as an error or as an early end.
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(log.last().unwrap().contains("were broken off"), "{log:?}");
}

#[test]
fn flags_come_from_a_file_a_variable_and_the_command_line_in_this_order() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("quaver.toml");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "max-model-len = 100\nserved_model_name = [\"x\", \"y\"]\nlog-format = \"json\"\nno-prefix-caching = true\n",
    )
    .unwrap();
    let length = |server: &Server| {
        server.wait_until(|server| server.get("/health").status == 200);
        server.get("/v1/models").json()["data"][0]["max_model_len"].as_u64()
    };
    let server = Server::spawn(&["--config", path], &[]);
    assert_eq!(length(&server), Some(100));
    assert_eq!(server.get("/v1/models").json()["data"][1]["id"], "y");
    for _ in 0..2 {
        server.post(CHAT, &chat(HOOK.0, json!({})));
    }
    assert_eq!(server.metric("vllm:prefix_cache_queries_total"), 0.0);
    let line: Value = serde_json::from_str(&server.log.lock().unwrap()[0]).unwrap();
    assert!(line["message"].as_str().unwrap().starts_with("listening on") && line["level"] == "INFO");
    assert_eq!(length(&Server::spawn(&["--config", path], &[("QUAVER_MAX_MODEL_LEN", "200")])), Some(200));
    let all = Server::spawn(&["--max-model-len", "300"], &[("QUAVER_MAX_MODEL_LEN", "200"), ("QUAVER_CONFIG", path)]);
    assert_eq!(length(&all), Some(300));
    for (text, part) in [
        ("nonsense = 1", "nonsense is no flag"),
        ("port = [1]", "must be a text"),
        ("port =", "quaver.toml"),
        ("port = 99999", "99999"),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_quaver"))
            .args(["serve", "--config", path])
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(part), "{text}: {stderr}");
    }
}

#[test]
fn what_cannot_be_served_is_an_error_at_the_start() {
    let server = Server::start(&[]);
    let port = server.url.rsplit(':').next().unwrap();
    for (args, part) in [
        (vec!["--port", port], "cannot listen there"),
        (vec!["--port", "0", "--max-model-len", "9999"], "the model is made for 4096 tokens"),
        (vec!["--port", "0", "--kv-cache-memory", "1K"], "raise --kv-cache-memory"),
        (vec!["--port", "0", "--kv-cache-memory", "900G", "--max-num-seqs", "4096"], "lower --kv-cache-memory"),
    ] {
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_quaver")).arg("serve").args(&args).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && stderr.lines().last().unwrap().contains(part), "{args:?}: {stderr}");
    }
}
