//! `quaver bench serve` against `quaver serve`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::Server;

fn bench(url: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quaver")).args(["bench", "serve", "--url", url]).args(args).output().unwrap()
}

fn report(url: &str, args: &[&str]) -> Value {
    let ran = bench(url, &[args, &["--json"]].concat());
    assert!(ran.status.success(), "{ran:?}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

/// Another server: it answers each completion with what `answer` gives, as it comes, and closes the connection.
fn other_server(answer: impl Fn(&mut dyn Write) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (url, answer) = (format!("http://{}", listener.local_addr().unwrap()), Arc::new(answer));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, answer) = (stream.unwrap(), Arc::clone(&answer));
            thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                    if line == "\r\n" {
                        break;
                    }
                }
                reader.read_exact(&mut vec![0; length]).unwrap();
                let mut out = &stream;
                write!(out, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n").unwrap();
                answer(&mut out);
            });
        }
    });
    url
}

#[test]
fn load_is_put_on_a_server_and_counted() {
    let server = Server::start(&["--api-key", "sk-1"]);
    let args =
        ["--requests", "12", "--concurrency", "4", "--prompt-words", "20", "--max-tokens", "9", "--api-key", "sk-1"];
    let ran = bench(&server.url, &[&args[..], &["--json"]].concat());
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!((report["failed"].as_u64(), report["completion_tokens"].as_u64()), (Some(0), Some(12 * 9)));
    assert!(report["prompt_tokens"].as_u64().unwrap() >= 12 * 20);
    for times in ["ttft_ms", "inter_token_ms", "per_token_ms", "e2e_ms"] {
        let [p50, p90, p99] = ["p50", "p90", "p99"].map(|key| report[times][key].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p90 && p90 <= p99, "{report}");
    }
    for speed in ["prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s"] {
        assert!(report[speed].as_f64().unwrap() > 0.0, "{report}");
    }
    assert_eq!(report["tokens_are_counted_by"], "server");
    let table = String::from_utf8(bench(&server.url, &args).stdout).unwrap();
    assert!(
        table.contains("first token") && table.contains("12 answered, 0 failed") && table.contains("decode"),
        "{table}"
    );
    // Without the key nothing is answered, and that is a failure.
    let ran = bench(&server.url, &["--served-model-name", "x", "--requests", "2"]);
    assert_eq!(ran.status.code(), Some(1));
    assert!(String::from_utf8(ran.stderr).unwrap().contains("status 401"));
}

const PIECE: &str = r#"data: {"choices": [{"text": "word"}]}"#;

#[test]
fn servers_that_tell_their_tokens_at_the_end_or_not_at_all_are_measured_too() {
    let args = ["--served-model-name", "x", "--requests", "3", "--concurrency", "1"];
    let usage = r#"data: {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 9}}"#;
    let last = other_server(move |out| write!(out, "{PIECE}\n\n{PIECE}\n\n{usage}\n\ndata: [DONE]\n\n").unwrap());
    let told = report(&last, &args);
    assert_eq!((&told["prompt_tokens"], &told["completion_tokens"]), (&120.into(), &27.into()));
    assert_eq!((&told["failed"], &told["tokens_are_counted_by"]), (&0.into(), &"server".into()));
    let never = other_server(|out| write!(out, "{PIECE}\n\n{PIECE}\n\ndata: [DONE]\n\n").unwrap());
    let counted = report(&never, &args);
    assert_eq!((&counted["prompt_tokens"], &counted["completion_tokens"]), (&Value::Null, &6.into()));
    assert_eq!((&counted["prefill_tokens_per_s"], &counted["tokens_are_counted_by"]), (&Value::Null, &"pieces".into()));
}

#[test]
fn at_a_rate_requests_come_whether_or_not_earlier_ones_are_over() {
    // Nobody is answered before all have asked.
    let all = (Mutex::new(0), Condvar::new());
    let url = other_server(move |out| {
        let mut asked = all.0.lock().unwrap();
        *asked += 1;
        all.1.notify_all();
        let (asked, waited) = all.1.wait_timeout_while(asked, Duration::from_secs(60), |asked| *asked < 40).unwrap();
        drop(asked);
        if !waited.timed_out() {
            write!(out, "{PIECE}\n\ndata: [DONE]\n\n").unwrap();
        }
    });
    let report = report(&url, &["--served-model-name", "x", "--requests", "40", "--rate", "400"]);
    assert_eq!((&report["failed"], &report["concurrency"]), (&0.into(), &Value::Null));
}

#[test]
fn at_a_rate_the_clock_runs_from_when_a_request_was_due() {
    let url = other_server(|out| {
        thread::sleep(Duration::from_millis(100));
        write!(out, "{PIECE}\n\ndata: [DONE]\n\n").unwrap();
    });
    let args = ["--served-model-name", "x", "--requests", "5", "--rate", "10000", "--max-concurrency", "1"];
    let report = report(&url, &args);
    // All five were due at once; the last was answered behind four others.
    assert!(report["ttft_ms"]["p99"].as_f64().unwrap() > 490.0, "{report}");
    assert!(report["e2e_ms"]["p99"].as_f64().unwrap() > 490.0, "{report}");
}
