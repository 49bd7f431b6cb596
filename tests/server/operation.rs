//! How a server is run: keys, limits, logs, its config file, and its end.

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};

use serde_json::{Value, json};

use super::{HOOK, Server, chat, chunks};

const CHAT: &str = "/v1/chat/completions";

/// An answer that takes a while.
fn long() -> Value {
    chat("Tell me a story.", json!({"ignore_eos": true, "max_tokens": 3000}))
}

/// So many answers, one behind the other, that no machine is done with them while a test runs.
const ONE_AT_A_TIME: [&str; 2] = ["--max-num-seqs", "1"];

fn endless() -> Value {
    chat("Tell me a story.", json!({"ignore_eos": true, "n": 128, "temperature": 1}))
}

/// A connection on which something was sent.
fn send(server: &Server, text: &str) -> TcpStream {
    let mut client = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    client.write_all(text.as_bytes()).unwrap();
    client
}

/// What the server answers to a request that is written out, up to the end of the connection.
fn raw(server: &Server, text: &str) -> String {
    let mut answer = String::new();
    send(server, text).read_to_string(&mut answer).unwrap();
    answer
}

fn is_logged(server: &Server, parts: &[&str]) -> bool {
    server.log.lock().unwrap().iter().any(|line| parts.iter().all(|part| line.contains(part)))
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
    let server = Server::start(&["--cors-origin", "https://a.example", "--api-key", "sk-1"]);
    assert_eq!(allowed(&server, "https://a.example").as_deref(), Some("https://a.example"));
    assert_eq!(allowed(&server, "https://b.example"), None);
    // What a browser asks before: it has no key yet, and `*` would not allow it to send one.
    let preflight = raw(
        &server,
        "OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: https://a.example\r\nconnection: close\r\n\
         access-control-request-method: POST\r\naccess-control-request-headers: authorization,content-type\r\n\r\n",
    );
    assert!(preflight.starts_with("HTTP/1.1 200"), "{preflight}");
    assert!(preflight.contains("access-control-allow-headers: authorization,content-type\r\n"), "{preflight}");
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
    let body = long().to_string();
    let client = send(&server, &format!("POST {CHAT} HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    server.wait_until(|server| server.metric("quaver:kv_pages_used") > 0.0);
    drop(client);
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    server.wait_until(|server| server.get("/metrics").text.contains(r#"finished_reason="abort"} 2"#));
}

#[test]
fn a_request_that_takes_too_long_ends_in_an_error_also_within_a_stream() {
    let server = Server::start(&[&ONE_AT_A_TIME[..], &["--request-timeout", "1"]].concat());
    let reply = server.post(CHAT, &endless());
    assert_eq!(
        reply.error(),
        (504, "the request is not done after 1 s; ask for less, or raise --request-timeout".into())
    );
    let last = chunks(server.stream(CHAT, &endless())).pop().unwrap();
    assert_eq!(last["error"]["code"], "timeout");
    // A response's error is an event of its own kind; this one waits behind another.
    let before = server.stream(CHAT, &endless());
    let behind = server.stream("/v1/responses", &json!({"input": "Tell me a story.", "ignore_eos": true}));
    let lines: Vec<String> = behind.lines().map(Result::unwrap).filter(|line| !line.is_empty()).collect();
    let [.., name, data] = &lines[..] else { panic!("no event in {lines:?}") };
    let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!((name.as_str(), &data["type"], &data["code"]), ("event: error", &json!("error"), &json!("timeout")));
    assert_eq!(data["sequence_number"], lines.len() / 2 - 1);
    drop(before);
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    server.wait_until(|server| is_logged(server, &["gave 200 after", "written: the request is not done after 1 s"]));
    // The time runs before the engine has anything: while a form is compiled, which here is none.
    let server = Server::start(&["--request-timeout", "0"]);
    let body = chat(HOOK.0, json!({"guided_regex": "(", "stream": true}));
    assert_eq!(server.post(CHAT, &body).status, 504);
}

#[test]
fn a_client_that_stops_reading_holds_up_neither_the_engine_nor_the_end() {
    // Chunks repeat what the client calls the model: a long name soon fills what lies between the two.
    let names = format!("demo,{}", "m".repeat(60_000));
    let args = ["--request-timeout", "3", "--shutdown-timeout", "3600", "--served-model-name", &names];
    let server = Server::start(&[&ONE_AT_A_TIME[..], &args].concat());
    let mut body = endless();
    (body["stream"], body["model"]) = (true.into(), names[5..].into());
    let body = body.to_string();
    let stalled = send(&server, &format!("POST {CHAT} HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    server.wait_until(|server| server.metric("vllm:num_requests_running") > 0.0);
    server.wait_until(|server| server.metric("vllm:num_requests_running") == 0.0);
    assert_eq!(server.metric("vllm:num_requests_waiting"), 0.0);
    server.wait_until(|server| is_logged(server, &["gave 200 and was broken off"]));
    server.signal();
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(log.last().unwrap().ends_with("ended"), "{log:?}");
    drop(stalled);
}

#[test]
fn what_cannot_fit_is_refused_before_it_costs_anything() {
    let server = Server::start(&[]);
    let text = "word ".repeat(3 << 20);
    for (path, body) in [
        (CHAT, chat(&text, json!({}))),
        ("/v1/completions", json!({"prompt": text})),
        ("/v1/responses", json!({"input": text})),
        ("/tokenize", json!({"prompt": text})),
    ] {
        let (status, why) = server.post(path, &body).error();
        assert!(
            status == 400 && why.contains("4096 tokens, which the context holds, are never more than"),
            "{path}: {why}"
        );
    }
    let ids = vec![1; 100_000];
    for (path, body) in [
        ("/v1/completions", json!({"prompt": ids})),
        ("/v1/completions", json!({"prompt": [[1], ids]})),
        ("/detokenize", json!({"tokens": ids})),
    ] {
        let (status, why) = server.post(path, &body).error();
        assert!(status == 400 && why.starts_with("prompt has 100000 tokens, the context holds 4096"), "{path}: {why}");
    }
    for (fields, why) in [
        (json!({"stop": vec!["a"; 17]}), "17 stop strings are given, at most 16 may be"),
        (json!({"stop": "a".repeat(1025)}), "a stop string has 1025 bytes, at most 1024 may be"),
        (json!({"logit_bias": {"7": 1, "07": 1}}), "logit_bias names token 7 twice; name it once"),
        (json!({"guided_choice": vec!["a"; 10_001]}), "10001 choices are given, at most 10000 may be"),
        (
            json!({"guided_choice": ["a".repeat(2 << 20)]}),
            "the form of the answer has 2097152 bytes, at most 1048576 may be",
        ),
        (
            json!({"guided_regex": "a".repeat(2 << 20)}),
            "the form of the answer has 2097152 bytes, at most 1048576 may be",
        ),
    ] {
        assert_eq!(server.post(CHAT, &chat(HOOK.0, fields)).error(), (400, why.to_owned()));
    }
    // A body is refused by the length that it announces, before the client is told to go on.
    let head = format!("POST {CHAT} HTTP/1.1\r\nconnection: close\r\n");
    let answer = raw(&server, &format!("{head}expect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("request_too_large"), "{answer}");
    for lines in ["x: y\r\n".repeat(101), format!("x: {}\r\n", "y".repeat(64 << 10))] {
        let answer = raw(&server, &format!("GET /version HTTP/1.1\r\n{lines}connection: close\r\n\r\n"));
        assert!(answer.starts_with("HTTP/1.1 431") && answer.contains("headers_too_large"), "{answer}");
    }
    let lines = "x: y\r\n".repeat(98) + &format!("x: {}\r\n", "y".repeat(64_000));
    let answer = raw(&server, &format!("GET /version HTTP/1.1\r\n{lines}connection: close\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn a_place_is_taken_before_any_work_is_done() {
    let server = Server::start(&["--max-num-seqs", "1", "--max-queue", "0"]);
    let wrong = chat(HOOK.0, json!({"guided_regex": "("}));
    assert_eq!(server.post(CHAT, &wrong).status, 400);
    let mut stream = server.stream(CHAT, &long());
    stream.read_line(&mut String::new()).unwrap();
    assert_eq!(server.post(CHAT, &wrong).status, 429);
}

#[test]
fn bodies_under_way_have_so_much_room_and_no_more() {
    let server = Server::start(&["--max-body-size", "1K"]);
    let head = format!("POST {CHAT} HTTP/1.1\r\ncontent-length: 1000\r\n\r\n");
    let slow: Vec<_> = (0..4).map(|_| send(&server, &format!("{head}{}", " ".repeat(999)))).collect();
    let body = chat(HOOK.0, json!({"user": "u".repeat(200)}));
    server.wait_until(|server| server.post(CHAT, &body).status == 503);
    let refused = server.post(CHAT, &body);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(refused.error().1.starts_with("the requests that are being read fill the memory"));
    drop(slow);
    server.wait_until(|server| server.post(CHAT, &body).status == 200);
}

#[test]
fn while_the_model_is_loaded_requests_are_refused_and_a_signal_ends() {
    // A hub that never answers.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let (home, endpoint) = (tempfile::tempdir().unwrap(), format!("http://{}", hub.local_addr().unwrap()));
    let env =
        [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", home.path().to_str().unwrap()), ("NO_PROXY", "127.0.0.1")];
    let server = Server::spawn(&["--model", "someone/something"], &env);
    for path in ["/health", "/v1/models", "/metrics"] {
        assert_eq!((server.get(path).status, path), (503, path));
    }
    let refused = server.post(CHAT, &chat(HOOK.0, json!({})));
    assert_eq!(
        (refused.error(), refused.header("retry-after")),
        ((503, "the model is being loaded".into()), Some("1"))
    );
    assert_eq!([server.get("/").status, server.get("/version").status], [200, 200]);
    server.signal();
    let (code, log) = server.end();
    assert!(code == Some(0) && log.last().unwrap().ends_with("ended"), "{log:?}");
}

#[test]
fn request_ids_are_kept_or_given() {
    let server = Server::start(&[]);
    let reply = server.post_text("/tokenize", r#"{"prompt": "a"}"#, &[("x-request-id", "mine-7")]);
    assert_eq!(reply.header("x-request-id"), Some("mine-7"));
    assert!(server.get("/health").header("x-request-id").unwrap().starts_with("req-"));
    server.wait_until(|server| is_logged(server, &["POST /tokenize gave 200", "mine-7"]));
    // The answer itself is called after it, as vLLM does.
    let body = chat(HOOK.0, json!({})).to_string();
    let reply = server.post_text(CHAT, &body, &[("x-request-id", "mine-8")]);
    assert_eq!(reply.json()["id"], "chatcmpl-mine-8");
}

#[test]
fn the_log_tells_how_a_request_ended_and_what_it_took() {
    let server = Server::start(&["--log-format", "json"]);
    let find = |server: &Server, part: &str| {
        let log = server.log.lock().unwrap();
        let lines = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.into_iter().find(|line| line["message"].as_str().unwrap().contains(part))
    };
    let stream = server.stream(CHAT, &chat(HOOK.0, json!({"stream_options": {"include_usage": true}})));
    let usage = chunks(stream).pop().unwrap()["usage"].take();
    let tokens = format!("{} tokens read, {} written", usage["prompt_tokens"], usage["completion_tokens"]);
    server.wait_until(|server| find(server, &tokens).is_some());
    let line = find(&server, &tokens).unwrap();
    let (id, message) = (line["request_id"].as_str().unwrap(), line["message"].as_str().unwrap());
    assert!(message.starts_with(&format!("POST {CHAT} gave 200 after ")) && message.contains(id), "{line}");
    // Hung up in the middle of a stream, and before anything was answered.
    let mut stream = server.stream(CHAT, &long());
    stream.read_line(&mut String::new()).unwrap();
    drop(stream);
    server.wait_until(|server| find(server, "gave 200 and was broken off after").is_some());
    let body = long().to_string();
    let head = format!("POST {CHAT} HTTP/1.1\r\nx-request-id: gone\r\ncontent-length: {}\r\n\r\n", body.len());
    let client = send(&server, &(head + &body));
    server.wait_until(|server| server.metric("quaver:kv_pages_used") > 0.0);
    drop(client);
    server.wait_until(|server| find(server, "completions was broken off after").is_some());
    assert_eq!(find(&server, "completions was broken off after").unwrap()["request_id"], "gone");
}

#[test]
fn details_are_logged_where_the_variable_asks_for_them() {
    let server = Server::spawn(&[], &[("QUAVER_VERBOSE", "1")]);
    drop(send(&server, "GET"));
    server.wait_until(|server| is_logged(server, &["DEBUG", "a connection broke off"]));
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
    // Neither the request nor the time to finish it is over before: the end is the second signal's doing.
    let server = Server::start(&[&ONE_AT_A_TIME[..], &["--shutdown-timeout", "36000"]].concat());
    let mut stream = server.stream(CHAT, &endless());
    stream.read_line(&mut String::new()).unwrap();
    server.drain();
    server.signal();
    let mut rest = Vec::new();
    // The stream breaks off, as an error or as an early end.
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(log.iter().any(|line| line.contains("requests were broken off")), "{log:?}");
}

#[test]
fn what_is_not_done_within_the_shutdown_timeout_is_broken_off() {
    let server = Server::start(&[&ONE_AT_A_TIME[..], &["--shutdown-timeout", "1"]].concat());
    let mut stream = server.stream(CHAT, &endless());
    stream.read_line(&mut String::new()).unwrap();
    server.signal();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    let (code, log) = server.end();
    assert!(code == Some(0) && log.iter().any(|line| line.contains("requests were broken off")), "{log:?}");
}

#[test]
fn flags_come_from_a_file_a_variable_and_the_command_line_in_this_order() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("quaver.toml");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "max-model-len = 100\nserved_model_name = [\"x\", \"y\"]\nlog-format = \"json\"\nno-prefix-caching = true\n\
         gpu-memory-utilization = 0.8\n",
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
