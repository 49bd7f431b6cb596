//! `quaver batch`, run to its end, broken off, and misused.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{HOOK, chat};

fn batch(input: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quaver"));
    command.args(["batch", "--backend", "cpu", "--threads", "2", "--max-num-seqs", "4"]).args([input, output]);
    command
}

fn run(input: &Path, output: &Path) -> Output {
    batch(input, output).output().unwrap()
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
fn lines_with_many_answers_wait_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let body = json!({"prompt": ["It was", "Who"], "n": 30, "max_tokens": 1, "seed": 1});
    let lines: String = (0..8).map(|i| line(&format!("{i}"), "/v1/completions", body.clone())).collect();
    fs::write(&input, lines).unwrap();
    assert!(run(&input, &output).status.success());
    for (id, response) in answers(&output) {
        assert_eq!(
            (response["status_code"].as_u64(), response["body"]["choices"][59]["index"].as_u64()),
            (Some(200), Some(59)),
            "{id}"
        );
    }
}

#[test]
fn a_batch_that_is_killed_goes_on_and_no_other_run_writes_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output, part) =
        (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"), dir.path().join("out.jsonl.part"));
    let body = json!({"prompt": "It was", "max_tokens": 300, "ignore_eos": true});
    let ids: Vec<String> = (0..40).map(|i| format!("{i:02}")).collect();
    fs::write(&input, ids.iter().map(|id| line(id, "/v1/completions", body.clone())).collect::<String>()).unwrap();
    let written = || fs::read_to_string(&part).unwrap_or_default().lines().count();
    let mut killed = batch(&input, &output).stderr(Stdio::null()).spawn().unwrap();
    while written() < 3 {
        assert!(killed.try_wait().unwrap().is_none(), "it ended by itself");
        thread::sleep(Duration::from_millis(5));
    }
    let beside = run(&input, &output);
    let stderr = String::from_utf8(beside.stderr).unwrap();
    assert!(beside.status.code() == Some(1) && stderr.contains("is being written by another run"), "{stderr}");
    // SIGKILL, where there are signals.
    killed.kill().unwrap();
    assert!(!killed.wait().unwrap().success() && !output.exists());
    let kept = fs::read_to_string(&part).unwrap();
    let kept = &kept[..kept.rfind('\n').unwrap() + 1];
    assert!((3..40).contains(&kept.lines().count()));
    assert!(run(&input, &output).status.success());
    assert!(fs::read_to_string(&output).unwrap().starts_with(kept));
    assert_eq!(answers(&output).into_iter().map(|(id, _)| id).collect::<Vec<_>>(), ids, "none lost, none doubled");
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
