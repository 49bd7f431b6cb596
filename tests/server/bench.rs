//! `quaver bench serve` against `quaver serve`.

use std::process::{Command, Output};

use serde_json::Value;

use super::Server;

fn bench(server: &Server, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quaver"))
        .args(["bench", "serve", "--url", &server.url])
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn load_is_put_on_a_server_and_counted() {
    let server = Server::start(&["--api-key", "sk-1"]);
    let args =
        ["--requests", "12", "--concurrency", "4", "--prompt-words", "20", "--max-tokens", "9", "--api-key", "sk-1"];
    let ran = bench(&server, &[&args[..], &["--json", "--rate", "500"]].concat());
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!((report["failed"].as_u64(), report["completion_tokens"].as_u64()), (Some(0), Some(12 * 9)));
    assert!(report["prompt_tokens"].as_u64().unwrap() >= 12 * 20);
    for times in ["ttft_ms", "inter_token_ms", "e2e_ms"] {
        let [p50, p90, p99] = ["p50", "p90", "p99"].map(|key| report[times][key].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p90 && p90 <= p99, "{report}");
    }
    let table = String::from_utf8(bench(&server, &args).stdout).unwrap();
    assert!(table.contains("first token") && table.contains("12 answered, 0 failed"), "{table}");
    // Without the key nothing is answered, and that is a failure.
    let ran = bench(&server, &["--served-model-name", "x", "--requests", "2"]);
    assert_eq!(ran.status.code(), Some(1));
    assert!(String::from_utf8(ran.stderr).unwrap().contains("status 401"));
}
