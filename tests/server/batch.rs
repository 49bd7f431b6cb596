//! `quaver batch`, run to its end, broken off, and misused.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use super::{HOOK, chat};

fn run(input: &Path, output: &Path) -> Output {
    let quaver = Command::new(env!("CARGO_BIN_EXE_quaver"))
        .args(["batch", "--backend", "cpu", "--threads", "2", "--max-num-seqs", "4"])
        .args([input, output])
        .output();
    quaver.unwrap()
}

fn line(id: &str, url: &str, body: Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body}).to_string() + "\n"
}

/// Answers by their ids.
fn answers(path: &Path) -> Vec<(String, Value)> {
    let lines = fs::read_to_string(path).unwrap();
    let answer = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let mut answers: Vec<_> = lines
        .lines()
        .map(answer)
        .map(|a| (a["custom_id"].as_str().unwrap().to_owned(), a["response"].clone()))
        .collect();
    answers.sort_by(|a, b| a.0.cmp(&b.0));
    answers
}

#[test]
fn a_batch_is_answered_and_goes_on_where_it_was_broken_off() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output, part) =
        (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"), dir.path().join("out.jsonl.part"));
    let mut text = String::new();
    for i in 0..12 {
        text += &line(&format!("chat-{i:02}"), "/v1/chat/completions", chat(HOOK.0, json!({"stream": true})));
    }
    text += &line("text", "/v1/completions", json!({"prompt": "It was", "max_tokens": 3}));
    text += &line("wrong", "/v1/completions", json!({"prompt": "It was", "temperature": -1}));
    text += &line("nowhere", "/v1/images", json!({}));
    fs::write(&input, &text).unwrap();
    let ran = run(&input, &output);
    assert!(ran.status.success() && ran.stdout.is_empty(), "{ran:?}");
    assert!(String::from_utf8_lossy(&ran.stderr).contains("2 of 15 answers are errors"), "{ran:?}");
    let whole = answers(&output);
    assert_eq!(whole.len(), 15);
    for (id, response) in &whole[..12] {
        assert_eq!(
            (&response["status_code"], &response["body"]["choices"][0]["message"]["content"]),
            (&json!(200), &json!(HOOK.1)),
            "{id}"
        );
    }
    assert_eq!(
        whole[12..].iter().map(|(id, r)| (id.as_str(), r["status_code"].as_u64().unwrap())).collect::<Vec<_>>(),
        [("nowhere", 404), ("text", 200), ("wrong", 400)]
    );
    assert!(!part.exists());
    // As a kill leaves it: some lines, and the beginning of one.
    let lines = fs::read_to_string(&output).unwrap();
    let cut = lines.lines().take(7).map(|line| line.len() + 1).sum::<usize>() + 20;
    fs::rename(&output, &part).unwrap();
    fs::write(&part, &lines[..cut]).unwrap();
    assert!(run(&input, &output).status.success());
    let ids = |answers: &[(String, Value)]| answers.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&answers(&output)), ids(&whole), "none lost, none doubled");
    assert_eq!(fs::read_to_string(&output).unwrap()[..cut - 20], lines[..cut - 20], "what was there was kept");
}

#[test]
fn a_batch_that_cannot_be_is_refused_before_a_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output, part) =
        (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"), dir.path().join("out.jsonl.part"));
    let good = line("a", "/v1/completions", json!({"prompt": "a"}));
    let refused = |text: &str, why: &str| {
        fs::write(&input, text).unwrap();
        let ran = run(&input, &output);
        let stderr = String::from_utf8(ran.stderr).unwrap();
        assert!(ran.status.code() == Some(1) && stderr.contains(why) && stderr.lines().count() == 1, "{stderr}");
    };
    refused("{\n", "line 1: is not JSON");
    refused(&format!("{good}\n{good}"), "line 3: has the custom_id a of an earlier line");
    refused("{\"custom_id\": \"a\"}\n", "must have a custom_id, and a url");
    fs::write(&part, "{\"custom_id\": \"other\"}\n").unwrap();
    refused(&good, "holds answers to other requests");
    fs::remove_file(&part).unwrap();
    fs::write(&output, "").unwrap();
    refused(&good, "is there already");
}
