//! `quaver eval`: the shapes of its answers, and its refusals. What the figures are is in tests/eval.rs.

use std::fs;

use serde_json::Value;

use crate::quaver;
use crate::support::checkpoints;

const TEXT: &str =
    "It was a cold morning. The old man sat down by the fire and warmed his hands. Nobody said a word.\n";

/// The demo model and a text in a folder.
fn text() -> (tempfile::TempDir, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    fs::write(&text, TEXT.repeat(3)).unwrap();
    (folder, checkpoints::demo().display().to_string(), text.display().to_string())
}

#[test]
fn perplexity_states_text_windows_and_figures() {
    let (_folder, model, text) = text();
    let run = |more: &[&str]| {
        let args = ["eval", "perplexity", "--model", &model, "--data", &text, "--profile", "exact", "--json"];
        quaver([&args, more].concat()).json().remove(0)
    };
    let whole = run(&["--context", "256"]);
    let keys: Vec<&String> = whole.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["model", "tokens", "nll", "perplexity", "context", "stride", "windows"]);
    assert_eq!((&whole["context"], &whole["stride"], &whole["windows"]), (&256.into(), &256.into(), &1.into()));
    let nll = |object: &Value| object["nll"].as_f64().unwrap();
    assert!((nll(&whole).exp() / whole["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-12);
    // Less context makes a text less likely; with a stride, all of it is still scored once.
    let (short, strided) = (run(&["--context", "16"]), run(&["--context", "16", "--stride", "4"]));
    assert!(nll(&short) > nll(&strided) && nll(&strided) > nll(&whole), "{short} {strided} {whole}");
    assert_eq!((&short["tokens"], &strided["tokens"]), (&whole["tokens"], &whole["tokens"]));
    assert_eq!(run(&["--context", "16", "--max-tokens", "20"])["tokens"], 20);
    let table = quaver(["eval", "perplexity", "--model", &model, "--data", &text, "--context", "256"]).succeeds();
    assert!(table.starts_with("model ") && table.contains("\nperplexity  "), "{table}");
}

#[test]
fn comparison_states_both_models_and_how_far_they_are_apart() {
    let (_folder, model, text) = text();
    let got =
        quaver(["eval", "compare", &model, &model, "--data", &text, "--context", "64", "--json"]).json().remove(0);
    let keys: Vec<&String> = got.as_object().unwrap().keys().collect();
    let want =
        ["base", "quant", "perplexity_ratio", "kl_mean", "kl_median", "kl_p99", "top1_agreement", "recovery_percent"];
    assert_eq!(keys, want);
    assert_eq!(got["base"], got["quant"]);
    assert_eq!((&got["kl_p99"], &got["recovery_percent"]), (&0.0.into(), &100.0.into()));
    let table = quaver(["eval", "compare", &model, &model, "--data", &text, "--context", "64"]).succeeds();
    assert!(table.contains("recovery") && table.contains("100.000%"), "{table}");
}

#[test]
fn tasks_give_scores_and_what_is_recovered_of_a_baseline() {
    let (folder, model, _) = text();
    let task = checkpoints::fixtures().join("tasks/choices.jsonl").display().to_string();
    let run = |more: &[&str]| {
        quaver([&["eval", "tasks", &format!("{task}:acc_norm"), "--model", &model, "--json"], more].concat())
    };
    let got = run(&[]).json().remove(0);
    let row = &got["tasks"][0];
    assert_eq!((&row["task"], &row["lines"], &row["metric"]), (&"choices".into(), &16.into(), &"acc_norm".into()));
    let score = row["scores"]["acc_norm"]["value"].as_f64().unwrap();
    assert!((0.5..=1.0).contains(&score) && row["scores"]["acc"]["stderr"].as_f64().unwrap() > 0.0);
    let baseline = folder.path().join("base.json");
    fs::write(&baseline, got.to_string().replace(&format!("\"value\":{score}"), "\"value\":0.5")).unwrap();
    let beside = run(&["--baseline", &baseline.display().to_string()]).json().remove(0);
    assert_eq!(beside["tasks"][0]["base"], 0.5);
    assert_eq!(beside["recovery_percent"].as_f64().unwrap(), 200.0 * score);
    assert_eq!(run(&["--limit", "4"]).json()[0]["tasks"][0]["lines"], 4);
}

#[test]
fn tasks_that_cannot_be_judged_or_run_are_refused_before_any_is_run() {
    let (folder, model, _) = text();
    let file = |name: &str, lines: &str| {
        let path = folder.path().join(name);
        fs::write(&path, lines).unwrap();
        path.display().to_string()
    };
    let sound = r#"{"prompt": "It was a cold", "choices": ["morning", "fire"], "answer": 0}"#;
    let good = file("good.jsonl", sound);
    // A run says which model computes what: nothing may be said before a refusal.
    let refused = |code: i32, args: &[&str], why: &str| {
        let base = ["eval", "tasks", "--model", &model, "--backend", "cpu"];
        quaver([&base, args].concat()).env("RUST_LOG", "info").fails(code, why);
    };
    refused(
        2,
        &[&format!("{good}:accuracy")],
        &format!("{good}:accuracy: accuracy is no metric; the metrics are acc, acc_norm, mc2, exact_match"),
    );
    refused(2, &[&format!("{good}:mc2")], "good: its lines give acc, acc_norm, not mc2");
    let baseline = file("base.json", r#"{"tasks": [{"task": "other", "scores": {"acc": {"value": 1}}}]}"#);
    refused(1, &[&good, "--baseline", &baseline], "--baseline: has no acc of good; run the base over the same files");
    let long =
        file("long.jsonl", &format!("{sound}\n\n{{\"prompt\": \"{}\", \"answer\": \"b\"}}", "It was. ".repeat(20)));
    refused(
        1,
        &[&good, &long, "--max-model-len", "300"],
        &format!(
            "{long}: line 3: has 62 tokens and wants 256 more, the context holds 300; shorten it, lower its `max_tokens`, \
             or raise --max-model-len or --kv-cache-memory"
        ),
    );
    let longer = sound.replace("cold", &"cold ".repeat(9000));
    let longer = file("longer.jsonl", &longer);
    refused(
        1,
        &[&good, &longer],
        &format!("{longer}: line 1: has 9006 tokens with its choice, the model is made for 4096; shorten it"),
    );
}

#[test]
fn an_answer_goes_on_with_what_the_assistant_has_begun() {
    let (folder, model, _) = text();
    let task = folder.path().join("task.jsonl");
    let line = |answer: &str| {
        let user = serde_json::json!({"role": "user", "content": "Who is Captain Hook?"});
        let begun = serde_json::json!({"role": "assistant", "content": "Captain Hook is a"});
        serde_json::json!({"messages": [user, begun], "answer": answer, "max_tokens": 32}).to_string()
    };
    fs::write(&task, line(" pirate, and the great enemy of Peter Pan.")).unwrap();
    let path = task.display().to_string();
    let got = quaver(["eval", "tasks", &path, "--model", &model, "--json"]).json().remove(0);
    assert_eq!(got["average"], 1.0);
}

#[test]
fn mistakes_are_told_in_one_line() {
    let (folder, model, text) = text();
    let perplexity =
        |more: &[&str]| quaver([&["eval", "perplexity", "--model", &model, "--data", &text], more].concat());
    perplexity(&["--context", "16", "--stride", "17"])
        .fails(2, "--stride 17 is more than --context 16: tokens between windows would be lost");
    quaver(["eval", "compare", "a", "b", "--model", &model, "--data", &text])
        .fails(2, "eval compare takes its two models without --model: eval compare BASE QUANT");
    let task = folder.path().join("task.jsonl");
    let path = task.display().to_string();
    for (line, why) in [
        (r#"{"prompt": "a"}"#, "line 1: `answer` must be the text of the right answer"),
        (
            r#"{"prompt": "a", "answer": "b", "until": ["x", ""]}"#,
            "line 1: `until`: stop string 1: is empty; give at least one character",
        ),
        (r#"{"prompt": "a", "choices": ["b"], "answer": 0}"#, "line 1: has fewer than two choices"),
        (
            r#"{"prompt": "a", "choices": ["b", "c"], "answer": 2}"#,
            "line 1: `answer` must be the number of a choice from 0 on, found 2",
        ),
        (r#"{"prompt": "a", "choices": ["b", "c"]}"#, "line 1: has neither `answer` nor `labels`"),
        (
            r#"{"messages": [], "choices": ["b", "c"], "answer": 0}"#,
            "line 1: has choices behind messages; write the conversation as a `prompt`, as the template renders it",
        ),
        ("", "has no line; give a JSON object a line"),
    ] {
        fs::write(&task, line).unwrap();
        quaver(["eval", "tasks", &path, "--model", &model]).fails(1, &format!("{path}: {why}"));
    }
    fs::write(&task, "{\"prompt\": \"a\", \"anwser\": \"b\"}").unwrap();
    quaver(["eval", "tasks", &path, "--model", &model])
        .fails_with(1, &["task.jsonl: line 1: unknown field `anwser`, expected one of `prompt`, `messages`"]);
    let empty = folder.path().join("empty.txt").display().to_string();
    fs::write(&empty, "").unwrap();
    quaver(["eval", "perplexity", "--model", &model, "--data", &empty])
        .fails(1, &format!("{empty}: is empty; give a text"));
}
